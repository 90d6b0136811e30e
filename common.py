"""Networks and data sets for the method scripts, their files and flags. Nothing here trains.

    model = create_model("wrn16_1", num_classes=10)
    logits = model(images)                     # (N, 3, H, W) normalised -> (N, num_classes)
    taps = model(images, taps=True)            # Taps(logits, entries, stages, pre_relu)
    train_loader, test_loader = load_data("shapes", "data", 64, torch.device("cpu"),
                                          augment=True, seed=0)

`python common.py` prints every network's size and maps, and the pairs of the papers' tables.
"""
import ctypes
import hashlib
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import sys
import warnings
from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction
from functools import partial
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor, resize


class UserError(ValueError):
    """What the person at the keyboard can mend; a script prints its message as one line."""


def one_line(error: Exception) -> str:
    """What a user can mend, in one line; any other error is raised again, traceback and all."""
    if "allocate memory" in str(error) or isinstance(error, torch.OutOfMemoryError):
        return "error: out of memory: choose a smaller --batch-size, --image-size or network"
    if isinstance(error, UserError | OSError):
        return " ".join(f"error: {error}".split())
    raise error


def full(x: Tensor) -> Tensor:
    """float16 and bfloat16 to float32; float32 and float64 stay what they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ================================================================================================
# Networks
# ================================================================================================


class Taps(NamedTuple):
    """What one forward pass shows of a network; the lists run from the input to the output.

    A group is a run of blocks of equal spatial size: three in most networks, four in some.
    """
    logits: Tensor           # (N, num_classes)
    entries: list[Tensor]    # first map of each group (FSP's first map), (N, C, H, W)
    stages: list[Tensor]     # last map of each group (AT, ATang, FSP's second map)
    pre_relu: list[Tensor]   # what enters the first ReLU after each group


class Network(nn.Module):
    """Stem, groups of blocks, head, classifier: the one forward pass of all families.

    A block returns three maps: its output, the first map inside it, and the one it shows of those
    that enter a ReLU. Blocks of a network without a head end in a ReLU and show what enters it.
    With a head the first ReLU after a group is in the next block, or in the head, and shown there.
    """

    def __init__(self, stem: nn.Module, groups: nn.ModuleList, head: nn.Module | None,
                 stage_channels: list[int], pre_relu_norms: list[nn.BatchNorm2d],
                 num_classes: int, activation: Callable = F.relu, dropout: float = 0.0,
                 last_stage_is_head: bool = False):
        super().__init__()
        self.stem, self.groups, self.head = stem, groups, head
        self.stage_channels = stage_channels
        self.pre_relu_norms = pre_relu_norms        # which put out the maps of Taps.pre_relu
        self.pre_relu_channels = [norm.num_features for norm in pre_relu_norms]
        self.activation, self.last_stage_is_head = activation, last_stage_is_head
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(self.pre_relu_channels[-1], num_classes)
        initialise(self)

    def forward(self, x: Tensor, taps: bool = False) -> Tensor | Taps:
        entries, stages, first_shown, last_shown = [], [], [], []
        x = self.stem(x)
        for group in self.groups:
            for index, block in enumerate(group):
                x, inner, shown = block(x)
                if index == 0:
                    # a group of one block has no other first map than the one inside it
                    entries.append(x if len(group) > 1 else inner)
                    first_shown.append(shown)
            stages.append(x)
            last_shown.append(shown)
        pre_relu = last_shown
        if self.head is not None:
            normed = self.head(x)
            x = self.activation(normed)
            pre_relu = [*first_shown[1:], normed]
            if self.last_stage_is_head:
                stages[-1] = x
        logits = self.classifier(self.dropout(x.mean((2, 3))))
        return Taps(logits, entries, stages, pre_relu) if taps else logits


def initialise(network: nn.Module) -> None:
    """He initialisation, fan-out: N(0, sqrt(2 / (k * k * channels_out))); BatchNorm 1 and 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.weight[0, 0].numel() * module.out_channels
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def group_of(block: Callable, count: int, channels_in: int, channels_out: int,
             stride: int) -> nn.ModuleList:
    """`count` blocks, of which the first changes the width and the size."""
    group = nn.ModuleList([block(channels_in, channels_out, stride)])
    for _ in range(count - 1):
        group.append(block(channels_out, channels_out, 1))
    return group


class PreActivationBlock(nn.Module):
    """BatchNorm - ReLU - 3x3 - BatchNorm - ReLU - 3x3; the shortcut sees the activated input."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.shortcut = (nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
                         if channels_in != channels_out else None)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normed = self.norm1(x)
        active = F.relu(normed)
        inner = F.relu(self.norm2(self.conv1(active)))
        residual = x if self.shortcut is None else self.shortcut(active)
        return residual + self.conv2(inner), inner, normed


def wide_resnet(depth: int, width: int, num_classes: int) -> Network:
    """WRN-depth-width (Zagoruyko and Komodakis 2016), depth = 6n + 4, no dropout."""
    channels = [16, 16 * width, 32 * width, 64 * width]
    stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
    groups = nn.ModuleList()
    for number, stride in enumerate((1, 2, 2)):
        groups.append(group_of(PreActivationBlock, (depth - 4) // 6, channels[number],
                               channels[number + 1], stride))
    head = nn.BatchNorm2d(channels[-1])
    norms = [groups[1][0].norm1, groups[2][0].norm1, head]
    return Network(stem, groups, head, channels[1:], norms, num_classes)


def projection(channels_in: int, channels_out: int, stride: int) -> nn.Module:
    """The shortcut of a ResNet's block: 1x1 and BatchNorm where the shape changes."""
    if stride == 1 and channels_in == channels_out:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, 1, stride, bias=False),
                         nn.BatchNorm2d(channels_out))


