"""Recipes: every option exists in train.py, has the type it takes there, and means what the source says."""

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets

import timm_attn
from timm_attn import recipes
from timm_attn.cli import recipe
from timm_attn.cli.main import main

PAPER = ['bam_in1k', 'cbam_in1k', 'gam_in1k', 'se_in1k']
SOURCED = [*PAPER, 'a2_in1k', 'a3_in1k', 'cifar100']


@pytest.fixture(scope='module')
def train() -> Any:
    """timm's train.py as a module."""
    folder = os.environ.get('TIMM_SCRIPTS')
    if not folder:
        pytest.skip("TIMM_SCRIPTS does not name a folder with timm's train.py")
    spec = importlib.util.spec_from_file_location('timm_train_script', Path(folder).resolve() / 'train.py')
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        # The folder is someone else's: no __pycache__ in it.
        patch.setattr(sys, 'dont_write_bytecode', True)
        spec.loader.exec_module(module)
    return module


def parse(train: Any, name: str) -> argparse.Namespace:
    """The arguments that train.py makes of a recipe, with the defaults put back afterwards."""
    options = recipes.recipe_options(name)
    before = {key: train.parser.get_default(key) for key in options}
    train.parser.set_defaults(**options)
    try:
        return train.parser.parse_args([])
    finally:
        train.parser.set_defaults(**before)


def parse_command(command: list[str]) -> argparse.Namespace:
    """The arguments of timm-attn's own parser."""
    parser = argparse.ArgumentParser()
    recipe.add_parser(parser.add_subparsers(required=True))
    return parser.parse_args(command)


def test_there_are_recipes_and_each_has_a_title() -> None:
    assert set(SOURCED) <= set(recipes.list_recipes())
    titles = [recipes.recipe_title(name) for name in recipes.list_recipes()]
    assert all(titles) and len(set(titles)) == len(titles)


def test_no_key_is_written_twice() -> None:
    # YAML takes the last of two in silence.
    for name in recipes.list_recipes():
        node = yaml.compose(recipes.recipe_path(name).read_text())
        assert isinstance(node, yaml.MappingNode)
        keys = [key.value for key, _ in node.value]
        assert sorted(keys) == sorted(set(keys)), name


@pytest.mark.parametrize('name', SOURCED)
def test_every_value_has_a_source_beside_or_above_it(name: str) -> None:
    commented = False
    for line in recipes.recipe_path(name).read_text().splitlines():
        # A comment on a line of its own is about all lines up to the next comment.
        commented = line.startswith('#') or (commented and '#' not in line)
        key = line.partition(':')[0]
        assert commented or '#' in line or key == 'model', f'{name}: {line}'


def test_an_unknown_recipe_is_named_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"Unknown recipe 'cbamm'. Expected one of: a2_in1k, a3_in1k, bam_in1k"):
        recipes.recipe_path('cbamm')


@pytest.mark.parametrize('name', recipes.list_recipes())
def test_every_option_is_one_of_train_py_and_of_its_type(name: str, train: Any) -> None:
    actions = {action.dest: action for action in train.parser._actions}
    for key, value in recipes.recipe_options(name).items():
        assert key in actions, f'train.py has no option {key}'
        action = actions[key]
        if action.nargs == 0:
            assert isinstance(value, bool), key
        elif value is None or isinstance(value, dict):
            assert action.default is None or isinstance(value, dict) or action.type is float, key
        else:
            # What the command line would make of it: `1e-4` without a dot, for one, is text in YAML.
            values = value if isinstance(value, list) else [value]
            assert [(action.type or str)(str(v)) for v in values] == values, key


@pytest.mark.parametrize('name', recipes.list_recipes())
def test_the_model_exists_and_takes_the_recipes_arguments(name: str) -> None:
    options = recipes.recipe_options(name)
    kwargs = {**options.get('model_kwargs', {}), 'drop_path_rate': options.get('drop_path')}
    model, _, tag = options['model'].partition('.')
    assert timm.is_model(model)
    assert not tag or options['model'] in timm.list_pretrained(f'{model}.*')
    created = timm.create_model(model, num_classes=options.get('num_classes', 1000), device='meta', **kwargs)
    assert timm_attn.attn_sites(created)


