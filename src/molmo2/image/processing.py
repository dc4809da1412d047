"""The image processor: from images to crops cut into patches, and pooling indices.

Works without torchvision: classes of transformers are imported from the modules that define them, because its root
shows placeholders where torchvision is missing, and all pixel work is done here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.processing_utils import ImagesKwargs, Unpack

from molmo2.grounding.parse import IMAGE, MediaInfo
from molmo2.image.geometry import CropSettings, ImagePlan, image_token_pooling, plan_image, stack_pooling
from molmo2.image.limits import MediaLimits
from molmo2.image.loading import fetch_images, load_images, original_size
from molmo2.image.options import PIXEL_STEPS, OptionsMixin, pair, plain
from molmo2.image.pixels import PixelOptions, as_output, require_size, write_image_pixel_values
from molmo2.media_features import MediaFeatures
from molmo2.values import is_whole

MAX_CROPS = 10_000  # an image of a million visual tokens; every tiling up to it is compared


class Molmo2ImageProcessorKwargs(ImagesKwargs, total=False):
    """Options of one call; an option that is not passed keeps the value of the processor.

    Attributes:
        max_crops: maximum number of tiles of an image, besides the low-resolution view.
        overlap_margins: (before, after), the overlap of neighbouring crops in patches.
        patch_size: side of a patch.
        pooling_size: (rows, cols) of patches that become one token.
        do_convert_rgb: convert images to RGB as PIL does; False refuses other modes.
        image_mean, image_std: one number per channel, or one for all, applied after scaling to 0..1.
        do_resize: False refuses images that do not have the size of their canvas; the low-resolution view of an image
            of several tiles is made in any case.
        do_rescale, rescale_factor, do_normalize: whether pixels are multiplied by the factor (floating point images,
            of 0..1, by 255 times it), and whether mean and std are applied.
        input_data_format: "channels_last" or "channels_first", for arrays that could be either.
        pixel_dtype: "float32", or "uint8": a quarter of the memory, normalised by the model to the same numbers.
        device: device on which images are resized and normalised, the CPU by default; a GPU rounds a few pixels
            differently.
        limits: a `MediaLimits`, what is refused of images.
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
    limits: Any
    return_tensors: str | None


@dataclass(frozen=True)
class ImageOptions(PixelOptions):
    """The checked options of one call, see `Molmo2ImageProcessorKwargs`."""

    max_crops: int
    do_convert_rgb: bool
    limits: MediaLimits


