"""How the files read: nodes per code line, width, length of functions; what they import."""

import ast
import io
import sys
import tokenize
from pathlib import Path

import pytest

from experiments.tests.common import ROOT

FILES = sorted(ROOT.glob("*.py"))
OURS = {"soar", "sample", "train", "test_soar", "experiments"}
TESTS = sorted((ROOT / "experiments/tests").rglob("*.py"))
MODULES = sorted({*(ROOT / "experiments").rglob("*.py")} - {*TESTS})
ROOMS = {  # room of experiments/: the rooms whose code it may take beside its own
    "port": set(),
    "evaluate": set(),
    "theory": set(),
    "shapes": {"evaluate"},
    "cost": {"evaluate", "shapes"},
}
NODES_PER_LINE, COLUMNS, FUNCTION_LINES = 8.5, 100, 50
LONGER = {("train.py", "train"): 80}  # the training loop
NO_CODE = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER"}


def docstrings(tree: ast.AST) -> list[ast.Expr]:
    """The docstrings of a module, its classes and functions."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    return [node.body[0] for node in nodes if ast.get_docstring(node) is not None]


def lines_of(node: ast.AST) -> set[int]:
    return set(range(node.lineno, node.end_lineno + 1))


def code_lines(source: str, tree: ast.AST) -> set[int]:
    """Lines that hold code: no blank ones, comments or docstrings."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if tokenize.tok_name[token.type] not in NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return lines.difference(*map(lines_of, docstrings(tree)))


def nodes_per_line(source: str) -> float:
    """Statements and expressions per code line."""
    tree = ast.parse(source)
    left_out = {id(node) for doc in docstrings(tree) for node in ast.walk(doc)}
    nodes = [
        x for x in ast.walk(tree) if isinstance(x, ast.stmt | ast.expr) and id(x) not in left_out
    ]
    return len(nodes) / len(code_lines(source, tree))


def function_lengths(source: str) -> dict[str, int]:
    """Lines of each function, but for docstrings."""
    tree = ast.parse(source)
    docs = set().union(*map(lines_of, docstrings(tree)))
    functions = [x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)]
    return {x.name: len(lines_of(x) - docs) for x in functions}


def names_taken(source: str) -> list[list[str]]:
    """What a file imports, wherever in it, as the parts of a.b and of `from a.b import c`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [x.name.split(".") for x in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [[*node.module.split("."), x.name] for x in node.names]
    return found


def imported(source: str) -> set[str]:
    """The top packages that a file imports."""
    return {parts[0] for parts in names_taken(source)}


def rooms_taken(source: str) -> set[str]:
    """What a file imports of experiments: rooms, and files that lie beside the rooms."""
    taken = names_taken(source)
    return {parts[1] for parts in taken if parts[0] == "experiments" and len(parts) > 1}


def third_party(path: Path) -> set[str]:
    return imported(path.read_text()) - sys.stdlib_module_names - OURS


def test_the_files_at_the_top_are_the_four():
    assert [path.name for path in FILES] == ["sample.py", "soar.py", "test_soar.py", "train.py"]


@pytest.mark.parametrize("name, most", [("train.py", 5200), ("sample.py", 3700)])
def test_the_trainer_and_the_sampler_stay_small(name, most):
    tree = ast.parse((ROOT / name).read_text())
    assert sum(isinstance(x, ast.stmt | ast.expr) for x in ast.walk(tree)) <= most


def test_the_files_at_the_top_import_one_another_in_one_direction_only():
    found = {path.name: imported(path.read_text()) & OURS for path in FILES}
    assert found.pop("train.py") == {"sample", "soar"}
    assert found == {"soar.py": set(), "sample.py": {"soar"}, "test_soar.py": {"soar"}}
    assert third_party(ROOT / "soar.py") == {"torch", "einops"}


def lines_in(paths: list[Path]) -> int:
    return sum(path.read_text().count("\n") for path in paths)


def test_the_readme_experiments_and_tests_stay_small():
    assert lines_in([ROOT / "README.md"]) <= 160
    assert lines_in(MODULES) <= 6800
    assert lines_in([*TESTS, ROOT / "test_soar.py"]) <= 7500
    for path in TESTS:
        assert lines_in([path]) < 700, path.name


@pytest.mark.parametrize("path", [*FILES, *MODULES, *TESTS], ids=str)
def test_a_file_is_easy_to_read(path: Path):
    source = path.read_text()
    assert max(map(len, source.splitlines()), default=0) <= COLUMNS
    if source:
        assert nodes_per_line(source) <= NODES_PER_LINE
    lengths = {} if path in TESTS else function_lengths(source)
    for name, length in lengths.items():
        assert length <= LONGER.get((path.name, name), FUNCTION_LINES), name


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_takes_code_of_the_rooms_it_may(room: str):
    files = list((ROOT / "experiments" / room).rglob("*.py"))
    assert len(files) > 2
    for path in files:
        assert rooms_taken(path.read_text()) <= {room, "environment"} | ROOMS[room], path.name


def test_requirements_are_what_the_files_at_the_top_import_and_no_more():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = {line.split("==")[0] for line in lines if not line.startswith("#")}
    imports = set().union(*map(third_party, FILES))
    by_others = {"tensorboard", "accelerate"}  # of torch.utils.tensorboard and of diffusers
    assert pinned == {"pillow" if name == "PIL" else name for name in imports} | by_others


def test_measures_equal_counts_by_hand():
    source = '"""Not\ncounted."""\n\ndef f(x):\n    """Nor this."""\n    # nor it\n'
    source += "    return (\n        x + 1\n    )\n"
    # The function, its return, x + 1, x and 1, over the lines of def, return, x + 1 and ).
    assert nodes_per_line(source) == 5 / 4
    assert function_lengths(source) == {"f": 5}  # the comment is one
    source = "def f():\n    import experiments.shapes\n    from train import x\n"
    assert imported(source) == {"experiments", "train"}
    source = "from experiments import port\nfrom experiments.cost.memory import x\n"
    source += "import experiments.demo, experiments\n"
    assert rooms_taken(source) == {"port", "cost", "demo"}
