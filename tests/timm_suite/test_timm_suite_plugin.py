"""The plugin that lets timm's own tests run on our models: it must not pass by testing nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import timm_attn

# The form of timm's tests/test_models.py: names are listed at import, some tests name models of timm's own.
SUITE = """
import pytest, timm
from timm import list_models

@pytest.mark.parametrize('model_name', list_models())
def test_model(model_name):
    timm.create_model(model_name, device='meta')

@pytest.mark.parametrize('model_name', list_models(module=['vision_transformer', 'resnet']))
def test_model_of_modules(model_name):
    pass

@pytest.mark.parametrize('model_name', ['resnet18', 'simple_cnn'])
def test_named(model_name):
    pass

def test_nothing():
    assert False
"""


def run(folder: Path, plugin: str = 'timm_attn', *options: str, **env: str) -> 'subprocess.CompletedProcess[str]':
    (folder / 'test_models.py').write_text(SUITE, encoding='utf-8')
    paths = [str(Path(__file__).parent), str(folder), str(Path(timm_attn.__file__).parents[1])]
    return subprocess.run(
        [
            sys.executable,
            '-m',
            'pytest',
            '-p',
            'timm_suite_plugin',
            '-p',
            'no:cacheprovider',
            '-v',
            *options,
            'test_models.py',
        ],
        cwd=folder,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(paths), 'TIMM_PLUGIN': plugin, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_model_of_ours_and_no_other_is_tested(tmp_path: Path) -> None:
    done = run(tmp_path, TIMM_FILTER='simple_cnn*')
    assert done.returncode == 0, done.stdout + done.stderr
    names = [name for name in timm_attn_models() if name.startswith('simple_cnn')]
    assert f'{2 * len(names) + 1} passed, 2 deselected' in done.stdout
    for name in names:
        assert f'::test_model[{name}] PASSED' in done.stdout
        assert f'::test_model_of_modules[{name}] PASSED' in done.stdout
    assert '::test_named[simple_cnn] PASSED' in done.stdout


def timm_attn_models() -> list[str]:
    import timm

    return [name for module in ('attn_resnet', 'sk_resnet', 'simple_cnn') for name in timm.list_models(module=module)]


def test_filter_that_matches_nothing_fails(tmp_path: Path) -> None:
    done = run(tmp_path, TIMM_FILTER='cbamm_*')
    assert done.returncode == 4
    assert "no model matches ['cbamm_*']" in done.stdout + done.stderr


@pytest.mark.filterwarnings('ignore')
def test_taken_timm_name_fails(tmp_path: Path) -> None:
    (tmp_path / 'thief.py').write_text(
        'from timm.models import register_model\n'
        'default_cfgs = {}\n'
        '@register_model\n'
        'def resnet18(pretrained=False, **kwargs):\n'
        '    pass\n',
        encoding='utf-8',
    )
    done = run(tmp_path, 'thief')
    assert done.returncode == 4
    assert "timm names overwritten: ['resnet18']" in done.stdout + done.stderr


def test_model_without_a_test_fails(tmp_path: Path) -> None:
    (tmp_path / 'conftest.py').write_text(
        'import pytest\n'
        '@pytest.hookimpl(tryfirst=True)\n'
        'def pytest_collection_modifyitems(items):\n'
        "    items[:] = [item for item in items if 'simple_cnn_se' not in item.name]\n",
        encoding='utf-8',
    )
    done = run(tmp_path, TIMM_FILTER='simple_cnn*')
    assert done.returncode == 4
    assert "no test of timm covers ['simple_cnn_se']" in done.stdout + done.stderr
