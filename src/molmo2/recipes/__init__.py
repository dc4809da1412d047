"""Training and scoring from files: a recipe in, a trained model and its scores out.

    recipe = read_recipe("points.yaml")
    train(recipe)

On the command line `molmo2 train points.yaml` and `molmo2 eval`. What a recipe says and does not say is made of
`molmo2.data` and `molmo2.training`, which serve loops of your own as well.
"""

import importlib
from typing import TYPE_CHECKING, Any

from molmo2.recipes.recipe import DataSet, Evaluation, Lora, Recipe, RecipeError, read_recipe

if TYPE_CHECKING:
    from molmo2.recipes.run import first_examples, train
    from molmo2.recipes.scoring import answer_examples, score

_HOMES = {"answer_examples": "scoring", "first_examples": "run", "score": "scoring", "train": "run"}

__all__ = [
    "DataSet",
    "Evaluation",
    "Lora",
    "Recipe",
    "RecipeError",
    "answer_examples",
    "first_examples",
    "read_recipe",
    "score",
    "train",
]


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'molmo2.recipes' has no attribute '{name}'")
    return getattr(importlib.import_module(f"molmo2.recipes.{_HOMES[name]}"), name)
