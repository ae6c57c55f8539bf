"""Monte-Carlo lower bound of log p(answer | prompt), and whether the answer is the greedy one.

With T answer tokens, l ~ U{1..T} of them masked, uniformly at random,

    log p(a | q) >= -E_l,x_l [ T / l  sum_{i masked} -log p(a_i | q, x_l) ]     (arXiv:2502.09992, eq. 14)

estimated as in ML-GSAI/LLaDA `get_log_likelihood.py`: num_samples / batch_size batches, each stratified in l
(process.stratified_masks); the batch size is part of the estimator, not only of its speed. Nats, not divided
by the length. With guidance the unconditional copy has the whole prompt masked.

Differences:

- Cross-entropy in float32 (reference: the logits' dtype).
- Samples that drew the same mask are computed once and weighted: a one-token answer takes one row, not
  num_samples. The same sum, up to rounding.
- Only what was drawn is scored. The reference also scores a mask id that stands in the prompt or the answer.

A model with shifted logits (Dream) is scored as its authors do, `_eval_target_nll_mc` of their harness: with
t ~ U(0, 1) and each answer token masked with probability p = (1 - eps) t + eps, eps = 1e-3,

    log p(a | q) >= -E_t,x_t [ 1 / p  sum_{i masked} -log p(a_i | q, x_t) ]

each batch stratified in t (process.bernoulli_masks). For eps -> 0 the expectation is the one above: a mask of
k out of T tokens weighs 1 / (k binom(T, k)) in both. An end of text follows the answer, is never masked and
is not scored. The sequence's first token is never masked either, as no column predicts it; so the prompt has
at least one token (BOS; theirs is BOS for Dream-Base). Not divided by the length.

Legend: P prompt tokens, A = T answer tokens, R rows of one forward, L columns.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dllmq.diffusion.predict import MaskPredictor, at_least_float32, lazy_states, logits_at, positions
from dllmq.diffusion.process import bernoulli_masks, stratified_masks
from dllmq.diffusion.sampler import apply, one_at_a_time

Progress = Callable[[int, int, str], None]
# (index of a forward, requests of its rows, what computes their cross-entropies) -> those, or what was kept
Keep = Callable[[int, list[int], Callable[[], list[float]]], list[float]]
_DREAM_EPS = 1e-3  # the least mask ratio of Dream's estimator, as its authors set it


def log_likelihood(
    model: MaskPredictor,
    prompt_ids: Int[Tensor, " P"],
    answer_ids: Int[Tensor, " A"],
    num_samples: int = 128,
    batch_size: int = 8,
    cfg_scale: float = 0.0,
    generator: torch.Generator | None = None,
) -> float:
    """Estimates the bound for one answer, in nats.

    Args:
        model: any MaskPredictor.
        prompt_ids: the condition; may be empty.
        answer_ids: what is scored; at least one token.
        num_samples: Monte-Carlo samples, a multiple of batch_size.
        batch_size: strata per batch, and rows per forward.
        cfg_scale: classifier-free guidance; 0 is off.
        generator: a CPU generator; asked for one randint, then batch_size randperms, per batch (Dream: see
            process.bernoulli_masks). None: torch's default one.

    Raises:
        ValueError: num_samples is not a multiple of batch_size, the answer is empty, or Dream's prompt.
    """
    _check(num_samples, batch_size, cfg_scale, [answer_ids])
    draw = _rows_of(model, [(prompt_ids, answer_ids)])
    rows = draw(0, prompt_ids, answer_ids, num_samples, batch_size, generator)
    return _evaluate(model, rows, 1, batch_size, cfg_scale, None)[0]


def log_likelihoods(
    model: MaskPredictor,
    requests: Sequence[tuple[Int[Tensor, " _"], Int[Tensor, " _"]]],
    num_samples: int = 128,
    batch_size: int = 8,
    cfg_scale: float = 0.0,
    seed: int = 0,
    rows_per_forward: int = 64,
    progress: Progress | None = None,
    keep: Keep | None = None,
) -> list[float]:
    """Estimates the bound for many (prompt, answer) pairs, in their order.

    Requests are sorted by length and their rows share forwards, padded on the left. Each request has its own
    generator (request_generator), so a value depends on the request and the seed alone, up to rounding. It is
    log_likelihood(..., generator=request_generator(prompt, answer, seed)).

    Args:
        model, num_samples, batch_size, cfg_scale: as in log_likelihood.
        requests: pairs of 1-D token ids.
        seed: base seed.
        rows_per_forward: rows in one forward (twice that under guidance).
        progress: called with (finished requests, all requests, "log-likelihood").
        keep: asked for the cross-entropies of each forward's rows in the place of computing them, so that a
            run that was stopped goes on; the same numbers as without it.
    """
    _check(num_samples, batch_size, cfg_scale, [answer for _, answer in requests])
    if rows_per_forward < 1:
        raise ValueError(f"rows_per_forward must be an integer >= 1; got {rows_per_forward}.")
    draw = _rows_of(model, requests)

    def all_rows() -> Iterator[_Row]:
        longest_first = sorted(range(len(requests)), key=lambda r: -sum(len(ids) for ids in requests[r]))
        for r in longest_first:
            generator = request_generator(*requests[r], seed)
            yield from draw(r, *requests[r], num_samples, batch_size, generator)

    return _evaluate(model, all_rows(), len(requests), rows_per_forward, cfg_scale, progress, keep)


def request_generator(
    prompt_ids: Int[Tensor, " P"], answer_ids: Int[Tensor, " A"], seed: int = 0
) -> torch.Generator:
    """A CPU generator seeded by the request's tokens and `seed`: the same wherever the request stands."""
    content = repr((seed, prompt_ids.tolist(), answer_ids.tolist())).encode()
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def greedy_match(
    model: MaskPredictor,
    prompt_ids: Int[Tensor, " P"],
    answer_ids: Int[Tensor, " A"],
    cfg_scale: float = 0.0,
) -> bool:
    """Whether greedy decoding, one most confident token per forward, gives exactly `answer_ids`.

    Stops at the first token that differs. Source: ML-GSAI/LLaDA `eval_llada.py`, `suffix_greedy_prediction`.

    Raises:
        ValueError: the answer is empty.
    """
    _check(1, 1, cfg_scale, [answer_ids])
    length = len(answer_ids)
    answer = answer_ids.to(model.device)
    for step in one_at_a_time(model, prompt_ids[None], length, cfg_scale):
        committed, prediction = step.committed[0, -length:], step.prediction[0, -length:]
        if bool((committed & (prediction != answer)).any()):
            return False
    return bool((apply(step)[0, -length:] == answer).all())


