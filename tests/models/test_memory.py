"""What is held in memory: the choice by figures, and where the figures come from."""

from pathlib import Path

import pytest
import torch
from torch import nn

from dllmq.methods.rtn import round_to_nearest
from dllmq.models import memory
from dllmq.models.linear import QuantLinear
from dllmq.models.memory import MemoryPlan, free_memory, in_bytes, plan_memory, resident_bytes
from dllmq.numerics import Grid

GB = 10**9
BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("free", "mode"),
    [
        (100, "whole"),
        (30, "whole"),  # 8 G parameters: 16 GB and 8 GB of codes are 80 % of it
        (29, "compact"),
        (20, "compact"),
        (19, "stream"),
        (1, "stream"),
    ],
)
def test_auto_takes_the_first_that_fits(free: int, mode: str) -> None:
    plan = plan_memory("auto", 8 * GB, BF16, "cpu", free * GB)
    assert plan == MemoryPlan(mode, 16 * GB, free * GB)
    assert (plan.stream, plan.compact) == (mode == "stream", mode != "whole")


def test_the_dtype_counts() -> None:
    assert plan_memory("auto", 8 * GB, torch.float32, "cpu", 45 * GB).mode == "compact"
    assert plan_memory("auto", 8 * GB, BF16, "cpu", 45 * GB).mode == "whole"


def test_resident_bytes_count_every_form_once() -> None:
    """A quantized linear's in whatever form it is, a shared tensor once, nothing on the meta device."""
    model = nn.ModuleDict({"norm": nn.LayerNorm(64), "tied": nn.Linear(64, 8), "head": nn.Linear(64, 8)})
    model["head"].weight = model["tied"].weight
    plain = 4 * (64 + 64 + 8 * 64 + 8 + 8)
    assert resident_bytes(model) == plain
    linear = QuantLinear(round_to_nearest(torch.randn(32, 64), Grid(4)), torch.zeros(32), None, torch.float32)
    model["quantized"] = linear
    scales, bias = 2 * 4 * 32, 4 * 32
    assert resident_bytes(model) == plain + 5 * 32 * 64 + scales + bias
    linear.compact()
    assert resident_bytes(model) == plain + 32 * 64 // 2 + scales + bias
    model["norm"].to("meta")
    assert resident_bytes(model) == plain - 4 * 128 + 32 * 64 // 2 + scales + bias


@pytest.mark.parametrize(("asked", "free"), [("whole", 1), ("stream", 10**6)])
def test_what_is_asked_for_is_taken(asked: str, free: int) -> None:
    assert plan_memory(asked, 8 * GB, BF16, "cpu", free * GB).mode == asked


def test_a_system_that_tells_nothing_loads_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda _: None)
    assert plan_memory("auto", 8 * GB, BF16, "cpu") == MemoryPlan("whole", 16 * GB, None)
    assert str(plan_memory("stream", 8 * GB, BF16, "cpu")) == "stream (weights 16.0 GB, free unknown)"


def test_the_plan_in_words() -> None:
    assert str(MemoryPlan("compact", 16 * GB, 22_500_000_000)) == "compact (weights 16.0 GB, free 22.5 GB)"
    assert str(MemoryPlan("whole", 7_220_000, GB)) == "whole (weights 7.2 MB, free 1.0 GB)"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *((0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (14_440_000, "14.4 MB")),
        *((103_000_000, "103 MB"), (999_600_000, "1.0 GB"), (16.03e9, "16.0 GB"), (2.5e12, "2500 GB")),
    ],
)
def test_sizes_are_read_at_a_glance(count: int | float, text: str) -> None:
    assert in_bytes(count) == text


def test_free_memory_of_the_machine(tmp_path: Path) -> None:
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:       100 kB\nMemFree:  5 kB\nMemAvailable:   40 kB\n")
    assert memory._available(file) == 40 * 1024
    file.write_text("MemTotal:       100 kB\n")
    assert memory._available(file) is None and memory._available(tmp_path / "none") is None


def test_free_memory_of_a_container(tmp_path: Path) -> None:
    """1000 allowed, 700 used of which 300 are file pages it can drop."""
    for name, text in {
        "max": "1000\n",
        "current": "700\n",
        "stat": "anon 400\ninactive_file 200\nactive_file 100\n",
    }.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory._left_in_group(tmp_path) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._left_in_group(tmp_path) is None and memory._left_in_group(tmp_path / "none") is None


def test_the_smaller_of_the_two_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_available", lambda _: 50)
    monkeypatch.setattr(memory, "_left_in_group", lambda _: 20)
    assert free_memory("cpu") == 20
    monkeypatch.setattr(memory, "_left_in_group", lambda _: None)
    assert free_memory("cpu") == 50
    monkeypatch.setattr(memory, "_available", lambda _: None)
    assert free_memory("cpu") is None


def test_total_memory_is_what_the_machine_has_or_its_group_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_meminfo", lambda path, field: {"MemTotal": 64 * GB}[field])
    monkeypatch.setattr(memory, "_limit", lambda folder, read=memory._limit: read(tmp_path))
    for limit, expected in (("max\n", 64 * GB), (f"{8 * GB}\n", 8 * GB), (f"{80 * GB}\n", 64 * GB)):
        (tmp_path / "memory.max").write_text(limit)
        assert memory.total_memory("cpu") == expected
