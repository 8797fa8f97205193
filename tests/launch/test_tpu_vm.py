"""The launcher for TPU VMs, against a gcloud that records its calls and keeps one TPU, and its part on the workers."""

import re
import shlex
import shutil
import signal
import subprocess
import tarfile
from pathlib import Path

import pytest
from launching import LAUNCH, NEXT_CODE, lines, program, run, start

# The request for the TPU is the file $STATE. A run on it ends with the next code; `255:lost` takes the TPU away, and
# `wait` runs until it is stopped.
GCLOUD = rf"""
{{ printf '%s\x1f' "$@"; echo; }} >>"$CALLS"
case "$3 $4 $*" in
  "queued-resources list "*) cat "$STATE" ;;
  "tpu-vm list "*) echo READY ;;
  "queued-resources create "*) echo ACTIVE >"$STATE" ;;
  "queued-resources delete "*) : >"$STATE"; rm -f "$STATE.installed" ;;
  "queued-resources scp "*) cp "$5" "$STATE.bundle" ;;
  *"cat .vlm_jax/installed"*) [[ -e $STATE.installed ]] ;;
  *"tpu_worker.sh install"*) touch "$STATE.installed" ;;
  *"tpu_worker.sh stop"*) touch "$STATE.stopped" ;;
  *"progress.sh"*) echo 0 ;;
  *"tpu_worker.sh run"*)
    {NEXT_CODE}
    if [[ $step == lost ]]; then echo SUSPENDED >"$STATE"; fi
    if [[ $code == wait ]]; then
      echo running
      until [[ -e $STATE.stopped ]]; do sleep 0.05; done
      code=75
    fi
    exit "$code"
    ;;
esac
"""
FLAGS = ("--config=configs/clip_l14.py", "--workdir=/shared/my runs/clip", "--config.data.path=/data/{0..9}.tar")


