"""Files that survive a power cut, and what killed writers leave behind."""

import errno
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dllmq.durable
from dllmq.cache import Cache, load_json, save_json
from dllmq.checkpoint.writer import ShardWriter
from dllmq.durable import clean, sync_folder, write_whole
from dllmq.evaluation.answers import AnswerFolder, Batch
from dllmq.report.results import write_json_atomic


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is synced and renamed, in order: ("sync", name of the file or folder), ("rename", new name)."""
    seen: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def syncing(descriptor: int) -> None:
        seen.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def replacing(source: Any, target: Any) -> None:
        seen.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", replacing)
    return seen


# ------------------------------------------------------------------ order


def test_a_record_is_synced_renamed_and_its_folder_synced(tmp_path: Path, calls: list) -> None:
    write_json_atomic(tmp_path / "cell" / "results.json", {"a": 1})
    (what, temporary), *rest = calls
    assert what == "sync" and temporary.startswith(".results.json.") and temporary.endswith(".tmp")
    assert rest == [("rename", "results.json"), ("sync", "cell")]


def test_an_entry_of_the_cache_is_described_last_and_its_folder_synced(tmp_path: Path, calls: list) -> None:
    cache, parts = Cache(tmp_path), {"a": 1}
    cache.get("kind", parts, lambda: 7, save_json, load_json)
    key = Cache.key("kind", parts)
    written = [("sync", "payload"), ("sync", "description")]
    assert calls == [*written, ("rename", key), ("rename", f"{key}.json"), ("sync", key[:2])]


def test_the_configuration_of_a_checkpoint_comes_last(tmp_path: Path, calls: list) -> None:
    with ShardWriter(tmp_path / "model") as writer:
        writer.add("w", torch.ones(2))
        writer.add_text("config.json", "{}")
        writer.finish()
    names = ["model.safetensors", "config.json"]
    assert sorted(calls[:2]) == sorted(("sync", name) for name in names)
    assert calls[2:] == [pair for name in names for pair in (("rename", name), ("sync", "model"))]


def test_a_log_of_answers_is_an_entry_of_its_folder_once(tmp_path: Path, calls: list) -> None:
    log = AnswerFolder(tmp_path / "answers", "k").of("task")
    for index in range(2):
        log.batch("generate", index, 0, lambda: Batch([1]))
    assert calls == [("sync", "task.0.jsonl"), ("sync", "answers"), ("sync", "task.0.jsonl")]


@pytest.mark.parametrize(
    ("code", "raised"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)]
)
def test_a_file_system_may_refuse_to_sync_folders_but_not_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, raised: bool
) -> None:
    def failing(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", failing)
    if raised:
        with pytest.raises(OSError, match="Input/output error"):
            sync_folder(tmp_path)
    else:
        sync_folder(tmp_path)
    sync_folder(tmp_path / "nowhere")


# ------------------------------------------------------------------ leftovers


def _write_until_told(path: Path, begun: Any) -> None:
    """A writer that stands still in the middle."""

    def stand_still(descriptor: int) -> None:
        begun.set()
        signal.pause()

    dllmq.durable.os.fsync = stand_still  # type: ignore[assignment]  # of the process that was forked
    write_whole(path, "new")


def test_only_leftovers_of_dead_writers_are_removed(tmp_path: Path) -> None:
    """One process in the middle of a write, and what it leaves when it is killed."""
    path = write_whole(tmp_path / "baseline.json", "old")
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    writer = context.Process(target=_write_until_told, args=(path, begun))
    writer.start()
    try:
        assert begun.wait(30)
        clean(tmp_path)
        (temporary,) = tmp_path.glob(".*")
        assert temporary.name.startswith(".baseline.json.")
    finally:
        writer.kill()
        writer.join()
    assert temporary.exists()
    clean(tmp_path)
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "old"


@pytest.mark.parametrize("when", ["before it is locked", "before it is renamed"])
def test_a_write_whose_temporary_file_is_taken_away_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """By a `clean` that came between its steps, or on another machine that does not see its locks."""
    own, taken = {"lock": dllmq.durable._lock, "rename": os.replace}, []

    def take(name: str) -> Callable[..., Any]:
        def step(*arguments: Any) -> Any:
            if not taken:
                (temporary,) = tmp_path.glob(".*.tmp")
                temporary.unlink()
                taken.append(temporary.name)
            return own[name](*arguments)

        return step

    if when == "before it is locked":
        monkeypatch.setattr(dllmq.durable, "_lock", take("lock"))
    else:
        monkeypatch.setattr(os, "replace", take("rename"))
    write_whole(tmp_path / "a", "text")
    assert (
        [file.name for file in tmp_path.iterdir()] == ["a"]
        and (tmp_path / "a").read_text() == "text"
        and taken
    )


def test_a_file_system_without_locks_loses_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(dllmq.durable.fcntl, "flock", refuse)
    (tmp_path / ".other.1234.tmp").write_text("somebody's")
    write_whole(tmp_path / "a", "text")
    clean(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [".other.1234.tmp", "a"]
