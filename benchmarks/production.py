"""What deployment costs: accuracy, agreement, size and time of a trained model in each format.

    OMP_NUM_THREADS=1 python benchmarks/production.py     # writes results/production.json

Small ResNets with attention are trained on Fashion-MNIST first, by the `timm-attn compare` command in the result file
(half an hour on one core; kept in --models). Each is exported once, with free batch and size, to every format; each
format labels the same held-out images, and its time stands beside eager PyTorch's of the same round, one thread.
"""

import argparse
import copy
import json
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxscript
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.fx.experimental import _config as symbolic_config

import timm_attn
from timm_attn.files import atomic_write
from timm_attn.lab.data import Images, load_data
from timm_attn.lab.train import Entry, Settings, build, weights_path
from timm_attn.measure import clock, environment

RESULTS = Path(__file__).parent / 'results'
ATTENTIONS = ('se', 'cbam', 'gam', 'triplet', 'srm', 'coord')
TRAIN, TEST, LABELLED, CALIBRATE = 8000, 4000, 1000, 256
MODELS = ','.join(['plain=resnet18', *(f'{a}={a}_resnet18' for a in ATTENTIONS)])
TRAINING = [
    *('compare', '--models', MODELS, '--cifar-stem', '--model-kwargs', 'layers=[1,1,1,1]', 'channels=[32,64,128,256]'),
    *(
        '--data',
        'fashion-mnist',
        '--images',
        f'{TRAIN},{TEST}',
        '--seeds',
        '1',
        '--epochs',
        '3',
        '--warmup-epochs',
        '1',
    ),
    *('--opt', 'adamw', '--lr', '4e-3', '--weight-decay', '0.05', '--batch-size', '32', '--save-weights', '--out'),
]
TIMED = (1, 1, 112, 112)  # One image; its last maps are 14 x 14.
SIDES = (1, 2, 5, 8, 9, 16, 17, 33)

Run = Callable[[Tensor], Tensor]


def program_of(model: nn.Module, small: bool = False) -> torch.export.ExportedProgram:
    """A program of free batch and size.

    Args:
        model: In eval mode.
        small: Export without the assumption that no size is 1, so that smaller images pass.
    """
    channels = next(model.parameters()).shape[1]
    dtype = next(model.parameters()).dtype
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    with symbolic_config.patch(backed_size_oblivious=small):  # pyright: ignore[reportAttributeAccessIssue]
        return torch.export.export(model, (torch.randn(2, channels, 96, 80, dtype=dtype),), dynamic_shapes=(free,))


def torchscript(model: nn.Module, folder: Path) -> Run:
    torch.jit.save(torch.jit.freeze(torch.jit.script(model)), folder / 'model.ts')
    return torch.jit.load(folder / 'model.ts')


def aotinductor(model: nn.Module, folder: Path) -> Run:
    path = torch._inductor.aoti_compile_and_package(program_of(model), package_path=str(folder / 'model.aot.pt2'))
    return torch._inductor.aoti_load_package(path)


def write_onnx(model: nn.Module, path: Path) -> Path:
    program = torch.onnx.export(program_of(model), dynamo=True, verbose=False)
    assert program is not None
    program.save(str(path))
    return path


def session(path: Path, dtype: torch.dtype = torch.float32) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    run = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    entry = run.get_inputs()[0].name
    return lambda x: torch.from_numpy(run.run(None, {entry: x.to(dtype).numpy()})[0]).float()


def onnx_float32(model: nn.Module, folder: Path) -> Run:
    return session(write_onnx(model, folder / 'model.onnx'))


def onnx_float16(model: nn.Module, folder: Path) -> Run:
    half = copy.deepcopy(model).half()
    return session(write_onnx(half, folder / 'model.onnx'), torch.float16)


class Calibration(CalibrationDataReader):
    """Training images in batches, for the ranges of activations."""

    def __init__(self, path: Path, images: Tensor) -> None:
        entry = onnx.load(path, load_external_data=False).graph.input[0].name
        self.batches = iter([{entry: b.numpy()} for b in images.split(64)])

    def get_next(self) -> dict[str, np.ndarray] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return next(self.batches, None)


def prepared(model: nn.Module, folder: Path) -> Path:
    """The ONNX file that the quantiser reads: shapes are inferred by ONNX alone.

    onnxruntime's symbolic inference gives a node its constant axes for Unsqueeze alone and has no rule for ReduceMax,
    whose axes are an input since opset 18: the shape is lost and the next Unsqueeze fails. The exporter has written all
    shapes already, so nothing is missed.
    """
    ready = folder.parent / 'ready.onnx'
    if not ready.exists():
        quant_pre_process(str(write_onnx(model, folder.parent / 'float.onnx')), str(ready), skip_symbolic_shape=True)
    return ready


