"""The kit for courses: every mistake is told by its number, and the tests of the losses see it."""
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import assignment
import pytest
import test_losses as one
import test_losses_fsp_overhaul_skd as two
from conftest import ROOT
from mistakes import MISTAKES

ALL = [(name, wrong) for name in assignment.FUNCTIONS for wrong in MISTAKES[name]]
NAMES = [f"{name}-{wrong.__name__}" for name, wrong in ALL]


def test_every_function_has_mistakes_and_is_right_itself():
    assert MISTAKES.keys() == set(assignment.FUNCTIONS) and len(ALL) > 60
    assert len({(name, wrong.__doc__) for name, wrong in ALL}) == len(ALL)
    for name in assignment.FUNCTIONS:
        script, function = name.split(".")
        right = assignment.results(getattr(importlib.import_module(script), function), name)
        assert assignment.judge(name, right) == ("right", "")


@pytest.mark.parametrize("name, wrong", ALL, ids=NAMES)
def test_a_mistake_is_called_by_its_name(name, wrong):
    assert assignment.judge(name, assignment.results(wrong, name)) == (wrong.__name__,
                                                                      wrong.__doc__)


def test_two_mistakes_at_once_are_called_by_the_one_that_shows_in_the_value():
    import mistakes

    def both(z, v, tau):        # no factor, and the teacher gets a gradient
        return mistakes.kl(mistakes.soft(z, tau), mistakes.soft(v, tau))

    word, says = assignment.judge("kd.kd_loss", assignment.results(both, "kd.kd_loss"))
    assert word == "no_tau_squared" and says.endswith("the gradient differs besides")


def test_a_wrong_result_names_what_it_is_made_of():
    found = assignment.with_causes({"fsp.fsp_matrix": ("transposed", "..."),
                                    "fsp.fsp_loss": ("wrong", "gives 2 where 1 is right"),
                                    "at.at_loss": ("wrong", "gives 3")})
    assert found["fsp.fsp_loss"][1].endswith("it uses fsp.fsp_matrix, not right either")
    assert found["at.at_loss"] == ("wrong", "gives 3")


def detached(name: str) -> list:
    if name in one.FEATURE_LOSSES:
        return [lambda: one.test_teacher_gets_no_gradient(name)]
    return [lambda: two.test_teacher_gets_no_gradient_and_the_batch_is_averaged(name)]


# The tests of the losses that look at a function.
TESTS = {
    "kd.kd_loss": [lambda: one.test_kd_is_the_equation(4.0),
                   one.test_kd_teacher_gets_no_gradient],
    "at.attention_map": [lambda: one.test_at_map_is_the_equation(2)],
    "at.at_loss": [one.test_at_is_the_equation, *detached("at")],
    "atang.attention_map": [lambda: one.test_atang_is_the_equation(1.35, 64.0)],
    "atang.angular_map": [lambda: one.test_atang_is_the_equation(1.35, 64.0)],
    "atang.atang_loss": [lambda: one.test_atang_is_the_equation(1.35, 64.0), *detached("atang"),
                         lambda: one.test_atang_is_the_equation(2.0, 5.0)],
    "atang.amd_loss": [lambda: one.test_amd_is_the_equation(True, (8, 4, 2))],
    "fsp.fsp_matrix": [two.test_fsp_is_the_equation, two.test_fsp_matrix_by_number,
                       two.test_fsp_pools_the_larger_map_by_its_maximum],
    "fsp.fsp_loss": [two.test_fsp_is_the_equation, *detached("fsp")],
    "overhaul.channel_margin": [two.test_channel_margin_by_quadrature,
                                two.test_channel_margin_against_monte_carlo],
    "overhaul.margin_relu": [two.test_overhaul_is_the_equation],
    "overhaul.partial_l2": [two.test_overhaul_is_the_equation],
    "overhaul.overhaul_loss": [two.test_overhaul_is_the_equation, *detached("overhaul")],
    "skd.entropy": [lambda: two.test_entropy_and_free_energy_are_the_equations(4.0)],
    "skd.free_energy": [lambda: two.test_entropy_and_free_energy_are_the_equations(4.0)],
    "skd.spherical": [lambda: two.test_skd_is_the_equation(6.3, True),
                      two.test_the_default_is_the_codes_layer_norm],
    "skd.skd_loss": [lambda: two.test_skd_is_the_equation(6.3, True), *detached("skd")],
}


@pytest.mark.parametrize("name, wrong", ALL, ids=NAMES)
def test_the_tests_of_the_losses_see_the_mistake(name, wrong, monkeypatch):
    """With the wrong function in its script; with the right one they pass."""
    script, function = name.split(".")
    module = importlib.import_module(script)
    for key, loss in one.FEATURE_LOSSES.items():
        if loss is getattr(module, function):
            monkeypatch.setitem(one.FEATURE_LOSSES, key, wrong)
    monkeypatch.setattr(module, function, wrong)
    seen = 0
    for test in TESTS[name]:
        try:
            test()
        except Exception:       # an assertion, or shapes that do not fit
            seen += 1
    assert seen


def test_those_tests_pass_as_the_functions_stand():
    for tests in TESTS.values():
        for test in tests:
            test()


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """What students get, with two functions blanked."""
    out = tmp_path_factory.mktemp("kit") / "students"
    assignment.blank(out, assignment.chosen(["at_loss", "overhaul.partial_l2"]))
    return out


