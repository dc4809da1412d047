"""The parts of the model (vision, connector, text): freezing, learning rates, LoRA targets, FSDP units.

A parameter belongs to a part by its name, adapters included.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

# Modules of each part; every other parameter belongs to "text".
PART_MODULES = {"vision": ("image_vit",), "connector": ("image_pooling_2d", "image_projector")}
PARTS = ("vision", "connector", "text")
# The linear layers of each part, under their published names, for `target_modules` of a `LoraConfig`; without the
# output matrix and the embeddings.
LORA_TARGETS = {
    "vision": r"image_vit\.transformer\.resblocks\.\d+\.(attention\.(wq|wk|wv|wo)|feed_forward\.(w1|w2))",
    "connector": r"(image_pooling_2d\.(wq|wk|wv|wo)|image_projector\.(w1|w2|w3))",
    "text": r"transformer\.blocks\.\d+\.(self_attn\.(att_proj|attn_out)|mlp\.(ff_proj|ff_out))",
}
# FSDP shards text layers only: every process runs each of them once per step. Layers of the vision transformer run
# once per chunk of crops, and processes have different numbers of chunks, so their all-gathers would deadlock.
FSDP_UNITS = ("Molmo2DecoderLayer",)


@dataclass(frozen=True)
class LearningRates:
    """A learning rate for each part of the model, and the settings of AdamW.

    The defaults are those of Molmo's fine-tuning (Deitke et al. 2024, https://arxiv.org/abs/2409.17146); its
    pre-training, which starts from a fresh connector, uses 6e-6, 2e-4 and 2e-5. Betas, eps and no weight decay as in
    the original trainer.
    """

    vision: float = 5e-6
    connector: float = 5e-6
    text: float = 1e-5
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-6


def part_from_name(name: str) -> str:
    """The part that a parameter belongs to, adapters included: "vision", "connector" or "text"."""
    segments = set(name.split("."))
    return next((part for part, modules in PART_MODULES.items() if segments & set(modules)), "text")


def _check_parts(parts: tuple[str, ...]) -> None:
    unknown = sorted(set(parts) - set(PARTS))
    if unknown or not parts:
        raise ValueError(f"Parts of the model are {list(PARTS)}; found {unknown or 'none'}.")


def _parameters(model: nn.Module, parts: tuple[str, ...]) -> Iterator[nn.Parameter]:
    _check_parts(parts)
    return (parameter for name, parameter in model.named_parameters() if part_from_name(name) in parts)


def freeze(model: nn.Module, *parts: str) -> None:
    """Exclude parts from training: "vision" (the vision transformer), "connector", "text" (embeddings included).

    Raises:
        ValueError: For an unknown part, or none.
    """
    for parameter in _parameters(model, parts):
        parameter.requires_grad_(False)


def unfreeze(model: nn.Module, *parts: str) -> None:
    """Train parts of the model again; the inverse of `freeze`.

    Raises:
        ValueError: For an unknown part, or none.
    """
    for parameter in _parameters(model, parts):
        parameter.requires_grad_(True)


def parameter_groups(model: nn.Module, rates: LearningRates | None = None) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: the trainable parameters of each part with its learning rate."""
    rates = LearningRates() if rates is None else rates
    groups: dict[str, list[nn.Parameter]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[part_from_name(name)].append(parameter)
    return [
        {"name": part, "params": parameters, "lr": getattr(rates, part), "weight_decay": rates.weight_decay}
        for part, parameters in groups.items()
        if parameters
    ]


def lora_targets(*parts: str) -> str:
    """A regular expression of module names for `LoraConfig(target_modules=...)`; without arguments, of all parts.

    Raises:
        ValueError: For an unknown part.
    """
    parts = parts or PARTS
    _check_parts(parts)
    return r"(.*\.)?(" + "|".join(LORA_TARGETS[part] for part in parts) + ")"


def fsdp_config(**settings: Any) -> dict[str, Any]:
    """FSDP2 settings for `TrainingArguments(fsdp="full_shard auto_wrap", fsdp_config=...)`.

    Args:
        settings: Further settings; they override the defaults.
    """
    return {"fsdp_version": 2, "transformer_layer_cls_to_wrap": list(FSDP_UNITS), **settings}
