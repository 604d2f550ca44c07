import copy
import importlib.util
import io
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from PIL import Image
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import timm_attn
from timm_attn.explain.draw import (
    Explanation,
    Summary,
    class_separation,
    draw_explanation,
    draw_summary,
)
from timm_attn.explain.gates import attention_maps, gate_kinds, gates_only, stage_sites
from timm_attn.explain.health import GateStats, attention_health
from timm_attn.explain.model import label_names, load_model
from timm_attn.explain.panels import gate_vector, percent, short, telling_kind
from timm_attn.explain.pictures import explain_image
from timm_attn.layers import Attention, Gate, attn_sites, get_attn

needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec('matplotlib') is None, reason='matplotlib is missing')
needs_cam = pytest.mark.skipif(importlib.util.find_spec('pytorch_grad_cam') is None, reason='grad-cam is missing')

SMALL: dict[str, dict[str, Any]] = {'gsop': {'dim': 16}, 'gam': {'groups': 1}}


def small_resnet(name: str) -> nn.Module:
    """One bottleneck a stage, and attention in a state in which all of it counts."""
    torch.manual_seed(0)
    model = timm.create_model(
        f'{name}_resnet50', layers=(1, 1, 1, 1), num_classes=4, zero_init_last=False, attn_args=SMALL.get(name, {})
    )
    randomise(model)
    return model.eval()


def randomise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, Attention):
            for p in module.parameters():
                nn.init.normal_(p, std=1.0 if p.ndim == 1 else (2 / p[0].numel()) ** 0.5)


@pytest.fixture
def cbam() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model('simple_cnn_cbam', num_classes=4, attn_after=(1, 2))
    randomise(model)
    return model.eval()


def broadcast(gate: Tensor, axes: str) -> Tensor:
    """A gate as something to multiply (N, C, H, W) by."""
    gate = gate.movedim([1 + axes.index(a) for a in 'CHW' if a in axes], list(range(1, 1 + len(axes))))
    for place, axis in enumerate('CHW', 1):
        gate = gate if axis in axes else gate.unsqueeze(place)
    return gate


# What each attention's equation makes of its input and its gates.
def product(gates: dict[str, Tensor], kinds: Mapping[str, Gate], x: Tensor) -> Tensor:
    for kind, gate in gates_only(gates, kinds).items():
        x = x * broadcast(gate, kinds[kind].axes)
    return x


def mean_of_branches(gates: dict[str, Tensor], kinds: Mapping[str, Gate], x: Tensor) -> Tensor:
    return torch.stack([x * broadcast(v, kinds[k].axes) for k, v in gates.items()]).sum(0) / 3


def largest(gates: dict[str, Tensor], kinds: Mapping[str, Gate], x: Tensor) -> Tensor:
    return torch.stack([x * broadcast(v, kinds[k].axes) for k, v in gates.items()]).amax(0)


EQUATIONS: dict[str, Callable[[dict[str, Tensor], Mapping[str, Gate], Tensor], Tensor]] = {
    'bam': lambda g, k, x: x * (1 + g['gate']),
    'gc': lambda g, k, x: x + g['context'][..., None, None],
    'triplet': mean_of_branches,
    'scse': largest,
}


@pytest.mark.parametrize('name', timm_attn.list_attn())
def test_maps_are_the_gates_that_the_forward_pass_used(name: str) -> None:
    model = small_resnet(name)
    x = torch.randn(2, 3, 64, 96)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        # Copies, since the block goes on in place.
        return lambda module, args, out: seen.__setitem__(name, (args[0].clone(), out.clone()))

    handles = [m.register_forward_hook(keep(n)) for n, m in attn_sites(model).items()]
    maps, kinds = attention_maps(model, x), gate_kinds(model)
    for h in handles:
        h.remove()

    assert list(maps) == list(seen), 'sites come in the order of the forward pass'
    for site, gates in maps.items():
        inner, out = seen[site]
        assert all(g.dtype == torch.float32 and len(g) == 2 for g in gates.values())
        matrices = [k for k, gate in kinds[site].items() if gate.axes == 'KCC']
        for kind in matrices:
            torch.testing.assert_close(gates[kind].sum(-1), torch.ones(gates[kind].shape[:3]))
        if name == 'sk':
            assert gates['branch'].shape == (2, 2, out.shape[1])
            torch.testing.assert_close(gates['branch'].sum(1), torch.ones(2, out.shape[1]))
        elif name in EQUATIONS or gates_only(gates, kinds[site]):
            equation = EQUATIONS.get(name, product)
            torch.testing.assert_close(equation(gates, kinds[site], inner), out, rtol=1e-5, atol=1e-5)


