"""Section `evaluate`: mini_gsm through lm-eval's harness, the plain loop against ours, end to end.

Three ways to answer the same problems: the plain loop one prompt at a time (as published: Fast-dLLM runs at
batch 1, LLaDA's lm-eval model too), the plain loop in fixed left-padded batches from which no row leaves, and
ours. The model is the embedded one; answers, cut at their first EOS, and scores must be equal.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from dllmq.bench.reference_loop import plain_generate
from dllmq.bench.rows import Sheet, timed_row
from dllmq.bench.shapes import EMBEDDED, Setup, build, sampler_of
from dllmq.bench.timing import interleaved
from dllmq.evaluation.settings import EvalSettings
from dllmq.evaluation.tasks import EvalResult, score_task
from dllmq.models.tokenizer import load_tokenizer

TASK, PROBLEMS, BATCH = "mini_gsm", 32, 16
SINGLE, FULL = "plain loop, one prompt at a time", "plain loop, full batches"
SCORE = "exact_match,flexible-extract"


def measure(setup: Setup, sheet: Sheet) -> None:
    """Adds the section's rows."""
    if setup.shape != "mini":
        sheet.leave_out(
            f"evaluate is measured on the embedded model, not on {setup.shape}: use --shape mini."
        )
        return
    if find_spec("lm_eval") is None:
        sheet.leave_out("evaluate needs lm-eval, which is not installed here.")
        return
    model, tokenizer = build("mini", setup.device, setup.dtype), load_tokenizer(EMBEDDED)
    count, batch = (2, 2) if setup.quick else (PROBLEMS, BATCH)
    settings = EvalSettings(sampler_of(setup), batch_size=batch)
    logging.getLogger("dllmq.evaluation.tasks").setLevel(logging.WARNING)  # a score a round
    with tempfile.TemporaryDirectory() as folder:

        def run(make: Callable[..., Any]) -> EvalResult:
            return score_task(make(model, tokenizer, settings), TASK, count, Path(folder), settings)

        ways = lms()
        runs = {name: (lambda make=make: run(make)) for name, make in ways.items()}
        with torch.no_grad():
            found = interleaved(runs, setup.repeats, setup.device)
    ours = found["dllmq"]
    for key, name in (("evaluate.single", SINGLE), ("evaluate.batch", FULL)):
        base = found[name]
        theirs, mine = answers(base.output), answers(ours.output)
        row = timed_row(
            key, "mini_gsm end to end", f"{count} problems, batch {batch}", (name, "dllmq"),
            (base, ours), equal=theirs == mine if setup.dtype == torch.float32 else None,
            share=share_of(theirs, mine),
            numbers={"score": score(ours.output), "baseline_score": score(base.output)},
        )  # fmt: skip
        sheet.add(row)


def answers(result: EvalResult) -> list[str]:
    return [str(sample["response"]) for sample in result.samples[TASK]]


def share_of(a: list[str], b: list[str]) -> float:
    return sum(x == y for x, y in zip(a, b, strict=True)) / len(a)


def score(result: EvalResult) -> float:
    return float(result.scores[TASK][SCORE]["value"])


@dataclass(frozen=True)
class PlainLoop:
    """Makes a harness whose generation is the plain loop, `batch` prompts at a time (None: the settings')."""

    batch: int | None

    def __call__(self, model: Any, tokenizer: Any, settings: EvalSettings) -> Any:
        from dllmq.evaluation.harness import DiffusionLM, cut_answer

        size = int(self.batch or settings.batch_size)

        class PlainLM(DiffusionLM):
            def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
                prompts = [self.encode(request.args[0]) for request in requests]
                rows = answer_tokens(model, prompts, settings, size, self.eos_ids)
                stops = [request.args[1].get("until") or [] for request in requests]
                return [
                    cut_answer(tokens, until, self.eos_ids, settings.eos_cut, tokenizer).text
                    for tokens, until in zip(rows, stops, strict=True)
                ]

        return PlainLM(model, tokenizer, settings)


def answer_tokens(
    model: Any, prompts: list[list[int]], settings: EvalSettings, size: int, eos_ids: list[int]
) -> list[list[int]]:
    """The generated tokens of each prompt, in the order of the prompts, by the plain loop."""
    out: list[list[int]] = []
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        width = max(map(len, batch))
        ids = torch.tensor([[eos_ids[0]] * (width - len(p)) + p for p in batch], device=model.device)
        keep = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=model.device)
        padded = bool((keep == 0).any())
        made = plain_generate(model, ids, settings.sampler, keep if padded else None)
        out += made.tokens[:, width:].tolist()
    return out


def lms() -> dict[str, Callable[..., Any]]:
    """name -> (model, tokenizer, settings) -> an lm-eval LM."""
    from dllmq.evaluation.harness import DiffusionLM

    return {
        SINGLE: PlainLoop(1),
        FULL: PlainLoop(None),
        "dllmq": DiffusionLM,
    }
