"""One cell of a sweep: full precision's share of the work (once for all), quantize, measure, record.

A sweep folder holds <cell>/results.json and baseline.json (full precision's record; its answers beside it).
"""

from __future__ import annotations

import json
import logging
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllmq import __version__
from dllmq.cache import Cache
from dllmq.calibration.hidden import Spill
from dllmq.calibration.states import Trajectory
from dllmq.checkpoint import save_quantized
from dllmq.config import Plan, RunConfig, build, fingerprint
from dllmq.evaluation import sandbox
from dllmq.evaluation.divergence import measure_divergence
from dllmq.evaluation.fidelity import Fidelity, FidelityReference, measure
from dllmq.evaluation.tasks import EvalResult, evaluate, runs_code
from dllmq.full_precision import HELD_OUT_SEED, Baseline, ForwardCounter, FullPrecision
from dllmq.methods import FP
from dllmq.models.loading import checkpoint_folder, load_model
from dllmq.models.memory import plan_memory
from dllmq.models.stored import RECORD
from dllmq.models.streaming import log_reading
from dllmq.models.tokenizer import load_tokenizer
from dllmq.pipeline import QuantizationReport, quantize, set_backend, weight_bytes
from dllmq.report.results import (
    BASELINE,
    RESULTS,
    STATUS,
    RunRecord,
    load_record,
    redact,
    to_plain,
    write_json_atomic,
    write_text_atomic,
)
from dllmq.report.tracker import TrackedRun, changed_samples

log = logging.getLogger(__name__)
Progress = Callable[[int, int, str], None]
MODEL = "model"  # folder of the export, in the cell's


