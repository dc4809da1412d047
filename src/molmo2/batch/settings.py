"""What an engine needs to know, in a form that travels to other processes and machines."""

from dataclasses import asdict, dataclass, field
from typing import Any


class EngineError(RuntimeError):
    """No row can be answered: the model cannot be loaded, or the server cannot be reached."""


@dataclass(frozen=True)
class EngineSettings:
    """The model or server that answers, and how.

    Attributes:
        model: A checkpoint folder or repository; with `server` the name of its model, or None for its only one.
        server: The URL of an OpenAI endpoint; None for a model in the worker.
        device, dtype: Of the model; "auto" spreads workers over the GPUs, or takes the CPU.
        batch_size: Rows in one pass of the model; of a server, the requests at a time.
        window: Rows that a worker holds and sorts by length.
        processor_kwargs, generate_options: As for `molmo2.ask`.
        timeout: Seconds that a server may take for one row.
    """

    model: str | None = None
    server: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int = 8
    window: int = 32
    processor_kwargs: dict[str, Any] = field(default_factory=dict)
    generate_options: dict[str, Any] = field(default_factory=dict)
    timeout: float = 600.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `EngineSettings(**values)` reads it."""
        return asdict(self)
