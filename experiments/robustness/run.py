"""200 faults over the stages of a small sweep: what is recovered, what is lost, what is wrong.

python experiments/robustness/run.py               # writes results.json and table.md beside itself
python experiments/robustness/run.py --faults 6    # tries it out and writes nothing

The sweep runs undisturbed once, in processes that are forked from this one (everything is imported already).
Then sweeps are begun in fresh folders and disturbed at events drawn from the first run's: a stage is drawn,
an event in it, and a delay up to 30 ms; after each fault the same command is given again. At the end of a
sweep every number, answer and exported weight is compared with the undisturbed run's, bit for bit.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import io
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"}
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

import datasets  # noqa: E402, F401
import lm_eval.evaluator  # noqa: E402
import lm_eval.tasks  # noqa: E402, F401
import torch  # noqa: E402
import transformers  # noqa: E402, F401
from lm_eval.api.task import ConfigurableTask  # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import dllmq.cache  # noqa: E402
import dllmq.calibration.stats  # noqa: E402
import dllmq.cell  # noqa: E402
import dllmq.checkpoint.writer  # noqa: E402
import dllmq.methods.awq  # noqa: E402
import dllmq.report.build  # noqa: E402
import dllmq.report.progress  # noqa: E402
import dllmq.run  # noqa: E402
from dllmq.config import EMBEDDED, code_digest  # noqa: E402
from dllmq.models.llada import LLaDA, LLaDAConfig  # noqa: E402
from dllmq.models.stored import RECORD  # noqa: E402
from dllmq.models.tokenizer import load_tokenizer  # noqa: E402
from dllmq.numerics.linalg import weighted_gram  # noqa: E402

torch.set_num_threads(1)
load_tokenizer(EMBEDDED)  # imports what it needs
code_digest()  # kept from here on: an edit of the source is no fault that is meant
SIZES = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 48}
WORDS = [
    "-m", "method=gptq,awq", "tmas=true", "cgq=true", "iaaq=true", "tracker=none", "name=sweep", "bits=w4a4",
    "model.path=model", "model.dtype=float32", "export=compressed_tensors", "eval.limit=4",
    "eval.batch_size=2", "eval.mc_num=4", "eval.mc_batch_size=4", "eval.fidelity_states=8",
    "eval.fidelity_prompts=4", "calibration.num_prompts=4", "calibration.num_states=8",
    "calibration.batch_size=2", "sampler.gen_length=8", "sampler.steps=4", "sampler.block_length=8",
]  # fmt: skip
# Of "out of memory": batches of a row cannot be halved (tests/evaluation/test_batches.py has those that are).
ROW_BY_ROW = {"eval.batch_size=2": "eval.batch_size=1", "eval.mc_batch_size=4": "eval.mc_batch_size=1"}
KINDS = {
    "SIGKILL": 60,
    "SIGTERM": 25,
    "SIGINT": 15,
    "SIGTERM twice": 10,
    "SIGKILL, then a stored file is damaged": 30,
    "disk full": 20,
    "folder read-only": 5,
    "out of memory": 10,
    "NaN in a Gram matrix": 5,
    "one problem raises": 5,
    "clock jumps": 5,
    "two processes, one killed": 10,
}
INSIDE = {
    "disk full", "folder read-only", "out of memory", "NaN in a Gram matrix", "one problem raises",
    "clock jumps",
}  # fmt: skip
IN_A_SWEEP = 8  # faults, at most
NUMBERS = ("scores", "fidelity", "curves", "per_problem", "fidelity_per_prompt", "calibration", "fingerprint",
           "axes", "config", "inert", "seed")  # fmt: skip
NOTES = ("method", "backend", "baseline", "settings")
COSTS = ("weight_bytes", "quantized_share", "forwards", "truncated_share", "exported_bytes")
Event = tuple[str, str, str]  # cell, stage, what


# ------------------------------------------------------------------ the child: the command, watched


class Watch:
    """Tells the parent what happens, and fails as it was asked to, from one event on.

    Args:
        pipe: a line per event: cell, stage, what.
        fault: (event, kind) of a fault that the child makes itself.
    """

    def __init__(self, pipe: int, fault: tuple[Event, str] | None) -> None:
        self.pipe, self.fault = pipe, fault
        self.cell, self.stage, self.failing = "", "start", ""

    def event(self, what: str) -> None:
        now = (self.cell, self.stage, what)
        with suppress(BrokenPipeError):
            os.write(self.pipe, ("\t".join(now) + "\n").encode())
        if self.fault is not None and now == self.fault[0]:
            self.failing, self.fault = self.fault[1], None
            if self.failing == "out of memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    def refuse(self) -> None:
        """Where something is written."""
        if self.failing in ("disk full", "folder read-only"):
            code = errno.ENOSPC if self.failing == "disk full" else errno.EROFS
            raise OSError(code, os.strerror(code))

    def break_numbers(self) -> None:
        """Gram matrices, the score of a problem, the clock: whole until one is asked to fail."""
        process, now = ConfigurableTask.process_results, time.time

        def gram(X: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
            H = weighted_gram(X, c)
            return H * float("nan") if self.failing == "NaN in a Gram matrix" else H

        def process_results(task: Any, doc: Any, results: Any) -> Any:
            if self.failing == "one problem raises" and str(doc["id"]).endswith("2"):
                raise KeyError("gold")
            return process(task, doc, results)

        def clock() -> float:
            return -now() if self.failing == "clock jumps" else now()

        dllmq.calibration.stats.weighted_gram = dllmq.methods.awq.weighted_gram = gram  # type: ignore[assignment]
        ConfigurableTask.process_results, time.time = process_results, clock

    def install(self) -> None:
        self.break_numbers()
        replace_, fsync, save = os.replace, os.fsync, save_file

        def replace(source: Any, target: Any, **more: Any) -> None:
            self.event(f"before {Path(target).name}")
            self.refuse()
            replace_(source, target, **more)
            self.event(f"after {Path(target).name}")

        def sync(file: Any) -> None:
            self.refuse()
            fsync(file)

        def save_tensors(tensors: Any, path: Any, *more: Any, **named: Any) -> None:
            try:
                self.refuse()
            except OSError as error:
                raise SafetensorError(f"I/O error: {error.strerror} (os error {error.errno})") from error
            save(tensors, path, *more, **named)

        os.replace, os.fsync = replace, sync  # type: ignore[assignment]
        dllmq.cache.save_file = dllmq.checkpoint.writer.save_file = save_tensors  # type: ignore[attr-defined]
        dllmq.report.progress.progress_bar = self.progress_bar  # type: ignore[assignment]
        dllmq.report.build.draw = lambda sweep: []  # type: ignore[attr-defined]  # figures: seconds, no state
        stages = dllmq.cell.Stages.__call__

        @contextmanager
        def staged(own: Any, name: str) -> Iterator[None]:
            before, self.stage = self.stage, name if "full precision" not in self.stage else self.stage
            self.event("begins")
            with stages(own, name):
                yield
            self.stage = before

        dllmq.cell.Stages.__call__ = staged  # type: ignore[method-assign]
        measure = dllmq.cell.Cell._measure_full_precision

        def measured(cell: Any, *arguments: Any) -> Any:
            before, self.stage = self.stage, "full precision's tasks"
            try:
                return measure(cell, *arguments)
            finally:
                self.stage = before

        dllmq.cell.Cell._measure_full_precision = measured  # type: ignore[method-assign]

    @contextmanager
    def progress_bar(self, console: Any, name: str, *more: Any) -> Iterator[Callable[[int, int, str], None]]:
        self.cell, self.stage = name.partition(",")[0], "start"
        self.event("cell begins")
        yield lambda done, total, what: self.event(f"{what} {done}")
        self.cell, self.stage = "", "report"


def words_of(kind: str) -> list[str]:
    return [ROW_BY_ROW.get(word, word) for word in WORDS] if kind == "out of memory" else WORDS


def start(folder: Path, kind: str, fault: tuple[Event, str] | None = None) -> tuple[int, int]:
    """Gives the command in a process of its own; (pid, pipe of its events)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    os.close(reading)
    code = 70
    try:
        signal.set_wakeup_fd(-1)
        log = os.open(folder / "log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(os.fdopen(fd, "wb", 0), write_through=True) for fd in (1, 2)
        )
        os.chdir(folder)
        Watch(writing, fault).install()
        sys.argv = ["run.py", *words_of(kind)]
        dllmq.run.main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def events(pipe: int, timeout: float = 600) -> Iterator[Event]:
    """What the child tells, until it ends."""
    rest = b""
    while True:
        if not select.select([pipe], [], [], timeout)[0]:
            raise SystemExit("a run stands still")
        more = os.read(pipe, 65536)
        if not more:
            return
        *lines, rest = (rest + more).split(b"\n")
        for line in lines:
            cell, stage, what = line.decode().split("\t")
            yield cell, stage, what


