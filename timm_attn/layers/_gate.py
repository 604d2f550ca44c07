"""What gates are made of and act by, with gradients that read the map as seldom as they can.

torch's own gradients fill a map for a mean, several for `amax`, one for a gate's product with its input before it is
summed, and take a convolution to one channel by a slow way: in training that is most of what attention costs. Those
here give the same numbers, image by image, so that what is read twice is still in the cache, and write to no map but
the one they return. Where anything but an ordinary backward pass may follow, the plain equation is taken.

A map that is pooled is handed on: `x, mean, peak = pooled(x, ...)`. The gradient of this x is finished in place, so x
may go into products and convolutions, whose gradients nobody else holds, but not into sums.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.grad import conv2d_weight

from ._precision import matmul_upcast, upcast

CHUNK = 2**18  # values of a map that are worked on at once, but at least one image's


_watchers_see_equations = True


@contextlib.contextmanager
def as_executed() -> Iterator[None]:
    """Shows those who watch each operation what is computed for others, and not the equation's operations."""
    global _watchers_see_equations
    before, _watchers_see_equations = _watchers_see_equations, False
    try:
        yield
    finally:
        _watchers_see_equations = before


def _watched() -> bool:
    """Somebody watches each operation, as those do who count them: what they count is the equation."""
    return _watchers_see_equations and torch._C._len_torch_dispatch_stack() > 0


def _executed(x: Tensor) -> bool:
    """Whether x is on a CPU and has data: no tracing, no compiling, no derivatives but backward's.

    A GPU has no use for what is here: many small kernels take longer there than another pass over the map.
    """
    return (
        x.device.type == 'cpu'
        and type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not _watched()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


# torch 2.5 has no name for it but that for compiling, too.
_exporting = getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)


def _differentiated(x: Tensor) -> bool:
    """Whether backward will come, and nothing else."""
    return torch.is_grad_enabled() and x.requires_grad and _executed(x)


def _in_place(*grads: Tensor) -> bool:
    """Whether gradients may be written to: they have none of their own, and are not batched."""
    return not torch.is_grad_enabled() and all(torch._C._has_storage(g) for g in grads)


