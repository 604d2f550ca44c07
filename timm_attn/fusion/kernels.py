"""Passes over the maps of a block, each written once in torch and compiled into as few loops as possible.

Shapes: N batch, C channels, H, W sides of the map. Everything but maps is in float32, or float64 for maps of float64.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .compile import kernel, overwriting


class Affine(NamedTuple):
    """A map x = y * a + b that is not made, such as a BatchNorm's output.

    Attributes:
        y: The map that is there (N, C, H, W); None where a backward pass needs no value of it.
        a: (1, C, 1, 1), or None for x = y.
        b: Like a.
    """

    y: Any
    a: Tensor | None = None
    b: Tensor | None = None


class Norm(NamedTuple):
    """What the gradient of a BatchNorm takes besides its input.

    Attributes:
        weight: (C,)
        eps: Added to the variance.
        training: Mean and variance are the batch's.
        a: Factor of the input (1, C, 1, 1).
        center: The mean (1, C, 1, 1).
        spread: The variance (1, C, 1, 1).
    """

    weight: Tensor
    eps: float
    training: bool
    a: Tensor
    center: Tensor
    spread: Tensor


class Planes(NamedTuple):
    """A number for each plane of a map, or its gradient; None where no one needs it.

    Attributes:
        mean: The mean.
        var: The variance.
        peak: The value where the BatchNorm's output has its maximum.
    """

    mean: Tensor | None
    var: Tensor | None
    peak: Tensor | None


def _up(y: Tensor) -> Tensor:
    return y if y.dtype == torch.float64 else y.float()


def _made(x: Affine) -> Tensor:
    return _up(x.y) if x.a is None or x.b is None else _up(x.y) * x.a + x.b


def _plane_sum(x: Tensor) -> Tensor:
    return x.sum((2, 3), keepdim=True)  # (N, C, 1, 1)


def _unbiased(m: int) -> float:
    return m / max(m - 1, 1)


def _through_relu(g: Tensor, out: Tensor) -> Tensor:
    """Gradient of what a ReLU turned into out; as in torch, NaN lets it pass."""
    return torch.where(out <= 0, 0, _up(g))


# ---- BatchNorm ------------------------------------------------------------------------------------------------------


@kernel
def norm(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    center: Tensor | None,
    spread: Tensor | None,
    eps: float,
    names: tuple[str, ...],
) -> tuple[Tensor | None, ...]:
    """A BatchNorm as a factor and a summand, and statistics of the planes of its output.

    Args:
        y: The map.
        weight: (C,)
        bias: (C,)
        center: Means to normalise by (C,); None takes the batch's.
        spread: Variances to normalise by (C,); None takes the batch's, biased.
        eps: Added to the variance.
        names: The statistics: 'mean', 'var' (unbiased, 0 for a single pixel) and 'peak'.

    Returns:
        a, b, center and spread, all (1, C, 1, 1); mean and variance of y's planes and the value of y at the peak
        (N, C, 1, 1), or None where no one needs them; and the statistics by name (N, C).
    """
    y = _up(y)
    mean = var = pick = None
    if center is None or 'mean' in names or 'var' in names:
        mean = y.mean((2, 3), keepdim=True)
    if center is None or 'var' in names:
        assert mean is not None
        var = (y - mean).square().mean((2, 3), keepdim=True)
    if center is None or spread is None:
        assert mean is not None and var is not None
        center = mean.mean(0, keepdim=True)
        spread = (var + (mean - center).square()).mean(0, keepdim=True)
    else:
        # Results are new tensors, no views.
        center, spread = [s[None, :, None, None].to(y.dtype, copy=True) for s in (center, spread)]
    a = weight[None, :, None, None] * (spread + eps).rsqrt()
    b = bias[None, :, None, None] - center * a
    if 'peak' in names:
        # With a factor of 0 all pixels are equal maxima.
        flat = y.mean((2, 3), keepdim=True) if mean is None else mean
        pick = torch.where(a > 0, y.amax((2, 3), keepdim=True), torch.where(a < 0, y.amin((2, 3), keepdim=True), flat))
    shown: list[Tensor] = []
    for name in names:
        if name == 'mean':
            assert mean is not None
            shown.append(mean * a + b)
        elif name == 'var':
            assert var is not None
            shown.append(var * a.square() * _unbiased(y.shape[2] * y.shape[3]))
        else:
            assert pick is not None
            shown.append(pick * a + b)
    return a, b, center, spread, mean, var, pick, *(x.flatten(1) for x in shown)


@kernel
def plane_statistics(y: Tensor, names: tuple[str, ...]) -> tuple[Tensor, ...]:
    """Statistics of y's planes, as `norm`'s of its output's."""
    y = _up(y)
    mean = y.mean((2, 3), keepdim=True)
    shown: list[Tensor] = []
    for name in names:
        if name == 'mean':
            shown.append(mean)
        elif name == 'var':
            shown.append((y - mean).square().mean((2, 3), keepdim=True) * _unbiased(y.shape[2] * y.shape[3]))
        else:
            shown.append(y.amax((2, 3), keepdim=True))
    return tuple([x.flatten(1) for x in shown])


