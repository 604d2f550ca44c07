"""`timm-attn compare`: trains several models with several seeds, and says which differ."""

import argparse
import ast
import importlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from timm.utils import ParseKwargs

from ..explain.images import skipped_line
from ..lab import tables
from ..lab.compare import check, compare, write_report
from ..lab.comparison import Comparison
from ..lab.data import DATA, load_data
from ..lab.export import best_run, can_be_saved, export
from ..lab.presets import PRESETS, SMOKE_IMAGES, SMOKE_SEEDS, SMOKE_SETTINGS
from ..lab.train import Entry, Settings, build, is_source
from ..layers import attn_sites
from ..optional import require

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
    p.add_argument(
        '--models',
        help='names for timm.create_model, separated by commas; LABEL=NAME gives one a label, NAME:K=V,K=V keywords of '
        'its own; or a YAML file',
    )
    p.add_argument(
        '--import',
        nargs='*',
        default=[],
        metavar='MODULE',
        dest='imports',
        help='modules of your own that register models or attentions',
    )
    p.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='K=V', help='for all models')
    p.add_argument('--cifar-stem', action='store_true', help='3x3 stem without max-pool, for images of 16 to 64 pixels')
    p.add_argument('--pretrained', action='store_true', help="start from each model's pretrained weights")
    p.add_argument('--data', help=f'{", ".join(DATA)}, torch/NAME as timm reads it, or a folder of images')
    p.add_argument('--data-dir', help='where the named data sets lie (default: ~/.cache/timm_attn/data)')
    p.add_argument('--val-dir', help='folder of the images to measure on, where DATA holds no split of that kind')
    p.add_argument('--test-dir', help='the same, measured on where there is no --val-dir')
    p.add_argument('--images', metavar='TRAIN,VAL', help='at most so many images of each split, the classes in turn')
    p.add_argument('--download', action='store_true', help='fetch a named data set that is not there')
    p.add_argument('--out', required=True, help='folder of the results')
    p.add_argument('--seeds', type=int, help='how many (default: 3)')
    p.add_argument('--jobs', type=int, default=1, help='processes on this machine')
    p.add_argument('--launch', choices=['submitit'], help='start --tasks workers by submitit: SLURM, or this machine')
    p.add_argument('--tasks', type=int, default=1, help='workers to launch; any number share --out (default: 1)')
    p.add_argument(
        '--launch-args',
        nargs='*',
        default={},
        action=ParseKwargs,
        metavar='K=V',
        help='for submitit, such as slurm_partition=gpu timeout_min=720 gpus_per_node=1',
    )
    p.add_argument('--wait', action='store_true', help='with --launch: wait for the workers, and report')
    p.add_argument('--report', action='store_true', help='train nothing, merge what --out holds')
    p.add_argument('--smoke', action='store_true', help='a trial: few images, two epochs, two seeds, small models')
    p.add_argument('--save-weights', action='store_true', help='keep the final weights in OUT/checkpoints')
    p.add_argument(
        '--save-best',
        nargs='?',
        const='any',
        choices=['any', 'attention'],
        help='write the most accurate run to OUT/best as a model; with "attention", of the models that have one',
    )
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
    _import(args.imports)
    out = Path(args.out)
    if args.launch and not args.report:
        check(from_arguments(args))  # What is wrong shall be said here, not in the logs of the workers.
        jobs = launch(args, out)
        _say(f'Started: {", ".join(job.job_id for job in jobs)}; logs in {out / "submitit"}.')
        if not args.wait:
            _say(f'When they are done: timm-attn compare --report --out {out}')
            return
        for job in jobs:
            job.result()
    elif not args.report:
        comparison = from_arguments(args)
        candidates = _candidates(comparison, args.save_best) if args.save_best else comparison
        runs = _compare(comparison, args)
        if args.save_best:
            entry, record = best_run(candidates, runs) or (None, None)
            if entry is None or record is None:
                raise ValueError('--save-best: no run of a model that can be saved is finished yet.')
            export(comparison, entry, record, out / 'checkpoints', out / 'best', overwrite=True)
            _say(f'Saved {record["run"]} in {out / "best"}')
    table, missing, text = write_report(out)
    print(text)
    print()
    print(tables.summary(table))
    if missing:
        _say(f'{len(missing)} runs are not finished, or under way elsewhere: {", ".join(missing)}')
    _say(f'Written to {out}: report.md, comparison.png, curves.png, results.json')


