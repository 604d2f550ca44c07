"""A checkpoint of others, given where our own is expected."""

from pathlib import Path

import pytest
import timm
import torch

import timm_attn  # noqa: F401


@pytest.mark.parametrize('name', ['cbam_resnet18', 'sk_resnet50'])
def test_a_foreign_checkpoint_path_names_convert(name: str, tmp_path: Path):
    torch.save({'layer9.weight': torch.ones(1)}, tmp_path / 'theirs.pth')
    with pytest.raises(RuntimeError, match=r'(?s)layer9\.weight.*timm-attn convert FILE'):
        timm.create_model(name, checkpoint_path=str(tmp_path / 'theirs.pth'))
