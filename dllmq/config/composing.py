"""Configs of entry points that Hydra does not start, and of command lines that it stumbles over."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import yaml
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from dllmq.config.checks import Plan, check_cell
from dllmq.config.values import choose
from dllmq.models.stored import RECORD
from dllmq.refusals import refusal


def compose_plan(overrides: Sequence[str], stored: bool = False) -> Plan:
    """The checked plan of a run with these overrides, for entry points that Hydra does not start.

    Args:
        stored: a quantized folder is taken too, as in `check_cell`.

    Raises:
        ValueError: one sentence, whether Hydra refuses an override or check_cell the run.
    """
    check_choices(overrides)
    with initialize_config_module("dllmq.conf", version_base="1.3"):
        try:
            cfg = compose("config", overrides=list(overrides))
        except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
            raise ValueError(refusal(error, overrides, _whole)) from error
    return check_cell(cfg, stored)


def refused(error: Exception, overrides: Sequence[str]) -> str:
    """An error of Hydra's, OmegaConf's or the YAML parser's in one sentence, where no Hydra is at work."""
    with initialize_config_module("dllmq.conf", version_base="1.3"):
        return refusal(error, overrides, _whole)


def _whole(choices: list[str]) -> DictConfig:
    return compose("config", overrides=choices, return_hydra_config=True)


def check_choices(overrides: Sequence[str]) -> None:
    """Refuses what Hydra accepts, or stumbles over without a word; what it refuses is told by `refused`.

    Args:
        overrides: words of a command line; flags are passed over.

    Raises:
        ValueError: one sentence.
    """
    groups = {entry.name for entry in files("dllmq.conf").iterdir() if entry.is_dir()} - {"hydra"}
    for word in overrides:
        key, _, value = word.lstrip("+~").partition("=")
        told = " ".join(word.split())
        if not key.strip():
            raise ValueError(f"{word!r} names no key: write key=value.")
        if key in groups and value.strip().startswith(("[", "{")):
            raise ValueError(
                f"{told} is a list or a dict, but {key} is the name of one preset: give a name, or "
                f"sweep over several with -m {key}=a,b."
            )
        if key in groups and value.strip() in ("", "null"):
            raise ValueError(f"{told} names no preset of {key}: leave the word away for the usual one.")
        if word.startswith("~") and not key.startswith("hydra"):
            raise ValueError(
                f"{told} deletes a key, which a run cannot do without: give {key}=<value> instead."
            )
        if key == "hydra/launcher" and "dry_run=true" in map(str.lower, overrides):  # which goes without
            choose(key, value.strip("'\""), dict.fromkeys([*_our_launchers(), *_LAUNCHERS]))


_LAUNCHERS = ("basic", "joblib", "submitit_local", "submitit_slurm", "ray", "ray_aws", "rq")  # not ours


def _our_launchers() -> list[str]:
    places = files("dllmq.conf").joinpath("hydra", "launcher").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in places if file.name.endswith(".yaml"))


def preset_of(model: str) -> str | None:
    """The option of the group `model` whose path is this hub id, or with which this folder was exported."""
    exported_with = _preset_in(Path(model) / RECORD)
    for file in sorted(files("dllmq.conf").joinpath("model").iterdir(), key=lambda f: f.name):
        name = file.name.removesuffix(".yaml")
        if name == exported_with or yaml.safe_load(file.read_text(encoding="utf-8"))["path"] == model:
            return name
    return None


def _preset_in(record: Path) -> str | None:
    """model.name of the run that an export's record tells of; None where there is none, or a damaged one."""
    try:
        name = json.loads(record.read_text(encoding="utf-8"))["run"]["config"]["model"]["name"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return name if isinstance(name, str) else None
