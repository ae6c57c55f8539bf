"""Answers that changed: what is counted, what is shown, and what a bad file says."""

import dataclasses
import json

import pytest

from dllmq.report.results import load_sweep, write_json_atomic
from dllmq.report.samples import LENGTH, changed_answers
from tests.report.records_factory import baseline, record, write_samples

TASK = "mini_gsm"


def only(run, values, task=TASK):
    """The run with one task and these per-problem values."""
    return dataclasses.replace(
        run,
        scores={task: {"exact_match": {"value": sum(values) / len(values), "stderr": 0.1, "n": len(values)}}},
        per_problem={task: {"exact_match": values}},
    )


def write(folder, full, *runs):
    for place, run in ((folder, only(baseline(), full)), *((folder / r.run_name, r) for r in runs)):
        name = "baseline.json" if place == folder else "results.json"
        write_json_atomic(place / name, run)
        write_samples(place, run)
    return load_sweep(folder)


def test_lost_and_won_are_counted_against_full_precision_and_lost_ones_come_first(tmp_path):
    sweep = write(tmp_path, [1.0, 1.0, 0.0, 0.0, 1.0], only(record("gptq"), [1.0, 0.0, 1.0, 0.0, 0.0]))
    (found,) = changed_answers(sweep, tmp_path)
    assert (found.problems, found.lost, found.won) == (5, (2,), (1,))
    assert [(c.problem, c.lost) for c in found.shown] == [
        (f"{TASK}/test/1", True),
        (f"{TASK}/test/4", True),
        (f"{TASK}/test/2", False),
    ]
    change = found.shown[0]
    assert (change.before.value, change.after.value) == (1.0, 0.0)
    assert change.before.response == " 1+18=19 balls.\n#### 19"
    assert change.after.response == " 1+18=18 balls.\n#### 18"


def test_won_ones_keep_a_third_of_the_room(tmp_path):
    full, run = [1.0] * 30 + [0.0] * 30, [0.0] * 30 + [1.0] * 30
    (found,) = changed_answers(write(tmp_path, full, only(record("gptq"), run)), tmp_path)
    assert [c.lost for c in found.shown] == [True] * 4 + [False] * 2


def test_the_room_of_the_page_is_divided_evenly(tmp_path):
    runs = [only(record("gptq", group_size=g), [0.0] * 20) for g in (32, 64, 128)]
    sweep = write(tmp_path, [1.0] * 20, *runs)
    assert [len(g.shown) for g in changed_answers(sweep, tmp_path, on_page=14)] == [4, 4, 4]
    assert [len(g.shown) for g in changed_answers(sweep, tmp_path, on_page=2)] == [1, 1, 0]
    assert [g.lost for g in changed_answers(sweep, tmp_path, on_page=2)] == [(20,)] * 3


def test_seeds_are_counted_each_and_the_first_one_is_shown(tmp_path):
    runs = [only(record("gptq", seed=s), values) for s, values in ((0, [0.0, 1.0]), (1, [0.0, 0.0]))]
    runs = [dataclasses.replace(r, seed=s) for s, r in enumerate(runs)]
    (found,) = changed_answers(write(tmp_path, [1.0, 1.0], *runs), tmp_path)
    assert (found.lost, found.won) == ((1, 2), (0, 0))
    assert [c.problem for c in found.shown] == [f"{TASK}/test/0"]


def test_without_samples_or_reference_nothing_is_found(tmp_path):
    sweep = write(tmp_path, [1.0], only(record("gptq"), [0.0]))
    assert len(changed_answers(sweep, tmp_path)) == 1
    assert changed_answers(dataclasses.replace(sweep, baseline=None), tmp_path) == []
    (tmp_path / f"samples_{TASK}.jsonl").unlink()
    assert changed_answers(sweep, tmp_path) == []


def test_full_precision_of_other_settings_is_no_reference(tmp_path):
    run = dataclasses.replace(only(record("gptq"), [0.0]), notes={"baseline": "another"})
    assert changed_answers(write(tmp_path, [1.0], run), tmp_path) == []


def test_a_problem_with_another_prompt_is_not_compared(tmp_path):
    run = only(record("gptq"), [0.0, 0.0])
    sweep = write(tmp_path, [1.0, 1.0], run)
    path = tmp_path / run.run_name / f"samples_{TASK}.jsonl"
    first, second = map(json.loads, path.read_text().splitlines())
    path.write_text(json.dumps(first | {"prompt": "another"}) + "\n" + json.dumps(second) + "\n")
    (found,) = changed_answers(sweep, tmp_path)
    assert (found.problems, found.lost) == (1, (1,))


def test_what_the_filter_read_is_shown_for_a_filtered_metric(tmp_path):
    sweep = write(tmp_path, [1.0], only(record("gptq"), [0.0]))
    for place in (tmp_path, tmp_path / sweep.records[0].run_name):
        path = place / f"samples_{TASK}.jsonl"
        sample = json.loads(path.read_text())
        sample["exact_match,strict-match"] = sample.pop("exact_match")
        path.write_text(json.dumps(sample))
    renamed = [
        dataclasses.replace(r, scores={TASK: {"exact_match,strict-match": r.scores[TASK]["exact_match"]}})
        for r in (sweep.baseline, *sweep.records)
    ]
    sweep = dataclasses.replace(sweep, baseline=renamed[0], records=tuple(renamed[1:]))
    (found,) = changed_answers(sweep, tmp_path)
    assert (found.shown[0].before.read_as, found.shown[0].after.read_as) == ("18", "17")


def test_long_texts_are_cut_and_a_prompt_keeps_its_end(tmp_path):
    run = only(record("gptq"), [0.0])
    sweep = write(tmp_path, [1.0], run)
    for place in (tmp_path, tmp_path / run.run_name):
        path = place / f"samples_{TASK}.jsonl"
        texts = {"prompt": "shot " * 900 + "QUESTION", "response": "x" * 5000, "target": "y" * 1200}
        path.write_text(json.dumps(json.loads(path.read_text()) | texts))
    (change,) = changed_answers(sweep, tmp_path)[0].shown
    assert [len(t) for t in (change.prompt, change.after.response, change.target)] == [LENGTH] * 3
    assert change.prompt.startswith("… ") and change.prompt.endswith("QUESTION")
    assert change.after.response.endswith("x …")
    assert change.target == "y" * 1200


@pytest.mark.parametrize("line", ["{", "[1]", '{"id": 3}'])
def test_a_bad_line_is_named(tmp_path, line):
    run = only(record("gptq"), [0.0])
    sweep = write(tmp_path, [1.0], run)
    path = tmp_path / run.run_name / f"samples_{TASK}.jsonl"
    path.write_text(path.read_text() + line)
    with pytest.raises(ValueError, match=rf"{run.run_name}.*line 2.*run that cell again"):
        changed_answers(sweep, tmp_path)
