"""Tasks: which there are, what can be refused before weights are read, and evaluate().

A generated task is one lm-eval YAML in task_configs/. Its `metadata.dllmq` holds test_size (how many problems
there are without a limit) and the settings the task is meant for. A published task is a row of
benchmarks.yaml: lm-eval's own definition on local files or the hub's data; a group of subtasks (mmlu) is one
task. lm-eval is imported in the functions that need it, so names are checked within milliseconds.

lm-eval builds the prompts, filters the answers and applies the metrics (`simple_evaluate`), one task at a
time: a task's batches, and with them its numbers, do not depend on the tasks beside it. Means and standard
errors are our own, from its per-problem values.
"""

import difflib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import yaml

from dllmq.durable import clean, write_whole
from dllmq.evaluation import benchmarks, task_data
from dllmq.evaluation.answers import AnswerFolder
from dllmq.evaluation.code_scoring import POSTPROCESS
from dllmq.evaluation.settings import EvalSettings
from dllmq.evaluation.statistics import mean_stderr
from dllmq.mini.tasks import as_jsonl, problems

log = logging.getLogger(__name__)
FOLDER = Path(__file__).parent / "task_configs"
Progress = Callable[[int, int, str], None]
Number = int | float
NOT_KEPT = AnswerFolder()


class _Loader(yaml.SafeLoader):
    """YAML with lm-eval's `!function package.module.name`."""


_Loader.add_constructor("!function", lambda loader, node: resolve_name(loader.construct_scalar(node)))


def generated_tasks() -> tuple[str, ...]:
    """Names of the tasks whose problems this package generates."""
    return tuple(sorted(file.stem for file in FOLDER.glob("*.yaml")))


def known_tasks() -> tuple[str, ...]:
    """Names that evaluate() takes."""
    return (*generated_tasks(), *benchmarks.names())


def published(name: str) -> bool:
    """Whether a known task is a published one, of benchmarks.yaml."""
    return name in benchmarks.names()


def task_config(name: str) -> dict[str, Any]:
    """A generated task's YAML as lm-eval's inline task."""
    config: dict[str, Any] = yaml.load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"), _Loader)
    return config


def task_defaults(name: str) -> dict[str, Any]:
    """The settings a generated task is meant for: fields of SamplerConfig and EvalSettings."""
    return {key: value for key, value in task_config(name)["metadata"]["dllmq"].items() if key != "test_size"}


def check_tasks(names: Sequence[str]) -> None:
    """Refuses an empty list, an unknown name and a name given twice.

    Raises:
        ValueError: with the closest known names.
    """
    known = known_tasks()
    if not names:
        raise ValueError(f"No task is named; there are {', '.join(known)}.")
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(f"Unknown task {name!r}; there are {', '.join(known)}.{hint}")
        if list(names).count(name) > 1:
            raise ValueError(f"Task {name} is named twice; name it once.")


def generates(name: str) -> bool:
    """Whether a task's answers are generated; else they are chosen by likelihood."""
    if published(name):
        subtasks = benchmarks.benchmark(name).subtasks
        return any(s.config.get("output_type", "generate_until") == "generate_until" for s in subtasks)
    return bool(task_config(name)["output_type"] == "generate_until")


def runs_code(name: str) -> bool:
    """Whether scoring a task runs what the model wrote."""
    if published(name):
        return benchmarks.benchmark(name).runs_code
    return bool(task_config(name).get("unsafe_code", False))


def check_code_execution(names: Sequence[str], allowed: bool) -> None:
    """Refuses tasks that run generated programs, unless the user allowed it.

    Raises:
        ValueError: naming the tasks and the switch.
    """
    unsafe = [name for name in names if runs_code(name)]
    if unsafe and not allowed:
        raise ValueError(
            f"Scoring {', '.join(unsafe)} runs programs that the model wrote, in a subprocess with limits "
            "but on this machine: allow it with eval.allow_code_execution=true, or leave the task out."
        )


def check_task_data(
    names: Sequence[str], settings: Mapping[str, EvalSettings], data_dir: Path | None
) -> None:
    """Refuses examples that a task does not have, and data that cannot be read; see task_data.py.

    Args:
        names: known tasks.
        settings: one per task.
        data_dir: local files of published tasks; None: the hub's.

    Raises:
        ValueError: one sentence that says which file, what is wrong, and what to put there.
    """
    if data_dir is not None and not data_dir.is_dir():
        raise ValueError(
            f"tasks.data_dir={data_dir} is no folder; give the folder with the tasks' files, or null."
        )
    for name in names:
        shots = settings[name].num_fewshot
        if published(name):
            task_data.check_data(name, shots, data_dir)
        elif shots:
            raise ValueError(f"{name} takes no examples; got tasks.num_fewshot={shots}: set it to null.")


