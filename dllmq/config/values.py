"""One value of a config: a choice from a table, or a dataclass that a node describes."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pkgutil import resolve_name
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dllmq.refusals import did_you_mean


def choose(key: str, value: str, table: Mapping[str, Any]) -> Any:
    """table[value], or one sentence that names the key and what is allowed."""
    if value not in table:
        raise ValueError(f"{key}={value} is not known.{did_you_mean(value, table)}")
    return table[value]


def kind_of(cls: type, key: str) -> Any:
    """The type of a dataclass's field, by its dotted key; None for a key that is not there or has no type."""
    kind: Any = cls
    for name in key.split("."):
        kind = get_type_hints(kind).get(name) if is_dataclass(kind) else None
    return kind


def options_of(kind: Any) -> tuple[Any, ...]:
    """The types that a field takes: int and None of `int | None`."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def wrong_type(key: str, value: Any, kind: Any) -> ValueError:
    """Of "seed=zero": one sentence with what came and what is allowed."""
    allowed = " or ".join(_KINDS.get(option, "another value") for option in options_of(kind))
    return ValueError(f"{key}={in_yaml(value)} is not allowed: it must be {allowed}.")


_KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a word",
    list[float]: "a list of numbers, such as [0.3,0.7]",
    list[str]: "a list of names, such as [a,b]",
    type(None): "null",
}


def in_yaml(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(in_yaml, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{in_yaml(v)}" for k, v in value.items()) + "}"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def check_loose(key: str, value: Any, kind: Any) -> None:
    """Refuses what OmegaConf would take: 2 for true, true for 1, and "" where null is meant.

    Raises:
        ValueError: see `wrong_type`.
    """
    options = options_of(kind)
    number_as_switch = bool in options and isinstance(value, int) and value not in (0, 1)
    switch_as_number = isinstance(value, bool) and bool not in options and bool({int, float} & {*options})
    if number_as_switch or switch_as_number:
        raise wrong_type(key, value, kind)
    if value == "" and {str, type(None)} & {*options}:
        raise ValueError(f"{key}= is empty: give a value{', or null' if type(None) in options else ''}.")


def build(key: str, node: Mapping[str, Any]) -> Any:
    """The dataclass that `_target_` names, from the node's other keys, types checked.

    Raises:
        ValueError: no such class, an unknown field, a wrong type, or what the class itself refuses.
    """
    arguments = {k: v for k, v in node.items() if k != "_target_"}
    target = node.get("_target_")
    try:
        cls = resolve_name(str(target))
    except Exception as error:  # importing a module of the user's can raise anything
        raise ValueError(
            f"{key}._target_={in_yaml(target)} cannot be imported: choose a preset, {key}=..., or give the "
            "dotted name of a class."
        ) from error
    if not isinstance(cls, type):
        raise ValueError(f"{key}._target_={target} is no class: choose a preset, {key}=..., or give a class.")
    known = {f.name: f for f in fields(cls) if f.init} if is_dataclass(cls) else {}
    for name in arguments:
        if name not in known:
            hint = did_you_mean(name, known) if known else f" {cls.__name__} takes none."
            raise ValueError(f"there is no key {key}.{name}.{hint}")
    if not arguments:
        return cls()
    if any(isinstance(value, Mapping) for value in arguments.values()):
        raise ValueError(f"{key} takes no nested keys; its fields are {', '.join(known)}.")
    for name, value in arguments.items():
        check_loose(f"{key}.{name}", value, kind_of(cls, name))
    try:
        typed = OmegaConf.merge(OmegaConf.structured(cls), arguments)
    except OmegaConfBaseException as error:
        name = str(error.full_key).partition("[")[0]
        if name not in arguments or not {*options_of(kind_of(cls, name))} <= _KINDS.keys():
            first = str(error).splitlines()[0].rstrip(".")
            raise ValueError(f"{key}: {name} of {cls.__name__} cannot be given here: {first}.") from error
        raise wrong_type(f"{key}.{name}", arguments.get(name), kind_of(cls, name)) from error
    plain = {k: v for k, v in OmegaConf.to_container(typed).items() if k in arguments}  # type: ignore[union-attr]
    with naming_group(key, known):
        return cls(**plain)


@contextmanager
def naming_group(group: str, names: Collection[str]) -> Iterator[None]:
    """Names keys in a dataclass's errors as the user writes them: "sampler.steps" where it says "steps"."""
    try:
        yield
    except ValueError as error:
        raise ValueError(in_group(str(error), group, names)) from error


def in_group(sentence: str, group: str, names: Collection[str]) -> str:
    """ "set cfg_scale=0" -> "set sampler.cfg_scale=0".

    A name without an underscore may be a word ("a cache"). It is a key at the sentence's start, after "leave"
    or a colon, and before an equals sign.
    """

    def named(found: re.Match[str]) -> str:
        before, name, after = sentence[: found.start()], found[0], sentence[found.end() :]
        is_key = "_" in name or not before or before.endswith(("leave ", ": ")) or after.startswith("=")
        return f"{group}.{name}" if is_key else name

    return re.sub(rf"(?<![\w.])(?:{'|'.join(names)})(?!\w)", named, sentence) if names else sentence
