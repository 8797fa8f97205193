"""A two-tower model small enough to be recomputed by hand, and sources of chosen records."""

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


@jax.jit
def embed_texts(params, tokens):
    return _normalise(params["text"][jnp.arange(LENGTH), tokens].sum(axis=1))


class FakeEncoder:
    """Encodes 2 x 2 images and the last characters of texts on a data-parallel mesh."""

    def __init__(self, device_count=4, batch_size=8, image_features=embed_images, text_features=embed_texts):
        devices = jax.devices()[:device_count]
        self.mesh = jax.make_mesh((device_count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
        self.batch_size = batch_size
        self.image_features = image_features
        self.text_features = text_features
        self.tokenized = 0

    def tokenize(self, texts):
        self.tokenized += len(texts)
        return np.asarray([[ord(c) % 128 for c in text[-LENGTH:].rjust(LENGTH)] for text in texts], np.int32)

    def shard(self, array):
        assert len(array) == self.batch_size
        sharding = NamedSharding(self.mesh, PartitionSpec("data"))
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def image_batches(self, source):
        for batch in self.labelled_batches(source):
            batch.pop("label")
            yield batch

    def labelled_batches(self, source):
        for start in range(0, len(source), self.batch_size):
            index = np.arange(start, start + self.batch_size, dtype=np.int32)
            records = [source[min(int(i), len(source) - 1)] for i in index]
            # A padded row repeats the last record: taken for real it would change the result.
            usable = [i < len(source) and not r.get("bad") for i, r in zip(index, records, strict=True)]
            batch = {
                "image": np.stack([record["image"] for record in records]),
                "label": np.asarray([record["label"] for record in records], np.int32),
                "index": index,
                "mask": np.asarray(usable),
            }
            yield {key: self.shard(value) for key, value in batch.items()}


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
