"""Checkpoints in the published format: what loads, and the one sentence for each thing that can be wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llada import tiny_model
from torch import Tensor

from dllmq.models import load_model, loading, streaming
from dllmq.models.llada import LLaDA

# The published config.json's fields, with the dimensions of the tiny model.
CONFIG: dict[str, Any] = {
    "activation_type": "silu",
    "alibi": False,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 32,
    "embedding_size": 40,
    "eos_token_id": 39,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_fn": "mitchell",
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "mask_token_id": 38,
    "max_sequence_length": 32,
    "mlp_hidden_size": 48,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 2,
    "pad_token_id": 39,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 10000.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": 40,
    "weight_tying": False,
}
INDEX = "model.safetensors.index.json"
V = "model.transformer.blocks.1.v_proj.weight"


def source() -> LLaDA:
    """Weights that bf16 holds exactly."""
    return tiny_model(n_kv_heads=2).to(torch.bfloat16).float()


def save(folder: Path, shards: int = 1, config: dict[str, Any] = CONFIG, **tensors: Tensor) -> Path:
    """A checkpoint in bf16; `tensors` replace or join the model's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    state = {name: p.bfloat16().contiguous() for name, p in source().state_dict().items()} | tensors
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return folder
    names, weight_map = sorted(state), {}
    for n in range(shards):
        file = f"model-{n + 1:05}-of-{shards:05}.safetensors"
        save_file({name: state[name] for name in names[n::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[n::shards], file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def sentence(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path | str], str]:
    """The message with which a path is refused; reading a weight before that fails the test."""

    class HeaderOnly:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = real(*args, **kwargs)

        def __enter__(self) -> Any:
            self.inside = self.file.__enter__()
            return self

        def __exit__(self, *args: Any) -> None:
            self.file.__exit__(*args)

        def keys(self) -> Any:
            return self.inside.keys()

        def get_slice(self, name: str) -> Any:
            return self.inside.get_slice(name)

        def get_tensor(self, name: str) -> Any:
            raise AssertionError("a weight was read before everything was checked")

    real = loading.safe_open
    monkeypatch.setattr(loading, "safe_open", HeaderOnly)
    monkeypatch.setattr(streaming, "safe_open", HeaderOnly)

    def refuse(path: Path | str) -> str:
        with pytest.raises(ValueError) as error:
            load_model(path)
        message = str(error.value)
        assert "\n" not in message and message.endswith(".")
        return message

    return refuse


@pytest.mark.parametrize("shards", [1, 3])
def test_a_saved_checkpoint_loads_equal(tmp_path: Path, shards: int) -> None:
    model, ids = load_model(save(tmp_path / "%7 not a model", shards)), torch.arange(12)[None]
    assert torch.equal(model(ids), source()(ids))
    assert model.dtype == torch.float32 and not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert (model.config.mask_token_id, model.config.eos_token_id, model.config.kv_heads) == (38, 39, 2)


def test_a_checkpoint_loads_in_the_dtype_asked_for(tmp_path: Path) -> None:
    model = load_model(str(save(tmp_path, 2)), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.blocks[1].v_proj.weight, source().blocks[1].v_proj.weight.bfloat16())


def test_a_tied_checkpoint_has_no_head(tmp_path: Path) -> None:
    model = tiny_model(weight_tying=True)
    config = CONFIG | {"weight_tying": True, "n_kv_heads": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    ids = torch.arange(9)[None]
    assert torch.equal(load_model(tmp_path)(ids), model(ids))


def test_optional_fields_have_the_published_values(tmp_path: Path) -> None:
    given = {
        k: v for k, v in CONFIG.items() if k not in ("embedding_size", "rope_theta", "weight_tying", "alibi")
    }
    config = load_model(save(tmp_path, config=given)).config
    assert (config.logit_size, config.rope_theta, config.rope_full_precision) == (40, 500000.0, True)


# What is wrong with the tensors -------------------------------------------------------------------


def test_a_missing_tensor_is_named(tmp_path: Path, sentence: Callable[[Path], str]) -> None:
    save(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state[V]
    save_file(state, tmp_path / "model.safetensors")
    assert f"lacks {V}" in sentence(tmp_path)


def test_an_extra_tensor_is_named(tmp_path: Path, sentence: Callable[[Path], str]) -> None:
    name = "model.transformer.blocks.0.q_proj.bias"
    assert name in sentence(save(tmp_path, **{name: torch.zeros(32)}))


def test_a_misshaped_tensor_is_named_with_both_shapes(
    tmp_path: Path, sentence: Callable[[Path], str]
) -> None:
    message = sentence(save(tmp_path, **{V: torch.zeros(32, 32)}))
    assert V in message and "(32, 32)" in message and "(16, 32)" in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64])
def test_integer_weights_are_refused(
    tmp_path: Path, sentence: Callable[[Path], str], dtype: torch.dtype
) -> None:
    message = sentence(save(tmp_path, **{V: torch.zeros(16, 32, dtype=dtype)}))
    assert V in message and "full-precision" in message


def test_a_tensor_in_two_files_is_refused(tmp_path: Path, sentence: Callable[[Path], str]) -> None:
    save(tmp_path)
    save_file({V: torch.zeros(16, 32)}, tmp_path / "zz.safetensors")
    message = sentence(tmp_path)
    assert V in message and "model.safetensors" in message and "zz.safetensors" in message


# What is wrong with the files ---------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 5, 600, -1])
def test_a_truncated_shard_is_named(tmp_path: Path, sentence: Callable[[Path], str], kept: int) -> None:
    save(tmp_path, 2)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:kept])
    message = sentence(tmp_path)
    assert shard.name in message and "again" in message


