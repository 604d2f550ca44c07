"""ultralytics: attention in YOLO, built from its own YAML without any download."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import timm_attn
from timm_attn.layers import attn_sites

pytest.importorskip('ultralytics', reason='ultralytics is missing (extra ecosystem)')


def features(model: Any, x: Tensor) -> list[Tensor]:
    """What the head gets, and what the model returns: a fresh head's own output hardly depends on its input."""
    seen: list[Tensor] = []
    handle = model.model[-1].register_forward_pre_hook(lambda m, args: seen.extend(t.clone() for t in args[0]))
    out = model(x)
    handle.remove()
    return [*seen, out[0] if isinstance(out, list | tuple) else out]


@pytest.mark.parametrize('name', ['yolov8n.yaml', 'yolo11n.yaml'])
@pytest.mark.parametrize('first_fused', [False, True])
def test_yolo_keeps_its_output_also_when_fused(name: str, first_fused: bool) -> None:
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(0)
    model: Any = DetectionModel(name, nc=3, verbose=False).eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.75, 1.25)
    if first_fused:
        model.fuse(verbose=False)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = features(model, x)
        timm_attn.inject(model, 'cbam', at=[r'model\.4', r'model\.6', r'model\.9'])
        assert all(torch.equal(a, b) for a, b in zip(features(model, x), want, strict=True))
        assert list(attn_sites(model)) == ['model.4.attn', 'model.6.attn', 'model.9.attn']
        for attn in attn_sites(model).values():
            attn.gain *= 1.5
        loud = features(model, x)
        assert not any(torch.equal(a, b) for a, b in zip(loud[:-1], want[:-1], strict=True))
        model.fuse(verbose=False)
        for a, b in zip(features(model, x), loud, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


PAGE = Path(__file__).resolve().parents[2] / 'docs/inject-ultralytics.md'


def test_its_trainer_keeps_the_attention_as_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's blocks, word by word, with pictures of two classes: the attention learns, and is in what is saved."""
    random = np.random.default_rng(0)
    for split in ('train', 'val'):
        for kind in ('images', 'labels'):
            (tmp_path / kind / split).mkdir(parents=True)
        for i in range(4):
            pixels = random.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f'images/{split}/{i}.png')
            (tmp_path / f'labels/{split}/{i}.txt').write_text(f'{i % 2} 0.5 0.5 0.4 0.4\n')
    (tmp_path / 'data.yaml').write_text(f'path: {tmp_path}\ntrain: images/train\nval: images/val\nnames: [a, b]\n')
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r'^```py\n(.*?)^```', PAGE.read_text(encoding='utf-8'), flags=re.DOTALL | re.MULTILINE):
        exec(compile(block, str(PAGE), 'exec'), names)
    trained = names['trained']
    sites: dict[str, Any] = dict(attn_sites(trained.model))
    assert list(sites) == ['model.4.attn', 'model.6.attn', 'model.9.attn']
    # Neutral at the start: its last layers were zero, and have moved.
    assert all(attn.fc2.weight.any() for attn in sites.values())
    assert [attn.gain for attn in sites.values()] == [4, 4, 4]
    # Ultralytics' own reader gives it back, after `import timm_attn`.
    again = names['ultralytics'].YOLO(str(trained.trainer.last))
    assert list(attn_sites(again.model)) == list(sites)
    assert again.model.state_dict().keys() == trained.trainer.model.state_dict().keys()
