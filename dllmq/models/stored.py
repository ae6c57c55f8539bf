"""How a quantized checkpoint folder is described: `quantization_config` for everybody, our record beside it.

    config.json                quantization_config: the linears, in the words of compressed-tensors or GPTQ
    dllmq_quantization.json    the same and what those formats have no words for: the attention product's
                               grids and V's static scales, which linears, and how the model was made

Both directions stand here side by side, so that what is written is what is read. A folder without our record
was written by another program; then the linears are all there is. A folder with the record and without
`quantization_config` holds dequantized weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dllmq.numerics import Grid, Params
from dllmq.numerics.layouts import GPTQ_V1, GPTQ_V2, INT, PACKED

RECORD = "dllmq_quantization.json"
DENSE = "dequantized"
_VERSION = 1
_SAME = "take both from the same export"
_READ = (
    "dllmq reads compressed-tensors (pack-quantized, int-quantized) and gptq with integer weights of 2-8 bits"
)


@dataclass(frozen=True)
class Stored:
    """What is quantized in a folder, and how.

    Attributes:
        layout: one of numerics.layouts' names, or "dequantized".
        weights, inputs: grids of the linears; inputs None is full precision.
        linears: dotted names of the quantized linears; None where only the tensors tell.
        P, V, QK: grids of the attention product; values: V's static scale and zero by block, empty without V.
        ordered: groups are not of neighbouring columns.
    """

    layout: str
    weights: Grid
    inputs: Grid | None = None
    linears: tuple[str, ...] | None = None
    P: Grid | None = None
    V: Grid | None = None
    QK: Grid | None = None
    values: tuple[Params, ...] = ()
    ordered: bool = False

    @property
    def has_product(self) -> bool:
        """Whether the attention product is quantized."""
        return any(grid is not None for grid in (self.P, self.V, self.QK))


def read_stored(folder: Path) -> Stored | None:
    """The description of a folder, None where it is in full precision.

    Raises:
        ValueError: a format that is not read, a damaged record, or two descriptions that disagree.
    """
    raw = _json(folder / "config.json")
    config = raw.get("quantization_config")
    if config is None and (folder / "quantize_config.json").is_file():  # GPTQ before it moved to config.json
        config = {"quant_method": "gptq"} | _json(folder / "quantize_config.json")
    record = _json(folder / RECORD)
    if not record:
        return None if config is None else from_config(config)
    stored = from_record(record, folder / RECORD)
    if (config is None) != (stored.layout == DENSE):
        raise ValueError(
            f"{RECORD} says {stored.layout}, but config.json has "
            f"{'no' if config is None else 'a'} quantization_config: {_SAME}."
        )
    if config is not None:
        _check_agreement(stored, from_config(config))
    return stored


def _json(file: Path) -> dict[str, Any]:
    """A JSON object, {} where there is no file; config.json's own damage is told by `read_config`."""
    try:
        value = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        if file.name == "config.json":
            return {}
        raise ValueError(f"{file} is not valid JSON ({error}): copy or download it again.") from error
    if isinstance(value, dict):
        return value
    if file.name == "config.json":
        return {}
    raise ValueError(f"{file} holds no JSON object: copy or download it again.")


def _check_agreement(ours: Stored, theirs: Stored) -> None:
    for name in ("layout", "weights", "inputs"):
        a, b = getattr(ours, name), getattr(theirs, name)
        if a != b:
            raise ValueError(
                f"{RECORD} says {name} = {a}, but config.json's quantization_config {b}: {_SAME}."
            )


# ------------------------------------------------------------------ config.json


def to_config(stored: Stored, head: str, version: str) -> dict[str, Any] | None:
    """`quantization_config`, None for dequantized weights.

    Args:
        head: dotted name of the LM head, which stays in full precision.
        version: ours, for `meta`.
    """
    grid = stored.weights
    if stored.layout == DENSE:
        return None
    if stored.layout in (GPTQ_V1, GPTQ_V2):
        return {
            "quant_method": "gptq",
            "bits": grid.bits,
            "group_size": grid.group_size,
            "sym": grid.symmetric,
            "desc_act": stored.ordered,  # g_idx is always there; readers look at it only where this is true
            "lm_head": False,
            "checkpoint_format": stored.layout,
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"dllmq:{version}"]},
        }
    inputs = stored.inputs
    group = {
        "targets": ["Linear"],
        "format": stored.layout,  # repeated: readers infer another one from the widths otherwise
        "weights": _args(grid, {-1: "channel", 0: "tensor"}, dynamic=False),
        "input_activations": None if inputs is None else _args(inputs, {-1: "token"}, dynamic=True),
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": stored.layout,
        "quantization_status": "compressed",
        "ignore": [head],
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
    }


def _args(grid: Grid, strategies: dict[int, str], dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": strategies.get(grid.group_size, "group"),
        "group_size": grid.group_size if grid.group_size > 0 else None,
        "dynamic": dynamic,
    }


