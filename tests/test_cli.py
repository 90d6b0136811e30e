"""Every script through its command line: what a run prints, keeps and refuses."""
import gc
import importlib
import json
import os
import pickle
import platform
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import bench
import pytest
import torch
from conftest import ROOT, SCRIPTS, SMALL, equal_bits, result_of, shell, state

import common

METHODS = {"kd": ["--temperature", "3"], "at": ["--beta", "20"], "atang": ["--gamma", "50"],
           "fsp": ["--fsp-epochs", "1"], "overhaul": ["--alpha", "0.01"], "skd": ["--scale", "3"]}
# with these the student learns from the labels alone; FSP's first stage knows no labels
NO_METHOD = {"kd": ["--kd-weight", "0"], "at": ["--kd-weight", "0", "--beta", "0"],
             "atang": ["--kd-weight", "0", "--gamma", "0"], "overhaul": ["--alpha", "0"],
             "skd": ["--kd-weight", "0", "--scale", "none"]}
TERMS = {"kd": ["ce", "kd"], "at": ["ce", "kd", "at"], "atang": ["ce", "kd", "atang"],
         "fsp": ["ce"], "overhaul": ["ce", "overhaul"], "skd": ["ce", "skd"]}
TRAININGS = {"fsp": 3}      # of a teacher and a student; of the others 2


def network_of(weights: dict) -> dict:
    """The weights of the network alone, without those of its connectors."""
    return {key: value for key, value in weights.items() if not key.startswith("connectors.")}


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def out(cli, tmp_path, tmp_path_factory):
    """A folder of runs with a trained teacher in it."""
    kept = tmp_path_factory.getbasetemp() / "teacher"
    if not kept.exists():
        assert cli("kd", *SMALL, "--out", kept).code == 0
    shutil.copytree(kept / "shapes/baseline", tmp_path / "runs/shapes/baseline")
    return tmp_path / "runs"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_from_nothing(script, cli, tmp_path):
    out = tmp_path / "runs"
    done = cli(script, *SMALL, "--out", out, *METHODS[script])
    assert done.code == 0 and not done.err
    folder = out / f"shapes/{script}/wrn10_1-resnet8/seed0"
    header, *log = rows(folder)
    assert [row["epoch"] for row in log] == [1, 2]
    for row in log:
        assert all(row[term] > 0 for term in TERMS[script])
        assert list(row)[1:1 + len(TERMS[script])] == TERMS[script]
        assert 0 <= row["train"] <= 100 and 0 <= row["test"] <= 100 and row["images/s"] > 0
    assert [row["lr"] for row in log] == pytest.approx([0.05, 0.01])     # milestone 0.6
    assert header["command"][1:] == list(map(str, [*SMALL, "--out", out, *METHODS[script]]))
    assert header["versions"] == f"{torch.__version__} cpu"
    # what stands in the log is true of what is kept
    kept = state(folder)
    assert [header, *log] == kept["log"]
    student = common.create_model("resnet8", 10)
    student.load_state_dict(network_of(kept["model"]))
    _, test = common.load_data("shapes", "", 64, torch.device("cpu"), augment=False, seed=0)
    right = torch.cat([student.eval()(x).argmax(1) == y for x, y in test])
    assert 100 * right.float().mean().item() == pytest.approx(log[-1]["test"], abs=1e-4)
    # the teacher is printed before the student starts, the result comes last
    lines = done.out.splitlines()
    announced = next(n for n, line in enumerate(lines) if line.startswith("teacher wrn10_1: test"))
    accuracy = rows(out / "shapes/baseline/wrn10_1/seed0")[-1]["test"]
    assert f"{accuracy:.2f} %" in lines[announced]
    assert f"  {'fsp' if script == 'fsp' else TERMS[script][1]} " in lines[announced + 1]
    assert lines[-2] == (f"{script}/wrn10_1-resnet8: test accuracy {log[-1]['test']:.2f} %, "
                         f"files in {folder.parent}")
    assert lines[-1].startswith(f"teacher wrn10_1 {accuracy:.2f} %; ") and "--baseline" in lines[-1]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["common.py", f"{script}.py", "last.pt", "log.jsonl"])
    for name in ("common.py", f"{script}.py"):
        assert (folder / name).read_bytes() == (ROOT / name).read_bytes()


@pytest.mark.parametrize("script", NO_METHOD)
def test_weight_zero_is_the_baseline_to_the_bit(script, cli, out):
    """And so all methods start from the same weights and see the same batches."""
    assert cli(script, *SMALL, "--out", out, "--epochs", "2", *NO_METHOD[script]).code == 0
    same_as_the_baseline(script, cli, out)


def same_as_the_baseline(script, cli, out):
    assert cli(script, *SMALL, "--out", out, "--baseline").code == 0
    ours = result_of(out / f"shapes/{script}/wrn10_1-resnet8/seed0")
    plain = result_of(out / "shapes/baseline/resnet8/seed0")
    assert equal_bits(network_of(ours["model"]), plain["model"])
    momenta, expected = (run["optimizer"]["state"] for run in (ours, plain))
    assert equal_bits({key: momenta[key] for key in expected}, expected)    # connectors come last


def test_fsp_without_its_first_stage_is_the_baseline(cli, out, monkeypatch):
    """Stage 2 is ordinary training: only its first weights come from stage 1."""
    module = importlib.import_module("fsp")
    monkeypatch.setattr(module, "first_stage", lambda teacher, args, loaders, seed:
                        module.new_model(args.student, loaders[0], seed))
    assert cli("fsp", *SMALL, "--out", out).code == 0
    same_as_the_baseline("fsp", cli, out)


