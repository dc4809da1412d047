"""Fine-tuning: training examples, batches, packing, loss weights, learning rates, adapters and trainers.

from molmo2.training import DataCollator, lora_targets

collator = DataCollator(processor)
"""

from molmo2.training.collator import DataCollator
from molmo2.training.context_parallel import (
    RepeatedRows,
    average_gradients,
    context_group,
    context_parallel,
    local_tokens,
)
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
from molmo2.training.pipeline import Pipeline
from molmo2.training.preferences import PreferenceCollator
from molmo2.training.resuming import SaveMixture, resume_mixture
from molmo2.training.tensor_parallel import clip_gradients, full_gradients, full_state_dict, tensor_parallel
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
    "Pipeline",
    "PreferenceCollator",
    "RepeatedRows",
    "SaveMixture",
    "TokenWeighting",
    "average_gradients",
    "build_training_example",
    "clip_gradients",
    "context_group",
    "context_parallel",
    "example_from_feature",
    "freeze",
    "fsdp_config",
    "full_gradients",
    "full_state_dict",
    "local_tokens",
    "lora_targets",
    "messages_from_row",
    "parameter_groups",
    "resume_mixture",
    "tensor_parallel",
    "trainer_class",
    "unfreeze",
]
