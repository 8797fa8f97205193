"""Readers of the files of benchmarks, each in the layout that it is published in. What is asked is `benchmark`'s."""

import json
import os
import re
import string
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pyarrow
from pyarrow import parquet

from vlm_jax.data.sources.chats import ImageBytes, ImageFile, StoredImage
from vlm_jax.data.sources.paths import find_files
from vlm_jax.schema import ConfigError

Layout = Literal["vqav2", "textvqa", "llava", "pope", "mme", "scienceqa", "mmstar", "gqa", "docvqa"]
LETTERS = string.ascii_uppercase
_IMAGE_ENDS = (".jpg", ".jpeg", ".png")
_YES_OR_NO = " Please answer yes or no."
_OPTION = re.compile(r"(?:^|[\s,])([A-H]): ")
_OPTION_LINE = re.compile(r"([A-H])[.)] (.*)")


class Question(NamedTuple):
    """One question of a benchmark.

    Attributes:
        id: its name in the files.
        text: what is asked, options included.
        images: those it is about; none for a question without image.
        answers: the right ones; none where they are kept secret. For options the letter of the right one.
        reference: the answer to be learned.
        where: the file that it stands in.
        kind: for numbers of each kind.
        options: texts of A, B, ... in turn.
        group: the image, where questions about one image count together.
    """

    id: str
    text: str
    images: tuple[StoredImage, ...]
    answers: tuple[str, ...]
    reference: str
    where: str
    kind: str = ""
    options: tuple[str, ...] = ()
    group: str = ""


class Files(NamedTuple):
    """Where a benchmark lies: keys of `BenchmarkConfig`."""

    path: str
    annotations: str
    image_root: str
    image_name: str
    split: str

    def root(self, file: str) -> str:
        """The folder that names of images start from; raises `ConfigError` when the one given is none."""
        if self.image_root and not os.path.isdir(self.image_root):
            raise ConfigError(
                f"config.data.source.image_root = {self.image_root!r} is not a folder; give the one that the names of "
                f"images in {file} start from"
            )
        return self.image_root or os.path.dirname(os.path.abspath(file))

    def image(self, file: str, published: str, image_id: Any, split: str = "") -> tuple[StoredImage, ...]:
        """The image of an id, by the config's name or the published one."""
        template = self.image_name or published
        try:
            name = template.format(image_id=image_id, split=split)
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                f"config.data.source.image_name = {template!r} does not fit the image {image_id!r} ({error}); use "
                "{image_id} and {split}"
            ) from None
        return (ImageFile(name, self.root(file)),)


def read_vqav2(files: Files) -> list[Question]:
    """`*_questions.json` and, where answers are public, `*_annotations.json` of VQAv2 (Goyal et al. 2017)."""
    found: list[Question] = []
    annotated = _vqa_annotations(files.annotations) if files.annotations else {}
    for file in find_files(files.path, "*questions.json", "*_questions.json"):
        content = _json(file)
        # The images of test-dev are those of test.
        split = str(content.get("data_subtype", "")).replace("-dev", "")
        for entry in _entries(content, "questions", file):
            answers, reference, kind = annotated.get(_text(entry, "question_id", file), ((), "", ""))
            images = files.image(file, "COCO_{split}_{image_id:012d}.jpg", entry.get("image_id"), split)
            found.append(_question(entry, "question_id", "question", file, images, answers, reference, kind))
    _check_answered(found, files.annotations)
    return found


def _vqa_annotations(file: str) -> dict[str, tuple[tuple[str, ...], str, str]]:
    """Question -> (what ten people said, what most said, type of the answer)."""
    found = {}
    for entry in _entries(_json(file), "annotations", file):
        said = tuple(sys.intern(_text(answer, "answer", file)) for answer in entry.get("answers", ()))
        most = str(entry.get("multiple_choice_answer") or (said[0] if said else ""))
        found[_text(entry, "question_id", file)] = said, most, str(entry.get("answer_type", ""))
    return found


