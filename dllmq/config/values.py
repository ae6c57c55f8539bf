"""One value of a config: a choice from a table, or a dataclass that a node describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from hydra.utils import get_class
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dllmq.refusals import did_you_mean


def choose(key: str, value: str, table: Mapping[str, Any]) -> Any:
    """table[value], or one sentence that names the key and what is allowed."""
    if value not in table:
        raise ValueError(f"{key}={value} is not known.{did_you_mean(value, table)}")
    return table[value]


def build(key: str, node: Mapping[str, Any]) -> Any:
    """The dataclass that `_target_` names, from the node's other keys, types checked.

    Raises:
        ValueError: no such class, an unknown field, a wrong type, or what the class itself refuses.
    """
    arguments = {k: v for k, v in node.items() if k != "_target_"}
    try:
        cls = get_class(str(node.get("_target_")))
    except Exception as error:
        raise ValueError(f"{key}._target_={node.get('_target_')} cannot be imported.") from error
    known = {f.name: f for f in fields(cls) if f.init} if is_dataclass(cls) else {}
    for name in arguments:
        if name not in known:
            raise ValueError(f"there is no key {key}.{name}.{did_you_mean(name, known)}")
    if not arguments:
        return cls()
    if any(isinstance(value, Mapping) for value in arguments.values()):
        raise ValueError(f"{key} takes no nested keys; its fields are {', '.join(known)}.")
    try:
        typed = OmegaConf.merge(OmegaConf.structured(cls), arguments)
    except OmegaConfBaseException as error:
        raise ValueError(f"{key}.{error.full_key}: {str(error).splitlines()[0]}.") from error
    return cls(**{k: v for k, v in OmegaConf.to_container(typed).items() if k in arguments})  # type: ignore[union-attr]
