"""Writes the generated parts of README.md: `python benchmarks/readme.py`.

Tables come from the registry, the weights table and `benchmarks/results/`; a test renders them again and compares.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

from timm_attn.lab.listing import attentions_table, markdown_table, models_table
from timm_attn.weights import weights_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'benchmarks/results'


def parity_table() -> str:
    """Largest gap of each golden file, as measured."""
    record = json.loads((RESULTS / 'parity.json').read_text())
    kinds = ('output', 'input gradient', 'parameter gradients', 'buffers')
    rows = [
        (f'`{name}`', *(f'{gaps[kind]:.1e}' if gaps.get(kind) is not None else '-' for kind in kinds))
        for name, gaps in record['gaps'].items()
    ]
    return markdown_table(('golden data', *kinds), rows)


def bytes_table() -> str:
    """Bytes kept for backward, eager and fused, beside the plain model's."""
    rows = {r['model']: r for r in json.loads((RESULTS / 'memory.json').read_text())['rows']}

    def cell(name: str) -> str:
        return f'{rows[name]["kept_bytes"] / 1e6:.1f} MB ({rows[name]["ratio"]:.2f})'

    names = [n for n in rows if f'{n} fused' in rows]
    return markdown_table(('model', 'eager', 'fused'), [(n, cell(n), cell(f'{n} fused')) for n in names])


def times_table() -> str:
    """Time beside the plain model's, in float32: eager, fused, frozen, and the fastest of the peers in the same run."""
    lines = []
    for cell in json.loads((RESULTS / 'speed.json').read_text()):
        if cell['dtype'] != 'float32':
            continue
        name = f'{cell["attn"]}_resnet50'
        ratios = {r['model']: r['ratio'] for r in cell['rows']}
        peers = {k: v for k, v in ratios.items() if not k.startswith(('plain', name))}
        best = min(peers, key=peers.__getitem__) if peers else None
        ours = [f'{ratios[k]:.2f}' if k in ratios else '-' for k in (name, f'{name} fused', f'{name} frozen')]
        peer = f'{peers[best]:.2f} ({best.removeprefix(cell["attn"]).strip()})' if best else '-'
        lines.append((cell['attn'], cell['mode'], *ours, peer))
    return markdown_table(('attention', 'mode', 'eager', 'fused', 'frozen', 'fastest peer'), lines)


TABLES: dict[str, Callable[[], str]] = {
    'attentions': attentions_table,
    'models': models_table,
    'weights': weights_table,
    'parity': parity_table,
    'bytes': bytes_table,
    'times': times_table,
}


def render(text: str) -> str:
    """The README with its tables made again.

    Args:
        text: The README as it is.
    """
    for name, table in TABLES.items():
        text, n = re.subn(
            rf'(<!-- table: {name} -->\n).*?(<!-- end -->)',
            lambda m, table=table: f'{m[1]}{table()}\n{m[2]}',
            text,
            flags=re.DOTALL,
        )
        if n != 1:
            raise ValueError(f"README.md holds the markers of table '{name}' {n} times, expected once.")
    return text


if __name__ == '__main__':
    readme = ROOT / 'README.md'
    readme.write_text(render(readme.read_text()))
