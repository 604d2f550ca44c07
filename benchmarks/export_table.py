"""What every attention exports to, with what error, and what int8 costs in accuracy.

    nice -n 19 python benchmarks/export_table.py [--skip aotinductor] [--only se cbam]

Writes benchmarks/results/export.json and, from it, export.md. Each format is exported once from a batch of 2 x 96 x 80
and checked on sizes that the export has not seen. Accuracy: small ResNets trained here on scikit-learn's digits, then
quantised by onnxruntime (static, per channel, calibrated on training images).
"""

import argparse
import io
import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

import timm_attn
from timm_attn.layers import Attention

RESULTS = Path(__file__).parent / 'results'
INPUTS = ((1, 64, 64), (3, 224, 224), (2, 64, 128), (2, 160, 72), (1, 97, 131))
# The smallest registered model of each attention, one block a stage: what is exported is the attention.
RESNETS = {'sk': 'sk_resnext50_32x4d'} | {name: f'{name}_resnet50' for name in ('fca', 'gsop')}
DIGITS = ('plain', 'se', 'cbam', 'bam', 'gam', 'eca', 'srm', 'triplet', 'csa')

Run = Callable[[Tensor], Tensor]


def build(name: str) -> nn.Module:
    """A model with random attention in a state in which all of it counts."""
    torch.manual_seed(0)
    model = timm.create_model(RESNETS.get(name, f'{name}_resnet18'), layers=(1, 1, 1, 1), num_classes=10)
    for module in model.modules():
        if isinstance(module, Attention):
            for p in module.parameters():
                nn.init.normal_(p, std=1.0 if p.ndim == 1 else (2 / p[0].numel()) ** 0.5)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0.5)
    return spread(model.eval().requires_grad_(False))


def spread(model: nn.Module) -> nn.Module:
    """Scales the classifier so that logits differ by about 0.2 between images: of equal ones any format is right.

    Not by more, since features differ by a thousandth of their size in some nets, and the scale enlarges rounding too.
    """
    head = model.get_classifier()  # pyright: ignore[reportCallIssue]
    nn.init.normal_(head.weight)  # pyright: ignore[reportAttributeAccessIssue,reportArgumentType]
    nn.init.zeros_(head.bias)  # pyright: ignore[reportAttributeAccessIssue,reportArgumentType]
    out = model(images(16, 64, 64, seed=99))
    with torch.no_grad():
        head.weight *= (0.2 / out.std(0))[:, None]  # pyright: ignore[reportAttributeAccessIssue]
        head.bias -= 0.2 * out.mean(0) / out.std(0)  # pyright: ignore[reportAttributeAccessIssue]
    return model


def images(n: int, h: int, w: int, seed: int) -> Tensor:
    """Blobs of colour and some noise; pure noise looks the same everywhere to a net that pools."""
    g = torch.Generator().manual_seed(seed)
    blobs = nn.functional.interpolate(torch.randn(n, 3, 3, 4, generator=g), (h, w), mode='bilinear')
    return 2 * blobs + 0.3 * torch.randn(n, 3, h, w, generator=g)


def program_of(model: nn.Module, size: tuple[int, ...] = (2, 3, 96, 80)) -> torch.export.ExportedProgram:
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    return torch.export.export(model, (torch.randn(size),), dynamic_shapes=(free,))


def torch_export(model: nn.Module, folder: Path) -> Run:
    torch.export.save(program_of(model), folder / 'model.pt2')
    return torch.export.load(folder / 'model.pt2').module()


def onnx(model: nn.Module, folder: Path) -> Run:
    return session(write_onnx(model, folder / 'model.onnx'))


def torchscript(model: nn.Module, folder: Path) -> Run:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(model), buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


def aotinductor(model: nn.Module, folder: Path) -> Run:
    path = torch._inductor.aoti_compile_and_package(program_of(model), package_path=str(folder / 'model.aot.pt2'))
    return torch._inductor.aoti_load_package(path)


FORMATS: dict[str, Callable[[nn.Module, Path], Run]] = {
    'torch.export': torch_export,
    'onnx': onnx,
    'torchscript': torchscript,
    'aotinductor': aotinductor,
}


