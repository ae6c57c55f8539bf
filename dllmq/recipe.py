"""A recipe: one value for every slot of the pipeline. Off is a neutral value, not a branch.

Slots: which states calibrate (StateSampler), how much a token counts (TokenWeight), how V's scale is chosen
(ValueScale), the baseline (Method) and the grids of weights, inputs and the attention product.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from dllmq.calibration.states import CalibrationState, CleanText, StateSampler
from dllmq.calibration.values import MinMax, ValueScale
from dllmq.diffusion import SamplerConfig
from dllmq.methods import FP, Method
from dllmq.numerics import Grid

FULL_PRECISION_BITS = 16


@runtime_checkable
class TokenWeight(Protocol):
    """Weight c_j >= 0 on a token's squared error. Pads weigh 0 whatever it returns."""

    def __call__(self, state: CalibrationState) -> Float[Tensor, "B L"]: ...


def uniform_weight(state: CalibrationState) -> Float[Tensor, "B L"]:
    """Every token counts the same: CGQ off."""
    return state.valid.float()


@dataclass(frozen=True)
class Bits:
    """Widths of weights and activations; 16 is full precision."""

    weight: int
    activation: int

    @classmethod
    def parse(cls, text: str) -> Bits:
        """Reads "w4a4", "w3a16" and the like.

        Raises:
            ValueError: another form or another width.
        """
        match = re.fullmatch(r"w(\d+)a(\d+)", str(text))
        widths = [int(x) for x in match.groups()] if match else []
        if not match or any(b != FULL_PRECISION_BITS and not 2 <= b <= 8 for b in widths):
            raise ValueError(
                f"bits={text} is not a width; write w<N>a<M> with N and M from 2 to 8, or 16 for full "
                "precision, such as w4a4, w4a16 or w3a8."
            )
        if widths[0] == FULL_PRECISION_BITS:
            raise ValueError(
                f"bits={text} leaves the weights alone; choose w2 to w8, or method=fp for full precision."
            )
        return cls(*widths)

    def __str__(self) -> str:
        return f"w{self.weight}a{self.activation}"


@dataclass(frozen=True)
class AttentionGrids:
    """Grids of P, V and Q K in the attention product; None is full precision."""

    P: Grid | None = None
    V: Grid | None = None
    QK: Grid | None = None

    @classmethod
    def parse(cls, attn_bits: str | int, activation: int) -> AttentionGrids:
        """`auto` (P and V at the activation width, none at a16), `none`, `v`, `pv`, `qkpv`, or a width.

        Raises:
            ValueError: anything else, or `v`, `pv`, `qkpv` where activations are full precision.
        """
        text = str(attn_bits)
        quantized = activation != FULL_PRECISION_BITS
        if text == "none" or (text == "auto" and not quantized):
            return cls()
        if text in ("v", "pv", "qkpv") and not quantized:
            raise ValueError(
                f"attn_bits={text} takes the activation width, but activations are a16; give a width instead."
            )
        if text in ("auto", "pv", "v", "qkpv"):
            grid = Grid(activation)
            return cls(P=None if text == "v" else grid, V=grid, QK=grid if text == "qkpv" else None)
        if text in map(str, range(2, 9)):
            return cls(P=Grid(int(text)), V=Grid(int(text)))
        raise ValueError(
            f"attn_bits={attn_bits} is not known; it is auto, none, v, pv, qkpv or a width from 2 to 8."
        )


@dataclass(frozen=True)
class Recipe:
    """Everything `pipeline.quantize` needs beside a model and prompts.

    Attributes:
        method: the baseline; weights: grid of the block linears' weights; inputs: of their inputs, None at
            a16.
        attention: grids of P, V and Q K.
        states: which states calibrate; token_weight, value_scale: the two other seams; value_scale_name: for
            records ("minmax", "iaaq", "mse").
        num_states: calibration sequences; batch_size: sequences a forward.
        sampler: of the full-precision trajectories.
    """

    method: Method
    weights: Grid | None
    inputs: Grid | None = None
    attention: AttentionGrids = AttentionGrids()
    states: StateSampler = field(default_factory=CleanText)
    token_weight: TokenWeight = uniform_weight
    value_scale: Callable[[Grid], ValueScale] = MinMax
    value_scale_name: str = "minmax"
    num_states: int = 128
    batch_size: int = 16
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    seed: int = 0

    @property
    def observe(self) -> str:
        """Where scores are recorded: "masked", or "all" where the token weight reads decoded tokens' too."""
        observe: str = getattr(self.token_weight, "observe", "masked")
        return observe

    @property
    def reads_states(self) -> bool:
        """Whether a calibration state changes the result: RTN reads none, unless V has a static scale."""
        return bool(self.method.needs) or self.attention.V is not None

    def inert(self) -> list[str]:
        """Switches without effect in this combination, each with its reason: "tmas: ..."."""
        out = []
        method = type(self.method).__name__
        full_precision = isinstance(self.method, FP) or self.weights is None
        if self.states.name != "clean" and (full_precision or not self.reads_states):
            out.append(f"{self.states.name}: {method} reads no calibration states")
        if reason := self._weight_is_inert(method, full_precision):
            out.append(f"cgq: {reason}")
        searches = self.value_scale_name != "minmax"
        name = "iaaq" if self.value_scale_name == "iaaq" else f"value_scale={self.value_scale_name}"
        if searches and (full_precision or self.attention.V is None):
            out.append(f"{name}: V is not quantized, so there is no scale to choose")
        elif searches and getattr(self.value_scale, "keywords", {}).get("alphas") == (1.0,):
            out.append(f"{name}: alpha = 1 is all that is searched, which is min-max")
        return out

    def _weight_is_inert(self, method: str, full_precision: bool) -> str | None:
        """Why the token weight changes nothing, None where it does."""
        if self.token_weight is uniform_weight:
            return None
        if full_precision or not self.method.needs:
            return f"{method} reads no statistics, so no token weighs more than another"
        constant = getattr(self.token_weight, "constant_without_masks", False)
        if constant and self.states.name == "clean":
            return "clean text has no masked token, so every token has the same weight"
        return None
