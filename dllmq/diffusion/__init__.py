"""Masked diffusion: the forward process, the one loop that denoises, and the likelihood bound."""

from dllmq.diffusion.likelihood import greedy_match, log_likelihood, log_likelihoods
from dllmq.diffusion.predict import MaskPredictor
from dllmq.diffusion.process import mask_tokens, stratified_masks, tokens_per_step
from dllmq.diffusion.sampler import (
    Generation,
    SamplerConfig,
    Step,
    apply,
    denoise,
    generate,
    state_confidence,
)
from dllmq.diffusion.settings import check_sampler

__all__ = [
    "Generation",
    "MaskPredictor",
    "SamplerConfig",
    "Step",
    "apply",
    "check_sampler",
    "denoise",
    "generate",
    "greedy_match",
    "log_likelihood",
    "log_likelihoods",
    "mask_tokens",
    "state_confidence",
    "stratified_masks",
    "tokens_per_step",
]
