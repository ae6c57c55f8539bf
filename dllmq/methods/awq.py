"""AWQ (Lin et al., arXiv 2306.00978): scale up the weight channels that read large inputs, then round.

W x = (W s)(x / s) for any s > 0 per channel. Rounding W s instead of W protects the channels with large s;
the op before the layer absorbs x / s. s follows the inputs, with one exponent to search (eq. 4, 5):

    s = mean|x|^r,  r* = argmin_r sum_j c_j || f(Q(W s) / s; x_j) - f(W; x_j) ||^2,  r = 0, 1/20, ... 19/20

f is the module the group belongs to (attention for {q, k, v}, the MLP for {gate, up}, otherwise the
linear), c_j the token weights, which enter mean|x| as well. s is clamped to >= 1e-4 and divided by
sqrt(max s * min s); r = 0 is plain rounding. f sees Q(W s) / s with unscaled inputs: the same function, and
the module stays untouched.

Then each weight's range is clipped, per output channel and group (not of q and k; the topology says which):

    a* = argmin_a sum_j c_j (w x_j - Q(clamp(w, -a max|w|, a max|w|)) x_j)^2,  a = 1.00, 0.95, ... 0.55

over w in W s and inputs x / s, on at most 512 evenly spaced tokens.

Where we differ from the authors' code: losses are sums weighted by c_j (all ones: theirs times a constant),
and clipping reads 512 tokens spaced evenly over those with a weight (theirs: every (n // 512)-th).

Legend: W [O, I], X inputs [N, I], c_j token weight, s scale [I], r exponent ("ratio"), a clipping ratio, g
group size, G groups in a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dllmq.calibration.stats import GroupInput, GroupStats, collect
from dllmq.methods.base import GroupUpdate, check_weight, naming
from dllmq.methods.gptq import GPTQ, solve_group
from dllmq.methods.rtn import round_to_nearest
from dllmq.models.base import LinearGroup
from dllmq.numerics import Grid, QuantizedTensor, fake_quant
from dllmq.numerics.linalg import product, weighted_gram

CLIP_RATIOS = tuple(1 - i / 20 for i in range(10))  # 1.00, 0.95, ... 0.55
CLIP_TOKENS = 512
CHUNK_ELEMENTS = 2**24  # of the largest intermediate of a loss: 64 MiB in fp32
NO_TOKEN = (
    "no calibration token with a weight reached this layer: check the calibration states and token weights."
)


@dataclass(frozen=True)
class ScaleSearch:
    """Result of the search for s.

    Attributes:
        ratio: the best exponent r; the smallest of equals.
        scale: s for it, [I]; all ones at r = 0.
        losses: loss of every candidate, in order of r.
    """

    ratio: float
    scale: Float[Tensor, " I"]
    losses: Float[Tensor, " n_grid"]


@dataclass(frozen=True)
class ClipSearch:
    """Result of the search for clipping ranges.

    Attributes:
        ratio: best a per output channel and group, [O, G], the largest of equals; [1, 1] per tensor.
        losses: loss of every candidate, in the order of CLIP_RATIOS.
    """

    ratio: Float[Tensor, "R G"]
    losses: Float[Tensor, "n_clip R G"]


def search_scale(
    W: Float[Tensor, "O I"],
    X: Float[Tensor, "N I"],
    grid: Grid,
    token_weight: Float[Tensor, " N"] | None = None,
    loss: Callable[[Tensor], float] | None = None,
    n_grid: int = 20,
) -> ScaleSearch:
    """The scale s = mean|x|^r of the exponent r = i / n_grid with the least loss.

    Args:
        W: weight.
        X: the layer's inputs.
        grid: W s is rounded to it, without clipping.
        token_weight: c_j >= 0, also in mean|x|; None weighs every token 1, bit for bit.
        loss: s -> loss; None takes the layer's own output, sum_j c_j ||(Q(W s) / s - W) x_j||^2.
        n_grid: number of candidates.

    Raises:
        ValueError: shapes that do not fit, W or every loss not finite, no token with a weight.
    """
    check_weight(W, grid)
    W, X, c = _tokens(W, X, token_weight)
    mean_abs = (X.abs() * c[:, None]).sum(0) / c.sum()

    return search_ratio(
        mean_abs, linear_loss([W], weighted_gram(X, c), grid) if loss is None else loss, n_grid
    )


def search_ratio(
    mean_abs: Float[Tensor, " I"], loss: Callable[[Tensor], float], n_grid: int = 20
) -> ScaleSearch:
    """`search_scale` from the statistic mean|x| and a loss of s.

    Raises:
        ValueError: no candidate has a finite loss.
    """
    ratios = [i / n_grid for i in range(n_grid)]
    scales = [scale_for(mean_abs, ratio) for ratio in ratios]
    losses = torch.tensor([float(loss(s)) for s in scales], dtype=torch.float32)
    if not bool(torch.isfinite(losses).any()):
        raise ValueError(
            "no AWQ candidate has a finite loss: the calibration inputs hold NaN or Inf; "
            "calibrate in float32 or bfloat16 and check the checkpoint."
        )
    best = int(losses.nan_to_num(nan=math.inf).argmin())  # the first of equals
    return ScaleSearch(ratios[best], scales[best], losses)


def scale_for(mean_abs: Float[Tensor, " I"], ratio: float) -> Float[Tensor, " I"]:
    """s = clamp(mean|x|^r, 1e-4) / sqrt(max s * min s), [I] fp32; exactly 1 at r = 0."""
    s = mean_abs.float().pow(ratio).clamp(min=1e-4)
    return s / (s.max() * s.min()).sqrt()


def scaled_rounding(W: Float[Tensor, "O I"], s: Float[Tensor, " I"], grid: Grid) -> Float[Tensor, "O I"]:
    """Q(W s) / s: what rounding W s amounts to for unscaled inputs."""
    return fake_quant(W * s, grid) / s


def linear_loss(weights: Iterable[Tensor], H: Float[Tensor, "I I"], grid: Grid) -> Callable[[Tensor], float]:
    """s -> sum_j c_j ||(Q(W s) / s - W) x_j||^2 at the linears' own outputs, added up over the weights.

    Equal to tr(D H D^T) / 2 with D = Q(W s) / s - W and H = 2 sum_j c_j x_j x_j^T: one product with H for
    each s, however many tokens there are.
    """

    def loss(s: Tensor) -> float:
        return sum(output_error(scaled_rounding(W, s, grid) - W, H) for W in weights)

    return loss


def output_error(D: Float[Tensor, "O I"], H: Float[Tensor, "I I"]) -> float:
    """sum_j c_j ||D x_j||^2 = tr(D H D^T) / 2, added up over output channels in double precision."""
    return float(product(D, H).mul_(D).sum(1).sum(dtype=torch.float64)) / 2


def weighted_square(D: Float[Tensor, "*tokens O"], c: Float[Tensor, "*tokens"]) -> Float[Tensor, ""]:
    """sum_j c_j ||d_j||^2; a token of weight 0 (a pad) counts nothing even where d_j is NaN."""
    square = D.float().square().sum(-1)
    return (square * c).masked_fill(c == 0, 0.0).sum(dtype=torch.float64)


def search_clip(
    W: Float[Tensor, "O I"],
    X: Float[Tensor, "N I"],
    grid: Grid,
    token_weight: Float[Tensor, " N"] | None = None,
) -> ClipSearch:
    """The range of each output channel and group, as a share of its largest |w|, with the least output error.

    A per-tensor grid has one range, judged by its error summed over output channels.

    Args:
        W: weight (W s), X: inputs (x / s); token_weight: as in `search_scale`. At most CLIP_TOKENS are read.

    Raises:
        ValueError: shapes that do not fit, W not finite, no token with a weight.
    """
    check_weight(W, grid)
    W, X, c = _tokens(W, X, token_weight)
    read = spaced(c, CLIP_TOKENS)
    errors = _group_errors(X[read], c[read], grid)
    candidates = torch.tensor(CLIP_RATIOS, device=W.device)

    def loss(a: Tensor) -> Tensor:
        return errors(fake_quant(clip_range(W, a.expand(1, grid.groups(W.shape[1])), grid), grid) - W)

    losses = torch.stack([loss(a) for a in candidates])
    return ClipSearch(candidates[losses.argmin(0)], losses)  # argmin: the first of equals, which clips least


def clip_range(W: Float[Tensor, "O I"], ratio: Float[Tensor, "#O G"], grid: Grid) -> Float[Tensor, "O I"]:
    """clamp(w, -a max|w|, a max|w|) with the maximum of w's group; W itself, bit for bit, at a = 1."""
    if grid.group_size == 0:
        limit = ratio * W.abs().amax()  # [1, 1]
        return W.clamp(-limit, limit)
    groups = W.reshape(len(W), grid.groups(W.shape[1]), -1)  # [O, G, g]
    limit = ratio[..., None] * groups.abs().amax(-1, keepdim=True)
    return groups.clamp(-limit, limit).flatten(1)