def ended(pid: int) -> int:
    """Exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ------------------------------------------------------------------ faults


@dataclass
class Fault:
    kind: str
    event: Event
    exit_code: int = 0
    outcome: str = ""  # recovered | lost | wrong: what


def disturb(folder: Path, fault: Fault, rng: random.Random) -> bool:
    """Runs the command until the fault; whether it came to it. A run that does not is finished."""
    inside = fault.kind in INSIDE
    pid, pipe = start(folder, fault.kind, (fault.event, fault.kind) if inside else None)
    met = False
    other = start(folder, fault.kind) if fault.kind.startswith("two") else None
    for event in events(pipe):
        if event == fault.event and not met:
            met = True
            if not inside:
                time.sleep(rng.uniform(0, 0.03))
                strike(pid, fault.kind)
    os.close(pipe)
    fault.exit_code = ended(pid)
    if other is not None:
        for _ in events(other[1]):
            pass
        os.close(other[1])
        if (code := ended(other[0])) != 0:
            raise SystemExit(f"the other process ended with {code}: {folder / 'log'}")
    if met and fault.kind.endswith("damaged"):
        damage(folder, rng)
    return met


def strike(pid: int, kind: str) -> None:
    number = signal.SIGKILL if "kill" in kind.lower() else getattr(signal, kind.split()[0])
    with suppress(ProcessLookupError):
        os.kill(pid, number)
        if kind.endswith("twice"):
            time.sleep(0.005)
            os.kill(pid, number)


def damage(folder: Path, rng: random.Random) -> None:
    """Flips a bit of a stored file, or cuts it short: a cache entry, a block, answers, a record."""
    stored = [
        f for f in sorted(folder.glob("outputs/**/*")) if f.is_file() and f.stat().st_size and watched(f)
    ]
    if not stored:
        return
    file = rng.choice(stored)
    raw = bytearray(file.read_bytes())
    if rng.random() < 0.5:
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    else:
        del raw[rng.randrange(len(raw)) :]
    file.write_bytes(raw)


def watched(file: Path) -> bool:
    """Whether damage in the file is looked for when a run continues. Reports are written anew; answers beside
    a finished record, exported weights, the problems' own files and caches of other libraries are not."""
    inner = file.relative_to(file.parents[-1]).parts
    if "datasets" in inner or "tasks" in inner or "model" in inner or ".hydra" in inner:
        return False
    return not file.name.startswith("samples_") and file.suffix not in (".lock", ".tmp")


