"""The reverse process as an iterator of steps; everything that denoises reads `denoise`.

LLaDA's process is this file's loop, Dream's is in dream_sampler.py. LLaDA's:

    x = prompt + gen_length masks
    for each block, for each of its steps:
        x0, confidence = model(x) at every mask left of the block's end
        commit x0 at the k most confident of them             (k: tokens_per_step of the block)

Semantics are those of ML-GSAI/LLaDA `generate.py` (arXiv:2502.09992, section 2.4), down to its corner cases:

- `steps` is the total. A block's masks are counted per row when it starts; larger counts come first.
- Masks inside the prompt are predicted too. They compete for the block's quota, so masks can be left over.
- The mask id is a legal prediction: it spends a slot of the quota and the position stays masked.
- There is no early stop and EOS is not special. A committed token never changes.
- Guidance: see predict.py. `given` = what was not a mask at the start, fixed once.
- logits_eos_inf: EOS can never be predicted (its logit is -inf).
- confidence_eos_eot_inf: x0 is untouched, but EOS and EoT are committed last. In the published code this is
  one chained assignment, to EOS of the noisy logits and EoT of the plain ones. At T = 0 these are one tensor,
  so the softmax of the confidence has -inf for both (they have confidence 0, the others are renormalised); at
  T > 0 only EoT is affected. Reproduced. Under remasking = random it does not change the order.

`cache` and `threshold` replace parts of the loop by Fast-dLLM's approximations: cache.py, threshold.py. Rows
may then differ in how many steps a block takes them.

Where we are more exact, or where the reference leaves it open:

- Confidence is a float32 softmax (reference: the logits' dtype, so bfloat16), or float64 for a float64 model.
- Ties: higher confidence first, then the leftmost position (reference: arbitrary). Equal logits: lowest id.
- A step that commits nothing in any row (more steps than tokens) is skipped: no forward, no Step.
- Temperature: argmax of logits - T log(-log u), u ~ U(0, 1) in float64, which is the argmax of the published
  exp(logits) / (-log u)^T. u is drawn at the committable positions only, in row-major order. The distribution
  is the reference's, the random stream is not; at T = 0 the stream of `random` remasking is.

Legend: B rows, P prompt, L = P + gen_length columns, E logits, N observed positions; x0 predicted tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from dllmq.diffusion.cache import cached_forward
from dllmq.diffusion.predict import Hidden, MaskPredictor, lazy_states
from dllmq.diffusion.process import tokens_per_step, uniform
from dllmq.diffusion.reader import Reader, flag_ids
from dllmq.diffusion.settings import SamplerConfig, check_sampler

OBSERVE = ("committable", "masked", "all")
Leave = Callable[[Int[Tensor, "b gen"]], Bool[Tensor, " b"]]


@dataclass(frozen=True)
class Step:
    """One denoising step: the state the model saw, what it predicted, what is kept.

    Attributes:
        index: 0-based over the whole run; skipped steps leave a gap. With a threshold block * block_length +
            the step's number in the block.
        num_steps: the config's steps; with a threshold gen_length, the most it can take.
        block: index of the block being decoded.
        tokens: x_t, before the commit.
        masked: 1[x_t = MASK], over the whole canvas.
        observed: where the model's output was read.
        prediction: x0 where observed, x_t elsewhere. Noise (T > 0) only reaches the committable positions.
        score: the confidence, softmax probability of the prediction (guided, noiseless, after the EOS flags);
            what low_confidence ranks by, also reported under the others. 0 where not observed.
        committed: what apply() turns from a mask into a token; a slot spent on a predicted mask id is not.
        forwards: model calls so far, this one included; a CFG pair is one.
        rows: which rows of the prompt batch these are; fewer once rows have left, and while rows wait whose
            block is complete (threshold).
        logits: guided, noiseless logits at the observed positions, row-major (full[observed] = logits),
            after logits_eos_inf and before confidence_eos_eot_inf; None unless asked for.
    """

    index: int
    num_steps: int
    block: int
    tokens: Int[Tensor, "B L"]
    masked: Bool[Tensor, "B L"]
    observed: Bool[Tensor, "B L"]
    prediction: Int[Tensor, "B L"]
    score: Float[Tensor, "B L"]
    committed: Bool[Tensor, "B L"]
    forwards: int
    rows: Int[Tensor, " B"]
    logits: Float[Tensor, "N E"] | None = None


@dataclass(frozen=True)
class Generation:
    """Prompt and generated tokens [B, P + gen_length], and the model calls it took."""

    tokens: Int[Tensor, "B L"]
    forwards: int


def generate(
    model: MaskPredictor,
    prompt_ids: Int[Tensor, "B P"],
    config: SamplerConfig,
    attention_mask: Shaped[Tensor, "B _"] | None = None,
    generator: torch.Generator | None = None,
) -> Generation:
    """Denoises to the end; arguments as in denoise()."""
    tokens, forwards = None, 0
    for step in denoise(model, prompt_ids, config, attention_mask, generator):
        after, forwards = apply(step), step.forwards
        if tokens is None:
            tokens = after  # the first step has every row
        else:
            tokens[step.rows] = after
    assert tokens is not None
    return Generation(tokens, forwards)


def apply(step: Step) -> Int[Tensor, "B L"]:
    """The tokens after the step's commit: the next state of the trajectory."""
    return torch.where(step.committed, step.prediction, step.tokens)


