"""The layout of the source: which room may import which, no circles, and limits on sizes."""

import ast
from graphlib import CycleError, TopologicalSorter

import pytest

from scripts import ROOT

# room or root module -> level; imports go to lower levels, and within a level only as BESIDE says
LEVELS = {
    **dict.fromkeys(("errors", "progress"), 0),
    **dict.fromkeys(("models", "storage"), 1),
    **dict.fromkeys(("diffusion", "metrics", "loss", "dataset"), 2),
    **dict.fromkeys(("flags", "weights", "training"), 3),
}
SCRIPT_LEVEL = 4
BESIDE = {("flags", "weights"), ("training", "weights")}
AROUND = {"benchmarks", "demo", "examples", "experiments", "tests"}  # may import everything
TRAINING_SCRIPTS = ("train_vae", "train_repae", "train_ldm_only")
MOST_LINES, MOST_LINES_OF_MAIN, MOST_IMPORTS = 350, 30, 14

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py"))
}
TREES = {module: ast.parse(path.read_text(encoding="utf8")) for module, path in FILES.items()}


def room_of(module: str) -> str:
    """The folder of a module, or the module itself if it is in the root."""
    return module.partition(".")[0]


def imports_of(module: str) -> set[str]:
    """The project's modules that a module imports, wherever in its code."""
    names = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {name if (name := f"{node.module}.{alias.name}") in FILES else node.module for alias in node.names}
    return names & FILES.keys()


SOURCE = [module for module in sorted(FILES) if room_of(module) not in AROUND]
IMPORTS = {module: imports_of(module) for module in SOURCE}


def level(module: str) -> int:
    return LEVELS.get(room_of(module), SCRIPT_LEVEL)


def may_import(module: str, other: str) -> bool:
    rooms = (room_of(module), room_of(other))
    within_a_room = rooms[0] == rooms[1] and rooms[0] in LEVELS
    return within_a_room or rooms in BESIDE or level(other) < level(module)


def test_imports_go_down():
    wrong = [f"{module} -> {other}" for module in SOURCE for other in IMPORTS[module] if not may_import(module, other)]
    assert not wrong, "\n".join(sorted(wrong))


def test_no_circle_of_imports():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_file_is_too_long():
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf8").splitlines())
        for module, path in FILES.items()
        if room_of(module) != "tests"
    }
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


@pytest.mark.parametrize("script", TRAINING_SCRIPTS)
def test_training_scripts_are_short(script):
    (main,) = (node for node in TREES[script].body if getattr(node, "name", None) == "main")
    assert main.end_lineno - main.lineno + 1 <= MOST_LINES_OF_MAIN
    assert len(IMPORTS[script]) <= MOST_IMPORTS, sorted(IMPORTS[script])
