"""The registered models as timm's registry, factory and optimizers see them."""

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any, cast

import pytest
import timm
import torch
from timm.models import _registry as registry
from timm.optim import create_optimizer_v2
from torch import nn

import timm_attn
from timm_attn.layers import attn_sites

ATTN_RESNET = {
    *(f'{a}_resnet{d}' for a in ('se', 'eca', 'srm') for d in (18, 34, 50, 101, 152)),
    *(f'{a}_resnet{d}' for a in ('cbam', 'bam', 'gam', 'triplet') for d in (18, 34, 50, 101)),
    'gsop_resnet50',
    'gsop_resnet101',
    *(f'csa_resnet{d}' for d in (18, 34, 50)),
    *(f'fca_resnet{d}' for d in (34, 50, 101, 152)),
    *(f'{a}_resnet{d}' for a in ('coord', 'gc', 'scse', 'ema', 'sge', 'gct', 'scsa', 'nl', 'simam') for d in (18, 50)),
}
SK_RESNET = {'sk_resnet50', 'sk_resnet101', 'sk_resnext50_32x4d', 'sk_resnext101_32x4d'}
SIMPLE_CNN = {'simple_cnn', *(f'simple_cnn_{a}' for a in ('cbam', 'csa', 'eca', 'gam', 'se', 'srm', 'triplet'))}
OURS = sorted(ATTN_RESNET | SK_RESNET | SIMPLE_CNN)  # besides `injected`, which has tests of its own

BN = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')


def _keys(*layers: str) -> list[str]:
    """'fc1' has weight and bias, 'conv*' (as in 'conv1!') a weight alone, 'bn1' five tensors."""
    keys = []
    for layer in layers:
        if layer.endswith('!'):
            keys.append(f'{layer[:-1]}.weight')
        elif layer.split('.')[-1].startswith('bn'):
            keys += [f'{layer}.{part}' for part in BN]
        else:
            keys += [f'{layer}.weight', f'{layer}.bias']
    return keys


# State dicts are an interface: weights on the Hub carry these keys.
KEYS = {
    'se': _keys('fc1', 'fc2'),
    'cbam': _keys('fc1', 'fc2', 'conv!', 'bn'),
    'bam': _keys(
        'fc1', 'bn1', 'fc2', 'conv_reduce', 'bn_reduce', 'conv_dil1', 'bn_dil1', 'conv_dil2', 'bn_dil2', 'conv_final'
    ),
    'gam': _keys('fc1', 'fc2', 'conv1', 'bn1', 'conv2', 'bn2'),
    'sk': _keys('conv1!', 'bn1', 'conv2!', 'bn2', 'fc1!', 'bn', 'fc2!'),
    'eca': _keys('conv!'),
    'srm': ['cfc', *_keys('bn')],
    'gsop': _keys('conv_reduce', 'bn_reduce', 'bn_row', 'conv_row', 'conv_expand'),
    'triplet': _keys('cw.conv!', 'cw.bn', 'hc.conv!', 'hc.bn', 'hw.conv!', 'hw.bn'),
    'csa': ['temperature', 'gamma', *_keys('qkv!', 'proj')],
    'fca': _keys('fc1!', 'fc2!'),
    'coord': _keys('conv1', 'bn1', 'conv_h', 'conv_w'),
    'gc': _keys('conv_attn', 'mlp_add.fc1', 'mlp_add.norm', 'mlp_add.fc2'),
    'scse': _keys('fc1', 'fc2', 'conv'),
    'gct': ['alpha', 'gamma', 'beta'],
    'ema': _keys('conv1x1', 'gn', 'conv3x3'),
    'sge': ['weight', 'bias'],
    'nl': _keys('theta', 'phi', 'g', 'conv_out!', 'bn'),
    'scsa': _keys('conv3', 'conv5', 'conv7', 'conv9', 'norm_h', 'norm_w', 'norm', 'q!', 'k!', 'v!'),
    'simam': [],
}