def _check_answered(found: Sequence[Question], annotations: str) -> None:
    if annotations and not any(question.answers for question in found):
        raise ConfigError(
            f"config.data.source.annotations = {annotations!r} answers none of the questions of {found[0].where}; give "
            "the file of the same split"
        )


def read_textvqa(files: Files) -> list[Question]:
    """`TextVQA_*.json` (Singh et al. 2019): `{"data": [{"question_id", "question", "image_id", "answers"}]}`."""
    found: list[Question] = []
    for file in find_files(files.path, "*.json", "TextVQA_*_val.json"):
        for entry in _entries(_json(file), "data", file):
            images = files.image(file, "{image_id}.jpg", entry.get("image_id"))
            answers = _texts(entry.get("answers", ()))
            found.append(_question(entry, "question_id", "question", file, images, answers))
    return found


def read_llava(files: Files) -> list[Question]:
    """LLaVA's questions: an object a line of `question_id`, `image`, `text` (the whole prompt), perhaps `category`.

    Answers are in the object (`answer` or `label`), or in `annotations`: VQAv2's, by `question_id`, or TextVQA's, by
    the image that `question_id` names there and the question. Options are lines of the prompt, `A. text`.
    """
    by_id: dict[str, tuple[tuple[str, ...], str, str]] = {}
    by_question: dict[tuple[str, str], tuple[str, ...]] = {}
    if files.annotations:
        content = _json(files.annotations)
        if "annotations" in content:
            by_id = _vqa_annotations(files.annotations)
        for entry in content.get("data", ()):
            name = (str(entry.get("image_id")), str(entry.get("question", "")).lower())
            by_question[name] = _texts(entry.get("answers", ()))
    found: list[Question] = []
    for file in find_files(files.path, "*.jsonl", "a .jsonl of questions"):
        for entry in _lines(file):
            identity, prompt = _text(entry, "question_id", file), _text(entry, "text", file)
            answers, reference, kind = by_id.get(identity, (_own_answers(entry), "", ""))
            for line in prompt.lower().split("\n") if by_question else ():
                answers = by_question.get((identity, line), answers)
            kind = str(entry.get("category", kind))
            images = (ImageFile(entry["image"], files.root(file)),) if entry.get("image") else ()
            one = _question(entry, "question_id", "text", file, images, answers, reference, kind)
            found.append(one._replace(options=option_lines(prompt)))
    _check_answered(found, files.annotations)
    return found


def option_lines(prompt: str) -> tuple[str, ...]:
    """The texts of the lines `A. text`, `B. text`, ... of a prompt, perhaps none."""
    found: list[str] = []
    for line in map(_OPTION_LINE.fullmatch, prompt.split("\n")):
        if line is not None and line[1] == LETTERS[len(found)]:
            found.append(line[2])
    return tuple(found)


def read_pope(files: Files) -> list[Question]:
    """POPE's `coco_pope_{random,popular,adversarial}.json` (Li et al. 2023), an object a line; kinds are the files'."""
    found: list[Question] = []
    for file in find_files(files.path, "*pope*.json", "coco_pope_*.json"):
        name = os.path.splitext(os.path.basename(file))[0].rpartition("_")[2]
        for entry in _lines(file):
            images = (ImageFile(_text(entry, "image", file), files.root(file)),)
            kind = str(entry.get("category", name))
            one = _question(entry, "question_id", "text", file, images, (_text(entry, "label", file),), kind=kind)
            # Each of the files counts its questions from 1.
            found.append(one._replace(id=f"{kind}/{one.id}"))
    return found