def test_the_model_stays_as_it_was(cbam: nn.Module) -> None:
    cbam.train()
    cbam.get_submodule(next(iter(attn_sites(cbam)))).eval()
    next(cbam.parameters()).requires_grad_(False)
    modes = [m.training for m in cbam.modules()]
    wanted = [p.requires_grad for p in cbam.parameters()]
    before = copy.deepcopy(cbam.state_dict())
    attention_maps(cbam, torch.randn(2, 3, 16, 24))
    assert [m.training for m in cbam.modules()] == modes and any(modes) and not all(modes)
    assert [p.requires_grad for p in cbam.parameters()] == wanted
    assert all(p.grad is None for p in cbam.parameters())
    assert all(torch.equal(v, before[k]) for k, v in cbam.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in cbam.modules())


def test_an_error_on_the_way_leaves_no_hook_and_no_mode(cbam: nn.Module) -> None:
    cbam.train()
    with pytest.raises(RuntimeError, match='channels'):
        attention_maps(cbam, torch.randn(2, 5, 16, 16))
    assert not any(m._forward_pre_hooks for m in cbam.modules())
    assert all(m.training for m in cbam.modules()) and torch.is_grad_enabled()


def assert_same(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> None:
    assert list(a) == list(b)
    for site in a:
        for kind in a[site]:
            torch.testing.assert_close(a[site][kind], b[site][kind])


def test_a_compiled_model_gives_the_same_maps_and_is_not_compiled_again(cbam: nn.Module) -> None:
    from torch._dynamo.testing import CompileCounter

    x = torch.randn(2, 3, 16, 24)
    expected = attention_maps(cbam, x)
    counter = CompileCounter()
    compiled = torch.compile(cbam, backend=counter)
    with torch.no_grad():
        compiled(x)
    graphs = counter.frame_count
    assert graphs > 0
    assert_same(attention_maps(compiled, x), expected)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        compiled(x)
    assert counter.frame_count == graphs


@pytest.mark.parametrize('how', ['in place', 'wrapped'])
def test_a_model_of_compiled_parts_gives_the_same_maps(cbam: nn.Module, how: str) -> None:
    x = torch.randn(2, 3, 16, 24)
    expected = attention_maps(cbam, x)
    part = next(iter(attn_sites(cbam))).rpartition('.')[0]
    if how == 'in place':
        cbam.get_submodule(part).compile(backend='eager')
    else:
        cbam.set_submodule(part, torch.compile(cbam.get_submodule(part), backend='eager'))  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        cbam(x)
    assert_same(attention_maps(cbam, x), expected)


def test_a_ddp_model_gives_the_same_maps(cbam: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16, 24)
    expected = attention_maps(cbam, x)
    dist.init_process_group('gloo', init_method=f'file://{tmp_path / "store"}', rank=0, world_size=1)
    try:
        assert_same(attention_maps(nn.parallel.DistributedDataParallel(cbam), x), expected)
    finally:
        dist.destroy_process_group()


def test_autocast_gives_float32_maps_near_the_exact_ones_and_training_goes_on_in_the_block(cbam: nn.Module) -> None:
    x = torch.randn(2, 3, 16, 24)
    expected = attention_maps(cbam, x)
    with torch.autocast('cpu', torch.bfloat16):
        maps = attention_maps(cbam, x)
        loss = cbam(x).square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in cbam.named_parameters() if 'conv' in n)
    for site, gates in maps.items():
        for kind, gate in gates.items():
            assert gate.dtype == torch.float32
            torch.testing.assert_close(gate, expected[site][kind], rtol=0, atol=0.1)


@pytest.mark.parametrize('name', ['cbam', 'bam', 'sk'])
def test_a_fused_model_gives_the_same_maps(name: str) -> None:
    from timm_attn.fusion import fuse

    model = small_resnet(name)
    x = torch.randn(2, 3, 64, 96)
    expected = attention_maps(model, x)
    assert_same(attention_maps(fuse(copy.deepcopy(model), compile=False), x), expected)


def test_injected_models_have_maps_too_and_stages_are_found() -> None:
    model = timm_attn.inject(timm.create_model('mobilenetv2_050', num_classes=2), 'eca')
    maps = attention_maps(model, torch.randn(1, 3, 32, 32))
    stages = stage_sites(maps)
    assert list(stages) == [f'blocks.{i}' for i in range(7)]
    assert set(stages.values()) < set(maps)
    assert stage_sites(['layer1.0.se', 'layer1.1.se', 'layer2.0.se']) == {
        'layer1': 'layer1.1.se',
        'layer2': 'layer2.0.se',
    }


