"""`timm-attn compare`: trains several models with several seeds, and says which differ."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from timm.utils import ParseKwargs

from ..explain.images import skipped_line
from ..lab import tables
from ..lab.compare import compare, write_report
from ..lab.comparison import Comparison
from ..lab.data import DATA, load_data
from ..lab.export import best_run, export
from ..lab.presets import PRESETS, SMOKE_IMAGES, SMOKE_SEEDS, SMOKE_SETTINGS
from ..lab.train import Entry, Settings

_DEFAULTS: dict[str, Any] = dict(epochs=15, batch_size=64)


def add_parser(commands: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Adds `compare` to the command line."""
    p = commands.add_parser(
        'compare',
        help='train several models with several seeds, and say honestly which differ',
        description='Trains each model with each seed; the others are compared with the first, seed by seed.\n'
        'The same command goes on where a killed one stopped.\n\npresets:\n'
        + '\n'.join(f'  {name:13} {preset.about}' for name, preset in PRESETS.items()),
        epilog='example: timm-attn compare --models resnet18,se_resnet18,gam_resnet18 --data digits --cifar-stem '
        '--seeds 5 --jobs 2 --out runs/digits',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument('--preset', choices=list(PRESETS), help='models, data and settings by name; other options override')
    p.add_argument('--models', help='names for timm.create_model, separated by commas; LABEL=NAME gives one a label')
    p.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='K=V', help='for all models')
    p.add_argument('--cifar-stem', action='store_true', help='3x3 stem without max-pool, for images of 16 to 64 pixels')
    p.add_argument('--pretrained', action='store_true', help="start from each model's pretrained weights")
    p.add_argument('--data', help=f'{", ".join(DATA)}, or a folder of images')
    p.add_argument('--data-dir', help='where the named data sets lie (default: ~/.cache/timm_attn/data)')
    p.add_argument('--val-dir', help='folder of the images to measure on, where DATA holds no split of that kind')
    p.add_argument('--test-dir', help='the same, measured on where there is no --val-dir')
    p.add_argument('--download', action='store_true', help='fetch a named data set that is not there')
    p.add_argument('--out', required=True, help='folder of the results')
    p.add_argument('--seeds', type=int, help='how many (default: 3)')
    p.add_argument('--jobs', type=int, default=1, help='processes on this machine')
    p.add_argument('--shard', default='1/1', metavar='I/N', help='do the I-th of N parts, for job arrays; I from 1')
    p.add_argument('--report', action='store_true', help='train nothing, merge what --out holds')
    p.add_argument('--smoke', action='store_true', help='a trial: few images, two epochs, two seeds, small models')
    p.add_argument('--save-weights', action='store_true', help='keep the final weights in OUT/checkpoints')
    p.add_argument('--save-best', action='store_true', help='write the most accurate run to OUT/best as a model')
    p.add_argument('--workers', type=int, default=0, help='processes per run that decode images')
    s = p.add_argument_group('settings (default: those of the preset, or of Settings)')
    s.add_argument('--epochs', type=int)
    s.add_argument('--batch-size', type=int)
    s.add_argument('--img-size', type=int)
    s.add_argument('--opt', help="timm's name of an optimizer")
    s.add_argument('--lr', type=float, help='default: 0.05, with --pretrained 0.01')
    s.add_argument('--weight-decay', type=float)
    s.add_argument('--momentum', type=float)
    s.add_argument('--sched', help="timm's name of a schedule")
    s.add_argument('--warmup-epochs', type=int)
    s.add_argument('--smoothing', type=float)
    s.add_argument('--clip-grad', type=float)
    s.add_argument('--amp', action='store_true', default=None, help='bfloat16 autocast')
    s.add_argument('--device', help='cpu or cuda (default: cpu)')
    p.set_defaults(run=_main)


def _main(args: argparse.Namespace) -> None:
    if args.report:
        table, missing, text = write_report(args.out)
    else:
        shard = _shard(args.shard)
        comparison = from_arguments(args)
        runs = compare(
            comparison,
            args.out,
            jobs=args.jobs,
            shard=shard,
            workers=args.workers,
            save_weights=args.save_weights or args.save_best,
        )
        if shard[1] > 1:
            _say(f'Part {args.shard} is done. When all are: timm-attn compare --report --out {args.out}')
            return
        table, missing, text = write_report(args.out)
        if args.save_best:
            _save_best(comparison, runs, Path(args.out))
    print(text)
    print()
    print(tables.summary(table))
    if missing:
        _say(f'{len(missing)} runs are not finished: {", ".join(missing)}')
    _say(f'Written to {args.out}: report.md, comparison.png, curves.png, results.json')


def _save_best(comparison: Comparison, runs: list[dict[str, Any]], out: Path) -> None:
    found = best_run(comparison, runs)
    if found is None:
        raise ValueError("--save-best: timm's ResNets have no keyword for the 3x3 stem, so none of these can be saved.")
    entry, record = found
    export(comparison, entry, record, out / 'checkpoints', out / 'best', overwrite=True)
    _say(f'Saved {record["run"]} in {out / "best"}')


def from_arguments(args: argparse.Namespace) -> Comparison:
    """What the command line asks for.

    Raises:
        ValueError: Models or data are not given, or unknown.
    """
    preset = PRESETS[args.preset] if args.preset else None
    if args.models:
        models = tuple(_entry(m) for m in args.models.split(',') if m)
    elif preset:
        models = preset.models
    else:
        raise ValueError('Name the models by --models, or choose a --preset.')
    extra = dict(args.model_kwargs)
    if args.smoke and preset and not args.models:
        extra = preset.smoke_args | extra
    if args.cifar_stem:
        extra['cifar_stem'] = True
    models = tuple(replace(m, args=json.loads(json.dumps(m.args | extra))) for m in models)
    name = args.data or (preset.data if preset else None)
    if not name:
        raise ValueError(f'Name the data by --data: {", ".join(DATA)}, or a folder of images.')
    data = load_data(name, data_dir=args.data_dir, download=args.download, val_dir=args.val_dir, test_dir=args.test_dir)
    # What is left out is said before hours are spent, whatever the logging is set to.
    for line in filter(None, [f'Measured on {len(data.val)} images: {data.measured}.', skipped_line(data.skipped)]):
        _say(line)
    chosen: dict[str, Any] = _DEFAULTS | dict(img_size=data.img_size) | (preset.settings if preset else {})
    if args.pretrained and not preset:
        chosen['lr'] = 0.01  # Trained weights are to be kept, not overrun.
    if args.smoke:
        data = data.reduced(*SMOKE_IMAGES)
        chosen |= SMOKE_SETTINGS
    given = {k: getattr(args, k) for k in Settings.__dataclass_fields__ if getattr(args, k, None) is not None}
    # A switch that is off is no wish to switch a preset's off.
    given = {k: v for k, v in given.items() if v is not False}
    seeds = args.seeds or (SMOKE_SEEDS if args.smoke else preset.seeds if preset else 3)
    return Comparison(models, data, Settings(**(chosen | given)), seeds)


def _entry(text: str) -> Entry:
    label, _, name = text.rpartition('=')
    return Entry(label or name, name)


def _shard(text: str) -> tuple[int, int]:
    try:
        part, parts = (int(n) for n in text.split('/'))
    except ValueError as e:
        raise ValueError(f'--shard (={text}) must be I/N, for example 2/8.') from e
    return part, parts


def _say(text: str) -> None:
    print(text, file=sys.stderr)