def test_fsp_stages(cli, out):
    """Stage 1 leaves the classifier as it was; stage 2 starts from its weights, momentum at 0."""
    flags = [*SMALL, "--out", out, "--fsp-epochs", "2"]
    assert cli("fsp", *flags).code == 0
    stage1 = result_of(out / "shapes/fsp/stage1/wrn10_1-resnet8/seed0")
    torch.manual_seed(0)
    fresh = common.create_model("resnet8", 10).state_dict()
    for key, value in stage1["model"].items():
        assert torch.equal(value, fresh[key]) == (key.startswith("classifier.")), key
    assert all("fsp" in row and "ce" not in row for row in stage1["log"])
    assert stage1["log"][1]["fsp"] < stage1["log"][0]["fsp"]
    assert [row["lr"] for row in stage1["log"]] == pytest.approx([1e-3, 2e-4])
    stage2 = rows(out / "shapes/fsp/wrn10_1-resnet8/seed0")[1:]
    assert [row["lr"] for row in stage2] == pytest.approx([0.05, 0.01])
    assert all(list(row)[1:3] == ["ce", "lr"] for row in stage2)


def test_fsp_connectors_are_dropped(cli, out):
    done = cli("fsp", *SMALL, "--student", "wrn10_2", "--fsp-epochs", "1", "--out", out)
    assert done.code == 0
    assert done.out.count("1x1 connectors") == 1
    assert "[32, 64, 128, 32, 64, 128] -> [16, 32, 64, 16, 32, 64]" in done.out
    first, second = (state(out / "shapes/fsp" / folder / "wrn10_1-wrn10_2/seed0")["model"]
                     for folder in ("stage1", "."))
    assert any(key.startswith("connectors.") for key in first)
    assert second.keys() == common.create_model("wrn10_2", 10).state_dict().keys()


def test_fsp_shares_one_first_stage_if_asked(cli, out):
    """Table 1's three students: one stage 1, other batches."""
    flags = [*SMALL, "--out", out, "--fsp-epochs", "1", "--shared-stage1", "--runs", "3"]
    assert cli("fsp", *flags).code == 0
    assert len(list((out / "shapes/fsp/stage1/wrn10_1-resnet8").iterdir())) == 1
    students = [state(out / f"shapes/fsp/wrn10_1-resnet8/seed{seed}") for seed in range(3)]
    assert not equal_bits(students[0]["model"], students[1]["model"])
    assert "shared_stage1 True, now False" in cli("fsp", *flags, "--no-shared-stage1").refused()


def test_fsp_weighs_equal_widths_with_1_and_connected_ones_with_less(cli, out):
    """lambda_i by default: 1 between networks as the paper's, 0.01 or 0.001 behind connectors."""
    for student, weight in (("resnet8", 1), ("wrn10_2", 0.01)):
        values = []
        for flags in ([], ["--fsp-weight", weight]):
            done = cli("fsp", *SMALL, "--out", out, "--student", student, "--dry-run", *flags)
            values.append(re.findall(r"fsp (\S+)", done.out)[-1])
        assert values[0] == values[1]
    args = Namespace(fsp_weight=None, dataset="cifar10")
    networks = [common.create_model(name, 10) for name in ("wrn10_1", "wrn10_2")]
    importlib.import_module("fsp").connect(*networks, args, torch.zeros(2, 3, 16, 16))
    assert args.fsp_weight == 0.001


@pytest.mark.parametrize("flags", ["--teacher-bn running", "--teacher-bn batch", "--layers last",
                                   "--distance l2", "--position end --distance l2"])
def test_the_choices_of_overhaul(flags, cli, out):
    before = (out / "shapes/baseline/wrn10_1/seed0/last.pt").read_bytes()
    done = cli("overhaul", *SMALL, "--epochs", "2", "--out", out, *flags.split())
    assert done.code == 0
    assert (out / "shapes/baseline/wrn10_1/seed0/last.pt").read_bytes() == before
    kept = state(out / "shapes/overhaul/wrn10_1-resnet8/seed0")
    connectors = {key.split(".")[1] for key in kept["model"] if key.startswith("connectors.")}
    assert len(connectors) == (1 if "last" in flags else 3)
    # as a teacher of another run, the student is its network alone
    assert cli("kd", *SMALL, "--teacher", "resnet8", "--out", out / "next", "--teacher-ckpt",
               out / "shapes/overhaul/wrn10_1-resnet8/seed0/last.pt", "--dry-run").code == 0


def test_overhaul_says_which_choice_differs(cli, out):
    assert cli("overhaul", *SMALL, "--out", out).code == 0
    for flags, says in (("--layers last", "layers all, now last"),
                        ("--distance l2 --position end", "position pre-relu, now end")):
        assert says in cli("overhaul", *SMALL, "--out", out, *flags.split()).refused()
    assert cli("overhaul", *SMALL, "--out", out, "--baseline", "--position", "end").code == 0


def test_overhaul_positions_and_statistics_decide_the_loss(cli, out):
    """Each choice is another loss, from the same weights on the same first batch."""
    values = set()
    for flags in ("", "--teacher-bn running", "--layers last", "--distance l2",
                  "--position end --distance l2"):
        done = cli("overhaul", *SMALL, "--out", out, "--dry-run", *flags.split())
        values.add(re.findall(r"overhaul (\S+)", done.out)[-1])
    assert len(values) == 5


@pytest.mark.parametrize("scale", ["none", "literal"])
def test_skd_without_its_sphere(scale, cli, out):
    """none: KD to the bit. literal: the labels act on the raw logits; weight 0 is the baseline."""
    flags = [*SMALL, "--out", out]
    if scale == "none":
        assert cli("kd", *flags, "--temperature", "3").code == 0
        assert cli("skd", *flags, "--temperature", "3", "--scale", scale).code == 0
        ours, theirs = (result_of(out / f"shapes/{name}/wrn10_1-resnet8/seed0")
                        for name in ("skd", "kd"))
        assert equal_bits(ours["model"], theirs["model"])
        assert ours["log"][0]["skd"] == theirs["log"][0]["kd"]
    else:
        assert cli("skd", *flags, "--kd-weight", "0", "--scale", scale).code == 0
        same_as_the_baseline("skd", cli, out)


