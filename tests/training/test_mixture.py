"""Mixtures: rates by formula, every example once an epoch, shares of processes, streams that are continued exactly."""

import itertools
import json
from collections import Counter

import pytest
import torch
from transformers import Trainer, TrainingArguments

from molmo2.data import Mixture, MixtureState, Source, mixture_rates
from molmo2.data.mixture import SFT_GROUPS
from molmo2.training import DataCollator, PackedMixture, Packer, SaveMixture, packed_mixture, resume_mixture
from support.checkpoints import build_model
from support.model_inputs import processor
from support.training_cases import turn


def sized(name, number, tokens=10):
    """Built examples of different lengths that say where they come from."""
    return [
        {
            "input_ids": torch.zeros(tokens + place % 7),
            "labels": torch.zeros(tokens + place % 7),
            "name": (name, place),
        }
        for place in range(number)
    ]


SOURCES = [
    Source("a", sized("a", 100), "points"),
    Source("b", sized("b", 25), "points"),
    Source("c", sized("c", 9), "demo"),
    Source("d", sized("d", 4), "demo", size=36),
]


def test_rates():
    """Roots are 10, 5, 3 and, for d, 6 in place of 2."""
    assert mixture_rates(SOURCES) == pytest.approx({"a": 10 / 24, "b": 5 / 24, "c": 3 / 24, "d": 6 / 24})
    rates = mixture_rates(SOURCES, {"points": 3, "demo": 1})
    assert rates == pytest.approx({"a": 0.5, "b": 0.25, "c": 1 / 12, "d": 1 / 6})
    assert SFT_GROUPS == {  # of the released script; they add up to 1.1
        "demo": 0.15,
        "video_academic": 0.20,
        "image_academic": 0.25,
        "tracking": 0.15,
        "video_pointing": 0.15,
        "image_pointing": 0.10,
        "nlp": 0.10,
    }
    one_each = [Source(group, [1], group) for group in SFT_GROUPS]
    assert mixture_rates(one_each, SFT_GROUPS)["image_academic"] == pytest.approx(0.25 / 1.1)


def test_draws_follow_the_rates_and_see_every_example_before_one_again():
    drawn = list(itertools.islice(Mixture(SOURCES).draws(MixtureState()), 4000))
    counts = Counter(each.source for each in drawn)
    for name, rate in mixture_rates(SOURCES).items():
        assert counts[name] / 4000 == pytest.approx(rate, abs=0.03)
    for source in SOURCES:
        own = [each for each in drawn if each.source == source.name]
        size = len(source.examples)
        epochs = [own[start : start + size] for start in range(0, len(own) - size + 1, size)]
        assert len(epochs) > 1
        assert all(sorted(each.place for each in epoch) == list(range(size)) for epoch in epochs)
        assert [epoch[0].epoch for epoch in epochs] == list(range(len(epochs)))
    assert len({tuple(each.place for each in drawn if (each.source, each.epoch) == ("c", n)) for n in range(9)}) > 5


def test_epochs_are_passed_on():
    class Drawing(list):
        epoch = 0

        def __getitem__(self, place):
            return self.epoch, place

    stream = iter(Mixture([Source("a", Drawing([0, 0]))]))
    assert [epoch for epoch, _ in itertools.islice(stream, 6)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("sources", "groups", "message"),
    [
        ([], None, "sources with names of their own"),
        ([SOURCES[0], SOURCES[0]], None, "sources with names of their own"),
        ([Source("a", [])], None, "0 examples"),
        ([Source("a", [1], size=0)], None, "counts as 0"),
        (SOURCES, {"points": 1}, r"\['demo'\] is only in one"),
        (SOURCES, {"points": 1, "demo": 1, "nlp": 1}, r"\['nlp'\] is only in one"),
        (SOURCES, {"points": 1, "demo": 0}, "a share above 0"),
    ],
)
def test_mixtures_that_are_refused(sources, groups, message):
    with pytest.raises(ValueError, match=message):
        Mixture(sources, groups)


# --- packed ----------------------------------------------------------------------------------------------------------


def packed(number=0, count=1, seed=0, **options):
    packer = Packer(60, 10, pool_size=8)
    return PackedMixture(Mixture(SOURCES, seed=seed), packer, process_index=number, num_processes=count, **options)


def names(rows, number):
    return [[example["name"] for example in pack.examples] for pack in itertools.islice(iter(rows), number)]


