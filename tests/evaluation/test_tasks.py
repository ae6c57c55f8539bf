"""Tasks: names are checked at once, scores come from lm-eval's own filters and metrics, written plainly."""

import json
import logging
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from dllmq.diffusion import SamplerConfig
from dllmq.evaluation.settings import EvalSettings
from dllmq.evaluation.tasks import (
    FOLDER,
    EvalResult,
    build_task_configs,
    check_code_execution,
    check_tasks,
    evaluate,
    generated_tasks,
    known_tasks,
    score_task,
    task_config,
    task_defaults,
)
from dllmq.mini.tasks import TASKS, problems

SETTINGS = EvalSettings(SamplerConfig(gen_length=16, steps=16, block_length=8), mc_num=8, mc_batch_size=8)
METRICS = {
    "mini_gsm": {"exact_match,strict-match", "exact_match,flexible-extract"},
    "mini_code": {"pass@1"},
    "mini_choice": {"acc", "acc_norm"},
}


class Oracle(LM):
    """Answers with the references, or with something that is always wrong."""

    def __init__(self, right: bool) -> None:
        super().__init__()
        self.right = right

    def generate_until(self, requests: list[Instance]) -> list[str]:
        if not self.right:
            return ["    return 'wrong'\n#### 0" for _ in requests]
        return [r.doc.get("canonical_solution") or " " + r.doc["answer"] for r in requests]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        def is_reference(r: Instance) -> bool:
            choices = r.doc["choices"]
            return r.args[1] == " " + choices["text"][choices["label"].index(r.doc["answerKey"])]

        return [(-1.0 if is_reference(r) == self.right else -1e6, False) for r in requests]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def result(model, tokenizer, work_dir) -> EvalResult:
    return evaluate(model, tokenizer, TASKS, SETTINGS, 4, allow_code_execution=True, work_dir=work_dir)


# --- names


def test_every_mini_task_is_known() -> None:
    assert set(generated_tasks()) == set(TASKS)
    assert all(task_config(name)["task"] == name for name in generated_tasks())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["mini_gms"], r"Unknown task 'mini_gms'; there are mini_choice.* Did you mean mini_gsm\?"),
        (["mini_gsm", "zzz"], r"Unknown task 'zzz'; there are mini_choice, mini_code, mini_gsm, gsm8k"),
        ([], "No task is named; there are mini_choice"),
        (["mini_gsm", "mini_gsm"], "mini_gsm is named twice"),
        (["../mini_gsm"], "Unknown task"),
    ],
)
def test_wrong_names_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_tasks(names)


