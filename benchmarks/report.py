"""Writes results/speed.md and results/overhead.png from results/speed.json and results/memory.json.

    python benchmarks/report.py

Ratios are to plain timm ResNet-50 in the same rounds. A cell is marked where our best (fused or frozen) misses its
target, or costs more than half the overhead of the best peer of the same run.
"""

import json
from pathlib import Path
from typing import Any

from timm_attn.bench import OURS, fastest_peer, kinds
from timm_attn.files import atomic_write
from timm_attn.optional import require

RESULTS = Path(__file__).parent / 'results'

# attention: inference float32, inference bfloat16, training step
TARGETS = {
    **dict.fromkeys(('se', 'eca'), (1.03, 1.05, 1.05)),
    **dict.fromkeys(('cbam', 'srm', 'bam'), (1.06, 1.12, 1.12)),
    'triplet': (1.20, 1.40, 1.40),
}


def target(cell: dict[str, Any]) -> float | None:
    targets = TARGETS.get(cell['attn'])
    if targets is None:
        return None
    return targets[2] if cell['mode'] == 'train' else targets[cell['dtype'] == 'bfloat16']


def verdict(cell: dict[str, Any], ratios: dict[str, float]) -> str:
    ours = min(v for k, v in ratios.items() if k in OURS)
    goal = target(cell)
    notes = [] if goal is None or ours <= goal else [f'target {goal:.2f} missed']
    best = fastest_peer(ratios)
    if best and ours - 1 > max(ratios[best] - 1, 0) / 2:
        notes.append(f'more than half the overhead of {best}')
    return '; '.join(notes) or ('met' if goal is not None or best else '')


def markdown(cells: list[dict[str, Any]]) -> str:
    first = cells[0]['environment']
    lines = [
        '# Time beside plain ResNets',
        '',
        f'{first["machine"]}, {first["threads"]} thread(s), torch {first["torch"]}, timm {first["timm"]}, '
        f'{first["capability"]}. Medians of interleaved rounds [quartiles], as ratios to '
        "timm's plain eager ResNet in the same round, and of our best beside the plain one fused or frozen alike. "
        'Compiling: seconds of the first step of the fused (frozen) model, less a median step, where inductor finds '
        'on disk what an earlier run has compiled. Made by `python benchmarks/throughput.py`.',
        '',
        '| attention | mode | type | batch, size, depth, rounds | ratios | beside plain fused alike | compiling, s | |',
        '|---|---|---|---|---|---|---|---|',
    ]
    for cell in cells:
        rows = kinds(cell)
        shown = ', '.join(
            f'{k} {r["ratio"]:.3f} [{r["ratio_quartiles"][0]:.3f}, {r["ratio_quartiles"][1]:.3f}]'
            for k, r in rows.items()
            if k != 'plain'
        )
        ratios = {k: r['ratio'] for k, r in rows.items()}
        best = 'frozen' if 'frozen' in rows else 'fused'
        compiling = rows[best]['first'] - rows[best]['median']
        lines.append(
            f'| {cell["attn"]} | {cell["mode"]} | {cell["dtype"]} | '
            f'{cell["batch"]}, {cell["size"]}, {cell["depth"]}, {cell["rounds"]} | {shown} | '
            f'{ratios[best] / ratios[f"plain {best}"]:.3f} | {compiling:.0f} | '
            f'{verdict(cell, ratios)} |'
        )
    return '\n'.join(lines) + '\n'


def memory_markdown(report: dict[str, Any]) -> str:
    lines = [
        '',
        '# Bytes',
        '',
        f'Batch {report["batch"]}, {report["size"]}x{report["size"]}, {report["dtype"]}, made by `python '
        'benchmarks/memory.py`. Kept: alive after a training-mode forward pass, exact. Peak: the most alive in a step, '
        "gradients of parameters and the convolutions' working memory included. Moved: operands and results of every "
        'operation of a step, each counted once; a kernel of a fused block is one operation.',
        '',
        '| model | kept | of plain | peak | of plain | moved | of plain |',
        '|---|---|---|---|---|---|---|',
    ]
    for r in report['rows']:
        cells = (f'{r[key]:,} | {r[f"{key}_ratio"]:.3f}' for key in ('kept_bytes', 'peak_bytes', 'traffic'))
        lines.append(f'| {r["model"]} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


def plot(cells: list[dict[str, Any]]) -> None:
    require('matplotlib', 'bench')
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    cells = [c for c in cells if (c['batch'], c['size'], c['depth']) == (4, 224, 50)]
    panels = list(dict.fromkeys((c['mode'], c['dtype']) for c in cells))
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), sharey=True, squeeze=False)
    for axis, (mode, dtype) in zip(axes[0], panels, strict=True):
        for x, cell in enumerate(c for c in cells if (c['mode'], c['dtype']) == (mode, dtype)):
            for name, row in kinds(cell).items():
                if name.startswith('plain'):
                    continue
                ours = name in OURS
                color = {'eager': 'tab:orange', 'fused': 'tab:blue', 'frozen': 'tab:green'}.get(name, 'gray')
                axis.plot(x, row['ratio'] - 1, 'o' if ours else 'x', color=color, label=name if ours else 'peers')
        axis.axhline(0, color='black', linewidth=0.8)
        names = [c['attn'] for c in cells if (c['mode'], c['dtype']) == (mode, dtype)]
        axis.set_xticks(range(len(names)), names, rotation=45)
        axis.set_title(f'{mode}, {dtype}')
    # Most of what is to be seen is near 0, and GAM is far away.
    axes[0][0].set_yscale('symlog', linthresh=0.25, linscale=2)
    ticks = (-0.1, 0, 0.1, 0.25, 0.5, 1, 2)
    axes[0][0].set_ylim(-0.15, 3)
    axes[0][0].set_yticks(ticks, [f'{t:g}' for t in ticks])
    axes[0][0].set_ylabel('time over plain ResNet-50, less 1')
    handles = {label: h for a in axes[0] for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    axes[0][-1].legend(handles.values(), handles.keys())
    figure.tight_layout()
    with atomic_write(RESULTS / 'overhead.png') as path:
        figure.savefig(path, dpi=120, format='png')
    plt.close(figure)


def main() -> None:
    speed, memory = RESULTS / 'speed.json', RESULTS / 'memory.json'
    cells = json.loads(speed.read_text()) if speed.exists() else []
    if not cells and not memory.exists():
        raise SystemExit('No results yet: run benchmarks/throughput.py and benchmarks/memory.py first.')
    text = markdown(cells) if cells else ''
    if memory.exists():
        text += memory_markdown(json.loads(memory.read_text()))
    with atomic_write(RESULTS / 'speed.md') as path:
        path.write_text(text)
    if cells:
        plot(cells)


if __name__ == '__main__':
    main()