@pytest.mark.parametrize("stop", [0, 1, 7, 30])
def test_a_run_is_continued_with_the_very_next_row(stop):
    """Also from the state of a row that a trainer had not trained on yet, and after JSON."""
    whole = packed()
    expected = names(whole, 40)
    first = packed()
    assert names(first, stop + 3) == expected[: stop + 3]
    state = json.loads(json.dumps(first.state_dict(stop)))
    assert state["rows"] == stop
    continued = packed()
    continued.load_state_dict(state)
    assert names(continued, 40 - stop) == expected[stop:]
    assert continued.packer.report == whole.packer.report
    assert continued.state_dict() == whole.state_dict()


def test_a_second_pass_continues():
    rows = packed()
    assert names(rows, 5) + names(rows, 5) == names(packed(), 10)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_processes_share_the_draws(count):
    """Process k has every n-th draw: together they have all, each once."""

    def drawn(number, count, length):
        rows = packed(number, count)
        return [example["drawn"] for example in itertools.islice(rows._examples(number, count), length)]

    shares = [drawn(number, count, 20) for number in range(count)]
    assert [each for together in zip(*shares) for each in together] == drawn(0, 1, 20 * count)
    with pytest.raises(ValueError, match="no process 2 of 2"):
        packed(2, 2)


@pytest.mark.parametrize("other", [{"seed": 1}, {"number": 1, "count": 2}])
def test_states_of_others_are_refused(other):
    with pytest.raises(ValueError, match="start anew"):
        packed(**other).load_state_dict(packed().state_dict())


def test_states_that_are_not_known():
    rows = packed()
    names(rows, 300)
    with pytest.raises(ValueError, match="behind 3 rows is not known; those behind 45 to 300 are"):
        rows.state_dict(3)


def test_rows_are_built_and_collated():
    texts = [{"messages": turn("Name a number.", str(number))} for number in range(20)]
    rows = PackedMixture(Mixture([Source("texts", texts)]), Packer(120, 4), processor())
    first, second = itertools.islice(iter(rows), 2)
    batch = DataCollator(processor())([first, second])
    assert batch["example_ids"].max() > 0
    state = rows.state_dict(1)
    rows.load_state_dict(state)
    (again,) = itertools.islice(iter(rows), 1)
    assert all(
        torch.equal(one["input_ids"], other["input_ids"]) for one, other in zip(again.examples, second.examples)
    )


# --- in a trainer ----------------------------------------------------------------------------------------------------


def trainer(folder, max_steps=4, **settings):
    """A trainer on the tiny model, and its stream."""
    texts = [{"messages": turn("Name a number.", "one " * (1 + number % 5))} for number in range(20)]
    stream = PackedMixture(Mixture([Source("texts", texts)]), Packer(120, 4, pool_size=6), processor())
    defaults = {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 1,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "ignore_data_skip": True,
        "report_to": [],
        "use_cpu": True,
        "accelerator_config": {"dispatch_batches": False},
    }
    arguments = TrainingArguments(str(folder), max_steps=max_steps, **{**defaults, **settings})
    model = build_model("qwen3")
    return Trainer(model, arguments, DataCollator(processor()), stream, callbacks=[SaveMixture(stream)]), stream


def losses(run):
    return {entry["step"]: entry["loss"] for entry in run.state.log_history if "loss" in entry}


@pytest.mark.slow
def test_a_trainer_continues_with_the_very_next_row(tmp_path):
    whole, stream = trainer(tmp_path / "whole")
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    stopped = json.loads((checkpoint / "mixture_state.json").read_text())
    assert stopped["rows"] == 4 < stream.state_dict()["rows"]
    continued, own = trainer(tmp_path / "continued")
    resume_mixture(own, checkpoint)
    continued.train(resume_from_checkpoint=str(checkpoint))
    assert set(losses(whole)) == {1, 2, 3, 4}
    assert losses(continued) == losses(whole)
    assert own.state_dict(8) == stream.state_dict(8)


def test_large_steps_keep_more_states(tmp_path, monkeypatch):
    monkeypatch.setattr(packed_mixture, "KEPT_STATES", 2)
    run, stream = trainer(tmp_path, gradient_accumulation_steps=2)
    SaveMixture(stream).on_train_begin(run.args, run.state, run.control)
    for _ in zip(range(8), stream):
        pass
    assert stream.state_dict(1)["rows"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ignore_data_skip": False}, "ignore_data_skip=True"),
        ({"dataloader_num_workers": 1}, "dataloader_num_workers=0"),
    ],
)
def test_settings_that_would_lose_the_place(settings, message, tmp_path):
    run, stream = trainer(tmp_path, **settings)
    with pytest.raises(ValueError, match=message):
        run.train()
    with pytest.raises(FileNotFoundError, match="saved without `SaveMixture`"):
        resume_mixture(stream, tmp_path)