class BasicBlock(nn.Module):
    """3x3 - BatchNorm - ReLU - 3x3 - BatchNorm, plus shortcut, ReLU."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.last_norm = nn.BatchNorm2d(channels_out)
        self.shortcut = projection(channels_in, channels_out, stride)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inner = F.relu(self.norm1(self.conv1(x)))
        total = self.last_norm(self.conv2(inner)) + self.shortcut(x)
        return F.relu(total), inner, total


class Bottleneck(nn.Module):
    """1x1 to a quarter of the channels - 3x3 - 1x1, each with BatchNorm, plus shortcut, ReLU."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        planes = channels_out // 4
        self.conv1 = nn.Conv2d(channels_in, planes, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, channels_out, 1, bias=False)
        self.last_norm = nn.BatchNorm2d(channels_out)
        self.shortcut = projection(channels_in, channels_out, stride)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inner = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(inner)))
        total = self.last_norm(self.conv3(y)) + self.shortcut(x)
        return F.relu(total), inner, total


def resnet(block: type, counts: list[int], channels: list[int], num_classes: int) -> Network:
    """Residual network for small images (He et al. 2016), with 1x1 convolution shortcuts.

    resnet20: depth 6n + 2 in three groups of n basic blocks, 16 to 64 channels; resnet8x4: four
    times as wide, with a stem of 32 channels; resnet50: four groups of bottlenecks.
    """
    stem = nn.Sequential(nn.Conv2d(3, channels[0], 3, 1, 1, bias=False),
                         nn.BatchNorm2d(channels[0]), nn.ReLU())
    groups = nn.ModuleList()
    for number, count in enumerate(counts):
        groups.append(group_of(block, count, channels[number], channels[number + 1],
                               2 if number else 1))
    norms = [group[-1].last_norm for group in groups]
    return Network(stem, groups, None, channels[1:], norms, num_classes)


class PyramidBlock(nn.Module):
    """BatchNorm first and no ReLU before the first convolution or after the block.

    basic: two 3x3; bottleneck: 1x1, 3x3, 1x1 to four times the planes. The shortcut has no weights:
    it averages 2x2 pixels where the size halves and pads the missing channels with zeros.
    """

    def __init__(self, channels_in: int, planes: int, stride: int, bottleneck: bool):
        super().__init__()
        kernels = [1, 3, 1] if bottleneck else [3, 3]
        widths = [channels_in] + [planes] * len(kernels)
        widths[-1] *= 4 if bottleneck else 1
        self.stride, self.bottleneck = stride, bottleneck
        self.norms = nn.ModuleList([nn.BatchNorm2d(width) for width in widths])
        self.convs = nn.ModuleList()
        for index, kernel in enumerate(kernels):
            self.convs.append(nn.Conv2d(widths[index], widths[index + 1], kernel,
                                        stride if index == len(kernels) - 2 else 1, kernel // 2,
                                        bias=False))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normed = self.norms[0](x)
        inner = y = self.norms[1](self.convs[0](normed))
        for conv, norm in zip(self.convs[1:], self.norms[2:]):
            y = norm(conv(F.relu(y)))
        if self.stride == 2:
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        y = y + F.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))
        # a basic block's first convolution halves the size already: there its input is shown
        return y, inner, inner if self.bottleneck else normed


def pyramidnet(depth: int, alpha: int, bottleneck: bool, num_classes: int) -> Network:
    """PyramidNet-depth (alpha) (Han et al. 2017): every block is alpha / #blocks planes wider."""
    count = (depth - 2) // (9 if bottleneck else 6)
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16))
    groups, stage_channels = nn.ModuleList(), []
    channels, width = 16, 16.0
    for number in range(3):
        blocks = nn.ModuleList()
        for index in range(count):
            width += alpha / (3 * count)
            stride = 2 if number > 0 and index == 0 else 1
            blocks.append(PyramidBlock(channels, round(width), stride, bottleneck))
            channels = round(width) * (4 if bottleneck else 1)
        groups.append(blocks)
        stage_channels.append(channels)
    head = nn.BatchNorm2d(channels)
    norms = [group[0].norms[int(bottleneck)] for group in groups[1:]] + [head]
    return Network(stem, groups, head, stage_channels, norms, num_classes)


class VGGBlock(nn.Module):
    """3x3 - BatchNorm - ReLU, after 2x2 max-pooling where `pool` says so."""

    def __init__(self, channels_in: int, channels_out: int, pool: bool):
        super().__init__()
        self.pool = pool
        self.conv = nn.Conv2d(channels_in, channels_out, 3, 1, 1)
        self.norm = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.pool:
            x = F.max_pool2d(x, 2)
        normed = self.norm(self.conv(x))
        return F.relu(normed), x, normed


def vgg(convolutions: int, num_classes: int) -> Network:
    """VGG with BatchNorm: five runs of 3x3 convolutions, max-pooling after the first three.

    The first run, at full size, is the stem: four groups of a half to an eighth of it. The first
    map of a group of one convolution is what enters that.
    """
    layers, channels = [], 3
    for _ in range(convolutions):
        layers += [nn.Conv2d(channels, 64, 3, 1, 1), nn.BatchNorm2d(64), nn.ReLU()]
        channels = 64
    groups, stage_channels = nn.ModuleList(), [128, 256, 512, 512]
    for number, channels_out in enumerate(stage_channels):
        blocks = nn.ModuleList()
        for index in range(convolutions):
            blocks.append(VGGBlock(channels, channels_out, pool=index == 0 and number < 3))
            channels = channels_out
        groups.append(blocks)
    norms = [group[-1].norm for group in groups]
    network = Network(nn.Sequential(*layers), groups, None, stage_channels, norms, num_classes)
    nn.init.normal_(network.classifier.weight, 0.0, 0.01)
    return network


