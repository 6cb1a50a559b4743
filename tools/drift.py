"""Do the libraries still take what our pages pass? Every import and every keyword is looked up.

    python tools/drift.py               all our files, against what is installed
    python tools/drift.py FILE.py ...
    python tools/drift.py --newest      against the newest published, see tools/drift_newest.py

A name that can no longer be imported and a keyword that a function no longer takes are faults.
Looked up are calls of what a file imports, methods of what it makes (`trainer = SFTTrainer(...)`,
`with gr.Blocks() as page`), and the keys of a dictionary that is spread into such a call.
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
FOLDERS = ("notebooks/py", "helpers", "tools", "benchmarks", "tests", "docs/upstream")


def our_files(root: Path = ROOT) -> list[Path]:
    """List the files that pass keywords to the libraries."""
    return sorted(path for folder in FOLDERS for path in (root / folder).glob("*.py"))


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
    if isinstance(owner, Made):  # attributes that an object gets only when it is made are not seen
        return getattr(owner.kind, node.attr, None)
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


class Made:
    """An object that a file makes: all that is known of it is its class."""

    def __init__(self, kind: type):
        self.kind = kind


def bindings(tree: ast.AST) -> dict[str, list[ast.AST | None]]:
    """Say what each name of a file is bound to, wherever that happens.

    Returns:
        The values by name; None for a binding of any other kind (an argument, a loop, ...).

    Example:
        >>> found = bindings(ast.parse("a = f()\\nfor b in a: pass"))
        >>> [type(value).__name__ for value in found["a"]], found["b"]
        (['Call'], [None])
    """
    known: dict[int, ast.AST] = {}
    found: dict[str, list[ast.AST | None]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            known[id(node.targets[0])] = node.value
        if isinstance(node, ast.withitem) and node.optional_vars is not None:
            known[id(node.optional_vars)] = node.context_expr
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.setdefault(node.id, []).append(known.get(id(node)))
        if isinstance(node, ast.arg):
            found.setdefault(node.arg, []).append(None)
    return found


def made(tree: ast.AST, names: dict[str, Any]) -> dict[str, Made]:
    """Find the names that stand for an object of one imported class and for nothing else.

    Example:
        >>> tree = ast.parse("from pathlib import Path\\np = Path('a')\\nq = Path('b')\\nq = 1")
        >>> list(made(tree, imports(tree)[0]))
        ['p']
    """
    found = {}
    for name, values in bindings(tree).items():
        calls = [value for value in values if isinstance(value, ast.Call)]
        kinds = {resolve(call.func, names, 0, []) for call in calls}
        kind = kinds.pop() if len(calls) == len(values) and len(kinds) == 1 else None
        if inspect.isclass(kind) and name not in names:
            found[name] = Made(kind)
    return found


def spread_keys(value: ast.AST, bound: dict[str, list[ast.AST | None]]) -> set[str]:
    """List the keys that `**value` spreads into a call, as far as the file says them.

    Args:
        value: what stands behind the two stars.
        bound: the file's bindings.

    Returns:
        Keys that are written out; those that are computed are left out.

    Example:
        >>> tree = ast.parse("common = {'a': 1, 'b': 2}\\nf(**common, **dict(c=3))")
        >>> call = tree.body[1].value
        >>> sorted(spread_keys(call.keywords[0].value, bindings(tree)))
        ['a', 'b']
    """
    if isinstance(value, ast.Name):
        values = bound.get(value.id, [])
        return spread_keys(values[0], {}) if len(values) == 1 and values[0] else set()
    if isinstance(value, ast.Dict):
        keys = (key.value for key in value.keys if isinstance(key, ast.Constant))
        return {key for key in keys if isinstance(key, str)}
    if isinstance(value, ast.Call) and getattr(value.func, "id", "") == "dict":
        return {keyword.arg for keyword in value.keywords if keyword.arg}
    return set()


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
    bound = bindings(tree)
    names |= made(tree, names)
    for call in calls(tree):
        target = resolve(call.func, names, call.lineno, found)
        allowed = keywords_of(target) if callable(target) else None
        if allowed is None:
            continue
        asked = [k.arg for k in call.keywords if k.arg]
        for keyword in (k for k in call.keywords if not k.arg):
            asked += sorted(spread_keys(keyword.value, bound))
        gone = [name for name in asked if name not in allowed]
        if gone:
            name = getattr(target, "__name__", ast.unparse(call.func))
            found.append(f"line {call.lineno}: {name} no longer takes {gone}")
    return sorted(set(found), key=lambda text: int(text.split()[1].rstrip(":")))


def main(arguments: list[str]) -> int:
    """Print the findings of all files; 1 if there are any."""
    if arguments == ["--newest"]:
        from tools.drift_newest import compare

        return compare()
    paths = [Path(argument).resolve() for argument in arguments] or our_files()
    names = [path.relative_to(ROOT) if path.is_relative_to(ROOT) else path for path in paths]
    texts = [(name, drift(path.read_text())) for name, path in zip(names, paths, strict=True)]
    findings = [f"{name}, {text}" for name, found in texts for text in found]
    print("\n".join(findings) or f"{len(paths)} files: every import and keyword is still there.")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
