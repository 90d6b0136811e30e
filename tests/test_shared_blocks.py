"""The blocks between `# --- shared: NAME ---` and `# --- end shared ---` are alike everywhere.

    python tests/test_shared_blocks.py --fix     copies them from kd.py into the other scripts
"""
import ast
import difflib
import importlib
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^# --- shared: (?P<name>[^\n]+) ---\n.*?^# --- end shared ---\n", re.S | re.M)
OPTIONAL = {"kd loss"}      # a method without a KD term has no use for it
PACKAGES = {"torch", "torchvision", "numpy", "common"}
# networks and data, and nothing else
FROM_COMMON = {"UserError", "create_model", "model_names", "load_weights", "check_pair",
               "load_data", "DATASETS", "Taps", "Loader"}
# short is plain; a fork may raise what it needs
BUDGET = {"kd.py": 423, "at.py": 449, "skd.py": 482, "atang.py": 511, "fsp.py": 510,
          "overhaul.py": 517, "common.py": 1408, "README.md": 190}
METHODS = "at atang fsp overhaul skd"


def scripts(root: Path) -> list[Path]:
    """All but kd.py that are one: the five, and what has a shared block; no stray snippet."""
    return [path for path in sorted(root.glob("*.py")) if path.stem in METHODS.split() or
            path.stem not in ("common", "kd") and "# --- shared: " in path.read_text()]


def blocks(path: Path) -> dict[str, str]:
    text = path.read_text()
    found = [(match["name"], match[0]) for match in BLOCK.finditer(text)]
    names = [name for name, _ in found]
    assert len(names) == len(set(names)), f"{path.name}: a block stands twice"
    markers = len(re.findall(r"^# --- (?:shared|end shared)", text, re.M))
    assert markers == 2 * len(names), f"{path.name}: a block does not end, or ends twice"
    return dict(found)


def differences(root: Path) -> str:
    """A unified diff of every block that is not kd.py's; empty when all are."""
    source, report = blocks(root / "kd.py"), ""
    for path in scripts(root):
        own = blocks(path)
        for name in source.keys() - own.keys() - OPTIONAL:
            report += f"{path.name}: block '{name}' is missing\n"
        for name, text in own.items():
            report += "".join(difflib.unified_diff(
                source.get(name, "").splitlines(True), text.splitlines(True),
                f"kd.py: {name}", f"{path.name}: {name}"))
    return report


def fix(root: Path) -> None:
    source = blocks(root / "kd.py")
    for path in scripts(root):
        text = path.read_text()
        fixed = BLOCK.sub(lambda match: source.get(match["name"], match[0]), text)
        if fixed != text:
            path.write_text(fixed)
            changed = sum(line[0] in "+-" for line in difflib.ndiff(text.splitlines(),
                                                                    fixed.splitlines()))
            print(f"{path.name}: {changed} lines changed")


def test_blocks_are_alike():
    assert not differences(ROOT), differences(ROOT)


@pytest.mark.parametrize("name", blocks(ROOT / "kd.py"))
def test_one_changed_character_fails_and_fix_mends_it(tmp_path, name):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for path in scripts(ROOT):
        original = path.read_text()
        block = blocks(path).get(name)
        if block is None:
            continue
        (tmp_path / path.name).write_text(original.replace(block, ""))
        missing = f"{path.name}: block '{name}' is missing"
        assert name in OPTIONAL or missing in differences(tmp_path)
        middle = len(block) // 2
        while not block[middle].isalpha():
            middle += 1
        changed = block[:middle] + block[middle].swapcase() + block[middle + 1:]
        (tmp_path / path.name).write_text(original.replace(block, changed))
        assert path.name in differences(tmp_path)
        fix(tmp_path)
        assert (tmp_path / path.name).read_text() == original and not differences(tmp_path)


@pytest.mark.parametrize("path", [ROOT / "common.py", ROOT / "kd.py", *scripts(ROOT)],
                         ids=lambda path: path.name)
def test_imports(path):
    """The standard library and three packages; of common.py, networks and data alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module]
            if node.module == "common":
                assert {alias.name for alias in node.names} <= FROM_COMMON
        else:
            continue
        for module in modules:
            top = module.split(".")[0]
            assert top in sys.stdlib_module_names | PACKAGES, f"{path.name} imports {module}"
            assert path.name != "common.py" or top != "common"


def test_equal_recipes_have_equal_training():
    """So that runs/<data set>/<recipe>/ can share its baselines; and one script's keys agree."""
    training = {}
    for path in [ROOT / "kd.py", *scripts(ROOT)]:
        script = importlib.import_module(path.stem)
        for name, recipe in script.RECIPES.items():
            assert recipe.keys() == script.RECIPES["shapes"].keys(), f"{path.name}: {name}"
            own = {key: recipe[key] for key in script.TRAINING}
            assert training.setdefault(name, own) == own, f"{path.name}: {name}"


@pytest.mark.parametrize("name", BUDGET)
def test_the_budget_of_lines(name):
    assert len((ROOT / name).read_text().splitlines()) <= BUDGET[name]


def test_the_shared_text_is_short():
    assert blocks(ROOT / "kd.py")["the run"].count("\n") <= 300


def test_kd_and_at_differ_by_the_lesson():
    first, second = ((ROOT / name).read_text().splitlines() for name in ("kd.py", "at.py"))
    changed = [line for line in difflib.ndiff(first, second) if line[0] in "+-"]
    assert len(changed) <= 120


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")) + sorted((ROOT / "tests").rglob("*.py")),
                         ids=lambda path: path.name)
def test_lines_fit_and_nothing_is_left_to_do(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        assert len(line) <= 100, f"{path.name}:{number} has {len(line)} characters"
        assert line == line.rstrip(), f"{path.name}:{number} ends in blanks"
        assert not re.search("TO" + "DO|FIX" + "ME|X" + "XX", line), f"{path.name}:{number}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--fix"]:
        fix(ROOT)
    print(differences(ROOT) or "all shared blocks are those of kd.py")
