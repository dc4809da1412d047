#!/usr/bin/env python3
"""Runs a command in one of the environments of constraints/environments.toml, which is made or renewed before.

    scripts/environment.py app python -m app                   the environment's programs come first on the PATH
    scripts/environment.py dev@4.57.1 scripts/pytest python    the environment with another release of transformers
    scripts/environment.py --make app training                 only makes them; "all" stands for every one

Python 3.11 and pip are all it takes. An environment is renewed when its row of the table, its constraints, the
packaging section of pyproject.toml or its base have changed. Several calls may run side by side.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
CONSTRAINTS = REPOSITORY / "constraints"
FOLDER = REPOSITORY / ".venvs"


def read_toml(path: Path) -> dict:
    """The tables of a file; the reader is part of Python 3.11."""
    import tomllib

    return tomllib.loads(path.read_text(encoding="utf-8"))


def installer() -> str:
    """The release of pip that fills the environments; one with a base uses that of the base."""
    return read_toml(CONSTRAINTS / "environments.toml")["installer"]


@dataclass(frozen=True)
class Environment:
    """One virtual environment: what it holds, the one whose packages it sees besides its own, and what finishes it."""

    name: str
    folder: Path
    packages: list[str]
    constraints: list[str]
    base: Environment | None = None
    after: str | None = None

    @classmethod
    def from_table(cls, name: str) -> Environment:
        """The environment of a row, "NAME" or "NAME@RELEASE"; ValueError where there is no such row or release."""
        table = read_toml(CONSTRAINTS / "environments.toml")
        rows, main = table["environments"], table["transformers"]["main"]
        row_name, _, release = name.partition("@")
        if row_name not in rows or release not in ["", main, *table["transformers"]["others"]]:
            releases = ", ".join([*table["transformers"]["others"], main])
            raise ValueError(
                f"There is no environment '{name}'. There are {', '.join(rows)}, and NAME@ of {releases}."
            )
        row = rows[row_name]
        if release in ("", main):
            folder = REPOSITORY / row.get("folder", FOLDER / row_name)
            base = cls.from_table(row["base"]) if "base" in row else None
            return cls(row_name, folder, row["packages"], row["constraints"], base, row.get("after"))
        packages = [*(row["packages"] if "base" in row else []), f"transformers=={release}"]
        return cls(name, FOLDER / name, packages, row["constraints"], cls.from_table(row.get("base", row_name)))

    @property
    def python(self) -> Path:
        """The interpreter of the environment."""
        return self.folder / "bin" / "python"

    @property
    def site_packages(self) -> str:
        """The folder that pip installs into."""
        script = "import sysconfig; print(sysconfig.get_path('purelib'), end='')"
        return subprocess.check_output([self.python, "-c", script], text=True)

    def fingerprint(self) -> str:
        """Changes with everything that decides what is installed."""
        project = read_toml(REPOSITORY / "pyproject.toml")
        parts = [sys.version, self.packages, project["build-system"], project["project"], project["tool"]["hatch"]]
        parts += [(CONSTRAINTS / f"{name}.txt").read_text(encoding="utf-8") for name in self.constraints]
        parts += [(REPOSITORY / name).read_text(encoding="utf-8") for name in self.packages if name.endswith(".txt")]
        parts += [(REPOSITORY / self.after).read_text(encoding="utf-8")] if self.after else []
        parts += [self.base.fingerprint()] if self.base else [installer()]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def ensure(self) -> None:
        """Make the environment, or bring it up to date."""
        if self.base:
            self.base.ensure()
        with self._lock():
            ready, fingerprint = self.folder / ".ready", self.fingerprint()
            if not ready.exists() or ready.read_text() != fingerprint:
                print(f"environment {self.name}: installing", *self.packages, file=sys.stderr, flush=True)
                ready.unlink(missing_ok=True)
                self._install()
                ready.write_text(fingerprint)

    def _install(self) -> None:
        if self.base:  # anew, because what an older table installed would hide the packages of the base
            shutil.rmtree(self.folder, ignore_errors=True)
        venv = [self.base.python if self.base else sys.executable, "-m", "venv", self.folder]
        subprocess.run([*venv, *(["--without-pip"] if self.base else [])], check=True)  # pip is that of the base
        if self.base:
            path_file = Path(self.site_packages) / "base.pth"
            path_file.write_text(f"import site; site.addsitedir({self.base.site_packages!r})\n")
        options = [option for name in self.constraints for option in ("-c", CONSTRAINTS / f"{name}.txt")]
        # Python compiles what is imported, which is a small part of what is installed.
        pip = [self.python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-compile"]
        if not self.base:
            subprocess.run([*pip, installer()], check=True)
        subprocess.run([*pip, *options, *self.packages], check=True, cwd=REPOSITORY)
        if self.after:
            subprocess.run([self.python, REPOSITORY / self.after], check=True)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        FOLDER.mkdir(exist_ok=True)
        with (FOLDER / f"{self.name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def variables(self) -> dict[str, str]:
        """Variables of a process that runs in the environment, as its `activate` would set them.

        Bytecode is kept in any case: what was installed is not compiled, nor are the sources and tests.
        """
        path = os.pathsep.join([str(self.folder / "bin"), os.environ.get("PATH", os.defpath)])
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        return {**kept, "PATH": path, "VIRTUAL_ENV": str(self.folder)}


def main(arguments: list[str]) -> int | str | None:
    """What `sys.exit` takes; a command replaces this process."""
    if sys.version_info < (3, 11):
        found = ".".join(map(str, sys.version_info[:2]))
        return f"Python 3.11 or newer is needed, this is {found}. Name another one: make PYTHON=/path/to/python3.11"
    names, command = (arguments[1:], None) if arguments[:1] == ["--make"] else (arguments[:1], arguments[1:])
    if not names or command == []:
        return __doc__
    if names == ["all"]:
        table = read_toml(CONSTRAINTS / "environments.toml")
        names = [*(f"dev@{release}" for release in table["transformers"]["others"]), *table["environments"]]
    try:
        environments = [Environment.from_table(name) for name in names]
        for environment in environments:
            environment.ensure()
    except ValueError as error:
        return str(error)
    except subprocess.CalledProcessError as error:
        return error.returncode
    if command:
        os.execvpe(command[0], command, environments[0].variables())
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
