"""Whatever a fused block does not know to be the same takes the ordinary way. The model itself stands beside it."""

import copy
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from timm_attn.fusion import blocks, fuse
from timm_attn.fusion.functions import gate_conv
from timm_attn.layers import Attention
from timm_attn.measure import kept_bytes

from .support import build as build_wide
from .support import check_equal, images, step

# One of each way to compute a block.
FEW = [
    'se_resnet18',
    'cbam_resnet18',
    'triplet_resnet18',
    'bam_resnet18',
    'csa_resnet18',
    'scse_resnet18',
    'sk_resnet50',
]


def build(name: str, **kwargs: Any) -> nn.Module:
    return build_wide(name, channels=(64, 96, 128, 160), **kwargs)


class Own(Attention):
    """An attention of somebody's own, with no facts about itself."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__(neutral_gate=0.5)
        self.fc = nn.Linear(channels, channels)

    def gate(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3))).sigmoid()[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class Dropout(Own):
    def forward(self, x: Tensor) -> Tensor:
        return x * F.dropout(self.gate(x), 0.5, self.training)


class ItsInput(Own):
    def forward(self, x: Tensor) -> Tensor:
        return x


class ItsInputAgain(ItsInput):
    recomputable = True


class Sum(Own):
    """Its gradient is expanded: one number for a plane."""

    recomputable = True

    def forward(self, x: Tensor) -> Tensor:
        return x.sum((2, 3), keepdim=True).expand_as(x) / 100


class Counter(Own):
    def __init__(self, channels: int = 64) -> None:
        super().__init__(channels)
        self.register_buffer('calls', torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        cast(Tensor, self.calls).add_(1)
        return super().forward(x) * cast(Tensor, self.calls)


class Average(Own):
    """Takes the buffer's old value, and puts a new tensor in its place."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__(channels)
        self.register_buffer('average', torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x) * self.average
        self.average = 0.9 * self.average + 0.1 * x.detach().mean((0, 2, 3), keepdim=True)
        return out


class Number(Own):
    """Counts in a plain attribute."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) / self.calls


class StatisticsAlone(Attention):
    """No parameters."""

    statistics = ('mean',)

    def __init__(self, channels: int = 64) -> None:
        super().__init__(neutral_gate=0.5)

    def gate_of(self, mean: Tensor) -> Tensor:
        return mean.sigmoid()[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.gate_of(x.mean((2, 3))) * self.gain)


class OnlyMaximum(StatisticsAlone):
    statistics = ('peak',)

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.gate_of(x.amax((2, 3))) * self.gain)


class StatisticsOfAnInstance(Own):
    def __init__(self, channels: int = 64) -> None:
        super().__init__(channels)
        self.statistics = ('var',)  # pyright: ignore[reportAttributeAccessIssue]

    def gate_of(self, var: Tensor) -> Tensor:
        raise AssertionError('nobody said that this is the attention')


class StatisticsNobodyKnows(Own):
    statistics = ('median',)

    def gate_of(self, median: Tensor) -> Tensor:
        raise AssertionError('a block knows no median')


class UnusedParameter(Own):
    recomputable = True

    def forward(self, x: Tensor) -> Tensor:
        return x * x.mean((2, 3), keepdim=True).sigmoid()


class DropoutInside(Own):
    """It says that it can be run again, but a part of it has been replaced by one that cannot."""

    recomputable = True

    def __init__(self, channels: int = 64) -> None:
        super().__init__(channels)
        self.fc = nn.Sequential(self.fc, nn.Dropout(0.5))  # pyright: ignore[reportAttributeAccessIssue]


class Planes(Own):
    """A convolution from 2 channels to 1 of any kind."""

    def __init__(self, size: int | tuple[int, int], **kwargs: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, size, bias=False, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv(torch.stack([x.amax(1), x.mean(1)], 1)).mean((2, 3), keepdim=True).sigmoid()


OWN = (
    Own, Dropout, ItsInput, ItsInputAgain, Sum, Counter, Average, Number, StatisticsAlone, OnlyMaximum,
    StatisticsOfAnInstance, StatisticsNobodyKnows, UnusedParameter, DropoutInside,
)  # fmt: skip


def with_attention(attn: nn.Module) -> nn.Module:
    """An alive ResNet with the attention in a block whose shortcut is its input."""
    model = build('resnet18', layers=(2, 1, 1, 1))
    cast(Any, model.get_submodule('layer1.1')).se = attn.double()
    return model


def pair(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A fused copy, and the model."""
    return fuse(copy.deepcopy(model), compile=False), model


