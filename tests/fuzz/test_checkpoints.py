"""Damaged checkpoints: whatever happened to a header, an index or a config, it loads or is one sentence."""

import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from sharded_checkpoint import save_sharded
from tiny_folders import quantized, source

from dllmq.checkpoint import save_quantized
from dllmq.models import load_model
from dllmq.numerics import Grid

LIKELY = b'0123456789"{}[],:-eE.\x00\xff'


@pytest.fixture(scope="module", params=["llada", "dream", "quantized"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / request.param
    if request.param == "quantized":
        save_quantized(quantized("llada", Grid(4), Grid(8)), folder, "compressed_tensors", source("llada"))
        return folder
    return save_sharded(folder, request.param)


def end_of_header(file: Path, content: bytes) -> int:
    """What is before it is read as text; a changed weight behind it is another weight, and no error."""
    return len(content) if file.suffix == ".json" else 8 + struct.unpack("<Q", content[:8])[0]


def damage(content: bytes, end: int, rng: random.Random) -> bytes:
    """A flipped bit, an exchanged byte, a piece that is cut off, or one that is there twice."""
    changed, at = bytearray(content), rng.randrange(end)
    kind = rng.choice(("flip", "flips", "byte", "cut", "twice"))
    if kind == "cut":
        return bytes(changed[:at])
    if kind == "twice":
        piece = changed[at : min(end, at + rng.randrange(1, 40))]
        return bytes(changed[:at] + piece + changed[at:])
    if kind == "byte":
        changed[at] = rng.choice(LIKELY)
    else:
        for place in [at, *(rng.randrange(end) for _ in range(2 * (kind == "flips")))]:
            changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def outcome(folder: Path) -> str:
    """ "loads", or the one sentence; anything else is an error of the test."""
    try:
        model = load_model(folder)
    except ValueError as error:
        text = str(error)
        assert "\n" not in text and 20 < len(text) < 1000, text
        return text
    logits = model(torch.tensor([[1, 2, 3]]))
    assert logits.shape[:2] == (1, 3)
    return "loads"


def fuzz(original: Path, folder: Path, seed: int, times: int) -> list[str]:
    rng, outcomes = random.Random(seed), []
    shutil.copytree(original, folder)
    files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors"))
    for _ in range(times):
        file = rng.choice(files)
        content = file.read_bytes()
        file.write_bytes(damage(content, end_of_header(file, content), rng))
        outcomes.append(outcome(folder))
        file.write_bytes(content)
    assert outcome(folder) == "loads"
    return outcomes


def test_a_damaged_checkpoint_loads_or_is_one_sentence(original: Path, tmp_path: Path) -> None:
    outcomes = fuzz(original, tmp_path / "copy", seed=0, times=40)
    assert len(set(outcomes)) > 5


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 3))
def test_many_damaged_checkpoints(original: Path, tmp_path: Path, seed: int) -> None:
    fuzz(original, tmp_path / "copy", seed, times=200)
