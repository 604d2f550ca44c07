"""Pictures of attentions: one per image, and one for a folder of images.

Maps are cividis and viridis, bars the blue, orange and green of Okabe and Ito: all keep their order for colour-blind
eyes and in grey. Figures are made without pyplot, so that nothing global is touched and no display is needed.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..files import atomic_write
from ..layers import Gate
from ..optional import require
from .gates import Gates, Kinds, stage_sites
from .health import HIGH, LOW, GateHealth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = '#0072B2', '#E69F00', '#009E73', '#999999'
MAX_STAGES = 5


@dataclass
class Explanation:
    """All that a picture of one image shows.

    Attributes:
        image: What the model saw, (H, W, 3) or (H, W) in [0, 1].
        maps: `attention_maps` of that one image; empty for a model without attention.
        kinds: `gate_kinds` of the model.
        top: Labels with their probabilities, best first.
        title: Model and image.
        cam: Grad-CAM (H, W) in [0, 1], or why there is none, or None to leave its panel out.
    """

    image: np.ndarray
    maps: Mapping[str, Gates]
    kinds: Mapping[str, Kinds]
    top: Sequence[tuple[str, float]]
    title: str = ''
    cam: np.ndarray | str | None = None


@dataclass
class Summary:
    """All that the picture of a folder shows.

    Attributes:
        title: Model, folder and number of images.
        classes: Class of each image.
        vectors: Site -> (images, values): each image's gates of one site, made short.
        health: Site -> kind -> health, as from `attention_health`.
        notes: What had to be left out, and why.
    """

    title: str
    classes: list[str]
    vectors: Mapping[str, Tensor]
    health: Mapping[str, Mapping[str, GateHealth]]
    notes: list[str] = field(default_factory=list)


def save_figure(figure: 'Figure', path: str | Path) -> None:
    """Writes a figure as PNG, whole or not at all.

    Args:
        figure: A matplotlib figure.
        path: The file.
    """
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format='png', dpi=110)


def figure_image(figure: 'Figure') -> Image.Image:
    """A figure as an image, for whoever shows it without a file.

    Args:
        figure: A matplotlib figure.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=110)
    return Image.open(buffer).convert('RGB')


def draw_explanation(e: Explanation) -> 'Figure':
    """One image: what went in, what came out, and a row of panels for each kind of gate, one column a stage.

    Args:
        e: What to show.

    Raises:
        ImportError: matplotlib is missing.
    """
    stages = _evenly(list(stage_sites(e.maps).values()), MAX_STAGES)
    # In the order in which the classes name them.
    rows = list(dict.fromkeys(kind for site in stages for kind in e.kinds[site] if kind in e.maps[site]))
    columns = max(4, len(stages))
    # Rows are as tall as the image asks, within what a page can bear.
    aspect = min(max(e.image.shape[0] / e.image.shape[1], 0.5), 1.6)
    over = [any(_is_map(e.kinds[site][kind]) for site in stages if kind in e.kinds[site]) for kind in rows]
    heights = [3.0 * aspect] + [3.0 * aspect if is_map else 2.4 for is_map in over]
    figure = _figure(3.4 * columns, sum(heights) + 0.5 * len(heights) + 0.5)
    figure.suptitle(short(e.title, 30 * columns), fontsize=13)
    grid = figure.add_gridspec(1 + len(rows), columns, height_ratios=heights)
    _show(figure.add_subplot(grid[0, 0]), e.image, 'input')
    first = 1
    if e.cam is not None:
        _draw_cam(figure.add_subplot(grid[0, 1]), e.image, e.cam)
        first = 2
    _draw_top(figure.add_subplot(grid[0, first:]), e.top)
    for row, kind in enumerate(rows, 1):
        shown = {site: e.maps[site][kind][0].detach().cpu() for site in stages if kind in e.maps[site]}
        scale = _scale([_flat(gate, e.kinds[site][kind]) for site, gate in shown.items()], e.kinds, kind)
        for column, site in enumerate(stages):
            if site in shown:
                axes = figure.add_subplot(grid[row, column])
                gate = e.kinds[site][kind]
                _panel(axes, shown[site], gate, e.image, scale)
                axes.set_title(f'{short(site, 26)}: {gate.title}', fontsize=9)
    if len(e.maps) > len(stages):
        figure.supxlabel(f'{len(stages)} of {len(e.maps)} attentions shown: the last of each stage', fontsize=9)
    return figure


