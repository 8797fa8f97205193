"""DINOv2: a student learns from an averaged teacher what views of an image have in common (Oquab et al. 2024).

Three losses on one model: DINO on class tokens of small and large views, iBOT on masked patches, KoLeo to spread out.
The recipe is that of the published code (train/vitl14.yaml).
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.multi_crop import GLOBAL_VIEWS, BlockMaskConfig, MultiCropConfig, MultiCropExamples
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.text import Tokenizer
from vlm_jax.flops import TRAIN_OVER_FORWARD
from vlm_jax.losses.dino import centred_softmax, cross_entropy, koleo, mean_logits, sinkhorn_knopp
from vlm_jax.mesh import constrain, unbox
from vlm_jax.models.dino import DinoModel, DinoModelConfig
from vlm_jax.models.image_tower import ImageTowerConfig
from vlm_jax.objectives.base import normalise_images
from vlm_jax.objectives.images import ImageObjective, ImagesConfig
from vlm_jax.step import Aux, Batch, Ratio


@dataclasses.dataclass(frozen=True)
class DinoConfig(ImagesConfig):
    """Self-distillation between views."""

    model: DinoModelConfig = DinoModelConfig()  # tower and heads, of student and teacher alike
    views: MultiCropConfig = MultiCropConfig()  # random views of an image
    masks: BlockMaskConfig = BlockMaskConfig()  # patches that the student does not see
    # what keeps the teacher from giving every image one prototype: equal shares over the global batch, or a running
    # mean that is subtracted
    centring: Literal["sinkhorn", "mean"] = "sinkhorn"
    sinkhorn_iterations: int = 3
    centre_momentum: float = 0.9  # of that running mean
    student_temperature: float = 0.1
    teacher_temperature: float = 0.07  # after a linear rise from the next one
    first_teacher_temperature: float = 0.04
    teacher_temperature_steps: int = 37_500  # length of the rise
    momentum: float = 0.994  # of the teacher at the start; half a cosine brings it to the next one at the end
    final_momentum: float = 1.0
    momentum_steps: int = 0  # length of that half cosine; 0: the run
    dino_weight: float = 1.0  # of the loss on class tokens
    ibot_weight: float = 1.0  # of the loss on masked patches
    koleo_weight: float = 0.1  # of the loss on the nearest neighbour in the batch

    @property
    def image_tower(self) -> ImageTowerConfig:
        """See the base."""
        return self.model.image

    @property
    def slots(self) -> int:
        """How many masked patches an image can have."""
        return self.masks.slots(self.model.image.patches)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Views and schedules that can't be."""
        yield from super().problems()
        if self.views.local_size % self.model.image.patch_size:
            yield (
                "views.local_size",
                f"= {self.views.local_size} must be a multiple of model.image.patch_size = "
                f"{self.model.image.patch_size}",
            )
        if self.slots < 1:
            yield "masks.share", f"= {self.masks.share} masks none of {self.model.image.patches} patches; raise it"
        for key in ("student_temperature", "teacher_temperature", "first_teacher_temperature"):
            if getattr(self, key) <= 0:
                yield key, f"= {getattr(self, key)} must be positive"
        for key in ("momentum", "final_momentum", "centre_momentum"):
            if not 0 <= getattr(self, key) <= 1:
                yield key, f"= {getattr(self, key)} must lie in [0, 1]"
        for key in ("momentum_steps", "teacher_temperature_steps"):
            if getattr(self, key) < 0:
                yield key, f"= {getattr(self, key)} must not be negative"
        if self.sinkhorn_iterations < 1:
            yield "sinkhorn_iterations", f"= {self.sinkhorn_iterations} must be at least 1"

    def data_problems(self, data: DataConfig) -> Iterator[tuple[str, str]]:
        """An augmentation that nothing would read."""
        if data.augment is not None:
            yield "data.augment", "has no effect here: objective.views makes the views; set it to None"

    def phases(self, total_steps: int) -> "tuple[tuple[int, DinoConfig], ...]":
        """One, which knows how long the momentum rises."""
        return ((0, dataclasses.replace(self, momentum_steps=self.momentum_steps or total_steps)),)

    def make_example(self, tokenizer: Tokenizer | None, data: DataConfig) -> MultiCropExamples:
        """The views of an image, and its masked patches."""
        return MultiCropExamples(self.image_size, self.model.image.grid, self.views, self.masks, data.preprocess)

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """`global_views` uint8 [B, 2, H, W, 3], `local_views` uint8 [B, L, h, w, 3], `masked` int32 [B, S]."""
        large = (batch_size, GLOBAL_VIEWS, self.image_size, self.image_size, 3)
        small = (batch_size, self.views.local_views, self.views.local_size, self.views.local_size, 3)
        return {
            "global_views": jax.ShapeDtypeStruct(large, jnp.uint8),
            "local_views": jax.ShapeDtypeStruct(small, jnp.uint8),
            "masked": jax.ShapeDtypeStruct((batch_size, self.slots), jnp.int32),
        }

    def forward_flops(self) -> tuple[int, int]:
        """Model FLOPs of one image's forward pass through (student, teacher)."""
        image, local = self.model.image, self.views.local_views
        small = dataclasses.replace(image, image_size=self.views.local_size)
        dino, ibot = (head.forward_flops(image.width) for head in (self.model.dino_head, self.model.ibot_head))
        teacher = GLOBAL_VIEWS * (image.forward_flops(0) + dino) + self.slots * ibot
        return teacher + local * (small.forward_flops(0) + dino), teacher

    def train_flops(self) -> float:
        """Three times the student's forward pass, once the teacher's."""
        student, teacher = self.forward_flops()
        return float(TRAIN_OVER_FORWARD * student + teacher)

    def build(self, preprocess: PreprocessConfig, dtype: Dtype) -> "Dino":
        """See the base."""
        return Dino(self, preprocess, dtype)


