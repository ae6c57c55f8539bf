"""Local files of the published tasks: what goes where, what is wrong with it, and the rows.

    <data_dir>/<task>/<split>.jsonl                  gsm8k/test.jsonl, gsm8k/train.jsonl
    <data_dir>/<task>/<subset>/<split>.jsonl         mmlu/anatomy/test.jsonl; lm-eval's dataset_name

or .parquet instead of .jsonl, in the data set's own schema; further columns do no harm. lm-eval is not
imported here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from dllmq.evaluation.benchmarks import Benchmark, Subtask, benchmark

SUFFIXES = (".jsonl", ".parquet")
Rows = list[dict[str, Any]]


def check_data(name: str, num_fewshot: int | None, data_dir: Path | None) -> None:
    """Finds what would keep a published task from being scored, before weights are read.

    Args:
        name: a benchmark.
        num_fewshot: None for the definition's.
        data_dir: local files; None: the hub's data set.

    Raises:
        ValueError: a number of examples the task does not have, a missing, empty or malformed file, a missing
            column, a value that is not allowed; without data_dir also no network, with what to put where.
    """
    own = benchmark(name)
    for subtask in own.subtasks:
        shots = _check_fixed_examples(name, subtask, num_fewshot)
        if data_dir is not None:
            _check_drawn_examples(own, subtask, shots, {s: rows(own, subtask, s, data_dir, shots)
                                                         for s in used_splits(own, shots)})  # fmt: skip
    if data_dir is None:
        _check_hub(own, num_fewshot)


def used_splits(own: Benchmark, shots: int) -> list[str]:
    """The split that is scored, and with examples the one they are drawn from."""
    scored, drawn = own.splits
    return list(dict.fromkeys([scored, drawn] if shots and drawn else [scored]))


def shots_of(subtask: Subtask, num_fewshot: int | None) -> int:
    """Examples in a prompt."""
    return subtask.num_fewshot if num_fewshot is None else num_fewshot


def rows(own: Benchmark, subtask: Subtask, split: str, data_dir: Path, shots: int) -> Rows:
    """The checked rows of a local file, objects of the values in its lines.

    Raises:
        ValueError: see check_data.
    """
    path = _find(own, subtask, split, data_dir, shots)
    stat = path.stat()
    return _read(own.name, path, stat.st_size, stat.st_mtime_ns)


def dataset(own: Benchmark, subtask: Subtask, shots: int, data_dir: Path) -> Callable[..., Any]:
    """What lm-eval calls for a task's splits (its `custom_dataset`)."""

    def load(**_: Any) -> Any:
        from datasets import Dataset, DatasetDict

        try:
            return DatasetDict(
                {
                    s: Dataset.from_list(rows(own, subtask, s, data_dir, shots))
                    for s in used_splits(own, shots)
                }
            )
        except (TypeError, OverflowError) as error:  # pyarrow's errors are TypeErrors or ValueErrors
            raise ValueError(_mixed(own, subtask, data_dir, error)) from error
        except ValueError as error:
            if type(error) is ValueError:
                raise
            raise ValueError(_mixed(own, subtask, data_dir, error)) from error

    return load


