"""Times attention ResNets beside the plain one, torch.compile and the peers, in interleaved rounds.

    python benchmarks/throughput.py --list               # the cells of the plan, and about how long each takes
    python benchmarks/throughput.py --warm               # compiles what torch.compile is to be measured on
    python benchmarks/throughput.py --seconds 220        # measures what the file has not, as far as the time goes
    python benchmarks/throughput.py --attn se cbam --mode train --again
    python benchmarks/throughput.py --smoke              # a cell of each kind, small, nothing written: does it run?

A cell is one run, whose plain model is measured in the same rounds. Cells are written to results/speed.json as they are
done, and those that are there are measured again only with --again, so the plan can be run in pieces.
"""

import argparse
import fcntl
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from peers import peers

import timm_attn
from timm_attn.bench import BASELINE, COMPILED, DTYPES, MODES, Build, entrants, rounds_of, summary, table
from timm_attn.files import atomic_write
from timm_attn.measure import environment

RESULTS = Path(__file__).parent / 'results'
LOCK = Path(tempfile.gettempdir()) / 'timm_attn_throughput.lock'


@dataclass(frozen=True)
class Cell:
    """What is measured in one run. All but the last two fields are the key of its result.

    Attributes:
        attn: One of `list_attn()`, or 'plain' for the plain ResNet in all ways.
        mode: 'inference' or 'train'.
        dtype: 'float32' or 'bfloat16'.
        batch: Images.
        size: Their side in pixels.
        depth: Of the ResNet.
        threads: Threads.
        layout: 'contiguous' or 'channels_last'.
        compiled: Ways of `torch.compile` that are measured too.
        peers: Peers are measured too.
    """

    attn: str
    mode: str
    dtype: str = 'float32'
    batch: int = 4
    size: int = 224
    depth: int = 50
    threads: int = 1
    layout: str = 'contiguous'
    compiled: tuple[str, ...] = ()
    peers: bool = True

    @property
    def key(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k not in ('compiled', 'peers')}

    @property
    def rounds(self) -> int:
        return 5 if self.mode == 'inference' and self.peers else 3

    @property
    def seconds(self) -> float:
        """About how long it takes on a core of 80 GFLOP a second that finds in inductor's cache what is compiled."""
        images = self.batch * (self.size / 224) ** 2 * {18: 0.44, 34: 0.9, 50: 1, 101: 1.9}[self.depth]
        step = 0.12 * images * (3.3 if self.mode == 'train' else 1) * 1.3 / self.threads**0.8
        builds = self.builds()
        compiled = sum(label.endswith(COMPILED) for label in builds)
        return len(builds) * (step * (self.rounds + 1) + 0.5) + (15 if self.mode == 'train' else 8) * compiled + 8

    def builds(self) -> dict[str, Build]:
        """Label -> how to build the model."""
        ways = ['eager', 'fused', *(['frozen'] if self.mode == 'inference' else []), *self.compiled]
        base = f'resnet{self.depth}'
        if self.attn == BASELINE:
            return entrants([], base, ways)
        found = entrants([f'{self.attn}_resnet{self.depth}'], base, ways)
        # The plain model's other ways have a cell of their own.
        found = {k: v for k, v in found.items() if not k.startswith(f'{BASELINE} ')}
        return found | (peers(self.attn, self.depth) if self.peers else {})


def plan() -> Iterator[Cell]:
    """The cells by what they tell a user."""
    usual = ('cbam', 'se', 'triplet')
    # torch.compile of the plain model, of gates by statistics, by maps and by planes, by large convolutions, of
    # self-attention, after stages, in place of a convolution.
    by_compiler = (BASELINE, *usual, 'gam', 'csa', 'bam', 'sk')
    for attn in (*by_compiler, *(a for a in timm_attn.list_attn() if a not in by_compiler)):
        for mode in MODES:
            few = by_compiler if mode == 'inference' else by_compiler[:3]
            compiled = COMPILED if attn in (BASELINE, 'cbam') and mode == 'inference' else COMPILED[:1]
            yield Cell(attn, mode, compiled=compiled if attn in few else ())
    for attn in usual:  # where the calls between passes cost most
        yield Cell(attn, 'inference', batch=1)
        yield Cell(attn, 'inference', size=128)
    for mode in MODES:
        yield Cell('cbam', mode, dtype='bfloat16')
    for attn in usual:
        for mode in MODES:
            yield Cell(attn, mode, threads=2)
    for attn in usual:  # growth with batch and size
        for mode in MODES:
            for batch, size in ((4, 224), (1, 224), (16, 224), (4, 128), (4, 320)):
                yield Cell(attn, mode, batch=batch, size=size, depth=18, peers=False)
    for attn in (BASELINE, *usual[:2]):
        yield Cell(attn, 'inference', layout='channels_last', compiled=COMPILED[:1], peers=False)
    yield Cell('cbam', 'train', layout='channels_last', peers=False)
    for mode in MODES:
        yield Cell('cbam', mode, depth=101, peers=False)
    for mode, batch, size in (('train', 1, 224), ('train', 4, 128), ('train', 4, 320), ('inference', 4, 320)):
        yield Cell('cbam', mode, batch=batch, size=size, peers=False)
    for mode in MODES:
        yield Cell('cbam', mode, batch=32, peers=False)


