"""Every tag of the table, through `timm.create_model(..., pretrained=True)`."""

import dataclasses
import importlib
import logging
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.resnet import ResNet
from torch import Tensor, nn

from timm_attn.files import file_hash
from timm_attn.hub.folder import save
from timm_attn.weights import TAGS, Tag, cfgs_of, convert, weights_table
from timm_attn.weights.sources.pytorchcv import KNOWN_SHA1
from timm_attn.weights.tags import tags_of

Plain = Callable[[int], dict[str, Tensor]]

OURS = [m for module in ('attn_resnet', 'sk_resnet', 'simple_cnn') for m in timm.list_models(module=module)]
WARM = [t for t in TAGS if t.status == 'warm']
FROM_TIMM = [t for t in TAGS if t.status == 'trained' and t.hf_hub_id]
FROM_PCV = [t for t in TAGS if t.source.startswith('pytorchcv/')]
ZIP_WARNING = 'ignore:Falling back to the old format:FutureWarning'  # torch.hub says so of every zipped .pth


def _id(tag: Tag) -> str:
    return f'{tag.model}.{tag.tag}'


def _full(tag: Tag) -> str:
    return f'{tag.model}.{tag.tag}'


def _local(**where: Any) -> dict[str, Any]:
    """The overlay that puts a local source in the place of the tag's."""
    return dict(hf_hub_id=None, url='') | where


