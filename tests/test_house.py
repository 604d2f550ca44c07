"""The house: imports go one way, no private module is imported from another room, and few modules lie about."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'timm_attn'
# From the ground up; rooms of one floor may import each other as long as there is no circle.
FLOORS = (
    {'version', 'files', 'optional', 'layers'},
    {'injection', 'recipes'},
    {'weights'},
    {'models'},
    {'fusion'},
    {'measure', 'bench', 'hub', 'explain'},
    {'lab'},
    {'cli'},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = [p for p in sorted(PACKAGE.rglob('*.py')) if p.parent != PACKAGE or not p.stem.startswith('__')]


def imported(path: Path) -> set[str]:
    """Modules of this package that a file imports anywhere, without `timm_attn.` in front."""
    own = path.relative_to(PACKAGE).with_suffix('').parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = own[: len(own) - node.level]
            elif node.module and node.module.split('.')[0] == 'timm_attn':
                base = ()
            else:
                continue
            module = (node.module or '').removeprefix('timm_attn').lstrip('.')
            parts = [*base, *filter(None, module.split('.'))]
            # `from . import plots` names modules, `from .plots import draw` one and a name in it.
            for name in node.names:
                inner = PACKAGE.joinpath(*parts, name.name)
                is_module = inner.with_suffix('.py').is_file() or inner.is_dir()
                found.add('.'.join([*parts, name.name] if is_module else parts))
        elif isinstance(node, ast.Import):
            found |= {n.name.removeprefix('timm_attn.') for n in node.names if n.name.startswith('timm_attn.')}
    return found - {''}


def test_every_room_has_its_floor() -> None:
    rooms = {p.relative_to(PACKAGE).parts[0].removesuffix('.py') for p in FILES}
    assert rooms == set(FLOOR)


def test_few_modules_lie_about() -> None:
    assert len([p for p in PACKAGE.glob('*.py') if not p.stem.startswith('__')]) <= 6


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_or_stay(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix('.py')
    above = {m for m in imported(path) if FLOOR[m.split('.')[0]] > FLOOR[room]}
    assert not above, f'{path.name} imports what stands above it: {sorted(above)}'


def test_no_room_is_part_of_a_circle() -> None:
    arrows: dict[str, set[str]] = {room: set() for room in FLOOR}
    for path in FILES:
        room = path.relative_to(PACKAGE).parts[0].removesuffix('.py')
        arrows[room] |= {m.split('.')[0] for m in imported(path)} - {room}
    left = dict(arrows)
    while free := [room for room, below in left.items() if not below & left.keys()]:
        for room in free:
            del left[room]
    assert not left, f'rooms that import each other: { {room: sorted(b & left.keys()) for room, b in left.items()} }'


@pytest.mark.parametrize(
    'path', [*FILES, *sorted((ROOT / 'benchmarks').glob('*.py'))], ids=lambda p: '/'.join(p.parts[-2:])
)
def test_no_private_module_is_imported_from_another_folder(path: Path) -> None:
    if path.is_relative_to(PACKAGE):
        folder = '.'.join(path.parent.relative_to(PACKAGE).parts)
        modules = imported(path)
    else:
        folder, modules = (
            'benchmarks',
            {
                m.removeprefix('timm_attn.')
                for node in ast.walk(ast.parse(path.read_text(encoding='utf-8')))
                for m in ([node.module] if isinstance(node, ast.ImportFrom) and node.module else [])
                if m.startswith('timm_attn.')
            },
        )
    private = {m for m in modules if any(part.startswith('_') for part in m.split('.'))}
    assert {m.rpartition('.')[0] for m in private} <= {folder}, f'{path.name} imports {sorted(private)}'


def test_what_users_publish_uses_public_names_only() -> None:
    import importlib

    tree = ast.parse((PACKAGE / 'explain/space_app.py').read_text(encoding='utf-8'))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('timm_attn'):
            assert node.module in ('timm_attn', 'timm_attn.explain')
            module = importlib.import_module(node.module)
            assert all(hasattr(module, n.name) and not n.name.startswith('_') for n in node.names)
