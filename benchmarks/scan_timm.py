"""What `inject` does with every architecture of timm: `python benchmarks/scan_timm.py [PATTERN]`.

Each is asked for attention in its own slots (`at=None`) and at its stages. Accepted or refused with a ValueError are
the only outcomes; anything else is a fault. One of each family, the first of at most 60 M parameters, is built in
memory, and its output has to stay the same to the bit; all others are built on the meta device. Rows are written as
they come, and a second call goes on with those that are missing.
"""

import argparse
import json
from collections import Counter
from datetime import date
from pathlib import Path
from time import monotonic
from typing import Any

import timm
import torch
from torch import nn

import timm_attn
from timm_attn.files import atomic_write
from timm_attn.measure import environment

SMALL = 60e6


def stages(model: Any) -> list[str] | None:
    """Names of the modules that feature_info lists."""
    infos = [i.get('module') for i in getattr(model, 'feature_info', ()) if isinstance(i, dict)]
    return [i.replace('.', r'\.') for i in infos if i] or None


def images(model: Any) -> list[tuple[int, ...]]:
    """Shapes of images to try: small ones first."""
    channels, *size = model.pretrained_cfg['input_size']
    return [(1, channels, 128, 128), (1, channels, *size)]


def alive(model: nn.Module) -> nn.Module:
    """Gives BatchNorms weights that do not hide what stands before them."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.75, 1.25)
    return model


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output of a model, the first where there are several."""
    found = model(x)
    return found[0] if isinstance(found, list | tuple) else found


@torch.no_grad()
def outcome(name: str, staged: bool, device: str) -> str:
    """'accepted N', 'refused: why', 'not built: why', or 'fault: what'."""
    torch.manual_seed(0)
    try:
        with torch.device(device):
            model: Any = alive(timm.create_model(name).eval())
    except Exception as e:
        return f'not built: {type(e).__name__}: {e}'
    at = stages(model) if staged else None
    if staged and at is None:
        return 'refused: lists no stages'
    x = before = None
    if device == 'cpu':
        for shape in images(model):
            try:
                x = torch.randn(shape)
                before = output(model, x)
                break
            except (RuntimeError, AssertionError, ValueError):
                continue
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
    found = len(timm_attn.attn_sites(model))
    if x is None or before is None:
        return f'accepted {found}'
    after = output(model, x)
    if not torch.equal(after, before):
        return f'fault: output moved by {(after - before).abs().max():.3g}'
    return f'accepted {found}, equal'


def verdict(text: str) -> str:
    """An outcome in few words, for counting: what is accepted and computes the same, a fault, or why it is refused."""
    if text.startswith('accepted'):
        return 'accepted'
    if text.startswith('fault'):
        return 'a fault'
    if text.startswith('not built'):
        return 'timm does not build it there'
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
    parser.add_argument('--out', type=Path, default=Path(__file__).parent / 'results/scan_timm.json')
    parser.add_argument('--seconds', type=float, default=float('inf'), help='stop after so many')
    args = parser.parse_args()
    ours = {n for m in ('attn_resnet', 'sk_resnet', 'simple_cnn', 'injected') for n in timm.list_models(module=m)}
    names = [n for n in timm.list_models(args.pattern) if n not in ours and not n.startswith('test_')]
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(timm.model_entrypoint(name).__module__.rsplit('.', 1)[-1], []).append(name)
    record: dict[str, Any] = {
        'command': 'python benchmarks/scan_timm.py',
        'date': date.today().isoformat(),
        'environment': environment(),
        'attention': 'eca',
        'architectures': len(names),
        'families': len(families),
        'rows': {},
    }
    if args.out.exists():
        old = json.loads(args.out.read_text(encoding='utf-8'))
        same = ('attention', 'architectures', 'families')
        if all(old[k] == record[k] for k in same) and old['environment']['timm'] == record['environment']['timm']:
            record['rows'] = old['rows']
    rows, start = record['rows'], monotonic()

    def scan(name: str, family: str, device: str) -> None:
        rows[name] = {'family': family, 'device': device}
        rows[name] |= {key: outcome(name, key == 'stages', device)[:400] for key in ('slots', 'stages')}
        print(name, rows[name], flush=True)
        with atomic_write(args.out) as path:
            path.write_text(json.dumps(record, indent=1) + '\n', encoding='utf-8')

    # One of each family in memory, the first that is small enough; then all others on the meta device.
    for family, members in families.items():
        for name in members:
            if monotonic() - start > args.seconds or any(rows.get(n, {}).get('device') == 'cpu' for n in members):
                break
            with torch.device('meta'):
                try:
                    small = sum(p.numel() for p in timm.create_model(name).parameters()) <= SMALL
                except Exception:
                    small = True  # not for the meta device
            if small:
                scan(name, family, 'cpu')
    for family, members in families.items():
        for name in members:
            if name not in rows and monotonic() - start < args.seconds:
                scan(name, family, 'meta')
    for key in ('slots', 'stages'):
        print(key, dict(Counter(verdict(r[key]) for r in rows.values())))


if __name__ == '__main__':
    main()
