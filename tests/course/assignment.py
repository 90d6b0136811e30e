"""An assignment from the repo: blank the losses for students, grade what comes back.

    python tests/course/assignment.py blank OUT --loss at_loss --loss partial_l2
                        a copy of the repo in OUT, in which the named functions keep their docstring
                        and equation and raise NotImplementedError; everything else works
    python tests/course/assignment.py grade SUBMISSION [SUBMISSION ...]
                        a table, submission x function: right, or the mistake by its name
    python tests/course/assignment.py list
                        the functions that can be blanked and graded, and the mistakes known of each

A submission is a folder with the scripts, or one script, as in ann_kd.py. Values and gradients on
fixed inputs judge it, not its text. It runs from a copy, in a process that knows no solution and
has limits, which is no sandbox: grade the code of strangers in a container.
"""
import argparse
import ast
import contextlib
import functools
import importlib
import inspect
import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

try:
    import resource
except ImportError:     # Windows
    resource = None

ROOT = Path(__file__).resolve().parents[2]
FUNCTIONS = ["kd.kd_loss", "at.attention_map", "at.at_loss", "atang.attention_map",
             "atang.angular_map", "atang.atang_loss", "atang.amd_loss", "fsp.fsp_matrix",
             "fsp.fsp_loss", "overhaul.channel_margin", "overhaul.margin_relu",
             "overhaul.partial_l2", "overhaul.overhaul_loss", "skd.spherical", "skd.skd_loss"]
# a loss that is wrong may be so because of what it is made of
USES = {"at.at_loss": ["at.attention_map"], "fsp.fsp_loss": ["fsp.fsp_matrix"],
        "atang.atang_loss": ["atang.attention_map", "atang.angular_map"],
        "atang.amd_loss": ["atang.attention_map"], "skd.skd_loss": ["skd.spherical"],
        "overhaul.overhaul_loss": ["overhaul.margin_relu", "overhaul.partial_l2"]}
# what a solution could be read from
BESIDE = {"atang.angular_map": ["amd_distance"]}
# what a teacher keeps, and what does not belong to a copy
KEPT = ("assignment.py", "mistakes.py", "test_course.py", "test_readme.py", "__pycache__", "*~",
        "*.bak", ".*.swp")
MANIFEST = "assignment.json"
# inputs that carry no gradient in training: whether one reaches them is a matter of style
FREE = {"overhaul.margin_relu": ("[0]", "[1]"), "overhaul.partial_l2": ("[1]",),
        "overhaul.overhaul_loss": ("[2]",)}
# inputs that a docstring names, beside those in which each known mistake shows
PIXELS, WEIGHTS, UNEQUAL = "logits (N, K, H, W)", "weights that are given", "unequal lists"
NOT_YET = "not written yet"


class Wrong(Exception):
    """What is said to the person at the keyboard, in one line."""


# --- inputs --------------------------------------------------------------------------------------

