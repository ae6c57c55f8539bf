"""`python -m dllmq.generate`: a prompt in, text out, with the denoising shown step by step.

    python -m dllmq.generate                                       a dev problem, the embedded model
    python -m dllmq.generate "Question: ..." sampler.steps=24      any switch of dllmq.run, spelled as there
    python -m dllmq.generate --side-by-side method=rtn bits=w2a4   full precision beside the quantized model
    python -m dllmq.generate $'two\\nlines'                         a prompt is taken as the shell gives it
    python -m dllmq.generate - --model <hub id> --trace < prompt.txt
    python -m dllmq.generate "..." --model <folder> model=dream_v0_7b_base   a folder, a preset's settings

Naming a switch of quantization (method=, bits=, tmas= ...) quantizes on the fly, with dllmq.run's defaults
and from its cache. A folder that is quantized already (dllmq.run's export=) runs as it is stored. In a pipe
there is no animation: the final texts, and with --trace a line per step.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from rich.console import Console, RenderableType
from rich.live import Live
from torch import Tensor

from dllmq.cache import Cache
from dllmq.calibration.hidden import Spill
from dllmq.calibration.prompts import encode_prompts
from dllmq.config import Plan, compose_plan, preset_of
from dllmq.diffusion import apply, denoise
from dllmq.full_precision import FullPrecision
from dllmq.mini.tasks import problems
from dllmq.models.graphs import graphed
from dllmq.models.loading import checkpoint_folder, load_model, read_config
from dllmq.models.memory import MemoryPlan, plan_memory
from dllmq.models.tokenizer import load_tokenizer
from dllmq.pipeline import quantize, set_backend
from dllmq.report.denoising import (
    Frame,
    compare,
    describe,
    differing,
    draw_run,
    draw_screen,
    state_at,
    trace_line,
)
from dllmq.report.progress import progress_bar

Progress = Callable[[int, int, str], None]

# Switches that do not ask for a quantized model.
_OF_THE_MODEL = (
    "model", "sampler", "device", "threads", "seed", "cache_dir", "tasks", "eval", "tracker", "name",
    "resume", "dry_run", "memory", "max_state_bytes", "backend",
)  # fmt: skip
_OVERRIDE = re.compile(r"[~+]*[A-Za-z_][\w./@]*=")
FULL_PRECISION = "full precision"
AS_STORED = "as stored"
PROBLEM = "the first dev problem of mini_gsm"


def arguments(argv: list[str]) -> argparse.Namespace:
    """The parsed command line: `prompt` (None: none given), `overrides`, and the options."""
    parser = argparse.ArgumentParser(
        prog="python -m dllmq.generate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    words = f"the prompt in quotes, - for stdin (default: {PROBLEM}), and overrides as in dllmq.run"
    parser.add_argument("words", nargs="*", metavar="PROMPT|key=value", help=words)
    where = "checkpoint folder or hub id; a published id and an export bring their preset along, another\n"
    parser.add_argument("--model", help=where + "folder takes model=<preset>")
    parser.add_argument(
        "--side-by-side", action="store_true", help="full precision beside the quantized model"
    )
    parser.add_argument(
        "--trace", action="store_true", help="print one line per denoising step, no animation"
    )
    parser.add_argument("--delay", type=float, default=0.08, help="seconds a step is shown at least (0.08)")
    args = parser.parse_intermixed_args(argv)
    args.overrides = [word for word in args.words if _OVERRIDE.match(word)]
    prompts = [word for word in args.words if not _OVERRIDE.match(word)]
    if len(prompts) > 1:
        parser.error(
            f"there are {len(prompts)} prompts, {prompts[0]!r} and {prompts[1]!r}: put one in quotes."
        )
    if not 0 <= args.delay < 60:
        parser.error(f"--delay is a number of seconds from 0 to 60, not {args.delay}.")
    args.prompt = prompts[0] if prompts else None
    return args


def all_overrides(args: argparse.Namespace) -> tuple[list[str], bool]:
    """The overrides of the run, and whether they ask to quantize the model.

    Raises:
        ValueError: export, which nothing here writes.
    """
    heads = {re.split(r"[.=@]", word.lstrip("~+"))[0] for word in args.overrides}
    if "export" in heads:
        raise ValueError("export= writes nothing here: export with python -m dllmq.run, then give --model.")
    quantized = args.side_by_side or bool(heads - set(_OF_THE_MODEL))
    own = [] if quantized else ["method=fp"]
    own += [] if "tracker" in heads else ["tracker=none"]
    chosen = any(word.startswith("model=") for word in args.overrides)
    return [*own, *_model_overrides(args.model, chosen), *args.overrides], quantized


def _model_overrides(model: str | None, chosen: bool) -> list[str]:
    """model.path=<it>, and model=<preset> for the id of a preset and for what was exported with one.

    Args:
        chosen: the user says which preset.
    """
    if model is None:
        return []
    preset = None if chosen else preset_of(model)
    quoted = model.replace("\\", "\\\\").replace("'", "\\'")
    return [*([f"model={preset}"] if preset else []), f"model.path='{quoted}'"]


def read_prompt(given: str | None) -> str:
    """The prompt's text, as it came: a backslash and an n may begin LaTeX's \\nabla."""
    if given is None:
        return f"Question: {problems('mini_gsm', 'dev', 1)[0]['question']}\nAnswer:"
    text = sys.stdin.read() if given == "-" else given
    if not text.strip():
        raise ValueError("the prompt is empty: give a text, or leave it out for a problem of mini_gsm.")
    return text


@dataclass(frozen=True)
class Runner:
    """A loaded model and the prompt it continues; `memory` is what of the model is held."""

    plan: Plan
    model: Any
    tokenizer: Any
    prompt_ids: Int[Tensor, " P"]
    memory: MemoryPlan

    @property
    def end_ids(self) -> list[int]:
        names = ("eos_token_id", "eot_token_id")
        return [i for name in names if (i := getattr(self.model.config, name, None)) is not None]

    def frames(self) -> Iterator[Frame]:
        """The empty canvas, then the response after each step; the same noise in every run."""
        sampler, mask_id = self.plan.config.sampler_config(), self.model.config.mask_token_id
        n = sampler.gen_length
        confidence = torch.zeros(n)
        yield Frame(-1, sampler.num_steps, 0, [None] * n, [""] * n, [0.0] * n, [False] * n)
        rng = torch.Generator(self.model.device).manual_seed(self.plan.config.seed)
        for step in denoise(graphed(self.model), self.prompt_ids[None], sampler, generator=rng):
            fresh = step.committed[0, -n:].cpu()
            confidence = torch.where(fresh, step.score[0, -n:].cpu(), confidence)
            ids = [None if t == mask_id else t for t in apply(step)[0, -n:].tolist()]
            pieces = ["" if t is None else self.tokenizer.decode([t]) for t in ids]
            yield Frame(
                step.index, sampler.num_steps, step.forwards, ids, pieces, confidence.tolist(), fresh.tolist()
            )

    def text(self, frame: Frame) -> str:
        """The answer: up to its first end of text under eval.eos_cut=first, without special tokens."""
        ids = [t for t in frame.ids if t is not None]
        if self.plan.config.eval.eos_cut == "first":
            ids = ids[: next((i for i, t in enumerate(ids) if t in self.end_ids), len(ids))]
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def load(plan: Plan, prompt: str) -> Runner:
    """The model as the folder has it, and the prompt's tokens.

    Raises:
        ValueError: the prompt and gen_length together exceed what the model takes.
    """
    folder = checkpoint_folder(plan.config.model_path)
    tokenizer = load_tokenizer(folder)
    ids = encode_prompts([prompt], tokenizer, plan.config.chat_template, plan.config.add_bos)[0]
    most, rest = read_config(folder)[0].max_sequence_length, plan.recipe.sampler.gen_length
    if len(ids) + rest > most:
        raise ValueError(
            f"the prompt has {len(ids)} tokens and gen_length is {rest}, together more than the model's "
            f"{most}: shorten the prompt, or lower sampler.gen_length."
        )
    dtype = getattr(torch, plan.config.dtype())
    memory = plan_memory(plan.config.memory, plan.parameters, dtype, plan.device)
    model = load_model(folder, plan.device, dtype, memory.stream)
    return Runner(plan, model, tokenizer, ids, memory)


def quantize_in_place(runner: Runner, progress: Progress) -> str:
    """Quantizes the runner's model as dllmq.run would, and says how: "GPTQ w2a4 +TMAS"."""
    plan, config = runner.plan, runner.plan.config
    folder = Path(config.cache_dir or "outputs/.cache").expanduser()
    shared = FullPrecision(plan, Cache(folder), runner.model, runner.tokenizer, progress)
    prompts = shared.prompts()
    states = shared.states(prompts) if config.cache_dir else None
    spill = Spill(config.max_state_bytes, folder)
    quantize(runner.model, prompts, plan.recipe, None, progress, states, runner.memory.compact, spill)
    set_backend(runner.model, config.backend)
    switches = [name.upper() for name in ("tmas", "cgq", "iaaq") if getattr(config, name)]
    axes = config.axes()
    return " +".join([f"{axes['method'].upper()} {axes['bits']}", *switches])


