"""The gradients of poolings, gates and their convolution are those that torch derives from the plain equations."""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from timm_attn import create_attn
from timm_attn.layers import GateConv, _gate
from timm_attn.layers._gate import (
    attend,
    channels_to_end,
    channels_to_front,
    crossed,
    gated,
    jointly_gated,
    larger,
    mean,
    pooled,
    weighted_sum,
    window_means,
)

SHAPE = (5, 4, 3, 6)
DIMS = [[2, 3], [1], [2], [3]]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def example(dtype: torch.dtype = torch.float64, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """A map in which each maximum is reached about twice."""
    x = torch.randint(-2, 3, SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x.contiguous(memory_format=layout).requires_grad_()


def numbers(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def squares(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.square().sum() for t in tensors]).sum()


Call = Callable[[Tensor, Tensor], Tensor]


def pooled_and_gated(dim: list[int]) -> tuple[Call, Call]:
    def ours(x: Tensor, a: Tensor) -> Tensor:
        centre = mean(x, dim, keepdim=True)
        x, low, high = pooled(x, dim, keepdim=True)
        return gated(x, [a * low + high * high, centre + 0.5, a * a])

    def plain(x: Tensor, a: Tensor) -> Tensor:
        low, high = x.mean(dim, keepdim=True), x.amax(dim, keepdim=True)
        return x * (a * low + high * high + low + 0.5 + a * a)

    return ours, plain


def by_two(ours: Callable[..., Tensor], plain: Callable[..., Tensor], *dims: list[int]) -> tuple[Call, Call]:
    """A function of a map and of two gates, as one of the map and what a gate follows from."""

    def of(function: Callable[..., Tensor]) -> Call:
        first, second = dims
        return lambda x, a: function(x, a * x.mean(first, keepdim=True), x.mean(second, keepdim=True) + 0.5)

    return of(ours), of(plain)


def joint(add: bool) -> tuple[Call, Call]:
    def plain(x: Tensor, c: Tensor, p: Tensor) -> Tensor:
        return x * (1.7 + 1.7 / (1 + (-(c + p if add else c * p)).exp()))

    return by_two(lambda x, c, p: jointly_gated(x, c, p, add, 1.7), plain, [2, 3], [1])


def attention(x: Tensor, a: Tensor, ours: bool) -> Tensor:
    q, k, v = x, x * a, x + a
    return attend(q, k, v, 0.3) if ours else ((q @ k.mT) * 0.3).softmax(3) @ v


def windows(pool: Callable[..., Tensor]) -> Call:
    return lambda x, a: (pool(x * a) * a).square()


def weighted(total: Callable[..., Tensor]) -> Call:
    def call(x: Tensor, a: Tensor) -> Tensor:
        v = x.unflatten(1, (2, 2))
        return total(v, a.unsqueeze(1) * v.mean((3, 4), keepdim=True)).square()

    return call


# What is here, and its equation.
PAIRS = {
    **{f'pooled along {dim}': pooled_and_gated(dim) for dim in DIMS},
    'crossed': by_two(crossed, lambda x, r, c: x * r * c, [3], [2]),
    'larger of channels and pixels': by_two(larger, lambda x, a, b: torch.maximum(x * a, x * b), [2, 3], [1]),
    'joint product': joint(False),
    'joint sum': joint(True),
    'attend': (lambda x, a: attention(x, a, True), lambda x, a: attention(x, a, False)),
    'turned': (lambda x, a: channels_to_front(channels_to_end(x).square() * a), lambda x, a: x.square() * a),
    'windows': (windows(lambda x: window_means(x, 2)), windows(lambda x: F.avg_pool2d(x, 2, ceil_mode=True))),
    'weighted sum': (weighted(weighted_sum), weighted(lambda x, w: (x * w).sum(2))),
}
each_pair = pytest.mark.parametrize('pair', PAIRS.values(), ids=PAIRS)


@pytest.fixture(params=[1, 2 * math.prod(SHAPE[1:]), 2**18], ids=['an image', 'two images', 'all'])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gate, 'CHUNK', request.param)


@pytest.mark.parametrize('layout', LAYOUTS, ids=str)
@each_pair
def test_first_and_second_derivatives_are_those_of_the_equation(
    chunk: None, pair: tuple[Call, Call], layout: torch.memory_format
) -> None:
    x, a = example(layout=layout), numbers(5, 1, 1, 1)
    weight = numbers(*pair[0](x, a).shape, seed=2)
    found: list[list[Tensor]] = []
    for call in pair:
        y = call(x, a)
        first = torch.autograd.grad(y, (x, a), weight, retain_graph=True)
        again = torch.autograd.grad(y, (x, a), weight, create_graph=True)
        second = torch.autograd.grad(squares(again), (x, a, weight))
        found.append([y, *first, *again, *second])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    if pair not in [PAIRS[name] for name in ('attend', 'turned', 'windows', 'weighted sum')]:
        assert found[0][0].is_contiguous(memory_format=layout) and found[0][1].is_contiguous(memory_format=layout)


@each_pair
def test_derivatives_equal_finite_differences(pair: tuple[Call, Call]) -> None:
    x, a = numbers(*SHAPE), numbers(5, 1, 1, 1, seed=2)
    assert gradcheck(pair[0], (x, a), fast_mode=True)
    assert gradgradcheck(pair[0], (x, a), fast_mode=True)


@pytest.mark.parametrize(('name', 'args'), [('se', {}), ('cbam', {'kernel_size': 3}), ('triplet', {'kernel_size': 3})])
def test_attentions_have_second_derivatives(name: str, args: dict[str, Any]) -> None:
    torch.manual_seed(0)
    attn = create_attn(name, 16, dtype=torch.float64, **args).eval()
    for p in attn.parameters():
        torch.nn.init.normal_(p, std=0.5)
    names, values = zip(*attn.named_parameters(), strict=True)

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(attn, dict(zip(names, values, strict=True)), (x,))

    assert gradgradcheck(call, (numbers(1, 16, 3, 2), *values), fast_mode=True)


@each_pair
def test_batched_gradients_transforms_and_forward_mode(pair: tuple[Call, Call]) -> None:
    x, a = example(), numbers(5, 1, 1, 1)
    t, u = numbers(*SHAPE, seed=3).detach(), numbers(5, 1, 1, 1, seed=4).detach()
    batch = torch.stack([numbers(*pair[0](x, a).shape, seed=5).detach() * s for s in (1, -2, 0.5)])

    def tangent(call: Callable[..., Tensor]) -> Tensor:
        with forward_ad.dual_level():
            y = call(forward_ad.make_dual(x, t), forward_ad.make_dual(a, u))
            return cast(Tensor, forward_ad.unpack_dual(y).tangent)

    def all_ways(call: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        y = call(x, a)

        def back(g: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(y, (x, a), g, retain_graph=True)

        return [
            *torch.autograd.grad(y, (x, a), batch, retain_graph=True, is_grads_batched=True),
            *torch.vmap(back)(batch),
            *torch.func.grad(lambda x, a: call(x, a).square().sum(), (0, 1))(x, a),
            torch.vmap(call, (0, None))(torch.stack([x, x + t]), a),
            torch.func.jvp(call, (x, a), (t, u))[1],
            tangent(call),
        ]

    for got, want in zip(*map(all_ways, pair), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_gradient_of_a_maximum_is_shared_by_its_ties() -> None:
    x = torch.tensor([[[[1.0, 3.0], [3.0, 2.0]]]], requires_grad=True)
    pooled(x, [2, 3])[2].sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[[[0.0, 0.5], [0.5, 0.0]]]]
    y = torch.full((1, 1, 2, 2), math.inf, requires_grad=True)
    pooled(y, [2, 3])[2].sum().backward()
    assert y.grad is not None and y.grad.tolist() == [[[[0.25, 0.25], [0.25, 0.25]]]]


def test_larger_of_two_infinities_has_the_gradient_of_torchs_maximum() -> None:
    x = torch.tensor([math.inf, -math.inf, 2.0, -3.0]).reshape(1, 1, 2, 2).requires_grad_()
    a, b = torch.full((1, 1, 1, 1), 0.25, requires_grad=True), torch.full((1, 1, 2, 2), 0.5, requires_grad=True)
    found = [torch.autograd.grad(y.sum(), x)[0] for y in (larger(x, a, b), torch.maximum(x * a, x * b))]
    assert torch.equal(*found) and found[0].flatten().tolist() == [0.375, 0.375, 0.5, 0.25]


@pytest.mark.parametrize('name', ['se', 'cbam', 'triplet', 'bam', 'scse', 'coord', 'scsa', 'gam'])
def test_nan_comes_out_of_both_passes(name: str) -> None:
    attn = create_attn(name, 16).eval()
    x = numbers(2, 16, 4, 5, dtype=torch.float32).detach()
    x[1, 3, 2, 2] = math.nan
    x.requires_grad_()
    y = attn(x)
    y.sum().backward()
    assert x.grad is not None
    for t in (y, x.grad):
        assert t[1].isnan().any() and t[0].isfinite().all()


@pytest.mark.parametrize('size', [(9, 5), (5, 9), (2, 3), (1, 1)], ids=str)
@pytest.mark.parametrize(('args', 'groups'), [((2, 1, 3), 1), ((2, 1, 7), 1), ((4, 4, 1), 4)], ids=str)
def test_convolution_has_torchs_derivatives(args: tuple[int, int, int], groups: int, size: tuple[int, int]) -> None:
    planes, planes_out, kernel_size = args
    padding = kernel_size // 2
    conv = GateConv(*args, padding=padding, groups=groups, bias=False, dtype=torch.float64)
    x, g = numbers(3, planes, *size), numbers(3, planes_out, *size, seed=2)
    found: list[list[Tensor]] = []
    for call in (conv, lambda x: F.conv2d(x, conv.weight, padding=padding, groups=groups)):
        first = torch.autograd.grad(call(x), (x, conv.weight), g)
        again = torch.autograd.grad(call(x), (x, conv.weight), g, create_graph=True)
        second = torch.autograd.grad(squares(again), (x, conv.weight, g))
        found.append([*first, *again, *second])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


CONVS = [
    ((2, 1, 3), {'padding': 1, 'bias': False}, (5, 4)),
    ((2, 3, 3), {'padding': 1}, (5, 4)),
    ((2, 1, 3), {'padding': 2, 'dilation': 2, 'bias': False}, (5, 4)),
    ((2, 3, 1), {}, (1, 1)),
    ((2, 3, 1), {}, (5, 4)),
    ((2, 2, 1), {'groups': 2, 'bias': False}, (5, 4)),
    ((2, 2, 1), {'groups': 2}, (5, 4)),
]


@pytest.mark.parametrize('kwargs', [{'bias': False}, {'groups': 4, 'bias': False}, {'groups': 4}], ids=str)
@pytest.mark.parametrize('channels', [1, 2, 8])
def test_other_channels_are_refused_as_by_torch(channels: int, kwargs: dict[str, Any]) -> None:
    for size in ((5, 4), (1, 1)):
        with pytest.raises(RuntimeError):
            GateConv(4, 4, 1, **kwargs)(torch.randn(2, channels, *size))


@pytest.mark.parametrize(('args', 'kwargs', 'size'), CONVS, ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_convolution_is_torchs_in_autocast(
    dtype: torch.dtype, args: tuple[int, int, int], kwargs: dict[str, Any], size: tuple[int, int]
) -> None:
    conv, other = (c(*args, **kwargs).to(dtype) for c in (GateConv, torch.nn.Conv2d))
    other.load_state_dict(conv.state_dict())
    x = numbers(3, 2, *size, dtype=dtype)
    found: list[Any] = []
    for m in (conv, other):
        with torch.autocast('cpu', torch.bfloat16):
            y = m(x)
        found.append([y, *torch.autograd.grad(y.float().square().sum(), (x, *m.parameters()))])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)  # the type too


@pytest.mark.parametrize(('rows', 'compiled'), [(1, False), (2, False), (1, True)])
def test_bfloat16_gradients_of_few_rows_hold_nothing_that_was_left_in_memory(rows: int, compiled: bool) -> None:
    """oneDNN leaves parts of the gradient of a 7x7 kernel for 128 channels uninitialised for maps of 1 or 2 rows."""
    if compiled and not hasattr(torch.compiler, 'is_exporting'):
        pytest.skip('torch 2.5 cannot tell compiling from exporting: compiled there, its own gradient is taken')
    torch.manual_seed(0)
    attn = create_attn('gam', 128, channel=False).eval()
    torch.nn.init.uniform_(attn.get_parameter('bn2.weight'), 0.5, 1)
    x = torch.randn(2, 128, rows, 3)

    def grads(module: Callable[[Tensor], Tensor], x: Tensor, autocast: bool) -> list[Tensor]:
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            y = module(x)
        return [y, *torch.autograd.grad(y.double().square().sum(), list(attn.parameters()))]

    attn.double()
    want = grads(attn, x.double(), False)
    attn.float()
    left = [torch.full((128 * 8 * 49 * n,), 1e30) for n in (1, 2, 1, 2)]
    del left
    if compiled:
        torch._dynamo.reset()
    got = grads(torch.compile(attn, backend='aot_eager') if compiled else attn, x, True)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape and (g - w).abs().max() < 0.05 * w.abs().max()
    # What no value of the map ever meets has no gradient.
    assert not got[1][:, :, : 4 - rows].any() and not got[1][:, :, 3 + rows :].any()


@pytest.mark.parametrize('name', ['triplet', 'coord', 'scse', 'bam'])
def test_training_keeps_the_map_once_and_not_its_gates(name: str) -> None:
    """Of a map that a network keeps anyway, these keep nothing of its size beside."""
    x = numbers(4, 64, 16, 16, dtype=torch.float32)
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.numel() == x.numel():
            sizes[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = create_attn(name, 64)(x)
    assert list(sizes) == [x.data_ptr()]
    y.sum().backward()


def test_tensors_that_are_looked_at_are_not_written_to() -> None:
    x = numbers(4, 16, 6, 6)
    attn = create_attn('cbam', 16, dtype=torch.float64)
    seen: list[tuple[Tensor, Tensor]] = []

    def look(g: Tensor) -> None:
        seen.append((g, g.clone()))

    leaf = x * 1
    leaf.register_hook(look)
    y = attn(leaf)
    y.register_hook(look)
    g = numbers(*y.shape, seed=3).detach()
    copy = g.clone()
    for _ in range(2):
        y.backward(g, retain_graph=True)
    assert torch.equal(g, copy) and len(seen) == 4
    assert all(torch.equal(a, b) for a, b in seen)
    assert torch.equal(seen[1][0], seen[3][0])


def test_elsewhere_than_on_a_cpu_the_operations_are_torchs_own() -> None:
    """On an H200 the gradients that go image by image took two to four times those of torch."""

    def functions(device: str) -> set[str]:
        x = torch.zeros(SHAPE, device=device, requires_grad=True)
        module = create_attn('cbam', SHAPE[1], rd_ratio=1 / 2, device=device)
        y = module(x)
        found, nodes = set(), [y.grad_fn]
        while nodes:
            if (node := nodes.pop()) is not None:
                found.add(type(node).__name__)
                nodes += [n for n, _ in node.next_functions]
        return {name for name in found if name.startswith('_')}

    assert functions('cpu') >= {'_GatedBackward', '_PooledBackward'}
    assert functions('meta') == set()