def draw_summary(s: Summary) -> 'Figure':
    """A folder: health of every attention, where gates tell classes apart, and which channels do.

    Args:
        s: What to show.

    Raises:
        ImportError: matplotlib is missing.
    """
    bars = [(f'{site} {kind}', h) for site, kinds in s.health.items() for kind, h in kinds.items()]
    classes = _most_common(s.classes, 20)
    stages = _evenly(list(stage_sites(s.vectors).values()), 4)
    heights = [1.6 + 0.24 * len(bars), 1.6 + 0.24 * max(len(classes), 3)]
    figure = _figure(14, sum(heights) + 0.8 + 0.3 * len(s.notes))
    figure.suptitle(short(s.title, 110), fontsize=13)
    grid = figure.add_gridspec(2, 1, height_ratios=heights)
    top = grid[0].subgridspec(1, 2, width_ratios=(3, 2))
    _draw_health(figure.add_subplot(top[0]), bars)
    _draw_separation(figure.add_subplot(top[1]), s)
    bottom = grid[1].subgridspec(1, max(len(stages), 1))
    for column, site in enumerate(stages):
        _draw_classes(figure.add_subplot(bottom[column]), s, site, classes, named=column == 0)
    if s.notes:
        figure.supxlabel('\n'.join(short(n, 150) for n in s.notes), fontsize=9)
    return figure


def gate_vector(gates: Gates, kinds: Kinds) -> Tensor:
    """Each image's gates as one short vector (N, D), the same length for every image size.

    Args:
        gates: One site's gates, batched.
        kinds: What they are.

    Raises:
        ValueError: There is no gate.
    """
    if not gates:
        raise ValueError('A site without gates has no vector.')
    # What features are multiplied by says most, then what has a value for each channel.
    kind = max(gates, key=lambda k: (kinds[k].multiplies, 'C' in kinds[k].axes, list(kinds).index(k)))
    gate, axes = gates[kind].float(), kinds[kind].axes
    if axes[-2:] in ('DD', 'PP'):
        gate, axes = gate.diagonal(dim1=-2, dim2=-1), axes[:-1]
    if axes.count('C') == 2:  # (..., from, to): how much each channel is looked at.
        gate, axes = gate.mean(-2), axes[:-1]
    if 'B' in axes and 'C' in axes:  # Branches of a channel sum to 1: the last says it.
        gate, axes = gate.select(1 + axes.index('B'), -1), axes.replace('B', '')
    if kept := next((axis for axis in 'CD' if axis in axes), ''):
        others = [1 + i for i, axis in enumerate(axes) if axis != kept]
        return gate.mean(others) if others else gate
    if axes[-2:] == 'HW':
        return F.adaptive_avg_pool2d(gate.flatten(1, -3) if gate.ndim > 3 else gate[:, None], 4).flatten(1)
    return F.adaptive_avg_pool1d(gate.flatten(1)[:, None], 16).flatten(1)


def class_separation(vectors: Tensor, classes: Sequence[str]) -> float:
    """Share of the gates' variance that lies between classes: 0 when classes look alike, 1 when they explain all.

    Args:
        vectors: (images, values).
        classes: Class of each image.
    """
    total = (vectors - vectors.mean(0)).square().sum()
    if total <= 1e-12 * vectors.numel():
        return 0.0
    between = torch.zeros(())
    for c in set(classes):
        group = vectors[torch.tensor([k == c for k in classes])]
        between = between + len(group) * (group.mean(0) - vectors.mean(0)).square().sum()
    return float(between / total)


def short(text: str, width: int) -> str:
    """Text from elsewhere made fit for a picture: one line of at most `width` characters, none of them markup.

    Args:
        text: A label, a file name, a title.
        width: Most characters; of longer text the start and the end stay, around an ellipsis.
    """
    text = ' '.join(''.join(c if c.isprintable() else ' ' for c in text).split())
    if len(text) > width:
        tail = (width - 1) // 3
        text = f'{text[: width - 1 - tail]}…{text[len(text) - tail :]}'
    # Between two dollars matplotlib would set a formula, and fail on what is none.
    return text.replace('$', r'\$')


# Panels: each draws one gate of one image, without its batch dimension. Which one draws a gate follows from its axes.


def _is_map(kind: Gate) -> bool:
    return 'H' in kind.axes and 'W' in kind.axes


