"""DiffusionLM: a mask predictor as lm-eval sees it.

Generation denoises with the one loop of diffusion/, so gen_length, steps, temperature and guidance come from
the settings. Of a request's own arguments only `until` is honoured; `max_gen_toks`, `temperature` and
`do_sample` are not (asking for sampling while the sampler is greedy warns once).

Batches are a function of the requests alone (batches.py); within a batch prompts are padded on the left.
Answers come back in the order of the requests, and shuffled requests give the same answers.

An answer's text follows ML-GSAI/LLaDA `eval_llada.py`: decode with special tokens, cut at each stop string in
turn, tokenize again and decode without special tokens. There is no cut at EOS in it (eos_cut="none"); under
eos_cut="first" the tokens from the first EOS or EoT on are dropped before. Nothing adds BOS unless the
settings say so (add_bos): prompts are tokenized as they are, a chat template brings its own.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from torch import Tensor

from dllmq.diffusion import MaskPredictor, apply, denoise, greedy_match, log_likelihoods
from dllmq.diffusion.predict import States, states_of
from dllmq.evaluation.answers import AnswerLog, Batch, digest
from dllmq.evaluation.batches import Batches, halved, prompt_columns, settle
from dllmq.evaluation.settings import EvalSettings
from dllmq.evaluation.shares import Replanned
from dllmq.models.graphs import GraphedModel, graphed
from dllmq.models.tokenizer import render_chat

log = logging.getLogger(__name__)
Progress = Callable[[int, int, str], None]


@runtime_checkable
class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    chat_template: Any
    name_or_path: str

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any: ...
    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...
    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any: ...


@dataclass
class Counters:
    """What the requests so far took.

    Attributes:
        requests: answered.
        forwards: calls of the transformer; a guided pair is one.
        positions: token positions that these calls computed, rows times columns.
        answer_forwards: denoising steps of all generated answers together, as if each had been alone.
        generated_tokens: tokens of the answers as returned, so after every cut.
        truncated: answers that filled gen_length without EOS, EoT or a stop string.
        batch_size: prompts denoised together at most, as settled in the end; 0 where nothing was generated.
        halved_from: that size at first, where memory ran out and noise is drawn batch by batch; else 0.
    """

    requests: int = 0
    forwards: int = 0
    positions: int = 0
    answer_forwards: int = 0
    generated_tokens: int = 0
    truncated: int = 0
    batch_size: int = 0
    halved_from: int = 0


@dataclass(frozen=True)
class Answer:
    """A generated answer; `ended` tells whether EOS, EoT or a stop string was met."""

    text: str
    num_tokens: int
    ended: bool


def cut_answer(
    tokens: list[int], until: Sequence[str], eos_ids: Sequence[int], eos_cut: str, tokenizer: Tokenizer
) -> Answer:
    """Turns generated tokens into an answer, as the module's docstring says."""
    end = next((i for i, token in enumerate(tokens) if token in eos_ids), None)
    text = tokenizer.decode(tokens[:end] if eos_cut == "first" else tokens, skip_special_tokens=False)
    kept = text
    for stop in filter(None, until):
        kept = kept.split(stop)[0]
    ids = tokenizer(kept, add_special_tokens=False)["input_ids"]
    answer = tokenizer.decode(ids, skip_special_tokens=True)
    return Answer(answer, len(ids), ended=end is not None or len(kept) < len(text))


