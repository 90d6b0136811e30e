"""Every script through its command line: what a run does, prints and keeps."""
import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SCRIPTS, SMALL, equal_bits, result_of, state

import common

TERMS = {"kd": ["ce", "kd"], "at": ["ce", "kd", "at"], "atang": ["ce", "kd", "atang"],
         "fsp": ["ce"], "overhaul": ["ce", "overhaul"], "skd": ["ce", "skd"]}
# with these the student learns from the labels alone
NO_METHOD = {"kd": "--kd-weight 0", "at": "--kd-weight 0 --beta 0", "overhaul": "--alpha 0",
             "atang": "--kd-weight 0 --gamma 0", "fsp": "--fsp-epochs 0",
             "skd": "--kd-weight 0 --scale literal"}
PLACE = "shapes/shapes"
TEACHER = f"{PLACE}/baseline/wrn10_1/seed0"
BASELINE = f"{PLACE}/baseline/resnet8/seed0"


def student(script: str, seed: int = 0) -> str:
    return f"{PLACE}/{script}/wrn10_1-resnet8/seed{seed}"


def log_of(folder: Path) -> list[dict]:
    return state(folder)["log"]


@pytest.fixture
def out(cli, tmp_path, tmp_path_factory):
    """A folder of runs with a trained teacher in it."""
    kept = tmp_path_factory.getbasetemp() / "teacher"
    if not kept.exists():
        assert cli("kd", *SMALL, "--student", "wrn10_1", "--baseline", "--out", kept).code == 0
    shutil.copytree(kept, tmp_path / "runs")
    return tmp_path / "runs"


# --- A whole run --------------------------------------------------------------------------------

@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_from_nothing(script, cli, tmp_path, monkeypatch):
    out, flags = tmp_path / "runs", [*SMALL, "--out", tmp_path / "runs"]
    module, teachers = importlib.import_module(script), []
    real = module.get_teacher
    monkeypatch.setattr(module, "get_teacher", lambda *x: teachers.append(real(*x)) or teachers[0])
    done = cli(script, *flags)
    assert done.code == 0 and not done.err
    folder, terms, kept = out / student(script), TERMS[script], state(out / student(script))
    header, *log = kept["log"]
    assert (folder / "log.jsonl").read_text() == "".join(json.dumps(x) + "\n" for x in kept["log"])
    assert sorted(path.name for path in folder.iterdir()) == ["last.pt", "log.jsonl"]
    assert header["command"] == [f"{script}.py", *map(str, flags)]
    assert len(header["versions"]) == 1 and torch.__version__ in header["versions"][0]
    names = ["epoch", *terms, "train", "lr", "test", "images/s", "seconds"]
    assert [list(row) for row in log] == [names, names] and [row["epoch"] for row in log] == [1, 2]
    assert [row["lr"] for row in log] == pytest.approx([0.05, 0.01])     # milestone 0.6
    assert all(row[name] > 0 for row in log for name in (*terms, "images/s", "seconds"))
    # what stands in the log is true of the kept network, which the file alone tells how to use
    network = common.create_model(kept["network"], len(kept["class_names"])).eval()
    network.load_state_dict(kept["model"])
    assert kept["network"] == "resnet8" and kept["class_names"] == common.SHAPES
    assert kept["script"] == (ROOT / f"{script}.py").read_text() and kept["image_size"] == 16
    images, labels, _ = common.draw_shapes(2000, seed=3)
    mean, std = torch.tensor(kept["mean"]), torch.tensor(kept["std"])
    seen = network(((images / 255 - mean) / std).permute(0, 3, 1, 2)).argmax(1)
    assert 100 * (seen == labels).float().mean().item() == pytest.approx(log[-1]["test"], abs=0.6)
    # the teacher, frozen and as it was trained, is printed before the student, the result last
    teacher, lines = log_of(out / TEACHER)[-1]["test"], done.out.splitlines()
    assert equal_bits(dict(teachers[0].state_dict()), state(out / TEACHER)["model"])
    assert not any(x.requires_grad for x in teachers[0].parameters()) and not teachers[0].training
    said = f"teacher wrn10_1: test accuracy {teacher:.2f} %, 2 of 2 epochs on 192 images"
    assert "min left" in lines[1] and lines[2] == said and lines[3].startswith("epoch 1 ")
    assert lines[-2] == (f"{script}/wrn10_1-resnet8: test accuracy {log[-1]['test']:.2f} %, "
                         f"files in {folder.parent}")
    assert lines[-1].startswith(f"teacher wrn10_1 {teacher:.2f} %, gain over baseline: run: ")
    # once more: it says so, and nothing is trained or written
    before = [(path, path.stat().st_mtime_ns) for path in sorted(out.rglob("*"))]
    again = cli(script, *flags)
    assert again.code == 0 and "epoch 1 " not in again.out
    assert f"{folder} is finished: no epoch is left to train" in again.out
    assert again.out.splitlines()[-2:] == lines[-2:]
    assert before == [(path, path.stat().st_mtime_ns) for path in sorted(out.rglob("*"))]


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_its_weight_a_method_is_the_baseline_to_the_bit(script, cli, out):
    """And so all methods start from the same weights and see the same batches."""
    assert cli(script, *SMALL, "--out", out, *NO_METHOD[script].split()).code == 0
    assert cli(script, *SMALL, "--out", out, "--baseline").code == 0
    own, plain = state(out / student(script)), state(out / BASELINE)
    assert equal_bits(own["model"], plain["model"])
    momenta, expected = (run["optimizer"]["state"] for run in (own, plain))
    assert equal_bits({key: momenta[key] for key in expected}, expected)    # connectors come last


