"""Every script through its command line: what a run prints, keeps and refuses."""
import json
import os
import pickle
import re
import shutil
import sys

import pytest
import torch
from conftest import ROOT, SCRIPTS, SMALL, equal_bits, result_of, shell, state

import common

METHODS = {"kd": ["--temperature", "3"], "at": ["--beta", "20"], "atang": ["--gamma", "50"]}
NO_METHOD = {"kd": ["--kd-weight", "0"], "at": ["--kd-weight", "0", "--beta", "0"],
             "atang": ["--kd-weight", "0", "--gamma", "0"]}
TERMS = {"kd": ["ce", "kd"], "at": ["ce", "kd", "at"], "atang": ["ce", "kd", "atang"]}


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
    assert [row["lr"] for row in log] == pytest.approx([0.1, 0.02])     # milestone 0.6 of 2 epochs
    assert header["arguments"]["student"] == "resnet8" and header["arguments"]["device"] == "cpu"
    assert header["versions"][1] == str(torch.__version__)
    assert all(len(digest) == 64 for digest in header["sha256"])
    # what stands in the log is true of what is kept
    kept = state(folder)
    assert [header, *log] == kept["log"]
    student = common.create_model("resnet8", 10)
    student.load_state_dict(kept["model"])
    _, test = common.load_data("shapes", "", 64, torch.device("cpu"), augment=False, seed=0)
    right = torch.cat([student.eval()(x).argmax(1) == y for x, y in test])
    assert 100 * right.float().mean().item() == pytest.approx(log[-1]["test"], abs=1e-4)
    # the teacher is printed before the student starts, the table comes last
    lines = done.out.splitlines()
    announced = next(n for n, line in enumerate(lines) if line.startswith("teacher wrn10_1, test"))
    accuracy = rows(out / "shapes/teachers/wrn10_1/seed0")[-1]["test"]
    assert f"{accuracy:.2f} %" in lines[announced]
    assert f"  {TERMS[script][1]} " in lines[announced + 1]
    assert f"{log[-1]['test']:.2f}" in lines[-3] and str(folder.parent) in lines[-3]
    assert f"{accuracy:.2f}" in lines[-2] and "--baseline" in lines[-1]
    assert sorted(path.name for path in folder.iterdir()) == ["best.pt", "last.pt", "log.jsonl"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_weight_zero_is_the_baseline_to_the_bit(script, cli, out):
    """And so all methods start from the same weights and see the same batches."""
    assert cli(script, *SMALL, "--out", out, "--epochs", "2", *NO_METHOD[script]).code == 0
    assert cli(script, *SMALL, "--out", out, "--baseline").code == 0
    ours = result_of(out / f"shapes/{script}/wrn10_1-resnet8/seed0")
    plain = result_of(out / "shapes/baseline/resnet8/seed0")
    assert equal_bits(ours["model"], plain["model"])
    assert equal_bits(ours["optimizer"], plain["optimizer"])


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
        assert cli(script, *SMALL, "--out", out, "--distill-epochs", "1").code == 0
        log = rows(out / f"shapes/{script}/wrn10_1-resnet8/seed0")[1:]
        assert "kd" in log[0] and list(log[1])[1:3] == ["ce", "lr"]


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
        assert done.code == 0 and done.out.count("epoch 1 ") == 2
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
        assert done.code == 0 and done.out.count("epoch 1 ") == 2, done.err


# --- refusals -----------------------------------------------------------------------------------

REFUSED = [
    ("--teacher wrn17_3", "6n+4"), ("--student vit", "wrn16_1"), ("--student resnet9", "6n+2"),
    ("--dataset mnist", "shapes"), ("--datset shapes", "--datset"), ("--epoch 2", "--epoch"),
    ("--device tpu", "--device"), ("--device cuda", "--device"), ("--epochs 0", "--epochs"),
    ("--epochs 1.5", "--epochs"), ("--batch-size 0", "--batch-size"), ("--runs 0", "--runs"),
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
    ("--dataset cinic10 --data-dir nowhere", "train/")]


@pytest.mark.parametrize("flags, says", REFUSED, ids=[flags for flags, _ in REFUSED])
@pytest.mark.parametrize("script", SCRIPTS)
def test_refused(script, flags, says, cli, tmp_path):
    assert says in cli(script, *SMALL, "--out", tmp_path / "runs", *flags.split()).refused()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script, flags", [
    ("at", "--beta -1"), ("at", "--beta inf"), ("at", "--beta nan"), ("atang", "--gamma -1"),
    ("atang", "--gamma nan"), ("atang", "--margin 2.1"), ("atang", "--margin nan"),
    ("atang", "--scale 0"), ("atang", "--scale inf"), ("atang", "--loss arcface"),
    ("atang", "--dataset cifar100"), ("kd", "--beta 1"), ("at", "--gamma 1")])
def test_refused_of_the_methods_own(script, flags, cli, tmp_path):
    assert flags.split()[0 if "cifar100" not in flags else 1] in cli(
        script, *SMALL, "--out", tmp_path / "runs", *flags.split()).refused()


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
        assert re.search(r"epoch \d, step \d: ", line) and "ce " in line and "kd " in line
        assert "nan" in line and "--lr" in line


def test_help_names_every_flag():
    done = shell("atang", "--help")
    assert done.code == 0
    for flag in ("--teacher", "--runs", "--teacher-ckpt", "--distill-epochs", "--margin", "--loss",
                 "--no-augment", "--dry-run", "--device", "--out", "default"):
        assert flag in done.out
