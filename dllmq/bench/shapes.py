"""The models that are measured, made in memory.

    mini             the embedded model (3.6 M parameters), trained; float32
    llada_1b_shape   random weights after the 1B model of LLaDA's scaling study (arXiv 2502.09992, appendix):
                     d 2048, 22 blocks, 32 heads with 4 for keys and values, vocabulary 126,464; an MLP of
                     5632 for its 5634, which no group size divides. 1.49 B parameters, 0.52 B of them in
                     embedding and head
    llada_8b_shape   random weights of LLaDA-8B's sizes: 8.02 B parameters; on a GPU only
    tiny             random weights of a toy, to try the bench out: no measurement

Time and memory do not depend on a weight's value, tokens do: with random weights every confidence is about
1 / vocabulary, so nothing that decides by confidence (a threshold) is measured on them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dllmq.mini
from dllmq.diffusion import SamplerConfig
from dllmq.models.llada import LLaDA, LLaDAConfig
from dllmq.models.loading import load_model, read_config, skeleton
from dllmq.models.memory import free_memory, in_bytes

EMBEDDED = Path(dllmq.mini.__file__).parent / "weights"
_PUBLISHED: dict[str, Any] = dict(vocab_size=126464, mask_token_id=126336, eos_token_id=126081)
CONFIGS = {
    "tiny": LLaDAConfig(
        d_model=64, n_layers=2, n_heads=4, mlp_hidden_size=128, vocab_size=512, mask_token_id=511,
        eos_token_id=510, eot_token_id=509,
    ),
    "llada_1b_shape": LLaDAConfig(
        d_model=2048, n_layers=22, n_heads=32, n_kv_heads=4, mlp_hidden_size=5632, eot_token_id=126348,
        **_PUBLISHED,
    ),
    "llada_8b_shape": LLaDAConfig(
        d_model=4096, n_layers=32, n_heads=32, mlp_hidden_size=12288, eot_token_id=126348, **_PUBLISHED
    ),
}  # fmt: skip
SHAPES = ("mini", *CONFIGS)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROOM = 2.2  # of a shape's weights that a section holds at once: the model, and a quantized one with its codes


@dataclass(frozen=True)
class Setup:
    """What a section is told.

    Attributes:
        shape: of SHAPES; dtype: of the full-precision model.
        repeats: rounds of every comparison.
        quick: toy sizes, to see that everything works; its numbers say nothing.
    """

    shape: str
    device: torch.device
    dtype: torch.dtype
    repeats: int
    quick: bool = False

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def default_dtype(shape: str) -> str:
    """float32 for the embedded model (it is small) and the toy, bfloat16 otherwise."""
    return "float32" if shape in ("mini", "tiny") else "bfloat16"


def config_of(shape: str) -> LLaDAConfig:
    return read_config(EMBEDDED)[0] if shape == "mini" else CONFIGS[shape]


def parameters(shape: str) -> int:
    return sum(p.numel() for p in skeleton(config_of(shape), LLaDA).parameters())


def check_room(shape: str, device: torch.device, dtype: torch.dtype, room: float = ROOM) -> None:
    """Whether the machine can hold the shape.

    Args:
        room: multiples of the weights that are needed.

    Raises:
        ValueError: one sentence.
    """
    if shape == "llada_8b_shape" and device.type != "cuda":
        raise ValueError(
            "llada_8b_shape is measured on a CUDA device, and this run is on the CPU: use "
            "--shape llada_1b_shape, or a machine with a GPU."
        )
    needed, free = parameters(shape) * dtype.itemsize * room, free_memory(str(device))
    if free is not None and needed > free:
        raise ValueError(
            f"{shape} needs about {in_bytes(needed)} ({room:g} times its weights in "
            f"{str(dtype).removeprefix('torch.')}), but {device} has {in_bytes(free)} free: use a smaller "
            "--shape, or a larger machine."
        )


def build(
    shape: str, device: torch.device, dtype: torch.dtype, blocks: int | None = None, seed: int = 0
) -> Any:
    """The model, in eval mode; `blocks` makes a random one of another depth."""
    if shape == "mini":
        return load_model(EMBEDDED, device, dtype)
    config = config_of(shape)
    config = config if blocks is None else replace(config, n_layers=blocks)
    model = skeleton(config, LLaDA).to(dtype).to_empty(device=device)
    model.init_weights(torch.Generator(device).manual_seed(seed))
    return model.requires_grad_(False).eval()


@dataclass(frozen=True)
class Work:
    """What generation is measured on: left-padded prompts and the sampler's settings."""

    prompts: Tensor
    mask: Tensor | None
    sampler: SamplerConfig

    @property
    def name(self) -> str:
        s, lengths = self.sampler, self.prompts.shape[1]
        shortest = lengths if self.mask is None else int(self.mask.sum(1).min())
        span = f"{lengths}" if shortest == lengths else f"{shortest} - {lengths}"
        return f"batch {len(self.prompts)}, prompts of {span}, {s.gen_length} tokens in {s.steps} steps"


def sampler_of(setup: Setup) -> SamplerConfig:
    """Settings a shape is measured at: mini_gsm's own, shorter canvases for random weights on a CPU."""
    if setup.quick:
        return SamplerConfig(gen_length=8, steps=8, block_length=4)
    if setup.shape == "mini":
        return SamplerConfig(gen_length=48, steps=48, block_length=16)
    if setup.device.type == "cuda":
        return SamplerConfig(gen_length=32, steps=32, block_length=16)
    return SamplerConfig(gen_length=16, steps=16, block_length=8)


def batch_sizes(setup: Setup) -> tuple[int, ...]:
    if setup.quick:
        return (2,)
    return (1, 16) if setup.device.type == "cuda" else (1, 8)


def work(setup: Setup, batch: int) -> Work:
    """Problems of mini_gsm for the embedded model, random tokens of unequal lengths otherwise."""
    prompts = _problems(batch) if setup.shape == "mini" else _random_prompts(setup, batch)
    width = max(map(len, prompts))
    pad = config_of(setup.shape).eos_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    same = all(len(p) == width for p in prompts)
    to = setup.device
    return Work(ids.to(to), None if same else mask.to(to), sampler_of(setup))


def _random_prompts(setup: Setup, batch: int) -> list[list[int]]:
    rng = torch.Generator().manual_seed(1)
    most = 12 if setup.quick else 64 if setup.device.type == "cuda" else 32
    lengths = [most - i % (1 + most // 4) for i in range(batch)]
    high = config_of(setup.shape).vocab_size - 500  # special tokens are the last ones
    return [torch.randint(0, high, (n,), generator=rng).tolist() for n in lengths]


def _problems(count: int) -> list[list[int]]:
    from dllmq.mini.tasks import problems
    from dllmq.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(EMBEDDED)
    texts = [f"Question: {doc['question']}\nAnswer:" for doc in problems("mini_gsm", "dev", count)]
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def device_of(text: str) -> torch.device:
    """The device that --device names.

    Raises:
        ValueError: no such device here.
    """
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if text == "cpu":
        return torch.device("cpu")
    kind, colon, index = text.partition(":")
    if kind != "cuda" or (colon and not (index.isascii() and index.isdigit())):
        raise ValueError(f"unknown --device {text!r}: use auto, cpu, cuda or cuda:<index>.")
    if not torch.cuda.is_available():
        raise ValueError(f"--device {text}: torch sees no CUDA device here; use --device cpu.")
    if colon and int(index) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {text}: torch sees {torch.cuda.device_count()} CUDA device(s) here, counted from 0."
        )
    return torch.device(text)
