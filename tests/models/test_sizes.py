"""Parameters and multiply-accumulates of every model, against the counts of the published nets.

Nothing is computed: the models live on the meta device. MACs are those of convolutions, linear layers and matrix
products (half of what torch's FlopCounterMode counts), for one 224 x 224 image and 1000 classes.
"""

from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_attn import inject, list_attn
from timm_attn.models import cifar_stem_

DEPTH_152 = {'layers': (3, 8, 36, 3)}
PLAIN = {
    18: (11_689_512, 1_814_073_344),
    34: (21_797_672, 3_663_761_408),
    50: (25_557_032, 4_089_184_256),
    101: (44_549_160, 7_801_405_440),
    152: (60_192_808, 11_513_626_624),
}
PLAIN_CIFAR100 = {
    18: (11_220_132, 555_468_800),
    34: (21_328_292, 1_159_448_576),
    50: (23_705_252, 1_298_014_208),
    101: (42_697_380, 2_510_168_064),
}
SIZES: list[tuple[str, dict[str, Any], int, int]] = [
    ('se_resnet18', {}, 11_778_592, 1_814_160_384),
    ('se_resnet34', {}, 21_958_868, 3_663_918_592),
    ('se_resnet50', {}, 28_088_024, 4_091_699_200),
    ('se_resnet101', {}, 49_326_872, 7_806_148_608),
    ('se_resnet152', {}, 66_821_848, 11_520_204_800),
    ('se_resnet18', {'attn_args': {'bias': False}}, 11_776_552, 1_814_160_384),
    ('se_resnet34', {'attn_args': {'bias': False}}, 21_954_856, 3_663_918_592),
    ('se_resnet50', {'attn_args': {'bias': False}}, 28_071_976, 4_091_699_200),
    ('se_resnet101', {'attn_args': {'bias': False}}, 49_292_328, 7_806_148_608),
    ('se_resnet152', {'attn_args': {'bias': False}}, 66_770_984, 11_520_204_800),
    ('cbam_resnet18', {}, 11_779_392, 1_815_063_764),
    ('cbam_resnet34', {}, 21_960_468, 3_665_434_742),
    ('cbam_resnet50', {}, 28_089_624, 4_095_573_110),
    ('cbam_resnet101', {}, 49_330_172, 7_812_577_278),
    ('cbam_resnet101', DEPTH_152, 66_826_848, 11_529_025_510),
    ('bam_resnet18', {}, 11_712_503, 1_819_224_000),
    ('bam_resnet34', {}, 21_820_663, 3_668_912_064),
    ('bam_resnet50', {}, 25_915_099, 4_171_331_328),
    ('bam_resnet101', {}, 44_907_227, 7_883_552_512),
    ('bam_resnet101', DEPTH_152, 60_550_875, 11_595_773_696),
    ('gam_resnet18', {}, 16_049_672, 2_456_326_144),
    ('gam_resnet34', {}, 29_672_920, 4_948_267_008),
    ('gam_resnet50', {}, 58_944_232, 9_535_488_000),
    ('gam_resnet101', {}, 107_534_312, 19_034_406_912),
    ('gam_resnet18', {'attn_args': {'groups': 4}}, 12_850_952, 1_984_270_336),
    ('gam_resnet34', {'attn_args': {'groups': 4}}, 23_896_408, 4_004_155_392),
    ('gam_resnet50', {'attn_args': {'groups': 1}}, 151_368_424, 24_641_273_856),
    ('gam_resnet101', {'attn_args': {'groups': 1}}, 281_845_736, 50_190_090_240),
    ('eca_resnet18', {}, 11_689_556, 1_814_085_760),
    ('eca_resnet34', {}, 21_797_744, 3_663_781_952),
    ('eca_resnet50', {}, 25_557_112, 4_089_270_528),
    ('eca_resnet101', {}, 44_549_317, 7_801_574_656),
    ('eca_resnet152', {}, 60_193_042, 11_513_868_544),
    ('srm_resnet18', {}, 11_697_192, PLAIN[18][1]),
    ('srm_resnet34', {}, 21_812_776, PLAIN[34][1]),
    ('srm_resnet50', {}, 25_617_448, PLAIN[50][1]),
    ('srm_resnet101', {}, 44_679_208, PLAIN[101][1]),
    ('srm_resnet152', {}, 60_384_296, PLAIN[152][1]),
    ('triplet_resnet18', {}, 11_691_912, 1_820_509_396),
    ('triplet_resnet34', {}, 21_802_472, 3_676_359_798),
    ('triplet_resnet50', {}, 25_561_832, 4_135_500_918),
    ('triplet_resnet101', {}, 44_559_060, 7_895_816_190),
    ('triplet_resnet18', {'attn_args': {'kernel_size': 3}}, 11_689_992, 1_815_255_476),
    ('triplet_resnet34', {'attn_args': {'kernel_size': 3}}, 21_798_632, 3_666_075_398),
    ('triplet_resnet50', {'attn_args': {'kernel_size': 3}}, 25_557_992, 4_097_691_398),
    ('triplet_resnet101', {'attn_args': {'kernel_size': 3}}, 44_551_140, 7_818_746_190),
    ('gsop_resnet50', {}, 28_285_224, 6_397_100_032),
    ('gsop_resnet101', {}, 47_277_352, 10_109_321_216),
    ('sk_resnet50', {}, 26_154_496, 4_147_222_784),
    ('sk_resnet101', {}, 45_678_112, 7_921_068_288),
    ('sk_resnet101', DEPTH_152, 61_760_000, 11_694_876_928),
    ('sk_resnext50_32x4d', {}, 27_479_784, 4_462_710_784),
    ('sk_resnext101_32x4d', {}, 48_736_040, 8_448_724_992),
    # FCA's transform is a product and a sum, which are not counted.
    ('fca_resnet34', {}, 21_954_856, 3_663_918_592),
    ('fca_resnet50', {}, 28_071_976, 4_091_699_200),
    ('fca_resnet101', {}, 49_292_328, 7_806_148_608),
    ('fca_resnet152', {}, 66_770_984, 11_520_204_800),
    ('coord_resnet18', {}, 11_764_248, 1_815_220_224),
    ('coord_resnet50', {}, 27_474_864, 4_116_250_624),
    ('gc_resnet18', {}, 11_780_760, 1_815_665_664),
    ('gc_resnet50', {}, 28_105_032, 4_102_737_920),
    ('gc_resnet50', {'attn_args': {'fuse': 'mul'}}, 28_105_032, 4_102_737_920),
    ('scse_resnet18', {}, 11_780_520, 1_814_913_024),
    ('scse_resnet50', {}, 28_103_144, 4_097_218_560),
    ('scse_resnet18', {'attn_args': {'rd_ratio': 1 / 2}}, 12_390_640, 1_815_522_304),
    ('scse_resnet50', {'attn_args': {'rd_ratio': 1 / 2}}, 45_714_360, 4_114_823_168),
    ('gct_resnet18', {}, 11_695_272, PLAIN[18][1]),
    ('gct_resnet50', {}, 25_602_344, PLAIN[50][1]),
    ('ema_resnet18', {}, 11_696_552, 1_844_910_080),
    ('ema_resnet50', {}, 25_755_400, 5_038_600_192),
    ('ema_resnet18', {'attn_args': {'groups': 8}}, 11_799_272, 1_932_904_448),
    ('ema_resnet50', {'attn_args': {'groups': 8}}, 28_708_264, 7_853_731_840),
    ('sge_resnet18', {}, 11_690_536, PLAIN[18][1]),
    ('sge_resnet50', {}, 25_559_080, PLAIN[50][1]),
    # One block of C channels and M pixels: 4Ch + 3h + 2C parameters and 2C²M + CM² multiplications, h = C / 2.
    ('nl_resnet18', {}, 11_821_480, 1_849_597_952),
    ('nl_resnet50', {}, 27_657_768, 4_539_564_032),
    ('scsa_resnet18', {}, 11_720_232, 1_818_657_792),
    ('scsa_resnet50', {}, 25_798_696, 4_226_492_416),
    ('simam_resnet18', {}, *PLAIN[18]),
    ('simam_resnet50', {}, *PLAIN[50]),
]
# Other depths and places of the same modules, into timm's plain nets.
INJECTED: list[tuple[str, int, dict[str, Any], int, int]] = [
    ('coord', 34, {}, 21_933_168, 3_665_940_480),
    ('gc', 34, {}, 21_963_132, 3_666_678_272),
    ('scse', 34, {'rd_ratio': 1 / 16}, 21_962_660, 3_665_298_432),
    ('gct', 34, {}, 21_809_000, PLAIN[34][1]),
    ('ema', 34, {}, 21_810_424, 3_725_169_664),
    ('sge', 34, {}, 21_799_720, PLAIN[34][1]),
    ('scsa', 34, {}, 21_858_088, 3_672_922_624),
    ('simam', 34, {'e_lambda': 0.1}, *PLAIN[34]),
]


