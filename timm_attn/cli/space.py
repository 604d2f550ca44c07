"""`timm-attn space`: a Gradio Space for a model, or for two side by side."""

import argparse
import sys

from ..explain.space import write_space
from ..version import pip_source


def add_parser(commands: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Adds `timm-attn space` to the command line."""
    p = commands.add_parser(
        'space',
        help='write a Gradio Space for a model, or for two side by side',
        description='A folder to push as a Gradio Space: visitors upload an image and see labels and attention maps.',
        epilog='example: timm-attn space me/cbam_resnet50 resnet50 --out runs/space',
    )
    p.add_argument(
        'models', nargs='+', metavar='MODEL', help='folder, Hub repository or registered model; two stand side by side'
    )
    p.add_argument('--out', required=True, metavar='DIR', help='folder to write')
    p.add_argument('--title', help="title of the Space (default: the models' names)")
    p.add_argument('--license', metavar='ID', help='licence of the Space, such as apache-2.0')
    p.add_argument(
        '--package',
        default=pip_source(),
        metavar='SPEC',
        help='what pip installs timm_attn from, such as a version or a git URL (default: %(default)s)',
    )
    p.add_argument(
        '--examples', nargs='+', default=(), metavar='IMAGE', help='images to offer (default: two drawn ones)'
    )
    p.add_argument('--untrained', action='store_true', help='random weights, to try registered models without others')
    p.add_argument('--overwrite', action='store_true', help='replace DIR if it is not empty')
    p.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    folder = write_space(
        args.models,
        args.out,
        title=args.title,
        package=args.package,
        license=args.license,
        examples=args.examples,
        imports=getattr(args, 'imports', ()),
        pretrained=not args.untrained,
        overwrite=args.overwrite,
    )
    print(folder)
    print(f'next: hf upload YOUR_NAME/YOUR_SPACE {folder} . --repo-type space', file=sys.stderr)