class InvertedResidual(nn.Module):
    """1x1 expansion - 3x3 depthwise - 1x1 projection, BatchNorm after each, activation after two.

    Without an expansion convolution where `expansion` is 0.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int, expansion: int,
                 activation: Callable):
        super().__init__()
        hidden = channels_in * (expansion or 1)
        self.activation = activation
        self.expand = nn.Conv2d(channels_in, hidden, 1, bias=False) if expansion else None
        self.norm1 = nn.BatchNorm2d(hidden) if expansion else None
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.project = nn.Conv2d(hidden, channels_out, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels_out)
        self.residual = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normed = x if self.expand is None else self.norm1(self.expand(x))
        inner = normed if self.expand is None else self.activation(normed)
        y = self.norm3(self.project(self.activation(self.norm2(self.depthwise(inner)))))
        return x + y if self.residual else y, inner, normed


# stem: channels and stride; last 1x1; activation; per group: (expansion, channels, blocks, stride)
MOBILENETS = {
    "mobilenetv2": ((8, 1), 640, F.relu6, [[(0, 8, 1, 1), (6, 16, 2, 1)],
                                           [(6, 16, 3, 2), (6, 32, 4, 1), (6, 48, 3, 1)],
                                           [(6, 80, 3, 2), (6, 160, 1, 1)]]),
    "mobilenetv2_half": ((16, 2), 1280, F.relu, [[(1, 8, 1, 1), (6, 12, 2, 1)],
                                                 [(6, 16, 3, 2)],
                                                 [(6, 32, 4, 2), (6, 48, 3, 1)],
                                                 [(6, 80, 3, 2), (6, 160, 1, 1)]])}


def mobilenetv2(form: str, num_classes: int, dropout: float | None = None) -> Network:
    """MobileNetV2 (Sandler et al. 2018) for small images, in the two forms of the papers' tables.

    mobilenetv2: the ATang paper's Table 4, 0.6M weights, maps of 32, 16 and 8 pixels; its last
    stage ends after the 1x1 convolution to 640 channels; dropout 0.2, as in its authors' class.
    mobilenetv2_half: the CIFAR-100 tables', half the width of the original, maps of 16 to 2 pixels.
    """
    (channels, stem_stride), last, activation, layout = MOBILENETS[form]
    of_atang = form == "mobilenetv2"
    stem = nn.Sequential(nn.Conv2d(3, channels, 3, stem_stride, 1, bias=False),
                         nn.BatchNorm2d(channels), nn.ReLU6() if of_atang else nn.ReLU())
    groups, stage_channels = nn.ModuleList(), []
    for rows in layout:
        blocks = nn.ModuleList()
        for expansion, channels_out, count, stride in rows:
            for index in range(count):
                blocks.append(InvertedResidual(channels, channels_out, 1 if index else stride,
                                               expansion, activation))
                channels = channels_out
        groups.append(blocks)
        stage_channels.append(channels)
    head = nn.Sequential(nn.Conv2d(channels, last, 1, bias=False), nn.BatchNorm2d(last))
    if of_atang:
        stage_channels[-1] = last
    if dropout is None:
        dropout = 0.2 if of_atang else 0.0
    norms = [group[0].norm1 for group in groups[1:]] + [head[1]]
    network = Network(stem, groups, head, stage_channels, norms, num_classes, activation, dropout,
                      last_stage_is_head=of_atang)
    nn.init.normal_(network.classifier.weight, 0.0, 0.01)
    return network


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of `groups` groups, so that the next grouped convolution mixes."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class ShuffleBlockV1(nn.Module):
    """1x1 - shuffle - 3x3 depthwise - 1x1, the 1x1 in three groups; plus shortcut, ReLU.

    At stride 2 the averaged input is not added but stands beside the new channels.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        new = channels_out - channels_in if stride == 2 else channels_out
        hidden = new // 4
        self.stride, self.groups = stride, 1 if channels_in == 24 else 3    # 24: after the stem
        self.conv1 = nn.Conv2d(channels_in, hidden, 1, groups=self.groups, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, new, 1, groups=3, bias=False)
        self.last_norm = nn.BatchNorm2d(new)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inner = F.relu(self.norm1(self.conv1(x)))
        y = self.depthwise(shuffle(inner, self.groups))
        y = self.last_norm(self.conv3(F.relu(self.norm2(y))))
        total = torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1) if self.stride == 2 else y + x
        return F.relu(total), inner, total


