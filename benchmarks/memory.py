"""Counts bytes: kept for backward, at the peak of a step, and moved by it; every attention at depth 50, and its peers.

    python benchmarks/memory.py           # what results/memory.json has not; ten minutes for all
    python benchmarks/memory.py --ours    # ours again, after a change; the peers' rows stay

Batch 2 of 224x224 in float32; kept and moved bytes are exact and the same on every machine. What is moved is counted
once for each operation, an operand read twice or served by a cache included.
"""

import argparse
import json
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from peers import Build, peers
from torch import nn

import timm_attn
from timm_attn.bench import BASELINE, entrants
from timm_attn.files import atomic_write
from timm_attn.measure import environment, kept_bytes, peak_bytes, traffic_bytes

RESULTS = Path(__file__).parent / 'results'
COUNTS = ('kept_bytes', 'peak_bytes', 'traffic')


def row(label: str, model: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    model.train()
    found = {'kept_bytes': kept_bytes(model, x), 'peak_bytes': peak_bytes(model, x), 'traffic': traffic_bytes(model, x)}
    print(f'{label:28}', *(f'{v:14,}' for v in found.values()), flush=True)
    return {'model': label, **found}


def models() -> Iterator[tuple[str, Build, bool]]:
    """Label, how to build it, whether it is a peer's."""
    for attn in ('', *timm_attn.list_attn()):
        names = [f'{attn}_resnet50'] if attn else []
        ours = entrants(names, 'resnet50', ['eager', 'fused'])
        for label, build in ours.items():
            if attn and not label.startswith(BASELINE):
                yield label.replace(names[0], attn), build, False
            elif not attn:
                yield label, build, False
        for label, build in peers(attn).items():
            yield label, build, True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--ours', action='store_true', help='count ours again')
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / 'memory.json'
    old = json.loads(path.read_text(encoding='utf-8'))['rows'] if path.exists() else []
    kept = {r['model']: {k: r[k] for k in ('model', *COUNTS)} for r in old}
    todo = list(models())
    rows = {label: kept[label] for label, _, peer in todo if label in kept and (peer or not args.ours)}
    x = torch.zeros(2, 3, 224, 224)
    for label, build, _ in todo:
        rows[label] = rows.get(label) or row(label, build(), x)
    plain = rows[BASELINE]
    report = {
        'command': 'python benchmarks/memory.py',
        'date': datetime.now(timezone.utc).date().isoformat(),
        'batch': 2,
        'size': 224,
        'dtype': 'float32',
        'environment': environment(),
        'rows': [rows[label] | {f'{k}_ratio': rows[label][k] / plain[k] for k in COUNTS} for label, *_ in todo],
    }
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