def spaced(c: Float[Tensor, " N"], limit: int) -> Int[Tensor, " n"]:
    """At most `limit` evenly spaced indices of the tokens whose weight is not 0."""
    live = torch.nonzero(c)[:, 0]
    n = min(limit, len(live))
    return live[torch.arange(n, device=c.device) * len(live) // n]


def _group_errors(
    X: Float[Tensor, "N I"], c: Float[Tensor, " N"], grid: Grid
) -> Callable[[Tensor], Float[Tensor, "R G"]]:
    """D -> sum_j c_j (d_og . x_jg)^2 for each output channel o and group g, in chunks of output channels.

    With fewer channels in a group than tokens it is d_og M_g d_og^T, M_g = sum_j c_j x_jg x_jg^T.
    """
    N, G = len(X), grid.groups(X.shape[1])
    X = X.reshape(N, G, -1).transpose(0, 1)  # [G, N, g]
    g = X.shape[2]
    M = (X * c[:, None]).transpose(1, 2) @ X if g < N else None  # [G, g, g]

    def of(d: Tensor) -> Tensor:
        """Errors [G, o] of d [G, o, g]."""
        return (d @ X.transpose(1, 2)).square() @ c if M is None else (d @ M).mul_(d).sum(-1)

    def errors(D: Float[Tensor, "O I"]) -> Float[Tensor, "R G"]:
        parts = torch.split(D.reshape(len(D), G, g), max(1, CHUNK_ELEMENTS // (G * min(g, N))))
        found = torch.cat([of(d.transpose(0, 1)) for d in parts], dim=1).T  # [O, G]
        return found.sum(0, keepdim=True) if grid.group_size == 0 else found

    return errors


def _tokens(W: Tensor, X: Tensor, token_weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """W, X and c in fp32, c = 1 where none is given.

    Raises:
        ValueError: X or c do not fit W, or no token has a weight.
    """
    if X.dim() != 2 or X.shape[1] != W.shape[1]:
        raise ValueError(f"the inputs have shape {list(X.shape)}, but this weight needs [N, {W.shape[1]}].")
    c = X.new_ones(X.shape[0], dtype=torch.float32) if token_weight is None else token_weight.float()
    if c.shape != X.shape[:1]:
        raise ValueError(f"token_weight has shape {list(c.shape)}, but {len(X)} tokens need [{len(X)}].")
    if not bool((c >= 0).all()):
        raise ValueError("token_weight holds a negative or NaN value, but it must be >= 0: check its origin.")
    if not bool((c > 0).any()):
        raise ValueError(NO_TOKEN)
    return W.float(), X.float(), c


@dataclass(frozen=True)
class AWQ:
    """AWQ with the authors' defaults.

    Attributes:
        n_grid: exponents tried, r = i / n_grid.
        clip: search clipping ranges too. Acts with solver "rtn" only.
        solver: "rtn" rounds W s. "gptq" runs GPTQ on W s under the Hessian of the scaled inputs, H / (s s^T);
            s is still judged by rounding, and nothing is clipped (GPTQ fits its own ranges).
        block_size, damp, act_order, static_groups: GPTQ's, with solver "gptq".

    Raises:
        ValueError: a knob out of range.
    """

    n_grid: int = 20
    clip: bool = True
    solver: str = "rtn"
    block_size: int = 128
    damp: float = 0.01
    act_order: bool = False
    static_groups: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.n_grid, int) or self.n_grid < 1:
            raise ValueError(f"n_grid is {self.n_grid!r}, but it must be a positive integer: use 20.")
        if self.solver not in ("rtn", "gptq"):
            close = get_close_matches(str(self.solver), ("rtn", "gptq"), n=1)
            hint = f"did you mean {close[0]!r}?" if close else "choose one of the two."
            raise ValueError(f"solver is {self.solver!r}, but AWQ knows 'rtn' and 'gptq': {hint}")
        self._gptq()  # validates GPTQ's knobs

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"mean_abs", "inputs", "gram"} if self.solver == "gptq" else {"mean_abs", "inputs"})

    @torch.no_grad()
    def __call__(self, group: LinearGroup, stats: GroupStats, grid: Grid) -> GroupUpdate:
        """Searches s, if the op before can absorb it; then clips and rounds, or runs GPTQ.

        Raises:
            ValueError: as the functions above and `gptq_solve`, with the group's name in front.
        """
        assert stats.mean_abs is not None and stats.inputs is not None, "AWQ asked for mean_abs and inputs"
        for name, W in group.weights.items():
            with naming(f"{group.name}.{name}"):
                check_weight(W, grid)
        notes: dict[str, float] = {}
        s = None
        with naming(group.name):
            if group.can_scale:
                found = search_ratio(stats.mean_abs, module_loss(group, stats.inputs, grid), self.n_grid)
                s = None if found.ratio == 0 else found.scale
                notes["awq_ratio"] = found.ratio
            if self.solver == "gptq":
                weights = self._solve(group, stats.gram, s, grid)
            else:
                weights, clipped = self._round(group, stats.inputs, s, grid)
                notes.update(clipped)
        return GroupUpdate(weights, s, notes)

    def _gptq(self) -> GPTQ:
        return GPTQ(self.block_size, self.damp, self.act_order, self.static_groups)

    def _solve(
        self, group: LinearGroup, H: Tensor | None, s: Tensor | None, grid: Grid
    ) -> dict[str, QuantizedTensor]:
        """GPTQ on W s with the Hessian of x / s."""
        assert H is not None, "AWQ with GPTQ asked for the Gram matrix"
        if s is None:
            return solve_group(group.weights, H, grid, self._gptq())
        scaled = {name: W * s for name, W in group.weights.items()}
        return solve_group(scaled, H / (s[:, None] * s), grid, self._gptq())

    def _round(
        self, group: LinearGroup, inputs: Sequence[GroupInput], s: Tensor | None, grid: Grid
    ) -> tuple[dict[str, QuantizedTensor], dict[str, float]]:
        """Q(W s) of each weight, clipped where the group allows it, and the mean clipping ratio."""
        weights = {name: W if s is None else W * s for name, W in group.weights.items()}
        ratios = []
        if self.clip and group.clip & weights.keys():
            X, c = clip_tokens(inputs)
            X = X if s is None else X / s
            for name in [name for name in weights if name in group.clip]:
                ratio = search_clip(weights[name], X, grid, c).ratio
                weights[name] = clip_range(weights[name], ratio, grid)
                ratios.append(ratio.flatten())
        notes = {"awq_clip_mean": float(torch.cat(ratios).mean())} if ratios else {}
        return {name: round_to_nearest(W, grid) for name, W in weights.items()}, notes


def module_loss(group: LinearGroup, inputs: Sequence[GroupInput], grid: Grid) -> Callable[[Tensor], float]:
    """s -> sum_j c_j ||f(Q(W s) / s; x_j) - f(W; x_j)||^2 with f the group's inspected module.

    f runs on all inputs for each s, except where it is the linears themselves and there are more tokens than
    channels (`linear_loss`).
    """
    weights = group.weights
    if group.inspects_itself and sum(batch.weight.numel() for batch in inputs) > inputs[0].X.shape[-1]:
        H = collect(frozenset({"gram"}), list(inputs)).gram
        assert H is not None, "there are inputs"
        return linear_loss(weights.values(), H, grid)
    targets = [group.inspect(weights, batch.X, batch.valid) for batch in inputs]

    def loss(s: Tensor) -> float:
        candidate = {name: scaled_rounding(W, s, grid).to(inputs[0].X.dtype) for name, W in weights.items()}
        total = torch.zeros((), dtype=torch.float64, device=s.device)
        for batch, target in zip(inputs, targets, strict=True):
            Y = group.inspect(candidate, batch.X, batch.valid)
            total += weighted_square(Y.float() - target.float(), batch.weight)
        return float(total)

    return loss


def clip_tokens(inputs: Sequence[GroupInput]) -> tuple[Float[Tensor, "n I"], Float[Tensor, " n"]]:
    """The tokens `search_clip` would pick from all inputs at once, and their weights; the rest is not copied.

    Raises:
        ValueError: no token has a weight.
    """
    c = torch.cat([batch.weight.flatten() for batch in inputs]).float()
    if not bool((c > 0).any()):
        raise ValueError(NO_TOKEN)
    read = spaced(c, CLIP_TOKENS)
    first, rows = 0, []
    for batch in inputs:
        here = read[(read >= first) & (read < first + batch.weight.numel())] - first
        rows.append(batch.X.flatten(0, 1)[here].float())
        first += batch.weight.numel()
    return torch.cat(rows), c[read]
