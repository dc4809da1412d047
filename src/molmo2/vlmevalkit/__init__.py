"""A model for VLMEvalKit: `python -m molmo2.vlmevalkit --model_args pretrained=allenai/Molmo2-4B --data MMStar`.

VLMEvalKit has no entry points: `register` adds the model to its table before its own runner starts.
"""

from typing import Any

NAME = "molmo2"


def register(name: str = NAME, **options: Any) -> None:
    """Add the model to VLMEvalKit's `supported_VLM`; it is loaded when a run asks for it.

    Args:
        name: As `--model` and the folders of results name it.
        options: Of `molmo2.vlmevalkit.model.Molmo2`, `pretrained` among them.
    """
    import functools

    from vlmeval.config import supported_VLM

    from molmo2.vlmevalkit.model import Molmo2

    supported_VLM[name] = functools.partial(Molmo2, **options)
