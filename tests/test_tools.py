"""The tools: tables run end to end, recorded and measured; the sums behind the pictures; speed."""
import contextlib
import csv
import importlib
import json
import re
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from unittest import mock

import bench
import common
import look
import numpy as np
import pytest
import reproduce
import torch
from conftest import ROOT, SMALL, state
from PIL import Image
from test_data import save

RECORDS = ROOT / "tests/reference/runs.jsonl"
SHAPES, FSP = RECORDS / "shapes/shapes", RECORDS / "epochs-11_fsp-epochs-4/shapes/shapes/fsp"


def jobs_of(name: str, *extra: str, **replaced: object) -> list[reproduce.Job]:
    flags = dict.fromkeys("dataset teacher student epochs runs data_dir teacher_ckpt".split())
    return reproduce.Plan(name, Namespace(**flags | replaced, out=Path("out")), list(extra)).jobs()


@pytest.mark.parametrize("dataset", [None, "shapes"])
def test_every_row_is_a_command_that_its_script_takes(dataset, monkeypatch):
    """All rows of all tables, on their own data set and on shapes: into the folders we read."""
    jobs, written = {}, []
    for name in reproduce.TABLES:
        for job in jobs_of(name, dataset=dataset, epochs=4 if dataset else None):
            own, first = (vars(reproduce.parsed(line[0], line[1:])) for line in
                          (job.line, jobs.setdefault(job.runs[0], job).line))
            assert all(own[key] == first[key] for key in own.keys() & first.keys()), job
    assert len(jobs) > 200

    def train(model, teacher, loaders, args, run, seed, until=None):
        written.append(args.out / args.dataset / args.recipe / run / f"seed{seed}")

    fakes = {"train": train, "load_data": lambda *args, **options: (None, None),
             "prepared": lambda teacher, args: teacher, "get_teacher": lambda loaders, args: None}
    fakes |= dict.fromkeys(("check_pair", "build", "report"), lambda *args, **options: ())
    for job in jobs.values():
        module = importlib.import_module(job.line[0].removesuffix(".py"))
        for name, fake in fakes.items():
            monkeypatch.setattr(module, name, fake, raising=False)
        monkeypatch.setattr(sys, "argv", list(job.line))
        written.clear()
        module.main()
        assert tuple(dict.fromkeys(written)) == job.runs, job.line     # --distill-epochs: twice


def test_what_is_replaced_and_where_runs_lie():
    # all of `six` by one recipe, FSP too, but for shapes, which has its own
    for dataset, recipe in {"cifar10": "cifar10-jeon", "folder": "cifar10-jeon",
                            "cifar100": "cifar10-jeon", "shapes": "shapes"}.items():
        runs = [job.runs[0].parts for job in jobs_of("six", dataset=dataset)]
        assert {run[-5:-3] for run in runs} == {(dataset, recipe)}
    methods = "baseline kd at atang atang-amd fsp overhaul skd"
    assert {run[-3] for run in runs} == set(methods.split())
    small = jobs_of("six", "--split=val", dataset="shapes", epochs=15, runs=2)
    fsp = next(job for job in small if job.line[0] == "fsp.py")
    line = "--epochs 11 --fsp-epochs 4 --split val"     # 15 together
    assert len(small) == 1 + 2 * 8 and line in " ".join(fsp.line)
    assert fsp.runs == (
        Path("out/epochs-11_fsp-epochs-4_split-val/shapes/shapes/fsp/wrn16_3-wrn16_1/seed0"),)
    assert fsp.teacher == Path("out/epochs-15_split-val/shapes/shapes/baseline/wrn16_3/seed0")
    # FSP's Table 1: the three students share the first stage, so that they are one process
    three, = (job for job in jobs_of("fsp-1") if "--shared-stage1" in job.line)
    assert len(three.runs) == 3 and "--epochs 54 --fsp-epochs 82" in " ".join(three.line)
    # an early-stopped teacher is its script's own: all seeds of a row are one process
    early = [job for job in jobs_of("kd-early", runs=2) if "--teacher-epochs" in job.line]
    assert [len(job.runs) for job in early] == [2, 2, 2] and "--teacher-ckpt" not in str(early)
    assert "--teacher-epochs 80" in " ".join(early[1].line) and early[1].teacher is None
    late = [job.runs[0].parts[1] for job in jobs_of("kd-early") if "--distill-epochs" in job.line]
    assert {name: late.count(name) for name in late} == {
        f"distill-epochs-{epoch}": 5 for epoch in (80, 120, 160)}
    # settings e and f learn with half the batch, their teacher too; of one pair a to f are one
    halves = [" ".join(job.line) for job in jobs_of("overhaul-3") if "pyramidnet" in str(job)]
    assert halves and all("--batch-size 64" in line for line in halves)
    assert len(jobs_of("overhaul-3", teacher="wrn16_3", student="wrn16_1", runs=1)) == 5
    given = jobs_of("six", teacher_ckpt=Path("T.pt"), runs=1)
    assert len(given) == 8 and "--teacher-ckpt T.pt" in " ".join(given[-1].line)
    assert "from-T.pt" in str(given[-1].runs[0]) and "from" not in str(given[0].runs[0])
    # on ImageNet teachers are torchvision's; on other data they are trained
    jobs = jobs_of("overhaul-4")
    assert sum("ResNet152_Weights.IMAGENET1K_V1" in job.line for job in jobs) == 3
    assert len(jobs) == 2 + 2 * 3 == len(jobs_of("overhaul-4", dataset="shapes")) - 1
    run = jobs_of("six", dataset="folder", data_dir=Path("pictures/cats"))[0].runs[0]
    assert run == Path("out/cats/folder/cifar10-jeon/baseline/wrn16_3/seed0")


