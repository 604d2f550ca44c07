"""Differentiable pieces of a block, each keeping a convolution's output and otherwise only what is small.

A piece that reads a map y hands it on, and the next piece takes it from there. So the gradients of y meet in a chain,
where each backward adds its own in place, and no two of them are ever in memory.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, pad

from . import kernels
from .kernels import Affine, Norm, Planes

_aten = torch.ops.aten
Backward = Callable[..., tuple[Any, ...]]


# ---- Gradients that have no gradients --------------------------------------------------------------------------------


def first_order(backward: Backward) -> Backward:
    """A backward pass whose results have no gradients: asking for them is an error, always.

    torch's `once_differentiable` takes the results for constants where the gradients that come in are constants, which
    they are not: they follow from what was kept. Batched gradients (`is_grads_batched`) are taken one by one.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        with torch.no_grad():
            results = _one_by_one(backward, ctx, grads)
        if not torch.is_grad_enabled():
            return results
        refuse = cast(Any, torch._C)._functions.DelayedError(
            b'timm_attn.fuse: fused blocks have no second derivatives. Differentiate the model before it is fused.',
            len(results),
        )
        return refuse(*[None if r is None else r.detach().requires_grad_() for r in results])

    return wrapper


class _Batched(torch.autograd.Function):
    """A backward pass under torch.vmap."""

    @staticmethod
    def forward(backward: Backward, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return tuple(r for r in backward(ctx, *grads) if r is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, backward: Backward, ctx: Any, *grads: Any) -> Any:
        results = _rows(functools.partial(_Batched.apply, backward, ctx), grads, in_dims[2:])
        return results, (0,) * len(results)


def _rows(backward: Backward, grads: Sequence[Any], dims: Sequence[int | None]) -> tuple[Any, ...]:
    """The results of a backward pass for each of a batch of gradients, which lies in `dims`, one upon another."""
    ((n, *_),) = {tuple(g.shape[d : d + 1]) for g, d in zip(grads, dims, strict=True) if d is not None}

    def row(i: int) -> tuple[Any, ...]:
        # A backward pass overwrites what it is given.
        return backward(*[g if d is None else g.select(d, i).clone() for g, d in zip(grads, dims, strict=True)])

    rows = [row(i) for i in range(n)]
    return tuple(None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True))


def _one_by_one(backward: Backward, ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """`backward` where gradients may be batched: by torch.vmap, or by the vmap of its own of `is_grads_batched`."""
    if torch._C._are_functorch_transforms_active():
        there: list[bool] = []

        def noted(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            results = backward(ctx, *grads)
            there[:] = [r is not None for r in results]
            return results

        results = iter(cast(tuple[Tensor, ...], _Batched.apply(noted, ctx, *grads)))
        return tuple(next(results) if t else None for t in there)
    modes = cast(Any, torch._C)
    level = modes._vmapmode_increment_nesting() - 1
    modes._vmapmode_decrement_nesting()
    if level == 0:
        return backward(ctx, *grads)
    # What is not batched comes out with one row.
    plain = [None if g is None else torch._remove_batch_dim(g, level, 1, 0) for g in grads]
    n = max(g.shape[0] for g in plain if g is not None)
    plain = [None if g is None else g.expand(n, *g.shape[1:]) for g in plain]
    rows = _rows(functools.partial(backward, ctx), plain, [None if g is None else 0 for g in plain])
    return tuple(None if r is None else torch._add_batch_dim(r, 0, level) for r in rows)


# ---- BatchNorm: a factor and a summand -------------------------------------------------------------------------------


def factors(
    compiled: bool, bn: nn.BatchNorm2d, y: Tensor, weight: Tensor, bias: Tensor, names: tuple[str, ...] = ()
) -> tuple[Norm, Tensor, Planes, list[Tensor]]:
    """A BatchNorm of y as a factor and a summand; in training the batch's statistics move the running ones.

    Returns:
        The factor and what else its gradient takes, the summand b, numbers of y's planes, and the statistics by name.
    """
    known = (None, None) if bn.training else (bn.running_mean, bn.running_var)
    a, b, center, spread, mean, var, pick, *statistics = kernels.norm(compiled, y, weight, bias, *known, bn.eps, names)
    if bn.training:
        _track(bn, y, center, spread)
    # What backward does not need is not kept.
    planes = Planes(mean if names else None, var if 'var' in names else None, pick)
    return Norm(weight, bn.eps, bn.training, a, center, spread), b, planes, statistics


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
        ctx: Any, compiled: bool, bn: nn.BatchNorm2d, names: tuple[str, ...], y: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, ...]:
        (_, eps, training, a, center, spread), b, planes, statistics = factors(compiled, bn, y, weight, bias, names)
        ctx.save_for_backward(y, weight, a, center, spread, *planes)
        ctx.compiled, ctx.names, ctx.eps, ctx.training = compiled, names, eps, training
        ctx.set_materialize_grads(False)
        return y, a, b, *statistics

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor, ga: Tensor, gb: Tensor, *gstatistics: Tensor | None) -> tuple[Any, ...]:
        y, weight, a, center, spread, *planes = ctx.saved_tensors
        norm = Norm(weight, ctx.eps, ctx.training, a, center, spread)
        by_name = dict(zip(ctx.names, gstatistics, strict=True))
        gplanes = Planes(by_name.get('mean'), by_name.get('var'), by_name.get('peak'))
        return None, None, None, *kernels.norm_backward(ctx.compiled, g, y, norm, Planes(*planes), ga, gb, gplanes)


