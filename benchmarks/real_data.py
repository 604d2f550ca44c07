"""The four comparisons on Fashion-MNIST, by as many processes as there are cores, on one GPU or none.

    PYTHONPATH=. python benchmarks/real_data.py --out runs/real --data-dir fashion-mnist \
        --weights mobilenet_v2-b0353104.pth --device cuda --jobs 15 --seconds 360

se-lab: `compare --preset se-lab`. cbam-order: CBAM's three orders. identity_start: see
identity_start.py. fashion-attn: every attention in one small ResNet. Each process does the comparisons in turn, and in
each the runs that no other is at, so that the first comparisons are whole first, and of each the first seeds; what is
left when the time is over goes on with the same command. The records are packed every minute.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

# ResNet-50's blocks, one for each stage, since sk and gsop stand in no others; widths that all fit. Half the images'
# size, so that a core does all in an hour.
NET = '--img-size 14 --cifar-stem --model-kwargs layers=[1,1,1,1] channels=[32,64,96,128]'
FASHION = '--data fashion-mnist --opt adamw --lr 4e-3 --weight-decay 0.05 --warmup-epochs 1'
TRAIN, TEST, EPOCHS = 1600, 2000, 4  # Images, but for se-lab.


def commands(scale: float, device: str, data_dir: str | None) -> dict[str, list[str]]:
    """Arguments of `timm-attn compare` by folder.

    Args:
        scale: Part of the images and, where it is small, of the epochs.
        device: 'cpu' or 'cuda'.
        data_dir: Fashion-MNIST's folder, where Debian's package is not installed.
    """
    from timm_attn import list_attn

    cbam = [f"{order}=cbam_resnet50:attn_args={{'order':'{order}'}}" for order in ORDERS]
    attn = [f'{name}={name}_resnet50' for name in list_attn()]
    batch = '32' if scale > 0.1 else '16'
    images = f'{max(50, round(TRAIN * scale))},{max(50, round(TEST * scale))}'
    sizes = ['--images', images, '--batch-size', batch, '--epochs', str(max(2, round(EPOCHS * min(1, 4 * scale))))]
    lab = ['--preset', 'se-lab']
    if scale < 1:
        lab += [
            '--images',
            f'{round(60000 * scale)},{round(10000 * scale)}',
            '--epochs',
            str(max(1, round(60 * scale))),
        ]
    common = ['--device', device, *(['--data-dir', data_dir] if data_dir else [])]
    shared = [*NET.split(), *FASHION.split(), *sizes, *common]
    return {
        'se-lab': [*lab, *common],
        'cbam-order': ['--models', ','.join(cbam), *shared],
        'fashion-attn': ['--models', ','.join(['plain=resnet50', *attn]), *shared],
    }


ORDERS = ('channel-spatial', 'spatial-channel', 'parallel')
# What is done in turn: a folder, and up to how many seeds. What comes after the first four only narrows intervals.
TURNS = (
    ('se-lab', 5),
    ('cbam-order', 8),
    ('identity_start', 5),
    ('fashion-attn', 5),
    ('cbam-order', 12),
    ('se-lab', 10),
    ('fashion-attn', 8),
)


def turns(text: str | None) -> list[tuple[str, int]]:
    """Reads NAME:SEEDS,NAME:SEEDS."""
    if not text:
        return list(TURNS)
    return [(name, int(seeds)) for name, _, seeds in (t.partition(':') for t in text.split(','))]


def work(args: argparse.Namespace) -> None:
    """One process: its share of all comparisons."""
    import torch

    from timm_attn.cli.compare import from_arguments
    from timm_attn.cli.main import build_parser
    from timm_attn.lab.compare import compare

    torch.set_num_threads(1)
    ways = commands(args.scale, args.device, args.data_dir)
    for name, seeds in turns(args.turns):
        out = args.out / name
        if name == 'identity_start':
            identity(args, out, seeds)
            continue
        argv = ['compare', *ways[name], '--seeds', str(seeds), '--out', str(out)]
        sys.argv = ['timm-attn', *argv]  # What a record names as its command.
        parsed = build_parser().parse_args(argv)
        compare(from_arguments(parsed), out, progress=False)
        print(f'worker {args.worker}: {name} up to {seeds} seeds, {time.time() - args.began:.0f} s', flush=True)


def identity(args: argparse.Namespace, out: Path, seeds: int) -> None:
    """The share of identity_start.py: a process fits the classifier of one seed, then of others for what is left."""
    if args.weights is None:
        return
    import identity_start

    if args.scale < 1:
        identity_start.SETTINGS.update(train=max(128, round(1600 * args.scale)), val=max(100, round(2000 * args.scale)))
    for i in range(seeds):
        argv = ['--weights', str(args.weights), '--out', str(out), '--device', args.device]
        argv += ['--seed', str((args.worker + i) % seeds), *(['--data-dir', args.data_dir] if args.data_dir else [])]
        sys.argv = ['benchmarks/identity_start.py', *argv]
        identity_start.main(argv)
    print(f'worker {args.worker}: identity_start, {time.time() - args.began:.0f} s', flush=True)


def pack(out: Path, tar_path: Path) -> None:
    """Packs all records and logs, whole or not at all."""
    temporary = tar_path.with_name('unfinished.tar.gz')
    with tarfile.open(temporary, 'w:gz') as tar:
        for path in sorted(out.rglob('*')):
            if path.suffix in ('.json', '.log') and path.is_file():
                tar.add(path, path.relative_to(out))
    os.replace(temporary, tar_path)


def drive(args: argparse.Namespace) -> None:
    """Starts the processes, packs every minute, and ends them when the time is over."""
    began = time.time()
    folder = args.out
    folder.mkdir(parents=True, exist_ok=True)
    own = [sys.executable, __file__, *sys.argv[1:], '--began', str(began)]
    environ = os.environ | dict(OMP_NUM_THREADS='1', CUBLAS_WORKSPACE_CONFIG=':4096:8')
    workers = []
    for i in range(args.jobs):
        with open(folder / f'worker{i}.log', 'ab') as log:
            workers.append(subprocess.Popen([*own, '--worker', str(i)], stdout=log, stderr=log, env=environ))
    packed = began
    try:
        while any(w.poll() is None for w in workers) and time.time() - began < args.seconds:
            time.sleep(1)
            if time.time() - packed > 60:
                pack(args.out, args.tar or args.out / 'results.tar.gz')
                packed = time.time()
                print(f'{packed - began:.0f} s:', *counts(folder), flush=True)
    finally:
        for w in workers:
            w.kill()
            w.wait()
        pack(args.out, args.tar or args.out / 'results.tar.gz')
        print(f'{time.time() - began:.0f} s:', *counts(folder), [w.returncode for w in workers], flush=True)
        for path in sorted(folder.glob('worker*.log')):
            print(path.name, *path.read_text(errors='replace').splitlines()[-3:], sep='\n  ')


def counts(folder: Path) -> list[str]:
    """How many runs of each comparison are done."""
    return [f'{p.parent.name}={len(list(p.glob("*.json")))}' for p in sorted(folder.glob('*/runs'))]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, required=True)
    p.add_argument('--data-dir', help="Fashion-MNIST's folder, where Debian's package is not installed")
    p.add_argument('--weights', type=Path, help="torchvision's mobilenet_v2-b0353104.pth; without, no identity_start")
    p.add_argument('--device', default='cpu', help='cpu or cuda')
    p.add_argument('--jobs', type=int, default=os.cpu_count(), help='processes')
    p.add_argument('--seconds', type=float, default=float('inf'), help='when to end; the same command goes on')
    p.add_argument('--scale', type=float, default=1.0, help='part of the images, and of the epochs')
    p.add_argument('--tar', type=Path, help='where the records are packed (default: OUT/results.tar.gz)')
    p.add_argument('--turns', metavar='NAME:SEEDS,...', help='what is done, in turn (default: all)')
    p.add_argument('--worker', type=int, help=argparse.SUPPRESS)
    p.add_argument('--began', type=float, help=argparse.SUPPRESS)
    args = p.parse_args()
    drive(args) if args.worker is None else work(args)


if __name__ == '__main__':
    main()
