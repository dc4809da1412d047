"""Molmo2's video processor: videos in, frames cut in patches and pooling indices out.

Works without torchvision: classes of transformers are imported from the modules that define them, because its root
shows placeholders where torchvision is missing, and whatever the base class would do with torchvision is done here.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import Unpack, VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor

from molmo2.configuration import CHANNELS
from molmo2.image.geometry import CropSettings, VideoPlan, plan_video, stack_pooling, video_token_pooling
from molmo2.image.options import (
    FIXED_STEPS,
    IdentityMixin,
    divisors_per_channel,
    pair,
    per_channel,
    pixel_dtype,
    plain,
    size_dict,
    warn_about,
)
from molmo2.image.pixels import as_output, empty_pixels, frame_pixel_values, interpolation_mode
from molmo2.video.decoding.timeline import VideoDecodeError
from molmo2.video.frame_encoding import FrameEncoder, encode_frames
from molmo2.video.loading import (
    ReadingOptions,
    SampledVideoMetadata,
    VideoItem,
    is_encoded,
    is_one_video,
    list_videos,
    outline_video,
    read_video,
)
from molmo2.video.read_ahead import read_ahead
from molmo2.video.sampling import SamplingSettings, sample_indices

__all__ = ["Molmo2VideoProcessor", "Molmo2VideosKwargs", "SampledVideoMetadata", "VideoDecodeError", "load_video"]

DEFAULTS = {
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
# Keys of the published video_preprocessor_config.json that have no effect; written so that other readers find them.
UNUSED_KEYS = {
    "crop_size": None,
    "data_format": "channels_first",
    "default_to_square": True,
    "device": None,
    "do_center_crop": None,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "input_data_format": None,
    "pad_size": None,
    "rescale_factor": 1 / 255,
    "video_metadata": None,
}
# What snippets for other models pass along, and what concerns the call rather than the frames.
IGNORED_OPTIONS = (frozenset(VideosKwargs.__annotations__) | UNUSED_KEYS.keys()) - FIXED_STEPS.keys() | {
    "auto_map",
    "backend",
    "clip",
    "code_revision",
    "disable_grouping",
    "frame_encoder",
    "image_patch_size",
    "image_processor_type",
    "interpolation",
    "min_frames",
    "pixel_dtype",
    "processor_class",
    "return_tensors",
    "return_video_kwargs",
    "trust_remote_code",
    "use_fast",
    "video_processor_type",
}
FRAMES_AHEAD = 3  # decoded while an earlier one is resized
NULLABLE_OPTIONS = ("max_fps",)  # None is a value of theirs, not "not given"


class Molmo2VideosKwargs(VideosKwargs, total=False):
    """Options of one call; what is not given keeps the value of the processor.

    Attributes:
        num_frames: the most frames taken of a video.
        frame_sample_mode: "uniform_last_frame" (evenly spread, the last frame included) or "fps" (a steady rate).
        max_fps: densest sampling of "uniform_last_frame", in frames per second; None for no limit.
        sampling_fps: slowest sampling of "fps", in frames per second.
        fps: shorthand of other processors: max_fps and sampling_fps in one.
        clip: (start, end) in seconds, the part of each video to look at, or a list of them, one per video; the end may
            be None. The printed times stay those of the whole video.
        do_sample_frames: False takes all frames of a decoded video; files are sampled nonetheless.
        video_backend: "decord", "torchcodec" or "pyav" to insist on one decoder. `backend` is taken too.
        patch_size: side of a patch, in pixels.
        pooling_size: (rows, cols) of patches that become one token.
        key_frame_interval: slow-fast clips: only the first of so many frames, and the last frame of the video, are
            pooled by `pooling_size`; the frames between by `between_pooling_size`. 1 switches this off.
        between_pooling_size: (rows, cols) of patches that become one token of a frame between key frames.
        pixel_dtype: "float32", or "uint8": a quarter of the memory, normalised by the model to the same numbers.
        device: where frames are resized and normalised; a GPU rounds a few pixels differently. The CPU by default.
        frame_encoder: `model.encode_frames`, to encode frames while the next are decoded. `video_features` (T, text
            width) come instead of pixels and pooling indices, and the pixels of a whole video are never in memory.
        return_metadata: also return a list `video_metadata`.
        return_tensors: "pt" for torch tensors, "np" or None for numpy arrays.
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
    return_tensors: str | None


@dataclass(frozen=True)
class VideoOptions:
    """The checked options of one call."""

    reading: ReadingOptions
    crops: CropSettings
    between: CropSettings
    key_frame_interval: int
    resample: int
    mean: list[float]
    std: list[float]
    pixel_dtype: np.dtype
    return_metadata: bool
    device: Any = None

    def plan(self, num_frames: int) -> VideoPlan:
        """How a video of so many sampled frames is cut."""
        return plan_video(num_frames, self.crops, self.between, self.key_frame_interval)


