"""Every script through its command line: what a run prints, keeps and refuses."""
import gc
import importlib
import json
import os
import pickle
import platform
import re
import shutil
import sys

import pytest
import torch
from conftest import ROOT, SCRIPTS, SMALL, equal_bits, result_of, shell, state

import common

METHODS = {"kd": ["--temperature", "3"], "at": ["--beta", "20"], "atang": ["--gamma", "50"],
           "fsp": ["--fsp-epochs", "1"], "overhaul": ["--alpha", "0.01"], "skd": ["--scale", "3"]}
# with these the student learns from the labels alone; FSP's first stage knows no labels
NO_METHOD = {"kd": ["--kd-weight", "0"], "at": ["--kd-weight", "0", "--beta", "0"],
             "atang": ["--kd-weight", "0", "--gamma", "0"], "overhaul": ["--alpha", "0"],
             "skd": ["--kd-weight", "0", "--scale", "none", "--student-lr", "0.1"]}
TERMS = {"kd": ["ce", "kd"], "at": ["ce", "kd", "at"], "atang": ["ce", "kd", "atang"],
         "fsp": ["ce"], "overhaul": ["ce", "overhaul"], "skd": ["ce", "skd"]}
TRAININGS = {"fsp": 3}      # of a teacher and a student; of the others 2


def network_of(weights: dict) -> dict:
    """The weights of the network alone, without those of its connectors."""
    return {key: value for key, value in weights.items() if not key.startswith("connectors.")}


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def out(cli, tmp_path, tmp_path_factory):
    """A folder of runs with a trained teacher in it."""
    kept = tmp_path_factory.getbasetemp() / "teacher"
    if not kept.exists():
        assert cli("kd", *SMALL, "--out", kept).code == 0
    shutil.copytree(kept / "shapes/teachers", tmp_path / "runs/shapes/teachers")
    return tmp_path / "runs"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_from_nothing(script, cli, tmp_path):
    out = tmp_path / "runs"
    done = cli(script, *SMALL, "--out", out, *METHODS[script])
    assert done.code == 0 and not done.err
    folder = out / f"shapes/{script}/wrn10_1-resnet8/seed0"
    header, *log = rows(folder)
    assert [row["epoch"] for row in log] == [1, 2]
    for row in log:
        assert all(row[term] > 0 for term in TERMS[script])
        assert list(row)[1:1 + len(TERMS[script])] == TERMS[script]
        assert 0 <= row["train"] <= 100 and 0 <= row["test"] <= 100 and row["images/s"] > 0
    start = 0.05 if script == "skd" else 0.1
    assert [row["lr"] for row in log] == pytest.approx([start, 0.2 * start])    # milestone 0.6
    assert header["arguments"]["student"] == "resnet8" and header["arguments"]["device"] == "cpu"
    assert header["versions"][1] == str(torch.__version__)
    assert all(len(digest) == 64 for digest in header["sha256"])
    # what stands in the log is true of what is kept
    kept = state(folder)
    assert [header, *log] == kept["log"]
    student = common.create_model("resnet8", 10)
    student.load_state_dict(network_of(kept["model"]))
    _, test = common.load_data("shapes", "", 64, torch.device("cpu"), augment=False, seed=0)
    right = torch.cat([student.eval()(x).argmax(1) == y for x, y in test])
    assert 100 * right.float().mean().item() == pytest.approx(log[-1]["test"], abs=1e-4)
    # the teacher is printed before the student starts, the table comes last
    lines = done.out.splitlines()
    announced = next(n for n, line in enumerate(lines) if line.startswith("teacher wrn10_1, test"))
    accuracy = rows(out / "shapes/teachers/wrn10_1/seed0")[-1]["test"]
    assert f"{accuracy:.2f} %" in lines[announced]
    assert f"  {'fsp' if script == 'fsp' else TERMS[script][1]} " in lines[announced + 1]
    assert f"{log[-1]['test']:.2f}" in lines[-3] and str(folder.parent) in lines[-3]
    assert f"{accuracy:.2f}" in lines[-2] and "--baseline" in lines[-1]
    assert sorted(path.name for path in folder.iterdir()) == ["best.pt", "last.pt", "log.jsonl"]


@pytest.mark.parametrize("script", NO_METHOD)
def test_weight_zero_is_the_baseline_to_the_bit(script, cli, out):
    """And so all methods start from the same weights and see the same batches."""
    assert cli(script, *SMALL, "--out", out, "--epochs", "2", *NO_METHOD[script]).code == 0
    same_as_the_baseline(script, cli, out)


def same_as_the_baseline(script, cli, out):
    assert cli(script, *SMALL, "--out", out, "--baseline").code == 0
    ours = result_of(out / f"shapes/{script}/wrn10_1-resnet8/seed0")
    plain = result_of(out / "shapes/baseline/resnet8/seed0")
    assert equal_bits(network_of(ours["model"]), plain["model"])
    momenta, expected = (run["optimizer"]["state"] for run in (ours, plain))
    assert equal_bits({key: momenta[key] for key in expected}, expected)    # connectors come last


