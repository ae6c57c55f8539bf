"""Published tasks: prompts byte-equal to stock lm-eval's, scores of known answers, wrong input."""

import copy
import importlib.metadata
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import pytest
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.config.group import AggMetricConfig
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from task_files import MAKE, write_rows, write_task

from dllmq.diffusion import SamplerConfig
from dllmq.evaluation import benchmarks, task_data
from dllmq.evaluation.benchmarks import Benchmark, benchmark
from dllmq.evaluation.settings import EvalSettings
from dllmq.evaluation.tasks import EvalResult, _quiet_lm_eval, evaluate, known_tasks, score_task

TASKS_FOLDER = Path(lm_eval.__file__).parent / "tasks"
SINGLE = {
    "gsm8k": "gsm8k/gsm8k.yaml",
    "humaneval": "humaneval/humaneval.yaml",
    "mbpp": "mbpp/mbpp.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "truthfulqa_mc2": "truthfulqa/truthfulqa_mc2.yaml",
    "gpqa": "gpqa/n_shot/gpqa_main_n_shot.yaml",
}
MEMBERS = {
    "mmlu": ["mmlu/default/mmlu_abstract_algebra.yaml", "mmlu/default/mmlu_anatomy.yaml"],
    "minerva_math": [
        "minerva_math/minerva_math_algebra.yaml",
        "minerva_math/minerva_math_counting_and_prob.yaml",
    ],
    "cmmlu": ["cmmlu/cmmlu_agronomy.yaml", "cmmlu/cmmlu_anatomy.yaml"],
    "ceval-valid": ["ceval/ceval-valid_computer_network.yaml", "ceval/ceval-valid_operating_system.yaml"],
}
GENERATING = ("gsm8k", "minerva_math", "humaneval", "mbpp")


class Recorder(LM):
    """Answers each request with `answer(request)` and remembers what it was asked."""

    tokenizer_name = "none"

    def __init__(self, answer: Callable[[Instance], Any]) -> None:
        super().__init__()
        self.answer, self.asked = answer, []

    def generate_until(self, requests: list[Instance]) -> list[str]:
        self.asked += [(r.task_name, r.args[0], r.args[1]["until"]) for r in requests]
        return [self.answer(r) for r in requests]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        self.asked += [(r.task_name, *r.args) for r in requests]
        return [(self.answer(r), False) for r in requests]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError


def blank(request: Instance) -> Any:
    return "" if request.request_type == "generate_until" else -1.0


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """What keeps stock lm-eval from loading humaneval, mbpp and minerva_math here, replaced by stubs."""
    import evaluate as hf_evaluate

    stub = SimpleNamespace(compute=lambda **_: ({"pass@1": 0.0},))
    monkeypatch.setattr(hf_evaluate, "load", lambda name: stub)
    monkeypatch.setitem(
        sys.modules, "math_verify", SimpleNamespace(parse=str, verify=lambda gold, target: False)
    )
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "4.11" if name.startswith("antlr4") else real(name)
    )


@pytest.fixture
def two_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Benchmark]:
    """Makes a group its first two subtasks: seconds less."""

    def cut(name: str) -> Benchmark:
        own = replace(benchmark(name), subtasks=benchmark(name).subtasks[:2])
        for module in (benchmarks, task_data):
            whole = benchmark
            monkeypatch.setattr(module, "benchmark", lambda n, whole=whole: own if n == name else whole(n))
        return own

    return cut


def stock(file: str, folder: Path, num_fewshot: int | None, once: bool = False) -> dict[str, Any]:
    """lm-eval's own definition, loaded by lm-eval, on the same local files read by `datasets`."""
    config = load_yaml(TASKS_FOLDER / file)
    config["dataset_kwargs"] = {"data_files": {f.stem: str(f) for f in sorted(folder.glob("*.jsonl"))}}
    config |= {"dataset_path": "json", "dataset_name": None}
    if num_fewshot is not None:
        config["num_fewshot"] = num_fewshot
    for key in ("training_split", "validation_split"):
        if config.get(key) not in {f.stem for f in folder.glob("*.jsonl")}:
            config[key] = None
    if once:
        process, found = config["process_docs"], []
        config["process_docs"] = lambda split: found[0] if found else found.append(process(split)) or found[0]
    return config


