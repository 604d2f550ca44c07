"""`timm-attn convert`: files in, folders that timm loads out; files that authors host come from a loopback server."""

import functools
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from torch import Tensor

from timm_attn.cli import main
from timm_attn.weights import convert
from timm_attn.weights.official import DRIVE, OFFICIAL, get_official
from timm_attn.weights.sources.pytorchcv import KNOWN_SHA1

Fill = Callable[[str], dict[str, Tensor]]


def _official_file(path: Path, state_dict: dict[str, Tensor]) -> Path:
    prefixed = {f'module.{k}': v for k, v in state_dict.items()}
    torch.save({'epoch': 90, 'arch': 'resnet', 'state_dict': prefixed, 'best_prec1': 77.6}, path)
    return path


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / 'config.json').read_text())


def test_a_foreign_file_becomes_a_folder_that_timm_loads(
    filled: Fill, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = _official_file(tmp_path / 'cbam.pth', filled('cbam_resnet18'))
    before = file.read_bytes()
    out = tmp_path / 'out' / 'cbam'
    sha256 = hashlib.sha256(before).hexdigest()
    assert main(['convert', str(file), '--model', 'cbam_resnet18', '--out', str(out), '--sha256', sha256]) == 0
    assert capsys.readouterr().out.splitlines() == [str(out)]
    assert sorted(p.name for p in out.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    assert file.read_bytes() == before

    expected = convert(filled('cbam_resnet18'), 'cbam_resnet18')
    model = timm.create_model(f'local-dir:{out}', pretrained=True)
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())
    config = _config(out)
    assert config['timm_attn']['status'] == 'converted'
    provenance = config['timm_attn']['provenance']
    assert (provenance['source'], provenance['sha256'], provenance['file']) == ('jongchan', sha256, 'cbam.pth')
    assert config['timm_attn']['versions']['timm_attn']
    with safe_open(out / 'model.safetensors', 'pt') as weights:
        assert json.loads(weights.metadata()['timm_attn']) == provenance
    # What belongs to the default tag's weights does not stand on these.
    cfg = config['pretrained_cfg']
    assert (cfg['interpolation'], cfg['crop_pct']) == ('bilinear', 0.875)
    assert not {'license', 'origin_url', 'tag'} & {k for k, v in cfg.items() if v}


def test_head_stem_and_options_of_the_file_are_arguments(filled: Fill, tmp_path: Path) -> None:
    state_dict = filled('triplet_resnet18')
    state_dict = {k: v[..., 2:5, 2:5] if v.shape[-2:] == (7, 7) and 'Gate' in k else v for k, v in state_dict.items()}
    state_dict |= {
        'fc.weight': state_dict['fc.weight'][:7],
        'fc.bias': state_dict['fc.bias'][:7],
        'conv1.weight': state_dict['conv1.weight'][:, :1, 2:5, 2:5],
    }
    file = _official_file(tmp_path / 'x.pth', state_dict)
    out = tmp_path / 'out'
    assert (
        main(
            [
                'convert',
                str(file),
                '--model',
                'triplet_resnet18',
                '--out',
                str(out),
                '--num-classes',
                '7',
                '--in-chans',
                '1',
                '--cifar-stem',
                '--attn-args',
                '{"kernel_size": 3}',
                '--licence',
                'mit',
            ]
        )
        == 0
    )
    model = timm.create_model(f'local-dir:{out}', pretrained=True).eval()
    with torch.inference_mode():
        assert model(torch.rand(1, 1, 32, 32)).shape == (1, 7)
    assert model.get_submodule('layer1.0.se.cw.conv').kernel_size == (3, 3)
    assert _config(out)['pretrained_cfg']['license'] == 'mit'


def test_a_plain_resnet_is_written_as_a_warm_start(plain: Callable[[int], dict[str, Tensor]], tmp_path: Path) -> None:
    torch.save(plain(18), tmp_path / 'plain.pth')
    out = tmp_path / 'out'
    assert (
        main(
            [
                'convert',
                str(tmp_path / 'plain.pth'),
                '--model',
                'eca_resnet18',
                '--out',
                str(out),
                '--source',
                'torchvision',
            ]
        )
        == 0
    )
    assert _config(out)['timm_attn']['status'] == 'warm start'
    assert 'warm start' in (out / 'README.md').read_text()


def test_a_known_checksum_tells_which_of_two_nets_with_equal_keys_it_is(
    filled: Fill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / 'seresnet50b.pth'
    torch.save(filled('pytorchcv_seresnet50b'), file)
    sha1 = hashlib.sha1(file.read_bytes()).hexdigest()
    command = ['convert', str(file), '--model', 'se_resnet50', '--out', str(tmp_path / 'out')]
    assert main(command) == 1
    assert "source='pytorchcv/seresnet50b'" in capsys.readouterr().err
    # The released file with the stride in the 1x1 is refused, whatever the caller calls it.
    monkeypatch.setitem(KNOWN_SHA1, sha1, 'seresnet50')
    assert main([*command, '--source', 'pytorchcv/seresnet50b']) == 1
    assert "'seresnet50' has the stride" in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()
    monkeypatch.setitem(KNOWN_SHA1, sha1, 'seresnet50b')
    assert main([*command, '--sha1', sha1]) == 0
    assert _config(tmp_path / 'out')['timm_attn']['provenance']['source'] == 'pytorchcv/seresnet50b'


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['--sha1', '0' * 40], 'not 0000000000000000000000000000000000000000: it is another file'),
        (['--sha256', 'abc'], 'not abc: it is another file'),
        (['--model', 'bam_resnet18'], "a net with 'srm' (srm), and bam_resnet18 has 'bam'"),
        (['--num-classes', '10'], 'pass num_classes=1000'),
        (['--sha1', ''], '--sha1 is empty, perhaps a shell variable that is not set'),
        (['--sha256', ''], '--sha256 is empty'),
        (['--sha256', '  '], '--sha256 is empty'),
        (['--weights', 'ema'], "weights='ema' was asked for: leave it out"),
        (['--prefix', 'backbone.'], "No key begins with prefix (='backbone.')"),
    ],
)
def test_a_wrong_file_is_refused_and_nothing_is_written(
    words: list[str], message: str, filled: Fill, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = _official_file(tmp_path / 'x.pth', filled('srm_resnet18'))
    before = file.read_bytes()
    out = tmp_path / 'out'
    assert main(['convert', str(file), '--model', 'srm_resnet18', '--out', str(out), *words]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert 'Traceback' not in error
    assert not out.exists()
    assert file.read_bytes() == before


def test_the_choice_between_averaged_and_raw_weights_is_written_down(
    filled: Fill, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = filled('srm_resnet18')
    ema = raw | {'fc.bias': raw['fc.bias'] + 1}
    averaged = {'n_averaged': torch.tensor(7), **{f'module.{k}': v for k, v in ema.items()}}
    torch.save({'model': raw, 'model_ema': averaged, 'epoch': 3}, tmp_path / 'x.pth')
    command = ['convert', str(tmp_path / 'x.pth'), '--model', 'srm_resnet18', '--out']
    for words, expected, kind in (([], ema, 'ema'), (['--weights', 'raw'], raw, 'raw')):
        out = tmp_path / kind
        caplog.clear()
        assert main([*command, str(out), *words]) == 0
        assert ('the averaged ones are taken' in caplog.text) == (not words)
        with safe_open(out / 'model.safetensors', 'pt') as weights:
            assert torch.equal(weights.get_tensor('fc.bias'), expected['fc.bias'])
        provenance = _config(out)['timm_attn']['provenance']
        assert provenance['weights'] == kind
        assert provenance['conversion'].endswith(", weights='raw')" if words else ", source='srm')")


def test_a_lightning_file_converts_by_its_prefix(filled: Fill, tmp_path: Path) -> None:
    state_dict = {f'model.{k}': v for k, v in filled('srm_resnet18').items()}
    torch.save({'state_dict': state_dict | {'loss.weight': torch.ones(1000)}}, tmp_path / 'x.ckpt')
    command = ['convert', str(tmp_path / 'x.ckpt'), '--model', 'srm_resnet18', '--out', str(tmp_path / 'out')]
    assert main(command) == 1
    assert main([*command, '--prefix', 'model.']) == 0
    assert "prefix='model.'" in _config(tmp_path / 'out')['timm_attn']['provenance']['conversion']


def test_a_folder_that_holds_something_is_kept_without_overwrite(
    filled: Fill, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = _official_file(tmp_path / 'x.pth', filled('srm_resnet18'))
    out = tmp_path / 'out'
    out.mkdir()
    (out / 'notes.txt').write_text('mine')
    command = ['convert', str(file), '--model', 'srm_resnet18', '--out', str(out)]
    assert main(command) == 1
    assert 'is not empty; choose another folder or pass --overwrite' in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ['notes.txt']
    assert main([*command, '--overwrite']) == 0
    assert main([*command, '--overwrite']) == 0
    assert (out / 'notes.txt').read_text() == 'mine'
    assert main(['convert', str(file), '--model', 'srm_resnet18', '--out', str(file)]) == 1
    assert 'is a file; a folder is written here' in capsys.readouterr().err


def test_wrong_usage_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['convert', 'x.pth', '--out', str(tmp_path / 'out')]) == 1
    assert '--model is needed' in capsys.readouterr().err
    for text, message in (('{', 'is no JSON'), ('[3]', 'must be a JSON object')):
        with pytest.raises(SystemExit, match='2'):
            main(['convert', 'x.pth', '--model', 'a', '--out', 'b', '--attn-args', text])
        assert message in capsys.readouterr().err
    assert main(['convert', 'official/nothing', '--out', str(tmp_path / 'out')]) == 1
    assert "Unknown file 'official/nothing'. Expected official/ and one of: cbam_resnet50" in capsys.readouterr().err


def test_the_official_table_covers_what_authors_host() -> None:
    names = {o.name for o in OFFICIAL}
    assert {
        'cbam_resnet50',
        'bam_resnet50',
        'moskomule_se_resnet50',
        'insight_se_resnet101',
        'insight_sk_resnet50',
        'insight_sk_resnet101',
    } <= names
    assert {f'eca_resnet{d}' for d in (18, 34, 50, 101, 152)} <= names
    assert {f'triplet_resnet{d}_k{k}' for d in (18, 50) for k in (3, 7)} <= names
    assert len({o.url for o in OFFICIAL}) == len(names) == len(OFFICIAL)
    for official in OFFICIAL:
        assert timm.is_model(official.model)
        # Only the source without a licence has none.
        assert (official.licence is None) == (official.source == 'insight')
        assert official.home.startswith('https://github.com/')
    assert get_official('insight_sge_resnet50').top1 == 77.584


class _Drive(http.server.BaseHTTPRequestHandler):
    """Google Drive as gdown meets it: a page that asks for a confirmation, then the file."""

    def __init__(self, files: dict[str, bytes], *args: Any) -> None:
        self.files = files
        super().__init__(*args)

    def do_GET(self) -> None:
        parts = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(parts.query))
        data = self.files.get(query.get('id', parts.path))
        if data is None:
            self.send_error(404)
            return
        if 'id' in query and 'confirm' not in query:
            page = (
                '<html><form id="download-form" action="https://drive.usercontent.google.com/download">'
                f'<input type="hidden" name="id" value="{query["id"]}">'
                '<input type="hidden" name="confirm" value="t"></form></html>'
            ).encode()
            self._send(page, 'text/html', {})
            return
        self._send(data, 'application/octet-stream', {'Content-Disposition': 'attachment; filename="x.pth"'})

    def _send(self, data: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {'Content-Type': kind, 'Content-Length': str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def drive(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """What the authors' hosts have, by Drive id or path; gdown's requests to them end at the loopback server."""
    pytest.importorskip('gdown', reason="gdown is not installed: pip install 'timm_attn[weights]'")
    import requests

    files: dict[str, bytes] = {}
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(_Drive, files))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    real = requests.Session.request

    def rerouted(session: requests.Session, method: str, url: str, **kwargs: Any) -> requests.Response:
        parts = urllib.parse.urlsplit(url)
        assert parts.hostname in ('drive.google.com', 'drive.usercontent.google.com', 'github.com')
        local = parts._replace(scheme='http', netloc=f'127.0.0.1:{server.server_address[1]}')
        return real(session, method, urllib.parse.urlunsplit(local), **kwargs)

    monkeypatch.setattr(requests.Session, 'request', rerouted)
    yield files
    server.shutdown()
    server.server_close()
    thread.join()


def _bytes(tmp_path: Path, state_dict: dict[str, Tensor]) -> bytes:
    return _official_file(tmp_path / 'hosted.pth', state_dict).read_bytes()


def test_a_file_on_drive_is_fetched_and_converted(filled: Fill, tmp_path: Path, drive: dict[str, bytes]) -> None:
    official = get_official('official/eca_resnet18')
    assert official.url == f'{DRIVE}{official.place}'
    drive[official.place] = _bytes(tmp_path, filled('eca_resnet18_k3577'))
    out = tmp_path / 'out'
    assert main(['convert', 'official/eca_resnet18', '--out', str(out)]) == 0
    expected = convert(filled('eca_resnet18_k3577'), 'eca_resnet18')
    model = timm.create_model(f'local-dir:{out}', pretrained=True)
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())
    provenance = _config(out)['timm_attn']['provenance']
    assert provenance['source_url'] == official.url
    assert provenance['sha256'] == hashlib.sha256(drive[official.place]).hexdigest()
    assert (provenance['license'], provenance['stated_top1']) == ('mit', 70.92)


def test_a_file_with_options_and_one_at_another_address_are_fetched_too(
    filled: Fill, tmp_path: Path, drive: dict[str, bytes]
) -> None:
    state_dict = {
        k: v[..., 2:5, 2:5] if v.shape[-2:] == (7, 7) and 'Gate' in k else v
        for k, v in filled('triplet_resnet18').items()
    }
    drive[get_official('triplet_resnet18_k3').place] = _bytes(tmp_path, state_dict)
    assert main(['convert', 'official/triplet_resnet18_k3', '--out', str(tmp_path / 'k3')]) == 0
    assert _config(tmp_path / 'k3')['model_args']['attn_args'] == {'kernel_size': 3}

    url = get_official('moskomule_se_resnet50').url
    drive[urllib.parse.urlsplit(url).path] = _bytes(tmp_path, filled('se_moskomule_resnet50'))
    assert main(['convert', 'official/moskomule_se_resnet50', '--out', str(tmp_path / 'se')]) == 0
    model = timm.create_model(f'local-dir:{tmp_path / "se"}', pretrained=True)
    assert not model.state_dict()['layer1.0.se.fc1.bias'].any()


def test_files_without_a_licence_need_a_word_and_the_card_says_so(
    filled: Fill, tmp_path: Path, drive: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    drive[get_official('insight_sk_resnet50').place] = _bytes(tmp_path, filled('sk_insight_resnet50'))
    out = tmp_path / 'out'
    command = ['convert', 'official/insight_sk_resnet50', '--out', str(out)]
    assert main(command) == 1
    assert 'states no licence for its weights' in capsys.readouterr().err
    assert not out.exists()
    assert main([*command, '--accept-no-licence']) == 0
    assert 'states no licence: the card says so' in capsys.readouterr().err
    assert 'none stated by the authors' in (out / 'README.md').read_text()


def test_a_download_that_fails_says_how_to_go_on(
    tmp_path: Path, drive: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(['convert', 'official/cbam_resnet50', '--out', str(tmp_path / 'out')]) == 1
    error = capsys.readouterr().err
    assert 'Fetch it with a browser and give its path to timm-attn convert --model cbam_resnet50' in error
    assert not (tmp_path / 'out').exists()
    # Drive shows a page in the place of a file whose quota is used up, with the code for success.
    place = get_official('cbam_resnet50').place
    drive[place] = b'<html>quota exceeded</html>'
    assert main(['convert', 'official/cbam_resnet50', '--out', str(tmp_path / 'out')]) == 1
    assert 'damaged or holds more than weights' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()
