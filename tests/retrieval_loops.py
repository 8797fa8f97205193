"""Retrieval in two stages, one query after the other."""

import numpy as np


def by_loops(cosines_NxM: np.ndarray, no_yes_NxMx2: np.ndarray, owner_M: np.ndarray, k: int) -> dict[str, float]:
    """What the second stage finds, one query after the other, from the scores of all pairs."""
    images = len(cosines_NxM)
    own_NxM = owner_M[None] == np.arange(images)[:, None]
    found: dict[str, float] = {}
    hard: list[bool] = []
    for way, cosines, scores, own in (
        ("image_to_text", cosines_NxM, no_yes_NxMx2, own_NxM),
        ("text_to_image", cosines_NxM.T, no_yes_NxMx2.swapaxes(0, 1), own_NxM.T),
    ):
        places = []
        for row in range(len(cosines)):
            first = np.argsort(-cosines[row])
            order = [*sorted(first[:k], key=lambda item: -scores[row, item, 1]), *first[k:]]
            # other own items don't stand before the best one
            place = next(place for place, item in enumerate(order) if own[row, item])
            places.append(sum(not own[row, item] for item in order[:place]))
            wrong = next(item for item in first if not own[row, item])
            hard.append(scores[row, wrong, 0] > scores[row, wrong, 1])
        found |= {f"{way}_r{n}_reranked": float(np.mean(np.asarray(places) < n)) for n in (1, 5, 10)}
        found[f"{way}_mean_rank_reranked"] = float(np.mean(places)) + 1
    right = [no_yes_NxMx2[owner, text, 1] > no_yes_NxMx2[owner, text, 0] for text, owner in enumerate(owner_M)]
    own_share, hard_share = float(np.mean(right)), float(np.mean(hard))
    return found | {
        "matching_accuracy_own": own_share,
        "matching_accuracy_hard": hard_share,
        "matching_accuracy": (own_share + hard_share) / 2,
    }
