"""`timm-attn quickstart`: from nothing to a trained, saved and explained attention ResNet."""

import argparse
import os
import sys

from ..lab.presets import PRESETS
from ..lab.quickstart import quickstart


def add_parser(commands: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Adds `quickstart` to the command line."""
    p = commands.add_parser(
        'quickstart',
        help='train, save and explain a small attention ResNet on handwritten digits',
        description='Trains a small plain ResNet and its SE, CBAM, BAM and GAM versions on the handwritten digits '
        'inside scikit-learn, in about a minute on two cores without a network, and saves the best attention model.',
        epilog='example: timm-attn quickstart --out runs/quickstart',
    )
    p.add_argument('--out', default='runs/quickstart', help='folder of the model (default: runs/quickstart)')
    p.add_argument('--jobs', type=int, default=_cores(), help='processes (default: one per core, here %(default)s)')
    p.add_argument('--epochs', type=int, help='instead of 12')
    p.add_argument('--device', help='cpu or cuda (default: cpu)')
    p.add_argument('--smoke', action='store_true', help='a trial: few images, two epochs')
    p.set_defaults(run=_main)


def _main(args: argparse.Namespace) -> None:
    print('Training five small ResNets on handwritten digits ...', file=sys.stderr)
    settings = {k: v for k in ('epochs', 'device') if (v := getattr(args, k)) is not None}
    quickstart(args.out, jobs=args.jobs, smoke=args.smoke, **settings)


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return min(cores, len(PRESETS['digits'].models))
