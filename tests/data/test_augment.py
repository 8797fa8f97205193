import colorsys

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from vlm_jax import schema
from vlm_jax.data import augment
from vlm_jax.data.augment import ColorJitter, Erasing, RandAugment
from vlm_jax.data.examples import Views
from vlm_jax.data.images import AugmentConfig, PreprocessConfig, random_resized_crop, training_view
from vlm_jax.schema import ConfigError


def photo(height=23, width=31, seed=0):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    return np.clip(np.asarray(coarse) + rng.integers(-9, 10, (height, width, 3)), 0, 255).astype(np.uint8)


IMAGE = Image.fromarray(photo())


class Scripted:
    """A generator whose draws are given; it fails when another kind of draw is made."""

    def __init__(self, **draws):
        self.draws = {name: iter(values) for name, values in draws.items()}

    def __getattr__(self, name):
        return lambda *arguments, **options: next(self.draws[name])


def pixels(image):
    return np.asarray(image).astype(int)


def test_jitter_applies_the_drawn_changes_in_the_drawn_order():
    """Against the definition on floats: blends with black, with the mean grey and with the grey image, and colorsys."""
    config = ColorJitter(brightness=0.4, contrast=0.5, saturation=0.6, hue=0.2)
    rng = Scripted(random=[0.0], permutation=[[1, 3, 0, 2]], uniform=[0.7, 0.13, 1.2, 0.5])
    found = pixels(augment.color_jitter(IMAGE, rng, config))

    def luma(x):
        return np.rint(x @ np.asarray([0.299, 0.587, 0.114]))[..., None]

    x = pixels(IMAGE).astype(float)
    x = np.clip(0.7 * x + 0.3 * round(luma(x).mean()), 0, 255)
    hsv = np.asarray([[colorsys.rgb_to_hsv(*(pixel / 255)) for pixel in row] for row in x])
    hsv[..., 0] = (hsv[..., 0] + 0.13) % 1
    x = 255 * np.asarray([[colorsys.hsv_to_rgb(*pixel) for pixel in row] for row in hsv])
    x = np.clip(1.2 * x, 0, 255)
    x = np.clip(0.5 * x + 0.5 * luma(x), 0, 255)
    assert np.abs(found - x).max() <= 8  # HSV with 8 bits, as torchvision has it
    assert np.abs(found - x).mean() < 1.5
    other = Scripted(random=[0.0], permutation=[[0, 1, 2, 3]], uniform=[1.2, 0.7, 0.5, 0.13])
    assert np.abs(pixels(augment.color_jitter(IMAGE, other, config)) - found).mean() > 2  # the order matters


def test_jitter_draws_factors_from_its_ranges_with_its_probability():
    config = ColorJitter(probability=0.7, brightness=0.3)
    grey = Image.new("RGB", (2, 2), (100, 100, 100))
    rng = np.random.default_rng(0)
    values = np.asarray([pixels(augment.color_jitter(grey, rng, config))[0, 0, 0] for _ in range(2000)])
    changed = values[values != 100]
    assert abs(len(changed) / 2000 - 0.7 * 60 / 61) < 0.05
    assert changed.min() >= 69
    assert changed.max() <= 130
    assert abs(changed.mean() - 99.5) < 2
    assert abs(changed.std() - 60 / 12**0.5) < 1.5
    wide = [pixels(augment.color_jitter(grey, rng, ColorJitter(brightness=3)))[0, 0, 0] for _ in range(200)]
    assert min(wide) < 20
    turned = [augment.shift_hue(Image.new("RGB", (1, 1), "red"), t).getpixel((0, 0)) for t in (0, 1 / 3, -1 / 3, 0.5)]
    np.testing.assert_allclose(turned, [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 255, 255)], atol=6)


def test_grey_is_luma():
    expected = pixels(IMAGE) @ np.asarray([0.299, 0.587, 0.114])
    found = pixels(augment.grey(IMAGE))
    assert np.abs(found - expected[..., None]).max() <= 1