def test_checks_are_fast_and_need_no_lm_eval() -> None:
    program = (
        "import sys; from dllmq.evaluation.tasks import *; check_tasks(['mini_gsm', 'mini_code']);"
        "check_code_execution(['mini_gsm'], False);"
        "assert not {'lm_eval', 'datasets', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    start = time.process_time()
    check_tasks(known_tasks())
    assert time.process_time() - start < 2


def test_running_code_needs_the_opt_in(model, tokenizer, tmp_path: Path) -> None:
    check_code_execution(["mini_gsm", "mini_choice"], allowed=False)
    check_code_execution(["mini_code"], allowed=True)
    with pytest.raises(ValueError, match=r"mini_code runs programs .* eval\.allow_code_execution=true"):
        check_code_execution(["mini_gsm", "mini_code"], allowed=False)
    with pytest.raises(ValueError, match=r"eval\.allow_code_execution=true"):
        evaluate(model, tokenizer, ["mini_code"], SETTINGS, 2, work_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_limit_must_be_positive(model, tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"limit must be an integer >= 1.* got 0"):
        evaluate(model, tokenizer, ["mini_gsm"], SETTINGS, 0, work_dir=tmp_path)


# --- definitions


def installed(task: str) -> dict[str, Any]:
    """lm-eval's own task file, functions left out."""
    import lm_eval

    class Loader(yaml.SafeLoader): ...

    Loader.add_constructor("!function", lambda loader, node: None)
    return yaml.load((Path(lm_eval.__file__).parent / "tasks" / task).read_text(), Loader)


@pytest.mark.parametrize(
    ("name", "original", "same"),
    [
        (
            "mini_gsm",
            "gsm8k/gsm8k.yaml",
            ["doc_to_text", "doc_to_target", "metric_list", "generation_kwargs", "filter_list", "repeats"],
        ),
        ("mini_code", "humaneval/humaneval.yaml", ["doc_to_text", "doc_to_target", "unsafe_code", "repeats"]),
        (
            "mini_choice",
            "arc/arc_easy.yaml",
            ["doc_to_text", "doc_to_target", "doc_to_choice", "metric_list", "output_type"],
        ),
    ],
)
def test_definitions_are_the_fields_own(name: str, original: str, same: list[str]) -> None:
    ours, theirs = task_config(name), installed(original)
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
    if name == "mini_code":
        assert ours["generation_kwargs"]["until"] == theirs["generation_kwargs"]["until"]


def test_defaults_are_valid_settings() -> None:
    assert SamplerConfig(**task_defaults("mini_gsm")) == SamplerConfig(48, 48, 16)
    assert SamplerConfig(**task_defaults("mini_code")).gen_length == 48
    assert EvalSettings(**task_defaults("mini_choice")).mc_num == 16


def test_problems_are_the_first_of_the_test_split(tmp_path: Path) -> None:
    (config,) = build_task_configs(["mini_gsm"], 5, tmp_path)
    file = Path(config["dataset_kwargs"]["data_files"]["test"])
    assert file.parent == tmp_path and [p.name for p in tmp_path.iterdir()] == [file.name]
    assert [json.loads(line) for line in file.read_text().splitlines()] == problems("mini_gsm", "test", 5)
    os.utime(file, (1, 1))
    build_task_configs(["mini_gsm"], 5, tmp_path)
    assert file.stat().st_mtime == 1  # an unchanged file is left alone
    file.write_text("damaged")
    build_task_configs(["mini_gsm"], 5, tmp_path)
    assert len(file.read_text().splitlines()) == 5


def test_stock_lm_eval_indexes_the_folder() -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
    assert manager.all_subtasks == list(generated_tasks())


# --- scores


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("right", [True, False])
def test_references_score_1_and_wrong_answers_0(name: str, right: bool, work_dir: Path) -> None:
    scored = score_task(Oracle(right), name, 6, work_dir)
    expected = {"value": float(right), "stderr": 0.0, "n": 6}
    assert scored.scores[name] == dict.fromkeys(METRICS[name], expected)
    assert scored.per_problem[name] == dict.fromkeys(METRICS[name], [float(right)] * 6)


def test_result_has_the_promised_form(result: EvalResult) -> None:
    json.dumps(vars(result), allow_nan=False)
    for name, metrics in METRICS.items():
        assert set(result.scores[name]) == set(result.per_problem[name]) == metrics
        assert [sample["doc_id"] for sample in result.samples[name]] == [0, 1, 2, 3]
        for metric in metrics:
            values = result.per_problem[name][metric]
            score = result.scores[name][metric]
            assert values == [sample[metric] for sample in result.samples[name]]
            assert score["value"] == pytest.approx(sum(values) / 4) and score["n"] == 4
            spread = sum((v - score["value"]) ** 2 for v in values) / 3
            assert score["stderr"] == pytest.approx(math.sqrt(spread / 4))
    assert set(result.counters["mini_gsm"]) == {
        "requests", "forwards", "positions", "answer_forwards", "generated_tokens", "truncated",
        "batch_size", "halved_from", "seconds",
    }  # fmt: skip
    assert result.counters["mini_gsm"]["forwards"] == 16
    assert result.counters["mini_choice"]["requests"] == 16


def test_samples_say_what_was_asked_and_answered(result: EvalResult) -> None:
    (gsm, code, choice) = (result.samples[name][0] for name in ("mini_gsm", "mini_code", "mini_choice"))
    doc = problems("mini_gsm", "test", 1)[0]
    assert gsm["id"] == doc["id"] and gsm["target"] == doc["answer"]
    assert gsm["prompt"] == f"Question: {doc['question']}\nAnswer:"
    assert set(gsm["filtered"]) == {"strict-match", "flexible-extract"}
    program = problems("mini_code", "test", 1)[0]
    assert code["prompt"] == program["prompt"]  # its final newline included
    assert code["filtered"]["run_tests"][0]["status"] in ("failed", "timeout", "memory")
    assert len(choice["log_likelihoods"]) == 4 and max(choice["log_likelihoods"]) < 0
    best = choice["log_likelihoods"].index(max(choice["log_likelihoods"]))
    assert choice["response"] == " " + problems("mini_choice", "test", 1)[0]["choices"]["text"][best]


def test_a_tasks_numbers_do_not_depend_on_other_tasks_or_the_global_generators(
    model, tokenizer, work_dir, result
) -> None:
    torch.manual_seed(7)
    state, noise = torch.get_rng_state(), np.random.get_state()[1].copy()
    for name in ("mini_choice", "mini_gsm"):
        alone = evaluate(model, tokenizer, [name], {name: SETTINGS}, 4, work_dir=work_dir)
        assert alone.samples[name] == result.samples[name]
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == noise).all()


def test_chat_template_wraps_the_prompt(model, tokenizer, work_dir) -> None:
    settings = EvalSettings(SETTINGS.sampler, chat_template=True)
    (sample,) = evaluate(model, tokenizer, ["mini_gsm"], settings, 1, work_dir=work_dir).samples["mini_gsm"]
    question = problems("mini_gsm", "test", 1)[0]["question"]
    message = {"role": "user", "content": f"Question: {question}\nAnswer:"}
    expected = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    assert sample["prompt"] == expected


def test_one_line_per_task_and_nothing_else_is_said(
    model, tokenizer, work_dir, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[tuple[int, int, str]] = []
    with caplog.at_level(logging.INFO):
        evaluate(
            model, tokenizer, ["mini_gsm"], SETTINGS, 2, work_dir=work_dir, progress=lambda *a: seen.append(a)
        )
    assert [r.name for r in caplog.records] == ["dllmq.evaluation.tasks"]
    assert "mini_gsm: exact_match,strict-match 0.000 +- 0.000" in caplog.text and "(n=2)" in caplog.text
    assert capfd.readouterr() == ("", "")
    assert seen[-1] == (16, 16, "mini_gsm: denoising steps")


def test_one_problem_has_no_standard_error(work_dir: Path) -> None:
    score = score_task(Oracle(True), "mini_gsm", 1, work_dir).scores["mini_gsm"]["exact_match,strict-match"]
    assert score["value"] == 1.0 and math.isnan(score["stderr"])


def test_results_join() -> None:
    left, right = EvalResult(scores={"a": {}}), EvalResult(scores={"b": {}}, counters={"b": {"forwards": 1}})
    assert left | right == EvalResult(scores={"a": {}, "b": {}}, counters={"b": {"forwards": 1}})
