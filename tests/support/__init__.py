"""What several test modules share: checkpoints, cases, media, fakes."""