def asked_by(configs: list[dict[str, Any]], lm: LM | None = None) -> list[Any]:
    recorder = lm or Recorder(blank)
    evaluate_stock(recorder, configs)
    return recorder.asked


def evaluate_stock(lm: LM, configs: list[dict[str, Any]]) -> dict[str, Any]:
    with _quiet_lm_eval():  # its report of the machine takes seconds
        return lm_eval.simple_evaluate(
            model=lm,
            tasks=configs,
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
            confirm_run_unsafe_code=True,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )


def asked_here(name: str, num_fewshot: int | None, folder: Path) -> list[Any]:
    recorder = Recorder(blank)
    score_task(recorder, name, None, folder, EvalSettings(num_fewshot=num_fewshot), folder)
    return recorder.asked


# ------------------------------------------------------------------ prompts


@pytest.mark.parametrize(
    ("name", "shots"),
    [
        ("gsm8k", None), ("gsm8k", 0), ("gsm8k", 4), ("humaneval", None), ("mbpp", None), ("mbpp", 0),
        ("arc_easy", None), ("arc_challenge", 3), ("hellaswag", None), ("winogrande", 5), ("piqa", None),
        ("truthfulqa_mc2", None), ("gpqa", 5),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("importable")
def test_requests_are_byte_equal_to_stock_lm_evals(name: str, shots: int | None, tmp_path: Path) -> None:
    folder = write_task(tmp_path, name)
    expected = asked_by([stock(SINGLE[name], folder / name, shots, once=name == "gpqa")])
    assert asked_here(name, shots, folder) == expected
    prompts = [prompt for _, prompt, _ in expected]
    assert len(set(prompts)) >= 3
    if name == "gsm8k":
        assert [prompt.count("Question: ") for prompt in prompts] == [1 + (5 if shots is None else shots)] * 3
    if name == "mbpp" and shots is None:
        assert [prompt.count("[DONE]") for prompt in prompts] == [3] * 3
        assert all(until == ["[DONE]"] for _, _, until in expected)


@pytest.mark.parametrize(
    ("name", "shots"), [("mmlu", 5), ("minerva_math", None), ("cmmlu", 5), ("ceval-valid", 2)]
)
@pytest.mark.usefixtures("importable")
def test_requests_of_groups_are_byte_equal_to_stock_lm_evals(
    name: str, shots: int | None, tmp_path: Path, two_of: Callable[[str], Benchmark]
) -> None:
    own = two_of(name)
    folder = write_task(tmp_path, name)
    files = [folder / name / subtask.subset for subtask in own.subtasks]
    expected = asked_by([stock(file, f, shots) for file, f in zip(MEMBERS[name], files, strict=True)])
    assert sorted(asked_here(name, shots, folder), key=repr) == sorted(expected, key=repr)
    assert {task for task, *_ in expected} == {subtask.name for subtask in own.subtasks}


def test_humanevals_prompt_is_the_problems_own(tmp_path: Path) -> None:
    """Its YAML's template, "{{prompt}}", and its stop strings."""
    asked = asked_here("humaneval", None, write_task(tmp_path, "humaneval"))
    until = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]
    assert asked == [("humaneval", MAKE["humaneval"](i)["prompt"], until) for i in range(3)]


def test_parquet_gives_the_same_requests_as_jsonl(tmp_path: Path) -> None:
    from datasets import Dataset

    lines, table = write_task(tmp_path / "lines", "arc_easy"), tmp_path / "table"
    for split in ("test", "train"):
        rows = [json.loads(line) for line in (lines / "arc_easy" / f"{split}.jsonl").read_text().splitlines()]
        (table / "arc_easy").mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows).to_parquet(str(table / "arc_easy" / f"{split}.parquet"))
    assert asked_here("arc_easy", 2, table) == asked_here("arc_easy", 2, lines)


