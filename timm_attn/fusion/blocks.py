"""The fused blocks, and `fuse`, which makes them of a model's own."""

import copy
import functools
import inspect
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F  # noqa: F401  # TorchScript looks the names in a pooling's forward up here
from timm.layers import DropPath
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..injection import gate_of_output
from ..layers import BAM, GateConv, GateForm, GroupNorm, SelectiveKernel
from ..layers import jointly_gated as jointly_gated  # TorchScript looks the names in BAM's forward up here
from ..models.attn_resnet import AttnResNet
from ..models.sk_resnet import SKBottleneck, SKResNet
from . import kernels
from .compile import compiler_works, rehearsed
from .functions import (
    bam_gate,
    gate_conv,
    gated_pooled_sum,
    gated_sum,
    is_gate_conv,
    max_pool,
    norm,
    norm_act_conv,
    plain_conv,
)
from .kernels import Affine
from .replay import attended, attended_sum, select_conv

# ---- What is known to be the same -----------------------------------------------------------------------------------

# torch asks by a function of its own, which torch 2.5 does not have.
_GLOBAL_HOOKS = (
    torch_module._global_forward_pre_hooks,
    torch_module._global_forward_hooks,
    torch_module._global_backward_pre_hooks,
    torch_module._global_backward_hooks,
)


def _ordinary(x: Any) -> bool:
    """A map with data, in plain execution: no tracing, compiling or exporting, no derivatives but backward's."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, nn.Parameter)
        and not x.is_meta
        and x.layout == torch.strided
        and x.dim() == 4
        and x.numel() > 0
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not any(_GLOBAL_HOOKS)
    )


def _called_as_is(m: nn.Module) -> bool:
    """Calling the module is its forward pass and nothing else, with parameters that are parameters."""
    hooked = m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
    return not hooked and 'forward' not in vars(m) and not getattr(m, '_is_replica', False)


def _compiles(block: Any, x: Tensor) -> bool:
    """Compiling is wanted and works where x is, which is not known before: models are moved after they are fused."""
    return block.compiled and compiler_works(x.device.type)


def _parts_as_they_are(block: nn.Module, gated: Container[nn.Module] = ()) -> bool:
    """No one looks at a part of the block, or runs it in another way. Of the block as a whole, they may.

    Args:
        block: The block.
        gated: Parts of it that may call an attention, which is as it is itself, on their output.
    """
    return not getattr(block, '_is_replica', False) and all(
        _called_as_is(m) or (m in gated and gate_of_output(m) is not None) for m in block.modules() if m is not block
    )


def _plain_conv(m: nn.Module) -> bool:
    return type(m) is nn.Conv2d and m.padding_mode == 'zeros' and not isinstance(m.padding, str)


def _plain_norm(m: nn.Module, norm: type[nn.Module] = nn.BatchNorm2d) -> bool:
    if type(m) is nn.BatchNorm2d:
        return norm is nn.BatchNorm2d and m.affine and m.track_running_stats and m.momentum is not None
    return type(m) is norm


def _absent(m: nn.Module | None) -> bool:
    return m is None or type(m) is nn.Identity


def _gate_form(attn: Any) -> GateForm | None:
    """What the attention's gates follow from: nothing where there is none, else what its own class says, if it does."""
    if _absent(attn):
        return GateForm()
    declared = vars(type(attn))
    form = None
    if 'gate_form' in declared:
        form = attn.gate_form()
    elif declared.get('statistics') and 'statistics' not in vars(attn):
        form = GateForm(tuple(declared['statistics']))
    known = form is not None and (form.statistics or form.dims) and {*form.statistics} <= {'mean', 'var', 'peak'}
    return form if known else None


# Of these a forward pass draws no random numbers, and changes nothing but running statistics.
_RECOMPUTABLE = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.LayerNorm,
    nn.GroupNorm,
    GroupNorm,
    GateConv,
    nn.Identity,
    nn.ReLU,
    nn.Sigmoid,
)


def _recomputable(attn: nn.Module) -> bool:
    """The attention's own class says so, and its parts are those of its file or of known types."""
    home = type(attn).__module__
    return vars(type(attn)).get('recomputable', False) and all(
        type(m) in _RECOMPUTABLE or type(m) is FusedGateConv or type(m).__module__ == home for m in attn.modules()
    )


