"""IA-AQ, Interaction-Aware Activation Quantization (DLLMQuant, arXiv 2508.14090): the scale of V.

The product P V is the main source of the error that accumulates over denoising steps. V's scale is chosen
by the error *after* mixing, so that tokens which many queries read keep their precision:

    L(s) = || Deq(Q(P)) (Deq(Q_s(V)) - V) ||_F^2
    s = alpha (V_max - V_min) / (Q_max - Q_min),   alpha = 1.0 ... 0.8

Where the paper is silent, we decide: a grid of step 0.01; asymmetric, the range widened to contain 0 and
shrunk at both ends, so z = round(-alpha V_min / s) does not depend on alpha; one static scale per layer and
granularity group (`head` by default, `tensor`, `channel`), its losses summed over all calibration states;
of equal losses the largest alpha. alpha = 1 is in the grid, so the objective is never above min-max. With
grouped-query attention a value head is read by all its query heads.

`EqualWeightSearch` is the same search with every token equal, L(s) = || Deq(Q_s(V)) - V ||_F^2: it tells
interaction apart from plain clip search in an ablation. Off (alpha = 1): `calibration.values.MinMax`.

Legend: V [B, kv, L, h], P [B, heads, Q, L] (0 in the rows of pads), E = Deq(Q(V)) - V, groups as
`Granularity` has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dllmq.calibration.values import MinMax
from dllmq.numerics import Grid, Params


def alpha_grid(lowest: float = 0.8, step: float = 0.01) -> tuple[float, ...]:
    """1, 1 - step, ... down to `lowest`.

    Raises:
        ValueError: lowest outside (0, 1], step outside (0, 1], or more than 1,000 steps.
    """
    if not 0 < lowest <= 1 or not 0 < step <= 1:
        raise ValueError(
            f"iaaq_alpha_min={lowest} and iaaq_alpha_step={step}: both must lie in (0, 1]; the paper's range "
            "is 1.0 down to 0.8."
        )
    if (1 - lowest) / step > 1000:
        raise ValueError(
            f"iaaq_alpha_step={step} makes more than 1000 values of alpha down to {lowest}, each a pass over "
            "every value: the paper's step is 0.01."
        )
    return tuple(round(1 - i * step, 10) for i in range(int((1 - lowest) / step + 1e-9) + 1))


ALPHAS = alpha_grid()  # 1.00, 0.99, ... 0.80


class ValueScaleSearch(NamedTuple):
    """alpha, scale and zero of each group, and the losses [groups, n_alpha] in the order of the alphas."""

    alpha: Float[Tensor, " groups"]
    scale: Float[Tensor, " groups"]
    zero: Float[Tensor, " groups"]
    losses: Float[Tensor, "groups n"]


@dataclass
class IAAQ(MinMax):
    """The search in two streaming passes: `range` sees V, `accumulate` sees V and P."""

    alphas: Sequence[float] = ALPHAS
    losses: Tensor | None = field(default=None, repr=False)  # [groups, n_alpha] fp64
    needs: frozenset[str] = frozenset({"maps"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alphas or self.alphas[0] != 1.0 or not all(0 < a <= 1 for a in self.alphas):
            raise ValueError(f"alphas are {list(self.alphas)}; they must start at 1.0 and lie in (0, 1].")

    def at(self, alpha: float) -> Params:
        """Parameters for one alpha, broadcastable to V."""
        s, z = super().result()
        return Params(s * alpha, z)

    def accumulate(self, V: Float[Tensor, "B kv L h"], P: Float[Tensor, "B heads Q L"] | None) -> None:
        """Adds the losses of one batch of states for every alpha. V is 0 at pads, P in the rows of pads."""
        values = V.float()
        batch = torch.stack(
            [self._group(self._squared(self._error(values, self.at(a)), P)) for a in self.alphas], -1
        )
        self.losses = batch if self.losses is None else self.losses + batch

    def search(self) -> ValueScaleSearch:
        """The best alpha of each group."""
        assert self.losses is not None, "no attention map was observed"
        best = self.losses.argmin(-1)  # the first, that is the largest alpha, of equals
        alpha = torch.tensor(self.alphas, device=best.device)[best]
        s, z = (t.flatten() for t in super().result())
        return ValueScaleSearch(alpha, s * alpha, z, self.losses.float())

    def result(self) -> Params:
        """Broadcastable to V [B, kv, L, h]."""
        s, z = super().result()
        return Params(s * self.search().alpha.view_as(s).to(s), z)

    def notes(self) -> dict[str, float]:
        """Mean alpha, and the objective at it over the objective at alpha = 1."""
        found = self.search()
        start, best = found.losses[:, 0].sum(), found.losses.min(1).values.sum()
        return {
            "alpha_mean": float(found.alpha.mean()),
            "loss_ratio": float(best / start) if start > 0 else 1.0,
        }

    def _error(self, V: Float[Tensor, "B kv L h"], params: Params) -> Float[Tensor, "B kv L h"]:
        codes = torch.clamp(torch.round(V / params.scale) + params.zero, 0, 2**self.grid.bits - 1)
        return (codes - params.zero) * params.scale - V

    def _squared(
        self, E: Float[Tensor, "B kv L h"], P: Float[Tensor, "B heads Q L"] | None
    ) -> Float[Tensor, "kv h"]:
        """sum over batch, queries and the query heads of each value head of (P E)^2."""
        assert P is not None, "IA-AQ asked for the attention maps"
        maps = P.float().unflatten(1, (E.shape[1], -1))  # [B, kv, heads / kv, Q, L]
        mixed: Tensor = maps @ E[:, :, None]
        return mixed.double().pow(2).sum((0, 2, 3))

    def _group(self, by_channel: Float[Tensor, "kv h"]) -> Float[Tensor, " groups"]:
        if self.granularity == "tensor":
            return by_channel.sum()[None]
        return by_channel.sum(1) if self.granularity == "head" else by_channel.flatten()


@dataclass
class EqualWeightSearch(IAAQ):
    """The same search with every token equal, || Deq(Q_s(V)) - V ||_F^2: no map is read."""

    needs: frozenset[str] = frozenset({"values"})

    def _squared(
        self, E: Float[Tensor, "B kv L h"], P: Float[Tensor, "B heads Q L"] | None
    ) -> Float[Tensor, "kv h"]:
        return E.double().pow(2).sum((0, 2))  # 0 is on the grid, so pads add nothing


def search_value_scale(
    V: Float[Tensor, "L n"],
    P: Float[Tensor, "heads Q L"],
    grid: Grid,
    granularity: str = "head",
    kv_heads: int | None = None,
) -> ValueScaleSearch:
    """IA-AQ for one sequence.

    Args:
        V: values, head-major [L, kv_heads * head_dim].
        P: attention maps as they will be used (quantized by the caller where P is quantized).
        grid: its bits; the group size is unused.
        kv_heads: value heads; None: as many as P has heads.
    """
    heads = P.shape[0] if kv_heads is None else kv_heads
    values = V.unflatten(1, (heads, -1))  # [L, kv, h]
    scale = IAAQ(grid, granularity)
    scale.range(values)
    scale.accumulate(values.transpose(0, 1)[None], P[None])
    return scale.search()
