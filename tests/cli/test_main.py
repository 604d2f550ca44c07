"""The command line as its user meets it: help, lists, exit codes, errors in one line."""

import re

import pytest
import timm

import timm_attn
from timm_attn.cli.main import build_parser, main

NAMES = 'list quickstart compare recipe convert card push pull publish explain space bench'.split()


@pytest.mark.parametrize('name', NAMES)
def test_every_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main([name, '--help'])
    assert end.value.code == 0
    assert f'timm-attn {name}' in re.sub(r'\s+', ' ', capsys.readouterr().out.split('example', 1)[1])


def test_help_names_all_commands():
    text = build_parser().format_help()
    assert [n for n in NAMES if not re.search(rf'^\s+{n}\s', text, flags=re.MULTILINE)] == []


@pytest.mark.parametrize('argv', [[], ['frobnicate'], ['compare', '--models']])
def test_wrong_usage_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    assert capsys.readouterr().out == ''


def test_list_shows_every_attention_and_every_model(capsys: pytest.CaptureFixture[str]):
    assert main(['list']) == 0
    out = capsys.readouterr().out
    assert [a for a in timm_attn.list_attn() if f'| `{a}` |' not in out] == []
    models = [m for module in ('attn_resnet', 'sk_resnet', 'simple_cnn') for m in timm.list_models(module=module)]
    assert len(models) == 70
    assert [m for m in models if f'| `{m}` |' not in out] == []
    # Parameters and MACs as attention.md 1.4 has them for CBAM-50: 28,089,624 and 4,095,573,110.
    assert '| `cbam_resnet50` | 28,089,624 | 4.096 |' in out


def test_a_failure_is_one_line_on_stderr_and_exit_code_1(capsys: pytest.CaptureFixture[str]):
    assert main(['list', 'nonesuch*']) == 1
    captured = capsys.readouterr()
    assert captured.out == ''
    assert captured.err == "timm-attn list: No model matches 'nonesuch*'. Without a pattern all are listed.\n"