def cases(function: str) -> list[tuple[list, dict]]:
    """Fixed inputs in float64, positional and named; the same in every process."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def maps(*shapes: tuple) -> list[Tensor]:
        return [normal(*shape) for shape in shapes]

    logits = 3 * normal(5, 10), 3 * normal(5, 10)
    norm = nn.BatchNorm2d(6).double()
    with torch.no_grad():
        norm.bias.copy_(normal(6))
        norm.weight.copy_(normal(6).sign() * (0.5 + normal(6).abs()))
        norm.running_mean.copy_(normal(6))
        norm.running_var.copy_(normal(6).square() + 0.1)
    connected = maps((4, 3, 4, 4), (4, 5, 2, 2), (4, 2, 2, 2))
    like = [normal(*x.shape) for x in connected]
    margins = [-normal(x.shape[1]).abs() for x in connected]
    features = maps((4, 3, 8, 8), (4, 5, 4, 4)), maps((4, 6, 8, 8), (4, 2, 4, 4))
    q = normal(3, 16).square()
    q = q / q.norm(dim=1, keepdim=True)
    ties = torch.tensor([-2.0, -1.0, -0.5, 0.0, 1.0], dtype=torch.float64)      # S = T, T = 0, both
    return {
        "kd_loss": [([*logits, 4.0], {}), ([*logits, 1.0], {})],
        "attention_map": [([normal(3, 4, 5, 5)], {}), (
            [normal(2, 7, 3, 3)], {"p": 1} if function == "at.attention_map" else {})],
        "at_loss": [([*features], {}), ([maps((4, 3, 8, 8)), maps((4, 6, 4, 4))], {"p": 1})],
        "angular_map": [([q, 1.35, 64.0], {}), ([q, 1.5, 5.0], {})],
        "atang_loss": [([*features, 1.35, 64.0], {}), ([*features, 1.6, 2.0], {})],
        "amd_loss": [([*features, 1.35, 64.0], {}), ([*features, 1.35, 2.0], {"local": True})],
        "fsp_matrix": [([normal(3, 4, 5, 5), normal(3, 6, 5, 5)], {}),
                       ([normal(3, 4, 6, 6), normal(3, 6, 3, 3)], {})],
        "fsp_loss": [([list(zip(maps((4, 3, 6, 6), (4, 5, 3, 3)), maps((4, 5, 6, 6), (4, 4, 3, 3))))
                       for _ in range(2)], {})],
        "channel_margin": [([norm], {})] + [([norm_of(beta)], {}) for beta in (3.5, 5.0)],
        "margin_relu": [([normal(3, 4, 4, 4), -normal(4).abs()], {})],
        "partial_l2": [([connected[0], like[0]], {}), (
            [x.view(1, 1, 5, 5) for x in (ties.repeat(5), ties.repeat_interleave(5))], {})],
        "overhaul_loss": [([connected, like, margins], {}),
                          ([connected, like, margins], {"partial": False})],
        "spherical": [([logits[0] + 1, 6.3], {"center": True}), ([logits[0] + 1, 2.0], {})],
        "skd_loss": [([*logits, 4.0, 6.3], {"center": True}), ([*logits, 4.0, "teacher"], {})],
    }[function.split(".")[1]]


def norm_of(beta: float, gamma: float = 1.0) -> nn.BatchNorm2d:
    """One channel, apart from others, beside whose margins its own would be nothing."""
    norm = nn.BatchNorm2d(1).double()
    norm.bias.data[0], norm.weight.data[0] = beta, gamma
    return norm


def changed(value: object, change: object) -> object:
    """The same lists of lists, every tensor in them changed."""
    if isinstance(value, list | tuple):
        return [changed(part, change) for part in value]
    return change(value.detach()) if isinstance(value, Tensor) else value


def extremes(function: str) -> list[tuple[str, list, dict]]:
    """Where a loss that is right on paper may fail, as in tests/test_losses.py: a name, inputs."""
    script, name = function.split(".")
    top = 1 if name == "angular_map" else 6e4       # a cosine; nearly the largest of float16
    changes = [("float64", lambda x: x), ("float32", Tensor.float),
               ("float32, in autocast", Tensor.float), ("bfloat16", Tensor.bfloat16),
               ("float32, all zeros", lambda x: 0 * x.float()),
               (f"float32, values up to {top:g}", lambda x: (top * x / x.abs().max()).float())]
    if name == "angular_map":       # attention_map makes float32 of what goes in
        changes.pop(3)
    found = [(where, changed(positional, change), named) for positional, named in cases(function)
             for where, change in changes]
    if script == "atang" and name != "attention_map":
        for margin, scale in ((2.0, 64.0), (1.35, 89.0), (1.35, 1000.0)):
            maps = changed(cases(function)[0][0][:-2], Tensor.float)
            found.insert(0, (f"float32, m = {margin:g}, s = {scale:g}", [*maps, margin, scale], {}))
    if name == "channel_margin":
        for beta, gamma in ((12.0, 1.0), (1e4, 1.0), (-1e4, 1.0), (-1.0, 0.0), (1.0, 0.0)):
            norm = norm_of(beta, gamma).float()
            found.append((f"float32, beta = {beta:g} at gamma = {gamma:g}", [norm], {}))
    if name == "kd_loss":
        x = torch.linspace(-5, 5, 72).view(2, 4, 3, 3)
        found.insert(0, (PIXELS, [x.sin(), x.flip(1), 2.0], {}))
    if name == "overhaul_loss":
        inputs = changed(cases(function)[0][0], Tensor.float)
        found.insert(0, (WEIGHTS, [*inputs, True, [2.0, 0.3, 0.25]], {}))
    if name.endswith("_loss") and isinstance(cases(function)[0][0][0], list):
        first, *others = changed(cases(function)[0][0], Tensor.float)
        found.insert(0, (UNEQUAL, [first[:-1], *others], {}))
    return found


# a line that shows most mistakes, to be pasted
EXAMPLES = {
    "kd.kd_loss": "torch.tensor([[0., 0.], [0., 2.]]), torch.tensor([[1., 0.], [3., 0.]]), 2.",
    "at.attention_map": "torch.arange(-3., 5).view(1, 2, 2, 2)",
    "at.at_loss": "2 * [torch.arange(8.).view(2, 1, 2, 2)], 2 * [torch.ones(2, 1, 2, 2)]",
    "atang.attention_map": "torch.arange(-3., 5).view(1, 2, 2, 2)",
    "atang.angular_map": "torch.tensor([[0.8, 0.6]]), 1.35, 2.",
    "atang.atang_loss": "2 * [torch.arange(8.).view(2, 1, 2, 2)], 2 * [torch.ones(2, 1, 2, 2)], "
                        "1.35, 2.",
    "atang.amd_loss": "[torch.arange(16.).view(1, 1, 4, 4)], [torch.ones(1, 1, 4, 4)], local=True",
    "fsp.fsp_matrix": "torch.arange(32.).view(1, 2, 4, 4), torch.arange(4.).view(1, 1, 2, 2)",
    "fsp.fsp_loss": "[(torch.ones(2, 1, 2, 2), torch.arange(16.).view(2, 2, 2, 2))], "
                    "[(torch.ones(2, 1, 2, 2), torch.ones(2, 2, 2, 2))]",
    "overhaul.channel_margin": "[n := torch.nn.BatchNorm2d(2), n.weight.data.copy_(torch.tensor("
                               "[-2., 1.])), n.bias.data.copy_(torch.tensor([1., 4.]))][0]",
    "overhaul.margin_relu": "torch.tensor([[[[-3., 2.]], [[-.7, .2]]]]), torch.tensor([-1., -.5])",
    "overhaul.partial_l2": "torch.tensor([-2., -.5, 1., 1., -1., 3.]).view(2, 1, 1, 3), "
                           "torch.tensor([-1., -1., -1., 2., 1., 3.]).view(2, 1, 1, 3)",
    "overhaul.overhaul_loss": "[torch.ones(2, 1, 1, 1), 3 * torch.ones(2, 1, 1, 1)], "
                              "2 * [torch.full((2, 1, 1, 1), -2.)], 2 * [torch.tensor([-1.])]",
    "skd.spherical": "torch.tensor([[1., 2., 3.], [0., 0., 4.]]), 2., center=True",
    "skd.skd_loss": "torch.tensor([[0., 1., 2.]]), torch.tensor([[4., 0., 1.]]), 2., 3."}


# --- results, and how they are compared ----------------------------------------------------------

def leaves(value: object, label: str = "") -> list[tuple[str, Tensor]]:
    """Every tensor in lists of lists, and what to call it."""
    if isinstance(value, Tensor):
        return [(label, value)]
    if isinstance(value, list | tuple):
        return [leaf for i, part in enumerate(value) for leaf in leaves(part, f"{label}[{i}]")]
    return []


def results(function: object, inputs: list[tuple[list, dict]], name: str) -> list[list[Tensor]]:
    """For every case the value, and its gradient for every tensor that goes in (empty: none)."""
    found = []
    for positional, named in inputs:
        tensors = [x.requires_grad_(not label.startswith(FREE.get(name, ())))
                   for label, x in leaves(positional)]
        value = function(*positional, **named)
        if not isinstance(value, Tensor):
            raise TypeError(f"returns {type(value).__name__}, not a tensor")
        if value.requires_grad:
            weights = torch.linspace(1, 2, value.numel(), dtype=value.dtype).view(value.shape)
            (value * weights).sum().backward()
        found.append([value.detach()] + [torch.empty(0) if x.grad is None else x.grad
                                         for x in tensors])
    return found


def in_short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"


def everything(function: object, name: str) -> dict:
    """What is looked at: the results, those of the extremes (or an error), the example's value."""
    found = {"cases": results(function, cases(name), name), "extremes": []}
    for where, positional, named in extremes(name):
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=where.endswith("autocast")):
                found["extremes"] += results(function, [(positional, named)], name)
        except Exception as error:
            found["extremes"].append(in_short(error))
    script, short = name.split(".")
    scope = {"torch": torch, script: SimpleNamespace(**{short: function})}
    try:
        value = eval(f"{name}({EXAMPLES[name]})", scope)
        found["example"] = " ".join(str(value.detach()).split())
    except Exception as error:
        found["example"] = in_short(error)
    return found


