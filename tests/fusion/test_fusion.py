"""Fused models against the eager ones: same numbers, same keys, same behaviour, less kept."""

import copy
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
from timm.models.resnet import BasicBlock
from torch import Tensor, nn
from torch.torch_version import TorchVersion

import timm_attn
from timm_attn.explain.gates import attention_maps
from timm_attn.fusion import blocks, fuse, kernels
from timm_attn.fusion.compile import Kernel, compiler_works, kernel, observe_kernels
from timm_attn.fusion.functions import gate_conv, max_pool
from timm_attn.layers import SqueezeExcite, TripletAttention
from timm_attn.measure import kept_bytes

from .support import SMALL, build, check_equal, environment, images, step

CHANNEL_GATES = ('resnet26', 'se_resnet18', 'eca_resnet18', 'srm_resnet18')


@pytest.mark.parametrize('name', SMALL)
def test_fused_model_has_the_outputs_gradients_and_statistics_of_the_eager_one(name: str) -> None:
    eager = build(name).train()
    fused = fuse(copy.deepcopy(eager), compile=False)
    assert isinstance(fused.get_submodule('layer1.0'), blocks.Fused)
    x = images()
    for training in (True, False):
        check_equal(step(fused.train(training), x), step(eager.train(training), x), 1e-10)


@pytest.mark.parametrize('name', ['coord', 'ema', 'fca', 'gc', 'gct', 'nl', 'scsa', 'scse', 'sge', 'simam'])
def test_attentions_that_are_run_again_are_those_of_the_eager_model(name: str) -> None:
    eager = build('se_resnet18')
    cast(Any, eager.get_submodule('layer2.0')).se = timm_attn.create_attn(name, 128).double()
    for p in eager.parameters():
        p.data += 0.05 * torch.randn_like(p)
    fused = fuse(copy.deepcopy(eager), compile=False)
    x = images()
    kept = [kept_bytes(model, x) for model in (eager, fused)]
    attn = fused.get_submodule('layer2.0.se')
    known = type(attn)
    attn.__class__ = type('Unknown', (known,), {})  # a subclass, of which nothing is known
    assert kept[1] < kept_bytes(fused, x) < kept[0]
    attn.__class__ = known
    for training in (True, False):
        check_equal(step(fused.train(training), x), step(eager.train(training), x), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    'name', [*CHANNEL_GATES, 'cbam_resnet18', 'triplet_resnet18', 'bam_resnet18', 'csa_resnet18', 'sk_resnet50']
)
def test_compiled_model_has_the_outputs_gradients_and_statistics_of_the_eager_one(name: str, compiler: None) -> None:
    eager = build(name)
    fused = fuse(copy.deepcopy(eager))
    x = images()
    for training in (True, False):
        check_equal(step(fused.train(training), x), step(eager.train(training), x), 1e-10)
    with torch.no_grad():
        check_equal({'output': fused(x)}, {'output': eager(x)}, 1e-10)


@pytest.mark.slow
def test_one_compiled_graph_serves_all_sizes(compiler: None) -> None:
    eager = build('cbam_resnet18')
    fused = fuse(copy.deepcopy(eager))
    check_equal(step(fused, images()), step(eager, images()), 1e-10)
    before = {name: len(k.graphs) for name, k in vars(kernels).items() if isinstance(k, Kernel)}
    # Square, with sides that are equal to each other and to the channels of some stage, and as large as no map before.
    for shape in ((4, 3, 64, 64), (2, 3, 256, 256), (5, 3, 97, 131)):
        x = torch.randn(shape, dtype=torch.float64)
        check_equal(step(fused, x), step(eager, x), 1e-10)
    assert before == {name: len(k.graphs) for name, k in vars(kernels).items() if isinstance(k, Kernel)}
    one = torch.randn(1, 3, 32, 32, dtype=torch.float64)  # maps of one pixel
    check_equal(step(fused.eval(), one), step(eager.eval(), one), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['cbam_resnet18', 'triplet_resnet18'])
