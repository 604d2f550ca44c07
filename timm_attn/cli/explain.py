"""`timm-attn explain`: pictures of where a model looks."""

import argparse
import sys

from ..explain.pictures import explain


def add_parser(commands: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Adds `timm-attn explain` to the command line."""
    p = commands.add_parser(
        'explain',
        help='pictures of where a model looks',
        description='A picture for each image: spatial maps, channel weights, Grad-CAM and the top labels; for two or '
        'more images also summary.png and summary.json, which flag gates that are dead, saturated or constant.',
        epilog='example: timm-attn explain photos/ --model me/cbam_resnet50 --out runs/explained',
    )
    p.add_argument('images', nargs='+', metavar='IMAGE', help='image files or folders; folders in a folder are classes')
    p.add_argument(
        '--model', required=True, metavar='NAME_OR_DIR_OR_HUB', help='registered model, folder or Hub repository'
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
    rows = explain(
        args.images,
        args.model,
        args.out,
        pretrained=not args.untrained,
        crop=not args.no_crop,
        pictures=args.pictures,
        cam=not args.no_cam,
        overwrite=args.overwrite,
    )
    for row in rows:
        print(row['image'], row['label'], f'{row["probability"]:.4f}', row['picture'] or '-', sep='\t')
    more = ' and summary.png, summary.json' if len(rows) > 1 else ''
    drawn = sum(row['picture'] is not None for row in rows)
    print(f'{drawn} of {len(rows)} images drawn{more} in {args.out}', file=sys.stderr)