def test_the_papers_numbers():
    """Typed by hand once more, from the tables themselves."""
    for line in """
            atang-2 wrn16_3 wrn16_1 86.27 ± 0.09 ATang+KD
            atang-margin-cinic wrn28_3 wrn16_1 80.35 m = 2.0
            overhaul-3 pyramidnet200_240 pyramidnet110_84 84.43 (f) teacher
            overhaul-4 imagenet_resnet50 imagenet_mobilenet 68.58 KD
            overhaul-11 wrn28_4 resnet56 75.22 (d) the last layer
            skd-4 wrn40_2 shufflenetv1 73.32 AT
            skd-6 imagenet_resnet152 imagenet_resnet18 68.84 KD
            skd-7 resnet110 resnet14 69.2 SKD""".strip().split("\n"):
        table, teacher, student, value = line.split(maxsplit=3)
        rows = {(row.teacher, row.student, f"{row.paper} {row.label}"): row.beside
                for row in reproduce.TABLES[table].rows}
        assert (teacher, student, value) in rows, line
    assert [*rows["resnet44", "resnet14", "68 KD"].values()] == [0.222, 0.063, 2.1]
    # the first epochs of a lower rate: Heo et al. drop at the 30th epoch, Guo et al. after it
    for table, wanted in (("overhaul-4", [30, 60, 90]), ("skd-6", [31, 61, 81, 91])):
        for job in jobs_of(table):
            milestones = reproduce.parsed(job.line[0], job.line[1:]).milestones
            assert [1 + round(100 * part) for part in milestones] == wanted, job


def cells(out: str) -> dict[str, list[str]]:
    lines = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("|")]
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}


def in_process(command: list[str], stdout: object, **options: object) -> Namespace:
    """A run as the driver starts it, but in this process: importing torch takes three seconds."""
    code = 0
    with mock.patch.object(sys, "argv", command[1:]), contextlib.redirect_stdout(stdout):
        try:
            importlib.import_module(Path(command[1]).stem).main()
        except (common.UserError, OSError) as error:
            print(f"error: {error}")
            code = 1
    return Namespace(returncode=code, poll=lambda: code)


