"""Examples/s on one core of every source and of every step from a stored image to a row of a batch.

python benchmarks/input.py [--images=300] [--size=224] [--seconds=2] [--json=FILE]

Writes photograph-like JPEGs (500 x 375) in every format that a source reads, then times, one after the other and in
turns: reading alone, decoding, the evaluation view, the training view, that view with strong augmentation, and the
whole row with its caption. Beside them the same transforms in Pillow, which torchvision's are on Pillow images, and
open_clip's own loader where webdataset and torchvision are installed. Threads and worker processes multiply these
figures; they are not measured here.
"""

import argparse
import csv
import importlib.util
import io
import json
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from vlm_jax.data import images
from vlm_jax.data.augment import ColorJitter, Erasing, RandAugment
from vlm_jax.data.examples import ClipExamples
from vlm_jax.data.images import AugmentConfig, PreprocessConfig
from vlm_jax.data.sources import DigitsConfig, ShapesConfig, Source, source_for_path
from vlm_jax.data.text import SentencePieceConfig, build_tokenizer

ROUNDS = 5
Work = Callable[[int], object]


def photographs(count: int) -> list[bytes]:
    """JPEGs with the spectrum of photographs: noise at several scales, 500 x 375 pixels, quality 90."""
    rng, files = np.random.default_rng(0), []
    for _ in range(count):
        picture = np.zeros((375, 500, 3))
        for scale in (4, 16, 64, 250):
            noise = rng.normal(size=(375 * scale // 250 + 2, 500 * scale // 250 + 2, 3)) * 90 / scale**0.5
            layers = [Image.fromarray(noise[..., c].astype(np.float32)).resize((500, 375), 3) for c in range(3)]
            picture += np.stack([np.asarray(layer) for layer in layers], axis=-1)
        buffer = io.BytesIO()
        Image.fromarray(np.clip(picture + 120, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def write_formats(root: Path, files: list[bytes]) -> dict[str, str]:
    """The same images as shards, tables and folders; name of the source -> path."""
    captions = [f"a photo of thing {index % 10}, number {index}" for index in range(len(files))]
    (root / "images").mkdir()
    with tarfile.open(root / "all.tar", "w") as tar:
        for index, (data, caption) in enumerate(zip(files, captions, strict=True)):
            (root / "images" / f"{index:06d}.jpg").write_bytes(data)
            folder = root / "folders" / f"class_{index % 10}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{index:06d}.jpg").write_bytes(data)
            for extension, content in (("jpg", data), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{index:06d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    rows = [{"image": f"images/{i:06d}.jpg", "caption": caption} for i, caption in enumerate(captions)]
    (root / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open(root / "all.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "caption"])
        writer.writeheader()
        writer.writerows(rows)
    names = {"tar": "all.tar", "jsonl": "all.jsonl", "csv": "all.csv", "class_folders": "folders"}
    return {kind: str(root / name) for kind, name in names.items()}


def open_sources(paths: dict[str, str], cache: str) -> dict[str, Source]:
    """Every source, the drawn ones too."""
    drawn = {"digits": DigitsConfig().build(cache), "shapes": ShapesConfig().build(cache)}
    return {kind: source_for_path(path).build(cache) for kind, path in paths.items()} | drawn


def with_pillow(data: bytes, size: int) -> np.ndarray:
    """CLIP's evaluation preprocessing as torchvision does it on Pillow images."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = size / min(image.size)
    width, height = (max(size, int(side * scale)) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def chains(files: list[bytes], size: int, tar: Source) -> dict[str, Work]:
    """Name -> the work on image i."""
    evaluation, rng = PreprocessConfig(), np.random.default_rng(0)
    decoded = [images.decode(data) for data in files[:50]]
    strong = AugmentConfig(
        scale=(0.08, 1.0),
        flip=0.5,
        color_jitter=ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1),
        rand_augment=RandAugment(layers=2),
        erasing=Erasing(probability=0.25),
    )
    area = PreprocessConfig(interpolation="area")
    tokenizer = build_tokenizer(
        SentencePieceConfig(length=77, vocab_size=300), (tar.texts(i)[0] for i in range(len(tar)))
    )
    row = ClipExamples(tokenizer, size, evaluation, AugmentConfig())

    def training(config: AugmentConfig) -> Work:
        return lambda i: images.training_view(decoded[i % len(decoded)], rng, config, evaluation, size)

    return {
        "decode": lambda i: images.decode(files[i]),
        "evaluation view": lambda i: images.preprocess(decoded[i % len(decoded)], evaluation, size),
        "evaluation view, area": lambda i: images.preprocess(decoded[i % len(decoded)], area, size),
        "training view": training(AugmentConfig()),
        "training view, strong": training(strong),
        "row from tar": lambda i: row(tar[i], rng),
        "decode + evaluation view": lambda i: images.preprocess(images.decode(files[i]), evaluation, size),
        "the same in Pillow": lambda i: with_pillow(files[i], size),
    }


def open_clip_loader(files: list[bytes], size: int, tar: str) -> dict[str, Work]:
    """open_clip's transform and loader on the same shard, or nothing where they can't run."""
    missing = [
        name for name in ("torch", "torchvision", "webdataset", "open_clip") if not importlib.util.find_spec(name)
    ]
    if missing:
        print(f"open_clip's loader is left out: {', '.join(missing)} not installed\n")
        return {}
    import open_clip
    import webdataset

    transform = open_clip.image_transform(size, is_train=True)
    dataset = webdataset.WebDataset(tar, shardshuffle=False).decode("pilrgb").rename(image="jpg", text="txt")
    loader = iter(dataset.map_dict(image=transform).repeat())
    return {
        "open_clip transform": lambda i: transform(Image.open(io.BytesIO(files[i])).convert("RGB")),
        "open_clip loader": lambda i: next(loader),
    }


def rates(works: dict[str, Work], count: int, seconds: float) -> dict[str, float]:
    """Examples/s of each: the median over rounds, in each of which all take a turn."""
    measured: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            done, start = 0, time.perf_counter()
            while (passed := time.perf_counter() - start) < seconds / ROUNDS or not done:
                work(done % count)
                done += 1
            measured[name].append(done / passed)
    return {name: statistics.median(values) for name, values in measured.items()}


def main(arguments: list[str]) -> int:
    """The program."""
    parser = argparse.ArgumentParser(description="Examples/s of the input pipeline on one core.", allow_abbrev=False)
    parser.add_argument("--images", type=int, default=300, help="number of images")
    parser.add_argument("--size", type=int, default=224, help="side of the model's images in pixels")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each figure")
    parser.add_argument("--json", default="", help="file for the numbers")
    flags = parser.parse_args(arguments)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # per core means one core
    with tempfile.TemporaryDirectory() as folder:
        files = photographs(flags.images)
        paths = write_formats(Path(folder), files)
        sources = open_sources(paths, folder)
        reading = {f"read {kind}": (lambda i, s=source: s[i]) for kind, source in sources.items()}
        works = reading | chains(files, flags.size, sources["tar"])
        works |= open_clip_loader(files, flags.size, paths["tar"])
        result = rates(works, flags.images, flags.seconds)
    print(f"{flags.images} JPEGs of 500 x 375 to {flags.size} x {flags.size}, one core")
    for name, rate in result.items():
        print(f"  {name:26} {rate:10,.0f} examples/s")
    ours, pillow = result["decode + evaluation view"], result["the same in Pillow"]
    print(f"  decode + evaluation view / Pillow = {ours / pillow:.2f}")
    if flags.json:
        Path(flags.json).write_text(json.dumps(result | {"ratio_to_pillow": ours / pillow}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
