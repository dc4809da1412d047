"""Options of the image and the video processor in the one form they are stored, saved and compared in.

Callers pass sizes as an int, a pair, a dict or an object of the library, and name options that other processors have.
The result is plain JSON; a value that makes no sense is refused by name, an option without effect is warned about.
"""

import difflib
import json
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
from transformers.utils import logging

from molmo2.configuration import CHANNELS, UINT8_MEAN, UINT8_STD
from molmo2.image.limits import MediaLimits, checked_limits
from molmo2.image.pixels import INTERPOLATION_MODES, RESCALE_FACTOR, Normalization
from molmo2.values import is_number, is_whole

logger = logging.get_logger(__name__)

# Steps of other processors that Molmo2 does not have: asking for one is warned about.
FIXED_STEPS = {"do_center_crop": False, "do_pad": False}
# Steps of every processor; files of published checkpoints leave them out or have these values.
PIXEL_STEPS = {"do_normalize": True, "do_rescale": True, "do_resize": True, "rescale_factor": RESCALE_FACTOR}
# What loaders pass along to every processor, and what other releases write into its file.
PASSED_ALONG = {
    *("auto_map", "backend", "code_revision", "disable_grouping", "image_processor_type", "processor_class"),
    *("trust_remote_code", "use_fast"),
}
FLAGS = ("do_convert_rgb", "do_normalize", "do_rescale", "do_resize")
NEAR_MISS = 0.85  # similarity (0..1) from which an unknown name counts as a misspelt option
MAX_SIDE = 2**15  # of a crop in pixels, a window in patches: more is damage, and would be allocated
PATCH_ROWS_AND_COLS = "(rows, cols) in patches"
UNSUPPORTED_FILTERS = {1: "lanczos", 4: "box", 5: "hamming"}  # PIL's others


def plain(value: Any) -> Any:
    """A numpy scalar or a fraction as a Python number, which JSON can hold; anything else unchanged."""
    if isinstance(value, Fraction):
        return float(value)
    return value.tolist() if isinstance(value, np.generic) else value


def listed(value: Any) -> list[Any]:
    """One value or several, in a list, array or tensor, as a flat list; numpy's numbers become Python's."""
    values = np.asarray(value.tolist() if hasattr(value, "tolist") else value, dtype=object)
    return [plain(entry) for entry in np.ravel(values)]


