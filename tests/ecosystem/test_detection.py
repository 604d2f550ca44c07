"""torchvision: features of our models into a feature pyramid, and from there into a detector."""

import pytest
import timm
import torch
from torch import Tensor, nn

import timm_attn

ops = pytest.importorskip('torchvision.ops', reason='torchvision is missing')


class PyramidBackbone(nn.Module):
    """A timm backbone with a feature pyramid, as torchvision's detectors want it.

    Args:
        name: A model of timm or timm_attn.
        out_channels: Channels of every level.
    """

    def __init__(self, name: str, out_channels: int = 32) -> None:
        super().__init__()
        self.body = timm.create_model(name, features_only=True, out_indices=(2, 3, 4))
        self.fpn = ops.FeaturePyramidNetwork(self.body.feature_info.channels(), out_channels)  # pyright: ignore
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(i): f for i, f in enumerate(self.body(x))})


@pytest.mark.parametrize('name', ['cbam_resnet18', 'bam_resnet18'])
def test_features_go_through_a_pyramid(name: str) -> None:
    assert timm_attn.list_attn()
    backbone = PyramidBackbone(name).eval()
    levels = backbone(torch.randn(1, 3, 96, 128))
    assert [tuple(f.shape) for f in levels.values()] == [(1, 32, 12, 16), (1, 32, 6, 8), (1, 32, 3, 4)]


def test_a_detector_learns_a_step() -> None:
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    torch.manual_seed(0)
    anchors = AnchorGenerator(((16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 3)
    model = RetinaNet(
        PyramidBackbone('cbam_resnet18'), num_classes=3, anchor_generator=anchors, min_size=64, max_size=96
    )
    images = [torch.rand(3, 64, 96), torch.rand(3, 80, 64)]
    targets = [{'boxes': torch.tensor([[8.0, 8, 40, 40]]), 'labels': torch.tensor([1])}] * 2
    loss = torch.stack(list(model(images, targets).values())).sum()
    loss.backward()
    assert torch.isfinite(loss)
    # The stem's pooled features are not used by the pyramid, but all attention lies on the way to its levels.
    assert all(p.grad is not None for name, p in model.named_parameters() if '.se.' in name)
    found = model.eval()(images)
    assert len(found) == 2 and set(found[0]) == {'boxes', 'scores', 'labels'}
