"""The pictures of finished runs: the sums behind them, and every command end to end."""
import json
import shutil
from argparse import Namespace
from pathlib import Path

import common
import look
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch import nn

SHAPES = ROOT / "tests/reference/shapes"
# made in the test's own folder, so that the command's paths are relative to it
TINY = ["--dataset", "shapes", "--train-images", "64", "--epochs", "2", "--batch-size", "32",
        "--teacher", "wrn10_1", "--student", "resnet8", "--device", "cpu"]
TEACHER = "runs/shapes/baseline/wrn10_1/seed0/last.pt"


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("look")


@pytest.fixture
def runs(kept, cli, monkeypatch) -> Path:
    """A baseline and an AT student of two seeds, trained once; the folder of their data set."""
    with monkeypatch.context() as patch:
        patch.chdir(kept)
        if not (kept / "runs").exists():
            assert cli("kd", *TINY, "--baseline").code == 0
            assert cli("kd", *TINY, "--baseline", "--student", "wrn10_1").code == 0
            assert cli("at", *TINY, "--runs", "2", "--teacher-ckpt", TEACHER).code == 0
    return kept / "runs/shapes"


def refused(result) -> str:
    assert result.code == 2, f"exit code {result.code}\n{result.out}\n{result.err}"
    assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    return result.err


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return picture.size


def test_energy_share_by_hand():
    """A map of 2x2 over a mask of 4x4, cell by cell; a uniform map has the object's area."""
    mask = np.zeros((4, 4), bool)
    mask[0, :3] = mask[1, 0] = True
    heat = np.array([[3.0, 1.0], [0.0, 4.0]])
    laid = np.kron(heat, np.ones((2, 2)))
    expected = (laid * mask).sum() / laid.sum()
    assert expected == pytest.approx((3 * 3 / 4 + 1 * 1 / 4) / 8)
    maps = torch.tensor(np.stack([heat, np.full((2, 2), 0.7), np.zeros((2, 2))]))
    shares = look.energy_share(maps, torch.tensor(mask).expand(3, 4, 4))
    assert shares[0].item() == pytest.approx(expected)
    assert shares[1].item() == pytest.approx(mask.mean())
    assert shares[2].isnan()
    random = np.random.default_rng(0)
    large, masks = random.random((5, 16, 16)), random.random((5, 16, 16)) < 0.3
    ours = look.energy_share(torch.tensor(large), torch.tensor(masks))
    assert np.allclose(ours, (large * masks).sum((1, 2)) / large.sum((1, 2)))


