"""Retrieval against full sorting, one query at a time."""

import dataclasses

import numpy as np
import pytest
from fake_encoder import FakeEncoder, ListSource, embed_images, embed_texts, make_params, random_records

from vlm_jax import schema
from vlm_jax.data.sources import DigitsConfig
from vlm_jax.evals.base import EvalConfig
from vlm_jax.evals.retrieval import RetrievalConfig, RetrievalEvaluator, best_and_worst, positive_ranks, recall

CONFIG = RetrievalConfig(name="toy", source=DigitsConfig(), captions_per_image=0, pictured=0)


def evaluate(records, encoder=None, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return RetrievalEvaluator(config, encoder or FakeEncoder(), ListSource(records)).run(make_params(), step=1)


def reference(records, captions_per_image=None):
    """The metrics from fully sorted lists: a query is a hit when any of its own stands among the first k."""
    params = make_params()
    texts = [(row, text) for row, record in enumerate(records) for text in record["texts"][:captions_per_image]]
    owner = np.asarray([row for row, _ in texts])
    images = np.asarray(embed_images(params, np.stack([record["image"] for record in records])))
    captions = np.asarray(embed_texts(params, FakeEncoder().tokenize([text for _, text in texts])))
    scores = images @ captions.T
    metrics = {"retrieval/toy/images": len(records), "retrieval/toy/texts": len(texts)}
    for way, matrix, is_own in (
        ("image_to_text", scores, owner[None] == np.arange(len(records))[:, None]),
        ("text_to_image", scores.T, owner[:, None] == np.arange(len(records))),
    ):
        first = []
        for row, own in zip(matrix, is_own, strict=True):
            order = np.argsort(-row)
            first.append(int(np.flatnonzero(own[order])[0]))
        for k in (1, 5, 10):
            metrics[f"retrieval/toy/{way}_r{k}"] = np.mean([f < k for f in first])
        metrics[f"retrieval/toy/{way}_median_rank"] = np.median(first) + 1
        metrics[f"retrieval/toy/{way}_mean_rank"] = np.mean(first) + 1
    return metrics


@pytest.mark.parametrize(("count", "device_count", "batch_size"), [(61, 4, 8), (64, 1, 16), (61, 2, 256)])
@pytest.mark.parametrize("captions", [(1,), (1, 2, 3)])
def test_metrics_equal_full_sorting_on_any_mesh(count, device_count, batch_size, captions):
    records = random_records(count, captions=captions)
    result = evaluate(records, FakeEncoder(device_count, batch_size))
    assert result.metrics == pytest.approx(reference(records))
    assert result.images == {}


def test_five_captions_an_image_by_the_definition_of_clip_benchmark():
    """There recall@k is the share of an image's captions among the first k, and counts as 1 where it is above zero."""
    records = random_records(40, captions=(5,))
    config = dataclasses.replace(CONFIG, captions_per_image=5)
    entry = RetrievalEvaluator(config, FakeEncoder(), ListSource(records)).run(make_params(), step=1).benchmark
    params, encoder = make_params(), FakeEncoder()
    images = np.asarray(embed_images(params, np.stack([record["image"] for record in records])))
    texts = np.asarray(embed_texts(params, encoder.tokenize([text for record in records for text in record["texts"]])))
    positive = np.arange(200)[:, None] // 5 == np.arange(40)
    expected = {}
    for way, scores, own in (
        ("image_retrieval", texts @ images.T, positive),
        ("text_retrieval", images @ texts.T, positive.T),
    ):
        for k in (1, 5, 10):
            found = [row[np.argsort(-score)[:k]].sum() / row.sum() for score, row in zip(scores, own, strict=True)]
            expected[f"{way}_recall@{k}"] = np.mean(np.asarray(found) > 0)
    assert entry.metrics == pytest.approx(expected)
    assert (entry.task, entry.dataset) == ("zeroshot_retrieval", "toy")


def test_only_the_first_captions_count():
    records = random_records(40)
    assert evaluate(records, captions_per_image=2).metrics == pytest.approx(reference(records, 2))


def test_unusable_records_do_not_count():
    records = random_records(30)
    for record in records[::7]:
        record["bad"] = True
    kept = [record for record in records if "bad" not in record]
    assert evaluate(records).metrics == pytest.approx(reference(kept))


def ranks(queries, query_ids, gallery, gallery_ids):
    arrays = (np.asarray(queries, np.float32), np.asarray(query_ids), np.asarray(gallery, np.float32))
    return positive_ranks(FakeEncoder(batch_size=4), *arrays, np.asarray(gallery_ids)).tolist()


def test_the_best_of_several_own_items_counts_and_the_others_do_not_stand_before_it():
    # Scores against the query: 5, 4, 3, 2; the second and third are its own.
    assert ranks([[1.0]], [0], [[5.0], [4.0], [3.0], [2.0]], [1, 0, 0, 2]) == [1]
    assert ranks([[1.0]], [0], [[5.0], [4.0], [3.0], [2.0]], [0, 0, 0, 2]) == [0]
    assert ranks([[1.0]], [2], [[5.0], [4.0], [3.0], [2.0]], [0, 0, 1, 2]) == [3]


def test_equal_scores_and_nan_count_against_the_model():
    assert ranks(np.ones((3, 1)), [0, 1, 2], np.ones((3, 1)), [0, 1, 2]) == [2, 2, 2]
    assert ranks(np.full((3, 1), np.nan), [0, 1, 2], np.ones((3, 1)), [0, 1, 2]) == [2, 2, 2]


def test_recall_of_known_ranks():
    found = recall(np.asarray([0, 0, 4, 5, 9, 10]))
    assert found == pytest.approx({"r1": 2 / 6, "r5": 3 / 6, "r10": 5 / 6, "median_rank": 5.5, "mean_rank": 34 / 6})


def test_best_and_worst_show_an_image_once():
    text_ranks, image_of_text = np.asarray([0, 0, 7, 9, 8, 1]), np.asarray([0, 0, 1, 2, 2, 3])
    scores = np.asarray([0.4, 0.9, 0.5, 0.1, 0.2, 0.3])
    assert best_and_worst(text_ranks, scores, image_of_text, 2) == ([1, 5], [3, 2])
    assert best_and_worst(text_ranks, scores, image_of_text, 4) == ([1, 5, 2, 4], [])
    assert best_and_worst(np.zeros(6, int), scores, image_of_text, 1) == ([1], [3])  # equal ranks: by score


def test_images_with_shared_captions_answer_each_other():
    """Against the protocol without: a hit is then any image or text of the same list of captions."""
    records = [{**record, "texts": (f"class {row % 3}",)} for row, record in enumerate(random_records(12))]
    params, encoder = make_params(), FakeEncoder()
    images = np.asarray(embed_images(params, np.stack([record["image"] for record in records])))
    texts = np.asarray(embed_texts(params, encoder.tokenize([record["texts"][0] for record in records])))
    group = np.arange(12) % 3
    scores = images @ texts.T
    same = group[:, None] == group[None, :]
    best = np.where(same, scores, -np.inf).max(axis=1)
    ahead = (~same & (scores >= best[:, None])).sum(axis=1)
    metrics = evaluate(records, shared_captions=True).metrics
    assert metrics["retrieval/toy/image_to_text_r1"] == pytest.approx((ahead < 1).mean())
    assert metrics["retrieval/toy/image_to_text_mean_rank"] == pytest.approx((ahead + 1).mean())
    assert evaluate(records).metrics["retrieval/toy/image_to_text_r1"] == 0  # equal texts tie, and ties lose


def test_an_image_without_a_caption_is_named():
    records = random_records(9)
    records[4]["texts"] = ()
    with pytest.raises(ValueError, match="Record 4 of retrieval evaluation 'toy' has no caption"):
        evaluate(records)


def test_no_usable_record_is_named():
    with pytest.raises(ValueError, match="'toy' found no usable image among 3 records"):
        evaluate([{**record, "bad": True} for record in random_records(3)])


def test_the_picture_is_of_the_run_that_made_it():
    result = evaluate(random_records(20), pictured=3)
    picture = result.images["retrieval/toy/best_and_worst"]
    assert picture.dtype == np.uint8
    assert picture.ndim == 3
    # Three of the best and three of the worst, each row with its own image framed in the last column.
    frame = np.all(picture == (0x1A, 0x7F, 0x37), axis=-1)
    column = frame[:, int(picture.shape[1] * 0.885) : int(picture.shape[1] * 0.975)]
    starts = np.flatnonzero(np.diff(column.all(axis=1).astype(int)) == 1)
    assert len(starts) == 12, "an upper and a lower edge a row"


def test_a_model_without_a_joint_space_is_refused(tmp_path):
    encoder = FakeEncoder()
    encoder.joint_space = False
    with pytest.raises(schema.ConfigError, match=r"'toy' \(retrieval\) .* no joint space.*use zero_shot"):
        CONFIG.build(encoder, str(tmp_path))


def test_config_round_trip_and_its_errors():
    schema.validate(CONFIG)
    assert schema.from_dict(EvalConfig, schema.to_dict(CONFIG)) == CONFIG
    with pytest.raises(schema.ConfigError, match=r"config\.captions_per_image = -1"):
        schema.validate(dataclasses.replace(CONFIG, captions_per_image=-1))
