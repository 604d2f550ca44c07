"""torchvision: attention in its own classification, segmentation and detection models."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import timm_attn
from timm_attn.layers import attn_sites

models = pytest.importorskip('torchvision.models', reason='torchvision is missing')


def alive(model: nn.Module) -> nn.Module:
    """BatchNorms and layer scales that hide nothing."""
    torch.manual_seed(0)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.75, 1.25)
            if isinstance(scale := getattr(m, 'layer_scale', None), nn.Parameter):
                scale.fill_(1)
    return model.eval()


def image(size: int = 64) -> Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ('name', 'at', 'fmt', 'count'),
    [
        ('resnet18', r'layer\d\.\d', 'NCHW', 8),
        ('convnext_tiny', r'features\.[1357]', 'NCHW', 4),
        ('efficientnet_b0', r'features\.\d', 'NCHW', 9),
        ('densenet121', r'features\.transition\d', 'NCHW', 3),
        ('mobilenet_v3_small', r'features\.\d+', 'NCHW', 13),
        ('swin_t', r'features\.[1357]', 'NHWC', 4),
    ],
)
def test_classifiers_keep_their_output_and_feel_every_gate(name: str, at: str, fmt: str, count: int) -> None:
    model = alive(getattr(models, name)(num_classes=5))
    x, keys = image(), list(model.state_dict())
    with torch.no_grad():
        want = model(x)
        timm_attn.inject(model, 'cbam', at=at, fmt=fmt)
        assert len(attn_sites(model)) == count and torch.equal(model(x), want)
        for attn in attn_sites(model).values():
            gain, attn.gain = attn.gain, attn.gain * 1.5
            assert not torch.equal(model(x), want)
            attn.gain = gain
        assert list(timm_attn.eject(model).state_dict()) == keys and torch.equal(model(x), want)


def test_segmentation_keeps_its_output() -> None:
    model: Any = alive(models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=3))
    x = image()
    with torch.no_grad():
        want = model(x)['out']
        # The backbone is a container that gives features by name: its own output is no map, those of its layers are.
        with pytest.raises(ValueError, match="'backbone' returns a OrderedDict of 1"):
            timm_attn.inject(model, 'se', at='backbone')
        timm_attn.inject(model, 'se', at=r'backbone\.layer[34]')
        assert torch.equal(model(x)['out'], want) and len(attn_sites(model)) == 2
        for attn in attn_sites(model).values():
            attn.gain *= 1.5
        assert not torch.allclose(model(x)['out'], want)


def test_detector_trains_its_attention() -> None:
    detection = models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=96
    )
    alive(detection.backbone)
    x = image()
    with torch.no_grad():
        want = detection.backbone(x)
        timm_attn.inject(detection.backbone, 'eca', at=r'body\.layer[234]')
        timm_attn.inject(detection.backbone, 'se', at=r'fpn\.layer_blocks\.\d')
        got = detection.backbone(x)
    assert all(torch.equal(got[k], v) for k, v in want.items())
    targets = [{'boxes': torch.tensor([[8.0, 8, 40, 40]]), 'labels': torch.tensor([1])}]
    loss = torch.stack(list(detection.train()([torch.rand(3, 64, 96)], targets).values())).sum()
    loss.backward()
    sites = attn_sites(detection)
    assert len(sites) == 7
    for site, attn in sites.items():
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in attn.parameters()), site
