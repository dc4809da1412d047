"""Start the app: python -m app [--model FOLDER]

Without a model it uses the miniature of this repository.
"""

import argparse
import os
import tempfile
from pathlib import Path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m app", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="checkpoint folder for transformers; default: the miniature")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (%(default)s, the loopback interface)"
    )
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (%(default)s)")
    parser.add_argument("--num-frames", type=int, default=32, help="maximum number of frames of a video (%(default)s)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=512, help="maximum number of tokens of an answer (%(default)s)"
    )
    given = parser.parse_args()
    if given.model is not None and not (given.model / "config.json").is_file():
        parser.error(
            f"'{given.model}' has no config.json. Pass a checkpoint folder for transformers; `molmo2-convert` makes "
            "one from a training checkpoint."
        )
    return given


def main() -> None:
    given = arguments()
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    from .models import load_backend  # after the arguments: importing torch takes seconds
    from .page import Page, launch

    with tempfile.TemporaryDirectory(prefix="molmo2_app_") as scratch:
        options = {"num_frames": given.num_frames, "max_new_tokens": given.max_new_tokens}
        backend = load_backend(given.model, Path(scratch), **options)
        launch(Page(backend), given.host, given.port)


if __name__ == "__main__":
    main()
