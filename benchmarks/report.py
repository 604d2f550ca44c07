"""Writes results/speed.md, results/overhead.png and results/costs.png from results/speed.json and results/memory.json.

    python benchmarks/report.py

Ratios are to plain timm ResNets in the same rounds. A row says where ours loses: eager against the fastest peer; fused
against that, against eager, and against what torch.compile makes of the same model.
"""

import json
from pathlib import Path
from typing import Any

from timm_attn.bench import BASELINE, kinds, losses, unusual
from timm_attn.files import atomic_write
from timm_attn.optional import require

RESULTS = Path(__file__).parent / 'results'

# Kind of row -> label, marker, colour (of Okabe and Ito, told apart by all eyes).
STYLES = {
    'eager': ('eager', 'o', '#D55E00'),
    'fused': ('fused', '^', '#0072B2'),
    'frozen': ('fused and frozen', 's', '#009E73'),
    'compiled': ('torch.compile', 'D', '#CC79A7'),
}
PEERS = ('peers', 'x', '#000000')


def markdown(cells: list[dict[str, Any]]) -> str:
    first = cells[0]['environment']
    lines = [
        '# Time beside plain ResNets',
        '',
        f'{first["machine"]}, {first["cores"]} cores, torch {first["torch"]}, timm {first["timm"]}, '
        f'{first["capability"]}. Medians of interleaved rounds [quartiles], as ratios to '
        "timm's plain eager ResNet in the same round. Usual conditions: batch 4, 224 pixels, depth 50, float32, one "
        'thread, contiguous. First step: seconds, compilation included, where inductor finds on disk what an earlier '
        'run has compiled. Made by `python benchmarks/throughput.py`.',
        '',
        '| attention | mode | conditions | rounds | ratios | first step of fused, compiled, s | loses |',
        '|---|---|---|---|---|---|---|',
    ]
    for cell in cells:
        rows = kinds(cell)
        shown = ', '.join(
            f'{k} {r["ratio"]:.3f} [{r["ratio_quartiles"][0]:.3f}, {r["ratio_quartiles"][1]:.3f}]'
            for k, r in rows.items()
            if k != BASELINE
        )
        starts = (rows.get(k) or rows.get(f'{BASELINE} {k}') for k in ('fused', 'compiled'))
        first_steps = ', '.join(f'{r["first"]:.0f}' if r else '-' for r in starts)
        lines.append(
            f'| {cell["attn"]} | {cell["mode"]} | {unusual(cell) or "usual"} | {cell["rounds"]} | {shown} | '
            f'{first_steps} | {"; ".join(losses({k: r["ratio"] for k, r in rows.items()})) or "-"} |'
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


def overhead(cells: list[dict[str, Any]]) -> None:
    """Time of every attention beside the plain model, in each way and of each peer."""
    require('matplotlib', 'bench')
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    usual = {(c['attn'], c['mode']): kinds(c) for c in cells if not unusual(c) and c['attn'] != BASELINE}
    order = sorted(
        {a for a, _ in usual}, key=lambda a: usual.get((a, 'train'), usual[a, 'inference'])['eager']['ratio']
    )
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.32 * len(order) + 1.6), sharey=True)
    for axis, mode in zip(axes, ('inference', 'train'), strict=True):
        for y, attn in enumerate(order):
            ratios = {k: r['ratio'] for k, r in usual.get((attn, mode), {}).items() if k != 'autotuned'}
            ratios = {k: v for k, v in ratios.items() if not k.startswith(BASELINE)}
            if not ratios:
                continue
            axis.plot([min(ratios.values()), max(ratios.values())], [y, y], color='0.85', linewidth=4, zorder=1)
            for kind, ratio in ratios.items():
                label, marker, colour = STYLES.get(kind, PEERS)
                # Hollow, so that those on one another can be told.
                face = {'c': colour} if marker == 'x' else {'facecolors': 'none', 'edgecolors': colour}
                axis.scatter(ratio, y, 46, marker=marker, linewidths=1.6, label=label, zorder=2, **face)
        axis.axvline(1, color='black', linewidth=0.8)
        axis.set_xscale('log')
        ticks = (0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 4, 5)
        axis.set_xticks(ticks, [f'{t:g}' for t in ticks])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(axis='x', color='0.9')
        axis.set_xlabel("time of a step / timm's plain ResNet-50's (1: attention is free)")
        axis.set_title({'inference': 'inference', 'train': 'training step'}[mode])
    axes[0].set_yticks(range(len(order)), order)
    axes[0].invert_yaxis()
    axes[0].set_ylabel('attention')
    handles = {label: h for a in axes for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    axes[1].legend(handles.values(), handles.keys(), loc='upper right')
    _save(figure, 'overhead.png')


def costs(cells: list[dict[str, Any]], memory: dict[str, Any]) -> None:
    """Time of a training step against bytes kept for it, of every attention, eager and fused."""
    require('matplotlib', 'bench')
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    kept = {r['model']: r['kept_bytes_ratio'] for r in memory['rows']}
    times = {c['attn']: kinds(c) for c in cells if not unusual(c) and c['mode'] == 'train'}
    figure, axis = plt.subplots(figsize=(9, 6.5))
    names = [a for a in times if a in kept and a != BASELINE]
    places = {}
    for way, suffix in (('fused', ' fused'), ('eager', '')):
        label, marker, colour = STYLES[way]
        xs, ys = [kept[f'{a}{suffix}'] for a in names], [times[a][way]['ratio'] for a in names]
        axis.scatter(
            xs, ys, 50, marker=marker, facecolors='none', edgecolors=colour, linewidths=1.6, label=label, zorder=2
        )
        places[way] = dict(zip(names, zip(xs, ys, strict=True), strict=True))
    for name in names:
        axis.plot(*zip(places['eager'][name], places['fused'][name], strict=True), color='0.85', linewidth=1, zorder=1)
    axis.plot(1, 1, '*', color='black', markersize=12, label='plain ResNet-50')
    axis.set_xscale('log')
    axis.set_yscale('log')
    axis.margins(x=0.12)
    ticks_of = {axis.xaxis: (0.8, 1, 1.25, 1.5, 2, 2.5, 3), axis.yaxis: (0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 4)}
    for side, ticks in ticks_of.items():
        side.set_ticks(ticks, [f'{t:g}' for t in ticks])
        side.set_minor_formatter(NullFormatter())
    axis.grid(color='0.93')
    axis.set_xlabel("bytes kept for backward / timm's plain ResNet-50's")
    axis.set_ylabel("time of a training step / timm's plain ResNet-50's")
    _label(figure, axis, {name: places['eager'][name] for name in names})
    axis.legend(loc='lower right')
    _save(figure, 'costs.png')


def _label(figure: Any, axis: Any, points: dict[str, tuple[float, float]]) -> None:
    """Writes names beside their points, each on the first side where it covers no point and no other name."""
    taken = [(*axis.transData.transform(p), 6, 6) for p in points.values()]
    for name, point in points.items():
        x, y = axis.transData.transform(point)
        width, height = 3.6 * len(name) * figure.dpi / 72, 5 * figure.dpi / 72
        best = None
        for distance in (9, 18, 28, 40):
            d = distance * figure.dpi / 72
            for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (0.7, 0.7), (0.7, -0.7), (-0.7, 0.7), (-0.7, -0.7)):
                cx, cy = x + dx * (d + width), y + dy * (d + height)
                free = all(abs(cx - a) > width + w or abs(cy - b) > height + h for a, b, w, h in taken)
                if free and best is None:
                    best = cx, cy
        cx, cy = best or (x, y)
        taken.append((cx, cy, width, height))
        axis.annotate(
            name,
            point,
            axis.transData.inverted().transform((cx, cy)),
            textcoords='data',
            ha='center',
            va='center',
            fontsize=9,
            arrowprops={'arrowstyle': '-', 'color': '0.6', 'linewidth': 0.6, 'shrinkB': 4},
        )


def _save(figure: Any, name: str) -> None:
    figure.tight_layout()
    with atomic_write(RESULTS / name) as path:
        figure.savefig(path, dpi=120, format='png')


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
        overhead(cells)
        if memory.exists():
            costs(cells, json.loads(memory.read_text()))


if __name__ == '__main__':
    main()
