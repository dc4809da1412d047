"""The tokenizer that a conversion writes: ids, files, and the class that reads them literally on every release."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from molmo2.convert import CheckpointError, UnsupportedError
from molmo2.convert.tokenizer import EXTRA_TOKENS, build_tokenizer
from support.native_checkpoints import BASE_TOKENS, write_base_tokenizer

TEXTS = (
    "Hello, world!",
    "  two  spaces\n\n\nand lines\t",
    "1234567890 3.14159 IT'S don't",
    "def f(x):\r\n    return x ** 2  # comment\n\n",
    "na\u00efve \u2014 \u65e5\u672c\u8a9e \U0001f600",
    "<|im_start|>user\n<im_start><im_patch><|image|><|im_end|>",
)
REAL = {"qwen3": ("Qwen2Tokenizer", 151936, 151645), "olmo3": ("PreTrainedTokenizerFast", 100278, 100257)}


@pytest.fixture
def base(tmp_path):
    return write_base_tokenizer(tmp_path / "base")


def change(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def write(files: dict[str, str], folder: Path) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def test_filled_and_extended(base, tmp_path):
    built = build_tokenizer(str(base), filled_size=BASE_TOKENS + 3, embedding_rows=BASE_TOKENS + 3)
    assert built.extra_ids == {token: BASE_TOKENS + 3 + number for number, token in enumerate(EXTRA_TOKENS)}
    tokenizer = AutoTokenizer.from_pretrained(write(built.files, tmp_path / "built"))
    assert [tokenizer.convert_ids_to_tokens(BASE_TOKENS + number) for number in range(4)] == [
        "|<EXTRA_TOKENS_0>|",
        "|<EXTRA_TOKENS_1>|",
        "|<EXTRA_TOKENS_2>|",
        "<im_start>",
    ]
    assert (built.bos_id, built.eos_id, built.pad_id) == (258, 258, 256)  # no bos of its own
    assert tokenizer.bos_token == tokenizer.eos_token == "<|im_end|>"
    literal = Tokenizer.from_file(str(base / "tokenizer.json"))
    for text in TEXTS[:-1]:
        assert tokenizer.encode(text, add_special_tokens=False) == literal.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers(shared, tmp_path, name):
    """Also in a folder without config.json, from which some releases learn to take the file literally."""
    tokenizer_class, size, bos = REAL[name]
    source = shared / "tokenizers" / name
    built = build_tokenizer(str(source), filled_size=size, embedding_rows=size)
    assert built.extra_ids["<|vit_loc|>"] == size + 13
    assert built.bos_id == bos
    assert json.loads(built.files["tokenizer_config.json"])["tokenizer_class"] == tokenizer_class
    folder = write(built.files, tmp_path / "built")
    tokenizer, literal = AutoTokenizer.from_pretrained(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert len(tokenizer) == size + 14
    for text in TEXTS:
        ids = literal.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.decode(ids) == text


def test_published_files_have_the_same_filler(shared):
    published = json.loads((shared / "published" / "Molmo2-4B" / "added_tokens.json").read_text())
    built = build_tokenizer(str(shared / "tokenizers" / "qwen3"), filled_size=151936, embedding_rows=151936)
    assert published.items() <= json.loads(built.files["added_tokens.json"]).items()


@pytest.mark.parametrize(
    ("stated", "changes", "expected"),
    [
        ("GPT2TokenizerFast", {}, "GPT2Tokenizer"),
        ("GPT2Tokenizer", {"pre_tokenizer": {"type": "Whitespace"}}, "PreTrainedTokenizerFast"),
        ("Qwen2Tokenizer", {"normalizer": {"type": "Lowercase"}}, "PreTrainedTokenizerFast"),
        ("LlamaTokenizerFast", {}, "PreTrainedTokenizerFast"),
        ("TokenizersBackend", {}, "PreTrainedTokenizerFast"),
    ],
)
def test_the_class_never_changes_the_ids(base, tmp_path, stated, changes, expected):
    change(base / "tokenizer.json", **changes)
    change(base / "tokenizer_config.json", tokenizer_class=stated)
    built = build_tokenizer(str(base), filled_size=BASE_TOKENS, embedding_rows=BASE_TOKENS)
    assert json.loads(built.files["tokenizer_config.json"])["tokenizer_class"] == expected
    folder = write(built.files, tmp_path / "built")
    tokenizer, literal = AutoTokenizer.from_pretrained(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False) == literal.encode(text, add_special_tokens=False).ids


def test_the_bases_own_template_does_not_travel(base):
    change(base / "tokenizer_config.json", chat_template="other", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    built = build_tokenizer(str(base), filled_size=BASE_TOKENS, embedding_rows=BASE_TOKENS)
    settings = json.loads(built.files["tokenizer_config.json"])
    assert "chat_template" not in settings
    assert settings["auto_map"] == {"AutoProcessor": "processing_molmo2.Molmo2Processor"}


def test_an_extended_tokenizer_is_no_base(base, tmp_path):
    built = build_tokenizer(str(base), filled_size=BASE_TOKENS, embedding_rows=BASE_TOKENS)
    extended = write(built.files, tmp_path / "extended")
    with pytest.raises(UnsupportedError, match=r"has 273 tokens, \['<im_start>'.* expected a base tokenizer"):
        build_tokenizer(str(extended), filled_size=300, embedding_rows=300)


def test_without_an_end_token(base):
    change(base / "tokenizer_config.json", eos_token=None, pad_token=None)
    with pytest.raises(UnsupportedError, match="has no bos and no eos and no pad token"):
        build_tokenizer(str(base), filled_size=BASE_TOKENS, embedding_rows=BASE_TOKENS)


def test_an_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot be loaded .*there is neither tokenizer\.json nor"):
        build_tokenizer(str(tmp_path / "empty"), filled_size=BASE_TOKENS, embedding_rows=BASE_TOKENS)
