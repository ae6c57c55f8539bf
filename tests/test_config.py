"""What a run is made of: every wrong value is one sentence before weights are read; auto; the fingerprint."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from composed import composed
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from dllmq.calibration.states import CleanText
from dllmq.calibration.values import MinMax
from dllmq.config import (
    EMBEDDED,
    RunConfig,
    build,
    cell_name,
    check_cell,
    check_choices,
    code_digest,
    compose_plan,
    effects,
    fingerprint,
    identity,
    load,
    reference_config,
    slug,
    sweep_folder,
)
from dllmq.methods import AWQ, FP, GPTQ
from dllmq.numerics import Grid
from dllmq.recipe import uniform_weight
from dllmq.techniques.cgq import CGQ
from dllmq.techniques.iaaq import IAAQ, EqualWeightSearch
from dllmq.techniques.tmas import TMAS


def config(*overrides: str) -> RunConfig:
    return load(composed(*overrides))


def test_what_the_tests_compose_is_what_hydra_does() -> None:
    overrides = ["method=awq", "tmas=true", "+sampler.more=[1,a]", "sampler.steps=24", "~eval.limit"]
    ours = composed(*overrides)
    with initialize_config_module("dllmq.conf", version_base="1.3"):
        assert ours == compose("config", overrides=overrides)


# ------------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        # keys
        (["+tmass=true"], ["no key tmass", "Did you mean tmas?"]),
        (["+cgqq=true"], ["no key cgqq", "Did you mean cgq?"]),
        (["+cgq_unmaskd=0.5"], ["no key cgq_unmaskd", "Did you mean cgq_unmasked?"]),
        (["+eval.limits=3"], ["no key eval.limits", "Did you mean limit?"]),
        (["+model.sampler.stepz=3"], ["no key model.sampler.stepz", "Did you mean steps?"]),
        (["+sampler.width=5"], ["no key sampler.width", "Known: gen_length"]),
        (["+method.dampp=0.1"], ["no key method.dampp", "Did you mean damp?"]),
        (["method=rtn", "+method.damp=0.1"], ["no key method.damp"]),
        (["+method.damp.x=1"], ["method"]),
        (["+tracker.projects=x"], ["no key tracker.projects", "Did you mean project?"]),
        (["method._target_=dllmq.methods.GPTQQ"], ["method._target_=dllmq.methods.GPTQQ cannot be imported"]),
        # types
        (["tmas=maybe"], ["tmas=maybe", "true or false"]),
        (["cgq=maybe"], ["cgq=maybe", "true or false"]),
        (["iaaq=2.5"], ["iaaq=2.5", "true or false"]),
        (["cgq_unmasked=little"], ["cgq_unmasked=little", "a number"]),
        (["seed=zero"], ["seed=zero", "an integer"]),
        (["seed=null"], ["seed=null", "an integer"]),
        (["eval.limit=many"], ["eval.limit=many", "an integer or null"]),
        (["symmetric=2.5"], ["symmetric=2.5", "true or false"]),
        (["calibration.shares=[a,b]"], ["calibration.shares=[a,b]", "a list of numbers"]),
        (["calibration.shares=0.5"], ["shares=0.5", "[0.3,0.7]"]),
        (["tasks.names=mini_gsm"], ["tasks.names=mini_gsm", "[a,b]"]),
        (["method.damp=much"], ["method.damp=much", "a number"]),
        (["method.act_order=perhaps"], ["method.act_order=perhaps", "true or false"]),
        (["bits=null"], ["bits=null", "a word"]),
        (["bits=[w4a4]"], ["bits=[w4a4]", "a word"]),
        (["group_size=1e9"], ["group_size=1000000000.0", "an integer"]),
        (["symmetric=2"], ["symmetric=2", "true or false"]),
        (["method=awq", "method.clip=2"], ["method.clip=2", "true or false"]),
        (["seed=true"], ["seed=true", "an integer"]),
        (["eval.batch_size=2.5"], ["eval.batch_size=2.5", "an integer or a word"]),
        (["eval.limit=all"], ["eval.limit=all", "an integer or null"]),
        (["calibration.shares=null"], ["calibration.shares=null", "a list of numbers"]),
        (["tasks.names=[mini_gsm,null]"], ["tasks.names=[mini_gsm,null]", "a list of names"]),
        (["max_state_bytes=16GB"], ["max_state_bytes=16GB", "an integer or null"]),
        (["cache_dir="], ["cache_dir= is empty", "null"]),
        (["model.path="], ["model.path= is empty", "null"]),
        (["tracker.project="], ["tracker.project= is empty"]),
        (["method=fp", "+method.damp=0.1"], ["no key method.damp", "FP takes none"]),
        (["method._target_=os.system"], ["method._target_=os.system is no class"]),
        (["method._target_=null"], ["method._target_=null cannot be imported"]),
        (["method=fp", "method._target_=dllmq.report.tracker.NullTracker"], ["is no method"]),
        # widths
        (["bits=w9a4"], ["bits=w9a4", "from 2 to 8"]),
        (["bits=w1a16"], ["bits=w1a16", "from 2 to 8"]),
        (["bits=foo"], ["bits=foo", "w4a4"]),
        (["bits=4"], ["bits=4 ", "w4a4"]),
        (["bits=w16a16"], ["bits=w16a16", "method=fp"]),
        (["attn_bits=v", "bits=w4a16"], ["attn_bits=v", "a16"]),
        (["attn_bits=9"], ["attn_bits=9", "2 to 8"]),
        (["attn_bits=q"], ["attn_bits=q", "auto, none, v, pv, qkpv"]),
        (["attn_bits=qkpv", "bits=w4a16"], ["attn_bits=qkpv", "a16"]),
        (["value_granularity=heads"], ["value_granularity=heads", "Did you mean head?"]),
        (["group_size=100"], ["group_size=100", "256", "q_proj"]),
        (["act_group_size=100"], ["act_group_size=100", "256"]),
        (["group_size=-2"], ["group_size=-2", "-1"]),
        (["act_group_size=0"], ["act_group_size=0", "-1"]),
        (["model.default_bits=w9a9"], ["model.default_bits=w9a9", "from 2 to 8"]),
        (["attn_bits=PV"], ["attn_bits=PV", "pv"]),
        (['attn_bits="²"'], ["attn_bits=²", "2 to 8"]),
        # techniques, also where they are off
        (["cgq_unmasked=-1"], ["cgq_unmasked=-1", ">= 0"]),
        (["cgq_unmasked=nan", "cgq=true"], ["cgq_unmasked=nan", "finite"]),
        (["cgq_masked=inf"], ["cgq_masked=inf", "finite"]),
        (["cgq_unmasked_confidence=x"], ["cgq_unmasked_confidence=x", "zero or model"]),
        (["cgq=true", "cgq_unmasked=0"], ["cgq_unmasked=0", "clean text", "tmas=true"]),
        (["iaaq_alpha_min=0"], ["iaaq_alpha_min=0", "(0, 1]"]),
        (["iaaq_alpha_min=1.2", "iaaq=true"], ["iaaq_alpha_min=1.2", "(0, 1]"]),
        (["iaaq_alpha_step=0"], ["iaaq_alpha_step=0", "(0, 1]"]),
        (["iaaq_alpha_step=nan"], ["iaaq_alpha_step=nan", "(0, 1]"]),
        (["value_scale=x"], ["value_scale=x", "minmax, mse, iaaq"]),
        (["value_scale=minmx", "iaaq=true"], ["value_scale=minmx", "Did you mean minmax?"]),
        # values
        (["method.damp=0"], ["method.damp is 0", "positive"]),
        (["method.damp=1e30"], ["method.damp is 1e+30", "at most 1", "0.01"]),
        (["method.damp=1.01"], ["method.damp is 1.01", "at most 1"]),
        (["method=awq", "method.solver=gptq", "+method.damp=1e2"], ["method.damp is 100.0", "at most 1"]),
        (["calibration.shares=[1e308,1e308]"], ["calibration.shares are", "sum that is finite"]),
        (["eval.mc_num=1000000"], ["eval.mc_num=1000000 is too large"]),
        (["eval.mc_num=0"], ["eval.mc_num must be an integer >= 1"]),
        (["eval.mc_batch_size=0"], ["eval.mc_batch_size=0", "at least 1"]),
        (["eval.mc_batch_size=1000000"], ["eval.mc_batch_size=1000000", "at most 100000"]),
        (["sampler.alg_temp=1e30"], ["sampler.alg_temp=1e+30", "at most 100"]),
        (["sampler.top_k=100000000"], ["sampler.top_k=100000000", "at most 1000000"]),
        (["method.block_size=0"], ["method.block_size is 0", "positive"]),
        (["method=awq", "method.n_grid=1000000"], ["method.n_grid=1000000", "at most 1000"]),
        (["cgq_unmasked=1e38"], ["cgq_unmasked=1e+38", "at most 1000"]),
        (["calibration.num_states=1000000000000"], ["num_states=1000000000000", "at most 1000000"]),
        (["eval.batch_size=99999999999"], ["eval.batch_size=99999999999", "at most 100000"]),
        (["eval.fidelity_states=100000000000"], ["too large", "at most 1000000"]),
        (["threads=100000"], ["threads=100000", "at most 1024"]),
        (["tasks.num_fewshot=-1"], ["tasks.num_fewshot=-1", "at least 0"]),
        (["tasks.data_dir=/nowhere"], ["tasks.data_dir=/nowhere is no folder"]),
        ([f"cache_dir={__file__}"], ["cache_dir=", "is a file", "or null"]),
        ([f"cache_dir={__file__}/x"], ["cache_dir=", "is a file"]),
        (["method=awq", "method.solver=gptqq"], ["solver", "'gptq'"]),
        (["calibration.states=random"], ["calibration.states=random", "Did you mean random_mask?"]),
        (["calibration.states=random", "tmas=true"], ["calibration.states=random"]),
        (["calibration.states=tmass"], ["calibration.states=tmass", "Did you mean tmas?"]),
        (["calibration.states=tmas", "calibration.num_prompts=2"], ["num_states=128", "96 states"]),
        (["backend=x"], ["backend=x", "auto, fake, packed"]),
        (
            ["backend=packed", "bits=w4a4", "group_size=1"],
            ["backend=packed", "q_proj", "group_size=1", "fake or auto"],
        ),
        (
            ["backend=packed", "bits=w4a4", "act_group_size=1"],
            ["backend=packed", "act_group_size=1", "fake or auto"],
        ),
        (
            ["backend=packed", "method=gptq", "method.act_order=true", "group_size=64"],
            ["backend=packed", "method.act_order=true:", "method.static_groups=true"],
        ),
        (["calibration.shares=[0.5,-0.1]"], ["calibration.shares are", "-0.1"]),
        (["calibration.shares=[]", "tmas=true"], ["calibration.shares are []"]),
        (["calibration.num_states=0"], ["calibration.num_states=0", "at least 1"]),
        (["calibration.num_prompts=0"], ["calibration.num_prompts=0", "at least 1"]),
        (["calibration.batch_size=0"], ["calibration.batch_size=0", "at least 1"]),
        (["calibration.data=nowhere.jsonl"], ["calibration.data=nowhere.jsonl", "not a file"]),
        (["tmas=true", "calibration.num_prompts=2"], ["calibration.num_states=128", "96 states"]),
        (["model.dtype=float16"], ["model.dtype=float16", "bfloat16"]),
        (["model.dtype=bfloat"], ["model.dtype=bfloat", "Did you mean bfloat16?"]),
        (["model.path=/nowhere/model"], ["/nowhere/model does not exist"]),
        (["model.path=/nowhere/model", "dry_run=true"], ["/nowhere/model does not exist"]),
        (["device=gpu"], ["device=gpu", "auto, cpu, cuda"]),
        (["threads=0"], ["threads=0", "at least 1"]),
        (["memory=steam"], ["memory=steam", "Did you mean stream?", "auto, whole, stream"]),
        (["max_state_bytes=-1"], ["max_state_bytes=-1 is too small", "at least 0"]),
        (["seed=-1"], ["seed=-1"]),
        (["tasks.names=[]"], ["No task is named", "mini_gsm"]),
        (["tasks.names=[mini_gms]"], ["mini_gms", "Did you mean mini_gsm?"]),
        (["tasks.names=[mini_gsm,mini_gsm]"], ["twice"]),
        (["tasks=mini_code"], ["mini_code", "eval.allow_code_execution=true"]),
        (["eval.limit=0"], ["eval.limit=0", "at least 1"]),
        (["eval.batch_size=0"], ["eval.batch_size=0", "at least 1"]),
        (["eval.batch_size=big"], ["eval.batch_size=big", "positive integer, or auto"]),
        (["eval.eos_cut=last"], ["eval.eos_cut=last", "first or none"]),
        (["eval.mc_num=12"], ["eval.mc_num=12", "multiple of eval.mc_batch_size;", "eval.mc_batch_size=8"]),
        (["eval.mc_num=some"], ["eval.mc_num=some", "auto"]),
        (["eval.fidelity_states=-1"], ["eval.fidelity_states=-1", "at least 0"]),
        (["tracker.mode=ofline"], ["ofline", "offline"]),
        # the sampler
        (["sampler.gen_length=50"], ["sampler.gen_length=50", "multiple of sampler.block_length"]),
        (
            ["sampler.steps=7"],
            ["got sampler.steps=7", "multiple of the number of blocks, sampler.gen_length"],
        ),
        (["sampler.temperature=-1"], ["sampler.temperature=-1", "at least 0"]),
        (["sampler.temperature=nan"], ["sampler.temperature must be a finite number", "nan"]),
        (["sampler.temperature=1e300"], ["sampler.temperature=1e+300", "at most 100"]),
        (["sampler.gen_length=0"], ["sampler.gen_length=0", "at least 1"]),
        (["sampler.block_length=20"], ["sampler.gen_length must be a multiple", "sampler.block_length=20"]),
        (["sampler.steps=2"], ["sampler.steps (the total)", "steps=2"]),
        (
            ["sampler.remasking=low_confidense"],
            ["sampler.remasking=low_confidense", "Did you mean low_confidence?"],
        ),
        (["sampler.cache=duel"], ["sampler.cache=duel", "Did you mean dual?"]),
        (["sampler.threshold=much"], ["sampler.threshold=much", "a number or null"]),
        (["sampler.threshold=-0.9"], ["sampler.threshold must be", "-0.9"]),
        (["sampler.threshold=inf"], ["sampler.threshold must be", "inf"]),
        (
            ["sampler.cache=dual", "sampler.cfg_scale=1.5"],
            ["sampler.cache=dual does", "set sampler.cfg_scale=0, or sampler.cache=none."],
        ),
        (
            ["sampler.threshold=0.9", "sampler.remasking=random"],
            ["sampler.threshold=0.9", "use sampler.remasking=low_confidence, or leave sampler.threshold at"],
        ),
        (
            ["sampler.top_p=0.5"],
            ["but sampler.remasking=low_confidence", "leave sampler.top_p at None (null)."],
        ),
        (["sampler.remasking=origin", "sampler.block_length=4"], ["give sampler.block_length=48"]),
        (
            ["sampler.remasking=entropy", "sampler.block_length=48"],
            ["sampler.remasking=entropy is Dream's, but this model"],
        ),
        (
            ["tasks.settings=llada_paper", "model=llada_8b_base", "tasks=gsm8k", "sampler.block_length=300"],
            ["sampler.block_length=300"],
        ),
    ],
    ids=lambda value: (
        " ".join(value).replace("/", "_") if isinstance(value, list) and "=" in value[0] else ""
    ),
)
def test_wrong_input_is_one_sentence(overrides: list[str], said: list[str]) -> None:
    cfg = composed(*overrides)
    with pytest.raises(ValueError) as caught:
        check_cell(cfg)
    text = str(caught.value)
    assert "\n" not in text and text.rstrip()[-1] in ".?", text
    assert [part for part in said if part not in text] == [], text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tmass=true"], "there is no key tmass. Did you mean tmas?"),
        (["sampler.stepz=3"], "there is no key sampler.stepz. Did you mean steps?"),
        (["method=gptqq"], "method=gptqq is not known. Did you mean gptq? Known: awq, fp, gptq, rtn."),
        (["method=null"], "method=null names no preset of method"),
        (["tasks=mini_chioce"], "tasks=mini_chioce is not known. Did you mean mini_choice?"),
        (
            ["tasks=mini_gsm,mini_choice"],
            "tasks=mini_gsm,mini_choice holds a comma: sweep over the values with -m",
        ),
        (["experiment=ablatoin"], "Did you mean ablation?"),
        (["hydra/launcher=dllmq_jobli"], "Did you mean dllmq_joblib?"),
        (["tmas"], "tmas"),
        (["bits=²"], "bits=²"),
        (["=3"], "'=3' names no key"),
        (["~sampler.steps"], "~sampler.steps deletes a key"),
        (["model=[mini]"], "model=[mini] is a list or a dict"),
    ],
    ids=str,
)
def test_words_that_hydra_stumbles_over_are_one_sentence(words: list[str], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        compose_plan(words)
    text = str(caught.value)
    assert said in text and "\n" not in text and len(text) > 20


def test_words_that_hydra_reads_are_passed_on() -> None:
    check_choices(["-m", "method=awq,gptq", "+experiment=ablation", "--cfg", "job"])
    check_choices(
        ["hydra/launcher=submitit_slurm", "hydra.launcher.mem_gb=4", "tasks.names=[a,b]", "+new.key=1"]
    )
    check_choices(["method.damp=0.1", "tracker.project='a,b'", "--config-name", "x", "seed=${oc.env:X,1}"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the sentence is about a machine without CUDA")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"device=cuda:1, but torch sees no CUDA device here; use device=cpu"
    ):
        check_cell(composed("device=cuda:1"))


def test_paths_that_are_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, said in (("file", "is a file"), ("empty", "has no config.json")):
        with pytest.raises(ValueError, match=said):
            check_cell(composed(f"model.path={tmp_path / name}"))


def test_a_damaged_checkpoint_is_found_before_its_weights_are_read(tmp_path: Path) -> None:
    folder = shutil.copytree(EMBEDDED, tmp_path / "model")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged or cut short"):
        check_cell(composed(f"model.path={folder}"))


def test_a_data_file_is_read_before_the_run(tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text(json.dumps({"prompt": "Why?"}) + "\n")
    with pytest.raises(ValueError, match="has 1 prompts, but 96 are needed"):
        check_cell(composed(f"calibration.data={data}"))
    data.write_text('{"word": 1}\n')
    with pytest.raises(ValueError, match="line 1: need a JSON object with one of prompt"):
        check_cell(composed(f"calibration.data={data}"))


def test_a_dry_run_downloads_nothing() -> None:
    assert check_cell(composed("model=llada_8b_base", "dry_run=true")).parameters == 0


def test_interpolations_that_lead_nowhere_are_one_sentence() -> None:
    cfg = composed()
    OmegaConf.update(cfg, "seed", "${nothing.here}")
    with pytest.raises(ValueError, match=r"nothing") as caught:
        load(cfg)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ what the switches mean


def test_the_default_is_checked_and_counts_its_parameters() -> None:
    plan = check_cell(composed())
    stored = (EMBEDDED / "model.safetensors").stat().st_size
    assert 2 * plan.parameters == pytest.approx(stored, rel=0.01)  # bf16
    assert plan.recipe.method == GPTQ() and plan.recipe.states == CleanText()


def test_auto_bits_are_the_presets(tmp_path: Path) -> None:
    default = OmegaConf.to_object(composed())["model"]["default_bits"]
    assert str(config().widths()) == default
    assert str(config("model.default_bits=w2a8").widths()) == "w2a8"
    assert str(config(f"model.path={tmp_path}").widths()) == "w4a4"  # not the embedded model any more
    assert str(config("model=llada_8b_base").widths()) == "w4a4"
    assert str(config("bits=w8a8", f"model.path={tmp_path}").widths()) == "w8a8"


def test_auto_monte_carlo_samples() -> None:
    assert config().mc_num() == 8
    assert config("model=llada_8b_base").mc_num() == 128
    assert config("eval.mc_num=64").mc_num() == 64


@pytest.mark.parametrize(
    ("overrides", "P", "V"),
    [
        (["bits=w4a4"], 4, 4),
        (["bits=w4a16"], None, None),
        (["bits=w4a8", "attn_bits=v"], None, 8),
        (["bits=w4a16", "attn_bits=6"], 6, 6),
        (["bits=w4a4", "attn_bits=none"], None, None),
        (["bits=w4a6", "attn_bits=qkpv"], 6, 6),
    ],
)
def test_attn_bits(overrides: list[str], P: int | None, V: int | None) -> None:
    grids = config(*overrides).recipe().attention
    assert (grids.P and grids.P.bits, grids.V and grids.V.bits) == (P, V)


def test_grids_take_their_own_switches() -> None:
    recipe = config("bits=w4a8", "group_size=32", "act_group_size=64", "symmetric=true").recipe()
    assert (recipe.weights.bits, recipe.weights.group_size, recipe.weights.symmetric) == (4, 32, True)
    assert (recipe.inputs.bits, recipe.inputs.group_size, recipe.inputs.symmetric) == (8, 64, False)
    assert config("bits=w4a16").recipe().inputs is None


def test_tmas_is_a_value_of_the_states_slot() -> None:
    assert config("tmas=true").recipe().states == TMAS((0.3, 0.2, 0.2, 0.3))
    assert config("tmas=true", "calibration.shares=[1,0]").recipe().states.shares == (1.0, 0.0)
    assert config("calibration.states=uniform").recipe().states.name == "uniform"
    assert config("calibration.states=tmas").recipe().states == config("tmas=true").recipe().states
    assert config("calibration.states=uniform", "tmas=true").recipe().states == TMAS()


def test_cgq_is_a_value_of_the_weight_slot() -> None:
    assert config().recipe().token_weight is uniform_weight
    assert config("cgq_unmasked=0.3").recipe().token_weight is uniform_weight
    assert config("cgq=true").recipe().token_weight == CGQ(0.7, "zero", 1.0)
    knobs = ("cgq_unmasked=0.35", "cgq_masked=2", "cgq_unmasked_confidence=model")
    assert config("cgq=true", *knobs).recipe().token_weight == CGQ(0.35, "model", 2.0)


def test_confidence_is_recorded_where_the_weight_reads_it() -> None:
    assert [config(*o).recipe().observe for o in ((), ("cgq=true",), ("cgq_unmasked_confidence=model",))] == [
        "masked"
    ] * 3
    assert config("cgq=true", "cgq_unmasked_confidence=model").recipe().observe == "all"


@pytest.mark.parametrize(
    ("overrides", "name", "kind", "alphas"),
    [
        ([], "minmax", MinMax, None),
        (["iaaq=true"], "iaaq", IAAQ, 21),
        (["value_scale=iaaq"], "iaaq", IAAQ, 21),
        (["value_scale=mse"], "mse", EqualWeightSearch, 21),
        (["value_scale=mse", "iaaq=true"], "iaaq", IAAQ, 21),
        (["iaaq=true", "iaaq_alpha_min=0.5", "iaaq_alpha_step=0.05"], "iaaq", IAAQ, 11),
        (["value_scale=mse", "iaaq_alpha_min=0.9"], "mse", EqualWeightSearch, 11),
        (["iaaq=true", "iaaq_alpha_min=1"], "iaaq", IAAQ, 1),
    ],
)
def test_iaaq_is_a_value_of_the_scale_slot(
    overrides: list[str], name: str, kind: type[MinMax], alphas: int | None
) -> None:
    recipe = config("value_granularity=channel", *overrides).recipe()
    made = recipe.value_scale(Grid(4))
    assert recipe.value_scale_name == name and type(made) is kind and made.granularity == "channel"
    assert len(getattr(made, "alphas", ())) == (alphas or 0)


@pytest.mark.parametrize(
    ("overrides", "inert"),
    [
        (["cgq=true"], ["cgq: clean text"]),
        (["cgq=true", "cgq_unmasked_confidence=model"], []),
        (["cgq=true", "tmas=true"], []),
        (["cgq=true", "calibration.states=random_mask"], []),
        (["cgq=true", "tmas=true", "method=rtn"], ["cgq: RTN"]),  # TMAS reaches V's range
        (["cgq=true", "tmas=true", "method=rtn", "attn_bits=none"], ["tmas: RTN", "cgq: RTN"]),
        (["iaaq=true", "bits=w4a4"], []),
        (["iaaq=true", "method=rtn"], []),
        (["iaaq=true", "attn_bits=none"], ["iaaq: V is not quantized"]),
        (["iaaq=true", "bits=w4a16"], ["iaaq: V is not quantized"]),
        (["value_scale=mse", "bits=w4a16"], ["value_scale=mse: V is not quantized"]),
        (["iaaq=true", "iaaq_alpha_min=1"], ["iaaq: alpha = 1 is all that is searched"]),
        (["value_scale=mse", "iaaq_alpha_step=0.9"], ["value_scale=mse: alpha = 1 is all that is searched"]),
        (["method=fp", "tmas=true", "cgq=true", "iaaq=true"], ["tmas: FP", "cgq: FP", "iaaq: V"]),
        (["method=awq", "tmas=true", "cgq=true", "iaaq=true", "bits=w4a4"], []),
    ],
    ids=" ".join,
)
def test_a_switch_without_effect_is_named(overrides: list[str], inert: list[str]) -> None:
    found = config(*overrides).recipe().inert()
    assert len(found) == len(inert), found
    assert all(line.startswith(start) for line, start in zip(found, inert, strict=True)), found


UNCALIBRATED = ["method=rtn", "attn_bits=none"]


@pytest.mark.parametrize(
    ("overrides", "inert"),
    [
        ([], []),
        (["tmas=true", "calibration.states=uniform"], ["calibration.states: tmas=true"]),
        (["calibration.shares=[1,0]"], ["calibration.shares: only TMAS"]),
        (["tmas=true", "calibration.shares=[1,0]"], []),
        (["cgq_unmasked=0.3"], ["cgq_unmasked: cgq=false"]),
        (["cgq=true", "tmas=true", "cgq_unmasked=0.3", "cgq_masked=2"], []),
        (["cgq=true", "cgq_unmasked_confidence=model", "cgq_masked=2"], ["cgq_masked: clean text"]),
        (["iaaq_alpha_min=0.5"], ["iaaq_alpha_min: no scale"]),
        (["iaaq=true", "iaaq_alpha_min=0.5"], []),
        (["iaaq=true", "value_scale=mse"], ["value_scale: iaaq=true"]),
        (["bits=w4a16", "act_group_size=32", "act_symmetric=true", "value_granularity=tensor"],
         ["value_granularity: V", "act_group_size: inputs", "act_symmetric: inputs"]),
        (["bits=w4a8", "act_group_size=32", "value_granularity=tensor"], []),
        (["method.static_groups=true"], ["method.static_groups: group_size=-1"]),
        (["method.static_groups=true", "group_size=32"], []),
        ([*UNCALIBRATED, "seed=1", "calibration.num_prompts=4", "calibration.data=DATA"],
         ["seed: RTN reads"]),  # the held-out prompts are the ones after those
        ([*UNCALIBRATED, "calibration.num_prompts=4", "calibration.batch_size=3"],
         ["calibration.num_prompts: RTN reads"]),
        ([*UNCALIBRATED, "eval.fidelity_states=0", "eval.fidelity_prompts=2", "calibration.batch_size=3"],
         ["calibration.batch_size: RTN reads", "eval.fidelity_prompts: eval.fidelity_states=0"]),
        (["method=rtn", "seed=1", "calibration.num_states=3"], []),  # V's range is read from states
        (["method=fp", "export=gptq"], ["export: full precision is the checkpoint itself, so nothing"]),
        (["method=fp", "bits=w4a4", "seed=1", "eval.fidelity_states=0", "backend=packed"],
         ["bits: full", "backend: full", "seed: full", "eval.fidelity_states: fidelity"]),
        (["method=fp", "tasks=mini_choice", "sampler.steps=24", "sampler.cfg_scale=1"],
         ["sampler.steps: no task generates"]),
        (["tasks=mini_choice", "sampler.steps=24"], []),  # calibration denoises
        (["tasks=mini_choice", "sampler.cache=dual", "eval.eos_cut=none", "eval.batch_size=3"],
         ["sampler.cache: no task", "eval.eos_cut: no task", "eval.batch_size: no task"]),
        (["tasks=mini_gsm", "eval.mc_num=16", "eval.mc_batch_size=4"], 
         ["eval.mc_num: no task", "eval.mc_batch_size: no task"]),
        (["eval.allow_code_execution=true", "tasks.data_dir=FOLDER"],
         ["eval.allow_code_execution: no task", "tasks.data_dir: the tasks'"]),
        (["tasks=mini_code", "eval.allow_code_execution=true"], []),
        (["model.default_bits=w3a4", "bits=w4a4"], ["model.default_bits: bits=w4a4"]),
        (["model.default_bits=w3a4", "model.path=MODEL"], ["model.default_bits: it is the embedded"]),
        (["model.default_bits=w3a4"], []),
        (["model.sampler.steps=24", "sampler.steps=12"], ["model.sampler.steps: sampler.steps=12"]),
        (["model.sampler.steps=24"], []),
        (["model.chat_template=true", "tasks.chat_template=false"], ["model.chat_template: tasks."]),
        (["tasks.chat_template=true", "tasks.add_bos=true"], ["tasks.add_bos: a chat template"]),
        (["sampler.threshold=0.9"], []),
        (["sampler.threshold=1"], []),
        (["sampler.threshold=1.5"], ["sampler.threshold: no confidence reaches 1.5, so a step commits one"]),
        (["sampler.threshold=1.5", "tasks=mini_choice"], ["sampler.threshold: no task generates"]),
    ],
    ids=lambda words: " ".join(words) if not words or "=" in words[0].partition(":")[0] else "",
)  # fmt: skip
def test_a_key_without_effect_is_named_where_it_is_set(
    overrides: list[str], inert: list[str], tmp_path: Path
) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "a"}\n' * 40)
    places = {"DATA": str(data), "FOLDER": str(tmp_path), "MODEL": str(EMBEDDED)}
    words = [f"{k}={places.get(v, v)}" for k, _, v in (word.partition("=") for word in overrides)]
    config = load(composed(*words))
    found = [line for line in effects.inert(config, config.recipe()) if not line.startswith("cgq: ")]
    assert len(found) == len(inert), found
    assert all(line.startswith(start) for line, start in zip(found, inert, strict=True)), found


@pytest.mark.parametrize(
    ("overrides", "stored", "inert"),
    [
        ([], False, []),
        (["bits=w4a16", "act_symmetric=true"], False, ["act_symmetric: inputs"]),
        (["iaaq=true", "attn_bits=none", "seed=1"], False, ["iaaq: V is not quantized"]),
        ([*UNCALIBRATED, "seed=1", "calibration.batch_size=3", "calibration.num_prompts=4"], False,
         ["calibration.num_prompts: RTN", "calibration.batch_size: RTN", "seed: RTN reads no calibration"]),
        ([*UNCALIBRATED, "seed=1", "sampler.temperature=1"], False, []),  # noise is drawn
        (["method=fp", "seed=1"], False, ["seed: full precision is not calibrated, and the sampler draws"]),
        (["method=fp", "seed=1", "sampler.temperature=1"], False, []),
        (["method=fp", "backend=fake"], False, ["backend: full precision"]),
        (["method=fp", "backend=fake"], True, []),
        (["tasks=mini_choice", "sampler.cache=dual", "eval.eos_cut=none"], False, []),  # no task is answered
        (["eval.limit=3", "tasks.num_fewshot=1", "resume=false"], False,
         ["eval.limit: one prompt", "tasks.num_fewshot: one prompt", "resume: nothing is recorded"]),
        (["sampler.threshold=1.5", "tasks=mini_choice"], False, ["sampler.threshold: no confidence"]),
    ],
)  # fmt: skip
def test_a_key_without_effect_on_one_answer_is_named(
    overrides: list[str], stored: bool, inert: list[str]
) -> None:
    own = config(*overrides)
    found = effects.inert_in_generation(own, own.recipe(), stored)
    assert sorted(
        line[: len(start)] for line, start in zip(sorted(found), sorted(inert), strict=True)
    ) == sorted(inert), found


def test_the_sampler_is_the_models_unless_overridden() -> None:
    for name in ("mini", "llada_8b_instruct"):
        own = OmegaConf.to_object(composed(f"model={name}"))["model"]["sampler"]
        sampler = config(f"model={name}").sampler_config()
        assert {k: getattr(sampler, k) for k in own} == own
    assert config("sampler=llada_semi_ar").sampler_config().block_length == 8
    assert config("sampler.steps=24").sampler_config().steps == 24


def test_build_gives_the_dataclass_its_fields() -> None:
    assert build("method", {"_target_": "dllmq.methods.FP"}) == FP()
    knobs = {"_target_": "dllmq.methods.AWQ", "n_grid": 10, "solver": "gptq"}
    assert build("method", knobs) == AWQ(n_grid=10, solver="gptq")


@pytest.mark.parametrize("switch", ["tmas", "cgq", "iaaq"])
def test_a_run_and_its_twin_differ_in_the_switch_alone(switch: str) -> None:
    on, off = config(f"{switch}=true").axes(), config(f"{switch}=false").axes()
    assert {k for k in on if on[k] != off[k]} == {switch} and on.keys() == off.keys()


def test_caches_and_thresholds_approximate_answers_and_nothing_else() -> None:
    """Calibration, fidelity and full precision's reference stay exact; records are labelled."""
    fast, plain = config("sampler.cache=dual", "sampler.threshold=0.9"), config()
    assert fast.axes().items() - plain.axes().items() == {("cache", "dual"), ("threshold", 0.9)}
    assert not {"cache", "threshold"} & set(plain.axes()) and plain.approximations() == {}
    assert fast.approximations() == {"mini_gsm": "cache=dual, threshold=0.9"}  # mini_choice generates nothing
    assert all(answer.sampler.cache == "dual" for answer in fast.answers().values())
    assert fast.recipe().sampler == plain.recipe().sampler == plain.sampler_config()
    first, second = (fingerprint(reference_config(c), "cpu") for c in (fast, plain))
    assert first == second != fingerprint(fast, "cpu")
    assert config("tasks=mini_choice", "sampler.cache=dual").approximations() == {}


