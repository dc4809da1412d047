"""Start the app: python -m app [--model FOLDER | --server URL]

Without a model or a server it uses the miniature of this repository.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

from . import MAX_FRAMES
from .hosts import host_name


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m app", description=__doc__.partition("\n")[0])
    answering = parser.add_mutually_exclusive_group()
    answering.add_argument("--model", type=Path, help="checkpoint folder for transformers; default: the miniature")
    answering.add_argument(
        "--server",
        metavar="URL",
        help="ask a server, as http://127.0.0.1:8000/v1, with the key of MOLMO2_API_KEY",
    )
    parser.add_argument("--server-model", metavar="NAME", help="name of the model there; default: the only one")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (%(default)s, the loopback interface)"
    )
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (%(default)s)")
    parser.add_argument("--num-frames", type=int, help="maximum number of frames of a video (32)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=512, help="maximum number of tokens of an answer (%(default)s)"
    )
    parser.add_argument(
        "--max-seconds", type=float, default=300, help="longest time of an answer, in seconds (%(default)s)"
    )
    parser.add_argument(
        "--login", type=Path, help="file with a line `user:password` for each user; default: everybody is let in"
    )
    parser.add_argument(
        "--allow-host", metavar="NAME", action="append", default=[], help="another name that browsers know it by"
    )
    parser.add_argument(
        "--share", action="store_true", help="also serve it at a public address, through a server of gradio's"
    )
    given = parser.parse_args()
    if given.server_model is not None and given.server is None:
        parser.error("--server-model needs --server")
    if given.num_frames is not None and not 1 <= given.num_frames <= MAX_FRAMES:
        parser.error(f"--num-frames: {given.num_frames} is not a whole number from 1 to {MAX_FRAMES}")
    for name in given.allow_host:
        if "/" in name or not host_name(name):
            parser.error(f"--allow-host: '{name}' is not a host name. Pass it without http:// and path: example.com")
    try:
        given.logins = [] if given.login is None else read_logins(given.login)
    except (OSError, ValueError) as error:
        parser.error(f"--login: {error}")
    if given.model is not None and not (given.model / "config.json").is_file():
        parser.error(
            f"'{given.model}' has no config.json. Pass a checkpoint folder for transformers; `molmo2-convert` makes "
            "one from a training checkpoint."
        )
    return given


def read_logins(path: Path) -> list[tuple[str, str]]:
    """Users and passwords of a file with a line `user:password` for each.

    Raises:
        OSError, ValueError: It cannot be read, holds none, or a line is of another form.
    """
    lines = [line.strip().partition(":") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, (user, _, password) in enumerate(lines, start=1):
        if not (user and password):
            raise ValueError(f"entry {number} of '{path}' is not of the form user:password")
    if not lines:
        raise ValueError(f"'{path}' holds no line user:password")
    return [(user, password) for user, _, password in lines]


def main() -> None:
    given = arguments()
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    if importlib.util.find_spec("gradio") is None:
        sys.exit("The demo page needs gradio: pip install gradio, or `make app` in the repository.")
    from .models import load_backend, server_backend  # after the arguments: importing torch takes seconds
    from .page import Page, launch

    with tempfile.TemporaryDirectory(prefix="molmo2_app_") as scratch:
        names = ("num_frames", "max_new_tokens", "max_seconds")
        options = {name: value for name in names if (value := getattr(given, name)) is not None}
        if given.server is None:
            backend = load_backend(given.model, Path(scratch), **options)
        else:
            try:
                backend = server_backend(given.server, given.server_model, **options)
            except (ConnectionError, ValueError) as error:
                sys.exit(f"--server: {error}")
        launch(Page(backend), given.host, given.port, logins=given.logins, hosts=given.allow_host, share=given.share)


if __name__ == "__main__":
    main()
