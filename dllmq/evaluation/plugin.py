"""`dllmq` as a model of lm-eval's own command line.

    lm_eval run --model dllmq --model_args pretrained=<folder>,gen_length=256,block_length=32 --tasks gsm8k

The package declares the entry point `dllmq` in the group `lm_eval.models`, from which lm-eval resolves
`--model` in versions after 0.4.13. Versions up to 0.4.13 know only the models of their own source tree; for
these an install brings dllmq_lm_eval.pth, which adds the name to lm-eval's registry when it is filled. In a
Python that reads no .pth files (a checkout on PYTHONPATH that was never installed) the same command is

    python -m dllmq.evaluation.plugin run --model dllmq ...

Every argument of --model_args is a field of `Arguments`. One that is given there wins over --batch_size and
--device; where there is no CUDA device the latter, whose default is cuda:0, gives way to the CPU. With
--apply_chat_template the prompts are wrapped in the tokenizer's chat template.
"""

from __future__ import annotations

import difflib
import logging
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import lm_eval.models  # noqa: F401  (fills the registry, which a model registered first would leave empty)
import torch
from lm_eval.api.registry import MODEL_REGISTRY, register_model
from lm_eval.utils import simple_parse_args_string

from dllmq import __version__
from dllmq.diffusion import SamplerConfig, check_sampler
from dllmq.evaluation.harness import DiffusionLM
from dllmq.evaluation.settings import EvalSettings
from dllmq.models.loading import checkpoint_folder, load_model, read_config
from dllmq.models.tokenizer import load_tokenizer

log = logging.getLogger(__name__)
NAME = "dllmq"
DTYPES = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_KINDS = {"str": (str,), "int": (int,), "float": (int, float), "int | str": (int, str)}


class Refused(SystemExit, ValueError):
    """A ValueError; a program that does not catch it ends with its sentence alone, without a traceback."""


@dataclass(frozen=True)
class Arguments:
    """What --model_args takes; None of an optional one: what the text says.

    Attributes:
        pretrained: checkpoint folder or hub id.
        device: auto (CUDA where there is one) | cpu | cuda | cuda:<n>.
        dtype: auto and bfloat16 (as published results) | float32.
        batch_size: prompts denoised together; auto: max_batch_size, or without it by the device's memory and
            the longest prompt, as eval.batch_size=auto (nothing is probed: a batch's size is part of a
            result's identity). lm-eval's own default is 1.
        gen_length, steps, block_length: of the sampler; steps and block_length: gen_length.
        temperature, cfg_scale, remasking, alg_temp, top_p, top_k, eps, logits_eos_inf,
            confidence_eos_eot_inf, cache and threshold: of dllmq.diffusion.SamplerConfig. remasking:
            low_confidence, or entropy with Dream.
        eos_cut: first (an answer ends at its first EOS or EoT) | none (ML-GSAI's harness).
        mc_num: Monte-Carlo samples per likelihood.
        mc_batch_size: strata per Monte-Carlo batch; the largest of 8, 4, 2, 1 that divides mc_num.
        rows_per_forward: masked copies in one forward of the likelihood.
        add_bos: start prompts with the tokenizer's BOS, as Dream's authors do with Dream-Base (not together
            with --apply_chat_template, which brings its own).
        max_length: tokens a canvas may have; what config.json says.
        seed: of the sampler's noise and the likelihood's masks. threads: of the CPU; torch's choice.
    """

    pretrained: str
    device: str | None = None
    dtype: str = "auto"
    batch_size: int | str = 1
    max_batch_size: int | None = None
    gen_length: int = 256
    steps: int | None = None
    block_length: int | None = None
    temperature: float = 0.0
    cfg_scale: float = 0.0
    remasking: str | None = None
    alg_temp: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    eps: float = 1e-3
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    cache: str = "none"
    threshold: float | None = None
    eos_cut: str = "first"
    mc_num: int = 128
    mc_batch_size: int | None = None
    rows_per_forward: int = 64
    add_bos: bool = False
    max_length: int | None = None
    seed: int = 0
    threads: int | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Arguments:
        """Checks names and types.

        Raises:
            ValueError: an unknown name, a wrong type, or no `pretrained`.
        """
        kinds = {f.name: str(f.type) for f in fields(cls)}
        for name, value in values.items():
            if name not in kinds:
                close = difflib.get_close_matches(str(name), kinds, n=1)
                hint = f" Did you mean {close[0]}?" if close else ""
                raise ValueError(f"model_args: there is no {name}.{hint} Known: {', '.join(kinds)}.")
            _check_type(name, value, kinds[name])
        if not values.get("pretrained"):
            raise ValueError("model_args: pretrained=<checkpoint folder or hub id> is needed.")
        return cls(**values)

    def batch(self) -> int | str:
        """Prompts denoised together, or auto (batches.py)."""
        if isinstance(self.batch_size, int):
            return self.batch_size
        if self.batch_size.isdigit():
            return int(self.batch_size)
        if self.batch_size.partition(":")[0] != "auto":
            raise ValueError(f"batch_size={self.batch_size} is not known; it is an integer >= 1, or auto.")
        return self.max_batch_size or "auto"

    def settings(self, model_config: Any) -> EvalSettings:
        """How requests are answered by a model with this config; checked against it."""
        dream = bool(getattr(model_config, "shifted_logits", False))
        sampler = SamplerConfig(
            gen_length=self.gen_length,
            steps=self.gen_length if self.steps is None else self.steps,
            block_length=self.gen_length if self.block_length is None else self.block_length,
            temperature=self.temperature,
            cfg_scale=self.cfg_scale,
            remasking=self.remasking or ("entropy" if dream else "low_confidence"),
            alg_temp=self.alg_temp,
            top_p=self.top_p,
            top_k=self.top_k,
            eps=self.eps,
            logits_eos_inf=self.logits_eos_inf,
            confidence_eos_eot_inf=self.confidence_eos_eot_inf,
            cache=self.cache,
            threshold=self.threshold,
        )
        check_sampler(model_config, sampler)
        return EvalSettings(
            sampler,
            batch_size=self.batch(),
            eos_cut=self.eos_cut,
            mc_num=self.mc_num,
            mc_batch_size=math.gcd(self.mc_num, 8) if self.mc_batch_size is None else self.mc_batch_size,
            rows_per_forward=self.rows_per_forward,
            seed=self.seed,
            add_bos=self.add_bos,
            max_length=self.max_length or getattr(model_config, "max_sequence_length", None),
        )


