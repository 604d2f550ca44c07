import json
import math
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import timm_attn
from timm_attn.lab import compare as compare_module
from timm_attn.lab import tables
from timm_attn.lab.compare import compare, load_runs, write_report
from timm_attn.lab.comparison import Comparison
from timm_attn.lab.data import Data, load_data
from timm_attn.lab.runs import Lease
from timm_attn.lab.train import Entry, Settings, initial_model

Cli = Callable[..., None]

# A comparison like the fixtures', in a process of its own; argv: out, jobs, and what happens at a given image.
CHILD = """
    import sys
    import torch
    from timm_attn.lab.compare import compare
    from timm_attn.lab.comparison import Comparison
    from timm_attn.lab.data import Data, Images, load_data
    from timm_attn.lab.train import Entry, Settings

    class Stalling(Images):
        seen = 0

        def __getitem__(self, index):
            self.seen += 1
            if self.seen == STALL:  # in the middle of the second epoch
                print('mid-epoch', flush=True)
                sys.stdin.read()  # Nothing comes: it ends by a signal only.
            return super().__getitem__(index)

    if __name__ == '__main__':
        torch.set_num_threads(1)
        data = load_data(FOLDER)
        data.train.__class__ = Stalling
        compare(Comparison(MODELS, data, SETTINGS, 1), sys.argv[1], jobs=int(sys.argv[2]), progress=False)
"""


@pytest.fixture
def comparison(tiny_data: Data, tiny_settings: Settings, tiny_models: tuple[Entry, ...]) -> Comparison:
    return Comparison(tiny_models, tiny_data, replace(tiny_settings, epochs=2), 2)


def outcome(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What must not depend on when, where and in how many pieces the runs were made."""
    return {r['run']: (r['weights_sha256'], r['top1'], [{**h, 'seconds': 0} for h in r['history']]) for r in runs}


def test_a_comparison_killed_in_mid_epoch_goes_on_to_the_same_bits(
    image_folder: Callable[..., Path],
    tiny_settings: Settings,
    tiny_models: tuple[Entry, ...],
    tmp_path: Path,
) -> None:
    folder = image_folder('pets', {'cat': 25, 'dog': 25}, side=8)
    script = tmp_path / 'child.py'
    text = textwrap.dedent(CHILD).replace('FOLDER', repr(str(folder))).replace('STALL', str(40 + 20))
    script.write_text(text.replace('MODELS', repr(tiny_models)).replace('SETTINGS', repr(tiny_settings)))
    command = [sys.executable, str(script), str(tmp_path / 'killed'), '1']
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == 'mid-epoch\n'
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert not (tmp_path / 'killed' / 'runs').exists()
    assert [p.name for p in (tmp_path / 'killed' / 'checkpoints').glob('*.pt')] == ['plain-seed0.pt']

    c = Comparison(tiny_models, load_data(str(folder)), tiny_settings, 1)
    resumed = compare(c, tmp_path / 'killed', progress=False)
    whole = compare(c, tmp_path / 'whole', progress=False)
    assert [r['resumed_after'] for r in resumed] == [0, 1]  # SE had not begun; plain had one epoch.
    assert outcome(resumed) == outcome(whole)
    assert not any((tmp_path / 'killed' / 'checkpoints').iterdir())


def environment() -> dict[str, str]:
    """This process's, with the package importable and one thread, as in the fixtures."""
    import os

    import timm_attn

    root = str(Path(timm_attn.__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get('PYTHONPATH')])]
    return {**os.environ, 'PYTHONPATH': os.pathsep.join(paths), 'OMP_NUM_THREADS': '1'}


