"""The kit for courses: every mistake is told by its number, and the tests of the losses see it."""
import importlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import assignment
import pytest
import test_losses
import torch
import torch.nn.functional as F
from conftest import ROOT, shell
from mistakes import MISTAKES, kl, soft

ALL = [(name, wrong) for name in assignment.FUNCTIONS for wrong in MISTAKES[name]]


def judged(name: str, function: object) -> tuple[str, str]:
    return assignment.judge(name, assignment.everything(function, name))


@pytest.mark.parametrize("name", assignment.FUNCTIONS)
def test_every_function_has_mistakes_and_is_right_itself(name):
    assert len({wrong.__doc__ for wrong in MISTAKES[name]}) == len(MISTAKES[name]) > 2
    assert judged(name, assignment.reference(name)) == ("right", "")
    assert f"{len(ALL)} known mistakes" in (ROOT / "tests/course/labs.md").read_text()


@pytest.mark.parametrize("name, wrong", ALL, ids=[wrong.__name__ for _, wrong in ALL])
def test_a_mistake_is_called_by_its_name_and_seen_by_the_losses_tests(name, wrong, monkeypatch):
    word, says = judged(name, wrong)
    assert word == wrong.__name__ and says.startswith(wrong.__doc__)
    monkeypatch.setattr(name, wrong)
    rows = [(test_losses.test_equation, row) for row in test_losses.EQUATIONS]
    rows += [(test_losses.test_by_number, row) for row in test_losses.BY_NUMBER]
    rows += [(test_losses.test_teacher_gets_no_gradient, [loss]) for loss in test_losses.LOSSES]
    with pytest.raises(Exception):      # an assertion, or shapes that do not fit
        for test, row in rows:
            if row[0].split("-")[0] == name:
                test(*row)


def test_what_is_said_of_a_wrong_result(capsys):
    """A line to paste, which prints what it says; the argument whose gradient differs; causes."""
    code, told = judged("kd.kd_loss", MISTAKES["kd.kd_loss"][0])[1][:-1].split('" gives tensor(')
    exec(code.split('python -c "')[1], {})
    assert capsys.readouterr().out == f"tensor({told.split('tensor(')[1]})\n"
    assert 4 * float(told.split(")")[0]) == pytest.approx(1.3722, abs=0.001)    # tau is 2
    word, says = judged("kd.kd_loss", lambda z, v, tau: kl(soft(z, tau), soft(v, tau)))
    assert word == "no_tau_squared" and "teacher_logits gets a gradient, and should have" in says
    word, says = judged("kd.kd_loss", lambda z, v, tau: tau ** 2 * kl(soft(z.detach(), tau), soft(
        v.detach(), tau)))
    assert (word, says) == ("wrong", "the value is right; no gradient reaches student_logits")
    word, says = judged("atang.attention_map", lambda feature: feature)
    assert word == "wrong" and "gives the shape (3, 4, 5, 5), not (3, 25)" in says
    found = assignment.with_causes({"fsp.fsp_matrix": ("transposed", "..."),
                                    "fsp.fsp_loss": ("wrong", "gives 2 where 1 is right")})
    assert found["fsp.fsp_loss"][1].endswith("it uses fsp.fsp_matrix, not right either")


def plain_kd(z, v, tau):
    p, q = F.softmax(z / tau, 1), F.softmax(v.detach() / tau, 1)
    return tau ** 2 * (q * (q.log() - p.log())).sum(1).mean()


def plain_margin(norm):
    mu, sigma = norm.bias.detach(), norm.weight.detach().abs()
    density = torch.exp(-(mu / sigma) ** 2 / 2) / (2 * torch.pi) ** 0.5
    return mu - sigma * density / torch.special.ndtr(-mu / sigma)


def near_margin(norm):
    mu, sigma = norm.bias.detach().double(), norm.weight.detach().double().abs().clamp(min=1e-300)
    log_density = -(mu / sigma) ** 2 / 2 - math.log(2 * math.pi) / 2
    return (mu - sigma * torch.exp(log_density - torch.special.log_ndtr(-mu / sigma))).to(norm.bias)


def reference(name):
    return getattr(importlib.import_module(name.split(".")[0]), name.split(".")[1])


def unweighted(student_maps, teacher_maps, margins, partial=True, weights=None):
    return reference("overhaul.overhaul_loss")(student_maps, teacher_maps, margins, partial)


