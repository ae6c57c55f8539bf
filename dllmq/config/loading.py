"""From a composed YAML to a `RunConfig`; unknown keys (also those of +key=) and wrong types are refused."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dllmq.config.schema import RunConfig
from dllmq.config.values import check_loose, did_you_mean, kind_of, wrong_type


def load(cfg: DictConfig) -> RunConfig:
    """A composed config as typed values.

    Raises:
        ValueError: an unknown key or a value of the wrong type.
    """
    schema = OmegaConf.structured(RunConfig)
    _refuse_unknown(cfg, RunConfig, "")
    try:
        values = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        key, first = getattr(error, "full_key", None), str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"{key}: {first}." if key else f"{first}.") from error
    for f in fields(RunConfig):
        if is_dataclass(f.default_factory) and f.name in values and not isinstance(values[f.name], dict):
            raise ValueError(f"{f.name} is a group of keys and takes no value: give {f.name}.<key>=<value>.")
    _refuse_loose(values, "")
    try:
        config = OmegaConf.to_object(OmegaConf.merge(schema, values))
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", "")).partition("[")[0]
        raise wrong_type(key, _at(values, key), kind_of(RunConfig, key)) from error
    assert isinstance(config, RunConfig)
    return replace(config, explicit=_explicit(cfg))


def _explicit(cfg: DictConfig) -> frozenset[str]:
    """Fields of the answers' settings that are no defaults (these are interpolations, auto or null)."""
    given: set[str] = set()
    for group in ("sampler", "eval", "tasks"):
        node = cfg.get(group) or {}
        given |= {
            str(key)
            for key in node
            if key not in _NOT_ANSWERS
            and not OmegaConf.is_interpolation(node, key)
            and node[key] not in (None, "auto")
        }
    return frozenset(given)


# Keys of eval and tasks that are no fields of EvalSettings, or that no row has.
_NOT_ANSWERS = (
    "limit", "batch_size", "allow_code_execution", "fidelity_states", "fidelity_prompts",
    "names", "data_dir", "settings",
)  # fmt: skip


def _at(values: Any, key: str) -> Any:
    for name in key.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _refuse_loose(values: Any, prefix: str) -> None:
    """See values.check_loose; nodes that a class describes are checked where they are built."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            _refuse_loose(value, f"{key}.")
        elif (kind := kind_of(RunConfig, key)) is not None:
            check_loose(key, value, kind)


def _refuse_unknown(node: DictConfig, schema: Any, prefix: str) -> None:
    known = {f.name: f for f in fields(schema) if not f.metadata.get("omegaconf_ignore")}
    for key in node:
        if key not in known:
            raise ValueError(f"there is no key {prefix}{key!s}.{did_you_mean(str(key), known)}")
        default = known[str(key)].default_factory
        value = node._get_node(key)
        if is_dataclass(default) and isinstance(value, DictConfig):
            _refuse_unknown(value, default, f"{prefix}{key}.")
