"""What a method tells the rest of the program: its sizes, its rows, its loss, and the features it can be judged by.

The loss seam itself (`Objective`, (sum, count), `embed`, `pair_loss`) is in `vlm_jax.step`.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

from vlm_jax.data.examples import MakeExample
from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.sources import Source
from vlm_jax.data.text import Tokenizer
from vlm_jax.models.generation import Generated, GenerationConfig, Writing
from vlm_jax.schema import Choice, leaves, override
from vlm_jax.step import Objective


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig(Choice):
    """Family of methods."""

    @classmethod
    def kinds(cls) -> Mapping[str, type[Any]]:
        """The methods by name."""
        # Here and not on top: the members' modules import this one.
        from vlm_jax.objectives import (
            aim,
            aimv2,
            albef,
            albef_vqa,
            bag_of_words,
            beit,
            caption,
            classify,
            clip,
            coca,
            dino,
            dvae,
            encoder,
            lm,
            mae,
            mlm,
            pair_classify,
            siglip,
            simmim,
            text_assignment,
            vlm,
        )

        return {
            "clip": clip.ClipConfig,
            "siglip": siglip.SiglipConfig,
            "coca": coca.CoCaConfig,
            "albef": albef.AlbefConfig,
            "albef_vqa": albef_vqa.AlbefVqaConfig,
            "pair_classify": pair_classify.PairClassifyConfig,
            "text_assignment": text_assignment.TextAssignmentConfig,
            "mlm": mlm.MlmConfig,
            "dino": dino.DinoConfig,
            "caption": caption.CaptionConfig,
            "bag_of_words": bag_of_words.BagOfWordsConfig,
            "encoder": encoder.EncoderConfig,
            "mae": mae.MaeConfig,
            "beit": beit.BeitConfig,
            "dvae": dvae.DvaeConfig,
            "simmim": simmim.SimMimConfig,
            "aim": aim.AimConfig,
            "aimv2": aimv2.Aimv2Config,
            "classify": classify.ClassifyConfig,
            "lm": lm.LmConfig,
            "vlm": vlm.VlmConfig,
        }

    @property
    def image_size(self) -> int:
        """Side of the model's square images in pixels."""
        raise TypeError(f"{type(self).__name__} defines no image_size")

    @property
    def reads_text(self) -> bool:
        """Whether the method has a tokenizer; one on images alone has none."""
        return True

    def build(self, preprocess: PreprocessConfig, dtype: Dtype) -> "ModelObjective":
        """The objective; `preprocess` tells the normalisation on the chip, `dtype` is the compute dtype."""
        raise TypeError(f"{type(self).__name__} defines no build")

    def arrange(self, source: Source, tokenizer: Tokenizer | None, data: DataConfig, cache_dir: str) -> Source:
        """The source whose records `make_example` is given: the run's own, or for packed rows one made of it.

        Args:
            source: the run's, or an evaluation's.
            tokenizer: the run's.
            data: how the records are read.
            cache_dir: folder for what is worth keeping between starts.
        """
        return source

    def make_example(self, tokenizer: Tokenizer | None, data: DataConfig) -> MakeExample:
        """What turns a record of the source into a row of a batch; a method that reads text is given a tokenizer."""
        raise TypeError(f"{type(self).__name__} defines no make_example")

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The global batch, for lowering the step without data."""
        raise TypeError(f"{type(self).__name__} defines no batch_shapes")

    def data_problems(self, data: DataConfig) -> Iterator[tuple[str, str]]:
        """Conflicts with the data config: (key relative to the whole config, sentence)."""
        yield from ()

    def check_source(self, source: Source) -> None:
        """Raises `ConfigError` when the source, once it is open, does not fit the method."""

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises `ConfigError` when the tokenizer, once it is built, does not fit the model."""

    def without_dropping(self) -> "ObjectiveConfig":
        """The same method and parameters with nothing dropped, mixed or smoothed at random: its loss as an evaluation.

        What belongs to the task itself, as the choice of the masked patches, stays random.
        """
        rates = {
            key: value for key, value in leaves(self, "") if key.endswith((".drop_path", ".dropout", ".patch_dropout"))
        }
        return override(self, {key.lstrip("."): 0.0 for key, value in rates.items() if value})

    def phases(self, total_steps: int) -> "tuple[tuple[int, ObjectiveConfig], ...]":
        """(first step, method from there on), ascending from step 0, for a run of `total_steps`.

        The phases share parameters and batches; each compiles a step of its own.
        """
        return ((0, self),)

    def train_flops(self) -> float:
        """Model FLOPs of one example's forward and backward pass."""
        raise TypeError(f"{type(self).__name__} defines no train_flops")


