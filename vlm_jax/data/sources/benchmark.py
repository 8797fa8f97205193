"""Questions about images in the files that benchmarks are published in, each with all of its right answers.

A record has no turns but a `question`, its text without any placeholder, which `conversation_of` makes a conversation
with the model's own; `reference`, the answer that a model would learn, empty where answers are kept secret; and what
scores need: `answers`, `options`, `question_id`, `kind` and `group`. Layouts are read by `benchmark_files`.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator

from vlm_jax.data.sources.base import Record, SourceConfig
from vlm_jax.data.sources.benchmark_files import (
    Files,
    Layout,
    Question,
    read_docvqa,
    read_gqa,
    read_llava,
    read_mme,
    read_mmstar,
    read_pope,
    read_scienceqa,
    read_textvqa,
    read_vqav2,
)
from vlm_jax.data.sources.chats import message_texts, question_turns

WORD = "{}\nAnswer the question using a single word or phrase."
LETTER = "{}\nAnswer with the option's letter from the given choices directly."
LAYOUTS: dict[Layout, tuple[Callable[[Files], list[Question]], str]] = {
    "vqav2": (read_vqav2, WORD),
    "textvqa": (read_textvqa, WORD),
    "llava": (read_llava, "{}"),  # the prompt stands in the file
    "pope": (read_pope, WORD),
    "mme": (read_mme, WORD),
    "scienceqa": (read_scienceqa, LETTER),
    "mmstar": (read_mmstar, LETTER),
    "gqa": (read_gqa, WORD),
    "docvqa": (read_docvqa, WORD),
}
"""Layout -> its reader, and the prompt that LLaVA-1.5 is asked with (Liu et al. 2024, table 7)."""


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig(SourceConfig):
    """One question a record."""

    # whose files they are
    layout: Layout = "vqav2"
    # questions: a .json (vqav2, textvqa, gqa, docvqa, pope), a .jsonl (llava), *.parquet (mmstar), or a folder (mme,
    # scienceqa)
    path: str = ""
    # the file of the answers, where it is another one: of vqav2; of llava that of vqav2 or textvqa
    annotations: str = ""
    # folder that names of images start from; empty: the folder of `path`, of scienceqa its folder `images`
    image_root: str = ""
    # name of an image by {image_id} and {split}, where the file doesn't give it; empty: as published
    image_name: str = ""
    # part of scienceqa
    split: str = "test"
    # what is asked, {} is the question; empty: as LLaVA-1.5 is asked
    prompt: str = ""

    def problems(self) -> Iterator[tuple[str, str]]:
        """A prompt without the question."""
        if self.prompt and self.prompt.count("{}") != 1:
            yield "prompt", f"= {self.prompt!r} must hold {{}} once, where the question goes"

    def build(self, cache_dir: str) -> "BenchmarkSource":
        """Reads the questions, and no image."""
        return BenchmarkSource(self)


class BenchmarkSource:
    """The questions are kept in memory, images are read when they are needed."""

    class_names: tuple[str, ...] = ()

    def __init__(self, config: BenchmarkConfig):
        read, published = LAYOUTS[config.layout]
        self.config, self.prompt = config, config.prompt or published
        files = Files(config.path, config.annotations, config.image_root, config.image_name, config.split)
        self.questions = read(files)

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> Record:
        """The question with its images and answers."""
        one = self.questions[index]
        question = self._asked(one)
        return {
            "question": question,
            "reference": one.reference,
            "images": one.images,
            "texts": message_texts(question_turns(question, one.reference, 0, "")),
            "key": one.id,
            "where": one.where,
            "question_id": int(one.id) if one.id.isdecimal() and str(int(one.id)) == one.id else one.id,
            "answers": one.answers,
            "options": one.options,
            "kind": one.kind,
            "group": one.group,
        }

    def texts(self, index: int) -> tuple[str, ...]:
        """The question and its answer."""
        one = self.questions[index]
        return message_texts(question_turns(self._asked(one), one.reference, 0, ""))

    def fingerprint(self) -> str:
        """Of the files and the keys."""
        paths = sorted({question.where for question in self.questions})
        stats = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths]
        return repr((stats, dataclasses.astuple(self.config)))

    def _asked(self, one: Question) -> str:
        return self.prompt.replace("{}", one.text)


__all__ = ["BenchmarkConfig", "BenchmarkSource"]
