"""Hydra's callback: every run is checked before the first one starts; a sweep's table comes at its end.

Between the two stands sweep.json, the cells that are planned, for dllmq.status.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from dllmq.report.results import write_json_atomic

SWEEP = "sweep.json"
EXTRAS = {"dllmq_joblib": "joblib", "dllmq_slurm": "submitit", "dllmq_local": "submitit", "dllmq_ray": "ray"}
log = logging.getLogger(__name__)


def cells(config: DictConfig) -> list[list[str]]:
    """The overrides of every cell of a sweep, `hydra.sweeper.params` included."""
    params = OmegaConf.to_container(config.hydra.sweeper.get("params") or OmegaConf.create({}))
    assert isinstance(params, dict)
    given = list(config.hydra.overrides.task)
    named = {o.lstrip("+~").partition("=")[0] for o in given}
    extra = [f"{key!s}={value}" for key, value in params.items() if key not in named]
    overrides = OverridesParser.create().parse_overrides(extra + given)
    return [list(cell) for batch in BasicSweeper.split_arguments(overrides, None) for cell in batch]


class SweepCallback(Callback):
    """Args:
    check: called with each run's composed config; its ValueError ends the command before anything ran.
    """

    def __init__(self, check: Callable[[DictConfig], Any]) -> None:
        self.check = check

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        refuse(lambda: self.check(own_keys(config)))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        listed, launcher = cells(config), launcher_of(config.hydra)
        refuse(partial(check_launcher, launcher, config.hydra.launcher._target_))
        planned = []
        for number, overrides in enumerate(listed, 1):
            where = f"cell {number} of {len(listed)} ({' '.join(overrides)}): "
            cell = partial(compose, config.hydra.job.config_name, overrides, return_hydra_config=True)
            planned.append(refuse(partial(self._checked, cell), where))
        if config.get("dry_run"):
            return
        refuse(partial(write_plan, config.hydra, launcher, planned))
        if launcher != "basic":
            os.environ["HYDRA_FULL_ERROR"] = "1"  # run.main tells a launcher's failure in one sentence
            folder = config.hydra.sweep.dir
            log.info(
                "cells: %d, by %s; python -m dllmq.status %s", len(planned), launcher, shlex.quote(folder)
            )

    def _checked(self, cell: Callable[[], DictConfig]) -> dict[str, Any]:
        """A cell as sweep.json has it, after its check."""
        config = cell()
        self.check(own_keys(config))
        return {"name": config.hydra.sweep.subdir, "overrides": list(config.hydra.overrides.task)}

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if not config.get("dry_run"):
            finish_sweep(Path(config.hydra.sweep.dir))


def own_keys(config: DictConfig) -> DictConfig:
    """The config without Hydra's."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def refuse(action: Callable[[], Any], where: str = "") -> Any:
    """action(), whose error ends the program with one sentence."""
    try:
        return action()
    except Exception as error:
        complain(where + sentence(error))
        sys.exit(1)  # not an Exception: Hydra turns those of callbacks into warnings


def launcher_of(hydra: Any) -> str:
    """basic, or the option of hydra/launcher."""
    chosen = hydra.runtime.choices.get("hydra/launcher")
    return str(chosen or "basic")


def check_launcher(name: str, target: str) -> None:
    """Whether the plugin of a launcher is installed.

    Raises:
        ValueError: with the extra that brings it.
    """
    package = ".".join(target.split(".")[:2])
    try:
        found = importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # not even hydra_plugins
        found = False
    if not found:
        brings = f"dllmq[{EXTRAS[name]}]" if name in EXTRAS else package
        raise ValueError(
            f"hydra/launcher={name} needs a package that is not installed here: pip install '{brings}', or "
            "leave hydra/launcher out to run the cells one after the other."
        )


def write_plan(hydra: Any, launcher: str, planned: list[dict[str, Any]]) -> None:
    """sweep.json: the planned cells and the command that continues them."""
    launch = [o for o in hydra.overrides.hydra if o.startswith(("hydra/launcher=", "hydra.launcher."))]
    words = ["python", "-m", "dllmq.run", "-m", *launch, *hydra.overrides.task]
    plan = {"command": shlex.join(words), "launcher": launcher, "cells": planned}
    write_json_atomic(Path(hydra.sweep.dir) / SWEEP, plan)


def sentence(error: Exception) -> str:
    """An error in one line; of Hydra's, without the search path it ends with."""
    text = " ".join(str(error).partition("Config search path:")[0].split())
    if unknown := re.match(r"Could not override '([^']+)'", text):
        return (
            f"there is no key {unknown[1]} here; conf/config.yaml and the files of its groups have the keys, "
            f"and one that a preset leaves out is given as +{unknown[1]}=<value>."
        )
    return text or type(error).__name__


def complain(text: str) -> None:
    """One line to stderr; control characters, which could come from a file, are shown and not obeyed."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    Console(stderr=True).print(plain, style="red", markup=False, highlight=False, soft_wrap=True)


def finish_sweep(folder: Path) -> None:
    """Writes summary.json, table.md and report.html, prints the table; exits with 1 where a cell failed."""
    from dllmq.report.build import write_report  # matplotlib: only where there is something to draw
    from dllmq.report.table import print_tables
    from dllmq.report.tables import sweep_tables

    console = Console()
    try:
        sweep = write_report(folder)
    except (ValueError, OSError) as error:  # the second: a full disk
        complain(str(error))
        sys.exit(1)
    print_tables(sweep_tables(sweep), console)
    console.print(
        f"records, table.md and report.html are in {folder}", markup=False, highlight=False, soft_wrap=True
    )
    if sweep.failed:
        sys.exit(1)
