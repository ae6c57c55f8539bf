"""One cell of a sweep: full precision's share of the work (once for all), quantize, measure, record.

A sweep folder holds <cell>/results.json and baseline.json (full precision's record; its answers beside it).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from dllmq import interrupt
from dllmq.cache import Cache
from dllmq.calibration.hidden import Spill
from dllmq.calibration.states import Trajectory
from dllmq.checkpoint import save_quantized
from dllmq.config import Plan, RunConfig, build, fingerprint_of, fingerprint_parts, reference_config
from dllmq.durable import clean, sync_folder
from dllmq.evaluation import sandbox
from dllmq.evaluation.answers import AnswerFolder
from dllmq.evaluation.divergence import measure_divergence
from dllmq.evaluation.fidelity import Fidelity, FidelityReference, measure
from dllmq.evaluation.tasks import EvalResult, evaluate, runs_code
from dllmq.faults import in_words
from dllmq.full_precision import HELD_OUT_SEED, Baseline, ForwardCounter, FullPrecision
from dllmq.kept import MODEL, Kept
from dllmq.locks import locked
from dllmq.machine import Stages, describe_device, git_state, versions
from dllmq.methods import FP
from dllmq.models.loading import checkpoint_folder, load_model
from dllmq.models.memory import plan_memory
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
from dllmq.report.tracker import TrackedRun, changed_samples, without_secrets
from dllmq.resume import FOLDER, Resume
from dllmq.team import Job, Team, own_arithmetic

log = logging.getLogger(__name__)
Progress = Callable[[int, int, str], None]


class Cell:
    """A checked plan, ready to run in its folder."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        sweep: Path,
        name: str,
        command: str,
        progress: Progress,
        team: Team | None = None,
    ) -> None:
        self.plan, self.config, self.team = plan, plan.config, team or Team()
        self.folder, self.sweep, self.name, self.command = folder, sweep, name, command
        self.progress = progress
        self.stages, self.backend = Stages(plan.device), ""
        self.parts = fingerprint_parts(self.config, plan.device)
        self.key = fingerprint_of(self.parts)
        self.fp_parts = fingerprint_parts(reference_config(self.config), plan.device)
        self.fp_key = fingerprint_of(self.fp_parts)
        self.machine = describe_device(plan.device)
        asked = None if isinstance(plan.recipe.method, FP) else self.config.export
        self.kept = Kept(folder, name, self.key, self.parts, asked)
        self.resume = Resume(folder / FOLDER, self.parts | {"machine": self.machine})

    def run(self) -> RunRecord:
        """Quantizes and measures, unless the folder has this fingerprint's results already.

        One process at a time: another one that is given the same cell waits, and takes its results.

        Raises:
            ValueError: what a user can mend, a full disk and too little memory included.
            Interrupted: after a signal, when the unit at hand is finished and kept.
        """
        interrupt.check()
        for folder in (self.sweep, self.folder):
            clean(folder)
        try:
            with locked(self.folder / ".lock", f"{self.name}: another process runs it; waiting") as problem:
                record = self.kept.finished() if self.config.resume else None
                if record is None:
                    return self._run(problem)
                with suppress(OSError):
                    self.resume.end()
                self._mend_baseline()
                return record
        except (OSError, MemoryError, RuntimeError, SafetensorError) as error:
            sentence = in_words(error, self.sweep, self.stages.current)
            if sentence is None:
                raise
            raise ValueError(sentence) from error

    def _run(self, no_lock: Exception | None) -> RunRecord:
        """Args: no_lock: why there is none, if so."""
        self.kept.clean()
        self.resume.begin(self.config.resume)
        if no_lock is not None:
            log.warning("%s: not locked (%s); do not start it twice at a time", self.folder, no_lock)
        tracker = build("tracker", self.config.tracker)
        config = self.config
        run = TrackedRun(self.name, self.folder, config.plain(), config.axes(), self.sweep.name)
        _copied(tracker.start, run)
        try:
            record = self._compute()
            write_json_atomic(self.folder / RESULTS, record)
            sync_folder(self.sweep)  # the cell's own entry
        except BaseException as error:
            if isinstance(error, Exception):
                self.kept.set_aside(RESULTS)
            _copied(tracker.finish)
            raise
        (self.folder / STATUS).unlink(missing_ok=True)
        self.resume.end()
        _copied(tracker.log_curves, record.curves)
        _copied(tracker.log_samples, changed_samples(record, self.folder / RESULTS, self.sweep))
        _copied(tracker.finish, record, self.folder / RESULTS)
        return record

    def _export(self, model: Any) -> tuple[dict[str, int], dict[str, Any]]:
        """Writes the quantized model beside the results; what it costs, and a note."""
        config = self.config
        if config.export is None:
            return {}, {}
        made = {
            "config": redact(config.plain()),
            "command": self.command,
            "versions": versions(),
            "git": git_state(),
            "fingerprint": self.key,
        }
        source = checkpoint_folder(config.model_path)
        with self.stages("export"):
            size = save_quantized(model, self.folder / MODEL, config.export, source, made)
        return {"exported_bytes": size}, {"export": {"format": config.export, "folder": MODEL}}

    def _compute(self) -> RunRecord:
        config, stages, forwards = self.config, self.stages, ForwardCounter()
        inert = self.plan.inert()
        for line in inert:
            log.warning("no effect: %s", line)
        with stages("load"):
            model, tokenizer = self._load()
        shared = self._shared(model, tokenizer)
        with forwards.watching(model):
            baseline = self._baseline(shared)
            if isinstance(self.plan.recipe.method, FP) and config.approximations():
                report = QuantizationReport(0.0, weight_bytes(model), {})
                answers = self.resume.answers()
                record, result = self._measure(model, tokenizer, None, report, inert, answers, config)
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
            spill, blocks = Spill(config.max_state_bytes, self.folder), self.resume.blocks()
            report = quantize(
                model, prompts, self.plan.recipe, None, self.progress, states, self.memory.compact, spill,
                store=blocks,
            )  # fmt: skip
        stages.cost |= report.seconds
        stages.cost["quantize_s"] += blocks.seconds  # type: ignore[operator]
        stages.cost["calibrate_s"] = recorded + report.seconds["calibrate_s"]  # type: ignore[operator]
        stages.cost["fp_forwards"] = forwards.count
        size, exported = self._export(model)
        self.backend = set_backend(model, config.backend)
        answers = self.resume.answers()
        record, result = self._measure(model, tokenizer, reference, report, inert, answers, config)
        _write_samples(result.samples, self.folder)
        notes: dict[str, Any] = {"shared": {"read": shared.hits, "made": shared.made}}
        notes |= {"memory": asdict(self.memory), "restored": {"blocks": blocks.restored} | result.restored}
        return replace(record, notes=record.notes | notes | exported, cost=record.cost | size)

    def _load(self) -> tuple[Any, Any]:
        folder = checkpoint_folder(self.config.model_path)
        dtype, device = getattr(torch, self.config.dtype()), self.plan.device
        self.memory = plan_memory(self.config.memory, self.plan.parameters, dtype, device)
        log.info("memory: %s", self.memory)
        tokenizer = load_tokenizer(
            folder
        )  # before the weights: what is wrong with it takes no minutes to say
        return load_model(folder, device, dtype, self.memory.stream), tokenizer

    def _shared(self, model: Any, tokenizer: Any) -> FullPrecision:
        """What cells share of full precision's work."""
        given = self.config.cache_dir
        folder = Path(given).expanduser() if given else self.sweep / ".shared"
        return FullPrecision(self.plan, Cache(folder), model, tokenizer, self.progress)

    def _mend_baseline(self) -> None:
        """A finished cell's reference is there as well, from the cache as a rule."""
        if self._kept_baseline() is None:
            self._baseline(self._shared(*self._load()))

    def _kept_baseline(self) -> RunRecord | None:
        """The sweep's record of full precision; None where there is none, or one that cannot be read."""
        file = self.sweep / BASELINE
        try:
            return load_record(file) if file.is_file() else None
        except ValueError as error:
            log.warning("%s: not readable (%s); full precision is looked up again", file, error)
            return None

    def _baseline(self, shared: FullPrecision) -> RunRecord:
        """Full precision's record: the sweep's, or the cache's, or measured here."""
        file = self.sweep / BASELINE
        if self.config.resume and (record := self._kept_baseline()) and record.fingerprint == self.fp_key:
            return record

        def measure_now(unfinished: Path) -> Baseline:
            return self._measure_full_precision(shared, AnswerFolder(unfinished, self._fp_answers()))

        found = shared.baseline(self.fp_key, measure_now)
        _write_samples(found.samples, self.sweep)
        write_json_atomic(file, found.record)
        return found.record

    def _fp_answers(self) -> str:
        """Answers that are continued are of the same machine, as a cell's blocks are."""
        return fingerprint_of({"baseline": self.fp_key, "machine": self.machine})

    def _measure_full_precision(self, shared: FullPrecision, answers: AnswerFolder) -> Baseline:
        log.info("full precision: measured once")
        stages, self.stages = self.stages, Stages(self.plan.device)
        model = shared.model
        report = QuantizationReport(0.0, weight_bytes(model), {})
        log_reading(model, "full precision's tasks", None)
        reference = reference_config(self.config)
        record, result = self._measure(model, shared.tokenizer, None, report, [], answers, reference)
        record = replace(record, run_name="full precision", fingerprint=self.fp_key,
                         config=reference.plain(), seed=reference.seed, axes=reference.axes(),
                         notes=record.notes | {"identity": _identity(self.fp_parts)})  # fmt: skip
        self.stages = stages
        return Baseline(RunRecord(**record.to_json()), to_plain(result.samples))

    def _measure(
        self,
        model: Any,
        tokenizer: Any,
        reference: Reference | None,
        report: QuantizationReport,
        inert: list[str],
        answers: AnswerFolder,
        config: RunConfig,
    ) -> tuple[RunRecord, EvalResult]:
        """Scores a model; `config` says how its answers are decoded: the cell's own, or the reference's."""
        exact = config.sampler_config().exact
        job = partial(self._job, answers, quantized=report.quantized_share > 0, exact=exact)
        with self.stages("evaluate"), self.team.sharing(answers, job) as shared:
            result = evaluate(
                model, tokenizer, config.tasks.names, config.answers(), config.eval.limit,
                config.eval.allow_code_execution, self._work_dir, self.progress, config.data_dir, shared,
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
            versions=versions(),
            git=git_state(),
            device=self.machine,
            seed=config.seed,
            axes=config.axes(),
            command=self.command,
            status="finished",
            fingerprint=self.key,
            per_problem=result.per_problem,
            calibration=report.states,
            notes={"method": report.notes, "backend": self.backend, "counters": result.counters}
            | {"identity": _identity(self.parts)}
            | {"baseline": self.fp_key, "settings": {k: asdict(v) for k, v in config.answers().items()}}
            | {k: v for k, v in {"published": config.published(), "subtasks": result.subtasks}.items() if v}
            | ({"approximate decoding": config.approximations()} if config.approximations() else {})
            | _other_noise(result)
            | ({"helpers": self.team.batches} if self.team.batches else {})  # batches they answered, by rank
            | ({"sandbox": sandbox.level()} if any(map(runs_code, config.tasks.names)) else {}),
            fidelity_per_prompt=found.per_prompt,
        )
        return record, result

    @property
    def _work_dir(self) -> Path:
        """Of the generated problems."""
        return self.sweep / ".shared" / "tasks"

    def _job(self, answers: AnswerFolder, quantized: bool, exact: bool) -> Job:
        """An evaluation as the other processes of the team need it."""
        blocks = self.resume.blocks()
        return Job(
            overrides=list(self.team.overrides),
            quantized=quantized,
            exact=exact,
            blocks=str(blocks.cache.folder.resolve()),
            blocks_key=blocks.key,
            answers=str(answers.folder.resolve()) if answers.folder else "",
            answers_key=answers.key,
            work_dir=str(self._work_dir.resolve()),
            backend=self.backend or "auto",
            stream=self.memory.stream,
            compact=self.memory.compact,
            threads=torch.get_num_threads(),
            like=own_arithmetic(self.plan),
        )

    def _fidelity(self, model: Any, reference: Reference) -> Fidelity:
        """Teacher-forced on full precision's states, and free-running from the same prompts."""
        sampler, batch = self.plan.recipe.sampler, self.config.calibration.batch_size
        forced = measure(model, reference.forced, self.progress)
        free = measure_divergence(
            model, reference.trajectories, reference.prompts, sampler, batch, self.progress, HELD_OUT_SEED,
            self.resume.own_runs(sampler.steps),
        )  # fmt: skip
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


def _identity(parts: dict[str, Any]) -> dict[str, Any]:
    """What a fingerprint is of beside the config, which a record has anyway."""
    return {key: value for key, value in parts.items() if key != "config"}


def _copied(action: Callable[..., object], *arguments: Any) -> None:
    """Tells a tracker, which has a copy of what is on disk: whatever it raises is one warning."""
    try:
        action(*arguments)
    except Exception as error:
        text = without_secrets(" ".join(str(error).split()))[:300]
        log.warning("the tracker's copy is not whole (%s: %s); the run goes on", type(error).__name__, text)


def _write_samples(samples: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    for task, rows in samples.items():
        lines = "".join(json.dumps(row, default=str) + "\n" for row in rows)
        write_text_atomic(folder / f"samples_{task}.jsonl", lines)


def _other_noise(result: EvalResult) -> dict[str, dict[str, str]]:
    """A note where memory ran out and noise is drawn batch by batch: with more of it answers are others."""
    halved = {task: c for task, c in result.counters.items() if c.get("halved_from")}
    sizes = {task: f"{c['halved_from']} -> {c['batch_size']}" for task, c in halved.items()}
    return {"sampled in halved batches": sizes} if sizes else {}


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