def test_a_seed_alone_is_that_seed_among_others(cli, tmp_path):
    """Weights, order and crops follow a run's own seed; the teacher's is 0 whatever --seed says."""
    both, one, flags = tmp_path / "both", tmp_path / "one", [*SMALL, "--epochs", "1"]
    assert cli("kd", *flags, "--runs", "2", "--out", both).code == 0
    assert cli("kd", *flags, "--seed", "1", "--out", one).code == 0
    for run in (TEACHER, student("kd", 1)):
        assert equal_bits(result_of(both / run), result_of(one / run))
    assert not equal_bits(*(state(both / student("kd", seed))["model"] for seed in range(2)))


def test_distillation_may_stop(cli, out):
    assert "--fsp-epochs" in cli("fsp", *SMALL, "--out", out, "--distill-epochs", "1").refused()
    for script in set(SCRIPTS) - {"fsp"}:
        assert cli(script, *SMALL, "--out", out, "--distill-epochs", "1").code == 0
        first, second = log_of(out / student(script))[1:]
        assert TERMS[script][-1] in first and list(second)[1:3] == ["ce", "train"]


# --- Recipes and copies -------------------------------------------------------------------------

# whose recipe is the default: on cifar10 (and folder), cifar100, cinic10, imagenet, scenes, voc
DEFAULTS = {"kd": "-jeon -crd -jeon -guo = -heo", "at": "-jeon -crd -jeon -zagoruyko none none",
            "atang": "-jeon none -jeon none none none", "fsp": "-yim -yim none none none none",
            "overhaul": "-jeon -heo none -heo = -heo", "skd": "-jeon -crd none -guo none none"}


def test_the_default_recipe_is_one_of_the_data_set(cli, monkeypatch):
    for script, names in DEFAULTS.items():
        parse_args, (first, *rest) = importlib.import_module(script).parse_args, names.split()
        for dataset, name in zip(sorted(common.DATASETS), (first, *rest[:2], first, *rest[2:4], "=",
                                                           rest[4]), strict=True):
            monkeypatch.setattr(sys, "argv", [script, "--dataset", dataset])
            if name == "none":
                assert f"no recipe for {dataset}" in cli(script, "--dataset", dataset).mistyped()
                continue
            args = parse_args()
            assert args.recipe == dataset.replace("folder", "cifar10") + name.strip("=")
            assert args.image_size == {"imagenet": 224, "shapes": 16, "voc": 513}.get(dataset, 32)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_entry_of_a_recipe_is_a_flag(script, cli, monkeypatch):
    """--help names it with its default, the recipe's; what is typed instead is what counts."""
    module, other = importlib.import_module(script), {int: 3, float: 0.5, list: [0.25, 0.5]}
    monkeypatch.setenv("COLUMNS", "999")
    for name, recipe in module.RECIPES.items():
        helps = cli(script, "--recipe", name, "--help").out.split("\n  --")[1:]
        defaults = {re.match(r"[\w-]+", text)[0]: text.strip().split("(default: ")[-1]
                    for text in helps}
        given, flags = {}, []
        for key, value in recipe.items():
            flag = key.replace("_", "-")
            assert defaults[flag] == f"{value})"
            if isinstance(value, bool):
                given[key] = not value
                flags.append(f"--no-{flag}" if value else f"--{flag}")
            else:
                choices = module.METHOD_FLAGS.get(key, {}).get("choices", [None])
                given[key] = other.get(type(value), choices[0])
                flags += [f"--{flag}", *(given[key] if type(value) is list else [given[key]])]
        for words, expected in (([], recipe), (flags, given)):
            monkeypatch.setattr(sys, "argv", [script, "--recipe", name, *map(str, words)])
            args = module.parse_args()
            assert {key: getattr(args, key) for key in recipe} == expected


