"""The commands: python -m san_model train | evaluate | upscale | compare, or san ... where the package is installed."""

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, get_args, get_origin, get_type_hints

import docstring_parser
from jsonargparse import ActionYesNo, ArgumentParser
from PIL import Image

from .compare import CompareOptions, compare
from .evaluate import EvaluateOptions, evaluate
from .images import InputError
from .options import PRESETS, TrainOptions
from .train import TrainingError, train
from .upscale import UpscaleOptions, upscale

COMMANDS: dict[str, tuple[type, Callable[[Any], object]]] = {
    "train": (TrainOptions, train),
    "evaluate": (EvaluateOptions, evaluate),
    "upscale": (UpscaleOptions, upscale),
    "compare": (CompareOptions, compare),
}
POSITIONAL = {"input"}


def command_parser(options: type, defaults: dict[str, Any]) -> ArgumentParser:
    """A parser with one flag per field of the dataclass, whose docstring is the help."""
    text = docstring_parser.parse(options.__doc__ or "")
    helps = {parameter.arg_name: " ".join((parameter.description or "").split()) for parameter in text.params}
    parser = ArgumentParser(description=f"{text.short_description} {text.long_description or ''}")
    parser.add_argument("--config", action="config", help="YAML file with any of these options; later flags win")
    if options is TrainOptions:
        parser.add_argument(
            "--preset", choices=sorted(PRESETS), default="paper", help="defaults; --config and flags win"
        )
    hints = get_type_hints(options)
    for field in fields(options):
        hint = hints[field.name]
        arguments: dict[str, Any] = {"help": helps[field.name]}
        default = defaults.get(field.name, field.default_factory() if field.default is MISSING and
                               field.default_factory is not MISSING else field.default)  # fmt: skip
        if field.name in POSITIONAL:
            parser.add_argument(field.name, type=hint, **arguments)
            continue
        arguments |= {"required": True} if default is MISSING else {"default": default}
        flag = "--" + field.name.replace("_", "-")
        if hint is bool:
            parser.add_argument(flag, action=ActionYesNo(no_prefix="no-"), **arguments)
        elif get_origin(hint) is list:
            parser.add_argument(flag, nargs="+", type=get_args(hint)[0], **arguments)
        else:
            parser.add_argument(flag, type=hint, **arguments)
    return parser


def build_parser(preset: str = "paper") -> ArgumentParser:
    parser = ArgumentParser(prog="san", description=__doc__)
    commands = parser.add_subcommands(required=True)
    for name, (options, _) in COMMANDS.items():
        defaults = PRESETS[preset] if options is TrainOptions else {}
        commands.add_subcommand(name, command_parser(options, defaults), help=(options.__doc__ or "").splitlines()[0])
    return parser


def _preset(argv: list[str] | None) -> str:
    """The preset of a command line: its values are defaults that the parser has to know beforehand."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset", default="paper", nargs="?")
    preset = parser.parse_known_args(argv)[0].preset
    return preset if preset in PRESETS else "paper"  # the parser proper will complain


def main(argv: list[str] | None = None) -> int:
    """Runs a command line; returns the exit status."""
    # A large photograph is no attack; what has twice the pixels that Pillow warns of is still refused.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    preset = _preset(argv)
    parsed = build_parser(preset).parse_args(argv)
    name = parsed.subcommand
    values = parsed[name].as_dict()
    if values.get("preset", preset) != preset:  # it stands in the --config file
        values = build_parser(values["preset"]).parse_args(argv)[name].as_dict()
    options, command = COMMANDS[name]
    try:
        command(options(**{field.name: values[field.name] for field in fields(options)}))
    except (InputError, TrainingError, OSError) as error:
        print(f"san {name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"san {name}: interrupted", file=sys.stderr)
        return 130
    return 0
