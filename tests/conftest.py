"""What the tests share: the scripts as modules, and their command lines run in this process."""
import functools
import importlib
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Callable

import pytest

# one thread: with networks of this size two are hardly faster, and on busy cores much slower
os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch  # noqa: E402
from torch import nn  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [path.stem for path in sorted(ROOT.glob("*.py")) if path.stem != "common"]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
sys.dont_write_bytecode = True
common = importlib.import_module("common")
common.draw_shapes = functools.lru_cache(common.draw_shapes)    # the same pictures for every test
bench = importlib.import_module("bench")

# A whole experiment in a second or two.
SMALL = ["--dataset", "shapes", "--train-images", "192", "--epochs", "2", "--teacher", "wrn10_1",
         "--student", "resnet8", "--device", "cpu"]


class Result:
    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err

    def refused(self) -> str:
        """The one line of a refusal; fails the test if this is none."""
        assert self.code == 1, f"exit code {self.code}\n{self.out}\n{self.err}"
        assert self.err.count("\n") == 1 and self.err.startswith("error: "), self.err
        assert "Traceback" not in self.out + self.err
        return self.err

    def mistyped(self) -> str:
        """argparse's own last line about a wrong argument; fails the test if this is none."""
        assert self.code == 2, f"exit code {self.code}\n{self.out}\n{self.err}"
        *usage, line = self.err.splitlines()
        assert usage[0].startswith("usage: ") and ": error: " in line, self.err
        return line


def fewer(draw: Callable) -> Callable:
    """draw_shapes, but with accuracies measured on 200 images, not on 2000, to spare time."""
    return lambda count, seed: draw(count if seed == 1 else 200, seed)


def pair_in_float64(script: str, args: Namespace, loaders: tuple) -> tuple[nn.Module, nn.Module]:
    """The student, with the connectors of its method, and the teacher."""
    teacher = common.new_model(args.teacher, loaders[0], 0).eval().requires_grad_(False)
    student = common.new_model(args.student, loaders[0], 1)
    bench.connect(script, student, teacher, args, next(iter(loaders[1]))[0][:2])
    return student.double(), teacher.double()


@pytest.fixture
def cli(capsys, monkeypatch):
    """cli("kd", "--epochs", "2", ...) -> Result: main() of a script or tool, in this process.

    Its accuracies are those of `fewer` images.
    """
    monkeypatch.setattr(common, "draw_shapes", fewer(common.draw_shapes))

    def call(script: str, *flags: object) -> Result:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
        capsys.readouterr()
        code, last = 0, ""
        try:
            importlib.import_module(script).main()
        except SystemExit as end:
            code, last = (end.code, "") if isinstance(end.code, int) else (1, f"{end.code}\n")
        except Exception as error:      # as the last lines of every script do
            code, last = 1, common.one_line(error) + "\n"
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err + last)
    return call


def shell(script: str, *flags: object, home: Path = ROOT, cwd: Path = ROOT, **kwargs) -> Result:
    """The same as a process of its own, as a user starts it; `home` is the script's folder."""
    done = subprocess.run([sys.executable, "-B", str(home / f"{script}.py"), *map(str, flags)],
                          capture_output=True, text=True, cwd=cwd, timeout=240, **kwargs)
    return Result(done.returncode, done.stdout, done.stderr)


def assert_equation(name: str, ours: torch.Tensor, theirs: float, rel: float) -> None:
    """A loss against its equation read once more, with a message for who writes the loss."""
    __tracebackhide__ = True
    assert ours.dtype == torch.float64, f"{name}: float64 goes in, {ours.dtype} comes out"
    assert ours.item() == pytest.approx(theirs, rel=rel), (
        f"{name} gives {ours.item():.6g}, its equation {theirs:.6g}: {ours.item() / theirs:.4g} "
        f"times as much. Sum or mean, over which axes, which of the two first: its docstring says")


def state(folder: Path, name: str = "last.pt") -> dict:
    return torch.load(folder / name, map_location="cpu", weights_only=True)


def equal_bits(first: object, second: object) -> bool:
    """Equal to the bit: tensors, and numbers, in nested dicts and lists."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(
            equal_bits(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal_bits, first, second))
    return first == second


def result_of(folder: Path) -> dict:
    """All of a finished run that must come out the same each time; times and paths left out."""
    kept = state(folder)
    rows = [{key: value for key, value in row.items() if key not in ("images/s", "seconds")}
            for row in kept["log"][1:]]
    return {"model": kept["model"], "optimizer": kept["optimizer"], "log": rows,
            "settings": kept["log"][0]["settings"]}


os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")   # the bits are promised on the CPU
