"""Hydra's callback: every run is checked before the first one starts; a sweep's table comes at its end."""

from __future__ import annotations

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
        own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        self._check(lambda: own, "")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        listed, name = cells(config), config.hydra.job.config_name
        for number, overrides in enumerate(listed, 1):
            where = f"cell {number} of {len(listed)} ({' '.join(overrides)}): "
            self._check(partial(compose, config_name=name, overrides=overrides), where)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if not config.get("dry_run"):
            finish_sweep(Path(config.hydra.sweep.dir))

    def _check(self, config: Callable[[], DictConfig], where: str) -> None:
        try:
            self.check(config())
        except Exception as error:
            complain(where + sentence(error))
            sys.exit(1)  # not an Exception: Hydra turns those of callbacks into warnings


def sentence(error: Exception) -> str:
    """An error in one line; of Hydra's, without the search path it ends with."""
    text = " ".join(str(error).partition("Config search path:")[0].split())
    return text or type(error).__name__


def complain(text: str) -> None:
    """One line to stderr."""
    Console(stderr=True).print(text, style="red", markup=False, highlight=False, soft_wrap=True)


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
