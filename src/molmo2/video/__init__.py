"""Videos: loading, sampling, decoding, pixels."""
