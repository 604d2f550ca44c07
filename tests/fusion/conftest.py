"""What tests of compiled blocks share."""

import warnings

import pytest

from timm_attn.fusion import blocks
from timm_attn.fusion.compile import compiler_works


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        works = compiler_works('cpu')
    if not works:
        pytest.skip('no C++ compiler, or a torch before 2.9')
    monkeypatch.setattr(blocks, 'SMALL', 0)  # small maps, too, in inference
