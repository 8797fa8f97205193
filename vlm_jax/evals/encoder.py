"""The model as evaluations see it: an objective's features, jitted once each, with its own tokenizer and images."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlm_jax.data.chat_examples import ChatExamples
from vlm_jax.data.examples import Example, LabelledImages, Views
from vlm_jax.data.images import AugmentConfig
from vlm_jax.data.pipeline import DataConfig, EvalBatches, TrainLoader, eval_batches
from vlm_jax.data.question_examples import QuestionExamples
from vlm_jax.data.sources import Record, Source
from vlm_jax.data.text import Tokenizer
from vlm_jax.evals.base import Offer, Vectors
from vlm_jax.evals.held_out import MARKS, HeldOut, Numbered, SeededRows, example_keys
from vlm_jax.evals.labels import MultiLabelImages
from vlm_jax.mesh import batch_sharding, replicated
from vlm_jax.models.generation import GenerationConfig
from vlm_jax.objectives.base import ModelObjective
from vlm_jax.objectives.lm import next_tokens
from vlm_jax.schema import ConfigError


class MeshEncoder:
    """Implements `vlm_jax.evals.base.Encoder` on a mesh.

    Args:
        objective: gives the features.
        tokenizer: the one that the model was trained with; None for a model without text.
        image_size: side of the model's images in pixels.
        mesh: where parameters and batches lie.
        batch_size: rows of a global batch, rounded up to a multiple of the devices that share it.
        held_out: the method's loss as an evaluation; None: it is not asked for.
    """

    def __init__(
        self,
        objective: ModelObjective,
        tokenizer: Tokenizer | None,
        image_size: int,
        mesh: Mesh,
        batch_size: int,
        held_out: HeldOut | None = None,
    ):
        self._objective, self._tokenizer, self._mesh, self._image_size = objective, tokenizer, mesh, image_size
        self._held_out = held_out
        self._sharding = batch_sharding(mesh)
        self.shards = self._sharding.num_devices // (mesh.shape.get("tensor", 1) * mesh.shape.get("sequence", 1))
        self.batch_size = -(-batch_size // self.shards) * self.shards
        self.joint_space, self.class_count = objective.joint_space, objective.class_count
        self.block_count = objective.block_count
        self._labelled = LabelledImages(image_size, objective.preprocess)
        self._views = Views(image_size, objective.preprocess, augment=None)
        self._image = jax.jit(objective.image_features)
        self._vectors = jax.jit(objective.image_vectors, static_argnums=2)
        self._classes = jax.jit(objective.class_scores)
        self._pair_classes = jax.jit(objective.pair_class_scores)
        self._tokens = jax.jit(objective.image_tokens, static_argnums=2)
        self._layers = jax.jit(objective.layer_vectors, static_argnums=2)
        self._reconstruct = jax.jit(objective.reconstruct)
        self._text = jax.jit(objective.text_features)
        self._scores = jax.jit(objective.prompt_scores)
        self._answer = jax.jit(objective.answer, static_argnums=2)
        self._rank = jax.jit(objective.rank_answers, static_argnums=(3, 4))
        self._likelihood = jax.jit(functools.partial(_likelihood, objective))
        self._match_images = jax.jit(objective.match_images, out_shardings=replicated(mesh))
        self._match_texts, self._match_pairs = jax.jit(objective.match_texts), jax.jit(objective.match_pairs)
        self._ground_pairs = jax.jit(objective.ground_pairs, static_argnums=4)

    @property
    def reads_text(self) -> bool:
        """Whether there is a tokenizer."""
        return self._tokenizer is not None

    def image_features(self, params: Any, images_BxHxWx3: jax.Array) -> jax.Array:
        """uint8 [B, H, W, 3] -> [B, E]."""
        with jax.set_mesh(self._mesh):
            return self._image(params, images_BxHxWx3)

    def offers(self, function: Offer) -> bool:
        """Whether the method defines it; for its loss: whether sums over rows tell it, and nothing but parameters."""
        if function == "held_out_loss":
            return self._held_out is not None and self._held_out.possible
        return getattr(type(self._objective), function) is not getattr(ModelObjective, function)

    def image_vectors(self, params: Any, images_BxHxWx3: jax.Array, which: Vectors) -> jax.Array:
        """uint8 [B, H, W, 3] -> [B, D]; raises `ConfigError` for a vector that the model doesn't have."""
        if which in ("cls", "mean", "blocks") and not self.offers("image_tokens"):
            raise ConfigError(f"features = {which!r} is for models of images alone; use 'pooled' or 'embedding'")
        with jax.set_mesh(self._mesh):
            return self._vectors(params, images_BxHxWx3, which)

    def image_tokens(self, params: Any, images_BxHxWx3: jax.Array, layers: tuple[int, ...]) -> jax.Array:
        """uint8 [B, H, W, 3] -> [B, N, D]."""
        with jax.set_mesh(self._mesh):
            return self._tokens(params, images_BxHxWx3, layers)

    def layer_vectors(self, params: Any, images_BxHxWx3: jax.Array, normed: bool) -> jax.Array:
        """uint8 [B, H, W, 3] -> [B, L, 2, D]."""
        with jax.set_mesh(self._mesh):
            return self._layers(params, images_BxHxWx3, normed)

    def reconstruct(
        self, params: Any, images_BxHxWx3: jax.Array, index_B: jax.Array, seed: int
    ) -> dict[str, jax.Array]:
        """uint8 [B, H, W, 3] and int32 [B] -> uint8 [B, H, W, 3] by name."""
        with jax.set_mesh(self._mesh):
            return self._reconstruct(params, images_BxHxWx3, example_keys(index_B, seed))

    def held_out_loss(self, params: Any, batches: Iterable[Mapping[str, jax.Array]], seed: int) -> tuple[float, float]:
        """(sum, count) over the usable rows of `loss_batches`."""
        assert self._held_out is not None, "asked for without offering it"
        with jax.set_mesh(self._mesh):
            return self._held_out.loss(params, batches, seed)

    def prompt_batches(self, source: Source) -> EvalBatches:
        """Every record with a question once, in order."""
        return eval_batches(source, _Prompts(self._asking), self.batch_size, self._mesh)

    def answer(
        self, params: Any, batch: Mapping[str, jax.Array], max_new_tokens: int, blank: bool = False
    ) -> jax.Array:
        """Rows of `prompt_batches` -> int32 [B, max_new_tokens]."""
        return self.write(params, self.blanked(batch) if blank else batch, GenerationConfig(max_new_tokens))

    def write(
        self, params: Any, batch: Mapping[str, jax.Array], config: GenerationConfig, seed: int | None = None
    ) -> jax.Array:
        """As `answer`, in any way that `config` says but for its end tokens, which are the model's own.

        Args:
            params: of the model.
            batch: rows of `prompt_batches`.
            config: how.
            seed: of sampling, with a row's `index`; None takes the likeliest tokens.
        """
        config = dataclasses.replace(config, eos_ids=self._asking.end_ids, pad_id=self._asking.pad_id)
        rows = _inputs(batch)
        with jax.set_mesh(self._mesh):
            keys = None if seed is None else example_keys(batch["index"], seed)
            return self._answer(params, rows, config, keys).ids

    def likelihood(self, params: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Of what is learned in rows of `loss_batches`: (sum of its log-probabilities, fp32 [B], and whether each token
        of it is the likeliest, bool [B])."""
        rows = _inputs(batch)
        with jax.set_mesh(self._mesh):
            return self._likelihood(params, rows)

    def answer_rows(self, answers: Sequence[str]) -> np.ndarray:
        """Answers -> int32 [N, L]."""
        asking = self._asking
        assert isinstance(asking, QuestionExamples), "asked for without offering it"
        return asking.answer_rows(answers)

    def rank_answers(
        self,
        params: Any,
        batch: Mapping[str, jax.Array],
        answers_NxL: np.ndarray,
        k: int,
        first_twice: bool,
        blank: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        """Rows of `prompt_batches` and int32 [N, L] -> int32 and fp32 [B, k]."""
        rows = _inputs(self.blanked(batch) if blank else batch)
        with jax.set_mesh(self._mesh):
            return self._rank(params, rows, answers_NxL, k, first_twice)

    def written(self, ids_NxL: np.ndarray) -> list[str]:
        """int32 [N, L] -> N texts."""
        return [self._asking.written(row.tolist()) for row in ids_NxL]

    def spans(self, record: Record) -> list[tuple[str, bool]]:
        """A record as a row of training: texts, and whether they are learned; raises `BadRecord`."""
        return self._asking.spans(record)

    def blanked(self, batch: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
        """The batch with images, or tiles of them, of the mean colour."""
        colour = np.round(255 * np.asarray(self._objective.preprocess.mean)).astype(np.uint8)
        images = {key: np.broadcast_to(colour, batch[key].shape) for key in ("tiles", "image") if key in batch}
        return {**batch, **{key: self.shard(pixels) for key, pixels in images.items()}}

    @property
    def _asking(self) -> ChatExamples | QuestionExamples:
        maker = None if self._held_out is None else self._held_out.make_example
        if not isinstance(maker, ChatExamples | QuestionExamples):
            raise ConfigError("this model reads no questions; take evaluations with questions out of config.evals")
        return maker

    def class_scores(self, params: Any, images_BxHxWx3: jax.Array) -> jax.Array:
        """uint8 [B, H, W, 3] -> [B, C]."""
        with jax.set_mesh(self._mesh):
            return self._classes(params, images_BxHxWx3)

    def pair_class_scores(self, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        """A batch of `loss_batches` -> [B, C]."""
        rows = _inputs(batch)
        with jax.set_mesh(self._mesh):
            return self._pair_classes(params, rows)

    def text_features(self, params: Any, tokens_BxL: jax.Array) -> jax.Array:
        """int32 [B, L] -> [B, E]."""
        with jax.set_mesh(self._mesh):
            return self._text(params, tokens_BxL)

    def prompt_scores(self, params: Any, images_BxHxWx3: jax.Array, tokens_PxL: np.ndarray) -> jax.Array:
        """uint8 [B, H, W, 3] and int32 [P, L] -> [B, P]."""
        with jax.set_mesh(self._mesh):
            return self._scores(params, images_BxHxWx3, tokens_PxL)

    def match_images(self, params: Any, images_BxHxWx3: jax.Array) -> jax.Array:
        """uint8 [B, H, W, 3] -> [B, S, C], whole on every device."""
        with jax.set_mesh(self._mesh):
            return self._match_images(params, images_BxHxWx3)

    def match_texts(self, params: Any, tokens_BxL: jax.Array) -> dict[str, jax.Array]:
        """int32 [B, L] -> [B, ...] each."""
        with jax.set_mesh(self._mesh):
            return self._match_texts(params, tokens_BxL)

    def match_pairs(
        self, params: Any, images_BxSxC: jax.Array, texts: dict[str, jax.Array], pairs_Px2: jax.Array
    ) -> jax.Array:
        """int32 [P, 2] -> [P, 2]."""
        with jax.set_mesh(self._mesh):
            return self._match_pairs(params, images_BxSxC, texts, pairs_Px2)

    def ground_pairs(
        self, params: Any, images_BxSxC: jax.Array, texts: dict[str, jax.Array], pairs_Px2: jax.Array, layer: int
    ) -> jax.Array:
        """int32 [P, 2] -> [P, rows, columns]."""
        with jax.set_mesh(self._mesh):
            return self._ground_pairs(params, images_BxSxC, texts, pairs_Px2, layer)

    @property
    def sees_whole_images(self) -> bool:
        """Whether preprocessing keeps all of an image."""
        return self._objective.preprocess.resize == "squash"

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> int32 [n, L]; raises `ConfigError` for a model without a tokenizer."""
        if self._tokenizer is None:
            raise ConfigError("this model has no tokenizer; take evaluations with texts out of config.evals")
        return self._tokenizer(texts)

    def image_batches(self, source: Source) -> EvalBatches:
        """Every record with a usable image once, in order."""
        return eval_batches(source, _Images(self._views), self.batch_size, self._mesh)

    def labelled_batches(self, source: Source, class_count: int = 0) -> EvalBatches:
        """Every record with a usable image and a label once, in order."""
        rows = MultiLabelImages(self._views, class_count) if class_count else self._labelled
        return eval_batches(source, rows, self.batch_size, self._mesh)

    def loss_batches(self, source: Source, seed: int) -> EvalBatches:
        """Every record that the method can use once, in order."""
        assert self._held_out is not None, "asked for without offering it"
        rows = SeededRows(self._held_out.make_example, seed)
        return eval_batches(Numbered(self._held_out.arrange(source)), rows, self.batch_size, self._mesh)

    def training_batches(
        self, source: Source, augment: AugmentConfig, batch_size: int, seed: int
    ) -> Iterator[Mapping[str, jax.Array]]:
        """Endless batches of random views with labels."""
        rows = LabelledImages(self._image_size, self._objective.preprocess, augment)
        loader = TrainLoader(source, rows, batch_size, seed, self._mesh, 0, DataConfig(bad_record_budget=len(source)))
        with contextlib.closing(loader):
            yield from loader

    def shard(self, array: np.ndarray) -> jax.Array:
        """The same host array on every process -> a global array over the batch axes."""
        return jax.make_array_from_callback(array.shape, self._sharding, lambda index: array[index])

    def replicate(self, array: np.ndarray) -> jax.Array:
        """The same host array on every process -> a global array, whole on every device."""
        return jax.make_array_from_callback(array.shape, replicated(self._mesh), lambda index: array[index])


def _inputs(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """A batch as the model takes it."""
    return {key: value for key, value in batch.items() if key not in MARKS}


def _likelihood(objective: ModelObjective, params: Any, rows: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    logits_BxLxV = objective.outputs(params, rows)["logits"]
    targets_BxL, learned_BxL = next_tokens(rows["text"], rows["segments"], ~rows["supervised"])
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits_BxLxV), targets_BxL[..., None], axis=-1)[..., 0]
    likeliest = (logits_BxLxV.argmax(axis=-1) == targets_BxL) | ~learned_BxL
    return jnp.where(learned_BxL, log_p, 0.0).sum(axis=1), likeliest.all(axis=1)


class _Prompts:
    """Rows of questions."""

    def __init__(self, maker: ChatExamples | QuestionExamples):
        self._maker = maker

    def __call__(self, record: Record, rng: np.random.Generator | None) -> Example:
        return self._maker.prompt(record)


class _Images:
    """Rows of the evaluation view alone."""

    def __init__(self, views: Views):
        self._views = views

    def __call__(self, record: Record, rng: np.random.Generator | None) -> Example:
        return {"image": self._views(record, None)}