def from_config(config: Any) -> Stored:
    """`quantization_config` of any program.

    Raises:
        ValueError: naming the field and what is read.
    """
    method = config.get("quant_method") if isinstance(config, dict) else None
    try:
        if method == "gptq":
            return _from_gptq(config)
        if method == "compressed-tensors":
            return _from_compressed_tensors(config)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"config.json's quantization_config is incomplete ({error!r}): copy or download it again."
        ) from error
    raise _unread("quant_method", method)


def _unread(field: str, value: Any) -> ValueError:
    return ValueError(f"config.json's quantization_config has {field} = {value!r}; {_READ}.")


def _from_gptq(config: dict[str, Any]) -> Stored:
    layout = config.get("checkpoint_format") or GPTQ_V1
    if layout not in (GPTQ_V1, GPTQ_V2):
        raise _unread("checkpoint_format", layout)
    grid = _grid("bits", config["bits"], config["group_size"], config["sym"])
    return Stored(layout, grid, ordered=bool(config.get("desc_act")))


def _from_compressed_tensors(config: dict[str, Any]) -> Stored:
    groups = list(config["config_groups"].values())
    if len(groups) != 1:
        raise _unread("config_groups", sorted(config["config_groups"]))
    (group,) = groups
    layout = group.get("format") or config.get("format")
    if layout not in (PACKED, INT):
        raise _unread("format", layout)
    for name, value in (
        ("kv_cache_scheme", config.get("kv_cache_scheme")),
        ("output_activations", group.get("output_activations")),
    ):
        if value is not None:
            raise _unread(name, value)
    weights = _from_args("weights", group["weights"], {"channel": -1, "tensor": 0}, dynamic=False)
    if layout == INT and weights.bits != 8:
        raise _unread("format", f"{layout} with {weights.bits} bits")
    inputs = group.get("input_activations")
    if inputs is None:
        return Stored(layout, weights)
    return Stored(layout, weights, _from_args("input_activations", inputs, {"token": -1}, dynamic=True))


def _from_args(name: str, args: dict[str, Any], strategies: dict[str, int], dynamic: bool) -> Grid:
    strategy = args.get("strategy") or ("group" if (args.get("group_size") or -1) > 0 else "channel")
    known = {"type": "int", "dynamic": dynamic}
    for key, wanted in known.items():
        if args.get(key, wanted) != wanted:
            raise _unread(f"{name}.{key}", args[key])
    if strategy not in (*strategies, "group"):
        raise _unread(f"{name}.strategy", strategy)
    size = args["group_size"] if strategy == "group" else strategies[strategy]
    return _grid(f"{name}.num_bits", args["num_bits"], size, args["symmetric"])


def _grid(field: str, bits: Any, group_size: Any, symmetric: Any) -> Grid:
    try:
        return Grid(bits, group_size, symmetric)
    except ValueError as error:
        raise _unread(field, f"{bits} (group_size {group_size}, symmetric {symmetric})") from error


# ------------------------------------------------------------------ dllmq_quantization.json


def to_record(stored: Stored) -> dict[str, Any]:
    """JSON values from which `from_record` makes the same description."""

    def plain(grid: Grid | None) -> dict[str, Any] | None:
        return None if grid is None else asdict(grid)

    return {
        "version": _VERSION,
        "layout": stored.layout,
        "weights": plain(stored.weights),
        "inputs": plain(stored.inputs),
        "attention": {name: plain(getattr(stored, name)) for name in ("P", "V", "QK")},
        "values": [{"scale": _listed(v.scale), "zero": _listed(v.zero)} for v in stored.values],
        "linears": list(stored.linears or ()),
        "ordered": stored.ordered,
    }


def from_record(record: dict[str, Any], file: Path) -> Stored:
    """Raises ValueError: a record that is damaged, or of a later version."""
    version = record.get("version")
    if version != _VERSION:
        raise ValueError(f"{file} has version = {version!r}, this dllmq reads {_VERSION}: update dllmq.")
    try:
        grids = {name: _optional_grid(record["attention"][name]) for name in ("P", "V", "QK")}
        values = tuple(Params(_unlisted(v["scale"]), _unlisted(v["zero"])) for v in record["values"])
        weights = Grid(**record["weights"])
        inputs, linears = _optional_grid(record["inputs"]), tuple(map(str, record["linears"]))
        layout, ordered = str(record["layout"]), bool(record["ordered"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}): export the model again.") from error
    return Stored(layout, weights, inputs, linears, **grids, values=values, ordered=ordered)


def _optional_grid(fields: dict[str, Any] | None) -> Grid | None:
    return None if fields is None else Grid(**fields)


def _listed(x: Float[Tensor, "..."]) -> dict[str, Any]:
    """fp32 values survive as JSON numbers: each is printed with all of its digits."""
    return {"shape": list(x.shape), "values": x.detach().float().cpu().flatten().tolist()}


def _unlisted(listed: dict[str, Any]) -> Float[Tensor, "..."]:
    return torch.tensor(listed["values"], dtype=torch.float32).reshape(listed["shape"])


def stored_values(params: Sequence[Params | None]) -> tuple[Params, ...]:
    """V's parameters of all blocks, empty where V is in full precision."""
    kept = tuple(p for p in params if p is not None)
    assert len(kept) in (0, len(params)), "V is quantized in all blocks or in none"
    return kept
