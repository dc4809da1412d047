"""Copies a telling subset of the golden data beside the checkout into tests/data/golden.

Usage: python scripts/embed_golden.py

Run it after changing a list below. The tests read the copy with the same code as the full set, so layout and content
are unchanged; tables lose rows, and cases lose recorded tensors that no test compares.
"""

import json
import shutil
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCE = REPOSITORY.parent / "shared" / "golden"
TARGET = REPOSITORY / "tests" / "data" / "golden"

WHOLE_CASES = [
    # text
    "batch_pad_max_length",
    "batch_pad_to_multiple",
    "batch_text_pad_left",
    "batch_text_pad_left_all_bos",
    "batch_text_pad_left_some_bos",
    "batch_text_pad_right",
    "batch_text_pad_right_some_bos",
    "batch_truncation",
    "chat_assistant_last_no_gen",
    "chat_multi_turn",
    "text_empty_string",
    "text_no_return_tensors",
    "text_single",
    "text_special_in_user_text",
    "text_starts_with_bos",
    "text_unicode",
    # images
    "array_uint8_hwc",
    "batch_chat",
    "image_1x1",
    "overlap_2_3",
    "pilmode_anim_gif",
    "small_98",
    "small_98_pool3",
    "tokens_low_res_token",
    # videos
    "varray_batch_two",
    "varray_no_sampling_with_indices",
    "varray_pil_list",
    "varray_subtitle",
    "vfile_decord_cfr30_maxfps3",
    "vfile_decord_cfr30_maxfps_half",
    "vfile_decord_one_frame",
    "vfile_gif_as_video",
    "vfile_pyav_cfr30_maxfps3",
]
# Calls whose recorded tensors are not needed: the result is refused, or compared with something else.
CALLS_ONLY = [
    "array_bool_hwc",
    "array_int64_hwc",
    "array_torch_uint8_chw",
    "array_uint8_chw",
    "array_uint8_hw",
    "array_uint8_hw4",
    "batch_unpadded_ragged",
    "batch_unpadded_ragged_pt",
    "chat_role_order_error",
    "chat_string_content",
    "chat_subtitle",
    "chat_system_role",
    "image_count_mismatch_fewer_placeholders",
    "image_count_mismatch_more_placeholders",
    "image_max_crops_zero",
    "images_contains_none",
    "images_empty_list",
    "mean_std_image_scalar",
    "placeholder_without_images",
    "resample_lanczos",
    "resample_nearest",
    "varray_chw",
    "varray_metadata_zero_fps",
    "varray_n8_fps_mode_2997",
    "varray_no_metadata",
    "varray_no_sampling",
    "varray_two_in_one_prompt",
    "varray_unknown_mode",
    "vfile_missing",
]
# Every n-th row is kept.
TABLE_STEPS = {
    "chat_template": 1,
    "frame_sampling": 16,
    "image_layout": 4,
    "insert_bos": 1,
    "tiling": 3,
    "tokenizer": 1,
    "visual_tokens": 1,
}
MAX_TOKEN_CHARACTERS = 400


def copy_case(name: str, with_tensors: bool) -> set[str]:
    """Copies one case and returns the media files that it needs."""
    source, target = SOURCE / "processor" / name, TARGET / "processor" / name
    target.mkdir(parents=True)
    case = json.loads((source / "case.json").read_text(encoding="utf-8"))
    write_json(target / "case.json", case)
    if with_tensors:
        shutil.copyfile(source / "expected.safetensors", target / "expected.safetensors")
    return {spec["path"] for spec in case.get("images", []) + case.get("videos", []) if "path" in spec}


def copy_table(name: str, step: int) -> None:
    content = json.loads((SOURCE / "tables" / f"{name}.json").read_text(encoding="utf-8"))
    rows = content["rows"] if name == "tiling" else content
    if name == "visual_tokens":
        rows = [row for row in rows if len(row["text"]) <= MAX_TOKEN_CHARACTERS]
    rows = rows[::step]
    write_json(TARGET / "tables" / f"{name}.json", {**content, "rows": rows} if name == "tiling" else rows)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


def main() -> None:
    if not SOURCE.is_dir():
        raise SystemExit(f"The full golden set is not at {SOURCE}.")
    shutil.rmtree(TARGET, ignore_errors=True)
    media = set()
    for name in WHOLE_CASES:
        media |= copy_case(name, with_tensors=True)
    for name in CALLS_ONLY:
        media |= copy_case(name, with_tensors=False)
    for name, step in TABLE_STEPS.items():
        copy_table(name, step)
    for path in [*sorted(media), *(f"tokenizer/{file.name}" for file in (SOURCE / "tokenizer").iterdir())]:
        (TARGET / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(SOURCE / path, TARGET / path)
    files = [file for file in TARGET.rglob("*") if file.is_file()]
    print(f"{len(files)} files, {sum(file.stat().st_size for file in files) / 1000:.0f} kB in tests/data/golden")


if __name__ == "__main__":
    main()
