"""Deadlines for calls into libraries with none, or only one for each read: a server may send a byte a minute."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


class DeadlineExceeded(TimeoutError):
    """A call did not end in time; its thread is left behind, and ends with the process."""


def within_deadline(call: Callable[[], Result], seconds: float, failure: str) -> Result:
    """The result of `call`, or its exception.

    Args:
        call: Runs in a thread of its own, which nothing can stop.
        failure: Start of the message, such as "The server did not answer".
    Raises:
        DeadlineExceeded: If it takes longer than `seconds`.
    """
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = call()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise DeadlineExceeded(f"{failure} within {seconds:g} seconds")
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]
