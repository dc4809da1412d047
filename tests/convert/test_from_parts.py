"""A model out of parts computes what its parts compute: folders of transformers' own classes, tiny random weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from molmo2.convert import CheckpointError, ConversionOptions, Parts, UnsupportedError, build_from_parts, config_files
from molmo2.convert.cli import main, parse_arguments
from molmo2.convert.from_parts import settings_of_parts, vision_settings
from molmo2.convert.names import expected_renames
from molmo2.convert.native_config import parse_config
from molmo2.convert.tokenizer import EXTRA_TOKENS
from molmo2.model.modeling import Molmo2ForConditionalGeneration
from support.checkpoints import PUBLISHED, read_json
from support.native_checkpoints import VOCAB_SIZE, write_base_tokenizer

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
HAS_PARAMETERS = "rope_parameters" in transformers.LlamaConfig().to_dict()  # since transformers 5
LINEAR = {"rope_type" if HAS_PARAMETERS else "type": "linear", "factor": 4.0}


def rope(scaling, theta, *, by_type=False):
    """Rotary settings as the release of transformers spells them."""
    if not HAS_PARAMETERS:
        return {"rope_theta": theta, "rope_scaling": scaling}
    scaled = {**(scaling or {"rope_type": "default"}), "rope_theta": theta}
    plain = {"rope_type": "default", "rope_theta": theta}
    return {"rope_parameters": {"full_attention": scaled, "sliding_attention": plain} if by_type else scaled}


TEXT = {
    "qwen3": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": True, **rope(None, 5e5)}),
    "qwen2": ("Qwen2", {}),
    "llama": ("Llama", rope(LLAMA3, 1e4)),
    "mistral": ("Mistral", {"head_dim": 8, "sliding_window": None}),
    "olmo2": ("Olmo2", rope(LINEAR, 1e4)),
    "olmo3": (
        "Olmo3",
        {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 64,
            **rope(YARN, 5e5, by_type=True),
        },
    ),
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "patch_size": 7,
}
LAYERS = (-1, -3)
FRESH = ("image_pooling_2d", "image_projector", "new_embedding")


def with_random_values(model):
    """Norms are ones and biases zeros in a fresh model, and whatever mixes them up would go unnoticed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.dim() == 1))
    return model.eval()


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    """Writes the folder of a text model, with the tokenizer, once; returns it with the model."""
    made = {}

    def write(family):
        if family not in made:
            name, settings = TEXT[family]
            config = getattr(transformers, f"{name}Config")(**{**SIZES, **settings})
            config._attn_implementation = "eager"
            model = with_random_values(getattr(transformers, f"{name}ForCausalLM")(config))
            folder = tmp_path_factory.mktemp("text") / family
            model.save_pretrained(folder, max_shard_size="40KB" if family == "llama" else "5GB")
            write_base_tokenizer(folder)
            made[family] = folder, model
        return made[family]

    return write


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory):
    config = transformers.SiglipVisionConfig(**VISION, image_size=30)
    model = with_random_values(transformers.SiglipVisionModel(config))
    folder = tmp_path_factory.mktemp("vision") / "siglip"
    model.save_pretrained(folder)
    return folder, model


def build(text_folder, vision_folder, output, **options):
    warnings = []
    parts = Parts(text_folder, vision_folder, vit_layers=LAYERS)
    plan = build_from_parts(parts, output, ConversionOptions(**options), warn=warnings.append)
    assert warnings == []
    return plan


@pytest.mark.parametrize("family", TEXT)
def test_text_is_that_of_its_source_layer_by_layer(text_model, vision_model, tmp_path, family):
    folder, source = text_model(family)
    plan = build(folder, vision_model[0], tmp_path / "out")
    model = Molmo2ForConditionalGeneration.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    ids = torch.randint(0, VOCAB_SIZE, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = source(ids, output_hidden_states=True)
        found = model(ids, output_hidden_states=True)
    assert len(found.hidden_states) == len(expected.hidden_states) == 4
    for own, given in zip(found.hidden_states, expected.hidden_states):
        torch.testing.assert_close(own, given, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.logits[..., :VOCAB_SIZE], expected.logits, rtol=1e-4, atol=1e-4)
    has_window = any("64 tokens in some layers" in warning for warning in plan.source.config.warnings)
    assert has_window == (family == "olmo3")


def patches_of(images, patch):
    """(B, 3, H, W) -> (B, patches, patch * patch * 3): row, column, channel."""
    rows = images.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, 3, rows, cols, patch, patch)
    return rows.permute(0, 2, 3, 4, 5, 1).reshape(images.shape[0], -1, patch * patch * 3)


