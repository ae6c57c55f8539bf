"""A copy of a run in W&B, behind a null object. The only file that imports wandb.

Records are written to disk first; whatever goes wrong here is one warning and the run goes on. The mode is
decided before wandb is asked, so it never prompts:

    mode=auto      WANDB_MODE if set, else online when a key is present (WANDB_API_KEY, an identity token,
                   or netrc), else offline
    online         falls back to offline when there is no key or the server cannot be reached

Each run's files, artifacts waiting for `wandb sync` included, lie in <run folder>/wandb.

What is logged: the resolved configuration; group = sweep, tags = method, width and the switches that are
on; curves as history against their own x (`denoise/step`, or `mask_ratio/block`); scores as
`eval/<task>/<metric>`, fidelity and cost in the summary; the results file as an artifact.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dllmq.report.compare import is_by_mask_ratio
from dllmq.report.results import RunRecord, redact, to_plain

logger = logging.getLogger(__name__)
_NOWHERE = logging.NullHandler()
MODES = ("auto", "online", "offline", "disabled")


@dataclass(frozen=True)
class TrackedRun:
    """What is known of a run before it starts."""

    name: str
    folder: Path
    config: dict[str, Any]
    axes: dict[str, Any]
    group: str
    job_type: str = "quantize"

    def tags(self) -> list[str]:
        """Method, width and the switches that are on: ["awq", "w3a4", "tmas"]."""
        words = [str(self.axes[k]) for k in ("method", "bits") if self.axes.get(k) is not None]
        return words + [name for name, value in self.axes.items() if value is True]


class Tracker(Protocol):
    def start(self, run: TrackedRun) -> None:
        """Called before the work begins."""

    def log_curves(self, curves: Mapping[str, Mapping[str, list]]) -> None:
        """Called with `RunRecord.curves`, {name: {step: [...], value: [...]}}."""

    def finish(self, record: RunRecord | None = None, results: Path | None = None) -> None:
        """Called once at the end; without a record the run is marked as failed."""


class NullTracker:
    """tracker=none."""

    def start(self, run: TrackedRun) -> None:
        pass

    def log_curves(self, curves: Mapping[str, Mapping[str, list]]) -> None:
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
            job_type=run.job_type,
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
            logger.warning("W&B %s (%s: %s)", what, type(error).__name__, _without_secrets(text)[:300])


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


def _without_secrets(text: str) -> str:
    for name, value in os.environ.items():
        if len(value) >= 8 and any(word in name.upper() for word in ("KEY", "TOKEN", "SECRET", "PASSWORD")):
            text = text.replace(value, "***")
    return text


# ---------------------------------------------------------------- what is logged


def curve_key(name: str) -> tuple[str, str]:
    """(W&B metric, its x metric) of a curve: ("denoise/kl_by_step", "denoise/step")."""
    if is_by_mask_ratio(name):
        return f"mask_ratio/{name}", "mask_ratio/block"
    return f"denoise/{name}", "denoise/step"


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


def summary(record: RunRecord) -> dict[str, Any]:
    """Flat summary values, nulls left out: eval/<task>/<metric>, fidelity/<name>, cost/<name>."""
    flat: dict[str, Any] = {}
    for task, metrics in record.scores.items():
        for metric, estimate in metrics.items():
            flat |= _estimate(f"eval/{task}/{metric}", estimate)
    for name, estimate in record.fidelity.items():
        flat |= _estimate(f"fidelity/{name}", estimate)
    flat |= {f"cost/{name}": value for name, value in record.cost.items()}
    flat |= {"seed": record.seed, "status": record.status, "fingerprint": record.fingerprint}
    flat["inert"] = ", ".join(map(str, record.inert)) or None
    return {key: value for key, value in to_plain(flat).items() if value is not None}


def _estimate(key: str, estimate: Mapping[str, Any]) -> dict[str, Any]:
    return {key: estimate["value"], f"{key}_stderr": estimate["stderr"], f"{key}_n": estimate["n"]}
