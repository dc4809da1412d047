#!/usr/bin/env python3
"""Runs transformers' own common tests on this package: scripts/common_tests.py PYTHON [pytest options]

The suites are those of the transformers release that PYTHON has. They come from its source distribution, because no
wheel holds them, and are kept in .venvs/common_tests; tests/hf_common binds them to the classes of this package. The
source distribution has the suites but not the folders below them: mixins from there (generation, exporters) are
replaced by empty ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDER = REPOSITORY / ".venvs" / "common_tests"

# What the suites import from parts of transformers' repository that are not in the source distribution.
STAND_INS = {
    "tests/__init__.py": "",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/utils/__init__.py": "",
    "tests/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "utils/fetch_hub_objects_for_ci.py": "def url_to_local_path(url, *args, **kwargs):\n    return url\n",
}


def is_suite(name: str) -> bool:
    """True for transformers-X/tests/test_*.py."""
    parts = PurePosixPath(name).parts
    return len(parts) == 3 and parts[1] == "tests" and parts[2].startswith("test_") and parts[2].endswith(".py")


def fetch(python: str, release: str) -> Path:
    """The folder with the suites of a release, downloaded at the first call."""
    folder = FOLDER / release
    if (folder / ".ready").exists():
        return folder
    with tempfile.TemporaryDirectory() as download:
        command = [python, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", ":all:", "--no-build-isolation", "-d", download, f"transformers=={release}"]
        subprocess.run(command, check=True)
        (archive,) = Path(download).glob("*.tar.gz")
        with tarfile.open(archive) as source:
            for member in source.getmembers():
                content = source.extractfile(member) if member.isfile() and is_suite(member.name) else None
                if content is not None:
                    target = folder / "tests" / PurePosixPath(member.name).name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(content.read())
    for name, text in STAND_INS.items():
        path = folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    (folder / ".ready").touch()
    return folder


def main(arguments: list[str]) -> int | str:
    """What `sys.exit` takes."""
    if not arguments:
        return str(__doc__)
    python, *options = arguments
    ask = "from importlib.metadata import version; print(version('transformers'), end='')"
    release = subprocess.check_output([python, "-c", ask], text=True)
    variables = {**os.environ, "MOLMO2_COMMON_TESTS": str(fetch(python, release))}
    variables.pop("MOLMO2_STRICT", None)  # the suites skip what a model has not
    own_markers = ["-o", "addopts=-ra"]  # the suites have some that are not declared
    command = [str(REPOSITORY / "scripts" / "pytest"), python, "-q", *own_markers, "tests/hf_common", *options]
    return subprocess.run(command, env=variables, cwd=REPOSITORY).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
