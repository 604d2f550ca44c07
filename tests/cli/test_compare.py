"""What `timm-attn compare` understands, and how it starts workers."""

import argparse
import json
import sys
from pathlib import Path

import pytest

from timm_attn.cli import compare as command
from timm_attn.cli.compare import parse_models
from timm_attn.lab.train import Entry

SMALL = ['--cifar-stem', '--model-kwargs', 'layers=[1,1,1,1]', 'channels=[16,16,16,16]']


def run(*words: str | Path) -> None:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(['compare', *map(str, words)])
    args.run(args)


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('resnet18,se_resnet18', [Entry('resnet18', 'resnet18'), Entry('se_resnet18', 'se_resnet18')]),
        ('plain=resnet18', [Entry('plain', 'resnet18')]),
        ('mine=local-dir:out/x', [Entry('mine', 'local-dir:out/x')]),
        ('hf-hub:me/x@main', [Entry('hf-hub:me/x@main', 'hf-hub:me/x@main')]),
        (
            'cbam_resnet18,injected:base=resnet18,attn=coord,at=layer4.*',
            [
                Entry('cbam_resnet18', 'cbam_resnet18'),
                Entry(
                    'injected base=resnet18 attn=coord at=layer4.*',
                    'injected',
                    dict(base='resnet18', attn='coord', at='layer4.*'),
                ),
            ],
        ),
        (
            'A=injected:attn=se;B=cbam_resnet18:attn_args={"kernel_size":3};resnet18',
            [
                Entry('A', 'injected', dict(attn='se')),
                Entry('B', 'cbam_resnet18', dict(attn_args=dict(kernel_size=3))),
                Entry('resnet18', 'resnet18'),
            ],
        ),
        (
            'a=se_resnet18:drop_rate=.1,layers=2,resnet18',
            [Entry('a', 'se_resnet18', dict(drop_rate=0.1, layers=2)), Entry('resnet18', 'resnet18')],
        ),
        (
            "plain=resnet18:layers=[1,1,1,1],drop_rate=.1,mixed=cbam_resnet18:attn_args={'order':'parallel','rd_ratio':.5}",
            [
                Entry('plain', 'resnet18', dict(layers=[1, 1, 1, 1], drop_rate=0.1)),
                Entry('mixed', 'cbam_resnet18', dict(attn_args=dict(order='parallel', rd_ratio=0.5))),
            ],
        ),
    ],
)
def test_models_of_the_command_line(text: str, expected: list[Entry]) -> None:
    assert list(parse_models(text)) == expected


def test_models_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / 'models.yaml'
    path.write_text('- resnet18\n- {name: injected, label: coord, args: {base: resnet18, attn: coord}}\n')
    assert list(parse_models(str(path))) == [
        Entry('resnet18', 'resnet18'),
        Entry('coord', 'injected', dict(base='resnet18', attn='coord')),
    ]
    for text, message in (
        ('- 3', 'no name'),
        ('- {name: a, colour: red}', 'no name'),
        ('- {name: a, args: 1}', 'args'),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            parse_models(str(path))
    with pytest.raises(ValueError, match='cannot be read'):
        parse_models(str(tmp_path / 'absent.yml'))
    with pytest.raises(ValueError, match="'oops' behind 'resnet18:' is no keyword: write NAME:K=V,K=V"):
        parse_models('resnet18:oops')


def test_modules_of_the_user_are_imported_and_attention_is_saved_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / 'my_models_of_a_test.py').write_text(
        'import timm\nfrom timm.models import register_model\n\n@register_model\n'
        'def my_net_of_a_test(pretrained=False, **kwargs):\n'
        "    return timm.create_model('se_resnet18', **kwargs)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    words = [
        '--data',
        'digits',
        '--images',
        '40,20',
        '--img-size',
        '8',
        '--epochs',
        '1',
        '--batch-size',
        '8',
        '--seeds',
        '1',
        *SMALL,
    ]
    models = 'plain=simple_cnn,SE=se_resnet18,mine=my_net_of_a_test'
    run('--models', models.replace('plain=simple_cnn,', ''), '--import', 'my_models_of_a_test', *words, '--out', 'a')
    assert json.loads((tmp_path / 'a/results.json').read_text())['missing'] == []
    run('--models', 'plain=resnet18,SE=se_resnet18', *words, '--save-best', 'attention', '--out', 'b')
    assert 'Saved SE-seed0 in b/best' in capsys.readouterr().err
    with pytest.raises(ValueError, match='none of the models has attention'):
        run('--models', 'plain=simple_cnn', *words[:-4], '--save-best', 'attention', '--out', 'c')
    assert not (tmp_path / 'c').exists()  # Said before the first run.


@pytest.mark.slow
def test_workers_launched_by_submitit_share_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip('submitit', reason='submitit is not installed')
    words = [
        '--data',
        'digits',
        '--images',
        '40,20',
        '--img-size',
        '8',
        '--epochs',
        '1',
        '--batch-size',
        '8',
        '--seeds',
        '1',
        *SMALL,
    ]
    words += ['--models', 'plain=resnet18,SE=se_resnet18', '--out', str(tmp_path)]
    run(*words, '--launch', 'submitit', '--tasks', '2', '--launch-args', 'timeout_min=5', '--wait')
    assert json.loads((tmp_path / 'results.json').read_text())['missing'] == []
    assert 'Started: ' in capsys.readouterr().err
    # SLURM's options are taken as such, and others are named.
    with pytest.raises(ValueError, match=r'--launch-args .*colour'):
        run(*words, '--launch', 'submitit', '--launch-args', 'colour=red')
