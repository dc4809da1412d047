"""Packed rows of a mixture of data sets, which a run that was stopped continues with the very next example."""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from molmo2.data import Examples
from molmo2.data.mixture import Drawn, Mixture, MixtureState
from molmo2.training.examples import example_from_feature
from molmo2.training.packer import Pack, Packer, PoolEntry, num_crops, num_tokens

KEPT_STATES = 256  # rows that a trainer may have taken ahead of its checkpoint; `SaveMixture` knows better


class ExampleError(ValueError):
    """A row of a data set makes no example; the message names both."""


def example_of(mixture: Mixture, drawn: Drawn, processor: Any, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The built example of a draw; `options` are those of `build_training_example`.

    Raises:
        ExampleError: There is none: its image cannot be decoded, its answer lies behind the last token, ... Rows are
            counted from 0.
    """
    is_grouped = isinstance(mixture.sources[drawn.source], Examples)  # rows by their media
    where = f"{'example' if is_grouped else 'row'} {drawn.place}"
    try:
        row = mixture.example(drawn)
        if is_grouped:
            where = f"row {', '.join(map(str, row['rows']))}"
        return example_from_feature(processor, row, **options)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly anything
        raise ExampleError(f"data '{drawn.source}', {where}: {str(error) or repr(error)}") from error


class PackedMixture(IterableDataset):
    """The packed rows of one process of a run, without an end.

        rows = PackedMixture(mixture, Packer(16384, 128), processor, process_index=rank, num_processes=world_size)
        ...
        torch.save(rows.state_dict(trained_rows), "data.pt")  # later: rows.load_state_dict(torch.load("data.pt"))

    The state, which JSON can store, has the number of draws and where the waiting examples of the packer come from;
    they are built again when it is loaded. It belongs to one process: use `num_workers=0`, or a data loader that asks
    its workers for their `state_dict`, and as many processes and workers as before.

    Args:
        mixture: A `Mixture` of rows or of built examples.
        packer: The `Packer` that fills the rows.
        processor: Needed for rows that are not built yet.
        process_index, num_processes: Process k takes every n-th draw.
        options: Of `build_training_example`.
    Raises:
        ValueError: There is no such process.
        ExampleError: While rows are taken, or a state is loaded: one of a data set makes no example.
    """

    def __init__(
        self,
        mixture: Mixture,
        packer: Packer,
        processor: Any = None,
        *,
        process_index: int = 0,
        num_processes: int = 1,
        **options: Any,
    ):
        if not 0 <= process_index < num_processes:
            raise ValueError(f"There is no process {process_index} of {num_processes}; the first is 0.")
        self.mixture, self.packer, self.processor, self.options = mixture, packer, processor, options
        self.process_index, self.num_processes = process_index, num_processes
        self._num_kept = KEPT_STATES
        self._states: deque[dict[str, Any]] = deque()
        self.load_state_dict(None)

    def __iter__(self) -> Iterator[Pack]:
        """The rows that follow the state, which advances with them."""
        worker = get_worker_info()
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        share = self.process_index * count + number, self.num_processes * count
        for pack in self.packer.pack(self._examples(*share), self._pool):
            self._rows += 1
            self._states.append(self._snapshot())
            yield pack

    def state_dict(self, rows: int | None = None) -> dict[str, Any]:
        """The state behind a number of rows, which a trainer may be less than those that were taken from here.

        Args:
            rows: Counted from the beginning of the first run; None for all that were taken.
        Raises:
            ValueError: The state is not known any more, or not yet.
        """
        rows = self._rows if rows is None else rows
        found = next((state for state in self._states if state["rows"] == rows), None)
        if found is None:
            raise ValueError(
                f"The state behind {rows} rows is not known; those behind {self._states[0]['rows']} to {self._rows} "
                "are."
            )
        return found

    def keep_states(self, rows: int) -> None:
        """Know the states behind the last `rows` rows; 256 are known in any case."""
        self._num_kept = max(KEPT_STATES, rows)
        self._states = deque(self._states, maxlen=self._num_kept)

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Continue from a state; None starts anew.

        Raises:
            ValueError: The state is that of another mixture, packer or process.
        """
        if state is not None and state["of"] != self._fingerprint():
            raise ValueError(
                f"The state is of {state['of']}, but this is {self._fingerprint()}: the next rows would be others. "
                "Use the same sources, rates, seed, packer and number of processes, or start anew."
            )
        state = {"rows": 0, "draws": 0, "taken": {}, "pool": [], "report": {}} if state is None else state
        self._state = MixtureState(state["draws"], dict(state["taken"]))
        self._rows = state["rows"]
        self._pool: list[PoolEntry] = [self._entry(Drawn(*drawn)) for drawn in state["pool"]]
        for name, value in state["report"].items():
            setattr(self.packer.report, name, value)
        self._states = deque([self._snapshot()], maxlen=self._num_kept)

    def _snapshot(self) -> dict[str, Any]:
        return {
            "rows": self._rows,
            "draws": self._state.draws,
            "taken": dict(self._state.taken),
            "pool": [list(example["drawn"]) for _, _, example in self._pool],
            "report": asdict(self.packer.report),
            "of": self._fingerprint(),
        }

    def _fingerprint(self) -> dict[str, Any]:
        packer = self.packer
        return {
            **self.mixture.fingerprint(),
            "packer": [packer.max_tokens, packer.max_crops, packer.pool_size],
            "process": [self.process_index, self.num_processes],
        }

    def _examples(self, number: int, count: int) -> Iterator[Mapping[str, Any]]:
        for drawn in self.mixture.draws(self._state):
            if (self._state.draws - 1) % count == number:
                yield self._built(drawn)

    def _built(self, drawn: Drawn) -> dict[str, Any]:
        """The example of a draw, with the draw under `drawn`."""
        return {**example_of(self.mixture, drawn, self.processor, self.options), "drawn": drawn}

    def _entry(self, drawn: Drawn) -> PoolEntry:
        example = self._built(drawn)
        return num_tokens(example), num_crops(example), example
