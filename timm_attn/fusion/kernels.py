"""Passes over the maps of a block, each written once in torch and compiled into as few loops as possible.

Shapes: N batch, C channels, H, W sides of the map. y (N, C, H, W) is a convolution's output, and x = y * a + b what
its BatchNorm makes of it, with a and b (1, C, 1, 1); both are None where there is no BatchNorm. Everything but maps is
in float32, or float64 for maps of float64.
"""

import operator
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .compile import kernel, overwriting


def _up(y: Tensor) -> Tensor:
    return y if y.dtype == torch.float64 else y.float()


def _affine(y: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
    return _up(y) if a is None or b is None else _up(y) * a + b


def _plane_sum(x: Tensor) -> Tensor:
    return x.sum((2, 3), keepdim=True)  # (N, C, 1, 1)


def _unbiased(m: int) -> float:
    return m / max(m - 1, 1)


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
        pick = torch.where(a >= 0, y.amax((2, 3), keepdim=True), y.amin((2, 3), keepdim=True))
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
    found: list[Tensor] = []
    for name in names:
        if name == 'mean':
            found.append(mean)
        elif name == 'var':
            found.append((y - mean).square().mean((2, 3), keepdim=True) * _unbiased(y.shape[2] * y.shape[3]))
        else:
            found.append(y.amax((2, 3), keepdim=True))
    return tuple([x.flatten(1) for x in found])


@overwriting
def norm_backward(
    g: Tensor,
    y: Tensor,
    weight: Tensor,
    eps: float,
    training: bool,
    a: Tensor,
    center: Tensor,
    spread: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    pick: Tensor | None,
    ga: Tensor,
    gb: Tensor,
    gmean: Tensor | None,
    gvar: Tensor | None,
    gpeak: Tensor | None,
) -> tuple[Tensor, ...]:
    """Adds to g, the gradient of y by other ways, that through the results of `norm`; g is overwritten.

    Returns:
        Gradients of weight and bias.
    """
    m = y.shape[2] * y.shape[3]
    u = _up(y)
    slope: Tensor | float = 0.0
    offset: Tensor | float = 0.0
    peaks: Tensor | None = None
    gmean, gvar, gpeak = [None if x is None else x[:, :, None, None] for x in (gmean, gvar, gpeak)]
    if gmean is not None:
        assert mean is not None
        ga, gb = ga + (gmean * mean).sum(0, keepdim=True), gb + gmean.sum(0, keepdim=True)
        offset = offset + gmean * a / m
    if gvar is not None:
        assert mean is not None and var is not None
        gvar = gvar * _unbiased(m)
        ga = ga + (gvar * var * a * 2).sum(0, keepdim=True)
        slope = slope + gvar * a.square() * (2 / m)
        offset = offset - gvar * a.square() * mean * (2 / m)
    if gpeak is not None:
        assert pick is not None
        ga, gb = ga + (gpeak * pick).sum(0, keepdim=True), gb + gpeak.sum(0, keepdim=True)
        at = u == pick
        # As in torch's amax, equal peaks share the gradient.
        peaks = torch.where(at, gpeak * a / _plane_sum(at.to(u.dtype)), 0)
    batch_slope, batch_offset, *gparams = _norm_gradients(u, weight, eps, training, a, center, spread, ga, gb)
    out = _up(g) + u * (slope + batch_slope) + (offset + batch_offset)
    if peaks is not None:
        out = out + peaks
    g.copy_(out)
    return tuple(gparams)


def _norm_gradients(
    u: Tensor,
    weight: Tensor,
    eps: float,
    training: bool,
    a: Tensor,
    center: Tensor,
    spread: Tensor,
    ga: Tensor,
    gb: Tensor,
) -> tuple[Any, ...]:
    """For those of a and b: slope and offset of the gradient of u by its statistics, gradients of weight and bias."""
    ga = ga - center * gb
    root = (spread + eps).rsqrt()
    slope = offset = 0.0
    if training:
        n = u.shape[0] * u.shape[2] * u.shape[3]
        gspread = ga * weight[None, :, None, None] * root * root * root * -0.5
        slope, offset = gspread * (2 / n), -(a * gb + gspread * center * 2) / n
    return slope, offset, (ga * root).flatten().to(weight.dtype), gb.flatten().to(weight.dtype)


# ---- ReLU(BN(y)) before a convolution -------------------------------------------------------------------------------


@kernel
def affine_relu(y: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor]:
    """ReLU(x)."""
    return (_affine(y, a, b).relu().to(y.dtype),)


@overwriting
def affine_relu_(y: Tensor, a: Tensor, b: Tensor) -> tuple[()]:
    """ReLU(x) in the memory of y."""
    y.copy_(_affine(y, a, b).relu())
    return ()


@overwriting
def norm_relu_backward(
    g: Tensor,
    y: Tensor,
    weight: Tensor,
    eps: float,
    training: bool,
    a: Tensor,
    b: Tensor,
    center: Tensor,
    spread: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of weight and bias for that of ReLU(x); g becomes that of y."""
    u = _up(y)
    g0 = torch.where(u * a + b > 0, _up(g), 0)
    gy, ga, gb, _ = _factor_gradients(g0, u, a, b, None)
    slope, offset, *gparams = _norm_gradients(u, weight, eps, training, a, center, spread, ga, gb)
    g.copy_(gy + u * slope + offset)
    return tuple(gparams)


# ---- The end of a block ---------------------------------------------------------------------------------------------


@kernel
def gated_sum(
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    channels: Tensor | None,
    shortcut: Tensor,
    a1: Tensor | None,
    b1: Tensor | None,
    summed: bool,
    *gates: Tensor,
) -> tuple[Tensor]:
    """ReLU(x * channels * gate + shortcut * a1 + b1).

    Args:
        y: The map.
        a: (1, C, 1, 1)
        b: (1, C, 1, 1)
        channels: Gate of channels (N, C, 1, 1), or None for 1.
        shortcut: A map.
        a1: Like a.
        b1: Like a.
        summed: The gates' sum, not their product, is the gate.
        *gates: Each of 4 dimensions.
    """
    return (_gated_sum(y, a, b, channels, shortcut, a1, b1, summed, gates).to(y.dtype),)


@overwriting
def gated_sum_(
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    channels: Tensor | None,
    shortcut: Tensor,
    a1: Tensor | None,
    b1: Tensor | None,
    summed: bool,
    *gates: Tensor,
) -> tuple[()]:
    """`gated_sum` in the memory of y."""
    y.copy_(_gated_sum(y, a, b, channels, shortcut, a1, b1, summed, gates))
    return ()


def _gated_sum(
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    channels: Tensor | None,
    shortcut: Tensor,
    a1: Tensor | None,
    b1: Tensor | None,
    summed: bool,
    gates: Sequence[Tensor],
) -> Tensor:
    z = _gated(_affine(y, a, b), channels)
    if gates:
        z = z * _joint(gates, summed)
    return (z + _affine(shortcut, a1, b1)).relu()


def _gated(x: Tensor, channels: Tensor | None) -> Tensor:
    return x if channels is None else x * channels


def _joint(gates: Sequence[Tensor], summed: bool) -> Tensor:
    return reduce(operator.add if summed else operator.mul, gates)


@kernel
def gated_sum_backward(
    g: Tensor,
    out: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    channels: Tensor | None,
    shortcut: Tensor | None,
    a1: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of y, a, b, channels, shortcut, a1 and b1, without further gates."""
    g = torch.where(out > 0, _up(g), 0)
    gy, *gfactors = _factor_gradients(g, _up(y), a, b, channels)
    return gy.to(y.dtype), *gfactors, *_shortcut_gradients(g, y.dtype, shortcut, a1)


@kernel
def gated_pooled_sum_backward(
    g: Tensor,
    out: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    channels: Tensor | None,
    shortcut: Tensor | None,
    a1: Tensor | None,
    summed: bool,
    dims: tuple[int, ...],
    *more: Tensor,
) -> tuple[Tensor | None, ...]:
    """`gated_sum_backward` where z = x * channels was pooled for further gates.

    Args:
        g: Gradient of the output.
        out: The output.
        y: The map.
        a: (1, C, 1, 1)
        b: (1, C, 1, 1)
        channels: (N, C, 1, 1) or None.
        shortcut: As given, or None without a1.
        a1: As given.
        summed: As given.
        dims: Those that z was pooled along.
        *more: The maxima of z along each dimension, and the gates.

    Returns:
        Gradients of z, shortcut, a1, b1 and the gates, and the number of places of each maximum: these loops read all
        of z in any case.
    """
    peaks, gates = more[: len(dims)], more[len(dims) :]
    z = _gated(_up(y) * a + b, channels)
    g = torch.where(out > 0, _up(g), 0)
    gz = (g * _joint(gates, summed)).to(y.dtype)
    counts = [(z == peak).to(z.dtype).sum(d, keepdim=True) for d, peak in zip(dims, peaks, strict=True)]
    ggates: list[Tensor] = []
    for i, gate in enumerate(gates):
        others = [other for j, other in enumerate(gates) if j != i]
        ggate = g * z if summed or not others else g * z * _joint(others, False)
        ggates.append(_sum_to(ggate, gate).to(gate.dtype))
    return gz, *_shortcut_gradients(g, y.dtype, shortcut, a1), *ggates, *counts


def _factor_gradients(
    gz: Tensor,
    u: Tensor,
    a: Tensor,
    b: Tensor | None,
    channels: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of u, a, b and channels for that of z = (u * a + b) * channels; b is needed with channels only."""
    by_a, by_b = _plane_sum(gz * u), _plane_sum(gz)
    if channels is None or b is None:
        return gz * a, by_a.sum(0, keepdim=True), by_b.sum(0, keepdim=True), None
    gchannels = _sum_to(by_a * a + by_b * b, channels).to(channels.dtype)
    ga, gb = (by_a * channels).sum(0, keepdim=True), (by_b * channels).sum(0, keepdim=True)
    return gz * (a * channels), ga, gb, gchannels


def _shortcut_gradients(
    g: Tensor,
    dtype: torch.dtype,
    shortcut: Tensor | None,
    a1: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of shortcut, a1 and b1 for that of shortcut * a1 + b1."""
    if a1 is None or shortcut is None:
        return g.to(dtype), None, None
    gshortcut, ga1, gb1, _ = _factor_gradients(g, _up(shortcut), a1, None, None)
    return gshortcut.to(dtype), ga1, gb1


@kernel
def masked_by(g: Tensor, out: Tensor, shortcut: Tensor | None, a1: Tensor | None) -> tuple[Tensor | None, ...]:
    """g where out is positive, and the gradients of shortcut, a1 and b1 in ReLU(x + shortcut * a1 + b1)."""
    u = torch.where(out > 0, _up(g), 0)
    return u.to(g.dtype), *_shortcut_gradients(u, g.dtype, shortcut, a1)


@kernel
def affine(y: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor]:
    """x."""
    return (_affine(y, a, b).to(y.dtype),)


@overwriting
def affine_backward(g: Tensor, y: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a and b for that of x; g becomes that of y."""
    gy, ga, gb, _ = _factor_gradients(_up(g), _up(y), a, None, None)
    g.copy_(gy)
    return ga, gb


def _sum_to(x: Tensor, like: Tensor) -> Tensor:
    dims = [d for d in range(4) if like.shape[d] == 1]
    return x.sum(dims, keepdim=True)


# ---- What gates of pixels and of planes pool ------------------------------------------------------------------------


@kernel
def pool(
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    channels: Tensor | None,
    dims: tuple[int, ...],
) -> tuple[Tensor, ...]:
    """For each dimension, the maximum of z = x * channels along it, and that with the mean behind it in y's type."""
    z = _gated(_affine(y, a, b), channels)
    found: list[Tensor] = []
    for d in dims:
        peak = z.amax(d, keepdim=True)
        found += [peak, torch.cat([peak, z.mean(d, keepdim=True)], dim=d).to(y.dtype)]
    return tuple(found)


@overwriting
def pool_backward(
    g: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    channels: Tensor | None,
    *pools: Tensor,
) -> tuple[Tensor | None, ...]:
    """Turns the gradient of z = x * channels into that of y, with what comes through `pool`.

    Args:
        g: Gradient of z, which that of y takes the place of.
        y: The map.
        a: (1, C, 1, 1)
        b: (1, C, 1, 1)
        channels: (N, C, 1, 1) or None.
        *pools: For each dimension the maximum, and what each place of the maximum and what every place gets.

    Returns:
        Gradients of a, b and channels.
    """
    u = _up(y)
    z = _gated(u * a + b, channels)
    gz = _up(g)
    for peak, share, rest in zip(pools[::3], pools[1::3], pools[2::3], strict=True):
        gz = gz + torch.where(z == peak, share, 0) + rest
    gy, *gfactors = _factor_gradients(gz, u, a, b, channels)
    g.copy_(gy)
    return tuple(gfactors)


# ---- BAM: a gate on the block's output ------------------------------------------------------------------------------


@kernel
def raise_by(x: Tensor, channels: Tensor, pixels: Tensor, add: bool, gain: float) -> tuple[Tensor]:
    """x * (1 + s(m)) * gain, where m is the product or the sum of (N, C, 1, 1) and (N, 1, H, W)."""
    m = _up(channels) + _up(pixels) if add else _up(channels) * _up(pixels)
    return ((_up(x) * ((1 + m.sigmoid()) * gain)).to(x.dtype),)


@kernel
def raise_by_backward(
    g: Tensor,
    x: Tensor,
    channels: Tensor,
    pixels: Tensor,
    add: bool,
    gain: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, channels and pixels."""
    c, p = _up(channels), _up(pixels)
    s = (c + p if add else c * p).sigmoid()
    gx = _up(g) * ((1 + s) * gain)
    gm = _up(g) * _up(x) * (s * (1 - s) * gain)
    gc, gp = (gm, gm) if add else (gm * p, gm * c)
    return gx.to(x.dtype), _plane_sum(gc).to(channels.dtype), gp.sum(1, keepdim=True).to(pixels.dtype)
