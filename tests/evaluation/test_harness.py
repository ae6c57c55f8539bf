"""DiffusionLM: batches do not show in answers, cuts are to the letter, likelihoods diffusion's own."""

import copy
import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lm_eval.api.instance import Instance

from dllmq.diffusion import SamplerConfig, generate, greedy_match, log_likelihood
from dllmq.diffusion.likelihood import request_generator
from dllmq.evaluation.batches import prompt_columns
from dllmq.evaluation.harness import DiffusionLM, cut_answer, left_pad
from dllmq.evaluation.settings import EvalSettings
from dllmq.full_precision import ForwardCounter
from dllmq.mini.tasks import problems
from dllmq.models.graphs import GraphedModel

SAMPLER = SamplerConfig(gen_length=16, steps=16, block_length=8)


def requests(n: int, until: Sequence[str] = (), **arguments) -> list[Instance]:
    """Prompts of mini_gsm, of several lengths."""
    prompts = [f"Question: {doc['question']}\nAnswer:" for doc in problems("mini_gsm", "test", n)]
    return [
        Instance("generate_until", {}, (prompt, {"until": until, **arguments}), 0, ("task", i, 1))
        for i, prompt in enumerate(prompts)
    ]


def pair(context: str, continuation: str) -> Instance:
    return Instance("loglikelihood", {}, (context, continuation), 0, ("task", 0, 1))


@pytest.fixture(scope="module")
def answers(model, tokenizer) -> list[str]:
    """Uncut answers to eight prompts, one at a time."""
    lm = DiffusionLM(model, tokenizer, EvalSettings(SAMPLER, batch_size=1, eos_cut="none"))
    return lm.generate_until(requests(8))


# --- generation


def test_answers_are_what_the_sampler_generates(model, tokenizer, answers) -> None:
    assert len(set(answers)) > 4  # the tiny model's answers depend on the prompt
    for request, answer in zip(requests(8), answers, strict=True):
        prompt = tokenizer(request.args[0], add_special_tokens=False, return_tensors="pt").input_ids
        tokens = generate(model, prompt, SAMPLER).tokens[0, prompt.shape[1] :]
        assert answer == tokenizer.decode(tokens, skip_special_tokens=True)


def test_prompts_get_no_bos(model, tokenizer) -> None:
    lm = DiffusionLM(model, tokenizer)
    assert lm.encode("Question") == tokenizer.convert_tokens_to_ids(["Question"])
    chat = lm.apply_chat_template([{"role": "user", "content": "Question"}])
    assert lm.encode(chat).count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("batch_size", [3, 4, 16])
def test_batch_size_does_not_change_answers(model, tokenizer, answers, batch_size: int) -> None:
    lm = DiffusionLM(model, tokenizer, EvalSettings(SAMPLER, batch_size=batch_size, eos_cut="none"))
    assert lm.generate_until(requests(8)) == answers


def test_wider_canvases_change_no_answer(model, tokenizer, answers, monkeypatch) -> None:
    """Batches are padded as on a GPU."""
    widths = []

    def as_on_a_gpu(lengths: list[int], gen_length: int, device: torch.device) -> int:
        widths.append(prompt_columns(lengths, gen_length, torch.device("cuda")) - max(lengths))
        return widths[-1] + max(lengths)

    monkeypatch.setattr("dllmq.evaluation.harness.prompt_columns", as_on_a_gpu)
    lm = DiffusionLM(model, tokenizer, EvalSettings(SAMPLER, batch_size=4, eos_cut="none"))
    assert lm.generate_until(requests(8)) == answers and max(widths) > 0


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_order_of_requests_does_not_change_answers(model, tokenizer, temperature: float) -> None:
    """Also with noise: batches, and with them their generators, are a function of the set of requests."""
    sampler = SamplerConfig(gen_length=16, steps=16, block_length=8, temperature=temperature)
    lm = DiffusionLM(model, tokenizer, EvalSettings(sampler, batch_size=3))
    given = requests(8)
    order = random.Random(0).sample(range(8), 8)
    straight, shuffled = lm.generate_until(given), lm.generate_until([given[i] for i in order])
    assert shuffled == [straight[i] for i in order]