def test_a_table_from_the_first_run_to_the_last(cli, tmp_path, monkeypatch):
    """A failing row is named and stops no other; what is finished is not run again."""
    commands = {"teacher": "teacher", "baseline": "baseline", "KD": "kd.py",
                "broken": "overhaul.py --position end"}
    rows = reproduce.of_pairs(commands, "wrn16_3 wrn16_1 90.0 80.0±0.1 81.5 -")
    monkeypatch.setitem(reproduce.TABLES, "test", reproduce.Table(
        "ours", "?", "cifar10", 5, rows, "cifar10-jeon", ("KL", "CE")))
    started = mock.Mock(side_effect=in_process)
    monkeypatch.setattr(reproduce.subprocess, "Popen", started)
    folder, file = tmp_path / "runs", tmp_path / "kept.jsonl"
    command = ["test", *SMALL, "--runs", "2", "--out", folder]
    assert cells(cli("reproduce", *command, "--show").out)["KD"] == ["", "", "0", ""]
    done = cli("reproduce", *command, "--jobs", "2")
    assert done.code == 1 and "0 of 7 runs are finished, 7 to go" in done.out
    shares = {call.kwargs["env"]["LOCAL_WORLD_SIZE"] for call in started.call_args_list}
    assert shares == {"2"}, "two runs share the cores that read pictures"
    assert done.err.count("failed: overhaul.py") == done.err.count("add --distance l2") == 2
    place = folder / "epochs-2_train-images-192/shapes/shapes"
    base, ours = ([reproduce.log_of(place / name / f"seed{seed}")[-1]["test"] for seed in (0, 1)]
                  for name in ("baseline/resnet8", "kd/wrn10_1-resnet8"))
    gains = np.subtract(ours, base)
    first, second = map(cells, done.out.split("measured on"))
    assert first["KD"][:3] == [f"{np.mean(ours):.2f} ± {np.std(ours, ddof=1):.2f}",
                               f"{gains.mean():+.2f} ± {gains.std(ddof=1) / 2 ** 0.5:.2f}", "2"]
    assert first["broken"] == ["", "", "0", ""] and first["baseline"][1] == ""
    again = cli("reproduce", *command, "--jobs", "2")
    assert again.code == 1 and "5 of 7 runs are finished, 2 to go" in again.out
    assert cells(again.out) == cells(done.out)
    # a file of the logs gives the same tables; recorded once more, a run replaces its line
    for replaced in ("", ", 5 of them in place of others"):
        told = cli("reproduce", "--record", folder, file).out
        assert told == f"5 finished runs of {folder} are recorded in {file}{replaced}\n"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {line["label"] for line in lines} == {"epochs-2_train-images-192"}
    assert len(lines) == 5 + 2 and str(tmp_path) not in file.read_text()    # two measurements
    shown = cli("reproduce", *command, "--show", "--out", file).out
    assert list(map(cells, shown.split("measured on"))) == [first, second]
    # and below a label of its own
    assert "5 finished" in cli("reproduce", "--record", folder, tmp_path / "two.jsonl/own").out
    assert cli("reproduce", *command, "--show", "--out", tmp_path / "two.jsonl/own").out == (
        shown.replace(f"{file}", f"{tmp_path}/two.jsonl/own"))
    assert "no recorded run" in cli("reproduce", *command, "--show", "--out", file / "x").refused()
    assert "data sets' lie" in cli("reproduce", "--record", place, tmp_path / "two.jsonl").refused()
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(file.read_text().replace('"bf16": false', '"bf16": true', 1))
    assert "bfloat16" in cli("reproduce", *command, "--show", "--out", mixed).out
    assert "bfloat16" not in shown and "teachers:" not in shown
    mixed = tmp_path / "teachers.jsonl"
    mixed.write_text(re.sub(r'("teacher_hash": ")\w', r"\1x", file.read_text(), count=1))
    assert "from 2 teachers:" in cli("reproduce", *command, "--show", "--out", mixed).out
    recorded = file / place.relative_to(folder) / "baseline/resnet8/seed0"
    assert "no weights to measure" in cli("reproduce", "--measure", recorded).refused()
    listed = cli("reproduce", "--table", folder, "--csv", tmp_path / "x.csv").out.splitlines()
    assert listed == cli("reproduce", "--table", file).out.splitlines() and len(listed) == 4
    row = list(csv.reader((tmp_path / "x.csv").open()))[3]
    assert row[:-1] == listed[3].split() and row[6:] == [
        f"{np.mean(ours):.2f}", f"{np.std(ours, ddof=1):.2f}", "2", f"{gains.mean():+.2f}", ""]
    # what was made by another recipe, or by another text of its script, is not taken for today's
    kd = importlib.import_module("kd")
    with mock.patch.dict(kd.RECIPES["shapes"], weight_decay=0.1):
        reproduce.parsed.cache_clear()
        shown = cli("reproduce", *command, "--show").out
        assert "made with another weight_decay" in shown and cells(shown)["baseline"][2] == "0"
    reproduce.parsed.cache_clear()
    (tmp_path / "kd.py").write_text(kd.SOURCE + "# edited\n")
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(kd, "SOURCE", kd.SOURCE + "# edited\n")
    stale = cli("reproduce", *command)
    assert "3 of 7 runs are finished" in stale.out and "another script" in stale.err
    stale = cells(stale.out.split("measured on")[0])
    assert stale["KD"][2] == "0" and stale["baseline"] == first["baseline"]
    # nor what only its script refuses, asked since the teacher is newer
    monkeypatch.setattr(reproduce, "changed", lambda run, args: [])
    (place / "baseline/wrn10_1/seed0/last.pt").touch()
    assert cells(cli("reproduce", *command).out.split("measured on")[0])["KD"][2] == "0"