@dataclass(frozen=True)
class _Row:
    """One masked copy of a request, to be read in one row of a forward."""

    request: int
    prompt: Int[Tensor, " P"]
    answer: Int[Tensor, " A"]
    masked: Bool[Tensor, " A"]
    weight: float  # of its cross-entropy in the request's estimate: LLaDA multiplicity * T / l / num_samples

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def _rows_of(
    model: MaskPredictor, requests: Sequence[tuple[Tensor, Tensor]]
) -> Callable[..., Iterator[_Row]]:
    """What draws a request's samples for this model: LLaDA's estimator, or Dream's.

    Raises:
        ValueError: an empty prompt, with Dream.
    """
    if not getattr(model.config, "shifted_logits", False):
        return _llada_rows
    if any(len(prompt) == 0 for prompt, _ in requests):
        raise ValueError(
            "A prompt has no tokens, and Dream cannot predict the first token of a sequence: start prompts "
            "with BOS (add_bos=true)."
        )
    return partial(_dream_rows, end=torch.tensor([int(model.config.eos_token_id)]))


def _llada_rows(
    request: int,
    prompt: Int[Tensor, " P"],
    answer: Int[Tensor, " A"],
    num_samples: int,
    batch_size: int,
    generator: torch.Generator | None,
) -> Iterator[_Row]:
    """LLaDA's: draws a request's samples; those with equal masks become one row."""
    prompt, answer = prompt.cpu(), answer.cpu()
    batches = [
        stratified_masks(len(answer), batch_size, generator)[0] for _ in range(num_samples // batch_size)
    ]
    masks, multiplicity = torch.cat(batches).cpu().unique(dim=0, return_counts=True)
    for masked, times in zip(masks, multiplicity.tolist(), strict=True):
        weight = times * len(answer) / int(masked.sum()) / num_samples
        yield _Row(request, prompt, answer, masked, weight)


def _dream_rows(
    request: int,
    prompt: Int[Tensor, " P"],
    answer: Int[Tensor, " A"],
    num_samples: int,
    batch_size: int,
    generator: torch.Generator | None,
    end: Int[Tensor, "1"],
) -> Iterator[_Row]:
    """Dream's: equal masks become one row, with the sum of their weights; no masks are no row."""
    prompt, answer = prompt.cpu(), answer.cpu()
    columns = len(prompt) + len(answer) + len(end)
    drawn = [
        bernoulli_masks(len(answer), columns, batch_size, _DREAM_EPS, generator)
        for _ in range(num_samples // batch_size)
    ]
    masks, which = torch.cat([masked for masked, _ in drawn]).cpu().unique(dim=0, return_inverse=True)
    ratios = torch.cat([p for _, p in drawn]).cpu().double()
    weights = torch.zeros(len(masks), dtype=torch.float64).index_add_(0, which, 1 / ratios / num_samples)
    sequence, never = torch.cat([answer, end]), torch.zeros(1, dtype=torch.bool)
    for masked, weight in zip(masks, weights.tolist(), strict=True):
        if bool(masked.any()):
            yield _Row(request, prompt, sequence, torch.cat([masked, never]), weight)


@torch.no_grad()
def _evaluate(
    model: MaskPredictor,
    rows: Iterator[_Row],
    num_requests: int,
    rows_per_forward: int,
    cfg_scale: float,
    progress: Progress | None,
    keep: Keep | None = None,
) -> list[float]:
    """Sums -weight * cross-entropy per request; a request's rows are consecutive."""
    totals = [0.0] * num_requests
    met: set[int] = set()  # all but the latest are finished
    for index, batch in enumerate(_batched(rows, rows_per_forward)):
        compute = partial(_cross_entropies, model, batch, cfg_scale)
        nats_of = compute() if keep is None else keep(index, [row.request for row in batch], compute)
        for row, nats in zip(batch, nats_of, strict=True):
            totals[row.request] -= row.weight * nats
            met.add(row.request)
        if progress is not None:
            progress(len(met) - 1, num_requests, "log-likelihood")
    if progress is not None:
        progress(num_requests, num_requests, "log-likelihood")
    return totals


def _cross_entropies(model: MaskPredictor, batch: list[_Row], cfg_scale: float) -> list[float]:
    """The summed cross-entropy of each row's masked answer tokens, [R]."""
    x, target, masked, answer, valid = (
        part.to(model.device) for part in _collate(batch, model.config.mask_token_id)
    )
    attention_mask = None if bool(valid.all()) else valid.long()
    hidden = lazy_states(model, x, attention_mask, ~answer, cfg_scale)
    at = positions(masked)
    losses = [
        torch.nn.functional.cross_entropy(at_least_float32(logits), wanted, reduction="none")
        for logits, wanted in _with_targets(logits_at(model, hidden, at, cfg_scale), target[at])
    ]
    nats = torch.cat(losses).cpu().double()
    sums = torch.zeros(len(batch), dtype=torch.float64).index_add_(0, at[0].cpu(), nats)
    found: list[float] = sums.tolist()
    return found


def _with_targets(chunks: Iterator[Tensor], targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    start = 0
    for logits in chunks:
        yield logits, targets[start : start + len(logits)]
        start += len(logits)


def _collate(batch: list[_Row], mask_id: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Left-pads rows to x_t, x_0, masked, answer, valid, all [R, L]. Pads are id 0 and not valid."""
    shape = (len(batch), max(len(row) for row in batch))
    target = torch.zeros(shape, dtype=torch.long)
    masked, answer, valid = (torch.zeros(shape, dtype=torch.bool) for _ in range(3))
    for i, row in enumerate(batch):
        target[i, shape[1] - len(row) :] = torch.cat([row.prompt, row.answer])
        masked[i, shape[1] - len(row.answer) :] = row.masked
        answer[i, shape[1] - len(row.answer) :] = True
        valid[i, shape[1] - len(row) :] = True
    return target.masked_fill(masked, mask_id), target, masked, answer, valid


def _batched(rows: Iterator[_Row], size: int) -> Iterator[list[_Row]]:
    batch: list[_Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _check(num_samples: int, batch_size: int, cfg_scale: float, answers: Sequence[Tensor]) -> None:
    if num_samples < 1 or batch_size < 1 or num_samples % batch_size:
        raise ValueError(
            "num_samples must be a multiple of batch_size (the number of strata), and both >= 1; got "
            f"num_samples={num_samples} and batch_size={batch_size}."
        )
    if not cfg_scale >= 0:
        raise ValueError(f"cfg_scale must be >= 0; got {cfg_scale}.")
    if any(len(answer) == 0 for answer in answers):
        raise ValueError("An answer has no tokens: there is nothing to score. Give at least one token.")
