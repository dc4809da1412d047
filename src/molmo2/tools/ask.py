"""One call from a question to an answer with its points.

    answer = ask(model, processor, "Point to the boats.", images=["boats.jpg"])
    answer.text, answer.grounding.points, answer.timings

    session = MediaSession(model, processor, videos=["clip.mp4"])   # decoded and encoded once
    session.ask("What happens?"), session.ask(prompts.track("dog"))

A convenience wrapper over public methods: `apply_chat_template`, `generate` and `post_process_grounding` give the same
results.
"""

import copy
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from molmo2.grounding.parse import GroundingStream, MediaInfo
from molmo2.grounding.prompts import Prompt
from molmo2.model.compat import CACHE_NAME
from molmo2.processing.prompt_tokens import timed_grids
from molmo2.tools.answer import Answer, AnswerPiece, Timings

MAX_NEW_TOKENS = 512
STREAM_TIMEOUT_SECONDS = 600.0


def ask(
    model: Any,
    processor: Any,
    question: Any,
    images: Any = None,
    videos: Any = None,
    *,
    processor_kwargs: dict[str, Any] | None = None,
    **generate_options: Any,
) -> Answer | list[Answer]:
    """Ask about images and videos.

    Args:
        question: Text or a `Prompt`; or a list of them, which are answered in one batch.
        images, videos: An image or a video, or a list of them, in any form that the processor accepts; for a batch one
            such entry (or None) for each question.
        processor_kwargs: Options of the processor: num_frames, max_crops, clip, ...
        generate_options: Options of `generate`. `max_new_tokens` is 512 unless a length is given as an option, in a
            `generation_config` among the options, or in that of the model.
    Returns:
        An `Answer`; for a batch a list of them.
    Raises:
        ValueError: A batch with another number of images or videos; more than one answer per question requested.
    """
    batched = isinstance(question, (list, tuple))
    questions = list(question) if batched else [question]
    if not questions:
        return []
    conversations = [
        user_turn(text, own_images, own_videos)
        for text, own_images, own_videos in zip(
            questions, per_question(images, questions, batched), per_question(videos, questions, batched)
        )
    ]
    request = Request.from_conversations(
        model, processor, questions, conversations, processor_kwargs, generate_options
    )
    generation = request.generate(model)
    answers = [request.answer(row, generation) for row in range(len(questions))]
    return answers if batched else answers[0]


def ask_stream(
    model: Any,
    processor: Any,
    question: Any,
    images: Any = None,
    videos: Any = None,
    *,
    processor_kwargs: dict[str, Any] | None = None,
    **generate_options: Any,
) -> Iterator[AnswerPiece]:
    """`ask` for one question, piece by piece; the last piece holds the whole answer.

    An error of the model is raised here, after the pieces that came before it. Closing the iterator early (`break`,
    `close`) stops the model too.
    """
    conversation = user_turn(question, as_list(images), as_list(videos))
    request = Request.from_conversations(
        model, processor, [question], [conversation], processor_kwargs, generate_options
    )
    with closing(request.stream(model)) as pieces:
        yield from (piece for piece, _ in pieces)


