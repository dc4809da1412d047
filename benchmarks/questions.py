"""Questions: a follow-up about the same clip, and a batch of eight mixed ones."""

from typing import Any

import torch

from benchmarks.harness import Goal, Side, Work, row
from benchmarks.media import clip, photo
from benchmarks.sides import chat_inputs, inputs_for, load_model, our_processor, processor
from molmo2 import MediaSession

QUESTION = "What happens in the second half of the clip, and where is the smaller one of the two?"


@row(
    "follow-up",
    "another question about a clip of 64 frames",
    bound="prefill of the new text alone",
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
    return lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1)


def _rows(side: Side) -> list[list[dict[str, Any]]]:
    """Four with text alone or a small photo, two with two photos, two with a clip."""
    video = str(clip(side, 360, 640, seconds=4))
    media: list[list[dict[str, Any]]] = [[], [], *([{"type": "image", "image": photo(480, 640, n)}] for n in (1, 2))]
    media += [[{"type": "image", "image": photo(300, 300, n)} for n in (3, 4)] for _ in range(2)]
    media += [[{"type": "video", "video": video}] for _ in range(2)]
    return [[*parts, {"type": "text", "text": "Describe it. " * (number + 1)}] for number, parts in enumerate(media)]


@row(
    "batch-8",
    "batch of 8 mixed rows, 128 new tokens each",
    bound="the same rows one by one, by ours",
    goals=(Goal(0.5, "one by one"),),
    sides=("one by one", "ours", "peer"),
)
def batch(side: Side) -> Work:
    model, tokens = load_model(side if side.name != "one by one" else Side("ours", side.settings), "session"), 128
    our = our_processor(side, "session")
    chats = [[{"role": "user", "content": content}] for content in _rows(side)]
    groups = [[chat] for chat in chats] if side.name == "one by one" else [chats]
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
    tokens = side.pick(tokens, 8)

    def work() -> None:
        for inputs in prepared:
            model.generate(**inputs, max_new_tokens=tokens, do_sample=False)

    return work
