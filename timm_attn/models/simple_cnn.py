"""A CNN of two convolutions, for teaching what attention adds: 3x3 with 32 and 64 filters, ReLU, pooling."""

from typing import Any

import torch
from timm.layers import ClassifierHead
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..injection import inject
from ._build import build, register_model

__all__ = ['SimpleCNN']


class ConvBlock(nn.Module):
    """conv 3x3 - attention - ReLU.

    Args:
        in_chs: Channels of the input.
        out_chs: Filters.
        slot: Have an empty attention slot.
    """

    __constants__ = ('has_slot',)

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        slot: bool,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chs, out_chs, 3, padding=1, device=device, dtype=dtype)
        self.act = nn.ReLU(inplace=True)
        if slot:
            self.se = nn.Identity()
        self.has_slot = slot

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        x = self.conv(x)
        if self.has_slot:
            x = self.se(x)
        return self.act(x)  # (N, out_chs, H, W)


class SimpleCNN(nn.Module):
    """Two convolutions and a linear classifier, with attention after one or both.

    Args:
        num_classes: Classes; 0 for no classifier.
        in_chans: Channels of the image.
        global_pool: timm's pooling before the classifier, '' for none.
        drop_rate: Dropout before the classifier.
        channels: Filters of the two convolutions.
        attn: One of `list_attn()` that goes into blocks, or None.
        attn_args: Its options.
        attn_after: After which convolutions it goes, counted from 1.
        device: Where the parameters are placed.
        dtype: Their type.

    Raises:
        ValueError: `attn_after` names no convolution, or the attention does not fit.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        channels: tuple[int, ...] = (32, 64),
        attn: str | None = None,
        attn_args: dict[str, Any] | None = None,
        attn_after: tuple[int, ...] = (1, 2),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not attn_after or not set(attn_after) <= set(range(1, len(channels) + 1)):
            raise ValueError(f'attn_after (={attn_after}) must name convolutions, counted 1 to {len(channels)}.')
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.attn = attn
        self.attn_args = dict(attn_args or {})
        self.grad_checkpointing = False

        blocks, self.feature_info = [], []
        for i, (in_chs, out_chs) in enumerate(zip((in_chans, *channels[:-1]), channels, strict=True)):
            # As in timm's VGG, a level of features is what goes into a pooling; the last one is what comes out.
            self.feature_info.append(dict(num_chs=out_chs, reduction=2**i, module=f'blocks.{len(blocks)}'))
            blocks.append(ConvBlock(in_chs, out_chs, i + 1 in attn_after, device=device, dtype=dtype))
            blocks.append(nn.MaxPool2d(2))
        self.feature_info.append(
            dict(num_chs=channels[-1], reduction=2 ** len(channels), module=f'blocks.{len(blocks) - 1}')
        )
        self.blocks = nn.Sequential(*blocks)
        self.num_features = self.head_hidden_size = channels[-1]
        self.head = ClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, device=device, dtype=dtype
        )
        if attn is not None:
            inject(self, attn, start='paper', **self.attn_args)
            del self._injections, self._base  # the attention is the model's own: see AttnResNet

    @torch.jit.ignore()
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers from the stem on, for learning rates by layer."""
        return dict(stem=r'^blocks\.0', blocks=r'^blocks\.(\d+)')

    @torch.jit.ignore()
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in backward, which takes less memory and more time."""
        self.grad_checkpointing = enable

    @torch.jit.ignore()
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one, or by none for `num_classes=0`."""
        self.num_classes = num_classes
        # A head without classifier has no parameter left to tell device and type.
        weight = next(self.blocks.parameters())
        self.head.reset(num_classes, pool_type=global_pool, device=weight.device, dtype=weight.dtype)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features and intermediates, as timm's models give them.

        Args:
            x: Images (N, in_chans, H, W).
            indices: Take the last n blocks if int, all if None, else these.
            norm: Without effect: there is no final norm.
            stop_early: Stop after the last block asked for.
            output_fmt: Must be 'NCHW'.
            intermediates_only: Return the list alone.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt (={output_fmt!r}) must be 'NCHW'.")
        take, last = feature_take_indices(len(self.feature_info), indices)
        wanted = {self.feature_info[i]['module'] for i in take}
        intermediates = []
        for name, block in self._until(last).named_children() if stop_early else self.blocks.named_children():
            x = checkpoint(block, x) if self.grad_checkpointing and not torch.jit.is_scripting() else block(x)
            if f'blocks.{name}' in wanted:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    @torch.jit.ignore()
    def _until(self, level: int) -> nn.Sequential:
        return self.blocks[: int(self.feature_info[level]['module'].split('.')[1]) + 1]

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop what comes after the last level asked for, and return the levels that were."""
        take, last = feature_take_indices(len(self.feature_info), indices)
        self.blocks = self._until(last)
        if prune_head:
            self.reset_classifier(0, '')
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) to the last features (N, C, h, w)."""
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features (N, C, h, w) to logits (N, num_classes), or to pooled features (N, C) with `pre_logits`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) to logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _create_simple_cnn(variant: str, pretrained: bool, kwargs: dict[str, Any], **defaults: Any) -> SimpleCNN:
    defaults['feature_cfg'] = dict(out_indices=(0, 1, 2), feature_cls='getter')
    return build(SimpleCNN, variant, pretrained, defaults, kwargs)


