"""The last lines of a command: mean, std, and the gain over the baseline."""
import shlex
from pathlib import Path
from statistics import mean, stdev

import torch
from conftest import SMALL, state
from test_runs import BASELINE, TEACHER, log_of, out, student  # noqa: F401


def accuracies(run: Path, count: int = 1) -> list[float]:
    """The last epoch's, of the runs of so many seeds; `run` is that of the first."""
    return [log_of(run.with_name(f"seed{seed}"))[-1]["test"] for seed in range(count)]


def last(done) -> str:
    """The gain, or the command that would give it."""
    assert done.code == 0, done.all
    return done.out.splitlines()[-1].split("gain over baseline: ")[1]


def test_mean_std_and_gain_over_the_seeds(cli, out):
    flags = [*SMALL, "--out", out, "--runs", "3"]
    assert cli("kd", *flags, "--baseline").code == 0
    done = cli("kd", *flags)
    own, plain = accuracies(out / student("kd"), 3), accuracies(out / BASELINE, 3)
    assert f" {mean(own):.2f} ± {stdev(own):.2f} %, " in done.out.splitlines()[-2]
    assert last(done) == f"{mean(own) - mean(plain):+.2f}"
    assert "run: " in last(cli("kd", *flags, "--runs", "4")), "three baselines are none of four"


def test_the_line_names_the_command_that_gives_the_gain(cli, out):
    """Each script has a folder and settings of its own, and the teacher in another."""
    for script in ("kd", "fsp", "overhaul"):
        place = out / f"of {script}"
        flags = [*SMALL, "--out", place, "--teacher-ckpt", out / TEACHER / "last.pt"]
        program, *command = shlex.split(last(cli(script, *flags)).removeprefix("run: "))
        assert [program, command[0]] == ["python", f"{script}.py"]
        assert cli(script, *command[1:]).code == 0
        (own,), (plain,) = accuracies(place / student(script)), accuracies(place / BASELINE)
        assert last(cli(script, *flags)) == f"{own - plain:+.2f}"


def test_a_gain_is_found_beside_the_teacher(cli, out, tmp_path):
    flags = [*SMALL, "--out", tmp_path / "other", "--teacher-ckpt", out / TEACHER / "last.pt"]
    assert "run: " in last(cli("kd", *flags))
    assert cli("kd", *SMALL, "--out", out, "--baseline").code == 0
    (own,), (plain,) = accuracies(tmp_path / "other" / student("kd")), accuracies(out / BASELINE)
    assert last(cli("kd", *flags)) == f"{own - plain:+.2f}"


def test_a_gain_is_over_a_finished_baseline_of_this_seed_and_these_settings(cli, out):
    flags, path = [*SMALL, "--out", out], out / BASELINE / "last.pt"
    for other in (["--seed", "1"], ["--lr", "0.1"], ["--bf16"], ["--train-images", "200"]):
        assert cli("kd", *flags, "--baseline", *other).code == 0
        assert "run: " in last(cli("kd", *flags)), other
        path.unlink(missing_ok=True)
    assert cli("kd", *flags, "--baseline").code == 0
    assert last(cli("kd", *flags))[0] in "+-"
    kept = state(path.parent)
    torch.save(kept | {"log": kept["log"][:-1]}, path)
    assert "run: " in last(cli("kd", *flags)), "unfinished"