def digests(name: str, num_fewshot: int | None, data_dir: Path | None) -> dict[str, str]:
    """{file below data_dir: sha256} of what a task reads; {} when it reads the hub's data set."""
    if data_dir is None:
        return {}
    own, found = benchmark(name), {}
    for subtask in own.subtasks:
        shots = shots_of(subtask, num_fewshot)
        for split in used_splits(own, shots):
            path = _find(own, subtask, split, data_dir, shots)
            found[path.relative_to(data_dir).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def layout(own: Benchmark, num_fewshot: int | None, data_dir: Path | None = None) -> str:
    """What goes where: "gsm8k needs test.jsonl ..., each line with question and answer, in ..." """
    shots = shots_of(own.subtasks[0], num_fewshot)
    scored, *drawn = used_splits(own, shots)
    files = f"{scored}.jsonl"
    files += f" and, for its {shots} examples, {drawn[0]}.jsonl" if drawn else ""
    folder = f"{data_dir if data_dir is not None else '<data_dir>'}/{own.name}"
    subsets = [subtask.subset for subtask in own.subtasks]
    place = f"{folder}/<subset>, one folder for each of {', '.join(subsets)}" if own.grouped else folder
    return (
        f"{own.name} needs {files} (or .parquet), each line with {_listed(own.columns)}"
        f"{_nested(own.columns)}, in {place}"
    )


# ------------------------------------------------------------------ examples


def _check_fixed_examples(name: str, subtask: Subtask, num_fewshot: int | None) -> int:
    shots = shots_of(subtask, num_fewshot)
    if shots < 0:
        raise ValueError(
            f"tasks.num_fewshot={shots} is too small; it is an integer >= 0, or null for the task's own."
        )
    fixed = benchmark(name).examples
    if fixed is not None and shots > fixed:
        has = f"has {fixed} examples in its definition" if fixed else "takes no examples"
        raise ValueError(f"{name} {has}; got tasks.num_fewshot={shots}: ask for at most {fixed}.")
    return shots


def _check_drawn_examples(own: Benchmark, subtask: Subtask, shots: int, found: Mapping[str, Rows]) -> None:
    drawn = own.splits[1]
    if not shots or not drawn:
        return
    available = len(found[drawn]) - (drawn == own.splits[0])  # a problem is no example of itself
    if shots > available:
        where = f"{own.name}/{subtask.subset}" if own.grouped else own.name
        raise ValueError(
            f"{where} asks for {shots} examples, but its {drawn} file has {available} to draw from: "
            f"add lines, or set tasks.num_fewshot to at most {available}."
        )


# ------------------------------------------------------------------ files


def _find(own: Benchmark, subtask: Subtask, split: str, data_dir: Path, shots: int) -> Path:
    folder = data_dir / own.name / subtask.subset
    found = [folder / f"{split}{suffix}" for suffix in SUFFIXES if (folder / f"{split}{suffix}").is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{folder} has both {split}.jsonl and {split}.parquet; keep one of them.")
    raise ValueError(f"{folder / split}.jsonl is missing: {layout(own, shots, data_dir)}.")


@cache
def _read(name: str, path: Path, size: int, changed: int) -> Rows:
    """Rows with the needed columns; read once while the file stays as it is."""
    own = benchmark(name)
    heads = list(dict.fromkeys(column.partition(".")[0] for column in own.columns))
    found = _parquet(path, heads, own) if path.suffix == ".parquet" else _jsonl(path)
    kept: Rows = []
    for number, row in found:
        where = f"{path}, line {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where} is no object; each line has {_listed(own.columns)}.")
        _check_row(own, row, where)
        kept.append({head: row[head] for head in heads} | ({"id": str(row["id"])} if "id" in row else {}))
        _check_types(kept[0], kept[-1], path, number)
    if not kept:
        raise ValueError(f"{path} has no lines; each line has {_listed(own.columns)}.")
    return kept


def _jsonl(path: Path) -> Iterable[tuple[int, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no UTF-8 text (byte {error.start}); save it as JSON lines in UTF-8."
        ) from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number} is not JSON ({error.msg}); put one object in each line."
            ) from error


def _parquet(path: Path, heads: Sequence[str], own: Benchmark) -> Iterable[tuple[int, Any]]:
    import pyarrow.parquet
    from pyarrow import ArrowException

    try:
        file = pyarrow.parquet.ParquetFile(path)
        missing = [head for head in heads if head not in file.schema_arrow.names]
        if missing:
            raise ValueError(_missing(str(path), missing[0], file.schema_arrow.names, own))
        table = file.read(columns=list(heads)).to_pylist()
    except (ArrowException, OSError) as error:
        if type(error) is ValueError:
            raise
        first = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"{path} cannot be read as parquet ({first}); write it again, or use .jsonl."
        ) from error
    yield from enumerate(table, 1)


