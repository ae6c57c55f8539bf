"""From a folder in the published format, or a hub id, to a model: config.json, safetensors, no remote code.

Everything that can be wrong is found from config.json and the safetensors headers, before a weight is read.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.overrides import TorchFunctionMode

import dllmq.models as models_package
from dllmq.models.base import shown
from dllmq.models.hub import hub_folder
from dllmq.models.stored import read_stored
from dllmq.models.streaming import TensorFiles, stream_blocks
from dllmq.numerics.layouts import Spec

FULL_PRECISION = ("F32", "F16", "BF16", "F64")
_CONTENTS = "a checkpoint folder holds config.json, *.safetensors and the tokenizer's files"
_SAME = "take config.json and the weights from the same checkpoint"
_AGAIN = "copy or download it again"


def architectures() -> dict[str, tuple[Any, type]]:
    """Name in config.json's `architectures` -> (config class, model class), from all of dllmq.models."""
    table: dict[str, tuple[Any, type]] = {}
    for module in pkgutil.iter_modules(models_package.__path__):
        if module.name == "hf":  # for other programs; it imports transformers' models, which takes seconds
            continue
        table |= getattr(importlib.import_module(f"dllmq.models.{module.name}"), "ARCHITECTURES", {})
    return table


class _NoInit(TorchFunctionMode):
    """torch.nn.init leaves tensors alone: on the meta device it would import torch._dynamo, a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def skeleton(config: Any, model_class: type) -> Any:
    """The model without memory behind its parameters (meta device): names, shapes and topology."""
    with torch.device("meta"), _NoInit():
        return model_class(config)


def is_hub_id(path: str | Path) -> bool:
    """Whether a path that is nothing on this disk has the form owner/name."""
    text = str(path)
    return not Path(text).expanduser().exists() and text.count("/") == 1 and text[0] not in "./~"


def checkpoint_folder(path: str | Path) -> Path:
    """The local folder of a checkpoint; a hub id is downloaded to (or found in) the Hugging Face cache.

    Raises:
        ValueError: neither a folder nor a hub id that can be had.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"model path {path} is a file; {_CONTENTS}.")
    if not is_hub_id(path):
        raise ValueError(f"model path {path} does not exist; {_CONTENTS}. A hub id has the form owner/name.")
    return hub_folder(str(path))


def read_config(folder: Path) -> tuple[Any, type]:
    """The typed config of a checkpoint folder and its model class, told by config.json's `architectures`."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no config.json; {_CONTENTS}.")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise ValueError(f"{file} is not valid JSON ({error}): {_AGAIN}.") from error
    table = architectures()
    names = raw.get("architectures") if isinstance(raw, dict) else None
    for name in names if isinstance(names, list) else []:
        if isinstance(name, str) and name in table:
            config_class, model_class = table[name]
            return config_class.from_dict(raw), model_class
    raise ValueError(
        f"{file} has architectures = {shown(names or None)}; dllmq has {sorted(table)}. The architecture is "
        "told by this list, not by the folder's name."
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: model.safetensors, or the shards its index names.

    Raises:
        ValueError: none there, an index that is damaged, or names a missing file or one outside the folder.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        files = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
        if not files:
            raise ValueError(
                f"{folder} has no *.safetensors file; pickled weights (.bin, .pt) are not read. {_CONTENTS}."
            )
        return files
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is damaged, no weight_map can be read from it ({error!r:.120}): {_AGAIN}."
        ) from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index} names {name!r:.100}; shards must lie in the folder itself.")
        if not name or "\0" in name or not (folder / name).is_file():
            raise ValueError(f"{index} names {name!r:.100}, which is not in {folder}: {_AGAIN}.")
    return [folder / name for name in names]


@dataclass(frozen=True)
class Header:
    """What a safetensors header says of a tensor."""

    shape: tuple[int, ...]
    dtype: str
    file: Path


def tensor_headers(files: list[Path]) -> dict[str, Header]:
    """Every tensor of a checkpoint; no weight is read.

    Raises:
        ValueError: an unreadable file, or a tensor that is in two.
    """
    found: dict[str, Header] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    view = tensors.get_slice(name)
                    if name in found:
                        raise ValueError(
                            f"{shown(name)} is in both {found[name].file.name} and {file.name}: keep one of "
                            "the two."
                        )
                    found[name] = Header(tuple(view.get_shape()), view.get_dtype(), file)
        except SafetensorError as error:
            raise ValueError(
                f"{file} cannot be read as safetensors, it is damaged or cut short ({error}): {_AGAIN}."
            ) from error
    return found


def check_tensors(files: list[Path], expected: dict[str, torch.Size]) -> dict[str, Path]:
    """Where each tensor is, after comparing names, shapes and types with what the config implies.

    Raises:
        ValueError: an unreadable file, a tensor that is missing, extra, mis-shaped, doubled or not floating
            point.
    """
    headers = tensor_headers(files)
    check_headers(headers, {name: Spec(tuple(shape), FULL_PRECISION) for name, shape in expected.items()})
    return {name: header.file for name, header in headers.items()}


def check_headers(headers: dict[str, Header], expected: dict[str, Spec]) -> None:
    """Compares headers with what the config implies.

    Raises:
        ValueError: a tensor that is missing, extra, or of another shape or type.
    """
    for name, header in headers.items():
        if name not in expected:
            raise ValueError(
                f"{header.file.name} has the tensor {shown(name)}, which its config.json does not imply: "
                f"{_SAME}."
            )
        _check_header(name, header, expected[name])
    missing = sorted(expected.keys() - headers.keys())
    if missing:
        some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ValueError(f"the checkpoint lacks {some}, which its config.json implies: {_SAME}.")


def _check_header(name: str, header: Header, spec: Spec) -> None:
    if header.shape != spec.shape:
        raise ValueError(
            f"{name} in {header.file.name} has shape {header.shape}; config.json implies "
            f"{spec.shape}: {_SAME}."
        )
    if header.dtype not in spec.types:
        wanted = f"config.json implies {' or '.join(spec.types)}: {_SAME}."
        if spec.types == FULL_PRECISION:
            wanted = (
                "full-precision weights are F32, F16 or BF16: quantize from the full-precision checkpoint."
            )
        raise ValueError(f"{name} in {header.file.name} has type {header.dtype}; {wanted}")


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    stream: bool = False,
) -> Any:
    """Loads a model for inference: in full precision, or as it was quantized (`quantized_loading`).

    Args:
        path: folder in the published format or a quantized one, or a hub id.
        device: where the weights go.
        dtype: of weights and computation; stored weights are cast.
        stream: blocks are read from the files when the model runs through them, one in memory at a time
            (models/streaming.py); a quantized folder's linears keep their packed codes alone. The same
            numbers, slower.

    Returns:
        A `MaskPredictor` in eval mode, without gradients.

    Raises:
        ValueError: anything wrong with path, config or tensors, in one sentence.
    """
    folder = checkpoint_folder(path)
    config, model_class = read_config(folder)
    stored = read_stored(folder)
    if stored is not None:
        from dllmq.models.quantized_loading import load_stored

        return load_stored(folder, stored, device, dtype, compact=stream)
    files = weight_files(folder)
    model = skeleton(config, model_class)
    shapes = {name: p.shape for name, p in model.state_dict().items()}
    tensors = TensorFiles(check_tensors(files, shapes), shapes, torch.device(device), dtype)
    if stream:
        stream_blocks(model, tensors)
    else:
        model.load_state_dict({name: tensors.read(name) for name in shapes}, strict=True, assign=True)
    return model.requires_grad_(False).eval()
