"""timm's train.py on two hosts: two network namespaces with a cable between them, on one Linux machine.

    TIMM_SCRIPTS=~/pytorch-image-models python benchmarks/two_hosts.py     # as root; writes results/two_hosts.json

Each host has its own address and sees nothing but the cable. A short and a long run tell the bytes that one training
step sends; the short one is run again by two processes on one host, which must end in the same weights.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image

import timm_attn
from timm_attn.files import atomic_write
from timm_attn.measure import environment

RESULTS = Path(__file__).parent / 'results'
NET = '10.213.77'
SIZE, BATCH = 64, 8
PORT = 29400
HEADER, SEGMENT = 66, 1448  # Ethernet, IPv4 and TCP with timestamps; the data of 1,500 bytes.


def sh(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def two_hosts() -> Iterator[list[str]]:
    """Two network namespaces, joined by a veth pair; host i has the address NET.(i + 1) on its end `eth`.

    Raises:
        PermissionError: This user may not make them.
    """
    names = [f'attn-{os.getpid()}-{i}' for i in range(2)]
    try:
        try:
            for name in names:
                sh('ip', 'netns', 'add', name)
            sh('ip', '-n', names[0], 'link', 'add', 'eth', 'type', 'veth', 'peer', 'name', 'eth', 'netns', names[1])
            for i, name in enumerate(names):
                sh('ip', '-n', name, 'addr', 'add', f'{NET}.{i + 1}/24', 'dev', 'eth')
                for link in ('lo', 'eth'):
                    sh('ip', '-n', name, 'link', 'set', link, 'up')
        except (OSError, subprocess.CalledProcessError) as e:
            reason = e.stderr.strip() if isinstance(e, subprocess.CalledProcessError) else e
            raise PermissionError(f'Two network namespaces want root and iproute2: {reason}') from e
        yield names
    finally:
        for name in names:
            with contextlib.suppress(OSError):
                subprocess.run(['ip', 'netns', 'del', name], capture_output=True)


def make_images(folder: Path, count: int) -> Path:
    """`count` images to learn from and 16 to measure, of two classes that differ in colour."""
    g = torch.Generator().manual_seed(0)
    for split, n in (('train', count), ('validation', 16)):
        for label, colour in {'blue': (40, 60, 200), 'red': (200, 60, 40)}.items():
            (folder / split / label).mkdir(parents=True)
            for i in range(n // 2):
                pixels = torch.tensor(colour) + torch.randint(-40, 40, (SIZE, SIZE, 3), generator=g)
                image = Image.fromarray(pixels.clamp(0, 255).to(torch.uint8).numpy())
                image.save(folder / split / label / f'{label}{i}.png')
    return folder


def train(hosts: list[str], script: Path, model: str, images: Path, out: Path, processes: int = 1) -> Path:
    """Runs torchrun on each host and returns the checkpoint.

    Args:
        hosts: Namespaces; none is this machine as it is.
        script: timm's train.py.
        model: Of timm or timm_attn.
        images: Folder with train and validation.
        out: Where train.py writes; the hosts share it, as machines share a file system.
        processes: On each host.
    """
    options = [
        *('--data-dir', str(images), '--model', model, '--num-classes', '2', '--img-size', str(SIZE), '-b', str(BATCH)),
        *('--epochs', '1', '--warmup-epochs', '0', '--lr', '0.01', '--device', 'cpu', '-j', '0', '--no-prefetcher'),
        *('--output', str(out), '--experiment', 'run', '--seed', '1'),
    ]
    running = []
    for rank, host in enumerate(hosts or ['']):
        if host:
            launch = [
                *('ip', 'netns', 'exec', host, sys.executable, '-m', 'torch.distributed.run', '--nnodes=2'),
                *(f'--node-rank={rank}', f'--nproc-per-node={processes}', f'--local-addr={NET}.{rank + 1}'),
                *(f'--master-addr={NET}.1', f'--master-port={PORT}'),
            ]
        else:
            launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--local-addr=127.0.0.1']
            launch += [f'--nproc-per-node={processes}']
        env = {**os.environ, 'OMP_NUM_THREADS': '1', 'GLOO_SOCKET_IFNAME': 'eth' if host else 'lo'}
        # What is imported is this package, wherever Python is started.
        env['PYTHONPATH'] = os.pathsep.join([str(Path(timm_attn.__file__).parents[1]), env.get('PYTHONPATH', '')])
        command = [*launch, '-m', 'timm_attn', str(script), *options]
        log = (out.parent / f'{out.name}-{rank}.log').open('w+', encoding='utf-8')
        running.append((subprocess.Popen(command, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL), log))
    failed = ''
    for process, log in running:
        try:
            if process.wait(300):
                log.seek(0)
                failed += log.read()[-3000:]
        finally:
            process.kill()
            log.close()
    if failed:
        raise RuntimeError(f'train.py failed:\n{failed}')
    return out / 'run' / 'last.pth.tar'


def sent(host: str) -> int:
    """Bytes that a host has sent over the cable, each once: without headers, and without what TCP sent again.

    How many segments share a header, and how many are sent again, is a matter of load: a few percent in all.
    """
    counted = json.loads(sh('ip', '-n', host, '-s', '-j', 'link', 'show', 'eth'))[0]['stats64']['tx']
    names, values = (
        line.split()
        for line in sh('ip', 'netns', 'exec', host, 'cat', '/proc/net/snmp').splitlines()
        if line.startswith('Tcp:')
    )
    again = int(dict(zip(names, values, strict=True))['RetransSegs'])
    return counted['bytes'] - HEADER * counted['packets'] - SEGMENT * again


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(checkpoint, weights_only=True)['state_dict']


def demonstrate(script: Path, model: str, steps: tuple[int, int], folder: Path) -> dict[str, Any]:
    """What two runs of so many steps send, and whether one host ends in the same weights.

    Args:
        script: timm's train.py.
        model: Of timm or timm_attn.
        steps: Of the short and the long run.
        folder: For images and checkpoints.
    """
    with two_hosts() as hosts:
        found, checkpoints = [], []
        for i, n in enumerate(steps):
            images = make_images(folder / f'images{i}', n * BATCH * 2)
            before = [sent(h) for h in hosts]
            start = time.perf_counter()
            checkpoints.append(train(hosts, script, model, images, folder / f'out{i}'))
            seconds = round(time.perf_counter() - start, 1)
            found.append(
                {'steps': n, 'sent': [sent(h) - b for h, b in zip(hosts, before, strict=True)], 'wall': seconds}
            )
    alone = train([], script, model, folder / 'images0', folder / 'alone', processes=2)
    one, two = weights(alone), weights(checkpoints[0])
    built = timm.create_model(model, num_classes=2)
    per_step = [(b - a) / (steps[1] - steps[0]) for a, b in zip(found[0]['sent'], found[1]['sent'], strict=True)]
    return {
        'model': model,
        'runs': found,
        'parameter_bytes': 4 * sum(p.numel() for p in built.parameters()),
        'buffer_bytes': sum(b.numel() * b.element_size() for b in built.buffers()),
        'sent_per_step': per_step,
        'same_weights_as_one_host': one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['cbam_resnet18'])
    parser.add_argument('--steps', type=int, nargs=2, default=(2, 6))
    parser.add_argument('--out', type=Path, default=RESULTS / 'two_hosts.json')
    args = parser.parse_args()
    scripts = os.environ.get('TIMM_SCRIPTS')
    if not scripts:
        parser.error("TIMM_SCRIPTS must name a folder with timm's train.py.")
    report = {
        'command': 'python benchmarks/two_hosts.py',
        'date': time.strftime('%Y-%m-%d'),
        'environment': environment(),
        'batch': [2, BATCH, SIZE],
        'models': [],
    }
    for model in args.models:
        with tempfile.TemporaryDirectory() as folder:
            report['models'].append(demonstrate(Path(scripts) / 'train.py', model, args.steps, Path(folder)))
        print(json.dumps(report['models'][-1]), flush=True)
    with atomic_write(args.out) as path:
        path.write_text(json.dumps(report, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