def test_fsp_without_its_first_stage_is_the_baseline(cli, out, monkeypatch):
    """Stage 2 is ordinary training: only its first weights come from stage 1."""
    module = importlib.import_module("fsp")
    monkeypatch.setattr(module, "first_stage", lambda teacher, args, loaders, seed:
                        module.new_model(args.student, args, loaders, seed))
    assert cli("fsp", *SMALL, "--out", out).code == 0
    same_as_the_baseline("fsp", cli, out)


def test_fsp_stages(cli, out):
    """Stage 1 leaves the classifier as it was; stage 2 starts from its weights, momentum at 0."""
    flags = [*SMALL, "--out", out, "--fsp-epochs", "2"]
    assert cli("fsp", *flags).code == 0
    stage1 = result_of(out / "shapes/fsp/stage1/wrn10_1-resnet8/seed0")
    torch.manual_seed(0)
    fresh = common.create_model("resnet8", 10).state_dict()
    for key, value in stage1["model"].items():
        assert torch.equal(value, fresh[key]) == (key.startswith("classifier.")), key
    assert all("fsp" in row and "ce" not in row for row in stage1["log"])
    assert stage1["log"][1]["fsp"] < stage1["log"][0]["fsp"]
    assert [row["lr"] for row in stage1["log"]] == pytest.approx([1e-3, 2e-4])
    stage2 = rows(out / "shapes/fsp/wrn10_1-resnet8/seed0")[1:]
    assert [row["lr"] for row in stage2] == pytest.approx([0.1, 0.02])
    assert all(list(row)[1:3] == ["ce", "lr"] for row in stage2)


def test_fsp_connectors_are_dropped(cli, out):
    done = cli("fsp", *SMALL, "--student", "wrn10_2", "--fsp-epochs", "1", "--out", out)
    assert done.code == 0
    assert done.out.count("1x1 connectors") == 1
    assert "[32, 64, 128, 32, 64, 128] -> [16, 32, 64, 16, 32, 64]" in done.out
    first, second = (state(out / "shapes/fsp" / folder / "wrn10_1-wrn10_2/seed0")["model"]
                     for folder in ("stage1", "."))
    assert any(key.startswith("connectors.") for key in first)
    assert second.keys() == common.create_model("wrn10_2", 10).state_dict().keys()


def test_fsp_ensemble_of_one_first_stage(cli, out):
    """Table 1's three students: one stage 1, other batches, and their mean probabilities."""
    flags = [*SMALL, "--out", out, "--fsp-epochs", "1", "--fsp-seed", "0", "--runs", "3"]
    assert cli("fsp", *flags).code == 0
    done = cli("fsp", *flags, "--ensemble")      # it only prints: the runs are not made anew
    assert done.code == 0 and "epoch 1 " not in done.out
    assert len(list((out / "shapes/fsp/stage1/wrn10_1-resnet8").iterdir())) == 1
    folders = [out / f"shapes/fsp/wrn10_1-resnet8/seed{seed}" for seed in range(3)]
    last = [rows(folder)[-1]["test"] for folder in folders]
    _, test = common.load_data("shapes", "", 64, torch.device("cpu"), augment=False, seed=0)
    probabilities = 0
    for folder in folders:
        student = common.create_model("resnet8", 10).eval()
        student.load_state_dict(state(folder)["model"])
        with torch.no_grad():
            probabilities = probabilities + torch.cat([student(x).softmax(1) for x, _ in test])
    labels = torch.cat([y for _, y in test])
    together = 100 * (probabilities.argmax(1) == labels).float().mean().item()
    assert done.out.splitlines()[-1] == (
        "each " + ", ".join(f"{value:.2f}" for value in last)
        + f"; average {sum(last) / 3:.2f}, ensemble {together:.2f}")
    assert "each " in cli("fsp", *flags, "--ensemble", "--eval").out.splitlines()[-1]
    assert "other settings" in cli("fsp", *flags[:-4], "--fsp-epochs", "2").refused()


@pytest.mark.parametrize("flags", ["--teacher-bn running", "--teacher-bn batch", "--layers last",
                                   "--distance l2", "--position end --distance l2"])
def test_the_choices_of_overhaul(flags, cli, out):
    before = (out / "shapes/teachers/wrn10_1/seed0/last.pt").read_bytes()
    done = cli("overhaul", *SMALL, "--epochs", "2", "--out", out, *flags.split())
    assert done.code == 0
    assert (out / "shapes/teachers/wrn10_1/seed0/last.pt").read_bytes() == before
    kept = state(out / "shapes/overhaul/wrn10_1-resnet8/seed0")
    connectors = {key.split(".")[1] for key in kept["model"] if key.startswith("connectors.")}
    assert len(connectors) == (1 if "last" in flags else 3)
    line = next(line for line in done.out.splitlines() if line.startswith("similarity, test: "))
    kl, ce = map(float, re.findall(r"\d+\.\d+", line))
    assert kl > 0 and ce > 0
    # as a teacher of another run, the student is its network alone
    assert cli("kd", *SMALL, "--teacher", "resnet8", "--out", out / "next", "--teacher-ckpt",
               out / "shapes/overhaul/wrn10_1-resnet8/seed0/last.pt", "--dry-run").code == 0


