"""Section `memory`: bytes that the weights take and the peak of a forward, a process of its own for each row.

    python -m dllmq.bench.memory <shape> <format> <device> <dtype> <threads> <quick>      one row's JSON

`weights` are all tensors the model holds, embedding and head (never quantized) included, each storage once.
`peak` is the most since the model was ready, in one forward over the canvas: of the GPU's allocator, or the
process's resident set, libraries included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dllmq.bench import machine
from dllmq.bench.generate import packs, quantize_in_place
from dllmq.bench.rows import Row, Sheet
from dllmq.bench.shapes import DTYPES, Setup, build, check_room, work
from dllmq.pipeline import weight_bytes

FORMATS = ("w8a8", "w4a8", "w4a8 compact", "w4a4", "w4a4 compact", "w4a16", "w4a16 compact")
TARGETS = ("w4a8", "w4a4")  # first on a GPU, where time may run out (experiments/speed/gpu.py)
COMPACT = " compact"  # codes at their width alone; what a product needs of them is made anew each time
CHECKOUT = Path(__file__).resolve().parents[2]


def measure(setup: Setup, sheet: Sheet) -> None:
    """Adds the section's rows."""
    check_room(setup.shape, setup.device, setup.dtype)
    # a GPU's allocator starts over in this process, the resident set of a process does not
    own = measured if setup.device.type == "cuda" else in_process
    full = own(setup, setup.dtype_name)
    wanted = sorted(FORMATS, key=lambda name: name not in TARGETS) if setup.device.type == "cuda" else FORMATS
    for name in FORMATS[:1] if setup.quick else wanted:
        add_rows(sheet, (setup.dtype_name, name), full, own(setup, name))


def add_rows(sheet: Sheet, formats: tuple[str, str], full: dict[str, Any], found: dict[str, Any]) -> None:
    """Two rows of a format: all weights, and the peak; or why there are none."""
    name = formats[1]
    if "left_out" in found:
        sheet.leave_out(found["left_out"])
        return
    names = (formats[0], f"{name} {found['backend']}")
    other = full["other_bytes"]
    blocks = (full["held_bytes"] - other) / max(1, found["held_bytes"] - found["other_bytes"])
    numbers = {"without_embedding_and_head": blocks, "stored_bytes": found["stored_bytes"]}
    for key, what, field in (
        ("memory.weights", f"weights, {name}", "held_bytes"),
        ("memory.peak", f"peak of a forward, {name}", "peak_bytes"),
    ):
        if full[field] is None or found[field] is None:
            sheet.leave_out("The peak is not measured: this system does not tell it.")
            continue
        ratio = full[field] / found[field]
        own = numbers if field == "held_bytes" else {}
        note = f"{blocks:.2f} x without embedding and head" if own else ""
        size = "" if own else found["canvas"]
        row = Row(
            f"{key}_{name}", what, size, *names, "B", full[field], found[field], ratio, ratio, ratio, 1,
            note=note, numbers=own,
        )  # fmt: skip
        sheet.add(row)


def in_process(setup: Setup, name: str) -> dict[str, Any]:
    """What a process of its own measures of one format.

    Raises:
        ValueError: it failed; its last line.
    """
    words = [setup.shape, name, str(setup.device), setup.dtype_name]
    words += [str(torch.get_num_threads()), str(int(setup.quick))]
    command = [sys.executable, "-m", "dllmq.bench.memory", *words]
    paths = [str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"measuring the memory of {setup.shape} as {name} failed: {last}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(setup: Setup, name: str) -> dict[str, Any]:
    """Of one format, in this process."""
    sheet, model = Sheet(), build(setup.shape, setup.device, setup.dtype)
    if name != setup.dtype_name:
        quantize_in_place(model, name.removesuffix(COMPACT), compact=name.endswith(COMPACT))
        backend = packs(model, name, sheet)
        if not backend and not name.endswith(COMPACT):
            return {"left_out": sheet.left_out[0]}
        return of_model(model, setup) | {"backend": backend or "fake"}
    return of_model(model, setup)


def of_model(model: Any, setup: Setup) -> dict[str, Any]:
    """Bytes held, and the peak of one forward of the (first) batch's canvas."""
    job = work(setup, 1)
    canvas = F.pad(job.prompts, (0, job.sampler.gen_length), value=model.config.mask_token_id)
    with torch.no_grad():
        model.hidden_states(canvas)
        machine.reset_peak(setup.device)
        model.head(model.hidden_states(canvas)[:, -job.sampler.gen_length :])
    held = machine.held_bytes(model)
    return {
        "held_bytes": held,
        "other_bytes": held - machine.held_bytes(model.blocks),
        "stored_bytes": weight_bytes(model),
        "peak_bytes": machine.peak_bytes(setup.device),
        "canvas": f"{canvas.shape[0]} x {canvas.shape[1]} tokens",
    }


def main(words: list[str]) -> None:
    """One row, as JSON."""
    shape, name, device, dtype, threads, quick = words
    torch.set_num_threads(int(threads))
    setup = Setup(shape, torch.device(device), DTYPES[dtype], 1, bool(int(quick)))
    print(json.dumps(measured(setup, name)))


if __name__ == "__main__":
    main(sys.argv[1:])
