"""The published tasks (benchmarks.yaml) as the installed lm-eval defines them; it is not imported for it.

A definition is a YAML whose `!function utils.f` names a function in a Python file beside it. It is read here
as a plain dict, so that its data can be replaced by local files (`build`). Prompts, examples, stop strings,
filters and metrics stay lm-eval's, with three exceptions (`ours` in benchmarks.yaml):

    humaneval, mbpp  their utils.py loads a metric from a hub at import, and trusts a program that ends:
                     scored by code_scoring.py
    minerva_math     its utils.py asks for math_verify and antlr4 4.11, which exclude the antlr4 4.9 of Hydra:
                     scored by exact_match alone, equality of unequal strings by math_answers.py

A Python file is executed anew for every task that is built, without its top-level `try` statements, which
hold nothing but those imports. `process_docs` runs once per split: gpqa's shuffles the choices with a
generator of its file, so that a second run (lm-eval asks for the documents several times) would change the
right answers.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from dllmq.evaluation import code_scoring
from dllmq.evaluation.math_answers import same_value

_TABLE = Path(__file__).with_name("benchmarks.yaml")
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Function:
    """`!function utils.name`, not looked up yet."""

    file: Path
    name: str


@dataclass(frozen=True)
class Subtask:
    """One lm-eval task; a benchmark is one of them, or a group.

    Attributes:
        name: lm-eval's.
        subset: the folder of its data below the benchmark's, "" outside groups: lm-eval's dataset_name.
        config: lm-eval's, functions not looked up.
    """

    name: str
    subset: str
    config: Mapping[str, Any]

    @property
    def num_fewshot(self) -> int:
        """Examples in the prompt unless asked otherwise."""
        return int(self.config.get("num_fewshot") or 0)


@dataclass(frozen=True)
class Benchmark:
    """A row of benchmarks.yaml, where the fields are explained."""

    name: str
    splits: tuple[str, str]
    columns: tuple[str, ...]
    subtasks: tuple[Subtask, ...]
    grouped: bool
    allowed: Mapping[str, tuple[Any, ...]]
    lengths: Mapping[str, int]
    inside: Mapping[str, str]
    nullable: tuple[str, ...]
    examples: int | None
    ours: str

    @property
    def runs_code(self) -> bool:
        return any(subtask.config.get("unsafe_code", False) for subtask in self.subtasks)


def names() -> tuple[str, ...]:
    """The published tasks' names, in the order of benchmarks.yaml."""
    return tuple(_rows())


@cache
def benchmark(name: str) -> Benchmark:
    """The task of that name with its definitions from the installed lm-eval.

    Raises:
        ValueError: the installed lm-eval has no such definition.
    """
    row = _rows()[name]
    return Benchmark(
        name=name,
        splits=tuple(row["splits"]),
        columns=tuple(row["columns"]),
        subtasks=tuple(map(_subtask, _files(name, row))) if "group" in row else (_single(name, row),),
        grouped="group" in row,
        allowed={key: tuple(values) for key, values in row.get("allowed", {}).items()},
        lengths=row.get("lengths", {}),
        inside=row.get("inside", {}),
        nullable=tuple(row.get("nullable", ())),
        examples=row.get("examples") if row["splits"][1] == "" else None,
        ours=row.get("ours", ""),
    )


def build(
    subtask: Subtask,
    own: Benchmark,
    num_fewshot: int | None,
    data: Callable[..., Any] | None,
    postprocess: code_scoring.Postprocess | None = None,
) -> dict[str, Any]:
    """lm-eval's inline task.

    Args:
        num_fewshot: None for the definition's.
        data: makes the data set {split: rows}; None: lm-eval loads it from the hub.
        postprocess: what makes a program of an answer, of the tasks that run programs; None: the raw
            completion.
    """
    config = {key: value for key, value in subtask.config.items() if key not in ("tag", "task_alias")}
    config |= _scorer(own.ours, subtask, postprocess)
    if num_fewshot is not None:
        config["num_fewshot"] = num_fewshot
    if data is not None:
        config |= {
            "dataset_path": "json",
            "dataset_name": None,
            "custom_dataset": data,
            "dataset_kwargs": None,
        }
        config |= _used_splits(subtask, own, config.get("num_fewshot") or 0)
    config = _resolve(config, {})
    if "process_docs" in config:
        config["process_docs"] = _once(config["process_docs"])
    return config


def _used_splits(subtask: Subtask, own: Benchmark, num_fewshot: int) -> dict[str, Any]:
    """Splits that are neither scored nor drawn from need no file."""
    needed = {own.splits[0], own.splits[1] if num_fewshot else own.splits[0]}
    keys = ("training_split", "validation_split", "test_split", "fewshot_split")
    return {key: None for key in keys if subtask.config.get(key) not in needed}


