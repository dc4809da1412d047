"""ms-swift with the inputs that the models were trained on: its own template for Molmo2 makes others.

    swift sft ... --model_type molmo2 --external_plugins examples/ms_swift_template.py --template molmo2_as_trained

ms-swift's "molmo2" begins without the first token, puts images inside the user's turn, does not number several images,
and learns the line break after an answer. Here rows become what `molmo2.training.DataCollator` makes of them. For
training alone: `molmo2.load` and `molmo2.ask` take the result. docs/training.md has the whole command.
"""

import re
from collections import Counter
from typing import Any

from swift.template import register_template
from swift.template.templates.molmo import Molmo2Template
from swift.template.templates.utils import ChatmlTemplateMeta

from molmo2.training import build_training_example

NAME = "molmo2_as_trained"
MEDIA = re.compile("<(image|video)>")


def conversation(inputs: Any) -> list[dict[str, Any]]:
    """Messages, the system's too, with their images and videos in the places of ms-swift's tags.

    Raises:
        ValueError: There are more tags than images or videos, or fewer.
    """
    given = [{"role": "system", "content": inputs.system}] if inputs.system else []
    given += inputs.messages
    sources = {"image": inputs.images, "video": inputs.videos}
    tags = Counter(kind for message in given for kind in MEDIA.findall(message["content"]))
    for kind, own in sources.items():
        if tags[kind] != len(own):
            raise ValueError(
                f"A row has {tags[kind]} tag(s) `<{kind}>` in its texts and {len(own)} {kind}(s); expected one tag "
                f"for each. Mend the texts or the column `{kind}s`."
            )
    media = {kind: iter(own) for kind, own in sources.items()}
    messages = []
    for message in given:
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
        if self.truncation_strategy not in ("raise", "delete"):  # "delete" reaches templates as "raise"
            raise ValueError(
                f"`--truncation_strategy` is {self.truncation_strategy!r}, which cuts tokens and not what belongs to "
                f"them; the template {NAME!r} expects `delete`, the default. Leave it out, or raise `--max_length`."
            )
        if inputs.objects or inputs.audios:
            found = "objects" if inputs.objects else "audios"
            raise ValueError(
                f"A row has `{found}`; expected none, as the template {NAME!r} does not fill in `<bbox>`, "
                "`<ref-object>` and `<audio>`. Write places into the texts, as `molmo2.grounding` formats them, and "
                "leave out the column."
            )
        example = build_training_example(self.processor, conversation(inputs))
        columns = {name: example.pop(name).tolist() for name in ("input_ids", "labels", "token_type_ids")}
        return {**columns, "loss_scale": None, **example}


register_template(ChatmlTemplateMeta(NAME, template_cls=AsTrained))
