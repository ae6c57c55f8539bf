"""One evaluation, several processes: each answers its own batches, the first one puts them together.

Batches are a function of the requests alone, so every process has the same ones; number n of a task is
answered by process n mod R. Each appends to its own log (answers.py), and the first, rank 0,
reads the others' as it comes to their batches: it waits while they are at work, and answers itself what they
leave out. So the answers are those of one process, and all that a lost process costs is time.

The other processes need no answer but their own: in the place of foreign ones they get blanks, never wait,
and end before anything is scored.

Where memory runs out, the batches are rank 0's all the same, as its answers are those of one process. Rank 0
halves its batches and says so in its log; the others take the new plan before their next batch. One of the
others that cannot hold a batch leaves it out, says so in its own log, and goes on with its next one:

    {"run", "batch": name, "left": true}     rank 0 need not wait for it; name null: nothing follows
    {"run", "plan": kind, "index", "size"}   of rank 0: from this batch of this kind on
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dllmq import interrupt
from dllmq.evaluation.answers import (
    AnswerFolder,
    AnswerLog,
    Batch,
    _is_header,
    _opened,
    _sealed,
    batch_name,
    batch_of,
)
from dllmq.faults import is_out_of_memory

log = logging.getLogger(__name__)
_BLANKS: dict[str, Any] = {"generate_until": [], "loglikelihood": 0.0, "greedy": False}
_LONGEST_WAIT = 0.5  # seconds between two looks at another process's log


def _nobody(rank: int) -> bool:
    return False


@dataclass(frozen=True)
class SharedAnswers(AnswerFolder):
    """The logs of a task's batches that `size` processes share.

    Attributes:
        size: how many processes.
        working: whether the process of a rank is still answering this evaluation; asked by rank 0.
        run: tells what the logs say of this evaluation from what an earlier one said.
        told: ranks of which rank 0 has said that nothing more comes from them.
    """

    size: int = 1
    working: Callable[[int], bool] = _nobody
    run: str = ""
    told: set[int] = field(default_factory=set, compare=False)

    def of(self, task: str) -> SharedLog:
        assert self.folder is not None, "answers that are shared are in files"
        file = self.folder / f"{task}.{self.rank}.jsonl"
        tails = {
            r: Tail(self.folder / f"{task}.{r}.jsonl", f"{self.key}/{task}", self.run)
            for r in range(self.size)
        }
        own = SharedLog(file, f"{self.key}/{task}", shares=self, tails=tails)
        own.read()
        return own


@dataclass
class SharedLog(AnswerLog):
    """An AnswerLog that answers only this process's share.

    Attributes:
        answered: batches, here and now.
    """

    answered: int = 0
    shares: SharedAnswers = field(default_factory=SharedAnswers)
    tails: dict[int, Tail] = field(default_factory=dict)
    _given: dict[str, Batch] = field(default_factory=dict)  # by the others; `_known` is of an earlier run
    _plans: dict[str, dict[int, int]] = field(default_factory=dict)  # of rank 0, as far as they are taken

    def batch(
        self,
        kind: str,
        index: int,
        content: Any,
        answer: Callable[[], Batch],
        problems: Sequence[Any] = (),
    ) -> Batch:
        name, own = batch_name(kind, index, content), self.shares.rank
        place = (
            int(name[:8], 16) if kind == "greedy" else index
        )  # of those each one is its own batch, number 0
        owner = place % self.shares.size
        if owner != own and self.find(name) is None:
            if own != 0:
                return Batch([_BLANKS[kind]] * len(problems))
            if name in self._given or self._wait(name, owner):
                return self._given[name]
        known = self.find(name) is not None
        if own != 0 and not known:
            self._take_plan(kind)
        try:
            made = super().batch(kind, index, content, answer, problems)
        except (MemoryError, RuntimeError) as error:
            if own == 0 or not is_out_of_memory(error):
                raise
        else:
            self.answered += not known
            return made
        self.say({"batch": name, "left": True})  # by now nothing holds the tensors of the attempt
        log.warning("not enough memory for a batch, which is left to process 0")
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return Batch([_BLANKS[kind]] * len(problems))

    def halved(self, kind: str, index: int, size: int) -> None:
        self.say({"plan": kind, "index": index, "size": size})

    def ended(self) -> None:
        """To be called by a helper that answers nothing more of the task."""
        self.say({"batch": None, "left": True})

    def say(self, line: dict[str, Any]) -> None:
        """Appends a line that is no answer."""
        if self.file is None:
            return
        try:
            self._append(_sealed({"run": self.shares.run} | line))
        except OSError as error:  # rank 0 waits longer
            log.warning("%s cannot be written (%s)", self.file, error)

    def _take_plan(self, kind: str) -> None:
        """Raises Replanned: rank 0 has halved its batches since."""
        self.tails[0].more()
        plans = {plan["index"]: plan["size"] for plan in self.tails[0].plans if plan["plan"] == kind}
        if plans != self._plans.get(kind, {}):
            self._plans[kind] = plans
            raise Replanned(plans)

    def _wait(self, name: str, owner: int) -> bool:
        """Until another process has answered a batch; False where it ends without."""
        pause = 0.01
        while True:
            at_work = self.shares.working(owner)  # asked before its log is read for the last time
            self._given |= self.tails[owner].more()
            if name in self._given:
                return True
            if not at_work or self.tails[owner].left & {name, None}:
                self._tell(name, owner)
                return False
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_WAIT)
            interrupt.check()

    def _tell(self, name: str, owner: int) -> None:
        """A line for a batch that a process at work left out; one in all for a process that has ended."""
        if name in self.tails[owner].left:
            log.warning("process %d left out a batch, which is answered here", owner)
        elif owner not in self.shares.told:
            self.shares.told.add(owner)
            log.warning("process %d has ended; what is left of its share is answered here", owner)


@dataclass
class Tail:
    """The whole batches of a log that another process is writing, as they come.

    Attributes:
        file: the log; key: it must have; run: of this evaluation.
        left: names of batches that are left out; plans: of rank 0. Both as far as `more` has read.
    """

    file: Path
    key: str
    run: str = ""
    left: set[str | None] = field(default_factory=set)
    plans: list[dict[str, Any]] = field(default_factory=list)
    _place: int = 0
    _rows: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)

    def more(self) -> dict[str, Batch]:
        """Batches that are complete since the last call."""
        found = {}
        for raw in self._lines():
            line = _opened(raw)
            if line is None or self._is_said(line) or "batch" not in line:
                continue
            rows = self._rows.setdefault(line["batch"], {})
            rows[line["row"]] = line
            batch = batch_of(rows)
            if batch is not None:
                found[line["batch"]] = batch
                del self._rows[line["batch"]]
        return found

    def _is_said(self, line: dict[str, Any]) -> bool:
        """Whether a line is no answer; what it says is taken where it is of this run."""
        if "run" not in line:
            return False
        if line["run"] == self.run and "plan" in line:
            self.plans.append(line)
        elif line["run"] == self.run:
            self.left.add(line["batch"])
        return True

    def _lines(self) -> list[bytes]:
        """The lines that have been finished since; none of a file of another key."""
        try:
            with self.file.open("rb") as file:
                header = file.readline()
                if not _is_header(header.rstrip(b"\n"), self.key):
                    return []
                start = file.seek(max(self._place, len(header)))
                text = file.read()
        except OSError:
            return []
        end = text.rfind(b"\n") + 1
        self._place = start + end
        return text[:end].splitlines()


class Replanned(Exception):
    """Rank 0's batches are others than planned.

    Attributes:
        sizes: number of a batch -> rows at most, from this one on.
    """

    def __init__(self, sizes: dict[int, int]) -> None:
        super().__init__(sizes)
        self.sizes = sizes


class Answered(Exception):
    """The requests of a task are answered; nothing is to be scored."""


def only_answers(lm: Any) -> Any:
    """`lm`, which raises Answered where it would give its answers to be scored."""

    def stopping(method: Callable[..., Any]) -> Callable[..., Any]:
        def answer(*arguments: Any, **named: Any) -> Any:
            method(*arguments, **named)
            raise Answered

        return answer

    for name in ("generate_until", "loglikelihood"):
        setattr(lm, name, stopping(getattr(lm, name)))
    return lm