def _once(process: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """process(split), the same result for the same split."""
    found: list[tuple[Any, Any]] = []

    def processed(split: Any) -> Any:
        for seen, result in found:
            if seen is split:
                return result
        found.append((split, process(split)))
        return found[-1][1]

    return processed


# ------------------------------------------------------------------ what is not lm-eval's


def _scorer(ours: str, subtask: Subtask, postprocess: code_scoring.Postprocess | None) -> dict[str, Any]:
    """The fields of a definition that are replaced."""
    if ours == "math":
        metrics = [m for m in subtask.config["metric_list"] if m["metric"] == "exact_match"]
        functions = _module(_function_of(subtask, "process_results").file)
        score = partial(_score_math, functions.get_unnormalized_answer, functions.normalize_final_answer)
        return {"metric_list": metrics, "process_results": score}
    if not ours:
        return {}
    make = {"humaneval": code_scoring.program, "mbpp": code_scoring.assert_program}[ours]
    run = partial(code_scoring.run_tests, make=partial(make, postprocess=postprocess))
    return {
        "metric_list": [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}],
        "process_results": code_scoring.pass_at_1,
        "filter_list": [{"name": "run_tests", "filter": [{"function": "custom", "filter_fn": run}]}],
    }


def _score_math(
    find: Callable[[str], str], normalize: Callable[[str], str], doc: Mapping[str, Any], results: list[str]
) -> dict[str, float]:
    """Lewkowycz et al. (2022), appendix D: the final answer's normal form equals the solution's."""
    return {"exact_match": float(same_value(normalize(find(results[0])), doc["answer"]))}


def _function_of(subtask: Subtask, key: str) -> Function:
    found = subtask.config[key]
    assert isinstance(found, Function)
    return found


# ------------------------------------------------------------------ reading lm-eval's files


@cache
def _rows() -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = yaml.load(_TABLE.read_text(encoding="utf-8"), _Base)
    return rows


@cache
def tasks_folder() -> Path:
    """lm_eval/tasks of the installed lm-eval, which is not imported for it."""
    spec = find_spec("lm_eval")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "tasks"


def _single(name: str, row: Mapping[str, Any]) -> Subtask:
    return replace(_subtask(_existing(name, tasks_folder() / row["file"])), subset="")


def _subtask(file: Path) -> Subtask:
    config = _read(file)
    return Subtask(config["task"], str(config.get("dataset_name") or ""), config)


def _files(name: str, row: Mapping[str, Any]) -> list[Path]:
    """The YAMLs of a group's subtasks; their mean weighted by size is its score, as in lm-eval."""
    group = _read(_existing(name, tasks_folder() / row["group"]))
    assert all(metric["weight_by_size"] for metric in group["aggregate_metric_list"]), name
    files = sorted(tasks_folder().glob(row["members"]))
    listed = [str(member) for member in group["task"]]
    if all((tasks_folder() / row["members"]).with_name(f"{member}.yaml").is_file() for member in listed):
        files = [(tasks_folder() / row["members"]).with_name(f"{member}.yaml") for member in listed]
    return [_existing(name, file) for file in files or [tasks_folder() / row["members"]]]


def _existing(name: str, file: Path) -> Path:
    if not file.is_file():
        raise ValueError(
            f"The installed lm-eval has no definition of {name} at {file}: install the version that "
            "constraints.txt names."
        )
    return file


def _read(file: Path) -> dict[str, Any]:
    """A YAML with what it includes."""

    class Loader(_Base): ...

    def function(loader: Any, node: Any) -> Function:
        module, _, name = loader.construct_scalar(node).rpartition(".")
        return Function(file.parent / f"{module.replace('.', '/')}.py", name)

    Loader.add_constructor("!function", function)
    config: dict[str, Any] = yaml.load(file.read_text(encoding="utf-8"), Loader)
    if "include" not in config:
        return config
    return _read(file.parent / config.pop("include")) | config


def _resolve(value: Any, modules: dict[Path, ModuleType]) -> Any:
    """value with its functions looked up; those of one file share its globals."""
    if isinstance(value, Function):
        if value.file not in modules:
            modules[value.file] = _module(value.file)
        return getattr(modules[value.file], value.name)
    if isinstance(value, dict):
        return {key: _resolve(item, modules) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, modules) for item in value]
    return value


def _module(file: Path) -> ModuleType:
    """A Python file, executed without its top-level `try` statements and the `evaluate` that these use."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not isinstance(node, ast.Try) and not _imports_evaluate(node)]
    module = ModuleType(f"lm_eval_task_{file.parent.name}_{file.stem}")
    exec(compile(tree, str(file), "exec"), module.__dict__)
    return module


def _imports_evaluate(node: ast.stmt) -> bool:
    return isinstance(node, ast.Import) and [alias.name for alias in node.names] == ["evaluate"]