def _check_type(name: str, value: Any, kind: str) -> None:
    optional, plain = kind.endswith(" | None"), kind.removesuffix(" | None")
    if value is None and optional:
        return
    good = isinstance(value, bool) if plain == "bool" else isinstance(value, _KINDS[plain])
    if not good or (isinstance(value, bool) and plain != "bool"):
        raise ValueError(f"model_args: {name}={value} has the wrong type; it must be {plain}.")


class DllmqLM(DiffusionLM):
    """A checkpoint as lm-eval sees it."""

    def __init__(self, arguments: Arguments) -> None:
        """Loads the checkpoint; everything that can be wrong is found before its weights are read.

        Raises:
            ValueError: one sentence.
        """
        if arguments.dtype not in DTYPES:
            raise ValueError(f"dtype={arguments.dtype} is not known; use {', '.join(DTYPES)}.")
        device = _device(arguments.device)
        folder = checkpoint_folder(arguments.pretrained)
        settings = arguments.settings(read_config(folder)[0])
        if arguments.threads is not None:
            if arguments.threads < 1:
                raise ValueError(f"threads={arguments.threads} is too small; it must be at least 1.")
            torch.set_num_threads(arguments.threads)
        tokenizer = load_tokenizer(folder)
        if arguments.add_bos and tokenizer.bos_token_id is None:
            raise ValueError("add_bos=true, but the tokenizer has no BOS token: leave it out.")
        super().__init__(load_model(folder, device, DTYPES[arguments.dtype]), tokenizer, settings)
        self.arguments = arguments

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> DllmqLM:
        """The model of "name=value,name=value"; called by lm-eval."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> DllmqLM:
        """The model of these arguments; `additional_config` is what lm-eval's own options say of it."""
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if str(options.get("device")).startswith("cuda") and not torch.cuda.is_available():
            log.warning("device %s is not here (it is lm-eval's default): CPU", options.pop("device"))
        try:
            return cls(Arguments.of(options | arg_dict))
        except ValueError as error:
            raise Refused(f"dllmq: {error}") from error

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into `config` of its results."""
        return {"dllmq_version": __version__, "dllmq_settings": asdict(self.settings),
                "model_dtype": str(DTYPES[self.arguments.dtype])}  # fmt: skip


def _device(name: str | None) -> str:
    if name in (None, "auto"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = str(name).partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise ValueError(f"device={name} is not known; it is auto, cpu, cuda or cuda:<n>.")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={name}, but torch sees {torch.cuda.device_count()} CUDA devices here.")
    return str(name)


def register() -> None:
    """Makes the name `dllmq` known to lm-eval, unless it has found it by the entry point."""
    if NAME not in MODEL_REGISTRY:
        register_model(NAME)(DllmqLM)


register()


def main() -> None:
    """lm-eval's own command line, with `dllmq` registered; a ValueError is one sentence."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
