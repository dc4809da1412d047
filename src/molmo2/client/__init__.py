"""`ask`, `ask_stream` and sessions against a server: vLLM, `transformers serve`, or any OpenAI endpoint.

    client = Client("http://127.0.0.1:8000/v1")
    answer = client.ask("Point to the boats.", images="boats.jpg")
    answer.grounding.points                     # in pixels, as from `molmo2.ask`
    for piece in client.ask_stream("What happens?", videos="clip.mp4"): ...

The client measures images and reads the times of a video's frames itself, so that answers come back in pixels and
source frames. No model is loaded here.
"""

from molmo2.client.client import Client, ClientSession, api_key
from molmo2.client.http import DeadlineExceeded, ServerError, ServerUnreachable

__all__ = ["Client", "ClientSession", "DeadlineExceeded", "ServerError", "ServerUnreachable", "api_key"]
