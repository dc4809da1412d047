"""`ask`, `ask_stream` and sessions against a server: vLLM, `transformers serve`, or any OpenAI endpoint.

    client = Client("http://127.0.0.1:8000/v1")
    answer = client.ask("Point to the boats.", images="boats.jpg")
    answer.grounding.points                     # in pixels, as from `molmo2.ask`
    for piece in client.ask_stream("What happens?", videos="clip.mp4"): ...

The client measures images and reads the times of a video's frames itself, so that answers come back in pixels and
source frames. No model is loaded here.
"""

import importlib
from typing import TYPE_CHECKING, Any

from molmo2.client.http import DeadlineExceeded, ServerError, ServerUnreachable

if TYPE_CHECKING:
    from molmo2.client.client import Client, ClientSession, api_key

__all__ = ["Client", "ClientSession", "DeadlineExceeded", "ServerError", "ServerUnreachable", "api_key"]


def __getattr__(name: str) -> Any:
    """The client itself is imported when it is used: it takes torch along, which errors do not need."""
    if name not in __all__:
        raise AttributeError(f"module 'molmo2.client' has no attribute '{name}'")
    return getattr(importlib.import_module("molmo2.client.client"), name)