class Dino(ImageObjective):
    """See `DinoConfig`. `extra` holds "teacher", and with a running mean "centre" of both heads' scores.

    Teacher scores and nearest neighbours couple the rows of a batch, so the loss is in two parts: points on the heads'
    spheres for each image by itself, then prototypes and losses for all.
    """

    coupled = True
    teacher = "teacher"

    def __init__(self, config: DinoConfig, preprocess: PreprocessConfig, dtype: Dtype):
        super().__init__(config, DinoModel(config.model, dtype), preprocess, dtype)
        self.config = config

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Parameters, and a teacher that starts as the student."""
        side, model = self.config.image_size, self.config.model
        params = self.module.init(key, jnp.zeros((1, side, side, 3)))["params"]
        heads = {"dino": model.dino_head, "ibot": model.ibot_head}
        centre = {name: jnp.zeros(head.prototypes) for name, head in heads.items()}
        extra = {} if self.config.centring == "sinkhorn" else {"centre": centre}
        return params, self.begin(extra, unbox(params))

    def begin(self, extra: Any, params: Any) -> Any:
        """The teacher is the student; a copy, for the step donates both."""
        return extra | {"teacher": jax.tree.map(jnp.copy, params)}

    def embed(self, params: Any, extra: Any, batch: Batch, keys: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
        """What student and teacher make of each image's views.

        Returns:
            Points on the heads' spheres, "student_global" [B, 2, E], "student_local" [B, L, E], "student_patches"
            [B, S, E'], and the teacher's "teacher_global" and "teacher_patches"; "class_tokens" [B, 2, D] of the
            student; "weights" [B, S] fp32 of the masked patches, 1 over those of the same view, 0 for padding.
        """
        patches, masked_BxS = self.config.model.image.patches, batch["masked"]
        places_BxM = jnp.arange(GLOBAL_VIEWS * patches)
        hit_BxSxM = masked_BxS[:, :, None] == places_BxM[None, None]
        masked_BxVxN = hit_BxSxM.any(axis=1).reshape(-1, GLOBAL_VIEWS, patches)
        counts_BxV = masked_BxVxN.sum(axis=-1)
        view_BxS = jnp.maximum(masked_BxS, 0) // patches
        weights_BxS = jnp.where(masked_BxS < 0, 0.0, 1 / jnp.maximum(jnp.take_along_axis(counts_BxV, view_BxS, 1), 1))
        large, small = (_views(batch[name]) for name in ("global_views", "local_views"))
        student = self._points(params, large, _view_keys(keys, 0, GLOBAL_VIEWS), masked_BxVxN, masked_BxS)
        teacher = jax.lax.stop_gradient(self._points(extra["teacher"], large, None, None, masked_BxS))
        small_keys = _view_keys(keys, GLOBAL_VIEWS, self.config.views.local_views)
        tokens = self._apply(params, "class_tokens", normalise_images(small, self.preprocess), small_keys)
        local = self._apply(params, "project", "dino", tokens)
        return {
            "student_global": student["points"],
            "student_local": _by_row(local, masked_BxS.shape[0]),
            "student_patches": student["patches"],
            "class_tokens": student["class_tokens"],
            "teacher_global": teacher["points"],
            "teacher_patches": teacher["patches"],
            "weights": weights_BxS,
        }

    def _points(
        self,
        params: Any,
        images_RxHxWxC: jax.Array,
        keys: jax.Array | None,
        masked_BxVxN: jax.Array | None,
        chosen_BxS: jax.Array,
    ) -> dict[str, jax.Array]:
        """Class tokens of the global views, their points, and the points of the chosen patches."""
        rows, slots = chosen_BxS.shape
        masked_RxN = None if masked_BxVxN is None else masked_BxVxN.reshape(-1, masked_BxVxN.shape[-1])
        images = normalise_images(images_RxHxWxC, self.preprocess)
        class_RxD, patches_RxNxD = self._apply(params, "tokens", images, keys, masked_RxN)
        patches_BxMxD = constrain(_by_row(patches_RxNxD, rows, merge=2), "batch", None, "embed")
        chosen_BxSxD = jnp.take_along_axis(patches_BxMxD, jnp.maximum(chosen_BxS, 0)[:, :, None], axis=1)
        chosen = constrain(chosen_BxSxD, "batch", None, "embed").reshape(rows * slots, -1)
        return {
            "class_tokens": _by_row(class_RxD, rows),
            "points": _by_row(self._apply(params, "project", "dino", class_RxD), rows),
            "patches": _by_row(self._apply(params, "project", "ibot", chosen), rows),
        }

    def pair_loss(self, params: Any, extra: Any, embeddings: Any, step: jax.Array) -> tuple[Ratio, Aux]:
        """The three losses over the global batch, their weighted sum a mean over images (published: ssl_meta_arch)."""
        config = self.config
        rows, local = embeddings["student_local"].shape[:2]
        weights_BxS = jax.lax.stop_gradient(embeddings["weights"])
        targets_BxVxK, dino_mean = self._targets(extra, embeddings["teacher_global"], "dino", step, None)
        targets_BxSxK, ibot_mean = self._targets(extra, embeddings["teacher_patches"], "ibot", step, weights_BxS)

        def entropy(name: str, head: str, targets: jax.Array) -> jax.Array:
            scores = self._scores(params, head, embeddings[name])
            return cross_entropy(scores, targets, config.student_temperature)

        pairs = GLOBAL_VIEWS * (GLOBAL_VIEWS - 1) + GLOBAL_VIEWS * local
        # Every local view is held to both global ones, a global view to the other one.
        local_loss = entropy("student_local", "dino", targets_BxVxK.sum(axis=1, keepdims=True)).sum() / pairs
        global_loss = entropy("student_global", "dino", targets_BxVxK[:, ::-1]).sum() / pairs
        ibot = (entropy("student_patches", "ibot", targets_BxSxK) * weights_BxS).sum() / GLOBAL_VIEWS
        # Among the views of one kind: the two of one image shall not repel each other.
        spread = sum(koleo(embeddings["class_tokens"][:, view]).sum() for view in range(GLOBAL_VIEWS))
        total = config.dino_weight * (local_loss + global_loss) + config.ibot_weight * ibot
        total = total + config.koleo_weight * spread
        count = jnp.asarray(rows, jnp.float32)
        sums = {"dino_local": local_loss, "dino_global": global_loss, "ibot": ibot, "koleo": spread}
        metrics = {f"{name}_loss": (jnp.asarray(value), count) for name, value in sums.items()}
        one = jnp.ones(())
        metrics["teacher_momentum"] = (self._momentum(step), one)
        metrics["teacher_temperature"] = (self._temperature(step), one)
        return (total, count), Aux(metrics, {"centre": {"dino": dino_mean, "ibot": ibot_mean}})

    def _targets(
        self, extra: Any, points_BxVxE: jax.Array, head: str, step: jax.Array, weights_BxV: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """The teacher's distributions [B, V, K] over prototypes, and the mean of its scores [K]; no gradient."""
        scores = jax.lax.stop_gradient(self._scores(extra["teacher"], head, points_BxVxE))
        flat_RxK = constrain(scores.reshape(-1, scores.shape[-1]), "batch", "vocab")
        counts_R = None if weights_BxV is None else (weights_BxV.reshape(-1) > 0).astype(jnp.float32)
        if self.config.centring == "sinkhorn":
            targets = sinkhorn_knopp(flat_RxK, self._temperature(step), counts_R, self.config.sinkhorn_iterations)
        else:
            targets = centred_softmax(flat_RxK, extra["centre"][head], self._temperature(step))
        return targets.reshape(scores.shape), mean_logits(flat_RxK, counts_R)

    def after(self, extra: Any, params: Any, updates: Any, step: jax.Array) -> Any:
        """The teacher a little nearer to the student, and the centre to the mean of this batch."""
        keep = self._momentum(step)
        new = {"teacher": jax.tree.map(lambda old, now: old * keep + now * (1 - keep), extra["teacher"], params)}
        if "centre" in extra:
            keep = self.config.centre_momentum
            means = updates["centre"]
            new["centre"] = jax.tree.map(lambda old, now: old * keep + now * (1 - keep), extra["centre"], means)
        return new

    def _momentum(self, step: jax.Array) -> jax.Array:
        """() fp32."""
        first, last = self.config.momentum, self.config.final_momentum
        progress = jnp.clip(step.astype(jnp.float32) / max(self.config.momentum_steps, 1), 0.0, 1.0)
        return last + (first - last) * 0.5 * (1 + jnp.cos(math.pi * progress))

    def _temperature(self, step: jax.Array) -> jax.Array:
        """() fp32."""
        first, last = self.config.first_teacher_temperature, self.config.teacher_temperature
        # The last of the steps of the rise has its end; without a rise, it is over before the first step.
        rise = self.config.teacher_temperature_steps - 1
        progress = jnp.clip((step + (rise < 1)).astype(jnp.float32) / max(rise, 1), 0.0, 1.0)
        return first + (last - first) * progress

    def _scores(self, params: Any, head: str, points_BxVxE: jax.Array) -> jax.Array:
        """Points [B, V, E] -> scores of the prototypes, fp32 [B, V, K]."""
        rows = points_BxVxE.shape[0]
        return _by_row(self._apply(params, "score", head, points_BxVxE.reshape(-1, points_BxVxE.shape[-1])), rows)

    def _apply(self, params: Any, method: str, *arguments: Any) -> Any:
        return self.module.apply({"params": params}, *arguments, method=method)


def _views(images_BxVxHxWxC: jax.Array) -> jax.Array:
    """[B, V, H, W, C] -> [B V, H, W, C], all views of an image next to each other and on its device."""
    return images_BxVxHxWxC.reshape(-1, *images_BxVxHxWxC.shape[2:])


def _by_row(x: jax.Array, rows: int, merge: int = 1) -> jax.Array:
    """The inverse of `_views` for [B V, ...]; with `merge` 2 the axis after it is joined: [B, V N, ...]."""
    return x.reshape(rows, -1, *x.shape[merge:])


def _view_keys(keys_B: jax.Array, first: int, count: int) -> jax.Array:
    """[B] keys -> [B count] for the views numbered from `first`."""
    numbers = jnp.arange(first, first + count)
    each = jax.vmap(lambda key: jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers))(keys_B)
    return each.reshape(-1)


__all__ = ["Dino", "DinoConfig"]
