"""Which prompts are denoised together, and what happens when memory runs out.

Batches are a function of the prompts, gen_length and the batch size alone: prompts are sorted by length, then
by their tokens, and cut from the longest on. A batch ends when it is full, or where the next prompt's canvas
would be pads for more than a quarter (`PADDING`): left padding is computed like everything else, so a short
prompt is cheaper in a batch of its own kind. Shuffled requests give the same batches.

On a GPU the canvas of a batch that has pads anyway ends at a multiple of `BUCKET`: fewer shapes to record
(models/graphs.py), and a mask whose rows are aligned. Where all prompts are of one length there are no pads,
and none are added: attention then needs no mask.

The size is a number, or `auto`: the largest power of two, 64 at most, whose canvases of the longest prompt
take a quarter of the device's memory (of all of it in whole GiB, not of what is free just now: the same
requests on the same machine give the same size). When memory runs out all the same, the size is halved for
the batch it ran out in and those after it. As the longest canvases come first, that settles it in the first
batch as a rule. Greedy answers do not change but for rounding; where noise is drawn (temperature > 0) it is
drawn for a whole batch, so smaller batches give other samples: that is warned about and noted in the record.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dllmq.faults import is_out_of_memory
from dllmq.models.memory import rounded, total_memory

log = logging.getLogger(__name__)
PADDING = 0.25  # share of a canvas that may be pads
BUCKET = 32  # columns
LARGEST = 64  # rows; beyond that no device gets faster
SHARE = 0.25  # of the device's memory that `auto` lets the activations take
# Vectors of the model's width that a block holds at once per token, in float32: residual, norm, Q, K, V and
# their rotated copies, and an MLP five times as wide.
VECTORS = 28


@dataclass(frozen=True)
class Batch:
    """Prompts that are denoised together.

    Attributes:
        index: 0-based; total: how many batches there are, as far as is known.
        rows: which prompts of the requests.
    """

    index: int
    total: int
    rows: tuple[int, ...]


class Batches:
    """The batches of a set of prompts; iterate once.

    Args:
        prompts: tokens of each.
        gen_length: columns behind every prompt.
        size: rows of a batch at most.

    Attributes:
        size: of the batches from the last one on; first_size: as given.
    """

    def __init__(self, prompts: Sequence[list[int]], gen_length: int, size: int) -> None:
        self.prompts, self.gen_length, self.size = prompts, gen_length, size
        self.first_size = size
        self._order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i], i))
        self._left, self._failed = self._order, False
        self._plan: dict[int, int] | None = None  # to begin with again

    def __iter__(self) -> Iterator[Batch]:
        index, planned = 0, dict[int, int]()
        while self._left:
            self.size = planned.get(index, self.size)
            sizes = self._cut()
            yield Batch(index, index + len(sizes), tuple(self._left[: sizes[0]]))
            if self._failed:  # by now nothing holds the tensors of the attempt
                self._failed = False
                if torch.cuda.is_initialized():
                    torch.cuda.empty_cache()
                continue
            if self._plan is not None:
                self._left, index, planned, self._plan = self._order, 0, self._plan, None
                self.size = self.first_size
                continue
            self._left, index = self._left[sizes[0] :], index + 1

    def begin_again(self, sizes: dict[int, int]) -> None:
        """After the last batch comes the first one again: another process has settled other sizes.

        Args:
            sizes: number of a batch -> rows at most, from this one on.
        """
        self._plan = sizes

    def halve(self, error: BaseException) -> None:
        """After an attempt at the last batch: if memory ran out, it comes again at half the size.

        Raises:
            ValueError: memory ran out with a single row.
            BaseException: the error itself, where it is about something else.
        """
        rows = self._cut()[0]
        columns = len(self.prompts[self._left[0]]) + self.gen_length
        self.size, self._failed = halved(rows, error, f"canvases of {columns} tokens"), True

    def _cut(self) -> list[int]:
        """Rows of each batch of what is left."""
        return cut([len(self.prompts[i]) for i in self._left], self.gen_length, self.size)


def cut(lengths: Sequence[int], gen_length: int, size: int) -> list[int]:
    """How many prompts each batch takes, from lengths that never grow."""
    sizes: list[int] = []
    first = 0
    for i, length in enumerate(lengths):
        pads, columns = lengths[first] - length, lengths[first] + gen_length
        if i == first or (i - first < size and pads <= PADDING * columns):
            continue
        sizes.append(i - first)
        first = i
    return [*sizes, len(lengths) - first] if lengths else []


def prompt_columns(lengths: Sequence[int], gen_length: int, device: torch.device) -> int:
    """Columns that the prompts of one batch take, pads included."""
    longest = max(lengths)
    if device.type != "cuda" or min(lengths) == longest:
        return longest
    return -(-(longest + gen_length) // BUCKET) * BUCKET - gen_length


def halved(rows: int, error: BaseException, what: str) -> int:
    """Half of `rows`, after memory ran out with so many of `what`.

    Raises:
        ValueError: memory ran out with a single one.
        BaseException: the error itself, where it is about something else.
    """
    if not is_out_of_memory(error):
        raise error
    if rows == 1:
        raise ValueError(
            f"There is not enough memory for one of the {what}: lower gen_length, use fewer examples in the "
            "prompt, or run on a device with more memory."
        ) from error
    log.warning("out of memory with %d %s at once: %d from here on", rows, what, rows // 2)
    return rows // 2


def settle(batch_size: int | str, model: Any, columns: int) -> int:
    """The number that a batch size stands for: itself, or what `auto` is for canvases of so many columns.

    Args:
        model: a MaskPredictor. One without an embedding, or an unknown memory, gets LARGEST.
    """
    if batch_size != "auto":
        return int(batch_size)
    memory, embedding = rounded(total_memory(str(model.device))), getattr(model, "embedding", None)
    if memory is None or embedding is None:
        return LARGEST
    fitting = int(SHARE * memory / (columns * VECTORS * 4 * embedding.weight.shape[1]))
    return 2 ** (max(1, min(LARGEST, fitting)).bit_length() - 1)
