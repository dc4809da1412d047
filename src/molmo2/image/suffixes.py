"""Suffixes of image and video files, in a module that imports nothing: command lines read them without torch.

A GIF is an image here, as for Pillow: named alone, or in a folder, its first frame is meant. It is a clip only where
the caller already knows that a video is meant, and says so: `Folder` of `molmo2.data` for the videos of a data set.
"""

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")  # of frames of videos too
ANIMATION_SUFFIX = ".gif"
IMAGE_SUFFIXES = (*FRAME_SUFFIXES, ANIMATION_SUFFIX, ".avif", ".heic")
# The first ones are the most common in data sets. Not those of `mimetypes`, which differ between systems.
VIDEO_SUFFIXES = (
    *(".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".mpg", ".mpeg"),
    *(".3gp", ".flv", ".m2ts", ".mts", ".ogv", ".ts", ".wmv"),
)
