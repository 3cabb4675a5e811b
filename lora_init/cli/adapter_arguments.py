"""The arguments that describe an adapter, and the `LoraConfig` that they make."""

from __future__ import annotations

import json
from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction, Namespace
from typing import Any

from torch import nn

from lora_init import LoraConfig
from lora_init.cli.checkpoints import task_type
from lora_init.registry import Initializer, Options, build_options, describe, resolve

MODEL_HELP = "folder or hub name, or the packaged minilm or smollm2"


def add_adapter_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--method", default="pissa", help="see `lora-init list` (default: pissa)")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the method; may be repeated",
    )
    parser.add_argument("-r", "--r", type=int, default=8, help="rank (default: 8)")
    parser.add_argument("--lora-alpha", type=float, help="default: the rank, so that s = 1")
    parser.add_argument("--use-rslora", action="store_true", help="s = alpha / sqrt(r)")
    parser.add_argument(
        "--target-modules",
        default="all-linear",
        metavar="NAMES",
        help="names with commas, or a regular expression as 're:…' (default: all-linear)",
    )
    parser.add_argument(
        "--target-parameters",
        metavar="NAMES",
        help="fused weights of experts, such as experts.down_proj; as --target-modules",
    )
    parser.add_argument(
        "--experts",
        action=BooleanOptionalAction,
        help="whether all-linear includes fused experts (default: of the models that PEFT maps)",
    )
    parser.add_argument("--exclude-modules", metavar="NAMES", help="as --target-modules")
    parser.add_argument("--seed", type=int, default=0)


def adapter_config(arguments: Namespace, model: nn.Module, base_name: str) -> LoraConfig:
    """The configuration that the arguments describe, for this model.

    Raises:
        ValueError: an argument is not supported.
    """
    return LoraConfig(
        r=arguments.r,
        lora_alpha=arguments.r if arguments.lora_alpha is None else arguments.lora_alpha,
        use_rslora=arguments.use_rslora,
        target_modules=_names(arguments.target_modules),
        target_parameters=_names(arguments.target_parameters),
        experts=arguments.experts,
        exclude_modules=_names(arguments.exclude_modules),
        init_lora_weights=_method(arguments),
        task_type=task_type(model),
        base_model_name_or_path=base_name,
    )


def positive(text: str) -> int:
    """An argument that must be an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise ArgumentTypeError(f"{text} is not supported: must be at least 1")
    return value


def method_of(name: str, argument: str) -> tuple[Initializer, Options]:
    """A method and its default options; the error names the argument of the command.

    Raises:
        ValueError: the method is unknown.
    """
    try:
        return resolve(name)
    except ValueError as error:
        message = str(error).replace("init_lora_weights=", argument)
        raise ValueError(message.replace("True (kaiming), False (random) or ", "")) from error


def _method(arguments: Namespace) -> dict[str, Any]:
    spec, options = method_of(arguments.method, "--method ")
    values = describe(spec, options)
    given = {}
    for option in arguments.option:
        name, equals, text = option.partition("=")
        if not equals:
            raise ValueError(f"--option {option!r} is not supported: must be NAME=VALUE")
        try:
            given[name] = json.loads(text)
        except ValueError:
            given[name] = text
    build_options(spec.options, given, f"--option ({spec.name})")
    return values | given


def _names(text: str | None) -> str | list[str] | None:
    if text is None or text == "all-linear":
        return text
    if text.startswith("re:"):
        return text.removeprefix("re:")
    return [name.strip() for name in text.split(",") if name.strip()]
