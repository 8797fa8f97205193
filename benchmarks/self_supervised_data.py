"""The images of `self_supervised.py`: two kinds that need no files, and folders of one's own. Trains nothing."""

import dataclasses
import functools
import re
from pathlib import Path

from vlm_jax.data.images import AugmentConfig
from vlm_jax.data.sources import ClassFoldersConfig, DigitsConfig, ShapesConfig, SourceConfig
from vlm_jax.data.sources.class_folders import class_folders, image_files
from vlm_jax.models.dvae import STRIDE
from vlm_jax.schema import ConfigError


@dataclasses.dataclass(frozen=True)
class Data:
    """Images of one kind.

    Attributes:
        name: in tables and folders.
        unlabelled: what is pre-trained on.
        labelled: what probes, fine-tuning and the supervised tower learn from.
        test: what they are judged on.
        image_size: side in pixels.
        patch_size: side of a patch; there are 16 to 64 of them.
        augment: the random view of all training.
        length: factor on the steps of all training.
    """

    name: str
    unlabelled: SourceConfig
    labelled: SourceConfig
    test: SourceConfig
    image_size: int
    patch_size: int
    augment: AugmentConfig
    length: float = 1.0

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def code_size(self) -> int:
        """Side in pixels of the tokenizer's images: a code for each patch."""
        return self.image_size // self.patch_size * STRIDE


def built_in(name: str) -> Data:
    """Scanned digits, all with labels; or drawn shapes, of which a few have one.

    Without the noise shapes would tell nothing of a method: eight numbers describe one, and random features give them.
    """
    if name == "digits":
        train, test = DigitsConfig(split="train"), DigitsConfig(split="test")
        return Data(name, train, train, test, 16, 4, AugmentConfig(scale=(0.6, 1.0), ratio=(0.8, 1.25)))
    drawn = ShapesConfig(image_size=32, count=8000, max_objects=1, cells=1, noise=0.3)
    labelled, test = dataclasses.replace(drawn, count=1440), dataclasses.replace(drawn, split="test", count=480)
    return Data(name, drawn, labelled, test, 32, 8, AugmentConfig(scale=(0.6, 1.0), ratio=(0.8, 1.25), flip=0.5), 2.0)


def own(folder: str, workdir: Path) -> Data:
    """Images in a folder per class; raises `ConfigError` where there are none."""
    root = Path(folder).expanduser().resolve()
    held_out = next((root / name for name in ("val", "test", "validation") if (root / name).is_dir()), None)
    train: Path | None = root / "train"
    if not train.is_dir() or held_out is None:
        train, held_out = split(root, workdir / "images")
    sources = [ClassFoldersConfig(path=str(path)) for path in (train, held_out)]
    augment = AugmentConfig(scale=(0.4, 1.0), flip=0.5)
    name = re.sub(r"\W+", "_", root.name) or "images"  # stands in names of metrics
    return Data(name, sources[0], sources[0], sources[1], 64, 8, augment)


def split(root: Path, into: Path) -> tuple[Path, Path]:
    """Folders of links to the images of `root`: (four of five of each class, every fifth)."""
    if not root.is_dir() or not class_folders(str(root)):
        raise ConfigError(f"--images={root} is no folder with a folder of images for each class")
    for name in class_folders(str(root)):
        files = sorted(image_files(str(root), name))
        if len(files) < 5:
            raise ConfigError(f"--images: {root / name} holds {len(files)} images; a class needs 5, one to be held out")
        for index, file in enumerate(files):
            link = into / ("test" if index % 5 == 4 else "train") / name / f"{index:07d}{Path(file).suffix}"
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(root / file)
    return into / "train", into / "test"


@functools.cache
def class_count(data: Data) -> int:
    """Classes that the labels name."""
    return len(data.labelled.build("").class_names)