def per_channel(name: str, value: Any, *, is_divisor: bool = False) -> list[float]:
    """Three numbers, one per channel, from three or from one for all; 0 is no divisor."""
    numbers = listed(value)
    if len(numbers) not in (1, CHANNELS) or not all(map(is_number, numbers)):
        raise ValueError(
            f"{name} is {value!r:.80}. Use finite numbers, one for all channels or {CHANNELS}, one per channel."
        )
    if is_divisor and 0 in numbers:
        raise ValueError(f"{name} is {value!r:.80}, but pixels are divided by it. Use numbers other than 0.")
    return [float(number) for number in numbers] * (CHANNELS // len(numbers))


def pixel_dtype(value: Any, steps: Normalization) -> np.dtype:
    """dtype of the pixels handed to the model: "float32" (normalised), or "uint8", which the model normalises."""
    dtype = np.dtype("float32") if value is None else np.dtype(str(value).removeprefix("torch."))
    if dtype not in (np.float32, np.uint8):
        raise ValueError(f"pixel_dtype is {value!r}. Use 'float32', or 'uint8' to let the model normalise.")
    if dtype == np.uint8 and steps != Normalization((UINT8_MEAN,) * CHANNELS, (UINT8_STD,) * CHANNELS):
        raise ValueError(
            f"pixel_dtype is uint8, which the model normalises with mean {UINT8_MEAN} and std {UINT8_STD} after "
            f"scaling by 1/255, but the processor has image_mean {list(steps.mean)}, image_std {list(steps.std)} and "
            f"rescale_factor {steps.rescale_factor} (after do_normalize and do_rescale). Use pixel_dtype='float32'."
        )
    return dtype


def nonzero(name: str, value: Any) -> float:
    """A finite number other than 0."""
    number = plain(value)
    if not is_number(number) or number == 0:
        raise ValueError(f"{name} is {value!r:.80}, but pixels are multiplied by it. Use a number other than 0.")
    return float(number)


def pair(name: str, value: Any, meaning: str, minimum: int = 1) -> list[int]:
    """Two whole numbers from `minimum`, from two or from one for both; `meaning` completes the error message."""
    numbers = listed(value)
    if len(numbers) == 1:
        numbers = numbers * 2
    if len(numbers) != 2 or not all(is_whole(number) and minimum <= number <= MAX_SIDE for number in numbers):
        raise ValueError(
            f"{name} is {value!r:.80}. Pass two whole numbers, {meaning}, or one for both; each {minimum} or more."
        )
    return numbers


def flag(name: str, value: Any) -> bool:
    """True or False, and nothing that Python would take for one of them."""
    if not isinstance(plain(value), bool):
        raise ValueError(f"{name} is {value!r:.80}. Use True or False.")
    return bool(value)


def resample_filter(value: Any) -> int:
    """PIL's number of the filter that images are resized with, one that torch has without antialiasing."""
    number = plain(value)
    if not is_whole(number) or number not in INTERPOLATION_MODES:
        name = UNSUPPORTED_FILTERS.get(number) if is_whole(number) else None
        found = f"{value!r:.80}" if name is None else f"{int(number)} ({name})"
        raise ValueError(
            f"resample is {found}, which is not supported. Use 2 (bilinear, what the published checkpoints expect), "
            "3 (bicubic) or 0 (nearest)."
        )
    return int(number)


def size_dict(size: Any) -> dict[str, int]:
    """{"height": ..., "width": ...} from a dict (or the library's size object), a pair or one int."""
    size = plain(size)
    if is_whole(size):
        size = (size, size)
    if isinstance(size, (list, tuple)) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    fields = size if isinstance(size, Mapping) else getattr(size, "__dict__", {})
    fields = {name: value for name, value in fields.items() if value is not None}
    sides = {name: plain(side) for name, side in fields.items()}
    is_valid = set(sides) == {"height", "width"}
    if not is_valid or not all(is_whole(side) and 1 <= side <= MAX_SIDE for side in sides.values()):
        raise ValueError(
            f"size is {size!r:.80}. Crops have a fixed size: pass {{'height': ..., 'width': ...}} or one int."
        )
    return {"height": sides["height"], "width": sides["width"]}


class OptionsMixin:
    """Options of a processor: defaults, checks, overrides for one call, and the same JSON on every release.

    A processor sets the attributes below, derives from this class first and from the library's base class second, and
    implements `_options`.

    Attributes:
        DEFAULTS: option name -> value where nothing is passed; every option of the processor is in it.
        NULLABLE: names of options for which None is a value; for the others it stands for "not passed".
        IGNORED: names that are no option of this processor, but accepted without a warning because snippets for other
            processors pass them. Those in `valid_kwargs` need not be repeated.
        TYPE_KEY: the JSON key under which the name of the class is stored.
        limits: what is refused of media. Never read from JSON, nor written to it: who offers a checkpoint does not
            decide what a program accepts.
    """

    DEFAULTS: dict[str, Any]
    NULLABLE: frozenset[str] = frozenset()
    IGNORED: frozenset[str]
    TYPE_KEY: str
    valid_kwargs: Any
    limits: MediaLimits
    _owner_class: str | None = None  # the library's own name for it must not exist on recent releases

    def __init__(self, **kwargs: Any):
        self._owner_class = kwargs.pop("processor_class", None)
        self.limits = checked_limits(kwargs.pop("limits", None))
        auto_map = kwargs.pop("auto_map", None)
        super().__init__(**({} if auto_map is None else {"auto_map": auto_map}))
        self._warn_about(kwargs, only_near_misses=True)
        for name, value in self._canonical(self.DEFAULTS | self._given(kwargs)).items():
            setattr(self, name, value)
        self._options({})  # refuses options that contradict each other

    @classmethod
    def from_dict(cls, config: dict[str, Any], **kwargs: Any) -> Any:
        """The processor described by its JSON; options in `kwargs` win and are checked, whatever the release."""
        options = {name: kwargs.pop(name) for name in (*cls.DEFAULTS, "limits") if name in kwargs}
        config = {name: value for name, value in config.items() if name != "limits"}
        cls._warn_about(kwargs, only_near_misses=True)
        return super().from_dict({**config, **options}, **kwargs)  # type: ignore[misc]  # of the second base class

    def to_dict(self) -> dict[str, Any]:
        """The content of the processor's JSON file, the same on every release."""
        identity = {"auto_map": getattr(self, "auto_map", None), "processor_class": self._owner_class}
        return {
            **self._stored_options(),
            self.TYPE_KEY: type(self).__name__,
            **{name: value for name, value in identity.items() if value is not None},
        }

    def __repr__(self) -> str:
        """The options alone, alike for a processor that a file named its owner to and for one that was built."""
        return f"{type(self).__name__} {json.dumps(self._stored_options(), indent=2, sort_keys=True)}"

    def _stored_options(self) -> dict[str, Any]:
        """The options as they are written to JSON."""
        return self._canonical(self._values())

    def _values(self) -> dict[str, Any]:
        """The options of the processor as they are now: users may set its attributes."""
        return {name: getattr(self, name) for name in self.DEFAULTS}

    def _limits(self, overrides: Mapping[str, Any]) -> MediaLimits:
        """The limits of one call."""
        given = overrides.get("limits")
        return checked_limits(self.limits if given is None else given)

    @staticmethod
    def _pixel_options(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of `PixelOptions` but for `crops`, from the canonical options and those of one call."""
        mean, std = values["image_mean"], values["image_std"]
        if not values["do_normalize"]:
            mean, std = [0.0] * CHANNELS, [1.0] * CHANNELS
        steps = Normalization(tuple(mean), tuple(std), values["rescale_factor"] if values["do_rescale"] else None)
        return {
            "resample": values["resample"],
            "steps": steps,
            "do_resize": values["do_resize"],
            "pixel_dtype": pixel_dtype(overrides.get("pixel_dtype"), steps),
            "device": overrides.get("device"),
        }

    def _set_processor_class(self, processor_class: str) -> None:
        """Called by processors that own this one; recent releases only know it for tokenizers."""
        self._owner_class = processor_class

    def _options(self, overrides: Mapping[str, Any]) -> Any:
        """The processor's options with those of one call over them, checked."""
        raise NotImplementedError

    @classmethod
    def _given(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of this processor among `options`, without those that are None for "not passed"."""
        return {
            name: value
            for name, value in options.items()
            if name in cls.DEFAULTS and (value is not None or name in cls.NULLABLE)
        }

    @classmethod
    def _canonical(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """All options in the one form they are stored and saved in, which is plain JSON.

        A processor overrides this for its own options, as far as `plain` does not give their form.

        Raises:
            ValueError: a value makes no sense; the message names the option.
        """
        return {
            **{name: plain(values[name]) for name in cls.DEFAULTS},
            **{name: flag(name, values[name]) for name in FLAGS},
            "rescale_factor": nonzero("rescale_factor", values["rescale_factor"]),
            "image_mean": per_channel("image_mean", values["image_mean"]),
            "image_std": per_channel("image_std", values["image_std"], is_divisor=True),
            "pooling_size": pair("pooling_size", values["pooling_size"], PATCH_ROWS_AND_COLS),
            "resample": resample_filter(values["resample"]),
            "size": size_dict(values["size"]),
        }

    @classmethod
    def _warn_about(cls, options: Mapping[str, Any], *, only_near_misses: bool = False) -> None:
        """Warns about options that are misspelt, unknown or ask for another order of steps; none stops the call.

        Args:
            options: name -> value, as passed.
            only_near_misses: accept unknown names (of older files, or meant for another part) unless they look
                misspelt.
        """
        known = {*cls.DEFAULTS, *FIXED_STEPS, *PASSED_ALONG, *cls.valid_kwargs.__annotations__, *cls.IGNORED}
        for name, value in options.items():
            if name in FIXED_STEPS and value is not None and value != FIXED_STEPS[name]:
                logger.warning_once(
                    f"{name}={value!r} has no effect: Molmo2 always works with {name}={FIXED_STEPS[name]!r}."
                )
            if name in known or name.startswith("_"):
                continue
            similar = difflib.get_close_matches(name, list(cls.DEFAULTS), n=1, cutoff=NEAR_MISS)
            if similar:
                logger.warning_once(
                    f"{cls.__name__} ignores the unknown option '{name}'. Did you mean '{similar[0]}'?"
                )
            elif not only_near_misses:
                own = ", ".join(cls.DEFAULTS)
                logger.warning_once(f"{cls.__name__} ignores the unknown option '{name}'. It knows {own}.")
