"""Writes a miniature Molmo2: the published layout and token order, a few small layers, weights from a seed.

Its words mean nothing, but every mechanism of the published models is there: 378-pixel crops of 27x27 patches, tiling,
pooling, both embedding tables, the visual tokens right after the base vocabulary.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

REPOSITORY = Path(__file__).resolve().parent.parent.parent

VOCAB_SIZE = 512
CHAT_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MOLMO2_TOKENS = [
    "<im_start>",
    "<im_end>",
    "<im_patch>",
    "<im_col>",
    "<low_res_im_start>",
    "<|image|>",
    "<im_low>",
    "<frame_start>",
    "<frame_end>",
    "<|video|>",
]


def write_tokenizer(folder: Path, special_tokens: list[str]) -> None:
    """A byte-level tokenizer: 256 bytes, three chat tokens, then these.

    Args:
        special_tokens: None for a base tokenizer, as a text model comes with; `filler()` and Molmo2's ten tokens for
            that of a finished checkpoint.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(token, special=True, normalized=False) for token in [*CHAT_TOKENS, *special_tokens]]
    tokenizer.add_special_tokens(added)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_end|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings)


def filler() -> list[str]:
    """Names for the rows between the chat tokens and `VOCAB_SIZE`."""
    return [f"|<EXTRA_TOKENS_{i}>|" for i in range(VOCAB_SIZE - 256 - len(CHAT_TOKENS))]


def model_settings() -> dict:
    """config.json in the published layout."""
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 10, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return {
        "architectures": ["Molmo2ForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": "configuration_molmo2.Molmo2Config",
            "AutoModel": "modeling_molmo2.Molmo2Model",
            "AutoModelForImageTextToText": "modeling_molmo2.Molmo2ForConditionalGeneration",
            "AutoModelForMultimodalLM": "modeling_molmo2.Molmo2ForConditionalGeneration",
        },
        "model_type": "molmo2",
        "dtype": "float32",
        "vit_config": {**vision, **heads, "image_default_input_size": [378, 378], "image_num_pos": 729},
        "adapter_config": {
            **heads,
            "hidden_size": 64,
            "head_dim": 16,
            "intermediate_size": 128,
            "text_hidden_size": 64,
        },
        "text_config": {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": VOCAB_SIZE,
            "additional_vocab_size": 128,
            "num_hidden_layers": 3,
            "intermediate_size": 128,
            "max_position_embeddings": 36864,
            "rope_theta": 1000000.0,
        },
        "image_start_token_id": VOCAB_SIZE,
    }


def write_weights(folder: Path) -> None:
    """Seeded weights under the published names, scaled so that answers vary."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    config.save_pretrained(folder)  # with every setting spelled out, as published files have it
    model = AutoModelForImageTextToText.from_config(config, trust_remote_code=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in model.state_dict().items():
        is_norm = "norm" in name or name.endswith("ln_f.weight")
        noise = torch.randn(tensor.shape, generator=generator)
        fan_in = tensor.shape[-1] if tensor.dim() > 1 and "embedding" not in name else 1
        tensors[name] = 1 + 0.1 * noise if is_norm and name.endswith("weight") else noise * fan_in**-0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_miniature(folder: Path, sizes: dict[str, dict] | None = None) -> Path:
    """Write a complete checkpoint folder, remote code included; about 2 MB.

    Args:
        folder: Created; an existing one is replaced.
        sizes: What takes the place of values of `model_settings`, by part: {"text_config": {...}, ...}.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for source in [*REPOSITORY.glob("*_molmo2.py"), REPOSITORY / "chat_template.jinja"]:
        shutil.copy(source, folder)
    write_tokenizer(folder, [*filler(), *MOLMO2_TOKENS])
    settings = model_settings()
    for part, values in (sizes or {}).items():
        settings[part].update(values)
    write_json(folder / "config.json", settings)
    write_json(folder / "generation_config.json", {"bos_token_id": 258, "eos_token_id": 258, "pad_token_id": 256})
    processor = {"auto_map": {"AutoProcessor": "processing_molmo2.Molmo2Processor"}, "use_frame_special_tokens": False}
    write_json(folder / "processor_config.json", {**processor, "use_single_crop_col_tokens": False})
    write_json(folder / "preprocessor_config.json", {"max_crops": 8})
    write_json(folder / "video_preprocessor_config.json", {"num_frames": 384, "max_fps": 2.0})
    write_weights(folder)
    AutoProcessor.from_pretrained(folder, trust_remote_code=True).save_pretrained(folder)
    return folder
