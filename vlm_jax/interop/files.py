"""Files that weights come in: safetensors (whole or sharded), PyTorch's pickles, numpy's *.npz. No names are read here.

PyTorch is needed for pickles alone, and they are read without running any code of theirs.
"""

import contextlib
import dataclasses
import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

# In a directory, the first of these that is there is read.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
    "model.npz",
)
SHARD_BYTES = 5_000_000_000  # of one file of weights
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


class WeightsError(ValueError):
    """A file of weights that can't be read or written: the sentence names it."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """What was found.

    Attributes:
        tensors: name -> array, in the stored dtype.
        torchscript: whether they came as OpenAI's TorchScript archives, which no other weights do.
        settings: file name -> content of the JSON files beside them.
        folder: where they lie.
    """

    tensors: dict[str, np.ndarray]
    torchscript: bool
    settings: dict[str, Any]
    folder: Path


def read_weights(path: Path) -> Weights:
    """Reads a file of weights, or the one in a directory, and the JSON files beside it.

    Raises:
        WeightsError: nothing is there, it is damaged, or reading it needs PyTorch.
    """
    file = path
    if path.is_dir():
        names = [name for name in WEIGHT_FILES if (path / name).exists()]
        if not names:
            raise WeightsError(f"{path} holds none of {', '.join(WEIGHT_FILES)}; pass the file of weights itself")
        file = path / names[0]
    if not file.exists():
        raise WeightsError(f"{file} does not exist")
    tensors, torchscript = _read_file(file)
    settings = {path.name: read_json(path) for path in sorted(file.parent.glob("*config.json"))}
    return Weights(tensors, torchscript, settings, file.parent)


def _read_file(file: Path) -> tuple[dict[str, np.ndarray], bool]:
    if file.name.endswith(".index.json"):
        shards = sorted(set(read_json(file)["weight_map"].values()))
        parts = [_read_file(file.parent / shard)[0] for shard in shards]
        return {name: value for part in parts for name, value in part.items()}, False
    if not file.exists():
        raise WeightsError(f"{file} does not exist, though the index beside it names it; copy every shard")
    if file.suffix == ".safetensors":
        return _read_safetensors(file), False
    if file.suffix in PICKLES:
        return _read_pickle(file)
    if file.suffix == ".npz":
        return _read_npz(file), False
    raise WeightsError(f"{file} is neither .safetensors nor .npz nor one of {', '.join(PICKLES)}")


def read_json(file: Path) -> Any:
    """The content of a JSON file; raises `WeightsError` if it is none."""
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise WeightsError(f"{file} is not valid JSON ({error}); fetch it again") from error


def _read_safetensors(file: Path) -> dict[str, np.ndarray]:
    """Maps the file into memory. safetensors' own numpy reader does not know bfloat16."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header_bytes = stream.read(length) if 8 + length <= size else b""
    try:
        header = json.loads(header_bytes)
        header.pop("__metadata__", None)
        entries = {name: (_DTYPES[e["dtype"]], e["shape"], e["data_offsets"]) for name, e in header.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{file} has no readable safetensors header ({error!r}); fetch it again") from error
    end = max((offsets[1] for _, _, offsets in entries.values()), default=0)
    if 8 + length + end != size:
        raise WeightsError(
            f"{file} has {size} bytes where its header wants {8 + length + end}; it was cut, fetch it again"
        )
    data = np.memmap(file, np.uint8, "r", offset=8 + length) if end else np.zeros(0, np.uint8)
    return {
        name: np.asarray(data[start:stop]).view(dtype).reshape(shape)
        for name, (dtype, shape, (start, stop)) in entries.items()
    }


def _read_npz(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as stored:
            tensors = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{file} can't be read as a .npz ({error}); fetch it again") from error
    # numpy knows no bfloat16, and reads its two bytes as opaque
    return {name: x.view(jnp.bfloat16) if x.dtype == np.dtype("V2") else x for name, x in tensors.items()}


def _read_pickle(file: Path) -> tuple[dict[str, np.ndarray], bool]:
    try:
        import torch
    except ImportError as error:
        raise WeightsError(
            f"{file} is a PyTorch pickle: install torch to read it, or convert it to safetensors where torch is"
        ) from error
    torchscript = False
    try:
        loaded = torch.jit.load(file, map_location="cpu").state_dict()
        torchscript = True
    except RuntimeError:  # not an archive of TorchScript
        loaded = _load_plain_pickle(file, torch)
    for wrapper in ("state_dict", "model"):
        loaded = loaded[wrapper] if isinstance(loaded.get(wrapper), Mapping) else loaded
    tensors = {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    return {name: _to_numpy(value.detach().contiguous(), torch) for name, value in tensors.items()}, torchscript


def _load_plain_pickle(file: Path, torch: Any) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise WeightsError(
            f"{file} is damaged or holds more than weights, which is not read because a pickle can run code; "
            f"save its state_dict alone: {str(error).splitlines()[0]}"
        ) from error


def _to_numpy(tensor: Any, torch: Any) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:  # numpy can't take it over, its bits it can
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def make_directory(path: Path) -> None:
    """Makes a directory and those above it.

    Raises:
        WeightsError: it can't be made.
    """
    with _writing(path):
        path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in its own error
        why = (isinstance(error, OSError) and error.strerror) or error
        raise WeightsError(f"{path} can't be written: {why}; make room, or give another directory") from error


def write_weights(file: Path, tensors: Mapping[str, np.ndarray], dtype: str, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a safetensors file as PyTorch's libraries expect it, or a *.npz, floats in `dtype`, integers as they are.

    Args:
        file: its suffix tells which of the two.
        tensors: name -> array.
        dtype: "float32", "float16" or "bfloat16".
        shard_bytes: more than these are written as several safetensors and `FILE.index.json`, as transformers does.

    Raises:
        WeightsError: it can't be written.
    """
    # asarray, not ascontiguousarray, which would make a vector of a scalar
    cast = {name: np.asarray(value, _stored(value, dtype), order="C") for name, value in tensors.items()}
    with _writing(file):
        if file.suffix == ".npz":
            np.savez(file, **cast)  # pyright: ignore[reportArgumentType] - the names are no other argument's
        else:
            _save_shards(file, cast, shard_bytes)


def _save_shards(file: Path, tensors: Mapping[str, np.ndarray], shard_bytes: int) -> None:
    shards: list[dict[str, np.ndarray]] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], file, {"format": "pt"})
        return
    where = {}
    for number, shard in enumerate(shards, 1):
        part = file.with_name(f"{file.stem}-{number:05d}-of-{len(shards):05d}{file.suffix}")
        save_file(shard, part, {"format": "pt"})
        where |= dict.fromkeys(shard, part.name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    write_json(file.with_name(f"{file.name}.index.json"), index)


def _stored(value: np.ndarray, dtype: str) -> np.dtype[Any]:
    """Whole numbers (indices) stay what they are."""
    return value.dtype if np.issubdtype(value.dtype, np.integer) else np.dtype(dtype)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes an indented JSON file."""
    write_bytes(file, (json.dumps(content, indent=2) + "\n").encode())


def write_bytes(file: Path, content: bytes) -> None:
    """Writes a file."""
    with _writing(file):
        file.write_bytes(content)


__all__ = [
    "Weights",
    "WeightsError",
    "make_directory",
    "read_json",
    "read_weights",
    "write_bytes",
    "write_json",
    "write_weights",
]
