"""Training recipes: YAML files for `--config` of timm's train.py, and the command that runs each.

Every value in a file carries its source. `recipe_command('cbam_in1k')` gives the command for 8 GPUs.
"""

from pathlib import Path
from typing import Any

from ..layers import did_you_mean

_FOLDER = Path(__file__).parent

# The batch_size of the files is per process; together with this number it makes the batch of the source.
GPUS = 8


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
        meant = did_you_mean(name, list_recipes())
        raise ValueError(f"Unknown recipe '{name}'.{meant} Expected one of: {', '.join(list_recipes())}.")
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
    gpus: int = GPUS,
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
    total = options['batch_size'] * GPUS
    if gpus < 1 or total % gpus:
        raise ValueError(f"gpus (={gpus}) must be positive and divide {total}, the batch of recipe '{name}'.")
    if gpus == 1 and options.get('aug_repeats'):
        raise ValueError(f"Recipe '{name}' has repeated augmentation, which needs gpus >= 2 in timm's train.py.")
    command = ['torchrun', '--standalone', f'--nproc_per_node={gpus}', '-m', 'timm_attn', script]
    command += ['--config', str(recipe_path(name))]
    if model is not None:
        command += ['--model', model]
    if gpus != GPUS:
        command += ['--batch-size', str(total // gpus)]
    return [*command, '--data-dir', data]
