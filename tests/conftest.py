"""What the tests share: the scripts as modules, and their command lines run in this process."""
import functools
import importlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")       # as fast, with networks of this size
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")   # the bits are promised on the CPU
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [path.stem for path in sorted(ROOT.glob("*.py")) if "# --- shared: " in path.read_text()]
sys.path[:0] = [str(ROOT / folder) for folder in (".", "tests", "tests/tools", "tests/course")]
sys.dont_write_bytecode = True
common = importlib.import_module("common")
common.draw_shapes = functools.lru_cache(common.draw_shapes)    # the same pictures for every test

SMALL = ("--dataset shapes --train-images 192 --epochs 2 --teacher wrn10_1 --student resnet8 "
         "--device cpu").split()        # a whole experiment in a second or two


class Result:
    """What a command left; `refused` and `mistyped` return its last line, or fail the test."""
    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err, self.all = code, out, err, f"exit {code}\n{out}\n{err}"

    def refused(self) -> str:
        assert self.code == 1 and re.fullmatch("error: .+\n", self.err), self.all
        return self.err

    def mistyped(self) -> str:
        assert self.code == 2 and re.match("(?s)usage: .*: error: .+\n$", self.err), self.all
        return self.err.splitlines()[-1]


def fewer(draw):
    """draw_shapes, but with accuracies measured on 200 images, not on 2000, to spare time."""
    return lambda count, seed, *kind: draw(count if seed == 1 else 200, seed, *kind)


def pair_in_float64(script: str, args, loaders) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The student with the connectors of its method, and the teacher, as main() prepares them."""
    module = importlib.import_module(script)
    teacher = module.build(args.teacher, 0, loaders[0], args).eval().requires_grad_(False)
    student = module.build(args.student, 1, loaders[0], args)
    if script == "overhaul":
        teacher = module.prepared(teacher, args)
        student = module.Connected(student, teacher, args)
    if script == "fsp":
        taps = module.check_pair(args.teacher, args.student, args.image_size, ["entries", "stages"])
        wanted, own = [[x.shape[1] for x in (*seen.entries, *seen.stages)] for seen in taps]
        student = student if own == wanted else module.Connected(student, own, wanted)
    return student.double(), teacher.double()


@pytest.fixture
def cli(capsys, monkeypatch):
    """cli("kd", "--epochs", "2", ...) -> Result: main() of a script, a copy's Path or a tool."""
    monkeypatch.setattr(common, "draw_shapes", fewer(common.draw_shapes))
    def call(script: str | Path, *flags: object) -> Result:
        monkeypatch.setattr(sys, "argv", [f"{Path(script).stem}.py", *map(str, flags)])
        capsys.readouterr()
        main = (runpy.run_path(str(script))["main"] if isinstance(script, Path)
                else importlib.import_module(script).main)
        try:
            end = main() or 0
        except SystemExit as stop:
            end = stop.code
        except (common.UserError, OSError, torch.OutOfMemoryError) as error:    # a script's entry
            end = f"error: {' '.join(str(error).split())}"
        out, err = capsys.readouterr()
        return Result(1, out, f"{err}{end}\n") if isinstance(end, str) else Result(end, out, err)
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
        return first.keys() == second.keys() and all(equal_bits(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal_bits, first, second))
    return first == second


def result_of(folder: Path) -> dict:
    """All of a finished run that must come out the same each time; times and paths left out."""
    kept = state(folder)
    header, *rows = kept["log"]
    for row in rows:
        del row["images/s"], row["seconds"]
    result = {"settings": header["settings"], "log": rows}
    return result | {key: kept[key] for key in ("whole", "optimizer")}
