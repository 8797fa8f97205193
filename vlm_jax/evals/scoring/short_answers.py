"""Answers that are compared as texts: word for word, as GQA does, or by how many letters must change (ANLS)."""

from collections.abc import Sequence

import numpy as np

from vlm_jax.evals.scoring.base import Answered, Scores, mean_points

ANLS_THRESHOLD = 0.5


def canonical_answer(text: str) -> str:
    """An answer as it is compared: lower case, without spaces around it and a full stop behind it."""
    return text.strip().lower().removesuffix(".").strip()


def score_exact(rows: Sequence[Answered]) -> Scores:
    """`exact_match` with any of the known answers, and that of each kind."""
    right = [canonical_answer(row.text) in map(canonical_answer, row.answers) for row in rows]
    return mean_points("exact_match", rows, [float(one) for one in right])


def score_gqa(rows: Sequence[Answered]) -> Scores:
    """`accuracy`, and that of each structure of questions; `binary` is that of all but `query`, `open` that of `query`.

    The evaluation of Hudson & Manning (2019) compares texts as they are; LLaVA first makes what its model says lower
    case and takes full stops off its end, and so does this.
    """
    right = [float(row.text.strip().rstrip(".").lower() == row.answers[0]) for row in rows]
    scores = mean_points("accuracy", rows, right)
    is_open = np.asarray([row.kind == "query" for row in rows])
    for name, members in (("binary", ~is_open), ("open", is_open)):
        if members.any() and any(row.kind for row in rows):
            scores.metrics[name] = float(scores.points[members].mean())
    return scores


def edit_distance(a: str, b: str) -> int:
    """The least number of characters to insert, remove or replace that makes one of the other (Levenshtein)."""
    row = np.arange(len(b) + 1)
    letters = np.asarray([ord(character) for character in b], np.int64)
    places = np.arange(len(b) + 1)
    for number, character in enumerate(a, 1):
        changed = np.minimum(row[1:] + 1, row[:-1] + (letters != ord(character)))
        best = np.concatenate([[number], changed])
        # Insertions: the best of what is on the left, at one for each step.
        row = np.minimum.accumulate(best - places) + places
    return int(row[-1])


def anls(text: str, answers: Sequence[str]) -> float:
    """The best of 1 - distance / length of the longer one over the answers; 0 below one half (Biten et al. 2019)."""
    said, best = " ".join(text.lower().split()), 0.0
    for answer in answers:
        known = " ".join(answer.lower().split())
        longer = max(len(said), len(known))
        best = max(best, 1.0 - edit_distance(said, known) / longer if longer else 1.0)
    return best if best >= ANLS_THRESHOLD else 0.0


def score_anls(rows: Sequence[Answered]) -> Scores:
    """`anls`, the mean of `anls`, and that of each kind."""
    return mean_points("anls", rows, [anls(row.text, row.answers) for row in rows])


__all__ = ["anls", "canonical_answer", "edit_distance", "score_anls", "score_exact", "score_gqa"]