def test_a_folder_without_a_test_split(cli, tmp_path, monkeypatch):
    """Measured is val; its name may be a known data set's, its run of a device not here."""
    data = tmp_path / "shapes"
    for split, ants in (("train", 498), ("val", 20)):
        for number in range(ants + 3):
            kind = "ant" if number < ants else "bee"
            save(data / split / kind / f"{number:03}.png", (number % 99, 99, 200), size=(16, 16))
    rows = reproduce.of_pairs({"baseline": "baseline", "KD": "kd.py"}, "wrn10_1 resnet8 - -")
    monkeypatch.setitem(reproduce.TABLES, "test", reproduce.Table(
        "ours", "?", "cifar10", 1, rows, "cifar10-jeon"))
    monkeypatch.setattr(reproduce.subprocess, "Popen", in_process)
    pictures = ["--dataset", "folder", "--data-dir", data, "--image-size", "16"]
    command = ["test", *SMALL, *pictures, "--epochs", "1", "--out", tmp_path / "runs"]
    done = cli("reproduce", *command)
    assert done.code == 0 and "shapes; val accuracy in per cent" in done.out, done.all
    again = cli("reproduce", *command)
    assert "3 of 3 runs are finished, 0 to go" in again.out and cells(again.out)["KD"][2] == "1"
    run, = (tmp_path / "runs").rglob("kd/*/seed0")
    header, row = reproduce.log_of(run)
    header["command"] += ["--device", "cuda:99"]
    (run / "log.jsonl").write_text(f"{json.dumps(header)}\n{json.dumps(row)}\n")
    measured = cli("reproduce", "--measure", run)
    assert measured.code == 0 and f"{row['test']:.2f}" in measured.out, measured.all
    # a pass of 500 leaves the 501st image, a bee, to the next: it is drawn all the same
    assert cli("look", "data", *pictures, "--out", tmp_path / "data.png").code == 0


def test_a_run_of_an_exchanged_teacher_is_not_finished(cli, tmp_path):
    """Of a given one, and of one that the script stopped early itself."""
    torch.save(common.create_model("wrn10_1", 10).state_dict(), tmp_path / "T.pt")
    early = tmp_path / "shapes/shapes/baseline/wrn10_1-1/seed0/last.pt"
    for flags, teacher in ((["--teacher-ckpt", str(tmp_path / "T.pt")], tmp_path / "T.pt"),
                           (["--teacher-epochs", "1"], early)):
        method = "skd" if teacher is early else "kd"
        line = (f"{method}.py", *SMALL, "--epochs", "1", *flags, "--out", str(tmp_path))
        run = tmp_path / f"shapes/shapes/{method}/wrn10_1-resnet8/seed0"
        assert cli(method, *line[1:]).code == 0
        assert reproduce.is_finished(reproduce.Job(line, (run,), None))
        time.sleep(0.05)
        teacher.touch()
        assert not reproduce.is_finished(reproduce.Job(line, (run,), None)), "asks the script"


@pytest.mark.skipif(sys.platform != "linux", reason="runs outlive a killed driver elsewhere")
def test_kill_9_and_the_same_command_again(capsys, tmp_path, monkeypatch):
    """The driver's runs end with it; the same command finishes the table."""
    command = ["fsp-1", *SMALL, "--runs", "1", "--jobs", "2", "--out", str(tmp_path)]
    command[command.index("--teacher") + 1] = "resnet8"
    driver = [sys.executable, "-B", str(ROOT / "tests/tools/reproduce.py"), *command]
    process = subprocess.Popen(driver, stdout=subprocess.DEVNULL)
    while not list(tmp_path.rglob("last.pt")) and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    time.sleep(1)
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            assert str(tmp_path) not in line.read_text(), "a run has outlived the driver"
    monkeypatch.setattr(reproduce.subprocess, "Popen", in_process)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *command])
    with pytest.raises(SystemExit) as end:
        reproduce.main()
    assert end.value.code == 0 and len(cells(capsys.readouterr().out)) == 2 + 3
    finished = list(filter(reproduce.complete, reproduce.runs_below(tmp_path)))
    assert len(finished) == 4       # the teacher, a third of its epochs, and FSP's two stages


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(1, keepdims=True)


def entropy(x: np.ndarray) -> np.ndarray:
    return -(softmax(x) * np.log(softmax(x))).sum(1)


def logits_of(run: Path, taps: bool = False) -> np.ndarray | common.Taps:
    network = common.create_model(run.parent.name.split("-")[-1], 10).eval()
    common.load_weights(network, run / "last.pt")
    test = common.load_data("shapes", "", 200, "cpu", augment=False, seed=0)[1]
    with torch.no_grad():
        seen = network(next(iter(test))[0], taps=True)
        return seen if taps else seen.logits.double().numpy()