def _compare(comparison: Comparison, args: argparse.Namespace, progress: bool = True) -> list[dict[str, Any]]:
    return compare(
        comparison,
        args.out,
        jobs=args.jobs,
        workers=args.workers,
        save_weights=args.save_weights or bool(args.save_best),
        progress=progress,
        imports=args.imports,
    )


def _import(modules: Sequence[str]) -> None:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # As `python -m` does, for modules of the user's own.
    for module in modules:
        importlib.import_module(module)


def launch(args: argparse.Namespace, out: Path) -> list[Any]:
    """Starts workers that share one folder, on SLURM where it is there, else on this machine.

    Args:
        args: The command line; `tasks` says how many, `launch_args` are for submitit's `update_parameters`.
        out: Folder of the results; submitit's logs go to `submitit` in it.

    Raises:
        ValueError: submitit knows no such option.
    """
    if args.tasks < 1:
        raise ValueError(f'--tasks (={args.tasks}) must be at least 1.')
    submitit: Any = require('submitit', 'lab')
    executor = submitit.AutoExecutor(folder=out / 'submitit')
    try:
        executor.update_parameters(**{'name': 'timm-attn', **args.launch_args})
    except (NameError, TypeError, ValueError) as e:
        raise ValueError(f'--launch-args {args.launch_args}: {e}') from e
    held = {k: v for k, v in vars(args).items() if k != 'run'}
    return [executor.submit(_worker, held) for _ in range(args.tasks)]


def _worker(held: dict[str, Any]) -> None:
    """What a launched process does: its share. It writes no report, for which it would have to wait for the others."""
    args = argparse.Namespace(**held)
    _import(args.imports)
    _compare(from_arguments(args), args, progress=False)


def _candidates(comparison: Comparison, which: str) -> Comparison:
    """The models of which the best is saved, known before the first run."""
    models = [m for m in comparison.models if can_be_saved(m)]
    if not models:
        raise ValueError("--save-best: timm's ResNets have no keyword for the 3x3 stem, so none of these can be saved.")
    if which == 'attention':
        settings = replace(comparison.settings, pretrained=False)
        models = [m for m in models if attn_sites(build(m, comparison.data, settings))]
    if not models:
        raise ValueError('--save-best attention: none of the models has attention.')
    return replace(comparison, models=tuple(models))


def from_arguments(args: argparse.Namespace) -> Comparison:
    """What the command line asks for.

    Raises:
        ValueError: Models or data are not given, or unknown.
    """
    preset = PRESETS[args.preset] if args.preset else None
    if args.models:
        models = parse_models(args.models)
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
    chosen: dict[str, Any] = _DEFAULTS | dict(img_size=data.img_size) | (preset.settings if preset else {})
    if args.pretrained and not preset:
        chosen['lr'] = 0.01  # Trained weights are to be kept, not overrun.
    if args.images:
        data = data.reduced(*_two(args.images))
    if args.smoke:
        data = data.reduced(*SMOKE_IMAGES)
        chosen |= SMOKE_SETTINGS
    # What is left out is said before hours are spent, whatever the logging is set to.
    for line in filter(None, [f'Measured on {len(data.val)} images: {data.measured}.', skipped_line(data.skipped)]):
        _say(line)
    given = {k: getattr(args, k) for k in Settings.__dataclass_fields__ if getattr(args, k, None) is not None}
    # A switch that is off is no wish to switch a preset's off.
    given = {k: v for k, v in given.items() if v is not False}
    seeds = args.seeds or (SMOKE_SEEDS if args.smoke else preset.seeds if preset else 3)
    return Comparison(models, data, Settings(**(chosen | given)), seeds)