def _chunks(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """The same images of all tensors, of which the first is a map."""
    n = tensors[0].shape[0]
    step = max(1, CHUNK * n // max(1, tensors[0].numel()))
    for i in range(0, n, step):
        yield [t[i : i + step] for t in tensors] if step < n else list(tensors)


class _Mean(torch.autograd.Function):
    """Its gradient is a view of the small tensor, which autograd adds in place to the map's other gradients."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        x, dim = given
        ctx.shape, ctx.count = x.shape, math.prod(x.shape[d] for d in dim)
        return x.mean(dim, keepdim=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return (grads[0] / ctx.count).expand(ctx.shape), None


class _Pooled(torch.autograd.Function):
    """As that of `amax`, the gradient of a maximum is shared evenly by all values that equal it."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, dim = given
        peak = x.amax(dim, keepdim=True)
        ctx.save_for_backward(x, peak)
        ctx.dim, ctx.count = dim, math.prod(x.shape[d] for d in dim)
        return x.view_as(x), x.mean(dim, keepdim=True), peak

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad, mean, peak), (x, top) = grads, ctx.saved_tensors
        mean = mean / ctx.count
        if not _in_place(grad, mean, peak):
            same = _equal(x, top)
            return grad + mean + same * (peak / same.sum(ctx.dim, keepdim=True)), None
        for g, values, most, m, p in _chunks(grad, x, top, mean, peak):
            same = _equal(values, most)
            g.addcmul_(same, p / same.sum(ctx.dim, keepdim=True)).add_(m)
        return grad, None


def _equal(x: Tensor, top: Tensor) -> Tensor:
    # 1 and 0 in the map's own type, in place: a comparison that puts out booleans is four times slower on CPU.
    return x.detach().clone().eq_(top.detach())


class _Gated(torch.autograd.Function):
    """x times the sum of gates, which it does not keep."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        x, *gates = given
        ctx.save_for_backward(*given)
        if len(gates) == 1:
            return x * gates[0]
        y = torch.empty_like(x)
        for out, values, *parts in _chunks(y, *given):
            _sum(out, parts).mul_(values)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        (grad,), (x, *gates) = grads, ctx.saved_tensors
        if not _in_place(grad):
            product = grad * x
            return grad * _total(gates), *(product.sum_to_size(gate.shape) for gate in gates)
        of_x, of_gates = torch.empty_like(x), [torch.empty_like(gate) for gate in gates]
        for out, g, values, *parts in _chunks(of_x, grad, x, *gates, *of_gates):
            torch.mul(g, values, out=out)
            for part in parts[len(gates) :]:
                part.copy_(out.sum_to_size(part.shape))
            if len(gates) == 1:
                torch.mul(g, parts[0], out=out)
            else:
                _sum(out, parts[: len(gates)]).mul_(g)
        return of_x, *of_gates


def _sum(out: Tensor, parts: list[Tensor]) -> Tensor:
    out.copy_(parts[0])
    for part in parts[1:]:
        out.add_(part)
    return out


class _Crossed(torch.autograd.Function):
    """x times a gate of rows times a gate of columns, whose product, a map, it does not keep."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        x, rows, columns = given
        ctx.save_for_backward(*given)
        y = torch.empty_like(x)
        for out, values, r, c in _chunks(y, x, rows, columns):
            torch.mul(r, c, out=out).mul_(values)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        (grad,), (x, rows, columns) = grads, ctx.saved_tensors
        if not _in_place(grad):
            product = grad * x
            of_gates = (product * columns).sum(3, keepdim=True), (product * rows).sum(2, keepdim=True)
            return grad * (rows * columns), *of_gates
        of_x, of_rows, of_columns = [torch.empty_like(t) for t in (x, rows, columns)]
        for out, g, values, r, c, of_r, of_c in _chunks(of_x, grad, x, rows, columns, of_rows, of_columns):
            product = g * values
            torch.sum(torch.mul(product, c, out=out), 3, keepdim=True, out=of_r)
            torch.sum(product.mul_(r), 2, keepdim=True, out=of_c)
            torch.mul(r, c, out=out).mul_(g)
        return of_x, of_rows, of_columns


class _Larger(torch.autograd.Function):
    """The larger of x times one gate and x times another. As that of `maximum`, ties share the gradient."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        x, a, b = given
        ctx.save_for_backward(*given)
        y = torch.empty_like(x)
        for out, values, one, other in _chunks(y, x, a, b):
            torch.maximum(torch.mul(values, one, out=out), values * other, out=out)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        (grad,), (x, a, b) = grads, ctx.saved_tensors
        if not _in_place(grad):
            of_a = grad * _share(x.detach() * a.detach(), x.detach() * b.detach())
            of_b = grad - of_a
            return of_a * a + of_b * b, (of_a * x).sum_to_size(a.shape), (of_b * x).sum_to_size(b.shape)
        results = [torch.empty_like(t) for t in (x, a, b)]
        for out, g, values, one, other, of_one, of_other in _chunks(results[0], grad, x, a, b, *results[1:]):
            rest = values * other
            share = _share(values * one, rest).mul_(g)
            torch.sub(g, share, out=rest)
            of_one.copy_(torch.mul(share, values, out=out).sum_to_size(of_one.shape))
            of_other.copy_(torch.mul(rest, values, out=out).sum_to_size(of_other.shape))
            torch.mul(share, one, out=out).addcmul_(rest, other)
        return tuple(results)


def _share(x: Tensor, other: Tensor) -> Tensor:
    """1 where x is larger, 0.5 where they are equal (or both infinite), 0 elsewhere; x is overwritten."""
    return x.sub_(other).sign_().add_(1).mul_(0.5)  # the sign of NaN is 0


class _Joint(torch.autograd.Function):
    """x times 1 + sigmoid of the product or sum of a gate of channels and one of pixels, a map it does not keep."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        x, channels, pixels, ctx.add, ctx.gain = given
        ctx.save_for_backward(x, channels, pixels)
        y = torch.empty_like(x)
        join = torch.add if ctx.add else torch.mul
        for out, values, c, p in _chunks(y, x, channels, pixels):
            join(c, p, out=out).sigmoid_().add_(1).mul_(ctx.gain).mul_(values)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, channels, pixels) = grads, ctx.saved_tensors
        join = torch.add if ctx.add else torch.mul
        if not _in_place(grad):
            s = join(channels, pixels).sigmoid()
            slope = grad * x * s * (1 - s) * ctx.gain
            parts = (slope, slope) if ctx.add else (slope * pixels, slope * channels)
            of_gates = parts[0].sum((2, 3), keepdim=True), parts[1].sum(1, keepdim=True)
            return grad * ((1 + s) * ctx.gain), *of_gates, None, None
        results = [torch.empty_like(t) for t in (x, channels, pixels)]
        for out, g, values, c, p, of_c, of_p in _chunks(results[0], grad, x, channels, pixels, *results[1:]):
            s = join(c, p).sigmoid_()
            slope = torch.ops.aten.sigmoid_backward(torch.mul(g, values, out=out).mul_(ctx.gain), s)
            torch.sum(slope if ctx.add else torch.mul(slope, p, out=out), (2, 3), keepdim=True, out=of_c)
            torch.sum(slope if ctx.add else slope.mul_(c), 1, keepdim=True, out=of_p)
            torch.mul(s.add_(1).mul_(ctx.gain), g, out=out)
        return *results, None, None


