"""Published tasks in a run's config: settings rows, local files, what the fingerprint holds."""

import json
import re
import shutil
from pathlib import Path

import forked
import pytest
import yaml
from composed import CONF, composed
from task_files import MAKE, write_rows, write_task
from tiny_checkpoint import save_checkpoint

from dllmq.config import check_cell, fingerprint, load
from dllmq.diffusion import SamplerConfig
from dllmq.evaluation import benchmarks, task_settings
from dllmq.evaluation.tasks import check_tasks
from dllmq.run import describe


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("made") / "folder")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name in ("gsm8k", "humaneval"):
        write_task(folder, name)
    return folder


def test_every_task_has_a_file_and_is_named_in_the_config() -> None:
    text = (CONF / "config.yaml").read_text()
    for name in (*benchmarks.names(), "paper"):
        names = yaml.safe_load((CONF / "tasks" / f"{name}.yaml").read_text())["names"]
        check_tasks(names)
        assert names == [name] or name == "paper"
        assert re.search(rf"\b{name}\b", text)
    assert len(load(composed("tasks=paper")).tasks.names) == 9
    assert all(preset in text for preset in task_settings.presets())


def test_default_settings_are_the_runs_own() -> None:
    config = load(composed("tasks=gsm8k", "model=llada_8b_instruct"))
    answer = config.answers()["gsm8k"]
    assert answer.sampler == config.sampler_config() and answer.num_fewshot is None
    assert (answer.eos_cut, answer.mc_num, answer.mc_batch_size, answer.chat_template) == (
        "first",
        128,
        8,
        True,
    )
    assert config.explicit == frozenset()


def test_a_row_and_what_the_user_sets() -> None:
    words = ("tasks=gsm8k", "model=llada_8b_instruct", "tasks.settings=fast_dllm")
    row = load(composed(*words)).answers()["gsm8k"]
    assert row.sampler == SamplerConfig(256, 256, 32) and row.eos_cut == "none" and row.num_fewshot == 5
    config = load(composed(*words, "sampler.steps=128", "eval.eos_cut=first", "tasks.num_fewshot=2",
                           "tasks.chat_template=false", "sampler.temperature=0.0"))  # fmt: skip
    assert config.explicit == {"steps", "eos_cut", "num_fewshot", "chat_template", "temperature"}
    own = config.answers()["gsm8k"]
    assert own.sampler.steps == 128 and own.sampler.block_length == 32
    assert (own.eos_cut, own.num_fewshot, own.chat_template) == ("first", 2, False)
    same = load(
        composed(*words, "sampler.block_length=32", "sampler.gen_length=64")
    )  # also at the default's value
    assert same.answers()["gsm8k"].sampler == SamplerConfig(64, 64, 32)
    chosen = load(composed(*words, "sampler=llada_paper"))  # a chosen sampler is set as a whole
    assert chosen.answers()["gsm8k"].sampler == chosen.sampler_config()
    likelihood = load(
        composed("tasks=mmlu", "model=llada_8b_base", "tasks.settings=llada_paper", "eval.mc_num=8")
    )
    with pytest.raises(ValueError, match=r"tasks\.settings=llada_paper for mmlu|mc_num must be") as error:
        load(composed("tasks=mmlu", "model=llada_8b_base", "tasks.settings=llada_paper", "eval.mc_num=8",
                      "eval.mc_batch_size=3")).answers()  # fmt: skip
    assert "mc_num=8" in str(error.value)
    assert likelihood.answers()["mmlu"].mc_num == 8 and likelihood.answers()["mmlu"].mc_batch_size == 1


def test_axes_tell_settings_apart() -> None:
    words = ("tasks=gsm8k", "model=llada_8b_instruct")
    assert "settings" not in load(composed(*words)).axes()
    axes = load(composed(*words, "tasks.settings=qdlm", "tasks.num_fewshot=1")).axes()
    assert (axes["settings"], axes["num_fewshot"]) == ("qdlm", 1)


