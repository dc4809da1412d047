"""Points as prompts of SAM 2: from "where" to masks.

    for prompt in sam2_prompts(grounding):                          # the package sam2
        masks, scores, _ = predictor.predict(**prompt.predictor_arguments())
    for index, arguments in sam2_processor_arguments(sam2_prompts(grounding)).items():   # transformers
        inputs = processor(images=images[index], **arguments, return_tensors="pt")

Each object is a prompt of its own, with its point as foreground. Coordinates are pixels of the original image, which
both packages scale themselves.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from molmo2.grounding.files import nearest_points, object_key, object_numbers, points_by_frame, require_pixels
from molmo2.grounding.parse import Grounding, Point
from molmo2.interop.objects import is_about_video, label_of

FOREGROUND = 1
FRAME_INDICES = ("source", "sampled")


@dataclass(frozen=True)
class Sam2Prompt:
    """One object in one image or frame.

    Attributes:
        index: Index of the image in the prompt, or of the frame, from 0.
        is_video: Whether `index` counts frames.
        object_id: Number of the object, the same in all frames of a video.
        label: Its label.
        points: (n, 2) float32, x and y in pixels.
        labels: (n,) int32, 1 for foreground.
    """

    index: int
    is_video: bool
    object_id: int
    label: str
    points: np.ndarray
    labels: np.ndarray

    def predictor_arguments(self) -> dict[str, Any]:
        """Arguments of `SAM2ImagePredictor.predict`, after `set_image` of image or frame `index`."""
        return {"point_coords": self.points, "point_labels": self.labels}

    def video_predictor_arguments(self) -> dict[str, Any]:
        """Arguments of `SAM2VideoPredictor.add_new_points_or_box`, but for the state.

        Raises:
            ValueError: the prompt is about an image.
        """
        self._require_video()
        return {"frame_idx": self.index, "obj_id": self.object_id, "points": self.points, "labels": self.labels}

    def _require_video(self) -> None:
        if not self.is_video:
            raise ValueError("This prompt is about an image. Pass `predictor_arguments()` to SAM2ImagePredictor.")


def sam2_prompts(grounding: Grounding, *, frames: str = "source", fps: float | None = None) -> list[Sam2Prompt]:
    """One prompt per object and image or frame, by image or frame, then object.

    Args:
        frames: What SAM 2 is given of a video: "source" for all its frames, "sampled" for those alone that Molmo2 saw.
        fps: Rate of the video, where the answer was read without the frames of the source.

    Raises:
        ValueError: pixels are unknown, or the frames of a video are; the answer mixes a video with images.
    """
    if frames not in FRAME_INDICES:
        raise ValueError(f"`frames` is {frames!r}; expected one of {FRAME_INDICES}.")
    require_pixels(grounding.points, "SAM 2 prompts")
    if is_about_video(grounding, "SAM 2 prompts"):
        points = list(grounding.points)
        placed = points_by_frame(points, fps) if frames == "source" else _by_sampled_frame(points)
        return [_prompt(index, True, number, point) for (index, number), point in placed.items()]
    ordered = sorted(enumerate(grounding.points, 1), key=lambda entry: entry[1].image_index or 0)
    return [_prompt(point.image_index or 0, False, number, point) for number, point in ordered]


def _by_sampled_frame(points: list[Point]) -> dict[tuple[int, int], Point]:
    numbers = object_numbers(points)
    placed = []
    for point in points:
        if point.frame is None or point.frame.sampled_index < 0:
            raise ValueError(
                f"The sampled frame of the point at {point.key} s is unknown. Read the answer with what the processor "
                "returned for the video."
            )
        placed.append(((point.frame.sampled_index, numbers[object_key(point)]), point, point.seconds_to_frame))
    return dict(sorted(nearest_points(placed).items()))


def _prompt(index: int, is_video: bool, number: int, point: Point) -> Sam2Prompt:
    points = np.array([[point.x, point.y]], np.float32)
    return Sam2Prompt(index, is_video, number, label_of(point), points, np.full(1, FOREGROUND, np.int32))


def sam2_processor_arguments(prompts: Iterable[Sam2Prompt]) -> dict[int, dict[str, Any]]:
    """Arguments for the classes of transformers, by image or frame.

    For images `input_points` [image, object, point, (x, y)] and `input_labels` [image, object, point] of
    `Sam2Processor(images=images[index], ...)`; for videos also `frame_idx` and `obj_ids`, as
    `Sam2VideoProcessor.add_inputs_to_inference_session` takes them.
    """
    by_index: dict[int, list[Sam2Prompt]] = {}
    for prompt in prompts:
        by_index.setdefault(prompt.index, []).append(prompt)
    arguments: dict[int, dict[str, Any]] = {}
    for index, entries in sorted(by_index.items()):
        found: dict[str, Any] = {
            "input_points": [[prompt.points.tolist() for prompt in entries]],
            "input_labels": [[prompt.labels.tolist() for prompt in entries]],
        }
        if entries[0].is_video:
            found |= {"frame_idx": index, "obj_ids": [prompt.object_id for prompt in entries]}
        arguments[index] = found
    return arguments
