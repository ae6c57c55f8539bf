"""The embedded model's tokenizer: whole words where the tasks use them, single digits, bytes for the rest.

A saved Hugging Face fast tokenizer with LLaDA's special-token roles and chat layout. It is a byte-level
vocabulary with a word list and no merges, so any text (code, emoji) makes the round trip byte for byte.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dllmq.mini.code_problems import draw_code_problem
from dllmq.mini.word_problems import draw_word_problem

BOS, EOS, MASK = "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"
HEADER, HEADER_END, EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
SPECIAL = (EOS, BOS, MASK, HEADER, HEADER_END, EOT)
# LLaDA's chat text: BOS once, then per message header role header-end, two newlines, trimmed content, EoT.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    f"{{{{ '{HEADER}' + message['role'] + '{HEADER_END}\n\n' + message['content'] | trim + '{EOT}' }}}}"
    "{% endfor %}{% if add_generation_prompt %}"
    f"{{{{ '{HEADER}assistant{HEADER_END}\n\n' }}}}"
    "{% endif %}"
)
# Words keep their leading space; digits stand alone; an indent is one token, a newline another.
PIECES = r'####|"""| {4}| ?(?:==|!=|//)|\n| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s'


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def task_texts(n: int = 20000, seed: int = 0) -> Iterable[str]:
    """Texts of the kind the tasks hold, to count words in."""
    rng = Random(seed)
    for _ in range(n):
        word, code = draw_word_problem(rng), draw_code_problem(rng)
        yield f"Question: {word.question}\nAnswer: {word.answer}"
        yield code.prompt + code.solution
    yield "user assistant system User Assistant"


def build_tokenizer(min_count: int = 20) -> PreTrainedTokenizerFast:
    """Builds the tokenizer from the tasks' words; deterministic."""
    pre = _pre_tokenizer()
    counts = Counter(piece for text in task_texts() for piece, _ in pre.pre_tokenize_str(text))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    roles = ["user", "assistant", "system"]
    words = sorted(w for w, c in counts.items() if len(w) > 1 and (c >= min_count or w in roles))
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        mask_token=MASK,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