def build_benchmark(name: str, settings: EvalSettings, data_dir: Path | None) -> list[dict[str, Any]]:
    """lm-eval's inline tasks of a published task, one per subtask.

    Args:
        settings: num_fewshot and postprocess are used.
        data_dir: as in check_task_data.
    """
    own = benchmarks.benchmark(name)
    configs = []
    for subtask in own.subtasks:
        shots = task_data.shots_of(subtask, settings.num_fewshot)
        data = None if data_dir is None else task_data.dataset(own, subtask, shots, data_dir)
        configs.append(benchmarks.build(subtask, own, shots, data, POSTPROCESS[settings.postprocess]))
    return configs


def build_task_configs(names: Sequence[str], n: int | None, data_dir: Path) -> list[dict[str, Any]]:
    """lm-eval's inline tasks over generated problems, whose files are written where they are missing.

    Args:
        names: generated tasks.
        n: the first n test problems; None: the task's test_size.
        data_dir: gets <task>-test-<n>.jsonl and the cache of `datasets`. Several processes may share it.
    """
    configs = []
    clean(data_dir)
    for name in names:
        config = task_config(name)
        data = _write_problems(name, n or config["metadata"]["dllmq"]["test_size"], data_dir)
        config["dataset_kwargs"] = {
            "data_files": {"test": str(data)},
            "cache_dir": str(data_dir / "datasets"),
        }
        configs.append(config)
    return configs


def _write_problems(name: str, n: int, data_dir: Path) -> Path:
    path = data_dir / f"{name}-test-{n}.jsonl"
    text = as_jsonl(problems(name, "test", n))
    if not path.exists() or path.read_bytes() != text.encode():  # else the cache of `datasets` stays valid
        write_whole(path, text)
    return path


@dataclass(frozen=True)
class EvalResult:
    """Scores of tasks and what they are made of; every field is keyed by task and plain enough for JSON.

    Attributes:
        scores: {metric: {"value", "stderr", "n"}}. A metric is named as in lm-eval, with the filter behind a
            comma where a task has several: "exact_match,strict-match", "pass@1", "acc". stderr is that of the
            mean, NaN for one problem.
        per_problem: {metric: one value per problem, in the order of the problems}.
        samples: per problem doc_id, id, prompt, target, response, what the filters made of it, and metrics.
        counters: requests, forwards, generated_tokens, truncated (see harness.Counters) and seconds.
        subtasks: {subtask: its scores}, of groups. A group's own score is the mean over all its problems,
            which is lm-eval's mean of subtasks weighted by their sizes; its stderr is that of this mean.
        restored: requests that an earlier run had answered.
    """

    scores: dict[str, dict[str, dict[str, Number]]] = field(default_factory=dict)
    per_problem: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    counters: dict[str, dict[str, Number]] = field(default_factory=dict)
    subtasks: dict[str, dict[str, dict[str, dict[str, Number]]]] = field(default_factory=dict)
    restored: dict[str, int] = field(default_factory=dict)

    def __or__(self, other: "EvalResult") -> "EvalResult":
        """Both results' tasks; `other` wins where both have one."""
        names = ("scores", "per_problem", "samples", "counters", "subtasks", "restored")
        return EvalResult(**{name: getattr(self, name) | getattr(other, name) for name in names})


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    settings: EvalSettings | Mapping[str, EvalSettings],
    limit: int | None = None,
    allow_code_execution: bool = False,
    work_dir: Path = Path("."),
    progress: Progress | None = None,
    data_dir: Path | None = None,
    answers: AnswerFolder = NOT_KEPT,
) -> EvalResult:
    """Scores a model.

    Args:
        model: any MaskPredictor.
        tokenizer: its tokenizer.
        tasks: known names.
        settings: for all tasks, or one per task.
        limit: the first so many problems of each task, in a group of each subtask; None: all.
        allow_code_execution: the user's opt-in for tasks that run generated programs.
        work_dir: for the problems and the data sets' cache.
        progress: called with (done, total, "task: what").
        data_dir: local files of published tasks (see task_data.py); None: the hub's data.
        answers: where they are kept until the run ends; what an earlier one left there is not asked again.

    Raises:
        ValueError: unknown tasks, no opt-in, data that cannot be read, a prompt that does not fit, or a
            problem that cannot be scored.
        Interrupted: after a signal, when the batch at hand is kept.
    """
    check_tasks(tasks)
    check_code_execution(tasks, allow_code_execution)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be an integer >= 1, or None (null) for all problems; got {limit}.")
    each = {name: settings[name] if isinstance(settings, Mapping) else settings for name in tasks}
    check_task_data(tasks, each, data_dir)
    from dllmq.evaluation.harness import DiffusionLM
    from dllmq.evaluation.lengths import Fits, LengthCheck

    for name, own in list(each.items())[1:]:  # the first one's prompts are looked at in a moment
        if published(name):
            with suppress(Fits):
                score_task(LengthCheck(model, tokenizer, own), name, limit, work_dir, own, data_dir)
    result = EvalResult()
    for name, own in each.items():
        lm = DiffusionLM(model, tokenizer, own, _named(progress, name), answers.of(name))
        result |= score_task(lm, name, limit, work_dir, own, data_dir)
    return result