def parse_models(text: str) -> tuple[Entry, ...]:
    """Models from the command line or a YAML file.

    Args:
        text: Such as 'resnet18,CBAM=cbam_resnet18,injected:base=resnet18,attn=coord,at=layer4.*': what follows a colon
            and has an equals sign is a keyword of that model, up to a word without one, or a semicolon. Or the path of
            a YAML file: a list of names, or of objects with `name`, `label` and `args`.

    Raises:
        ValueError: It is none of these.
    """
    if text.endswith(('.yaml', '.yml')):
        return _models_of_file(Path(text))
    entries = []
    for part in text.split(';'):
        words: list[list[str]] = []  # A model each: its name, and its keywords.
        for word in filter(None, _split(part)):
            if words and len(words[-1]) > 1 and '=' in word and ':' not in _bare(word):
                words[-1].append(word)
            else:
                words.append(_opened(word))
        entries += [_entry(*w) for w in words]
    return tuple(entries)


def _bare(word: str) -> str:
    """The word without what stands in brackets, such as the value of `attn_args={'order': 'parallel'}`."""
    kept, depth = [], 0
    for c in word:
        depth += (c in '[{(') - (c in ']})')
        kept.append(c if depth == 0 else ' ')
    return ''.join(kept)


def _split(part: str) -> list[str]:
    """Splits at commas outside of brackets."""
    cuts = [-1, *(i for i, c in enumerate(_bare(part)) if c == ','), len(part)]
    return [part[a + 1 : b] for a, b in pairwise(cuts)]


def _opened(word: str) -> list[str]:
    """Label and name, and the first keyword where a colon is followed by one."""
    head, _, keyword = word.partition(':')
    source = is_source(word) or is_source(word.partition('=')[2])
    return [word] if source or not keyword else [head, keyword]


def _entry(model: str, *keywords: str) -> Entry:
    label, _, name = ('', '', model) if is_source(model) or '=' not in model else model.partition('=')
    args: dict[str, Any] = {}
    for keyword in keywords:
        key, equals, value = keyword.partition('=')
        if not equals or not key.isidentifier():
            raise ValueError(f"--models: '{keyword}' behind '{name}:' is no keyword: write NAME:K=V,K=V.")
        try:
            args[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            args[key] = value
    return Entry(label or ' '.join([name, *keywords]), name, args)


def _models_of_file(path: Path) -> tuple[Entry, ...]:
    yaml: Any = require('yaml', 'lab', 'pyyaml')
    try:
        held = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise ValueError(f"--models: '{path}' cannot be read: {e}") from e
    entries = []
    for item in held if isinstance(held, list) else [held]:
        given: Any = {'name': item} if isinstance(item, str) else item
        known = isinstance(given, dict) and not given.keys() - {'name', 'label', 'args'}
        if not known or not isinstance(given.get('name'), str):
            raise ValueError(f"--models: '{path}': {item!r} is no name, and no object of name, label and args.")
        if not isinstance(given.get('args', {}), dict) or not isinstance(given.get('label', ''), str):
            raise ValueError(f"--models: '{path}': label (a text) or args (an object) of {item!r} will not do.")
        entries.append(Entry(given.get('label') or given['name'], given['name'], given.get('args', {})))
    return tuple(entries)


def _two(text: str) -> tuple[int, int]:
    try:
        train, val = (int(n) for n in text.split(','))
    except ValueError as e:
        raise ValueError(f'--images (={text}) must be TRAIN,VAL, for example 6000,2000.') from e
    return train, val


def _say(text: str) -> None:
    print(text, file=sys.stderr)
