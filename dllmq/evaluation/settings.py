"""EvalSettings: how a diffusion LM answers the requests of a task."""

from dataclasses import dataclass, field

from dllmq.diffusion import SamplerConfig
from dllmq.evaluation.code_scoring import POSTPROCESS

EOS_CUTS = ("first", "none")
UNTILS = ("task", "none")


@dataclass(frozen=True)
class EvalSettings:
    """How to generate, and how to estimate likelihoods. Invalid values raise ValueError at construction.

    Attributes:
        sampler: the reverse process; its cfg_scale also guides the likelihood.
        batch_size: prompts denoised together at most, or auto (see batches.py). Batches change rounding, so
            it is part of a result's identity.
        eos_cut: first (an answer ends at its first EOS or EoT) | none (ML-GSAI's harness: text after an EOS
            survives). Published numbers differ in it.
        mc_num: Monte-Carlo samples per likelihood, a multiple of mc_batch_size.
        mc_batch_size: strata per Monte-Carlo batch; part of the estimator, not only of its speed.
        rows_per_forward: masked copies read in one forward of the likelihood.
        greedy_check: also tell whether an answer is the greedy one (one forward per token; few metrics ask).
        seed: of the sampler's noise and of the likelihood's masks.
        max_length: tokens a canvas may have; None: the model's max_sequence_length.
        chat_template: wrap prompts in the tokenizer's chat template.
        num_fewshot: examples in a prompt; None: the task's own number.
        fewshot_as_multiturn: with a chat template, each example is a turn of its own; False: one message
            holds the whole prompt.
        until: task (an answer is cut at the task's stop strings) | none.
        add_bos: prompts that are generated from, and contexts of likelihoods, start with the tokenizer's BOS;
            not with a chat template, which brings its own.
        postprocess: of programs: none (the response as it is) | take_function (see
            code_scoring.take_function).
    """

    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    batch_size: int | str = 16
    eos_cut: str = "first"
    mc_num: int = 128
    mc_batch_size: int = 16
    rows_per_forward: int = 64
    greedy_check: bool = False
    seed: int = 0
    max_length: int | None = None
    chat_template: bool = False
    num_fewshot: int | None = None
    fewshot_as_multiturn: bool = True
    until: str = "task"
    add_bos: bool = False
    postprocess: str = "none"

    def __post_init__(self) -> None:
        if isinstance(self.batch_size, str) and self.batch_size != "auto":
            raise ValueError(f"batch_size={self.batch_size} is not known; it is an integer >= 1, or auto.")
        numbers = ("mc_num", "mc_batch_size", "rows_per_forward")
        for name in numbers if self.batch_size == "auto" else ("batch_size", *numbers):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be an integer >= 1; got {getattr(self, name)}.")
        if self.mc_num % self.mc_batch_size:
            raise ValueError(
                f"mc_num must be a multiple of mc_batch_size; got mc_num={self.mc_num} and "
                f"mc_batch_size={self.mc_batch_size}."
            )
        if self.eos_cut not in EOS_CUTS:
            raise ValueError(f"Unknown eos_cut={self.eos_cut}: use {' or '.join(EOS_CUTS)}.")
        if self.until not in UNTILS:
            raise ValueError(f"Unknown until={self.until}: use {' or '.join(UNTILS)}.")
        if self.postprocess not in POSTPROCESS:
            raise ValueError(f"Unknown postprocess={self.postprocess}: use {' or '.join(POSTPROCESS)}.")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(
                f"num_fewshot must be an integer >= 0, or None for the task's own number; got "
                f"{self.num_fewshot}."
            )
        if self.max_length is not None and self.max_length <= self.sampler.gen_length:
            raise ValueError(
                f"max_length={self.max_length} leaves no room for a prompt: gen_length is "
                f"{self.sampler.gen_length}."
            )
