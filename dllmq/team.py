"""Several processes that evaluate one model: torchrun --nproc-per-node=2 -m dllmq.run method=gptq ...

Rank 0 runs the command as it would alone. The other ranks only help it to evaluate: each time it comes to a
model's tasks, full precision's or the quantized one's, it announces them; they load the checkpoint, take the
quantized blocks that rank 0 has kept in the cell's folder (models/block_store.py: bit for bit its own),
and answer their share of the batches (evaluation/shares.py). Nobody quantizes twice, and what a helper
cannot do (another machine's arithmetic, too little memory) rank 0 does itself, after one warning.

Announcements go through torchrun's store, answers and blocks through the file system, which the ranks share.

    job/<n>               {"overrides", "quantized", "answers", ...} or {"end": true}
    job/<n>/done/<rank>   {"batches": answered, "error": null or one sentence}
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch

from dllmq import interrupt
from dllmq.cache import Cache
from dllmq.config import Plan, batch_identity, compose_plan, identity
from dllmq.evaluation.answers import AnswerFolder
from dllmq.evaluation.shares import Answered, SharedAnswers, only_answers
from dllmq.evaluation.tasks import score_task
from dllmq.machine import describe_device
from dllmq.models.block_store import BlockStore
from dllmq.models.loading import checkpoint_folder, load_model
from dllmq.models.tokenizer import load_tokenizer
from dllmq.pipeline import quantize_blocks, set_backend
from dllmq.workers import number_of

log = logging.getLogger(__name__)
_PAUSE = 0.1  # seconds between two looks at the store


@dataclass(frozen=True)
class Job:
    """What rank 0 announces.

    Attributes:
        overrides: compose the run's config.
        quantized: whether the model is to be quantized, from the blocks in `blocks` under `blocks_key`.
        exact: whether answers are decoded without the overrides' cache and threshold (full precision's).
        answers, answers_key: folder and key of the logs; work_dir: of the generated problems.
        backend, stream, compact, threads: as rank 0 has settled them (backend: "packed:onednn").
        like: what a helper must be equal in: weights, code, arithmetic.
        run: a word of this announcement alone, for what the logs say beside answers.
    """

    overrides: list[str]
    quantized: bool
    exact: bool
    blocks: str
    blocks_key: str
    answers: str
    answers_key: str
    work_dir: str
    backend: str
    stream: bool
    compact: bool
    threads: int
    like: dict[str, Any]
    run: str = field(default_factory=lambda: secrets.token_hex(4))


@dataclass
class Team:
    """The processes of one torchrun; alone where there is none.

    Attributes:
        rank, size: of this process, of the team; store: a key-value store that all reach, None alone.
        overrides: of the run at hand.
        batches: how many each helper has answered of the latest evaluation.
    """

    rank: int = 0
    size: int = 1
    store: Any = None
    overrides: Sequence[str] = ()
    batches: dict[int, int] = field(default_factory=dict)
    _jobs: int = field(default=0)

    @contextmanager
    def sharing(self, answers: AnswerFolder, job: Callable[[], Job]) -> Iterator[AnswerFolder]:
        """Within the context the others answer their share of the job's tasks, into the folder yielded."""
        if self.size == 1 or answers.folder is None:
            yield answers
            return
        number, self._jobs = self._jobs, self._jobs + 1
        told = job()
        self._set(f"job/{number}", asdict(told))
        yield SharedAnswers(
            answers.folder, answers.key, 0, self.size, lambda rank: self._working(number, rank), told.run
        )
        for rank in range(1, self.size):
            while self._working(number, rank):  # it writes into the folder
                time.sleep(_PAUSE)
                interrupt.check()
            done = self._get(f"job/{number}/done/{rank}")
            self.batches[rank] = done["batches"]
            if done["error"]:
                log.warning("process %d could not help: %s", rank, done["error"])

    def end(self) -> None:
        """Lets the helpers go."""
        if self.size > 1:
            self._set(f"job/{self._jobs}", {"end": True})

    def serve(self) -> None:
        """What a helper does, until rank 0 ends."""
        for number in range(2**31):
            job = self._wait_for(f"job/{number}")
            if job is None or "end" in job:
                return
            error, batches = None, 0
            try:
                batches = help_with(Job(**job), self.rank, self.size)
            except Exception as problem:
                log.debug("job %d", number, exc_info=True)
                kind = "" if isinstance(problem, ValueError) else f"{type(problem).__name__}: "
                error = kind + " ".join(str(problem).split())[:300]
            try:
                self._set(f"job/{number}/done/{self.rank}", {"error": error, "batches": batches})
            except RuntimeError:  # the store is gone, and rank 0 with it
                return

    def _working(self, number: int, rank: int) -> bool:
        return not self.store.check([f"job/{number}/done/{rank}"])

    def _wait_for(self, key: str) -> dict[str, Any] | None:
        """Its value; None where the store is gone, and rank 0 with it."""
        try:
            while not self.store.check([key]):
                time.sleep(_PAUSE)
            return self._get(key)
        except RuntimeError:  # of torch.distributed
            return None

    def _set(self, key: str, value: dict[str, Any]) -> None:
        self.store.set(key, json.dumps(value))

    def _get(self, key: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.store.get(key))
        return found