def near(a: Tensor, b: Tensor, rel: float, floor: float) -> bool:
    """Equal to `rel` of the largest entry; a gradient that is missing is not one of zeros."""
    if a.shape != b.shape:
        return False
    a, b = a.double(), b.double()
    return not a.numel() or bool((a - b).abs().max() <= rel * b.abs().max() + floor)


def alike(first: list[list[Tensor]], second: list[list[Tensor]]) -> bool:
    return all(near(a, b, 1e-5, 1e-15) for one, other in zip(first, second, strict=True)
               for a, b in zip(one, other, strict=True))


# --- submissions, in processes that know no solution ---------------------------------------------

def limit() -> None:
    """What a submission may take, where the system can limit it (processes: not root's)."""
    limits = [("RLIMIT_DATA", 4 << 30), ("RLIMIT_FSIZE", 64 << 20), ("RLIMIT_NPROC", 0)]
    for what, most in limits if resource else ():
        hard = resource.getrlimit(getattr(resource, what))[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(getattr(resource, what), (most, most))


def run_one(folder: Path, functions: list[str], target: Path) -> None:
    """In a process of its own, and silent: the results of the named functions, a file each."""
    if hasattr(os, "setsid"):       # so that what it starts can be ended with it
        os.setsid()
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silence, stream)
    os.chdir(target)
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    sys.path[:] = [str(folder)] + [path for path in sys.path
                                   if not (Path(path or ".") / "common.py").exists()]
    limit()
    (target / "ready").touch()
    for name in functions:
        try:
            module = importlib.import_module(name.split(".")[0])
            found = everything(getattr(module, name.split(".")[1]), name)
            torch.save(found, target / name)
        except NotImplementedError as error:
            blank, _, reason = str(error).partition(": ")
            (target / f"{name}.said").write_text(
                f"calls {blank}, {reason}" if reason.startswith("left out") else
                NOT_YET if blank in ("", name.split(".")[1]) else f"calls {blank}, {NOT_YET}")
        except SyntaxError as error:
            (target / f"{name}.said").write_text(f"{Path(error.filename).name}, line "
                                                 f"{error.lineno}: {error.msg}")
        except BaseException as error:      # exit() as well
            (target / f"{name}.said").write_text(in_short(error))


