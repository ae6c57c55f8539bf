"""Dream in the evaluation: BOS before prompts, its likelihood, and the slots its sampler would commit."""

from dataclasses import replace

import pytest
import tiny_llada
import torch
from lm_eval.api.instance import Instance

from dllmq.calibration.states import record_trajectories
from dllmq.diffusion import SamplerConfig, generate, log_likelihood
from dllmq.diffusion.likelihood import request_generator
from dllmq.evaluation import fidelity
from dllmq.evaluation.harness import DiffusionLM
from dllmq.evaluation.settings import EvalSettings
from dllmq.models.dream import Dream, DreamConfig


def tiny_dream(
    seed: int,
    vocabulary: int = tiny_llada.VOCAB,
    mask: int = tiny_llada.MASK,
    eos: int = tiny_llada.EOS,
) -> Dream:
    """Random weights; it never predicts the mask with confidence (its row of the head is 0)."""
    model = Dream(
        DreamConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=24, vocab_size=vocabulary, mask_token_id=mask, eos_token_id=eos,
            rope_theta=1e4, max_position_embeddings=256,
        )
    )  # fmt: skip
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) / (p.shape[-1] ** 0.5 if p.dim() > 1 else 1))
        model.lm_head.weight *= 4
        model.lm_head.weight[mask] = 0
    return model.requires_grad_(False).eval()


def confidence(logits: torch.Tensor, algorithm: str) -> tuple[float, int]:
    """Of one position: what Dream ranks by, and its token."""
    p = torch.softmax(logits, -1)
    top = p.sort(descending=True).values
    by = {"maskgit_plus": top[0], "topk_margin": top[0] - top[1], "entropy": (p * torch.log(p + 1e-10)).sum()}
    return float(by[algorithm]), int(p.argmax())


@pytest.mark.parametrize("algorithm", ["maskgit_plus", "topk_margin", "entropy"])
def test_slots_are_those_that_dreams_sampler_would_commit(algorithm: str) -> None:
    sampler = SamplerConfig(gen_length=8, steps=4, remasking=algorithm)
    fp, q = tiny_dream(0), tiny_dream(1)
    runs = record_trajectories(fp, tiny_llada.tiny_prompts(), sampler, batch_size=2)
    argmax, slots = [], []
    for run in runs:
        for state, masked, committed in zip(run.tokens, run.masked, run.committed, strict=True):
            raw = [model(state[None])[0] for model in (fp, q)]
            ours, theirs = (torch.cat([x[:1], x[:-1]]) for x in raw)  # column i - 1 predicts token i
            places = masked.nonzero()[:, 0].tolist()
            at, k = committed.nonzero()[:, 0].tolist(), int(committed.sum())
            if k == 0:
                continue
            chosen = sorted(places, key=lambda i: (-confidence(theirs[i], algorithm)[0], i))[:k]
            argmax.append(sum(int(ours[i].argmax() == theirs[i].argmax()) for i in at) / k)
            slots.append(len(set(chosen) & set(at)) / k)
    count = sum(len(run.step) for run in runs)
    found = fidelity.measure(q, fidelity.reference(fp, runs, sampler, count=count, batch_size=4)).values
    assert found["slots_at_k"]["value"] == pytest.approx(sum(slots) / len(slots))
    assert found["argmax_at_k"]["value"] == pytest.approx(sum(argmax) / len(argmax))
    assert found["slots_at_k"]["n"] == len(slots) and 0 < found["slots_at_k"]["value"] < 1
    itself = fidelity.measure(fp, fidelity.reference(fp, runs, sampler, count=count, batch_size=4)).values
    assert itself["slots_at_k"]["value"] == itself["argmax_at_k"]["value"] == 1


@pytest.mark.parametrize(
    "noisy", [{"temperature": 0.1}, {"alg_temp": 0.5}, {"remasking": "origin"}], ids=lambda n: next(iter(n))
)
def test_there_are_no_slots_where_noise_decides(noisy: dict[str, object]) -> None:
    sampler = replace(SamplerConfig(gen_length=8, steps=4, remasking="entropy"), **noisy)
    runs = record_trajectories(tiny_dream(0), tiny_llada.tiny_prompts(), sampler, batch_size=2)
    found = fidelity.measure(tiny_dream(1), fidelity.reference(tiny_dream(0), runs, sampler, 6, 4))
    assert "slots_at_k" not in found.values and "argmax_at_k" in found.values


@pytest.mark.parametrize("algorithm", ["maskgit_plus", "topk_margin", "entropy"])
def test_a_left_padded_batch_answers_as_one_prompt_at_a_time(tokenizer, algorithm: str) -> None:
    model = tiny_dream(3, len(tokenizer), tokenizer.mask_token_id, tokenizer.eos_token_id)
    sampler = SamplerConfig(gen_length=32, steps=8, remasking=algorithm, top_p=0.95)
    texts = ["Ann has 3 books.", "Ann has", "Question: 4 +"]  # 4, 2 and more tokens: one batch, padded
    requests = [Instance("generate_until", {}, (text, {}), i) for i, text in enumerate(texts)]

    def answers(batch_size: int) -> tuple[list[str], int]:
        settings = EvalSettings(sampler, batch_size, eos_cut="none", add_bos=True)
        lm = DiffusionLM(model, tokenizer, settings)
        return lm.generate_until(requests), lm.counters.forwards

    (alone, separate), (batched, together) = answers(1), answers(3)
    assert batched == alone and len(set(alone)) == 3 and (separate, together) == (24, 8)


def test_bos_starts_prompts_and_contexts(tokenizer) -> None:
    model = tiny_dream(3, len(tokenizer), tokenizer.mask_token_id, tokenizer.eos_token_id)
    sampler = SamplerConfig(gen_length=4, steps=4, remasking="entropy")
    settings = EvalSettings(sampler, mc_num=8, mc_batch_size=8, add_bos=True, eos_cut="none", seed=2)
    lm = DiffusionLM(model, tokenizer, settings)
    prompt, answer = lm.encode_pair("Question: ", "Answer")
    assert prompt == [tokenizer.bos_token_id, *lm.encode("Question:")] and answer == lm.encode(" Answer")
    ids, target = torch.tensor(prompt), torch.tensor(answer)
    expected = log_likelihood(model, ids, target, 8, 8, generator=request_generator(ids, target, 2))
    ((value, greedy),) = lm.loglikelihood([Instance("loglikelihood", {}, ("Question: ", "Answer"), 0)])
    assert value == pytest.approx(expected) and greedy is False
    text = lm.generate_until([Instance("generate_until", {}, ("Question:", {}), 0)])[0]
    tokens = generate(model, ids[None], sampler).tokens[0, len(prompt) :]
    again = tokenizer(tokenizer.decode(tokens), add_special_tokens=False)["input_ids"]
    assert text == tokenizer.decode(again, skip_special_tokens=True)
    bare = DiffusionLM(model, tokenizer, replace(settings, add_bos=False))
    assert bare.encode_pair("Question: ", "Answer")[0] == prompt[1:]
    with pytest.raises(ValueError, match=r"start prompts with BOS \(add_bos=true\)"):
        bare.loglikelihood([Instance("loglikelihood", {}, ("", "Answer"), 0)])
