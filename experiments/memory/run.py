"""A LLaDA-shaped checkpoint of 3.3 GB, quantized streaming and loaded whole: peak memory, equality.

python experiments/memory/run.py         # writes results.json and table.md beside itself

Each row is a process of its own: VmHWM, the largest resident memory it ever had, counts its libraries too.
`--blocks 2` tries it out on a small checkpoint and writes nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from dllmq.calibration.states import CalibrationState  # noqa: E402
from dllmq.machine import git_state  # noqa: E402
from dllmq.methods import AWQ, GPTQ, RTN  # noqa: E402
from dllmq.models import load_model  # noqa: E402
from dllmq.models.linear import QuantLinear  # noqa: E402
from dllmq.models.llada import LLaDA, LLaDAConfig  # noqa: E402
from dllmq.models.loading import skeleton  # noqa: E402
from dllmq.numerics import Grid  # noqa: E402
from dllmq.pipeline import quantize  # noqa: E402
from dllmq.recipe import Recipe  # noqa: E402

BLOCKS, BLOCKS_A_SHARD = 32, 4
COMMON = {"architectures": ["LLaDAModelLM"], "vocab_size": 512, "mask_token_id": 511, "eos_token_id": 510}
LARGE = COMMON | {"d_model": 2048, "n_heads": 16, "mlp_hidden_size": 5632, "rope_theta": 500000.0}
SMALL = COMMON | {
    "d_model": 512,
    "n_heads": 8,
    "mlp_hidden_size": 1408,
    "n_layers": 4,
    "rope_theta": 500000.0,
}
METHODS = {"rtn": RTN(), "gptq": GPTQ(), "awq": AWQ(n_grid=10)}
WHOLE, KEPT, WRITTEN = "whole", "stream", "stream, written"
LARGE_RUNS = [
    ("rtn", KEPT),
    ("rtn", WHOLE),
    ("rtn", WRITTEN),
    ("gptq", KEPT),
    ("gptq", WHOLE),
    ("gptq", WRITTEN),
]
SMALL_RUNS = [("gptq", WHOLE), ("gptq", KEPT), ("awq", WHOLE), ("awq", KEPT)]


# ------------------------------------------------------------------ the checkpoint


def make_checkpoint(folder: Path, config: dict[str, Any]) -> int:
    """Random bf16 weights in shards of four blocks; returns their bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {n: p.shape for n, p in skeleton(LLaDAConfig.from_dict(config), LLaDA).state_dict().items()}
    rng, weight_map = torch.Generator().manual_seed(0), {}
    pool = torch.randn(2**24, generator=rng).bfloat16()
    by_shard: dict[int, list[str]] = {}
    for name in shapes:
        block = name.partition(".blocks.")[2].partition(".")[0]
        by_shard.setdefault(int(block) // BLOCKS_A_SHARD if block else -1, []).append(name)
    for shard, names in by_shard.items():
        file = f"part-{shard + 1:03}.safetensors"
        save_file({name: random_weight(shapes[name], pool, rng) for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def random_weight(shape: torch.Size, pool: Tensor, rng: torch.Generator) -> Tensor:
    """Norms of 1; matrices of std 1 / sqrt(inputs), a stretch of the pool that starts anywhere in it."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    start = int(torch.randint(len(pool) - shape.numel(), (1,), generator=rng))
    return (pool[start : start + shape.numel()] * shape[1] ** -0.5).reshape(shape)


def calibration_states(batches: int = 2, rows: int = 2, length: int = 32) -> list[CalibrationState]:
    """Random tokens, half of the second half masked; their meaning matters to nothing measured here."""
    rng, states = torch.Generator().manual_seed(1), []
    for _ in range(batches):
        tokens = torch.randint(0, 500, (rows, length), generator=rng)
        response = torch.arange(length).expand(rows, length) >= length // 2
        masked = response & (torch.rand(rows, length, generator=rng) < 0.5)
        tokens[masked] = 511
        valid, score = torch.ones_like(masked), torch.zeros(rows, length)
        states.append(CalibrationState(tokens, masked, valid, response, score, torch.zeros(rows).long(), 16))
    return states


# ------------------------------------------------------------------ one row, in a process of its own


class PeakParts(threading.Thread):
    """The largest anonymous and file-backed resident memory, looked at every 20 ms; VmHWM is exact."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = {"RssAnon": 0, "RssFile": 0}

    def run(self) -> None:
        while True:
            now = memory()
            self.peak = {name: max(peak, now[name]) for name, peak in self.peak.items()}
            time.sleep(0.02)


def memory() -> dict[str, int]:
    """Bytes, by the names of /proc/self/status."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: 1024 * int(words[1]) for words in lines if words[-1] == "kB"}


class Digest:
    """sha256 over the quantized blocks, in order; writes and frees them where a folder is given."""

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.sha = folder, hashlib.sha256()

    def __call__(self, index: int, block: nn.Module) -> None:
        tensors = {name: p.data for name, p in block.named_parameters() if p.dim() == 1}
        for name, linear in block.named_modules():
            if isinstance(linear, QuantLinear):
                q = linear.quantized
                tensors |= {f"{name}.codes": q.codes, f"{name}.scale": q.scale, f"{name}.zero": q.zero}
        for name in sorted(tensors):
            self.sha.update(name.encode() + tensors[name].contiguous().view(torch.uint8).numpy().data)
        if self.folder is not None:
            save_file(tensors, self.folder / f"block-{index:03}.safetensors")
            block.to("meta")


def child(checkpoint: Path, method: str, mode: str) -> dict[str, Any]:
    """Quantizes the checkpoint; memory, seconds, and a digest of all codes, scales, zeros and norms."""
    parts = PeakParts()
    parts.start()
    started, imported = time.perf_counter(), memory()["VmRSS"]
    model = load_model(checkpoint, dtype=torch.bfloat16, stream=mode != WHOLE)
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as folder:
        digest = Digest(Path(folder) if mode == WRITTEN else None)
        recipe = Recipe(METHODS[method], Grid(4))
        quantize(model, [], recipe, states=calibration_states(), on_block=digest)
    logits = None
    if mode != WRITTEN:
        with torch.no_grad():
            found = model(calibration_states()[0].tokens)
        logits = hashlib.sha256(found.view(torch.uint8).numpy().data).hexdigest()
    return {
        "peak_bytes": memory()["VmHWM"],
        "peak_anonymous_bytes": parts.peak["RssAnon"],
        "peak_file_bytes": parts.peak["RssFile"],
        "imported_bytes": imported,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time(),
        "digest": digest.sha.hexdigest(),
        "logits": logits,
    }


# ------------------------------------------------------------------ all rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--child", nargs=3)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(Path(arguments.child[0]), *arguments.child[1:])))
        return
    results: dict[str, Any] = {
        "command": "python experiments/memory/run.py",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "git": git_state(),
    }
    large = LARGE | {"n_layers": arguments.blocks}
    for part, config, runs in (("large", large, LARGE_RUNS), ("small", SMALL, SMALL_RUNS)):
        results[part] = measure(config, runs)
        if arguments.blocks == BLOCKS:
            (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
            (HERE / "table.md").write_text(table(results))
    print(table(results))


def measure(config: dict[str, Any], runs: list[tuple[str, str]]) -> dict[str, Any]:
    """Makes a checkpoint and runs a process for each row."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkpoint"
        size = make_checkpoint(folder, config)
        print(f"checkpoint of {size / 1e9:.2f} GB", flush=True)
        rows = [in_child(folder, method, mode) for method, mode in runs]
    return {"config": config, "checkpoint_bytes": size, "rows": rows}


def in_child(checkpoint: Path, method: str, mode: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", str(checkpoint), method, mode]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{method}, {mode}: {found['peak_bytes'] / 1e9:.2f} GB, {found['seconds']:.0f} s", flush=True)
    return {"method": method, "mode": mode} | found


def table(results: dict[str, Any]) -> str:
    """Peaks as a share of the checkpoint, and whether the numbers are those of the model loaded whole."""
    imported = results["large"]["rows"][0]["imported_bytes"]
    head = ("checkpoint", "method", "model", "peak GB", "of the checkpoint", "anonymous GB", "file-backed GB",
            "CPU seconds", "codes, scales, zeros, norms", "logits")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---|---|---|---:|---:|---:|---:|---:|---|---|"]
    for part in [part for part in ("large", "small") if part in results]:
        size, rows = results[part]["checkpoint_bytes"], results[part]["rows"]
        whole = {row["method"]: row for row in rows if row["mode"] == WHOLE}
        lines += [table_row(size, row, whole[row["method"]]) for row in rows]
    note = f"Peaks are of the process; {imported / 1e9:.2f} GB of them is there after the imports."
    return "\n".join([*lines, "", note]) + "\n"


def table_row(size: int, row: dict[str, Any], whole: dict[str, Any]) -> str:
    def same(key: str) -> str:
        if row[key] is None or row is whole:
            return "reference" if row is whole else "-"
        return "equal" if row[key] == whole[key] else "DIFFERENT"

    columns = [f"{size / 1e9:.2f} GB", row["method"], row["mode"], f"{row['peak_bytes'] / 1e9:.2f}"]
    columns += [f"{row['peak_bytes'] / size:.2f}" if size > 1e9 else "-"]
    columns += [f"{row[k] / 1e9:.2f}" for k in ("peak_anonymous_bytes", "peak_file_bytes")]
    return "| " + " | ".join([*columns, f"{row['cpu_seconds']:.0f}", same("digest"), same("logits")]) + " |"


if __name__ == "__main__":
    main()
