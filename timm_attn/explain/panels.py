"""Panels of a picture: what one gate of one image looks like, by the axes that its class declares.

A map of pixels lies over the image, weights of channels are bars, branches are stacked, what has rows or columns of the
image on one side is a profile, and all else a matrix. Colours are cividis for maps, and Okabe and Ito's blue, orange
and green for bars: all keep their order for colour-blind eyes and in grey.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers import Gate
from .gates import Kinds
from .health import HIGH, LOW

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, GREY = '#0072B2', '#E69F00', '#009E73', '#999999'
COLOURS = (BLUE, ORANGE, GREEN, '#CC79A7', '#56B4E9', '#D55E00')
LINES = ('-', '--', ':', '-.')
MAPS = 'cividis'
# Axes whose length does not depend on the image's size.
_FIXED = 'BCDGK'
_FLAT = 1e-4

Scale = tuple[float, float]


def form_of(axes: str) -> str:
    """How a gate of these axes is drawn: 'map', 'branches', 'bars', 'matrix' or 'profile'.

    Args:
        axes: `Gate.axes`.
    """
    if 'H' in axes and 'W' in axes:
        return 'map'
    if 'B' in axes:
        return 'branches'
    if len(axes) < 2:
        return 'bars'
    return 'matrix' if axes[-1] == axes[-2] else 'profile'


def mean_to(gate: Tensor, axes: str, kept: str) -> Tensor:
    """The mean of a tensor over all axes but some.

    Args:
        gate: A tensor with the axes `axes`, one letter each.
        axes: Those letters.
        kept: Letters among them, in the order of the result's axes.
    """
    gate = gate.movedim([axes.index(a) for a in kept], list(range(len(kept))))
    return gate.flatten(len(kept)).mean(-1) if gate.ndim > len(kept) else gate


def shown_values(gate: Tensor, axes: str) -> Tensor:
    """What a panel shows of one image's gate: one axis or two, and the mean over all others.

    Args:
        gate: One image's gate, without its batch axis.
        axes: Its axes, as `Gate.axes`.
    """
    gate = gate.detach().cpu().float()
    form = form_of(axes)
    if form == 'map':
        return mean_to(gate, axes, 'HW')
    if form == 'bars':
        return gate.reshape(-1)
    if form == 'matrix':
        return gate.flatten(0, -3).mean(0) if gate.ndim > 2 else gate
    # Of branches: a row each. Of profiles: the image's rows or columns go across.
    first, last = ('B', '') if form == 'branches' else ('', next((a for a in axes if a in 'HW'), ''))
    others = [a for a in axes if a not in first + last]
    wanted = 1 if first or last else 2
    others = ['C'] if 'C' in others and wanted == 1 else others[-wanted:]
    return mean_to(gate, axes, first + ''.join(others) + last)


def telling_kind(gates: Iterable[str], kinds: Kinds) -> str:
    """The kind of gate that stands for a site: one that multiplies rather than not, one of channels rather than not.

    Args:
        gates: Kinds that there are.
        kinds: What they are.
    """
    return min(gates, key=lambda kind: (not kinds[kind].multiplies, kinds[kind].axes.count('C') != 1))


def gate_vector(gate: Tensor, axes: str) -> Tensor:
    """Each image's gates as one short vector (N, D), of a length that does not depend on the image's size.

    Args:
        gate: One kind of gate of one site, batched.
        axes: Its axes behind the batch, as `Gate.axes`.
    """
    gate = gate.float()
    if axes.count('C') == 1:
        if 'B' in axes:  # Two branches that sum to one say the same twice: the last stands for both.
            gate, axes = gate.movedim(1 + axes.index('B'), 0)[-1], axes.replace('B', '', 1)
        return mean_to(gate, f'N{axes}', 'NC')
    if 'H' in axes and 'W' in axes:
        return F.adaptive_avg_pool2d(mean_to(gate, f'N{axes}', 'NHW')[:, None], 4).flatten(1)
    gate = gate.reshape(len(gate), -1, gate.shape[-1] if axes else 1).mean(1)  # (N, the last axis)
    return gate if not axes or axes[-1] in _FIXED else F.adaptive_avg_pool1d(gate[:, None], 8)[:, 0]


def scale_of(values: Sequence[Tensor], gate: Gate) -> Scale:
    """The one range of colours or bars for all panels of a kind.

    Args:
        values: `shown_values` of each panel.
        gate: What they are.

    Returns:
        For gates from 0 to at least 1, so that those which hardly differ look alike. For what multiplies nothing the
        lowest and the highest value, at least a tenth of the larger one apart.
    """
    finite = [v[v.isfinite()] for v in values]
    finite = [v for v in finite if v.numel()]
    if not finite:
        return 0.0, 1.0
    if form_of(gate.axes) == 'matrix':
        # A few strong entries, most of them on the diagonal, would leave the rest in one colour.
        ends = [np.quantile(v.numpy(), (0.01, 0.99)) for v in finite]
    else:
        ends = [(float(v.min()), float(v.max())) for v in finite]
    low, high = float(min(e[0] for e in ends)), float(max(e[1] for e in ends))
    if gate.multiplies:
        return min(low, 0.0), max(high, 1.0)
    room = max(max(0.1 * max(abs(low), abs(high)), 1e-12) - (high - low), 0.0) / 2
    return low - room, high + room


def quantity(gate: Gate) -> str:
    """What the numbers of a panel are, for its axis or bar of colours.

    Args:
        gate: What they are.
    """
    return f'gate ({gate.title})' if gate.multiplies and 'gate' not in gate.title else gate.title


def draw_panel(axes: 'Axes', values: Tensor, gate: Gate, scale: Scale, image: np.ndarray) -> None:
    """Draws one gate of one image.

    Args:
        axes: Where.
        values: `shown_values` of the gate.
        gate: What it is.
        scale: `scale_of` all panels of its kind.
        image: What the model saw, (H, W) or (H, W, 3) in [0, 1].
    """
    form = form_of(gate.axes)
    if form == 'map':
        draw_map(axes, values, quantity(gate), scale, image)
    elif form == 'branches':
        _draw_branches(axes, values, gate, scale)
    elif form == 'bars':
        _draw_bars(axes, values, gate, scale)
    else:
        _draw_matrix(axes, values, gate, scale)


def draw_map(axes: 'Axes', values: Tensor, title: str, scale: Scale, image: np.ndarray) -> None:
    """A map over the image in grey.

    Args:
        axes: Where.
        values: (H, W), of any size.
        title: What the colours mean.
        scale: The colours' range.
        image: The image.
    """
    height, width = image.shape[:2]
    grey = image if image.ndim == 2 else image.mean(-1)
    axes.imshow(grey, cmap='gray', vmin=0, vmax=1, extent=(0, width, height, 0))
    shown = axes.imshow(
        values.numpy(),
        cmap=MAPS,
        alpha=0.65,
        extent=(0, width, height, 0),
        interpolation='bilinear' if min(values.shape) > 1 else 'nearest',
        vmin=scale[0],
        vmax=scale[1],
    )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(f'{_size(values)}, {range_text(values)}', fontsize=8)
    colour_bar(axes, shown, title)


def _draw_bars(axes: 'Axes', values: Tensor, gate: Gate, scale: Scale) -> None:
    """A weight each; those of channels sorted, others in their order."""
    order = values.argsort(descending=True) if gate.axes in 'CD' else torch.arange(len(values))
    ranked = values[order].numpy()
    axes.fill_between(np.arange(len(ranked) + 1), np.append(ranked, ranked[-1]), step='post', color=BLUE, lw=0)
    axes.set_xlim(0, len(ranked))
    counts = ''
    if gate.multiplies and scale[0] >= 0 and scale[1] <= 1:
        axes.set_ylim(0, 1.02)
        for level in (LOW, HIGH):
            axes.axhline(level, color=GREY, lw=0.8, ls='--')
        counts = f'; {int((values < LOW).sum())} < {LOW}, {int((values > HIGH).sum())} > {HIGH}'
    else:
        axes.set_ylim(*_margins(min(scale[0], 0), max(scale[1], 0)))
        axes.axhline(0, color=GREY, lw=0.8)
    where = f'{len(ranked)} {_NAMES.get(gate.axes, "values")}' + (', sorted' if gate.axes in 'CD' else '')
    said = range_text(values).replace('constant', 'all')
    if said[0].isdigit() or said[0] == '-':
        said += f'; strongest {", ".join(str(int(c)) for c in values.argsort(descending=True)[:4])}'
    axes.set_xlabel(f'{where}{counts}\n{said}', fontsize=8)
    axes.set_ylabel(quantity(gate), fontsize=8)
    axes.tick_params(labelsize=8)


def _draw_branches(axes: 'Axes', values: Tensor, gate: Gate, scale: Scale) -> None:
    """Shares of branches: stacked where they sum to one, lines where not; channels sorted by the last branch."""
    values = values[:, None] if values.ndim == 1 else values  # (B, D)
    order = values[-1].argsort(descending=True)
    ranked = values[:, order].numpy()
    names = gate.entries if len(gate.entries) == len(ranked) else [f'branch {i + 1}' for i in range(len(ranked))]
    x = np.arange(ranked.shape[1] + 1)
    stacked = bool((values >= 0).all()) and bool(((values.sum(0) - 1).abs() < 1e-3).all())
    below = np.zeros(len(x))
    # The last branch, by which they are sorted, stands at the bottom.
    for i in reversed(range(len(ranked))):
        line = np.append(ranked[i], ranked[i, -1])
        colour = COLOURS[i % len(COLOURS)]
        if stacked:
            hatch = ('', '//', '..', 'xx')[i % 4]
            edge = {'facecolor': colour, 'edgecolor': 'white', 'linewidth': 0, 'hatch': hatch}
            axes.fill_between(x, below, below + line, step='post', label=names[i], **edge)
            below = below + line
        else:
            axes.step(x, line, where='post', color=colour, ls=LINES[i % len(LINES)], lw=1.4, label=names[i])
    axes.set_xlim(0, ranked.shape[1])
    axes.set_ylim(*((0, 1) if stacked else _margins(*scale)))
    axes.legend(fontsize=7, loc='upper right', framealpha=0.9)
    axes.set_xlabel(
        f'{ranked.shape[1]} channels, sorted; mean {float(values[-1].mean()):.2f} {names[-1]}\n'
        f'{range_text(values[-1])}; most {", ".join(str(int(c)) for c in order[:5])}',
        fontsize=8,
    )
    axes.set_ylabel(quantity(gate), fontsize=8)
    axes.tick_params(labelsize=8)


def _draw_matrix(axes: 'Axes', values: Tensor, gate: Gate, scale: Scale) -> None:
    """Two axes in colours: a matrix, or a profile with rows or columns of the image across."""
    shown = axes.imshow(values.numpy(), cmap=MAPS, aspect='auto', interpolation='nearest', vmin=scale[0], vmax=scale[1])
    across = next((a for a in gate.axes if a in 'HW'), '')
    if form_of(gate.axes) == 'profile':
        where = f'{_NAMES[across][:-1]} of the map' if across else _size(values)
    else:
        heads = len(gate.axes) > 2
        where = f'{"mean of all, " if heads else ""}{_size(values)}'
    axes.set_xlabel(f'{where}; {range_text(values)}', fontsize=8)
    axes.tick_params(labelsize=8)
    colour_bar(axes, shown, quantity(gate))


_NAMES = {'C': 'channels', 'D': 'features', 'K': 'heads', 'G': 'groups', 'B': 'branches', 'H': 'rows', 'W': 'columns'}


def colour_bar(axes: 'Axes', shown: Any, title: str) -> None:
    """A labelled bar of colours beside a panel, as tall as its image.

    Args:
        axes: The panel.
        shown: What `imshow` gave.
        title: What the colours mean.
    """
    from matplotlib.ticker import MaxNLocator

    figure = axes.get_figure()
    assert figure is not None
    # As tall as the image, whatever its shape; a bar beside the axes would be as tall as the row.
    bar = figure.colorbar(shown, cax=axes.inset_axes((1.02, 0, 0.05, 1)))
    bar.ax.tick_params(labelsize=7)
    bar.ax.yaxis.set_major_locator(MaxNLocator(4))
    bar.ax.ticklabel_format(useOffset=False)
    bar.set_label(short(title, 24), fontsize=7)


def range_text(values: Tensor) -> str:
    """The numbers of a panel in words: 'constant 0.5', '0.2 to 0.8', 'not finite'.

    Args:
        values: What it shows.
    """
    wrong = int((~values.isfinite()).sum())
    if wrong:
        return f'not finite: {wrong} of {values.numel()}'
    low, high = float(values.min()), float(values.max())
    if high - low < _FLAT * max(1.0, abs(low), abs(high)) and f'{low:.3g}' == f'{high:.3g}':
        return f'constant {low:.3g}'
    return f'{low:.4g} to {high:.4g}'


def percent(share: float) -> str:
    """A share in percent with one decimal; what would be rounded to none, or to all, says so: '<0.1 %', '>99.9 %'.

    Args:
        share: From 0 to 1.
    """
    if 0 < share < 0.0005:
        return '<0.1 %'
    if 0.9995 <= share < 1:
        return '>99.9 %'
    return f'{100 * share:.1f} %'


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


def _margins(low: float, high: float) -> Scale:
    room = 0.04 * max(high - low, 1e-12)
    return low - room, high + room


def _size(values: Tensor) -> str:
    return ' x '.join(map(str, values.shape))
