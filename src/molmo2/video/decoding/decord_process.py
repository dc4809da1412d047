"""decord in a process of its own, which a hostile file may end without harm to this one.

decord ends its process on some files: a seek past the end of memory is a segmentation fault, a header that announces
two billion frames a C++ exception that is never caught. Here it runs in a child that is started with the first
video, kept for the next ones, given up when it stops answering and replaced when it dies. It reads paths only.
"""

import importlib.util
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from molmo2.image.limits import MediaLimits
from molmo2.video.decoding.timeline import VideoDecodeError, brief

START_SECONDS = 60  # until a new child has to be ready: it imports numpy and decord
# How long a child may be silent while it opens a file or decodes; opening reads the whole file.
SILENT_SECONDS, READ_BYTES_PER_SECOND = 10, 5_000_000
WATCH_SECONDS = 0.5  # between looks at the clock
MAX_CHILD_BYTES = 8 << 30  # memory of a child, where the system can limit it
PIPE_BYTES = 1 << 20  # most a system grants without privileges; where it has one size only, this is ignored
HEADER_BYTES = 1 << 16  # in which, at either end of a file, its codec is named
MPEG4_SIGN = re.compile(rb"(?i)FMP4|XVID|DIVX|DX50|mp4v\0|V_MPEG4/ISO/A?S?P")
BROKEN_INSTALLATION = "It is installed, but does not start: fix the error that is named here, or uninstall it."
# All that a child has of this file beside the source of `prepare_child` and `_serve_decord`.
CHILD_IMPORTS = "import importlib, json, os, re, signal, sys, tempfile, threading, time\nfrom typing import Any"
MAX_IDLE_CHILDREN = 8  # kept for the next videos: vLLM reads media in as many threads


def prepare_child(max_bytes: int) -> Any:
    """Set up a child, which ends with its parent and may take so much memory; gives the file that answers go to."""
    parent = os.getppid()

    def follow_parent() -> None:  # a file may keep decoders busy for ever, and a pipe may outlive its owner in a fork
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print does not mix with answers
    try:
        resource = importlib.import_module("resource")
        resource.setrlimit(resource.RLIMIT_DATA, (max_bytes, resource.getrlimit(resource.RLIMIT_DATA)[1]))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except Exception:  # Windows has no limits, and a parent may have set narrower ones
        pass
    return output


