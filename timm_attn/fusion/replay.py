"""Attention that leaves no trace: its forward pass is run again, with a graph, in the backward pass."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from ..layers import SelectiveKernel
from . import kernels
from .functions import conv_params, convolve, convolve_backward, factors


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
            (m, m.training, getattr(m, 'track_running_stats', False)) for m in self.module.modules()
        ]
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

    def again(self, x: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
        """The output once more, with a graph.

        Args:
            x: The inputs of the forward pass.
            params: The module's parameters of the forward pass.
        """
        self.x = [t.detach().requires_grad_() for t in x]
        self.leaves = [p.detach().requires_grad_(p.requires_grad) for p in params]
        with torch.enable_grad(), self._precision(), self._as_it_was():
            self.y = functional_call(self.module, dict(zip(self.names, self.leaves, strict=True)), tuple(self.x))
        return self.y

    def backward(self, g: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        """Gradients of the inputs and of each parameter; `again` is forgotten.

        Args:
            g: Gradient of the output.
        """
        wanted = [leaf for leaf in self.leaves if leaf.requires_grad]
        grads = torch.autograd.grad(self.y, [*self.x, *wanted], g.to(self.y.dtype), materialize_grads=True)
        rest = iter(grads[len(self.x) :])
        found = list(grads[: len(self.x)]), [next(rest) if leaf.requires_grad else None for leaf in self.leaves]
        del self.x, self.leaves, self.y
        return found


class _AttendedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        compiled: bool,
        attn: nn.Module,
        y: Tensor,
        a: Tensor,
        b: Tensor,
        shortcut: Tensor,
        a1: Tensor | None,
        b1: Tensor | None,
        keep: Tensor | None,
        *params: Tensor,
    ) -> Tensor:
        ctx.replay = _Replay(attn, y.device.type)
        out = ctx.replay.forward(*kernels.affine(compiled, y, a, b))
        (out,) = kernels.gated_sum_(compiled, out, None, None, keep, shortcut, a1, b1, False)
        ctx.save_for_backward(out, y, a, b, None if a1 is None else shortcut, a1, keep, *params)
        ctx.compiled = compiled
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        out, y, a, b, shortcut, a1, keep, *params = ctx.saved_tensors
        g, *gshortcut = kernels.masked_by(ctx.compiled, g, out, shortcut, a1)
        ctx.replay.again(kernels.affine(ctx.compiled, y, a, b), params)
        (gx,), gparams = ctx.replay.backward(g if keep is None else g * keep)
        return None, None, *kernels.affine_backward(ctx.compiled, gx, y, a), *gshortcut, None, *gparams


def attended_sum(
    compiled: bool,
    attn: nn.Module,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    shortcut: Tensor,
    a1: Tensor | None,
    b1: Tensor | None,
    keep: Tensor | None,
) -> Tensor:
    """ReLU(attn(y * a + b) * keep + shortcut * a1 + b1), keeping y and the output."""
    return cast(Tensor, _AttendedSum.apply(compiled, attn, y, a, b, shortcut, a1, b1, keep, *attn.parameters()))


# ---- Selective kernels ----------------------------------------------------------------------------------------------


class _Mix(nn.Module):
    """The part of a selective kernel behind its two branches."""

    choice = SelectiveKernel.choice

    def __init__(self, sk: SelectiveKernel) -> None:
        super().__init__()
        self.fc1, self.bn, self.fc2 = sk.fc1, sk.bn, sk.fc2

    def forward(self, u0: Tensor, u1: Tensor) -> Tensor:
        a = self.choice(u0 + u1).to(u0.dtype)
        return u0 * a[:, 0] + u1 * a[:, 1]


class _SelectConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        compiled: bool,
        sk: SelectiveKernel,
        after: nn.Conv2d,
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
        saved: list[Tensor] = []
        branches: list[Tensor] = []
        for bn, y, weight, bias in ((sk.bn1, y0, weight0, bias0), (sk.bn2, y1, weight1, bias1)):
            a, b, center, spread, *_ = factors(compiled, bn, y, weight, bias)
            branches += kernels.affine_relu(compiled, y, a, b)
            saved += [y, weight, a, b, center, spread]
        ctx.replay = _Replay(_Mix(sk), y0.device.type)
        ctx.save_for_backward(*saved, conv_weight, conv_bias, *params)
        ctx.compiled, ctx.conv = compiled, after
        ctx.norms = (sk.bn1.training, sk.bn1.eps), (sk.bn2.training, sk.bn2.eps)
        return convolve(ctx.replay.forward(*branches), after, conv_weight, conv_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        saved, (conv_weight, conv_bias, *params) = ctx.saved_tensors[:12], ctx.saved_tensors[12:]
        halves = saved[:6], saved[6:]
        branches = [kernels.affine_relu(ctx.compiled, y, a, b)[0] for y, _, a, b, *_ in halves]
        mix = ctx.replay.again(branches, params).detach()
        gm, *gconv = convolve_backward(g, mix, ctx.conv, conv_weight, conv_bias, (True, *ctx.needs_input_grad[9:11]))
        gbranches, gparams = ctx.replay.backward(cast(Tensor, gm))
        gnorms: list[Tensor] = []
        for g, (y, weight, a, b, center, spread), (training, eps) in zip(gbranches, halves, ctx.norms, strict=True):
            gnorms += kernels.norm_relu_backward(ctx.compiled, g, y, weight, eps, training, a, b, center, spread)
        return None, None, None, *gnorms, *gconv, *gparams


def select_conv(compiled: bool, sk: SelectiveKernel, after: nn.Conv2d, y0: Tensor, y1: Tensor) -> Tensor:
    """A convolution of a selective kernel's mix of ReLU(BN(y)) of both branches, keeping the two y."""
    return cast(
        Tensor,
        _SelectConv.apply(
            compiled,
            sk,
            after,
            y0,
            sk.bn1.weight,
            sk.bn1.bias,
            y1,
            sk.bn2.weight,
            sk.bn2.bias,
            *conv_params(y0, after),
            *_Mix(sk).parameters(),
        ),
    )
