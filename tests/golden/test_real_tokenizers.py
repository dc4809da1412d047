"""The tokenizers of the published checkpoints: the same ids on every release, and numbers that are known of them.

The files are put together from public ones beside the checkout; without these, the tests skip. Expected ids were made
with transformers 4.57.1.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from support.checkpoints import module_cache
from support.golden_cases import pattern
from support.paths import REPOSITORY, SHARED

PUBLISHED, TOKENIZERS = SHARED / "published", SHARED / "tokenizers"
pytestmark = pytest.mark.skipif(
    not (PUBLISHED.is_dir() and TOKENIZERS.is_dir()), reason="the reference data beside the checkout is not there"
)
REPOSITORIES = ("Molmo2-4B", "Molmo2-O-7B")
VISUAL_TOKENS = (
    "<im_start>",
    "<im_end>",
    "<im_patch>",
    "<im_col>",
    "<low_res_im_start>",
    "<im_low>",
    "<frame_start>",
    "<frame_end>",
)
NAMES_IN_CONFIG = {
    "image_start_token_id": "<im_start>",
    "image_end_token_id": "<im_end>",
    "image_patch_id": "<im_patch>",
    "image_high_res_id": "<im_patch>",
    "image_low_res_id": "<im_low>",
    "image_col_id": "<im_col>",
    "low_res_image_start_token_id": "<low_res_im_start>",
    "frame_start_token_id": "<frame_start>",
    "frame_end_token_id": "<frame_end>",
}
PAD = {"Molmo2-4B": "<|endoftext|>", "Molmo2-O-7B": "<|pad|>"}
SAFE_CLASSES = {
    "Molmo2-4B": ("Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast"),
    "Molmo2-O-7B": ("PreTrainedTokenizerFast",),
}
NUM_ENTRIES = {"Molmo2-4B": 151946, "Molmo2-O-7B": 100288}
# Text, ids of the tokenizer of Qwen3 (4B) and of Olmo 3 (O-7B).
ENCODED = [
    ("", [], []),
    ("Hello, world!", [9707, 11, 1879, 0], [9906, 11, 1917, 0]),
    (
        "  two  spaces\n\n\nand lines\t",
        [220, 1378, 220, 12621, 1406, 437, 5128, 197],
        [220, 1403, 220, 12908, 1432, 438, 5238, 197],
    ),
    (
        "naïve café — Ünïcödé",
        [3376, 37572, 586, 51950, 1959, 30512, 77, 37572, 66, 2956, 128505],
        [3458, 38672, 588, 53050, 2001, 31612, 77, 38672, 66, 3029, 67, 978],
    ),
    (
        "日本語とEnglish混在",
        [101059, 102819, 19182, 22574, 100235, 18493],
        [9080, 22656, 45918, 252, 19732, 23392, 85315, 115, 19000],
    ),
    (
        "😀👩‍👩‍👧 emoji",
        [141334, 145233, 378, 235, 145233, 378, 235, 145665, 42365],
        [76460, 222, 9468, 239, 102, 378, 235, 9468, 239, 102, 378, 235, 9468, 239, 100, 43465],
    ),
    (
        "1234567890 3.14159 0.5",
        [16, 17, 18, 19, 20, 21, 22, 23, 24, 15, 220, 18, 13, 16, 19, 16, 20, 24, 220, 15, 13, 20],
        [4513, 10961, 16474, 15, 220, 18, 13, 9335, 2946, 220, 15, 13, 20],
    ),
    (
        "def f(x):\n    return x ** 2  # comment",
        [750, 282, 2075, 982, 262, 470, 856, 3070, 220, 17, 220, 671, 3980],
        [755, 282, 2120, 997, 262, 471, 865, 3146, 220, 17, 220, 674, 4068],
    ),
    (
        "0.0 <im_start><im_patch><im_col><im_end> 0.5 ",
        [15, 13, 15, 220, 151936, 151938, 151939, 151937, 220, 15, 13, 20, 220],
        [15, 13, 15, 220, 100278, 100280, 100281, 100279, 220, 15, 13, 20, 220],
    ),
    (
        "<low_res_im_start><im_low><frame_start><frame_end><|image|><|video|>",
        [151940, 151942, 151943, 151944, 151941, 151945],
        [100282, 100284, 100285, 100286, 100283, 100287],
    ),
    (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        [151644, 872, 198, 13048, 151645, 198, 151644, 77091, 198],
        [100264, 882, 198, 13347, 100265, 198, 100264, 78191, 198],
    ),
    (
        '<points coords="1 1 500 500">cat</points>',
        [27, 7706, 23897, 428, 16, 220, 16, 220, 20, 15, 15, 220, 20, 15, 15, 755, 4616, 522, 7706, 29],
        [27, 7862, 24842, 429, 16, 220, 16, 220, 2636, 220, 2636, 760, 4719, 524, 7862, 29],
    ),
    (
        "e\u0301 vs \u00e9 \u200d \ufeff",  # Qwen's tokenizer composes letters first
        [963, 6165, 3958, 636, 235, 75780],
        [68, 54939, 6296, 4046, 639, 235, 76880],
    ),
]


def ids_of(repository):
    """(text, expected ids) for one of the REPOSITORIES."""
    return [(row[0], row[1 + REPOSITORIES.index(repository)]) for row in ENCODED]


# --- putting a repository together -----------------------------------------------------------------------------------


def write_repository(folder: Path, repository: str) -> Path:
    """The repository without weights: published JSON files, a tokenizer, and the code of this one."""
    folder.mkdir(parents=True)
    weights = ("tensors.json", "model.safetensors.index.json")
    files = [file for file in (PUBLISHED / repository).glob("*.json") if file.name not in weights]
    tokenizer = {"Molmo2-4B": ("qwen3/vocab.json", "qwen3/merges.txt")}.get(
        repository, ("olmo3/tokenizer_config.json",)
    )
    for file in (*files, *(TOKENIZERS / name for name in tokenizer), *REPOSITORY.glob("*_molmo2.py")):
        shutil.copy(file, folder)
    shutil.copy(REPOSITORY / "chat_template.jinja", folder)
    if repository == "Molmo2-O-7B":
        write_olmo_tokenizer(folder)
    return folder


def write_olmo_tokenizer(folder: Path) -> None:
    """Olmo's tokenizer.json with the tokens that added_tokens.json lists at its end."""
    content = json.loads((TOKENIZERS / "olmo3" / "tokenizer.json").read_text(encoding="utf-8"))
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for token, number in sorted(published_ids("Molmo2-O-7B").items(), key=lambda item: item[1]):
        content["added_tokens"].append({"id": number, "content": token, **plain, "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def published_ids(repository: str) -> dict[str, int]:
    """The ids of the ten tokens that Molmo2 adds."""
    added = json.loads((PUBLISHED / repository / "added_tokens.json").read_text(encoding="utf-8"))
    return {token: added[token] for token in (*VISUAL_TOKENS, "<|image|>", "<|video|>")}


@pytest.fixture(scope="module", autouse=True)
def _modules_of_their_own(tmp_path_factory):
    with module_cache(tmp_path_factory.mktemp("modules")):
        yield


@pytest.fixture(scope="module", params=REPOSITORIES)
def repository(request):
    return request.param


@pytest.fixture(scope="module")
def folder(repository, tmp_path_factory):
    """A repository with a tokenizer.json, which some releases need."""
    folder = write_repository(tmp_path_factory.mktemp("repository") / repository, repository)
    if not (folder / "tokenizer.json").exists():
        (folder / "config.json").rename(folder / "config.json.aside")  # the class is read from tokenizer_config.json
        AutoTokenizer.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "config.json.aside").rename(folder / "config.json")
    return folder


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True)


