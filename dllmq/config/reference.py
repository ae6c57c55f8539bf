"""The config of full precision's record, to which the cells of a sweep are compared."""

from __future__ import annotations

from dataclasses import replace

from dllmq.config.schema import RunConfig


def reference_config(config: RunConfig) -> RunConfig:
    """What full precision's numbers depend on: everything that only concerns quantization at its default.

    Full precision is decoded exactly: what a run with a cache or a threshold loses to it is the loss of both.
    """
    plain = RunConfig()
    fidelity = {name: getattr(plain.eval, name) for name in ("fidelity_states", "fidelity_prompts")}
    return replace(
        config.full_precision().decoded_exactly(),
        group_size=plain.group_size, act_group_size=plain.act_group_size,
        symmetric=plain.symmetric, act_symmetric=plain.act_symmetric,
        attn_bits=plain.attn_bits, value_granularity=plain.value_granularity, value_scale=plain.value_scale,
        cgq_unmasked=plain.cgq_unmasked, cgq_masked=plain.cgq_masked,
        cgq_unmasked_confidence=plain.cgq_unmasked_confidence,
        iaaq_alpha_min=plain.iaaq_alpha_min, iaaq_alpha_step=plain.iaaq_alpha_step,
        backend=plain.backend, export=plain.export, seed=0,
        calibration=plain.calibration, eval=replace(config.eval, **fidelity),
    )  # fmt: skip