class Molmo2ImageProcessor(OptionsMixin, BaseImageProcessor):  # type: ignore[misc]  # two spellings of `from_dict`
    """Image processor that cuts images into one low-resolution view and up to `max_crops` overlapping tiles each.

    Args:
        size: height and width of a crop; an int for a square one.
        resample: the filter by PIL's number: 2 bilinear, 3 bicubic, 0 nearest.
        kwargs: the others are those of one call, see `Molmo2ImageProcessorKwargs`.

    Raises:
        ValueError: the options contradict each other or make no crops.
    """

    model_input_names = ["pixel_values", "image_token_pooling", "image_grids", "image_num_crops"]
    valid_kwargs = Molmo2ImageProcessorKwargs
    TYPE_KEY = "image_processor_type"
    DEFAULTS = {
        **PIXEL_STEPS,
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
    IGNORED = frozenset({"default_to_square", "feature_extractor_type", "image_seq_length", "return_metadata"})

    def __init__(self, **kwargs: Unpack[Molmo2ImageProcessorKwargs]):
        super().__init__(**kwargs)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """`images` with paths, URLs, base64 text, bytes and open files loaded as PIL images, see `fetch_images`."""
        return fetch_images(image_url_or_urls, limits=self.limits)

    def plan(self, height: int, width: int, **overrides: Any) -> ImagePlan:
        """The plan of an image of this size: crops, grids and number of visual tokens, without any pixel.

        Args:
            height, width: the image, in pixels.
            overrides: options as for `preprocess`, for example `max_crops=24`.

        Raises:
            ValueError: the image is empty or an option makes no sense.
        """
        options = self._options(overrides)
        return plan_image(height, width, options.crops, options.max_crops)

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """Number of crops of an image of this size, the low-resolution view included.

        The name is the library's, which calls each input of the vision tower a patch.
        """
        return self.plan(height, width, **({} if images_kwargs is None else images_kwargs)).num_crops

    def preprocess(self, images: Any, **kwargs: Unpack[Molmo2ImageProcessorKwargs]) -> BatchFeature:
        """The crops of images, and which patches each visual token pools.

        Args:
            images: an image or a (nested, possibly empty) list of them; see `load_images` for what counts as one.
            kwargs: options of this call; None keeps the value of the processor.

        Returns:
            Crops and tokens of all images one after the other, numpy arrays or, with `return_tensors="pt"`, tensors:
            pixel_values: (crops, patches, patch_size * patch_size * 3) float32, or uint8 if that is asked for.
            image_token_pooling: (tokens, pooled patches) int64; patch indices within the image, -1 for none.
            image_grids: (images, 4) int64; rows and columns of tokens, low resolution then high resolution.
            image_num_crops: (images,) int64; the low-resolution view included.
            The attribute `media` holds the size of each image.

        Raises:
            FileNotFoundError, TypeError, ValueError: an image cannot be read, or an option makes no sense.
        """
        options = self._options(kwargs)
        loaded = load_images(
            images,
            do_convert_rgb=options.do_convert_rgb,
            input_data_format=kwargs.get("input_data_format"),
            limits=options.limits,
        )
        sizes = [original_size(image) for image in loaded]
        plans = [plan_image(height, width, options.crops, options.max_crops) for height, width in sizes]
        for index, plan in enumerate(plans):
            found = f"Image {index} would take {plan.num_pooled_tokens:,} visual tokens"
            options.limits.check("visual_tokens", plan.num_pooled_tokens, found)
        if not options.do_resize:
            for image, plan in zip(loaded, plans, strict=True):
                require_size(image, plan.canvas_height, plan.canvas_width)
        window = options.crops.pool_height * options.crops.pool_width
        data = {
            "pixel_values": _pixel_values(loaded, plans, options),
            "image_token_pooling": stack_pooling([image_token_pooling(plan) for plan in plans], window),
            "image_grids": np.array([plan.grid for plan in plans], dtype=np.int64).reshape(len(plans), 4),
            "image_num_crops": np.array([plan.num_crops for plan in plans], dtype=np.int64),
        }
        media = [MediaInfo(IMAGE, ((width, height),)) for height, width in sizes]
        features: Any = MediaFeatures(data, kwargs.get("return_tensors"), media)
        if options.device is not None and kwargs.get("return_tensors") is not None:
            features = features.to(options.device)
        return features

    def _options(self, overrides: Mapping[str, Any]) -> ImageOptions:
        self._warn_about(overrides)
        values = self._canonical(self._values() | self._given(overrides))
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
            do_convert_rgb=values["do_convert_rgb"],
            limits=self._limits(overrides),
            **self._pixel_options(values, overrides),
        )

    def _stored_options(self) -> dict[str, Any]:
        stored = super()._stored_options()  # without the steps that published files leave out, unless they differ
        return {name: value for name, value in stored.items() if PIXEL_STEPS.get(name) != value}

    @classmethod
    def _canonical(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        max_crops = plain(values["max_crops"])
        if not is_whole(max_crops) or not 1 <= max_crops <= MAX_CROPS:
            raise ValueError(
                f"max_crops is {max_crops!r}, but must be a whole number of at least 1: the maximum number of tiles "
                f"of an image, up to {MAX_CROPS:,}. 1 gives one tile besides the low-resolution view; leave it out "
                "for the default."
            )
        margins = pair("overlap_margins", values["overlap_margins"], "(before, after) in patches", minimum=0)
        return {**super()._canonical(values), "max_crops": max_crops, "overlap_margins": margins}


def _pixel_values(images: list[np.ndarray], plans: list[ImagePlan], options: ImageOptions) -> Any:
    """The crops of all images, (crops, patches, values) in one array."""
    pixel_values = options.empty(sum(plan.num_crops for plan in plans))
    first_crop = 0
    for image, plan in zip(images, plans, strict=True):
        out = pixel_values[first_crop : first_crop + plan.num_crops]
        write_image_pixel_values(np.asarray(image), plan, out, options)
        first_crop += plan.num_crops
    return as_output(pixel_values)
