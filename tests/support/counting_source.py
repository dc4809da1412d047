"""A table that notes which processes read it; importable where Ray's own processes read."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from molmo2.batch.rows import Chunk, JsonLinesSource, Row


@dataclass(frozen=True)
class CountingSource(JsonLinesSource):
    """Attributes:
    log: Gets the number of the process, a line for each chunk.
    """

    log: Path = Path()

    def read(self, chunk: Chunk) -> Iterator[Row]:
        with self.log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.05)  # long enough that another reader would be started, if it might
        return super().read(chunk)
