"""Whether fused models compute on a GPU what unfused ones compute in float64, and in how many kernels.

    python benchmarks/gpu_check.py                          # all attentions on one GPU, less than 150 seconds
    python benchmarks/gpu_check.py --attn se cbam --jobs 1
    python benchmarks/gpu_check.py --device cpu --smoke     # does it run? nothing is written without --out

Each attention is one of a few processes' work, since most of the time is spent on compiling. Settings are tried in the
order of SETTINGS until the time is up; what was not reached is listed. Errors are relative, of the whole vector of
gradients and of the output, beside those of the unfused model in the same precision.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

import timm_attn
from timm_attn.files import atomic_write
from timm_attn.fusion.compile import observe_kernels
from timm_attn.measure import environment

RESULTS = Path(__file__).parent / 'results'
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
SETTINGS = [
    ('float32', 'contiguous'),
    ('bfloat16', 'channels_last'),
    ('float16', 'channels_last'),
    ('bfloat16', 'contiguous'),
    ('float32', 'channels_last'),
    ('float16', 'contiguous'),
]
SIZES = (64, 128)
# How much worse than the unfused model of the same precision a fused one may be, and the least error that is looked at.
WORSE, LEAST = 2.0, {'float32': 2e-5, 'bfloat16': 2e-2, 'float16': 4e-3}


def build(attn: str) -> nn.Module:
    """A float64 model of one block a stage, nothing of which is at its start."""
    names = set(timm.list_models(f'{attn}_resnet*'))
    name = next(n for depth in (18, 34, 50) if (n := f'{attn}_resnet{depth}') in names)
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, layers=(1, 1, 1, 1)).double()
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) and m.affine:
            nn.init.uniform_(m.weight, 0.5, 1.5)
            cast(Tensor, m.running_mean).normal_(0, 0.1)
            cast(Tensor, m.running_var).uniform_(0.5, 2)
    return model


def step(model: nn.Module, x: Tensor, autocast: AbstractContextManager[Any]) -> dict[str, Tensor]:
    """Output and gradients, flat and in float64."""
    model.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with autocast:
        y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=torch.float64).view_as(y)
    (y.double() * weights).sum().backward()
    grads = [g for g in (x.grad, *[p.grad for p in model.parameters()]) if g is not None]
    return {'output': y.detach().double(), 'gradients': torch.cat([g.double().flatten() for g in grads])}


def gaps(ours: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    return {k: ((ours[k] - v).norm() / v.norm()).item() for k, v in want.items()}


def prepared(model: nn.Module, device: str, layout: str) -> nn.Module:
    model = copy.deepcopy(model).float().to(device)
    return model.to(memory_format=torch.channels_last) if layout == 'channels_last' else model


def laid(x: Tensor, layout: str) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if layout == 'channels_last' else x


def autocast_of(device: str, dtype: str) -> AbstractContextManager[Any]:
    return nullcontext() if dtype == 'float32' else torch.autocast(device, DTYPES[dtype])


def compare(attn: str, dtype: str, layout: str, device: str, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Errors of the fused and of the unfused model at each size, in training and in inference."""
    reference = build(attn).to(device)
    eager = prepared(reference, device, layout)
    fused = timm_attn.fuse(prepared(reference, device, layout))
    rows: list[dict[str, Any]] = []
    for size in sizes:
        x = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
        want = step(reference.train(), x, nullcontext())
        single = laid(x.float(), layout)
        row: dict[str, Any] = {'size': size}
        for label, model in (('eager', eager), ('fused', fused)):
            row[label] = gaps(step(model.train(), single, autocast_of(device, dtype)), want)
        with torch.no_grad():
            known = reference.eval()(x)
            for label, model in (('eager', eager), ('fused', fused)):
                with autocast_of(device, dtype):
                    got = model.eval()(single)
                row[label]['inference'] = ((got.double() - known).norm() / known.norm()).item()
        row['ok'] = all(row['fused'][k] <= max(LEAST[dtype], WORSE * v) for k, v in row['eager'].items())
        rows.append(row)
    return rows


