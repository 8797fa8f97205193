"""Evaluations that run on the training mesh, inside training or alone: with prompts, captions, or frozen features."""
