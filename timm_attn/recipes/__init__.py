"""Training recipes: YAML files for `--config` of timm's train.py, and the command that runs each.

Every value in a file carries its source. `recipe_command('cbam_in1k')` gives the command for 8 GPUs.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent

# The batch_size of the files is per process; together with this number it makes the batch of the source.
_GPUS = 8


def list_recipes() -> list[str]:
    """Names of all recipes, sorted."""
    return sorted(path.stem for path in _FOLDER.glob('*.yaml'))


def recipe_path(name: str) -> Path:
    """Path of a recipe's YAML file.

    Args:
        name: One of `list_recipes()`.

    Raises:
        ValueError: There is no such recipe.
    """
    if name not in list_recipes():
        raise ValueError(f"Unknown recipe '{name}'. Expected one of: {', '.join(list_recipes())}.")
    return _FOLDER / f'{name}.yaml'


def recipe_title(name: str) -> str:
    """What a recipe is for: the first line of its file, without the '#'.

    Args:
        name: One of `list_recipes()`.
    """
    return recipe_path(name).read_text(encoding='utf-8').splitlines()[0].lstrip('# ')


def recipe_options(name: str) -> dict[str, Any]:
    """The options of train.py that a recipe sets.

    Args:
        name: One of `list_recipes()`.
    """
    import yaml

    return yaml.safe_load(recipe_path(name).read_text(encoding='utf-8'))


def recipe_command(
    name: str,
    *,
    data: str = 'DATA',
    model: str | None = None,
    gpus: int = _GPUS,
    script: str = 'train.py',
) -> list[str]:
    """The command that runs a recipe on one machine, as a list of words.

    Args:
        name: One of `list_recipes()`.
        data: The dataset's folder.
        model: Another model than the recipe's.
        gpus: Number of processes. The batch of each is chosen so that the batch of all together stays the recipe's.
        script: Path of timm's train.py.

    Raises:
        ValueError: The batch cannot be divided by this number, or the recipe needs more than one process.
    """
    options = recipe_options(name)
    total = options['batch_size'] * _GPUS
    if gpus < 1 or total % gpus:
        raise ValueError(f"gpus (={gpus}) must be positive and divide {total}, the batch of recipe '{name}'.")
    if gpus == 1 and options.get('aug_repeats'):
        raise ValueError(f"Recipe '{name}' has repeated augmentation, which needs gpus >= 2 in timm's train.py.")
    command = ['torchrun', '--standalone', f'--nproc_per_node={gpus}', '-m', 'timm_attn', script]
    command += ['--config', str(recipe_path(name))]
    if model is not None:
        command += ['--model', model]
    if gpus != _GPUS:
        command += ['--batch-size', str(total // gpus)]
    return [*command, '--data-dir', data]


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
    parser.add_argument('--gpus', type=int, default=_GPUS, metavar='N', help='processes (default: %(default)s)')
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
    print('Time and cost are not estimated: no throughput of these models on GPUs has been measured.', file=sys.stderr)
