"""DistributedDataParallel: gradients of 2 processes equal those of one on the joined batch, for each attention.

Models are eager and fused; one has attention behind convolutions, blocks and stages. The file is also the script that
each of the 2 processes runs.
"""

import os
import socket
import subprocess
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import timm_attn

TIMEOUT = 300
PROCESSES = 2
# What is added to all that a softmax compares changes nothing, and its gradient is 0 but for rounding.
BEFORE_SOFTMAX = ('.conv_attn.bias', '.phi.bias')
OUTPUTS = 'outputs'


def names() -> list[str]:
    """What `build` builds: each attention, and those that `inject` puts behind modules."""
    return [*timm_attn.list_attn(), OUTPUTS]


def build(name: str, seed: int) -> nn.Module:
    """A narrow ResNet with one block per stage and this attention, in float64, BatchNorm in eval."""
    inject = name == OUTPUTS
    name = 'resnet18' if inject else name
    arch = name if inject else f'{name}_resnet18' if timm.is_model(f'{name}_resnet18') else f'{name}_resnet50'
    torch.manual_seed(seed)
    small: dict[str, Any] = dict(layers=(1, 1, 1, 1), channels=(64, 128, 192, 256), zero_init_last=False)
    model = timm.create_model(arch, num_classes=3, **small).double().eval()
    if inject:
        timm_attn.inject(model, 'cbam', at=r'layer\d')  # the last child of an nn.Sequential
        timm_attn.inject(model, 'eca', at=r'layer\d\.0', where='output')  # a hook
        timm_attn.inject(model, 'se', at=r'layer\d\.0\.conv2')
        assert len(timm_attn.attn_sites(model)) == 12
    with torch.no_grad():
        # Away from zero starts, which would hide a gradient.
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
        # Small weights and positive biases, so that no narrow bottleneck is dead behind its ReLU.
        for site in timm_attn.attn_sites(model).values():
            for p in site.parameters():
                if p.ndim > 1:
                    p.mul_(0.1)
                else:
                    p.abs_().add_(0.5)
    return model


def batch() -> tuple[Tensor, Tensor]:
    """Images (4, 3, 64, 64) and their classes (4); the last map has more than one pixel, which some gates need."""
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, torch.tensor([0, 1, 2, 0])


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Gradients of the mean cross-entropy by parameter; parameters without one are left out."""
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return {k.removeprefix('module.'): p.grad for k, p in model.named_parameters() if p.grad is not None}


def work(rank: int, folder: Path) -> None:
    """What process `rank` does: gradients of its half of the batch, averaged by DDP, written to RANK.pt."""
    store = (folder / 'store').as_uri()
    timeout = timedelta(seconds=TIMEOUT)
    distributed.init_process_group('gloo', store, rank=rank, world_size=PROCESSES, timeout=timeout)
    x, y = (t.chunk(PROCESSES)[rank] for t in batch())
    found = {}
    for name in names():
        for label, change in (name, nn.Identity()), (f'{name} fused', partial(timm_attn.fuse, compile=False)):
            # Other weights on rank 1, which DDP has to replace by those of rank 0.
            model = DistributedDataParallel(change(build(name, seed=rank)), find_unused_parameters=False)
            gradients(model, x, y)
            # The second forward raises if a parameter was not used in the first.
            found[label] = gradients(model, x, y)
    torch.save(found, folder / f'{rank}.pt')
    distributed.destroy_process_group()


def test_gradients_of_two_processes_equal_those_of_one_on_the_joined_batch(tmp_path: Path) -> None:
    # The repository itself, so that the processes import the package that this one does.
    paths = [str(Path(timm_attn.__file__).parents[1]), os.environ.get('PYTHONPATH', '')]
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, paths)), 'OMP_NUM_THREADS': '1'}
    env['CUDA_VISIBLE_DEVICES'] = ''
    if 'lo' in [name for _, name in socket.if_nameindex()]:
        env['GLOO_SOCKET_IFNAME'] = 'lo'
    logs = [tmp_path / f'{rank}.log' for rank in range(PROCESSES)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, log in enumerate(logs):
            with open(log, 'wb') as file:
                command = [sys.executable, __file__, str(rank), str(tmp_path)]
                processes.append(
                    subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
                )
        # In the meantime, what one process finds.
        models = {name: build(name, seed=0) for name in names()}
        expected = {name: gradients(model, *batch()) for name, model in models.items()}
        codes = [process.wait(TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0] * PROCESSES, '\n'.join(log.read_text(errors='replace') for log in logs)

    for rank in range(PROCESSES):
        found = torch.load(tmp_path / f'{rank}.pt', weights_only=True)
        assert set(found) == {label for name in expected for label in (name, f'{name} fused')}
        for label in found:
            name = label.removesuffix(' fused')
            reference = expected[name]
            parameters = [k for k, _ in models[name].named_parameters()]
            assert list(reference) == parameters and list(found[label]) == parameters, f'{label}: unused parameters'
            for key, grad in reference.items():
                if not key.endswith(BEFORE_SOFTMAX):
                    assert grad.abs().max() > 0, f'{label}: no gradient reaches {key}'
                torch.testing.assert_close(
                    found[label][key], grad, rtol=1e-9, atol=1e-12, msg=lambda m, at=f'{label} {key}': f'{at}: {m}'
                )


if __name__ == '__main__':
    work(int(sys.argv[1]), Path(sys.argv[2]))