def test_skd_at_the_teachers_deviation(cli, out):
    assert cli("skd", *SMALL, "--out", out, "--scale", "teacher").code == 0
    folder = out / "shapes/skd/wrn10_1-resnet8/seed0"
    assert rows(folder)[0]["settings"]["scale"] == "teacher" and rows(folder)[-1]["skd"] > 0
    assert "scale teacher, now 2.0" in cli("skd", *SMALL, "--out", out).refused()


def test_every_entry_of_a_recipe_is_a_flag(cli, tmp_path, monkeypatch):
    """Its default is the recipe's, and what is given instead is what the run is made with."""
    other = {int: 3, float: 0.5, str: None, bool: None, list: [0.25, 0.5], type(None): 7.0}
    for script in SCRIPTS:
        module = importlib.import_module(script)
        monkeypatch.setattr(module, "load_data", lambda *args, **options: None)
        monkeypatch.setattr(module, "check_pair", lambda *args: None)
        for name, recipe in module.RECIPES.items():
            given = {key: not value if isinstance(value, bool) else other[type(value)]
                     for key, value in recipe.items()}
            given |= {key: module.OWN[key]["choices"][0] for key, value in recipe.items()
                      if isinstance(value, str)}
            flags = []
            for key, value in given.items():
                flag = key.replace("_", "-")
                if isinstance(value, bool):
                    flags += [f"--{flag}" if value else f"--no-{flag}"]
                else:
                    flags += [f"--{flag}", *(value if isinstance(value, list) else [value])]
            for words, expected in (([], recipe), (flags, given)):
                monkeypatch.setattr(sys, "argv", list(map(str, [script, "--recipe", name, *words])))
                args, _ = module.prepare()
                assert {key: getattr(args, key) for key in recipe} == expected


def test_every_recipe_has_the_same_entries():
    """fit takes the names of the decisive settings from one of them."""
    general = set(common.RECIPE_FLAGS)
    for script in SCRIPTS:
        module = importlib.import_module(script)
        for recipe in module.RECIPES.values():
            assert set(recipe) == general | set(module.OWN)


def test_tables_of_finished_runs(cli, out, tmp_path):
    flags = [*SMALL, "--out", out, "--runs", "2"]
    assert cli("kd", *flags, "--baseline").code == 0
    assert cli("kd", *flags).code == 0 and cli("skd", *flags).code == 0
    assert cli("fsp", *flags, "--fsp-epochs", "1").code == 0
    assert cli("at", *SMALL, "--out", out, "--student", "wrn10_2", "--epochs", "2").code == 0
    unfinished = rows(out / "shapes/kd/wrn10_1-resnet8/seed1")
    log = out / "shapes/kd/wrn10_1-resnet8/seed1/log.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in unfinished[:-1]))
    table = cli("reproduce", "--table", out).out
    for cut in ("", '{"settings'):      # a killed write is passed over
        log.write_text(cut)
        assert cli("reproduce", "--table", out).out == table
    lines = [line.split() for line in table.splitlines()[1:]]
    assert [line[1:3] for line in lines] == [
        ["at", "wrn10_1-wrn10_2"], ["baseline", "resnet8"], ["baseline", "wrn10_1"],
        ["fsp", "wrn10_1-resnet8"], ["kd", "wrn10_1-resnet8"], ["skd", "wrn10_1-resnet8"]]
    base, ours = ([rows(out / "shapes" / name / f"seed{n}")[-1]["test"] for n in range(2)]
                  for name in ("baseline/resnet8", "skd/wrn10_1-resnet8"))
    deviation = torch.tensor(ours, dtype=torch.float64).std().item()
    assert lines[-1][3:] == [f"{sum(ours) / 2:.2f}", "±", f"{deviation:.2f}", "2",
                             f"{sum(ours) / 2 - sum(base) / 2:+.2f}"]
    alone = rows(out / "shapes/kd/wrn10_1-resnet8/seed0")[-1]["test"]
    assert lines[4][3:5] == [f"{alone:.2f}", "1"], "one seed is finished"
    assert lines[4][5] == f"{alone - base[0]:+.2f}", "seed by seed"
    assert len(lines[0]) == 5, "no baseline of that student"
    below = cli("reproduce", "--table", out.parent).out.splitlines()
    assert [line.split() for line in below[1:]] == [["runs", *line] for line in lines]
    for nothing in (tmp_path / "x", tmp_path / "nowhere"):
        assert "no finished run" in cli("reproduce", "--table", nothing).refused()