def end_of(process: multiprocessing.Process, ready: Path, seconds: float) -> str:
    """Wait for a submission's process, or end it; what to say of the function it was at."""
    begun = time.time()
    while process.is_alive() and time.time() - begun < seconds:
        if not ready.exists():      # torch is being imported: not the student's time
            begun = time.time()
        time.sleep(0.02)
    said = f"no answer within {seconds:g} seconds" if process.is_alive() else "ended without a word"
    process.kill()
    if hasattr(os, "killpg"):       # what it has started, too
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return said


def collect(folder: Path, functions: list[str], seconds: float) -> dict[str, object]:
    """What a submission's functions give: their results, or a line that says why there are none."""
    # forked from this process, where the system can: torch is imported, and no file read again
    kind = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context, found, left = multiprocessing.get_context(kind), {}, []
    for name in functions:
        script = folder / f"{name.split('.')[0]}.py"
        if script.exists():
            left.append(name)
        else:
            found[name] = f"{script.name} is missing"
    while left:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as where:
            target = Path(where)
            process = context.Process(target=run_one, args=(folder, left, target))
            process.start()
            end = end_of(process, target / "ready", seconds)
            for name in left:
                said, kept = target / f"{name}.said", target / name
                if said.exists():
                    found[name] = said.read_text(errors="replace")
                elif kept.exists():
                    try:
                        found[name] = torch.load(kept, weights_only=True)
                    except Exception:       # half written, or by the submission itself
                        found[name] = end
            # they run in their order: the first without a result is where it ended
            if missing := [name for name in left if name not in found]:
                found[missing[0]] = end
            left = missing[1:]
    return found