def test_axes_tell_answers_apart() -> None:
    plain = load(composed("tasks=mini_gsm")).axes()
    words = (
        "eval.eos_cut=none",
        "eval.mc_num=16",
        "eval.limit=7",
        "sampler.temperature=0.5",
        "tasks.add_bos=true",
    )
    for word in (*words, "sampler.block_length=8", "tasks.chat_template=true"):
        key = word.partition("=")[0].partition(".")[2]
        assert key not in plain and load(composed("tasks=mini_gsm", word)).axes()[key] is not None


def test_programs_are_taken_out_of_a_chat_without_a_row_too() -> None:
    words = ("tasks.names=[humaneval,mbpp,gsm8k]", "eval.allow_code_execution=true")
    chat = load(composed(*words, "model=llada_8b_instruct")).answers()
    assert [(a.postprocess, a.until) for a in chat.values()] == [
        ("take_function", "none"), ("take_function", "task"), ("none", "task")
    ]  # fmt: skip
    base = load(composed(*words, "model=llada_8b_base")).answers()
    assert {(a.postprocess, a.until) for a in base.values()} == {("none", "task")}


def test_layout_of_prompts() -> None:
    """tasks.chat_template and tasks.add_bos win over the model's, for calibration prompts too."""
    config = load(composed("model=dream_v0_7b_base", "tasks=gsm8k"))
    assert (config.chat_template, config.add_bos) == (False, True)
    words = ("tasks.settings=fast_dllm", "tasks.add_bos=false", "tasks.chat_template=true")
    own = load(composed("model=dream_v0_7b_base", "tasks=gsm8k", *words))
    assert (own.chat_template, own.add_bos) == (True, False)
    assert (own.answers()["gsm8k"].chat_template, own.answers()["gsm8k"].add_bos) == (True, False)


def test_the_plan_of_a_made_checkpoint_is_described(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(checkpoint, tmp_path / "instruct")
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    words = ["model=llada_8b_instruct", "tasks.names=[gsm8k,humaneval]", "tasks.settings=fast_dllm"]
    words += ["eval.allow_code_execution=true", "sampler.steps=128", "tasks.chat_template=false"]
    plan = check_cell(composed(*words, f"model.path={checkpoint}", f"tasks.data_dir={data}"))
    text = describe(plan, "x")
    assert "gsm8k: settings fast_dllm, gen_length=256, steps=128, block_length=32" in text
    assert "gsm8k: published 79.3 (exact_match, filter not stated, n=1319, settings fast_dllm; here " in text
    assert "; here chat_template=False, steps=128)" in text
    assert "humaneval: published 41.5" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tasks=gsm8k"], "gsm8k needs test.jsonl and, for its 5 examples, train.jsonl"),
        (["tasks=gsm8k", "tasks.data_dir=/no/such"], "tasks.data_dir=/no/such is no folder"),
        (["tasks=gsm8k", "tasks.data_dir={data}", "tasks.num_fewshot=10"], "gsm8k asks for 10 examples"),
        (["tasks=mmlu", "tasks.data_dir={data}"], "mmlu/abstract_algebra/test.jsonl is missing"),
        (
            ["tasks=gsm8k", "tasks.data_dir={data}", "tasks.settings=qdlm"],
            "no row for model mini and task gsm8k",
        ),
        (
            ["tasks=gsm8k", "tasks.settings=nope"],
            "tasks.settings=nope is not known; there are default, llada_paper",
        ),
        (["tasks=mini_gsm", "tasks.num_fewshot=1"], "mini_gsm takes no examples"),
        (["tasks=humaneval", "tasks.data_dir={data}"], "Scoring humaneval runs programs"),
        (["tasks.names=[gsm8kk]"], "Did you mean gsm8k?"),
        (["tasks.num_fewshot=-1"], "tasks.num_fewshot=-1 is too small"),
        (["+tasks.explicit=[]"], "there is no key tasks.explicit"),
        (["+explicit=[a]"], "there is no key explicit"),
    ],
)
def test_wrong_input_is_found_without_weights(words: list[str], message: str, data: Path) -> None:
    with pytest.raises(ValueError) as error:
        check_cell(composed(*(word.format(data=data) for word in words)))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_missing_chat_template_is_found_without_weights(checkpoint: Path, data: Path) -> None:
    words = ["tasks=gsm8k", f"tasks.data_dir={data}", "model=llada_8b_instruct", f"model.path={checkpoint}"]
    said = rf"^prompts are to be wrapped in a chat template, but {checkpoint} has none .*tasks\.chat_template"
    for more in ([], ["tasks.settings=llada_paper", "model.chat_template=false"]):  # the row asks for it too
        with pytest.raises(ValueError, match=said):
            check_cell(composed(*words, *more))
    check_cell(composed(*words, "tasks.settings=llada_paper", "tasks.chat_template=false"))
    (checkpoint / "chat_template.jinja").write_text("{{ messages[0].content }}")
    try:
        check_cell(composed(*words))
    finally:
        (checkpoint / "chat_template.jinja").unlink()


