"""The networks: their sizes to the parameter, and what their taps show."""
import functools
import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from common import (
    PAIRS, Taps, UserError, check_pair, create_model, load_data, load_weights, model_names,
    new_model, print_networks, pyramidnet, shuffle, weights_hash)

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
    "imagenet_mobilenet": (3_217_226, 3_309_476)}
OF_1000 = {     # at ImageNet's 1000 classes: what the papers and torchvision say
    "imagenet_resnet18": 11_689_512, "imagenet_resnet34": 21_797_672,
    "imagenet_resnet50": 25_557_032, "imagenet_resnet101": 44_549_160,
    "imagenet_resnet152": 60_192_808, "imagenet_mobilenet": 4_231_976}
NAMES = ["wrn10_2", "wrn16_1", "wrn16_3", "resnet8", "resnet20", "resnet8x4", "resnet50",
         "mobilenetv2", "mobilenetv2_half", "vgg8", "vgg13", "shufflenetv1", "shufflenetv2",
         "pyramidnet110_84", "imagenet_resnet18", "imagenet_resnet50", "imagenet_mobilenet"]
# pixels of the groups of an image of 32, where they are not 32, 16 and 8
SIZES = {"resnet50": [32, 16, 8, 4], "vgg8": [16, 8, 4, 4], "vgg13": [16, 8, 4, 4],
         "mobilenetv2_half": [16, 8, 4, 2], "shufflenetv1": [16, 8, 4], "shufflenetv2": [16, 8, 4]}
SIZES |= {name: [8, 4, 2, 1] for name in OF_1000}
# what the papers and their code distil, as (channels, pixels): Overhaul's positions in PyramidNet
PRE_RELU = {"pyramidnet200_240": [(100, 32), (180, 16), (1024, 8)],
            "pyramidnet110_84": [(44, 32), (72, 16), (100, 8)],
            "wrn28_4": [(64, 32), (128, 16), (256, 8)], "resnet56": [(16, 32), (32, 16), (64, 8)],
            "imagenet_mobilenet": [(128, 56), (256, 28), (512, 14), (1024, 7)]}
PRE_RELU |= {name: [(256, 56), (512, 28), (1024, 14), (2048, 7)]
             for name in ("imagenet_resnet50", "imagenet_resnet152")}
# whose maps in front of the ReLU are a norm's output plus the shortcut
SUMS = ("resnet", "shufflenetv1", "imagenet_resnet")
# whose groups begin narrower than they end
NARROWER = ("mobilenet", "vgg8", "pyramidnet")


def pixels(name: str, small: int) -> int:
    """The side of a test's image: four times `small` where the stem divides it by four."""
    return 4 * small if name in OF_1000 else small


def test_every_name_has_its_count():
    assert set(model_names()) == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("index, classes", [(0, 10), (1, 100)])
def test_parameter_count(name, index, classes):
    with torch.device("meta"):
        model = create_model(name, classes)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == COUNTS[name][index]


@pytest.mark.parametrize("name", OF_1000)
def test_parameter_count_on_imagenet(name):
    with torch.device("meta"):
        model = create_model(name, 1000)
    assert sum(p.numel() for p in model.parameters()) == OF_1000[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [16, 32])
