"""The miniature's world: exact answers, seeds, tokens, trees. No weights are needed."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

REPOSITORY = Path(__file__).resolve().parent.parent.parent
for folder in (REPOSITORY, REPOSITORY / "examples"):
    sys.path.insert(0, str(folder))

from miniature import native, tokenizer  # noqa: E402
from miniature.batches import PATCHES, ROUNDING_WEIGHT, BatchMaker, Mix, dense_targets, patch_of, tree_mask  # noqa: E402
from miniature.dense_heads import look_loss  # noqa: E402
from miniature.evaluate import Example, examples, judge, sampled_times  # noqa: E402
from miniature.questions import NO_TRACKS, NONE, Place, Question, ask_clip, ask_images, noun, track  # noqa: E402
from miniature.questions import point as pointing  # noqa: E402
from miniature.world import CLIP_FPS, HELD_OUT_SHAPES, Thing, make_clip, make_image  # noqa: E402
from molmo2.grounding.parse import parse_grounding  # noqa: E402


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Model and processor of an untrained miniature."""
    folder = native.write_fresh(tmp_path_factory.mktemp("fresh") / "model", seed=3)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    return model, AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def images_and_questions(number):
    for index in range(number):
        rng = np.random.default_rng([7, index])
        images = [make_image(rng) for _ in range(1 + index % 3)]
        yield images, ask_images(rng, images, 4)


def clips_and_questions(number):
    for index in range(number):
        rng = np.random.default_rng([8, index])
        clip = make_clip(rng)
        yield clip, ask_clip(rng, clip, sampled_times(clip.num_frames), 4)


def test_a_seed_draws_the_same_world_again():
    (first, asked), (again, asked_again) = (next(images_and_questions(1)) for _ in range(2))
    assert np.array_equal(first[0].pixels, again[0].pixels)
    assert asked == asked_again
    (clip, _), (same, _) = (next(clips_and_questions(1)) for _ in range(2))
    assert np.array_equal(clip.frames(), same.frames())


def test_things_are_where_the_world_says():
    for images, _ in images_and_questions(20):
        for image in images:
            height, width = image.pixels.shape[:2]
            for thing in image.things:
                if thing.kind in ("circle", "square", "cross"):  # painted at their centre
                    middle = image.pixels[int(thing.y * height), int(thing.x * width)].astype(int)
                    assert middle.max() - middle.min() > 60, thing


def test_answers_read_back_as_the_places_they_were_made_of():
    asked = [question for _, questions in images_and_questions(60) for question in questions]
    asked += [question for _, questions in clips_and_questions(40) for question in questions]
    kinds = {question.task for question in asked}
    assert kinds == {"point", "count", "number", "colour", "what", "where", "track"}
    for question in (question for question in asked if question.task in ("point", "count", "track")):
        found = parse_grounding(question.answer)
        assert not found.truncated
        assert len(found.points) == len(question.places)
        assert found.says_none == (question.answer in (NONE, NO_TRACKS)) == (not question.places)
        for point, place in zip(found.points, question.places):
            assert float(point.key) == pytest.approx(place.key)
            assert (point.x_norm, point.y_norm) == pytest.approx((place.thing.x, place.thing.y), abs=6e-4)
        if question.task == "count" and question.places:
            assert found.count == len({place.number for place in question.places})
        if question.task != "track":
            assert [point.id for point in found.points] == list(range(1, len(found.points) + 1))


def test_an_identity_stays_with_its_object_in_tracks():
    tracked = 0
    for _, questions in clips_and_questions(60):
        for question in (question for question in questions if question.task == "track"):
            ids = {}
            for point, place in zip(parse_grounding(question.answer).points, question.places):
                assert ids.setdefault(place.number, point.id) == point.id
            tracked += len(ids) > 1
    assert tracked > 5


@pytest.mark.parametrize("shape", HELD_OUT_SHAPES)
def test_a_held_out_shape_is_never_seen_or_asked_for(shape):
    seen = [thing for images, _ in images_and_questions(60) for image in images for thing in image.things]
    assert not [thing for thing in seen if thing.kind == shape]
    texts = [f"{q.text} {q.answer}" for _, questions in images_and_questions(60) for q in questions]
    assert not [text for text in texts if shape in text]
    assert noun(("red", shape), True) == f"red {shape}s"


def test_clips_leave_the_frame_and_cross():
    clips = [clip for clip, _ in clips_and_questions(60)]
    times = [sampled_times(clip.num_frames) for clip in clips]
    visible = [[{n for n, _ in clip.seen_at(time)} for time in own] for clip, own in zip(clips, times)]
    assert sum(sets[0] - sets[-1] != set() for sets in visible) > 3  # left
    assert sum(sets[-1] - sets[0] != set() for sets in visible) > 0  # entered


