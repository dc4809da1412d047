"""The four public checkpoints of the original trainer, against the recorded results of the original converter."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoTokenizer

from molmo2.convert import ConversionOptions, convert_checkpoint, plan_conversion
from molmo2.convert.cli import main
from molmo2.convert.config_files import MODEL_MAP
from molmo2.convert.names import expected_renames
from molmo2.convert.native_config import parse_config
from molmo2.convert.shards import GIGABYTE, index_content, plan_shards
from support.native_checkpoints import native_section
from support.tensor_names import native_name, target_name

TOKENIZERS = {
    "olmo3_sharded_2ranks": "tiny-olmo-tokenizer",
    "qwen2_bias_unsharded_bf16": "tiny-qwen-tokenizer",
    "qwen3_tied_unsharded": "tiny-qwen-tokenizer",
    "qwen3_untied_sharded_2ranks": "tiny-qwen-tokenizer",
}
JSON_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
TOLERANCE = 1e-3
NATIVE_CLASS_SINCE = Version("5.20")
WITHOUT_QK_NORM = "qwen2_bias_unsharded_bf16"  # transformers' own class always norms queries and keys


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def cases(shared) -> Path:
    return shared / "native_checkpoints"


@pytest.fixture(scope="module")
def converted(cases, tmp_path_factory):
    """Folder of a case in a dtype, made once; in several shards, so that the index counts too."""
    folder = tmp_path_factory.mktemp("converted")

    def get(case: str, dtype: str) -> Path:
        output = folder / f"{case}-{dtype}"
        if not output.exists():
            options = ConversionOptions(
                dtype=dtype,
                tokenizer=str(cases / "tokenizers" / TOKENIZERS[case]),
                max_model_len=read(cases / case / "expected" / "report.json")["override_max_model_len"],
                max_shard_bytes=500_000,
            )
            convert_checkpoint(cases / case / "checkpoint", output, options)
        return output

    return get


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", TOKENIZERS)
def test_tensors_are_exact(cases, converted, case, dtype):
    expected = read(cases / case / "expected" / "tensors.json")["tensors"]
    folder = converted(case, dtype)
    index = read(folder / "model.safetensors.index.json")
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                assert index["weight_map"][name] == file.name
                tensor = tensors.get_tensor(name)
                digest = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
                found[name] = {"shape": list(tensor.shape), f"sha256_{dtype}": digest}
                assert tensor.dtype == getattr(torch, dtype)
    assert found == {
        name: {key: entry[key] for key in ("shape", f"sha256_{dtype}")} for name, entry in expected.items()
    }
    assert set(index["weight_map"]) == set(expected)


@pytest.mark.parametrize("case", TOKENIZERS)
def test_configurations_are_exact(cases, converted, case):
    """Everything equals the recording; only `auto_map` of config.json offers more classes than the original."""
    expected, folder = cases / case / "expected", converted(case, "float32")
    for name in JSON_FILES:
        assert read(folder / name) == read(expected / name), name
    wanted, found = read(expected / "config.json"), read(folder / "config.json")
    wanted_map, found_map = wanted.pop("auto_map"), found.pop("auto_map")
    assert found == wanted
    assert found_map == MODEL_MAP
    assert wanted_map.items() <= found_map.items()
    assert read(converted(case, "bfloat16") / "config.json") == {**found, "auto_map": found_map, "dtype": "bfloat16"}


def plain(tokens: dict[str, Any]) -> dict[str, Any]:
    return {name: token["content"] if isinstance(token, dict) else token for name, token in tokens.items()}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizer_files_are_exact(cases, converted, case):
    expected, folder = cases / case / "expected", converted(case, "float32")
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.json"):
        assert read(folder / name) == read(expected / name), name
    assert (folder / "merges.txt").read_text() == (expected / "merges.txt").read_text()
    # Some releases wrote these strings, some dictionaries; both are read alike.
    assert plain(read(folder / "special_tokens_map.json")) == plain(read(expected / "special_tokens_map.json"))


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizer_ids_after_loading(cases, converted, case):
    expected = read(cases / case / "expected" / "special_tokens.json")
    tokenizer = AutoTokenizer.from_pretrained(converted(case, "float32"))
    assert len(tokenizer) == expected["full_length"]
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in expected["special_ids"]}
    assert ids == expected["special_ids"]
    assert {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id} == {
        name: expected[name] for name in ("bos_token_id", "eos_token_id")
    }
    assert tokenizer.encode("".join(ids), add_special_tokens=False) == list(ids.values())


def recorded_inputs(path: Path, prompt: str) -> dict[str, torch.Tensor]:
    arrays = np.load(path)
    values = {key.partition(".")[2]: arrays[key] for key in arrays if key.startswith(f"{prompt}.")}
    inputs = {name: torch.from_numpy(value.astype(np.int64)) for name, value in values.items() if name != "image_u8"}
    if "image_u8" in values:
        inputs["pixel_values"] = torch.from_numpy(values["image_u8"].astype(np.float32)) / 255 * 2 - 1
        inputs["image_token_pooling"] = inputs.pop("token_pooling")
        inputs["image_num_crops"] = torch.tensor([len(values["image_u8"])])
    # A case without two-way attention records no types: no token is visual to another.
    inputs.setdefault("token_type_ids", torch.zeros_like(inputs["input_ids"]))
    return inputs


@pytest.mark.parametrize("trust_remote_code", [True, False], ids=["remote_code", "native_class"])
@pytest.mark.parametrize("case", TOKENIZERS)
def test_logits(cases, converted, case, trust_remote_code):
    if not trust_remote_code and Version(transformers.__version__) < NATIVE_CLASS_SINCE:
        pytest.skip(f"transformers has a class of its own since {NATIVE_CLASS_SINCE}")
    if not trust_remote_code and case == WITHOUT_QK_NORM:
        pytest.skip("transformers' own class cannot express a text model without query/key norm")
    folder, expected = converted(case, "float32"), cases / case / "expected"
    model = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=trust_remote_code, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    assert ("transformers_modules" in type(model).__module__) is trust_remote_code
    logits = np.load(expected / "logits.npz")
    prompts = sorted({name.partition(".")[0] for name in logits})
    assert prompts == ["image", "text_long", "text_short", "text_special"]
    for prompt in prompts:
        inputs = recorded_inputs(expected / "inputs.npz", prompt)
        if not trust_remote_code:
            inputs["mm_token_type_ids"] = inputs.pop("token_type_ids")  # its name for them
        with torch.inference_mode():
            found = model(**inputs).logits[:, logits[f"{prompt}.positions"]].numpy()
        np.testing.assert_allclose(found, logits[f"{prompt}.logits"], rtol=0, atol=TOLERANCE, err_msg=prompt)


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, "float32") for case in TOKENIZERS), ("qwen3_untied_sharded_2ranks", "bfloat16")]
)
def test_verify_and_probe(cases, converted, case, dtype, capsys):
    folder = converted(case, dtype)
    assert main([str(cases / case / "checkpoint"), str(folder), "--verify", "--probe"]) == 0
    output = capsys.readouterr().out
    count = read(cases / case / "expected" / "tensors.json")["count"]
    assert f"Verified: {count} tensors" in output
    assert "Probed: logits differ by 0.0e+00" in output


@pytest.mark.parametrize("case", TOKENIZERS)
def test_report_names_the_step(cases, case):
    selected = read(cases / case / "expected" / "report.json")["selected"]
    options = ConversionOptions(tokenizer=str(cases / "tokenizers" / TOKENIZERS[case]))
    location = plan_conversion(cases / case / "checkpoint", options).source.location
    assert location.folder == cases / case / "checkpoint" / selected
    assert location.step == (200 if selected == "step200" else None)


PUBLISHED = {
    "Molmo2-4B": {"llm.weight_tying": True},
    "Molmo2-8B": {"llm.d_model": 4096, "llm.mlp_hidden_size": 2 * 12288},
    "Molmo2-O-7B": {
        "llm.d_model": 4096,
        "llm.n_kv_heads": 32,
        "llm.n_layers": 32,
        "llm.mlp_hidden_size": 2 * 11008,
        "llm.vocab_size": 100278,
        "llm.embedding_size": 100278,
        "llm.attention_layer_norm_type": "olmo",
        "llm.norm_after": True,
    },
}
REAL_SIZES = {
    "llm.d_model": 2560,
    "llm.n_heads": 32,
    "llm.n_kv_heads": 8,
    "llm.head_dim": 128,
    "llm.n_layers": 36,
    "llm.mlp_hidden_size": 2 * 9728,
    "llm.vocab_size": 151936,
    "llm.embedding_size": 151936,
    "llm.additional_vocab_size": 128,
    "vision_backbone.vit.image_default_input_size": [378, 378],
    "vision_backbone.vit.image_emb_dim": 1152,
    "vision_backbone.vit.image_num_heads": 16,
    "vision_backbone.vit.image_num_key_value_heads": 16,
    "vision_backbone.vit.image_num_layers": 27,
    "vision_backbone.vit.image_head_dim": 72,
    "vision_backbone.vit.image_mlp_dim": 4304,
    "vision_backbone.vit.image_num_pos": 729,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shards_reproduce_the_published_index(shared, name):
    renames = expected_renames(parse_config(native_section({**REAL_SIZES, **PUBLISHED[name]})))
    published = shared / "published" / name
    assert index_content(plan_shards(renames, "float32", 5 * GIGABYTE), "float32") == read(
        published / "model.safetensors.index.json"
    )
    shapes = {tensor["name"]: tensor["shape"] for tensor in read(published / "tensors.json")["tensors"]}
    assert {rename.target: list(rename.shape) for rename in renames} == shapes


@pytest.mark.parametrize("case", TOKENIZERS)
def test_names_of_every_recorded_tensor_in_both_directions(cases, case):
    native = read(cases / case / "expected" / "native_keys.json")
    converted = set(read(cases / case / "expected" / "tensors.json")["tensors"])
    tied = {"lm_head.weight"} if "transformer.ff_out.weight" not in native else set()
    assert {target_name(name) for name in native} == converted - tied
    assert {native_name(name) for name in converted} - {"transformer.ff_out.weight"} <= set(native)