def test_chat_turns(tokenizer, tmp_path: Path) -> None:
    """Fast-dLLM puts examples and question into one message; lm-eval's own way is a turn for each."""
    from dllmq.evaluation.harness import DiffusionLM

    folder, prompts = write_task(tmp_path, "gsm8k"), []
    for multiturn in (True, False):
        settings = EvalSettings(chat_template=True, fewshot_as_multiturn=multiturn, num_fewshot=2)
        lm = Recorder(blank)
        real = DiffusionLM.__new__(DiffusionLM)
        real.tokenizer = tokenizer
        for method in ("apply_chat_template", "chat_template"):
            setattr(lm, method, getattr(real, method))
        score_task(lm, "gsm8k", 1, tmp_path, settings, folder)
        prompts.append(lm.asked[0][1])
    plain = asked_here("gsm8k", 2, folder)[0][1]
    message = [{"role": "user", "content": plain}]
    assert prompts[1] == tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    turn = "<|start_header_id|>user<|end_header_id|>"
    assert [prompt.count(turn) for prompt in prompts] == [3, 1]
    assert prompts[0].count("<|start_header_id|>assistant<|end_header_id|>") == 3


# ------------------------------------------------------------------ scores


def scored(name: str, answers: Any, folder: Path, settings: EvalSettings | None = None) -> EvalResult:
    """Answers by the request's problem: a list in the order of the file, or a function."""
    answer = answers if callable(answers) else lambda request: answers[request.doc_id]
    return score_task(Recorder(answer), name, None, folder, settings or EvalSettings(num_fewshot=0), folder)


def test_gsm8ks_two_filters(tmp_path: Path) -> None:
    """Answers 1, 4, 7: strict-match wants "#### n", flexible-extract takes the last number."""
    folder = write_task(tmp_path, "gsm8k")
    result = scored("gsm8k", ["So 1.\n#### 1", "It is $4.", "1 + 6 = 7\n#### 8"], folder)
    assert result.per_problem["gsm8k"] == {
        "exact_match,strict-match": [1.0, 0.0, 0.0],
        "exact_match,flexible-extract": [1.0, 1.0, 0.0],
    }
    assert result.scores["gsm8k"]["exact_match,flexible-extract"]["value"] == pytest.approx(2 / 3)


def test_minerva_math_scores_the_final_answer(tmp_path: Path, two_of: Callable[[str], Benchmark]) -> None:
    """Right are 0/2, 1/2, 2/2 in the first subtask, 10/2 ... 13/2 in the second."""
    first, second = (subtask.name for subtask in two_of("minerva_math").subtasks)
    words = "Final Answer: The final answer is {}. I hope it is correct."
    texts = {
        (first, 0): words.format("$\\frac{0}{2}$"),
        (first, 1): words.format("$0.5$"),
        (first, 2): "The answer is 1.",
        (second, 0): "Final Answer: The final answer is $5$. I hope",
        (second, 1): words.format("$\\dfrac{11}2$"),
        (second, 2): words.format("$13/2$"),
        (second, 3): words.format("$6.5$"),
    }
    folder = write_task(tmp_path, "minerva_math")
    result = scored("minerva_math", lambda r: texts[r.task_name, r.doc_id], folder)
    assert result.per_problem["minerva_math"] == {"exact_match": [1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0]}
    assert result.scores["minerva_math"]["exact_match"]["value"] == pytest.approx(4 / 7)
    values = {
        name: metrics["exact_match"]["value"] for name, metrics in result.subtasks["minerva_math"].items()
    }
    assert values == {"minerva_math_algebra": pytest.approx(2 / 3), "minerva_math_counting_and_prob": 0.5}


def test_humaneval_runs_the_completion(tmp_path: Path) -> None:
    folder = write_task(tmp_path, "humaneval", scored=4)
    answers = ["    return x\n", "    return x + 1", "    return 5", "    import os; os._exit(0)"]
    result = scored("humaneval", answers, folder)
    assert result.per_problem["humaneval"] == {"pass@1": [1.0, 1.0, 0.0, 0.0]}
    assert [s["id"] for s in result.samples["humaneval"]] == [f"HumanEval/{i}" for i in range(4)]


def test_mbpp_runs_the_answer_against_the_asserts(tmp_path: Path) -> None:
    folder = write_task(tmp_path, "mbpp", scored=4)
    chat = "Here:\n```python\ndef shifted(p):\n    return tuple(x + 3 for x in p)\n```\nDone."
    answers = [MAKE["mbpp"](0)["code"], "def shifted(p):\n  return p", "print('passed')", chat]
    assert scored("mbpp", answers, folder).per_problem["mbpp"] == {"pass@1": [1.0, 0.0, 0.0, 0.0]}
    settings = EvalSettings(num_fewshot=0, postprocess="take_function")
    assert scored("mbpp", answers, folder, settings).per_problem["mbpp"] == {"pass@1": [1.0, 0.0, 0.0, 1.0]}


