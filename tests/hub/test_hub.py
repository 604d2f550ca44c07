"""Push, load, save and the commands, for every attention."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from timm.data import resolve_model_data_config
from torch import nn

import timm_attn
from timm_attn.cli import main
from timm_attn.explain import load_model
from timm_attn.explain.pictures import label_names
from timm_attn.hub import client
from timm_attn.hub.client import HubError, HubFileError
from timm_attn.hub.folder import portable_state_dict, read_folder, save
from timm_attn.hub.load import load_from_hub, open_model, pull
from timm_attn.hub.push import push_to_hub
from timm_attn.hub.records import Evaluation, Provenance, Training

SMALL: dict[str, Any] = {'layers': (1, 1, 1, 1), 'channels': (16, 32, 64, 128)}
DATA: dict[str, Any] = {'input_size': (3, 32, 32), 'mean': (0.5, 0.5, 0.5), 'std': (0.25, 0.25, 0.25), 'crop_pct': 1.0}
# The smallest registered model of each attention.
NAMES = {
    name: next(m for depth in (18, 34, 50) if timm.is_model(m := f'{name}_resnet{depth}'))
    for name in timm_attn.list_attn()
}


def create(name: str, **kwargs: Any) -> nn.Module:
    """A model whose branches are not zero: timm starts the last BatchNorm of a branch at 0, and 0 hides any weight."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1)
    return model


def build(attn: str, **kwargs: Any) -> nn.Module:
    small = dict(SMALL)
    try:
        timm_attn.create_attn(attn, 16)
    except ValueError:  # groups that divide no 16 channels, or a bottleneck that leaves none of them
        small.pop('channels')
    return create(NAMES[attn], num_classes=6, **small, **kwargs)


def blocks(card: str) -> list[str]:
    return [part.split('```')[0] for part in card.split('```python\n')[1:]]


@pytest.mark.parametrize('attn', sorted(NAMES))
def test_push_and_load_give_equal_bits_and_the_card_runs(
    attn: str, hub_client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build(attn)
    # A trained BatchNorm: the numbers that are no parameters have to arrive too.
    model.train()(torch.randn(4, 3, 32, 32))
    model.eval()
    result = push_to_hub(model, 'me/mine', data_config=DATA, status='trained')
    x = torch.randn(2, 3, 32, 32)
    for again in (
        load_from_hub('me/mine'),
        timm.create_model('hf-hub:me/mine', pretrained=True),
        timm.create_model(f'hf-hub:me/mine@{result.commit}', pretrained=True),
    ):
        assert torch.equal(again.eval()(x), model(x))
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (40, 50), (200, 30, 90)).save('photo.jpg')
    found = blocks(hub_client.hub.files('me/mine')['README.md'].decode())
    assert len(found) == 6
    for block in found:
        assert block.startswith('import timm_attn')
        exec(compile(block, f'{attn}.md', 'exec'), {})
    out = capsys.readouterr().out
    assert f'me/mine@{result.commit}' in out
    # The shapes that the card states as comments are those that come out.
    for line in next(b for b in found if 'features_only' in b).splitlines():
        if line.startswith('# ('):
            assert line[2:] in out


def test_load_with_another_head_other_channels_and_features(hub_client: Any) -> None:
    model: Any = build('cbam')
    push_to_hub(model, 'me/x', data_config=DATA)
    x = torch.randn(2, 3, 32, 32)
    other: Any = load_from_hub('me/x', num_classes=9).eval()
    assert other(x).shape == (2, 9)
    assert torch.equal(other.forward_features(x), model.forward_features(x))
    gray: Any = load_from_hub('me/x', in_chans=1).eval()
    torch.testing.assert_close(gray.conv1.weight, model.conv1.weight.sum(1, keepdim=True))
    features: Any = load_from_hub('me/x', features_only=True, out_indices=(1, 4)).eval()
    assert [tuple(f.shape) for f in features(x)] == [(2, 16, 8, 8), (2, 128, 1, 1)]
    assert 'state_dict' not in other.pretrained_cfg