def create_model(name: str, **kwargs: Any) -> Any:
    """timm's; its models have methods and layers that `nn.Module`, the declared type, does not know."""
    return timm.create_model(name, **kwargs)


def entrypoint(name: str) -> Callable[..., nn.Module]:
    return registry.model_entrypoint(name)


def test_modules_list_exactly_the_designs_models() -> None:
    assert set(timm.list_models(module='attn_resnet')) == ATTN_RESNET
    assert set(timm.list_models(module='sk_resnet')) == SK_RESNET
    assert set(timm.list_models(module='simple_cnn')) == SIMPLE_CNN


def test_no_name_of_timms_is_taken() -> None:
    """In a process of its own, because timm's registry holds ours here."""
    code = (
        'from timm.models import _registry as r; before = dict(r._model_entrypoints); import timm_attn, json; '
        'after = r._model_entrypoints; taken = [n for n, f in before.items() if after[n] is not f]; '
        'print(json.dumps([taken, sorted(set(after) - set(before))]))'
    )
    done = subprocess.run(
        [sys.executable, '-W', 'error', '-c', code],
        capture_output=True,
        text=True,
        check=False,
        cwd=str(timm_attn.__path__[0] + '/..'),
    )
    assert done.returncode == 0, done.stderr
    taken, new = json.loads(done.stdout)
    assert taken == []
    assert new == sorted([*OURS, 'injected'])


@pytest.mark.parametrize('name', OURS)
def test_entry_point_is_a_documented_function(name: str) -> None:
    fn = entrypoint(name)
    module = sys.modules[fn.__module__]
    assert fn.__name__ == name and getattr(module, name) is fn
    assert name in module.__all__
    assert len((inspect.getdoc(fn) or '').split()) >= 3
    assert inspect.getsource(fn).startswith(f'@register_model\ndef {name}(')
    if not name.startswith('simple'):
        attn = timm_attn.layers.get_attn(name.split('_')[0])
        doc = inspect.getdoc(fn) or ''
        assert attn.paper in doc, 'the docstring cites the paper'
        depth = ''.join(c for c in name.split('_')[1] if c.isdigit())
        assert depth in doc, 'the docstring names the depth'


@pytest.mark.parametrize('name', OURS)
def test_default_cfg_names_real_modules(name: str) -> None:
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    assert cfg.architecture == name
    model = create_model(name, device='meta')
    first, classifier = model.get_submodule(str(cfg.first_conv)), model.get_submodule(str(cfg.classifier))
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert first is convs[0]
    assert isinstance(classifier, nn.Linear) and classifier is model.get_classifier()
    assert model.num_classes == cfg.num_classes == 1000
    assert len(cfg.input_size) == 3 and cfg.input_size[0] == 3
    assert cfg.pool_size is not None
    with torch.no_grad():
        features = model.eval().forward_features(torch.empty(1, *cfg.input_size, device='meta'))
    assert tuple(features.shape[2:]) == tuple(cfg.pool_size)


@pytest.mark.parametrize('name', OURS)
def test_keys_are_the_plain_nets_and_the_attentions(name: str) -> None:
    model = create_model(name, device='meta')
    sites = attn_sites(model)
    if name == 'simple_cnn':
        assert sites == {} and model.attn is None
        return
    attn = name.removeprefix('simple_cnn_').split('_')[0]
    assert model.attn == attn
    inside = {f'{site}.{key}' for site in sites for key in KEYS[attn]}
    plain = set(model.state_dict()) - inside
    assert plain | inside == set(model.state_dict()) and len(inside) == len(sites) * len(KEYS[attn])
    if name.startswith('simple_cnn'):
        expected = set(create_model('simple_cnn', device='meta').state_dict())
    else:
        base = {'sk_resnext50_32x4d': 'resnext50_32x4d', 'sk_resnext101_32x4d': 'resnext101_32x4d'}
        expected = set(create_model(base.get(name, name.split('_')[1]), device='meta').state_dict())
        if attn == 'sk':
            expected -= {k for k in expected if k.split('.')[2:3] in (['conv2'], ['bn2'])}
    assert plain == expected


