"""What a command refuses, in one line and with nothing half-written; and what ends a run."""
import importlib
import os
import pickle
import re
import runpy
import sys

import pytest
import torch
from conftest import ROOT, SCRIPTS, SMALL, equal_bits, result_of, state
from test_runs import BASELINE, PLACE, TEACHER, TERMS, log_of, out, student  # noqa: F401

import common

MISTYPED = """--dataset mnist | --datset shapes | --epoch 2 | --device tpu | --device cuda
--epochs 0 | --epochs 1.5 | --runs 0 | --runs -3 | --lr nan | --lr inf | --lr -0.1 | --lr fast
--seed -1 | --momentum 1.5 | --weight-decay -1 | --milestones 0.5 1.5 | --milestones 60 120
--lr-decay nan | --split train | --recipe mine | --seed | --teacher-epochs 3 | --distill-epochs 3
--nesterov yes | surplus | --teacher-epochs 1 --teacher-ckpt last.pt
--train-images 0 | --batch-size 0"""
OWN = {"kd": "--temperature nan | --kd-weight 1.1 | --kd-weight -0.1 | --kd-weight nan | --beta 1",
       "at": "--beta -1 | --beta inf | --kd-weight 2 | --gamma 1",
       "atang": "--gamma nan | --margin nan | --scale inf | --loss arcface | --recipe cifar100-crd",
       "fsp": "--fsp-lr nan | --fsp-weight -1 | --fsp-milestones 2 | --fsp-epochs 0.5",
       "overhaul": "--alpha inf | --distance l1 | --layers first | --teacher-bn eval",
       "skd": "--scale unit | --scale -1 | --scale nan | --temperature -4 | --kd-weight 2"}
REFUSED = {
    "--teacher wrn17_3": "6n+4", "--student vit": "wrn16_1", "--student resnet9": "6n+2",
    "--train-images 5000": "4000", "--image-size 32": "16 pixels",
    "--teacher-ckpt nowhere.pt": "nowhere.pt", "--dataset folder --data-dir nowhere": "nowhere",
    "--dataset cinic10 --data-dir nowhere --recipe cifar10-jeon": "train/"}


def test_mistyped(cli, tmp_path):
    """argparse's own: its usage, one line that names the flag, exit code 2."""
    shared = [(SCRIPTS[n % 6], flags)       # the text that reads them is the same in all six
              for n, flags in enumerate(re.split(r" \| |\n", MISTYPED))]
    own = [(script, flags) for script in SCRIPTS for flags in OWN[script].split(" | ")]
    for script, flags in shared + own:
        words = flags.split()
        line = cli(script, *SMALL, "--out", tmp_path / "runs", *words).mistyped()
        assert words[0] in line or line.endswith(words[-1]), (line, flags)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_refused(script, cli, tmp_path):
    for flags, says in REFUSED.items():
        assert says in cli(script, *SMALL, "--out", tmp_path / "runs", *flags.split()).refused()
    assert not (tmp_path / "runs").exists()


class Plain(torch.nn.Sequential):
    """A network that knows no taps."""
    def __init__(self, num_classes: int):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, num_classes))


