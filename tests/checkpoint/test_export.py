"""export= in a run: checked before weights are read, written before evaluation, made again where missing."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from composed import composed
from tiny_checkpoint import save_checkpoint
from tiny_folders import quantized, source

import dllmq.cell
from dllmq.cell import Cell
from dllmq.checkpoint import load_quantized, save_quantized
from dllmq.config import check_cell, fingerprint
from dllmq.evaluation.tasks import EvalResult
from dllmq.models.stored import RECORD
from dllmq.numerics import Grid
from dllmq.pipeline import quantized_linears
from dllmq.report.results import RESULTS, RunRecord

SMALL = (
    "tracker=none",
    "method=rtn",
    "tasks=mini_choice",
    "eval.limit=1",
    "eval.mc_num=1",
    "eval.mc_batch_size=1",
    "eval.fidelity_states=0",
    "calibration.num_prompts=2",
    "calibration.num_states=4",
    "model.dtype=float32",
    "sampler.gen_length=8",
    "sampler.steps=4",
    "sampler.block_length=8",
)


def cell(folder: Path, *overrides: str) -> Cell:
    cache = f"cache_dir={folder / 'cache'}"
    plan = check_cell(composed(*SMALL, f"model.path={folder / 'source'}", cache, *overrides))
    return Cell(
        plan, folder / "sweep" / "cell", folder / "sweep", "cell", "python -m dllmq.run", lambda *_: None
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "source")
    return tmp_path


def test_a_run_writes_its_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loaded folder is the model that was evaluated; the results say how large it is on disk."""
    evaluated: list[Any] = []

    def remember(self: Cell, model: Any, *rest: Any) -> Any:
        if quantized_linears(model):
            assert (self.folder / "model" / RECORD).is_file()  # before evaluation
            evaluated.append(model)
        return measure(self, model, *rest)

    measure = Cell._measure
    monkeypatch.setattr(Cell, "_measure", remember)
    monkeypatch.setattr(dllmq.cell, "evaluate", lambda *_: EvalResult())
    how = ("bits=w4a8", "attn_bits=v", "backend=fake")
    made = cell(folder, *how, "export=compressed_tensors")
    record = made.run()
    out = made.folder / "model"
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(load_quantized(out)(ids), evaluated[0](ids))
    assert record.cost["exported_bytes"] == sum(f.stat().st_size for f in out.iterdir())
    assert record.cost["export_s"] > 0
    assert record.notes["export"] == {"format": "compressed_tensors", "folder": "model"}
    written = json.loads((made.folder / RESULTS).read_text())
    assert written["cost"]["exported_bytes"] == record.cost["exported_bytes"]
    said = json.loads((out / RECORD).read_text())
    assert said["run"]["config"] == record.config and said["run"]["command"] == "python -m dllmq.run"
    assert said["attention"]["V"]["bits"] == 8 and said["source"]["name"] == "source"

    monkeypatch.setattr(Cell, "_compute", lambda self: pytest.fail("it was run again"))
    assert cell(folder, *how, "export=compressed_tensors").run() == record
    assert cell(folder, *how).run() == record  # nothing is asked for


@pytest.mark.slow
def test_the_command_exports(folder: Path) -> None:
    how = [*SMALL, "method=gptq", "bits=w3a8", "export=compressed_tensors", "name=exported"]
    done = forked.run(folder, "dllmq.run", f"model.path={folder / 'source'}", *how)
    assert done.returncode == 0, done.stdout + done.stderr
    (results,) = folder.glob(f"outputs/exported/*/{RESULTS}")
    record = json.loads(results.read_text())
    model = results.parent / "model"
    assert record["cost"]["exported_bytes"] == sum(f.stat().st_size for f in model.iterdir())
    assert "other programs see the quantized linears only" in done.stderr
    linears = quantized_linears(load_quantized(model)).values()
    assert {linear.quantized.grid for linear in linears} == {Grid(3)} and len(linears) == 14