@dataclass(frozen=True)
class Screen:
    """Where the steps go: an animation, trace lines, or nowhere."""

    console: Console
    prompt: str
    animate: bool
    trace: bool
    delay: float

    def show(self, runner: Runner, name: str, before: Sequence[Frame] = ()) -> list[Frame]:
        """Runs a model to its end beside `before`, full precision's run (none: alone). Returns its frames."""
        frames: list[Frame] = []
        with Live(console=self.console, auto_refresh=False) if self.animate else nullcontext() as live:
            for frame in runner.frames():
                frames.append(frame)
                if live is not None:
                    live.update(self._draw(runner, name, frames, before), refresh=True)
                    time.sleep(self.delay)
                if self.trace and frame.step >= 0:
                    say(self.console, trace_line(name, frame))
        return frames

    def _draw(
        self, runner: Runner, name: str, frames: Sequence[Frame], before: Sequence[Frame]
    ) -> RenderableType:
        frame, ends = frames[-1], runner.end_ids
        if not before:
            return draw_screen(self.prompt, [draw_run(name, frame, ends)])
        other = state_at(before, frame.step)
        panels = [
            draw_run("full precision", other, ends),
            draw_run(name, frame, ends, differing(other, frame)),
        ]
        notes = [describe(compare(before, frames), before, frames)] if frame.masked == 0 else []
        return draw_screen(self.prompt, panels, notes)


