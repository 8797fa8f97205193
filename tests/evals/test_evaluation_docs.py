"""What docs/evaluation.md tells a user to type, typed."""

import re

import command
from sklearn.datasets import load_digits

from vlm_jax.metrics import read_json

DOCUMENT = (command.ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_its_config_and_its_commands(tmp_path):
    blocks = re.findall(r"```(\w*)\n(.*?)```", DOCUMENT.replace("\\\n", " "), re.DOTALL)
    config = next(text for language, text in blocks if language == "python" and "get_config" in text)
    (tmp_path / "my_evals.py").write_text(config, encoding="utf-8")
    lines = [line.split() for language, text in blocks if not language for line in text.splitlines()]
    train, plain, changed = (
        [word.replace("runs/", f"{tmp_path}/").replace("my_evals.py", f"{tmp_path}/my_evals.py") for word in line]
        for line in lines
    )
    assert train[:3] == plain[:3] == changed[:3] == ["python", "-m", "vlm_jax.main"]
    assert changed[: len(plain)] == [*plain[:-1], f"{plain[-1]}_2"], "the same command and more, so it is run for both"
    # One step and no evaluation: this recipe's own smoke run is tested with all the others.
    for words in ([*train, "--config.train.steps=1", "--config.evals=()"], changed):
        code, output = command.run(*words[3:])
        assert code == 0, output
    assert len(list((tmp_path / "digits_eval_2" / "benchmark").glob("*.json"))) == 3
    metrics = read_json(tmp_path / "digits_eval_2" / "eval.json")
    assert {name.split("/")[0] for name in metrics} == {
        *("step", "zero_shot", "retrieval", "linear_probe", "knn", "few_shot")
    }
    seen = metrics["linear_probe/digits_probe/train_examples"] + metrics["knn/digits_knn/examples"]
    assert seen == len(load_digits().target)
    # A map of the pixels that was hardly trained still tells the digits apart, the better the more images are seen.
    assert metrics["linear_probe/digits_probe/top1"] > 0.7
    assert metrics["knn/digits_knn/k5_top1"] > 0.6
    assert metrics["few_shot/digits_shots/10shot_top1"] > metrics["few_shot/digits_shots/1shot_top1"] > 0.1