class Small(nn.Module):
    """Two convolutions of 1x1 and a linear head over means, so that all slopes can be written."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first, self.second, self.head = (
            nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))
            for shape in ((5, 3), (4, 5), (3, 4)))

    def forward(self, x: torch.Tensor, taps: bool) -> common.Taps:
        low = torch.einsum("kc,nchw->nkhw", self.first, x)
        high = torch.einsum("kc,nchw->nkhw", self.second, low.relu())
        return common.Taps(high.mean((2, 3)) @ self.head.T, [], [low, low, high], [])


@pytest.mark.parametrize("classes", [None, [0, 2, 1, 1]])
def test_grad_cam_is_the_papers_equations(classes):
    """Eq. 1 and 2 in NumPy, with the slopes worked out by hand."""
    network = Small()
    x = np.random.default_rng(1).normal(size=(4, 3, 6, 4))
    logits, heats, stages = look.grad_cam(network, torch.tensor(x),
                                          None if classes is None else torch.tensor(classes))
    first, second, head = (p.detach().numpy() for p in network.parameters())
    pixels = 6 * 4
    for n in range(4):
        low = np.tensordot(first, x[n], 1)
        high = np.tensordot(second, low.clip(0), 1)
        y = head @ high.mean((1, 2))
        assert np.allclose(logits[n], y)
        c = y.argmax() if classes is None else classes[n]
        # y = mean over the pixels of head_c . high, so that dy / dhigh is the same everywhere
        alpha_high = head[c] / pixels
        expected = (alpha_high[:, None, None] * high).sum(0).clip(0)
        assert np.allclose(heats[2][n], expected)
        slope_low = (second.T @ alpha_high)[:, None, None] * (low > 0)
        alpha_low = slope_low.mean((1, 2))
        assert np.allclose(heats[0][n], (alpha_low[:, None, None] * low).sum(0).clip(0))
        assert np.allclose(stages[0][n], low)
    assert heats[2].max() > 0 and (heats[2] == 0).any()


def test_the_outline_is_around_the_mask():
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1:3, 1:3] = True
    picture = look.outlined(torch.full((16, 16, 3), 0.5), mask)[..., 0]
    assert (picture == 1).sum() == 8 * 8 - 6 * 6 and (picture == 0).sum() == 10 * 10 - 8 * 8
    assert (picture[4, 4:12] == 1).all() and (picture[3, 3:13] == 0).all()


def test_energy(runs, cli):
    """The printed shares and deviations, from the networks themselves, image by image."""
    done = cli("look", "energy", runs / "baseline/resnet8", runs / "at/wrn10_1-resnet8")
    assert done.code == 0, done.err
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
            for line in done.out.splitlines() if line.startswith("|")}
    assert list(rows)[2:] == ["a uniform map", "teacher", "baseline", "at"]
    split = common.draw_shapes(200, 3)
    assert rows["a uniform map"][1] == f"{100 * split.masks.float().mean():.2f}"
    assert [rows[name][-1] for name in ("teacher", "baseline", "at")] == ["1", "1", "2"]
    loader = common.load_data("shapes", "data", 50, "cpu", augment=False, seed=0)[1]
    means = []
    for seed in range(2):
        network = common.new_model("resnet8", loader, 0)
        common.load_weights(network, runs / f"at/wrn10_1-resnet8/seed{seed}/last.pt")
        stages = [network.eval()(x, taps=True).stages[2] for x, _ in loader]
        squares = torch.cat(stages).square().sum(1).detach()
        over = squares.repeat_interleave(4, 1).repeat_interleave(4, 2)      # 4x4 -> 16x16
        means.append(100 * ((over * split.masks).sum((1, 2)) / over.sum((1, 2))).mean().item())
    assert rows["at"][6] == f"{np.mean(means):.2f} ± {np.std(means, ddof=1):.2f}"
    log = common.read_log(runs / "baseline/resnet8/seed0")
    assert rows["baseline"][0] == f"{log[-1]['test']:.2f}"
    answer = cli("look", "energy", runs / "at/wrn10_1-resnet8", "--of", "answer")
    assert "of the answer" in answer.out and answer.out.splitlines()[4] not in done.out


def test_maps(runs, cli, tmp_path, monkeypatch):
    """Size, who is right, and which images are taken."""
    texts = []
    save = look.save_sheet
    monkeypatch.setattr(look, "save_sheet",
                        lambda canvas, own, args: (texts.extend(own), save(canvas, own, args)))
    base, ours = runs / "baseline/resnet8", runs / "at/wrn10_1-resnet8"
    command = ["maps", base, ours, "--out", tmp_path / "a.png"]
    assert cli("look", *command, "--images", "7", "3").code == 0
    assert size_of(tmp_path / "a.png") == (116 + 3 * 312, 60 + 2 * 118)
    told = [text for _, _, text, _ in texts]
    split = common.draw_shapes(200, 3)
    assert f"7: {common.SHAPES[split.labels[7]]}" in told
    assert {"teacher (wrn10_1)", "baseline (resnet8)", "at (resnet8)"} <= set(told)
    loader = common.load_data("shapes", "data", 200, "cpu", augment=False, seed=0)[1]
    right = []
    for folder in (base, ours):
        network = common.new_model("resnet8", loader, 0)
        common.load_weights(network, folder / "seed0/last.pt")
        images, labels = next(iter(loader))
        answers = network.eval()(images).argmax(1)
        right.append(answers == labels)
        for number in (7, 3):
            verdict = "right" if answers[number] == labels[number] else "WRONG"
            assert f"{verdict}: {common.SHAPES[answers[number]]}" in told
    texts.clear()
    apart = [number for number in common.balanced_order(split.labels).tolist()
             if right[0][number] != right[1][number]]
    assert 3 < len(apart) < 200
    assert cli("look", *command, "--wrong-only", "--count", "3").code == 0
    assert [int(text.split(":")[0]) for *_, text, _ in texts if text[0].isdigit()] == apart[:3]
    same = next(number for number in range(200) if number not in apart)
    assert "on none of these" in refused(cli("look", *command, "--wrong-only", "--images", same))
    assert "no image 200" in refused(cli("look", *command, "--images", "200"))
    assert "name both" in refused(cli("look", "maps", base, "--wrong-only"))


def test_a_teacher_that_is_another_is_found_out(runs, cli):
    other = runs / "baseline/wrn10_1/seed0/other.pt"
    state = torch.load(other.with_name("last.pt"), weights_only=True)["model"]
    torch.save({key: x + 1 for key, x in state.items()}, other)
    line = refused(cli("look", "energy", runs / "at/wrn10_1-resnet8", "--teacher-ckpt", other))
    assert "is not the teacher" in line


def test_curves_scatter_and_sweep_from_logs_alone(cli, tmp_path):
    """From the recorded runs, which have no weights."""
    names = ["baseline/wrn16_1", "kd/wrn16_3-wrn16_1", "atang/wrn16_3-wrn16_1"]
    folders = [SHAPES / name for name in names]
    assert cli("look", "curves", *folders, "--out", tmp_path / "c.png").code == 0
    assert size_of(tmp_path / "c.png") == (960, 190 * 2 + 40)
    assert cli("look", "scatter", *folders[1:], "--out", tmp_path / "s.png").code == 0
    assert size_of(tmp_path / "s.png") == (320 * 2 + 40, 280)
    kept = tmp_path / "tables"
    for margin, number in (("1.0", 1), ("1.5", 2)):
        place = kept / f"margin-{margin}/shapes/atang/wrn16_3-wrn16_1/seed0"
        shutil.copytree(SHAPES / f"atang/wrn16_3-wrn16_1/seed{number}", place)
        header, rest = (place / "log.jsonl").read_text().split("\n", 1)
        header = json.loads(header)
        header["command"] += ["--margin", margin]
        (place / "log.jsonl").write_text(json.dumps(header) + "\n" + rest)
    command = ["sweep", "atang-margin", "--dataset", "shapes", "--teacher", "wrn16_3",
               "--student", "wrn16_1", "--runs", "1", "--out", tmp_path / "w.png"]
    assert cli("look", *command, "--from", kept, "--colours", "16").code == 0
    assert size_of(tmp_path / "w.png") == (560, 380)
    with Image.open(tmp_path / "w.png") as picture:
        assert picture.mode == "P" and len(picture.getcolors()) <= 16
    assert "no finished run" in refused(cli("look", *command, "--from", tmp_path / "nowhere"))
    assert "no finished run" in refused(cli("look", *command, "--from", kept, "--lr", "0.3"))
    assert "leave baselines out" in refused(cli("look", "scatter", *folders))


def test_what_the_curves_and_the_scatter_show():
    """Mean and deviation over the seeds; L_A without its weight; FSP's two stages in a row."""
    group, = look.groups_of([SHAPES / "atang/wrn16_3-wrn16_1"])
    rows = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()[1:]]
            for folder in sorted((SHAPES / "atang/wrn16_3-wrn16_1").iterdir())]
    epochs, means, deviations = look.course(group.logs, "test")
    tests = np.array([[row["test"] for row in own] for own in rows])
    assert epochs == list(range(1, 16)) and len(tests) == 5
    assert np.allclose(means, tests.mean(0)) and np.allclose(deviations, tests.std(0, ddof=1))
    term, loss = look.final_loss(group.folders[0], group.logs[0])
    assert term == "atang" and loss == pytest.approx(rows[0][-1]["atang"] / 1000)
    fsp = look.groups_of([SHAPES.parent / "epochs-11_fsp-epochs-4/shapes/fsp/wrn16_3-wrn16_1"])[0]
    assert look.course(fsp.logs, "fsp")[0] == [1, 2, 3, 4]
    assert look.final_loss(fsp.folders[0], fsp.logs[0])[0] == "fsp with its weight"
    fsp.logs[0][0]["settings"]["fsp_weight"] = 0.01
    assert look.final_loss(fsp.folders[0], fsp.logs[0])[1] == pytest.approx(
        100 * fsp.logs[0][4]["fsp"])
    assert look.course(fsp.logs, "ce")[0] == list(range(5, 16))
    shared = SHAPES.parent / "epochs-5_fsp-epochs-8_shared-stage1/shapes/fsp/resnet8-resnet8"
    assert look.course(look.groups_of([shared])[0].logs, "ce")[0] == list(range(9, 14))


