"""Hidden states -> what LLaDA's process reads from them: the prediction x0 and its confidence.

Legend: as in sampler.py; n positions of one call of the LM head.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllmq.diffusion.confidence import argmax_confidence, confidence_of, exclude, pieces
from dllmq.diffusion.predict import (
    Hidden,
    MaskPredictor,
    Positions,
    at_least_float32,
    logits_at,
    positions,
)
from dllmq.diffusion.process import uniform
from dllmq.diffusion.settings import SamplerConfig


@dataclass(frozen=True)
class Reader:
    """hidden states -> prediction, confidence (and logits) at the observed positions."""

    model: MaskPredictor
    config: SamplerConfig
    flag_ids: tuple[list[int], list[int]]  # never predicted; never trusted
    generator: torch.Generator | None
    keep_logits: bool

    def __call__(
        self,
        x: Int[Tensor, "B L"],
        hidden: tuple[Hidden, ...],
        committable: Bool[Tensor, "B L"],
        observed: Bool[Tensor, "B L"],
    ) -> tuple[Int[Tensor, "B L"], Float[Tensor, "B L"], Float[Tensor, "N E"] | None]:
        # alone and first, so that its rounding and noise never depend on `observed`
        groups = [(committable, self.config.temperature)]
        if observed is not committable:
            groups.append((observed & ~committable, 0.0))
        prediction, confidence, logits = x.clone(), None, None
        for group, temperature in groups:
            at = positions(group)
            parts = [self._read(part, temperature) for part in self._logits(hidden, at)]
            if not parts:
                continue
            x0, p, values = (torch.cat(part) for part in zip(*parts, strict=True))
            if confidence is None:
                confidence = p.new_zeros(x.shape)
                logits = values.new_empty(int(observed.sum()), values.shape[1]) if self.keep_logits else None
            prediction[at] = x0
            confidence[at] = p
            if logits is not None:
                logits[group[observed]] = values
        assert confidence is not None
        return prediction, confidence, logits

    def _logits(self, hidden: tuple[Hidden, ...], at: Positions) -> Iterator[Tensor]:
        never_predicted = self.flag_ids[0]
        for logits in logits_at(self.model, hidden, at, self.config.cfg_scale):
            yield exclude(logits, never_predicted)

    def _read(
        self, logits: Float[Tensor, "n E"], temperature: float
    ) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, "n E2"]]:
        never_trusted = self.flag_ids[1]
        if temperature == 0:
            x0, p = argmax_confidence(logits, never_trusted)
        else:
            x0 = torch.cat([self._noisy(piece, temperature).argmax(-1) for piece in pieces(logits)])
            p = confidence_of(logits, x0, never_trusted)
        # new_empty, not logits[:, :0]: a view would keep every chunk's logits alive
        return x0, p, at_least_float32(logits) if self.keep_logits else logits.new_empty(len(logits), 0)

    def _noisy(self, logits: Float[Tensor, "r E"], temperature: float) -> Float[Tensor, "r E"]:
        """logits - T log(-log u), in float64."""
        u = uniform(tuple(logits.shape), self.generator, logits.device, torch.float64)
        return logits.double() - u.log_().neg_().log_().mul_(temperature)


def flag_ids(model: MaskPredictor, config: SamplerConfig) -> tuple[list[int], list[int]]:
    """The ids that the two EOS flags exclude from the prediction and from the confidence."""

    def id_of(name: str, flag: str) -> int:
        if (value := getattr(model.config, name, None)) is None:
            raise ValueError(
                f"{flag}=true needs {name}, which the model's config does not have: set it to false."
            )
        return int(value)

    never_predicted, never_trusted = [], []
    if config.logits_eos_inf:
        never_predicted = [id_of("eos_token_id", "logits_eos_inf")]
    if config.confidence_eos_eot_inf:
        never_trusted = [id_of(name, "confidence_eos_eot_inf") for name in ("eot_token_id", "eos_token_id")]
        if config.temperature > 0:
            never_trusted = never_trusted[:1]  # only EoT, see the module's docstring
    return never_predicted, never_trusted
