"""Compiles Triton's kernels for sm_90 on a machine without a GPU: `python compile_for_hopper.py [name ...]`.

The host functions run on tensors without data; each launch is turned into the compiler's input. Printed for
each kernel: registers and spilled bytes of a thread, shared memory of a block, tensor core instructions.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime import JITFunction
from triton.runtime.errors import OutOfResources

from dllmq.kernels import triton_jit
from dllmq.numerics import Grid, QuantizedTensor

HOPPER = GPUTarget("cuda", 90, 32)
SHARED = 227 * 1024  # bytes a block can have
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8", torch.uint8: "u8",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion", "maxnreg"}


def compiled(function: JITFunction, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """What the launch function[...](*args, **named) runs on an H200."""
    options = {k: v for k, v in named.items() if k in OPTIONS and v is not None}
    values = dict(zip(function.arg_names, args, strict=False))
    values |= {k: v for k, v in named.items() if k not in OPTIONS}
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(function.arg_names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif function.params[index].is_constexpr or value is None or (value == 1 and isinstance(value, int)):
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return compile(ASTSource(function, signature, constants, attributes), target=HOPPER, options=options)


def launches(call: Callable[[], Any]) -> Iterator[tuple[str, Any]]:
    """(kernel's name, compiled) of every launch that `call` makes."""
    found: list[tuple[str, Any]] = []

    def launch(self: JITFunction, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        found.append((self.__name__, compiled(self, args, named)))

    original, JITFunction.run = JITFunction.run, launch
    try:
        call()
    finally:
        JITFunction.run = original
    return iter(found)


def disassembled(binary: bytes) -> tuple[str, str]:
    """(resources, instructions) as cuobjdump prints them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        run = [subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
               for flag in ("-res-usage", "-sass")]  # fmt: skip
    return run[0], run[1]


def report(name: str, result: Any) -> str:
    """One line; raises where the kernel could not be launched."""
    usage, sass = disassembled(result.asm["cubin"])
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    shared = result.metadata.shared
    if shared > SHARED:
        raise OutOfResources(shared, SHARED, "shared memory")
    counts = {
        op: len(re.findall(rf"\b{op}\b", sass))
        for op in ("IGMMA", "HGMMA", "IMMA", "HMMA", "UBLKCP", "LDGSTS")
    }
    used = ", ".join(f"{count} {op}" for op, count in counts.items() if count)
    return (
        f"{name:20} {numbers['REG']:3} registers, {numbers['STACK']:3} bytes of stack, "
        f"{shared // 1024:3} KiB shared: {used}"
    )


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def cases() -> dict[str, Callable[[], Any]]:
    """Name -> a call that launches what is to be compiled."""
    from dllmq.kernels import triton_confidence, triton_gptq, triton_inputs, triton_linear

    def linear(
        weight: Grid, inputs: Grid | None, T: int, O: int = 4096, I: int = 4096, tile: int = 0
    ) -> Callable[[], Any]:
        def call() -> None:
            G = I // weight.group_size if weight.group_size > 0 else 1
            codes = empty(O, I, dtype=torch.int8 if weight.symmetric else torch.uint8)
            scale = empty(O, G, dtype=torch.float32)
            operand = triton_linear.prepare(QuantizedTensor(codes, scale, scale, weight), inputs)
            found = triton_linear.candidates
            triton_linear.candidates = lambda *args: [found(*args)[tile]]
            try:
                triton_linear.quant_linear(empty(T, I), operand, inputs)
            finally:
                triton_linear.candidates = found

        return call

    def gptq(B: int) -> None:
        columns = empty(B, 4096, dtype=torch.float32)
        triton_gptq.solve_block(columns, empty(B, B, dtype=torch.float32), columns, columns, 0, 15, False)

    def normed(inputs: Grid, I: int) -> None:
        layout = triton_inputs.Layout(I, planes=inputs.bits == 8)
        triton_inputs.quantize_inputs(empty(256, I), inputs, layout, triton_inputs.Norm(empty(I), 1e-5))

    others: dict[str, Callable[[], Any]] = {
        "norm a8": lambda: normed(Grid(8), 4096),
        "norm a4": lambda: normed(Grid(4), 3584),  # Dream's width, no power of 2
        "gptq 128": lambda: gptq(128),
        "gptq 32": lambda: gptq(32),
        "confidence bf16": lambda: triton_confidence.argmax_confidence(empty(32, 126464)),
    }
    return others | {
        f"{name} T={T} tile={tile}": linear(weight, inputs, T, tile=tile)
        for name, weight, inputs in (
            ("w8a8", Grid(8, symmetric=True), Grid(8, symmetric=True)),
            ("w4a8", Grid(4), Grid(8)),
            ("w4a4g128", Grid(4, 128), Grid(4)),
            ("w4a4g32", Grid(4, 32), Grid(4)),
            ("w4a16g128", Grid(4, 128), None),
        )
        for T in (16, 256, 4096)
        for tile in (0, 1, 2, 3)
    }


def main(chosen: list[str]) -> None:
    assert not triton_jit.is_interpreted(), "unset TRITON_INTERPRET to compile"
    for name, call in cases().items():
        if not chosen or any(c in name for c in chosen):
            for kernel, result in launches(call):
                print(f"{name:22} {report(kernel, result)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
