"""What answers the questions of the app: a model in this process, or a server."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from molmo2 import AnswerPiece, MediaLimits, MediaSession
from molmo2.client import Client, ClientSession, ServerError
from molmo2.client.client import OPENAI
from molmo2.grounding import MediaInfo
from molmo2.video.processing import Molmo2VideoProcessor

MAX_SENT_BYTES = 256 << 20  # of a video's file; in a request it takes four thirds of that, several times in memory


class EngineError(Exception):
    """Why there is no answer, in words for the user."""


class EngineSession(Protocol):
    """A conversation about some media."""

    @property
    def media(self) -> MediaInfo:
        """Sizes and frame times, with which answers are read."""

    def stream(self, question: Any, max_new_tokens: int, should_stop: Callable[[], bool]) -> Iterator[AnswerPiece]:
        """The next answer, piece by piece. Once `should_stop()` is true, the text so far is the answer."""


class Engine(Protocol):
    """Opens sessions, and reads videos as the model will see them."""

    @property
    def video_processor(self) -> Molmo2VideoProcessor:
        """Reads the frames that the page shows."""

    def open(
        self, images: Sequence[Image.Image], video: Path | None, options: Mapping[str, Any], limits: MediaLimits
    ) -> EngineSession:
        """A session; `options` are those of the processor."""


@dataclass(frozen=True)
class LocalEngine:
    """A model in this process."""

    model: Any
    processor: Any

    @property
    def video_processor(self) -> Molmo2VideoProcessor:
        """That of the checkpoint."""
        return self.processor.video_processor

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

    def open(
        self, images: Sequence[Image.Image], video: Path | None, options: Mapping[str, Any], limits: MediaLimits
    ) -> "ServerSession":
        """A session; media are read here and sent with every question.

        Raises:
            EngineError: The video is too large to send, or the server cannot be reached.
        """
        if video is not None and (size := video.stat().st_size) > MAX_SENT_BYTES:
            raise EngineError(
                f"The video has {size >> 20} MiB; at most {MAX_SENT_BYTES >> 20} MiB are sent. Use a shorter one."
            )
        try:
            # Other servers than vLLM and `transformers serve` have no place for options.
            given = {} if self.client.kind == OPENAI else dict(options)
            videos = None if video is None else str(video)
            return ServerSession(self.client.session(list(images), videos, processor_kwargs=given))
        except ServerError as error:
            raise EngineError(str(error)) from error


@dataclass(frozen=True)
class ServerSession:
    """A session of `ServerEngine`."""

    session: ClientSession

    @property
    def media(self) -> MediaInfo:
        """Sizes and frame times."""
        return self.session.media

    def stream(self, question: Any, max_new_tokens: int, should_stop: Callable[[], bool]) -> Iterator[AnswerPiece]:
        """The next answer; `should_stop` is asked before each piece.

        Raises:
            EngineError: The server cannot be reached, refuses the request, or is too late.
        """
        try:
            yield from self.session.chat_stream(question, max_new_tokens=max_new_tokens, should_stop=should_stop)
        except ServerError as error:
            raise EngineError(str(error)) from error
