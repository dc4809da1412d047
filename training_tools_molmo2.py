"""What a processor offers for training - examples, batches, packing - without any import by hand."""

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor

from .collator_molmo2 import Molmo2DataCollator
from .finetuning_molmo2 import LearningRates, trainer_class
from .loss_weighting_molmo2 import TokenWeighting
from .packer_molmo2 import PackedDataset, Packer
from .training_molmo2 import build_training_example, training_example


class TrainingTools:
    """Methods of `Molmo2Processor` around training.

    Attributes:
        token_weighting: The class of weights of answers: `processor.token_weighting()` are those of the recipe.
        packer: The class that fills rows: `processor.packer(max_tokens=16384, max_crops=128)`.
        learning_rates: The class of rates of the parts: `processor.learning_rates(text=1e-4)`.
        trainer_class: `Trainer`, or TRL's, for Molmo2: `processor.trainer_class(Trainer)`; see `finetuning_molmo2`.
    """

    token_weighting = TokenWeighting
    packer = Packer
    learning_rates = LearningRates
    trainer_class = staticmethod(trainer_class)

    def build_training_example(
        self,
        messages: Any,
        *,
        weighting: TokenWeighting | None = None,
        max_length: int | None = None,
        chat_template: str | None = None,
        **options: Any,
    ) -> dict[str, Tensor]:
        """A conversation, or a tree of them, as one row to train on.

        Args:
            messages: A conversation as for `apply_chat_template`, with the answers. Or a list of conversations about
                the same pictures, which become branches that do not see each other; the first one names the pictures,
                the others name the same ones or none. A message of the assistant may carry `loss_weight`, the weight
                of its tokens (0: it is read and not learnt), and messages a `style`.
            weighting: Weights of the tokens of answers; None weighs all alike.
            max_length: Most tokens of a conversation; the end is cut off.
            options: Of the image and the video processor: `max_crops`, `num_frames`, ...
        Returns:
            (S,) `input_ids`, `labels` (-100 where nothing is learnt) int64, `token_type_ids` bool; with weights
            `loss_weights` float32, of a tree `branch_ids` int64; and the pictures, as the call returns them.
            `data_collator` makes batches of such examples.
        Raises:
            ValueError: No answer to learn, messages without role or content, a template without `{% generation %}`,
                branches about other pictures, visual tokens past `max_length`, weights that are no numbers from 0 on,
                and whatever the call raises.
        """
        return build_training_example(
            self, messages, weighting=weighting, max_length=max_length, chat_template=chat_template, **options
        )

    def data_collator(self, **settings: Any) -> Molmo2DataCollator:
        """What makes batches of examples or of rows of a data set; see `collator_molmo2.Molmo2DataCollator`."""
        return Molmo2DataCollator(self, **settings)

    def packed_dataset(self, source: Iterable[Any], packer: Packer, **options: Any) -> PackedDataset:
        """Rows of a data set as packs; see `packer_molmo2.PackedDataset`.

        Args:
            source: Rows with `messages`, or built examples; see `training_molmo2.training_example`.
            options: Of `build_training_example`.
        """
        return PackedDataset(source, packer, partial(training_example, self, **options))
