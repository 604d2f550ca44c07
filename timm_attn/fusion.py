"""The same function in less memory: ResNet blocks that recompute what is cheap, and fold what is constant.

A convolution's backward needs its input, a BatchNorm's its own. Between them lie a BatchNorm's output, a ReLU and the
attention, which plain autograd keeps too, although all of them follow from the convolution's output in a few passes
over memory. A fused block keeps the outputs of its convolutions and its own output, and recomputes the rest.

Shapes: N batch, C channels, H, W sides of the map.
"""

import contextlib
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from timm.layers import DropPath
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .layers import BAM, CBAM, ECA, SRM, Attention, SelectiveKernel, SqueezeExcite
from .models.sk_resnet import SKBottleneck

_aten = torch.ops.aten


# ---- Kernels: what torch.compile makes one pass of ------------------------------------------------------------------


def _plane_moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each plane, (N, C, 1, 1) both."""
    y = y if y.dtype == torch.float64 else y.float()
    mean = y.mean((2, 3), keepdim=True)
    return mean, (y - mean).square().mean((2, 3), keepdim=True)


def _channel_moments(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Moments (1, C, 1, 1) over the batch, of the moments of its planes."""
    center = mean.mean(0, keepdim=True)
    return center, (var + (mean - center).square()).mean(0, keepdim=True)


def _batch_moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, (C,) both."""
    mean, var = _channel_moments(*_plane_moments(y))
    return mean.flatten(), var.flatten()


def _factors(weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """BatchNorm as y * a + b, (C, 1, 1) both."""
    a = weight * (var + eps).rsqrt()
    return a[:, None, None], (bias - mean * a)[:, None, None]


def _normalised_relu(y: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    a, b = _factors(weight, bias, mean, var, eps)
    return (y * a + b).relu().to(y.dtype)


def _affine_add_relu(y: Tensor, a: Tensor, b: Tensor, shortcut: Tensor) -> Tensor:
    return (y * a + b + shortcut).relu().to(y.dtype)


def _affine_norm_relu(
        y: Tensor,
        a: Tensor,
        b: Tensor,
        y2: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        eps: float,
) -> Tensor:
    a2, b2 = _factors(weight, bias, mean, var, eps)
    return (y * a + b + y2 * a2 + b2).relu().to(y.dtype)


def _gate_add_relu(y: Tensor, gate: Tensor, shortcut: Tensor) -> Tensor:
    return (y * gate + shortcut).relu()


def _gates_add_relu(y: Tensor, channels: Tensor, pixels: Tensor, shortcut: Tensor) -> Tensor:
    return (y * channels * pixels + shortcut).relu()


def _gate_pool(y: Tensor, gate: Tensor) -> Tensor:
    """Maximum and mean over the channels of y * gate, (N, 2, H, W)."""
    y = y * gate
    return torch.cat([y.amax(1, keepdim=True), y.mean(1, keepdim=True)], dim=1)


def _affine_sums(g: Tensor, out: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the factor and the summand of an affine-and-ReLU, plane by plane, (N, C, 1, 1) both."""
    g = torch.where(out > 0, g, 0)
    g = g if g.dtype == torch.float64 else g.float()
    return (g * y).sum((2, 3), keepdim=True), g.sum((2, 3), keepdim=True)


