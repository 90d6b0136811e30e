"""Every command and number of the README and of the docstrings: they parse, run, and are true."""
import ast
import importlib
import itertools
import re
import shlex
import statistics
import sys

import pytest
import reproduce
import torch
from conftest import ROOT, SCRIPTS, SMALL
from test_data import save

from common import load_data

README = (ROOT / "README.md").read_text()
README_TEXT = " ".join(README.split())      # wherever its lines break
LABS = (ROOT / "tests/course/labs.md").read_text()
RECORDS = ROOT / "tests/reference/runs.jsonl"
TEACHER = ROOT / "tests/reference/wrn16_3-cifar10.pt"
FROM = "from-tests-reference-wrn16_3-cifar10.pt_cifar10"        # the label of its students
COMMAND = r"python ((?:kd|at|atang|fsp|overhaul|skd)\.py[^`#\n|&]*)"


def commands() -> list[str]:
    texts = [README, LABS]
    texts += [ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text())) for name in SCRIPTS]
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
    for name in re.findall(r"`(\w+\.py)`", README) + re.findall(r"(tests/[\w/]+\.\w+)", README):
        assert name == "mine.py" or (ROOT / name).exists(), name
    texts = [(ROOT / f"{name}.py").read_text() for name in
             ["kd", "tests/tools/reproduce", "tests/tools/look"]]
    entries = {key for name in SCRIPTS for key in importlib.import_module(name).RECIPES["shapes"]}
    for flag in re.findall(r"`--(?:no-)?([a-z0-9-]+)", README):
        assert flag in ("help", "fix") or flag.replace("-", "_") in entries or any(
            re.search(rf'\("--{flag}"', text) for text in texts), flag
    for script, functions in re.findall(r"\| `(\w+)\.py` \|.*\| (`[\w`, ]+`) \|", README):
        for function in re.findall(r"\w+", functions):
            assert hasattr(importlib.import_module(script), function)
    code = re.search(r"```python\n(def kd_loss.*?)```", README, re.S)[1]
    assert code in (ROOT / "kd.py").read_text()


def test_ci_calls_the_readmes_test_command():
    command = re.search(r"requirements.txt && (python -m pytest[^`\n]*)", README)[1]
    assert (ROOT / ".ci/run").read_text().endswith(f"\n{command}\n")
    assert ".ci/run" in (ROOT / ".github/workflows/tests.yml").read_text()


def test_a_student_is_used_as_the_readme_says(cli, tmp_path, capsys):
    """The README's lines give a picture the logits that it had in the test loader."""
    data = tmp_path / "pictures"
    for split, label, red in itertools.product(("train", "test"), ("ant", "bee"), (9, 80, 170)):
        save(data / split / label / f"{red}.png", (red, 250 * (label == "ant"), 99))
    flags = ["--dataset", "folder", "--data-dir", data, "--image-size", 16, "--baseline"]
    assert cli("kd", *SMALL, "--train-images", 6, *flags, "--out", tmp_path / "runs").code == 0
    last, = (tmp_path / "runs").rglob("last.pt")
    code = re.search(r"```python\n(import torch\n.*?)```", README, re.S)[1]
    code = re.sub(r'"runs/\S+last.pt"', repr(str(last)), code)
    code = code.replace('"picture.png"', repr(str(data / "test/ant/170.png")))
    capsys.readouterr()
    exec(code, space := {})
    assert capsys.readouterr().out.strip() in ("ant", "bee")
    _, loader = load_data("folder", data, 6, "cpu", augment=False, seed=0, image_size=16)
    images, _ = next(iter(loader))
    torch.testing.assert_close(space["logits"], space["student"](images)[:1])   # 170 before 80, 9


SHOWN = README + (ROOT / "tests/reference/README.md").read_text()
SHOWN_TEXT = " ".join(SHOWN.split())


def driven() -> list[str]:
    """The tables that the README and the records' show, by the command beside each."""
    found = re.findall(r"python tests/tools/reproduce\.py ((?:[^\n]|(?<=\\)\n)*--runs[^\n]*)",
                       SHOWN.replace("\\\n", " "))
    return sorted({" ".join(line.split("#")[0].split("`")[0].split()) for line in found})


def table_of(out: str) -> str:
    return "\n".join(line for line in out.splitlines() if line.startswith("|"))


@pytest.mark.parametrize("command", driven())
def test_a_table_of_the_readme_is_that_of_the_recorded_runs(command, cli):
    """To the letter what the driver prints from the recorded runs, or those below a label."""
    label = re.search(r"--out runs/(\w+)|$", command)[1] or ""
    done = cli("reproduce", *command.split(), "--show", "--out", RECORDS / label)
    table = table_of(done.out)
    assert done.code == 0 and table.count("±") > 4 and len(driven()) > 1, done.err
    assert table in SHOWN