def collector() -> None:
    """Submissions come in by stdin, all read before the first runs; what they give goes out."""
    importlib.import_module("torchvision")      # which common.py needs
    submissions, seconds = pickle.load(sys.stdin.buffer)
    found, out = [], io.BytesIO()
    for files, functions in submissions:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as where:
            for name, text in files.items():
                (Path(where) / name).write_bytes(text)
            found.append(collect(Path(where).resolve(), functions, seconds))
    torch.save(found, out)
    sys.stdout.buffer.write(out.getvalue())


def collected(submissions: list[tuple[dict, list[str]]], seconds: float) -> list[dict]:
    """By a copy of this file that lies beside no solution."""
    with tempfile.TemporaryDirectory() as where:
        shutil.copy(__file__, where)
        done = subprocess.run([sys.executable, "-B", "assignment.py", "--collect"], cwd=where,
                              input=pickle.dumps((submissions, seconds)), stdout=subprocess.PIPE,
                              env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, check=True)
    return torch.load(io.BytesIO(done.stdout), weights_only=True)


# --- verdicts ------------------------------------------------------------------------------------

def reference(name: str) -> object:
    return getattr(importlib.import_module(name.split(".")[0]), name.split(".")[1])


@functools.cache
def known(name: str) -> tuple[dict, dict]:
    """What the right function gives, and every known mistake by (name, sentence)."""
    from mistakes import MISTAKES
    wrong = {(each.__name__, each.__doc__): results(each, cases(name), name)
             for each in MISTAKES[name]}
    return everything(reference(name), name), wrong


def differing(a: Tensor, b: Tensor) -> str:
    """The entry that differs most."""
    if a.shape != b.shape:
        return f"the shape {tuple(a.shape)}, not {tuple(b.shape)}"
    at = (a - b).abs().nan_to_num(torch.inf).argmax()
    return f"{a.flatten()[at]:.6g} where {b.flatten()[at]:.6g} is right"


def labels(name: str, positional: list) -> list[str]:
    """What to call the tensors that go in: student_stages[0]."""
    names = inspect.signature(reference(name)).parameters
    return [label for parameter, value in zip(names, positional)
            for label, _ in leaves(value, parameter)]


def gradients(name: str, given: list, right: list) -> str:
    """Which argument's gradient differs, of a case whose value is right."""
    for (positional, _), one, other in zip(cases(name), given, right):
        for label, a, b in zip(labels(name, positional), one[1:], other[1:]):
            if not near(a, b, 1e-5, 1e-15):
                return (f"{label} gets a gradient, and should have none" if not b.numel() else
                        f"no gradient reaches {label}" if not a.numel() else
                        f"the gradient of {label} differs")
    return "the gradient differs"


