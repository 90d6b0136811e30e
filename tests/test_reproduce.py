"""The driver of the papers' tables: its rows, its command lines, and a table run end to end."""
import contextlib
import importlib
import json
import math
import signal
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import bench
import pytest
import reproduce
from common import one_line
from conftest import ROOT

TINY = ["--dataset", "shapes", "--teacher", "wrn10_1", "--student", "resnet8", "--epochs", "2",
        "--train-images", "96", "--device", "cpu"]


def plan_of(name: str, *extra: str, **replaced: object) -> "reproduce.Plan":
    flags = dict.fromkeys(["dataset", "teacher", "student", "epochs", "runs", "data_dir",
                           "teacher_ckpt"]) | replaced
    return reproduce.Plan(name, Namespace(**flags, out=Path("out")), list(extra))


@pytest.mark.parametrize("dataset", [None, "shapes"])
def test_every_row_is_a_command_that_its_script_takes(dataset, monkeypatch):
    """All rows of all tables, on their own data set and on shapes: into the folders we read."""
    jobs = {}
    for name in reproduce.TABLES:
        plan = plan_of(name, dataset=dataset, epochs=None if dataset is None else 4)
        for job in plan.jobs():
            assert jobs.setdefault(job.folders[0], job) == job, "two tables, one folder"
    assert len(jobs) > 200
    written = []

    def fit(model, step, loaders, args, run, seed, stop=None):
        written.append(args.out / args.dataset / run / f"seed{seed}")

    def nothing(*args, **options):
        return None

    for job in jobs.values():
        module = importlib.import_module(job.line[0].removesuffix(".py"))
        for name in ("load_data", "check_pair", "new_model", "get_teacher", "make_step", "report",
                     "first_stage", "connect"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, (lambda *args, **options: (None, None))
                                    if name == "load_data" else nothing)
        monkeypatch.setattr(module, "fit", fit)
        monkeypatch.setattr(sys, "argv", list(job.line))
        written.clear()
        module.main()
        assert tuple(written) == job.folders, job.line


def test_what_is_replaced_and_where_runs_lie():
    job = plan_of("six").jobs()[0]
    assert job.line[:6] == ("kd.py", "--dataset", "cifar10", "--student", "wrn16_3", "--recipe")
    assert job.folders == (Path("out/recipe-folder/cifar10/baseline/wrn16_3/seed0"),)
    small = plan_of("six", "--split", "val", dataset="shapes", epochs=15, runs=2)
    lines = [" ".join(job.line) for job in small.jobs()]
    assert len(lines) == 1 + 2 * 8 and not any("--recipe" in line for line in lines)
    fsp = next(job for job in small.jobs() if job.line[0] == "fsp.py")
    assert "--epochs 11 --fsp-epochs 4 --split val" in " ".join(fsp.line)   # 15 together
    assert fsp.folders == (
        Path("out/epochs-11_fsp-epochs-4_split-val/shapes/fsp/wrn16_3-wrn16_1/seed0"),)
    assert fsp.teacher == Path("out/epochs-15_split-val/shapes/baseline/wrn16_3/seed0")
    # FSP's Table 1: the three students share the first stage, so that they are one process
    three = [job for job in plan_of("fsp-1").jobs() if "--shared-stage1" in job.line]
    assert len(three) == 1 and len(three[0].folders) == 3
    assert "--epochs 54 --fsp-epochs 82" in " ".join(three[0].line)
    # settings e and f of the overhaul learn with half the batch, their teacher too
    halves = [job for job in plan_of("overhaul-3").jobs() if "pyramidnet200_240" in job.line]
    assert all("--batch-size 64" in " ".join(job.line) for job in halves) and len(halves) > 2
    given = plan_of("six", teacher_ckpt=Path("T.pt"), runs=1).jobs()
    assert len(given) == 8 and "--teacher-ckpt T.pt" in " ".join(given[-1].line)
    assert "from-T.pt" in str(given[-1].folders[0]) and "from" not in str(given[0].folders[0])
    # one pair in place of three, or of settings a to f: each method once
    assert len(plan_of("atang-2", teacher="wrn16_3", student="wrn16_1").rows) == 5
    settings = plan_of("overhaul-3", teacher="wrn16_3", student="wrn16_1").rows
    assert [row.label for row in settings] == ["teacher", "baseline", "KD", "AT", "overhaul"]
    # the smallest of runs has an epoch for each of FSP's stages
    assert "--fsp-epochs 1 " in " ".join(plan_of("six", epochs=1).jobs()[6].line)
    # on ImageNet teachers are torchvision's; on other data they are trained
    lines = [" ".join(job.line) for job in plan_of("overhaul-4").jobs()]
    assert len(lines) == 2 + 2 * 3 and not any("--student imagenet_resnet152" in x for x in lines)
    assert lines[0].startswith("kd.py --dataset imagenet --student imagenet_resnet50 --milestones")
    assert sum("--teacher-ckpt ResNet152_Weights.IMAGENET1K_V1" in line for line in lines) == 3
    lines = [" ".join(job.line) for job in plan_of("overhaul-4", dataset="shapes").jobs()]
    assert len(lines) == 3 + 2 * 3 and not any("Weights" in line for line in lines)
    # a data set in a folder goes by its name
    path = plan_of("six", dataset="folder", data_dir=Path("pictures/cats")).jobs()[0].folders[0]
    assert path == Path("out/cats/folder/baseline/wrn16_3/seed0")
    # on CIFAR-100 `six` keeps one recipe for all
    lines = [" ".join(job.line) for job in plan_of("six", dataset="cifar100").jobs()]
    assert all("--recipe folder" in line for line in lines)


