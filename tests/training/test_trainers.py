"""Whole runs with `Trainer`, TRL and PEFT: the loss falls, the steps are right, the checkpoints load again."""

import importlib
import importlib.util
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

import molmo2
from molmo2.training import (
    DataCollator,
    LearningRates,
    PackedDataset,
    Packer,
    PreferenceCollator,
    TokenWeighting,
    build_training_example,
    freeze,
    lora_targets,
    trainer_class,
)
from support.checkpoints import REPOSITORY, make_image, module_cache, write_checkpoint
from support.fresh_process import run
from support.random_miniature import write_miniature
from support.training_cases import CLIP, IMAGE, turn

for place in (REPOSITORY, REPOSITORY / "examples"):
    sys.path.insert(0, str(place))

from miniature import native  # noqa: E402

pytestmark = pytest.mark.slow

ROWS = [
    {"messages": turn("What is this?", "A red boat.", IMAGE)},
    {"messages": turn("What happens?", "It sails.", CLIP)},
    {"messages": turn("Name a number.", "Seven.")},
    {"messages": [turn("Where?", "Here.", IMAGE), turn("Why?", "No reason.")]},
]


@pytest.fixture(scope="module", params=["tiny", "miniature"])
def folder(request, tmp_path_factory):
    """A few random weights in the published layout, and the miniature that knows something."""
    target = tmp_path_factory.mktemp(request.param) / "checkpoint"
    if request.param == "tiny":
        return write_checkpoint(target, "qwen3")
    return native.to_transformers(native.CHECKPOINT, target)


@pytest.fixture(scope="module", autouse=True)
def _modules(tmp_path_factory):
    with module_cache(tmp_path_factory.mktemp("modules")):
        yield


