"""The widest gap between each attention and its authors' code, in float64, from the golden files.

    python benchmarks/parity.py      # seconds; writes results/parity.json

Compares outputs, gradients and running statistics, in evaluation and in training, through the table of the test.
"""

import importlib.util
import json
import math
import sys
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file

from timm_attn.files import atomic_write

RESULTS = Path(__file__).parent / 'results'
TEST = Path(__file__).parents[1] / 'tests' / 'layers' / 'test_parity.py'


def _test() -> ModuleType:
    spec = importlib.util.spec_from_file_location('test_parity', TEST)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks its own module up
    spec.loader.exec_module(module)
    return module


def _kind(key: str) -> str:
    part = key.split('/')[1]
    return {'y': 'output', 'gx': 'input gradient', 'gp': 'parameter gradients'}.get(part.split('_')[0], 'buffers')


def main() -> None:
    test = _test()
    gaps: dict[str, dict[str, float]] = {}
    shares: dict[str, float] = {}
    for path in test.FILES:
        name = path.name.removesuffix('_module.safetensors')
        compared = list(test.compare(name, load_file(path)))
        gaps[name] = {}
        for key, gap, _ in compared:
            # A NaN would lose every comparison, and is the widest gap there is.
            gap = math.inf if math.isnan(gap) else gap
            gaps[name][_kind(key)] = max(gap, gaps[name].get(_kind(key), 0.0))
        shares[name] = max(math.inf if math.isnan(share) else share for *_, share in compared)
        print(f'{name:16} {len(compared):4} tensors, worst {shares[name]:.3f} of the tolerance')
    report = {
        'command': 'python benchmarks/parity.py',
        'date': datetime.now(timezone.utc).date().isoformat(),
        'torch': torch.__version__,
        'tolerance': {'absolute': test.ATOL, 'relative, gradients of parameters': test.RTOL_PARAMETERS},
        'gaps': gaps,
        'largest share of the tolerance': shares,
    }
    with atomic_write(RESULTS / 'parity.json') as path:
        path.write_text(json.dumps(report, indent=1) + '\n')


if __name__ == '__main__':
    main()
