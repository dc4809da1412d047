"""Molmo2 as a FiftyOne model: five operations and embeddings, several samples in one call of the model."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import fiftyone as fo
import fiftyone.core.collections as foc
import fiftyone.core.models as fom
import fiftyone.core.utils as fou
import numpy as np
import torch
from PIL import Image

from molmo2.grounding import Prompt, prompts
from molmo2.tools.ask import prepare_inputs, user_turn
from molmo2.tools.embedding import POOLINGS, check_pooling, pooled_states, video_turn

from . import labels
from .loops import register_loops, results, store
from .videos import VideoPart

OPERATIONS = ("describe", "pointing", "tracking", "temporal_localization", "comprehensive")
VIDEO_OPERATIONS = ("tracking", "temporal_localization")
NAMING_OPERATIONS = ("pointing", "tracking")  # their prompt names the objects
NEEDS_A_NAME = "needs to know what to look for: set `prompt`, or pass `prompt_field`."
MEDIA_TYPES = ("image", "video")
PROMPT_FIELD = "prompt_field"

register_loops()


class _Setting:
    """An attribute of the model that is checked whenever it is set."""

    def __init__(self, default: Any, check: Callable[[str, Any], Any]):
        self.default, self.check = default, check

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, model: Any, owner: type) -> Any:
        return self if model is None else model._settings[self.name]

    def __set__(self, model: Any, value: Any) -> None:
        model._settings[self.name] = self.check(self.name, value)


def _one_of(allowed: tuple[str, ...]) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        if value not in allowed:
            raise ValueError(f"`{name}` is {value!r}; expected one of {allowed}.")
        return value

    return check


def _of_type(*types: type) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        if value is not None and not isinstance(value, types):
            raise ValueError(f"`{name}` is {value!r:.80}; expected {' or '.join(t.__name__ for t in types)}, or None.")
        return value

    return check


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` is {value!r}; expected a whole number of at least 1.")
    return value


class Molmo2FiftyOneModel(fom.SamplesMixin, fom.EmbeddingsMixin, fom.Model):
    """For `dataset.apply_model` and `dataset.compute_embeddings`.

    Args:
        model: A Molmo2 model, on its device.
        processor: Its processor, of this project.
        settings: Values of the attributes below, which may be changed between calls.

    Attributes:
        operation: One of `OPERATIONS`.
        media_type: "video" or "image".
        prompt: For samples without a prompt of their own: the objects to look for (pointing, tracking; text or a list
            of names) or the whole question (describe; None for "Describe this video."). The questions of the other
            two operations are fixed: a prompt that an earlier operation left behind does not change them.
        events: What temporal_localization looks for, such as "a cup falls"; None for all events.
        prompt_field: Field of the samples with their prompts, or with their events; `apply_model(...,
            prompt_field=...)` takes precedence.
        pooling_strategy: "mean", "max" or "last", see `molmo2.embed`.
        embedding_prompt: The question beside each image or video in `compute_embeddings`; with "last" it decides what
            the vectors are about. None for "Describe this video.".
        max_new_tokens: Of an answer; long tracks need many, and truncated ones keep their complete points.
        processor_kwargs: Options of the processor, such as {"num_frames": 64}.

    Raises:
        ValueError: The processor cannot parse answers: it comes from other code; a setting has no such value, or an
            image would be tracked.
        AttributeError: There is no such setting.
    """

    operation = _Setting("describe", _one_of(OPERATIONS))
    media_type = _Setting("video", _one_of(MEDIA_TYPES))
    prompt = _Setting(None, _of_type(str, list, tuple))
    events = _Setting(None, _of_type(str))
    prompt_field = _Setting(None, _of_type(str))
    pooling_strategy = _Setting(POOLINGS[0], lambda name, value: check_pooling(value))
    embedding_prompt = _Setting(None, _of_type(str))
    max_new_tokens = _Setting(2048, _positive)
    processor_kwargs = _Setting(None, _of_type(dict))

    def __init__(self, model: Any, processor: Any, **settings: Any):
        super().__init__()
        if not hasattr(processor, "post_process_grounding"):
            raise ValueError(
                f"{type(processor).__name__} cannot parse answers: it is not the class of molmo2-transformers. Load "
                "model and processor with `molmo2.load(folder)`."
            )
        self._model, self._processor = model, processor
        self._settings = {name: getattr(type(self), name).default for name in self.setting_names()}
        self._embeddings = np.empty((0, 0), dtype=np.float32)
        for name, value in settings.items():
            setattr(self, name, value)
        self._check_media()

    @classmethod
    def setting_names(cls) -> list[str]:
        """The attributes that may be set."""
        return [name for name, value in vars(cls).items() if isinstance(value, _Setting)]

    def __setattr__(self, name: str, value: Any) -> None:
        # What FiftyOne sets are attributes of the class or begin with an underscore.
        if not name.startswith("_") and not hasattr(type(self), name):
            names = self.setting_names()
            close = get_close_matches(name, names, n=1)
            meant = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(names)}."
            raise AttributeError(f"A Molmo2 model has no setting {name!r}; {meant}")
        super().__setattr__(name, value)

    def _check_media(self) -> None:
        if self.operation in VIDEO_OPERATIONS and self.media_type != "video":
            raise ValueError(f"{self.operation!r} needs videos, but `media_type` is {self.media_type!r}.")

    def _check_settings(self) -> None:
        """Refuse what would fail with every sample, whether failures are skipped or not.

        Raises:
            ValueError: Settings contradict each other, or one is missing.
        """
        self._check_media()
        has_field = PROMPT_FIELD in self.needs_fields
        if self.operation in NAMING_OPERATIONS and not self.prompt and not has_field:
            raise ValueError(f"{self.operation!r} {NEEDS_A_NAME}")
        if self.operation == "comprehensive" and has_field:
            raise ValueError(
                "The question of 'comprehensive' is fixed, so that its answers can be read, but there is a "
                "`prompt_field`. Leave it out, or use 'describe'."
            )

    @property
    def model(self) -> Any:
        """The Molmo2 model."""
        return self._model

    @property
    def processor(self) -> Any:
        """Its processor."""
        return self._processor

    # the interface of fom.Model

    @property
    def config(self) -> None:
        """FiftyOne looks for thresholds in it; Molmo2 has none."""
        return

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
        own = {} if self.prompt_field is None else {PROMPT_FIELD: self.prompt_field}
        return {**own, **self._fields}

    @needs_fields.setter
    def needs_fields(self, fields: dict[str, str] | None) -> None:
        unknown = sorted(set(fields or {}) - {PROMPT_FIELD})
        if unknown:
            raise ValueError(f"Molmo2 has no use for {unknown}; the one field that it reads is `{PROMPT_FIELD}`.")
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
            For each sample a string (describe), an `fo.Label`, or a dictionary of them by section (comprehensive) or
            by frame number (points and tracks in videos).
        """
        self._check_settings()
        if not len(args):
            return []
        questions = [self._question(sample) for sample in ([None] * len(args) if samples is None else samples)]
        return self._answers((questions, self._inputs(args, questions)))

    def apply_to_samples(
        self,
        samples: Any,
        fields: dict[str, Any],
        *,
        label_field: Any,
        classes: Any,
        skip_failures: bool,
        progress: Any,
        **options: Any,
    ) -> None:
        """What `samples.apply_model` does with this model; arguments as there.

        Args:
            fields: Further keyword arguments of that call: `prompt_field`.
            options: `batch_size` and `num_workers`: samples in one call of `generate`, and batches that are prepared
                in threads meanwhile. Those about confidences, logits and segmentations are refused: Molmo2 has none.
        Raises:
            ValueError: An option without meaning; and without `skip_failures` what went wrong with a sample.
        """
        unusable = ("confidence_thresh", "store_logits", "output_dir", "rel_dir", "pin_memory")
        found = [name for name in unusable if options.get(name)]
        if found:
            raise ValueError(f"Molmo2 has no confidences, logits, segmentations or data loader: leave out {found}.")
        with fou.SetAttributes(self, needs_fields={**fields.pop("needs_fields", {}), **fields}):
            self._check_settings()
            view = samples.select_fields(list(self.needs_fields.values()))
            with foc.SaveContext(view) as context:

                def save(sample: Any, found: Any) -> None:
                    sample.add_labels(found, label_field, classes=classes)
                    context.save(sample)

                for sample, found in results(
                    view,
                    self._prepare_questions,
                    self._answers,
                    skip_failures=skip_failures,
                    progress=progress,
                    **_batching(options),
                ):
                    if found is not None:
                        store(sample, functools.partial(save, sample, found), skip_failures)

    def _prepare_questions(self, batch: Sequence[Any]) -> tuple[list[Prompt], Any]:
        questions = [self._question(sample) for sample in batch]
        return questions, self._inputs(self._media_of(batch), questions)

    def _answers(self, prepared: tuple[list[Prompt], Any]) -> list[Any]:
        questions, inputs = prepared
        media, length = list(inputs.media), inputs["input_ids"].shape[1]
        inputs = inputs.to(self._model.device)
        with torch.inference_mode():
            output = self._model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        answers = self._processor.batch_decode(output[:, length:], skip_special_tokens=True)
        return [self._labels(question, answer, about) for question, answer, about in zip(questions, answers, media)]

    def _question(self, sample: Any) -> Prompt:
        """The question about a sample, with the parser of its answers."""
        if self.operation == "comprehensive":
            return prompts.describe_structured(what=self.media_type)
        wanted = self.events if self.operation == "temporal_localization" else self.prompt
        field = self.needs_fields.get(PROMPT_FIELD)
        if field is not None and sample is not None and sample[field] is not None:
            wanted = sample[field]
        if isinstance(wanted, (list, tuple)):
            wanted = ", ".join(map(str, wanted))
        if self.operation == "temporal_localization":
            return prompts.localize_events(wanted or None)
        if self.operation == "describe":
            default = prompts.describe(self.media_type)
            return replace(default, text=str(wanted)) if wanted else default
        if not wanted:
            raise ValueError(f"{self.operation!r} {NEEDS_A_NAME}")
        return prompts.point(wanted) if self.operation == "pointing" else prompts.track(wanted)

    def _labels(self, question: Prompt, answer: str, media: Any) -> Any:
        parsed = question.parse(answer, media)
        if self.operation == "describe":
            return parsed
        if self.operation == "temporal_localization":
            return labels.temporal_detections(parsed.events, media)
        if self.operation == "comprehensive":
            return labels.structured_labels(parsed, media)
        if media.kind != "video":
            return labels.image_keypoints(parsed)
        # FiftyOne refuses a dictionary without any frame.
        return labels.frame_keypoints(parsed) or {labels.frame_number(media.sampled_frames[0]): labels.no_keypoints()}

    # embeddings

    def embed(self, arg: Any) -> np.ndarray:
        """The vector of one sample, (D,) float32, of length 1."""
        return self.embed_all([arg])[0]

    def embed_all(self, args: Sequence[Any]) -> np.ndarray:
        """Vectors of several samples, (N, D) float32, from one call of the model, as `molmo2.embed` gives them.

        Args:
            args: As for `predict_all`.
        """
        self._embeddings = self._vectors(self._inputs(args, [self._embedding_question()] * len(args)))
        return self._embeddings

    def get_embeddings(self) -> np.ndarray:
        """The vectors of the last call of `embed` or `embed_all`, (N, D)."""
        return self._embeddings

    def embed_samples(
        self,
        samples: Any,
        fields: dict[str, Any],
        *,
        embeddings_field: str | None,
        skip_failures: bool,
        progress: Any,
        **options: Any,
    ) -> Any:
        """What `samples.compute_embeddings` does with this model; arguments and result as there.

        Args:
            fields: Further keyword arguments of that call; there are none.
            options: As for `apply_to_samples`.
        """
        unknown = [*fields, *(name for name in ("pin_memory",) if options.get(name))]
        if unknown:
            raise ValueError(f"Embeddings of Molmo2 have no options {unknown}. See `embedding_prompt` of the model.")
        if embeddings_field is not None:
            _add_vector_field(samples, embeddings_field)
        view = samples.select_fields(embeddings_field)
        vectors: list[np.ndarray | None] = []
        with foc.SaveContext(view) as context:
            for sample, vector in results(
                view,
                lambda batch: self._inputs(self._media_of(batch), [self._embedding_question()] * len(batch)),
                self._vectors,
                skip_failures=skip_failures,
                progress=progress,
                **_batching(options),
            ):
                if embeddings_field is None:
                    vectors.append(vector)
                else:
                    sample[embeddings_field] = vector
                    context.save(sample)
        if embeddings_field is not None:
            return None
        if any(vector is None for vector in vectors):
            return vectors
        return np.stack(vectors) if vectors else np.empty((0, 0), dtype=np.float32)  # type: ignore[arg-type]

    def _embedding_question(self) -> Any:
        return prompts.describe(self.media_type) if self.embedding_prompt is None else self.embedding_prompt

    def _vectors(self, inputs: Any) -> np.ndarray:
        return pooled_states(self._model, inputs, self.pooling_strategy)

    # inputs

    def _media_of(self, batch: Sequence[Any]) -> list[Any]:
        images = self.media_type == "image"
        return [sample.filepath if images else VideoPart.from_sample(sample) for sample in batch]

    def _inputs(self, args: Sequence[Any], questions: Sequence[Any]) -> Any:
        conversations = [self._conversation(arg, question) for arg, question in zip(args, questions)]
        return prepare_inputs(self._model, self._processor, conversations, self.processor_kwargs)

    def _conversation(self, arg: Any, question: Any) -> list[dict[str, Any]]:
        if self.media_type == "image":
            return user_turn(question, [Image.fromarray(arg) if isinstance(arg, np.ndarray) else arg], [])
        if not isinstance(arg, VideoPart):
            arg = VideoPart.from_reader(arg) if hasattr(arg, "inpath") else VideoPart(str(arg))
        return video_turn(question, arg.path, arg.clip())


def _batching(options: dict[str, Any]) -> dict[str, int]:
    """Sizes of batches, from the arguments of FiftyOne's calls."""
    batch_size, num_workers = options.get("batch_size"), options.get("num_workers")
    batch_size = fo.config.default_batch_size if batch_size is None else batch_size
    batch_size = 1 if batch_size is None else _positive("batch_size", batch_size)
    if num_workers is not None and num_workers != 0:
        _positive("num_workers", num_workers)
    return {"batch_size": batch_size, "num_workers": 1 if num_workers is None else num_workers}


def _add_vector_field(samples: Any, name: str) -> None:
    import fiftyone.core.fields as fof

    dataset = samples._dataset
    if not dataset.has_sample_field(name):
        dataset.add_sample_field(name, fof.VectorField)