def create_model(name: str, **kwargs: Any) -> Any:
    """timm's; its models have methods and layers that `nn.Module`, the declared type, does not know."""
    return timm.create_model(name, **kwargs)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module, size: int = 224) -> int:
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, 3, size, size, device='meta'))
    return counter.get_total_flops() // 2


def meta(name: str, **kwargs: Any) -> Any:
    return create_model(name, device='meta', **kwargs)


@pytest.mark.parametrize('depth', PLAIN)
def test_count_of_the_plain_net_is_the_known_one(depth: int) -> None:
    """The measuring itself, on timm's own models."""
    model = meta(f'resnet{depth}')
    assert (parameters(model), macs(model)) == PLAIN[depth]


@pytest.mark.parametrize(
    ('name', 'kwargs', 'params', 'multiplications'), SIZES, ids=lambda v: v if isinstance(v, str) else None
)
def test_size_is_that_of_the_published_net(
    name: str, kwargs: dict[str, Any], params: int, multiplications: int
) -> None:
    model = meta(name, **kwargs)
    assert parameters(model) == params
    assert macs(model) == multiplications


@pytest.mark.parametrize(('name', 'depth', 'args', 'params', 'multiplications'), INJECTED)
def test_size_of_an_injected_net_is_the_counted_one(
    name: str, depth: int, args: dict[str, Any], params: int, multiplications: int
) -> None:
    model = inject(meta(f'resnet{depth}'), name, start='paper', **args)
    assert (parameters(model), macs(model)) == (params, multiplications)


