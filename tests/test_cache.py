"""Same inputs, one computation: across runs, across processes, and after whatever happens to a disk."""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllmq.cache import Cache, _sha256, load_json, load_tensors, save_json, save_tensors

PARTS = {"weights": "5f3a", "prompts": 4, "sampler": {"steps": 8, "temperature": 0.0}}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def payload(cache: Cache, kind: str = "scores", parts: dict[str, Any] = PARTS) -> Path:
    key = cache.key(kind, parts)
    return cache.folder / kind / key[:2] / key


def ask(cache: Cache, value: Any = 7, load: Callable[[Path], Any] = load_json) -> tuple[Any, bool]:
    return cache.get("scores", PARTS, lambda: value, save_json, load)


def stored(cache: Cache) -> list[str]:
    """Every file of the cache but the (empty) lock files."""
    return sorted(p.name for p in cache.folder.rglob("*") if p.is_file() and p.suffix != ".lock")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# ---------------------------------------------------------------- keys


def test_key_is_that_of_the_same_content_in_any_order() -> None:
    assert Cache.key("scores", {"a": 1, "b": [1, 2]}) == Cache.key("scores", {"b": (1, 2), "a": 1})


def test_key_of_these_parts_does_not_move() -> None:
    # printf '{"format":1,"kind":"scores","parts":{"a":1}}' | sha256sum
    assert Cache.key("scores", {"a": 1}) == "00e46b57dedb98a1dffe3e38b597f3d65361ac70b757a3a30b4cfd200b5e495a"


@pytest.mark.parametrize("other", [{"a": 2}, {"a": 1.0}, {"a": True}, {"a": "1"}, {"a": None}, {"b": 1}, {}])
def test_key_tells_other_parts_apart(other: dict[str, Any]) -> None:
    assert Cache.key("scores", {"a": 1}) != Cache.key("scores", other)


def test_key_tells_kinds_apart() -> None:
    assert Cache.key("scores", PARTS) != Cache.key("states", PARTS)


def test_key_follows_the_format_of_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Cache.key("scores", PARTS)
    monkeypatch.setattr("dllmq.cache.FORMAT", 2)
    assert Cache.key("scores", PARTS) != before


@pytest.mark.parametrize("bad", [float("nan"), Path("x"), torch.float32, {1, 2}, {"a": 1, 2: 2}])
def test_parts_without_a_canonical_form_are_refused_before_anything_is_made(cache: Cache, bad: Any) -> None:
    with pytest.raises(ValueError, match="parts of scores must be JSON"):
        cache.get("scores", {"a": bad}, pytest.fail, save_json, load_json)


@pytest.mark.parametrize("kind", ["", "../up", "a/b", "Scores"])
def test_kind_that_is_no_folder_name_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="lower-case"):
        Cache.key(kind, {})


# ---------------------------------------------------------------- hits and misses


def test_second_request_is_read_and_nothing_is_made(cache: Cache) -> None:
    assert ask(cache, 7) == (7, False)
    assert cache.get("scores", PARTS, pytest.fail, save_json, load_json) == (7, True)


def test_another_cache_object_on_the_folder_reads_it_too(cache: Cache) -> None:
    ask(cache, 7)
    assert ask(Cache(cache.folder), 8) == (7, True)


def test_other_parts_are_another_entry(cache: Cache) -> None:
    ask(cache, 7)
    assert cache.get("scores", PARTS | {"prompts": 5}, lambda: 8, save_json, load_json) == (8, False)


@pytest.mark.parametrize("value", [None, 0, False, [], {}])
def test_values_that_are_false_are_values(cache: Cache, value: Any) -> None:
    ask(cache, value)
    assert ask(cache, "another") == (value, True)


def test_parts_lie_beside_the_payload(cache: Cache) -> None:
    ask(cache, "x" * 10)
    file = payload(cache)
    assert stored(cache) == [file.name, f"{file.name}.json"]
    assert json.loads(file.with_name(f"{file.name}.json").read_text()) == {
        "kind": "scores",
        "parts": PARTS,
        "bytes": 12,
        "sha256": _sha256(file),
    }