class Stages:
    """Seconds and peak memory of each stage, for the record."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.cost: dict[str, float | int | None] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        reset_peak_memory(self.device)
        start = time.perf_counter()
        yield
        self.cost[f"{name}_s"] = self.cost.get(f"{name}_s", 0.0) + time.perf_counter() - start  # type: ignore[operator]
        peak = peak_memory(self.device)
        self.cost[f"{name}_peak_bytes"] = peak
        self.cost["peak_memory_bytes"] = max(peak, self.cost.get("peak_memory_bytes", 0) or 0)


def reset_peak_memory(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # elsewhere the peak is the process's own
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str) -> int:
    """Bytes: of the GPU's allocator, or the process's peak resident set since the last reset."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    except (OSError, StopIteration):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Cell:
    """A checked plan, ready to run in its folder."""

    def __init__(
        self, plan: Plan, folder: Path, sweep: Path, name: str, command: str, progress: Progress
    ) -> None:
        self.plan, self.config = plan, plan.config
        self.folder, self.sweep, self.name, self.command = folder, sweep, name, command
        self.progress = progress
        self.stages, self.backend = Stages(plan.device), ""
        self.key = fingerprint(self.config, plan.device)
        self.fp_key = fingerprint(_reference_config(self.config), plan.device)

    def run(self) -> RunRecord:
        """Quantizes and measures, unless the folder has this fingerprint's results already."""
        done = self._finished()
        if done is not None:
            return done
        tracker = build("tracker", self.config.tracker)
        config = self.config
        tracker.start(TrackedRun(self.name, self.folder, config.plain(), config.axes(), self.sweep.name))
        try:
            record = self._compute()
            write_json_atomic(self.folder / RESULTS, record)
        except BaseException as error:
            if isinstance(error, Exception):
                self._set_aside()
            tracker.finish()
            raise
        (self.folder / STATUS).unlink(missing_ok=True)
        tracker.log_curves(record.curves)
        tracker.log_samples(changed_samples(record, self.folder / RESULTS, self.sweep))
        tracker.finish(record, self.folder / RESULTS)
        return record

    def _set_aside(self) -> None:
        """Results of another configuration or code are not to be taken for those of the run that failed."""
        if (self.folder / RESULTS).exists():
            (self.folder / RESULTS).replace(self.folder / "results.stale.json")

    def _finished(self) -> RunRecord | None:
        file = self.folder / RESULTS
        if not self.config.resume or not file.is_file():
            return None
        try:
            record = load_record(file)
        except ValueError as error:
            log.warning("%s: not readable (%s); the cell is run again", file, error)
            return None
        if record.fingerprint == self.key and not self._is_exported(record):
            log.info(
                "%s: finished, but export=%s is not there; it is run again", self.name, self.config.export
            )
            return None
        if record.fingerprint == self.key:
            log.info("%s: finished already, with the same fingerprint", self.name)
            return record
        log.info("%s: has results of another configuration, code or machine (%s); it is run again", self.name,
                 _difference(record.config, self.config.plain()))  # fmt: skip
        return None

    def _is_exported(self, record: RunRecord) -> bool:
        """Whether the folder holds the export that is asked for, of this record."""
        if self.config.export is None or isinstance(self.plan.recipe.method, FP):
            return True
        made = record.notes.get("export") or {}
        return made.get("format") == self.config.export and (self.folder / MODEL / RECORD).is_file()

    def _export(self, model: Any) -> tuple[dict[str, int], dict[str, Any]]:
        """Writes the quantized model beside the results; what it costs, and a note."""
        config = self.config
        if config.export is None:
            return {}, {}
        made = {
            "config": redact(config.plain()),
            "command": self.command,
            "versions": _versions(),
            "git": _git(),
        }
        source = checkpoint_folder(config.model_path)
        with self.stages("export"):
            size = save_quantized(model, self.folder / MODEL, config.export, source, made)
        return {"exported_bytes": size}, {"export": {"format": config.export, "folder": MODEL}}

    def _compute(self) -> RunRecord:
        config, stages, forwards = self.config, self.stages, ForwardCounter()
        inert = self.plan.recipe.inert()
        if config.export is not None and isinstance(self.plan.recipe.method, FP):
            inert.append("export: full precision is the checkpoint itself")
        if not config.sampler_config().exact and not config.approximations():
            on = [name for name in ("cache", "threshold") if name in config.axes()]
            inert += [f"{name}: no task generates its answers" for name in on]
        for line in inert:
            log.warning("no effect: %s", line)
        with stages("load"):
            model, tokenizer = self._load()
        folder = Path(config.cache_dir).expanduser() if config.cache_dir else self.sweep / ".shared"
        shared = FullPrecision(self.plan, Cache(folder), model, tokenizer, self.progress)
        with forwards.watching(model):
            baseline = self._baseline(shared)
            if isinstance(self.plan.recipe.method, FP) and config.approximations():
                report = QuantizationReport(0.0, weight_bytes(model), {})
                record, result = self._measure(model, tokenizer, None, report, inert)
                _write_samples(result.samples, self.folder)
                return record
            if isinstance(self.plan.recipe.method, FP):
                return replace(baseline, axes=config.axes(), run_name=self.name, config=config.plain(),
                               fingerprint=self.key, command=self.command, inert=inert)  # fmt: skip
            with stages("calibrate"):
                prompts = shared.prompts()
                states = shared.states(prompts)
            reference = None
            if config.eval.fidelity_states:
                with stages("reference"):
                    held_out = shared.held_out()
                    reference = Reference(*held_out, shared.reference(*held_out))
        recorded = stages.cost["calibrate_s"]
        with stages("quantize"):
            spill = Spill(config.max_state_bytes, self.folder)
            report = quantize(
                model, prompts, self.plan.recipe, None, self.progress, states, self.memory.compact, spill
            )
        stages.cost |= report.seconds
        stages.cost["calibrate_s"] = recorded + report.seconds["calibrate_s"]  # type: ignore[operator]
        stages.cost["fp_forwards"] = forwards.count
        size, exported = self._export(model)
        self.backend = set_backend(model, config.backend)
        record, result = self._measure(model, tokenizer, reference, report, inert)
        _write_samples(result.samples, self.folder)
        notes = {"shared": {"read": shared.hits, "made": shared.made}, "memory": asdict(self.memory)}
        return replace(record, notes=record.notes | notes | exported, cost=record.cost | size)

    def _load(self) -> tuple[Any, Any]:
        folder = checkpoint_folder(self.config.model_path)
        dtype, device = getattr(torch, self.config.dtype()), self.plan.device
        self.memory = plan_memory(self.config.memory, self.plan.parameters, dtype, device)
        log.info("memory: %s", self.memory)
        model = load_model(folder, device, dtype, self.memory.stream)
        return model, load_tokenizer(folder)

    def _baseline(self, shared: FullPrecision) -> RunRecord:
        """Full precision's record: the sweep's, or the cache's, or measured here."""
        file = self.sweep / BASELINE
        if self.config.resume and file.is_file():
            try:
                record = load_record(file)
                if record.fingerprint == self.fp_key:
                    return record
            except ValueError as error:
                log.warning("%s: not readable (%s); full precision is looked up again", file, error)
        found = shared.baseline(self.fp_key, lambda: self._measure_full_precision(shared))
        _write_samples(found.samples, self.sweep)
        write_json_atomic(file, found.record)
        return found.record

    def _measure_full_precision(self, shared: FullPrecision) -> Baseline:
        log.info("full precision: measured once")
        stages, self.stages = self.stages, Stages(self.plan.device)
        model = shared.model
        report = QuantizationReport(0.0, weight_bytes(model), {})
        log_reading(model, "full precision's tasks", None)
        record, result = self._measure(model, shared.tokenizer, None, report, [])
        reference = _reference_config(self.config)
        record = replace(record, run_name="full precision", fingerprint=self.fp_key,
                         config=reference.plain(), seed=reference.seed, axes=reference.axes())  # fmt: skip
        self.stages = stages
        return Baseline(RunRecord(**record.to_json()), to_plain(result.samples))

    def _measure(
        self,
        model: Any,
        tokenizer: Any,
        reference: Reference | None,
        report: QuantizationReport,
        inert: list[str],
    ) -> tuple[RunRecord, EvalResult]:
        config = self.config
        with self.stages("evaluate"):
            result = evaluate(
                model, tokenizer, config.tasks.names, config.answers(), config.eval.limit,
                config.eval.allow_code_execution, self.sweep / ".shared" / "tasks", self.progress,
                config.data_dir,
            )  # fmt: skip
        found = Fidelity({}, {})
        if reference is not None:
            with self.stages("fidelity"):
                found = self._fidelity(model, reference)
        record = RunRecord(
            config=config.plain(),
            run_name=self.name,
            scores=result.scores,
            fidelity=found.values,
            curves=found.curves,
            cost={"calibrate_s": 0.0, "quantize_s": 0.0}  # of full precision
            | self.stages.cost
            | _generation_cost(result)
            | {"quantized_share": report.quantized_share, "weight_bytes": report.weight_bytes},
            inert=inert,
            versions=_versions(),
            git=_git(),
            device=_device(self.plan.device),
            seed=config.seed,
            axes=config.axes(),
            command=self.command,
            status="finished",
            fingerprint=self.key,
            per_problem=result.per_problem,
            calibration=report.states,
            notes={"method": report.notes, "backend": self.backend, "counters": result.counters}
            | {"baseline": self.fp_key, "settings": {k: asdict(v) for k, v in config.answers().items()}}
            | {k: v for k, v in {"published": config.published(), "subtasks": result.subtasks}.items() if v}
            | ({"approximate decoding": config.approximations()} if config.approximations() else {})
            | ({"sandbox": sandbox.level()} if any(map(runs_code, config.tasks.names)) else {}),
            fidelity_per_prompt=found.per_prompt,
        )
        return record, result

    def _fidelity(self, model: Any, reference: Reference) -> Fidelity:
        """Teacher-forced on full precision's states, and free-running from the same prompts."""
        sampler, batch = self.plan.recipe.sampler, self.config.calibration.batch_size
        forced = measure(model, reference.forced, self.progress)
        free = measure_divergence(
            model, reference.trajectories, reference.prompts, sampler, batch, self.progress, HELD_OUT_SEED
        )
        kl, top1 = forced.values["kl"], forced.values["top1"]
        log.info("fidelity: KL %.4f, top-1 %.4f (n=%d states), final agreement %.3f", kl["value"],
                 top1["value"], kl["n"], free.values["final_agreement"]["value"])  # fmt: skip
        return Fidelity(
            forced.values | free.values, forced.curves | free.curves, forced.per_prompt | free.per_prompt
        )


