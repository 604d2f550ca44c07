"""Attention put into timm's models: the identity start changes nothing, the paper start is the registered model."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import timm_attn
from timm_attn import inject, list_attn
from timm_attn.layers import attn_sites, get_attn

THIN: dict[str, Any] = {'layers': (1, 1, 1, 1), 'channels': (32, 64, 96, 128)}
SMALLER: dict[str, dict[str, Any]] = {'gsop': {'dim': 16}}
INJECTED = [name for name in list_attn() if get_attn(name).placement != 'conv']
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
    return all(m.neutral_gate in (0.25, 0.5, 1) for m in attn_sites(model).values())


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


@pytest.mark.parametrize('name', INJECTED)
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


@pytest.mark.parametrize('name', INJECTED)
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


@pytest.mark.parametrize('name', INJECTED)
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
    # GSoP is defined for bottlenecks.
    ('name', 'depth'),
    [(name, depth) for name in INJECTED for depth in (18, 50) if (name, depth) != ('gsop', 18)],
)
def test_paper_start_has_the_outputs_of_the_registered_model(name: str, depth: int) -> None:
    if name == 'gsop':
        # Its released nets keep the resolution of the last stage, which no injection can do.
        ours = trained('gsop_resnet50', **THIN, last_stride=2)
    else:
        ours = trained(f'{name}_resnet{depth}', **THIN)
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


@pytest.mark.parametrize('family', ['regnetx_002', 'darknet17', 'vgg11', 'convnext_atto', 'densenet121'])
def test_stage_that_is_no_sequence_raises(family: str) -> None:
    model = create_model(family, device='meta')
    with pytest.raises(ValueError, match=r'is a \w+, and attention after a stage is appended to an nn\.Sequential'):
        inject(model, 'bam')
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
    with pytest.raises(ValueError, match=r"Unknown attention 'cbamm'\. Expected one of: bam"):
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


def test_public_name() -> None:
    assert timm_attn.inject is inject