class Cloud:
    """A checkout of its own, the gcloud beside it, and what was asked of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.checkout, self.programs = folder, folder / "checkout", folder / "programs"
        shutil.copytree(LAUNCH, self.checkout / "launch")
        (self.checkout / ".gitignore").write_text("/runs/\n")
        (self.checkout / "runs").mkdir()
        (self.checkout / "runs" / "big").write_text("no part of the code")
        subprocess.run(["git", "init", "--quiet", str(self.checkout)], check=True)
        program(self.programs, "gcloud", GCLOUD)
        self.state = folder / "state"
        self.state.write_text("")
        self.env = {"TPU_NAME": "clip", "ZONE": "z", "ACCELERATOR": "v5litepod-16", "POLL_SECONDS": "0"}
        self.env |= {"RESTART_SECONDS": "0", "WORKDIR": str(folder), "STATE": str(self.state)}
        self.env |= {name: str(folder / name.lower()) for name in ("CODES", "CALLS")}

    def command(self, codes: str) -> Path:
        (self.folder / "codes").write_text("\n".join(codes.split()) + "\n")
        return self.checkout / "launch" / "tpu_vm.sh"

    def run(self, *arguments: str, codes: str = "", **env: str) -> tuple[int, str]:
        return run(self.command(codes), *arguments, programs=self.programs, env=self.env | env, cwd=self.folder)

    def calls(self) -> list[list[str]]:
        return [line.split("\x1f")[:-1] for line in lines(self.folder / "calls")]

    def done(self) -> list[str]:
        """The calls that change something, by a word each."""
        words = r"create|delete|scp|tpu_worker.sh (?:install|run|stop)"
        found = [re.search(words, " ".join(call[3:])) for call in self.calls()]
        return [match[0].removeprefix("tpu_worker.sh ") for match in found if match]


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


def test_a_new_tpu_of_two_spot_slices(cloud: Cloud) -> None:
    code, output = cloud.run("run", *FLAGS, codes="0", SLICES="2", SPOT="1", SETUP="mount 'a b'")
    assert code == 0, output
    assert "still there and costs money" in output
    assert cloud.done() == ["create", "scp", "install", "run"]
    created, copied, installed, started = (
        call
        for call in cloud.calls()
        if call[2] == "queued-resources" and (call[3] in ("create", "scp") or "tpu_worker.sh" in call[-1])
    )
    assert set(created[4:]) == {
        "clip",
        "--zone=z",
        "--quiet",
        "--spot",
        "--node-count=2",
        "--node-prefix=clip",
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
    }
    for call in (copied, installed, started):  # every worker, and all at the same time
        assert {"--node=all", "--worker=all", "--batch-size=all"} <= set(call)
    assert shlex.split(installed[-1])[-1] == "mount 'a b'"
    assert shlex.split(started[-1].removeprefix("--command=")) == ["vlm_jax/launch/tpu_worker.sh", "run", *FLAGS]
    with tarfile.open(f"{cloud.state}.bundle") as bundle:
        assert {"launch/tpu_worker.sh", "launch/signals.sh", ".gitignore"} <= set(bundle.getnames())
        assert "runs/big" not in bundle.getnames()
    index = subprocess.run(["git", "ls-files"], cwd=cloud.checkout, capture_output=True, text=True, check=True)
    assert index.stdout == ""  # the user's own index is as it was


def test_a_preempted_tpu_is_made_anew_and_does_not_count_as_failure(cloud: Cloud) -> None:
    code, output = cloud.run("run", *FLAGS, codes="255:lost 75 0", RESTART_LIMIT="0", DELETE="1")
    assert code == 0, output
    first = ["create", "scp", "install", "run"]
    assert cloud.done() == [*first, "delete", *first, "run", "delete"]
    assert next(call for call in cloud.calls() if call[3] == "delete")[-1] == "--force"


def test_a_tpu_that_is_there_is_used(cloud: Cloud) -> None:
    cloud.state.write_text("ACTIVE\n")
    code, output = cloud.run("run", *FLAGS, codes="1 2 0")
    assert code == 2, output
    assert cloud.done() == ["scp", "install", "run", "run"]


def test_failures_without_a_newer_checkpoint_end_it(cloud: Cloud) -> None:
    code, output = cloud.run("run", *FLAGS, codes="134 1 0", RESTART_LIMIT="1")
    assert code == 1
    assert "failed 2 times in a row without a newer checkpoint than step 0" in output
    asked = next(call for call in cloud.calls() if "progress.sh" in call[-1])
    assert {"--node=0", "--worker=0"} <= set(asked)
    assert FLAGS[1] in shlex.split(asked[-1])


def test_a_request_that_failed_is_an_error(cloud: Cloud) -> None:
    cloud.state.write_text("FAILED\n")
    code, output = cloud.run("attempt", *FLAGS, TREE="tree", BUNDLE="bundle")
    assert code == 1 and "the request for clip failed" in output
    assert cloud.done() == ["delete"]


def test_a_signal_makes_the_workers_save(cloud: Cloud) -> None:
    process = start(cloud.command("wait"), "run", *FLAGS, programs=cloud.programs, env=cloud.env)
    assert process.stdout is not None
    for line in process.stdout:
        if line == "running\n":
            process.send_signal(signal.SIGTERM)
            break
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 75, output
    assert cloud.done()[-2:] == ["run", "stop"]


def test_a_dry_run_prints_what_a_run_does(cloud: Cloud) -> None:
    code, output = cloud.run("run", *FLAGS, DRY_RUN="1")
    assert code == 0 and cloud.calls() == []
    printed = [shlex.split(line) for line in output.splitlines()]
    assert all(words[:3] == ["gcloud", "compute", "tpus"] for words in printed)
    cloud.run("run", *FLAGS, codes="0")
    changes = [call for call in cloud.calls() if call[3] in ("create", "scp") or "tpu_worker.sh" in call[-1]]
    assert [words[4] for words in printed] == [call[3] for call in changes]
    assert printed[0][1:] == changes[0] and printed[-1][1:] == changes[-1]


def test_logs_of_every_slice(cloud: Cloud) -> None:
    code, output = cloud.run("logs", SLICES="2")
    assert code == 0, output
    for index, call in enumerate(cloud.calls()):
        assert {f"--node={index}", "--worker=all", f"--output-directory=runs/logs/clip/slice{index}"} <= set(call)
        assert (cloud.checkout / "runs" / "logs" / "clip" / f"slice{index}").is_dir()


@pytest.mark.parametrize(
    ("arguments", "env", "sentence"),
    [
        (("run", *FLAGS), {"ZONE": ""}, "set TPU_NAME and ZONE"),
        (("run", *FLAGS), {"ACCELERATOR": ""}, "set ACCELERATOR"),
        (("run", *FLAGS), {"ACCELERATOR": "tpu7x-8"}, "ACCELERATOR=tpu7x-8 is not known here"),
        (("run", "--config=c.py"), {}, "give --workdir="),
        (("run", *FLAGS), {"SLICES": "two"}, "SLICES=two must be a number"),
        (("start",), {}, "usage:"),
    ],
)
def test_bad_input_is_a_sentence(cloud: Cloud, arguments: tuple[str, ...], env: dict[str, str], sentence: str) -> None:
    code, output = cloud.run(*arguments, codes="0", **env)
    assert code == 2 and sentence in output
    assert "create" not in cloud.done()


@pytest.fixture
def worker(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """(the home of a worker, its environment); its Python runs `vlm_jax.main` as $MAIN says."""
    program(tmp_path / ".vlm_jax" / "env" / "bin", "python", 'echo "$@"\neval "$MAIN"')
    return tmp_path, {"HOME": str(tmp_path)}


def test_a_worker_ends_what_an_earlier_connection_left(worker) -> None:
    home, env = worker
    main = "trap 'echo saved; exit 75' TERM; echo ready; while true; do sleep 0.05; done"
    first = start(LAUNCH / "tpu_worker.sh", "run", "--config=c", programs=home, env=env | {"MAIN": main})
    assert first.stdout is not None
    assert first.stdout.readline() == "-m vlm_jax.main --distributed=on --config=c\n"
    assert first.stdout.readline() == "ready\n"
    code, output = run(LAUNCH / "tpu_worker.sh", "run", "--config=d", programs=home, env=env | {"MAIN": "exit 3"})
    assert code == 3, output
    first.communicate(timeout=20)
    assert first.returncode == 75
    log = lines(home / ".vlm_jax" / "log")
    assert log.index("saved") < log.index("-m vlm_jax.main --distributed=on --config=d")
    assert run(LAUNCH / "tpu_worker.sh", "stop", programs=home, env=env)[0] == 0  # nothing is left


def test_a_worker_outlives_its_connection(worker) -> None:
    home, env = worker
    main = 'until [[ -e $HOME/cut ]]; do sleep 0.05; done; for i in 1 2 3; do echo "step $i"; done; exit 75'
    process = start(LAUNCH / "tpu_worker.sh", "run", programs=home, env=env | {"MAIN": main})
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    (home / "cut").touch()
    assert process.wait(timeout=20) == 75
    assert lines(home / ".vlm_jax" / "log")[-1] == "step 3"
