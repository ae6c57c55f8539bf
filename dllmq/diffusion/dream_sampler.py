"""Dream's reverse process (arXiv 2508.15487), reached through `denoise` like LLaDA's.

    x = prompt + gen_length masks;   t_0 = 1 > t_1 > ... > t_S = eps, evenly spaced
    for each step i, with r = 1 - t_{i+1} / t_i  (r = 1 in the last step) and n masks in a row:
        origin    each mask is drawn with probability r; x0 ~ q, committed wherever drawn
        others    x0 ~ q at every mask, committed at the int(n r) masks of highest confidence

q = softmax(logits / T), cut to the tokens that make up top_p, then to the first top_k; at T = 0 the logits
stay undivided and x0 is the likeliest token. Confidences:

    maskgit_plus  q(x0)        topk_margin  q_1 - q_2        entropy  sum_v q(v) log(q(v) + 1e-10)

alg_temp > 0 draws the committed masks without replacement with probabilities softmax(confidence / alg_temp).
Semantics are those of `_sample` in Dream's `generation_utils.py`, down to its corner cases:

- The logits are shifted; predict.py has aligned them. No blocks: all masks compete, the prompt's included.
- int(n r) truncates in float32: 16 masks in 16 steps give 0 1 1 ... 1 2.
- T divides the logits before the confidence is taken, so a low T > 0 makes confidences saturate.
- The mask id is a legal prediction: it spends a slot and the position stays masked.
- There is no early stop and EOS is not special. A committed token never changes.

Where we are more exact, or decide:

- Softmax and confidences in float32 (Dream: the logits' dtype), or float64 for a float64 model.
- n is the row's own number of masks, so rows do not depend on each other (Dream: the batch's mean; equal as
  long as the rows have equally many).
- Ties: higher confidence first, then the leftmost position. Equal logits: lowest id.
- A step that commits nothing in any row is skipped: no forward, no Step, no noise.
- alg_temp is Gumbel top-k on confidence / alg_temp. Dream's softmax can underflow to 0; it may then draw
  positions that are not masked and turn them back into masks.
- Noise is drawn where the generator lives. A CPU generator gives the numbers that torch.rand and
  torch.multinomial would draw in Dream's order (up to `predict.CHUNK` masks; skipped steps left out).

Legend: as in sampler.py; q [n, E] token distribution, r share of the masks that a step takes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllmq.diffusion.predict import Hidden, MaskPredictor, at_least_float32, logits_at, positions
from dllmq.diffusion.process import uniform
from dllmq.diffusion.sampler import Canvas, Forward, Leave, Step, TopK, apply, refuse_nan
from dllmq.diffusion.settings import SamplerConfig


def unmask_shares(steps: int, eps: float) -> Float[Tensor, " S"]:
    """r_i = 1 - t_{i+1} / t_i in float32, 1 in the last step."""
    t = torch.linspace(1, eps, steps + 1)
    shares = 1 - t[1:] / t[:-1]
    shares[-1] = 1
    return shares


def cut_logits(
    logits: Float[Tensor, "n E"], temperature: float, top_p: float | None, top_k: int | None
) -> Float[Tensor, "n E"]:
    """logits / T, with finfo.min outside of top_p and top_k; the same tensor where nothing is to be done.

    top_p keeps the likeliest tokens up to the one whose probability brings the sum above top_p.
    """
    least = torch.finfo(logits.dtype).min
    if temperature > 0:
        logits = logits / temperature
    if top_p is not None and top_p < 1:
        ordered, ids = logits.sort(descending=True, stable=True)
        beyond = (ordered.softmax(-1).cumsum(-1) > top_p).roll(1, -1)
        beyond[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter_(-1, ids, beyond), least)
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, least)
    return logits


def confidence_of(remasking: str, q: Float[Tensor, "n E"], x0: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """What a process ranks by: higher is committed earlier."""
    if remasking == "topk_margin":
        first, second = q.topk(2).values.unbind(-1)
        return first - second
    if remasking == "entropy":
        return (q * torch.log(q + 1e-10)).sum(-1)
    return q.gather(-1, x0[:, None])[:, 0]


def exponential(
    shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Draws Exp(1) on the generator's device and moves it to `device`.

    argmax q / e, e ~ Exp(1), is a draw from q, and top-k one of k without replacement (as torch.multinomial).
    """
    source = generator.device if generator is not None else torch.device("cpu")
    return torch.empty(shape, dtype=dtype, device=source).exponential_(generator=generator).to(device)


def dream_process(
    model: MaskPredictor,
    config: SamplerConfig,
    forward: Forward,
    generator: torch.Generator | None,
    observe: str,
    keep_logits: bool,
    leave: Leave,
) -> "DreamProcess":
    """The process with the arguments of `denoise`."""
    read = DreamReader(model, config, generator, keep_logits)
    return DreamProcess(config, int(model.config.mask_token_id), forward, read, observe, leave)