def write(folder, script: str, function: str, body: str):
    """Put a body into a blanked function of a submission."""
    path = folder / f"{script}.py"
    line = f'    raise NotImplementedError("{function}: the docstring has the equation")\n'
    assert path.read_text().count(line) == 1
    path.write_text(path.read_text().replace(line, body))
    return folder


def test_a_blanked_copy_keeps_docstrings_and_all_else_works(copy):
    text = (copy / "at.py").read_text()
    assert "SUM over the pairs of the MEAN over batch and pixels" in text
    assert "adaptive_avg_pool2d" not in text and "NotImplementedError" in text
    for name in ("assignment", "mistakes", "test_assignment"):
        assert not list((copy / "tests").glob(f"{name}*")), "the answers lie beside the task"
    # the plain way: the tests of the loss, by name
    done = subprocess.run([sys.executable, "-B", "-m", "pytest", "-q", "-x", "-p",
                           "no:cacheprovider", "tests/test_losses.py", "-k", "test_at_is"],
                          cwd=copy, capture_output=True, text=True)
    assert done.returncode == 1 and "at_loss: the docstring has the equation" in done.stdout


def test_submissions_are_graded_apart(copy, tmp_path, capsys, monkeypatch):
    """Right in another style, a mistake, nothing, a crash, an endless loop, exit, a lie."""
    other_style = """    total = 0.0
    for a, b in zip(student_stages, teacher_stages):
        if a.shape[2] > b.shape[2]:
            a = torch.nn.AdaptiveAvgPool2d(b.shape[2])(a)
        elif b.shape[2] > a.shape[2]:
            b = torch.nn.AdaptiveAvgPool2d(a.shape[2])(b)
        with torch.no_grad():
            target = torch.einsum("nchw,nchw->nhw", b, b).flatten(1)
            target = target / target.norm(dim=1, keepdim=True)
        map = torch.einsum("nchw,nchw->nhw", a, a).flatten(1)
        map = map / map.norm(dim=1, keepdim=True)
        total += ((map - target) ** 2).mean()
    return total
"""
    bodies = {
        "ann": other_style, "bob": other_style.replace(".mean()", ".sum()"), "cleo": None,
        "dan": "    return student_stages[9]\n", "eve": "    while True:\n        pass\n",
        "finn": "    print('hello')\n    sys.exit(0)\n", "gil": "    return 3.0\n",
        "hana": "    import os\n    os._exit(0)\n"}
    for name, body in bodies.items():
        folder = tmp_path / name
        folder.mkdir()
        for path in copy.glob("*.py"):
            shutil.copy(path, folder)
        if body:
            write(folder, "at", "at_loss", body)
    (tmp_path / "ida").mkdir()
    shutil.copytree(tmp_path / "ann", tmp_path / "jon")
    (tmp_path / "jon/at.py").write_text("def at_loss(:\n")
    write(tmp_path / "eve", "overhaul", "partial_l2", """
    wrong = (student > teacher_target) | (teacher_target > 0)
    return (student - teacher_target)[wrong].pow(2).sum()
""")
    folders = [tmp_path / name for name in [*bodies, "ida", "jon"]]
    monkeypatch.setattr(sys, "argv", ["assignment.py", "grade", *map(str, folders), "--loss",
                                      "at_loss", "--loss", "partial_l2", "--seconds", "3",
                                      "--json"])
    with pytest.raises(SystemExit) as end:
        assignment.main()
    assert end.value.code == 2
    printed = capsys.readouterr().out
    found = {(Path(folder).name, loss): verdict for folder, of in json.loads(printed).items()
             for loss, verdict in of.items()}
    assert found["ann", "at.at_loss"] == {"verdict": "right", "says": ""}
    assert found["bob", "at.at_loss"]["verdict"] == "sum_over_pixels"
    assert found["cleo", "at.at_loss"]["says"] == "not written yet"
    assert found["dan", "at.at_loss"]["says"].startswith("IndexError")
    assert found["eve", "at.at_loss"]["says"] == "no answer within 3 seconds"
    assert found["finn", "at.at_loss"]["says"].startswith("SystemExit")
    assert found["gil", "at.at_loss"]["says"] == "TypeError: returns float, not a tensor"
    assert found["hana", "at.at_loss"]["says"] == "ended without a word"
    assert found["ida", "at.at_loss"]["says"] == "at.py is missing"
    assert found["jon", "at.at_loss"]["says"].startswith("at.py, line 1:")
    # the other function of the same submission is graded all the same
    assert found["eve", "overhaul.partial_l2"] == {"verdict": "right", "says": ""}


def test_bad_arguments(copy, tmp_path, capsys, monkeypatch):
    for words, says in ((["blank", copy, "--loss", "at_loss"], "is not empty"),
                        (["blank", tmp_path / "x", "--loss", "attention_map"], "or atang.attent"),
                        (["blank", tmp_path / "x", "--loss", "sum"], "no function that can be"),
                        (["blank", ROOT / "x", "--loss", "at_loss"], "in the repo itself"),
                        (["grade", tmp_path / "nobody"], "no such folder")):
        monkeypatch.setattr(sys, "argv", ["assignment.py", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            assignment.main()
        error = capsys.readouterr().err
        assert end.value.code == 2 and says in error and error.count("\n") == 1
    monkeypatch.setattr(sys, "argv", ["assignment.py", "list"])
    assignment.main()
    assert "no_tau_squared: the factor tau^2" in capsys.readouterr().out
