"""The styles of training: which prompts ask for what, drawn with a seeded generator.

A style says what an answer looks like. Where data sets have no question of their own, a template of the style is
drawn. Templates are written for this package, in the shapes of the original ones: a label, a rate, times or points.
"""

import random
from collections.abc import Sequence
from itertools import product

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DEFAULT_TRACK_FPS = 2  # of a prompt that says no rate


def _all_of(*columns: Sequence[str]) -> tuple[str, ...]:
    return tuple(" ".join(part for part in parts if part) for parts in product(*columns))


_POINT = _all_of(
    ("Point to", "Point at", "Mark", "Locate", "Find", "Pinpoint", "Where are"),
    ("the {label}", "{label}", "all {label}"),
)
_POINTING = (
    *(f"{text}{'?' if text.startswith('Where') else '.'}" for text in _POINT),
    "Point to the {label} in the image.",
    "Show me where the {label} are.",
    "Show me the {label}.",
    "Give the position of the {label}.",
    "Put a point on each of the {label}.",
    "Can you point to the {label}?",
    "Can you show where the {label} are?",
    "Can you find the {label}?",
    "Could you mark the {label} for me?",
    "If there are any {label}, point to them.",
    "Are there any {label}? Point to them.",
    "Look for the {label} and point to them.",
    "I am looking for the {label}. Where are they?",
    "Which points show the {label}?",
    "Answer with points: {label}",
    "{label}: where?",
    "point: {label}",
    "Points for the {label}, please.",
    "Every one of the {label}, as points.",
)
_COUNT = (
    "How many {label} are there?",
    "How many {label} do you see?",
    "How many {label} can be seen?",
    "How many {label} are visible?",
    "What is the number of {label}?",
    "What is the total number of {label}?",
    "Count the {label}.",
    "Count all {label}.",
    "Count how many {label} there are.",
    "Tell me how many {label} there are.",
    "Can you count the {label}?",
    "Give the number of {label}.",
    "Number of {label}?",
    "How many {label}?",
)
_BY_POINTING = ("Point to them first.", "Point to each one, then say how many.", "Show your count with points.")
_POINT_THEN_COUNT = (
    *_COUNT,
    *_all_of(_COUNT[:8], _BY_POINTING),
    "Point to the {label} and count them.",
    "Mark each of the {label}, then give the total.",
    "Find the {label}, point to them and say how many there are.",
    "Count the {label} by pointing to them.",
)
_COUNT_IN_AN_IMAGE = (
    "How many {label} are in the image?",
    "How many {label} are in this image?",
    "What is the number of {label} in the image?",
    "Count the {label} in the image.",
)
_COUNT_THEN_POINT = (
    "How many {label} are there? Then point to them.",
    "Say how many {label} there are, then point to them.",
    "Count the {label}, then show where they are.",
    "Give the number of {label} first and their points afterwards.",
    "First the number of {label}, then a point for each.",
    "How many {label} do you see, and where are they?",
)
_COUNT_ONLY = tuple(f"{text} Answer with a number only." for text in _COUNT)
_CAPTION = (
    "Describe this {what}.",
    "What is in this {what}?",
    "Caption this {what}.",
    "Write a caption for this {what}.",
    "What does this {what} show?",
)
_LONG = (
    "Describe this {what} in detail.",
    "Write a long description of this {what}.",
    "Describe everything in this {what}.",
    "Give a detailed account of this {what}.",
    "Explain this {what} in as much detail as you can.",
    "Write a detailed caption for this {what}.",
    "What is in this {what}? Leave nothing out.",
    "Describe this {what} to somebody who cannot see it.",
    "Give a thorough description of this {what}.",
    "Tell me all about this {what}.",
)
_SHORT = (
    "Describe this {what} briefly.",
    "Give a short description of this {what}.",
    "Write a short caption for this {what}.",
    "Sum up this {what} in a sentence or two.",
    "In short, what does this {what} show?",
)
_CLIP = (
    "Describe the video from {start_time} to {end_time}.",
    "What happens between {start_time} and {end_time}?",
    "Caption the part from {start_time} to {end_time}.",
    "Write a caption for {start_time} to {end_time}.",
    "What is shown from {start_time} until {end_time}?",
    "Describe what happens from {start_time} to {end_time}.",
    "Give a description of the clip that starts at {start_time} and ends at {end_time}.",
    "From {start_time} to {end_time}: what is going on?",
    "Describe the clip {start_time} - {end_time}.",
    "Look at {start_time} to {end_time} and describe it.",
)
_FRAME = (
    "Describe the frame at {start_time}.",
    "What is shown at {start_time}?",
    "Caption the frame at {start_time}.",
    "What can be seen at {start_time}?",
    "Describe what is visible at {start_time}.",
    "Write a caption for the frame at {start_time}.",
)
_TRANSCRIPT = (
    "Describe this {what} as if you were speaking.",
    "Say aloud what you see in this {what}.",
    "Talk me through this {what}.",
)
_CLIP_TRANSCRIPT = (
    "Talk me through the video from {start_time} to {end_time}.",
    "Say aloud what you see between {start_time} and {end_time}.",
    "Describe {start_time} to {end_time} as if you were speaking.",
)


