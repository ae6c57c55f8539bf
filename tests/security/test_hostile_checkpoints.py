"""Checkpoint folders made to harm: nothing of theirs is run, each is one sentence, and none takes long."""

import json
import os
import pickle
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoint import save_checkpoint
from tiny_folders import save_source

from dllmq.models import load_model
from dllmq.models.tokenizer import load_tokenizer, render_chat

Change = Callable[[Path], object]


class Payload:
    """What unpickles to a call of `touch`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("hostile") / "llada")


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "checkpoint"))


def sentence(folder: Path, read: Callable[[Path], object] = load_model) -> str:
    start = time.process_time()
    with pytest.raises(ValueError) as refused:
        read(folder)
    text = str(refused.value)
    assert "\n" not in text and len(text) < 800 and text.isprintable()
    assert time.process_time() - start < 10  # a loop over a billion layers takes minutes
    return text


def with_config(folder: Path, **fields: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


def with_weights(folder: Path, header: bytes, data: bytes = b"") -> Path:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    return folder


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "consolidated.00.pth"])
def test_pickles_are_never_opened(folder: Path, tmp_path: Path, name: str) -> None:
    mark = tmp_path / "ran"
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Payload(mark)))
    sentence(folder)
    assert not mark.exists()
    pickle.loads((folder / name).read_bytes())
    assert mark.exists()  # the payload is a live one


@pytest.mark.parametrize(
    "name",
    ["../llada/model.safetensors", "/etc/passwd", "..", ".", "", "a/b", "model.safetensors\0", "x.bin", 3],
)
def test_an_index_reaches_nothing_outside_the_folder(folder: Path, name: Any) -> None:
    weight_map = {"model.transformer.wte.weight": name}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "model.safetensors.index.json" in sentence(folder)


@pytest.mark.parametrize(
    "field",
    [
        {"n_layers": 10**9},
        {"n_layers": 20_000},
        {"d_model": 2**62},
        {"embedding_size": 2**62},
        {"vocab_size": 10**40},
        {"mlp_hidden_size": 10**30},
        {"n_heads": 2**31},
        {"max_sequence_length": 10**12},
        {"rope_theta": 1e308},
        {"rope_theta": float("nan")},
        {"mask_token_id": 10**25},
    ],
    ids=str,
)
def test_sizes_that_no_model_has_are_refused_before_anything_is_made(
    folder: Path, field: dict[str, Any]
) -> None:
    assert "config.json has " in sentence(with_config(folder, **field))


@pytest.mark.parametrize("field", [{"num_hidden_layers": 10**9}, {"hidden_size": 2**62}], ids=str)
def test_dreams_too(tmp_path: Path, field: dict[str, Any]) -> None:
    folder = save_source(tmp_path / "dream", "dream")
    assert "it must be an integer <=" in sentence(with_config(folder, **field))


def test_a_ratio_that_no_model_has(folder: Path) -> None:
    assert "shape" in sentence(with_config(folder, mlp_hidden_size=None, mlp_ratio=1e300))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '{"n_layers":' + "9" * 5000 + "}", "\0", ""]
)
def test_a_config_that_breaks_parsers(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert "config.json is not valid JSON" in sentence(folder)


def tensor(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4), name: str = "a") -> bytes:
    return json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


@pytest.mark.parametrize(
    "header",
    [
        tensor(shape=(2**62, 4)),
        tensor(shape=(-1,)),
        tensor(offsets=(4, 0)),
        tensor(offsets=(0, 2**63)),
        tensor(dtype="F1024"),
        tensor(shape="all"),
        tensor(name="a" * 10**6),
        tensor(name="a\n\x1b[31m[bold]"),
        b'{"a":' * 50_000,
        b'{"__metadata__":{"a":"' + b"x" * 110_000_000 + b'"}}',
    ],
    ids=["overflow", "negative", "backwards", "far", "type", "no list", "long", "control", "deep", "huge"],
)
def test_headers_made_to_harm(folder: Path, header: bytes) -> None:
    assert "model.safetensors" in sentence(with_weights(folder, header, b"1234"))


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 0])
def test_a_header_length_that_lies(folder: Path, length: int) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    assert "cannot be read as safetensors" in sentence(folder)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_what_is_no_file_is_not_waited_for(folder: Path, name: str, make: Callable[[Path], None]) -> None:
    (folder / name).unlink()
    make(folder / name)
    assert f"has no {'*.safetensors' if name.startswith('model') else name}" in sentence(folder)


EVIL = "import pathlib; pathlib.Path(__file__).with_name('ran').touch()\nclass Tok: pass\nclass Model: pass\n"


@pytest.mark.parametrize("fast", [True, False])
def test_code_that_comes_with_a_checkpoint_is_never_run(folder: Path, fast: bool) -> None:
    for name in ("evil.py", "tokenization_evil.py", "modeling_evil.py", "configuration_evil.py"):
        (folder / name).write_text(EVIL)
    with_config(folder, auto_map={"AutoConfig": "evil.Model", "AutoModel": "evil.Model"})
    file = folder / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["evil.Tok", "evil.Tok"]}, "tokenizer_class": "Tok"}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    load_model(folder)
    if fast:
        assert load_tokenizer(folder)("Question", add_special_tokens=False)["input_ids"]
    else:
        (folder / "tokenizer.json").unlink()
        assert "needs the checkpoint's own code, which is never run" in sentence(folder, load_tokenizer)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% if %}",
    ],
)
def test_a_template_stays_in_its_sandbox(
    folder: Path, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    messages = [{"role": "user", "content": "hello"}]
    said = sentence(folder, lambda _: render_chat(tokenizer, messages, add_generation_prompt=True))
    assert "chat template cannot be used" in said and not (folder / "ran").exists()