@pytest.mark.parametrize(
    ('x', 'message'),
    [
        (torch.zeros(3, 16, 16), r'batch of images \(N, C, H, W\), got \(3, 16, 16\).*x\[None\]'),
        ([1], 'got list'),
        (torch.zeros(0, 3, 16, 16), r'got \(0, 3, 16, 16\)'),
    ],
)
def test_what_is_no_batch_is_refused(cbam: nn.Module, x: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_maps(cbam, x)


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(ValueError, match='SimpleCNN holds no attention of timm_attn: create one'):
        attention_maps(timm.create_model('simple_cnn'), torch.zeros(1, 3, 16, 16))


def test_an_attention_that_is_never_called_is_named(cbam: nn.Module) -> None:
    cbam.spare = timm_attn.create_attn('eca', 8)
    with pytest.raises(ValueError, match=r"never called its attentions \['spare'\]"):
        attention_maps(cbam, torch.zeros(1, 3, 16, 16))


# Health


def test_health_equals_numpy_over_uneven_batches(cbam: nn.Module) -> None:
    x = torch.randn(7, 3, 16, 16)
    health = attention_health(cbam, [(x[:3], None), x[3:4], [x[4:]]])
    for site, gates in attention_maps(cbam, x).items():
        for kind, gate in gates.items():
            values, h = gate.double().numpy(), health[site][kind]
            assert h.inputs == 7 and h.gates == values[0].size
            assert h.low == (values < 0.05).mean() and h.high == (values > 0.95).mean()
            assert h.variance == pytest.approx(values.var(0).mean(), rel=1e-4)
            assert h.dead == (values < 0.05).all(0).sum() and h.saturated == (values > 0.95).all(0).sum()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in cbam.modules())


def test_dead_and_saturated_gates_are_counted() -> None:
    model = timm.create_model('simple_cnn_se', num_classes=2, attn_after=(1,))
    (site,) = attn_sites(model)
    bias = model.get_parameter(f'{site}.fc2.bias')
    channels = len(bias)
    with torch.no_grad():
        bias[:5] = -20
        bias[5:7] = 20
    x = torch.randn(4, 3, 16, 16)
    health = attention_health(model, [x])[site]['channel']
    assert attention_health(model, x)[site]['channel'] == health
    assert (health.dead, health.saturated, health.verdict) == (5, 2, 'alive')
    assert health.low == 5 / channels and health.high == 2 / channels
    with torch.no_grad():
        bias[:] = -15
    assert attention_health(model, [torch.randn(4, 3, 16, 16)])[site]['channel'].dead == channels


@pytest.mark.parametrize(
    ('name', 'gain', 'verdict'), [('cbam', 4, 'identity'), ('cbam', 1, 'constant'), ('csa', 1, 'identity')]
)
def test_an_attention_that_does_nothing_is_told(name: str, gain: float, verdict: str) -> None:
    model = timm_attn.inject(timm.create_model('resnet18', num_classes=2, zero_init_last=False), name)
    for attention in attn_sites(model).values():
        attention.gain = gain
    health = attention_health(model, [torch.randn(2, 3, 32, 32), torch.randn(1, 3, 32, 32)])
    assert {h.verdict for kinds in health.values() for h in kinds.values()} == {verdict}
    assert len(health) == 8


def test_gates_more_than_half_dead_or_saturated_are_told() -> None:
    noise = 1e-3 * torch.rand(5, 4)
    dead, full = GateStats(), GateStats()
    dead.update(noise)
    full.update(1 - noise)
    assert (dead.health().verdict, full.health().verdict) == ('dead', 'saturated')


@pytest.mark.parametrize(
    ('batches', 'message'),
    [
        ([], 'needs at least 2 inputs, got 0'),
        ([torch.zeros(1, 3, 16, 16)], 'needs at least 2 inputs, got 1'),
        ([torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 24, 16)], 'images of one size'),
    ],
)
def test_health_of_too_little_is_refused(cbam: nn.Module, batches: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_health(cbam, batches)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in cbam.modules())


# Pictures

LENGTHS = {'C': 64, 'H': 14, 'W': 20, 'B': 2, 'K': 4, 'D': 32, 'G': 8}
SHOWN = ['cbam', 'bam', 'sk', 'gsop', 'csa', 'triplet']


def made_up_gates(kinds: Mapping[str, Gate], g: torch.Generator) -> dict[str, Tensor]:
    return {k: torch.rand(1, *(LENGTHS[a] for a in gate.axes), generator=g) for k, gate in kinds.items()}


def made_up(kinds: Mapping[str, Gate], sites: int, **fields: Any) -> Explanation:
    g = torch.Generator().manual_seed(0)
    names = [f'layer{i // 2 + 1}.{i % 2}.se' for i in range(sites)]
    maps = {n: made_up_gates(kinds, g) for n in names}
    fields = {'image': np.zeros((8, 8)), 'top': [('one', 1.0)]} | fields
    return Explanation(maps=maps, kinds=dict.fromkeys(names, kinds), **fields)


