"""What a result depends on: the fingerprint of a run, and of any full-precision forward."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from functools import cache
from importlib import metadata
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dllmq.config.schema import RunConfig
from dllmq.evaluation import benchmarks, task_data

# Keys that change no number, or that are part of the fingerprint resolved (device, threads).
_NEUTRAL = (
    "tracker", "resume", "name", "dry_run", "device", "threads", "cache_dir", "memory", "max_state_bytes",
    "export",
)  # fmt: skip


# What is read of a checkpoint folder (not its README): config, weights, tokenizer.
READ = (".json", ".safetensors", ".jinja", ".txt", ".model")


def fingerprint(config: RunConfig, device: str) -> str:
    """sha256 over all that affects the numbers: config, weights, tokenizer, data, code, device, threads."""
    return fingerprint_of(fingerprint_parts(config, device))


def fingerprint_of(parts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def fingerprint_parts(config: RunConfig, device: str) -> dict[str, Any]:
    """What the fingerprint is of, as JSON values: the config's own keys under "config"."""
    values = {k: v for k, v in config.plain().items() if k not in _NEUTRAL}
    values["tasks"] = {k: v for k, v in values["tasks"].items() if k != "data_dir"}  # what is in it counts
    data = file_digest(Path(config.calibration.data)) if config.calibration.data else None
    parts = identity(config, device) | {"config": values, "data": data, "tasks": _tasks_identity(config)}
    return parts | batch_identity(config, device)


def batch_identity(config: RunConfig, device: str) -> dict[str, Any]:
    """What settles eval.batch_size=auto beside the requests; nothing where the size is given."""
    from dllmq.models.memory import rounded, total_memory

    return {"memory": rounded(total_memory(device))} if config.eval.batch_size == "auto" else {}


def _tasks_identity(config: RunConfig) -> dict[str, Any]:
    """What scores depend on beside the model: lm-eval, each task's settings and its local files."""
    answers = config.answers()
    return {
        "lm-eval": version("lm-eval"),
        "settings": {name: asdict(answer) for name, answer in answers.items()},
        "data": {
            name: task_data.digests(name, answers[name].num_fewshot, config.data_dir)
            for name in config.tasks.names
            if name in benchmarks.names()
        },
    }


def identity(config: RunConfig, device: str) -> dict[str, Any]:
    """What any forward of the full-precision model depends on: weights, tokenizer, dtype, code, device."""
    import torch

    from dllmq.models.loading import checkpoint_folder

    folder = checkpoint_folder(config.model_path)
    return {
        "weights": {p.name: file_digest(p) for p in sorted(folder.iterdir()) if p.suffix in READ},
        "dtype": config.dtype(),
        "chat_template": config.chat_template,
        "code": code_digest(),
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    } | _gpu_identity(device)


def _gpu_identity(device: str) -> dict[str, Any]:
    """Whose kernels compute where the device is a GPU; a CPU's are in torch's version."""
    import torch

    if not device.startswith("cuda"):
        return {}
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    name = torch.cuda.get_device_name(device) if torch.cuda.is_available() else None
    return {"gpu": name, "triton": triton}


def file_digest(path: Path, whole_below: int = 2**26) -> str:
    """sha256 of a file; of a large one (a weight shard): its size, time of change and first MiB."""
    stat = path.stat()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read() if stat.st_size < whole_below else file.read(2**20))
    if stat.st_size >= whole_below:
        digest.update(f"{stat.st_size}:{stat.st_mtime_ns}".encode())
    return digest.hexdigest()


@cache
def code_digest() -> str:
    """sha256 of the source files that numbers come from (not the report's), as they were when first asked.

    A file that is edited while a sweep runs does not change the code that runs.
    """
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*")):
        inside = file.relative_to(package).parts
        if file.suffix in (".py", ".yaml") and inside[0] not in (
            "report",
            "bench",
            "estimate.py",
            "run.py",
            "generate.py",
            "status.py",
            "workers.py",
            "interrupt.py",
            "locks.py",
            "cache.py",
            "durable.py",
            "refusals.py",
            "conf",
            "__pycache__",
        ):
            digest.update("/".join(inside).encode() + file.read_bytes())
    return digest.hexdigest()
