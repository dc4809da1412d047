"""Molmo2's image processor: pictures in, crops cut in patches and pooling indices out.

Works without torchvision: classes of transformers are imported from the modules that define them, because its root
shows placeholders where torchvision is missing, and all pixel work is done here.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.processing_utils import ImagesKwargs, Unpack

from molmo2.configuration import CHANNELS
from molmo2.image.geometry import CropSettings, ImagePlan, image_token_pooling, plan_image
from molmo2.image.loading import fetch_images, load_images
from molmo2.image.options import (
    IdentityMixin,
    divisors_per_channel,
    pair,
    per_channel,
    pixel_dtype,
    plain,
    size_dict,
    warn_about,
)
from molmo2.image.pixels import as_output, empty_pixels, interpolation_mode, write_image_pixel_values
from molmo2.media_features import MediaFeatures, image_media

DEFAULTS = {
    "do_convert_rgb": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "max_crops": 8,
    "overlap_margins": [4, 4],
    "patch_size": 14,
    "pooling_size": [2, 2],
    "resample": 2,
    "size": {"height": 378, "width": 378},
}
# Names that are known and no option: read elsewhere (`return_tensors`), or meant for other image processors, which
# snippets pass along and which are passed over here.
IGNORED_OPTIONS = frozenset(ImagesKwargs.__annotations__) | {
    "auto_map",
    "backend",
    "code_revision",
    "data_format",
    "default_to_square",
    "device",
    "disable_grouping",
    "feature_extractor_type",
    "image_processor_type",
    "image_seq_length",
    "input_data_format",
    "pixel_dtype",
    "processor_class",
    "return_metadata",
    "return_tensors",
    "trust_remote_code",
    "use_fast",
}


class Molmo2ImagesKwargs(ImagesKwargs, total=False):
    """Options of one call; what is not given keeps the value of the processor.

    Attributes:
        max_crops: most tiles a picture is cut into, besides the low-resolution view.
        overlap_margins: (before, after), the overlap of neighbouring crops in patches.
        patch_size: side of a patch.
        pooling_size: (rows, cols) of patches that become one token.
        do_convert_rgb: False refuses pictures that are not RGB.
        image_mean, image_std: one number per channel, or one for all.
        input_data_format: "channels_last" or "channels_first", for arrays that could be either.
        pixel_dtype: "float32", or "uint8": a quarter of the memory, normalised by the model to the same numbers.
        device: where pictures are resized and normalised; a GPU rounds a few pixels differently. The CPU by default.
        return_tensors: "pt" for torch tensors, "np" or None for numpy arrays.
    """

    max_crops: int | None
    overlap_margins: list[int] | tuple[int, ...] | int | None
    patch_size: int | None
    pooling_size: list[int] | tuple[int, ...] | int | None
    do_convert_rgb: bool | None
    pixel_dtype: str | None
    image_mean: float | int | list[float | int] | tuple[float | int, ...] | None
    image_std: float | int | list[float | int] | tuple[float | int, ...] | None
    return_tensors: str | None


@dataclass(frozen=True)
class ImageOptions:
    """The checked options of one call."""

    crops: CropSettings
    max_crops: int
    resample: int
    mean: list[float]
    std: list[float]
    do_convert_rgb: bool
    pixel_dtype: np.dtype


class Molmo2ImageProcessor(IdentityMixin, BaseImageProcessor):
    """Cuts pictures into one low-resolution view and up to `max_crops` overlapping tiles each.

    Args:
        size: height and width of a crop; an int for a square one.
        resample: PIL's number of the filter: 2 bilinear, 3 bicubic, 0 nearest.
        image_mean, image_std: per channel, or one number for all, applied after scaling to 0..1.
        do_convert_rgb: convert pictures to RGB as PIL does; False refuses other modes.
        max_crops: most tiles a picture is cut into, besides the low-resolution view.
        overlap_margins: (before, after), the overlap of neighbouring crops in patches.
        patch_size, pooling_size: side of a patch; rows and columns of patches that become one token.

    Raises:
        ValueError: the options contradict each other or make no crops.
    """

    model_input_names = ["pixel_values", "image_token_pooling", "image_grids", "image_num_crops"]
    valid_kwargs = Molmo2ImagesKwargs
    type_key = "image_processor_type"

    def __init__(self, **kwargs: Unpack[Molmo2ImagesKwargs]):
        super().__init__(**self._take_identity(kwargs))
        _warn_about(kwargs, only_near_misses=True)
        for name, value in _canonical(DEFAULTS | _given(kwargs)).items():
            setattr(self, name, value)
        self._options({})  # refuses what could not cut any picture

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs):
        """Builds the processor from its JSON; options in `kwargs` win and are checked, whatever the release."""
        options = {name: kwargs.pop(name) for name in DEFAULTS if name in kwargs}
        _warn_about(kwargs, only_near_misses=True)
        return super().from_dict({**image_processor_dict, **options}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The content of preprocessor_config.json, the same on every release."""
        output = _canonical({name: getattr(self, name) for name in DEFAULTS})
        return {**output, **self._identity()}

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Opens paths, URLs, base64 text and bytes in a (nested list of) image(s); the rest stays as it is."""
        return fetch_images(image_url_or_urls)

    def plan(self, height: int, width: int, **overrides: Any) -> ImagePlan:
        """How a picture of this size is cut: crops, grids and number of visual tokens, without any pixel.

        Args:
            height, width: the picture, in pixels.
            overrides: options as for `preprocess`, for example `max_crops=24`.

        Raises:
            ValueError: the picture is empty or an option makes no sense.
        """
        options = self._options(overrides)
        return plan_image(height, width, options.crops, options.max_crops)

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """How many crops a picture of this size gives, the low-resolution view counted.

        The name is the library's, which calls each input of the vision tower a patch.
        """
        return self.plan(height, width, **({} if images_kwargs is None else images_kwargs)).num_crops

    def preprocess(self, images: Any, **kwargs: Unpack[Molmo2ImagesKwargs]) -> BatchFeature:
        """Cuts pictures into crops and says which patches make up which visual token.

        Args:
            images: a picture or a (nested) list of them; see `load_images` for what counts as one. An empty list is
                fine.
            kwargs: options for this call; those left out or None keep the processor's value.

        Returns:
            Crops and tokens of all pictures one after the other, numpy arrays or, with `return_tensors="pt"`, tensors:
            pixel_values: (crops, patches, patch_size * patch_size * 3) float32, or uint8 if that is asked for.
            image_token_pooling: (tokens, pooled patches) int64; patch numbers within the picture, -1 for none.
            image_grids: (pictures, 4) int64; rows and columns of tokens, low resolution then high resolution.
            image_num_crops: (pictures,) int64; the low-resolution view counted.
            The attribute `media` holds the size of each picture.

        Raises:
            FileNotFoundError, TypeError, ValueError: a picture cannot be read, or an option makes no sense.
        """
        options = self._options(kwargs)
        pictures = load_images(
            images, do_convert_rgb=options.do_convert_rgb, input_data_format=kwargs.get("input_data_format")
        )
        plans = [plan_image(*picture.shape[:2], options.crops, options.max_crops) for picture in pictures]
        data = {
            "pixel_values": _pixel_values(pictures, plans, options, kwargs.get("device")),
            "image_token_pooling": _token_pooling(plans, options.crops),
            "image_grids": np.array([plan.grid for plan in plans], dtype=np.int64).reshape(len(plans), 4),
            "image_num_crops": np.array([plan.num_crops for plan in plans], dtype=np.int64),
        }
        media = [image_media(picture.shape[:2]) for picture in pictures]
        features = MediaFeatures(data, kwargs.get("return_tensors"), media)
        if kwargs.get("device") is not None and kwargs.get("return_tensors") is not None:
            features = features.to(kwargs["device"])
        return features

    def _options(self, overrides: dict[str, Any]) -> ImageOptions:
        """The processor's options with those of one call over them, checked."""
        _warn_about(overrides)
        values = _canonical({name: getattr(self, name) for name in DEFAULTS} | _given(overrides))
        interpolation_mode(values["resample"])
        crops = CropSettings(
            values["size"]["height"],
            values["size"]["width"],
            values["patch_size"],
            *values["pooling_size"],
            *values["overlap_margins"],
        )
        return ImageOptions(
            crops=crops,
            max_crops=values["max_crops"],
            resample=values["resample"],
            mean=values["image_mean"],
            std=values["image_std"],
            do_convert_rgb=values["do_convert_rgb"],
            pixel_dtype=pixel_dtype(overrides.get("pixel_dtype"), values["image_mean"], values["image_std"]),
        )