def check_steps(fused: nn.Module, eager: nn.Module, x: Tensor | None = None) -> None:
    """Two training steps and one in eval mode, with the same random numbers."""
    x = images() if x is None else x
    for training in (True, True, False):
        results = []
        for model in (fused, eager):
            torch.manual_seed(5)
            results.append(step(model.train(training), x))
        check_equal(results[0], results[1], 1e-10)


@pytest.mark.parametrize('cls', OWN)
def test_attention_of_ones_own_is_what_it_is_unfused(cls: type[Attention]) -> None:
    torch.manual_seed(0)
    check_steps(*pair(with_attention(cast(Any, cls)())))


@pytest.mark.parametrize(
    'kwargs',
    [
        {'size': 3, 'padding': 1, 'stride': 2},
        {'size': 3, 'padding': 2, 'dilation': 2},
        {'size': 7, 'padding': 0},
        {'size': (7, 1), 'padding': (3, 0)},
        {'size': 4, 'padding': 2},
        {'size': 3, 'padding': 'same'},
        {'size': 3, 'padding': 1, 'padding_mode': 'reflect'},
        {'size': 3, 'padding': 1, 'padding_mode': 'circular'},
        {'size': 3, 'padding': 1},
    ],
    ids=str,
)
def test_convolutions_from_two_channels_to_one_are_torchs(kwargs: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 256, dtype=torch.float64)
    check_steps(*pair(with_attention(Planes(**kwargs))), x)


def test_a_gate_convolution_that_is_changed_afterwards_is_torchs() -> None:
    fused, eager = pair(build('cbam_resnet18'))
    for model in (fused, eager):
        conv = cast(Any, model.get_submodule('layer1.0')).se.conv
        conv.padding_mode, conv.dilation, conv.padding = 'zeros', (2, 2), (6, 6)
    check_steps(fused, eager)


@pytest.mark.parametrize(
    ('name', 'act'),
    [('se_resnet18', 'act1'), ('cbam_resnet18', 'act2'), *(('sk_resnet50', f'act{i}') for i in (1, 2, 3))],
)
@pytest.mark.parametrize('new', [nn.Identity, nn.LeakyReLU])
def test_other_activations_are_computed_as_they_are(name: str, act: str, new: type[nn.Module]) -> None:
    eager = build(name)
    block = cast(Any, eager.get_submodule('layer4.0'))
    assert hasattr(block, act)
    setattr(block, act, new())
    check_steps(*pair(eager))


def test_another_norm_in_a_selective_kernel_block_is_computed_as_it_is() -> None:
    eager = build('sk_resnet50')
    cast(Any, eager.get_submodule('layer1.0')).bn2 = nn.BatchNorm2d(64).double()
    check_steps(*pair(eager))


def test_activation_given_at_construction() -> None:
    check_steps(*pair(build('se_resnet18', act_layer=nn.Identity)))


@pytest.mark.parametrize('name', FEW)
def test_replicas_of_data_parallel_have_gradients(name: str) -> None:
    def replica(model: nn.Module, leaves: dict[str, Tensor]) -> nn.Module:
        # As torch.nn.parallel.replicate makes them: copies are plain attributes, and not parameters.
        copies = {m: cast(Any, m)._replicate_for_data_parallel() for m in model.modules()}
        for m, twin in copies.items():
            for child_name, child in m._modules.items():
                twin._modules[child_name] = None if child is None else copies[child]
            for key, buffer in m._buffers.items():
                twin._buffers[key] = None if buffer is None else buffer.clone()
        for key in leaves:
            path, _, attribute = key.rpartition('.')
            setattr(copies[model.get_submodule(path)], attribute, leaves[key] * 1)
        for m in model.modules():
            copies[m]._parameters.update({key: None for key, p in m._parameters.items() if p is None})
        return copies[model]

    eager = build(name).train()
    leaves = {n: p.detach().clone().requires_grad_() for n, p in eager.named_parameters()}
    replica(fuse(copy.deepcopy(eager), compile=False), leaves)(images()).square().sum().backward()
    want = step(eager, images())
    ours = {f'grad {n}': p.grad for n, p in leaves.items() if p.grad is not None}
    check_equal(ours, {k: v for k, v in want.items() if k.startswith('grad ') and k != 'grad x'}, 1e-10)


