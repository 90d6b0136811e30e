"""An assignment from the repo: blank the losses for students, grade what comes back.

    python tests/assignment.py blank OUT --loss at_loss --loss partial_l2
                        a copy of the repo in OUT, in which the named functions keep their docstring
                        and equation and raise NotImplementedError; everything else works
    python tests/assignment.py grade DIR [DIR ...]
                        a table, submission x function: right, or the mistake by its name
    python tests/assignment.py list
                        the functions that can be blanked and graded, and the mistakes known of each

A submission is a folder with the scripts and common.py. It runs in processes of its own, with a
time limit; it is judged by numbers on fixed inputs, values and gradients, and not by its text.
"""
import argparse
import ast
import importlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
FUNCTIONS = ["kd.kd_loss", "at.attention_map", "at.at_loss", "atang.attention_map",
             "atang.angular_map", "atang.atang_loss", "atang.amd_loss", "fsp.fsp_matrix",
             "fsp.fsp_loss", "overhaul.channel_margin", "overhaul.margin_relu",
             "overhaul.partial_l2", "overhaul.overhaul_loss", "skd.entropy", "skd.free_energy",
             "skd.spherical", "skd.skd_loss"]
# a loss that is wrong may be so because of what it is made of
USES = {"at.at_loss": ["at.attention_map"], "fsp.fsp_loss": ["fsp.fsp_matrix"],
        "atang.atang_loss": ["atang.attention_map", "atang.angular_map"],
        "atang.amd_loss": ["atang.attention_map"], "skd.skd_loss": ["skd.spherical"],
        "overhaul.overhaul_loss": ["overhaul.margin_relu", "overhaul.partial_l2"]}
# what a teacher keeps, and what does not belong to a copy
KEPT = ("assignment.py", "mistakes.py", "test_assignment.py", "test_readme.py", "__pycache__",
        ".git", ".pytest_cache", ".ci", "runs", "data")


NOT_YET = "not written yet"


class Wrong(Exception):
    """What is said to the person at the keyboard, in one line."""


# --- inputs, results, and how they are compared -------------------------------------------------

