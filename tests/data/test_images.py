import contextlib
import io
import math

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from vlm_jax.data import images
from vlm_jax.data.images import AugmentConfig, PreprocessConfig, crop_box, decode, normalise, preprocess


def photo(height, width, seed=0):
    """A smooth picture with some texture, as photographs have."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    return np.clip(np.asarray(coarse) + rng.integers(-9, 10, (height, width, 3)), 0, 255).astype(np.uint8)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pillow_rgb(data):
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


RGB = Image.fromarray(photo(37, 53))
ALPHA = RGB.copy()
ALPHA.putalpha(Image.fromarray(photo(37, 53, 1)[..., 0]))


@pytest.mark.parametrize(
    ("image", "kind", "options"),
    [
        (RGB, "JPEG", {}),
        (RGB, "JPEG", {"progressive": True, "quality": 40}),
        (RGB, "JPEG", {"subsampling": 0}),
        (RGB.convert("L"), "JPEG", {}),
        (RGB.convert("CMYK"), "JPEG", {}),
        (RGB.convert("YCbCr"), "TIFF", {}),
        (RGB, "PNG", {}),
        (RGB.convert("L"), "PNG", {}),
        (RGB.convert("1"), "PNG", {}),
        (RGB.convert("P", palette=Image.Palette.ADAPTIVE, colors=17), "PNG", {}),
        (RGB.convert("P", palette=Image.Palette.ADAPTIVE, colors=17), "PNG", {"transparency": 3}),
        (RGB.convert("P", palette=Image.Palette.ADAPTIVE, colors=17), "PNG", {"transparency": bytes(range(17))}),
        (ALPHA, "PNG", {}),
        (ALPHA.convert("LA"), "PNG", {}),
        (RGB, "WEBP", {"lossless": True}),
        (ALPHA, "WEBP", {"lossless": True}),
        (RGB, "BMP", {}),
        (RGB.convert("P"), "GIF", {}),
    ],
)
def test_decode_equals_pillow_in_every_mode(image, kind, options):
    data = encoded(image, kind, **options)
    pixels = decode(data)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    # libjpeg-turbo of two builds may differ in the last bit of a pixel
    np.testing.assert_allclose(pixels.astype(int), pillow_rgb(data).astype(int), atol=1 if kind == "JPEG" else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_is_undone(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(RGB, kind, exif=exif)
    expected = pillow_rgb(data)
    assert expected.shape[:2] == ((53, 37) if orientation >= 5 else (37, 53))
    np.testing.assert_allclose(decode(data).astype(int), expected.astype(int), atol=1)


def test_sixteen_bit_grey_keeps_its_range():
    grey = (np.arange(64 * 64, dtype=np.uint32).reshape(64, 64) * 16).astype(np.uint16)
    data = encoded(Image.fromarray(grey), "PNG")
    np.testing.assert_array_equal(decode(data)[..., 1], (grey >> 8).astype(np.uint8))


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_array_equal(decode(data)[0, 0], [255, 0, 0])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_truncated_files_are_errors_at_any_length(kind):
    data = encoded(RGB, kind)
    for length in {*range(0, len(data) - 40, max(1, len(data) // 25))}:
        with pytest.raises(ValueError, match=r"can't be decoded|is empty"):
            decode(data[:length])


def test_garbage_inside_a_file_raises_value_errors_only():
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF"):
        data = encoded(RGB, kind)
        for _ in range(40):
            damaged = bytearray(data)
            for place in rng.integers(0, len(data), 6):
                damaged[place] = rng.integers(256)
            with contextlib.suppress(ValueError):
                assert decode(bytes(damaged)).shape[2] == 3


def test_floating_point_and_oversized_images_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="floating point"):
        decode(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))
    monkeypatch.setattr(images, "MAX_PIXELS", 37 * 53 - 1)
    with pytest.raises(ValueError, match="53x37 pixels"):
        decode(encoded(RGB, "PNG"))


def test_arrays_pass_and_others_are_named():
    array = photo(4, 5)
    assert decode(array) is array
    with pytest.raises(ValueError, match=r"not float32 \[4, 5, 3\]"):
        decode(array.astype(np.float32))


def clip_reference(image, size):
    """torchvision's Resize(size, BICUBIC) and CenterCrop(size), with its rounding, on Pillow."""
    width, height = image.size
    short, long = (width, height) if width <= height else (height, width)
    new_short, new_long = size, int(size * long / short)
    new = (new_short, new_long) if width <= height else (new_long, new_short)
    resized = image.resize(new, Image.Resampling.BICUBIC)
    top, left = round((new[1] - size) / 2.0), round((new[0] - size) / 2.0)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize("shape", [(37, 53), (53, 37), (40, 40), (8, 8), (24, 24), (100, 31), (24, 91), (333, 500)])
def test_preprocess_is_clips(shape):
    image = photo(*shape)
    for size in (24, 33):
        view = preprocess(image, PreprocessConfig(), size)
        np.testing.assert_array_equal(view, clip_reference(Image.fromarray(image), size))


