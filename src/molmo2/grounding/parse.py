r"""Points, tracks and counts in Molmo2's answers, read from text.

    "<points coords=\"1 1 512 340\">red kite</points>"  ->  one `Point`, in pixels if the size of the image is known

`parse_grounding` reads a whole answer, `GroundingStream` one that is still being generated; both run the same scanner,
which reads every character once. No text makes them raise, and a number becomes part of a point only inside `coords`
(or, in the older format, inside x and y). Needs nothing but Python.

Accepted beyond what `format_points` writes: tags in any case and number (`<point coords=...>`), attributes in
any order, `&quot;` and single quotes, TABs that became spaces or the two characters backslash-t, answers that were cut
off, and the older `<point x="10.5" y="20.1">`, `<points x1= y1= x2= y2=>` on a grid of 0..100. The older format
has neither image numbers nor ids: its points belong to image 1 and are numbered from 1 over the whole answer. In an
answer about a video alone they are dropped, because they have no time.
"""

import html
import re
from bisect import bisect_left
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

IMAGE, MULTI_IMAGE, VIDEO = "image", "multi_image", "video"
KINDS = (IMAGE, MULTI_IMAGE, VIDEO)
GRID = 1000  # coordinates are thousandths of the width and height
LEGACY_GRID = 100.0
PADDED_DIGITS = 3  # fewer digits at the end of a cut-off answer may be the beginning of a longer number

Span = tuple[int, int]
Size = tuple[float, float]


# --- results ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SampledFrame:
    """A sampled frame of a video.

    Attributes:
        time: Seconds at which the frame was sampled; the prompt prints them with one decimal.
        sampled_index: Index among the sampled frames, from 0.
        source_index: Index of the frame in the whole video; None if unknown.
        source_time: Start of that frame, in seconds from the first frame of the whole video; None if unknown.
        file_time: The presentation time stamp of that frame in the file, which need not start at 0; None if unknown.
    """

    time: float
    sampled_index: int
    source_index: int | None = None
    source_time: float | None = None
    file_time: float | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """One point of an answer.

    Attributes:
        tag: "points" or "tracks".
        label: Label of the tag; "" if it has none.
        alt: Alt text of the tag, or None.
        key: Number of the image from 1 (int), or seconds as written (float).
        id: For points a running number over the answer, for tracks the identity of the object.
        x, y: Pixels from the upper left corner; None if the size is unknown.
        x_norm, y_norm: The same as fractions of width and height, 0..1.
        image_index: `key` counted from 0; None for a point in a video.
        frame: The sampled frame nearest to `key`; None for images and where the sampled times are unknown.
        span: Position of the id and the two coordinates in the text: text[start:end].
    """

    tag: str
    label: str
    alt: str | None
    key: int | float
    id: int
    x: float | None
    y: float | None
    x_norm: float
    y_norm: float
    image_index: int | None
    frame: SampledFrame | None
    span: Span

    @property
    def time(self) -> float | None:
        """Seconds of the sampled frame, or as written where that is unknown; None for images."""
        if self.image_index is not None:
            return None
        return float(self.key) if self.frame is None else self.frame.time

    @property
    def seconds_to_frame(self) -> float:
        """Distance from the time as written to the sampled frame, in seconds; 0 where that is unknown and for images.

        Of two points of an object in one frame, the one with the smaller distance counts.
        """
        return 0.0 if self.frame is None else round(abs(float(self.key) - self.frame.time), 6)


@dataclass(frozen=True, slots=True)
class Track:
    """One object over time: its points sorted by time as written, one per time (the first if repeated)."""

    id: int
    label: str
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Tag:
    """One tag with coordinates, in the order of the text.

    Attributes:
        kind: "points" or "tracks".
        span: From its "<" to the end of its closing tag, or to where it was cut off.
        truncated: A quote, the tag or its closing tag is missing.
    """

    kind: str
    label: str
    alt: str | None
    span: Span
    truncated: bool
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class MediaInfo:
    """The images and videos that an answer is about.

    Attributes:
        kind: "image", "multi_image" or "video".
        sizes: (width, height) in pixels of each image, or of the video alone. Empty if unknown.
        sampled_frames: The sampled frames of a video.
        image_sizes: Sizes of the images in a prompt that also has a video: keys with a decimal point and tracks refer
            to the video, whole numbers to these images.
        more_videos: The other videos of a prompt with several. Times are read against the first one; to read an answer
            against another one, pass it alone.
    """

    kind: str
    sizes: tuple[Size, ...] = ()
    sampled_frames: tuple[SampledFrame, ...] = ()
    image_sizes: tuple[Size, ...] = ()
    more_videos: tuple["MediaInfo", ...] = ()

    def frame_at(self, seconds: float) -> SampledFrame | None:
        """The sampled frame for a printed time; None without sampled frames.

        A time finds the frame whose own time is printed like it, with one decimal, else any; of several the nearest,
        of equally near ones the first.
        """
        return _frame_at(_in_time(self.sampled_frames), seconds)


