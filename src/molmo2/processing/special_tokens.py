"""The strings that Molmo2 adds to a tokenizer. Their ids are the tokenizer's business; see the published files."""

IMAGE_PLACEHOLDER = "<|image|>"
VIDEO_PLACEHOLDER = "<|video|>"

IMAGE_PATCH = "<im_patch>"
IMAGE_LOW_RES_PATCH = "<im_low>"
IMAGE_COLUMN = "<im_col>"
IMAGE_START = "<im_start>"
IMAGE_END = "<im_end>"
LOW_RES_IMAGE_START = "<low_res_im_start>"
FRAME_START = "<frame_start>"
FRAME_END = "<frame_end>"

# Tokens that stand for a picture: marked in `token_type_ids`, and visible to each other in both directions.
VISUAL_TOKENS = (
    IMAGE_PATCH,
    IMAGE_COLUMN,
    IMAGE_START,
    LOW_RES_IMAGE_START,
    FRAME_START,
    IMAGE_END,
    FRAME_END,
    IMAGE_LOW_RES_PATCH,
)
