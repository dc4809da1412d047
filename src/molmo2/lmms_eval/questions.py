"""What the tasks share: questions and scores of `molmo2.data.evaluation` and `molmo2.evaluate`.

Videos, and images that a row only names, are looked for in the folders and JSON files of `MOLMO2_MEDIA`, separated as
in `PATH`.
"""

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from molmo2.data.evaluation import EvaluationExample, evaluation_examples
from molmo2.data.media import Resolver
from molmo2.evaluate import METRICS, Scores
from molmo2.recipes.rows import media_resolver

MEDIA_VARIABLE = "MOLMO2_MEDIA"


def example(reader: str, row: Mapping[str, Any]) -> EvaluationExample:
    """The question of a row.

    Raises:
        FileNotFoundError: Its image or video is missing: a score without it would be one of other questions.
        RecipeError, ValueError: MOLMO2_MEDIA names what is not there, or the row lacks a column.
    """
    named = os.environ.get(MEDIA_VARIABLE, "")
    examples, report = evaluation_examples(reader, [row], _resolver(named))
    if not examples:
        raise FileNotFoundError(f"{report}. Name its folder in {MEDIA_VARIABLE}; it says {named!r}.")
    return examples[0]


@functools.cache
def _resolver(named: str) -> Resolver:
    return media_resolver([entry for entry in named.split(os.pathsep) if entry], Path())


def task(reader: str) -> tuple[Callable[..., Any], Callable[..., str], Callable[..., Scores]]:
    """`doc_to_messages`, `doc_to_text` and `process_results` of a task."""

    def messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
        return example(reader, row).messages

    def text(row: Mapping[str, Any]) -> str:
        parts = messages(row)[0]["content"]
        return next(part["text"] for part in parts if part["type"] == "text")

    def results(row: Mapping[str, Any], answers: list[str]) -> Scores:
        asked = example(reader, row)
        return METRICS[asked.metric](answers[0], **asked.truth)

    return messages, text, results
