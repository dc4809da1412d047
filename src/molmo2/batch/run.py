"""One run: rows that have no result yet go through an engine, results into the journal, as a stream."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from molmo2.batch.journal import Journal, RowSet
from molmo2.batch.rows import Chunk, Row, Source, all_rows


class Engine(Protocol):
    """What answers rows. Results come in any order, one for each row, errors included; a second one is dropped."""

    def run(self, rows: "Remaining") -> Iterable[dict[str, Any]]:
        """Results, made by `Row.result`; rows are taken as they are needed."""


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        rows: Rows of the output, those of earlier runs included.
        errors: How many of them are errors.
        answered: Rows that this run added.
        seconds: Of this run.
    """

    rows: int
    errors: int
    answered: int
    seconds: float


@dataclass(frozen=True)
class Shard:
    """Every `count`-th row, from the one with number `index` on: one of several processes that share a table."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"There is no part {self.index + 1} of {self.count}: parts are counted from 1.")

    def output(self, path: Path) -> Path:
        """The output of this process: answers.jsonl becomes answers-00002-of-00008.jsonl."""
        if self.count == 1:
            return path
        return path.with_name(f"{path.stem}-{self.index + 1:05d}-of-{self.count:05d}{path.suffix}")


def run_batch(
    source: Source,
    output: Path,
    engine: Engine,
    *,
    identity: dict[str, Any] | None = None,
    shard: Shard | None = None,
    ordered: bool = False,
    overwrite: bool = False,
    on_result: Callable[[dict[str, Any]], Any] = lambda result: None,
) -> Summary:
    """Answer all rows of a source that the output lacks.

    Args:
        output: A file that ends in .jsonl or .parquet. It appears when it is complete; until then results are in
            OUTPUT.journal, from which the next run continues.
        identity: Model, question and options: a run with others does not continue this one.
        shard: The rows to take; None for all.
        ordered: Rows in the order of the source, not in that of their answers.
        overwrite: Begin anew, whatever is there.
        on_result: Called with each new result.
    Raises:
        OutputError: The output is that of another run, is being written, or cannot be written.
        SourceError: The source cannot be read.
        EngineError: The engine cannot work at all; what was answered stays.
    """
    started, shard = time.monotonic(), Shard() if shard is None else shard
    who = {"source": source.fingerprint(), "shard": asdict(shard), **(identity or {})}
    with Journal(shard.output(output), who, overwrite=overwrite) as journal:
        if journal.is_complete:
            return Summary(journal.num_rows, journal.num_errors, 0, time.monotonic() - started)
        before = len(journal.done)

        def keep(result: dict[str, Any]) -> None:
            if journal.write(result):
                on_result(result)

        for result in engine.run(Remaining(source, shard, journal.done, keep)):
            keep(result)
        seconds = time.monotonic() - started
        rows = len(journal.done)
        journal.finish(
            ordered=ordered, summary={"rows": rows, "errors": journal.num_errors, "seconds": round(seconds, 3)}
        )
        return Summary(rows, journal.num_errors, rows - before, seconds)


class Remaining:
    """The rows without a result, as an iterator; an engine that reads the source elsewhere takes `chunks` instead.

    Args:
        keep: Takes the results of rows that make no question.
    """

    def __init__(self, source: Source, shard: Shard, done: RowSet, keep: Callable[[dict[str, Any]], None]):
        self.source, self._shard, self._done, self._keep = source, shard, done, keep
        self._rows = all_rows(source)

    def __iter__(self) -> "Remaining":
        return self

    def __next__(self) -> Row:
        for row in self._rows:
            if not self._is_wanted(row.number):
                continue
            if row.error is None:
                return row
            self._keep(row.result(error=row.error))
        raise StopIteration

    def chunks(self, size: int) -> Iterator[tuple[Chunk, list[int]]]:
        """Chunks of the source with the numbers of their rows that remain, at most `size`; none without."""
        for chunk in self.source.chunks(size * self._shard.count):
            wanted = [number for number in range(chunk.first, chunk.first + chunk.count) if self._is_wanted(number)]
            if wanted:
                yield chunk, wanted

    def _is_wanted(self, number: int) -> bool:
        return number % self._shard.count == self._shard.index and number not in self._done
