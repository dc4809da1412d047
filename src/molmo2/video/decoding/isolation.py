"""Every decoder in a process that is ended at a deadline: for videos of strangers, see `MediaLimits.decode_seconds`.

A hostile file may keep a decoder busy for ever, and PyAV and torchcodec cannot be interrupted from inside. Here a
child opens and decodes; it is started with the first video, kept for the next ones and replaced when it was ended. It
reads paths only, and answers in JSON and pixels: what it says is never executed, whatever a file has made of it.

    reader = open_video(path, limits=MediaLimits(decode_seconds=60))
    call_isolated(annotate_video, path, grounding, target, seconds=300)  # also for what else reads a video
"""

import base64
import importlib
import json
import math
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np
from PIL import Image

from molmo2.image.limits import MediaLimitError, MediaLimits
from molmo2.video.decoding.decord_process import MAX_CHILD_BYTES, DecordProcess, prepare_child
from molmo2.video.decoding.readers import ISOLATION, READERS, Source, VideoReader
from molmo2.video.decoding.timeline import VideoDecodeError, VideoTimeline, brief


class IsolatedReader(VideoReader):
    """A reader of a video whose decoder, any of `READERS`, runs in a child.

    Raises:
        MediaLimitError: The decoder was waited for longer than `decode_seconds`, all frames together.
        VideoDecodeError: As of the reader itself; also where the child dies.
    """

    def __init__(self, backend: str, source: Source, only_choice: bool) -> None:
        super().__init__(source)
        self.backend = backend
        self._only_choice = only_choice
        self._seconds = float(source.limits.decode_seconds or 0)
        self._process: IsolatedProcess | None = None
        self.timeline = self._opened()

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.give_back()

    def _opened(self) -> VideoTimeline:
        """The timeline from a child that now has the video open."""
        process = self._process = IsolatedProcess.borrow()
        try:
            process.allow_decoding(self._source, self._seconds)
            return process.open_reader(self.backend, self._source, self._only_choice)
        except BaseException:
            self.close()
            raise
        finally:
            self._seconds = process.seconds_left

    def _decode(self, indices: list[int]) -> Iterator[np.ndarray]:
        if self._process is None or self._process.is_busy:  # closed, or an earlier iterator was not read to its end
            self.close()
            self._opened()
        process = self._process
        if process is not None:
            try:
                yield from process.frames(indices)
            finally:
                self._seconds = process.seconds_left