def test_load_of_a_plain_timm_resnet(hub_client: Any) -> None:
    model = create('resnet18', num_classes=3, **SMALL)
    push_to_hub(model, 'me/x')
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(load_from_hub('me/x').eval()(x), model(x))


def test_labels_are_kept_on_a_second_push_and_reach_the_model(hub_client: Any) -> None:
    names = ['ant', 'bee', 'cat', 'dog', 'eel', 'fox']
    push_to_hub(build('se'), 'me/x', label_names=names)
    torch.manual_seed(1)
    push_to_hub(build('se').train(), 'me/x', license='mit')
    config = json.loads(hub_client.hub.files('me/x')['config.json'])
    assert config['label_names'] == names and 'num_classes' not in config['model_args']
    loaded: Any = load_from_hub('me/x')
    assert loaded.pretrained_cfg['label_names'] == names


def test_folder_with_pictures_and_a_new_record(hub_client: Any, tmp_path: Path) -> None:
    folder = save(build('se'), tmp_path / 'f')
    Image.new('RGB', (4, 4)).save(folder / 'curves.png')
    (folder / 'checkpoint.pth').write_bytes(b'\x80')
    push_to_hub(folder, 'me/x', eval_results={'dataset': 'digits', 'top1': 91.5})
    files = hub_client.hub.files('me/x')
    assert set(files) == {'.gitattributes', 'README.md', 'config.json', 'model.safetensors', 'curves.png'}
    assert 'value: 91.5' in files['README.md'].decode()
    assert json.loads(files['config.json'])['timm_attn']['evaluation'][0]['metrics'] == {'top1': 91.5}
    with pytest.raises(ValueError, match=r'are for a model; a folder has its own'):
        push_to_hub(folder, 'me/x', status='trained')


def test_pull_writes_a_folder_that_timm_reads(hub_client: Any, tmp_path: Path) -> None:
    commit = push_to_hub(build('eca'), 'me/x').commit
    assert pull('me/x', tmp_path / 'out') == commit
    again = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(x), build('eca')(x))
    with pytest.raises(ValueError, match=r'already holds .*overwrite'):
        pull('me/x', tmp_path / 'out')
    pull('me/x', tmp_path / 'out', overwrite=True)
    # A repository without a card: the one of the model that was here goes, a human's words stay.
    save(build('se'), tmp_path / 'other')
    card = tmp_path / 'other' / 'README.md'
    card.write_text(card.read_text() + '\nKeep me.\n')
    hub_client.hub.create_repo('me/bare')
    files = {n: (tmp_path / 'out' / n).read_bytes() for n in ('config.json', 'model.safetensors')}
    hub_client.hub.commit('me/bare', files)
    pull('me/bare', tmp_path / 'other', overwrite=True)
    assert 'Keep me.' in card.read_text() and '(eca)' in card.read_text() and '(se)' not in card.read_text()


