"""Processes of torchrun: who helps, what is refused, and that two give one's answers byte for byte."""

import json
import runpy
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import pytest
from composed import composed
from torch.distributed import HashStore

import dllmq.run
import dllmq.team
from dllmq.config import check_cell
from dllmq.evaluation.answers import AnswerFolder
from dllmq.evaluation.shares import SharedAnswers
from dllmq.run import join_team
from dllmq.team import Job, Team, help_with, own_arithmetic, team_of_torchrun

STUDY = Path(__file__).resolve().parent.parent / "experiments" / "robustness" / "processes"
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def store() -> HashStore:
    """Of one process, with the operations of torchrun's."""
    own = HashStore()
    own.set_timeout(timedelta(seconds=60))
    return own


OVERRIDES = ["tasks=mini_gsm", "eval.limit=2", "eval.batch_size=1", "sampler.steps=3"]


def job(tmp_path: Path, **changes: object) -> Job:
    like = json.loads(json.dumps(own_arithmetic(check_cell(composed(*OVERRIDES)))))
    return Job(
        overrides=OVERRIDES, quantized=False, exact=True, blocks=str(tmp_path / "blocks"), blocks_key="k",
        answers=str(tmp_path / "answers"), answers_key="a", work_dir=str(tmp_path / "tasks"), backend="fake",
        stream=False, compact=False, threads=1, like=like | changes,
    )  # fmt: skip


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert team_of_torchrun() == Team()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert team_of_torchrun() == Team()
    folder = AnswerFolder(tmp_path, "key")
    with Team().sharing(folder, lambda: pytest.fail("nobody to tell")) as answers:
        assert answers is folder


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(
        ValueError, match="MASTER_ADDR, MASTER_PORT is not: start several processes with torchrun"
    ):
        team_of_torchrun()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("RANK", "one", "RANK='one' is no whole number"),
        ("WORLD_SIZE", "2x", "WORLD_SIZE='2x' is no whole number"),
        ("WORLD_SIZE", "", "WORLD_SIZE='' is no whole number"),
        ("MASTER_PORT", "-5", "MASTER_PORT='-5' is no whole number"),
        ("RANK", "2", "RANK=2 is none of the 2 processes of WORLD_SIZE"),
        ("LOCAL_RANK", "a", "LOCAL_RANK='a' is no whole number"),
    ],
)
def test_variables_that_are_no_numbers_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str, said: str
) -> None:
    for variable, own in zip(VARIABLES, ("1", "2", "localhost", "29500", "1"), strict=True):
        monkeypatch.setenv(variable, own)
    monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2 if name == "LOCAL_RANK" else 0)
    with pytest.raises(SystemExit) as ended:
        join_team([])
    told = capsys.readouterr().err
    assert ended.value.code == 1 and told.startswith(said) and len(told.splitlines()) == 1


def test_an_automatic_batch_size_is_part_of_the_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of machines with other memories one would cut other batches."""
    plans = {size: check_cell(composed(*OVERRIDES, f"eval.batch_size={size}")) for size in ("1", "auto")}
    found = {}
    for gigabytes in (8, 8.3, 16):
        monkeypatch.setattr("dllmq.models.memory.total_memory", lambda device, n=gigabytes: int(n * 2**30))
        found[gigabytes] = {size: own_arithmetic(plan) for size, plan in plans.items()}
    assert found[8]["auto"] == found[8.3]["auto"] != found[16]["auto"]
    assert found[8]["1"] == found[16]["1"] and "memory" not in found[8]["1"]


def test_torchrun_and_a_launcher_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        join_team(["-m", "hydra/launcher=dllmq_joblib"])
    assert "do not go together" in capsys.readouterr().err


def test_a_helper_answers_its_share(tmp_path: Path) -> None:
    """The second of two problems, in batches of one."""
    assert help_with(job(tmp_path), rank=1, size=2) == 1
    lines = (tmp_path / "answers" / "mini_gsm.1.jsonl").read_text().splitlines()
    assert len(lines) == 3 and '"row": 0, "of": 1' in lines[1] and '"left": true' in lines[2]


@pytest.mark.parametrize("name", ["weights", "code", "torch", "threads", "machine"])
def test_a_helper_with_another_arithmetic_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"^its {name} differ from those of process 0$"):
        help_with(job(tmp_path, **{name: "another"}), rank=1, size=2)
    assert not (tmp_path / "answers").exists()


def test_a_helper_quantizes_nothing_itself(tmp_path: Path) -> None:
    """A block that rank 0 could not keep: the helper says so, and stores nothing in its place."""
    missing = replace(job(tmp_path), quantized=True)
    with pytest.raises(ValueError, match="the quantized block 0 is not in"):
        help_with(missing, rank=1, size=2)
    assert not list((tmp_path / "blocks").rglob("*.json")) and not (tmp_path / "answers").exists()


def test_a_helper_computes_with_rank_0s_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """set_backend names the kernels too, but takes none of these names."""
    asked: list[str] = []
    monkeypatch.setattr(dllmq.team, "quantize_blocks", lambda *_, **__: {})
    monkeypatch.setattr(dllmq.team, "set_backend", lambda model, backend: asked.append(backend) or "fake")
    with pytest.raises(ValueError, match="its backend would be fake, that of process 0 is packed:onednn"):
        help_with(replace(job(tmp_path), quantized=True, backend="packed:onednn"), rank=1, size=2)
    assert asked == ["packed"] and not (tmp_path / "answers").exists()


def test_announcements_reach_the_helper_and_its_answer_comes_back(
    store: HashStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Both ends in one process: a job that works, one that does not, the end."""
    first, helper = Team(0, 2, store), Team(1, 2, store)
    folder = AnswerFolder(tmp_path / "answers", "a")
    store.set("job/2", json.dumps({"end": True}))
    for changes in ({}, {"code": "another"}):
        sharing = first.sharing(folder, lambda changes=changes: job(tmp_path, **changes))
        answers = sharing.__enter__()
        assert isinstance(answers, SharedAnswers) and (answers.rank, answers.size) == (0, 2)
        assert answers.working(1)
        if changes:
            helper.serve()  # both jobs, then the end
            assert not answers.working(1)
            sharing.__exit__(None, None, None)
    assert first.batches == {1: 0} and "process 1 could not help: its code differ" in caplog.text
    done = json.loads(store.get("job/0/done/1"))
    assert done == {"error": None, "batches": 1}