def read_mme(files: Files) -> list[Question]:
    """MME's folders (Fu et al. 2023): one a category, an image beside a .txt of `question<tab>answer` lines.

    Some categories have them in `images` and `questions_answers_YN`. That yes or no is wanted stands in every question;
    it is left out, for the prompt says what is wanted.
    """
    if not os.path.isdir(files.path):
        raise ConfigError(f"config.data.source.path = {files.path!r} is not a folder; give MME's, with one a category")
    found: list[Question] = []
    for category in sorted(os.listdir(files.path)):
        folder = os.path.join(files.path, category)
        texts, images = (os.path.join(folder, name) for name in ("questions_answers_YN", "images"))
        texts, images = (texts, images) if os.path.isdir(texts) else (folder, folder)
        names = sorted(os.listdir(texts)) if os.path.isdir(texts) else []
        for name in (name for name in names if name.endswith(".txt")):
            stem, file = name.removesuffix(".txt"), os.path.join(texts, name)
            image = next((stem + end for end in _IMAGE_ENDS if os.path.exists(os.path.join(images, stem + end))), stem)
            with open(file, encoding="utf-8") as lines:
                for number, line in enumerate(filter(str.strip, lines)):
                    text, tab, answer = line.strip().rpartition("\t")
                    if not tab:
                        raise ConfigError(f"{file}, line {number + 1} has no tab between question and answer")
                    text = text.strip().replace(_YES_OR_NO, "").strip()
                    group, stored = f"{category}/{image}", (ImageFile(image, images),)
                    found.append(
                        Question(f"{group}/{number}", text, stored, (answer,), answer, file, category, group=group)
                    )
    return _some(found, files.path, "no folder of images with a .txt beside each")