def graph_gap(attn: str, dtype: str, layout: str, size: int) -> float:
    """Relative difference of a captured and replayed inference to the same model called with other images."""
    model = timm_attn.fuse(prepared(build(attn), 'cuda', layout)).eval()
    x = laid(torch.randn(4, 3, size, size, device='cuda'), layout)
    with torch.no_grad(), autocast_of('cuda', dtype):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                model(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        want = model(x)
    return ((y.double() - want.double()).norm() / want.double().norm()).item()


def kernels_of(attn: str, dtype: str, layout: str, device: str, size: int) -> dict[str, Any]:
    """What one training step of the first block of the second stage calls: our kernels, and all of a GPU's."""
    counts: dict[str, Any] = {}
    for label in ('eager', 'fused'):
        model = prepared(build(attn), device, layout)
        model = timm_attn.fuse(model) if label == 'fused' else model
        block = model.train().get_submodule('layer2.0')
        conv = next(m for m in block.modules() if isinstance(m, nn.Conv2d))
        x = laid(torch.randn(4, conv.in_channels, size // 4, size // 4, device=device), layout).requires_grad_()

        def once(block: nn.Module = block, x: Tensor = x) -> None:
            with autocast_of(device, dtype):
                y = block(x)
            y.sum().backward()

        once()
        if label == 'fused':
            ours: Counter[str] = Counter()
            with observe_kernels(lambda k, *_, ours=ours: ours.update([getattr(k, '__name__', '?')])):
                once()
            counts['ours'] = dict(ours)
        if device == 'cuda':
            torch.cuda.synchronize()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                once()
                torch.cuda.synchronize()
            found = Counter(e.name for e in profile.events() or () if e.device_type == torch.autograd.DeviceType.CUDA)
            counts[label] = sum(found.values())
            counts[f'{label} by name'] = {k[:80]: n for k, n in found.most_common()}
    return counts


def work(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All settings of the given attentions, until the time is up."""
    deadline = args.deadline or time.time() + args.budget
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    sizes = SIZES[:1] if args.smoke else SIZES
    rows: list[dict[str, Any]] = []
    tasks = [('compare', a, s) for s in SETTINGS[:2] for a in args.attn]
    if not args.smoke:
        tasks += [('kernels', a, SETTINGS[1]) for a in args.attn]
        if args.device == 'cuda':
            tasks += [('graph', a, SETTINGS[1]) for a in args.attn]
        tasks += [('compare', a, s) for s in SETTINGS[2:] for a in args.attn]
    for what, attn, (dtype, layout) in tasks:
        row: dict[str, Any] = {'what': what, 'attn': attn, 'dtype': dtype, 'layout': layout}
        rows.append(row)
        if time.time() > deadline:
            row['skipped'] = 'no time'
            continue
        start = time.perf_counter()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            try:
                if what == 'compare':
                    row['sizes'] = compare(attn, dtype, layout, args.device, sizes)
                elif what == 'graph':
                    row['gap'] = graph_gap(attn, dtype, layout, SIZES[0])
                else:
                    row['kernels'] = kernels_of(attn, dtype, layout, args.device, SIZES[0])
            except Exception as e:
                row['error'] = f'{type(e).__name__}: {next(iter(str(e).splitlines()), "")[:300]}'
                row['traceback'] = traceback.format_exc()
        row['warnings'] = sorted({str(w.message)[:300] for w in seen if 'timm_attn' in str(w.message)})
        row['seconds'] = time.perf_counter() - start
        args.part.write_text(json.dumps(rows))  # what is done stays, should the next crash the process
    return rows


def line(row: dict[str, Any]) -> str:
    head = f'{row["what"]:8}{row["attn"]:8}{row["dtype"]:9}{row["layout"]:14}'
    if 'error' in row:
        return f'{head}ERROR {row["error"]}'
    if 'gap' in row:
        return f'{head}{"ok " if row["gap"] < 1e-2 else "BAD"} {row["gap"]:.1e}'
    if 'kernels' in row:
        k = row['kernels']
        gpu = f'{k.get("eager")} kernels unfused, {k.get("fused")} fused'
        return f'{head}a step of a block: {gpu}, {sum(k["ours"].values())} calls of ours'
    if 'sizes' in row:
        cells = [
            f'{s["size"]} px {"ok " if s["ok"] else "BAD"} '
            + ' '.join(f'{k[:4]} {s["fused"][k]:.1e}/{v:.1e}' for k, v in s['eager'].items())
            for s in row['sizes']
        ]
        return (
            f'{head}{row["seconds"]:5.1f} s  ' + '; '.join(cells) + ''.join(f'  WARNING {w}' for w in row['warnings'])
        )
    return f'{head}{row.get("skipped", "?")}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--attn', nargs='+', choices=timm_attn.list_attn(), default=timm_attn.list_attn())
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cuda')
    parser.add_argument('--jobs', type=int, default=7, help='processes')
    parser.add_argument('--budget', type=float, default=125, help='seconds after which nothing new is begun')
    parser.add_argument('--out', type=Path)
    parser.add_argument('--smoke', action='store_true', help='one size, two settings')
    parser.add_argument('--part', type=Path, help=argparse.SUPPRESS)
    parser.add_argument('--deadline', type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        work(args)
        return
    deadline = time.time() + args.budget
    out = args.out or (None if args.smoke else RESULTS / 'gpu_check.json')
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        parts = [Path(folder, f'{i}.json') for i in range(min(args.jobs, len(args.attn)))]
        children = []
        for i, part in enumerate(parts):
            command = [sys.executable, __file__, '--device', args.device, '--part', part, '--deadline', deadline]
            command += ['--attn', *args.attn[i :: len(parts)], *(['--smoke'] if args.smoke else [])]
            env = {'TORCHINDUCTOR_COMPILE_THREADS': '2', **os.environ}
            with part.with_suffix('.log').open('w', encoding='utf-8') as log:
                children.append(subprocess.Popen([str(c) for c in command], env=env, stderr=log))
        for i, (child, part) in enumerate(zip(children, parts, strict=True)):
            try:
                code = child.wait(max(deadline + 20 - time.time(), 0.1))
            except subprocess.TimeoutExpired:
                child.kill()
                code = 'too slow'
            rows += json.loads(part.read_text()) if part.exists() else []
            if code:
                log = part.with_suffix('.log').read_text(encoding='utf-8')
                print(f'process {i} ({" ".join(args.attn[i :: len(parts)])}): {code}\n{log[-1500:]}')
    order = {key: i for i, key in enumerate(SETTINGS)}
    rows.sort(key=lambda r: (r['what'], order[r['dtype'], r['layout']], r['attn']))
    print('errors relative to float64: fused/unfused of the output, of all gradients, of the output in inference')
    print('\n'.join(map(line, rows)))
    kinds: dict[str, str] = {}
    for row in rows:
        if 'error' in row:
            kinds.setdefault(row['error'][:60], f'{row["attn"]} {row["dtype"]} {row["layout"]}\n{row["traceback"]}')
    for shown in kinds.values():
        print(f'\n{shown[:200]}...{shown[-2500:]}')
    bad = [r for r in rows if 'error' in r or not all(s['ok'] for s in r.get('sizes', [])) or r.get('gap', 0) >= 1e-2]
    print(f'{len(rows)} rows, {len(bad)} bad, {sum("skipped" in r for r in rows)} not reached')
    if out:
        meta = {'environment': environment(args.device), 'date': time.strftime('%Y-%m-%d'), 'sizes': SIZES, 'batch': 4}
        with atomic_write(out) as file:
            file.write_text(json.dumps({**meta, 'rows': rows}, indent=1) + '\n')
    sys.exit(bool(bad))


if __name__ == '__main__':
    main()
