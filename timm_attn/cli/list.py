"""`timm-attn list`: the attentions and the models, with parameters, MACs, weights, cost and papers."""

import argparse
import functools
import json
import shutil
import sys
from collections.abc import Sequence
from importlib import resources
from typing import Any

import timm

from ..layers import accepted_args, did_you_mean, get_attn, list_attn
from ..measure import count
from ..weights.tags import tags_of

MODULES = ('attn_resnet', 'sk_resnet', 'simple_cnn')
Row = tuple[str, ...]


def list_our_models(pattern: str = '') -> list[str]:
    """Names of the registered models, in timm's natural order.

    Args:
        pattern: A wildcard as in `timm.list_models`.
    """
    return [name for module in MODULES for name in timm.list_models(pattern, module=module)]


def _numeric(rows: Sequence[Row], column: int) -> bool:
    return all(r[column].replace(',', '').replace('.', '').isdigit() for r in rows)


def markdown_table(header: Row, rows: Sequence[Row]) -> str:
    """A Markdown table; columns that hold numbers only are aligned right."""
    lines = [header, tuple('--:' if _numeric(rows, i) else '---' for i in range(len(header))), *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def plain_table(header: Row, rows: Sequence[Row], width: int) -> str:
    """A table for a terminal: the columns that fit from the left, Markdown's backquotes and links taken off.

    Args:
        header: Names of the columns, the dearest to the reader first.
        rows: As many texts each.
        width: Of the terminal, in characters.
    """
    body = [tuple(cell.replace('`', '') for cell in row) for row in rows]
    wide = [max(len(row[i]) for row in (header, *body)) for i in range(len(header))]
    shown, used = 0, -2
    while shown < len(header) and (used := used + wide[shown] + 2) <= max(width, wide[0]):
        shown += 1
    right = [_numeric(body, i) for i in range(shown)]

    def line(row: Row) -> str:
        cells = [row[i].rjust(wide[i]) if right[i] else row[i].ljust(wide[i]) for i in range(shown)]
        return '  '.join(cells).rstrip()

    hidden = header[shown:]
    note = [f'(wider terminals show: {", ".join(hidden)}; --markdown shows all)'] if hidden else []
    return '\n'.join([line(header), '  '.join('-' * w for w in wide[:shown]), *map(line, body), *note])


@functools.cache
def measured() -> dict[str, Any]:
    """What attentions cost a ResNet-50 and how large our models are, as benchmarks/readme.py wrote it down.

    Empty where it did not.
    """
    file = resources.files('timm_attn.cli') / 'costs.json'
    return json.loads(file.read_text(encoding='utf-8')) if file.is_file() else {}


def attentions_rows() -> tuple[Row, list[Row]]:
    """The attentions: name, class, training time and kept bytes beside a plain ResNet-50, place, options, ..."""
    costs = measured().get('attentions', {})
    rows = []
    for name in list_attn():
        spec, cost = get_attn(name), costs.get(name, {})
        options = ', '.join(f'`{a}`' for a in accepted_args(name)) or 'none'
        time, kept = (' / '.join(f'{v:.2f}' for v in cost.get(k, ())) or '-' for k in ('training', 'kept'))
        paper = f'[{spec.year}]({spec.paper})'
        rows.append((f'`{name}`', spec.cls.__name__, time, kept, spec.place, spec.licence or '-', options, paper))
    return ('name', 'class', 'time', 'bytes', 'place', 'licence of the code', 'options', 'paper'), rows


def attentions_table() -> str:
    """`attentions_rows` as Markdown."""
    return markdown_table(*attentions_rows())


def size_of(name: str) -> dict[str, Any]:
    """A model's attention, parameters, MACs and the bytes of its weights, by building it without memory."""
    model: Any = timm.create_model(name, device='meta')
    size = count(model, model.pretrained_cfg['input_size'])
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    return {'attn': model.attn, 'params': size['params'], 'macs': size['macs'], 'bytes': weights}


def models_rows(pattern: str = '') -> tuple[Row, list[Row]]:
    """The models: name, parameters, GMACs, size of the weights, tags (the first is pretrained=True's), paper."""
    rows, known = [], measured().get('models', {})
    for name in list_our_models(pattern):
        size = known.get(name) or size_of(name)
        paper = get_attn(size['attn']).paper if size['attn'] else '-'
        tags = [t.tag if t.status == 'trained' else 'warm start' for t in tags_of(name)]
        sizes = (f'{size["params"]:,}', f'{size["macs"] / 1e9:.3f}', f'{size["bytes"] / 1e6:.1f}')
        rows.append((f'`{name}`', *sizes, ', '.join(tags) or '-', paper))
    if not rows:
        meant = did_you_mean(pattern.strip('*'), list_our_models())
        raise ValueError(f"No model matches '{pattern}'.{meant} Without a pattern all are listed.")
    return ('model', 'parameters', 'GMACs', 'MB', 'weights', 'paper'), rows


def models_table(pattern: str = '') -> str:
    """`models_rows` as Markdown."""
    return markdown_table(*models_rows(pattern))


def add_parser(commands: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Adds `list`."""
    p = commands.add_parser('list', help='list attentions and models', epilog="example: timm-attn list '*_resnet50'")
    p.add_argument('pattern', nargs='?', default='', help='wildcard for model names; all by default')
    p.add_argument('--markdown', action='store_true', help='Markdown, as where the output is no terminal')
    p.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    models = models_rows(args.pattern)
    tables = [models] if args.pattern else [attentions_rows(), models]
    if args.markdown or not sys.stdout.isatty():
        print('\n\n'.join(markdown_table(*t) for t in tables))
        return
    width = shutil.get_terminal_size().columns
    print('\n\n'.join(plain_table(*t, width) for t in tables))
    if (costs := measured()) and not args.pattern:
        print(f'\ntime, bytes: eager / fused, of a plain ResNet-50 in training ({costs["where"]})')