def test_a_group_is_aggregated_as_by_lm_eval(tmp_path: Path, two_of: Callable[[str], Benchmark]) -> None:
    """3 problems of one subject and 4 of another; "B" is always chosen, right where the number is odd."""
    own = two_of("mmlu")
    folder = write_task(tmp_path, "mmlu")
    choose_b = Recorder(lambda r: 0.0 if r.args[1] == " B" else -5.0)
    result = score_task(choose_b, "mmlu", None, tmp_path, EvalSettings(), folder)
    files = [folder / "mmlu" / subtask.subset for subtask in own.subtasks]
    manager = TaskManager(include_defaults=False)
    definition = load_yaml(TASKS_FOLDER / "mmlu/default/_mmlu.yaml")
    metrics = [AggMetricConfig(**metric) for metric in definition["aggregate_metric_list"]]
    group = Group("all", aggregate_metric_list=metrics)
    for file, f in zip(MEMBERS["mmlu"], files, strict=True):
        for task in manager.load([stock(file, f, None)])["tasks"].values():
            group.add(task)
    theirs = evaluate_stock(choose_b, [group])["groups"]["all"]["acc,none"]
    assert result.scores["mmlu"]["acc"]["value"] == pytest.approx(theirs) == pytest.approx(3 / 7)
    by_subject = {name: scores["acc"]["value"] for name, scores in result.subtasks["mmlu"].items()}
    assert by_subject == {"mmlu_abstract_algebra": pytest.approx(1 / 3), "mmlu_anatomy": 0.5}
    assert result.per_problem["mmlu"]["acc"] == [0, 1, 0, 0, 1, 0, 1]
    assert [s["doc_id"] for s in result.samples["mmlu"]] == list(range(7))
    assert [s["subtask"] for s in result.samples["mmlu"]].count("mmlu_anatomy") == 4


def test_likelihoods_are_compared_with_and_without_length(tmp_path: Path) -> None:
    """Per character: "heat water." has 11, "freeze water." 13; the longer answer wins by acc_norm alone."""
    folder = write_task(tmp_path, "piqa")
    result = scored("piqa", lambda r: -11.0 if "heat" in r.args[1] else -12.0, folder)
    assert result.per_problem["piqa"] == {"acc": [1, 0, 1], "acc_norm": [0, 1, 0]}


def test_truthfulqa_mc2_is_the_mass_of_the_true_answers(tmp_path: Path) -> None:
    p = {" It is water.": 0.5, " It is milk.": 0.25, " Nobody knows.": 0.25}
    result = scored(
        "truthfulqa_mc2", lambda r: math.log(p[r.args[1]]), write_task(tmp_path, "truthfulqa_mc2")
    )
    assert result.per_problem["truthfulqa_mc2"]["acc"] == pytest.approx([0.75] * 3)


def test_winogrande_records_the_chosen_option(tmp_path: Path) -> None:
    folder = write_task(tmp_path, "winogrande")
    result = scored("winogrande", lambda r: 0.0 if r.args[0].endswith("Lee") else -1.0, folder)
    assert result.per_problem["winogrande"]["acc"] == [0.0, 1.0, 0.0]
    assert result.samples["winogrande"][0]["response"] == "Kim paid Lee 0 coins because Lee"


def test_gpqas_right_answer_is_that_of_the_prompt(tmp_path: Path) -> None:
    """The choices are shuffled by lm-eval's generator; an oracle that reads the prompt is always right."""
    folder = write_task(tmp_path, "gpqa")

    def knows(request: Instance) -> float:
        question = request.args[0].rpartition("Energy of ")[2]
        right = next(
            line for line in question.splitlines() if line.endswith(f") {question.partition('?')[0]} J")
        )
        return 0.0 if request.args[1].strip() == right[:3] else -9.0

    result = scored("gpqa", knows, folder, EvalSettings(num_fewshot=2))
    assert result.per_problem["gpqa"]["acc"] == [1.0] * 9


