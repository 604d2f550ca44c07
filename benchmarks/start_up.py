"""Time of the first step of a process, fused and by torch.compile: `python benchmarks/start_up.py`.

Every step is the first of a process of its own, with one thread: batch 4, 224 x 224, float32. Before that of `nothing`
no compiler ran on the machine. Before that of `header` inductor has compiled torch's headers, which it keeps with the
user's temporary files, and its cache is empty. Before that of `everything` another process took the same step. Imports
of torch, timm and timm_attn are not counted, those of inductor are.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch

import timm_attn
from timm_attn.files import atomic_write
from timm_attn.measure import environment

MODELS = ('resnet50', 'se_resnet50', 'cbam_resnet50', 'triplet_resnet50')
# torch.compile takes minutes.
COMPILED = ('cbam_resnet50',)


def step(name: str, way: str, mode: str) -> dict[str, float]:
    """Seconds of the first step, and of the fastest of three later ones."""
    torch.set_num_threads(1)
    model: Any = timm.create_model(name).train(mode == 'train')
    model = timm_attn.fuse(model) if way == 'fused' else torch.compile(model)
    x = torch.randn(4, 3, 224, 224)
    seconds: list[float] = []
    for _ in range(4):
        start = time.perf_counter()
        with torch.set_grad_enabled(mode == 'train'):
            y = model(x)
            if mode == 'train':
                y.sum().backward()
        seconds.append(time.perf_counter() - start)
    return {'first': seconds[0], 'later': min(seconds[1:])}


def measured(folder: str, *what: str, **env: str) -> dict[str, float]:
    """`step` in a process whose temporary files are in the folder."""
    command = [sys.executable, __file__, '--step', *what]
    own = {k: v for k, v in os.environ.items() if not k.startswith('TORCHINDUCTOR_')}
    own |= {'TMPDIR': folder, 'OMP_NUM_THREADS': '1', **env}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=own, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--step', nargs=3, metavar=('MODEL', 'WAY', 'MODE'), help='take these steps in this process')
    parser.add_argument('--models', nargs='+', default=MODELS)
    parser.add_argument('--out', type=Path, default=Path(__file__).parent / 'results/start_up.json')
    args = parser.parse_args()
    if args.step:
        print(json.dumps(step(*args.step)))
        return
    rows: list[dict[str, Any]] = []
    for name in args.models:
        for way in ('fused', 'torch.compile') if name in COMPILED else ('fused',):
            for mode in ('train', 'inference'):
                with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
                    found = {'nothing': measured(folder, name, way, mode)}
                    found['everything'] = measured(folder, name, way, mode)
                    found['header'] = measured(folder, name, way, mode, TORCHINDUCTOR_CACHE_DIR=cache)
                rows.append({'model': name, 'way': way, 'mode': mode, **found})
                print(rows[-1], flush=True)
    record = {
        'command': 'python benchmarks/start_up.py',
        'date': date.today().isoformat(),
        'environment': environment(),
        'rows': rows,
    }
    with atomic_write(args.out) as path:
        path.write_text(json.dumps(record, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
