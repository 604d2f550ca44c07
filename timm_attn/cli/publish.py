"""`timm-attn publish`: converts and pushes every trained tag whose licence allows it."""

import argparse

from ..hub.publish import publish, table
from ._common import talk


def add_parser(commands: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Adds `publish`."""
    p = commands.add_parser(
        'publish',
        help='convert and push every trained tag whose licence allows it',
        epilog="example: timm-attn publish --namespace me --only 'cbam_*' --dry-run",
    )
    p.add_argument('--namespace', required=True, metavar='ORG', help='user or organisation that the repositories go to')
    p.add_argument('--only', metavar='PATTERN', help='tags that match this shell pattern')
    p.add_argument('--dry-run', action='store_true', help='say what would be pushed, and push nothing')
    p.add_argument('--private', action='store_true', help='make repositories that are created private')
    p.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    talk()
    rows = publish(args.namespace, only=args.only, dry_run=args.dry_run, private=args.private)
    print(table(rows))
    return 1 if any(r.outcome == 'failed' for r in rows) else 0