def test_the_papers_numbers_are_those_of_its_best_and_worst_rows():
    """Typed by hand once more, from the tables themselves."""
    def paper(table: str, label: str, teacher: str, student: str) -> str:
        return next(row.paper for row in reproduce.TABLES[table].rows
                    if row[0] == label and row[2:4] == (teacher, student))

    assert paper("atang-2", "ATang+KD", "wrn16_3", "wrn16_1") == "86.27 ± 0.09"
    assert paper("atang-4", "KD", "mobilenetv2", "resnet20") == "87.28 ± 0.15"
    assert paper("atang-5", "teacher", "wrn28_6", "wrn16_8") == "86.67 ± 0.03"
    assert paper("overhaul-3", "(c) overhaul", "wrn28_4", "wrn16_2") == "75.92"
    assert paper("overhaul-3", "(f) teacher", "pyramidnet200_240", "pyramidnet110_84") == "84.43"
    assert paper("skd-3", "SKD", "wrn40_2", "wrn40_1") == "75.06"
    assert paper("skd-4", "KD", "resnet50", "vgg8") == "73.81"
    assert paper("skd-7", "SKD", "resnet110", "resnet14") == "69.2"
    large = [f"imagenet_{name}" for name in ("resnet152", "resnet50", "mobilenet", "resnet18")]
    assert paper("overhaul-4", "overhaul", *large[:2]) == "78.35"
    assert paper("overhaul-4", "KD", *large[1:3]) == "68.58"
    assert paper("skd-5", "AT", "imagenet_resnet34", large[3]) == "70.70"
    assert paper("skd-6", "KD", large[0], large[3]) == "68.84"
    assert paper("skd-4", "AT", "wrn40_2", "shufflenetv1") == "73.32"
    # the first epochs of a lower rate: Heo et al. drop at the 30th epoch, Guo et al. after it
    drops = {name: [1 + round(100 * part) for part in importlib.import_module(name)
                    .RECIPES["imagenet"]["milestones"]] for name in ("kd", "at", "overhaul", "skd")}
    assert drops == {"kd": [31, 61, 81, 91], "at": [31, 61, 91], "overhaul": [30, 60, 90],
                     "skd": [31, 61, 81, 91]}
    assert [1 + round(100 * float(part)) for part in reproduce.EVERY_30.split()[1:]] == [30, 60, 90]
    row = next(row for row in reproduce.TABLES["skd-7"].rows
               if (row.label, row.teacher) == ("KD", "resnet44"))
    assert row.beside == {"G_entropy": 0.222, "G_f": 0.063, "soft loss": 2.1}
    for name, table in reproduce.TABLES.items():
        assert len({row[:4] for row in table.rows}) == len(table.rows), name


