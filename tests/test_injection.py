"""Attention put into timm's models: the identity start changes nothing, the paper start is the registered model."""

import copy
import functools
import logging
import pickle
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import timm_attn
from timm_attn import create_attn, inject, list_attn
from timm_attn.layers import _registry, attn_sites, get_attn

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # torch 2.5
    from torch.distributed._composable.fsdp import fully_shard

THIN: dict[str, Any] = {'layers': (1, 1, 1, 1), 'channels': (32, 64, 96, 128)}
SMALLER: dict[str, dict[str, Any]] = {'gsop': {'dim': 16}, 'sge': {'groups': 8}}
INJECTED = [name for name in list_attn() if get_attn(name).placement != 'conv']
NEUTRAL = [name for name in INJECTED if create_attn(name, 64, device='meta').neutral_gate is not None]
# One small member of each family that has slots, with the number of its slots.
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    'resnet18': ({}, 8),
    'resnext50_32x4d': (THIN, 4),
    'wide_resnet50_2': (THIN, 4),
    'res2net50_26w_4s': (THIN, 4),
    'regnetx_002': ({}, 13),
    'mobilenetv2_050': ({}, 17),
    'hrnet_w18_small': ({}, 0),
    'nf_resnet26': ({}, 8),
    'gernet_s': ({}, 14),
    'repvgg_a0': ({}, 22),
    'darknet17': ({}, 5),
    'vovnet39a': ({}, 6),
    'skresnet18': ({}, 8),
    'cspresnet50': ({}, 13),
}
STAGED = ('resnet18', 'resnext50_32x4d', 'res2net50_26w_4s', 'mobilenetv2_100', 'nf_resnet26', 'gernet_s', 'repvgg_a0')
NO_SLOTS = ('convnext_atto', 'densenet121', 'vgg11', 'resnetv2_50', 'xception41', 'dpn48b', 'hgnetv2_b0', 'seresnet18')


def create_model(name: str, **kwargs: Any) -> Any:
    """timm's; its models have methods and layers that `nn.Module`, the declared type, does not know."""
    return timm.create_model(name, **kwargs)