class ShuffleBlockV2(nn.Module):
    """Half of the channels pass, half go through 1x1 - 3x3 depthwise - 1x1; then a shuffle.

    At stride 2 both halves are made from the whole input, the first by 3x3 depthwise - 1x1.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        half = channels_out // 2
        self.stride = stride
        self.side = nn.Sequential(
            nn.Conv2d(channels_in, channels_in, 3, 2, 1, groups=channels_in, bias=False),
            nn.BatchNorm2d(channels_in),
            nn.Conv2d(channels_in, half, 1, bias=False),
            nn.BatchNorm2d(half)) if stride == 2 else None
        self.conv1 = nn.Conv2d(channels_in if stride == 2 else half, half, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(half)
        self.depthwise = nn.Conv2d(half, half, 3, stride, 1, groups=half, bias=False)
        self.norm2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept, worked = (F.relu(self.side(x)), x) if self.stride == 2 else x.chunk(2, 1)
        normed = self.norm1(self.conv1(worked))
        inner = F.relu(normed)
        y = F.relu(self.norm3(self.conv3(self.norm2(self.depthwise(inner)))))
        return shuffle(torch.cat([kept, y], 1), 2), inner, normed


def shufflenet(version: int, num_classes: int) -> Network:
    """ShuffleNet (Zhang et al. 2018), three groups in every 1x1, or ShuffleNetV2 (Ma et al. 2018).

    V2 is of size 1; the stems of both have no stride.
    """
    block = ShuffleBlockV1 if version == 1 else ShuffleBlockV2
    channels = [24, 240, 480, 960] if version == 1 else [24, 116, 232, 464]
    stem = nn.Sequential(nn.Conv2d(3, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
    groups, head = nn.ModuleList(), None
    for number, count in enumerate((4, 8, 4)):
        groups.append(group_of(block, count, channels[number], channels[number + 1], 2))
    if version == 1:
        norms = [group[-1].last_norm for group in groups]
    else:
        head = nn.Sequential(nn.Conv2d(464, 1024, 1, bias=False), nn.BatchNorm2d(1024))
        norms = [group[0].norm1 for group in groups[1:]] + [head[1]]
    return Network(stem, groups, head, channels[1:], norms, num_classes)


# The pairs of networks, teacher and student, of the papers' tables on small images.
PAIRS = {
    "ATang, Tables 2 to 4 (CIFAR-10, CINIC-10)": [
        ("wrn16_3", "wrn16_1"), ("wrn28_3", "wrn16_1"), ("wrn28_3", "wrn16_3"),
        ("resnet44", "wrn16_1"), ("mobilenetv2", "resnet20")],
    "ATang, Table 5 (CINIC-10)": [
        ("wrn28_3", "resnet20"), ("wrn16_3", "resnet20"), ("wrn16_8", "wrn28_1"),
        ("wrn28_6", "wrn16_8")],
    "FSP, Table 1 of Liu's report (CIFAR-100)": [("resnet32", "resnet32")],
    "Overhaul, Table 2 (CIFAR-100), settings a to f": [
        ("wrn28_4", "wrn16_4"), ("wrn28_4", "wrn28_2"), ("wrn28_4", "wrn16_2"),
        ("wrn28_4", "resnet56"), ("pyramidnet200_240", "wrn28_4"),
        ("pyramidnet200_240", "pyramidnet110_84")],
    "SKD, Table 3 (CIFAR-100)": [
        ("wrn40_2", "wrn16_2"), ("wrn40_2", "wrn40_1"), ("resnet56", "resnet20"),
        ("resnet110", "resnet20"), ("resnet110", "resnet32"), ("resnet32x4", "resnet8x4"),
        ("vgg13", "vgg8")],
    "SKD, Table 4 (CIFAR-100), unlike networks": [
        ("resnet50", "mobilenetv2_half"), ("resnet50", "vgg8"), ("resnet32x4", "shufflenetv1"),
        ("resnet32x4", "shufflenetv2"), ("wrn40_2", "shufflenetv1")],
    "SKD, Table 7 (CIFAR-100), growing teachers": [
        (f"resnet{depth}", "resnet14") for depth in (20, 32, 44, 56, 110)]}


def create_model(name: str, num_classes: int, **kw) -> nn.Module:
    """The network called `name`, freshly initialised; `kw` goes to its maker (dropout=0.0)."""
    if match := re.fullmatch(r"wrn(\d{1,4})_(\d{1,3})", name):
        depth, width = int(match[1]), int(match[2])
        if depth < 10 or depth % 6 != 4 or width < 1:
            raise UserError(f"{name}: a wide residual network has depth 6n+4 (10, 16, 22, 28, 40) "
                            f"and width 1 or more, as in wrn16_3")
        return wide_resnet(depth, width, num_classes, **kw)
    if name == "resnet50":
        return resnet(Bottleneck, [3, 4, 6, 3], [64, 256, 512, 1024, 2048], num_classes, **kw)
    if match := re.fullmatch(r"resnet(\d{1,4})(x4)?", name):
        depth, channels = int(match[1]), [32, 64, 128, 256] if match[2] else [16, 16, 32, 64]
        if depth < 8 or depth % 6 != 2:
            raise UserError(f"{name}: a CIFAR residual network has depth 6n+2 "
                            f"(8, 14, 20, 26, 32, 44, 56, 110), as in resnet20 or resnet8x4")
        return resnet(BasicBlock, [(depth - 2) // 6] * 3, channels, num_classes, **kw)
    if name in MOBILENETS:
        return mobilenetv2(name, num_classes, **kw)
    makers = {"vgg8": partial(vgg, 1), "vgg13": partial(vgg, 2),
              "shufflenetv1": partial(shufflenet, 1), "shufflenetv2": partial(shufflenet, 2),
              "pyramidnet110_84": partial(pyramidnet, 110, 84, False),
              "pyramidnet200_240": partial(pyramidnet, 200, 240, True)}
    if name in makers:
        return makers[name](num_classes=num_classes, **kw)
    raise UserError(f"unknown network {name}; known are {', '.join(model_names())}")


def model_names() -> list[str]:
    """Names of the papers' networks; wrn and resnet take any other valid depth and width too."""
    wide = ["16_1", "16_2", "16_3", "16_4", "16_8", "28_1", "28_2", "28_3", "28_4", "28_6",
            "40_1", "40_2"]
    return ([f"wrn{size}" for size in wide]
            + [f"resnet{depth}" for depth in (8, 14, 20, 26, 32, 44, 56, 110, "8x4", "32x4", 50)]
            + ["pyramidnet110_84", "pyramidnet200_240", "vgg8", "vgg13", "mobilenetv2",
               "mobilenetv2_half", "shufflenetv1", "shufflenetv2"])


def check_pair(teacher: str, student: str, image_size: int, alike: str) -> None:
    """Raise UserError where two networks cannot be matched, before any data is read.

    alike: what their groups must have alike: "count", how many there are; "sizes", also their
    height and width; "" for methods that look at the logits alone.
    """
    with torch.device("meta"), torch.no_grad():     # shapes without numbers
        image = torch.empty(1, 3, image_size, image_size)
        ends = [create_model(name, 10).eval()(image, taps=True).stages
                for name in (teacher, student)]
    for number, (theirs, ours) in enumerate(itertools.zip_longest(*ends), 1):
        shapes = ["no map" if x is None else "x".join(map(str, x.shape[1:]))
                  for x in (theirs, ours)]
        apart = theirs is None or ours is None
        if alike == "sizes" and not apart:
            apart = theirs.shape[2:] != ours.shape[2:]
        if alike and apart:
            raise UserError(f"group {number} of {teacher} ends in {shapes[0]}, of {student} in "
                            f"{shapes[1]} (channels x height x width): these cannot be matched; "
                            f"wrn16_3 and wrn16_1, or resnet56 and resnet20, can")