# --- ids -------------------------------------------------------------------------------------------------------------


def test_ids_of_special_tokens(processor, repository):
    tokenizer, expected = processor.tokenizer, published_ids(repository)
    assert len(tokenizer) == NUM_ENTRIES[repository]
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in expected} == expected
    assert sorted(expected.values()) == list(range(len(tokenizer) - 10, len(tokenizer)))
    assert sorted(processor.image_token_ids) == sorted(expected[token] for token in VISUAL_TOKENS)
    config = json.loads((PUBLISHED / repository / "config.json").read_text(encoding="utf-8"))
    assert {name: expected[token] for name, token in NAMES_IN_CONFIG.items()} == (
        {name: config[name] for name in NAMES_IN_CONFIG}
    )


def test_encoding(processor, repository):
    for text, ids in ids_of(repository):
        assert processor.tokenizer(text)["input_ids"] == ids, text


def test_decoding(processor, repository):
    for text, ids in ids_of(repository):
        composed = text.replace("e\u0301", "\u00e9") if repository == "Molmo2-4B" else text
        assert processor.decode(ids, clean_up_tokenization_spaces=False) == composed


def test_a_row_of_the_processor(processor, repository):
    """BOS once, the expanded prompt, padding on the left although the files name no side."""
    bos = processor.bos_token_id
    assert processor.tokenizer.padding_side == "left"
    texts = [text for text, _ids in ids_of(repository) if "<|image|>" not in text]
    rows = [[bos, *ids] for text, ids in ids_of(repository) if "<|image|>" not in text]
    output = processor(text=texts, padding=True, return_tensors="np")
    for row, ids, mask in zip(rows, output["input_ids"], output["attention_mask"], strict=True):
        assert ids[mask == 1].tolist() == row
        assert mask.tolist() == sorted(mask.tolist())
        assert set(ids[mask == 0]) <= {processor.tokenizer.convert_tokens_to_ids(PAD[repository])}