def test_labels_tell_runs_apart():
    place = Path("/runs/tables/shapes")
    nets = "wrn16_3-wrn16_1/seed0"
    folders = [place / "kd" / nets, place / "baseline/wrn16_1/seed0",
               place / "baseline/wrn16_3/seed0", place / "at" / nets,
               Path("/runs/tables/beta-9/shapes/at") / nets]
    first, *bases, plain, beta = look.labels_of(folders)
    assert first == "kd" and bases == ["baseline wrn16_1", "baseline wrn16_3"]
    assert plain != beta and "beta-9" in beta
    assert look.labels_of([place / "kd/x/seed0", place / "kd/x/seed3"]) == ["kd seed0", "kd seed3"]


def test_data(cli, tmp_path):
    assert cli("look", "data", "--count", "3", "--out", tmp_path / "d.png").code == 0
    assert size_of(tmp_path / "d.png") == (90 + 6 * 68 + 12, 24 + 10 * 68)
    # one's own folder, a class of which has a single picture
    for split in ("train", "test"):
        for kind, count in (("cat", 3), ("dog", 1)):
            (tmp_path / split / kind).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (20, 10), (200, 80 * number, 0)).save(
                    tmp_path / split / kind / f"{number}.png")
    command = ["data", "--dataset", "folder", "--data-dir", tmp_path, "--out", tmp_path / "f.png"]
    assert cli("look", *command, "--count", "2", "--image-size", "16").code == 0
    assert size_of(tmp_path / "f.png") == (90 + 4 * 68 + 12, 24 + 2 * 68)
    assert "stay in their files" in refused(cli("look", *command, "--image-size", "64"))
    with Image.open(tmp_path / "f.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert (pixels[30 + 68:80 + 68, 92 + 68:150 + 68] == 255).all()     # the dog that is not there
    assert (pixels[30:80, 92:150, 0] == 200).all()
    line = refused(cli("look", "data", "--dataset", "folder", "--data-dir", tmp_path / "nowhere"))
    assert "needs the folders train/ and test/" in line


def test_wrong_input_is_one_line(runs, cli, tmp_path, monkeypatch):
    ours = runs / "at/wrn10_1-resnet8"
    recorded = SHAPES / "at/wrn16_3-wrn16_1"
    cifar = SHAPES.parent / "epochs-15_cifar10-images/folder/kd/wrn16_3-wrn16_1"
    for command in ("maps", "energy", "curves", "scatter"):
        assert "is no run" in refused(cli("look", command, tmp_path))
        assert "one by one" in refused(cli("look", command, recorded, cifar))
    renamed = tmp_path / "at/wrn10_1-resnet9"
    shutil.copytree(ours / "seed0", renamed / "seed0")
    assert "resnet9" in refused(cli("look", "energy", renamed, "--teacher-ckpt",
                                    runs.parent / "shapes/baseline/wrn10_1/seed0/last.pt"))
    other = tmp_path / "baseline/resnet14"
    shutil.copytree(runs / "baseline/resnet8/seed0", other / "seed0")
    assert "is of another network" in refused(cli("look", "maps", other))
    (other / "seed0/last.pt").unlink()
    assert "last.pt is missing" in refused(cli("look", "energy", other))
    loader = Namespace(masks=None, labels=torch.arange(200))
    with monkeypatch.context() as patch:
        patch.setattr(look.reproduce, "images_of", lambda settings, data_dir: loader)
        assert "masks" in refused(cli("look", "energy", ours))
        loader.labels = torch.arange(3)
        assert "has 3 now" in refused(cli("look", "energy", ours))
    unfinished = tmp_path / "kd/wrn16_3-wrn16_1/seed0"
    unfinished.mkdir(parents=True)
    lines = (SHAPES / "kd/wrn16_3-wrn16_1/seed0/log.jsonl").read_text().splitlines()
    (unfinished / "log.jsonl").write_text("\n".join(lines[:4]) + "\n")
    for command in ("energy", "scatter"):
        assert "is not finished" in refused(cli("look", command, unfinished))
    assert cli("look", "curves", unfinished, "--out", tmp_path / "c.png").code == 0
    nowhere = tmp_path / "nowhere/c.png"
    assert "nowhere" in refused(cli("look", "curves", unfinished, "--out", nowhere))
    monkeypatch.setattr(look, "matplotlib", None)
    assert "pip install matplotlib" in refused(cli("look", "curves", recorded))
    assert "pip install matplotlib" in refused(cli("look", "maps", ours))


def test_bad_arguments(cli):
    assert "required: COMMAND" in cli("look").mistyped()
    assert "unrecognized arguments: --ron" in cli("look", "curves", "x", "--ron=2").mistyped()
    assert "does not end in .png" in cli("look", "data", "--out", "x.jpg").mistyped()
    assert "invalid choice" in cli("look", "sweep", "seven").mistyped()
