"""The networks: their sizes to the parameter, what their taps show, and weights from files."""
import copy
import hashlib
import re
import urllib.error
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import common
from common import (
    MAKERS, Taps, UserError, check_pair, create_model, load_weights, model_names, print_networks,
    shuffle)

COUNTS = {      # trainable parameters at 10 and at 100 classes, of the reference classes
    "wrn16_1": (175_066, 180_916), "wrn16_2": (691_674, 703_284),
    "wrn16_3": (1_549_530, 1_566_900), "wrn16_4": (2_748_890, 2_772_020),
    "wrn16_8": (10_961_370, 11_007_540), "wrn28_1": (369_498, 375_348),
    "wrn28_2": (1_467_610, 1_479_220), "wrn28_3": (3_294_042, 3_311_412),
    "wrn28_4": (5_849_050, 5_872_180), "wrn28_6": (13_144_794, 13_179_444),
    "wrn40_1": (563_930, 569_780), "wrn40_2": (2_243_546, 2_255_156),
    "resnet8": (78_042, 83_892), "resnet14": (175_258, 181_108), "resnet20": (272_474, 278_324),
    "resnet26": (369_690, 375_540), "resnet32": (466_906, 472_756), "resnet44": (661_338, 667_188),
    "resnet56": (855_770, 861_620), "resnet110": (1_730_714, 1_736_564),
    "resnet8x4": (1_210_410, 1_233_540), "resnet32x4": (7_410_730, 7_433_860),
    "resnet50": (23_520_842, 23_705_252), "vgg8": (3_918_858, 3_965_028),
    "vgg13": (9_416_010, 9_462_180), "mobilenetv2": (590_026, 647_716),
    "mobilenetv2_half": (697_546, 812_836), "shufflenetv1": (862_768, 949_258),
    "shufflenetv2": (1_263_278, 1_355_528), "pyramidnet110_84": (3_904_446, 3_913_536),
    "pyramidnet200_240": (26_752_702, 26_844_952), "imagenet_resnet18": (11_181_642, 11_227_812),
    "imagenet_resnet34": (21_289_802, 21_335_972), "imagenet_resnet50": (23_528_522, 23_712_932),
    "imagenet_resnet101": (42_520_650, 42_705_060), "imagenet_resnet152": (58_164_298, 58_348_708),
    "imagenet_mobilenet": (3_217_226, 3_309_476), "imagenet_mobilenetv2": (2_236_682, 2_351_972),
    "deeplab_resnet8": (145_330, 148_300), "deeplab_resnet8_half": (36_814, 38_344),
    "deeplab_resnet18": (16_605_354, 16_628_484), "deeplab_resnet50": (40_349_354, 40_372_484),
    "deeplab_resnet101": (59_341_482, 59_364_612), "deeplab_mobilenetv2": (5_813_226, 5_836_356)}
OF_1000 = dict(zip([name for name in COUNTS if name.startswith("imagenet_")], [
    # at ImageNet's 1000 classes: what the papers and torchvision say
    11_689_512, 21_797_672, 25_557_032, 44_549_160, 60_192_808, 4_231_976, 3_504_872]))
NAMES = ["wrn10_2", "wrn16_1", "wrn16_3", "resnet8", "resnet20", "resnet8x4", "resnet50",
         "mobilenetv2", "mobilenetv2_half", "vgg8", "vgg13", "shufflenetv1", "shufflenetv2",
         "pyramidnet110_84", "imagenet_resnet18", "imagenet_resnet50", "imagenet_mobilenet",
         "imagenet_mobilenetv2"]
# pixels of the groups of an image of 32, where they are not 32, 16 and 8
SIZES = {"resnet50": [32, 16, 8, 4], "vgg8": [16, 8, 4, 4], "vgg13": [16, 8, 4, 4],
         "mobilenetv2_half": [16, 8, 4, 2], "shufflenetv1": [16, 8, 4], "shufflenetv2": [16, 8, 4]}
SIZES |= {name: [8, 4, 2, 1] for name in OF_1000}
# where the overhaul's paper and code distil, channels x pixels
PRE_RELU = {"pyramidnet200_240": "100x32 180x16 1024x8", "pyramidnet110_84": "44x32 72x16 100x8",
            "wrn28_4": "64x32 128x16 256x8", "resnet56": "16x32 32x16 64x8",
            "imagenet_mobilenet": "128x56 256x28 512x14 1024x7",
            "imagenet_resnet50": "256x56 512x28 1024x14 2048x7",
            "imagenet_resnet152": "256x56 512x28 1024x14 2048x7"}
SUMS = ("resnet", "shufflenetv1", "imagenet_resnet")      # norm plus shortcut enters their ReLU


