"""What attention costs: time beside plain timm, in interleaved rounds, and the bytes kept for backward, exactly."""

import argparse
import gc
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from ._checks import atomic_write
from .fusion import fuse
from .fusion._compile import Kernel

MODES = ('inference', 'train')
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16}
BASELINE = 'plain'
OURS = ('eager', 'fused', 'frozen')

Build = Callable[[], nn.Module]


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes alive after a forward pass that were not before it, whoever holds them; the output is among them.

    The sum of the profiler's memory events, every allocation less every release: exact, and the same on every machine.
    The model stays in its mode, so its running statistics move as in any forward pass.

    Args:
        model: Any model.
        x: Its input.
    """
    return sum(_memory_events(lambda: model(x), x.device))


def peak_bytes(model: nn.Module, x: Tensor) -> int:
    """The most bytes alive at any time of a forward and a backward pass, beyond those before it.

    Gradients of parameters and what convolutions work in are among them.

    Args:
        model: Any model.
        x: Its input.
    """

    def step() -> None:
        model(x).float().sum().backward()
        model.zero_grad()

    return max(itertools.accumulate(_memory_events(step, x.device)))


def _memory_events(run: Callable[[], Any], device: torch.device) -> list[int]:
    """Bytes of each allocation, and of each release less than 0, in their order."""
    run()  # pays for what is allocated once
    gc.collect()  # so that nothing of it is released while counting
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        held = run()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events: list[Any] = [
        e
        for e in profile.profiler.kineto_results.events()
        if e.name() == '[memory]' and e.device_type().name.lower() == device.type
    ]
    del held
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


class _Traffic(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # What only looks at a tensor in another way, or makes one without writing to it, moves nothing.
        if not func.is_view and 'empty' not in func.name() and func.name() != 'aten::detach':
            self.count((args, kwargs, out))
        return out

    def count(self, tree: Any) -> None:
        self.bytes += sum(t.numel() * t.element_size() for t in tree_leaves(tree) if isinstance(t, Tensor))


def traffic_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that the operations of a training step read and write, each operand and each result counted once.

    Exact, and the same on every machine; what an operation reads twice and what stays in a cache is not seen. A kernel
    of a fused block is one operation.

    Args:
        model: Any model.
        x: Its input.
    """
    traffic = _Traffic()

    def call(kernel: Kernel, compiled: bool, *args: Any) -> Any:
        with _disable_current_modes():
            out = uncounted(kernel, compiled, *args)
        traffic.count((args, out))
        return out

    uncounted = Kernel.__call__
    with mock.patch.object(Kernel, '__call__', call), traffic:
        model(x).float().sum().backward()
    model.zero_grad()
    return traffic.bytes


def entrants(names: list[str], baseline: str, mode: str, compile: bool = True) -> dict[str, Build]:
    """The plain model, and each model eager and fused: label -> how to build it.

    Args:
        names: Registered models.
        baseline: timm's plain model.
        mode: 'inference', where fused models are frozen too, or 'train'.
        compile: As for `timm_attn.fuse`.
    """

    def fused(name: str, freeze: bool) -> Build:
        return lambda: fuse(timm.create_model(name), freeze=freeze, compile=compile)

    found: dict[str, Build] = {BASELINE: lambda: timm.create_model(baseline)}
    for label, name in [(BASELINE, baseline), *((name, name) for name in names)]:
        if label != BASELINE:
            found[label] = lambda name=name: timm.create_model(name)
        found[f'{label} fused'] = fused(name, False)
        if mode == 'inference':
            found[f'{label} frozen'] = fused(name, True)
    return found


def _clock(device: str) -> float:
    if device == 'cuda':
        torch.cuda.synchronize()
        return time.perf_counter()
    # The time that this process computed: other work on the machine counts less than on the wall's clock.
    return time.process_time()


def _step(model: nn.Module, x: Tensor, mode: str, autocast: AbstractContextManager[Any]) -> None:
    if mode == 'inference':
        with torch.no_grad(), autocast:
            model(x)
        return
    with autocast:
        loss = model(x).float().square().mean()
    loss.backward()
    model.zero_grad()


def rounds_of(
    builds: Mapping[str, Build],
    mode: str,
    *,
    batch: int,
    size: int,
    dtype: str = 'float32',
    rounds: int = 10,
    device: str = 'cpu',
) -> dict[str, dict[str, Any]]:
    """Times all models in turn, round after round, so that what disturbs the machine disturbs all alike.

    Args:
        builds: Label -> how to build the model.
        mode: 'inference' or 'train' (forward and backward).
        batch: Images.
        size: Their side in pixels.
        dtype: 'float32', or 'bfloat16' for autocast.
        rounds: Timed steps of each model.
        device: 'cpu' or 'cuda'.

    Returns:
        Label -> 'seconds' of each round and 'first', the seconds of the first step, compilation included.
    """
    torch.manual_seed(0)
    x = torch.randn(batch, 3, size, size, device=device)
    models = {label: build().to(device).train(mode == 'train') for label, build in builds.items()}

    def step(model: nn.Module) -> None:
        autocast = nullcontext() if dtype == 'float32' else torch.autocast(device, DTYPES[dtype])
        _step(model, x, mode, autocast)

    found: dict[str, dict[str, Any]] = {}
    for label, model in models.items():
        start = time.perf_counter()
        step(model)
        found[label] = {'first': time.perf_counter() - start, 'seconds': []}
        step(model)
    for _ in range(rounds):
        for label, model in models.items():
            start = _clock(device)
            step(model)
            found[label]['seconds'].append(_clock(device) - start)
    return found