def _flat(gate: Tensor, kind: Gate) -> Tensor:
    """What a panel shows of a gate: maps (H, W) and matrices as means over all that stands before."""
    keep = 1 if kind.axes == 'C' or gate.ndim == 1 else 2
    return gate if 'B' in kind.axes or gate.ndim <= keep else gate.flatten(0, -keep - 1).mean(0)


def _scale(gates: Sequence[Tensor], kinds: Mapping[str, Kinds], kind: str) -> tuple[float, float]:
    """One scale for all panels of a kind: gates from 0, so that nearly equal ones look so; all else its own range."""
    low, high = min(float(g.min()) for g in gates), max(float(g.max()) for g in gates)
    if all(k[kind].multiplies for k in kinds.values() if kind in k):
        return min(low, 0.0), max(high, 1.0)
    return low, max(high, low + 0.01 * max(abs(low), abs(high), 1e-12))


def _panel(axes: 'Axes', gate: Tensor, kind: Gate, image: np.ndarray, scale: tuple[float, float]) -> None:
    named = kind.axes
    shown = _flat(gate, kind)
    if 'B' in named and shown.ndim == 2:
        _branches(axes, shown, kind.entries)
    elif _is_map(kind):
        _over(axes, shown, image, scale, 'gate' if kind.multiplies else 'value')
    elif shown.ndim == 1:
        _bars(axes, shown) if named == 'C' else _line(axes, shown, _AXES.get(named, 'position'), scale)
    elif shown.ndim == 2:
        lines_first = 'C' in named and named[-1] == 'C' and named[-2] != 'C'
        shown, named = (shown.T, named[-2:][::-1]) if lines_first else (shown, named[-2:])
        _matrix(axes, shown, _AXES.get(named[-1], ''), scale if kind.multiplies else None)
    else:
        _matrix(axes, shown.flatten(0, -2), '', None)


def _over(axes: 'Axes', gate: Tensor, image: np.ndarray, scale: tuple[float, float], quantity: str) -> None:
    """A map (H, W) over the image in grey."""
    height, width = image.shape[:2]
    grey = image if image.ndim == 2 else image.mean(-1)
    axes.imshow(grey, cmap='gray', vmin=0, vmax=1, extent=(0, width, height, 0))
    low, high = float(gate.min()), float(gate.max())
    shown = axes.imshow(
        gate.numpy(),
        cmap='cividis',
        alpha=0.65,
        extent=(0, width, height, 0),
        interpolation='bilinear' if min(gate.shape) > 1 else 'nearest',
        vmin=scale[0],
        vmax=scale[1],
    )
    axes.set_xticks([])
    axes.set_yticks([])
    flat = 'constant ' if high - low < 1e-4 else ''
    axes.set_xlabel(f'{_size(gate)}, {flat}{_range(low, high)}', fontsize=8)
    _bar(axes, shown, quantity)


def _bars(axes: 'Axes', gate: Tensor) -> None:
    """Weights (C), sorted."""
    order = gate.argsort(descending=True)
    ranked = gate[order].numpy()
    axes.fill_between(np.arange(len(ranked) + 1), np.append(ranked, ranked[-1]), step='post', color=BLUE, lw=0)
    axes.set_xlim(0, len(ranked))
    if ranked[-1] >= 0 and ranked[0] <= 1:
        axes.set_ylim(0, 1.02)
        for level in (LOW, HIGH):
            axes.axhline(level, color=GREY, lw=0.8, ls='--')
        counts = f'; {int((gate < LOW).sum())} < {LOW}, {int((gate > HIGH).sum())} > {HIGH}'
    else:
        axes.axhline(0, color=GREY, lw=0.8)
        counts = ''
    strongest = ', '.join(str(int(c)) for c in order[:5])
    flat = ranked[0] - ranked[-1] < 1e-4
    axes.set_xlabel(
        f'{len(ranked)} channels, sorted{counts}\n' + (f'all {ranked[0]:.3g}' if flat else f'strongest: {strongest}'),
        fontsize=8,
    )
    axes.tick_params(labelsize=8)


def _line(axes: 'Axes', gate: Tensor, along: str, scale: tuple[float, float]) -> None:
    """Values along a row, a column or whatever else has an order."""
    axes.plot(np.arange(len(gate)), gate.numpy(), color=BLUE, marker='o', markersize=3, lw=1.2)
    axes.set_ylim(scale[0] - 0.02, scale[1] + 0.02)
    axes.set_xlabel(f'{along}; {_range(float(gate.min()), float(gate.max()))}', fontsize=8)
    axes.tick_params(labelsize=8)