def cases(function: str) -> list[tuple[list, dict]]:
    """Fixed inputs in float64, positional and named; the same in every process."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def maps(*shapes: tuple) -> list[Tensor]:
        return [normal(*shape) for shape in shapes]

    ours, theirs = [(4, 3, 8, 8), (4, 5, 4, 4)], [(4, 6, 8, 8), (4, 2, 4, 4)]
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
    features = maps(*ours), maps(*theirs)
    name = function.split(".")[1]
    if name == "kd_loss":
        return [([*logits, 4.0], {}), ([*logits, 1.0], {})]
    if name == "attention_map":
        return [([normal(3, 4, 5, 5)], {}), ([normal(2, 7, 3, 3)], {})]
    if name == "at_loss":
        return [([*features], {}), ([maps((4, 3, 8, 8)), maps((4, 6, 4, 4))], {})]
    if name == "angular_map":
        q = normal(3, 16).square()
        q = q / q.norm(dim=1, keepdim=True)
        return [([q, 1.35, 64.0], {}), ([q, 1.5, 5.0], {})]
    if name == "atang_loss":
        return [([*features, 1.35, 64.0], {}), ([*features, 1.6, 2.0], {})]
    if name == "amd_loss":
        return [([*features, 1.35, 64.0], {}), ([*features, 1.35, 2.0], {"local": True})]
    if name == "fsp_matrix":
        return [([normal(3, 4, 5, 5), normal(3, 6, 5, 5)], {}),
                ([normal(3, 4, 6, 6), normal(3, 6, 3, 3)], {})]
    if name == "fsp_loss":
        shapes = (4, 3, 6, 6), (4, 5, 6, 6), (4, 5, 3, 3), (4, 4, 3, 3)
        pairs = []
        for _ in range(2):
            first, second, third, fourth = maps(*shapes)
            pairs.append([(first, second), (third, fourth)])
        return [(pairs, {})]
    if name == "channel_margin":
        far = nn.BatchNorm2d(4).double()    # hardly ever negative; apart, as its margins are small
        with torch.no_grad():
            far.bias.copy_(torch.tensor([3.5, 4.0, 5.0, 6.0]) * far.weight)
        return [([norm], {}), ([far], {})]
    if name == "margin_relu":
        return [([normal(3, 4, 4, 4), -normal(4).abs()], {})]
    if name == "partial_l2":
        return [([connected[0], like[0]], {})]
    if name == "overhaul_loss":
        return [([connected, like, margins], {}), ([connected, like, margins], {"partial": False})]
    if name in ("entropy", "free_energy"):
        return [([logits[0], 4.0], {}), ([logits[0], 1.0], {})]
    if name == "spherical":
        return [([logits[0] + 1, 6.3], {"center": True}), ([logits[0] + 1, 2.0], {})]
    return [([*logits, 4.0, 6.3], {"center": True}), ([*logits, 4.0, "teacher"], {})]


def leaves(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in leaves(part)]
    return []


def results(function: object, of: str) -> list[list[Tensor]]:
    """For every case the value, and its gradient for every tensor that goes in (empty: none)."""
    found = []
    for positional, named in cases(of):
        inputs = leaves(positional)
        for x in inputs:
            x.requires_grad_()
        value = function(*positional, **named)
        if not isinstance(value, Tensor):
            raise TypeError(f"returns {type(value).__name__}, not a tensor")
        gradients = []
        if value.requires_grad:
            weights = torch.linspace(1, 2, value.numel(), dtype=value.dtype).view(value.shape)
            (value * weights).sum().backward()
        for x in inputs:
            gradients.append(torch.empty(0) if x.grad is None else x.grad.double())
        found.append([value.detach().double(), *gradients])
    return found


def alike(first: list[list[Tensor]], second: list[list[Tensor]]) -> bool:
    """Equal to 1e-5 of the largest entry; a gradient that is missing is not one of zeros."""
    for one, other in zip(first, second, strict=True):
        for a, b in zip(one, other, strict=True):
            if a.shape != b.shape:
                return False
            if a.numel() and not (a - b).abs().max() <= 1e-5 * b.abs().max() + 1e-15:
                return False
    return True


# --- one submission ------------------------------------------------------------------------------

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
                                   if Path(path or ".").resolve() not in (ROOT, ROOT / "tests")]
    for name in functions:
        (target / "now").write_text(name)
        try:
            module = importlib.import_module(name.split(".")[0])
            torch.save(results(getattr(module, name.split(".")[1]), name), target / name)
        except NotImplementedError as error:
            blank = str(error).split(":")[0]
            (target / f"{name}.said").write_text(
                NOT_YET if blank in ("", name.split(".")[1]) else f"calls {blank}, {NOT_YET}")
        except SyntaxError as error:
            (target / f"{name}.said").write_text(f"{Path(error.filename).name}, line "
                                                 f"{error.lineno}: {error.msg}")
        except BaseException as error:      # exit() as well
            text = " ".join(str(error).split())[:100]
            (target / f"{name}.said").write_text(f"{type(error).__name__}: {text}")
    (target / "now").write_text("")


def end_of(process: multiprocessing.Process, now: Path, seconds: float) -> str:
    """Wait for a submission's process, or end it; what to say of the function it was at."""
    begun = time.time()
    while process.is_alive() and not now.exists() and time.time() - begun < 300:
        time.sleep(0.02)        # torch is being imported: not the student's time
    process.join(seconds)
    if not process.is_alive():
        return "ended without a word"
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
    return f"no answer within {seconds:g} seconds"


def collect(folder: Path, functions: list[str], seconds: float) -> dict[str, object]:
    """What a submission's functions give: their results, or a line that says why there are none."""
    # processes made by one that has imported torch already, where the system can
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(kind)
    if kind == "forkserver":
        context.set_forkserver_preload(["torch", "torchvision"])
    found, left = {}, []
    for name in functions:
        script = folder / f"{name.split('.')[0]}.py"
        if script.exists():
            left.append(name)
        else:
            found[name] = f"{script.name} is missing"
    while left:
        with tempfile.TemporaryDirectory() as where:
            target = Path(where)
            process = context.Process(target=run_one, args=(folder.resolve(), left, target))
            process.start()
            end = end_of(process, target / "now", seconds)
            now = (target / "now").read_text() if (target / "now").exists() else left[0]
            for name in list(left):
                said, kept = target / f"{name}.said", target / name
                if said.exists():
                    found[name] = said.read_text()
                elif name == now:
                    found[name] = end
                elif kept.exists():
                    found[name] = torch.load(kept, weights_only=True)
                if name in found:
                    left.remove(name)
    return found