@torch.no_grad()
def encoder_outputs(source, *inputs):
    """What each layer of a SigLIP returns; releases differ in what they call hidden states."""
    outputs = []
    model = getattr(source, "vision_model", source)
    hooks = [
        layer.register_forward_hook(
            lambda _, __, output: outputs.append(output[0] if isinstance(output, tuple) else output)
        )
        for layer in model.encoder.layers
    ]
    source(*inputs)
    for hook in hooks:
        hook.remove()
    return outputs


def hidden_states_of(output, pixels):
    tower = Molmo2ForConditionalGeneration.from_pretrained(output).eval().model.vision_backbone.image_vit
    with torch.no_grad():
        return tower(pixels)


@pytest.mark.parametrize("form", ["vision part", "whole model"])
def test_vision_is_that_of_siglip(text_model, vision_model, tmp_path, form):
    folder, source = vision_model
    if form == "whole model":
        text = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "vocab_size": 50}
        config = transformers.SiglipConfig(text_config=text, vision_config=source.config.to_dict())
        source = with_random_values(transformers.SiglipModel(config)).vision_model
        folder = tmp_path / "siglip"
        config.architectures = ["SiglipModel"]
        whole = transformers.SiglipModel(config)
        whole.vision_model.load_state_dict(source.state_dict())
        whole.save_pretrained(folder)
    build(text_model("qwen3")[0], folder, tmp_path / "out")
    images = torch.randn(2, 3, 30, 30, generator=torch.Generator().manual_seed(2))
    expected = encoder_outputs(source, images)
    found = hidden_states_of(tmp_path / "out", patches_of(images[:, :, :28, :28], 7))
    for layer, own in zip(LAYERS, found):
        torch.testing.assert_close(own, expected[layer], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shards", ["5GB", "20KB"], ids=["one file", "several files"])
def test_position_ids_of_older_towers_are_left_out(text_model, vision_model, tmp_path, shards):
    """Older releases of transformers stored them, as int64; any other tensor of whole numbers is refused."""
    build(text_model("qwen3")[0], vision_model[0], tmp_path / "expected")
    own = dict(vision_model[1].state_dict())
    prefix = next(name for name in own if name.endswith("patch_embedding.weight")).removesuffix(
        "patch_embedding.weight"
    )
    older, other = ({**own, f"{prefix}{name}": torch.arange(16)[None]} for name in ("position_ids", "other_ids"))
    for name, weights in (("older", older), ("other", other)):
        vision_model[1].save_pretrained(tmp_path / name, state_dict=weights, max_shard_size=shards)
    stored = [path for path in (tmp_path / "older").glob("*.safetensors") if "position_ids" in str(load_file(path))]
    assert len(stored) == 1
    build(text_model("qwen3")[0], tmp_path / "older", tmp_path / "out")
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "expected"))
    assert found.keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in found.items())
    with pytest.raises(UnsupportedError, match="other_ids' is 'I64'; expected one of"):
        build(text_model("qwen3")[0], tmp_path / "other", tmp_path / "refused")


def test_vision_is_that_of_siglip_2_for_any_shape(text_model, tmp_path):
    config = transformers.Siglip2VisionConfig(**VISION, num_patches=16)
    config._attn_implementation = "eager"
    source = with_random_values(transformers.Siglip2VisionModel(config))
    source.save_pretrained(tmp_path / "siglip2")
    build(text_model("qwen3")[0], tmp_path / "siglip2", tmp_path / "out")
    pixels = torch.randn(1, 16, 147, generator=torch.Generator().manual_seed(2))
    mask, shapes = torch.ones(1, 16, dtype=torch.long), torch.tensor([[4, 4]])
    expected = encoder_outputs(source, pixels, mask, shapes)
    for layer, own in zip(LAYERS, hidden_states_of(tmp_path / "out", pixels)):
        torch.testing.assert_close(own, expected[layer], rtol=1e-4, atol=1e-4)


