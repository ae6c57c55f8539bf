"""`python -m dllmq.run`: one run, or with -m a sweep. Every switch is explained in conf/config.yaml."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler

from dllmq import interrupt
from dllmq.config import Plan, cell_name, check_cell, check_choices, load, refused, sweep_folder
from dllmq.diffusion import SamplerConfig
from dllmq.estimate import estimate, told
from dllmq.evaluation.settings import EvalSettings
from dllmq.evaluation.task_settings import DEFAULT
from dllmq.faults import check_writable, in_words
from dllmq.methods import FP
from dllmq.report.callback import HYDRAS, complain, finish_sweep, launcher_of
from dllmq.workers import enter, pin_gpu, pin_rank

console = Console()
_given = "the same command"  # as it was typed
_names_folder_twice = False
_team: Any = None  # of torchrun
log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """config -> model -> calibration states -> quantized model -> measurements -> record."""
    hydra_config = HydraConfig.get()
    sweeping = hydra_config.mode == RunMode.MULTIRUN
    folder = Path(hydra_config.runtime.output_dir)
    name = cell_name(hydra_config.job.override_dirname)
    launcher = launcher_of(hydra_config) if sweeping else "basic"
    if _names_folder_twice:
        log.warning("no effect: name, hydra.run.dir or hydra.sweep.dir names the folder")
    if not sweeping and launcher_of(hydra_config) != "basic":
        log.warning("no effect: hydra/launcher, without -m this is a single run")
    if launcher != "basic":
        start_logging(f"[{hydra_config.job.num}] ")
        enter(hydra_config.runtime.cwd)
    if "joblib" in launcher:
        _pin(str(cfg.device))
    plan = check_cell(cfg)
    if plan.config.dry_run:
        console.print(describe(plan, name), markup=False, highlight=False, soft_wrap=True)
        return
    import torch

    from dllmq.cell import Cell
    from dllmq.report.heartbeat import Pulse, cell_log, heartbeat, host
    from dllmq.report.progress import progress_bar

    if plan.config.threads is not None:
        torch.set_num_threads(plan.config.threads)
    with progress_bar(console, name, launcher == "basic") as progress, cell_log(folder):
        log.info("%s, on %s, process %d", name, host(), os.getpid())
        pulse = Pulse(name, progress)
        with heartbeat(folder, pulse):
            if _team is not None:
                _team.overrides = list(hydra_config.overrides.task)
            Cell(plan, folder, folder.parent, name, command(), pulse.tell, _team).run()
    if not sweeping:
        finish_sweep(folder.parent)


def _pin(device: str) -> None:
    """A GPU of its own for each process of joblib, unless `device` names one or none."""
    if device in ("auto", "cuda"):
        import torch

        pin_gpu(torch.cuda.device_count())


def guarded(cfg: DictConfig) -> None:
    """run(), where a failure becomes one sentence and a status.json; a sweep goes on with its next cell."""
    try:
        with interrupt.listening():
            run(cfg)
    except KeyboardInterrupt as stop:
        complain(interrupt.farewell(stop, _given, bool(cfg.get("resume", True))))
        sys.exit(interrupt.exit_code(stop))
    except Exception as error:
        from dllmq.report.results import STATUS, write_json_atomic

        expected = isinstance(error, ValueError)
        first = " ".join(str(error).split()) or "no message"
        sentence = first if expected else f"{type(error).__name__}: {first[:300]}"
        hydra_config = HydraConfig.get()
        folder = Path(hydra_config.runtime.output_dir)
        name = cell_name(hydra_config.job.override_dirname)
        status = {
            "status": "failed",
            "run_name": name,
            "error": sentence,
            "axes": axes(cfg),
            "command": command(),
            "traceback": traceback.format_exc(),
        }
        where = "" if expected else f" (the traceback is in {folder / STATUS})"
        try:
            write_json_atomic(folder / STATUS, status)
        except OSError as unwritten:
            where = f" (and {folder / STATUS} cannot be written: {unwritten})"
        complain(f"{name}: {sentence}{where}")
        if hydra_config.mode != RunMode.MULTIRUN:
            sys.exit(1)


def axes(cfg: DictConfig) -> dict[str, object]:
    """The axes of a run that failed, as far as its config can be read."""
    try:
        return load(cfg).axes()
    except ValueError:
        return {}


def command() -> str:
    """What repeats this run."""
    return shlex.join(["python", "-m", "dllmq.run", *HydraConfig.get().overrides.task])


def describe(plan: Plan, name: str) -> str:
    """A dry run's answer."""
    config, recipe = plan.config, plan.recipe
    size = f"{plan.parameters / 1e6:.2f} M parameters" if plan.parameters else "not on this disk, not checked"
    lines = [
        f"{name}: checked, nothing run",
        f"  model        {config.model_path} ({size}), {plan.device}",
        f"  method       {recipe.method}",
        *([] if isinstance(recipe.method, FP) else describe_quantizing(plan)),
        f"  tasks        {', '.join(config.tasks.names)}, {config.eval.limit or 'all'} problems each",
        *(line for name, answer in config.answers().items() for line in describe_answers(plan, name, answer)),
        *(f"  decoding     approximate, {task}: {how}" for task, how in config.approximations().items()),
        *(f"  no effect    {line}" for line in plan.inert()),
        *(f"  {line}" for line in (told(estimate(plan)) if plan.parameters else ())),
    ]
    return "\n".join(lines)