def test_a_missing_wrong_answer_of_gpqa_is_a_blank_choice(tmp_path: Path) -> None:
    rows = [MAKE["gpqa"](i) | {"Incorrect Answer 2": None if i else "x"} for i in range(3)]
    write_rows(tmp_path / "gpqa" / "train.jsonl", rows)
    check(tmp_path, "gpqa")
    prompts = [prompt for _, prompt, _ in asked_here("gpqa", 0, tmp_path)]
    assert (
        sum(")  \n" in prompt or prompt.count(")  ") > 0 for prompt in prompts) == 8
    )  # 2 problems, 4 choices


def test_the_limit_is_of_each_subtask(tmp_path: Path, two_of: Callable[[str], Benchmark]) -> None:
    two_of("mmlu")
    result = score_task(Recorder(blank), "mmlu", 2, tmp_path, EvalSettings(), write_task(tmp_path, "mmlu"))
    assert result.scores["mmlu"]["acc"]["n"] == 4


@pytest.fixture(scope="module")
def embedded() -> Iterator[Any]:
    from dllmq.config import EMBEDDED
    from dllmq.models.loading import load_model
    from dllmq.models.tokenizer import load_tokenizer

    yield load_model(EMBEDDED), load_tokenizer(EMBEDDED)


@pytest.mark.parametrize("shots", [0, 1])
def test_the_embedded_model_answers_gsm8k(embedded, shots: int, tmp_path: Path) -> None:
    folder = write_task(tmp_path, "gsm8k")
    settings = EvalSettings(SamplerConfig(32, 8, 16), num_fewshot=shots)
    result = evaluate(*embedded, ["gsm8k"], settings, None, work_dir=tmp_path, data_dir=folder)
    assert [s["prompt"] for s in result.samples["gsm8k"]] == [
        p for _, p, _ in asked_here("gsm8k", shots, folder)
    ]
    assert result.counters["gsm8k"]["requests"] == 3 and result.counters["gsm8k"]["forwards"] <= 8
    assert all(s["response"].strip() for s in result.samples["gsm8k"])
    again = evaluate(*embedded, ["gsm8k"], settings, None, work_dir=tmp_path, data_dir=folder)
    assert again.samples == result.samples


def test_bos_and_uncut_answers(embedded, tmp_path: Path) -> None:
    from dllmq.evaluation.harness import DiffusionLM

    model, tokenizer = embedded
    plain = DiffusionLM(model, tokenizer, EvalSettings()).encode_pair("1 + 1 =", " 2")
    lm = DiffusionLM(model, copy.deepcopy(tokenizer), EvalSettings(add_bos=True))
    lm.tokenizer.bos_token = "<|endoftext|>"
    assert lm.encode_pair("1 + 1 =", " 2") == ([lm.tokenizer.bos_token_id, *plain[0]], plain[1])
    lm.tokenizer.bos_token = None
    with pytest.raises(ValueError, match="the tokenizer has no BOS token"):
        lm.encode_pair("1 + 1 =", " 2")
    lm.tokenizer.chat_template = "<|endoftext|>{% for m in messages %}{{ m.content }}{% endfor %}"
    lm.apply_chat_template([{"role": "user", "content": "1 + 1 ="}])
    assert lm.encode_pair("1 + 1 =", " 2") == plain  # the template brings BOS
    request = Instance("generate_until", {}, ("x", {"until": ["b"]}), 0)
    tokens = tokenizer("a b c", add_special_tokens=False)["input_ids"]
    for until, text in (("task", "a "), ("none", "a b c")):
        assert DiffusionLM(model, tokenizer, EvalSettings(until=until))._finish(tokens, request) == text


# ------------------------------------------------------------------ wrong input


def check(folder: Path | None, name: str = "gsm8k", num_fewshot: int | None = None) -> None:
    task_data.check_data(name, num_fewshot, folder)


def test_without_files_and_network_the_error_says_what_to_put_where() -> None:
    with pytest.raises(ValueError) as error:
        check(None)
    assert str(error.value) == (
        "gsm8k needs test.jsonl and, for its 5 examples, train.jsonl (or .parquet), each line with question "
        "and answer, in <data_dir>/gsm8k; set tasks.data_dir to that <data_dir>, because openai/gsm8k cannot "
        "be read from the hub: HF_HUB_OFFLINE is set."
    )
    expected = (
        r"^mmlu needs test\.jsonl \(or \.parquet\), .* in <data_dir>/mmlu/<subset>, one folder for each of "
        r"abstract_algebra, anatomy, .*cais/mmlu cannot be read"
    )
    with pytest.raises(ValueError, match=expected):
        check(None, "mmlu")


