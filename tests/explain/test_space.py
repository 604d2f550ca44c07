import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_attn
from timm_attn.cli.space import add_parser
from timm_attn.explain.space import SDK_VERSION, write_space
from timm_attn.version import pip_source

needs_gradio = pytest.mark.skipif(
    any(importlib.util.find_spec(p) is None for p in ('gradio', 'gradio_client', 'matplotlib')),
    reason='gradio is missing (extra demo, an environment of its own)',
)


@pytest.fixture(scope='module')
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with labels that would do harm where they were taken for markup or code."""
    torch.manual_seed(0)
    model = timm.create_model('simple_cnn_cbam', num_classes=3)
    folder = tmp_path_factory.mktemp('saved') / 'model'
    timm.models.save_for_hf(
        model,
        str(folder),
        model_config={
            'label_names': ['<b>cat</b>', '$\\frac{1$', 'emu'],
            'pretrained_cfg': {'input_size': [3, 32, 32], 'crop_pct': 1.0, 'fixed_input_size': False},
        },
        safe_serialization=True,
    )
    return folder


def space_cli(*args: object) -> None:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    parsed = parser.parse_args(['space', *map(str, args)])
    parsed.run(parsed)


def front_matter(folder: Path) -> dict[str, Any]:
    import yaml

    text = (folder / 'README.md').read_text(encoding='utf-8')
    return yaml.safe_load(text.split('---\n')[1])


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file())


def test_a_space_of_a_folder_holds_the_model(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / 'space'
    space_cli(saved, '--out', out, '--title', 'My: "model" # {x}\nhere', '--license', 'mit')
    assert capsys.readouterr().out == f'{out}\n'
    assert files(out) == [
        'README.md',
        'app.py',
        'examples/tall.png',
        'examples/wide.png',
        'model/config.json',
        'model/model.safetensors',
        'requirements.txt',
        'space.json',
    ]
    matter = front_matter(out)
    # https://huggingface.co/docs/hub/spaces-config-reference
    assert matter['title'] == 'My: "model" # {x} here' and matter['license'] == 'mit'
    assert matter['sdk'] == 'gradio' and matter['sdk_version'] == SDK_VERSION and matter['app_file'] == 'app.py'
    assert {matter['colorFrom'], matter['colorTo']} <= {
        'red',
        'yellow',
        'green',
        'blue',
        'indigo',
        'purple',
        'pink',
        'gray',
    }
    assert len(matter['short_description']) <= 60 and len(matter['emoji']) == 1
    assert 'models' not in matter
    assert json.loads((out / 'space.json').read_text())['models'][0]['folder'] == 'model'
    assert str(saved) not in ''.join((out / f).read_text() for f in ('README.md', 'space.json', 'app.py'))
    assert (out / 'requirements.txt').read_text().splitlines()[:3] == [pip_source(), 'matplotlib', 'pillow<13']
    with Image.open(out / 'examples/wide.png') as wide, Image.open(out / 'examples/tall.png') as tall:
        assert wide.width > wide.height and tall.width < tall.height
    compile((out / 'app.py').read_text(), 'app.py', 'exec')


def test_a_space_of_a_repository_names_it_and_preloads_it(tmp_path: Path) -> None:
    for source, name in (('me/cbam.mine', 'plain'), ('hf-hub:me/cbam.mine@main', 'pinned')):
        out = write_space(source, tmp_path / name, package='timm_attn @ git+https://example.org/x')
        assert front_matter(out)['models'] == front_matter(out)['preload_from_hub'] == ['me/cbam.mine']
        assert json.loads((out / 'space.json').read_text())['models'][0]['model'] == source
        assert not (out / 'model').exists()
        assert (out / 'requirements.txt').read_text().startswith('timm_attn @ git+https://example.org/x\n')


def test_two_models_stand_in_one_space(saved: Path, tmp_path: Path) -> None:
    space_cli(saved, 'me/cbam.mine', '--out', tmp_path / 'mixed')
    matter = front_matter(tmp_path / 'mixed')
    assert matter['title'] == 'simple_cnn_cbam and cbam.mine: where they look' and matter['models'] == ['me/cbam.mine']
    space = json.loads((tmp_path / 'mixed/space.json').read_text())
    assert [(m['model'], m['folder']) for m in space['models']] == [
        ('simple_cnn_cbam', 'model'),
        ('me/cbam.mine', None),
    ]
    out = write_space([str(saved), str(saved)], tmp_path / 'twice')
    weights = (saved / 'model.safetensors').read_bytes()
    assert all((out / place / 'model.safetensors').read_bytes() == weights for place in ('model', 'beside'))
    assert '&' not in (out / 'README.md').read_text(), 'the Hub reads no YAML aliases'


@pytest.mark.parametrize('count', [0, 3])
def test_a_space_shows_one_model_or_two(count: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f'one model or two side by side; {count} were given'):
        write_space(['simple_cnn_se'] * count, tmp_path / 'space')
    assert not (tmp_path / 'space').exists()


def test_given_examples_replace_the_drawn_ones(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / 'a b.PNG')
    out = write_space('simple_cnn_se', tmp_path / 'space', examples=[tmp_path / 'a b.PNG'])
    assert [p.name for p in (out / 'examples').iterdir()] == ['00.png']


def test_bad_input_is_named_and_nothing_is_written(saved: Path, tmp_path: Path) -> None:
    (tmp_path / 'broken.png').write_bytes(b'no image')
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full/old').touch()
    cases: tuple[tuple[str, dict[str, Any], str], ...] = (
        ('simple_cnnn', {}, "'simple_cnnn' is no folder, no Hub repository"),
        ('hf-hub:me/a b', {}, 'expected owner/name'),
        (str(tmp_path / 'full'), {}, 'has no config.json and no model.safetensors'),
        ('simple_cnn_se', {'examples': [tmp_path / 'broken.png']}, "broken.png' is no readable image"),
    )
    for source, options, message in cases:
        with pytest.raises(ValueError, match=message):
            write_space(source, tmp_path / 'out', **options)
    with pytest.raises(ValueError, match='is not empty'):
        write_space(str(saved), tmp_path / 'full')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['broken.png', 'full']


@pytest.fixture(scope='module')
def address(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The running app of a Space."""
    out = tmp_path_factory.mktemp('space') / 'space'
    space_cli(saved, 'simple_cnn', '--untrained', '--out', out, '--title', 'A <i>small</i> model')
    root = str(Path(timm_attn.__file__).parents[1])
    environment = {
        **os.environ,
        'PYTHONPATH': os.pathsep.join([root, os.environ.get('PYTHONPATH', '')]),
        'PYTHONUNBUFFERED': '1',
        'GRADIO_SERVER_NAME': '127.0.0.1',
        'GRADIO_TEMP_DIR': str(out.parent / 'tmp'),
        'GRADIO_ANALYTICS_ENABLED': 'False',
        'HF_HUB_OFFLINE': '1',
        'HOME': str(out.parent),
    }
    with subprocess.Popen(
        [sys.executable, 'app.py'],
        cwd=out,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as app:
        assert app.stdout is not None
        said = ''
        for line in app.stdout:
            said += line
            if found := re.search(r'http://127\.0\.0\.1:\d+', line):
                break
        else:
            pytest.fail(f'the app ended: {said}')
        try:
            yield found.group()
        finally:
            app.send_signal(signal.SIGTERM)
            app.wait(20)


@needs_gradio
def test_the_app_answers_with_labels_and_a_picture(address: str, saved: Path, tmp_path: Path) -> None:
    gradio_client = pytest.importorskip('gradio_client')
    image = tmp_path / 'image.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 80, 3), dtype=np.uint8)).save(image)
    client = gradio_client.Client(address, verbose=False, download_files=str(tmp_path / 'got'))
    try:
        for whole in (False, True):
            labels, bars, picture, beside, _, other = client.predict(
                gradio_client.handle_file(str(image)), whole, api_name='/look'
            )
            assert {c['label'] for c in labels['confidences']} == {'<b>cat</b>', '$\\frac{1$', 'emu'}
            assert sum(c['confidence'] for c in labels['confidences']) == pytest.approx(1, abs=1e-3)
            assert len(beside['confidences']) == 5
            assert '&lt;b&gt;cat&lt;/b&gt;' in bars and '<b>' not in bars
            for shown in (picture, other):
                with Image.open(shown) as drawn:
                    assert min(drawn.size) > 300
        with pytest.raises(Exception, match='Upload an image first'):
            client.predict(None, False, api_name='/look')
    finally:
        client.close()


@needs_gradio
def test_a_browser_shows_labels_and_picture_and_asks_no_other_host(address: str, tmp_path: Path) -> None:
    sync_api = pytest.importorskip('playwright.sync_api', reason='playwright is missing')
    browser_path = shutil.which('chromium') or shutil.which('google-chrome')
    if not browser_path:
        pytest.skip('no chromium is installed')
    image = tmp_path / 'image.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 80, 3), dtype=np.uint8)).save(image)
    with sync_api.sync_playwright() as playwright:
        # Chromium's sandbox does not run as root, as containers do; the page is our own.
        browser = playwright.chromium.launch(executable_path=browser_path, args=['--no-sandbox'])
        page = browser.new_page()
        errors: list[str] = []
        hosts: set[str | None] = set()
        page.on('console', lambda m: errors.append(m.text) if m.type == 'error' else None)
        page.on('pageerror', lambda e: errors.append(str(e)))
        page.on('request', lambda r: hosts.add(urlsplit(r.url).hostname))
        page.goto(address)
        assert page.locator('h1').inner_text() == 'A <i>small</i> model'
        page.set_input_files('#img input[type=file]', str(image))
        page.wait_for_selector('#img img')
        page.click('#look')
        page.wait_for_selector('#attention img', timeout=60_000)
        page.wait_for_selector('#attention-beside img', timeout=60_000)
        shares = re.findall(r'(\S+)\s%', page.locator('#labels-beside').inner_text())
        assert 'Untrained' in page.locator('#about-beside').inner_text()
        assert page.locator('#img button[aria-label="Capture from camera"]').count() == 1
        labels = page.locator('#labels').inner_text()
        browser.close()
    # A thousand labels of random weights have about a thousandth each, which whole percents would call nothing.
    assert len(shares) == 5 and all(0.1 <= float(share) < 5 for share in shares)
    assert all(label in labels for label in ('<b>cat</b>', '$\\frac{1$', 'emu'))
    assert hosts - {None, '127.0.0.1', 'localhost'} == set()
    assert errors == []
