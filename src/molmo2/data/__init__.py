"""Rows of the published data sets as conversations, for training and for evaluation. Nothing is downloaded.

examples = Examples("allenai/Molmo2-VideoPoint", load_dataset(...), Folder("videos"))
print(examples.report)  # how many rows were left out, and why
collator = DataCollator(processor, weighting=TokenWeighting())
"""

from molmo2.data.examples import DATASETS, Examples, ReadingReport
from molmo2.data.media import Folder, MediaReference, UrlMapping, clip_name, first_of, urls
from molmo2.data.mixture import SFT_GROUPS, Mixture, MixtureState, Source, mixture_rates
from molmo2.data.queries import Settings
from molmo2.data.styles import (
    TEMPLATES,
    draw_length_prompt,
    draw_multiple_choice,
    draw_prompt,
    draw_time,
    draw_track_prompt,
)
from molmo2.data.subtitles import read_subtitles, subtitle_text

__all__ = [
    "DATASETS",
    "SFT_GROUPS",
    "TEMPLATES",
    "Examples",
    "Folder",
    "MediaReference",
    "Mixture",
    "MixtureState",
    "ReadingReport",
    "Settings",
    "Source",
    "UrlMapping",
    "clip_name",
    "draw_length_prompt",
    "draw_multiple_choice",
    "draw_prompt",
    "draw_time",
    "draw_track_prompt",
    "first_of",
    "mixture_rates",
    "read_subtitles",
    "subtitle_text",
    "urls",
]