def _gated_output(conv: nn.Module, y: Tensor) -> Tensor:
    attn = gate_of_output(conv)
    return y if attn is None else attended(attn, y)


# ---- The end of a block: the last BatchNorm, the attention, the shortcut and the ReLU --------------------------------


def _tail(block: Any, bn: Any, y: Tensor, x: Tensor) -> Tensor:
    """ReLU(attention(BN(y)) * keep + shortcut(x)), by what is known of the attention."""
    attn: Any = block.se
    form = _gate_form(attn)
    if form is None and not _recomputable(attn):
        return _ordinary_tail(block, bn, y, x)
    shortcut = _shortcut(block, x)
    keep = None
    drop = block.drop_path
    if isinstance(drop, DropPath) and drop.drop_prob and drop.training:
        # The draw and the scale of timm's drop_path.
        keep = y.new_empty((y.shape[0], 1, 1, 1)).bernoulli_(1 - drop.drop_prob)
        if drop.scale_by_keep and drop.drop_prob < 1:
            keep.div_(1 - drop.drop_prob)
    if form is None:
        return attended_sum(block.compiled, bn, attn, keep, y, shortcut)
    normed, statistics = norm(block.compiled, bn, y, form.statistics)
    return _gated_sum(block.compiled, attn, form, normed, statistics, keep, shortcut)


def _ordinary_tail(block: Any, bn: Any, y: Tensor, x: Tensor) -> Tensor:
    """What timm's blocks do after their last convolution."""
    out = block.se(bn(y))
    if block.drop_path is not None:
        out = block.drop_path(out)
    out += x if block.downsample is None else block.downsample(x)
    return block.get_submodule(block.acts[-1])(out)