def write_onnx(model: nn.Module, path: Path, size: tuple[int, ...] = (2, 3, 96, 80)) -> Path:
    found = torch.onnx.export(program_of(model, size), dynamo=True, verbose=False)
    if found is None:
        raise RuntimeError('torch.onnx.export gave nothing')
    found.save(str(path))
    return path


def session(path: Path) -> Run:
    import onnxruntime

    run = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    name = run.get_inputs()[0].name
    return lambda x: torch.from_numpy(run.run(None, {name: x.numpy()})[0])


def measure(name: str, kind: str) -> dict[str, Any]:
    """One attention in one format: the largest difference, or the error."""
    model = build(name)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = FORMATS[kind](model, Path(folder))
            seconds = time.perf_counter() - start
            worst = 0.0
            for i, (n, h, w) in enumerate(INPUTS):
                x = images(n, h, w, seed=i)
                worst = max(worst, float((run(x) - model(x)).abs().max()))
        except Exception as e:  # a table of what works must show what does not
            return {'ok': False, 'error': f'{type(e).__name__}: {str(e).splitlines()[0][:200]}'}
    return {'ok': worst <= 1e-4, 'max_difference': worst, 'export_seconds': round(seconds, 1)}


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data: Any = load_digits()
    x = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    x = nn.functional.interpolate(x, 16, mode='bilinear')
    split = train_test_split(np.arange(len(x)), test_size=0.4, random_state=0, stratify=data.target)
    y = torch.from_numpy(data.target)
    return x[split[0]], y[split[0]], x[split[1]], y[split[1]]