def test_compiled_channels_last_model_has_the_numbers_of_the_eager_one(name: str, compiler: None) -> None:
    eager = build(name).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    fused = fuse(copy.deepcopy(eager))
    x = images().to(memory_format=torch.channels_last)
    check_equal(step(fused, x), step(eager, x), 1e-10)


def test_a_kernel_that_cannot_be_compiled_warns_once_and_computes_all_the_same(compiler: None) -> None:
    @kernel
    def odd(x: Tensor) -> tuple[Tensor]:
        if x.sum().item() > 0:  # depends on data, so there is no graph
            x = x + 1
        return (x * 2,)

    x = torch.ones(3)
    with pytest.warns(UserWarning, match=r'cannot compile odd\(\).*stays slow'):
        (y,) = odd(True, x)
    (again,) = odd(True, x)
    assert torch.equal(y, torch.full((3,), 4.0)) and torch.equal(again, y)


@pytest.mark.parametrize(('name', 'side'), [('resnet18', 64), ('cbam_resnet18', 64), ('triplet_resnet18', 22)])
def test_small_maps_take_the_ordinary_way_where_nothing_is_kept(
    name: str, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, 'compiler_works', lambda device: True)
    results = Kernel._results
    monkeypatch.setattr(Kernel, '_results', lambda self, compiled, args: results(self, False, args))
    block = cast(nn.Module, fuse(build(name, torch.float32).eval()).get_submodule('layer1.0'))
    called: list[Kernel] = []
    with observe_kernels(lambda k, *_: called.append(k)):
        for rows, kernels_are_called in ((side - 1, False), (side, True)):
            x = torch.randn(1, 64, rows, 128)
            called.clear()
            with torch.no_grad():
                block(x)
            # 64 * 64 * 128 floats are two megabytes; triplet pools along 3 dimensions.
            assert bool(called) == kernels_are_called
            block(x)
            assert called  # with gradients always


