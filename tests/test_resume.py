"""Killed at any moment, a run comes out of the same command to the same bits."""
import importlib
import io
import json
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPTS, SMALL, equal_bits, result_of, state

import common

# three stops of two trainings: the teacher early, the student's distilling, the student
FLAGS = [*SMALL, "--train-images", "64", "--teacher-epochs", "1", "--distill-epochs", "1"]
RUNS = "shapes/shapes/baseline/wrn10_1-1/seed0", "shapes/shapes/kd/wrn10_1-resnet8/seed0"


class Killed(BaseException):
    """What ends a run in these tests at a chosen moment; no script catches it."""


def dying(function, number: int, last_deed=lambda *args: None):
    """`function`, but its call of this number does something else, and is the run's last."""
    calls = iter(range(1, 999))

    def call(*args, **kwargs):
        if next(calls) == number:
            last_deed(*args)
            raise Killed
        return function(*args, **kwargs)
    return call


MOMENTS = {"before log.jsonl": (Path, "write_text"), "before last.tmp": (torch, "save"),
           "in log.jsonl": (Path, "write_text", lambda path, text: path.write_bytes(b'{"set')),
           "in last.tmp": (Path, "write_bytes", lambda path, x: open(path, "wb").write(x[:9])),
           "before the rename": (Path, "replace"), "after it": (Path, "replace", Path.replace),
           "in a step": (common.ImageLoader, "normalise")}


def test_killed_at_every_such_moment(cli, tmp_path, monkeypatch):
    assert cli("kd", *FLAGS, "--out", tmp_path / "whole").code == 0
    for moment, (owner, name, *last_deed) in MOMENTS.items():
        for number in (1, 4, 5) if moment != "in a step" else (5, 8):
            out = tmp_path / f"{moment} {number}"
            with monkeypatch.context() as patch, pytest.raises(Killed):
                patch.setattr(owner, name, dying(getattr(owner, name), number, *last_deed))
                cli("kd", *FLAGS, "--out", out)
            assert all(state(path.parent)["log"] for path in out.rglob("last.pt")), "it is whole"
            assert cli("kd", *FLAGS, "--out", out).code == 0
            for run in RUNS:
                assert equal_bits(result_of(out / run), result_of(tmp_path / "whole" / run)), out
                assert {path.name for path in (out / run).iterdir()} == {"last.pt", "log.jsonl"}
                rows = [*map(json.loads, (out / run / "log.jsonl").read_text().splitlines())]
                assert rows == state(out / run)["log"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_goes_on_after_its_last_epoch(script, cli, tmp_path, monkeypatch):
    """Killed an epoch later each time; kd.py with dropout, whose numbers must come out alike,
    at.py in bf16, overhaul.py with connectors that stop learning in between."""
    torch.save(common.create_model("wrn10_1", 10).state_dict(), tmp_path / "teacher.pt")
    more = {"kd": "--student mobilenetv2", "at": "--bf16", "fsp": "--fsp-epochs 2",
            "overhaul": "--distill-epochs 2"}.get(script, "").split()
    flags = [*SMALL, "--train-images", "64", "--epochs", "3", *more,
             "--teacher-ckpt", tmp_path / "teacher.pt", "--out"]
    assert cli(script, *flags, tmp_path / "whole").code == 0
    runs = [path.parent.relative_to(tmp_path / "whole") for path in tmp_path.rglob("last.pt")]
    assert len(runs) == (2 if script == "fsp" else 1)
    module = importlib.import_module(script)
    for _ in range(2 * len(runs)):     # all epochs but the last: 2 of 3, 4 of 2 + 3
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(module, "evaluate", dying(module.evaluate, 3))    # teacher, epoch, epoch
            cli(script, *flags, tmp_path / "killed")
    done = cli(script, *flags, tmp_path / "killed")
    assert done.code == 0 and done.out.count("images/s") == 1, "finished epochs are not repeated"
    for run in runs:
        assert equal_bits(result_of(tmp_path / "killed" / run), result_of(tmp_path / "whole" / run))


def test_what_is_not_gone_on_with(cli, tmp_path, monkeypatch):
    """Other settings in the middle of a run, a last.pt cut short, or weights alone: a line each."""
    flags, kd = [*FLAGS, "--out", tmp_path], importlib.import_module("kd")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(kd, "evaluate", dying(kd.evaluate, 4))    # of the student's second epoch
        cli("kd", *flags)
    says = f"{RUNS[1]} was begun with another distill_epochs (1, now 2)"
    assert says in cli("kd", *flags, "--distill-epochs", "2").refused()
    for path in (tmp_path / run / "last.pt" for run in RUNS):
        whole = path.read_bytes()
        for length in (0, 1, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            assert f"{path} is damaged or not a run's: remove it" in cli("kd", *flags).refused()
            assert path.read_bytes() == whole[:length]
        torch.save(torch.load(io.BytesIO(whole))["model"], path)
        assert "not a run's" in cli("kd", *flags).refused()
        path.write_bytes(whole)
    assert cli("kd", *flags).out.count("images/s") == 1, "the one that was left"


def test_kill_9_and_ctrl_c(tmp_path, monkeypatch):
    """Of real processes, one after the other, the last time in the student's training."""
    flags = [str(ROOT / "kd.py"), *SMALL, "--epochs", "4", "--out"]
    for ending, line in (signal.SIGINT, "epoch"), (signal.SIGKILL, "teacher"):
        # Ctrl-C does not reach what is begun in a shell's background, unless it wants to
        process = subprocess.Popen(
            [sys.executable, "-B", *flags, tmp_path / "killed"], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        while not process.stdout.readline().startswith(line):
            assert process.poll() is None, process.stderr.read()
        process.stdout.readline()       # of an epoch
        process.send_signal(ending)
        said = process.communicate()[1]
        assert process.returncode == (1 if ending == signal.SIGINT else -ending)
        assert said.count("\n") == (ending == signal.SIGINT), said
        assert not said or said.startswith("stopped: ") and "the same command goes on" in said
    for out in ("whole", "killed"):
        monkeypatch.setattr(sys, "argv", [*flags, str(tmp_path / out)])
        runpy.run_path(flags[0], run_name="__main__")
    for run in ("baseline/wrn10_1", "kd/wrn10_1-resnet8"):
        folders = [tmp_path / out / "shapes/shapes" / run / "seed0" for out in ("whole", "killed")]
        assert equal_bits(*map(result_of, folders))