def trained(name: str, **kwargs: Any) -> Any:
    """A model whose branches are not zero: timm starts the last BatchNorm of a branch at 0, and 0 hides any gate."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=10, **kwargs)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.75, 1.25)
                module.bias.normal_(0, 0.1)
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.75, 1.25)
        for key, parameter in model.named_parameters():
            if key.endswith('.gain') or key.endswith('skipinit_gain'):
                parameter.uniform_(0.75, 1.25)
    return model.eval()


def image(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def power_of_two(model: nn.Module) -> bool:
    return all(m.neutral_gate in (0.125, 0.25, 0.5, 1) for m in attn_sites(model).values())


def assert_unchanged(model: nn.Module, got: Tensor, want: Tensor) -> None:
    assert want.isfinite().all() and want.std() > 1e-3
    if power_of_two(model):
        assert torch.equal(got, want)
    else:
        assert (got - want).abs().max() <= 1e-6 * want.abs().max()


def feels(model: nn.Module, x: Tensor, before: Tensor) -> list[str]:
    """Sites, of five spread over the model, that do not reach the output: a changed gain there must change it."""
    deaf = []
    sites = list(attn_sites(model).items())
    for site, attn in sites[:: max(1, len(sites) // 4)]:
        gain, attn.gain = attn.gain, attn.gain * 1.5
        if torch.equal(model(x), before):
            deaf.append(site)
        attn.gain = gain
    return deaf


# The identity start.


@pytest.mark.parametrize('name', NEUTRAL)
def test_identity_start_changes_no_output_of_a_resnet(name: str) -> None:
    model = trained('resnet18', **THIN)
    x = image(2, 3, 64, 48)
    with torch.no_grad():
        want = model(x)
        assert inject(model, name, **SMALLER.get(name, {})) is model
        assert_unchanged(model, model(x), want)
        half = copy.deepcopy(model).to(memory_format=torch.channels_last)
        reference = trained('resnet18', **THIN).to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
        assert_unchanged(model, half(x), reference(x))
        assert feels(model, x, model(x)) == []


@pytest.mark.parametrize('name', NEUTRAL)
def test_identity_start_changes_no_output_in_bfloat16(name: str) -> None:
    x = image(2, 3, 64, 64)
    plain, model = trained('resnet18', **THIN), inject(trained('resnet18', **THIN), name, **SMALLER.get(name, {}))
    with torch.no_grad():
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert torch.equal(model(x), plain(x))
        plain, model = plain.bfloat16(), inject(trained('resnet18', **THIN).bfloat16(), name, **SMALLER.get(name, {}))
        assert torch.equal(model(x.bfloat16()), plain(x.bfloat16()))


@pytest.mark.parametrize('family', FAMILIES)
def test_identity_start_changes_no_output_of_a_family(family: str) -> None:
    kwargs, slots = FAMILIES[family]
    model = trained(family, **kwargs)
    keys = {k: v.clone() for k, v in model.state_dict().items()}
    x = image(2, 3, 64, 64)
    with torch.no_grad():
        want = model(x)
        inject(model, 'cbam')
        assert_unchanged(model, model(x), want)
        assert feels(model, x, want) == []
    sites = attn_sites(model)
    assert len(sites) == slots or (not slots and len(sites) > 20)
    state = model.state_dict()
    assert {k for k in state if not any(k.startswith(f'{site}.') for site in sites)} == keys.keys()
    assert all(torch.equal(state[k], v) for k, v in keys.items())


@pytest.mark.parametrize('family', STAGED)
def test_identity_start_of_bam_follows_the_stages(family: str) -> None:
    model = trained(family, **FAMILIES.get(family, ({}, 0))[0])
    stages = len(model.feature_info) - 2
    keys = list(model.state_dict())
    x = image(2, 3, 64, 64)
    with torch.no_grad():
        want = model(x)
        inject(model, 'bam')
        assert (model(x) - want).abs().max() <= 1e-5 * want.abs().max()
        assert feels(model, x, model(x)) == []
    assert len(attn_sites(model)) == stages
    assert set(keys) <= set(model.state_dict())


@pytest.mark.parametrize('name', NEUTRAL)
def test_identity_start_learns_in_two_steps(name: str) -> None:
    # Two hidden units, 32 // 16, are easily both dead.
    args: dict[str, Any] = {'rd_ratio': 1 / 4} if name in ('se', 'cbam', 'bam', 'gam') else SMALLER.get(name, {})
    model = inject(trained('resnet18', **THIN), name, **args).eval()
    x = image(4, 3, 64, 64)
    optimizer = torch.optim.SGD([p for m in attn_sites(model).values() for p in m.parameters()], lr=1.0)
    reached: list[set[str]] = []
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.tensor([1, 2, 3, 4])).backward()
        named = [(f'{site}.{k}', p) for site, m in attn_sites(model).items() for k, p in m.named_parameters()]
        reached.append({k for k, p in named if p.grad is not None and p.grad.abs().max() > 0})
        for _, p in named:
            if p.grad is not None:
                p.grad *= 0.1 / p.grad.norm().clamp(min=1e-12)
        optimizer.step()
    for site, attn in attn_sites(model).items():
        assert any(k.startswith(site) for k in reached[0]), f'{site} gets no gradient in the first step'
        missing = {f'{site}.{k}' for k, _ in attn.named_parameters()} - reached[1]
        assert not missing, f'no gradient in the second step: {missing}'


# The paper start is the registered model.


def registered(module: str) -> list[str]:
    return timm.list_models(module=module)


@pytest.mark.parametrize('model_name', registered('attn_resnet'))
def test_paper_start_has_the_keys_and_shapes_of_the_registered_model(model_name: str) -> None:
    ours = create_model(model_name, device='meta')
    plain = create_model(model_name.split('_')[1], device='meta')
    inject(plain, ours.attn, start='paper', **ours.attn_args)
    assert [(k, v.shape) for k, v in plain.state_dict().items()] == [(k, v.shape) for k, v in ours.state_dict().items()]
    assert list(attn_sites(plain)) == list(attn_sites(ours))


@pytest.mark.parametrize(
    # GSoP is defined for bottlenecks; there is no FcaNet-18.
    ('name', 'depth'),
    [(name, depth) for name in INJECTED for depth in (18, 50) if (name, depth) not in (('gsop', 18), ('fca', 18))],
)
def test_paper_start_has_the_outputs_of_the_registered_model(name: str, depth: int) -> None:
    if name == 'gsop':
        # Its released nets keep the resolution of the last stage, which no injection can do.
        ours = trained('gsop_resnet50', **THIN, last_stride=2)
    else:
        ours = trained(f'{name}_resnet{depth}', **THIN, attn_args=SMALLER.get(name, {}))
    plain = create_model(f'resnet{depth}', num_classes=10, **THIN)
    inject(plain, name, start='paper', **ours.attn_args).eval()
    plain.load_state_dict(ours.state_dict())
    x = image(2, 3, 64, 48)
    with torch.no_grad():
        assert torch.equal(plain(x), ours(x))


@pytest.mark.parametrize('name', INJECTED)
def test_paper_start_has_no_gain(name: str) -> None:
    model = inject(trained('resnet18', **THIN), name, start='paper', **SMALLER.get(name, {}))
    assert {m.gain for m in attn_sites(model).values()} == {1.0}


def test_an_attention_without_a_neutral_state_has_the_paper_start_alone() -> None:
    model = trained('resnet18', **THIN)
    keys, want = list(model.state_dict()), model(image(1, 3, 64, 64))
    with pytest.raises(ValueError, match="use start='paper'"):
        inject(model, 'simam')
    assert list(model.state_dict()) == keys and not attn_sites(model)
    # Between conv2 and bn2: it multiplies what the convolution returns, and the keys are a plain ResNet's.
    inject(model, 'simam', start='paper', e_lambda=0.1)
    assert list(model.state_dict()) == keys
    assert list(attn_sites(model)) == [f'layer{k}.0.conv2.attn' for k in (1, 2, 3, 4)]
    block, x = model.layer1[0], image(2, 32, 9, 7)
    y = nn.functional.conv2d(x, block.conv2.weight, padding=1)
    d = (y - y.mean((2, 3), keepdim=True)).square()
    gate = (d / (4 * (d.sum((2, 3), keepdim=True) / 62 + 0.1)) + 0.5).sigmoid()
    torch.testing.assert_close(block.conv2(x), y * gate)
    assert not torch.allclose(model(image(1, 3, 64, 64)), want, rtol=1e-2)


def test_one_non_local_block_stands_before_the_last_block_of_the_third_stage() -> None:
    def sites(name: str, **kwargs: Any) -> list[str]:
        return list(attn_sites(inject(create_model(name, device='meta', **kwargs), 'nl', start='paper')))

    assert sites('resnet50') == sites('resnext50_32x4d') == ['layer3.4.se']
    assert sites('resnet101') == ['layer3.21.se']
    assert sites('resnet18', **THIN) == ['layer3.0.se']
    assert sites('regnetx_002') == ['s3.b3.se']


def test_placement_between_conv2_and_bn2_needs_them() -> None:
    with pytest.raises(ValueError, match="RegNet has no block with a convolution 'conv2' and its BatchNorm 'bn2'"):
        inject(create_model('regnetx_002', device='meta'), 'simam', start='paper')


def test_paper_start_changes_the_output() -> None:
    model = trained('resnet18', **THIN)
    x = image(2, 3, 64, 64)
    before = model(x)
    assert not torch.allclose(inject(model, 'se', start='paper')(x), before, rtol=1e-2)


# Where attention goes.


def test_sites_are_named_in_order() -> None:
    model = inject(create_model('resnet50', device='meta'), 'se')
    sites = [f'layer{k}.{b}.se' for k, n in zip((1, 2, 3, 4), (3, 4, 6, 3), strict=True) for b in range(n)]
    assert list(attn_sites(model)) == sites


def test_bam_is_the_last_child_of_three_stages() -> None:
    assert list(attn_sites(inject(create_model('resnet18', device='meta'), 'bam'))) == [
        'layer1.2',
        'layer2.2',
        'layer3.2',
    ]
    assert list(attn_sites(inject(create_model('resnet50', device='meta'), 'bam'))) == [
        'layer1.3',
        'layer2.4',
        'layer3.6',
    ]


def test_gsop_sits_in_the_last_block_of_each_stage() -> None:
    model = inject(create_model('resnet50', device='meta'), 'gsop')
    assert list(attn_sites(model)) == ['layer1.2.se', 'layer2.3.se', 'layer3.5.se', 'layer4.2.se']


def test_channels_are_those_that_the_slot_sees() -> None:
    """MobileNet's slots lie inside the block, where the channels are expanded."""
    model = inject(create_model('mobilenetv2_100', device='meta'), 'se')
    widths = [m.get_submodule('fc1').in_channels for m in attn_sites(model).values()]
    assert widths == [32, 96, 144, 144, 192, 192, 192, 384, 384, 384, 384, 576, 576, 576, 960, 960, 960]


