"""Named arrays in a file of the safetensors format, read with bounds and written in one step.

A file is the length of its header (u64, little-endian), the header (a JSON object that gives
``dtype``, ``shape`` and ``data_offsets`` by name, and texts under ``__metadata__``), and the bytes
of the arrays, end to end. A file of somebody else's is believed in nothing: what its numbers claim
is compared with its size before anything is allocated, a name is never a path, and nothing in it is
ever run. Files written here carry a SHA-256 of all that they say, which the format does not have.

Source: the description of the format in the repository huggingface/safetensors.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from attnlab.errors import DataError, UserError, did_you_mean
from attnlab.files import replacing

SUFFIX = ".safetensors"
PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".joblib")
HEADER = 1 << 21  # bytes, at most: some 20,000 arrays, read in half a second
NAME = 512  # characters, at most
RANK = 32  # numpy before 2.0 has no more
ARRAY = 1 << 48  # bytes, at most, its empty dimensions counted as 1
CHUNK = 1 << 20

TYPES = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}
"""What the format calls the types that NumPy has."""


class Spec(NamedTuple):
    """One array of a file: the name of its type, and where its bytes stand in the data."""

    kind: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def dtype(self) -> np.dtype:
        return TYPES[self.kind]

    def entry(self) -> dict[str, Any]:
        """As the header has it."""
        offsets = [self.begin, self.end]
        return {"dtype": self.kind, "shape": list(self.shape), "data_offsets": offsets}


@dataclass(frozen=True)
class TensorFile:
    """A file whose header is sound. ``start``: where the bytes of the arrays begin."""

    path: Path
    specs: dict[str, Spec]
    metadata: dict[str, str]
    start: int

    def read(self, name: str) -> np.ndarray:
        """One array, read-only. Raises `DataError` if its bytes are gone or are no booleans."""
        spec = self.specs[name]
        content = b"".join(self._chunks(spec.begin, spec.end))
        if spec.kind == "BOOL" and np.frombuffer(content, np.uint8).max(initial=0) > 1:
            raise DataError(f"{self.path}: {name} is neither true nor false")
        return np.ndarray(spec.shape, spec.dtype, content)

    def check(self) -> None:
        """Compares what was read and will be read with the SHA-256 that `write_tensors` wrote, if
        there is one. Raises `DataError`. Cost: reads the whole file."""
        wanted = self.metadata.get("sha256")
        size = max((spec.end for spec in self.specs.values()), default=0)
        if wanted and wanted != _digest(self.specs, self.metadata, self._chunks(0, size)):
            raise DataError(f"{self.path} is damaged: its SHA-256 differs; copy it anew")

    def _chunks(self, begin: int, end: int) -> Iterable[bytes]:
        try:
            with open(self.path, "rb") as file:
                file.seek(self.start + begin)
                while begin < end:
                    content = file.read(min(CHUNK, end - begin))
                    if not content:
                        raise DataError(f"{self.path} became shorter while it was read")
                    begin += len(content)
                    yield content
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from None


def open_tensors(path: str | Path) -> TensorFile:
    """Reads and checks the header of a file.

    Raises `UserError` for a path that is no such file, `DataError` for one that is not sound: too
    short, a header of more than 2 MiB or that is no JSON, a name twice, a type or shape that cannot
    be, arrays that overlap, leave gaps or do not fill the file.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() in PICKLES:
        raise UserError(
            f"{path}: {path.suffix} files may hold pickled Python, which runs when it is read; "
            f"convert it to {SUFFIX} where you trust it"
        )
    if path.suffix.lower() != SUFFIX:
        raise UserError(f"{path}: only files that end in {SUFFIX} are read")
    if not path.is_file():
        near = [str(other) for other in path.parent.glob(f"*{SUFFIX}")]
        raise UserError(f"no file {path}; {did_you_mean(str(path), near)}")
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(HEADER, size - 8):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            specs, metadata = parse_header(file.read(length), size - 8 - length)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except RecursionError:
        raise DataError(f"{path} is no sound safetensors file: its header is too deep") from None
    except ValueError as error:
        raise DataError(f"{path} is no sound safetensors file: {error}") from None
    return TensorFile(path, specs, metadata, 8 + length)


