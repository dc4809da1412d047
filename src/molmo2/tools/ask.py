"""One call from a question to an answer with its points: sugar over the processor and `generate`.

    answer = ask(model, processor, "Point to the boats", images=["boats.jpg"])
    answer.text, answer.grounding.points, answer.timings

    session = MediaSession(model, processor, videos=["clip.mp4"])   # decoded and encoded once
    session.ask("What happens?"), session.ask(prompts.track("dog"))

Everything here goes through public methods of the model and the processor; plain transformers calls give the same.
"""

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from molmo2.grounding.parse import Grounding, GroundingStream, MediaInfo, Point

MAX_NEW_TOKENS = 512
STREAM_TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class Timings:
    """Where the time went, in seconds; of a batch the same for all its rows.

    Attributes:
        preparing: Decoding and cutting pictures, writing and tokenizing the prompt.
        first_token: From there to the first new token: pictures encoded, prompt read.
        decoding: The other tokens.
        num_prompt_tokens, num_cached_tokens: Tokens of the row's prompt, and those among them that were read before.
        num_new_tokens: Tokens of the answer.
    """

    preparing: float
    first_token: float
    decoding: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_new_tokens: int

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second after the first one; 0 if there is only one."""
        return (self.num_new_tokens - 1) / self.decoding if self.num_new_tokens > 1 and self.decoding > 0 else 0.0


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: The answer without special tokens.
        grounding: Points, tracks and counts in it, in pixels and source frames of the question's pictures.
        parsed: What the `Prompt` made of it; equal to `grounding` for a question in plain text.
        truncated: It ended because there were no more tokens to be had: `max_new_tokens`, `max_length`.
    """

    text: str
    grounding: Grounding
    parsed: Any
    truncated: bool
    timings: Timings

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class AnswerPiece:
    """A part of an answer that is being written.

    Attributes:
        text: New text; all pieces together are the answer.
        points: Points that are complete with it.
        answer: The whole answer, in the last piece alone.
    """

    text: str
    points: tuple[Point, ...] = ()
    answer: Answer | None = None


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
    """Ask about pictures.

    Args:
        question: Text or a `Prompt`; or a list of them, which are answered in one batch.
        images, videos: A picture or a list of them, in any form that the processor takes; for a batch one such entry
            (or None) for each question.
        processor_kwargs: Options of the processor: num_frames, max_crops, clip, ...
        generate_options: Options of `generate`. `max_new_tokens` is 512 unless a length is given, by an option, a
            `generation_config` among them, or that of the model.
    Returns:
        An `Answer`, of a batch a list of them.
    Raises:
        ValueError: A batch with another number of pictures; more than one answer per question asked for.
    """
    batched = isinstance(question, (list, tuple))
    questions = list(question) if batched else [question]
    if not questions:
        return []
    conversations = [
        _conversation(text, own_images, own_videos)
        for text, own_images, own_videos in zip(
            questions, _per_question(images, questions, batched), _per_question(videos, questions, batched)
        )
    ]
    started = time.perf_counter()
    inputs = _prepared(model, processor, conversations, processor_kwargs).to(model.device)
    run = _Run(processor, questions, list(inputs.media), time.perf_counter() - started)
    output = run.generate(model, inputs, generate_options)
    answers = [run.answer(row, inputs["attention_mask"][row], output) for row in range(len(questions))]
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
    """`ask` for one question, piece by piece; the last piece has the whole answer.

    An error of the model is raised from here, after the pieces that came before it. Whoever leaves early (`break`,
    `close`) stops the model too.
    """
    started = time.perf_counter()
    conversation = _conversation(question, _listed(images), _listed(videos))
    inputs = _prepared(model, processor, [conversation], processor_kwargs).to(model.device)
    run = _Run(processor, [question], list(inputs.media), time.perf_counter() - started)
    yield from run.stream(model, inputs, generate_options)


