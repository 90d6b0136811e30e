"""The blocks between `# --- shared: NAME ---` and `# --- end shared ---` are alike everywhere.

    python tests/test_shared_blocks.py --fix     copies them from kd.py into the other scripts
"""
import ast
import difflib
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^# --- shared: (?P<name>[^\n]+) ---\n.*?^# --- end shared ---\n", re.S | re.M)
OPTIONAL = {"kd loss"}      # a method without a KD term has no use for it
PACKAGES = {"torch", "torchvision", "numpy", "common"}
# networks and data, and what belongs to them: weights in files, flags, precision, processes
FROM_COMMON = {"ImageLoader", "UserError", "add_data_flags", "begin_run", "check_pair",
               "flag_options", "full", "has_bf16", "join_processes", "limited", "load_data",
               "load_weights", "new_model", "one_line", "processes", "read_log", "read_run",
               "share_statistics", "summed", "weights_hash", "write_run"}
BUDGET = {"kd.py": 295, "at.py": 330, "README.md": 190}     # lines; of any other script 380


def scripts(root: Path) -> list[Path]:
    return [path for path in sorted(root.glob("*.py")) if path.stem not in ("common", "kd")]


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
        path.write_text(BLOCK.sub(lambda match: source.get(match["name"], match[0]), text))


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
        middle = len(block) // 2
        while not block[middle].isalpha():
            middle += 1
        changed = block[:middle] + block[middle].swapcase() + block[middle + 1:]
        (tmp_path / path.name).write_text(original.replace(block, changed))
        assert path.name in differences(tmp_path)
        fix(tmp_path)
        assert (tmp_path / path.name).read_text() == original and not differences(tmp_path)


def test_a_missing_or_doubled_block_fails(tmp_path):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    text, found = (ROOT / "at.py").read_text(), blocks(ROOT / "at.py")
    name = next(name for name in found if name not in OPTIONAL)
    block = found[name]
    (tmp_path / "at.py").write_text(text.replace(block, ""))
    assert f"at.py: block '{name}' is missing" in differences(tmp_path)
    (tmp_path / "at.py").write_text(text + block)
    with pytest.raises(AssertionError, match="stands twice"):
        differences(tmp_path)


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_imports(path):
    """The standard library and three packages; of common, networks and loaders alone."""
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


@pytest.mark.parametrize("path", [ROOT / "kd.py", *scripts(ROOT)], ids=lambda path: path.name)
def test_no_sync_inside_the_step_loop(path):
    """In the loop over the batches only the reading every 50 steps waits for the device."""
    fit = next(node for node in ast.parse(path.read_text()).body
               if isinstance(node, ast.FunctionDef) and node.name == "fit")
    loop = next(node for node in ast.walk(fit) if isinstance(node, ast.For)
                and "train_loader" in ast.unparse(node.iter))
    *every_step, last = loop.body
    assert ast.unparse(last.test) == "index % 50 == 1 or index == steps"
    calls = [ast.unparse(node.func) for statement in every_step for node in ast.walk(statement)
             if isinstance(node, ast.Call)]
    waits = [call for call in calls if call.split(".")[-1] in
             ("item", "cpu", "tolist", "numpy", "float", "int", "synchronize", "nonzero", "print")]
    assert waits == ["(logits.argmax(1) == labels).float"]      # a cast on the device, no copy


@pytest.mark.parametrize("name", ["README.md", "kd.py", *(path.name for path in scripts(ROOT))])
def test_the_budget_of_lines(name):
    assert len((ROOT / name).read_text().splitlines()) <= BUDGET.get(name, 380)
    if name.endswith(".py"):
        assert sum(block.count("\n") for block in blocks(ROOT / name).values()) <= 175


def test_kd_and_at_differ_by_the_lesson():
    ours, theirs = ((ROOT / name).read_text().splitlines() for name in ("kd.py", "at.py"))
    changed = [line for line in difflib.ndiff(ours, theirs) if line[0] in "+-"]
    assert len(changed) < 115


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")) + sorted((ROOT / "tests").glob("*.py")),
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