def test_a_teacher_may_be_detached_anywhere():
    """What has no gradient in training may have one in a function, or not."""
    relu, l2 = map(reference, ("overhaul.margin_relu", "overhaul.partial_l2"))
    for name, function in (("overhaul.margin_relu", lambda x, m: relu(x.detach(), m.detach())),
                           ("overhaul.partial_l2", lambda s, t: l2(s, t.detach())),
                           ("overhaul.overhaul_loss", lambda s, t, m, *more, **named: reference(
                               "overhaul.overhaul_loss")(s, t, [x.detach() for x in m], *more,
                                                         **named))):
        assert judged(name, function) == ("right", "")


@pytest.mark.parametrize("name, function, says", [
    ("kd.kd_loss", lambda z, v, tau: tau ** 2 * kl(soft(z, tau), soft(v.detach(), tau)),
     "logits (N, K, H, W): gives "),
    ("overhaul.overhaul_loss", unweighted, "weights that are given: gives "),
    ("at.at_loss", lambda s, t, p=2: reference("at.at_loss")(s, t[:len(s)], p),
     "unequal lists: a value, not ValueError")])
def test_wrong_where_the_docstring_says_more(name, function, says):
    word, told = judged(name, function)
    assert word == "wrong" and told.startswith(says)


@pytest.mark.parametrize("name, function, says", [
    ("kd.kd_loss", plain_kd, "values up to 60000: gives nan"),
    ("atang.attention_map", lambda x: F.normalize(x.square().sum(1).flatten(1)),
     "bfloat16: gives bfloat16, not float32"),
    ("kd.kd_loss", lambda z, v, tau: plain_kd(z.float(), v.float(), tau),
     "float64: gives float32, not float64"),
    ("fsp.fsp_matrix", lambda a, b: torch.einsum("nihw,njhw->nij", F.adaptive_max_pool2d(
        a, b.shape[2:]), b) / b[0, 0].numel(), "in autocast: gives bfloat16, not float32"),
    ("atang.angular_map", lambda q, m, s: torch.log(1 / (1 + torch.exp(
        s * (1 - q) - s * torch.cos(m * torch.acos(q))))), "m = 2, s = 64: gives -inf"),
    ("atang.angular_map", lambda q, m, s: F.logsigmoid(
        s * torch.cos(m * torch.acos(q)) - s * (1 - q)), "values up to 1: the gradient of q is "),
    ("atang.attention_map", lambda x: (q := x.float().square().sum(1).flatten(1)) / q.norm(
        dim=1, keepdim=True), "float32, all zeros: gives nan where 0 is right"),
    ("overhaul.channel_margin", plain_margin, "beta = 12 at gamma = 1: gives -inf"),
    ("overhaul.channel_margin", near_margin, "beta = 10000 at gamma = 1: gives -0.000161")])
def test_right_but_not_stable(name, function, says):
    word, told = judged(name, function)
    assert word == "right, but not stable" and says in told


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    out = tmp_path_factory.mktemp("kit") / "students"
    assignment.blank(out, assignment.chosen(["kd_loss", "at_loss", "angular_map", "partial_l2"]))
    return out


def write(path: Path, function: str, body: str) -> None:
    """Put a body into a blanked function of a submission."""
    line = f'    raise NotImplementedError("{function}: the docstring has the equation")\n'
    path.write_text(path.read_text().replace(line, body))


AT = """    total = 0.0
    for a, b in zip(student_stages, teacher_stages, strict=True):
        size = min(a.shape[-2:], b.shape[-2:])
        a, b = (torch.nn.AdaptiveAvgPool2d(size)(to_float32(x)) for x in (a, b.detach()))
        a, b = (F.normalize((x.abs() ** p).sum(1, keepdim=True), dim=(2, 3)) for x in (a, b))
        total += (a - b).square().mean()
    return total
"""


def test_a_blanked_copy_stands_alone_and_holds_no_solution(copy, tmp_path):
    texts = {path.relative_to(copy).as_posix(): path.read_text("utf-8", "ignore")
             for path in copy.rglob("*") if path.suffix in (".py", ".md", ".json")}
    assert "SUM over the pairs of the MEAN over batch and pixels" in texts["at.py"]
    for solution in ("adaptive_avg_pool2d(x, size)", "logsigmoid(pos", "& (teacher_target <= 0)",
                     "numpy_unit(vector)", "kl_div(", "MISTAKES"):
        assert not [name for name, text in texts.items() if solution in text], solution
    # a student's own check of losses: one is right, one is wrong, one is not written
    shutil.copytree(copy, tmp_path, dirs_exist_ok=True)
    write(tmp_path / "at.py", "at_loss", AT)
    write(tmp_path / "overhaul.py", "partial_l2", "    return (student - teacher_target).norm()\n")
    done = subprocess.run([sys.executable, "-B", "-m", "pytest", "-q", "tests/test_losses.py", "-k",
                           "at.at_loss or partial_l2 or angular_map"], cwd=tmp_path,
                          capture_output=True, text=True).stdout
    failed = " ".join(line for line in done.splitlines() if line.startswith("FAILED"))
    assert "equation[overhaul.partial_l2" in failed and "equation[atang.angular_map" in failed
    assert " passed" in done and "at.at_loss" not in failed, done
    # no teacher is trained for a loss that is not there
    done = shell("atang", "--dataset", "shapes", home=copy, cwd=copy)
    assert done.refused() == "error: a loss in this file is not written yet\n"
    assert not (copy / "runs").exists()