class MediaSession:
    """Several questions about the same images and videos, which are decoded and encoded once.

    The prompt up to its last visual token is run once and kept as a key-value cache. `ask` forks that cache each time,
    so that questions are independent of each other; `chat` continues the conversation.

    Args:
        images, videos: An image or a video, or a list of them.
        processor_kwargs: Options of the processor.
    Raises:
        ValueError: There are neither images nor videos.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        images: Any = None,
        videos: Any = None,
        *,
        processor_kwargs: dict[str, Any] | None = None,
    ):
        self.model, self.processor = model, processor
        self._images, self._videos = as_list(images), as_list(videos)
        if not self._images and not self._videos:
            raise ValueError(
                "A session caches images and videos, but there are none. Pass `images` or `videos`, or use `ask`."
            )
        options = {**({} if processor_kwargs is None else processor_kwargs), "return_metadata": True}
        self._allow_special_tokens = bool(options.get("allow_special_tokens"))
        inputs = prepare_inputs(model, processor, [user_turn("", self._images, self._videos)], options)
        self.media: MediaInfo = inputs.media[0]
        metadata = inputs.pop("video_metadata", [])
        self._grids = (inputs.get("image_grids", []), timed_grids(inputs.get("video_grids", []), metadata))
        self._prefix, self._cache = self._prefill_media(inputs)
        self._turns: list[dict[str, Any]] = []
        self._chat: tuple[Tensor, Any] = (self._prefix, self._cache)

    def ask(self, question: Any, **generate_options: Any) -> Answer:
        """Ask about the images and videos, as if it were the first question. Arguments as for `ask`."""
        request = self._request(question, [], (self._prefix, self._cache), generate_options)
        return request.answer(0, request.generate(self.model))

    def stream(self, question: Any, **generate_options: Any) -> Iterator[AnswerPiece]:
        """`ask`, piece by piece."""
        request = self._request(question, [], (self._prefix, self._cache), generate_options)
        with closing(request.stream(self.model)) as pieces:
            yield from (piece for piece, _ in pieces)

    def chat(self, question: Any, **generate_options: Any) -> Answer:
        """Continue the conversation of earlier calls of `chat`; their tokens come from the cache."""
        request = self._request(question, self._turns, self._chat, generate_options)
        generation = request.generate(self.model)
        answer = request.answer(0, generation)
        self._append_turn(request, answer, generation)
        return answer

    def chat_stream(self, question: Any, **generate_options: Any) -> Iterator[AnswerPiece]:
        """`chat`, piece by piece; an answer that is not read to its end is not part of the conversation."""
        request = self._request(question, self._turns, self._chat, generate_options)
        with closing(request.stream(self.model)) as pieces:
            for piece, generation in pieces:
                if piece.answer is not None and generation is not None:
                    self._append_turn(request, piece.answer, generation)
                yield piece

    def _append_turn(self, request: "Request", answer: Answer, generation: "Generation") -> None:
        """Make the question and its answer part of the conversation."""
        if self._num_beams(request.options) == 1:  # otherwise it is unknown which row of the cache became the answer
            cache = request.options[CACHE_NAME]
            self._chat = (generation.sequences[:, : cache.get_seq_length()].cpu(), cache)
        question = {"role": "user", "content": str(request.questions[0])}
        self._turns = [*self._turns, question, {"role": "assistant", "content": answer.text}]

    def _num_beams(self, options: dict[str, Any]) -> int:
        return _setting(self.model, options, "num_beams") or 1

    @torch.inference_mode()
    def _prefill_media(self, inputs: Any) -> tuple[Tensor, Any]:
        """Ids up to the last visual token, (1, P), and their key-value cache."""
        length = int(inputs["token_type_ids"][0].nonzero().max()) + 1
        prefix = {name: inputs[name][:, :length] for name in ("input_ids", "attention_mask", "token_type_ids")}
        cache = DynamicCache(config=self.model.config.get_text_config())
        media = {name: value for name, value in inputs.items() if name not in prefix}
        arguments = {name: value.to(self.model.device) for name, value in {**media, **prefix}.items()}
        self.model(**arguments, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return prefix["input_ids"], cache

    def _request(
        self, question: Any, turns: list[dict[str, Any]], prefix: tuple[Tensor, Any], options: dict[str, Any]
    ) -> "Request":
        """A request whose cache holds what its prompt has in common with `prefix`: ids (1, P) and their cache."""
        if _setting(self.model, options, "use_cache") is False:
            raise ValueError("A session needs its cache, but `use_cache` is False. Use `ask` instead.")
        started = time.perf_counter()
        conversation = user_turn(turns[0]["content"] if turns else str(question), self._images, self._videos)
        conversation += [*turns[1:], {"role": "user", "content": str(question)}] if turns else []
        prompt = self.processor.apply_chat_template(conversation, add_generation_prompt=True)
        inputs = self.processor.encode_prompts(
            [prompt], *self._grids, return_tensors="pt", allow_special_tokens=self._allow_special_tokens
        )
        ids, cache = prefix
        new = inputs["input_ids"]
        limit = self.model.config.get_text_config().max_position_embeddings
        if new.shape[1] > limit:
            raise ValueError(
                f"The session would have {new.shape[1]} tokens, those in its cache included, {new.shape[1] - limit} "
                f"more than the model's `max_position_embeddings` = {limit}. Shorten the question, or begin a new "
                "session: `ask` and `stream` forget each question, `chat` keeps all."
            )
        shorter = min(ids.shape[1], new.shape[1] - 1)  # `generate` needs at least one token that is not cached
        differs = (ids[0, :shorter] != new[0, :shorter]).nonzero()
        num_cached = int(differs[0]) if len(differs) else shorter
        fork = _fork_cache(cache)
        excess = fork.get_seq_length() - num_cached
        if excess > 0:
            fork.crop(-excess)  # recent releases take negative numbers only
        if self._num_beams(options) > 1:  # `generate` repeats the prompt, but not a cache that it is given
            fork.batch_repeat_interleave(self._num_beams(options))
        return Request(
            self.processor,
            [question],
            [self.media],
            {name: value.to(self.model.device) for name, value in inputs.items()},
            {**options, CACHE_NAME: fork},
            time.perf_counter() - started,
            num_cached,
        )


# --- one call of generate --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Generation:
    """The result of one call of `generate`.

    Attributes:
        sequences: (rows, S), prompts with their answers.
        prompt_length: Tokens of the padded prompts.
        max_new_tokens: The limit that `generate` applied.
        end_ids: Tokens that end an answer.
        time_to_first_token, decode_seconds: See `Timings`.
    """

    sequences: Tensor
    prompt_length: int
    max_new_tokens: int
    end_ids: frozenset[int]
    time_to_first_token: float
    decode_seconds: float


@dataclass(frozen=True)
class Request:
    """Prepared inputs and options of one call of `generate`; one question and its media per row.

    `ask` is `from_conversations`, `generate` and `answer` in a row; batches call them one by one, to prepare the next
    while one is answered.
    """

    processor: Any
    questions: Sequence[Any]
    media: Sequence[MediaInfo]
    inputs: Any
    options: dict[str, Any]
    preprocess_seconds: float
    num_cached_tokens: int = 0

    @classmethod
    def from_conversations(
        cls,
        model: Any,
        processor: Any,
        questions: Sequence[Any],
        conversations: list[Any],
        processor_kwargs: dict[str, Any] | None,
        options: dict[str, Any],
    ) -> "Request":
        started = time.perf_counter()
        inputs = prepare_inputs(model, processor, conversations, processor_kwargs).to(model.device)
        return cls(processor, questions, list(inputs.media), inputs, options, time.perf_counter() - started)

    def generate(self, model: Any, streamer: Any = None, stop_event: Event | None = None) -> Generation:
        """Run `generate`.

        Args:
            stop_event: Once set, it ends all answers.
        Raises:
            ValueError: The options ask for several answers per question.
        """
        num_answers = _setting(model, self.options, "num_return_sequences") or 1
        if num_answers != 1:
            raise ValueError(
                f"`ask` gives one answer per question, but `num_return_sequences` is {num_answers}. For several, call "
                "`generate` directly."
            )
        prompt_length = self.inputs["input_ids"].shape[1]
        options = dict(self.options)
        max_new_tokens = _max_new_tokens(model, options, prompt_length)
        if max_new_tokens is None:
            max_new_tokens = options["max_new_tokens"] = MAX_NEW_TOKENS
        timer = _FirstTokenTimer(Event() if stop_event is None else stop_event)
        criteria = StoppingCriteriaList([*(options.pop("stopping_criteria", None) or []), timer])
        if streamer is not None:
            options["streamer"] = streamer
        end_ids = _setting(model, options, "eos_token_id")
        end_ids = end_ids if isinstance(end_ids, (list, tuple)) else [end_ids]
        started = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(**self.inputs, **options, stopping_criteria=criteria)
        ended = time.perf_counter()
        first_token = ended if timer.first_token is None else timer.first_token
        return Generation(
            sequences=getattr(output, "sequences", output),
            prompt_length=prompt_length,
            max_new_tokens=max_new_tokens,
            end_ids=frozenset({self.processor.tokenizer.eos_token_id, *end_ids}),
            time_to_first_token=first_token - started,
            decode_seconds=ended - first_token,
        )

    def answer(self, row: int, generation: Generation) -> Answer:
        """The answer of one row."""
        ids = generation.sequences[row, generation.prompt_length :].tolist()
        end = next((position for position, token in enumerate(ids) if token in generation.end_ids), None)
        text = self.processor.decode(ids, skip_special_tokens=True).strip()
        timings = Timings(
            preprocess_seconds=self.preprocess_seconds,
            time_to_first_token=generation.time_to_first_token,
            decode_seconds=generation.decode_seconds,
            num_prompt_tokens=int(self.inputs["attention_mask"][row].sum()),
            num_cached_tokens=self.num_cached_tokens,
            num_new_tokens=len(ids) if end is None else end + 1,
        )
        grounding = self.processor.post_process_grounding(text, self.media[row])
        parse = getattr(self.questions[row], "parse", None)
        parsed = grounding if parse is None else parse(text, self.media[row])
        return Answer(text, grounding, parsed, end is None and len(ids) >= generation.max_new_tokens, timings)

    def stream(self, model: Any) -> Generator[tuple[AnswerPiece, Generation | None], None, None]:
        """The answer of the only row, piece by piece; the last piece comes with the generation."""
        streamer = TextIteratorStreamer(
            self.processor.tokenizer, skip_prompt=True, timeout=STREAM_TIMEOUT_SECONDS, skip_special_tokens=True
        )
        stop_event = Event()
        results: list[Generation | BaseException] = []

        def generate() -> None:
            try:
                results.append(self.generate(model, streamer, stop_event))
            except BaseException as error:  # raised again in the thread that reads the stream
                results.append(error)
                streamer.end()

        thread = Thread(target=generate, name="molmo2-answer", daemon=True)
        thread.start()
        reader, num_points = GroundingStream(self.media[0]), 0
        started, held_back = False, ""  # blanks around an answer are dropped: they wait for what follows them
        try:
            for piece in streamer:
                new = piece if started else piece.lstrip()
                started = started or bool(new)
                points = reader.feed(new)  # with its blanks: they end numbers
                num_points += len(points)
                text = (held_back + new).rstrip()
                held_back = (held_back + new)[len(text) :]
                if text or points:
                    yield AnswerPiece(text, tuple(points)), None
        finally:
            stop_event.set()
            thread.join()
        (result,) = results
        if isinstance(result, BaseException):
            raise result
        answer = self.answer(0, result)
        yield AnswerPiece("", answer.grounding.points[num_points:], answer), result


class _FirstTokenTimer(StoppingCriteria):
    """Records when the first new token arrives, and ends all rows once `stop_event` is set."""

    def __init__(self, stop_event: Event) -> None:
        self.first_token: float | None = None
        self._stop_event = stop_event

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.first_token is None:
            self.first_token = time.perf_counter()
        return torch.full((len(input_ids),), self._stop_event.is_set(), device=input_ids.device)


def _setting(model: Any, options: dict[str, Any], name: str) -> Any:
    """The value `generate` will use: an option, else that of a `generation_config` option, else that of the model."""
    configs = [options.get("generation_config"), model.generation_config]
    values = [options.get(name), *(getattr(config, name, None) for config in configs)]
    return next((value for value in values if value is not None), None)


def _max_new_tokens(model: Any, options: dict[str, Any], prompt_length: int) -> int | None:
    """The limit `generate` will apply, or None if unset."""
    max_new_tokens = _setting(model, options, "max_new_tokens")
    if max_new_tokens is not None:
        return int(max_new_tokens)
    unset = (None, GenerationConfig().max_length)  # up to 4.57 the default is 20
    configs = [config for config in (options.get("generation_config"), model.generation_config) if config is not None]
    lengths = [length for config in configs if (length := getattr(config, "max_length", None)) not in unset]
    length = next(iter(lengths), None) if options.get("max_length") is None else options["max_length"]
    return None if length is None else int(length) - prompt_length


def _fork_cache(cache: DynamicCache) -> DynamicCache:
    """A copy that grows independently; it shares tensors with the original, which layers replace but never write."""
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    return fork


# --- questions -------------------------------------------------------------------------------------------------------


def prepare_inputs(model: Any, processor: Any, conversations: list[Any], options: dict[str, Any] | None) -> Any:
    """Inputs of the conversations; video frames are encoded while they are decoded, where the model supports it."""
    if not hasattr(processor, "apply_chat_template"):
        raise TypeError(f"The processor comes second, after the model; {type(processor).__name__!r} is none.")
    options = {} if options is None else dict(options)
    if hasattr(model, "encode_frames") and not {"frame_encoder", "videos_kwargs"} & options.keys():
        options["frame_encoder"] = model.encode_frames
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
        processor_kwargs=options,
    )


def user_turn(question: Any, images: Sequence[Any], videos: Sequence[Any]) -> list[dict[str, Any]]:
    """One user turn: images and videos first, as in training.

    Raises:
        TypeError: The question is neither text nor a `Prompt`.
    """
    if not isinstance(question, (str, Prompt)):
        raise TypeError(
            f"A question is text or a `Prompt`, not {type(question).__name__!r}; images and videos come after it: "
            "`ask(model, processor, question, images=..., videos=...)`."
        )
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    parts += [{"type": "video", "video": video} for video in videos]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": str(question)}]}]


def as_list(media: Any) -> list[Any]:
    """The images or videos of one question as a list; an array or a (frames, metadata) pair is one item."""
    if media is None:
        return []
    return list(media) if isinstance(media, list) else [media]


def per_question(media: Any, questions: Sequence[Any], batched: bool) -> list[list[Any]]:
    """The images or videos of each question.

    Raises:
        ValueError: There is not one entry for each question of a batch.
    """
    if not batched:
        return [as_list(media)]
    if media is None:
        return [[] for _ in questions]
    if not isinstance(media, (list, tuple)) or len(media) != len(questions):
        found = f"{len(media)} entries" if isinstance(media, (list, tuple)) else f"one {type(media).__name__}"
        raise ValueError(
            f"There are {len(questions)} questions, but `images` or `videos` has {found}. Pass one entry per "
            "question: an image or a video, a list of them, or None."
        )
    return [as_list(own) for own in media]
