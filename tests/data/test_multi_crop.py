"""Several views of an image: sizes, areas, colours; masks by blocks; all from the generator alone."""

import numpy as np
import pytest

from vlm_jax.data import augment, images
from vlm_jax.data.augment import Blur
from vlm_jax.data.images import AugmentConfig, PreprocessConfig
from vlm_jax.data.multi_crop import BlockMaskConfig, MultiCropConfig, MultiCropExamples, block_mask
from vlm_jax.data.sources.base import BadRecord, Record

GRID = (16, 16)


def examples(**options: object) -> MultiCropExamples:
    views = MultiCropConfig(**options)  # pyright: ignore[reportArgumentType]
    return MultiCropExamples(224, GRID, views, BlockMaskConfig(), PreprocessConfig())


def record(image: np.ndarray) -> Record:
    return {"image": image, "texts": (), "key": "a", "where": "b"}


def positions(side: int = 256) -> np.ndarray:
    """An image whose red is its column and whose green is its row: a view tells where it was cut out."""
    ramp = np.arange(side, dtype=np.uint8)
    return np.stack(np.broadcast_arrays(ramp[None], ramp[:, None], np.uint8(0)), axis=2).copy()


def test_views_have_their_sizes_and_come_from_the_generator_alone() -> None:
    make, image = examples(), record(positions())
    first, again, other = (make(image, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert {name: (x.shape, str(x.dtype)) for name, x in first.items()} == {
        "global_views": ((2, 224, 224, 3), "uint8"),
        "local_views": ((8, 98, 98, 3), "uint8"),
        "masked": ((128,), "int32"),
    }
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])
        assert not np.array_equal(value, other[name])
    assert len({view.tobytes() for view in first["local_views"]}) == 8


def test_areas_of_the_views() -> None:
    """Uniform in 0.32 to 1 and 0.05 to 0.32 of the image: by the spread of the positions that a view shows."""
    plain = {name: AugmentConfig(scale, flip=0.5) for name, scale in (("large", (0.32, 1.0)), ("small", (0.05, 0.32)))}
    make = examples(first=plain["large"], second=plain["large"], local=plain["small"])
    drawn: dict[str, list[float]] = {"global_views": [], "local_views": []}
    for seed in range(40):
        row = make(record(positions()), np.random.default_rng(seed))
        for name, areas in drawn.items():
            for view in row[name].astype(float):
                width, height = np.ptp(view[..., 0]) + 1, np.ptp(view[..., 1]) + 1
                areas.append(width * height / 256**2)
    for (least, most), areas in zip(((0.32, 1.0), (0.05, 0.32)), drawn.values(), strict=True):
        assert least - 0.03 < min(areas) < least + 0.1
        assert most - 0.1 < max(areas) < most + 0.03
        assert np.mean(areas) == pytest.approx((least + most) / 2, abs=0.06)


def test_without_a_generator_nothing_is_random_or_masked() -> None:
    image = record(positions())
    row = examples()(image, None)
    assert (row["masked"] == -1).all()
    want = images.preprocess(positions(), PreprocessConfig(), 98)
    assert all(np.array_equal(view, want) for view in row["local_views"])


def test_an_image_that_can_not_be_decoded_is_a_bad_record() -> None:
    with pytest.raises(BadRecord, match="empty"):
        examples()(record(b""), np.random.default_rng(0))  # pyright: ignore[reportArgumentType]


def test_masks_are_of_one_view_and_their_shares_uniform() -> None:
    make, shares, firsts = examples(), [], []
    for seed in range(400):
        masked = make._masked(np.random.default_rng(seed))
        places = masked[masked >= 0]
        assert (masked[len(places) :] == -1).all()
        assert (np.diff(places) > 0).all()
        assert len(set(places // 256)) == 1
        shares.append(len(places) / 256)
        firsts.append(places[0] // 256)
    assert 0.05 < min(shares) < 0.12
    assert 0.45 < max(shares) <= 0.5
    assert np.mean(shares) == pytest.approx(0.3, abs=0.02)
    assert np.mean(firsts) == pytest.approx(0.5, abs=0.08)
    both = MultiCropExamples(224, GRID, MultiCropConfig(), BlockMaskConfig(views=2), PreprocessConfig())
    places = both._masked(np.random.default_rng(0))
    assert len(places) == 256
    assert set(places[places >= 0] // 256) == {0, 1}


def test_blocks_never_mask_more_than_asked_and_are_blocks() -> None:
    config = BlockMaskConfig()
    for seed in range(200):
        rng = np.random.default_rng(seed)
        count = int(rng.integers(4, 128))
        mask = block_mask(GRID, count, rng, config)
        assert 0.6 * count - 4 < mask.sum() <= count
        if count > 60:  # far fewer edges than scattered patches have
            edges = np.abs(np.diff(mask.astype(int), axis=0)).sum() + np.abs(np.diff(mask.astype(int), axis=1)).sum()
            assert edges < 1.6 * mask.sum()


def test_blur_is_a_gaussian_and_solarisation_inverts_bright_values() -> None:
    dot = np.zeros((21, 21, 3), np.uint8)
    dot[10, 10] = 255
    blurred = augment.blur(dot, np.random.default_rng(0), Blur(1.0, sigma=(1.5, 1.5))).astype(float)[..., 0]
    kernel = np.exp(-(np.arange(-4, 5) ** 2) / (2 * 1.5**2))
    kernel /= kernel.sum()
    np.testing.assert_allclose(blurred[6:15, 6:15], 255 * np.outer(kernel, kernel), atol=1.0)
    assert not blurred[:5].any()
    untouched = augment.blur(dot, np.random.default_rng(0), Blur(0.0))
    assert untouched is dot
    values = np.array([0, 127, 128, 255], np.uint8)
    np.testing.assert_array_equal(augment.solarize(values), [0, 127, 127, 0])


def test_what_is_off_draws_no_number() -> None:
    """A recipe's random views stay the same when a config learns new changes."""
    image, preprocess = positions(64), PreprocessConfig()
    used = np.random.default_rng(0)
    images.training_view(image, used, AugmentConfig(flip=0.5), preprocess, 32)
    plain = np.random.default_rng(0)
    images.random_resized_crop(image, plain, AugmentConfig(flip=0.5), 32)
    assert used.random() == plain.random()
    busy = AugmentConfig(blur=Blur(1.0), solarize=1.0)
    view = images.training_view(np.full((64, 64, 3), 200, np.uint8), np.random.default_rng(0), busy, preprocess, 32)
    assert (view == 55).all()
