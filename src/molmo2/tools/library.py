"""Model inputs for transformers' own Molmo2 class, which reads them under another name and in another form.

| | this processor, the published one, serving engines | the library's class and processor |
|---|---|---|
| visual tokens | `token_type_ids`, bool | `mm_token_type_ids`, 1 on them |
| pooling indices | from the first crop (frame) of each image (video) | over all crops (frames) of the call |

The model of this package reads both forms; the library's reads its own, and the other one wrongly without an error.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from molmo2.media_features import MediaFeatures
from molmo2.model.vision_inputs import flat_pooling, image_groups


def library_inputs(inputs: Mapping[str, Any]) -> MediaFeatures:
    """Inputs that both classes read, and give the same logits for.

    Args:
        inputs: What the processor returned, as tensors (`return_tensors="pt"`); not changed.
    Returns:
        The same with `mm_token_type_ids` (B, S) int64 in the place of `token_type_ids`, and pooling indices over all
        images or videos. `generate` of either class takes it as well.
    Raises:
        ValueError: There are other values than tensors, features in the place of pixels, or images and videos
            together, which the library's class does not take.
    """
    data = dict(inputs)
    others = sorted(name for name, value in data.items() if not isinstance(value, Tensor) and name != "video_metadata")
    if others:
        raise ValueError(f'{others} are not tensors. Call the processor with `return_tensors="pt"`.')
    encoded = sorted(name for name in data if name in ("image_features", "video_features"))
    if encoded:
        raise ValueError(
            f"{encoded} are of this package's model; the library's class reads pixels. Call the processor without "
            "`frame_encoder`."
        )
    if data.get("image_grids") is not None and data.get("video_grids") is not None:
        raise ValueError(
            "transformers' own Molmo2 class takes images or videos in one call, not both. Split the call."
        )
    token_types = data.pop("token_type_ids", None)
    if token_types is not None:
        data["mm_token_type_ids"] = token_types.to(torch.int64)
    if data.get("image_grids") is not None:
        tokens = image_groups(data["image_grids"]).sum(-1)
        patches = data["pixel_values"].shape[1]
        data["image_token_pooling"] = flat_pooling(
            data["image_token_pooling"], tokens, data["image_num_crops"], patches
        )
    if data.get("video_grids") is not None:
        grids, patches = data["video_grids"], data["pixel_values_videos"].shape[1]
        data["video_token_pooling"] = flat_pooling(
            data["video_token_pooling"], grids.prod(dim=-1), grids[:, 0], patches
        )
    return MediaFeatures(data, media=getattr(inputs, "media", ()))
