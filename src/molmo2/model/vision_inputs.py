"""How images and videos enter the model: encoded flat, assigned by the prompt, added to their tokens' embeddings.

Crops and pooled tokens of all images (and of all videos) arrive flat, in the order of the prompts. Which row of the
batch owns them follows from the prompt: an image closes two groups of patch tokens (low-res view, high-res crops), a
video one per frame.

    <low_res_im_start> ■■■■ <im_end> <im_start> ■■■■■■ <im_end> text  ->  groups [4, 6]: one image
    0.0 <im_start> ■■■ <im_end> 0.5 <im_start> ■■■ <im_end> text      ->  groups [3, 3]: a video of two frames
"""

from collections.abc import Iterable
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from molmo2.configuration import TOKEN_ID_OFFSETS
from molmo2.model.packing import changes, require_token_shape

logger = logging.get_logger(__name__)

# What images and videos are encoded from, as the processor returns it; pixels first.
ENCODED_INPUTS = {
    "image": ("pixel_values", "image_token_pooling", "image_grids", "image_num_crops"),
    "video": ("pixel_values_videos", "video_token_pooling", "video_grids"),
}
# All arguments of `forward` that describe images and videos.
MEDIA_INPUTS = (*ENCODED_INPUTS["image"], *ENCODED_INPUTS["video"], "image_features", "video_features")
# Its arguments that have one entry per token.
TOKEN_INPUTS = (
    *("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids"),
    *("example_ids", "branch_ids", "labels", "loss_weights"),
)
SIMILARITY = 0.85  # (0..1) from which an unknown name counts as a misspelt argument
# Set by `generate` alone: the number of consecutive rows that share one set of media (beams, `num_return_sequences`).
REPEAT_FACTOR = "images_repeat_factor"


class TokenGroup(NamedTuple):
    """Patch tokens up to an end token: how many, and what may have written them, the likelier first."""

    size: int
    kinds: tuple[str, ...]


@lru_cache
def _resembles_input(name: str) -> str | None:
    """What an unknown argument of `forward` was meant to be, or may have been: its name looks like those of ours."""
    similar = get_close_matches(name, (*MEDIA_INPUTS, *TOKEN_INPUTS), n=1, cutoff=SIMILARITY)
    if similar:
        return similar[0]
    return ", ".join(MEDIA_INPUTS) if name.startswith(("pixel_", "image_", "video_")) else None


def refuse_unknown_inputs(names: Iterable[str]) -> None:
    """Refuse arguments of `forward` that would be ignored though they were meant for it; others are the library's.

    Raises:
        ValueError: One looks like an argument of ours.
    """
    if torch.compiler.is_compiling():  # what is compiled ran before
        return
    for name in names:
        meant = None if name in (*MEDIA_INPUTS, REPEAT_FACTOR) else _resembles_input(name)
        if meant is not None:
            raise ValueError(f"`forward` has no argument {name!r}; did you mean {meant}?")


def image_groups(image_grids: Tensor) -> Tensor:
    """(images, 2) tokens of the low-res view and of the high-res crops, of `image_grids` (images, 4)."""
    return image_grids.unflatten(-1, (2, 2)).prod(dim=-1)


def require_grids(kind: str, grids: Tensor) -> None:
    """ValueError for grids of another shape than the processor's, (items, 4) of images and (items, 3) of videos."""
    columns = 4 if kind == "image" else 3
    if grids.dim() != 2 or grids.shape[1] != columns:
        raise ValueError(
            f"`{kind}_grids` has the shape {tuple(grids.shape)}, expected ({kind}s, {columns}). Pass what the "
            "processor returned."
        )


def on_host(*tables: Tensor) -> list[Tensor]:
    """Integer tensors on the CPU, all of them with one copy: each would be a wait for the device."""
    if all(table.device.type == "cpu" for table in tables):
        return list(tables)
    joined = torch.cat([table.flatten().long() for table in tables]).cpu()
    pieces = joined.split([table.numel() for table in tables])
    return [piece.view(table.shape) for piece, table in zip(pieces, tables)]