def test_whoever_may_read_new_files_may_read_entries(cache: Cache) -> None:
    before = os.umask(0o022)
    try:
        cache.get("states", PARTS, lambda: {"x": torch.ones(1)}, save_tensors, load_tensors)
    finally:
        os.umask(before)
    file = payload(cache, "states")
    assert [f.stat().st_mode & 0o777 for f in (file, file.with_name(f"{file.name}.json"))] == [0o644, 0o644]


def test_entry_may_be_made_from_another_one(cache: Cache) -> None:
    def states() -> int:
        return 1 + cache.get("trajectories", PARTS, lambda: 1, save_json, load_json)[0]

    assert cache.get("states", PARTS, states, save_json, load_json) == (2, False)
    assert cache.get("trajectories", PARTS, pytest.fail, save_json, load_json) == (1, True)


# ---------------------------------------------------------------- damage


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "bit": flip_a_bit,
    "truncated": truncate,
    "empty": lambda file: os.truncate(file, 0),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("suffix", ["", ".json"], ids=["payload", "description"])
def test_damaged_entry_is_told_once_and_made_again(
    cache: Cache, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], suffix: str
) -> None:
    ask(cache, "the value")
    file = payload(cache)
    damage(file.with_name(file.name + suffix))
    assert ask(cache, "made again") == ("made again", False)
    gone = (
        suffix == ".json" and damage is Path.unlink
    )  # without a description there is no entry to be damaged
    assert len(warnings(caplog)) == (0 if gone else 1)
    assert all("is damaged" in line and "computed again" in line for line in warnings(caplog))
    assert ask(cache) == ("made again", True)


