"""Decoders of video files behind one interface: decord, torchcodec and PyAV."""
