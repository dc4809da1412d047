"""Fine-tuning: training examples, batches, packing, loss weights, learning rates, adapters and trainers.

from molmo2.training import DataCollator, lora_targets

collator = DataCollator(processor)
"""

from molmo2.training.collator import DataCollator
from molmo2.training.examples import build_training_example, example_from_feature, messages_from_row
from molmo2.training.finetuning import (
    LearningRates,
    freeze,
    fsdp_config,
    lora_targets,
    parameter_groups,
    unfreeze,
)
from molmo2.training.packed_mixture import PackedMixture
from molmo2.training.packer import Pack, PackedDataset, Packer, PackingReport
from molmo2.training.preferences import PreferenceCollator
from molmo2.training.resuming import SaveMixture, resume_mixture
from molmo2.training.trainer import trainer_class
from molmo2.training.weighting import TokenWeighting

__all__ = [
    "DataCollator",
    "LearningRates",
    "Pack",
    "PackedDataset",
    "PackedMixture",
    "Packer",
    "PackingReport",
    "PreferenceCollator",
    "SaveMixture",
    "TokenWeighting",
    "build_training_example",
    "example_from_feature",
    "freeze",
    "fsdp_config",
    "lora_targets",
    "messages_from_row",
    "parameter_groups",
    "resume_mixture",
    "trainer_class",
    "unfreeze",
]