# ------------------------------------------------------------------ what came out


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that must not depend on faults, by name."""
    sweep, found = folder / "outputs" / "sweep", {}
    for file in sorted([*sweep.glob("*/results.json"), sweep / "baseline.json"]):
        record = json.loads(file.read_text()) if file.is_file() else {}
        kept = {key: record.get(key) for key in NUMBERS}
        kept |= {f"notes.{key}": record.get("notes", {}).get(key) for key in NOTES}
        kept |= {f"cost.{key}": record.get("cost", {}).get(key) for key in COSTS}
        counters = record.get("notes", {}).get("counters", {})
        kept["counters"] = {t: {k: v for k, v in c.items() if k != "seconds"} for t, c in counters.items()}
        found[file.relative_to(sweep).as_posix()] = kept
    for pattern in ("**/samples_*.jsonl", "*/model/*"):
        for file in sorted(sweep.glob(pattern)):
            found[file.relative_to(sweep).as_posix()] = digest(file)
    return found


def digest(file: Path) -> str:
    """sha256; of an export's record without the state of the repository, which may change meanwhile."""
    raw = file.read_bytes()
    if file.name == RECORD:
        record = json.loads(raw)
        record["run"].pop("git", None)
        raw = json.dumps(record).encode()
    return hashlib.sha256(raw).hexdigest()


