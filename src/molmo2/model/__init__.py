"""The network: vision transformer, pooling, projector and text decoder."""