@dataclass(frozen=True, slots=True)
class Grounding:
    """Points, tracks and counts of one answer.

    Attributes:
        text: The answer.
        kind: "image", "multi_image" or "video"; inferred from the keys if no media were given.
        points: All points in the order of the text.
        tracks: The objects of `<tracks>`, by label and identity, in order of appearance.
        tags: The tags that have coordinates.
        count: The number that the answer states (the first, if several), or 0 for "There are none."; never computed.
        says_none: The answer states that there is nothing.
        truncated: A tag was cut off or lost a quote.
        media: The images and videos that the answer was read against.
    """

    text: str
    kind: str
    points: tuple[Point, ...]
    tracks: tuple[Track, ...]
    tags: tuple[Tag, ...] = field(repr=False)  # whose points are those above
    count: int | None
    says_none: bool
    truncated: bool
    media: MediaInfo | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.points)

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    def __bool__(self) -> bool:
        return True  # an answer without points is still an answer

    def as_dict(self) -> dict[str, Any]:
        """The same as dictionaries, lists, strings and numbers, for `json.dumps`."""
        return _json_ready(asdict(self))

    def frames(self, fps: float) -> list[dict[str, Any]]:
        """Points of a video by time: [{"time", "frame", "points": {id: (x, y)}}], times ascending.

        Args:
            fps: Frame rate of the video; `frame` is round(time * fps). For variable rates see `Point.frame`.

        If an id occurs twice at one time the first counts. Without a size the coordinates are fractions, 0..1.
        """
        by_time: dict[float, dict[int, tuple[float, float]]] = {}
        for point in self.points:
            if point.image_index is None:
                at = (point.x_norm, point.y_norm) if point.x is None or point.y is None else (point.x, point.y)
                by_time.setdefault(float(point.key), {}).setdefault(point.id, at)
        return [{"time": time, "frame": round(time * fps), "points": by_time[time]} for time in sorted(by_time)]

    def _repr_html_(self) -> str:
        """HTML table of the points, for notebooks."""
        rows = "".join(
            f"<tr><td>{html.escape(point.label)}</td><td>{point.key}</td><td>{point.id}</td>"
            f"<td>{_shown(point.x, point.x_norm)}</td><td>{_shown(point.y, point.y_norm)}</td></tr>"
            for point in self.points
        )
        head = "".join(
            f"<th>{name}</th>" for name in ("label", "time" if self.kind == VIDEO else "image", "id", "x", "y")
        )
        notes = [f"count: {self.count}"] * (self.count is not None) + ["cut off"] * self.truncated
        return f"<p>{html.escape(self.text)}</p><table><tr>{head}</tr>{rows}</table><p>{', '.join(notes)}</p>"


def _shown(pixels: float | None, fraction: float) -> str:
    return f"{fraction:.3f}" if pixels is None else f"{pixels:.1f}"


def _json_ready(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _json_ready(item) for name, item in value.items()}
    return [_json_ready(item) for item in value] if isinstance(value, (list, tuple)) else value


# --- what an answer is about -----------------------------------------------------------------------------------------