def pixels(name: str, small: int) -> int:
    """The side of a test's image: four times `small` where the stem divides it by four."""
    return 4 * small if name in OF_1000 else small


def test_parameter_counts_and_the_printed_table(capsys):
    assert set(model_names()) == set(COUNTS)
    print_networks()
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    for name, (small, large) in COUNTS.items():
        assert rows[name][:2] == [f"{small:,}", f"{large:,}"], name
        assert name not in OF_1000 or rows[name][2] == f"{OF_1000[name]:,}"
    assert rows["wrn16_3"][3:] == ["48x32", "96x16", "192x8"] * 3
    assert rows["imagenet_resnet18"][3:] == ["64x56", "128x28", "256x14", "512x7"] * 3
    for name, shown in PRE_RELU.items():
        assert rows[name][-len(shown.split()):] == shown.split(), name


@pytest.mark.parametrize("name", NAMES)
def test_what_the_taps_show(name):
    """Each norm runs once; a map is what its module gave, which an in-place ReLU would change."""
    model, side, outputs, kept = create_model(name, 7), pixels(name, 16), {}, {}

    def remember(module, inputs, output):
        outputs[module] = output
        for x in output if isinstance(output, tuple) else (output,):
            kept[id(x)] = (x, None if x is None else x.detach().clone())

    hooks = [module.register_forward_hook(remember) for module in [*model.modules()][1:]]
    images = torch.randn(4, 3, side, side)
    taps = model.train()(images, taps=True)
    for hook in hooks:
        hook.remove()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(norm.num_batches_tracked.item() == 1 for norm in norms)
    sizes = [(size * side // 32,) * 2 for size in SIZES.get(name, [32, 16, 8])]
    for maps in taps[1:]:
        assert [tuple(x.shape[-2:]) for x in maps] == sizes
        assert all(x._version == 0 for x in maps)
        assert all(torch.equal(*kept[id(x)]) for x in maps if id(x) in kept)
    assert [x.shape[1] for x in taps.stages] == model.stage_channels
    assert [x.shape[1] for x in taps.pre_relu] == model.pre_relu_channels
    for group, entry, stage in zip(model.groups, taps.entries, taps.stages):
        assert entry is outputs[group[0]][0 if len(group) > 1 else 1]
        if name == "mobilenetv2" and group is model.groups[-1]:
            assert torch.equal(stage, F.relu6(taps.pre_relu[-1]))
        else:
            assert stage is outputs[group[-1]][0]
    for norm, shown, stage in zip(model.pre_relu_norms, taps.pre_relu, taps.stages, strict=True):
        # the norm's own output, or in ResNets and ShuffleNetV1 that plus the shortcut
        assert (shown is outputs[norm]) != name.startswith(SUMS) and (shown < 0).any()
        assert not name.startswith(SUMS) or torch.equal(shown.relu(), stage)
    assert torch.equal(model.eval()(images), model(images, taps=True).logits)


def test_wrn_shortcut_sees_the_activated_input_and_weights_are_he_fan_out():
    torch.manual_seed(0)
    model = create_model("wrn16_8", 10).eval()
    block, x = model.groups[1][0], torch.randn(2, 128, 8, 8)
    branch = block.conv2(block.norm2(block.conv1(block.norm1(x).relu())).relu())
    assert torch.allclose(block(x)[0], branch + block.shortcut(block.norm1(x).relu()), atol=1e-5)
    assert model.groups[1][1].shortcut is None          # as wide as before
    weight = model.groups[2][0].conv1.weight            # from 256 channels to 512
    assert weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)
    assert model.classifier.bias.abs().sum() == 0
    assert create_model("mobilenetv2", 10, dropout=1.0)(x[:, :3]).abs().sum() == 0


def test_shuffle_interleaves_and_pyramids_grow_by_alpha():
    assert shuffle(torch.arange(6).view(1, 6, 1, 1), 3).flatten().tolist() == [0, 2, 4, 1, 3, 5]
    model = create_model("pyramidnet110_84", 10)
    widths = [block.norms[-1].num_features for group in model.groups for block in group]
    assert widths == [round(16 + 84 * n / 54) for n in range(1, 55)] and widths[-1] == 100
    block = model.groups[1][0].eval()
    x = torch.randn(2, 44, 8, 8)
    out, _, shown = block(x)
    y = block.norms[2](block.convs[1](block.norms[1](block.convs[0](shown)).relu()))
    shortcut = F.avg_pool2d(x, 2)
    assert torch.equal(shown, block.norms[0](x))
    assert torch.allclose(out[:, :44], y[:, :44] + shortcut, atol=1e-6)
    assert torch.equal(out[:, 44:], y[:, 44:]), "new channels have nothing added"


@pytest.mark.parametrize("name, says", [
    ("wrn17_3", "6n+4"), ("wrn16_0", "width"), ("wrn4_1", "6n+4"), ("resnet21", "6n+2"),
    ("resnet2", "6n+2"), ("imagenet_resnet19", "known are"), ("18", "known are"),
    ("vit", "wrn16_3"), ("", "resnet20"), ("wrn16_3 ", "known are")])
def test_wrong_names_are_refused_and_keywords_arrive(name, says):
    with pytest.raises(UserError, match=re.escape(says)):
        create_model(name, 10)
    rates = {"mobilenetv2": 0.2, "mobilenetv2_half": 0.0, "imagenet_mobilenetv2": 0.2}
    assert all(create_model(name, 10).dropout.p == rate for name, rate in rates.items())
    assert create_model("mobilenetv2", 10, dropout=0.0).dropout.p == 0
    with pytest.raises(TypeError):
        create_model("wrn16_1", 10, droput=0.5)


# --- pairs, and weights in files ----------------------------------------------------------------
@pytest.mark.parametrize("teacher, student, refused", [
    ("wrn16_3", "wrn16_1", ""), ("vgg8", "resnet8", "count sizes"),
    ("wrn10_1", "shufflenetv1", "sizes"), ("mobilenetv2", "resnet20", ""),
    ("imagenet_resnet50", "imagenet_mobilenet", ""), ("resnet50", "imagenet_resnet18", "sizes")])
def test_pairs(teacher, student, refused):
    for kind, options in (("logits", {}), ("count", {"maps": ["stages"]}),
                          ("sizes", {"maps": ["entries", "stages"], "sizes": True})):
        if kind in refused:
            with pytest.raises(UserError, match=f"group . of {teacher} has .*, of {student} .*"
                               r"\((entries|stages), channels x height x width\)"):
                check_pair(teacher, student, pixels(student, 32), **options)
            continue
        pair = check_pair(teacher, student, pixels(student, 32), **options)
        for taps, name in zip(pair, (teacher, student)):
            assert [x.shape[1] for x in taps.stages] == create_model(name, 10).stage_channels
            assert taps.logits.is_meta and taps.logits.shape == (1, 10)


def test_a_network_of_ones_own_shows_the_maps_it_has(monkeypatch, capsys):
    class Plain(nn.Sequential):     # neither taps nor a classifier by that name
        def __init__(self, num_classes):
            super().__init__(nn.Conv2d(3, 4, 8), nn.Flatten(), nn.Linear(4 * 25 * 25, num_classes))

    class Shown(Plain):
        def forward(self, x, taps=False):
            return Taps(super().forward(x), stages=[self[0](x)]) if taps else super().forward(x)

    monkeypatch.setattr(common, "MAKERS", {"plain": Plain, "shown": Shown, "vgg8": MAKERS["vgg8"]})
    monkeypatch.setattr(common, "model_names", lambda: ["plain", "shown"])
    print_networks()
    assert re.search(r"plain +25,782 .*\nshown +25,782 .* 4x25 *\n", capsys.readouterr().out)
    teacher, student = check_pair("plain", "shown", 32)
    assert teacher.stages == () and len(student.stages) == 1
    assert check_pair("shown", "shown", 32, ["stages"], sizes=True)
    for names, size, maps, says in (
            (("resnet8", "plain"), 32, ["stages"], "plain has no maps to compare: its forward"),
            (("shown", "shown"), 32, ["stages", "pre_relu"], "must return Taps with pre_relu"),
            (("resnet8", "plain"), 64, [], "plain takes no images of 64 pixels, or none on the"),
            (("resnet8", "vgg8"), 4, [], "vgg8 takes no images of 4 pixels"),
            (("resnet8", "nothing"), 32, [], "unknown network nothing; known are plain")):
        with pytest.raises(UserError, match=says.replace("(", r"\(")):
            check_pair(*names, size, maps)


SOURCE = create_model("resnet8", 10)


def same(first, second):
    return all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


def test_weights_as_people_have_them(tmp_path):
    weights, more = SOURCE.state_dict(), {"epoch": 3, "args": Namespace(lr=0.1), "log": []}
    whole = b"".join(x.numpy().tobytes() for x in weights.values())
    hash_of_source = hashlib.sha256(whole).hexdigest()[:8]
    kinds = [(weights, {})]
    for key in ("model", "state_dict", "model_state_dict", "net"):
        kinds.append(({key: weights} | more, more))
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        kinds.append(({prefix + key: x for key, x in weights.items()}, {}))
    for content, rest in kinds:
        torch.save(content, tmp_path / "weights.pt")
        network = create_model("resnet8", 10)
        assert not same(network, SOURCE)
        found = load_weights(network, tmp_path / "weights.pt")
        assert found == rest | {"hash": hash_of_source} and same(network, SOURCE)


STEM, LAST = "stem.0.weight", "classifier.weight"
UNFIT = {       # a change of resnet8's weights, and what is said of it
    "its classifier.weight is (7, 64), not (10, 64)": lambda w: w | {LAST: torch.ones(7, 64)},
    "its module.classifier.weight is (7, 64), not (10, 64)":
        lambda w: {f"module.{key}": x for key, x in (w | {LAST: torch.ones(7, 64)}).items()},
    "it has no stem.0.weight": lambda w: {key: x for key, x in w.items() if key != STEM},
    "its more is (1,), not one of this": lambda w: {"model": w | {"more": torch.ones(1)}},
    "its stem.0.weight is int, not (16, 3, 3, 3)": lambda w: w | {STEM: 5},
    "its stem.0.weight is not finite (NaN or inf)": lambda w: w | {STEM: w[STEM] * torch.nan},
    "it has no stem.0.weight, ": lambda w: {}, "holds a list, not": lambda w: [1],
    "holds objects of Python beside tensors and numbers (torch.nn.modules.container.Sequential)":
        lambda w: nn.Sequential(nn.Linear(2, 2)),
    "and numbers (numpy._core.multiarray.scalar)": lambda w: {"net": w, "best": np.float64(1)},
    "is a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
    "is a web page": b"\n<!DOCTYPE html>", "is a text, not a checkpoint; it begins with {": b"{}",
    "is cut short, damaged": b"PK\x03\x04\0\0\x08", "is cut short, damaged or": b"",
    "No such file or directory": None}


@pytest.mark.parametrize("says", UNFIT)
def test_unfit_weights_are_named_and_none_is_loaded(says, tmp_path, recwarn):
    path, content, target = tmp_path / "wrong.pt", UNFIT[says], create_model("resnet8", 10)
    if callable(content):
        torch.save(content(SOURCE.state_dict()), path)
    elif content is not None:
        path.write_bytes(content)
    before = copy.deepcopy(target)
    with pytest.raises(UserError) as caught:
        load_weights(target, path)
    assert says.rstrip(", ") in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value) and not recwarn and same(target, before)