def test_a_finished_cell_without_its_export_is_run_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    exports: list[str] = []

    def compute(self: Cell) -> RunRecord:
        exports.append(str(self.config.export))
        record = RunRecord(
            config=self.config.plain(), run_name="cell", scores={}, fidelity={}, curves={}, cost={}, inert=[],
            versions={}, git={}, device="cpu", seed=0, axes={}, command="c", status="finished",
            fingerprint=self.key,
        )  # fmt: skip
        if self.config.export is not None:
            record.notes["export"] = {"format": self.config.export, "folder": "model"}
            (self.folder / "model").mkdir(exist_ok=True, parents=True)
            made = {"run": {"fingerprint": self.key}}
            (self.folder / "model" / RECORD).write_text(json.dumps(made))
        return record

    monkeypatch.setattr(Cell, "_compute", compute)
    cell(folder, "bits=w4a16").run()
    with caplog.at_level(logging.INFO, "dllmq"):
        cell(folder, "bits=w4a16", "export=gptq").run()
    assert "finished, but export=gptq is not there" in caplog.text
    cell(folder, "bits=w4a16", "export=gptq").run()  # there
    cell(folder, "bits=w4a16", "export=dequantized").run()  # another format
    shutil.rmtree(folder / "sweep" / "cell" / "model")
    cell(folder, "bits=w4a16", "export=dequantized").run()
    assert exports == ["None", "gptq", "dequantized", "dequantized"]


def test_full_precision_has_nothing_to_export(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dllmq.cell, "evaluate", lambda *_: EvalResult())
    made = cell(folder, "method=fp", "export=gptq")
    assert made.run().inert[-1] == "export: full precision is the checkpoint itself, so nothing is exported"
    assert not (made.folder / "model").exists() and made.kept.finished() is not None


def test_export_changes_no_number(folder: Path) -> None:
    made = [cell(folder, "bits=w4a16", *more) for more in ((), ("export=gptq",), ("export=dequantized",))]
    assert len({fingerprint(c.config, "cpu") for c in made}) == 1 and len({c.fp_key for c in made}) == 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["export=awq"], "export=awq is not known"),
        (["export=gtpq"], "Did you mean gptq?"),
        (["export=gptq", "bits=w4a8"], "has no quantized inputs (these have 8 bits)"),
        (["export=gptq", "bits=w6a16"], "2, 3, 4 or 8 bits, not 6"),
        (["export=gptq", "bits=w4a16", "group_size=0"], "group_size=-1"),
        (["export=gptq", "bits=w3a16"], "k_proj has 16 outputs and 32 inputs of 3 bits"),
        (
            ["export=compressed_tensors", "method=gptq", "method.act_order=true", "group_size=16"],
            "method.static_groups=true",
        ),
    ],
)
def test_what_cannot_be_is_found_before_weights_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], said: str
) -> None:
    monkeypatch.setattr(dllmq.cell, "load_model", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ValueError) as error:
        cell(folder, *overrides)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=gptq", "method.act_order=true", "group_size=16", "method.static_groups=true"],
        ["method=gptq", "method.act_order=true", "group_size=-1"],
        ["method=awq", "+method.act_order=true", "group_size=16"],  # its solver rounds
        ["method=rtn", "bits=w3a4", "group_size=0", "attn_bits=qkpv"],
    ],
)
def test_what_compressed_tensors_can_hold(folder: Path, overrides: list[str]) -> None:
    assert cell(folder, "export=compressed_tensors", *overrides).config.export == "compressed_tensors"


@pytest.mark.parametrize("format", ["compressed_tensors", "dequantized"])
def test_an_export_is_not_quantized_again(folder: Path, format: str) -> None:
    save_quantized(quantized("llada", Grid(4)), folder / "out", format, source("llada"))
    with pytest.raises(ValueError, match=r"quantized already; give the full-.* dllmq\.evaluation\.plugin"):
        check_cell(composed(*SMALL, f"model.path={folder / 'out'}"))