@pytest.mark.slow
def test_processes_give_the_bits_of_one_process_and_end_with_their_parent(
    comparison: Comparison,
    image_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    alone = compare(comparison, tmp_path / 'alone', progress=False)
    assert outcome(compare(comparison, tmp_path / 'two', jobs=2, progress=False)) == outcome(alone)

    folder = image_folder('pets', {'cat': 25, 'dog': 25}, side=8)
    script = tmp_path / 'child.py'
    text = textwrap.dedent(CHILD).replace('FOLDER', repr(str(folder))).replace('STALL', '20')
    text = text.replace('MODELS', repr(comparison.models)).replace('SETTINGS', repr(comparison.settings))
    script.write_text(text)
    command = [sys.executable, str(script), str(tmp_path / 'killed'), '2']
    pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with subprocess.Popen(command, env=environment(), text=True, **pipes) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == 'mid-epoch\n'
        child.kill()
        # The pipe ends when the last process that holds it has gone.
        assert set(child.stdout.read().split()) <= {'mid-epoch'}


def test_workers_that_share_a_folder_do_each_run_once(comparison: Comparison, tmp_path: Path) -> None:
    whole = compare(comparison, tmp_path / 'whole', progress=False)
    out = tmp_path / 'shared'
    # Another worker, alive, is at two of the four runs; its clock is none of ours.
    other = [Lease(out / 'leases', name, clock=lambda: -1e9) for name in ('SE-seed0', 'plain-seed1')]
    assert all(lease.take() for lease in other)
    with other[0].alive(), other[1].alive():
        mine = compare(comparison, out, progress=False)
        assert [r['run'] for r in mine] == ['SE-seed1', 'plain-seed0']
        table, missing, _ = write_report(out)
    assert missing == ['plain-seed1', 'SE-seed0']
    assert [len(r.top1.values) for r in table] == [1, 1] and table[1].difference is None  # No seed in common.
    assert '**Not finished:** plain-seed1, SE-seed0.' in (out / 'report.md').read_text()
    stamps = {p: p.stat().st_mtime_ns for p in (out / 'runs').iterdir()}
    assert outcome(compare(comparison, out, progress=False)) == outcome(whole)
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    assert not list((out / 'leases').glob('*.lease'))
    assert write_report(out)[0][1].difference == write_report(tmp_path / 'whole')[0][1].difference


def test_a_run_taken_over_by_another_worker_is_not_written(
    comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = replace(comparison, models=comparison.models[:1], seeds=1)
    done = compare_module.run

    def slow(*args: Any, **kwargs: Any) -> dict[str, Any]:
        record = done(*args, **kwargs)
        # It hung for so long that another took the run, and that one lives.
        (tmp_path / 'leases/plain-seed0.1.lease').write_text('["another", 0, "elsewhere", 1, ""]')
        return record

    monkeypatch.setattr(compare_module, 'run', slow)
    assert compare(one, tmp_path, progress=False) == []
    assert not (tmp_path / 'runs').exists()
    assert (tmp_path / 'leases/plain-seed0.1.lease').exists()


def test_finished_runs_are_kept_and_models_and_seeds_can_be_added(comparison: Comparison, tmp_path: Path) -> None:
    narrow = replace(comparison, models=comparison.models[:1], seeds=1)
    compare(narrow, tmp_path, progress=False)
    stamp = (tmp_path / 'runs/plain-seed0.json').stat().st_mtime_ns
    runs = compare(comparison, tmp_path, progress=False)
    assert len(runs) == 4
    assert (tmp_path / 'runs/plain-seed0.json').stat().st_mtime_ns == stamp
    # Asked for less again, it forgets nothing.
    assert len(compare(narrow, tmp_path, progress=False)) == 4


def test_another_comparison_in_the_folder_is_refused(comparison: Comparison, tmp_path: Path) -> None:
    one = replace(comparison, models=comparison.models[:1], seeds=1)
    compare(one, tmp_path, progress=False)
    before = (tmp_path / 'comparison.json').read_bytes()
    with pytest.raises(ValueError, match=r'another comparison \(settings\.lr: 0\.05 there, 0\.01 now\)'):
        compare(replace(one, settings=replace(one.settings, lr=0.01)), tmp_path, progress=False)
    with pytest.raises(ValueError, match=r'data\.fingerprint: .* there, .* now; data\.train: 40 there, 8 now'):
        compare(replace(one, data=one.data.reduced(8, 16)), tmp_path, progress=False)
    with pytest.raises(ValueError, match='first model: plain there, SE now'):
        compare(replace(comparison, models=comparison.models[::-1]), tmp_path, progress=False)
    other = Entry('plain', 'resnet18', one.models[0].args | dict(drop_rate=0.1))
    with pytest.raises(ValueError, match='model plain: other name or arguments'):
        compare(replace(one, models=(other,)), tmp_path, progress=False)
    assert (tmp_path / 'comparison.json').read_bytes() == before


def test_foreign_and_broken_records_are_refused(comparison: Comparison, tmp_path: Path) -> None:
    compare(replace(comparison, models=comparison.models[:1], seeds=1), tmp_path, progress=False)
    path = tmp_path / 'runs/plain-seed0.json'
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, 'comparison': 'another'}))
    with pytest.raises(ValueError, match=r"plain-seed0\.json' was made with other settings or data"):
        load_runs(tmp_path)
    path.write_text('{"run": ')
    with pytest.raises(ValueError, match=r"plain-seed0\.json' is no JSON .*: remove it, and the run is done again"):
        load_runs(tmp_path)


def edits(held: Any) -> Iterator[Any]:
    """The value with each part of it in turn left out, or replaced by something of another type."""
    if isinstance(held, dict):
        for key, value in held.items():
            yield {k: v for k, v in held.items() if k != key}
            yield from ({**held, key: other} for other in edits(value))
    elif isinstance(held, list) and held:
        yield from ([*held[:-1], other] for other in edits(held[-1]))
    for other in (None, 'x', [1], {'a': 1}, -1.5, True, math.nan):
        if type(other) is not type(held):
            yield other


