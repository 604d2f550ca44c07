"""`timm-attn list`: the attentions and the models, with parameters, MACs and papers."""

import argparse
from typing import Any

import timm

from ..layers import accepted_args, get_attn, list_attn
from ..measure import count

MODULES = ('attn_resnet', 'sk_resnet', 'simple_cnn')


def list_our_models(pattern: str = '') -> list[str]:
    """Names of the registered models, in timm's natural order.

    Args:
        pattern: A wildcard as in `timm.list_models`.
    """
    return [name for module in MODULES for name in timm.list_models(pattern, module=module)]


def markdown_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; all columns but the first two are aligned right where they hold numbers."""
    numeric = [all(r[i].replace(',', '').replace('.', '').isdigit() for r in rows) for i in range(len(header))]
    lines = [header, tuple('--:' if n else '---' for n in numeric), *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def attentions_table() -> str:
    """The attentions as Markdown: name, place, options, paper, licence of the code that the default follows."""
    rows = []
    for name in list_attn():
        spec = get_attn(name)
        options = ', '.join(f'`{a}`' for a in accepted_args(name)) or 'none'
        paper = f'[{spec.year}]({spec.paper})'
        rows.append((f'`{name}`', spec.cls.__name__, spec.place, options, paper, spec.licence or '-'))
    return markdown_table(('name', 'class', 'place', 'options', 'paper', 'licence of the code'), rows)


def models_table(pattern: str = '') -> str:
    """The models as Markdown: name, parameters, MACs, paper."""
    rows = []
    for name in list_our_models(pattern):
        model: Any = timm.create_model(name, device='meta')
        size = count(model, model.pretrained_cfg['input_size'])
        paper = get_attn(model.attn).paper if model.attn else '-'
        rows.append((f'`{name}`', f'{size["params"]:,}', f'{size["macs"] / 1e9:.3f}', paper))
    if not rows:
        raise ValueError(f"No model matches '{pattern}'. Without a pattern all are listed.")
    return markdown_table(('model', 'parameters', 'GMACs', 'paper'), rows)


def add_parser(commands: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Adds `list`."""
    p = commands.add_parser('list', help='list attentions and models', epilog="example: timm-attn list '*_resnet50'")
    p.add_argument('pattern', nargs='?', default='', help='wildcard for model names; all by default')
    p.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    models = models_table(args.pattern)
    if not args.pattern:
        print(attentions_table(), end='\n\n')
    print(models)
