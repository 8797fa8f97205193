"""What the probes that are trained step by step share: their images, the choice among a grid, and their metrics.

The probes are `sgd_probe` (linear) and `attentive_probe`; the training itself is `probe_training`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from vlm_jax.data.images import AugmentConfig
from vlm_jax.data.sources import Record, Source
from vlm_jax.evals.base import Encoder, EvalError, EvalResult
from vlm_jax.evals.classification import check_labels, single_label_metrics
from vlm_jax.evals.features import gather
from vlm_jax.evals.frozen import Sources, TransferConfig
from vlm_jax.evals.probe_training import Features, Probe, ProbeTraining, States, grid_ranks, train_probes
from vlm_jax.schema import ConfigError


@dataclasses.dataclass(frozen=True)
class TrainedProbeConfig(TransferConfig):
    """Family of the probes that are trained step by step; `source` is what they are tested on."""

    # The grid and its training.
    training: ProbeTraining = ProbeTraining()
    # Random views of the training images, for which the tower runs in every epoch; None: the evaluation view, whose
    # features are computed once and kept in the memory of every host.
    augment: AugmentConfig | None = None
    # Share of the training images on which the member of the grid is chosen; 0: they are all trained on and the best
    # on `source` is reported, as the papers do.
    validation_share: float = 0.1
    # Of the split, the order of the images and the first weights.
    seed: int = 0

    def problems(self) -> Iterator[tuple[str, str]]:
        """What is impossible in these keys."""
        yield from super().problems()
        if not 0 <= self.validation_share < 1:
            yield "validation_share", f"= {self.validation_share} must lie in [0, 1)"

    def open_named_sources(self, cache_dir: str) -> Sources:
        """Both sources; raises `ConfigError` as `open_sources`, and where they don't name their classes."""
        sources = self.open_sources(cache_dir)
        if not sources.class_names:
            raise ConfigError(
                f"Evaluation {self.name!r} ({self.kind()}) needs a source that names its classes; its sources don't."
            )
        return sources


class Chosen(NamedTuple):
    """The member of a grid with the best score, and what it is.

    Attributes:
        score: top-1 on the images that it was chosen by.
        metrics: on the test images.
        learning_rate: peak of its learning rate.
        weight_decay: its weight decay.
    """

    score: float
    metrics: dict[str, float]
    learning_rate: float
    weight_decay: float


