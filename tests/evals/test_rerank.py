"""Two stages of retrieval against loops over all pairs."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from fake_encoder import FakeEncoder, ListSource, embed_images, embed_texts, make_params, random_records
from retrieval_loops import by_loops

from vlm_jax.data.sources import DigitsConfig
from vlm_jax.evals.base import EvalError
from vlm_jax.evals.retrieval import RetrievalConfig, RetrievalEvaluator
from vlm_jax.schema import ConfigError

CONFIG = RetrievalConfig(name="toy", source=DigitsConfig(), captions_per_image=0, pictured=0, rerank=12)


@pytest.mark.parametrize(("devices", "batch_size", "k"), [(4, 8, 12), (1, 16, 30), (2, 256, 1000)])
def test_both_stages_are_those_of_loops_on_any_mesh(devices: int, batch_size: int, k: int) -> None:
    """Of images with one to three captions, some of them unreadable; k beyond all there are ranks all by matching."""
    records = random_records(41)
    for record in records[3::9]:
        record["bad"] = True
    kept = [record for record in records if "bad" not in record]
    encoder, params = FakeEncoder(devices, batch_size), make_params()
    config = dataclasses.replace(CONFIG, rerank=k)
    result = RetrievalEvaluator(config, encoder, ListSource(records)).run(params, step=1)
    texts = [(row, text) for row, record in enumerate(kept) for text in record["texts"]]
    pixels, tokens = np.stack([record["image"] for record in kept]), encoder.tokenize([text for _, text in texts])
    pairs = np.stack(np.meshgrid(np.arange(len(kept)), np.arange(len(texts)), indexing="ij"), axis=-1)
    scores = encoder.match_pairs(
        params, encoder.match_images(params, pixels), encoder.match_texts(params, tokens), pairs.reshape(-1, 2)
    )
    cosines = np.asarray(embed_images(params, pixels)) @ np.asarray(embed_texts(params, tokens)).T
    owner = np.asarray([row for row, _ in texts])
    expected = by_loops(cosines, np.asarray(scores).reshape(*cosines.shape, 2), owner, k)
    assert {name: result.metrics[f"retrieval/toy/{name}"] for name in expected} == pytest.approx(expected)
    alone = RetrievalEvaluator(dataclasses.replace(config, rerank=0), encoder, ListSource(records)).run(params, step=1)
    assert alone.metrics == {key: result.metrics[key] for key in alone.metrics}  # the first stage is what it was
    assert result.benchmark is not None
    assert result.benchmark.metrics["image_retrieval_recall@5"] == expected["text_to_image_r5_reranked"]


class Constant(FakeEncoder):
    """Gives every pair the same scores."""

    def __init__(self, value: float):
        super().__init__()
        self.match_pairs: Any = lambda params, images, texts, pairs: jnp.full((len(pairs), 2), value)


@pytest.mark.parametrize("value", [1.0, np.nan])
def test_equal_scores_and_nan_count_against_the_model(value: float) -> None:
    config = dataclasses.replace(CONFIG, rerank=40)
    source = ListSource(random_records(40, captions=(1,)))
    metrics = RetrievalEvaluator(config, Constant(value), source).run(make_params(), step=1).metrics
    assert metrics["retrieval/toy/image_to_text_mean_rank_reranked"] == 40
    assert metrics["retrieval/toy/matching_accuracy"] == 0


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    assert [sentence for _, sentence in dataclasses.replace(CONFIG, rerank=10).problems()] == [
        "= 10 must exceed 10, of which recall is measured; 0 is none"
    ]
    encoder = FakeEncoder()
    encoder.offers = lambda function: False
    with pytest.raises(ConfigError, match=r"rerank = 12 needs a model that tells whether .* set rerank = 0"):
        CONFIG.build(encoder, str(tmp_path))
    with pytest.raises(EvalError, match="has one image alone"):
        RetrievalEvaluator(CONFIG, FakeEncoder(), ListSource(random_records(1))).run(make_params(), step=1)
