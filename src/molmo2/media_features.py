"""`MediaFeatures`: model inputs with the sizes and frame times of their media, and how answers are read with them.

Sizes and times are needed to read an answer, but not to generate it. They are an attribute beside the tensors:
`model.generate(**inputs)` does not see them, and the processor keeps no state between calls.
"""

import gc
import sys
from collections.abc import Collection, KeysView, Mapping, Sequence
from typing import Any

from transformers.image_processing_utils import BatchFeature
from transformers.utils import logging

from molmo2.grounding.parse import Grounding, MediaInfo, is_media_info, media_info, parse_grounding

logger = logging.get_logger(__name__)

# The library's own model class, which another processor belongs to, and what is said where a process has such a model.
LIBRARY_MODEL = "transformers.models.molmo2.modeling_molmo2"
LIBRARY_MODEL_WARNING = (
    "There is a model of transformers' own Molmo2 class in this process. It reads other inputs than this processor "
    "writes: it ignores `token_type_ids`, and counts pooling indices over all images or videos of a call instead of "
    "from the first crop of each, so its logits would be wrong without an error. Use the class that belongs to this "
    "processor (`molmo2.load`, or remote code; for a trainer pass `ref_model=` too), or give it "
    "`molmo2.library_inputs(inputs)`."
)
_num_references: int | None = 0  # to the classes of that module, when it was last searched for; None after the warning


class MediaFeatures(BatchFeature):
    """A `BatchFeature` with the attribute `media`, which `.to()`, copies and pickles keep.

    Attributes:
        media: One `MediaInfo` per row of the processor's output, or per image of the image processor's.
    """

    def __init__(self, data: dict[str, Any] | None = None, tensor_type: Any = None, media: Sequence[MediaInfo] = ()):
        super().__init__(data, tensor_type)
        self.media = list(media)
        warn_about_library_model(self.data)

    def keys(self) -> KeysView[str]:  # which a call with `**inputs` asks for
        warn_about_library_model(self.data)
        return self.data.keys()  # the view of UserDict prints all tensors

    def __getstate__(self) -> dict[str, Any]:
        return {"data": self.data, "media": self.media}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.data = state["data"]
        self.media = state["media"]


def warn_about_library_model(names: Collection[str]) -> None:
    """Warns where a model of the library is in memory, to which inputs of these names may go: nothing later could.

    That its module is imported says nothing, as transformers imports it while it loads remote code. A search through
    all objects takes 30 ms and more, so it waits for further references to the classes: each object holds one.
    """
    global _num_references
    module = sys.modules.get(LIBRARY_MODEL)
    has_media = "token_type_ids" in names and any(name.endswith("_grids") for name in names)
    if module is None or not has_media or _num_references is None:
        return
    classes = [
        value for value in vars(module).values() if isinstance(value, type) and value.__module__ == LIBRARY_MODEL
    ]
    found = sum(map(sys.getrefcount, classes))
    if found == _num_references:
        return
    _num_references = found
    ids = set(map(id, classes))  # classes of others may have no hash
    if any(id(type(value)) in ids for value in gc.get_objects()):
        _num_references = None
        logger.warning_once(LIBRARY_MODEL_WARNING)


# --- from answers back to places -------------------------------------------------------------------------------------


def ground_answers(answers: Any, media: Any, kind: str | None, tokenizer: Any) -> Grounding | list[Grounding]:
    """Groundings of answers, decoded if they are ids; see `Molmo2Processor.post_process_grounding`."""
    is_row = getattr(answers, "ndim", 0) == 1  # which tells one answer without ids from a batch of none
    answers = _as_lists(answers)
    is_one = isinstance(answers, str) or (_is_ids(answers) and (is_row or len(answers) > 0))
    batch = [answers] if is_one else answers
    if not isinstance(batch, Sequence) or not all(isinstance(answer, str) or _is_ids(answer) for answer in batch):
        raise TypeError(
            f"Answers of type {type(answers).__name__} cannot be read. Pass a string or a list of them, or the token "
            "ids of one answer or of several, as lists or a tensor."
        )
    infos = _media_of_answers(media, len(batch), kind)
    found = [parse_grounding(text, info) for text, info in zip(_texts(batch, media, tokenizer), infos)]
    return found[0] if is_one else found


def _as_lists(value: Any) -> Any:
    """Lists and numbers for arrays and tensors, also for those in lists; all else as it is."""
    if isinstance(value, (list, tuple)):
        return [_as_lists(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _is_ids(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, int) for item in value)


def _texts(answers: Sequence[Any], media: Any, tokenizer: Any) -> list[str]:
    """Answers as text; ids that begin with those of their prompt, as `generate` returns them, lose it.

    Negative ids are no tokens: labels are padded with -100.
    """
    prompts = _as_lists(media.get("input_ids")) if _has_media(media) else None
    texts = []
    for place, answer in enumerate(answers):
        if not isinstance(answer, str):
            ids = answer
            if prompts:
                prompt = prompts[place * len(prompts) // len(answers)]
                ids = ids[len(prompt) :] if ids[: len(prompt)] == prompt else ids
            ids = [token for token in ids if token >= 0]
            answer = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        texts.append(answer)
    return texts


def _media_of_answers(media: Any, num_answers: int, kind: str | None) -> list[MediaInfo | None]:
    """What each answer is about; with several answers per row those of a row follow each other."""
    rows = _rows(media, num_answers)
    if not rows:
        return [media_info(None, kind)] * num_answers
    if num_answers % len(rows):
        raise ValueError(
            f"There are {num_answers} answer(s) for {len(rows)} row(s) of media; expected the same number, or a "
            "multiple of it (num_return_sequences). Pass the inputs that the answers were generated from."
        )
    per_row = num_answers // len(rows)
    return [media_info(row, kind) for row in rows for _ in range(per_row)]


def _has_media(value: Any) -> bool:
    return isinstance(value, BatchFeature) and hasattr(value, "media")


def _rows(media: Any, num_answers: int) -> list[Any]:
    """`media` as one description per row of the batch."""
    if _has_media(media):
        return media.media
    if isinstance(media, Mapping) and "input_ids" in list(media):  # the metadata of the library cannot be asked `in`
        if media.get("video_metadata") is not None:
            return list(media["video_metadata"])
        raise ValueError(
            "These inputs are a plain dictionary, without the sizes of images and videos. Pass the processor's own "
            "output (or its `.media`), sizes, or the metadata of the video."
        )
    media = _as_lists(media)
    if not isinstance(media, list):
        return [] if media is None else [media]
    is_nested = any(is_media_info(row) or _is_nested(row) for row in media)
    is_one_size = len(media) == 2 and all(isinstance(side, (int, float)) for side in media)
    return [media] if (num_answers == 1 or is_one_size) and not is_nested else media


def _is_nested(row: Any) -> bool:
    """Whether a row lists its own media."""
    return isinstance(row, list) and all(isinstance(item, list) for item in row)
