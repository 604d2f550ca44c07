"""Times every attention ResNet-50 beside the plain one and beside its peers, in interleaved rounds.

    python benchmarks/throughput.py                      # all cells, about an hour on one core
    python benchmarks/throughput.py --attn se cbam --mode train --dtype float32
    python benchmarks/throughput.py --attn se cbam --size 128 --depth 18   # how cost grows
    python benchmarks/throughput.py --smoke              # one round, nothing written: does it run?

Each cell (attention, mode, type) is one run whose baseline is measured in the same rounds. Cells are written to
results/speed.json as they are done; those that are there already are measured again only with --again.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from peers import peers

import timm_attn
from timm_attn.bench import DTYPES, MODES, entrants, rounds_of, summary, table
from timm_attn.files import atomic_write
from timm_attn.measure import environment

RESULTS = Path(__file__).parent / 'results'
KEY = ('attn', 'mode', 'dtype', 'batch', 'size', 'depth')


def cell(attn: str, mode: str, dtype: str, args: argparse.Namespace) -> dict[str, object]:
    name = f'{attn}_resnet{args.depth}'
    builds = entrants([name], f'resnet{args.depth}', mode)
    if (args.depth, args.size) == (50, 224):  # pytorchcv's models take no other size
        builds |= peers(attn)
    found = rounds_of(
        builds, mode, batch=args.batch, size=args.size, dtype=dtype, rounds=args.rounds, device=args.device
    )
    rows = summary(found)
    title = f'{name}, {mode}, {dtype}, batch {args.batch}, {args.size} pixels'
    print(f'\n{title}\n{table(rows)}', flush=True)
    return {
        'attn': attn,
        'mode': mode,
        'dtype': dtype,
        'batch': args.batch,
        'size': args.size,
        'depth': args.depth,
        'rounds': args.rounds,
        'environment': environment(args.device),
        'rows': rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--attn', nargs='+', choices=timm_attn.list_attn(), default=timm_attn.list_attn())
    parser.add_argument('--mode', nargs='+', choices=MODES, default=list(MODES))
    parser.add_argument('--dtype', nargs='+', choices=DTYPES, default=list(DTYPES))
    parser.add_argument('--batch', type=int, default=4)
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--depth', type=int, default=50)
    parser.add_argument('--rounds', type=int, default=10)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--out', type=Path, default=RESULTS / 'speed.json')
    parser.add_argument('--again', action='store_true', help='measure cells that the file has already')
    parser.add_argument('--smoke', action='store_true', help='two images, one round, nothing written')
    args = parser.parse_args()
    if args.smoke:
        args.batch, args.rounds = 2, 1
    torch.set_num_threads(args.threads)
    cells = json.loads(args.out.read_text()) if args.out.exists() and not args.smoke else []
    for attn in args.attn:
        for mode in args.mode:
            for dtype in args.dtype:
                key = (attn, mode, dtype, args.batch, args.size, args.depth)
                same = [c for c in cells if tuple(c[k] for k in KEY) == key]
                if same and not args.again:
                    print(f'{key} is there', file=sys.stderr)
                    continue
                cells = [c for c in cells if c not in same] + [cell(attn, mode, dtype, args)]
                if not args.smoke:
                    with atomic_write(args.out) as path:
                        path.write_text(json.dumps(cells, indent=1) + '\n')


if __name__ == '__main__':
    main()
