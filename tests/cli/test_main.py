"""The command line as its user meets it: help, lists, exit codes, errors in one line."""

import re
import sys
from pathlib import Path

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
    assert '| `cbam_resnet50` | 28,089,624 | 4.096 | 112.6 | pcv_in1k, warm start |' in out


@pytest.mark.parametrize(('columns', 'last'), [(30, 'parameters'), (110, 'weights'), (300, 'paper')])
def test_list_fits_a_terminal(
    columns: int, last: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv('COLUMNS', str(columns))
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
    assert main(['list', '*_resnet50']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-1] == last
    assert max(len(line) for line in lines if not line.startswith('(')) <= columns
    row = next(line for line in lines if line.startswith('se_resnet50 '))
    # The SE-ResNet-50 of the paper's Table 1: 28,088,024 parameters in timm's and torchvision's form.
    assert '28,088,024' in row
    assert ('a1_in1k' in row) == (columns >= 110)
    assert main(['list', '--markdown', 'se_resnet50']) == 0
    assert capsys.readouterr().out.startswith('| model | parameters |')


def test_version(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(['--version'])
    assert end.value.code == 0
    assert capsys.readouterr().out == f'timm_attn {timm_attn.__version__}\n'


@pytest.mark.parametrize(
    ('argv', 'meant'),
    [
        (['lst'], "Did you mean 'list'?"),
        (['list', '--markdwon'], "Did you mean '--markdown'?"),
        (['compare', '--preset', 'diigts', '--out', 'x'], "Did you mean 'digits'?"),
        (['bench', 'cbam_resnet5'], "Did you mean 'cbam_resnet50'"),
        (['explain', str(Path(__file__)), '--model', 'cbma_resnet50', '--out', 'x'], "Did you mean 'cbam_resnet50'"),
        (['list', 'cbma_resnet50'], "Did you mean 'cbam_resnet50'"),
        (['space', 'cbma_resnet50', '--out', 'x'], "Did you mean 'cbam_resnet50'"),
        (['recipe', 'cbm_in1k'], "Did you mean 'cbam_in1k'"),
        (['compare', '--models', 'cbma_resnet18', '--data', 'digits', '--out', 'x'], "Did you mean 'cbam_resnet18'"),
        (['compare', '--models', 'resnet18', '--data', 'digts', '--out', 'x'], "Did you mean 'digits'"),
    ],
)
def test_a_typo_gets_the_nearest_names(
    argv: list[str], meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(argv)
    except SystemExit as end:
        code = end.code
    assert code in (1, 2)
    assert meant in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_failure_is_one_line_on_stderr_and_exit_code_1(capsys: pytest.CaptureFixture[str]):
    assert main(['list', 'nonesuch*']) == 1
    captured = capsys.readouterr()
    assert captured.out == ''
    assert captured.err == "timm-attn list: No model matches 'nonesuch*'. Without a pattern all are listed.\n"
