"""How pictures enter the model: encoded flat, told apart by the prompt, added to the embeddings of their tokens."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from molmo2.model.media_layout import (
    MediaTables,
    TokenGroup,
    assign_media,
    flat_pooling,
    prompt_order,
    repeat_rows,
    token_groups,
)

# What a picture is encoded from, as the processor returns it; pixels first.
ENCODED_INPUTS = {
    "image": ("pixel_values", "image_token_pooling", "image_grids", "image_num_crops"),
    "video": ("pixel_values_videos", "video_token_pooling", "video_grids"),
}


class Molmo2PictureMixin:
    """What `Molmo2Model` does with pictures; it supplies `config`, `vision_backbone` and the embeddings."""

    config: Any
    vision_backbone: Any

    @property
    def patch_ids(self) -> list[int]:
        """Ids of the tokens that receive a vector of a picture."""
        return [self.config.image_patch_id, self.config.image_low_res_id]

    @property
    def visual_ids(self) -> list[int]:
        """Ids of all tokens that stand for a picture: patches, column, start and end tokens."""
        return [
            *self.patch_ids,
            self.config.image_col_id,
            self.config.image_start_token_id,
            self.config.image_end_token_id,
            self.config.low_res_image_start_token_id,
            self.config.frame_start_token_id,
            self.config.frame_end_token_id,
        ]

    def _special_ids(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """The ids, or where only embeddings are known, ids that are right for visual tokens and -1 elsewhere."""
        if input_ids is not None:
            return input_ids
        ids = torch.tensor(self.visual_ids, device=inputs_embeds.device)
        rows = self.get_input_embeddings()(ids)
        matches = [(inputs_embeds == row).all(-1) for row in rows.to(inputs_embeds.device, inputs_embeds.dtype)]
        found = torch.full(inputs_embeds.shape[:2], -1, device=inputs_embeds.device)
        for match, token_id in zip(matches, ids):
            found = torch.where(match, token_id, found)
        return found

    def is_patch(self, input_ids: Tensor | None, inputs_embeds: Tensor | None = None) -> Tensor:
        """(B, S) bool: tokens that receive a vector of a picture, found in ids or in their plain embeddings."""
        ids = self._special_ids(input_ids, inputs_embeds)
        return torch.isin(ids, torch.tensor(self.patch_ids, device=ids.device))

    def is_visual(self, input_ids: Tensor | None, inputs_embeds: Tensor | None = None) -> Tensor:
        """(B, S) bool: tokens that stand for a picture, what the processor marks in `token_type_ids`."""
        ids = self._special_ids(input_ids, inputs_embeds)
        return torch.isin(ids, torch.tensor(self.visual_ids, device=ids.device))

    def marked_as_visual(self, marks: Tensor | None, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """(B, S) bool: what `marks` say, or, where they are none or of another width, what is found in the tokens."""
        fits = marks is not None and marks.shape == (inputs_embeds if input_ids is None else input_ids).shape[:2]
        return marks.bool() if fits else self.is_visual(input_ids, inputs_embeds)

    def token_groups(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None = None, example_ids: Tensor | None = None
    ) -> list[list[TokenGroup]]:
        """Groups of patch tokens for each row or packed example, from which the owner of each picture follows."""
        if input_ids is not None and input_ids.shape[1] == 0:
            input_ids = None
        config, ids = self.config, self._special_ids(input_ids, inputs_embeds)
        ends = (config.image_end_token_id, config.frame_end_token_id)
        return token_groups(ids, self.patch_ids, *ends, config.low_res_image_start_token_id, example_ids)

    def get_image_features(
        self,
        pixel_values: Tensor,
        image_token_pooling: Tensor,
        image_grids: Tensor,
        image_num_crops: Tensor,
        **kwargs,
    ) -> Tensor:
        """Encode images.

        Args:
            pixel_values: (C, P, patch * patch * 3) crops of all images, the low-res view of each first.
            image_token_pooling: (T, 4) int64, relative to each image's own crops.
            image_grids: (images, 4) int64 rows, cols of the low-res view, rows, cols of the high-res crops, in tokens.
            image_num_crops: (images,) int64, the low-res view counted.
        Returns:
            (T, text width): one vector per patch token, image after image.
        Raises:
            ValueError: If these tensors contradict each other, naming both numbers.
        """
        tokens = MediaTables(image_grids=image_grids).image_tokens()
        self._require_equal("`image_num_crops` adds up to", image_num_crops.sum(), "`pixel_values` has", pixel_values)
        self._require_equal("`image_grids` adds up to", tokens.sum(), "`image_token_pooling` has", image_token_pooling)
        pooling = flat_pooling(image_token_pooling, tokens, image_num_crops, pixel_values.shape[1])
        return self.vision_backbone(pixel_values, pooling)

    def get_video_features(
        self, pixel_values_videos: Tensor, video_token_pooling: Tensor, video_grids: Tensor, **kwargs
    ) -> Tensor:
        """Encode videos.

        Args:
            pixel_values_videos: (F, P, patch * patch * 3) frames of all videos.
            video_token_pooling: (T, 9) int64, relative to each video's own frames.
            video_grids: (videos, 3) int64 frames, rows, cols in tokens.
        Returns:
            (T, text width): one vector per patch token, video after video, frame after frame.
        Raises:
            ValueError: If these tensors contradict each other, naming both numbers.
        """
        tokens, frames = MediaTables(video_grids=video_grids).video_tokens(), video_grids[:, 0]
        self._require_equal("`video_grids` counts", frames.sum(), "`pixel_values_videos` has", pixel_values_videos)
        self._require_equal("`video_grids` adds up to", tokens.sum(), "`video_token_pooling` has", video_token_pooling)
        pooling = flat_pooling(video_token_pooling, tokens, frames, pixel_values_videos.shape[1])
        return self.vision_backbone(pixel_values_videos, pooling)

    @torch.inference_mode()
    def encode_frames(self, pixel_values_videos: Tensor, video_token_pooling: Tensor, video_grids: Tensor) -> Tensor:
        """`get_video_features` of tensors that are elsewhere: the `frame_encoder` of the processor.

        On its way to a GPU the transfer runs beside what the GPU computes (from pinned memory).
        """
        device = self.vision_backbone.device
        if device.type == "cuda" and pixel_values_videos.device.type == "cpu":
            pixel_values_videos = pixel_values_videos.pin_memory().to(device, non_blocking=True)
        return self.get_video_features(pixel_values_videos, video_token_pooling, video_grids)

    @staticmethod
    def _require_equal(stated: str, expected: Tensor, holder: str, tensor: Tensor) -> None:
        if int(expected) != len(tensor):
            raise ValueError(
                f"{stated} {int(expected)}, but {holder} {len(tensor)} row(s). Pass the tensors of one call of the "
                "processor, without dropping or repeating rows."
            )

    def _picture_vectors(
        self, input_ids: Tensor | None, inputs_embeds: Tensor, pictures: dict, example_ids: Tensor | None
    ) -> Tensor | None:
        """Vectors of all pictures in the order of the prompts, (T, D); None without pictures."""
        parts = []
        for kind, encode in (("image", self.get_image_features), ("video", self.get_video_features)):
            vectors = pictures[f"{kind}_features"]
            given = {name: pictures[name] for name in ENCODED_INPUTS[kind]}
            if vectors is None:
                vectors = self._encoded(given, encode)
            elif given[ENCODED_INPUTS[kind][0]] is not None:
                raise ValueError(f"Pass either `{kind}_features` or `{ENCODED_INPUTS[kind][0]}`: found both.")
            if vectors is not None:
                parts.append(vectors)
        if len(parts) < 2:
            return parts[0] if parts else None
        tables = MediaTables(pictures["image_grids"], pictures["image_num_crops"], pictures["video_grids"])
        if tables.image_grids is None or tables.video_grids is None:
            raise ValueError(
                "Images and videos together need `image_grids`, `image_num_crops` and `video_grids` besides their "
                "features, to tell which tokens belong to which. Pass all that the processor returned."
            )
        groups = self.token_groups(input_ids, inputs_embeds, example_ids)
        order = prompt_order(assign_media(groups, tables), tables)
        return torch.cat(parts)[order.to(parts[0].device)]

    @staticmethod
    def _encoded(given: dict[str, Tensor | None], encode: Callable[..., Tensor]) -> Tensor | None:
        missing = [name for name, value in given.items() if value is None]
        if len(missing) == len(given):
            return None
        if missing:
            raise ValueError(f"{', '.join(missing)} missing: pass all of {list(given)} that the processor returned.")
        return encode(**given)

    def _add_pictures(self, input_ids: Tensor | None, inputs_embeds: Tensor, vectors: Tensor, repeats: int) -> Tensor:
        is_patch = self.is_patch(input_ids, inputs_embeds)
        slots_of_rows = is_patch[::repeats].sum(-1).tolist()
        expected = sum(slots_of_rows)
        if expected != len(vectors):
            raise ValueError(
                f"The prompts have {expected} patch token(s), but the pictures give {len(vectors)} vector(s). Pass "
                "ids and pictures of one processor call; truncated prompts and stray `<im_patch>` in the text also "
                "lead here."
            )
        if repeats > 1:
            copies = repeat_rows(slots_of_rows, [[row] for row in range(len(slots_of_rows))], repeats)
            vectors = vectors[copies.to(vectors.device)]
        vectors = vectors.to(inputs_embeds.device, inputs_embeds.dtype)
        slots = is_patch.flatten().nonzero()[:, 0]
        flat = inputs_embeds.flatten(0, 1).index_add(0, slots.to(inputs_embeds.device), vectors)
        return flat.unflatten(0, inputs_embeds.shape[:2])