@pytest.fixture(autouse=True)
def _precision(monkeypatch):
    """Some releases pass on the precision of one run to the next in the environment."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


@pytest.fixture
def model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def arguments(folder: Path, **settings: Any) -> dict[str, Any]:
    """Arguments of a short run on the CPU."""
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 12,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "bf16": False,  # TRL's default is True, and the trained model would continue in mixed precision
        **settings,
    }


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def require_falling(trainer, share: float = 0.7) -> None:
    first, last = np.mean(losses(trainer)[:3]), np.mean(losses(trainer)[-3:])
    assert last < share * first, losses(trainer)


def answers(model, processor) -> torch.Tensor:
    inputs = DataCollator(processor)(ROWS)
    with torch.no_grad():
        return model.eval()(**inputs).logits


def require_reloads(checkpoint: Path, trained) -> Any:
    """The checkpoint alone gives the processor and the model that were trained."""
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    again = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True)
    torch.testing.assert_close(answers(again, processor), answers(trained, processor))
    return processor


def test_trainer(model, processor, tmp_path):
    """Rows of a data set: images, a clip, text, a tree; the checkpoint includes the processor."""
    settings = TrainingArguments(**arguments(tmp_path, save_strategy="steps", save_steps=12))
    trainer = Trainer(model, settings, DataCollator(processor), ROWS, processing_class=processor)
    trainer.train()
    require_falling(trainer)
    again = require_reloads(tmp_path / "checkpoint-12", model)
    assert again.chat_template == processor.chat_template
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()

    settings = TrainingArguments(**arguments(tmp_path, max_steps=14))
    trainer = Trainer(model, settings, DataCollator(processor), ROWS, processing_class=processor)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert trainer.state.global_step == 14


def test_trainer_keeps_the_columns_of_built_examples(model, processor, tmp_path):
    rows = [build_training_example(processor, row["messages"], weighting=TokenWeighting()) for row in ROWS]
    settings = TrainingArguments(**arguments(tmp_path, remove_unused_columns=True))
    trainer = trainer_class(Trainer)(model, settings, DataCollator(processor, padding_side="left"), rows)
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    trainer.train()
    assert {"labels", "loss_weights", "branch_ids", "pixel_values", "token_type_ids"} <= set().union(*seen)
    require_falling(trainer)


def test_trainer_on_packed_rows_in_bfloat16(model, processor, tmp_path):
    packer = Packer(max_tokens=250, max_crops=12, pool_size=4)
    dataset = PackedDataset(ROWS * 8, packer, processor)
    settings = TrainingArguments(
        **arguments(
            tmp_path,
            per_device_train_batch_size=1,
            bf16=True,
            gradient_checkpointing=True,
            accelerator_config={"dispatch_batches": False},
        )
    )
    trainer = Trainer(model, settings, DataCollator(processor), dataset)
    trainer.train()
    assert packer.report.examples > packer.report.rows
    require_falling(trainer)


def examples_with_weights(processor, weighted: tuple[bool, ...]) -> list[dict[str, torch.Tensor]]:
    weightings = [TokenWeighting() if own else None for own in weighted]
    return [
        build_training_example(processor, row["messages"], weighting=own)
        for row, own in zip(ROWS, weightings, strict=False)
    ]


def weights_after_a_step(folder: Path, processor, trainer, weighted: tuple[bool, ...], **settings: Any):
    """All weights of the model after one step of SGD on examples with weights or without.

    In float64, attention too: float32 sums in another order differ by more than the tolerance in one of a million
    weights.
    """
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64)
    for module in model.modules():
        if hasattr(module, "float32_attention"):
            module.float32_attention = False
    options = {"optim": "sgd", "max_steps": 1, "learning_rate": 0.1, "max_grad_norm": 0.0, **settings}
    own = TrainingArguments(**arguments(folder.parent / "run", lr_scheduler_type="constant", **options))
    trainer(model, own, DataCollator(processor), examples_with_weights(processor, weighted)).train()
    return dict(model.named_parameters())


@pytest.mark.parametrize("weighted", [(True, True, True), (False, True, True), (True, False, False)])
def test_accumulated_batches_are_one_weighted_batch(folder, processor, weighted):
    """Divided by the sum of the weights of the whole step, however it is cut; without weights a label counts 1."""
    trainer = trainer_class(Trainer)
    whole = weights_after_a_step(folder, processor, trainer, weighted, per_device_train_batch_size=3)
    parts = weights_after_a_step(
        folder, processor, trainer, weighted, per_device_train_batch_size=1, gradient_accumulation_steps=3
    )
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("weighted", [True, False])
def test_every_process_takes_part_in_the_sum_of_weights(model, processor, tmp_path, monkeypatch, weighted):
    """Also one whose batches have no weights: another process has 10 targets of weight 0.5."""
    batch = DataCollator(processor)(examples_with_weights(processor, (weighted,)))
    trainer = trainer_class(Trainer)(model, TrainingArguments(**arguments(tmp_path)))
    monkeypatch.setattr(trainer.accelerator, "gather", lambda own: torch.cat([own, torch.tensor([5.0, 10.0])]))
    labels = int((batch["labels"] != -100).sum())
    own = batch["loss_weights"].sum() if weighted else labels
    monkeypatch.setattr(Trainer, "get_batch_samples", lambda *_: ([batch], torch.tensor(labels + 10)))
    _, number = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    assert float(number) == pytest.approx(float(own) + 5)


@pytest.mark.parametrize("kind", ["prompt", "messages"])
def test_answers_that_are_no_targets_in_some_rows(model, processor, tmp_path, kind):
    """No weights are asked for: an earlier answer of a prompt has weight 0, other rows have none."""
    talk = [*turn("Hello.", "Hi.", loss_weight=0), *turn("Name a number.", "Seven.")]
    rows = [{"messages": talk}, ROWS[2]]
    if kind == "prompt":
        rows = [{"prompt": [*turn("Hello.", "Hi."), talk[2]], "completion": talk[3:]}, ROWS[2]]
    settings = TrainingArguments(
        **arguments(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=1)
    )
    trainer = trainer_class(Trainer)(model, settings, DataCollator(processor), rows)
    trainer.train()
    with torch.no_grad():
        expected = AutoModelForImageTextToText.from_pretrained(model.config._name_or_path, trust_remote_code=True)(
            **DataCollator(processor)(rows)
        ).loss
    assert losses(trainer)[0] == pytest.approx(float(expected), abs=1e-3)


def test_the_evaluation_loss_is_the_weighted_one(model, processor, tmp_path):
    examples = examples_with_weights(processor, (True, True, True))
    settings = TrainingArguments(**arguments(tmp_path, per_device_eval_batch_size=3))
    collate = DataCollator(processor)
    trainer = trainer_class(Trainer)(model, settings, collate, eval_dataset=examples)
    with torch.no_grad():
        expected = model.eval()(**collate(examples)).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), abs=1e-4)


def test_trainer_class_refuses_smoothed_labels(model, processor, tmp_path):
    settings = TrainingArguments(**arguments(tmp_path, label_smoothing_factor=0.1))
    with pytest.raises(ValueError, match=r"`label_smoothing_factor` is 0\.1; expected 0"):
        trainer_class(Trainer)(model, settings, DataCollator(processor), ROWS)


def test_trainer_with_a_rate_for_each_part(model, processor, tmp_path):
    freeze(model, "vision")
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    rates = LearningRates(connector=2e-3, text=1e-3)
    settings = TrainingArguments(**arguments(tmp_path, lr_scheduler_type="constant", max_steps=2))
    trainer = trainer_class(Trainer, rates)(model, settings, DataCollator(processor), ROWS)
    trainer.train()
    groups = trainer.optimizer.param_groups
    assert [(group["name"], group["lr"], group["betas"]) for group in groups] == [
        ("connector", 2e-3, (0.9, 0.95)),
        ("text", 1e-3, (0.9, 0.95)),
    ]
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) == (".image_vit." in name), name


@pytest.mark.parametrize("optimizer", ["sgd", "adafactor"])
def test_rates_of_parts_for_other_optimizers(model, processor, tmp_path, optimizer):
    """They have no `betas`."""
    rates = LearningRates(connector=2e-3)
    settings = TrainingArguments(**arguments(tmp_path, optim=optimizer, max_steps=1))
    trainer = trainer_class(Trainer, rates)(model, settings, DataCollator(processor), ROWS)
    trainer.train()
    rates_of = {group["name"]: group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert rates_of["connector"] == 2e-3


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 2]])
def test_predictions_are_logits(model, processor, tmp_path, order):
    """Whichever batches have images."""
    seen = []

    def count(evaluation) -> dict[str, int]:
        seen.append(evaluation.predictions)
        return {"rows": len(evaluation.label_ids)}

    settings = TrainingArguments(**arguments(tmp_path, per_device_eval_batch_size=1))
    rows = [ROWS[number] for number in order]
    trainer = Trainer(model, settings, DataCollator(processor), eval_dataset=rows, compute_metrics=count)
    predicted = trainer.predict(rows).predictions
    assert trainer.evaluate()["eval_rows"] == len(rows)
    assert np.array_equal(seen[-1], predicted)
    for row, logits in zip(rows, predicted, strict=True):
        with torch.no_grad():
            expected = model.eval()(**DataCollator(processor)([row])).logits[0].numpy()
        np.testing.assert_allclose(logits[: len(expected)], expected, atol=1e-5)
        assert (logits[len(expected) :] == -100).all()


# --- data sets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("num_shards", [None, 1, 4])
def test_every_example_of_a_stream_arrives_once(processor, num_shards, workers):
    """A data set in memory is divided among workers by the packer, a stream by itself."""
    rows = [{"input_ids": [number] * 5, "labels": [number] * 5} for number in range(24)]
    source = pytest.importorskip("datasets").Dataset.from_list(rows)
    if num_shards is not None:
        source = source.to_iterable_dataset(num_shards=num_shards)
    dataset = PackedDataset(source, Packer(max_tokens=20, max_crops=1))
    packs = DataLoader(dataset, batch_size=None, num_workers=workers)
    assert sorted(example["input_ids"][0] for pack in packs for example in pack.examples) == list(range(24))


def test_built_examples_of_a_data_set_are_packed(processor):
    """Stored as lists, with null for what a row lacks."""
    built = [build_training_example(processor, row["messages"]) for row in ROWS]
    columns = {name: None for own in built for name in own}  # a list of rows has those of its first one
    rows = [{**columns, **{name: value.tolist() for name, value in own.items()}} for own in built]
    stored = pytest.importorskip("datasets").Dataset.from_list(rows)
    assert stored[2]["pixel_values"] is None
    packs = [list(PackedDataset(source, Packer(max_tokens=800, max_crops=40))) for source in (stored, built)]
    found, expected = (DataCollator(processor)(own) for own in packs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_columns_that_are_not_decoded(processor, kind):
    """`Image(decode=False)` and `Video(decode=False)` hold {"bytes", "path"}."""
    datasets = pytest.importorskip("datasets")
    file = REPOSITORY / "examples" / "data" / {"image": "nasa_frame.jpg", "video": "nasa_clip.mp4"}[kind]
    part = {"type": kind}
    row = {"messages": turn("What is this?", "A red boat.", part), kind: str(file)}
    row["messages"][1]["content"] = [{"type": "text", "text": "A red boat."}]
    feature = {"image": datasets.Image, "video": datasets.Video}[kind](decode=False)
    columns = datasets.Dataset.from_list([row]).cast_column(kind, feature)
    stored = columns[0]
    assert stored[kind].keys() == {"bytes", "path"}
    in_memory = {**stored, kind: {"bytes": file.read_bytes(), "path": None}}
    expected = DataCollator(processor)([row])
    for own in (stored, in_memory):
        found = DataCollator(processor)([own])
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


# --- TRL and PEFT ----------------------------------------------------------------------------------------------------


def trl_rows() -> list[dict[str, Any]]:
    """Rows in TRL's form: images in a column of their own."""
    asked = (("What is this?", "A red boat.", 0), ("What is that?", "A blue house.", 1))
    return [
        {
            "images": [make_image(70, 90, seed)],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ],
        }
        for question, answer, seed in asked
    ]


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl")