@pytest.mark.parametrize("theirs, ours", [
    ("resnet18", "resnet18"), ("resnet34", "resnet34"), ("resnet50", "resnet50"),
    ("mobilenet_v2", "mobilenetv2")])
def test_torchvisions_weights_give_torchvisions_outputs(theirs, ours, tmp_path):
    torch.manual_seed(0)
    with torch.device("meta"):      # without the initialisation, which takes most of the time
        published = getattr(torchvision.models, theirs)(num_classes=20).eval()
        network = create_model(f"imagenet_{ours}", 20).eval()
    network, weights = network.to_empty(device="cpu"), published.to_empty(device="cpu").state_dict()
    for key, x in weights.items():      # all unlike: none may stand for another
        if x.is_floating_point():
            x.uniform_(0.2, 0.5) if x.ndim == 1 else x.uniform_(-1, 1).div_(x[0].numel() ** 0.5)
    if ours in ("resnet34", "mobilenetv2"):     # as files of old have it
        weights = {key: x for key, x in weights.items() if not key.endswith("batches_tracked")}
    torch.save(weights, tmp_path / "published.pth")
    assert load_weights(network, tmp_path / "published.pth").keys() == {"hash"}
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits = published(images)
        assert torch.allclose(network(images), logits, rtol=1e-5, atol=1e-5 * logits.abs().max())
    assert logits.std() > 1e-3
    with pytest.raises(UserError, match="its (features.0.0|(layer1.0.)?conv1).weight is"):
        load_weights(create_model("resnet20", 20), tmp_path / "published.pth")


def test_published_weights_by_name(monkeypatch):
    weights, asked = torchvision.models.resnet18(num_classes=1000).state_dict(), []
    network, name = create_model("imagenet_resnet18", 1000), "ResNet18_Weights.IMAGENET1K_V1"

    def fetch(self, **options):
        asked.append(self.url)
        if len(asked) > 1:
            raise urllib.error.URLError("no route to host")
        return weights

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", fetch)
    load_weights(network, name)
    assert asked[0].startswith("https://download.pytorch.org/models/resnet18")
    assert torch.equal(network.classifier.weight, weights["fc.weight"])
    for wrong, says in ((name, "models/resnet18-"), ("ResNet18_Weights.NO", "has no Res"),
                        ("None_Weights.DEFAULT", "has no None"), ("ResNet18.pth", "No such file")):
        with pytest.raises(UserError, match=says):
            load_weights(network, wrong)