def denoise(
    model: MaskPredictor,
    prompt_ids: Int[Tensor, "B P"],
    config: SamplerConfig,
    attention_mask: Shaped[Tensor, "B _"] | None = None,
    generator: torch.Generator | None = None,
    observe: str = "committable",
    keep_logits: bool = False,
    leave: Leave | None = None,
) -> Iterator[Step]:
    """Yields every step of the reverse process, first to last.

    The generated tokens depend neither on `observe` nor on `keep_logits`: the committable positions are read
    first, by calls of the same shapes.

    Args:
        model: any MaskPredictor.
        prompt_ids: prompts, padded on the left.
        config: the sampler's settings.
        attention_mask: 1 at tokens, 0 at pads; extended with ones over the generated part. None: no pads.
        generator: source of randomness for temperature > 0 and for random remasking, one for the whole batch;
            on the model's device it is fastest. None: torch's default CPU generator.
        observe: where the LM head runs: committable (masks left of the block's end; enough to generate) |
            masked (every mask of the canvas) | all (every column). With a cache committable only.
        keep_logits: also return the logits at the observed positions.
        leave: told the generated part [b, gen_length] of the step's rows after every step; rows it answers
            true for leave the batch, so a caller that needs no more of them saves their work. The rows that
            stay go on as they would have (up to rounding, where a kernel's sums depend on the batch's size),
            except where noise is drawn for the whole batch: temperature > 0 and random remasking.

    Raises:
        ValueError: unknown `observe`, an attention mask of another shape or not left-padded, a process that
            is not the model's, an EOS flag for a model whose config does not name these tokens, or a cache
            for a model that has none.
        FloatingPointError: the model returned NaN.
    """
    if observe not in OBSERVE:
        raise ValueError(f"Unknown observe={observe}: use {', '.join(OBSERVE)}.")
    if observe != "committable" and config.cache != "none":
        raise ValueError(
            f"observe={observe} with cache={config.cache}: columns outside the block are stale; use "
            "observe=committable, or cache=none."
        )
    check_sampler(model.config, config)
    return _process(model, prompt_ids, config, attention_mask, generator, observe, keep_logits, leave)


def one_at_a_time(
    model: MaskPredictor, prompt_ids: Int[Tensor, "B P"], gen_length: int, cfg_scale: float
) -> Iterator[Step]:
    """LLaDA's process at one token a step, the most confident: the greedy answer of any mask predictor.

    Dream's own schedule truncates to other counts (dream_sampler.py).
    """
    config = SamplerConfig(gen_length, steps=gen_length, block_length=gen_length, cfg_scale=cfg_scale)
    return _process(model, prompt_ids, config, None, None, "committable", False, None)


