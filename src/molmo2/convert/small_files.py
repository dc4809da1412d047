"""Small files of strangers, read whole: no more than a limit, and YAML that cannot grow when it is read.

`a: &a [x, x]`, `b: &b [*a, *a]`, ... doubles with every line. Names for repeated parts are allowed, but each counts as
often as it is used.
"""

import json
import os
from pathlib import Path
from typing import Any

import yaml

from molmo2.convert.errors import CheckpointError, shown

MAX_YAML_BYTES = 1_000_000  # bytes; a config.yaml has 50,000
MAX_NODES = 100_000
MAX_DEPTH = 50
MAX_SCALAR_CHARACTERS = 100_000  # characters
MAX_JSON_BYTES = 16_000_000  # bytes; the index of 1,000 tensors has 100,000
INTEGER_BITS = 64


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a file.

    Raises:
        CheckpointError: If it is no regular file, or has more than `limit` bytes.
        OSError: If it cannot be read.
    """
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is not a regular file.")
    with open(path, "rb") as file:
        is_larger = os.fstat(file.fileno()).st_size > limit
        content = b"" if is_larger else file.read(limit + 1)
    if is_larger or len(content) > limit:  # it may have grown meanwhile
        raise CheckpointError(f"{path} has more than {limit:,} bytes, which no such file needs.")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: If the file is missing, damaged, too large, or holds something else.
    """
    try:
        return parse_json(read_bytes(path, MAX_JSON_BYTES), str(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; expected a converted folder.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def parse_json(data: bytes, label: str) -> dict[str, Any]:
    """The object in a JSON text; see `read_json`."""
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{label} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{label} holds {shown(content)}; expected an object.")
    return content


class _Loader(yaml.SafeLoader):
    """The safe loader with limits."""

    def __init__(self, stream: Any):
        super().__init__(stream)
        self._depth = self._count = 0
        self._weights: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node; its weight is the number of nodes in it, counted as often as they appear."""
        event, before = self.peek_event(), self._count
        self._depth += 1
        self._count += 1
        if self._depth > MAX_DEPTH:
            raise self._refusal(f"sections are nested more than {MAX_DEPTH} deep", event)
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._weights:
                raise self._refusal("a section contains itself", event)
            self._count += self._weights[id(node)]
        else:
            self._weights[id(node)] = self._count - before
        if self._count > MAX_NODES:
            raise self._refusal(f"more than {MAX_NODES:,} values, repeated ones included", event)
        self._depth -= 1
        return node

    def construct_scalar(self, node: Any) -> Any:
        if isinstance(node, yaml.ScalarNode) and len(node.value) > MAX_SCALAR_CHARACTERS:
            raise self._refusal(f"a value of {len(node.value):,} characters", node)
        return super().construct_scalar(node)

    def construct_yaml_int(self, node: Any) -> int:
        value = 0 if len(node.value) > 2 * INTEGER_BITS else super().construct_yaml_int(node)
        if len(node.value) > 2 * INTEGER_BITS or value.bit_length() > INTEGER_BITS:
            raise self._refusal(f"an integer of {len(node.value):,} characters", node)
        return value

    @staticmethod
    def _refusal(problem: str, place: Any) -> yaml.YAMLError:
        return yaml.constructor.ConstructorError(None, None, problem, place.start_mark)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read_model_section(path: Path) -> dict[str, Any]:
    """The section `model` of a native `config.yaml`, as plain data.

    Raises:
        CheckpointError: If the file is too large, is no YAML, or has no such section.
        OSError: If it cannot be read.
    """
    data = read_bytes(path, MAX_YAML_BYTES)
    try:
        config = yaml.load(data.decode("utf-8"), _Loader)
    except Exception as error:  # impossible dates and the like make its constructors raise anything
        raise CheckpointError(f"{path} is not readable YAML: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        found = shown(sorted(map(str, config))) if isinstance(config, dict) else shown(config)
        raise CheckpointError(f"{path} has no section `model`, which describes the network; found {found}.")
    return config["model"]