def score_task(
    lm: Any,
    name: str,
    n: int | None,
    work_dir: Path,
    settings: EvalSettings | None = None,
    data_dir: Path | None = None,
) -> EvalResult:
    """Scores any lm-eval `LM` on one task; a task that runs programs runs them.

    Args:
        lm: an instance; its `counters` are recorded if it has them.
        name, n, work_dir: as in evaluate.
        settings: num_fewshot, chat_template, fewshot_as_multiturn and postprocess are used.
        data_dir: as in evaluate.
    """
    settings = settings or EvalSettings()
    grouped = published(name) and benchmarks.benchmark(name).grouped
    with _quiet_lm_eval() as lm_eval:
        if published(name):
            configs = build_benchmark(name, settings, data_dir)
        else:
            configs = build_task_configs([name], n, work_dir)
        start = time.perf_counter()  # after the import, which the first task would be charged with
        with _scoring_in_words(name), _hub_in_words(name, settings, data_dir):
            output = lm_eval.simple_evaluate(
                model=lm,
                tasks=configs,
                task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
                limit=n,
                apply_chat_template=settings.chat_template,
                fewshot_as_multiturn=settings.fewshot_as_multiturn,
                log_samples=True,
                bootstrap_iters=0,
                confirm_run_unsafe_code=True,  # check_code_execution has asked
                random_seed=None,  # None: the caller's global generators stay as they are
                numpy_random_seed=None,
                torch_random_seed=None,
            )
    counters = asdict(lm.counters) if hasattr(lm, "counters") else {}
    earlier = getattr(lm, "answers", None) or NOT_KEPT.of(name)
    counters["seconds"] = time.perf_counter() - start + earlier.seconds
    result = _read_samples(
        name, {c["task"]: output["samples"][c["task"]] for c in configs}, counters, grouped
    )
    _log_scores(name, result)
    return replace(result, restored={name: earlier.restored})


@contextmanager
def _hub_in_words(name: str, settings: EvalSettings, data_dir: Path | None) -> Iterator[None]:
    """A data set that the hub did not give, as one sentence with the way out."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not published(name) or data_dir is not None or not _from_hub(error):
            raise
        own, first = benchmarks.benchmark(name), " ".join(str(error).split())[:200].rstrip(".")
        raise ValueError(
            f"{task_data.layout(own, settings.num_fewshot)}; set tasks.data_dir to that <data_dir>, because "
            f"the hub did not give the data set: {first}."
        ) from error


@contextmanager
def _scoring_in_words(name: str) -> Iterator[None]:
    """What a task's own code raises about one problem, as one sentence that names it.

    The problem is not counted as wrong: nobody could tell a model that fails from a scorer that does.
    """
    try:
        yield
    except Exception as error:
        problem = _scored_problem(error)
        if problem is None:
            raise
        first = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{name}: problem {problem} cannot be scored ({type(error).__name__}: {first}); mend the task's "
            "code or data, or leave the task out. The answers are kept: the same command scores them again."
        ) from error


def _scored_problem(error: BaseException) -> int | None:
    """The number of the problem at which lm-eval called a task's `process_results` that raised."""
    trace, problem = error.__traceback__, None
    while trace is not None:
        frame = trace.tb_frame
        if frame.f_code.co_name == "process_results":
            return problem
        problem = frame.f_locals.get("doc_id", problem)
        trace = trace.tb_next
    return None


