"""`timm-attn explain`: pictures of where models look."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..explain import LabelledImage, explain
from ..lab.data import load_data


def add_parser(commands: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Adds `timm-attn explain` to the command line."""
    p = commands.add_parser(
        'explain',
        help='pictures of where models look',
        description='A picture for each image: gates, Grad-CAM and the top labels; for two or more images also '
        'summary.png and summary.json, which flag gates that are dead, saturated or constant. Several models, plain '
        'ones too, stand below each other, with one scale for each kind of gate.',
        epilog='example: timm-attn explain photos/ --model me/cbam_resnet50 --model resnet50 --out runs/explained',
    )
    p.add_argument('images', nargs='*', metavar='IMAGE', help='image files or folders; folders in a folder are classes')
    p.add_argument('--data', metavar='NAME', help='held-out images of a named data set, such as digits, or of a folder')
    p.add_argument('--data-dir', metavar='DIR', help='where the named data sets lie')
    p.add_argument(
        '--limit',
        type=int,
        default=100,
        metavar='N',
        help='take at most N images of --data, in turn from each class (default: %(default)s)',
    )
    p.add_argument(
        '--model',
        required=True,
        action='append',
        metavar='NAME_OR_DIR_OR_HUB',
        help='registered model, folder or Hub repository; may be given several times',
    )
    p.add_argument('--out', required=True, metavar='DIR', help='folder to write')
    p.add_argument('--untrained', action='store_true', help='random weights, for a registered model without others')
    p.add_argument(
        '--no-crop', action='store_true', help='show the whole image instead of the centre the model is evaluated on'
    )
    p.add_argument('--no-cam', action='store_true', help='leave out Grad-CAM')
    p.add_argument('--pictures', type=int, default=20, metavar='N', help='draw at most N images (default: %(default)s)')
    p.add_argument('--overwrite', action='store_true', help='replace DIR if it is not empty')
    p.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    if bool(args.images) == bool(args.data):
        raise ValueError('Give images, or a data set by --data, and not both.')
    images = _data_images(args.data, args.data_dir, args.limit) if args.data else args.images
    rows = explain(
        images,
        args.model,
        args.out,
        pretrained=not args.untrained,
        crop=not args.no_crop,
        pictures=args.pictures,
        cam=not args.no_cam,
        overwrite=args.overwrite,
    )
    models = list(dict.fromkeys(row['model'] for row in rows))
    for row in rows:
        fields = [row['image'], row['label'], f'{row["probability"]:.4f}', row['picture'] or '-']
        print(*fields, *([row['model']] if len(models) > 1 else []), sep='\t')
    for name in models:
        if any(row['untrained'] for row in rows if row['model'] == name):
            print(f'{name} is untrained: its weights are random, and so is what the pictures show.', file=sys.stderr)
    count = len(rows) // len(models)
    drawn = len({row['picture'] for row in rows} - {None})
    files = sorted((p.name for p in Path(args.out).glob('summary*') if count > 1), reverse=True)
    print(f'{drawn} of {count} images drawn{" and " if files else ""}{", ".join(files)} in {args.out}', file=sys.stderr)


def _data_images(name: str, data_dir: str | None, limit: int) -> Sequence[LabelledImage]:
    if limit < 1:
        raise ValueError(f'--limit (={limit}) must be at least 1.')
    data = load_data(name, data_dir=data_dir)
    images = data.val.first(limit)
    stem = Path(name).name
    return [
        LabelledImage(f'{stem}-{data.classes[target]}-{i:04d}.png', images.image(i), data.classes[target])
        for i, target in enumerate(images.targets)
    ]
