"""The files of a model folder: which there are, and what is in them.

A folder may come from anyone. Nothing in it is executed or unpickled, what it names lies in it, and what is not as it
should be is refused before any weight is read. Headers are read and checked by safetensors; for values see
`streamda.shard_values`.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from streamda.errors import ModelError
from streamda.files import shown
from streamda.quoting import NUM_NAMED, counted, one_line, quoted

STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_JSON_BYTES = 100_000_000
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One tensor in a shard."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    """As the file calls it; see `STORED_DTYPES`."""
    offset: int
    """Of its first byte in the file."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of the model in a shard."""

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    target: str
    """Name in the model; of the first target where a conversion has several."""
    converted: bool
    """True where transformers fuses or splits it on the way."""

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        ModelError: it cannot be read, or holds something else.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {MAX_JSON_BYTES // 1_000_000} MB")
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, parse_constant=_no_nan)
    except (OSError, ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else first_line(error)
        raise ModelError(f"{shown(path)} cannot be used: {reason}{_hint(path)}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{shown(path)} cannot be used: it should hold a JSON object, and holds {quoted(value)}")
    return value


def find_shards(folder: Path) -> dict[Path, frozenset[str]]:
    """The safetensors files of a model folder, in the order of their names, with the tensors its index puts in each.

    Without an index there is one file, of which nothing is said. A single file comes first, as in transformers.

    Raises:
        ModelError: there are none, or the index is damaged, names one that is not there, or passes one over.
    """
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        require_within(folder, single)
        return {single: frozenset()}
    if not index.is_file():
        raise ModelError(_no_weights(folder))
    require_within(folder, index)
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelError(f"{shown(index)} is no index of a sharded checkpoint: it has no object weight_map")
    for name in weight_map.values():
        # also a legal name of no other file: what is no safetensors is not even opened
        plain = isinstance(name, str) and name == Path(name).name and name.isprintable() and len(name.encode()) < 256
        if not plain or not name.endswith(".safetensors"):
            raise ModelError(
                f"{shown(index)} names the shard {quoted(name)}; it must be a plain file name that ends in .safetensors"
            )
    shards: dict[Path, list[str]] = {folder / name: [] for name in sorted(set(weight_map.values()))}
    for tensor, name in weight_map.items():
        shards[folder / name].append(tensor)
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"{shown(folder)} lacks the shard {missing[0]} that its index names{more}; download it again")
    others = [path.name for path in sorted(folder.glob("*.safetensors")) if _SHARD.fullmatch(path.name)]
    if extra := [name for name in others if folder / name not in shards]:
        raise ModelError(f"{shown(folder)} holds {_some('shard', extra)} that its index does not name")
    for shard in shards:
        require_within(folder, shard)
    return {shard: frozenset(names) for shard, names in shards.items()}


def read_header(shard: Path, listed: frozenset[str] = frozenset()) -> list[ShardEntry]:
    """What is in a shard, in the order of safetensors' own names.

    Args:
        shard: the file.
        listed: tensors that the folder's index puts in it.

    Raises:
        ModelError: it is damaged or cannot be read, or lacks a listed tensor.
    """
    with reading(shard):
        with safe_open(shard, framework="pt", backend="pread") as handle:  # checks sizes and offsets
            keys = list(handle.keys())
        with shard.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length), object_pairs_hook=_no_key_twice)
    if missing := sorted(listed - set(keys)):
        raise ModelError(f"{shown(shard)} lacks {_some('tensor', missing)} that the folder's index puts in it")
    return [
        ShardEntry(key, tuple(entry["shape"]), entry["dtype"], 8 + length + entry["data_offsets"][0])
        for key, entry in ((key, header[key]) for key in keys)
    ]


def first_line(error: BaseException) -> str:
    """The first line of an error's text, printable and of bounded length, or its kind where it has none."""
    lines = str(error).splitlines()
    return one_line(lines[0]) if lines and lines[0].strip() else type(error).__name__


@contextmanager
def reading(shard: Path) -> Iterator[None]:
    """Turns what goes wrong while a shard is read into one line that names it.

    Raises:
        ModelError: whatever went wrong.
    """
    try:
        yield
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{shown(shard)} cannot be read: {first_line(error)}{_hint(shard)}") from error


def _hint(path: Path) -> str:
    """What a file is instead of what it should be, and what to do about it, where that can be told."""
    head = b""
    with suppress(OSError), path.open("rb") as stream:
        head = stream.read(64).lstrip().lower()
    if head.startswith(b"version https://git"):
        return " (a git-lfs pointer: run `git lfs pull`)"
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return " (a web page was saved in its place: download it again)"
    return ""


def require_within(folder: Path, path: Path) -> None:
    """Refuses a link that leads out of the model's folder, unless it leads to the blobs of a cache of the hub.

    Those are where such caches, and folders made of links into them, keep the files of models; nothing else is there.

    Raises:
        ModelError: with where it leads, or because it leads to no file.
    """
    try:
        home = folder.resolve()
        if home.parent.name == "snapshots":  # .../models--a--b/snapshots/<commit>
            home = home.parent.parent
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # the second of a link to itself
        raise ModelError(f"{shown(path)} cannot be used: {first_line(error)}") from error
    blobs = target.parent  # .../models--a--b/blobs/<hash>
    is_cached = blobs.name == "blobs" and blobs.parent.name.startswith("models--")
    if not is_cached and not target.is_relative_to(home):
        raise ModelError(
            f"{shown(path)} is a link to {shown(target)}, outside the model's folder; give the folder that holds the "
            "files themselves as --model, or put the file itself in the place of the link"
        )
    if not stat.S_ISREG(target.stat().st_mode):
        raise ModelError(f"{shown(path)} is no regular file")


def _no_weights(folder: Path) -> str:
    """Why a folder without safetensors cannot be used, and what to do."""
    if any(any(folder.glob(pattern)) for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt")):
        # of what torch pickled transformers takes tensors and nothing else
        return (
            f"{shown(folder)} holds pickled weights only; convert them once, if you trust them: python -c 'from "
            f'transformers import AutoModelForCausalLM as M; M.from_pretrained("{shown(folder)}", dtype="auto")'
            f'.save_pretrained("{shown(folder)}-safetensors")\''
        )
    if any(folder.glob("*.gguf")):
        return f"{shown(folder)} holds GGUF weights only; gradients need the original ones, as safetensors"
    return f"{shown(folder)} holds no model.safetensors and no model.safetensors.index.json"


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a header: where a name comes twice, readers differ in what they take."""
    entries: dict[str, Any] = {}
    for key, value in pairs:
        if key in entries:
            raise ValueError(f"its header has {quoted(key)} twice")
        entries[key] = value
    return entries


def _no_nan(constant: str) -> float:
    if constant == "NaN":  # infinity has its uses, in the limits of a range
        raise ValueError("it holds NaN")
    return float(constant)


def _some(noun: str, names: Sequence[str]) -> str:
    """``2 tensors (a, b)``, with five names at most."""
    shown_names = ", ".join(one_line(name, 100) for name in names[:NUM_NAMED])
    return f"{counted(len(names), noun)} ({shown_names}{', ...' * (len(names) > NUM_NAMED)})"