def int8_dynamic(model: nn.Module, folder: Path) -> Run:
    ready = prepared(model, folder)
    quantize_dynamic(str(ready), str(folder / 'model.onnx'), per_channel=True, weight_type=QuantType.QUInt8)
    return session(folder / 'model.onnx')


def int8_static(model: nn.Module, folder: Path, images: Tensor, keep: bool = False) -> Run:
    """Weights by channel, activations by tensor, ranges from images.

    Args:
        model: The float model.
        folder: For the files.
        images: To calibrate with.
        keep: Leave attention in float32.
    """
    ready = prepared(model, folder)
    excluded = attention_nodes(folder.parent / 'float.onnx', timm_attn.attn_sites(model)) if keep else []
    quantize_static(
        str(ready),
        str(folder / 'model.onnx'),
        Calibration(ready, images),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=excluded,
    )
    return session(folder / 'model.onnx')


def attention_nodes(path: Path, sites: Any) -> list[str]:
    """Names of the nodes that come from these modules, as the exporter noted them; the optimiser may drop notes."""
    found = []
    for node in onnx.load(path).graph.node:
        notes = {p.key: p.value for p in node.metadata_props}
        scopes = notes.get('pkg.torch.onnx.name_scopes', '')
        if any(f"'{site}'" in scopes for site in sites):
            found.append(node.name)
    return found


def formats(calibration: Tensor) -> dict[str, Callable[[nn.Module, Path], Run]]:
    return {
        'torchscript': torchscript,
        'aotinductor': aotinductor,
        'onnx float32': onnx_float32,
        'onnx float16': onnx_float16,
        'onnx int8 dynamic': int8_dynamic,
        'onnx int8 static': lambda m, f: int8_static(m, f, calibration),
        'onnx int8 static, attention float32': lambda m, f: int8_static(m, f, calibration, keep=True),
    }


def tensors(images: Images, mean: float, std: float, count: int) -> Tensor:
    """Images (N, 1, H, W), prepared as for training."""
    chosen = images.first(count)
    arrays = np.stack([np.asarray(chosen.image(i), np.float32) for i in range(len(chosen))])
    return (torch.from_numpy(arrays)[:, None] / 255 - mean) / std


def photos(mean: float, std: float) -> list[Tensor]:
    """The middle of the two photos of scikit-learn in grey, (1, 1, 213, 320)."""
    from sklearn.datasets import load_sample_images

    grey = [np.asarray(i, np.float32).mean(2)[107:320, 160:480] for i in load_sample_images().images]
    return [(torch.from_numpy(g)[None, None] / 255 - mean) / std for g in grey]


def score(run: Run, x: Tensor, y: Tensor, expected: Tensor) -> dict[str, Any]:
    out = torch.cat([run(b) for b in x.split(100)])
    return {
        'top1': 100 * float((out.argmax(1) == y).float().mean()),
        'other_labels': int((out.argmax(1) != expected.argmax(1)).sum()),
        'logit_change': float((out - expected).abs().mean() / expected.abs().mean()),
    }


def times(runs: dict[str, Run], rounds: int) -> dict[str, dict[str, float]]:
    """All formats in turn, round after round: milliseconds, and the ratio to eager of the same round."""
    x = torch.randn(TIMED)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 2):
        for name, run in runs.items():
            start = clock('cpu')
            run(x)
            seconds[name].append(clock('cpu') - start)
    kept = {name: found[2:] for name, found in seconds.items()}
    return {
        name: {
            'milliseconds': 1000 * statistics.median(found),
            'ratio': statistics.median(a / b for a, b in zip(found, kept['eager'], strict=True)),
        }
        for name, found in kept.items()
    }


def smallest(run: Run, model: nn.Module) -> int | None:
    """The smallest of SIDES at which a program gives the model's logits, and gives them at all larger ones too."""
    found = None
    for side in reversed(SIDES):
        x = torch.randn(2, 1, side, side)
        try:
            torch.testing.assert_close(run(x), model(x), rtol=1e-3, atol=1e-3)
        except Exception:  # a guard, or another result
            return found
        found = side
    return found


