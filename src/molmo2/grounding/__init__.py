"""Points, tracks and counts: out of answers, into files and prompts. Needs nothing but Python.

    grounding = parse_grounding('<points coords="1 1 250 400">boats</points>', (640, 480))
    export_grounding(grounding, "boats.csv")

`prompts` writes the questions, `parse_grounding` reads answers, `format_points` and `format_tracks` write them.
"""

from molmo2.grounding import prompts
from molmo2.grounding.files import (
    export_grounding,
    from_coco,
    from_csv,
    from_json,
    from_mot,
    to_coco,
    to_csv,
    to_json,
    to_mot,
)
from molmo2.grounding.format import format_points, format_tracks
from molmo2.grounding.parse import (
    Grounding,
    GroundingStream,
    MediaInfo,
    Point,
    SampledFrame,
    Tag,
    Track,
    media_info,
    parse_grounding,
)
from molmo2.grounding.prompts import Prompt
from molmo2.grounding.structured import Event, NamedObject, StructuredAnswer, WrittenText, parse_structured

__all__ = [
    "Event",
    "Grounding",
    "GroundingStream",
    "MediaInfo",
    "SampledFrame",
    "NamedObject",
    "Point",
    "Prompt",
    "StructuredAnswer",
    "Tag",
    "Track",
    "WrittenText",
    "export_grounding",
    "format_points",
    "format_tracks",
    "from_coco",
    "from_csv",
    "from_json",
    "from_mot",
    "media_info",
    "parse_grounding",
    "parse_structured",
    "prompts",
    "to_coco",
    "to_csv",
    "to_json",
    "to_mot",
]
