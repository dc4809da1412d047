"""Options of the image and the video processor in the one form they are stored, saved and compared in.

Callers pass sizes as an int, a pair, a dict or an object of the library, and name options that other processors have.
Plain JSON comes out; what makes no sense is refused by name, what has no effect is warned about.
"""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from transformers.utils import logging

from molmo2.configuration import CHANNELS, UINT8_MEAN, UINT8_STD

logger = logging.get_logger(__name__)

# Steps that are part of what the model was trained on. They cannot be switched: another value is warned about.
FIXED_STEPS = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_center_crop": False,
    "do_pad": False,
    "rescale_factor": 1 / 255,
}
NEAR_MISS = 0.85  # likeness (0..1) from which an unknown name counts as a misspelt option


def plain(value: Any) -> Any:
    """A numpy number as Python's own, so that it can be written as JSON; anything else as it is."""
    return value.tolist() if isinstance(value, np.generic) else value


def per_channel(name: str, value: Any) -> list[float]:
    """Three numbers, one per channel, from three or from one for all."""
    numbers = [float(number) for number in np.ravel(value)]
    if len(numbers) == 1:
        numbers = numbers * CHANNELS
    if len(numbers) != CHANNELS:
        raise ValueError(
            f"{name} has {len(numbers)} numbers. Pass one for all channels or {CHANNELS}, one per channel."
        )
    return numbers


def divisors_per_channel(name: str, value: Any) -> list[float]:
    """As `per_channel`, for numbers that pixels are divided by."""
    numbers = per_channel(name, value)
    if 0 in numbers:
        raise ValueError(f"{name} is {numbers}, but pixels are divided by it. Use numbers other than 0.")
    return numbers


def pixel_dtype(value: Any, mean: list[float], std: list[float]) -> np.dtype:
    """dtype of the pixels handed to the model: "float32" (normalised), or "uint8", which the model normalises."""
    dtype = np.dtype("float32") if value is None else np.dtype(str(value).removeprefix("torch."))
    if dtype not in (np.float32, np.uint8):
        raise ValueError(f"pixel_dtype is {value!r}. Use 'float32', or 'uint8' to let the model normalise.")
    if dtype == np.uint8 and ({*mean} != {UINT8_MEAN} or {*std} != {UINT8_STD}):
        raise ValueError(
            f"pixel_dtype is uint8, which the model normalises with mean {UINT8_MEAN} and std {UINT8_STD}, but the "
            f"processor has image_mean {mean} and image_std {std}. Use pixel_dtype='float32'."
        )
    return dtype


def pair(name: str, value: Any, meaning: str) -> list[int]:
    """Two whole numbers, from two or from one for both; `meaning` completes the error message."""
    numbers = np.ravel(value).tolist()
    if len(numbers) == 1:
        numbers = numbers * 2
    if len(numbers) != 2:
        raise ValueError(f"{name} is {value!r}. Pass two whole numbers, {meaning}, or one for both.")
    return numbers


def size_dict(size: Any) -> dict[str, int]:
    """{"height": ..., "width": ...} from a dict (or the library's size object), a pair or one int."""
    size = plain(size)
    if isinstance(size, int):
        return {"height": size, "width": size}
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return {"height": plain(size[0]), "width": plain(size[1])}
    fields = size if isinstance(size, dict) else getattr(size, "__dict__", {})
    fields = {name: value for name, value in fields.items() if value is not None}
    if set(fields) != {"height", "width"}:
        raise ValueError(
            f"size is {size!r}. Crops have a fixed size: pass {{'height': ..., 'width': ...}} or one int."
        )
    return {"height": plain(fields["height"]), "width": plain(fields["width"])}


def warn_about(
    options: Mapping[str, Any],
    *,
    owner: str,
    known: Collection[str],
    ignored: Collection[str],
    only_near_misses: bool = False,
) -> None:
    """Warns about options that are misspelt, unknown or ask for another order of steps; none of them stops the call.

    Args:
        options: name -> value, as passed.
        owner: the class that was given the options.
        known, ignored: names with an effect, and names that are passed over in silence.
        only_near_misses: accept unknown names (of older files, or meant for another part) unless they look misspelt.
    """
    for name, value in options.items():
        if name in FIXED_STEPS and value is not None and value != FIXED_STEPS[name]:
            logger.warning_once(
                f"{name}={value!r} has no effect: Molmo2 always works with {name}={FIXED_STEPS[name]!r}."
            )
        if name in known or name in FIXED_STEPS or name in ignored or name.startswith("_"):
            continue
        similar = difflib.get_close_matches(name, list(known), n=1, cutoff=NEAR_MISS)
        if similar:
            logger.warning_once(f"{owner} ignores the unknown option '{name}'. Did you mean '{similar[0]}'?")
        elif not only_near_misses:
            logger.warning_once(f"{owner} ignores the unknown option '{name}'. It knows {', '.join(known)}.")


class IdentityMixin:
    """The keys that say in a processor's JSON what it is, kept and written alike on every release.

    Attributes:
        type_key: the key under which the name of the class is stored.
    """

    type_key: str
    _processor_class: str | None = None

    def _take_identity(self, options: dict[str, Any]) -> dict[str, Any]:
        """Moves `processor_class` and `auto_map` out of `options`: the arguments of the base class."""
        self._processor_class = options.pop("processor_class", None)
        auto_map = options.pop("auto_map", None)
        return {"processor_class": self._processor_class, **({} if auto_map is None else {"auto_map": auto_map})}

    def _set_processor_class(self, processor_class: str) -> None:
        """Called by processors that own this one; recent releases only know it for tokenizers."""
        self._processor_class = processor_class

    def _identity(self) -> dict[str, Any]:
        keys = {"auto_map": getattr(self, "auto_map", None), "processor_class": self._processor_class}
        return {
            self.type_key: type(self).__name__,
            **{name: value for name, value in keys.items() if value is not None},
        }
