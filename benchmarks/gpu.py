"""Times attention ResNet-50s on a GPU: eager, torch.compile, fused and the peers, in interleaved rounds.

    python benchmarks/gpu.py --budget 150            # results/gpu.json, written after every cell; goes on there
    python benchmarks/gpu.py --device cpu --smoke    # does it run? A minute, nothing written

224 pixels, batch 64, bfloat16 autocast, channels_last. First all models of the next cells are compiled side by side in
processes of their own, which fills inductor's cache, for at most --warm seconds; what torch.compile has not compiled by
then has no row. Then each cell (attention, mode) is one run whose plain model is measured in the same rounds, by CUDA
events around --steps steps. After the first cells, blocks alone: what a fused block takes beyond its convolutions,
against the time in which the GPU copies the bytes that must be read and written once.

The peers are those that are installed; pure Python, they can be brought along:
`pip install --no-deps --target DIR timm==1.0.31 pytorchcv==0.0.74 fightingcv-attention==1.0.0` and PYTHONPATH.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import timm
import torch
from peers import peers
from torch import Tensor, nn

import timm_attn
from timm_attn.bench import BASELINE, DTYPES, MODES, Build, autocast, entrants, rounds_of, summary, table
from timm_attn.files import atomic_write
from timm_attn.measure import environment, seconds

RESULTS = Path(__file__).parent / 'results'
FIRST = ('se', 'cbam', 'triplet', 'eca', 'coord', 'gam')
BLOCKS = (('layer1.1', 56), ('layer3.1', 14))


def plan(args: argparse.Namespace) -> list[tuple[str, str]]:
    """The cells (attention, mode) by what they tell."""
    rest = [a for a in timm_attn.list_attn() if a not in FIRST]
    groups = [FIRST[:3], FIRST[3:], rest] if not args.attn else [args.attn]
    return [(attn, mode) for group in groups for mode in ('train', 'inference') for attn in group]


def builds_of(attn: str, mode: str, ready: dict[str, float], args: argparse.Namespace) -> dict[str, Build]:
    """The models of a cell: plain, ours in each way, torch.compile where that is ready, and the peers."""
    name, base = f'{attn}_resnet{args.depth}', f'resnet{args.depth}'
    # A smoke test is of this file, not of inductor.
    compiler = {'compile': False, 'backend': 'eager'} if args.smoke else {}
    ways = ('eager', 'fused', 'compiled') if mode == 'train' else ('eager', 'fused', 'frozen', 'compiled')
    found = entrants([name], base, ways, **compiler)
    for label in [label for label in found if label.startswith(BASELINE + ' ') or label.endswith(' compiled')]:
        if f'{mode} {label}' not in ready:
            del found[label]
    return found | peers(attn, args.depth)


def jobs_of(cells: list[tuple[str, str]], compiled: int) -> list[tuple[str, str, str]]:
    """(attention or 'plain', mode, way) to be compiled; torch.compile, which takes longest, first, in a few cells."""
    by_compiler = [(label, mode, 'compiled') for attn, mode in cells[:compiled] for label in (BASELINE, attn)]
    ours = [(attn, mode, way) for attn, mode in cells for way in ('fused', 'frozen')[: 1 + (mode == 'inference')]]
    return list(dict.fromkeys([*by_compiler, *ours]))


def compile_one(job: str, args: argparse.Namespace) -> None:
    """One step of one model, for what inductor writes to its cache."""
    attn, mode, way = job.split(':')
    name, base = f'{attn}_resnet{args.depth}', f'resnet{args.depth}'
    builds = entrants([] if attn == BASELINE else [name], base, [way])
    label = f'{BASELINE if attn == BASELINE else name} {way}'
    found = rounds_of({label: builds[label]}, mode, rounds=0, **options(args))
    print(f'{found[label]["first"]:.1f}')


def warm(cells: list[tuple[str, str]], args: argparse.Namespace) -> dict[str, float]:
    """Compiles in processes side by side; 'label mode' of what is ready -> seconds of its first step, cold."""
    ready: dict[str, float] = {}
    queue = jobs_of(cells, args.compiled) if args.warm else []
    environ = {**os.environ, 'TORCHINDUCTOR_COMPILE_THREADS': '4'}
    running: list[tuple[tuple[str, str, str], subprocess.Popen[str]]] = []
    end = time.monotonic() + args.warm
    while (queue or running) and time.monotonic() < end:
        while queue and len(running) < args.workers:
            job = queue.pop(0)
            command = [sys.executable, __file__, '--compile-one', ':'.join(job), '--device', args.device]
            command += [f'--{key}={getattr(args, key)}' for key in ('depth', 'batch', 'size', 'dtype')]
            running.append((job, subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ)))
        time.sleep(0.1)
        for entry in [entry for entry in running if entry[1].poll() is not None]:
            running.remove(entry)
            (attn, mode, way), process = entry
            assert process.stdout is not None
            lines = process.stdout.read().split()
            if process.returncode:
                print(f'{attn} {mode} {way} cannot be compiled', file=sys.stderr)
                continue
            label = BASELINE if attn == BASELINE else f'{attn}_resnet{args.depth}'
            ready[f'{mode} {label} {way}'] = float(lines[-1])
    for _, process in running:
        process.kill()
        process.wait()
    return ready


def options(args: argparse.Namespace) -> dict[str, Any]:
    """What all cells have alike."""
    keys = ('batch', 'size', 'dtype', 'device')
    return {key: getattr(args, key) for key in keys} | {'channels_last': True}


def cell(attn: str, mode: str, ready: dict[str, float], args: argparse.Namespace) -> dict[str, Any]:
    """Measures one attention in one mode."""
    builds = builds_of(attn, mode, ready, args)
    found = rounds_of(builds, mode, rounds=args.rounds, steps=args.steps, **options(args))
    ready.pop(f'{mode} {BASELINE} compiled', None)  # once a mode
    rows = summary(found)
    for row in rows:
        row |= {key: found[row['model']][key] for key in ('peak_bytes',) if key in found[row['model']]}
        cold = ready.get(f'{mode} {row["model"]}')
        if cold is not None:
            row['cold'] = cold
    print(f'\n{attn}, {mode}\n{table(rows)}', flush=True)
    return {'attn': attn, 'mode': mode, 'rows': rows}


def bandwidth(device: str, size: int) -> float:
    """Bytes a second that a copy reads and writes."""
    x = torch.zeros(size // 4, device=device)
    y = torch.empty_like(x)
    y.copy_(x)
    return 2 * size / min(seconds(lambda: y.copy_(x), device) for _ in range(10))


def block_row(attn: str, name: str, side: int, mode: str, rate: float, args: argparse.Namespace) -> dict[str, Any]:
    """A fused block alone: its time beyond its convolutions', and the least that its passes between them can take.

    Read and written once: each BatchNorm with its ReLU reads a map and writes one, the end of the block reads the last
    convolution's output and the shortcut and writes the output. Backwards each BatchNorm reads its input and a gradient
    and writes one, and the end reads both maps and the gradient and writes two. Statistics, for which a map has to be
    read before, are counted as nothing, as are recomputed maps: what is left is a bound for any implementation.
    """
    with torch.device(args.device):
        model = timm.create_model('resnet50' if attn == BASELINE else f'{attn}_resnet50')
    train = mode == 'train'
    model = timm_attn.fuse(model, compile=not args.smoke).train(train).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    block = model.get_submodule(name)
    convs = [m for m in (block.conv1, block.conv2, block.conv3) if isinstance(m, nn.Conv2d)]
    dtype = DTYPES[args.dtype]

    def image(channels: int) -> Tensor:
        x = torch.randn(args.batch, channels, side, side, device=args.device, dtype=dtype)
        return x.to(memory_format=torch.channels_last).requires_grad_(train)

    outs = [image(m.out_channels).detach() for m in convs]
    todo: dict[str, list[tuple[nn.Module, Tensor, Tensor]]] = {
        'block': [(block, image(convs[0].in_channels), outs[-1])],
        'convolutions': [(m, image(m.in_channels), g) for m, g in zip(convs, outs, strict=True)],
    }

    def run(parts: list[tuple[nn.Module, Tensor, Tensor]]) -> None:
        for _ in range(args.steps):
            for module, x, g in parts:
                with torch.set_grad_enabled(train), autocast(args.device, args.dtype):
                    y = module(x)
                if train:
                    y.backward(g.to(y.dtype))
                    x.grad = None
                    module.zero_grad()

    times: dict[str, list[float]] = {key: [] for key in todo}
    for i in range(args.rounds + 1):
        for key, parts in todo.items():
            took = seconds(lambda parts=parts: run(parts), args.device) / args.steps
            if i:  # the first compiles
                times[key].append(took)
    whole, alone = (statistics.median(times[key]) for key in todo)
    inner = sum(m.out_channels for m in convs[:-1]) / convs[-1].out_channels
    maps = 2 * inner + 3 + (3 * inner + 5) * train
    moved = int(maps * outs[-1].numel() * outs[-1].element_size())
    return {
        'attn': attn,
        'mode': mode,
        'block': name,
        'block_seconds': whole,
        'convolution_seconds': alone,
        'bytes': moved,
        'bound_seconds': moved / rate,
        'over_bound': (whole - alone) / (moved / rate),
    }


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--device', choices=('cpu', 'cuda'), default='cuda')
    p.add_argument('--budget', type=float, default=150, help='seconds after which no cell begins (default: 150)')
    p.add_argument('--warm', type=float, default=75, help='seconds of them for compiling beforehand (default: 75)')
    p.add_argument('--workers', type=int, default=8, help='processes that compile (default: 8)')
    p.add_argument('--compiled', type=int, default=6, help='torch.compile in the first cells only (default: 6)')
    p.add_argument('--attn', nargs='+', choices=timm_attn.list_attn(), help='these instead of the plan')
    p.add_argument('--depth', type=int, choices=(50, 101), default=50)
    p.add_argument('--batch', type=int, default=64)
    p.add_argument('--size', type=int, default=224)
    p.add_argument('--dtype', choices=('float32', 'bfloat16'), default='bfloat16')
    p.add_argument('--rounds', type=int, default=6)
    p.add_argument('--steps', type=int, default=3, help='steps between two events (default: 3)')
    p.add_argument('--out', type=Path, default=RESULTS / 'gpu.json')
    p.add_argument('--again', action='store_true', help='measure cells that the file has already')
    p.add_argument('--smoke', action='store_true', help='two cells and three blocks of two small images, not written')
    p.add_argument('--compile-one', metavar='ATTN:MODE:WAY', help=argparse.SUPPRESS)
    return p


def main() -> None:
    args = parser().parse_args()
    torch.set_num_threads(1)
    if args.compile_one:
        return compile_one(args.compile_one, args)
    start = time.monotonic()
    if args.smoke:
        args.batch, args.size, args.rounds, args.steps, args.warm = 2, 64, 2, 1, 0
    report: dict[str, Any] = {'cells': [], 'blocks': []}
    if args.out.exists() and not args.smoke and not args.again:
        report = json.loads(args.out.read_text())
    report |= {
        'command': f'python benchmarks/gpu.py --budget {args.budget:g}',
        'date': datetime.now(timezone.utc).date().isoformat(),
        'environment': environment(args.device) | {'cuda': torch.version.cuda, 'clock': 'events'},
        'batch': args.batch,
        'size': args.size,
        'depth': args.depth,
        'dtype': args.dtype,
        'layout': 'channels_last',
        'rounds': args.rounds,
        'steps': args.steps,
    }

    def save() -> None:
        if not args.smoke:
            with atomic_write(args.out) as path:
                path.write_text(json.dumps(report, indent=1) + '\n')

    def late() -> bool:
        return time.monotonic() - start > args.budget

    rate = report['copy_bytes_per_second'] = bandwidth(args.device, 1 << (22 if args.smoke else 30))
    save()
    there = {(c['attn'], c['mode']) for c in report['cells'] if 'rows' in c}
    cells = [c for c in plan(args) if c not in there]
    blocks = [(a, mode, *b) for mode in ('inference', 'train') for b in BLOCKS for a in (BASELINE, *FIRST)]
    done = {(b['attn'], b['mode'], b['block']) for b in report['blocks']}
    blocks = [b for b in blocks if (b[0], b[1], b[2]) not in done]
    if args.smoke:
        cells, blocks = [('se', 'train'), ('cbam', 'inference')], blocks[:2] + blocks[-1:]
    ready = warm(cells, args)
    if args.smoke:
        ready = {f'{mode} {label} compiled': 0.0 for mode in MODES for label in (BASELINE, 'se_resnet50')}
    print(f'{len(ready)} compiled after {time.monotonic() - start:.0f} s', file=sys.stderr)

    def measure(todo: list[tuple[str, str]]) -> None:
        for attn, mode in todo:
            if late():
                print(f'{attn} {mode} is left out: --budget is spent', file=sys.stderr)
                continue
            torch.compiler.reset()
            try:
                found = cell(attn, mode, ready, args)
            except Exception as e:  # one attention that fails must not cost the others
                found = {'attn': attn, 'mode': mode, 'error': f'{type(e).__name__}: {e}'[:2000]}
                print(f'{attn} {mode}: {found["error"]}', file=sys.stderr)
            report['cells'] = [c for c in report['cells'] if (c['attn'], c['mode']) != (attn, mode)] + [found]
            save()

    first = [c for c in cells if c[0] in FIRST[:3]]
    measure(first)
    for attn, mode, name, side in blocks:
        if late():
            break
        try:
            row = block_row(attn, name, side, mode, rate, args)
        except Exception as e:
            print(f'block {name} of {attn}, {mode}: {type(e).__name__}: {e}', file=sys.stderr)
            continue
        report['blocks'].append(row)
        save()
        print(
            f'{attn:8} {mode:9} {name}: block {1e3 * row["block_seconds"]:.3f} ms, convolutions '
            f'{1e3 * row["convolution_seconds"]:.3f}, bound {1e3 * row["bound_seconds"]:.3f}, '
            f'passes over bound {row["over_bound"]:.2f}',
            flush=True,
        )
    measure([c for c in cells if c not in first])


if __name__ == '__main__':
    main()