def test_known_numbers(processor, repository):
    """Shapes, token types and ids that are known of the published checkpoints, for an image cut into 2 x 3 tiles."""
    known = json.loads((PUBLISHED / "upstream_expected_values.json").read_text(encoding="utf-8"))
    numbers = known["preprocessing"]
    image = pattern({"kind": "pattern", "height": 600, "width": 880})
    (message,) = known["messages"]
    content = [{**part, "image": image} if part["type"] == "image" else part for part in message["content"]]
    output = processor.apply_chat_template(
        [{**message, "content": content}],
        add_generation_prompt=known["add_generation_prompt"],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    for name in ("pixel_values", "image_token_pooling", "image_grids"):
        assert list(output[name].shape) == numbers[f"{name}_shape"], name
    assert output["image_num_crops"].tolist() == numbers["image_num_crops"]
    assert output["token_type_ids"].sum().item() == numbers["image_token_flag_sum"]["Molmo2-4B"]
    assert output["input_ids"][0, 0].item() == numbers["first_input_id"][repository]
    question = "<|im_start|>user\nDescribe this image.<|im_end|>\n<|im_start|>assistant\n"
    ids = processor.tokenizer(question)["input_ids"]
    assert output["input_ids"][0, -len(ids) :].tolist() == ids


def test_a_video_is_written_with_the_published_notation(processor, repository):
    ids = published_ids(repository)
    output = processor(
        text="<|video|>",
        videos=[np.zeros((2, 30, 40, 3), dtype=np.uint8)],
        video_metadata=[{"fps": 2.0, "total_num_frames": 2}],
        return_tensors="pt",
    )
    (row,) = output["input_ids"].tolist()
    frame = [ids["<im_start>"], *[ids["<im_patch>"]] * 81, ids["<im_end>"]]
    first, second = (processor.tokenizer(text)["input_ids"] for text in ("0.0 ", " 0.5 "))
    assert row == [processor.bos_token_id, *first, *frame, *second, *frame]
    assert torch.equal(output["token_type_ids"][0], torch.isin(output["input_ids"][0], torch.tensor(frame)))


# --- files -----------------------------------------------------------------------------------------------------------


def test_saving_keeps_all_ids(processor, repository, tmp_path):
    processor.save_pretrained(tmp_path / "saved")
    again = AutoProcessor.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert len(again.tokenizer) == NUM_ENTRIES[repository]
    assert again.tokenizer.padding_side == "left"
    assert again.bos_token_id == processor.bos_token_id
    assert asdict(again.visual_token_format) == asdict(processor.visual_token_format)
    for text, ids in ids_of(repository):
        assert again.tokenizer(text)["input_ids"] == ids, text


def test_saved_files_name_a_class_that_all_releases_read_alike(processor, repository, tmp_path):
    """Recent releases build some classes anew from the vocabulary, with the word splitting of another model."""
    processor.save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))["tokenizer_class"]
    assert stated in SAFE_CLASSES[repository]
    plain = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text, ids in ids_of(repository):
        assert plain(text)["input_ids"] == ids, text


def test_a_repository_without_tokenizer_json(tmp_path):
    """vocab.json and merges.txt are enough, whatever the release would rather read."""
    folder = write_repository(tmp_path / "Molmo2-4B-vocabulary", "Molmo2-4B")
    assert not (folder / "tokenizer.json").exists()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    for text, ids in ids_of("Molmo2-4B"):
        assert processor.tokenizer(text)["input_ids"] == ids, text