def _branches(axes: 'Axes', gate: Tensor, entries: Sequence[str]) -> None:
    """Shares of branches (B, C) that sum to 1, channels sorted by the last."""
    order = gate[-1].argsort(descending=True)
    ranked = gate[:, order].numpy()
    names = list(entries) or [f'branch {i}' for i in range(len(gate))]
    x = np.arange(ranked.shape[1] + 1)
    below = np.zeros(len(x))
    for share, name, colour in zip(ranked[::-1], names[::-1], (ORANGE, BLUE, GREEN, GREY), strict=False):
        above = below + np.append(share, share[-1])
        axes.fill_between(x, below, above, step='post', color=colour, lw=0, label=name)
        below = above
    axes.set_xlim(0, ranked.shape[1])
    axes.set_ylim(0, 1)
    axes.axhline(0.5, color='white', lw=0.8, ls='--')
    axes.legend(fontsize=7, loc='upper right', framealpha=0.9)
    axes.set_xlabel(
        f'{ranked.shape[1]} channels, sorted; mean {float(gate[-1].mean()):.2f} {names[-1]}\n'
        f'most {names[-1]}: {", ".join(str(int(c)) for c in order[:5])}',
        fontsize=8,
    )
    axes.tick_params(labelsize=8)


def _matrix(axes: 'Axes', gate: Tensor, along: str, scale: tuple[float, float] | None) -> None:
    """A matrix; without a scale its colours leave out the hundredth part at either end, such as a strong diagonal."""
    low, high = (float(v) for v in np.quantile(gate.numpy(), (0.01, 0.99))) if scale is None else scale
    shown = axes.imshow(
        gate.numpy(), cmap='viridis', interpolation='nearest', vmin=low, vmax=max(high, low + 1e-12), aspect='auto'
    )
    what = f'{along} of the map; {_range(float(gate.min()), float(gate.max()))}' if along else f'{_size(gate)}'
    axes.set_xlabel(what if scale else f'{_size(gate)}, colours {_range(low, high)}', fontsize=8)
    axes.tick_params(labelsize=8)
    _bar(axes, shown, 'gate' if scale else 'value')


_AXES = {'H': 'row', 'W': 'column'}


def _draw_cam(axes: 'Axes', image: np.ndarray, cam: np.ndarray | str) -> None:
    if isinstance(cam, str):
        axes.axis('off')
        axes.set_title('Grad-CAM: not drawn', fontsize=9)
        axes.text(0.5, 0.5, _wrap(cam, 34), ha='center', va='center', fontsize=9, transform=axes.transAxes)
        return
    _over(axes, torch.from_numpy(np.ascontiguousarray(cam)), image, (0.0, 1.0), 'evidence')
    axes.set_title('Grad-CAM of the first label', fontsize=9)


def _draw_top(axes: 'Axes', top: Sequence[tuple[str, float]]) -> None:
    axes.set_title(f'top {len(top)}', fontsize=9)
    for row, (label, probability) in enumerate(top):
        axes.barh(row, probability, color=BLUE, alpha=0.35)
        axes.text(0.01, row, short(label, 44), va='center', fontsize=10)
        axes.text(0.99, row, f'{100 * probability:.1f} %', va='center', ha='right', fontsize=10)
    axes.set_ylim(max(len(top), 5) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_yticks([])
    axes.set_xticks([0, 0.5, 1], ['0', '.5', '1'], fontsize=8)


def _draw_health(axes: 'Axes', bars: Sequence[tuple[str, GateHealth]]) -> None:
    axes.set_title(f'gate values: orange below {LOW}, green above {HIGH}, blue between', fontsize=10)
    if not bars:
        axes.text(0.5, 0.5, 'no statistics: see the note below', ha='center', va='center', transform=axes.transAxes)
    for row, (_, h) in enumerate(bars):
        if h.low is None or h.high is None:
            axes.barh(row, 1, color=GREY, height=0.8)
            word = 'varies' if h.verdict == 'alive' else h.verdict
            axes.text(1.01, row, f'no gate; {word}', va='center', fontsize=8)
            continue
        left = 0.0
        for share, colour in ((h.low, ORANGE), (1 - h.low - h.high, BLUE), (h.high, GREEN)):
            axes.barh(row, share, left=left, color=colour, height=0.8)
            left += share
        flags = [h.verdict] if h.verdict in ('constant', 'identity') else []
        counts = [f'{_count(n)} {word}' for n, word in ((h.dead, 'dead'), (h.saturated, 'saturated')) if n]
        flags += [f'{", ".join(counts)} of {_count(h.gates)}'] if counts else []
        axes.text(1.01, row, '; '.join(flags) or 'alive', va='center', fontsize=8)
    axes.set_yticks(range(len(bars)), [short(n, 34) for n, _ in bars], fontsize=8)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    # Room on the right for the flags, inside the axes so that the layout knows of them.
    axes.set_xlim(0, 1.7)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ['0', '.25', '.5', '.75', '1'], fontsize=8)