def test_commands(hub_client: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(build('se'), tmp_path / 'f')
    (tmp_path / 'eval.json').write_text('{"dataset": "digits", "top1": 90}')
    assert main(['card', str(folder), '--eval', str(tmp_path / 'eval.json')]) == 0
    assert 'Top-1 | 90' in (folder / 'README.md').read_text()
    assert main(['card', str(folder), '--stdout']) == 0
    assert (folder / 'README.md').read_text() in capsys.readouterr().out
    assert main(['push', str(folder), 'me/x']) == 0
    pushed = capsys.readouterr()
    assert pushed.out.strip() == hub_client.hub.head('me/x') and 'Pushed config.json' in pushed.err
    assert main(['push', str(folder), 'me/x']) == 0
    assert 'no commit made' in capsys.readouterr().err
    assert main(['pull', 'me/x', '--out', str(tmp_path / 'g')]) == 0
    assert capsys.readouterr().out.strip() == hub_client.hub.head('me/x')
    assert main(['pull', 'me/nothing', '--out', str(tmp_path / 'h')]) == 1
    failed = capsys.readouterr()
    assert failed.out == ''
    assert failed.err.startswith('timm-attn pull: Could not read me/nothing. There is no repository')
    assert failed.err.count('\n') == 1
    assert main(['card', str(tmp_path / 'nowhere')]) == 1
    assert 'has no config.json' in capsys.readouterr().err
    assert main(['card', str(folder), '--eval', str(tmp_path / 'none.json')]) == 1
    assert 'cannot be read as JSON' in capsys.readouterr().err


# --- Folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'kwargs',
    [
        {'in_chans': 1},
        {'attn_args': {'kernel_size': 3}},
        {'cifar_stem': True},
        {'global_pool': 'max'},
        {'drop_rate': 0.5},
        {'output_stride': 16},
    ],
    ids=lambda k: next(iter(k)),
)
def test_saved_folder_rebuilds_the_model(kwargs: dict[str, Any], tmp_path: Path) -> None:
    model: Any = build('cbam', **kwargs)
    folder = save(model, tmp_path / 'f')
    again: Any = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    x = torch.randn(2, kwargs.get('in_chans', 3), 48, 40)
    assert torch.equal(again(x), model(x)) and again.num_classes == 6
    other: Any = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=4).eval()
    assert other(x).shape == (2, 4)
    assert torch.equal(other.forward_features(x), model.forward_features(x))


def test_the_stem_for_small_images_is_saved_with_their_size(tmp_path: Path) -> None:
    again: Any = None
    for name, depth in (('eca', 18), ('gsop', 50), ('sk', 50), ('se', 50)):
        model: Any = timm.create_model(f'{name}_resnet{depth}', num_classes=3, cifar_stem=True, in_chans=1)
        folder = save(model, tmp_path / name)
        again = timm.create_model(f'local-dir:{folder}', pretrained=True)
        for m in (model, again):
            cfg = resolve_model_data_config(m)
            # timm's own models, too, say 3 channels until they are saved.
            assert tuple(cfg['input_size']) == (3 if m is model else 1, 32, 32) and cfg['crop_pct'] == 1.0
        assert 'test_input_size' not in json.loads((folder / 'config.json').read_text())['pretrained_cfg']
        assert '**Image size:** 1 x 32 x 32' in (folder / 'README.md').read_text()
    # What is said wins, at creation, when saving, and in a saved config.
    overlay = {'input_size': (3, 48, 48)}
    made: Any = timm.create_model('eca_resnet18', num_classes=3, cifar_stem=True, pretrained_cfg_overlay=overlay)
    assert made.pretrained_cfg['input_size'] == (3, 48, 48)
    folder = save(made, tmp_path / 'given', data_config={'input_size': (3, 64, 64)})
    again = timm.create_model(f'local-dir:{folder}', pretrained=True)
    plain: Any = timm.create_model('eca_resnet18')
    assert again.pretrained_cfg['input_size'] == (3, 64, 64) and plain.pretrained_cfg['input_size'] == (3, 224, 224)


def test_class_names_are_a_list_by_index_wherever_they_come_from(tmp_path: Path) -> None:
    names = ['cat', 'dog', 'fox']
    model = timm.create_model('simple_cnn_se', num_classes=3)
    given: tuple[Any, ...] = ({2: 'fox', 1: 'dog', 0: 'cat'}, {'1': 'dog', '0': 'cat', '2': 'fox'}, tuple(names))
    folder = tmp_path
    for i, labels in enumerate(given):
        folder = save(model, tmp_path / f'{i}', label_names=labels)
        assert json.loads((folder / 'config.json').read_text())['label_names'] == names
        assert label_names(load_model(str(folder))) == names
    bad: tuple[Any, ...] = (
        {'cat': 0, 'dog': 1, 'fox': 2},
        {0: 'cat', 1: 'dog', 3: 'fox'},
        {0: 'cat', '0': 'dog', 1: 'fox'},
        {True: 'cat', 0: 'dog', 2: 'fox'},
        {-1: 'cat', 0: 'dog', 1: 'fox'},
        {0: 'cat', 1: 'dog', 2: 5},
        ['cat', 'dog', 5],
        'abc',
        5,
    )
    for labels in bad:
        with pytest.raises(ValueError, match=r'label_names'):
            save(model, tmp_path / 'bad', label_names=labels)
    # In a config that somebody else wrote, too: timm takes such a mapping.
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**config, 'label_names': {'2': 'fox', '0': 'cat', '1': 'dog'}}))
    assert label_names(load_model(str(folder))) == names
    again = save(timm.create_model(f'local-dir:{folder}', pretrained=True), tmp_path / 'again')
    assert json.loads((again / 'config.json').read_text())['label_names'] == names


