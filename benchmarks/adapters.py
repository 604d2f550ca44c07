"""Sizes of adapters beside their models: `python benchmarks/adapters.py`.

Each attention is injected into a ResNet-50 of random weights, which have the size of any others, and saved as an
adapter with the base's head; beside it, the bytes of all weights in one file.
"""

import argparse
import copy
import json
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import safetensors.torch
import timm

import timm_attn
from timm_attn.files import atomic_write
from timm_attn.measure import environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--base', default='resnet50')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent / 'results/adapters.json')
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    base: Any = timm.create_model(args.base)
    for name in timm_attn.list_attn():
        try:
            model = timm_attn.inject(copy.deepcopy(base), name)
        except ValueError as e:
            print(f'{name}: {e}')
            continue
        with tempfile.TemporaryDirectory() as folder:
            timm_attn.save(model, folder, adapter=True, base=base, card=False)
            config = json.loads(Path(folder, 'config.json').read_text(encoding='utf-8'))
            sizes = {'adapter': Path(folder, 'adapter.safetensors').stat().st_size}
        sizes['whole'] = len(safetensors.torch.save(model.state_dict()))
        rows.append({'attention': name, 'numbers': config['timm_attn']['adapter']['numbers'], **sizes})
        print(rows[-1], flush=True)
    record = {
        'command': 'python benchmarks/adapters.py',
        'date': date.today().isoformat(),
        'environment': environment(),
        'base': args.base,
        'rows': rows,
    }
    with atomic_write(args.out) as path:
        path.write_text(json.dumps(record, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
