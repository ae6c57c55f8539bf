"""Configs of entry points that Hydra does not start, and of command lines that it stumbles over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from importlib.resources import files
from typing import Any

import yaml
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from dllmq.config.checks import Plan, check_cell
from dllmq.config.schema import RunConfig
from dllmq.config.values import choose, did_you_mean


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
        except (HydraException, OmegaConfBaseException) as error:
            text = " ".join(str(error).partition("Config search path:")[0].split())
            raise ValueError(text) from error
    return check_cell(cfg, stored)


def check_choices(overrides: Sequence[str], sweep: bool = False) -> None:
    """Refuses on sight what Hydra stumbles over without a word, or refuses in a paragraph.

    Args:
        overrides: words of a command line; flags are passed over.
        sweep: whether a key may have several values.

    Raises:
        ValueError: one sentence.
    """
    groups = {entry.name for entry in files("dllmq.conf").iterdir() if entry.is_dir()} - {"hydra"}
    for before, word in zip(["", *overrides], overrides, strict=False):
        value_of_flag = before.startswith("-") and before not in _FLAGS and "=" not in before
        if not word.startswith("-") and not value_of_flag:
            _check_list_for_preset(word, groups)
            _check_word(word, groups, sweep)


_FLAGS = ("-m", "--multirun", "-r", "--resolve")  # that no value follows
_LAUNCHERS = ("basic", "joblib", "submitit_local", "submitit_slurm", "ray", "ray_aws", "rq")  # not ours


def _check_list_for_preset(word: str, groups: set[str]) -> None:
    key, _, value = word.lstrip("+~").partition("=")
    if key in groups and value.strip().startswith(("[", "{")):
        raise ValueError(
            f"{key}={value} is a list or a dict, but {key} is the name of one preset: give a name, or "
            f"sweep over several with -m {key}=a,b."
        )


def _check_word(word: str, groups: set[str], sweep: bool) -> None:
    try:
        override = OverridesParser.create().parse_override(word)
        key = override.key_or_group
    except HydraException:
        key = ""
    if not key:
        raise ValueError(
            f"{word!r} cannot be read as key=value: quote a value that holds spaces or signs, "
            "'key=\"...\"', and leave no space around the = sign."
        )
    if key == "hydra/launcher":
        _check_options(key, override)
    if key.startswith("hydra"):
        return
    if override.is_delete():
        raise ValueError(f"{word} deletes a key, which a run cannot do without: give {key}=<value> instead.")
    if override.is_sweep_override() and not sweep:
        one = f"write one that holds a comma as '{key}=\"a,b\"' and a list as '{key}=[a,b]'"
        one = (
            {"tasks": "run both in one with 'tasks.names=[a,b]'"}.get(key, "name one")
            if key in groups
            else one
        )
        raise ValueError(f"{word} has several values: sweep over them with -m, or {one}.")
    if key in groups:
        _check_options(key, override)
    elif not override.is_add():
        _check_key(key)


def _check_options(group: str, override: Override) -> None:
    """Whether each name is a preset of the group."""
    places = files("dllmq.conf").joinpath(*group.split("/")).iterdir()
    names = sorted(file.name.removesuffix(".yaml") for file in places if file.name.endswith(".yaml"))
    options = dict.fromkeys([*names, *(_LAUNCHERS if group == "hydra/launcher" else ())])
    several = override.is_choice_sweep()
    for name in override.sweep_string_iterator() if several else [override.get_value_element_as_str()]:
        choose(group, name.strip("'\""), options)


def _check_key(key: str) -> None:
    """Whether the schema has the key; the keys of method and tracker are those of the class chosen."""
    schema: Any = RunConfig
    names = key.split(".")
    for depth, name in enumerate(names):
        if not is_dataclass(schema):
            return
        known = {f.name: f for f in fields(schema) if not f.metadata.get("omegaconf_ignore")}
        if name not in known:
            extra = {} if depth else {"experiment": None}
            prefix = ".".join([*names[:depth], ""]) if depth else ""
            raise ValueError(f"there is no key {prefix}{name}.{did_you_mean(name, known | extra)}")
        schema = known[name].default_factory


def preset_of(hub_id: str) -> str | None:
    """The option of the group `model` whose path is this hub id."""
    for file in sorted(files("dllmq.conf").joinpath("model").iterdir(), key=lambda f: f.name):
        if yaml.safe_load(file.read_text(encoding="utf-8"))["path"] == hub_id:
            return file.name.removesuffix(".yaml")
    return None