def test_overhaul_says_which_choice_differs(cli, out):
    assert cli("overhaul", *SMALL, "--out", out).code == 0
    for flags, says in (("--layers last", "layers all, now last"),
                        ("--distance l2 --position end", "position pre-relu, now end")):
        assert says in cli("overhaul", *SMALL, "--out", out, *flags.split()).refused()
    assert cli("overhaul", *SMALL, "--out", out, "--baseline", "--position", "end").code == 0


def test_overhaul_positions_and_statistics_decide_the_loss(cli, out):
    """Each choice is another loss, from the same weights on the same first batch."""
    values = set()
    for flags in ("", "--teacher-bn running", "--layers last", "--distance l2",
                  "--position end --distance l2"):
        done = cli("overhaul", *SMALL, "--out", out, "--dry-run", *flags.split())
        values.add(re.findall(r"overhaul (\S+)", done.out)[-1])
    assert len(values) == 5


def test_the_settings_of_the_overhaul_paper(cli, tmp_path, monkeypatch):
    module = importlib.import_module("overhaul")
    seen = {}

    def load_data(dataset, data_dir, batch_size, device, **options):
        seen["batch_size"] = batch_size
        raise ValueError("enough")

    monkeypatch.setattr(module, "load_data", load_data)
    for letter, (teacher, student, batch_size) in module.SETTINGS.items():
        assert (teacher, student) in [pair for pairs in common.PAIRS.values() for pair in pairs]
        cli("overhaul", "--dataset", "cifar100", "--setting", letter).refused()
        assert seen["batch_size"] == batch_size
        cli("overhaul", "--dataset", "cifar100", "--setting", letter, "--batch-size", "8").refused()
        assert seen["batch_size"] == 8
        assert "leave out" in cli("overhaul", "--setting", letter, "--student=wrn16_1").refused()


@pytest.mark.parametrize("scale", ["none", "literal"])
def test_skd_without_its_sphere(scale, cli, out):
    """none: KD to the bit. literal: the labels act on the raw logits; weight 0 is the baseline."""
    flags = [*SMALL, "--out", out]
    if scale == "none":
        assert cli("kd", *flags, "--temperature", "3").code == 0
        assert cli("skd", *flags, "--temperature", "3", "--scale", scale, "--student-lr",
                   "0.1").code == 0
        ours, theirs = (result_of(out / f"shapes/{name}/wrn10_1-resnet8/seed0")
                        for name in ("skd", "kd"))
        assert equal_bits(ours["model"], theirs["model"])
        assert ours["log"][0]["skd"] == theirs["log"][0]["kd"]
    else:
        assert cli("skd", *flags, "--kd-weight", "0", "--scale", scale, "--student-lr",
                   "0.1").code == 0
        same_as_the_baseline("skd", cli, out)


def test_skd_logs_the_gaps(cli, out):
    assert cli("skd", *SMALL, "--out", out, "--scale", "none").code == 0
    for row in rows(out / "shapes/skd/wrn10_1-resnet8/seed0")[1:]:
        assert row["S gap"] == pytest.approx(row["S student"] - row["S teacher"], abs=1e-5)
        assert row["F gap"] == pytest.approx(row["F teacher"] - row["F student"], abs=1e-5)
        assert 0 < row["S student"] <= 2.3026 and row["theorem 2"] == pytest.approx(
            row["theorem 1"] * 4)       # their quotient is tau


