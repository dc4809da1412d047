"""What answers the questions of the app: a model in this process, or a server."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from molmo2 import AnswerPiece, MediaLimits, MediaSession
from molmo2.client import Client, ClientSession, ServerError
from molmo2.client.client import OPENAI
from molmo2.client.media import image_url
from molmo2.grounding import MediaInfo
from molmo2.video.processing import Molmo2VideoProcessor

MAX_SENT_BYTES = 256 << 20  # of all files; a request takes four thirds of that, several times in memory
SAMPLING_OPTIONS = frozenset({"num_frames", "max_fps"})  # of a video, that visitors may choose
REFUSING_STATUSES = frozenset({400, 413})  # of requests that are too long or too large; the server says so
NO_ANSWER = "The server gave no answer. Ask again later; the terminal of the app has the details."

log = logging.getLogger(__name__)


class EngineError(Exception):
    """Why there is no answer, in words for the user."""


class EngineSession(Protocol):
    """A conversation about some media."""

    @property
    def media(self) -> MediaInfo:
        """Sizes and frame times, with which answers are read."""

    def stream(self, question: Any, max_new_tokens: int, should_stop: Callable[[], bool]) -> Iterator[AnswerPiece]:
        """The next answer, piece by piece. Once `should_stop()` is true, the text so far is the answer.

        It is asked while the answer is generated, not only before pieces.
        """


class Engine(Protocol):
    """Opens sessions, and reads videos as the model will see them."""

    @property
    def video_processor(self) -> Molmo2VideoProcessor:
        """Reads the frames that the page shows."""

    @property
    def sampling_options(self) -> frozenset[str]:
        """Those of `SAMPLING_OPTIONS` that it takes; for all others the processor's own values hold."""

    def check(self, images: Sequence[Image.Image], video: Path | None) -> None:
        """Refuse media that no question can be asked about.

        Raises:
            EngineError: They are too large.
        """

    def open(
        self, images: Sequence[Image.Image], video: Path | None, options: Mapping[str, Any], limits: MediaLimits
    ) -> EngineSession:
        """A session; `options` are those of the processor, of sampling only `sampling_options`."""


@dataclass(frozen=True)
class LocalEngine:
    """A model in this process."""

    model: Any
    processor: Any

    @property
    def video_processor(self) -> Molmo2VideoProcessor:
        """That of the checkpoint."""
        return self.processor.video_processor

    @property
    def sampling_options(self) -> frozenset[str]:
        """All."""
        return SAMPLING_OPTIONS

    def check(self, images: Sequence[Image.Image], video: Path | None) -> None:
        """Nothing is refused before it is encoded."""

    def open(
        self, images: Sequence[Image.Image], video: Path | None, options: Mapping[str, Any], limits: MediaLimits
    ) -> "LocalSession":
        """A session; the media are encoded here."""
        given = {**options, "limits": limits}
        videos = None if video is None else str(video)
        return LocalSession(MediaSession(self.model, self.processor, list(images), videos, processor_kwargs=given))


@dataclass(frozen=True)
class LocalSession:
    """A session of `LocalEngine`."""

    session: MediaSession

    @property
    def media(self) -> MediaInfo:
        """Sizes and frame times."""
        return self.session.media

    def stream(self, question: Any, max_new_tokens: int, should_stop: Callable[[], bool]) -> Iterator[AnswerPiece]:
        """The next answer; `should_stop` is asked before each token."""

        def criterion(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((len(ids),), should_stop(), device=ids.device)

        return self.session.chat_stream(
            question, max_new_tokens=max_new_tokens, do_sample=False, stopping_criteria=[criterion]
        )


@dataclass(frozen=True)
class ServerEngine:
    """A server that `molmo2.client` can ask.

    Attributes:
        video_processor: Reads videos for the page; of the server's checkpoint nothing but its answers is known here.
    """

    client: Client
    video_processor: Molmo2VideoProcessor

    @property
    def sampling_options(self) -> frozenset[str]:
        """All with vLLM and `transformers serve`; other servers have no place for options."""
        return frozenset() if self.client.kind == OPENAI else SAMPLING_OPTIONS

    def check(self, images: Sequence[Image.Image], video: Path | None) -> None:
        """Refuse files that are too large to send.

        Raises:
            EngineError: They have more than `MAX_SENT_BYTES`, as they are sent: images as PNG.
        """
        size = 0 if video is None else video.stat().st_size
        for image in images:
            if size <= MAX_SENT_BYTES:
                size += len(image_url(image)) * 3 // 4
        if size > MAX_SENT_BYTES:
            raise EngineError(
                f"These files are too large: at most {MAX_SENT_BYTES >> 20} MiB are sent to the server, images as "
                "PNG. Use fewer or smaller ones."
            )

    def open(
        self, images: Sequence[Image.Image], video: Path | None, options: Mapping[str, Any], limits: MediaLimits
    ) -> "ServerSession":
        """A session; media are read here and sent with every question.

        `limits` are those of files; images have been read within them before.
        """
        videos = None if video is None else str(video)
        given = dict(options)
        return ServerSession(self.client.session(list(images), videos, processor_kwargs=given, limits=limits))


@dataclass(frozen=True)
class ServerSession:
    """A session of `ServerEngine`."""

    session: ClientSession

    @property
    def media(self) -> MediaInfo:
        """Sizes and frame times."""
        return self.session.media

    def stream(self, question: Any, max_new_tokens: int, should_stop: Callable[[], bool]) -> Iterator[AnswerPiece]:
        """The next answer; `should_stop` is asked after every event of the server.

        Raises:
            EngineError: The server cannot be reached, refuses the request, or is too late.
        """
        try:
            yield from self.session.chat_stream(question, max_new_tokens=max_new_tokens, should_stop=should_stop)
        except ServerError as error:
            log.warning("The server gave no answer: %s", error)
            # All other messages, and the address, are for the operator.
            is_refusal = error.status in REFUSING_STATUSES and error.reason
            raise EngineError(f"The server refuses this: {error.reason}" if is_refusal else NO_ANSWER) from error
