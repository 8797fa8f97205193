"""Results as LAION's CLIP_benchmark writes them, one JSON document an evaluation, so that its tables can be made.

Computes nothing: an evaluation names its numbers (`EvalResult.benchmark`), this puts the frame around them.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal

from vlm_jax.metrics import write_json, writing

Task = Literal["zeroshot_classification", "zeroshot_retrieval", "linear_probe"]
DIRECTORY = "benchmark"


@dataclasses.dataclass(frozen=True)
class BenchmarkEntry:
    """One evaluation in CLIP_benchmark's terms.

    Attributes:
        task: its name there.
        dataset: the name of the evaluation.
        metrics: the names of the task there, such as `acc1`, -> value; a metric without a value is left out.
        language: of prompts and captions, as an ISO 639-1 code.
    """

    task: Task
    dataset: str
    metrics: Mapping[str, float]
    language: str = "en"


_CLASSIFICATION = {
    "top1": "acc1",
    "top5": "acc5",
    "mean_per_class": "mean_per_class_recall",
    "mean_average_precision": "mean_average_precision",
}


def classification_names(metrics: Mapping[str, float], prefix: str = "") -> dict[str, float]:
    """Those metrics of `classification` that CLIP_benchmark has too, by its names; linear probes' start with `lp_`."""
    return {f"{prefix}{name}": metrics[key] for key, name in _CLASSIFICATION.items() if key in metrics}


def document(entry: BenchmarkEntry, model: str, pretrained: str) -> dict[str, Any]:
    """The JSON document: `dataset`, `model`, `pretrained`, `task`, `metrics`, `language`.

    Args:
        entry: the evaluation.
        model: name of the architecture, here of the config.
        pretrained: name of the weights, here the path of the checkpoint.
    """
    return {
        "dataset": entry.dataset,
        "model": model,
        "pretrained": pretrained,
        "task": entry.task,
        "metrics": dict(entry.metrics),
        "language": entry.language,
    }


def write_benchmark(workdir: str, entry: BenchmarkEntry, model: str, pretrained: str) -> str:
    """Writes `WORKDIR/benchmark/<task>_<dataset>.json` and returns its path; for the primary process.

    `clip_benchmark build WORKDIR/benchmark/*.json` makes one CSV file of such documents.

    Raises:
        WorkdirError: it can't be written.
    """
    path = os.path.join(workdir, DIRECTORY, f"{entry.task}_{entry.dataset}.json")
    with writing(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
    write_json(path, document(entry, model, pretrained))
    return path
