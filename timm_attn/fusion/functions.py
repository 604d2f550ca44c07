"""Differentiable pieces of a block, each keeping a convolution's output and otherwise only what is small.

A piece that reads a map y hands it on, and the next piece takes it from there. So the gradients of y meet in a chain,
where each backward adds its own in place, and no two of them are ever in memory.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv1d, pad

from . import kernels

_aten = torch.ops.aten


# ---- BatchNorm: a factor and a summand -------------------------------------------------------------------------------


def factors(
    compiled: bool,
    bn: nn.BatchNorm2d,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    names: tuple[str, ...] = (),
) -> tuple[Tensor, ...]:
    """What `kernels.norm` gives for y; in training the batch's statistics, which move the running ones."""
    known = (None, None) if bn.training else (bn.running_mean, bn.running_var)
    found = kernels.norm(compiled, y, weight, bias, *known, bn.eps, names)
    if bn.training:
        _track(bn, y, *found[2:4])
    return found


def _track(bn: nn.BatchNorm2d, y: Tensor, center: Tensor, spread: Tensor) -> None:
    """Moves the running statistics as a BatchNorm does for y of these moments."""
    n, momentum = y.numel() // y.shape[1], cast(float, bn.momentum)
    if n < 2:
        bn(y)  # raises: one value has no variance
    cast(Tensor, bn.num_batches_tracked).add_(1)
    mean, var = cast(Tensor, bn.running_mean), cast(Tensor, bn.running_var)
    mean.lerp_(center.flatten().to(mean.dtype), momentum)
    var.lerp_((spread.flatten() * (n / (n - 1))).to(var.dtype), momentum)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        compiled: bool,
        bn: nn.BatchNorm2d,
        names: tuple[str, ...],
        y: Tensor,
        weight: Tensor,
        bias: Tensor,
    ) -> tuple[Tensor, ...]:
        a, b, center, spread, mean, var, pick, *found = factors(compiled, bn, y, weight, bias, names)
        # What backward does not need is not kept.
        mean, var = (mean if names else None), (var if 'var' in names else None)
        ctx.save_for_backward(y, weight, a, center, spread, mean, var, pick)
        ctx.compiled, ctx.names, ctx.training, ctx.eps = compiled, names, bn.training, bn.eps
        ctx.set_materialize_grads(False)
        return y, a, b, *found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, ga: Tensor, gb: Tensor, *gfound: Tensor | None) -> tuple[Any, ...]:
        y, weight, a, center, spread, mean, var, pick = ctx.saved_tensors
        by_name = dict(zip(ctx.names, gfound, strict=True))
        grads = kernels.norm_backward(
            ctx.compiled,
            g,
            y,
            weight,
            ctx.eps,
            ctx.training,
            a,
            center,
            spread,
            mean,
            var,
            pick,
            ga,
            gb,
            by_name.get('mean'),
            by_name.get('var'),
            by_name.get('peak'),
        )
        return None, None, None, *grads


def norm(compiled: bool, bn: nn.BatchNorm2d, y: Tensor, names: tuple[str, ...] = ()) -> tuple[Tensor, ...]:
    """BN(y) as y * a + b, with y to go on with.

    Args:
        compiled: Call kernels compiled.
        bn: The BatchNorm; its running statistics move.
        y: (N, C, H, W)
        names: Statistics of BN(y)'s planes, as in `kernels.norm`.

    Returns:
        y, a and b (1, C, 1, 1), and the statistics (N, C).
    """
    return cast(tuple[Tensor, ...], _Norm.apply(compiled, bn, names, y, bn.weight, bn.bias))


# ---- Convolutions behind something that is recomputed ----------------------------------------------------------------


def conv_params(y: Tensor, *convs: nn.Conv2d) -> list[Tensor | None]:
    """Weight and bias of each convolution, in the precision in which autocast would convolve y."""
    dtype = y.dtype if torch.is_autocast_enabled(y.device.type) else None
    params = [p for conv in convs for p in (conv.weight, conv.bias)]
    return [p if p is None or dtype is None else p.to(dtype) for p in params]


