"""The JobSet for GKE: valid, as its environment variables are read by JAX, and right about each way a pod can end."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from jax._src.clusters import GkeTpuCluster  # what jax.distributed.initialize asks on GKE
from launching import LAUNCH, run

SCHEMA = json.loads((Path(__file__).parent / "jobset_schema.json").read_text())
NEEDED = {"NAME": "clip-l14", "IMAGE": "region/images&more:1", "TPU": "v5e:16x16", "CLAIM": "shared"}
FLAGS = (
    "--config=configs/clip_l14.py",
    "--workdir=/shared/clip",
    '--config.data.path=/shared/"a b"/\\{0..9}.tar # if SPOT',
)


def render(*flags: str, **env: str) -> tuple[int, str]:
    return run(LAUNCH / "gke" / "render.sh", *(flags or FLAGS), programs=LAUNCH, env=NEEDED | env)


def manifest(**env: str) -> dict[str, Any]:
    code, output = render(**env)
    assert code == 0, output
    assert "${" not in output
    loaded = yaml.safe_load(output)
    jsonschema.validate(loaded, SCHEMA)
    return loaded


def job(loaded: dict[str, Any]) -> dict[str, Any]:
    return loaded["spec"]["replicatedJobs"][0]["template"]["spec"]


def pod(loaded: dict[str, Any]) -> dict[str, Any]:
    return job(loaded)["template"]["spec"]


@pytest.mark.parametrize(
    ("env", "hosts", "chips", "accelerator"),
    [
        ({"TPU": "v5e:16x16"}, 64, 4, "tpu-v5-lite-podslice"),
        ({"TPU": "v6e:2x4"}, 1, 8, "tpu-v6e-slice"),
        ({"TPU": "v6e:2x4", "CHIPS": "4"}, 2, 4, "tpu-v6e-slice"),
        ({"TPU": "v4:4x8x8"}, 64, 4, "tpu-v4-podslice"),
        ({"TPU": "v5p:4x4x4"}, 16, 4, "tpu-v5p-slice"),
        ({"TPU": "tpu7x:2x2x1"}, 1, 4, "tpu7x"),
    ],
)
def test_one_slice(env: dict[str, str], hosts: int, chips: int, accelerator: str) -> None:
    loaded = manifest(**env)
    assert job(loaded)["parallelism"] == job(loaded)["completions"] == hosts
    container = pod(loaded)["containers"][0]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert pod(loaded)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": env["TPU"].partition(":")[2],
    }
    assert (container["args"], container["image"]) == (list(FLAGS), NEEDED["IMAGE"])
    assert [variable["name"] for variable in container["env"]] == ["PYTHONUNBUFFERED"]
    assert "coordinator" not in loaded["spec"] and "tolerations" not in pod(loaded)


def test_two_slices_of_spot_nodes_are_one_jax_job(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = manifest(SLICES="2", SPOT="1", TPU="v5e:4x4")
    assert pod(loaded)["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert loaded["spec"]["replicatedJobs"][0]["replicas"] == 2
    coordinator = loaded["spec"]["coordinator"]
    assert coordinator == {"replicatedJob": "slice", "jobIndex": 0, "podIndex": 0}
    # the annotations that the JobSet controller gives to the pods of its second job
    annotations = {
        "jobset.sigs.k8s.io/global-replicas": "2",
        "jobset.sigs.k8s.io/job-global-index": "1",
        "jobset.sigs.k8s.io/coordinator": "localhost",
    }
    fields = {f"metadata.annotations['{name}']": value for name, value in annotations.items()}
    for variable in pod(loaded)["containers"][0]["env"]:
        value = variable.get("value") or fields[variable["valueFrom"]["fieldRef"]["fieldPath"]]
        monkeypatch.setenv(variable["name"], value)
    # and what GKE gives to the pods of a slice of four hosts
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b,c,d")
    monkeypatch.setenv("TPU_WORKER_ID", "3")
    assert (GkeTpuCluster.get_process_count(), GkeTpuCluster.get_process_id()) == (8, 7)
    assert GkeTpuCluster.get_coordinator_address(10, None).startswith("localhost:")


def outcome(loaded: dict[str, Any], exit_code: int, is_disrupted: bool = False) -> str:
    """What happens to the run when a pod ends, by the rules of the Job and JobSet controllers."""
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    assert job(loaded)["backoffLimit"] == 0 and pod(loaded)["restartPolicy"] == "Never"
    for index, rule in enumerate(job(loaded)["podFailurePolicy"]["rules"]):
        codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions", ())
        if codes and (exit_code in codes["values"]) == (codes["operator"] == "In"):
            cause = f"Container main for pod default/clip-slice-0-2-abcde failed with exit code {exit_code}"
        elif is_disrupted and {"type": "DisruptionTarget", "status": "True"} in conditions:
            cause = "Pod default/clip-slice-0-2-abcde has condition DisruptionTarget"
        else:
            continue
        assert rule["action"] == "FailJob"
        reason, message = "PodFailurePolicy", f"{cause} matching FailJob rule at index {index}"
        break
    for rule in loaded["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns") or [""]
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"


def test_each_way_a_pod_can_end() -> None:
    loaded = manifest()
    assert outcome(loaded, 2) == "FailJobSet"
    assert outcome(loaded, 75) == "RestartJobSetAndIgnoreMaxRestarts"
    assert outcome(loaded, 137, is_disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"
    assert {outcome(loaded, code) for code in (1, 22, 127, 134, 137, 139)} == {"RestartJobSet"}
    assert loaded["spec"]["failurePolicy"]["maxRestarts"] == 10
    assert pod(loaded)["terminationGracePeriodSeconds"] == 300


def test_the_schema_refuses_what_the_server_would() -> None:
    loaded = manifest()
    job(loaded)["podFailurePolicy"]["rules"][0]["onExitCodes"]["value"] = [2]
    with pytest.raises(jsonschema.ValidationError, match="'value' was unexpected"):
        jsonschema.validate(loaded, SCHEMA)


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        ({"CLAIM": ""}, "set CLAIM"),
        ({"NAME": "Clip"}, "NAME=Clip must be"),
        ({"TPU": "v5e"}, "must be a chip and a topology"),
        ({"TPU": "v7:2x2"}, "must be one of v4, v5e, v5p, v6e, tpu7x"),
        ({"TPU": "v5e:4x4x4"}, "topologies of this chip have 2 dimensions"),
        ({"TPU": "v5p:4x4"}, "topologies of this chip have 3 dimensions"),
        ({"TPU": "v5e:2x4", "CHIPS": "3"}, "no whole number of hosts"),
        ({"TPU": "v5e:2x4", "SLICES": "2"}, "slices of several hosts"),
        ({"SLICES": "two"}, "SLICES=two must be a whole number"),
    ],
)
def test_bad_input_is_a_sentence(env: dict[str, str], sentence: str) -> None:
    code, output = render(**env)
    assert code == 2
    assert sentence in output


def test_a_workdir_that_dies_with_its_pod_is_refused() -> None:
    code, output = render("--config=configs/clip_l14.py", "--workdir=runs/clip")
    assert code == 2 and "--workdir=/shared/" in output
