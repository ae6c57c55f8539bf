"""SamplerConfig: the knobs of the reverse process, and what is refused."""

import difflib
import math
from dataclasses import dataclass

REMASKING = ("low_confidence", "random")
DREAM_REMASKING = ("origin", "maskgit_plus", "topk_margin", "entropy")


@dataclass(frozen=True)
class SamplerConfig:
    """How to denoise. Invalid values raise ValueError at construction.

    Attributes:
        gen_length: tokens to generate; a multiple of block_length.
        steps: denoising steps in total; a multiple of gen_length / block_length.
        block_length: blocks are finished from left to right; gen_length = one block, fully parallel.
        temperature: 0 is greedy; > 0 adds Gumbel noise to the logits.
        cfg_scale: classifier-free guidance; 0 is off.
        remasking: which predictions are kept: low_confidence (the most confident) | random.
        alg_temp, top_p, top_k, eps: Dream's; not available yet.
        cache: none (prefix | dual: not available yet).
        threshold: None (confidence-threshold decoding: not available yet).
        logits_eos_inf: never predict EOS.
        confidence_eos_eot_inf: commit EOS and EoT last.
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
        self._check_schedule()
        for name in ("temperature", "cfg_scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number >= 0; got {value}.")
        self._check_remasking()
        self._check_unavailable()

    @property
    def num_blocks(self) -> int:
        return self.gen_length // self.block_length

    @property
    def steps_per_block(self) -> int:
        return self.steps // self.num_blocks

    @property
    def deterministic(self) -> bool:
        """Whether no noise is drawn."""
        return self.temperature == 0 and self.remasking == "low_confidence"

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
        allowed = "use " + " or ".join(REMASKING)
        if self.remasking in DREAM_REMASKING:
            raise ValueError(f"remasking={self.remasking} is Dream's and not available yet: {allowed}.")
        if self.remasking not in REMASKING:
            close = difflib.get_close_matches(self.remasking, REMASKING, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(f"Unknown remasking={self.remasking}: {allowed}.{hint}")

    def _check_unavailable(self) -> None:
        if self.cache != "none":
            raise ValueError(f"cache={self.cache} is not available: the only cache is none.")
        if self.threshold is not None:
            raise ValueError(f"threshold={self.threshold} is not available yet: leave it None (null).")
        for name, neutral in (("alg_temp", None), ("top_p", None), ("top_k", None), ("eps", 1e-3)):
            if (value := getattr(self, name)) != neutral:
                raise ValueError(
                    f"{name}={value} is an option of Dream, not available yet: leave it at {neutral}."
                )
