"""Every recorded processor call, repeated on `Molmo2Processor` and compared whole with what the original returned.

Where this code departs from the original on purpose, the case has a row in `DEPARTURES`: what happens instead, as a
check, and why. There is no third kind: a case either equals its recording or has a row.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from support.golden_cases import (
    HAS_FULL_SET,
    GoldenCase,
    assert_pixels_close,
    processor_cases,
    to_numpy,
)
from support.golden_processor import corrected, decode, encode, generated_processor, tokenizer, with_bos

IMAGES = ("pixel_values", "image_token_pooling", "image_grids", "image_num_crops")
TEXT = ("input_ids", "attention_mask", "token_type_ids")
PIXELS = ("pixel_values", "pixel_values_videos")
VISUAL_TOKENS = (
    "<im_start>",
    "<im_end>",
    "<im_patch>",
    "<im_col>",
    "<low_res_im_start>",
    "<im_low>",
    "<frame_start>",
    "<frame_end>",
)
Check = Callable[[GoldenCase], None]


# --- building and comparing ------------------------------------------------------------------------------------------


def repeat(case: GoldenCase, **overrides: Any) -> Any:
    """The recorded call on the processor of the case, video files with the decoder they were recorded with."""
    backend = {"video_backend": case.json["video_backend"]} if "video_backend" in case.json else {}
    return case.call(generated_processor(case.json), **{**backend, **overrides})


def source_kind(case: GoldenCase) -> str:
    """What the pixels of a case come from, which sets the tolerance (see `assert_pixels_close`)."""
    specs = case.json.get("images", []) + case.json.get("videos", [])
    if any(spec["kind"] == "video_file" for spec in specs):
        return "decoded"
    return "float" if any("float" in spec.get("dtype", "") for spec in specs) else "uint8"


def container(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "torch"
    return type(value).__name__


def assert_recorded(output: Any, case: GoldenCase, *, except_for: tuple[str, ...] = ()) -> None:
    """`output` equals the recording: keys, containers, dtypes, shapes and values."""
    assert sorted(output) == case.expected["keys"]
    for key in case.expected["keys"]:
        if key in except_for:
            continue
        recorded = case.expected[key]
        assert container(output[key]) == recorded["container"], key
        if key in PIXELS:
            assert_pixels_close(output[key], case, key, source_kind(case))
        else:
            actual = to_numpy(output[key])
            assert (list(actual.shape), str(actual.dtype)) == (recorded["shape"], recorded["dtype"]), key
            np.testing.assert_array_equal(actual, case.tensors[key], err_msg=key)


# The original's PyAV path guesses how long a video of variable frame rate is.
GUESSED_DURATION = ("vfile_pyav_vfr", "vfile_pyav_vfr_n8", "vfile_pyav_vfr_n8_maxfps1")


def assert_recorded_metadata(output: Any, case: GoldenCase, frames: tuple[int, ...] | None = None) -> None:
    """Takes the metadata of the videos out of `output` and compares it; `frames` replace the recorded ones."""
    for metadata, recorded in zip(output.pop("video_metadata"), case.expected["videos"], strict=True):
        times = np.array(metadata.frames_indices) / metadata.fps
        np.testing.assert_allclose(metadata.timestamps, times, rtol=1e-12)
        if "decoded_frame_indices" in recorded:
            expected = recorded["decoded_frame_indices"] if frames is None else list(frames)
            assert metadata.source_frame_indices == expected
        for key in ("total_num_frames", "width", "height", "video_backend"):
            assert metadata[key] == recorded[key], key
        assert metadata.fps == pytest.approx(recorded["fps"])
        if case.name not in GUESSED_DURATION:
            np.testing.assert_allclose(metadata.timestamps, recorded["timestamps"], rtol=0, atol=1e-6)
            np.testing.assert_allclose(metadata.frames_indices, recorded["frames_indices"], rtol=0, atol=1e-5)
        if not case.name.startswith("vfile_pyav_vfr"):
            assert metadata.duration == pytest.approx(recorded["duration"], abs=1e-6)


def assert_same(output: Any, expected: Any) -> None:
    """Two outputs of the processor are equal to the last bit."""
    assert sorted(output) == sorted(expected)
    for key in expected:
        np.testing.assert_array_equal(to_numpy(output[key]), to_numpy(expected[key]), err_msg=key)


def assert_rows(output: Any, rows: list[list[int]], *, side: str = "left", length: int | None = None) -> None:
    """The text tensors hold exactly these rows, padded on `side` to `length` or to the longest row."""
    width = length if length is not None else max(len(row) for row in rows)
    visual = tokenizer().convert_tokens_to_ids(list(VISUAL_TOKENS))
    expected = {key: [] for key in TEXT}
    for row in rows:
        pads = width - len(row)
        left, right = (pads, 0) if side == "left" else (0, pads)
        pad_id = tokenizer().pad_token_id
        expected["input_ids"].append([pad_id] * left + row + [pad_id] * right)
        expected["attention_mask"].append([0] * left + [1] * len(row) + [0] * right)
        expected["token_type_ids"].append([0] * left + [int(token in visual) for token in row] + [0] * right)
    for key, values in expected.items():
        assert container(output[key]) == "torch"
        np.testing.assert_array_equal(to_numpy(output[key]), values, err_msg=key)
    assert output["input_ids"].dtype == torch.int64


def recorded_rows(case: GoldenCase) -> list[list[int]]:
    """The recorded ids of each row without padding."""
    return [
        ids[mask.astype(bool)].tolist()
        for ids, mask in zip(case.tensors["input_ids"], case.tensors["attention_mask"], strict=True)
    ]


def case_named(name: str) -> GoldenCase:
    return next(case for case in processor_cases(name) if case.name == name)


# --- departures: checks ----------------------------------------------------------------------------------------------


def raises(message: str, error: type[Exception] = ValueError) -> Check:
    """The call is refused, with a message that fits this pattern."""

    def check(case: GoldenCase) -> None:
        with pytest.raises(error, match=message):
            repeat(case)

    return check


def equals_case(name: str) -> Check:
    """The output is what was recorded for another case with the same content."""

    def check(case: GoldenCase) -> None:
        assert_recorded(repeat(case), case_named(name))

    return check


def equals_call(**changes: Any) -> Check:
    """The output is that of the same call with other arguments; `images` is a function of the recorded images."""

    def check(case: GoldenCase) -> None:
        output = repeat(case)
        overrides = dict(changes)
        if "images" in overrides:
            overrides["images"] = changes["images"](case.media("images"))
        assert_same(output, repeat(case, **overrides))

    return check


def equals_processor(argument: str, **settings: Any) -> Check:
    """The output is that of a processor built with other settings and called without `argument`."""

    def check(case: GoldenCase) -> None:
        expected = case.call(generated_processor({**case.json, **settings}), **{argument: None})
        assert_same(repeat(case), expected)

    return check


def gives_texts(*texts: str) -> Check:
    """The rows are these texts, with BOS in front; nothing but text comes out."""

    def check(case: GoldenCase) -> None:
        output = repeat(case)
        assert sorted(output) == sorted(TEXT)
        assert_rows(output, [with_bos(text) for text in texts])

    return check


def gives_corrected_chat(case: GoldenCase) -> None:
    """The rows are the recorded ones with the two corrections; everything else is as recorded."""
    messages = case.json["messages"] if isinstance(case.json["messages"][0], list) else [case.json["messages"]]
    rows = []
    for ids, conversation in zip(recorded_rows(case), messages, strict=True):
        text = decode(ids)
        assert encode(text) == ids
        rows.append(with_bos(corrected(text, conversation, case.json["kwargs"]["add_generation_prompt"])))
    assert rows != recorded_rows(case)
    output = repeat(case)
    assert_recorded(output, case, except_for=TEXT)
    assert_rows(output, rows)


def gives_padded_rows(length: int | None = None, rows_of: str | None = None, max_length: int | None = None) -> Check:
    """BOS once per row, then truncation to `max_length`, then padding to `length`; pads are not attended to.

    The rows are the texts of the case, or with `rows_of` what was recorded for another case.
    """

    def check(case: GoldenCase) -> None:
        rows = recorded_rows(case_named(rows_of)) if rows_of else [with_bos(text) for text in case.json["text"]]
        output = repeat(case)
        assert_recorded(output, case, except_for=TEXT)
        assert_rows(
            output, [row[:max_length] for row in rows], side=case.json.get("padding_side", "left"), length=length
        )

    return check


def gives_ragged_lists(case: GoldenCase) -> None:
    output = repeat(case)
    assert output["input_ids"] == [with_bos(text) for text in case.json["text"]]
    assert output["attention_mask"] == [[1] * len(row) for row in output["input_ids"]]


def gives_lone_bos(case: GoldenCase) -> None:
    assert_rows(repeat(case), [[tokenizer().bos_token_id]])


def gives_only_images(case: GoldenCase) -> None:
    output = repeat(case)
    assert sorted(output) == sorted(IMAGES)
    with_text = repeat(case, text="<|image|>")
    assert_same(output, {key: with_text[key] for key in IMAGES})


def cuts_crops_of(rows: int, cols: int) -> Check:
    """One tile and the low-res view, of this many patches each, every patch in one token."""

    def check(case: GoldenCase) -> None:
        output = repeat(case)
        assert output["pixel_values"].shape[:2] == (2, rows * cols)
        token_rows, token_cols = -(-rows // 2), -(-cols // 2)
        assert output["image_grids"].tolist() == [[token_rows, token_cols] * 2]
        used = output["image_token_pooling"][output["image_token_pooling"] >= 0]
        assert sorted(used.tolist()) == list(range(2 * rows * cols))

    return check


def covers_every_patch_once(case: GoldenCase) -> None:
    """Without overlap every patch of every tile belongs to one token, and so does every patch of the low-res view."""
    output = repeat(case)
    num_patches = output["pixel_values"].shape[0] * output["pixel_values"].shape[1]
    used = output["image_token_pooling"][output["image_token_pooling"] >= 0]
    assert sorted(used.tolist()) == list(range(num_patches))
    assert output["image_num_crops"].item() == output["pixel_values"].shape[0] > 2


def frames_by_start(*displayed: int, tokens_of: str | None = None) -> Check:
    """The frames with these numbers come out; where the recording agrees with them, its pixels do too."""

    def check(case: GoldenCase) -> None:
        output = repeat(case, return_metadata=True)
        assert_recorded_metadata(output, case, displayed)
        assert_recorded(output, case_named(tokens_of) if tokens_of else case, except_for=PIXELS)
        agrees = np.equal(case.expected["videos"][0]["decoded_frame_indices"], displayed)
        assert_pixels_close(output["pixel_values_videos"], case, "pixel_values_videos", "decoded", crops=agrees)
        assert nearest_frames(case, output["pixel_values_videos"]) == list(displayed)

    return check


def nearest_frames(case: GoldenCase, pixels: torch.Tensor) -> list[int]:
    """Which frame of the file each of `pixels` shows, found by comparing it with all of them."""
    import av

    with av.open(case.media("videos")[0]) as file:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    metadata = {"total_num_frames": len(frames), "fps": 1.0, "frames_indices": list(range(len(frames)))}
    every_frame = generated_processor(case.json).video_processor(
        videos=[frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt"
    )["pixel_values_videos"]
    return [int((every_frame - frame).abs().mean(dim=(1, 2)).argmin()) for frame in pixels]


def gives_times(*seconds: str) -> Check:
    """A video sampled at these times, as printed in the prompt, with one set of pixels per frame."""

    def check(case: GoldenCase) -> None:
        output = repeat(case)
        prompt = decode(output["input_ids"][0])
        assert re.findall(r"(\d+\.\d) <frame_start>", prompt) == list(seconds)
        assert output["video_grids"].tolist() == [[len(seconds), 9, 9]]
        assert len(output["pixel_values_videos"]) == len(seconds)

    return check


def gives_both_videos(case: GoldenCase) -> None:
    """Two videos in one prompt are what they are alone, one after the other."""
    output = repeat(case)
    processor = generated_processor(case.json)
    alone = [
        processor(text="<|video|>", videos=[video], video_metadata=[metadata], return_tensors="pt")
        for video, metadata in zip(case.media("videos"), case.json["kwargs"]["video_metadata"], strict=True)
    ]
    for key in ("pixel_values_videos", "video_token_pooling", "video_grids"):
        assert torch.equal(output[key], torch.cat([part[key] for part in alone]))
    (prompt,) = case.json["expected_before_error"]["prompt_text"]
    bos, *first = alone[0]["input_ids"][0].tolist()
    second = alone[1]["input_ids"][0, 1:].tolist()
    assert_rows(output, [[bos, *first, *second, *encode(prompt.removeprefix("<|video|><|video|>"))]])


def shows_every_frame(case: GoldenCase) -> None:
    gives_times("0.0", "0.2", "0.4", "0.6")(case)
    assert_same(
        repeat(case),
        repeat(case, video_metadata=[{"total_num_frames": 4, "fps": 5.0, "frames_indices": [0, 1, 2, 3]}]),
    )


def assumes_24_fps(case: GoldenCase) -> None:
    assert_same(repeat(case), repeat(case, video_metadata=[{"fps": 24.0}]))


# --- departures: table -----------------------------------------------------------------------------------------------

DEFAULT_RATE = "frames without a rate are taken as 24 per second, with a warning, as processors of transformers do"
NO_STRAY_BLANK = "no blank in front of an assistant turn: training never saw it"
PER_ROW_BOS = "BOS once per row, put in before truncation and padding; pads are never attended to"
SAME_IMAGE = "the same image in another layout or dtype is the same image"
NOT_SILENT = "an explicit argument counts; what cannot be done is refused, not ignored"
CLEAR_ERROR = "the original fails too, deeper down and with an error that does not help"
BY_DISPLAY = "the frame on display at the sampled time is shown, on every decoder"
FRACTIONAL_FPS = "`fps` mode takes 29.97 for 30 and 23.976 for 24, and falls back to a slower rate instead of failing"

VFR_FRAMES = (0, 1, 5, 11, 11, 15, 16, 19, 21, 29, 33, 36, 41, 45)
VFR_N8_FRAMES = (0, 5, 11, 15, 19, 29, 34, 45)
VFR_N8_MAXFPS1_FRAMES = (0, 5, 11, 16, 21, 33, 41, 45)

DEPARTURES: dict[str, tuple[Check, str]] = {
    # chat
    "batch_chat": (gives_corrected_chat, NO_STRAY_BLANK),
    "chat_multi_turn": (gives_corrected_chat, NO_STRAY_BLANK),
    "multi_across_turns": (gives_corrected_chat, NO_STRAY_BLANK),
    "chat_assistant_last_no_gen": (gives_corrected_chat, NO_STRAY_BLANK + "; a finished last turn is closed"),
    "chat_string_content": (
        gives_texts("<|im_start|>user\nHello there.<|im_end|>\n<|im_start|>assistant\n"),
        "the template supports a string as content, so the processor does",
    ),
    "chat_subtitle": (
        gives_texts("0.0 hello\n2.0 world\n<|im_start|>user\nWhat is said?<|im_end|>\n<|im_start|>assistant\n"),
        "a string subtitle is supported by the template",
    ),
    "chat_system_role": (
        gives_texts(
            "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        ),
        "a system message is written the Qwen way instead of refused",
    ),
    "chat_role_order_error": (raises("Conversation roles must alternate", Exception), "refused, as by the original"),
    "chat_image_url_type": (equals_case("chat_image_path_key"), "image_url content loads its image"),
    # rows of text
    "batch_text_pad_right": (gives_padded_rows(), PER_ROW_BOS),
    "batch_text_pad_right_some_bos": (gives_padded_rows(), PER_ROW_BOS),
    "batch_text_pad_left_some_bos": (gives_padded_rows(), PER_ROW_BOS),
    "batch_mixed_images_pad_right": (gives_padded_rows(rows_of="batch_mixed_images_pad_left"), PER_ROW_BOS),
    "batch_pad_max_length": (gives_padded_rows(length=40), PER_ROW_BOS),
    "batch_pad_to_multiple": (gives_padded_rows(length=16), PER_ROW_BOS),
    "batch_truncation": (gives_padded_rows(length=8, max_length=8), PER_ROW_BOS),
    "batch_unpadded_ragged": (gives_ragged_lists, "lists need not be rectangular"),
    "batch_unpadded_ragged_pt": (raises("padding=True"), CLEAR_ERROR),
    "text_empty_string": (gives_lone_bos, "ids are integers for an empty text too (the original returns float32)"),
    # placeholders and media
    "image_count_mismatch_fewer_placeholders": (raises("^1 `.*` in the text, but 2 image"), NOT_SILENT),
    "image_count_mismatch_more_placeholders": (raises("^2 `.*` in the text, but 1 image"), NOT_SILENT),
    "placeholder_without_images": (raises("^1 `.*` in the text, but 0 image"), NOT_SILENT),
    "images_empty_list": (gives_texts("hi"), "no images are fine for a text without placeholders"),
    "images_contains_none": (raises("None", Exception), CLEAR_ERROR),
    "image_missing_file": (raises("/nonexistent/file.png", Exception), CLEAR_ERROR),
    "text_none_with_image": (gives_only_images, "without a text the inputs of the images are returned"),
    "image_max_crops_zero": (raises("max_crops is 0"), NOT_SILENT),
    "do_convert_rgb_false_init_rgba": (raises("do_convert_rgb"), CLEAR_ERROR),
    "do_convert_rgb_false_kwarg_rgba": (raises("do_convert_rgb"), NOT_SILENT),
    "resample_nearest": (equals_processor("resample", image_processor_init={"resample": 0}), NOT_SILENT),
    "resample_lanczos": (raises("resample is 1"), CLEAR_ERROR),
    "resample_box": (raises("resample is 4"), CLEAR_ERROR),
    "resample_hamming": (raises("resample is 5"), CLEAR_ERROR),
    "mean_std_image_scalar": (
        equals_call(image_mean=[0.25] * 3, image_std=[0.5] * 3),
        "one number stands for all channels",
    ),
    "nonsquare_size": (cuts_crops_of(27, 24), "crops need not be square"),
    "size_not_multiple_of_patch": (raises("384 cannot be cut into patches"), CLEAR_ERROR),
    "overlap_0_0": (covers_every_patch_once, "crops may lie side by side"),
    "array_uint8_chw": (equals_case("array_uint8_hwc"), SAME_IMAGE),
    "array_torch_uint8_chw": (equals_case("array_uint8_hwc"), SAME_IMAGE),
    "array_uint8_hw4": (equals_case("array_uint8_hwc"), SAME_IMAGE + "; alpha is dropped, as from a PIL image"),
    "array_uint16_hwc": (equals_case("array_uint8_hwc"), SAME_IMAGE),
    "array_int32_hwc": (equals_case("array_uint8_hwc"), SAME_IMAGE),
    "array_int64_hwc": (equals_case("array_uint8_hwc"), SAME_IMAGE),
    "array_float32_01_chw": (equals_case("array_float32_01_hwc"), SAME_IMAGE),
    "array_torch_float32_01_chw": (equals_case("array_float32_01_hwc"), SAME_IMAGE),
    "array_uint8_hw": (equals_call(images=lambda images: [np.stack(images * 3, axis=-1)]), "grey becomes RGB"),
    "array_uint8_hw1": (equals_call(images=lambda images: [np.repeat(images[0], 3, axis=-1)]), "grey becomes RGB"),
    "array_bool_hwc": (equals_call(images=lambda images: [images[0] * np.uint8(255)]), "True is white"),
    # videos given as arrays
    "varray_chw": (equals_case("varray_pil_list"), SAME_IMAGE),
    "varray_metadata_fps_none": (assumes_24_fps, DEFAULT_RATE),
    "varray_metadata_zero_fps": (raises("fps"), CLEAR_ERROR),
    "varray_metadata_total_too_big": (raises("50"), CLEAR_ERROR),
    "varray_no_metadata": (assumes_24_fps, DEFAULT_RATE),
    "varray_no_metadata_no_sampling": (assumes_24_fps, DEFAULT_RATE),
    "varray_unknown_mode": (raises("'uniform'"), CLEAR_ERROR),
    "varray_no_sampling": (shows_every_frame, "frames that are not sampled are numbered 0, 1, 2, ..."),
    "varray_n8_fps_mode_2997": (gives_times("0.0", "0.5", "1.0", "1.5"), FRACTIONAL_FPS),
    "varray_two_in_one_prompt": (gives_both_videos, "several videos in one prompt are supported"),
    # video files
    "vfile_decord_cfr1_fps_mode_n8": (gives_times("0.0", "1.0", "2.0", "3.0", "4.0", "5.0"), FRACTIONAL_FPS),
    "vfile_pyav_cfr1_fps_mode_n8": (gives_times("0.0", "1.0", "2.0", "3.0", "4.0", "5.0"), FRACTIONAL_FPS),
    "vfile_decord_cfr2997_fps_mode_n8": (gives_times("0.0", "0.5", "1.0", "1.5", "2.0", "2.5"), FRACTIONAL_FPS),
    "vfile_pyav_cfr2997_fps_mode_n8": (gives_times("0.0", "0.5", "1.0", "1.5", "2.0", "2.5"), FRACTIONAL_FPS),
    "vfile_decord_cfr23976_fps_mode_n8": (
        gives_times("0.0", "0.5", "1.0", "1.5", "2.0", "2.5", "3.0", "3.5"),
        FRACTIONAL_FPS,
    ),
    "vfile_pyav_cfr23976_fps_mode_n8": (
        gives_times("0.0", "0.5", "1.0", "1.5", "2.0", "2.5", "3.0", "3.5"),
        FRACTIONAL_FPS,
    ),
    "vfile_decord_cfr10_maxfps10": (
        frames_by_start(*range(52), 51),
        BY_DISPLAY + ", also at the very start of a frame",
    ),
    "vfile_decord_cfr30_maxfps3": (
        frames_by_start(0, 10, 20, 30, 40, 49, 60, 69, 80, 90, 94),
        BY_DISPLAY + ", also at the very start of a frame",
    ),
    "vfile_decord_vfr": (frames_by_start(*VFR_FRAMES), BY_DISPLAY),
    "vfile_decord_vfr_fps_mode_n8": (frames_by_start(*VFR_FRAMES[:8]), BY_DISPLAY),
    "vfile_decord_vfr_n8": (frames_by_start(*VFR_N8_FRAMES), BY_DISPLAY),
    "vfile_decord_vfr_n8_maxfps1": (frames_by_start(*VFR_N8_MAXFPS1_FRAMES), BY_DISPLAY),
    "vfile_pyav_vfr": (
        frames_by_start(*VFR_FRAMES, tokens_of="vfile_decord_vfr"),
        "the duration is read from the frames, not guessed",
    ),
    "vfile_pyav_vfr_n8": (
        frames_by_start(*VFR_N8_FRAMES, tokens_of="vfile_decord_vfr_n8"),
        "the duration is read from the frames, not guessed",
    ),
    "vfile_pyav_vfr_n8_maxfps1": (
        frames_by_start(*VFR_N8_MAXFPS1_FRAMES, tokens_of="vfile_decord_vfr_n8_maxfps1"),
        "the duration is read from the frames, not guessed",
    ),
    "vfile_missing": (raises("/nonexistent/video.mp4", Exception), CLEAR_ERROR),
    "vfile_frames_as_paths": (raises("/a/0.png", Exception), CLEAR_ERROR),
    "vfile_image_as_video": (raises("rgb.png", Exception), CLEAR_ERROR),
}


# --- tests -----------------------------------------------------------------------------------------------------------

CASES = processor_cases()
LONG = ("long5", "n128", "n384")  # many frames


def test_there_are_recorded_cases():
    """The tests below would pass on an empty folder."""
    assert len(CASES) >= (251 if HAS_FULL_SET else 62)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[pytest.mark.slow] * any(word in case.name for word in LONG))
        for case in CASES
    ],
)
def test_case(case):
    if case.name in DEPARTURES:
        check, _reason = DEPARTURES[case.name]
        check(case)
    else:
        assert "error" not in case.json, (
            f"the original fails: {case.json['error']}; say what happens here in DEPARTURES"
        )
        has_videos = "videos" in case.expected
        output = repeat(case, **{"return_metadata": True} if has_videos else {})
        if has_videos:
            assert_recorded_metadata(output, case)
        assert_recorded(output, case)


def test_departures_name_existing_cases():
    if HAS_FULL_SET:
        assert set(DEPARTURES) <= {case.name for case in CASES}
    assert all(reason for _check, reason in DEPARTURES.values())


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.is_chat and case.expected], ids=lambda case: case.name
)
def test_prompt_text(case):
    """The chat text of a case without tokenizing, against the recorded one."""
    several = isinstance(case.json["messages"][0], list)
    conversations = case.json["messages"] if several else [case.json["messages"]]
    flag = case.json["kwargs"].get("add_generation_prompt", False)
    texts = generated_processor(case.json).apply_chat_template(
        case.json["messages"], tokenize=False, add_generation_prompt=flag
    )
    expected = [
        corrected(text, messages, flag)
        for text, messages in zip(case.expected["prompt_text"], conversations, strict=True)
    ]
    assert texts == (expected if several else expected[0])