def generate(args: argparse.Namespace, console: Console) -> None:
    """prompt -> full precision's run -> the quantized model's run, as asked -> texts."""
    overrides, quantized = all_overrides(args)
    plan = compose_plan(overrides, stored=not quantized)
    prompt = read_prompt(args.prompt)
    if how := plan.config.sampler_config().approximations:
        print(f"dllmq.generate: approximate decoding: {how}", file=sys.stderr)
    if plan.config.threads is not None:
        torch.set_num_threads(plan.config.threads)
    runner = load(plan, prompt)
    screen = Screen(console, prompt, console.is_terminal and not args.trace, args.trace, args.delay)
    name, before = FULL_PRECISION, list[Frame]()
    stored = hasattr(runner.model, "stored")
    for line in plan.inert_in_generation(stored):
        print(f"dllmq.generate: no effect: {line}", file=sys.stderr)
    if stored:
        name = AS_STORED
        set_backend(runner.model, plan.config.backend)
    if quantized:
        with progress_bar(console, "generate") as progress:
            if args.side_by_side:
                before = replace(screen, animate=False).show(runner, FULL_PRECISION)
            name = quantize_in_place(runner, progress)
    frames = screen.show(runner, name, before)
    if not screen.animate:
        print_texts(console, runner, name, frames, before)


def print_texts(
    console: Console, runner: Runner, name: str, frames: Sequence[Frame], before: Sequence[Frame]
) -> None:
    """The answer alone, or both with their names and how they differ."""
    if not before:
        return say(console, runner.text(frames[-1]))
    for title, run in ((FULL_PRECISION, before), (name, frames)):
        say(console, f"--- {title}\n{runner.text(run[-1])}")
    return say(console, f"--- {describe(compare(before, frames), before, frames)}")


def say(console: Console, text: str) -> None:
    """Plain text, as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0, or 1 after one sentence on stderr (2 where the arguments cannot be parsed)."""
    args = arguments(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        generate(args, Console())
    except (ValueError, FloatingPointError) as error:
        print(f"dllmq.generate: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
