"""Counts the bytes that a training-mode forward pass keeps: every attention at depth 50, eager, fused and by peers.

    python benchmarks/memory.py      # two minutes; the numbers are exact and the same on every machine

Batch 2 of 224x224 in float32, written to results/memory.json.
"""

import json
from pathlib import Path

import timm
import torch
from peers import peers
from torch import nn

import timm_attn
from timm_attn._checks import atomic_write
from timm_attn.bench import kept_bytes
from timm_attn.fusion import fuse

RESULTS = Path(__file__).parent / 'results'


def row(label: str, kept: int, plain: int) -> dict[str, object]:
    print(f'{label:28} {kept:12,} {kept / plain:6.3f}', flush=True)
    return {'model': label, 'kept_bytes': kept, 'ratio': kept / plain}


def main() -> None:
    torch.set_num_threads(1)
    x = torch.zeros(2, 3, 224, 224)

    def kept(model: nn.Module) -> int:
        return kept_bytes(model.train(), x)

    plain = kept(timm.create_model('resnet50'))
    rows = [row('plain', plain, plain), row('plain fused', kept(fuse(timm.create_model('resnet50'))), plain)]
    for attn in timm_attn.list_attn():
        model = timm.create_model(f'{attn}_resnet50')
        rows.append(row(attn, kept(model), plain))
        rows.append(row(f'{attn} fused', kept(fuse(model, compile=False)), plain))
        rows.append(row(f'{attn} fused compiled', kept(fuse(model)), plain))
        rows += [row(label, kept(build()), plain) for label, build in peers(attn).items()]
    report = {'batch': 2, 'size': 224, 'dtype': 'float32', 'torch': torch.__version__, 'timm': timm.__version__}
    with atomic_write(RESULTS / 'memory.json') as path:
        path.write_text(json.dumps({**report, 'rows': rows}, indent=1) + '\n')


if __name__ == '__main__':
    main()
