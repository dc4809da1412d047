"""axolotl with Molmo2: which class loads it, and what of a conversation is learned. docs/training.md has the settings.

    plugins:
      - axolotl_plugin.Molmo2Plugin  # this file's folder is on the PYTHONPATH

Without it axolotl 0.19 takes the checkpoint for a text model, and learns questions too; its own `role_boundaries` stop
with a TypeError.
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from axolotl.model_support.base import ModelSupport
from axolotl.model_support.profile import ModelProfile, ModelStrategyOverrides
from axolotl.model_support.registry import register_model_support
from axolotl.model_support.templates import IMAGE_TEXT_TO_TEXT
from axolotl.processing_strategies import ProcessingStrategy, RoleBoundary

ROLES = ("system", "user", "assistant")


class Molmo2Strategy(ProcessingStrategy):
    """Learns the answers and their ends."""

    def _build_role_boundaries(self) -> list[RoleBoundary]:
        def ids(text: str) -> list[int]:
            return self.processor.tokenizer.encode(text, add_special_tokens=False)

        end = ids("<|im_end|>")
        return [RoleBoundary(role, ids(f"<|im_start|>{role}\n"), end) for role in ROLES]


class Molmo2Support(ModelSupport):
    """What axolotl asks about a `model_type`."""

    model_types = ("molmo2",)
    profile = ModelProfile(
        family=IMAGE_TEXT_TO_TEXT,
        strategies=ModelStrategyOverrides(processing_strategy_cls=lambda: Molmo2Strategy),
    )


class Molmo2Plugin(BasePlugin):
    """Makes the above known, before axolotl reads the checkpoint's configuration."""

    def register(self, cfg: Any) -> None:
        register_model_support(Molmo2Support)