def test_summary(cli, out, tmp_path):
    flags = [*SMALL, "--out", out, "--runs", "2"]
    assert cli("kd", *flags, "--baseline").code == 0
    assert cli("kd", *flags).code == 0 and cli("skd", *flags).code == 0
    assert cli("fsp", *flags, "--fsp-epochs", "1").code == 0
    assert cli("at", *SMALL, "--out", out, "--student", "wrn10_2", "--epochs", "2").code == 0
    unfinished = rows(out / "shapes/kd/wrn10_1-resnet8/seed1")
    (out / "shapes/kd/wrn10_1-resnet8/seed1/log.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in unfinished[:-1]))
    tables = {script: cli(script, "--summary", "--out", out).out for script in SCRIPTS}
    assert len(set(tables.values())) == 1, "every script prints the same"
    lines = {line.split()[1]: line for line in tables["kd"].splitlines()[1:]}
    for cut in ("", '{"settings'):      # a killed write is passed over
        (out / "shapes/kd/wrn10_1-resnet8/seed1/log.jsonl").write_text(cut)
        assert cli("kd", "--summary", "--out", out).out == tables["kd"]
    assert list(lines) == ["at", "baseline", "fsp", "kd", "skd", "teachers"]
    assert "S gap" in tables["kd"].splitlines()[0] and "F gap" in tables["kd"].splitlines()[0]
    base, ours = ([rows(out / "shapes" / name / f"seed{n}")[-1]["test"] for n in range(2)]
                  for name in ("baseline/resnet8", "skd/wrn10_1-resnet8"))
    assert f"{sum(ours) / 2:.2f} ± " in lines["skd"]
    assert f"{sum(ours) / 2 - sum(base) / 2:+.2f}" in lines["skd"]
    gap = [rows(out / f"shapes/skd/wrn10_1-resnet8/seed{n}")[-1]["S gap"] for n in range(2)]
    assert f"{sum(gap) / 2:.3f} ± " in lines["skd"]
    below = cli("kd", "--summary", "--out", out.parent).out.splitlines()
    assert [line.split() for line in below[1:]] == [["runs", *line.split()] for line in
                                                    tables["kd"].splitlines()[1:]]
    alone = rows(out / "shapes/kd/wrn10_1-resnet8/seed0")[-1]["test"]
    assert lines["kd"].split()[3:5] == [f"{alone:.2f}", "1"], "one seed is finished"
    assert "+" not in lines["at"] and " -" not in lines["at"], "no baseline of that student"
    for nothing in (tmp_path, tmp_path / "nowhere"):
        assert "no finished run" in cli("kd", "--summary", "--out", nothing / "x").refused()


def test_the_light_networks_learning_rate(cli, monkeypatch):
    """0.01 for MobileNetV2 and ShuffleNets on CIFAR-100, unless --lr says otherwise."""
    for script in ("kd", "at", "skd"):
        module = importlib.import_module(script)
        monkeypatch.setattr(module, "load_data", lambda *args, **options: (None, None))
        for student, flags, expected in (
                ("shufflenetv1", [], 0.01), ("mobilenetv2_half", [], 0.01), ("vgg8", [], 0.05),
                ("shufflenetv2", ["--lr", "0.2"], 0.2)):
            words = f"{script} --dataset cifar100 --teacher wrn40_2 --student {student} --baseline"
            monkeypatch.setattr(sys, "argv", [*words.split(), *flags])
            args, _ = module.prepare(**{key: dict(type=float, help="") for key in
                                        ("temperature", "kd_weight", "beta", "scale")
                                        if key in module.RECIPES["cifar100"]})
            assert module.identify(args, "baseline", 0)[1]["lr"] == expected
            assert module.identify(args, "teachers", 0)[1]["lr"] == (0.2 if flags else 0.05)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_teacher_is_left_as_it_was(script, cli, out):
    path = out / "shapes/teachers/wrn10_1/seed0/last.pt"
    before = path.read_bytes()
    module = sys.modules.get(script) or __import__(script)
    teachers = []
    real = module.get_teacher

    def keep(*args):
        teachers.append(real(*args))
        return teachers[-1]

    module.get_teacher = keep
    try:
        assert cli(script, *SMALL, "--out", out).code == 0
    finally:
        module.get_teacher = real
    assert path.read_bytes() == before
    assert equal_bits(dict(teachers[0].state_dict()), state(path.parent)["model"])
    assert not teachers[0].training
    assert all(p.grad is None and not p.requires_grad for p in teachers[0].parameters())


def test_the_baseline_is_one_for_all_scripts(cli, out):
    first = cli("kd", *SMALL, "--out", out, "--baseline")
    for script in SCRIPTS[1:] + ["kd"]:
        again = cli(script, *SMALL, "--out", out, "--baseline")
        assert again.code == 0 and "epoch 1 " not in again.out
        assert again.out.splitlines()[-1] == first.out.splitlines()[-1]


def test_the_table_has_gain_mean_and_deviation(cli, out):
    flags = [*SMALL, "--out", out, "--epochs", "2", "--runs", "3"]
    assert cli("kd", *flags, "--baseline").code == 0
    done = cli("kd", *flags)
    lines = done.out.splitlines()
    results = {}
    for name, folder in (("baseline", "baseline/resnet8"), ("kd", "kd/wrn10_1-resnet8")):
        last = [rows(out / "shapes" / folder / f"seed{n}")[-1]["test"] for n in range(3)]
        best = [max(row["test"] for row in rows(out / "shapes" / folder / f"seed{n}")[1:])
                for n in range(3)]
        values = torch.tensor([last, best], dtype=torch.float64)
        mean, deviation = values.mean(1), values.std(1)
        line = next(line for line in lines if line.startswith(f"{name} ") and " ± " in line)
        assert f"{mean[0]:.2f} ± {deviation[0]:.2f}" in line
        assert f"{mean[1]:.2f} ± {deviation[1]:.2f}" in line
        results[name] = mean[0].item()
    assert len({tuple(last)}) == 1 and lines[-1].split()[-1] == \
        f"{results['kd'] - results['baseline']:+.2f}"
    firsts = [state(out / f"shapes/kd/wrn10_1-resnet8/seed{n}")["model"] for n in range(2)]
    assert not equal_bits(*firsts), "another seed is another student"


def test_a_finished_run_prints_its_result_at_once(cli, out):
    first = cli("at", *SMALL, "--out", out)
    kept = (out / "shapes/at/wrn10_1-resnet8/seed0/last.pt").stat().st_mtime_ns
    again = cli("at", *SMALL, "--out", out)
    assert again.code == 0 and "epoch 1 " not in again.out
    assert again.out.splitlines()[-4:] == first.out.splitlines()[-4:]
    assert (out / "shapes/at/wrn10_1-resnet8/seed0/last.pt").stat().st_mtime_ns == kept


def test_other_code_is_noticed(cli, out, tmp_path, monkeypatch):
    """Who edits a loss and repeats the command must not take the old result for the new."""
    flags = [*SMALL, "--out", out]
    assert "note" not in cli("kd", *flags, "--baseline").out + cli("kd", *flags).out
    edited = tmp_path / "kd.py"
    edited.write_text((ROOT / "kd.py").read_text() + "# an edit\n")
    shutil.copy(ROOT / "common.py", tmp_path)
    monkeypatch.setattr(sys.modules["kd"], "__file__", str(edited))
    done = cli("kd", *flags)
    assert done.out.count("note:") == 1 and "kd/wrn10_1-resnet8/seed0 was begun by" in done.out
    assert "note:" not in cli("kd", *flags, "--baseline").out, "no method's text counts for this"
    (tmp_path / "common.py").write_text("# an edit\n")
    assert cli("kd", *flags).out.count("note:") == 2


def test_a_damaged_baseline_is_no_baseline(cli, out):
    flags = [*SMALL, "--out", out]
    assert cli("kd", *flags, "--baseline").code == 0
    assert cli("kd", *flags).out.splitlines()[-1].split()[-1][0] in "+-"
    path = out / "shapes/baseline/resnet8/seed0/last.pt"
    for damaged in (path.read_bytes()[:1000], b""):
        path.write_bytes(damaged)
        assert "--baseline" in cli("kd", *flags).out.splitlines()[-1]
    torch.save(common.create_model("resnet8", 10).state_dict(), path)
    assert "--baseline" in cli("kd", *flags).out.splitlines()[-1]
    assert "last.pt" in cli("kd", *flags, "--baseline").refused()


def test_early_stopped_kd(cli, tmp_path):
    """The schedule is that of all epochs; the teacher stops in it, the student drops it."""
    out = tmp_path / "runs"
    flags = [*SMALL, "--epochs", "5", "--out", out]
    flags += ["--teacher-epochs", "2", "--distill-epochs", "3"]
    assert cli("kd", *flags).code == 0
    teacher = rows(out / "shapes/teachers/wrn10_1/seed0")[1:]
    student = rows(out / "shapes/kd/wrn10_1-resnet8/seed0")[1:]
    assert len(teacher) == 2 and [row["lr"] for row in teacher] == [0.1, 0.1]
    assert [row["lr"] for row in student] == pytest.approx([0.1, 0.1, 0.1, 0.02, 0.004])
    assert ["kd" in row for row in student] == [True, True, True, False, False]
    full = tmp_path / "full"
    assert cli("kd", *SMALL, "--epochs", "5", "--out", full).code == 0
    assert equal_bits([row["ce"] for row in rows(full / "shapes/teachers/wrn10_1/seed0")[1:3]],
                      [row["ce"] for row in teacher])


def test_distillation_may_stop_in_any_script(cli, out):
    for script in SCRIPTS:
        done = cli(script, *SMALL, "--out", out, "--distill-epochs", "1")
        if script == "fsp":
            assert "--fsp-epochs" in done.refused()
            continue
        log = rows(out / f"shapes/{script}/wrn10_1-resnet8/seed0")[1:]
        assert done.code == 0 and TERMS[script][-1] in log[0]
        assert list(log[1])[1:3] == ["ce", "lr"]


def test_eval_measures_and_trains_nothing(cli, out):
    flags = [*SMALL, "--out", out]
    assert "is missing" in cli("kd", *flags, "--eval").refused()
    assert cli("kd", *flags).code == 0
    done = cli("kd", *flags, "--eval")
    accuracy = rows(out / "shapes/kd/wrn10_1-resnet8/seed0")[-1]["test"]
    assert f"seed0: test accuracy {accuracy:.2f} %" in done.out.splitlines()[-1]
    assert "epoch 1 " not in done.out


def test_dry_run_keeps_nothing(cli, tmp_path):
    for script in SCRIPTS:
        done = cli(script, *SMALL, "--dry-run", "--out", tmp_path / "runs")
        assert done.code == 0 and done.out.count("epoch 1 ") == TRAININGS.get(script, 2)
        assert not (tmp_path / "runs").exists()


def test_teacher_from_a_checkpoint(cli, out, tmp_path):
    path = out / "shapes/teachers/wrn10_1/seed0/last.pt"
    weights = tmp_path / "weights.pt"
    torch.save(torch.load(path, weights_only=True)["model"], weights)      # a bare state_dict
    for n, source in enumerate((path, weights)):
        done = cli("kd", *SMALL, "--out", tmp_path / f"other{n}", "--teacher-ckpt", source)
        assert done.code == 0 and not (tmp_path / f"other{n}/shapes/teachers").exists()
    results = [result_of(tmp_path / f"other{n}/shapes/kd/wrn10_1-resnet8/seed0") for n in (0, 1)]
    assert equal_bits(*results)


def test_augment_and_recipe(cli, out):
    assert cli("at", *SMALL, "--out", out, "--recipe", "cifar10-at", "--batch-size", "64",
               "--teacher-ckpt", out / "shapes/teachers/wrn10_1/seed0/last.pt").code == 0
    settings = rows(out / "shapes/at/wrn10_1-resnet8/seed0")[0]["settings"]
    assert settings["weight_decay"] == 5e-4 and settings["reflect"] and settings["augment"]
    assert settings["batch_size"] == 64 and settings["kd_weight"] == 0 and settings["epochs"] == 2
    assert cli("atang", *SMALL, "--no-augment", "--out", out, "--dry-run").code == 0


@pytest.mark.parametrize("loss", ["amd", "amd-local"])
def test_the_other_angular_losses(loss, cli, out):
    assert cli("atang", *SMALL, "--out", out, "--loss", loss, "--margin", "1.5").code == 0
    assert rows(out / f"shapes/{loss}/wrn10_1-resnet8/seed0")[-1][loss] > 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_bf16_is_a_setting_and_changes_little(script, cli, out):
    flags = [*SMALL, "--epochs", "1", "--teacher-ckpt",
             out / "shapes/teachers/wrn10_1/seed0/last.pt", *METHODS[script]]
    assert cli(script, *flags, "--out", out).code == 0
    assert "bf16 None, now True" in cli(script, *flags, "--bf16", "--out", out).refused()
    assert cli(script, *flags, "--bf16", "--out", out / "bf16").code == 0
    assert "bf16 True, now None" in cli(script, *flags, "--out", out / "bf16").refused()
    folder = f"shapes/{script}/wrn10_1-resnet8/seed0"
    exact, rough = rows(out / folder)[1], rows(out / "bf16" / folder)[1]
    for term in TERMS[script]:
        assert rough[term] != exact[term] and rough[term] == pytest.approx(exact[term], rel=0.05)


def test_pictures_in_folders(cli, tmp_path):
    shapes = common.draw_shapes(2000, seed=3)
    for n in range(60):
        split = "train" if n < 40 else "test"
        path = tmp_path / f"data/{split}/{common.SHAPES[n % 4]}/{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        common.datasets.folder.Image.fromarray(shapes.images[n].numpy()).save(path)
    flags = ["--dataset", "folder", "--data-dir", tmp_path / "data", "--epochs", "1",
             "--teacher", "wrn10_1", "--student", "resnet8", "--out", tmp_path / "runs"]
    assert cli("atang", *flags).code == 0
    assert state(tmp_path / "runs/folder/atang/wrn10_1-resnet8/seed0")[
        "model"]["classifier.weight"].shape[0] == 4
    (tmp_path / "data").rename(tmp_path / "moved")
    flags[3] = tmp_path / "moved"
    assert "data" in cli("atang", *flags).refused(), "another folder is other data"


def test_a_script_and_common_run_anywhere(tmp_path):
    for script in SCRIPTS:
        folder = tmp_path / script
        folder.mkdir()
        for name in (script, "common"):
            shutil.copy(ROOT / f"{name}.py", folder)
        done = shell(script, *SMALL, "--dry-run", home=folder, cwd="/")
        assert done.code == 0, done.err
        assert done.out.count("epoch 1 ") == TRAININGS.get(script, 2)


def test_memory_does_not_grow(out, cli, monkeypatch):
    """After the first epoch, which makes the momenta, no epoch leaves a tensor behind."""
    module, sizes = importlib.import_module("skd"), []
    real = module.evaluate

    def count(model, loader, args):
        accuracy = real(model, loader, args)
        gc.collect()
        tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        sizes.append((len(tensors), sum(storages.values())))
        return accuracy

    monkeypatch.setattr(module, "evaluate", count)
    assert cli("skd", *SMALL, "--epochs", "6", "--out", out, "--teacher-ckpt",
               out / "shapes/teachers/wrn10_1/seed0/last.pt").code == 0
    assert len(sizes) == 7 and len(set(sizes[2:])) == 1, sizes


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept(out, cli):
    """A map of 64 MB is got again, most times, without most of its 16,384 pages."""
    resource = pytest.importorskip("resource")
    assert cli("kd", *SMALL, "--out", out, "--dry-run").code == 0
    faults = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2 ** 24)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert sorted(faults)[2] < 4096, faults


