"""A copy of a run in W&B, behind a null object. The only file that imports wandb.

Records are written to disk first; whatever goes wrong here is one warning and the run goes on. The mode is
decided before wandb is asked, so it never prompts:

    mode=auto      WANDB_MODE if set, else online when a key is present (WANDB_API_KEY, an identity token,
                   or netrc), else offline
    online         falls back to offline when there is no key or the server cannot be reached

Each run's files, artifacts waiting for `wandb sync` included, lie in <run folder>/wandb.

What is logged: the resolved configuration; group = sweep, tags = method, width and the switches that are
on; curves as history against their own x (see `curve_key`); `eval/<task>/<metric>`, `fidelity/<name>` and
`cost/<name>` in the summary; changed samples as the table `samples/changed`; the results file as an
artifact.

W&B sorts, filters and sweeps by names of letters, digits and underscores, so a task or metric is renamed to
those: lm-eval's "exact_match,strict-match" becomes "exact_match_strict_match" (see `metric_name`).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dllmq.report.results import BASELINE, RunRecord, Sweep, load_record, redact, to_plain
from dllmq.report.samples import changed_answers

logger = logging.getLogger(__name__)
_NOWHERE = logging.NullHandler()
MODES = ("auto", "online", "offline", "disabled")
JOB_TYPES = ("quantize", "full precision", "evaluate")
SAMPLES = "samples/changed"
SAMPLE_COLUMNS = (
    "task", "problem", "prompt", "target", "full_precision", "quantized", "correct_before", "correct_after",
)  # fmt: skip
MAX_SAMPLES = 50  # rows of the table
# end of a curve's name -> (prefix of its W&B metric, its x metric)
_X = {
    "_by_step": ("denoise", "denoise/step"),
    "_by_mask_ratio": ("mask_ratio", "mask_ratio/block"),
    "_by_block": ("transformer", "transformer/block"),
}


@dataclass(frozen=True)
class TrackedRun:
    """What is known of a run before it starts."""

    name: str
    folder: Path
    config: dict[str, Any]
    axes: dict[str, Any]
    group: str
    job_type: str | None = None  # one of JOB_TYPES; None: full precision for method fp, else quantize

    def kind(self) -> str:
        """The job type."""
        kind = self.job_type or ("full precision" if self.axes.get("method") == "fp" else "quantize")
        if kind not in JOB_TYPES:
            raise ValueError(f"job_type={kind!r}: choose one of {', '.join(JOB_TYPES)}.")
        return kind

    def tags(self) -> list[str]:
        """Method, width and the switches that are on: ["awq", "w3a4", "tmas"]."""
        words = [str(self.axes[k]) for k in ("method", "bits") if self.axes.get(k) is not None]
        return words + [name for name, value in self.axes.items() if value is True]


class Tracker(Protocol):
    def start(self, run: TrackedRun) -> None:
        """Called before the work begins."""

    def log_curves(self, curves: Mapping[str, Mapping[str, list]]) -> None:
        """Called with `RunRecord.curves`, {name: {step: [...], value: [...]}}."""

    def log_samples(self, rows: list[dict[str, Any]]) -> None:
        """Called with `changed_samples`, dictionaries with the keys SAMPLE_COLUMNS."""

    def finish(self, record: RunRecord | None = None, results: Path | None = None) -> None:
        """Called once at the end; without a record the run is marked as failed."""


class NullTracker:
    """tracker=none."""

    def start(self, run: TrackedRun) -> None:
        pass

    def log_curves(self, curves: Mapping[str, Mapping[str, list]]) -> None:
        pass

    def log_samples(self, rows: list[dict[str, Any]]) -> None:
        pass

    def finish(self, record: RunRecord | None = None, results: Path | None = None) -> None:
        pass


@dataclass
class WandbTracker:
    """tracker=wandb. The timeouts, in seconds, bound how long an unreachable server holds up a run."""

    project: str = "dllmq"
    entity: str | None = None
    mode: str = "auto"  # one of MODES
    tags: tuple[str, ...] = ()
    init_timeout: float | int = 30.0
    finish_timeout: float | int = 120.0  # what is not uploaded by then stays on disk for `wandb sync`
    _run: Any = field(default=None, init=False, repr=False)
    _folder: Path | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"tracker.mode={self.mode!r}: choose one of {', '.join(MODES)}.")

    def start(self, run: TrackedRun) -> None:
        self._run, self._folder = None, Path(run.folder)
        with _quiet_environment(self._folder):
            mode = resolve_mode(self.mode)
        if mode == "online":
            self._guard("cannot start online, recording offline", lambda: self._init(run, "online"))
            mode = "offline" if self._run is None else "online"
        if mode == "offline" and self._run is None:
            self._guard("is off for this run", lambda: self._init(run, "offline"))

    def log_curves(self, curves: Mapping[str, Mapping[str, list]]) -> None:
        if self._run is not None:
            self._guard("could not log the curves", lambda: _log_curves(self._run, curves))

    def log_samples(self, rows: list[dict[str, Any]]) -> None:
        if self._run is not None:
            self._guard("could not log the samples", lambda: _log_samples(self._run, rows))

    def finish(self, record: RunRecord | None = None, results: Path | None = None) -> None:
        if self._run is None:
            return
        if record is not None:
            self._guard("could not log the summary", lambda: self._run.summary.update(summary(record)))
        if results is not None:
            self._guard("could not log the results file", lambda: self._log_artifact(results))
        self._guard("could not finish", lambda: _close(self._run, 0 if record is not None else 1))
        self._run = None

    def _init(self, run: TrackedRun, mode: str) -> None:
        import wandb

        run.folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            silent=True,
            quiet=True,
            console="off",
            init_timeout=self.init_timeout,
            finish_timeout=self.finish_timeout,
            finish_timeout_raises=True,
            disable_git=True,  # the record has the commit
            save_code=False,
            x_disable_stats=mode == "offline",
        )
        self._run = wandb.init(
            project=self.project,
            entity=self.entity,
            name=run.name,
            group=run.group,
            job_type=run.kind(),
            tags=list(dict.fromkeys([*run.tags(), *self.tags])),
            config=to_plain(redact({**run.config, "axes": run.axes})),
            dir=str(run.folder),
            mode=mode,  # type: ignore[arg-type]
            reinit="finish_previous",
            settings=settings,
        )

    def _log_artifact(self, results: Path) -> None:
        import wandb

        artifact = wandb.Artifact(f"results-{self._run.id}", type="results")
        artifact.add_file(str(results), name=Path(results).name)
        self._run.log_artifact(artifact)

    def _guard(self, what: str, action: Callable[[], object]) -> None:
        """Run a call into wandb; an exception becomes one warning line without any key in it."""
        assert self._folder is not None
        try:
            with _quiet_environment(self._folder):
                action()
        except Exception as error:  # every failure of a copy is survivable
            text = " ".join(str(error).split()) or "no message"
            logger.warning("W&B %s (%s: %s)", what, type(error).__name__, without_secrets(text)[:300])


# ---------------------------------------------------------------- mode and environment


def resolve_mode(mode: str) -> str:
    """The mode wandb is started in; decided here because wandb itself would prompt or exit without a key."""
    asked = os.environ.get("WANDB_MODE", "auto") if mode == "auto" else mode
    asked = {"dryrun": "offline", "run": "online"}.get(asked, asked)
    if asked in ("offline", "disabled"):
        return asked
    if has_key():
        return "online"
    if asked == "online":
        logger.warning(
            "W&B: no API key found, recording offline; `wandb login` and `wandb sync` can send it later."
        )
    return "offline"


def has_key() -> bool:
    """Whether wandb would find credentials without asking; the key itself is not kept."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        import wandb
        from wandb.sdk.lib import wbauth

        return wbauth.read_netrc_auth(host=wandb.setup().settings.base_url) is not None
    except Exception:  # a private module of wandb that may move, or a damaged netrc: offline is safe
        return False


