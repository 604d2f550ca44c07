"""Convolutions by one pixel, whose way on a CPU `fuse` chooses: torch's numbers and counts."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from timm_attn.fusion import fuse
from timm_attn.fusion.functions import convolve, convolve_backward, plain_conv

from .support import build

WAYS = {'product': (3, 56, 60), 'product, torch gradients': (3, 28, 30), 'oneDNN': (3, 14, 9), 'torch': (1, 14, 9)}


def case(way: str, bias: bool) -> tuple[nn.Conv2d, Tensor]:
    torch.manual_seed(0)
    n, h, w = WAYS[way]
    return nn.Conv2d(24, 40, 1, bias=bias), torch.randn(n, 24, h, w)


def called(function: Any) -> set[str]:
    """Names of the operations that a call comes down to."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('way', WAYS)
def test_outputs_and_gradients_are_those_of_float64(way: str, bias: bool) -> None:
    conv, x = case(way, bias)
    double = copy.deepcopy(conv).double()
    far = x.double().requires_grad_()
    want = double(far)
    g = torch.randn_like(want)
    want.backward(g)
    with torch.no_grad():
        out = convolve(x, conv, conv.weight, conv.bias)
        grads = convolve_backward(g.float(), x, conv, conv.weight, conv.bias, (True, True, True))
    wanted = (far.grad, double.weight.grad, None if double.bias is None else double.bias.grad)
    for ours, theirs in zip((out, *grads), (want.detach(), *wanted), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


@pytest.mark.filterwarnings('ignore:.*Profiler clears events:UserWarning')
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason='a BLAS that is not measured')
@pytest.mark.parametrize(
    ('way', 'forward', 'backward'),
    [
        ('product', 'aten::_slow_conv2d_forward', 'aten::_slow_conv2d_backward'),
        ('product, torch gradients', 'aten::_slow_conv2d_forward', 'aten::convolution_backward'),
        ('oneDNN', 'aten::mkldnn_convolution', 'aten::convolution_backward'),
    ],
)
def test_ways(way: str, forward: str, backward: str) -> None:
    conv, x = case(way, False)
    with torch.no_grad():
        y = convolve(x, conv, conv.weight, None)
        assert forward in called(lambda: convolve(x, conv, conv.weight, None))
        wanted = (True, True, False)
        assert backward in called(lambda: convolve_backward(y, x, conv, conv.weight, None, wanted))


@pytest.mark.parametrize('way', WAYS)
def test_gradients_by_autograd(way: str) -> None:
    conv, x = case(way, True)
    double = copy.deepcopy(conv).double()
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    plain_conv(conv, ours).square().sum().backward()
    double(theirs).square().sum().backward()
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)
    for p, q in zip(conv.parameters(), double.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and (p.grad - q.grad).norm() <= 1e-5 * q.grad.norm()


@pytest.mark.filterwarnings('ignore:TF32:UserWarning')
@pytest.mark.parametrize('change', ['stride', 'padding', 'groups', 'channels_last', 'bfloat16', 'no oneDNN'])
def test_other_convolutions_are_torchs(change: str) -> None:
    kwargs: dict[str, Any] = {'stride': {'stride': 2}, 'padding': {'padding': 1}, 'groups': {'groups': 8}}.get(
        change, {}
    )
    torch.manual_seed(0)
    conv, x = nn.Conv2d(24, 40, 1, **kwargs), torch.randn(3, 24, 56, 60)
    if change == 'channels_last':
        x = x.to(memory_format=torch.channels_last)
    if change == 'bfloat16':
        conv, x = conv.bfloat16(), x.bfloat16()
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=change != 'no oneDNN'):
        assert torch.equal(convolve(x, conv, conv.weight, conv.bias), conv(x))


def test_whoever_counts_operations_counts_those_of_the_unfused_model() -> None:
    eager = build('se_resnet50', torch.float32).eval()
    fused = fuse(copy.deepcopy(eager), compile=False)
    counts = []
    for model in (eager, fused):
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(2, 3, 128, 128)).sum().backward()
        counts.append(counter.get_flop_counts()['Global'])
    assert counts[0] == counts[1]
