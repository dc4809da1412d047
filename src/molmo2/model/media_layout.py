"""Which picture belongs where: from prompts and grids to flat indices. Pure functions of ids and shapes.

Pictures arrive flat (all crops, all pooling rows, in prompt order); which row of the batch owns them follows from the
prompt: an image closes two groups of patch tokens (low-res view, high-res crops), a video one per frame.

    <low_res_im_start> ■■■■ <im_end> <im_start> ■■■■■■ <im_end> text  ->  groups [4, 6]: one image
    0.0 <im_start> ■■■ <im_end> 0.5 <im_start> ■■■ <im_end> text      ->  groups [3, 3]: a video of two frames
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenGroup:
    """Consecutive patch tokens up to an end token.

    Attributes:
        num_tokens: How many.
        opens_image: They follow a start token that only low-resolution views have.
        closes_frame: They end with a token that only video frames have.
    """

    num_tokens: int
    opens_image: bool
    closes_frame: bool = False


@dataclass(frozen=True)
class MediaTables:
    """The flat pictures of a batch: what the model was given besides pixels.

    Attributes:
        image_grids: (images, 4) rows, cols of the low-res view and of the high-res crops, in pooled tokens.
        image_num_crops: (images,) crops of each image.
        video_grids: (videos, 3) frames, rows, cols.
    """

    image_grids: Tensor | None = None
    image_num_crops: Tensor | None = None
    video_grids: Tensor | None = None

    def image_tokens(self) -> Tensor:
        """(images,) pooled tokens of each image."""
        if self.image_grids is None:
            return torch.zeros(0, dtype=torch.int64)
        return self.image_grids[:, 0] * self.image_grids[:, 1] + self.image_grids[:, 2] * self.image_grids[:, 3]

    def video_tokens(self) -> Tensor:
        """(videos,) pooled tokens of each video."""
        if self.video_grids is None:
            return torch.zeros(0, dtype=torch.int64)
        return self.video_grids.prod(dim=-1)

    def image_groups(self) -> list[list[int]]:
        """Tokens in each of the two groups that an image writes."""
        return [[a * b, c * d] for a, b, c, d in ([] if self.image_grids is None else self.image_grids.tolist())]

    def video_groups(self) -> list[list[int]]:
        """Tokens in each of the groups that a video writes, one per frame."""
        return [[r * c] * frames for frames, r, c in ([] if self.video_grids is None else self.video_grids.tolist())]


def flat_pooling(token_pooling: Tensor, tokens: Tensor, crops: Tensor, patches_per_crop: int) -> Tensor:
    """Turn indices into an item's own patches into indices into the patches of all items.

    Args:
        token_pooling: (T, K) int64, -1 where there is no patch, restarting at 0 for every image or video.
        tokens, crops: (items,) rows of `token_pooling` and crops of each item.
    """
    first_patch = (crops.cumsum(0) - crops) * patches_per_crop
    shift = first_patch.repeat_interleave(tokens)[:, None]
    return torch.where(token_pooling >= 0, token_pooling + shift, token_pooling)


def _runs(ids: list[int]) -> list[tuple[int, int]]:
    """(start, end) of each run of equal entries."""
    starts = [place for place in range(len(ids)) if place == 0 or ids[place] != ids[place - 1]]
    return list(zip(starts, [*starts[1:], len(ids)]))


def token_groups(
    input_ids: Tensor,
    patch_ids: list[int],
    image_end_id: int,
    frame_end_id: int,
    low_res_start_id: int,
    example_ids: Tensor | None = None,
) -> list[list[TokenGroup]]:
    """Groups of patch tokens closed by an end token, for each row; end tokens without patches are plain text.

    Args:
        input_ids: (B, S) int64.
        example_ids: (B, S) int64; packed examples count as rows of their own.
    """
    if example_ids is not None:
        tokens = (patch_ids, image_end_id, frame_end_id, low_res_start_id)
        return [
            groups
            for row, ids in zip(input_ids, example_ids.tolist())
            for start, end in _runs(ids)
            for groups in token_groups(row[None, start:end], *tokens)
        ]
    end_ids = [image_end_id, frame_end_id]
    is_patch = torch.isin(input_ids, torch.tensor(patch_ids, device=input_ids.device))
    is_end = torch.isin(input_ids, torch.tensor(end_ids, device=input_ids.device))
    follows_low_res_start = torch.zeros_like(is_patch)
    follows_low_res_start[:, 1:] = is_patch[:, 1:] & (input_ids[:, :-1] == low_res_start_id)
    seen, opened = is_patch.cumsum(-1), follows_low_res_start.cumsum(-1)
    rows = []
    for row in range(len(input_ids)):
        closed_at = is_end[row].nonzero()[:, 0]
        seen_then, opened_then = seen[row, closed_at].tolist(), opened[row, closed_at].tolist()
        closed_by = input_ids[row, closed_at].tolist()
        starts = zip([0, *seen_then], [0, *opened_then])
        groups = [
            TokenGroup(end - start, opened_end > opened_start, end_id == frame_end_id)
            for (start, opened_start), end, opened_end, end_id in zip(starts, seen_then, opened_then, closed_by)
        ]
        rows.append([group for group in groups if group.num_tokens])
    return rows


def assign_media(rows: list[list[TokenGroup]], tables: MediaTables) -> list[list[tuple[str, int]]]:
    """For each row its pictures in the order of the prompt, as ("image" | "video", index into the flat list).

    Packed examples count as rows. Images, and likewise videos, are taken in flat order. Where a group could be either,
    a frame's own end token means a video; a low-res opening means an image, and its absence while other groups have
    one a video; otherwise an image is tried first, because prompts put images first.

    Raises:
        ValueError: If the groups of a row fit no pictures, or pictures are left over.
    """
    waiting = {"image": tables.image_groups(), "video": tables.video_groups()}
    taken = {"image": 0, "video": 0}
    marks_images = any(group.opens_image for groups in rows for group in groups)
    assigned = []
    for row, groups in enumerate(rows):
        sizes, place, media = [group.num_tokens for group in groups], 0, []
        while place < len(groups):
            kinds = ["image", "video"]
            if groups[place].closes_frame:
                kinds = ["video"]
            elif marks_images:
                kinds = ["image"] if groups[place].opens_image else ["video"]
            for kind in kinds:
                wanted = waiting[kind][taken[kind]] if taken[kind] < len(waiting[kind]) else None
                if wanted is not None and sizes[place : place + len(wanted)] == wanted:
                    media.append((kind, taken[kind]))
                    taken[kind] += 1
                    place += len(wanted)
                    break
            else:
                raise ValueError(
                    f"Row {row} of the prompt has groups of patch tokens {sizes[place:][:8]} where "
                    f"image {taken['image']} of {len(waiting['image'])} or video {taken['video']} of "
                    f"{len(waiting['video'])} would have to follow, which write other groups. Pass ids and pictures "
                    "that come from one call of the processor."
                )
        assigned.append(media)
    for kind, passed in waiting.items():
        if taken[kind] != len(passed):
            raise ValueError(
                f"The prompts place {taken[kind]} {kind}(s), but {len(passed)} were passed. "
                "Pass ids and pictures that come from one call of the processor."
            )
    return assigned


def prompt_order(assigned: list[list[tuple[str, int]]], tables: MediaTables) -> Tensor:
    """Order in which to take the rows of [image features; video features] so that they follow the prompts.

    Returns:
        (T,) int64 indices.
    """
    tokens = {
        "image": [sum(groups) for groups in tables.image_groups()],
        "video": [sum(groups) for groups in tables.video_groups()],
    }
    first = {"image": [0], "video": [sum(tokens["image"])]}
    for kind, counts in tokens.items():
        for count in counts:
            first[kind].append(first[kind][-1] + count)
    pieces = [torch.arange(first[kind][i], first[kind][i + 1]) for media in assigned for kind, i in media]
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64)


def repeat_rows(per_item: list[int], items_of_rows: list[list[int]], repeats: int) -> Tensor:
    """Indices that repeat flat entries row by row of the batch: each row's entries `repeats` times in a block.

    Example: entries per item [2, 1], rows [[0], [1]], twice -> [0, 1, 0, 1, 2, 2].

    Args:
        per_item: Entries (crops, pooling rows, ...) that each item occupies in the flat tensor.
        items_of_rows: Items that each row of the batch owns.
    """
    first = [0]
    for count in per_item:
        first.append(first[-1] + count)
    blocks = []
    for items in items_of_rows:
        entries = [torch.arange(first[item], first[item + 1]) for item in items]
        blocks.extend(entries * repeats)
    return torch.cat(blocks) if blocks else torch.zeros(0, dtype=torch.int64)
