"""One process of a two-process job that runs every kind of evaluation; `test_two_processes` starts it."""

import dataclasses
import json
import sys

import jax
from fake_encoder import FakeEncoder, ListSource, make_params, random_records

from vlm_jax.data.sources import DigitsConfig
from vlm_jax.evals.few_shot import FewShotConfig, FewShotEvaluator
from vlm_jax.evals.frozen import Sources
from vlm_jax.evals.knn import KnnConfig, KnnEvaluator
from vlm_jax.evals.linear_probe import LinearProbeConfig, LinearProbeEvaluator
from vlm_jax.evals.retrieval import RetrievalConfig, RetrievalEvaluator
from vlm_jax.evals.zero_shot import ZeroShotConfig, ZeroShotEvaluator

NAMES = ("cat", "dog", "horse", "ship", "truck", "frog", "plane")


def evaluate(device_count):
    """Metrics of every kind of evaluation and the names of their pictures."""
    encoder, source = FakeEncoder(device_count), ListSource(random_records(37), NAMES)
    captioner = FakeEncoder(device_count)
    captioner.joint_space = False
    sources = Sources(ListSource(random_records(50, seed=2), NAMES), source, NAMES)
    common = {"name": "toy", "source": DigitsConfig(), "train_source": DigitsConfig()}
    probe = LinearProbeConfig(**common, lambdas=(1.0,), tolerance=1e-9, max_iterations=10)
    zero_shot = ZeroShotConfig(name="toy", source=DigitsConfig(), templates=("a {}", "the {}"))
    retrieval = RetrievalConfig(name="toy", source=DigitsConfig(), rerank=11)
    evaluators = (
        ZeroShotEvaluator(zero_shot, encoder, source),
        ZeroShotEvaluator(dataclasses.replace(zero_shot, name="scores", prompts_at_a_time=6), captioner, source),
        RetrievalEvaluator(retrieval, encoder, source),
        LinearProbeEvaluator(probe, encoder, sources),
        KnnEvaluator(KnnConfig(**common, k=(3,)), encoder, sources),
        FewShotEvaluator(FewShotConfig(**common, shots=(2,), seeds=1), encoder, sources),
    )
    results = [evaluator.run(make_params(), step=3) for evaluator in evaluators]
    metrics = {name: value for result in results for name, value in result.metrics.items()}
    return {"metrics": metrics, "pictures": sorted(name for result in results for name in result.images)}


if __name__ == "__main__":
    address, process = sys.argv[1], int(sys.argv[2])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(address, num_processes=2, process_id=process)
    assert jax.device_count() == 4
    print(json.dumps(evaluate(device_count=4)))