@pytest.fixture
def dataset():
    return pytest.importorskip("datasets").Dataset.from_list(trl_rows())


def answers_alone_collator() -> type:
    """TRL's collator for images, where it can learn answers alone; older ones cannot."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    if "assistant_only_loss" not in DataCollatorForVisionLanguageModeling.__dataclass_fields__:
        pytest.skip("this release of TRL learns questions too where there are images")
    return DataCollatorForVisionLanguageModeling


@pytest.mark.parametrize("own_collator", [False, True])
def test_sft_trainer(trl, dataset, model, processor, tmp_path, own_collator):
    """TRL's path for vision-language models, with its collator or ours."""
    if not own_collator:
        answers_alone_collator()
    config = trl.SFTConfig(
        **arguments(
            tmp_path, save_strategy="steps", save_steps=12, max_length=None, assistant_only_loss=not own_collator
        )
    )
    collator = DataCollator(processor) if own_collator else None
    trainer = trl.SFTTrainer(model, config, train_dataset=dataset, processing_class=processor, data_collator=collator)
    trainer.train()
    require_falling(trainer)
    require_reloads(tmp_path / "checkpoint-12", model)


def test_the_collators_agree(trl, processor):
    """On conversations about images, TRL's labels on answers alone are ours."""
    found = answers_alone_collator()(processor, assistant_only_loss=True)(trl_rows())
    expected = DataCollator(processor)(trl_rows())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def preferences(kind: str) -> Any:
    """Preferences in TRL's form, about images or clips; an empty column `images` leaves them to a collator."""

    def said(role: str, text: str, *parts: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"role": role, "content": [*parts, {"type": "text", "text": text}]}]

    clip = str(REPOSITORY / "examples" / "data" / "nasa_clip.mp4")
    media = {"image": {"images": [make_image(70, 90)]}, "video": {"videos": [clip], "images": []}}[kind]
    row = {
        "prompt": said("user", "What is this?", {"type": kind}),
        "chosen": said("assistant", "A red boat."),
        "rejected": said("assistant", "A house at the sea."),
    }
    return pytest.importorskip("datasets").Dataset.from_list([{**row, **media}, {**row, **media}])


