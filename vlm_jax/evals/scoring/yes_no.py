"""Questions to be answered by yes or no: POPE (Li et al. 2023) and MME (Fu et al. 2023), as their own code scores."""

from collections.abc import Sequence

import numpy as np

from vlm_jax.evals.scoring.base import Answered, Scores, kinds_of

PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def known(row: Answered) -> str:
    """The right answer, "yes" or "no"; raises `ValueError` when it is neither."""
    answer = row.answers[0].strip().lower()
    if answer not in ("yes", "no"):
        raise ValueError(f"an answer is {answer!r}, neither yes nor no")
    return answer


def says_no(text: str) -> bool:
    """POPE's reading: whether a word of the first sentence is No, no or not; all else is yes."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"}.isdisjoint(words)


def detection(said_yes: np.ndarray, is_yes: np.ndarray) -> dict[str, float]:
    """`f1`, `accuracy`, `precision`, `recall` of yes, and `yes_ratio`, the share of answers that are yes.

    Args:
        said_yes: bool [N].
        is_yes: bool [N].
    """
    found = float((said_yes & is_yes).sum())
    precision, recall = found / max(said_yes.sum(), 1), found / max(is_yes.sum(), 1)
    return {
        "f1": float(2 * precision * recall / max(precision + recall, 1e-30)),
        "accuracy": float((said_yes == is_yes).mean()),
        "precision": float(precision),
        "recall": float(recall),
        "yes_ratio": float(said_yes.mean()),
    }


def score_pope(rows: Sequence[Answered]) -> Scores:
    """`f1`, the mean over the ways in which objects were drawn (random, popular, adversarial), as tables have it; what
    `detection` tells of all questions and of each way, `f1_all` being the F1 over all questions."""
    said_yes = np.asarray([not says_no(row.text) for row in rows])
    is_yes = np.asarray([known(row) == "yes" for row in rows])
    whole = detection(said_yes, is_yes)
    kinds = {kind: detection(said_yes[at], is_yes[at]) for kind, at in kinds_of(rows).items()}
    mean = float(np.mean([found["f1"] for found in kinds.values()])) if kinds else whole["f1"]
    metrics = {"f1": mean, "f1_all": whole.pop("f1"), **whole}
    metrics |= {f"{name}/{kind}": value for kind, found in kinds.items() for name, value in found.items()}
    return Scores(metrics, (said_yes == is_yes).astype(np.float64))


def yes_or_no(text: str) -> str:
    """MME's reading: "yes" or "no" if one of them stands in the first four characters, else "other"."""
    start = text.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def score_mme(rows: Sequence[Answered]) -> Scores:
    """`perception`, `cognition`, `total`, in MME's points, and of each category `score/<category>`: 100 for all
    questions answered rightly (`accuracy/<category>` in 0..1), and 100 for all images of which every question is
    (`accuracy_plus/<category>`). `other` is the share of answers that are neither yes nor no."""
    said = [yes_or_no(row.text) for row in rows]
    right = np.asarray([text == known(row) for text, row in zip(said, rows, strict=True)], np.float64)
    metrics = {"perception": 0.0, "cognition": 0.0, "total": 0.0, "other": said.count("other") / len(said)}
    for kind, places in kinds_of(rows).items():
        images: dict[str, list[float]] = {}
        for place in places.tolist():
            images.setdefault(rows[place].group, []).append(float(right[place]))
        accuracy, plus = float(right[places].mean()), float(np.mean([min(image) for image in images.values()]))
        metrics |= {
            f"accuracy/{kind}": accuracy,
            f"accuracy_plus/{kind}": plus,
            f"score/{kind}": 100 * (accuracy + plus),
        }
        for name, members in (("perception", PERCEPTION), ("cognition", COGNITION)):
            if kind in members:
                metrics[name] += metrics[f"score/{kind}"]
    metrics["total"] = metrics["perception"] + metrics["cognition"]
    return Scores(metrics, right)


__all__ = ["COGNITION", "PERCEPTION", "detection", "says_no", "score_mme", "score_pope", "yes_or_no"]
