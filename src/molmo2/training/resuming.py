"""The state of a packed mixture in the checkpoints of a `Trainer`, so that a run continues with the very next row."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from molmo2.training.packed_mixture import PackedMixture

STATE_FILE = "mixture_state.json"


class SaveMixture(TrainerCallback):
    """Writes the state of a `PackedMixture` into each checkpoint.

        arguments = TrainingArguments(..., ignore_data_skip=True, accelerator_config={"dispatch_batches": False})
        trainer = Trainer(model, arguments, collator, stream, callbacks=[SaveMixture(stream)])
        resume_mixture(stream, "run/checkpoint-100")
        trainer.train(resume_from_checkpoint="run/checkpoint-100")

    The state is that behind the rows that were trained on, not behind those that were read ahead. All processes have
    the same stream, of which accelerate gives each its part.

    Args:
        stream: The `PackedMixture` that the trainer trains on.
        processes_per_row: Processes that share a row, under `context_parallel`, and get it from `RepeatedRows`.
    """

    def __init__(self, stream: PackedMixture, processes_per_row: int = 1):
        self.stream, self.processes_per_row = stream, processes_per_row

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep enough states of the stream, and refuse settings under which the state would be another one.

        Raises:
            ValueError: Rows are made in workers, divided twice, or would be skipped on resuming.
        """
        problems = {
            "dataloader_num_workers=0: the state of workers is unknown here": args.dataloader_num_workers != 0,
            "ignore_data_skip=True: the stream continues by itself": not args.ignore_data_skip,
            "a stream with num_processes=1: accelerate divides its rows": self.stream.num_processes != 1,
        }
        found = [text for text, is_problem in problems.items() if is_problem]
        if found:
            raise ValueError(f"To continue a run with the very next row, set {'; and '.join(found)}.")
        # accelerate reads batches ahead of the step whose state is saved
        self.stream.keep_states(4 * self._rows_per_step(args))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the state beside the weights."""
        if state.is_world_process_zero:
            rows = state.global_step * self._rows_per_step(args)
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE
            path.write_text(json.dumps(self.stream.state_dict(rows)), encoding="utf-8")

    def _rows_per_step(self, args: Any) -> int:
        return args.gradient_accumulation_steps * args.train_batch_size * args.world_size // self.processes_per_row


def resume_mixture(stream: PackedMixture, checkpoint: str | Path) -> None:
    """Continue a stream from the state in a checkpoint.

    Raises:
        FileNotFoundError: The checkpoint has none.
        ValueError: It is the state of another stream.
    """
    path = Path(checkpoint) / STATE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: the run was saved without `SaveMixture`.")
    stream.load_state_dict(json.loads(path.read_text(encoding="utf-8")))