def _about(what: str, templates: Sequence[str]) -> tuple[str, ...]:
    return tuple(text.replace("{what}", what) for text in templates)


TEMPLATES: dict[str, tuple[str, ...]] = {
    "pointing": _POINTING,
    "point_count": (*_POINT_THEN_COUNT, *_COUNT_IN_AN_IMAGE, *_all_of(_COUNT_IN_AN_IMAGE, _BY_POINTING)),
    "multi_image_pointing": tuple(text.replace("in the image", "in the images") for text in _POINTING),
    "multi_image_point_then_count": _POINT_THEN_COUNT,
    "multi_image_count_then_point": _COUNT_THEN_POINT,
    "multi_image_counting": _COUNT_ONLY,
    "video_point": tuple(text.replace("in the image", "in the video") for text in _POINTING),
    "video_point_count": _POINT_THEN_COUNT,
    "video_count_point": _COUNT_THEN_POINT,
    "video_count": _COUNT_ONLY,
    # Tracks: with a rate (below) and without.
    "video_point_track_per_frame": (
        "Track the {label}.",
        "Track {label}.",
        "Track all {label}.",
        "Follow the {label}.",
        "Follow the {label} through the video.",
        "Track the {label} over time.",
        "Point to the {label} in every frame.",
        "Where do the {label} go? Track them.",
        "Keep track of the {label}.",
        "Show the path of the {label}.",
    ),
    "video_point_track_per_frame_fps": (
        "Track the {label} at {fps} FPS.",
        "Track {label} at {fps} FPS",
        "Track all {label} at {fps} FPS.",
        "Follow the {label} at {fps} FPS.",
        "Follow the {label} with {fps} points a second.",
        "At {fps} FPS, track the {label}.",
        "Point to the {label} at {fps} FPS.",
        "Track the {label}, {fps} times a second.",
    ),
    "video_point_track_start_end": (
        "Where do the {label} first and last appear?",
        "Point to the first and the last appearance of the {label}.",
        "When and where are the {label} seen first, and when and where last?",
        "Find the {label}: where each of them appears and where it is seen last.",
        "Mark the {label} at the beginning and at the end of their time in the video.",
        "Ground the {label}: first and last point of each.",
    ),
    "video_single_point_track_start_end": (
        "Track {points}",
        "Track {points}.",
        "Follow {points}.",
        "Track the object at {points}.",
        "Follow the object at {points}.",
        "Follow the object at {points} through the video.",
        "Track what is at {points}.",
        "Keep track of the object at {points}.",
        "Where does the object at {points} go?",
        "Here is a point: {points}. Track the object.",
        "Track the object that is marked by {points}.",
        "Show the path of the object at {points}.",
    ),
    "long_caption": _about("image", _LONG),
    "short_caption": _about("image", _SHORT),
    "transcript": _about("image", _TRANSCRIPT),
    "video_long_caption": _about("video", _LONG),
    "video_short_caption": _about("video", _SHORT),
    "video_merged_caption": _about("video", _CAPTION),
    "video_transcript": _about("video", _TRANSCRIPT),
    "video_clip_caption_start_end": _CLIP,
    "video_clip_caption_start_end_in_seconds": _CLIP,
    "video_clip_transcript_start_end": _CLIP_TRANSCRIPT,
    "video_clip_transcript_start_end_in_seconds": _CLIP_TRANSCRIPT,
    "video_frame_caption_timestamp": _FRAME,
    "video_frame_caption_timestamp_in_seconds": _FRAME,
}
# How the count of an answer stands beside its points, as `format_points` takes it; "only" is the number alone.
COUNT_FORMS: dict[str, str | None] = {
    "pointing": None,
    "cosyn_point": None,
    "point_count": "after",
    "multi_image_pointing": None,
    "multi_image_point_then_count": "after",
    "multi_image_count_then_point": "before",
    "multi_image_counting": "only",
    "video_point": None,
    "video_point_count": "after",
    "video_count_point": "before",
    "video_count": "only",
}
NO_POINTING = "Without pointing: "
LETTER_INSTRUCTIONS = (
    "Answer with the letter.",
    "Answer with the letter only.",
    "Answer with the letter of the right option.",
    "Give the letter of the right option.",
    "Which letter is right?",
    "Choose a letter.",
    "Choose the right option by its letter.",
    "Reply with one letter.",
    "Pick the right letter.",
    "Only write the letter.",
    "The answer is a single letter.",
    "Name the letter of the best option.",
    "Select the correct letter.",
    "Say which letter is correct.",
    "Respond with the letter of your choice.",
    "Letter:",
)
TEXT_INSTRUCTIONS = (
    "Answer with one of the options.",
    "Answer with the text of the option.",
    "Choose one of the options.",
    "Pick one of these.",
    "Which of these is right?",
    "Reply with the right option.",
    "Repeat the right option.",
    "Write out the right option.",
    "Select the correct option.",
    "Say which option is correct.",
    "Only write the right option.",
    "Use the words of the option.",
    "Your answer has to be one of the options.",
    "Give the best option in full.",
)


