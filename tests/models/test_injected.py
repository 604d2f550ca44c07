"""`injected`: any base by name, with its weights, as features, in a folder, and for timm's own scripts."""

import copy
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

import timm_attn
from timm_attn.cli import main
from timm_attn.hub.client import HubFileError
from timm_attn.hub.config import check_config
from timm_attn.hub.folder import make_config, read_folder
from timm_attn.layers import _registry, attn_sites
from timm_attn.models import injected_args

# Base, its injection, number of sites: a slot, outputs of stages, rows of tokens, a base of this package.
CASES: dict[str, dict[str, Any]] = {
    'slots': dict(base='resnet18', attn='cbam', channels=(32, 32, 64, 64)),
    'stages': dict(base='convnext_atto', attn='eca', at=r'stages\.\d'),
    'rows': dict(base='swin_tiny_patch4_window7_224', attn='se', at=r'layers\.[12]', fmt='NHWC', depths=(1, 1, 1, 1)),
    'own': dict(base='cbam_resnet18', attn='srm', at=r'layer[34]', channels=(32, 32, 64, 64)),
    'paper': dict(base='regnetx_002', attn='se', start='paper', attn_args={'rd_ratio': 0.125}),
    'several': dict(
        base='mobilenetv2_050',
        injections=[dict(attn='se', at=r'blocks\.[23]'), dict(attn='eca', at=[r'blocks\.4\.0'], where='output')],
    ),
}


def create(name: str = 'injected', **kwargs: Any) -> Any:
    return timm.create_model(name, **kwargs)


def alive(model: nn.Module, loud: bool = True) -> Any:
    """Weights, statistics and gates that hide nothing."""
    torch.manual_seed(0)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.75, 1.25)
                assert m.running_mean is not None and m.running_var is not None
                m.running_mean.normal_(0, 0.1)
                m.running_var.uniform_(0.75, 1.25)
        for k, p in model.named_parameters():
            if k.endswith('gamma'):
                p.fill_(1)
        for m in attn_sites(model).values() if loud else ():
            for p in m.parameters():
                p.normal_(0, 0.3)
    return model.eval()


def image(case: str, batch: int = 1) -> Tensor:
    size = 224 if case == 'rows' else 64
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('case', CASES)
def test_name_and_keywords_build_what_inject_does(case: str) -> None:
    args = copy.deepcopy(CASES[case])
    model = alive(create(num_classes=5, **args))
    rows = args.pop('injections', None) or [
        {k: args.pop(k) for k in ('attn', 'attn_args', 'at', 'where', 'fmt', 'start') if k in args}
    ]
    plain = timm.create_model(args.pop('base'), num_classes=5, **args)
    for row in rows:
        timm_attn.inject(plain, row.pop('attn'), **row.pop('attn_args', {}), **row)
    plain.load_state_dict(model.state_dict())
    x = image(case)
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), model(x))


@pytest.mark.parametrize('case', CASES)
def test_folder_gives_the_same_model_back(case: str, tmp_path: Path) -> None:
    model = alive(create(num_classes=5, **CASES[case]))
    x = image(case)
    folder = timm_attn.save(model, tmp_path / 'model')
    read_folder(folder)
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    assert config['architecture'] == 'injected' and config['num_classes'] == 5
    with torch.no_grad():
        want = model(x)
        again = create(f'local-dir:{folder}', pretrained=True).eval()
        assert torch.equal(again(x), want)
        # And once more from that one, to the same description.
        assert json.dumps(injected_args(again)) == json.dumps(injected_args(model))
        if case == 'slots':
            assert again.pretrained_cfg['architecture'] == 'injected'
            other = create(f'local-dir:{folder}', pretrained=True, num_classes=3, in_chans=1).eval()
            assert other(x[:, :1]).shape == (1, 3)
            key = 'layer4.1.se.fc1.weight'
            assert torch.equal(other.state_dict()[key], model.state_dict()[key])
    card = (folder / 'README.md').read_text(encoding='utf-8')
    assert f'**Base:** {CASES[case]["base"]}' in card and 'start=' in card