def convolve(x: Tensor, conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> Tensor:
    padding = cast(tuple[int, ...], conv.padding)
    return torch.convolution(x, weight, bias, conv.stride, padding, conv.dilation, False, (0, 0), conv.groups)


def convolve_backward(
    g: Tensor,
    x: Tensor,
    conv: nn.Conv2d,
    weight: Tensor,
    bias: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, each where it is wanted."""
    sizes = None if bias is None else [bias.shape[0]]
    return _aten.convolution_backward(
        g,
        x,
        weight,
        sizes,
        conv.stride,
        conv.padding,
        conv.dilation,
        False,
        [0, 0],
        conv.groups,
        [wanted[0], wanted[1], wanted[2] and bias is not None],
    )


class _NormActConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        compiled: bool,
        in_place: bool,
        bn: nn.BatchNorm2d,
        convs: tuple[nn.Conv2d, ...],
        y: Tensor,
        weight: Tensor,
        bias: Tensor,
        *params: Tensor | None,
    ) -> tuple[Tensor, ...]:
        a, b, center, spread, *_ = factors(compiled, bn, y, weight, bias)
        (act,) = (kernels.affine_relu_ if in_place else kernels.affine_relu)(compiled, y, a, b)
        ctx.save_for_backward(y, weight, a, b, center, spread, *params)
        ctx.compiled, ctx.convs, ctx.training, ctx.eps = compiled, convs, bn.training, bn.eps
        pairs = zip(convs, params[::2], params[1::2], strict=True)
        return tuple(convolve(act, conv, cast(Tensor, w), c) for conv, w, c in pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        y, weight, a, b, center, spread, *params = ctx.saved_tensors
        (act,) = kernels.affine_relu(ctx.compiled, y, a, b)
        gact: Any = None
        gparams: list[Tensor | None] = []
        for i, (conv, g) in enumerate(zip(ctx.convs, grads, strict=True)):
            wanted = (True, *ctx.needs_input_grad[7 + 2 * i : 9 + 2 * i])
            gx, *gp = convolve_backward(g, act, conv, params[2 * i], params[2 * i + 1], wanted)
            gact = gx if gact is None else gact.add_(gx)
            gparams += gp
        del act
        gy = kernels.norm_relu_backward(ctx.compiled, gact, y, weight, ctx.eps, ctx.training, a, b, center, spread)
        return None, None, None, None, *gy, *gparams


def norm_act_conv(compiled: bool, bn: nn.BatchNorm2d, y: Tensor, *convs: nn.Conv2d) -> tuple[Tensor, ...]:
    """Convolutions of ReLU(BN(y)), keeping y. Without gradients y is overwritten."""
    return cast(
        tuple[Tensor, ...],
        _NormActConv.apply(
            compiled, not torch.is_grad_enabled(), bn, convs, y, bn.weight, bn.bias, *conv_params(y, *convs)
        ),
    )


class _GateConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, conv: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.conv = conv
        return convolve(x, conv, weight, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        gx = gweight = None
        if ctx.needs_input_grad[1]:
            gx = convolve(g, ctx.conv, weight.flip(2, 3).transpose(0, 1), None)
        if ctx.needs_input_grad[2]:
            _, gweight, _ = convolve_backward(g, x, ctx.conv, weight, None, (False, True, False))
        return None, gx, gweight


def gate_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution from 2 channels to 1 that keeps the map's size, made for so few channels.

    A long plane is convolved along its long side only, with its short side folded into the channels: more arithmetic,
    but such as processors are good at. Of any other, the gradient is written as a convolution with the mirrored kernel.
    Both are several times faster on CPU than torch's own.

    Args:
        conv: The convolution, of stride 1.
        x: (N, 2, A, B)

    Returns:
        (N, 1, A, B)
    """
    short, long = sorted(x.shape[2:])
    if 4 * short <= long:
        return _folded(x, conv.weight) if x.shape[3] == short else _folded(x.mT, conv.weight.mT).mT
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    return cast(Tensor, _GateConv.apply(conv, x.to(dtype), conv.weight.to(dtype)))


def _folded(x: Tensor, weight: Tensor) -> Tensor:
    """The convolution of x (N, 2, A, B) with weight (1, 2, k, k) as one along A, between 2 B and B channels."""
    (n, _, a, b), r = x.shape, weight.shape[3] // 2
    # Column i of the input meets column j of the output with the weight's column i - j + r, or 0 beyond its edges.
    v = pad(weight[0], (b - 1 - r, b - 1 - r)).unfold(2, b, 1).flip(2)  # (2, k, b, b): j, i
    v = v.permute(2, 0, 3, 1).reshape(b, 2 * b, weight.shape[2])
    y = conv1d(x.mT.reshape(n, 2 * b, a), v, padding=r)  # (N, B, A)
    return y.mT.unsqueeze(1)


# ---- The end of a block ----------------------------------------------------------------------------------------------


class _GatedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        compiled: bool,
        in_place: bool,
        y: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        channels: Tensor | None,
        shortcut: Tensor,
        a1: Tensor | None,
        b1: Tensor | None,
    ) -> Tensor:
        apply = kernels.gated_sum_ if in_place else kernels.gated_sum
        (out,) = apply(compiled, y, a, b, channels, shortcut, a1, b1, False)
        ctx.save_for_backward(out, y, a, b, channels, None if a1 is None else shortcut, a1)
        ctx.compiled = compiled
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        return None, None, *kernels.gated_sum_backward(ctx.compiled, g, *ctx.saved_tensors)


def gated_sum(
    compiled: bool,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    channels: Tensor | None,
    shortcut: Tensor,
    a1: Tensor | None,
    b1: Tensor | None,
) -> Tensor:
    """ReLU((y * a + b) * channels + shortcut * a1 + b1), keeping y and the output; y is overwritten without gradients.

    Args:
        compiled: Call kernels compiled.
        y: (N, C, H, W)
        a: (1, C, 1, 1), or None for no factor and summand.
        b: Like a.
        channels: (N, C, 1, 1) or (N, 1, 1, 1), or None.
        shortcut: (N, C, H, W)
        a1: Like a.
        b1: Like a.
    """
    return cast(Tensor, _GatedSum.apply(compiled, not torch.is_grad_enabled(), y, a, b, channels, shortcut, a1, b1))


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        compiled: bool,
        dims: tuple[int, ...],
        y: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        channels: Tensor | None,
    ) -> tuple[Tensor, ...]:
        found = kernels.pool(compiled, y, a, b, channels, dims)
        peaks, pooled = found[::2], found[1::2]
        ctx.save_for_backward(y, a, b, channels, *peaks)
        ctx.compiled, ctx.dims = compiled, dims
        return y, *peaks, *pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gz: Tensor, *more: Tensor) -> tuple[Any, ...]:
        y, a, b, channels, *peaks = ctx.saved_tensors
        counts, gpooled = more[: len(peaks)], more[len(peaks) :]
        pools: list[Tensor] = []
        for d, peak, count, g in zip(ctx.dims, peaks, counts, gpooled, strict=True):
            gpeak, gmean = g.split(1, d)
            # Equal maxima share the gradient, as in torch's amax.
            pools += peak, gpeak / count, gmean / y.shape[d]
        return None, None, *kernels.pool_backward(ctx.compiled, gz, y, a, b, channels, *pools)