def _affine_spread(
        g: Tensor,
        out: Tensor,
        y: Tensor,
        a: Tensor,
        slope: Tensor,
        offset: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of y, to which its moments' are added as slope * y + offset, and of the shortcut."""
    g = torch.where(out > 0, g, 0)
    return (g * a + y * slope + offset).to(y.dtype), g


@functools.cache
def _compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    # One graph for all sizes: a ResNet has too many for one each.
    graph = torch.compile(kernel, dynamic=True)
    # torch.compile takes the sizes of parameters as constants, unlike those of the same tensors detached.
    return lambda *args: graph(*(a.detach() if isinstance(a, Tensor) else a for a in args))


@functools.cache
def _compiler_works(device: str) -> bool:
    try:
        _compiled(_plane_moments)(torch.zeros(2, 3, 4, 5, device=device))
    except Exception as e:
        warnings.warn(
            f'timm_attn.fuse cannot compile for {device} ({type(e).__name__}: {str(e).splitlines()[0]}); blocks keep '
            'less memory, but are not faster. Install a C++ compiler (CPU) or Triton (GPU), or pass compile=False.',
            stacklevel=3)
        return False
    return True


# ---- BatchNorm in two steps: the moments once, then normalising as often as needed ---------------------------------


def _count(bn: nn.BatchNorm2d, y: Tensor) -> None:
    if y.numel() <= y.shape[1]:
        bn(y)  # raises: one value has no variance
    cast(Tensor, bn.num_batches_tracked).add_(1)


def _track(bn: nn.BatchNorm2d, y: Tensor, mean: Tensor, var: Tensor) -> None:
    """Moves the running statistics as a BatchNorm does for y of these moments."""
    _count(bn, y)
    n, momentum = y.numel() // y.shape[1], cast(float, bn.momentum)
    running_mean, running_var = cast(Tensor, bn.running_mean), cast(Tensor, bn.running_var)
    running_mean.lerp_(mean.flatten().to(running_mean.dtype), momentum)
    running_var.lerp_((var.flatten() * (n / (n - 1))).to(running_var.dtype), momentum)


def _moments(bn: nn.BatchNorm2d, y: Tensor, compiled: bool) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) that `bn` normalises by; the running statistics move here and nowhere else."""
    mean, var = cast(Tensor, bn.running_mean), cast(Tensor, bn.running_var)
    if not bn.training:
        return mean, var
    if compiled:
        mean, var = _compiled(_batch_moments)(y)
        _track(bn, y, mean, var)
        return mean, var
    _count(bn, y)
    return torch.batch_norm_update_stats(y, mean, var, cast(float, bn.momentum))


def _norm(y: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return torch.native_batch_norm(y, weight, bias, mean, var, False, 0.0, eps)[0]


def _norm_relu(
        y: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        eps: float,
        compiled: bool,
) -> Tensor:
    if compiled:
        return _compiled(_normalised_relu)(y, weight, bias, mean, var, eps)
    return _norm(y, weight, bias, mean, var, eps).relu_()


def _norm_backward(
        g: Tensor,
        y: Tensor,
        weight: Tensor,
        mean: Tensor,
        var: Tensor,
        training: bool,
        eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, weight and bias."""
    return _aten.native_batch_norm_backward(
        g, y, weight, mean, var, mean, (var + eps).rsqrt(), training, eps, [True, True, True])


# ---- Convolutions behind something that is recomputed --------------------------------------------------------------