@overwriting
def norm_backward(
    g: Tensor, y: Tensor, norm: Norm, planes: Planes, ga: Tensor, gb: Tensor, gplanes: Planes
) -> tuple[Tensor, ...]:
    """Adds to g, the gradient of y by other ways, that through the results of `norm`; g is overwritten.

    Args:
        g: Gradient of y, a map.
        y: The map.
        norm: The BatchNorm.
        planes: What `norm` gives of y's planes, (N, C, 1, 1) each.
        ga: Gradient of a.
        gb: Gradient of b.
        gplanes: Those of the statistics (N, C).

    Returns:
        Gradients of weight and bias.
    """
    m = y.shape[2] * y.shape[3]
    u, a = _up(y), norm.a
    slope: Tensor | float = 0.0
    offset: Tensor | float = 0.0
    peaks: Tensor | None = None
    gmean, gvar, gpeak = [None if x is None else x[:, :, None, None] for x in gplanes]
    if gmean is not None:
        assert planes.mean is not None
        ga, gb = ga + (gmean * planes.mean).sum(0, keepdim=True), gb + gmean.sum(0, keepdim=True)
        offset = offset + gmean * a / m
    if gvar is not None:
        assert planes.mean is not None and planes.var is not None
        gvar = gvar * _unbiased(m)
        ga = ga + (gvar * planes.var * a * 2).sum(0, keepdim=True)
        slope = slope + gvar * a.square() * (2 / m)
        offset = offset - gvar * a.square() * planes.mean * (2 / m)
    if gpeak is not None:
        assert planes.peak is not None
        ga, gb = ga + (gpeak * planes.peak).sum(0, keepdim=True), gb + gpeak.sum(0, keepdim=True)
        at = (u == planes.peak).to(u.dtype)
        # As in torch's amax, equal peaks share the gradient, and where a NaN is the peak all get NaN.
        peaks = torch.where(a == 0, 0, at * (gpeak * a / _plane_sum(at)))
    batch_slope, batch_offset, *gparams = _norm_gradients(u, norm, ga, gb)
    out = _up(g) + u * (slope + batch_slope) + (offset + batch_offset)
    if peaks is not None:
        out = out + peaks
    g.copy_(out)
    return tuple(gparams)


def _norm_gradients(u: Tensor, norm: Norm, ga: Tensor, gb: Tensor) -> tuple[Any, ...]:
    """For those of a and b: slope and offset of the gradient of u by its statistics, gradients of weight and bias."""
    ga = ga - norm.center * gb
    root = (norm.spread + norm.eps).rsqrt()
    slope = offset = 0.0
    if norm.training:
        n = u.shape[0] * u.shape[2] * u.shape[3]
        gspread = ga * norm.weight[None, :, None, None] * root * root * root * -0.5
        slope, offset = gspread * (2 / n), -(norm.a * gb + gspread * norm.center * 2) / n
    return slope, offset, (ga * root).flatten().to(norm.weight.dtype), gb.flatten().to(norm.weight.dtype)


# ---- ReLU(BN(y)) before a convolution -------------------------------------------------------------------------------


@kernel
def affine_relu(x: Affine) -> tuple[Tensor]:
    """ReLU(x)."""
    return (_made(x).relu().to(x.y.dtype),)


@overwriting
def affine_relu_(x: Affine) -> tuple[()]:
    """ReLU(x) in the memory of y."""
    x.y.copy_(_made(x).relu())
    return ()


