"""Reads checkpoint files without running anything that they contain."""

import argparse
import hashlib
import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

# Larger than any ResNet's checkpoint with its optimizer; an archive that claims more is not unpacked.
_MAX_UNPACKED = 4 << 30


class _Refused(ValueError):
    """What is said of a file already."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it was read.

    Attributes:
        content: What the file holds: a state dict, or a dict around one.
        sha1: Of the file.
        sha256: Of the file.
        inner_sha1: Of the file inside an archive, or of the file itself.
    """

    content: dict[str, Any]
    sha1: str
    sha256: str
    inner_sha1: str


def _named(function: Callable[..., Any], module: str, name: str) -> Callable[..., Any]:
    """The function under the name that old pickles know it by: torch's allow-list goes by names."""

    def renamed(*args: Any) -> Any:
        return function(*args)

    renamed.__module__, renamed.__name__, renamed.__qualname__ = module, name, name
    return renamed


def _allowed() -> list[Any]:
    """What old training checkpoints hold besides tensors: numpy's scalars (`best_prec1`) and argparse's result."""
    import numpy as np

    scalar: Callable[..., Any] = np.float64(0).__reduce__()[0]  # type: ignore[assignment]
    kinds = {type(np.dtype(code)) for code in ('f2', 'f4', 'f8', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', '?')}
    return [
        _named(scalar, 'numpy.core.multiarray', 'scalar'),
        _named(scalar, 'numpy._core.multiarray', 'scalar'),
        np.dtype,
        *kinds,
        argparse.Namespace,
    ]


def _inner(data: bytes, path: Path, depth: int = 0) -> bytes:
    """The one file in a plain archive; a checkpoint of torch is an archive too, of several files.

    Raises:
        ValueError: There are several files, or what the archive claims to hold is too large to unpack.
    """
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return data
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [m for m in archive.infolist() if not m.is_dir() and not m.filename.startswith('__MACOSX/')]
        # Compressed or overlapping records hold more than the file has bytes.
        unpacked = sum(m.file_size for m in members)
        if unpacked > max(_MAX_UNPACKED, len(data)):
            raise _Refused(f"'{path}' claims to unpack to {unpacked >> 20} MiB, which is no ResNet.")
        if any(m.filename.endswith('data.pkl') for m in members):
            return data
        if len(members) != 1:
            raise _Refused(f"'{path}' is an archive of {len(members)} files; one checkpoint inside is expected.")
        inner = archive.read(members[0])
    if depth > 1:
        raise _Refused(f"'{path}' is an archive in an archive in an archive; one checkpoint inside one is expected.")
    return _inner(inner, path, depth + 1)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads .pth, .pth.tar, .pkl, a zipped .pth, or .safetensors; pickles with torch's `weights_only` alone.

    Args:
        path: The file.

    Raises:
        ValueError: The file is absent, damaged, of another kind, or holds more than weights and plain values; nothing
            of it was run.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"'{path}' is no file.")
    data = path.read_bytes()
    try:
        if path.suffix == '.safetensors':
            inner, content = data, safetensors.torch.load(data)
        else:
            inner = _inner(data, path)
            with torch.serialization.safe_globals(_allowed()), warnings.catch_warnings():
                # torch doubts newer pickle protocols; what it cannot read is refused below.
                warnings.filterwarnings('ignore', 'Detected pickle protocol', UserWarning)
                content = torch.load(io.BytesIO(inner), map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as e:
        wanted = sorted(set(re.findall(r'GLOBAL (\S+)', str(e))))
        named = f' ({", ".join(wanted)})' if wanted else ''
        raise ValueError(
            f"'{path}' is damaged or holds more than weights{named}. It was not run, and will not be: have its author "
            'save the state dict alone, best as .safetensors.'
        ) from e
    except _Refused:
        raise
    except Exception as e:  # of a damaged file torch raises what its bytes happen to lead to
        what = f'{type(e).__name__}: {str(e)[:500]}'
        raise ValueError(f"'{path}' cannot be read as a checkpoint; it may be incomplete ({what}).") from e
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' holds a {type(content).__name__}, not a state dict.")
    return Checkpoint(
        content,
        sha1=hashlib.sha1(data, usedforsecurity=False).hexdigest(),
        sha256=hashlib.sha256(data).hexdigest(),
        inner_sha1=hashlib.sha1(inner, usedforsecurity=False).hexdigest(),
    )