def summary(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Median, quartiles and the ratio to the baseline of the same round, median and quartiles too.

    Args:
        found: What `rounds_of` returned.
    """
    base = found[BASELINE]['seconds']
    rows = []
    for label, times in found.items():
        seconds = times['seconds']
        ratios = [t / b for t, b in zip(seconds, base, strict=True)]
        rows.append(
            {
                'model': label,
                'median': statistics.median(seconds),
                'quartiles': _quartiles(seconds),
                'ratio': statistics.median(ratios),
                'ratio_quartiles': _quartiles(ratios),
                'first': times['first'],
            }
        )
    return rows


def kinds(cell: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of a measured cell by their labels without the model's name: 'eager', 'fused', 'plain fused', ...

    Args:
        cell: Of `benchmarks/results/speed.json`: 'attn', 'depth' and the 'rows' of `summary`.
    """
    name = f'{cell["attn"]}_resnet{cell["depth"]}'
    return {
        r['model']
        if r['model'].startswith(BASELINE)
        else r['model'].removeprefix(name).removeprefix(cell['attn']).strip() or 'eager': r
        for r in cell['rows']
    }


def fastest_peer(ratios: Mapping[str, float]) -> str | None:
    """The kind of row, neither ours nor plain, of the least ratio."""
    peers = [k for k in ratios if k not in OURS and not k.startswith(BASELINE)]
    return min(peers, key=ratios.__getitem__) if peers else None


def _quartiles(values: list[float]) -> list[float]:
    if len(values) < 2:
        return values * 2
    low, _, high = statistics.quantiles(values, n=4, method='inclusive')
    return [low, high]


def environment(device: str = 'cpu') -> dict[str, Any]:
    """Versions, the processor's name and the threads: what a number depends on besides the code."""
    name = torch.cuda.get_device_name() if device == 'cuda' else _processor()
    return {
        'device': name,
        'threads': torch.get_num_threads(),
        'python': platform.python_version(),
        'torch': torch.__version__,
        'timm': timm.__version__,
        'capability': torch.backends.cpu.get_cpu_capability(),
        'clock': 'wall' if device == 'cuda' else 'process',
    }


def _processor() -> str:
    info = Path('/proc/cpuinfo')
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith('model name'):
                return line.split(':', 1)[1].strip()
    return platform.processor() or platform.machine()


def add_parser(commands: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Adds the command `bench`."""
    parser = commands.add_parser(
        'bench',
        help='time models beside plain timm, and count the bytes they keep for backward',
        epilog='example: timm-attn bench se_resnet50 cbam_resnet50 --mode train --batch 4',
    )
    parser.add_argument('models', nargs='+', help='registered models, such as cbam_resnet50')
    parser.add_argument('--baseline', default='resnet50', help="timm's plain model (default: resnet50)")
    parser.add_argument('--mode', choices=MODES, default='inference', help='inference or training step')
    parser.add_argument('--batch', type=int, default=4, help='images in a batch (default: 4)')
    parser.add_argument('--size', type=int, default=224, help='side of the images (default: 224)')
    parser.add_argument('--dtype', choices=DTYPES, default='float32', help='bfloat16 is autocast')
    parser.add_argument('--rounds', type=int, default=10, help='timed steps of each model (default: 10)')
    parser.add_argument('--threads', type=int, default=1, help='threads (default: 1)')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--no-compile', action='store_true', help='fuse without torch.compile')
    parser.add_argument('--out', type=Path, help='write the numbers to this JSON file')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """The command `bench`."""
    unknown = [name for name in [args.baseline, *args.models] if not timm.is_model(name)]
    if unknown:
        raise ValueError(f"Unknown models {unknown}. 'timm-attn list' shows those of timm_attn.")
    if args.rounds < 1 or args.batch < 1 or args.size < 32 or args.threads < 1:
        raise ValueError('--rounds, --batch and --threads must be at least 1, and --size at least 32.')
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        builds = entrants(args.models, args.baseline, args.mode, not args.no_compile)
        print(f'{len(builds)} models, {args.rounds} rounds ...', file=sys.stderr)
        rows = summary(
            rounds_of(
                builds,
                args.mode,
                batch=args.batch,
                size=args.size,
                dtype=args.dtype,
                rounds=args.rounds,
                device=args.device,
            )
        )
        if args.mode == 'train' and args.dtype == 'float32':
            x = torch.zeros(args.batch, 3, args.size, args.size, device=args.device)
            for row in rows:
                row['kept_bytes'] = kept_bytes(builds[row['model']]().to(args.device).train(), x)
        report = {'environment': environment(args.device), **_options(args), 'rows': rows}
    finally:
        torch.set_num_threads(threads)
    print(table(rows))
    if args.out:
        with atomic_write(args.out) as path:
            path.write_text(json.dumps(report, indent=1) + '\n')


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {key: getattr(args, key) for key in ('mode', 'baseline', 'batch', 'size', 'dtype', 'rounds')}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of `summary` as aligned text."""
    width = max(len(row['model']) for row in rows)
    kept = any('kept_bytes' in row for row in rows)
    lines = [f'{"model":{width}}  {"ms":>8}  {"ratio":>6}  {"quartiles":>13}' + (f'  {"kept MB":>8}' if kept else '')]
    for row in rows:
        low, high = row['ratio_quartiles']
        line = f'{row["model"]:{width}}  {1e3 * row["median"]:8.1f}  {row["ratio"]:6.3f}  {low:6.3f} {high:6.3f}'
        lines.append(line + (f'  {row["kept_bytes"] / 1e6:8.1f}' if 'kept_bytes' in row else ''))
    return '\n'.join(lines)