def unstable(name: str, given: list, right: list) -> str:
    """Where a function that is right in float64 fails, and with which value; or nothing."""
    found = {}
    for (where, positional, _), one, other in zip(extremes(name), given, right, strict=True):
        if isinstance(other, str):      # which is right: ValueError
            if not isinstance(one, str) or one.split(":")[0] != other.split(":")[0]:
                found[where] = f"{one if isinstance(one, str) else 'a value'}, not {other}"
            continue
        if isinstance(one, str):
            found[where] = one
        elif one[0].dtype != other[0].dtype:
            found[where] = f"gives {one[0].dtype}, not {other[0].dtype}".replace("torch.", "")
        elif not near(one[0], other[0], 1e-3, 1e-6):
            found[where] = f"gives {differing(one[0], other[0])}"
        for label, a, b in zip(labels(name, positional), one[1:], other[1:]):
            if isinstance(one, list) and b.isfinite().all() and not a.isfinite().all():
                found.setdefault(where, f"the gradient of {label} is {a[~a.isfinite()][0]:g}")
    told = [f"{where}: {says}" for where, says in found.items()]
    return "; ".join(told[:3] + [f"and in {len(told) - 3} more"] * (len(told) > 3))


def judge(name: str, given: object) -> tuple[str, str]:
    """A word for the table, a sentence for the student."""
    if isinstance(given, str):
        return "none" if re.search(f"{NOT_YET}$|, left out", given) else "broken", given
    right, mistakes = known(name)
    ours, theirs = given["cases"], right["cases"]
    if alike(ours, theirs):
        says = unstable(name, given["extremes"], right["extremes"])
        if says.startswith((PIXELS, WEIGHTS, UNEQUAL)):
            return "wrong", says
        return ("right, but not stable" if says else "right"), says
    shown = ""
    if given["example"] != right["example"]:
        shown = (f'; python -c "import torch, {name.split(".")[0]}; print({name}'
                 f'({EXAMPLES[name]}))" gives {given["example"]}, not {right["example"]}')
    for (word, says), of in mistakes.items():
        if alike(ours, of):
            return word, says + shown
    values = [case[:1] for case in ours]
    if alike(values, [case[:1] for case in theirs]):
        return "wrong", f"the value is right; {gradients(name, ours, theirs)}"
    for (word, says), of in mistakes.items():       # two at once, one of which shows in a gradient
        if alike(values, [case[:1] for case in of]):
            return word, f"{says}; besides, {gradients(name, ours, of)}{shown}"
    for one, other in zip(ours, theirs):
        if not alike([one[:1]], [other[:1]]):
            return "wrong", f"gives {differing(one[0], other[0])}{shown}"
    raise AssertionError("values differ, or they do not")


