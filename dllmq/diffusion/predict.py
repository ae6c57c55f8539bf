"""What diffusion asks of a model, and the one definition of its (guided) prediction at chosen positions.

Classifier-free guidance runs a second, unconditional copy in the same forward: every position in `given` (the
prompt and its padding) is replaced by the mask, generated tokens stay. With c, u the raw logits of the two,

    logits = u + (cfg_scale + 1) (c - u)

so cfg_scale = 1.5 weighs the conditional copy by 2.5 (ML-GSAI/LLaDA's convention).

Dream predicts token i at column i - 1 (`config.shifted_logits`). Its hidden states are moved here, once, so
that column i of what this file returns is the prediction of token i for every model. A row's first token has
no column before it and is read at its own (Dream's code reads the last pad where there is one).

The LM head of LLaDA is 4096 x 126464: at all positions of a canvas it costs as much as several blocks. So the
transformer and the head are called separately, and the head only sees the positions somebody reads, `CHUNK`
positions at a time (about 130 MB of float32 at that vocabulary).

The last block too is only needed at the columns that are read, all but its keys and values. `lazy_states`
leaves it to the reader, for the models that can (`MaskPredictor.states`). Windows of columns begin and end at
multiples of `WINDOW`, as the tiles of the attention kernels do: on the CPUs tried every position then has the
bits of the full forward (elsewhere it is equal up to rounding).

Where somebody reads is a list of positions, found once a step: on a GPU the host waits for each mask that it
turns into positions, and for nothing that is indexed with them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

Positions = tuple[Int[Tensor, " N"], Int[Tensor, " N"]]  # rows and columns, in row-major order
CHUNK = 256  # positions per call of the LM head
WINDOW = 32  # columns


@runtime_checkable
class States(Protocol):
    """The final hidden states of a forward, by windows: the last block may not have run yet."""

    @property
    def dtype(self) -> torch.dtype: ...

    def window(self, start: int, stop: int) -> Float[Tensor, "B c d"]:
        """The states of columns start..stop-1."""
        ...


@dataclass(frozen=True)
class WholeStates:
    """Hidden states that are there."""

    h: Float[Tensor, "B L d"]

    @property
    def dtype(self) -> torch.dtype:
        return self.h.dtype

    def window(self, start: int, stop: int) -> Float[Tensor, "B c d"]:
        return self.h[:, start:stop]


@runtime_checkable
class MaskPredictor(Protocol):
    """A bidirectional model that predicts x_0 at every position of x_t.

    `config` has mask_token_id and, where known, eos_token_id and eot_token_id; a true `shifted_logits` where
    logits at column i predict token i + 1. `model(x, mask)` gives the raw logits of all columns and equals
    `model.head(model.hidden_states(x, mask))`. A model may also have `states(x, mask) -> States`, the same
    hidden states by windows of columns.
    """

    config: Any

    @property
    def device(self) -> torch.device: ...

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor: ...

    def head(self, h: Tensor) -> Tensor: ...


def hidden_states(
    model: MaskPredictor,
    x: Int[Tensor, "B L"],
    attention_mask: Shaped[Tensor, "B L"] | None,
    given: Bool[Tensor, "B L"],
    cfg_scale: float,
) -> tuple[Float[Tensor, "B L d"], ...]:
    """Runs the transformer once: (conditional,), or (conditional, unconditional) when cfg_scale > 0.

    Column i predicts token i.
    """
    if cfg_scale == 0:
        return (aligned(model, model.hidden_states(x, attention_mask), attention_mask),)
    unconditional = x.masked_fill(given, model.config.mask_token_id)
    pair_mask = None if attention_mask is None else torch.cat([attention_mask, attention_mask])
    pair = model.hidden_states(torch.cat([x, unconditional]), pair_mask)
    return tuple(aligned(model, pair, pair_mask).chunk(2))


@dataclass(frozen=True)
class LazyStates:
    """Hidden states [B, L, d] that are computed where they are read: `states[at]` is [N, d].

    Column i predicts token i, as in `hidden_states`.

    Attributes:
        window: (start, stop) -> the aligned states of these columns, [B, stop - start, d].
        dtype: of the states.
        length: L.
        is_whole: all columns are there already: no window is narrower than the canvas.
    """

    window: Callable[[int, int], Float[Tensor, "B c d"]]
    dtype: torch.dtype
    length: int
    is_whole: bool

    def __getitem__(self, at: Positions) -> Float[Tensor, "N d"]:
        """The states at these positions, one at least."""
        rows, columns = at
        start, stop = 0, self.length
        if not self.is_whole:
            first, last = torch.stack(columns.aminmax()).tolist()
            start, stop = first // WINDOW * WINDOW, min((last // WINDOW + 1) * WINDOW, stop)
        return self.window(start, stop)[rows, columns - start]


Hidden = Float[Tensor, "B L d"] | LazyStates


def lazy_states(
    model: MaskPredictor,
    x: Int[Tensor, "B L"],
    attention_mask: Shaped[Tensor, "B L"] | None,
    given: Bool[Tensor, "B L"],
    cfg_scale: float,
) -> tuple[Hidden, ...]:
    """`hidden_states` for a caller that only indexes them with masks; the last block runs where it reads."""
    if cfg_scale > 0:
        x = torch.cat([x, x.masked_fill(given, model.config.mask_token_id)])
        attention_mask = None if attention_mask is None else torch.cat([attention_mask, attention_mask])
    states = states_of(model, x, attention_mask)
    shifted = bool(getattr(model.config, "shifted_logits", False))
    read = _Windows(states, _first_tokens(x, attention_mask) if shifted else None)
    form = states.dtype, x.shape[1], isinstance(states, WholeStates)
    if cfg_scale == 0:
        return (LazyStates(read, *form),)
    return tuple(LazyStates(partial(read.half, i), *form) for i in (0, 1))


def states_of(
    model: MaskPredictor, x: Int[Tensor, "B L"], attention_mask: Shaped[Tensor, "B L"] | None
) -> States:
    """The model's `states`, or its hidden states where it has no such method."""
    if hasattr(model, "states"):
        return model.states(x, attention_mask)
    return WholeStates(model.hidden_states(x, attention_mask))


