"""A quantized weight as the tensors of a checkpoint format, and back, bit for bit.

A symmetric grid's codes and zeros are moved by 2^(b-1) where the format stores unsigned ones; values and
steps stay the same. Scales are stored in fp32, so (q - z) s is the same number after loading. Published files
often hold 16-bit scales; these are read too.

    pack-quantized   compressed-tensors: weight_packed [O, W] along the inputs, weight_scale [O, G],
                     weight_shape (O, I), and if asymmetric weight_zero_point packed along the outputs
    int-quantized    compressed-tensors at 8 bits: weight int8 [O, I], weight_scale, weight_zero_point int8
    gptq, gptq_v2    qweight packed along the inputs [W, O], scales [G, O], qzeros [G, W] packed along the
                     outputs, g_idx [I]; version 1 stores z - 1, which has no room for z = 0

Sources: compressed-tensors 0.20 (`compressors/pack_quantized`, `naive_quantized`), GPTQModel's and AutoGPTQ's
`QuantLinear`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from dllmq.numerics.grid import Grid, QuantizedTensor
from dllmq.numerics.packing import WORD, pack, unpack, words

PACKED, INT, GPTQ_V1, GPTQ_V2 = "pack-quantized", "int-quantized", "gptq", "gptq_v2"
GPTQ_BITS = (2, 3, 4, 8)
FLOATS = ("F32", "F16", "BF16")  # as safetensors' headers name them


@dataclass(frozen=True)
class Spec:
    """What a stored tensor must be: shape, and its type as one of safetensors' names."""

    shape: tuple[int, ...]
    types: tuple[str, ...]


def check_layout(layout: str, grid: Grid, sizes: dict[str, tuple[int, int]], ordered: bool = False) -> None:
    """Whether a layout can hold weights of these grids and sizes.

    Args:
        sizes: linear's name -> (O, I).
        ordered: groups are not of neighbouring columns (`QuantizedTensor.group_index`).

    Raises:
        ValueError: one sentence that names what to change.
    """
    if layout in (PACKED, INT):
        if ordered:
            raise ValueError(
                "compressed-tensors has no groups of columns in another order (act_order with dynamic "
                "groups); use method.static_groups=true, group_size=-1, export=gptq or export=dequantized."
            )
        return
    if grid.bits not in GPTQ_BITS:
        raise ValueError(
            f"the GPTQ format has weights of 2, 3, 4 or 8 bits, not {grid.bits}; use one of these widths or "
            "export=compressed_tensors."
        )
    if grid.group_size == 0:
        raise ValueError(
            "the GPTQ format has no scale per tensor (group_size=0); use group_size=-1 or a positive one, or "
            "export=compressed_tensors."
        )
    for name, (O, I) in sizes.items():
        if O * grid.bits % WORD or I * grid.bits % WORD:
            raise ValueError(
                f"the GPTQ format packs whole words of 32 bits, but {name} has {O} outputs and {I} inputs of "
                f"{grid.bits} bits; use export=compressed_tensors."
            )


def specs(layout: str, grid: Grid, O: int, I: int) -> dict[str, Spec]:
    """Suffix -> what the stored tensor must be, for a weight [O, I]."""
    G, b = grid.groups(I), grid.bits
    if layout in (GPTQ_V1, GPTQ_V2):
        return {
            "qweight": Spec((words(I, b), O), ("I32",)),
            "qzeros": Spec((G, words(O, b)), ("I32",)),
            "scales": Spec((G, O), FLOATS),
            "g_idx": Spec((I,), ("I32",)),
        }
    rows = (1,) if grid.group_size == 0 else (O, G)
    out = {"weight_scale": Spec(rows, FLOATS)}
    if layout == INT:
        zero = {"weight_zero_point": Spec(rows, ("I8",))}
        return {"weight": Spec((O, I), ("I8",))} | out | ({} if grid.symmetric else zero)
    out |= {
        "weight_packed": Spec((O, words(I, b)), ("I32",)),
        "weight_shape": Spec((2,), ("I64", "I32")),
    }
    if grid.symmetric:
        return out
    packed = Spec((words(O, b), G), ("I32",))
    return out | {"weight_zero_point": Spec(rows, ("I8",)) if grid.group_size == 0 else packed}


