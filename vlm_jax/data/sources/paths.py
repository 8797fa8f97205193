"""Names of data files as users write them: braces, globs, folders, name@10, and lists with commas."""

import glob
import itertools
import os
import re

from vlm_jax.schema import ConfigError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_COUNTED = re.compile(r"(.+)@(\d+)")


def expand_braces(pattern: str) -> list[str]:
    """`a{08..10}b` to a08b, a09b, a10b and `{x,y}` to x, y, as a shell does; every combination of several."""
    pieces: list[list[str]] = []
    position = 0
    for match in _BRACES.finditer(pattern):
        pieces += [[pattern[position : match.start()]], _alternatives(match[1])]
        position = match.end()
    return ["".join(choice) for choice in itertools.product(*pieces, [pattern[position:]])]


def _alternatives(inside: str) -> list[str]:
    numbers = _RANGE.fullmatch(inside)
    if not numbers:
        return inside.split(",")
    first, last = int(numbers[1]), int(numbers[2])
    width = max(len(numbers[1]), len(numbers[2])) if "0" in (numbers[1][0], numbers[2][0]) else 0
    step = 1 if first <= last else -1
    return [f"{number:0{width}d}" for number in range(first, last + step, step)]


def _split_list(path: str) -> list[str]:
    """Splits at commas outside of braces."""
    return [part.strip() for part in re.split(r",(?![^{}]*\})", path) if part.strip()]


def _expand_count(name: str) -> list[str]:
    """`name@3` to name-00000-of-00003 and so on, as TensorFlow and TFDS number the files of a set."""
    counted = _COUNTED.fullmatch(name)
    if not counted or os.path.exists(name):
        return [name]
    count = int(counted[2])
    return [f"{counted[1]}-{number:05d}-of-{count:05d}" for number in range(count)]


def find_files(path: str, in_folder: str, wanted: str) -> list[str]:
    """The files that a path speaks of: in the order of the path, each glob and folder sorted.

    Args:
        path: names with commas between.
        in_folder: the pattern of the files of a folder that is named.
        wanted: what to give instead of an empty path, for the error.

    Raises:
        ConfigError: a file that is named doesn't exist, or a glob or folder gives none.
    """
    files: list[str] = []
    for part in _split_list(path):
        for name in [name for braced in expand_braces(part) for name in _expand_count(braced)]:
            if os.path.isdir(name):
                found = sorted(glob.glob(os.path.join(glob.escape(name), in_folder)))
            elif glob.has_magic(name) and not os.path.exists(name):
                found = sorted(glob.glob(name, recursive=True))
            else:
                found = [name] if os.path.isfile(name) else []
            if not found:
                what = f"a folder without {in_folder}" if os.path.isdir(name) else "no file"
                if glob.has_magic(name):
                    what = "a pattern that no file matches"
                raise ConfigError(f"config.data.source.path: {name!r} is {what}; check the path (it was {path!r})")
            files += found
    if not files:
        raise ConfigError(f"config.data.source.path is empty; give {wanted}")
    return files
