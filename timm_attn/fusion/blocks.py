"""The fused blocks, and `fuse`, which makes them of a model's own."""

import itertools
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from timm.layers import DropPath
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..layers import BAM, CBAM, Attention, SelectiveKernel, TripletAttention
from ..models.sk_resnet import SKBottleneck
from . import kernels
from .compile import compiler_works
from .functions import gate_conv, gated_pooled_sum, gated_sum, norm, norm_act_conv, raise_by
from .replay import attended_sum, select_conv


def _hooked(module: nn.Module) -> bool:
    """Someone looks at a part of the module (not at the whole), so every part must be called."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in module.modules()
        if m is not module
    )


def _ordinary(x: Any) -> bool:
    """A tensor with data, in plain execution: no tracing, compiling or exporting, no transform of torch.func."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and not x.is_meta
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
    )


def _gated_itself(m: nn.Module) -> bool:
    """Injected attention follows this very module, so it is more than its type says."""
    return bool(m._forward_hooks) and isinstance(next(reversed(list(m.children())), None), Attention)


def _plain_conv(m: nn.Module) -> bool:
    return (
        type(m) is nn.Conv2d and not _gated_itself(m) and m.padding_mode == 'zeros' and not isinstance(m.padding, str)
    )


def _plain_norm(m: nn.Module, norm: type[nn.Module] = nn.BatchNorm2d) -> bool:
    if _gated_itself(m):
        return False
    if type(m) is nn.BatchNorm2d:
        return norm is nn.BatchNorm2d and m.affine and m.track_running_stats and m.momentum is not None
    return type(m) is norm


def _absent(m: nn.Module | None) -> bool:
    return m is None or type(m) is nn.Identity


# ---- The end of a block: the last BatchNorm, the attention, the shortcut and the ReLU --------------------------------


def _gated(
    compiled: bool,
    attn: nn.Module | None,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    found: list[Tensor],
    keep: Tensor | None,
    shortcut: Tensor,
    a1: Tensor | None,
    b1: Tensor | None,
) -> Tensor | None:
    """ReLU(attention(x) * keep + shortcut * a1 + b1) for x = y * a + b, or None for an attention that needs x itself.

    Args:
        compiled: Call kernels compiled.
        attn: The attention, or None.
        y: (N, C, H, W)
        a: (1, C, 1, 1), or None for x = y.
        b: Like a.
        found: The statistics of x's planes that the attention takes, (N, C) each.
        keep: Drop-path's mask (N, 1, 1, 1), or None.
        shortcut: (N, C, H, W)
        a1: Like a.
        b1: Like a.
    """
    if type(attn) is TripletAttention:

        def of_planes(pooled: list[Tensor]) -> list[Tensor]:
            cw, hc, *hw = pooled
            # (N, C, 2, W) and (N, C, H, 2), as the planes (N, 2, C, W) and (N, 2, H, C)
            gates = attn.gates_of([cw.transpose(1, 2), hc.transpose(1, 3), *hw])
            return [_scaled(gate, attn.gain / len(gates)) for gate in gates]

        dims = (2, 3, 1) if attn.spatial else (2, 3)
        return gated_pooled_sum(compiled, y, a, b, None, dims, _masked(of_planes, keep), True, shortcut, a1, b1)
    channels = None
    if attn is not None:
        if not isinstance(attn, Attention) or not _declared(attn):
            return None
        if found:
            # In the precision of the statistics: what is so small gains nothing by autocast, and pays for casts.
            dtype = next(attn.parameters()).dtype
            with torch.autocast(y.device.type, enabled=False):
                channels = cast(Tensor, cast(Any, attn).gate_of(*(f.to(dtype) for f in found)))
        if type(attn) is CBAM and attn.spatial:

            def of_pixels(pooled: list[Tensor]) -> list[Tensor]:
                return [_scaled(attn.gate_of_pixels(pooled[0]), attn.gain)]

            return gated_pooled_sum(
                compiled, y, a, b, channels, (1,), _masked(of_pixels, keep), False, shortcut, a1, b1
            )
        assert channels is not None
        channels = _scaled(channels, attn.gain)
    if keep is not None:
        channels = keep if channels is None else channels * keep
    return gated_sum(compiled, y, a, b, channels, shortcut, a1, b1)


def _scaled(gate: Tensor, gain: float) -> Tensor:
    return gate if gain == 1 else gate * gain


def _masked(
    gates_of: Callable[[list[Tensor]], list[Tensor]],
    keep: Tensor | None,
) -> Callable[[list[Tensor]], list[Tensor]]:
    return gates_of if keep is None else lambda pooled: [gate * keep for gate in gates_of(pooled)]


def _declared(attn: nn.Module | None) -> tuple[str, ...]:
    """The attention's `statistics`; not those of a base class, whose forward pass may have been replaced."""
    return cast(Any, attn).statistics if 'statistics' in vars(type(attn)) else ()


def _names(attn: nn.Module | None) -> tuple[str, ...]:
    """The statistics of planes that the attention takes."""
    return () if isinstance(attn, CBAM) and not attn.channel else _declared(attn)


