"""Questions: a follow-up about the same clip, a batch of eight mixed ones, several answers, prompt lookup."""

import copy
from typing import Any

import torch
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from benchmarks.bounds import attention_over_cache
from benchmarks.harness import Goal, Side, Work, row
from benchmarks.media import clip, photo
from benchmarks.models import clip_and_text, image_inputs
from benchmarks.sides import chat_inputs, inputs_for, load_model, our_processor, processor
from molmo2 import MediaSession
from molmo2.model.generation import LatestMatchLookup

QUESTION = "What happens in the second half of the clip, and where is the smaller one of the two?"


@row(
    "follow-up",
    "another question about a clip of 64 frames",
    bound="prefill of the new text alone, and plain attention of its tokens over those of the clip",
    goals=(Goal(1.5, "bound"),),
)
def follow_up(side: Side) -> Work:
    """Sides without sessions encode the clip again, from prepared pixels."""
    model, frames = load_model(side, "session"), side.pick(64, 8)
    video = str(clip(side, 360, 640, seconds=32))
    if side.name not in ("ours", "bound"):
        content = [{"type": "video", "video": video}, {"type": "text", "text": QUESTION}]
        inputs = chat_inputs(side, "session", content, num_frames=frames)
        return lambda: model.generate(**inputs, max_new_tokens=1, do_sample=False)
    own = Side("ours", side.settings)
    session = MediaSession(model, processor(own, "session"), videos=video, processor_kwargs={"num_frames": frames})
    if not side.is_bound:
        return lambda: session.ask(QUESTION, max_new_tokens=1, do_sample=False)
    timings = session.ask(QUESTION, max_new_tokens=1).timings
    ids = torch.full((1, timings.num_prompt_tokens - timings.num_cached_tokens), 65)
    attend = attention_over_cache(model.config.get_text_config(), ids.shape[1], timings.num_cached_tokens)

    def work() -> None:
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
        attend()

    return work


def _rows(side: Side) -> list[list[dict[str, Any]]]:
    """Four with text alone or a small photo, two with two photos, two with a clip."""
    video = str(clip(side, 360, 640, seconds=4))
    media: list[list[dict[str, Any]]] = [[], [], *([{"type": "image", "image": photo(480, 640, n)}] for n in (1, 2))]
    media += [[{"type": "image", "image": photo(300, 300, n)} for n in (3, 4)] for _ in range(2)]
    media += [[{"type": "video", "video": video}] for _ in range(2)]
    return [[*parts, {"type": "text", "text": "Describe it. " * (number + 1)}] for number, parts in enumerate(media)]


def _batch(side: Side, rows: list[list[dict[str, Any]]]) -> Work:
    one_by_one = side.name == "one by one"
    model, tokens = load_model(Side("ours", side.settings) if one_by_one else side, "session"), side.pick(128, 8)
    our = our_processor(side, "session")
    chats = [[{"role": "user", "content": content}] for content in rows]
    groups = [[chat] for chat in chats] if one_by_one else [chats]
    options = {"max_crops": 1, "num_frames": 4}
    prepared = [
        inputs_for(
            side,
            our.apply_chat_template(
                group, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True,
                processor_kwargs=options,
            ),
        )
        for group in groups
    ]  # fmt: skip

    def work() -> None:
        for inputs in prepared:
            model.generate(**inputs, max_new_tokens=tokens, do_sample=False)

    return work


@row(
    "batch-8",
    "batch of 8 mixed rows, 128 new tokens each",
    bound="the same rows one by one, by ours",
    goals=(Goal(0.5, "one by one"),),
    sides=("one by one", "ours", "peer"),
)
def batch(side: Side) -> Work:
    """Without the native side, whose processor takes images or videos in one call, not both; the peer's takes both."""
    return _batch(side, _rows(side))


@row(
    "batch-images-8",
    "batch of 8 rows of text and images, 128 new tokens each",
    bound="the same rows one by one, by ours",
    goals=(Goal(0.67, "native"),),
    sides=("one by one", "ours", "native", "peer"),
)
def batch_images(side: Side) -> Work:
    rows = _rows(side)
    return _batch(side, [*rows[:-2], *rows[2:4]])


@row(
    "answers-4",
    "four sampled answers about a photo of 9 crops, 16 new tokens each",
    bound="the prompt read once, then the same steps of four rows, without sampling, by ours",
    goals=(Goal(0.67, "native"),),
)
def answers(side: Side) -> Work:
    own = side if not side.is_bound else Side("ours", side.settings)
    model, inputs = load_model(own, "session"), image_inputs(own, "session", side.pick(8, 1))
    settings = {"max_new_tokens": 16, "do_sample": True, "num_return_sequences": 4}

    def work() -> None:
        torch.manual_seed(0)
        model.generate(**inputs, **settings)

    if not side.is_bound:
        return work
    read = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    ids = inputs["input_ids"][:, -1:].repeat(4, 1)
    read.batch_repeat_interleave(4)

    def bound() -> None:
        model(**inputs, use_cache=True, logits_to_keep=1)
        cache = copy.deepcopy(read)
        for _ in range(settings["max_new_tokens"] - 1):
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    return bound


@row(
    "lookup-36k",
    "the search of prompt lookup in 36,864 tokens",
    bound="the ids compared with the last one, once",
    goals=(Goal(1.0, "native"),),
    sides=("bound", "ours", "native"),
)
def lookup(side: Side) -> Work:
    """A prompt of frames: visual tokens that repeat, then text; 100 steps."""
    length = side.pick(36864, 2048)
    ids = clip_and_text(side, length)["input_ids"]
    library = PromptLookupCandidateGenerator(num_output_tokens=10, max_matching_ngram_size=3, max_length=2 * length)
    generator = LatestMatchLookup(library) if side.name == "ours" else library

    def work() -> None:
        for _ in range(100):
            if side.is_bound:
                (ids[0].numpy() == 65).nonzero()
            else:
                generator.get_candidates(ids)

    return work
