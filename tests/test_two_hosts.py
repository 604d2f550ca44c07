"""train.py on two hosts, in network namespaces: what a step sends is what its gradients weigh."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def two_hosts() -> ModuleType:
    spec = importlib.util.spec_from_file_location('_two_hosts', ROOT / 'benchmarks/two_hosts.py')
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    try:
        with module.two_hosts():
            pass
    except PermissionError as e:
        pytest.skip(str(e))
    return module


@pytest.mark.slow
def test_a_step_sends_each_gradient_once_and_ends_in_the_weights_of_one_host(
    two_hosts: ModuleType, tmp_path: Path
) -> None:
    scripts = os.environ.get('TIMM_SCRIPTS')
    if not scripts:
        pytest.skip("TIMM_SCRIPTS does not name a folder with timm's train.py")
    found = two_hosts.demonstrate(Path(scripts).resolve() / 'train.py', 'cbam_resnet18', (1, 3), tmp_path)
    assert found['same_weights_as_one_host']
    expected = found['parameter_bytes']  # 2 (n - 1) / n of them, n = 2
    # BatchNorm's buffers from the first host come to it, and what the processes have to agree on. What TCP sends again
    # is counted by segments, of which some are shorter.
    assert all(0.99 * expected < sent < 1.01 * expected + found['buffer_bytes'] for sent in found['sent_per_step'])