def _process(
    model: MaskPredictor,
    prompt_ids: Int[Tensor, "B P"],
    config: SamplerConfig,
    attention_mask: Shaped[Tensor, "B _"] | None,
    generator: torch.Generator | None,
    observe: str,
    keep_logits: bool,
    leave: Leave | None,
) -> Iterator[Step]:
    """The process that `config` names, with the arguments of `denoise`."""
    if attention_mask is not None:
        attention_mask = _canvas_mask(attention_mask, prompt_ids, config.gen_length, model.device)
    mask_id = model.config.mask_token_id
    x = torch.nn.functional.pad(prompt_ids.to(model.device), (0, config.gen_length), value=mask_id)
    forward: Forward = FullForward(model, x != mask_id, attention_mask, config.cfg_scale)
    if config.cache != "none":
        forward = cached_forward(model, config, attention_mask, prompt_ids.shape[1])
    leave = _nobody if leave is None else leave
    if config.dream and config.exact:
        from dllmq.diffusion.dream_sampler import dream_process  # which reads Step and Canvas from here

        return dream_process(model, config, forward, generator, observe, keep_logits, leave).run(x)
    read: Reads = Reader(model, config, flag_ids(model, config), generator, keep_logits)
    if config.dream:
        from dllmq.diffusion.dream_sampler import DreamBlockReader

        read = DreamBlockReader(model, config, generator, keep_logits)
    process = _ReverseProcess(config, mask_id, forward, _commit_rule(config), read, observe, leave)
    return process.run(x)


def _commit_rule(config: SamplerConfig) -> "CommitRule":
    if config.threshold is None:
        return TopK(config.steps_per_block)
    from dllmq.diffusion.threshold import Threshold  # which ranks by TopK

    return Threshold(config.threshold)


@torch.no_grad()
def state_confidence(
    model: MaskPredictor,
    x: Int[Tensor, "B L"],
    attention_mask: Shaped[Tensor, "B L"] | None,
    given: Bool[Tensor, "B L"],
    where: Bool[Tensor, "B L"],
    config: SamplerConfig,
) -> Float[Tensor, "B L"]:
    """The confidence `denoise` would have in its noiseless prediction for a state, at `where`; 0 elsewhere.

    Args:
        x: x_t; attention_mask: 0 at pads; given: what guidance masks (prompt and pads).
        where: at least one position.
    """
    device = model.device
    x, given, where = x.to(device), given.to(device), where.to(device)
    mask = None if attention_mask is None else attention_mask.to(device)
    hidden = lazy_states(model, x, mask, given, config.cfg_scale)
    read = Reader(model, replace(config, temperature=0.0), flag_ids(model, config), None, keep_logits=False)
    return read(x, hidden, where, where)[1]


def refuse_nan(confidence: Float[Tensor, "B L"], index: int, config: SamplerConfig) -> None:
    """Raises FloatingPointError where the model returned NaN at the step of this index."""
    if bool(confidence.isnan().any()):
        raise FloatingPointError(
            f"The model returned NaN at denoising step {index + 1} of {config.num_steps}: check the "
            "checkpoint and the quantization (a scale of 0 or inf), or run in float32."
        )


def _nobody(generated: Int[Tensor, "b gen"]) -> Bool[Tensor, " b"]:
    return torch.zeros(len(generated), dtype=torch.bool, device=generated.device)


# The seams. A cache replaces FullForward: it is told the block and the step inside it, owes hidden states
# at the columns that can be committed, and says which these are. A threshold replaces TopK: the rule owns
# both how often a block is visited and what a visit commits.
@runtime_checkable
class Forward(Protocol):
    def __call__(self, x: Int[Tensor, "B L"], block: int, step: int) -> tuple[Hidden, ...]: ...
    def window(self, block: int, step: int, end: int) -> tuple[int, int]: ...
    def keep(self, stay: Bool[Tensor, " B"]) -> "Forward": ...


