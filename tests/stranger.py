"""Captioned images that no config was made for: patterns in two colours, of odd sizes, as JPEGs in tar shards."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {
    "red": (200, 30, 30), "green": (30, 160, 40), "blue": (40, 60, 200), "yellow": (220, 200, 40),
    "white": (240, 240, 240), "black": (15, 15, 15), "purple": (130, 40, 160), "orange": (240, 130, 20),
}  # fmt: skip
KINDS = ("stripes", "checks", "rings", "fade")


def picture(rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """uint8 [H, W, 3] and its caption."""
    front, ground = rng.choice(list(COLOURS), 2, replace=False)
    kind, count = KINDS[rng.integers(len(KINDS))], int(rng.integers(2, 6))
    height, width = rng.integers(30, 80, 2)
    y, x = np.mgrid[0:height, 0:width]
    mask = {
        "stripes": (x * count // width) % 2,
        "checks": (x * count // width + y * count // height) % 2,
        "rings": (np.hypot(x - width / 2, y - height / 2) * 2 * count / max(height, width)).astype(int) % 2,
        "fade": x / width,
    }[kind][..., None]
    pixels = mask * np.array(COLOURS[front]) + (1 - mask) * np.array(COLOURS[ground])
    noisy = np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)
    return noisy, f"{count} {kind} of {front} on {ground}"


def write_shards(folder: Path, prefix: str, shards: int, images: int, seed: int) -> None:
    """`folder/prefix-000.tar` and so on, with that many images each."""
    rng = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{prefix}-{shard:03d}.tar", "w") as tar:
            for index in range(images):
                pixels, caption = picture(rng)
                jpeg = io.BytesIO()
                Image.fromarray(pixels).save(jpeg, "JPEG", quality=90)
                for extension, content in (("jpg", jpeg.getvalue()), ("txt", caption.encode())):
                    info = tarfile.TarInfo(f"{shard}{index:05d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
