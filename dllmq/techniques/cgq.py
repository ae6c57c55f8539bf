"""CGQ, Certainty-Guided Quantization (DLLMQuant, arXiv 2508.14090): how much a token counts in the error.

GPTQ's Hessian is taken on scaled inputs:

    X~_j = x_j (1[x_t,j = MASK] + sqrt(s_j)),   H = 2 X~ X~^T

with a *custom* indicator (1 for masked tokens, 0.7 for unmasked ones) and s_j the model's confidence, the
softmax probability of its predicted token. So the weight on a token's squared error is

    c_j = (indicator_j + sqrt(s_j))^2

A masked token of high confidence is about to be committed and drives the next step.

Where the paper is silent, we decide: s_j = 0 on decoded tokens (`unmasked_confidence = zero`). With the
literal reading (`model`) decoded tokens keep their own, high, confidence and end up weighing as much as the
masked ones, and the error on masked tokens rises. Both are selectable. The weights enter every statistic
and loss of a method through the one c_j they all take: the Gram matrix (GPTQ), mean |x| and the search
losses (AWQ). A constant weight changes nothing; with clean text and `zero` every weight is 0.7^2, so CGQ is
inert there.

Off: `recipe.uniform_weight`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dllmq.calibration.states import CalibrationState

UNMASKED_CONFIDENCE = ("zero", "model")


def token_weights(
    masked: Bool[Tensor, "B L"],
    score: Float[Tensor, "B L"],
    unmasked: float = 0.7,
    unmasked_confidence: str = "zero",
    masked_indicator: float = 1.0,
) -> Float[Tensor, "B L"]:
    """c = (indicator + sqrt(s))^2, see the equation on top of this file.

    Args:
        masked: 1[x_t = MASK].
        score: confidence s in [0, 1] of the predicted token at each position.
        unmasked: indicator of decoded tokens; masked_indicator: of masked ones.
        unmasked_confidence: "zero" (s = 0 on decoded tokens) or "model" (the literal reading).

    Raises:
        ValueError: an unknown `unmasked_confidence`, or an indicator that is negative or not finite.
    """
    if unmasked_confidence not in UNMASKED_CONFIDENCE:
        raise ValueError(
            f"cgq_unmasked_confidence={unmasked_confidence} is not known; it is "
            f"{' or '.join(UNMASKED_CONFIDENCE)}."
        )
    if not all(math.isfinite(indicator) and indicator >= 0 for indicator in (unmasked, masked_indicator)):
        raise ValueError(
            f"cgq_unmasked={unmasked} and cgq_masked={masked_indicator}: both must be finite and >= 0; the "
            "paper's are 0.7 and 1."
        )
    indicator = torch.where(masked, masked_indicator, unmasked)
    s = score if unmasked_confidence == "model" else torch.where(masked, score, 0.0)
    return (indicator + s.sqrt()) ** 2


@dataclass(frozen=True)
class CGQ:
    """The token weight of a batch of states; fields as in `token_weights`."""

    unmasked: float = 0.7
    unmasked_confidence: str = "zero"
    masked_indicator: float = 1.0

    def __post_init__(self) -> None:
        token_weights(torch.zeros(1, 1, dtype=torch.bool), torch.zeros(1, 1), **vars(self))

    @property
    def observe(self) -> str:
        """Where scores must be recorded: `model` needs those of decoded tokens too."""
        return "all" if self.unmasked_confidence == "model" else "masked"

    @property
    def constant_without_masks(self) -> bool:
        """Whether every token of fully visible text weighs the same."""
        return self.unmasked_confidence == "zero"

    @property
    def weightless_without_masks(self) -> bool:
        """Whether every token of fully visible text weighs 0."""
        return self.constant_without_masks and self.unmasked == 0

    def __call__(self, state: CalibrationState) -> Float[Tensor, "B L"]:
        return token_weights(state.masked, state.score, **vars(self))