def norm(compiled: bool, bn: nn.BatchNorm2d, y: Tensor, names: tuple[str, ...] = ()) -> tuple[Affine, list[Tensor]]:
    """BN(y) as y * a + b, with y to go on with.

    Args:
        compiled: Call kernels compiled.
        bn: The BatchNorm; its running statistics move.
        y: (N, C, H, W)
        names: Statistics of BN(y)'s planes, as in `kernels.norm`.

    Returns:
        BN(y), and the statistics (N, C).
    """
    results = cast(tuple[Tensor, ...], _Norm.apply(compiled, bn, names, y, bn.weight, bn.bias))
    return Affine(*results[:3]), list(results[3:])


# ---- Convolutions behind something that is recomputed ----------------------------------------------------------------


def conv_params(y: Tensor, *convs: nn.Conv2d) -> list[Tensor | None]:
    """Weight and bias of each convolution, in the precision in which autocast would convolve y."""
    dtype = y.dtype if torch.is_autocast_enabled(y.device.type) else None
    params = [p for conv in convs for p in (conv.weight, conv.bias)]
    return [p if p is None or dtype is None else p.to(dtype) for p in params]


# A convolution by one pixel is a product of matrices, image by image, for maps of so many pixels; its gradients are for
# four times as many. With more than one thread or 15 images torch asks oneDNN, which lays maps out anew: of large ones
# that takes longer than the product. Matrices of small ones are narrow, and oneDNN takes all images at once.
_LARGE = 28 * 28


def _by_pixel(x: Tensor, conv: nn.Conv2d, weight: Tensor) -> bool:
    """A convolution whose way on a CPU is chosen here. Whoever counts operations sees torch's choice."""
    return (
        weight.shape[2] == weight.shape[3] == 1
        and conv.groups == conv.stride[0] == conv.stride[1] == 1
        and conv.padding == (0, 0)
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == 'cpu'
        and x.is_contiguous()
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and torch._C._len_torch_dispatch_stack() == 0
    )