# What the configs of these models have besides their tags'; register_model takes it.
CFG: dict[str, Any] = dict(first_conv='blocks.0.conv', classifier='head.fc', pool_size=(56, 56))
default_cfgs: dict[str, Any] = {}


@register_model
def simple_cnn(pretrained: bool = False, **kwargs: Any) -> SimpleCNN:
    """Two convolutions, no attention: the baseline of the teaching comparison."""
    return _create_simple_cnn('simple_cnn', pretrained, kwargs)


@register_model
def simple_cnn_cbam(pretrained: bool = False, **kwargs: Any) -> SimpleCNN:
    """Two convolutions with CBAM after each; `attn_after=(1,)` keeps the first alone."""
    return _create_simple_cnn('simple_cnn_cbam', pretrained, kwargs, attn='cbam')


@register_model
def simple_cnn_csa(pretrained: bool = False, **kwargs: Any) -> SimpleCNN:
    """Two convolutions with channel self-attention after each; `attn_after=(1,)` keeps the first alone."""
    return _create_simple_cnn('simple_cnn_csa', pretrained, kwargs, attn='csa')


@register_model
def simple_cnn_eca(pretrained: bool = False, **kwargs: Any) -> SimpleCNN:
    """Two convolutions with ECA after each; `attn_after=(1,)` keeps the first alone."""
    return _create_simple_cnn('simple_cnn_eca', pretrained, kwargs, attn='eca')


@register_model
def simple_cnn_gam(pretrained: bool = False, **kwargs: Any) -> SimpleCNN:
    """Two convolutions with GAM after each; `attn_after=(1,)` keeps the first alone."""
    return _create_simple_cnn('simple_cnn_gam', pretrained, kwargs, attn='gam')


@register_model
def simple_cnn_se(pretrained: bool = False, **kwargs: Any) -> SimpleCNN:
    """Two convolutions with squeeze-and-excitation after each; `attn_after=(1,)` keeps the first alone."""
    return _create_simple_cnn('simple_cnn_se', pretrained, kwargs, attn='se')


@register_model
def simple_cnn_srm(pretrained: bool = False, **kwargs: Any) -> SimpleCNN:
    """Two convolutions with SRM after each; `attn_after=(1,)` keeps the first alone."""
    return _create_simple_cnn('simple_cnn_srm', pretrained, kwargs, attn='srm')


@register_model
def simple_cnn_triplet(pretrained: bool = False, **kwargs: Any) -> SimpleCNN:
    """Two convolutions with triplet attention after each; `attn_after=(1,)` keeps the first alone."""
    return _create_simple_cnn('simple_cnn_triplet', pretrained, kwargs, attn='triplet')