def print_networks() -> None:
    """Every network's size and the shape of its maps for 32x32 images, then the papers' pairs."""
    def shapes(maps: list[Tensor]) -> str:
        return " ".join(f"{x.shape[1]}x{x.shape[2]}" for x in maps)

    print("channels x pixels of each group's first map (entries), last map (stages), and pre_relu")
    print(f"{'network':18}{'10 classes':>12}{'100 classes':>13}  {'entries':28}{'stages':28}"
          f"pre_relu")
    for name in model_names():
        with torch.device("meta"), torch.no_grad():     # shapes without numbers
            small, large = create_model(name, 10), create_model(name, 100)
            taps = small.eval()(torch.empty(1, 3, 32, 32), taps=True)
        counts = [sum(p.numel() for p in network.parameters()) for network in (small, large)]
        print(f"{name:18}{counts[0]:12,}{counts[1]:13,}  {shapes(taps.entries):28}"
              f"{shapes(taps.stages):28}{shapes(taps.pre_relu)}")
    for table, pairs in PAIRS.items():
        print(f"\n{table}: " + ", ".join(f"{student} from {teacher}" for teacher, student in pairs))


# ================================================================================================
# Checkpoints and folders of runs
# ================================================================================================


def new_model(name: str, loader: "ImageLoader", seed: int) -> nn.Module:
    """The network as the seed makes it, for the loader's classes, on its device, channels_last."""
    torch.manual_seed(seed)
    network = create_model(name, loader.num_classes)
    return network.to(loader.labels.device, memory_format=torch.channels_last)


def weights_hash(network: nn.Module) -> str:
    """The sha256 of all weights and statistics: which teacher taught."""
    values = [value.cpu().numpy().tobytes() for value in network.state_dict().values()]
    return hashlib.sha256(b"".join(values)).hexdigest()


def read_checkpoint(path: Path) -> dict:
    """What a file holds, its weights as "model"; nothing in the file is executed."""
    try:
        with warnings.catch_warnings():     # the error below says all in one line
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:      # each kind of damage fails in its own way
        reason = str(error).split(". ")[0][:200]
        raise UserError(f"{path} is missing, damaged or no checkpoint: name another one or train "
                        f"it anew ({reason})") from None
    return state if isinstance(state, dict) and "model" in state else {"model": state}


def check_weights(network: nn.Module, weights: dict, path: Path) -> None:
    """Raise UserError that names the first weight which the network does not have just so."""
    def form(state: dict, key: str) -> object:
        x = state.get(key, "missing")
        return tuple(x.shape) if isinstance(x, Tensor) else x

    if not isinstance(weights, dict):
        raise UserError(f"{path} holds a {type(weights).__name__}, not the weights of a network")
    expected = network.state_dict()
    for key in [*expected, *weights]:
        found, wanted = form(weights, key), form(expected, key)
        if found != wanted:
            raise UserError(f"{path} is of another network or number of classes: its {key} is "
                            f"{str(found)[:80]}, not {wanted}")


def load_weights(network: nn.Module, path: Path) -> None:
    """Load a checkpoint of any of the scripts, or a plain state_dict; all of it, or UserError.

    A method's connectors are no part of the network and are left out.
    """
    weights = read_checkpoint(path)["model"]
    if isinstance(weights, dict):
        weights = {key: x for key, x in weights.items() if not str(key).startswith("connectors.")}
    check_weights(network, weights, path)
    network.load_state_dict(weights)


def read_log(folder: Path) -> list[dict]:
    """The log of a run, its header first; empty where there is none, or none of ours."""
    try:
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        whole = "settings" in log[0] and all("test" in row for row in log[1:])
        return log if whole else []
    except (OSError, ValueError, TypeError, IndexError):
        return []


def read_run(folder: Path, settings: dict, model: nn.Module) -> dict:
    """The checkpoint of a run that is to go on; UserError where its settings were others."""
    path = folder / "last.pt"
    state = read_checkpoint(path)
    kept = state["log"][0]["settings"] if state.get("log") else {}
    changed = [f"{key} {kept.get(key)}, now {settings.get(key)}" for key in kept | settings
               if kept.get(key) != settings.get(key)]
    if changed:
        teacher = "" if "teacher_hash" in settings else " from there"
        raise UserError(f"{folder} was made with other settings ({'; '.join(changed)}): choose "
                        f"another --out, and keep a teacher{teacher} with --teacher-ckpt")
    check_weights(model, state["model"], path)
    for copy in sorted(folder.glob("*.py")):
        source = Path(__file__).with_name(copy.name)
        if source.exists() and source.read_bytes() != copy.read_bytes():
            print(f"note: {folder} was begun by another {copy.name}, which lies there; choose "
                  f"another --out to run today's")
    return state


