"""`timm-attn bench`: times models beside plain timm, and counts the bytes they keep for backward."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import timm
import torch

from ..bench import DTYPES, MODES, entrants, rounds_of, summary, table
from ..files import atomic_write
from ..measure import environment, kept_bytes


def add_parser(commands: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Adds the command `bench`."""
    parser = commands.add_parser(
        'bench',
        help='time models beside plain timm, and count the bytes they keep for backward',
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
    parser.add_argument('--no-compile', action='store_true', help='fuse without torch.compile')
    parser.add_argument('--out', type=Path, help='write the numbers to this JSON file')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """The command `bench`."""
    unknown = [name for name in [args.baseline, *args.models] if not timm.is_model(name)]
    if unknown:
        raise ValueError(f"Unknown models {unknown}. 'timm-attn list' shows those of timm_attn.")
    if args.rounds < 1 or args.batch < 1 or args.size < 32 or args.threads < 1:
        raise ValueError('--rounds, --batch and --threads must be at least 1, and --size at least 32.')
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        builds = entrants(args.models, args.baseline, args.mode, not args.no_compile)
        print(f'{len(builds)} models, {args.rounds} rounds ...', file=sys.stderr)
        rows = summary(
            rounds_of(
                builds,
                args.mode,
                batch=args.batch,
                size=args.size,
                dtype=args.dtype,
                rounds=args.rounds,
                device=args.device,
            )
        )
        if args.mode == 'train' and args.dtype == 'float32':
            x = torch.zeros(args.batch, 3, args.size, args.size, device=args.device)
            for row in rows:
                row['kept_bytes'] = kept_bytes(builds[row['model']]().to(args.device).train(), x)
        report = {'environment': environment(args.device), **_options(args), 'rows': rows}
    finally:
        torch.set_num_threads(threads)
    print(table(rows))
    if args.out:
        with atomic_write(args.out) as path:
            path.write_text(json.dumps(report, indent=1) + '\n')


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {key: getattr(args, key) for key in ('mode', 'baseline', 'batch', 'size', 'dtype', 'rounds')}
