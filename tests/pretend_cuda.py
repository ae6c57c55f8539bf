"""A pretended CUDA device: every GPU path runs, with real values, on the CPU.

    python tests/pretend_cuda.py <module> <words>       as python -m <module> <words>, where torch sees a GPU

Tensors of device cuda:0 are torch's own, over memory of the host (pretend_cuda.cpp); torch.cuda's functions,
streams, events and graphs are stand-ins; Triton's kernels run in its interpreter.

What it shows, because it fails as a GPU does:

- tensors of two devices in one operation, a CPU generator for numbers on the device;
- what a recording forbids (`.item()`, sizes that depend on values, copies from and to the host,
  synchronising);
- what a recording does not do: it runs nothing, so nothing outside it is written and its results hold garbage
  until a replay; a replay knows addresses, not tensors: memory that was given back, or replaced instead of
  filled, gives an error or wrong numbers; between replays the graphs of a pool overwrite each other;
- how often the host waits for the device (`counts`), and running out of memory where a test says so.

What it cannot show: speed, a device's own rounding (Triton's interpreter cuts bf16 off where a GPU rounds, so
the bench calls bf16 outputs of packed linears unequal here), races between streams, whether a kernel compiles
and fits the GPU, gradients. A wrong guess about CUDA in this file is a wrong test.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

SOURCE = Path(__file__).with_suffix(".cpp")
MEMORY = 2**34
device: Any = None  # the extension, once `install` has run


class Counts(NamedTuple):
    """Of the device: how often the host waited for it, copies from and to the host, allocations."""

    syncs: int
    to_device: int
    to_host: int
    allocations: int


def why_not() -> str | None:
    """Why there is no pretended device here."""
    if sys.platform != "linux":
        return "the pretended CUDA device needs Linux"
    if torch.cuda.is_available():
        return "there is a real CUDA device"
    if not shutil.which("g++"):
        return "no C++ compiler (g++) to build the pretended CUDA device with"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "no Python.h (python3-dev) to build the pretended CUDA device with"
    return None


def build() -> Path:
    """The extension, built once for each version of torch and of the source; half a minute."""
    key = hashlib.sha256(SOURCE.read_bytes() + f"{torch.__version__} {sys.version}".encode()).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"dllmq-pretended-cuda-{os.getuid()}-{key}" / "_pretended.so"
    if target.exists():
        return target
    from torch.utils.cpp_extension import include_paths, library_paths

    target.parent.mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        headers = [*include_paths(), sysconfig.get_paths()["include"]]
        words = [
            "g++",
            "-O0",
            "-std=c++20",
            "-shared",
            "-fPIC",
            "-DTORCH_EXTENSION_NAME=_pretended",
            str(SOURCE),
        ]
        words += [word for path in headers for word in ("-isystem", path)]
        words += [flag + path for path in library_paths() for flag in ("-L", "-Wl,-rpath,")]
        words += ["-ltorch", "-ltorch_cpu", "-lc10", "-ltorch_python", "-o", str(made)]
        subprocess.run(words, check=True)
        made.replace(target)
    return target


def counts() -> Counts:
    return Counts(*device.counts())


@contextmanager
def memory_runs_out_after(allocations: int) -> Iterator[None]:
    """The allocation after so many, and all that follow inside, fail as the device's."""
    device.fail_at(counts().allocations + allocations + 1)
    try:
        yield
    finally:
        device.fail_at(-1)


# ---- streams and events ---------------------------------------------------------------------------------


class Stream:
    """Everything has happened already; only who is current is known."""

    _ids = itertools.count()

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.stream_id, self.device, self.device_index, self.device_type = (
            next(self._ids),
            torch.device("cuda", 0),
            0,
            1,
        )

    def wait_stream(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, Event)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        device.synchronize("Stream.synchronize")


class Event:
    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False
    ) -> None:
        self.timed, self.recorded = enable_timing, False

    def record(self, stream: Stream | None = None) -> None:
        self.recorded = True

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        device.synchronize("Event.synchronize")

    def elapsed_time(self, end: Event) -> float:
        assert self.timed and end.timed and self.recorded and end.recorded, "events without times"
        return 1.0


_current = [Stream()]
_default = _current[0]


def _set_stream(stream: Stream) -> None:
    assert isinstance(stream, Stream)
    _current[0] = stream


# ---- graphs ---------------------------------------------------------------------------------------------


