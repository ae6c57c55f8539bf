"""Dream's presets are its authors' settings, reach the sampler and the prompts, and are refused elsewhere."""

import pytest
from composed import composed

from dllmq.calibration.prompts import encode_prompts
from dllmq.config import EMBEDDED, RunConfig, check_cell, load
from dllmq.models.tokenizer import load_tokenizer


def config(*overrides: str) -> RunConfig:
    return load(composed(*overrides))


@pytest.mark.parametrize(
    ("preset", "temperature", "top_p", "chat", "add_bos"),
    [("base", 0.2, 0.95, False, True), ("instruct", 0.1, 0.9, True, False)],
)
def test_presets_are_the_published_settings(
    preset: str, temperature: float, top_p: float, chat: bool, add_bos: bool
) -> None:
    made = config(f"model=dream_v0_7b_{preset}")
    sampler = made.sampler_config()
    assert (sampler.remasking, sampler.temperature, sampler.top_p) == ("entropy", temperature, top_p)
    assert (sampler.steps, sampler.gen_length, sampler.block_length) == (256, 256, 256)
    assert (sampler.alg_temp, sampler.top_k, sampler.eps) == (None, None, 1e-3)
    assert (made.model.chat_template, made.model.add_bos) == (chat, add_bos)


def test_every_option_can_be_set() -> None:
    options = ["sampler.alg_temp=0.3", "sampler.top_p=0.5", "sampler.top_k=7", "sampler.eps=0.01"]
    sampler = config("model=dream_v0_7b_base", "sampler.remasking=maskgit_plus", *options).sampler_config()
    assert (sampler.alg_temp, sampler.top_p, sampler.top_k, sampler.eps) == (0.3, 0.5, 7, 0.01)


def test_others_keep_their_defaults() -> None:
    for name in ("mini", "llada_8b_base", "llada_8b_instruct", "llada_1_5"):
        made = config(f"model={name}")
        sampler = made.sampler_config()
        assert (sampler.temperature, sampler.top_p, sampler.alg_temp) == (0.0, None, None)
        assert not made.model.add_bos
    assert config("sampler=llada_paper").sampler_config().top_p is None


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["sampler.top_p=0.9"], "top_p=0.9 is an option of Dream's sampler"),
        (["sampler.alg_temp=0.1"], "alg_temp=0.1 is an option of Dream's sampler"),
        (["sampler.remasking=entropy", "sampler.block_length=48"], "this model is no Dream model"),
        (["sampler.top_k=few"], "sampler.top_k"),
    ],
)
def test_they_are_refused_where_they_do_not_belong(overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_cell(composed(*overrides))


def test_prompts_start_with_bos_where_asked_for() -> None:
    tokenizer = load_tokenizer(EMBEDDED)
    plain, bos = (encode_prompts(["Question"], tokenizer, False, on)[0].tolist() for on in (False, True))
    assert bos == [tokenizer.bos_token_id, *plain]
    chat, also = (encode_prompts(["Question"], tokenizer, True, on)[0].tolist() for on in (False, True))
    assert chat == also and chat.count(tokenizer.bos_token_id) == 1
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="no BOS token"):
        encode_prompts(["Question"], tokenizer, False, True)