def measure(cell: Cell, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(cell.threads)
    torch.compiler.reset()  # functions that it compiled for the last cell
    options = {key: getattr(cell, key) for key in ('batch', 'size', 'dtype')}
    found = rounds_of(cell.builds(), cell.mode, rounds=rounds, channels_last=cell.layout == 'channels_last', **options)
    rows = summary(found)
    print(f'\n{title(cell)}\n{table(rows)}', flush=True)
    date = datetime.now(timezone.utc).date().isoformat()
    return {**cell.key, 'rounds': rounds, 'date': date, 'environment': environment(), 'rows': rows}


def warm(cell: Cell) -> None:
    """The first steps of what torch.compile compiles."""
    torch.set_num_threads(cell.threads)
    builds = {label: build for label, build in cell.builds().items() if label.endswith(COMPILED)}
    for label, build in builds.items():
        torch.compiler.reset()
        options = {key: getattr(cell, key) for key in ('batch', 'size', 'dtype')}
        found = rounds_of({label: build}, cell.mode, rounds=0, **options)
        print(f'{title(cell)}: {label} {found[label]["first"]:.0f} s', flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding='utf-8')) if path.exists() else []


def key_of(measured: dict[str, Any]) -> dict[str, Any]:
    """The key of the cell that a result is of."""
    return {k: measured.get(k) for k in Cell('', '').key}


def part(text: str) -> tuple[int, int]:
    """'2/3' as numbers."""
    i, n = map(int, text.split('/'))
    if not 1 <= i <= n:
        raise ValueError
    return i, n


def title(cell: Cell) -> str:
    return (
        f'{cell.attn} at depth {cell.depth}, {cell.mode}, {cell.dtype}, batch {cell.batch}, {cell.size} pixels, '
        f'{cell.threads} thread(s), {cell.layout}'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--list', action='store_true', help='print the plan; measure nothing')
    parser.add_argument('--warm', action='store_true', help='compile for torch.compile, and measure nothing')
    parser.add_argument('--seconds', type=float, default=float('inf'), help='begin no cell that would end later')
    parser.add_argument('--attn', nargs='+', choices=[BASELINE, *timm_attn.list_attn()], help='cells of these alone')
    parser.add_argument('--mode', nargs='+', choices=MODES, help='cells of these alone')
    parser.add_argument('--dtype', nargs='+', choices=DTYPES, help='cells of these alone')
    parser.add_argument('--part', type=part, default=(1, 1), metavar='I/N', help='every Nth cell: N commands at once')
    parser.add_argument('--at-once', type=int, default=1, help='how many such commands run, for the record')
    parser.add_argument('--threads', nargs='+', type=int, help='cells of so many threads alone')
    parser.add_argument('--no-torch-compile', action='store_true', help='leave out its rows, and its minutes')
    parser.add_argument('--rounds', type=int, help='instead of the 3 or 5 of the plan')
    parser.add_argument('--out', type=Path, default=RESULTS / 'speed.json')
    parser.add_argument('--again', action='store_true', help='measure cells that the file has already')
    parser.add_argument('--smoke', action='store_true', help='one round of small cells without a compiler, not written')
    args = parser.parse_args()
    start = time.monotonic()
    chosen = [
        c
        for c in plan()
        if all(
            getattr(args, k) is None or getattr(c, k) in getattr(args, k) for k in ('attn', 'mode', 'dtype', 'threads')
        )
    ]
    if args.smoke:
        small = [Cell('se', 'train', depth=18), Cell('simam', 'inference', layout='channels_last')]
        for cell in small:
            measure(replace(cell, batch=2, size=64), 1)
        return
    if args.no_torch_compile:
        chosen = [replace(c, compiled=()) for c in chosen if c.attn != BASELINE]
    chosen = chosen[args.part[0] - 1 :: args.part[1]]
    left = chosen if args.again else [c for c in chosen if c.key not in map(key_of, read(args.out))]
    if args.list:
        for cell in chosen:
            state = '' if cell in left else ', there'
            print(f'{title(cell)}: {len(cell.builds())} models, {cell.rounds} rounds, {cell.seconds:.0f} s{state}')
        print(f'{len(chosen)} cells, {sum(c.seconds for c in left) / 60:.0f} minutes to go')
        return
    late = 0
    for cell in left:
        if args.warm:
            warm(cell)
            continue
        if time.monotonic() - start + cell.seconds > args.seconds:
            late += 1
            continue
        new = measure(cell, args.rounds or cell.rounds) | {'at_once': max(args.at_once, args.part[1])}
        with LOCK.open('w') as lock:  # of the parts that run beside this one
            fcntl.flock(lock, fcntl.LOCK_EX)
            cells = [c for c in read(args.out) if key_of(c) != cell.key] + [new]
            with atomic_write(args.out) as path:
                path.write_text(json.dumps(cells, indent=1) + '\n')
    if late:
        print(f'{late} cells are left: run the command again.', file=sys.stderr)


if __name__ == '__main__':
    main()