@pytest.mark.parametrize('name', PAPER)
def test_paper_recipes_follow_the_official_schedule_and_optimizer(name: str, train: Any) -> None:
    args = parse(train, name)
    lr, batch, epochs = {'se_in1k': (0.6, 1024, 100), 'cbam_in1k': (0.1, 256, 100)}.get(name, (0.1, 256, 90))
    assert args.batch_size * 8 == batch and args.epochs == epochs
    # What train.py makes of lr_base, at the batch of the source.
    args.lr = args.lr_base * args.batch_size * 8 / args.lr_base_size
    assert args.lr_base_scale == 'linear'
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2))
    optimizer = train.create_optimizer_v2(model, **train.optimizer_kwargs(cfg=args), **args.opt_kwargs)
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.SGD
    assert (group['momentum'], group['weight_decay'], group['nesterov']) == (0.9, 1e-4, False)
    assert len(group['params']) == 4

    scheduler, total = train.create_scheduler_v2(optimizer, **train.scheduler_kwargs(args), updates_per_epoch=10)
    assert scheduler is not None and total == epochs
    for epoch in range(epochs):
        # adjust_learning_rate of the official train_imagenet.py
        assert group['lr'] == pytest.approx(lr * 0.1 ** (epoch // 30))
        scheduler.step(epoch + 1)


def test_cifar_recipe_follows_its_source(train: Any) -> None:
    args = parse(train, 'cifar100')
    args.lr = args.lr_base * args.batch_size * 8 / args.lr_base_size
    model = torch.nn.Linear(2, 2)
    optimizer = train.create_optimizer_v2(model, **train.optimizer_kwargs(cfg=args), **args.opt_kwargs)
    (group,) = optimizer.param_groups
    assert (group['momentum'], group['weight_decay'], group['nesterov']) == (0.9, 5e-4, True)
    scheduler, total = train.create_scheduler_v2(optimizer, **train.scheduler_kwargs(args), updates_per_epoch=10)
    assert scheduler is not None and total == 200
    for epoch in range(total):
        expected = 0.1 / 5 ** sum(epoch >= milestone for milestone in (60, 120, 160))
        assert group['lr'] == pytest.approx(expected)
        scheduler.step(epoch + 1)


def test_the_command_keeps_the_batch_of_the_recipe_on_any_number_of_gpus() -> None:
    yaml_path = str(recipes.recipe_path('cbam_in1k'))
    launch = ['torchrun', '--standalone', '--nproc_per_node=8', '-m', 'timm_attn', 'train.py', '--config', yaml_path]
    assert recipes.recipe_command('cbam_in1k') == [*launch, '--data-dir', 'DATA']
    command = recipes.recipe_command('cbam_in1k', gpus=2, model='cbam_resnet18', data='/d', script='s/train.py')
    assert command[2] == '--nproc_per_node=2' and command[5] == 's/train.py'
    assert command[-6:] == ['--model', 'cbam_resnet18', '--batch-size', '128', '--data-dir', '/d']


def test_numbers_of_gpus_that_cannot_be_are_refused() -> None:
    for gpus in (0, 3):
        with pytest.raises(ValueError, match=rf'gpus \(={gpus}\) must be positive and divide 256'):
            recipes.recipe_command('cbam_in1k', gpus=gpus)
    with pytest.raises(ValueError, match='repeated augmentation'):
        recipes.recipe_command('a2_in1k', gpus=1)


def test_the_tool_lists_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    args = parse_command(['recipe'])
    args.run(args)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipes.list_recipes()
    assert 'CBAM-ResNet on ImageNet' in lines[recipes.list_recipes().index('cbam_in1k')]


def test_the_tool_prints_path_and_command(capsys: pytest.CaptureFixture[str]) -> None:
    args = parse_command(['recipe', 'se_in1k', '--data-dir', '/my data', '--gpus', '4'])
    args.run(args)
    out, err = capsys.readouterr()
    path, command = out.splitlines()
    assert path == f'# {recipes.recipe_path("se_in1k")}'
    assert shlex.split(command) == recipes.recipe_command('se_in1k', data='/my data', gpus=4)
    assert 'not estimated' in err


def test_attention_first_refuses_models_without_attention() -> None:
    # Importing the module changes timm's registry, which must not happen in the tests' own process.
    code = 'import timm, timm_attn.recipes.attention_first; timm.create_model("resnet18")'
    done = _python(['-c', code], Path.cwd())
    assert done.returncode == 1 and 'ResNet has no attention to train first' in done.stderr


def _python(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    paths = [str(Path(timm_attn.__file__).parents[1]), os.environ.get('PYTHONPATH', '')]
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, paths)), 'OMP_NUM_THREADS': '1'}
    env.update(CUDA_VISIBLE_DEVICES='', HF_HUB_OFFLINE='1', PYTHONDONTWRITEBYTECODE='1')
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )


# Runs train.py once per list of arguments, all in one process, since starting one takes longer than the training.
MANY = """
import json, sys
from timm_attn.__main__ import main
for arguments in json.loads(sys.argv[1]):
    print('RECIPE', arguments, file=sys.stderr)
    main(arguments)
"""


def test_every_recipe_trains(train: Any, tmp_path: Path) -> None:
    """One epoch of each recipe, at 32 px, on 4 images, with the options that a CPU does not have switched off."""
    for split in ('train', 'validation'):
        for label, colour in enumerate(((200, 0, 0), (0, 0, 200))):
            folder = tmp_path / 'images' / split / str(label)
            folder.mkdir(parents=True)
            for i in range(2):
                Image.new('RGB', (32, 32), colour).save(folder / f'{label}{i}.png')
    # What the two stages of fine-tuning start from: a plain ResNet, and a checkpoint of the first stage.
    for model in ('resnet18', 'cbam_resnet18'):
        torch.save({'state_dict': timm.create_model(model, num_classes=2).state_dict()}, tmp_path / f'{model}.pth')
    runs = []
    # finetune_attention freezes all models that are built after it.
    names = sorted(recipes.list_recipes(), key=lambda name: name == 'finetune_attention')
    for name in names:
        data = str(tmp_path / 'images')
        command = recipes.recipe_command(name, data=data, model='cbam_resnet18', script=train.__file__)
        tiny = '--device cpu --num-classes 2 --img-size 32 --input-size 3 32 32 -b 2 -j 0 --no-prefetcher --epochs 1'
        arguments = [*command[command.index('timm_attn') + 1 :], *tiny.split(), '--warmup-epochs', '0', '--dataset', '']
        arguments += ['--aug-repeats', '0', '--output', str(tmp_path / 'out'), '--experiment', name]
        if name == 'finetune_all':
            arguments += ['--initial-checkpoint', str(tmp_path / 'cbam_resnet18.pth')]
        if name == 'finetune_attention':
            arguments += ['--pretrained-path', str(tmp_path / 'resnet18.pth')]
        runs.append(arguments)
    done = _python(['-c', MANY, json.dumps(runs)], tmp_path)
    assert done.returncode == 0, done.stderr
    for name in names:
        assert (tmp_path / 'out' / name / 'last.pth.tar').is_file(), name


def test_what_timms_reader_sees_otherwise_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ('cat/2020/a.png', 'cat/b.jpg', 'dog/c.png', '.ipynb_checkpoints/d.png', 'fox/e.webp'):
        path = tmp_path / 'train' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (4, 4)).save(path)
    _, timms = find_images_and_targets(str(tmp_path / 'train'))
    assert set(timms) == {'2020', 'cat', 'dog', '.ipynb_checkpoints'}  # What the sentences are about.
    folders, files = recipe.read_otherwise(tmp_path)
    assert 'takes the name of each of these folders for a class of its own' in folders
    assert [n in folders for n in ('cat/2020', '.ipynb_checkpoints', 'dog')] == [True, True, False]
    assert 'leaves out .webp files' in files
    assert main(['recipe', 'cbam_in1k', '--data-dir', str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert folders in err and files in err and 'class of its own' not in out
    for name in ('cat/2020', '.ipynb_checkpoints', 'fox'):
        shutil.rmtree(tmp_path / 'train' / name)
    assert recipe.read_otherwise(tmp_path) == [] == recipe.read_otherwise(tmp_path / 'absent')