def test_dreams_reference_has_each_tasks_own_length() -> None:
    """A block length that the user set is the cached run's; the exact one has no blocks."""
    how = ("cache=dual", "threshold=0.9", "remasking=maskgit_plus", "block_length=32")
    own = ("model=dream_v0_7b_base", "tasks=gsm8k", "tasks.settings=fast_dllm_512")
    fast = config(*own, *(f"sampler.{key}" for key in how))
    assert fast.answers()["gsm8k"].sampler.block_length == 32
    exact = reference_config(fast).answers()["gsm8k"].sampler
    assert exact.exact and exact.block_length == exact.gen_length == 512


def test_dream_is_decoded_exactly_in_one_block_and_in_blocks_with_a_cache() -> None:
    fast = config("model=dream_v0_7b_base", "sampler=default", "sampler.cache=dual", "sampler.threshold=0.9",
                  "sampler.remasking=maskgit_plus", "sampler.block_length=32")  # fmt: skip
    assert fast.sampler_config().num_blocks == 8 and fast.recipe().sampler.num_blocks == 1
    assert reference_config(fast).sampler_config() == fast.recipe().sampler


def test_the_preset_of_fast_dllm() -> None:
    found = config("model=llada_8b_instruct", "sampler=fast_dllm").sampler_config()
    assert (found.gen_length, found.block_length, found.cache, found.threshold) == (256, 32, "dual", 0.9)