def describe_quantizing(plan: Plan) -> list[str]:
    """What is quantized how, and what calibrates."""
    config, recipe = plan.config, plan.recipe
    V = recipe.attention.V
    values = f"{V}, scale by {recipe.value_scale_name}" if V else "full precision"
    lines = [
        f"  widths       {config.axes()['bits']}",
        f"  weights      {recipe.weights}",
        f"  inputs       {recipe.inputs or 'full precision'}",
        f"  attention P  {recipe.attention.P or 'full precision'}",
        f"  attention V  {values}",
        f"  attention QK {recipe.attention.QK or 'full precision'}",
        f"  calibration  {recipe.states.name}, {recipe.num_states} sequences from "
        f"{config.calibration.num_prompts} prompts",
        f"  token weight {recipe.token_weight if config.cgq else 'every token alike'}",
    ]
    return lines + (
        [f"  export       {config.export}, into model/ of the run's folder"] if config.export else []
    )


def describe_answers(plan: Plan, name: str, answer: EvalSettings) -> list[str]:
    """How a task is answered where that is not the run's sampler alone, and what was published for it."""
    config = plan.config
    lines = []
    if config.tasks.settings != DEFAULT:
        values = asdict(answer.sampler) | {k: v for k, v in asdict(answer).items() if k != "sampler"}
        plain = asdict(EvalSettings()) | asdict(SamplerConfig())
        always = ("gen_length", "steps", "block_length")
        told = {k: v for k, v in values.items() if k in always or v != plain[k]}
        lines.append(
            f"  {name}: settings {config.tasks.settings}, {', '.join(f'{k}={v}' for k, v in told.items())}"
        )
    for row in config.published().get(name, []):
        differs = f"; {row['differs']}" if row["differs"] else ""
        of = f"{row['metric']}, n={row['n']}, settings {row['preset']}{differs}"
        lines.append(f"  {name}: published {row['score']} ({of})")
    return lines


def arguments(argv: list[str]) -> list[str]:
    """argv with the folder of a run or sweep, so that the same command finds the same folder again.

    A single run is the cell `run` of the folder that is named: beside it lie the baseline and the report.
    A sweep with a launcher names it by its whole path: its workers may start elsewhere. A dry run needs no
    launcher.
    """
    overrides = [a for a in argv if not a.startswith("-") and "=" in a]
    if any(o.lower() == "dry_run=true" for o in overrides):
        argv = [a for a in argv if not a.startswith(("hydra/launcher=", "hydra.launcher."))]
    launched = any(a.startswith("hydra/launcher=") for a in argv)
    sweeping = any(a in ("-m", "--multirun") for a in argv)
    if any(o.startswith("hydra.sweep.dir=" if sweeping else "hydra.run.dir=") for o in overrides):
        if not sweeping:
            return [_of_its_run(a) if a.startswith("hydra.run.dir=") else a for a in argv]
        return [_whole_path(a) if launched and a.startswith("hydra.sweep.dir=") else a for a in argv]
    folder = sweep_folder(overrides)
    key, value = ("hydra.sweep.dir", folder) if sweeping else ("hydra.run.dir", f"{folder}/run")
    added = f"{key}='{value}'"
    return [*argv, _whole_path(added) if launched and sweeping else added]


def _of_its_run(override: str) -> str:
    key, _, value = override.partition("=")
    folder = value.strip("'\"").rstrip("/")
    return override if folder.rpartition("/")[2] == "run" else f"{key}='{folder}/run'"


def _whole_path(override: str) -> str:
    key, _, value = override.partition("=")
    return f"{key}='{os.path.abspath(value.strip(chr(39)))}'"


def folder_of(argv: list[str]) -> Path | None:
    """The run's or sweep's folder, None where only Hydra can tell it.

    Args:
        argv: as `arguments` made them.
    """
    keys = ("hydra.sweep.dir=", "hydra.run.dir=")
    named = [a.partition("=")[2].strip("'") for a in argv if a.startswith(keys)]
    return None if not named or "${" in named[-1] else Path(named[-1])


