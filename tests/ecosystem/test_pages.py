"""The pages on other libraries run from top to bottom, where these are installed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ('page', 'packages'),
    [
        ('segmentation', ['segmentation_models_pytorch']),
        ('detection', ['torchvision', 'ultralytics']),
        ('inject-smp', ['segmentation_models_pytorch']),
        ('inject-transformers', ['transformers']),
    ],
)
def test_the_page_runs(page: str, packages: list[str], tmp_path: Path) -> None:
    for package in packages:
        pytest.importorskip(package, reason=f'{package} is missing (extra ecosystem)')
    blocks = re.findall(
        r'^```py\n(.*?)^```', (ROOT / f'docs/{page}.md').read_text(encoding='utf-8'), re.DOTALL | re.MULTILINE
    )
    assert blocks
    script = tmp_path / 'page.py'
    script.write_text('\n\n'.join(blocks), encoding='utf-8')
    env = {
        **os.environ,
        'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]),
        'YOLO_CONFIG_DIR': str(tmp_path),
        'YOLO_OFFLINE': 'true',
        'OMP_NUM_THREADS': '1',
    }
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f'{done.stdout}\n{done.stderr}'
