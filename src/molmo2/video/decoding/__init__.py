"""Decoders of video files behind one interface: decord, torchcodec and PyAV."""

from molmo2.video.decoding import isolation  # it registers itself with the readers

__all__ = ["isolation"]
