"""Pictures of attentions: one per image, for one model or several, and one for a folder of images.

Figures are made without pyplot, so that nothing global is touched and no display is needed. What a panel looks like
stands in `panels`.
"""

import io
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..files import atomic_write
from ..layers import Gate
from ..optional import require
from .gates import Gates, Kinds, stage_sites
from .health import HIGH, LOW, GateHealth
from .panels import (
    BLUE,
    GREEN,
    GREY,
    MAPS,
    ORANGE,
    Scale,
    colour_bar,
    draw_map,
    draw_panel,
    form_of,
    percent,
    scale_of,
    short,
    shown_values,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

MAX_STAGES = 5
UNTRAINED = 'untrained: random weights'

# A kind of gate as a row of panels shows it. What has another name, meaning or form is another row.
_Row = tuple[str, Gate]


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
        untrained: The weights are random, which the picture says.
    """

    image: np.ndarray
    maps: Mapping[str, Gates]
    kinds: Mapping[str, Kinds]
    top: Sequence[tuple[str, float]]
    title: str = ''
    cam: np.ndarray | str | None = None
    untrained: bool = False

    def rows(self) -> dict[_Row, dict[str, Tensor]]:
        """Kind of gate -> site -> what its panel shows, of the sites that there is room for."""
        found: dict[_Row, dict[str, Tensor]] = {}
        for site in self.shown_sites():
            for kind, gate in self.kinds[site].items():  # In the order in which the class names them.
                if kind in self.maps[site]:
                    found.setdefault((kind, gate), {})[site] = shown_values(self.maps[site][kind][0], gate.axes)
        return found

    def shown_sites(self) -> list[str]:
        """The last site of each stage, and of many stages an even choice."""
        return _evenly(list(stage_sites(self.maps).values()), MAX_STAGES)


@dataclass
class Summary:
    """All that the picture of a folder shows.

    Attributes:
        title: Model, folder and number of images.
        classes: Class of each image.
        vectors: Site -> (images, values): each image's gates of one site, made short.
        health: Site -> kind -> health, as from `attention_health`.
        notes: What had to be left out, and why.
        gates: Site -> what its vectors are.
        untrained: As for `Explanation`.
    """

    title: str
    classes: list[str]
    vectors: Mapping[str, Tensor]
    health: Mapping[str, Mapping[str, GateHealth]]
    notes: list[str] = field(default_factory=list)
    gates: Mapping[str, Gate] = field(default_factory=dict)
    untrained: bool = False


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


def draw_explanation(*explanations: Explanation, beside: Sequence[Explanation] = ()) -> 'Figure':
    """One image: what went in, what came out, and a row of panels for each kind of gate, one column a stage.

    Several models stand below each other. Each kind of gate has one scale over the whole picture.

    Args:
        *explanations: What to show, one a model.
        beside: What pictures of their own show beside this one, which share its scales.

    Raises:
        ValueError: There is nothing to show.
        ImportError: matplotlib is missing.
    """
    if not explanations:
        raise ValueError('draw_explanation needs at least one explanation.')
    rows = [e.rows() for e in explanations]
    values: dict[tuple[str, Gate], list[Tensor]] = {}
    for (kind, gate), sites in (item for r in (*rows, *(e.rows() for e in beside)) for item in r.items()):
        values.setdefault((kind, gate), []).extend(sites.values())
    scales = {row: scale_of(shown, row[1]) for row, shown in values.items()}
    columns = max(4, *(len(e.shown_sites()) for e in explanations))
    heights = [_row_heights(e, list(r)) for e, r in zip(explanations, rows, strict=True)]
    totals = [sum(h) + 0.5 * len(h) + 0.5 for h in heights]
    figure = _figure(3.4 * columns, sum(totals))
    parts: Sequence[Figure | SubFigure] = [figure]
    if len(explanations) > 1:
        parts = list(figure.subfigures(len(explanations), 1, height_ratios=totals, squeeze=False)[:, 0])
    for part, e, r, h in zip(parts, explanations, rows, heights, strict=True):
        _draw_model(part, e, r, scales, h, columns)
    return figure


def _row_heights(e: Explanation, rows: Sequence[_Row]) -> list[float]:
    # Rows are as tall as the image asks, within what a page can bear.
    tall = 3.0 * min(max(e.image.shape[0] / e.image.shape[1], 0.5), 1.6)
    return [tall, *(tall if form_of(gate.axes) == 'map' else 2.4 for _, gate in rows)]


def _draw_model(
    part: 'Figure | SubFigure',
    e: Explanation,
    rows: Mapping[_Row, Mapping[str, Tensor]],
    scales: Mapping[_Row, Scale],
    heights: Sequence[float],
    columns: int,
) -> None:
    title = short(e.title, 26 * columns)
    part.suptitle(f'{title}\n{UNTRAINED}' if e.untrained else title, fontsize=13)
    grid = part.add_gridspec(len(heights), columns, height_ratios=heights)
    _show(part.add_subplot(grid[0, 0]), e.image, 'input')
    first = 1
    if e.cam is not None:
        _draw_cam(part.add_subplot(grid[0, 1]), e.image, e.cam)
        first = 2
    _draw_top(part.add_subplot(grid[0, first:]), e.top)
    stages = e.shown_sites()
    for line, (row, sites) in enumerate(rows.items(), 1):
        for site, values in sites.items():
            axes = part.add_subplot(grid[line, stages.index(site)])
            draw_panel(axes, values, row[1], scales[row], e.image)
            axes.set_title(f'{short(site, 26)}: {short(row[1].title, 24)}', fontsize=9)
    if not e.maps:
        part.supxlabel('this model has no attention', fontsize=9)
    elif len(e.maps) > len(stages):
        part.supxlabel(f'{len(stages)} of {len(e.maps)} attentions shown: the last of each stage', fontsize=9)


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
    figure.suptitle(short(s.title, 110) + (f'\n{UNTRAINED}' if s.untrained else ''), fontsize=13)
    grid = figure.add_gridspec(2, 1, height_ratios=heights)
    top = grid[0].subgridspec(1, 2, width_ratios=(3, 2))
    _draw_health(figure.add_subplot(top[0]), bars)
    _draw_separation(figure.add_subplot(top[1]), s)
    bottom = grid[1].subgridspec(1, max(len(stages), 1))
    means = {
        site: torch.stack([s.vectors[site][torch.tensor([c == k for k in s.classes])].mean(0) for c in classes])
        for site in stages
    }
    gates = {site: s.gates.get(site, Gate('C', 'gate')) for site in stages}
    for column, site in enumerate(stages):
        axes = figure.add_subplot(bottom[column])
        scale = scale_of(
            [means[other] for other in stages if gates[other] == gates[site]], Gate('C', '', gates[site].multiplies)
        )
        _draw_classes(axes, means[site], f'{short(site, 26)}: mean {short(gates[site].title, 20)} of a class', scale)
        axes.set_yticks(range(len(classes)), [short(c, 22) for c in classes] if column == 0 else [], fontsize=8)
    if s.notes:
        figure.supxlabel('\n'.join(short(n, 150) for n in s.notes), fontsize=9)
    return figure


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


def _draw_cam(axes: 'Axes', image: np.ndarray, cam: np.ndarray | str) -> None:
    if isinstance(cam, str):
        axes.axis('off')
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title('Grad-CAM: not drawn', fontsize=9)
        axes.text(
            0.5, 0.5, '\n'.join(textwrap.wrap(cam, 34)), ha='center', va='center', fontsize=9, transform=axes.transAxes
        )
        return
    draw_map(axes, torch.from_numpy(np.ascontiguousarray(cam)), 'Grad-CAM', (0.0, 1.0), image)
    axes.set_title('Grad-CAM of the first label', fontsize=9)


def _draw_top(axes: 'Axes', top: Sequence[tuple[str, float]]) -> None:
    axes.set_title(f'top {len(top)}', fontsize=9)
    for row, (label, probability) in enumerate(top):
        axes.barh(row, probability, color=BLUE, alpha=0.35)
        axes.text(0.01, row, short(label, 44), va='center', fontsize=10)
        axes.text(0.99, row, percent(probability), va='center', ha='right', fontsize=10)
    axes.set_ylim(max(len(top), 5) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_yticks([])
    axes.set_xticks([0, 0.5, 1], ['0', '.5', '1'], fontsize=8)


def _draw_health(axes: 'Axes', bars: Sequence[tuple[str, GateHealth]]) -> None:
    axes.set_title(f'gate values: orange /// below {LOW}, blue between, green ... above {HIGH}', fontsize=10)
    if not bars:
        axes.text(0.5, 0.5, 'no statistics: see the note below', ha='center', va='center', transform=axes.transAxes)
    for row, (_, h) in enumerate(bars):
        if h.low is None or h.high is None:
            axes.barh(row, 1, color=GREY, height=0.8)
            word = 'varies' if h.verdict == 'alive' else h.verdict
            axes.text(1.01, row, f'no gate; {word}', va='center', fontsize=8)
            continue
        left = 0.0
        for share, colour, hatch in ((h.low, ORANGE, '//'), (1 - h.low - h.high, BLUE, ''), (h.high, GREEN, '..')):
            axes.barh(row, share, left=left, color=colour, hatch=hatch, edgecolor='white', linewidth=0, height=0.8)
            left += share
        flags = [h.verdict] if h.verdict in ('constant', 'identity', 'not finite') else []
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


def _draw_classes(axes: 'Axes', means: Tensor, title: str, scale: Scale) -> None:
    """Mean gates (classes, values) of the values that differ most between classes."""
    chosen = means.var(0, unbiased=False).argsort(descending=True)[:16].sort().values
    shown = axes.imshow(
        means[:, chosen].numpy(), cmap=MAPS, aspect='auto', interpolation='nearest', vmin=scale[0], vmax=scale[1]
    )
    axes.set_title(title, fontsize=9)
    axes.set_xticks(range(len(chosen)), [str(int(c)) for c in chosen], rotation=90, fontsize=7)
    axes.set_xlabel('values that differ most between classes', fontsize=8)
    colour_bar(axes, shown, 'mean gate')


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


def _count(n: int) -> str:
    return str(n) if n < 10_000 else f'{n / 1000:.0f}k'


def _evenly(names: list[str], most: int) -> list[str]:
    if len(names) <= most:
        return names
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]


def _most_common(classes: Sequence[str], most: int) -> list[str]:
    return sorted(c for c, _ in Counter(classes).most_common(most))