@runtime_checkable
class CommitRule(Protocol):
    """counts: tokens per step and row of a block that starts, from the masks left of its end, 0 where a row
    takes no part; remaining: the same after a step; the call: which positions a step commits."""

    def counts(self, masked: Bool[Tensor, "B E"], block_length: int) -> tuple[Int[Tensor, " B"], ...]: ...
    def remaining(self, counts: Int[Tensor, "S B"], in_block: Bool[Tensor, "B n"]) -> Int[Tensor, "S B"]: ...
    def __call__(
        self, key: Float[Tensor, "B L"], committable: Bool[Tensor, "B L"], count: Int[Tensor, " B"]
    ) -> Bool[Tensor, "B L"]: ...


@runtime_checkable
class Reads(Protocol):
    """Hidden states -> prediction, confidence and logits (None unless kept), as reader.Reader."""

    @property
    def generator(self) -> torch.Generator | None: ...
    def __call__(
        self,
        x: Int[Tensor, "B L"],
        hidden: tuple[Hidden, ...],
        committable: Bool[Tensor, "B L"],
        observed: Bool[Tensor, "B L"],
    ) -> tuple[Int[Tensor, "B L"], Float[Tensor, "B L"], Float[Tensor, "N E"] | None]: ...


@dataclass(frozen=True)
class FullForward:
    """x_t -> hidden states of the canvas, recomputed in each step (the last block where they are read)."""

    model: MaskPredictor
    given: Bool[Tensor, "B L"]
    attention_mask: Shaped[Tensor, "B L"] | None
    cfg_scale: float

    def __call__(self, x: Int[Tensor, "B L"], block: int, step: int) -> tuple[Hidden, ...]:
        return lazy_states(self.model, x, self.attention_mask, self.given, self.cfg_scale)

    def window(self, block: int, step: int, end: int) -> tuple[int, int]:
        """Masks of the prompt compete in every step."""
        return 0, end

    def keep(self, stay: Bool[Tensor, " B"]) -> "FullForward":
        """The same for the rows that stay in the batch."""
        mask = None if self.attention_mask is None else self.attention_mask[stay]
        return replace(self, given=self.given[stay], attention_mask=mask)


@dataclass(frozen=True)
class TopK:
    """Commits a fixed number of tokens per step: the k highest keys of each row."""

    steps_per_block: int

    def counts(self, masked: Bool[Tensor, "B E"], block_length: int) -> tuple[Int[Tensor, " B"], ...]:
        """k per row, one tensor per step of the block that starts (on the CPU: reading it costs no sync)."""
        in_block = masked[:, -block_length:]
        return tokens_per_step(in_block.sum(1).cpu(), self.steps_per_block).unbind(1)

    def remaining(self, counts: Int[Tensor, "S B"], in_block: Bool[Tensor, "B n"]) -> Int[Tensor, "S B"]:
        """The schedule is fixed when the block starts."""
        return counts

    def __call__(
        self, key: Float[Tensor, "B L"], committable: Bool[Tensor, "B L"], count: Int[Tensor, " B"]
    ) -> Bool[Tensor, "B L"]:
        """Picks `count` committable positions per row by highest key; equal keys go to the leftmost."""
        order = key.masked_fill(~committable, -torch.inf).argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order)
        rank.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
        return (rank < count.to(rank.device)[:, None]) & committable


@dataclass(frozen=True)
class Canvas:
    """The state between two steps: x_t of the rows that are left, which rows these are, what runs them."""

    x: Int[Tensor, "B L"]
    rows: Int[Tensor, " B"]
    forward: Forward
    forwards: int

    def keep(self, stay: Bool[Tensor, " B"]) -> "Canvas":
        return replace(self, x=self.x[stay], rows=self.rows[stay], forward=self.forward.keep(stay))


