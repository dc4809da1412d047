"""Plans for cutting images and video frames into crops, patches and visual tokens: integers in, integers out.

One word per thing: a *crop* is one input of the vision tower, a *patch* is one of its positions, a *token* is one
pooled window of patches and so one position in the text. The *canvas* is the image resized so that overlapping crops
tile it. Number of tokens, order of the crops and pooling indices all follow from one `ImagePlan` (or `VideoPlan`), so
the prompt and the pixels cannot disagree. No pixel is read here. Bare lengths are pixels.

Source of the rules: the training-time preprocessing of Molmo2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import numpy as np

from molmo2.configuration import PAD_PATCH, PAD_SLOT


@dataclass(frozen=True)
class CropSettings:
    """The shape of a crop and how its patches are pooled.

    Attributes:
        crop_height, crop_width: size of one crop.
        patch_size: side of one square patch.
        pool_height, pool_width: window of patches, in patches, that becomes one token.
        margin_before, margin_after: overlap of neighbouring crops, in patches: what belongs to the neighbour
            above/left of a crop and below/right of it. A video frame has no neighbours, its margins do not matter.

    Raises:
        ValueError: no image could be cut with these sizes; the message says which and why.
    """

    crop_height: int
    crop_width: int
    patch_size: int
    pool_height: int
    pool_width: int
    margin_before: int = 0
    margin_after: int = 0

    def __post_init__(self) -> None:
        for name in ("crop_height", "crop_width", "patch_size", "pool_height", "pool_width"):
            _require_int(name, getattr(self, name), minimum=1)
        for name in ("margin_before", "margin_after"):
            _require_int(name, getattr(self, name), minimum=0)
        for name, length in (("height", self.crop_height), ("width", self.crop_width)):
            if length % self.patch_size:
                below = length - length % self.patch_size
                raise ValueError(
                    f"Crops of {name} {length} cannot be cut into patches of {self.patch_size} x {self.patch_size} "
                    f"pixels. Set the {name} in `size` to a multiple of `patch_size`, such as "
                    f"{below + self.patch_size}."
                )
        if min(self.window_height, self.window_width) < 1:
            raise ValueError(
                f"Overlap margins of {self.margin_before} + {self.margin_after} patches leave nothing of a crop of "
                f"{self.crop_patch_rows} x {self.crop_patch_cols} patches. Use smaller `overlap_margins` or a larger "
                "`size`."
            )

    @property
    def crop_patch_rows(self) -> int:
        return self.crop_height // self.patch_size

    @property
    def crop_patch_cols(self) -> int:
        return self.crop_width // self.patch_size

    @property
    def patches_per_crop(self) -> int:
        return self.crop_patch_rows * self.crop_patch_cols

    @property
    def margin_pixels(self) -> int:
        """Pixels of both margins together, along one axis."""
        return (self.margin_before + self.margin_after) * self.patch_size

    @property
    def window_height(self) -> int:
        """Pixels from the top of one crop to the top of the next."""
        return self.crop_height - self.margin_pixels

    @property
    def window_width(self) -> int:
        """Pixels from the left of one crop to the left of the next."""
        return self.crop_width - self.margin_pixels

    @property
    def crop_grid(self) -> tuple[int, int]:
        """Rows and columns of tokens of one crop."""
        return self.pooled_grid(self.crop_patch_rows, self.crop_patch_cols)

    def pooled_grid(self, patch_rows: int, patch_cols: int) -> tuple[int, int]:
        """Rows and columns of tokens that cover a grid of patches (the last window may be partly empty)."""
        return -(-patch_rows // self.pool_height), -(-patch_cols // self.pool_width)


@dataclass(frozen=True)
class ImagePlan:
    """The crops of one image; token counts, grids and pooling indices follow from it.

    Crop 0 is the low-resolution view (the whole image resized to one crop), then come the tiles of the canvas, row
    by row.

    Attributes:
        tile_rows, tile_cols: crops down and across the canvas.
        canvas_height, canvas_width: size the image is resized to before the tiles are cut.
        settings: the crop settings of the plan.
    """

    tile_rows: int
    tile_cols: int
    canvas_height: int
    canvas_width: int
    settings: CropSettings

    @property
    def num_crops(self) -> int:
        """Number of crops, the low-resolution view included."""
        return 1 + self.tile_rows * self.tile_cols

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """One row of `image_grids`: low-res rows, cols, high-res rows, cols, in tokens."""
        patch_size = self.settings.patch_size
        canvas = self.settings.pooled_grid(self.canvas_height // patch_size, self.canvas_width // patch_size)
        return *self.settings.crop_grid, *canvas

    @property
    def num_pooled_tokens(self) -> int:
        """Visual tokens of the image, without start, end and column tokens; the rows of `image_token_pooling`."""
        low_rows, low_cols, high_rows, high_cols = self.grid
        return low_rows * low_cols + high_rows * high_cols


@dataclass(frozen=True)
class VideoPlan:
    """The crops of a video: every frame is one crop, without tiles.

    A slow-fast video pools its key frames as other videos do and the frames between them more coarsely, so that the
    same number of tokens covers a longer time. Everything after the plan sees it as a row of short videos, one for
    each run.

    Attributes:
        num_frames: sampled frames.
        settings: the crop settings of key frames.
        between: the crop settings of the other frames; None if all are pooled alike.
        key_frame_interval: frames from one key frame to the next; the last frame of the video is a key frame as well.

    Raises:
        ValueError: there is no frame, or the interval is not a whole number of at least 1.
    """

    num_frames: int
    settings: CropSettings
    between: CropSettings | None = None
    key_frame_interval: int = 1

    def __post_init__(self) -> None:
        _require_int("num_frames", self.num_frames, minimum=1, hint="A video needs at least one frame.")
        hint = "1 makes every frame a key frame."
        _require_int("key_frame_interval", self.key_frame_interval, minimum=1, hint=hint)
        for name in ("num_frames", "key_frame_interval"):  # numbers of numpy would reach grids and counts
            object.__setattr__(self, name, int(getattr(self, name)))
        if self.key_frame_interval == 1:
            object.__setattr__(self, "between", None)

    @property
    def runs(self) -> tuple["VideoPlan", ...]:
        """Plans of the runs of frames that are pooled alike. Key frames that follow each other are one run."""
        if self.between is None:
            return (self,)
        last = self.num_frames - 1
        is_key = [index % self.key_frame_interval == 0 or index == last for index in range(self.num_frames)]
        return tuple(
            VideoPlan(len(list(frames)), self.settings if key else self.between) for key, frames in groupby(is_key)
        )

    @property
    def grids(self) -> list[tuple[int, int, int]]:
        """The rows of `video_grids`: frames, then rows and columns of tokens of each, for every run."""
        return [(run.num_frames, *run.settings.crop_grid) for run in self.runs]

    @property
    def num_pooled_tokens(self) -> int:
        """Visual tokens of the video, without start, end and column tokens; the rows of `video_token_pooling`."""
        return sum(map(math.prod, self.grids))


def plan_image(height: int, width: int, settings: CropSettings, max_crops: int) -> ImagePlan:
    """The plan of one image: chooses its tiling.

    Every tiling of at most `max_crops` tiles has a scale: how much the image, margins set aside, grows to fill it.
    The tiling with the smallest scale that does not shrink the image wins; if all of them shrink it, the one that
    shrinks it least. Fewer tiles, then fewer rows, win a tie. A side shorter than the margins has a negative scale,
    which always leaves one tile; a side exactly as long has an infinite one, which leaves the choice to the other.

    A 480 x 640 image has 368 x 528 pixels inside margins of 112. With windows of 266 pixels, 2 x 2 tiles (532 x 532)
    are the first that hold it at full size:

        >>> settings = CropSettings(378, 378, 14, 2, 2, margin_before=4, margin_after=4)
        >>> plan = plan_image(480, 640, settings, max_crops=8)
        >>> (plan.tile_rows, plan.tile_cols), (plan.canvas_height, plan.canvas_width)
        ((2, 2), (644, 644))
        >>> plan.num_crops, plan.grid, plan.num_pooled_tokens
        (5, (14, 14, 23, 23), 725)

    Args:
        height, width: the image, in pixels.
        settings: crop settings.
        max_crops: maximum number of tiles; the low-resolution view comes on top.

    Raises:
        ValueError: the image is empty or `max_crops` is below 1.
    """
    _require_int("height", height, minimum=1, hint="An empty image cannot be cut.")
    _require_int("width", width, minimum=1, hint="An empty image cannot be cut.")
    _require_int("max_crops", max_crops, minimum=1, hint="1 gives one tile (and the low-resolution view).")
    tilings = _tilings(int(max_crops))
    window = np.array([settings.window_height, settings.window_width], dtype=np.float32)
    inside_margins = np.array([height, width], dtype=np.float32) - np.float32(settings.margin_pixels)
    with np.errstate(divide="ignore"):  # a side as long as the margins asks for no tile: its scale is infinite
        scales = (tilings.astype(np.float32) * window / inside_margins).min(axis=1)
    enlarging = scales >= 1
    best = np.where(enlarging, scales, np.inf).argmin() if enlarging.any() else scales.argmax()
    tile_rows, tile_cols = tilings[best].tolist()
    return ImagePlan(
        tile_rows=tile_rows,
        tile_cols=tile_cols,
        canvas_height=tile_rows * settings.window_height + settings.margin_pixels,
        canvas_width=tile_cols * settings.window_width + settings.margin_pixels,
        settings=settings,
    )


def image_token_pooling(plan: ImagePlan) -> np.ndarray:
    """Pooling table of an image: for every token, the patches it pools.

    Returns:
        (num_pooled_tokens, pool_height * pool_width) int64. An entry counts the patches of this image's own crops,
        crop after crop, row by row; -1 where the window leaves the image. The low-resolution view comes first.
    """
    settings = plan.settings
    low_res = _pooling_windows(_crop_patch_ids(settings), settings)
    tiles = _pooling_windows(_canvas_patch_ids(plan) + settings.patches_per_crop, settings)
    return np.concatenate([low_res, tiles])


def video_token_pooling(plan: VideoPlan) -> np.ndarray:
    """Pooling table of a video: for every token, the patches it pools.

    Returns:
        (num_pooled_tokens, largest window) int64. An entry counts the patches of the frames of its run, frame after
        frame, row by row; -1 where the window leaves the frame, -2 after the end of a smaller window.
    """
    return stack_pooling([_run_token_pooling(run) for run in plan.runs])


def stack_pooling(tables: Sequence[np.ndarray], window: int = 0) -> np.ndarray:
    """Pooling tables concatenated along the tokens; rows of smaller windows are padded with -2.

    Args:
        tables: (T, K) int64, each with its own K.
        window: minimum K of the result.

    Returns:
        (sum of T, K) int64, K as wide as the widest table.
    """
    window = max([window, *(table.shape[1] for table in tables)])
    empty = np.empty((0, window), dtype=np.int64)
    padded = [np.pad(table, ((0, 0), (0, window - table.shape[1])), constant_values=PAD_SLOT) for table in tables]
    return np.concatenate([empty, *padded])


def _run_token_pooling(run: VideoPlan) -> np.ndarray:
    """Pooling table of one run, (tokens, window) int64."""
    one_frame = _pooling_windows(_crop_patch_ids(run.settings), run.settings)  # (tokens per frame, window)
    first_patches = np.arange(run.num_frames, dtype=np.int64) * run.settings.patches_per_crop
    frames = np.where(one_frame == PAD_PATCH, PAD_PATCH, one_frame + first_patches[:, None, None])
    return frames.reshape(-1, one_frame.shape[1])


@lru_cache(maxsize=32)
def _tilings(max_crops: int) -> np.ndarray:
    """All (rows, cols) with rows * cols <= max_crops, fewest tiles first, then fewest rows. (N, 2) int64."""
    pairs = [(rows, cols) for rows in range(1, max_crops + 1) for cols in range(1, max_crops // rows + 1)]
    tilings = np.array(sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair[0])), dtype=np.int64)
    tilings.flags.writeable = False  # the cache returns this array itself
    return tilings


def _crop_patch_ids(settings: CropSettings) -> np.ndarray:
    """Patch indices of one crop, row by row. (crop_patch_rows, crop_patch_cols) int64."""
    shape = settings.crop_patch_rows, settings.crop_patch_cols
    return np.arange(settings.patches_per_crop, dtype=np.int64).reshape(shape)


def _canvas_patch_ids(plan: ImagePlan) -> np.ndarray:
    """Index of every patch of the canvas among the patches of all tiles. (canvas rows, canvas cols) int64.

    Where two tiles overlap, each keeps the patches up to its own margin:

        canvas columns   0 1 2 3 4 5 6 7       two tiles of 5 patches, margins (1, 1), window 3
        first tile       a a a a .
        second tile            . b b b b       "." is seen by this tile but pooled from the other one
    """
    settings = plan.settings
    tile_row, row = _owner_along_axis(plan.tile_rows, settings.crop_patch_rows, settings)
    tile_col, col = _owner_along_axis(plan.tile_cols, settings.crop_patch_cols, settings)
    tile = tile_row[:, None] * plan.tile_cols + tile_col  # (canvas rows, canvas cols)
    return tile * settings.patches_per_crop + row[:, None] * settings.crop_patch_cols + col


def _owner_along_axis(num_tiles: int, crop_patches: int, settings: CropSettings) -> tuple[np.ndarray, np.ndarray]:
    """For every canvas position along one axis: the tile that owns it, and its position in that tile, in patches."""
    window = crop_patches - settings.margin_before - settings.margin_after
    position = np.arange(num_tiles * window + settings.margin_before + settings.margin_after, dtype=np.int64)
    tile = np.clip((position - settings.margin_before) // window, 0, num_tiles - 1)
    return tile, position - tile * window


def _pooling_windows(patch_ids: np.ndarray, settings: CropSettings) -> np.ndarray:
    """A grid of patch indices grouped in windows, row by row. (tokens, pool_height * pool_width) int64.

    The grid is padded to whole windows with -1, the smaller half of the padding before it:

        0 1 2             0  1 |  2 -1
        3 4 5     2 x 2   3  4 |  5 -1     tokens: [0 1 3 4] [2 -1 5 -1] [6 7 -1 -1] [8 -1 -1 -1]
        6 7 8   windows   -----+------
                          6  7 |  8 -1
                         -1 -1 | -1 -1
    """
    rows, cols = settings.pooled_grid(*patch_ids.shape)
    pad_rows = rows * settings.pool_height - patch_ids.shape[0]
    pad_cols = cols * settings.pool_width - patch_ids.shape[1]
    padding = [(pad_rows // 2, pad_rows - pad_rows // 2), (pad_cols // 2, pad_cols - pad_cols // 2)]
    padded = np.pad(patch_ids, padding, constant_values=PAD_PATCH)
    windows = padded.reshape(rows, settings.pool_height, cols, settings.pool_width).swapaxes(1, 2)
    return windows.reshape(rows * cols, settings.pool_height * settings.pool_width)


def _require_int(name: str, value: int, *, minimum: int, hint: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < minimum:
        raise ValueError(f"{name} is {value!r}, but must be a whole number of at least {minimum}. {hint}".rstrip())
