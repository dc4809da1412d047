"""The examples of a data set: its rows, grouped by their media, as conversations and message trees."""

import logging
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from molmo2.data import pointing, questions, tracks
from molmo2.data.media import MediaReference, Resolver, is_named, name_in_report, source_of, urls
from molmo2.data.queries import FORM_ERRORS, OTHER_FORM, Draw, Family, OtherForm, Row, Settings, Size, conversations

logger = logging.getLogger(__name__)

ACADEMIC_TRACKS = ("mevis", "burst", "ref-yt-vos", "lv-vis", "vicas", "revos", "ref-davis17", "yt-vis", "moca")
DATASETS: dict[str, Family] = {
    "allenai/Molmo2-Cap": questions.VIDEO_CAPTIONS,
    "allenai/Molmo2-VideoCapQA": questions.VIDEO_CHOICES,
    "allenai/Molmo2-VideoSubtitleQA": questions.SUBTITLE_CHOICES,
    "allenai/Molmo2-AskModelAnything": questions.VIDEO_QUESTIONS,
    "allenai/Molmo2-VideoPoint": pointing.VIDEO_POINTS,
    "allenai/Molmo2-VideoTrack": tracks.VIDEO_TRACKS,
    "allenai/Molmo2-MultiImageQA": questions.IMAGE_SET_QUESTIONS,
    "allenai/Molmo2-SynMultiImageQA": questions.SYNTHETIC_SET_QUESTIONS,
    "allenai/Molmo2-MultiImagePoint": pointing.IMAGE_SET_POINTS,
    "allenai/molmo2-track-instruction": tracks.ACADEMIC_TRACKS,
    **{f"allenai/molmo2-{name}": tracks.ACADEMIC_TRACKS for name in ACADEMIC_TRACKS},
    "allenai/molmo2-single-object-track": tracks.ACADEMIC_TRACKS,
    "allenai/MolmoPoint-TrackAny": tracks.ACADEMIC_TRACKS,
    "allenai/MolmoPoint-TrackSyn": tracks.ACADEMIC_TRACKS,
    "allenai/pixmo-cap": questions.IMAGE_CAPTIONS,
    "allenai/pixmo-points": pointing.IMAGE_POINTS,
    "allenai/pixmo-count": pointing.IMAGE_COUNTS,
    "allenai/pixmo-point-explanations": pointing.EXPLANATIONS,
    "allenai/molmo2-pixmo-multi-points": pointing.LOCAL_SET_POINTS,
    "allenai/pixmo-cap-qa": questions.CAPTION_QUESTIONS,
    "allenai/pixmo-ask-model-anything": questions.IMAGE_QUESTIONS,
    "allenai/CoSyn-400K": questions.SYNTHETIC_QUESTIONS,
    "allenai/CoSyn-point": pointing.COSYN_POINTS,
    "allenai/molmo2-tulu4-classified": questions.TEXT,
    "allenai/molmo2-hardcodes": questions.FIXED_ANSWERS,
}
MISSING = "an image or a video is missing"
NO_SIZE = "the points are in pixels, and the size of the image is not known"
MAX_NAMED = 20  # missing media that a report names
MAX_ERROR_LENGTH = 300  # of the error that a report quotes


@dataclass
class ReadingReport:
    """What became of the rows of a data set.

    Attributes:
        rows: Rows that were read.
        examples: Examples that they make.
        left_out: Rows that were left out, by reason.
        missing: The first missing images and videos: their names, or the rows of those without a name.
        first_error: The first of the errors for which rows have another form: "row 3: TypeError: ..."; "" for none.
    """

    name: str
    rows: int = 0
    examples: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    missing: list[str] = field(default_factory=list)
    first_error: str = ""

    def __str__(self) -> str:
        first = {MISSING: ", ".join(self.missing[:3]), OTHER_FORM: self.first_error}
        reasons = "; ".join(
            f"{number} because {reason}{f' (the first: {first[reason]})' if first.get(reason) else ''}"
            for reason, number in self.left_out.most_common()
        )
        left_out = f", {self.left_out.total()} left out: {reasons}" if self.left_out else ""
        return f"{self.name}: {self.rows} rows, {self.examples} examples{left_out}"