def test_what_a_step_on_imagenet_costs():
    """Against the networks' own counts; the teacher's maps are not kept, bfloat16's are half."""
    pair = ("imagenet_resnet34", "imagenet_resnet18")
    large, small = (reproduce.operations(name, 224) for name in pair)
    done, kept = bench.cost("kd", *pair, bf16=False)
    assert done / 256 == pytest.approx(large + 3 * small, rel=1e-3)
    alone, kept_alone = bench.cost("kd", None, pair[1], bf16=False)
    assert alone / 256 == pytest.approx(3 * small, rel=1e-3)
    assert kept == pytest.approx(kept_alone, rel=1e-3)
    _, halved = bench.cost("kd", *pair, bf16=True)
    assert 0.48 < halved / kept < 0.56
    # by hand: the maps of ResNet18's 20 convolutions and norms, at 2.3 M values an image, twice
    assert 256 * 2 * 2.3e6 * 4 / 2 ** 30 == pytest.approx(kept, rel=0.2)


def cells(out: str) -> dict[str, list[str]]:
    lines = [line for line in out.splitlines() if line.startswith("| ")]
    return {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
            for line in lines}


class InProcess:
    """A run as the driver starts it, but in this process: importing torch takes three seconds."""

    def __init__(self, command, stdout, **options):
        script, *words = command[1:]
        kept, sys.argv = sys.argv, [script, *words]
        self.returncode = 0
        with contextlib.redirect_stdout(stdout):
            try:
                importlib.import_module(Path(script).stem).main()
            except Exception as error:
                print(one_line(error))
                self.returncode = 1
        sys.argv = kept

    def poll(self) -> int:
        return self.returncode


def test_a_table_from_the_first_run_to_the_last(cli, tmp_path, monkeypatch):
    """A failing row is named and stops no other; what is finished is not run again."""
    pair = ("wrn16_3", "wrn16_1")
    rows = [reproduce.Row("teacher", "teacher", *pair, "90.0"),
            reproduce.Row("baseline", "baseline", *pair, "80.0 ± 0.1", {"KL": 0.5}),
            reproduce.Row("KD", "kd.py --recipe folder", *pair, "81.5", {"KL": 0.25}),
            reproduce.Row("broken", "at.py --teacher-ckpt nowhere.pt", *pair)]
    table = reproduce.Table("ours", "?", "cifar10", 5, "kd.py --recipe folder", rows, ("KL", "CE"))
    monkeypatch.setitem(reproduce.TABLES, "test", table)
    monkeypatch.setattr(reproduce.subprocess, "Popen", InProcess)
    folder = tmp_path / "runs"
    command = ["test", *TINY, "--runs", "2", "--out", folder]
    nothing = cli("reproduce", *command, "--show")
    assert nothing.code == 0 and cells(nothing.out)["KD"] == ["", "", "0", ""]
    done = cli("reproduce", *command, "--jobs", "2")
    assert done.code == 1 and "0 of 7 runs are finished, 7 to go" in done.out
    broken = done.err.strip().splitlines()
    assert len(broken) == 4 and all("failed: at.py" in line for line in broken[::2])
    assert all("nowhere.pt is missing" in line for line in broken[1::2])
    assert "replaced: --dataset shapes --teacher wrn10_1 --student resnet8 --epochs 2" in done.out
    folder = folder / "epochs-2_train-images-96/shapes"
    tests = {name: [json.loads((folder / name / f"seed{seed}/log.jsonl").read_text()
                               .splitlines()[-1])["test"] for seed in range(2)]
             for name in ("baseline/resnet8", "kd/wrn10_1-resnet8")}
    base, ours = tests.values()
    gains = [a - b for a, b in zip(ours, base)]
    first, second = done.out.split("measured on")
    assert cells(first)["KD"][:3] == [
        f"{statistics.mean(ours):.2f} ± {statistics.stdev(ours):.2f}",
        f"{statistics.mean(gains):+.2f} ± {statistics.stdev(gains) / math.sqrt(2):.2f}", "2"]
    assert cells(first)["broken"] == ["", "", "0", ""]
    assert cells(first)["teacher"][2] == "1"
    assert float(cells(second)["KD"][2]) > 0
    again = cli("reproduce", *command, "--jobs", "2")
    assert again.code == 1 and "5 of 7 runs are finished, 2 to go" in again.out
    assert again.out.split("\ntest (")[1] == done.out.split("\ntest (")[1]
    # logs alone give the same tables, as those in tests/reference do
    kept = tmp_path / "kept"
    assert "5 finished runs" in cli("reproduce", "--record", tmp_path / "runs", kept).out
    assert "no finished run" in cli("reproduce", "--record", tmp_path / "x", kept).refused()
    shown = cli("reproduce", *command, "--show", "--out", kept).out.strip()
    assert shown in done.out and not list(kept.rglob("last.pt"))
    assert not any(str(tmp_path) in path.read_text() for path in kept.rglob("*.json*"))
    # a recipe that has changed since is not taken for today's
    jobs = plan_of("test", "--train-images", "96", dataset="shapes", teacher="wrn10_1",
                   student="resnet8", epochs=2, runs=2).jobs()
    header = json.loads((folder / "kd/wrn10_1-resnet8/seed0/log.jsonl").read_text().splitlines()[0])
    job = next(job for job in jobs if job.line[0] == "kd.py" and "--teacher" in job.line)
    job = job._replace(folders=(folder / "kd/wrn10_1-resnet8/seed0",),
                       line=("kd.py", *header["command"][1:]))
    (job.folders[0] / "last.pt").touch()
    assert reproduce.is_finished(job)
    module = importlib.import_module("kd")
    monkeypatch.setitem(module.RECIPES["shapes"], "weight_decay", 0.1)
    assert not reproduce.is_finished(job)