class Outside(NamedTuple):
    """Memory that a graph did not allocate: its address, and whether it is still anybody's."""

    address: int
    like: Tensor  # meta: dtype, shape and strides
    storage: StorageWeakRef

    def tensor(self) -> Tensor:
        if self.storage.expired():
            raise RuntimeError(
                "CUDA error: an illegal memory access: a graph reads memory that was given back"
            )
        return device.at_address(self.like, self.address)


class Tape(TorchDispatchMode):
    """Writes down what is launched. Results that the graph allocates are kept; of all else, the address."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Callable[..., Any], Any, Any, list[Any]]] = []
        self.own: dict[int, Tensor] = {}  # by storage
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # what lay outside, where it was written

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Of no use here, and its import takes seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value, argument in zip(args, func._schema.arguments, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.save(value)
        self.save([kwargs[a.name] for a in func._schema.arguments if a.is_out and a.name in kwargs])
        out = func(*args, **kwargs)
        if not any(_on_device(x) for x in tree_leaves((args, kwargs, out))):
            return out  # on the host; a replay knows nothing of it
        known = {_storage(x) for x in tree_leaves((args, kwargs)) if _on_device(x)}
        fresh = [x for x in tree_leaves(out) if _on_device(x) and _storage(x) not in known]
        written = tree_map(self.written, (args, kwargs))
        self.own |= {_storage(x): x for x in fresh}
        results = [x if _on_device(x) and _storage(x) in self.own else None for x in tree_leaves(out)]
        self.steps.append((func, *written, results))
        return out

    def launch(self, run: Callable[..., None], args: Any, kwargs: Any) -> None:
        self.save(list(tree_leaves((args, kwargs))))
        self.steps.append((run, *tree_map(self.written, (args, kwargs)), []))
        run(*args, **kwargs)

    def written(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if not x.is_cuda:
            return x.clone()
        if _storage(x) in self.own:
            return x.detach()
        like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        return Outside(x.data_ptr(), like, StorageWeakRef(x.untyped_storage()))

    def save(self, values: Any) -> None:
        for x in tree_leaves(values):
            if _on_device(x) and _storage(x) not in self.own and (x.data_ptr(), x.numel()) not in self.before:
                self.before[x.data_ptr(), x.numel()] = x.detach(), device.host(x).clone()


def _on_device(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_cuda


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _spoil(x: Tensor) -> None:
    """NaN, or a number that is no index, in the memory of a tensor."""
    x = device.host(x.detach())
    if x.is_floating_point():
        x.fill_(float("nan"))
    else:
        x.fill_(True if x.dtype == torch.bool else torch.iinfo(x.dtype).max // 2)


class CUDAGraph:
    """What `torch.cuda.graph` fills; all graphs count as of one pool."""

    recording: Tape | None = None
    made: ClassVar[list[Any]] = []  # weak references
    replays = 0

    def __init__(self, keep_graph: bool = False) -> None:
        self.tape: Tape | None = None

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global", **_: Any) -> None:
        if _current[0] is _default:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        assert CUDAGraph.recording is None and self.tape is None, "a recording inside a recording"
        assert pool is None or pool == POOL, f"{pool} is no pool"
        assert capture_error_mode in ("global", "thread_local", "relaxed")
        self.tape = CUDAGraph.recording = Tape()
        device.capture(True)
        self.tape.__enter__()

    def capture_end(self) -> None:
        """Nothing has run: what lay outside is as before, what was made is garbage."""
        assert self.tape is not None
        self.tape.__exit__(None, None, None)
        CUDAGraph.recording = None
        device.capture(False)
        for x, was in reversed(self.tape.before.values()):
            device.host(x).copy_(was)
        self.tape.before.clear()
        self.spoil()
        CUDAGraph.made.append(weakref.ref(self))

    def spoil(self) -> None:
        assert self.tape is not None
        for x in self.tape.own.values():
            _spoil(x)

    def replay(self) -> None:
        if self.tape is None or CUDAGraph.recording is not None:
            raise RuntimeError(
                "called CUDAGraph::replay without a preceding successful capture, or inside one."
            )
        CUDAGraph.replays += 1
        for graph in [made() for made in CUDAGraph.made]:
            if graph is not None:
                graph.spoil()
        for run, args, kwargs, results in self.tape.steps:
            args, kwargs = tree_map(_read, (args, kwargs), is_leaf=lambda x: isinstance(x, Outside))
            for new, own in zip(tree_leaves(run(*args, **kwargs)), results, strict=False):
                if own is not None and new.data_ptr() != own.data_ptr():
                    device.host(own).copy_(device.host(new))

    def reset(self) -> None:
        self.tape = None

    def pool(self) -> Any:
        return POOL


POOL = (0, 1)


def _read(x: Any) -> Any:
    return x.tensor() if isinstance(x, Outside) else x


# ---- Triton ---------------------------------------------------------------------------------------------


def _launches() -> None:
    """Kernels in Triton's interpreter read and write the device's memory in place."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and not x.is_cuda:
                raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")

        def run(*args: Any, **kwargs: Any) -> None:
            args, kwargs = tree_map(lambda x: device.host(x) if isinstance(x, Tensor) else x, (args, kwargs))
            launch(self, *args, **kwargs)

        if CUDAGraph.recording is not None:
            CUDAGraph.recording.launch(run, args, kwargs)
        else:
            run(*args, **kwargs)

    GridExecutor.__call__ = call  # type: ignore[method-assign]


