"""Records what the installed transformers saves, for the tests of reading it under other releases.

    python tests/record_saved.py

Writes tests/data/saved_by_<release>: the JSON files of a tiny checkpoint that was loaded and saved again, without the
vocabulary and the chat template, which are the same everywhere.
"""

import json
import shutil
import tempfile
from pathlib import Path

import transformers

from support.checkpoints import DATA, read_json, write_checkpoint
from support.fresh_process import run

VOCABULARY = {"tokenizer.json", "vocab.json", "added_tokens.json", "model.safetensors.index.json"}


def record(target: Path) -> None:
    """Load and save in a new interpreter; keep the small JSON files."""
    with tempfile.TemporaryDirectory() as parent:
        folder, cache, saved = (Path(parent) / name for name in ("tiny", "cache", "saved"))
        cache.mkdir()
        run("save_all", cache, folder=write_checkpoint(folder, "olmo3"), target=saved)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for path in sorted(saved.glob("*.json")):
            if path.name not in VOCABULARY:
                content = read_json(path)
                content.pop("chat_template", None)
                text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
                (target / path.name).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    record(DATA / f"saved_by_{transformers.__version__}")