def encode(q: QuantizedTensor, layout: str) -> dict[str, Tensor]:
    """Suffix -> tensor of a weight whose grid and size `check_layout` let pass."""
    check_layout(layout, q.grid, {"the weight": tuple(q.codes.shape)}, q.group_index is not None)  # type: ignore[dict-item]
    b, codes, zero = q.grid.bits, _unsigned(q.codes, q.grid), _unsigned(q.zero, q.grid)
    if layout in (GPTQ_V1, GPTQ_V2):
        stored = zero - 1 if layout == GPTQ_V1 else zero
        assert int(stored.min()) >= 0, "z = 0 does not fit version 1 of the GPTQ format"
        return {
            "qweight": pack(codes, b).T.contiguous(),
            "qzeros": pack(stored.T, b),
            "scales": q.scale.T.float().contiguous(),
            "g_idx": _group_index(q).to(torch.int32),
        }
    scale = q.scale.float().contiguous()
    out = {"weight_scale": scale.flatten() if q.grid.group_size == 0 else scale}
    half = 1 << b - 1
    small = (zero - half).to(torch.int8).reshape(out["weight_scale"].shape)
    if layout == INT:
        out |= {"weight": (codes - half).to(torch.int8)}
        return out if q.grid.symmetric else out | {"weight_zero_point": small}
    shape = torch.tensor(q.codes.shape, dtype=torch.int64)
    out |= {"weight_packed": pack(codes, b), "weight_shape": shape}
    if q.grid.symmetric:
        return out
    return out | {
        "weight_zero_point": small if q.grid.group_size == 0 else pack(zero.T, b).T.contiguous(),
    }


def decode(stored: dict[str, Tensor], layout: str, grid: Grid, O: int, I: int) -> QuantizedTensor:
    """The weight [O, I] of tensors that are as `specs` says.

    Raises:
        ValueError: values that no writer of the format leaves.
    """
    b, half = grid.bits, 1 << grid.bits - 1
    if layout in (GPTQ_V1, GPTQ_V2):
        zero = unpack(stored["qzeros"], b, O).T.to(torch.int16)
        zero = (zero + 1) % (1 << b) if layout == GPTQ_V1 else zero
        codes = unpack(stored["qweight"].T.contiguous(), b, I).to(torch.int16)
        index = stored["g_idx"].to(torch.int64)
        return _quantized(codes, stored["scales"].T, zero, grid, index)
    if layout == INT:
        codes = stored["weight"].to(torch.int16) + half
    else:
        if tuple(stored["weight_shape"].tolist()) != (O, I):
            raise ValueError(
                f"weight_shape is {tuple(stored['weight_shape'].tolist())}, but the weight is {(O, I)}: take "
                "config.json and the weights from the same checkpoint."
            )
        codes = unpack(stored["weight_packed"], b, I).to(torch.int16)
    scale = stored["weight_scale"].reshape(-1, grid.groups(I))
    if grid.symmetric:
        zero = torch.full(scale.shape, half, dtype=torch.int16, device=scale.device)
    elif layout == INT or grid.group_size == 0:
        zero = stored["weight_zero_point"].to(torch.int16).reshape(scale.shape) + half
    else:
        zero = unpack(stored["weight_zero_point"].T.contiguous(), b, O).T.to(torch.int16)
    return _quantized(codes, scale, zero, grid, None)


def _quantized(
    codes: Integer[Tensor, "O I"],
    scale: Float[Tensor, "#O G"],
    zero: Integer[Tensor, "#O G"],
    grid: Grid,
    index: Integer[Tensor, " I"] | None,
) -> QuantizedTensor:
    """From unsigned codes and zeros."""
    I, G = codes.shape[1], scale.shape[1]
    if index is not None and not 0 <= int(index.min()) <= int(index.max()) < G:
        raise ValueError(f"g_idx names groups beyond the {G} that have scales: copy or download it again.")
    if index is not None and torch.equal(index, torch.arange(I, device=index.device) // (I // G)):
        index = None
    if grid.symmetric:
        half = 1 << grid.bits - 1
        if not bool((zero == half).all()):
            raise ValueError(
                f"the zero points differ from {half}, but config.json says symmetric: take config.json "
                "and the weights from the same checkpoint."
            )
        codes, zero = codes - half, zero - half
    return QuantizedTensor(
        codes.to(grid.dtype), scale.float().contiguous(), zero.float().contiguous(), grid, index
    )


def _unsigned(x: Tensor, grid: Grid) -> Integer[Tensor, "..."]:
    """Codes or zeros, counted from the lowest code of the grid."""
    return x.to(torch.int16) - grid.low


def _group_index(q: QuantizedTensor) -> Integer[Tensor, " I"]:
    I = q.codes.shape[1]
    if q.group_index is not None:
        return q.group_index
    return torch.arange(I, device=q.codes.device) // (I // q.scale.shape[1])
