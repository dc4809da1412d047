"""Suffixes of video files, in a module that imports nothing: command lines read them without torch.

A GIF is a clip only where the caller already knows that a video is meant, and says so: `Folder` of `molmo2.data` for
the videos of a data set. See `molmo2.image.suffixes`.
"""

# The first ones are the most common in data sets. Not those of `mimetypes`, which differ between systems.
VIDEO_SUFFIXES = (
    *(".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".mpg", ".mpeg"),
    *(".3gp", ".flv", ".m2ts", ".mts", ".ogv", ".ts", ".wmv"),
)
ANIMATION_SUFFIX = ".gif"
