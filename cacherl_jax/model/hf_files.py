"""Weight files of a Hugging Face checkpoint: safetensors, one file or several with an index.

Reading checks headers first and then takes slices. Writing lays the files out from shapes alone and fills them in any order,
so that neither holds more than one tensor. `safetensors` comes with transformers 5, a core dependency.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from cacherl_jax.config import ConfigError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(jnp.bfloat16), "F16": np.dtype(np.float16)}
MAX_SHARD_BYTES = 5 * 10**9


class Stored(NamedTuple):
    """A tensor's file and, from its header, dtype and shape."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


def shard_names(folder: Path) -> dict[str, list[str] | None]:
    """File -> the tensors that the index says are in it; None for a single file, which needs no index.

    Raises ConfigError when the folder has neither, or the index cannot be read.
    """
    if (folder / SINGLE).is_file():
        return {SINGLE: None}
    path = folder / INDEX
    if not path.is_file():
        others = ", ".join(sorted(p.name for p in folder.glob("*.bin"))) or "no weights"
        raise ConfigError(f"{folder} has neither {SINGLE} nor {INDEX}, but {others}")
    shards: dict[str, list[str] | None] = {}
    try:
        for tensor, shard in json.loads(path.read_text())["weight_map"].items():
            if Path(shard).name != shard:
                raise ConfigError(f"{path} places tensor {tensor!r} outside of the folder, in {shard!r}")
            names = shards.setdefault(shard, [])
            assert names is not None
            names.append(tensor)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is no index of safetensors: {error!r}") from error
    return shards


def headers(folder: Path) -> dict[str, Stored]:
    """Every tensor of the checkpoint, from the files' headers.

    Raises ConfigError naming the file or tensor: an absent or cut file, one that is no safetensors, a difference from the index.
    """
    found: dict[str, Stored] = {}
    for shard, named in shard_names(folder).items():
        path = folder / shard
        if not path.is_file():
            assert named is not None
            raise ConfigError(f"{path} is absent; {INDEX} names it for tensor {named[0]!r}")
        try:
            with safe_open(path, "np") as file:
                parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                stored = {name: Stored(path, part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
        except SafetensorError as error:
            cut = f"the file ends before tensor {name!r} does" if (name := _first_cut(path)) else "it is no safetensors file"
            raise ConfigError(f"{path}: {cut}; download it again ({error})") from error
        if named is not None and (wrong := sorted(stored.keys() ^ set(named))):
            where = "in the file but not in the index" if wrong[0] in stored else "in the index but not in the file"
            raise ConfigError(f"{path}: tensor {wrong[0]!r} is {where}")
        found |= stored
    return found


def _first_cut(path: Path) -> str | None:
    """The first tensor that reaches beyond the file's end, by its header; None where that does not explain anything."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            tensors = json.loads(file.read(min(length, path.stat().st_size)))
        end = path.stat().st_size - 8 - length
        ends = {name: t["data_offsets"][1] for name, t in tensors.items() if name != "__metadata__"}
        return min((name for name in ends if ends[name] > end), key=ends.__getitem__, default=None)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def check(found: Mapping[str, Stored], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ConfigError naming a tensor that is missing, surplus, misshapen or of a dtype that cannot be read."""
    if missing := [name for name in expected if name not in found]:
        raise ConfigError(f"tensor {missing[0]!r} is missing{_more(missing)}")
    if surplus := sorted(found.keys() - expected.keys()):
        raise ConfigError(f"tensor {surplus[0]!r} of {found[surplus[0]].path} is surplus{_more(surplus)}")
    for name, shape in expected.items():
        path, dtype, stored = found[name]
        if stored != shape:
            raise ConfigError(f"tensor {name!r} of {path} has shape {stored}, expected {shape}")
        if dtype not in DTYPES:
            raise ConfigError(f"tensor {name!r} of {path} has dtype {dtype}; {', '.join(DTYPES)} can be read")


def _more(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""


def read(stored: Stored, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """A part of a tensor. The file is mapped for this one reading only: mapped pages would count as memory in use."""
    with safe_open(stored.path, "np") as file:
        return file.get_slice(name)[index]


class Writer:
    """Files for tensors of the given shapes, each not above `max_shard_bytes` if it holds more than one tensor.

    The files have their full size at once; `write` fills them in any order. Leaving the context checks that all were written
    and adds the index where there are several files.
    """

    def __init__(
        self, folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        self._folder, self._shapes = folder, dict(shapes)
        self._code = next(code for code, d in DTYPES.items() if d.name == dtype)
        self._dtype = DTYPES[self._code]
        shards: list[dict[str, int]] = [{}]
        for name, shape in shapes.items():
            size = math.prod(shape) * self._dtype.itemsize
            if shards[-1] and sum(shards[-1].values()) + size > max_shard_bytes:
                shards.append({})
            shards[-1][name] = size
        self._places: dict[str, tuple[str, int]] = {}
        self._files: dict[str, BinaryIO] = {}
        for i, sizes in enumerate(shards, 1):
            self._lay_out(SINGLE if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors", sizes)
        self.bytes = sum(size for sizes in shards for size in sizes.values())
        self._left = set(shapes)

    def _lay_out(self, shard: str, sizes: Mapping[str, int]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
        offset = 0
        for name, size in sizes.items():
            header[name] = {"dtype": self._code, "shape": self._shapes[name], "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that tensors begin at a multiple of 8
        self._files[shard] = file = (self._folder / shard).open("wb")
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
        self._places |= {name: (shard, 8 + len(text) + header[name]["data_offsets"][0]) for name in sizes}

    def write(self, name: str, tensor: np.ndarray) -> None:
        assert tensor.shape == self._shapes[name], f"{name}: {tensor.shape}"
        shard, offset = self._places[name]
        self._files[shard].seek(offset)
        self._files[shard].write(np.ascontiguousarray(tensor, self._dtype).reshape(-1).view(np.uint8).data)
        self._left.discard(name)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()
        if kind is not None:
            return
        assert not self._left, f"not written: {sorted(self._left)}"
        if len(self._files) > 1:
            parameters = sum(math.prod(shape) for shape in self._shapes.values())
            index = {
                "metadata": {"total_parameters": parameters, "total_size": self.bytes},
                "weight_map": {name: shard for name, (shard, _) in self._places.items()},
            }
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