def test_list_gives_each_width_its_value() -> None:
    model = inject(create_model('resnet18', device='meta'), 'eca', kernel_size=[3, 5, 7, 9])
    sizes = [m.get_parameter('conv.weight').shape[-1] for m in attn_sites(model).values()]
    assert sizes == [3, 3, 5, 5, 7, 7, 9, 9]


def test_options_reach_every_site() -> None:
    model = inject(create_model('resnet18', device='meta'), 'cbam', spatial=False, rd_ratio=1 / 8)
    for attn in attn_sites(model).values():
        assert sorted(k for k, _ in attn.named_children()) == ['fc1', 'fc2']
        hidden, channels = attn.get_parameter('fc1.weight').shape
        assert hidden * 8 == channels


def test_attention_follows_the_models_device_type_and_mode() -> None:
    model = create_model('resnet18', device='meta', dtype=torch.bfloat16)
    for training in (True, False):
        injected = inject(copy.deepcopy(model).train(training), 'cbam')
        for attn in attn_sites(injected).values():
            assert {t.device.type for t in attn.state_dict().values()} == {'meta'}
            assert {t.dtype for t in attn.parameters()} == {torch.bfloat16}
            assert {m.training for m in attn.modules()} == {training}
        assert injected.training is training


def test_modes_and_buffers_of_the_model_stay() -> None:
    """The pass that finds the channels must not leave a trace: no running statistic, no mode, no gradient."""
    model = trained('resnet18', **THIN).train()
    model.get_submodule('layer1').eval()
    modes = {k: m.training for k, m in model.named_modules()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    inject(model, 'se')
    assert {k: m.training for k, m in model.named_modules() if k in modes} == modes
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert all(p.grad is None for p in model.parameters())
    assert [k for k, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks] == []


def test_grayscale_and_headless_models_take_attention() -> None:
    model = create_model('resnet18', in_chans=1, num_classes=0, global_pool='', zero_init_last=False, **THIN).eval()
    x = image(1, 1, 40, 72)
    with torch.no_grad():
        want = model(x)
        assert torch.equal(inject(model, 'triplet')(x), want)


def test_features_only_model_takes_attention() -> None:
    model = create_model('resnet18', features_only=True, zero_init_last=False, **THIN).eval()
    x = image(1, 3, 64, 64)
    with torch.no_grad():
        want = model(x)
        got = inject(model, 'se')(x)
    assert len(attn_sites(model)) == 4
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_injected_model_is_copied_saved_and_loaded() -> None:
    model = inject(trained('resnet18', **THIN), 'srm')
    with torch.no_grad():
        for attn in attn_sites(model).values():
            for p in attn.parameters():
                p.normal_()
    x = image(1, 3, 64, 64)
    other = inject(create_model('resnet18', num_classes=10, **THIN), 'srm').eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
        assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_injected_model_exempts_the_attentions_parameters_from_weight_decay() -> None:
    from timm.optim import param_groups_weight_decay

    for name, suffix in (('srm', 'cfc'), ('csa', 'temperature')):
        model = inject(create_model('resnet18', **THIN), name)
        listed = getattr(model, 'no_weight_decay')()  # noqa: B009 (timm calls it so; nn.Module does not declare it)
        names = {k for k, _ in model.named_parameters() if k.endswith(suffix)}
        assert len(names) == 4 and names <= set(listed)
        groups = param_groups_weight_decay(model, 0.1, no_weight_decay_list=listed)
        decayed = {id(p) for group in groups if group['weight_decay'] for p in group['params']}
        assert not any(id(p) in decayed for k, p in model.named_parameters() if k in names)
        assert id(dict(model.named_parameters())['layer1.0.conv1.weight']) in decayed
        # The copy's method must speak of the copy.
        copied = copy.deepcopy(model)
        assert set(getattr(copied, 'no_weight_decay')()) == set(listed)  # noqa: B009


def test_injected_model_scripts_and_exports() -> None:
    model = inject(trained('resnet18', **THIN), 'csa')
    x = image(2, 3, 64, 64)
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(torch.jit.script(model)(x), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), want, rtol=1e-4, atol=1e-5)


