"""Molmo2 as a FiftyOne model: five operations and embeddings, several samples in one call of `generate`."""

import importlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import fiftyone as fo
import fiftyone.core.models as fom
import numpy as np
import torch
from PIL import Image

from . import labels
from .reader import VideoPart, videos_left_unopened

OPERATIONS = ("describe", "pointing", "tracking", "temporal_localization", "comprehensive")
VIDEO_OPERATIONS = ("tracking", "temporal_localization")
NAMING_OPERATIONS = ("pointing", "tracking")  # their prompt names what is looked for
POOLINGS = ("vision", "last_token")
MEDIA_TYPES = ("image", "video")


@dataclass
class Molmo2Settings:
    """What a `Molmo2FiftyOneModel` does; may be changed between calls.

    Attributes:
        operation: One of `OPERATIONS`.
        media_type: "image" or "video".
        prompt: For samples without one of their own. What to look for (pointing, tracking, temporal_localization) or
            the whole question (describe, comprehensive); None asks the operation's usual question.
        prompt_field: Field of the samples that holds their prompt; `apply_model(..., prompt_field=...)` goes first.
        pooling: How `embed` makes one vector: "vision" averages the vectors of all visual tokens as the language model
            receives them; "last_token" is the last hidden state of the prompt's last token, which has seen everything.
        max_new_tokens: Of an answer; long tracks need many, and cut-off ones keep what was finished.
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
        processor: Its processor, with the prompts and parsers of this project's remote code.
        config: What to do.
    """

    def __init__(self, model: Any, processor: Any, config: Molmo2Settings | None = None):
        super().__init__()
        if not hasattr(processor, "post_process_grounding"):
            raise ValueError(
                f"{type(processor).__name__} can't read answers: the checkpoint has other remote code. Put this "
                "project's *_molmo2.py files into its folder."
            )
        self.model, self.processor = model, processor
        self.config = Molmo2Settings() if config is None else config
        self._embeddings = np.empty((0, 0), dtype=np.float32)
        self._entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> "Molmo2FiftyOneModel":
        """FiftyOne's `apply_model` and `compute_embeddings` do their work inside."""
        self._entered.append(videos_left_unopened() if self.media_type == "video" else nullcontext())
        self._entered[-1].__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)

    # what FiftyOne asks

    @property
    def media_type(self) -> str:
        return self.config.media_type

    @property
    def has_embeddings(self) -> bool:
        return True

    @property
    def ragged_batches(self) -> bool:
        return False  # pictures of any sizes go into one batch

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
        prompts = [self._prompt(sample) for sample in ([None] * len(args) if samples is None else samples)]
        inputs = self._inputs(args, [str(prompt) for prompt in prompts])
        media = list(inputs.media)
        length = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            output = self.model.generate(**inputs, max_new_tokens=self.config.max_new_tokens, do_sample=False)
        answers = self.processor.batch_decode(output[:, length:], skip_special_tokens=True)
        return [self._labels(prompt, answer, about) for prompt, answer, about in zip(prompts, answers, media)]

    def _prompt(self, sample: Any) -> Any:
        """A `Prompt` of this project; a text that replaces the usual question keeps the question's parser."""
        wanted = self.config.prompt
        field = self.needs_fields.get("prompt_field", self.needs_fields.get("prompt"))
        if field is not None and sample is not None and sample[field] is not None:
            wanted = sample[field]
        if isinstance(wanted, (list, tuple)):
            wanted = ", ".join(map(str, wanted))
        operation, prompts = self.config.operation, _sibling(self.processor, "prompts_molmo2")
        if operation in NAMING_OPERATIONS:
            if not wanted:
                raise ValueError(
                    f"{operation!r} needs to know what to look for: set `prompt`, or pass `prompt_field`."
                )
            return prompts.prompts.point(wanted) if operation == "pointing" else prompts.prompts.track(wanted)
        if operation == "temporal_localization":
            return prompts.prompts.localize_events(wanted or None)
        usual = prompts.prompts.describe(self.media_type)
        if operation == "comprehensive" and self.media_type == "video":
            usual = prompts.prompts.describe_structured()
        elif operation == "comprehensive":
            about_time = prompts.prompts.describe_structured("summary", "objects", "text", "scene")
            usual = type(about_time)(about_time.text.replace("this video", "this image"), about_time.reader)
        return type(usual)(str(wanted), usual.reader) if wanted else usual

    def _labels(self, prompt: Any, answer: str, media: Any) -> Any:
        operation, parsed = self.config.operation, prompt.parse(answer, media)
        if operation == "describe":
            return fo.Classification(label=parsed)
        if operation == "temporal_localization":
            return labels.temporal_detections(parsed.events, media)
        if operation == "comprehensive":
            return labels.structured_labels(parsed, media)
        if media.kind != "video":
            return labels.image_keypoints(parsed)
        # FiftyOne can't add labels for no frame at all.
        return labels.frame_keypoints(parsed) or {labels.frame_number(media.moments[0]): fo.Keypoints()}

    def apply_in_batches(self, samples: Any, label_field: Any, batch_size: int = 4) -> None:
        """`samples.apply_model` with `batch_size` videos, clips or images in each call of `generate`.

        FiftyOne batches images itself (`apply_model(..., batch_size=)`), but hands over videos one by one.

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
        question = _sibling(self.processor, "prompts_molmo2").prompts.describe(self.media_type)
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
        """What the last call of `embed` or `embed_all` gave, (N, D)."""
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
        return torch.stack([own.float().mean(0) for own in features(**inputs).split(counts)])

    def _media_of(self, batch: Sequence[Any]) -> list[Any]:
        images = self.media_type == "image"
        return [sample.filepath if images else VideoPart.of_sample(sample) for sample in batch]

    def _inputs(self, args: Sequence[Any], questions: Sequence[str]) -> Any:
        conversations = [
            [{"role": "user", "content": [self._picture(arg), {"type": "text", "text": question}]}]
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

    def _picture(self, arg: Any) -> dict[str, Any]:
        """The part of a message that shows the image or the video."""
        if self.media_type == "image":
            return {"type": "image", "image": Image.fromarray(arg) if isinstance(arg, np.ndarray) else arg}
        if not isinstance(arg, VideoPart):
            arg = VideoPart.of_reader(arg) if hasattr(arg, "inpath") else VideoPart(str(arg))
        clip = arg.clip(_sibling(self.processor, "video_decoding_molmo2"))
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


def _sibling(processor: Any, name: str) -> Any:
    """A module of the remote code that the processor came from."""
    package = type(processor).__module__.rpartition(".")[0]
    return importlib.import_module(f"{package}.{name}")
