"""The tokenizer of the converted folder: the base model's, padded and extended by Molmo2's tokens.

The base files are edited as files: a tokenizer object would write them differently on each transformers release.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo2.convert.config_files import PROCESSOR_CLASS, PROCESSOR_MAP
from molmo2.convert.deadlines import within_deadline
from molmo2.convert.errors import CheckpointError, ConversionError, UnsupportedError
from molmo2.convert.small_files import read_bytes, read_json

EXTRA_TOKENS = (
    *("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<low_res_im_start>", "<|image|>", "<im_low>"),
    *("<frame_start>", "<frame_end>", "<|video|>", "<|points|>", "<|token_index|>", "<|vit_index|>", "<|vit_loc|>"),
)
FILLER = "|<EXTRA_TOKENS_{}>|"
PORTABLE_CLASS = "PreTrainedTokenizerFast"  # reads tokenizer.json as it is, on every release
TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
DEFAULT_UNKNOWN = dict.fromkeys(("GPT2Tokenizer", "Qwen2Tokenizer"), "<|endoftext|>")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = {"type": "Split", "pattern": {"Regex": QWEN_PATTERN}, "behavior": "Isolated", "invert": False}
# Parts of tokenizer.json that transformers 5 takes from the class instead.
REBUILT_PARTS: dict[str, dict[str, Any]] = {
    "GPT2Tokenizer": {"normalizer": None, "pre_tokenizer": BYTE_LEVEL},
    "Qwen2Tokenizer": {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [QWEN_SPLIT, {**BYTE_LEVEL, "use_regex": False}]},
    },
}
BATCH_TOKENS = 4096
MAX_TOKENIZER_BYTES = 128_000_000  # bytes; that of 150,000 tokens has 11,000,000
DOWNLOAD_SECONDS = 600.0
SAMPLES = (
    "Point to the technician in the lift. IT'S 3,141 or 1234567 m away!\n\n  Isn't it?\r\n",
    "def f(x):\n\treturn x  # na\u00efve caf\u00e9 \u6771\u4eac \U0001f642  \n\n",
)


@dataclass(frozen=True)
class TokenizerFiles:
    """A finished tokenizer.

    Attributes:
        files: Content by file name.
        extra_ids: Ids of Molmo2's tokens.
    """

    files: dict[str, str]
    extra_ids: dict[str, int]
    bos_id: int
    eos_id: int
    pad_id: int


def build_tokenizer(source: str, *, filled_size: int, embedding_rows: int) -> TokenizerFiles:
    """Extend a base tokenizer.

    Args:
        source: A local folder, or an identifier on the Hub.
        filled_size: Number of tokens up to which it is filled with placeholders.
        embedding_rows: Rows of `wte.embedding`; the first extra token must get this id.
    Raises:
        CheckpointError: If the tokenizer cannot be found or read.
        UnsupportedError: If its ids would point at the wrong rows.
    """
    if filled_size > embedding_rows:
        raise UnsupportedError(
            f"llm.vocab_size asks for {filled_size} tokens, but `wte.embedding` has {embedding_rows} rows."
        )
    with _must_load(source):
        backend, settings = within_deadline(lambda: _load_base(source), DOWNLOAD_SECONDS, "it did not arrive")
    with _must_load(source):
        return _extended(backend, settings, source, filled_size, embedding_rows)


def _extended(
    backend: Any, settings: dict[str, Any], source: str, filled_size: int, embedding_rows: int
) -> TokenizerFiles:
    """The tokenizer with placeholders and Molmo2's tokens."""
    from tokenizers import AddedToken  # not needed for --help

    backend.no_truncation()
    backend.no_padding()
    size = backend.get_vocab_size(with_added_tokens=True)
    present = [token for token in EXTRA_TOKENS if backend.token_to_id(token) is not None]
    if size > filled_size or present:
        found = f"{size} tokens, {present} among them" if present else f"{size} tokens"
        raise UnsupportedError(
            f"The tokenizer '{source}' has {found}; expected a base tokenizer of at most {filled_size} without "
            "Molmo2's own tokens. Name the right one with --tokenizer."
        )
    tokenizer_class = _portable_class(str(settings.get("tokenizer_class", PORTABLE_CLASS)), backend)
    added = [FILLER.format(number) for number in range(filled_size - size)] + list(EXTRA_TOKENS)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    ids = {token: backend.token_to_id(token) for token in EXTRA_TOKENS}
    if ids[EXTRA_TOKENS[0]] != embedding_rows:
        raise UnsupportedError(
            f"{EXTRA_TOKENS[0]} would get id {ids[EXTRA_TOKENS[0]]}, but `wte.embedding` has {embedding_rows} rows "
            f"and the extra tokens must follow them. The tokenizer '{source}' or llm.fix_pad_tokenizer does not fit "
            "the checkpoint."
        )
    settings = _settings(settings, tokenizer_class, backend, added)
    names = {name: settings[f"{name}_token"] for name in ("bos", "eos", "pad")}
    missing = [name for name, token in names.items() if token is None or backend.token_to_id(token) is None]
    if missing:
        raise UnsupportedError(f"The tokenizer '{source}' has no {' and no '.join(missing)} token; Molmo2 needs them.")
    return TokenizerFiles(
        _files(backend, settings, added), ids, *(backend.token_to_id(token) for token in names.values())
    )