def test_what_is_new_comes_from_the_seed(text_model, vision_model, tmp_path):
    folder = text_model("qwen3")[0]
    written = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_from_parts(Parts(folder, vision_model[0], seed, LAYERS), tmp_path / name)
        written[name] = load_file(tmp_path / name / "model.safetensors")
    assert all(torch.equal(written["a"][name], written["b"][name]) for name in written["a"])
    changed = {name for name, value in written["a"].items() if not torch.equal(value, written["c"][name])}
    assert changed == {name for name in written["a"] if any(part in name for part in FRESH) and "bias" not in name}
    for name in changed:
        assert 0.015 < written["a"][name].std() < 0.025
    card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert "# Molmo2 (qwen3 + siglip)" in card
    assert "Built from the text model and the vision transformer below" in card
    assert "> The connector between vision and text" in card
    header = yaml.safe_load(card.split("---\n")[1])
    assert header.keys().isdisjoint({"datasets", "base_model", "license"})  # nothing is known of them
    assert "add `base_model`" in card
    assert "add `license`" in card
    native = (tmp_path / "a" / "native_config.yaml").read_text(encoding="utf-8")
    assert str(folder.parent) not in native


def test_bfloat16_stays_as_it_is(text_model, vision_model, tmp_path):
    folder = tmp_path / "text"
    shutil.copytree(text_model("qwen2")[0], folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: value.bfloat16() for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    build(folder, vision_model[0], tmp_path / "out", dtype="bfloat16")
    found = load_file(tmp_path / "out" / "model.safetensors")
    own = "model.layers.1.self_attn.{}_proj.bias"
    joined = torch.cat([weights[own.format(part)] for part in "qkv"]).bfloat16()
    assert torch.equal(found["model.transformer.blocks.1.self_attn.att_proj.bias"], joined)
    weights["model.layers.1.self_attn.q_proj.bias"] = weights["model.layers.1.self_attn.q_proj.bias"].float()
    mixed = {name: value if "q_proj" in name else value.bfloat16() for name, value in weights.items()}
    save_file(mixed, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedError, match=r"belong into one matrix, but differ: .*float32.*bfloat16"):
        build(folder, vision_model[0], tmp_path / "mixed")


def test_the_command_line(text_model, vision_model, tmp_path, capsys):
    arguments = ["--from-parts", "--llm", str(text_model("qwen3")[0]), "--vision", str(vision_model[0])]
    arguments += [str(tmp_path / "out"), "--vit-layers=-1,-3", "--seed", "3"]
    assert main([*arguments, "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--verify", "--probe"]) == 0
    printed = capsys.readouterr()
    assert "fresh connector of seed 3" in printed.out
    assert "equal the checkpoint (names, shapes, SHA-256)" in printed.out
    assert "Probed: logits differ by" in printed.out
    assert "noise until they are trained" in printed.err
    assert main([*arguments, "--verify", "--seed", "4"]) == 6
    assert main([*arguments, "--verify"]) == 0
    assert main([str(tmp_path / "out"), str(tmp_path / "native"), "--to-native"]) == 0  # for the trainer


# The config.json of the parts that the published models were built from, as on the Hub.
QWEN3_4B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 9728,
    "max_position_embeddings": 262144,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
OLMO3_7B = {
    **{name: QWEN3_4B[name] for name in ("attention_bias", "attention_dropout", "hidden_act", "initializer_range")},
    "architectures": ["Olmo3ForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 8,
    "max_position_embeddings": 65536,
    "model_type": "olmo3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
    },
    "rope_theta": 500000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 100278,
}
SO400M = {
    "model_type": "siglip",
    "text_config": {"hidden_size": 1152},
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
    },
}


