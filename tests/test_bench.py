"""Times in rounds: what is measured, what is read off it, and the scripts that do it beside peers."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch

import timm_attn
from timm_attn.bench import advice, entrants, losses, rounds_of, summary, unusual
from timm_attn.cli.main import main
from timm_attn.layers import attn_sites
from timm_attn.measure import seconds

BENCHMARKS = Path(__file__).resolve().parents[1] / 'benchmarks'


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of benchmarks/, which finds its neighbours."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(f'_{name}_for_bench', BENCHMARKS / f'{name}.py')
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def block(name: str) -> str:
    return '.'.join(name.split('.')[:2])


def times(**seconds: list[float]) -> dict[str, dict[str, Any]]:
    return {label.replace('_', ' '): {'seconds': values, 'first': values[0]} for label, values in seconds.items()}


def test_entrants_are_the_plain_model_and_each_model_in_each_way() -> None:
    assert list(entrants(['se_resnet18'], 'resnet18', ['eager', 'fused', 'compiled'])) == [
        *('plain', 'plain fused', 'plain compiled'),
        *('se_resnet18', 'se_resnet18 fused', 'se_resnet18 compiled'),
    ]
    assert list(entrants([], 'resnet18', ['fused'])) == ['plain', 'plain fused']


@pytest.mark.parametrize('mode', ['inference', 'train'])
def test_rounds_time_every_model_in_its_mode_and_layout(mode: str) -> None:
    seen: list[tuple[bool, bool, bool]] = []

    def build() -> torch.nn.Module:
        model = torch.nn.Conv2d(3, 4, 3)
        model.register_forward_pre_hook(
            lambda m, args: seen.append(
                (
                    m.training,
                    args[0].is_contiguous(memory_format=torch.channels_last) and not args[0].is_contiguous(),
                    torch.is_grad_enabled(),
                )
            )
        )
        return model

    found = rounds_of({'plain': build, 'other': build}, mode, batch=2, size=8, rounds=3, steps=2, channels_last=True)
    assert {*seen} == {(mode == 'train', True, mode == 'train')}
    # The first step, and the rounds.
    assert len(seen) == 2 * (1 + 3 * 2) and all(len(f['seconds']) == 3 for f in found.values())


def test_ratios_are_those_of_the_same_round() -> None:
    rows = summary(times(plain=[1.0, 2.0, 4.0], se=[2.0, 3.0, 4.0]))
    assert (rows[1]['median'], rows[1]['ratio'], rows[1]['ratio_quartiles']) == (3.0, 1.5, [1.25, 1.75])


def test_losses_are_against_the_fastest_peer_eager_and_the_compiler() -> None:
    ratios = {'plain': 1.0, 'eager': 1.2, 'fused': 1.1, 'compiled': 1.0, 'pytorchcv': 1.15, 'fightingcv': 1.3}
    assert losses(ratios) == ['eager 1.04 of pytorchcv', 'fused 1.10 of torch.compile']
    assert losses({'plain': 1.0, 'eager': 1.0, 'fused': 1.02}) == []
    assert losses({'plain': 1.0, 'eager': 1.0, 'fused': 1.03}) == ['fused 1.03 of eager']


def test_conditions_of_a_cell_are_named_where_unusual() -> None:
    cell = {'attn': 'se', 'mode': 'train', 'dtype': 'float32', 'batch': 1, 'size': 224, 'depth': 18, 'threads': 2}
    assert unusual({**cell, 'layout': 'channels_last'}) == 'batch 1, depth 18, 2 threads, channels_last'


class TestAdvice:
    def test_the_fastest_way_comes_first_with_its_code(self) -> None:
        found = times(m=[1.0] * 4, m_fused=[0.79] * 4, m_compiled=[0.9] * 4)
        found['m']['kept_bytes'], found['m fused']['kept_bytes'] = 1_500_000_000, 900_000_000
        assert advice(found, 'm') == (
            "m: fused saves 21 % of a step and saves 0.6 GB (timm.create_model('m', fused=True)), "
            'compiled saves 10 % of a step here.'
        )

    def test_a_loss_in_time_and_a_gain_in_bytes(self) -> None:
        found = times(m=[1.0] * 4, m_fused=[1.05] * 4)
        found['m']['kept_bytes'], found['m fused']['kept_bytes'] = 90_000_000, 60_000_000
        assert advice(found, 'm') == (
            'm: fused costs 5 % of a step and saves 30 MB here. '
            'Leave it eager for speed; fuse it where memory limits the batch.'
        )

    @pytest.mark.parametrize(('seconds', 'says'), [(1.05, 'costs 5 % of a step'), (0.99, 'takes as long as eager')])
    def test_a_loss_is_called_one_and_a_hundredth_is_nothing(self, seconds: float, says: str) -> None:
        found = times(m=[1.0] * 4, m_fused=[seconds] * 4)
        assert advice(found, 'm') == f'm: fused {says} here. Leave it eager.'

    def test_few_rounds_tell_nothing(self) -> None:
        assert advice(times(m=[1.0] * 3, m_fused=[0.5] * 3), 'm') == 'm: 4 rounds or more tell what to do.'

    def test_rounds_that_disagree_show_nothing(self) -> None:
        found = times(m=[1.0] * 4, m_fused=[0.8, 0.9, 1.1, 1.2])
        assert advice(found, 'm') == 'm: fused takes as long as eager here. Leave it eager.'


def test_the_command_measures_advises_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / 'bench.json'
    argv = 'bench se_resnet18 --baseline resnet18 --mode train --no-compile --size 32 --batch 2 --rounds 4'
    assert main([*argv.split(), '--dtype', 'bfloat16', '--channels-last', '--out', str(out)]) == 0
    assert 'se_resnet18: ' in capsys.readouterr().out.splitlines()[-1]
    report = json.loads(out.read_text())
    assert report['channels_last'] and report['environment']['torch'] == torch.__version__
    assert [r['model'] for r in report['rows']] == ['plain', 'plain fused', 'se_resnet18', 'se_resnet18 fused']
    kept = {r['model']: r['kept_bytes'] for r in report['rows']}
    assert kept['se_resnet18 fused'] < kept['se_resnet18'] > kept['plain']


def test_seconds_are_those_of_the_function() -> None:
    calls: list[int] = []
    assert 0 <= seconds(lambda: calls.append(1), 'cpu') < 1 and calls == [1]


class TestScripts:
    def test_peers_stand_where_ours_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        peers = load('peers', monkeypatch)
        found = {label: build for attn in timm_attn.list_attn() for label, build in peers.peers(attn, 18).items()}
        assert {"se timm's layer", "coord timm's scoord", "gc timm's gca", "nl timm's layer"} <= found.keys()
        x = torch.randn(2, 3, 64, 64)
        for label, build in found.items():
            model = build()
            assert model(x).shape == (2, 1000), label
            if 'pytorchcv' not in label:
                ours = timm.create_model(f'{label.split()[0]}_resnet18', device='meta')
                plain = {name for name, _ in timm.create_model('resnet18', device='meta').named_modules()}
                added = {name for name, _ in model.named_modules()} - plain
                assert {block(name) for name in added} == {block(name) for name in attn_sites(ours)}, label

    def test_the_plan_has_every_attention_and_no_cell_twice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        throughput = load('throughput', monkeypatch)
        cells = list(throughput.plan())
        assert len({tuple(c.key.values()) for c in cells}) == len(cells)
        usual = {(c.attn, c.mode) for c in cells if not unusual(c.key)}
        assert usual == {(a, m) for a in ['plain', *timm_attn.list_attn()] for m in ('inference', 'train')}

    def test_what_is_measured_is_not_measured_again(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        throughput = load('throughput', monkeypatch)
        cell = throughput.Cell('se', 'train', batch=2, size=64, depth=18)
        monkeypatch.setattr(throughput, 'plan', lambda: [cell])
        monkeypatch.setattr(throughput, 'peers', lambda attn, depth: {})
        ways = ('eager', 'fused')
        builds = entrants(['se_resnet18'], 'resnet18', ways, compile=False)
        monkeypatch.setattr(throughput.Cell, 'builds', lambda self: builds)
        out = tmp_path / 'speed.json'
        for _ in range(2):
            monkeypatch.setattr(sys, 'argv', ['throughput.py', '--rounds', '1', '--out', str(out)])
            throughput.main()
        assert capsys.readouterr().out.count('se at depth 18, train') == 1
        (row,) = json.loads(out.read_text())
        assert (row['attn'], row['threads'], row['layout'], row['rounds']) == ('se', 1, 'contiguous', 1)

    def test_time_that_does_not_suffice_begins_nothing(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        throughput = load('throughput', monkeypatch)
        out = tmp_path / 'speed.json'
        monkeypatch.setattr(sys, 'argv', ['throughput.py', '--seconds', '1', '--out', str(out)])
        throughput.main()
        assert not out.exists() and 'run the command again' in capsys.readouterr().err

    def test_the_fit_of_growth_finds_a_plane_and_its_largest_miss(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fit = load('readme', monkeypatch)._fit
        plane = [
            (b, s, 1.5 + 0.1 * math.log2(b / 4) - 0.2 * math.log2(s / 224)) for b in (1, 4, 16) for s in (112, 448)
        ]
        found, miss = fit(plane)
        assert found == pytest.approx([1.5, 0.1, -0.2]) and miss == pytest.approx(0, abs=1e-12)
        # Of four equal conditions one lies 0.4 above: the plane goes through the mean.
        found, miss = fit([(4, 224, 1.0)] * 3 + [(4, 224, 1.4)])
        assert found[0] == pytest.approx(1.1) and miss == pytest.approx(0.3)

    def test_the_gpu_compiles_the_slowest_first_and_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        jobs = load('gpu', monkeypatch).jobs_of([('se', 'train'), ('cbam', 'train'), ('se', 'inference')], compiled=2)
        assert jobs == [
            *(('plain', 'train', 'compiled'), ('se', 'train', 'compiled'), ('cbam', 'train', 'compiled')),
            *(('se', 'train', 'fused'), ('cbam', 'train', 'fused')),
            *(('se', 'inference', 'fused'), ('se', 'inference', 'frozen')),
        ]

    def test_the_bound_of_a_block_counts_each_map_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu = load('gpu', monkeypatch)
        argv = ['--device', 'cpu', '--smoke', '--batch', '1', '--rounds', '1', '--steps', '1', '--dtype', 'float32']
        args = gpu.parser().parse_args(argv)
        found = {mode: gpu.block_row('se', 'layer3.1', 4, mode, 1e9, args) for mode in ('inference', 'train')}
        # 256 channels twice and 1024 once, 4 x 4 pixels, 4 bytes. Forwards each of the small maps is read and written,
        # of large ones two are read and one is written. Backwards two and one of each small, three and two large.
        small, large = 256 * 16 * 4, 1024 * 16 * 4
        assert found['inference']['bytes'] == 2 * 2 * small + 3 * large
        assert found['train']['bytes'] == 2 * (2 + 3) * small + (3 + 5) * large
        row = found['train']
        assert row['over_bound'] == pytest.approx(
            (row['block_seconds'] - row['convolution_seconds']) * 1e9 / row['bytes']
        )