def test_sites_are_where_the_released_nets_have_them() -> None:
    def sites(name: str) -> list[str]:
        return list(attn_sites(create_model(name, device='meta')))

    blocks = [f'layer{k}.{b}' for k, n in zip((1, 2, 3, 4), (3, 4, 6, 3), strict=True) for b in range(n)]
    assert sites('cbam_resnet50') == [f'{b}.se' for b in blocks]
    assert sites('sk_resnet50') == sites('sk_resnext50_32x4d') == [f'{b}.conv2' for b in blocks]
    assert sites('bam_resnet18') == ['layer1.2', 'layer2.2', 'layer3.2']
    assert sites('bam_resnet50') == ['layer1.3', 'layer2.4', 'layer3.6']
    assert sites('gsop_resnet50') == ['layer1.2.se', 'layer2.3.se', 'layer3.5.se', 'layer4.2.se']
    assert sites('fca_resnet50') == sites('scsa_resnet50') == sites('gc_resnet50') == [f'{b}.se' for b in blocks]
    assert sites('nl_resnet50') == ['layer3.4.se'] and sites('nl_resnet18') == ['layer3.0.se']
    assert sites('simam_resnet50') == [f'{b}.conv2.attn' for b in blocks]
    assert sites('simple_cnn_se') == ['blocks.0.se', 'blocks.2.se']


@pytest.mark.parametrize(('depth', 'sizes'), [(18, '3577'), (34, '3357'), (50, '3557'), (101, '3357'), (152, '3357')])
def test_eca_kernels_are_the_released_ones(depth: int, sizes: str) -> None:
    model = create_model(f'eca_resnet{depth}', device='meta')
    found = {site[:6]: m.get_parameter('conv.weight').shape[-1] for site, m in attn_sites(model).items()}
    assert ''.join(str(found[f'layer{k}']) for k in (1, 2, 3, 4)) == sizes


@pytest.mark.parametrize('depth', [34, 50, 101, 152])
def test_fca_sizes_are_those_of_the_stages(depth: int) -> None:
    found = {site[:6]: m for site, m in attn_sites(create_model(f'fca_resnet{depth}', device='meta')).items()}
    assert [cast(Any, found[f'layer{k}']).dct_size for k in (1, 2, 3, 4)] == [56, 28, 14, 7]


@pytest.mark.parametrize('depth', [18, 50])
def test_simam_has_the_published_lambda(depth: int) -> None:
    sites = attn_sites(create_model(f'simam_resnet{depth}', device='meta'))
    assert {cast(Any, m).e_lambda for m in sites.values()} == {0.1}


def test_gsop_strides_and_resolution_are_the_released_ones() -> None:
    model = create_model('gsop_resnet50', device='meta')
    reduce: list[Any] = [m.get_submodule('conv_reduce') for m in attn_sites(model).values()]
    strides = [conv.stride[0] for conv in reduce]
    assert strides == [2, 1, 1, 1]
    x = model.forward_features(torch.empty(2, 3, 224, 224, device='meta'))
    assert x.shape == (2, 2048, 14, 14)


def test_sk_forms_are_the_two_published_nets() -> None:
    star = create_model('sk_resnet50', device='meta').layer1[0].conv2
    assert (star.conv1.groups, star.conv2.groups, star.conv2.dilation, star.fc1.out_channels) == (1, 32, (1, 1), 4)
    net = create_model('sk_resnext50_32x4d', device='meta').layer1[0].conv2
    assert (net.conv1.groups, net.conv2.groups, net.conv2.dilation, net.fc1.out_channels) == (32, 32, (2, 2), 32)


# attn_args.


def test_attn_args_are_merged_over_the_models_own() -> None:
    model = create_model('gam_resnet50', device='meta', attn_args={'groups': 1})
    attn = next(iter(attn_sites(model).values()))
    assert attn.get_submodule('conv1').groups == 1
    assert attn.get_submodule('fc1').out_features == 16  # the default rate stays
    model = create_model('gam_resnet50', device='meta', attn_args={'rd_ratio': 1 / 4})
    attn = next(iter(attn_sites(model).values()))
    assert (attn.get_submodule('conv1').groups, attn.get_submodule('fc1').out_features) == (4, 64)
    assert model.attn_args == {'groups': 4, 'rd_ratio': 1 / 4}


