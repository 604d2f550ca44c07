"""The weights inside training checkpoints: wrappers, prefixes, averaged beside raw ones."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from timm_attn.weights import convert
from timm_attn.weights.unwrap import unwrap

State = dict[str, Tensor]
RAW = {'conv1.weight': torch.zeros(2), 'fc.bias': torch.zeros(1)}
EMA = {'conv1.weight': torch.ones(2), 'fc.bias': torch.ones(1)}


def _prefixed(state_dict: State, prefix: str) -> State:
    return {f'{prefix}{k}': v for k, v in state_dict.items()}


def _averaged(state_dict: State) -> State:
    """As torch.optim.swa_utils.AveragedModel and torchvision's training script write it."""
    return {'n_averaged': torch.tensor(5), **_prefixed(state_dict, 'module.')}


@pytest.mark.parametrize(
    'checkpoint',
    [
        {'model': RAW, 'model_ema': _averaged(EMA), 'epoch': 3},
        {'state_dict': _prefixed(RAW, 'module.'), 'state_dict_ema': EMA, 'arch': 'x'},
        {'model_state_dict': RAW, 'ema_state_dict': EMA},
        {'net': RAW, 'ema': {'decay': 0.9, 'module': EMA}},
        {'params': RAW, 'params_ema': EMA},
        {
            'state_dict': _prefixed(EMA, 'model.'),
            'current_model_state': _prefixed(RAW, 'model.'),
            'averaging_state': {},
        },
        {'state_dict': _prefixed(RAW, 'model.') | _prefixed(EMA, 'model_ema.')},
        {'state_dict': _prefixed(RAW, 'net.') | _prefixed(_averaged(EMA), 'ema_model.')},
    ],
)
def test_averaged_or_raw_weights_are_chosen_and_it_is_said(
    checkpoint: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    for weights, expected, kind in ((None, EMA, 'ema'), ('ema', EMA, 'ema'), ('raw', RAW, 'raw')):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = unwrap(checkpoint, weights)
        assert found.kind == kind
        assert found.state_dict.keys() == expected.keys()
        assert all(torch.equal(v, expected[k]) for k, v in found.state_dict.items())
        # Who chose needs no word.
        assert ("weights='raw' (--weights raw) takes the others" in caplog.text) == (weights is None)


@pytest.mark.parametrize(
    'checkpoint',
    [
        RAW,
        {'model_state_dict': RAW, 'optimizer_state_dict': {'state': {}}},
        {'net': _prefixed(RAW, 'module.'), 'acc': 93.2},
        {'network': RAW},
        {'state_dict': {'state_dict': RAW}},
        {'model': {'name': 'x', 'depth': 18}, 'params': {'lr': 0.1}, 'net': RAW},
        {'model': RAW, 'state_dict': RAW},
        {'state_dict': _prefixed(RAW, 'model.'), 'pytorch-lightning_version': '2.5'},
        {'state_dict': _prefixed(RAW, 'net._orig_mod.')},
        {'state_dict': _prefixed(RAW, '_orig_mod.model.backbone.')},
        _prefixed(RAW, 'backbone.'),
        _prefixed(RAW, 'module.network.'),
    ],
)
def test_wrappers_and_prefixes_that_all_keys_have_are_taken_off(
    checkpoint: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    found = unwrap(checkpoint)
    assert found.state_dict.keys() == RAW.keys() and found.kind == ''
    assert unwrap(checkpoint, 'raw').state_dict.keys() == RAW.keys()
    with pytest.raises(ValueError, match=r"holds no averaged weights, and weights='ema' was asked for"):
        unwrap(checkpoint, 'ema')
    assert not caplog.records


@pytest.mark.parametrize('checkpoint', [_averaged(EMA), {'model': _averaged(EMA)}, {'model_ema': EMA, 'model': {}}])
def test_an_average_alone_is_no_raw_set(checkpoint: dict[str, Any]) -> None:
    assert unwrap(checkpoint).kind == 'ema'
    assert unwrap(checkpoint).state_dict.keys() == EMA.keys()
    with pytest.raises(ValueError, match=r"holds averaged weights only, and weights='raw' was asked for"):
        unwrap(checkpoint, 'raw')


@pytest.mark.parametrize(
    ('state_dict', 'message'),
    [
        (
            _prefixed(RAW, 'model.') | {'criterion.weight': torch.ones(1)},
            r"under 'model\.' \(2 of 3 keys\), beside criterion\.weight: .*prefix='model\.' \(--prefix model\.\)",
        ),
        (
            _prefixed(RAW, 'backbone.') | _prefixed(RAW, 'head.'),
            r"under 'backbone\.' \(2 of 4 keys\), beside head\.conv1\.weight, .*--prefix backbone\.",
        ),
        (_prefixed(RAW, 'model.') | _prefixed(EMA, 'net.'), r"'model\.' \(2 of 4 keys\), 'net\.' \(2 of 4 keys\)"),
    ],
)
def test_a_prefix_that_only_a_part_has_must_be_named(
    state_dict: State, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=message):
        unwrap(state_dict)
    prefix = next(iter(state_dict)).partition('.')[0] + '.'
    with caplog.at_level(logging.WARNING):
        found = unwrap({'state_dict': state_dict}, prefix=prefix)
    assert found.state_dict.keys() == RAW.keys()
    assert f"prefix '{prefix}' leaves out {len(state_dict) - 2} of the checkpoint's keys" in caplog.text
    for wrong in ('encoder.', ''):
        with pytest.raises(ValueError, match=rf"No key begins with prefix \(='{wrong}'\); the first are: {prefix}"):
            unwrap(state_dict, prefix=wrong)


def test_what_is_no_choice_and_no_state_dict_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weights \(='swa'\) must be one of: 'ema', 'raw'"):
        unwrap(RAW, 'swa')
    with pytest.raises(ValueError, match=r"several sets of weights, 'state_dict', 'net': pass the one that is meant"):
        unwrap({'net': RAW, 'state_dict': EMA})
    loop: dict[str, Any] = {}
    loop['state_dict'] = {'model': loop}
    with pytest.raises(ValueError, match='lead back to itself'):
        unwrap(loop)
    deep: dict[str, Any] = dict(RAW)
    for _ in range(100_000):
        deep = {'model': deep}
    assert unwrap(deep).state_dict.keys() == RAW.keys()
    with pytest.raises(ValueError, match=r'has texts for keys; this one has also: int, tuple'):
        unwrap({1: torch.zeros(1), ('a',): torch.zeros(1), **RAW})  # pyright: ignore[reportArgumentType]


def test_torchvisions_training_file_gives_the_averaged_or_the_raw_models_logits(
    randomise: Callable[[nn.Module, int], State], with_weights: Callable[..., nn.Module]
) -> None:
    model = timm.create_model('cbam_resnet18', num_classes=3)
    model.load_state_dict(randomise(model, 0))
    ema = AveragedModel(model, multi_avg_fn=None, use_buffers=True)
    ema.module.load_state_dict(randomise(model, 1))
    file = {'model': model.state_dict(), 'model_ema': ema.state_dict(), 'epoch': 1, 'optimizer': {}}
    x = torch.rand(1, 3, 32, 32)
    for weights, source in ((None, ema.module), ('ema', ema.module), ('raw', model)):
        converted = convert(file, 'cbam_resnet18', weights=weights, num_classes=3)
        with torch.inference_mode():
            assert torch.equal(with_weights('cbam_resnet18', converted, num_classes=3)(x), source.eval()(x))


def test_a_detectors_backbone_converts_by_its_prefix(randomise: Callable[[nn.Module, int], State]) -> None:
    own = randomise(timm.create_model('cbam_resnet18', num_classes=0, device='meta'), 0)
    detector = _prefixed(own, 'backbone.') | {'neck.conv.weight': torch.ones(1), 'rpn.bias': torch.ones(1)}
    converted = convert(detector, 'cbam_resnet18', prefix='backbone.', num_classes=0)
    assert all(torch.equal(v, own[k]) for k, v in converted.items()) and converted.keys() == own.keys()
    with pytest.raises(
        ValueError, match=r'2 missing keys: fc\.weight, fc\.bias\. If it has no head, pass num_classes=0'
    ):
        convert(detector, 'cbam_resnet18', prefix='backbone.')
