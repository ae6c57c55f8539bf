"""What Hydra refuses of a command line, in one sentence that names the nearest allowed word.

Hydra tells it in paragraphs (a list, the search path, a link) that differ by kind; read here are those of
Hydra 1.3 and of the YAML parser. A paragraph of another kind becomes its first lines.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Keys = Mapping[str, Any]
_GROUP = re.compile(
    r"Could not find '(.+)/([^/']*)'\s+Available options in '.+?':(.*?)(?:Config search|$)", re.S
)
_NO_KEY = re.compile(r"Could not (?:override|delete from config\.) '([^']*)'")
_SYNTAX = re.compile(
    r"(?:Error parsing override '(?P<word>.*)'\n)?(?P<why>[^\n]*)\n.*See https://hydra.cc", re.S
)
_COMMAS = re.compile(r"Ambiguous value for argument '(.+)'\n")
_ADDED = re.compile(r"An item is already at '(.+?)'")
_VALUE = re.compile(r"Error merging override (.+)")
_TWICE = re.compile(r"(\S+) appears more than once in the final defaults list")
_YAML = re.compile(r'([^\n]*)\n\s+in "([^"]+)", line (\d+)')


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " Did you mean ...? Known: ...", to end a sentence with."""
    close = difflib.get_close_matches(word, known := list(known), n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"{hint} Known: {', '.join(known)}."


def refusal(error: Exception, overrides: Sequence[str], compose: Callable[[list[str]], Keys]) -> str:
    """The sentence.

    Args:
        error: Hydra's, OmegaConf's or the YAML parser's.
        overrides: that were given.
        compose: the config of some presets' names ("method=awq"), with Hydra's own part; may raise.
    """
    text = str(error) or str(error.__cause__ or "")
    if found := _GROUP.search(text):
        group, option, known = found[1], found[2], found[3].split()
        return f"{group}={option} is not known.{did_you_mean(option, known)}"
    if found := _COMMAS.search(text):
        return (
            f"{found[1]} holds a comma: sweep over the values with -m, or quote what is one text "
            f"('key=\"a,b\"') and bracket what is a list (key=[a,b])."
        )
    if found := _NO_KEY.search(text):
        return _no_key(found[1], overrides, compose)
    if found := _TWICE.search(text):
        return f"{found[1]} is chosen already: give {found[1]}=<name> without the + to choose another one."
    if found := _ADDED.search(text):
        return f"{found[1]} is there already: give {found[1]}=<value> without the +."
    if found := _VALUE.search(text):
        why = _first_lines(str(error.__cause__ or "")) or "it does not fit"
        return f"{found[1]} is not allowed: {why}."
    if found := _SYNTAX.search(text):
        return _no_override(found["word"], found["why"].strip(), overrides)
    if places := _YAML.findall(text):
        why, file, line = places[-1]
        return f"{file} is no valid YAML ({why}, line {line}): mend it there, or choose another preset."
    return _first_lines(text) or type(error).__name__


def _no_key(key: str, overrides: Sequence[str], compose: Callable[[list[str]], Keys]) -> str:
    """Of a key that is not there: the part that is wrong, and what there is beside it."""
    try:
        config: Any = compose([o for o in overrides if re.fullmatch(r"[a-z]+=[A-Za-z0-9_.-]+", o)])
    except Exception:  # these presets do not go together either
        config = compose([])
    if "/" in key:
        return f"there is no group {key}.{did_you_mean(key, config['hydra']['runtime']['choices'])}"
    place, prefix = config, ""
    for part in re.split(r"\.|@", key):
        if not isinstance(place, Mapping):
            return f"there is no key {key}: {prefix.rstrip('.')} is a value and holds none."
        if part not in place:
            known = [str(name) for name in place if prefix or name != "hydra"]
            return f"there is no key {prefix}{part}.{did_you_mean(part, known)}"
        place, prefix = place[part], f"{prefix}{part}."
    return f"{key} is there, but cannot be set like this: give {prefix.rstrip('.')}=<value>."


def _no_override(word: str | None, why: str, overrides: Sequence[str]) -> str:
    """Of what cannot be read; Hydra names the word, or only a part of it."""
    part = re.search(r"'(.*)'$", why)
    word = word or next((o for o in overrides if (part and part[1] in o) or o in why), why)
    if "missing EQUAL" in why:
        return f"{word} gives no value: write {word}=<value>."
    return (
        f"{word} cannot be read ({why.strip('.')}): write key=value, and quote a value with any of "
        "' \" , = [ ] { } ( ) in it ('key=\"value\"')."
    )


def _first_lines(text: str) -> str:
    """A paragraph as one line, without what Hydra and OmegaConf end theirs with."""
    for end in ("Config search path:", "    full_key:", "See https://hydra.cc"):
        text = text.partition(end)[0]
    return " ".join(text.split())
