"""A two-tower model small enough to be recomputed by hand, and sources of chosen records."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

LENGTH, WIDTH = 12, 16


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.normal(size=(12, WIDTH)).astype(np.float32),
        "text": rng.normal(size=(LENGTH, 128, WIDTH)).astype(np.float32),
    }


def _normalise(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


@jax.jit
def embed_images(params, images):
    return _normalise((images.reshape(len(images), -1) / 127.5 - 1) @ params["image"])


@functools.partial(jax.jit, static_argnums=2)
def image_vectors(params, images, which):
    """The two vectors differ, and neither has unit length."""
    flat = images.reshape(len(images), -1) / 127.5 - 1
    return flat if which == "pooled" else flat @ params["image"]


@jax.jit
def prompt_scores(params, images, tokens):
    """No cosine: the nearest prompt by distance."""
    texts = params["text"][jnp.arange(LENGTH), tokens].sum(axis=1)
    return -jnp.linalg.norm(image_vectors(params, images, "embedding")[:, None] - texts[None], axis=-1)


@jax.jit
def embed_texts(params, tokens):
    return _normalise(params["text"][jnp.arange(LENGTH), tokens].sum(axis=1))


@jax.jit
def sum_of_letters(params, tokens):
    return params["text"][jnp.arange(LENGTH), tokens].sum(axis=1)


@jax.jit
def match_pairs(params, images, texts, pairs):
    """Scores that follow neither cosine nor distance: of "no" and "yes"."""
    image, text = images[pairs[:, 0], 0], texts["states"][pairs[:, 1]]
    return jnp.stack([jnp.sin(3 * image * text).sum(axis=-1), jnp.cos(2 * image + text).sum(axis=-1)], axis=-1)


class FakeEncoder:
    """Encodes 2 x 2 images and the last characters of texts on a data-parallel mesh."""

    reads_text = joint_space = True

    def __init__(self, device_count=4, batch_size=8, image_features=embed_images, text_features=embed_texts):
        devices = jax.devices()[:device_count]
        self.mesh = jax.make_mesh((device_count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
        self.batch_size = batch_size
        self.image_vectors = image_vectors
        self.prompt_scores = prompt_scores
        self.match_pairs = match_pairs
        self.image_features = image_features
        self.text_features = text_features
        self.tokenized = 0

    @property
    def shards(self):
        return self.mesh.size

    def offers(self, function):
        return function == "match_pairs"

    def match_images(self, params, images):
        return image_vectors(params, images, "embedding")[:, None]

    def match_texts(self, params, tokens):
        return {"states": sum_of_letters(params, tokens)}

    def tokenize(self, texts):
        self.tokenized += len(texts)
        return np.asarray([[ord(c) % 128 for c in text[-LENGTH:].rjust(LENGTH)] for text in texts], np.int32)

    def shard(self, array):
        assert len(array) % self.shards == 0
        sharding = NamedSharding(self.mesh, PartitionSpec("data"))
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def replicate(self, array):
        return jax.make_array_from_callback(
            array.shape, NamedSharding(self.mesh, PartitionSpec()), lambda index: array[index]
        )

    def image_batches(self, source):
        for batch in self.labelled_batches(source):
            batch.pop("label")
            yield batch

    def labelled_batches(self, source, class_count=0):
        for start in range(0, len(source), self.batch_size):
            index = np.arange(start, start + self.batch_size, dtype=np.int32)
            records = [source[min(int(i), len(source) - 1)] for i in index]
            # A padded row repeats the last record: taken for real it would change the result.
            usable = [i < len(source) and not r.get("bad") for i, r in zip(index, records, strict=True)]
            batch = {
                "image": np.stack([record["image"] for record in records]),
                "label": labels(records, class_count),
                "index": index,
                "mask": np.asarray(usable),
            }
            yield {key: self.shard(value) for key, value in batch.items()}


def labels(records, class_count):
    if not class_count:
        return np.asarray([record["label"] for record in records], np.int32)
    return np.asarray([[c in record["label"] for c in range(class_count)] for record in records])


class ListSource:
    """Records in memory."""

    def __init__(self, records, class_names=()):
        self.records, self.class_names = records, tuple(class_names)

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]

    def texts(self, index):
        return self.records[index]["texts"]


def random_records(count, seed=1, captions=(1, 2, 3), classes=7):
    """Records with noise for images, one to three captions and every label."""
    rng = np.random.default_rng(seed)
    return [
        {
            "image": rng.integers(0, 256, (2, 2, 3), np.uint8),
            "texts": tuple("".join(rng.choice(list("abcdefgh"), LENGTH)) for _ in range(captions[i % len(captions)])),
            "label": i % classes,
        }
        for i in range(count)
    ]
