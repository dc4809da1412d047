"""Answers of a model to the questions of an evaluation set, and their scores."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from molmo2.data.evaluation import EvaluationExample
from molmo2.evaluate import METRICS, Estimate, Interval, Scores, summarize


class EvaluationError(ValueError):
    """A row of an evaluation set cannot be asked about; the message names it."""


@dataclass(frozen=True)
class Scored:
    """An answer and its scores.

    Attributes:
        row: Index of the row in its set.
    """

    row: int
    answer: str
    scores: Scores
    groups: dict[str, str]


def answer_conversations(
    model: Any, processor: Any, conversations: Sequence[Any], processor_kwargs: dict[str, Any], **generate_options: Any
) -> list[str]:
    """The answers to conversations in one call of `generate`, as text without blanks around it."""
    return _answers(model, processor, _prompts(processor, conversations, processor_kwargs), **generate_options)


def _prompts(processor: Any, conversations: Sequence[Any], processor_kwargs: dict[str, Any]) -> Any:
    return processor.apply_chat_template(
        conversations,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        **processor_kwargs,
    )


def _answers(model: Any, processor: Any, inputs: Any, **generate_options: Any) -> list[str]:
    inputs = inputs.to(model.device)
    with torch.no_grad():
        ids = model.generate(**inputs, **generate_options)
    texts = processor.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def answer_examples(
    model: Any,
    processor: Any,
    examples: Iterable[EvaluationExample],
    *,
    max_new_tokens: int | None = None,
    processor_kwargs: dict[str, Any] | None = None,
    **generate_options: Any,
) -> Iterator[Scored]:
    """Answers of greedy decoding, one question at a time, with their scores.

    Args:
        max_new_tokens: Of an answer; None for that of the published evaluation.
        processor_kwargs: Options of the processor; those of a question, such as its frame rate, come before them.
        generate_options: Further options of `generate`.
    Raises:
        EvaluationError: A question makes no prompt: its image cannot be decoded, ... The message names the row.
    """
    was_training = model.training
    model.eval()
    try:
        for example in examples:
            options = {"do_sample": False, "max_new_tokens": max_new_tokens or example.max_new_tokens}
            try:
                inputs = _prompts(processor, [example.messages], processor_kwargs or {})
            except MemoryError:
                raise
            except Exception as error:  # decoders raise nearly anything
                raise EvaluationError(f"row {example.row}: {str(error) or repr(error)}") from error
            (answer,) = _answers(model, processor, inputs, **options, **generate_options)
            yield Scored(example.row, answer, METRICS[example.metric](answer, **example.truth), example.groups)
    finally:
        model.train(was_training)


def score(
    scored: Sequence[Scored], interval: Interval | None = None
) -> tuple[dict[str, Estimate], dict[str, dict[str, dict[str, Estimate]]]]:
    """Means with intervals over all answers, and over those of each group: `scores, groups["category"]["animal"]`.

    Raises:
        ValueError: There are no answers.
    """
    if not scored:
        raise ValueError("There are no answers to score: all rows were left out, or there are none.")
    overall = summarize([each.scores for each in scored], interval=interval)
    by_group = {}
    for name in sorted({name for each in scored for name in each.groups}):
        members = [each for each in scored if name in each.groups]
        names = [each.groups[name] for each in members]
        by_group[name] = summarize([each.scores for each in members], names, interval)
    return overall, by_group