class IsolatedProcess(DecordProcess):
    """A child that decodes with any of `READERS`; `allow` it some time before its first request."""

    _idle: list[Any] = []
    decoder = "the decoder"
    seconds_left = math.inf
    _late = ""
    _has_video = False

    def _code(self) -> str:
        return f"from molmo2.video.decoding import isolation; isolation.serve({MAX_CHILD_BYTES})"

    def allow(self, seconds: float, late: str) -> None:
        """Wait this many seconds for all answers together; then a `MediaLimitError` says `late`."""
        self.seconds_left, self._late = seconds, late

    def allow_decoding(self, source: Source, seconds: float) -> None:
        """Wait this many of the seconds that the limits of a video allow."""
        try:
            source.limits.check("decode_seconds", math.inf, f"{source.name} was not decoded in time")
        except MediaLimitError as late:
            self.allow(seconds, str(late))

    def give_back(self) -> None:
        if self._has_video and not self.is_busy:  # else an idle child keeps a file open, and what its frames took
            self._has_video = False
            with suppress(MediaLimitError, VideoDecodeError):  # then it has ended
                self._ask({"close": True})
                self._result()
                self.is_busy = False
        super().give_back()

    def inspect(self, source: Source) -> str:
        """See `Source.animated_format`."""
        self._ask({"inspect": True, **_described(source)})
        image_format = self._result()["image_format"]
        self.is_busy = False
        return str(image_format)

    def open_reader(self, backend: str, source: Source, only_choice: bool) -> VideoTimeline:
        """Open a video in the child.

        Raises:
            MediaLimitError, VideoDecodeError: As the reader, or the child is late or dies.
        """
        self._has_video = True
        self._ask({"open": backend, **_described(source), "only_choice": only_choice})
        answer = self._result()
        starts = np.empty(answer.pop("count"), dtype=np.float64)
        self._read_into(starts)
        self.is_busy = False
        return VideoTimeline(starts, **answer)

    def frames(self, indices: list[int]) -> Iterator[np.ndarray]:
        """The frames with these ascending indices of the opened video.

        Raises:
            MediaLimitError, VideoDecodeError: As the reader, or the child is late or dies.
        """
        self._ask({"decode": indices})
        for _ in indices:
            answer = self._result()
            frame = np.empty(answer["shape"], dtype=np.uint8)
            self._read_into(frame)
            yield frame
        self._result()  # faults that only show at the end
        self.is_busy = False

    def call(self, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        """See `call_isolated`."""
        content = base64.b64encode(pickle.dumps(arguments)).decode()
        self._ask({"call": function.__name__, "of": function.__module__, "arguments": content})
        self._result()
        self.is_busy = False

    def _result(self) -> dict[str, Any]:
        """The next answer; an error in it is raised."""
        answer = self._answer(self._patience)
        if "error" not in answer:
            return answer
        self.is_busy = False
        if answer["error"] == MediaLimitError.__name__:
            raise MediaLimitError(answer["text"])
        raise VideoDecodeError(answer["text"], answer["reason"])

    @property
    def _patience(self) -> float:
        return max(0.0, self.seconds_left)

    def _within(self, seconds: float, transfer: Callable[[], Any]) -> Any:
        asked = time.monotonic()
        result = super()._within(seconds, transfer)
        self.seconds_left -= time.monotonic() - asked  # endless while a child starts, which is no fault of the file
        if self.seconds_left < 0:  # maybe between two looks at the clock; `is_busy` has the child ended
            raise MediaLimitError(self._late)
        return result

    def _death(self) -> VideoDecodeError:
        error = super()._death()
        if self._was_late and self.seconds_left < math.inf:
            self.seconds_left = 0.0
            raise MediaLimitError(self._late)
        return error


def animated_format(source: Source) -> str:
    """`Source.animated_format` of a child.

    Raises:
        MediaLimitError: Pillow was waited for longer than `decode_seconds`; others as there.
        VideoDecodeError: As there, or the child died.
    """
    process = IsolatedProcess.borrow()
    try:
        process.allow_decoding(source, float(source.limits.decode_seconds or 0))
        return process.inspect(source)
    finally:
        process.give_back()


def call_isolated(function: Callable[..., object], *arguments: Any, seconds: float) -> None:
    """Call a function of a module in a child that is ended at a deadline; what it returns is lost.

    Args:
        function: Importable by its name, as are the types of its arguments.
    Raises:
        MediaLimitError: It took longer than this.
        VideoDecodeError: It raised this text, or its process died.
    """
    process = IsolatedProcess.borrow()
    try:
        name = function.__name__
        process.allow(
            seconds, f"{name} did not end within {seconds:g} seconds and was ended. Allow it more `seconds`."
        )
        process.call(function, arguments)
    finally:
        process.give_back()


def _described(source: Source) -> dict[str, Any]:
    """A source as JSON, without the limit on time, which this process enforces."""
    about = {name: getattr(source, name) for name in ("name", "path", "num_bytes", "image_format")}
    return {**about, "limits": {**asdict(source.limits), "decode_seconds": None}}


ISOLATION.update(reader=IsolatedReader, animated_format=animated_format)


# --- the child -------------------------------------------------------------------------------------------------------


def serve(max_bytes: int) -> None:
    """What the child runs: answers requests on stdin, each a line of JSON, until they end or its parent does.

    Args:
        max_bytes: Of memory, where the system can limit it.
    """
    output = prepare_child(max_bytes)
    Image.init()  # loads the formats of Pillow, which is no part of the first video's time
    reader: VideoReader | None = None

    def send(answer: dict[str, Any], data: np.ndarray | None = None) -> None:
        output.write(json.dumps(answer).encode() + b"\n")
        if data is not None and data.nbytes:
            output.write(np.ascontiguousarray(data).data.cast("B"))
        output.flush()

    send({"ready": True})
    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            if "inspect" in request:
                send({"image_format": _source(request).animated_format()})
            elif "open" in request:
                reader = READERS[request["open"]](_source(request), only_choice=request["only_choice"])
                timeline = {name: value for name, value in vars(reader.timeline).items() if name != "start_seconds"}
                send({**timeline, "count": reader.timeline.num_frames}, reader.timeline.start_seconds)
            elif "close" in request:
                if reader is not None:
                    reader.close()
                reader = None
                send({"end": True})
            elif "call" in request:
                function = getattr(importlib.import_module(request["of"]), request["call"])
                function(*pickle.loads(base64.b64decode(request["arguments"])))
                send({"end": True})
            elif reader is not None:
                _send_frames(reader, request["decode"], send)
                send({"end": True})
        except Exception as error:  # decoders raise nearly anything
            reason = error.reason if isinstance(error, VideoDecodeError) else brief(error)
            send({"error": type(error).__name__, "text": str(error), "reason": reason})


def _send_frames(reader: VideoReader, indices: list[int], send: Callable[..., None]) -> None:
    for frame in reader.frames(indices):  # the last one is freed with this function, not with the next request
        send({"shape": frame.shape}, frame)


def _source(request: dict[str, Any]) -> Source:
    return Source(
        request["name"],
        request["path"],
        request["num_bytes"],
        MediaLimits(**request["limits"]),
        request["image_format"],
    )