def test_noise_follows_the_seed_and_not_the_global_generator(model, tokenizer) -> None:
    sampler = SamplerConfig(gen_length=16, steps=16, block_length=8, temperature=1.0)

    def run(seed: int) -> list[str]:
        return DiffusionLM(model, tokenizer, EvalSettings(sampler, seed=seed)).generate_until(requests(4))

    first = run(0)
    torch.manual_seed(123)
    assert run(0) == first
    assert run(1) != first


def test_stopping_at_settled_answers_changes_no_answer(model, tokenizer) -> None:
    """Any token may play EOS: those the rows hold in their first block end them all early."""
    prompts = [
        tokenizer(r.args[0], add_special_tokens=False, return_tensors="pt").input_ids for r in requests(4)
    ]
    full = [generate(model, p, SAMPLER).tokens[0, p.shape[1] :].tolist() for p in prompts]
    eos_ids = sorted({tokens[5] for tokens in full})
    lm = DiffusionLM(model, tokenizer, EvalSettings(SAMPLER, batch_size=4, eos_cut="first"))
    pad, lm.eos_ids = lm.eos_ids, eos_ids
    cut = [cut_answer(tokens, [], eos_ids, "first", tokenizer).text for tokens in full]
    assert lm.generate_until(requests(4)) == cut
    assert 6 <= lm.counters.forwards < SAMPLER.steps
    assert pad != eos_ids


class CountedRows:
    """A model that counts the rows of its forwards."""

    def __init__(self, model) -> None:
        self.model, self.config, self.device, self.head = model, model.config, model.device, model.head
        self.rows = 0

    def hidden_states(self, input_ids, attention_mask=None):
        self.rows += len(input_ids)
        return self.model.hidden_states(input_ids, attention_mask)

    def start_cache(self, input_ids, attention_mask=None):
        self.rows += len(input_ids)
        return self.model.start_cache(input_ids, attention_mask)

    def use_cache(self, input_ids, start, cache):
        self.rows += len(input_ids)
        return self.model.use_cache(input_ids, start, cache)


def test_a_model_that_keeps_no_keys_and_values_is_refused(model, tokenizer) -> None:
    """Also behind the counter of forwards, which would pass the calls on."""
    own = ("config", "device", "hidden_states", "head")
    bare = SimpleNamespace(**{name: getattr(model, name) for name in own})
    lm = DiffusionLM(bare, tokenizer, EvalSettings(replace(SAMPLER, cache="dual"), batch_size=2))
    with pytest.raises(ValueError, match=r"^This model keeps no keys and values: set cache=none\.$"):
        lm.generate_until(requests(2))
    assert lm.counters.forwards == 0


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_forwards_are_counted_when_most_are_replays(model, tokenizer, cache: str, monkeypatch) -> None:
    """A replay runs no module, so nothing that hangs on one may count; here it gives stale hidden states."""
    replayed: list[int] = []

    def capture(function):
        return function(), lambda: replayed.append(1)

    monkeypatch.setattr("dllmq.evaluation.harness.graphed", lambda model: GraphedModel(model, capture))
    sampler, counter = replace(SAMPLER, cache=cache), ForwardCounter()
    lm = DiffusionLM(model, tokenizer, EvalSettings(sampler, batch_size=2, eos_cut="none"))
    with counter.watching(model):
        lm.generate_until(requests(2))
    assert counter.count == lm.counters.forwards == SAMPLER.steps and len(replayed) > 8