def _tail(block: Any, bn: Any, y: Tensor, x: Tensor) -> Tensor:
    attn = None if _absent(block.se) else cast(nn.Module, block.se)
    a1, b1, shortcut = _shortcut(block, x)
    keep = None
    drop = block.drop_path
    if isinstance(drop, DropPath) and drop.drop_prob and drop.training:
        # The draw and the scale of timm's drop_path.
        keep = y.new_empty((y.shape[0], 1, 1, 1)).bernoulli_(1 - drop.drop_prob)
        if drop.scale_by_keep and drop.drop_prob < 1:
            keep.div_(1 - drop.drop_prob)
    y, a, b, *found = norm(block.compiled, bn, y, _names(attn))
    out = _gated(block.compiled, attn, y, a, b, found, keep, shortcut, a1, b1)
    if out is None:
        assert attn is not None
        return attended_sum(block.compiled, attn, y, a, b, shortcut, a1, b1, keep)
    return out


def _shortcut(block: Any, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """a1, b1 and s, such that s * a1 + b1 is the shortcut; both are None where it is s."""
    if block.downsample is None:
        return None, None, x
    *before, last = cast(nn.Sequential, block.downsample)
    for m in before:
        x = m(x)
    if not _plain_norm(last):
        return None, None, last(x)
    x, a1, b1 = norm(block.compiled, cast(nn.BatchNorm2d, last), x)
    return a1, b1, x


def _frozen_tail(attn: nn.Module | None, y: Tensor, shortcut: Tensor) -> Tensor:
    """ReLU(attention(y) + shortcut) without gradients; y may be overwritten."""
    if attn is not None and not _absent(attn):
        names = _names(attn)
        found = list(kernels.plane_statistics(True, y, names)) if names else []
        out = _gated(True, attn, y, None, None, found, None, shortcut, None, None)
        if out is not None:
            return out
        y = attn(y)
    return y.add_(shortcut).relu_()


# ---- Blocks ---------------------------------------------------------------------------------------------------------


class Fused(nn.Module):
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
            and _absent(self.aa)
            and _absent(self.drop_block)
            and (_absent(self.drop_path) or type(self.drop_path) is DropPath)
            and (_absent(self.se) or isinstance(self.se, Attention))
            and (self.downsample is None or type(self.downsample) is nn.Sequential)
        )

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


class FusedBasicBlock(Fused, BasicBlock):
    """timm's BasicBlock that keeps the outputs of its convolutions and its own."""

    norms = ('bn1', 'bn2')
    convs = ('conv1', 'conv2')

    def fused_forward(self, x: Tensor) -> Tensor:
        (y,) = norm_act_conv(self.compiled, cast(nn.BatchNorm2d, self.bn1), self.conv1(x), self.conv2)
        return _tail(self, self.bn2, y, x)


class FusedBottleneck(Fused, Bottleneck):
    """timm's Bottleneck that keeps the outputs of its convolutions and its own."""

    norms = ('bn1', 'bn2', 'bn3')
    convs = ('conv1', 'conv2', 'conv3')

    def fused_forward(self, x: Tensor) -> Tensor:
        (y,) = norm_act_conv(self.compiled, cast(nn.BatchNorm2d, self.bn1), self.conv1(x), self.conv2)
        (y,) = norm_act_conv(self.compiled, cast(nn.BatchNorm2d, self.bn2), y, self.conv3)
        return _tail(self, self.bn3, y, x)


class FusedSKBottleneck(Fused, SKBottleneck):
    """The selective-kernel bottleneck that keeps the outputs of its convolutions and its own."""

    norms = ('bn1', 'conv2.bn1', 'conv2.bn2', 'bn3')
    convs = ('conv1', 'conv2.conv1', 'conv2.conv2', 'conv3')

    def fused_forward(self, x: Tensor) -> Tensor:
        sk = cast(SelectiveKernel, self.conv2)
        y0, y1 = norm_act_conv(self.compiled, cast(nn.BatchNorm2d, self.bn1), self.conv1(x), sk.conv1, sk.conv2)
        return _tail(self, self.bn3, select_conv(self.compiled, sk, self.conv3, y0, y1), x)

    def frozen_forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.conv2(self.conv1(x).relu_())
        return _frozen_tail(self.se, self.conv3(x), shortcut)


class FusedBAM(BAM):
    """BAM that gates its input in one pass, and keeps no gate of the input's size."""

    compiled = False

    def forward(self, x: Tensor) -> Tensor:
        if not _ordinary(x) or not (self.compiled or torch.is_grad_enabled()):
            return super().forward(x)
        return raise_by(self.compiled, x, self.channel_branch(x), self.spatial_branch(x), self.add, self.gain)


class FusedGateConv(nn.Conv2d):
    """The convolution of a gate, from 2 channels to 1, computed in a way made for that."""

    def forward(self, input: Tensor) -> Tensor:
        if _ordinary(input):
            return gate_conv(self, input)
        return super().forward(input)


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
        elif isinstance(m, Fused):
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
            'timm_attn): it stays as it is.',
            stacklevel=2,
        )
        return model
    compiled = compile and compiler_works(next(model.parameters()).device.type)
    for m in found:
        m.__class__ = _FUSED[type(m)]
    for m in found + done:
        cast(Any, m).compiled = compiled
        for part in m.modules():
            if type(part) is nn.Conv2d and (part.in_channels, part.out_channels, part.bias) == (2, 1, None):
                part.__class__ = FusedGateConv
    if freeze:
        _freeze(model)
    return model