def test_knobs_are_axes_where_they_are_not_the_default() -> None:
    knobs = ("cgq_unmasked", "cgq_masked", "cgq_unmasked_confidence", "iaaq_alpha_min", "iaaq_alpha_step")
    assert not {*knobs, "shares"} & config("cgq_unmasked=0.7", "iaaq_alpha_step=0.01").axes().keys()
    assert config("cgq_unmasked=0.35").axes()["cgq_unmasked"] == 0.35
    assert config("calibration.shares=[0.25,0.75]").axes()["shares"] == "0.25 0.75"


@pytest.mark.parametrize(
    "override",
    [
        "value_granularity=tensor",
        "act_symmetric=true",
        "calibration.num_prompts=3",
        "method.damp=0.1",
        "value_scale=mse",
        "calibration.states=uniform",
        "attn_bits=qkpv",
        "backend=fake",
        "cgq_masked=2",
        "cgq_unmasked_confidence=model",
        "iaaq_alpha_min=0.5",
        "iaaq_alpha_step=0.05",
    ],
)
def test_what_can_be_swept_is_an_axis(override: str) -> None:
    assert config(override).axes() != config().axes()


# ------------------------------------------------------------------ the fingerprint


@pytest.fixture(scope="module")
def default() -> str:
    """The fingerprint of a run without overrides."""
    return fingerprint(config(), "cpu")


