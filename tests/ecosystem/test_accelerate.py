"""accelerate: a training step on two processes, offloading, and filling an empty model."""

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

import timm_attn

accelerate = pytest.importorskip('accelerate', reason='accelerate is missing (extra ecosystem)')


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    root = str(Path(timm_attn.__file__).parents[1])
    environment = {
        **os.environ,
        'PYTHONPATH': os.pathsep.join([root, os.environ.get('PYTHONPATH', '')]),
        'OMP_NUM_THREADS': '1',
        'HF_HOME': str(tmp_path),
        'ACCELERATE_USE_CPU': 'true',
        'GLOO_SOCKET_IFNAME': 'lo',
    }
    script = Path(__file__).with_name('accelerate_step.py')
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--nproc_per_node=2',
            '--master_addr=127.0.0.1',
            f'--master_port={port}',
            str(script),
            str(tmp_path / 'result.json'),
        ],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / 'result.json').read_text())
    assert result['processes'] == 2 and result['steps'] == 2 and result['sites'] == 8
    assert result['wrapper'] == 'DistributedDataParallel'
    assert result['sums'][0] == pytest.approx(result['sums'][1], rel=1e-12)


def test_offload_and_dispatch_carry_the_gain(tmp_path: Path) -> None:
    """Both set tensors one by one, by the names and the shapes that the attributes of modules have."""
    torch.manual_seed(0)
    base = timm.create_model('resnet18', layers=(1, 1, 1, 1), zero_init_last=False).eval()
    model: Any = timm_attn.inject(base, 'bam')
    model.layer1[1].gain = 0.5
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = model(x)
    safetensors.torch.save_file(model.state_dict(), tmp_path / 'model.safetensors', {'format': 'pt'})
    with accelerate.init_empty_weights():
        empty: Any = timm_attn.inject(timm.create_model('resnet18', layers=(1, 1, 1, 1)), 'bam').eval()
    empty = accelerate.load_checkpoint_and_dispatch(empty, str(tmp_path / 'model.safetensors'), device_map={'': 'cpu'})
    assert empty.layer1[1].gain == 0.5 and empty.layer2[1].gain == torch.tensor(2 / 3)
    with torch.no_grad():
        torch.testing.assert_close(empty(x), want)
        for whole in (False, True):
            offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device='cpu', offload_buffers=whole)
            torch.testing.assert_close(offloaded(x), want, rtol=0, atol=0)
