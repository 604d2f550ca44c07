"""`timm-attn space`: a folder to push as a Gradio Space, where visitors upload an image and see the attention maps.

The folder holds README.md with the Space's front matter, app.py, space.json (which models), requirements.txt, examples
and, for a model from a folder, the model itself. app.py is the same for all models: whatever a model's files say ends
up in JSON or YAML, never in code.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from PIL import Image, ImageDraw

from ..files import atomic_dir
from ..hub.folder import open_folder
from ..optional import require
from ..version import pip_source
from .images import open_image
from .model import unknown_model

APP = Path(__file__).with_name('space_app.py')
SDK_VERSION = '6.31.0'
# gradio 6 needs pillow < 13; timm's transforms need torchvision.
REQUIREMENTS = ('matplotlib', 'pillow<13', 'torch', 'torchvision')


@dataclass(frozen=True)
class _Shown:
    """A model of a Space: its name, its Hub repository, its files where it is a folder, and its line in space.json."""

    name: str
    repo: str | None
    files: Mapping[str, bytes]
    line: dict[str, Any]


def _shown(source: str, place: str, pretrained: bool) -> _Shown:
    folder = Path(source.removeprefix('local-dir:'))
    if folder.is_dir():
        model = open_folder(folder)
        name = model.config.architecture
        # A path of this machine means nothing where the Space runs; the model lies beside app.py there.
        return _Shown(name, None, model.files, {'model': name, 'folder': place, 'pretrained': pretrained})
    line = {'model': source, 'folder': None, 'pretrained': pretrained}
    if source.startswith('hf-hub:') or source.count('/') == 1:
        repo = source.removeprefix('hf-hub:')
        if not re.fullmatch(r'[\w.-]+/[\w.-]+(@[\w./-]+)?', repo):
            raise ValueError(f"'{source}' is no Hub repository: expected owner/name or owner/name@revision.")
        repo = repo.partition('@')[0]
        return _Shown(repo.rpartition('/')[2], repo, {}, line)
    if not timm.is_model(source):
        raise unknown_model(source)
    return _Shown(source, None, {}, line)


def write_space(
    source: str | Sequence[str],
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
        source: The model: a folder from `timm_attn.save`, a Hub repository ('me/cbam'), or a registered model. Two
            stand side by side, with one scale for each kind of gate.
        out: The folder.
        title: Title of the Space, by default the models' names.
        package: What pip installs timm_attn from, such as a git URL; by default what `version.pip_source` says.
        license: Licence of the Space, an id that the Hub knows; without it none is stated.
        examples: Images to offer; two drawn ones without.
        imports: Modules that the Space imports first, since they register attentions of your own; `package` must
            install them too.
        pretrained: Load weights of registered models; False is for trying things out.
        overwrite: Replace a folder that is not empty.

    Returns:
        The folder.

    Raises:
        ValueError: A model, their number, an example or the folder will not do; the message says which and why.
        ImportError: PyYAML, which timm and the Hub client bring, is missing.
    """
    yaml = require('yaml', 'demo', pip_name='pyyaml')
    sources = [source] if isinstance(source, str) else list(source)
    if len(sources) not in (1, 2):
        raise ValueError(f'A Space shows one model or two side by side; {len(sources)} were given.')
    models = [_shown(s, place, pretrained) for s, place in zip(sources, ('model', 'beside'), strict=False)]
    title = ' '.join(
        (
            title or f'{" and ".join(m.name for m in models)}: where {"it looks" if len(models) == 1 else "they look"}'
        ).split()
    )
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
    if repos := list(dict.fromkeys(m.repo for m in models if m.repo)):
        matter['models'] = repos
        matter['preload_from_hub'] = list(repos)  # the same list would be written as a YAML alias
    if license:
        matter['license'] = license
    head = yaml.safe_dump(matter, sort_keys=False, allow_unicode=True, width=10_000)
    with atomic_dir(out, overwrite) as written:
        (written / 'README.md').write_text(f'---\n{head}---\n\n{_about(title)}', encoding='utf-8')
        shutil.copyfile(APP, written / 'app.py')
        space = {'title': title, 'models': [m.line for m in models], 'imports': list(imports)}
        (written / 'space.json').write_text(json.dumps(space, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
        requirements = (package or pip_source(), *REQUIREMENTS)
        (written / 'requirements.txt').write_text('\n'.join(requirements) + '\n', encoding='utf-8')
        (written / 'examples').mkdir()
        if examples:
            for i, example in enumerate(map(Path, examples)):
                shutil.copyfile(example, written / 'examples' / f'{i:02d}{example.suffix.lower()}')
        else:
            _draw_examples(written / 'examples')
        for model in models:
            for file, data in model.files.items():
                (written / model.line['folder']).mkdir(exist_ok=True)
                (written / model.line['folder'] / file).write_bytes(data)
    return Path(out)


def _about(title: str) -> str:
    return f"""\
# {title}

Upload an image or take a photo; labels and attention maps appear beside it.

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
