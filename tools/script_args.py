"""NAME=value arguments for a notebook's twin that is run as a script."""

import ast
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

SIMPLE = (str, int, float, bool, type(None), tuple, list)


def override(namespace: MutableMapping[str, Any], argv: list[str] | None = None) -> None:
    """Put the script's NAME=value arguments into the constants of a notebook's twin.

    Stands as the last line of the cell tagged `parameters`. Inside a notebook it does nothing:
    a notebook has no `__file__`, and there papermill writes a cell of its own instead.

    Args:
        namespace: the twin's `globals()`. Constants are its names in capitals that hold text, a
            number, True, False, None, a tuple or a list.
        argv: the arguments; None takes the script's own, if the script is this namespace's file.

    Raises:
        SystemExit: with one sentence, if an argument is no NAME=value, names no constant, or
            has a value of another kind than the constant.

    Example:
        >>> constants = {"MAX_STEPS": 60, "PROFILE": "auto", "MODEL": None}
        >>> override(constants, ["MAX_STEPS=5", "PROFILE=cpu"])
        >>> constants["MAX_STEPS"], constants["PROFILE"]
        (5, 'cpu')
    """
    if argv is None:
        own = namespace.get("__file__")
        is_script = own is not None and Path(sys.argv[0]).resolve() == Path(own).resolve()
        argv = sys.argv[1:] if is_script else []
    known = sorted(n for n, v in namespace.items() if n.isupper() and isinstance(v, SIMPLE))
    for argument in argv:
        name, equals, text = argument.partition("=")
        if not equals or name not in known:
            sys.exit(f"'{argument}' is not NAME=value with a NAME out of: {', '.join(known)}.")
        namespace[name] = parse(name, text, namespace[name])


def parse(name: str, text: str, default: Any) -> Any:
    """Read the value of one argument as the kind of thing that its constant holds.

    Args:
        name: the constant, for the message.
        text: the value as typed. What is no Python literal is text.
        default: the constant's present value. None stands for "any kind".

    Returns:
        The value. A whole number is taken where a decimal number stood, None anywhere.

    Raises:
        SystemExit: with one sentence, if the kinds differ.

    Example:
        >>> parse("LEARNING_RATE", "1", 2e-4), parse("MODEL", "assets/tiny_falcon", None)
        (1.0, 'assets/tiny_falcon')
    """
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if default is None or value is None:
        return value
    if isinstance(default, str):
        return value if isinstance(value, str) else text
    if type(default) is float and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        kind = type(default).__name__
        sys.exit(f"{name}={text}: {name} takes a value of type {kind}, as in {name}={default}.")
    return value
