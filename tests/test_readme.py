"""Every command and number of the README and of the docstrings: they parse, run, and are true."""
import ast
import importlib
import json
import re
import shlex
import statistics
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
RECORDS = ROOT / "tests/reference"
METHODS = ["kd", "at", "atang", "fsp", "overhaul", "skd"]
COMMAND = r"python ((?:kd|at|atang|fsp|overhaul|skd)\.py[^`#\n|]*)"


def commands() -> list[str]:
    texts = [README] + [ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text()))
                        for name in METHODS]
    found = []
    for text in texts:
        text = text.replace("\\\n", " ").replace("--teacher $T", "--teacher resnet20")
        for name, value in re.findall(r'^ *([A-Z])="(.*)"$', text, re.MULTILINE):
            text = text.replace(f"${name} ", f"{value} ")
        found += [" ".join(line.split("   ")[0].split()) for line in re.findall(COMMAND, text)]
    return sorted(set(found))


class Parsed(BaseException):
    pass


@pytest.mark.parametrize("command", commands())
def test_command_parses(command, monkeypatch):
    def load_data(dataset, data_dir, batch_size, device, **options):
        raise Parsed

    script, *flags = shlex.split(command)
    module = importlib.import_module(script.removesuffix(".py"))
    flags = [{"yours": "wrn16_1", "$T": "teacher.pt"}.get(flag, flag) for flag in flags]
    if "--help" in flags or "--summary" in flags:
        return
    monkeypatch.setattr(module, "load_data", load_data)
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(Parsed):
        module.main()


def test_the_readme_names_what_there_is():
    assert len(commands()) > 12
    for name in re.findall(r"`(\w+\.py)`", README) + re.findall(r"(tests/\w+\.py)", README):
        assert name == "mine.py" or (ROOT / name).exists(), name
    for flag in re.findall(r"`(--[a-z-]+)", README):
        own = f"{flag[2:].replace('-', '_')}=dict("
        texts = [(ROOT / f"{name}.py").read_text() for name in METHODS]
        assert any(f'add("{flag}"' in text or own in text for text in texts), flag
    for script, function in re.findall(r"\| `(\w+)\.py` \|.*\| `(\w+)`", README):
        assert hasattr(importlib.import_module(script), function)
    assert len(README.splitlines()) <= 200


def test_ci_calls_the_readmes_test_command():
    command = re.search(r"requirements.txt && (python -m pytest.*)", README)[1]
    assert (ROOT / ".ci/run").read_text().endswith(f"\n{command}\n")
    assert ".ci/run" in (ROOT / ".github/workflows/tests.yml").read_text()


def test_attention_snippet(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli("at", "--dataset", "shapes", "--train-images", "64", "--epochs", "1").code == 0
    printed = []
    snippet = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    exec(snippet, {"print": printed.append})
    ratio = float(re.search(r"is (\S+) times", printed[0])[1])
    assert 0.3 < ratio < 10


def records(data: str, method: str) -> list[list[dict]]:
    network = "wrn16_1" if method == "baseline" else "wrn16_3-wrn16_1"
    return [[json.loads(line) for line in path.read_text().splitlines()]
            for path in sorted((RECORDS / data / method / network).glob("seed*.jsonl"))]


@pytest.mark.parametrize("method", ["baseline", *METHODS])
def test_the_results_table_is_that_of_the_recorded_runs(method):
    label = "| baseline" if method == "baseline" else f"| `{method}.py`: "
    row = next(line for line in README.splitlines() if line.startswith(label))
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    teachers = set()
    for column, data in enumerate(("shapes", "shapes-1000")):
        logs, baseline = records(data, method), records(data, "baseline")
        assert len(logs) == len(baseline) == 5
        assert all(log[0]["settings"] == logs[0][0]["settings"] for log in logs)
        settings = logs[0][0]["settings"]
        assert settings["split"] == "test" and len(logs[0]) == settings["epochs"] + 1
        teachers.add(settings.get("teacher_sha256"))
        last, base = ([log[-1]["test"] for log in some] for some in (logs, baseline))
        assert cells[2 * column] == f"{statistics.mean(last):.2f} ± {statistics.stdev(last):.2f}"
        if method != "baseline":
            assert cells[2 * column + 1] == f"{statistics.mean(last) - statistics.mean(base):+.2f}"
    assert len(teachers) == 1


def test_the_recorded_runs_are_of_todays_recipe():
    """A recipe that changes makes the table another table."""
    for method in METHODS:
        recipe = importlib.import_module(method).RECIPES["shapes"]
        settings = records("shapes", method)[0][0]["settings"]
        assert {key: settings[key] for key in recipe} == recipe
        few = records("shapes-1000", method)[0][0]["settings"]
        assert few | {"epochs": 20, "train_images": None} == settings
