"""The launcher, and timm's own scripts, unmodified, with this package's models.

The scripts are in neither timm's wheel nor its sdist: the environment variable TIMM_SCRIPTS names the folder that holds
them, a checkout of https://github.com/huggingface/pytorch-image-models or a copy of its train.py, validate.py, ...
"""

import argparse
import csv
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import timm_attn
from timm_attn.__main__ import allow_cpu_device_ids, main

TIMEOUT = 300
SIZE = 32
COLOURS = {'blue': (40, 60, 200), 'red': (200, 60, 40)}
TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--local-addr=127.0.0.1', '--nproc_per_node=2']
# Options that make a run tiny, in every script that trains.
TINY_TRAIN = [
    *('--device', 'cpu', '--num-classes', '2', '--img-size', str(SIZE), '-b', '4', '-j', '0', '--no-prefetcher'),
    *('--warmup-epochs', '0', '--lr', '0.01', '--scale', '0.8', '1', '--color-jitter', '0', '--output', 'out'),
]


def script(name: str) -> str:
    """Path of one of timm's scripts; skips the test where there are none."""
    folder = os.environ.get('TIMM_SCRIPTS')
    if not folder:
        pytest.skip("TIMM_SCRIPTS does not name a folder with timm's train.py, validate.py, ...")
    path = Path(folder).resolve() / name
    assert path.is_file(), f'TIMM_SCRIPTS (={folder}) holds no {name}'
    return str(path)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """What the scripts' processes see: no GPU, no network, nothing of the user's home, one thread each."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(('PYTEST', 'TORCHELASTIC', 'HF_'))}
    for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT', 'PYTHONWARNINGS', 'PYTHONSAFEPATH'):
        env.pop(name, None)
    # The repository itself, so that an interpreter started elsewhere finds the package as this one did.
    paths = [str(tmp_path), str(Path(timm_attn.__file__).parents[1]), env.get('PYTHONPATH', '')]
    env.update(
        PYTHONPATH=os.pathsep.join(filter(None, paths)),
        PYTHONDONTWRITEBYTECODE='1',
        HOME=str(tmp_path),
        HF_HUB_OFFLINE='1',
        CUDA_VISIBLE_DEVICES='',
        OMP_NUM_THREADS='1',
    )
    if 'lo' in [name for _, name in socket.if_nameindex()]:
        env['GLOO_SOCKET_IFNAME'] = 'lo'
    return env


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of reddish and bluish noise, 8 images of each class to train and 4 to validate."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (('train', 8), ('validation', 4)):
        for label, colour in COLOURS.items():
            folder = tmp_path / 'images' / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                noise = torch.randint(-40, 40, (SIZE, SIZE, 3), generator=generator)
                pixels = (torch.tensor(colour) + noise).clamp(0, 255).to(torch.uint8)
                # inference.py fails on equal base names, so the label is part of them.
                Image.fromarray(pixels.numpy()).save(folder / f'{label}{i}.png')
    return tmp_path / 'images'


def run(arguments: list[str], cwd: Path, env: dict[str, str]) -> str:
    """Runs Python with these arguments and returns what it wrote to stdout."""
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT
    )
    if done.returncode:
        pytest.fail(f'{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}', pytrace=False)
    return done.stdout


def summary(folder: Path) -> list[dict[str, str]]:
    """The rows of summary.csv, which train.py writes one of per epoch."""
    with open(folder / 'summary.csv', encoding='utf-8', newline='') as file:
        return list(csv.DictReader(file))


def load(path: Path) -> dict:
    """A checkpoint of train.py, read without running code."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location='cpu', weights_only=True)