OPTIONS = [
    {},
    {"cfg_scale": 1.0},
    {"temperature": 0.7},
    {"remasking": "random"},
    {"cache": "prefix"},
    {"cache": "dual", "threshold": 0.02},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_answers_are_those_of_the_full_run(model, tokenizer, options: dict) -> None:
    """Finished rows leave their batch; with noise, which is drawn for all, the batch ends with its last row.

    EOS are three tokens that the model does predict: some rows meet one early, some late, some never.
    """
    sampler = SamplerConfig(gen_length=16, steps=8, block_length=8, **options)
    wanted, rows, forwards, eos_ids = {}, {}, {}, []
    for cut in ("none", "first"):
        counted = CountedRows(model)
        lm = DiffusionLM(counted, tokenizer, EvalSettings(sampler, batch_size=4, eos_cut=cut))
        lm.eos_ids = eos_ids
        prompts = [lm.encode(request.args[0]) for request in requests(6)]
        batches = [prompts[:4], prompts[4:]]
        tokens = [row for i, batch in enumerate(batches) for row in lm._denoise(batch, i, len(batches))]
        if cut == "none":
            eos_ids += [tokens[0][2], tokens[3][6], tokens[5][12]]
        wanted[cut] = [cut_answer(row, [], eos_ids, "first", tokenizer) for row in tokens]
        rows[cut], forwards[cut] = counted.rows, lm.counters.forwards
    assert wanted["first"] == wanted["none"]
    assert len({len(answer.text) for answer in wanted["none"]}) > 2
    assert forwards["first"] <= forwards["none"] <= sampler.num_steps * len(batches)
    if sampler.threshold is None:
        assert forwards["none"] == 8 * len(batches)
    if sampler.deterministic:
        assert rows["first"] < rows["none"]


@pytest.mark.parametrize(
    "options", [{}, {"cache": "dual"}, {"threshold": 0.02}, {"cache": "prefix", "threshold": 0.02}]
)
def test_costs_are_of_the_answers_and_of_what_was_computed(model, tokenizer, options: dict) -> None:
    """Steps per answer do not depend on the batch; rows that wait or have left are in no forward."""
    sampler = SamplerConfig(gen_length=16, steps=16, block_length=8, **options)
    steps = {}
    for batch_size in (1, 4):
        counted = CountedRows(model)
        lm = DiffusionLM(counted, tokenizer, EvalSettings(sampler, batch_size=batch_size, eos_cut="first"))
        lm.generate_until(requests(4))
        steps[batch_size] = lm.counters.answer_forwards
        assert lm.counters.answer_forwards == counted.rows
        longest = max(len(lm.encode(r.args[0])) for r in requests(4)) + 16
        assert 8 * counted.rows <= lm.counters.positions <= longest * counted.rows
        if batch_size == 1:
            assert lm.counters.forwards == counted.rows
    assert steps[1] == steps[4]


@pytest.mark.parametrize(
    ("row", "settled"),
    [
        ("1 2 E m", True),
        ("1 m E 2", False),  # what comes before the cut is open
        ("E m m m", True),
        ("1 T m E", True),  # EoT ends an answer too
        ("m E T 1", False),
        ("1 2 3 1", False),
        ("1 2 m m", False),
        ("1 2 3 E", True),
    ],
)
def test_an_answer_is_settled_by_an_end_with_no_mask_before_it(model, tokenizer, row, settled) -> None:
    lm, config = DiffusionLM(model, tokenizer), model.config
    ids = {"m": config.mask_token_id, "E": config.eos_token_id, "T": config.eot_token_id}
    generated = torch.tensor([[ids[c] if c in ids else 100 + int(c) for c in row.split()]])
    assert lm._settled(generated).tolist() == [settled]
    lm.eos_ids = []
    assert lm._settled(generated).tolist() == [False]


def test_no_requests_give_no_answers(model, tokenizer) -> None:
    lm = DiffusionLM(model, tokenizer)
    assert lm.generate_until([]) == [] and lm.loglikelihood([]) == []
    assert lm.counters.forwards == 0


def test_long_prompt_is_refused_by_name(model, tokenizer) -> None:
    lm = DiffusionLM(model, tokenizer, EvalSettings(SAMPLER, max_length=40))
    long = requests(4)
    with pytest.raises(
        ValueError, match=r"Problem \d of task: its prompt has \d+ tokens and gen_length is 16"
    ):
        lm.generate_until(long)
    assert lm.counters.forwards == 0
    with pytest.raises(ValueError, match="maximum length 256"):
        DiffusionLM(model, tokenizer).loglikelihood([pair("x" * 300, " y")])


def test_left_padding() -> None:
    ids, mask = left_pad([[1, 2, 3], [4]], 9, 3)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]] and mask is not None
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert left_pad([[1], [2]], 9, 1)[1] is None


