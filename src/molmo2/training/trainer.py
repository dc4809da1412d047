"""A `Trainer` for Molmo2: loss weights across accumulated batches, and a learning rate for each part of the model."""

from typing import Any

import torch
from torch import Tensor

from molmo2.model.loss import IGNORED
from molmo2.training.finetuning import LearningRates, parameter_groups


def trainer_class(base: type, rates: LearningRates | None = None) -> type:
    """A subclass of a trainer that handles `loss_weights` and learning rates by part.

    Where batches have `loss_weights`, a step divides by the sum of the weights of all its batches, on all devices; a
    plain `Trainer` counts labels. Labels of batches without weights count 1 each.

    Args:
        base: `transformers.Trainer`, `trl.SFTTrainer`, ...
        rates: A learning rate for each part of the model. None: the rate of the training arguments for all parts.
    Raises:
        ValueError: When the trainer is created with `label_smoothing_factor`.
    """
    from transformers import Trainer

    class Molmo2Trainer(base):
        """The subclass; see `trainer_class`."""

        optimizer: Any

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            if self.args.label_smoothing_factor:
                raise ValueError(
                    f"`label_smoothing_factor` is {self.args.label_smoothing_factor}; expected 0. The smoothed loss "
                    "of transformers compares each token with its own label instead of the next one, as it does not "
                    "know this class."
                )

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
            """The batches of a step, and the sum of their weights in place of the number of their labels."""
            batches, num_items = super().get_batch_samples(*args, **kwargs)
            if num_items is None:  # labels were not counted, in no process
                return batches, num_items
            sums = torch.stack([_weights_and_labels(batch) for batch in batches]).sum(0).to(self.args.device)
            if self.args.average_tokens_across_devices:  # in every process, whether or not its batches have weights
                sums = self.accelerator.gather(sums).view(-1, 2).sum(0)
            return batches, num_items * (sums[0] / sums[1].clamp(min=1))

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            """The loss of the model itself where there are weights: TRL's own loss ignores them."""
            if "loss_weights" in inputs:
                if not model.training:  # the trainer counted the labels of the batch; the model sums its weights
                    kwargs["num_items_in_batch"] = None
                return Trainer.compute_loss(self, model, inputs, *args, **kwargs)
            return super().compute_loss(model, inputs, *args, **kwargs)

        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            """The optimizer of the arguments, with a parameter group for each part of the model."""
            if rates is None or self.optimizer is not None:
                return super().create_optimizer(*args, **kwargs)
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args)
            own = {"betas": rates.betas, "eps": rates.eps}
            settings = {name: own.get(name, value) for name, value in settings.items()}  # not every optimizer has them
            model = _base_model(self.accelerator.unwrap_model(self.model))
            self.optimizer = optimizer_class(parameter_groups(model, rates), **settings)
            return self.optimizer

    Molmo2Trainer.__name__ = f"Molmo2{base.__name__}"
    return Molmo2Trainer


def _weights_and_labels(batch: dict[str, Any]) -> Tensor:
    """(2,) the sum of the loss weights of a batch, 1 per label where it has none, and the number of its labels."""
    is_target = batch["labels"] != IGNORED
    return torch.stack([batch.get("loss_weights", is_target).float().sum(), is_target.float().sum()])


def _base_model(model: Any) -> Any:
    """The model without the PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
