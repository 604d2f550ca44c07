"""Attention that leaves little: its graph where that keeps little besides its input, which is made again.

Where it would keep more, the forward pass is run again, with a graph, in the backward pass. So only for a module whose
forward pass depends on its input, parameters, buffers and modes alone, and changes nothing but running statistics: its
class says so (`recomputable`).
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..layers import SelectiveKernel
from . import kernels
from .functions import conv_params, convolve, convolve_backward, factors, first_order, norm
from .kernels import Affine, Norm

# A value that takes fewer multiply-adds than this is made again; others are kept. Reading and writing one costs about
# as much time, on any machine on which arithmetic is cheaper than memory.
_CHEAP = 64


def _costly(m: nn.Module) -> bool:
    if type(m) is nn.Conv2d:
        return m.weight[0].numel() >= _CHEAP and m.padding_mode == 'zeros' and not isinstance(m.padding, str)
    return type(m) is nn.Linear and m.in_features >= _CHEAP


def _same_memory(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


class _Recalled(torch.autograd.Function):
    """A layer whose output is known."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Module, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.dtypes = layer, (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (g,), layer = grads, ctx.layer
        x, weight = [t.to(g.dtype) for t in ctx.saved_tensors]  # as autocast has had them
        wanted = ctx.needs_input_grad[2:]
        bias = None if ctx.dtypes[2] is None else weight.new_empty(weight.shape[0])
        if isinstance(layer, nn.Conv2d):
            found: Sequence[Tensor | None] = convolve_backward(g, x, layer, weight, bias, wanted)
        else:
            rows = g.flatten(0, -2)
            found = (
                g @ weight if wanted[0] else None,
                rows.mT @ x.flatten(0, -2) if wanted[1] else None,
                rows.sum(0) if wanted[2] else None,
            )
        return None, None, *[f if f is None else f.to(d) for f, d in zip(found, ctx.dtypes, strict=True)]


class _Recording(nn.Module):
    """Stands before a layer's class: keeps outputs, or gives those that were kept."""

    tape: '_Replay'

    def forward(self, x: Tensor) -> Tensor:
        return self.tape.output(self, super().forward, x)


class _RecordingConv2d(_Recording, nn.Conv2d):
    pass


class _RecordingLinear(_Recording, nn.Linear):
    pass


_RECORDING: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: _RecordingConv2d, nn.Linear: _RecordingLinear}


class _Box:
    """What goes into a graph and comes out of it while it runs. The graph holds the box, which knows nothing of it."""

    inputs: Sequence[Tensor] = ()
    saved: list[Tensor]
    g: Tensor | None = None
    gx: Sequence[Tensor | None] = ()


class _Enter(torch.autograd.Function):
    """The start of a graph that holds no inputs: their gradients go into the box."""

    @staticmethod
    def forward(ctx: Any, box: _Box, start: Tensor, *x: Tensor) -> tuple[Tensor, ...]:
        ctx.box = box
        ctx.set_materialize_grads(False)
        return tuple([t.detach() for t in x])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        ctx.box.gx = grads
        return None, None, *(None for _ in grads)


class _Leave(torch.autograd.Function):
    """The end of a graph that holds no output: the gradient of that comes from the box."""

    @staticmethod
    def forward(ctx: Any, box: _Box, y: Tensor) -> Tensor:
        ctx.box = box
        return y.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, ctx.box.g