class _GatedPooledSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        compiled: bool,
        in_place: bool,
        summed: bool,
        dims: tuple[int, ...],
        y: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        channels: Tensor | None,
        shortcut: Tensor,
        a1: Tensor | None,
        b1: Tensor | None,
        *more: Tensor,
    ) -> Tensor:
        apply = kernels.gated_sum_ if in_place else kernels.gated_sum
        (out,) = apply(compiled, y, a, b, channels, shortcut, a1, b1, summed, *more[len(dims) :])
        ctx.save_for_backward(out, y, a, b, channels, None if a1 is None else shortcut, a1, *more)
        ctx.compiled, ctx.summed, ctx.dims = compiled, summed, dims
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        gz, gshortcut, ga1, gb1, *rest = kernels.gated_pooled_sum_backward(
            ctx.compiled, g, *ctx.saved_tensors[:7], ctx.summed, ctx.dims, *ctx.saved_tensors[7:]
        )
        ggates, counts = rest[: -len(ctx.dims)], rest[-len(ctx.dims) :]
        # What leaves for y is the gradient of z, and for the maxima the number of their places: `_Pool` awaits them.
        return *(None,) * 4, gz, None, None, None, gshortcut, ga1, gb1, *counts, *ggates


def gated_pooled_sum(
    compiled: bool,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    channels: Tensor | None,
    dims: tuple[int, ...],
    gates_of: Callable[[list[Tensor]], Sequence[Tensor]],
    summed: bool,
    shortcut: Tensor,
    a1: Tensor | None,
    b1: Tensor | None,
) -> Tensor:
    """`gated_sum` with more gates, which are functions of what z = (y * a + b) * channels is pooled to.

    Args:
        compiled: Call kernels compiled.
        y: (N, C, H, W)
        a: (1, C, 1, 1), or None for no factor and summand.
        b: Like a.
        channels: (N, C, 1, 1), or None.
        dims: Dimensions along which z is pooled.
        gates_of: For z's maximum and mean along each, of z's shape but for a 2 in place of the size: the gates.
        summed: The gates' sum, not their product, is the gate.
        shortcut: (N, C, H, W)
        a1: Like a.
        b1: Like a.
    """
    z, *found = cast(tuple[Tensor, ...], _Pool.apply(compiled, dims, y, a, b, channels))
    peaks, pooled = found[: len(dims)], found[len(dims) :]
    return cast(
        Tensor,
        _GatedPooledSum.apply(
            compiled,
            not torch.is_grad_enabled(),
            summed,
            dims,
            z,
            a,
            b,
            channels,
            shortcut,
            a1,
            b1,
            *peaks,
            *gates_of(pooled),
        ),
    )


# ---- BAM -------------------------------------------------------------------------------------------------------------


class _RaiseBy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        compiled: bool,
        add: bool,
        gain: float,
        x: Tensor,
        channels: Tensor,
        pixels: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, channels, pixels)
        ctx.args = compiled, add, gain
        (out,) = kernels.raise_by(compiled, x, channels, pixels, add, gain)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        compiled, add, gain = ctx.args
        return None, None, None, *kernels.raise_by_backward(compiled, g, *ctx.saved_tensors, add, gain)


def raise_by(compiled: bool, x: Tensor, channels: Tensor, pixels: Tensor, add: bool, gain: float) -> Tensor:
    """x * (1 + s(channels * pixels)) * gain, or with their sum; keeping its inputs."""
    return cast(Tensor, _RaiseBy.apply(compiled, add, gain, x, channels, pixels))
