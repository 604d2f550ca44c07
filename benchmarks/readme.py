"""Writes the generated parts of README.md and docs/: `python benchmarks/readme.py`.

Tables come from the registry, the weights table and `benchmarks/results/`; a test renders them again and compares.
"""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm

from timm_attn import create_attn, get_attn, list_attn
from timm_attn.bench import OURS, fastest_peer, kinds
from timm_attn.cli.list import markdown_table, models_table
from timm_attn.weights import TAGS, weights_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'benchmarks/results'


def attentions_table() -> str:
    """The attentions in a line each: name, paper, place, and whether trained ImageNet weights can be had."""
    trained = {t.model.partition('_')[0] for t in TAGS if t.status == 'trained'}
    rows = []
    for name in list_attn():
        spec = get_attn(name)
        rows.append((f'`{name}`', f'[{spec.title}]({spec.paper})', spec.place, 'yes' if name in trained else '-'))
    return markdown_table(('name', 'paper', 'place in a ResNet', 'trained weights'), rows)


def _facts(name: str) -> dict[str, Any]:
    """What the registry and the class say of an attention, at 256 channels."""
    attn = create_attn(name, 256, device='meta')
    gates = ''.join(gate.axes for gate in attn.kinds.values())
    depths = timm.list_models(f'{name}_resn*')
    return {
        'parameters': sum(p.numel() for p in attn.parameters()),
        'neutral': attn.neutral_gate,
        'positions': 'H' in gates or 'W' in gates,
        'channels': 'C' in gates.replace('CHW', '').replace('CC', ''),
        'self-attention': 'self-attention' in attn.keywords,
        'trained': any(t.status == 'trained' and t.model in depths for t in TAGS),
        'warm': any(t.status == 'warm' and t.model in depths for t in TAGS),
    }


def reference_table() -> str:
    """Every attention by its equation, place, size, licence of the released code and neutral constant."""
    rows = []
    for name in list_attn():
        spec, facts = get_attn(name), _facts(name)
        neutral = 'none' if facts['neutral'] is None else f'{facts["neutral"]:g}'
        weights = 'trained' if facts['trained'] else 'warm start' if facts['warm'] else '-'
        equation = spec.equation.replace('|', '\\|')
        paper = f'[{spec.year}]({spec.paper})'
        licence = f'[{spec.licence}]({spec.code})' if spec.code else "the project's own"
        rows.append((f'`{name}`', equation, spec.place, f'{facts["parameters"]:,}', neutral, weights, licence, paper))
    head = ('name', 'equation', 'place in a ResNet', 'parameters, C = 256', 'neutral', 'weights', 'its code', 'paper')
    return markdown_table(head, rows)


def needs_table() -> str:
    """The attentions that answer a need."""
    facts = {name: _facts(name) for name in list_attn()}
    cheapest = sorted(facts, key=lambda n: facts[n]['parameters'])[:6]
    needs: dict[str, list[str]] = {
        'no parameters': [n for n, f in facts.items() if not f['parameters']],
        'cheapest in parameters, the fewest first': cheapest,
        'sees positions': [n for n, f in facts.items() if f['positions']],
        'weights channels alone': [n for n, f in facts.items() if f['channels'] and not f['positions']],
        'self-attention': [n for n, f in facts.items() if f['self-attention']],
        'has trained ImageNet weights': [n for n, f in facts.items() if f['trained']],
        'starts from a plain ResNet without changing it': [n for n, f in facts.items() if f['warm']],
        'the identity as it is built, so injecting changes nothing': [
            n for n, f in facts.items() if f['neutral'] == 1 and get_attn(n).placement != 'conv'
        ],
    }
    return markdown_table(
        ('need', 'attentions'), [(n, ', '.join(f'`{a}`' for a in found)) for n, found in needs.items()]
    )


def parity_table() -> str:
    """Largest gap of each golden file, as measured."""
    record = json.loads((RESULTS / 'parity.json').read_text(encoding='utf-8'))
    kinds = ('output', 'input gradient', 'parameter gradients', 'buffers')
    rows = [
        (f'`{name}`', *(f'{gaps[kind]:.1e}' if gaps.get(kind) is not None else '-' for kind in kinds))
        for name, gaps in record['gaps'].items()
    ]
    return markdown_table(('golden data', *kinds), rows)


def bytes_table() -> str:
    """Bytes kept for backward, eager and fused, with the ratio to the plain model's."""
    rows = {r['model']: r for r in json.loads((RESULTS / 'memory.json').read_text(encoding='utf-8'))['rows']}

    def cell(name: str) -> str:
        return f'{rows[name]["kept_bytes"] / 1e6:.1f} MB ({rows[name]["kept_bytes_ratio"]:.2f})'

    names = [n for n in rows if f'{n} fused' in rows]
    return markdown_table(('model', 'eager', 'fused'), [(n, cell(n), cell(f'{n} fused')) for n in names])


