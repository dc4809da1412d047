"""Trains the miniature from scratch: python -m miniature.train RUN [--minutes 80]    (from `examples/`)

Training has two phases. In the first, dense heads train the vision transformer and the connector to localize objects;
in the second the whole model answers questions, first about few objects, then about everything. Progress is measured
in CPU minutes of all cores of the process, so the schedule does not depend on other load. An interrupted run continues
from its last checkpoint; a finished one continues with more `--minutes`.

RUN holds `state.pt` (weights, optimizers, clock), `log.jsonl` (losses and held-out scores) and, at the end, `model`
(converted folder) and `checkpoint` (the sharded form that is shipped).
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor

from . import native
from .batches import BatchMaker, Mix, tree_mask
from .dense_heads import DenseHeads, look_loss
from .evaluate import score

WORLD_SEED = 1  # evaluation draws from other seeds
IMAGE_INPUTS = ("pixel_values", "image_token_pooling", "image_grids", "image_num_crops")
CLIP_INPUTS = ("pixel_values_videos", "video_token_pooling", "video_grids")
LOOKS = {"named": 1, "written": 3}  # layers whose first head is supervised


@dataclass(frozen=True)
class Plan:
    """The schedule of a run, in fractions of its minutes, and its learning rates.

    Attributes:
        first_lesson: Fraction of the run that is spent on dense targets alone.
        single: Fraction of the second lesson that shows single images only, with ever more objects.
        more_clips: From this fraction of the second lesson on, three steps of four show clips instead of two.
        matrix_rate, rate: Peak learning rates of the hidden matrices (Muon) and of everything else (AdamW).
        dense_weight, look_weight: In the second lesson, beside 1 for answers.
        images, clips, sets: Trees per step.
    """

    minutes: float = 80.0
    first_lesson: float = 0.08
    single: float = 0.12
    more_clips: float = 0.33
    matrix_rate: float = 2e-3
    rate: float = 2e-3
    dense_weight: float = 0.1
    look_weight: float = 0.2
    images: int = 16
    clips: int = 6
    sets: int = 6


class Lessons(Dataset):
    """The batches of each step, drawn from the seed and the step; their difficulty follows the shared clock."""

    def __init__(self, processor, plan: Plan):
        self.maker, self.plan = BatchMaker(processor), plan
        self.clock = torch.zeros(1).share_memory_()  # fraction of the run that has passed

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, step: int) -> list[dict[str, Tensor]]:
        torch.set_num_threads(1)
        rng = np.random.default_rng([WORLD_SEED, step])
        plan, passed = self.plan, float(self.clock)
        if passed < plan.first_lesson:
            mix = Mix(tiled=0, branches=1)
            if step % 3 < 2:
                return [self.maker.images(rng, 3 * plan.images, mix)]
            return [self.maker.clips(rng, 2 * plan.clips, mix)]
        second = (passed - plan.first_lesson) / (1 - plan.first_lesson)
        level = min(1.0, second / plan.single)
        tiled = float(rng.random() < 0.35 * level)  # a whole batch alike: less padding
        mix = Mix(max_things=min(7, 2 + int(6 * level)), tiled=tiled)
        parts = [self.maker.images(rng, plan.images, mix)]
        turn = step % 4
        if level == 1 and (turn < 2 or (turn == 3 and second > plan.more_clips)):
            parts.append(self.maker.clips(rng, plan.clips, Mix()))
        elif level == 1 and turn == 2:
            parts.append(self.maker.images(rng, plan.sets, Mix(images=3, tiled=0.1, branches=4)))
        return parts


class Trainer:
    """A training run: model, auxiliary heads, optimizers and clock."""

    def __init__(self, folder: Path, plan: Plan, seed: int):
        self.folder, self.plan = folder, plan
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "model" / "config.json").is_file():
            native.write_fresh(folder / "model", seed)
        self.processor = AutoProcessor.from_pretrained(folder / "model", trust_remote_code=True)
        # On short rows in bfloat16 several times faster than sdpa's kernel for CPUs.
        self.model = AutoModelForImageTextToText.from_pretrained(
            folder / "model", trust_remote_code=True, attn_implementation="eager"
        ).float()
        backbone = self.model.vision_backbone
        backbone.crops_per_chunk = backbone.tokens_per_chunk = None  # the features of a batch in one piece
        backbone.image_vit.register_forward_hook(self._keep_features)
        self.features: Tensor | None = None
        self.heard: dict[int, tuple[Tensor, Tensor]] = {}
        self.slots: list[int] = []  # of the batch that is being taught
        for block in self.model.model.transformer.blocks:
            self._split_attention(block.self_attn)
        config = self.model.config
        width = config.vit_config.hidden_size * len(config.adapter_config.vit_layers)
        torch.manual_seed(seed)
        self.heads = DenseHeads(width, config.text_config.hidden_size)
        self.optimizers = self._optimizers()
        self.step, self.seconds = 0, 0.0
        self.visual = torch.tensor(self.processor.image_token_ids)
        self._resume()

    def _keep_features(self, module: nn.Module, inputs: tuple, outputs: list[Tensor]) -> None:
        self.features = torch.cat(outputs, dim=-1).flatten(0, 1)

    def _split_attention(self, attention: nn.Module) -> None:
        """Compute attention branch by branch, which skips the masked products between branches.

        Query and key of the first head are kept in the layers whose attention is supervised.
        """
        attend = attention.attend

        def split(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *arguments, **options):
            if not self.slots:
                return attend(query, key, value, mask, *arguments, **options)
            if attention.layer_idx in LOOKS.values():
                self.heard[attention.layer_idx] = query[:, 0], key[:, 0]
            images, *branches = (slice(*ends) for ends in zip(self.slots, self.slots[1:]))
            parts = []
            for own in (images, *branches):
                seen = [images] if own is images else [images, own]
                keys, values = (torch.cat([states[:, :, part] for part in seen], 2) for states in (key, value))
                allowed = torch.cat([mask[..., own, part] for part in seen], -1)
                parts.append(attend(query[:, :, own], keys, values, allowed, *arguments, **options)[0])
            return torch.cat(parts, 1), None

        attention.attend = split

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for the matrices between hidden states, AdamW for tables, heads, norms and biases."""
        matrices, others = [], list(self.heads.parameters())
        for name, parameter in self.model.named_parameters():
            is_table = any(part in name for part in ("wte", "lm_head", "positional", "patch_embedding"))
            (others if parameter.dim() != 2 or is_table else matrices).append(parameter)
        muon = torch.optim.Muon(
            matrices, lr=self.plan.matrix_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw", ns_steps=4
        )
        return [muon, torch.optim.AdamW(others, lr=self.plan.rate, betas=(0.9, 0.98), weight_decay=0.0)]

    @property
    def passed(self) -> float:
        return self.seconds / (60 * self.plan.minutes)

    def _rate(self) -> float:
        """Factor of the learning rates: warm-up, plateau, then cosine decay to zero over the last 60 %."""
        warm = min(1.0, (self.step + 1) / 100)
        left = (1 - self.passed) / 0.6
        return warm * (1.0 if left >= 1 else max(0.0, 0.5 - 0.5 * math.cos(math.pi * left)))

    def _pooling(self, batch: dict[str, Tensor]) -> Tensor:
        """Pooling rows as flat patch numbers over all crops of the batch; (T, K)."""
        if "video_grids" in batch:
            sizes, tokens, table = (
                batch["video_grids"][:, 0],
                batch["video_grids"].prod(1),
                batch["video_token_pooling"],
            )
        else:
            grids = batch["image_grids"]
            sizes, table = batch["image_num_crops"], batch["image_token_pooling"]
            tokens = grids[:, 0] * grids[:, 1] + grids[:, 2] * grids[:, 3]
        patches = batch["dense"].shape[1]
        shift = torch.repeat_interleave((sizes.cumsum(0) - sizes) * patches, tokens)[:, None]
        return torch.where(table < 0, table, table + shift)

    def _first_lesson(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        pooling = self._pooling(batch)
        pixels = batch.get("pixel_values", batch.get("pixel_values_videos"))
        if "image_grids" in batch:  # the view of the whole alone: the crops of these images repeat it
            keep = batch["dense"][:, 0, 0] >= 0
            number = keep.long().cumsum(0) - 1
            patches = pixels.shape[1]
            crop = pooling.clamp(min=0) // patches
            moved = number[crop] * patches + pooling % patches
            kept_rows = keep[crop[:, 0]]
            pooling = torch.where(pooling < 0, pooling, moved)[kept_rows]
            pixels, dense = pixels[keep], batch["dense"][keep]
        else:
            dense = batch["dense"]
        tokens = self.model.vision_backbone(pixels, pooling)
        return self.heads(self.features, tokens, pooling, dense)

    def _second_lesson(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        is_visual = torch.isin(batch["input_ids"], self.visual)
        inputs = {name: batch[name] for name in (*IMAGE_INPUTS, *CLIP_INPUTS) if name in batch}
        self.slots = batch["slots"].tolist()
        mask = tree_mask(batch["branches"], is_visual)
        outputs = self.model.model(
            input_ids=batch["input_ids"],
            attention_mask=mask,
            position_ids=batch["position_ids"],
            token_type_ids=is_visual,
            use_cache=False,
            **inputs,
        )
        self.slots = []
        weights = batch["weights"][:, 1:]
        taught = weights > 0
        logits = self.model.lm_head(outputs.last_hidden_state[:, :-1][taught]).float()
        losses = functional.cross_entropy(logits, batch["input_ids"][:, 1:][taught], reduction="none")
        answer_loss = (losses * weights[taught]).sum() / weights[taught].sum()
        dense_loss, _ = self.heads(self.features, outputs.image_hidden_states, self._pooling(batch), batch["dense"])
        looks = {
            name: look_loss(*self.heard[layer], attention.scaling, mask[:, 0], batch[name])
            for name, layer in LOOKS.items()
            for attention in (self.model.model.transformer.blocks[layer].self_attn,)
        }
        kind = "clips" if "video_grids" in batch else "images"
        right = (logits.argmax(-1) == batch["input_ids"][:, 1:][taught]).float().mean()
        scores = {f"{kind}_loss": answer_loss.item(), f"{kind}_right": right.item(), "dense": dense_loss.item()}
        scores |= {f"{kind}_{name}": share for name, (_, share) in looks.items()}
        look = sum(loss for loss, _ in looks.values())
        return answer_loss + self.plan.dense_weight * dense_loss + self.plan.look_weight * look, scores

    def train_step(self, parts: list[dict[str, Tensor]]) -> dict[str, float]:
        """One update; returns its measurements."""
        is_first = self.passed < self.plan.first_lesson
        measured: dict[str, float] = {}
        for part in parts:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss, scores = (self._first_lesson if is_first else self._second_lesson)(part)
            loss.backward()
            measured.update(scores)
        norm = nn.utils.clip_grad_norm_([*self.model.parameters(), *self.heads.parameters()], 1.0)
        for optimizer, peak in zip(self.optimizers, (self.plan.matrix_rate, self.plan.rate)):
            for group in optimizer.param_groups:
                group["lr"] = peak * self._rate()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {**measured, "norm": float(norm)}

    def log(self, **entry) -> None:
        row = {"step": self.step, "minutes": round(self.seconds / 60, 2), **entry}
        row = {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def save(self) -> None:
        """Save the state of the run; the file is replaced atomically."""
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "random": torch.get_rng_state(),
        }
        torch.save(state, self.folder / "state.new")
        (self.folder / "state.new").replace(self.folder / "state.pt")

    def _resume(self) -> None:
        path = self.folder / "state.pt"
        if not path.is_file():
            return
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]
        torch.set_rng_state(state["random"])
        self.log(resumed=True)

    def finish(self) -> None:
        """Write the trained model as a converted folder and in the form that is shipped."""
        self.model.save_pretrained(self.folder / "model")
        shutil.rmtree(self.folder / "checkpoint", ignore_errors=True)
        native.from_transformers(self.folder / "model", self.folder / "checkpoint")

    def run(self, evaluate_minutes: float) -> None:
        """Train until the end of the schedule."""
        lessons = Lessons(self.processor, self.plan)
        lessons.clock.fill_(self.passed)
        self.model.train()
        next_score = self.seconds + 60 * evaluate_minutes
        batches = _batches(lessons, self.step)
        started = _worked()
        while self.passed < 1:
            measured = self.train_step(next(batches))
            now = _worked()
            self.seconds, started = self.seconds + now - started, now
            lessons.clock.fill_(self.passed)
            if self.step % 50 == 0:
                self.log(**measured)
            if self.seconds >= next_score:
                self.save()
                next_score = self.seconds + 60 * evaluate_minutes
                if self.passed > self.plan.first_lesson:
                    self.model.eval()
                    self.log(**score(self.model, self.processor, seed=2, number=40))
                    self.model.train()
                started = _worked()
        self.save()
        self.finish()


def _worked() -> float:
    """CPU seconds of this process per core."""
    return time.process_time() / torch.get_num_threads()


def _batches(lessons: Lessons, first: int) -> Iterator[list[dict[str, Tensor]]]:
    """Batches from a step on, prefetched by one worker process."""
    steps = range(first, len(lessons))
    return iter(DataLoader(lessons, batch_size=None, sampler=steps, num_workers=1, prefetch_factor=3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run; one that exists is continued")
    parser.add_argument("--minutes", type=float, default=Plan.minutes, help="length of the whole run")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights")
    parser.add_argument("--evaluate-minutes", type=float, default=7.0, help="time between held-out scores")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    Trainer(arguments.run, Plan(minutes=arguments.minutes), arguments.seed).run(arguments.evaluate_minutes)


if __name__ == "__main__":
    main()