@pytest.mark.parametrize(
    "override",
    [
        "bits=w8a8",
        "seed=1",
        "tmas=true",
        "cgq=true",
        "iaaq=true",
        "cgq_unmasked=0.35",
        "iaaq_alpha_step=0.02",
        "value_scale=mse",
        "backend=fake",
        "method=rtn",
        "method.damp=0.02",
        "group_size=32",
        "act_symmetric=true",
        "eval.limit=3",
        "eval.batch_size=5",
        "eval.eos_cut=none",
        "eval.fidelity_states=8",
        "sampler.steps=24",
        "sampler.cache=dual",
        "sampler.threshold=0.9",
        "calibration.num_states=64",
        "calibration.batch_size=8",
        "tasks=mini_gsm",
        "model.dtype=bfloat16",
        "model.chat_template=true",
    ],
)
def test_the_fingerprint_changes_with_what_changes_numbers(override: str, default: str) -> None:
    assert fingerprint(config(override), "cpu") != default


@pytest.mark.parametrize(
    "override",
    [
        "memory=stream",
        "max_state_bytes=null",
        "tracker=none",
        "tracker.project=x",
        "name=x",
        "resume=false",
        "dry_run=true",
        "device=cpu",
        "cache_dir=null",
    ],
)
def test_the_fingerprint_ignores_what_changes_no_number(override: str, default: str) -> None:
    assert fingerprint(config(override), "cpu") == default


