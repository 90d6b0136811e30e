"""A class for each pixel: DeepLab, its data, its score, and the start from published weights."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import SMALL, state
from PIL import Image
from test_data import loader_of, pictures, whole_epoch
from test_models import SOURCE
from test_runs import log_of

import common
from common import UserError, create_model, load_data, load_weights

SCENES = [*SMALL, "--dataset", "scenes", "--train-images", "32", "--epochs", "1", "--teacher",
          "deeplab_resnet8", "--student", "deeplab_resnet8"]
PLACE = "scenes/scenes"


# --- networks -----------------------------------------------------------------------------------
@pytest.mark.parametrize("name, weights, channels, dilations", [
    ("deeplab_resnet101", 59_344_309, [256, 512, 1024, 2048, 256, 256], [2, 4, 8]),
    ("deeplab_resnet50", 40_352_181, [256, 512, 1024, 2048, 256, 256], [2, 4, 8]),
    ("deeplab_resnet18", 16_608_181, [64, 128, 256, 512, 256, 256], [2, 2]),
    ("deeplab_mobilenetv2", 5_816_053, [144, 192, 576, 320, 256, 256], [1, 1, 1, 2])])
def test_deeplab_is_the_papers(name, weights, channels, dilations):
    """Weights at VOC's 21 classes; what its authors distil, at the strides 4, 8, 16, 16, 16, 4."""
    with torch.device("meta"):
        model = create_model(name, 21).eval()
        taps = model(torch.empty(1, 3, 513, 513), taps=True)
    assert sum(x.numel() for x in model.parameters()) == weights
    assert [tuple(x.shape[1:]) for x in taps.pre_relu] == [
        (c, side, side) for c, side in zip(channels, [129, 65, 33, 33, 33, 129])]
    assert model.pre_relu_channels == channels and taps.logits.shape == (1, 21, 513, 513)
    assert model.layer_weights == [1 / 8, 1 / 4, 1 / 2, 1, 1, 1 / 16]
    assert not taps.stages and not taps.entries
    for block, rate in zip(model.backbone.groups[-1], dilations, strict=True):
        found = [conv.dilation[0] for conv in block.modules()
                 if isinstance(conv, torch.nn.Conv2d) and conv.kernel_size == (3, 3)]
        assert found[-1] == rate and all(x == rate for x in found)


@pytest.mark.parametrize("name", ["deeplab_resnet8", "deeplab_mobilenetv2"])
def test_deeplabs_maps_are_its_norms_and_logits_are_laid_over_the_picture(name):
    model, images, outputs = create_model(name, 5).eval(), torch.randn(2, 3, 33, 33), {}
    for norm in model.pre_relu_norms:
        norm.register_forward_hook(lambda module, _, output: outputs.update({module: output}))
    logits, taps = model(images), model(images, taps=True)
    assert torch.equal(logits, taps.logits) and logits.shape == (2, 5, 33, 33)
    for norm, shown in zip(model.pre_relu_norms, taps.pre_relu, strict=True):
        assert shown is outputs[norm] or name == "deeplab_resnet8" and norm in [
            group[-1].last_norm for group in model.backbone.groups]
    deep, _, stages, _ = model.backbone.maps(images)
    y = F.interpolate(model.aspp(deep), size=stages[0].shape[2:], mode="bilinear",
                      align_corners=True)       # torchvision's forward, its ReLU with it
    y = model.refine(model.mix(torch.cat([y, model.low(stages[0])], 1)))
    assert torch.allclose(y, taps.pre_relu[-1], atol=1e-5)
    coarse = model.classifier(taps.pre_relu[-1].relu())
    assert torch.allclose(coarse[:, :, 0, 0], taps.logits[:, :, 0, 0], atol=1e-5)   # corners meet
    assert torch.allclose(coarse[:, :, -1, -1], taps.logits[:, :, -1, -1], atol=1e-5)


def test_dropout_rests_while_the_overhaul_distils():
    """Its Appendix B; deeplab_resnet8 has none."""
    images = torch.randn(2, 3, 65, 65)
    for name, drops in (("deeplab_resnet18", True), ("deeplab_resnet8", False)):
        model = create_model(name, 5).train()
        assert torch.equal(model(images), model(images)) != drops
        assert torch.equal(*(model(images, taps=True).logits for _ in range(2)))