REFERENCES = {
    "auto_contrast": lambda s, sign: ImageOps.autocontrast(IMAGE),
    "equalize": lambda s, sign: ImageOps.equalize(IMAGE),
    "invert": lambda s, sign: 255 - pixels(IMAGE),
    "posterize": lambda s, sign: pixels(IMAGE) & {0.3: 0b11100000, 0.9: 0b10000000}[s],
    "solarize": lambda s, sign: np.where(pixels(IMAGE) < 256 - int(256 * s), pixels(IMAGE), 255 - pixels(IMAGE)),
    "solarize_add": lambda s, sign: np.where(
        pixels(IMAGE) < 128, np.minimum(255, pixels(IMAGE) + {0.3: 33, 0.9: 99}[s]), pixels(IMAGE)
    ),
    "color": lambda s, sign: ImageEnhance.Color(IMAGE).enhance(1 + sign * 0.9 * s),
    "contrast": lambda s, sign: ImageEnhance.Contrast(IMAGE).enhance(1 + sign * 0.9 * s),
    "brightness": lambda s, sign: ImageEnhance.Brightness(IMAGE).enhance(1 + sign * 0.9 * s),
    "sharpness": lambda s, sign: ImageEnhance.Sharpness(IMAGE).enhance(1 + sign * 0.9 * s),
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("strength", [0.3, 0.9])
@pytest.mark.parametrize("sign", [1, -1])
def test_color_operations(name, strength, sign):
    found = augment.OPERATIONS[name](IMAGE, strength, sign, (1, 2, 3))
    np.testing.assert_array_equal(pixels(found), pixels(REFERENCES[name](strength, sign)))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["shear_x", "shear_y", "translate_x", "translate_y", "rotate"])
def test_geometric_operations_move_points_where_they_say(name, sign):
    """A white dot on black, found again by its centre of mass; what is uncovered has the fill."""
    strength, size, at = 0.8, 41, (24, 17)  # x, y
    canvas = np.zeros((size, size, 3), np.uint8)
    canvas[at[1] - 1 : at[1] + 2, at[0] - 1 : at[0] + 2] = 255
    moved = pixels(augment.OPERATIONS[name](Image.fromarray(canvas), strength, sign, (7, 7, 7)))
    weight = np.where(moved[..., 0] > 20, moved[..., 0], 0)
    found = np.asarray([(weight * axis).sum() / weight.sum() for axis in np.meshgrid(range(size), range(size))])
    x, y = at[0] + 0.5, at[1] + 0.5
    angle, centre = np.deg2rad(sign * 30 * strength), size / 2
    expected = {
        "shear_x": (x - sign * 0.3 * strength * y, y),
        "shear_y": (x, y - sign * 0.3 * strength * x),
        "translate_x": (x - sign * 0.45 * strength * size, y),
        "translate_y": (x, y - sign * 0.45 * strength * size),
        "rotate": (
            centre + np.cos(angle) * (x - centre) + np.sin(angle) * (y - centre),
            centre - np.sin(angle) * (x - centre) + np.cos(angle) * (y - centre),
        ),
    }[name]
    np.testing.assert_allclose(found + 0.5, expected, atol=0.3)
    corners = moved[[0, 0, -1, -1], [0, -1, 0, -1], 0]
    assert 7 in corners


def test_strongest_operations_work():
    for operation in augment.OPERATIONS.values():
        for sign in (1, -1):
            assert operation(IMAGE, 1.0, sign, (0, 0, 0)).size == IMAGE.size


def test_rand_augment_draws_operations_magnitudes_and_signs(monkeypatch):
    calls = []

    def recorder(name):
        def operation(image, strength, sign, fill):
            calls.append((name, strength, sign, fill))
            return image

        return operation

    monkeypatch.setattr(augment, "OPERATIONS", {name: recorder(name) for name in augment.OPERATIONS})
    rng = np.random.default_rng(0)
    for _ in range(3000):
        augment.rand_augment(IMAGE, rng, RandAugment(layers=2, fill=(1, 2, 3)))
    names, strengths, signs, fills = zip(*calls, strict=True)
    assert abs(len(calls) / 6000 - 0.5) < 0.03
    shares = [names.count(name) / len(calls) for name in augment.OPERATIONS]
    assert min(shares) > 0.05
    assert max(shares) < 0.085
    assert abs(np.mean(np.asarray(strengths)[np.asarray(strengths) < 0.9]) - (0.9 - 0.05 * (2 / np.pi) ** 0.5)) < 0.005
    assert 0.01 < strengths.count(1.0) / len(calls) < 0.04  # two deviations above the mean is the end of the range
    assert abs(signs.count(1) / len(calls) - 0.5) < 0.04
    assert set(fills) == {(1, 2, 3)}
    calls.clear()
    augment.rand_augment(IMAGE, rng, RandAugment(layers=50, magnitude=4, magnitude_std=0, probability=1))
    assert [call[1] for call in calls] == [0.4] * 50