def test_attn_args_do_not_leak_into_the_next_model() -> None:
    given: dict[str, Any] = {'groups': 1}
    create_model('gam_resnet50', device='meta', attn_args=given)
    assert given == {'groups': 1}
    assert create_model('gam_resnet50', device='meta').attn_args == {'groups': 4}


@pytest.mark.parametrize('name', OURS)
def test_attn_args_are_plain_json(name: str) -> None:
    args = create_model(name, device='meta').attn_args
    assert json.loads(json.dumps(args)) == args


@pytest.mark.parametrize(
    'name', ['cbam_resnet18', 'bam_resnet18', 'sk_resnet50', 'sk_resnext50_32x4d', 'simple_cnn_se']
)
def test_unknown_attn_args_name_the_accepted_ones(name: str) -> None:
    with pytest.raises(TypeError, match=r"has no option 'reduction'\. Accepted: .*rd_ratio"):
        create_model(name, device='meta', attn_args={'reduction': 16})


@pytest.mark.parametrize('name', ['se_resnet18', 'sk_resnet50', 'simple_cnn', 'simple_cnn_gam'])
def test_unknown_keywords_raise(name: str) -> None:
    with pytest.raises(TypeError, match='no_such_keyword'):
        create_model(name, device='meta', no_such_keyword=1)


def test_values_that_do_not_fit_raise() -> None:
    with pytest.raises(ValueError, match=r'groups \(=3\) must divide'):
        create_model('gam_resnet18', device='meta', attn_args={'groups': 3})
    with pytest.raises(ValueError, match=r"'kernel_size' of 'eca' has 3 values"):
        create_model('eca_resnet18', device='meta', attn_args={'kernel_size': [3, 5, 7]})
    with pytest.raises(ValueError, match=r"Unknown attention 'cbamm'"):
        create_model('cbam_resnet18', device='meta', attn='cbamm')
    with pytest.raises(ValueError, match=r'attn_after \(=\(3,\)\) must name convolutions'):
        create_model('simple_cnn_se', device='meta', attn_after=(3,))
    with pytest.raises(ValueError, match=r'last_stride \(=3\) must be 1 or 2'):
        create_model('gsop_resnet50', device='meta', last_stride=3)
    with pytest.raises(TypeError, match=r"sets its kernel's stride itself"):
        create_model('sk_resnet50', device='meta', attn_args={'stride': 2})


def test_cifar_stem_needs_a_single_convolution() -> None:
    with pytest.raises(ValueError, match='cifar_stem replaces a single convolution, but the stem is a Sequential'):
        create_model('se_resnet18', stem_type='deep', cifar_stem=True)


# Weight decay.


@pytest.mark.parametrize(
    ('name', 'suffix'), [('srm_resnet18', '.cfc'), ('csa_resnet18', '.temperature'), ('gct_resnet18', '.beta')]
)
@pytest.mark.parametrize('layer_decay', [None, 0.8])
def test_exemption_from_weight_decay_reaches_timms_optimizers(
    name: str, suffix: str, layer_decay: float | None
) -> None:
    model = create_model(name, layers=(1, 1, 1, 1), channels=(32, 64, 96, 128))
    optimizer = create_optimizer_v2(model, 'sgd', lr=0.1, weight_decay=1e-4, layer_decay=layer_decay)
    decay = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    for key, parameter in model.named_parameters():
        exempt = parameter.dim() <= 1 or key.endswith(suffix)
        assert decay[id(parameter)] == (0 if exempt else 1e-4), key
    listed = model.no_weight_decay()
    assert {k for k in dict(model.named_parameters()) if k.endswith(suffix)} <= set(listed)
    assert set(listed) <= set(dict(model.named_parameters()))
