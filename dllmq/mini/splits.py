"""Which split a generated problem belongs to: decided by hashes of what it is made of, so nothing can leak.

A problem has two keys: its *composition* (family and the template of every sentence, or the operations of a
program) and its *numbers* (the tuple of all its constants). Each key is hashed to train, dev or test. A
training problem has both keys in train. A test problem has at least one key in test and none in dev (and
likewise for dev), so it is new by composition, by numbers, or by both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from typing import Literal

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")
HELD_OUT_PERCENT = 6  # of all keys, for dev and for test each


def key_split(kind: str, key: Hashable) -> Split:
    """The split of one key; stable across machines and Python versions."""
    digest = hashlib.sha256(f"{kind}:{key!r}".encode()).digest()
    percentile = int.from_bytes(digest[:8], "big") % 100
    if percentile < HELD_OUT_PERCENT:
        return "test"
    return "dev" if percentile < 2 * HELD_OUT_PERCENT else "train"


def problem_split(composition: Hashable, numbers: Hashable) -> tuple[Split | None, str]:
    """The split of a problem and what is new in it ("", "composition", "numbers" or "both").

    None where one key is in dev and the other in test: such a problem is used nowhere.
    """
    by_composition, by_numbers = key_split("composition", composition), key_split("numbers", numbers)
    held_out = {by_composition, by_numbers} - {"train"}
    if len(held_out) > 1:
        return None, ""
    split: Split = held_out.pop() if held_out else "train"
    if split == "train":
        return split, ""
    if by_composition == by_numbers:
        return split, "both"
    return split, "composition" if by_composition == split else "numbers"