def test_a_helper_ends_without_a_traceback(
    store: HashStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C, which every process of a terminal gets, and a process 0 that went while it worked."""

    class Gone(HashStore):
        def set(self, key: str, value: str) -> None:
            raise RuntimeError("Broken pipe")

    helper = Team(1, 2, Gone())
    monkeypatch.setattr(helper, "_wait_for", lambda key: asdict(job(tmp_path, code="another")))
    helper.serve()

    def stopped(self: Team) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Team, "serve", stopped)
    monkeypatch.setattr(dllmq.run, "join_team", lambda argv: helper)
    monkeypatch.setattr(dllmq.run, "start_logging", lambda *_: None)
    monkeypatch.setattr(dllmq.run, "_team", None)
    monkeypatch.setattr(dllmq.run, "_given", "")
    monkeypatch.setattr("sys.argv", ["run"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as ended:
        dllmq.run.main()
    assert ended.value.code == 130


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(["one", "two"], marks=pytest.mark.slow),
        pytest.param(["one", "two, killed, same command again"], marks=pytest.mark.long),
        pytest.param(["one, packed", "two, packed"], marks=pytest.mark.long),
        pytest.param(["one", "two", "three"], marks=pytest.mark.long),  # also in evaluation/test_shares.py
    ],
    ids=lambda names: names[-1].partition(", same")[0],
)
def test_processes_give_the_answers_of_one(tmp_path: Path, chosen: list[str]) -> None:
    """One, two, three, and two of which all are killed; every answer and number, byte for byte."""
    study = runpy.run_path(str(STUDY / "run.py"))
    sizes = [
        *("method=rtn", "eval.limit=6", "eval.batch_size=2", "eval.fidelity_states=4", "eval.mc_num=4"),
        *("eval.mc_batch_size=2", "eval.fidelity_prompts=2", "calibration.num_prompts=2", "threads=1"),
        *("calibration.num_states=4", "tracker=none", "cache_dir=null"),
    ]
    scenarios = [scenario for scenario in study["SCENARIOS"] if scenario.name in chosen]
    outcomes = study["scenarios"](tmp_path, sizes, scenarios)
    assert [(o.scenario, o.processes) for o in outcomes] == [(s.name, s.processes) for s in scenarios]
    for o in outcomes:
        assert (o.different_answers, o.different_numbers) == (0, [])
        assert o.problems == 6 * 3 * 2 and o.forwards == outcomes[0].forwards
    assert len(outcomes) == len(chosen)
    assert all(
        int(part) > 0 for o in outcomes[1:] if "killed" not in o.scenario for part in o.helped.split(", ")
    )


def test_the_committed_study_found_no_difference() -> None:
    outcomes = json.loads((STUDY / "results.json").read_text())
    assert len(outcomes) >= 4 and {o["different_answers"] for o in outcomes} == {0}
    assert all(o["problems"] >= 200 and not o["different_numbers"] for o in outcomes)
    study = runpy.run_path(str(STUDY / "run.py"))
    assert (STUDY / "table.md").read_text() == study["table"]([study["Outcome"](**o) for o in outcomes])