def test_model_that_inject_changed_is_saved_and_loaded_by_name(tmp_path: Path) -> None:
    model = timm.create_model('resnet18', num_classes=4, layers=(1, 1, 1, 1), zero_init_last=False)

    def wanted(name: str, module: nn.Module) -> bool:
        return name in ('layer1', 'layer3')

    alive(timm_attn.inject(timm_attn.inject(model, 'cbam'), 'bam', at=wanted))
    x = image('slots')
    folder = timm_attn.save(model, tmp_path / 'model')
    again = create(f'local-dir:{folder}', pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
        timm_attn.eject(again)
        timm_attn.eject(model)
        assert torch.equal(again(x), model(x)) and attn_sites(again) == {}
    # What is left is the base, under the base's name again.
    config = make_config(model)
    assert config['architecture'] == 'resnet18' and 'base' not in config['model_args']


def test_weights_of_another_place_are_refused(tmp_path: Path) -> None:
    folder = timm_attn.save(alive(create(num_classes=5, **CASES['stages'])), tmp_path / 'model')
    weights = safetensors.torch.load_file(folder / 'model.safetensors')
    del weights['stages.0.attn.conv.weight']
    safetensors.torch.save_file(weights, folder / 'model.safetensors', {'format': 'pt'})
    for classes in (5, 3):  # timm itself is strict only for the first
        with pytest.raises((ValueError, RuntimeError), match=r'stages\.0\.attn\.conv\.weight'):
            create(f'local-dir:{folder}', pretrained=True, num_classes=classes)


def test_pretrained_gives_the_bases_weights_with_neutral_attention(tmp_path: Path) -> None:
    plain = alive(timm.create_model('resnet18'))
    weights = tmp_path / 'resnet18.safetensors'
    safetensors.torch.save_file(plain.state_dict(), weights)
    overlay = dict(file=str(weights))
    x = image('slots')
    with torch.no_grad():
        model = create(base='resnet18.tv_in1k', pretrained=True, pretrained_cfg_overlay=overlay).eval()
        assert len(attn_sites(model)) == 8 and torch.equal(model(x), plain(x))
        assert injected_args(model)['base'] == 'resnet18.tv_in1k'
        # The base's preprocessing, which is the tag's, and nothing that would be loaded in the model's place.
        assert model.pretrained_cfg['mean'] == timm.get_pretrained_cfg('resnet18.tv_in1k').mean  # pyright: ignore
        assert not any(model.pretrained_cfg.get(k) for k in ('hf_hub_id', 'url', 'file'))
        head = create(pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay).eval()
        assert torch.equal(head.forward_features(x), plain.forward_features(x))


@pytest.mark.parametrize('case', CASES)
def test_feature_maps_are_those_of_the_model(case: str) -> None:
    model = alive(create(**CASES[case]))
    features = alive(create(features_only=True, **CASES[case]))
    assert len(attn_sites(features)) == len(attn_sites(model))
    features.model.load_state_dict(model.state_dict(), strict=False)
    x = image(case)
    with torch.no_grad():
        got = features(x)
        want = model.forward_intermediates(x, intermediates_only=True, output_fmt='NCHW')
        assert [f.shape[1] for f in got] == features.feature_info.channels()
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        two = create(features_only=True, out_indices=(1, 2), **CASES[case])
        assert len(two(x)) == 2


def test_features_that_pass_attention_by_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def skipping(self: Any, x: Tensor, **kwargs: Any) -> list[Tensor]:
        return [self.layer1(self.maxpool(self.act1(self.bn1(self.conv1(x)))))]

    monkeypatch.setattr(timm.models.ResNet, 'forward_intermediates', skipping)
    with pytest.raises(ValueError, match=r"ResNet does not pass \['model\.layer2\.2', 'model\.layer3\.2'\].*blocks"):
        create(attn='eca', at=r'layer\d', features_only=True, out_indices=(1, 2, 3))


def test_unknown_words_are_refused() -> None:
    with pytest.raises(TypeError, match='bogus'):
        create(bogus=1)
    with pytest.raises(TypeError, match=r"injections: \['stage'\] are unknown\. Accepted: attn, attn_args, at"):
        create(injections=[dict(attn='se', stage=1)])
    with pytest.raises(ValueError, match=r"base \(='resnet81'\) is no model of timm\. Did you mean 'resnet18'"):
        create(base='resnet81')
    with pytest.raises(ValueError, match=r"base \(='injected'\) must be the name of a model"):
        create(base='injected')
    with pytest.raises(ValueError, match=r"Unknown attention 'cbamm'\. Did you mean 'cbam'"):
        create(attn='cbamm')


def test_defaults_are_a_resnet18_with_cbam() -> None:
    model, ours = create(device='meta'), create('cbam_resnet18', device='meta')
    gains = {f'{site}.gain' for site in attn_sites(model)}
    assert set(model.state_dict()) - gains == set(ours.state_dict())


# The schema of config.json.


def config(**model_args: Any) -> dict[str, Any]:
    return {'architecture': 'injected', 'num_classes': 2, 'model_args': model_args, 'pretrained_cfg': {}}


@pytest.mark.parametrize(
    'args',
    [
        dict(base='convnext_atto.d2_in1k', attn='se', at=r'stages\.\d+'),
        dict(base='resnet18', at=['layer1\\.0', 'layer2\\-x', 'layer[1-3]'], example=[1, 3, 64, 64]),
        dict(base_args={'layers': [1, 1, 1, 1], 'drop_path_rate': 0.1}, injections=[{'attn': 'se'}, {'attn': 'eca'}]),
    ],
)
def test_config_may_name_any_base(args: dict[str, Any]) -> None:
    assert check_config(config(**args)).model_args == args


@pytest.mark.parametrize(
    ('args', 'match'),
    [
        (dict(base='resnet81'), r"model_args\.base \(='resnet81'\) must be the name of a model"),
        (dict(base='injected'), r'model_args\.base'),
        (dict(base='hf-hub:evil/x'), r'model_args\.base'),
        (dict(base='local-dir:/etc'), r'model_args\.base'),
        (dict(at='(a+)+b'), r'model_args\.at.*must be names of modules'),
        (dict(at=r'\d+\d+\d+\d+\d+x'), r'model_args\.at'),
        (dict(at='.*'), r'model_args\.at'),
        (dict(at=['layer1'] * 2000), r'model_args\.at'),
        (dict(base_args={'checkpoint_path': '/etc/passwd'}), r'model_args\.base_args'),
        (dict(base_args={'layers': [10**6, 1, 1, 1]}), r'model_args\.base_args'),
        (dict(base_args={'pretrained': True}), r'model_args\.base_args'),
        (dict(pretrained_cfg_overlay={'file': 'x'}), r"holds \['pretrained_cfg_overlay'\], which is not allowed"),
        (dict(injections=[{'attn': 'se', 'base': 'x'}]), r'model_args\.injections'),
        (dict(injections=[{}] * 99), r'model_args\.injections'),
        (dict(example=[1, 3, 10**6, 10**6]), r'model_args\.example'),
        (dict(start='random'), r"model_args\.start.*'identity' or 'paper'"),
        (dict(attn='cbamm'), r"Unknown attention 'cbamm'\. Did you mean"),
    ],
)
def test_config_that_asks_for_more_is_refused(args: dict[str, Any], match: str) -> None:
    with pytest.raises(HubFileError, match=match):
        check_config(config(**args))


def test_other_architectures_take_no_injection_from_a_config() -> None:
    with pytest.raises(HubFileError, match=r"model_args holds \['base'\], which is not allowed"):
        check_config({**config(base='resnet18'), 'architecture': 'resnet18'})


# Attentions of other packages.

PLUGIN = """
import torch
from torch import nn
from timm_attn.layers import Attention, Gate, register_attn


@register_attn('{name}', placement='block', title='G', authors='A', year=2026, venue='V', paper='https://x.y', code='')
class Mine(Attention):
    kinds = {{'channel': Gate('C', 'channel')}}

    def __init__(self, channels, *, device=None, dtype=None):
        super().__init__(neutral_gate=0.5)
        self.fc = nn.Conv2d(channels, channels, 1, device=device, dtype=dtype)

    def init_neutral(self):
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x):
        return x * (self.fc(x.mean((2, 3), keepdim=True)).sigmoid() * self.gain)

    def gates(self, x):
        return {{'channel': self.fc(x.mean((2, 3), keepdim=True)).sigmoid().flatten(1)}}
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """A package with an entry point, as pip installs one."""
    root = tmp_path / 'site'
    info = root / 'gate_plugin-1.0.dist-info'
    info.mkdir(parents=True)
    (root / 'gate_plugin.py').write_text(PLUGIN.format(name='mygate'), encoding='utf-8')
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: gate-plugin\nVersion: 1.0\n', encoding='utf-8')
    (info / 'entry_points.txt').write_text('[timm_attn.plugins]\ngate = gate_plugin\n', encoding='utf-8')
    (info / 'top_level.txt').write_text('gate_plugin\n', encoding='utf-8')
    (info / 'RECORD').write_text('gate_plugin.py,,\n', encoding='utf-8')
    return root


def python(code: str, *paths: Path) -> 'subprocess.CompletedProcess[str]':
    root = str(Path(timm_attn.__file__).parents[1])
    return subprocess.run(
        [sys.executable, '-c', code, *map(str, paths[1:])],
        env={'PYTHONPATH': ':'.join([str(paths[0]), root]), 'OMP_NUM_THREADS': '1', 'HOME': str(paths[-1])},
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def test_attention_of_another_package_is_found_saved_and_missed(plugin: Path, tmp_path: Path) -> None:
    code = (
        'import sys, timm, torch, timm_attn\n'
        "m = timm_attn.inject(timm.create_model('resnet18', num_classes=2, layers=(1, 1, 1, 1)), 'mygate')\n"
        'timm_attn.save(m, sys.argv[1])\n'
        "n = timm.create_model('local-dir:' + sys.argv[1], pretrained=True)\n"
        'x = torch.randn(1, 3, 32, 32)\n'
        'assert torch.equal(m.eval()(x), n.eval()(x))\n'
        'print(timm_attn.attention_maps(n, x)["layer1.0.se"]["channel"].shape)\n'
    )
    done = python(code, plugin, tmp_path / 'model')
    assert done.returncode == 0, done.stderr
    assert 'torch.Size([1, 64])' in done.stdout
    saved = json.loads((tmp_path / 'model/config.json').read_text(encoding='utf-8'))
    assert saved['timm_attn']['attentions'] == {'mygate': 'gate-plugin'}
    # Here there is no such package.
    with pytest.raises(
        HubFileError, match=r"Unknown attention 'mygate'.*comes with the package 'gate-plugin': install"
    ):
        read_folder(tmp_path / 'model')


def test_broken_plugin_is_named(plugin: Path, tmp_path: Path) -> None:
    (plugin / 'gate_plugin.py').write_text('1 / 0', encoding='utf-8')
    done = python("import timm_attn; timm_attn.create_attn('se', 64); timm_attn.get_attn('mygate')", plugin, tmp_path)
    assert (
        "ValueError: The plugin 'gate' (gate_plugin) of the group timm_attn.plugins cannot be imported" in done.stderr
    )


@pytest.mark.parametrize('words', ['--import gate_plugin recipe', 'recipe --import gate_plugin'])
def test_command_line_imports_modules_anywhere(words: str, plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_registry, '_ATTENTIONS', dict(_registry._ATTENTIONS))
    monkeypatch.setattr(sys, 'path', [str(plugin), *sys.path])
    monkeypatch.delitem(sys.modules, 'gate_plugin', raising=False)
    assert main(words.split()) == 0
    assert 'mygate' in timm_attn.list_attn()
    monkeypatch.delitem(sys.modules, 'gate_plugin')


def test_training_attention_first_takes_injected_models(tmp_path: Path) -> None:
    code = (
        'import timm, timm_attn.recipes.attention_first\n'
        "m = timm.create_model('injected', base='regnetx_002', num_classes=2).train()\n"
        "print(sorted({k.split('.')[0] for k, p in m.named_parameters() if p.requires_grad}), m.stem.bn.training)"
    )
    done = python(code, tmp_path, tmp_path)
    assert done.stdout.strip().endswith("['head', 's1', 's2', 's3', 's4'] False"), done.stderr


def test_log_level_is_quiet_for_full_fills(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    create(device='meta')
    assert caplog.text == ''
