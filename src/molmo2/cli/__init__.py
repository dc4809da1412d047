"""The command `molmo2`: asking, pointing, counting, tracking, batches, servers. It needs click: the extra `cli`."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence

WRONG_ARGUMENTS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; see `molmo2 --help`."""
    if importlib.util.find_spec("click") is None:
        print(
            "error: the command molmo2 needs the package click, which is not installed. Install it with "
            "`pip install 'molmo2-transformers[cli]'` (or `pip install click`). "
            "`molmo2-convert` and `python -m molmo2.convert` work without it.",
            file=sys.stderr,
        )
        return WRONG_ARGUMENTS
    return int(importlib.import_module("molmo2.cli.commands").run(arguments))
