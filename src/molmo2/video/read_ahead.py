"""An iterator that runs ahead of its reader, in a thread of its own."""

from collections.abc import Iterator
from queue import Full, Queue
from threading import Event, Thread
from typing import Any, TypeVar

Item = TypeVar("Item")

WAIT_SECONDS = 0.1  # between looks at whether the reader has left


def read_ahead(items: Iterator[Item], count: int) -> Iterator[Item]:
    """The same items, of which up to `count` are made while earlier ones are in use.

    What `items` raises is raised here, after the items before it. A reader that leaves early stops the thread, which
    is waited for: whatever the items come from may then be closed.
    """
    made: Queue[tuple[bool, Any]] = Queue(maxsize=count)
    reader_left = Event()

    def hand_over(is_item: bool, value: Any) -> None:
        while not reader_left.is_set():
            try:
                made.put((is_item, value), timeout=WAIT_SECONDS)
            except Full:
                continue
            return

    def make() -> None:
        try:
            for item in items:
                hand_over(True, item)
                if reader_left.is_set():
                    return
        except BaseException as error:  # the reader's to handle, whatever it is
            hand_over(False, error)
        else:
            hand_over(False, None)

    thread = Thread(target=make, name="molmo2-read-ahead", daemon=True)
    thread.start()
    try:
        is_item, value = made.get()
        while is_item:
            yield value
            is_item, value = made.get()
        if value is not None:
            raise value
    finally:
        reader_left.set()
        thread.join()