def test_measurements_of_finished_runs(cli, tmp_path):
    """Against the same in NumPy: Table 7 of the overhaul, the gaps of SKD, an ensemble."""
    flags, out = [*SMALL, "--out", tmp_path], tmp_path / "shapes/shapes"
    assert cli("kd", *flags).code == cli("skd", *flags, "--scale", "3").code == 0
    runs = [out / name / "wrn10_1-resnet8/seed0" for name in ("kd", "skd")]
    lines = cli("reproduce", "--measure", *runs).out.splitlines()
    *z, v = map(logits_of, [*runs, out / "baseline/wrn10_1/seed0"])
    labels = common.draw_shapes(200, 3).labels.numpy()
    tests = [reproduce.log_of(run)[-1]["test"] for run in runs]
    for line, own, accuracy in zip(lines, z, tests):
        p, q = softmax(own), softmax(v)
        kl, ce = (q * np.log(q / p)).sum(1).mean(), -np.log(p[np.arange(200), labels]).mean()
        top_5 = 100 * (own.argsort(1)[:, -5:] == labels[:, None]).any(1).mean()
        assert line.endswith(f"test accuracy {accuracy:.2f} %, cross-entropy {ce:.4f}, "
                             f"KL(teacher || student) {kl:.4f}, top-5 {top_5:.2f} %")
    together = 100 * (sum(map(softmax, z)).argmax(1) == labels).mean()
    assert lines[-7] == f"average {np.mean(tests):.2f} %, ensemble {together:.2f} %", "the legend"
    columns = {re.sub(" (student|teacher)", "", name) for name in re.split("  +", lines[2])[1:]}
    for name in columns | {"accuracy", "top-5", "cross-entropy", "KL", "ensemble"}:
        assert sum(line.startswith(f"{name}  ") for line in lines) == 1, f"no legend of {name}"
    three = [reproduce.Outputs(Namespace(labels=torch.tensor([1])), 0, torch.tensor([p]), {})
             for p in ([0.5, 0.3, 0.2], [0.0, 0.4, 0.6], [0.5, 0.4, 0.1])]
    assert reproduce.ensemble(three) == 100, "the mean, no vote"
    s_gap = (entropy(z[0] / 4) - entropy(v / 4)).mean()
    f_gap = 4 * (np.log(np.exp(v / 4).sum(1)) - np.log(np.exp(z[0] / 4).sum(1))).mean()
    cells = lines[4].split()        # after two lines and the header tau 1, then 4
    assert cells[:2] == ["kd/wrn10_1-resnet8/seed0", "4"] and cells[4] == f"{s_gap:.4f}"
    assert cells[8:10] == [f"{f_gap:.4f}", f"{f_gap - v.mean() + z[0].mean():.4f}"]
    seen = [3 / 4 * (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) for x in (z[1], v)]
    cells = next(line for line in lines if "4, aligned" in line).split()
    assert float(cells[5]) == pytest.approx((entropy(seen[0]) - entropy(seen[1])).mean(), abs=1e-4)
    assert float(cells[6]) == 0, "lengths are equal"
    assert cli("kd", *flags[:-1], tmp_path / "val", "--split", "val").code == 0
    other = tmp_path / "val/shapes/shapes/kd/wrn10_1-resnet8/seed0"
    assert "other images" in cli("reproduce", "--measure", runs[0], other).refused()
    # a teacher that lies elsewhere now can be named
    (out / "baseline/wrn10_1").rename(tmp_path / "moved")
    given = ["--teacher-ckpt", tmp_path / "moved/seed0/last.pt"]
    assert cli("reproduce", "--measure", runs[0], *given).out.splitlines()[0] == lines[0]
    (tmp_path / "moved").rename(out / "baseline/wrn10_1")
    weights = state(out / "baseline/wrn10_1/seed0")
    weights["model"]["classifier.bias"] += 1
    torch.save(weights, out / "baseline/wrn10_1/seed0/last.pt")
    assert "is not the teacher" in cli("reproduce", "--measure", runs[0]).refused()


