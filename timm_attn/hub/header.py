"""The bytes of a safetensors file as the weights of a model: what is checked here is what is loaded."""

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..layers import gain_keys, read_gain
from ..weights.check import check_tensors, check_values
from .client import HubFileError
from .rules import CONFIG, MAX_HEADER_BYTES, WEIGHTS, no_constant, no_repeats


def sha256_of(data: bytes) -> str:
    """The sha256 of bytes, as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def read_weights(
    data: bytes,
    model: nn.Module,
    where: str = WEIGHTS,
    names: Callable[[list[str], nn.Module, str], None] | None = None,
) -> dict[str, Tensor]:
    """The tensors of a safetensors file, after all checks that need no trust in it.

    Args:
        data: The file's bytes.
        model: The model they are for, which may be on the meta device.
        where: The file's name for the message.
        names: What its names have to be, in place of `check_names`: all of the model's.

    Returns:
        Tensors by name, in memory of their own.

    Raises:
        HubFileError: The file is cut short, has bytes left over, or a header that is too large or contradicts itself;
            its tensors do not fit the model; or a value is none that a model can have.
    """
    (names or check_names)(_header_names(data, where), model, where)
    try:
        found = safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as e:
        raise HubFileError(
            f'{where} is no intact safetensors file: it is cut short, has bytes left over, or its header contradicts '
            f'itself ({type(e).__name__}: {str(e)[:200]}).'
        ) from e
    check_shapes(found, model, where)
    check_weights(found, model, where)
    return found


def check_weights(found: Mapping[str, Tensor], model: nn.Module, where: str = WEIGHTS) -> None:
    """Refuses tensors that no usable model has, as a model would keep them.

    Args:
        found: Tensors by name.
        model: The model.
        where: The file's name for the message.

    Raises:
        HubFileError: Names the tensors.
    """
    try:
        check_tensors(found)
        check_values(found, _expected(model, found))
        for key in gain_keys(model) & set(found):
            read_gain(found[key], key)
    except ValueError as e:
        raise HubFileError(f'{where}: {e}') from e


def _expected(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors that a model may have; where an attention's gain is not among the weights, it is 1."""
    gains = gain_keys(model)
    expected = {k: v for k, v in model.state_dict().items() if k not in gains}
    return expected | {k: torch.empty((), dtype=torch.float64) for k in gains & set(names)}


def _header_names(data: bytes, where: str) -> list[str]:
    """Names of the tensors. safetensors itself takes a name twice, and has no bound that fits a ResNet."""
    length = struct.unpack('<Q', data[:8])[0] if len(data) >= 8 else 0
    if not 2 <= length <= min(MAX_HEADER_BYTES, len(data) - 8):
        raise HubFileError(
            f'{where} is no safetensors file, or cut short: {len(data)} bytes, header of {length} '
            f'(at most {MAX_HEADER_BYTES}).'
        )
    try:
        text = data[8 : 8 + length].decode('utf-8')
        header: Any = json.loads(text, object_pairs_hook=no_repeats, parse_constant=no_constant)
    except (ValueError, RecursionError) as e:
        raise HubFileError(f'{where} has a header that is no JSON: {str(e)[:200]}') from e
    if not isinstance(header, dict):
        raise HubFileError(f'{where} has a header that is no JSON object.')
    about = header.pop('__metadata__', {})
    if not isinstance(about, dict) or not all(isinstance(v, str) for v in about.values()):
        raise HubFileError(f'{where}: __metadata__ of its header must be an object of texts.')
    return list(header)


def check_names(names: list[str], model: nn.Module, where: str = WEIGHTS) -> None:
    """Compares the names of tensors with a model's, before any of them is looked at.

    Args:
        names: Names in the file.
        model: The model.
        where: The file's name for the message.

    Raises:
        HubFileError: Names what is missing and what is left over.
    """
    found, expected = set(names), set(_expected(model, names))
    problems = []
    if missing := sorted(expected - found):
        problems.append(f'{len(missing)} missing: {some(missing)}')
    if extra := sorted(found - expected):
        problems.append(f'{len(extra)} that do not belong: {some(extra)}')
    _refuse(problems, model, where)


def check_shapes(found: Mapping[str, Tensor], model: nn.Module, where: str = WEIGHTS) -> None:
    """Compares shapes and kinds of numbers with a model's, and reports every difference in one error.

    Args:
        found: Tensors by name, of the names that the model has.
        model: The model.
        where: The file's name for the message.

    Raises:
        HubFileError: Names the tensors.
    """
    expected = _expected(model, found)
    shapes = [
        f'{k} {list(v.shape)} instead of {list(expected[k].shape)}'
        for k, v in sorted(found.items())
        if k in expected and v.shape != expected[k].shape
    ]
    kinds = [
        f'{k} {str(v.dtype).removeprefix("torch.")}'
        for k, v in sorted(found.items())
        if k in expected and not _same_kind(v.dtype, expected[k].dtype)
    ]
    problems = [f'{len(shapes)} of another shape: {some(shapes)}'] if shapes else []
    problems += [f'{len(kinds)} of another kind of number (dtype): {some(kinds)}'] if kinds else []
    _refuse(problems, model, where)


def _same_kind(found: torch.dtype, expected: torch.dtype) -> bool:
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    return found in floats if expected.is_floating_point else found == expected


def _refuse(problems: list[str], model: nn.Module, where: str) -> None:
    if problems:
        raise HubFileError(f'{where} does not fit the {type(model).__name__} of {CONFIG}: {"; ".join(problems)}')


def some(names: list[str], limit: int = 12) -> str:
    """The first names of a list, and how many more there are."""
    shown = [n[:200] for n in names[:limit]]
    return ', '.join(shown) + (f', ... ({len(names) - limit} more)' if len(names) > limit else '')
