"""Names for combinations of bases, attentions and places, so that timm's own suite runs on `injected`.

    TIMM_PLUGIN=injected_models TIMM_FILTER='in_*' tests/timm_suite/run.sh

The bases are timm's small ones for tests. Each attention is there, in slots and behind modules, with channels first and
last.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model

from timm_attn.models.injected import injected

COMBINATIONS: dict[str, dict[str, Any]] = {
    'in_slots_se': dict(base='test_resnet', attn='se'),
    'in_slots_cbam': dict(base='test_resnet', attn='cbam'),
    'in_slots_eca': dict(base='resnet10t', attn='eca'),
    'in_slots_bam': dict(base='test_resnet', attn='bam', attn_args={'rd_ratio': 0.25}),
    'in_slots_gam': dict(base='test_byobnet', attn='gam', at=r'stages\.\d', attn_args={'rd_ratio': 0.25}),
    'in_slots_nf': dict(base='nf_resnet26', attn='se'),
    'in_stages_srm': dict(base='test_convnext', attn='srm', at=r'stages\.\d'),
    'in_stages_triplet': dict(base='test_convnext', attn='triplet', at=r'stages\.\d'),
    'in_stages_csa': dict(base='test_convnext2', attn='csa', at=r'stages\.[23]'),
    'in_stages_gsop': dict(base='test_efficientnet', attn='gsop', at=r'blocks\.[23]', attn_args={'dim': 16}),
    'in_stages_coord': dict(base='test_efficientnet', attn='coord', at=r'blocks\.\d'),
    'in_stages_fca': dict(base='test_resnet', attn='fca', at=r'layer\d', attn_args={'rd_ratio': 0.25}),
    'in_stages_gct': dict(base='test_efficientnet_gn', attn='gct', at=r'blocks\.\d'),
    'in_blocks_gc': dict(base='test_efficientnet_ln', attn='gc', at=r'blocks\.\d\.\d', attn_args={'rd_ratio': 0.25}),
    'in_blocks_scse': dict(base='mobilenetv2_035', attn='scse', at=r'blocks\.[3-6]\.0', attn_args={'rd_ratio': 0.5}),
    'in_blocks_ema': dict(base='test_byobnet', attn='ema', at=r'stages\.\d\.\d', attn_args={'groups': 4}),
    'in_conv2_sge': dict(base='test_resnet', attn='sge', attn_args={'groups': 4}),
    'in_conv2_simam': dict(base='test_resnet', attn='simam', start='paper'),
    'in_stages_scsa': dict(base='test_resnet', attn='scsa', at=r'layer[34]'),
    'in_one_nl': dict(base='test_resnet', attn='nl', at=r'layer3'),
    'in_rows_cbam': dict(base='test_mambaout', attn='cbam', at=r'stages\.\d', fmt='NHWC', attn_args={'rd_ratio': 0.25}),
    'in_twice': dict(
        base='test_resnet', injections=[dict(attn='se'), dict(attn='eca', at=[r'layer2', r'layer3'], where='output')]
    ),
}

default_cfgs = generate_default_cfgs(
    {name: {'num_classes': 1000, 'input_size': (3, 160, 160)} for name in COMBINATIONS}
)


def _register(name: str, combination: dict[str, Any]) -> None:
    def build(pretrained: bool = False, pretrained_cfg: Any = None, **kwargs: Any) -> Any:
        return injected(pretrained, **combination, **kwargs)

    build.__name__ = build.__qualname__ = name
    register_model(build)


for _name, _combination in COMBINATIONS.items():
    _register(_name, _combination)
__all__ = list(COMBINATIONS)  # pyright: ignore[reportUnsupportedDunderAll]