@pytest.mark.parametrize(("name", "text"), [("Molmo2-4B", QWEN3_4B), ("Molmo2-O-7B", OLMO3_7B)])
def test_published_parts_have_the_settings_of_the_published_model(name, text):
    section, _ = settings_of_parts(Path("text"), text, vision_settings(SO400M), (-3, -9), ())
    config = parse_config(section, max_positions=36864)
    published = read_json(PUBLISHED / name / "config.json")
    ids = dict.fromkeys(EXTRA_TOKENS, 0)
    found = config_files.model_config(config, dtype="float32", attention="sdpa", token_ids=ids)
    for part in ("text_config", "vit_config", "adapter_config"):
        assert found[part] == published[part]
    files = {
        "preprocessor_config.json": config_files.preprocessor_config(config),
        "video_preprocessor_config.json": config_files.video_preprocessor_config(config),
        "processor_config.json": config_files.processor_config(config),
    }
    for file, content in files.items():
        expected = {
            key: value for key, value in read_json(PUBLISHED / "Molmo2-4B" / file).items() if key != "auto_map"
        }
        assert {key: content[key] for key in expected} == expected
    tensors = read_json(PUBLISHED / name / "tensors.json")
    expected = {
        target.format(layer): entry["shape"]
        for target, entry in tensors.items()
        for layer in range(entry.get("layers", 1))
    }
    assert {rename.target: list(rename.shape) for rename in expected_renames(config)} == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out"], "two arguments are required: CHECKPOINT and OUTPUT"),
        (["--from-parts", "out"], "needs --llm and --vision"),
        (["--from-parts", "--llm", "a", "--vision", "b", "checkpoint", "out"], "takes OUTPUT alone"),
        (["--from-parts", "--llm", "a", "--vision", "b", "out", "--resume"], "not available with"),
        (["checkpoint", "out", "--seed", "1"], "--seed: only available with --from-parts"),
        (["--from-parts", "--llm", "a", "--vision", "b", "out", "--seed", "-1"], "not a whole number of 0 or more"),
        (["--from-parts", "--llm", "a", "--vision", "b", "out", "--vit-layers=x"], "not a list of layers"),
    ],
)
def test_arguments_that_do_not_fit_together(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(arguments)
    assert message in capsys.readouterr().err


TEXT_REFUSALS = {
    "attention_bias": ({"attention_bias": True}, "`attention_bias` is True; only False"),
    "act": ({"hidden_act": "gelu"}, "`hidden_act` is 'gelu'; only 'silu'"),
    "family": ({"model_type": "gemma3"}, "model_type is 'gemma3'; expected one of qwen3"),
    "unknown": ({"logit_cap": 30}, "`logit_cap` is unknown .*--ignore-field logit_cap"),
    "scaling": ({"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "rotary scaling 'dynamic' is none of"),
    "quantized": ({"quantization_config": {"bits": 4}}, "`quantization_config` is"),
    "missing": ({"rms_norm_eps": ...}, "lacks rms_norm_eps"),
    "rows": ({"vocab_size": 300}, r"embedding' has shape \(277, 32\)"),
    "layers": ({"num_hidden_layers": 4}, "'model.layers.3.input_layernorm.weight' is missing"),
    "fewer layers": ({"num_hidden_layers": 2}, "'model.layers.2.*unknown to a 'qwen3' text model"),
}
VISION_REFUSALS = {
    "family": ({"model_type": "clip_vision_model"}, "model_type is 'clip_vision_model'"),
    "channels": ({"num_channels": 1}, "`num_channels` is 1"),
    "unknown": ({"use_rope": True}, "`use_rope` is unknown"),
    "grid": ({"image_size": 37}, r"positional_embedding' has shape \(16, 24\)"),
    "patch": ({"patch_size": 6, "image_size": 24}, r"expected \(width, 3, 6, 6\)"),
    "depth": ({"num_hidden_layers": 2}, r"vit_layers is \[-1, -3\]; expected layers from -2"),
}


def changed_copy(folder, target, changes):
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config = {name: value for name, value in {**config, **changes}.items() if value is not ...}
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return target


@pytest.mark.parametrize("case", TEXT_REFUSALS)
def test_a_text_model_that_cannot_be_expressed(text_model, vision_model, tmp_path, case):
    changes, message = TEXT_REFUSALS[case]
    folder = changed_copy(text_model("qwen3")[0], tmp_path / "text", changes)
    with pytest.raises(UnsupportedError, match=message):
        build(folder, vision_model[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", VISION_REFUSALS)
def test_a_vision_model_that_cannot_be_expressed(text_model, vision_model, tmp_path, case):
    changes, message = VISION_REFUSALS[case]
    folder = changed_copy(vision_model[0], tmp_path / "vision", changes)
    with pytest.raises(UnsupportedError, match=message):
        build(text_model("qwen3")[0], folder, tmp_path / "out")


def test_a_tokenizer_without_turns_is_warned_about(text_model, vision_model, tmp_path):
    folder = shutil.copytree(text_model("llama")[0], tmp_path / "text")
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(text.replace("<|im_start|>", "<|header|>"), encoding="utf-8")
    plan = build(folder, vision_model[0], tmp_path / "out")
    assert "The tokenizer has no <|im_start|>, with which" in plan.source.config.warnings[-1]
    assert "> The tokenizer has no <|im_start|>, with which" in (tmp_path / "out" / "README.md").read_text()


def test_unknown_settings_can_be_accepted(text_model, vision_model, tmp_path):
    folder = changed_copy(text_model("qwen3")[0], tmp_path / "text", {"note": "mine"})
    build(folder, vision_model[0], tmp_path / "out", ignored_fields=("note",))
    with pytest.raises(CheckpointError, match=r"is not a folder\. Download the part first"):
        build(tmp_path / "nowhere", vision_model[0], tmp_path / "other")