def _pixel_values(pictures: list[np.ndarray], plans: list[ImagePlan], options: ImageOptions, device: Any) -> Any:
    """The crops of all pictures, written into one array as they are cut."""
    patch_length = options.crops.patch_size**2 * CHANNELS
    shape = sum(plan.num_crops for plan in plans), options.crops.patches_per_crop, patch_length
    pixel_values = empty_pixels(shape, options.pixel_dtype, device)
    first_crop = 0
    for picture, plan in zip(pictures, plans, strict=True):
        out = pixel_values[first_crop : first_crop + plan.num_crops]
        write_image_pixel_values(picture, plan, out, resample=options.resample, mean=options.mean, std=options.std)
        first_crop += plan.num_crops
    return as_output(pixel_values)


def _token_pooling(plans: list[ImagePlan], crops: CropSettings) -> np.ndarray:
    """The pooling indices of all pictures, one picture after the other; each starts again at 0."""
    none_yet = np.empty((0, crops.pool_height * crops.pool_width), dtype=np.int64)
    return np.concatenate([none_yet, *(image_token_pooling(plan) for plan in plans)])


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options of ours that were given; None stands for "not given", 0 and False do not."""
    return {name: value for name, value in options.items() if name in DEFAULTS and value is not None}


def _canonical(values: dict[str, Any]) -> dict[str, Any]:
    """All options in the one form they are stored and saved in; also what makes them plain JSON."""
    max_crops = plain(values["max_crops"])
    if isinstance(max_crops, bool) or not isinstance(max_crops, int) or max_crops < 1:
        raise ValueError(
            f"max_crops is {max_crops!r}, but must be a whole number of at least 1: the most tiles a picture is cut "
            "into. 1 gives one tile besides the low-resolution view; leave it out for the default."
        )
    return {
        "do_convert_rgb": bool(values["do_convert_rgb"]),
        "image_mean": per_channel("image_mean", values["image_mean"]),
        "image_std": divisors_per_channel("image_std", values["image_std"]),
        "max_crops": max_crops,
        "overlap_margins": pair("overlap_margins", values["overlap_margins"], "(before, after) in patches"),
        "patch_size": plain(values["patch_size"]),
        "pooling_size": pair("pooling_size", values["pooling_size"], "(rows, cols) in patches"),
        "resample": values["resample"] if isinstance(values["resample"], str) else int(values["resample"]),
        "size": size_dict(values["size"]),
    }


def _warn_about(options: dict[str, Any], *, only_near_misses: bool = False) -> None:
    """Warns about options that the image processor does not know, or cannot follow."""
    warn_about(
        options,
        owner=Molmo2ImageProcessor.__name__,
        known=DEFAULTS,
        ignored=IGNORED_OPTIONS,
        only_near_misses=only_near_misses,
    )