def test_measurements_of_finished_runs(cli, out, tmp_path):
    """Against the same in NumPy's terms: Table 7 of the overhaul, the gaps of SKD, an ensemble."""
    flags = [*SMALL, "--out", out, "--runs", "2"]
    assert cli("kd", *flags).code == 0 and cli("overhaul", *flags).code == 0
    reproduce = importlib.import_module("reproduce")
    folders = [out / f"shapes/kd/wrn10_1-resnet8/seed{n}" for n in range(2)]
    *lines, last = cli("reproduce", "--measure", *folders).out.splitlines()
    _, test = common.load_data("shapes", "", 64, "cpu", augment=False, seed=0)
    networks = [common.create_model(name, 10).eval() for name in ("resnet8", "resnet8", "wrn10_1")]
    for network, folder in zip(networks, [*folders, out / "shapes/baseline/wrn10_1/seed0"]):
        common.load_weights(network, folder / "last.pt")
    with torch.no_grad():
        *z, v = (torch.cat([network(x) for x, _ in test]).double() for network in networks)
    labels = torch.cat([y for _, y in test])
    tests = [rows(folder)[-1]["test"] for folder in folders]
    for line, logits, accuracy in zip(lines, z, tests):
        p, q = logits.softmax(1), v.softmax(1)
        kl = (q * (q.log() - p.log())).sum(1).mean().item()
        ce = -p.log().gather(1, labels[:, None]).mean().item()
        assert line.endswith(f"test accuracy {accuracy:.2f} %, cross-entropy {ce:.4f}, "
                             f"KL(teacher || student) {kl:.4f}")
    together = (z[0].softmax(1) + z[1].softmax(1)).argmax(1) == labels
    assert last == (f"average {sum(tests) / 2:.2f} %, "
                    f"ensemble {100 * together.double().mean().item():.2f} %")
    gaps = reproduce.gaps(z[0], v, 4.0)
    p, q = ((x / 4).softmax(1) for x in (z[0], v))
    assert gaps["G_entropy"] == pytest.approx(
        ((q * q.log()).sum(1) - (p * p.log()).sum(1)).mean().item())
    raw = 4 * ((v / 4).exp().sum(1).log() - (z[0] / 4).exp().sum(1).log()).mean().item()
    shift = (v.mean(1) - z[0].mean(1)).mean().item()
    assert gaps["G_f"] == pytest.approx(raw) and gaps["G_f centred"] == pytest.approx(raw - shift)
    cells = lines[3].split()        # the header, then tau 1 and tau 4 of the first run
    assert cells[:2] == ["kd/wrn10_1-resnet8/seed0", "1"]
    assert lines[4].split()[4] == f"{gaps['G_entropy']:.4f}"
    assert cli("skd", *SMALL, "--out", out, "--scale", "3").code == 0
    folder = out / "shapes/skd/wrn10_1-resnet8/seed0"
    network = common.create_model("resnet8", 10).eval()
    common.load_weights(network, folder / "last.pt")
    with torch.no_grad():
        own = torch.cat([network(x) for x, _ in test]).double()
    z_, v_ = (3 * (x - x.mean(1, keepdim=True)) / x.std(1, unbiased=False, keepdim=True)
              for x in (own, v))
    p, q = ((x / 4).softmax(1) for x in (z_, v_))
    wanted = ((q * q.log()).sum(1) - (p * p.log()).sum(1)).mean().item()
    line = next(line for line in cli("reproduce", "--measure", folder).out.splitlines()
                if "4, aligned" in line)
    assert float(line.split()[5]) == pytest.approx(wanted, abs=1e-4)
    assert float(line.split()[6]) == 0, "lengths are equal"
    for script in ("kd", "overhaul"):
        folder = out / f"shapes/{script}/wrn10_1-resnet8/seed0"
        assert "KL(" in cli("reproduce", "--measure", folder).out
    teacher = out / "shapes/baseline/wrn10_1/seed0/last.pt"
    flags = [*SMALL, "--out", out / "val", f"--teacher-ckpt={teacher}", "--split", "val"]
    assert cli("kd", *flags).code == 0
    folder = out / "val/shapes/kd/wrn10_1-resnet8/seed0"
    assert "KL(" in cli("reproduce", "--measure", folder).out
    assert "other images" in cli("reproduce", "--measure", folders[0], folder).refused()
    changed = torch.load(teacher, weights_only=True)
    torch.save(changed["model"], tmp_path / "last.pt")
    assert "no run of ours" in cli("reproduce", "--measure", tmp_path).refused()
    changed["model"]["classifier.bias"] += 1
    torch.save(changed, teacher)
    assert "is not the teacher" in cli("reproduce", "--measure", folders[0]).refused()


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_teacher_is_left_as_it_was(script, cli, out):
    path = out / "shapes/baseline/wrn10_1/seed0/last.pt"
    before = path.read_bytes()
    module = sys.modules.get(script) or __import__(script)
    teachers = []
    real = module.get_teacher

    def keep(*args):
        teachers.append(real(*args))
        return teachers[-1]

    module.get_teacher = keep
    try:
        assert cli(script, *SMALL, "--out", out).code == 0
    finally:
        module.get_teacher = real
    assert path.read_bytes() == before
    assert equal_bits(dict(teachers[0].state_dict()), state(path.parent)["model"])
    assert not teachers[0].training
    assert all(p.grad is None and not p.requires_grad for p in teachers[0].parameters())


def test_the_baseline_is_one_for_all_scripts(cli, out):
    first = cli("kd", *SMALL, "--out", out, "--baseline")
    for script in SCRIPTS[1:] + ["kd"]:
        again = cli(script, *SMALL, "--out", out, "--baseline")
        assert again.code == 0 and "epoch 1 " not in again.out
        assert again.out.splitlines()[-1] == first.out.splitlines()[-1]


def test_the_last_lines_have_gain_mean_and_deviation(cli, out):
    flags = [*SMALL, "--out", out, "--epochs", "2", "--runs", "3"]
    assert cli("kd", *flags, "--baseline").code == 0
    *_, result, last = cli("kd", *flags).out.splitlines()
    means = {}
    for name in ("baseline/resnet8", "kd/wrn10_1-resnet8"):
        tests = [rows(out / "shapes" / name / f"seed{n}")[-1]["test"] for n in range(3)]
        values = torch.tensor(tests, dtype=torch.float64)
        means[name] = values.mean().item()
    assert f"{values.mean():.2f} ± {values.std():.2f} %" in result
    gain = means["kd/wrn10_1-resnet8"] - means["baseline/resnet8"]
    assert last.split()[-1] == f"{gain:+.2f}"
    firsts = [state(out / f"shapes/kd/wrn10_1-resnet8/seed{n}")["model"] for n in range(2)]
    assert not equal_bits(*firsts), "another seed is another student"
    more = cli("kd", *flags, "--runs", "4").out.splitlines()
    assert "--baseline" in more[-1], "a baseline of three seeds is none of four"


def test_a_seed_alone_is_that_seed_among_others(cli, tmp_path):
    """Weights, order and crops follow a run's own seed; the teacher's is 0 whatever --seed says."""
    assert cli("kd", *SMALL, "--epochs", "1", "--runs", "2", "--out", tmp_path / "both").code == 0
    assert cli("kd", *SMALL, "--epochs", "1", "--seed", "1", "--out", tmp_path / "one").code == 0
    for folder in ("shapes/baseline/wrn10_1/seed0", "shapes/kd/wrn10_1-resnet8/seed1"):
        assert equal_bits(result_of(tmp_path / "both" / folder),
                          result_of(tmp_path / "one" / folder)), folder