def test_the_fingerprint_holds_data_settings_and_lm_eval(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_task(tmp_path / "a", "gsm8k")
    words = ("tasks=gsm8k", "model=llada_8b_instruct", f"model.path={checkpoint}")

    def key(*more: str, where: Path = folder) -> str:
        return fingerprint(load(composed(*words, f"tasks.data_dir={where}", *more)), "cpu")

    first = key()
    moved = write_task(tmp_path / "b", "gsm8k")
    assert key(where=moved) == first  # what counts is in the files, not where they are
    keys = {first, key("tasks.settings=qdlm"), key("tasks.settings=fast_dllm"), key("tasks.num_fewshot=1")}
    keys.add(
        key("tasks.settings=fast_dllm", "sampler.block_length=32")
    )  # the default's value, set: another config
    assert len(keys) >= 4
    write_rows(folder / "gsm8k" / "train.jsonl", [MAKE["gsm8k"](i) for i in range(6)])
    assert key() != first and key("tasks.num_fewshot=0") == key("tasks.num_fewshot=0", where=moved)
    monkeypatch.setattr("dllmq.config.fingerprints.version", lambda name: "0.0")
    assert key(where=moved) != first


@pytest.mark.slow
def test_from_a_made_folder_and_local_files_to_scores(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("gsm8k", "humaneval", "mmlu"):
        write_task(tmp_path / "data", name)
    words = [
        "model=llada_8b_base", f"model.path={checkpoint}", "tasks.names=[gsm8k,humaneval,mmlu]", "device=cpu",
        "tasks.settings=llada_paper", f"tasks.data_dir={tmp_path / 'data'}", "eval.allow_code_execution=true",
        "tasks.num_fewshot=0", "sampler.gen_length=16", "eval.limit=2", "tracker=none", "method=rtn",
        "calibration.num_prompts=2", "calibration.num_states=2", "eval.fidelity_states=4",
        "eval.fidelity_prompts=2", "sampler.block_length=16", "sampler.steps=4",
        f"cache_dir={tmp_path / 'cache'}", f"hydra.run.dir={tmp_path / 'sweep' / 'run'}",
    ]  # fmt: skip
    done = forked.run(tmp_path, "dllmq.run", *words)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "sweep" / "run" / "results.json").read_text())
    assert {name: len(next(iter(v.values()))) for name, v in record["per_problem"].items()} == {
        "gsm8k": 2, "humaneval": 2, "mmlu": 114,
    }  # fmt: skip
    notes = record["notes"]
    assert notes["published"]["gsm8k"][0]["score"] == 70.3 and len(notes["subtasks"]["mmlu"]) == 57
    used = notes["settings"]["gsm8k"]
    assert used["sampler"]["gen_length"] == 16 and used["eos_cut"] == "none" and used["num_fewshot"] == 0
    assert notes["settings"]["mmlu"]["mc_num"] == 1
    baseline = json.loads((tmp_path / "sweep" / "baseline.json").read_text())
    assert baseline["notes"]["settings"] == notes["settings"]
