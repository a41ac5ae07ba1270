"""The files of this repository, for tests that read the sources."""

from __future__ import annotations

import ast
import functools
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFTOVERS = {"__pycache__", "build", "dist", "runs", "wandb", "outputs"}


@functools.cache
def files() -> list[Path]:
    """Files under version control or about to be, relative to the root; without git, all but caches and outputs."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        return sorted({Path(line) for line in listed if (ROOT / line).is_file()})
    found = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return sorted(path for path in found if not LEFTOVERS & set(path.parts) and not _cached(path))


def python_files(*folders: str) -> list[Path]:
    """The Python files under these top-level folders."""
    return [path for path in files() if path.suffix == ".py" and path.parts[0] in folders]


@functools.cache
def syntax(path: Path) -> ast.Module:
    """Syntax tree of a Python file."""
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> set[str]:
    """What a file imports, at its top or inside functions: "a.b" for `from a import b`, "a" for `import a`."""
    names = set()
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _cached(path: Path) -> bool:
    return path.parts[0] in {".venv", ".git"} or any(part.endswith((".egg-info", "_cache")) for part in path.parts)
