"""What `inject` does with every architecture of timm: `python benchmarks/scan_timm.py [PATTERN]`.

Each is built on the meta device and asked for attention in its own slots (`at=None`) and at its stages. Accepted or
refused with a ValueError are the only outcomes; anything else is counted as a fault. Those of at most 60 M parameters
that are accepted are also built in memory, and their output has to stay the same to the bit.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import timm_attn

SMALL = 60e6


def stages(model: Any) -> list[str] | None:
    """Names of the modules that feature_info lists."""
    infos = [i.get('module') for i in getattr(model, 'feature_info', ()) if isinstance(i, dict)]
    return [i.replace('.', r'\.') for i in infos if i] or None


def outcome(name: str, staged: bool, device: str) -> str:
    """'accepted N', 'refused: why', or 'fault: what'."""
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = timm.create_model(name).eval()
    at = stages(model) if staged else None
    if staged and at is None:
        return 'refused: lists no stages'
    x = None
    if device == 'cpu':
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.weight, 0.75, 1.25)
        x = torch.randn(1, *model.pretrained_cfg['input_size'])
        with torch.no_grad():
            before = model(x)
    try:
        for fmt in ('NCHW', 'NHWC') if staged else ('NCHW',):
            try:
                timm_attn.inject(model, 'eca', at=at, fmt=fmt)
                break
            except ValueError as e:
                if "pass fmt='NHWC'" not in str(e):
                    raise
    except ValueError as e:
        return f'refused: {e}'
    except Exception as e:
        return f'fault: {type(e).__name__}: {e}'
    if x is not None:
        with torch.no_grad():
            after = model(x)
        if not torch.equal(after, before):
            return f'fault: output moved by {(after - before).abs().max():.3g}'
    return f'accepted {len(timm_attn.attn_sites(model))}'


def reason(text: str) -> str:
    """A refusal in few words, for counting."""
    for mark, words in (
        ('no empty attention slot', 'no empty slot'),
        ('not with attention in its empty slots', 'what looks like a slot is none'),
        ('tokens', 'tokens, not maps'),
        ('attention needs', 'no map'),
        ('more than once', 'called more than once'),
        ('never calls', 'never called'),
        ('by iteration', 'a container that does more than run its children'),
        ('lists no stages', 'lists no stages'),
        ('matches no module', 'feature_info names no module'),
        ('no Conv2d', 'no convolution'),
        ('Pass `example`', 'needs an example'),
        ('leaves no channel', 'too few channels'),
    ):
        if mark in text:
            return words
    return text[:80]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('pattern', nargs='?', default='*')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent / 'results/scan.json')
    parser.add_argument('--first', action='store_true', help='one architecture of each module of timm')
    parser.add_argument('--memory', action='store_true', help='also compare outputs of those that are small enough')
    args = parser.parse_args()
    ours = {n for m in ('attn_resnet', 'sk_resnet', 'simple_cnn', 'injected') for n in timm.list_models(module=m)}
    names = [n for n in timm.list_models(args.pattern) if n not in ours and not n.startswith('test_')]
    rows: dict[str, dict[str, str]] = {}
    seen: set[str] = set()
    for name in names:
        family = timm.model_entrypoint(name).__module__.rsplit('.', 1)[-1]
        if args.first and family in seen:
            continue
        seen.add(family)
        with torch.device('meta'):
            small = sum(p.numel() for p in timm.create_model(name).parameters()) <= SMALL
        device = 'cpu' if args.memory and small else 'meta'
        rows[name] = {'family': family, 'device': device}
        rows[name] |= {key: outcome(name, key == 'stages', device) for key in ('slots', 'stages')}
        print(name, rows[name], flush=True)
    record = {'timm': timm.__version__, 'torch': torch.__version__, 'attn': 'eca', 'rows': rows}
    args.out.write_text(json.dumps(record, indent=1) + '\n', encoding='utf-8')
    for key in ('slots', 'stages'):
        counts = Counter(reason(r[key]) if 'accepted' not in r[key] else 'accepted' for r in rows.values())
        print(key, dict(counts))


if __name__ == '__main__':
    main()
