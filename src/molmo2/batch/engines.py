"""Engines that answer rows in the process they are in: a model, or a server. `pool` gives them processes.

Any exception about a row becomes its result: decoders raise nearly anything, and one bad row never ends a run.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from itertools import islice
from queue import Queue
from threading import Thread
from typing import Any

from molmo2.batch.rows import Row
from molmo2.batch.settings import EngineError, EngineSettings
from molmo2.client.http import ServerError, ServerUnreachable
from molmo2.tools.answer import answer_record
from molmo2.tools.ask import Request, user_turn
from molmo2.tools.plan import plan
from molmo2.video.frame_encoding import read_ahead

Watch = Callable[[Sequence[Row], bool], Any]
REFUSED_TO_ALL = frozenset({401, 403, 404})  # the key, or the name of the model


class LocalEngine:
    """A model in this process: rows sorted by length, in batches, of which the next is prepared meanwhile.

    Args:
        watch: Called with rows and True just before they are opened, decoded or answered, and with False behind that:
            if this process dies meanwhile, these are the suspects.
        is_worker: The process is one that `WorkerPool` replaces: it ends where CUDA answers no more.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        settings: EngineSettings | None = None,
        watch: Watch = lambda rows, busy: None,
        is_worker: bool = False,
    ):
        self.model, self.processor = model, processor
        self.settings = EngineSettings() if settings is None else settings
        self._watch, self._is_worker = watch, is_worker

    def run(self, rows: Iterator[Row]) -> Iterator[dict[str, Any]]:
        """Results of the rows, one window after the other."""
        return self._results(iter(lambda: list(islice(rows, self.settings.window)), []))

    def serve(self, windows: "Queue[list[Row]]", send: Callable[[dict[str, Any]], Any]) -> None:
        """Answer windows as they arrive, without end."""
        for result in self._results(iter(windows.get, [])):
            send(result)

    def _results(self, windows: Iterator[list[Row]]) -> Iterator[dict[str, Any]]:
        with closing(read_ahead(self._prepared(windows), 1)) as prepared:
            for batch, request in prepared:
                yield from request if isinstance(request, list) else self._answers(batch, request)

    def _prepared(self, windows: Iterator[list[Row]]) -> Iterator[tuple[list[Row], Any]]:
        """Batches with their requests; with a list of results where something cannot be asked."""
        for window in windows:
            lengths: dict[int, int] = {}
            for row in window:
                self._watch([row], True)
                try:
                    planned = plan(self.processor, _messages(row), **self.settings.processor_kwargs)
                    lengths[row.number] = planned.num_tokens
                except Exception as error:
                    yield [row], [self._error_result(row, error)]
                self._watch([row], False)
            fit = sorted((row for row in window if row.number in lengths), key=lambda row: lengths[row.number])
            for first in range(0, len(fit), self.settings.batch_size):
                yield from self._request(fit[first : first + self.settings.batch_size])

    def _request(self, batch: list[Row]) -> Iterator[tuple[list[Row], Any]]:
        """The request of a batch; if it fails, those of its rows."""
        self._watch(batch, True)
        try:
            yield (
                batch,
                Request.from_conversations(
                    self.model,
                    self.processor,
                    [row.question for row in batch],
                    [_messages(row) for row in batch],
                    self.settings.processor_kwargs,
                    self.settings.generate_options,
                ),
            )
        except Exception as error:
            failed = self._error_result(batch[0], error)
            if len(batch) == 1:
                yield batch, [failed]
                return
            for row in batch:
                yield from self._request([row])

    def _answers(self, batch: list[Row], request: Request) -> Iterator[dict[str, Any]]:
        self._watch(batch, True)
        try:
            generation = request.generate(self.model)
            answers = [answer_record(request.answer(index, generation)) for index in range(len(batch))]
        except Exception as error:
            failed = self._error_result(batch[0], error)
            if len(batch) == 1:
                yield failed
                return
            for row in batch:  # such as one that does not fit into memory together with the others
                for single, one in self._request([row]):
                    yield from one if isinstance(one, list) else self._answers(single, one)
            return
        yield from (row.result(answer) for row, answer in zip(batch, answers))

    def _error_result(self, row: Row, error: Exception) -> dict[str, Any]:
        """The result of a failed row. After an error of CUDA itself all others would fail too, see `is_worker`"""
        if self._is_worker and ("CUDA error" in str(error) or type(error).__name__ == "AcceleratorError"):
            print(f"{_described(error)}\nThis worker ends; another one takes its place.", file=sys.stderr, flush=True)
            os._exit(1)
        return row.result(error=_described(error))


class ServerEngine:
    """A server, asked for `batch_size` rows at a time.

    Args:
        client: A `molmo2.client.Client`.
    """

    def __init__(self, client: Any, settings: EngineSettings, watch: Watch = lambda rows, busy: None):
        self.client, self.settings, self._watch = client, settings, watch

    def run(self, rows: Iterator[Row]) -> Iterator[dict[str, Any]]:
        """Results of the rows, as they come.

        Raises:
            EngineError: The server cannot be reached, or refuses the key or the model.
        """
        self._check()
        with ThreadPoolExecutor(self.settings.batch_size, thread_name_prefix="molmo2-batch") as executor:
            pending: set[Future[dict[str, Any]]] = set()
            try:
                while True:
                    room = self.settings.batch_size - len(pending)
                    pending |= {executor.submit(self._answer, row) for row in islice(rows, room)}
                    if not pending:
                        return
                    finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in finished:
                        yield future.result()
            finally:
                for future in pending:
                    future.cancel()

    def serve(self, windows: "Queue[list[Row]]", send: Callable[[dict[str, Any]], Any]) -> None:
        """Answer windows as they arrive, until the server cannot be reached."""
        self._check()
        rows: Queue[Row] = Queue()
        failures: Queue[BaseException] = Queue()

        def answer() -> None:
            try:
                while True:
                    send(self._answer(rows.get()))
            except BaseException as error:  # raised where `serve` was called
                failures.put(error)

        def spread() -> None:
            while True:
                for row in windows.get():
                    rows.put(row)

        for target in (spread, *[answer] * self.settings.batch_size):
            Thread(target=target, name="molmo2-batch", daemon=True).start()
        raise failures.get()

    def _check(self) -> None:
        """Find out once, before the first row, what every row would fail of."""
        try:
            self.client.check()
        except (ServerError, ValueError) as error:
            raise EngineError(str(error)) from error

    def _answer(self, row: Row) -> dict[str, Any]:
        self._watch([row], True)
        try:
            answer = self.client.ask(
                row.question,
                row.images or None,
                row.videos or None,
                processor_kwargs=self.settings.processor_kwargs,
                **self.settings.generate_options,
            )
            return row.result(answer_record(answer))
        except Exception as error:
            is_for_all = isinstance(error, ServerError) and error.status in REFUSED_TO_ALL
            if is_for_all or isinstance(error, ServerUnreachable):
                raise EngineError(str(error)) from error
            return row.result(error=_described(error))


def _messages(row: Row) -> list[dict[str, Any]]:
    return user_turn(row.question, row.images, row.videos)


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