class _Graph:
    """The way back through a module that holds no tensors: what it saves is handed out, and given again.

    Args:
        leaves: Its parameters.
    """

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        self.leaves = leaves
        self.box = _Box()
        self.start = torch.zeros((), requires_grad=True)

    def forward(self, module: nn.Module, x: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The module's output for its inputs, and what gradients take besides these."""
        inputs = {t.untyped_storage().data_ptr(): i for i, t in enumerate(x)}
        box = self.box
        box.saved = []

        def pack(t: Tensor) -> tuple[Any, ...]:
            i = inputs.get(t.untyped_storage().data_ptr())
            if i is not None:
                return i, t.shape, t.stride(), t.storage_offset()
            box.saved.append(t.detach())
            return (len(box.saved) - 1,)

        # The hooks know nothing of what holds the graph, which holds them: nobody would free that ring.
        def unpack(packed: tuple[Any, ...]) -> Tensor:
            i, *view = packed
            return box.inputs[i].as_strided(*view) if view else box.saved[i]

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            y = module(*cast(tuple[Tensor, ...], _Enter.apply(box, self.start, *x)))
            self.end, self.dtype = cast(Tensor, _Leave.apply(box, y)), y.dtype
        saved, box.saved = box.saved, []
        return y.detach(), saved

    def bytes_of(self, saved: Sequence[Tensor]) -> int:
        """What these take besides the parameters."""
        kept = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in saved)}
        for p in self.leaves:
            kept.pop(p.untyped_storage().data_ptr(), None)
        return sum(kept.values())

    def backward(
        self, g: Tensor, x: Sequence[Tensor], saved: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        """Gradients of the inputs and of the leaves, None for what the output does not depend on."""
        box, wanted = self.box, [p for p in self.leaves if p.requires_grad]
        if not self.end.requires_grad:
            return [None] * len(x), [None] * len(wanted)
        box.inputs, box.saved, box.g, box.gx = x, [*saved], g, [None] * len(x)
        try:
            # The graph is kept: whether there is another backward pass is for whoever keeps the tensors to say.
            *grads, _ = torch.autograd.grad(
                self.end, [*wanted, self.start], torch.ones_like(self.end), retain_graph=True, allow_unused=True
            )
            return box.gx, grads
        finally:
            vars(box).clear()


class _Replay:
    """Calls a module for its output, and again for its gradients where its graph would keep much.

    It calls twins of the module, which have its parameters and buffers: others may call the module meanwhile. What
    layers of much arithmetic give is kept from the first call.

    Args:
        module: The attention.
        device: Type of the device whose autocast it runs under.
    """

    def __init__(self, module: nn.Module, device: str) -> None:
        self.module = module
        self.modes = [m.training for m in module.modules()]
        self.device = device
        self.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self.kept: list[tuple[Tensor, int]] = []
        self.graph: _Graph | None = None
        self.recalled: Iterator[Tensor | None] | None = None

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        # Without autocast's cache: a cast made without gradients would be taken again where they are wanted.
        return torch.autocast(self.device, self.dtype, enabled=self.dtype is not None, cache_enabled=False)

    def _twin(self, leaves: Sequence[Tensor], again: bool = False) -> nn.Module:
        """The module in its modes of the forward pass.

        Args:
            leaves: What stands for its parameters.
            again: Running statistics stay where they are.
        """
        instead = dict(zip(map(id, self.module.parameters()), leaves, strict=True))
        twins: dict[nn.Module, nn.Module] = {}
        for m, mode in zip(self.module.modules(), self.modes, strict=True):
            twin = object.__new__(_RECORDING[type(m)] if _costly(m) else type(m))
            twin.__dict__ = {
                **vars(m),
                'training': mode,
                '_parameters': {k: instead.get(id(p), p) for k, p in m._parameters.items()},
            }
            if isinstance(twin, _Recording):
                twin.__dict__['tape'] = self
            if again and getattr(m, 'track_running_stats', False):
                twin.__dict__['track_running_stats'] = False
            twins[m] = twin
        for m, twin in twins.items():
            twin.__dict__['_modules'] = {k: None if c is None else twins[c] for k, c in m._modules.items()}
        return twins[self.module]

    @staticmethod
    def _leaves(params: Sequence[Tensor]) -> list[Tensor]:
        return [p.detach().requires_grad_(p.requires_grad) for p in params]

    def output(self, layer: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The output of a layer of a twin."""
        if self.recalled is None:
            y = call(x)
            self.kept.append((y.detach(), y._version))
            return y
        y = next(self.recalled)
        return call(x) if y is None else cast(Tensor, _Recalled.apply(layer, y, x, layer.weight, layer.bias))

    def forward(self, *x: Tensor, graph: bool = True) -> tuple[Tensor, list[Tensor | None]]:
        """The output, which may be overwritten, and what is to be kept besides inputs and parameters.

        Args:
            *x: The inputs.
            graph: Keep the graph where that keeps little: `recompute` is of no use then.
        """
        leaves = self._leaves(list(self.module.parameters()))
        with self._precision():
            if graph:
                made = _Graph(leaves)
                y, saved = made.forward(self._twin(leaves), x)
                if made.bytes_of(saved) <= sum(t.nbytes for t in x):
                    self.graph, self.kept = made, []
                    return y.clone() if any(_same_memory(t, y) for t in saved) else y, [*saved]
                del made, saved
            else:
                y = self._twin(leaves)(*x)
        # What has been overwritten is made again.
        outputs = [k if k._version == version else None for k, version in self.kept]
        self.kept, self.outputs = [], len(outputs)
        if any(k is not None and _same_memory(k, y) for k in outputs):
            y = y.clone()
        # Should buffers change that are read again, torch says so, as it does without fusing.
        read = [
            list(m._buffers.values())
            for m, mode in zip(self.module.modules(), self.modes, strict=True)
            if not (mode and getattr(m, 'track_running_stats', False))
        ]
        return y, outputs + list(itertools.chain(*read))

    def recompute(self, x: Sequence[Tensor], params: Sequence[Tensor], saved: Sequence[Tensor | None]) -> Tensor:
        """The output once more, with a graph.

        Args:
            x: The inputs of the forward pass.
            params: The module's parameters of the forward pass.
            saved: What `forward` gave besides the output.
        """
        self.x = [t.detach().requires_grad_() for t in x]
        self.leaves = self._leaves(params)
        self.recalled = iter(saved[: self.outputs])
        with torch.enable_grad(), self._precision():
            self.y = self._twin(self.leaves, again=True)(*self.x)
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
        found = _all(self.x, grads[: len(self.x)], g), _spread(self.leaves, grads[len(self.x) :])
        self.recalled = iter(())
        del self.x, self.leaves, self.y
        return found

    def gradients(
        self, g: Tensor, x: Sequence[Tensor], params: Sequence[Tensor], saved: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Gradients of the inputs and of each parameter.

        Args:
            g: Gradient of the output.
            x: The inputs of the forward pass.
            params: The module's parameters of the forward pass.
            saved: What `forward` gave besides the output.
        """
        if self.graph is None:
            self.recompute(x, params, saved)
            return self.backward(g)
        g = g.to(self.graph.dtype)
        gx, gleaves = self.graph.backward(g, x, cast(Sequence[Tensor], saved))
        return _all(x, gx, g), _spread(self.graph.leaves, gleaves)


def _all(x: Sequence[Tensor], gx: Sequence[Tensor | None], g: Tensor) -> list[Tensor]:
    """Gradients of all inputs, which the caller overwrites: what hands g on, and what is expanded, is copied."""
    found = [torch.zeros_like(t) if grad is None else grad for t, grad in zip(x, gx, strict=True)]
    return [t.clone() if _same_memory(t, g) or torch._debug_has_internal_overlap(t) else t for t in found]


def _spread(leaves: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Those of the leaves that want one, and None for the others."""
    rest = iter(grads)
    return [next(rest) if leaf.requires_grad else None for leaf in leaves]


class _AttendedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, compiled: bool, bn: nn.BatchNorm2d, attn: nn.Module, keep: Tensor | None, *given: Any
    ) -> Tensor:
        (y, weight, bias), shortcut, params = given[:3], Affine(*given[3:6]), given[6:]
        (_, eps, training, a, center, spread), b, *_ = factors(compiled, bn, y, weight, bias)
        ctx.replay = _Replay(attn, y.device.type)
        out, saved = ctx.replay.forward(*kernels.affine(compiled, Affine(y, a, b)))
        (out,) = kernels.gated_sum_(compiled, Affine(out), keep, shortcut)
        s = None if shortcut.a is None else shortcut.y
        ctx.save_for_backward(out, y, b, weight, a, center, spread, s, shortcut.a, keep, *params, *saved)
        ctx.compiled, ctx.eps, ctx.training, ctx.params = compiled, eps, training, len(params)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        out, y, b, weight, a, center, spread, s, a1, keep, *rest = ctx.saved_tensors
        params, saved = rest[: ctx.params], rest[ctx.params :]
        g, *gshortcut = kernels.sum_backward(ctx.compiled, grads[0], out, Affine(s, a1))
        made = kernels.affine(ctx.compiled, Affine(y, a, b))
        (gx,), gparams = ctx.replay.gradients(g if keep is None else g * keep, made, params, saved)
        bn = Norm(weight, ctx.eps, ctx.training, a, center, spread)
        gnorm = kernels.norm_relu_backward(ctx.compiled, gx, y, None, bn)
        return None, None, None, None, *gnorm, *gshortcut, *gparams


def attended_sum(
    compiled: bool, bn: nn.BatchNorm2d, attn: nn.Module, keep: Tensor | None, y: Tensor, shortcut: Affine
) -> Tensor:
    """ReLU(attn(BN(y)) * keep + shortcut), keeping y and the output. Without gradients y is overwritten.

    Args:
        compiled: Call kernels compiled.
        bn: The BatchNorm; its running statistics move.
        attn: The attention.
        keep: Drop-path's mask (N, 1, 1, 1), or None.
        y: (N, C, H, W).
        shortcut: A map (N, C, H, W).
    """
    if not torch.is_grad_enabled():
        (made,) = kernels.affine_(compiled, norm(compiled, bn, y)[0])
        (out,) = kernels.gated_sum_(compiled, Affine(attn(made)), keep, shortcut)
        return out
    normed = y, bn.weight, bn.bias
    return cast(Tensor, _AttendedSum.apply(compiled, bn, attn, keep, *normed, *shortcut, *attn.parameters()))


class _Attended(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attn: nn.Module, y: Tensor, *params: Tensor) -> Tensor:
        ctx.replay = _Replay(attn, y.device.type)
        out, saved = ctx.replay.forward(y)
        ctx.save_for_backward(y, *params, *saved)
        ctx.params = len(params)
        return out.clone() if _same_memory(out, y) else out

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        y, *rest = ctx.saved_tensors
        (gy,), gparams = ctx.replay.gradients(grads[0], [y], rest[: ctx.params], rest[ctx.params :])
        return None, gy, *gparams


def attended(attn: nn.Module, y: Tensor) -> Tensor:
    """attn(y), keeping y.

    Args:
        attn: The attention.
        y: A map (N, C, H, W).
    """
    return cast(Tensor, _Attended.apply(attn, y, *attn.parameters())) if torch.is_grad_enabled() else attn(y)


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
        mix, more = ctx.replay.forward(*made, graph=False)
        ctx.save_for_backward(*saved, conv_weight, conv_bias, *params, *more)
        ctx.compiled, ctx.conv, ctx.params = compiled, after, len(params)
        return convolve(mix, after, conv_weight, conv_bias)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        branches = ctx.saved_tensors[:6], ctx.saved_tensors[6:12]
        conv_weight, conv_bias, *rest = ctx.saved_tensors[12:]
        params, saved = rest[: ctx.params], rest[ctx.params :]
        made = [kernels.affine_relu(ctx.compiled, Affine(y, a, b))[0] for y, b, _, a, *_ in branches]
        mix = ctx.replay.recompute(made, params, saved).detach()
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
