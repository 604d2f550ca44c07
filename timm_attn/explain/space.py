"""`timm-attn space`: a folder to push as a Gradio Space, where visitors upload an image and see the attention maps.

The folder holds README.md with the Space's front matter, app.py, space.json (which model), requirements.txt, examples
and, for a model from a folder, the model itself. app.py is the same for all models: whatever a model's files say ends
up in JSON or YAML, never in code.
"""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from PIL import Image, ImageDraw

from ..files import atomic_dir
from ..hub.folder import open_folder
from ..optional import require
from ..version import pip_source
from .images import open_image

APP = Path(__file__).with_name('space_app.py')
SDK_VERSION = '6.31.0'
# gradio 6 needs pillow < 13; timm's transforms need torchvision.
REQUIREMENTS = ('matplotlib', 'pillow<13', 'torch', 'torchvision')


def write_space(
    source: str,
    out: str | Path,
    *,
    title: str | None = None,
    package: str | None = None,
    license: str | None = None,
    examples: Sequence[str | Path] = (),
    imports: Sequence[str] = (),
    pretrained: bool = True,
    overwrite: bool = False,
) -> Path:
    """Writes the folder of a Space, all of it or nothing.

    Args:
        source: The model: a folder from `timm_attn.save`, a Hub repository ('me/cbam'), or a registered model.
        out: The folder.
        title: Title of the Space, the model's name by default.
        package: What pip installs timm_attn from, such as a git URL; by default what `version.pip_source` says.
        license: Licence of the Space, an id that the Hub knows; without it none is stated.
        examples: Images to offer; two drawn ones without.
        imports: Modules that the Space imports first, since they register attentions of your own; `package` must
            install them too.
        pretrained: Load weights of a registered model; False is for trying things out.
        overwrite: Replace a folder that is not empty.

    Returns:
        The folder.

    Raises:
        ValueError: The model, an example or the folder will not do; the message says which and why.
        ImportError: PyYAML, which timm and the Hub client bring, is missing.
    """
    yaml = require('yaml', 'demo', pip_name='pyyaml')
    folder = Path(source.removeprefix('local-dir:'))
    repo = source.removeprefix('hf-hub:')
    is_folder = folder.is_dir()
    is_repo = not is_folder and (source.startswith('hf-hub:') or source.count('/') == 1)
    if is_repo and not re.fullmatch(r'[\w.-]+/[\w.-]+(@[\w./-]+)?', repo):
        raise ValueError(f"'{source}' is no Hub repository: expected owner/name or owner/name@revision.")
    if not is_folder and not is_repo and not timm.is_model(source):
        raise ValueError(
            f"'{source}' is no folder, no Hub repository (owner/name) and no registered model: see timm-attn list."
        )
    model = open_folder(folder) if is_folder else None
    name = model.config.architecture if model else repo.partition('@')[0].rpartition('/')[2]
    title = ' '.join((title or f'{name}: where it looks').split())
    for example in map(Path, examples):
        open_image(example)
    matter: dict[str, Any] = {
        'title': title,
        'emoji': '🔎',
        'colorFrom': 'blue',
        'colorTo': 'yellow',
        'sdk': 'gradio',
        'sdk_version': SDK_VERSION,
        'python_version': '3.11',
        'app_file': 'app.py',
        'short_description': 'Upload an image, see labels and attention maps',
        'tags': ['timm', 'timm_attn', 'attention', 'image-classification'],
    }
    if is_repo:
        matter['models'] = [repo.partition('@')[0]]
        matter['preload_from_hub'] = [repo.partition('@')[0]]
    if license:
        matter['license'] = license
    head = yaml.safe_dump(matter, sort_keys=False, allow_unicode=True, width=10_000)
    with atomic_dir(out, overwrite) as written:
        (written / 'README.md').write_text(f'---\n{head}---\n\n{_about(title, source)}', encoding='utf-8')
        shutil.copyfile(APP, written / 'app.py')
        # A path of this machine means nothing where the Space runs; the model lies beside app.py there.
        space = {'title': title, 'model': name if is_folder else source, 'folder': is_folder, 'pretrained': pretrained}
        space['imports'] = list(imports)
        (written / 'space.json').write_text(json.dumps(space, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
        (written / 'requirements.txt').write_text(
            '\n'.join((package or pip_source(), *REQUIREMENTS)) + '\n', encoding='utf-8'
        )
        (written / 'examples').mkdir()
        if examples:
            for i, example in enumerate(map(Path, examples)):
                shutil.copyfile(example, written / 'examples' / f'{i:02d}{example.suffix.lower()}')
        else:
            _draw_examples(written / 'examples')
        if model:
            (written / 'model').mkdir()
            for file, data in model.files.items():
                (written / 'model' / file).write_bytes(data)
    return Path(out)


def _about(title: str, source: str) -> str:
    return f"""\
# {title}

Upload an image; the labels and the attention maps of the model appear beside it.

To try it here, in an environment of its own (gradio needs pillow < 13):

```
pip install -r requirements.txt "gradio=={SDK_VERSION}"
python app.py
```

To publish it: `hf upload YOUR_NAME/YOUR_SPACE . . --repo-type space`
"""


def _draw_examples(folder: Path) -> None:
    """Two drawn scenes, a wide and a tall one: nobody's photographs, so nobody's licence."""
    for name, size in (('wide.png', (320, 240)), ('tall.png', (240, 320))):
        w, h = size
        image = Image.new('RGB', size, '#9cc9e8')
        draw = ImageDraw.Draw(image)
        draw.rectangle((0, 0.7 * h, w, h), fill='#6a8f4f')
        draw.ellipse((0.7 * w, 0.08 * h, 0.7 * w + 50, 0.08 * h + 50), fill='#f6d65a')
        draw.rectangle((0.2 * w, 0.45 * h, 0.55 * w, 0.8 * h), fill='#b5533c')
        draw.polygon([(0.15 * w, 0.45 * h), (0.375 * w, 0.25 * h), (0.6 * w, 0.45 * h)], fill='#5b3a29')
        draw.rectangle((0.33 * w, 0.6 * h, 0.42 * w, 0.8 * h), fill='#e8d9b5')
        image.save(folder / name)