def test_records_edited_by_hand_give_the_promised_error_whatever_was_changed(
    comparison: Comparison, tmp_path: Path
) -> None:
    compare(replace(comparison, models=comparison.models[:1], seeds=1), tmp_path, progress=False)
    path = tmp_path / 'runs/plain-seed0.json'
    record = json.loads(path.read_text())
    # What the report does not read may be anything.
    free = ('resumed_after', 'shared_initial_tensors', 'weights_sha256')
    read = {k: v for k, v in record.items() if k not in free}
    refused = total = 0
    for edited in edits(read):
        path.write_text(json.dumps(edited))
        total += 1
        said = ''
        try:
            tables.report(comparison.plain(), load_runs(tmp_path), [])
        except ValueError as e:
            refused += 1
            said = str(e)
        assert said == '' or re.search(r"plain-seed0\.json' (is damaged|was made).*: remove it", said), said
    assert refused > 0.8 * total > 50
    path.write_text(json.dumps(record))
    held = json.loads((tmp_path / 'comparison.json').read_text())
    for edited in ({**held, 'seeds': 'two'}, [], {**held, 'models': []}, {**held, 'data': 1}):
        (tmp_path / 'comparison.json').write_text(json.dumps(edited))
        with pytest.raises(ValueError, match=r"comparison\.json' is damaged .*: restore it, or choose another folder"):
            load_runs(tmp_path)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(models=(Entry('plain', 'resnet18'), Entry('x', 'cbma_resnet18'))), r'Did you mean .*cbam_resnet18'),
        (dict(models=(Entry('plain', 'resnet18', dict(colour='red')),)), r"'plain' \(resnet18\) cannot be built with"),
        (
            dict(models=(Entry('A', 'injected', dict(attn='sse')),)),
            r"'A' \(injected\) cannot be built with .*: Unknown attention 'sse'. Did you mean",
        ),
        (dict(models=(Entry('plain', 'vit_tiny_patch16_224'),)), r"'plain' takes no images of 8 pixels"),
        (dict(settings=dict(opt='adamm')), r"'opt' \(=adamm\): .*Did you mean .*'adam"),
        (dict(settings=dict(batch_size=41)), r"'batch_size' \(=41\) exceeds the 40 training images"),
        (
            dict(settings=dict(pretrained=True), models=(Entry('p', 'simple_cnn'),)),
            'No pretrained weights exist for simple_cnn',
        ),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained_or_written(
    comparison: Comparison, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    settings = replace(comparison.settings, **change.get('settings', {}))
    wrong = replace(comparison, settings=settings, models=change.get('models', comparison.models))
    with pytest.raises(ValueError, match=message):
        compare(wrong, tmp_path / 'out', progress=False)
    assert not (tmp_path / 'out').exists()


def test_settings_that_timm_would_take_in_silence_are_refused(tiny_settings: Settings) -> None:
    with pytest.raises(ValueError, match=r"'sched' \(=cosin\) must be one of: .* Did you mean 'cosine'\?"):
        replace(tiny_settings, sched='cosin')
    for lr in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"'lr' \(=.*\) must be positive"):
            replace(tiny_settings, lr=lr)


def test_a_folder_that_is_no_model_is_refused_by_the_checked_reader(comparison: Comparison, tmp_path: Path) -> None:
    model = timm.create_model('se_resnet18', num_classes=4, in_chans=1, **comparison.models[0].args)
    timm_attn.save(model, tmp_path / 'model')
    weights = load_file(tmp_path / 'model/model.safetensors')
    weights['conv1.weight'][0] = math.nan
    save_file(weights, tmp_path / 'model/model.safetensors', metadata={'format': 'pt'})
    for pretrained in (True, False):
        entry = Entry('mine', f'local-dir:{tmp_path / "model"}')
        settings = replace(comparison.settings, pretrained=pretrained)
        with pytest.raises(ValueError, match='NaN'):
            compare(replace(comparison, models=(entry,), settings=settings), tmp_path / 'out', progress=False)