def test_networks_that_do_not_match(cli, out, tmp_path, monkeypatch):
    """In one line, before any data are read; logits alone can be compared of any two."""
    monkeypatch.setitem(common.MAKERS, "plain", Plain)
    assert cli("kd", *SMALL, "--out", out, "--student", "plain").code == 0
    assert state(out / f"{PLACE}/kd/wrn10_1-plain/seed0")["network"] == "plain"
    for what in ("maps", "energy"):
        assert "plain has no maps" in cli("look", what, out / PLACE / "kd/wrn10_1-plain").refused()
    monkeypatch.setattr(common, "draw_shapes", None)
    new = ["--out", tmp_path / "new"]
    for script, teacher, network, group in (
            ("fsp", "vgg8", "resnet8", 4), ("at", "vgg8", "resnet8", 4),
            ("overhaul", "wrn10_1", "shufflenetv1", 1)):
        line = cli(script, *SMALL, "--teacher", teacher, "--student", network, *new).refused()
        assert f"group {group} of {teacher} has" in line and f"of {network} " in line
        assert re.search(r"\d+x\d+x\d+", line) and "wrn16_3 and wrn16_1" in line
    for script in ("at", "atang", "fsp", "overhaul"):
        for role in ("--teacher", "--student"):
            line = cli(script, *SMALL, role, "plain", *new).refused()
            assert "plain has no maps to compare" in line and "Taps with " in line
    assert "--distance l2" in cli("overhaul", *SMALL, *new, "--position", "end").refused()
    assert not (tmp_path / "new").exists()


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_refused_checkpoints(cli, out, tmp_path, monkeypatch):
    """Of what people have, test_models.py; here: nothing is executed, nothing is begun."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut.pt").write_bytes((out / TEACHER / "last.pt").read_bytes()[:-500])
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Hostile()))
    torch.save({"model": Hostile()}, tmp_path / "hostile.pt")
    torch.save(common.create_model("wrn10_1", 7).state_dict(), tmp_path / "classes.pt")
    for path in tmp_path.glob("*.pt"):
        line = cli("kd", *SMALL, "--out", tmp_path / "new", "--teacher-ckpt", path).refused()
        assert path.name in line and len(line) < 500
    assert not (tmp_path / "executed").exists() and not (tmp_path / "new").exists()


def test_refused_output_paths(cli, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for bad in (tmp_path / "file", tmp_path / "file/below", "/proc/nowhere"):
        done = cli("kd", *SMALL, "--out", bad)
        assert str(bad) in done.refused() and "epoch 1 " not in done.out


def test_refused_other_settings(cli, out):
    flags, teacher = [*SMALL, "--out", out], out / TEACHER / "last.pt"
    assert cli("atang", *flags).code == 0
    before = (out / student("atang") / "last.pt").read_bytes()
    for other, says in {
            "--margin 1.5": "margin (1.35, now 1.5)", "--lr 0.2": "lr (0.05, now 0.2)",
            "--epochs 3": "epochs (2, now 3)", "--no-augment": "augment (True, now False)",
            "--milestones": "milestones ([0.6, 0.8, 0.95], now [])", "--bf16": "bf16 (False, now ",
            "--distill-epochs 1": "distill_epochs (None, now 1)",
            "--train-images 200": "images ([192, 200], now [200, 200])"}.items():
        line = cli("atang", *flags, *other.split()).refused()
        assert f"{student('atang')} was begun with another {says}" in line and "--out" in line
    alone = "--student wrn10_1 --baseline --split val".split()
    assert "split (test, now val)" in cli("kd", *flags, *alone).refused()
    changed = state(teacher.parent)
    changed["model"]["classifier.bias"] += 1
    torch.save(changed, teacher)
    assert "teacher_hash" in cli("atang", *flags).refused(), "another teacher is another run"
    assert (out / student("atang") / "last.pt").read_bytes() == before


def test_a_full_disk_loses_nothing(cli, out, monkeypatch):
    flags, folder = [*SMALL, "--out", out], out / student("kd")
    aside, kd = folder / "last.tmp", importlib.import_module("kd")
    real = kd.evaluate

    def fills_up(model, loader, args):
        if folder.exists() and len(log_of(folder)) == 2:        # after the first epoch
            aside.symlink_to("/dev/full")
        return real(model, loader, args)

    with monkeypatch.context() as patch:
        patch.setattr(kd, "evaluate", fills_up)
        assert "No space left on device" in cli("kd", *flags).refused()
    assert len(log_of(folder)) == 2 == len((folder / "log.jsonl").read_text().splitlines())
    aside.unlink()
    assert cli("kd", *flags).code == 0
    flags = [*SMALL, "--out", out / "whole", "--teacher-ckpt", out / TEACHER / "last.pt"]
    assert cli("kd", *flags).code == 0
    assert equal_bits(result_of(folder), result_of(out / "whole" / student("kd")))


def test_a_loss_that_is_not_finite_ends_the_run(cli, out, monkeypatch):
    """Too large a rate, and pixels that are none, in every script: the terms are named."""
    line = cli("kd", *SMALL, "--out", out, "--epochs", "9", "--lr", "1e6", "--baseline").refused()
    epoch = int(re.search(r"epoch (\d).*'ce': (nan|inf).*not finite.*rate", line)[1])
    kept = state(out / BASELINE)
    assert len(kept["log"]) == epoch, "the epoch before it is kept"
    assert all(value.isfinite().all() for value in kept["whole"].values())
    real = common.ImageLoader.normalise
    monkeypatch.setattr(common.ImageLoader, "normalise", lambda self, x: real(self, x) * torch.inf)
    for script in SCRIPTS:
        line = cli(script, *SMALL, "--out", out).refused()
        for term in TERMS[script] if script != "fsp" else ["fsp"]:
            assert re.search(rf"epoch 1: .*'{term}': nan.* not finite", line)
        kept = list((out / PLACE / script).rglob("last.pt"))
        assert kept and all(len(log_of(path.parent)) == 1 for path in kept)


def test_the_last_lines_of_a_script(tmp_path, monkeypatch):
    """What a user can mend is a line; people edit these files, and need the rest's traceback."""
    monkeypatch.setattr(sys, "argv", ["kd.py"])
    for error, kind, said in (
            ("torch.OutOfMemoryError('no\\nmemory')", SystemExit, "^error: no memory$"),
            ("OSError(28, 'full')", SystemExit, "^error: .*full$"),
            ("KeyboardInterrupt", SystemExit, "^stopped: .*the same command goes on"),
            ("IndexError('an edit')", IndexError, "an edit")):
        text = (ROOT / "kd.py").read_text().replace("args = parse_args()", f"raise {error}", 1)
        (tmp_path / "kd.py").write_text(text)
        with pytest.raises(kind, match=said):
            runpy.run_path(str(tmp_path / "kd.py"), run_name="__main__")
