"""An attention from a package of its own, as docs/add-attention.md shows it, works everywhere by its name."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_client import TOKENS, client_environment, serve

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

# In folders, and on the Hub: whole and as an adapter, with the card.
PUBLISH = """
import sys
import timm, torch
import timm_attn
from timm_attn.hub import pull, push_to_hub

torch.manual_seed(0)
small = dict(layers=(1, 1, 1, 1), channels=(16, 16, 16, 16), num_classes=3, zero_init_last=False)
base, model = (timm.create_model('resnet18', **small) for _ in range(2))
model.load_state_dict(base.state_dict())
timm_attn.inject(model.eval(), 'rowgate')
for site in timm_attn.attn_sites(model).values():
    torch.nn.init.normal_(site.conv.weight, std=0.2)
x = torch.randn(2, 3, 64, 48)
wanted = model(x)
push_to_hub(model, 'me/whole')
push_to_hub(model, 'me/adapter', adapter=True, base=base)
for folder in ('whole', 'adapter'):
    pull(f'me/{folder}', folder)
for again in (
    timm_attn.load_from_hub('me/whole'),
    timm.create_model('hf-hub:me/whole', pretrained=True),
    timm_attn.load_from_hub('me/adapter', base=base),
    timm_attn.load('whole'),
    timm_attn.load('adapter', base=base),
):
    assert torch.equal(again.eval()(x), wanted)
card = open('adapter/README.md', encoding='utf-8').read()
head = card.split('---')[1]
for tag in ('rowgate', 'spatial-attention', 'attention', 'adapter'):
    assert f'- {tag}\\n' in head, (tag, head)
assert 'RowGate (rowgate)' in card and "load_from_hub('me/adapter')" in card
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


def run(
    package: Path, folder: Path, *command: str, env: dict[str, str] | None = None
) -> 'subprocess.CompletedProcess[str]':
    path = os.pathsep.join([str(package), str(ROOT), os.environ.get('PYTHONPATH', '')])
    env = {**(env or {**os.environ, 'HF_HUB_OFFLINE': '1'}), 'PYTHONPATH': path}
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


# The first half of what `timm-attn list` prints.
LIST = 'from timm_attn.cli.list import attentions_table; print(attentions_table())'


def test_it_is_listed_without_being_asked_for(package: Path, tmp_path: Path) -> None:
    done = run(package, tmp_path, '-c', LIST)
    assert done.returncode == 0 and '| `rowgate` | RowGate |' in done.stdout, done.stderr
    assert 'rowgate' not in run(tmp_path / 'no', tmp_path, '-c', LIST).stdout
    # A package that fails is named, and takes nobody else's list away.
    broken = tmp_path / 'broken'
    (broken / 'bad-1.dist-info').mkdir(parents=True)
    (broken / 'bad-1.dist-info/METADATA').write_text('Metadata-Version: 2.1\nName: bad\nVersion: 1\n')
    (broken / 'bad-1.dist-info/entry_points.txt').write_text('[timm_attn.plugins]\nbad = not_there\n')
    done = run(broken, tmp_path, '-c', LIST)
    assert done.returncode == 0 and '| `cbam` | CBAM |' in done.stdout
    assert "The plugin 'bad' (not_there) of the group timm_attn.plugins cannot be imported" in done.stderr


def test_it_is_published_and_a_machine_without_it_hears_what_is_missing(package: Path, tmp_path: Path) -> None:
    with contextlib.contextmanager(serve)(xet=False) as hub:
        env = client_environment(hub, tmp_path / 'home', TOKENS['me'])
        done = run(package, tmp_path, '-c', PUBLISH, env=env)
        assert done.returncode == 0, done.stderr
        load = "import timm_attn; timm_attn.load_from_hub('me/whole')"
        done = run(tmp_path / 'no', tmp_path, '-c', load, env=env)
    assert "Unknown attention 'rowgate'" in done.stderr
    project = (package.parent / 'pyproject.toml').read_text(encoding='utf-8')
    (name,) = re.findall(r"""^name = ['"](.*)['"]""", project, flags=re.MULTILINE)
    assert f"It comes with the package '{name}': install it" in done.stderr
    for folder in ('whole', 'adapter'):
        done = run(tmp_path / 'no', tmp_path, '-c', f'import timm_attn; timm_attn.load({folder!r})')
        assert f"It comes with the package '{name}'" in done.stderr


def test_one_that_ignores_its_gain_is_refused(package: Path, tmp_path: Path) -> None:
    source = (package / 'rowgate.py').read_text(encoding='utf-8')
    careless = re.sub(r' \* self\.gain\b', '', source)
    assert careless != source
    (tmp_path / 'mine.py').write_text(careless.replace('rowgate', 'mine'), encoding='utf-8')
    inject = "import timm, timm_attn, mine; timm_attn.inject(timm.create_model('resnet18'), 'mine')"
    done = run(tmp_path / 'no', tmp_path, '-c', inject)
    assert "'mine' (mine.RowGate) cannot start as the identity: it ignores `gain`" in done.stderr
