"""A LLaDA of two layers with random weights, and prompts and trajectories for it."""

from typing import Any

import torch
from torch import Tensor

from dllmq.calibration.states import Trajectory, record_trajectories
from dllmq.diffusion import SamplerConfig
from dllmq.models.llada import LLaDA, LLaDAConfig

VOCAB, EOT, MASK, EOS = 40, 37, 38, 39
SAMPLER = SamplerConfig(gen_length=16, steps=16, block_length=16)
LENGTHS = (5, 3, 7, 4)


def tiny_config(**changes: Any) -> LLaDAConfig:
    fields: dict[str, Any] = dict(
        d_model=32,
        n_layers=2,
        n_heads=4,
        mlp_hidden_size=48,
        vocab_size=VOCAB,
        mask_token_id=MASK,
        eos_token_id=EOS,
        eot_token_id=EOT,
        max_sequence_length=32,
        rope_theta=10000.0,
    )
    return LLaDAConfig(**(fields | changes))


def tiny_model(seed: int = 0, **changes: Any) -> LLaDA:
    """Random weights, norms included; it never predicts the mask (its row of the head is 0)."""
    model = LLaDA(tiny_config(**changes))
    rng = torch.Generator().manual_seed(seed)
    model.init_weights(rng, gain=1.2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.copy_(1 + 0.3 * torch.randn(p.shape, generator=rng))
            if name == "model.transformer.ff_out.weight":
                p[MASK] = 0
    return model.requires_grad_(False).eval()


def tiny_prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(0, EOT, (n,), generator=rng) for n in lengths]


def tiny_trajectories(model: LLaDA, lengths: tuple[int, ...] = LENGTHS) -> list[Trajectory]:
    return record_trajectories(model, tiny_prompts(lengths), SAMPLER, batch_size=4)