def test_the_gain_wants_a_baseline_of_the_same_settings(cli, out):
    flags = [*SMALL, "--out", out]
    assert cli("kd", *flags, "--baseline", "--lr", "0.1").code == 0
    assert "--baseline" in cli("kd", *flags).out.splitlines()[-1]


def test_a_finished_run_prints_its_result_at_once(cli, out):
    first = cli("at", *SMALL, "--out", out)
    kept = (out / "shapes/at/wrn10_1-resnet8/seed0/last.pt").stat().st_mtime_ns
    again = cli("at", *SMALL, "--out", out)
    assert again.code == 0 and "epoch 1 " not in again.out
    assert again.out.splitlines()[-2:] == first.out.splitlines()[-2:]
    assert (out / "shapes/at/wrn10_1-resnet8/seed0/last.pt").stat().st_mtime_ns == kept


def test_other_code_is_noticed(cli, out, tmp_path, monkeypatch):
    """Who edits a loss and repeats the command must not take the old result for the new."""
    flags = [*SMALL, "--epochs", "1", "--out", tmp_path / "new"]
    assert cli("kd", *flags).code == 0 and "note" not in cli("kd", *flags).out
    for name in ("kd", "at", "common"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    assert "note" not in cli("kd", *flags).out
    with open(tmp_path / "kd.py", "a") as file:
        file.write("# an edit\n")
    done = cli("kd", *flags)
    assert done.out.count("note: ") == 2 and "kd/wrn10_1-resnet8/seed0 was begun by" in done.out
    assert "another kd.py" in done.out and "another common.py" not in done.out
    with open(tmp_path / "common.py", "a") as file:
        file.write("# an edit\n")
    assert cli("at", *flags).out.count("another common.py") == 1, "the teacher's"


def test_a_damaged_baseline_is_refused(cli, out):
    flags = [*SMALL, "--out", out]
    assert cli("kd", *flags, "--baseline").code == 0
    assert cli("kd", *flags).out.splitlines()[-1].split()[-1][0] in "+-"
    path = out / "shapes/baseline/resnet8/seed0/last.pt"
    whole = path.read_bytes()
    for damaged in (whole[:1000], b""):
        path.write_bytes(damaged)
        assert "last.pt" in cli("kd", *flags, "--baseline").refused()
    torch.save(common.create_model("resnet8", 10).state_dict(), path)
    assert "other settings" in cli("kd", *flags, "--baseline").refused()


def test_early_stopped_kd(cli, tmp_path):
    """The schedule is that of all epochs; the teacher stops in it, the student drops it."""
    out = tmp_path / "runs"
    flags = [*SMALL, "--epochs", "5", "--out", out]
    flags += ["--teacher-epochs", "2", "--distill-epochs", "3"]
    assert cli("kd", *flags).code == 0
    teacher = rows(out / "shapes/baseline/wrn10_1-2/seed0")[1:]     # beside the whole one's folder
    student = rows(out / "shapes/kd/wrn10_1-resnet8/seed0")[1:]
    assert len(teacher) == 2 and [row["lr"] for row in teacher] == [0.05, 0.05]
    assert [row["lr"] for row in student] == pytest.approx([0.05, 0.05, 0.05, 0.01, 0.002])
    assert ["kd" in row for row in student] == [True, True, True, False, False]
    full = tmp_path / "full"
    assert cli("kd", *SMALL, "--epochs", "5", "--out", full).code == 0
    assert equal_bits([row["ce"] for row in rows(full / "shapes/baseline/wrn10_1/seed0")[1:3]],
                      [row["ce"] for row in teacher])


def test_distillation_may_stop_in_any_script(cli, out):
    for script in SCRIPTS:
        done = cli(script, *SMALL, "--out", out, "--distill-epochs", "1")
        if script == "fsp":
            assert "--fsp-epochs" in done.refused()
            continue
        log = rows(out / f"shapes/{script}/wrn10_1-resnet8/seed0")[1:]
        assert done.code == 0 and TERMS[script][-1] in log[0]
        assert list(log[1])[1:3] == ["ce", "lr"]


def test_dry_run_keeps_nothing(cli, tmp_path):
    for script in SCRIPTS:
        done = cli(script, *SMALL, "--dry-run", "--out", tmp_path / "runs")
        assert done.code == 0 and done.out.count("epoch 1 ") == TRAININGS.get(script, 2)
        assert done.out.splitlines()[-1].startswith("epoch 1 "), "two steps have no result"
        assert not (tmp_path / "runs").exists()


def test_teacher_from_a_checkpoint(cli, out, tmp_path):
    path = out / "shapes/baseline/wrn10_1/seed0/last.pt"
    weights = tmp_path / "weights.pt"
    torch.save(torch.load(path, weights_only=True)["model"], weights)      # a bare state_dict
    for n, source in enumerate((path, weights)):
        done = cli("kd", *SMALL, "--out", tmp_path / f"other{n}", "--teacher-ckpt", source)
        assert done.code == 0 and not (tmp_path / f"other{n}/shapes/baseline").exists()
    results = [result_of(tmp_path / f"other{n}/shapes/kd/wrn10_1-resnet8/seed0") for n in (0, 1)]
    assert equal_bits(*results)


def test_augment_and_recipe(cli, out):
    assert cli("at", *SMALL, "--out", out, "--recipe", "cifar10-at", "--batch-size", "64",
               "--teacher-ckpt", out / "shapes/baseline/wrn10_1/seed0/last.pt").code == 0
    settings = rows(out / "shapes/at/wrn10_1-resnet8/seed0")[0]["settings"]
    assert settings["weight_decay"] == 5e-4 and settings["reflect"] and settings["augment"]
    assert settings["batch_size"] == 64 and settings["kd_weight"] == 0 and settings["epochs"] == 2
    assert cli("atang", *SMALL, "--no-augment", "--out", out, "--dry-run").code == 0


@pytest.mark.parametrize("loss", ["amd", "amd-local"])
def test_the_other_angular_losses(loss, cli, out):
    assert cli("atang", *SMALL, "--out", out, "--loss", loss, "--margin", "1.5").code == 0
    assert rows(out / f"shapes/{loss}/wrn10_1-resnet8/seed0")[-1][loss] > 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_bf16_is_a_setting_and_changes_little(script, cli, out):
    flags = [*SMALL, "--epochs", "1", "--teacher-ckpt",
             out / "shapes/baseline/wrn10_1/seed0/last.pt", *METHODS[script]]
    assert cli(script, *flags, "--out", out).code == 0
    assert "autocast False, now True" in cli(script, *flags, "--bf16", "--out", out).refused()
    assert cli(script, *flags, "--bf16", "--out", out / "bf16").code == 0
    assert "autocast True, now False" in cli(script, *flags, "--out", out / "bf16").refused()
    folder = f"shapes/{script}/wrn10_1-resnet8/seed0"
    exact, rough = rows(out / folder)[1], rows(out / "bf16" / folder)[1]
    for term in TERMS[script]:
        assert rough[term] != exact[term] and rough[term] == pytest.approx(exact[term], rel=0.05)


def test_pictures_in_folders(cli, tmp_path):
    shapes = common.draw_shapes(2000, seed=3)
    for n in range(60):
        split = "train" if n < 40 else "test"
        path = tmp_path / f"data/{split}/{common.SHAPES[n % 4]}/{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        common.datasets.folder.Image.fromarray(shapes.images[n].numpy()).save(path)
    flags = ["--dataset", "folder", "--data-dir", tmp_path / "data", "--epochs", "1",
             "--teacher", "wrn10_1", "--student", "resnet8", "--out", tmp_path / "runs"]
    assert cli("atang", *flags).code == 0
    assert state(tmp_path / "runs/folder/atang/wrn10_1-resnet8/seed0")[
        "model"]["classifier.weight"].shape[0] == 4
    before = (tmp_path / "runs/folder/atang/wrn10_1-resnet8/seed0/last.pt").read_bytes()
    extra = tmp_path / f"data/train/{common.SHAPES[0]}/more.png"
    shutil.copy(next(extra.parent.iterdir()), extra)
    assert "images [40, 20], now [41, 20]" in cli("atang", *flags).refused(), "other images"
    extra.unlink()
    assert cli("atang", *flags).code == 0
    for split in ("train", "test"):
        shutil.copytree(tmp_path / f"data/{split}/{common.SHAPES[0]}", tmp_path / f"data/{split}/z")
    assert "classes 4, now 5" in cli("atang", *flags).refused()
    for split in ("train", "test"):
        shutil.rmtree(tmp_path / f"data/{split}/z")
    assert (tmp_path / "runs/folder/atang/wrn10_1-resnet8/seed0/last.pt").read_bytes() == before
    (tmp_path / "data").rename(tmp_path / "moved")
    flags[3] = tmp_path / "moved"
    assert "data " in cli("atang", *flags).refused(), "another folder is other data"


def test_a_script_and_common_run_anywhere(tmp_path):
    """One of the six; of all, another test reads the imports."""
    for name in ("overhaul", "common"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    done = shell("overhaul", *SMALL, "--dry-run", home=tmp_path, cwd=Path("/"))
    assert done.code == 0 and done.out.count("epoch 1 ") == 2, done.err


def test_the_benchmark_trains():
    options = Namespace(steps=2, batch=8, workers=0, device="cpu", bf16=False)
    contest = bench.Contest("kd", False, options, keep=False)
    assert all(speed > 0 for speed in (contest.ours(), contest.reference(), contest.floor()))


def test_memory_does_not_grow(out, cli, monkeypatch):
    """After the first epoch, which makes the momenta, no epoch leaves a tensor behind."""
    module, sizes = importlib.import_module("skd"), []
    real = module.evaluate

    def count(model, loader, args):
        accuracy = real(model, loader, args)
        gc.collect()
        tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        sizes.append((len(tensors), sum(storages.values())))
        return accuracy

    monkeypatch.setattr(module, "evaluate", count)
    assert cli("skd", *SMALL, "--epochs", "6", "--out", out, "--teacher-ckpt",
               out / "shapes/baseline/wrn10_1/seed0/last.pt").code == 0
    assert len(sizes) == 7 and len(set(sizes[2:])) == 1, sizes


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept(out, cli):
    """A map of 64 MB is got again, most times, without most of its 16,384 pages."""
    resource = pytest.importorskip("resource")
    assert cli("kd", *SMALL, "--out", out, "--dry-run").code == 0
    faults = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2 ** 24)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert sorted(faults)[2] < 4096, faults


def test_a_split_lies_in_memory_once():
    """With its mirrored copies, and nothing of the 4000 pictures it was chosen from."""
    gc.collect()
    before = {id(x) for x in gc.get_objects() if type(x) is torch.Tensor}
    loaders = common.load_data("shapes", "", 64, torch.device("cpu"), augment=True, seed=0,
                               train_images=1000)
    gc.collect()
    kept = [x for x in gc.get_objects() if type(x) is torch.Tensor and id(x) not in before
            and x.dtype == torch.uint8]
    large = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    drawn = 3 * 16 * 16 * (4000 + 2 * 2000)     # which these tests keep for one another
    assert sum(large.values()) <= 2 * 1000 * 20 * 20 * 3 + 2000 * 16 * 16 * 3 + drawn
    assert loaders[0].images.shape == (2000, 20, 20, 3)


# --- refusals -----------------------------------------------------------------------------------

MISTYPED = [
    ("--dataset mnist", "shapes"), ("--datset shapes", "--datset"), ("--epoch 2", "--epoch"),
    ("--device tpu", "--device"), ("--device cuda", "--device"), ("--epochs 0", "--epochs"),
    ("--epochs 1.5", "--epochs"), ("--batch-size 1", "from 2 to"), ("--runs 0", "--runs"),
    ("--runs -3", "--runs"), ("--lr 0", "--lr"), ("--lr nan", "--lr"), ("--lr inf", "--lr"),
    ("--lr -0.1", "--lr"), ("--lr fast", "--lr"), ("--seed -1", "--seed"),
    ("--momentum 1.5", "--momentum"), ("--weight-decay -1", "--weight-decay"),
    ("--milestones 0.5 1.5", "--milestones"), ("--lr-decay nan", "--lr-decay"),
    ("--train-images 0", "--train-images"), ("--image-size 200000", "--image-size"),
    ("--split train", "--split"), ("--recipe mine", "--recipe"), ("--seed", "--seed"),
    ("--teacher-epochs 3", "--teacher-epochs"), ("--distill-epochs 3", "--distill-epochs"),
    ("--nesterov yes", "yes"), ("surplus", "surplus")]
REFUSED = [
    ("--teacher wrn17_3", "6n+4"), ("--student vit", "wrn16_1"), ("--student resnet9", "6n+2"),
    ("--train-images 5000", "4000"), ("--image-size 32", "16 pixels"),
    ("--teacher-ckpt nowhere.pt", "nowhere.pt"),
    ("--dataset folder --data-dir nowhere", "nowhere"),
    ("--dataset cinic10 --data-dir nowhere --recipe folder", "train/")]


@pytest.mark.parametrize("flags, says", MISTYPED, ids=[flags for flags, _ in MISTYPED])
@pytest.mark.parametrize("script", SCRIPTS)
def test_mistyped(script, flags, says, cli, tmp_path):
    """argparse's own: its usage, one line that names the flag, exit code 2."""
    assert says in cli(script, *SMALL, "--out", tmp_path / "runs", *flags.split()).mistyped()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags, says", REFUSED, ids=[flags for flags, _ in REFUSED])
@pytest.mark.parametrize("script", SCRIPTS)
def test_refused(script, flags, says, cli, tmp_path):
    assert says in cli(script, *SMALL, "--out", tmp_path / "runs", *flags.split()).refused()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script, flags", [
    ("kd", "--temperature 0"), ("kd", "--temperature nan"), ("kd", "--kd-weight 1.1"),
    ("kd", "--kd-weight -0.1"), ("kd", "--kd-weight nan"), ("at", "--beta -1"),
    ("at", "--beta inf"), ("at", "--beta nan"), ("atang", "--gamma -1"),
    ("atang", "--gamma nan"), ("atang", "--margin 2.1"), ("atang", "--margin nan"),
    ("atang", "--scale 0"), ("atang", "--scale inf"), ("atang", "--loss arcface"),
    ("atang", "--dataset cifar100"), ("kd", "--beta 1"), ("at", "--gamma 1"),
    ("fsp", "--fsp-epochs 0"), ("fsp", "--fsp-lr nan"), ("fsp", "--fsp-weight -1"),
    ("fsp", "--fsp-milestones 2"), ("overhaul", "--alpha inf"),
    ("overhaul", "--distance l1"), ("overhaul", "--layers first"),
    ("overhaul", "--teacher-bn eval"), ("skd", "--scale 0"), ("skd", "--scale unit"),
    ("skd", "--temperature 0"), ("skd", "--kd-weight 2")])