def with_causes(verdicts: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Beside a wrong result without a name, which of the functions that it uses are not right."""
    found = {}
    for name, (word, says) in verdicts.items():
        causes = [used for used in USES.get(name, [])
                  if verdicts.get(used, ("right", ""))[0] != "right"]
        if word == "wrong" and causes:
            says += f"; it uses {' and '.join(causes)}, not right either"
        found[name] = word, says
    return found


# --- commands ------------------------------------------------------------------------------------

def chosen(names: list[str] | None) -> list[str]:
    """Full names of functions given by full name, or by a name that only one script has."""
    found = []
    for name in names or ():
        fitting = [full for full in FUNCTIONS if name in (full, full.split(".")[1])]
        if len(fitting) != 1:
            raise Wrong(f"{name} is {' or '.join(fitting) or 'no function that can be graded'}; "
                        f"python tests/course/assignment.py list names all")
        found += fitting
    return list(dict.fromkeys(found))


TASK = "the docstring has the equation"


def blanked(text: str, function: str, says: str = TASK) -> str:
    """A script's text with the function's body replaced; its docstring stays."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            docstring, *body = node.body
            lines = text.splitlines(True)
            lines[body[0].lineno - 1:body[-1].end_lineno] = [
                f'    raise NotImplementedError("{function}: {says}")\n']
            return "".join(lines)
    return text


def stopped(text: str) -> str:
    """A script's text with a main() that trains no teacher for a loss that is not there."""
    begun = "    args = parse_args()\n"
    asked = (f'    if not args.baseline and "{TASK}" in SOURCE.split("def main")[0]:\n'
             '        raise UserError("a loss in this file is not written yet")\n')
    return text if asked in text else text.replace(begun, begun + asked, 1)


def without_readings(out: Path) -> None:
    """tests/test_losses.py of a copy: the values of the equations, not how NumPy reads them."""
    import test_losses
    path = out / "tests/test_losses.py"
    first, rest = path.read_text().split("# --- the equations, read once more", 1)
    readings, last = rest.split("# --- where they are compared", 1)
    names = " = None\n".join(re.findall(r"^def (numpy_\w+)", readings, re.M))
    table, test = last.split('@pytest.mark.parametrize("name, args, reading, rel"')
    path.write_text(
        f"{first}# --- the equations' values are in equations.pt: to read them is the task ---\n\n"
        f"{names} = None\n\n\n# --- where they are compared{table}"
        'VALUES = torch.load(__file__.replace("test_losses.py", "equations.pt"))\n'
        "EQUATIONS = [(name, args, lambda *_, value=value: value.numpy()[()], rel)\n"
        "             for (name, args, _, rel), value in zip(EQUATIONS, VALUES)]\n\n\n"
        f'@pytest.mark.parametrize("name, args, reading, rel"{test}')
    torch.save([torch.tensor(np.array(reading(*test_losses.arrays(args))))
                for _, args, reading, _ in test_losses.EQUATIONS], out / "tests/equations.pt")


def blank(out: Path, functions: list[str]) -> None:
    if out.exists() and any(out.iterdir()):
        raise Wrong(f"{out} is not empty: name a new folder")
    if out.resolve().is_relative_to(ROOT):
        raise Wrong(f"{out} lies in the repo itself: name a folder outside")
    theirs = {"common.py", "README.md", "requirements.txt", "tests", ".github", ".gitignore"}
    theirs |= {f"{name.split('.')[0]}.py" for name in FUNCTIONS}
    own = {path.name for path in ROOT.iterdir()} - theirs       # a teacher's, with solutions
    shutil.copytree(ROOT, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*KEPT, *own))
    for name in functions:
        script, function = name.split(".")
        # the KD loss stands in several scripts: a solution would lie beside the task
        for path in out.glob("*.py") if function == "kd_loss" else [out / f"{script}.py"]:
            text = path.read_text()
            text = blanked(text, function)
            for each in BESIDE.get(name, []):
                text = blanked(text, each, f"left out, since {function} could be read from it")
            if text != path.read_text():
                path.write_text(stopped(text))
    without_readings(out)
    held = out / "tests/test_shared_blocks.py"      # main() of a copy is two lines longer
    held.write_text(held.read_text().replace("<= BUDGET[name]", "<= BUDGET[name] + 2"))
    readme = out / "README.md"
    parts = readme.read_text().split("```")     # every second one is code
    for i in range(1, len(parts), 2):
        if any(f"def {name.split('.')[1]}(" in parts[i] for name in functions):
            parts[i] = "\n(yours to write)\n"
    readme.write_text("```".join(parts))
    (out / MANIFEST).write_text(json.dumps(functions) + "\n")
    print(f"{out}: a copy without {', '.join(functions)}")
    if len({"at.attention_map", "atang.attention_map"} & set(functions)) == 1:
        print("note: the attention_map of at.py and that of atang.py are nearly the same")