class MediaSession:
    """Several questions about the same pictures, which are decoded and encoded once.

    The pictures and what stands before them are read once and kept as a cache of keys and values. `ask` starts from
    it each time, so that questions know nothing of each other; `chat` continues the conversation.

    Args:
        images, videos: A picture or a list of them.
        processor_kwargs: Options of the processor.
    Raises:
        ValueError: There are no pictures.
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
        self._images, self._videos = _listed(images), _listed(videos)
        if not self._images and not self._videos:
            raise ValueError("A session keeps pictures, but there are none. Pass `images` or `videos`, or use `ask`.")
        options = {**({} if processor_kwargs is None else processor_kwargs), "return_metadata": True}
        inputs = _prepared(model, processor, [_conversation("", self._images, self._videos)], options)
        self.media: MediaInfo = inputs.media[0]
        self._grids = (inputs.get("image_grids", []), self._runs(inputs))
        inputs.pop("video_metadata", None)
        self._prefix, self._cache = self._read_pictures(inputs)
        self._turns: list[dict[str, Any]] = []
        self._chat: tuple[Tensor, Any] = (self._prefix, self._cache)

    def ask(self, question: Any, **generate_options: Any) -> Answer:
        """Ask about the pictures, as if it were the first question. Arguments as for `ask`."""
        run, inputs, options = self._question(question, [], (self._prefix, self._cache), generate_options)
        output = run.generate(self.model, inputs, options)
        return run.answer(0, inputs["attention_mask"][0], output)

    def stream(self, question: Any, **generate_options: Any) -> Iterator[AnswerPiece]:
        """`ask`, piece by piece."""
        run, inputs, options = self._question(question, [], (self._prefix, self._cache), generate_options)
        yield from run.stream(self.model, inputs, options)

    def chat(self, question: Any, **generate_options: Any) -> Answer:
        """Continue the conversation that earlier calls of `chat` began; what was read is not read again."""
        run, inputs, options = self._question(question, self._turns, self._chat, generate_options)
        output = run.generate(self.model, inputs, options)
        answer = run.answer(0, inputs["attention_mask"][0], output)
        self._remember(question, answer, output[0], options)
        return answer

    def chat_stream(self, question: Any, **generate_options: Any) -> Iterator[AnswerPiece]:
        """`chat`, piece by piece; an answer that is not read to its end is not part of the conversation."""
        run, inputs, options = self._question(question, self._turns, self._chat, generate_options)
        with closing(run.stream(self.model, inputs, options)) as pieces:
            for piece in pieces:
                if piece.answer is not None:
                    self._remember(question, piece.answer, run.sequences, options)
                yield piece

    def _remember(self, question: Any, answer: Answer, sequences: Tensor, options: dict[str, Any]) -> None:
        """The conversation goes on behind this answer. sequences: (rows, S), prompts with their answers."""
        if self._num_beams(options) == 1:  # otherwise it is unknown which row of the cache became the answer
            cache = options["past_key_values"]
            self._chat = (sequences[:, : cache.get_seq_length()].cpu(), cache)
        turns = [{"role": "user", "content": str(question)}, {"role": "assistant", "content": answer.text}]
        self._turns = [*self._turns, *turns]

    def _num_beams(self, options: dict[str, Any]) -> int:
        return _setting(self.model, options, "num_beams") or 1

    @staticmethod
    def _runs(inputs: Any) -> list[tuple[Any, list[float]]]:
        """Rows of `video_grids` and times of each video."""
        rows, videos = list(inputs.get("video_grids", [])), []
        for metadata in inputs.get("video_metadata", []):
            own = [rows.pop(0).tolist()]
            while sum(frames for frames, *_ in own) < len(metadata.timestamps):
                own.append(rows.pop(0).tolist())
            videos.append((own, metadata.timestamps))
        return videos

    @torch.inference_mode()
    def _read_pictures(self, inputs: Any) -> tuple[Tensor, Any]:
        """Ids up to the last visual token, (1, P), and the cache of what was read there."""
        length = int(inputs["token_type_ids"][0].nonzero().max()) + 1
        cut = {name: inputs[name][:, :length] for name in ("input_ids", "attention_mask", "token_type_ids")}
        cache = DynamicCache(config=self.model.config.get_text_config())
        pictures = {name: value for name, value in inputs.items() if name not in cut}
        arguments = {name: value.to(self.model.device) for name, value in {**pictures, **cut}.items()}
        self.model(**arguments, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cut["input_ids"], cache

    def _question(
        self, question: Any, turns: list[dict[str, Any]], known: tuple[Tensor, Any], options: dict[str, Any]
    ) -> tuple["_Run", dict[str, Tensor], dict[str, Any]]:
        """A run, its inputs and options; the cache holds what the prompt has in common with `known`."""
        if _setting(self.model, options, "use_cache") is False:
            raise ValueError("A session reads pictures from its cache, but `use_cache` is False. Use `ask` for that.")
        started = time.perf_counter()
        conversation = _conversation(turns[0]["content"] if turns else str(question), self._images, self._videos)
        conversation += [*turns[1:], {"role": "user", "content": str(question)}] if turns else []
        prompt = self.processor.apply_chat_template(conversation, add_generation_prompt=True)
        inputs = self.processor.encode_prompts([prompt], *self._grids, return_tensors="pt")
        ids, cache = known
        new = inputs["input_ids"]
        shorter = min(ids.shape[1], new.shape[1] - 1)  # at least one token has to be read, to answer it
        differs = (ids[0, :shorter] != new[0, :shorter]).nonzero()
        length = int(differs[0]) if len(differs) else shorter
        kept = _twin(cache)
        excess = kept.get_seq_length() - length
        if excess > 0:
            kept.crop(-excess)  # recent releases take negative numbers only
        if self._num_beams(options) > 1:  # `generate` repeats the prompt, but not a cache that it is given
            kept.batch_repeat_interleave(self._num_beams(options))
        run = _Run(self.processor, [question], [self.media], time.perf_counter() - started, length)
        arguments = {name: new_value.to(self.model.device) for name, new_value in inputs.items()}
        return run, arguments, {**options, "past_key_values": kept}


# --- one call of generate --------------------------------------------------------------------------------------------


class _Watch(StoppingCriteria):
    """Knows when the first new token was there, and stops once nobody wants more."""

    def __init__(self, unwanted: Event) -> None:
        self.first_token: float | None = None
        self._unwanted = unwanted

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.first_token is None:
            self.first_token = time.perf_counter()
        return torch.full((len(input_ids),), self._unwanted.is_set(), device=input_ids.device)


def _setting(model: Any, options: dict[str, Any], name: str) -> Any:
    """What `generate` goes by: an option, a `generation_config` among them, or that of the model."""
    settings = [options.get("generation_config"), model.generation_config]
    values = [options.get(name), *(getattr(config, name, None) for config in settings)]
    return next((value for value in values if value is not None), None)


def _most_new_tokens(model: Any, options: dict[str, Any], prompt_length: int) -> int | None:
    """Of an answer, as `generate` goes by it; None where nobody says."""
    most = _setting(model, options, "max_new_tokens")
    if most is not None:
        return int(most)
    unsaid = (None, GenerationConfig().max_length)  # 20 up to 4.57, which nobody asks for
    configs = [config for config in (options.get("generation_config"), model.generation_config) if config is not None]
    lengths = [length for config in configs if (length := getattr(config, "max_length", None)) not in unsaid]
    length = next(iter(lengths), None) if options.get("max_length") is None else options["max_length"]
    return None if length is None else int(length) - prompt_length


@dataclass
class _Run:
    """One call of `generate` and what its rows are about."""

    processor: Any
    questions: Sequence[Any]
    media: Sequence[MediaInfo]
    preparing: float
    num_cached_tokens: int = 0
    sequences: Any = None  # once generated
    unwanted: Event = field(default_factory=Event)  # set by whoever leaves before the end
    _times: list[float] = field(default_factory=list)
    _end_ids: set[int] = field(default_factory=set)

    def generate(self, model: Any, inputs: Any, options: dict[str, Any]) -> tuple[Tensor, int, int]:
        """Prompts with their answers, (rows, S), the length of the prompts and the most tokens of an answer."""
        number = _setting(model, options, "num_return_sequences") or 1
        if number != 1:
            raise ValueError(
                f"`ask` gives one answer per question, but `num_return_sequences` is {number}. For several, call "
                "`generate` yourself."
            )
        prompt_length = inputs["input_ids"].shape[1]
        options = dict(options)
        most = _most_new_tokens(model, options, prompt_length)
        if most is None:
            most = options["max_new_tokens"] = MAX_NEW_TOKENS
        watch = _Watch(self.unwanted)
        criteria = StoppingCriteriaList([*(options.pop("stopping_criteria", None) or []), watch])
        ends = _setting(model, options, "eos_token_id")
        self._end_ids = {self.processor.tokenizer.eos_token_id, *(ends if isinstance(ends, (list, tuple)) else [ends])}
        self._times.append(time.perf_counter())
        with torch.inference_mode():
            sequences = model.generate(**inputs, **options, stopping_criteria=criteria)
        self.sequences = sequences = getattr(sequences, "sequences", sequences)
        end = time.perf_counter()
        self._times += [end if watch.first_token is None else watch.first_token, end]
        return sequences, prompt_length, most

    def answer(self, row: int, attention_mask: Tensor, output: tuple[Tensor, int, int]) -> Answer:
        """The answer of one row."""
        sequences, prompt_length, most = output
        ids = sequences[row, prompt_length:].tolist()
        ended = next((place for place, token in enumerate(ids) if token in self._end_ids), None)
        text = self.processor.decode(ids, skip_special_tokens=True).strip()
        started, first, end = self._times
        timings = Timings(
            preparing=self.preparing,
            first_token=first - started,
            decoding=end - first,
            num_prompt_tokens=int(attention_mask.sum()),
            num_cached_tokens=self.num_cached_tokens,
            num_new_tokens=len(ids) if ended is None else ended + 1,
        )
        grounding = self.processor.post_process_grounding(text, self.media[row])
        parse = getattr(self.questions[row], "parse", None)
        parsed = grounding if parse is None else parse(text, self.media[row])
        return Answer(text, grounding, parsed, ended is None and len(ids) >= most, timings)

    def stream(self, model: Any, inputs: Any, options: dict[str, Any]) -> Iterator[AnswerPiece]:
        """The answer of the only row, piece by piece."""
        streamer = TextIteratorStreamer(
            self.processor.tokenizer, skip_prompt=True, timeout=STREAM_TIMEOUT_SECONDS, skip_special_tokens=True
        )
        results: list[Any] = []

        def generate() -> None:
            try:
                results.append(self.generate(model, inputs, {**options, "streamer": streamer}))
            except BaseException as error:  # handed to the thread that reads the stream
                results.append(error)
                streamer.end()

        thread = Thread(target=generate, name="molmo2-answer", daemon=True)
        thread.start()
        reader, num_points = GroundingStream(self.media[0]), 0
        begun, waiting = False, ""  # an answer neither begins nor ends with blanks: they wait for what follows them
        try:
            for piece in streamer:
                new = piece if begun else piece.lstrip()
                begun = begun or bool(new)
                points = reader.feed(new)  # with its blanks: they end numbers
                num_points += len(points)
                text = (waiting + new).rstrip()
                waiting = (waiting + new)[len(text) :]
                if text or points:
                    yield AnswerPiece(text, tuple(points))
        finally:
            self.unwanted.set()
            thread.join()
        (result,) = results
        if isinstance(result, BaseException):
            raise result
        answer = self.answer(0, inputs["attention_mask"][0], result)
        yield AnswerPiece("", answer.grounding.points[num_points:], answer)


def _twin(cache: DynamicCache) -> DynamicCache:
    """A cache that goes its own way from here. No layer writes over what another holds: until then they share it."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


