"""Suffixes of image files, in a module that needs nothing: batches and command lines read them without torch."""

FRAME_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
IMAGE_SUFFIXES = (*FRAME_SUFFIXES, ".avif", ".gif", ".heic")  # a GIF among videos is a clip, not a frame