def _draw_separation(axes: 'Axes', s: Summary) -> None:
    axes.set_title('variance of gates between classes / all variance', fontsize=10)
    for row, (_, vectors) in enumerate(s.vectors.items()):
        share = class_separation(vectors, s.classes)
        axes.barh(row, share, color=BLUE, height=0.8)
        axes.text(share + 0.01, row, f'{share:.2f}', va='center', fontsize=8)
    if len(set(s.classes)) < 2:
        axes.text(0.5, 0.5, 'one class only', ha='center', transform=axes.transAxes)
    axes.set_yticks(range(len(s.vectors)), [short(n, 26) for n in s.vectors], fontsize=8)
    axes.set_ylim(len(s.vectors) - 0.4, -0.6)
    axes.set_xlim(0, 1.12)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ['0', '.25', '.5', '.75', '1'], fontsize=8)


def _draw_classes(axes: 'Axes', s: Summary, site: str, classes: Sequence[str], *, named: bool) -> None:
    vectors = s.vectors[site]
    means = torch.stack([vectors[torch.tensor([c == k for k in s.classes])].mean(0) for c in classes])
    chosen = means.var(0, unbiased=False).argsort(descending=True)[:16].sort().values
    shown = axes.imshow(means[:, chosen].numpy(), cmap='viridis', aspect='auto', interpolation='nearest')
    axes.set_title(f'{short(site, 26)}: mean gate of a class', fontsize=9)
    axes.set_yticks(range(len(classes)), [short(c, 22) for c in classes] if named else [], fontsize=8)
    axes.set_xticks(range(len(chosen)), [str(int(c)) for c in chosen], rotation=90, fontsize=7)
    axes.set_xlabel('values that differ most between classes', fontsize=8)
    _bar(axes, shown, 'mean gate')


def _figure(width: float, height: float) -> 'Figure':
    require('matplotlib', 'lab')
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout='constrained')


def _show(axes: 'Axes', image: np.ndarray, title: str) -> None:
    axes.imshow(image, cmap='gray', vmin=0, vmax=1, interpolation='nearest')
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(f'{image.shape[0]} x {image.shape[1]}', fontsize=8)


def _bar(axes: 'Axes', shown: Any, quantity: str) -> None:
    from matplotlib.ticker import MaxNLocator

    figure = axes.get_figure()
    assert figure is not None
    # As tall as the image, whatever its shape; a bar beside the axes would be as tall as the row.
    bar = figure.colorbar(shown, cax=axes.inset_axes((1.02, 0, 0.05, 1)))
    bar.ax.tick_params(labelsize=7)
    bar.ax.yaxis.set_major_locator(MaxNLocator(4))
    bar.ax.ticklabel_format(useOffset=False)
    bar.set_label(quantity, fontsize=7)


def _size(gate: Tensor) -> str:
    return ' x '.join(map(str, gate.shape))


def _count(n: int) -> str:
    return str(n) if n < 10_000 else f'{n / 1000:.0f}k'


def _range(low: float, high: float) -> str:
    return f'{low:.4g}' if f'{low:.4g}' == f'{high:.4g}' else f'{low:.4g} to {high:.4g}'


def _wrap(text: str, width: int) -> str:
    import textwrap

    return '\n'.join(textwrap.wrap(text, width))


def _evenly(names: list[str], most: int) -> list[str]:
    if len(names) <= most:
        return names
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]


def _most_common(classes: Sequence[str], most: int) -> list[str]:
    from collections import Counter

    return sorted(c for c, _ in Counter(classes).most_common(most))