@functools.cache
def _ratios() -> dict[tuple[str, str, str], dict[str, float]]:
    """Attention, mode and type of the cells of batch 4 at 224 pixels and depth 50 -> the ratio of each kind of row."""
    cells = json.loads((RESULTS / 'speed.json').read_text(encoding='utf-8'))
    return {
        (c['attn'], c['mode'], c['dtype']): {kind: row['ratio'] for kind, row in kinds(c).items()}
        for c in cells
        if (c['batch'], c['size'], c['depth']) == (4, 224, 50)
    }


def times_table() -> str:
    """Time beside the plain model's, in float32: eager, fused, frozen, and the fastest of the peers in the same run."""
    lines = []
    for (attn, mode, dtype), ratios in _ratios().items():
        if dtype != 'float32':
            continue
        best = fastest_peer(ratios)
        ours = [f'{ratios[k]:.2f}' if k in ratios else '-' for k in OURS]
        lines.append((attn, mode, *ours, f'{ratios[best]:.2f} ({best})' if best else '-'))
    return markdown_table(('attention', 'mode', *OURS, 'fastest peer'), lines)


def costs_table() -> str:
    """What each attention costs a ResNet-50: time and memory beside the plain model's, eager and at its best."""
    memory = {r['model']: r for r in json.loads((RESULTS / 'memory.json').read_text(encoding='utf-8'))['rows']}
    lines = []
    for attn in list_attn():
        times = []
        for mode, fused in (('inference', 'frozen'), ('train', 'fused')):
            for dtype in ('float32', 'bfloat16'):
                ratios = _ratios().get((attn, mode, dtype))
                times.append(f'{ratios["eager"]:.2f} / {ratios[fused]:.2f}' if ratios else '-')
        rows = [memory.get(name) for name in (attn, f'{attn} fused')]
        kept = ' / '.join(f'{row["kept_bytes_ratio"]:.2f}' for row in rows if row) or '-'
        lines.append((attn, *times, kept))
    head = ('attention', 'inference', 'inference, bf16', 'training', 'training, bf16', 'kept for backward')
    return markdown_table(head, lines)


def machines_table() -> str:
    """What the gradients of a ResNet-50 with each attention weigh, and what each GPU of eight sends a step."""
    rows = []
    for name in ('resnet50', *(f'{attn}_resnet50' for attn in list_attn())):
        model = timm.create_model(name, device='meta')
        weights = 4 * sum(p.numel() for p in model.parameters())
        buffers = sum(b.numel() * b.element_size() for b in model.buffers())
        rows.append(
            (
                f'`{name}`',
                f'{weights // 4:,}',
                f'{weights / 1e6:.1f}',
                f'{2 * 7 / 8 * weights / 1e6:.1f}',
                f'{buffers / 1e6:.2f}',
                f'{(2 * weights + buffers) / 1e6:.0f}',
            )
        )
    head = ('model', 'parameters', 'all-reduced, MB a step', 'sent by each of 8 GPUs, MB a step', 'BatchNorm, MB')
    return markdown_table((*head, 'checkpoint with SGD, MB'), rows)


def hosts_table() -> str:
    """What a step of train.py sent from each of two hosts."""
    rows = [
        (
            f'`{m["model"]}`',
            f'{m["parameter_bytes"] / 1e6:.2f}',
            f'{m["buffer_bytes"] / 1e6:.2f}',
            *(f'{sent / 1e6:.2f}' for sent in m['sent_per_step']),
            'yes' if m['same_weights_as_one_host'] else 'no',
        )
        for m in json.loads((RESULTS / 'two_hosts.json').read_text(encoding='utf-8'))['models']
    ]
    head = ('model', '4 x parameters, MB', 'BatchNorm, MB', 'sent by host 0, MB a step', 'sent by host 1, MB a step')
    return markdown_table((*head, 'weights bit-equal to one host with two processes'), rows)


Table = Callable[[], str]
PAGES: dict[Path, dict[str, Table]] = {
    ROOT / 'README.md': {'attentions': attentions_table},
    ROOT / 'docs/attentions.md': {'needs': needs_table, 'reference': reference_table},
    ROOT / 'docs/models.md': {'models': models_table, 'weights': weights_table},
    ROOT / 'docs/speed.md': {'bytes': bytes_table, 'times': times_table},
    ROOT / 'docs/fidelity.md': {'parity': parity_table},
    ROOT / 'docs/choose.md': {'costs': costs_table},
    ROOT / 'docs/many-machines.md': {'hosts': hosts_table, 'machines': machines_table},
}


def render(text: str, tables: dict[str, Callable[[], str]]) -> str:
    """A page with its tables made again.

    Args:
        text: The page as it is.
        tables: Name in the page's markers -> table.
    """
    for name, table in tables.items():
        text, n = re.subn(
            rf'(<!-- table: {name} -->\n).*?(<!-- end -->)',
            lambda m, table=table: f'{m[1]}{table()}\n{m[2]}',
            text,
            flags=re.DOTALL,
        )
        if n != 1:
            raise ValueError(f"The page holds the markers of table '{name}' {n} times, expected once.")
    return text


if __name__ == '__main__':
    for path, tables in PAGES.items():
        path.write_text(render(path.read_text(encoding='utf-8'), tables), encoding='utf-8')