def judge(name: str, given: object) -> tuple[str, str]:
    """A word for the table, a sentence for the student."""
    from mistakes import MISTAKES
    if isinstance(given, str):
        return "none" if given.endswith(NOT_YET) else "broken", given
    right = results(getattr(importlib.import_module(name.split(".")[0]), name.split(".")[1]), name)
    if alike(given, right):
        return "right", ""
    for wrong in MISTAKES[name]:
        if alike(given, results(wrong, name)):
            return wrong.__name__, wrong.__doc__
    for wrong in MISTAKES[name]:        # two at once, one of which shows in the gradient alone
        values = [case[:1] for case in results(wrong, name)]
        if not alike(values, [case[:1] for case in right]) and alike(
                [case[:1] for case in given], values):
            return wrong.__name__, f"{wrong.__doc__}; and the gradient differs besides"
    for given_case, right_case in zip(given, right):
        if given_case[0].shape != right_case[0].shape:
            return "wrong", (f"the result has the shape {tuple(given_case[0].shape)}, "
                             f"not {tuple(right_case[0].shape)}")
        if not alike([given_case[:1]], [right_case[:1]]):
            at = (given_case[0] - right_case[0]).abs().argmax()
            return "wrong", (f"gives {given_case[0].flatten()[at]:.6g} where "
                             f"{right_case[0].flatten()[at]:.6g} is right")
    return "wrong", "the values are right, the gradients are not"


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
    if not names:
        return FUNCTIONS
    found = []
    for name in names:
        fitting = [full for full in FUNCTIONS if name in (full, full.split(".")[1])]
        if len(fitting) != 1:
            raise Wrong(f"{name} is {' or '.join(fitting) or 'no function that can be graded'}; "
                        f"python tests/assignment.py list names all")
        found += fitting
    return list(dict.fromkeys(found))


def blanked(text: str, function: str) -> str:
    """A script's text with the function's body replaced; its docstring stays."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            docstring, *body = node.body
            lines = text.splitlines(True)
            lines[body[0].lineno - 1:body[-1].end_lineno] = [
                f'    raise NotImplementedError("{function}: the docstring has the equation")\n']
            return "".join(lines)
    return text


def blank(out: Path, functions: list[str]) -> None:
    if out.exists() and any(out.iterdir()):
        raise Wrong(f"{out} is not empty: name a new folder")
    if out.resolve().is_relative_to(ROOT):
        raise Wrong(f"{out} lies in the repo itself: name a folder outside")
    shutil.copytree(ROOT, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*KEPT))
    for name in functions:
        script, function = name.split(".")
        # the KD loss stands in several scripts: a solution would lie beside the task
        for path in out.glob("*.py") if function == "kd_loss" else [out / f"{script}.py"]:
            path.write_text(blanked(path.read_text(), function))
    print(f"{out}: a copy without {', '.join(functions)}")
    if len({"at.attention_map", "atang.attention_map"} & set(functions)) == 1:
        print("note: the attention_map of at.py and that of atang.py are nearly the same")


def grade(folders: list[Path], functions: list[str], seconds: float, as_json: bool) -> int:
    """Print the table; the exit code: 0 all right, 1 something wrong, 2 something does not run."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    verdicts = {}
    for folder in folders:
        given = collect(folder, functions, seconds)
        verdicts[str(folder)] = with_causes({name: judge(name, given[name]) for name in functions})
    if as_json:
        print(json.dumps({folder: {name: {"verdict": word, "says": says}
                                   for name, (word, says) in of.items()}
                          for folder, of in verdicts.items()}, indent=1))
    else:
        width = max(len(folder) for folder in verdicts)
        for folder, of in verdicts.items():
            right = sum(word == "right" for word, _ in of.values())
            print(f"{folder:{width}}  {right} of {len(of)} right")
            for name, (word, says) in of.items():
                print(f"    {name:25}{word}{': ' if says else ''}{says}")
    words = {word for of in verdicts.values() for word, _ in of.values()}
    return 2 if "broken" in words else int(words != {"right"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_blank = commands.add_parser("blank", help="a copy for students")
    of_blank.add_argument("out", type=Path)
    of_blank.add_argument("--loss", action="append", required=True, metavar="FUNCTION")
    of_grade = commands.add_parser("grade", help="grade submissions")
    of_grade.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    of_grade.add_argument("--loss", action="append", metavar="FUNCTION", help="these alone")
    of_grade.add_argument("--seconds", type=float, default=60, help="for one submission's process")
    of_grade.add_argument("--json", action="store_true", help="for a script")
    commands.add_parser("list", help="functions and mistakes")
    args = parser.parse_args()
    try:
        if args.command == "blank":
            blank(args.out, chosen(args.loss))
        elif args.command == "grade":
            if missing := [str(folder) for folder in args.folders if not folder.is_dir()]:
                raise Wrong(f"{', '.join(missing)}: no such folder")
            sys.exit(grade(args.folders, chosen(args.loss), args.seconds, args.json))
        else:
            sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
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
