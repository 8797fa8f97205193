"""Sinkhorn-Knopp as SwAV's appendix prints it, in fp64."""

import numpy as np


def published_sinkhorn(scores: np.ndarray, temperature: float) -> np.ndarray:
    """[R, K] scores to assignments, three rounds."""
    q = np.exp(scores.astype(np.float64) / temperature).T
    q /= q.sum()
    for _ in range(3):
        q = q / q.sum(axis=1, keepdims=True) / q.shape[0]
        q = q / q.sum(axis=0, keepdims=True) / q.shape[1]
    return (q * q.shape[1]).T
