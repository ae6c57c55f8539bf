"""Trains the embedded model from generated problems, in two stages:

    python -m dllmq.mini.train --out BASE
    python -m dllmq.mini.train --out FOLDER --stage polish --init BASE

LLaDA's architecture and objective (predict masked tokens from a bidirectional forward); the published folder
format comes out. Runs on 2 CPU cores within two hours, or on a GPU with --device cuda. An interrupted run
continues from its last checkpoint with the same command.

Recipe: Muon on the blocks' matrices, AdamW on embeddings, head and norms; warm-up, constant, linear decay to
zero (WSD); bf16 autocast. The loss is the weighted mean cross-entropy over masked tokens, without the 1/t
factor: it has the same minimiser and less variance.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerFast

from dllmq.mini.tokenizer import build_tokenizer
from dllmq.mini.training_data import Batch, DataConfig, batches
from dllmq.models.llada import LLaDA, LLaDAConfig
from dllmq.models.loading import load_model

log = logging.getLogger("dllmq.mini.train")


@dataclass(frozen=True)
class TrainConfig:
    """A stage of the recipe; `STAGES` made the shipped weights."""

    d_model: int = 256
    n_layers: int = 6
    n_heads: int = 4
    mlp_hidden_size: int = 384
    steps: int = 4800
    warmup: int = 100
    decay: float = 0.35  # share of the steps
    rows: int = 128
    muon_lr: float = 0.008  # 0.02 saturates the attention (logits beyond 200): there is no QK-norm
    adam_lr: float = 2e-3
    muon_weight_decay: float = 0.1
    adam_weight_decay: float = 0.01
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)


STAGES = {
    "base": TrainConfig(),
    # From base's weights: more string programs, whose letters base copies wrongly.
    "polish": TrainConfig(
        steps=900,
        decay=0.7,
        muon_lr=0.004,
        adam_lr=1e-3,
        seed=1,
        data=DataConfig(drill=0.2, code=0.15, strings=0.3),
    ),
}


def model_config(config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> LLaDAConfig:
    """The architecture, with the tokenizer's special ids."""
    return LLaDAConfig(
        d_model=config.d_model,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        n_kv_heads=config.n_heads,
        mlp_hidden_size=config.mlp_hidden_size,
        vocab_size=len(tokenizer),
        embedding_size=len(tokenizer),
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eot_token_id=tokenizer.convert_tokens_to_ids("<|eot_id|>"),
        max_sequence_length=256,
        rope_theta=10000.0,
    )


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Warm-up, constant, linear decay to zero."""
    left = (config.steps - step) / max(1, config.decay * config.steps)
    return min(1.0, (step + 1) / max(1, config.warmup), max(left, 0.0))


def loss_on(model: LLaDA, batch: Batch) -> tuple[Tensor, Tensor]:
    """Weighted mean cross-entropy over the masked tokens, and the share predicted right (of weight >= 1)."""
    x_t = torch.where(batch.masked, model.config.mask_token_id, batch.tokens)
    logits = model.head(model.hidden_states(x_t)[batch.masked]).float()  # [n, E]
    target, weight = batch.tokens[batch.masked], batch.weight[batch.masked]
    loss = (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()
    counted = weight >= 1
    return loss, (logits.argmax(-1) == target)[counted].float().mean()


def optimizers(model: LLaDA, config: TrainConfig) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    rest = [p for name, p in model.named_parameters() if p.dim() != 2 or ".blocks." not in name]
    return [
        torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=config.muon_weight_decay, momentum=0.95),
        torch.optim.AdamW(rest, lr=config.adam_lr, betas=(0.9, 0.98), weight_decay=config.adam_weight_decay),
    ]


def save_published(model: LLaDA, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """config.json, model.safetensors in bf16 and the tokenizer, in the published LLaDA format."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {k: v for k, v in asdict(model.config).items() if v is not None}
    fields |= {"architectures": ["LLaDAModelLM"], "model_type": "llada", "block_type": "llama", "rope": True}
    fields |= {"layer_norm_type": "rms", "activation_type": "silu", "include_bias": False}
    fields |= {"torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    state = {name: p.detach().to(torch.bfloat16).cpu().contiguous() for name, p in model.state_dict().items()}
    part = folder / "model.safetensors.part"
    part.write_bytes(
        save(state, metadata={"format": "pt"})
    )  # save_file's would be readable by its owner only
    os.replace(part, folder / "model.safetensors")
    tokenizer.save_pretrained(folder)


def average_gradients(model: LLaDA, workers: int) -> None:
    """Replaces every gradient by its mean over the workers, in one all-reduce."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    parts = (flat / workers).split([g.numel() for g in gradients])
    for g, mean in zip(gradients, parts, strict=True):
        g.copy_(mean.view_as(g))


def train(
    config: TrainConfig,
    out: Path,
    device: str = "cpu",
    compiled: bool = True,
    every: int = 250,
    rank: int = 0,
    workers: int = 1,
    init: Path | None = None,
) -> LLaDA:
    """Runs a stage; checkpoints to out/checkpoint.pt, the model's folder to `out` at every checkpoint.

    `init` is the folder whose weights it starts from; random weights without.

    With several workers each takes its share of every batch's rows and gradients are averaged.
    """
    torch.manual_seed(config.seed)
    # short rows: plain bf16 attention beats flash on CPU
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    tokenizer = build_tokenizer()
    model = LLaDA(model_config(config, tokenizer))
    model.init_weights(torch.Generator().manual_seed(config.seed))
    if init is not None:
        model.load_state_dict(load_model(init).state_dict())
    model.to(device)
    optims = optimizers(model, config)
    base_lr = [[g["lr"] for g in o.param_groups] for o in optims]
    out.mkdir(parents=True, exist_ok=True)
    state_file, first = out / "checkpoint.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        for optim, kept in zip(optims, state["optims"], strict=True):
            optim.load_state_dict(kept)
        first = state["step"]
    if compiled:
        torch._dynamo.config.recompile_limit = 64  # one graph for each canvas length
        for block in model.blocks:
            block.compile(dynamic=False)
    stream = batches(tokenizer, config.data, config.rows, config.seed, first)
    started, positions = time.monotonic(), 0
    ema: dict[str, float] = {}
    for step in range(first, config.steps):
        batch = next(stream)
        batch = Batch(*(t[rank::workers].to(device) for t in (batch.tokens, batch.masked, batch.weight)))
        for optim, lrs in zip(optims, base_lr, strict=True):
            for group, lr in zip(optim.param_groups, lrs, strict=True):
                group["lr"] = lr * learning_rate_factor(step, config)
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            loss, accuracy = loss_on(model, batch)
        loss.backward()
        if workers > 1:
            average_gradients(model, workers)
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        positions += batch.tokens.numel() * workers
        for name, value in (("loss", loss), ("accuracy", accuracy)):
            now = value.item()
            ema[name] = 0.98 * ema.get(name, now) + 0.02 * now
        if rank == 0 and step % 50 == 49:
            rate = positions / (time.monotonic() - started)
            left = (config.steps - step) * (time.monotonic() - started) / (step + 1 - first) / 60
            log.info(
                "step %d/%d  loss %.4f  accuracy %.4f  %.0f positions/s  %.0f min left",
                step + 1, config.steps, ema["loss"], ema["accuracy"], rate, left,
            )  # fmt: skip
        if rank == 0 and (step % every == every - 1 or step == config.steps - 1):
            part = state_file.with_suffix(".part")
            saved = [optim.state_dict() for optim in optims]
            torch.save({"model": model.state_dict(), "optims": saved, "step": step + 1}, part)
            os.replace(part, state_file)
            save_published(model, tokenizer, out)
    return model


def _worker(
    rank: int, workers: int, port: int, config: TrainConfig, out: Path, compiled: bool, init: Path | None
) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    train(config, out, "cpu", compiled, rank=rank, workers=workers, init=init)
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dllmq.mini.train", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the trained model")
    parser.add_argument("--stage", choices=list(STAGES), default="base")
    parser.add_argument("--init", type=Path, help="folder whose weights to start from (polish: base's)")
    parser.add_argument("--steps", type=int, help="instead of the stage's own")
    parser.add_argument("--seed", type=int, help="instead of the stage's own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2, help="CPU processes, one thread each; not on a GPU")
    parser.add_argument("--eager", action="store_true", help="do not compile the blocks")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    given = {name: value for name in ("steps", "seed") if (value := getattr(arguments, name)) is not None}
    config = replace(STAGES[arguments.stage], **given)
    compiled = not arguments.eager
    if arguments.device != "cpu" or arguments.workers == 1:
        train(config, arguments.out, arguments.device, compiled, init=arguments.init)
        return
    keywords = (arguments.workers, _free_port(), config, arguments.out, compiled, arguments.init)
    torch.multiprocessing.spawn(_worker, args=keywords, nprocs=arguments.workers)


if __name__ == "__main__":
    main()
