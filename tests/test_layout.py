"""The layout of the package: docs/architecture.md lists its folders in order, and imports only point up that list."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"
PAGE = ROOT / "docs" / "architecture.md"
UNLISTED = {"", "__main__"}  # simclr/__init__.py, the public API, which cli/ may import, and `python -m simclr`


def listed_places(page: str) -> list[str]:
    """The folders and files of the page's block that begins with src/simclr/, in order, without .py and /."""
    block = re.search(r"^```\nsrc/simclr/\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert block is not None, "docs/architecture.md has no block that begins with src/simclr/"
    places = [line.split()[0] for line in block[1].splitlines() if re.match(r" {2}\S", line)]
    return [place.removesuffix("/").removesuffix(".py") for place in places]


def find_modules(src: Path) -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    files = {".".join(path.relative_to(src).with_suffix("").parts): path for path in (src / "simclr").rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in files.items()}


def imported_modules(tree: ast.AST, modules: dict[str, Path], *, type_checking: bool) -> Iterator[str]:
    """Modules of the package that a file imports, at its top, in functions and, if asked for, under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            assert not node.level, f"relative import of {base}"
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                if submodule in modules:
                    yield submodule
                elif base in modules and submodule != "simclr.__version__":  # a constant that records carry
                    yield base
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING") and not type_checking:
            continue
        else:
            yield from imported_modules(node, modules, type_checking=type_checking)


def import_graph(src: Path, *, type_checking: bool) -> dict[str, set[str]]:
    """Module -> modules of the package that it imports."""
    modules = find_modules(src)
    return {
        name: set(imported_modules(ast.parse(path.read_text()), modules, type_checking=type_checking))
        for name, path in modules.items()
    }


def place_of(module: str) -> str:
    """The folder or file directly under src/simclr that a module belongs to."""
    return module.partition(".")[2].partition(".")[0]


def wrong_imports(src: Path, places: list[str]) -> list[str]:
    """Imports from a place that stands further down the list than the importing one."""
    position = {place: i for i, place in enumerate(places)}
    position[""] = position["cli"]  # the public API
    return [
        f"{module} imports {imported}"
        for module, imports in sorted(import_graph(src, type_checking=True).items())
        for imported in sorted(imports)
        if place_of(module) not in UNLISTED and position[place_of(imported)] > position[place_of(module)]
    ]


def test_the_page_lists_what_there_is():
    present = {place_of(module) for module in find_modules(SRC)} - UNLISTED
    places = listed_places(PAGE.read_text())
    assert set(places) == present and len(places) == len(present)


def test_a_folder_imports_only_from_those_above_it():
    assert wrong_imports(SRC, listed_places(PAGE.read_text())) == []


def test_no_circle_between_modules():
    circle = []
    graph = import_graph(SRC, type_checking=False)
    graph["simclr"] = set()  # it imports inside `__getattr__`, when a name of the API is first used
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = error.args[1]
    assert not circle, " imports ".join(reversed(circle))


def test_a_wrong_import_is_noticed(tmp_path):
    for name, text in {
        "__init__": "",
        "errors": "from simclr import __version__",
        "files": "def read():\n    from simclr.cli import main",
        "cli/main": "import simclr.errors\nif TYPE_CHECKING:\n    from simclr import load",
    }.items():
        path = tmp_path / "simclr" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (tmp_path / "simclr" / "cli" / "__init__.py").touch()
    assert wrong_imports(tmp_path, ["errors", "files", "cli"]) == ["simclr.files imports simclr.cli.main"]
    assert wrong_imports(tmp_path, ["cli", "errors", "files"]) == ["simclr.cli.main imports simclr.errors"]
    assert import_graph(tmp_path, type_checking=True)["simclr.cli.main"] == {"simclr", "simclr.errors"}
    assert import_graph(tmp_path, type_checking=False)["simclr.cli.main"] == {"simclr.errors"}


def test_the_pages_name_what_exists():
    """Links to files, and paths in backticks that begin with a folder of the repository or of the package."""
    folders = {path.name for base in (ROOT, SRC / "simclr") for path in base.iterdir() if path.is_dir()}
    missing = []
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        if page.name in ("lab-notes.md", "CHANGELOG.md"):  # diaries: their paths are those of their day
            continue
        text = page.read_text()
        links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s:]+)\)", text)]
        missing += [f"{page.name}: {link}" for link in links if not (page.parent / link).exists()]
        named = re.findall(r"`((\w+)/(?:[\w-]+/)*(?:[\w-]+\.(?:py|md))?)`", text)
        missing += [
            f"{page.name}: {path}"
            for path, folder in named
            if folder in folders and not any((base / path).exists() for base in (ROOT, SRC / "simclr"))
        ]
    assert not missing


def test_no_test_imports_from_another_test_file():
    """What they share is in helpers.py and in other files whose names do not begin with test_."""
    files = Path(__file__).parent.glob("test_*.py")
    assert [
        file.name for file in files if re.search(r"^\s*(?:from|import) test_", file.read_text(), re.MULTILINE)
    ] == []
