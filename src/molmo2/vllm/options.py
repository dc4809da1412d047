"""Which options of the processor a server and its requests may set (`mm_processor_kwargs`)."""

from collections.abc import Mapping
from typing import Any

from molmo2.processing.processor import CALL_DEFAULTS, Molmo2Processor

# The others change the shape of what the model gets, which is the same for all requests of an engine.
IMAGE_OPTIONS = frozenset({"max_crops"})
VIDEO_OPTIONS = frozenset(
    {"clip", "do_sample_frames", "fps", "frame_sample_mode", "max_fps", "num_frames", "sampling_fps"}
)
OPTIONS = {"text_kwargs": frozenset[str](), "images_kwargs": IMAGE_OPTIONS, "videos_kwargs": VIDEO_OPTIONS}
COUNTS = ("max_crops", "num_frames")  # of at least one token each


def sorted_options(options: Mapping[str, Any], longest: int) -> dict[str, dict[str, Any]]:
    """Options by modality, checked before anything is allocated or decoded.

    Args:
        options: Flat, or nested in `images_kwargs` and `videos_kwargs`.
        longest: Tokens that a prompt may have.
    Raises:
        ValueError: An option is not one of these, is given twice, or asks for more than a prompt can hold.
    """
    known = IMAGE_OPTIONS | VIDEO_OPTIONS | OPTIONS.keys()
    unknown = [name for name in options if name not in known]
    nested = {name: dict(options.get(name) or {}) for name in OPTIONS}
    unknown += [f"{name}.{option}" for name, own in nested.items() for option in own if option not in OPTIONS[name]]
    if unknown:
        raise ValueError(
            f"mm_processor_kwargs has {sorted(unknown)}; expected some of {sorted(IMAGE_OPTIONS | VIDEO_OPTIONS)}. "
            "What else a processor can do is set in the files of the checkpoint."
        )
    by_modality = Molmo2Processor.sort_options({**options, **nested})
    for own in by_modality.values():
        for name in COUNTS:
            value = own.get(name)
            if isinstance(value, int) and value > longest:
                raise ValueError(f"`{name}` is {value}, but a prompt has at most {longest} tokens (max_model_len).")
    return {
        name: {option: value for option, value in own.items() if option not in CALL_DEFAULTS[name]}
        for name, own in by_modality.items()
    }