def judge(folder: Path, reference: dict[str, Any]) -> str:
    """recovered, lost or wrong, and what."""
    found = outcome(folder)
    if lost := sorted(reference.keys() - found.keys()):
        return f"lost: {lost[0]}"
    for name, value in found.items():
        if name not in reference:
            return f"wrong: {name} is new"
        if value != reference[name]:
            inner = value if isinstance(value, dict) else {}
            return f"wrong: {name} {[key for key in inner if inner[key] != reference[name][key]]}"
    left = [f for f in folder.glob("outputs/**/*") if is_half_done(f)]
    if (
        "could not be stored" in (folder / "log").read_text()
    ):  # then its parts stay, for the next who needs it
        left = [f for f in left if f.suffix != ".unfinished"]
    return f"wrong: {left[0]} is left" if left else "recovered"


def is_half_done(file: Path) -> bool:
    """Whether it is unfinished work, of a cell or of a value that is not there."""
    if file.name.startswith(".") and file.suffix == ".tmp":
        return True
    if file.name.endswith(".unfinished"):  # beside the entry, whose writer was killed a moment too early
        return not file.with_name(file.name.removeprefix(".").removesuffix(".unfinished") + ".json").exists()
    return file.name == ".resume"


def undisturbed(folder: Path, model: Path, kind: str = "") -> tuple[list[Event], dict[str, Any]]:
    prepare(folder, model)
    pid, pipe = start(folder, kind)
    seen = list(events(pipe))
    os.close(pipe)
    if ended(pid) != 0:
        raise SystemExit((folder / "log").read_text()[-3000:])
    return seen, outcome(folder)


def prepare(folder: Path, model: Path) -> None:
    folder.mkdir()
    (folder / "model").symlink_to(model)


def make_model(folder: Path) -> Path:
    """A tiny random LLaDA with the embedded model's tokenizer."""
    config = json.loads((EMBEDDED / "config.json").read_text()) | SIZES
    model = LLaDA(LLaDAConfig.from_dict(config))
    model.init_weights(torch.Generator().manual_seed(1), gain=4.0)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    state = {name: p.detach().bfloat16().contiguous() for name, p in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, folder)
    return folder


# ------------------------------------------------------------------ all of them


def one_sweep(
    folder: Path, kind: str, count: int, seen: list[Event], reference: dict[str, Any], rng: random.Random
) -> list[Fault]:
    """A sweep with up to `count` faults of a kind, and what became of it."""
    faults: list[Fault] = []
    for event in draw(seen, count, rng):
        fault = Fault(kind, event)
        if not disturb(folder, fault, rng):
            break
        faults.append(fault)
    for _ in range(2):  # the second time a cell that failed of its fault (no memory) is run again
        pid, pipe = start(folder, kind)
        for _ in events(pipe):
            pass
        os.close(pipe)
        if (code := ended(pid)) == 0:
            break
    verdict = judge(folder, reference) if code == 0 else f"lost: the command ends with {code}"
    for fault in faults:
        fault.outcome = verdict
    return faults


