"""`timm-attn card | push | pull | publish`."""

import argparse
import json
import logging
import sys
from typing import Any


def _talk() -> None:
    # What the package says while it works goes to stderr; stdout holds the result.
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format='%(message)s')
    logging.getLogger('timm_attn').setLevel(logging.INFO)


def _records(path: str | None) -> Any:
    if path is None:
        return None
    try:
        with open(path, encoding='utf-8') as file:
            return json.load(file)
    except (OSError, ValueError) as e:
        raise ValueError(f"--eval: '{path}' cannot be read as JSON: {e}") from e


def run_card(args: argparse.Namespace) -> None:
    if args.tags:
        from .publish import write_tag_cards

        print(*write_tag_cards(args.directory), sep='\n')
        return
    from ._folder import card_of_folder

    text = card_of_folder(args.directory, source=args.source, eval_results=_records(args.eval), write=not args.stdout)
    if args.stdout:
        print(text, end='')
    else:
        print(f'{args.directory}/README.md')


def run_push(args: argparse.Namespace) -> None:
    from .hub import push_to_hub

    _talk()
    result = push_to_hub(
        args.directory,
        args.repo_id,
        private=args.private,
        revision=args.revision,
        create_pr=args.create_pr,
        eval_results=_records(args.eval),
        force=args.force,
        commit_message=args.message,
    )
    print(result, file=sys.stderr)
    print(result.pull_request or result.commit)


def run_pull(args: argparse.Namespace) -> None:
    from .hub import pull

    _talk()
    commit = pull(args.repo_id, args.out, revision=args.revision, overwrite=args.overwrite)
    print(f"timm.create_model('local-dir:{args.out}', pretrained=True)", file=sys.stderr)
    print(commit)


def run_publish(args: argparse.Namespace) -> int:
    from .publish import publish, table

    _talk()
    rows = publish(args.namespace, only=args.only, dry_run=args.dry_run, private=args.private)
    print(table(rows))
    return 1 if any(r.outcome == 'failed' for r in rows) else 0


def add_parser(commands: Any) -> None:
    """Adds `card`, `push`, `pull` and `publish`.

    Args:
        commands: The subparsers of `timm-attn`.
    """
    p = commands.add_parser(
        'card', help='render the model card of a folder again', epilog='example: timm-attn card runs/quickstart'
    )
    p.add_argument('directory', metavar='DIR', help='a folder with model.safetensors and config.json')
    p.add_argument('--eval', metavar='FILE', help='JSON with evaluation records: dataset and metrics')
    p.add_argument('--source', help="what the snippets load, such as 'hf-hub:me/name'; the folder itself by default")
    p.add_argument(
        '--tags', action='store_true', help='write the card of every tag of the weights table to DIR instead'
    )
    p.add_argument('--stdout', action='store_true', help='print the card in place of writing README.md')
    p.set_defaults(run=run_card)

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
    p.set_defaults(run=run_push)

    p = commands.add_parser(
        'pull', help='fetch a model with every check', epilog='example: timm-attn pull me/my-model --out models/mine'
    )
    p.add_argument('repo_id', metavar='NAMESPACE/NAME')
    p.add_argument('--out', required=True, metavar='DIR', help='the folder to write')
    p.add_argument('--revision', metavar='REV', help='branch, tag or commit; main by default')
    p.add_argument('--overwrite', action='store_true', help='replace files that exist')
    p.set_defaults(run=run_pull)

    p = commands.add_parser(
        'publish',
        help='convert and push every trained tag whose licence allows it',
        epilog="example: timm-attn publish --namespace me --only 'cbam_*' --dry-run",
    )
    p.add_argument('--namespace', required=True, metavar='ORG', help='user or organisation that the repositories go to')
    p.add_argument('--only', metavar='PATTERN', help='tags that match this shell pattern')
    p.add_argument('--dry-run', action='store_true', help='say what would be pushed, and push nothing')
    p.add_argument('--private', action='store_true', help='make repositories that are created private')
    p.set_defaults(run=run_publish)