def test_erasing_covers_the_drawn_share_in_a_rectangle():
    image, config = np.full((60, 80, 3), 10, np.uint8), Erasing(probability=0.6, area=(0.05, 0.2), ratio=0.4)
    rng, shares, ratios = np.random.default_rng(0), [], []
    for _ in range(800):
        mask = (augment.erase(image, rng, config, (0.5,) * 3, (0.1,) * 3) != 10).any(-1)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not len(rows):
            continue
        height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        assert mask.sum() == height * width
        shares.append(height * width / 4800)
        ratios.append(height / width)
    assert (image == 10).all()
    assert abs(len(shares) / 800 - 0.6) < 0.06
    assert min(shares) > 0.045
    assert max(shares) < 0.21
    assert abs(np.mean(shares) - 0.125) < 0.008
    assert abs(np.mean(np.log(ratios))) < 0.07
    assert abs(np.std(np.log(ratios)) - np.log(0.4**-2) / 12**0.5) < 0.05


def test_erasing_fills_with_what_normalises_to_noise_or_zero():
    image, mean, std = np.zeros((64, 64, 3), np.uint8), (0.4, 0.5, 0.6), (0.1, 0.1, 0.15)

    def inside(mode):
        erased = augment.erase(image, np.random.default_rng(3), Erasing(1.0, area=(0.3, 0.3), mode=mode), mean, std)
        return erased[erased.any(-1)]

    np.testing.assert_array_equal(np.unique(inside("const"), axis=0), [np.rint(np.multiply(mean, 255))])
    (color,) = np.unique(inside("rand"), axis=0)
    assert not np.array_equal(color, np.rint(np.multiply(mean, 255)))
    noise = (inside("pixel") / 255 - mean) / std
    np.testing.assert_allclose(noise.mean(0), 0, atol=0.1)
    np.testing.assert_allclose(noise.std(0), 1, atol=0.1)
    bright = augment.erase(image, np.random.default_rng(0), Erasing(1.0, mode="pixel"), (1.0,) * 3, (0.2,) * 3)
    assert abs((bright[bright.any(-1)] == 255).mean() - 0.5) < 0.1  # cut off at white, not wrapped around


def test_views_are_pure_functions_of_the_generator():
    config = AugmentConfig(
        color_jitter=ColorJitter(0.8, 0.4, 0.4, 0.2, 0.1),
        grey=0.2,
        rand_augment=RandAugment(layers=2),
        erasing=Erasing(0.25),
    )
    views = Views(16, PreprocessConfig(), config)
    record = {"image": photo(), "where": "w", "key": "k"}
    for seed in range(20):
        first, again = (views(record, np.random.default_rng(seed)) for _ in range(2))
        np.testing.assert_array_equal(first, again)
        assert (first.shape, first.dtype) == ((16, 16, 3), np.uint8)
    assert len({views(record, np.random.default_rng(seed)).tobytes() for seed in range(50)}) == 50


def test_what_is_off_changes_nothing_and_draws_nothing():
    config, image = AugmentConfig(scale=(0.3, 0.9), flip=0.5), photo()
    for seed in range(10):
        ours, reference = np.random.default_rng(seed), np.random.default_rng(seed)
        view = training_view(image, ours, config, PreprocessConfig(), 12)
        np.testing.assert_array_equal(view, random_resized_crop(image, reference, config, 12))
        assert ours.random() == reference.random()


def test_grey_comes_with_its_probability():
    config = AugmentConfig(grey=0.3)
    rng = np.random.default_rng(0)
    views = [training_view(photo(), rng, config, PreprocessConfig(), 8) for _ in range(500)]
    share = np.mean([(view == view[..., :1]).all() for view in views])
    assert abs(share - 0.3) < 0.08


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grey": 1.5}, "augment.grey = 1.5"),
        ({"color_jitter.hue": 0.6}, "color_jitter.hue = 0.6"),
        ({"color_jitter.contrast": -1}, "color_jitter.contrast = -1"),
        ({"color_jitter.probability": 2}, "color_jitter.probability = 2"),
        ({"rand_augment.layers": -1}, "rand_augment.layers = -1"),
        ({"rand_augment.magnitude": 11}, "rand_augment.magnitude = 11"),
        ({"rand_augment.fill": (0, 0, 256)}, "rand_augment.fill = "),
        ({"erasing.probability": -0.1}, "erasing.probability = -0.1"),
        ({"erasing.area": (0.5, 0.2)}, "erasing.area = "),
        ({"erasing.ratio": 2}, "erasing.ratio = 2"),
    ],
)
def test_impossible_values_name_the_key(changes, message):
    with pytest.raises(ConfigError, match=message):
        schema.validate(schema.override(AugmentConfig(), changes), "config.data.augment")