def test_the_gain_of_the_first_commands_is_that_of_the_recorded_runs(cli):
    """With one thread, with two, on another processor, which round otherwise; a teacher each."""
    gains, teachers = [], set()
    for folder in (RECORDS / f"first-{where}/shapes/shapes" for where in (1, 2, "epyc")):
        for run in reproduce.runs_below(folder / "overhaul/wrn16_2-wrn16_1"):
            alone, log = (reproduce.complete(place / run.name)
                          for place in (folder / "baseline/wrn16_1", run.parent))
            gains.append(log[-1]["test"] - alone[-1]["test"])
            teachers.add(log[0]["settings"]["teacher_hash"])
    middle, spread = statistics.mean(gains), statistics.stdev(gains)
    assert middle > 2 * spread and len(teachers) == len(gains) > 5
    told = (f"In {len(gains)} runs, each with a teacher of its own, the gain was between "
            f"{min(gains):+.2f} and {max(gains):+.2f}: {middle:.2f} ± {spread:.2f}.")
    assert told in README_TEXT


def run_below(place: reproduce.Path, method: str, seed: int) -> reproduce.Path:
    """Of a method, from WRN16-3 to WRN16-1, or of baseline/<network>."""
    networks = "" if method.startswith("baseline/") else "wrn16_3-wrn16_1"
    return place / method / networks / f"seed{seed}"


def at_length(method: str, seed: int = 0) -> reproduce.Path:
    """The runs of 200 epochs; the teacher of KD's seed 0 is not yet rounded for the repo."""
    unrounded = method.startswith("baseline/") or (method, seed) == ("kd", 0)
    label = "epochs-150_fsp-epochs-50_" * (method == "fsp") + ("cifar10" if unrounded else FROM)
    return run_below(RECORDS / label / "folder/cifar10-jeon", method, seed)


def test_what_shows_of_the_papers_claims_is_in_the_recorded_runs():
    """Each `a` over `b` of the table: the mean difference seed by seed, and its standard error."""
    rows = re.findall(r"\| `([\w-]+)` over `(\w+)` \| \S* ?\| (.+) \| (.+) \| (.+) \|", SHOWN)
    assert len(rows) == 8
    for first, second, *told in rows:
        for place, seeds, cell in zip(("shapes/shapes", "epochs-15_cifar10-images/folder/"
                                       "cifar10-jeon", None), (5, 3, 3), told, strict=True):
            tests = []
            for method in (first, second):
                method = method.replace("baseline", "baseline/wrn16_1")
                runs = {seed: run_below(RECORDS / place, method, seed) if place else
                        at_length(method, seed) for seed in range(seeds)}
                logs = {seed: reproduce.complete(run) for seed, run in runs.items()}
                tests.append({seed: log[-1]["test"] for seed, log in logs.items() if log})
                assert len(tests[-1]) == seeds or not place
            assert reproduce.gain(*tests) == cell, (first, second)