def test_taps_have_the_groups_shapes(name, size):
    model, size = create_model(name, 7).eval(), pixels(name, size)
    taps = model(torch.randn(2, 3, size, size), taps=True)
    sizes = [(side * size // 32,) * 2 for side in SIZES.get(name, [32, 16, 8])]
    assert isinstance(taps, Taps) and taps.logits.shape == (2, 7)
    assert [tuple(x.shape[-2:]) for x in taps.entries] == sizes
    assert [tuple(x.shape[-2:]) for x in taps.stages] == sizes
    assert [tuple(x.shape[-2:]) for x in taps.pre_relu] == sizes
    assert [x.shape[1] for x in taps.stages] == model.stage_channels
    assert [x.shape[1] for x in taps.pre_relu] == [n.num_features for n in model.pre_relu_norms]
    if not name.startswith(NARROWER):
        assert [x.shape[1] for x in taps.entries] == model.stage_channels


@pytest.mark.parametrize("name", NAMES)
def test_taps_do_not_change_the_logits(name):
    model, x = create_model(name, 10).eval(), torch.randn(4, 3, 32, 32)
    assert torch.equal(model(x), model(x, taps=True).logits)


@pytest.mark.parametrize("name", NAMES)
def test_one_forward_pass_runs_each_norm_once(name):
    model, size = create_model(name, 10).train(), pixels(name, 16)
    model(torch.randn(4, 3, size, size), taps=True)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(m.num_batches_tracked.item() == 1 for m in norms)


@pytest.mark.parametrize("name", NAMES)
def test_returned_maps_are_never_overwritten(name):
    """Each tap still holds what its module gave: an in-place ReLU after it would show."""
    model = create_model(name, 10).train()
    seen = {}

    def remember(module, inputs, output):
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, torch.Tensor):
                seen[id(tensor)] = (tensor, tensor.detach().clone())

    for module in model.modules():
        module.register_forward_hook(remember)
    size = pixels(name, 16)
    taps = model(torch.randn(4, 3, size, size), taps=True)
    maps = [*taps.entries, *taps.stages, *taps.pre_relu]
    assert sum(id(tensor) in seen for tensor in maps) >= 4
    for tensor in maps:
        assert tensor._version == 0
        assert id(tensor) not in seen or torch.equal(tensor, seen[id(tensor)][1])


@pytest.mark.parametrize("name", NAMES)
def test_pre_relu_is_what_the_named_norm_feeds(name):
    """The norm's own output, or in ResNets and ShuffleNetV1 that plus the shortcut."""
    model = create_model(name, 10).eval()
    outputs = {}
    for norm in model.pre_relu_norms:
        norm.register_forward_hook(lambda module, _, output: outputs.__setitem__(module, output))
    taps = model(torch.randn(2, 3, 32, 32), taps=True)
    for norm, tap, stage in zip(model.pre_relu_norms, taps.pre_relu, taps.stages):
        if name.startswith(SUMS):
            assert torch.equal(tap.relu(), stage) and not torch.equal(tap, outputs[norm])
        else:
            assert torch.equal(tap, outputs[norm])
        assert (tap < 0).any(), "in front of the ReLU there are negative values"


@pytest.mark.parametrize("name, blocks", [("wrn16_1", 2), ("resnet20", 3)])
def test_stages_and_entries_are_the_blocks_outputs(name, blocks):
    model = create_model(name, 10).eval()
    outputs = {}
    for group in model.groups:
        assert len(group) == blocks
        for block in group:
            block.register_forward_hook(lambda m, _, output: outputs.__setitem__(m, output[0]))
    taps = model(torch.randn(2, 3, 32, 32), taps=True)
    for group, entry, stage in zip(model.groups, taps.entries, taps.stages):
        assert torch.equal(entry, outputs[group[0]]) and torch.equal(stage, outputs[group[-1]])


def test_wrn_shortcut_sees_the_activated_input():
    model = create_model("wrn16_1", 10)
    assert model.groups[0][0].shortcut is None          # 16 to 16 channels
    block = model.groups[1][0].eval()
    x = torch.randn(2, 16, 8, 8)
    branch = block.conv2(block.norm2(block.conv1(block.norm1(x).relu())).relu())
    assert torch.allclose(block(x)[0], branch + block.shortcut(block.norm1(x).relu()), atol=1e-6)


def test_initialisation_is_he_fan_out():
    torch.manual_seed(0)
    model = create_model("wrn16_8", 10)
    weight = model.groups[2][1].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)
    assert model.classifier.bias.abs().sum() == 0