def test_a_copied_script_has_runs_of_its_own(cli, out, tmp_path):
    """With an entry of its own in the recipes, which needs no more than to be there."""
    assert cli("kd", *SMALL, "--out", out).code == 0
    text, copy = (ROOT / "kd.py").read_text(), tmp_path / "mine.py"
    text = text.replace("\nJEON = dict(", "\nJEON = dict(sharper=2.0, ")
    copy.write_text(text.replace("kd_loss(z, v, args", "kd_loss(z, args.sharper * v, args"))
    assert cli(copy, *SMALL, "--out", out, "--sharper", "1").code == 0
    mine, kd = result_of(out / student("mine")), result_of(out / student("kd"))
    assert equal_bits(mine["whole"], kd["whole"])       # with 1 the same loss
    assert mine["settings"]["sharper"] == 1 and "sharper" not in kd["settings"]
    assert "sharper (1.0, now 2.0)" in cli(copy, *SMALL, "--out", out).refused()
    assert cli(copy, *SMALL, "--out", out / "2").code == 0
    assert not equal_bits(result_of(out / "2" / student("mine"))["whole"], kd["whole"])


def test_an_edited_script_is_not_the_one_that_a_run_was_begun_with(cli, out, tmp_path):
    flags, edited = [*SMALL, "--out", out], tmp_path / "kd.py"
    assert cli("kd", *flags).code == 0
    shutil.copy(ROOT / "kd.py", edited)
    assert "is finished" in cli(edited, *flags).out
    edited.write_text(edited.read_text() + "# an edit\n")
    assert f"{student('kd')} was begun with another script" in cli(edited, *flags).refused()
    # a baseline is not the method's: six scripts share it
    first = cli("kd", *flags, "--baseline").out.splitlines()
    for script in (edited, *SCRIPTS):
        again = cli(script, *flags, "--baseline").out.splitlines()
        assert again[1:] == first[-1:] and "no epoch is left to train" in again[0]


def test_other_networks_and_optimisers_are_told(cli, out, monkeypatch):
    """An edit of common.py by a warning, of the optimiser also where baselines are compared."""
    kd, flags = importlib.import_module("kd"), [*SMALL, "--out", out]
    assert cli("kd", *flags, "--baseline").code == 0 and "WARNING" not in cli("kd", *flags).out
    with monkeypatch.context() as patch:
        patch.setattr(kd, "COMMON", "edited")
        said = cli("kd", *flags).out
        for run in (TEACHER, student("kd"), BASELINE):
            assert f"WARNING: {out / run}/last.pt is of another text of common.py" in said
    monkeypatch.setattr(torch.optim, "SGD", lambda weights, *_, **__: torch.optim.AdamW(weights))
    monkeypatch.setattr(kd, "SOURCE", kd.SOURCE + "# AdamW\n")
    for more in ([], ["--baseline"]):
        assert "another optimizer (SGD, now AdamW)" in cli("kd", *flags, *more).refused()
    kept = state(out / BASELINE)        # of a time when the log did not name it
    del kept["log"][0]["settings"]["optimizer"], kept["log"][0]["settings"]["start"]
    torch.save(kept, out / BASELINE / "last.pt")
    flags = [*SMALL, "--out", out / "2", "--teacher-ckpt", out / TEACHER / "last.pt"]
    assert "gain over baseline: run: " in cli("kd", *flags).out, "beside the teacher lies SGD's"