@pytest.fixture
def architecture_names(monkeypatch):
    """What `molmo2.load` sets there is taken back."""
    import transformers

    for name in ("Molmo2ForConditionalGeneration", "Molmo2Model"):
        monkeypatch.setattr(transformers, name, getattr(transformers, name, None), raising=False)


@pytest.mark.parametrize(
    ("kind", "own_collator", "is_remote"),
    [("image", False, False), ("video", True, False), ("image", False, True)],
)
def test_dpo_begins_with_two_equal_models(trl, tmp_path, architecture_names, kind, own_collator, is_remote):
    """The first loss is ln 2: the reference, which TRL makes by the name of the architecture, reads media alike."""
    if not hasattr(importlib.import_module("trl.trainer.dpo_trainer"), "DataCollatorForVisionPreference"):
        pytest.skip("this release of TRL passes on the inputs of some models alone")
    folder, options = write_checkpoint(tmp_path / "tiny", "qwen3"), {}
    if is_remote:
        model, reference = (
            AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True) for _ in range(2)
        )
        processor, options["ref_model"] = AutoProcessor.from_pretrained(folder, trust_remote_code=True), reference
    else:
        model, processor = molmo2.load(folder)
    settings = trl.DPOConfig(**arguments(tmp_path, max_steps=1, max_length=None))
    trainer = trl.DPOTrainer(
        model,
        args=settings,
        train_dataset=preferences(kind),
        processing_class=processor,
        data_collator=PreferenceCollator(processor) if own_collator else None,
        **options,
    )
    assert type(trainer.ref_model) is type(model)
    trainer.train()
    assert losses(trainer) == [pytest.approx(np.log(2), abs=1e-4)]


