"""What answers are worth, by the rules of the benchmarks: functions of texts, which know no model."""

from typing import Literal

from vlm_jax.evals.scoring.base import Answered, Scorer, Scores
from vlm_jax.evals.scoring.choice import score_choice, score_scienceqa
from vlm_jax.evals.scoring.short_answers import score_anls, score_exact, score_gqa
from vlm_jax.evals.scoring.vqa_accuracy import score_textvqa, score_vqa
from vlm_jax.evals.scoring.yes_no import score_mme, score_pope

Score = Literal["exact", "vqa", "textvqa", "pope", "mme", "choice", "scienceqa", "gqa", "anls"]

SCORERS: dict[Score, Scorer] = {
    "exact": score_exact,
    "vqa": score_vqa,
    "textvqa": score_textvqa,
    "pope": score_pope,
    "mme": score_mme,
    "choice": score_choice,
    "scienceqa": score_scienceqa,
    "gqa": score_gqa,
    "anls": score_anls,
}

__all__ = ["SCORERS", "Answered", "Score", "Scorer", "Scores"]