def _in_turn(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    for m in modules:
        x = plain_conv(cast(nn.Conv2d, m), x) if _plain_conv(m) and gate_of_output(m) is None else m(x)
    return x


def _shortcut(block: Any, x: Tensor) -> Affine:
    if block.downsample is None:
        return Affine(x)
    *before, last = cast(nn.Sequential, block.downsample)
    x = _in_turn(before, x)
    if not _plain_norm(last):
        return Affine(last(x))
    return norm(block.compiled, cast(nn.BatchNorm2d, last), x)[0]


def _gated_sum(
    compiled: bool,
    attn: Any,
    form: GateForm,
    x: Affine,
    statistics: list[Tensor],
    keep: Tensor | None,
    shortcut: Affine,
) -> Tensor:
    """ReLU(attn(x) * keep + shortcut).

    Args:
        compiled: Call kernels compiled.
        attn: The attention, or None.
        form: What its gates follow from.
        x: A map (N, C, H, W).
        statistics: Those of x's planes that the form names, (N, C) each.
        keep: Drop-path's mask (N, 1, 1, 1), or None.
        shortcut: A map (N, C, H, W).
    """
    channels = None
    if form.statistics:
        # In the precision of the statistics: what is so small gains nothing by autocast, and pays for casts.
        dtype = next((p.dtype for p in attn.parameters() if p.is_floating_point()), statistics[0].dtype)
        with torch.autocast(x.y.device.type, enabled=False):
            channels = attn.gate_of(*(s.to(dtype) for s in statistics))
        if channels.shape != (*x.y.shape[:2], 1, 1):
            raise ValueError(
                f'gate_of of {type(attn).__name__} gave {tuple(channels.shape)}, not a gate for each channel, '
                f'{(*x.y.shape[:2], 1, 1)}.'
            )
    if form.dims:

        def gates_of(pools: list[Tensor]) -> list[Tensor]:
            gates = attn.gates_of_pools(pools)
            gates = [_scaled(gate, attn.factor / len(gates)) for gate in gates]
            return gates if keep is None else [gate * keep for gate in gates]

        return gated_pooled_sum(compiled, x, channels, form.dims, gates_of, shortcut)
    if channels is not None:
        channels = _scaled(channels, attn.factor)
    if keep is not None:
        channels = keep if channels is None else channels * keep
    return gated_sum(compiled, x, channels, shortcut)


def _scaled(gate: Tensor, gain: float) -> Tensor:
    return gate if gain == 1 else gate * gain


def _frozen_tail(attn: nn.Module | None, y: Tensor, shortcut: Tensor) -> Tensor:
    """ReLU(attention(y) + shortcut) without gradients; y may be overwritten."""
    if attn is not None and not _absent(attn):
        form = _gate_form(attn)
        if form is not None:
            statistics = list(kernels.plane_statistics(True, y, form.statistics)) if form.statistics else []
            return _gated_sum(True, attn, form, Affine(y), statistics, None, Affine(shortcut))
        y = attn(y)
    return y.add_(shortcut).relu_()


# ---- Blocks ---------------------------------------------------------------------------------------------------------


def _forward_of(ordinary: Any) -> Any:
    """A forward pass that is fused where that is known to be the same, and otherwise the ordinary class's.

    torch.jit.script compiles the source of what is wrapped: the ordinary one.
    """

    @functools.wraps(ordinary)
    def forward(self: Any, x: Tensor) -> Tensor:
        if _ordinary(x):
            out = self.fused(x)
            if out is not None:
                return out
        return ordinary(self, x)

    return forward


# Bytes of a map that stays in a processor's own cache from one operation to the next. Without gradients there is
# nothing to keep less of, and passes over a smaller one take less time than what saves them.
SMALL = 1 << 21


def _small(block: Any, x: Tensor) -> bool:
    """Without gradients, the block takes its ordinary way in no more time; each dimension pooled along is a pass."""
    form = _gate_form(block.se)
    return x.numel() * x.element_size() * max(1, len(form.dims) if form else 0) < SMALL


class Fused(nn.Module):
    """What fused blocks share."""

    norms: tuple[str, ...]
    convs: tuple[str, ...]
    acts: tuple[str, ...]
    gated: tuple[str, ...] = ()  # convolutions that attention may follow
    compiled = False
    frozen = False
    if TYPE_CHECKING:  # timm's, in both kinds of block; torch.jit.script would take them for the block's attributes
        se: Any
        aa: Any
        drop_block: Any
        drop_path: Any
        downsample: Any

    def fusible(self, norm: type[nn.Module]) -> bool:
        """The block is made of what its own ways know, with norms of this type."""
        gated = [self.get_submodule(name) for name in self.gated]
        return (
            all(_plain_norm(self.get_submodule(name), norm) for name in self.norms)
            and all(_plain_conv(self.get_submodule(name)) for name in self.convs)
            and all(type(self.get_submodule(name)) is nn.ReLU for name in self.acts)
            and _absent(self.aa)
            and _absent(self.drop_block)
            and (_absent(self.drop_path) or type(self.drop_path) is DropPath)
            and (self.downsample is None or type(self.downsample) is nn.Sequential)
            and _parts_as_they_are(self, gated)
            and all(_recomputable(attn) for conv in gated if (attn := gate_of_output(conv)))
        )

    def fused(self, x: Tensor) -> Tensor | None:
        """The output, or None where the fused way is not known to give it."""
        grad = torch.is_grad_enabled()
        if not (grad or _compiles(self, x)):
            return None
        if self.frozen:
            plain = not grad and not self.training and self.fusible(nn.Identity)
            return self._called(type(self).frozen_forward, x) if plain else None
        # In inference a GPU runs a block's own modules in less time than kernels called one by one from Python.
        if not grad and (x.device.type != 'cpu' or _small(self, x)):
            return None
        return self._called(type(self).fused_forward, x) if self.fusible(nn.BatchNorm2d) else None

    def _called(self, forward: Callable[[Any, Tensor], Tensor], x: Tensor) -> Tensor:
        """The output; where kernels are still to be compiled on a CPU, those of the whole step are, side by side."""
        if not self.compiled or x.device.type != 'cpu' or _gate_form(self.se) is None:
            return forward(self, x)
        if any(gate_of_output(self.get_submodule(name)) for name in self.gated):  # of a class that may be anyone's
            return forward(self, x)
        grad = torch.is_grad_enabled()

        def step() -> None:
            sizes = [n if n == 1 else small for n, small in zip(x.shape, (2, x.shape[1], 16, 24), strict=True)]
            layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
            with torch.set_grad_enabled(grad):
                like = torch.empty(sizes, dtype=x.dtype, memory_format=layout).normal_().requires_grad_(x.requires_grad)
                out = forward(copy.deepcopy(self), like)
                if out.requires_grad:
                    out.sum().backward()

        with rehearsed(step):
            return forward(self, x)

    def train(self, mode: bool = True) -> Any:
        """Module.train; says so where there is nothing left that differs in training."""
        if mode and self.frozen:
            warnings.warn(
                'A model that timm_attn.fuse(freeze=True) has frozen has no BatchNorms between its convolutions: in '
                'train mode, too, they are the folded ones. To train the model, build it anew and load its weights.',
                stacklevel=2,
            )
        return super().train(mode)

    def fused_forward(self, x: Tensor) -> Tensor:
        """The forward pass for training, and for inference with BatchNorms."""
        raise NotImplementedError

    def frozen_forward(self, x: Tensor) -> Tensor:
        """The forward pass where BatchNorms are folded into convolutions."""
        shortcut = x if self.downsample is None else _in_turn(self.downsample, x)
        *before, last = [self.get_submodule(name) for name in self.convs]
        for conv in before:
            x = _in_turn([conv], x).relu_()
        return _frozen_tail(self.se, _in_turn([last], x), shortcut)


class FusedBasicBlock(Fused, BasicBlock):
    """timm's BasicBlock that keeps the outputs of its convolutions and its own."""

    norms = ('bn1', 'bn2')
    convs = ('conv1', 'conv2')
    acts = ('act1', 'act2')
    gated = ('conv2',)
    forward = _forward_of(BasicBlock.forward)

    def fused_forward(self, x: Tensor) -> Tensor:
        """The forward pass for training, and for inference with BatchNorms."""
        (y,) = norm_act_conv(self.compiled, cast(nn.BatchNorm2d, self.bn1), plain_conv(self.conv1, x), self.conv2)
        return _tail(self, self.bn2, _gated_output(self.conv2, y), x)


class FusedBottleneck(Fused, Bottleneck):
    """timm's Bottleneck that keeps the outputs of its convolutions and its own."""

    norms = ('bn1', 'bn2', 'bn3')
    convs = ('conv1', 'conv2', 'conv3')
    acts = ('act1', 'act2', 'act3')
    gated = ('conv2', 'conv3')
    forward = _forward_of(Bottleneck.forward)

    def fused_forward(self, x: Tensor) -> Tensor:
        """The forward pass for training, and for inference with BatchNorms."""
        (y,) = norm_act_conv(self.compiled, cast(nn.BatchNorm2d, self.bn1), plain_conv(self.conv1, x), self.conv2)
        (y,) = norm_act_conv(self.compiled, cast(nn.BatchNorm2d, self.bn2), _gated_output(self.conv2, y), self.conv3)
        return _tail(self, self.bn3, _gated_output(self.conv3, y), x)


class FusedSKBottleneck(Fused, SKBottleneck):
    """The selective-kernel bottleneck that keeps the outputs of its convolutions and its own."""

    norms = ('bn1', 'conv2.bn1', 'conv2.bn2', 'bn3')
    convs = ('conv1', 'conv2.conv1', 'conv2.conv2', 'conv3')
    acts = ('act1', 'act3')
    forward = _forward_of(SKBottleneck.forward)

    def fusible(self, norm: type[nn.Module]) -> bool:
        """Whether this block is one whose computation is known here; its selective kernel must be known too."""
        sk = type(self.conv2) is SelectiveKernel and _recomputable(self.conv2)
        return sk and _absent(self.bn2) and _absent(self.act2) and super().fusible(norm)

    def fused_forward(self, x: Tensor) -> Tensor:
        """The forward pass for training, and for inference with BatchNorms."""
        sk = cast(SelectiveKernel, self.conv2)
        y0, y1 = norm_act_conv(
            self.compiled, cast(nn.BatchNorm2d, self.bn1), plain_conv(self.conv1, x), sk.conv1, sk.conv2
        )
        return _tail(self, self.bn3, select_conv(self.compiled, sk, self.conv3, y0, y1), x)

    def frozen_forward(self, x: Tensor) -> Tensor:
        """The forward pass where BatchNorms are folded into convolutions."""
        shortcut = x if self.downsample is None else _in_turn(self.downsample, x)
        x = self.conv2(plain_conv(self.conv1, x).relu_())
        return _frozen_tail(self.se, plain_conv(self.conv3, x), shortcut)


class FusedBAM(BAM):
    """BAM that gates its input in one pass, and keeps no gate of the input's size."""

    compiled = False
    forward = _forward_of(BAM.forward)

    def fused(self, x: Tensor) -> Tensor | None:
        """The output, or None where the ordinary way is as good."""
        if not (torch.is_grad_enabled() or _compiles(self, x)):
            return None
        return bam_gate(self.compiled, x, self.channel_branch(x), self.spatial_branch(x), self.add, self.factor)


class FusedGateConv(nn.Conv2d):
    """The convolution of a gate, from 2 channels to 1, computed in a way made for that."""

    forward = _forward_of(nn.Conv2d.forward)

    def fused(self, x: Tensor) -> Tensor | None:
        """The output, or None for a convolution of another kind, or where torch's own is as fast."""
        return gate_conv(self, x) if x.device.type == 'cpu' and is_gate_conv(self) else None


class FusedMaxPool2d(nn.MaxPool2d):
    """A pooling that keeps no more than where the maxima are, in few bits."""

    forward = _forward_of(nn.MaxPool2d.forward)

    def fused(self, x: Tensor) -> Tensor | None:
        """The output, or None on other devices, where torch's own is as fast, and for few channels."""
        dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
        known = x.device.type == 'cpu' and dense and x.shape[1] >= 8 and not self.return_indices
        return max_pool(self, x) if known else None


# Of these the output is the same for each layout of the input in memory.
_STEM = (nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.Identity, nn.ReLU, nn.MaxPool2d, FusedMaxPool2d)


class FusedResNet(ResNet):
    """A ResNet whose stem, in inference on a CPU, computes with the channels side by side: the fastest for so few."""

    forward_features = _forward_of(ResNet.forward_features)

    def fused(self, x: Tensor) -> Tensor | None:
        """The last stage's map, or None where the stem is another, or lies in memory so in any case."""
        if torch.is_grad_enabled() or x.device.type != 'cpu':  # for gradients, a copy of the image would be kept
            return None
        parts = [m for name in ('conv1', 'bn1', 'act1', 'maxpool') for m in self.get_submodule(name).modules()]
        dense = all(t.is_contiguous() for t in (x, *(p for m in parts for p in m.parameters(recurse=False))))
        if not dense or not all(type(m) in _STEM and _called_as_is(m) for m in parts):
            return None
        x = self.conv1(x.contiguous(memory_format=torch.channels_last))
        x = self.maxpool(self.act1(self.bn1(x))).contiguous()
        for i in range(1, 5):
            x = self.get_submodule(f'layer{i}')(x)
        return x


class FusedAttnResNet(FusedResNet, AttnResNet):
    """A registered ResNet with such a stem."""


class FusedSKResNet(FusedResNet, SKResNet):
    """A ResNet of selective kernels with such a stem."""


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    BasicBlock: FusedBasicBlock,
    Bottleneck: FusedBottleneck,
    SKBottleneck: FusedSKBottleneck,
    BAM: FusedBAM,
}
# What is fused besides, in models that have such blocks.
_AROUND: dict[type[nn.Module], type[nn.Module]] = {
    nn.MaxPool2d: FusedMaxPool2d,
    ResNet: FusedResNet,
    AttnResNet: FusedAttnResNet,
    SKResNet: FusedSKResNet,
}


