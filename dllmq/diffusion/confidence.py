"""The likeliest token and its probability, in one pass over the logits and without a second copy of them.

    x0 = argmax_v l_v        p = softmax(l)_x0        (float32, or float64 for float64 logits)

The logits of LLaDA's vocabulary are half a megabyte a position, so what is made of them is made for a few
positions at a time and stays in the processor's cache: of bfloat16 logits [128, 126464], 25 ms where argmax
and softmax of the whole chunk take 150 ms. The numbers are those of the whole chunk bit for bit.

On CUDA the kernel of `dllmq.kernels.triton_confidence` does both where Triton is installed (equal up to
rounding: its sum runs in another order).
"""

from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from jaxtyping import Float, Int
from torch import Tensor

PIECE = 2**20  # logits a thread works on at once: 4 MB in float32
_TILE = 128  # of the two-level argmax; divides the vocabularies of LLaDA and Dream

Kernel = Callable[[Tensor], tuple[Tensor, Tensor]]


def argmax_confidence(
    logits: Float[Tensor, "n E"], never_trusted: list[int]
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """x0 [n], the lowest id among equals, and its probability p [n].

    Args:
        never_trusted: ids whose logits count as -inf in the softmax, though not in x0: p of them is 0.
    """
    fits = logits.is_cuda and logits.dtype != torch.float64 and not never_trusted
    kernel = _kernel() if fits else None
    if kernel is not None:
        return kernel(logits)
    parts = [_of_piece(piece, never_trusted) for piece in pieces(logits)]
    x0, p = (torch.cat(part) for part in zip(*parts, strict=True))
    return x0, p


def confidence_of(
    logits: Float[Tensor, "n E"], x0: Int[Tensor, " n"], never_trusted: list[int]
) -> Float[Tensor, " n"]:
    """p of given predictions, as in `argmax_confidence`."""
    rows = zip(pieces(logits), x0.split(rows_of(logits)), strict=True)
    return torch.cat([_probability(_float(piece), own, never_trusted) for piece, own in rows])


def exclude(logits: Float[Tensor, "n E"], ids: list[int]) -> Float[Tensor, "n E"]:
    """The logits with -inf at `ids`; unchanged, and not copied, when there are none."""
    if not ids:
        return logits
    return logits.index_fill(-1, torch.tensor(ids, device=logits.device), -torch.inf)


def rows_of(logits: Float[Tensor, "n E"]) -> int:
    """Positions worked on at once: on a GPU all of them."""
    rows = torch.get_num_threads() * PIECE // logits.shape[1] if logits.device.type == "cpu" else len(logits)
    return max(1, rows)


def pieces(logits: Float[Tensor, "n E"]) -> Iterator[Float[Tensor, "r E"]]:
    yield from logits.split(rows_of(logits))


def _of_piece(logits: Float[Tensor, "r E"], never_trusted: list[int]) -> tuple[Tensor, Tensor]:
    logits = _float(logits)
    x0 = _argmax(logits)
    return x0, _probability(logits, x0, never_trusted)


def _probability(logits: Float[Tensor, "r E"], x0: Int[Tensor, " r"], never_trusted: list[int]) -> Tensor:
    return torch.softmax(exclude(logits, never_trusted), -1).gather(1, x0[:, None])[:, 0]


def _float(logits: Float[Tensor, "r E"]) -> Float[Tensor, "r E"]:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _argmax(x: Float[Tensor, "r E"]) -> Int[Tensor, " r"]:
    """argmax, the first among equals: of the tiles' maxima (vectorised, where argmax is not), then in one."""
    if x.shape[1] % _TILE or x.device.type != "cpu":
        return x.argmax(-1)
    tiles = x.unflatten(1, (-1, _TILE))  # [r, E / 128, 128]
    tile = tiles.amax(-1).argmax(-1)
    inside = tiles[torch.arange(len(x)), tile].argmax(-1)
    return tile * _TILE + inside


@cache
def _kernel() -> Kernel | None:
    if find_spec("triton") is None or find_spec("dllmq.kernels.triton_confidence") is None:
        return None
    return import_module("dllmq.kernels.triton_confidence").argmax_confidence
