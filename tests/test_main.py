"""The command line: one sentence and exit code 2 for what a user got wrong, before anything compiles."""

import json
from pathlib import Path

import command
import pytest

from vlm_jax.main import EXIT_CONFIG, main

DIGITS = "--config=configs/clip_digits.py"


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(command.ROOT)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--config is missing", "configs/clip_digits.py"]),
        (["--config=configs/clip_digitz.py"], ["does not exist", "configs/clip_digits.py"]),
        ([f"{DIGITS}:smok"], ["'smok'", "smoke"]),
        ([DIGITS, "--config.trian.steps=3"], ["config.trian.steps", "did you mean config.train.steps?"]),
        ([DIGITS, "--config.batch_size=3"], ["config.batch_size", "config.data.batch_size"]),
        ([DIGITS, "--config.train.steps=ten"], ["config.train.steps", "a whole number"]),
        ([DIGITS, "--config.data.source=webdataset"], ["config.data.source", "tar"]),
        ([DIGITS, "--config.objective.model.image.heads=5"], ["image.heads = 5", "divide"]),
        ([DIGITS, "--config.objective.model.image.patch_size=5"], ["image.patch_size = 5", "divide"]),
        ([DIGITS, "--config.data.batch_size=100", "--config.mesh.fsdp=8"], ["config.data.batch_size = 100", "96, 104"]),
        ([DIGITS, "--config.mesh.fsdp=3"], ["config.mesh.data = -1", "3"]),
        ([DIGITS, "--config.train.accum_steps=3"], ["config.train.accum_steps = 3", "128"]),
        ([DIGITS, "--config.data.tokenizer.length=20"], ["config.data.tokenizer.length = 20", "24"]),
        ([DIGITS, "--config.data.path=/nowhere/x.tar"], ["/nowhere/x.tar"]),
        ([DIGITS, "--config.data.path=/nowhere/x.zip"], ["/nowhere/x.zip", ".jsonl"]),
        ([DIGITS, "--config.parts.image.pattern=imag/.*"], ["config.parts", "image"]),
        ([DIGITS, "--config.objective.model.text.vocab_size=300"], ["text.vocab_size = 300", "set it to"]),
        ([DIGITS, "--distributed=localhost"], ["--distributed=localhost", "HOST:PORT,COUNT,INDEX"]),
        ([DIGITS, "--config.init_from.path=/nowhere"], ["/nowhere", "holds no checkpoint"]),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([*arguments, f"--workdir={tmp_path}"])
    error = capsys.readouterr().err
    assert code == (1 if "holds no checkpoint" in words else EXIT_CONFIG), error
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    assert all(word in error for word in words), error
    assert not (tmp_path / "checkpoints").exists() or not list((tmp_path / "checkpoints").iterdir())


def test_a_config_file_with_a_mistake_names_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from vlm_jax.config import TrainConfig\n\n\ndef get_config(name=''):\n    return TrainConfig(step=1)\n"
    )
    assert main([f"--config={path}"]) == EXIT_CONFIG
    error = capsys.readouterr().err
    assert f"{path}, line 5" in error
    assert "'step'" in error


def test_print_config_shows_every_key_with_its_override(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([DIGITS, "--print_config", "--config.data.source=shapes", "--config.optimizer.learning_rate=0.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "config.data.source = 'shapes'" in lines
    assert "config.data.source.image_size = 64" in lines
    assert "config.optimizer.learning_rate = 0.5" in lines
    assert "config.parts.text.frozen = False" in lines


def test_evaluation_alone_gives_the_numbers_of_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On its own, on another mesh, and with other evaluations than the run's."""
    workdir, other = tmp_path / "run", tmp_path / "other"
    assert main([f"{DIGITS}:smoke", f"--workdir={workdir}"]) == 0
    trained = json.loads((workdir / "eval.json").read_text())
    assert main(["--mode=eval", f"--checkpoint={workdir}", f"--workdir={other}", "--config.mesh.fsdp=8"]) == 0
    assert json.loads((other / "eval.json").read_text()) == pytest.approx(trained, abs=1e-6)
    assert "zero_shot/digits/top1" in capsys.readouterr().out
    step = workdir / "checkpoints" / "3"
    assert main(["--mode=eval", f"--checkpoint={step}", f"--workdir={other}", "--config.evals.digits.limit=80"]) == 0
    earlier = json.loads((other / "eval.json").read_text())
    assert earlier["step"] == 3
    assert earlier["zero_shot/digits/examples"] == 80
    assert main(["--mode=eval", f"--checkpoint={tmp_path / 'none'}", f"--workdir={other}"]) == 1
    assert "holds no checkpoint" in capsys.readouterr().err


def test_help_says_how_to_override(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "--config.KEY=VALUE" in capsys.readouterr().out