def test_attention_twice_needs_free_slots() -> None:
    model = inject(create_model('resnet18', device='meta'), 'se')
    with pytest.raises(ValueError, match=r'ResNet has no empty attention slot.*filled: layer1\.0\.se'):
        inject(model, 'cbam')
    inject(model, 'bam')  # after the stages there is room
    with pytest.raises(ValueError, match=r"'layer1' of ResNet ends in attention already"):
        inject(model, 'bam')
    assert len(attn_sites(model)) == 11


# Errors. The model stays as it was.


@pytest.mark.parametrize('family', NO_SLOTS)
def test_model_without_slots_raises_and_names_families(family: str) -> None:
    model = create_model(family, device='meta')
    with pytest.raises(ValueError, match=r'has no empty attention slot.*resnet, resnext, wide_resnet.*vovnet'):
        inject(model, 'se')
    assert attn_sites(model) == {}


def test_model_that_is_not_timms_raises() -> None:
    with pytest.raises(ValueError, match='Sequential has no empty attention slot'):
        inject(nn.Sequential(nn.Conv2d(3, 8, 3)), 'se')
    with pytest.raises(ValueError, match='Sequential lists no stages in feature_info'):
        inject(nn.Sequential(nn.Conv2d(3, 8, 3)), 'bam')


def test_slot_that_is_never_called_raises() -> None:
    model = create_model('resnet18', num_classes=2, **THIN)
    # A block that no forward pass enters, as heads for other tasks have them.
    model.spare = copy.deepcopy(model.layer1)
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=r"never calls the slots \['spare\.0\.se'\].*resnet, resnext"):
        inject(model, 'se')
    assert attn_sites(model) == {}
    assert list(model.state_dict()) == keys
    assert model.layer1[0].se is None
    assert 'se' not in dict(model.layer1[0].named_children())


def test_sk_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'sk' replaces convolutions.*create_model\('sk_resnet50'\)"):
        inject(create_model('resnet50', device='meta'), 'sk')


def test_unknown_arguments_raise() -> None:
    model = create_model('resnet18', device='meta')
    with pytest.raises(ValueError, match=r"Unknown attention 'cbamm'\. Did you mean 'cbam'.*Expected one of: bam"):
        inject(model, 'cbamm')
    with pytest.raises(ValueError, match=r"Unknown start 'zero'\. Expected one of: identity, paper"):
        inject(model, 'cbam', start='zero')
    with pytest.raises(TypeError, match=r"'cbam' has no option 'reduction'.*rd_ratio"):
        inject(model, 'cbam', reduction=16)
    with pytest.raises(ValueError, match=r"'kernel_size' of 'eca' has 3 values.*4 widths: \[64, 128, 256, 512\]"):
        inject(model, 'eca', kernel_size=[3, 5, 7])
    assert attn_sites(model) == {}


def test_options_that_fit_only_some_stages_leave_the_model_alone() -> None:
    model = create_model('resnet18', device='meta')
    with pytest.raises(ValueError, match=r'channels \(=64\) times rd_ratio'):
        inject(model, 'se', rd_ratio=1 / 128)
    assert attn_sites(model) == {}
    assert model.layer1[0].se is None


def test_large_attention_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    inject(create_model('resnet50', device='meta'), 'gam', rd_ratio=1 / 4)
    assert "'gam' adds 503 M parameters" in caplog.text


def test_pairs_of_pixels_are_warned_of_where_maps_are_large(caplog: pytest.LogCaptureFixture) -> None:
    for at in (None, r'layer4\.\d'):
        inject(create_model('resnet50', device='meta'), 'nl', at=at)
    inject(create_model('resnet50', device='meta'), 'se', at=r'layer1\.\d')
    assert 'tokens' not in caplog.text
    inject(create_model('resnet50', device='meta'), 'nl', at=r'layer[12]\.2')
    assert "'nl' makes a matrix of 3136 x 3136 tokens in 'layer1.2.se', 39.3 MB an image" in caplog.text  # 56**4 * 4


# Outputs of chosen modules.


class Container(nn.Module):
    """Runs its children one after the other without being an nn.Sequential, as timm's RegStage does."""

    def __init__(self, *children: nn.Module) -> None:
        super().__init__()
        for i, child in enumerate(children):
            self.add_module(f'b{i}', child)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