def test_records_have_known_fields(tmp_path: Path) -> None:
    model = timm.create_model('simple_cnn_se', num_classes=3)
    known = save(
        model,
        tmp_path / 'a',
        provenance=Provenance(source='here', datasets=('d/e',)),
        training=Training(epochs=3, optimizer='sgd'),
        eval_results=Evaluation(dataset='digits', metrics={'top1': 5}),
    )
    mapped = save(
        model,
        tmp_path / 'b',
        provenance={'source': 'here', 'datasets': ['d/e']},
        training={'epochs': 3, 'optimizer': 'sgd'},
        eval_results={'dataset': 'digits', 'top1': 5},
    )
    for name in ('config.json', 'README.md', 'model.safetensors'):
        assert (known / name).read_bytes() == (mapped / name).read_bytes()
    bad: tuple[tuple[dict[str, Any], str], ...] = (
        ({'provenance': {'url': 'x'}}, r"provenance .*\['url'\].*Accepted: source, source_url"),
        ({'provenance': 'here'}, r'must be a Provenance or a mapping'),
        ({'provenance': {'datasets': 'd/e'}}, r'provenance\.datasets .*a list of texts'),
        ({'training': {'epoch': 3}}, r"training .*\['epoch'\].*epochs"),
        ({'training': {'epochs': 'three'}}, r'training\.epochs .*a number'),
        ({'eval_results': {'dataset': 'd', 'metrics': {'top1': 1}, 'splits': 'x'}}, r"\['splits'\].*split"),
        ({'eval_results': {'dataset': 'd', 'metrics': {'top1': True}}}, r'must be a number'),
        ({'status': 'Trained'}, r'one of: trained, converted, warm start, random'),
    )
    for kwargs, words in bad:
        with pytest.raises(ValueError, match=words):
            save(model, tmp_path / 'bad', **kwargs)
    assert not (tmp_path / 'bad').exists()


def test_save_writes_the_same_bytes_again(tmp_path: Path) -> None:
    provenance = {'source': 'somewhere', 'source_url': 'https://example.org/x.pth', 'sha256': 'ab', 'license': 'mit'}
    for name in 'ab':
        save(build('gam'), tmp_path / name, provenance=provenance)
    for file in ('README.md', 'config.json', 'model.safetensors'):
        assert (tmp_path / 'a' / file).read_bytes() == (tmp_path / 'b' / file).read_bytes()
    with safe_open(tmp_path / 'a' / 'model.safetensors', 'pt') as file:
        metadata = file.metadata()
    assert metadata['format'] == 'pt' and json.loads(metadata['timm_attn']) == provenance
    config, _ = read_folder(tmp_path / 'a')
    assert config.about['status'] == 'converted' and config.about['provenance'] == provenance
    assert config.pretrained_cfg['license'] == 'mit'


def test_save_keeps_other_files_and_refuses_to_replace(tmp_path: Path) -> None:
    (tmp_path / 'notes.txt').write_text('mine')
    old = os.umask(0o022)
    try:
        save(build('se'), tmp_path)
    finally:
        os.umask(old)
    assert (tmp_path / 'notes.txt').read_text() == 'mine'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['README.md', 'config.json', 'model.safetensors', 'notes.txt']
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {0o644}
    before = (tmp_path / 'model.safetensors').read_bytes()
    with pytest.raises(
        ValueError,
        match=r'already holds model\.safetensors, config\.json, README\.md; '
        r'.*overwrite=True',
    ):
        save(build('eca'), tmp_path)
    assert (tmp_path / 'model.safetensors').read_bytes() == before
    save(build('eca'), tmp_path, overwrite=True)
    assert (tmp_path / 'notes.txt').read_text() == 'mine'
    with pytest.raises(ValueError, match=r'is a file; a folder is written here'):
        save(build('se'), tmp_path / 'notes.txt')


