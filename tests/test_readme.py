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
COMMAND = r"python ((?:kd|at|atang|fsp|overhaul|skd)\.py[^`#\n|&]*)"


def commands() -> list[str]:
    texts = [README] + [ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text()))
                        for name in METHODS]
    found = []
    for text in texts:
        text = text.replace("\\\n", " ")
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
    flags = [{"yours": "wrn16_1", "$T": "T"}.get(flag, flag) for flag in flags]
    monkeypatch.setattr(module, "load_data", load_data)
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(Parsed):
        module.main()


def test_the_readme_names_what_there_is():
    assert len(commands()) > 12
    for name in re.findall(r"`(\w+\.py)`", README) + re.findall(r"(tests/\w+\.py)", README):
        assert name == "mine.py" or (ROOT / name).exists(), name
    texts = [(ROOT / f"{name}.py").read_text() for name in [*METHODS, "common", "tests/reproduce"]]
    entries = {key for name in METHODS for key in importlib.import_module(name).RECIPES["shapes"]}
    for flag in re.findall(r"`--(?:no-)?([a-z0-9-]+)", README):
        assert flag == "help" or flag.replace("-", "_") in entries or any(
            f'add("--{flag}"' in text or f'argument("--{flag}"' in text for text in texts), flag
    for script, function in re.findall(r"\| `(\w+)\.py` \|.*\| `(\w+)`", README):
        assert hasattr(importlib.import_module(script), function)


def test_ci_calls_the_readmes_test_command():
    command = re.search(r"requirements.txt && (python -m pytest.*)", README)[1]
    assert (ROOT / ".ci/run").read_text().endswith(f"\n{command}\n")
    assert ".ci/run" in (ROOT / ".github/workflows/tests.yml").read_text()


def records(data: str, method: str) -> list[list[dict]]:
    network = "wrn16_1" if method == "baseline" else "wrn16_3-wrn16_1"
    return [[json.loads(line) for line in path.read_text().splitlines()]
            for path in sorted((RECORDS / data / method / network).glob("seed*.jsonl"))]


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


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
        seen = settings["epochs"] + settings.get("fsp_epochs", 0)       # the same for all rows
        assert seen * (settings["train_images"] or 4000) == 80_000
        teachers.add(settings.get("teacher_sha256"))
        last, base = ([log[-1]["test"] for log in some] for some in (logs, baseline))
        assert cells[2 * column] == spread(last)
        if method != "baseline":
            assert cells[2 * column + 1] == f"{statistics.mean(last) - statistics.mean(base):+.2f}"
    assert len(teachers) == 1


def test_the_recorded_runs_are_of_todays_recipe():
    """A recipe that changes makes the table another table."""
    for method in METHODS:
        recipe = importlib.import_module(method).RECIPES["shapes"]
        settings = records("shapes", method)[0][0]["settings"]
        if method == "fsp":     # 5 + 15 epochs against the others' 20
            recipe = recipe | {"epochs": 15, "fsp_weight": 0.01}
        # what was no setting yet when these were recorded was what it is by default now
        recorded = {key: settings.get(key, recipe[key]) for key in recipe}
        assert recorded == recipe
        lengths = {key: settings[key] for key in ("epochs", "fsp_epochs") if key in settings}
        for few in (log[0]["settings"] for log in records("shapes-1000", method)):
            assert {key: few[key] / 4 for key in lengths} == lengths
            assert few | lengths | {"train_images": None} == settings


@pytest.mark.parametrize("method", ["baseline", "atang"])
def test_the_runs_in_bf16_are_the_recorded_ones(method):
    rough, exact = records("shapes-bf16", method), records("shapes", method)
    assert all(log[0]["settings"] == exact[0][0]["settings"] | {"bf16": True} for log in rough)
    assert spread([log[-1]["test"] for log in rough]) in README


def mean_and_deviation(paths: list) -> str:
    logs = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]
    assert all(len(log) == log[0]["settings"]["epochs"] + 1 for log in logs)
    assert len({json.dumps(log[0]["settings"]) for log in logs}) == 1
    values = [log[-1]["test"] for log in logs]
    return spread(values) if len(values) > 1 else f"{values[0]:.2f}"


def test_the_parts_of_the_overhaul_are_those_of_the_recorded_runs():
    start = README.index("**Parts of the overhaul**")
    table = [line.split("|")[2].strip() for line in README[start:].splitlines()[5:10]]
    full = sorted((RECORDS / "shapes/overhaul/wrn16_3-wrn16_1").glob("*.jsonl"))[:3]
    parts = [sorted((RECORDS / "shapes-overhaul" / part).glob("*.jsonl"))
             for part in ("end", "position", "batch")] + [full]
    parts.append(sorted((RECORDS / "shapes-overhaul/running").glob("*.jsonl")))
    assert [len(paths) for paths in parts] == [3] * 5
    assert table == [mean_and_deviation(paths) for paths in parts]
    flags = [[json.loads(paths[0].read_text().splitlines()[0])["settings"][key]
              for key in ("position", "distance", "teacher_bn")] for paths in parts]
    assert flags == [["end", "l2", "running"], ["pre-relu", "l2", "running"],
                     ["pre-relu", "l2", "batch"], ["pre-relu", "partial-l2", "batch"],
                     ["pre-relu", "partial-l2", "running"]]


def test_the_growing_teachers_are_those_of_the_recorded_runs():
    """From the shallowest to the deepest: teacher, KD's student, SKD's."""
    text, folder = README[README.index("**Growing teachers**"):], RECORDS / "shapes-growing"
    found = re.findall(r"from\s(\d\d\.\d\d)\sto\s(\d\d\.\d\d)", text)[:3]
    assert len(found) == 3
    for ends, method, name in zip(found, ("teachers", "kd", "skd"), ("", "-resnet14", "-resnet14")):
        paths = [folder / method / f"resnet{depth}{name}/seed0.jsonl" for depth in (20, 110)]
        assert ends == tuple(mean_and_deviation([path]) for path in paths)
