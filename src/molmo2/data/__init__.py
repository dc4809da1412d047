"""Rows of the published data sets as conversations, for training and for evaluation."""