@pytest.mark.parametrize("classes, tau", [(10, 4.0), (100, 1.0), (7, 2.0)])
def test_entropy_free_energy_and_the_constants_of_the_theorems(classes, tau):
    """Theorem 1's printed constant is twice too large, Theorem 2's is right."""
    z, v = 0.01 * np.random.default_rng(5).normal(size=(2, 50, classes)) * [[[1]], [[3]]]
    s = [entropy(x / tau) for x in (z, v)]
    f = [tau * np.log(np.exp(x / tau).sum(1)) for x in (z, v)]
    for x, own, energy in zip(map(torch.tensor, (z, v)), s, f):
        assert np.allclose(reproduce.entropy(x, tau), own, rtol=1e-12)
        assert np.allclose(reproduce.free_energy(x, tau), energy, rtol=1e-12)
    s_gap, f_gap = s[0] - s[1], f[1] - f[0] - (v.mean(1) - z.mean(1))
    printed = (classes * v.var(1) - classes * z.var(1)) / (classes * tau ** 2)     # Theorem 1
    assert (s_gap / printed).mean() == pytest.approx(0.5, abs=0.01)
    assert (f_gap / (printed * tau / 2)).mean() == pytest.approx(1, abs=0.01)      # Theorem 2
    first, second = reproduce.theorems(torch.tensor(z), torch.tensor(v), tau)
    assert np.allclose(first, s_gap, rtol=0.1) and np.allclose(second, f_gap, rtol=0.1)


