"""Wrong values in the JSON files of a checkpoint: each is taken, or refused by the name of its field."""

import json
import random
from collections.abc import Iterator
from typing import Any

from molmo2.configuration import Molmo2Config
from molmo2.image.processing import Molmo2ImageProcessor
from molmo2.processing.prompt_tokens import VisualTokenFormat
from molmo2.video.processing import Molmo2VideoProcessor
from scripts.fuzzing import REPOSITORY

FOLDER = REPOSITORY / "tests" / "data" / "published" / "Molmo2-4B"
WRONG: tuple[Any, ...] = (
    *(None, "x", "", "1", -1, 0, 1, 1.5, float("nan"), float("inf"), 10**12, -(10**30), True, False),
    *([], [1], [None], ["x", "y"], {}, {"x": 1}, [[1]], "\ud800"),
)
LIBRARY = {"_name_or_path", "architectures", "auto_map", "dtype", "model_type", "processor_class", "torch_dtype"}
LIBRARY |= {"transformers_version", "attn_implementation", "image_processor_type", "video_processor_type"}

Case = tuple[str, str, Any, dict[str, Any]]


def cases(seed: int) -> Iterator[Case]:
    """(file, field, value, content of the file with it) without end."""
    rng = random.Random(seed)
    names = ("config.json", "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
    files = {name: json.loads((FOLDER / name).read_text(encoding="utf-8")) for name in names}
    while True:
        file = rng.choice(names)
        content = json.loads(json.dumps(files[file]))
        holders = [content, *(part for part in content.values() if isinstance(part, dict) and part.keys() - LIBRARY)]
        holder = rng.choice(holders) if file == "config.json" else content
        field = rng.choice(sorted(holder.keys() - LIBRARY))
        holder[field] = value = rng.choice(WRONG)
        yield file, field, value, content


def run(case: Case) -> str:
    """Load a file: "ok" or "refused".

    Raises:
        AssertionError: It fails otherwise than by a ValueError with the name of the field.
    """
    file, field, value, content = case
    try:
        if file == "config.json":
            Molmo2Config(**content)
        elif file == "processor_config.json":
            VisualTokenFormat(**{name: content[name] for name in content if name in VisualTokenFormat.__annotations__})
        else:
            kind = Molmo2ImageProcessor if file == "preprocessor_config.json" else Molmo2VideoProcessor
            kind.from_dict(content).to_dict()
    except Exception as error:
        if not isinstance(error, ValueError) or field not in str(error):
            raise AssertionError(f"{field} = {value!r}: {type(error).__name__}: {error}") from error
        return "refused"
    return "ok"