@pytest.fixture
def quick_init(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random numbers that the checkpoint overwrites need not be good ones."""
    for name in ('kaiming_normal_', 'kaiming_uniform_', 'normal_', 'trunc_normal_'):
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: nn.init.constant_(tensor, 0.01))


def test_the_table_names_registered_models_each_tag_once_and_only_known_licences() -> None:
    assert {t.model for t in TAGS} <= set(OURS)
    assert len({_full(t) for t in TAGS}) == len(TAGS)
    assert {t.licence for t in TAGS} == {'mit', 'apache-2.0'}
    assert all(bool(t.url) != bool(t.hf_hub_id) for t in TAGS)
    assert all(re.fullmatch(r'[0-9a-f]{40}', t.sha) and t.sha[:8] in t.url for t in FROM_PCV)
    # The stated accuracy and the error in the file's name are of one network.
    assert all(70 < t.top1 < 84 for t in TAGS)


def test_timm_lists_the_tables_tags_and_its_first_is_the_default() -> None:
    listed = [m for m in timm.list_models(pretrained=True) if m.partition('.')[0] in OURS]
    assert sorted(listed) == sorted(map(_full, TAGS))
    for model in {t.model for t in TAGS}:
        cfg = timm.get_pretrained_cfg(model)
        assert cfg is not None
        assert cfg.tag == tags_of(model)[0].tag


def test_every_model_but_sk_gsop_simam_and_the_teaching_cnn_has_a_warm_start() -> None:
    without = {m for m in OURS if not any(t.status == 'warm' for t in tags_of(m))}
    assert without == {m for m in OURS if m.startswith(('sk_', 'gsop_', 'simam_', 'simple_cnn'))}
    assert cfgs_of(['gsop_resnet50']).keys() == {'gsop_resnet50.untrained'}
    assert cfgs_of(['sk_resnet50'])['sk_resnet50.untrained']['url'] == ''
    with pytest.raises(RuntimeError, match='No pretrained weights exist for gsop_resnet50'):
        timm.create_model('gsop_resnet50', pretrained=True)


def test_the_defaults_are_those_of_the_design() -> None:
    for model in ('cbam_resnet50', 'bam_resnet50', 'se_resnet18', 'se_resnet101'):
        assert tags_of(model)[0].tag == 'pcv_in1k'
    assert tags_of('se_resnet50')[0].tag == 'a1_in1k'
    assert tags_of('sk_resnext50_32x4d')[0].tag == 'ra_in1k'
    assert tags_of('cbam_resnet18')[0].tag == 'resnet18_a1_in1k'
    for depth, top1 in ((34, 75.02), (50, 78.57), (101, 79.63), (152, 80.02)):
        tag = tags_of(f'fca_resnet{depth}')[0]
        assert (tag.top1, tag.licence) == (top1, 'mit')
        assert tag.url == f'https://github.com/cfzd/FcaNet/releases/download/v1.0/fca{depth}.pth'
    # GSoP's last stage keeps the resolution.
    for name, size in (('gsop_resnet50', 14), ('gsop_resnet101', 14), ('cbam_resnet50', 7), ('simple_cnn', 56)):
        cfg = timm.get_pretrained_cfg(name)
        assert cfg is not None and cfg.pool_size == (size, size)


@pytest.mark.parametrize('tag', TAGS, ids=_id)
def test_preprocessing_is_that_of_the_weights(tag: Tag) -> None:
    cfg = timm.get_pretrained_cfg(_full(tag))
    assert cfg is not None
    if tag.url:
        assert (cfg.interpolation, cfg.crop_pct, cfg.input_size) == ('bilinear', 0.875, (3, 224, 224))
        assert int(cfg.input_size[1] / cfg.crop_pct) == 256
        return
    source = timm.get_pretrained_cfg(tag.hf_hub_id.removeprefix('timm/'))
    assert source is not None
    for key in ('interpolation', 'crop_pct', 'input_size', 'mean', 'std', 'test_input_size', 'test_crop_pct'):
        assert getattr(cfg, key) == getattr(source, key)
    assert cfg.license == source.license == tag.licence
    # timm reaches the very repository that its own model of that name is read from.
    assert cfg.hf_hub_id == source.hf_hub_id


# Each attention at its smallest depth, and some deep ones for the others: one of each way of folding.
DEEP = (
    'eca_resnet152',
    'bam_resnet101',
    'gam_resnet101',
    'cbam_resnet50',
    'bam_resnet50',
    'nl_resnet50',
    'csa_resnet34',
)


@pytest.mark.parametrize(
    'tag', [t for t in WARM if t.model.endswith('18') or t.model in (*DEEP, 'fca_resnet34')], ids=_id
)
def test_a_warm_tag_gives_the_plain_resnets_logits(
    tag: Tag, plain: Plain, with_weights: Callable[..., nn.Module], quick_init: None, caplog: pytest.LogCaptureFixture
) -> None:
    depth = int(re.sub(r'\D', '', tag.model))
    with caplog.at_level(logging.WARNING):
        model = timm.create_model(_full(tag), pretrained=True, pretrained_cfg_overlay=_local(state_dict=plain(depth)))
    assert f'Warm start of {tag.model}: ' in caplog.text
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = with_weights(f'resnet{depth}', plain(depth))(x)
        logits = model.eval()(x)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize('tag', WARM, ids=_id)
def test_a_warm_tag_finds_every_key_of_its_plain_resnet(tag: Tag) -> None:
    plain = timm.create_model(tag.hf_hub_id.removeprefix('timm/').partition('.')[0], device='meta').state_dict()
    ours = timm.create_model(tag.model, device='meta').state_dict()
    assert {k: v.shape for k, v in plain.items()} == {k: ours[k].shape for k in plain}


@pytest.mark.parametrize('tag', FROM_TIMM, ids=_id)
def test_a_tag_of_timms_weights_loads_them_all(tag: Tag, randomise: Any, tmp_path: Path, quick_init: None) -> None:
    net = tag.hf_hub_id.removeprefix('timm/').partition('.')[0]
    state_dict = randomise(timm.create_model(net, device='meta'), 5)
    save_file(state_dict, tmp_path / 'model.safetensors')
    model = timm.create_model(
        _full(tag), pretrained=True, pretrained_cfg_overlay=_local(file=str(tmp_path / 'model.safetensors'))
    )
    expected = convert(state_dict, tag.model, 'timm')
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


def _pcv_state(tag: Tag, filled: Callable[[str], dict[str, Tensor]], randomise: Any) -> dict[str, Tensor]:
    net = tag.source.partition('/')[2]
    if net != 'seresnet101b':
        return filled(f'pytorchcv_{net}')
    provider = pytest.importorskip('pytorchcv.model_provider', reason='pytorchcv is not installed')
    with torch.device('meta'):
        model = provider.get_model(net)
    return randomise(model, 0)


def _release(tag: Tag, state_dict: dict[str, Tensor], folder: Path) -> Path:
    """The file as the release has it: the plain state dict, alone in an archive, under its name."""
    inner = folder / Path(tag.url).name.removesuffix('.zip')
    torch.save(state_dict, inner)
    path = folder / Path(tag.url).name
    with zipfile.ZipFile(path, 'w') as archive:
        archive.write(inner, inner.name)
    inner.unlink()
    return path


@pytest.mark.filterwarnings(ZIP_WARNING)
@pytest.mark.parametrize('tag', FROM_PCV, ids=_id)
def test_a_tag_of_pytorchcv_loads_from_a_server_that_has_the_release(
    tag: Tag,
    served: tuple[Path, str],
    filled: Callable[[str], dict[str, Tensor]],
    randomise: Any,
    tmp_path: Path,
    quick_init: None,
) -> None:
    folder, address = served
    state_dict = _pcv_state(tag, filled, randomise)
    path = _release(tag, state_dict, folder)
    model = timm.create_model(
        _full(tag),
        pretrained=True,
        cache_dir=tmp_path / 'cache',
        pretrained_cfg_overlay=dict(url=f'{address}/{path.name}'),
    )
    expected = convert(state_dict, tag.model, tag.source)
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


def test_fcanets_release_loads_from_a_server_and_a_variant_of_it_does_not(
    served: tuple[Path, str], filled: Callable[[str], dict[str, Tensor]], tmp_path: Path, quick_init: None
) -> None:
    folder, address = served
    net = filled('fcanet34')
    torch.save(net, folder / 'fca34.pth')
    torch.save(net | {'layer1.0.att.dct_layer.weight': torch.rand(64, 56, 56)}, folder / 'learned.pth')

    def load(name: str) -> nn.Module:
        overlay = dict(url=f'{address}/{name}')
        return timm.create_model(
            'fca_resnet34.fcanet_in1k', pretrained=True, cache_dir=tmp_path / 'cache', pretrained_cfg_overlay=overlay
        )

    expected = convert(net, 'fca_resnet34')
    assert all(torch.equal(v, expected[k]) for k, v in load('fca34.pth').state_dict().items())
    with pytest.raises(ValueError, match='learned or random filters'):
        load('learned.pth')


@pytest.mark.filterwarnings(ZIP_WARNING)
def test_a_download_with_another_checksum_is_refused(
    filled: Callable[[str], dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tag = tags_of('se_resnet18')[0]
    hub = tmp_path / 'hub'
    (hub / 'checkpoints').mkdir(parents=True)
    monkeypatch.setattr(torch.hub, '_hub_dir', str(hub))
    _release(tag, filled('pytorchcv_seresnet18'), hub / 'checkpoints')
    with pytest.raises(ValueError, match=rf'has sha1 [0-9a-f]{{40}}, and .* is known to hold {tag.sha}'):
        timm.create_model('se_resnet18', pretrained=True)
    got = file_hash(hub / 'checkpoints' / Path(tag.url).name.removesuffix('.zip'), 'sha1')
    known = dataclasses.replace(tag, sha=got)
    monkeypatch.setattr(importlib.import_module('timm_attn.weights.load'), 'find_tag', lambda model, name: known)
    timm.create_model('se_resnet18', pretrained=True)


def test_a_files_checksum_outweighs_the_tags_word_for_it(
    filled: Callable[[str], dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_init: None
) -> None:
    file = tmp_path / 'net.pth'
    torch.save(filled('pytorchcv_seresnet50'), file)
    load: dict[str, Any] = dict(pretrained=True, pretrained_cfg_overlay=_local(file=str(file)))
    timm.create_model('se_resnet50.pcv_in1k', **load)
    monkeypatch.setitem(KNOWN_SHA1, file_hash(file, 'sha1'), 'seresnet50')
    with pytest.raises(ValueError, match=r"'seresnet50' has the stride in the first 1x1 convolution"):
        timm.create_model('se_resnet50.pcv_in1k', **load)


def _bam(**args: Any) -> ResNet:
    model = timm.create_model('bam_resnet18', **args)
    assert isinstance(model, ResNet)
    return model.eval()


def test_a_tag_loads_with_another_head_other_channels_and_as_features(plain: Plain, tmp_path: Path) -> None:
    save_file(plain(18), tmp_path / 'plain.safetensors')
    overlay = _local(file=str(tmp_path / 'plain.safetensors'))
    load: dict[str, Any] = dict(pretrained=True, pretrained_cfg_overlay=overlay)
    x = torch.rand(1, 3, 64, 64)
    whole = _bam(**load)
    headless = _bam(num_classes=0, **load)
    ten = _bam(num_classes=10, **load)
    gray = _bam(in_chans=1, **load)
    features = timm.create_model('bam_resnet18', features_only=True, **load).eval()
    with torch.inference_mode():
        last = whole.forward_features(x)
        torch.testing.assert_close(headless(x), last.mean((2, 3)))
        torch.testing.assert_close(ten.forward_features(x), last)
        assert ten(x).shape == (1, 10)
        assert gray(x[:, :1]).shape == (1, 1000)
        torch.testing.assert_close(features(x)[-1], last)
    # The three colours' kernels become one, as timm sums them.
    kernels = whole.state_dict()['conv1.weight'].sum(1, keepdim=True)
    torch.testing.assert_close(gray.state_dict()['conv1.weight'], kernels)


def test_a_checkpoint_of_our_own_loads_by_path(randomise: Any, tmp_path: Path) -> None:
    state_dict = randomise(timm.create_model('cbam_resnet18', device='meta'), 0)
    save_file(state_dict, tmp_path / 'own.safetensors')
    path = str(tmp_path / 'own.safetensors')
    ways: list[dict[str, Any]] = [
        dict(checkpoint_path=path),
        dict(pretrained=True, pretrained_cfg_overlay=_local(file=path)),
    ]
    for args in ways:
        model = timm.create_model('cbam_resnet18', **args)
        assert all(torch.equal(v, state_dict[k]) for k, v in model.state_dict().items())


def test_a_foreign_file_in_the_place_of_a_tags_is_converted_or_refused(
    filled: Callable[[str], dict[str, Tensor]], tmp_path: Path, plain: Plain
) -> None:
    official = {'state_dict': {f'module.{k}': v for k, v in filled('cbam_resnet18').items()}}
    torch.save(official, tmp_path / 'official.pth')
    model = timm.create_model(
        'cbam_resnet18', pretrained=True, pretrained_cfg_overlay=_local(file=str(tmp_path / 'official.pth'))
    )
    expected = convert(official, 'cbam_resnet18')
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())

    def refused(name: str, state_dict: dict[str, Tensor], message: str, **args: Any) -> None:
        before = {k: v.clone() for k, v in state_dict.items()}
        with pytest.raises(ValueError, match=message):
            timm.create_model(name, pretrained=True, pretrained_cfg_overlay=_local(state_dict=state_dict), **args)
        assert all(torch.equal(v, before[k]) for k, v in state_dict.items()) and len(before) == len(state_dict)

    refused('se_resnet18', filled('cbam_resnet18'), "a net with 'cbam'")
    refused('se_resnet50', filled('se_cadene_resnet50'), 'legacy_seresnet50')
    refused('se_resnet50.a1_in1k', filled('pytorchcv_seresnet50'), 'legacy_seresnet50')
    # timm loads without strictness where the head changes, so what is missing must be found before.
    part = {k: v for k, v in filled('cbam_resnet18').items() if not k.startswith('layer3.1.')}
    refused('cbam_resnet18', part, r'missing keys: layer3\.1\.conv1\.weight', num_classes=10)
    refused('cbam_resnet18', plain(18), r'It has a 7x7 stem', cifar_stem=True)
    refused('gsop_resnet50', plain(50), 'GSoP has no warm start')


def test_a_saved_folder_that_lacks_keys_is_refused_though_its_head_changes(tmp_path: Path) -> None:
    model = timm.create_model('se_resnet18', num_classes=3)
    save(model, tmp_path / 'own', card=False)
    part = {k: v for k, v in model.state_dict().items() if not k.startswith('layer4.1.se.')}
    save_file(part, tmp_path / 'own' / 'model.safetensors')
    with pytest.raises(ValueError, match=r'4 missing keys: layer4\.1\.se\.fc1\.weight'):
        timm.create_model(f'local-dir:{tmp_path / "own"}', pretrained=True, num_classes=5)


def test_the_docs_table_is_the_tables_text() -> None:
    table = weights_table()
    assert all(f'`{_full(t)}`' in table for t in TAGS)
    assert table.count('(default)') == len({t.model for t in TAGS})
    assert table.count('| warm start |') == len(WARM)
    page = Path(__file__).parents[2] / 'docs/models.md'
    if not page.is_file():
        pytest.skip('there are no docs beside these tests')
    assert table in page.read_text(encoding='utf-8')