def begin_run(folder: Path, script: Path) -> None:
    """A new run's folder, with the record of what is about to run in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for source in (script, Path(__file__)):
        shutil.copy(source, folder)


def write_run(folder: Path, state: dict) -> None:
    """log.jsonl and last.pt, each written aside and renamed: a kill leaves what was there whole."""
    log = "".join(json.dumps(row) + "\n" for row in state["log"])
    buffer = io.BytesIO()
    torch.save(state, buffer)
    for name, content in (("log.jsonl", log.encode()), ("last.pt", buffer.getvalue())):
        aside = folder / f"{name}.{os.getpid()}"
        try:
            aside.write_bytes(content)
            aside.replace(folder / name)
        except OSError:     # a full disk: leave no half of a file on it
            aside.unlink(missing_ok=True)
            raise


# ================================================================================================
# Data sets
# ================================================================================================


class Split(NamedTuple):
    """One split of a data set, whole."""
    images: Tensor                 # (N, H, W, 3) uint8
    labels: Tensor                 # (N,) int64
    masks: Tensor | None = None    # (N, H, W) bool, where the object is; shapes only


class ImageLoader:
    """Normalised, channels_last batches of a split that lies on the device as uint8.

    A shuffled loader's order, crops and flips depend on (seed, epoch) alone. They are drawn on the
    CPU, so that every device sees the same batches; the pixels never leave the device. One image
    left over for the last batch, which BatchNorm could not normalise, sits out its epoch.
    """

    def __init__(self, split: Split, class_names: list[str], mean: Tensor, std: Tensor,
                 batch_size: int, device: torch.device, *, shuffle: bool, augment: bool = False,
                 reflect: bool = False, seed: int = 0):
        self.images, self.labels = split.images.to(device), split.labels.to(device)
        self.masks = split.masks
        self.class_names, self.num_classes = class_names, len(class_names)
        self.batch_size, self.shuffle, self.augment = batch_size, shuffle, augment
        self.seed, self.epoch = seed, 0
        self.settings = {}      # what decides the images; filled in by load_data
        alone = len(self.labels) % batch_size == 1 and len(self.labels) > 1
        self.left_out = int(shuffle and alone)
        self.size = self.images.shape[1]
        # one value a pixel, not one a channel: subtracting three-element rows is 5 times slower
        self.mean = mean.to(device).expand(self.size, self.size, 3).contiguous()
        self.std = std.to(device).expand(self.size, self.size, 3).contiguous()
        self.padding = self.size // 8 if augment else 0        # 4 pixels at 32x32
        if augment:     # the mirrored pictures lie behind the others: flipping costs memory alone
            self.images = pad(self.images, self.padding, reflect)
            self.images = torch.cat([self.images, self.images.flip(2)])

    def __len__(self) -> int:
        return -(-(len(self.labels) - self.left_out) // self.batch_size)

    def set_epoch(self, epoch: int, seed: int | None = None) -> None:
        """Choose the order and the crops of the next pass; the seed stays what it was if None."""
        self.epoch, self.seed = epoch, self.seed if seed is None else seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device, count, wide = self.labels.device, len(self.labels), self.size + 2 * self.padding
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        order = order.to(device)
        if not self.augment:
            for chosen in order[:count - self.left_out].split(self.batch_size):
                yield self.normalise(self.images[chosen]), self.labels[chosen]
            return
        shift = torch.randint(2 * self.padding + 1, (2, count), generator=generator).to(device)
        order += count * torch.randint(2, (count,), generator=generator).to(device)
        # Every run of `size` pixels in memory is a row of this view, so that a crop is `size` of
        # its rows: (image, line, column) -> the number of the pixel the row starts at.
        runs = self.images.view(-1).as_strided(
            (self.images[..., 0].numel() - self.size + 1, 3 * self.size), (3, 1))
        lines = torch.arange(self.size, device=device)
        for chosen, (down, right) in zip(order[:count - self.left_out].split(self.batch_size),
                                         shift.split(self.batch_size, 1)):
            start = ((chosen * wide + down)[:, None] + lines) * wide + right[:, None]
            crop = runs.index_select(0, start.flatten()).view(-1, self.size, self.size, 3)
            yield self.normalise(crop), self.labels[chosen % count]

    def normalise(self, images: Tensor) -> Tensor:
        """(N, H, W, 3) uint8 -> (N, 3, H, W) float32, channels_last in memory."""
        return images.float().sub_(self.mean).div_(self.std).permute(0, 3, 1, 2)


def pad(images: Tensor, width: int, reflect: bool) -> Tensor:
    """(N, H, W, 3) -> (N, H + 2 width, W + 2 width, 3): black, or mirrored at the edge pixel."""
    if not reflect:
        return F.pad(images, (0, 0, width, width, width, width))
    size = images.shape[1]
    index = torch.arange(-width, size + width, device=images.device).abs()
    index = (size - 1) - (size - 1 - index).abs()
    return images[:, index][:, :, index]


SHAPES = ["disk", "ring", "crescent", "square", "triangle", "cross", "star", "clover", "heart",
          "corner"]


def outlines(u: Tensor, v: Tensor) -> Tensor:
    """(N, H, W) coordinates in the object's frame -> (N, 10, H, W), negative inside each shape."""
    def box(half_width: float, half_height: float, x: float = 0.0, y: float = 0.0) -> Tensor:
        return torch.maximum((u - x).abs() - half_width, (v - y).abs() - half_height)

    radius, angle = torch.hypot(u, v), torch.atan2(v, u)
    return torch.stack([
        radius - 0.75,
        (radius - 0.62).abs() - 0.22,
        torch.maximum(radius - 0.85, 0.62 - torch.hypot(u - 0.42, v)),
        box(0.66, 0.66),
        torch.maximum(-v, 0.866 * u.abs() + 0.5 * v) - 0.5,
        torch.minimum(box(0.9, 0.27), box(0.27, 0.9)),
        radius - 0.62 - 0.27 * torch.cos(5 * angle),
        radius - 0.60 - 0.28 * torch.cos(3 * angle),
        torch.hypot(u, v + 0.15 - 0.55 * u.abs().sqrt()) - 0.72,
        torch.minimum(box(0.8, 0.27, 0.0, -0.5), box(0.27, 0.8, -0.5, 0.0)),
    ], dim=1)


