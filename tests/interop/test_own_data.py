"""docs/own_data.md, typed by a stranger: every command as it stands there, on images that no config knows."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import stranger

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"<!-- run -->\n```(\w*)\n(.*?)```", re.DOTALL)


def test_the_walk(tmp_path: Path) -> None:
    stranger.write_shards(tmp_path / "shards", "train", shards=4, images=500, seed=0)
    stranger.write_shards(tmp_path / "shards", "held_out", shards=1, images=200, seed=1)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    blocks = BLOCK.findall((ROOT / "docs" / "own_data.md").read_text())
    assert [language for language, _ in blocks] == ["", "", "", "python"]
    printed = ""
    for language, text in blocks:
        command = [sys.executable, "-c", text] if language else ["bash", "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
        printed = done.stdout
    trained, again = (
        json.loads((tmp_path / "runs" / name / "eval.json").read_text()) for name in ("mine", "mine_eval")
    )
    assert again == trained
    assert trained["retrieval/held_out/images"] == 200
    # 200 images and about as many different captions: chance is 0.5 %.
    assert trained["retrieval/held_out/image_to_text_r1"] > 0.15
    assert trained["retrieval/held_out/text_to_image_r5"] > 0.6
    assert list((tmp_path / "runs" / "mine_eval" / "benchmark").glob("*.json"))
    differences = [float(line) for line in printed.split()]
    assert len(differences) == 2
    assert max(differences) < 1e-5