def test_words_and_digits_are_single_tokens_and_any_text_survives():
    backend = tokenizer.build()
    for text, tokens in (
        ("Point to the red circles.", 6),
        ('<points coords="1 1 204 655">red stars</points>', 13),
        ("Counting the ", 3),
        (" shows a total of 2.", 6),
    ):
        assert len(backend.encode(text).tokens) == tokens, backend.encode(text).tokens
    for text in ('na\u00efve \u6771\u4eac <tracks coords="0.5 1 000 1000\t1.0 1 1 2"> \n\n x', "Track the zebra!"):
        assert backend.decode(backend.encode(text).ids) == text
    assert backend.get_vocab() == tokenizer.build().get_vocab()


def as_messages(question, parts):
    return [
        {"role": "user", "content": [*parts, {"type": "text", "text": question.text}]},
        {"role": "assistant", "content": question.answer},
    ]


def test_a_branch_is_what_the_processor_makes_of_the_conversation(fresh):
    _, processor = fresh
    rng = np.random.default_rng(5)
    for batch, parts in (one_image_batch(processor, rng), one_clip_batch(processor, rng)):
        shared = int((batch["branches"][0] == 0).sum())
        for branch, question in enumerate(parts[1], start=1):
            whole = processor.apply_chat_template(
                as_messages(question, parts[0]), tokenize=True, return_dict=True, return_tensors="pt"
            )
            own = batch["branches"][0] == branch
            ids = torch.cat([batch["input_ids"][0, :shared], batch["input_ids"][0, own]])
            assert torch.equal(ids, whole["input_ids"][0])
            assert torch.equal(batch["position_ids"][0, own], shared + torch.arange(int(own.sum())))
            for name in set(whole) & set(batch) - {"input_ids"}:
                assert torch.equal(batch[name], whole[name]), name


def one_image_batch(processor, rng):
    state = rng.bit_generator.state
    batch = BatchMaker(processor).images(rng, 1, Mix(tiled=1.0, branches=3))
    rng.bit_generator.state = state
    image = make_image(rng, tiled=1.0)
    return batch, ([{"type": "image", "image": image.pixels}], ask_images(rng, [image], 3))


def one_clip_batch(processor, rng):
    state = rng.bit_generator.state
    batch = BatchMaker(processor).clips(rng, 1, Mix(branches=4))
    rng.bit_generator.state = state
    clip = make_clip(rng, max_things=3)
    metadata = {"fps": float(CLIP_FPS), "total_num_frames": clip.num_frames}
    part = {"type": "video", "video": clip.frames(), "video_metadata": metadata}
    return batch, ([part], ask_clip(rng, clip, sampled_times(clip.num_frames), 2))


def test_a_tree_gives_the_logits_of_its_branches_alone(fresh):
    model, processor = fresh
    batch, (parts, questions) = one_image_batch(processor, np.random.default_rng(6))
    is_visual = torch.isin(batch["input_ids"], torch.tensor(processor.image_token_ids))
    names = ("pixel_values", "image_token_pooling", "image_grids", "image_num_crops")
    with torch.inference_mode():
        tree = model(
            input_ids=batch["input_ids"],
            attention_mask=tree_mask(batch["branches"], is_visual),
            position_ids=batch["position_ids"],
            **{name: batch[name] for name in names},
        ).logits[0]
        for branch, question in enumerate(questions, start=1):
            whole = processor.apply_chat_template(
                as_messages(question, parts), tokenize=True, return_dict=True, return_tensors="pt"
            )
            alone = model(**whole).logits[0]
            own = (batch["branches"][0] == 0) | (batch["branches"][0] == branch)
            torch.testing.assert_close(tree[own], alone, atol=2e-4, rtol=2e-4)


def test_only_answers_are_taught_and_last_digits_count_less(fresh):
    _, processor = fresh
    answer = '<points coords="1 1 204 655">ring</points>'
    question = Question("point", "Point to the ring.", answer)
    _, branch = BatchMaker(processor).tree("", [question], {}, np.empty((0, 4), dtype=int))
    usual = 4 / len([weight for weight in branch.weights if weight]) ** 0.5
    taught = [
        (processor.tokenizer.decode([number]), round(weight / usual, 6))
        for number, weight in zip(branch.ids, branch.weights)
        if weight
    ]
    expected = [('<points coords="', 1), ("1", 1), (" 1", 1), (" 2", 1), ("0", 1), ("4", ROUNDING_WEIGHT)]
    expected += [(" 6", 1), ("5", 1), ("5", ROUNDING_WEIGHT), ('">', 1), ("ring", 1), ("</points>", 1)]
    assert taught == [*expected, ("<|im_end|>", 1)]


