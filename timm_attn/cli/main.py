"""The command line: `timm-attn list | quickstart | compare | convert | recipe | card | push | pull | ...`.

Every subcommand is one file here and one Python call of the package. What a command prints on
stdout is data; what it says goes to stderr. Exit code 2 is wrong usage, 1 is a failure.
"""

import argparse
import importlib
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from huggingface_hub.errors import HfHubHTTPError

from ..layers import did_you_mean
from ..version import package_version
from . import bench, card, compare, convert, explain, publish, pull, push, quickstart, recipe, space
from . import list as list_

# In the order in which --help shows them.
COMMANDS = (list_, quickstart, compare, recipe, convert, card, push, pull, publish, explain, space, bench)


class _Parser(argparse.ArgumentParser):
    """argparse's, which says what a word may have been meant to be that is none of the choices."""

    def error(self, message: str) -> NoReturn:
        if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            message += '.' + did_you_mean(choice[1], re.findall(r"[^\s,']+", choice[2]))
        super().error(message)


def build_parser() -> argparse.ArgumentParser:
    """The parser with all subcommands."""
    parser = _Parser(
        prog='timm-attn',
        description="Attention ResNets for timm, equal to the authors' code.",
        epilog='example: timm-attn quickstart --out runs/quickstart',
    )
    parser.add_argument(
        '--import',
        action='append',
        default=[],
        dest='modules',
        metavar='MODULE',
        help='import a module first, which registers attentions of your own; may be given several times, anywhere',
    )
    parser.add_argument('--version', action='version', version=f'timm_attn {package_version()}')
    commands = parser.add_subparsers(title='commands', dest='command', required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    for subparser in commands.choices.values():
        subparser.set_defaults(parser=subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The words behind `timm-attn`; sys.argv's by default.

    Returns:
        The exit code.
    """
    parser = build_parser()
    # Before or behind the command's name; argparse itself takes it only before.
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument('--import', action='append', default=[], dest='modules')
    found, rest = early.parse_known_args(argv)
    args, unknown = parser.parse_known_args(rest)
    if unknown:
        meant = did_you_mean(unknown[0].partition('=')[0], args.parser._option_string_actions)
        args.parser.error(f'unrecognized arguments: {" ".join(unknown)}.{meant}')
    # Commands that hand them on, to other processes or a Space, read them here.
    args.imports = [*found.modules, *getattr(args, 'imports', [])]
    try:
        if found.modules:
            sys.path.insert(0, '')  # as `python -m` does: the module may lie here
        for module in found.modules:
            importlib.import_module(module)
        return args.run(args) or 0
    except (ValueError, TypeError, ImportError, RuntimeError, OSError, HfHubHTTPError) as e:
        print(f'timm-attn {args.command}: {e}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f'timm-attn {args.command}: interrupted', file=sys.stderr)
        return 130


if __name__ == '__main__':
    sys.exit(main())