def test_a_pointer_in_the_place_of_a_shard(tmp_path: Path, sentence: Callable[[Path], str]) -> None:
    save(tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    assert "damaged" in sentence(tmp_path)


def test_pickled_weights_are_not_read(tmp_path: Path, sentence: Callable[[Path], str]) -> None:
    save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(source().state_dict(), tmp_path / "pytorch_model.bin")
    message = sentence(tmp_path)
    assert "*.safetensors" in message and ".bin" in message


@pytest.mark.parametrize("outside", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", 3])
def test_an_index_cannot_point_outside(
    tmp_path: Path, sentence: Callable[[Path], str], outside: str | int
) -> None:
    folder = save(tmp_path / "inside", 2)
    save(tmp_path)
    (folder / INDEX).write_text(json.dumps({"weight_map": {V: outside}}))
    message = sentence(folder)
    assert INDEX in message and repr(outside) in message


def test_an_index_that_names_a_missing_shard(tmp_path: Path, sentence: Callable[[Path], str]) -> None:
    save(tmp_path, 3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in sentence(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": {}}}', "\xff"])
def test_a_damaged_index(tmp_path: Path, sentence: Callable[[Path], str], text: str) -> None:
    save(tmp_path, 2)
    (tmp_path / INDEX).write_text(text, encoding="latin-1")
    assert INDEX in sentence(tmp_path)


# What is wrong with config.json -------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{'a': 1}", "[1,", "\xff\xfe"])
def test_config_that_is_no_json(tmp_path: Path, sentence: Callable[[Path], str], text: str) -> None:
    save(tmp_path)
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    assert "config.json is not valid JSON" in sentence(tmp_path)


def test_config_that_is_not_there(tmp_path: Path, sentence: Callable[[Path], str]) -> None:
    save(tmp_path)
    (tmp_path / "config.json").unlink()
    assert "has no config.json" in sentence(tmp_path)


@pytest.mark.parametrize("value", [["LlamaForCausalLM"], [], None, "LLaDAModelLM", [["x"]], 3])
def test_unknown_architectures(tmp_path: Path, sentence: Callable[[Path], str], value: Any) -> None:
    message = sentence(save(tmp_path, config=CONFIG | {"architectures": value}))
    assert str(value or None) in message and "['DreamModel', 'LLaDAModelLM']" in message


def test_a_config_that_is_no_object(tmp_path: Path, sentence: Callable[[Path], str]) -> None:
    save(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    assert "architectures = None" in sentence(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alibi", True),
        ("activation_type", "swiglu"),
        ("rope", False),
        ("block_group_size", 2),
        ("layer_norm_type", "default"),
        ("scale_logits", True),
        ("d_model", "32"),
        ("n_heads", 0),
        ("n_layers", 2.0),
        ("rope_theta", "1e4"),
        ("weight_tying", "no"),
        ("mask_token_id", 40),
        ("mask_token_id", -1),
        ("n_kv_heads", 3),
        ("n_heads", 32),  # heads of width 1 cannot be rotated
    ],
)
def test_a_field_that_cannot_be(
    tmp_path: Path, sentence: Callable[[Path], str], field: str, value: Any
) -> None:
    message = sentence(save(tmp_path, config=CONFIG | {field: value}))
    assert f"{field} = {value!r}" in message


def test_missing_fields_are_all_named(tmp_path: Path, sentence: Callable[[Path], str]) -> None:
    given = {k: v for k, v in CONFIG.items() if k not in ("d_model", "mask_token_id", "n_heads")}
    message = sentence(save(tmp_path, config=given))
    assert "lacks d_model, n_heads, mask_token_id" in message


# What is wrong with the path ----------------------------------------------------------------------


def test_paths_that_are_no_folder(tmp_path: Path, sentence: Callable[[Path | str], str]) -> None:
    assert "does not exist" in sentence(tmp_path / "nothing here")
    (tmp_path / "file").write_text("")
    assert "is a file" in sentence(tmp_path / "file")
    assert "HF_HUB_OFFLINE is set" in sentence("nobody/nothing")  # tests have no network
    assert "no config.json" in sentence(tmp_path)
