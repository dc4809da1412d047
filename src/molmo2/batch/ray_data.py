"""An engine for clusters: Ray Data streams chunks of the source through actors, each with a worker of its own.

Actors see the source and the media under the same paths as the driver. Ray restarts actors of lost machines and asks
their rows again; a row that kills a worker costs that row, as in `pool`, and never an actor.
"""

import importlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from molmo2.batch.pool import WORKER, WorkerPool
from molmo2.batch.rows import Chunk, Row, Source
from molmo2.batch.run import Remaining
from molmo2.batch.settings import EngineError, EngineSettings

MAX_READERS = 4  # processes that read rows, which is far quicker than answering them


class RayEngine:
    """Rows over a cluster; a local one is started where none is there (`ray.init`, RAY_ADDRESS).

    Args:
        workers: (minimum, maximum) of actors; Ray adds some while rows wait, and takes them away again.
        workers_per_gpu: Actors that share a GPU, each with a model of its own: for videos that take longer to decode
            than to answer.
        row_seconds, command: As of `WorkerPool`.
    Raises:
        EngineError: Ray is not installed.
    """

    def __init__(
        self,
        settings: EngineSettings,
        workers: tuple[int, int],
        *,
        row_seconds: float = 1800.0,
        command: Sequence[str] = WORKER,
        workers_per_gpu: int = 1,
    ):
        if workers_per_gpu < 1:
            raise ValueError(f"`workers_per_gpu` is {workers_per_gpu}, but at least one worker has to use a GPU.")
        try:
            self._ray, self._data = importlib.import_module("ray"), importlib.import_module("ray.data")
        except ImportError as error:
            message = "The engine ray needs Ray Data: pip install 'molmo2-transformers[ray]'."
            raise EngineError(message) from error
        self._settings, self._workers, self._gpu_share = settings, workers, 1 / workers_per_gpu
        self._pool_options = {"row_seconds": row_seconds, "command": tuple(command)}

    def run(self, rows: Remaining) -> Iterator[dict[str, Any]]:
        """Results of the rows, as they come."""
        size = self._settings.window  # a block each: what an actor takes at a time, and loses if its machine dies
        blocks = [{"chunk": json.dumps([asdict(chunk), wanted])} for chunk, wanted in rows.chunks(size)]
        if not blocks:
            return
        if not self._ray.is_initialized():
            options = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
            self._ray.init(log_to_driver=False, **options)
        uses_gpus = self._settings.server is None and self._settings.device in ("auto", "cuda")
        has_gpus = self._ray.cluster_resources().get("GPU", 0) > 0
        min_workers, max_workers = self._workers
        results = (
            self._data.from_items(blocks, override_num_blocks=len(blocks))
            # Reading takes no share of a processor, lest actors that hold all of them wait for their rows. Without a
            # limit Ray would start a process for each block.
            .map_batches(
                _Reader(rows.source),
                batch_size=1,
                num_cpus=0,
                compute=self._data.TaskPoolStrategy(size=min(max_workers, MAX_READERS)),
            )
            .map_batches(
                _Answers,
                fn_constructor_kwargs={"settings": self._settings.as_dict(), "options": self._pool_options},
                batch_size=size,  # of blocks that are not whole, several at a time
                compute=self._data.ActorPoolStrategy(min_size=min_workers, max_size=max_workers),
                num_cpus=1,
                num_gpus=self._gpu_share if uses_gpus and has_gpus else 0,
            )
        )
        try:
            for batch in results.iter_batches(batch_size=None, prefetch_batches=1):
                for result in batch["result"]:
                    yield json.loads(result)
        except self._ray.exceptions.RayError as error:
            raise EngineError(f"Ray ended the run: {error}") from error


class _Reader:
    """Chunks in, their rows out, as JSON: columns of a table would have to be of one type each."""

    def __init__(self, source: Source):
        self._source = source

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[str]]]:
        for text in batch["chunk"]:
            place, wanted = json.loads(text)
            numbers = set(wanted)
            rows = (row for row in self._source.read(Chunk(**place)) if row.number in numbers)
            yield {"row": [json.dumps(row.as_dict()) for row in rows]}


class _Answers:
    """An actor: one worker process, which is kept between batches."""

    def __init__(self, settings: dict[str, Any], options: dict[str, Any]):
        self._pool = WorkerPool(EngineSettings(**settings), keep_workers=True, **options)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        rows = [Row(**json.loads(text)) for text in batch["row"]]
        results = [row.result(error=row.error) for row in rows if row.error is not None]
        results += self._pool.run(row for row in rows if row.error is None)
        return {"result": [json.dumps(result) for result in results]}

    def __del__(self) -> None:
        self._pool.close()
