"""The base tokenizer of the miniature: bytes, the words of its world, single digits, three chat tokens.

A word of the list is one token; anything else falls apart into bytes, so every text can be written.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from .questions import vocabulary_texts

CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ROLES = ("user", "assistant", "system", "Image", " Image", " 1", "\n", "\t")
TAGS = ('<points coords="', ' <points coords="', '<tracks coords="', '">', "</points>", "</tracks>")
# Tags, digits and words with the blank before them, then single characters.
PATTERN = r' ?</?[a-z]+(?: coords="|>)?|">| ?\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]|\s'


def build() -> Tokenizer:
    """The tokenizer; the same ids on every call."""
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    before = pre_tokenizers.Sequence([split, to_bytes])
    digits = [f"{blank}{digit}" for blank in ("", " ") for digit in range(10)]
    words = {
        word for text in [*vocabulary_texts(), *digits, *ROLES, *TAGS] for word, _ in before.pre_tokenize_str(text)
    }
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += sorted(word for word in words if word not in tokens)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = before
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CHAT_TOKENS])
    return tokenizer


def write(folder: Path) -> Path:
    """Write the files of a base tokenizer, as a text model comes with."""
    folder.mkdir(parents=True, exist_ok=True)
    build().save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return folder