def test_mistyped_of_the_methods_own(script, flags, cli, tmp_path):
    assert flags.split()[0 if "cifar100" not in flags else 1] in cli(
        script, *SMALL, "--out", tmp_path / "runs", *flags.split()).mistyped()


def test_refused_of_the_overhaul(cli, tmp_path):
    line = cli("overhaul", *SMALL, "--out", tmp_path / "runs", "--position", "end").refused()
    assert "--distance l2" in line


def test_nesterov_without_momentum_is_plain_sgd(cli, tmp_path):
    """torch refuses that pair; the formula does not."""
    for n, flag in enumerate(("--nesterov", "--no-nesterov")):
        assert cli("kd", *SMALL, "--epochs", "1", "--baseline", "--momentum", "0", flag,
                   "--out", tmp_path / str(n)).code == 0
    assert equal_bits(*(state(tmp_path / f"{n}/shapes/baseline/resnet8/seed0")["model"]
                        for n in range(2)))


@pytest.mark.parametrize("script, teacher, student, group", [
    ("fsp", "vgg8", "resnet8", 4), ("overhaul", "resnet8", "vgg8", 1), ("at", "vgg8", "resnet8", 4),
    ("overhaul", "wrn10_1", "shufflenetv1", 1), ("atang", "vgg8", "mobilenetv2_half", 4)])
