"""What float16 and bfloat16 cost each attention in accuracy, against float64 on the same device.

    python benchmarks/half.py                  # CPU, about a minute; writes results/half_cpu.json
    python benchmarks/half.py --device cuda    # writes results/half_cuda.json

Each cell: one module with random weights and living BatchNorms, the relative error ||y - y64|| / ||y64|| of its output
and of the gradients of its input and of its parameters, under autocast and as a model of that type. The input's
spread is 1, 30 and 300: float16 ends at 65504, so squares and sums overflow early. float64 gets the rounded input and,
for a model of half type, the rounded weights, so that the error is that of the arithmetic. The gradient that
comes in is divided by the spread, as a loss scaler would keep it inside float16; no scaler saves a gate that saturates.
"""

import argparse
import copy
import json
import math
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor, nn

import timm_attn
from timm_attn.files import atomic_write
from timm_attn.lab.tables import markdown_table
from timm_attn.measure import environment

RESULTS = Path(__file__).parent / 'results'
CHANNELS, SIZE, BATCH = 256, 28, 8
SPREADS = (1, 30, 300)
DTYPES = {'float16': torch.float16, 'bfloat16': torch.bfloat16}


def living(name: str, device: str) -> nn.Module:
    """The attention in float32 with weights and statistics that hide nothing."""
    torch.manual_seed(0)
    module = timm_attn.create_attn(name, CHANNELS)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(0, 0.2)  # type: ignore[union-attr]
                m.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
                if m.affine:
                    nn.init.uniform_(m.weight, 0.5, 1.5)
    return module.to(device).eval()


def gradients(module: nn.Module, x: Tensor, gy: Tensor, autocast: torch.dtype | None) -> tuple[Tensor, ...]:
    """Output, gradient of the input, gradients of the parameters as one vector; all in float64."""
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
        y = module(x)
    parameters = list(module.parameters())
    found = torch.autograd.grad(y, [x, *parameters], gy.to(y.dtype), allow_unused=True, materialize_grads=True)
    return (
        y.detach().double(),
        found[0].double(),
        torch.cat([g.double().flatten() for g in found[1:]] or [y.new_zeros(1)]),
    )


def gap(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||; infinite where a is not finite."""
    if not a.isfinite().all():
        return math.inf
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--attn', nargs='+', choices=timm_attn.list_attn(), default=timm_attn.list_attn())
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    cells = []
    for name in args.attn:
        module = living(name, args.device)
        for kind, dtype in DTYPES.items():
            half = copy.deepcopy(module).to(dtype)
            for spread in SPREADS:
                torch.manual_seed(1)
                x = (torch.randn(BATCH, CHANNELS, SIZE, SIZE) * spread).to(args.device, dtype)
                gy = (torch.randn(x.shape) / spread).to(args.device, dtype)
                for way, low, exact in (
                    ('autocast', module, copy.deepcopy(module).double()),
                    ('model', half, copy.deepcopy(half).double()),
                ):
                    got = gradients(low, x, gy, dtype if way == 'autocast' else None)
                    want = gradients(exact, x.double(), gy.double(), None)
                    errors = [gap(a, b) for a, b in zip(got, want, strict=True)]
                    parts = dict(zip(('output', 'input gradient', 'parameter gradients'), errors, strict=True))
                    cells.append({'attn': name, 'dtype': kind, 'spread': spread, 'way': way, 'errors': parts})
    header = ['attention', 'type', 'way', *(f'{s}: output, gx, gw' for s in SPREADS)]
    rows = []
    for name in args.attn:
        for kind in DTYPES:
            for way in ('autocast', 'model'):
                mine = [c for c in cells if (c['attn'], c['dtype'], c['way']) == (name, kind, way)]
                rows.append([name, kind, way, *(', '.join(f'{e:.1e}' for e in c['errors'].values()) for c in mine)])
    print(markdown_table(header, rows))
    report = {
        'command': f'python benchmarks/half.py --device {args.device}',
        'date': datetime.now(timezone.utc).date().isoformat(),
        'environment': environment(args.device),
        'input': [BATCH, CHANNELS, SIZE, SIZE],
        'cells': cells,
    }
    out = args.out or RESULTS / f'half_{args.device}.json'
    with atomic_write(out) as path:
        path.write_text(json.dumps(report, indent=1) + '\n')


if __name__ == '__main__':
    main()