def test_bad_arguments_and_the_list_of_all_tables(cli, tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_text("[1]\n")
    for flags, line in (("seven", "invalid choice"), ("--ron=2", "unrecognized arguments: --ron"),
                        ("six --runs 0", "is not 1 or more"), ("six --seed=3", "a whole table"),
                        (f"six --out {tmp_path}/x.jsonl", "give --show")):
        assert line in cli("reproduce", *flags.split()).mistyped()
    for flags, line in (("fsp-1 --dataset cinic10", "no recipe for cinic10"),
                        (f"--table {tmp_path}/x.jsonl", "no file of recorded runs"),
                        ("kd-early --teacher-ckpt x.pt", "stops teachers of its own"),
                        (f"--record {tmp_path} y.jsonl", "no finished run")):
        assert line in cli("reproduce", *flags.split()).refused()
    monkeypatch.setattr(reproduce, "read_cifar", mock.Mock(side_effect=common.UserError("no net")))
    assert "no net" in cli("reproduce", "six", "--out", tmp_path).refused()     # before two runs
    listed = cli("reproduce", *"--dataset shapes --teacher wrn16_3 --student wrn16_1".split()).out
    assert all(f"\n{name} " in listed for name in reproduce.TABLES)


def test_the_hours_of_a_row_that_trains_its_own_teacher():
    """With all of the teacher's epochs they are those of teacher and student apart."""
    def hours(*words: str) -> float:
        return reproduce.hours(reproduce.Job(("kd.py", "--epochs", "8", *words), (Path(),), None))

    apart = hours() + hours("--baseline", "--student", "wrn16_3")
    assert hours("--teacher-epochs", "8") == pytest.approx(apart)


@pytest.mark.parametrize("classes", [None, [0, 2, 1, 1]])
def test_grad_cam_is_the_papers_equations(classes):
    """Eq. 1 and 2 in NumPy, of two 1x1 convolutions and a linear head over means."""
    random = np.random.default_rng(3)
    first, second, head, x = (random.normal(size=size) for size in
                              ((5, 3), (4, 5), (3, 4), (4, 3, 6, 4)))

    def network(images: torch.Tensor, taps: bool) -> common.Taps:
        low = torch.einsum("kc,nchw->nkhw", torch.tensor(first), images)
        high = torch.einsum("kc,nchw->nkhw", torch.tensor(second), low.relu())
        return common.Taps(high.mean((2, 3)) @ torch.tensor(head).T, stages=[low, high])

    given = classes and torch.tensor(classes)
    logits, heats, stages = look.grad_cam(network, torch.tensor(x), given)
    for n in range(4):
        low = np.tensordot(first, x[n], 1)
        high = np.tensordot(second, low.clip(0), 1)
        y = head @ high.mean((1, 2))
        c = y.argmax() if classes is None else classes[n]
        # y = mean over the pixels of head_c . high, so that dy / dhigh is the same everywhere
        alpha_high = head[c] / (6 * 4)
        alpha_low = ((second.T @ alpha_high)[:, None, None] * (low > 0)).mean((1, 2))
        assert np.allclose(logits[n], y) and np.allclose(stages[0][n], low)
        assert np.allclose(heats[1][n], (alpha_high[:, None, None] * high).sum(0).clip(0))
        assert np.allclose(heats[0][n], (alpha_low[:, None, None] * low).sum(0).clip(0))
    assert heats[1].max() > 0 and (heats[1] == 0).any()


def test_maps_and_energy(cli, tmp_path, monkeypatch):
    """Answers, and shares of the maps with their stds, from the networks themselves."""
    monkeypatch.chdir(tmp_path)     # commands with paths relative to where they run
    teacher = "runs/shapes/shapes/baseline/wrn10_1/seed0/last.pt"
    for script, *flags in (["kd", "--baseline"], ["kd", "--baseline", "--student", "wrn10_1"],
                           ["at", "--runs", "2", "--teacher-ckpt", teacher]):
        assert cli(script, *SMALL, *flags).code == 0
    monkeypatch.chdir(ROOT)
    place, split = tmp_path / "runs/shapes/shapes", common.draw_shapes(200, 3)
    folders = [place / "baseline/resnet8", place / "at/wrn10_1-resnet8"]
    rows = cells(cli("look", "energy", *folders).out)
    assert list(rows)[2:] == ["a uniform map", "teacher", "baseline", "at"]
    assert rows["a uniform map"][1] == f"{100 * split.masks.float().mean():.2f}"
    assert rows["baseline"][0] == f"{reproduce.log_of(folders[0] / 'seed0')[-1]['test']:.2f}"
    means = []
    for seed in (0, 1):
        squares = logits_of(folders[1] / f"seed{seed}", taps=True).stages[2].square().sum(1)
        over = squares.repeat_interleave(4, 1).repeat_interleave(4, 2)      # 4x4 -> 16x16
        means.append(100 * ((over * split.masks).sum((1, 2)) / over.sum((1, 2))).mean().item())
    assert rows["at"][6] == f"{np.mean(means):.2f} ± {np.std(means, ddof=1):.2f}"
    assert cells(cli("look", "energy", folders[1], "--of", "answer").out)["at"] != rows["at"]
    figures = []
    monkeypatch.setattr(look, "save", lambda figure, args: figures.append(figure))
    assert cli("look", "maps", *folders, "--images", "7", "3").code == 0
    told = [axes.get_title() for axes in figures[0].axes]
    assert [told[place].split("\n")[0] for place in (1, 4, 7)] == [
        "teacher (wrn10_1)", "baseline (resnet8)", "at (resnet8)"]
    for folder, number, place in zip(folders * 2, (7, 7, 3, 3), (4, 7, 14, 17)):
        answer = logits_of(folder / "seed0").argmax(1)[number]
        verdict = "right" if answer == split.labels[number] else "WRONG"
        assert f"{verdict}: {common.SHAPES[answer]}" in told[place]
    assert "0 to 199" in cli("look", "maps", *folders, "--images", "200").refused()


def test_a_colour_for_each_class_of_voc_and_none_without_a_label(monkeypatch):
    figures, loader = [], Namespace(num_classes=21, mean=[0.0] * 3, std=[1.0] * 3)
    monkeypatch.setattr(look, "save", lambda figure, args: figures.append(figure))
    labels = torch.tensor([[-100, *range(21)]]).view(1, 2, 11)
    look.draw_answers([], loader, torch.zeros(1, 3, 2, 11), labels, None)
    image, = figures[0].axes[1].images
    seen = {tuple(colour) for colour in image.to_rgba(image.get_array()).reshape(-1, 4)}
    assert len(seen) == 22 and (0, 0, 0, 0) in seen


def test_curves_scatter_and_sweep_from_the_recorded_logs_alone(cli, tmp_path, monkeypatch):
    names = "baseline/wrn16_1 kd/wrn16_3-wrn16_1 atang/wrn16_3-wrn16_1"
    folders = [SHAPES / name for name in names.split()]
    sweep = (f"sweep atang-margin --dataset shapes --teacher wrn16_3 --student wrn16_1 --runs 3 "
             f"--from {RECORDS}").split()
    for command, size in ((["curves", *folders, FSP / "wrn16_3-wrn16_1"], (960, 420)),
                          (["scatter", *folders[1:]], (680, 280)), (sweep, (560, 380))):
        done = cli("look", *command, "--out", tmp_path / "x.png")
        assert done.code == 0 and Image.open(tmp_path / "x.png").size == size, done.all
    assert "no finished run" in cli("look", *sweep, "--lr", "0.3").refused()
    assert "leave baselines out" in cli("look", "scatter", *folders).refused()
    scenes, figures = RECORDS / "scenes/scenes/overhaul", []
    with monkeypatch.context() as patch:
        patch.setattr(look, "save", lambda figure, args: figures.append(figure))
        assert cli("look", "curves", scenes).code == cli("look", "scatter", scenes).code == 0
    assert figures[0].axes[0].get_title() == "test mIoU, per cent"
    assert figures[1].axes[0].get_ylabel() == "test mIoU, per cent"
    # mean and std over the seeds; L_A without its weight; FSP's two stages in a row
    group, = look.groups_of(folders[2:])
    lines = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    logs = [line["log"] for line in lines if not line["label"] and "s/atang/" in line["run"]]
    epochs, means, stds = look.course(group.logs, "test")
    tests = np.array([[row["test"] for row in log[1:]] for log in logs])
    assert epochs == list(range(1, 16)) and len(tests) == 5
    assert np.allclose(means, tests.mean(0)) and np.allclose(stds, tests.std(0, ddof=1))
    assert look.final_loss(group.runs[0], group.logs[0]) == (
        "atang", pytest.approx(logs[0][-1]["atang"] / 1000))
    shared = "epochs-5_fsp-epochs-8_shared-stage1/shapes/shapes/fsp/resnet8-resnet8"
    for place, first, last in ((FSP / "wrn16_3-wrn16_1", 4, 15), (RECORDS / shared, 8, 13)):
        logs = look.groups_of([place])[0].logs
        assert look.course(logs, "fsp")[0] == list(range(1, first + 1))
        assert look.course(logs, "ce")[0] == list(range(first + 1, last + 1))


def test_runs_are_told_apart_by_their_settings_else_by_their_folders(cli, tmp_path, monkeypatch):
    """In curves and --table; to curves, an edited script makes no other settings."""
    header, *rows = reproduce.log_of(SHAPES / "kd/wrn16_3-wrn16_1/seed0")
    for place, epochs, own in (("s/s/kd/A-b/seed0", 15, {}), ("c/d/s/s/kd/A-b/seed0", 15, {}),
                               ("s/s/kd/A-b/seed1", 15, {"script": "ab"}),
                               ("s/s/kd/A-b/seed2", 15, {"temperature": 2.0, "milestones": [0.5]}),
                               ("s/s/kd/C-b/seed0", 9, {}), ("s/s/at/A-b/seed0", 0, {})):
        run = tmp_path / "runs" / place
        run.mkdir(parents=True)
        log = [header | {"settings": header["settings"] | own}, *rows[:epochs]]
        (run / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    four, two = "milestones 0.6 0.8 0.95, temperature 4", "milestones 0.5, temperature 2"
    assert {group.label: len(group.runs) for group in look.groups_of([tmp_path])} == {
        f"kd A-b, {four}": 2, f"kd A-b, {four} in c/d": 1, f"kd A-b, {two}": 1, "kd C-b": 1}
    listed = cli("reproduce", "--table", tmp_path / "runs").out.splitlines()[1:]
    assert [line.split("  ")[-1] for line in listed] == [four, four, f"{four}, script ab", two]
    monkeypatch.chdir(tmp_path)
    assert "runs/curves.png: " in cli("look", "curves", "runs").out
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_wrong_input_of_look_is_one_line(cli, tmp_path):
    ours, name = SHAPES / "at/wrn16_3-wrn16_1", "kd/wrn16_3-wrn16_1"
    cifar = RECORDS / "epochs-15_cifar10-images/folder/cifar10-jeon" / name
    for command in ("maps", "energy", "curves", "scatter"):
        assert "is no run" in cli("look", command, tmp_path).refused()
        assert "one by one" in cli("look", command, ours, cifar).refused()
    unfinished = tmp_path / name / "seed0"
    unfinished.mkdir(parents=True)
    lines = map(json.dumps, reproduce.log_of(SHAPES / name / "seed0")[:4])
    (unfinished / "log.jsonl").write_text("\n".join(lines))
    assert "is not finished" in cli("look", "energy", unfinished).refused()
    assert cli("look", "curves", unfinished, "--out", tmp_path / "c.png").code == 0
    assert "nowhere" in cli("look", "curves", unfinished, "--out", "nowhere/c.png").refused()
    assert "unrecognized arguments: --ron" in cli("look", "curves", "x", "--ron=2").mistyped()


def test_the_benchmark_trains(tmp_path):
    """Both stages of FSP, and the plain loop on what its main() hands to train()."""
    torch.save(common.create_model("wrn10_1", 10).state_dict(), tmp_path / "teacher.pt")
    flags = (f"--dataset shapes --train-images 32 --teacher-ckpt {tmp_path}/teacher.pt "
             f"--batch-size 16 --epochs 2 --fsp-epochs 2 --teacher wrn10_1 --student resnet8 "
             f"--device cpu").split()
    rates = bench.ours("fsp", flags), bench.reference("fsp", tuple(flags), 0)
    assert [len(rate) for rate in rates] == [2, 1] and all(map(min, rates))