def test_the_hub_is_asked_before_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name)
    answers = {"openai/openai_humaneval": "", "openai/gsm8k": "no route"}

    class Hub:
        def dataset_info(self, repository: str, timeout: float) -> None:
            if answers[repository]:
                raise ConnectionError(answers[repository])

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    task_data._asked.cache_clear()
    check(None, "humaneval")
    with pytest.raises(
        ValueError, match=r"openai/gsm8k cannot be read from the hub: ConnectionError, no route\.$"
    ):
        check(None)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    (tmp_path / "openai___gsm8k" / "main").mkdir(parents=True)
    check(None)
    task_data._asked.cache_clear()


def test_a_data_set_that_the_hub_does_not_give_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^piqa needs validation\.jsonl .* the hub did not give the data set: "
    ):
        score_task(Recorder(blank), "piqa", 1, tmp_path)


def test_complete_files_pass(tmp_path: Path) -> None:
    for name in sorted(SINGLE):
        check(write_task(tmp_path, name), name)
    (tmp_path / "gsm8k" / "train.jsonl").unlink()
    check(tmp_path, num_fewshot=0)


GSM = '{"question": "a", "answer": "b"}'
MMLU = '{"question": "a", "choices": ["1", "2", "3", "4"], "answer": 1}'
ARC = '{"question": "a", "choices": {"text": ["x"], "label": ["A"]}, "answerKey": "B"}'


@pytest.mark.parametrize(
    ("name", "file", "text", "shots", "message"),
    [
        ("gsm8k", "train", None, None, r"train\.jsonl is missing: gsm8k needs .* for its 5 examples"),
        ("gsm8k", "test", None, 0, r"test\.jsonl is missing: gsm8k needs test\.jsonl \(or"),
        ("gsm8k", "test", "", None, r"test\.jsonl has no lines; each line has question and answer\.$"),
        ("gsm8k", "test", GSM + '\n{"question', None, r"line 2 is not JSON \("),
        ("gsm8k", "test", "[1]", None, r"test\.jsonl, line 1 is no object; each line has question"),
        ("gsm8k", "test", GSM.replace("question", "q"), None,
         r"line 1 has no question, only q and answer; gsm8k needs question and answer"),
        ("gsm8k", "test", GSM.replace('"a"', "null"), None, r"line 1: question is null"),
        ("gsm8k", "test", GSM + "\n" + GSM.replace('"b"', "3"), None,
         r"line 2: answer is a int, in the lines before a str; give a column one type"),
        ("gsm8k", "test", b"\xff\xfe", None, r"test\.jsonl is no UTF-8 text \(byte 0\)"),
        ("gsm8k", None, None, 10, r"gsm8k asks for 10 examples, but its train file has 9 to draw from"),
        ("gsm8k", None, None, -1, r"tasks\.num_fewshot=-1 is too small"),
        ("gpqa", None, None, 9, r"gpqa asks for 9 examples, but its train file has 8 to draw from"),
        ("mbpp", None, None, 4, r"mbpp has 3 examples in its definition; got .*=4: ask for at most 3"),
        ("humaneval", None, None, 1, r"humaneval takes no examples; got tasks\.num_fewshot=1"),
        ("mmlu", "anatomy/test", None, None, r"mmlu/anatomy/test\.jsonl is missing: mmlu needs test\.jsonl"),
        ("mmlu", "anatomy/dev", MMLU, 5, r"mmlu/anatomy asks for 5 examples, but its dev file has 1"),
        ("mmlu", "anatomy/test", MMLU.replace(": 1}", ': "B"}'), None,
         r'anatomy/test\.jsonl, line 1: answer is "B"; allowed are 0, 1, 2 or 3\.'),
        ("mmlu", "anatomy/test", MMLU.replace(', "3", "4"', ""), None,
         r"line 1: choices is no list of at least 4 items"),
        ("arc_easy", "test", ARC.replace("text", "texts"), None, r"line 1: choices is no object with text"),
        ("arc_easy", "test", ARC, None, r'line 1: answerKey is "B", which choices\.label does not have'),
    ],
)  # fmt: skip
def test_wrong_files_are_one_sentence(
    name: str, file: str | None, text: str | bytes | None, shots: int | None, message: str, tmp_path: Path
) -> None:
    folder = write_task(tmp_path, name)
    if file is not None:
        path = folder / name / f"{file}.jsonl"
        path.unlink()
        if text is not None:
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as error:
        check(folder, name, shots)
    assert "\n" not in str(error.value)