@pytest.mark.filterwarnings('ignore:There is a performance drop')  # torch's own, in a loop
@pytest.mark.parametrize('name', FEW)
def test_batched_gradients_are_those_of_the_eager_model(name: str) -> None:
    x = images(n=2).requires_grad_()
    fused, eager = pair(build(name).eval())

    def grad(model: nn.Module, y: Tensor, g: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, [x, *model.parameters()], g, retain_graph=True, **kwargs)

    y, want = fused(x), eager(x)
    basis = torch.eye(y.numel(), dtype=y.dtype).reshape(-1, *y.shape)[:3]
    ones = [grad(eager, want, g) for g in basis]
    for ours in (grad(fused, y, basis, is_grads_batched=True), torch.vmap(lambda g: grad(fused, y, g))(basis)):
        for batch, each in zip(ours, zip(*ones, strict=True), strict=True):
            torch.testing.assert_close(batch, torch.stack(each), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('name', FEW)
def test_fused_models_are_scripted_in_the_ordinary_way(name: str) -> None:
    fused, eager = pair(build(name).eval())
    x = images()
    torch.testing.assert_close(torch.jit.script(fused)(x), eager(x), rtol=0, atol=1e-10)
    assert any(type(m) in blocks._FUSED.values() for m in fused.modules())


@pytest.mark.parametrize('name', FEW)
def test_forward_mode_derivatives_are_those_of_the_eager_model(name: str) -> None:
    x, t = images(n=2), torch.randn(images(n=2).shape, dtype=torch.float64)
    tangents = []
    for model in pair(build(name).eval()):
        with forward_ad.dual_level():
            tangents.append(forward_ad.unpack_dual(model(forward_ad.make_dual(x, t))).tangent)
    torch.testing.assert_close(*tangents, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('name', FEW)
@pytest.mark.parametrize('training', [True, False])
def test_second_derivatives_are_refused_whatever_the_loss(name: str, training: bool) -> None:
    model = fuse(build(name), compile=False).train(training)
    for wanted in ('x', 'conv1.weight'):
        x = images().requires_grad_()
        at = x if wanted == 'x' else model.get_parameter(wanted)
        for p in model.get_submodule('fc').parameters():
            p.requires_grad_(False)  # no gradient that comes into a block depends on anything
        (g,) = torch.autograd.grad(model(x).sum(), at, create_graph=True)
        with pytest.raises(RuntimeError, match='fused blocks have no second derivatives'):
            g.square().sum().backward()


def test_a_block_that_takes_the_ordinary_way_has_second_derivatives() -> None:
    results = []
    for model in pair(build('triplet_resnet18').eval()):
        for m in model.modules():
            if isinstance(m, nn.ReLU):
                m.register_forward_hook(lambda *_: None)
        x = images().requires_grad_()
        (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(g.square().sum(), x)[0])
    assert results[1].abs().max() > 0
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('name', FEW)
@pytest.mark.parametrize('where', ['pixel', 'weight'])
@pytest.mark.parametrize('training', [True, False])
def test_nan_is_where_it_is_in_the_eager_model(name: str, where: str, training: bool) -> None:
    fused, eager = pair(build(name).train(training))
    x = images()
    if where == 'pixel':
        x[1, 0, 20, 20] = torch.nan
    else:
        for model in (fused, eager):
            model.get_parameter('layer4.0.conv1.weight').data[3, 2] = torch.nan
    ours, theirs = step(fused, x), step(eager, x)
    for key, want in theirs.items():
        nan = ours[key].isnan(), want.isnan()
        # Whether a NaN of the gradient is multiplied by padding, 0, is the implementation's. What it must reach, it
        # reaches: test_nan_reaches_what_a_gate_convolution_multiplies_it_by.
        assert torch.equal(*nan) or (key.endswith('.conv.weight') and nan[0].any() and nan[1].any()), key


@pytest.mark.parametrize('size', [(5, 6), (3, 40), (40, 3)], ids=str)
@pytest.mark.parametrize('at', [(0, 0), (2, 1)], ids=str)
def test_nan_reaches_what_a_gate_convolution_multiplies_it_by(size: tuple[int, int], at: tuple[int, int]) -> None:
    conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
    rows, columns = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing='ij')
    window = ((rows - at[0]).abs() <= 3) & ((columns - at[1]).abs() <= 3)
    x = torch.randn(1, 2, *size)
    x[0, 1][at] = torch.nan
    assert gate_conv(conv, x)[0, 0][window].isnan().all()
    x = torch.randn(1, 2, *size, requires_grad=True)
    g = torch.randn(1, 1, *size)
    g[0, 0][at] = torch.nan
    gx, gweight = torch.autograd.grad(gate_conv(conv, x), (x, conv.weight), g)
    assert gx[0, :, window].isnan().all()
    # The weight at (i, j) meets the input at `at` + (i - 3, j - 3), where there is one.
    i, j = torch.meshgrid(torch.arange(7) + at[0] - 3, torch.arange(7) + at[1] - 3, indexing='ij')
    assert gweight[0, :, (i >= 0) & (i < size[0]) & (j >= 0) & (j < size[1])].isnan().all()


@pytest.mark.parametrize('name', ['cbam_resnet18', 'triplet_resnet18', 'srm_resnet18'])
@pytest.mark.parametrize('zero', ['weight', 'image'])
def test_equal_maxima_share_the_gradient(name: str, zero: str) -> None:
    eager = build(name)
    for n, m in eager.named_modules():
        if isinstance(m, nn.BatchNorm2d) and zero == 'weight' and n.endswith('bn2'):
            nn.init.zeros_(m.weight)
    x = torch.zeros_like(images()) if zero == 'image' else images()
    fused, eager = pair(eager)
    check_equal(step(fused, x), step(eager, x), 1e-10)


def test_global_hooks_see_every_module() -> None:
    calls = []
    for model in pair(build('cbam_resnet18')):
        seen: list[str] = []
        handle = register_module_forward_hook(lambda m, *_, seen=seen: seen.append(type(m).__name__))
        try:
            model(images())
        finally:
            handle.remove()
        calls.append(seen)
    assert len(calls[0]) == len(calls[1]) == sum(1 for _ in build('cbam_resnet18').modules())


def test_a_part_whose_forward_pass_is_replaced_in_the_instance_is_called() -> None:
    # As accelerate does to offload weights.
    fused, eager = pair(build('se_resnet18'))
    for model in (fused, eager):
        conv = cast(Any, model.get_submodule('layer2.0.conv2'))
        conv.forward = lambda x, old=conv.forward: old(x) * 2
    check_steps(fused, eager)


@pytest.mark.parametrize('name', ['se_resnet18', 'bam_resnet18'])
def test_an_empty_batch_is_what_it_is_in_the_eager_model(name: str) -> None:
    for training in (False, True):
        results: list[Any] = []
        for model in pair(build(name).train(training)):
            try:
                results.append(tuple(model(images()[:0]).shape))
            except Exception as e:
                results.append(type(e))
            results.append([(n, bool(b.isnan().any())) for n, b in model.named_buffers()])
        assert results[:2] == results[2:]
        assert results[0] == (0, 5) or training


# ---- Attention that is run again ------------------------------------------------------------------------------------


class Layers(Own):
    """Convolutions and a Linear: costly and cheap ones, one that is called twice, one that is overwritten."""

    recomputable = True

    def __init__(self, channels: int = 64) -> None:
        super().__init__(channels)
        self.reduce = nn.Conv2d(channels, 8, 3, padding=1)
        self.expand = nn.Conv2d(8, channels, 5, padding=2, bias=False)
        self.last = nn.Conv2d(channels, channels, 3, padding=1, groups=2)
        self.linear = nn.Linear(2 * channels, channels)
        self.act = nn.ReLU(inplace=True)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        u = self.expand(self.bn(self.act(self.reduce(x)))) + self.reduce(x).mean(1, keepdim=True)
        gate = self.linear(torch.cat([u, x], 1).permute(0, 2, 3, 1)).sigmoid().permute(0, 3, 1, 2)
        return self.last(x * gate)


class LayersAlone(Layers):
    recomputable = True

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x)


