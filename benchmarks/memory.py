"""Counts bytes: kept for backward, at the peak of a step, and moved by it; every attention at depth 50, and its peers.

    python benchmarks/memory.py      # ten minutes; kept and moved bytes are exact and the same on every machine

Batch 2 of 224x224 in float32, written to results/memory.json. What is moved is counted once for each operation, an
operand read twice or served by a cache included.
"""

import json
from datetime import datetime, timezone
from pathlib import Path

import timm
import torch
from peers import peers
from torch import nn

import timm_attn
from timm_attn.files import atomic_write
from timm_attn.fusion import fuse
from timm_attn.measure import environment, kept_bytes, peak_bytes, traffic_bytes

RESULTS = Path(__file__).parent / 'results'


def row(label: str, model: nn.Module, x: torch.Tensor) -> dict[str, object]:
    model.train()
    found = {'kept_bytes': kept_bytes(model, x), 'peak_bytes': peak_bytes(model, x), 'traffic': traffic_bytes(model, x)}
    print(f'{label:28}', *(f'{v:14,}' for v in found.values()), flush=True)
    return {'model': label, **found}


def main() -> None:
    torch.set_num_threads(1)
    x = torch.zeros(2, 3, 224, 224)
    rows = [row('plain', timm.create_model('resnet50'), x)]
    rows += [row('plain fused', fuse(timm.create_model('resnet50')), x)]
    for attn in timm_attn.list_attn():
        model = timm.create_model(f'{attn}_resnet50')
        rows.append(row(attn, model, x))
        rows.append(row(f'{attn} fused', fuse(model), x))
        rows += [row(label, build(), x) for label, build in peers(attn).items()]
    plain = rows[0]
    for r in rows:
        for key in ('kept_bytes', 'peak_bytes', 'traffic'):
            r[f'{key}_ratio'] = r[key] / plain[key]  # pyright: ignore[reportOperatorIssue]
    report = {
        'command': 'python benchmarks/memory.py',
        'date': datetime.now(timezone.utc).date().isoformat(),
        'batch': 2,
        'size': 224,
        'dtype': 'float32',
        'environment': environment(),
    }
    with atomic_write(RESULTS / 'memory.json') as path:
        path.write_text(json.dumps({**report, 'rows': rows}, indent=1) + '\n')


if __name__ == '__main__':
    main()
