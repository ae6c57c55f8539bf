"""ShardWriter: shards within their limit, whole or not at all, never over something else."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dllmq.checkpoint import ShardWriter
from dllmq.models.stored import RECORD

INDEX = "model.safetensors.index.json"


def tensors(sizes: list[int]) -> dict[str, torch.Tensor]:
    return {f"t{i}": torch.arange(n, dtype=torch.float32) + i for i, n in enumerate(sizes)}


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(0, 12), min_size=1, max_size=9), limit=st.integers(1, 80))
def test_what_was_added_is_read_back_from_shards_below_the_limit(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int
) -> None:
    folder, given_ = tmp_path_factory.mktemp("x") / "out", tensors(sizes)
    with ShardWriter(folder, limit) as writer:
        for name, tensor in given_.items():
            writer.add(name, tensor)
        size = writer.finish()
    assert size == sum(f.stat().st_size for f in folder.iterdir())
    shards = [load_file(f) for f in sorted(folder.glob("*.safetensors"))]
    assert all(
        sum(4 * len(t) for t in s.values()) <= limit or sum(len(t) > 0 for t in s.values()) == 1
        for s in shards
    )
    found = {name: t for shard in shards for name, t in shard.items()}
    assert found.keys() == given_.keys() and all(torch.equal(found[n], given_[n]) for n in found)
    if len(shards) > 1:
        index = json.loads((folder / INDEX).read_text())
        assert index["metadata"]["total_size"] == 4 * sum(sizes)
        assert all(name in load_file(folder / file) for name, file in index["weight_map"].items())
    else:
        assert [f.name for f in folder.iterdir()] == ["model.safetensors"]


def test_at_most_one_shard_is_held(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "out", 40) as writer:
        for name, tensor in tensors([5] * 7).items():
            writer.add(name, tensor)
            assert sum(4 * len(t) for t in writer._held.values()) <= 40


def test_a_tensor_may_change_after_it_was_added(tmp_path: Path) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    with ShardWriter(tmp_path) as writer:
        writer.add("view", base.T)
        base.zero_()
        writer.finish()
    assert load_file(tmp_path / "model.safetensors")["view"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_nothing_is_left_of_a_write_that_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "out", 4) as writer:
        writer.add("a", torch.ones(3))
        writer.add("b", torch.ones(3))
        raise RuntimeError
    assert list((tmp_path / "out").iterdir()) == []


def test_an_earlier_export_stays_until_the_next_is_whole(tmp_path: Path) -> None:
    def write(sizes: list[int], finish: bool) -> None:
        with ShardWriter(tmp_path, 8) as writer:
            for name, tensor in tensors(sizes).items():
                writer.add(name, tensor)
            writer.add_text("config.json", str(sizes))
            writer.add_text(RECORD, "{}")
            if finish:
                writer.finish()

    write([2, 2, 2], True)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    write([1], False)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
    (tmp_path / "notes.md").write_text("mine")
    (tmp_path / ".writing-killed").mkdir()
    write([1], True)
    assert {f.name for f in tmp_path.iterdir()} == {"model.safetensors", "config.json", RECORD, "notes.md"}


def test_other_folders_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds config\.json and no dllmq_quantization\.json"):
        ShardWriter(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        ShardWriter(tmp_path / "config.json")
    with pytest.raises(ValueError, match="max_shard_bytes=0"):
        ShardWriter(tmp_path / "new", 0)
    assert [f.name for f in tmp_path.iterdir()] == ["config.json"]