# ---- torch.cuda -----------------------------------------------------------------------------------------


def _index(given: Any = None) -> int:
    """The index of the device that is meant; there is one."""
    if given is None or isinstance(given, int):
        index = given or 0
    else:
        meant = torch.device(given)
        if meant.type != "cuda":
            raise ValueError(f"Expected a cuda device, but got: {meant}")
        index = meant.index or 0
    if index > 0:
        raise RuntimeError("CUDA error: invalid device ordinal")
    return index


def _properties(given: Any = None) -> Any:
    _index(given)
    return SimpleNamespace(
        name="NVIDIA H200 (pretended)", major=9, minor=0, total_memory=MEMORY, multi_processor_count=132,
        shared_memory_per_block_optin=232448, L2_cache_size=2**26, warp_size=32,
    )  # fmt: skip


def _of(value: Callable[[], Any]) -> Callable[..., Any]:
    """A function of a device."""

    def read(device: Any = None) -> Any:
        _index(device)
        return value()

    return read


def _stand_ins() -> dict[str, Any]:
    """Of torch.cuda, by name."""
    nothing = lambda *_, **__: None  # noqa: E731
    return {
        "_initialized": True,
        "_lazy_init": nothing,
        "init": nothing,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_compiled": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
        "set_device": _of(lambda: None),
        "get_device_name": lambda device=None: _properties(device).name,
        "get_device_capability": _of(lambda: (9, 0)),
        "get_device_properties": _properties,
        "mem_get_info": _of(lambda: (MEMORY - device.allocated(), MEMORY)),
        "memory_allocated": _of(lambda: device.allocated()),
        "memory_reserved": _of(lambda: device.allocated()),
        "max_memory_allocated": _of(lambda: device.peak()),
        "max_memory_reserved": _of(lambda: device.peak()),
        "reset_peak_memory_stats": _of(lambda: device.reset_peak()),
        "empty_cache": nothing,
        "ipc_collect": nothing,
        "synchronize": _of(lambda: device.synchronize("torch.cuda.synchronize")),
        "is_bf16_supported": lambda including_emulation=True: True,
        "current_stream": _of(lambda: _current[0]),
        "default_stream": _of(lambda: _default),
        "set_stream": _set_stream,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "is_current_stream_capturing": lambda: device.capturing(),
        "graph_pool_handle": lambda: POOL,
        "manual_seed": nothing,
        "manual_seed_all": nothing,
        "_is_in_bad_fork": lambda: False,
    }


def install() -> None:
    """From here on torch has a CUDA device, in this process, for good.

    Raises:
        RuntimeError: it cannot be had here.
    """
    global device
    if device is not None:
        return
    if (reason := why_not()) is not None:
        raise RuntimeError(reason)
    os.environ["TRITON_INTERPRET"] = "1"
    spec = importlib.util.spec_from_file_location("_pretended", build())
    assert spec is not None and spec.loader is not None
    device = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(device)
    for name, value in _stand_ins().items():
        assert hasattr(torch.cuda, name), f"torch.cuda has no {name}"
        setattr(torch.cuda, name, value)
    torch.cuda.graphs.CUDAGraph = CUDAGraph  # type: ignore[misc]
    torch._C._host_emptyCache = lambda: None  # type: ignore[attr-defined]
    torch.version.cuda = "pretended"
    if importlib.util.find_spec("triton") is not None:
        _launches()


if __name__ == "__main__":
    install()
    sys.modules["pretend_cuda"] = sys.modules["__main__"]
    sys.argv = sys.argv[1:]
    sys.path[0] = os.getcwd()
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