def test_every_published_model_has_its_size_here() -> None:
    """Channel self-attention is the project's own: its sizes are counted by hand below."""
    ours = timm.list_models(module='attn_resnet') + timm.list_models(module='sk_resnet')
    assert {name for name, *_ in SIZES} == {name for name in ours if not name.startswith('csa_')}


@pytest.mark.parametrize(
    ('depth', 'blocks', 'expansion'), [(18, (2, 2, 2, 2), 1), (34, (3, 4, 6, 3), 1), (50, (3, 4, 6, 3), 4)]
)
def test_csa_size_follows_from_its_equation(depth: int, blocks: tuple[int, ...], expansion: int) -> None:
    params, multiplications = PLAIN[depth]
    for stage, count in enumerate(blocks):
        c, pixels = 64 * 2**stage * expansion, (56 // 2**stage) ** 2
        w = c // 8  # queries, keys and values
        params += count * (3 * c * w + w * c + c + 1 + 1)  # qkv, proj and its bias, temperature, gamma
        multiplications += count * pixels * (3 * c * w + w * c + 2 * w * w)
    model = meta(f'csa_resnet{depth}')
    assert (parameters(model), macs(model)) == (params, multiplications)


@pytest.mark.parametrize('depth', PLAIN_CIFAR100)
def test_cifar_stem_has_the_known_size(depth: int) -> None:
    plain = cifar_stem_(create_model(f'resnet{depth}', num_classes=100)).to('meta')
    assert (parameters(plain), macs(plain, 32)) == PLAIN_CIFAR100[depth]


@pytest.mark.parametrize('name', list_attn())
def test_cifar_stem_adds_the_same_attention(name: str) -> None:
    depth = {'gsop': 50, 'sk': 50, 'fca': 34}.get(name, 18)
    attention = parameters(meta(f'{name}_resnet{depth}')) - PLAIN[depth][0]
    model = meta(f'{name}_resnet{depth}', num_classes=100, cifar_stem=True)
    assert parameters(model) == PLAIN_CIFAR100[depth][0] + attention


@pytest.mark.parametrize(
    ('name', 'attention'),
    [
        ('simple_cnn', 0),
        # Per convolution: 2Ch + h + C for SE; and 100 for CBAM's spatial gate; k = 3 for ECA; 4C for SRM; 300 for
        # Triplet.
        ('simple_cnn_se', (2 * 32 * 2 + 2 + 32) + (2 * 64 * 4 + 4 + 64)),
        ('simple_cnn_cbam', (2 * 32 * 2 + 2 + 32 + 100) + (2 * 64 * 4 + 4 + 64 + 100)),
        ('simple_cnn_eca', 3 + 3),
        ('simple_cnn_srm', 4 * 32 + 4 * 64),
        ('simple_cnn_triplet', 300 + 300),
        # 2Ch(1 + 49) + 4h + 4C
        ('simple_cnn_gam', (2 * 32 * 2 * 50 + 4 * 2 + 4 * 32) + (2 * 64 * 4 * 50 + 4 * 4 + 4 * 64)),
        # 3Cw + wC + C + 2
        ('simple_cnn_csa', (4 * 32 * 4 + 32 + 2) + (4 * 64 * 8 + 64 + 2)),
    ],
)
def test_simple_cnn_is_two_convolutions_and_attention(name: str, attention: int) -> None:
    plain = (3 * 32 * 9 + 32) + (32 * 64 * 9 + 64) + (64 * 10 + 10)
    assert parameters(meta(name, num_classes=10)) == plain + attention
