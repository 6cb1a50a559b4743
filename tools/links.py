"""Do the links inside the repository lead somewhere? Files, folders, and headings behind a #.

    python tools/links.py

Links to other sites are not asked: no check of this project waits for the network.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import nbformat

LINK = re.compile(
    r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|<(?:a|img)\b[^>]*?(?:href|src)=\"([^\"]+)\""
)
OUTSIDE = re.compile(r"[a-z][a-z0-9+.-]*:|//", re.IGNORECASE)
FENCE = re.compile(r"^(```|~~~).*?^\1[ \t]*$", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^#{1,6}[ \t]+(.+?)[ \t]*#*$", re.MULTILINE)


def pages(root: Path = ROOT) -> list[Path]:
    """List what people read: every markdown file and notebook that git holds or would take."""
    git = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    kinds = ["*.md", "*.ipynb"]
    out = subprocess.run([*git, "--", *kinds], cwd=root, capture_output=True, text=True, check=True)
    return sorted(
        {root / name for name in out.stdout.split("\0") if name and (root / name).is_file()}
    )


def prose(path: Path) -> str:
    """Read a page's text, without what stands in code fences and notebooks' code cells."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = nbformat.reads(text, as_version=4).cells
        text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return FENCE.sub("", text)


def anchor(heading: str) -> str:
    """Turn a heading into the name that GitHub gives it.

    Args:
        heading: what stands behind the hash signs.

    Returns:
        Small letters, digits, underscores and hyphens; each space a hyphen, punctuation dropped.

    Example:
        >>> anchor("What fails, and what is not done yet"), anchor("2. Two roads (`A` · [B](c.md))")
        ('what-fails-and-what-is-not-done-yet', '2-two-roads-a--b')
    """
    shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    """Name all headings of a page; one that comes again gets -1, -2 and so on.

    Example:
        >>> sorted(anchors("# A b\\n\\n## A b\\n"))
        ['a-b', 'a-b-1']
    """
    found: dict[str, int] = {}
    for heading in HEADING.findall(text):
        name = anchor(heading)
        found[name] = found.get(name, 0) + 1
    return {f"{name}-{n}" if n else name for name, times in found.items() for n in range(times)}


def dead_links(path: Path, root: Path = ROOT) -> list[str]:
    """List a page's links that lead nowhere, one sentence each.

    Args:
        path: a markdown file or a notebook.
        root: the repository; a link out of it is dead on GitHub.

    Returns:
        Sentences with the page, the link, and what is missing.
    """
    text, problems = prose(path), []
    inline = re.sub(r"`[^`\n]*`", "", text)
    for target in (one or two for one, two in LINK.findall(inline)):
        if OUTSIDE.match(target):
            continue
        name, _, fragment = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        where = f"{path.relative_to(root)}: {target}"
        if not file.exists() or not file.is_relative_to(root):
            problems.append(f"{where} is not there")
        elif fragment and file.suffix in (".md", ".ipynb") and fragment not in anchors(prose(file)):
            problems.append(f"{where}: {file.name} has no such heading")
    return problems


def main() -> int:
    """Print every dead link; 1 if there is one."""
    found = pages()
    problems = [problem for path in found for problem in dead_links(path)]
    print("\n".join(problems) or f"{len(found)} pages: every link inside leads somewhere.")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