def test_a_command_as_a_user_types_it_is_held_against_its_recipe():
    """The data set as two words, as one, or left to the default; a flag with =."""
    recipes = importlib.import_module("atang").RECIPES
    for dataset, words in (("cifar10", []), ("shapes", ["--dataset=shapes"]),
                           ("cinic10", ["--dataset", "cinic10"]), ("shapes", ["--recipe=shapes"])):
        log = [{"settings": recipes[dataset] | {"lr": 3.0}, "command": ["/x/atang.py", *words]}]
        assert reproduce.outdated(log) == ["lr"]
        log[0]["command"].append("--lr=3")
        assert reproduce.outdated(log) == []


@pytest.mark.skipif(sys.platform != "linux", reason="runs outlive a killed driver elsewhere")
def test_kill_9_and_the_same_command_again(capsys, tmp_path, monkeypatch):
    """The driver's runs end with it; the same command finishes the table."""
    command = ["fsp-1", *TINY, "--runs", "1", "--jobs", "2", "--out", str(tmp_path)]
    command[command.index("--teacher") + 1] = "resnet8"
    process = subprocess.Popen([sys.executable, "-B", str(ROOT / "tests/reproduce.py"), *command],
                               stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not list(tmp_path.rglob("last.pt")) and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert str(tmp_path) not in line.read_text(), "a run has outlived the driver"
        except (FileNotFoundError, ProcessLookupError):
            pass
    monkeypatch.setattr(reproduce.subprocess, "Popen", InProcess)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *command])
    with pytest.raises(SystemExit) as end:
        reproduce.main()
    assert end.value.code == 0
    assert len(cells(capsys.readouterr().out)) == 1 + 3
    logs = [folder for folder in tmp_path.rglob("seed0") if reproduce.complete(folder)]
    assert len(logs) == 4       # the teacher, a third of its epochs, and FSP's two stages


def test_bad_arguments(cli):
    assert "invalid choice" in cli("reproduce", "seven").mistyped()
    assert "unrecognized arguments: --ron" in cli("reproduce", "--ron=2").mistyped()
    assert "0 is not from 1" in cli("reproduce", "six", "--runs", "0").mistyped()
    line = cli("reproduce", "fsp-1", "--dataset", "cinic10").refused()
    assert "fsp.py has no recipe for cinic10" in line
    assert "not for a whole table" in cli("reproduce", "six", "--seed=3").mistyped()


def test_the_list_names_every_table(cli):
    listed = cli("reproduce", "--dataset", "shapes", "--runs", "1", "--teacher", "wrn16_3",
                 "--student", "wrn16_1").out
    assert all(f"\n{name} " in listed for name in reproduce.TABLES)