@pytest.mark.parametrize('cls', [Layers, LayersAlone])
@pytest.mark.parametrize('frozen', ['', 'last.weight', 'linear.bias'])
def test_layers_of_much_arithmetic_are_called_once_and_have_their_gradients(cls: type[Layers], frozen: str) -> None:
    torch.manual_seed(0)
    attn = cls()
    for name, p in attn.named_parameters():
        p.requires_grad_(name != frozen)
    fused, eager = pair(with_attention(attn))
    check_steps(fused, eager)
    for training in (True, False):
        for model in (fused, eager):
            model.load_state_dict(eager.state_dict())
            model.train(training).zero_grad()
            loss = model(images()).square().sum()
            loss.backward(retain_graph=True)
            loss.backward()
        for ours, want in zip(fused.parameters(), eager.parameters(), strict=True):
            if want.grad is not None:
                torch.testing.assert_close(ours.grad, want.grad, rtol=1e-9, atol=1e-9)
    calls: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Conv2d, '_conv_forward', lambda m, x, w, b: calls.append(w.shape[0]) or _conv(m, x, w, b))
        y = fused.train()(images())
        forward = calls.count(64)
        y.sum().backward()
    assert calls.count(64) == forward > 0


def _conv(m: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, m.stride, m.padding, m.dilation, m.groups)


