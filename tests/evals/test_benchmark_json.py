"""CLIP_benchmark's documents: what its `build` command reads."""

import csv
import json

from vlm_jax.evals.benchmark_json import BenchmarkEntry, write_benchmark


def test_documents_make_its_table(tmp_path):
    """As `clip_benchmark build` does: metrics and the rest of the keys side by side, absent metrics empty."""
    first = BenchmarkEntry("zeroshot_classification", "digits", {"acc1": 0.5, "mean_per_class_recall": 0.25})
    second = BenchmarkEntry("zeroshot_retrieval", "digits", {"image_retrieval_recall@5": 1.0}, language="de")
    paths = [write_benchmark(str(tmp_path), entry, "clip_digits", "runs/x") for entry in (first, second)]
    assert paths == [
        f"{tmp_path}/benchmark/{name}_digits.json" for name in ("zeroshot_classification", "zeroshot_retrieval")
    ]
    rows = []
    for path in paths:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
        metrics = data.pop("metrics")
        assert set(data) == {"dataset", "model", "pretrained", "task", "language"}
        rows.append({**metrics, **data, "model_fullname": f"{data['model']} {data['pretrained']}"})
    columns = sorted({column for row in rows for column in row})
    with open(tmp_path / "benchmark.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    with open(tmp_path / "benchmark.csv", newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [row["acc1"] for row in read] == ["0.5", ""]
    assert [row["language"] for row in read] == ["en", "de"]
    assert read[0]["model_fullname"] == "clip_digits runs/x"
