"""Losses over batches of features."""
