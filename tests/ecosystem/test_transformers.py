"""transformers: its wrapper around timm reads our folders once this package is imported."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import timm_attn
from timm_attn.explain.gates import attention_maps
from timm_attn.hub.folder import save

transformers = pytest.importorskip('transformers', reason='transformers is missing (extra ecosystem)')


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, torch.nn.Module]:
    torch.manual_seed(0)
    model = timm.create_model('cbam_resnet18', num_classes=3, channels=(16, 16, 16, 16), zero_init_last=False).eval()
    folder = save(model, tmp_path / 'model', label_names=['cat', 'dog', 'emu'])
    return folder, model


def test_the_wrapper_gives_the_same_logits(saved: tuple[Path, torch.nn.Module]) -> None:
    folder, model = saved
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    assert type(wrapped).__name__ == 'TimmWrapperForImageClassification'
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(wrapped(pixel_values=x).logits, model(x))
    assert len(attention_maps(wrapped, x)) == 8


def test_the_pipeline_names_the_labels(saved: tuple[Path, torch.nn.Module]) -> None:
    folder, model = saved
    classify = transformers.pipeline('image-classification', model=str(folder))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    found = classify(image)
    assert {f['label'] for f in found} == {'cat', 'dog', 'emu'}
    transform: Any = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        best = model(transform(image)[None]).softmax(1).max().item()
    assert found[0]['score'] == pytest.approx(best, abs=1e-4)


def test_the_wrapper_reads_injected_models(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model('regnetx_002', num_classes=3).eval()
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(m.weight, 0.75, 1.25)
    timm_attn.inject(model, 'eca', at=r's\d')
    sites = timm_attn.attn_sites(model)
    sites['s2.attn'].gain = 3.0  # what the file says, not what injection would give
    folder = save(model, tmp_path / 'model', label_names=['cat', 'dog', 'emu'])
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(wrapped(pixel_values=x).logits, model(x))
    assert list(attention_maps(wrapped, x))
    assert [m.factor for m in timm_attn.attn_sites(wrapped).values()] == [m.factor for m in sites.values()]
    # And on: to another device or type, and into a folder again.
    again = save(wrapped.half().float().timm_model, tmp_path / 'again')
    assert timm_attn.load(again).state_dict().keys() == model.state_dict().keys()


def test_attention_goes_into_its_own_resnet() -> None:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type='basic', num_labels=3
    )
    model = transformers.ResNetForImageClassification(config).eval()
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(m.weight, 0.75, 1.25)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = model(x).logits
        timm_attn.inject(model, 'se', at=r'resnet\.encoder\.stages\.\d\.layers\.\d')
        sites = timm_attn.attn_sites(model)
        assert len(sites) == 4 and torch.equal(model(x).logits, want)
        for attn in sites.values():
            attn.gain *= 1.5
        assert not torch.allclose(model(x).logits, want)
