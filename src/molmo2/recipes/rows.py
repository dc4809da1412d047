"""Rows of data sets from files, and where their media are."""

import glob
import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from molmo2.data import Folder, UrlMapping, first_of, urls
from molmo2.data.media import MediaReference, Resolver
from molmo2.image.loading import fetch_images
from molmo2.recipes.recipe import RecipeError

TABLES = {".parquet": "from_parquet", ".arrow": "from_file"}
LINES = (".jsonl", ".json")


def read_rows(patterns: Iterable[str], folder: Path) -> Sequence[Any]:
    """The rows of all files, in order of the patterns, and of the names that each of them finds.

    Args:
        patterns: Files or patterns, relative to `folder`. JSON holds a list; JSON lines hold a row each; Parquet and
            Arrow are read by `datasets`, which maps them into memory.
    Raises:
        RecipeError: There is no such file, it is of another kind, cannot be read, or kinds are mixed.
    """
    paths = [path for pattern in patterns for path in _files(pattern, folder)]
    suffixes = {path.suffix.lower() for path in paths}
    if suffixes <= set(LINES):
        return [row for path in paths for row in _json_rows(path)]
    if suffixes <= set(TABLES):
        return _table_rows(paths)
    raise RecipeError(
        f"files end with {', '.join(sorted(suffixes))}; expected {' and '.join(LINES)}, or {' and '.join(TABLES)}"
    )


def _files(pattern: str, folder: Path) -> list[Path]:
    found = sorted(glob.glob(str(Path(pattern).expanduser()), root_dir=folder, recursive=True))
    if not found:
        raise RecipeError(f"there is no file {pattern!r} in '{folder}'")
    return [folder / name for name in found]


def _json_rows(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            rows = (
                [json.loads(line) for line in file if line.strip()]
                if path.suffix.lower() == ".jsonl"
                else json.load(file)
            )
    except (OSError, ValueError) as error:
        raise RecipeError(f"'{path}' cannot be read: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RecipeError(f"'{path}' holds something else than rows; expected a list of mappings, or one on each line")
    return rows


def _table_rows(paths: Sequence[Path]) -> Any:
    if importlib.util.find_spec("datasets") is None:
        raise RecipeError(f"'{paths[0]}' is read by `datasets`, which is not installed: pip install datasets")
    from datasets import Dataset, concatenate_datasets
    from datasets.exceptions import DatasetsError

    try:
        return concatenate_datasets([getattr(Dataset, TABLES[path.suffix.lower()])(str(path)) for path in paths])
    except (OSError, ValueError, DatasetsError) as error:
        raise RecipeError(f"'{paths[0]}' cannot be read: {error}") from error


def media_resolver(entries: Iterable[str], folder: Path, *, cut_clips: bool = False) -> Resolver:
    """Folders, and JSON files from names to URLs, asked one after the other; URLs themselves last. Masks are opened.

    Raises:
        RecipeError: There is no such folder or file.
    """
    resolvers: list[Resolver] = []
    for entry in entries:
        path = folder / Path(entry).expanduser()
        if path.is_dir():
            resolvers.append(Folder(path, has_cut_clips=cut_clips))
        elif path.is_file():
            resolvers.append(UrlMapping(path))
        else:
            raise RecipeError(f"media has {entry!r}, which is neither a folder nor a file in '{folder}'")
    found = first_of(*resolvers) if cut_clips else first_of(*resolvers, urls)

    def resolve(reference: MediaReference) -> Any:
        source = found(reference)
        return fetch_images(source) if reference.kind == "mask" and source is not None else source

    resolve.has_cut_clips = cut_clips  # type: ignore[attr-defined]
    return resolve
