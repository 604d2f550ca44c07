"""pytorchcv's nets, built live from its package: the converted model computes the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from timm_attn.weights import convert

pytest.importorskip('pytorchcv', reason="pytorchcv is not installed: pip install 'timm_attn[test]'")

NETS = [
    ('seresnet18', 'se_resnet18'),
    ('seresnet50b', 'se_resnet50'),
    ('cbam_resnet18', 'cbam_resnet18'),
    ('cbam_resnet34', 'cbam_resnet34'),
    ('cbam_resnet50', 'cbam_resnet50'),
    ('cbam_resnet101', 'cbam_resnet101'),
    ('bam_resnet18', 'bam_resnet18'),
    ('bam_resnet50', 'bam_resnet50'),
    ('bam_resnet101', 'bam_resnet101'),
    ('sknet50', 'sk_resnext50_32x4d'),
    ('sknet101', 'sk_resnext101_32x4d'),
]


@pytest.mark.parametrize(('net', 'model_name'), NETS)
def test_a_live_net_and_its_conversion_give_the_same_logits(
    net: str, model_name: str, randomise: Any, with_weights: Callable[..., nn.Module]
) -> None:
    from pytorchcv.model_provider import get_model

    with torch.device('meta'):
        theirs: nn.Module = get_model(net)
    state_dict = randomise(theirs, len(net))
    theirs.load_state_dict(state_dict, assign=True)
    theirs.get_submodule('features').final_pool = nn.AdaptiveAvgPool2d(1)  # its own is 7 x 7, for 224 only
    theirs = theirs.double().eval()
    source = f'pytorchcv/{net}' if net == 'seresnet50b' else None
    ours = with_weights(model_name, convert(state_dict, model_name, source)).double()
    x = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.inference_mode():
        expected, logits = theirs(x), ours(x)
    assert expected.std() > 1e-3
    assert (logits - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_the_two_se_nets_with_equal_keys_are_told_apart_by_their_name_alone(randomise: Any) -> None:
    from pytorchcv.model_provider import get_model

    with torch.device('meta'):
        nets = {name: get_model(name) for name in ('seresnet50', 'seresnet50b')}
    state_dict = randomise(nets['seresnet50'], 0)
    assert state_dict.keys() == nets['seresnet50b'].state_dict().keys()
    for source in (None, 'pytorchcv', 'pytorchcv/seresnet50'):
        with pytest.raises(ValueError, match=r'first 1x1 convolution.*legacy_seresnet50'):
            convert(state_dict, 'se_resnet50', source)
    convert(state_dict, 'se_resnet50', 'pytorchcv/seresnet50b')
