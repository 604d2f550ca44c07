"""`timm-attn recipe`: lists training recipes, and prints the command that runs one."""

import argparse
import os
import shlex
import sys
from pathlib import Path

from timm.data import get_img_extensions

from ..explain.images import endings, hidden
from ..recipes import GPUS, list_recipes, recipe_command, recipe_path, recipe_title


def add_parser(commands: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Adds `timm-attn recipe [NAME]`.

    Args:
        commands: Where subcommands are added.
    """
    parser = commands.add_parser(
        'recipe',
        help='list training recipes, or print the command that runs one',
        description="Without NAME: the recipes. With NAME: the path of its YAML file for timm's train.py, and the "
        'command that trains with it. There is no estimate of the cost on GPUs, since nothing was measured on one.',
        epilog='example: timm-attn recipe cbam_in1k --model cbam_resnet18 --data-dir /data/imagenet',
    )
    parser.add_argument('name', nargs='?', metavar='NAME', help='the recipe (default: list all)')
    parser.add_argument('--data-dir', default='DATA', metavar='DIR', help="the dataset's folder (default: %(default)s)")
    parser.add_argument('--model', metavar='MODEL', help="another model than the recipe's")
    parser.add_argument('--gpus', type=int, default=GPUS, metavar='N', help='processes (default: %(default)s)')
    parser.add_argument('--script', default='train.py', metavar='PATH', help="timm's train.py (default: %(default)s)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    if args.name is None:
        width = max(map(len, list_recipes()))
        for name in list_recipes():
            print(f'{name:{width}}  {recipe_title(name)}')
        return
    command = recipe_command(args.name, data=args.data_dir, model=args.model, gpus=args.gpus, script=args.script)
    # A comment, so that the whole output is a shell script.
    print(f'# {recipe_path(args.name)}')
    print(shlex.join(command))
    for line in read_otherwise(Path(args.data_dir)):
        print(line, file=sys.stderr)
    print('Time and cost are not estimated: no throughput of these models on GPUs has been measured.', file=sys.stderr)


def read_otherwise(root: Path) -> list[str]:
    """What timm's train.py reads in a folder of images otherwise than `timm-attn compare`, one sentence each.

    Args:
        root: Folder of the splits, each with a folder for each class; nothing is said of what is none.
    """
    folders: list[str] = []
    left_out: set[str] = set()
    others = endings() - set(get_img_extensions())
    for split in sorted(root.iterdir()) if root.is_dir() else ():
        for label in sorted(split.iterdir()) if split.is_dir() and not hidden(split.name) else ():
            if not label.is_dir():
                continue
            entries = list(os.scandir(label))
            folders += [str(label)] if hidden(label.name) else []
            folders += sorted(e.path for e in entries if e.is_dir())
            left_out |= {ending for e in entries if (ending := os.path.splitext(e.name)[1].lower()) in others}
    said = []
    if folders:
        shown = ', '.join(folders[:4]) + (f' and {len(folders) - 4} more' if len(folders) > 4 else '')
        said.append(
            f"timm's train.py takes the name of each of these folders for a class of its own: {shown}. compare takes "
            'the first folder below the split, and no hidden ones: move or remove them.'
        )
    if left_out:
        said.append(
            f"timm's train.py leaves out {', '.join(sorted(left_out))} files without a word, which compare reads: "
            'convert them to .png or .jpg.'
        )
    return said