CHANNEL = {'channel': Gate('C', 'channel')}


def texts(figure: Any) -> list[tuple[str, Any]]:
    """All visible words with their place in pixels, after a layout."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    drawn = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    found = [(t.get_text(), t.get_window_extent(renderer)) for t in drawn]
    # Ticks outside the limits of their axis keep their text, but are not drawn.
    hidden = [t for a in all_axes(figure) for axis in (a.xaxis, a.yaxis) for t in hidden_ticks(axis)]
    outside = {id(label) for t in hidden for label in (t.label1, t.label2)}
    return [f for t, f in zip(drawn, found, strict=True) if id(t) not in outside]


def all_axes(figure: Any) -> Iterator[Any]:
    for axes in figure.axes:
        yield axes
        yield from axes.child_axes


def hidden_ticks(axis: Any) -> list[Any]:
    low, high = sorted(axis.get_view_interval())
    margin = 1e-9 * (high - low)
    return [t for t in axis.get_major_ticks() if not low - margin <= t.get_loc() <= high + margin]


def assert_readable(figure: Any) -> None:
    """No word leaves the page, and no two words lie on each other."""
    width, height = figure.bbox.width, figure.bbox.height
    placed = texts(figure)
    assert len(placed) > 10
    for text, box in placed:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, f'{text!r} is clipped'
    for (a, box), (b, other) in itertools.combinations(placed, 2):
        across = min(box.x1, other.x1) - max(box.x0, other.x0)
        down = min(box.y1, other.y1) - max(box.y0, other.y0)
        assert across < 2 or down < 2, f'{a!r} and {b!r} lie on each other'


@needs_matplotlib
@pytest.mark.parametrize(
    ('name', 'shape'), [*itertools.product(SHOWN, [(224, 320, 3), (320, 224, 3)]), ('cbam', (8, 8))], ids=str
)
def test_a_picture_is_readable(name: str, shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).random(shape)
    top = [('leatherback turtle, leatherback, leathery turtle, Dermochelys coriacea', 0.999), ('a', 0.001)]
    cam = image[..., 0] if len(shape) == 3 else 'x' * 30 + ' is missing: ' + 'pip install ' * 6
    fields = {'image': image, 'top': top, 'title': 'long/name' * 30, 'cam': cam, 'untrained': name == 'cbam'}
    assert_readable(draw_explanation(made_up(get_attn(name).cls.kinds, 8, **fields)))


@needs_matplotlib
def test_a_picture_of_constant_gates_and_many_stages_says_so() -> None:
    half = {'channel': torch.full((1, 8), 0.5), 'spatial': torch.full((1, 4, 4), 0.5)}
    maps = {f's{i}.b1.se': half for i in range(9)}
    kinds = dict.fromkeys(maps, get_attn('cbam').cls.kinds)
    figure = draw_explanation(Explanation(np.zeros((32, 32)), maps, kinds, [('one', 1.0)]))
    words = ' '.join(t for t, _ in texts(figure))
    assert '5 of 9 attentions shown' in words and 'constant 0.5' in words and 'all 0.5' in words
    assert 'Grad-CAM' not in words


def made_up_summary(count: int, classes: int) -> Summary:
    g = torch.Generator().manual_seed(0)
    vectors, health = {}, {}
    for site in (f'layer{i // 3 + 1}.{i % 3}.se' for i in range(12)):
        gates = torch.rand(count, 40_000, generator=g)
        gates[:, :20_001] = 0.01
        stats = GateStats()
        stats.update(gates)
        vectors[site], health[site] = gates[:, -64:], {'channel': stats.health()}
    names = [f'a class with quite a long name {i % classes}' for i in range(count)]
    return Summary('long/name' * 30, names, vectors, health, ['a note'])


@needs_matplotlib
def test_a_label_that_looks_like_a_broken_formula_is_drawn_as_it_is() -> None:
    label = '$\\frac{1$ for $5'
    figure = draw_explanation(made_up(CHANNEL, 2, top=[(label, 1.0)], title=label))
    assert [t.replace(r'\$', '$') for t, _ in texts(figure)].count(label) == 2


@needs_matplotlib
@pytest.mark.parametrize('classes', [1, 25])
def test_a_summary_is_readable_and_flags_dead_gates(classes: int) -> None:
    figure = draw_summary(made_up_summary(30, classes))
    assert_readable(figure)
    words = [t for t, _ in texts(figure)]
    assert words.count('20k dead of 40k') == 12
    assert ('one class only' in words) == (classes == 1)
    assert 'a note' in words


@needs_matplotlib
def test_a_summary_without_statistics_says_so() -> None:
    summary = made_up_summary(4, 2)
    summary.health = {}
    figure = draw_summary(summary)
    assert_readable(figure)
    assert 'no statistics: see the note below' in [t for t, _ in texts(figure)]


def test_class_separation_is_the_share_of_variance_between_classes() -> None:
    vectors = torch.tensor([[0.0, 1], [0, 3], [4, 1], [4, 3]])
    assert class_separation(vectors, ['a', 'a', 'b', 'b']) == pytest.approx(16 / 20)
    assert class_separation(vectors, ['a'] * 4) == pytest.approx(0)
    assert class_separation(torch.ones(3, 2), ['a', 'b', 'c']) == 0


@pytest.mark.parametrize(
    'axes', ['C', 'CHW', 'HW', 'BC', 'KCC', 'DD', 'CW', 'HC', 'H', 'W', 'GHW', 'B', 'K', 'G', '', 'KHH', 'GC', 'BHW']
)
def test_gate_vectors_have_one_length_for_all_image_sizes(axes: str) -> None:
    vectors = [
        gate_vector(torch.rand(3, *(LENGTHS[a] * (zoom if a in 'HW' else 1) for a in axes)), axes) for zoom in (1, 2)
    ]
    assert vectors[0].ndim == 2 and vectors[0].shape == vectors[1].shape and len(vectors[0]) == 3


def test_a_site_stands_for_by_what_multiplies_and_has_channels() -> None:
    kinds = get_attn('bam').cls.kinds
    assert telling_kind(kinds, kinds) == 'gate'
    gate = torch.rand(2, 8, 4, 5)
    torch.testing.assert_close(gate_vector(gate, 'CHW'), gate.mean((2, 3)))
    branches = torch.rand(2, 3, 8)
    assert torch.equal(gate_vector(branches, 'BC'), branches[:, 2])


@needs_matplotlib
@pytest.mark.parametrize(
    'axes',
    ['C', 'HW', 'CHW', 'GHW', 'BC', 'CW', 'HC', 'CH', 'WC', 'DD', 'KCC', 'H', 'W', 'G', 'GC', 'KGD', 'B', '', 'BH'],
)
@pytest.mark.parametrize('multiplies', [True, False])
def test_a_kind_of_gate_that_nobody_has_seen_is_drawn(axes: str, multiplies: bool) -> None:
    figure = draw_explanation(made_up({'odd': Gate(axes, 'something new', multiplies)}, 4))
    assert_readable(figure)
    assert 'layer1.1.se: something new' in [t for t, _ in texts(figure)]


def clims(figure: Any) -> list[tuple[float, float]]:
    return [i.get_clim() for axes in figure.axes for i in axes.images if i.cmap.name == 'cividis']


def test_a_share_is_never_rounded_to_none_or_all() -> None:
    shares = (0, 1e-9, 0.00049, 0.0005, 0.001, 0.125, 0.9994, 0.9996, 1 - 1e-9, 1)
    told = ('0.0', '<0.1', '<0.1', '0.1', '0.1', '12.5', '99.9', '>99.9', '>99.9', '100.0')
    assert [percent(share) for share in shares] == [f'{text} %' for text in told]


@needs_matplotlib
def test_nearly_equal_gates_look_equal_and_all_panels_of_a_kind_share_a_scale() -> None:
    near, far = torch.linspace(0.4995, 0.5025, 16).view(1, 4, 4), torch.linspace(0.1, 0.9, 16).view(1, 4, 4)

    def shown(multiplies: bool, *gates: Tensor) -> Explanation:
        maps = {f'layer{i}.0.se': {'spatial': g} for i, g in enumerate(gates)}
        kinds = {site: {'spatial': Gate('HW', 'spatial', multiplies)} for site in maps}
        return Explanation(np.zeros((8, 8)), maps, kinds, [('one', 1.0)])

    figure = draw_explanation(shown(True, near))
    assert clims(figure) == [(0.0, 1.0)]
    words = [t for t, _ in texts(figure)]
    assert '4 x 4, 0.4995 to 0.5025' in words and words.count('gate (spatial)') == 1
    # What multiplies nothing has no natural scale: a tenth of its size at least.
    ((low, high),) = clims(draw_explanation(shown(False, near)))
    assert high - low == pytest.approx(0.05025) and (low + high) / 2 == pytest.approx(0.501)
    # One scale for all sites, and for all models of a picture.
    figure = draw_explanation(shown(False, near, far), shown(False, 4 * far))
    assert clims(figure) == [pytest.approx((0.1, 3.6))] * 3
    # And for pictures side by side.
    assert clims(draw_explanation(shown(False, near), beside=[shown(False, 4 * far)])) == [pytest.approx((0.4, 3.6))]


@needs_matplotlib
def test_gates_that_are_not_finite_are_named_and_the_others_keep_their_scale() -> None:
    broken = torch.rand(1, 4, 4)
    broken[0, 0, :3] = torch.nan
    maps = {'a.0.se': {'spatial': broken}, 'b.0.se': {'spatial': torch.full((1, 4, 4), torch.inf)}}
    kinds = {site: {'spatial': Gate('HW', 'spatial')} for site in maps}
    words = [t for t, _ in texts(draw_explanation(Explanation(np.zeros((8, 8)), maps, kinds, [('one', 1.0)])))]
    assert '4 x 4, not finite: 3 of 16' in words and '4 x 4, not finite: 16 of 16' in words


def test_gates_that_are_not_finite_have_a_verdict() -> None:
    stats = GateStats()
    stats.update(torch.tensor([[0.5, torch.nan], [0.1, 0.2]]))
    assert stats.health().verdict == 'not finite'


@pytest.mark.parametrize(
    ('kinds', 'message'),
    [
        ({}, r"gates\(\) at 'layer1.0.se' gives 'odd' \(2, 64, 5\), which its `kinds` leave out"),
        ({'odd': Gate('C', 'odd')}, r"but its `kinds` say 'C': describe each gate by the axes"),
    ],
)
def test_gates_that_a_class_does_not_describe_are_refused(kinds: dict[str, Gate], message: str) -> None:
    class Odd(Attention):
        def __init__(self) -> None:
            super().__init__(neutral_gate=1.0)

        def gates(self, x: Tensor) -> dict[str, Tensor]:
            return {'odd': x.new_zeros(len(x), x.shape[1], 5)}

        def forward(self, x: Tensor) -> Tensor:
            return x

    model = timm.create_model('resnet18', num_classes=2)
    model.get_submodule('layer1.0').se = Odd()
    Odd.kinds = kinds
    with pytest.raises(ValueError, match=message):
        attention_maps(model, torch.zeros(2, 3, 32, 32))
    Odd.gates = Attention.gates  # type: ignore[method-assign]
    with pytest.raises(NotImplementedError, match='Odd shows no gates: give the class `kinds` and `gates'):
        attention_maps(model, torch.zeros(2, 3, 32, 32))


def test_a_part_that_is_called_module_is_no_wrapping(cbam: nn.Module) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 3, 1)
            self.module = cbam

        def forward(self, x: Tensor) -> Tensor:
            return self.module(self.stem(x))

    net, x = Net().eval(), torch.randn(2, 3, 16, 24)
    maps = attention_maps(net, x)
    expected = attention_maps(cbam, net.stem(x).detach())
    assert_same({k.removeprefix('module.'): v for k, v in maps.items()}, expected)
    assert_same(attention_maps(torch.optim.swa_utils.AveragedModel(net), x), maps)
    assert_same(attention_maps(ModelEmaV3(net), x), maps)


def test_shortened_text_keeps_both_ends() -> None:
    assert short('abc', 3) == 'abc'
    assert short('a\nb\x00 c', 9) == 'a b c'
    assert short('photo_of_a_dog.png', 10) == 'photo_…png' and len(short('x' * 99, 10)) == 10


# The command


@pytest.fixture(scope='module')
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = timm.create_model('simple_cnn_cbam', num_classes=3, attn_after=(1, 2))
    randomise(model)
    folder = tmp_path_factory.mktemp('saved') / 'model'
    timm.models.save_for_hf(
        model,
        str(folder),
        model_config={
            'label_names': ['cat', 'dog', 'emu'],
            'pretrained_cfg': {'input_size': [3, 32, 32], 'crop_pct': 1.0, 'mean': [0.5] * 3, 'std': [0.25] * 3},
        },
        safe_serialization=True,
    )
    return folder


@pytest.fixture(scope='module')
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('photos')
    rng = np.random.default_rng(0)
    for name, size in (('cats/one.png', (48, 64)), ('dogs/one.png', (64, 48)), ('dogs/two.JPG', (40, 40))):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / name)
    return folder


def explain_cli(*args: object) -> int | None:
    import argparse

    from timm_attn.cli.explain import add_parser

    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    parsed = parser.parse_args(['explain', *map(str, args)])
    return parsed.run(parsed)


@needs_matplotlib
@needs_cam
def test_explain_writes_pictures_and_a_summary(
    saved: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / 'out'
    explain_cli(photos, '--model', saved, '--out', out, '--pictures', 2)
    assert sorted(p.name for p in out.iterdir()) == ['one-2.png', 'one.png', 'summary.json', 'summary.png']
    for picture in out.glob('*.png'):
        with Image.open(picture) as image:
            assert min(image.size) > 400
    talk = capsys.readouterr()
    rows = [line.split('\t') for line in talk.out.splitlines()]
    assert [Path(r[0]).name for r in rows] == ['one.png', 'one.png', 'two.JPG']
    assert {r[1] for r in rows} <= {'cat', 'dog', 'emu'} and rows[2][3] == '-'
    assert '2 of 3 images drawn and summary.png' in talk.err

    summary = json.loads((out / 'summary.json').read_text())
    assert [i['class'] for i in summary['images']] == ['cats', 'dogs', 'dogs']
    model = timm.create_model(f'local-dir:{saved}', pretrained=True).eval()
    assert set(summary['health']) == set(attn_sites(model)) == set(summary['class_separation'])
    assert summary['health'][next(iter(attn_sites(model)))]['spatial']['inputs'] == 3
    with torch.no_grad():
        from timm_attn.explain.images import open_image
        from timm_attn.explain.model import image_transform

        p = model(image_transform(model)(open_image(photos / 'cats/one.png'))).softmax(1).max()
    assert summary['images'][0]['probability'] == pytest.approx(p.item(), abs=1e-4)

    with pytest.raises(ValueError, match='is not empty; choose another folder'):
        explain_cli(photos, '--model', saved, '--out', out)


@needs_matplotlib
@needs_cam
def test_plain_models_stand_beside_others_and_random_weights_are_told(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip('sklearn')
    models = ('--model', saved, '--model', 'simple_cnn')
    explain_cli('--data', 'digits', '--limit', 3, '--pictures', 1, *models, '--untrained', '--out', tmp_path / 'out')
    written = {p.name for p in (tmp_path / 'out').iterdir()}
    own = f'summary-{str(saved).replace("/", "_").strip("_")[-60:]}'
    assert written == {'digits-0-0000.png', f'{own}.json', f'{own}.png', 'summary-simple_cnn.json'}
    plain = json.loads((tmp_path / 'out/summary-simple_cnn.json').read_text(encoding='utf-8'))
    assert plain['health'] == {} and plain['notes'] == ['This model has no attention, so there is no gate to count.']
    assert len({row['class'] for row in plain['images']}) == 3 and plain['untrained'] is True
    talk = capsys.readouterr()
    assert len(talk.out.splitlines()) == 6 and 'simple_cnn is untrained: its weights are random' in talk.err


@needs_matplotlib
def test_random_weights_are_called_untrained_in_the_picture() -> None:
    image = Image.new('RGB', (40, 30), 'red')
    assert explain_image(load_model('simple_cnn_se', pretrained=False), image, cam=False).untrained
    model = timm.create_model('simple_cnn_cbam', num_classes=3)
    e = explain_image(model.eval(), image, title='a model', cam=False)
    assert e.untrained and 'a model\nuntrained: random weights' in [t for t, _ in texts(draw_explanation(e))]
    model.train()(torch.randn(4, 3, 32, 32))  # one step moves the running means
    assert not explain_image(model.eval(), image, cam=False).untrained


@pytest.mark.parametrize('more', [('--data', 'digits'), ()])
def test_images_or_data_are_given_and_not_both(tmp_path: Path, more: tuple[str, ...]) -> None:
    images = ['a.png'] if more else []
    with pytest.raises(ValueError, match='Give images, or a data set by --data, and not both'):
        explain_cli(*images, *more, '--model', 'simple_cnn_se', '--out', tmp_path / 'out')


def test_an_image_like_a_thread_and_broken_weights_are_refused() -> None:
    model = timm.create_model('simple_cnn_se', num_classes=3).eval()
    with pytest.raises(ValueError, match='5000 x 2 pixels are no picture to look at'):
        explain_image(model, Image.new('L', (5000, 2)))
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match='SimpleCNN gives no finite output for this image'):
        explain_image(model, Image.new('L', (50, 20)))


def test_label_names_may_be_a_mapping_by_index() -> None:
    model: Any = timm.create_model('simple_cnn', num_classes=3)
    model.pretrained_cfg = {'label_names': {'2': 'fox', '1': 'dog', '0': 'cat'}}
    assert label_names(model) == ['cat', 'dog', 'fox']
    model.pretrained_cfg = {'label_names': {'cat': 0, 'dog': 1, 'fox': 2}}
    with pytest.raises(ValueError, match=r"keys \['cat', 'dog', 'fox'\]; expected the indices 0 to 2"):
        label_names(model)


@needs_matplotlib
def test_names_that_are_no_text_and_pictures_called_summary_are_kept_apart(saved: Path, tmp_path: Path) -> None:
    photos = tmp_path / 'photos'
    photos.mkdir()
    for name in (b'One.png', b'one.jpg', b'summary.png', b'\xff.png', b'a b$.png'):
        Image.new('RGB', (9, 9)).save(tmp_path / 'x.png')
        (tmp_path / 'x.png').rename(photos / os.fsdecode(name))
    explain_cli(photos, '--model', saved, '--no-cam', '--out', tmp_path / 'out')
    written = sorted(p.name for p in (tmp_path / 'out').iterdir())
    assert written == ['One-2.png', '_.png', 'a_b_.png', 'image-summary.png', 'one.png', 'summary.json', 'summary.png']


@needs_matplotlib
def test_whole_images_of_different_shapes_are_explained(saved: Path, photos: Path, tmp_path: Path) -> None:
    explain_cli(photos, '--model', saved, '--out', tmp_path / 'out', '--no-crop', '--no-cam')
    summary = json.loads((tmp_path / 'out/summary.json').read_text())
    assert 'Images differ in size' in summary['notes'][0]
    assert all('spatial' not in kinds and 'channel' in kinds for kinds in summary['health'].values())


@needs_matplotlib
def test_one_grey_image_and_a_model_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from timm_attn.explain.grad_cam import grad_cam
    from timm_attn.explain.images import open_image
    from timm_attn.explain.model import image_transform, shown_image

    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / 'digit.png')
    monkeypatch.setitem(__import__('sys').modules, 'pytorch_grad_cam', None)
    model = timm.create_model('simple_cnn_se', num_classes=10, in_chans=1)
    reason = grad_cam(model, torch.zeros(1, 1, 8, 8), 0)
    assert isinstance(reason, str) and 'pip install grad-cam, or all of the extra' in reason and "[lab]'" in reason
    x = image_transform(model)(open_image(tmp_path / 'digit.png'))
    assert x.shape[1] == 1 and shown_image(model, x).ndim == 2
    assert label_names(model)[3] == 'class 3'
    explain_cli(tmp_path / 'digit.png', '--model', 'simple_cnn_se', '--untrained', '--out', tmp_path / 'out')
    assert [p.name for p in (tmp_path / 'out').iterdir()] == ['digit.png']


@needs_cam
def test_grad_cam_is_where_the_gradient_says_and_leaves_the_model(cbam: nn.Module) -> None:
    from timm_attn.explain.grad_cam import grad_cam

    x = torch.randn(1, 3, 32, 48)
    cbam.train()
    before = copy.deepcopy(cbam.state_dict())
    cbam.eval()
    found = grad_cam(cbam, x, 2)
    assert isinstance(found, np.ndarray) and found.shape == (32, 48)
    assert all(torch.equal(v, before[k]) for k, v in cbam.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in cbam.parameters())

    kept: list[Tensor] = []
    info: Any = cbam.feature_info
    handle = cbam.get_submodule(info[-1]['module']).register_forward_hook(lambda *args: kept.append(args[2]))
    score = cbam(x)[0, 2]
    handle.remove()
    features = kept[0]
    weights = torch.autograd.grad(score, features)[0].mean((2, 3), keepdim=True)
    own = (weights * features).sum(1, keepdim=True).relu()
    own = nn.functional.interpolate(own, (32, 48), mode='bilinear')[0, 0].detach().numpy()
    assert np.corrcoef(own.ravel(), found.ravel())[0, 1] > 0.98


@needs_matplotlib
@pytest.mark.parametrize(
    ('images', 'model', 'message'),
    [
        (['missing.png'], 'simple_cnn_se', "missing.png' does not exist"),
        (['empty'], 'simple_cnn_se', "empty' holds no image"),
        (['broken.png'], 'simple_cnn_se', "broken.png' is no readable image"),
        (['good.png'], 'simple_cnnn', "'simple_cnnn' is no folder, no Hub repository"),
        (['good.png'], 'empty', 'has no config.json and no model.safetensors'),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: list[str], model: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path('empty').mkdir()
    Path('broken.png').write_bytes(b'\x89PNG\r\n\x1a\n')
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save('good.png')
    with pytest.raises(ValueError, match=message):
        explain_cli(*images, '--model', model, '--untrained', '--out', 'out')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['broken.png', 'empty', 'good.png']


@needs_matplotlib
def test_pictures_are_the_same_each_time(tmp_path: Path) -> None:
    e = made_up(CHANNEL, 2)
    one, two = io.BytesIO(), io.BytesIO()
    draw_explanation(e).savefig(one)
    draw_explanation(e).savefig(two)
    assert one.getvalue() == two.getvalue()


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__('sys').modules, 'matplotlib', None)
    with pytest.raises(ImportError, match=r"pip install '\.\[lab\]'"):
        draw_explanation(made_up(CHANNEL, 2))