def test_a_split_lies_in_memory_once():
    """With its mirrored copies, and nothing of the 4000 pictures it was chosen from."""
    gc.collect()
    before = {id(x) for x in gc.get_objects() if type(x) is torch.Tensor}
    loaders = common.load_data("shapes", "", 64, torch.device("cpu"), augment=True, seed=0,
                               train_images=1000)
    gc.collect()
    kept = [x for x in gc.get_objects() if type(x) is torch.Tensor and id(x) not in before
            and x.dtype == torch.uint8]
    large = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    drawn = 3 * 16 * 16 * (4000 + 2 * 2000)     # which these tests keep for one another
    assert sum(large.values()) <= 2 * 1000 * 20 * 20 * 3 + 2000 * 16 * 16 * 3 + drawn
    assert loaders[0].images.shape == (2000, 20, 20, 3)


# --- refusals -----------------------------------------------------------------------------------

REFUSED = [
    ("--teacher wrn17_3", "6n+4"), ("--student vit", "wrn16_1"), ("--student resnet9", "6n+2"),
    ("--dataset mnist", "shapes"), ("--datset shapes", "--datset"), ("--epoch 2", "--epoch"),
    ("--device tpu", "--device"), ("--device cuda", "--device"), ("--epochs 0", "--epochs"),
    ("--epochs 1.5", "--epochs"), ("--batch-size 1", "2 to"), ("--runs 0", "--runs"),
    ("--runs -3", "--runs"), ("--lr 0", "--lr"), ("--lr nan", "--lr"), ("--lr inf", "--lr"),
    ("--lr -0.1", "--lr"), ("--lr fast", "--lr"), ("--temperature 0", "--temperature"),
    ("--temperature nan", "--temperature"), ("--kd-weight 1.1", "--kd-weight"),
    ("--kd-weight -0.1", "--kd-weight"), ("--kd-weight nan", "--kd-weight"),
    ("--seed -1", "--seed"),
    ("--train-images 5000", "4000"), ("--train-images 0", "--train-images"),
    ("--image-size 200000", "--image-size"), ("--split train", "--split"),
    ("--recipe mine", "--recipe"), ("--seed", "--seed"),
    ("--teacher-epochs 3", "--teacher-epochs"), ("--distill-epochs 3", "--distill-epochs"),
    ("--teacher-ckpt nowhere.pt", "nowhere.pt"), ("surplus", "surplus"),
    ("--dataset folder --data-dir nowhere", "nowhere"),
    ("--dataset cinic10 --data-dir nowhere --recipe folder", "train/")]