@contextmanager
def _must_load(source: str) -> Iterator[None]:
    """Context for the loaders, which raise many kinds; a panic of tokenizers is no Exception."""
    try:
        yield
    except (ConversionError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise CheckpointError(
            f"The tokenizer '{source}' cannot be loaded ({type(error).__name__}: {str(error)[:300]}). It is "
            "what --tokenizer says, or else llm.tokenizer.identifier in config.yaml; without network pass a local "
            "folder: --tokenizer PATH."
        ) from None


def _load_base(source: str) -> tuple[Any, dict[str, Any]]:
    """The tokenizer in `tokenizer.json`, and `tokenizer_config.json`; foreign code is not run."""
    from tokenizers import Tokenizer
    from transformers.utils.hub import cached_file

    paths = [
        cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        for name in (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE)
    ]
    if paths == [None, None]:
        raise FileNotFoundError(f"there is neither {TOKENIZER_FILE} nor {TOKENIZER_CONFIG_FILE}")
    settings = {} if paths[1] is None else read_json(Path(paths[1]))
    if paths[0] is None:  # only the files of a slow tokenizer
        from transformers import AutoTokenizer

        base = AutoTokenizer.from_pretrained(source, trust_remote_code=False).backend_tokenizer.to_str()
    else:
        base = read_bytes(Path(paths[0]), MAX_TOKENIZER_BYTES).decode("utf-8")
    return Tokenizer.from_str(base), settings


def _portable_class(stated: str, backend: Any) -> str:
    """The class to name in `tokenizer_config.json`, under which every release encodes as `tokenizer.json` says.

    Recent releases build some tokenizers anew from their class's idea of them, which need not be what the file says:
    Olmo's calls itself a GPT2Tokenizer, but splits numbers and line ends otherwise.
    """
    from tokenizers import Tokenizer

    stated = stated.removesuffix("Fast")
    if stated not in REBUILT_PARTS:
        return PORTABLE_CLASS
    content = json.loads(backend.to_str())
    if all(content[name] == part for name, part in REBUILT_PARTS[stated].items()):
        return stated
    rebuilt = Tokenizer.from_str(json.dumps({**content, **REBUILT_PARTS[stated]}))
    if not _encode_alike(backend, rebuilt, SAMPLES):
        return PORTABLE_CLASS
    # A token that never comes out whole any more shows a rule that splits differently.
    numbers = range(len(content["model"]["vocab"]))
    for start in range(0, len(numbers), BATCH_TOKENS):
        texts = backend.decode_batch([[number] for number in numbers[start : start + BATCH_TOKENS]], False)
        if not _encode_alike(backend, rebuilt, texts):
            return PORTABLE_CLASS
    return stated


def _encode_alike(first: Any, second: Any, texts: Sequence[str]) -> bool:
    encoded = [tokenizer.encode_batch_fast(texts, add_special_tokens=False) for tokenizer in (first, second)]
    return all(a.ids == b.ids for a, b in zip(*encoded, strict=True))


def _content(token: Any) -> str | None:
    """The string of a token that files write plainly or as a dictionary."""
    if isinstance(token, dict):
        token = token.get("content")
    return None if token is None else str(token)


def _settings(base: dict[str, Any], tokenizer_class: str, backend: Any, added: list[str]) -> dict[str, Any]:
    """`tokenizer_config.json`: the base's, with bos, the added tokens and our processor."""
    settings = {name: value for name, value in base.items() if name not in ("chat_template", "auto_map")}
    settings.setdefault("unk_token", DEFAULT_UNKNOWN.get(tokenizer_class))
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        settings[name] = _content(settings.get(name))
    for name in ("bos_token", "pad_token"):
        if settings[name] is None:
            settings[name] = settings["eos_token"]
    settings["tokenizer_class"] = tokenizer_class
    if tokenizer_class == "GPT2Tokenizer":
        settings.setdefault("add_prefix_space", False)
    settings.setdefault("clean_up_tokenization_spaces", False)
    settings.setdefault("extra_special_tokens", {})
    settings.setdefault("model_max_length", int(1e30))
    settings["additional_special_tokens"] = added
    settings["processor_class"], settings["auto_map"] = PROCESSOR_CLASS, PROCESSOR_MAP
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    settings["added_tokens_decoder"] = {
        str(number): {flag: getattr(token, flag) for flag in flags}
        for number, token in sorted(backend.get_added_tokens_decoder().items())
    }
    return settings


def _files(backend: Any, settings: dict[str, Any], added: list[str]) -> dict[str, str]:
    names = {name: settings[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    decoder = backend.get_added_tokens_decoder()
    contents: dict[str, Any] = {
        TOKENIZER_CONFIG_FILE: settings,
        "special_tokens_map.json": {
            "additional_special_tokens": added,
            **{name: token for name, token in names.items() if token is not None},
        },
        "added_tokens.json": {token.content: number for number, token in decoder.items()},
    }
    files = {
        name: json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
        for name, content in contents.items()
    }
    files[TOKENIZER_FILE] = backend.to_str(pretty=True)
    model = json.loads(files[TOKENIZER_FILE])["model"]
    if model.get("type") == "BPE":  # for tools that know nothing else
        files["vocab.json"] = json.dumps(model["vocab"], ensure_ascii=False)
        pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        files["merges.txt"] = "\n".join(["#version: 0.2", *pairs]) + "\n"
    return files