def test_preferences_are_batched_answer_by_answer(processor):
    rows = preferences("video").to_list()
    rows[0]["messages"] = turn("Another question.", "Another answer.")  # what other trainers read of such a row
    batch = PreferenceCollator(processor)(rows)
    decoded = [
        processor.tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    assert decoded == ["A red boat.<|im_end|>"] * 2 + ["A house at the sea.<|im_end|>"] * 2
    assert len(batch["video_grids"]) == 4
    with pytest.raises(ValueError, match=r"`prompt`, `chosen` and `rejected`; missing here: \['chosen'\]"):
        PreferenceCollator(processor)([{**rows[0], "chosen": None}])


def test_trainers_that_are_given_a_folder_take_the_package(tmp_path):
    """`SFTTrainer("folder")` and `create_model_from_path`, once the package is registered; in a process of its own."""
    pytest.importorskip("trl")
    write_checkpoint(tmp_path / "tiny", "qwen3", remote_code=False)
    report = run("trainer_of_folder", tmp_path, folder=tmp_path / "tiny", target=tmp_path / "out")
    if "skipped" in report:
        pytest.skip(report["skipped"])
    assert report == {
        "create_model_from_path": "molmo2.model.modeling",
        "SFTTrainer": ["molmo2.model.modeling", "molmo2.processing.processor"],
    }


def test_sft_trainer_with_adapters_weights_and_rates(trl, dataset, model, processor, tmp_path):
    peft = pytest.importorskip("peft")
    targets = lora_targets("text", "connector")
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer = trainer_class(trl.SFTTrainer, LearningRates(connector=1e-2, text=2e-2))(
        model,
        trl.SFTConfig(**arguments(tmp_path, max_length=None, save_strategy="steps", save_steps=12)),
        train_dataset=dataset,
        processing_class=processor,
        data_collator=DataCollator(processor, weighting=TokenWeighting()),
        peft_config=peft.LoraConfig(r=4, target_modules=targets),
    )
    trainer.train()
    require_falling(trainer)
    assert {group["name"] for group in trainer.optimizer.param_groups} == {"connector", "text"}
    for name, value in trainer.model.get_base_model().named_parameters():
        if ".lora_" not in name:
            assert torch.equal(value, before[name.replace(".base_layer", "")])
    checkpoint = tmp_path / "checkpoint-12"
    assert AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True).chat_template == processor.chat_template
    fresh = AutoModelForImageTextToText.from_pretrained(model.config._name_or_path, trust_remote_code=True)
    again = peft.PeftModel.from_pretrained(fresh, checkpoint)
    torch.testing.assert_close(answers(again, processor), answers(trainer.model, processor))


@pytest.mark.parametrize("parts", [("text",), ("vision",), ()])
def test_adapters_are_trained_with_gradient_checkpointing(model, processor, tmp_path, parts):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=lora_targets(*parts), init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    before = {name: value.detach().clone() for name, value in adapted.named_parameters() if value.requires_grad}
    settings = TrainingArguments(**arguments(tmp_path, gradient_checkpointing=True, max_steps=1))
    Trainer(adapted, settings, DataCollator(processor), ROWS[:2]).train()
    after = dict(adapted.named_parameters())
    assert not [name for name, value in before.items() if torch.equal(value, after[name])]


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_runs_as_written(tmp_path, monkeypatch, capsys):
    """`py` blocks need TRL and run where it is; `print(...)  # text` prints that text."""
    page = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(python|py)\n(.*?)^```", page, re.M | re.S)
    assert len(blocks) == 11
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
        monkeypatch.setenv(name, value)  # as torchrun does it, for the block that begins a process group
    write_miniature(tmp_path / "Molmo2-4B")
    shutil.copy(REPOSITORY / "examples" / "data" / "nasa_frame.jpg", tmp_path / "boats.jpg")
    shutil.copy(REPOSITORY / "examples" / "data" / "nasa_clip.mp4", tmp_path / "penguins.mp4")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for language, block in blocks:
        if language == "py" and importlib.util.find_spec("trl") is None:
            continue
        exec(compile(block, "training.md", "exec"), names)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        printed = capsys.readouterr().out.splitlines()
        for line in re.findall(r"^print\(.*\)(?:  |\n)# (.*)$", block, re.M):
            assert line in printed
