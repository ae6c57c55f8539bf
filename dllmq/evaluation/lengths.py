"""Whether every prompt of a task fits the model, before another task has spent hours."""

from __future__ import annotations

from lm_eval.api.instance import Instance

from dllmq.evaluation.harness import DiffusionLM


class Fits(Exception):
    """Every request of a task has been looked at; there is nothing to score."""


class LengthCheck(DiffusionLM):
    """Tokenizes the requests that lm-eval builds, and answers none of them.

    Raises:
        ValueError: a prompt is too long. Fits: none is.
    """

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self.prompts(requests)
        raise Fits

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self.pairs(requests)
        raise Fits
