"""Do the libraries still take what our pages pass? Every import and every keyword is looked up.

    python tools/drift.py FILE.py ...

A name that can no longer be imported and a keyword that a function no longer takes are faults.
"""

import ast
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# These swallow any keyword and ignore what they do not know: their own attributes are the list.
# A temperature without effect was lost that way once.
ATTRIBUTES_ARE_KEYWORDS = {"GenerationConfig", "BitsAndBytesConfig"}


def imports(tree: ast.AST) -> tuple[dict[str, Any], list[str]]:
    """Import everything that a file imports.

    Args:
        tree: the parsed file.

    Returns:
        the imported things by the name they have in the file, and a sentence for each that
        cannot be imported any more.
    """
    found: dict[str, Any] = {}
    gone: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                module = attempt(node.lineno, alias.name, None, gone)
                found[alias.asname or first] = module if alias.asname else sys.modules.get(first)
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                thing = attempt(node.lineno, node.module, alias.name, gone)
                found[alias.asname or alias.name] = thing
    return {name: thing for name, thing in found.items() if thing is not None}, gone


def attempt(line: int, module: str, name: str | None, gone: list[str]) -> Any:
    """Import a module, or a name out of it; note in `gone` what is not there.

    Example:
        >>> gone = []
        >>> attempt(1, "json", "dumpz", gone), gone
        (None, ['line 1: json has no dumpz'])
    """
    try:
        loaded = importlib.import_module(module)
    except ImportError as error:
        gone.append(f"line {line}: {module} cannot be imported: {error}")
        return None
    if name is None or hasattr(loaded, name):
        return getattr(loaded, name) if name else loaded
    try:
        return importlib.import_module(f"{module}.{name}")
    except ImportError:
        gone.append(f"line {line}: {module} has no {name}")
        return None


def resolve(node: ast.AST, names: dict[str, Any], line: int, gone: list[str]) -> Any:
    """Follow a dotted name, such as gr.Blocks, into the imported libraries.

    Args:
        node: what stands before the bracket of a call.
        names: the imported things.
        line: for the message.
        gone: takes a sentence if a module or a class has lost that attribute.

    Returns:
        The thing called; None if it is not one that was imported.
    """
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if not isinstance(node, ast.Attribute):
        return None
    owner = resolve(node.value, names, line, gone)
    if not (inspect.ismodule(owner) or inspect.isclass(owner)):
        return None
    if not hasattr(owner, node.attr):
        gone.append(f"line {line}: {owner.__name__} has no {node.attr}")
    return getattr(owner, node.attr, None)


def keywords_of(target: Any) -> set[str] | None:
    """List the keywords that something takes; None if it takes any, or cannot say.

    Example:
        >>> sorted(keywords_of(attempt)), keywords_of(dict)
        (['gone', 'line', 'module', 'name'], None)
    """
    if getattr(target, "__name__", "") in ATTRIBUTES_ARE_KEYWORDS and inspect.isclass(target):
        return set(vars(target())) | set(inspect.signature(target).parameters)
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    return {name for name, p in parameters.items() if p.kind is not p.POSITIONAL_ONLY}


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    """Yield every call with a keyword, and every other one too: names may be gone as well."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def drift(source: str) -> list[str]:
    """List what a file asks for that the installed libraries no longer have.

    Args:
        source: Python.

    Returns:
        One sentence for each finding, with its line; empty if all is well.

    Example:
        >>> drift("from json import dumps\\ndumps({}, indent=1)\\n")
        []
        >>> drift("from textwrap import indent\\nindent('a', prefix='b', suffix='c')\\n")
        ["line 2: indent no longer takes ['suffix']"]
    """
    tree = ast.parse(source)
    names, found = imports(tree)
    for call in calls(tree):
        target = resolve(call.func, names, call.lineno, found)
        allowed = keywords_of(target) if callable(target) else None
        if allowed is None:
            continue
        gone = [k.arg for k in call.keywords if k.arg and k.arg not in allowed]
        if gone:
            name = getattr(target, "__name__", ast.unparse(call.func))
            found.append(f"line {call.lineno}: {name} no longer takes {gone}")
    return sorted(set(found), key=lambda text: int(text.split()[1].rstrip(":")))


def main(paths: list[str]) -> int:
    """Print the findings of all files; 1 if there are any."""
    findings = [f"{path}, {text}" for path in paths for text in drift(Path(path).read_text())]
    print("\n".join(findings) or f"{len(paths)} files: every import and keyword is still there.")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
