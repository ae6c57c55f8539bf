"""The formats a quantized model can be exported to, and what each can hold.

    compressed_tensors   packed integers, or int8 at w8 with quantized inputs; carries the inputs' grid
    gptq                 packed integers, weights only: v1 where symmetric, v2 otherwise (v1 stores z - 1 and
                         has no room for z = 0)
    dequantized          plain weights in the model's dtype, for any program

Only our record (dllmq_quantization.json) has words for the attention product's grids and V's static scales.
"""

from __future__ import annotations

from collections.abc import Callable

from dllmq.models.stored import DENSE
from dllmq.numerics import Grid
from dllmq.numerics.layouts import GPTQ_V1, GPTQ_V2, INT, PACKED, check_layout


def _compressed_tensors(weights: Grid, inputs: Grid | None) -> str:
    return INT if weights.bits == 8 and inputs is not None else PACKED


def _gptq(weights: Grid, inputs: Grid | None) -> str:
    if inputs is not None:
        raise ValueError(
            f"the GPTQ format has no quantized inputs (these have {inputs.bits} bits), other programs would "
            "leave them out unsaid; use a16, export=compressed_tensors or export=dequantized."
        )
    return GPTQ_V1 if weights.symmetric else GPTQ_V2


def _dequantized(weights: Grid, inputs: Grid | None) -> str:
    return DENSE


EXPORTS: dict[str, Callable[[Grid, Grid | None], str]] = {
    "compressed_tensors": _compressed_tensors,
    "gptq": _gptq,
    "dequantized": _dequantized,
}


def layout_of(
    export: str,
    weights: Grid,
    inputs: Grid | None,
    sizes: dict[str, tuple[int, int]],
    ordered: bool = False,
) -> str:
    """The layout in which a format holds these grids.

    Args:
        export: a key of EXPORTS.
        sizes: linear's name -> (O, I).
        ordered: groups are not of neighbouring columns (act_order with dynamic groups).

    Raises:
        ValueError: an unknown format, or one that cannot hold them.
    """
    if export not in EXPORTS:
        raise ValueError(f"export={export} is not known; it is null, {', '.join(EXPORTS)}.")
    layout = EXPORTS[export](weights, inputs)
    if layout != DENSE:
        check_layout(layout, weights, sizes, ordered)
    return layout
