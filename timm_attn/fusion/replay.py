"""Attention that leaves no trace: its forward pass is run again, with a graph, in the backward pass.

Only for a module whose forward pass depends on its input, parameters, buffers and modes alone, and changes nothing but
running statistics: its class says so (`recomputable`).
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..layers import SelectiveKernel
from . import kernels
from .functions import conv_params, convolve, convolve_backward, factors, first_order
from .kernels import Affine, Norm


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

    def recompute(self, x: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
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
        """Gradients of the inputs and of each parameter; what `recompute` made is forgotten.

        Args:
            g: Gradient of the output.
        """
        wanted = [t for t in (*self.x, *self.leaves) if t.requires_grad]
        grads: Any = (None,) * len(wanted)
        if self.y.requires_grad:
            # None for what the output does not depend on, as in torch.
            grads = torch.autograd.grad(self.y, wanted, g.to(self.y.dtype), allow_unused=True)
        rest = iter(grads)
        gx = [torch.zeros_like(t) if grad is None else grad for t, grad in zip(self.x, rest, strict=False)]
        # The caller overwrites them: what hands g on, and what is expanded, is copied.
        held = g.untyped_storage().data_ptr()
        gx = [
            t.clone() if t.untyped_storage().data_ptr() == held or torch._debug_has_internal_overlap(t) else t
            for t in gx
        ]
        gparams = [next(rest) if leaf.requires_grad else None for leaf in self.leaves]
        del self.x, self.leaves, self.y
        return gx, gparams


class _AttendedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compiled: bool, attn: nn.Module, keep: Tensor | None, *given: Any) -> Tensor:
        x, shortcut, params = Affine(*given[:3]), Affine(*given[3:6]), given[6:]
        ctx.replay = _Replay(attn, x.y.device.type)
        out = ctx.replay.forward(*kernels.affine(compiled, x))
        (out,) = kernels.gated_sum_(compiled, Affine(out), keep, shortcut)
        ctx.save_for_backward(out, *x, None if shortcut.a is None else shortcut.y, shortcut.a, keep, *params)
        ctx.compiled = compiled
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        out, y, a, b, s, a1, keep, *params = ctx.saved_tensors
        g, *gshortcut = kernels.sum_backward(ctx.compiled, grads[0], out, Affine(s, a1))
        ctx.replay.recompute(kernels.affine(ctx.compiled, Affine(y, a, b)), params)
        (gx,), gparams = ctx.replay.backward(g if keep is None else g * keep)
        return None, None, None, *kernels.affine_backward(ctx.compiled, gx, y, a), *gshortcut, *gparams


def attended_sum(compiled: bool, attn: nn.Module, keep: Tensor | None, x: Affine, shortcut: Affine) -> Tensor:
    """ReLU(attn(x) * keep + shortcut), keeping x's y and the output.

    Args:
        compiled: Call kernels compiled.
        attn: The attention.
        keep: Drop-path's mask (N, 1, 1, 1), or None.
        x: A map (N, C, H, W).
        shortcut: A map (N, C, H, W).
    """
    return cast(Tensor, _AttendedSum.apply(compiled, attn, keep, *x, *shortcut, *attn.parameters()))


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
    def forward(ctx: Any, compiled: bool, sk: SelectiveKernel, after: nn.Conv2d, *given: Any) -> Tensor:
        (*branches, conv_weight, conv_bias), params = given[:8], given[8:]
        saved: list[Tensor] = []
        ctx.constants = []
        made: list[Tensor] = []
        for bn, (y, weight, bias) in ((sk.bn1, branches[:3]), (sk.bn2, branches[3:])):
            (_, *constants, a, center, spread), b, *_ = factors(compiled, bn, y, weight, bias)
            made += kernels.affine_relu(compiled, Affine(y, a, b))
            saved += [y, b, weight, a, center, spread]
            ctx.constants.append(constants)
        ctx.replay = _Replay(_Mix(sk), made[0].device.type)
        ctx.save_for_backward(*saved, conv_weight, conv_bias, *params)
        ctx.compiled, ctx.conv = compiled, after
        return convolve(ctx.replay.forward(*made), after, conv_weight, conv_bias)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        saved, (conv_weight, conv_bias, *params) = ctx.saved_tensors[:12], ctx.saved_tensors[12:]
        branches = saved[:6], saved[6:]
        made = [kernels.affine_relu(ctx.compiled, Affine(y, a, b))[0] for y, b, _, a, *_ in branches]
        mix = ctx.replay.recompute(made, params).detach()
        wanted = (True, *ctx.needs_input_grad[9:11])
        gmix, *gconv = convolve_backward(grads[0], mix, ctx.conv, conv_weight, conv_bias, wanted)
        gmade, gparams = ctx.replay.backward(cast(Tensor, gmix))
        gnorms: list[Tensor] = []
        for g, (y, b, weight, *rest), constants in zip(gmade, branches, ctx.constants, strict=True):
            gnorms += kernels.norm_relu_backward(ctx.compiled, g, y, b, Norm(weight, *constants, *rest))
        return None, None, None, *gnorms, *gconv, *gparams


def select_conv(compiled: bool, sk: SelectiveKernel, after: nn.Conv2d, y0: Tensor, y1: Tensor) -> Tensor:
    """A convolution of a selective kernel's mix of ReLU(BN(y)) of both branches, keeping the two y."""
    norms = y0, sk.bn1.weight, sk.bn1.bias, y1, sk.bn2.weight, sk.bn2.bias
    params = *conv_params(y0, after), *_Mix(sk).parameters()
    return cast(Tensor, _SelectConv.apply(compiled, sk, after, *norms, *params))