class Unet(nn.Module):
    """Two levels, a skip, and names that collide with what injection adds."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.mid = Container(nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(inplace=True))
        self.attn = nn.Conv2d(32, 16, 1)
        self.up = nn.ConvTranspose2d(32, 16, 2, 2)
        self.out = nn.Conv2d(32, 2, 1)
        self.spare = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        y = self.up(self.mid(skip))
        return self.out(torch.cat([skip, y], 1))


def note(seen: dict[str, list[Tensor]], site: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """A hook that keeps a copy of what a site is given."""
    seen.setdefault(site, []).append(inputs[0].clone())


def loud(model: nn.Module) -> nn.Module:
    """Gates that are not neutral: the identity start hides an attention that is applied twice, or not at all."""
    torch.manual_seed(3)
    with torch.no_grad():
        for attn in attn_sites(model).values():
            attn.gain = 1.7
            for p in attn.parameters():
                p.normal_(0, 0.5)
    return model


# Model, modules, layout, number of sites. Blocks, containers of three kinds, and tokens in rows and columns.
PLACES: list[tuple[str, str, str, int]] = [
    ('resnet18', r'layer\d\.0', 'NCHW', 4),
    ('resnet18', r'layer\d', 'NCHW', 4),
    ('resnet18', r'layer[34]\.0\.bn1', 'NCHW', 2),
    ('seresnet18', r'layer\d\.0', 'NCHW', 4),
    ('regnetx_002', r's\d', 'NCHW', 4),
    ('convnext_atto', r'stages\.\d', 'NCHW', 4),
    ('efficientnet_lite0', r'blocks\.\d', 'NCHW', 7),
    ('densenet121', r'features\.transition\d', 'NCHW', 3),
    ('swin_tiny_patch4_window7_224', r'layers\.\d', 'NHWC', 4),
]


@pytest.mark.parametrize(('name', 'at', 'fmt', 'count'), PLACES)
def test_outputs_of_modules_pass_their_attention_once(name: str, at: str, fmt: str, count: int) -> None:
    kwargs = THIN if name == 'resnet18' else {'layers': (1, 1, 1, 1)} if name == 'seresnet18' else {}
    model = trained(name, **kwargs)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith('gamma'):  # starts at 1e-6, which hides a block
                p.fill_(1)
    x = image(1, 3, 224, 224) if 'swin' in name else image(2, 3, 64, 64)
    keys = list(model.state_dict())
    where = 'output' if name == 'resnet18' else 'auto'
    bases: dict[str, Tensor] = {}
    owners = {n: m for n, m in model.named_modules() if re.fullmatch(at, n)}
    handles = [m.register_forward_hook(lambda m, i, o, n=n: bases.__setitem__(n, o.clone())) for n, m in owners.items()]
    with torch.no_grad():
        want = model(x)
        for handle in handles:
            handle.remove()
        inject(model, 'cbam', at=at, where=where, fmt=fmt)
        assert_unchanged(model, model(x), want)
        assert len(attn_sites(model)) == count and set(keys) < set(model.state_dict())
        # By hand: what a module returns is its attention of what it returned before, and each attention runs once.
        seen: dict[str, list[Tensor]] = {}
        got: dict[str, Tensor] = {}
        for site, attn in attn_sites(loud(model)).items():
            attn.register_forward_pre_hook(functools.partial(note, seen, site))
        for n, m in owners.items():
            m.register_forward_hook(lambda m, i, o, n=n: got.__setitem__(n, o.clone()))
        out = model(x)
        assert not torch.allclose(out, want, rtol=1e-2)
        turn = (lambda t: t.permute(0, 3, 1, 2)) if fmt == 'NHWC' else (lambda t: t)
        for i, (owner, (site, attn)) in enumerate(zip(owners, attn_sites(model).items(), strict=True)):
            assert site.startswith(f'{owner}.')
            (given,) = list(seen[site])
            if not i:
                torch.testing.assert_close(given, turn(bases[owner]), rtol=0, atol=0)
            torch.testing.assert_close(turn(got[owner]), attn(given), rtol=0, atol=0)
        timm_attn.eject(model)
        assert list(model.state_dict()) == keys
        assert torch.equal(model(x), want)


def test_gates_of_a_users_own_network_are_as_written_by_hand() -> None:
    torch.manual_seed(0)
    model: Any = Unet().eval()
    x = image(2, 3, 32, 48)
    with torch.no_grad():
        want = model(x)
        inject(model, 'se', at=['down', 'mid', 'up'], example=(1, 3, 32, 32))
        assert torch.equal(model(x), want)
        a: Any = attn_sites(loud(model))
        assert list(a) == ['down.3', 'mid.attn', 'up.attn']
        skip = a['down.3'](model.down[2](model.down[1](model.down[0](x))))
        y = a['mid.attn'](model.mid.b1(model.mid.b0(skip)))
        y = a['up.attn'](nn.functional.conv_transpose2d(y, model.up.weight, model.up.bias, 2))
        torch.testing.assert_close(model(x), model.out(torch.cat([skip, y], 1)), rtol=0, atol=0)


def test_second_attention_at_a_module_follows_the_first() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)).eval()
    x = image(2, 3, 12, 12)
    with torch.no_grad():
        want = model(x)
        inject(inject(model, 'se', at='1'), 'eca', at='1')
        sites = attn_sites(model)
        assert {k: type(m).__name__ for k, m in sites.items()} == {'1.attn': 'SqueezeExcite', '1.attn_gate': 'ECA'}
        loud(model)
        se, eca = sites.values()
        first = model[0](x)
        plain = nn.functional.conv2d(first, model[1].weight, model[1].bias)
        torch.testing.assert_close(model(x), eca(se(plain)), rtol=0, atol=0)
        with pytest.raises(ValueError, match=r"'1' has an 'attn' and an 'attn_gate' already"):
            inject(model, 'se', at='1')
        assert torch.equal(timm_attn.eject(model)(x), want)


WAYS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    'deepcopy': lambda m, x: copy.deepcopy(m),
    'pickle': lambda m, x: pickle.loads(pickle.dumps(m)),
    'export': lambda m, x: torch.export.export(m, (x,)).module(),
    'compile': lambda m, x: torch.compile(m, backend='eager', fullgraph=True),
    'trace': lambda m, x: torch.jit.trace(m, (x,)),
    'script': lambda m, x: torch.jit.script(m),
    'fx': lambda m, x: torch.fx.symbolic_trace(m),
    'ema': lambda m, x: ModelEmaV3(m).module,
    'sync': lambda m, x: nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(m)).eval(),
    'channels_last': lambda m, x: copy.deepcopy(m).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize('way', WAYS)
def test_gated_outputs_survive(way: str) -> None:
    model = trained('resnet18', **THIN)
    inject(model, 'cbam', at=[r'layer[12]\.0', 'layer3'], where='output')
    inject(model, 'eca', at=r'layer4\.0', where='output')
    x = image(2, 3, 64, 64)
    with torch.no_grad():
        plain = model(x)
        want = loud(model)(x)
        assert not torch.allclose(want, plain, rtol=1e-2)
        torch.testing.assert_close(WAYS[way](model, x)(x), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def test_handle_that_was_compiled_before_sees_new_attention() -> None:
    model = trained('resnet18', **THIN)
    compiled = torch.compile(model, backend='eager')
    x = image(2, 3, 64, 64)
    with torch.no_grad():
        want = compiled(x)
        loud(inject(model, 'se', at=r'layer\d\.0', where='output'))
        torch.testing.assert_close(compiled(x), model(x))
        timm_attn.eject(model)
        torch.testing.assert_close(compiled(x), want)


def test_hooks_of_a_pickled_model_are_not_overwritten() -> None:
    """torch numbers hooks by process: a model from another one must not lose its gate to the next hook."""
    model = inject(nn.Sequential(nn.Conv2d(3, 16, 3)), 'se', at='0')
    loaded = pickle.loads(pickle.dumps(model))
    (key,) = loaded[0]._forward_hooks
    assert not isinstance(key, int)


def test_gradient_reaches_gated_outputs() -> None:
    model = inject(trained('resnet18', **THIN), 'eca', at=r'layer\d', fmt='NCHW').train()
    model(image(2, 3, 64, 64)).sum().backward()
    grads = [p.grad for m in attn_sites(model).values() for p in m.parameters()]
    assert len(grads) == 4 and all(g is not None and g.abs().max() > 0 for g in grads)


def test_fused_blocks_keep_gated_outputs() -> None:
    x = image(2, 3, 64, 64)
    for freeze in (False, True):
        model = trained('resnet18', **THIN)
        loud(inject(model, 'cbam', at=['conv1', r'layer[12]\.0', r'layer3\.0\.conv2', 'layer4'], where='output'))
        want = model(x)
        left = pytest.warns(UserWarning, match='leaves 2 BatchNorms as they are.*attention.*: bn1, layer3.0.bn2')
        with left if freeze else nullcontext():
            got = timm_attn.fuse(model, freeze=freeze, compile=False)(x)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def test_predicate_and_lists_choose_alike() -> None:
    def third(name: str, module: nn.Module) -> bool:
        return name.startswith('layer3.') and type(module).__name__ == 'BasicBlock'

    for at in (third, r'layer3\.\d', [r'layer3\.0', r'layer3\.1']):
        model = inject(create_model('resnet18', device='meta'), 'se', at=at)
        assert list(attn_sites(model)) == ['layer3.0.se', 'layer3.1.se']


def test_bam_follows_stages_that_are_no_sequences() -> None:
    for family in ('regnetx_002', 'convnext_atto', 'darknet17'):
        model = trained(family)
        x = image(2, 3, 64, 64)
        with torch.no_grad():
            want = model(x)
            assert (inject(model, 'bam')(x) - want).abs().max() <= 1e-5 * want.abs().max()
            assert len(attn_sites(model)) == len(model.feature_info) - 2
            assert feels(model, x, model(x)) == []


@pytest.mark.parametrize(('name', 'count'), [('botnet26t_256', 5), ('halonet26t', 5), ('tresnet_m', 3)])
def test_models_of_a_fixed_size_or_stem_are_probed_with_what_they_take(name: str, count: int) -> None:
    assert len(attn_sites(inject(create_model(name, device='meta'), 'se'))) == count


@pytest.mark.parametrize('name', ['visformer_tiny', 'efficientformerv2_s0'])
def test_empty_attributes_that_are_no_slots_are_refused(name: str) -> None:
    model = create_model(name, device='meta')
    with pytest.raises(ValueError, match=r'not with attention in its empty slots.*so they are none\. Say with `at`'):
        inject(model, 'se')
    assert attn_sites(model) == {}


# Refusals. The model stays as it was.


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.tokens = nn.Flatten(2)
        self.pair = nn.LSTM(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.conv(x))
        return self.pair(self.tokens(x))[0]


class Bad(timm_attn.layers.Attention):
    """Three faults of an attention of a user's own, by `fault`."""

    def __init__(self, channels: int, fault: str = '', *, device: Any = None, dtype: Any = None) -> None:
        super().__init__(neutral_gate=0.5)
        self.fc = nn.Conv2d(channels, channels, 1, device=device, dtype=dtype)
        self.fault = fault

    def init_neutral(self) -> None:
        if self.fault == 'none':
            raise NotImplementedError
        if self.fault != 'init':
            nn.init.zeros_(self.fc.weight)
            nn.init.zeros_(self.fc.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x).sigmoid() * (1 if self.fault == 'gain' else self.gain)


