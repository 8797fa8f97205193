"""One process of a two-process job that runs both evaluations; `test_two_processes` starts it."""

import json
import sys

import jax
from fake_encoder import FakeEncoder, ListSource, make_params, random_records

from vlm_jax.data.sources import DigitsConfig
from vlm_jax.evals.retrieval import RetrievalConfig, RetrievalEvaluator
from vlm_jax.evals.zero_shot import ZeroShotConfig, ZeroShotEvaluator

NAMES = ("cat", "dog", "horse", "ship", "truck", "frog", "plane")


def evaluate(device_count):
    """Metrics of both evaluations and the names of their pictures."""
    encoder, source = FakeEncoder(device_count), ListSource(random_records(37), NAMES)
    zero_shot = ZeroShotConfig(name="toy", source=DigitsConfig(), templates=("a {}", "the {}"))
    retrieval = RetrievalConfig(name="toy", source=DigitsConfig())
    first = ZeroShotEvaluator(zero_shot, encoder, source).run(make_params(), step=3)
    second = RetrievalEvaluator(retrieval, encoder, source).run(make_params(), step=3)
    return {"metrics": first.metrics | second.metrics, "pictures": sorted(second.images)}


if __name__ == "__main__":
    address, process = sys.argv[1], int(sys.argv[2])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(address, num_processes=2, process_id=process)
    assert jax.device_count() == 4
    print(json.dumps(evaluate(device_count=4)))
