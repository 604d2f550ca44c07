"""What the header of a safetensors file says, compared with the model it is for, without its tensors."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import gain_keys, read_gain
from .client import HubFileError
from .rules import CONFIG, FLOATS, INTEGERS, MAX_HEADER_BYTES, WEIGHTS, integer, list_of, no_constant, no_repeats


def read_header(path: str | Path) -> dict[str, Any]:
    """Reads and checks the header of a safetensors file without its tensors.

    Args:
        path: The file.

    Returns:
        name -> {'dtype', 'shape', 'data_offsets'}, and '__metadata__' where there is one.

    Raises:
        HubFileError: The file is cut short, has bytes left over, or a header that is too large or contradicts itself.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open('rb') as file:
        first = file.read(8)
        length = struct.unpack('<Q', first)[0] if len(first) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise HubFileError(f'{path.name} is no safetensors file, or cut short: {size} bytes, header of {length}.')
        data = file.read(length)
    try:
        header = json.loads(data.decode('utf-8'), object_pairs_hook=no_repeats, parse_constant=no_constant)
    except (ValueError, RecursionError) as e:
        raise HubFileError(f'{path.name} has a header that is no JSON: {str(e)[:200]}') from e
    if not isinstance(header, dict):
        raise HubFileError(f'{path.name} has a header that is no JSON object.')
    end = 0
    spans = []
    for name, entry in header.items():
        if name != '__metadata__':
            spans.append(_span(path.name, name, entry))
    for start, stop, name in sorted(spans):
        if start != end:
            raise HubFileError(f"{path.name}: the tensor '{name}' starts at {start}, expected {end}.")
        end = stop
    if (missing := 8 + length + end - size) != 0:
        what = f'{missing} bytes are missing' if missing > 0 else f'{-missing} bytes are left over'
        raise HubFileError(f'{path.name} does not have the size its header says: {what}.')
    return header


def _span(file: str, name: str, entry: Any) -> tuple[int, int, str]:
    widths = {**FLOATS, **INTEGERS}
    if not isinstance(entry, dict) or entry.get('dtype') not in widths:
        dtype = entry.get('dtype') if isinstance(entry, dict) else entry
        raise HubFileError(f"{file}: the tensor '{name}' has dtype {str(dtype)[:40]}; allowed are {sorted(widths)}.")
    shape: Any = entry.get('shape')
    offsets: Any = entry.get('data_offsets')
    if not list_of(integer(0, 1 << 40), 0, 8)(shape) or not list_of(integer(0, 1 << 50), 2, 2)(offsets):
        raise HubFileError(f"{file}: the tensor '{name}' has a shape or offsets that are no lists of sizes.")
    if offsets[1] - offsets[0] != math.prod(shape) * widths[entry['dtype']]:
        raise HubFileError(
            f"{file}: the tensor '{name}' has {offsets[1] - offsets[0]} bytes, which do not fit {shape}."
        )
    return offsets[0], offsets[1], name


def check_header(header: Mapping[str, Any], model: nn.Module, where: str = WEIGHTS) -> None:
    """Compares the header of a safetensors file with the model it is for, and reports every difference in one error.

    Args:
        header: As `read_header` returns it.
        model: The model, which may be on the meta device.
        where: The file's name for the message.

    Raises:
        HubFileError: Keys are missing or left over, or a shape or kind of number differs.
    """
    gains = gain_keys(model)
    expected = {k: v for k, v in model.state_dict().items() if k not in gains}
    found = {k: v for k, v in header.items() if k != '__metadata__'}
    # Where an attention's gain is not among the weights, it is 1.
    expected |= {k: torch.empty((), dtype=torch.float64) for k in gains & set(found)}
    problems = []
    if missing := sorted(set(expected) - set(found)):
        problems.append(f'{len(missing)} missing: {some(missing)}')
    if extra := sorted(set(found) - set(expected)):
        problems.append(f'{len(extra)} that do not belong: {some(extra)}')
    shapes = [
        f'{k} {found[k]["shape"]} instead of {list(expected[k].shape)}'
        for k in sorted(set(expected) & set(found))
        if found[k]['shape'] != list(expected[k].shape)
    ]
    if shapes:
        problems.append(f'{len(shapes)} of another shape: {some(shapes)}')
    kinds = [
        f'{k} {found[k]["dtype"]}'
        for k in sorted(set(expected) & set(found))
        if (found[k]['dtype'] in FLOATS) != expected[k].is_floating_point()
    ]
    if kinds:
        problems.append(f'{len(kinds)} of another kind of number: {some(kinds)}')
    if problems:
        raise HubFileError(f'{where} does not fit the {type(model).__name__} of {CONFIG}: {"; ".join(problems)}')


def some(names: list[str], limit: int = 12) -> str:
    return ', '.join(names[:limit]) + (f', ... ({len(names) - limit} more)' if len(names) > limit else '')


def _finite(values: Tensor) -> bool:
    # NaN and infinity survive a sum, which is ten times faster than a look at each number.
    return bool(values.sum(dtype=torch.float64).isfinite()) or bool(values.isfinite().all())


def check_weights(state_dict: Mapping[str, Tensor], where: str = WEIGHTS, gains: frozenset[str] = frozenset()) -> None:
    """Refuses weights that hold NaN or infinite values.

    Args:
        state_dict: Tensors by name.
        where: The file's name for the message.
        gains: Keys of gains, which must be positive.

    Raises:
        HubFileError: Names the tensors.
    """
    bad = [k for k, v in state_dict.items() if v.is_floating_point() and not _finite(v)]
    if bad:
        raise HubFileError(f'{where} holds NaN or infinite values in {len(bad)} tensors: {some(bad)}')
    for key in gains & set(state_dict):
        try:
            read_gain(state_dict[key], key)
        except ValueError as e:
            raise HubFileError(f'{where}: {e}') from e