# ---- Freezing -------------------------------------------------------------------------------------------------------


def _pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Names of each convolution and the BatchNorm behind it, as far as it is known that one follows the other."""
    pairs: list[tuple[str, str]] = []
    for name, m in model.named_modules():
        dot = f'{name}.' if name else ''
        if isinstance(m, ResNet) and inspect.unwrap(type(m).forward_features) is ResNet.forward_features:
            stem = m.conv1
            if type(stem) is nn.Sequential:
                names = [f'{dot}conv1.{child}' for child, _ in stem.named_children()]
                pairs += [*itertools.pairwise(names), (names[-1], f'{dot}bn1')]
            else:
                pairs.append((f'{dot}conv1', f'{dot}bn1'))
        elif isinstance(m, Fused):
            pairs += [(dot + norm.replace('bn', 'conv'), dot + norm) for norm in m.norms]
            if type(m.downsample) is nn.Sequential:
                pairs += itertools.pairwise(f'{dot}downsample.{child}' for child, _ in m.downsample.named_children())
    return pairs


def _freeze(model: nn.Module) -> None:
    """Folds each BatchNorm into the convolution before it; an Identity takes its place."""
    model.eval()
    uses = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    folded: list[str] = []
    left: list[str] = []
    for conv_name, norm_name in _pairs(model):
        conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
            continue
        known = _plain_conv(conv) and _plain_norm(norm)
        if not known or not all(_called_as_is(m) and uses[id(m)] == 1 for m in (conv, norm)):
            left.append(norm_name)
            continue
        folded.append(norm_name)
        _replace(model, conv_name, fuse_conv_bn_eval(cast(nn.Conv2d, conv), cast(nn.BatchNorm2d, norm)))
        _replace(model, norm_name, nn.Identity())
    for m in model.modules():
        if isinstance(m, Fused):
            m.frozen = True
    if folded:
        model.register_load_state_dict_pre_hook(functools.partial(_refuse_unfrozen, tuple(folded)))
    if left:
        warnings.warn(
            f'timm_attn.fuse(freeze=True) leaves {len(left)} BatchNorms as they are, for the convolution before them '
            'is not a plain one, is used twice, or has hooks (pruning, weight_norm, attention of its own): '
            f'{", ".join(left[:5])}.',
            stacklevel=3,
        )


def _replace(model: nn.Module, name: str, by: nn.Module) -> None:
    parent, _, child = name.rpartition('.')
    setattr(model.get_submodule(parent), child, by)


def _refuse_unfrozen(
    folded: tuple[str, ...], module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any
) -> None:
    """A hook of load_state_dict: the checkpoint of a model that is not frozen does not fit, strict or not."""
    found = [name for name in folded if f'{prefix}{name}.running_mean' in state]
    if found:
        raise ValueError(
            f'The checkpoint has BatchNorms ({prefix}{found[0]} and others, {len(found)} in all) that '
            'timm_attn.fuse(freeze=True) has folded into the convolutions of this model. Load it into the model before '
            'fusing; nothing was loaded.'
        )


def fuse(model: nn.Module, *, freeze: bool = False, compile: bool = True) -> nn.Module:
    """Has the blocks of a ResNet keep less for backward and take fewer passes over memory, in place.

    Outputs, gradients, keys and running statistics stay. Gradients of gradients are refused. A block takes its ordinary
    way where the fused one is not known to be the same: under other compilers and exporters, and when its parts have
    hooks or have been replaced by others.

    Args:
        model: A registered or injected model, or timm's plain ResNet.
        freeze: For inference only: put the model into eval mode and fold each BatchNorm into the convolution before
            it. The BatchNorms' keys vanish, and the convolutions get biases. Checkpoints of the model before are
            refused from then on (ValueError). In train mode the model is the folded one.
        compile: Compile the passes between convolutions with torch.compile, once for all blocks (up to a minute, at
            the first passes); without it, blocks keep less but are not faster.

    Returns:
        The same model.
    """
    new = [m for m in model.modules() if type(m) in _FUSED]
    done = [m for m in model.modules() if type(m) in _FUSED.values()]
    if not new and not done:
        warnings.warn(
            f'{type(model).__name__} has no block that timm_attn.fuse knows (timm.models.resnet and those of '
            'timm_attn): it stays as it is.',
            stacklevel=2,
        )
        return model
    for m in new:
        m.__class__ = _FUSED[type(m)]
    for m in model.modules():
        if type(m) in _AROUND:
            m.__class__ = _AROUND[type(m)]
    for m in new + done:
        cast(Any, m).compiled = compile
        for part in m.modules():
            if isinstance(part, nn.Conv2d) and type(part) in (nn.Conv2d, GateConv) and is_gate_conv(part):
                part.__class__ = FusedGateConv
    if freeze:
        _freeze(model)
    return model
