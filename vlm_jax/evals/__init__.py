"""Evaluations that run on the training mesh, inside training or alone: zero-shot classification and retrieval."""
