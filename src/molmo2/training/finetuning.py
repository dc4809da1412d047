"""What is trained, how fast, and where adapters go: the parts of the model by the names of its parameters."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from molmo2.model.loss import IGNORED

# Parts of the model and what their parameters' names have in common; everything else is text.
VISION_MODULES = {"vision": ("image_vit",), "connector": ("image_pooling_2d", "image_projector")}
PARTS = ("vision", "connector", "text")
# The linear layers of each part, under their published names, for `target_modules` of a `LoraConfig`. The output
# matrix and the embeddings are not among them.
LORA_TARGETS = {
    "vision": r"image_vit\.transformer\.resblocks\.\d+\.(attention\.(wq|wk|wv|wo)|feed_forward\.(w1|w2))",
    "connector": r"(image_pooling_2d\.(wq|wk|wv|wo)|image_projector\.(w1|w2|w3))",
    "text": r"transformer\.blocks\.\d+\.(self_attn\.(att_proj|attn_out)|mlp\.(ff_proj|ff_out))",
}
# Units of FSDP. Only text layers: every process runs all of them in every step. Layers of the vision transformer run
# once per chunk of crops, of which processes have unlike numbers, so their all-gathers would wait for each other.
FSDP_UNITS = ("Molmo2DecoderLayer",)


@dataclass(frozen=True)
class LearningRates:
    """A learning rate for each part, and the settings of AdamW.

    The defaults are those of Molmo's fine-tuning (Deitke et al. 2024, https://arxiv.org/abs/2409.17146); for a fresh
    connector, before it, the rates are 6e-6, 2e-4 and 2e-5. Betas, eps and no weight decay as in the trainer.
    """

    vision: float = 5e-6
    connector: float = 5e-6
    text: float = 1e-5
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-6


def part_of(name: str) -> str:
    """ "vision", "connector" or "text": the part that a parameter belongs to, adapters included."""
    segments = name.split(".")
    return next((part for part, modules in VISION_MODULES.items() if set(modules) & set(segments)), "text")


def _parameters_of(model: Any, parts: tuple[str, ...]) -> Iterator[nn.Parameter]:
    unknown = sorted(set(parts) - set(PARTS))
    if unknown or not parts:
        raise ValueError(f"Parts of the model are {list(PARTS)}; found {unknown or 'none'}.")
    return (parameter for name, parameter in model.named_parameters() if part_of(name) in parts)


def freeze(model: Any, *parts: str) -> None:
    """Keep parts of the model as they are: "vision" (transformer), "connector", "text" (embeddings and all).

    Raises:
        ValueError: For another name, or none.
    """
    for parameter in _parameters_of(model, parts):
        parameter.requires_grad_(False)


def unfreeze(model: Any, *parts: str) -> None:
    """Train parts of the model; see `freeze`."""
    for parameter in _parameters_of(model, parts):
        parameter.requires_grad_(True)


def parameter_groups(model: Any, rates: LearningRates | None = None) -> list[dict[str, Any]]:
    """Groups for an optimizer: for each part that is trained its parameters and its learning rate."""
    rates = LearningRates() if rates is None else rates
    groups: dict[str, list[nn.Parameter]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[part_of(name)].append(parameter)
    return [
        {"name": part, "params": parameters, "lr": getattr(rates, part), "weight_decay": rates.weight_decay}
        for part, parameters in groups.items()
        if parameters
    ]


def lora_targets(*parts: str) -> str:
    """A pattern of module names for `LoraConfig(target_modules=...)`; without parts, of all of them.

    Raises:
        ValueError: For another name.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ValueError(f"Parts of the model are {list(PARTS)}; found {unknown}.")
    return r"(.*\.)?(" + "|".join(LORA_TARGETS[part] for part in parts or PARTS) + ")"


def fsdp_config(**settings: Any) -> dict[str, Any]:
    """Settings of FSDP2 for `TrainingArguments(fsdp="full_shard auto_wrap", fsdp_config=...)`.

    Args:
        settings: Further ones, or others in the place of these.
    """
    return {"fsdp_version": 2, "transformer_layer_cls_to_wrap": list(FSDP_UNITS), **settings}


def trainer_class(base: type, rates: LearningRates | None = None) -> type:
    """A `Trainer`, or a trainer made from it such as TRL's, that knows about Molmo2's training.

    Where batches have `loss_weights`, a step divides by the sum of the weights of all its batches, on all devices: a
    `Trainer` counts labels. A label of a batch without weights counts 1.

    Args:
        base: `transformers.Trainer`, `trl.SFTTrainer`, ...
        rates: A learning rate for each part of the model. None: the arguments' own for all of it.
    Raises:
        ValueError: From the trainer, for arguments with `label_smoothing_factor`.
    """
    from transformers import Trainer

    class Molmo2Trainer(base):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            if self.args.label_smoothing_factor:
                raise ValueError(
                    f"`label_smoothing_factor` is {self.args.label_smoothing_factor}; expected 0. The smoothed loss "
                    "of transformers compares each token with its own label instead of the next one, as it does not "
                    "know this class."
                )

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
            batches, number = super().get_batch_samples(*args, **kwargs)
            if number is None:  # labels were not counted, in no process
                return batches, number
            sums = sum(_weights_and_labels(batch) for batch in batches).to(self.args.device)
            if self.args.average_tokens_across_devices:  # in every process, whether or not its batches have weights
                sums = self.accelerator.gather(sums).view(-1, 2).sum(0)
            return batches, number * (sums[0] / sums[1].clamp(min=1))

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if "loss_weights" in inputs:  # TRL's own loss knows no weights, that of the model does
                if not model.training:  # the trainer counted the labels of the batch, the model adds up its weights
                    kwargs["num_items_in_batch"] = None
                return Trainer.compute_loss(self, model, inputs, *args, **kwargs)
            return super().compute_loss(model, inputs, *args, **kwargs)

        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            if rates is None or self.optimizer is not None:
                return super().create_optimizer(*args, **kwargs)
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args)
            own = {"betas": rates.betas, "eps": rates.eps}
            settings = {name: own.get(name, value) for name, value in settings.items()}  # not every optimizer has them
            model = self.accelerator.unwrap_model(self.model)
            self.optimizer = optimizer_class(_base_model(model).parameter_groups(rates), **settings)
            return self.optimizer

    Molmo2Trainer.__name__ = f"Molmo2{base.__name__}"
    return Molmo2Trainer


def _weights_and_labels(batch: dict[str, Any]) -> Tensor:
    """(2,) the sum of a batch's weights, 1 for each label where it has none, and the number of its labels."""
    learnt = batch["labels"] != IGNORED
    return torch.stack([batch.get("loss_weights", learnt).float().sum(), learnt.float().sum()])


def _base_model(model: Any) -> Any:
    """The model under its adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
