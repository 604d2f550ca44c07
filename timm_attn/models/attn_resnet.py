"""ResNets with attention: timm's ResNet, attention injected at construction.

Every name is `<attention>_resnet<depth>`. The attention goes to the end of each residual branch, before the addition;
BAM follows stages 1 to 3; GSoP sits in the last block of each stage; the non-local block is one, in stage 3; SimAM
stands between conv2 and bn2.
"""

from typing import Any

import torch
from timm.models import generate_default_cfgs
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from ..injection import inject
from ..layers import attn_sites
from ..weights import cfgs_of
from ._build import AdvisesConvert, build, register_model

__all__ = ['AttnResNet', 'cifar_stem_']


def cifar_stem_(model: ResNet) -> ResNet:
    """Gives a ResNet the stem for 32x32 images, in place: 3x3 with stride 1, no max-pool.

    Args:
        model: A ResNet with timm's 7x7 stem.

    Returns:
        The same model; the reductions in `feature_info` are corrected.

    Raises:
        ValueError: The stem is not a single convolution, or its pool is one.
    """
    old = model.conv1
    if not isinstance(old, nn.Conv2d):
        raise ValueError(
            f'cifar_stem replaces a single convolution, but the stem is a {type(old).__name__}: leave out stem_type.'
        )
    if any(isinstance(m, nn.Conv2d) for m in model.maxpool.modules()):
        raise ValueError('cifar_stem has no pool, and replace_stem_pool asks for a convolution there: leave out one.')
    weight = old.weight
    model.conv1 = nn.Conv2d(
        old.in_channels, old.out_channels, 3, padding=1, bias=False, device=weight.device, dtype=weight.dtype
    )
    nn.init.kaiming_normal_(model.conv1.weight, mode='fan_out', nonlinearity='relu')
    model.maxpool = nn.Identity()
    infos: Any = model.feature_info
    for i, info in enumerate(infos):
        info['reduction'] //= 2 if i == 0 else 4
    return model


def _keep_resolution(model: ResNet) -> None:
    """Takes the stride out of the last stage, without dilation, as GSoP's released nets have it."""
    block: Any = model.get_submodule('layer4.0')
    if block.stride == 1:
        return  # output_stride has done so already
    for m in block.modules():
        if isinstance(m, nn.Conv2d) and m.stride == (2, 2):
            m.stride = (1, 1)
    # The stride may sit in a filter behind the convolution and in the shortcut's pool, which timm leaves out of blocks
    # without stride.
    block.aa = nn.Identity()
    if isinstance(block.downsample[0], nn.AvgPool2d):
        block.downsample[0] = nn.Identity()
    block.stride = 1
    info: Any = model.feature_info[-1]
    info['reduction'] //= 2


def check_classifier(model: ResNet) -> None:
    """Refuses a classifier behind no pooling, which timm builds and cannot run.

    Args:
        model: A ResNet.

    Raises:
        ValueError: `global_pool` is empty and there are classes.
    """
    if not isinstance(model.fc, nn.Identity) and model.global_pool.is_identity():
        raise ValueError(
            f"global_pool (='') leaves a map, which no classifier of {model.num_classes} classes takes: pass "
            'num_classes=0 with it.'
        )