def submission(path: Path, asked: list[str]) -> tuple[dict[str, bytes], list[str]]:
    """Its files, and what is graded of it: what is asked for, or was blanked, or all it has."""
    if path.is_file():
        scripts = {name.split(".")[0] for name in FUNCTIONS} if path.suffix == ".py" else set()
        named = [word for word in re.split("[^a-z]+", path.stem.lower()) if word in scripts]
        if len(named) != 1:
            raise Wrong("which script is this? Name it as in ann_kd.py")
        files = {f"{named[0]}.py": path.read_bytes()}
        asked = [name for name in asked if name.startswith(f"{named[0]}.")]
    else:
        files = {file.name: file.read_bytes() for file in path.glob("*.py")}
    try:
        blanks = [name for name in FUNCTIONS if name in json.loads((path / MANIFEST).read_text())]
    except (OSError, ValueError, TypeError):
        blanks = []
    here = [name for name in FUNCTIONS if f"{name.split('.')[0]}.py" in files]
    return ({"common.py": (ROOT / "common.py").read_bytes(), **files},
            asked or blanks or here or FUNCTIONS)


def grade(paths: list[Path], asked: list[str], seconds: float, as_json: bool) -> int:
    """Print the table; the exit code: 0 all right, 1 something wrong, 2 something does not run."""
    submissions, verdicts = {}, {}
    for path in paths:
        try:
            submissions[path] = submission(path, asked)
        except Wrong as error:
            verdicts[str(path)] = {"": ("broken", str(error))}
    for name in FUNCTIONS:      # before the first submission runs
        known(name)
    found = collected(list(submissions.values()), seconds)
    for (path, (_, functions)), given in zip(submissions.items(), found):
        of = {}
        for name in functions:
            try:
                of[name] = judge(name, given[name])
            except Exception:       # results in no form of ours: the submission has written them
                of[name] = "broken", "gives results that cannot be read"
        verdicts[str(path)] = with_causes(of)
    if as_json:
        print(json.dumps({path: {name: {"verdict": word, "says": says}
                                 for name, (word, says) in of.items()}
                          for path, of in verdicts.items()}, indent=1))
    else:
        width = max(len(path) for path in verdicts)
        for path, of in verdicts.items():
            right = sum(word == "right" for word, _ in of.values())
            print(f"{path:{width}}  {right} of {len(of)} right")
            for name, (word, says) in of.items():
                print(f"    {name:25}{word}{': ' if says else ''}{says}")
    words = {word for of in verdicts.values() for word, _ in of.values()}
    return 2 if "broken" in words else int(words != {"right"})


def main() -> None:
    if sys.argv[1:] == ["--collect"]:       # see collected()
        return collector()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/course")]
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_blank = commands.add_parser("blank", help="a copy for students")
    of_blank.add_argument("out", type=Path)
    of_blank.add_argument("--loss", action="append", required=True, metavar="FUNCTION")
    of_grade = commands.add_parser("grade", help="grade submissions")
    of_grade.add_argument("paths", type=Path, nargs="+", metavar="SUBMISSION")
    of_grade.add_argument("--loss", action="append", metavar="FUNCTION", help="these alone")
    of_grade.add_argument("--seconds", type=float, default=60, help="for one submission's process")
    of_grade.add_argument("--json", action="store_true", help="for a script")
    commands.add_parser("list", help="functions and mistakes")
    args = parser.parse_args()
    try:
        if args.command == "blank":
            blank(args.out, chosen(args.loss))
        elif args.command == "grade":
            if missing := [str(path) for path in args.paths if not path.exists()]:
                raise Wrong(f"{', '.join(missing)}: not there")
            sys.exit(grade(args.paths, chosen(args.loss), args.seconds, args.json))
        else:
            from mistakes import MISTAKES
            for name in FUNCTIONS:
                print(name)
                for wrong in MISTAKES[name]:
                    print(f"    {wrong.__name__}: {wrong.__doc__}")
    except Wrong as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
