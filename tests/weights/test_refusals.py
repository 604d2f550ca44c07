"""What `convert` refuses, each with its reason, and without touching anything."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from timm_attn.weights import convert

Fill = Callable[[str], dict[str, Tensor]]


@pytest.mark.parametrize('source', [None, 'cadene'])
def test_cadenes_nets_are_refused_and_the_model_that_fits_is_named(source: str | None, filled: Fill) -> None:
    with pytest.raises(ValueError, match=r"stride is in the first 1x1 .*timm\.create_model\('legacy_seresnet50'\)"):
        convert(filled('se_cadene_resnet50'), 'se_resnet50', source)


def test_another_name_does_not_get_cadenes_nets_in(filled: Fill) -> None:
    with pytest.raises(ValueError, match=r"source \(='timm'\) does not fit: the keys are those of cadene"):
        convert(filled('se_cadene_resnet50'), 'se_resnet50', 'timm')


@pytest.mark.parametrize('source', [None, 'pytorchcv', 'pytorchcv/seresnet50'])
def test_pytorchcvs_se_bottlenecks_need_the_name_with_the_b(source: str | None, filled: Fill) -> None:
    state_dict = filled('pytorchcv_seresnet50')
    with pytest.raises(ValueError, match=r"source='pytorchcv/seresnet50b'.*legacy_seresnet50"):
        convert(state_dict, 'se_resnet50', source)


def test_timms_selective_kernels_that_split_the_input_are_refused(randomise: Any) -> None:
    for name in ('skresnet18', 'skresnet34', 'skresnet50'):
        state_dict = randomise(timm.create_model(name, device='meta'), 0)
        with pytest.raises(ValueError, match=r'split the input channels'):
            convert(state_dict, 'sk_resnext50_32x4d')


def test_timms_widths_at_depth_18_and_34_are_refused(randomise: Any) -> None:
    for depth in (18, 34):
        state_dict = randomise(timm.create_model(f'seresnet{depth}', device='meta'), 0)
        with pytest.raises(ValueError, match=r'rounded to a multiple of 8 \(64 -> 8'):
            convert(state_dict, f'se_resnet{depth}')


def test_the_two_selective_kernel_networks_are_not_mixed(filled: Fill, randomise: Any) -> None:
    with pytest.raises(ValueError, match=r'those of SK-ResNet\*.*sk_resnext50_32x4d is SKNet'):
        convert(filled('sk_insight_resnet50'), 'sk_resnext50_32x4d')
    with pytest.raises(ValueError, match=r'those of SKNet.*sk_resnet50 is SK-ResNet\*'):
        convert(filled('pytorchcv_sknet50'), 'sk_resnet50')
    theirs = randomise(timm.create_model('skresnext50_32x4d', device='meta'), 0)
    with pytest.raises(ValueError, match=r'those of SKNet.*sk_resnet50 is SK-ResNet\*'):
        convert(theirs, 'sk_resnet50')


@pytest.mark.parametrize('name', ['bam_resnet18', 'pytorchcv_bam_resnet18'])
def test_bams_product_does_not_go_into_the_papers_sum(name: str, filled: Fill) -> None:
    with pytest.raises(ValueError, match=r"multiply the two branches, and attn_args=\{'combine': 'add'\}"):
        convert(filled(name), 'bam_resnet18', attn_args={'combine': 'add'})


def test_gam_of_another_rate_or_group_count_is_refused_with_what_it_has(randomise: Any) -> None:
    other = timm.create_model('gam_resnet18', attn_args={'rd_ratio': 1 / 4, 'groups': 4}, device='meta')
    state_dict = randomise(other, 0)
    with pytest.raises(ValueError, match=r"attn_args=\{'rd_ratio': 16/64\}.*attn_args=\{'groups': 4\}"):
        convert(state_dict, 'gam_resnet18')


def test_an_eca_kernel_longer_than_the_models_is_refused(filled: Fill) -> None:
    with pytest.raises(ValueError, match=r"\(1, 1, 7\).*attn_args=\{'kernel_size': \[3, 5, 7, 7\]\}"):
        convert(filled('eca_resnet18_k3577'), 'eca_resnet18', attn_args={'kernel_size': 3})


def _altered(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda net: net | {key: change(net[key])}


@pytest.mark.parametrize(
    ('alter', 'message'),
    [
        (_altered('layer1.0.att.dct_layer.weight', lambda v: v.transpose(1, 2).contiguous()), r'learned or random'),
        (_altered('layer4.2.att.dct_layer.weight', lambda v: v + 3e-4), r'layer4\.2\.att.* by 0\.0003: .*learned'),
        (_altered('layer3.5.att.dct_layer.weight', torch.rand_like), r'learned or random filters'),
        (_altered('layer2.0.att.dct_layer.weight', lambda v: v * float('nan')), r'learned or random'),
        (_altered('layer2.0.att.dct_layer.weight', lambda v: v[:, :14, :14]), r'has waves of shape \(128, 28, 28\)'),
        (
            _altered('layer2.0.att.dct_layer.weight', lambda v: torch.zeros(1).expand(128, 9000, 9000)),
            r'has waves of shape \(128, 28, 28\)',
        ),
    ],
)
def test_fcanets_with_other_filters_are_refused(alter: Any, message: str, filled: Fill) -> None:
    with pytest.raises(ValueError, match=message):
        convert(alter(filled('fcanet34')), 'fca_resnet34')


def test_fcanets_waves_are_of_the_models_sizes(filled: Fill) -> None:
    with pytest.raises(ValueError, match=r'has waves of shape \(64, 7, 7\)'):
        convert(filled('fcanet34'), 'fca_resnet34', attn_args={'dct_size': 7})


def test_simams_lambda_is_that_of_the_published_nets(filled: Fill) -> None:
    with pytest.raises(ValueError, match=r'have e_lambda=0\.1, .* this simam_resnet18 has 0\.0001'):
        convert(filled('simam_resnet18'), 'simam_resnet18', attn_args={'e_lambda': 1e-4})


def test_networks_that_no_model_here_is_are_named(filled: Fill, plain: Callable[[int], dict[str, Tensor]]) -> None:
    gct = {'state_dict': {f'module.{k}': v for k, v in filled('gct_resnet50').items()}}
    for name in ('gct_resnet50', 'se_resnet50'):
        with pytest.raises(ValueError, match=r'a gate stands before every convolution.*stride is in the first 1x1'):
            convert(gct, name)
    backbone = {k: v for k, v in plain(50).items() if not k.startswith('fc.')}
    detector = {f'backbone.{k}': v for k, v in backbone.items()} | {
        'backbone.layer2.0.context_block.conv_mask.weight': torch.zeros(1, 512, 1, 1),
        'bbox_head.fc_cls.weight': torch.zeros(2, 2),
    }
    with pytest.raises(ValueError, match=r'global context blocks in its stages 2 to 4 alone'):
        convert(detector, 'gc_resnet50', prefix='backbone.', num_classes=0)
    scsa = {f'backbone.{k}': v for k, v in backbone.items()} | {
        'backbone.layer1.0.attn.local_dwc.weight': torch.zeros(16, 1, 3)
    }
    with pytest.raises(ValueError, match=r'behind the activation in the middle of a block'):
        convert(scsa, 'scsa_resnet50', num_classes=0)


@pytest.mark.parametrize(
    ('layer', 'name'), [('gc', 'gc_resnet18'), ('gca', 'gc_resnet18'), ('coord', 'coord_resnet18')]
)
def test_timms_modules_of_the_same_names_are_other_modules(layer: str, name: str, randomise: Any) -> None:
    theirs = randomise(timm.create_model('resnet18', block_args=dict(attn_layer=layer), device='meta'), 0)
    with pytest.raises(ValueError, match=rf'does not fit {name}\. .*(missing keys|another shape)'):
        convert(theirs, name)


def test_plain_bottlenecks_of_pytorchcv_need_the_name_with_the_b_too() -> None:
    keys = ('features.init_block.conv.conv.weight', 'features.stage1.unit1.body.conv3.conv.weight')
    with pytest.raises(ValueError, match=r"resnet50 and resnet50b have the same keys.*source='pytorchcv/resnet50b'"):
        convert({k: torch.zeros(1) for k in keys}, 'cbam_resnet50')


@pytest.mark.parametrize(
    ('name', 'model_name', 'message'),
    [
        ('sge_resnet18', 'se_resnet18', r"a net with 'sge' \(insight\), and se_resnet18 has 'se'"),
        ('simam_resnet18', 'se_resnet18', r"a net with 'simam' \(simam\)"),
        ('fcanet50', 'se_resnet50', r"a net with 'fca' \(fcanet\)"),
        ('cbam_resnet18', 'bam_resnet18', r"a net with 'cbam' \(jongchan\), and bam_resnet18 has 'bam'"),
        ('eca_resnet18_k3577', 'se_resnet18', r"a net with 'eca' \(ecanet\), and se_resnet18 has 'se'"),
        ('pytorchcv_cbam_resnet18', 'se_resnet18', r"a net with 'cbam' \(pytorchcv\)"),
        ('srm_resnet18', 'simple_cnn', r"'srm' \(srm\), and simple_cnn has no attention"),
    ],
)
def test_weights_of_another_attention_are_refused(name: str, model_name: str, message: str, filled: Fill) -> None:
    with pytest.raises(ValueError, match=message):
        convert(filled(name), model_name)


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        ('jonchan', r"Unknown source 'jonchan'\. Did you mean 'jongchan'\? Expected one of: cadene, ecanet"),
        ('triplet', r"source \(='triplet'\) does not fit: the keys are those of insight or jongchan"),
        ('jongchan/cbam', r'A net is named for pytorchcv only'),
    ],
)
def test_a_source_that_does_not_fit_is_refused(source: str, message: str, filled: Fill) -> None:
    with pytest.raises(ValueError, match=message):
        convert(filled('cbam_resnet18'), 'cbam_resnet18', source)


def test_an_unknown_net_of_pytorchcv_is_refused(filled: Fill) -> None:
    with pytest.raises(ValueError, match=r"Unknown source 'pytorchcv/resnext'"):
        convert(filled('pytorchcv_cbam_resnet18'), 'cbam_resnet18', 'pytorchcv/resnext')


def test_every_unused_missing_and_misshapen_key_is_in_one_error(filled: Fill) -> None:
    state_dict = filled('cbam_resnet18')
    del state_dict['layer2.1.conv1.weight'], state_dict['layer4.0.cbam.ChannelGate.mlp.3.bias']
    state_dict |= {'extra.one': torch.zeros(1), 'layer1.7.conv1.weight': torch.zeros(2)}
    state_dict['layer3.0.bn1.bias'] = torch.zeros(3)
    with pytest.raises(ValueError, match='does not fit cbam_resnet18') as error:
        convert(state_dict, 'cbam_resnet18')
    text = str(error.value)
    assert '2 unused keys: extra.one, layer1.7.conv1.weight' in text
    assert '2 missing keys: layer2.1.conv1.weight, layer4.0.se.fc2.bias' in text
    assert 'layer3.0.bn1.bias is (3,), the model needs (256,)' in text


def test_a_net_of_another_depth_lists_what_is_missing(filled: Fill) -> None:
    with pytest.raises(ValueError, match=r'missing keys: .*layer3\.5\.conv2\.weight'):
        convert(filled('cbam_resnet18'), 'cbam_resnet34')


def test_two_keys_that_become_one_are_refused(filled: Fill) -> None:
    state_dict = filled('triplet_resnet18')
    key = 'layer1.0.triplet_attention.ChannelGateH.spatial.conv.weight'
    state_dict['layer1.0.pcam.ChannelGateH.spatial.conv.weight'] = state_dict[key]
    with pytest.raises(ValueError, match=r"both become 'layer1\.0\.se\.cw\.conv\.weight'"):
        convert(state_dict, 'triplet_resnet18')
    plain = filled('cbam_resnet18')
    with pytest.raises(ValueError, match=r'has the name of another key'):
        convert(plain | {'module.conv1.weight': plain['conv1.weight']}, 'cbam_resnet18')


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_not_finite_are_refused(value: float, filled: Fill) -> None:
    state_dict = filled('cbam_resnet18')
    state_dict['layer2.0.bn1.running_var'] = state_dict['layer2.0.bn1.running_var'].index_fill(
        0, torch.tensor([1]), value
    )
    with pytest.raises(ValueError, match=r'NaN or infinite.*layer2\.0\.bn1\.running_var'):
        convert(state_dict, 'cbam_resnet18')


@pytest.mark.parametrize(
    ('checkpoint', 'message'),
    [
        ({}, r'holds no weights: its entries are none'),
        ({'epoch': 3, 'state_dict': {}}, r'holds no weights'),
        ({'epoch': 3, 'arch': 'x'}, r"holds no weights: its entries are \['epoch', 'arch'\]"),
        ({'conv1.weight': torch.zeros(1), 'epoch': 3}, r"tensors only; this one has also: \{'epoch': 'int'\}"),
        ({'backbone.conv.weight': torch.zeros(1)}, r'those of no known source'),
        ({'teacher.conv1.weight': torch.zeros(1)}, r"All stand under 'teacher\.'.*pass prefix='teacher\.'"),
        ({'student': {'conv1.weight': torch.zeros(1)}, 'epoch': 3}, r"If one of 'student' is the network, pass that"),
        (None, r'not NoneType: pass model\.state_dict\(\)'),
        (torch.nn.Linear(1, 1), r'not Linear: pass model\.state_dict\(\)'),
    ],
)
def test_what_holds_no_net_is_refused(checkpoint: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(checkpoint, 'cbam_resnet18')


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('cbam_resnet19', r"Unknown model 'cbam_resnet19'"),
        ('hf-hub:me/model', r"Unknown model 'hf-hub:me/model'"),
        ('resnet18', r"'resnet18' is timm's own model"),
    ],
)
def test_a_model_that_is_none_of_ours_is_refused(name: str, message: str, filled: Fill) -> None:
    with pytest.raises(ValueError, match=re.compile(message)):
        convert(filled('cbam_resnet18'), name)


def test_arguments_that_would_load_weights_are_refused(filled: Fill) -> None:
    with pytest.raises(ValueError, match=r'convert builds no weights: leave out pretrained'):
        convert(filled('cbam_resnet18'), 'cbam_resnet18', pretrained=True)