@dataclass(frozen=True)
class Reference:
    """Full precision on the held-out prompts: its runs, and its predictions on their states."""

    prompts: list[Tensor]
    trajectories: list[Trajectory]
    forced: FidelityReference


def _write_samples(samples: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    for task, rows in samples.items():
        lines = "".join(json.dumps(row, default=str) + "\n" for row in rows)
        write_text_atomic(folder / f"samples_{task}.jsonl", lines)


def _reference_config(config: RunConfig) -> RunConfig:
    """What full precision's numbers depend on: everything that only concerns quantization at its default.

    Full precision is decoded exactly: what a run with a cache or a threshold loses to it is the loss of both.
    """
    plain = RunConfig()
    fidelity = {name: getattr(plain.eval, name) for name in ("fidelity_states", "fidelity_prompts")}
    return replace(
        config.full_precision().decoded_exactly(),
        group_size=plain.group_size, act_group_size=plain.act_group_size,
        symmetric=plain.symmetric, act_symmetric=plain.act_symmetric,
        attn_bits=plain.attn_bits, value_granularity=plain.value_granularity, value_scale=plain.value_scale,
        cgq_unmasked=plain.cgq_unmasked, cgq_masked=plain.cgq_masked,
        cgq_unmasked_confidence=plain.cgq_unmasked_confidence,
        iaaq_alpha_min=plain.iaaq_alpha_min, iaaq_alpha_step=plain.iaaq_alpha_step,
        backend=plain.backend, export=plain.export, seed=0,
        calibration=plain.calibration, eval=replace(config.eval, **fidelity),
    )  # fmt: skip


def _difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str:
    """The keys in which two configs differ, "code, machine or data" where none does."""
    keys = []
    for key in old.keys() | new.keys():
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            inner = _difference(a, b, f"{prefix}{key}.")
            keys += [] if inner == "code, machine or data" else inner.split(", ")
        elif a != b:
            keys.append(f"{prefix}{key}")
    return ", ".join(sorted(keys)) or "code, machine or data"


def _generation_cost(result: EvalResult) -> dict[str, float | int | None]:
    """Forwards and generated tokens per second over the tasks that generate."""
    generating = [c for c in result.counters.values() if c.get("generated_tokens")]
    seconds = sum(c["seconds"] for c in generating)
    tokens = sum(c["generated_tokens"] for c in generating)
    requests = sum(c["requests"] for c in generating)
    return {
        "forwards": int(sum(c.get("forwards", 0) for c in result.counters.values())),
        "tokens_per_second": tokens / seconds if seconds else None,
        "truncated_share": sum(c.get("truncated", 0) for c in generating) / requests if requests else None,
        "forwards_per_answer": sum(c.get("answer_forwards", 0) for c in generating) / requests
        if requests
        else None,
        "positions_per_answer": sum(c.get("positions", 0) for c in generating) / requests
        if requests
        else None,
    }


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "lm-eval", "datasets", "hydra-core", "wandb", "numpy")
    return {"dllmq": __version__, "python": platform.python_version()} | {n: version(n) for n in names}


def _git() -> dict[str, Any]:
    here = Path(__file__).parent

    def ask(*words: str) -> str:
        command = ["git", "-C", str(here), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        ask("ls-files", "--error-unmatch", __file__)
        return {
            "commit": ask("rev-parse", "HEAD"),
            "dirty": bool(ask("status", "--porcelain", "--", str(here))),
        }
    except (OSError, subprocess.CalledProcessError):
        return {}


def _device(device: str) -> dict[str, Any]:
    if device.startswith("cuda"):
        return {"type": "cuda", "name": torch.cuda.get_device_name(device)}
    return {"type": "cpu", "name": _processor(), "threads": torch.get_num_threads()}


def _processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    except (OSError, StopIteration):
        model = platform.processor()
    return f"{model} ({platform.machine()})" if model else platform.machine()
