"""What is committed under experiments/ is what the records beside it give, byte for byte."""

from pathlib import Path

import pytest

from dllmq.report.build import TABLE, markdown
from dllmq.report.results import load_sweep

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
STUDIES = sorted(f.parent for f in EXPERIMENTS.glob("*/baseline.json"))


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_tables_are_those_of_the_records(folder: Path) -> None:
    assert (folder / TABLE).read_text(encoding="utf-8") == markdown(load_sweep(folder))


def test_there_are_studies() -> None:
    assert {"demo", "bitwidth"} <= {folder.name for folder in STUDIES}


@pytest.mark.parametrize("folder", [f for f in EXPERIMENTS.iterdir() if f.is_dir()], ids=lambda f: f.name)
def test_every_study_says_what_it_asks_how_and_what_came_of_it(folder: Path) -> None:
    text = (folder / "README.md").read_text(encoding="utf-8")
    if folder.name == "wandb":  # how to, not a study
        return
    assert "**Question.**" in text and "python " in text
    assert "**Verdict.**" in text
