"""`timm-attn card`: renders the model card of a folder again."""

import argparse

from ..hub.folder import card_of_folder
from ..hub.publish import write_tag_cards
from ._common import read_records


def add_parser(commands: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Adds `card`."""
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
    p.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    if args.tags:
        print(*write_tag_cards(args.directory), sep='\n')
        return
    text = card_of_folder(
        args.directory, source=args.source, eval_results=read_records(args.eval), write=not args.stdout
    )
    if args.stdout:
        print(text, end='')
    else:
        print(f'{args.directory}/README.md')
