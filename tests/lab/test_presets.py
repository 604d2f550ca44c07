import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm

import timm_attn
from timm_attn.lab.presets import PRESETS
from timm_attn.lab.train import Settings

Cli = Callable[..., None]


def smoke(cli: Cli, preset: str, out: Path, *words: str | Path) -> dict[str, Any]:
    cli('compare', '--preset', preset, '--smoke', '--out', out, *words)
    assert all((out / name).stat().st_size > 0 for name in ('report.md', 'comparison.png', 'curves.png'))
    results = json.loads((out / 'results.json').read_text())
    assert results['missing'] == []
    assert len(results['runs']) == 2 * len(PRESETS[preset].models)
    return results


def test_se_lab_runs_on_idx_files(cli: Cli, fashion_files: Path, tmp_path: Path) -> None:
    results = smoke(cli, 'se-lab', tmp_path / 'out', '--data-dir', fashion_files)
    assert [r['label'] for r in results['rows']] == ['plain', 'SE', 'CSA']
    assert (results['data']['name'], results['data']['classes']) == ('fashion-mnist', 10)
    assert results['settings']['img_size'] == 28
    parameters = {r['label']: r['parameters'] for r in results['rows']}
    assert parameters['plain'] < parameters['SE'] != parameters['CSA']


@pytest.mark.parametrize('preset', ['gam-cifar', 'gam-ablation'])
def test_gam_presets_run_on_cifar_binaries(cli: Cli, cifar_files: Path, tmp_path: Path, preset: str) -> None:
    results = smoke(cli, preset, tmp_path / 'out', '--data-dir', cifar_files)
    assert [r['label'] for r in results['rows']] == [m.label for m in PRESETS[preset].models]
    assert (results['data']['name'], results['data']['classes']) == ('cifar100', 100)
    if preset == 'gam-ablation':
        sizes = {r['label']: r['parameters'] for r in results['rows']}
        extra = {k: v - sizes['ResNet-18'] for k, v in sizes.items()}
        assert extra['channel only'] + extra['spatial only'] == extra['GAM'] == extra['with max-pool']


def test_options_override_a_preset(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip('sklearn', reason='scikit-learn is not installed')
    words = ['--preset', 'gam-ablation', '--smoke', '--data', 'digits', '--seeds', '1', '--epochs', '1', '--lr', '0.01']
    cli('compare', *words, '--img-size', '16', '--models', 'plain=simple_cnn', '--out', tmp_path)
    results = json.loads((tmp_path / 'results.json').read_text())
    assert (results['data']['name'], results['seeds']) == ('digits', 1)
    assert {k: results['settings'][k] for k in ('epochs', 'lr', 'img_size', 'weight_decay')} == {
        'epochs': 1,
        'lr': 0.01,
        'img_size': 16,
        'weight_decay': 5e-4,
    }
    assert [m['name'] for m in results['models']] == ['simple_cnn']
    assert 'Nothing to compare yet' in capsys.readouterr().out


@pytest.mark.parametrize('name', list(PRESETS))
def test_presets_at_full_size_build(name: str) -> None:
    assert timm_attn.list_attn()  # Importing the package is what makes timm know the names.
    preset = PRESETS[name]
    Settings(**preset.settings)
    assert json.loads(json.dumps(preset.settings)) == preset.settings
    for entry in preset.models:
        args = {k: v for k, v in entry.args.items() if k != 'cifar_stem' or entry.name != preset.models[0].name}
        assert json.loads(json.dumps(entry.args)) == entry.args
        timm.create_model(entry.name, device='meta', **args)
