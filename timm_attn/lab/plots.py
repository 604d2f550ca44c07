"""Pictures of a comparison, in colours that colour-blind readers tell apart, each with a marker of its own."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..explain.panels import short
from ..files import atomic_write
from ..layers import Gate
from ..optional import require
from .tables import Row

# Okabe and Ito, https://jfly.uni-koeln.de/color/; black is first, for the model that others are compared with.
COLOURS = ('#000000', '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X')


def style(index: int) -> dict[str, Any]:
    """Colour and marker of the model at this place of the table."""
    # Each round through the colours shifts the markers by one, so that 49 pairs differ.
    marker = MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]
    return dict(color=COLOURS[index % len(COLOURS)], marker=marker)


def comparison(table: Sequence[Row], path: str | Path, *, title: str, clock: str) -> None:
    """Draws accuracies, paired differences, parameters and time, each model on a line of its own.

    Args:
        table: Rows; the first is what others are compared with.
        path: PNG to write.
        title: Above the panels.
        clock: 'cpu' or 'wall', said at the axis of time.
    """
    plt = _pyplot()
    figure = plt.figure(figsize=(13, 1.9 + 0.42 * len(table)), layout='constrained')
    axes = figure.subplots(1, 4, sharey=True, width_ratios=(1.1, 1.5, 0.8, 0.8))
    figure.suptitle(title, fontsize=13)
    for i, row in enumerate(table):
        top1 = row.top1
        _seeds(axes[0], top1.values, i)
        _mean(axes[0], i, top1.mean, top1.low, top1.high)
        axes[2].plot(row.parameters, i, markersize=8, **style(i))
        axes[3].plot(row.seconds, i, markersize=8, **style(i))
    axes[0].set_xlabel('top-1 accuracy, %\n(each seed; mean\nwith 95 % interval)')
    _differences(axes[1], table)
    for axis, values, label in (
        (axes[2], [row.parameters for row in table], 'parameters'),
        (axes[3], [row.seconds for row in table], f'{clock} seconds\nper training epoch'),
    ):
        axis.set_xlabel(label)
        if max(values) > 8 * min(values):
            axis.set_xscale('log')
        else:
            axis.set_xlim(0, 1.15 * max(values))  # A length from zero: twice as far is twice as much.
            axis.xaxis.set_major_formatter(require('matplotlib.ticker', 'lab').EngFormatter())
            axis.xaxis.set_major_locator(plt.MaxNLocator(3))
    axes[0].set_yticks(range(len(table)), [row.label for row in table])
    axes[0].set_ylim(len(table) - 0.5, -0.5)
    for axis in axes:
        axis.grid(alpha=0.25)
    _save(figure, path)


def _seeds(axis: Any, values: Sequence[float], i: int) -> None:
    # Below the mean, whose interval would hide them; equal values are darker.
    axis.scatter(values, [i + 0.24] * len(values), s=16, color=style(i)['color'], alpha=0.4, linewidths=0)


def _mean(axis: Any, i: int, mean: float, low: float, high: float) -> None:
    """The mean with its interval; hollow where there is none."""
    known = not math.isnan(low)
    error = [[mean - low], [high - mean]] if known else None
    fill = {} if known else dict(markerfacecolor='white')
    axis.errorbar(mean, i, xerr=error, capsize=4, markersize=8, linewidth=1.8, **style(i), **fill)


def curves(runs: Sequence[dict[str, Any]], labels: Sequence[str], path: str | Path, *, title: str) -> None:
    """Draws held-out error and training loss by epoch: the mean over seeds, and the range from lowest to highest.

    Of more models than there are colours the error alone is drawn, each in a panel of its own beside the first.

    Args:
        runs: Records as `train.run` returns them.
        labels: The models, in the order of the table.
        path: PNG to write.
        title: Above the panels.
    """
    plt = _pyplot()
    numbers: tuple[tuple[str, Callable[[dict[str, float]], float]], ...] = (
        ('top-1 error on held-out images, %', lambda h: max(100 - h['top1'], 0.05)),  # A logarithm has no zero.
        ('training loss', lambda h: h['train_loss']),
    )
    histories = {name: [r['history'] for r in runs if r['model']['label'] == name] for name in labels}
    there = [name for name in labels if histories[name]]
    if len(there) <= len(COLOURS):
        figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout='constrained')
        for axis, (label, number) in zip(axes, numbers, strict=True):
            for name in there:
                _curve(axis, histories[name], number, name, labels.index(name))
            axis.set_ylabel(label)
            axis.set_xlabel('epoch')
        _legend(figure, axes[0])
    else:  # No picture holds so many lines: a panel for each model, with the first one's line for comparison.
        lines = -(-(len(there) - 1) // 5)
        figure, grid = plt.subplots(
            lines, 5, figsize=(13, 0.8 + 2.2 * lines), layout='constrained', sharex=True, sharey=True, squeeze=False
        )
        axes = grid.ravel()[: len(there) - 1]
        for axis, name in zip(axes, there[1:], strict=True):
            _curve(axis, histories[there[0]], numbers[0][1], there[0], 0)
            _curve(axis, histories[name], numbers[0][1], name, 1)
            axis.set_title(short(name, 26), fontsize=10)
        for axis in grid.ravel()[len(there) - 1 :]:
            axis.axis('off')
        for axis in axes[-5:]:  # The lowest of each column.
            axis.tick_params(labelbottom=True)
            axis.set_xlabel('epoch')
        figure.supylabel(
            f'{numbers[0][0]} (black circles: {there[0]}; blue squares: the model named above)', fontsize=9
        )
    figure.suptitle(title, fontsize=13)
    for axis in axes:
        axis.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
        _log_scale(axis)
        axis.grid(alpha=0.25)
    _save(figure, path)


def _curve(
    axis: Any, histories: Sequence[Any], number: Callable[[dict[str, float]], float], name: str, index: int
) -> None:
    values = np.asarray([[number(h) for h in history] for history in histories])  # (seeds, epochs)
    epochs = np.arange(1, values.shape[1] + 1)
    axis.plot(epochs, values.mean(0), label=name, markersize=4.5, linewidth=1.6, **style(index))
    if len(values) > 1:
        axis.fill_between(epochs, values.min(0), values.max(0), color=style(index)['color'], alpha=0.12, linewidth=0)


def _log_scale(axis: Any) -> None:
    ticker = require('matplotlib.ticker', 'lab')
    axis.set_yscale('log')
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter('{x:g}')
    axis.yaxis.set_minor_locator(ticker.NullLocator())


def attention(
    images: Sequence[Any],
    maps: Mapping[str, Mapping[str, Tensor]],
    kinds: Mapping[str, Mapping[str, Gate]],
    by_class: Mapping[str, Mapping[str, Tensor]],
    targets: Sequence[int],
    classes: Sequence[str],
    path: str | Path,
    *,
    title: str,
) -> None:
    """Draws where a model looks on some images, and which channels it opens for which class.

    Args:
        images: Pictures, one per column.
        maps: Gates of these images by site, as `explain.attention_maps` gives them.
        kinds: What they are, as `explain.gate_kinds` says.
        by_class: Gates of more images, of which the mean by class is drawn.
        targets: Class of each of those.
        classes: Names of the classes.
        path: PNG to write.
        title: Above the panels.
    """
    plt = _pyplot()
    # Per site one map per image: a gate of each pixel and channel is shown by its mean over channels.
    spatial = {
        site: g.flatten(1, -3).mean(1) if g.ndim > 3 else g
        for site, gates in maps.items()
        for kind, g in gates.items()
        if kinds[site][kind].axes.endswith('HW')
    }
    channel = {
        site: g.mean((2, 3)) if g.ndim == 4 else g
        for site, gates in by_class.items()
        for kind, g in gates.items()
        if kinds[site][kind].axes in ('C', 'CHW')
    }
    rows = 1 + len(spatial)
    height = 1.15 * rows + 0.6 + (3.0 if channel else 0)
    figure = plt.figure(figsize=(1.15 * len(images) + 1.2, height), layout='constrained')
    figure.suptitle(title, fontsize=13)
    parts = figure.subfigures(2, 1, height_ratios=(1.15 * rows + 0.3, 3.0)) if channel else [figure]
    grid = parts[0].subplots(rows, len(images), squeeze=False)
    for column, image in enumerate(images):
        grid[0][column].imshow(image)
    scale = _scale(list(spatial.values()))
    grid[0][0].set_ylabel('image', rotation=0, ha='right', va='center')
    for line, (site, gates) in enumerate(spatial.items(), start=1):
        for column in range(len(images)):
            shown = grid[line][column].imshow(gates[column].numpy(), cmap='cividis', **scale)
        tall, wide = gates.shape[1:]
        told = f'{site}\n{tall}x{wide}, {gates.min():.4g} to {gates.max():.4g}'
        grid[line][0].set_ylabel(told, rotation=0, ha='right', va='center', fontsize=8)
    if spatial:
        bar = parts[0].colorbar(shown, ax=grid[1:].ravel().tolist(), fraction=0.02, pad=0.01, label='gate')
        bar.ax.tick_params(labelsize=7)
    for axis in grid.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    if channel:
        groups = sorted(set(targets))
        labels = np.asarray(targets)
        by_site = {k: np.stack([g.numpy()[labels == c].mean(0) for c in groups]) for k, g in channel.items()}
        # One site has room: the one whose gates differ most between classes.
        site, means = max(by_site.items(), key=lambda item: item[1].var(0).mean())  # (classes, C)
        axis = parts[1].subplots()
        order = np.argsort(-means.var(0), kind='stable')  # Channels that differ most between classes come first.
        limits = _scale([torch.from_numpy(means)])
        shown = axis.imshow(means[:, order], aspect='auto', cmap='cividis', interpolation='nearest', **limits)
        axis.set_yticks(range(len(groups)), [classes[c] for c in groups], fontsize=8)
        axis.set_ylabel('class')
        axis.set_xlabel(f'channels of {site}, whose gates tell classes apart most; the most telling first')
        parts[1].colorbar(shown, ax=axis, fraction=0.02, pad=0.01, label='mean gate')
    _save(figure, path)


def _scale(gates: Sequence[Tensor]) -> dict[str, float]:
    """One scale for a panel, at least 0.1 wide: a gate that hardly moves looks flat."""
    if not gates:
        return {}
    low, high = min(float(g.min()) for g in gates), max(float(g.max()) for g in gates)
    wider = max(0.0, 0.1 - (high - low)) / 2
    return dict(vmin=low - wider, vmax=high + wider)


def _differences(axis: Any, table: Sequence[Row]) -> None:
    axis.axvline(0, color='0.4', linewidth=1)
    few = False
    for i, row in enumerate(table):
        if row.difference is None or row.judged is None:
            continue
        few |= row.judged.verdict == 'too few seeds'
        _seeds(axis, row.difference.values, i)
        _mean(axis, i, row.difference.mean, row.judged.low, row.judged.high)
    said = 'hollow:\ntoo few seeds to claim' if few else 'mean with\ncorrected 95 % interval'
    axis.set_xlabel(f'difference to the first, points\n(each seed; {said})')


def _legend(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    # About as many letters as fit below a figure of eleven inches, with five for marker and gap of each entry.
    columns = max(1, min(len(labels), 110 // (max(map(len, labels)) + 5)))
    figure.legend(handles, labels, loc='outside lower center', ncols=columns, frameon=False)


def _pyplot() -> Any:
    require('matplotlib', 'lab').use('Agg')  # Nothing is shown, so no display is needed.
    return require('matplotlib.pyplot', 'lab')


def _save(figure: Any, path: str | Path) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format='png', dpi=130)
    _pyplot().close(figure)