@pytest.mark.parametrize("name", PRE_RELU)
def test_the_overhaul_papers_positions(name):
    with torch.device("meta"), torch.no_grad():
        size = 224 if name in OF_1000 else 32
        taps = create_model(name, 100).eval()(torch.empty(1, 3, size, size), taps=True)
    assert [tuple(x.shape[1:3]) for x in taps.pre_relu] == PRE_RELU[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_first_relu_after_a_group_sees_the_pre_relu_map(name, monkeypatch):
    """Seen from the activations' side: what enters them, in the order of the pass."""
    model = create_model(name, 10).eval()
    entered = []

    def note(activation):
        return lambda x, **_: (entered.append(x), activation(x))[1]

    for function in ("relu", "relu6"):
        monkeypatch.setattr(torch.nn.functional, function,
                            note(getattr(torch.nn.functional, function)))
    for module in model.modules():
        if callable(getattr(module, "activation", None)):
            module.activation = note(module.activation)
    taps = model(torch.randn(2, 3, 32, 32), taps=True)
    order = [next((n for n, x in enumerate(entered) if x is tap), None) for tap in taps.pre_relu]
    if name == "pyramidnet110_84":      # the paper's code taps the norm before the strided one
        order = order[-1:]
    assert None not in order and order == sorted(order) and len(set(order)) == len(order)


@functools.cache
def sizes_of(name: str) -> list[int]:
    with torch.device("meta"), torch.no_grad():
        taps = create_model(name, 10).eval()(torch.empty(1, 3, 32, 32), taps=True)
    return [x.shape[2] for x in taps.stages]


@pytest.mark.parametrize("pair", sorted({pair for pairs in PAIRS.values() for pair in pairs}))
def test_the_papers_pairs_have_groups_that_pair(pair):
    """FSP and AT want as many groups, ATang and Overhaul their own pairs of equal sizes too."""
    sizes = [sizes_of(name) for name in pair]
    assert len(sizes[0]) == len(sizes[1])
    alike = [table for table, pairs in PAIRS.items() if pair in pairs
             and table.startswith(("ATang", "FSP", "Overhaul"))]
    assert sizes[0] == sizes[1] or not alike


def test_the_printed_table(capsys):
    print_networks()
    lines = capsys.readouterr().out.splitlines()
    for name, (small, large) in COUNTS.items():
        line = next(line for line in lines if line.startswith(f"{name} "))
        assert line.split()[1:3] == [f"{small:,}", f"{large:,}"]
        assert name not in OF_1000 or line.split()[3] == f"{OF_1000[name]:,}"
    row = next(line for line in lines if line.startswith("wrn16_3 "))
    assert row.split()[4:] == ["48x32", "96x16", "192x8"] * 3
    row = next(line for line in lines if line.startswith("imagenet_resnet18 "))
    assert row.split()[4:] == ["64x56", "128x28", "256x14", "512x7"] * 3
    assert any("resnet20 from mobilenetv2" in line for line in lines)


def test_shuffle_interleaves():
    x = torch.arange(6.0).view(1, 6, 1, 1)
    assert shuffle(x, 3).flatten().tolist() == [0, 2, 4, 1, 3, 5]


def test_pyramids_grow_by_alpha():
    model = create_model("pyramidnet110_84", 10)
    widths = [block.norms[-1].num_features for group in model.groups for block in group]
    assert widths == [round(16 + 84 * n / 54) for n in range(1, 55)] and widths[-1] == 100
    block = model.groups[1][0].eval()
    x = torch.randn(2, 44, 8, 8)
    out, _, shown = block(x)
    y = block.norms[2](block.convs[1](block.norms[1](block.convs[0](shown)).relu()))
    shortcut = torch.nn.functional.avg_pool2d(x, 2)
    assert torch.equal(shown, block.norms[0](x))
    assert torch.allclose(out[:, :44], y[:, :44] + shortcut, atol=1e-6)
    assert torch.equal(out[:, 44:], y[:, 44:]), "new channels have nothing added"


@pytest.mark.parametrize("name", ["mobilenetv2", "shufflenetv2", "pyramidnet"])
def test_forward_compiles_as_one_graph(name):
    """Those with unusual blocks; of the others the steps are compiled in test_compile.py."""
    small = name == "pyramidnet"        # one of 20 layers, to spare time
    model = pyramidnet(20, 12, False, 10) if small else create_model(name, 10)
    model, x = model.eval(), torch.randn(2, 3, 16, 16)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        ours, theirs = compiled(x, taps=True), model(x, taps=True)
    assert torch.equal(ours.logits, theirs.logits)
    assert all(torch.equal(a, b) for a, b in zip(ours.stages, theirs.stages))


@pytest.mark.parametrize("name, says", [
    ("wrn17_3", "6n+4"), ("wrn16_0", "width"), ("wrn4_1", "6n+4"), ("resnet21", "6n+2"),
    ("resnet2", "6n+2"), ("imagenet_resnet19", "known are"), ("18", "known are"),
    ("vit", "wrn16_3"), ("", "resnet20"), ("wrn16_3 ", "known are")])
def test_wrong_names_are_refused(name, says):
    with pytest.raises(ValueError, match=says.replace("+", r"\+")):
        create_model(name, 10)


def test_keywords_reach_the_network():
    assert create_model("mobilenetv2", 10).dropout.p == 0.2
    assert create_model("mobilenetv2_half", 10).dropout.p == 0
    assert create_model("mobilenetv2", 10, dropout=0.5).dropout.p == 0.5
    with pytest.raises(TypeError):
        create_model("wrn16_1", 10, droput=0.5)


# --- weights in files, and pairs ----------------------------------------------------------------

def test_weights_are_loaded_whole_or_not_at_all(tmp_path):
    source, target = create_model("resnet8", 10), create_model("resnet8", 10)
    weights = source.state_dict()
    torch.save({"model": weights | {"connectors.0.weight": torch.ones(3)}}, tmp_path / "run.pt")
    torch.save(weights, tmp_path / "plain.pt")
    for name in ("run.pt", "plain.pt"):
        target = create_model("resnet8", 10)
        load_weights(target, tmp_path / name)
        assert weights_hash(target) == weights_hash(source)
    before = weights_hash(target)
    stem = "stem.0.weight"
    for wrong, says in (
            ({**weights, "classifier.weight": torch.ones(7, 64)},
             "its classifier.weight is (7, 64), not (10, 64)"),
            ({key: x for key, x in weights.items() if key != stem}, f"its {stem} is missing, not"),
            ({**weights, "more": torch.ones(1)}, "its more is (1,), not missing"),
            ({**weights, stem: 5}, f"its {stem} is 5, not"), ({}, "is missing, not"),
            ([1], "holds a list")):
        torch.save(wrong, tmp_path / "wrong.pt")
        with pytest.raises(UserError) as caught:
            load_weights(target, tmp_path / "wrong.pt")
        assert says in str(caught.value) and "wrong.pt" in str(caught.value)
        assert weights_hash(target) == before


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_torchvisions_weights_give_torchvisions_outputs(depth, tmp_path):
    torch.manual_seed(depth)
    with torch.device("meta"):      # without the initialisation, which takes most of the time
        theirs = getattr(torchvision.models, f"resnet{depth}")(num_classes=20).eval()
        ours = create_model(f"imagenet_resnet{depth}", 20).eval()
    ours, theirs = ours.to_empty(device="cpu"), theirs.to_empty(device="cpu")
    weights = theirs.state_dict()
    for key, x in weights.items():      # all unlike: none may stand for another
        if x.is_floating_point():
            x.uniform_(0.2, 0.5) if x.ndim == 1 else x.uniform_(-1, 1).div_(x[0].numel() ** 0.5)
    if depth == 34:     # as files of old have it
        weights = {key: x for key, x in weights.items() if not key.endswith("batches_tracked")}
    torch.save(weights, tmp_path / "published.pth")
    load_weights(ours, tmp_path / "published.pth")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits = theirs(images)
        assert torch.allclose(ours(images), logits, rtol=1e-5, atol=1e-5 * logits.abs().max())
    assert logits.std() > 1e-3
    if depth == 50:
        with pytest.raises(UserError, match="is of another network"):
            load_weights(create_model("imagenet_resnet18", 20), tmp_path / "published.pth")


def test_published_weights_by_name(monkeypatch):
    weights = torchvision.models.resnet18(num_classes=1000).state_dict()
    name, asked = Path("ResNet18_Weights.IMAGENET1K_V1"), []

    def fetch(self, **options):
        asked.append(self.url)
        return weights

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", fetch)
    network = create_model("imagenet_resnet18", 1000)
    load_weights(network, name)
    assert asked[0].startswith("https://download.pytorch.org/models/resnet18")
    assert torch.equal(network.classifier.weight, weights["fc.weight"])

    def offline(self, **options):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", offline)
    for wrong, says in ((name, "models/resnet18-"), (Path("ResNet18_Weights.NO"), "has no such"),
                        (Path("None_Weights.DEFAULT"), "has no such"),
                        (Path("ResNet18.pth"), "is missing")):
        with pytest.raises(UserError, match=says):
            load_weights(network, wrong)


def test_the_hash_sees_every_weight_and_statistic():
    network = create_model("wrn10_1", 10)
    first = weights_hash(network)
    assert first == weights_hash(network) and len(first) == 64
    for key, value in network.state_dict().items():
        if value.is_floating_point():
            kept = value.clone()
            value.view(-1)[-1] += 1
            assert weights_hash(network) != first, key
            value.copy_(kept)
    assert first == weights_hash(network)


def test_a_seed_makes_one_network():
    loader = load_data("shapes", "", 32, "cpu", augment=False, seed=0, train_images=100)[0]
    hashes = [weights_hash(new_model("wrn10_1", loader, seed)) for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]
    weight = new_model("wrn10_1", loader, 0).groups[1][0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("teacher, student, refused", [
    ("wrn16_3", "wrn16_1", ""), ("vgg8", "resnet8", "count sizes"),
    ("wrn10_1", "shufflenetv1", "sizes"), ("resnet50", "mobilenetv2_half", "sizes"),
    ("mobilenetv2", "resnet20", ""), ("imagenet_resnet152", "imagenet_mobilenet", ""),
    ("resnet50", "imagenet_resnet18", "sizes")])
def test_pairs(teacher, student, refused):
    for alike in ("", "count", "sizes"):
        if alike and alike in refused:
            with pytest.raises(UserError, match=f"of {teacher} ends in .* of {student} in"):
                check_pair(teacher, student, pixels(student, 32), alike)
        else:
            check_pair(teacher, student, pixels(student, 32), alike)
