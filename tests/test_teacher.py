"""Where the teacher comes from: trained, gone on with, loaded, refused."""
import importlib
import shutil

import pytest
import torch
from conftest import SMALL, equal_bits, result_of, state
from test_resume import Killed, dying
from test_runs import PLACE, TEACHER, log_of, out, student  # noqa: F401

import common


def test_a_teacher_is_trained_by_the_recipe(cli, tmp_path):
    """The typed rate is the student's; epochs and what the loader takes are for both."""
    shared = [*SMALL, "--epochs", "1", "--batch-size", "64", "--no-augment"]
    own = ["--lr", "0.01", "--weight-decay", "0", "--momentum", "0.5", "--nesterov"]
    done = cli("skd", *shared, *own, "--milestones", "--lr-decay", "0.5", "--out", tmp_path / "1")
    assert done.code == 0
    plain = cli("at", *shared, "--baseline", "--student", "wrn10_1", "--out", tmp_path / "2")
    assert plain.code == 0
    assert equal_bits(result_of(tmp_path / "1" / TEACHER), result_of(tmp_path / "2" / TEACHER))
    settings = log_of(tmp_path / "1" / student("skd"))[0]["settings"]
    assert settings["lr"] == 0.01 and settings["momentum"] == 0.5 and settings["nesterov"]
    assert log_of(tmp_path / "1" / TEACHER)[0]["settings"]["lr"] == 0.05


def test_an_unfinished_teacher_goes_on(cli, out, monkeypatch):
    """A killed run must never teach half trained."""
    whole = result_of(out / TEACHER)
    shutil.rmtree(out / TEACHER)
    at = importlib.import_module("at")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(at, "losses", dying(at.losses, 8))
        cli("at", *SMALL, "--out", out)
    assert len(log_of(out / TEACHER)) == 2 and not (out / student("at")).exists()
    done = cli("kd", *SMALL, "--out", out, "--lr", "0.01")
    assert done.code == 0 and done.out.startswith("epoch 2 ")
    assert equal_bits(result_of(out / TEACHER), whole)


def test_a_finished_teacher_is_only_loaded_whatever_trained_it(cli, out):
    kept, path = state(out / TEACHER), out / TEACHER / "last.pt"
    kept["log"][0]["settings"] |= {"lr": 7.0, "batch_size": 3, "augment": False}
    kept["optimizer"] = {"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": [{"betas": 1}]}
    torch.save(kept, path)
    before = path.read_bytes()
    done = cli("kd", *SMALL, "--out", out, "--epochs", "3", "--lr", "0.01", "--train-images", "200")
    assert done.code == 0 and "%, 2 of 2 epochs on 192 images" in done.out
    assert done.out.count("epoch 1 ") == 1 and path.read_bytes() == before


@pytest.mark.parametrize("accuracy, told", [(11.9, True), (12.1, False)])
def test_a_teacher_that_knows_nothing_is_told(accuracy, told, cli, out, monkeypatch):
    monkeypatch.setattr(importlib.import_module("kd"), "evaluate", lambda *args: accuracy)
    done = cli("kd", *SMALL, "--out", out, "--teacher-ckpt", out / TEACHER / "last.pt")
    assert ("epochs on 192 images; NO BETTER THAN CHANCE" in done.out) is told, done.all


def test_a_teacher_of_other_classes_or_of_another_split_is_none(cli, out):
    """One that has seen the validation images cannot teach where they are measured."""
    path = out / TEACHER / "last.pt"
    for place in ([], ["--teacher-ckpt", path]):
        line = cli("kd", *SMALL, "--out", out, "--split", "val", *place).refused()
        assert str(path) in line and "split" in line and "test" in line
    # no more can a student start from it; from other data it can
    flags = [*SMALL, "--out", out / "val", "--baseline", "--student", "wrn10_1", "--student-ckpt"]
    assert "another split: test" in cli("kd", *flags, path, "--split", "val").refused()
    for number, own in enumerate(({"data": "others"}, {"split": "val", "class_names": ["a"]})):
        kept = state(out / TEACHER)
        kept["log"][0]["settings"] |= own
        torch.save(kept, out / f"{number}.pt")
        flags[flags.index("--out") + 1] = out / f"val{number}"
        assert cli("kd", *flags, out / f"{number}.pt", "--split", "val", "--epochs", "1").code == 0
    kept = state(out / TEACHER)
    kept["log"][0]["settings"]["class_names"] = common.SHAPES[::-1]
    torch.save(kept, path)
    line = cli("kd", *SMALL, "--out", out).refused()
    assert str(path) in line and "class_names" in line
    assert not (out / PLACE / "kd").exists()


def test_an_early_stopped_teacher_has_a_folder_of_its_own(cli, out):
    """Its epochs are the first of the whole one's, and it serves all scripts."""
    whole, early = result_of(out / TEACHER)["log"], out / f"{PLACE}/baseline/wrn10_1-1/seed0"
    assert cli("kd", *SMALL, "--out", out, "--teacher-epochs", "1").code == 0
    assert equal_bits(result_of(early)["log"], whole[:1])
    done = cli("at", *SMALL, "--out", out, "--teacher-epochs", "1")
    assert done.code == 0 and done.out.startswith("teacher wrn10_1") and "1 of 2 epochs" in done.out
    assert equal_bits(result_of(out / TEACHER)["log"], whole)


def test_a_teacher_from_a_file(cli, out, tmp_path):
    """A run's, or one of another repository: the same teacher, the same student."""
    path, foreign, results = out / TEACHER / "last.pt", tmp_path / "foreign.pt", []
    weights = {f"module.{key}": x for key, x in state(path.parent)["model"].items()}
    torch.save({"epoch": 3, "state_dict": weights}, foreign)
    for source, said in (
            (path, "2 of 2 epochs on 192 images\n"), (foreign, f"{foreign}, on pictures")):
        place = tmp_path / source.stem
        done = cli("kd", *SMALL, "--out", place, "--teacher-ckpt", source)
        assert done.code == 0 and f" %, {said}" in done.out
        assert not (place / PLACE / "baseline").exists()
        results.append(result_of(place / student("kd")))
    assert equal_bits(*results)


def test_a_distilled_student_can_teach(cli, out, tmp_path):
    """Without the connectors that it was trained with; one that has learnt nothing is named."""
    assert cli("overhaul", *SMALL, "--out", out).code == 0
    path = out / student("overhaul") / "last.pt"
    flags = [*SMALL, "--teacher", "resnet8", "--teacher-ckpt"]
    assert cli("kd", *flags, path, "--out", tmp_path / "next").code == 0
    torch.save({key: 0 * x for key, x in state(path.parent)["model"].items()}, tmp_path / "0.pt")
    done = cli("kd", *flags, tmp_path / "0.pt", "--out", tmp_path / "chance")
    assert "better than chance" in done.out.lower()
