"""accelerate: a training step on two processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import timm_attn

pytest.importorskip('accelerate', reason='accelerate is missing (extra ecosystem)')


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