def test_the_runs_on_cifar10_are_the_recorded_ones(cli):
    """200 epochs beside the paper's Table 2, and 16 as the driver prints them."""
    command, = re.findall(r"reproduce\.py (atang-2 .*--teacher-ckpt \S+)\n",
                          SHOWN.replace("\\\n", ""))
    table = table_of(cli("reproduce", *command.split(), "--show", "--out", RECORDS).out)
    assert table in SHOWN and table.count("|") == 6 * 6
    paper = {row.label: row.paper for row in reproduce.TABLES["atang-2"].rows[:5]}
    methods = {"teacher": "baseline/wrn16_3", "baseline": "baseline/wrn16_1", "KD": "kd",
               "AT+KD": "at", "ATang+KD": "atang", "AMD+KD": "atang-amd", "FSP": "fsp",
               "overhaul": "overhaul", "SKD": "skd"}
    assert list(methods) == [row.label for row in reproduce.TABLES["six"].rows]
    lasts, bests = {}, {}
    for label, method in methods.items():
        logs = {seed: reproduce.complete(at_length(method, seed)) for seed in range(3)}
        logs = {seed: log for seed, log in logs.items() if log}
        assert len(logs) == (1 if label in ("teacher", "AMD+KD", "FSP", "overhaul") else 3)
        epochs = 150 if method == "fsp" else 200        # and 50 of stage 1
        tests = {seed: [row["test"] for row in log[1:]] for seed, log in logs.items()}
        for seed, log in logs.items():
            assert len(log) == 1 + epochs and log[0]["settings"]["images"] == [50000, 10000]
        last, best = ({seed: pick(own) for seed, own in tests.items()}
                      for pick in (lambda own: own[-1], max))
        lasts[label], bests[label] = last, best
        fifth, gains = epochs // 5, ["", ""]
        if label not in reproduce.ALONE:
            of = [float(paper[name].split()[0]) if name in paper else None
                  for name in (label, "baseline")]
            gains = [f"{of[0] - of[1]:+.2f}" if of[0] else "",
                     reproduce.gain(last, lasts["baseline"])]
        short = [label, paper.get(label, ""), gains[0], reproduce.spread([*last.values()]),
                 gains[1], reproduce.spread([*best.values()])]
        means = [f"{statistics.mean(sum((own[part] for own in tests.values()), [])):.2f}"
                 for part in (slice(fifth, 2 * fifth), slice(-fifth, None))]
        long = [label, ", ".join(f"{x:.2f}" for x in last.values()),
                ", ".join(f"{x:.2f} ({1 + tests[seed].index(x)})" for seed, x in best.items()),
                *means, f"{reproduce.minutes(at_length(method)):.1f}"]
        for cells, text in ((short, README), (long, SHOWN)):
            line = "|" + "".join(f" {cell} |" if cell else " |" for cell in cells) + "\n"
            assert line in text, line
    fsp, alone = (reproduce.complete(at_length(methods[label]))[1]["test"]
                  for label in ("FSP", "baseline"))
    assert (f"student has {fsp:.2f} % after the first epoch of stage 2 and the baseline {alone:.2f}"
            in SHOWN_TEXT)
    earlier = reproduce.complete(RECORDS / "first_cifar10" /
                                 at_length("baseline/wrn16_3").relative_to(RECORDS / "cifar10"))
    told = f"({earlier[-1]['test']:.2f}; label first_cifar10"
    assert len(earlier) == 201 and told in SHOWN_TEXT
    docstring = " ".join((ROOT / "kd.py").read_text().split('"""')[1].split())
    last, best = (", ".join(f"{statistics.mean(of[name].values()):.2f}"
                            for name in list(methods)[:3]) for of in (lasts, bests))
    assert f"{last} here, in the best epochs {best}" in docstring
    for name, label in zip(("kd", "at", "atang", "overhaul", "skd"), ("KD", "AT+KD", "ATang+KD",
                                                                      "overhaul", "SKD")):
        docstring = (ROOT / f"{name}.py").read_text().split('"""')[1]
        mean, runs = statistics.mean(lasts[label].values()), len(lasts[label])
        assert f"CIFAR-10, a GPU: {mean:.1f} % ({runs} seed{'s' * (runs > 1)})\n" in docstring
    alone, atang = lasts["baseline"].values(), statistics.mean(lasts["ATang+KD"].values())
    for told in (f"seed 0, against which the gains without ± stand, is "
                 f"{statistics.mean(alone) - lasts['baseline'][0]:.2f} below the mean",
                 f"{float(paper['ATang+KD'].split()[0]) - atang:.2f} missing points"):
        assert told in README_TEXT, told
    differences = [[lasts[a][seed] - lasts[b][seed] for seed in range(3)]
                   for a, b in (("ATang+KD", "AT+KD"), ("SKD", "KD"), ("SKD", "baseline"))]
    assert ("a std of {:.2f} (ATang to AT) to {:.2f} (SKD to KD)".format(
        *map(statistics.stdev, differences)) in SHOWN_TEXT)
    gained = differences[2]
    assert (f"SKD's was {gained[0]:.2f} by it and is {statistics.mean(gained):.2f} by three"
            in SHOWN_TEXT)
    assert label == "SKD"       # the loop's last
    falls = [statistics.mean(own[40:80]) - statistics.mean(own[-40:]) for own in tests.values()]
    assert "lose {:.2f}, {:.2f} and {:.2f} points".format(*falls) in SHOWN_TEXT
    kept = [f"{reproduce.complete(run)[-1]['test']:.2f}" for run in
            reproduce.runs_below(RECORDS / "epochs-20_cifar10")]        # ATang, then its teacher
    assert f"teacher {kept[1]} %, student {kept[0]})" in README_TEXT