@contextmanager
def _quiet_environment(folder: Path) -> Iterator[None]:
    """Silent, and everything wandb stages goes to <folder>/wandb; the user's own settings win."""
    inside = folder / "wandb"
    values = {
        "WANDB_SILENT": "true",
        "WANDB_DATA_DIR": str(inside / "data"),
        "WANDB_CACHE_DIR": str(inside / "cache"),
        "WANDB_ERROR_REPORTING": "false",
    }
    ours = [name for name in values if name not in os.environ]
    os.environ.update({name: values[name] for name in ours})
    log = logging.getLogger("wandb")  # its tracebacks would reach the run's own log
    propagate, log.propagate = log.propagate, False
    log.addHandler(_NOWHERE)
    try:
        yield
    finally:
        log.propagate = propagate
        log.removeHandler(_NOWHERE)
        for name in ours:
            os.environ.pop(name, None)


def without_secrets(text: str) -> str:
    """`text` with the values of variables such as WANDB_API_KEY hidden."""
    for name, value in os.environ.items():
        if len(value) >= 8 and any(word in name.upper() for word in ("KEY", "TOKEN", "SECRET", "PASSWORD")):
            text = text.replace(value, "***")
    return text


# ---------------------------------------------------------------- what is logged


def curve_key(name: str) -> tuple[str, str]:
    """(W&B metric, its x metric) of a curve: ("denoise/kl_by_step", "denoise/step").

    The end of the name decides: a denoising step, a block of the mask ratio (0 = most masked), or a block of
    the transformer (0 = first). Curves of another name are over denoising steps.
    """
    prefix, x = next((found for end, found in _X.items() if name.endswith(end)), _X["_by_step"])
    return f"{prefix}/{name}", x