def team_of_torchrun() -> Team:
    """This process's team, from the variables that torchrun sets.

    Raises:
        ValueError: some are set and others are not, or a number is none.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = [os.environ.get(name) for name in names]
    if values[1] in (None, "1"):
        return Team()
    if None in values:
        missing = ", ".join(name for name, value in zip(names, values, strict=True) if value is None)
        raise ValueError(
            f"WORLD_SIZE={values[1]} is set, but {missing} is not: start several processes with torchrun "
            "--nproc-per-node=<n> -m dllmq.run, or unset WORLD_SIZE."
        )
    from torch.distributed import PrefixStore, TCPStore

    rank, size, address, port = (
        number_of("RANK"),
        number_of("WORLD_SIZE"),
        str(values[2]),
        number_of("MASTER_PORT"),
    )
    if not 0 <= rank < size:
        raise ValueError(
            f"RANK={rank} is none of the {size} processes of WORLD_SIZE: start them with torchrun "
            "--nproc-per-node=<n> -m dllmq.run, or unset both."
        )
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(address, port, size, rank == 0 and not hosted, timedelta(minutes=5), False)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Team(rank, size, PrefixStore(f"dllmq/{attempt}", store))


def own_arithmetic(plan: Plan) -> dict[str, Any]:
    """What decides an answer's last bit beside the config: equal among the processes of a team."""
    own = identity(plan.config, plan.device) | batch_identity(plan.config, plan.device)
    return own | {"machine": describe_device(plan.device)}


def help_with(job: Job, rank: int, size: int) -> int:
    """Answers a rank's share of a job's tasks into its own logs; returns the number of batches.

    Raises:
        ValueError: what would not be rank 0's model or arithmetic.
    """
    torch.set_num_threads(job.threads)
    plan = compose_plan(job.overrides)
    own = json.loads(json.dumps(own_arithmetic(plan)))
    if differs := sorted(key for key in own.keys() | job.like.keys() if own.get(key) != job.like.get(key)):
        raise ValueError(f"its {', '.join(differs)} differ from those of process 0")
    folder, config = checkpoint_folder(plan.config.model_path), plan.config
    model = load_model(folder, plan.device, getattr(torch, config.dtype()), job.stream)
    tokenizer = load_tokenizer(folder)
    if job.quantized:
        blocks = FinishedBlocks(Cache(Path(job.blocks)), job.blocks_key)
        quantize_blocks(model, [], plan.recipe, compact=job.compact, store=blocks)
        found = set_backend(model, job.backend.partition(":")[0])
        if found.partition(":")[0] != job.backend.partition(":")[0]:
            raise ValueError(f"its backend would be {found}, that of process 0 is {job.backend}")
    answers = SharedAnswers(Path(job.answers), job.answers_key, rank, size, run=job.run)
    from dllmq.evaluation.harness import DiffusionLM

    if job.exact:
        config = config.decoded_exactly()
    batches = 0
    for name, settings in config.answers().items():
        own = answers.of(name)
        lm = only_answers(DiffusionLM(model, tokenizer, settings, None, own))
        with suppress(Answered):
            score_task(lm, name, config.eval.limit, Path(job.work_dir), settings, config.data_dir)
        own.ended()
        batches += own.answered
    return batches


class FinishedBlocks(BlockStore):
    """Blocks that another process has quantized; none is made."""

    def settle(self, index: int, block: Any, topology: Any, grids: Any, quantize: Any) -> Any:
        def refuse() -> NoReturn:
            raise ValueError(f"the quantized block {index} is not in {self.cache.folder}")

        return super().settle(index, block, topology, grids, refuse)