def _serve_decord(output: Any) -> None:  # noqa: C901  # one function: its source and the one above are all it gets
    """What the child runs, from its source alone: answers requests on stdin, each a line of JSON, until that ends.

    {"open": path, "max_frames": count, "threads": count or 0} is answered by {"count", "fps", "shape"} and the spans
    of the frames, (count, 2) float64 seconds, or by {"count"} alone where it announces more than `max_frames`;
    {"decode": indices, "count": count} by {"index", "shape"} and the pixels of each frame, then by {"more": bool},
    whether there are more frames than counted. {"error"} ends an answer, {"alive"} may come at any time between them.
    """

    def send(answer: dict[str, Any], data: Any = None) -> None:
        output.write(json.dumps(answer).encode() + b"\n")
        if data is not None:
            output.write(memoryview(data).cast("B"))
        output.flush()

    try:
        numpy = importlib.import_module("numpy")
        decord = importlib.import_module("decord")
        decord.logging.set_level(decord.logging.INFO)  # at which decoders say what they conceal
    except Exception as error:
        send({"error": f"{type(error).__name__}: {error}"})
        return
    log = tempfile.TemporaryFile("ab+", buffering=0)  # noqa: SIM115  # what decoders complain about, of one video
    nowhere = os.dup(2)
    path, threads, spoke = "", 0, 0.0
    send({"ready": True})

    def opened() -> Any:
        # How a damaged frame is concealed depends on the number of threads, and on chance: see `is_damaged`.
        os.dup2(nowhere if threads == 1 else log.fileno(), 2)
        # decord repeats the last frame in place of missing ones; this fraction of the frames allows none (0: any).
        return decord.VideoReader(path, ctx=decord.cpu(0), num_threads=threads, fault_tol=1e-9)

    def is_damaged() -> bool:
        if threads == 1 or not os.fstat(log.fileno()).st_size:
            return False
        log.seek(0)
        return re.search(rb"(?i)error|conceal|corrupt|invalid|could not|unavailable", log.read(1 << 20)) is not None

    def show_life() -> None:
        nonlocal spoke
        if time.monotonic() - spoke > 1:
            send({"alive": index})
            spoke = time.monotonic()

    for line in sys.stdin.buffer:
        request = json.loads(line)
        index = None
        try:
            if "open" in request:
                path, threads = request["open"], request["threads"]
                log.truncate(0)
                reader = opened()
                count = len(reader)
                if count > request["max_frames"]:
                    send({"count": count})
                    continue
                spans = numpy.asarray(reader.get_frame_timestamp(list(range(count))), dtype=numpy.float64)
                shape = reader.next().asnumpy().shape
                send({"count": count, "fps": float(reader.get_avg_fps()), "shape": shape}, spans.reshape(-1, 2))
                continue
            reader, wanted, spoke = opened(), set(request["decode"]), time.monotonic()
            for index in range(request["count"]):  # to the end: a frame missing anywhere shifts those after it
                try:
                    frame = reader.next()
                    if is_damaged():  # maybe of a later frame: decoders run ahead. From here on one thread decodes
                        threads = 1
                        reader = opened()
                        for _ in range(index + 1):
                            show_life()
                            frame = reader.next()
                except StopIteration:
                    raise EOFError("the file ends here, some frames were not decoded") from None
                if index in wanted:
                    pixels = numpy.ascontiguousarray(frame.asnumpy())
                    send({"index": index, "shape": pixels.shape}, pixels)
                    spoke = time.monotonic()
                else:
                    show_life()
            try:
                reader.next()
            except Exception:  # StopIteration as expected, or damage after the last frame
                send({"more": False})
            else:
                send({"more": True})
        except Exception as error:
            text = str(error) if isinstance(error, EOFError) else f"{type(error).__name__}: {error}"
            send({"error": text, "index": index})
        reader = None


Process = TypeVar("Process", bound="DecordProcess")