def _conv(x: Tensor, conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> Tensor:
    padding = cast(tuple[int, ...], conv.padding)
    return torch.convolution(x, weight, bias, conv.stride, padding, conv.dilation, False, (0, 0), conv.groups)


def _conv_backward(
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
        g, x, weight, sizes, conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups,
        [wanted[0], wanted[1], wanted[2] and bias is not None])


def _conv_params(y: Tensor, *convs: nn.Conv2d) -> list[Tensor | None]:
    """Weight and bias of each convolution, in the precision in which autocast would convolve y."""
    dtype = y.dtype if torch.is_autocast_enabled(y.device.type) else None
    params = [p for conv in convs for p in (conv.weight, conv.bias)]
    return [p if p is None or dtype is None else p.to(dtype) for p in params]


class _NormActConv(torch.autograd.Function):
    """Convolutions of ReLU(BN(y)), keeping y."""

    @staticmethod
    def forward(
            ctx: Any,
            bn: nn.BatchNorm2d,
            convs: tuple[nn.Conv2d, ...],
            compiled: bool,
            y: Tensor,
            weight: Tensor,
            bias: Tensor,
            *params: Tensor | None,
    ) -> tuple[Tensor, ...]:
        moments = _moments(bn, y, compiled)
        a = _norm_relu(y, weight, bias, *moments, bn.eps, compiled)
        ctx.save_for_backward(y, weight, bias, *moments, *params)
        ctx.convs, ctx.training, ctx.eps, ctx.compiled = convs, bn.training, bn.eps, compiled
        return tuple(
            _conv(a, conv, cast(Tensor, w), b) for conv, w, b in zip(convs, params[::2], params[1::2], strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        y, weight, bias, mean, var, *params = ctx.saved_tensors
        a = _norm_relu(y, weight, bias, mean, var, ctx.eps, ctx.compiled)
        ga: Any = None
        gparams: list[Tensor | None] = []
        for i, (conv, g) in enumerate(zip(ctx.convs, grads, strict=True)):
            wanted = (True, *ctx.needs_input_grad[6 + 2 * i:8 + 2 * i])
            gx, *gp = _conv_backward(g, a, conv, params[2 * i], params[2 * i + 1], wanted)
            ga = gx if ga is None else ga.add_(gx)
            gparams += gp
        ga = _aten.threshold_backward(ga, a, 0)
        return None, None, None, *_norm_backward(ga, y, weight, mean, var, ctx.training, ctx.eps), *gparams


# ---- Attention that leaves no trace --------------------------------------------------------------------------------


class _Replay:
    """Calls a module twice: in forward for its output, without a graph, and in backward for its gradients.

    Args:
        module: The attention.
        device: Type of the device whose autocast it runs under.
    """

    def __init__(self, module: nn.Module, device: str) -> None:
        self.module = module
        self.names = [name for name, _ in module.named_parameters()]
        self.modes = [m.training for m in module.modules()]
        self.device = device
        self.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        # Without autocast's cache: a cast made without gradients would be taken again where they are wanted.
        return torch.autocast(self.device, self.dtype, enabled=self.dtype is not None, cache_enabled=False)

    @contextlib.contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """Every module in its mode of the forward pass; running statistics stay where they are."""
        now: list[tuple[Any, bool, bool]] = [
            (m, m.training, getattr(m, 'track_running_stats', False)) for m in self.module.modules()]
        try:
            for (m, _, tracks), mode in zip(now, self.modes, strict=True):
                m.training = mode
                if tracks:
                    m.track_running_stats = False
            yield
        finally:
            for m, mode, tracks in now:
                m.training = mode
                if tracks:
                    m.track_running_stats = True

    def forward(self, *x: Tensor) -> Any:
        with self._precision():
            return self.module(*x)

    def again(self, x: Sequence[Tensor], params: Sequence[Tensor]) -> Any:
        """The output or outputs once more, with a graph.

        Args:
            x: The inputs of the forward pass.
            params: The module's parameters of the forward pass.
        """
        self.x = [t.detach().requires_grad_() for t in x]
        self.leaves = [p.detach().requires_grad_(p.requires_grad) for p in params]
        with torch.enable_grad(), self._precision(), self._as_it_was():
            self.y = functional_call(self.module, dict(zip(self.names, self.leaves, strict=True)), tuple(self.x))
        return self.y

    def backward(self, *g: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        """Gradients of the inputs and of each parameter; `again` is forgotten.

        Args:
            g: Gradient of the output or outputs.
        """
        wanted = [leaf for leaf in self.leaves if leaf.requires_grad]
        y = self.y if isinstance(self.y, tuple) else (self.y,)
        grads = torch.autograd.grad(
            y, [*self.x, *wanted], [g.to(y.dtype) for g, y in zip(g, y, strict=True)], materialize_grads=True)
        rest = iter(grads[len(self.x):])
        found = list(grads[:len(self.x)]), [next(rest) if leaf.requires_grad else None for leaf in self.leaves]
        del self.x, self.leaves, self.y
        return found


class _Recomputed(torch.autograd.Function):
    """A module of one input, keeping nothing but that."""

    @staticmethod
    def forward(ctx: Any, module: nn.Module, x: Tensor, *params: Tensor) -> Tensor:
        ctx.replay = _Replay(module, x.device.type)
        ctx.save_for_backward(x, *params)
        return ctx.replay.forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, *params = ctx.saved_tensors
        ctx.replay.again([x], params)
        (gx,), gparams = ctx.replay.backward(g)
        return None, gx, *gparams


class _Tail(torch.autograd.Function):
    """ReLU(attention(BN(y)) * keep + shortcut), keeping y and the output.

    `shortcut` is the block's input, or what goes into the BatchNorm `down` of its downsample; `keep` (N, 1, 1, 1) is
    drop-path's mask.
    """

    @staticmethod
    def forward(
            ctx: Any,
            bn: nn.BatchNorm2d,
            attn: nn.Module | None,
            down: nn.BatchNorm2d | None,
            compiled: bool,
            y: Tensor,
            weight: Tensor,
            bias: Tensor,
            shortcut: Tensor,
            down_weight: Tensor | None,
            down_bias: Tensor | None,
            keep: Tensor | None,
            *params: Tensor,
    ) -> Tensor:
        moments = _moments(bn, y, compiled)
        out = _norm(y, weight, bias, *moments, bn.eps)
        ctx.replay = None
        if attn is not None:
            ctx.replay = _Replay(attn, y.device.type)
            out = ctx.replay.forward(out)
        if keep is not None:
            out = out.mul_(keep)
        down_saved: tuple[Tensor | None, ...] = (None,) * 5
        ctx.down = None
        if down is None:
            out = out.add_(shortcut)
        else:
            assert down_weight is not None and down_bias is not None
            ctx.down = (down.training, down.eps)
            down_moments = _moments(down, shortcut, compiled)
            down_saved = (shortcut, down_weight, down_bias, *down_moments)
            out = out.add_(_norm(shortcut, down_weight, down_bias, *down_moments, down.eps))
        out = out.relu_()
        ctx.save_for_backward(y, weight, bias, *moments, out, keep, *down_saved, *params)
        ctx.training, ctx.eps = bn.training, bn.eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        y, weight, bias, mean, var, out, keep, *rest = ctx.saved_tensors
        (yd, dw, _, dmean, dvar), params = rest[:5], rest[5:]
        g = _aten.threshold_backward(g, out, 0)
        gshort: tuple[Tensor | None, ...] = (g, None, None)
        if ctx.down is not None:
            gshort = _norm_backward(g, yd, dw, dmean, dvar, *ctx.down)
        if keep is not None:
            g = g * keep
        gparams: list[Tensor | None] = []
        if ctx.replay is not None:
            ctx.replay.again([_norm(y, weight, bias, mean, var, ctx.eps)], params)
            (g,), gparams = ctx.replay.backward(g)
        return (
            None, None, None, None, *_norm_backward(g, y, weight, mean, var, ctx.training, ctx.eps), *gshort, None,
            *gparams)


# ---- Gates of channels: with the BatchNorm, an affine function of the planes' moments --------------------------------


def _se_gate(attn: nn.Module, mean: Tensor, var: Tensor, m: int, dtype: torch.dtype) -> Tensor:
    # A plane's mean is a plane of one pixel, and that has itself as its mean.
    return cast(SqueezeExcite | ECA, attn).channel_gate(mean.to(dtype))


def _srm_gate(attn: nn.Module, mean: Tensor, var: Tensor, m: int, dtype: torch.dtype) -> Tensor:
    srm = cast(SRM, attn)
    std = (var * (m / (m - 1 + 1 // m)) + 1e-5).sqrt()
    z = mean.flatten(1) * srm.cfc[:, 0] + std.flatten(1) * srm.cfc[:, 1]
    return srm.bn(z[:, :, None, None]).sigmoid()


# attention: its gate (N, C, 1, 1) for the means and variances of planes (N, C, 1, 1) of m pixels
_CHANNEL_GATES: dict[type[nn.Module], Callable[[nn.Module, Tensor, Tensor, int, torch.dtype], Tensor]] = {
    SqueezeExcite: _se_gate,
    ECA: _se_gate,
    SRM: _srm_gate,
}


class _ChannelFactors(nn.Module):
    """attention(BN(y)) * keep as y * a + b, for the moments of y's planes.

    Args:
        bn: The BatchNorm.
        attn: An attention with an entry in `_CHANNEL_GATES`, or None.
        keep: Drop-path's mask (N, 1, 1, 1).
        m: Pixels of a plane.
        dtype: Type of y.
    """

    def __init__(
            self,
            bn: nn.BatchNorm2d,
            attn: nn.Module | None,
            keep: Tensor | None,
            m: int,
            dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.bn, self.attn = bn, attn
        self.keep, self.m, self.dtype = keep, m, dtype

    def moments(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of y's planes, (N, C, 1, 1) both; 0 where nothing depends on them."""
        if self.bn.training or type(self.attn) is SRM:
            return _compiled(_plane_moments)(y)
        accurate = torch.float64 if y.dtype == torch.float64 else torch.float32
        zero = y.new_zeros((*y.shape[:2], 1, 1), dtype=accurate)
        return (zero if self.attn is None else y.mean((2, 3), keepdim=True, dtype=accurate)), zero

    def forward(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        bn = self.bn
        if bn.training:
            center, spread = _channel_moments(mean, var)
        else:
            center = cast(Tensor, bn.running_mean)[:, None, None]
            spread = cast(Tensor, bn.running_var)[:, None, None]
        a = bn.weight[:, None, None] * (spread + bn.eps).rsqrt()  # (1, C, 1, 1)
        b = bn.bias[:, None, None] - center * a
        gate = None
        if self.attn is not None:
            gate = _CHANNEL_GATES[type(self.attn)](self.attn, a * mean + b, a.square() * var, self.m, self.dtype)
            gate = gate * cast(Attention, self.attn).gain
        if self.keep is not None:
            gate = self.keep if gate is None else gate * self.keep
        a, b = (a, b) if gate is None else (a * gate, b * gate)
        return a.expand_as(mean), b.expand_as(mean)


class _ChannelTail(torch.autograd.Function):
    """`_Tail` for a gate of channels: two passes over the map forward, two backward."""

    @staticmethod
    def forward(
            ctx: Any,
            factors: _ChannelFactors,
            down: nn.BatchNorm2d | None,
            y: Tensor,
            shortcut: Tensor,
            down_weight: Tensor | None,
            down_bias: Tensor | None,
            *params: Tensor,
    ) -> Tensor:
        mean, var = factors.moments(y)
        ctx.replay = _Replay(factors, y.device.type)
        a, b = ctx.replay.forward(mean, var)
        if factors.bn.training:
            _track(factors.bn, y, *_channel_moments(mean, var))
        down_saved: tuple[Tensor | None, ...] = (None,) * 4
        if down is None:
            out = _compiled(_affine_add_relu)(y, a, b, shortcut)
        else:
            assert down_weight is not None and down_bias is not None
            moments = _moments(down, shortcut, True)
            down_saved = (shortcut, down_weight, *moments)
            out = _compiled(_affine_norm_relu)(y, a, b, shortcut, down_weight, down_bias, *moments, down.eps)
        ctx.down = None if down is None else (down.training, down.eps)
        ctx.save_for_backward(y, mean, var, out, *down_saved, *params)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        y, mean, var, out, *rest = ctx.saved_tensors
        (yd, dw, dmean, dvar), params = rest[:4], rest[4:]
        a, _ = ctx.replay.again((mean, var), params)
        a = a.detach()
        (gmean, gvar), gparams = ctx.replay.backward(*_compiled(_affine_sums)(g, out, y))
        m = y.shape[2] * y.shape[3]
        slope = gvar * (2 / m)
        gy, g = _compiled(_affine_spread)(g, out, y, a, slope, gmean / m - slope * mean)
        gshort = (g, None, None) if ctx.down is None else _norm_backward(g, yd, dw, dmean, dvar, *ctx.down)
        return None, None, gy, *gshort, *gparams


# ---- Selective kernels ---------------------------------------------------------------------------------------------


class _SelectConv(torch.autograd.Function):
    """A convolution of a selective kernel's mix of ReLU(BN(y)) of both branches, keeping the two y."""

    @staticmethod
    def forward(
            ctx: Any,
            sk: SelectiveKernel,
            conv: nn.Conv2d,
            compiled: bool,
            y0: Tensor,
            weight0: Tensor,
            bias0: Tensor,
            y1: Tensor,
            weight1: Tensor,
            bias1: Tensor,
            conv_weight: Tensor,
            conv_bias: Tensor | None,
            *params: Tensor,
    ) -> Tensor:
        moments0, moments1 = _moments(sk.bn1, y0, compiled), _moments(sk.bn2, y1, compiled)
        u0 = _norm_relu(y0, weight0, bias0, *moments0, sk.bn1.eps, compiled)
        u1 = _norm_relu(y1, weight1, bias1, *moments1, sk.bn2.eps, compiled)
        ctx.replay = _Replay(_Mix(sk), y0.device.type)
        ctx.save_for_backward(
            y0, weight0, bias0, *moments0, y1, weight1, bias1, *moments1, conv_weight, conv_bias, *params)
        ctx.conv, ctx.compiled = conv, compiled
        ctx.norms = (sk.bn1.training, sk.bn1.eps), (sk.bn2.training, sk.bn2.eps)
        return _conv(ctx.replay.forward(u0, u1), conv, conv_weight, conv_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        branches, (conv_weight, conv_bias, *params) = ctx.saved_tensors[:10], ctx.saved_tensors[10:]
        (y0, w0, b0, mean0, var0), (y1, w1, b1, mean1, var1) = branches[:5], branches[5:]
        (training0, eps0), (training1, eps1) = ctx.norms
        u0 = _norm_relu(y0, w0, b0, mean0, var0, eps0, ctx.compiled)
        u1 = _norm_relu(y1, w1, b1, mean1, var1, eps1, ctx.compiled)
        mix = ctx.replay.again((u0, u1), params).detach()
        gm, *gconv = _conv_backward(g, mix, ctx.conv, conv_weight, conv_bias, (True, *ctx.needs_input_grad[9:11]))
        (g0, g1), gparams = ctx.replay.backward(gm)
        g0, g1 = _aten.threshold_backward(g0, u0, 0), _aten.threshold_backward(g1, u1, 0)
        return (
            None, None, None, *_norm_backward(g0, y0, w0, mean0, var0, training0, eps0),
            *_norm_backward(g1, y1, w1, mean1, var1, training1, eps1), *gconv, *gparams)


class _Mix(nn.Module):
    """The part of a selective kernel behind its two branches."""

    choice = SelectiveKernel.choice

    def __init__(self, sk: SelectiveKernel) -> None:
        super().__init__()
        self.fc1, self.bn, self.fc2 = sk.fc1, sk.bn, sk.fc2

    def forward(self, u0: Tensor, u1: Tensor) -> Tensor:
        a = self.choice(u0 + u1).to(u0.dtype)
        return u0 * a[:, 0] + u1 * a[:, 1]


# ---- Blocks --------------------------------------------------------------------------------------------------------


def _hooked(module: nn.Module) -> bool:
    """Someone looks at a part of the module (not at the whole), so every part must be called."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in module.modules() if m is not module)


def _ordinary(x: Any) -> bool:
    """A tensor with data, in plain execution: no tracing, compiling or exporting, no transform of torch.func."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and not x.is_meta
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active())


def _plain_conv(m: nn.Module) -> bool:
    return type(m) is nn.Conv2d and m.padding_mode == 'zeros' and not isinstance(m.padding, str)


def _plain_norm(m: nn.Module, norm: type[nn.Module] = nn.BatchNorm2d) -> bool:
    if type(m) is nn.BatchNorm2d:
        return norm is nn.BatchNorm2d and m.affine and m.track_running_stats and m.momentum is not None
    return type(m) is norm


def _absent(m: nn.Module | None) -> bool:
    return m is None or type(m) is nn.Identity


def _attn_of(block: Any) -> nn.Module | None:
    return None if _absent(block.se) else cast(nn.Module, block.se)


def _shortcut(block: Any, x: Tensor) -> tuple[nn.BatchNorm2d | None, Tensor]:
    """The downsample's last BatchNorm with what goes into it, or None with the shortcut itself."""
    if block.downsample is None:
        return None, x
    *before, last = cast(nn.Sequential, block.downsample)
    for m in before:
        x = m(x)
    return (cast(nn.BatchNorm2d, last), x) if _plain_norm(last) else (None, last(x))


def _tail(block: Any, bn: Any, y: Tensor, x: Tensor) -> Tensor:
    attn = _attn_of(block)
    down, shortcut = _shortcut(block, x)
    keep = None
    drop = block.drop_path
    if isinstance(drop, DropPath) and drop.drop_prob and drop.training:
        # The draw and the scale of timm's drop_path.
        keep = y.new_empty((y.shape[0], 1, 1, 1)).bernoulli_(1 - drop.drop_prob)
        if drop.scale_by_keep and drop.drop_prob < 1:
            keep.div_(1 - drop.drop_prob)
    downs = (down.weight, down.bias) if down else (None, None)
    if block.compiled and (attn is None or type(attn) in _CHANNEL_GATES):
        factors = _ChannelFactors(bn, attn, keep, y.shape[2] * y.shape[3], y.dtype)
        return cast(Tensor, _ChannelTail.apply(factors, down, y, shortcut, *downs, *factors.parameters()))
    return cast(Tensor, _Tail.apply(
        bn, attn, down, block.compiled, y, bn.weight, bn.bias, shortcut, *downs, keep,
        *(attn.parameters() if attn else ())))


def _frozen_tail(attn: nn.Module | None, y: Tensor, shortcut: Tensor) -> Tensor:
    """ReLU(attention(y) + shortcut) without gradients; y may be overwritten."""
    if type(attn) in (SqueezeExcite, ECA, SRM):
        attn = cast(SqueezeExcite | ECA | SRM, attn)
        return _compiled(_gate_add_relu)(y, attn.channel_gate(y) * attn.gain, shortcut)
    if type(attn) is CBAM and attn.channel and attn.spatial:
        gate = attn.channel_gate(y)
        pixels = attn.bn(attn.conv(_compiled(_gate_pool)(y, gate))).sigmoid() * attn.gain  # (N, 1, H, W)
        return _compiled(_gates_add_relu)(y, gate, pixels, shortcut)
    if attn is not None:
        y = attn(y)
    return y.add_(shortcut).relu_()


def _norm_act_conv(compiled: bool, bn: Any, y: Tensor, *convs: nn.Conv2d) -> tuple[Tensor, ...]:
    return cast(
        tuple[Tensor, ...], _NormActConv.apply(bn, convs, compiled, y, bn.weight, bn.bias, *_conv_params(y, *convs)))


class _Fused(nn.Module):
    """What fused blocks share: they take the base class's way whenever theirs would not be the same."""

    norms: tuple[str, ...]
    convs: tuple[str, ...]
    compiled = False
    frozen = False
    # timm's, in both kinds of block
    se: Any
    aa: Any
    drop_block: Any
    drop_path: Any
    downsample: Any

    def fusible(self, norm: type[nn.Module]) -> bool:
        """The block is made of what its own ways know, with norms of this type."""
        acts = (m for name, m in self.named_children() if name.startswith('act'))
        return (
            all(_plain_norm(self.get_submodule(name), norm) for name in self.norms)
            and all(_plain_conv(self.get_submodule(name)) for name in self.convs)
            and all(type(m) in (nn.ReLU, nn.Identity) for m in acts)
            and _absent(self.aa) and _absent(self.drop_block)
            and (_absent(self.drop_path) or type(self.drop_path) is DropPath)
            and (_absent(self.se) or isinstance(self.se, Attention))
            and (self.downsample is None or type(self.downsample) is nn.Sequential))

    def forward(self, x: Tensor) -> Tensor:
        grad = torch.is_grad_enabled()
        if (grad or self.compiled) and _ordinary(x) and not _hooked(self):
            if self.frozen and not grad and self.fusible(nn.Identity):
                return self.frozen_forward(x)
            if not self.frozen and self.fusible(nn.BatchNorm2d):
                return self.fused_forward(x)
        return super().forward(x)

    def fused_forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def frozen_forward(self, x: Tensor) -> Tensor:
        """The forward pass where BatchNorms are folded into convolutions."""
        shortcut = x if self.downsample is None else self.downsample(x)
        *convs, last = self.convs
        for name in convs:
            x = self.get_submodule(name)(x).relu_()
        return _frozen_tail(self.se, self.get_submodule(last)(x), shortcut)


class FusedBasicBlock(_Fused, BasicBlock):
    """timm's BasicBlock that keeps the outputs of its convolutions and its own."""

    norms = ('bn1', 'bn2')
    convs = ('conv1', 'conv2')

    def fused_forward(self, x: Tensor) -> Tensor:
        (y,) = _norm_act_conv(self.compiled, self.bn1, self.conv1(x), self.conv2)
        return _tail(self, self.bn2, y, x)


class FusedBottleneck(_Fused, Bottleneck):
    """timm's Bottleneck that keeps the outputs of its convolutions and its own."""

    norms = ('bn1', 'bn2', 'bn3')
    convs = ('conv1', 'conv2', 'conv3')

    def fused_forward(self, x: Tensor) -> Tensor:
        (y,) = _norm_act_conv(self.compiled, self.bn1, self.conv1(x), self.conv2)
        (y,) = _norm_act_conv(self.compiled, self.bn2, y, self.conv3)
        return _tail(self, self.bn3, y, x)


class FusedSKBottleneck(_Fused, SKBottleneck):
    """The selective-kernel bottleneck that keeps the outputs of its convolutions and its own."""

    norms = ('bn1', 'conv2.bn1', 'conv2.bn2', 'bn3')
    convs = ('conv1', 'conv2.conv1', 'conv2.conv2', 'conv3')

    def fused_forward(self, x: Tensor) -> Tensor:
        sk = cast(SelectiveKernel, self.conv2)
        y0, y1 = _norm_act_conv(self.compiled, self.bn1, self.conv1(x), sk.conv1, sk.conv2)
        y = cast(Tensor, _SelectConv.apply(
            sk, self.conv3, self.compiled, y0, sk.bn1.weight, sk.bn1.bias, y1, sk.bn2.weight, sk.bn2.bias,
            *_conv_params(y0, self.conv3), *_Mix(sk).parameters()))
        return _tail(self, self.bn3, y, x)


    def frozen_forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.conv2(self.conv1(x).relu_())
        return _frozen_tail(self.se, self.conv3(x), shortcut)


class FusedBAM(BAM):
    """BAM that keeps its input alone."""

    def forward(self, x: Tensor) -> Tensor:
        if _ordinary(x) and torch.is_grad_enabled() and not _hooked(self):
            return cast(Tensor, _Recomputed.apply(self._plain(), x, *self.parameters()))
        return super().forward(x)

    def _plain(self) -> nn.Module:
        """The same module, sharing everything, with the forward pass of BAM."""
        plain = BAM.__new__(BAM)
        plain.__dict__ = self.__dict__
        return plain


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    BasicBlock: FusedBasicBlock,
    Bottleneck: FusedBottleneck,
    SKBottleneck: FusedSKBottleneck,
    BAM: FusedBAM,
}


def _fold(holder: nn.Module, conv: str, parent: nn.Module, bn: str) -> None:
    """Folds a BatchNorm into the convolution before it; an Identity takes its place."""
    before, norm = holder.get_submodule(conv), parent.get_submodule(bn)
    if _plain_conv(before) and _plain_norm(norm):
        setattr(holder, conv, fuse_conv_bn_eval(cast(nn.Conv2d, before), cast(nn.BatchNorm2d, norm)))
        setattr(parent, bn, nn.Identity())


def _freeze(model: nn.Module) -> None:
    model.eval()
    for m in list(model.modules()):
        if isinstance(m, ResNet):
            stem = m.conv1
            if isinstance(stem, nn.Sequential):
                _fold(stem, str(len(stem) - 1), m, 'bn1')
            else:
                _fold(m, 'conv1', m, 'bn1')
        elif isinstance(m, nn.Sequential):
            names = [name for name, _ in m.named_children()]
            for conv, bn in itertools.pairwise(names):
                _fold(m, conv, m, bn)
        elif isinstance(m, _Fused):
            for norm in m.norms:
                path, _, bn = norm.rpartition('.')
                holder = m.get_submodule(path)
                _fold(holder, bn.replace('bn', 'conv'), holder, bn)
            m.frozen = True


def fuse(model: nn.Module, *, freeze: bool = False, compile: bool = True) -> nn.Module:
    """Has the blocks of a ResNet keep less for backward and take fewer passes over memory, in place.

    Outputs, gradients, keys and running statistics stay. Gradients of gradients are not available. A block takes its
    ordinary way where the fused one would not be the same: under other compilers and exporters, and when its parts
    have hooks or have been replaced by others.

    Args:
        model: A registered or injected model, or timm's plain ResNet.
        freeze: For inference only: put the model into eval mode and fold each BatchNorm into the convolution before
            it. The BatchNorms' keys vanish, and the convolutions get biases.
        compile: Compile the passes between convolutions with torch.compile, once for all blocks (up to a minute, at
            the first passes); without it, blocks keep less but are not faster.

    Returns:
        The same model.
    """
    found = [m for m in model.modules() if type(m) in _FUSED]
    done = [m for m in model.modules() if type(m) in _FUSED.values()]
    if not found and not done:
        warnings.warn(
            f'{type(model).__name__} has no block that timm_attn.fuse knows (timm.models.resnet and those of '
            'timm_attn): it stays as it is.', stacklevel=2)
        return model
    compiled = compile and _compiler_works(next(model.parameters()).device.type)
    for m in found:
        m.__class__ = _FUSED[type(m)]
    for m in found + done:
        if isinstance(m, _Fused):
            m.compiled = compiled
    if freeze:
        _freeze(model)
    return model