def read_scienceqa(files: Files) -> list[Question]:
    """ScienceQA's folder (Lu et al. 2022): `problems.json`, `pid_splits.json`, `images/<split>/<id>/image.png`."""
    folder = files.path if os.path.isdir(files.path) else os.path.dirname(files.path)
    file, splits = os.path.join(folder, "problems.json"), os.path.join(folder, "pid_splits.json")
    problems, parts = _json(file), _json(splits)
    if files.split not in parts:
        raise ConfigError(
            f"config.data.source.split = {files.split!r} is none of {', '.join(parts)}, those of {splits}"
        )
    root = files.image_root or os.path.join(os.path.abspath(folder), "images")
    found: list[Question] = []
    for identity in map(str, parts[files.split]):
        entry = problems.get(identity)
        if entry is None:
            raise ConfigError(f"{file} lacks the problem {identity} of {splits}; fetch both again")
        options, hint = _texts(entry["choices"]), str(entry.get("hint") or "").strip()
        lines = [f"Context: {hint}"] * bool(hint) + [str(entry["question"])]
        lines += [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
        name = entry.get("image")
        images = (ImageFile(os.path.join(files.split, identity, name), root),) if name else ()
        letter = LETTERS[int(entry["answer"])]
        kind = str(entry.get("subject", ""))
        found.append(Question(identity, "\n".join(lines), images, (letter,), letter, file, kind, options))
    return _some(found, file, f"no problem of the split {files.split!r}")


def read_mmstar(files: Files) -> list[Question]:
    """MMStar's parquet (Chen et al. 2024): `index`, `question` with its options, `image`, `answer`, `category`."""
    found: list[Question] = []
    for file in find_files(files.path, "*.parquet", "MMStar's *.parquet"):
        try:
            rows = parquet.read_table(file).to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise ConfigError(f"{file} can't be read as parquet ({error}); fetch it again") from None
        for entry in rows:
            image = entry.get("image")
            data = image.get("bytes") if isinstance(image, Mapping) else image
            images = (ImageBytes(data),) if isinstance(data, bytes) else ()
            answers, kind = (_text(entry, "answer", file).strip(),), str(entry.get("category", ""))
            one = _question(entry, "index", "question", file, images, answers, kind=kind)
            found.append(one._replace(options=options_in(one.text)))
    return found


def options_in(question: str) -> tuple[str, ...]:
    """The texts of A, B, ... where a question says `A: text, B: text`; four without a text where it doesn't."""
    marks, place = [], 0
    for letter in LETTERS[:8]:  # in their order, for an option may speak of another
        mark = next((found for found in _OPTION.finditer(question, place) if found[1] == letter), None)
        if mark is None:
            break
        marks.append(mark)
        place = mark.end() - 1
    ends = [mark.start() for mark in marks[1:]] + [len(question)]
    texts = tuple(
        question[mark.end() : end].strip().rstrip(",").strip() for mark, end in zip(marks, ends, strict=False)
    )
    return texts if len(texts) > 1 else ("",) * 4


def read_gqa(files: Files) -> list[Question]:
    """GQA's `*_questions.json` (Hudson & Manning 2019), an object of questions by id; those of the balanced set, which
    alone is scored. The kind is the structure: verify, query, choose, logical, compare."""
    found: list[Question] = []
    for file in find_files(files.path, "*questions.json", "*_balanced_questions.json"):
        for identity, entry in _json(file).items():
            if not entry.get("isBalanced", True):
                continue
            images = files.image(file, "{image_id}.jpg", _text(entry, "imageId", file))
            kind = str((entry.get("types") or {}).get("structural", ""))
            answers = (str(entry["answer"]),) if "answer" in entry else ()
            found.append(_question({**entry, "id": identity}, "id", "question", file, images, answers, kind=kind))
    return _some(found, files.path, "no question of the balanced set")


def read_docvqa(files: Files) -> list[Question]:
    """DocVQA's and InfographicVQA's json (Mathew et al. 2021, 2022): `data` of `questionId`, `question`, `image` (or
    `image_local_name`), `answers`."""
    found: list[Question] = []
    for file in find_files(files.path, "*.json", "a .json of DocVQA or InfographicVQA"):
        for entry in _entries(_json(file), "data", file):
            name = entry.get("image") or entry.get("image_local_name")
            if not isinstance(name, str):
                raise ConfigError(f"{file} has a question without `image` or `image_local_name`; fetch it again")
            images, answers = (ImageFile(name, files.root(file)),), _texts(entry.get("answers", ()))
            found.append(_question(entry, "questionId", "question", file, images, answers))
    return found


def _question(
    entry: Mapping[str, Any],
    id_key: str,
    text_key: str,
    file: str,
    images: tuple[StoredImage, ...],
    answers: tuple[str, ...],
    reference: str = "",
    kind: str = "",
) -> Question:
    text = _text(entry, text_key, file).replace("<image>", "").strip()
    reference = reference or (answers[0] if answers else "")
    return Question(_text(entry, id_key, file), text, images, answers, reference, file, kind)


def _own_answers(entry: Mapping[str, Any]) -> tuple[str, ...]:
    value = entry.get("answers", entry.get("answer", entry.get("label")))
    return () if value is None else _texts(value if isinstance(value, list) else [value])


def _texts(values: Iterable[Any]) -> tuple[str, ...]:
    return tuple(str(value) for value in values)


def _text(entry: Mapping[str, Any], key: str, file: str) -> str:
    if entry.get(key) is None:
        raise ConfigError(
            f"{file} has an entry without {key!r} (it has: {', '.join(entry)}); config.data.source.layout says whose "
            "files they are"
        )
    return str(entry[key])


def _entries(content: Mapping[str, Any], key: str, file: str) -> list[Mapping[str, Any]]:
    entries = content.get(key)
    if not isinstance(entries, list) or not entries:
        raise ConfigError(
            f"{file} has no list {key!r} (it has: {', '.join(content)}); config.data.source.layout says whose files "
            "they are"
        )
    return entries


def _json(file: str) -> dict[str, Any]:
    try:
        with open(file, encoding="utf-8") as stream:
            content = json.load(stream)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} can't be read as JSON ({error}); check the path, or fetch it again") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds a {type(content).__name__}, not an object; see config.data.source.layout")
    return content


def _lines(file: str) -> Iterator[dict[str, Any]]:
    with open(file, encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{file}, line {number} is no JSON ({error}); give an object a line") from None
            if not isinstance(entry, dict):
                raise ConfigError(f"{file}, line {number} is a {type(entry).__name__}; give an object a line")
            yield entry


def _some(found: list[Question], path: str, what: str) -> list[Question]:
    if not found:
        raise ConfigError(f"config.data.source.path = {path!r} holds {what}; check it")
    return found