class DecordProcess:
    """A child that decodes with decord; `borrow` one and `give_back` it when its last answer is read to the end."""

    _idle: list[Any] = []
    _lock = threading.Lock()
    decoder = "decord"  # in errors

    def __init__(self) -> None:
        code = f"import sys; sys.path[:] = {sys.path!r}\n{self._code()}"
        self._parent = os.getpid()
        self._child: Any = None
        self._file_bytes = 0
        self.is_busy = False  # an answer was started and not read to its end
        self._deadline = math.inf
        self._was_late = False
        self._ended = threading.Event()
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pipesize=PIPE_BYTES,
            )
        except OSError as error:
            raise VideoDecodeError(f"no process could be started for {self.decoder} ({error})") from error
        threading.Thread(target=self._kill_at_deadline, daemon=True, name="molmo2-decord-watch").start()
        answer = self._answer(START_SECONDS)
        if "error" in answer:
            self.kill()
            raise VideoDecodeError(f"decord cannot be loaded ({answer['error'][:200]}). {BROKEN_INSTALLATION}")

    def _code(self) -> str:
        """The program of the child."""
        if importlib.util.find_spec("decord") is None:
            raise VideoDecodeError(
                "decord cannot be loaded (there is no such package). Install it with `pip install decord2`."
            )
        functions = map(inspect.getsource, (prepare_child, _serve_decord))
        return "\n".join([CHILD_IMPORTS, *functions, f"_serve_decord(prepare_child({MAX_CHILD_BYTES}))"])

    @classmethod
    def borrow(cls: type[Process]) -> Process:
        """An idle child of this process, or a new one."""
        while True:
            with cls._lock:
                child = cls._idle.pop() if cls._idle else None
            if child is None:
                return cls()
            if child._parent != os.getpid():  # that of a forked parent, which still uses it
                child._close_pipes()
            elif child._child.poll() is None:
                return child
            else:
                child.kill()  # it is dead: frees what belongs to it

    def give_back(self) -> None:
        """Keep this child for the next video, if it waits for requests; else end it."""
        if not self.is_busy and self._child.poll() is None:
            with self._lock:
                if len(self._idle) < MAX_IDLE_CHILDREN:
                    self._idle.append(self)
                    return
        self.kill()

    def kill(self) -> None:
        """End the child, whatever it does."""
        self._ended.set()
        self._child.kill()
        self._close_pipes()
        self._child.wait()

    def _close_pipes(self) -> None:
        for pipe in (self._child.stdin, self._child.stdout):
            with suppress(OSError):
                pipe.close()

    def open(self, path: str, limits: MediaLimits, name: str) -> tuple[np.ndarray, float, tuple[int, ...]]:
        """(N, 2) starts and ends of the frames in seconds, average rate, and shape of the first frame.

        Raises:
            MediaLimitError: it announces too many frames; nothing was done for each of them.
            VideoDecodeError: decord cannot open it, or ended or stopped while it tried.
        """
        self._file_bytes = Path(path).stat().st_size
        self._ask({"open": path, "max_frames": limits.video_frames, "threads": int(_may_be_mpeg4(path))})
        answer = self._answer(self._patience)
        self.is_busy = False
        if "error" in answer:
            raise VideoDecodeError(brief(answer["error"]))
        limits.check_frames(name, answer["count"])
        spans = np.empty((answer["count"], 2), dtype=np.float64)
        self._read_into(spans)
        return spans, answer["fps"], tuple(answer["shape"])

    def decode(self, indices: list[int], count: int) -> Iterator[np.ndarray]:
        """The frames with these ascending indices of the opened video, which has `count`; reads it to its end.

        Raises:
            VideoDecodeError: a frame cannot be decoded; the attribute `index` says which.
        """
        self._ask({"decode": indices, "count": count})
        while True:
            answer = self._answer(self._patience)
            if "error" in answer:
                self.is_busy = False
                raise VideoDecodeError(answer["error"], index=answer["index"] or 0)
            if "more" in answer:
                self.is_busy = False
                if answer["more"]:
                    raise VideoDecodeError(f"it returns more frames than the {count} it lists")
                return
            if "index" in answer:
                frame = np.empty(answer["shape"], dtype=np.uint8)
                self._read_into(frame)
                yield frame

    @property
    def _patience(self) -> float:
        return SILENT_SECONDS + self._file_bytes / READ_BYTES_PER_SECOND

    def _ask(self, request: dict[str, Any]) -> None:
        def send() -> None:
            self._child.stdin.write(json.dumps(request).encode() + b"\n")
            self._child.stdin.flush()

        self.is_busy = True
        try:
            self._within(self._patience, send)  # a pipe may be full
        except OSError:
            raise self._death() from None

    def _answer(self, seconds: float) -> dict[str, Any]:
        """The next line of the child, which has to come within this time."""
        line = self._within(seconds, self._child.stdout.readline)
        if not line.endswith(b"\n"):
            raise self._death()
        return json.loads(line)

    def _within(self, seconds: float, transfer: Callable[[], Any]) -> Any:
        """What `transfer` gives; the child is ended if that takes longer than this."""
        self._deadline = time.monotonic() + seconds
        result = transfer()
        self._deadline = math.inf
        return result

    def _kill_at_deadline(self) -> None:
        while not self._ended.wait(WATCH_SECONDS):
            if time.monotonic() > self._deadline:
                self._was_late = True
                self._child.kill()
                return

    def _read_into(self, array: np.ndarray) -> None:
        """Read what follows a line of the child, which has to come within the same time."""
        if array.nbytes:
            read = partial(self._child.stdout.readinto, memoryview(array.data).cast("B"))
            if self._within(self._patience, read) != array.nbytes:
                raise self._death()

    def _death(self) -> VideoDecodeError:
        self.kill()
        code = self._child.returncode
        how = f"'s process ended with signal {-code}" if code < 0 else f"'s process ended with exit status {code}"
        if self._was_late:
            how = " stopped answering and was ended"
        return VideoDecodeError(f"{self.decoder}{how}; the file is damaged, or made to do this")


def _may_be_mpeg4(path: str) -> bool:
    """True for MPEG-4 Visual: what several threads make of its damaged frames depends on chance, one is as quick."""
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
        file.seek(max(0, Path(path).stat().st_size - HEADER_BYTES))
        return MPEG4_SIGN.search(head + file.read()) is not None