def draw_shapes(count: int, seed: int, size: int = 16) -> Split:
    """`count` pictures of one shape each, the ten classes in turn.

    Each shape is morphed by up to 42 % into one of another class, turned by up to 0.5 rad, shifted,
    scaled and coloured at random, and lies on a striped background with two distracting bars and
    noise. The morphs make the classes similar by degrees: this is what soft labels can tell.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, 1, 1, generator=generator)

    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    def place(scale: Tensor, reach: float, most: float) -> tuple[Tensor, Tensor]:
        """Pixel coordinates seen from an object of this scale, shifted and turned at random."""
        dx, dy = (x - uniform(-reach, reach)) / scale, (y - uniform(-reach, reach)) / scale
        turn = uniform(-most, most)
        return dx * turn.cos() + dy * turn.sin(), dy * turn.cos() - dx * turn.sin()

    def paint(images: Tensor, field: Tensor, scale: Tensor, colour: Tensor) -> Tensor:
        """Lay a colour over the inside of a field; the outline is one pixel soft."""
        cover = torch.sigmoid(-field * scale * size * 1.2)[:, None]
        return images + cover * (colour - images)

    stripes = torch.sin(uniform(-4, 4) * x + uniform(-4, 4) * y + uniform(0, 2 * math.pi))[:, None]
    images = torch.lerp(uniform(0, 1, 3), uniform(0, 1, 3), 0.5 + 0.5 * stripes)
    for _ in range(2):
        scale = uniform(0.10, 0.25)
        u, v = place(scale, reach=1.0, most=math.pi)
        bar = torch.maximum(u.abs() - 1.0, v.abs() - uniform(0.2, 0.8))
        images = paint(images, bar, scale, uniform(0, 1, 3))

    labels = torch.arange(count) % 10
    other = (labels + torch.randint(1, 10, (count,), generator=generator)) % 10
    scale = uniform(0.77, 0.98)
    fields = outlines(*place(scale, reach=0.25, most=0.5))
    each = torch.arange(count)
    field = torch.lerp(fields[each, labels], fields[each, other], uniform(0, 0.42))
    masks = field < 0
    # the object differs from what it covers by at least 0.8 in colour
    behind = (images * masks[:, None]).sum((2, 3), keepdim=True)
    behind = behind / masks[:, None].sum((2, 3), keepdim=True).clamp(min=1)
    contrast = uniform(0, 1, 3) - behind
    distance = contrast.norm(dim=1, keepdim=True).clamp(min=1e-3)
    images = paint(images, field, scale, behind + contrast / distance * distance.clamp(min=0.8))
    images = images + 0.04 * torch.randn(images.shape, generator=generator)
    images = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous()
    return Split(images, labels, masks)


def read_cifar(dataset: str, data_dir: Path, train: bool) -> tuple[Split, list[str]]:
    """CIFAR-10 or CIFAR-100 by torchvision, downloaded when absent."""
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[dataset]
    try:
        source = kind(data_dir, train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"could not fetch {kind.url} ({error}); put {kind.filename} or the unpacked folder "
            f"{kind.base_folder} in {data_dir}/ by hand, or use --dataset shapes, which needs "
            f"nothing") from None
    return Split(torch.from_numpy(source.data), torch.tensor(source.targets)), source.classes


def read_folder(data_dir: Path, image_size: int) -> tuple[dict[str, Split], list[str]]:
    """data_dir/train, /test and /val (or /valid), each with a subfolder of images a class.

    Decoded once and kept in data_dir/.decoded_<image_size>.pt, which is made anew when an image
    below data_dir has come, gone, or changed in size or time.
    """
    sources = {}
    for name in ("train", "test", "val", "valid"):
        if (data_dir / name).is_dir():
            try:
                sources[name.removesuffix("id")] = datasets.ImageFolder(data_dir / name)
            except FileNotFoundError as error:
                raise UserError(f"{data_dir / name} wants one subfolder of images a class: "
                                 f"{error}") from None
    if "train" not in sources or len(sources) < 2:
        raise UserError(f"{data_dir} needs the folders train/ and test/ (or val/, or valid/), "
                         f"with one subfolder of images a class; name it with --data-dir")
    class_names = sources["train"].classes
    for name, source in sources.items():
        if odd := set(source.classes) ^ set(class_names):
            raise UserError(f"{data_dir}: the classes of train/ and {name}/ differ in "
                             f"{', '.join(sorted(odd))}; give both the same subfolders")
    paths = [path for source in sources.values() for path, _ in source.samples]
    stats = [(os.path.relpath(path, data_dir), os.stat(path)) for path in paths]
    fingerprint = hashlib.sha256(
        repr([(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]).encode()).hexdigest()
    cache = data_dir / f".decoded_{image_size}.pt"
    try:
        kept = torch.load(cache, weights_only=True, mmap=True)
        images = kept["images"] if kept["fingerprint"] == fingerprint else None
    except Exception:    # absent, cut short, or not ours: decode again
        images = None
    if images is None:
        images = torch.empty(len(paths), image_size, image_size, 3, dtype=torch.uint8)
        for index, path in enumerate(paths):
            try:
                with datasets.folder.Image.open(path) as file:
                    if file.mode[0] in "IF":    # convert would make it white
                        raise UserError("it has more than 8 bits a channel, convert it to 8")
                    picture = file.convert("RGB")
            except Exception as error:    # each format of image fails in its own way
                raise UserError(f"cannot decode {path} ({error}); repair or remove it") from None
            if picture.size != (image_size, image_size):
                picture = resize(picture, [image_size, image_size])
            images[index] = pil_to_tensor(picture).permute(1, 2, 0)
            done = index + 1
            if sys.stderr.isatty() and (done % 500 == 0 or done == len(paths)):
                print(f"decoded {done} of {len(paths)} images", file=sys.stderr, flush=True,
                      end="\n" if done == len(paths) else "\r")
        partial = cache.with_suffix(f".{os.getpid()}.tmp")
        try:
            torch.save({"fingerprint": fingerprint, "images": images}, partial)
            os.replace(partial, cache)
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            print(f"note: the decoded images could not be kept in {cache} ({error}); "
                  f"the next run decodes them again", file=sys.stderr)
    parts = images.split([len(source) for source in sources.values()])
    return {name: Split(part, torch.tensor(source.targets))
            for (name, source), part in zip(sources.items(), parts)}, class_names


def subset(split: Split, chosen: Tensor) -> Split:
    return Split(*(None if part is None else part[chosen] for part in split))


def balanced_order(labels: Tensor) -> Tensor:
    """A fixed random order in which the classes take turns: its first n are a fair sample."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    turn = F.one_hot(labels[order]).cumsum(0).gather(1, labels[order][:, None])[:, 0]
    return order[turn.argsort(stable=True)]


