"""An attention from a package of its own, as docs/add-attention.md shows it, works everywhere by its name."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / 'docs/add-attention.md').read_text(encoding='utf-8')

USE = """
import copy, json, logging, sys
from pathlib import Path

import numpy as np
import timm, torch
from PIL import Image

import timm_attn
from timm_attn.explain import draw_explanation, explain_image, figure_image
from timm_attn.explain.model import load_model
from timm_attn.layers import attn_sites
from timm_attn.measure import count, kept_bytes
from timm_attn.weights.warm_start import warm_start

torch.manual_seed(0)
kw = dict(num_classes=3, zero_init_last=False)
x = torch.randn(2, 3, 64, 48)


def alive(model):
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            for t in (m.weight.data, m.running_var):
                t.uniform_(0.5, 1.5)
            for t in (m.bias.data, m.running_mean):
                t.normal_(std=0.1)
    return model.eval()


plain = alive(timm.create_model('resnet18', **kw))
with torch.no_grad():
    wanted = plain(x)
model = timm_attn.inject(copy.deepcopy(plain), 'rowgate')
assert 'rowgate' in timm_attn.list_attn()
assert 'rowgate' in sys.modules and 'rowgate' not in globals()
with torch.no_grad():
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)

# A constant of its own, folded into the layer before.
started = timm_attn.inject(timm.create_model('resnet18', **kw), 'rowgate', start='paper').eval()
started.load_state_dict(warm_start(plain.state_dict(), started))
with torch.no_grad():
    torch.testing.assert_close(started(x), wanted, rtol=1e-4, atol=1e-4)

for module in attn_sites(model).values():
    torch.nn.init.normal_(module.conv.weight, std=0.2)
seen = {}
site = 'layer2.1.se'
model.get_submodule(site).register_forward_hook(lambda m, args, out: seen.update(x=args[0].clone(), y=out.clone()))
maps = timm_attn.attention_maps(model, x)
row = maps[site]['row']
assert row.shape == (2, 8) and len(maps) == 8
gain = model.get_submodule(site).gain
torch.testing.assert_close(seen['y'], seen['x'] * row[:, None, :, None] * gain)
health = timm_attn.attention_health(model, [x, x])
assert health[site]['row'].gates == 8 and health[site]['row'].inputs == 4

image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 48, 3), dtype=np.uint8))
figure = draw_explanation(explain_image(model, image, cam=False))
assert [a.get_title() for a in figure.axes].count('layer2.1.se: row gate') == 1
assert min(figure_image(figure).size) > 400

# Fused: the same outputs and gradients, fewer bytes.
model.train()
fused = timm_attn.fuse(copy.deepcopy(model), compile=False)
for m in (model, fused):
    m(x).square().sum().backward()
for (name, p), q in zip(model.named_parameters(), fused.parameters(), strict=True):
    torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3, msg=name)
assert kept_bytes(fused, x) < kept_bytes(model, x)
assert count(model.eval(), (3, 64, 48))['params'] == sum(p.numel() for p in model.parameters())
"""


@pytest.fixture(scope='module')
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's package, installed into a folder of its own."""
    source = tmp_path_factory.mktemp('source')
    (module,) = re.findall(r'^```python\n(from collections.*?)^```', PAGE, flags=re.DOTALL | re.MULTILINE)
    (project,) = re.findall(r'^```toml\n(.*?)^```', PAGE, flags=re.DOTALL | re.MULTILINE)
    (source / 'rowgate.py').write_text(module, encoding='utf-8')
    (source / 'pyproject.toml').write_text(project, encoding='utf-8')
    target = source / 'installed'
    command = ['pip', 'install', '-q', '--no-deps', '--no-build-isolation', '--no-index', '--target', str(target), '.']
    done = subprocess.run([sys.executable, '-m', *command], cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return target


def run(package: Path, folder: Path, *command: str) -> 'subprocess.CompletedProcess[str]':
    path = os.pathsep.join([str(package), str(ROOT), os.environ.get('PYTHONPATH', '')])
    env = {**os.environ, 'PYTHONPATH': path, 'HF_HUB_OFFLINE': '1'}
    return subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def test_a_package_of_its_own_is_found_by_its_entry_point_and_works(package: Path, tmp_path: Path) -> None:
    done = run(package, tmp_path, '-c', USE)
    assert done.returncode == 0, done.stderr


def test_the_command_line_imports_a_module_of_the_working_folder(package: Path, tmp_path: Path) -> None:
    (tmp_path / 'mine.py').write_text((package / 'rowgate.py').read_text(encoding='utf-8').replace('rowgate', 'mine'))
    listed = (
        "from timm_attn.cli.main import main; main(['list', 'simple_cnn_eca', '--import', 'mine']); "
        'from timm_attn.cli.list import attentions_table; print(attentions_table())'
    )
    done = run(tmp_path / 'no', tmp_path, '-c', listed)
    assert '| `mine` | RowGate |' in done.stdout, done.stderr
    main = 'import sys; from timm_attn.cli.main import main; sys.exit(main(sys.argv[1:]))'
    done = run(tmp_path / 'no', tmp_path, '-c', main, 'list', '--import', 'absent')
    assert done.returncode == 1 and "No module named 'absent'" in done.stderr
