"""README and docs say what is so: tables are made again, every Python block runs."""

import importlib
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
import yaml
from hub_server import HubServer

from timm_attn.optional import require
from timm_attn.version import PROJECT, pip_source

ROOT = Path(__file__).resolve().parents[1]
# What a page says whose blocks need those before them.
IN_ORDER = 'The blocks of this page follow each other'
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
    assert (ROOT / 'timm_attn/cli/costs.json').read_text(encoding='utf-8') == generator.costs()


def test_readme_installs_by_extras_that_exist():
    extras = metadata('timm_attn').get_all('Provides-Extra') or []
    named = set(re.findall(r"pip install '\.\[(\w+)\]'", (ROOT / 'README.md').read_text(encoding='utf-8')))
    assert named == {'lab', 'test'} and named <= set(extras)


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_links_lead_to_files_and_headings_that_exist(page: Path):
    for target in re.findall(r'\]\(([^)\s]+)\)', page.read_text(encoding='utf-8')):
        name, _, anchor = target.partition('#')
        if name.startswith(f'{PROJECT}/'):
            kind = 'raw' if name.endswith('.png') else 'blob'  # a picture's page is no picture
            assert name.startswith(f'{PROJECT}/{kind}/main/'), f'{page.name} links to {target}'
            file = ROOT / name.removeprefix(f'{PROJECT}/{kind}/main/')
        elif name.startswith(('http://', 'https://')):
            continue
        else:
            # PyPI shows the README, and would look for a relative link on its own server.
            assert page.name != 'README.md' or page.parent.name == 'docs', f'README.md links to {target}'
            file = (page.parent / name).resolve() if name else page
        assert file.exists(), f'{page.name} links to {target}'
        if anchor:
            headings = re.findall(r'^#+ (.*)$', file.read_text(encoding='utf-8'), flags=re.MULTILINE)
            anchors = {re.sub(r'[^\w -]', '', h).strip().lower().replace(' ', '-') for h in headings}
            assert anchor in anchors, f'{page.name} links to {target}'


def test_one_place_says_where_the_project_lives():
    site = yaml.safe_load((ROOT / 'mkdocs.yml').read_text(encoding='utf-8'))
    cite = yaml.safe_load((ROOT / 'CITATION.cff').read_text(encoding='utf-8'))
    urls = dict(
        re.findall(r'^(\w+) = "(https://\S+)"$', (ROOT / 'pyproject.toml').read_text(encoding='utf-8'), re.MULTILINE)
    )
    assert site['repo_url'] == cite['repository-code'] == urls['Repository'] == PROJECT
    assert site['site_url'] == urls['Homepage'] and urls['Changelog'] == f'{PROJECT}/blob/main/CHANGELOG.md'
    for page in [*PAGES, *(ROOT / 'docs').glob('*.ipynb'), *(ROOT / 'model_cards').glob('*.md')]:
        for url in re.findall(r'git(?: clone |\+)(https://\S+?/timm_attn)\b', page.read_text(encoding='utf-8')):
            assert url == PROJECT, f'{page.name} installs from {url}'
        by_name = re.findall(r"pip install '?timm_attn(?!\[\w+\] @ git)", page.read_text(encoding='utf-8'))
        assert not by_name, f'{page.name} installs from an index, which does not have the package: name the repository'
    assert f'git+{PROJECT}`' in (ROOT / 'README.md').read_text(encoding='utf-8')


def test_the_site_shows_every_page_once():
    site = yaml.safe_load((ROOT / 'mkdocs.yml').read_text(encoding='utf-8'))
    shown = [page for section in site['nav'] for pages in section.values() for page in pages]
    pages = {p.relative_to(ROOT / 'docs').as_posix() for p in (ROOT / 'docs').rglob('*.md')}
    assert sorted(shown) == sorted(pages | {'CONTRIBUTING.md', 'CHANGELOG.md'})


@pytest.mark.parametrize(
    ('origin', 'expected'),
    [
        (None, 'timm_attn'),
        ('{"dir_info": {"editable": true}, "url": "file:///here"}', f'git+{PROJECT}'),
        ('{"vcs_info": {"vcs": "git", "commit_id": "0"}, "url": "https://example.org"}', f'git+{PROJECT}'),
    ],
    ids=['index', 'checkout', 'git'],
)
def test_a_release_from_an_index_is_named_and_anything_else_is_the_repository(
    origin: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    info = tmp_path / 'timm_attn-9.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: timm_attn\nVersion: 9\n', encoding='utf-8')
    if origin:
        (info / 'direct_url.json').write_text(origin, encoding='utf-8')
    monkeypatch.setattr(sys, 'path', [str(tmp_path), *sys.path])
    assert pip_source() == expected
    # What is missing is asked for by a command that installs this package, not another that has taken its name.
    command = "'timm_attn[lab]'." if expected == 'timm_attn' else "'.[lab]' in a checkout of timm_attn."
    with pytest.raises(
        ImportError, match=re.escape(f'pip install nothing, or all of the extra by pip install {command}')
    ):
        require('no_such_module', 'lab', 'nothing')


def test_a_package_that_is_not_installed_comes_from_the_repository(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, 'path', [])
    assert pip_source() == f'git+{PROJECT}'


API = sorted((ROOT / 'docs').glob('api*.md'))


def test_the_reference_has_every_public_name_once():
    """A public name is one that a room's `__init__` re-exports as itself."""
    named = [
        name for page in API for name in re.findall(r'^::: (\S+)$', page.read_text(encoding='utf-8'), re.MULTILINE)
    ]
    assert len(named) == len(set(named))
    for name in named:
        module, _, attribute = name.rpartition('.')
        assert hasattr(importlib.import_module(module), attribute), name
    shown = {name.rpartition('.')[2] for name in named}
    for room in ('', '.layers', '.models', '.weights', '.fusion', '.hub', '.explain', '.lab'):
        source = Path(str(importlib.import_module(f'timm_attn{room}').__file__)).read_text(encoding='utf-8')
        missing = set(re.findall(r'^from \S+ import (\w+) as \1$', source, re.MULTILINE)) - shown
        assert missing <= {'models', 'stats'}, f'docs/api*.md lacks {sorted(missing)} of timm_attn{room}'


@pytest.mark.slow
@pytest.mark.parametrize('page', [p for p in PAGES if python_blocks(p)], ids=lambda p: p.name)
def test_every_python_block_runs(page: Path, tmp_path: Path):
    """In one fresh process a page, against a loopback Hub that holds a plain ResNet-18 under timm's name."""
    weights = tmp_path / 'resnet18.safetensors'
    safetensors.torch.save_file(timm.create_model('resnet18').state_dict(), weights)
    script = tmp_path / 'page.py'
    # Each block has names of its own, since a reader copies one; what a page writes or registers, later blocks find.
    blocks = python_blocks(page)
    if IN_ORDER in page.read_text(encoding='utf-8'):
        blocks = ['\n\n'.join(blocks)]
    files = [tmp_path / f'block{i}.py' for i, _ in enumerate(blocks)]
    for file, text in zip(files, blocks, strict=True):
        file.write_text(text, encoding='utf-8')
    runs = '\n'.join(f"runpy.run_path({str(file)!r}, run_name='__main__')" for file in files)
    script.write_text(f'import runpy\n\n{runs}\n', encoding='utf-8')
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
