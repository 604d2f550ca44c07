from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from timm_attn.lab import plots
from timm_attn.lab.stats import estimate, judge
from timm_attn.lab.tables import Row
from timm_attn.layers import Gate

pytest.importorskip('matplotlib', reason='matplotlib is not installed')
LONG = [f'a rather long name of model number {i}' for i in range(9)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures before they are closed, laid out."""
    figures: list[Any] = []
    save = plots._save

    def keep(figure: Any, path: str | Path) -> None:
        save(figure, path)
        figures.append(figure)

    monkeypatch.setattr(plots, '_save', keep)
    return figures


def rows(labels: list[str], parameters: Callable[[int], int], seeds: int = 2) -> list[Row]:
    differences = {label: [i / 10 - 0.02 * s for s in range(seeds)] for i, label in enumerate(labels) if i}
    judged = judge(differences)
    return [
        Row(
            label=label,
            parameters=parameters(i),
            top1=estimate([98 + i / 10, 98.5 + i / 10]),
            difference=estimate(differences[label]) if i else None,
            seconds=1.5 + i / 7,
            activation_mib=10.0,
            judged=judged.get(label),
        )
        for i, label in enumerate(labels)
    ]


def assert_texts_apart_and_inside(figure: Any) -> None:
    """No two texts overlap, and none reaches over the edge of the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    edge = figure.bbox
    texts = []
    for axis in figure.axes:
        texts += [axis.title, axis.xaxis.label, axis.yaxis.label, *shown(axis.xaxis), *shown(axis.yaxis)]
    for legend in figure.legends:
        texts += legend.get_texts()
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts if t.get_text().strip() and t.get_visible()]
    assert len(boxes) > 10
    for text, box in boxes:
        assert edge.x0 - 1 <= box.x0 and box.x1 <= edge.x1 + 1, text
        assert edge.y0 - 1 <= box.y0 and box.y1 <= edge.y1 + 1, text
    for (first, a), (second, b) in combinations(boxes, 2):
        assert not (a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1), (first, second)


def shown(axis: Any) -> list[Any]:
    """Labels of the ticks that lie within the limits; matplotlib keeps some outside and does not draw them."""
    low, high = sorted(axis.get_view_interval())
    return [t.label1 for t in axis.get_major_ticks() if low <= t.get_loc() <= high]


@pytest.mark.parametrize('labels', [['plain', 'SE', 'CBAM', 'BAM', 'GAM'], LONG, ['alone']])
@pytest.mark.parametrize('parameters', [lambda i: 318186 + 3000 * i, lambda i: 10 ** (5 + i % 4)])
def test_labels_of_a_comparison_neither_collide_nor_leave_the_picture(
    drawn: list[Any],
    tmp_path: Path,
    labels: list[str],
    parameters: Callable[[int], int],
) -> None:
    plots.comparison(rows(labels, parameters), tmp_path / 'c.png', title='digits: 12 epochs, 2 seeds', clock='cpu')
    figure = drawn[0]
    assert_texts_apart_and_inside(figure)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == labels
    assert ('too few seeds' in figure.axes[1].get_xlabel()) == (len(labels) > 1)  # Two seeds in the rows above.


def test_intervals_of_differences_are_the_corrected_ones(drawn: list[Any], tmp_path: Path) -> None:
    table = rows(['plain', 'SE', 'CBAM'], lambda i: 1000, seeds=6)
    plots.comparison(table, tmp_path / 'c.png', title='six seeds', clock='cpu')
    axis = drawn[0].axes[1]
    assert 'corrected 95 % interval' in axis.get_xlabel()
    ends = [
        segment[:, 0].tolist() for c in axis.collections if hasattr(c, 'get_segments') for segment in c.get_segments()
    ]
    for row in table[1:]:
        assert row.judged is not None and row.difference is not None
        assert pytest.approx([row.judged.low, row.judged.high]) in ends
        # Wider than the interval of one model alone, but for the last of Holm's procedure.
        assert row.judged.low < row.difference.low or row.judged.level == 0.05
    assert {row.judged.level for row in table[1:] if row.judged} == {0.05, 0.025}