@overwriting
def norm_relu_backward(g: Tensor, y: Tensor, b: Tensor | None, norm: Norm) -> tuple[Tensor, ...]:
    """Gradients of weight and bias for that of ReLU(BN(y)), or without b of BN(y); g becomes that of y.

    Args:
        g: The gradient, a map.
        y: The map.
        b: Summand of the BatchNorm (1, C, 1, 1), or None.
        norm: The BatchNorm.
    """
    u = _up(y)
    g0 = _up(g) if b is None else _through_relu(g, u * norm.a + b)
    gy, ga, gb, _ = _factor_gradients(g0, Affine(u, norm.a), None)
    slope, offset, *gparams = _norm_gradients(u, norm, ga, gb)
    g.copy_(gy + u * slope + offset)
    return tuple(gparams)


# ---- The end of a block ---------------------------------------------------------------------------------------------


@kernel
def gated_sum(x: Affine, channels: Tensor | None, shortcut: Affine, *gates: Tensor) -> tuple[Tensor]:
    """ReLU(x * channels * gate + shortcut).

    Args:
        x: A map.
        channels: Gate of channels (N, C, 1, 1), or None for 1.
        shortcut: A map.
        *gates: Of 4 dimensions each; gate is their sum, or 1 where there is none.
    """
    return (_gated_sum(x, channels, shortcut, gates).to(x.y.dtype),)


@overwriting
def gated_sum_(x: Affine, channels: Tensor | None, shortcut: Affine, *gates: Tensor) -> tuple[()]:
    """`gated_sum` in the memory of y."""
    x.y.copy_(_gated_sum(x, channels, shortcut, gates))
    return ()


def _gated_sum(x: Affine, channels: Tensor | None, shortcut: Affine, gates: Sequence[Tensor]) -> Tensor:
    z = _gated(_made(x), channels)
    if gates:
        z = z * _sum(gates)
    return (z + _made(shortcut)).relu()


def _gated(x: Tensor, channels: Tensor | None) -> Tensor:
    return x if channels is None else x * channels


def _sum(gates: Sequence[Tensor]) -> Tensor:
    total = gates[0]
    for gate in gates[1:]:
        total = total + gate
    return total


@kernel
def gated_sum_backward(
    g: Tensor, out: Tensor, x: Affine, channels: Tensor | None, shortcut: Affine
) -> tuple[Tensor | None, ...]:
    """Gradients of x's y, a and b, of channels, and of the shortcut's y, a and b, without further gates.

    Args:
        g: Gradient of the output.
        out: The output.
        x: As given.
        channels: As given.
        shortcut: As given; without a factor its map is not needed.
    """
    g = _through_relu(g, out)
    gy, *gfactors = _factor_gradients(g, x, channels)
    return gy.to(x.y.dtype), *gfactors, *_shortcut_gradients(g, x.y.dtype, shortcut)


@kernel
def gated_pooled_sum_backward(
    g: Tensor, out: Tensor, x: Affine, channels: Tensor | None, shortcut: Affine, dims: tuple[int, ...], *more: Tensor
) -> tuple[Tensor | None, ...]:
    """`gated_sum_backward` where z = x * channels was pooled for further gates.

    Args:
        g: Gradient of the output.
        out: The output.
        x: As given.
        channels: As given.
        shortcut: As given; without a factor its map is not needed.
        dims: Those that z was pooled along.
        *more: The maxima of z along each dimension, and the gates.

    Returns:
        Gradients of z, of the shortcut's y, a and b, of the gates, and the number of places of each maximum: these
        loops read all of z in any case.
    """
    peaks, gates = more[: len(dims)], more[len(dims) :]
    z = _gated(_made(x), channels)
    g = _through_relu(g, out)
    gz = (g * _sum(gates)).to(x.y.dtype)
    counts = [(z == peak).to(z.dtype).sum(d, keepdim=True) for d, peak in zip(dims, peaks, strict=True)]
    ggates = [_sum_to(g * z, gate).to(gate.dtype) for gate in gates]
    return gz, *_shortcut_gradients(g, x.y.dtype, shortcut), *ggates, *counts