def keep_memory() -> None:
    """Let glibc keep freed memory: to return large maps and get them again costs a CPU a tenth."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)     # M_MMAP_MAX: none
        libc.mallopt(-1, -1)    # M_TRIM_THRESHOLD: never


def load_data(dataset: str, data_dir: str | Path, batch_size: int, device: torch.device | str,
              *, augment: bool, seed: int, reflect: bool = False, image_size: int = 32,
              train_images: int | None = None, split: str = "test",
              ) -> tuple[ImageLoader, ImageLoader]:
    """The training loader and the loader of the split that accuracy is measured on.

    dataset       cifar10, cifar100, cinic10, folder or shapes
    augment       random crop from 4 pixels of padding (at 32x32), black or `reflect`, and flip
    train_images  train on a fair sample of so many images; the same one whatever the seed
    split         "test", or "val" for tuning: the data set's own validation split, or else a fixed
                  tenth of the training images, which are then not trained on
    A data set that is missing or broken raises UserError, which says what to do about it.
    """
    if torch.device(device).type == "cpu":
        keep_memory()
    data_dir, class_names = Path(data_dir), SHAPES
    if dataset == "shapes":
        splits = {"train": draw_shapes(4000, seed=1), "val": draw_shapes(2000, seed=2),
                  "test": draw_shapes(2000, seed=3)}
    elif dataset in ("cifar10", "cifar100"):
        splits = {"train": read_cifar(dataset, data_dir, train=True)[0]}
        splits["test"], class_names = read_cifar(dataset, data_dir, train=False)
    elif dataset in ("cinic10", "folder"):
        splits, class_names = read_folder(data_dir, image_size)
    else:
        raise UserError(f"unknown data set {dataset}; known are cifar10, cifar100, cinic10, "
                         f"folder and shapes")
    train, measured = splits["train"], splits.get("test", splits.get("val"))
    # over the whole training split, so that a teacher and a student on fewer images agree
    values = torch.stack([part.reshape(-1, 3).double().pow(power).sum(0)
                          for power in (1, 2) for part in train.images.split(5000)])
    mean, square = values.view(2, -1, 3).sum(1) / train.images[..., 0].numel()
    std = (square - mean.square()).sqrt().clamp(min=1e-3)
    order = balanced_order(train.labels)
    if split == "val" and {"val", "test"} <= splits.keys():
        measured = splits["val"]
    elif split == "val":
        held_out = max(1, len(order) // 10)
        measured, order = subset(train, order[:held_out]), order[held_out:]
    if train_images is not None and train_images > len(order):
        raise UserError(f"{train_images} training images asked for, {dataset} has {len(order)}")
    train = subset(train, order[:train_images].sort().values)
    shared = (class_names, mean.float(), std.float())
    train_loader = ImageLoader(train, *shared, batch_size, device, shuffle=True, augment=augment,
                               reflect=reflect, seed=seed)
    train_loader.settings = {
        "data": str(data_dir.resolve()) if dataset == "folder" else dataset, "split": split,
        "image_size": train.images.shape[1], "train_images": train_images,
        "images": [len(train.labels), len(measured.labels)], "classes": len(class_names)}
    return train_loader, ImageLoader(measured, *shared, 500, device, shuffle=False)


# ================================================================================================
# Flags
# ================================================================================================


def limited(kind: type, low: float, high: float, *words: str) -> Callable:
    """An argparse type: one of the words, or a number from low to high, so neither nan nor inf."""
    def number(text: str) -> float | str:
        if text not in words and not low <= kind(text) <= high:
            raise ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")
        return text if text in words else kind(text)
    return number


def add_data_flags(parser: ArgumentParser) -> None:
    """The flags of load_data that no recipe gives."""
    add = parser.add_argument
    devices = [name for name in ("cuda", "mps") if getattr(torch, name).is_available()] + ["cpu"]
    add("--dataset", default="cifar10", help="cinic10, folder: folders of images; shapes: drawn",
        choices=["cifar10", "cifar100", "cinic10", "folder", "shapes"])
    add("--data-dir", type=Path, default="data", help="where the data set is")
    add("--train-images", type=limited(int, 2, 1e9), help="so many, of every class alike")
    add("--image-size", type=limited(int, 8, 1024), default=32, help="of folders, in pixels")
    add("--split", default="test", choices=["test", "val"], help="val is for tuning")
    add("--device", default=devices[0], choices=devices, help="where all is computed")


# The entries that every recipe has: what --help says, smallest and largest value.
RECIPE_FLAGS = {
    "epochs": ("passes over the training images", 1, 1e5),
    "batch_size": ("in images", 2, 1e5),
    "lr": ("learning rate at the start", 1e-9, 1e3),
    "momentum": ("of SGD", 0, 1),
    "nesterov": ("Nesterov's form of the momentum", 0, 1),
    "weight_decay": ("L2 penalty, in the gradient", 0, 1),
    "milestones": ("parts of the epochs after which the learning rate drops", 0, 1),
    "lr_decay": ("factor on the learning rate at each milestone", 0, 1),
    "augment": ("crop and flip at random", 0, 1),
    "reflect": ("crop from mirrored borders, not from black ones", 0, 1)}


def flag_options(key: str, value: object) -> dict:
    """What argparse is told of a recipe's entry: a switch, a list or a number, by its value."""
    text, low, high = RECIPE_FLAGS.get(key, ("the method's own", 0, 1e9))
    if isinstance(value, bool):
        return dict(help=text, action=BooleanOptionalAction)
    if isinstance(value, list):
        return dict(help=text, type=limited(float, low, high), nargs="*")
    return dict(help=text, type=limited(type(value), low, high))


def has_bf16(device: str) -> bool:
    """Whether autocast to bfloat16 pays: on GPUs that have it."""
    return device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


if __name__ == "__main__":
    print_networks()