@pytest.fixture
def bad(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(_registry, '_ATTENTIONS', dict(_registry._ATTENTIONS))
    facts: Any = dict(placement='block', title='', authors='A', year=2000, venue='', paper='', code='')
    timm_attn.register_attn('bad', **facts)(Bad)
    return 'bad'


@pytest.mark.parametrize(
    ('fault', 'match'),
    [
        ('gain', r"'bad' \(.*Bad\) cannot start as the identity: it ignores `gain`"),
        ('init', r'`init_neutral` does not make it multiply by its neutral_gate \(=0\.5\)'),
        ('none', r"'bad' has no neutral state.*use start='paper'"),
    ],
)
@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_attention_that_is_not_neutral_is_refused(bad: str, fault: str, match: str, device: str) -> None:
    model = create_model('resnet18', device=device, **THIN)
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=match):
        inject(model, bad, fault=fault)
    assert list(model.state_dict()) == keys and attn_sites(model) == {}
    assert len(attn_sites(inject(model, bad, fault=fault, start='paper'))) == 4
    assert len(attn_sites(inject(create_model('resnet18', device=device, **THIN), bad))) == 4


REFUSED: list[tuple[dict[str, Any], str]] = [
    (dict(at=r'conv'), r"calls \['conv'\] more than once"),
    (dict(at=r'pair'), r"'pair' returns a tuple of 2, and attention needs one map"),
    (dict(at=r'tokens'), r"'tokens' returns tokens \(2, 3, 16\)"),
    (dict(at=r'tokenz'), r"matches no module of Twice\. Near names: 'tokens'"),
    (dict(at=['conv', r'pear']), r"at \(='pear'\) matches no module of Twice\. Near names: 'pair'"),
    (dict(at='('), 'is no regular expression'),
    (dict(at=[]), 'must be a regular expression, a list of them, or a predicate'),
    (dict(at=lambda n, m: False), 'is true for none of the 3 modules'),
    (dict(at='tokens', fmt='NLC'), 'tokens have no rows and columns'),
    (dict(at='tokens', fmt='NHCW'), r"Unknown fmt 'NHCW'\. Expected one of: NCHW, NHWC"),
    (dict(at='tokens', where='slots'), r"Unknown where 'slots'\. Expected one of: auto, slot, output"),
    (dict(at='tokens', where='slot'), r"'tokens', a Flatten, has no slot"),
    (dict(where='output'), 'say with `at` which ones'),
    (dict(at='tokens', where='slot', fmt='NHWC'), "timm's slots get maps"),
    (dict(at='tokens', example=(2, 5, 4, 4)), 'failed for the example.*Pass `example`'),
]


