"""Bit packing and the tensor layouts of the checkpoint formats."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllmq.numerics import Grid, QuantizedTensor, fit, quantize
from dllmq.numerics.layouts import GPTQ_V1, GPTQ_V2, INT, PACKED, Spec, check_layout, decode, encode, specs
from dllmq.numerics.packing import pack, unpack, words

NAMES = {torch.int8: "I8", torch.int32: "I32", torch.int64: "I64", torch.float32: "F32"}


@given(bits=st.integers(1, 8), rows=st.integers(1, 3), count=st.integers(1, 70), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_unpack_inverts_pack(bits: int, rows: int, count: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 2**bits, (rows, count), generator=rng)
    packed = pack(q, bits)
    assert packed.shape[1] == words(count, bits) and torch.equal(
        unpack(packed, bits, count), q.to(torch.uint8)
    )


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_row_is_one_long_number(bits: int) -> None:
    """sum_i q_i 2^(b i), cut into 32-bit words: the definition, in Python's integers."""
    q = torch.randint(0, 2**bits, (1, 45))
    row = sum(int(code) << (bits * i) for i, code in enumerate(q[0]))
    want = [row >> (32 * w) & 0xFFFFFFFF for w in range(-(-45 * bits // 32))]
    assert [int(w) & 0xFFFFFFFF for w in pack(q, bits)[0]] == want


def test_known_words() -> None:
    """Lowest nibble first; and three bits as in the GPTQ authors' code, ten codes and two bits a word."""
    assert pack(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]]), 4).tolist() == [[0x87654321 - 2**32]]
    q = torch.zeros(1, 32, dtype=torch.int64)
    q[0, 10] = 0b101  # its low two bits end the first word, its high bit begins the second
    assert pack(q, 3).tolist() == [[0b01 << 30, 0b1, 0]]


# ------------------------------------------------------------------ layouts


def weight(grid: Grid, O: int = 32, I: int = 64, seed: int = 0) -> QuantizedTensor:
    W = torch.randn(O, I, generator=torch.Generator().manual_seed(seed))
    W[0] = W[0].abs() + 0.1  # a row without negative weights has z = 0
    params = fit(W, grid)
    return QuantizedTensor(quantize(W, params, grid), params.scale, params.zero, grid)


def layouts_of(grid: Grid) -> list[str]:
    out = [PACKED] + ([INT] if grid.bits == 8 else [])
    if grid.bits in (2, 3, 4, 8) and grid.group_size != 0:
        out += [GPTQ_V2] + ([GPTQ_V1] if grid.symmetric else [])
    return out


GRIDS = [Grid(b, g, s) for b in range(2, 9) for g in (-1, 0, 16) for s in (False, True)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_decode_inverts_encode_bit_for_bit(grid: Grid) -> None:
    q = weight(grid)
    for layout in layouts_of(grid):
        stored = encode(q, layout)
        found = decode(stored, layout, grid, 32, 64)
        assert torch.equal(found.codes, q.codes) and found.codes.dtype == q.codes.dtype
        assert torch.equal(found.scale, q.scale) and torch.equal(found.zero, q.zero)
        assert torch.equal(found.dequantize(), q.dequantize()) and found.group_index is None
        kept = {name: Spec(tuple(t.shape), (NAMES[t.dtype],)) for name, t in stored.items()}
        want = specs(layout, grid, 32, 64)
        assert {n: s.shape for n, s in kept.items()} == {n: s.shape for n, s in want.items()}
        assert all(spec.types[0] in want[name].types for name, spec in kept.items())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_bytes_are_those_of_the_width(grid: Grid) -> None:
    """Codes and zeros at `bits` each, scales at four bytes; beyond that only weight_shape's 16 bytes."""
    q = weight(grid)
    size = sum(t.numel() * t.element_size() for t in encode(q, PACKED).values())
    assert q.nbytes + 16 <= size <= q.nbytes + 16 + (grid.group_size == 0)


@pytest.mark.parametrize("layout", [GPTQ_V1, GPTQ_V2])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_as_its_definition_reads_it(layout: str, symmetric: bool) -> None:
    """W[o, i] = s[g, o] (q[i, o] - z[g, o]), z stored less 1 in version 1; words taken apart by hand."""
    grid = Grid(4, 16, symmetric)
    q = weight(grid)
    if layout == GPTQ_V1:
        q = replace(q, zero=q.zero if symmetric else q.zero.clamp(min=1))
    stored = encode(q, layout)
    for o, i in ((0, 0), (3, 17), (31, 63), (8, 40)):
        code = stored["qweight"][i // 8, o].item() >> (4 * (i % 8)) & 15
        g = int(stored["g_idx"][i])
        zero = (stored["qzeros"][g, o // 8].item() >> (4 * (o % 8)) & 15) + (layout == GPTQ_V1)
        assert (code - zero) * stored["scales"][g, o] == q.dequantize()[o, i]


def test_gptq_keeps_groups_in_another_order() -> None:
    grid = Grid(4, 16)
    q = replace(weight(grid), group_index=torch.randperm(64) // 16)
    for layout in (GPTQ_V2,):
        found = decode(encode(q, layout), layout, grid, 32, 64)
        assert torch.equal(found.group_index, q.group_index) and torch.equal(
            found.dequantize(), q.dequantize()
        )


@pytest.mark.parametrize(
    ("layout", "grid", "size", "ordered", "said"),
    [
        (PACKED, Grid(4, 16), (32, 64), True, "method.static_groups=true"),
        (INT, Grid(8, 16), (32, 64), True, "export=gptq"),
        (GPTQ_V1, Grid(5), (32, 64), False, "2, 3, 4 or 8 bits, not 5"),
        (GPTQ_V2, Grid(4, 0), (32, 64), False, "group_size=-1"),
        (GPTQ_V2, Grid(3), (16, 64), False, "w has 16 outputs and 64 inputs of 3 bits"),
        (GPTQ_V2, Grid(4), (32, 60), False, "w has 32 outputs and 60 inputs of 4 bits"),
    ],
)
def test_what_a_format_cannot_hold(
    layout: str, grid: Grid, size: tuple[int, int], ordered: bool, said: str
) -> None:
    with pytest.raises(ValueError) as error:
        check_layout(layout, grid, {"w": size}, ordered)
    assert said in str(error.value) and "\n" not in str(error.value) and str(error.value).endswith(".")


def test_values_that_no_writer_leaves() -> None:
    grid = Grid(4, 16)
    q = weight(grid)
    packed, gptq = encode(q, PACKED), encode(q, GPTQ_V2)
    with pytest.raises(ValueError, match=r"weight_shape is \(64, 32\), but the weight is \(32, 64\)"):
        decode(packed | {"weight_shape": torch.tensor([64, 32])}, PACKED, grid, 32, 64)
    with pytest.raises(ValueError, match="g_idx names groups beyond the 4"):
        decode(gptq | {"g_idx": torch.arange(64, dtype=torch.int32)}, GPTQ_V2, grid, 32, 64)
    with pytest.raises(ValueError, match="zero points differ from 8"):
        decode(gptq, GPTQ_V2, Grid(4, 16, True), 32, 64)