class AttnResNet(AdvisesConvert, ResNet):
    """timm's ResNet with attention.

    Args:
        *args: timm's ResNet's.
        attn: One of `list_attn()` but 'sk'.
        attn_args: Options of the attention; a list holds one value for each stage.
        cifar_stem: 3x3 stem without max-pool, for 32x32 images.
        last_stride: Stride of the last stage, 2 or 1.
        **kwargs: timm's ResNet's.

    Raises:
        ValueError: The attention does not fit the model's channels, `last_stride` is neither, `cifar_stem` goes with
            another stem, or there is a classifier without pooling.
        TypeError: Unknown attention options.
    """

    def __init__(
        self,
        *args: Any,
        attn: str,
        attn_args: dict[str, Any] | None = None,
        cifar_stem: bool = False,
        last_stride: int = 2,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.attn = attn
        self.attn_args = dict(attn_args or {})
        if last_stride not in (1, 2):
            raise ValueError(f'last_stride (={last_stride}) must be 1 or 2.')
        check_classifier(self)
        if cifar_stem:
            cifar_stem_(self)
        if last_stride == 1:
            _keep_resolution(self)
        # After ResNet's own weight init, which would overwrite the attention's.
        inject(self, attn, start='paper', **self.attn_args)
        # The attention is the model's own: nothing to eject, and what is injected later can be told from it.
        del self._injections, self._base

    @torch.jit.ignore()
    def init_weights(self, zero_init_last: bool = True) -> None:
        """timm's initialisation of the backbone; attention keeps its own.

        Args:
            zero_init_last: Start the last BatchNorm of each branch at 0.
        """
        kept = {name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in attn_sites(self).items()}
        super().init_weights(zero_init_last=zero_init_last)
        for name, m in attn_sites(self).items():
            m.load_state_dict(kept[name])


def _create_attn_resnet(variant: str, pretrained: bool, kwargs: dict[str, Any], **defaults: Any) -> AttnResNet:
    return build(AttnResNet, variant, pretrained, defaults, kwargs)


RESNET18: dict[str, Any] = dict(block=BasicBlock, layers=(2, 2, 2, 2))
RESNET34: dict[str, Any] = dict(block=BasicBlock, layers=(3, 4, 6, 3))
RESNET50: dict[str, Any] = dict(block=Bottleneck, layers=(3, 4, 6, 3))
RESNET101: dict[str, Any] = dict(block=Bottleneck, layers=(3, 4, 23, 3))
RESNET152: dict[str, Any] = dict(block=Bottleneck, layers=(3, 8, 36, 3))

# The others are filled in by register_model. GSoP's last stage keeps the resolution.
default_cfgs: dict[str, Any] = generate_default_cfgs(cfgs_of(['gsop_resnet50', 'gsop_resnet101'], pool_size=(14, 14)))


@register_model
def se_resnet18(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """SE-ResNet-18, hidden width C // 16 - https://arxiv.org/abs/1709.01507"""
    return _create_attn_resnet('se_resnet18', pretrained, kwargs, **RESNET18, attn='se')


@register_model
def se_resnet34(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """SE-ResNet-34, hidden width C // 16 - https://arxiv.org/abs/1709.01507"""
    return _create_attn_resnet('se_resnet34', pretrained, kwargs, **RESNET34, attn='se')


@register_model
def se_resnet50(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """SE-ResNet-50, hidden width C // 16 - https://arxiv.org/abs/1709.01507"""
    return _create_attn_resnet('se_resnet50', pretrained, kwargs, **RESNET50, attn='se')


@register_model
def se_resnet101(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """SE-ResNet-101, hidden width C // 16 - https://arxiv.org/abs/1709.01507"""
    return _create_attn_resnet('se_resnet101', pretrained, kwargs, **RESNET101, attn='se')


@register_model
def se_resnet152(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """SE-ResNet-152, hidden width C // 16 - https://arxiv.org/abs/1709.01507"""
    return _create_attn_resnet('se_resnet152', pretrained, kwargs, **RESNET152, attn='se')


@register_model
def eca_resnet18(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """ECA-ResNet-18, kernels 3, 5, 7, 7 in the four stages - https://arxiv.org/abs/1910.03151"""
    return _create_attn_resnet(
        'eca_resnet18',
        pretrained,
        kwargs,
        **RESNET18,
        attn='eca',
        attn_args=dict(kernel_size=[3, 5, 7, 7]),
    )


@register_model
def eca_resnet34(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """ECA-ResNet-34, kernels 3, 3, 5, 7 in the four stages - https://arxiv.org/abs/1910.03151"""
    return _create_attn_resnet(
        'eca_resnet34',
        pretrained,
        kwargs,
        **RESNET34,
        attn='eca',
        attn_args=dict(kernel_size=[3, 3, 5, 7]),
    )


@register_model
def eca_resnet50(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """ECA-ResNet-50, kernels 3, 5, 5, 7 in the four stages - https://arxiv.org/abs/1910.03151"""
    return _create_attn_resnet(
        'eca_resnet50',
        pretrained,
        kwargs,
        **RESNET50,
        attn='eca',
        attn_args=dict(kernel_size=[3, 5, 5, 7]),
    )


@register_model
def eca_resnet101(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """ECA-ResNet-101, kernels 3, 3, 5, 7 in the four stages - https://arxiv.org/abs/1910.03151"""
    return _create_attn_resnet(
        'eca_resnet101',
        pretrained,
        kwargs,
        **RESNET101,
        attn='eca',
        attn_args=dict(kernel_size=[3, 3, 5, 7]),
    )


@register_model
def eca_resnet152(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """ECA-ResNet-152, kernels 3, 3, 5, 7 in the four stages - https://arxiv.org/abs/1910.03151"""
    return _create_attn_resnet(
        'eca_resnet152',
        pretrained,
        kwargs,
        **RESNET152,
        attn='eca',
        attn_args=dict(kernel_size=[3, 3, 5, 7]),
    )


@register_model
def srm_resnet18(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """SRM-ResNet-18 - https://arxiv.org/abs/1903.10829"""
    return _create_attn_resnet('srm_resnet18', pretrained, kwargs, **RESNET18, attn='srm')


@register_model
def srm_resnet34(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """SRM-ResNet-34 - https://arxiv.org/abs/1903.10829"""
    return _create_attn_resnet('srm_resnet34', pretrained, kwargs, **RESNET34, attn='srm')


@register_model
def srm_resnet50(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """SRM-ResNet-50 - https://arxiv.org/abs/1903.10829"""
    return _create_attn_resnet('srm_resnet50', pretrained, kwargs, **RESNET50, attn='srm')


@register_model
def srm_resnet101(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """SRM-ResNet-101 - https://arxiv.org/abs/1903.10829"""
    return _create_attn_resnet('srm_resnet101', pretrained, kwargs, **RESNET101, attn='srm')


@register_model
def srm_resnet152(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """SRM-ResNet-152 - https://arxiv.org/abs/1903.10829"""
    return _create_attn_resnet('srm_resnet152', pretrained, kwargs, **RESNET152, attn='srm')


@register_model
def cbam_resnet18(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """CBAM-ResNet-18 - https://arxiv.org/abs/1807.06521"""
    return _create_attn_resnet('cbam_resnet18', pretrained, kwargs, **RESNET18, attn='cbam')


@register_model
def cbam_resnet34(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """CBAM-ResNet-34 - https://arxiv.org/abs/1807.06521"""
    return _create_attn_resnet('cbam_resnet34', pretrained, kwargs, **RESNET34, attn='cbam')


@register_model
def cbam_resnet50(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """CBAM-ResNet-50 - https://arxiv.org/abs/1807.06521"""
    return _create_attn_resnet('cbam_resnet50', pretrained, kwargs, **RESNET50, attn='cbam')


@register_model
def cbam_resnet101(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """CBAM-ResNet-101 - https://arxiv.org/abs/1807.06521"""
    return _create_attn_resnet('cbam_resnet101', pretrained, kwargs, **RESNET101, attn='cbam')


@register_model
def bam_resnet18(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """BAM-ResNet-18, the released product form - https://arxiv.org/abs/1807.06514"""
    return _create_attn_resnet('bam_resnet18', pretrained, kwargs, **RESNET18, attn='bam')


@register_model
def bam_resnet34(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """BAM-ResNet-34, the released product form - https://arxiv.org/abs/1807.06514"""
    return _create_attn_resnet('bam_resnet34', pretrained, kwargs, **RESNET34, attn='bam')


@register_model
def bam_resnet50(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """BAM-ResNet-50, the released product form - https://arxiv.org/abs/1807.06514"""
    return _create_attn_resnet('bam_resnet50', pretrained, kwargs, **RESNET50, attn='bam')


@register_model
def bam_resnet101(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """BAM-ResNet-101, the released product form - https://arxiv.org/abs/1807.06514"""
    return _create_attn_resnet('bam_resnet101', pretrained, kwargs, **RESNET101, attn='bam')


@register_model
def gam_resnet18(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """GAM-ResNet-18, r = 16, one group - https://arxiv.org/abs/2112.05561"""
    return _create_attn_resnet('gam_resnet18', pretrained, kwargs, **RESNET18, attn='gam')


@register_model
def gam_resnet34(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """GAM-ResNet-34, r = 16, one group - https://arxiv.org/abs/2112.05561"""
    return _create_attn_resnet('gam_resnet34', pretrained, kwargs, **RESNET34, attn='gam')


@register_model
def gam_resnet50(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """GAM-ResNet-50, r = 16, 4 groups with the shuffle between the convolutions - https://arxiv.org/abs/2112.05561"""
    return _create_attn_resnet('gam_resnet50', pretrained, kwargs, **RESNET50, attn='gam', attn_args=dict(groups=4))


@register_model
def gam_resnet101(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """GAM-ResNet-101, r = 16, 4 groups with the shuffle between the convolutions - https://arxiv.org/abs/2112.05561"""
    return _create_attn_resnet(
        'gam_resnet101',
        pretrained,
        kwargs,
        **RESNET101,
        attn='gam',
        attn_args=dict(groups=4),
    )


@register_model
def triplet_resnet18(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """Triplet-attention ResNet-18, kernel 7 - https://arxiv.org/abs/2010.03045"""
    return _create_attn_resnet('triplet_resnet18', pretrained, kwargs, **RESNET18, attn='triplet')


@register_model
def triplet_resnet34(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """Triplet-attention ResNet-34, kernel 7 - https://arxiv.org/abs/2010.03045"""
    return _create_attn_resnet('triplet_resnet34', pretrained, kwargs, **RESNET34, attn='triplet')


@register_model
def triplet_resnet50(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """Triplet-attention ResNet-50, kernel 7 - https://arxiv.org/abs/2010.03045"""
    return _create_attn_resnet('triplet_resnet50', pretrained, kwargs, **RESNET50, attn='triplet')


@register_model
def triplet_resnet101(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """Triplet-attention ResNet-101, kernel 7 - https://arxiv.org/abs/2010.03045"""
    return _create_attn_resnet('triplet_resnet101', pretrained, kwargs, **RESNET101, attn='triplet')


@register_model
def gsop_resnet50(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """GSoP-Net1 of depth 50; its last stage has stride 1 - https://arxiv.org/abs/1811.12006

    It has no warm start: a plain ResNet halves the map before its last stage, GSoP-Net1 does not.
    """
    return _create_attn_resnet(
        'gsop_resnet50',
        pretrained,
        kwargs,
        **RESNET50,
        attn='gsop',
        attn_args=dict(stride=[2, 1, 1, 1]),
        last_stride=1,
    )


@register_model
def gsop_resnet101(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """GSoP-Net1 of depth 101; its last stage has stride 1 - https://arxiv.org/abs/1811.12006

    It has no warm start: a plain ResNet halves the map before its last stage, GSoP-Net1 does not.
    """
    return _create_attn_resnet(
        'gsop_resnet101',
        pretrained,
        kwargs,
        **RESNET101,
        attn='gsop',
        attn_args=dict(stride=[2, 1, 1, 1]),
        last_stride=1,
    )


@register_model
def csa_resnet18(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """ResNet-18 with channel self-attention, the project's own - https://arxiv.org/abs/2106.09681"""
    return _create_attn_resnet('csa_resnet18', pretrained, kwargs, **RESNET18, attn='csa')


@register_model
def csa_resnet34(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """ResNet-34 with channel self-attention, the project's own - https://arxiv.org/abs/2106.09681"""
    return _create_attn_resnet('csa_resnet34', pretrained, kwargs, **RESNET34, attn='csa')


@register_model
def csa_resnet50(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """ResNet-50 with channel self-attention, the project's own - https://arxiv.org/abs/2106.09681"""
    return _create_attn_resnet('csa_resnet50', pretrained, kwargs, **RESNET50, attn='csa')


@register_model
def fca_resnet34(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """FcaNet-34, maps of 56, 28, 14 and 7 pixels in the four stages - https://arxiv.org/abs/2012.11879"""
    return _create_attn_resnet(
        'fca_resnet34', pretrained, kwargs, **RESNET34, attn='fca', attn_args=dict(dct_size=[56, 28, 14, 7])
    )


@register_model
def fca_resnet50(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """FcaNet-50, maps of 56, 28, 14 and 7 pixels in the four stages - https://arxiv.org/abs/2012.11879"""
    return _create_attn_resnet(
        'fca_resnet50', pretrained, kwargs, **RESNET50, attn='fca', attn_args=dict(dct_size=[56, 28, 14, 7])
    )


@register_model
def fca_resnet101(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """FcaNet-101, maps of 56, 28, 14 and 7 pixels in the four stages - https://arxiv.org/abs/2012.11879"""
    return _create_attn_resnet(
        'fca_resnet101', pretrained, kwargs, **RESNET101, attn='fca', attn_args=dict(dct_size=[56, 28, 14, 7])
    )


@register_model
def fca_resnet152(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """FcaNet-152, maps of 56, 28, 14 and 7 pixels in the four stages - https://arxiv.org/abs/2012.11879"""
    return _create_attn_resnet(
        'fca_resnet152', pretrained, kwargs, **RESNET152, attn='fca', attn_args=dict(dct_size=[56, 28, 14, 7])
    )


@register_model
def coord_resnet18(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """ResNet-18 with coordinate attention - https://arxiv.org/abs/2103.02907"""
    return _create_attn_resnet('coord_resnet18', pretrained, kwargs, **RESNET18, attn='coord')


@register_model
def coord_resnet50(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """ResNet-50 with coordinate attention - https://arxiv.org/abs/2103.02907"""
    return _create_attn_resnet('coord_resnet50', pretrained, kwargs, **RESNET50, attn='coord')


@register_model
def gc_resnet18(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """ResNet-18 with global context blocks, added - https://arxiv.org/abs/1904.11492"""
    return _create_attn_resnet('gc_resnet18', pretrained, kwargs, **RESNET18, attn='gc')


@register_model
def gc_resnet50(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """ResNet-50 with global context blocks, added - https://arxiv.org/abs/1904.11492"""
    return _create_attn_resnet('gc_resnet50', pretrained, kwargs, **RESNET50, attn='gc')


@register_model
def scse_resnet18(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """ResNet-18 with scSE, r = 16 in place of the released 2 - https://arxiv.org/abs/1808.08127"""
    return _create_attn_resnet(
        'scse_resnet18', pretrained, kwargs, **RESNET18, attn='scse', attn_args=dict(rd_ratio=1 / 16)
    )


@register_model
def scse_resnet50(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """ResNet-50 with scSE, r = 16 in place of the released 2 - https://arxiv.org/abs/1808.08127"""
    return _create_attn_resnet(
        'scse_resnet50', pretrained, kwargs, **RESNET50, attn='scse', attn_args=dict(rd_ratio=1 / 16)
    )


@register_model
def gct_resnet18(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """ResNet-18 with gated channel transformations - https://arxiv.org/abs/1909.11519

    Its authors have one before each convolution; here they stand at the ends of the residual branches.
    """
    return _create_attn_resnet('gct_resnet18', pretrained, kwargs, **RESNET18, attn='gct')


@register_model
def gct_resnet50(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """ResNet-50 with gated channel transformations - https://arxiv.org/abs/1909.11519

    Its authors have one before each convolution; here they stand at the ends of the residual branches.
    """
    return _create_attn_resnet('gct_resnet50', pretrained, kwargs, **RESNET50, attn='gct')


@register_model
def ema_resnet18(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """ResNet-18 with efficient multi-scale attention, 32 groups - https://arxiv.org/abs/2305.13563"""
    return _create_attn_resnet('ema_resnet18', pretrained, kwargs, **RESNET18, attn='ema')


@register_model
def ema_resnet50(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """ResNet-50 with efficient multi-scale attention, 32 groups - https://arxiv.org/abs/2305.13563"""
    return _create_attn_resnet('ema_resnet50', pretrained, kwargs, **RESNET50, attn='ema')


@register_model
def sge_resnet18(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """SGE-ResNet-18, 64 groups - https://arxiv.org/abs/1905.09646"""
    return _create_attn_resnet('sge_resnet18', pretrained, kwargs, **RESNET18, attn='sge')


@register_model
def sge_resnet50(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """SGE-ResNet-50, 64 groups - https://arxiv.org/abs/1905.09646"""
    return _create_attn_resnet('sge_resnet50', pretrained, kwargs, **RESNET50, attn='sge')


@register_model
def nl_resnet18(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """ResNet-18 with one non-local block, in layer3.0 - https://arxiv.org/abs/1711.07971"""
    return _create_attn_resnet('nl_resnet18', pretrained, kwargs, **RESNET18, attn='nl')


@register_model
def nl_resnet50(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """ResNet-50 with one non-local block, in layer3.4 - https://arxiv.org/abs/1711.07971"""
    return _create_attn_resnet('nl_resnet50', pretrained, kwargs, **RESNET50, attn='nl')


@register_model
def scsa_resnet18(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """ResNet-18 with spatial and channel synergistic attention - https://arxiv.org/abs/2407.05128

    Its authors have it in the middle of each block; here it stands at the ends of the residual branches.
    """
    return _create_attn_resnet('scsa_resnet18', pretrained, kwargs, **RESNET18, attn='scsa')


@register_model
def scsa_resnet50(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """ResNet-50 with spatial and channel synergistic attention - https://arxiv.org/abs/2407.05128

    Its authors have it in the middle of each block; here it stands at the ends of the residual branches.
    """
    return _create_attn_resnet('scsa_resnet50', pretrained, kwargs, **RESNET50, attn='scsa')


@register_model
def simam_resnet18(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """SimAM-ResNet-18, lambda 0.1 - https://proceedings.mlr.press/v139/yang21o.html

    It stands between conv2 and bn2, as in the published networks. It has no warm start.
    """
    return _create_attn_resnet(
        'simam_resnet18', pretrained, kwargs, **RESNET18, attn='simam', attn_args=dict(e_lambda=0.1)
    )


@register_model
def simam_resnet50(pretrained: bool = False, **kwargs: Any) -> AttnResNet:
    """SimAM-ResNet-50, lambda 0.1 - https://proceedings.mlr.press/v139/yang21o.html

    It stands between conv2 and bn2, as in the published networks. It has no warm start.
    """
    return _create_attn_resnet(
        'simam_resnet50', pretrained, kwargs, **RESNET50, attn='simam', attn_args=dict(e_lambda=0.1)
    )
