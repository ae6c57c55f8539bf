"""SamplerConfig: the knobs of the reverse process, and what is refused."""

import difflib
import math
from dataclasses import dataclass, replace
from typing import Any

CACHES = ("none", "prefix", "dual")
REMASKING = ("low_confidence", "random")
DREAM_REMASKING = ("origin", "maskgit_plus", "topk_margin", "entropy")
# Options that only one of the two processes has, with their neutral values.
_LLADA_ONLY = {"cfg_scale": 0.0, "logits_eos_inf": False, "confidence_eos_eot_inf": False}
_DREAM_ONLY = {"alg_temp": None, "top_p": None, "top_k": None, "eps": 1e-3}


@dataclass(frozen=True)
class SamplerConfig:
    """How to denoise. Invalid values raise ValueError at construction.

    `remasking` names the process, LLaDA's (sampler.py) or Dream's (dream_sampler.py); an option of the other
    one is refused.

    Attributes:
        gen_length: tokens to generate; a multiple of block_length.
        steps: denoising steps in total; a multiple of gen_length / block_length. With a threshold it plays
            no part.
        block_length: blocks are finished from left to right; gen_length = one block, fully parallel. Dream's
            process has no blocks: it becomes gen_length, unless there is a cache.
        temperature: 0 is greedy; > 0 samples. Dream's also divides the logits that confidences come from.
        cfg_scale: LLaDA's: classifier-free guidance; 0 is off.
        remasking: which predictions are kept. LLaDA's: low_confidence (the most confident) | random. Dream's:
            origin (every mask with the schedule's probability) | maskgit_plus (highest probability) |
            topk_margin (largest lead over the second) | entropy (lowest entropy).
        alg_temp: Dream's: None or 0 keeps the highest confidences; > 0 draws with probabilities
            softmax(confidence / alg_temp).
        top_p, top_k: Dream's: predict from the most likely tokens only, those that make up top_p, the first
            top_k.
        eps: Dream's: where the time steps from 1 end.
        cache: none, or approximate forwards inside a block (cache.py): prefix (keys and values left of the
            block are reused) | dual (those right of it too). Without guidance. With Dream together with a
            threshold and remasking = maskgit_plus only.
        threshold: None, or parallel decoding (threshold.py): a step commits every token with at least this
            confidence, and the most confident one in any case; above 1 one token a step. Not with random
            remasking. With Dream together with a cache only.
        logits_eos_inf: LLaDA's: never predict EOS.
        confidence_eos_eot_inf: LLaDA's: commit EOS and EoT last.
    """

    gen_length: int = 32
    steps: int = 32
    block_length: int = 8
    temperature: float = 0.0
    cfg_scale: float = 0.0
    remasking: str = "low_confidence"
    alg_temp: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    eps: float = 1e-3
    cache: str = "none"
    threshold: float | None = None
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False

    def __post_init__(self) -> None:
        if self.dream and self.exact:
            self._drop_blocks()
        self._check_schedule()
        for name in ("temperature", "cfg_scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number >= 0; got {value}.")
        self._check_remasking()
        self._check_options()
        self._check_approximations()

    @property
    def dream(self) -> bool:
        """Whether `remasking` names Dream's process."""
        return self.remasking in DREAM_REMASKING

    @property
    def num_blocks(self) -> int:
        return self.gen_length // self.block_length

    @property
    def steps_per_block(self) -> int:
        return self.steps // self.num_blocks

    @property
    def visits_per_block(self) -> int:
        """Steps a block takes at most; with a threshold one per token."""
        return self.steps_per_block if self.threshold is None else self.block_length

    @property
    def num_steps(self) -> int:
        """Steps in total, at most."""
        return self.num_blocks * self.visits_per_block

    @property
    def exact(self) -> bool:
        """Whether the process is the published one: no cache, no threshold."""
        return self.cache == "none" and self.threshold is None

    @property
    def approximations(self) -> str:
        """ "cache=dual, threshold=0.9", "" where the process is exact."""
        on = [f"cache={self.cache}"] if self.cache != "none" else []
        on += [f"threshold={self.threshold:g}"] if self.threshold is not None else []
        return ", ".join(on)

    def made_exact(self) -> "SamplerConfig":
        """The same without cache and threshold; Dream's also without blocks."""
        block_length = self.gen_length if self.dream else self.block_length
        return replace(self, cache="none", threshold=None, block_length=block_length)

    @property
    def deterministic(self) -> bool:
        """Whether no noise is drawn."""
        ranked = self.remasking not in ("random", "origin")
        return self.temperature == 0 and ranked and not self.alg_temp

    def _drop_blocks(self) -> None:
        if self.block_length not in (self.gen_length, SamplerConfig.block_length):
            raise ValueError(
                f"remasking={self.remasking} is Dream's, which has no blocks: leave block_length out or give "
                f"block_length={self.gen_length}, all of gen_length; got block_length={self.block_length}."
            )
        object.__setattr__(self, "block_length", self.gen_length)

    def _check_schedule(self) -> None:
        for name in ("gen_length", "steps", "block_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be an integer >= 1; got {getattr(self, name)}.")
        if self.gen_length % self.block_length:
            raise ValueError(
                f"gen_length must be a multiple of block_length; got gen_length={self.gen_length} and "
                f"block_length={self.block_length}."
            )
        if self.steps % self.num_blocks:
            raise ValueError(
                f"steps (the total) must be a multiple of the number of blocks, gen_length / block_length = "
                f"{self.gen_length} / {self.block_length} = {self.num_blocks}; got steps={self.steps}."
            )

    def _check_remasking(self) -> None:
        known = (*REMASKING, *DREAM_REMASKING)
        if self.remasking not in known:
            close = difflib.get_close_matches(self.remasking, known, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(
                f"Unknown remasking={self.remasking}: with Dream use {_either(DREAM_REMASKING)}, with LLaDA "
                f"use {_either(REMASKING)}.{hint}"
            )

    def _check_options(self) -> None:
        """Options of the other process, and the ranges of Dream's."""
        foreign, owner, own = (
            (_LLADA_ONLY, "LLaDA", "Dream") if self.dream else (_DREAM_ONLY, "Dream", "LLaDA")
        )
        for name, neutral in foreign.items():
            if (value := getattr(self, name)) != neutral:
                null = " (null)" if neutral is None else ""
                raise ValueError(
                    f"{name}={value} is an option of {owner}'s sampler, but remasking={self.remasking} is "
                    f"{own}'s: leave {name} at {neutral}{null}."
                )
        if self.alg_temp is not None and not (math.isfinite(self.alg_temp) and self.alg_temp >= 0):
            raise ValueError(f"alg_temp must be None (null) or a finite number >= 0; got {self.alg_temp}.")
        if self.alg_temp and self.remasking == "origin":
            raise ValueError(
                f"alg_temp={self.alg_temp} has no effect with remasking=origin, which ranks nothing: leave "
                "alg_temp at None (null)."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be None (null) or a number in (0, 1]; got {self.top_p}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be None (null) or an integer >= 1; got {self.top_k}.")
        if not 0 <= self.eps < 1:
            raise ValueError(f"eps must be a number in [0, 1); got {self.eps}.")

    def _check_approximations(self) -> None:
        if self.cache not in CACHES:
            close = difflib.get_close_matches(self.cache, CACHES, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(f"Unknown cache={self.cache}: use {_either(CACHES)}.{hint}")
        if self.threshold is not None and not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise ValueError(
                f"threshold must be None (null) or a number >= 0, a confidence; got {self.threshold}."
            )
        if self.cache != "none" and self.cfg_scale > 0:
            raise ValueError(
                f"cache={self.cache} does not go with guidance (cfg_scale={self.cfg_scale}), whose second "
                "copy is not kept: set cfg_scale=0, or cache=none."
            )
        if self.threshold is not None and self.remasking == "random":
            raise ValueError(
                f"threshold={self.threshold} compares confidences, but remasking=random has none: use "
                "remasking=low_confidence, or leave threshold at None (null)."
            )
        if self.dream and not self.exact:
            self._check_dream_approximations()

    def _check_dream_approximations(self) -> None:
        if self.cache == "none" or self.threshold is None:
            raise ValueError(
                f"cache={self.cache} and threshold={self.threshold}: Dream is decoded with both, as "
                "Fast-dLLM does it, or with neither; set both, or cache=none and threshold=None (null)."
            )
        if self.remasking != "maskgit_plus":
            raise ValueError(
                f"threshold={self.threshold} compares the predicted tokens' probabilities: with Dream use "
                f"remasking=maskgit_plus; got remasking={self.remasking}."
            )
        if self.alg_temp:
            raise ValueError(
                f"alg_temp={self.alg_temp} has no effect with a threshold, which draws nothing: leave "
                "alg_temp at None (null)."
            )


def check_sampler(model_config: Any, sampler: SamplerConfig) -> None:
    """Whether the sampler's process is the model's: Dream's where logits are shifted, LLaDA's elsewhere.

    Args:
        model_config: the model's config; `shifted_logits` is true for Dream.

    Raises:
        ValueError: it is the other one's.
    """
    shifted = bool(getattr(model_config, "shifted_logits", False))
    if sampler.dream == shifted:
        return
    own, owner, this = (DREAM_REMASKING, "LLaDA", "is a") if shifted else (REMASKING, "Dream", "is no")
    raise ValueError(
        f"remasking={sampler.remasking} is {owner}'s, but this model {this} Dream model: use {_either(own)}."
    )


def _either(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
