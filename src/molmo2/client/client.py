"""The client: questions become requests, responses become answers."""

import os
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from threading import BoundedSemaphore, Lock
from typing import Any

from molmo2.client.http import Endpoint, ServerError, ServerUnreachable
from molmo2.client.media import message_parts
from molmo2.grounding.parse import GroundingStream, parse_grounding
from molmo2.image.limits import MediaLimits
from molmo2.tools.answer import Answer, AnswerPiece, Timings
from molmo2.tools.ask import MAX_NEW_TOKENS, as_list, per_question

KEY_VARIABLES = ("MOLMO2_API_KEY", "OPENAI_API_KEY")
VLLM, TRANSFORMERS, OPENAI = KINDS = ("vllm", "transformers", "openai")
PROBE_SECONDS = 30.0
MAX_QUOTED_CHARACTERS = 200  # of an answer that is none
CHAT = "/chat/completions"
STOPPED_HERE = "stopped here"  # beside the server's reasons why an answer ended


def api_key() -> str | None:
    """The key of a server from MOLMO2_API_KEY or OPENAI_API_KEY; None where neither is set."""
    return next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)


class Client:
    """Asks a server, like `molmo2.ask` asks a model. Threads may share one.

    Args:
        base_url: Such as http://127.0.0.1:8000/v1.
        model: Its name there; None for the only one.
        api_key: Sent to this address alone, and in no error; see `api_key()` for that of the environment.
        kind: "vllm", "transformers" or "openai"; None asks the server. It decides how options of the processor are
            sent.
        timeout: Seconds for one question, its retries included.
        retries: Further attempts where nothing answers or the server is busy, after growing pauses.
        max_concurrency: Questions on their way at a time.
        processor_kwargs: Options of the processor for all questions. Where the checkpoint's `num_frames` is not 384,
            say it here: the server does not, and frames of answers are counted by it.
    Raises:
        ValueError: The address or the kind is none.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        *,
        api_key: str | None = None,
        kind: str | None = None,
        timeout: float = 600.0,
        retries: int = 4,
        max_concurrency: int = 8,
        processor_kwargs: Mapping[str, Any] | None = None,
    ):
        if kind is not None and kind not in KINDS:
            raise ValueError(f"`kind` is {kind!r}. Use one of {', '.join(KINDS)}, or None to ask the server.")
        self.endpoint = Endpoint(base_url.rstrip("/"), api_key, retries)
        self.timeout, self.max_concurrency = timeout, max_concurrency
        self._model, self._kind, self._processor_kwargs = model, kind, dict(processor_kwargs or {})
        self._slots = BoundedSemaphore(max_concurrency)
        self._probe_lock = Lock()
        self._listed: list[dict[str, Any]] | None = None

    def ask(
        self,
        question: Any,
        images: Any = None,
        videos: Any = None,
        *,
        processor_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> Answer | list[Answer]:
        """Ask about images and videos; arguments and result as of `molmo2.ask`.

        Args:
            question: Text or a `Prompt`, whose JSON schema the server is told; or a list, asked at the same time.
            options: `max_new_tokens` (512), `do_sample`, and whatever the server takes: temperature, top_p, seed,
                stop, ... Without them decoding is greedy.
        Raises:
            ServerError: The server cannot be reached, refuses the request, or is too late.
            TypeError, ValueError: Media or options that cannot be sent.
        """
        if not isinstance(question, (list, tuple)):
            return self.session(images, videos, processor_kwargs=processor_kwargs).ask(question, **options)
        questions = list(question)
        media = zip(per_question(images, questions, True), per_question(videos, questions, True))

        def ask_one(entry: tuple[Any, tuple[list[Any], list[Any]]]) -> Answer:
            text, (own_images, own_videos) = entry
            return self.session(own_images, own_videos, processor_kwargs=processor_kwargs).ask(text, **options)

        with ThreadPoolExecutor(self.max_concurrency, thread_name_prefix="molmo2-client") as executor:
            return list(executor.map(ask_one, zip(questions, media)))

    def ask_stream(
        self,
        question: Any,
        images: Any = None,
        videos: Any = None,
        *,
        processor_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> Iterator[AnswerPiece]:
        """`ask` for one question, piece by piece; the last piece holds the whole answer.

        Closing the iterator early ends the request.
        """
        session = self.session(images, videos, processor_kwargs=processor_kwargs)
        with closing(session.stream(question, **options)) as pieces:
            yield from pieces

    def session(
        self,
        images: Any = None,
        videos: Any = None,
        *,
        processor_kwargs: dict[str, Any] | None = None,
        limits: MediaLimits | None = None,
    ) -> "ClientSession":
        """Several questions about the same media, which are read and encoded once here (and cached by the server).

        Args:
            limits: Of videos, which are opened here for their times; None for the default ones.
        """
        return ClientSession(self, images, videos, processor_kwargs=processor_kwargs, limits=limits)

    def models(self) -> list[str]:
        """Names of the models that the server lists."""
        return [str(entry.get("id")) for entry in self._models()]

    def check(self) -> None:
        """Find out whether the server takes the key and has the model, which every question needs.

        A name that the server does not list may be another name of a model: then a short answer is asked for.

        Raises:
            ServerError: It cannot be reached, or refuses the key or the model.
            ValueError: There are several models and none is named.
        """
        if self._model is None:
            if self.kind != TRANSFORMERS:
                self._only_model()
            return
        try:
            is_listed = self._model in self.models()
        except ServerUnreachable:
            raise
        except ServerError:  # it lists none
            is_listed = False
        if not is_listed:
            asked = {"model": self._model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 16}
            self.endpoint.post(CHAT, asked, self.timeout)

    @property
    def kind(self) -> str:
        """What the server is: "vllm", "transformers" or "openai" for any other."""
        with self._probe_lock:
            if self._kind is None:
                self._kind = self._found_kind()
            return self._kind

    def _found_kind(self) -> str:
        """`transformers serve` is recognised by its routes: it lists no models unless the Hub's cache is there."""
        root = Endpoint(self.endpoint.base_url.removesuffix("/v1"), self.endpoint.api_key, self.endpoint.retries)
        try:
            described = root.get("/openapi.json", PROBE_SECONDS)
        except ServerUnreachable:
            raise
        except ServerError:
            described = {}
        paths = described.get("paths", {}) if isinstance(described, dict) else {}
        if {"/load_model", "/v1/chat/completions"} <= set(paths):
            return TRANSFORMERS
        try:
            is_vllm = any(entry.get("owned_by") == "vllm" for entry in self._models())
        except ServerUnreachable:
            raise
        except ServerError:  # it lists none, and with the name of a model no list is needed
            is_vllm = False
        return VLLM if is_vllm else OPENAI

    def _models(self) -> list[dict[str, Any]]:
        if self._listed is None:
            content = self.endpoint.get("/models", PROBE_SECONDS)
            entries = content.get("data") if isinstance(content, dict) else None
            self._listed = [entry for entry in entries or [] if isinstance(entry, dict)]
        return self._listed

    def _only_model(self) -> str:
        names = self.models()
        if len(names) != 1:
            raise ValueError(f"The server has {len(names)} models. Name one of {names[:20]} with `model`.")
        return names[0]

    def _body(self, messages: list[dict[str, Any]], options: dict[str, Any], with_video: bool) -> dict[str, Any]:
        """A request without its stream and schema.

        Raises:
            ValueError: There are several models and none is named, or the server takes no options of the processor.
        """
        options = dict(options)
        given = {**self._processor_kwargs, **options.pop("processor_kwargs")}
        body: dict[str, Any] = {"messages": messages, "max_tokens": options.pop("max_new_tokens", MAX_NEW_TOKENS)}
        if not options.pop("do_sample", "temperature" in options or "top_p" in options):
            body["temperature"] = 0.0
        if self._model is not None:
            body["model"] = self._model
        elif self.kind != TRANSFORMERS:
            body["model"] = self._only_model()
        if self.kind == VLLM and given:
            body["mm_processor_kwargs"] = given
        elif self.kind == TRANSFORMERS and with_video:  # it shows 32 frames unless told otherwise
            body["chat_template_kwargs"] = {"num_frames": 384, **given}
        elif self.kind == TRANSFORMERS and given:
            body["chat_template_kwargs"] = given
        elif given:
            raise ValueError(f"This server takes no options of the processor, but there are {sorted(given)}.")
        return {**body, **options}