def test_the_fingerprint_knows_resolved_values(default: str) -> None:
    assert fingerprint(config(f"bits={config().widths()}"), "cpu") == default
    assert fingerprint(config(), "cuda:0") != default


def test_the_fingerprint_knows_what_settles_automatic_batches(
    monkeypatch: pytest.MonkeyPatch, default: str
) -> None:
    """The device's whole GiB, not the bytes that a kernel's update takes; nothing where the size is given."""
    seen = {default}
    for gigabytes in (16, 16.01, 16.9, 32):
        monkeypatch.setattr("dllmq.models.memory.total_memory", lambda device, n=gigabytes: int(n * 2**30))
        seen |= {fingerprint(config("eval.batch_size=auto"), "cpu")}
        assert fingerprint(config(), "cpu") == default
    assert len(seen) == 3


def test_the_fingerprint_knows_whose_kernels_compute_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, default: str
) -> None:
    """The GPU's name and Triton's version; of a CPU run neither."""
    seen = {default}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, triton in (("A", "3.1"), ("B", "3.1"), ("A", "3.2")):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        monkeypatch.setattr("dllmq.config.fingerprints.metadata.version", lambda package, v=triton: v)
        seen |= {fingerprint(config(), "cuda")}
    monkeypatch.undo()
    assert len(seen) == 4 and fingerprint(config(), "cpu") == default