class TrainedProbeEvaluator:
    """Trains probes on one source and tests them on another.

    Args:
        config: the evaluation.
        encoder: its images are read through it.
        sources: what the config opened.
        features: (params, images) -> arrays [B, ...] by name.
        probes: what is trained on them, by name.
    """

    def __init__(
        self,
        config: TrainedProbeConfig,
        encoder: Encoder,
        sources: Sources,
        features: Callable[[Any, jax.Array], Features],
        probes: Mapping[str, Probe],
    ):
        self._config, self._encoder, self._sources = config, encoder, sources
        self._features, self._probes = features, dict(probes)
        self._classes = len(sources.class_names)

    def run(self, params: Any, step: int) -> EvalResult:
        """Trains, chooses and tests.

        Raises:
            EvalError: no usable record, or too few of them to split, or labels out of range.
        """
        del step  # Draws no picture.
        config = self._config
        train, validation = self._split()
        states, examples = self._train(params, train)
        test = self._ranks(params, self._sources.test, states)
        chosen_by = test if validation is None else self._ranks(params, validation, states)
        found = {name: self._choose(name, chosen_by, test, examples) for name in self._probes}
        best = max(found.values(), key=lambda chosen: chosen.score)
        metrics = best.metrics | {
            "learning_rate": best.learning_rate,
            "weight_decay": best.weight_decay,
            "train_examples": float(examples.total),
        }
        if validation is not None:
            metrics["validation"] = best.score
        if len(found) > 1:
            metrics |= {f"{name}_top1": chosen.metrics["top1"] for name, chosen in found.items()}
        return EvalResult({f"{config.kind()}/{config.name}/{key}": value for key, value in metrics.items()})

    def _split(self) -> tuple[Source, Source | None]:
        """(to train on, to choose by): a function of the place in the source, so a bad record moves no other one."""
        config, source = self._config, self._sources.train
        if not config.validation_share:
            return source, None
        order = np.random.default_rng(config.seed).permutation(len(source))
        count = round(config.validation_share * len(source))
        if not 0 < count < len(source):
            raise EvalError(
                f"Evaluation {config.name!r} can't split its {len(source)} training images for the choice of the "
                "learning rate; change validation_share."
            )
        return ChosenRecords(source, np.sort(order[count:])), ChosenRecords(source, np.sort(order[:count]))

    def _train(self, params: Any, source: Source) -> "tuple[States, Examples]":
        config, encoder = self._config, self._encoder
        if config.augment is None:
            rows = self._gathered(params, source)
            check_labels(rows["label"], rows["index"], self._classes, config.name)
            examples = Examples.of(len(rows["label"]), config.training.batch_size, encoder.shards)
            batches = self._kept(rows, examples)
        else:
            examples = Examples.of(len(source), config.training.batch_size, encoder.shards)
            views = encoder.training_batches(source, config.augment, examples.batch, config.seed)
            batches = ((self._features(params, batch["image"]), batch["label"]) for batch in views)
        states = train_probes(
            self._probes, config.training, batches, examples.steps, examples.batch, self._classes, config.seed
        )
        return states, examples

    def _kept(self, rows: Mapping[str, np.ndarray], examples: "Examples") -> Iterator[tuple[Features, jax.Array]]:
        """Batches of stored features: epochs in an order of (seed, epoch)."""
        shard = self._encoder.shard
        stored = {name: rows[name] for name in rows if name not in ("label", "index")}
        for epoch in range(self._config.training.epochs):
            order = np.random.default_rng((self._config.seed, epoch)).permutation(examples.total)
            for start in range(0, examples.steps * examples.batch, examples.batch):
                chosen = order[start : start + examples.batch]
                yield {name: shard(array[chosen]) for name, array in stored.items()}, shard(rows["label"][chosen])

    def _gathered(self, params: Any, source: Source, ranks: States | None = None) -> dict[str, np.ndarray]:
        """Rows of a source on every host: features, or with `ranks` what the probes make of them; label and index."""

        def row(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
            features = self._features(params, batch["image"])
            wanted = dict(features)
            if ranks is not None:
                wanted = {
                    name: grid_ranks(ranks[name], probe.select(features), batch["label"], probe.head)
                    for name, probe in self._probes.items()
                }
            return wanted | {key: batch[key] for key in ("label", "index", "mask")}

        return gather(
            (row(batch) for batch in self._encoder.labelled_batches(source)),
            f"Evaluation {self._config.name!r} found no image with a label among {len(source)} records; the log above "
            "says why.",
        )

    def _ranks(self, params: Any, source: Source, states: States) -> dict[str, np.ndarray]:
        rows = self._gathered(params, source, states)
        check_labels(rows["label"], rows["index"], self._classes, self._config.name)
        return rows

    def _choose(
        self, name: str, chosen_by: Mapping[str, np.ndarray], test: Mapping[str, np.ndarray], examples: "Examples"
    ) -> Chosen:
        """The member of a probe's grid with the best top-1; of equal ones the first."""
        grid = self._config.training.grid(examples.batch)
        scores_G = np.mean(chosen_by[name] < 1, axis=0)
        member = int(np.argmax(scores_G))
        metrics = single_label_metrics(test["label"], test[name][:, member], self._classes)
        return Chosen(
            float(scores_G[member]), metrics, float(grid.learning_rate[member]), float(grid.weight_decay[member])
        )


class Examples(NamedTuple):
    """How many training images there are, and how they are taken: (total, rows of a batch, steps of an epoch)."""

    total: int
    batch: int
    steps: int

    @classmethod
    def of(cls, total: int, batch_size: int, shards: int) -> "Examples":
        """The batch cut to the images and to a multiple of the devices; the rest of an epoch is left out."""
        batch = min(batch_size, total) // shards * shards
        if not batch:
            raise EvalError(f"a probe needs at least one training image a device, and {shards} devices share {total}")
        return cls(total, batch, total // batch)


class ChosenRecords:
    """Some records of a source, as a source."""

    def __init__(self, source: Source, index: np.ndarray):
        self._source, self._index = source, index
        self.class_names = source.class_names

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Record:
        return self._source[int(self._index[index])]

    def texts(self, index: int) -> tuple[str, ...]:
        """The captions of one record."""
        return self._source.texts(int(self._index[index]))


__all__ = ["TrainedProbeConfig", "TrainedProbeEvaluator"]
