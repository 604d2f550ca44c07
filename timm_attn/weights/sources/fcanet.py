"""FcaNet of its authors.

Code: https://github.com/cfzd/FcaNet @aa5fb63 (MIT)
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ...layers.fca import COLUMNS, ROWS, waves
from .base import Source, Target

# The released nets were trained in half precision, which may have rounded the waves; other tables differ by 0.1.
TOLERANCE = 2e-4
_BUFFER = r'^layer(\d)\.\d+\.att\.dct_layer\.weight$'


def check_waves(keys: Mapping[str, Tensor], target: Target, name: str) -> None:
    """Compares the stored waves, which the model computes itself, with the formula.

    Raises:
        ValueError: They are learned, random, or of maps of another size.
    """
    sizes = target.attn_args.get('dct_size', 7)
    for key, stored in keys.items():
        match = re.search(_BUFFER, key)
        if match is None:
            continue
        size = sizes if isinstance(sizes, int) else sizes[min(int(match[1]), len(sizes)) - 1]
        expected = target.shapes.get(f'{key.partition(".att.")[0]}.se.fc2.weight', (0,))[0], size, size
        if tuple(stored.shape) != expected:
            raise ValueError(f"'{key}' is {tuple(stored.shape)}, and {target.name} has waves of shape {expected}.")
        like = torch.empty(0, dtype=torch.float64)
        rows, columns = waves(list(ROWS), size, size, like), waves(list(COLUMNS), size, size, like)  # (16, d)
        formula = rows[:, None, :, None] * columns[:, None, None, :]  # (16, 1, d, d)
        gap = (stored.double().unflatten(0, (16, -1)) - formula).abs().max().item()
        if not gap <= TOLERANCE:  # NaN too
            raise ValueError(
                f"'{key}' departs from the waves of the discrete cosine transform by {gap:.2g}: these are the weights "
                f'of a variant with learned or random filters, which would fit {target.name} and give other logits.'
            )


SOURCE = Source(
    name='fcanet',
    marks={'fca': r'\.att\.(dct_layer\.weight|fc\.0\.weight)$'},
    rules=((r'^(layer\d\.\d+)\.att\.fc\.0\.', r'\1.se.fc1.'), (r'^(layer\d\.\d+)\.att\.fc\.2\.', r'\1.se.fc2.')),
    home='https://github.com/cfzd/FcaNet',
    licence='mit',
    constants=_BUFFER,
    checks=(check_waves,),
)