def row_of(
    label: str, model: nn.Module, args: argparse.Namespace, data: dict[str, Any], before: dict[str, Any]
) -> dict[str, Any]:
    """The formats asked for of one model, and what was measured before of the others."""
    x, y = data['test']
    expected = torch.cat([model(b) for b in x.split(100)])
    wide = [model(p) for p in data['photos']]
    size = 4 * sum(t.numel() for t in model.state_dict().values())
    found: dict[str, Any] = {'eager': {**score(model, x, y, expected), 'bytes': size}}
    runs: dict[str, Run] = {'eager': model}
    with tempfile.TemporaryDirectory() as root:
        exports = formats(data['calibration'])
        for i, (name, export) in enumerate(exports.items()):
            if name not in args.formats or ('attention' in name and label == 'plain'):
                continue
            folder = Path(root) / str(i)
            folder.mkdir()
            start = time.perf_counter()
            try:
                run = export(model, folder)
                seconds = time.perf_counter() - start
                found[name] = score(run, x, y, expected)
                found[name]['photos'] = max(
                    float((run(p) - w).abs().max() / w.abs().max()) for p, w in zip(data['photos'], wide, strict=True)
                )
                runs[name] = run
                found[name]['export_seconds'] = round(seconds, 1)
                found[name]['bytes'] = sum(f.stat().st_size for f in folder.glob('model.*'))
            except Exception as e:  # a table of what works must show what does not
                found[name] = {'error': f'{type(e).__name__}: {str(e).splitlines()[0][:200]}'}
            print(label, name, found[name], flush=True)
        for name, time_ in times(runs, args.rounds).items():
            found[name].update(time_)
        if before:
            # Ratios are to eager in the same rounds, so formats of different runs can stand in one row.
            kept = before['formats']
            row = {**kept, **found, 'eager': kept['eager']}
            return {**before, 'formats': {name: row[name] for name in ('eager', *exports) if name in row}}
        sides: dict[str, Run] = {
            'torch.export': program_of(model).module(),
            'size oblivious': program_of(model, True).module(),
        }
        if 'onnx float32' in runs:
            sides['onnx'] = runs['onnx float32']
        if 'torchscript' in runs:
            sides['torchscript'] = runs['torchscript']
        minimal = {name: smallest(run, model) for name, run in sides.items()}
        try:
            quant_pre_process(str(Path(root) / 'float.onnx'), str(Path(root) / 'default.onnx'))
            symbolic = 'works'
        except Exception as e:  # likewise
            symbolic = f'{type(e).__name__}: {e}'
    print(label, minimal, symbolic, flush=True)
    return {'formats': found, 'smallest_side': minimal, 'symbolic_shape_inference': symbolic}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', type=Path, default=Path('runs/production'), help='folder of the trained models')
    parser.add_argument('--only', nargs='+', default=['plain', *ATTENTIONS])
    every = list(formats(torch.empty(0)))
    parser.add_argument(
        '--formats', nargs='+', default=every, choices=every, help='only these; others of the file stay as they are'
    )
    parser.add_argument('--rounds', type=int, default=8)
    parser.add_argument('--out', type=Path, default=RESULTS / 'production.json')
    args = parser.parse_args()
    for noise in (DeprecationWarning, FutureWarning, UserWarning):
        warnings.simplefilter('ignore', noise)
    if not (args.models / 'checkpoints').is_dir():
        subprocess.run(['timm-attn', *TRAINING, str(args.models)], check=True)
    held = json.loads((args.models / 'comparison.json').read_text(encoding='utf-8'))
    data = load_data('fashion-mnist')
    of = (data.mean[0], data.std[0])
    prepared_data = {
        'test': (tensors(data.val, *of, LABELLED), torch.tensor(data.val.first(LABELLED).targets)),
        'calibration': tensors(data.train, *of, CALIBRATE),
        'photos': photos(*of),
    }
    report: dict[str, Any] = json.loads(args.out.read_text(encoding='utf-8')) if args.out.exists() else {'models': {}}
    report.update(
        command=f'OMP_NUM_THREADS=1 python benchmarks/production.py --rounds {args.rounds}',
        training=f'timm-attn {" ".join(TRAINING)} runs/production',
        date=time.strftime('%Y-%m-%d'),
        environment=environment(),
        versions={m.__name__: m.__version__ for m in (onnx, onnxscript, onnxruntime)},
        test_images=LABELLED,
        calibration_images=CALIBRATE,
        timed=list(TIMED),
        rounds=args.rounds,
    )
    for entry in (Entry(**m) for m in held['models']):
        if entry.label not in args.only:
            continue
        model = build(entry, data, Settings(**held['settings']))
        weights = weights_path(args.models / 'checkpoints', entry, 0)
        model.load_state_dict(load_file(weights))
        model.eval().requires_grad_(False)
        before = report['models'].get(entry.label, {}) if args.formats != every else {}
        report['models'][entry.label] = row_of(entry.label, model, args, prepared_data, before)
        with atomic_write(args.out) as path:
            path.write_text(json.dumps(report, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