def draw_prompt(style: str, rng: random.Random, **fields: object) -> str:
    """A prompt of a style, its template drawn.

    Args:
        fields: What the templates of the style name: `label`, `fps`, `points` (text), `start_time`, `end_time` (text,
            see `draw_time`).
    Raises:
        ValueError: The style has no templates, or a field is missing.
    """
    if style not in TEMPLATES:
        raise ValueError(f"The style {style!r} has no templates; there are {', '.join(sorted(TEMPLATES))}.")
    try:
        return rng.choice(TEMPLATES[style]).format(**fields)
    except KeyError as error:
        raise ValueError(f"Prompts of the style {style!r} need {error}; given were {sorted(fields)}.") from None


def draw_time(seconds: float, rng: random.Random, *, in_seconds: bool | None = None) -> str:
    """A time as prompts name it: seconds with one decimal, or hh:mm:ss; half and half unless `in_seconds` says."""
    if rng.random() < 0.5 if in_seconds is None else in_seconds:
        return f"{seconds:.1f}"
    whole = int(seconds)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def draw_track_prompt(label: str, fps: float, rng: random.Random) -> str:
    """A prompt for tracks at a rate; at 2 a second every other one says no rate."""
    if fps == DEFAULT_TRACK_FPS and rng.random() < 0.5:
        return draw_prompt("video_point_track_per_frame", rng, label=label)
    return draw_prompt("video_point_track_per_frame_fps", rng, label=label, fps=f"{fps:g}")


def draw_multiple_choice(question: str, options: Sequence[str], correct: int, rng: random.Random) -> tuple[str, str]:
    """A multiple-choice prompt and its answer: options with letters and a letter, or options and the text of one.

    Args:
        correct: Index of the right option, from 0.
    Raises:
        ValueError: There are more options than letters, or no such option.
    """
    if not 0 <= correct < len(options) <= len(LETTERS):
        raise ValueError(f"Option {correct} of {len(options)}: expected 1 to {len(LETTERS)} options, counted from 0.")
    has_letters = rng.random() < 0.5
    instruction = rng.choice(LETTER_INSTRUCTIONS if has_letters else TEXT_INSTRUCTIONS)
    lines = [f"{LETTERS[number]}. {text}" if has_letters else text for number, text in enumerate(options)]
    parts = [question, *lines]
    parts.insert(rng.choice((0, 1, len(parts))), instruction)
    return "\n".join(parts), LETTERS[correct] if has_letters else options[correct]


def draw_length_prompt(style: str, answer: str, rng: random.Random) -> str:
    """The prompt of pre-training's captions: the style and about how long, in units of 15 characters.

    "long_caption 83:"; the number has a noise of standard deviation 25 and is left out one time in ten.
    """
    if rng.random() < 0.1:
        return f"{style}:"
    return f"{style} {max(0, round(len(answer) / 15 + rng.gauss(0, 25)))}:"