def _check_row(own: Benchmark, row: Mapping[str, Any], where: str) -> None:
    for column in own.columns:
        head, _, key = column.partition(".")
        if head not in row:
            raise ValueError(_missing(where, head, row, own))
        value = row[head]
        if key and (not isinstance(value, dict) or key not in value):
            raise ValueError(
                f"{where}: {head} is no object with {key}; the data set has {_listed(own.columns)}."
            )
        if (value is None and head not in own.nullable) or (key and value[key] is None):
            raise ValueError(f"{where}: {column} is null; each line of {own.name} needs a value.")
    for column, allowed in own.allowed.items():
        if row[column] not in allowed or isinstance(row[column], bool):
            raise ValueError(
                f"{where}: {column} is {json.dumps(row[column])[:60]}; allowed are "
                f"{_listed([json.dumps(value) for value in allowed], 'or')}."
            )
    for column, options in own.inside.items():
        head, _, key = options.partition(".")
        if row[column] not in row[head][key]:
            raise ValueError(
                f"{where}: {column} is {json.dumps(row[column])[:60]}, which {options} does not have."
            )
    for column, least in own.lengths.items():
        if not isinstance(row[column], list) or len(row[column]) < least:
            raise ValueError(f"{where}: {column} is no list of at least {least} items.")


def _check_types(first: Mapping[str, Any], row: Mapping[str, Any], path: Path, number: int) -> None:
    for head, value in first.items():
        if None not in (value, row.get(head)) and type(row[head]) is not type(value):
            raise ValueError(
                f"{path}, line {number}: {head} is a {type(row[head]).__name__}, in the lines before a "
                f"{type(value).__name__}; give a column one type."
            )


def _missing(where: str, column: str, present: Iterable[str], own: Benchmark) -> str:
    return f"{where} has no {column}, only {_listed(list(present))}; {own.name} needs {_listed(own.columns)}."


def _mixed(own: Benchmark, subtask: Subtask, data_dir: Path, error: Exception) -> str:
    first = str(error).splitlines()[0].rstrip(".")
    return (
        f"The files in {data_dir / own.name / subtask.subset} have values of different types in one column "
        f"({first}): give a column the same type in every line."
    )


def _listed(words: Sequence[str], last: str = "and") -> str:
    words = [str(word) for word in words]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def _nested(columns: Sequence[str]) -> str:
    nested = sorted({column.partition(".")[0] for column in columns if "." in column})
    return f" ({_listed(nested)} being an object)" if nested else ""


# ------------------------------------------------------------------ the hub


def _check_hub(own: Benchmark, num_fewshot: int | None) -> None:
    """The data set is in the cache of `datasets`, or its hub answers."""
    repositories = sorted({str(subtask.config["dataset_path"]) for subtask in own.subtasks})
    for repository in repositories:
        if _cached(repository):
            continue
        reason = _unreachable(repository)
        if reason:
            raise ValueError(
                f"{layout(own, num_fewshot)}; set tasks.data_dir to that <data_dir>, because {repository} "
                f"cannot be read from the hub: {reason}."
            )


def _cached(repository: str) -> bool:
    """Whether `datasets` has prepared that data set on this machine before."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    folder = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets")) / repository.replace("/", "___")
    return folder.is_dir() and any(folder.iterdir())


def _unreachable(repository: str) -> str:
    """Why the hub does not give a data set; "" when it does."""
    offline = [
        name
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
        if os.environ.get(name, "0") not in ("", "0")
    ]
    if offline:
        return f"{offline[0]} is set"
    return _asked(repository)


@cache
def _asked(repository: str) -> str:
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(repository, timeout=10)
    except Exception as error:  # any failure of the network or the hub has the same remedy
        first = " ".join(str(error).split())[:160].rstrip(".")
        return f"{type(error).__name__}, {first}" if first else type(error).__name__
    return ""