@pytest.mark.parametrize('size', [(7, 7), (40, 9), (3, 12), (8, 64), (2, 30), (1, 5)], ids=str)
@pytest.mark.parametrize('kernel_size', [3, 7])
def test_convolutions_of_gates_are_torchs(size: tuple[int, int], kernel_size: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False).double()
    x = torch.randn(2, 2, *size, dtype=torch.float64, requires_grad=True)
    want = conv(x)
    g = torch.randn_like(want)
    gx, gweight = torch.autograd.grad(want, (x, conv.weight), g)
    ours = gate_conv(conv, x)
    found = torch.autograd.grad(ours, (x, conv.weight), g)
    for a, b in zip((ours, *found), (want, gx, gweight), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_compiled_model_is_equal_in_float32_and_close_in_bfloat16(compiler: None) -> None:
    eager = build('se_resnet18', torch.float32).eval()
    fused = fuse(copy.deepcopy(eager))
    x = images(torch.float32)
    exact = eager(x)
    torch.testing.assert_close(fused(x), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())
    with torch.autocast('cpu', torch.bfloat16):
        gap = (fused(x) - exact).abs().max()
        eager_gap = (eager(x) - exact).abs().max()
    assert gap <= 2 * eager_gap


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
@pytest.mark.parametrize('name', ['cbam_resnet18', 'sk_resnet50', 'bam_resnet18'])
def test_autocast_and_channels_last_are_as_exact_as_eager(name: str, layout: torch.memory_format) -> None:
    eager = build(name, torch.float32).to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    fused = fuse(copy.deepcopy(eager), compile=False)
    x = images(torch.float32, n=8).to(memory_format=layout)
    exact = step(copy.deepcopy(eager), x)
    with torch.autocast('cpu', torch.bfloat16):
        ours, theirs = step(fused, x), step(eager, x)

    def gap(result: dict[str, Tensor], kind: str) -> float:
        a, b = (torch.cat([v.flatten() for k, v in r.items() if k.startswith(kind)]) for r in (result, exact))
        return ((a - b).norm() / b.norm()).item()

    # Both round to bfloat16, though not at the same places: ours is no further from float32.
    for kind in ('output', 'grad'):
        assert 0 < gap(ours, kind) < 1.2 * gap(theirs, kind)


def test_autocast_leaves_no_cast_without_gradient() -> None:
    eager = build('se_resnet18', torch.float32)
    fused = fuse(copy.deepcopy(eager), compile=False)
    x = images(torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        fused(x)
        # In the same autocast block, the attention's weights are wanted with their gradients.
        attn = next(iter(timm_attn.attn_sites(fused).values()))
        attn(torch.randn(2, 64, 4, 4)).float().sum().backward()
    assert all(p.grad is not None for p in attn.parameters())


def test_fusing_keeps_keys_identities_and_types_and_twice_is_once() -> None:
    model = build('cbam_resnet18')
    state, parameters, sites = model.state_dict(), list(model.parameters()), timm_attn.attn_sites(model)
    assert fuse(model, compile=False) is model
    types = [type(m) for m in model.modules()]
    assert fuse(model, compile=False) is model
    assert [type(m) for m in model.modules()] == types
    assert list(model.state_dict()) == list(state)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(timm_attn.attn_sites(model).values(), sites.values(), strict=True))
    assert isinstance(model.get_submodule('layer1.0'), BasicBlock)
    build('cbam_resnet18').load_state_dict(model.state_dict())


@pytest.mark.parametrize('twin', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy', 'pickle'])
def test_copies_of_a_fused_model_have_weights_of_their_own(twin: Callable[[nn.Module], nn.Module]) -> None:
    fused = fuse(build('bam_resnet18'), compile=False).eval()
    other = twin(fused)
    x = images()
    before = fused(x)
    assert torch.equal(other(x), before)
    for p in other.parameters():
        p.data.zero_()
    assert torch.equal(fused(x), before)
    assert not torch.equal(other(x), before)


def test_features_of_a_fused_model_are_the_eager_ones() -> None:
    eager = timm.create_model('se_resnet18', features_only=True, layers=(1, 1, 1, 1)).double().eval()
    fused = fuse(copy.deepcopy(eager), compile=False)
    x = images()
    for a, b in zip(fused(x), eager(x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_maps_and_hooks_see_what_they_see_in_the_eager_model() -> None:
    eager = build('cbam_resnet18').eval()
    fused = fuse(copy.deepcopy(eager), compile=False)
    x = images()
    for model in (eager, fused):
        seen: list[bool] = []
        handle = model.get_submodule('layer2.0.bn2').register_forward_hook(lambda *_, seen=seen: seen.append(True))
        model(x)
        handle.remove()
        assert seen == [True]
    ours, theirs = attention_maps(fused, x), attention_maps(eager, x)
    assert ours.keys() == theirs.keys() and ours
    for site in ours:
        check_equal(ours[site], theirs[site], 1e-10)


def test_drop_path_draws_the_masks_of_the_eager_model() -> None:
    eager = build('se_resnet18', drop_path_rate=0.5).train()
    fused = fuse(copy.deepcopy(eager), compile=False)
    results = []
    for model in (fused, eager):
        torch.manual_seed(3)
        results.append(step(model, images(n=6)))
    check_equal(results[0], results[1], 1e-10)
    torch.manual_seed(4)
    assert not torch.equal(step(fused, images(n=6))['output'], results[0]['output'])


@pytest.mark.parametrize('name', ['se_resnet18', 'sk_resnet50', 'bam_resnet18'])
def test_frozen_parameters_and_statistics_stay_frozen(name: str) -> None:
    eager = build(name)
    for m in eager.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    for n, p in eager.named_parameters():
        p.requires_grad_('conv' not in n)
    fused = fuse(copy.deepcopy(eager), compile=False)
    check_equal(step(fused, images()), step(eager, images()), 1e-10)


def test_switching_to_eval_before_backward_changes_nothing() -> None:
    model = fuse(build('cbam_resnet18'), compile=False).train()
    want = step(copy.deepcopy(model), images())
    y = model(images())
    model.eval()
    y.square().sum().backward()
    check_equal(
        {f'grad {n}': p.grad for n, p in model.named_parameters() if p.grad is not None},
        {k: v for k, v in want.items() if k.startswith('grad ') and k != 'grad x'},
        1e-10,
    )
    assert not any(m.training for m in model.modules())


def test_changing_a_weight_before_backward_is_an_error_as_in_eager() -> None:
    model = fuse(build('se_resnet18'), compile=False)
    y = model(images())
    with torch.no_grad():
        model.get_submodule('layer2.0.se.fc1').get_parameter('weight').add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        y.sum().backward()


def test_second_derivatives_are_refused() -> None:
    x = images().requires_grad_()
    (g,) = torch.autograd.grad(fuse(build('se_resnet18'), compile=False)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='no second derivatives'):
        g.sum().backward()


def test_gradient_checkpointing_works() -> None:
    eager = build('se_resnet18')
    fused = fuse(copy.deepcopy(eager), compile=False)
    for model in (eager, fused):
        model.set_grad_checkpointing()  # pyright: ignore[reportCallIssue]
    check_equal(step(fused, images()), step(eager, images()), 1e-10)


def test_functional_calls_differentiate_what_they_were_given() -> None:
    model = fuse(build('cbam_resnet18').eval(), compile=False)
    given = {n: (p.detach() * 1.1).requires_grad_() for n, p in model.named_parameters()}
    torch.func.functional_call(model, given, (images(),)).square().sum().backward()
    changed = copy.deepcopy(model)
    changed.load_state_dict({**model.state_dict(), **{n: p.detach() for n, p in given.items()}})
    want = step(changed, images())
    check_equal(
        {f'grad {n}': p.grad for n, p in given.items() if p.grad is not None},
        {k: v for k, v in want.items() if k.startswith('grad ') and k != 'grad x'},
        1e-10,
    )
    assert all(p.grad is None for p in model.parameters())


def test_replaced_parts_take_the_ordinary_way() -> None:
    eager = build('se_resnet18')
    eager.get_submodule('layer1.0').bn1 = nn.GroupNorm(4, 64).double()
    eager.get_submodule('layer2.0').act1 = nn.GELU()
    fused = fuse(copy.deepcopy(eager), compile=False)
    check_equal(step(fused, images()), step(eager, images()), 1e-10)


def test_an_attention_of_ones_own_is_computed_by_its_own_forward_pass() -> None:
    class Half(SqueezeExcite):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    class Doubled(TripletAttention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    for name, cls in ('se_resnet18', Half), ('triplet_resnet18', Doubled):
        eager = build(name)
        cast(Any, eager.get_submodule('layer1.0')).se.__class__ = cls
        fused = fuse(copy.deepcopy(eager), compile=False)
        check_equal(step(fused, images()), step(eager, images()), 1e-10)


@pytest.mark.parametrize('name', ['cbam_resnet18', 'triplet_resnet18', 'srm_resnet18'])
@pytest.mark.parametrize('args', [{'start': 'identity'}, {'start': 'paper'}], ids=str)
def test_gains_and_parts_left_out_are_kept(name: str, args: dict[str, Any]) -> None:
    attn = name.split('_')[0]
    options = {'cbam': {'channel': False}, 'triplet': {'spatial': False}}.get(attn, {})
    plain = timm.create_model('resnet18', num_classes=5, layers=(1, 1, 1, 1)).double()
    eager = timm_attn.inject(plain, attn, **args, **options)  # pyright: ignore[reportArgumentType]
    for p in eager.parameters():
        p.data += 0.05 * torch.randn_like(p)
    fused = fuse(copy.deepcopy(eager), compile=False)
    check_equal(step(fused, images()), step(eager, images()), 1e-10)


def test_export_of_a_fused_model_gives_its_outputs() -> None:
    fused = fuse(build('se_resnet18', torch.float32).eval(), compile=False)
    x = images(torch.float32)
    program = torch.export.export(fused, (x,))
    torch.testing.assert_close(program.module()(x), fused(x), rtol=1e-5, atol=1e-5)


def test_one_value_per_channel_raises_torchs_error() -> None:
    model = fuse(build('se_resnet18'), compile=False).train()
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        model(torch.randn(1, 3, 32, 32, dtype=torch.float64))


@pytest.mark.parametrize('compile', [False, pytest.param(True, marks=pytest.mark.slow)], ids=['eager', 'compiled'])
@pytest.mark.parametrize('name', ['resnet26d', 'se_resnet50', 'cbam_resnet18', 'bam_resnet18', 'sk_resnet50'])
def test_freezing_folds_every_norm_between_convolutions_and_keeps_outputs(
    name: str,
    compile: bool,
    request: pytest.FixtureRequest,
) -> None:
    if compile:
        request.getfixturevalue('compiler')
    eager = build(name)
    frozen = fuse(copy.deepcopy(eager), freeze=True, compile=compile)
    assert not frozen.training
    attentions = timm_attn.attn_sites(frozen).values()
    inside = {id(m) for a in attentions for m in a.modules()}
    left = [n for n, m in frozen.named_modules() if isinstance(m, nn.BatchNorm2d) and id(m) not in inside]
    assert not left
    with torch.no_grad():
        want = eager.eval()(images())
        check_equal({'output': frozen(images())}, {'output': want}, 1e-10)
        assert fuse(frozen, freeze=True, compile=compile) is frozen
        check_equal({'output': frozen(images())}, {'output': want}, 1e-10)


POOLS = [
    nn.MaxPool2d(3, 2, 1),
    nn.MaxPool2d(2),
    nn.MaxPool2d(3, 1, 1),
    nn.MaxPool2d((3, 2), 2, 1),
    nn.MaxPool2d(3, 2, 1, dilation=2),
    nn.MaxPool2d(3, 2, 1, ceil_mode=True),
]


@pytest.mark.parametrize('pool', POOLS, ids=str)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_pooling_of_a_stem_is_torchs(pool: nn.MaxPool2d, dtype: torch.dtype) -> None:
    model = timm.create_model('resnet18')
    model.maxpool = copy.deepcopy(pool)
    fused = fuse(model).get_submodule('maxpool')
    assert type(fused) is blocks.FusedMaxPool2d
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 8, 7, 9), (1, 16, 5, 5), (3, 9, 12, 16), (1, 8, 190, 180), (2, 3, 9, 9)):
        # Of equal maxima the first counts, and the last NaN.
        x = torch.randint(-2, 3, shape, generator=generator).to(dtype) / 2
        x[0, 0, 2, 3] = x[0, 1, 4, 3] = x[0, 1, 4, 4] = torch.nan
        x[0, 2] = -torch.inf
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        found, want = fused(ours), pool(theirs)
        assert torch.equal(found.nan_to_num(7), want.nan_to_num(7)) and found.is_contiguous()
        g = torch.randn(want.shape, generator=generator).to(dtype)
        found.backward(g.to(memory_format=torch.channels_last))
        want.backward(g)
        assert ours.grad is not None and theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)
        assert type(found.grad_fn).__name__.startswith('_MaxPool') == (shape[1] >= 8)
        with torch.no_grad():
            assert torch.equal(fused(x).nan_to_num(7), want.nan_to_num(7))


@pytest.mark.parametrize('name', ['resnet18d', 'se_resnet18', 'sk_resnet50'])
def test_a_stem_computes_with_the_channels_side_by_side_in_inference(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = build(name).eval()
    fused = fuse(copy.deepcopy(eager), compile=False)
    layouts: list[bool] = []

    def noted(pool: nn.MaxPool2d, x: Tensor) -> Tensor:
        layouts.append(x.is_contiguous())
        return max_pool(pool, x)

    monkeypatch.setattr(blocks, 'max_pool', noted)
    x = images()

    def shifted(m: nn.Module, args: Any, output: Any) -> Any:
        return output + 1

    def check(contiguous: bool) -> None:
        found = cast(Any, fused).forward_features(x)
        check_equal({'map': found}, {'map': cast(Any, eager).forward_features(x)}, 1e-10)
        assert found.is_contiguous() and layouts == [contiguous]
        layouts.clear()

    check(True)  # with gradients
    with torch.no_grad():
        check(False)
        for model in (fused, eager):
            model.get_submodule('act1').register_forward_hook(shifted)
        check(True)
    assert isinstance(pickle.loads(pickle.dumps(fuse(build(name)))), blocks.FusedResNet)


def test_a_pooling_of_a_channels_last_map_stays_in_that_layout() -> None:
    pool = fuse(timm.create_model('resnet18')).get_submodule('maxpool')
    x = torch.randn(2, 8, 9, 8).to(memory_format=torch.channels_last).requires_grad_()
    out = pool(x)
    g = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, x, g)
    (want,) = torch.autograd.grad(nn.MaxPool2d(3, 2, 1)(x), x, g)
    assert torch.equal(found, want)
    for t in (out, found):
        assert t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def test_a_pooling_that_gives_its_indices_gives_them() -> None:
    model = timm.create_model('resnet18')
    model.maxpool = nn.MaxPool2d(3, 2, 1, return_indices=True)
    x = torch.randn(2, 8, 9, 8)
    for found, want in zip(
        fuse(model).get_submodule('maxpool')(x), nn.MaxPool2d(3, 2, 1, return_indices=True)(x), strict=True
    ):
        assert torch.equal(found, want)


def test_models_without_known_blocks_stay_as_they_are_with_a_warning() -> None:
    model = timm.create_model('simple_cnn_se')
    types = [type(m) for m in model.modules()]
    with pytest.warns(UserWarning, match='SimpleCNN has no block that timm_attn.fuse knows'):
        assert fuse(model) is model
    assert [type(m) for m in model.modules()] == types


def test_injected_models_are_fused() -> None:
    eager = timm_attn.inject(timm.create_model('resnet18', num_classes=5).double(), 'eca')
    fused = fuse(copy.deepcopy(eager), compile=False)
    check_equal(step(fused, images()), step(eager, images()), 1e-10)
    assert type(fused.get_submodule('layer1.0')) is blocks.FusedBasicBlock


@pytest.mark.parametrize(
    'broken',
    [
        {'CXX': '/nowhere/compiler'},
        # Not even root makes files there.
        pytest.param(
            {'TORCHINDUCTOR_CACHE_DIR': '/proc/self'},
            marks=pytest.mark.skipif(not Path('/proc/self').is_dir(), reason='no /proc'),
        ),
    ],
    ids=['compiler', 'folder'],
)
def test_without_a_compiler_or_a_folder_to_write_to_fuse_warns_once_and_computes_all_the_same(
    broken: dict[str, str], tmp_path: Path
) -> None:
    code = """
        import copy, warnings, timm, torch, timm_attn
        from timm_attn.fusion import fuse
        eager = timm.create_model('se_resnet18', num_classes=5, layers=(1, 1, 1, 1)).eval()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            fused = fuse(copy.deepcopy(eager))
            fused(torch.zeros(2, 3, 32, 32))
            fuse(copy.deepcopy(eager))(torch.zeros(2, 3, 32, 32))
        seen = [str(w.message) for w in seen if 'cannot compile' in str(w.message)]
        assert len(seen) == 1 and 'Install a C++ compiler' in seen[0], seen
        x = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(fused(x), eager(x))
        print('done')
    """
    env = environment(**{'TORCHINDUCTOR_CACHE_DIR': str(tmp_path), **broken})
    done = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True, env=env, cwd=tmp_path
    )
    assert done.returncode == 0 and 'done' in done.stdout, done.stderr


def test_a_torch_whose_compiler_writes_past_its_buffers_is_not_asked_to_compile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, '__version__', TorchVersion('2.8.0+cpu'))
    with pytest.warns(UserWarning, match=r'torch 2\.8\.0\+cpu compiles writes past its buffers: install torch 2\.9'):
        assert not compiler_works.__wrapped__('cpu')
