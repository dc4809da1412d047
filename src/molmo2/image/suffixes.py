"""Suffixes of image files, in a module that imports nothing: command lines read them without torch.

A GIF is an image here, as for Pillow: named alone, or in a folder, its first frame is meant.
"""

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")  # of frames of videos too
IMAGE_SUFFIXES = (*FRAME_SUFFIXES, ".gif", ".avif", ".heic")