class ClientSession:
    """Questions about the same images and videos: `ask` and `stream` are independent, `chat` continues.

    Attributes:
        media: Sizes and frame times of the images and videos.
    """

    def __init__(
        self,
        client: Client,
        images: Any = None,
        videos: Any = None,
        *,
        processor_kwargs: dict[str, Any] | None = None,
        limits: MediaLimits | None = None,
    ):
        started = time.perf_counter()
        self._client, self._processor_kwargs = client, dict(processor_kwargs or {})
        self._videos = as_list(videos)
        known = {**client._processor_kwargs, **self._processor_kwargs}
        self._parts, self.media = message_parts(as_list(images), self._videos, known, limits)
        self._turns: list[dict[str, Any]] = []
        self._preprocess_seconds = time.perf_counter() - started

    def ask(self, question: Any, **options: Any) -> Answer:
        """Ask about the images and videos, as if it were the first question."""
        return self._whole(question, [], options)

    def stream(self, question: Any, **options: Any) -> Generator[AnswerPiece, None, None]:
        """`ask`, piece by piece."""
        return self._stream(question, [], options)

    def chat(self, question: Any, **options: Any) -> Answer:
        """Continue the conversation of earlier calls of `chat`."""
        answer = self._whole(question, self._turns, options)
        self._append_turn(question, answer)
        return answer

    def chat_stream(
        self, question: Any, *, should_stop: Callable[[], bool] | None = None, **options: Any
    ) -> Iterator[AnswerPiece]:
        """`chat`, piece by piece; an answer that is not read to its end is not part of the conversation.

        Args:
            should_stop: Called after every event of the server. Once it is true the request ends, and the text so far
                is the answer.
        """
        with closing(self._stream(question, self._turns, options, should_stop)) as pieces:
            for piece in pieces:
                if piece.answer is not None:
                    self._append_turn(question, piece.answer)
                yield piece

    def _append_turn(self, question: Any, answer: Answer) -> None:
        asked = {"role": "user", "content": str(question)}
        self._turns = [*self._turns, asked, {"role": "assistant", "content": answer.text}]

    def _request(self, question: Any, turns: list[dict[str, Any]], options: dict[str, Any]) -> dict[str, Any]:
        first = turns[0]["content"] if turns else str(question)
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": [*self._parts, {"type": "text", "text": first}]},
            *turns[1:],
        ]
        if turns:
            messages.append({"role": "user", "content": str(question)})
        body = self._client._body(
            messages, {**options, "processor_kwargs": self._processor_kwargs}, bool(self._videos)
        )
        schema = getattr(question, "schema", None)
        if schema is not None and "response_format" not in body:
            if self._client.kind == TRANSFORMERS:
                warnings.warn(
                    "`transformers serve` holds no answer to a JSON schema; it is read as it comes.", stacklevel=4
                )
            else:
                named = {"name": "answer", "schema": schema, "strict": True}
                body["response_format"] = {"type": "json_schema", "json_schema": named}
        return body

    def _whole(self, question: Any, turns: list[dict[str, Any]], options: dict[str, Any]) -> Answer:
        body = self._request(question, turns, options)
        with self._client._slots:
            started = time.perf_counter()
            response = self._client.endpoint.post(CHAT, body, self._client.timeout)
            seconds = time.perf_counter() - started
        try:
            choice = response["choices"][0]
            text, reason = choice["message"]["content"] or "", choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            found = self._client.endpoint.quoted(str(response), MAX_QUOTED_CHARACTERS)
            raise ServerError(f"The server answers {found}, which is no chat completion.") from error
        return self._answer(question, text, reason, response.get("usage"), (0.0, seconds))

    def _stream(
        self,
        question: Any,
        turns: list[dict[str, Any]],
        options: dict[str, Any],
        should_stop: Callable[[], bool] | None = None,
    ) -> Generator[AnswerPiece, None, None]:
        body = {**self._request(question, turns, options), "stream": True}
        if self._client.kind != TRANSFORMERS:
            body.setdefault("stream_options", {"include_usage": True})
        reader, num_points, text, reason, usage = GroundingStream(self.media), 0, "", None, None
        started = time.perf_counter()
        first_token: float | None = None
        held_back = ""  # blanks around an answer are dropped: they wait for what follows them
        with self._client._slots, closing(self._client.endpoint.stream(CHAT, body, self._client.timeout)) as events:
            for event in events:
                new, ended, counted = self._delta(event)
                reason, usage = ended or reason, counted or usage
                if new:
                    first_token = time.perf_counter() if first_token is None else first_token
                    new = new if text or held_back else new.lstrip()
                    points = reader.feed(new)
                    num_points += len(points)
                    shown = (held_back + new).rstrip()
                    held_back = (held_back + new)[len(shown) :]
                    text += shown
                    if shown or points:
                        yield AnswerPiece(shown, tuple(points))
                if should_stop is not None and should_stop():
                    reason = reason or STOPPED_HERE
                    break
        if reason is None:
            raise ServerError("The server ended the stream before the answer was complete.")
        ended_at = time.perf_counter()
        first_token = ended_at if first_token is None else first_token
        times = first_token - started, ended_at - first_token
        answer = self._answer(question, text, reason, usage, times)
        yield AnswerPiece("", answer.grounding.points[num_points:], answer)

    def _answer(self, question: Any, text: str, reason: Any, usage: Any, times: tuple[float, float]) -> Answer:
        """The answer of a text; of one that was not streamed all seconds count as decoding."""
        text = text.strip()
        counts = usage if isinstance(usage, dict) else {}
        details = counts.get("prompt_tokens_details") or {}
        timings = Timings(
            self._preprocess_seconds,
            *times,
            num_prompt_tokens=int(counts.get("prompt_tokens") or 0),
            num_cached_tokens=int(details.get("cached_tokens") or 0),
            num_new_tokens=int(counts.get("completion_tokens") or 0),
        )
        grounding = parse_grounding(text, self.media)
        parse = getattr(question, "parse", None)
        parsed = grounding if parse is None else parse(text, self.media)
        return Answer(text, grounding, parsed, reason == "length", timings)

    def _delta(self, event: Any) -> tuple[str, Any, Any]:
        """(text, finish reason, usage) of one event of a stream.

        Raises:
            ServerError: It is none.
        """
        try:
            choices = event.get("choices") or [{}]
            delta = choices[0].get("delta") or {}
            return delta.get("content") or "", choices[0].get("finish_reason"), event.get("usage")
        except (AttributeError, IndexError, TypeError, KeyError) as error:
            found = self._client.endpoint.quoted(str(event), MAX_QUOTED_CHARACTERS)
            raise ServerError(f"The server streams {found}, which is no part of a chat completion.") from error
