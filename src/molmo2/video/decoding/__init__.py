"""Decoders of video files behind one interface."""