def convolve(x: Tensor, conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `conv` makes of x with this weight and bias, which autocast may have cast."""
    if _by_pixel(x, conv, weight):
        if x.shape[2] * x.shape[3] >= _LARGE:
            return _aten.thnn_conv2d(x, weight, [1, 1], bias, [1, 1], [0, 0])
        if x.shape[0] > 1:
            return _aten.mkldnn_convolution(x, weight, bias, [0, 0], [1, 1], [1, 1], 1)
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
    mask = [wanted[0], wanted[1], wanted[2] and bias is not None]
    if _by_pixel(x, conv, weight) and x.shape[2] * x.shape[3] >= 4 * _LARGE:
        return _aten._slow_conv2d_backward.output_mask(g, x, weight, [1, 1], [1, 1], [0, 0], mask)
    sizes = None if bias is None else [bias.shape[0]]
    padding = conv.padding
    return _aten.convolution_backward(
        g, x, weight, sizes, conv.stride, padding, conv.dilation, False, [0, 0], conv.groups, mask
    )


def plain_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(x), for an nn.Conv2d with zeros around that nothing follows."""
    if torch.is_autocast_enabled(x.device.type) or not _by_pixel(x, conv, conv.weight):
        return conv(x)
    return convolve(x, conv, conv.weight, conv.bias)


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
        (_, eps, training, a, center, spread), b, *_ = factors(compiled, bn, y, weight, bias)
        (act,) = (kernels.affine_relu_ if in_place else kernels.affine_relu)(compiled, Affine(y, a, b))
        ctx.save_for_backward(y, weight, a, b, center, spread, *params)
        ctx.compiled, ctx.convs, ctx.eps, ctx.training = compiled, convs, eps, training
        pairs = zip(convs, params[::2], params[1::2], strict=True)
        return tuple(convolve(act, conv, cast(Tensor, w), c) for conv, w, c in pairs)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        y, weight, a, b, center, spread, *params = ctx.saved_tensors
        (act,) = kernels.affine_relu(ctx.compiled, Affine(y, a, b))
        gact: Any = None
        gparams: list[Tensor | None] = []
        for i, (conv, g) in enumerate(zip(ctx.convs, grads, strict=True)):
            wanted = (True, *ctx.needs_input_grad[7 + 2 * i : 9 + 2 * i])
            gx, *gp = convolve_backward(g, act, conv, params[2 * i], params[2 * i + 1], wanted)
            gact = gx if gact is None else gact.add_(gx)
            gparams += gp
        del act
        norm = Norm(weight, ctx.eps, ctx.training, a, center, spread)
        return None, None, None, None, *kernels.norm_relu_backward(ctx.compiled, gact, y, b, norm), *gparams


def norm_act_conv(compiled: bool, bn: nn.BatchNorm2d, y: Tensor, *convs: nn.Conv2d) -> tuple[Tensor, ...]:
    """Convolutions of ReLU(BN(y)), keeping y. Without gradients y is overwritten."""
    in_place = not torch.is_grad_enabled()
    params = conv_params(y, *convs)
    return cast(tuple[Tensor, ...], _NormActConv.apply(compiled, in_place, bn, convs, y, bn.weight, bn.bias, *params))


class _GateConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, conv: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.conv = conv
        return convolve(x, conv, weight, None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (g,), (x, weight) = grads, ctx.saved_tensors
        gx = gweight = None
        if ctx.needs_input_grad[1]:
            gx = convolve(g, ctx.conv, weight.flip(2, 3).transpose(0, 1), None)
        if ctx.needs_input_grad[2]:
            _, gweight, _ = convolve_backward(g, x, ctx.conv, weight, None, (False, True, False))
        return None, gx, gweight


def is_gate_conv(conv: nn.Conv2d) -> bool:
    """The convolution is one that `gate_conv` knows: from 2 channels to 1, square, keeping the map's size."""
    size, k = conv.kernel_size, conv.kernel_size[0]
    return (
        (conv.in_channels, conv.out_channels, conv.groups, conv.bias) == (2, 1, 1, None)
        and (conv.stride, conv.dilation, conv.padding) == ((1, 1), (1, 1), (k // 2, k // 2))
        and size == (k, k)
        and k % 2 == 1
        and conv.padding_mode == 'zeros'
    )


def gate_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution from 2 channels to 1 that keeps the map's size, made for so few channels.

    A long plane is convolved along its long side only, with its short side folded into the channels: more arithmetic,
    but such as processors are good at. Of any other, the gradient is written as a convolution with the mirrored kernel.
    Both are several times faster on CPU than torch's own.

    Args:
        conv: The convolution, one of `is_gate_conv`.
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
    def forward(ctx: Any, compiled: bool, in_place: bool, *given: Any) -> Tensor:
        x, channels, shortcut = Affine(*given[:3]), given[3], Affine(*given[4:])
        (out,) = (kernels.gated_sum_ if in_place else kernels.gated_sum)(compiled, x, channels, shortcut)
        ctx.save_for_backward(out, *x, channels, *_needed(shortcut))
        ctx.compiled = compiled
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        out, y, a, b, channels, *shortcut = ctx.saved_tensors
        x, shortcut = Affine(y, a, b), Affine(*shortcut)
        return None, None, *kernels.gated_sum_backward(ctx.compiled, grads[0], out, x, channels, shortcut)


def _needed(shortcut: Affine) -> tuple[Tensor | None, Tensor | None]:
    """What of a shortcut its gradient takes."""
    return (None if shortcut.a is None else shortcut.y), shortcut.a


def gated_sum(compiled: bool, x: Affine, channels: Tensor | None, shortcut: Affine) -> Tensor:
    """ReLU(x * channels + shortcut), keeping x's y and the output; y is overwritten without gradients.

    Args:
        compiled: Call kernels compiled.
        x: A map (N, C, H, W).
        channels: (N, C, 1, 1) or (N, 1, 1, 1), or None.
        shortcut: A map (N, C, H, W).
    """
    return cast(Tensor, _GatedSum.apply(compiled, not torch.is_grad_enabled(), *x, channels, *shortcut))


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compiled: bool, dims: tuple[int, ...], *given: Any) -> tuple[Tensor, ...]:
        x, channels = Affine(*given[:3]), given[3]
        results = kernels.pool(compiled, x, channels, dims)
        peaks, pooled = results[::2], results[1::2]
        ctx.save_for_backward(*x, channels, *peaks)
        ctx.compiled, ctx.dims = compiled, dims
        return x.y, *peaks, *pooled

    @staticmethod
    @first_order
    def backward(ctx: Any, gz: Tensor, *more: Tensor) -> tuple[Any, ...]:
        y, a, b, channels, *peaks = ctx.saved_tensors
        counts, gpooled = more[: len(peaks)], more[len(peaks) :]
        pools: list[Tensor] = []
        for d, peak, count, g in zip(ctx.dims, peaks, counts, gpooled, strict=True):
            gpeak, gmean = g.split(1, d)
            # Equal maxima share the gradient, as in torch's amax.
            pools += peak, gpeak / count, gmean / y.shape[d]
        return None, None, *kernels.pool_backward(ctx.compiled, gz, Affine(y, a, b), channels, *pools)


class _GatedPooledSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compiled: bool, in_place: bool, dims: tuple[int, ...], *given: Any) -> Tensor:
        x, channels, shortcut, more = Affine(*given[:3]), given[3], Affine(*given[4:7]), given[7:]
        apply = kernels.gated_sum_ if in_place else kernels.gated_sum
        (out,) = apply(compiled, x, channels, shortcut, *more[len(dims) :])
        ctx.save_for_backward(out, *x, channels, *_needed(shortcut), *more)
        ctx.compiled, ctx.dims = compiled, dims
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        out, y, a, b, channels, s, a1, *more = ctx.saved_tensors
        gz, gs, ga1, gb1, *rest = kernels.gated_pooled_sum_backward(
            ctx.compiled, grads[0], out, Affine(y, a, b), channels, Affine(s, a1), ctx.dims, *more
        )
        ggates, counts = rest[: -len(ctx.dims)], rest[-len(ctx.dims) :]
        # What leaves for y is the gradient of z, and for the maxima the number of their places: `_Pool` awaits them.
        return *(None,) * 3, gz, None, None, None, gs, ga1, gb1, *counts, *ggates


def gated_pooled_sum(
    compiled: bool,
    x: Affine,
    channels: Tensor | None,
    dims: tuple[int, ...],
    gates_of: Callable[[list[Tensor]], Sequence[Tensor]],
    shortcut: Affine,
) -> Tensor:
    """`gated_sum` with a further gate, the sum of functions of what z = x * channels is pooled to.

    Args:
        compiled: Call kernels compiled.
        x: A map (N, C, H, W).
        channels: (N, C, 1, 1), or None.
        dims: Dimensions along which z is pooled.
        gates_of: For z's maximum and mean along each, of z's shape but for a 2 in place of the size: the gates.
        shortcut: A map (N, C, H, W).
    """
    y, *results = cast(tuple[Tensor, ...], _Pool.apply(compiled, dims, *x, channels))
    peaks, pooled = results[: len(dims)], results[len(dims) :]
    in_place = not torch.is_grad_enabled()
    given = *x._replace(y=y), channels, *shortcut, *peaks, *gates_of(pooled)
    return cast(Tensor, _GatedPooledSum.apply(compiled, in_place, dims, *given))


# ---- Pooling ---------------------------------------------------------------------------------------------------------


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, args: tuple[Any, ...], x: Tensor) -> Tensor:
        out, places = _aten.max_pool2d_with_indices(x.contiguous(memory_format=torch.channels_last), *args)
        ctx.format = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        if ctx.needs_input_grad[1]:
            few = x.shape[2] * x.shape[3] <= 1 << 15
            ctx.save_for_backward(places.to(torch.int16 if few else torch.int32, memory_format=ctx.format))
        ctx.args, ctx.shape = args, x.shape
        return out.contiguous(memory_format=ctx.format)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (places,) = ctx.saved_tensors
        (g,) = grads
        # Of x only shape and layout are read.
        x = torch.empty(ctx.shape, dtype=g.dtype, device=g.device, memory_format=ctx.format)
        return None, _aten.max_pool2d_with_indices_backward(g, x, *ctx.args, places.long())


def max_pool(pool: nn.MaxPool2d, x: Tensor) -> Tensor:
    """What the pooling makes of x (N, C, H, W), laid out like x; keeps where the maxima are, in 16 bits or 32.

    torch's own goes pixel by pixel on a CPU, but for maps whose channels lie side by side.
    """
    args = pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode
    return cast(Tensor, _MaxPool.apply(args, x))


# ---- BAM -------------------------------------------------------------------------------------------------------------


class _BAMGate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, compiled: bool, add: bool, gain: float, x: Tensor, channels: Tensor, pixels: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, channels, pixels)
        ctx.args = compiled, add, gain
        (out,) = kernels.bam_gate(compiled, x, channels, pixels, add, gain)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        compiled, add, gain = ctx.args
        return None, None, None, *kernels.bam_gate_backward(compiled, grads[0], *ctx.saved_tensors, add, gain)


def bam_gate(compiled: bool, x: Tensor, channels: Tensor, pixels: Tensor, add: bool, gain: float) -> Tensor:
    """x * (1 + s(channels * pixels)) * gain, or with their sum; keeping its inputs."""
    return cast(Tensor, _BAMGate.apply(compiled, add, gain, x, channels, pixels))