@pytest.mark.parametrize("flags, says", REFUSED, ids=[flags for flags, _ in REFUSED])
@pytest.mark.parametrize("script", SCRIPTS)
def test_refused(script, flags, says, cli, tmp_path):
    assert says in cli(script, *SMALL, "--out", tmp_path / "runs", *flags.split()).refused()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script, flags", [
    ("at", "--beta -1"), ("at", "--beta inf"), ("at", "--beta nan"), ("atang", "--gamma -1"),
    ("atang", "--gamma nan"), ("atang", "--margin 2.1"), ("atang", "--margin nan"),
    ("atang", "--scale 0"), ("atang", "--scale inf"), ("atang", "--loss arcface"),
    ("atang", "--dataset cifar100"), ("kd", "--beta 1"), ("at", "--gamma 1"),
    ("fsp", "--fsp-epochs 0"), ("fsp", "--fsp-lr nan"), ("fsp", "--fsp-weight -1"),
    ("fsp", "--fsp-seed -1"), ("overhaul", "--setting g"), ("overhaul", "--alpha inf"),
    ("overhaul", "--position end"), ("overhaul", "--distance l1"), ("overhaul", "--layers first"),
    ("overhaul", "--teacher-bn eval"), ("skd", "--scale 0"), ("skd", "--scale unit"),
    ("skd", "--temperature 0"), ("skd", "--student-lr 0"), ("skd", "--kd-weight 2")])
