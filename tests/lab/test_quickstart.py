import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from timm_attn.lab.quickstart import quickstart

pytest.importorskip('sklearn', reason='scikit-learn is not installed')
pytest.importorskip('matplotlib', reason='matplotlib is not installed')

FILES = {'model.safetensors', 'config.json', 'README.md', 'curves.png', 'comparison.png', 'attention.png', 'comparison'}


@pytest.mark.slow
def test_quickstart_in_small_writes_a_model_that_timm_reads(
    cli: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / 'quickstart'
    cli('quickstart', '--out', out, '--smoke', '--jobs', '1')
    said = capsys.readouterr()
    assert {p.name for p in out.iterdir()} == FILES
    labels = [line.split()[0] for line in said.out.splitlines()[:7]]
    assert labels == ['model', '-----', 'plain', 'SE', 'CBAM', 'BAM', 'GAM']
    assert f'timm-attn push {out}' in said.out and 'compare --preset digits' in said.out

    config = json.loads((out / 'config.json').read_text())
    records = [json.loads(p.read_text()) for p in (out / 'comparison/runs').glob('*.json')]
    assert len(records) == 5
    best = max(r['top1'] for r in records if r['model']['label'] != 'plain')
    assert config['timm_attn']['evaluation'][0]['metrics']['top1'] == round(best, 2)
    assert f'{best:.2f}' in (out / 'README.md').read_text()
    model = timm.create_model(f'local-dir:{out}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))  # type: ignore
    assert model(transform(Image.new('RGB', (30, 20)))[None]).shape == (1, 10)  # type: ignore
    for name in ('curves.png', 'comparison.png', 'attention.png'):
        with Image.open(out / name) as image:
            image.load()
    # Again: nothing is trained, and the same model is written.
    before = {p: p.read_bytes() for p in (out / 'model.safetensors', *(out / 'comparison/runs').glob('*.json'))}
    quickstart(out, smoke=True)
    assert {p: p.read_bytes() for p in before} == before
    state = timm.create_model(f'local-dir:{out}', pretrained=True).state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_quickstart_leaves_a_folder_of_something_else_alone(tmp_path: Path) -> None:
    (tmp_path / 'thesis.txt').write_text('mine')
    with pytest.raises(ValueError, match='is not empty and holds no earlier quickstart: choose another folder'):
        quickstart(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['thesis.txt']
