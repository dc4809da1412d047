"""Molmo2 as a FiftyOne model: five operations and embeddings, several samples in one call of `generate`."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import fiftyone as fo
import fiftyone.core.models as fom
import numpy as np
import torch
from PIL import Image

from molmo2.grounding import Prompt, prompts

from . import labels
from .reader import VideoPart, videos_left_unopened

OPERATIONS = ("describe", "pointing", "tracking", "temporal_localization", "comprehensive")
VIDEO_OPERATIONS = ("tracking", "temporal_localization")
NAMING_OPERATIONS = ("pointing", "tracking")  # their prompt names the objects
POOLINGS = ("vision", "last_token")
MEDIA_TYPES = ("image", "video")


@dataclass
class Molmo2Settings:
    """The settings of a `Molmo2FiftyOneModel`; may be changed between calls.

    Attributes:
        operation: One of `OPERATIONS`.
        media_type: "image" or "video".
        prompt: For samples without a prompt of their own. The objects or events to look for (pointing, tracking,
            temporal_localization) or the whole question (describe, comprehensive); None for the default question of
            the operation.
        prompt_field: Field of the samples with their prompts; `apply_model(..., prompt_field=...)` takes precedence.
        pooling: The embedding: "vision" averages the features of all visual tokens as the language model receives
            them; "last_token" is the last hidden state of the prompt's last token, which attends to the whole prompt.
        max_new_tokens: Of an answer; long tracks need many, and truncated ones keep their complete points.
        processor_kwargs: Options of the processor, such as {"num_frames": 64}.
    """

    operation: str = "describe"
    media_type: str = "video"
    prompt: str | None = None
    prompt_field: str | None = None
    pooling: str = "vision"
    max_new_tokens: int = 2048
    processor_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("operation", OPERATIONS), ("media_type", MEDIA_TYPES), ("pooling", POOLINGS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; expected one of {allowed}.")
        if self.operation in VIDEO_OPERATIONS and self.media_type != "video":
            raise ValueError(f"{self.operation!r} needs videos, but `media_type` is {self.media_type!r}.")


class Molmo2FiftyOneModel(fom.SamplesMixin, fom.EmbeddingsMixin, fom.Model):
    """For `dataset.apply_model` and `dataset.compute_embeddings`.

    Args:
        model: A Molmo2 model, on its device.
        processor: Its processor, of this project.
        config: The operation and its options.
    Raises:
        ValueError: The processor cannot parse answers: it comes from other code.
    """

    def __init__(self, model: Any, processor: Any, config: Molmo2Settings | None = None):
        super().__init__()
        if not hasattr(processor, "post_process_grounding"):
            raise ValueError(
                f"{type(processor).__name__} cannot parse answers: it is not the class of molmo2-transformers. Load "
                "model and processor with `molmo2.load(folder)`."
            )
        self.model, self.processor = model, processor
        self.config = Molmo2Settings() if config is None else config
        self._embeddings = np.empty((0, 0), dtype=np.float32)
        self._entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> "Molmo2FiftyOneModel":
        """The context in which FiftyOne's `apply_model` and `compute_embeddings` run."""
        self._entered.append(videos_left_unopened() if self.media_type == "video" else nullcontext())
        self._entered[-1].__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)

    # the interface of fom.Model

    @property
    def media_type(self) -> str:
        return self.config.media_type

    @property
    def has_embeddings(self) -> bool:
        return True

    @property
    def ragged_batches(self) -> bool:
        return False  # images of any size form one batch

    @property
    def transforms(self) -> None:
        return None

    @property
    def preprocess(self) -> bool:
        return True

    @property
    def needs_fields(self) -> dict[str, str]:
        own = {} if self.config.prompt_field is None else {"prompt_field": self.config.prompt_field}
        return {**own, **self._fields}

    @needs_fields.setter
    def needs_fields(self, fields: dict[str, str] | None) -> None:
        self._fields = dict(fields or {})

    # answers

    def predict(self, arg: Any, sample: Any = None) -> Any:
        """The labels of one sample; see `predict_all`."""
        return self.predict_all([arg], None if sample is None else [sample])[0]

    def predict_all(self, args: Sequence[Any], samples: Sequence[Any] | None = None) -> list[Any]:
        """Labels of several samples, from one call of `generate`.

        Args:
            args: For each sample its video (a path, a `VideoPart` or one of FiftyOne's readers) or image (an array
                (H, W, 3) uint8, a PIL image, or a path).
            samples: For their prompts.
        Returns:
            For each sample an `fo.Label`, a dictionary of them by section (comprehensive), or by frame number (points
            and tracks in videos).
        """
        if not len(args):
            return []
        questions = [self._prompt(sample) for sample in ([None] * len(args) if samples is None else samples)]
        inputs = self._inputs(args, [str(question) for question in questions])
        media = list(inputs.media)
        length = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            output = self.model.generate(**inputs, max_new_tokens=self.config.max_new_tokens, do_sample=False)
        answers = self.processor.batch_decode(output[:, length:], skip_special_tokens=True)
        return [self._labels(question, answer, about) for question, answer, about in zip(questions, answers, media)]

    def _prompt(self, sample: Any) -> Prompt:
        """The prompt of a sample; a text that replaces the default question keeps the question's parser."""
        wanted = self.config.prompt
        field = self.needs_fields.get("prompt_field", self.needs_fields.get("prompt"))
        if field is not None and sample is not None and sample[field] is not None:
            wanted = sample[field]
        if isinstance(wanted, (list, tuple)):
            wanted = ", ".join(map(str, wanted))
        operation = self.config.operation
        if operation in NAMING_OPERATIONS:
            if not wanted:
                raise ValueError(
                    f"{operation!r} needs to know what to look for: set `prompt`, or pass `prompt_field`."
                )
            return prompts.point(wanted) if operation == "pointing" else prompts.track(wanted)
        if operation == "temporal_localization":
            return prompts.localize_events(wanted or None)
        default = prompts.describe(self.media_type)
        if operation == "comprehensive" and self.media_type == "video":
            default = prompts.describe_structured()
        elif operation == "comprehensive":
            of_video = prompts.describe_structured("summary", "objects", "text", "scene")
            default = replace(of_video, text=of_video.text.replace("this video", "this image"))
        return replace(default, text=str(wanted)) if wanted else default

    def _labels(self, prompt: Prompt, answer: str, media: Any) -> Any:
        operation, parsed = self.config.operation, prompt.parse(answer, media)
        if operation == "describe":
            return fo.Classification(label=parsed)
        if operation == "temporal_localization":
            return labels.temporal_detections(parsed.events, media)
        if operation == "comprehensive":
            return labels.structured_labels(parsed, media)
        if media.kind != "video":
            return labels.image_keypoints(parsed)
        # FiftyOne refuses a dictionary without any frame.
        return labels.frame_keypoints(parsed) or {labels.frame_number(media.sampled_frames[0]): fo.Keypoints()}

    def apply_in_batches(self, samples: Any, label_field: Any, batch_size: int = 4) -> None:
        """`samples.apply_model` with `batch_size` videos, clips or images in each call of `generate`.

        FiftyOne batches images itself (`apply_model(..., batch_size=)`), but passes videos one by one.

        Args:
            samples: A dataset or view.
            label_field: As for `apply_model`.
        """
        for batch in _batches(samples, batch_size):
            for sample, found in zip(batch, self.predict_all(self._media_of(batch), batch)):
                sample.add_labels(found, label_field=label_field)
                sample.save()

    # embeddings

    def embed(self, arg: Any) -> np.ndarray:
        """The vector of one sample, (D,) float32."""
        return self.embed_all([arg])[0]

    def embed_all(self, args: Sequence[Any]) -> np.ndarray:
        """Vectors of several samples, (N, D) float32, from one call of the model; `config.pooling` says how."""
        question = prompts.describe(self.media_type)
        inputs = self._inputs(args, [str(question)] * len(args))
        with torch.inference_mode():
            vectors = self._pooled(inputs)
        self._embeddings = vectors.float().cpu().numpy()
        return self._embeddings

    def embed_in_batches(self, samples: Any, embeddings_field: str, batch_size: int = 4) -> None:
        """`samples.compute_embeddings` with `batch_size` videos, clips or images in each call of the model."""
        for batch in _batches(samples, batch_size):
            for sample, vector in zip(batch, self.embed_all(self._media_of(batch))):
                sample[embeddings_field] = vector
                sample.save()

    def get_embeddings(self) -> np.ndarray:
        """The vectors of the last call of `embed` or `embed_all`, (N, D)."""
        return self._embeddings

    def _pooled(self, inputs: Any) -> torch.Tensor:
        base = self.model.model
        if self.config.pooling == "last_token":
            mask = inputs["attention_mask"]
            last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
            hidden = base(**inputs, use_cache=False).last_hidden_state
            return hidden[torch.arange(len(hidden), device=hidden.device), last]
        features = base.get_image_features if self.media_type == "image" else base.get_video_features
        counts = base.patch_token_mask(inputs["input_ids"], None).sum(1).tolist()
        vectors = torch.cat(features(**inputs).pooler_output)
        return torch.stack([own.float().mean(0) for own in vectors.split(counts)])

    def _media_of(self, batch: Sequence[Any]) -> list[Any]:
        images = self.media_type == "image"
        return [sample.filepath if images else VideoPart.from_sample(sample) for sample in batch]

    def _inputs(self, args: Sequence[Any], questions: Sequence[str]) -> Any:
        conversations = [
            [{"role": "user", "content": [self._media_part(arg), {"type": "text", "text": question}]}]
            for arg, question in zip(args, questions)
        ]
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
            processor_kwargs=self.config.processor_kwargs,
        )
        return inputs.to(self.model.device)

    def _media_part(self, arg: Any) -> dict[str, Any]:
        """The part of a message for the image or the video."""
        if self.media_type == "image":
            return {"type": "image", "image": Image.fromarray(arg) if isinstance(arg, np.ndarray) else arg}
        if not isinstance(arg, VideoPart):
            arg = VideoPart.from_reader(arg) if hasattr(arg, "inpath") else VideoPart(str(arg))
        clip = arg.clip()
        return {"type": "video", "video": arg.path} | ({} if clip is None else {"clip": clip})


def _batches(samples: Any, size: int) -> Iterator[list[Any]]:
    if size < 1:
        raise ValueError(f"`batch_size` is {size}; it has to be at least 1.")
    batch: list[Any] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
