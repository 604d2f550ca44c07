"""README and docs say what is so: tables are made again, every Python block runs."""

import importlib.util
import os
import re
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path
from types import ModuleType

import pytest
import safetensors.torch
import timm
from hub_server import HubServer

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f'_{path.stem}_for_readme', path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def python_blocks(page: Path) -> list[str]:
    return re.findall(r'^```python\n(.*?)^```', page.read_text(encoding='utf-8'), flags=re.DOTALL | re.MULTILINE)


def test_tables_of_the_pages_are_what_their_sources_say():
    generator = load(ROOT / 'benchmarks/readme.py')
    for path, tables in generator.PAGES.items():
        page = path.read_text(encoding='utf-8')
        assert generator.render(page, tables) == page, f'{path.name}: run python benchmarks/readme.py'


def test_readme_installs_by_extras_that_exist():
    extras = metadata('timm_attn').get_all('Provides-Extra') or []
    named = set(re.findall(r"pip install '\.\[(\w+)\]'", (ROOT / 'README.md').read_text(encoding='utf-8')))
    assert named == {'lab', 'test'} and named <= set(extras)


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_links_lead_to_files_and_headings_that_exist(page: Path):
    for target in re.findall(r'\]\(([^)\s]+)\)', page.read_text(encoding='utf-8')):
        if target.startswith(('http://', 'https://')):
            continue
        name, _, anchor = target.partition('#')
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f'{page.name} links to {target}'
        if anchor:
            headings = re.findall(r'^#+ (.*)$', file.read_text(encoding='utf-8'), flags=re.MULTILINE)
            anchors = {re.sub(r'[^\w -]', '', h).strip().lower().replace(' ', '-') for h in headings}
            assert anchor in anchors, f'{page.name} links to {target}'


@pytest.mark.slow
@pytest.mark.parametrize('page', [p for p in PAGES if python_blocks(p)], ids=lambda p: p.name)
def test_every_python_block_runs(page: Path, tmp_path: Path):
    """In one fresh process a page, against a loopback Hub that holds a plain ResNet-18 under timm's name."""
    weights = tmp_path / 'resnet18.safetensors'
    safetensors.torch.save_file(timm.create_model('resnet18').state_dict(), weights)
    script = tmp_path / 'page.py'
    script.write_text('\n\n'.join(python_blocks(page)), encoding='utf-8')
    with HubServer() as hub:
        hub.add_user('me', 'hf_readme')
        for tag in ('resnet18.a1_in1k', 'resnet18.tv_in1k'):
            hub.create_repo(f'timm/{tag}')
            hub.commit(f'timm/{tag}', {'model.safetensors': weights.read_bytes()})
        env = {
            **os.environ,
            'HF_ENDPOINT': hub.endpoint,
            'HF_HOME': str(tmp_path / 'hf'),
            'HF_TOKEN': 'hf_readme',
            'HF_HUB_DISABLE_XET': '1',
            'HF_HUB_DISABLE_TELEMETRY': '1',
            'HF_HUB_DISABLE_PROGRESS_BARS': '1',
            'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]),
        }
        done = subprocess.run(
            [sys.executable, str(script)],
            cwd=tmp_path,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=400,
        )
    assert done.returncode == 0, f'{done.stdout}\n{done.stderr}'
