"""Fine-tuning with LoRA: the miniature learns a new shape: python examples/finetune_lora.py [MODEL] [--minutes 8]

The world has diamonds, but no image, question or answer of the miniature's training contains one. Adapters on all
linear layers learn to point to diamonds, to count and to name them, from images drawn on the fly; a third of the
images have no diamonds, so that old abilities are kept. Scores are on fresh seeds, before and after.

MODEL is a converted folder or a native checkpoint; by default the miniature that comes with the repository.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Waiting threads must not occupy a core: a worker process draws the images.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from molmo2.training import DataCollator, lora_targets

EXAMPLES = Path(__file__).resolve().parent
sys.path.insert(0, str(EXAMPLES))

from miniature import native, questions  # noqa: E402
from miniature.evaluate import Example, answers, judge, load  # noqa: E402
from miniature.world import COLOURS, HELD_OUT_SHAPES, DrawnImage, choose_kinds, make_image  # noqa: E402

TRAINING_SEED, FRESH_SEED = 7000, 8000  # used by nothing else


@dataclass(frozen=True)
class Plan:
    """Settings of the run.

    Attributes:
        shape: One of `HELD_OUT_SHAPES`.
        minutes: Duration of training; the learning rate decays to zero by then.
        rank: Of the adapters.
        trees: Images of a step, with up to `branches` questions each.
        old: Fraction of images without the new shape.
    """

    shape: str = "diamond"
    minutes: float = 8.0
    rank: int = 32
    rate: float = 2e-3
    trees: int = 10
    branches: int = 5
    old: float = 0.3


def image_with(shape: str, rng: np.random.Generator, max_new: int = 5) -> DrawnImage:
    """An image with up to seven objects, of which one to `max_new` have the new shape."""
    kinds = choose_kinds(rng, int(rng.integers(1, 5)))
    new = [(list(COLOURS)[rng.integers(len(COLOURS))], shape) for _ in range(rng.integers(1, max_new + 1))]
    mixed = [*new, *kinds][:7]
    return make_image(rng, kinds=[mixed[place] for place in rng.permutation(len(mixed))])


def places(image: DrawnImage, target: tuple) -> list[questions.Place]:
    """The objects that match the target, in the first image of the prompt."""
    return [
        questions.Place(1, number, thing)
        for number, thing in enumerate(image.things)
        if questions.matches(thing, target)
    ]


def about(shape: str, rng: np.random.Generator, image: DrawnImage) -> list[questions.Question]:
    """Questions about the shape: point to all, or to those of a colour; count; name one with a unique colour."""
    colours, new = list(COLOURS), (None, shape)
    target = (colours[rng.integers(len(colours))], shape)
    asked = [
        questions.point(new, places(image, new), plural=True),
        questions.count(new, places(image, new)),
        questions.point(target, places(image, target), plural=bool(rng.random() < 0.5)),
        questions.count(target, places(image, target)),
        questions.number_only(new, places(image, new)),
    ]
    for colour in colours:
        of_colour = [thing for thing in image.things if thing.colour == colour]
        if len(of_colour) == 1 and of_colour[0].kind == shape:
            asked.append(questions.Question("what", f"What is the {colour} object?", shape, (colour, None)))
    return asked


class Lessons(IterableDataset):
    """An endless stream of message trees: one image, several questions with their answers."""

    def __init__(self, plan: Plan):
        self.plan = plan

    def __iter__(self) -> Iterator[dict[str, Any]]:
        number = 0
        while True:
            rng = np.random.default_rng([TRAINING_SEED, number])
            number += 1
            if rng.random() < self.plan.old:
                image = make_image(rng)
                asked = questions.ask_images(rng, [image], self.plan.branches)
                absent = questions.point((None, self.plan.shape), [], plural=True)  # "There are none."
                asked += [absent] * int(rng.random() < 0.3)
            else:
                image = image_with(self.plan.shape, rng)
                asked = about(self.plan.shape, rng, image)
            chosen = rng.permutation(len(asked))[: self.plan.branches]
            yield {"messages": [conversation(asked[place]) for place in chosen], "images": [image.pixels]}


def conversation(question: questions.Question) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question.text}, {"role": "assistant", "content": question.answer}]


class Clock(TrainerCallback):
    """Stops training on time; the learning rate decays linearly until then."""

    def __init__(self, plan: Plan):
        self.plan, self.started = plan, time.monotonic()

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        passed = (time.monotonic() - self.started) / (60 * self.plan.minutes)
        for group in optimizer.param_groups:
            group["lr"] = self.plan.rate * min(1.0, (state.global_step + 1) / 30) * max(0.0, 1 - passed)
        control.should_training_stop = passed >= 1


def scores(model: Any, processor: Any, number: int, shape: str = Plan.shape) -> dict[str, float]:
    """Scores on fresh images: for the new shape, and for the old ones (`old: ...`)."""
    new, old = [], []
    for index in range(number):
        rng = np.random.default_rng([FRESH_SEED, index])
        image = image_with(shape, rng)
        parts = ({"type": "image", "image": image.pixels},)
        asked = about(shape, rng, image)
        kept = [*asked[:2], *(question for question in asked if question.task == "what")]
        new += [Example(question, parts) for question in kept]
        image = make_image(rng)
        parts = ({"type": "image", "image": image.pixels},)
        old += [Example(question, parts) for question in questions.ask_images(rng, [image], 2)]
    model.eval()
    texts = answers(model, processor, new)
    found = {"right": right_share(processor, new, texts), **judge(processor, new, texts)}
    kept = judge(processor, old, answers(model, processor, old))
    return {
        **found,
        **{f"old: {name}": kept[name] for name in ("pointing", "count", "what", "colour") if name in kept},
    }


def right_share(processor: Any, asked: list[Example], texts: list[str]) -> float:
    """Fraction of questions whose whole answer is correct: every point and no other, the total, the name."""
    right = 0
    for example, text in zip(asked, texts):
        found = judge(processor, [example], [text])
        wanted = {"pointing": 1.0, "pointing, superfluous": 0.0, "count": 1.0, "what": 1.0, "none": 1.0}
        right += all(value == wanted[name] for name, value in found.items())
    return right / len(asked)


def tune(model: Any, processor: Any, plan: Plan, folder: Path) -> Any:
    """The model with trained adapters."""
    config = LoraConfig(r=plan.rank, lora_alpha=2 * plan.rank, target_modules=lora_targets())
    adapted = get_peft_model(model, config)
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=not torch.cuda.is_available(),
        max_steps=10**6,  # the clock ends it
        per_device_train_batch_size=plan.trees,
        lr_scheduler_type="constant",
        learning_rate=plan.rate,
        logging_steps=50,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        dataloader_num_workers=1,
        disable_tqdm=True,
        accelerator_config={"dispatch_batches": False},
    )
    trainer = Trainer(
        adapted,
        arguments,
        DataCollator(processor),
        Lessons(plan),
        processing_class=processor,
        callbacks=[Clock(plan)],
    )
    trainer.train()
    return adapted


def table(before: dict[str, float], after: dict[str, float]) -> str:
    rows = ["| score | before | after |", "|---|---|---|"]
    return "\n".join([*rows, *(f"| {name} | {before.get(name, 0):.1%} | {after[name]:.1%} |" for name in after)])


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=native.CHECKPOINT, help="converted or native")
    parser.add_argument("--output", type=Path, default=Path("adapters"), help="their folder")
    parser.add_argument("--shape", default=Plan.shape, choices=HELD_OUT_SHAPES)
    parser.add_argument("--minutes", type=float, default=Plan.minutes)
    parser.add_argument("--number", type=int, default=60, help="fresh images with the shape, and as many without")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    model, processor = load(given.model)
    before = scores(model, processor, given.number, given.shape)
    adapted = tune(model, processor, Plan(shape=given.shape, minutes=given.minutes), given.output)
    after = scores(adapted, processor, given.number, given.shape)
    adapted.save_pretrained(given.output)
    processor.save_pretrained(given.output)
    print(table(before, after))
    (given.output / "scores.json").write_text(json.dumps({"before": before, "after": after}, indent=2) + "\n")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