def test_submissions_are_graded_apart(copy, tmp_path, capsys, monkeypatch):
    """Sabotage first; right in another style, wrong, crash, endless loop, exit, greed, a spy."""
    bodies = {
        "abe": f"    [path.write_text('x') for path in Path({str(tmp_path)!r}).glob('*/at.py')]\n",
        "ann": AT, "bob": AT.replace(".mean()", ".sum()"), "hana": "    os._exit(0)\n",
        "dan": "    return student_stages[9]\n", "eve": "    while True:\n        pass\n",
        "finn": "    sys.exit(0)\n", "cleo": "    raise NotImplementedError\n",
        "gil": "    return student_stages[0].new_ones(10 ** 10)\n",
        "hugo": '    exec((sys.modules["__main__"].ROOT / "at.py").read_text())\n'}
    for name, body in bodies.items():
        shutil.copytree(copy, tmp_path / name, ignore=shutil.ignore_patterns("tests", ".github"))
        write(tmp_path / name / "at.py", "at_loss", body)
    write(tmp_path / "eve/overhaul.py", "partial_l2", """
    wrong = (student > teacher_target) | (teacher_target > 0)
    return (to_float32(student) - to_float32(teacher_target))[wrong].pow(2).sum()
""")
    (tmp_path / "ida_at.py").write_text("def at_loss(:\n")
    shutil.copy(tmp_path / "ann/at.py", tmp_path / "jon_1234_at (2).py")
    (tmp_path / "notes.txt").write_text("at")
    monkeypatch.setattr(sys, "argv", ["assignment.py", "grade", "--json", "--seconds", "3", *(
        str(tmp_path / name) for name in [*bodies, "ida_at.py", "jon_1234_at (2).py",
                                          "notes.txt"])])
    with pytest.raises(SystemExit, match="2"):
        assignment.main()
    found = {Path(path).name: of for path, of in json.loads(capsys.readouterr().out).items()}
    assert found.pop("notes.txt")[""]["says"].startswith("which script is this? Name it as in")
    said = {name: of["at.at_loss"]["says"] for name, of in found.items()}
    # what was blanked is graded; of a file all that it has
    assert list(found["ann"]) == ["kd.kd_loss", "at.at_loss", "atang.angular_map",
                                  "overhaul.partial_l2"]
    assert list(found["jon_1234_at (2).py"]) == ["at.attention_map", "at.at_loss"]
    right = {"verdict": "right", "says": ""}
    assert found["ann"]["at.at_loss"] == found["jon_1234_at (2).py"]["at.at_loss"] == right
    assert found["eve"]["overhaul.partial_l2"] == right     # though at_loss never ends
    assert found["bob"]["at.at_loss"]["verdict"] == "sum_over_pixels"
    for name, says in {
            "abe": "TypeError: returns NoneType", "cleo": "not written yet", "dan": "IndexError",
            "eve": "no answer within 3 seconds", "finn": "SystemExit",
            "gil": "RuntimeError" if sys.platform == "linux" else "", "hugo": "FileNotFoundError",
            "hana": "ended without a word", "ida_at.py": "at.py, line 1:"}.items():
        assert said[name].startswith(says), name


def test_bad_arguments(copy, tmp_path, capsys, monkeypatch):
    for words, says in ((["blank", copy, "--loss", "at_loss"], "is not empty"),
                        (["blank", tmp_path / "x", "--loss", "attention_map"], "or atang.attent"),
                        (["blank", tmp_path / "x", "--loss", "sum"], "no function that can be"),
                        (["blank", ROOT / "x", "--loss", "at_loss"], "in the repo itself"),
                        (["grade", tmp_path / "nobody"], "not there")):
        monkeypatch.setattr(sys, "argv", ["assignment.py", *map(str, words)])
        with pytest.raises(SystemExit, match="2"):
            assignment.main()
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1