def test_atangs_weight_is_as_recorded():
    """gamma, by the number of epochs."""
    for epochs, gamma, told in (
            ("epochs-4", 5000, "72.20 % with gamma = 5000"),
            ("again_epochs-4", 5000, "72.47 on another"), ("epochs-4", 25000, "75.15 with 25000"),
            ("epochs-4", 100000, "73.65 with 100000"),
            ("epochs-16", 5000, "83.65 with 5000"), ("epochs-16", 25000, "83.67 with 25000")):
        flag = f"gamma-{gamma}_" * (gamma != 5000)
        place = RECORDS / f"{epochs}_{flag}{FROM}" / "folder/cifar10-jeon"
        log = reproduce.complete(run_below(place, "atang", 0))
        assert log[0]["settings"]["gamma"] == gamma and told in SHOWN_TEXT
        assert f"{log[-1]['test']:.2f}" == told.split()[0]


def test_fsp_from_a_teacher_of_another_task_is_as_recorded():
    own, other = "epyc_train-images-1000", "other-task_train-images-1000"
    alone = {}
    for label, method, line in ((own, "baseline/wrn16_1", "alone"), (own, "fsp/wrn16_3-wrn16_1",
                                "FSP from WRN16-3 on the same"), (other, "fsp/wrn16_3-wrn16_1",
                                                                  "FSP from WRN16-3 on CIFAR-10")):
        tests = {seed: reproduce.complete(RECORDS / label / "shapes/shapes" / method /
                                          f"seed{seed}")[-1]["test"] for seed in range(3)}
        alone = alone or tests
        gained = reproduce.gain(tests, alone) if tests is not alone else ""
        told = f"{reproduce.spread([*tests.values()])} | {gained} |".replace("  ", " ")
        assert re.search(rf"\| {line}[^|]* \| {re.escape(told)}\n", SHOWN), told


def test_the_teacher_that_comes_with_the_repo(cli, tmp_path):
    """The recorded run's, and its weights, rounded, those that were measured: 87.50 %."""
    kept = torch.load(TEACHER, weights_only=True)
    log = reproduce.complete(RECORDS / "cifar10/folder/cifar10-jeon/baseline/wrn16_3/seed0")
    assert kept["log"] == log and kept["class_names"] == log[0]["settings"]["class_names"]
    shown = cli("reproduce", *"six --dataset folder --data-dir cifar10 --epochs 4 --teacher-ckpt "
                "tests/reference/wrn16_3-cifar10.pt --show --out".split(), RECORDS)
    assert table_of(shown.out) in LABS and shown.out.count("| 1 |") == 8
    flags = ["--epochs", 1, "--batch-size", 10, "--device", "cpu", "--out", tmp_path / "runs",
             "--teacher-ckpt", TEACHER, "--student", "resnet8"]
    for split, name, shade in itertools.product(("train", "test"), kept["class_names"], (50, 200)):
        save(tmp_path / "data" / split / name / f"{shade}.png", (shade, 90, 250 - shade))
    done = cli("kd", "--dataset", "folder", "--data-dir", tmp_path / "data", *flags)
    assert done.code == 0 and "200 of 200 epochs on 50000 images" in done.out, done.all
    run = tmp_path / "runs/folder/cifar10-jeon/kd/wrn16_3-resnet8/seed0"
    assert reproduce.log_of(run)[0]["settings"]["teacher_hash"] == "6eb4e332"
    assert "another class_names" in cli("kd", "--dataset", "shapes", *flags).refused()


def test_the_recorded_runs_are_of_todays_recipes():
    """A recipe that changes makes a table another table."""
    runs = [run for run in reproduce.runs_below(RECORDS) if "stage1" not in run.parts]
    assert len(runs) > 40
    for run in runs:
        log = reproduce.complete(run)
        script, *words = log[0]["command"]
        today = reproduce.parsed(script, (*words, "--recipe", run.parts[-4]))
        assert not reproduce.changed(run, today), run
        assert log[0]["settings"]["split"] == "test", run
        assert not any(word.startswith("/") for word in log[0]["command"]), run


def test_the_accuracies_in_the_docstrings_are_the_recorded_ones():
    """`84.1 % (5 seeds)` beside a command is the mean over the recorded seeds of the shapes."""
    for name in SCRIPTS:
        text = (ROOT / f"{name}.py").read_text().split('"""')[1]
        for line in re.findall(rf"python {name}\.py --dataset shapes.* \d\d\.\d %.*", text):
            method = "baseline/wrn16_1" if "--baseline" in line else f"{name}/wrn16_3-wrn16_1"
            label = "epochs-11_fsp-epochs-4" if name == "fsp" else ""
            logs = [reproduce.complete(RECORDS / label / "shapes/shapes" / method / f"seed{seed}")
                    for seed in range(5)]
            value = statistics.mean(log[-1]["test"] for log in logs)
            assert f"{value:.1f} %" in line, line
