"""Training examples, batches, packing and fine-tuning."""