def test_wrong_parquet_is_one_sentence(tmp_path: Path) -> None:
    from datasets import Dataset

    folder = tmp_path / "gsm8k"
    folder.mkdir()
    (folder / "test.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"test\.parquet cannot be read as parquet \(.*; write it again"):
        check(tmp_path, num_fewshot=0)
    Dataset.from_list([{"question": "a"}]).to_parquet(str(folder / "test.parquet"))
    with pytest.raises(ValueError, match=r"test\.parquet has no answer, only question"):
        check(tmp_path, num_fewshot=0)
    write_rows(folder / "test.jsonl", [MAKE["gsm8k"](1)])
    with pytest.raises(ValueError, match=r"has both test\.jsonl and test\.parquet; keep one"):
        check(tmp_path, num_fewshot=0)


def test_a_changed_file_is_read_again_and_changes_its_digest(tmp_path: Path) -> None:
    folder = write_task(tmp_path, "gsm8k")
    before = task_data.digests("gsm8k", None, folder)
    assert set(before) == {"gsm8k/test.jsonl", "gsm8k/train.jsonl"}
    assert set(task_data.digests("gsm8k", 0, folder)) == {"gsm8k/test.jsonl"}
    check(folder)
    write_rows(
        folder / "gsm8k" / "test.jsonl", [{"question": "a longer question than before, so another size"}] * 9
    )
    with pytest.raises(ValueError, match="has no answer"):
        check(folder)
    after = task_data.digests("gsm8k", None, folder)
    assert after["gsm8k/test.jsonl"] != before["gsm8k/test.jsonl"]
    assert after["gsm8k/train.jsonl"] == before["gsm8k/train.jsonl"]


# ------------------------------------------------------------------ the table


def test_every_group_is_lm_evals_and_weighted_by_size() -> None:
    sizes = {name: len(benchmark(name).subtasks) for name in MEMBERS}
    assert sizes == {"mmlu": 57, "minerva_math": 7, "cmmlu": 67, "ceval-valid": 52}
    assert set(MAKE) == set(benchmarks.names()) < set(known_tasks())


@pytest.mark.usefixtures("importable")
def test_numbers_of_fixed_examples_are_lm_evals() -> None:
    for name, file in {"mbpp": SINGLE["mbpp"], "minerva_math": MEMBERS["minerva_math"][0]}.items():
        config = load_yaml(TASKS_FOLDER / file)
        assert benchmark(name).examples == len(config["fewshot_config"]["samples"]()) == config["num_fewshot"]
    for name in ("humaneval", "truthfulqa_mc2"):
        assert load_yaml(TASKS_FOLDER / SINGLE[name])["num_fewshot"] == benchmark(name).examples == 0


def test_only_generating_tasks_generate() -> None:
    kinds = {n: {s.config["output_type"] for s in benchmark(n).subtasks} for n in benchmarks.names()}
    assert {n for n, kind in kinds.items() if kind == {"generate_until"}} == set(GENERATING)
    assert {n for n in benchmarks.names() if benchmark(n).runs_code} == {"humaneval", "mbpp"}


def test_a_long_prompt_of_any_task_is_found_before_the_first_is_scored(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("humaneval", "gsm8k"):
        write_task(tmp_path, name, 3)
    monkeypatch.setattr(model, "embed", lambda *_: pytest.fail("a forward was made"))
    settings = EvalSettings(SamplerConfig(gen_length=16, steps=16, block_length=16))
    each = {"humaneval": settings, "gsm8k": replace(settings, num_fewshot=8)}
    with pytest.raises(ValueError, match=r"^Problem 0 of gsm8k: its prompt has \d+ tokens"):
        evaluate(model, tokenizer, [*each], each, 2, True, tmp_path, data_dir=tmp_path)
