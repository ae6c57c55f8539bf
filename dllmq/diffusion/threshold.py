"""Confidence-aware parallel decoding: how many tokens a step commits is the model's confidence.

    a step commits in every row the most confident candidate, and all others with confidence >= threshold
    a block ends when no mask is left in it

Candidates are the masks a step may commit (left of the block's end; with a cache see cache.py). `steps` plays
no part. Semantics are those of Fast-dLLM (arXiv 2505.22618, `get_transfer_index` with a threshold); a
threshold above 1 commits one token per step, which is the plain process with steps = gen_length.

Where Fast-dLLM leaves it open, or is one row at a time:

- Rows decode as if alone. A row whose block is complete waits, out of the forwards, for the slowest one.
- The mask id is a legal prediction: the position stays masked. A row takes at most as many steps in a block
  as it had candidates at its start, so masks can be left over (Fast-dLLM would never end).
- Ties: higher confidence first, then the leftmost position. Confidences are float32 (Fast-dLLM: float64).
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllmq.diffusion.sampler import TopK


@dataclass(frozen=True)
class Threshold:
    """The commit rule (sampler.CommitRule) of a threshold."""

    threshold: float

    def counts(self, masked: Bool[Tensor, "B E"], block_length: int) -> tuple[Int[Tensor, " B"], ...]:
        """1 for every step that a row may take in the block that starts, 0 beyond."""
        candidates = masked.sum(1).cpu()
        return tuple((candidates > i).long() for i in range(int(candidates.max())))

    def remaining(self, counts: Int[Tensor, "S B"], in_block: Bool[Tensor, "B n"]) -> Int[Tensor, "S B"]:
        """Rows without a mask in the block take no further step."""
        return counts * in_block.any(1).cpu()

    def __call__(
        self, key: Float[Tensor, "B L"], committable: Bool[Tensor, "B L"], count: Int[Tensor, " B"]
    ) -> Bool[Tensor, "B L"]:
        """The highest key, and all that reach the threshold, of the rows that take this step."""
        best = TopK(1)(key, committable, count)
        return best | (committable & (key >= self.threshold) & (count > 0).to(key.device)[:, None])