class ModelObjective(Objective):
    """An objective around one Flax module, with the features that evaluations ask for.

    Attributes:
        module: the Flax module; `module.apply({"params": params}, ...)`.
        preprocess: its normalisation.
        joint_space: whether features of images and texts may be compared; else `prompt_scores` compares them.
        block_count: blocks of its image tower whose class tokens `layer_vectors` gives; 0 for none.
        class_count: classes that its own head tells apart (`class_scores`); 0 for a method without such a head.
        teacher: the key in `extra` of averaged parameters, a tree like that of the parameters, which are judged in
            their place; None for a method without.
    """

    joint_space: bool = True
    class_count: int = 0
    block_count: int = 0
    teacher: str | None = None

    module: nn.Module
    preprocess: PreprocessConfig

    def judged(self, params: Any, extra: Any) -> Any:
        """The parameters that evaluations, exports and further runs take: those trained, or the teacher's."""
        return params if self.teacher is None else extra[self.teacher]

    def outputs(self, params: Any, batch: Mapping[str, jax.Array], intermediates: bool = True) -> dict[str, jax.Array]:
        """Named outputs of the model on a batch, without anything random."""
        raise TypeError(f"{type(self).__name__} defines no outputs")

    def image_features(self, params: Any, images: jax.Array) -> jax.Array:
        """uint8 or normalised float [B, H, W, 3] -> L2-normalised fp32 [B, E]."""
        raise TypeError(f"{type(self).__name__} has no image features")

    def text_features(self, params: Any, texts: jax.Array) -> jax.Array:
        """int32 [B, L] -> L2-normalised fp32 [B, E]."""
        raise TypeError(f"{type(self).__name__} has no text features")

    def image_vectors(self, params: Any, images: jax.Array, which: str) -> jax.Array:
        """uint8 or normalised float [B, H, W, 3] -> fp32 [B, D], what classifiers on frozen features are trained on.

        Args:
            params: of the model.
            images: the images.
            which: "pooled", before the projection (CLIP's linear probes), or "embedding", after it; not normalised.
                Methods on images alone also give "cls", the class token, "mean", the mean of the patches, and "blocks",
                those means after each block, D = blocks x width.

        Raises:
            ConfigError: the tower has no such vector.
        """
        raise TypeError(f"{type(self).__name__} has no image vectors")

    def image_tokens(self, params: Any, images: jax.Array, layers: tuple[int, ...]) -> jax.Array:
        """uint8 or normalised float [B, H, W, 3] -> fp32 [B, N, D], tokens of the patches for an attentive probe.

        Args:
            params: of the model.
            images: the images.
            layers: blocks, counted from 0, whose outputs are averaged (AIM, El-Nouby et al. 2024, appendix); empty:
                the tokens after the tower's last norm.
        """
        raise TypeError(f"{type(self).__name__} has no image tokens")

    def layer_vectors(self, params: Any, images: jax.Array, normed: bool) -> jax.Array:
        """uint8 or normalised float [B, H, W, 3] -> fp32 [B, L, 2, D]: class token and mean of the patches by block.

        Args:
            params: of the model.
            images: the images.
            normed: whether the tower's last norm is applied to each block's output (DINOv2) or none is (BEiT).
        """
        raise TypeError(f"{type(self).__name__} has no vectors by layer")

    def class_scores(self, params: Any, images: jax.Array) -> jax.Array:
        """uint8 or normalised float [B, H, W, 3] -> fp32 [B, C], a score a class; the higher, the likelier."""
        raise TypeError(f"{type(self).__name__} has no classes of its own")

    def pair_class_scores(self, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        """As `class_scores`, of a batch of the method's rows, where texts beside images have the classes."""
        raise TypeError(f"{type(self).__name__} has no classes of texts and images")

    def reconstruct(self, params: Any, images: jax.Array, keys: jax.Array) -> dict[str, jax.Array]:
        """What the method makes of the pixels that it hides, as pictures.

        Args:
            params: of the model.
            images: uint8 or normalised float [B, H, W, 3].
            keys: [B] typed keys, one a row: they choose what is hidden, as in training.

        Returns:
            uint8 [B, H, W, 3] by name: "masked", the image with what is hidden in grey, and "prediction", the image
            with the prediction in the hidden places. A prediction of normalised patches is scaled back by the mean
            and the deviation of the true patch.
        """
        raise TypeError(f"{type(self).__name__} predicts no pixels")

    def continue_texts(
        self,
        params: Any,
        ids_BxT: jax.Array,
        valid_BxT: jax.Array,
        config: GenerationConfig,
        keys: jax.Array | None = None,
    ) -> Generated:
        """What follows texts, by a method whose model writes; arguments as of `vlm_jax.models.generation.generate`."""
        raise TypeError(f"{type(self).__name__} continues no texts")

    def answer(
        self, params: Any, batch: Mapping[str, jax.Array], config: GenerationConfig, keys: jax.Array | None = None
    ) -> Generated:
        """What follows rows of conversations (`vlm_jax.data.chat_examples`) that end where an answer begins.

        Args:
            params: of the model.
            batch: the rows.
            config: how it is written.
            keys: [B] typed keys, one a row: tokens are sampled. None takes the likeliest.
        """
        raise TypeError(f"{type(self).__name__} answers no questions")

    def begin_writing(self, params: Any, batch: Mapping[str, jax.Array], config: GenerationConfig) -> Writing:
        """Reads the rows of `answer`, or of a language model those of texts (`text`, `segments`), to be written on."""
        raise TypeError(f"{type(self).__name__} writes no text")

    def write_on(
        self, params: Any, writing: Writing, config: GenerationConfig, keys: jax.Array | None = None
    ) -> Writing:
        """One token more of each row that `begin_writing` read: together they write what `answer` does."""
        raise TypeError(f"{type(self).__name__} writes no text")

    def rank_answers(
        self, params: Any, batch: Mapping[str, jax.Array], answers_NxL: jax.Array, k: int, first_twice: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Which of some answers fit questions best.

        Args:
            params: of the model.
            batch: rows of questions, as of `answer`.
            answers_NxL: int32, start token, answer, end token, and padding.
            k: so many answers whose first token is the likeliest are read to their end.
            first_twice: whether the likelihood of the first token counts once more, as in ALBEF's published code.

        Returns:
            (places in the list int32 [B, k], the best first; log of their shares fp32 [B, k], by a softmax over the k).
        """
        raise TypeError(f"{type(self).__name__} ranks no answers")

    def match_images(self, params: Any, images: jax.Array) -> jax.Array:
        """uint8 or normalised float [B, H, W, 3] -> what `match_pairs` takes of images, [B, S, C]."""
        raise TypeError(f"{type(self).__name__} tells of no pair whether it belongs together")

    def match_texts(self, params: Any, texts: jax.Array) -> dict[str, jax.Array]:
        """int32 [B, L] -> what `match_pairs` takes of texts, each [B, ...]."""
        raise TypeError(f"{type(self).__name__} tells of no pair whether it belongs together")

    def match_pairs(
        self, params: Any, images_BxSxC: jax.Array, texts: dict[str, jax.Array], pairs_Px2: jax.Array
    ) -> jax.Array:
        """int32 [P, 2], pairs of (row of the images, row of the texts) -> fp32 [P, 2]: scores of "no" and "yes"."""
        raise TypeError(f"{type(self).__name__} tells of no pair whether it belongs together")

    def ground_pairs(
        self, params: Any, images_BxSxC: jax.Array, texts: dict[str, jax.Array], pairs_Px2: jax.Array, layer: int
    ) -> jax.Array:
        """As `match_pairs`, but on which patches of the image "yes" rests, fp32 [P, rows, columns].

        `layer` is the one whose look at the image is asked, counted from 1 among those that have one.
        """
        raise TypeError(f"{type(self).__name__} tells of no pair whether it belongs together")

    def prompt_scores(self, params: Any, images: jax.Array, texts: jax.Array) -> jax.Array:
        """uint8 images [B, H, W, 3] and int32 texts [P, L] -> fp32 [B, P]; the higher, the better they match."""
        raise TypeError(f"{type(self).__name__} compares images and texts by their features")


def normalise_images(images: jax.Array, preprocess: PreprocessConfig) -> jax.Array:
    """uint8 [..., H, W, 3] -> (x / 255 - mean) / std in fp32; float images are taken as normalised already."""
    if not jnp.issubdtype(images.dtype, jnp.integer):
        return images
    shape = (*[1] * (images.ndim - 1), 3)
    mean, std = (jnp.asarray(values, jnp.float32).reshape(shape) for values in (preprocess.mean, preprocess.std))
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def denormalise_images(images: jax.Array, preprocess: PreprocessConfig) -> jax.Array:
    """The inverse of `normalise_images`: float [B, H, W, 3] -> uint8, rounded, and cut to 0..255; uint8 is kept."""
    if jnp.issubdtype(images.dtype, jnp.integer):
        return images
    mean, std = (jnp.asarray(values, jnp.float32).reshape(1, 1, 1, 3) for values in (preprocess.mean, preprocess.std))
    pixels = (images.astype(jnp.float32) * std + mean) * 255.0
    return jnp.clip(jnp.round(pixels), 0, 255).astype(jnp.uint8)