def test_counters_and_progress(model, tokenizer) -> None:
    seen: list[tuple[int, int, str]] = []
    settings = EvalSettings(SAMPLER, batch_size=4, eos_cut="none")
    lm = DiffusionLM(model, tokenizer, settings, lambda *args: seen.append(args))
    texts = lm.generate_until(requests(8))
    assert lm.counters.requests == 8
    assert lm.counters.forwards == 2 * SAMPLER.steps == len(seen)
    assert lm.counters.generated_tokens == sum(len(lm.encode(text)) for text in texts)
    assert seen[-1] == (32, 32, "denoising steps")


def test_sampling_that_is_not_done_is_said_once(model, tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    lm = DiffusionLM(model, tokenizer, EvalSettings(SamplerConfig(gen_length=4, steps=1, block_length=4)))
    with caplog.at_level(logging.WARNING):
        lm.generate_until(requests(2, do_sample=True, temperature=0.8, max_gen_toks=999))
    assert [record.message for record in caplog.records] == [
        "The task asks for sampling, but the sampler is greedy (temperature=0): it stays greedy."
    ]


# --- cuts


@pytest.fixture(scope="module")
def ids(tokenizer):
    """Token ids of a list of texts."""
    return lambda *texts: [
        i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"]
    ]


EOS, EOT, HEADER = "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>"


@pytest.mark.parametrize(
    ("texts", "until", "first", "none"),
    [
        ([" 3+4=7", EOS, EOS], [], " 3+4=7", " 3+4=7"),
        ([" 7", EOT, " 8", EOS], [], " 7", " 7 8"),  # none: text after EOS survives
        ([EOS, " 8"], [], "", " 8"),
        ([" 7", HEADER, " 8"], [], " 7 8", " 7 8"),  # other special tokens are dropped in both
        ([" 7\nQuestion: 8"], ["Question:"], " 7\n", " 7\n"),
        ([" 7", EOS, "Question: 8"], ["Question:"], " 7", " 7"),
        ([" 7Question: 8", EOS], "Question:", " 7", " 7"),
        ([" a b c"], ["c", "", "b"], " a ", " a "),  # in turn; an empty stop string stops nothing
        ([" a b c"], ["b c", "a b"], " a ", " a "),  # "a b" is gone once "b c" is cut
        ([" 7", EOT, " 8"], [EOT], " 7", " 7"),  # a stop string may be a special token
        ([" 7", EOS, " 8"], ["</s>"], " 7", " 7 8"),
        ([], [], "", ""),
    ],
)
def test_cuts_to_the_letter(tokenizer, ids, texts, until, first: str, none: str) -> None:
    until = [until] if isinstance(until, str) else until
    eos_ids = ids(EOS, EOT)
    assert cut_answer(ids(*texts), until, eos_ids, "first", tokenizer).text == first
    assert cut_answer(ids(*texts), until, eos_ids, "none", tokenizer).text == none


@pytest.mark.parametrize(
    ("texts", "until", "ended", "num_tokens"),
    [
        ([" 3", EOS, EOS], [], True, 1),
        ([" 3", "+", " 4"], [], False, 3),
        ([" 3", "\n", "+"], ["\n"], True, 1),
    ],
)
def test_answers_that_fill_the_canvas_are_told(tokenizer, ids, texts, until, ended, num_tokens) -> None:
    answer = cut_answer(ids(*texts), until, ids(EOS, EOT), "first", tokenizer)
    assert (answer.ended, answer.num_tokens) == (ended, num_tokens)


def test_stop_strings_of_a_request_are_honoured(model, tokenizer, answers) -> None:
    stop = answers[0][3]
    lm = DiffusionLM(model, tokenizer, EvalSettings(SAMPLER, eos_cut="none"))
    for until in ([stop], stop):
        assert lm.generate_until(requests(8, until)) == [answer.split(stop)[0] for answer in answers]
    assert lm.counters.truncated == 2 * sum(stop not in answer for answer in answers)


# --- likelihood


def test_likelihood_is_that_of_diffusion_and_depends_on_its_request_alone(model, tokenizer) -> None:
    settings = EvalSettings(mc_num=8, mc_batch_size=4, seed=5)
    lm = DiffusionLM(model, tokenizer, settings)
    pairs = [
        ("Question: 3+4", " 7"),
        ("Question", " 3+4=7 coins."),
        ("", "Answer: 7"),
        ("Question: 3+4", " 8"),
    ]
    values = [value for value, _ in lm.loglikelihood([pair(*p) for p in pairs])]
    for (context, continuation), value in zip(pairs, values, strict=True):
        prompt, answer = (
            torch.tensor(part, dtype=torch.long) for part in lm.encode_pair(context, continuation)
        )
        own = request_generator(prompt, answer, seed=5)
        expected = log_likelihood(model, prompt, answer, 8, 4, generator=own)
        assert value == pytest.approx(expected, rel=1e-5)
        assert lm.loglikelihood([pair(context, continuation)])[0][0] == pytest.approx(value, rel=1e-5)
    backwards = [value for value, _ in lm.loglikelihood([pair(*p) for p in reversed(pairs)])]
    assert backwards == values[::-1]
    assert lm.counters.forwards > 0


def test_trailing_spaces_move_to_the_continuation(model, tokenizer) -> None:
    lm = DiffusionLM(model, tokenizer)
    assert lm.encode_pair("Answer: ", "7") == lm.encode_pair("Answer:", " 7")
    assert lm.encode_pair("Answer:\n ", "7")[1] == lm.encode("\n 7")
    assert lm.encode_pair("  ", "7") == ([], lm.encode("  7"))


def test_continuation_without_tokens_is_refused(model, tokenizer) -> None:
    with pytest.raises(ValueError, match="nothing to score"):
        DiffusionLM(model, tokenizer).loglikelihood([pair("Answer:", "")])


def test_greedy_answers_are_told_when_asked(model, tokenizer) -> None:
    prompt = tokenizer("Question:", add_special_tokens=False, return_tensors="pt").input_ids
    tokens = generate(model, prompt, SamplerConfig(gen_length=1, steps=1, block_length=1)).tokens[0]
    continuation = tokenizer.decode(tokens[-1:])
    assert greedy_match(model, tokens[:-1], tokens[-1:])
    asked, silent = (
        DiffusionLM(model, tokenizer, EvalSettings(mc_num=1, mc_batch_size=1, greedy_check=check))
        for check in (True, False)
    )
    given = [pair("Question:", continuation), pair("Question:", continuation + " 7")]
    assert asked.loglikelihood(given)[0][1] is True
    assert [greedy for _, greedy in silent.loglikelihood(given)] == [False, False]


def test_rolling_likelihood_is_refused(model, tokenizer) -> None:
    with pytest.raises(ValueError, match="not defined for masked diffusion LMs"):
        DiffusionLM(model, tokenizer).loglikelihood_rolling([])


# --- chat and settings


def test_chat_template(model, tokenizer) -> None:
    lm = DiffusionLM(model, tokenizer)
    history = [{"role": "user", "content": "Hi"}]
    assert lm.apply_chat_template(history) == (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    prefilled = [*history, {"role": "assistant", "content": "So"}]
    assert lm.apply_chat_template(prefilled, add_generation_prompt=False).endswith("<|end_header_id|>\n\nSo")
    assert lm.chat_template(True) == tokenizer.chat_template and lm.chat_template(False) is None


def test_missing_chat_template_is_said(model, tokenizer) -> None:
    bare = copy.copy(tokenizer)
    bare.chat_template, bare.name_or_path = None, "a/b"
    lm = DiffusionLM(model, bare)
    assert lm.tokenizer_name == "a__b"
    with pytest.raises(ValueError, match=r"no such chat template: set tasks\.chat_template=false"):
        lm.apply_chat_template([])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"eos_cut": "last"}, "Unknown eos_cut=last: use first or none"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1; got 0"),
        ({"mc_num": 10, "mc_batch_size": 4}, "mc_num must be a multiple of mc_batch_size"),
        ({"max_length": 16, "sampler": SAMPLER}, "leaves no room for a prompt"),
    ],
)
def test_impossible_settings_are_refused(wrong, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvalSettings(**wrong)