# --- questions -------------------------------------------------------------------------------------------------------


def _prepared(model: Any, processor: Any, conversations: list[Any], options: dict[str, Any] | None) -> Any:
    """Inputs; the frames of videos are encoded as they are decoded, where the model can."""
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


def _conversation(question: Any, images: Sequence[Any], videos: Sequence[Any]) -> list[dict[str, Any]]:
    """One user turn: pictures first, as in training."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    parts += [{"type": "video", "video": video} for video in videos]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": str(question)}]}]


def _listed(pictures: Any) -> list[Any]:
    """Pictures of one question as a list; an array or a (frames, metadata) pair is one picture."""
    if pictures is None:
        return []
    return list(pictures) if isinstance(pictures, list) else [pictures]


def _per_question(pictures: Any, questions: Sequence[Any], batched: bool) -> list[list[Any]]:
    if not batched:
        return [_listed(pictures)]
    if pictures is None:
        return [[] for _ in questions]
    if not isinstance(pictures, (list, tuple)) or len(pictures) != len(questions):
        found = len(pictures) if isinstance(pictures, (list, tuple)) else type(pictures).__name__
        raise ValueError(
            f"There are {len(questions)} questions, but the pictures are {found}. Pass one entry per question: a "
            "picture, a list of pictures, or None."
        )
    return [_listed(own) for own in pictures]
