"""Killed at any moment, a run comes out of the same command to the same bits.

    python tests/test_resume.py 10      kill -9 at ten random moments, and compare
"""
import itertools
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPTS, SMALL, equal_bits, result_of, state

import common

# three stops of two trainings: the teacher early, the student's distilling, the student
FLAGS = [*SMALL, "--epochs", "2", "--train-images", "64", "--teacher-epochs", "1",
         "--distill-epochs", "1"]
TEACHER, STUDENT = "shapes/baseline/wrn10_1/seed0", "shapes/{}/wrn10_1-resnet8/seed0"


class Killed(BaseException):
    """What ends a run in these tests at a chosen moment; no script catches it."""


def at_call(function, number: int, half_done=lambda *args: None):
    """`function`, that dies in its call of this number."""
    left = number

    def call(*args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0:
            half_done(*args)
            raise Killed
        return function(*args, **kwargs)
    call.reached = lambda: left <= 0
    return call


def half_a_file(path, content):
    with open(path, "wb") as file:
        file.write(content[:len(content) // 2])


MOMENTS = {"before a rename": (Path, "replace", lambda *args: None),
           "in a file": (Path, "write_bytes", half_a_file),
           "in the copies": (shutil, "copy", lambda *args: None),
           "in a step": (common.ImageLoader, "normalise", lambda *args: None)}


def results(out: Path) -> list[dict]:
    stopped = TEACHER.replace("/seed0", "-1/seed0")       # early, in a folder of its own
    return [result_of(out / stopped), result_of(out / STUDENT.format("kd"))]


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_every_such_moment(moment, cli, tmp_path, monkeypatch):
    assert cli("kd", *FLAGS, "--out", tmp_path / "whole").code == 0
    whole = results(tmp_path / "whole")
    owner, name, half_done = MOMENTS[moment]
    real, number = getattr(owner, name), 0
    while True:
        number += 1 if moment != "in a step" else 7
        out = tmp_path / f"killed{number}"
        deadly = at_call(real, number, half_done)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, deadly)
            try:
                cli("kd", *FLAGS, "--out", out)
            except Killed:
                pass
        if not deadly.reached():
            break       # the run has fewer such moments
        for path in out.rglob("*.pt"):
            assert state(path.parent, path.name)["log"], "what has its name is whole"
        assert cli("kd", *FLAGS, "--out", out).code == 0
        assert equal_bits(results(out), whole), f"{moment}, number {number}"
    assert number > (5 if moment != "in the copies" else 4)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_goes_on_after_its_last_epoch(script, cli, tmp_path, monkeypatch):
    """kd.py with dropout, whose random numbers must come out alike; at.py in bf16."""
    student = "mobilenetv2" if script == "kd" else "resnet8"
    flags = [*SMALL, "--train-images", "64", "--student", student, "--runs", "2",
             "--teacher-ckpt", tmp_path / "teacher.pt"]
    flags += ["--fsp-epochs", "1"] * (script == "fsp") + ["--bf16"] * (script == "at")
    torch.save(common.create_model("wrn10_1", 10).state_dict(), tmp_path / "teacher.pt")
    assert cli(script, *flags, "--out", tmp_path / "whole").code == 0
    for number in (3, 4):       # after the teacher: the second epoch of student 0, of student 1
        module = sys.modules[script]
        with monkeypatch.context() as patch:
            patch.setattr(module, "evaluate", at_call(module.evaluate, number))
            with pytest.raises(Killed):
                cli(script, *flags, "--out", tmp_path / "stopped")
    done = cli(script, *flags, "--out", tmp_path / "stopped")
    trained = [line for line in done.out.splitlines() if line.startswith("epoch ")]
    # FSP, whose stage 1 counts too, died in stage 1 of student 1: that and two epochs are left
    left = 3 if script == "fsp" else 1
    assert done.code == 0 and len(trained) == left, "finished epochs are not repeated"
    for name, seed in itertools.product([script] + ["fsp/stage1"] * (script == "fsp"), (0, 1)):
        folder = f"shapes/{name}/wrn10_1-{student}/seed{seed}"
        assert equal_bits(result_of(tmp_path / "whole" / folder),
                          result_of(tmp_path / "stopped" / folder))


def start(script: str, *flags: object) -> subprocess.Popen:
    """A process that Ctrl-C reaches, which one begun in a shell's background would ignore."""
    return subprocess.Popen([sys.executable, "-B", str(ROOT / f"{script}.py"), *map(str, flags)],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def here(script: str, *flags: object) -> None:
    """The same in this process, which spares time."""
    sys.argv = [f"{script}.py", *map(str, flags)]
    runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")


def kill_and_resume(out: Path, kills: int, epochs: int) -> None:
    """kill -9 at random moments of training, again and again; then the bits."""
    flags = ["kd", *SMALL, "--epochs", epochs, "--out"]
    here(*flags, out / "whole")
    moments, killed = random.Random(0), 0
    while killed < kills:
        process = start(*flags, out / "killed")
        process.stdout.readline()       # it trains
        time.sleep(moments.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "finished too early: give it more epochs"
        killed += 1
        kept = {path.parent.parent.name: len(state(path.parent)["log"]) - 1
                for path in sorted(out.glob("killed/shapes/*/*/seed0/last.pt"))}
        print(f"kill {killed}: epochs kept {kept}")
    here(*flags, out / "killed")
    for folder in (TEACHER, STUDENT.format("kd")):
        assert equal_bits(result_of(out / "whole" / folder), result_of(out / "killed" / folder))
        print(f"{folder}: the same bits in every weight, momentum and log row")


def test_kill_9(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    kill_and_resume(tmp_path, kills=1, epochs=5)


def test_ctrl_c(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    flags = ["kd", *SMALL, "--epochs", 3, "--out"]
    process = start(*flags, tmp_path)
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait() == 130 and "Traceback" not in rest
    assert first.startswith("epoch 1 ") and "the same command goes on" in rest.splitlines()[-1]
    here(*flags, tmp_path)
    log = state(tmp_path / STUDENT.format("kd"))["log"]
    assert [row["epoch"] for row in log[1:]] == [1, 2, 3]


def test_ctrl_c_within_a_checkpoint(tmp_path, monkeypatch, capsys):
    def interrupted(path, content):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    monkeypatch.setattr(sys, "argv", ["kd.py", *SMALL, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "kd.py"), run_name="__main__")
    assert end.value.code == 130
    assert "the same command goes on" in capsys.readouterr().out.splitlines()[-1]
    assert not list(tmp_path.rglob("last.pt"))


if __name__ == "__main__":
    kills = int(sys.argv[1])
    kill_and_resume(Path(tempfile.mkdtemp()), kills, epochs=3 * kills // 2)
