"""Warm starts: the plain ResNet's logits, and attention that learns from the first steps on."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

import timm_attn
from timm_attn.layers import Attention, _registry, register_attn
from timm_attn.models import AttnResNet
from timm_attn.weights import cfgs_of, convert, tags, warm_start

ATTENTIONS = ['se', 'eca', 'srm', 'cbam', 'bam', 'gam', 'triplet', 'csa']


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return model.eval()(x)


# fca has no depth 18, and is with the tags.
WARM = sorted(
    {t.model.removesuffix('_resnet18') for t in tags.TAGS if t.model.endswith('_resnet18') and t.status == 'warm'}
)


@pytest.mark.parametrize('attn', WARM)
def test_logits_equal_the_plain_resnets(
    attn: str,
    plain: Callable[[int], dict[str, Tensor]],
    with_weights: Callable[..., nn.Module],
    caplog: pytest.LogCaptureFixture,
) -> None:
    state_dict = plain(18)
    before = {k: v.clone() for k, v in state_dict.items()}
    name = f'{attn}_resnet18'
    with caplog.at_level(logging.WARNING):
        converted = convert(state_dict, name, 'torchvision')
    assert f'Warm start of {name}' in caplog.text
    assert 'attention is untrained' in caplog.text
    assert all(torch.equal(v, before[k]) for k, v in state_dict.items())
    again = convert(state_dict, name)
    assert all(torch.equal(v, again[k]) for k, v in converted.items())

    x = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    expected = _logits(with_weights('resnet18', state_dict), x)
    logits = _logits(with_weights(name, converted), x)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


# A bias in front of a BatchNorm is subtracted again: its gradient is zero but for rounding.
_NO_EFFECT = {
    'bam': ('fc1.bias', 'conv_reduce.bias', 'conv_dil1.bias', 'conv_dil2.bias'),
    'gam': ('conv1.bias', 'conv2.bias'),
}
_LAST = {
    'se': ('fc2.',),
    'eca': ('conv.',),
    'srm': ('cfc', 'bn.bias'),
    'cbam': ('fc2.', 'bn.'),
    'bam': ('conv_final.',),
    'gam': ('fc2.', 'bn2.'),
    'triplet': ('cw.bn.', 'hc.bn.', 'hw.bn.'),
    'csa': ('gamma',),
}


@pytest.mark.parametrize('attn', ATTENTIONS)
def test_the_last_layer_moves_in_the_first_step_and_all_of_it_within_three(
    attn: str, plain: Callable[[int], dict[str, Tensor]]
) -> None:
    torch.manual_seed(0)
    model = timm.create_model(f'{attn}_resnet18', num_classes=1000)
    model.load_state_dict(warm_start(plain(18), model))
    model.double().train()  # in float32, a BatchNorm's 1 swallows the first small steps
    sites = timm_attn.attn_sites(model)
    first = {f'{s}.{k}': p.detach().clone() for s, m in sites.items() for k, p in m.named_parameters()}

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.rand(4, 3, 64, 64, dtype=torch.float64), torch.arange(4)
    moved: list[set[str]] = []
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        now = dict(model.named_parameters())
        moved.append({k for k, v in first.items() if not torch.equal(now[k], v)})
    for site in sites:
        own = {k.removeprefix(f'{site}.') for k in moved[0] if k.startswith(f'{site}.')}
        for last in _LAST[attn]:
            assert any(k.startswith(last) for k in own), (site, last)
    expected = {k for k in first if not k.endswith(_NO_EFFECT.get(attn, ('nothing',)))}
    assert expected <= moved[2]


@pytest.mark.parametrize('attn', ['cbam', 'bam'])
def test_bottlenecks_start_warm_too(
    attn: str, plain: Callable[[int], dict[str, Tensor]], with_weights: Callable[..., nn.Module]
) -> None:
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = _logits(with_weights('resnet50', plain(50)), x)
    logits = _logits(with_weights(f'{attn}_resnet50', convert(plain(50), f'{attn}_resnet50')), x)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_an_injected_model_starts_warm_with_its_gain_counted(
    plain: Callable[[int], dict[str, Tensor]], with_weights: Callable[..., nn.Module]
) -> None:
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = _logits(with_weights('resnet18', plain(18)), x)
    model = timm_attn.inject(timm.create_model('resnet18'), 'gam', start='identity')
    model.load_state_dict(warm_start(plain(18), model))
    assert torch.equal(_logits(model, x), expected)


def test_a_plain_checkpoint_older_than_batch_counts_starts_warm_too(plain: Callable[[int], dict[str, Tensor]]) -> None:
    old = {f'module.{k}': v for k, v in plain(18).items() if not k.endswith('num_batches_tracked')}
    expected = convert(plain(18), 'cbam_resnet18')
    converted = convert({'state_dict': old}, 'cbam_resnet18')
    assert all(torch.equal(v, expected[k]) for k, v in converted.items())
    assert converted.keys() == expected.keys()


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('sk_resnet50', r'SK has no warm start: it replaces each 3x3 convolution'),
        ('gsop_resnet50', r'GSoP has no warm start: its last stage has stride 1'),
    ],
)
def test_sk_and_gsop_have_no_warm_start(name: str, message: str, plain: Callable[[int], dict[str, Tensor]]) -> None:
    with pytest.raises(ValueError, match=message):
        convert(plain(50), name)


def test_what_cannot_be_started_is_refused(plain: Callable[[int], dict[str, Tensor]], randomise: Any) -> None:
    with pytest.raises(ValueError, match=r'has no attention to start'):
        warm_start(plain(18), timm.create_model('resnet18', device='meta'))
    cbam = timm.create_model('cbam_resnet18')
    with pytest.raises(ValueError, match=r'these have attention: .*layer1\.0\.se\.fc1\.weight'):
        warm_start(randomise(cbam, 0), cbam)
    part = {k: v for k, v in plain(18).items() if k != 'layer2.0.bn2.weight'}
    with pytest.raises(ValueError, match=r"divides 'layer2\.0\.bn2\.weight'"):
        warm_start(part, cbam)
    with pytest.raises(ValueError, match=r'1 missing keys: layer2\.0\.bn2\.weight\.'):
        convert(part, 'cbam_resnet18')


class Third(Attention):
    """An attention of somebody else's: it multiplies by 3 s(f(mean)) / 4, so its constant is 3/8."""

    def __init__(self, channels: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__(neutral_gate=0.375)
        self.weight = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))

    def init_neutral(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        z = x.mean((2, 3)) * self.weight + self.bias
        return x * (0.75 * z.sigmoid()[:, :, None, None] * self.gain)


@pytest.fixture
def outsiders(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Registers a class from outside the package, for one test."""
    monkeypatch.setattr(_registry, '_ATTENTIONS', dict(_registry._ATTENTIONS))
    monkeypatch.setattr(tags, 'TAGS', list(tags.TAGS))

    def register(name: str, placement: str, cls: type[Attention]) -> None:
        about = dict(title='t', authors='A, B', venue='v', paper='https://example.org', code='')
        register_attn(name, placement=placement, year=2024, **about)(cls)

    return register


@pytest.mark.parametrize('placement', ['block', 'last_block', 'one_block', 'stage', 'conv2'])
@pytest.mark.parametrize('norm', ['batchnorm2d', 'groupnorm'])
def test_an_attention_from_outside_starts_warm_by_what_its_class_says(
    placement: str, norm: str, outsiders: Callable[..., None], randomise: Any
) -> None:
    outsiders('third', placement, Third)
    args: dict[str, Any] = dict(block=BasicBlock, layers=(1, 2, 1, 1), norm_layer=norm, num_classes=5)
    plain = timm.models.resnet.ResNet(**args)
    plain.load_state_dict(randomise(plain, 3))
    model = AttnResNet(attn='third', **args)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    before = _logits(model, x)
    model.load_state_dict(warm_start(plain.state_dict(), model))
    expected = _logits(plain, x)
    assert (_logits(model, x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (before - expected).abs().max() > 0.01 * expected.abs().max()
    # And it has a tag like ours.
    cfg = cfgs_of(['third_resnet18'])
    assert cfg.keys() == {'third_resnet18.resnet18_a1_in1k'}
    assert [t.model for t in tags.TAGS].count('third_resnet18') == 1
    cfgs_of(['third_resnet18'])
    assert [t.model for t in tags.TAGS].count('third_resnet18') == 1


def test_an_attention_from_outside_says_itself_why_it_cannot(outsiders: Callable[..., None], randomise: Any) -> None:
    class Changed(Third):
        no_warm_start = 'Changed has no warm start: it changes the map.'

    class Never(Third):
        def __init__(self, channels: int, **dd: Any) -> None:
            super().__init__(channels, **dd)
            self.neutral_gate = None  # pyright: ignore[reportAttributeAccessIssue]

    args: dict[str, Any] = dict(block=BasicBlock, layers=(1, 1, 1, 1))
    plain = randomise(timm.models.resnet.ResNet(**args), 0)
    for name, cls, message in (
        ('changed', Changed, 'it changes the map'),
        ('never', Never, 'Never has no warm start: it has no state in which it multiplies by a constant'),
    ):
        outsiders(name, 'block', cls)
        with pytest.raises(ValueError, match=message):
            warm_start(plain, AttnResNet(attn=name, **args))
    assert cfgs_of(['changed_resnet18']).keys() == {'changed_resnet18.untrained'}
