"""ms-swift with the inputs that the models were trained on: its own template for Molmo2 makes others.

    swift sft ... --model_type molmo2 --external_plugins examples/ms_swift_template.py --template molmo2_as_trained

ms-swift's "molmo2" begins without the first token, puts images inside the user's turn, does not number several images,
and learns the line break after an answer. Here rows become what `molmo2.training.DataCollator` makes of them. For
training alone: `molmo2.load` and `molmo2.ask` take the result. docs/training.md has the whole command.
"""

import re
from typing import Any

from swift.template import register_template
from swift.template.templates.molmo import Molmo2Template
from swift.template.templates.utils import ChatmlTemplateMeta

from molmo2.training import build_training_example

NAME = "molmo2_as_trained"
MEDIA = re.compile("<(image|video)>")


def conversation(inputs: Any) -> list[dict[str, Any]]:
    """Messages with their images and videos in the places of ms-swift's tags."""
    media = {"image": iter(inputs.images), "video": iter(inputs.videos)}
    messages = [{"role": "system", "content": inputs.system}] if inputs.system else []
    for message in inputs.messages:
        parts = MEDIA.split(message["content"])
        content = []
        for text, kind in zip(parts[::2], [*parts[1::2], None], strict=True):
            content += [{"type": "text", "text": text}] if text else []
            content += [{"type": kind, kind: next(media[kind])}] if kind else []
        messages.append({**message, "content": content})
    return messages


class AsTrained(Molmo2Template):
    """Rows of ms-swift as `build_training_example` has them."""

    def _encode(self, inputs: Any) -> dict[str, Any]:
        if not self.is_training:
            raise ValueError(f"The template {NAME!r} is for training. Ask with `molmo2.ask` or another engine.")
        if self.padding_free or self._loss_scale != "default" or any("loss" in message for message in inputs.messages):
            raise ValueError(
                f"The template {NAME!r} takes rows one by one and learns every answer: leave out `--packing`, "
                "`--padding_free`, `--loss_scale` and keys like `loss` of messages."
            )
        example = build_training_example(self.processor, conversation(inputs))
        columns = {name: example.pop(name).tolist() for name in ("input_ids", "labels", "token_type_ids")}
        return {**columns, "loss_scale": None, **example}


register_template(ChatmlTemplateMeta(NAME, template_cls=AsTrained))