class _Conv(torch.autograd.Function):
    """A convolution whose gradient is the convolution with the mirrored kernel, where torch's own is far slower."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        x, weight = given
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[2] // 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        padding = weight.shape[2] // 2
        of_x = F.conv2d(grad, weight.flip(2, 3).transpose(0, 1), padding=padding)
        return of_x, conv2d_weight(x, weight.shape, grad, padding=padding)


class _Attended(torch.autograd.Function):
    """Attention that keeps no matrix, by the operation of torch that `scaled_dot_product_attention` takes on a CPU."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        *inputs, ctx.scale = given
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        y, total = attend(*map(_dense, inputs), scale=ctx.scale)
        ctx.save_for_backward(*inputs, y, total)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (q, k, v, y, total) = grads, ctx.saved_tensors
        if _in_place(grad):
            backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
            return *backward(*map(_dense, (grad, q, k, v)), y, total, 0.0, False, scale=ctx.scale), None
        matrix = attention_matrix(q, k, ctx.scale)
        of_matrix = grad @ v.mT
        of_energy = matrix * (of_matrix - (of_matrix * matrix).sum(3, keepdim=True)) * ctx.scale
        return of_energy @ k, of_energy.mT @ q, matrix.mT @ grad, None


def _dense(x: Tensor) -> Tensor:
    """x with a stride of 1 at the end, also where the last dimension is of size 1 and any stride would do."""
    return x.flatten().view(x.shape)


