"""The video processor: from videos to frames cut into patches, and pooling indices.

Works without torchvision: classes of transformers are imported from the modules that define them, because its root
shows placeholders where torchvision is missing, and what the base class does with torchvision is done here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import Unpack, VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor

from molmo2.image.geometry import CropSettings, VideoPlan, stack_pooling, video_token_pooling
from molmo2.image.options import PATCH_ROWS_AND_COLS, PIXEL_STEPS, OptionsMixin, flag, pair, plain
from molmo2.image.pixels import PixelOptions, as_output, frame_pixel_values
from molmo2.values import is_positive
from molmo2.video.decoding.timeline import VideoDecodeError
from molmo2.video.frame_encoding import FrameEncoder, encode_frames, read_ahead
from molmo2.video.loading import (
    ReadingOptions,
    SampledVideoMetadata,
    VideoItem,
    has_metadata,
    is_encoded,
    is_one_video,
    list_videos,
    read_video,
)
from molmo2.video.sampling import SamplingSettings, sample_indices

__all__ = [
    "Molmo2VideoProcessor",
    "Molmo2VideoProcessorKwargs",
    "SampledVideoMetadata",
    "VideoDecodeError",
]

# Keys of the published video_preprocessor_config.json that have no effect; written so that other readers find them.
UNUSED_KEYS = {
    "crop_size": None,
    "data_format": "channels_first",
    "default_to_square": True,
    "device": None,
    "do_center_crop": None,
    "input_data_format": None,
    "pad_size": None,
    "video_metadata": None,
}
FRAMES_AHEAD = 3  # decoded while an earlier one is resized


class Molmo2VideoProcessorKwargs(VideosKwargs, total=False):
    """Options of one call; an option that is not passed keeps the value of the processor.

    Attributes:
        num_frames: maximum number of frames of a video.
        frame_sample_mode: "uniform_last_frame" (evenly spread, the last frame included) or "fps" (a constant rate).
        max_fps: maximum rate of "uniform_last_frame", in frames per second; None for no limit.
        sampling_fps: minimum rate of "fps", in frames per second.
        fps: max_fps and sampling_fps in one, as other processors call it.
        clip: (start, end) in seconds, the part of each video to sample, or a list of them, one per video; the end may
            be None. The printed times stay those of the whole video.
        do_sample_frames, return_metadata: see `Molmo2VideoProcessor.preprocess`.
        video_backend: "decord", "torchcodec" or "pyav" to use this decoder only, or a list of those to try in order;
            None tries all. `backend` is an alias.
        patch_size: side of a patch, in pixels.
        pooling_size: (rows, cols) of patches that become one token.
        key_frame_interval: frames from one key frame to the next in a slow-fast clip; the last frame of the video is a
            key frame as well. Key frames are pooled by `pooling_size`, the others by `between_pooling_size`. 1, the
            default, makes every frame a key frame.
        between_pooling_size: (rows, cols) of patches that become one token of a frame between key frames.
        do_resize: False refuses frames that do not have the size of a crop.
        do_rescale, rescale_factor, do_normalize, image_mean, image_std, pixel_dtype, device, limits, return_tensors:
            as in `Molmo2ImageProcessorKwargs`, for the frames and videos.
        frame_encoder: `model.encode_frames`, to encode frames while the next are decoded. The output has
            `video_features` (T, text width) instead of pixel values and pooling indices, and the pixel values of a
            whole video are never in memory.
    """

    frame_sample_mode: str | None
    max_fps: int | float | None
    sampling_fps: int | float | None
    clip: Any
    video_backend: str | None
    patch_size: int | None
    pooling_size: list[int] | tuple[int, ...] | int | None
    key_frame_interval: int | None
    between_pooling_size: list[int] | tuple[int, ...] | int | None
    pixel_dtype: str | None
    frame_encoder: Any
    limits: Any
    return_tensors: str | None


@dataclass(frozen=True)
class VideoOptions(PixelOptions):
    """The checked options of one call, see `Molmo2VideoProcessorKwargs`."""

    reading: ReadingOptions
    between: CropSettings
    key_frame_interval: int
    return_metadata: bool
    frame_encoder: FrameEncoder | None

    def plan(self, num_frames: int) -> VideoPlan:
        """The plan of a video with this number of sampled frames."""
        return VideoPlan(num_frames, self.crops, self.between, self.key_frame_interval)


# What no single video of a call can have.
OPTIONS_OF_CALLS = frozenset({"per_video_options", "return_metadata", "return_tensors", "video_metadata"})


class Molmo2VideoProcessor(OptionsMixin, BaseVideoProcessor):  # type: ignore[misc]  # two spellings of `from_dict`
    """Video processor that samples frames and cuts each into one crop of patches.

    Args:
        size: height and width of a frame for the model; an int for a square one.
        resample: the filter by PIL's number: 2 bilinear, 3 bicubic, 0 nearest.
        kwargs: the others are those of one call, see `Molmo2VideoProcessorKwargs`.

    Raises:
        ValueError: an option makes no sense; the message names it.
    """

    model_input_names = ["pixel_values_videos", "video_token_pooling", "video_grids"]
    valid_kwargs = Molmo2VideoProcessorKwargs  # type: ignore[assignment]  # the library declares options of images here
    video_backend: str | None  # an option
    TYPE_KEY = "video_processor_type"
    DEFAULTS = {
        **PIXEL_STEPS,
        "between_pooling_size": [9, 9],
        "do_convert_rgb": True,
        "do_sample_frames": True,
        "fps": None,
        "frame_sample_mode": "uniform_last_frame",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "key_frame_interval": 1,
        "max_fps": 2.0,
        "num_frames": 384,
        "patch_size": 14,
        "pooling_size": [3, 3],
        "resample": 2,
        "return_metadata": False,
        "sampling_fps": 2,
        "size": {"height": 378, "width": 378},
        "video_backend": None,
    }
    NULLABLE = frozenset({"max_fps"})
    IGNORED = frozenset(UNUSED_KEYS) | {
        *("image_patch_size", "interpolation", "min_frames", "return_video_kwargs", "video_processor_type"),
    }

    def __init__(self, **kwargs: Unpack[Molmo2VideoProcessorKwargs]):
        super().__init__(**kwargs)

    def _stored_options(self) -> dict[str, Any]:
        output = UNUSED_KEYS | super()._stored_options()
        if output["video_backend"] is None:  # a matter of the machine, not of the model
            del output["video_backend"]
        if output["key_frame_interval"] == 1:  # other readers know nothing of slow-fast clips
            del output["key_frame_interval"], output["between_pooling_size"]
        return output

    def plan(self, num_frames: int, **overrides: Any) -> VideoPlan:
        """The plan of a video with this number of sampled frames: grid and visual tokens, without any pixel.

        Args:
            num_frames: sampled frames.
            overrides: options as for `preprocess`, for example `pooling_size=2`.
        """
        return self._options({**overrides, "clip": None}).plan(num_frames)  # which may be one per video

    def get_num_of_video_patches(
        self, num_frames: int, height: int | None = None, width: int | None = None, videos_kwargs: Any = None
    ) -> int:
        """Number of visual tokens of a video with this number of sampled frames; its size does not matter.

        The name is the library's. Start, end and column tokens and the printed times come on top.
        """
        return self.plan(num_frames, **({} if videos_kwargs is None else videos_kwargs)).num_pooled_tokens

    def preprocess(
        self,
        videos: Any,
        *,
        video_metadata: Any = None,
        do_sample_frames: bool | None = None,
        return_metadata: bool | None = None,
        per_video_options: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Unpack[Molmo2VideoProcessorKwargs],
    ) -> BatchFeature:
        """The sampled frames of videos as patches, and which patches each visual token pools.

        Args:
            videos: one video or a (nested) list of them; see `list_videos` for what counts as one.
            video_metadata: a dict or `VideoMetadata` per video: of frames their rate (`fps`) or the times of all in
                seconds (`timestamps`), else 24 frames per second are assumed; files need nothing.
            do_sample_frames: False takes all frames of a decoded video, whose indices in the source may be given as
                `frames_indices` in the metadata. Files are sampled in any case, as in training.
            return_metadata: also return a list `video_metadata`, a `SampledVideoMetadata` per video.
            per_video_options: for each video the options that override those of the call, or None. Their outputs have
                to fit together: the same number and size of patches, dtype and device, or features of all.
            kwargs: options of this call, see `Molmo2VideoProcessorKwargs`. None keeps the processor's value, except
                for `max_fps`, where it lifts the limit.

        Returns:
            Frames and tokens of all videos one after the other, numpy arrays or, with `return_tensors="pt"`, tensors:
            pixel_values_videos: (frames, patches, patch_size * patch_size * 3) float32, or uint8 if that is asked for.
            video_token_pooling: (tokens, pooled patches) int64; patch indices within the video, -1 for none.
            video_grids: (videos, 3) int64; sampled frames, rows and columns of tokens of each. A slow-fast clip has
                one row for each run of frames that are pooled alike, and its patch indices count within the run.
            With a `frame_encoder`, video_features (tokens, text width), always a tensor, instead of the first two.

        Raises:
            FileNotFoundError, TypeError, ValueError: a video cannot be read, or an option makes no sense.
        """
        call = {**kwargs, "clip": None, "do_sample_frames": do_sample_frames, "return_metadata": return_metadata}
        options = self._options(call)
        items = list_videos(videos, video_metadata)
        own_options = options_of_each(per_video_options, len(items))
        clips = clips_per_video(kwargs.get("clip"), len(items))
        chosen = [self._options({**call, "clip": clip, **own}) for clip, own in zip(clips, own_options)]
        shared = _shared_options(chosen) if chosen else options
        cut = [_cut(*video) for video in zip(items, chosen)]
        plans = [own.plan(len(metadata.timestamps)) for own, (_, metadata) in zip(chosen, cut)]
        grids = [grid for plan in plans for grid in plan.grids]
        data: dict[str, Any] = {}
        if shared.frame_encoder is None:
            pixels = [pixels for pixels, _ in cut]
            joined = pixels[0] if len(pixels) == 1 else torch.cat([shared.empty(0), *pixels])
            data["pixel_values_videos"] = as_output(joined)
            window = max(own.crops.pool_height * own.crops.pool_width for own in chosen or [options])
            data["video_token_pooling"] = stack_pooling([video_token_pooling(plan) for plan in plans], window)
        elif cut:
            data["video_features"] = torch.cat([features for features, _ in cut])
        data["video_grids"] = np.array(grids, dtype=np.int64).reshape(len(grids), 3)
        features: Any = BatchFeature(data=data, tensor_type=kwargs.get("return_tensors"))
        if shared.device is not None and kwargs.get("return_tensors") is not None:
            features = features.to(shared.device)
        if options.return_metadata:
            features["video_metadata"] = [metadata for _, metadata in cut]
        return features

    def fetch_videos(  # type: ignore[override]  # of the two functions the library has the second only
        self,
        video_url_or_urls: Any,
        sample_timestamps_fn: Callable[..., Any] | None = None,
        sample_indices_fn: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """The sampled frames of files, paths and URLs, for a later `preprocess(..., video_metadata=metadata)`.

        `preprocess` reads files itself and needs less memory: these are all frames at full resolution.

        Args:
            video_url_or_urls: one video or a (nested) list of them. Videos that are decoded already stay as they are.
            sample_timestamps_fn: replaces the sampling of this processor: called with `metadata=VideoMetadata(...)`,
                returns the times to show in seconds.
            sample_indices_fn: the same, returning frame indices.
            kwargs: options as for `preprocess`.

        Returns:
            (frames, metadata) of one video, or a list of each, nested like the input. Frames are (F, H, W, 3) uint8;
            the metadata of a decoded video is what was passed with it, or None.
        """
        if isinstance(video_url_or_urls, (list, tuple)) and not is_one_video(video_url_or_urls):
            fetched = [
                self.fetch_videos(entry, sample_timestamps_fn, sample_indices_fn, **kwargs)
                for entry in video_url_or_urls
            ]
            return [frames for frames, _ in fetched], [metadata for _, metadata in fetched]
        (item,) = list_videos(video_url_or_urls)
        if not is_encoded(item.video):
            return item.video, item.metadata if has_metadata(video_url_or_urls) else None
        reading = replace(
            self._options(kwargs).reading,
            sample_timestamps_fn=sample_timestamps_fn,
            sample_indices_fn=sample_indices_fn,
        )
        return read_video(item, reading, lambda frames, _: np.stack(list(frames)))

    def sample_frames(  # type: ignore[override]  # options of this processor in place of two named ones
        self, metadata: Mapping[str, Any], **kwargs: Any
    ) -> np.ndarray:
        """Indices of the sampled frames of a decoded video with this metadata (`total_num_frames` and `fps`)."""
        reading = self._options(kwargs).reading
        if reading.clip is not None:
            raise ValueError("`sample_frames` samples whole videos: pass `clip` where the video is passed.")
        return sample_indices(metadata["total_num_frames"], metadata["fps"], reading.sampling)

    def _options(self, overrides: Mapping[str, Any]) -> VideoOptions:
        self._warn_about(overrides)
        values, given = self._values(), self._given(overrides)
        fps = plain(given.get("fps", values["fps"]))
        if fps is not None:
            if not is_positive(fps):
                raise ValueError(f"fps is {fps!r:.80}. Pass one positive number, frames per second, for all videos.")
            given = {"max_fps": fps, "sampling_fps": fps} | given
        values = self._canonical(values | given)
        reading = ReadingOptions(
            sampling=SamplingSettings(**{entry.name: values[entry.name] for entry in fields(SamplingSettings)}),
            do_sample_frames=values["do_sample_frames"],
            clip=clips_per_video(overrides.get("clip"), 1)[0],
            backend=values["video_backend"],
            input_data_format=overrides.get("input_data_format"),
            limits=self._limits(overrides),
        )
        crop = values["size"]["height"], values["size"]["width"], values["patch_size"]
        return VideoOptions(
            reading=reading,
            crops=CropSettings(*crop, *values["pooling_size"]),
            between=CropSettings(*crop, *values["between_pooling_size"]),
            key_frame_interval=values["key_frame_interval"],
            return_metadata=values["return_metadata"],
            frame_encoder=overrides.get("frame_encoder"),
            **self._pixel_options(values, overrides),
        )

    @classmethod
    def _given(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        if options.get("backend") is not None:
            options = {"video_backend": options["backend"], **options}
        return super()._given(options)

    @classmethod
    def _canonical(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        between = pair("between_pooling_size", values["between_pooling_size"], PATCH_ROWS_AND_COLS)
        flags = {name: flag(name, values[name]) for name in ("do_sample_frames", "return_metadata")}
        return {**super()._canonical(values), "between_pooling_size": between, **flags}


def options_of_each(per_video_options: Any, num_videos: int) -> list[Mapping[str, Any]]:
    """The options that each video has besides those of the call, in a form that overrides these.

    Raises:
        ValueError: They are not one mapping (or None) for each, or name what belongs to the call.
    """
    if per_video_options is None:
        return [{}] * num_videos
    own_options = [{} if own is None else own for own in per_video_options]
    if len(own_options) != num_videos:
        raise ValueError(
            f"There are {num_videos} video(s), but {len(own_options)} entries in `per_video_options`. Pass one "
            "dictionary per video, an empty one where nothing differs."
        )
    for index, own in enumerate(own_options):
        if not isinstance(own, Mapping):
            raise ValueError(f"`per_video_options` has {own!r:.80} at place {index}. Pass a dictionary of options.")
        if wrong := sorted(OPTIONS_OF_CALLS & own.keys()):
            raise ValueError(f"`per_video_options` has {wrong[0]!r}, which holds for a whole call. Pass it there.")
    return [_overriding(own) for own in own_options]


def _overriding(own: Mapping[str, Any]) -> dict[str, Any]:
    """Options under the names that the call may have them by; None counts where it has a meaning of its own."""
    options = {name: value for name, value in own.items() if value is not None or name in ("clip", "max_fps")}
    names = {"max_fps": "fps", "sampling_fps": "fps", "video_backend": "backend"}
    return {**{name: options[alias] for name, alias in names.items() if alias in options}, **options}


def _shared_options(chosen: Sequence[VideoOptions]) -> VideoOptions:
    """The options of the first video, after a check that the outputs of all can be joined.

    Raises:
        ValueError: They cannot; the message names what differs.
    """

    def of(options: VideoOptions) -> dict[str, Any]:
        if options.frame_encoder is not None:  # features of one width
            return {"frame_encoder": True}
        return {
            "frame_encoder": False,
            "patches_per_frame": options.crops.patches_per_crop,
            "patch_size": options.crops.patch_size,
            "pixel_dtype": str(options.pixel_dtype),
            "device": str(torch.device(options.device or "cpu")),
        }

    first = of(chosen[0])
    for name, value in [entry for options in chosen[1:] for entry in of(options).items()]:
        if value != first.get(name):
            raise ValueError(
                f"`per_video_options` leads to {name}={first.get(name)} for one video and {name}={value} for another, "
                "whose outputs cannot be joined. Pass the same for all videos, or process them in calls of their own."
            )
    return chosen[0]


def _cut(item: VideoItem, options: VideoOptions) -> tuple[Any, SampledVideoMetadata]:
    """The sampled frames of a video as pixel values, (F, P, values), or as features; one is decoded at a time."""

    def consume(frames: Iterator[np.ndarray], num_frames: int) -> torch.Tensor:
        plan = options.plan(num_frames)
        num_tokens = plan.num_pooled_tokens
        found = f"{item.where} would take {num_tokens:,} visual tokens in {num_frames:,} frames"
        options.reading.limits.check("visual_tokens", num_tokens, found)
        if options.frame_encoder is not None:
            cut = partial(frame_pixel_values, options=options)
            return encode_frames(frames, plan, cut, options.frame_encoder)
        with closing(read_ahead(frames, FRAMES_AHEAD)) as ahead:
            return frame_pixel_values(ahead, num_frames, options)

    return read_video(item, options.reading, consume)


def clips_per_video(clip: Any, num_videos: int) -> list[tuple[float, float | None] | None]:
    """A checked (start, end) for each video, None for the whole video."""
    if clip is None or _is_clip(clip):
        return [_checked_clip(clip)] * num_videos
    if isinstance(clip, (list, tuple)) and len(clip) == num_videos and all(c is None or _is_clip(c) for c in clip):
        return [_checked_clip(entry) for entry in clip]
    raise ValueError(
        f"clip is {clip!r}. Pass (start_seconds, end_seconds) for all videos, or a list with one such pair (or None) "
        f"for each of the {num_videos} video(s)."
    )


def _is_clip(clip: Any) -> bool:
    is_pair = isinstance(clip, (list, tuple)) and len(clip) == 2
    return (
        is_pair and isinstance(plain(clip[0]), (int, float)) and isinstance(plain(clip[1]), (int, float, type(None)))
    )


def _checked_clip(clip: Any) -> tuple[float, float | None] | None:
    if clip is None:
        return None
    start, end = float(clip[0]), None if clip[1] is None else float(clip[1])
    if not (0 <= start < float("inf")) or (end is not None and not end > start):
        raise ValueError(f"clip is ({start}, {end}) seconds. The start has to be 0 or later, the end after the start.")
    return start, end
