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
"""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

CHUNK = 256  # positions per call of the LM head


@runtime_checkable
class MaskPredictor(Protocol):
    """A bidirectional model that predicts x_0 at every position of x_t.

    `config` has mask_token_id and, where known, eos_token_id and eot_token_id; a true `shifted_logits` where
    logits at column i predict token i + 1. `model(x, mask)` gives the raw logits of all columns and equals
    `model.head(model.hidden_states(x, mask))`.
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


def aligned(
    model: MaskPredictor, h: Float[Tensor, "B L d"], attention_mask: Shaped[Tensor, "B L"] | None
) -> Float[Tensor, "B L d"]:
    """h itself, or for a model with shifted logits h moved one column to the right, in new memory."""
    if not getattr(model.config, "shifted_logits", False):
        return h
    previous = torch.cat([h[:, :1], h[:, :-1]], dim=1)
    if attention_mask is None:
        return previous
    first = (attention_mask != 0) & ((attention_mask != 0).cumsum(1) == 1)
    return torch.where(first[..., None], h, previous)


def logits_at(
    model: MaskPredictor,
    hidden: tuple[Float[Tensor, "B L d"], ...],
    where: Bool[Tensor, "B L"],
    cfg_scale: float,
) -> Iterator[Float[Tensor, "n E"]]:
    """Yields the logits at `where`, in row-major order, at most `CHUNK` positions at a time.

    Without guidance they have the model's dtype; guided logits are combined in float32 or better.
    """
    gathered = [h[where] for h in hidden]  # [N, d]
    for parts in zip(*(h.split(CHUNK) for h in gathered), strict=True):
        if not parts[0].shape[0]:
            return  # split() gives one empty chunk for no positions
        if len(parts) == 1:
            yield model.head(parts[0])
        else:
            c, u = (at_least_float32(model.head(part)) for part in parts)
            yield u + (cfg_scale + 1) * (c - u)


def at_least_float32(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return x.to(torch.promote_types(x.dtype, torch.float32))