def test_a_buffer_that_changes_before_the_backward_pass_is_an_error_as_in_eager() -> None:
    for model in pair(build('gam_resnet18').eval()):
        y = model(images()).sum()
        cast(Any, model.get_submodule('layer1.0')).se.bn1.running_var.mul_(2)
        with pytest.raises(RuntimeError, match='modified by an inplace operation'):
            y.backward()


@pytest.mark.parametrize('name', ['csa_resnet18', 'gam_resnet18', 'simam_resnet18'])
def test_threads_that_train_one_model_have_their_gradients(name: str) -> None:
    fused, eager = pair(build(name).eval())
    xs = [images(n=1 + i) for i in range(3)]

    def grads(model: nn.Module, x: Tensor) -> Any:
        return torch.autograd.grad(model(x).square().sum(), [*model.parameters()])

    with ThreadPoolExecutor(3) as pool:
        found = [*pool.map(functools.partial(grads, fused), xs * 3)]
    for ours, x in zip(found, xs * 3, strict=True):
        for a, b in zip(ours, grads(eager, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert fused.training is False and all(p.requires_grad and p.is_leaf for p in fused.parameters())


@pytest.mark.parametrize('name', ['simam_resnet18', 'simam_resnet50'])
def test_attention_behind_a_convolution_is_fused_unless_something_else_looks(name: str) -> None:
    x = images(n=2)
    fused, eager = pair(build(name))
    kept = [kept_bytes(m.train(), x) for m in (fused, eager)]
    assert kept[0] < 0.8 * kept[1]
    check_steps(fused, eager, x)
    seen: list[Tensor] = []
    for model in (fused, eager):
        conv = model.get_submodule('layer1.0.conv2')
        conv.register_forward_hook(lambda m, i, o: seen.append(o.detach()))
    check_steps(fused, eager, x)
    assert len(seen) == 6 and all(torch.allclose(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True))


@pytest.mark.parametrize('name', ['cbam_resnet18', 'gam_resnet18', 'simam_resnet18'])
def test_other_compilers_see_the_model_as_it_is_unfused(name: str) -> None:
    graphs: list[list[str]] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append([f'{n.op} {getattr(n.target, "__name__", "")}' for n in graph.graph.nodes])
        return graph.forward

    x = images(n=2)
    for model in pair(build(name).eval()):
        torch.compile(model, backend=backend, fullgraph=True)(x)
        torch._dynamo.reset()
    assert len(graphs) == 2 and graphs[0] == graphs[1]


# ---- Freezing -------------------------------------------------------------------------------------------------------


def pruned(conv: nn.Module) -> None:
    prune.l1_unstructured(conv, 'weight', 0.3)


REPARAMETRISED: dict[str, Callable[[nn.Module], object]] = {
    'prune': pruned,
    'weight_norm': weight_norm,
    'spectral_norm': spectral_norm,
    'parametrizations.weight_norm': parametrizations.weight_norm,
    'parametrizations.spectral_norm': parametrizations.spectral_norm,
}


@pytest.mark.filterwarnings('ignore:.*weight_norm.*:FutureWarning')
@pytest.mark.parametrize('how', REPARAMETRISED)
@pytest.mark.parametrize('site', ['conv1', 'layer2.0.conv2', 'layer2.0.downsample.0'])
def test_convolutions_with_weights_that_are_computed_are_left_unfolded(how: str, site: str) -> None:
    models: list[nn.Module] = []
    for _ in range(2):  # what old functions make cannot be copied
        models.append(build('se_resnet18'))
        REPARAMETRISED[how](models[-1].get_submodule(site))
    eager, frozen = (m.eval() for m in models)
    with pytest.warns(UserWarning, match='leaves 1 BatchNorms as they are.*(bn1|bn2|downsample.1)'):
        fuse(frozen, freeze=True, compile=False)
    with torch.no_grad():
        want = eager(images())
        torch.testing.assert_close(frozen(images()), want, rtol=0, atol=1e-10)


def test_a_convolution_that_is_used_twice_is_left_unfolded() -> None:
    eager = build('se_resnet18', layers=(2, 1, 1, 1))
    cast(Any, eager.get_submodule('layer1.1')).conv1 = eager.get_submodule('layer1.0.conv1')
    want = eager.eval()(images())
    with pytest.warns(UserWarning, match='leaves 2 BatchNorms'):
        frozen = fuse(eager, freeze=True, compile=False)
    torch.testing.assert_close(frozen(images()), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize('compile', [False, pytest.param(True, marks=pytest.mark.slow)], ids=['eager', 'compiled'])
def test_train_after_freezing_trains_the_folded_model(compile: bool, request: pytest.FixtureRequest) -> None:
    if compile:
        request.getfixturevalue('compiler')
    frozen = fuse(build('se_resnet18', drop_path_rate=0.9), freeze=True, compile=compile)
    plain = copy.deepcopy(frozen)
    for m in plain.modules():
        if isinstance(m, blocks.Fused):
            cast(Any, m).__class__ = BasicBlock
    x = images(n=8)
    with pytest.warns(UserWarning, match='frozen.*has no BatchNorms'):
        frozen.train()
    outputs = []
    for model in (frozen, plain.train()):
        torch.manual_seed(3)
        with torch.no_grad():
            outputs.append(model(x))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-10)
    torch.manual_seed(4)
    assert not torch.equal(frozen(x), outputs[0])
    results = []
    for model in (frozen, plain):
        torch.manual_seed(3)
        results.append(step(model, x))
    check_equal(results[0], results[1], 1e-10)


@pytest.mark.parametrize('strict', [True, False])
def test_checkpoint_of_the_model_before_freezing_is_refused_and_nothing_is_loaded(strict: bool) -> None:
    eager = build('cbam_resnet18')
    frozen = fuse(copy.deepcopy(eager), freeze=True, compile=False)
    twin = copy.deepcopy(frozen)
    before = copy.deepcopy(frozen.state_dict())
    for model in (frozen, twin):
        with pytest.raises(ValueError, match=r'The checkpoint has BatchNorms \(bn1 and others, 12 in all\).*before'):
            model.load_state_dict(eager.state_dict(), strict=strict)
    assert all(torch.equal(v, before[k]) for k, v in frozen.state_dict().items())
    with pytest.raises(ValueError, match=r'model\.bn1'):
        cast(Any, nn.ModuleDict({'model': frozen})).load_state_dict(
            {f'model.{k}': v for k, v in eager.state_dict().items()}, strict=strict
        )
    fuse(build('cbam_resnet18'), freeze=True, compile=False).load_state_dict(before)