def attention_matrix(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """softmax(q kᵀ scale) in float32 (float64 stays): (N, heads, L, L).

    Args:
        q: (N, heads, L, d).
        k: (N, heads, L, d).
        scale: Of the energies.
    """
    return (matmul_upcast(q, k.transpose(2, 3)) * scale).softmax(3)


class _WindowMeans(torch.autograd.Function):
    """`avg_pool2d`, of whose input the gradient takes the shape only."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        x, ctx.window = given
        ctx.shape = x.shape
        return F.avg_pool2d(x, ctx.window, ceil_mode=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), window = grads, [ctx.window, ctx.window]
        like = torch.empty((), dtype=grad.dtype, device=grad.device).expand(ctx.shape)
        return torch.ops.aten.avg_pool2d_backward(grad, like, window, window, [0, 0], True, True, None), None


class _Turned(torch.autograd.Function):
    """A map with its channels last, or with its channels first again."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        x, ctx.last = given
        rows = x.flatten(2) if ctx.last else x.flatten(1, 2)  # (N, C, H W) or (N, H W, C)
        y = rows.new_empty(rows.mT.shape)
        # Matrix by matrix: torch copies one by blocks, and several number by number.
        for out, values in zip(y, rows, strict=True):
            out.copy_(values.mT)
        return y.unflatten(1, x.shape[2:]) if ctx.last else y.unflatten(2, x.shape[1:3])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _turned(grads[0], not ctx.last), None


# Leaf functions, as those of `_precision`.
@torch.fx.wrap
def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = upcast(q), upcast(k), upcast(v)
    if not torch.jit.is_scripting():
        if _executed(q) and q.numel() > 0:
            return _Attended.apply(q, k, v, scale)
    return matmul_upcast(attention_matrix(q, k, scale), v)


@torch.fx.wrap
def _weighted_sum(x: Tensor, weight: Tensor) -> Tensor:
    if not torch.jit.is_scripting():
        if _executed(x):
            return matmul_upcast(weight.flatten(2).unsqueeze(2), x.flatten(3)).squeeze(2).unflatten(2, x.shape[3:])
    return (x * weight).sum(2)


@torch.fx.wrap
def _window_means(x: Tensor, window: int) -> Tensor:
    if not torch.jit.is_scripting():
        if _differentiated(x):
            return _WindowMeans.apply(x, window)
    return F.avg_pool2d(x, window, ceil_mode=True)


@torch.fx.wrap
def _turned(x: Tensor, last: bool) -> Tensor:
    turned = x.permute(0, 2, 3, 1) if last else x.permute(0, 3, 1, 2)
    if torch.jit.is_scripting():
        return turned
    if x.device.type != 'cpu' or not x.is_contiguous():
        return turned
    # Not for many gradients at once. In memory as here in any case: the layout decides how a convolution rounds.
    return _Turned.apply(x, last) if _executed(x) and torch._C._has_storage(x) else turned.contiguous()


@torch.fx.wrap
def _mean(x: Tensor, dim: list[int], keepdim: bool) -> Tensor:
    if not torch.jit.is_scripting():
        if _differentiated(x):
            y = _Mean.apply(x, dim)
            return y if keepdim else y.squeeze(dim)
    return x.mean(dim, keepdim)


@torch.fx.wrap
def _pooled(x: Tensor, dim: list[int], keepdim: bool) -> tuple[Tensor, Tensor, Tensor]:
    if not torch.jit.is_scripting():
        if _differentiated(x):
            x, mean, peak = _Pooled.apply(x, dim)
            return (x, mean, peak) if keepdim else (x, mean.squeeze(dim), peak.squeeze(dim))
    return x, x.mean(dim, keepdim), x.amax(dim, keepdim)


def _fit(x: Tensor, gates: list[Tensor]) -> bool:
    """Whether backward will come for all of them, or none, for gates of x's kind."""
    if not _executed(x):  # asked first: a tracer's sizes are tensors
        return False
    alike = all(g.dtype == x.dtype and g.dim() == x.dim() and g.shape[0] == x.shape[0] for g in gates)
    return alike and (not torch.is_grad_enabled() or all(t.requires_grad for t in (x, *gates)))


@torch.fx.wrap
def _gated(x: Tensor, gates: list[Tensor], gain: float) -> Tensor:
    # A gain that is not 1 is a tensor, whose value nobody asks for; TorchScript makes a number of it.
    if isinstance(gain, Tensor) or gain != 1.0:
        gates = [gate * gain for gate in gates]
    if not torch.jit.is_scripting():
        if _fit(x, gates):
            return _Gated.apply(x, *gates)
    return x * _total(gates)


@torch.fx.wrap
def _crossed(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    if not torch.jit.is_scripting():
        if _fit(x, [rows, columns]):
            return _Crossed.apply(x, rows, columns)
    return x * (rows * columns)


@torch.fx.wrap
def _jointly_gated(x: Tensor, channels: Tensor, pixels: Tensor, add: bool, gain: float) -> Tensor:
    if not torch.jit.is_scripting():
        if _fit(x, [channels, pixels]):
            return _Joint.apply(x, channels, pixels, add, gain)
    return x * ((1 + (channels + pixels if add else channels * pixels).sigmoid_()) * gain)


@torch.fx.wrap
def _larger(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    if not torch.jit.is_scripting():
        if _fit(x, [a, b]):
            return _Larger.apply(x, a, b)
    return torch.maximum(x * a, x * b)


def _total(gates: list[Tensor]) -> Tensor:
    total = gates[0]
    for gate in gates[1:]:
        total = total + gate
    return total


@torch.fx.wrap
def _mirrored(x: Tensor, weight: Tensor) -> Tensor:
    padding = [weight.shape[2] // 2, weight.shape[3] // 2]
    if torch.jit.is_scripting():
        return F.conv2d(x, weight, padding=padding)
    if not (_differentiated(x) and weight.requires_grad) or x.is_meta:  # autocast knows no meta device
        return F.conv2d(x, weight, padding=padding)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        return _Conv.apply(x.to(dtype), weight.to(dtype))
    return _Conv.apply(x, weight)


@torch.fx.wrap
def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.jit.is_scripting():
        return F.conv2d(x, weight, bias)
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.device.type != 'cpu' or x.shape[2:] != (1, 1):
        return F.conv2d(x, weight, bias)
    return F.linear(x.flatten(1), weight.flatten(1), bias)[:, :, None, None]


@torch.fx.wrap
def _with_rows(x: Tensor, weight: Tensor) -> Tensor:
    if torch.jit.is_scripting():
        return x
    if x.device.type != 'cpu' or _exporting() or torch.jit.is_tracing():
        return x
    autocast = torch.is_autocast_enabled('cpu') and x.dtype != torch.float64
    half = torch.get_autocast_dtype('cpu') if autocast else x.dtype
    least = weight.shape[2] // 2
    if half != torch.bfloat16 or not (torch.is_grad_enabled() and weight.requires_grad) or x.shape[2] >= least:
        return x
    return F.pad(x, (0, 0, 0, least - x.shape[2]))


@torch.fx.wrap
def _first_rows(x: Tensor, rows: int) -> Tensor:
    if torch.jit.is_scripting():
        return x
    if _exporting() or torch.jit.is_tracing() or x.shape[2] == rows:
        return x
    return x[:, :, :rows]


@torch.fx.wrap
def _by_channel(x: Tensor, weight: Tensor) -> Tensor:
    if torch.jit.is_scripting():
        return F.conv2d(x, weight, groups=weight.shape[0])
    elsewhere = torch.compiler.is_compiling() or torch.jit.is_tracing() or x.device.type != 'cpu' or _watched()
    fits = x.dim() == 4 and x.shape[1] == weight.shape[0]  # a product would broadcast one channel
    if elsewhere or not fits or x.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled('cpu'):
        return F.conv2d(x, weight, groups=weight.shape[0])
    # With one thread, torch convolves channel by channel.
    return x * weight.flatten(1)[:, :, None]


def mean(x: Tensor, dim: list[int], keepdim: bool = False) -> Tensor:
    """`x.mean(dim, keepdim)`.

    Args:
        x: Any map.
        dim: Dimensions, none negative.
        keepdim: Keeps them, with size 1.
    """
    return _mean(x, dim, keepdim)


def pooled(x: Tensor, dim: list[int], keepdim: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """A map to go on with, its mean and its maximum.

    Args:
        x: Any map.
        dim: Dimensions, none negative.
        keepdim: Keeps them, with size 1.

    Returns:
        x, for products and convolutions only; `x.mean(dim, keepdim)`; `x.amax(dim, keepdim)`.
    """
    return _pooled(x, dim, keepdim)


def gated(x: Tensor, gates: list[Tensor], gain: float = 1.0) -> Tensor:
    """`x * gate`, or x times a sum of gates.

    Args:
        x: Any map.
        gates: One or more, of as many dimensions, some of them 1.
        gain: What each gate is multiplied by.
    """
    return _gated(x, gates, gain)


def crossed(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`x * (rows * columns)`.

    Args:
        x: (N, C, H, W).
        rows: (N, C, H, 1).
        columns: (N, C, 1, W).
    """
    return _crossed(x, rows, columns)


def jointly_gated(x: Tensor, channels: Tensor, pixels: Tensor, add: bool, gain: float) -> Tensor:
    """`x * ((1 + s(m)) * gain)` with m = channels * pixels, or their sum.

    Args:
        x: (N, C, H, W).
        channels: (N, C, 1, 1).
        pixels: (N, 1, H, W).
        add: Take the sum.
        gain: What the gate is multiplied by.
    """
    return _jointly_gated(x, channels, pixels, add, gain)


def larger(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`torch.maximum(x * a, x * b)`.

    Args:
        x: Any map.
        a: A gate, of as many dimensions, some of them 1.
        b: Another.
    """
    return _larger(x, a, b)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q kᵀ scale) v in float32 (float64 stays), whose matrix is not kept.

    Args:
        q: (N, heads, L, d).
        k: (N, heads, L, d).
        v: (N, heads, L, d).
        scale: Of the energies.
    """
    return _attend(q, k, v, scale)


def weighted_sum(x: Tensor, weight: Tensor) -> Tensor:
    """`(x * weight).sum(2)`, by a product of matrices where that is faster.

    Args:
        x: (N, g, c, H, W).
        weight: (N, g, c, 1, 1).
    """
    return _weighted_sum(x, weight)


def window_means(x: Tensor, window: int) -> Tensor:
    """`F.avg_pool2d(x, window, ceil_mode=True)`.

    Args:
        x: (N, C, H, W).
        window: Side of the windows.
    """
    return _window_means(x, window)


def channels_to_end(x: Tensor) -> Tensor:
    """`x.permute(0, 2, 3, 1)`, for layers that act on the last dimension.

    Args:
        x: (N, C, H, W).
    """
    return _turned(x, True)


def channels_to_front(x: Tensor) -> Tensor:
    """`x.permute(0, 3, 1, 2)`.

    Args:
        x: (N, H, W, C).
    """
    return _turned(x, False)


def with_rows(x: Tensor, weight: Tensor) -> Tensor:
    """A map for a convolution that keeps its size, with rows of zeros below where torch would take a wrong gradient.

    In bfloat16 on a CPU, oneDNN leaves parts of the weight's gradient uninitialised where the map has fewer rows than
    half the kernel: they hold whatever was in memory, up to 1e38. Zeros are what the convolution sees there anyway;
    `first_rows` takes off what it gives for them.

    Args:
        x: (N, C, H, W).
        weight: The convolution's weight; its padding is half its kernel.
    """
    return _with_rows(x, weight)


def first_rows(x: Tensor, rows: int) -> Tensor:
    """`x[:, :, :rows]`.

    Args:
        x: (N, C, H, W).
        rows: How many of its rows.
    """
    return _first_rows(x, rows)


class GateConv(nn.Conv2d):
    """nn.Conv2d, made for gates: of one pixel, of each channel by a number, or of a mean and a maximum to one plane."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._conv_forward(input, self.weight, self.bias)
        else:
            # Asked at each call: whoever holds the module may have changed it.
            k = self.kernel_size[0]
            same_size = k % 2 == 1 and self.kernel_size == (k, k) and self.padding == (k // 2, k // 2)
            if same_size and (self.stride, self.dilation, self.padding_mode) == ((1, 1), (1, 1), 'zeros'):
                if self.groups == 1 and k == 1:
                    return _pointwise(input, self.weight, self.bias)
                if self.groups == 1 and self.bias is None:
                    return _mirrored(input, self.weight)
                if self.groups == self.in_channels == self.out_channels and k == 1 and self.bias is None:
                    return _by_channel(input, self.weight)
            return self._conv_forward(input, self.weight, self.bias)
