"""`timm-attn bench`: times models beside plain timm, counts the bytes they keep for backward, says what to do."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import timm
import torch

from ..bench import COMPILED, DTYPES, MODES, advice, autocast, entrants, rounds_of, summary, table
from ..files import atomic_write
from ..layers import did_you_mean
from ..measure import environment, kept_bytes


def add_parser(commands: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Adds the command `bench`."""
    parser = commands.add_parser(
        'bench',
        help='time models beside plain timm, count the bytes they keep for backward, and say what to do',
        epilog='example: timm-attn bench se_resnet50 cbam_resnet50 --mode train --batch 4',
    )
    parser.add_argument('models', nargs='+', help='registered models, such as cbam_resnet50')
    parser.add_argument('--baseline', default='resnet50', help="timm's plain model (default: resnet50)")
    parser.add_argument('--mode', choices=MODES, default='inference', help='inference or training step')
    parser.add_argument('--batch', type=int, default=4, help='images in a batch (default: 4)')
    parser.add_argument('--size', type=int, default=224, help='side of the images (default: 224)')
    parser.add_argument('--dtype', choices=DTYPES, default='float32', help='bfloat16 is autocast')
    parser.add_argument('--rounds', type=int, default=10, help='timed steps of each model (default: 10)')
    parser.add_argument('--threads', type=int, default=1, help='threads (default: 1)')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--channels-last', action='store_true', help='weights and images in that memory format')
    parser.add_argument('--no-compile', action='store_true', help='fuse without torch.compile')
    parser.add_argument('--torch-compile', action='store_true', help='measure torch.compile(model) too: minutes')
    parser.add_argument('--out', type=Path, help='write the numbers to this JSON file')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """The command `bench`."""
    unknown = [name for name in [args.baseline, *args.models] if not timm.is_model(name)]
    if unknown:
        meant = did_you_mean(unknown[0], timm.list_models())
        raise ValueError(f"Unknown models {unknown}.{meant} 'timm-attn list' shows those of timm_attn.")
    if args.rounds < 1 or args.batch < 1 or args.size < 32 or args.threads < 1:
        raise ValueError('--rounds, --batch and --threads must be at least 1, and --size at least 32.')
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        ways = ['eager', 'fused', *(['frozen'] if args.mode == 'inference' else [])]
        ways += ['compiled'] if args.torch_compile else []
        builds = entrants(args.models, args.baseline, ways, compile=not args.no_compile)
        print(f'{len(builds)} models, {args.rounds} rounds ...', file=sys.stderr)
        shape = {key: getattr(args, key) for key in ('batch', 'size', 'dtype', 'device', 'channels_last')}
        found = rounds_of(builds, args.mode, rounds=args.rounds, **shape)
        if args.mode == 'train':
            x = torch.zeros(args.batch, 3, args.size, args.size, device=args.device)
            for label in [label for label in builds if not label.endswith(COMPILED)]:
                with torch.device(args.device):
                    model = builds[label]().train()
                found[label]['kept_bytes'] = kept_bytes(model, x, lambda: autocast(args.device, args.dtype))
        rows = summary(found)
        report = {'environment': environment(args.device), **_options(args), 'rows': rows}
    finally:
        torch.set_num_threads(threads)
    print(table(rows))
    for name in args.models:
        print(advice(found, name))
    if args.out:
        with atomic_write(args.out) as path:
            path.write_text(json.dumps(report, indent=1) + '\n')


def _options(args: argparse.Namespace) -> dict[str, Any]:
    keys = ('mode', 'baseline', 'batch', 'size', 'dtype', 'rounds', 'channels_last')
    return {key: getattr(args, key) for key in keys}
