"""Questions in the files that benchmarks publish: each layout in miniature, and what is wrong with them."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from conversations import llava_tokenizer, nanovlm_tokenizer
from PIL import Image
from pyarrow import parquet

from vlm_jax.config import load_config
from vlm_jax.data.chat_config import LLAVA_STAGE_2, NANOVLM
from vlm_jax.data.chat_examples import ChatExamples
from vlm_jax.data.sources import BenchmarkConfig, source_at
from vlm_jax.data.sources.benchmark import LAYOUTS
from vlm_jax.evals.scoring import SCORERS
from vlm_jax.evals.vqa import VqaConfig
from vlm_jax.schema import ConfigError, validate

WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def draw(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 7), (200, 30, 30)).save(path)


def dump(path: Path, content: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return str(path)


def dump_lines(path: Path, entries: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def vqav2(folder: Path) -> tuple[str, str]:
    questions = [
        {"image_id": 42, "question": "What colour is it?", "question_id": 42000},
        {"image_id": 42, "question": "Is it red?", "question_id": 42001},
    ]
    people = [{"answer": "red" if i < 8 else "dark red", "answer_confidence": "yes", "answer_id": i} for i in range(10)]
    annotation = {"question_id": 42000, "image_id": 42, "question_type": "what", "answer_type": "other"}
    annotation |= {"multiple_choice_answer": "red", "answers": people}
    draw(folder / "val2014" / "COCO_val2014_000000000042.jpg")
    head = {"data_type": "mscoco", "data_subtype": "val2014"}
    return (
        dump(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {**head, "questions": questions}),
        dump(folder / "v2_mscoco_val2014_annotations.json", {**head, "annotations": [annotation]}),
    )


def test_vqav2(tmp_path: Path) -> None:
    questions, annotations = vqav2(tmp_path)
    config = BenchmarkConfig("vqav2", questions, annotations, image_root=str(tmp_path / "val2014"))
    source = config.build("")
    assert len(source) == 2
    record = source[0]
    assert record["question"] == "What colour is it?" + WORD
    assert record["answers"] == ("red",) * 8 + ("dark red",) * 2
    assert (record["reference"], record["kind"], record["question_id"]) == ("red", "other", 42000)
    assert record["images"][0].size() == (7, 9)
    assert (source[1]["answers"], source[1]["reference"]) == ((), "")
    # Answers of the test are kept secret; its questions on part of the images are files of their own.
    head = {"data_subtype": "test-dev2015", "questions": [{"image_id": 1, "question": "?", "question_id": 1}]}
    secret = BenchmarkConfig("vqav2", dump(tmp_path / "test.json", head)).build("")[0]
    assert secret["images"][0].name == "COCO_test2015_000000000001.jpg"
    assert secret["answers"] == ()


def test_textvqa_and_llavas_questions_with_words_that_were_read(tmp_path: Path) -> None:
    entry = {
        "question": "What is the brand?",
        "image_id": "0a1b",
        "question_id": 34602,
        "answers": ["nokia"] * 9 + ["?"],
    }
    path = dump(tmp_path / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": [entry]})
    record = BenchmarkConfig("textvqa", path, image_root=str(tmp_path)).build("")[0]
    assert (record["question"], record["question_id"]) == ("What is the brand?" + WORD, 34602)
    assert record["answers"] == ("nokia",) * 9 + ("?",)
    assert record["images"][0].name == "0a1b.jpg"
    prompt = "What is the Brand?\nReference OCR token: NOKIA" + WORD
    line = {"question_id": "0a1b", "image": "0a1b.jpg", "text": prompt, "category": "default"}
    asked = BenchmarkConfig("llava", dump_lines(tmp_path / "llava_textvqa.jsonl", [line]), path).build("")[0]
    assert asked["question"] == prompt
    assert asked["answers"] == record["answers"]


def test_llavas_questions_with_answers_of_vqav2_or_their_own(tmp_path: Path) -> None:
    _, annotations = vqav2(tmp_path)
    line = {"question_id": 42000, "image": "a.jpg", "text": "What colour?" + WORD}
    record = BenchmarkConfig("llava", dump_lines(tmp_path / "q.jsonl", [line]), annotations).build("")[0]
    assert (record["answers"][0], record["kind"], record["question"]) == ("red", "other", "What colour?" + WORD)
    own = [{"question_id": 1, "text": "Two and two?", "answer": 4}, {"question_id": 2, "text": "?", "label": "no"}]
    source = BenchmarkConfig("llava", dump_lines(tmp_path / "own.jsonl", own)).build("")
    assert [source[i]["answers"] for i in range(2)] == [("4",), ("no",)]
    assert source[0]["images"] == ()


def test_llavas_questions_with_options(tmp_path: Path) -> None:
    prompt = "Which?\nA. a cat\nC. not yet\nB. a dog\nC. A. both" + LETTER
    line = {"question_id": 3, "text": prompt, "answer": "B"}
    record = BenchmarkConfig("llava", dump_lines(tmp_path / "choice.jsonl", [line])).build("")[0]
    assert (record["options"], record["answers"]) == (("a cat", "a dog", "A. both"), ("B",))


def test_pope(tmp_path: Path) -> None:
    for name in ("random", "adversarial"):
        entry = {"question_id": 1, "image": "COCO_val2014_000000000042.jpg", "text": "Is there a dog in the image?"}
        dump_lines(tmp_path / f"coco_pope_{name}.json", [{**entry, "label": "no" if name == "random" else "yes"}])
    source = BenchmarkConfig("pope", str(tmp_path)).build("")
    assert [(r["kind"], r["answers"], r["question_id"]) for r in (source[0], source[1])] == [
        ("adversarial", ("yes",), "adversarial/1"),
        ("random", ("no",), "random/1"),
    ]
    assert source[0]["question"] == "Is there a dog in the image?" + WORD


def test_mme_in_both_forms_of_its_folders(tmp_path: Path) -> None:
    lines = "Is there a dog? Please answer yes or no.\tYes\nIs there a cat? Please answer yes or no.\tNo\n"
    (tmp_path / "existence").mkdir()
    (tmp_path / "existence" / "000.txt").write_text(lines)
    draw(tmp_path / "existence" / "000.jpg")
    (tmp_path / "artwork" / "questions_answers_YN").mkdir(parents=True)
    (tmp_path / "artwork" / "questions_answers_YN" / "1.txt").write_text(lines)
    draw(tmp_path / "artwork" / "images" / "1.png")
    source = BenchmarkConfig("mme", str(tmp_path)).build("")
    found = [source[i] for i in range(4)]
    assert [r["kind"] for r in found] == ["artwork", "artwork", "existence", "existence"]
    assert [r["group"] for r in found] == ["artwork/1.png"] * 2 + ["existence/000.jpg"] * 2
    assert [r["answers"] for r in found] == [("Yes",), ("No",)] * 2
    assert found[0]["question"] == "Is there a dog?" + WORD
    assert len({r["question_id"] for r in found}) == 4
    assert all(r["images"][0].size() == (7, 9) for r in found)


def test_scienceqa(tmp_path: Path) -> None:
    problem = {"question": "Which?", "choices": ["west", "east"], "answer": 1, "hint": "Look.", "image": "image.png"}
    problem |= {"subject": "social science", "split": "test"}
    dump(tmp_path / "problems.json", {"4": problem, "5": {**problem, "hint": "", "image": None}, "6": {}})
    dump(tmp_path / "pid_splits.json", {"train": ["6"], "test": ["5", "4"]})
    draw(tmp_path / "images" / "test" / "4" / "image.png")
    source = BenchmarkConfig("scienceqa", str(tmp_path)).build("")
    assert [source[i]["question_id"] for i in range(2)] == [5, 4]
    assert source[0]["question"] == "Which?\nA. west\nB. east" + LETTER
    assert source[0]["images"] == ()
    record = source[1]
    assert record["question"] == "Context: Look.\nWhich?\nA. west\nB. east" + LETTER
    assert (record["answers"], record["options"], record["kind"]) == (("B",), ("west", "east"), "social science")
    assert record["images"][0].size() == (7, 9)
    with pytest.raises(ConfigError, match=r"split = 'val' is none of train, test"):
        BenchmarkConfig("scienceqa", str(tmp_path), split="val").build("")


def test_mmstar(tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (9, 7)).save(picture, "PNG")
    question = "Which is it?\nOptions: A: The book, old., B: A: neither, C: None, D: both of C: and D"
    rows = [
        {"index": 0, "question": question, "answer": "C", "category": "math", "image": {"bytes": picture.getvalue()}},
        {"index": 1, "question": "Say A, B, C or D", "answer": "A", "category": "math", "image": None},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "mmstar.parquet")
    source = BenchmarkConfig("mmstar", str(tmp_path)).build("")
    record = source[0]
    assert record["options"] == ("The book, old.", "A: neither", "None", "both of C: and D")
    assert (record["answers"], record["kind"], record["images"][0].size()) == (("C",), "math", (7, 9))
    assert source[1]["options"] == ("",) * 4


def test_gqa(tmp_path: Path) -> None:
    entry = {"imageId": "n161313", "question": "Is it?", "answer": "no", "isBalanced": True}
    entry |= {"types": {"structural": "verify", "semantic": "global"}}
    content = {"201307251": entry, "7": {**entry, "isBalanced": False}}
    source = BenchmarkConfig("gqa", dump(tmp_path / "testdev_balanced_questions.json", content)).build("")
    assert len(source) == 1
    record = source[0]
    assert (record["question_id"], record["kind"], record["answers"]) == (201307251, "verify", ("no",))
    assert record["images"][0].name == "n161313.jpg"


def test_docvqa_and_infographics(tmp_path: Path) -> None:
    entries = [
        {"questionId": 49153, "question": "What?", "image": "documents/a.png", "answers": ["0.28", ".28"]},
        {"questionId": 5, "question": "How?", "image_local_name": "20471.jpeg", "answers": ["x"]},
    ]
    source = BenchmarkConfig("docvqa", dump(tmp_path / "val_v1.0.json", {"data": entries})).build("")
    assert source[0]["answers"] == ("0.28", ".28")
    assert [source[i]["images"][0].name for i in range(2)] == ["documents/a.png", "20471.jpeg"]


def test_a_question_is_asked_with_the_models_own_placeholder(tmp_path: Path) -> None:
    questions, annotations = vqav2(tmp_path)
    config = BenchmarkConfig(
        "vqav2", questions, annotations, image_root=str(tmp_path / "val2014"), prompt="answer en {}"
    )
    source = config.build("")
    llava = ChatExamples(llava_tokenizer(), LLAVA_STAGE_2, 8, 4)
    shown = llava.writer.shown(llava.writer.document(source[0]))
    assert "<4 tokens of images>" in shown
    assert "What colour is it? ASSISTANT: [[red <2>]]" in shown
    assert "image>" not in shown
    assert llava.prompt(source[1])["tile_count"] == 1  # nobody's answer is known, and yet it can be asked
    nanovlm = ChatExamples(nanovlm_tokenizer(), NANOVLM, 512, 4)
    asked = nanovlm.writer.shown(nanovlm.writer.prompt(source[0]))
    assert "<4 tokens of images>" in asked
    assert "<image>" not in asked


def test_a_path_keeps_the_other_keys(tmp_path: Path) -> None:
    questions, annotations = vqav2(tmp_path)
    source = source_at(questions, BenchmarkConfig("vqav2", annotations=annotations), "p", "s", "")
    assert source[0]["reference"] == "red"


def test_wrong_files_are_one_sentence(tmp_path: Path) -> None:
    questions, annotations = vqav2(tmp_path)
    with pytest.raises(ConfigError, match=r"val2014_questions.json has no list 'data' \(it has: .*questions\)"):
        BenchmarkConfig("textvqa", questions).build("")
    with pytest.raises(ConfigError, match=r"path is empty; give \*_questions.json"):
        BenchmarkConfig("vqav2").build("")
    with pytest.raises(ConfigError, match=r"image_root = '/nowhere' is not a folder"):
        BenchmarkConfig("vqav2", questions, annotations, image_root="/nowhere").build("")
    with pytest.raises(ConfigError, match=r"image_name = '\{id\}.jpg' does not fit .* use \{image_id\}"):
        BenchmarkConfig("vqav2", questions, annotations, image_name="{id}.jpg").build("")
    other = {"annotations": [{"question_id": 1, "answers": [{"answer": "x"}]}]}
    with pytest.raises(ConfigError, match="answers none of the questions"):
        BenchmarkConfig("vqav2", questions, dump(tmp_path / "other.json", other)).build("")
    (tmp_path / "q.jsonl").write_text("{")
    with pytest.raises(ConfigError, match=r"q.jsonl, line 1 is no JSON"):
        BenchmarkConfig("llava", str(tmp_path / "q.jsonl")).build("")
    (tmp_path / "mme" / "count").mkdir(parents=True)
    (tmp_path / "mme" / "count" / "000.txt").write_text("Is it? Yes\n")
    with pytest.raises(ConfigError, match=r"000.txt, line 1 has no tab"):
        BenchmarkConfig("mme", str(tmp_path / "mme")).build("")
    with pytest.raises(ConfigError, match=r"prompt = 'ask' must hold \{\} once"):
        validate(BenchmarkConfig(prompt="ask"))


def test_the_folder_of_llavas_evaluations_is_read_by_its_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its docs/Evaluation.md lays it out."""
    config = load_config(str(Path(__file__).parents[3] / "configs" / "llava15_7b_stage2.py") + ":evals")
    alone = load_config(str(Path(__file__).parents[3] / "configs" / "llava15_7b_lora.py") + ":pope")
    assert alone.evals == tuple(entry for entry in config.evals if entry.name == "pope")
    folder = tmp_path / "playground" / "data" / "eval"
    images = ("vqav2/test2015", "gqa/data/images", "textvqa/train_images", "pope/val2014")
    for name in (*images, "pope/coco", "MME/MME_Benchmark_release_version/OCR", "llava-bench-in-the-wild/images"):
        (folder / name).mkdir(parents=True)
    line = {"question_id": 7, "image": "a.jpg", "text": "What?" + WORD}
    dump_lines(folder / "vqav2" / "llava_vqav2_mscoco_test-dev2015.jsonl", [line])
    dump_lines(folder / "llava-bench-in-the-wild" / "questions.jsonl", [line])
    gqa = {"imageId": "1", "question": "Is it?", "answer": "no", "isBalanced": True, "types": {"structural": "verify"}}
    dump(folder / "gqa" / "data" / "testdev_balanced_questions.json", {"1": gqa})
    dump(folder / "scienceqa" / "problems.json", {"4": {"question": "Which?", "choices": ["x", "y"], "answer": 1}})
    dump(folder / "scienceqa" / "pid_splits.json", {"test": ["4"]})
    dump_lines(folder / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl", [{**line, "question_id": "a"}])
    text = {"question": "What?", "image_id": "a", "question_id": 1, "answers": ["x"] * 10}
    dump(folder / "textvqa" / "TextVQA_0.5.1_val.json", {"data": [text]})
    dump_lines(folder / "pope" / "coco" / "coco_pope_random.json", [{**line, "label": "no"}])
    (folder / "MME" / "MME_Benchmark_release_version" / "OCR" / "1.txt").write_text("Is it?\tYes\nIs it?\tNo\n")
    monkeypatch.chdir(tmp_path)
    known = {}
    for evaluation in config.evals:
        validate(evaluation)
        source = evaluation.open_source("")
        known[evaluation.name] = (len(source), source[0]["answers"])
    assert known == {
        "vqav2": (1, ()),
        "gqa": (1, ("no",)),
        "scienceqa": (1, ("B",)),
        "textvqa": (1, ("x",) * 10),
        "pope": (1, ("no",)),
        "mme": (2, ("Yes",)),
        "samples": (1, ()),
    }
    scores = {evaluation.name: evaluation.score for evaluation in config.evals if isinstance(evaluation, VqaConfig)}
    assert scores == {name: name for name in ("gqa", "scienceqa", "textvqa", "pope", "mme")} | {"vqav2": "vqa"}


def test_every_layout_and_every_score_stand_in_the_document() -> None:
    document = (Path(__file__).parents[3] / "docs" / "vlm_evaluation.md").read_text(encoding="utf-8")
    table = [[cell.strip() for cell in line.split("|")] for line in document.splitlines() if line.startswith("| ")]
    assert {cells[2] for cells in table[1:]} == {f"`{layout}`" for layout in LAYOUTS}
    assert {cells[4] for cells in table[1:]} - {"any"} == {f"`{score}`" for score in SCORERS} - {"`exact`"}
