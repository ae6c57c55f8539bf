"""Every key of conf/ is explained there and in the documents, and these name no key that is not there."""

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from composed import CONF, GROUPS

from dllmq.config import RunConfig

ROOT = CONF.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {"method._target_", "method.shrink"}  # of docs/extend.md's own method


def leaves(schema: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of the schema; those of a method and a tracker are in their presets' files."""
    for f in fields(schema):
        if is_dataclass(f.default_factory):
            yield from leaves(f.default_factory, f"{prefix}{f.name}.")
        elif not f.metadata.get("omegaconf_ignore") and f.name not in ("method", "tracker"):
            yield f"{prefix}{f.name}"


def keys() -> set[str]:
    found = set(leaves(RunConfig))
    for file in [*CONF.glob("method/*.yaml"), *CONF.glob("tracker/*.yaml")]:
        own = yaml.safe_load(file.read_text(encoding="utf-8"))
        found |= {f"{file.parent.name}.{key}" for key in own if key != "_target_"}
    return found


def test_every_key_is_in_the_documents() -> None:
    text = "\n".join(doc.read_text(encoding="utf-8") for doc in DOCS)
    text += "".join(f" model.sampler.{name}" for row in re.findall(r"`model\.sampler\.` ([^(]*)", text)
                    for name in re.findall(r"`(\w+)`", row))  # fmt: skip
    assert sorted(k for k in keys() if not re.search(rf"(?<![\w.]){re.escape(k)}(?![\w.]*\w)", text)) == []


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: doc.stem)
def test_no_document_names_a_key_that_is_not_there(doc: Path) -> None:
    """Whatever has a group's prefix, and whatever a command of dllmq.run is given."""
    text = doc.read_text(encoding="utf-8")
    groups = GROUPS | {"eval"}
    named = set(re.findall(rf"(?<![\w./-])(?:{'|'.join(groups - {'hydra'})})\.[a-z_.]*[a-z]\b(?!\()", text))
    for line in re.findall(r"python -m dllmq\.run(.*)", text):
        named |= set(re.findall(r"(?<=[ +~])([a-z_.]+)=", line.partition("#")[0]))
    known = keys() | groups | {"model.sampler"} | ELSEWHERE
    files = {key for key in named if key.rpartition(".")[2] in ("yaml", "py", "md", "json", "jinja")}
    assert sorted(key for key in named - known - files if not key.startswith("hydra.")) == []


FILES = ["config.yaml", "model/mini.yaml", "calibration/default.yaml", "sampler/default.yaml",
         *(f"method/{name}.yaml" for name in ("gptq", "awq")), "tracker/wandb.yaml"]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_key_is_explained_where_it_stands(name: str) -> None:
    """On its line, or by a comment on the line above."""
    lines = (CONF / name).read_text(encoding="utf-8").partition("\nhydra:")[0].splitlines()
    bare = [
        line
        for above, line in zip(["", *lines], lines, strict=False)
        if re.match(r" *\w+: *\S", line) and "#" not in line and not above.lstrip().startswith("#")
    ]
    assert [line for line in bare if "_target_" not in line and not line.startswith("  - ")] == []


def test_every_preset_says_what_it_is() -> None:
    """Except those of one task, which its name says."""
    for file in [*CONF.rglob("*.yaml")]:
        text = file.read_text(encoding="utf-8")
        alone = file.parent.name == "tasks" and len(yaml.safe_load(text)["names"]) == 1
        assert "#" in text or alone or file.name in ("mini.yaml", "none.yaml"), file