def check_folder(argv: list[str]) -> None:
    """Ends the program where the run's folder cannot be written.

    Args:
        argv: as `arguments` made them.
    """
    folder = folder_of(argv)
    if folder is None or "dry_run=true" in map(str.lower, argv):
        return
    try:
        check_writable(folder)
    except ValueError as error:
        complain(str(error))
        sys.exit(1)


def start_logging(prefix: str = "") -> None:
    """One line a stage with its time; above the progress bar on a terminal, unwrapped in a pipe or file.

    Args:
        prefix: tells the lines of cells apart that run at once; these have no progress bar.
    """
    handler: logging.Handler = logging.StreamHandler()
    text = f"%(asctime)s {prefix.replace('%', '%%')}%(message)s"
    if console.is_terminal and not prefix:
        highlighter = NullHighlighter()
        handler = RichHandler(
            console=console,
            show_path=False,
            show_level=False,
            markup=False,
            highlighter=highlighter,
            log_time_format="%H:%M:%S",
            omit_repeated_times=False,
        )
        text = "%(message)s"
    logging.basicConfig(level=logging.INFO, format=text, datefmt="%H:%M:%S", handlers=[handler], force=True)
    for noisy in ("httpx", "urllib3", "datasets", "transformers", "matplotlib", "wandb", "hydra_plugins"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # tells in lines what `build` tells in one
    warnings.filterwarnings("ignore", module="hydra")


def main() -> None:
    """Entry point."""
    start_logging()
    try:
        check_choices(sys.argv[1:])
    except ValueError as error:
        complain(str(error))
        sys.exit(1)
    global _given, _names_folder_twice, _team
    _given = shlex.join(["python", "-m", "dllmq.run", *sys.argv[1:]])
    keys = [word.partition("=")[0] for word in sys.argv[1:] if "=" in word]
    own = "hydra.sweep.dir" if {"-m", "--multirun"} & set(sys.argv) else "hydra.run.dir"
    _names_folder_twice = "name" in keys and own in keys
    for key in sorted({key for key in keys if keys.count(key) > 1}):
        log.warning("%s is given %d times; the last one counts", key, keys.count(key))
    if os.environ.get("WORLD_SIZE", "1") != "1":
        _team = join_team(sys.argv[1:])
        if _team.rank > 0:
            try:
                _team.serve()
            except KeyboardInterrupt as stop:  # process 0 says how to continue
                sys.exit(interrupt.exit_code(stop))
            return
    sys.argv = [sys.argv[0], *arguments(sys.argv[1:])]
    try:
        check_folder(sys.argv[1:])
        with hydra_raises() as asked:
            hydra.main(version_base="1.3", config_path="pkg://dllmq.conf", config_name="config")(guarded)()
    except KeyboardInterrupt as stop:  # while a launcher waits for its workers
        complain(interrupt.farewell(stop, _given))
        sys.exit(interrupt.exit_code(stop))
    except Exception as error:  # around the cells: a command line, a preset, a disk, a launcher
        if asked:
            raise
        complain(ended_by(error, sys.argv[1:]))
        sys.exit(1)
    finally:
        if _team is not None:
            _team.end()


@contextmanager
def hydra_raises() -> Iterator[bool]:
    """Makes Hydra raise its errors, which it would print in paragraphs; yields whether a user asks for it."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield before is not None
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


def ended_by(error: Exception, argv: list[str]) -> str:
    """What stopped the command outside of its cells, in one sentence."""
    if sentence := in_words(error, folder_of(argv) or Path("outputs")):
        return sentence
    if isinstance(error, HYDRAS):
        return refused(error, [a for a in argv if not a.startswith("-")])
    who = "the launcher" if any(a.startswith("hydra/launcher=") for a in argv) else "the command"
    return (
        f"{who} stopped ({type(error).__name__}: {last_line(error)}); finished cells are kept and the same "
        "command continues (HYDRA_FULL_ERROR=1 shows where it stopped)"
    )


def join_team(argv: list[str]) -> Any:
    """The processes that torchrun started, this one with a GPU of its own where there are several."""
    if any(a.startswith("hydra/launcher=") for a in argv):
        complain("torchrun and hydra/launcher do not go together: use one of them.")
        sys.exit(1)
    import torch

    from dllmq.team import team_of_torchrun

    try:
        if not any(a.startswith(("device=cpu", "device=cuda:")) for a in argv):
            pin_rank(torch.cuda.device_count())
        team = team_of_torchrun()
    except ValueError as error:
        complain(str(error))
        sys.exit(1)
    start_logging(f"[process {team.rank}] " if team.rank else "")
    return team


def last_line(error: Exception) -> str:
    """The reason in a launcher's error: it may hold a worker's whole traceback, or a paragraph of advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" -")]
    return lines[-1].partition(". ")[0][:300].rstrip(".") if lines else "no message"


if __name__ == "__main__":
    # launchers send functions to processes by the name of their module, and __main__ is another one there
    from dllmq.run import main as start

    start()
