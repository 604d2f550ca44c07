"""What tensors may be weights: floating point, finite in the model's type, variances that are none below 0."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .unwrap import some

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
COUNTER, VARIANCE = 'num_batches_tracked', 'running_var'


def check_tensors(state_dict: Mapping[str, Tensor]) -> None:
    """Refuses tensors that are no plain floating-point weights; no value is read.

    Args:
        state_dict: Tensors by name; only those named `num_batches_tracked` may hold integers.

    Raises:
        ValueError: Names every tensor of another type or layout.
    """
    bad = [f"'{k}' is {what}" for k, v in state_dict.items() if (what := _strange(k, v))]
    if bad:
        raise ValueError(
            f'{len(bad)} tensors are no weights: {some(bad, 100)}. Expected dense float64, float32, float16 or '
            'bfloat16; save the checkpoint again so, with quantised weights multiplied out.'
        )


def _strange(key: str, value: Tensor) -> str:
    if value.layout != torch.strided or value.is_nested:
        return 'nested' if value.is_nested else str(value.layout).removeprefix('torch.')
    if value.is_quantized or value.device.type == 'meta':
        return 'quantised' if value.is_quantized else 'without values, on the meta device'
    counter = key.rpartition('.')[2] == COUNTER
    allowed = FLOATS + INTEGERS if counter else FLOATS
    return '' if value.dtype in allowed else str(value.dtype).removeprefix('torch.')


def check_values(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuses weights that are not finite in the model's type, negative variances, counters that count nothing.

    Args:
        state_dict: Tensors by name; those that the model has, of its shapes.
        expected: The model's, on any device: their types are wanted.

    Raises:
        ValueError: Names every such tensor.
    """
    like = {k: expected[k].dtype if k in expected and expected[k].is_floating_point() else None for k in state_dict}
    infinite = [k for k, v in state_dict.items() if v.is_floating_point() and not _finite(v, like[k])]
    if infinite:
        kinds = {str(like[k] or state_dict[k].dtype).removeprefix('torch.') for k in infinite}
        raise ValueError(
            f'{len(infinite)} tensors hold NaN or infinite values once they are {" or ".join(sorted(kinds))}, so the '
            f'file is no usable model: {some(infinite)}'
        )
    bad = [f"'{k}' {what}" for k, v in state_dict.items() if (what := _wrong(k, v))]
    if bad:
        raise ValueError(f'{len(bad)} tensors hold what their names do not allow: {some(bad)}.')


def _finite(value: Tensor, dtype: torch.dtype | None) -> bool:
    value = value.detach().to(dtype or value.dtype)
    # NaN and infinity survive a sum, which is ten times faster than a look at each number.
    return bool(value.sum(dtype=torch.float64).isfinite()) or bool(value.isfinite().all())


def _wrong(key: str, value: Tensor) -> str:
    last = key.rpartition('.')[2]
    if last == VARIANCE and bool((value < 0).any()):
        return f'is negative ({value.min().item():g}), and a variance is not'
    if last == COUNTER and (value.numel() != 1 or value.item() < 0 or value.item() % 1):
        return f'(={value.flatten()[:3].tolist()}) counts batches, so it is one number from 0 on'
    return ''