def parse_header(header: bytes, size: int) -> tuple[dict[str, Spec], dict[str, str]]:
    """The arrays and the metadata that a header announces in ``size`` bytes of data.

    Raises `ValueError`, in one line, for all that `open_tensors` refuses of it, and
    `RecursionError` where it is nested too deep to be read.
    """
    if not header.startswith(b"{"):
        raise ValueError("its header is no JSON object")
    entries = json.loads(header.decode(), object_pairs_hook=_once)
    metadata = entries.pop("__metadata__", {})
    texts = type(metadata) is dict and all(type(text) is str for text in metadata.values())
    if not texts:
        raise ValueError("its metadata are not texts by name")
    specs = {name: _spec(name, entry, size) for name, entry in entries.items()}
    position = 0
    for name, spec in sorted(specs.items(), key=lambda item: item[1][2:]):
        if spec.begin != position:
            what = "overlaps what stands" if spec.begin < position else "leaves a gap"
            raise ValueError(f"{name!r} {what} before it")
        position = spec.end
    if position != size:
        raise ValueError(f"{size - position:,} bytes after the last array")
    return specs, metadata


def write_tensors(
    path: str | Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes a file whole or not at all; ``sha256`` joins the metadata. The widest types come
    first, so that every array is aligned. Raises OSError, and `KeyError` for a type without a
    name."""
    kinds = {dtype: kind for kind, dtype in TYPES.items()}
    specs, position = {}, 0
    for name in sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name)):
        array = arrays[name]
        spec = Spec(kinds[array.dtype], array.shape, position, position + array.nbytes)
        specs[name], position = spec, spec.end
    digest = _digest(specs, metadata, (arrays[name].tobytes() for name in specs))
    entries = {name: spec.entry() for name, spec in specs.items()}
    header = json.dumps({"__metadata__": {**metadata, "sha256": digest}, **entries}).encode()
    header += b" " * (-len(header) % 8)
    with replacing(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in specs:
            file.write(arrays[name].tobytes())


def _spec(name: str, entry: Any, size: int) -> Spec:
    """One entry of a header, compared with the bytes that there are."""
    if not (0 < len(name) <= NAME and name.isprintable()):
        raise ValueError(f"a name of {len(name):,} characters that cannot be one of an array")
    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} has not a dtype, a shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(kind) is not str or kind not in TYPES:
        raise ValueError(f"{name!r} is of a type that is not known here")
    if not (_counts(shape) and len(shape) <= RANK and _counts(offsets) and len(offsets) == 2):
        raise ValueError(f"{name!r} has a shape or data_offsets that cannot be")
    itemsize = TYPES[kind].itemsize
    if math.prod(max(n, 1) for n in shape) * itemsize > ARRAY:
        raise ValueError(f"{name!r} has a shape that cannot be")
    begin, end = offsets
    if not begin <= end <= size or end - begin != math.prod(shape) * itemsize:
        raise ValueError(f"{name!r} has a shape that its bytes do not have")
    return Spec(kind, tuple(shape), begin, end)


def _counts(value: Any) -> bool:
    """Whether JSON gave a list of whole numbers of a size that can be multiplied."""
    return type(value) is list and all(type(n) is int and 0 <= n <= ARRAY for n in value)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in its header")
    return found


def _digest(specs: Mapping[str, Spec], metadata: Mapping[str, str], data: Iterable[bytes]) -> str:
    """SHA-256 of all that a file says, apart from the digest itself."""
    said = [
        {name: specs[name].entry() for name in sorted(specs)},
        {key: metadata[key] for key in sorted(metadata) if key != "sha256"},
    ]
    digest = hashlib.sha256(json.dumps(said).encode())
    for content in data:
        digest.update(content)
    return digest.hexdigest()