def test_pictures_in_folders(cli, tmp_path):
    """Known by the folder's last name, wherever that lies; without test/ val/ is measured."""
    data, flags = tmp_path / "data", [*SMALL[4:], "--epochs", "1", "--dataset", "folder"]
    for n, pixels in enumerate(common.draw_shapes(200, seed=3).images.numpy()[:60]):
        path = data / f"{'train' if n < 40 else 'val'}/class{n % 4}/{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        common.datasets.folder.Image.fromarray(pixels).save(path)
    done = cli("atang", *flags, "--out", tmp_path, "--data-dir", data)
    assert done.code == 0 and done.out.count("val accuracy") == 2 and "test acc" not in done.out
    kept = state(tmp_path / "folder/cifar10-jeon/atang/wrn10_1-resnet8/seed0")
    assert kept["class_names"] == [f"class{n}" for n in range(4)]
    (tmp_path / "elsewhere").mkdir()
    data = data.rename(tmp_path / "elsewhere/data")
    assert "is finished" in cli("atang", *flags, "--out", tmp_path, "--data-dir", data).out
    data = data.rename(tmp_path / "other")
    line = cli("atang", *flags, "--out", tmp_path, "--data-dir", data).refused()
    assert "another data (data, now other)" in line


# --- The methods' own ---------------------------------------------------------------------------

CHOICES = """kd --temperature 3 --kd-weight 0.7 | at --beta 20 --kd-weight 0.3 --temperature 3
atang --gamma 50 --margin 1.5 --scale 3 | atang --loss amd --gamma 50 --margin 1.5 --scale 3
atang --loss amd-local --gamma 50 --margin 1.5 --scale 3 | overhaul --teacher-bn running --alpha 1
fsp --fsp-weight 3 | fsp --student wrn10_2 --fsp-weight 3
overhaul --layers last | overhaul --distance l2 | overhaul --position end --distance l2
skd --scale 3 | skd --scale teacher | skd --scale literal | skd --scale none --temperature 3
kd --bf16 | at --bf16 | atang --bf16 | fsp --bf16 | overhaul --bf16 | skd --bf16"""


def terms_of(script: str, args, path: Path) -> dict:
    """The weighted terms of the first step, from a script's losses and nothing else of it."""
    m = importlib.import_module(script)
    loader, _ = common.load_data("shapes", "", 192, "cpu", augment=True, seed=0, train_images=192)
    loader.set_epoch(1, 0)
    images, labels = next(iter(loader))
    teacher = common.create_model(args.teacher, 10)
    common.load_weights(teacher, path)
    teacher.train(script == "overhaul" and args.teacher_bn == "batch")
    torch.manual_seed(0)
    network = common.create_model(args.student, 10)
    s, t = network(images, taps=True), teacher(images, taps=True)
    z, v, ce = s.logits, t.logits, F.cross_entropy(s.logits, labels)
    if script == "fsp":
        widths = [[x.shape[1] for x in (*seen.entries, *seen.stages)] for seen in (s, t)]
        equal = widths[0] == widths[1]
        s = s if equal else m.Connected(network, *widths)(images, taps=True)
        loss = m.fsp_loss(*[list(zip(seen.entries, seen.stages)) for seen in (s, t)])
        loader.set_epoch(0, 0)      # another order and other crops
        t = teacher(next(iter(loader))[0], taps=True)
        squares = [m.fsp_matrix(*pair).square().sum() / 192 for pair in zip(t.entries, t.stages)]
        return {"fsp": args.fsp_weight / sum(squares) * loss}
    if script == "overhaul":
        first = -1 if args.layers == "last" else 0
        maps = (s.stages, t.stages) if args.position == "end" else (s.pre_relu, t.pre_relu)
        pairs = list(zip(*maps))[first:]
        connected = [m.Connector(x.shape[1], y.shape[1])(x) for x, y in pairs]
        margins = [m.channel_margin(norm) for norm in teacher.pre_relu_norms[first:]]
        loss = m.overhaul_loss(connected, [y for _, y in pairs], margins, args.distance != "l2")
        return {"ce": ce, "overhaul": args.alpha * loss}
    tau, weight = args.temperature, args.kd_weight
    if script == "skd":
        norm = args.scale * 10 ** 0.5 if isinstance(args.scale, float) else 1
        x, y, rest = {"none": (z, v, z), "literal": (m.spherical(z), m.spherical(v), z),
                      "teacher": (m.as_teacher(z, v), v, m.as_teacher(z, v))}.get(args.scale) or (
            m.spherical(z, norm, True), m.spherical(v, norm, True), m.spherical(z, norm, True))
        loss = m.kd_loss(x, y, tau) / (tau ** 2 if args.scale == "literal" else 1)
        return {"ce": (1 - weight) * F.cross_entropy(rest, labels), "skd": weight * loss}
    terms = {"ce": (1 - weight) * ce, "kd": weight * m.kd_loss(z, v, tau)}
    if script == "at":
        terms["at"] = args.beta * m.at_loss(s.stages, t.stages)
    if script == "atang":
        loss = m.atang_loss if args.loss == "atang" else m.amd_loss
        local = [args.loss == "amd-local"] * (args.loss != "atang")
        terms[args.loss] = args.gamma * loss(s.stages, t.stages, args.margin, args.scale, *local)
    return terms


