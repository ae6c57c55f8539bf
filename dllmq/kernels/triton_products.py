"""The products of triton_linear.py on the device; its docstring has the equations.

A program makes a tile [outputs, tokens] of y^T: the weight is the left operand, so that widened codes go to
the tensor cores from registers (the right one is read from shared memory), and few tokens do not fill up the
64 rows of a left operand.

Pointers that are None when a kernel is compiled stand for terms that are not there.
"""

from __future__ import annotations

from typing import Any

from dllmq.kernels.triton_jit import kernel

tl: Any  # triton.language, set by the first launch


@kernel
def tile_of(T, O, BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr):
    """First output and token of this program: 8 rows of tiles at a time, so that neighbours in time share
    weights and inputs in the L2 cache."""
    pid = tl.program_id(0)
    rows = tl.cdiv(O, BLOCK_O)
    columns = tl.cdiv(T, BLOCK_T)
    first = pid // (8 * columns) * 8
    height = min(rows - first, 8)
    within = pid % (8 * columns)
    return (first + within % height) * BLOCK_O, within // height * BLOCK_T


@kernel
def nibbles(p, z, SUBTRACT: tl.constexpr, INTERPRETED: tl.constexpr):
    """The low and the high codes of bytes p [outputs, n] in int8, less z [outputs] where asked for.

    Four bytes at once: a shift or a difference of single bytes is compiled to several instructions each.
    """
    if INTERPRETED:
        low = (p & 15).to(tl.int8)
        high = (p >> 4).to(tl.int8)
        if SUBTRACT:
            low -= z[:, None]
            high -= z[:, None]
    elif SUBTRACT:  # 128 in each byte is what the difference borrows from; 0xEA: (a and b) or c
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 t;
            lop3.b32 $0, $2, 0x0f0f0f0f, 0x80808080, 0xEA;
            sub.u32 $0, $0, $3;
            xor.b32 $0, $0, 0x80808080;
            shr.b32 t, $2, 4;
            lop3.b32 $1, t, 0x0f0f0f0f, 0x80808080, 0xEA;
            sub.u32 $1, $1, $3;
            xor.b32 $1, $1, 0x80808080;
            }""",
            "=&r,=&r,r,r", [p, z[:, None]], (tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        low = (p & 15).to(tl.int8)
        high = tl.inline_asm_elementwise(
            "{ shr.b32 $0, $1, 4; and.b32 $0, $0, 0x0f0f0f0f; }", "=r,r", [p], tl.int8, is_pure=True, pack=4
        )
    return low, high


@kernel
def multiply(
    acc, w_ptr, x_ptr, o, t, z, start,
    I: tl.constexpr, PACKED: tl.constexpr, PLANES: tl.constexpr, SUBTRACT: tl.constexpr,
    BLOCK_I: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """acc + the product over the columns start ... start + BLOCK_I: [outputs, tokens] int32."""
    i = tl.arange(0, BLOCK_I)
    if not PACKED:
        w = tl.load(w_ptr + o[:, None] * I + (start + i)[None, :])
        x = tl.load(x_ptr + t[None, :] * I + (start + i)[:, None])
        return tl.dot(w, x, acc, out_dtype=tl.int32)
    h = tl.arange(0, BLOCK_I // 2)
    p = tl.load(w_ptr + o[:, None] * (I // 2) + (start // 2 + h)[None, :])
    low, high = nibbles(p, z, SUBTRACT, INTERPRETED)
    if PLANES:
        x_ptrs = x_ptr + t[None, :] * I + (start // 2 + h)[:, None]
        acc = tl.dot(low, tl.load(x_ptrs), acc, out_dtype=tl.int32)
        return tl.dot(high, tl.load(x_ptrs + I // 2), acc, out_dtype=tl.int32)
    x = tl.load(x_ptr + t[None, :] * I + (start + i)[:, None])
    return tl.dot(tl.interleave(low, high), x, acc, out_dtype=tl.int32)


@kernel
def integer_kernel(
    x_ptr, x_scale_ptr, x_offset_ptr, x_sums_ptr, w_ptr, w_scale_ptr, w_offset_ptr, w_sums_ptr,
    bias_ptr, y_ptr, T, O,
    I: tl.constexpr, S: tl.constexpr, W_GROUP: tl.constexpr, X_GROUP: tl.constexpr,
    PACKED: tl.constexpr, PLANES: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile [outputs, tokens] of y^T, from one sum over the row or from a sum for each segment."""
    first_o, first_t = tile_of(T, O, BLOCK_O, BLOCK_T)
    o_all = first_o + tl.arange(0, BLOCK_O)
    t_all = first_t + tl.arange(0, BLOCK_T)
    o = o_all % O  # beyond the end: some row, not stored
    t = t_all % T
    z = tl.zeros((BLOCK_O,), tl.int8)
    if S == I:
        acc = tl.zeros((BLOCK_O, BLOCK_T), tl.int32)
        for start in tl.range(0, I, BLOCK_I, num_stages=STAGES):
            acc = multiply(acc, w_ptr, x_ptr, o, t, z, start, I, PACKED, PLANES, False, BLOCK_I, INTERPRETED)
        if w_offset_ptr is not None:
            acc += tl.load(w_offset_ptr + o)[:, None] * tl.load(x_sums_ptr + t)[None, :]
        if x_offset_ptr is not None:
            acc += tl.load(w_sums_ptr + o)[:, None] * tl.load(x_offset_ptr + t)[None, :]
        y = acc.to(tl.float32) * tl.load(x_scale_ptr + t)[None, :] * tl.load(w_scale_ptr + o)[:, None]
    else:
        y = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
        a = tl.zeros((BLOCK_T,), tl.int32)
        if x_offset_ptr is not None and X_GROUP == I:
            a = tl.load(x_offset_ptr + t)
        for n in tl.range(0, I // S, num_stages=STAGES):
            w_at = n * S // W_GROUP * O + o  # this segment's group, of the weight and of the input
            x_at = n * S // X_GROUP * T + t
            acc = tl.zeros((BLOCK_O, BLOCK_T), tl.int32)
            d = tl.zeros((BLOCK_O,), tl.int32)
            if w_offset_ptr is not None:
                d = tl.load(w_offset_ptr + w_at)
            for k in tl.static_range(0, S, BLOCK_I):
                acc = multiply(
                    acc, w_ptr, x_ptr, o, t, (-d).to(tl.int8), n * S + k,
                    I, PACKED, PLANES, PACKED, BLOCK_I, INTERPRETED,
                )  # fmt: skip
            if w_offset_ptr is not None and not PACKED:
                acc += d[:, None] * tl.load(x_sums_ptr + n * T + t)[None, :]
            if x_offset_ptr is not None:
                if X_GROUP < I:
                    acc += tl.load(w_sums_ptr + n * O + o)[:, None] * tl.load(x_offset_ptr + x_at)[None, :]
                else:
                    acc += tl.load(w_sums_ptr + n * O + o)[:, None] * a[None, :]
            part = acc.to(tl.float32)
            if X_GROUP < I:
                part *= tl.load(x_scale_ptr + x_at)[None, :]
            if W_GROUP < I:
                part *= tl.load(w_scale_ptr + w_at)[:, None]
            y += part
        if X_GROUP == I:
            y *= tl.load(x_scale_ptr + t)[None, :]
        if W_GROUP == I:
            y *= tl.load(w_scale_ptr + o)[:, None]
    store(y, bias_ptr, y_ptr, o_all, t_all, T, O)


@kernel
def weight_only_kernel(
    x_ptr, w_ptr, w_scale_ptr, w_offset_ptr, bias_ptr, y_ptr, T, O,
    I: tl.constexpr, W_GROUP: tl.constexpr, PACKED: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile [outputs, tokens] of y^T, the weight dequantized on the way."""
    first_o, first_t = tile_of(T, O, BLOCK_O, BLOCK_T)
    o_all = first_o + tl.arange(0, BLOCK_O)
    t_all = first_t + tl.arange(0, BLOCK_T)
    o = o_all % O
    t = t_all % T
    i = tl.arange(0, BLOCK_I)
    h = tl.arange(0, BLOCK_I // 2)
    z = tl.zeros((BLOCK_O,), tl.int8)
    y = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
    for start in tl.range(0, I, BLOCK_I, num_stages=STAGES):
        x = tl.load(x_ptr + t[None, :] * I + (start + i)[:, None])
        if PACKED:
            p = tl.load(w_ptr + o[:, None] * (I // 2) + (start // 2 + h)[None, :])
            low, high = nibbles(p, z, False, INTERPRETED)
            c = tl.interleave(low, high).to(tl.float32)
        else:
            c = tl.load(w_ptr + o[:, None] * I + (start + i)[None, :]).to(tl.float32)
        if w_offset_ptr is not None:
            c += tl.load(w_offset_ptr + start // W_GROUP * O + o).to(tl.float32)[:, None]
        w = (c * tl.load(w_scale_ptr + start // W_GROUP * O + o)[:, None]).to(x.dtype)
        if INTERPRETED:  # the interpreter multiplies no bf16
            y = tl.dot(w.to(tl.float32), x.to(tl.float32), y, input_precision="ieee")
        else:
            y = tl.dot(w, x, y, input_precision="ieee")
    store(y, bias_ptr, y_ptr, o_all, t_all, T, O)


@kernel
def store(y, bias_ptr, y_ptr, o, t, T, O):
    """y^T + b, where there is a bias, to y [tokens, outputs]."""
    if bias_ptr is not None:
        y += tl.load(bias_ptr + o, mask=o < O, other=0.0).to(tl.float32)[:, None]
    at = y_ptr + t[None, :].to(tl.int64) * O + o[:, None]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(o < O)[:, None] & (t < T)[None, :])