def flat_pooling(token_pooling: Tensor, tokens: Tensor, crops: Tensor, patches_per_crop: int) -> Tensor:
    """Turn indices into an item's own patches into indices into the patches of all items.

    Args:
        token_pooling: (T, K) int64, -1 where there is no patch, restarting at 0 for every image or video; or counted
            over all of them already, as transformers' own processor does, and then returned as it is.
        tokens, crops: (items,) rows of `token_pooling` and crops of each item.
    """
    first_patch = (crops.cumsum(0) - crops) * patches_per_crop
    shift = first_patch.repeat_interleave(tokens, output_size=len(token_pooling))[:, None]
    if len(crops) > 1 and bool(((token_pooling >= shift) | (token_pooling < 0)).all()):
        return token_pooling
    return torch.where(token_pooling >= 0, token_pooling + shift, token_pooling)


def flat_media(kind: str, pixels: Tensor, *tables: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Crops, pooling indices over all of them and (items,) tokens of each item.

    Args:
        kind: "image" or "video".
        pixels, tables: The tensors of `ENCODED_INPUTS[kind]`, in that order.
    Raises:
        ValueError: If these tensors contradict each other, naming both numbers.
    """
    names = ENCODED_INPUTS[kind]
    token_pooling, grids, *num_crops = on_host(*tables)
    require_grids(kind, grids)
    if kind == "video":
        tokens, crops, stated = grids.prod(dim=-1), grids[:, 0], "`video_grids` counts"
    else:
        tokens, crops, stated = image_groups(grids).sum(-1), num_crops[0], "`image_num_crops` adds up to"
    _require_equal(stated, crops.sum(), f"`{names[0]}` has", pixels)
    _require_equal(f"`{names[2]}` adds up to", tokens.sum(), f"`{names[1]}` has", token_pooling)
    return pixels, flat_pooling(token_pooling, tokens, crops, pixels.shape[1]), tokens


def _require_equal(stated: str, expected: Tensor, holder: str, tensor: Tensor) -> None:
    if int(expected) != len(tensor):
        raise ValueError(
            f"{stated} {int(expected)}, but {holder} {len(tensor)} row(s). Pass the tensors of one call of the "
            "processor, without dropping or repeating rows."
        )


def token_groups(ids: Tensor, config: Any, example_ids: Tensor | None = None) -> list[list[TokenGroup]]:
    """Groups of patch tokens closed by an end token, for each row; end tokens without patches are plain text.

    What may have written a group is "image", "video" or both, the likelier first: a frame's own end token means a
    video; a low-res opening means an image, and its absence while other groups have one a video; otherwise an image is
    tried first, because prompts put images first.

    Args:
        ids: (B, S) int64, on the CPU.
        config: `Molmo2Config`, for the ids of visual tokens.
        example_ids: (B, S) int64, on the CPU; packed examples count as rows of their own.
    """
    image_end, frame_end = config.image_end_token_id, config.frame_end_token_id
    is_patch = torch.isin(ids, torch.tensor([config.image_patch_id, config.image_low_res_id]))
    is_end = torch.isin(ids, torch.tensor([image_end, frame_end]))
    begins_row = changes(torch.zeros_like(ids) if example_ids is None else example_ids)
    opens_image = is_patch & (ids.roll(1, -1) == config.low_res_image_start_token_id) & ~begins_row
    row_of = begins_row.flatten().cumsum(0) - 1
    at = (is_end.flatten() | begins_row.flatten().roll(-1)).nonzero()[:, 0]  # ends of groups and of rows
    seen = torch.stack((is_patch, opens_image)).flatten(1).cumsum(-1)[:, at]
    ends = zip(row_of[at].tolist(), *seen.diff(prepend=seen.new_zeros(2, 1)).tolist(), ids.flatten()[at].tolist())
    closed = [(row, count, opened, end) for row, count, opened, end in ends if count and end in (image_end, frame_end)]
    marks_images = any(opened for _, _, opened, _ in closed)
    rows: list[list[TokenGroup]] = [[] for _ in range(int(begins_row.sum()))]
    for row, num_tokens, num_opened, end_id in closed:
        kinds: tuple[str, ...] = ("image", "video")
        if end_id == frame_end:
            kinds = ("video",)
        elif marks_images:
            kinds = ("image",) if num_opened else ("video",)
        rows[row].append(TokenGroup(num_tokens, kinds))
    return rows


def prompt_order(rows: list[list[TokenGroup]], image_grids: Tensor, video_grids: Tensor) -> Tensor:
    """The order of the rows of [image features; video features] in the prompts, (T,) int64.

    Images, and likewise videos, are taken in flat order.

    Args:
        rows: Of `token_groups`.
        image_grids, video_grids: (images, 4) and (videos, 3), on the CPU.
    Raises:
        ValueError: If the groups of a row fit no image or video, or some are left over.
    """
    images = image_groups(image_grids).tolist()
    waiting = {"image": images, "video": [[height * width] * frames for frames, height, width in video_grids.tolist()]}
    taken = {"image": 0, "video": 0}
    first = {"image": 0, "video": sum(map(sum, images))}  # feature of the next image and video
    pieces = [torch.arange(0)]
    for row, groups in enumerate(rows):
        sizes, place = [group.size for group in groups], 0
        while place < len(groups):
            for kind in groups[place].kinds:
                wanted = waiting[kind][taken[kind]] if taken[kind] < len(waiting[kind]) else None
                if wanted is not None and sizes[place : place + len(wanted)] == wanted:
                    pieces.append(torch.arange(first[kind], first[kind] + sum(wanted)))
                    first[kind] += sum(wanted)
                    taken[kind] += 1
                    place += len(wanted)
                    break
            else:
                raise ValueError(
                    f"Row {row} of the prompt has groups of patch tokens {sizes[place:][:8]} where "
                    f"image {taken['image']} of {len(waiting['image'])} or video {taken['video']} of "
                    f"{len(waiting['video'])} would have to follow, which write other groups. Pass ids and media "
                    "that come from one call of the processor."
                )
    for kind, passed in waiting.items():
        if taken[kind] != len(passed):
            raise ValueError(
                f"The prompts place {taken[kind]} {kind}(s), but {len(passed)} were passed. "
                "Pass ids and media that come from one call of the processor."
            )
    return torch.cat(pieces)


def joined_features(features: Any) -> Tensor | None:
    """(T, D) of what `get_image_features` or `get_video_features` returned, or of such vectors themselves."""
    vectors = getattr(features, "pooler_output", features)
    return torch.cat(tuple(vectors)) if isinstance(vectors, (list, tuple)) else vectors


def _of_all_chunks(parts: list[Any]) -> Tensor | None:
    """What was computed for each chunk of crops, in one tensor; None where nothing was."""
    return None if not parts or parts[0] is None else torch.cat(parts)


class Molmo2VisionInputsMixin:
    """The part of `Molmo2Model` that handles images and videos; the model has config, backbone and embeddings."""

    config: Any
    vision_backbone: Any

    @property
    def patch_ids(self) -> list[int]:
        """Ids of the tokens that receive a feature vector."""
        return [self.config.image_patch_id, self.config.image_low_res_id]

    @property
    def visual_ids(self) -> list[int]:
        """Ids of all visual tokens: patch, column, start and end tokens."""
        return [getattr(self.config, name) for name in TOKEN_ID_OFFSETS]

    def _special_ids(self, input_ids: Tensor | None, inputs_embeds: Any) -> Tensor:
        """(B, S) ids; where only embeddings are known, those of visual tokens, and -1 elsewhere."""
        if input_ids is not None:
            return input_ids
        ids = torch.tensor(self.visual_ids, device=inputs_embeds.device)
        model: Any = self
        rows = model.get_input_embeddings()(ids)
        matches = [(inputs_embeds == row).all(-1) for row in rows.to(inputs_embeds.device, inputs_embeds.dtype)]
        found = torch.full(inputs_embeds.shape[:2], -1, device=inputs_embeds.device)
        for match, token_id in zip(matches, ids):
            found = torch.where(match, token_id, found)
        return found

    def patch_token_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor | None = None) -> Tensor:
        """(B, S) bool: tokens that receive a feature vector, found by id or by their plain embeddings."""
        ids = self._special_ids(input_ids, inputs_embeds)
        return torch.isin(ids, torch.tensor(self.patch_ids, device=ids.device))

    def visual_token_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor | None = None) -> Tensor:
        """(B, S) bool: visual tokens, which the processor marks in `token_type_ids`."""
        ids = self._special_ids(input_ids, inputs_embeds)
        return torch.isin(ids, torch.tensor(self.visual_ids, device=ids.device))

    def resolve_visual_mask(
        self, token_type_ids: Tensor | None, input_ids: Tensor | None, inputs_embeds: Any
    ) -> Tensor:
        """(B, S) bool: `token_type_ids`; where they are missing or of another width, found by id."""
        shape = (inputs_embeds if input_ids is None else input_ids).shape[:2]
        if token_type_ids is not None and token_type_ids.shape == shape:
            return token_type_ids.bool()
        return self.visual_token_mask(input_ids, inputs_embeds)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        image_token_pooling: Tensor,
        image_grids: Tensor,
        image_num_crops: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: (C, P, patch * patch * 3) crops of all images, the low-res view of each first.
            image_token_pooling: (T, 4) int64, relative to each image's own crops.
            image_grids: (images, 4) int64 rows, cols of the low-res view, rows, cols of the high-res crops, in tokens.
            image_num_crops: (images,) int64, the low-res view counted.
            output_hidden_states, output_attentions: Also return what each layer of the vision transformer gave;
                attention weights are None for implementations that compute none. By default as in the configuration.
        Returns:
            `pooler_output`: for each image (tokens, text width), one vector per patch token; `last_hidden_state`:
            (C, P, D) of the last layer that the connector needs; `hidden_states`, `attentions`: one entry per layer up
            to this one, hidden states with their input before. A tuple under `return_dict=False`.
        Raises:
            ValueError: If these tensors contradict each other, naming both numbers.
        """
        media = flat_media("image", pixel_values, image_token_pooling, image_grids, image_num_crops)
        return self._encoded_output(*media, output_hidden_states, output_attentions)

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: Tensor,
        video_token_pooling: Tensor,
        video_grids: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode videos.

        Args:
            pixel_values_videos: (F, P, patch * patch * 3) frames of all videos.
            video_token_pooling: (T, 9) int64, relative to each video's own frames.
            video_grids: (videos, 3) int64 frames, rows, cols in tokens.
        Returns:
            As `get_image_features`, with one entry of `pooler_output` per row of `video_grids`. The hidden states of
            all frames are in memory at once; `encode_frames` returns the vectors alone.
        Raises:
            ValueError: If these tensors contradict each other, naming both numbers.
        """
        media = flat_media("video", pixel_values_videos, video_token_pooling, video_grids)
        return self._encoded_output(*media, output_hidden_states, output_attentions)

    def _encoded_output(
        self, pixels: Tensor, pooling: Tensor, tokens: Tensor, wants_states: bool | None, wants_weights: bool | None
    ) -> BaseModelOutputWithPooling:
        """The vectors of each image or video, and the states of the vision transformer that led to them."""
        model: Any = self
        wants_states = model._setting("output_hidden_states", wants_states)
        wants_weights = model._setting("output_attentions", wants_weights)
        blocks = list(self.vision_backbone.image_vit.transformer.resblocks)
        attentions = [block.attention for block in blocks] if wants_weights else []
        blocks = blocks if wants_states else blocks[-1:]
        # First input and output of each call, one for each chunk of crops.
        calls: dict[Any, list[tuple[Any, Any]]] = {module: [] for module in (*blocks, *attentions)}
        hooks = [
            module.register_forward_hook(lambda module, args, output: calls[module].append((args[0], output)))
            for module in calls
        ]
        try:
            vectors = self.vision_backbone(pixels, pooling)
        finally:
            for hook in hooks:
                hook.remove()
        states = [_of_all_chunks([output for _, output in calls[block]]) for block in blocks]
        weights = [_of_all_chunks([output[1] for _, output in calls[attention]]) for attention in attentions]
        embedded = _of_all_chunks([states_in for states_in, _ in calls[blocks[0]]])
        found = (pooling >= 0).any(-1).split(tokens.tolist())  # tokens without a patch have no vector
        return BaseModelOutputWithPooling(
            last_hidden_state=states[-1],
            pooler_output=vectors.split([int(own.sum()) for own in found]),  # a tuple, as the library has it
            hidden_states=(embedded, *states) if wants_states else None,  # type: ignore[arg-type]
            attentions=tuple(weights) if wants_weights else None,  # type: ignore[arg-type]
        )

    @torch.inference_mode()
    def encode_frames(self, pixel_values_videos: Tensor, video_token_pooling: Tensor, video_grids: Tensor) -> Tensor:
        """(T, text width): the vectors of videos on any device, frame after frame: the processor's `frame_encoder`.

        The transfer to a GPU is asynchronous (from pinned memory).
        """
        device = self.vision_backbone.device
        if device.type == "cuda" and pixel_values_videos.device.type == "cpu":
            pixel_values_videos = pixel_values_videos.pin_memory().to(device, non_blocking=True)
        pixels, pooling, _ = flat_media("video", pixel_values_videos, video_token_pooling, video_grids)
        return self.vision_backbone(pixels, pooling)

    def _require_media(self, input_ids: Tensor | None, inputs_embeds: Tensor, is_prompt: bool) -> None:
        """Refuses patch tokens without vectors to add, which read like any other token and mean nothing.

        Single tokens after a cache are left unchecked, and compiled steps: `generate` writes no visual tokens. What
        is neither the processor's whole output nor of `generate` is only warned about: the recorded logits of
        training checkpoints and transformers' common tests are of such ids.
        """
        num_patches = int(self.patch_token_mask(input_ids, inputs_embeds).sum())
        if not num_patches:
            return
        problem = (
            f"The prompt has {num_patches} patch token(s), but no image or video was passed for them: expected "
            f"`{ENCODED_INPUTS['image'][0]}` or `{ENCODED_INPUTS['video'][0]}` with their companions. Pass all "
            "that the processor returned, and no `<im_patch>` in the text."
        )
        if is_prompt:
            raise ValueError(problem)
        logger.warning_once(problem)

    def _media_features(
        self, input_ids: Tensor | None, inputs_embeds: Tensor, media: dict[str, Any], example_ids: Tensor | None
    ) -> Tensor | None:
        """(T, D) vectors of all patch tokens in the order of the prompts; None without media."""
        parts = []
        for kind, names in ENCODED_INPUTS.items():
            vectors = joined_features(media[f"{kind}_features"])
            if vectors is None:
                vectors = self._encoded(kind, {name: media[name] for name in names})
            elif media[names[0]] is not None:
                raise ValueError(f"Pass either `{kind}_features` or `{names[0]}`: found both.")
            if vectors is not None:
                parts.append(vectors)
        if len(parts) < 2:
            return parts[0] if parts else None
        image_grids, video_grids = media["image_grids"], media["video_grids"]
        if image_grids is None or video_grids is None:
            raise ValueError(
                "Images and videos together need `image_grids`, `image_num_crops` and `video_grids` besides their "
                "features, to tell which tokens belong to which. Pass all that the processor returned."
            )
        require_grids("image", image_grids)
        require_grids("video", video_grids)
        require_token_shape(inputs_embeds.shape[:2], example_ids=example_ids)
        ids, *examples = on_host(
            self._special_ids(input_ids, inputs_embeds), *([] if example_ids is None else [example_ids])
        )
        order = prompt_order(token_groups(ids, self.config, *examples), *on_host(image_grids, video_grids))
        return torch.cat(parts)[order.to(parts[0].device)]

    def _encoded(self, kind: str, given: dict[str, Any]) -> Tensor | None:
        missing = [name for name, value in given.items() if value is None]
        if len(missing) == len(given):
            return None
        if missing:
            raise ValueError(f"{', '.join(missing)} missing: pass all of {list(given)} that the processor returned.")
        pixels, pooling, _ = flat_media(kind, *given.values())
        return self.vision_backbone(pixels, pooling)

    def _add_features(
        self, input_ids: Tensor | None, inputs_embeds: Tensor, vectors: Tensor, repeats: int, is_visual: Tensor | None
    ) -> tuple[Tensor, bool]:
        """(B, S, D) with vectors (T, D) added to the patch tokens; `repeats` consecutive rows share theirs.

        And whether any token is visual, which is read with the numbers of patch tokens: one wait for the device.
        """
        is_patch = self.patch_token_mask(input_ids, inputs_embeds)
        numbers = is_patch[::repeats].sum(-1)
        any_visual = numbers.new_zeros(1) if is_visual is None else is_visual.any()[None].to(numbers)
        *counts, has_visual = torch.cat((numbers, any_visual)).tolist()
        expected = sum(counts)
        if expected != len(vectors):
            raise ValueError(
                f"The prompts have {expected} patch token(s), but the images and videos give {len(vectors)} "
                "vector(s). Pass ids and media of one processor call; truncated prompts and stray `<im_patch>` in the "
                "text also lead here."
            )
        if repeats > 1:
            vectors = torch.cat([of_row.repeat(repeats, 1) for of_row in vectors.split(counts)])
        vectors = vectors.to(inputs_embeds.device, inputs_embeds.dtype)
        # The first places in a stable order are those of the patch tokens: `nonzero` would wait for their number.
        places = is_patch.flatten().int().argsort(stable=True, descending=True)[: len(vectors)]
        flat = inputs_embeds.flatten(0, 1).index_add(0, places.to(inputs_embeds.device), vectors)
        return flat.unflatten(0, inputs_embeds.shape[:2]), bool(has_visual)