@dataclass(frozen=True)
class _ReverseProcess:
    """The loop and what it is made of."""

    config: SamplerConfig
    mask_id: int
    forward: Forward
    commit: CommitRule
    read: Reads
    observe: str
    leave: Leave

    def run(self, x: Int[Tensor, "B L"]) -> Iterator[Step]:
        c, forwards = self.config, 0
        x, here = x.clone(), torch.ones(len(x), dtype=torch.bool, device=x.device)
        for block in range(c.num_blocks):
            end = x.shape[1] - c.gen_length + (block + 1) * c.block_length
            canvas = Canvas(x[here], here.nonzero()[:, 0], self.forward.keep(here), forwards)
            masked = canvas.x[:, :end] == self.mask_id
            counts = torch.stack(self.commit.counts(masked, c.block_length))  # [steps of the block, B]
            for i in range(len(counts)):
                if not counts[i].any():
                    self._random_key(canvas.x)  # the reference draws here, and we follow its stream
                    continue
                if not counts[i].all():  # rows wait whose block is complete
                    going = counts[i] > 0
                    canvas, counts = canvas.keep(going.to(x.device)), counts[:, going]
                step = self._step(canvas, block, i, end, counts[i])
                yield step
                canvas = replace(canvas, x=apply(step), forwards=step.forwards)
                x[canvas.rows], forwards = canvas.x, step.forwards
                gone = self.leave(canvas.x[:, -c.gen_length :])
                if gone.any():
                    here[canvas.rows[gone]] = False
                    if not here.any():
                        return
                    canvas, counts = canvas.keep(~gone), counts[:, ~gone.cpu()]
                in_block = canvas.x[:, end - c.block_length : end] == self.mask_id
                counts = self.commit.remaining(counts, in_block)

    # On the step, not on the generator: there the mode would leak to the consumer between two steps. And not
    # inference_mode: states are used, and may be changed, outside.
    @torch.no_grad()
    def _step(self, canvas: "Canvas", block: int, i: int, end: int, count: Int[Tensor, " B"]) -> Step:
        x = canvas.x
        index = block * self.config.visits_per_block + i
        masked, columns = x == self.mask_id, torch.arange(x.shape[1], device=x.device)
        first, last = canvas.forward.window(block, i, end)
        committable = masked & (columns >= first) & (columns < last)
        observed = {"committable": committable, "masked": masked, "all": torch.ones_like(masked)}[
            self.observe
        ]
        prediction, confidence, logits = self.read(x, canvas.forward(x, block, i), committable, observed)
        refuse_nan(confidence, index, self.config)
        draw = self._random_key(x)
        chosen = self.commit(confidence if draw is None else draw, committable, count)
        return Step(
            index=index,
            num_steps=self.config.num_steps,
            block=block,
            tokens=x,
            masked=masked,
            observed=observed,
            prediction=prediction,
            score=confidence.float(),
            committed=chosen & (prediction != self.mask_id),
            forwards=canvas.forwards + 1,
            rows=canvas.rows,
            logits=logits,
        )

    def _random_key(self, x: Int[Tensor, "B L"]) -> Float[Tensor, "B L"] | None:
        """U[0, 1) for the whole canvas under random remasking; None, and nothing drawn, otherwise."""
        if self.config.remasking != "random":
            return None
        return uniform(tuple(x.shape), self.read.generator, x.device)


def _canvas_mask(mask: Tensor, prompt_ids: Tensor, gen_length: int, device: torch.device) -> Tensor:
    """The prompts' attention mask, checked and extended with ones over the generated part."""
    if mask.shape != prompt_ids.shape:
        raise ValueError(
            f"attention_mask must have the prompts' shape {list(prompt_ids.shape)}; got {list(mask.shape)}. "
            "It covers the prompt only."
        )
    if bool((mask[:, 1:].long() < mask[:, :-1].long()).any()):
        raise ValueError("Prompts must be padded on the left: a row of attention_mask is zeros, then ones.")
    mask = mask.to(device)
    return torch.cat([mask, mask.new_ones(mask.shape[0], gen_length)], dim=1)
