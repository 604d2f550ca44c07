"""The patches of docs/upstream apply to the timm that they name, and mend what they say."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm

PATCHES = sorted((Path(__file__).parents[1] / 'docs/upstream').glob('*.patch'))
VERSION = '1.0.31'

pytestmark = [
    pytest.mark.skipif(timm.__version__ != VERSION, reason=f'the patches are for timm {VERSION}'),
    pytest.mark.skipif(shutil.which('git') is None, reason='git is missing'),
]

CHECK = """
import sys, warnings
import timm, torch
from timm.layers import GatherExcite

if sys.argv[1] == 'before':
    try:
        GatherExcite(64)
    except TypeError:
        assert not timm.is_model('plugin_net')
        sys.exit()
    sys.exit('GatherExcite(64) works already')

x = torch.randn(2, 64, 8, 8)
ge = GatherExcite(64)
torch.testing.assert_close(ge(x), x * ge.mlp(x.mean((2, 3), keepdim=True)).sigmoid())
for options in (dict(feat_size=8, extra_params=True), dict(extent=2, extra_params=True), dict(extent=4)):
    GatherExcite(64, **options)(x).sum().backward()
assert {p.device.type for p in GatherExcite(64, device='meta').parameters()} == {'meta'}
model = timm.create_model('resnet18', block_args=dict(attn_layer='ge'), num_classes=3)
assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)

assert 'plugin' not in sys.modules, 'a name that timm has imports nothing'
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    assert timm.is_model('plugin_net') and not timm.is_model('no_such_net')
assert ['broken_plugin' in str(w.message) for w in caught] == [True], [str(w.message) for w in caught]
assert timm.create_model('plugin_net', num_classes=3).num_classes == 3
assert timm.list_models('plugin_*') == ['plugin_net']
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the installed timm, and beside it a plugin that registers a model, and one that cannot be imported."""
    shutil.copytree(Path(timm.__file__).parent, tmp_path / 'timm', ignore=shutil.ignore_patterns('__pycache__'))
    (tmp_path / 'plugin.py').write_text(
        'from timm.models import register_model, create_model\n\n\n'
        '@register_model\ndef plugin_net(pretrained=False, **kwargs):\n'
        '    kwargs = {k: v for k, v in kwargs.items() if not k.startswith("pretrained") and k != "cache_dir"}\n'
        '    return create_model("resnet18", **kwargs)\n'
    )
    for name, module in (('plugin', 'plugin'), ('broken', 'broken_plugin')):
        info = tmp_path / f'{name}-1.0.dist-info'
        info.mkdir()
        (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n')
        (info / 'entry_points.txt').write_text(f'[timm.models]\n{name} = {module}\n')
    return tmp_path


def check(source: Path, when: str) -> None:
    env = {**os.environ, 'PYTHONPATH': str(source), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', CHECK, when], cwd=source, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def git_apply(source: Path, patch: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ['git', 'apply', *options, str(patch)], cwd=source, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def test_the_patches_apply_and_mend_what_they_say(source: Path) -> None:
    assert [p.name for p in PATCHES] == ['ge-keyword-arguments.patch', 'model-entry-points.patch']
    check(source, 'before')
    for patch in PATCHES:
        for options in (('--check',), ()):
            done = git_apply(source, patch, *options)
            assert done.returncode == 0, f'{patch.name}: {done.stderr}'
    check(source, 'after')