def draw(seen: list[Event], count: int, rng: random.Random) -> list[Event]:
    """Events in the order in which they happen, of stages that are as likely as each other."""
    places: dict[str, list[int]] = {}
    first: dict[Event, int] = {}
    for index, event in enumerate(seen):
        if event not in first:
            first[event] = index
            places.setdefault(event[1], []).append(index)
    chosen = {rng.choice(places[rng.choice(sorted(places))]) for _ in range(count)}
    return [seen[index] for index in sorted(chosen)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", type=int, default=sum(KINDS.values()))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the sweeps that went wrong")
    arguments = parser.parse_args()
    whole = arguments.faults == sum(KINDS.values())
    rng, began = random.Random(arguments.seed), time.perf_counter()
    wanted = {kind: round(n * arguments.faults / sum(KINDS.values())) for kind, n in KINDS.items()}
    faults: list[Fault] = []
    with tempfile.TemporaryDirectory() as name:
        where = Path(name)
        model = make_model(where / "checkpoint")
        seen, reference = undisturbed(where / "undisturbed", model)
        row_by_row = undisturbed(where / "row by row", model, "out of memory")
        print(
            f"undisturbed: {len(seen)} events, {len(reference)} files, {time.perf_counter() - began:.0f} s",
            flush=True,
        )
        left = dict(wanted)
        while any(left.values()):
            for kind in [kind for kind, count in left.items() if count]:
                folder = where / str(len(faults))
                prepare(folder, model)
                few = min(IN_A_SWEEP, left[kind])
                found = one_sweep(
                    folder, kind, few, *(row_by_row if kind == "out of memory" else (seen, reference)), rng
                )
                left[kind] -= len(found)
                faults += found
                verdicts = dict(Counter(fault.outcome for fault in found))
                print(f"{kind}: {verdicts}, {len(faults)} in {time.perf_counter() - began:.0f} s", flush=True)
                if arguments.keep is not None and verdicts.keys() - {"recovered"}:
                    shutil.copytree(folder, arguments.keep / folder.name, symlinks=True)
                shutil.rmtree(folder)
                if whole:
                    write(faults, seen, reference, arguments.seed)
    print(table(faults))
    if any(fault.outcome != "recovered" for fault in faults):
        sys.exit(1)


def write(faults: list[Fault], seen: list[Event], reference: dict[str, Any], seed: int) -> None:
    """After each sweep, so that what has been seen by then is there."""
    order = sorted(faults, key=lambda fault: list(KINDS).index(fault.kind))
    results = {
        "command": "python experiments/robustness/run.py",
        "seed": seed,
        "sweep": ["python", "-m", "dllmq.run", *WORDS],
        "events": len(seen),
        "files_compared": len(reference),
        "torch": torch.__version__,
        "faults": [vars(fault) for fault in order],
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (HERE / "table.md").write_text(table(order))


def table(faults: list[Fault]) -> str:
    """By kind, and by stage."""
    lines = []
    for head, of in (("fault", lambda f: f.kind), ("stage at that moment", lambda f: f.event[1])):
        lines += [
            f"| {head} | injected | recovered | lost results | wrong results |",
            "|---|---:|---:|---:|---:|",
        ]
        for name in [*dict.fromkeys(map(of, faults)), None]:
            own = [f for f in faults if name is None or of(f) == name]
            counts = [sum(f.outcome.startswith(word) for f in own) for word in ("recovered", "lost", "wrong")]
            lines.append(f"| {name or 'all'} | {len(own)} | " + " | ".join(map(str, counts)) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
