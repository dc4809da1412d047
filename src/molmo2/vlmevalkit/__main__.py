"""VLMEvalKit's runner with the model of this package: --model_args as for lmms-eval, all else is its own."""

import argparse
import sys
from typing import Any

import yaml

from molmo2.vlmevalkit import NAME, register

TEXTS = frozenset({"pretrained", "system_prompt"})  # even where they look like numbers


def main(arguments: list[str]) -> None:
    """Register the model and start the runner with the arguments that are its own."""
    parser = argparse.ArgumentParser(prog="python -m molmo2.vlmevalkit", allow_abbrev=False, add_help=False)
    parser.add_argument("--model_args", required=True, help="pretrained=FOLDER,max_crops=24,...")
    parser.add_argument("--model", default=NAME, help="the name of the results")
    own, rest = parser.parse_known_args(arguments)
    try:
        options = {
            name: _value(name, text) for name, text in (pair.split("=", 1) for pair in own.model_args.split(","))
        }
    except ValueError:
        parser.error(f"--model_args is {own.model_args!r}; expected pairs such as pretrained=FOLDER,max_crops=24")
    if "pretrained" not in options:
        parser.error(f"--model_args is {own.model_args!r}; expected a folder or repository as pretrained=")
    register(own.model, **options)
    from vlmeval import run

    has_config = any(word.partition("=")[0] == "--config" for word in rest)
    named = [] if has_config else ["--model", own.model]  # a file names the model itself
    sys.argv = ["vlmeval", *named, *rest]
    run.main()


def _value(name: str, text: str) -> Any:
    """A number, true, false or null where the text is one; names and prompts stay as they are."""
    if name in TEXTS:
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if value is None or isinstance(value, (bool, int, float)) else text


if __name__ == "__main__":
    main(sys.argv[1:])
