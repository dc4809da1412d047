"""VLMEvalKit's runner with the model of this package: --model_args as for lmms-eval, all else is its own."""

import argparse
import sys

import yaml

from molmo2.vlmevalkit import NAME, register


def main(arguments: list[str]) -> None:
    """Register the model and start the runner with the arguments that are its own."""
    parser = argparse.ArgumentParser(prog="python -m molmo2.vlmevalkit", allow_abbrev=False, add_help=False)
    parser.add_argument("--model_args", required=True, help="pretrained=FOLDER,max_crops=24,...")
    parser.add_argument("--model", default=NAME, help="the name of the results")
    own, rest = parser.parse_known_args(arguments)
    try:
        options = dict(pair.split("=", 1) for pair in own.model_args.split(","))
    except ValueError:
        parser.error(f"--model_args is {own.model_args!r}; expected pairs such as pretrained=FOLDER,max_crops=24")
    if "pretrained" not in options:
        parser.error(f"--model_args is {own.model_args!r}; expected a folder or repository as pretrained=")
    register(own.model, **{name: yaml.safe_load(value) for name, value in options.items()})
    from vlmeval import run

    named = [] if "--config" in rest else ["--model", own.model]  # a file names the model itself
    sys.argv = ["vlmeval", *named, *rest]
    run.main()


if __name__ == "__main__":
    main(sys.argv[1:])
