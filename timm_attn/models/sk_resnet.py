"""ResNets whose 3x3 convolutions choose their kernel: SK-ResNet* and SKNet.

`sk_resnet50` is the author's PyTorch net (dense and grouped 3x3); `sk_resnext50_32x4d` is the paper's SKNet-50, which
timm calls `skresnext50_32x4d`. A plain ResNet's 3x3 convolution has no place in them, so there is no exact warm start
from its weights.
"""

from typing import Any

from timm.models.resnet import Bottleneck, ResNet
from torch import nn

from ..layers import check_attn_args, create_attn
from ._build import AdvisesConvert, build, register_model
from .attn_resnet import check_classifier, cifar_stem_

__all__ = ['SKBottleneck', 'SKResNet']


class SKBottleneck(Bottleneck):
    """timm's Bottleneck with a selective kernel in place of conv2, bn2 and act2.

    Args:
        *args: timm's Bottleneck's.
        attn_args: Options of the selective kernel.
        **kwargs: timm's Bottleneck's.

    Raises:
        ValueError: `block_reduce_first` narrows what the selective kernel takes, or a `norm_layer` or `act_layer` is
            not its own.
    """

    def __init__(self, *args: Any, attn_args: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        conv: Any = self.conv2
        if conv.in_channels != conv.out_channels:
            raise ValueError(
                f'block_reduce_first (={kwargs["reduce_first"]}) gives the 3x3 convolution {conv.in_channels} channels '
                f'for {conv.out_channels}, and a selective kernel has as many on both sides: leave it at 1.'
            )
        for argument, own in (('norm_layer', nn.BatchNorm2d), ('act_layer', nn.ReLU)):
            if (given := kwargs.get(argument, own)) is not own:
                raise ValueError(f'{argument} (={given}) must be {own.__name__}: a selective kernel has it inside.')
        self.conv2 = create_attn(
            'sk',
            conv.out_channels,
            stride=conv.stride[0],
            dilation=conv.dilation[0],
            device=kwargs.get('device'),
            dtype=kwargs.get('dtype'),
            **attn_args,
        )
        self.bn2 = nn.Identity()
        self.act2 = nn.Identity()


class SKResNet(AdvisesConvert, ResNet):
    """timm's ResNet of selective-kernel bottlenecks.

    Args:
        *args: timm's ResNet's.
        attn_args: Options of the selective kernel: `form` and `rd_ratio`.
        cifar_stem: 3x3 stem without max-pool, for 32x32 images.
        block_args: timm's ResNet's.
        **kwargs: timm's ResNet's.

    Raises:
        ValueError: The selective kernel does not fit the model's channels, norms or activations.
        TypeError: Unknown options, or those that the block itself sets.
    """

    def __init__(
        self,
        *args: Any,
        attn_args: dict[str, Any] | None = None,
        cifar_stem: bool = False,
        block_args: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        attn_args = dict(attn_args or {})
        check_attn_args('sk', attn_args)
        taken = [a for a in attn_args if a in ('stride', 'dilation')]
        if taken:
            raise TypeError(f"A block sets its kernel's {', '.join(taken)} itself. Accepted: form, rd_ratio.")
        super().__init__(*args, block_args={**(block_args or {}), 'attn_args': attn_args}, **kwargs)
        check_classifier(self)
        self.attn = 'sk'
        self.attn_args = attn_args
        if cifar_stem:
            cifar_stem_(self)


def _create_sk_resnet(variant: str, pretrained: bool, kwargs: dict[str, Any], **defaults: Any) -> SKResNet:
    return build(SKResNet, variant, pretrained, dict(block=SKBottleneck, **defaults), kwargs)


default_cfgs: dict[str, Any] = {}  # filled by register_model


@register_model
def sk_resnet50(pretrained: bool = False, **kwargs: Any) -> SKResNet:
    """SK-ResNet-50*, the author's PyTorch net - https://arxiv.org/abs/1903.06586"""
    return _create_sk_resnet('sk_resnet50', pretrained, kwargs, layers=(3, 4, 6, 3))


@register_model
def sk_resnet101(pretrained: bool = False, **kwargs: Any) -> SKResNet:
    """SK-ResNet-101*, the author's PyTorch net - https://arxiv.org/abs/1903.06586"""
    return _create_sk_resnet('sk_resnet101', pretrained, kwargs, layers=(3, 4, 23, 3))


@register_model
def sk_resnext50_32x4d(pretrained: bool = False, **kwargs: Any) -> SKResNet:
    """SKNet-50 of the paper, timm's skresnext50_32x4d - https://arxiv.org/abs/1903.06586"""
    return _create_sk_resnet(
        'sk_resnext50_32x4d',
        pretrained,
        kwargs,
        layers=(3, 4, 6, 3),
        cardinality=32,
        base_width=4,
        attn_args=dict(form='sknet'),
    )


@register_model
def sk_resnext101_32x4d(pretrained: bool = False, **kwargs: Any) -> SKResNet:
    """SKNet-101 by the paper's rule for the squeeze - https://arxiv.org/abs/1903.06586

    The released prototxt departs from its rule in one stage (16 in place of 32).
    """
    return _create_sk_resnet(
        'sk_resnext101_32x4d',
        pretrained,
        kwargs,
        layers=(3, 4, 23, 3),
        cardinality=32,
        base_width=4,
        attn_args=dict(form='sknet'),
    )
