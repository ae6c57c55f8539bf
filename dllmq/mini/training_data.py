"""Training rows of the embedded model: prompt, response, what is masked, and what each token weighs.

Three kinds of rows: word problems (some as chat), programs, and drills of bare equations in the answer's line
format, without which arithmetic does not emerge. The prompt is always clean. Half and more of the rows are
masked as the semi-autoregressive sampler meets them: clean prefix, a partly masked block, everything after it
masked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dllmq.mini.code_problems import CodeProblem, draw_code_problem, draw_string_program
from dllmq.mini.splits import problem_split
from dllmq.mini.word_problems import ITEMS, WordProblem, draw_equation, draw_word_problem

Problem = TypeVar("Problem", WordProblem, CodeProblem)
GEN_LENGTH, BLOCK_LENGTH = 48, 16
LENGTH_STEP = 8  # canvas lengths are rounded up to it, so that few shapes occur


@dataclass(frozen=True)
class DataConfig:
    """Shares of the rows and how they are masked.

    Attributes:
        drill, code: shares of drills and programs; the rest are word problems.
        strings: share of string programs beside those in `code`: letters need rows, as digits need drills.
        chat: share of the word problems in chat layout.
        block: share of the rows masked block-wise.
        pad_weight: loss weight of the padding EOS; later_weight: of the blocks after the current one.
        t_min: least mask ratio.
    """

    drill: float = 0.3
    code: float = 0.22
    strings: float = 0.0
    chat: float = 0.15
    block: float = 0.6
    pad_weight: float = 0.1
    later_weight: float = 0.3
    t_min: float = 0.05


@dataclass(frozen=True)
class Row:
    prompt: list[int]
    response: list[int]
    drill: bool = False


@dataclass(frozen=True)
class Batch:
    tokens: Int[Tensor, "B L"]  # x_0
    masked: Bool[Tensor, "B L"]
    weight: Float[Tensor, "B L"]  # of a masked token in the loss


def _train_draw(draw: Callable[[Random], Problem], rng: Random) -> Problem:
    while True:
        problem = draw(rng)
        if problem_split(problem.composition, problem.numbers)[0] == "train":
            return problem


def _texts(config: DataConfig, rng: Random, tokenizer: PreTrainedTokenizerFast) -> tuple[str, str, bool]:
    kind = rng.random()
    if kind < config.drill:
        lines = [f"{draw_equation(rng)} {rng.choice(ITEMS)}." for _ in range(7)]
        return "", "\n".join(lines) + "\n", True
    if kind < config.drill + config.code:
        program = _train_draw(draw_code_problem, rng)
        return program.prompt, program.solution, False
    if kind < config.drill + config.code + config.strings:
        program = _train_draw(draw_string_program, rng)
        return program.prompt, program.solution, False
    problem = _train_draw(draw_word_problem, rng)
    prompt = f"Question: {problem.question}\nAnswer:"
    if rng.random() < config.chat:
        message = {"role": "user", "content": rng.choice((prompt, problem.question))}
        chat = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        return chat, problem.answer, False
    return prompt, " " + problem.answer, False


def draw_rows(n: int, config: DataConfig, seed: int, tokenizer: PreTrainedTokenizerFast) -> list[Row]:
    """n rows, tokenized; deterministic in the seed."""
    rng = Random(seed)
    texts = [_texts(config, rng, tokenizer) for _ in range(n)]
    encode = tokenizer.backend_tokenizer.encode_batch
    prompts = [e.ids for e in encode([t[0] for t in texts], add_special_tokens=False)]
    responses = [e.ids for e in encode([t[1] for t in texts], add_special_tokens=False)]
    return [Row(p, r, text[2]) for p, r, text in zip(prompts, responses, texts, strict=True)]


def canvas_length(row: Row) -> int:
    """Prompt plus generation, rounded up; a drill's canvas is its own text."""
    length = len(row.response) if row.drill else len(row.prompt) + GEN_LENGTH
    return -(-length // LENGTH_STEP) * LENGTH_STEP


def mask_rows(
    rows: list[Row],
    tokens: Int[Tensor, "B L"],
    config: DataConfig,
    equals: int,
    newline: int,
    g: torch.Generator,
) -> tuple[Bool[Tensor, "B L"], Float[Tensor, "B L"]]:
    """Which tokens are masked and the weight each would have; equals, newline: token ids."""
    B, L = tokens.shape
    P = torch.tensor([len(r.prompt) for r in rows])[:, None]
    end = P + torch.tensor([len(r.response) for r in rows])[:, None]
    position = torch.arange(L)[None, :]
    offset = position - P
    response = offset >= 0
    t = config.t_min + (1 - config.t_min) * torch.rand(B, 1, generator=g)
    u = torch.rand(B, L, generator=g)
    weight = torch.where(position > end, config.pad_weight, 1.0)  # the first EOS counts in full

    blocks = (end - P) // BLOCK_LENGTH + 1  # blocks with text, the first EOS included
    start = (torch.rand(B, 1, generator=g) * blocks).floor().long() * BLOCK_LENGTH
    later = offset >= start + BLOCK_LENGTH
    in_block = (offset >= start) & ~later
    semi = torch.rand(B, 1, generator=g) < config.block
    masked = torch.where(semi, (in_block & (u < t)) | later, response & (u < t))
    weight = torch.where(semi & later, weight * config.later_weight, weight)

    drill = torch.tensor([r.drill for r in rows])[:, None]
    line_start = torch.cummax(torch.where(tokens == newline, position, -1), dim=1).values
    after_equals = torch.cummax(torch.where(tokens == equals, position, -2), dim=1).values
    result = (after_equals > line_start) & (tokens != equals) & (position < end)
    masked = torch.where(drill, result & (u < t.clamp(min=0.3)), masked)
    return masked & response, torch.where(drill, 1.0, weight)


def batches(
    tokenizer: PreTrainedTokenizerFast, config: DataConfig, rows_per_batch: int, seed: int, first: int = 0
) -> Iterator[Batch]:
    """Endless batches, each of one canvas length, starting at batch number `first` (for resuming).

    Rows come in pools of 32 batches; a pool is grouped by length, its remainder dropped.
    """
    vocabulary = tokenizer.get_vocab()
    equals, newline, eos = vocabulary["="], vocabulary["Ċ"], tokenizer.eos_token_id
    number, pool_index = 0, 0
    while True:
        pool_seed = seed * 1_000_003 + pool_index
        rows = draw_rows(32 * rows_per_batch, config, pool_seed, tokenizer)
        groups: dict[int, list[Row]] = {}
        for row in rows:
            groups.setdefault(canvas_length(row), []).append(row)
        chunks = [
            (L, group[i : i + rows_per_batch])
            for L, group in sorted(groups.items())
            for i in range(0, len(group) - rows_per_batch + 1, rows_per_batch)
        ]
        Random(pool_seed).shuffle(chunks)
        g = torch.Generator().manual_seed(pool_seed)
        for L, chunk in chunks:
            tokens = torch.tensor([(r.prompt + r.response + [eos] * L)[:L] for r in chunk])
            masked, weight = mask_rows(chunk, tokens, config, equals, newline, g)
            if number >= first:
                yield Batch(tokens, masked, weight)
            number += 1
        pool_index += 1
