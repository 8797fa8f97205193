"""Digests against a reference in numpy that loops over words, on every mesh and dtype, and under damage."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vlm_jax.digest import flatten_paths, tree_digest

MASK = 2**32 - 1


def murmur_finaliser(h: int) -> int:
    h = (h ^ (h >> 16)) * 0x85EBCA6B & MASK
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & MASK
    return h ^ (h >> 16)


def reference(array: np.ndarray) -> str:
    words = np.ascontiguousarray(array).reshape(-1)
    words = words.view({1: np.uint8, 2: np.uint16}.get(array.itemsize, np.uint32)).tolist()
    sums = [
        sum(murmur_finaliser(word ^ murmur_finaliser(position ^ salt)) for position, word in enumerate(words)) & MASK
        for salt in (0x243F6A88, 0x85A308D3)
    ]
    return "".join(f"{s:08x}" for s in sums)


DTYPES = [
    np.float32,
    np.int32,
    np.uint32,
    np.float16,
    ml_dtypes.bfloat16,
    np.int8,
    np.uint8,
    np.bool_,
    np.complex64,
    ml_dtypes.float8_e4m3fn,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("shape", [(), (7,), (4, 3, 5), (0, 3)])
def test_equals_the_reference(dtype, shape):
    array = (np.random.default_rng(0).normal(size=shape) * 50).astype(dtype)
    assert tree_digest({"x": jnp.asarray(array)}) == {"x": reference(array)}


def test_the_finaliser_is_the_published_one():
    # MurmurHash3's fmix32, values from its reference implementation in C.
    assert [murmur_finaliser(h) for h in (0, 1, 2, 0xFFFFFFFF)] == [0, 0x514E28B7, 0x30F4C306, 0x81F16F39]


def test_the_mesh_does_not_matter():
    array = np.random.default_rng(1).normal(size=(8, 12)).astype(np.float32)
    digests = set()
    for sizes, spec in (
        ((1, 1), P()),
        ((8, 1), P("a")),
        ((2, 4), P("a", "b")),
        ((2, 4), P("b")),
        ((4, 2), P(None, "b")),
    ):
        devices = jax.devices()[: sizes[0] * sizes[1]]
        mesh = jax.make_mesh(sizes, ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=devices)
        digests.add(tree_digest({"x": jax.device_put(array, NamedSharding(mesh, spec))})["x"])
    assert digests == {reference(array)}


def test_sums_over_chunks_compose():
    """A chunk's contribution is that of the array with the words of the other chunks left out of the sum."""
    array = np.arange(12, dtype=np.uint32)
    whole = reference(array)
    first = [int(reference(array[:5])[i : i + 8], 16) for i in (0, 8)]
    rest = [
        sum(murmur_finaliser(int(w) ^ murmur_finaliser(p ^ s)) for p, w in enumerate(array) if p >= 5) & MASK
        for s in (0x243F6A88, 0x85A308D3)
    ]
    assert whole == "".join(f"{(a + b) & MASK:08x}" for a, b in zip(first, rest, strict=True))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8])
def test_no_flipped_bit_is_silent(dtype):
    rng = np.random.default_rng(2)
    array = (rng.normal(size=(16, 16)) * 10).astype(dtype)
    good = tree_digest({"x": array})["x"]
    silent = 0
    for bit in rng.choice(array.nbytes * 8, size=1000, replace=False):
        raw = bytearray(array.tobytes())
        raw[bit // 8] ^= 1 << (bit % 8)
        silent += tree_digest({"x": np.frombuffer(bytes(raw), dtype).reshape(array.shape)})["x"] == good
    assert silent == 0


def test_signed_zero_nan_payloads_and_swaps_are_seen():
    quiet = np.array([0x7FC00000, 0], np.uint32).view(np.float32)
    payload = np.array([0x7FC00001, 0], np.uint32).view(np.float32)
    minus = np.array([0x7FC00000, 0x80000000], np.uint32).view(np.float32)
    assert len(set(tree_digest({"a": quiet, "b": payload, "c": minus}).values())) == 3
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    assert len(set(tree_digest({"a": rows, "b": rows[[1, 0, 2, 3]], "c": rows[:, [1, 0, 2]]}).values())) == 3


def test_paths_and_ambiguous_paths():
    tree = {"b": [jnp.zeros(1), {"c": jnp.ones(2)}], "a": (), "k": jax.random.key(0)}
    assert sorted(flatten_paths(tree)) == ["b/0", "b/1/c", "k"]
    assert sorted(tree_digest(tree)) == ["b/0", "b/1/c", "k"]
    assert tree_digest({}) == {}
    with pytest.raises(ValueError, match="'a/b'; rename"):
        flatten_paths({"a": {"b": 1}, "a/b": 2})