@dataclass(frozen=True)
class DreamProcess:
    """The loop. `committable` positions are those a step draws x0 at: all masks, or origin's drawn ones."""

    config: SamplerConfig
    mask_id: int
    forward: Forward
    read: "DreamReader"
    observe: str
    leave: Leave

    def run(self, x: Int[Tensor, "B L"]) -> Iterator[Step]:
        canvas = Canvas(x, torch.arange(len(x), device=x.device), self.forward, 0)
        for index, share in enumerate(unmask_shares(self.config.steps, self.config.eps)):
            where, count = self._candidates(canvas.x, share)
            if not count.any():
                continue
            step = self._step(canvas, index, where, count)
            yield step
            canvas = replace(canvas, x=apply(step), forwards=step.forwards)
            stay = ~self.leave(canvas.x[:, -self.config.gen_length :])
            if not stay.any():
                return
            if not stay.all():
                canvas = canvas.keep(stay)

    def _candidates(
        self, x: Int[Tensor, "B L"], share: Float[Tensor, ""]
    ) -> tuple[Bool[Tensor, "B L"], Int[Tensor, " B"]]:
        """Where x0 is drawn, and how many of these positions each row commits (on the CPU)."""
        masked = x == self.mask_id
        if self.config.remasking != "origin":
            return masked, (masked.sum(1).cpu() * share).long()
        drawn = masked.clone()
        drawn[masked] = uniform((int(masked.sum()),), self.read.generator, x.device) < share.to(x.device)
        return drawn, drawn.sum(1).cpu()

    @torch.no_grad()
    def _step(self, canvas: Canvas, index: int, where: Bool[Tensor, "B L"], count: Int[Tensor, " B"]) -> Step:
        x = canvas.x
        masked = x == self.mask_id
        observed = {"committable": where, "masked": masked, "all": torch.ones_like(masked)}[self.observe]
        found = self.read(x, canvas.forward(x, 0, index), where, observed)
        refuse_nan(found.score, index, self.config)
        chosen = TopK(self.config.steps)(self._keys(found.confidence), where, count)
        return Step(
            index=index,
            num_steps=self.config.steps,
            block=0,
            tokens=x,
            masked=masked,
            observed=observed,
            prediction=found.prediction,
            score=found.score.float(),
            committed=chosen & (found.prediction != self.mask_id),
            forwards=canvas.forwards + 1,
            rows=canvas.rows,
            logits=found.logits,
        )

    def _keys(self, confidence: Float[Tensor, "B L"]) -> Float[Tensor, "B L"]:
        if not self.config.alg_temp:
            return confidence
        e = exponential(tuple(confidence.shape), self.read.generator, confidence.device, confidence.dtype)
        return confidence / self.config.alg_temp - e.log()


class Reading(NamedTuple):
    """What the model says about a canvas; logits [N, E] at the observed positions if they are kept."""

    prediction: Int[Tensor, "B L"]
    confidence: Float[Tensor, "B L"]
    score: Float[Tensor, "B L"]
    logits: Float[Tensor, "N E"] | None


@dataclass(frozen=True)
class DreamReader:
    """hidden states -> prediction, confidence, score (and logits) at the observed positions."""

    model: MaskPredictor
    config: SamplerConfig
    generator: torch.Generator | None
    keep_logits: bool

    def __call__(
        self,
        x: Int[Tensor, "B L"],
        hidden: tuple[Hidden, ...],
        drawn: Bool[Tensor, "B L"],
        observed: Bool[Tensor, "B L"],
    ) -> Reading:
        """Reads `drawn` alone and first, so that rounding and noise never depend on `observed`."""
        dtype = torch.promote_types(hidden[0].dtype, torch.float32)
        prediction, confidence = x.clone(), torch.zeros(x.shape, dtype=dtype, device=x.device)
        score, logits = confidence.clone(), None
        groups = [(drawn, self._draw)]
        if observed is not drawn:
            groups.append((observed & ~drawn, _likeliest))
        for where, read in groups:
            at = positions(where)
            parts = [
                (*read(own), own if self.keep_logits else own.new_empty(len(own), 0))
                for own in map(at_least_float32, logits_at(self.model, hidden, at, 0.0))
            ]
            if not parts:
                continue
            prediction[at], confidence[at], score[at], values = (
                torch.cat(part) for part in zip(*parts, strict=True)
            )
            if self.keep_logits:
                if logits is None:
                    logits = values.new_empty(int(observed.sum()), values.shape[1])
                logits[where[observed]] = values
        return Reading(prediction, confidence, score, logits)

    def _draw(self, logits: Float[Tensor, "n E"]) -> tuple[Tensor, Tensor, Tensor]:
        """x0, its confidence and its score (probability under the plain logits), [n] each."""
        c, p = self.config, logits.softmax(-1)
        cut = cut_logits(logits, c.temperature, c.top_p, c.top_k)
        q = p if cut is logits else cut.softmax(-1)
        if c.temperature > 0:
            x0 = (q / exponential(tuple(q.shape), self.generator, q.device, q.dtype)).argmax(-1)
        else:
            x0 = cut.argmax(-1)
        return x0, confidence_of(c.remasking, q, x0), p.gather(-1, x0[:, None])[:, 0]


@dataclass(frozen=True)
class DreamBlockReader:
    """What Dream's block-wise decoding (a cache and a threshold) reads, in the form of reader.Reader.

    Confidences are q(x0), as maskgit_plus has them.
    """

    model: MaskPredictor
    config: SamplerConfig
    generator: torch.Generator | None
    keep_logits: bool

    def __call__(
        self,
        x: Int[Tensor, "B L"],
        hidden: tuple[Hidden, ...],
        committable: Bool[Tensor, "B L"],
        observed: Bool[Tensor, "B L"],
    ) -> tuple[Int[Tensor, "B L"], Float[Tensor, "B L"], Float[Tensor, "N E"] | None]:
        read = DreamReader(self.model, self.config, self.generator, self.keep_logits)
        found = read(x, hidden, committable, observed)
        return found.prediction, found.confidence, found.logits


def _likeliest(logits: Float[Tensor, "n E"]) -> tuple[Tensor, Tensor, Tensor]:
    """The noiseless x0 and its probability, twice."""
    p, x0 = logits.softmax(-1).max(-1)
    return x0, p, p