def test_user_errors_say_what_to_do(comparison: Comparison, tmp_path: Path, cli: Cli) -> None:
    with pytest.raises(ValueError, match=r"'jobs' \(=0\) must be at least 1"):
        compare(comparison, tmp_path, jobs=0)
    with pytest.raises(ValueError, match='No models: name at least one'):
        replace(comparison, models=())
    with pytest.raises(ValueError, match=r"label of its own, got \['plain', 'plain'\]"):
        replace(comparison, models=comparison.models[:1] * 2)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'cuda' is not available here: pass --device cpu"):
            compare(replace(comparison, settings=replace(comparison.settings, device='cuda')), tmp_path)
    with pytest.raises(ValueError, match=r"'seeds' \(=0\)"):
        replace(comparison, seeds=0)
    with pytest.raises(ValueError, match=r'holds no comparison: there is no comparison\.json'):
        cli('compare', '--report', '--out', tmp_path)
    with pytest.raises(ValueError, match='Name the models by --models, or choose a --preset'):
        cli('compare', '--data', 'digits', '--out', tmp_path)
    with pytest.raises(ValueError, match='Name the data by --data'):
        cli('compare', '--models', 'resnet18', '--out', tmp_path)
    with pytest.raises(ValueError, match=r'--images \(=2\) must be TRAIN,VAL, for example 6000,2000'):
        cli('compare', '--models', 'resnet18', '--data', 'digits', '--images', '2', '--out', tmp_path)
    assert not any(tmp_path.iterdir())


def test_report_without_a_finished_run_says_so(comparison: Comparison, tmp_path: Path) -> None:
    (tmp_path / 'comparison.json').write_text(json.dumps(comparison.plain()))
    with pytest.raises(ValueError, match='holds no finished run yet'):
        write_report(tmp_path)


def test_command_line_trains_on_a_folder_and_saves_the_best(
    cli: Cli,
    image_folder: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = image_folder('pets', {'cat': 20, 'dog': 20}, side=24)
    words = ['compare', '--models', 'plain=resnet18,SE=se_resnet18', '--cifar-stem', '--data', folder]
    words += ['--img-size', '16', '--model-kwargs', 'layers=[1,1,1,1]', 'channels=[16,16,16,16]']
    words += ['--epochs', '1', '--seeds', '1', '--batch-size', '8', '--save-best', '--out', tmp_path / 'out']
    cli(*words)
    said = capsys.readouterr()
    assert [line.split()[0] for line in said.out.splitlines()[:4]] == ['model', '-----', 'plain', 'SE']
    assert 'Compared with plain, of 1 model: too few seeds: 1.' in said.out
    assert 'Saved SE-seed0' in said.err
    out = tmp_path / 'out'
    assert {p.name for p in out.iterdir()} >= {'report.md', 'results.json', 'comparison.png', 'curves.png', 'best'}
    model = timm.create_model(f'local-dir:{out / "best"}', pretrained=True)
    assert model.num_classes == 2
    # The saved model goes into a comparison of its own, with another number of classes: fine-tuning.
    more = image_folder('more', {'a': 8, 'b': 8, 'c': 8}, side=16)
    words = ['compare', '--models', f'mine=local-dir:{out / "best"}', '--pretrained', '--data', more]
    cli(*words, '--img-size', '16', '--epochs', '1', '--seeds', '1', '--batch-size', '8', '--out', tmp_path / 'tuned')
    tuned = json.loads((tmp_path / 'tuned/results.json').read_text())
    assert (tuned['settings']['pretrained'], tuned['settings']['lr']) == (True, 0.01)
    # Each model keeps its own trained weights, and they share the new classifier only.
    name = f'local-dir:{out / "best"}'
    entries = Entry('mine', name), Entry('again', name, dict(drop_rate=0.1))
    settings = Settings(epochs=1, batch_size=8, img_size=16, pretrained=True)
    mine, again = (initial_model(e, entries[0], load_data(str(more)), settings, 0) for e in entries)
    saved = model.state_dict()
    assert torch.equal(again[0].state_dict()['conv1.weight'], saved['conv1.weight'])
    assert torch.equal(again[0].state_dict()['fc.weight'], mine[0].state_dict()['fc.weight'])
    assert again[1] == 2 and again[0].state_dict()['fc.weight'].shape == (3, 16)


def test_pictures_are_whole_and_results_hold_everything(comparison: Comparison, tmp_path: Path) -> None:
    compare(comparison, tmp_path, progress=False)
    table, missing, text = write_report(tmp_path)
    assert missing == [] and len(text.splitlines()) == 4
    assert not (tmp_path / 'checkpoints').exists()
    for name in ('comparison.png', 'curves.png'):
        with Image.open(tmp_path / name) as image:
            image.load()
            assert image.width > 1000
    results = json.loads((tmp_path / 'results.json').read_text())
    assert len(results['runs']) == 4
    assert results['settings'] == asdict(comparison.settings)
    environment = results['runs'][0]['environment']
    assert {'torch', 'timm', 'python', 'machine', 'cores', 'threads', 'clock'} <= environment.keys()
    accuracies = {(r['model']['label'], r['seed']): r['top1'] for r in results['runs']}
    differences = [accuracies['SE', s] - accuracies['plain', s] for s in (0, 1)]
    assert table[1].difference is not None and list(table[1].difference.values) == differences
    report = (tmp_path / 'report.md').read_text()
    assert '(comparison.png)' in report and '(curves.png)' in report and '40 training and 16 held-out images' in report
