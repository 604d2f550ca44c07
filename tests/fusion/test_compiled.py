"""Fused, compiled models in other orders, with NaN and under other compilers: what the unfused model gives."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from timm_attn.fusion import fuse

from .support import build, check_equal, images, step

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('compiler')]


def pair(name: str, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    eager = build(name, **kwargs)
    return fuse(copy.deepcopy(eager)), eager


@pytest.mark.parametrize('order', ['spatial-channel', 'parallel'])
def test_orders_of_cbam(order: str) -> None:
    fused, eager = pair('cbam_resnet18', attn_args={'order': order})
    check_equal(step(fused, images()), step(eager, images()), 1e-10)


@pytest.mark.parametrize('name', ['se_resnet18', 'scse_resnet18'])
def test_nan_is_where_it_is_unfused(name: str) -> None:
    fused, eager = pair(name, channels=(64, 96, 128, 160))
    fused.eval()
    eager.eval()  # in training, statistics of the batch hand it to all images
    x = images()
    x[1, 0, 20, 20] = torch.nan
    ours, theirs = step(fused, x), step(eager, x)
    assert theirs['output'][1].isnan().any() and theirs['output'][0].isfinite().all()
    for key, want in theirs.items():
        assert torch.equal(ours[key].isnan(), want.isnan()), key


def test_after_a_step_others_export_and_compile_the_unfused_model() -> None:
    fused, eager = pair('se_resnet18')
    check_equal(step(fused, images()), step(eager, images()), 1e-10)
    fused.load_state_dict(eager.eval().state_dict())
    fused.eval()
    x = images(n=2)
    with torch.no_grad():
        want = eager(x)
        for other in (
            torch.export.export(fused, (x,)).module(),
            torch.compile(fused, fullgraph=True, backend='aot_eager'),
        ):
            torch.testing.assert_close(other(x), want, rtol=0, atol=1e-12)
    torch._dynamo.reset()