def _factor_gradients(gz: Tensor, x: Affine, channels: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of x's y, a and b and of channels for that of z = x * channels; b is needed with channels only."""
    u = _up(x.y)
    by_a, by_b = _plane_sum(gz * u), _plane_sum(gz)
    a = x.a
    assert a is not None
    if channels is None or x.b is None:
        return gz * a, by_a.sum(0, keepdim=True), by_b.sum(0, keepdim=True), None
    gchannels = _sum_to(by_a * a + by_b * x.b, channels).to(channels.dtype)
    ga, gb = (by_a * channels).sum(0, keepdim=True), (by_b * channels).sum(0, keepdim=True)
    return gz * (a * channels), ga, gb, gchannels


def _shortcut_gradients(g: Tensor, dtype: torch.dtype, shortcut: Affine) -> tuple[Tensor | None, ...]:
    """Gradients of the shortcut's y, a and b for that of the shortcut."""
    if shortcut.a is None:
        return g.to(dtype), None, None
    gshortcut, ga, gb, _ = _factor_gradients(g, shortcut, None)
    return gshortcut.to(dtype), ga, gb


@kernel
def sum_backward(g: Tensor, out: Tensor, shortcut: Affine) -> tuple[Tensor | None, ...]:
    """Gradients of x and of the shortcut's y, a and b for that of out = ReLU(x + shortcut)."""
    u = _through_relu(g, out)
    return u.to(g.dtype), *_shortcut_gradients(u, g.dtype, shortcut)


@kernel
def affine(x: Affine) -> tuple[Tensor]:
    """x, made."""
    return (_made(x).to(x.y.dtype),)


@overwriting
def affine_(x: Affine) -> tuple[()]:
    """x, made in the memory of y."""
    x.y.copy_(_made(x))
    return ()


def _sum_to(x: Tensor, like: Tensor) -> Tensor:
    dims = [d for d in range(4) if like.shape[d] == 1]
    return x.sum(dims, keepdim=True)


# ---- What gates of pixels and of planes pool ------------------------------------------------------------------------


@kernel
def pool(x: Affine, channels: Tensor | None, dims: tuple[int, ...]) -> tuple[Tensor, ...]:
    """For each dimension, the maximum of z = x * channels along it, and that with the mean behind it in y's type."""
    z = _gated(_made(x), channels)
    pooled: list[Tensor] = []
    for d in dims:
        peak = z.amax(d, keepdim=True)
        pooled += [peak, torch.cat([peak, z.mean(d, keepdim=True)], dim=d).to(x.y.dtype)]
    return tuple(pooled)


@overwriting
def pool_backward(g: Tensor, x: Affine, channels: Tensor | None, *pools: Tensor) -> tuple[Tensor | None, ...]:
    """Turns the gradient of z = x * channels into that of y, with what comes through `pool`.

    Args:
        g: Gradient of z, which that of y takes the place of.
        x: The map.
        channels: (N, C, 1, 1) or None.
        *pools: For each dimension the maximum, and what each place of the maximum and what every place gets.

    Returns:
        Gradients of a, b and channels.
    """
    z = _gated(_made(x), channels)
    gz = _up(g)
    for peak, share, rest in zip(pools[::3], pools[1::3], pools[2::3], strict=True):
        # No torch.where: with a NaN for a maximum, all places get NaN, as in torch.
        gz = gz + (z == peak).to(z.dtype) * share + rest
    gy, *gfactors = _factor_gradients(gz, x, channels)
    g.copy_(gy)
    return tuple(gfactors)


# ---- BAM: a gate on the block's output ------------------------------------------------------------------------------


@kernel
def bam_gate(x: Tensor, channels: Tensor, pixels: Tensor, add: bool, gain: float) -> tuple[Tensor]:
    """x * (1 + s(m)) * gain, where m is the product or the sum of (N, C, 1, 1) and (N, 1, H, W)."""
    m = _up(channels) + _up(pixels) if add else _up(channels) * _up(pixels)
    return ((_up(x) * ((1 + m.sigmoid()) * gain)).to(x.dtype),)


@kernel
def bam_gate_backward(
    g: Tensor, x: Tensor, channels: Tensor, pixels: Tensor, add: bool, gain: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, channels and pixels."""
    c, p = _up(channels), _up(pixels)
    s = (c + p if add else c * p).sigmoid()
    gx = _up(g) * ((1 + s) * gain)
    gm = _up(g) * _up(x) * (s * (1 - s) * gain)
    gc, gp = (gm, gm) if add else (gm * p, gm * c)
    return gx.to(x.dtype), _plane_sum(gc).to(channels.dtype), gp.sum(1, keepdim=True).to(pixels.dtype)