def test_refused_of_the_methods_own(script, flags, cli, tmp_path):
    assert flags.split()[0 if "cifar100" not in flags else 1] in cli(
        script, *SMALL, "--out", tmp_path / "runs", *flags.split()).refused()


@pytest.mark.parametrize("script, teacher, student, group", [
    ("fsp", "vgg8", "resnet8", 4), ("overhaul", "resnet8", "vgg8", 1), ("at", "vgg8", "resnet8", 4),
    ("overhaul", "wrn10_1", "shufflenetv1", 1), ("atang", "vgg8", "mobilenetv2_half", 4)])
def test_networks_that_do_not_pair(script, teacher, student, group, cli, tmp_path):
    flags = [*SMALL, "--image-size", "32", "--teacher", teacher, "--student", student]
    line = cli(script, *flags, "--out", tmp_path / "runs").refused()
    assert f"group {group} of {teacher} ends in" in line and f"of {student} in" in line
    assert re.search(r"\d+x\d+x\d+", line) and "wrn16_3 and wrn16_1" in line
    assert not (tmp_path / "runs").exists()
    assert cli(script, *flags, "--out", tmp_path / "runs", "--baseline", "--dry-run").code == 0
    assert cli("kd", *flags, "--out", tmp_path / "runs", "--dry-run").code == 0


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_refused_checkpoints(cli, out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = out / "shapes/teachers/wrn10_1/seed0/last.pt"
    bad = {
        "cut.pt": good.read_bytes()[:-500], "empty.pt": b"", "text.pt": b"hello",
        "hostile.pt": pickle.dumps(Hostile())}
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    torch.save({"model": Hostile()}, tmp_path / "hostile2.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(common.create_model("wrn10_1", 7).state_dict(), tmp_path / "classes.pt")
    torch.save(common.create_model("wrn16_1", 10).state_dict(), tmp_path / "network.pt")
    for path in sorted(tmp_path.glob("*.pt")):
        line = cli("kd", *SMALL, "--out", tmp_path / "new", "--teacher-ckpt", path).refused()
        assert path.name in line and len(line) < 500
    # nor does torch's own warning about it stand beside the one line
    shell("kd", *SMALL, "--teacher-ckpt", tmp_path / "hostile.pt", cwd=tmp_path).refused()
    assert not (tmp_path / "executed").exists() and not (tmp_path / "new").exists()
    # the same for a run that is to be continued
    folder = out / "shapes/kd/wrn10_1-resnet8/seed0"
    assert cli("kd", *SMALL, "--out", out).code == 0
    (folder / "last.pt").write_bytes(bad["cut.pt"])
    assert "last.pt" in cli("kd", *SMALL, "--out", out).refused()


def test_refused_output_paths(cli, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for bad in (tmp_path / "file", tmp_path / "file/below", "/proc/nowhere"):
        done = shell("kd", *SMALL, "--out", bad)
        assert str(bad) in done.refused() and "epoch 1 " not in done.out


def test_a_full_disk_loses_nothing(cli, out, monkeypatch):
    flags = [*SMALL, "--out", out]
    assert cli("kd", *flags, "--epochs", "2").code == 0
    folder = out / "shapes/kd/wrn10_1-resnet8/seed0"
    kept, real = {path.name: path.read_bytes() for path in folder.iterdir()}, torch.save

    def full(value, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    (folder / "last.pt").unlink()
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError):
        cli("kd", *flags)
    assert (folder / "best.pt").read_bytes() == kept["best.pt"]
    monkeypatch.setattr(torch, "save", real)
    assert cli("kd", *flags).code == 0
    assert equal_bits(state(folder)["model"], result_of(folder)["model"])


def test_refused_other_settings(cli, out):
    flags = [*SMALL, "--out", out]
    assert cli("atang", *flags).code == 0
    for other, says in (("--margin 1.5", "margin 1.35, now 1.5"), ("--lr 0.2", "lr 0.1, now 0.2"),
                        ("--epochs 3", "epochs 2, now 3"), ("--split val", "split test, now val"),
                        ("--train-images 200", "train_images 192, now 200")):
        assert says in cli("atang", *flags, *other.split()).refused()
    teacher = out / "shapes/teachers/wrn10_1/seed0/last.pt"
    assert "epochs 2, now 3" in cli(
        "atang", *flags, "--epochs", "3", "--teacher-ckpt", teacher).refused()
    changed = torch.load(teacher, weights_only=True)
    changed["model"]["classifier.bias"] += 1
    torch.save(changed, teacher)
    assert "teacher_sha256" in cli("atang", *flags).refused(), "another teacher is another run"


def test_a_loss_that_is_not_finite_stops_at_once(cli, out):
    for script in SCRIPTS:
        done = cli(script, *SMALL, "--out", out, "--lr", "1e8", "--epochs", "2", "--teacher-ckpt",
                   out / "shapes/teachers/wrn10_1/seed0/last.pt")
        line = done.refused()
        assert re.search(r"epoch \d, step \d: ", line)
        assert all(f"{term} " in line for term in TERMS[script])
        assert re.search("nan|inf", line) and "--lr" in line


def test_help_names_every_flag():
    done = shell("atang", "--help")
    assert done.code == 0
    for flag in ("--teacher", "--runs", "--teacher-ckpt", "--distill-epochs", "--margin", "--loss",
                 "--no-augment", "--dry-run", "--device", "--out", "default"):
        assert flag in done.out