# --- a start from other weights -----------------------------------------------------------------
def test_a_start_from_a_classifier(tmp_path):
    """torchvision's, for DeepLab or for other classes; what the file has not stays fresh."""
    torch.save(torchvision.models.resnet18(num_classes=20).state_dict(), tmp_path / "r.pth")
    torch.save(torchvision.models.mobilenet_v2(num_classes=20).state_dict(), tmp_path / "m.pth")
    for name, file, last in (("deeplab_resnet18", "r", None), ("deeplab_mobilenetv2", "m", None),
                             ("imagenet_resnet18", "r", "classifier.weight")):
        model = create_model(name, 7)
        fresh = {key: x.clone() for key, x in model.state_dict().items()}
        with pytest.raises(UserError, match="is of another network or number of classes"):
            load_weights(model, tmp_path / f"{file}.pth")
        found = load_weights(model, tmp_path / f"{file}.pth", start=True)
        again = load_weights(create_model(name, 7), tmp_path / f"{file}.pth", start=True)
        assert again == found, "whatever the seed"
        kept = list(torch.load(tmp_path / f"{file}.pth").values())
        own, now = getattr(model, "backbone", model).state_dict(), model.state_dict()
        assert all(map(torch.equal, (x for key, x in own.items() if not key.startswith("class")),
                       kept))
        for key in [last] if last else ["classifier.weight", "aspp.project.0.weight"]:
            assert torch.equal(now[key], fresh[key])
    with pytest.raises(UserError, match="its stem.0.weight is"):
        torch.save(SOURCE.state_dict(), tmp_path / "other.pt")
        load_weights(create_model("deeplab_resnet18", 7), tmp_path / "other.pt", start=True)


def test_a_student_starts_from_a_file(cli, tmp_path):
    """Which belongs to the settings, of the baseline too; the teacher does not begin with it."""
    for name in "ab":
        torch.save(create_model("resnet8", 7).state_dict(), tmp_path / f"{name}.pt")
    flags = [*SMALL, "--lr", "0", "--out", tmp_path / "runs", "--student-ckpt"]
    assert "gain over baseline: run: " in cli("kd", *flags, tmp_path / "a.pt").out
    assert cli("kd", *flags, tmp_path / "a.pt", "--baseline").code == 0
    assert "gain over baseline: +0.00" in cli("kd", *flags, tmp_path / "a.pt").out
    kept = state(tmp_path / "runs/shapes/shapes/kd/wrn10_1-resnet8/seed0")
    weights = torch.load(tmp_path / "a.pt")
    assert torch.equal(kept["model"]["stem.0.weight"], weights["stem.0.weight"])
    assert kept["model"]["classifier.weight"].shape == (10, 64)
    assert log_of(tmp_path / "runs/shapes/shapes/baseline/wrn10_1/seed0")[0]["settings"][
        "start"] is None
    for other in ([tmp_path / "b.pt"], [tmp_path / "b.pt", "--baseline"]):
        assert "was begun with another start" in cli("kd", *flags, *other).refused()
    assert "nowhere.pt: No such file" in cli("kd", *flags, tmp_path / "nowhere.pt").refused()