def test_the_fingerprint_reads_threads_from_torch(monkeypatch: pytest.MonkeyPatch, default: str) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert fingerprint(config(), "cpu") != default


def test_the_fingerprint_reads_the_bytes_of_weights_tokenizer_and_data(tmp_path: Path) -> None:
    folder = shutil.copytree(EMBEDDED, tmp_path / "model")
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "a"}\n')
    of = config(f"model.path={folder}", f"calibration.data={data}")
    seen = {fingerprint(of, "cpu")}
    for file in (folder / "model.safetensors", folder / "tokenizer.json", data):
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
        seen.add(fingerprint(of, "cpu"))
    assert len(seen) == 4


def test_auto_is_another_dtype_for_the_same_weights_elsewhere(tmp_path: Path) -> None:
    """float32 embedded, bfloat16 from a folder: nothing of the one may be taken for the other's."""
    copy_ = config(f"model.path={shutil.copytree(EMBEDDED, tmp_path / 'model')}")
    assert (config().dtype(), copy_.dtype()) == ("float32", "bfloat16")
    assert identity(config(), "cpu") != identity(copy_, "cpu")
    same = replace(copy_, model=replace(copy_.model, dtype="float32"))
    assert identity(config(), "cpu") == identity(same, "cpu")


def test_code_is_what_it_was_when_the_process_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file edited during a sweep: the cells to come still run, and are named after, the code before."""
    before = code_digest()
    monkeypatch.setattr(Path, "read_bytes", lambda self: b"edited")
    assert code_digest() == before


def test_full_precision_is_the_same_for_every_cell_of_a_sweep() -> None:
    cells = [
        (f"method={method}", f"tmas={tmas}", f"bits={bits}", *more)
        for method, tmas, bits, *more in (
            ("rtn", "true", "w3a4"),
            ("gptq", "false", "w3a4"),
            ("awq", "true", "w4a16", "method.n_grid=10", "attn_bits=8"),
            ("fp", "false", "w4a4"),
            ("gptq", "true", "w2a8", "seed=3", "calibration.num_states=7", "group_size=32"),
            ("gptq", "false", "w2a8", "symmetric=true", "calibration.states=uniform"),
            ("gptq", "true", "w2a8", "cgq=true", "iaaq=true", "cgq_unmasked=0.1", "iaaq_alpha_min=0.5"),
            ("awq", "true", "w4a4", "value_scale=mse", "value_granularity=tensor", "backend=fake"),
            ("gptq", "true", "w2a8", "cgq_unmasked_confidence=model", "cgq_masked=2", "cache_dir=null"),
            ("gptq", "true", "w2a8", "calibration.num_prompts=8", "calibration.batch_size=4"),
            ("gptq", "true", "w2a8", "eval.fidelity_states=8", "eval.fidelity_prompts=2"),
        )
    ]
    assert len({fingerprint(reference_config(config(*cell)), "cpu") for cell in cells}) == 1


@pytest.mark.parametrize(
    "override", ["eval.limit=3", "sampler.steps=24", "tasks=mini_gsm", "model.dtype=bfloat16"]
)
def test_full_precision_is_another_where_the_measurement_is(override: str) -> None:
    reference = [fingerprint(reference_config(config(*o)), "cpu") for o in ((), (override,))]
    assert reference[0] != reference[1]


def test_the_fingerprint_does_not_depend_on_the_order_of_fields() -> None:
    of = config()
    turned = replace(of, method=dict(reversed(of.method.items())))
    assert fingerprint(turned, "cpu") == fingerprint(of, "cpu")


# ------------------------------------------------------------------ folders


def test_slug_is_a_plain_name_and_distinct_where_cut() -> None:
    assert slug("method=awq,tmas=true") == "method=awq,tmas=true"
    assert slug("tasks.names=[a, b]/../x") == "tasks.names=_a,_b_.._x"
    assert slug("") == slug("../..") == "default"
    long = [slug("a" * 150 + end) for end in "xy"]
    assert len(set(long)) == 2 and all(len(name) <= 100 for name in long)


def test_cell_name_begins_with_the_switches() -> None:
    name = cell_name("eval.limit=3,method=awq,tasks.names=[a,b],tmas=true")
    assert name == "method=awq,tmas=true,eval.limit=3,tasks.names=_a,b"
    assert cell_name("") == cell_name(None) == "default"
    cells = [cell_name(f"calibration.x={'1' * 100},tmas={value}") for value in ("true", "false")]
    assert len(set(cells)) == 2 and cells[0].startswith("tmas=true,calibration")


@pytest.mark.parametrize(
    ("overrides", "folder"),
    [
        ([], "outputs/default"),
        (["method=awq,gptq", "tmas=true,false"], "outputs/method=awq,gptq_tmas=true,false"),
        (["method=awq", "resume=false", "threads=1", "hydra.x=1", "dry_run=true"], "outputs/method=awq"),
        (["method=awq", "name=mine"], "outputs/mine"),
        (["method=awq", "name=null"], "outputs/method=awq"),
        (["method=awq", "cache_dir=/shared/cache"], "outputs/method=awq"),
        (["experiment=bitwidth"], "outputs/bitwidth"),
        (["experiment=bitwidth", "bits=w4a4"], "outputs/experiment=bitwidth_bits=w4a4"),
        (["name=../../elsewhere"], "outputs/elsewhere"),
    ],
)
def test_sweep_folder(overrides: list[str], folder: str) -> None:
    assert sweep_folder(overrides) == folder