def test_save_refuses_what_it_could_not_read_back(tmp_path: Path) -> None:
    resnet = timm.create_model('resnet18', **SMALL)
    with pytest.raises(ValueError, match=r'has no name to rebuild it by'):
        save(nn.Linear(2, 2), tmp_path / 'a')
    resnet.extra = nn.Linear(2, 2)
    with pytest.raises(HubFileError, match=r'that do not belong.*cannot be rebuilt from its name: .*cbam_resnet50'):
        save(resnet, tmp_path / 'b')
    with torch.device('meta'):
        meta = timm.create_model('se_resnet18')
    with pytest.raises(ValueError, match=r'on the meta device'):
        save(meta, tmp_path / 'd')
    with pytest.raises(ValueError, match=r'training must be plain JSON'):
        save(build('se'), tmp_path / 'e', training={'x': torch.ones(1)})
    with pytest.raises(ValueError, match=r"status \(='good'\) must be one of: trained, converted, warm start, random"):
        save(build('se'), tmp_path / 'f', status='good')
    with pytest.raises(ValueError, match=r'label_names has 2 names, but there are 6 classes'):
        save(build('se'), tmp_path / 'g', label_names=['a', 'b'])
    assert not [p for p in tmp_path.rglob('*') if p.is_file()]


def test_injected_models_go_through_the_same_door(hub_client: Any, tmp_path: Path) -> None:
    model = timm_attn.inject(create('resnet18', num_classes=6, **SMALL), 'cbam').eval()
    x = torch.randn(2, 3, 32, 32)
    push_to_hub(save(model, tmp_path / 'm'), 'me/x')
    for again in (open_model(tmp_path / 'm'), load_from_hub('me/x')):
        assert torch.equal(again.eval()(x), model(x))


def test_shared_weights_are_written_apart() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    found = portable_state_dict(model)
    assert found['0.weight'].data_ptr() != found['1.weight'].data_ptr()
    assert torch.equal(found['0.weight'], found['1.weight'])


@pytest.mark.parametrize(
    ('status', 'kwargs'),
    [
        ('random', {}),
        ('trained', {'training': {'epochs': 1}}),
        ('trained', {'eval_results': {'dataset': 'digits', 'top1': 50}}),
        ('converted', {'provenance': {'source_url': 'https://example.org'}}),
        ('warm start', {'status': 'warm start'}),
    ],
    ids=['random', 'training', 'evaluation', 'converted', 'warm'],
)
def test_status_is_found(status: str, kwargs: dict[str, Any], tmp_path: Path) -> None:
    config, files = read_folder(save(build('se'), tmp_path, **kwargs))
    assert config.about['status'] == status
    assert f'**Status: {status}.**' in files['README.md'].read_text()


def test_status_is_not_guessed(tmp_path: Path) -> None:
    model = build('se')
    model.train()(torch.randn(2, 3, 32, 32))
    config, files = read_folder(save(model, tmp_path))
    assert 'status' not in config.about
    assert '**Status: not recorded.**' in files['README.md'].read_text()


def test_timeouts_are_taken_back(hub_client: Any) -> None:
    import huggingface_hub
    from huggingface_hub.utils import _http

    before = _http._GLOBAL_CLIENT_FACTORY
    with client.timeouts():
        assert huggingface_hub.get_session().timeout.read == client.SETTINGS.timeout
        with client.timeouts():
            pass
        assert huggingface_hub.get_session().timeout.read == client.SETTINGS.timeout
    assert _http._GLOBAL_CLIENT_FACTORY is before
    assert huggingface_hub.get_session().timeout.read is None
    with pytest.raises(HubError):
        load_from_hub('me/none')
    assert _http._GLOBAL_CLIENT_FACTORY is before