@pytest.mark.parametrize('labels', [['plain', 'SE'], LONG])
def test_labels_of_curves_neither_collide_nor_leave_the_picture(
    drawn: list[Any],
    tmp_path: Path,
    labels: list[str],
) -> None:
    runs = [
        dict(
            model=dict(label=label),
            history=[dict(epoch=e, top1=100 - 60 * 0.7**e - i, train_loss=2.3 * 0.8**e) for e in range(1, 16)],
        )
        for i, label in enumerate(labels)
        for _ in range(2)
    ]
    plots.curves(runs, labels, tmp_path / 'c.png', title='digits')
    assert_texts_apart_and_inside(drawn[0])
    if len(labels) > len(plots.COLOURS):  # A panel for each model, with the first beside it.
        first = [60 * 0.7**e for e in range(1, 16)]
        panels = [a for a in drawn[0].axes if a.lines]
        assert len(panels) == len(labels) - 1
        for i, axis in enumerate(panels, 1):
            assert axis.lines[0].get_ydata().tolist() == pytest.approx(first)
            assert axis.lines[1].get_ydata().tolist() == pytest.approx([e + i for e in first])
            assert axis.get_title().endswith(f'number {i}')


def test_error_without_a_mistake_has_a_place_on_the_logarithmic_axis(drawn: list[Any], tmp_path: Path) -> None:
    history = [dict(epoch=1, top1=90.0, train_loss=1.0), dict(epoch=2, top1=100.0, train_loss=0.5)]
    plots.curves([dict(model=dict(label='x'), history=history)], ['x'], tmp_path / 'c.png', title='')
    assert drawn[0].axes[0].lines[0].get_ydata().tolist() == [10.0, 0.05]


def test_models_differ_in_colour_and_marker_and_many_still_in_one_of_them() -> None:
    styles = [(s['color'], s['marker']) for s in map(plots.style, range(49))]
    assert len({c for c, _ in styles[:7]}) == len({m for _, m in styles[:7]}) == 7
    assert len(set(styles)) == 49


@pytest.mark.parametrize('kinds', [['channel'], ['spatial'], ['gate'], ['channel', 'spatial']])
def test_attention_is_drawn_for_each_kind_of_gate(drawn: list[Any], tmp_path: Path, kinds: list[str]) -> None:
    shapes = {'channel': (8,), 'spatial': (4, 4), 'gate': (8, 4, 4)}
    maps = {'layer1.0.se': {k: torch.rand(3, *shapes[k]) for k in kinds}}
    axes = {'channel': 'C', 'spatial': 'HW', 'gate': 'CHW'}
    described = {'layer1.0.se': {k: Gate(axes[k], k) for k in kinds}}
    plots.attention(
        images=[Image.new('L', (8, 8))] * 3,
        maps=maps,
        kinds=described,
        by_class=maps,
        targets=[0, 2, 2],
        classes=['a', 'b', 'c'],
        path=tmp_path / 'a.png',
        title='gates',
    )
    (figure,) = drawn
    pictures = sum(len(axis.images) for axis in figure.axes)
    assert pictures == 3 + 3 * (kinds != ['channel']) + (kinds != ['spatial'])


def test_gates_of_a_panel_share_one_scale_in_which_a_gate_that_hardly_moves_looks_flat(
    drawn: list[Any], tmp_path: Path
) -> None:
    still = torch.linspace(0.4995, 0.5025, 48).view(3, 4, 4)
    described = {site: {'spatial': Gate('HW', 'spatial')} for site in ('a', 'b')}

    def draw(maps: dict[str, torch.Tensor]) -> list[Any]:
        plots.attention(
            images=[Image.new('L', (8, 8))] * 3,
            maps={site: {'spatial': g} for site, g in maps.items()},
            kinds=described,
            by_class={},
            targets=[0, 1, 2],
            classes=['a', 'b', 'c'],
            path=tmp_path / 'a.png',
            title='gates',
        )
        return [image for axis in drawn[-1].axes for image in axis.images][3:]

    shown = draw({'a': still})
    drawn_colours = [shown[0].cmap(shown[0].norm(v))[:3] for v in (0.4995, 0.5025)]
    assert max(abs(a - b) for a, b in zip(*drawn_colours, strict=True)) < 0.05
    shown = draw({'a': still, 'b': still * 1.5})
    assert len({(i.norm.vmin, i.norm.vmax) for i in shown}) == 1
    assert drawn[-1].axes[3].get_ylabel() == 'a\n4x4, 0.4995 to 0.5025'
    assert [a.get_ylabel() for a in drawn[-1].axes if a.get_ylabel() == 'gate'] == ['gate']
