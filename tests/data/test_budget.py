import json

import pytest
from conversations import GOLDEN
from PIL import Image

from vlm_jax.data import budget

TOKENIZER = GOLDEN / "llava_tokenizer.model"


@pytest.fixture
def mix(tmp_path):
    """Eight conversations of known fate: one is cut, one loses a turn, three are lost; one image is missing."""
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg")

    def turns(question, answer):
        return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]

    records = [
        {"id": "one", "image": "a.jpg", "conversations": turns("<image>\nWhat?", "A cat.")},
        {"id": "text", "conversations": turns("yes?", "no.")},
        {"id": "long", "conversations": turns("yes?", "no " * 300)},
        {"id": "leading", "conversations": [{"from": "gpt", "value": "hi"}, *turns("yes?", "no.")]},
        {"id": "empty", "conversations": turns("yes?", "")},
        {"id": "more", "image": "a.jpg", "conversations": turns("no placeholder", "no.")},
        {"id": "fewer", "conversations": turns("<image>", "no.")},
        {"id": "missing", "image": "b.jpg", "conversations": turns("<image>\nWhat?", "A cat.")},
    ]
    (tmp_path / "mix.json").write_text(json.dumps(records))
    return tmp_path


def run(mix, *arguments):
    common = [f"--path={mix}/mix.json", "--recipe=llava_stage_2", f"--tokenizer={TOKENIZER}", f"--json={mix}/out.json"]
    changes = ["--config.data.chat.row_length=128", "--config.data.chat.max_tiles=2", "--tokens_per_tile=16"]
    assert budget.main([*common, *changes, "--threads=1", *arguments]) == 0
    return json.loads((mix / "out.json").read_text())


def test_everything_is_counted(mix, capsys):
    found = run(mix)
    page = capsys.readouterr().out
    assert (found["records"], found["usable"], found["with_images"], found["tiles"]) == (8, 5, 2, 2)
    assert found["image_tokens"] == 2 * 16
    assert found["changed"] == {
        "a leading turn of the assistant was left out": 1,
        "the end was cut off, the row was full": 1,
    }
    assert [item["records"] for item in found["lost"]] == [2, 1]
    for name, why in (("more", "hold 0 <image>, its images are 1"), ("empty", "its answer in turn 2 is empty")):
        assert any(name in item["first"] and why in item["first"] for item in found["lost"])
        assert name in page and why in page
    assert found["truncated_records"] == 1 and found["lengths"]["longest"] == 128 + found["truncated_tokens"]
    # 128 of the one that is cut; the others fit two rows beside it
    assert found["tokens"] == round(found["single_share"] * 5 * 128)
    assert found["packed_rows"] in (3, 4) and found["packed_share"] == found["tokens"] / (found["packed_rows"] * 128)
    assert f"{found['packed_share']:.1%} full" in page


def test_missing_images_are_found_when_asked_for(mix):
    found = run(mix, "--check_images")
    assert found["usable"] == 4
    assert any("missing" in item["first"] and "'b.jpg' can't be read" in item["first"] for item in found["lost"])
    part = run(mix, "--records=3")
    assert part["records"] == 3


def test_settings_of_a_run_that_reads_no_conversations_are_refused(mix, capsys):
    for arguments, why in (
        (["--config=configs/siglip_digits.py:smoke"], "trains no model on conversations"),
        ([], "give --config=FILE, or --recipe"),
        (["--recipe=nanovlm"], "--tokenizer is missing"),
        (
            ["--recipe=nanovlm", f"--tokenizer={TOKENIZER}", f"--path={mix}/mix.json"],
            "needs the token '<|image|>', which the vocabulary",
        ),
        (["--recipe=llava_next", f"--tokenizer={TOKENIZER}", "--config.data.chat.paking=tight"], "packing"),
    ):
        assert budget.main(arguments) == 2
        assert why in capsys.readouterr().err
