"""Workers in processes of their own: a row that kills one costs that row and a restart, never the run.

A worker names the rows that it is busy with. If it dies, those are asked again, each alone; the row that a worker dies
of twice gets an error as its result. All others are handed out anew.
"""

import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from queue import Empty, Queue
from threading import Thread
from typing import Any

from molmo2.batch.rows import Row
from molmo2.batch.settings import EngineError, EngineSettings

WORKER = (sys.executable, "-m", "molmo2.batch.worker")
WINDOWS_IN_FLIGHT = 2  # of a worker: one is answered while the next is decoded
DEATHS_OF_A_ROW = 2  # once among others, once alone
MAX_IDLE_DEATHS = 3  # of workers that had started no row: something else is wrong
STOP_SECONDS = 5.0
POLL_SECONDS = 0.5


@dataclass(eq=False)
class _Worker:
    """One process and the rows that it holds, by number.

    Attributes:
        suspects: Since when it has been busy with each of the rows that it is busy with.
        alone: It holds one row that an earlier worker died of.
    """

    process: "subprocess.Popen[str]"
    index: int
    is_ready: bool = False
    alone: bool = False
    held: dict[int, Row] = field(default_factory=dict)
    suspects: dict[int, float] = field(default_factory=dict)
    killed_for: str | None = None

    def send(self, message: Any) -> None:
        """Pass a line on; a worker that has died is found by the end of its output."""
        with suppress(OSError):
            if self.process.stdin is not None:
                self.process.stdin.write(json.dumps(message) + "\n")
                self.process.stdin.flush()


class WorkerPool:
    """An engine: rows spread over `workers` processes, each with the model or a client of the server.

    Args:
        row_seconds: A worker that takes longer than this for a batch is killed, as if it had died of it.
        command: The program of a worker; it speaks the lines of `molmo2.batch.worker`.
        keep_workers: They wait for the next call of `run`, until `close`.
    """

    def __init__(
        self,
        settings: EngineSettings,
        workers: int = 1,
        *,
        row_seconds: float = 1800.0,
        command: Sequence[str] = WORKER,
        keep_workers: bool = False,
    ):
        self.settings, self.num_workers, self.row_seconds, self.command = settings, workers, row_seconds, command
        self._keep_workers = keep_workers
        self._events: Queue[tuple[_Worker, dict[str, Any] | None]] = Queue()
        self._workers: list[_Worker] = []
        self._again: deque[Row] = deque()  # handed out before others
        self._alone: deque[Row] = deque()  # handed out one by one
        self._deaths: dict[int, int] = {}
        self._idle_deaths = 0

    def run(self, rows: Iterator[Row]) -> Iterator[dict[str, Any]]:
        """Results of the rows, as they come.

        Raises:
            EngineError: The model cannot be loaded, the server cannot be reached, or workers die without any row.
        """
        is_complete = False
        try:
            for index in range(len(self._workers), self.num_workers):
                self._start(index)
            yield from self._results(rows)
            is_complete = True
        finally:
            if not (is_complete and self._keep_workers):
                self.close()
            self._forget()

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            if worker.process.stdin is not None:
                with suppress(OSError):
                    worker.process.stdin.close()
        deadline = time.monotonic() + STOP_SECONDS
        for worker in self._workers:
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
        self._workers.clear()
        self._forget()

    def _forget(self) -> None:
        """Nothing of one run's rows belongs to the next: their numbers are the same."""
        self._again.clear()
        self._alone.clear()
        self._deaths.clear()
        self._idle_deaths = 0

    def _start(self, index: int) -> None:
        process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        worker = _Worker(process, index)
        self._workers.append(worker)
        Thread(target=self._read, args=(worker,), daemon=True).start()
        worker.send({"settings": self.settings.as_dict(), "index": index})

    def _read(self, worker: _Worker) -> None:
        """Pass the lines of a worker on; None is their end."""
        if worker.process.stdout is not None:
            with worker.process.stdout as lines:
                for line in lines:
                    try:
                        message = json.loads(line)
                    except ValueError:  # cut off as the worker died
                        break
                    self._events.put((worker, message))
        self._events.put((worker, None))

    def _results(self, rows: Iterator[Row]) -> Iterator[dict[str, Any]]:
        while True:
            for worker in self._workers:
                self._hand_out(worker, rows)
            if self._is_over(rows):
                return
            try:
                worker, message = self._events.get(timeout=POLL_SECONDS)
            except Empty:
                self._kill_the_slow()
                continue
            if worker in self._workers:  # not one of an earlier run, or what it still said before its end
                yield from self._bury(worker) if message is None else self._handle(worker, message)

    def _handle(self, worker: _Worker, message: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What a line of a worker means; the result in it, if there is one."""
        if "result" in message:
            result = message["result"]
            if worker.held.pop(result["row"], None) is not None:
                worker.suspects.pop(result["row"], None)
                worker.alone = worker.alone and bool(worker.held)
                self._idle_deaths = 0
                yield result
        elif "busy" in message:
            worker.suspects |= {number: time.monotonic() for number in message["busy"] if number in worker.held}
        elif "idle" in message:
            for number in message["idle"]:
                worker.suspects.pop(number, None)
        elif "failed" in message:
            raise EngineError(message["failed"])
        else:
            worker.is_ready = True

    def _is_over(self, rows: Iterator[Row]) -> bool:
        """Whether every row has its result. A row that is found here waits until a worker is ready."""
        if self._again or self._alone or any(worker.held for worker in self._workers):
            return False
        self._again.extend(islice(rows, 1))
        return not self._again

    def _hand_out(self, worker: _Worker, rows: Iterator[Row]) -> None:
        """Fill up what a worker holds."""
        size = self.settings.window
        while worker.is_ready and not worker.alone and len(worker.held) <= (WINDOWS_IN_FLIGHT - 1) * size:
            if self._alone:
                if worker.held:
                    return  # it gets that row when it has nothing else to lose
                window, worker.alone = [self._alone.popleft()], True
            else:
                window = [self._again.popleft() for _ in range(min(size, len(self._again)))]
                window += islice(rows, size - len(window))
            if not window:
                return
            worker.held |= {row.number: row for row in window}
            worker.send([row.as_dict() for row in window])

    def _kill_the_slow(self) -> None:
        now = time.monotonic()
        for worker in self._workers:
            started = min(worker.suspects.values(), default=now)
            if worker.killed_for is None and now - started > self.row_seconds:
                worker.killed_for = f"no answer after {self.row_seconds:g} s"
                worker.process.kill()

    def _bury(self, worker: _Worker) -> Iterator[dict[str, Any]]:
        """Replace a worker that has died; results for rows that it died of once too often."""
        code = worker.process.wait()
        self._workers.remove(worker)
        reason = worker.killed_for or f"the worker died ({_ending(code)})"
        suspects = [row for number, row in worker.held.items() if number in worker.suspects]
        self._again.extend(row for number, row in worker.held.items() if number not in worker.suspects)
        if not suspects:
            self._idle_deaths += 1
            if self._idle_deaths >= MAX_IDLE_DEATHS or not worker.is_ready:
                raise EngineError(f"A worker ended before it began with any row: {_ending(code)}.")
        for row in suspects:
            deaths = self._deaths[row.number] = self._deaths.get(row.number, 0) + 1
            if deaths >= DEATHS_OF_A_ROW:
                del self._deaths[row.number]
                yield row.result(error=f"WorkerDied: {reason} while it was decoded or answered")
            else:
                self._alone.append(row)
        self._start(worker.index)


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
