"""`timm-attn push`: puts a model folder on the Hub."""

import argparse
import sys

from ..hub.push import push_to_hub
from ._common import read_records, talk


def add_parser(commands: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Adds `push`."""
    p = commands.add_parser(
        'push', help='put a model folder on the Hub', epilog='example: timm-attn push runs/quickstart me/my-model'
    )
    p.add_argument('directory', metavar='DIR', help='a folder with model.safetensors and config.json')
    p.add_argument('repo_id', metavar='NAMESPACE/NAME')
    p.add_argument('--private', action='store_true', help='make a repository that is created private')
    p.add_argument('--revision', metavar='BRANCH', help='branch; created when it does not exist')
    p.add_argument('--create-pr', action='store_true', help='open a pull request')
    p.add_argument('--force', action='store_true', help='replace a model of another architecture')
    p.add_argument('--message', help='first line of the commit')
    p.add_argument('--eval', metavar='FILE', help='JSON with evaluation records: dataset and metrics')
    p.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    talk()
    result = push_to_hub(
        args.directory,
        args.repo_id,
        private=args.private,
        revision=args.revision,
        create_pr=args.create_pr,
        eval_results=read_records(args.eval),
        force=args.force,
        commit_message=args.message,
    )
    print(result, file=sys.stderr)
    print(result.pull_request or result.commit)
