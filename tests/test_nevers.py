"""Which rooms may import which: the walls of the house."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "echo4o"
FILES = sorted(PACKAGE.rglob("*.py"))

# Room → what it must not import (prefixes), or None for "anything but the listed exceptions".
FORBIDDEN = {
    "echo4o.data": ("echo4o.model", "echo4o.train", "echo4o.checkpoint", "echo4o.generate", "echo4o.evaluate"),
    "echo4o.train": ("echo4o.generate",),
    "echo4o.generate": ("echo4o.train",),
}
ONLY = {
    "echo4o.model": ("echo4o.model", "echo4o.packed"),
    "echo4o.packed": (),
    "echo4o.config": ("echo4o.config",),
}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def within(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def imports_of(path: Path) -> set[str]:
    """Every echo4o module imported anywhere in a file, at the top or inside a function."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return {name for name in found if within(name, "echo4o") and name != "echo4o"}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_walls(path):
    module, imports = module_of(path), imports_of(path)
    for room, forbidden in FORBIDDEN.items():
        if within(module, room):
            assert not [name for name in imports for wall in forbidden if within(name, wall)]
    for room, allowed in ONLY.items():
        if within(module, room):
            outside = [name for name in imports if not any(within(name, inside) for inside in allowed)]
            assert not outside
    if not within(module, "echo4o.cli"):
        assert not [name for name in imports if within(name, "echo4o.cli")], "nothing imports the command line"


def test_the_check_sees_imports_of_every_form(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_nevers.PACKAGE", tmp_path / "echo4o")
    room = tmp_path / "echo4o" / "data"
    room.mkdir(parents=True)
    (room / "bad.py").write_text(
        "import echo4o.model.bagel\nfrom echo4o import train\nfrom ..checkpoint import hf\n"
        "def late():\n    from echo4o.cli import main\n"
    )
    found = imports_of(room / "bad.py")
    assert {"echo4o.model.bagel", "echo4o.train", "echo4o.checkpoint", "echo4o.cli"} <= found


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_file_is_a_drawer(path):
    assert path.stem not in {"utils", "helpers", "common", "misc"}