def quantised(name: str, epochs: int) -> dict[str, Any]:
    """Accuracy on digits in float32 and in int8, both by onnxruntime."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    x, y, x_test, y_test = digits()
    torch.manual_seed(0)
    small = {'layers': (1, 1, 1, 1), 'channels': (16, 32, 64, 128), 'num_classes': 10, 'in_chans': 1}
    if name == 'plain':
        from timm_attn.models.attn_resnet import cifar_stem_

        model = cifar_stem_(timm.create_model('resnet18', **small))  # pyright: ignore[reportArgumentType]
    else:
        model = timm.create_model(f'{name}_resnet18', cifar_stem=True, **small)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0.05)
    steps = epochs * (len(x) // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(x))[: len(x) // 32 * 32].split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[chosen]), y[chosen], label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
    model.eval().requires_grad_(False)

    class Calibration(CalibrationDataReader):
        def __init__(self, name: str) -> None:
            self.batches = iter([{name: b.numpy()} for b in x[:256].split(32)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f'{n}.onnx' for n in ('float', 'ready', 'int8')]
        write_onnx(model, paths[0], (2, 1, 16, 16))
        import onnxruntime

        entry = onnxruntime.InferenceSession(str(paths[0]), providers=['CPUExecutionProvider']).get_inputs()[0].name
        quant_pre_process(str(paths[0]), str(paths[1]), skip_symbolic_shape=True)
        quantize_static(
            str(paths[1]),
            str(paths[2]),
            Calibration(entry),
            per_channel=True,
            reduce_range=False,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        logits = [session(p)(x_test) for p in (paths[0], paths[2])]
        right = [int((out.argmax(1) == y_test).sum()) for out in logits]
        # A program is one file or a file of weights beside it.
        sizes = [sum(f.stat().st_size for f in Path(folder).glob(f'{p.name}*')) for p in (paths[0], paths[2])]
    return {
        'float32': 100 * right[0] / len(y_test),
        'int8': 100 * right[1] / len(y_test),
        'test_images': len(y_test),
        'other_labels': int((logits[0].argmax(1) != logits[1].argmax(1)).sum()),
        'mean_logit_change': float((logits[0] - logits[1]).abs().mean() / logits[0].abs().mean()),
        'float32_bytes': sizes[0],
        'int8_bytes': sizes[1],
        'epochs': epochs,
    }


def versions() -> dict[str, str]:
    import onnx
    import onnxruntime
    import onnxscript

    return {
        'python': platform.python_version(),
        'torch': torch.__version__,
        'timm': timm.__version__,
        'onnx': onnx.__version__,
        'onnxscript': onnxscript.__version__,
        'onnxruntime': onnxruntime.__version__,
        'machine': platform.machine(),
        'date': time.strftime('%Y-%m-%d'),
    }


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    kinds = list(FORMATS)
    lines = [
        'Largest difference from the logits of the eager float32 model, which vary by about 0.2 between images, on '
        f'{len(INPUTS)} sizes (N x H x W: {", ".join("x".join(map(str, s)) for s in INPUTS)}) that the export has not '
        'seen. Batch, height and width are free; sides below 33 px are refused by exports of nets whose last map is '
        '1 x 1 there, as those of timm are.',
        '',
        f'| attention | model | {" | ".join(kinds)} |',
        f'|---|---|{"---|" * len(kinds)}',
    ]
    for name, row in result['exports'].items():
        cells = [_cell(row['formats'].get(k)) for k in kinds]
        lines.append(f'| {name} | {row["model"]} | {" | ".join(cells)} |')
    if result['digits']:
        first = next(iter(result['digits'].values()))
        lines += [
            '',
            f'Accuracy on {first["test_images"]} held-out digits, one seed, before and after static int8 quantisation '
            'by onnxruntime. One image is '
            f'{100 / first["test_images"]:.2f} points: this shows what breaks, not what is better.',
            '',
            '| attention | float32 % | int8 % | other labels | mean change of logits | float32 KiB | int8 KiB |',
            '|---|---|---|---|---|---|---|',
        ]
        for n, r in result['digits'].items():
            cells = (
                [r['error'], *[''] * 5]
                if 'error' in r
                else [
                    f'{r["float32"]:.2f}',
                    f'{r["int8"]:.2f}',
                    str(r['other_labels']),
                    f'{100 * r["mean_logit_change"]:.1f} %',
                    f'{r["float32_bytes"] >> 10}',
                    f'{r["int8_bytes"] >> 10}',
                ]
            )
            lines.append(f'| {n} | {" | ".join(cells)} |')
    runs: dict[str, list[str]] = {}
    for kind in ('exports', 'digits'):
        for name, row in result[kind].items():
            v = ', '.join(f'{k} {of}' for k, of in row['versions'].items())
            runs.setdefault(v, []).append(name if kind == 'exports' else f'{name} on digits')
    lines += ['', 'Made by `python benchmarks/export_table.py`:', '']
    lines += [f'* {", ".join(names)}: {v}' for v, names in runs.items()]
    return '\n'.join(lines) + '\n'


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return 'not run'
    if 'error' in found:
        return f'**fails**: {found["error"]}'
    return ('' if found['ok'] else '**off** ') + f'{found["max_difference"]:.0e}'


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description='Table of what every attention exports to.')
    p.add_argument('--only', nargs='+', default=timm_attn.list_attn(), choices=timm_attn.list_attn())
    p.add_argument('--skip', nargs='+', default=[], choices=[*FORMATS, 'digits'])
    p.add_argument('--epochs', type=int, default=8, help='epochs on digits before quantisation')
    args = p.parse_args(argv)
    os.environ.setdefault('TORCHINDUCTOR_FREEZING', '0')
    warnings.simplefilter('ignore')
    path = RESULTS / 'export.json'
    result = json.loads(path.read_text()) if path.exists() else {'exports': {}, 'digits': {}}
    RESULTS.mkdir(exist_ok=True)

    def keep() -> None:
        # After every row: a run that is cut short has what it measured, and the next one replaces only its own rows.
        for f, text in ((path, json.dumps(result, indent=1) + '\n'), (path.with_suffix('.md'), table(result))):
            f.with_suffix('.tmp').write_text(text)
            os.replace(f.with_suffix('.tmp'), f)

    for name in args.only:
        row = result['exports'].setdefault(name, {'model': RESNETS.get(name, f'{name}_resnet18'), 'formats': {}})
        for kind in FORMATS:
            if kind not in args.skip:
                row['formats'][kind] = measure(name, kind)
                print(name, kind, row['formats'][kind], flush=True)
        row['versions'] = versions()
        result['exports'] = dict(sorted(result['exports'].items()))
        keep()
    for name in DIGITS:
        if 'digits' not in args.skip and (name == 'plain' or name in args.only):
            try:
                result['digits'][name] = quantised(name, args.epochs)
            except Exception as e:  # likewise
                result['digits'][name] = {'error': f'{type(e).__name__}: {str(e).splitlines()[0][:200]}'}
            result['digits'][name]['versions'] = versions()
            print(name, result['digits'][name], flush=True)
            keep()


if __name__ == '__main__':
    main()