def test_entry_that_load_refuses_is_made_again(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    def load(path: Path) -> Any:
        if load_json(path) == "old":
            raise KeyError("tokens")
        return load_json(path)

    ask(cache, "old")
    assert ask(cache, "new", load) == ("new", False)
    assert ask(cache, "other", load) == ("new", True)
    key = cache.key("scores", PARTS)[:12]
    assert warnings(caplog) == [f"cache: scores/{key} is damaged (KeyError: 'tokens') and computed again."]


def test_damaged_entry_whose_value_cannot_be_made_is_gone(cache: Cache) -> None:
    ask(cache, "the value")
    flip_a_bit(payload(cache))
    with pytest.raises(ZeroDivisionError):
        cache.get("scores", PARTS, lambda: 1 // 0, save_json, load_json)
    assert stored(cache) == []


def test_large_files_are_checked_to_the_last_byte_in_little_memory(cache: Cache) -> None:
    size = 257 * 2**20

    def save(value: int, path: Path) -> None:
        with path.open("wb") as file:  # a hole: takes no room on the disk
            file.truncate(size)

    def load(path: Path) -> int:
        return path.stat().st_size

    def request() -> tuple[int, bool]:
        return cache.get("large", PARTS, lambda: size, save, load)

    tracemalloc.start()
    try:
        assert [request(), request()] == [(size, False), (size, True)]
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()
    with payload(cache, "large").open("rb+") as file:
        file.seek(size - 1)
        file.write(b"\1")
    assert request() == (size, False)


# ---------------------------------------------------------------- a cache that cannot be written


def test_folder_that_cannot_be_made_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    assert ask(Cache(tmp_path / "file" / "cache")) == (7, False)
    assert len(warnings(caplog)) == 1
    assert "computed but could not be stored (NotADirectoryError" in warnings(caplog)[0]


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """No write anywhere below folder; root is not stopped by this (`ordinary_user`)."""
    folders = [folder, *(p for p in folder.rglob("*") if p.is_dir())]
    for f in folders:
        f.chmod(0o555)
    try:
        yield
    finally:
        for f in folders:
            f.chmod(0o755)


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Root may write to read-only folders: within the context it is nobody, who may not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_read_only_folder_is_read_and_misses_cost_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    # not tmp_path: its parents belong to root alone where root runs the tests
    with ordinary_user(), tempfile.TemporaryDirectory() as folder:
        read_only_folder_costs_a_warning(Cache(Path(folder) / "cache"), caplog)


def read_only_folder_costs_a_warning(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    ask(cache, 7)
    with read_only(cache.folder):
        assert ask(cache, 8) == (7, True)
        assert warnings(caplog) == []
        assert cache.get("states", PARTS, lambda: 9, save_json, load_json) == (9, False)
        assert len(warnings(caplog)) == 1


def test_disk_that_fills_up_while_saving_costs_a_warning(
    cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    def save(value: Any, path: Path) -> None:
        path.write_bytes(b"the first half")
        with Path("/dev/full").open("wb", buffering=0) as full:
            full.write(b"the second")

    assert cache.get("scores", PARTS, lambda: 7, save, load_json) == (7, False)
    assert stored(cache) == []
    assert len(warnings(caplog)) == 1
    assert "No space left" in warnings(caplog)[0]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_disk_that_fails_after_saving_costs_a_warning(
    cache: Cache, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        assert ask(cache, 7) == (7, False)
    assert stored(cache) == []
    assert len(warnings(caplog)) == 1
    assert ask(cache, 8) == (8, False)


def test_file_system_without_locks_costs_a_warning(
    cache: Cache, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no flock")

    monkeypatch.setattr("dllmq.locks.FileLock.acquire", fail)
    assert ask(cache, 7) == (7, False)
    assert len(warnings(caplog)) == 1
    assert stored(cache) == []


def test_hit_needs_no_lock(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(cache, 7)
    monkeypatch.setattr("dllmq.locks.FileLock.acquire", pytest.fail)
    assert ask(cache, 8) == (7, True)


def test_between_its_two_files_an_entry_does_not_exist(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(source: Path, target: Path) -> None:
        if target.suffix == ".json":
            raise KeyboardInterrupt
        source.rename(target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            ask(cache, 7)
    assert stored(cache) == [payload(cache).name]
    assert ask(cache, 8) == (8, False)
    assert ask(cache, 9) == (8, True)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_make_that_raises_leaves_nothing_and_frees_the_lock(
    cache: Cache, caplog: pytest.LogCaptureFixture, error: type[BaseException]
) -> None:
    def make() -> int:
        raise error("CUDA out of memory")

    with pytest.raises(error, match="CUDA out of memory"):
        cache.get("scores", PARTS, make, save_json, load_json)
    assert stored(cache) == []
    assert warnings(caplog) == []
    assert ask(cache, 8) == (8, False)  # would wait for ever, or raise, if the lock were held


# ---------------------------------------------------------------- several processes

# Says "making" and "saving" (with half a file written) and goes on when it is answered; appends to `made`.
CHILD = """
import json, logging, sys
from pathlib import Path
from dllmq.cache import Cache, load_json, save_json

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
folder, made, name, stops = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:]

def stop(at):
    if at in stops:
        print(at, flush=True)
        sys.stdin.readline()

def make():
    with made.open("a") as file:
        file.write(name)
    stop("making")
    return name

def save(value, path):
    path.write_text('"half')
    stop("saving")
    save_json(value, path)

print("ready", flush=True)
sys.stdin.readline()
print(json.dumps(Cache(folder).get("scores", json.loads(PARTS), make, save, load_json)), flush=True)
"""


class Child:
    """Another process that asks for the entry; `stops` are the points where it waits for `go`."""

    def __init__(self, cache: Cache, made: Path, name: str, *stops: str) -> None:
        program = CHILD.replace("PARTS", repr(json.dumps(PARTS)))
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, str(cache.folder), str(made), name, *stops],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).resolve().parent.parent,
        )  # fmt: skip

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def child(cache: Cache, tmp_path: Path) -> Iterator[Callable[..., Child]]:
    children: list[Child] = []

    def start(*arguments: str) -> Child:
        children.append(Child(cache, tmp_path / "made", *arguments))
        return children[-1]

    yield start
    for c in children:
        c.end()


def test_two_processes_compute_once(cache: Cache, child: Callable[..., Child], tmp_path: Path) -> None:
    first, second = child("a", "making"), child("b")
    assert first.says() == second.says() == "ready"
    first.go()
    assert first.says() == "making"
    second.go()
    assert second.says().endswith("another process is computing it; waiting")
    first.go()
    assert json.loads(first.says()) == ["a", False]
    assert second.says().endswith("read from the cache")
    assert json.loads(second.says()) == ["a", True]
    assert (tmp_path / "made").read_text() == "a"


@pytest.mark.parametrize("point", ["making", "saving"])
def test_killed_process_leaves_no_lock_and_no_partial_file(
    cache: Cache, child: Callable[..., Child], tmp_path: Path, point: str
) -> None:
    first, second = child("a", point), child("b")
    assert first.says() == second.says() == "ready"
    first.go()
    assert first.says() == point
    second.go()
    assert second.says().endswith("waiting")
    first.end()
    assert json.loads(second.says()) == ["b", False]
    file = payload(cache)
    assert stored(cache) == [file.name, f"{file.name}.json"]  # what the first one left is swept
    assert ask(cache, "c") == ("b", True)
    assert (tmp_path / "made").read_text() == "ab"


def test_killed_writer_leaves_nothing_under_a_final_name(cache: Cache, child: Callable[..., Child]) -> None:
    writer = child("a", "saving")
    assert writer.says() == "ready"
    writer.go()
    assert writer.says() == "saving"
    writer.end()
    assert not payload(cache).exists()
    assert [p.parent.suffix for p in cache.folder.rglob("payload")] == [".tmp"]  # the half that was written
    assert ask(cache, 8) == (8, False)


# ---------------------------------------------------------------- save and load

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(value=JSON)
def test_json_comes_back_exactly(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    file = tmp_path_factory.getbasetemp() / "value.json"
    save_json(value, file)
    back = load_json(file)
    assert back == value
    assert repr(back) == repr(value)  # 1 is not 1.0, 0.0 is not -0.0


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_come_back_bit_for_bit(
    tmp_path: Path, generator: torch.Generator, dtype: torch.dtype
) -> None:
    X = torch.randint(0, 256, (4, 48), dtype=torch.uint8, generator=generator)
    X = (X > 127) if dtype == torch.bool else X.view(dtype)  # every bit pattern, NaN among them
    tensors = {"X": X, "row": X[1], "transposed": X.T, "same": X, "scalar": X[0, 0], "none": X[:0]}
    save_tensors(tensors, tmp_path / "tensors")
    back = load_tensors(tmp_path / "tensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (back[name].dtype, back[name].shape) == (dtype, tensor.shape)
        bits, found = (t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, back[name]))
        assert torch.equal(bits, found), name


def test_no_tensors_come_back_as_none(tmp_path: Path) -> None:
    save_tensors({}, tmp_path / "tensors")
    assert load_tensors(tmp_path / "tensors") == {}


def test_loaded_tensors_do_not_need_their_file(tmp_path: Path) -> None:
    file = tmp_path / "tensors"
    save_tensors({"x": torch.arange(1000)}, file)
    x = load_tensors(file)["x"]
    file.write_bytes(b"\0" * file.stat().st_size)  # in place: the same inode
    assert torch.equal(x, torch.arange(1000))


def test_truncated_tensors_are_made_again(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    def request(value: float) -> tuple[float, bool]:
        made, hit = cache.get(
            "states", PARTS, lambda: {"x": torch.full((9,), value)}, save_tensors, load_tensors
        )
        return made["x"][8].item(), hit

    assert [request(1.0), request(2.0)] == [(1.0, False), (1.0, True)]
    truncate(payload(cache, "states"))
    assert [request(3.0), request(4.0)] == [(3.0, False), (3.0, True)]
    assert len(warnings(caplog)) == 1


def test_full_disk_under_safetensors_costs_a_warning(cache: Cache) -> None:
    program = """
import resource, sys
from pathlib import Path
import torch
from dllmq.cache import Cache, load_tensors, save_tensors
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # no file above 4 KiB: writes fail as on a full disk
value, hit = Cache(Path(sys.argv[1])).get(
    "states", {}, lambda: {"x": torch.arange(10000)}, save_tensors, load_tensors
)
print(hit, int(value["x"].sum()))
"""
    command = [sys.executable, "-c", program, str(cache.folder)]
    root = Path(__file__).resolve().parent.parent
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert out.stdout.split() == ["False", "49995000"]
    assert out.stderr.count("could not be stored") == 1
    assert stored(cache) == []
