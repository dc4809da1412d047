"""Uploads, which are deleted as soon as no visitor's page shows them."""

import filecmp
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock


class Uploads:
    """The uploaded files of each session.

    gradio stores a file by its content: what two visitors upload may be one file, which is deleted with the last of
    them. One that was uploaded anew since a page opened it is left to the page that is about to.

    Args:
        samples: The files of the page's examples; copies of them stay.
        folder: Says where gradio stores uploads; nothing else is ever deleted.
    """

    def __init__(self, samples: Iterable[Path], folder: Callable[[], str]):
        self._samples, self._folder = tuple(samples), folder
        self._of_session: dict[str, frozenset[Path]] = {}
        self._opened: dict[Path, tuple[int, int] | None] = {}  # which file it was that a page opened last
        self._opening: dict[str, bool] = {}  # sessions whose page opens files, and whether it has been left since
        self._lock = Lock()

    @contextmanager
    def opening(self, session: str) -> Iterator[None]:
        """While a page opens files. If it is left meanwhile, what it then keeps is deleted at once."""
        with self._lock:
            self._opening[session] = False
        try:
            yield
        finally:
            with self._lock:
                self._opening.pop(session, None)

    def leave(self, session: str) -> None:
        """Delete the uploads of a session, whose page is gone."""
        with self._lock:
            if session in self._opening:
                self._opening[session] = True
        self.keep(session, [])

    def keep(self, session: str, paths: Iterable[str]) -> None:
        """Keep these uploads for a session, and delete its others."""
        folder = Path(self._folder()).resolve()
        kept = frozenset(path for path in map(Path, paths) if path.resolve().is_relative_to(folder))
        with self._lock:
            self._opened.update((path, _identity(path)) for path in kept)
            left = self._of_session.pop(session, frozenset()) - kept
            if self._opening.get(session):
                left |= kept
            elif kept:
                self._of_session[session] = kept
            for path in left - frozenset().union(*self._of_session.values()):
                is_same = self._opened.pop(path, None) == _identity(path)
                if is_same and not any(path.name == sample.name and _same(path, sample) for sample in self._samples):
                    with suppress(OSError):
                        path.unlink()


def _identity(path: Path) -> tuple[int, int] | None:
    """What changes when a file is uploaded again; None for no file."""
    with suppress(OSError):
        status = path.stat()
        return status.st_ino, status.st_mtime_ns
    return None


def _same(path: Path, sample: Path) -> bool:
    with suppress(OSError):
        return filecmp.cmp(path, sample, shallow=False)
    return False