class Examples(Sequence[dict[str, Any]]):
    """The examples of a published data set, as rows for `DataCollator`, `PackedDataset` or a trainer.

        examples = Examples("allenai/Molmo2-VideoPoint", rows, Folder("videos"))
        print(examples.report)

    Rows are read once, to group them and to look for their media. What cannot be used is left out and counted in
    `report`, which is logged if anything was left out. An example is drawn when it is taken: by the seed, the epoch
    and its index, so that it is the same in every process and after a restart.

    Args:
        name: A key of `DATASETS`.
        rows: A sequence of rows: a `datasets.Dataset`, or a list of dictionaries.
        media: From a `MediaReference` to a path, URL or image, None where it is missing. Without it URLs are used.
        settings: How rows become examples.
        seed: Of everything that is drawn.
        missing: "report", or "raise" to fail where images or videos are missing.
    Attributes:
        report: A `ReadingReport`.
        epoch: Other numbers draw other styles, templates and subsets.
    Raises:
        FileNotFoundError: Media are missing and `missing` says "raise".
        ValueError: There is no such data set or configuration, a column is missing, or an option has no such value.
    """

    def __init__(
        self,
        name: str,
        rows: Sequence[Row],
        media: Resolver = urls,
        settings: Settings | None = None,
        *,
        seed: int = 0,
        missing: str = "report",
    ):
        if name not in DATASETS:
            raise ValueError(f"There is no reader for {name!r}. There are readers for {', '.join(DATASETS)}.")
        if missing not in ("report", "raise"):
            raise ValueError(f"`missing` is {missing!r}; expected 'report' or 'raise'.")
        self.name, self.family = name, DATASETS[name]
        self.rows, self.media, self.seed, self.epoch = rows, media, seed, 0
        self.settings = Settings() if settings is None else settings
        self.family.require(self.settings)
        self.report = ReadingReport(name)
        self._groups = self._group()
        self.report.examples = len(self._groups)
        if self.report.missing and missing == "raise":
            raise FileNotFoundError(str(self.report))
        if self.report.left_out:
            logger.warning("%s", self.report)

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: Any) -> Any:
        """The example: `messages`, a conversation or a tree of them, `dataset` and `rows`, the indices of its rows."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]  # IndexError past the end, also for negative ones
        indices = self._groups[number]
        rows = [self.rows[place] for place in indices]
        references = list(self.family.media(rows[0]))
        sources = [self._source(reference) for reference in references]
        sizes = self._sizes(sources)
        if sizes is None:
            names = ", ".join(getattr(each, "name", "one that its row holds") for each in references)
            raise FileNotFoundError(
                f"The size of an image of {self.name} is no longer known: {names}. It has been read once, so that its "
                "file has changed or has gone missing; restore it, or make the examples anew."
            )
        draw = Draw(
            random.Random(f"{self.seed} {self.epoch} {self.name} {number}"),
            self.settings,
            bool(getattr(self.media, "has_cut_clips", False)),
            self._frame_times(references, sources),
            sizes,
        )
        item = self.family.read(rows, draw)
        kept = range(len(sources)) if item.kept is None else item.kept
        parts = [self._part(references[place], sources[place], rows[0]) for place in kept]
        first, *others = conversations(item)
        return {
            "messages": [_with_media(first, parts), *others] if others else _with_media(first, parts),
            "dataset": self.name,
            "rows": indices,
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def _group(self) -> list[list[int]]:
        """Indices of the usable rows of each example, in order of the first one."""
        groups: dict[Any, list[int]] = {}
        known: dict[Any, bool] = {}
        for index, row in enumerate(_undecoded(self.rows)):
            self.report.rows += 1
            reason, references = self._read(index, row)
            absent = [name_in_report(each, index) for each in references if self._is_missing(each, known)]
            if absent:
                reason = MISSING
                self.report.missing += [name for name in absent if name not in self.report.missing]
                del self.report.missing[MAX_NAMED:]
            elif not reason and self.family.size_problem is not None:
                sizes = self._sizes([self._source(each) for each in references])
                reason = NO_SIZE if sizes is None else self.family.size_problem(row, sizes)
            if reason:
                self.report.left_out[reason] += 1
            else:
                values = tuple(row.get(column) for column in self.family.group_by)
                key = index if not values or values[0] is None else values
                groups.setdefault(key, []).append(index)
        return list(groups.values())

    def _read(self, index: int, row: Row) -> tuple[str | None, list[Any]]:
        """Why a row is left out, or None, and the media of one that is not."""
        try:
            reason = self.family.problem(row, self.settings)
            return reason, [] if reason else list(self.family.media(row))
        except KeyError as error:
            raise ValueError(f"Row {index} of {self.name} has no column {error}; it has {sorted(row)}.") from None
        except OtherForm as error:
            return str(error), []
        except FORM_ERRORS as error:
            logger.debug("Row %d of %s has another form.", index, self.name, exc_info=True)
            found = f"row {index}: {type(error).__name__}: {error}"[:MAX_ERROR_LENGTH]
            self.report.first_error = self.report.first_error or found
            return OTHER_FORM, []

    def _is_missing(self, reference: Any, known: dict[Any, bool]) -> bool:
        if not is_named(reference):
            return source_of(reference, self.media) is None
        key = (reference.kind, reference.name, reference.clip)
        if key not in known:
            known[key] = self.media(reference) is None
        return known[key]

    def _source(self, reference: Any) -> Any:
        source = source_of(reference, self.media)
        if source is None:
            name = getattr(reference, "name", "one that its row holds")
            raise FileNotFoundError(f"{name}, an image or a video of {self.name}, has gone missing.")
        return source

    def _part(self, reference: Any, source: Any, row: Row) -> dict[str, Any]:
        """The part of a message that shows an image or a video."""
        if not isinstance(reference, MediaReference) or reference.kind == "image":
            return {"type": "image", "image": source}
        part = {"type": "video", "video": source, **self.family.video_options(row, self.settings)}
        if reference.clip is not None and not getattr(self.media, "has_cut_clips", False):
            part["clip"] = reference.clip
        return part

    def _sizes(self, sources: Sequence[Any]) -> list[Size] | None:
        """The sizes of images with points in pixels, None if one is not known; [] for other families.

        Raises:
            ValueError: `Settings.image_size` gives something else than a pair.
        """
        if self.family.size_problem is None:
            return []
        found = [_checked_size(self.settings.image_size(source)) for source in sources]
        sizes = [size for size in found if size is not None]
        return sizes if len(sizes) == len(found) else None

    def _frame_times(self, references: Sequence[Any], sources: Sequence[Any]) -> Sequence[float] | None:
        frame_times = self.settings.frame_times
        is_video = len(references) == 1 and getattr(references[0], "kind", "") == "video"
        return frame_times(references[0], sources[0]) if frame_times is not None and is_video else None


def _checked_size(size: Any) -> Size | None:
    """(width, height) as numbers above 0, None for a size that is not known."""
    if size is None:
        return None
    try:
        width, height = map(float, size)
    except (TypeError, ValueError):
        raise ValueError(f"`Settings.image_size` gave {size!r}; expected (width, height) in pixels or None.") from None
    return (width, height) if 0 < width < math.inf and 0 < height < math.inf else None


def _undecoded(rows: Any) -> Iterator[Row]:
    """The rows of a sequence; images of a `datasets.Dataset` stay bytes."""
    if hasattr(rows, "with_format") and hasattr(rows, "iter"):
        for table in rows.with_format("arrow").iter(batch_size=256):
            yield from table.to_pylist()
    else:
        yield from rows


def _with_media(messages: list[dict[str, Any]], parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with its media at the head of its first question."""
    place = next(index for index, message in enumerate(messages) if message["role"] == "user")
    asked = {**messages[place], "content": [*parts, *messages[place]["content"]]}
    return [*messages[:place], asked, *messages[place + 1 :]]
