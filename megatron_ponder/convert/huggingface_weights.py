"""Weight files of a Hugging Face folder, read and written one tensor at a time.

Reading: safetensors, one file or several with an index; or PyTorch's .bin files, of which only the
kind that torch loads without running code from them (`weights_only`). All headers are checked
before the first tensor is read. Writing: safetensors only, streamed, because the library's own
writer needs all tensors of a file in memory, twice.
"""

import contextlib
import dataclasses
import json
import pickle
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import safe_open
from torch import Tensor

from megatron_ponder.convert.json_values import read_object
from megatron_ponder.errors import ConversionError

SAFETENSORS = "model.safetensors"
PYTORCH = "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_UNPICKLING_ERRORS = (
    *(pickle.UnpicklingError, struct.error, ArithmeticError, AssertionError, AttributeError),
    *(EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError),
)
"""What torch.load raises for a damaged file, by where the damage is."""
_BUFFERS = re.compile(
    r"(rotary_emb\.inv_freq|\.attn\.(bias|masked_bias)|\.attention\.(bias|masked_bias))$"
)
"""Constants that older transformers stored with the weights."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """What a file says of a tensor."""

    file: Path
    name: str
    """In the file."""
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    """A string where the file has a type that is not read."""


class WeightFiles:
    """The tensors of a folder, by their names in the whole model.

    Args:
        folder: with weight files.
        base_prefix: what names start with, and those of a model without its head do not.
        head: the one name without the prefix.

    Raises:
        ConversionError: files are missing, damaged, or of a kind that is not read.
    """

    def __init__(self, folder: Path, base_prefix: str, head: str) -> None:
        self.folder = folder
        self._mapped: dict[Path, dict[str, Tensor]] = {}
        stored = {tensor.name: tensor for tensor in self._find(folder)}
        stored = {name: t for name, t in stored.items() if not _BUFFERS.search(name)}
        for name, tensor in stored.items():
            if tensor.dtype not in DTYPES.values():
                raise ConversionError(
                    f"{tensor.file}: {name} is stored as {tensor.dtype}; read are "
                    f"{', '.join(DTYPES)}. Quantised weights cannot be converted."
                )
        if not any(name.startswith(base_prefix) for name in stored):
            stored = {n if n == head else base_prefix + n: t for n, t in stored.items()}
        self.tensors: dict[str, StoredTensor] = stored

    def read(self, name: str) -> Tensor:
        """One tensor, as stored. It may be a view of the file."""
        stored = self.tensors[name]
        if stored.file in self._mapped:
            return self._mapped[stored.file][stored.name]
        with _as_conversion_error(stored.file), safe_open(stored.file, "pt") as file:
            tensor: Tensor = file.get_tensor(stored.name)
            return tensor

    def _find(self, folder: Path) -> Iterator[StoredTensor]:
        """Everything in the folder's weight files."""
        for single, describe in ((SAFETENSORS, _describe_safetensors), (PYTORCH, self._map_bin)):
            index = folder / f"{single}{INDEX_SUFFIX}"
            if index.is_file():
                yield from _of_index(index, describe)
                return
            if (folder / single).is_file():
                yield from describe(folder / single)
                return
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        raise ConversionError(
            f"--hf-path {folder}: there is neither {SAFETENSORS} nor {SAFETENSORS}{INDEX_SUFFIX}"
            + (f" (but {', '.join(others[:3])})." if others else ".")
        )

    def _map_bin(self, path: Path) -> Iterator[StoredTensor]:
        """The tensors of a .bin file, mapped and not read; nothing in it is executed."""
        advice = (
            "Only files that torch loads with weights_only are read. Load the model where you "
            "trust it and write it with save_pretrained, which makes safetensors."
        )
        try:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except _UNPICKLING_ERRORS as error:
            reason = (str(error).splitlines() or [repr(error)])[0]
            raise ConversionError(f"{path}: cannot be read: {reason} {advice}") from None
        if not isinstance(content, Mapping):
            raise ConversionError(f"{path}: holds no tensors by name. {advice}")
        self._mapped[path] = {k: v for k, v in content.items() if isinstance(v, Tensor)}
        for name, tensor in self._mapped[path].items():
            yield StoredTensor(path, name, tuple(tensor.shape), tensor.dtype)


