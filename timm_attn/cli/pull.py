"""`timm-attn pull`: fetches a model from the Hub with every check."""

import argparse
import sys

from ..hub.load import pull
from ._common import talk


def add_parser(commands: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Adds `pull`."""
    p = commands.add_parser(
        'pull', help='fetch a model with every check', epilog='example: timm-attn pull me/my-model --out models/mine'
    )
    p.add_argument('repo_id', metavar='NAMESPACE/NAME')
    p.add_argument('--out', required=True, metavar='DIR', help='the folder to write')
    p.add_argument('--revision', metavar='REV', help='branch, tag or commit; main by default')
    p.add_argument('--overwrite', action='store_true', help='replace files that exist')
    p.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    talk()
    commit = pull(args.repo_id, args.out, revision=args.revision, overwrite=args.overwrite)
    print(f"timm.create_model('local-dir:{args.out}', pretrained=True)", file=sys.stderr)
    print(commit)