@pytest.mark.parametrize(('kwargs', 'match'), REFUSED)
def test_what_cannot_be_gated_is_refused(kwargs: dict[str, Any], match: str) -> None:
    model = Twice()
    before = (list(model.state_dict()), vars(model).keys() - {'training'}, [dict(m._modules) for m in model.modules()])
    with pytest.raises(ValueError, match=match):
        inject(model, 'se', **{'example': (2, 3, 4, 4), **kwargs})
    after = (list(model.state_dict()), vars(model).keys() - {'training'}, [dict(m._modules) for m in model.modules()])
    assert after == before and not any(m._forward_hooks for m in model.modules())


def test_layout_that_does_not_fit_is_refused() -> None:
    swin = create_model('swin_tiny_patch4_window7_224', device='meta')
    with pytest.raises(ValueError, match=r"'layers\.0' returns \(2, 56, 56, 96\).*pass fmt='NHWC'"):
        inject(swin, 'se', at=r'layers\.\d')
    with pytest.raises(ValueError, match=r"looks like \(N, C, H, W\): leave out fmt='NHWC'"):
        inject(create_model('resnet18', device='meta'), 'se', at=r'layer1\.0', fmt='NHWC')


def test_containers_that_do_more_than_run_their_children_are_refused() -> None:
    for name in (r'features\.denseblock\d', 'features'):
        model = create_model('densenet121', device='meta')
        with pytest.raises(ValueError, match=r'runs its children by iteration|never calls'):
            inject(model, 'se', at=name if name != 'features' else r'features\.denseblock1')
        assert attn_sites(model) == {}


def test_wrapped_and_compiled_models_are_refused() -> None:
    model = create_model('resnet18', **THIN)
    for wrapped, match in (
        (nn.DataParallel(model), 'wrapped by DataParallel.*inject first, then wrap'),
        (torch.compile(model), r'inject first, then torch\.compile'),
        (torch.jit.script(create_model('resnet18', **THIN)), 'inject first, then script'),
    ):
        with pytest.raises(ValueError, match=match):
            inject(cast(nn.Module, wrapped), 'se')
    assert attn_sites(model) == {}