def test_a_head_is_shown_the_things_that_are_asked_about(fresh):
    """From the end of the question to all of them, from each coordinate to its own; or to the start."""
    _, processor = fresh
    rng = np.random.default_rng(8)
    image = make_image(rng, tiled=0.0, kinds=[("red", "ring"), ("blue", "ring"), ("red", "cross")])
    places = {(1, number): patch_of(thing) for number, thing in enumerate(image.things)}
    found = [Place(1, number, thing) for number, thing in enumerate(image.things)]
    rings = pointing((None, "ring"), found[:2], True)
    windows = np.arange(PATCHES)[:, None]  # every token is one patch
    shared, *branches = BatchMaker(processor).tree(
        "".join(["<im_patch>"] * PATCHES), [rings, pointing(("green", None), [], False)], places, windows
    )
    first, second = sorted(branches, key=lambda branch: branch.branch)
    spots = {place.number: 1 + patch_of(place.thing) for place in rings.places}
    assert set(shared.ids[1:]) == {processor.tokenizer.convert_tokens_to_ids("<im_patch>")}
    assert [sorted(spots) for spots in first.named.values()] == [sorted(spots.values())]
    assert [processor.tokenizer.decode([first.ids[position]]) for position in first.named] == ["."]
    assert list(second.named.values()) == [[0]] == list(second.written.values())
    looked = {position + 1: spot for position, (spot, *_) in list(first.written.items())[1:]}
    digits = "".join(processor.tokenizer.decode([first.ids[position]]) for position in looked).split()
    assert digits == [number for place in rings.places for number in _written(place)]
    assert list(looked.values()) == [spots[place.number] for place in rings.places for _ in range(6)]


def _written(place):
    return [f"{round(1000 * value):03d}" for value in (place.thing.x, place.thing.y)]


def test_the_loss_of_looks_falls_to_nothing_for_a_head_that_looks_there():
    allowed = torch.ones(1, 3, 3, dtype=torch.bool).tril()
    wanted = torch.zeros(1, 3, 3, dtype=torch.bool)
    wanted[0, 2, 1] = True
    key = torch.eye(3)[None]
    there, away = (20 * torch.eye(3)[[0, 0, index]][None] for index in (1, 0))
    loss, share = look_loss(there, key, 1.0, allowed, wanted)
    assert (float(loss), share) == (pytest.approx(0, abs=1e-6), pytest.approx(1))
    assert float(look_loss(away, key, 1.0, allowed, wanted)[0]) == pytest.approx(20, abs=1e-3)


def test_dense_targets_name_the_patch_of_each_centre():
    targets = dense_targets(2, {1: [Thing("green", "ring", 0.5, 0.16, 0.1)]})
    assert (targets[0, :, 0] == -1).all()
    assert targets[1, :, 0].sum() == 1
    assert targets[1, 1 * 7 + 3].tolist() == [1, 3, 4, 5, 0, 1, 6]


def test_perfect_answers_score_full_marks_and_others_do_not(fresh):
    _, processor = fresh
    asked = examples(seed=11, number=60)
    perfect = judge(processor, asked, [example.question.answer for example in asked])
    for name, value in perfect.items():
        is_error = "track error" in name or "superfluous" in name
        assert value == pytest.approx(0 if is_error else 1, abs=6e-4), name
    silent = judge(processor, asked, ["I do not know."] * len(asked))
    assert silent["pointing"] == silent["count"] == silent["none"] == silent["colour"] == silent["what"] == 0
    assert silent["track error"] == 0.5


def test_numbers_of_tracks_are_names(fresh):
    """Two objects whose numbers are exchanged are tracked well; those that exchange them halfway are not."""
    _, processor = fresh
    left, right = (Thing("red", "ring", x, 0.5, 0.1) for x in (0.2, 0.7))
    places = [Place(time, number, thing) for time in (0.0, 0.5) for number, thing in enumerate((left, right))]
    asked = [Example(track((None, "ring"), places, True), ({"type": "video"},))]
    exchanged = '<tracks coords="0.0 1 700 500 2 200 500\t0.5 1 700 500 2 200 500">rings</tracks>'
    found = judge(processor, asked, [exchanged])
    assert (found["track error"], found["track found"]) == (pytest.approx(0, abs=1e-6), 1)
    assert found["track error, numbers as written"] == pytest.approx(0.5)
    halfway = exchanged.replace("0.5 1 700 500 2 200", "0.5 1 200 500 2 700")
    assert judge(processor, asked, [halfway])["track error"] == pytest.approx(0.25)
