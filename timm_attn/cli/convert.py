"""`timm-attn convert`: a foreign checkpoint, or a file of its authors, as a folder that timm loads."""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import timm

from ..files import check_vacant
from ..hub.folder import save
from ..weights.convert import convert_checkpoint, list_sources, net_of_sha1
from ..weights.official import OFFICIAL, Official, fetch, get_official
from ..weights.read import Checkpoint, read_checkpoint
from ..weights.tags import RESIZE_256
from ..weights.unwrap import WEIGHTS
from ._common import talk

NO_LICENCE = 'none stated by the authors'


def add_parser(commands: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Adds `convert`."""
    p = commands.add_parser(
        'convert',
        help='convert a foreign checkpoint',
        description='Writes a foreign checkpoint as a folder for timm.create_model("local-dir:..."). Files that their '
        'authors host: ' + ', '.join(f'official/{o.name}' for o in OFFICIAL),
        epilog='example: timm-attn convert cbam50.pth --model cbam_resnet50 --out out/cbam_resnet50',
    )
    p.add_argument('file', help='.pth, .pth.tar, .pkl, zipped .pth, .safetensors, or official/NAME')
    p.add_argument('--model', help='registered model, such as cbam_resnet50; official/NAME knows its own')
    p.add_argument('--out', required=True, help='folder to write')
    p.add_argument(
        '--source',
        help='where the keys come from; found from them by default. One of: '
        + ', '.join(list_sources())
        + '; pytorchcv/NET where equal keys are two nets, such as pytorchcv/seresnet50b',
    )
    p.add_argument('--weights', choices=WEIGHTS, help='which, where averaged and raw ones are there; else averaged')
    p.add_argument('--prefix', help='take only the keys that begin with it, without it, such as backbone.')
    p.add_argument('--sha1', help='refuse another file; of the file, or of the one inside an archive')
    p.add_argument('--sha256', help='refuse another file')
    p.add_argument('--num-classes', type=int, help='classes of the checkpoint, if not 1000')
    p.add_argument('--in-chans', type=int, help='channels of its images, if not 3')
    p.add_argument('--cifar-stem', action='store_true', help='it has a 3x3 stem without max-pool')
    p.add_argument('--attn-args', type=_json_object, help='options of its attention, as JSON', metavar='JSON')
    p.add_argument('--licence', help='licence of the weights, for the card', metavar='ID')
    p.add_argument('--accept-no-licence', action='store_true', help='fetch files whose authors state no licence')
    p.add_argument('--overwrite', action='store_true', help='write into a folder that is not empty')
    p.set_defaults(run=run)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as e:
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON: {e}') from e
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} must be a JSON object, such as {{"kernel_size": 3}}')
    return value


def _check_hashes(args: argparse.Namespace, checkpoint: Checkpoint) -> None:
    if args.sha1 is not None and args.sha1.strip().lower() not in (checkpoint.sha1, checkpoint.inner_sha1):
        raise ValueError(f"'{args.file}' has sha1 {checkpoint.inner_sha1}, not {args.sha1}: it is another file.")
    if args.sha256 is not None and args.sha256.strip().lower() != checkpoint.sha256:
        raise ValueError(f"'{args.file}' has sha256 {checkpoint.sha256}, not {args.sha256}: it is another file.")


def _check_licence(official: Official, accepted: bool) -> None:
    if official.licence is None and not accepted:
        raise ValueError(
            f'{official.home} states no licence for its weights, so you may have no right to use them. If you may, '
            'pass --accept-no-licence; the card will say so.'
        )


def run(args: argparse.Namespace) -> None:
    """Runs `convert`."""
    talk()
    out = Path(args.out)
    check_vacant(out, args.overwrite)
    for option, value in (('--sha1', args.sha1), ('--sha256', args.sha256)):
        if value is not None and not value.strip():
            raise ValueError(f'{option} is empty, perhaps a shell variable that is not set: it would check nothing.')
    official = get_official(args.file) if args.file.startswith('official/') else None
    if official is None:
        if not args.model:
            raise ValueError('--model is needed, such as --model cbam_resnet50: keys alone do not name it.')
        _write(args, read_checkpoint(args.file), out, args.model, args.source, None)
        return
    _check_licence(official, args.accept_no_licence)
    with tempfile.TemporaryDirectory(prefix='timm_attn.') as folder:
        print(f'fetching {official.url}', file=sys.stderr)
        checkpoint = read_checkpoint(fetch(official, folder))
    _write(args, checkpoint, out, args.model or official.model, args.source or official.source, official)


def _write(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    out: Path,
    name: str,
    source: str | None,
    official: Official | None,
) -> None:
    _check_hashes(args, checkpoint)
    source = net_of_sha1(checkpoint.inner_sha1) or source  # the checksum tells what the keys cannot
    model_args: dict[str, Any] = dict(official.model_args) if official else {}
    if args.attn_args:
        model_args['attn_args'] = {**model_args.get('attn_args', {}), **args.attn_args}
    given = dict(num_classes=args.num_classes, in_chans=args.in_chans, cifar_stem=args.cifar_stem or None)
    model_args |= {k: v for k, v in given.items() if v is not None}

    converted = convert_checkpoint(
        checkpoint.content, name, source, weights=args.weights, prefix=args.prefix, **model_args
    )
    model = timm.create_model(name, **model_args)
    model.load_state_dict(converted.weights)
    licence = (official.licence or NO_LICENCE) if official else args.licence
    # What the default tag's config says about its own weights is not true of these.
    preprocessing = {} if converted.source in ('timm', 'timm_attn') else dict(RESIZE_256)
    if args.in_chans and preprocessing:
        preprocessing |= dict(
            input_size=(args.in_chans, 224, 224), mean=(0.5,) * args.in_chans, std=(0.5,) * args.in_chans
        )
    cast(dict[str, Any], model.pretrained_cfg).update(
        preprocessing,
        tag=None,
        url='',
        hf_hub_id=None,
        license=licence,
        description=None,
        notes=None,
        origin_url=official.home if official else None,
    )
    options = {'source': converted.source, 'weights': args.weights, 'prefix': args.prefix}
    stated = ''.join(f', {k}={v!r}' for k, v in options.items() if v is not None)
    provenance = dict(
        source=converted.source,
        source_url=official.url if official else None,
        file=Path(args.file).name,
        sha256=checkpoint.sha256,
        license=licence,
        license_link=official.home if official else None,
        weights=converted.kind or None,
        conversion=f'timm_attn.convert(..., {name!r}{stated})',
        stated_top1=official.top1 if official else None,
    )
    save(
        model,
        out,
        overwrite=args.overwrite,
        status='warm start' if converted.warm else 'converted',
        provenance={k: v for k, v in provenance.items() if v is not None},
        license=licence,
    )
    print(out)
    if licence == NO_LICENCE:
        print(f'{official.home if official else args.file} states no licence: the card says so.', file=sys.stderr)
