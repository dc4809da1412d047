"""What a request needs before anything is decoded - frames, crops, tokens, memory - and options that make it fit.

The counts are those of the call itself, because they come from the same crop plans (`molmo2.image.geometry`), the same
frame sampling (`molmo2.video.sampling`) and the same prompt (`molmo2.processing.prompt_tokens`); only the pixels are
left out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from molmo2.image.geometry import VideoPlan
from molmo2.image.measuring import measure_images
from molmo2.processing.chat import find_media, is_batch, media_arguments, option_of_call
from molmo2.processing.prompt_tokens import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from molmo2.tools.memory import MemoryEstimate, RequestShape, estimate_memory
from molmo2.video.probing import probe_videos
from molmo2.video.processing import clips_per_video, options_of_each

# Options of the call that change how many tokens a prompt has.
TEXT_OPTIONS = ("add_special_tokens", "allow_special_tokens", "split_special_tokens")


@dataclass(frozen=True)
class RequestPlan:
    """The size of a processor call with given options.

    Attributes:
        row_tokens: length of each row of `input_ids`, before padding.
        visual_tokens: of each row, the tokens that stand for images and frames, start, end and column tokens included.
        image_crops: crops of each image, the low-resolution view counted.
        timestamps: for each video the times of its frames in seconds.
        options: `num_frames` and `max_crops` as planned; pass them on: `processor(..., **plan.options)`.
        reduced: True if a limit made `options` smaller than requested.
        memory: bytes by purpose; None unless a model was given.
        shape: what time and memory depend on; see `molmo2.tools.memory`.
    """

    row_tokens: tuple[int, ...]
    visual_tokens: tuple[int, ...]
    image_crops: tuple[int, ...]
    timestamps: tuple[tuple[float, ...], ...]
    options: Mapping[str, int]
    reduced: bool = False
    memory: MemoryEstimate | None = None
    shape: RequestShape | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the longest row."""
        return max(self.row_tokens, default=0)

    @property
    def num_frames(self) -> tuple[int, ...]:
        """Sampled frames of each video."""
        return tuple(len(times) for times in self.timestamps)

    @property
    def num_crops(self) -> int:
        """Inputs of the vision tower: crops of images and frames of videos."""
        return sum(self.image_crops) + sum(self.num_frames)

    def __str__(self) -> str:
        lines = [f"{self.num_tokens} tokens in the longest row, {sum(self.visual_tokens)} visual tokens in all rows"]
        if self.image_crops:
            chosen = f" (max_crops={self.options['max_crops']})"
            lines.append(f"{len(self.image_crops)} image(s) in {sum(self.image_crops)} crops{chosen}")
        for times in self.timestamps:
            step = f", every {(times[-1] - times[0]) / (len(times) - 1):.2f} s" if len(times) > 1 else ""
            lines.append(f"video of {len(times)} frames from {times[0]:.1f} to {times[-1]:.1f} s{step}")
        if self.memory is not None:
            lines.append(str(self.memory))
        if self.reduced:
            chosen = ", ".join(f"{name}={value}" for name, value in self.options.items())
            lines.append(f"reduced to fit: {chosen}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Budget:
    """The limits of a request; None for no limit.

    Attributes:
        max_tokens: of the longest row.
        max_bytes: of everything but the weights.
    """

    max_tokens: int | None = None
    max_bytes: int | None = None

    def excess(self, plan: RequestPlan) -> str | None:
        """The limit that a plan exceeds, in words; None if the plan fits."""
        if self.max_tokens is not None and plan.num_tokens > self.max_tokens:
            return f"{plan.num_tokens} tokens, but max_tokens is {self.max_tokens}"
        if self.max_bytes is not None and plan.memory is not None and plan.memory.total > self.max_bytes:
            return f"about {plan.memory.total / 1e9:.2f} GB, but max_memory is {self.max_bytes / 1e9:.2f} GB"
        return None


def fit_to_budget(
    plan_for: Callable[[dict[str, int]], RequestPlan], num_frames: int, max_crops: int, budget: Budget
) -> RequestPlan:
    """The plan with the most frames and crops within the budget.

    Frames and crops are lowered by the same factor; what remains of the budget goes to frames first, then to crops.

    Args:
        plan_for: the plan for given `num_frames` and `max_crops`; must not shrink when they grow.
        num_frames, max_crops: the requested options, which are upper bounds.

    Raises:
        ValueError: not even one frame and one crop fit; the message says by how much.
    """
    requested = {"num_frames": num_frames, "max_crops": max_crops}
    full = plan_for(requested)
    if budget.excess(full) is None:
        return full
    smallest = plan_for(dict.fromkeys(requested, 1))
    excess = budget.excess(smallest)
    if excess is not None:
        raise ValueError(
            f"The request takes at least {excess}. Raise the limit, shorten the text or pass fewer images and videos: "
            f"with {dict(smallest.options)} nothing more can be saved."
        )

    def fits(options: dict[str, int]) -> bool:
        return budget.excess(plan_for(options)) is None

    steps = max(num_frames, max_crops)

    def scaled(step: int) -> dict[str, int]:
        return {name: max(1, value * step // steps) for name, value in requested.items()}

    chosen = scaled(_largest(0, steps, lambda step: fits(scaled(step))))
    chosen["num_frames"] = _largest(
        chosen["num_frames"], num_frames, lambda value: fits({**chosen, "num_frames": value})
    )
    chosen["max_crops"] = _largest(chosen["max_crops"], max_crops, lambda value: fits({**chosen, "max_crops": value}))
    return replace(plan_for(chosen), reduced=True)


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number from `low` (which fits) to `high` that fits, by bisection."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


@dataclass(frozen=True)
class RequestPlanner:
    """A processor call without its pixels, for any `num_frames` and `max_crops`.

    Attributes:
        prompts: with their placeholders.
        image_sizes: (height, width) of each image.
        video_plans: for each video a function of the video options that gives its plan and frame times; see
            `probe_videos`.
        own_options: of each video, those that hold for it alone.
        options: of the call, sorted by modality.
    """

    processor: Any
    prompts: list[str]
    image_sizes: list[tuple[int, int]]
    video_plans: list[Callable[..., tuple[VideoPlan, list[float]]]]
    own_options: list[dict[str, Any]]
    options: dict[str, dict[str, Any]]

    @classmethod
    def from_call(
        cls,
        processor: Any,
        text: Any,
        images: Any,
        videos: Any,
        per_video_options: Any,
        options: dict[str, dict[str, Any]],
    ) -> "RequestPlanner":
        """Read the headers of the images and videos of a call.

        Args:
            text, images, videos: As for `plan`.
            per_video_options: Options of single videos, as of the processor.
            options: As `sort_options` of the processor gives them.
        """
        metadata = options["videos_kwargs"].pop("video_metadata", None)
        if _is_conversation(text):
            if images is not None or videos is not None:
                raise ValueError("Messages name their images and videos: pass them without `images` and `videos`.")
            conversations = list(text) if is_batch(text) else [text]
            call = media_arguments(
                [find_media(messages) for messages in conversations],
                {"video_metadata": metadata, "per_video_options": per_video_options},
            )
            images, videos = call["images"], call["videos"]
            metadata, per_video_options = call.get("video_metadata"), call.get("per_video_options")
            text = [processor.apply_chat_template(messages, add_generation_prompt=True) for messages in conversations]
        limits = options["images_kwargs"].get("limits")
        limits = processor.image_processor.limits if limits is None else limits
        image_sizes = [] if images is None else measure_images(images, limits)
        limits = options["videos_kwargs"].get("limits")
        video_plans = [] if videos is None else probe_videos(processor.video_processor, videos, metadata, limits)
        if text is None:
            text = IMAGE_PLACEHOLDER * len(image_sizes) + VIDEO_PLACEHOLDER * len(video_plans)
        clips = options["videos_kwargs"].pop("clip", None)
        clips = clips_per_video(clips, len(video_plans))
        own_options = [
            {"clip": clip, **own} for clip, own in zip(clips, options_of_each(per_video_options, len(video_plans)))
        ]
        prompts = [text] if isinstance(text, str) else list(text)
        return cls(processor, prompts, image_sizes, video_plans, own_options, options)

    def plan(self, chosen: Mapping[str, int], model: Any = None, new_tokens: int = 0) -> RequestPlan:
        """The plan for these `num_frames` and `max_crops`; a video's own options win, as in the call."""
        image_options = {**self.options["images_kwargs"], "max_crops": chosen["max_crops"]}
        images = [self.processor.image_processor.plan(*size, **image_options) for size in self.image_sizes]
        videos = [
            video_plan(**{**self.options["videos_kwargs"], "num_frames": chosen["num_frames"], **own})
            for video_plan, own in zip(self.video_plans, self.own_options)
        ]
        encoded = self.processor.encode_prompts(
            self.prompts,
            [plan.grid for plan in images],
            [(plan.grids, times) for plan, times in videos],
            **{name: value for name, value in self.options["text_kwargs"].items() if name in TEXT_OPTIONS},
        )
        plan = RequestPlan(
            row_tokens=tuple(len(ids) for ids in encoded["input_ids"]),
            visual_tokens=tuple(sum(mask) for mask in encoded["token_type_ids"]),
            image_crops=tuple(plan.num_crops for plan in images),
            timestamps=tuple(tuple(times) for _, times in videos),
            options=dict(chosen),
        )
        parts = [*images, *(run for video, _ in videos for run in video.runs)]
        shape = RequestShape(
            num_crops=plan.num_crops,
            pooled_tokens=sum(part.num_pooled_tokens for part in parts),
            window=max([part.settings.pool_height * part.settings.pool_width for part in parts], default=0),
            rows=len(self.prompts),
            row_tokens=plan.num_tokens,
            new_tokens=new_tokens,
        )
        return replace(plan, shape=shape, memory=None if model is None else estimate_memory(model, shape))


def plan(
    processor: Any,
    text: Any = None,
    images: Any = None,
    videos: Any = None,
    *,
    max_tokens: int | None = None,
    max_memory: int | None = None,
    model: Any = None,
    max_new_tokens: int = 0,
    **options: Any,
) -> RequestPlan:
    """Plan a processor call before anything is decoded, and find options that make it fit.

    Args:
        text: A prompt, a list of prompts, or messages as for `apply_chat_template` (then without `images` and
            `videos`, which the messages name). None counts images and videos alone.
        images, videos: As for the call. Of files, only the headers are read.
        max_tokens: Maximum number of tokens of a row; `num_frames` and `max_crops` are lowered until they fit.
        max_memory: Maximum number of bytes besides the weights; needs `model`.
        model: The model that will generate; adds an estimate of memory.
        max_new_tokens: Of `generate`; counts in the estimate of the cache.
        options: Of the call.
    Raises:
        TypeError: The first argument is no processor.
        ValueError: Not even one frame and one crop fit; `max_memory` without a model; and as the call.
    """
    if not hasattr(processor, "sort_options"):
        raise TypeError(
            "The processor comes first, and the model by name: `plan(processor, ..., model=model)`; "
            f"{type(processor).__name__!r} is none."
        )
    if max_memory is not None and model is None:
        raise ValueError("`max_memory` needs `model`, whose shapes decide how much a request takes.")
    beside = options.pop("per_video_options", None)
    sorted_options = processor.sort_options(options)
    per_video_options = option_of_call("per_video_options", beside, sorted_options["videos_kwargs"])
    planner = RequestPlanner.from_call(processor, text, images, videos, per_video_options, sorted_options)

    def chosen(section: str, part: Any, name: str) -> int:
        value = sorted_options[section].pop(name, None)
        return getattr(part, name) if value is None else value

    num_frames = chosen("videos_kwargs", processor.video_processor, "num_frames")
    max_crops = chosen("images_kwargs", processor.image_processor, "max_crops")

    def plan_for(chosen: dict[str, int]) -> RequestPlan:
        return planner.plan(chosen, model, max_new_tokens)

    return fit_to_budget(plan_for, num_frames, max_crops, Budget(max_tokens, max_memory))


def _is_conversation(text: Any) -> bool:
    """Whether this is messages, or a batch of them, rather than prompts."""
    if isinstance(text, str) or text is None or not len(text):
        return hasattr(text, "messages")
    return isinstance(text[0], Mapping) or is_batch(text)