def media_info(media: Any, kind: str | None = None) -> MediaInfo | None:
    """`MediaInfo` from sizes, images, video metadata or a `MediaInfo`.

    Args:
        media: A `MediaInfo`; one size (width, height) or a list of them, or of images with such a `.size`; the
            metadata of a video (an object or dictionary with `timestamps`, or `fps` and `frames_indices`, and with
            `width` and `height`) or a list of those; None or an empty list if nothing is known.
        kind: "image", "multi_image" or "video", for sizes, which may be those of images or of a video.

    Raises:
        TypeError: `media` is none of these.
        ValueError: `kind` is none of the three.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"`kind` is {kind!r}; expected one of {KINDS}, or None to infer it from the answer.")
    found = media if media is None or is_media_info(media) else _described(media)
    if kind is not None:
        found = MediaInfo(kind) if found is None else replace(found, kind=kind)
    return found


def is_media_info(value: Any) -> bool:
    """Also true for the class of another copy of this file: loaders of remote code may run it more than once."""
    return all(hasattr(value, name) for name in ("kind", "sizes", "sampled_frames", "image_sizes", "more_videos"))


def _described(media: Any) -> MediaInfo | None:
    if _is_metadata(media):
        return _video_info(media)
    if (size := _size_of(media)) is not None:
        return MediaInfo("", (size,))
    if isinstance(media, Sequence) and not isinstance(media, (str, bytes)):
        if not media:
            return None
        if all(map(_is_metadata, media)):
            first, *others = map(_video_info, media)
            return replace(first, more_videos=tuple(others))
        sizes = tuple(size for size in map(_size_of, media) if size is not None)
        if len(sizes) == len(media):
            return MediaInfo(MULTI_IMAGE if len(sizes) > 1 else "", sizes)
    raise TypeError(
        f"{repr(media)[:80]} does not describe images or a video. Pass the processor's output, sizes "
        "[(width, height), ...], the metadata of a video, or nothing."
    )


def _is_metadata(value: Any) -> bool:
    names = ("fps", "frames_indices", "timestamps", "sampled_timestamps")
    if hasattr(value, "frames_indices"):  # the library's class, also a Mapping
        return True
    return isinstance(value, Mapping) and any(name in value for name in names)


def _size_of(value: Any) -> Size | None:
    """(width, height) of a pair of numbers or a PIL image, else None."""
    size = getattr(value, "size", value)
    is_pair = isinstance(size, (list, tuple)) and len(size) == 2
    if not is_pair or not all(hasattr(side, "__float__") and not isinstance(side, str) for side in size):
        return None
    return tuple(side if isinstance(side, (int, float)) else float(side) for side in size)  # type: ignore[return-value]


def _video_info(metadata: Any) -> MediaInfo:
    """`MediaInfo` of a video from transformers' `VideoMetadata` or Molmo2's, which knows the source frames too."""

    def get(name: str) -> Any:
        try:
            return metadata.get(name) if isinstance(metadata, Mapping) else getattr(metadata, name, None)
        except (AttributeError, TypeError, ValueError):  # the library's lacks some, and computes some from others
            return None

    width, height, fps, frame_size = (get(name) for name in ("width", "height", "fps", "frame_size"))
    if not (width and height) and frame_size is not None:
        height, width = frame_size
    indices, times = get("source_frame_indices"), get("sampled_timestamps")
    times = get("timestamps") if times is None else times
    if indices is None:
        indices = get("frames_indices")
    if times is None and indices is not None and fps:
        times = [float(index) / fps for index in indices]
    times = [] if times is None else [float(time) for time in times]
    source = get("source_timestamps")
    starts = times if source is None else source
    first = get("source_first_timestamp")
    known = indices is not None and len(indices) == len(times) == len(starts)
    frames = tuple(
        SampledFrame(
            time,
            index,
            int(indices[index]) if known else None,
            float(starts[index]) if known else None,
            float(starts[index]) + float(first) if known and first is not None else None,
        )
        for index, time in enumerate(times)
    )
    return MediaInfo(VIDEO, ((int(width), int(height)),) if width and height else (), frames)


def _in_time(frames: Sequence[SampledFrame]) -> list[SampledFrame]:
    return sorted(frames, key=lambda frame: frame.time)


def _frame_at(frames: Sequence[SampledFrame], seconds: float) -> SampledFrame | None:
    """`MediaInfo.frame_at` of frames in the order of their times."""

    def place(time: float) -> int:
        return bisect_left(frames, time, key=lambda frame: frame.time)

    around = frames[max(0, place(seconds) - 1) : place(seconds) + 1]
    if not around:
        return None
    found = min(around, key=lambda frame: (float(f"{frame.time:.1f}") != seconds, abs(frame.time - seconds)))
    return frames[place(found.time)]


# --- the scanner -----------------------------------------------------------------------------------------------------

_KIND = r"(?:points?|tracks?)"
_OPENING = rf"<{_KIND}(?=[\s/>]|coords)"
_CLOSING = rf"</{_KIND}\s{{0,8}}>"
_QUOTE = r"\\{0,4}(?:[\"']|&quot;)"
_ATTRIBUTE_OR_END = r"\s{0,8}(?:/?>|[a-z][\w-]{0,15}\s{0,8}=)"
TAG_START = re.compile(rf"<({_KIND})(?=[\s/>]|coords)", re.I)
TAG_EDGE = re.compile(rf"{_OPENING}|{_CLOSING}", re.I)
CLOSING_TAG = re.compile(_CLOSING, re.I)
CUT_EDGE = re.compile(r"</?(?:p|po|poi|poin|points?|t|tr|tra|trac|tracks?)?\s{0,8}\Z", re.I)
TAG_TOKEN = re.compile(
    rf"(?P<word>[^\s=<>/\"'&\\]+)|(?P<space>\s+)|(?P<quote>{_QUOTE})|(?P<end>>|{_OPENING}|{_CLOSING})"
    r"|(?P<open>[<&\\])|(?P<mark>[=/])",  # open: what may become a quote or an end
    re.I,
)
# Text inside quotes may hold the other spelling of the quote; that ends it only where an attribute or the tag follows.
VALUE_END = {
    '"': re.compile(rf"\"|&quot;(?={_ATTRIBUTE_OR_END})", re.I),
    "'": re.compile("'"),
    "&quot;": re.compile(rf"&quot;|\"(?={_ATTRIBUTE_OR_END})", re.I),
}
UNCLOSED_BEFORE_COORDS = re.compile(r"(?:\A|[\s>])coords\s*=\s*\Z", re.I)
COORDS_TOKEN = re.compile(
    rf"(?P<word>(?:[^\s;:,\"'<>&\\/]+|&(?!quot;)|<(?!/?{_KIND}(?:[\s/>]|coords))|/(?!>)"
    r"|\\(?!\\{0,3}(?:[tnr\"']|&quot;)))+)"
    r"|(?P<space>[^\S\t\n\r]+)|(?P<separator>[\t\n\r;:,]|\\{1,4}[tnr])"
    rf"|(?P<quote>{_QUOTE})|(?P<edge>[/<>])",
    re.I,
)
DIGIT = re.compile("[0-9]")
KEY = re.compile(r"[0-9]{1,9}(?:\.[0-9]{0,9})?|\.[0-9]{1,9}")
WHOLE = re.compile(r"[0-9]{1,9}")
LEGACY_NAME = re.compile(r"([xy])([0-9]{0,6})", re.I)
LEGACY_VALUE = re.compile(r"[0-9]{1,3}(?:\.[0-9]{0,15})?|\.[0-9]{1,15}")

MAX_WORD = 64  # characters; longer words and numbers mean nothing
LONG_WORD = "-" * (MAX_WORD + 1)
MAX_EDGE = 24  # characters that decide whether "<" starts a tag or ends one
LOOKAHEAD = 48  # characters that decide whether a quote ends a value, more than for any other search
TAG_MARK = "\0"  # stands for a tag in the text around the tags


@dataclass(frozen=True, slots=True)
class _Number:
    """A word inside coords; `value` is None for a damaged number, which keeps its place."""

    value: int | None
    text: str
    span: Span


@dataclass(slots=True)
class _OpenTag:
    """A tag as far as it has been read.

    Attributes:
        label: Of the attribute; what stands between the tags is `content`.
        legacy: Of the older format: by number "x" and "y", each with its value and span.
    """

    kind: str
    start: int
    alt: str | None = None
    label: str | None = None
    content: str = ""
    end: int = 0
    has_coords: bool = False
    truncated: bool = False
    legacy: dict[str, dict[str, tuple[float, Span]]] = field(default_factory=dict)

    def set(self, name: str, value: str, start: int) -> None:
        """Keep an attribute; the first of a name counts."""
        if name == "alt" and self.alt is None:
            self.alt = value
        elif name == "label" and self.label is None:
            self.label = value
        else:
            axis = LEGACY_NAME.fullmatch(name)
            number = value.strip()
            if axis is not None and LEGACY_VALUE.fullmatch(number):
                start += value.index(number)
                pair = self.legacy.setdefault(axis[2], {})
                pair.setdefault(axis[1].lower(), (float(number), (start, start + len(number))))


@dataclass(frozen=True, slots=True)
class _FoundPoint:
    """A point as it stands in the text; `key` is None in the older format."""

    tag: _OpenTag
    key: str | None
    id: int
    x: float
    y: float
    grid: float
    span: Span


class _CoordsReader:
    """Words of one `coords` to points: KEY, then ID X Y as often as it goes.

    A point goes into `found` once nothing that follows can change it: a last one with a short y waits, since a cut-off
    answer may have lost its other digits.
    """

    def __init__(self, tag: _OpenTag, found: list[_FoundPoint]):
        self._tag = tag
        self._found = found
        self._waiting: _FoundPoint | None = None
        self._key: str | None = None
        self._words: list[_Number] = []
        self._last_id: int | None = None
        self._is_broken = False

    def end_group(self) -> None:
        self._take(at_end=True)
        self._key, self._words, self._last_id, self._is_broken = None, [], None, False

    def release(self) -> None:
        """The point that waits is whole."""
        if self._waiting is not None:
            self._found.append(self._waiting)
            self._waiting = None

    def add(self, word: str, span: Span) -> None:
        self.release()
        is_long = len(word) > MAX_WORD  # a number no doubt, but none that means anything
        opens_group = not is_long and "." in word and DIGIT.search(word) is not None  # R6: a time, at any place
        if opens_group:
            self.end_group()
        if self._is_broken:
            return
        is_number = WHOLE.fullmatch(word) is not None
        if self._key is None:
            self._key = word
            self._is_broken = is_long or KEY.fullmatch(word) is None
        elif is_number or is_long or DIGIT.search(word) is not None:
            self._words.append(_Number(int(word) if is_number else None, word, span))
            self._take()
        else:
            self.end_group()
            self._is_broken = True

    def _take(self, *, at_end: bool = False) -> None:
        """Make points of the words that are there."""
        while len(self._words) >= 3:
            if self._may_be_key():
                if len(self._words) == 3 and not at_end:
                    return
                if len(self._words) > 3 and len(self._words[3].text) >= PADDED_DIGITS:
                    self._key = self._words.pop(0).text
                    self._last_id = None
                    continue
            point_id, x, y = self._words[:3]
            del self._words[:3]
            self._add_point(point_id, x, y)

    def _may_be_key(self) -> bool:
        """Whether the first word may number the next image: its TAB became a space, and ids run on behind it."""
        first, second, third = self._words[:3]
        if self._last_id is None or self._key is None or "." in self._key or self._tag.kind != "points":
            return False
        if first.value is None or second.value != self._last_id + 1 or len(third.text) < PADDED_DIGITS:
            return False
        is_next = len(second.text) < PADDED_DIGITS or first.value != self._last_id + 1
        return is_next and first.value > int(self._key)

    def _add_point(self, point_id: _Number, x: _Number, y: _Number) -> None:
        self._last_id = point_id.value
        if point_id.value is None or x.value is None or y.value is None or max(x.value, y.value) > GRID:
            return
        span = (point_id.span[0], y.span[1])
        self._waiting = _FoundPoint(self._tag, self._key, point_id.value, x.value, y.value, GRID, span)
        if len(y.text) >= PADDED_DIGITS:
            self.release()


class _Scanner:
    """Reads an answer piece by piece, each character once.

    The methods that return an iterator read one thing each, from top to bottom, and stop at `yield` wherever they need
    more text. What they have read is behind `_start`; of the rest, a bounded number of characters is kept.

    Attributes:
        found: The points, in the order of the text.
        tags: The tags with coordinates that have ended.
        prose: The text around the tags, with None for each.
        is_cut: The text ends inside a tag.
    """

    def __init__(self) -> None:
        self.found: list[_FoundPoint] = []
        self.tags: list[_OpenTag] = []
        self.prose: list[Any] = []
        self.is_cut = False
        self._text, self._base, self._start, self._is_last = "", 0, 0, False
        self._num_legacy = 0
        self._steps = self._read()

    def feed(self, piece: str, *, is_last: bool = False) -> None:
        self._base += self._start
        self._text, self._start, self._is_last = self._text[self._start :] + piece, 0, is_last
        next(self._steps, None)

    def _at(self, start: int) -> int:
        """Place in the whole text."""
        return self._base + start

    def _read(self) -> Iterator[None]:
        while (opening := (yield from self._search(TAG_START, self.prose))) is not None:
            self.prose.append(None)
            tag = _OpenTag("tracks" if opening[1][0] in "tT" else "points", self._at(opening.start()))
            end = yield from self._read_opening(tag)
            self.is_cut |= not end
            if tag.has_coords or self._add_legacy_points(tag):
                if end == ">":
                    yield from self._read_content(tag)
                tag.end = self._at(self._start)
                self.tags.append(tag)
        self.is_cut |= _cut_edge("".join(self.prose[-1:])) is not None

    def _add_legacy_points(self, tag: _OpenTag) -> bool:
        """Hand out points of the older format; whether there are any."""
        pairs = [(pair["x"], pair["y"]) for pair in tag.legacy.values() if len(pair) == 2]
        for (x, x_span), (y, y_span) in pairs:
            if max(x, y) <= LEGACY_GRID and tag.kind == "points":
                self._num_legacy += 1
                span = (min(x_span[0], y_span[0]), max(x_span[1], y_span[1]))
                self.found.append(_FoundPoint(tag, None, self._num_legacy, x, y, LEGACY_GRID, span))
        return bool(pairs)

    def _read_opening(self, tag: _OpenTag) -> Generator[None, None, str]:
        """Read the attributes of a tag.

        Returns:
            ">" or "/>"; what begins or ends in the place of that, "<points" or "</points>"; "" where the text is over.
        """
        coords = _CoordsReader(tag, self.found)
        name: str | None = None  # of the attribute whose value may come next
        has_equals = has_slash = False
        while (yield from self._has_more()):
            is_coords = has_equals and name == "coords" and not tag.has_coords
            if is_coords and DIGIT.match(self._text, self._start):
                yield from self._read_coords(tag, coords, has_quote=False)
                name, has_equals = None, False
                continue
            group, text, start = yield from self._token(TAG_TOKEN)
            if group == "end":
                tag.truncated |= text != ">"
                if not tag.truncated:
                    coords.release()
                if text[:2] not in (">", "</"):
                    self._start = start
                return "/>" if has_slash and text == ">" else text
            if group == "quote" and has_equals:
                if is_coords:
                    yield from self._read_coords(tag, coords, has_quote=True)
                else:
                    yield from self._read_value(tag, coords, str(name), text)
                name, has_equals = None, False
            elif group == "word":
                is_long = len(text) > MAX_WORD
                if has_equals and not is_long:
                    tag.set(str(name), text, self._at(start))
                name = None if has_equals or is_long else text.lower()
                has_equals = has_slash = False
            elif group != "space":
                has_equals = text == "=" and name is not None
                has_slash = text == "/"
                name = name if has_equals else None
        tag.truncated = True
        return ""

    def _read_value(self, tag: _OpenTag, coords: _CoordsReader, name: str, quote: str) -> Iterator[None]:
        start = self._at(self._start)
        parts: list[str] = []
        if (yield from self._search(VALUE_END[quote.lstrip("\\").lower()], parts)) is None:
            return
        value = "".join(parts)
        unclosed = UNCLOSED_BEFORE_COORDS.search(value, max(0, len(value) - MAX_WORD))
        if unclosed is not None and not tag.has_coords:  # its own quote is missing, this one opens the next
            tag.set(name, value[: unclosed.start()], start)
            tag.truncated = True
            yield from self._read_coords(tag, coords, has_quote=True)
        else:
            tag.set(name, value.removesuffix("\\") if quote.startswith("\\") else value, start)

    def _read_coords(self, tag: _OpenTag, coords: _CoordsReader, *, has_quote: bool) -> Iterator[None]:
        tag.has_coords = True
        while (yield from self._has_more()):
            group, text, start = yield from self._token(COORDS_TOKEN)
            if group == "word":
                coords.add(text, (self._at(start), self._at(self._start)))
            elif group != "space":
                coords.end_group()
            if group == "edge":
                self._start = start
                tag.truncated |= has_quote
            if group in ("edge", "quote"):
                return
        coords.end_group()

    def _read_content(self, tag: _OpenTag) -> Iterator[None]:
        parts: list[str] = []
        edge = yield from self._search(TAG_EDGE, parts)
        tag.content = "".join(parts)
        if edge is None:
            self.is_cut = tag.truncated = True
            cut = _cut_edge(tag.content)
            tag.content = tag.content if cut is None else tag.content[: cut.start()]
        elif edge[0][1] != "/":
            self._start = edge.start()
            tag.truncated = True

    # What the methods above read with.

    def _has_more(self) -> Generator[None, None, bool]:
        """Wait for text; False if it is over."""
        while self._start == len(self._text) and not self._is_last:
            yield
        return self._start < len(self._text)

    def _search(self, pattern: re.Pattern[str], before: list[str]) -> Generator[None, None, re.Match[str] | None]:
        """Go behind the next match, None if there is none; the text before it is added to `before`."""
        while (found := pattern.search(self._text, self._start)) is None:
            end = len(self._text) if self._is_last else max(self._start, len(self._text) - LOOKAHEAD)
            before.append(self._text[self._start : end])
            self._start = end
            if self._is_last:
                return None
            yield
        before.append(self._text[self._start : found.start()])
        self._start = found.end()
        return found

    def _token(self, pattern: re.Pattern[str]) -> Generator[None, None, tuple[str, str, int]]:
        """Go behind the next token, as it is whatever follows; of a long word only that it is long is kept.

        Returns:
            The name of its group, its text and where it starts in the text at hand.
        """
        is_long = False
        while True:
            token = next(pattern.finditer(self._text, self._start))  # the groups cover every character
            group, ahead = token.lastgroup, len(self._text) - token.start()
            may_go_on = ahead == len(token[0]) if group == "word" else group == "open" and ahead < MAX_EDGE
            if self._is_last or not may_go_on:
                self._start = token.end()
                return str(group), LONG_WORD if is_long else token[0], token.start()
            if len(token[0]) > MAX_WORD:
                is_long, self._start = True, len(self._text) - MAX_EDGE
            yield


def _cut_edge(text: str) -> re.Match[str] | None:
    """The beginning of a tag at the very end of a text."""
    return CUT_EDGE.search(text, max(0, len(text) - MAX_EDGE))


# --- reading ---------------------------------------------------------------------------------------------------------

NONE = re.compile(r"\b(?:there\s+are\s+none|no\s+tracks\s+available)\s*(?:\.|\Z)", re.I)
BARE_COUNT = re.compile(r"([0-9]{1,18})\.?")
COUNT_BEFORE = re.compile(rf"\bthere\s+(?:are|is)\s+([0-9]{{1,18}})\s*{TAG_MARK}", re.I)
COUNT_AFTER = re.compile(r"\bshows\s+a\s+total\s+of\s+([0-9]{1,18})(?![0-9]|\.[0-9])", re.I)
COUNTING = "counting the"


def parse_grounding(text: str, media: Any = None, *, kind: str | None = None) -> Grounding:
    """Read the points, tracks and counts of one answer.

    Args:
        text: The answer. Any text will do.
        media: What it is about, see `media_info`. Without it points have no pixels and no frames.
        kind: "image", "multi_image" or "video", where `media` leaves it open (a single size, or nothing). None infers
            it from the answer: keys with a decimal point and tracks refer to a video.

    Raises:
        TypeError: `media` describes neither images nor a video.
        ValueError: `kind` is not one of the three.
    """
    stream = GroundingStream(media, kind=kind)
    stream.feed(text)
    return stream.close()


class GroundingStream:
    """Incremental reader of an answer that is still being generated.

        stream = GroundingStream(media)
        for piece in streamer:
            for point in stream.feed(piece): ...
        grounding = stream.close()

    However the text is split, `feed` returns the same points, each once and in order, and `close` returns what
    `parse_grounding` returns for the whole text. A point is returned as soon as no further text can change it. Its
    `label` and `alt` are those written before the coordinates, since a label between tags comes after its points;
    those of `close` are complete.

    Args:
        media, kind: As for `parse_grounding`.
    """

    def __init__(self, media: Any = None, *, kind: str | None = None):
        self._media = media_info(media, kind)
        self._about = MediaInfo("") if self._media is None else self._media
        self._frames = _in_time(self._about.sampled_frames)
        self._scanner = _Scanner()
        self._pieces: list[str] = []
        self._num_found = 0
        self._result: Grounding | None = None

    def feed(self, piece: str) -> list[Point]:
        """Add a piece of text; returns the points that it completes.

        Raises:
            ValueError: The stream is closed.
        """
        if self._result is not None:
            raise ValueError("This stream is closed. Make a new GroundingStream for another answer.")
        self._pieces.append(piece)
        self._scanner.feed(piece)
        new = self._scanner.found[self._num_found :]
        self._num_found = len(self._scanner.found)
        points = [self._point(found, found.tag.label or "") for found in new]
        return [point for point in points if point is not None]

    def close(self) -> Grounding:
        """The complete answer. No text may follow; may be called again."""
        if self._result is None:
            self._scanner.feed("", is_last=True)
            self._result = self._grounding()
        return self._result

    def _point(self, found: _FoundPoint, label: str) -> Point | None:
        """The point, or None if there is no image or frame for its key."""
        if self._is_video(found):
            if found.key is None:
                return None
            key: int | float = float(found.key)
            size, index, frame = next(iter(self._about.sizes), None), None, _frame_at(self._frames, key)
        else:
            number = 1.0 if found.key is None else float(found.key)
            sizes = self._about.image_sizes if self._about.kind == VIDEO else self._about.sizes
            if number != int(number) or number < 1 or (sizes and number > len(sizes)):
                return None
            key, index, frame = int(number), int(number) - 1, None
            size = sizes[index] if sizes else None
        x, y = found.x / found.grid, found.y / found.grid
        width, height = (None, None) if size is None else size
        return Point(
            tag=found.tag.kind,
            label=label,
            alt=found.tag.alt,
            key=key,
            id=found.id,
            x=None if width is None else x * width,
            y=None if height is None else y * height,
            x_norm=x,
            y_norm=y,
            image_index=index,
            frame=frame,
            span=found.span,
        )

    def _is_video(self, found: _FoundPoint) -> bool:
        looks_like_video = found.tag.kind == "tracks" or (found.key is not None and "." in found.key)
        if self._about.kind == VIDEO:
            return looks_like_video or not self._about.image_sizes
        return looks_like_video and self._about.kind == ""

    def _grounding(self) -> Grounding:
        scanner = self._scanner
        labels = {id(tag): (tag.content.strip() or tag.label or "") for tag in scanner.tags}
        by_tag: dict[int, list[Point]] = {id(tag): [] for tag in scanner.tags}
        points = []
        for found in scanner.found:
            point = self._point(found, labels[id(found.tag)])
            if point is not None:
                points.append(point)
                by_tag[id(found.tag)].append(point)
        tags = tuple(
            Tag(tag.kind, labels[id(tag)], tag.alt, (tag.start, tag.end), tag.truncated, tuple(by_tag[id(tag)]))
            for tag in scanner.tags
        )
        prose = (TAG_MARK if text is None else text.replace(TAG_MARK, "\ufffd") for text in scanner.prose)
        count, is_none = _read_counts("".join(prose), bool(points))
        kind = self._about.kind or kind_of(points, tags)
        return Grounding(
            text="".join(self._pieces),
            kind=kind,
            points=tuple(points),
            tracks=tracks_of(points),
            tags=tags,
            count=count,
            says_none=is_none,
            truncated=scanner.is_cut or any(tag.truncated for tag in tags),
            media=None if self._media is None else replace(self._media, kind=kind),
        )


def kind_of(points: Sequence[Point], tags: Sequence[Tag] = ()) -> str:
    """Kind of an answer inferred from its points and tags: "image", "multi_image" or "video"."""
    if any(tag.kind == "tracks" for tag in tags) or any(point.image_index is None for point in points):
        return VIDEO
    return MULTI_IMAGE if any(point.image_index for point in points) else IMAGE


def tracks_of(points: Sequence[Point]) -> tuple[Track, ...]:
    """The objects of `<tracks>`, by label and identity, in order of appearance."""
    objects: dict[tuple[str, int], dict[float, Point]] = {}
    for point in points:
        if point.tag == "tracks":
            objects.setdefault((point.label, point.id), {}).setdefault(float(point.key), point)
    return tuple(
        Track(number, label, tuple(by_time[time] for time in sorted(by_time)))
        for (label, number), by_time in objects.items()
    )


def _read_counts(prose: str, has_points: bool) -> tuple[int | None, bool]:
    """The stated number, and whether the text states that there is nothing; `prose` has `TAG_MARK` for each tag."""
    prose = CLOSING_TAG.sub("", prose)
    bare = BARE_COUNT.fullmatch(prose.strip())
    said = [] if bare is None else [(0, bare[1])]
    said += [(match.start(), match[1]) for match in COUNT_BEFORE.finditer(prose)]
    said += _counts_after(prose)
    count = int(min(said)[1]) if said else None
    is_none = not has_points and not count and NONE.search(prose) is not None
    return (0 if is_none else count), is_none


def _counts_after(prose: str) -> list[tuple[int, str]]:
    """Position and number of each "shows a total of N" behind a tag, or "Counting the" in its sentence."""
    said, done = [], 0
    for match in COUNT_AFTER.finditer(prose):
        before = prose[done : match.start()]
        place = before.lower().rfind(COUNTING)
        is_about_tag = before.rstrip().endswith(TAG_MARK)
        if is_about_tag or (place >= 0 and ". " not in before[place:]):
            said.append((match.start(), match[1]))
        done = match.end()
    return said