def test_squash_and_longest():
    image = photo(20, 60)
    squashed = preprocess(image, PreprocessConfig(resize="squash", interpolation="bilinear"), 24)
    expected = np.asarray(Image.fromarray(image).resize((24, 24), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(squashed, expected)
    padded = preprocess(image, PreprocessConfig(resize="longest", fill=(9, 8, 7)), 24)
    np.testing.assert_array_equal(padded[8:16], Image.fromarray(image).resize((24, 8), Image.Resampling.BICUBIC))
    assert (padded[:8] == [9, 8, 7]).all()
    assert (padded[16:] == [9, 8, 7]).all()


def test_area_averages_whole_blocks():
    image = photo(48, 48)
    small = preprocess(image, PreprocessConfig(interpolation="area"), 12)
    blocks = image.reshape(12, 4, 12, 4, 3).mean((1, 3))
    assert np.abs(small - blocks).max() <= 0.51


def test_normalise_is_the_published_formula():
    config = PreprocessConfig()
    pixels = np.asarray([[[0, 128, 255]]], np.uint8)
    expected = [(v / 255 - m) / s for v, m, s in zip((0, 128, 255), config.mean, config.std, strict=True)]
    assert normalise(pixels, config).dtype == np.float32
    np.testing.assert_allclose(normalise(pixels, config)[0, 0], expected, rtol=1e-6)


def test_crops_cover_the_asked_area_and_ratio_and_lie_inside():
    config = AugmentConfig(scale=(0.2, 0.9), ratio=(0.5, 2.0))
    rng = np.random.default_rng(0)
    boxes = np.asarray([crop_box(300, 400, rng, config) for _ in range(4000)])
    top, left, height, width = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 300).all()
    assert (left + width <= 400).all()
    share, ratio = height * width / (300 * 400), width / height
    assert share.min() > 0.19
    assert share.max() < 0.91
    assert ratio.min() > 0.49
    assert ratio.max() < 2.02
    assert (top == 0).mean() < 0.2
    small = share < 0.5  # all ratios fit there: the logarithm of the ratio is uniform
    assert abs(np.mean(np.log(ratio[small]))) < 0.05
    assert abs(np.std(np.log(ratio[small])) - math.log(4) / math.sqrt(12)) < 0.03


def test_impossible_ratio_falls_back_to_the_largest_centre_crop():
    """torchvision's fallback, for a strip of 10 x 100 and ratios up to 4/3: 10 x 13 in the middle."""
    assert crop_box(10, 100, np.random.default_rng(0), AugmentConfig(scale=(0.9, 1.0))) == (0, 43, 10, 13)
    assert crop_box(100, 10, np.random.default_rng(0), AugmentConfig(scale=(0.9, 1.0))) == (43, 0, 13, 10)


def test_random_resized_crop_is_the_resized_box():
    image, config = photo(50, 70), AugmentConfig(scale=(0.3, 0.6))
    top, left, height, width = crop_box(50, 70, np.random.default_rng(5), config)
    view = images.random_resized_crop(image, np.random.default_rng(5), config, 16)
    box = Image.fromarray(image).crop((left, top, left + width, top + height))
    np.testing.assert_array_equal(view, box.resize((16, 16), Image.Resampling.BICUBIC))


def test_flip_mirrors_with_its_probability():
    image, whole = photo(16, 16), {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    rng = np.random.default_rng(0)
    views = [images.random_resized_crop(image, rng, AugmentConfig(flip=0.3, **whole), 16) for _ in range(500)]
    flipped = [np.array_equal(view, image[:, ::-1]) for view in views]
    assert all(f or np.array_equal(v, image) for f, v in zip(flipped, views, strict=True))
    assert 100 < sum(flipped) < 200


@pytest.mark.parametrize("size", [8, 16, 5])
def test_tiny_images_work(size):
    image, rng = photo(8, 8), np.random.default_rng(0)
    assert images.random_resized_crop(image, rng, AugmentConfig(), size).shape == (size, size, 3)
    assert preprocess(photo(1, 1), PreprocessConfig(), size).shape == (size, size, 3)


def test_jpeg_decoder_really_is_strict():
    """The promise of an error on damage rests on simplejpeg's."""
    data = encoded(RGB, "JPEG")
    with pytest.raises(ValueError, match="JPEG"):
        simplejpeg.decode_jpeg(data[: len(data) // 2], strict=True)


def test_a_centre_crop_keeps_its_share():
    """As torchvision's Resize(256), CenterCrop(224): 0.875 of the resized shorter side."""
    image = np.random.default_rng(0).integers(0, 256, (300, 420, 3)).astype(np.uint8)
    resized = np.asarray(Image.fromarray(image).resize((358, 256), Image.Resampling.BICUBIC))  # int(256 * 420 / 300)
    expected = resized[16 : 16 + 224, 67 : 67 + 224]
    np.testing.assert_array_equal(images.preprocess(image, PreprocessConfig(crop=0.875), 224), expected)
    for changes, message in (({"crop": 0.0}, "must lie in"), ({"crop": 0.9, "resize": "squash"}, "has no effect")):
        assert message in next(iter(PreprocessConfig(**changes).problems()))[1]
