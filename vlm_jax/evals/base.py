"""The seam between evaluations and the rest: what an evaluation is given, and what it gives back.

No evaluation is here (`zero_shot`, `retrieval`, `linear_probe`, `knn` and `few_shot` are), and nothing that decides
when one runs (the training loop does).
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import jax
import numpy as np

from vlm_jax import schema
from vlm_jax.data.images import AugmentConfig
from vlm_jax.data.sources import Record, Source, SourceConfig, source_at
from vlm_jax.evals.benchmark_json import BenchmarkEntry

Vectors = Literal["pooled", "embedding", "cls", "mean", "blocks"]
"""Which vector of an image: before the projection into the joint space, or after it; of a tower alone also the class
token, or the mean of the patches."""


Offer = Literal[
    "image_tokens",
    "reconstruct",
    "held_out_loss",
    "match_pairs",
    "ground_pairs",
    "answer",
    "rank_answers",
    "pair_class_scores",
]
"""What not every model gives."""


class Encoder(Protocol):
    """A model on its mesh, as evaluations see it; what it gives is float32."""

    @property
    def batch_size(self) -> int:
        """Rows of a global batch; a multiple of `shards`."""
        ...

    @property
    def shards(self) -> int:
        """Number of devices that share the batch."""
        ...

    @property
    def reads_text(self) -> bool:
        """Whether there is a tokenizer; a model of images alone has none, and no evaluation with texts."""
        ...

    @property
    def joint_space(self) -> bool:
        """Whether features of images and texts may be compared; else `prompt_scores` compares them."""
        ...

    @property
    def class_count(self) -> int:
        """Classes that the model's own head tells apart; 0 where it has none."""
        ...

    def image_features(self, params: Any, images_BxHxWx3: jax.Array) -> jax.Array:
        """uint8 images [B, H, W, 3], sharded over the batch axes -> L2-normalised features [B, E]."""
        ...

    def image_vectors(self, params: Any, images_BxHxWx3: jax.Array, which: Vectors) -> jax.Array:
        """As `image_features`, for a classifier on frozen features: [B, D], not normalised."""
        ...

    @property
    def block_count(self) -> int:
        """Blocks whose class tokens `layer_vectors` gives; 0 where there is no class token."""
        ...

    def offers(self, function: Offer) -> bool:
        """Whether the model has what an evaluation needs."""
        ...

    def image_tokens(self, params: Any, images_BxHxWx3: jax.Array, layers: tuple[int, ...]) -> jax.Array:
        """As `image_vectors`, but the tokens of the patches, [B, N, D]: see `ModelObjective.image_tokens`."""
        ...

    def layer_vectors(self, params: Any, images_BxHxWx3: jax.Array, normed: bool) -> jax.Array:
        """As `image_vectors`, but [B, L, 2, D]: see `ModelObjective.layer_vectors`."""
        ...

    def reconstruct(
        self, params: Any, images_BxHxWx3: jax.Array, index_B: jax.Array, seed: int
    ) -> dict[str, jax.Array]:
        """uint8 [B, H, W, 3] by name: what the method makes of what it hides, which (seed, index) decides."""
        ...

    def held_out_loss(self, params: Any, batches: Iterable[Mapping[str, jax.Array]], seed: int) -> tuple[float, float]:
        """(sum, count) of the method's own loss over the usable rows of `loss_batches`."""
        ...

    def prompt_batches(self, source: Source) -> Iterable[Mapping[str, jax.Array]]:
        """As `image_batches`, with rows of conversations up to where their last answer begins."""
        ...

    def answer(
        self, params: Any, batch: Mapping[str, jax.Array], max_new_tokens: int, blank: bool = False
    ) -> jax.Array:
        """A batch of `prompt_batches` -> int32 [B, max_new_tokens], what the model says; `blank` as `blanked`."""
        ...

    def answer_rows(self, answers: Sequence[str]) -> np.ndarray:
        """Answers as `rank_answers` takes them, int32 [N, L]."""
        ...

    def rank_answers(
        self,
        params: Any,
        batch: Mapping[str, jax.Array],
        answers_NxL: np.ndarray,
        k: int,
        first_twice: bool,
        blank: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        """A batch of `prompt_batches` -> (places of answers int32 [B, k], best first; log of their shares [B, k]).

        See `ModelObjective.rank_answers`; `blank` as `blanked`.
        """
        ...

    def written(self, ids_NxL: np.ndarray) -> list[str]:
        """The texts of answers, without what ends them."""
        ...

    def spans(self, record: Record) -> list[tuple[str, bool]]:
        """A record as a row of training, for people: texts, and whether they are learned, in turn.

        Raises:
            BadRecord: it can't be used, as when its answer isn't known.
        """
        ...

    def blanked(self, batch: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
        """A batch of questions or conversations whose images all have the mean colour, 0 once they are normalised."""
        ...

    def class_scores(self, params: Any, images_BxHxWx3: jax.Array) -> jax.Array:
        """Images as above -> [B, C], a score for each of the model's own classes; higher = likelier."""
        ...

    def pair_class_scores(self, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        """As `class_scores`, of a batch of `loss_batches`: texts beside images."""
        ...

    def text_features(self, params: Any, tokens_BxL: jax.Array) -> jax.Array:
        """int32 tokens [B, L], sharded over the batch axes -> L2-normalised features [B, E]."""
        ...

    def prompt_scores(self, params: Any, images_BxHxWx3: jax.Array, tokens_PxL: np.ndarray) -> jax.Array:
        """Images as above and int32 tokens [P, L], the same on every process -> [B, P]; higher = a better match."""
        ...

    def match_images(self, params: Any, images_BxHxWx3: jax.Array) -> jax.Array:
        """Images as above -> what `match_pairs` takes of them, whole on every device, in the compute dtype."""
        ...

    def match_texts(self, params: Any, tokens_BxL: jax.Array) -> dict[str, jax.Array]:
        """int32 tokens [B, L], sharded over the batch axes -> what `match_pairs` takes of them, each [B, ...]."""
        ...

    def match_pairs(
        self, params: Any, images_BxSxC: jax.Array, texts: dict[str, jax.Array], pairs_Px2: jax.Array
    ) -> jax.Array:
        """int32 [P, 2], (row of the images, row of the texts), sharded over the batch axes -> [P, 2], scores of "they
        don't belong together" and "they do"."""
        ...

    def ground_pairs(
        self, params: Any, images_BxSxC: jax.Array, texts: dict[str, jax.Array], pairs_Px2: jax.Array, layer: int
    ) -> jax.Array:
        """As `match_pairs` -> [P, rows, columns]: see `ModelObjective.ground_pairs`."""
        ...

    @property
    def sees_whole_images(self) -> bool:
        """Whether images are squashed to the model's square, so that places in one are places in the other."""
        ...

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> int32 [n, L]."""
        ...

    def image_batches(self, source: Source) -> Iterable[Mapping[str, jax.Array]]:
        """Every usable record of a source once, in order, as global batches of `batch_size` rows.

        Keys: `image`; `index` int32 [B], the record's position in the source; `mask` bool [B], False for a row that is
        padding or whose record can't be used. Other keys are ignored.
        """
        ...

    def labelled_batches(self, source: Source, class_count: int = 0) -> Iterable[Mapping[str, jax.Array]]:
        """As `image_batches`, with `label`; records without one can't be used.

        Args:
            source: its records have a `label`: an int, or a tuple of them (several labels, perhaps none).
            class_count: 0 for one label a record, `label` int32 [B]; else the number C of classes, of which a record
                may have several, and `label` is bool [B, C].

        Raises:
            EvalError: a label that is not one of the C classes.
        """
        ...

    def loss_batches(self, source: Source, seed: int) -> Iterable[Mapping[str, jax.Array]]:
        """As `image_batches`, with all that the method's loss wants; what is random in it is drawn by (seed, index)."""
        ...

    def training_batches(
        self, source: Source, augment: AugmentConfig, batch_size: int, seed: int
    ) -> Iterator[Mapping[str, jax.Array]]:
        """Endless batches of `image`, a random view, and `label`, in the order of training."""
        ...

    def shard(self, array: np.ndarray) -> jax.Array:
        """An array, the same on every process -> a global array, its rows spread over the batch axes.

        The number of rows is a multiple of `shards`.
        """
        ...

    def replicate(self, array: np.ndarray) -> jax.Array:
        """An array, the same on every process -> a global array, whole on every device."""
        ...


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """What an evaluation found.

    Attributes:
        metrics: flat name -> value, such as `zero_shot/digits/top1`; the same on every process. Shares are in 0..1.
        images: flat name -> uint8 [H, W, 3], on the primary process; empty on the others.
        benchmark: the same numbers as CLIP_benchmark names them, for tasks that it has.
        texts: flat name -> Markdown.
        predictions: flat name -> an object for each example, ready for JSON.
    """

    metrics: dict[str, float]
    images: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    benchmark: BenchmarkEntry | None = None
    texts: dict[str, str] = dataclasses.field(default_factory=dict)
    predictions: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)


class EvalError(ValueError):
    """The data can't be evaluated in this way; the sentence says why and what to do."""


class Evaluator(Protocol):
    """An evaluation that is ready to run; every process of a job calls it at the same step."""

    def run(self, params: Any, step: int) -> EvalResult:
        """Evaluates `params`; `step` is only for captions of pictures.

        Raises:
            EvalError: the data can't be evaluated in this way; the sentence says why.
        """
        ...


@dataclasses.dataclass(frozen=True)
class EvalConfig(schema.Choice):
    """Family of the evaluations; its members add their own keys."""

    # Stands in the names of the metrics: `zero_shot/<name>/top1`.
    name: str
    # What is evaluated.
    source: SourceConfig
    # Steps from one run to the next; 0 = whenever the loop evaluates.
    every: int = 0
    # Only the first this many records; 0 = all.
    limit: int = 0
    # Short form of the source, as data.path: tar shards, a table, a folder.
    path: str = ""

    @classmethod
    def kinds(cls) -> Mapping[str, type[Any]]:
        """The evaluations by name."""
        # Here and not on top: the members' modules import this one.
        from vlm_jax.evals import (
            accuracy,
            answer_ranking,
            attentive_probe,
            few_shot,
            generate,
            grounding,
            held_out_loss,
            knn,
            linear_probe,
            reconstructions,
            retrieval,
            sgd_probe,
            vqa,
            zero_shot,
        )

        return {
            "zero_shot": zero_shot.ZeroShotConfig,
            "retrieval": retrieval.RetrievalConfig,
            "linear_probe": linear_probe.LinearProbeConfig,
            "knn": knn.KnnConfig,
            "few_shot": few_shot.FewShotConfig,
            "accuracy": accuracy.AccuracyConfig,
            "sgd_probe": sgd_probe.SgdProbeConfig,
            "attentive_probe": attentive_probe.AttentiveProbeConfig,
            "held_out_loss": held_out_loss.HeldOutLossConfig,
            "reconstructions": reconstructions.ReconstructionsConfig,
            "vqa": vqa.VqaConfig,
            "answer_ranking": answer_ranking.AnswerRankingConfig,
            "grounding": grounding.GroundingConfig,
            "generate": generate.GenerateConfig,
        }

    def problems(self) -> Iterator[tuple[str, str]]:
        """What is impossible in the common keys."""
        if not self.name or not self.name.replace("_", "").replace("-", "").isalnum():
            yield "name", f"= {self.name!r} stands in names of metrics and files; use letters, digits, '_' and '-'"
        for key, value in (("every", self.every), ("limit", self.limit)):
            if value < 0:
                yield key, f"= {value} can't be negative; 0 is the default"

    def build(self, encoder: Encoder, cache_dir: str) -> Evaluator:
        """Opens the source and returns the evaluator; `cache_dir` is where a source may keep its index."""
        raise TypeError(f"{type(self).__name__} is a family of evaluations; use one of {', '.join(self.kinds())}")

    def check_reads_text(self, encoder: Encoder) -> None:
        """Raises `ConfigError` for a model of images alone."""
        if not encoder.reads_text:
            raise schema.ConfigError(
                f"Evaluation {self.name!r} ({self.kind()}) compares images with texts, and this model reads none; "
                "use linear_probe, knn or few_shot."
            )

    def open_source(self, cache_dir: str) -> Source:
        """The source, cut to `limit`.

        Raises:
            ConfigError: it can't be opened, or holds no records.
        """
        key = f"config.evals.{self.name}"
        source = source_at(self.path, self.source, f"{key}.path", f"{key}.source", cache_dir)
        return first_records(source, f"{key}.source", self.limit)


def first_records(source: Source, key: str, limit: int) -> Source:
    """The first `limit` records of a source (0: all); raises `ConfigError`, naming its `key`, when it holds none."""
    if len(source) == 0:
        raise schema.ConfigError(f"{key} holds no records; check its path and split.")
    return FirstRecords(source, limit) if 0 < limit < len(source) else source


class FirstRecords:
    """The first `count` records of a source, as a source."""

    def __init__(self, source: Source, count: int):
        self._source = source
        self._count = count
        self.class_names = source.class_names

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        return self._source[self._checked(index)]

    def texts(self, index: int) -> tuple[str, ...]:
        """The captions of one record."""
        return self._source.texts(self._checked(index))

    def _checked(self, index: int) -> int:
        if not 0 <= index < self._count:
            raise IndexError(f"Record {index} is not among the first {self._count}.")
        return index