class CountingModel:
    """The model's face towards diffusion/, counting calls of the transformer."""

    def __init__(self, model: MaskPredictor, counters: Counters) -> None:
        self.model, self.counters, self.config = model, counters, model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self._count(input_ids)
        return self.model.hidden_states(input_ids, attention_mask)

    def states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> States:
        self._count(input_ids)
        return states_of(self.model, input_ids, attention_mask)

    @property
    def start_cache(self) -> Callable[..., tuple[Tensor, Any]]:
        """The model's, counted; AttributeError, so `hasattr` is false, where the model keeps nothing."""
        return self._counted(self.model.start_cache)  # type: ignore[attr-defined]

    @property
    def use_cache(self) -> Callable[..., Tensor]:
        return self._counted(self.model.use_cache)  # type: ignore[attr-defined]

    def _counted(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def counted(input_ids: Tensor, *rest: Any) -> Any:
            self._count(input_ids)
            return forward(input_ids, *rest)

        return counted

    def _count(self, input_ids: Tensor) -> None:
        self.counters.forwards += 1
        self.counters.positions += input_ids.numel()

    def head(self, h: Tensor) -> Tensor:
        return self.model.head(h)


class DiffusionLM(LM):
    """lm-eval's `LM` over a mask predictor.

    Args:
        model: any MaskPredictor; its config has max_sequence_length, or the settings a max_length.
        tokenizer: a Hugging Face tokenizer.
        settings: how it answers.
        progress: called with (done, total, what) after each denoising step, or finished likelihood.
        answers: of an earlier run that was stopped; the batches in it are not answered again.

    Attributes:
        counters: what the requests so far took.
    """

    def __init__(
        self,
        model: MaskPredictor,
        tokenizer: Tokenizer,
        settings: EvalSettings | None = None,
        progress: Progress | None = None,
        answers: AnswerLog | None = None,
    ) -> None:
        super().__init__()
        self.counters, self.answers = Counters(), answers or AnswerLog(None, "")
        self.model, self.tokenizer = CountingModel(graphed(model), self.counters), tokenizer
        self.settings, self.progress = settings or EvalSettings(), progress
        self._device = model.device
        self._warned = False
        self._templated = self.settings.chat_template
        names = ("eos_token_id", "eot_token_id")
        self.eos_ids = [i for name in names if (i := getattr(model.config, name, None)) is not None]

    @property
    def max_length(self) -> int | None:
        """Tokens a canvas may have; None when neither the settings nor the model say."""
        return self.settings.max_length or getattr(self.model.config, "max_sequence_length", None)

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _bos(self) -> list[int]:
        """What every prompt starts with.

        Raises:
            ValueError: BOS is asked for, but the tokenizer has none.
        """
        if not self.settings.add_bos or self._templated:
            return []
        bos = getattr(self.tokenizer, "bos_token_id", None)
        if bos is None:
            raise ValueError("The settings start prompts with BOS, but the tokenizer has no BOS token.")
        return [int(bos)]

    # --- generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers in the order of the requests.

        Raises:
            ValueError: a prompt and gen_length together exceed the maximum length; nothing is cut silently.
        """
        prompts = self.prompts(requests)
        for request in requests:
            self._warn_of_sampling(request.args[1])
        batches, answers = self._batches(prompts), [""] * len(requests)
        for batch in batches:
            own, of = [prompts[i] for i in batch.rows], [_problem(requests[i]) for i in batch.rows]
            denoise_own = partial(self._denoise, own, batch.index, batch.total)
            try:
                generated = self._kept("generate_until", batch.index, own, denoise_own, of)
            except (MemoryError, RuntimeError) as error:
                batches.halve(error)
                self.answers.halved("generate_until", batch.index, batches.size)
                continue
            except Replanned as plan:
                batches.begin_again(plan.sizes)
                continue
            self._tell_restored(batch.index + 1, batch.total)
            for i, tokens in zip(batch.rows, generated, strict=True):
                answers[i] = self._finish(tokens, requests[i])
        self.counters.batch_size = batches.size
        self._tell_of_other_noise(batches, requests)
        return answers

    def prompts(self, requests: list[Instance]) -> list[list[int]]:
        """Tokens of each request's prompt.

        Raises:
            ValueError: as generate_until.
        """
        prompts = [self._bos() + self.encode(request.args[0]) for request in requests]
        for request, prompt in zip(requests, prompts, strict=True):
            self._check_length(request, len(prompt), self.settings.sampler.gen_length, "gen_length")
        return prompts

    def pairs(self, requests: list[Instance]) -> list[tuple[list[int], list[int]]]:
        """Tokens of each request's context and continuation.

        Raises:
            ValueError: together they exceed the maximum length.
        """
        pairs = [self.encode_pair(*request.args[:2]) for request in requests]
        for request, (prompt, answer) in zip(requests, pairs, strict=True):
            self._check_length(request, len(prompt), len(answer), "its continuation's length")
        return pairs

    def _batches(self, prompts: list[list[int]]) -> Batches:
        gen_length = self.settings.sampler.gen_length
        columns = max(map(len, prompts), default=0) + gen_length
        size = settle(self.settings.batch_size, self.model.model, columns)
        if self.settings.batch_size == "auto":
            log.info("batch_size=auto: %d canvases of up to %d tokens", size, columns)
        return Batches(prompts, gen_length, size)

    def _kept(
        self, kind: str, index: int, content: Any, answer: Callable[[], list[Any]], problems: list[str]
    ) -> list[Any]:
        """What the log knows of a batch, or answer(), which goes into the log; counters are the same."""
        before = dict(vars(self.counters))

        def counted() -> Batch:
            try:
                values = answer()
            except (MemoryError, RuntimeError):  # a smaller batch has shapes of its own
                if isinstance(self.model.model, GraphedModel):
                    self.model.model.forget()
                raise
            counts = {name: now - before[name] for name, now in vars(self.counters).items()}
            return Batch(values, counts.pop("forwards"), counts={k: n for k, n in counts.items() if n})

        try:
            batch = self.answers.batch(kind, index, content, counted, problems)
        except (MemoryError, RuntimeError):  # the attempt is made again in smaller batches, and counted then
            vars(self.counters).update(before)
            raise
        for name, count in ({"forwards": batch.forwards} | batch.counts).items():
            setattr(self.counters, name, before[name] + count)
        return batch.values

    def _tell_restored(self, batches: int, of: int) -> None:
        if self.progress is not None and self.answers.restored:
            steps = self.settings.sampler.num_steps
            self.progress(batches * steps, of * steps, "denoising steps")

    def _denoise(self, prompts: list[list[int]], index: int, num_batches: int) -> list[list[int]]:
        """The generated tokens of one batch.

        With eos_cut = first a row is finished when its answer is settled (an EOS with no mask before it:
        nothing before the cut can change any more, so the answer is that of the full run); what is left stays
        masked. Finished rows leave the batch, or, where noise is drawn for the whole batch, the batch ends
        with its last row.
        """
        sampler, config = self.settings.sampler, self.model.config
        width = prompt_columns([len(p) for p in prompts], sampler.gen_length, self.model.device)
        prompt_ids, attention_mask = left_pad(prompts, self.eos_ids[0] if self.eos_ids else 0, width)
        generator = torch.Generator(self.model.device).manual_seed(_seed(self.settings.seed, index))
        early = self.settings.eos_cut == "first"
        leave = self._settled if early and sampler.deterministic else None
        final = torch.full((len(prompts), sampler.gen_length), config.mask_token_id, device=self.model.device)
        for step in denoise(self.model, prompt_ids, sampler, attention_mask, generator, leave=leave):
            if self.progress is not None:
                done = index * sampler.num_steps + step.index + 1
                self.progress(done, num_batches * sampler.num_steps, "denoising steps")
            self.counters.answer_forwards += len(step.rows)
            final[step.rows] = apply(step)[:, prompt_ids.shape[1] :]
            if early and bool(self._settled(final).all()):
                break
        generated: list[list[int]] = final.tolist()
        return generated

    def _settled(self, generated: Int[Tensor, "B gen"]) -> Bool[Tensor, " B"]:
        """Which rows have an EOS or EoT with no mask before it."""
        open_ = generated == self.model.config.mask_token_id
        ended = torch.isin(generated, torch.tensor(self.eos_ids, device=generated.device))
        return (ended & (open_.cumsum(1) == 0)).any(1)

    def _finish(self, tokens: list[int], request: Instance) -> str:
        until = request.args[1].get("until") or []
        stops = [until] if isinstance(until, str) else until
        stops = stops if self.settings.until == "task" else []
        answer = cut_answer(tokens, stops, self.eos_ids, self.settings.eos_cut, self.tokenizer)
        self.counters.requests += 1
        self.counters.generated_tokens += answer.num_tokens
        self.counters.truncated += not answer.ended
        self.cache_hook.add_partial("generate_until", request.args, answer.text)
        return answer.text

    def _warn_of_sampling(self, arguments: dict[str, Any]) -> None:
        if arguments.get("do_sample") and self.settings.sampler.temperature == 0 and not self._warned:
            self._warned = True
            log.warning(
                "The task asks for sampling, but the sampler is greedy (temperature=0): it stays greedy."
            )

    def _tell_of_other_noise(self, batches: Batches, requests: list[Instance]) -> None:
        """Noise is drawn for a whole batch, so answers of smaller ones are other draws, equally good."""
        if batches.size == batches.first_size or self.settings.sampler.deterministic:
            return
        self.counters.halved_from = batches.first_size
        log.warning(
            "%s: memory ran out, so batches have %d prompts instead of %d and other noise: with more memory "
            "the same settings draw other answers",
            requests[0].task_name, batches.size, batches.first_size,
        )  # fmt: skip

    def _check_length(self, request: Instance, prompt: int, rest: int, name: str) -> None:
        limit = self.max_length
        if limit is not None and prompt + rest > limit:
            raise ValueError(
                f"Problem {request.doc_id} of {request.task_name or 'the task'}: its prompt has {prompt} "
                f"tokens and {name} is {rest}, together more than the maximum length {limit}. Use fewer "
                "examples in the prompt, or lower gen_length."
            )

    # --- likelihood

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The Monte-Carlo lower bound of log p(continuation | context) in nats, and whether it is greedy.

        A value depends on its request and the seed, not on the other requests, up to rounding. The second
        part is False unless settings.greedy_check.

        Raises:
            ValueError: a request exceeds the maximum length, or its continuation has no tokens.
        """
        pairs = self.pairs(requests)
        order = sorted(range(len(pairs)), key=lambda i: (-sum(map(len, pairs[i])), pairs[i], i))
        tensors = [(_ids(pairs[i][0]), _ids(pairs[i][1])) for i in order]
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        bounds = self._bounds(tensors, [_problem(requests[i]) for i in order])
        for i, ids, value in zip(order, tensors, bounds, strict=True):
            results[i] = (value, self.settings.greedy_check and self._is_greedy(*ids, requests[i]))
            self.cache_hook.add_partial("loglikelihood", requests[i].args, results[i])
        self.counters.requests += len(requests)
        return results

    def _is_greedy(self, prompt: Tensor, answer: Tensor, request: Instance) -> bool:
        """A batch of its own for the log."""
        content = [prompt.tolist(), answer.tolist()]
        cfg_scale = self.settings.sampler.cfg_scale

        def compare() -> list[bool]:
            return [greedy_match(self.model, prompt, answer, cfg_scale)]

        found = self._kept("greedy", 0, content, compare, [_problem(request)])
        return bool(found[0])

    def _bounds(self, pairs: list[tuple[Tensor, Tensor]], problems: list[str]) -> list[float]:
        s, rows = self.settings, self.settings.rows_per_forward
        all_of_them = digest([[prompt.tolist(), answer.tolist()] for prompt, answer in pairs])

        def keep(index: int, requests: list[int], compute: Callable[[], list[float]]) -> list[float]:
            content = [all_of_them, rows]
            return self._kept("loglikelihood", index, content, compute, [problems[r] for r in requests])

        while True:
            try:
                return log_likelihoods(
                    self.model,
                    pairs,
                    num_samples=s.mc_num,
                    batch_size=s.mc_batch_size,
                    cfg_scale=s.sampler.cfg_scale,
                    seed=s.seed,
                    rows_per_forward=rows,
                    progress=self.progress,
                    keep=keep,
                )
            except (MemoryError, RuntimeError) as error:
                rows = halved(rows, error, "rows of a likelihood")
                self.answers.halved("loglikelihood", 0, rows)
            except Replanned as plan:
                rows = plan.sizes.get(0, rows)

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both. White space at the context's end goes to the continuation, whose tokens are those
        of the whole text without the context's."""
        bare = context.rstrip()
        prompt = self.encode(bare)
        return self._bos() + prompt, self.encode(context + continuation)[len(prompt) :]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise ValueError(
            "Rolling log-likelihood (perplexity of a text) is not defined for masked diffusion LMs: they "
            "have no left-to-right factorization. Use a task with contexts and continuations, or one that "
            "generates."
        )

    # --- chat

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's text, for lm-eval's records; None when it is not used."""
        if chat_template is False:
            return None
        return self._template(chat_template)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The messages as one text. Without a generation prompt the last message is left open."""
        self._templated = True  # the template brings BOS
        return render_chat(
            self.tokenizer,
            chat_history,
            chat_template=self._template(True),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _template(self, name: bool | str) -> str:
        templates = self.tokenizer.chat_template
        if isinstance(templates, dict):
            templates = templates.get(name if isinstance(name, str) else "default")
        if not isinstance(templates, str):
            raise ValueError(
                "The tokenizer has no such chat template: set tasks.chat_template=false, or use the "
                "tokenizer of an instruct checkpoint."
            )
        return templates


def left_pad(
    prompts: list[list[int]], pad: int, width: int
) -> tuple[Int[Tensor, "B P"], Int[Tensor, "B P"] | None]:
    """Prompts as one tensor of `width` columns and its attention mask; None where there are no pads."""
    ids = _ids([[pad] * (width - len(prompt)) + prompt for prompt in prompts]).reshape(len(prompts), width)
    if all(len(prompt) == width for prompt in prompts):
        return ids, None
    return ids, _ids([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])


def _problem(request: Instance) -> str:
    """Task and number of a request's problem, for a reader of the log."""
    return f"{request.task_name}/{request.doc_id}"


def _ids(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


def _seed(*parts: int) -> int:
    """One generator seed from several numbers."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1