def test_models_that_are_wrapped_for_many_processes_are_refused() -> None:
    distributed.init_process_group('gloo', store=distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel, inside, sharded = (create_model('resnet18', **THIN) for _ in range(3))
        inside.layer2 = DistributedDataParallel(inside.layer2)
        fully_shard(sharded.layer1, mesh=init_device_mesh('cpu', (1,)))
        for model, wrapper in (
            (DistributedDataParallel(parallel), 'DistributedDataParallel'),
            (inside, 'DistributedDataParallel'),
            (sharded, 'FSDPModule'),
        ):
            with pytest.raises(ValueError, match=f'wrapped by {wrapper}, .*inject first, then wrap'):
                inject(model, 'se', at=r'(module\.)?layer3')
            assert attn_sites(model) == {}
    finally:
        distributed.destroy_process_group()


class TwoMaps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.conv(x) + y


class Calls(nn.Module):
    """A network with a module of two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 16, 3), TwoMaps()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.block(x, x)


@pytest.mark.filterwarnings('ignore:.*torch.jit:DeprecationWarning', 'ignore:.*torch.jit:FutureWarning')
@pytest.mark.parametrize(
    ('build', 'at'),
    [(Calls, 'block'), (lambda: create_model('densenet121', num_classes=2), r'features\.denseblock1\.denselayer1')],
    ids=['two arguments', 'a union of types'],
)
def test_scripting_modules_of_other_arguments_is_an_error(build: Callable[[], nn.Module], at: str) -> None:
    """TorchScript wants a hook's types to be the module's: it must not script the module without its attention."""
    model = loud(inject(build(), 'se', at=at)).eval()
    x = image(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(cast(Any, torch.jit.trace(model, (x,)))(x), model(x))
        with pytest.raises(RuntimeError, match=r"Hook '_gate' on module '.*' has the wrong"):
            torch.jit.script(model)


def test_models_state_and_caches_stay() -> None:
    """A probe on the model itself would leave shapes and meta tensors in what it caches by itself."""

    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 1)
            self.plain = torch.ones(1)
            self.calls: list[int] = []
            self.grid: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.calls.append(len(x))
            if self.grid is None:
                self.grid = torch.zeros(x.shape[2:], device=x.device)
            return self.conv(x) * self.plain + self.grid

    model = Caching()
    inject(model, 'se', at='conv')
    assert model.calls == [] and model.grid is None
    assert model(image(1, 3, 8, 8)).device.type == 'cpu'


def test_network_whose_way_depends_on_values_is_run_for_real() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if float(x.mean()) < 1 else x

    assert list(attn_sites(inject(Branching(), 'se', at='conv'))) == ['conv.attn']


def test_network_without_convolutions_asks_for_an_example() -> None:
    class Slotted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Unet()
            self.block.attn = None  # pyright: ignore[reportAttributeAccessIssue]
            self.block: Any = nn.Module()
            self.block.attn = None
            self.scale = nn.Parameter(torch.ones(16))
            self.block.forward = lambda x: x  # pyright: ignore[reportAttributeAccessIssue]

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) * self.scale[:, None, None]

    with pytest.raises(ValueError, match=r'has no Conv2d.*pass `example`'):
        inject(Slotted(), 'se')


def test_log_says_how_many_sites_and_which_slots_were_taken(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    inject(create_model('resnet18', device='meta'), 'se')
    assert "'se' fills 8 sites of ResNet (layer1.0.se ... layer4.1.se)." in caplog.text
    caplog.clear()
    inject(create_model('mobilenetv3_small_100', device='meta'), 'cbam')
    assert "'cbam' fills 2 sites of MobileNetV3" in caplog.text
    assert '9 slots were taken already: blocks.0.0.se, ' in caplog.text
    assert len(caplog.records) == 1


def test_full_slots_are_called_full() -> None:
    with pytest.raises(ValueError, match=r'no empty attention slot.*they are filled: layer1\.0\.se.*at=\['):
        inject(create_model('seresnet18', device='meta'), 'cbam')


# Taking out, and freezing.


@pytest.mark.parametrize('name', INJECTED)
def test_eject_gives_the_base_back(name: str) -> None:
    model = trained('resnet18', **THIN)
    x = image(2, 3, 64, 64)
    keys, listed = list(model.state_dict()), getattr(model, 'no_weight_decay', None)
    vars_before = set(vars(model))
    with torch.no_grad():
        want = model(x)
        inject(model, name, start='paper', **SMALLER.get(name, {}))
        inject(model, 'srm', at=r'layer2\.0', where='output')
        loud(model)
        copied = copy.deepcopy(model)
        for m in (model, copied):
            assert timm_attn.eject(m) is m
            assert list(m.state_dict()) == keys and torch.equal(m(x), want)
            assert set(vars(m)) == vars_before and getattr(m, 'no_weight_decay', None) == listed
            assert m.layer1[0].se is None and 'se' not in dict(m.layer1[0].named_children())
    with pytest.raises(ValueError, match=r'holds no attention that timm_attn\.inject put there'):
        timm_attn.eject(model)
    inject(model, name, start='paper', **SMALLER.get(name, {}))


def test_eject_leaves_a_registered_model_its_own_attention() -> None:
    model = trained('srm_resnet18', **THIN)
    keys = list(model.state_dict())
    listed = cast(Any, model).no_weight_decay()
    with pytest.raises(ValueError, match='holds no attention that'):
        timm_attn.eject(model)
    inject(model, 'csa', at=r'layer\d', where='output')
    assert cast(Any, model).no_weight_decay() > listed
    timm_attn.eject(model)
    assert list(model.state_dict()) == keys and cast(Any, model).no_weight_decay() == listed
    identity = create_model('regnetx_002')
    timm_attn.eject(inject(identity, 'se'))
    assert type(identity.s1.b1.se) is nn.Identity


def test_frozen_backbone_does_not_move() -> None:
    model: Any = inject(trained('resnet18', **THIN), 'cbam')
    base = {k: v.clone() for k, v in model.state_dict().items() if '.se.' not in k and not k.startswith('fc.')}
    assert timm_attn.freeze_backbone(model) is model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    net: Any
    for net in (model, pickle.loads(pickle.dumps(copy.deepcopy(model)))):
        net.train()
        assert net.layer1[0].se.bn.training and not net.layer1[0].bn1.training and not net.bn1.training
    nn.functional.cross_entropy(model(image(4, 3, 64, 64)), torch.tensor([0, 1, 2, 3])).backward()
    optimizer.step()
    state = model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in base.items())
    assert state['layer1.0.se.bn.running_mean'].abs().max() > 0
    assert {k for k, p in model.named_parameters() if p.requires_grad} == {
        k for k, _ in model.named_parameters() if '.se.' in k or k.startswith('fc.')
    }
    model.requires_grad_(True)
    model.train()
    assert all(m.training for m in model.modules())


def test_frozen_backbone_with_a_frozen_head() -> None:
    model = timm_attn.freeze_backbone(create_model('bam_resnet18', **THIN), head=False)
    assert {k.split('.')[1] for k, p in model.named_parameters() if p.requires_grad} == {'1'}
    with pytest.raises(ValueError, match='has no attention to train first'):
        timm_attn.freeze_backbone(create_model('resnet18', **THIN))
    with pytest.raises(ValueError, match=r'Unet has no get_classifier\(\).*pass head=False'):
        timm_attn.freeze_backbone(inject(Unet(), 'se', at='mid'))
    assert timm_attn.freeze_backbone(inject(Unet(), 'se', at='mid'), head=False)


def test_public_name() -> None:
    assert timm_attn.inject is inject
