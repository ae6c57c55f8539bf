"""Hydra's callback of a sweep: every cell is checked before the first one starts; the table comes at the end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from dllmq.report.build import write_report
from dllmq.report.tables import sweep_tables
from dllmq.report.table import print_tables


def cells(config: DictConfig) -> list[list[str]]:
    """The overrides of every cell of a sweep, `hydra.sweeper.params` included."""
    params = OmegaConf.to_container(config.hydra.sweeper.get("params") or OmegaConf.create({}))
    given = list(config.hydra.overrides.task)
    named = {o.lstrip("+~").partition("=")[0] for o in given}
    extra = [f"{key}={value}" for key, value in params.items() if key not in named]  # type: ignore[union-attr]
    overrides = OverridesParser.create().parse_overrides(extra + given)
    return [list(cell) for batch in BasicSweeper.split_arguments(overrides, None) for cell in batch]


class SweepCallback(Callback):
    """Args:
    check: called with each cell's composed config; its ValueError ends the sweep before anything ran.
    """

    def __init__(self, check: Callable[[DictConfig], Any]) -> None:
        self.check = check

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        listed = cells(config)
        for number, overrides in enumerate(listed, 1):
            try:
                self.check(compose(config_name=config.hydra.job.config_name, overrides=overrides))
            except Exception as error:
                where = f"cell {number} of {len(listed)} ({' '.join(overrides)})"
                first = str(error).strip().splitlines()[0]
                Console(stderr=True).print(f"{where}: {first}", style="red", markup=False, highlight=False, soft_wrap=True)
                sys.exit(1)  # not an Exception: Hydra turns those of callbacks into warnings

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        finish_sweep(Path(config.hydra.sweep.dir))


def finish_sweep(folder: Path) -> None:
    """Writes summary.json, table.md and report.html, prints the table; exits with 1 where a cell failed."""
    console = Console()
    try:
        sweep = write_report(folder)
    except ValueError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        sys.exit(1)
    print_tables(sweep_tables(sweep), console)
    console.print(f"records, table.md and report.html are in {folder}", markup=False, highlight=False)
    if sweep.failed:
        sys.exit(1)