def test_networks_that_do_not_pair(script, teacher, student, group, cli, tmp_path):
    flags = [*SMALL, "--teacher", teacher, "--student", student]
    line = cli(script, *flags, "--out", tmp_path / "runs").refused()
    assert f"group {group} of {teacher} ends in" in line and f"of {student} in" in line
    assert re.search(r"\d+x\d+x\d+", line) and "wrn16_3 and wrn16_1" in line
    assert not (tmp_path / "runs").exists()
    assert cli(script, *flags, "--out", tmp_path / "runs", "--baseline", "--dry-run").code == 0
    assert cli("kd", *flags, "--out", tmp_path / "runs", "--dry-run").code == 0


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_refused_checkpoints(cli, out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = out / "shapes/baseline/wrn10_1/seed0/last.pt"
    bad = {
        "cut.pt": good.read_bytes()[:-500], "empty.pt": b"", "text.pt": b"hello",
        "hostile.pt": pickle.dumps(Hostile())}
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    torch.save({"model": Hostile()}, tmp_path / "hostile2.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(common.create_model("wrn10_1", 7).state_dict(), tmp_path / "classes.pt")
    torch.save(common.create_model("wrn16_1", 10).state_dict(), tmp_path / "network.pt")
    torch.save({"model": 3}, tmp_path / "number.pt")
    torch.save({"epoch": 3, "state_dict": {}}, tmp_path / "other.pt")
    for path in sorted(tmp_path.glob("*.pt")):
        line = cli("kd", *SMALL, "--out", tmp_path / "new", "--teacher-ckpt", path).refused()
        assert path.name in line and len(line) < 500
    # nor does torch's own warning about it stand beside the one line
    shell("kd", *SMALL, "--teacher-ckpt", tmp_path / "hostile.pt", cwd=tmp_path).refused()
    assert not (tmp_path / "executed").exists() and not (tmp_path / "new").exists()
    # the same for a run that is to be continued
    folder = out / "shapes/kd/wrn10_1-resnet8/seed0"
    assert cli("kd", *SMALL, "--out", out).code == 0
    (folder / "last.pt").write_bytes(bad["cut.pt"])
    assert "last.pt" in cli("kd", *SMALL, "--out", out).refused()


def test_refused_output_paths(cli, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for bad in (tmp_path / "file", tmp_path / "file/below", "/proc/nowhere"):
        done = cli("kd", *SMALL, "--out", bad)
        assert str(bad) in done.refused() and "epoch 1 " not in done.out


def test_a_full_disk_loses_nothing(cli, out, monkeypatch):
    flags = [*SMALL, "--out", out]
    assert cli("kd", *flags, "--epochs", "2").code == 0
    folder = out / "shapes/kd/wrn10_1-resnet8/seed0"
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(path, content):
        with open(path, "wb") as file:
            file.write(content[:100])
        raise OSError(28, "No space left on device")

    (folder / "last.pt").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert "No space left on device" in cli("kd", *flags).refused()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: content for name, content in kept.items() if name != "last.pt"}, "nothing half"
    assert cli("kd", *flags).code == 0
    assert equal_bits(state(folder)["model"], result_of(folder)["model"])


def test_refused_other_settings(cli, out):
    flags = [*SMALL, "--out", out]
    assert cli("atang", *flags).code == 0
    for other, says in (("--margin 1.5", "margin 1.35, now 1.5"), ("--lr 0.2", "lr 0.05, now 0.2"),
                        ("--epochs 3", "epochs 2, now 3"), ("--split val", "split test, now val"),
                        ("--train-images 200", "train_images 192, now 200")):
        assert says in cli("atang", *flags, *other.split()).refused()
    teacher = out / "shapes/baseline/wrn10_1/seed0/last.pt"
    assert "epochs 2, now 3" in cli(
        "atang", *flags, "--epochs", "3", "--teacher-ckpt", teacher).refused()
    changed = torch.load(teacher, weights_only=True)
    changed["model"]["classifier.bias"] += 1
    torch.save(changed, teacher)
    assert "teacher_hash" in cli("atang", *flags).refused(), "another teacher is another run"


def test_a_network_that_changed_is_refused(cli, out, monkeypatch):
    """Whoever edits a layer in common.py and repeats the command is told which weight differs."""
    assert cli("kd", *SMALL, "--out", out).code == 0
    folder = out / "shapes/kd/wrn10_1-resnet8/seed0"
    kept = torch.load(folder / "last.pt", weights_only=True)
    kept["model"]["classifier.weight"] = torch.ones(10, 32)
    torch.save(kept, folder / "last.pt")
    assert "its classifier.weight is (10, 32), not (10, 64)" in cli("kd", *SMALL, "--out",
                                                                    out).refused()
    (folder / "last.pt").unlink()
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *_: [][0])
    with pytest.raises(IndexError):     # what is no user's to mend keeps its traceback
        cli("kd", *SMALL, "--out", out)


def test_too_little_memory_is_said_in_one_line(cli, out, monkeypatch):
    def full(*args):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
    monkeypatch.setattr(common.ImageLoader, "normalise", full)
    assert "smaller --batch-size" in cli("kd", *SMALL, "--out", out).refused()


def test_a_damaged_log_of_the_baseline_costs_only_the_gain(cli, out):
    flags = [*SMALL, "--out", out]
    assert cli("kd", *flags, "--baseline").code == 0
    log = out / "shapes/baseline/resnet8/seed0/log.jsonl"
    whole = log.read_text()
    for text in ("", "{", "3\n", "3\n4\n", '{"a": 1}\n', '{"a": 1}\n{"b": 2}\n',
                 whole[:len(whole) // 2]):
        log.write_text(text)
        assert "--baseline" in cli("kd", *flags).out.splitlines()[-1]
        assert cli("reproduce", "--table", out).code == 0


def test_a_loss_that_is_not_finite_stops_at_once(cli, out, monkeypatch):
    """Too large a rate, and pixels that are none, in every script: the terms are named."""
    done = cli("kd", *SMALL, "--out", out, "--lr", "1000", "--baseline", "--epochs", "9")
    assert re.search(r"epoch \d, step \d: the loss is not finite \(ce", done.refused())
    real = common.ImageLoader.normalise
    monkeypatch.setattr(common.ImageLoader, "normalise", lambda self, x: real(self, x) * torch.inf)
    for script in SCRIPTS:
        line = cli(script, *SMALL, "--out", out).refused()
        assert "epoch 1, step 1: the loss is not finite" in line
        terms = TERMS[script] if script != "fsp" else ["fsp"]
        assert all(f"{term} nan" in line for term in terms) and "--help" in line
        assert not list((out / "shapes" / script).rglob("last.pt"))


def test_a_loss_that_breaks_later_is_found_within_the_epoch(cli, out, monkeypatch):
    """The host looks at the first step, every 50th after it, and the last of the epoch."""
    module, real, calls = importlib.import_module("kd"), importlib.import_module("kd").kd_loss, []

    def breaks(*args):
        calls.append(args)
        return real(*args) * (torch.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(module, "kd_loss", breaks)
    line = cli("kd", *SMALL, "--train-images", "1700", "--out", out, "--teacher-ckpt",
               out / "shapes/baseline/wrn10_1/seed0/last.pt").refused()
    assert "epoch 1, step 51: the loss is not finite" in line and len(calls) == 51


def test_help_names_every_flag(cli):
    done = cli("atang", "--help")
    assert done.code == 0
    for flag in ("--teacher", "--runs", "--teacher-ckpt", "--distill-epochs", "--margin", "--loss",
                 "--no-augment", "--dry-run", "--device", "--out", "(default: 1.35)"):
        assert flag in done.out
    assert "(default: 16.0)" in cli("atang", "--dataset", "cinic10", "-h").out, "of that recipe"