def metric_name(text: str) -> str:
    """A task or metric in W&B's alphabet: "exact_match,strict-match" -> "exact_match_strict_match".

    lm-eval's filter ",none" is left out, "@" is spelled ("pass@1" -> "pass_at_1"), and anything else that is
    no letter, digit or underscore becomes an underscore (W&B's documentation: metric naming constraints).
    """
    spelled = text.removesuffix(",none").replace("@", "_at_")
    return re.sub(r"\W+", "_", spelled, flags=re.ASCII).strip("_")


def score_key(task: str, metric: str) -> str:
    """The W&B metric of a score: "eval/mini_gsm/exact_match_strict_match"."""
    return f"eval/{metric_name(task)}/{metric_name(metric)}"


def _close(run: Any, exit_code: int) -> None:
    """Finish, and wait until the run's file is complete: finish() alone returns before its last write."""
    import wandb

    run.finish(exit_code=exit_code)
    if wandb.run is None:  # nobody else's run is open in this process
        wandb.teardown()


def _log_curves(run: Any, curves: Mapping[str, Mapping[str, list]]) -> None:
    rows: dict[tuple[str, float], dict[str, float]] = {}
    for name, points in curves.items():
        key, x = curve_key(name)
        run.define_metric(x, hidden=True)
        run.define_metric(key, step_metric=x, summary="none")
        for step, value in zip(to_plain(points["step"]), to_plain(points["value"]), strict=True):
            if step is not None and value is not None:
                rows.setdefault((x, step), {x: step})[key] = value
    for _, row in sorted(rows.items()):  # one history row per x, all its curves together
        run.log(row)


def changed_samples(record: RunRecord, results: Path, sweep: Path) -> list[dict[str, Any]]:
    """Rows for `log_samples`: problems whose score differs from full precision's, lost ones first.

    Args:
        record: the run's.
        results: where it lies, with the run's samples beside it.
        sweep: the sweep's folder, with full precision's record and samples.

    Returns:
        At most MAX_SAMPLES rows, the tasks by turns; none where one side left no samples, or cannot be read.
    """
    if not (sweep / BASELINE).is_file():
        return []
    place = results.relative_to(sweep).as_posix()
    try:
        pair = Sweep(sweep.name, (record,), load_record(sweep / BASELINE), failed=(), paths=(place,))
        found = changed_answers(pair, sweep, MAX_SAMPLES, MAX_SAMPLES)
    except ValueError as error:
        logger.warning("no changed samples for W&B: %s", error)
        return []
    return [
        {
            "task": change.task,
            "problem": change.problem,
            "prompt": change.prompt,
            "target": change.target,
            "full_precision": change.before.response,
            "quantized": change.after.response,
            "correct_before": change.before.value == 1,
            "correct_after": change.after.value == 1,
        }
        for run in found
        for change in run.shown
    ]


def _log_samples(run: Any, rows: list[dict[str, Any]]) -> None:
    import wandb

    kinds = [bool if name.startswith("correct") else str for name in SAMPLE_COLUMNS]  # W&B: one a column
    columns = list(zip(SAMPLE_COLUMNS, kinds, strict=True))
    data = [[kind(row[name]) for name, kind in columns] for row in rows[:MAX_SAMPLES]]
    run.log({SAMPLES: wandb.Table(columns=list(SAMPLE_COLUMNS), data=data)})


def summary(record: RunRecord) -> dict[str, Any]:
    """Flat summary values, nulls left out: eval/<task>/<metric>, fidelity/<name>, cost/<name>."""
    flat: dict[str, Any] = {}
    for task, metrics in record.scores.items():
        for metric, estimate in metrics.items():
            flat |= _estimate(score_key(task, metric), estimate)
    for name, estimate in record.fidelity.items():
        flat |= _estimate(f"fidelity/{name}", estimate)
    flat |= {f"cost/{name}": value for name, value in record.cost.items()}
    flat |= {"seed": record.seed, "status": record.status, "fingerprint": record.fingerprint}
    flat["inert"] = ", ".join(map(str, record.inert)) or None
    return {key: value for key, value in to_plain(flat).items() if value is not None}


def _estimate(key: str, estimate: Mapping[str, Any]) -> dict[str, Any]:
    return {key: estimate["value"], f"{key}_stderr": estimate["stderr"], f"{key}_n": estimate["n"]}