class TestLauncher:
    def test_without_a_script_it_prints_the_usage_and_fails(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([]) == 2
        out, err = capsys.readouterr()
        assert out == '' and 'usage: python -m timm_attn SCRIPT' in err and 'SCRIPT is missing' in err

    def test_help_is_no_error(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(['--help']) == 0
        assert 'torchrun' in capsys.readouterr().out

    def test_a_script_that_is_no_file_is_named(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert main([str(tmp_path / 'train.py'), '--epochs', '1']) == 2
        assert f"SCRIPT (='{tmp_path}/train.py') is no file: give the path" in capsys.readouterr().err

    def test_a_word_that_may_be_a_tool_gets_a_hint(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(['quickstart']) == 2
        assert '`timm-attn quickstart`' in capsys.readouterr().err

    @pytest.mark.parametrize('cuda', [False, True])
    def test_a_script_runs_as_if_called_directly(
        self, cuda: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / 'helper.py').write_text('WORD = "found"\n')
        path = tmp_path / 'script.py'
        path.write_text('import sys, helper\nprint(__name__, sys.argv[1:], sys.path[0], helper.WORD)\n')
        # All that the launcher changes is put back at the test's end.
        monkeypatch.setattr(sys, 'argv', sys.argv)
        monkeypatch.setattr(sys, 'path', list(sys.path))
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
        before = DistributedDataParallel.__init__
        monkeypatch.setattr(DistributedDataParallel, '__init__', before)

        assert main([str(path), '--lr', '0.1']) == 0
        assert capsys.readouterr().out == f"__main__ ['--lr', '0.1'] {tmp_path} found\n"
        assert sys.argv[0] == str(path)
        assert (DistributedDataParallel.__init__ is before) == cuda

    def test_cpu_device_ids_reach_ddp_as_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(DistributedDataParallel, '__init__', DistributedDataParallel.__init__)
        distributed.init_process_group('gloo', (tmp_path / 'store').as_uri(), rank=0, world_size=1)
        try:
            cpu = torch.device('cpu')
            with pytest.raises(ValueError, match='device_ids'):
                DistributedDataParallel(nn.Linear(2, 2), device_ids=[cpu])
            allow_cpu_device_ids()
            assert DistributedDataParallel(nn.Linear(2, 2), device_ids=[cpu]).device_ids is None
            with pytest.raises(ValueError, match='device_ids'):
                DistributedDataParallel(nn.Linear(2, 2), device_ids=[0])
        finally:
            distributed.destroy_process_group()


def test_train_script_alone_with_device_modules(images: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    """train.py without the launcher; what attention_first froze stays as it was, and inference.py reads the result."""
    torch.manual_seed(0)
    model: Any = timm.create_model('simple_cnn_cbam', num_classes=2)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    torch.save({'state_dict': start}, tmp_path / 'start.pth')
    options = ['--data-dir', str(images), '--model', 'simple_cnn_cbam', '--epochs', '1', *TINY_TRAIN]
    options += ['--initial-checkpoint', 'start.pth', '--experiment', 'first', '--mixup', '0.2']
    options += ['--device-modules', 'timm_attn', 'timm_attn.recipes.attention_first']
    run([script('train.py'), *options], tmp_path, environment)

    checkpoint = tmp_path / 'out' / 'first' / 'last.pth.tar'
    trained = load(checkpoint)['state_dict']
    assert trained.keys() == start.keys()
    parts = (*timm_attn.attn_sites(model), *[name for name, m in model.named_modules() if m is model.get_classifier()])
    for name, _ in model.named_parameters():
        learns = name.startswith(tuple(f'{part}.' for part in parts))
        assert torch.equal(trained[name], start[name]) != learns, name

    pytest.importorskip('pandas')
    options = ['--data-dir', str(images / 'validation'), '--model', 'simple_cnn_cbam', '--num-classes', '2']
    options += ['--checkpoint', str(checkpoint), '--img-size', str(SIZE), '-b', '4', '-j', '0', '--device', 'cpu']
    options += ['--results-dir', 'results', '--results-format', 'csv', '--topk', '1', '--include-index']
    run(['-m', 'timm_attn', script('inference.py'), *options], tmp_path, environment)
    (path,) = (tmp_path / 'results').glob('*.csv')
    with open(path, encoding='utf-8', newline='') as file:
        rows = list(csv.DictReader(file))

    model.load_state_dict(trained)
    config = resolve_data_config({'input_size': (3, SIZE, SIZE)}, model=model)
    transform: Any = create_transform(**config)
    files = sorted((images / 'validation').glob('*/*.png'))
    with torch.inference_mode():
        expected = model.eval()(torch.stack([transform(Image.open(f)) for f in files])).argmax(1).tolist()
    found = {Path(row['filename']).name: int(row['index']) for row in rows}
    assert found == {f.name: label for f, label in zip(files, expected, strict=True)}


def test_two_processes_resume_after_one_was_killed(images: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    """With EMA, bfloat16 and gradient checkpointing; the resumed run ends, and validate.py finds its accuracy."""
    (tmp_path / 'write_pid.py').write_text(
        'import os, pathlib\npathlib.Path("pid" + os.environ["RANK"]).write_text(str(os.getpid()))\n'
    )
    options = ['--data-dir', str(images), '--model', 'cbam_resnet18', *TINY_TRAIN, '--device-modules', 'write_pid']
    options += ['--model-ema', '--model-ema-decay', '0.5', '--amp', '--amp-dtype', 'bfloat16', '--grad-checkpointing']
    launch = [*TORCHRUN, '-m', 'timm_attn', script('train.py'), *options]

    output: list[str] = []
    with subprocess.Popen(
        [sys.executable, *launch, '--experiment', 'killed', '--epochs', '1000'],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        # SIGTERM, because torchrun passes it on: its processes are in sessions of their own.
        alarm = threading.Timer(TIMEOUT, process.terminate)
        alarm.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if 'Current checkpoints' in line and not any('Current checkpoints' in x for x in output):
                    os.kill(int((tmp_path / 'pid1').read_text()), signal.SIGKILL)
                output.append(line)
            assert process.wait(TIMEOUT) != 0, ''.join(output)
        finally:
            alarm.cancel()
            process.terminate()
    assert 'SIGKILL' in ''.join(output), ''.join(output)
    last = tmp_path / 'out' / 'killed' / 'last.pth.tar'
    assert last.is_file(), ''.join(output)
    epoch = load(last)['epoch'] + 1

    options = ['--resume', str(last), '--experiment', 'resumed', '--epochs', str(epoch + 1)]
    run([*launch, *options], tmp_path, environment)
    (row,) = summary(tmp_path / 'out' / 'resumed')
    assert int(row['epoch']) == epoch
    checkpoint = load(tmp_path / 'out' / 'resumed' / 'last.pth.tar')
    assert checkpoint['epoch'] == epoch
    assert 'layer1.0.se.fc1.weight' in checkpoint['state_dict_ema']
    # EMA averages over what the optimizer moved.
    assert not torch.equal(checkpoint['state_dict']['conv1.weight'], checkpoint['state_dict_ema']['conv1.weight'])

    options = ['--data-dir', str(images / 'validation'), '--model', 'cbam_resnet18', '--num-classes', '2']
    options += ['--checkpoint', str(tmp_path / 'out' / 'resumed' / 'last.pth.tar'), '--use-ema']
    options += ['--img-size', str(SIZE), '-b', '4', '-j', '0', '--device', 'cpu', '--amp', '--amp-dtype', 'bfloat16']
    options += ['--results-file', 'result.csv']
    run(['-m', 'timm_attn', script('validate.py'), *options], tmp_path, environment)
    with open(tmp_path / 'result.csv', encoding='utf-8', newline='') as file:
        (result,) = csv.DictReader(file)
    assert float(result['top1']) == pytest.approx(float(row['eval_top1']), abs=0.01)


def test_benchmark_script_finds_models_by_wildcard(tmp_path: Path, environment: dict[str, str]) -> None:
    options = ['--model', 'simple_cnn_cba*', '--bench', 'infer', '--device', 'cpu', '--img-size', str(SIZE)]
    # Fewer than 5 iterations make it divide by zero.
    options += ['-b', '2', '--num-warm-iter', '1', '--num-bench-iter', '5', '--results-file', 'result.csv']
    run(['-m', 'timm_attn', script('benchmark.py'), *options], tmp_path, environment)
    with open(tmp_path / 'result.csv', encoding='utf-8', newline='') as file:
        (result,) = csv.DictReader(file)
    assert result['model'] == 'simple_cnn_cbam' and float(result['infer_samples_per_sec']) > 0


def need_onnx() -> None:
    for package in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(package)


def check_onnx(path: Path, model: nn.Module) -> None:
    """The file gives the model's outputs in onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    x = torch.randn(2, 3, SIZE, SIZE)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-5)


def test_onnx_script_exports_what_onnxruntime_runs(tmp_path: Path, environment: dict[str, str]) -> None:
    need_onnx()
    torch.manual_seed(0)
    model = timm.create_model('simple_cnn_cbam', num_classes=2).eval()
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'model.pth')
    options = ['model.onnx', '--model', 'simple_cnn_cbam', '--checkpoint', 'model.pth', '--num-classes', '2']
    options += ['--img-size', str(SIZE), '-b', '2', '--check-forward']
    run(['-m', 'timm_attn', script('onnx_export.py'), *options], tmp_path, environment)

    check_onnx(tmp_path / 'model.onnx', model)


def test_scripts_take_injected_models_by_keywords_and_by_folder(
    images: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """validate.py reads a checkpoint into what its keywords build; onnx_export.py, which has none, a folder."""
    need_onnx()
    torch.manual_seed(0)
    small = {'layers': (1, 1, 1, 1), 'channels': (16, 32, 64, 128), 'zero_init_last': False}
    model: Any = timm.create_model(
        'injected', base='resnet18', attn='cbam', at=r'layer[34]', num_classes=2, start='paper', **small
    ).eval()
    # Attention and statistics that are seen in the logits.
    for site in timm_attn.attn_sites(model).values():
        for p in site.parameters():
            nn.init.normal_(p, 0, 0.3)
    for key, buffer in model.named_buffers():
        if key.endswith('running_mean'):
            buffer.normal_(0, 0.1)
        elif key.endswith('running_var'):
            buffer.uniform_(0.5, 1.5)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'model.pth')
    timm_attn.save(model, tmp_path / 'folder')

    options = ['--data-dir', str(images / 'validation'), '--model', 'injected', '--num-classes', '2']
    options += ['--model-kwargs', 'base=resnet18', 'attn=cbam', r'at=layer[34]', 'start=paper']
    options += [f'base_args={small}', '--checkpoint', 'model.pth', '--results-file', 'result.csv']
    options += ['--img-size', str(SIZE), '-b', '4', '-j', '0', '--device', 'cpu', '--crop-pct', '1']
    run(['-m', 'timm_attn', script('validate.py'), *options], tmp_path, environment)
    with open(tmp_path / 'result.csv', encoding='utf-8', newline='') as file:
        (result,) = csv.DictReader(file)
    config = resolve_data_config({'input_size': (3, SIZE, SIZE), 'crop_pct': 1.0}, model=model)
    transform: Any = create_transform(**config)
    files = sorted((images / 'validation').glob('*/*.png'))
    labels = torch.tensor([sorted(COLOURS).index(f.parent.name) for f in files])
    with torch.inference_mode():
        logits = model(torch.stack([transform(Image.open(f)) for f in files]))
    assert float(result['top1']) == 100 * (logits.argmax(1) == labels).float().mean().item()
    assert float(result['param_count']) == round(sum(p.numel() for p in model.parameters()) / 1e6, 2)

    options = ['model.onnx', '--model', 'local-dir:folder', '--img-size', str(SIZE), '-b', '2', '--check-forward']
    run(['-m', 'timm_attn', script('onnx_export.py'), *options], tmp_path, environment)
    check_onnx(tmp_path / 'model.onnx', model)