def _of_index(index: Path, describe: Any) -> Iterator[StoredTensor]:
    """The tensors of all files that an index names, each where the index says."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index}: no index of weight files (weight_map).")
    by_file: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        by_file.setdefault(str(file), []).append(name)
    outside = [file for file in by_file if Path(file).name != file]
    if outside:
        raise ConversionError(f"{index}: names files outside of the folder: {outside[0]}.")
    missing = sorted(file for file in by_file if not (index.parent / file).is_file())
    if missing:
        raise ConversionError(
            f"--hf-path {index.parent}: {len(missing)} of {len(by_file)} weight files are missing: "
            f"{', '.join(missing[:5])}. Copy the folder again."
        )
    for file, names in by_file.items():
        described = {tensor.name: tensor for tensor in describe(index.parent / file)}
        lacking = [name for name in names if name not in described]
        if lacking:
            raise ConversionError(
                f"{index.parent / file}: has no {lacking[0]}, which {index.name} says is there. "
                "Copy the folder again."
            )
        yield from (described[name] for name in names)


def _describe_safetensors(path: Path) -> Iterator[StoredTensor]:
    """The header of a file."""
    with _as_conversion_error(path), safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            dtype = DTYPES.get(part.get_dtype(), part.get_dtype())
            yield StoredTensor(path, name, tuple(part.get_shape()), dtype)


@contextlib.contextmanager
def _as_conversion_error(path: Path) -> Iterator[None]:
    """The library's failures in this package's terms."""
    try:
        yield
    except safetensors.SafetensorError as error:
        raise ConversionError(
            f"{path}: no complete safetensors file ({error}). Copy it again."
        ) from None


@dataclasses.dataclass(frozen=True)
class TensorToWrite:
    """A tensor that a file will hold."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Entries."""
        return torch.Size(self.shape).numel()


def shard_names(num_shards: int) -> list[str]:
    """Files of a model, as transformers names them."""
    if num_shards == 1:
        return [SAFETENSORS]
    stem = SAFETENSORS.removesuffix(".safetensors")
    return [f"{stem}-{i + 1:05d}-of-{num_shards:05d}.safetensors" for i in range(num_shards)]


def write_index(folder: Path, shards: Sequence[Sequence[TensorToWrite]], itemsize: int) -> None:
    """Which file has which tensor; nothing for a single file."""
    if len(shards) == 1:
        return
    files = shard_names(len(shards))
    numel = sum(tensor.numel for shard in shards for tensor in shard)
    index = {
        "metadata": {"total_parameters": numel, "total_size": numel * itemsize},
        "weight_map": {
            tensor.name: file for file, shard in zip(files, shards, strict=True) for tensor in shard
        },
    }
    path = folder / f"{SAFETENSORS}{INDEX_SUFFIX}"
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_safetensors(
    path: Path,
    described: Sequence[TensorToWrite],
    tensors: Iterator[Tensor],
    dtype: torch.dtype,
) -> None:
    """One file: eight bytes of header length, a JSON header, then the tensors one after the other.

    Args:
        path: to write.
        described: name and shape of each tensor.
        tensors: the tensors, in the same order; each is written before the next is asked for.
        dtype: to write all of them in.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for each in described:
        start, end = end, end + each.numel * dtype.itemsize
        header[each.name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(each.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for each, tensor in zip(described, tensors, strict=True):
            assert tuple(tensor.shape) == each.shape, (each, tensor.shape)
            written = tensor.to(dtype).contiguous().view(torch.uint8)
            file.write(written.numpy().data)
