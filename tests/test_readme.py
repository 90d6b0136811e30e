"""Every command and number of the README and of the docstrings: they parse, run, and are true."""
import ast
import importlib
import re
import shlex
import statistics
import sys

import pytest
import reproduce
from conftest import ROOT

README = (ROOT / "README.md").read_text()
LABS = (ROOT / "tests/labs.md").read_text()
RECORDS = ROOT / "tests/reference"
METHODS = ["kd", "at", "atang", "fsp", "overhaul", "skd"]
COMMAND = r"python ((?:kd|at|atang|fsp|overhaul|skd)\.py[^`#\n|&]*)"


def commands() -> list[str]:
    texts = [README, LABS] + [ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text()))
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
    texts = [(ROOT / f"{name}.py").read_text() for name in
             [*METHODS, "common", "tests/reproduce", "tests/look"]]
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


SHOWN = README + (RECORDS / "README.md").read_text()


def driven() -> list[str]:
    """The tables that the README and the records' show, by the command beside each."""
    found = re.findall(r"python tests/reproduce\.py ((?:[^\n]|(?<=\\)\n)*--runs[^\n]*)",
                       SHOWN.replace("\\\n", " "))
    return sorted({" ".join(line.split("#")[0].split("`")[0].split()) for line in found})


def test_the_readme_shows_tables():
    assert len(driven()) >= 2


@pytest.mark.parametrize("command", driven())
def test_a_table_of_the_readme_is_that_of_the_recorded_runs(command, cli):
    """To the letter what the driver prints from the logs in tests/reference."""
    done = cli("reproduce", *command.split(), "--show", "--out", RECORDS)
    table = "\n".join(line for line in done.out.splitlines() if line.startswith("|"))
    assert done.code == 0 and table.count("±") > 4, done.err
    assert table in SHOWN


def test_the_gain_of_the_main_command_is_that_of_the_recorded_runs():
    folder = RECORDS / "epochs-12/shapes"
    alone, ours = ([reproduce.complete(folder / name / f"seed{seed}")[-1]["test"]
                    for seed in range(5)] for name in ("baseline/wrn16_1", "atang/wrn16_3-wrn16_1"))
    gains = [b - a for a, b in zip(alone, ours)]
    error = statistics.stdev(gains) / 5 ** 0.5
    told = (f"gains {statistics.mean(gains):.2f} ± {error:.2f} points, "
            f"from {statistics.mean(alone):.2f} ± {statistics.stdev(alone):.2f} "
            f"to {statistics.mean(ours):.2f} ± {statistics.stdev(ours):.2f};")
    assert told in " ".join(README.split())


def test_the_recorded_runs_are_of_todays_recipes():
    """A recipe that changes makes a table another table."""
    paths = [path for path in sorted(RECORDS.rglob("log.jsonl")) if "stage1" not in path.parts]
    assert len(paths) > 40
    for path in paths:
        log = reproduce.complete(path.parent)
        assert log and not reproduce.outdated(log), path
        assert log[0]["settings"]["split"] == "test", path
        assert not any(word.startswith("/") for word in log[0]["command"]), path


def test_all_rows_see_equally_many_images():
    """In `six`: an epoch of FSP's first stage counts as one of the others'."""
    for path in sorted(RECORDS.rglob("fsp/wrn16_3-wrn16_1/seed0/log.jsonl")):
        own = reproduce.complete(path.parent)[0]["settings"]
        both = own["epochs"] + own["fsp_epochs"]
        others = [reproduce.complete(other.parent)[0]["settings"]["epochs"] for other in
                  RECORDS.rglob("kd/wrn16_3-wrn16_1/seed0/log.jsonl")
                  if reproduce.complete(other.parent)[0]["settings"]["images"] == own["images"]]
        assert both in others, path


def test_the_accuracies_in_the_docstrings_are_the_recorded_ones():
    """`84.1 % (5 seeds)` beside a command is the mean over the recorded seeds of the shapes."""
    for name in METHODS:
        text = (ROOT / f"{name}.py").read_text().split('"""')[1]
        for line in re.findall(rf"python {name}\.py --dataset shapes.* \d\d\.\d %.*", text):
            method = "baseline/wrn16_1" if "--baseline" in line else f"{name}/wrn16_3-wrn16_1"
            above = "epochs-11_fsp-epochs-4" if name == "fsp" else ""
            logs = [reproduce.complete(folder) for folder in
                    sorted((RECORDS / above / "shapes" / method).glob("seed*"))]
            value = statistics.mean(log[-1]["test"] for log in logs)
            assert len(logs) == 5 and f"{value:.1f} %" in line, line