# --- scenes -------------------------------------------------------------------------------------
def test_scenes_have_a_class_for_each_pixel():
    split = common.draw_shapes(400, 3, 32, True)
    assert split.images.shape == (400, 32, 32, 3) and split.labels.shape == (400, 32, 32)
    found = [set(x.unique().tolist()) - {0} for x in split.labels]
    assert {len(classes) for classes in found} == {1, 2} and split.masks is None
    alone = [classes for number, classes in enumerate(found) if number // 10 % 2 == 0]
    once = torch.tensor([list(classes) for classes in alone])       # one each
    assert once.flatten().bincount().tolist() == [0] + 10 * [20]
    for image, label in zip(split.images[:40].float(), split.labels):     # one colour an object
        inside = image[label == label.max()].std(0).mean()
        assert inside < 45 or inside < image[label == 0].std(0).mean()


@pytest.mark.parametrize("reflect", [False, True])
def test_labels_move_with_their_pictures(reflect):
    images = pictures(20)
    labels = images[..., 0].long() % 11
    loader = loader_of(images, labels=labels, reflect=reflect)
    for epoch in range(2):
        seen, moved = whole_epoch(loader, epoch)
        assert moved.shape == (20, 16, 16) and (moved == -100).any() != reflect
        known = moved >= 0
        assert torch.equal(seen[:, 0][known].long() % 11, moved[known])
        assert not seen.permute(0, 2, 3, 1)[~known].any(), "black beyond the picture"


@pytest.mark.parametrize("shares", [1, 2])
def test_the_score_is_the_mean_iou(shares, monkeypatch):
    """In NumPy; a pixel without label counts nowhere, nor a class that is nowhere."""
    random, loader = np.random.default_rng(0), loader_of(pictures(4))
    loader.pixels, loader.world, total = True, shares, 0
    labels, answers = random.integers(0, 9, (2, 6, 5, 4))
    labels[random.random((6, 5, 4)) < 0.3] = -100
    for part in np.s_[:2], np.s_[2:]:
        logits = F.one_hot(torch.tensor(answers[part]), 10).movedim(3, 1).float()
        total = total + loader.confusion(logits, torch.tensor(labels[part]))
    labels, answers = labels[labels >= 0], answers[labels >= 0]
    ious = [((labels == k) & (answers == k)).sum() / ((labels == k) | (answers == k)).sum()
            for k in range(9)]
    monkeypatch.setattr(common.distributed, "all_reduce", lambda x: x.mul_(2))
    assert loader.score(total.clone()) == pytest.approx(100 * np.mean(ious))
    loader.pixels = False
    assert loader.score(total) == pytest.approx(100 * (labels == answers).mean())


@pytest.mark.parametrize("script", ["kd", "overhaul"])
def test_a_run_on_scenes(script, cli, tmp_path):
    done = cli(script, *SCENES, "--out", tmp_path)
    assert done.code == 0 and done.out.count("test mIoU") == 2 and "accuracy" not in done.out
    run = tmp_path / PLACE / script / "deeplab_resnet8-deeplab_resnet8/seed0"
    kept = state(run)
    network = create_model(kept["network"], 11).eval()
    network.load_state_dict(kept["model"])
    test = load_data("scenes", "", 32, "cpu", augment=False, seed=0)[1]
    total = sum(test.confusion(network(images), labels) for images, labels in test)
    assert kept["log"][1]["test"] == pytest.approx(test.score(total), abs=0.01)
    assert 0 < kept["log"][1]["train"] < 100 and kept["log"][1][script] > 0
    assert cli("look", "maps", run, "--count", "2", "--out", tmp_path / "x.png").code == 0


def test_networks_and_data_of_different_tasks(cli, tmp_path):
    """In one line, and nothing is begun."""
    more = ["--out", tmp_path / "runs"]
    for script, flags, says in (
            ("kd", ["--teacher", "wrn10_1"], "each pixel, which deeplab_resnet8 gives, but not"),
            ("overhaul", ["--student", "wrn10_1", "--baseline"], "gives, but not wrn10_1"),
            ("kd", ["--dataset", "shapes"], "each picture, which wrn16_1 gives, but not deeplab"),
            ("overhaul", ["--dataset", "shapes"], "gives, but not deeplab_resnet8"),
            ("at", ["--recipe", "shapes"], "deeplab_resnet8 has no maps to compare"),
            ("fsp", ["--recipe", "shapes"], "deeplab_resnet8 has no maps to compare"),
            ("overhaul", ["--position", "end", "--distance", "l2"], "has no maps to compare")):
        assert says in cli(script, *SCENES, *more, *flags).refused()
    assert "no recipe for scenes" in cli("skd", *SCENES, *more).mistyped()
    assert not (tmp_path / "runs").exists()


# --- VOC ----------------------------------------------------------------------------------------
@pytest.fixture
def voc(tmp_path):
    """Of VOC's layout: 6 training and 3 other pictures of several sizes, each second tagged as
    lying upside down, which its labels do not know."""
    root, random = tmp_path / "data/VOCdevkit/VOC2012", np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for kind, numbers in (("train", range(6)), ("val", range(6, 9))):
        names = [f"2007_00{n}" for n in numbers]
        (root / f"ImageSets/Segmentation/{kind}.txt").write_text("\n".join(names))
        for n, name in zip(numbers, names):
            labels = np.zeros((40 + n, 64 - 3 * n), np.uint8)
            labels[5:30, 5:30], labels[4, 4:31] = n + 1, 255
            picture = random.integers(0, 60, (*labels.shape, 3), dtype=np.uint8)
            picture[..., 1] += 20 * (labels % 255)
            tag = Image.Exif()
            tag[0x112] = 1 + 2 * (n % 2)
            Image.fromarray(picture).save(root / f"JPEGImages/{name}.jpg", quality=95, exif=tag)
            mask = Image.fromarray(labels, "P")
            mask.putpalette(bytes(range(256)) * 3)
            mask.save(root / f"SegmentationClass/{name}.png")
    return tmp_path / "data"


def of_voc(folder, **options):
    return load_data("voc", folder, 2, "cpu", **dict(augment=True, seed=0, workers=0,
                                                     image_size=48) | options)


def test_voc(voc, capsys):
    train, val = of_voc(voc)
    assert capsys.readouterr().out == "voc: 6 train and 3 val images\n"
    assert train.settings["images"] == [6, 3] and val.settings["split"] == "val"
    assert train.class_names[0::20] == ["__background__", "tvmonitor"] and val.pixels
    images, labels = whole_epoch(val)
    assert images.shape == (3, 3, 48, 48) and labels.shape == (3, 48, 48)
    for n, (image, label) in enumerate(zip(images, labels), 6):     # the longer side is 48
        height, width = 40 + n, 64 - 3 * n
        inside = round(48 * height / max(height, width)), round(48 * width / max(height, width))
        assert (label[inside[0]:] == -100).all() and (label[:, inside[1]:] == -100).all()
        assert set(label.unique().tolist()) == {-100, 0, n + 1}, "255 is no label"
        green = image[1] * val.std[1] + val.mean[1]
        half = (green[label == n + 1].mean() + green[label == 0].mean()) / 2
        assert ((green > half) == (label == n + 1))[label >= 0].float().mean() > 0.998
    first, again = whole_epoch(train, 3), whole_epoch(of_voc(voc, workers=2)[0], 3)
    assert all(map(torch.equal, first, again)), "whatever the number of workers"
    assert not torch.equal(first[0], whole_epoch(train, 4)[0])
    for image, label in zip(*first):
        green = image[1] * train.std[1] + train.mean[1]
        (kind,) = set(label.unique().tolist()) - {-100, 0} or {0}
        assert not kind or green[label == kind].mean() > 0.07 * kind


def test_sbds_other_pictures_are_added(voc, monkeypatch):
    class SBD:
        def __init__(self, root, name, mode):
            assert root == voc / "sbd" and mode == "segmentation"
            jpegs = voc / "VOCdevkit/VOC2012/JPEGImages"
            self.images = [str(jpegs / f"2007_00{n}.jpg") for n in (5, 6)]      # one of VOC's val
            if name == "val":
                Image.new("RGB", (50, 50)).save(voc / "2008_1.jpg")
                self.images = [str(voc / "2008_1.jpg")]
            self.masks = [f"{name}.mat"] * len(self.images)

        def __getitem__(self, index):
            return Image.open(self.images[index]), Image.new("L", (50, 50), 7)

    (voc / "sbd").mkdir()
    monkeypatch.setattr(common.datasets, "SBDataset", SBD)
    train, val = of_voc(voc)
    assert train.settings["images"] == [7, 3]
    assert (whole_epoch(train)[1] == 7).any()


@pytest.mark.parametrize("name, mode, kind, size, says", [
    ("2007_001", "L", 3, (10, 10), "is not as large as its picture"),
    ("2007_002", "RGB", (0, 128, 0), None, "holds no classes, but colours or numbers (RGB)"),
    ("2007_007", "L", 21, None, "has class 21; VOC's are 0 to 20, and 255")])
def test_wrong_label_images_are_found_before_training(name, mode, kind, size, says, voc, cli,
                                                      tmp_path):
    path = voc / f"VOCdevkit/VOC2012/SegmentationClass/{name}.png"
    Image.new(mode, size or Image.open(path).size, kind).save(path)
    flags = ["--dataset", "voc", "--image-size", "48", "--student", "deeplab_resnet8", "--baseline",
             "--device", "cpu", "--out", tmp_path / "runs", "--data-dir"]
    line = cli("overhaul", *flags, voc).refused()
    assert f"{path} {says}" in line and not (tmp_path / "runs").exists()
    path.write_bytes(b"no picture")
    assert f"cannot read {path}" in cli("overhaul", *flags, voc).refused()
    line = cli("overhaul", *flags, tmp_path / "nowhere").refused()
    assert "nowhere needs VOCdevkit/VOC2012/" in line and "VOCtrainval_11-May-2012.tar" in line


def test_a_score_of_nothing_is_none(voc, cli, tmp_path):
    for path in (voc / "VOCdevkit/VOC2012/SegmentationClass").glob("2007_00[678].png"):
        Image.new("L", Image.open(path).size, 255).save(path)
    line = cli("overhaul", "--dataset", "voc", "--image-size", "48", "--student", "deeplab_resnet8",
               "--baseline", "--batch-size", "2", "--epochs", "1", "--workers", "0", "--device",
               "cpu", "--out", tmp_path / "runs", "--data-dir", voc).refused()
    assert "nothing to measure" in line
