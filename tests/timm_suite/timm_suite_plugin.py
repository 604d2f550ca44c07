"""Pytest plugin that runs timm's unmodified tests/test_models.py on the models of a package that registers its own.

TIMM_PLUGIN names the package, TIMM_FILTER (optional) the models, as patterns joined by commas. See run.sh.
"""

import fnmatch
import importlib
import os
from typing import Any

import pytest

OURS = pytest.StashKey[set[str]]()


def pytest_configure(config: pytest.Config) -> None:
    # Before timm's test module binds `timm.list_models` at its import.
    import timm
    from timm.models import _registry as registry

    before = dict(registry._model_entrypoints)
    importlib.import_module(os.environ['TIMM_PLUGIN'])
    taken = [name for name, fn in before.items() if registry._model_entrypoints[name] is not fn]
    if taken:
        pytest.exit(f'timm names overwritten: {taken}', returncode=4)
    patterns = os.environ.get('TIMM_FILTER', '*').split(',')
    new = registry._model_entrypoints.keys() - before.keys()
    ours = {name for name in new if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}
    if not ours:
        pytest.exit(f'no model matches {patterns}', returncode=4)
    list_models = timm.list_models

    def narrowed(filter: Any = '', module: Any = '', **kwargs: Any) -> list[str]:
        # timm's feature tests name its own modules; with that filter they would pass by running on nothing.
        return [name for name in list_models(filter, **kwargs) if name.split('.')[0] in ours]

    def pretrained(*args: Any, **kwargs: Any) -> list[str]:
        return narrowed(*args, pretrained=True, include_tags=True, **kwargs)

    timm.list_models = narrowed
    timm.list_pretrained = pretrained
    config.stash[OURS] = ours


@pytest.hookimpl(tryfirst=True)  # before -k takes its share
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drops the tests on hard-coded timm names, and fails where a model of ours has no test."""
    tested: set[str] = set()
    kept, dropped = [], []
    for item in items:
        params = getattr(getattr(item, 'callspec', None), 'params', {})
        name = str(params.get('model_name', '')).split('.')[0]
        if name in config.stash[OURS]:
            tested.add(name)
            kept.append(item)
        else:
            dropped.append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept
    missed = sorted(config.stash[OURS] - tested)
    if missed:
        raise pytest.UsageError(f'no test of timm covers {missed}')
