"""Answers as CVAT's annotation files, "CVAT for images 1.1" and "CVAT for video 1.1", and back.

    save(to_cvat(grounding, ["boats.jpg"]), "annotations.xml")   # "Upload annotations" of a task
    grounding = from_cvat(Path("annotations.xml").read_text())

Points of images are single points; objects of a video are tracks of points, which CVAT moves between key frames. A
task that takes them has the same labels.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from xml.etree import ElementTree

from molmo2.grounding.files import NO_SPAN, from_points, require_pixels
from molmo2.grounding.parse import IMAGE, MULTI_IMAGE, VIDEO, Grounding, MediaInfo, Point, SampledFrame
from molmo2.interop.objects import ObjectTrack, label_of, labels_of, object_tracks, require_names, size_of

VERSION = "1.1"
DOCTYPE = re.compile(r"<!DOCTYPE", re.I)


def to_cvat(
    grounding: Grounding,
    names: Sequence[str] = (),
    *,
    fps: float | None = None,
    num_frames: int | None = None,
) -> str:
    """An annotation file.

    A track ends in the frame after its last point; it also ends where a sampled frame between two of its points lacks
    the object.

    Args:
        names: File names of the images, as in the task; videos need none.
        fps: Videos: the rate, where the answer was read without the frames of the source.
        num_frames: Videos: number of frames, so that no track ends after the last one. None: unknown.

    Raises:
        ValueError: sizes or source frames are unknown, there are not as many names as images, or images are mixed with
            a video.
    """
    root = ElementTree.Element("annotations")
    ElementTree.SubElement(root, "version").text = VERSION
    if grounding.kind == VIDEO:
        size = size_of(grounding, "CVAT")
        tracks = object_tracks(grounding, "CVAT", fps)
        _add_meta(root, [track.label for track in tracks], "interpolation", num_frames, size)
        for track in tracks:
            _add_track(root, track, num_frames)
    else:
        require_pixels(grounding.points, "CVAT")
        sizes = require_names(grounding, names)
        _add_meta(root, labels_of(grounding), "annotation", len(names), None)
        for index, name in enumerate(names):
            width, height = sizes[index]
            image = _add(root, "image", id=index, name=name, width=f"{width:g}", height=f"{height:g}")
            for point in grounding.points:
                if point.image_index == index:
                    _add(
                        image,
                        "points",
                        label=label_of(point),
                        source="auto",
                        occluded=0,
                        points=_place(point),
                        z_order=0,
                    )
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _add(parent: ElementTree.Element, tag: str, **attributes: object) -> ElementTree.Element:
    return ElementTree.SubElement(parent, tag, {name: str(value) for name, value in attributes.items()})


def _place(point: Point) -> str:
    return ",".join(f"{float(value or 0):.6f}".rstrip("0").rstrip(".") for value in (point.x, point.y))


def _add_meta(
    root: ElementTree.Element,
    labels: Sequence[str],
    mode: str,
    num_frames: int | None,
    size: tuple[float, float] | None,
) -> None:
    task = _add(_add(root, "meta"), "task")
    if num_frames is not None:
        _add(task, "size").text = str(num_frames)
    _add(task, "mode").text = mode
    listed = _add(task, "labels")
    for label in dict.fromkeys(labels):
        entry = _add(listed, "label")
        _add(entry, "name").text = label
        _add(entry, "attributes")
    if size is not None:
        original = _add(task, "original_size")
        _add(original, "width").text, _add(original, "height").text = (f"{side:g}" for side in size)


def _add_track(root: ElementTree.Element, track: ObjectTrack, num_frames: int | None) -> None:
    element = _add(root, "track", id=track.number, label=track.label, source="auto")
    for entry in track.appearances:
        place = _place(entry.point)
        shape = {"occluded": 0, "keyframe": 1, "points": place, "z_order": 0}
        _add(element, "points", frame=entry.frame, outside=0, **shape)
        if entry.is_last and (num_frames is None or entry.frame + 1 < num_frames):
            _add(element, "points", frame=entry.frame + 1, outside=1, **shape)


def from_cvat(text: str, *, fps: float | None = None) -> Grounding:
    """The points of an annotation file; other shapes and tags are left out with a warning.

    Of tracks the key frames count, without those that CVAT computed between them; the number of a track is the id of
    its object. Points of images have no ids in these files and are numbered anew.

    Args:
        fps: Frame rate of a video, which the file does not hold: times are frame / fps.

    Raises:
        ValueError: it is no such file, a size or `fps` is missing, or a track has several points in one frame.
    """
    if DOCTYPE.search(text):
        raise ValueError("The file declares a document type, which CVAT never does: it may expand without limit.")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(
            f"This is not XML ({error}). Export as 'CVAT for images 1.1' or 'CVAT for video 1.1'."
        ) from None
    images, tracks = root.findall("image"), root.findall("track")
    if root.tag != "annotations" or (images and tracks):
        found = "images and tracks" if images and tracks else f"<{root.tag}>"
        raise ValueError(f"Found {found}; expected <annotations> with either images or tracks, as CVAT exports them.")
    others = sorted({shape.tag for holder in (*images, *tracks) for shape in holder if shape.tag != "points"})
    if others:
        warnings.warn(f"Only points are read, not: {', '.join(others)}.", stacklevel=2)
    return _read_tracks(root, tracks, fps) if tracks or _is_video(root) else _read_images(images)


def _is_video(root: ElementTree.Element) -> bool:
    return any(mode.text == "interpolation" for mode in root.iterfind("meta//mode"))


def _numbers(text: str | None) -> Iterator[tuple[float, float]]:
    for pair in (text or "").split(";"):
        try:
            x, y = map(float, pair.split(","))
        except ValueError:
            raise ValueError(f"Found the points {text!r}; expected 'x,y;x,y;...' in pixels.") from None
        yield x, y


def _side(value: str | None, where: str) -> float:
    try:
        side = float(str(value))
    except ValueError:
        side = 0.0
    if not side > 0:
        raise ValueError(f"The size of {where} is {value!r}; expected pixels. Export with the sizes of images.")
    return int(side) if side == int(side) else side


def _read_images(images: Sequence[ElementTree.Element]) -> Grounding:
    points: list[Point] = []
    sizes = []
    for index, image in enumerate(sorted(images, key=lambda image: int(image.get("id", 0)))):
        where = f"the image {image.get('name')!r}"
        width, height = _side(image.get("width"), where), _side(image.get("height"), where)
        sizes.append((width, height))
        for shape in image.iterfind("points"):
            for x, y in _numbers(shape.get("points")):
                label, number = shape.get("label", ""), len(points) + 1
                place = (x, y, x / width, y / height)
                points.append(Point("points", label, None, index + 1, number, *place, index, None, NO_SPAN))
    return from_points(points, MediaInfo(MULTI_IMAGE if len(sizes) > 1 else IMAGE, tuple(sizes)))


def _read_tracks(root: ElementTree.Element, tracks: Sequence[ElementTree.Element], fps: float | None) -> Grounding:
    if fps is None:
        raise ValueError("CVAT's files count frames and hold no rate. Pass `fps` of the video.")
    size = root.find("meta//original_size")
    width, height = (_side(None if size is None else size.findtext(name), "the video") for name in ("width", "height"))
    points = []
    for track in tracks:
        number = int(track.get("id", 0))
        for shape in track.iterfind("points"):
            if shape.get("outside") == "1" or shape.get("keyframe") == "0":
                continue
            index, places = int(shape.get("frame", 0)), list(_numbers(shape.get("points")))
            if len(places) != 1:
                raise ValueError(
                    f"Track {number} has {len(places)} points in frame {index}; expected one. Split it in CVAT."
                )
            x, y = places[0]
            frame = SampledFrame(index / fps, -1, index, index / fps)
            place = (x, y, x / width, y / height)
            points.append(
                Point("tracks", track.get("label", ""), None, frame.time, number, *place, None, frame, NO_SPAN)
            )
    return from_points(points, MediaInfo(VIDEO, ((width, height),)))
