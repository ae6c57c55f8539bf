"""`dllmq` in lm-eval's registry: the same scores as evaluate(), wrong arguments in one sentence."""

import json
import subprocess
import sys
import tomllib
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import yaml
from lm_eval.api.model import LM
from lm_eval.api.registry import Registry, get_model
from safetensors.torch import save_file
from tiny_checkpoint import save_checkpoint

from dllmq.config import EMBEDDED
from dllmq.diffusion import SamplerConfig
from dllmq.evaluation.plugin import Arguments, DllmqLM, Refused
from dllmq.evaluation.settings import EvalSettings
from dllmq.evaluation.tasks import _quiet_lm_eval, build_task_configs, evaluate
from dllmq.models import load_model
from dllmq.models.dream import Dream, DreamConfig
from dllmq.models.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
ARGUMENTS = "dtype=float32,gen_length=16,steps=8,block_length=8,mc_num=8,batch_size=4,seed=3"
SETTINGS = EvalSettings(SamplerConfig(16, 8, 8), batch_size=4, mc_num=8, mc_batch_size=8, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_checkpoint(tmp_path_factory.mktemp("plugin") / "llada")
    (folder / "chat_template.jinja").write_text((EMBEDDED / "chat_template.jinja").read_text())
    return folder


def own(folder: Path, task: str, work_dir: Path, **changes: Any) -> dict[str, float]:
    """dllmq's scores of the first problems."""
    settings = EvalSettings(**(vars(SETTINGS) | changes))
    result = evaluate(load_model(folder), load_tokenizer(folder), [task], settings, 4, work_dir=work_dir)
    return {metric: score["value"] for metric, score in result.scores[task].items()}


def stock(model_args: Any, task: str, work_dir: Path, **options: Any) -> dict[str, Any]:
    with _quiet_lm_eval() as lm_eval:
        return lm_eval.simple_evaluate(
            model="dllmq",
            model_args=model_args,
            tasks=build_task_configs([task], 4, work_dir),
            task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
            bootstrap_iters=0,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
            **options,
        )


@pytest.mark.parametrize("task", ["mini_gsm", "mini_choice"])
@pytest.mark.parametrize("as_dict", [False, True])
def test_simple_evaluate_by_name_gives_our_own_scores(
    folder: Path, tmp_path: Path, task: str, as_dict: bool
) -> None:
    text = f"pretrained={folder},{ARGUMENTS}"
    given = dict(part.split("=") for part in text.split(","))
    plain = {name: int(value) if value.isdigit() else value for name, value in given.items()}
    found = stock(plain if as_dict else text, task, tmp_path, log_samples=True)
    scores = found["results"][task]
    for metric, value in own(folder, task, tmp_path).items():
        assert scores[metric if "," in metric else f"{metric},none"] == value
    result = evaluate(load_model(folder), load_tokenizer(folder), [task], SETTINGS, 4, work_dir=tmp_path)
    answers = {s["doc_id"]: s["resps"] for s in found["samples"][task]}
    for sample in result.samples[task]:
        theirs = answers[sample["doc_id"]]
        if task == "mini_gsm":
            assert theirs[0][0] == sample["response"]
        else:
            assert [r[0][0] for r in theirs] == sample["log_likelihoods"]


def test_results_name_the_settings(folder: Path, tmp_path: Path) -> None:
    config = stock(f"pretrained={folder},{ARGUMENTS}", "mini_gsm", tmp_path)["config"]
    assert config["dllmq_settings"]["sampler"]["steps"] == 8 and config["dllmq_settings"]["seed"] == 3
    assert config["model_dtype"] == "torch.float32" and json.dumps(config["dllmq_settings"])


def test_the_chat_template_is_applied_when_asked_for(folder: Path, tmp_path: Path) -> None:
    found = stock(f"pretrained={folder},{ARGUMENTS}", "mini_gsm", tmp_path, apply_chat_template=True,
                  log_samples=True)  # fmt: skip
    prompt = found["samples"]["mini_gsm"][0]["arguments"][0][0]
    assert (
        prompt.startswith("<|startoftext|><|start_header_id|>user") and prompt.count("<|startoftext|>") == 1
    )
    scores, ours = found["results"]["mini_gsm"], own(folder, "mini_gsm", tmp_path)
    assert set(ours) <= set(scores)


def test_lm_evals_options_give_way_to_model_args(folder: Path) -> None:
    options = {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"}  # lm-eval's defaults
    made = get_model("dllmq").create_from_arg_string(f"pretrained={folder},{ARGUMENTS}", options)
    assert isinstance(made, DllmqLM) and made.settings == replace(SETTINGS, max_length=256)
    other = DllmqLM.create_from_arg_obj({"pretrained": str(folder), "gen_length": 16}, {"batch_size": "7"})
    assert other.settings.batch_size == 7 and other.model.model.dtype == torch.bfloat16
    assert other.settings.sampler == SamplerConfig(16, 16, 16)


@pytest.mark.parametrize(
    ("batch_size", "max_batch_size", "expected"),
    [(3, 9, 3), ("5", 9, 5), ("auto", None, "auto"), ("auto:4", 9, 9)],
)
def test_automatic_batches_are_those_of_a_run(
    folder: Path, batch_size: int | str, max_batch_size: int | None, expected: int | str
) -> None:
    """By memory, unless lm-eval's own option says how many."""
    given = Arguments("x", gen_length=16, batch_size=batch_size, max_batch_size=max_batch_size)
    assert given.settings(load_model(folder).config).batch_size == expected


@pytest.mark.parametrize(("mc_num", "strata"), [(128, 8), (1, 1), (6, 2), (12, 4)])
def test_strata_divide_the_samples(folder: Path, mc_num: int, strata: int) -> None:
    config = load_model(folder).config
    assert Arguments("x", gen_length=16, mc_num=mc_num).settings(config).mc_batch_size == strata


def test_dream_is_told_by_its_config(tmp_path: Path) -> None:
    raw = {"architectures": ["DreamModel"], "hidden_size": 16, "num_hidden_layers": 1,
           "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16,
           "vocab_size": 500, "mask_token_id": 2,
           "eos_token_id": 1, "rope_theta": 1e4, "max_position_embeddings": 64}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(raw))
    state = {n: p.detach().clone() for n, p in Dream(DreamConfig.from_dict(raw)).state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((EMBEDDED / name).read_text())
    made = DllmqLM(Arguments(str(tmp_path), gen_length=8, temperature=0.1, top_p=0.9))
    assert (made.settings.sampler.remasking, made.settings.sampler.top_p) == ("entropy", 0.9)
    with pytest.raises(ValueError, match="this model is a Dream model"):
        DllmqLM(Arguments(str(tmp_path), gen_length=8, remasking="low_confidence"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gen_length=16", "pretrained=<checkpoint folder or hub id> is needed"),
        ("pretrained={folder},gen_lenght=16", "there is no gen_lenght. Did you mean gen_length?"),
        ("pretrained={folder},trust_remote_code=true", "there is no trust_remote_code"),
        ("pretrained={folder},gen_length=long", "gen_length=long has the wrong type; it must be int"),
        ("pretrained={folder},gen_length=true", "gen_length=True has the wrong type"),
        ("pretrained={folder},logits_eos_inf=1", "logits_eos_inf=1 has the wrong type; it must be bool"),
        ("pretrained={folder},gen_length=16,steps=7,block_length=8", "steps (the total) must be a multiple"),
        ("pretrained={folder}", "max_length=256 leaves no room for a prompt: gen_length is 256"),
        ("pretrained={folder},gen_length=16,mc_num=6,mc_batch_size=4", "mc_num must be a multiple"),
        (
            "pretrained={folder},gen_length=16,dtype=int8",
            "dtype=int8 is not known; use auto, bfloat16, float32",
        ),
        ("pretrained={folder},gen_length=16,batch_size=big", "batch_size=big is not known"),
        ("pretrained={folder},gen_length=16,device=tpu", "device=tpu is not known"),
        ("pretrained={folder},gen_length=16,threads=0", "threads=0 is too small"),
        ("pretrained={folder},gen_length=16,top_p=0.9", "top_p=0.9 is an option of Dream's sampler"),
        ("pretrained=/no/such/folder", "model path /no/such/folder does not exist"),
    ],
)
def test_wrong_arguments_are_one_sentence(
    folder: Path, text: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dllmq.evaluation.plugin.load_model", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ValueError) as caught:
        DllmqLM.create_from_arg_string(text.format(folder=folder))
    message = str(caught.value)
    assert message.startswith("dllmq: ") and "\n" not in message
    assert said in message


@pytest.mark.slow
def test_an_uncaught_refusal_ends_a_program_without_a_traceback() -> None:
    with pytest.raises(SystemExit):
        raise Refused("dllmq: a sentence")
    program = "from dllmq.evaluation.plugin import DllmqLM\nDllmqLM.create_from_arg_string('steps=3')"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr.strip() == "dllmq: model_args: pretrained=<checkpoint folder or hub id> is needed."


def test_the_entry_point_names_the_class() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (item,) = project["entry-points"]["lm_eval.models"].items()
    assert item == ("dllmq", f"{DllmqLM.__module__}:DllmqLM")
    later = Registry("model", base_cls=LM)  # as versions after 0.4.13 fill it
    later.register("dllmq", target=EntryPoint(*item, group="lm_eval.models"))
    assert later.get("dllmq") is DllmqLM and get_model("dllmq") is DllmqLM
    assert get_model("dummy").__name__ == "DummyLM"  # lm-eval's own models are still there


def command(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    """python -m program; lm-eval's in a new process, which has to find the plugin by itself."""
    if program != "lm_eval":
        return forked.run(ROOT, program, *words)
    return subprocess.run([sys.executable, "-m", program, *words], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize(
    "program", ["lm_eval", pytest.param("dllmq.evaluation.plugin", marks=pytest.mark.long)]
)
def test_the_stock_command_line_gives_our_own_scores(program: str, folder: Path, tmp_path: Path) -> None:
    """lm-eval's own arguments, task files and result file; the task is a local YAML."""
    config = build_task_configs(["mini_gsm"], 4, tmp_path)[0]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(yaml.safe_dump(config | {"task": "local_gsm"}))
    words = ["run", "--model", "dllmq", "--model_args", f"pretrained={folder},{ARGUMENTS}", "--tasks",
             "local_gsm", "--include_path", str(tmp_path / "tasks"), "--limit", "4", "--output_path",
             str(tmp_path / "out")]  # fmt: skip
    ended = command(program, *words)
    assert ended.returncode == 0, ended.stderr
    (file,) = (tmp_path / "out").rglob("results_*.json")
    scores = json.loads(file.read_text())["results"]["local_gsm"]
    for metric, value in own(folder, "mini_gsm", tmp_path).items():
        assert scores[metric] == value
    wrong = command(program, *words[:-2], "--model_args", "pretrained=/no/folder")
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr
    assert "dllmq: model path /no/folder does not exist" in wrong.stderr