def _from_hub(error: BaseException) -> bool:
    """Whether `datasets` or `huggingface_hub` raised it."""
    modules, trace = set(), error.__traceback__
    while trace is not None:
        modules.add(str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0])
        trace = trace.tb_next
    return bool(modules & {"datasets", "huggingface_hub"})


def _named(progress: Progress | None, name: str) -> Progress | None:
    if progress is None:
        return None
    return lambda done, total, what: progress(done, total, f"{name}: {what}")


def _read_samples(
    name: str, samples: Mapping[str, list[dict[str, Any]]], counters: dict[str, Number], grouped: bool = False
) -> EvalResult:
    """lm-eval's samples {subtask: [one per problem and filter]} as one record per problem."""
    columns: dict[str, list[float]] = {}
    records: list[dict[str, Any]] = []
    subtasks: dict[str, dict[str, dict[str, Number]]] = {}
    for subtask, rows in samples.items():
        own, values = _read_subtask(rows)
        for key, column in values.items():
            columns.setdefault(key, []).extend(column)
        if grouped:
            subtasks[subtask] = {key: asdict(mean_stderr(column)) for key, column in values.items()}
            own = [r | {"doc_id": len(records) + i, "subtask": subtask} for i, r in enumerate(own)]
        records += own
    return EvalResult(
        scores={name: {key: asdict(mean_stderr(column)) for key, column in columns.items()}},
        per_problem={name: columns},
        samples={name: records},
        counters={name: counters},
        subtasks={name: subtasks} if grouped else {},
    )


def _read_subtask(samples: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Records and {metric: values}, in the order of the problems."""
    several = len({sample["filter"] for sample in samples}) > 1
    records: dict[int, dict[str, Any]] = {}
    values: dict[str, dict[int, float]] = {}
    for sample in samples:
        record = records.setdefault(sample["doc_id"], _record(sample))
        if sample["filter"] != "none":
            record["filtered"][sample["filter"]] = sample["filtered_resps"][0]
        for metric in sample["metrics"]:
            key = f"{metric},{sample['filter']}" if several else metric
            record[key] = float(sample[metric])
            values.setdefault(key, {})[sample["doc_id"]] = record[key]
    columns = {key: [by_doc[i] for i in sorted(by_doc)] for key, by_doc in values.items()}
    return [records[i] for i in sorted(records)], columns


def _record(sample: dict[str, Any]) -> dict[str, Any]:
    """What a problem's samples share. The response of a choice is the most likely continuation."""
    doc = sample["doc"]
    record = {
        "doc_id": sample["doc_id"],
        "id": doc.get("id") or doc.get("task_id"),
        "prompt": sample["arguments"][0][0],
        "target": sample["target"],
    }
    if isinstance(sample["resps"][0][0], str):
        return record | {"response": sample["resps"][0][0], "filtered": {}}
    bounds = [float(responses[0][0]) for responses in sample["resps"]]
    chosen = sample["arguments"][bounds.index(max(bounds))]
    varied = (
        len({arguments[1] for arguments in sample["arguments"]}) > 1
    )  # winogrande varies the context instead
    return record | {"response": chosen[varied], "log_likelihoods": bounds, "filtered": {}}


def _log_scores(name: str, result: EvalResult) -> None:
    scores, counters = result.scores[name], result.counters[name]
    text = ", ".join(f"{key} {s['value']:.3f} +- {s['stderr']:.3f}" for key, s in scores.items())
    n = len(result.samples[name])
    forwards = counters.get("forwards", 0)
    log.info("%s: %s (n=%d), %d forwards, %.1f s", name, text, n, forwards, counters["seconds"])


@contextmanager
def _quiet_lm_eval() -> Iterator[Any]:
    """lm_eval without its log, its bars, and its report of the machine, which takes seconds."""
    import datasets
    import lm_eval.api.task
    import lm_eval.evaluator
    import lm_eval.tasks

    logger = logging.getLogger("lm_eval")
    with ExitStack() as undo:
        undo.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
        if not datasets.are_progress_bars_disabled():
            undo.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        evaluator, task = lm_eval.evaluator, lm_eval.api.task
        for module, attribute, value in (
            (evaluator, "add_env_info", lambda storage: None),
            (evaluator, "get_git_commit_hash", lambda: ""),
            (task, "tqdm", partial(getattr(task, "tqdm", iter), disable=True)),
        ):
            if hasattr(module, attribute):
                undo.callback(setattr, module, attribute, getattr(module, attribute))
                setattr(module, attribute, value)
        yield lm_eval