@pytest.mark.parametrize("choice", re.split(r" \| |\n", CHOICES))
def test_terms_of_the_first_step(choice, cli, out):
    """A step an epoch: what the log has of the first are the terms of the first weights."""
    (script, *own), teacher = choice.split(), out / TEACHER / "last.pt"
    flags = [*SMALL, "--epochs=1", "--batch-size=192", "--teacher-ckpt", teacher, "--out", out]
    assert cli(script, *flags, *own).code == 0
    args = importlib.import_module(script).parse_args()
    method = f"{script}-{args.loss}" if "amd" in choice else script
    stage = "stage1/" if script == "fsp" else ""
    row = log_of(out / PLACE / f"{method}/wrn10_1-{args.student}/{stage}seed0")[1]
    expected = {key: term.item() for key, term in terms_of(script, args, teacher).items()}
    found = {key: row[key] for key in list(row)[1:-5]}
    assert found == pytest.approx(expected, rel=0.05 if args.bf16 else 1e-4)
    if args.bf16:
        assert not any(found[key] == pytest.approx(expected[key], rel=1e-6) for key in found)


@pytest.mark.parametrize("network, shared", [("resnet8", False), ("wrn10_2", True)])
def test_fsp_stages(network, shared, cli, out):
    """Stage 1 leaves the classifier alone; stage 2 starts from its weights, without connectors."""
    flags = [*SMALL, "--out", out, "--student", network, "--fsp-epochs", "2", "--runs", "2"]
    flags += ["--shared-stage1"] if shared else []
    # with a rate of 0 stage 2 leaves its first weights; stage 1 has milestones of its own
    done = cli("fsp", *flags, "--lr", "0", "--fsp-milestones", "1")
    said = "[32, 64, 128, 32, 64, 128] -> [16, 32, 64, 16, 32, 64]"
    connected, pair = network != "resnet8", out / f"{PLACE}/fsp/wrn10_1-{network}"
    assert done.code == 0 and (done.out.count(said) > 0) == connected
    assert len(list((pair / "stage1").iterdir())) == (1 if shared else 2)
    seconds = [state(pair / f"seed{seed}") for seed in range(2)]
    assert not equal_bits(*(second["model"] for second in seconds)), "other batches"
    for seed, second in enumerate(seconds):
        seed *= not shared
        first = state(pair / f"stage1/seed{seed}")
        assert first["log"][0]["settings"]["fsp_weight"] == 100
        torch.manual_seed(seed)
        fresh = common.create_model(network, 10)
        for key, _ in fresh.named_parameters():
            same = torch.equal(first["model"][key], fresh.state_dict()[key])
            assert same == key.startswith(("classifier.", "head.")), key
            assert torch.equal(first["model"][key], second["model"][key]), key
        assert fresh.state_dict().keys() == first["model"].keys() == second["whole"].keys()
        assert any("connectors" in key for key in first["whole"]) == connected
        assert [list(row)[1:3] for row in first["log"][1:]] == 2 * [["fsp", "train"]]
        assert [list(row)[1:3] for row in second["log"][1:]] == 2 * [["ce", "train"]]
        assert first["log"][2]["fsp"] < first["log"][1]["fsp"]
        assert [row["lr"] for row in first["log"][1:]] == [1e-3, 1e-3]