@dataclass
class _Windows:
    """Aligned windows of `states`; the last one is kept, as guidance reads the two halves of each."""

    states: States
    first: Bool[Tensor, "B L"] | None  # first tokens of the rows, for shifted logits
    _last: tuple[tuple[int, int], Tensor] | None = None

    def __call__(self, start: int, stop: int) -> Float[Tensor, "B c d"]:
        if self.first is None:
            return self.states.window(start, stop)
        before = max(0, start - WINDOW)  # what predicts column `start` is the column before it
        h = self.states.window(before, stop)
        return _shifted(h, self.first[:, before:stop])[:, start - before :]

    def half(self, i: int, start: int, stop: int) -> Float[Tensor, "b c d"]:
        """Of the conditional rows (i = 0) or the unconditional ones (1)."""
        if self._last is None or self._last[0] != (start, stop):
            self._last = (start, stop), self(start, stop)
        return self._last[1].chunk(2)[i]


def aligned(
    model: MaskPredictor, h: Float[Tensor, "B L d"], attention_mask: Shaped[Tensor, "B L"] | None
) -> Float[Tensor, "B L d"]:
    """h itself, or for a model with shifted logits h moved one column to the right, in new memory."""
    if not getattr(model.config, "shifted_logits", False):
        return h
    return _shifted(h, _first_tokens(h[..., 0], attention_mask))


def _first_tokens(
    x: Shaped[Tensor, "B L"], attention_mask: Shaped[Tensor, "B L"] | None
) -> Bool[Tensor, "B L"]:
    """1 at the first token of each row, which no column predicts."""
    token = torch.ones_like(x, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    return token & (token.cumsum(1) == 1)


def _shifted(h: Float[Tensor, "B c d"], first: Bool[Tensor, "B c"]) -> Float[Tensor, "B c d"]:
    """h moved one column to the right; first tokens keep their own."""
    return torch.where(first[..., None], h, torch.cat([h[:, :1], h[:, :-1]], dim=1))


def positions(where: Bool[Tensor, "B L"]) -> Positions:
    """Rows and columns of a mask's positions; waits for the device."""
    rows, columns = where.nonzero(as_tuple=True)
    return rows, columns


def logits_at(
    model: MaskPredictor,
    hidden: tuple[Hidden, ...],
    at: Positions,
    cfg_scale: float,
) -> Iterator[Float[Tensor, "n E"]]:
    """Yields the logits at some positions, in their order, at most `CHUNK` at a time; nothing for none.

    Without guidance they have the model's dtype; guided logits are combined in float32 or better.
    """
    if len(at[0]) == 0:
        return
    gathered = [h[at] for h in hidden]  # [N, d]
    for parts in zip(*(h.split(CHUNK) for h in gathered), strict=True):
        if len(parts) == 1:
            yield model.head(parts[0])
        else:
            c, u = (at_least_float32(model.head(part)) for part in parts)
            yield u + (cfg_scale + 1) * (c - u)


def at_least_float32(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return x.to(torch.promote_types(x.dtype, torch.float32))