class Molmo2VideoProcessor(IdentityMixin, BaseVideoProcessor):
    """Samples frames of videos and cuts each into one crop of patches.

    Args:
        size: height and width of a frame for the model; an int for a square one.
        resample: PIL's number of the filter: 2 bilinear, 3 bicubic, 0 nearest.
        image_mean, image_std: per channel, or one number for all, applied after scaling to 0..1.
        num_frames, frame_sample_mode, max_fps, sampling_fps: which frames are taken, see `Molmo2VideosKwargs`.
        patch_size, pooling_size: side of a patch; rows and columns of patches that become one token.

    Raises:
        ValueError: an option makes no sense; the message names it.
    """

    model_input_names = ["pixel_values_videos", "video_token_pooling", "video_grids"]
    valid_kwargs = Molmo2VideosKwargs
    type_key = "video_processor_type"

    def __init__(self, **kwargs: Unpack[Molmo2VideosKwargs]):
        super().__init__(**self._take_identity(kwargs))
        _warn_about(kwargs, only_near_misses=True)
        for name, value in _canonical(DEFAULTS | _given(kwargs)).items():
            setattr(self, name, value)
        self._options({})  # refuses what no video could be sampled or cut with

    @classmethod
    def from_dict(cls, video_processor_dict: dict[str, Any], **kwargs):
        """Builds the processor from its JSON; options in `kwargs` win and are checked, whatever the release."""
        options = {name: kwargs.pop(name) for name in DEFAULTS if name in kwargs}
        _warn_about(kwargs, only_near_misses=True)
        return super().from_dict({**video_processor_dict, **options}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The content of video_preprocessor_config.json, the same on every release."""
        output = UNUSED_KEYS | _canonical({name: getattr(self, name) for name in DEFAULTS})
        if output["video_backend"] is None:  # a matter of the machine, not of the model
            del output["video_backend"]
        if output["key_frame_interval"] == 1:  # other readers know nothing of slow-fast clips
            del output["key_frame_interval"], output["between_pooling_size"]
        return {**output, **self._identity()}

    def plan(self, num_frames: int, **overrides: Any) -> VideoPlan:
        """How a video of this many sampled frames is cut: grid and number of visual tokens, without any pixel.

        Args:
            num_frames: sampled frames.
            overrides: options as for `preprocess`, for example `pooling_size=2`.
        """
        return self._options(overrides).plan(num_frames)

    def get_num_of_video_patches(
        self, num_frames: int, height: int | None = None, width: int | None = None, videos_kwargs: Any = None
    ) -> int:
        """How many visual tokens a video of this many sampled frames gives; its size does not matter.

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
        **kwargs: Unpack[Molmo2VideosKwargs],
    ) -> BatchFeature:
        """Samples frames, cuts them into patches and says which patches make up which visual token.

        Args:
            videos: one video or a (nested) list of them; see `list_videos` for what counts as one.
            video_metadata: a dict or `VideoMetadata` per video. Frames need their rate (`fps`) or the times of all
                frames in seconds (`timestamps`); files need nothing.
            do_sample_frames: False takes all frames of a decoded video, whose indices in the source may be given as
                `frames_indices` in the metadata. Files are sampled in any case, as in training.
            return_metadata: also return a list `video_metadata`, a `SampledVideoMetadata` per video.
            kwargs: options for this call, see `Molmo2VideosKwargs`. None keeps the processor's value, except for
                `max_fps`, where it lifts the limit.

        Returns:
            Frames and tokens of all videos one after the other, numpy arrays or, with `return_tensors="pt"`, tensors:
            pixel_values_videos: (frames, patches, patch_size * patch_size * 3) float32, or uint8 if that is asked for.
            video_token_pooling: (tokens, pooled patches) int64; patch numbers within the video, -1 for none.
            video_grids: (videos, 3) int64; sampled frames, rows and columns of tokens of each. A slow-fast clip has
                one row for each run of frames that are pooled alike, and its patch numbers count within the run.
            With a `frame_encoder`, video_features (tokens, text width), always a tensor, instead of the first two.

        Raises:
            FileNotFoundError, TypeError, ValueError: a video cannot be read, or an option makes no sense.
        """
        call = {**kwargs, "do_sample_frames": do_sample_frames, "return_metadata": return_metadata}
        options = self._options(call)
        items = list_videos(videos, video_metadata)
        clips = clips_per_video(kwargs.get("clip"), len(items))
        encoder = kwargs.get("frame_encoder")
        options = replace(options, device=kwargs.get("device"))
        cut = [_cut(item, options, clip, encoder) for item, clip in zip(items, clips, strict=True)]
        plans = [options.plan(len(metadata.timestamps)) for _, metadata in cut]
        grids = [grid for plan in plans for grid in plan.grids]
        data: dict[str, Any] = {}
        if encoder is None:
            data["pixel_values_videos"] = _pixel_values([pixels for pixels, _ in cut], options)
            data["video_token_pooling"] = stack_pooling(
                [video_token_pooling(plan) for plan in plans], options.crops.pool_height * options.crops.pool_width
            )
        elif cut:
            data["video_features"] = torch.cat([vectors for vectors, _ in cut])
        data["video_grids"] = np.array(grids, dtype=np.int64).reshape(len(grids), 3)
        features = BatchFeature(data=data, tensor_type=kwargs.get("return_tensors"))
        if kwargs.get("device") is not None and kwargs.get("return_tensors") is not None:
            features = features.to(kwargs["device"])
        if options.return_metadata:
            features["video_metadata"] = [metadata for _, metadata in cut]
        return features

    def outline(self, videos: Any, video_metadata: Any = None) -> list[Callable[..., tuple[VideoPlan, list[float]]]]:
        """Looks at videos without decoding them, to plan what a request will take.

        Args:
            videos, video_metadata: as for `preprocess`.

        Returns:
            For each video a function from options of `preprocess` to its plan and the times of its frames in seconds.
        """

        def outline_one(item: VideoItem) -> Callable[..., tuple[VideoPlan, list[float]]]:
            times_of = outline_video(item, self.video_backend)

            def planned(clip: Any = None, **overrides: Any) -> tuple[VideoPlan, list[float]]:
                options = self._options(overrides)
                times = times_of(replace(options.reading, clip=_checked_clip(clip)))
                return options.plan(len(times)), times

            return planned

        return [outline_one(item) for item in list_videos(videos, video_metadata)]

    def fetch_videos(
        self,
        video_url_or_urls: Any,
        sample_timestamps_fn: Callable[..., Any] | None = None,
        sample_indices_fn: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Decodes and samples files, paths and URLs for a later `preprocess(..., video_metadata=metadata)`.

        Unlike `preprocess`, which reads files itself, this has to hold the sampled frames at full resolution.

        Args:
            video_url_or_urls: one video or a (nested) list of them. Videos that are decoded already stay as they are.
            sample_timestamps_fn: called with `metadata=VideoMetadata(...)`, returns the times to show in seconds;
                replaces the sampling of this processor.
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
            return item.video, item.metadata
        options = self._options(kwargs, times_of=sample_timestamps_fn, indices_of=sample_indices_fn)
        return _decode(item, options.reading, kwargs.get("clip"))

    def sample_frames(self, metadata: Mapping[str, Any], **kwargs: Any) -> np.ndarray:
        """Indices of the frames taken of a decoded video with this metadata (`total_num_frames` and `fps`)."""
        sampling = self._options(kwargs).reading.sampling
        return sample_indices(metadata["total_num_frames"], metadata["fps"], sampling)

    def _options(
        self,
        overrides: Mapping[str, Any],
        times_of: Callable[..., Any] | None = None,
        indices_of: Callable[..., Any] | None = None,
    ) -> VideoOptions:
        """The processor's options with those of one call over them, checked."""
        _warn_about(overrides)
        values = {name: getattr(self, name) for name in DEFAULTS}
        given = _given(overrides)
        fps = given.get("fps", values["fps"])
        if isinstance(fps, (int, float)):  # lists come from snippets for other models and say nothing new
            given = {"max_fps": fps, "sampling_fps": fps} | given
        values = _canonical(values | given)
        interpolation_mode(values["resample"])
        reading = ReadingOptions(
            sampling=SamplingSettings(
                num_frames=values["num_frames"],
                frame_sample_mode=values["frame_sample_mode"],
                max_fps=values["max_fps"],
                sampling_fps=values["sampling_fps"],
            ),
            do_sample_frames=values["do_sample_frames"],
            backend=values["video_backend"],
            input_data_format=overrides.get("input_data_format"),
            times_of=times_of,
            indices_of=indices_of,
        )
        size, pooling_size = values["size"], values["pooling_size"]
        return VideoOptions(
            reading=reading,
            crops=CropSettings(size["height"], size["width"], values["patch_size"], *pooling_size),
            between=CropSettings(size["height"], size["width"], values["patch_size"], *values["between_pooling_size"]),
            key_frame_interval=values["key_frame_interval"],
            resample=values["resample"],
            mean=values["image_mean"],
            std=values["image_std"],
            pixel_dtype=pixel_dtype(overrides.get("pixel_dtype"), values["image_mean"], values["image_std"]),
            return_metadata=values["return_metadata"],
        )


def load_video(
    video: Any,
    *,
    backend: str | None = None,
    sample_timestamps_fn: Callable[..., Any] | None = None,
    num_frames: int = 384,
    **settings: Any,
) -> tuple[np.ndarray, SampledVideoMetadata]:
    """Decodes the sampled frames of one video file at full resolution.

    Args:
        video: a path, URL, the bytes of a video file or an open one.
        backend: "decord", "torchcodec" or "pyav" to insist on one decoder.
        sample_timestamps_fn: called with `metadata=VideoMetadata(...)`, returns the times to show in seconds; replaces
            the sampling.
        num_frames, settings: options as for `Molmo2VideoProcessor.preprocess`.

    Returns:
        (F, H, W, 3) uint8 frames, and their metadata.
    """
    if not is_encoded(video):
        raise TypeError(f"load_video reads a path, URL, bytes or a file object, not a {type(video).__name__}.")
    processor = Molmo2VideoProcessor()
    return processor.fetch_videos(
        video, sample_timestamps_fn, video_backend=backend, num_frames=num_frames, **settings
    )


def _decode(item: VideoItem, reading: ReadingOptions, clip: Any) -> tuple[np.ndarray, SampledVideoMetadata]:
    """The sampled frames of an encoded video, (F, H, W, 3) uint8."""
    return read_video(
        item, replace(reading, clip=clips_per_video(clip, 1)[0]), lambda frames, _: np.stack(list(frames))
    )


def _cut(
    item: VideoItem, options: VideoOptions, clip: tuple[float, float | None] | None, encoder: FrameEncoder | None
) -> tuple[Any, SampledVideoMetadata]:
    """The sampled frames of a video as patches, (F, P, patch pixels), or as vectors; one is decoded at a time."""

    def to_pixel_values(frames: Iterator[np.ndarray], num_frames: int) -> torch.Tensor:
        return frame_pixel_values(
            frames if encoder is not None else read_ahead(frames, FRAMES_AHEAD),
            options.crops,
            resample=options.resample,
            mean=options.mean,
            std=options.std,
            num_frames=num_frames,
            dtype=options.pixel_dtype,
            device=options.device,
        )

    def to_vectors(frames: Iterator[np.ndarray], num_frames: int) -> Any:
        return encode_frames(frames, options.plan(num_frames), to_pixel_values, encoder)

    use = to_pixel_values if encoder is None else to_vectors
    return read_video(item, replace(options.reading, clip=clip), use)


def _pixel_values(cut: list[torch.Tensor], options: VideoOptions) -> Any:
    if len(cut) == 1:
        return as_output(cut[0])
    shape = 0, options.crops.patches_per_crop, options.crops.patch_size**2 * CHANNELS
    return as_output(torch.cat([empty_pixels(shape, options.pixel_dtype, options.device), *cut]))


def clips_per_video(clip: Any, num_videos: int) -> list[tuple[float, float | None] | None]:
    """One checked (start, end) per video."""
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


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of ours that were given; None stands for "not given" unless it is a value of the option."""
    if options.get("backend") is not None:
        options = {"video_backend": options["backend"], **options}
    return {
        name: value
        for name, value in options.items()
        if name in DEFAULTS and (value is not None or name in NULLABLE_OPTIONS)
    }


def _canonical(values: Mapping[str, Any]) -> dict[str, Any]:
    """All options in the one form they are stored and saved in; also what makes them plain JSON."""
    return {
        **{name: plain(values[name]) for name in DEFAULTS},
        "do_convert_rgb": bool(values["do_convert_rgb"]),
        "do_sample_frames": bool(values["do_sample_frames"]),
        "return_metadata": bool(values["return_metadata"]),
        "image_mean": per_channel("image_mean", values["image_mean"]),
        "image_std": divisors_per_channel("image_std", values["image_std"]),
        "pooling_size": pair("pooling_size", values["pooling_size"], "(rows, cols) in patches"),
        "between_pooling_size": pair(
            "between_pooling_size", values["between_pooling_size"], "(rows, cols) in patches"
        ),
        "resample": values["resample"] if isinstance(values["resample"], str) else int(values["resample"]),
        "size": size_dict(values["size"]),
    }


def _warn_about(options: Mapping[str, Any], only_near_misses: bool = False) -> None:
    warn_about(
        options,
        owner=Molmo2VideoProcessor.__name__,
        known=DEFAULTS,
        ignored=IGNORED_OPTIONS,
        only_near_misses=only_near_misses,
    )
