"""Networks and data sets for the method scripts. Nothing here trains, or reads a flag.

    model = create_model("wrn16_1", num_classes=10)
    logits = model(images)                     # (N, 3, H, W) normalised -> (N, num_classes)
    taps = model(images, taps=True)            # Taps(logits, entries, stages, pre_relu)
    rest = load_weights(model, "last.pt")      # the checkpoint without its weights
    train_loader, test_loader = load_data("shapes", "data", 64, "cpu", augment=True, seed=0)

`python common.py` prints every network's size and maps.
"""
import argparse
import ctypes
import hashlib
import inspect
import math
import os
import platform
import re
import shutil
import signal
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.models import get_weight
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms import v2
from torchvision.transforms._functional_pil import Image, ImageOps     # PIL's own
from torchvision.tv_tensors import Image as Picture, Mask

warnings.filterwarnings("ignore", module=r"PIL\.")    # of oddities; what it cannot read is an error


class UserError(ValueError):
    """What the person at the keyboard can mend; a script prints its message as one line."""


# --- Networks -----------------------------------------------------------------------------------


class Taps(NamedTuple):
    """What one forward pass shows of a network; the lists run from the input to the output.

    A group is a run of blocks of equal spatial size: three in most networks, four in some.
    """
    logits: Tensor                      # (N, num_classes)
    entries: Sequence[Tensor] = ()      # first map of each group (FSP's first map), (N, C, H, W)
    stages: Sequence[Tensor] = ()       # last map of each group (AT, ATang, FSP's second map)
    pre_relu: Sequence[Tensor] = ()     # what enters the first ReLU after each group (Overhaul)


class Network(nn.Module):
    """Stem, groups of blocks, head, classifier: the one forward pass of all families.

    A block returns three maps: its output, the first map inside it, and one that enters a ReLU.
    Without a head a block ends in a ReLU, and the third is what enters that. With a head the first
    ReLU after a group lies in the next group's first block, or behind the head. Each map of
    Taps.pre_relu is the output of one of pre_relu_norms, or that plus a shortcut.
    """

    def __init__(self, stem: nn.Module, groups: nn.ModuleList, head: nn.Module | None,
                 stage_channels: list[int], pre_relu_norms: list[nn.BatchNorm2d],
                 num_classes: int, activation: Callable = F.relu, dropout: float = 0.0,
                 last_stage_is_head: bool = False):
        super().__init__()
        self.stem, self.groups, self.head = stem, groups, head
        self.stage_channels, self.pre_relu_norms = stage_channels, pre_relu_norms
        self.pre_relu_channels = [norm.num_features for norm in pre_relu_norms]
        self.activation, self.last_stage_is_head = activation, last_stage_is_head
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(self.pre_relu_channels[-1], num_classes)
        initialise(self)

    def forward(self, x: Tensor, taps: bool = False) -> Tensor | Taps:
        x, *maps = self.maps(x)
        logits = self.classifier(self.dropout(x.mean((2, 3))))
        return Taps(logits, *maps) if taps else logits

    def maps(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        """What the classifier averages, and the three lists of Taps."""
        entries, stages, pre_relu = [], [], []
        x = self.stem(x)
        for number, group in enumerate(self.groups):
            for index, block in enumerate(group):
                x, inner, before_relu = block(x)
                if index == 0:
                    # a group of one block has no other first map than the one inside it
                    entries.append(x if len(group) > 1 else inner)
                    if self.head is not None and number > 0:
                        pre_relu.append(before_relu)    # of the group before this one
            stages.append(x)
            if self.head is None:
                pre_relu.append(before_relu)
        if self.head is not None:
            x = self.head(x)
            pre_relu.append(x)
            x = self.activation(x)
            if self.last_stage_is_head:
                stages[-1] = x
        return x, entries, stages, pre_relu


def initialise(network: nn.Module) -> None:
    """He initialisation, fan-out: N(0, sqrt(2 / (k * k * channels_out))); BatchNorm 1 and 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.weight[0, 0].numel() * module.out_channels
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def make_groups(block: Callable, counts: Sequence[int], channels: Sequence[int],
                strides: Sequence[int]) -> nn.ModuleList:
    """A group of blocks for each count; its first block changes the width and the size."""
    groups = nn.ModuleList()
    for count, channels_in, channels_out, stride in zip(counts, channels, channels[1:], strides):
        group = nn.ModuleList([block(channels_in, channels_out, stride)])
        for _ in range(count - 1):
            group.append(block(channels_out, channels_out, 1))
        groups.append(group)
    return groups


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
    groups = make_groups(PreActivationBlock, [(depth - 4) // 6] * 3, channels, (1, 2, 2))
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


def resnet(block: type, counts: list[int], channels: list[int], num_classes: int,
           imagenet: bool = False) -> Network:
    """Residual network (He et al. 2016), with 1x1 convolution shortcuts."""
    stem = nn.Sequential(nn.Conv2d(3, channels[0], 3, 1, 1, bias=False),
                         nn.BatchNorm2d(channels[0]), nn.ReLU())
    if imagenet:    # the stem makes the image four times smaller
        stem[0] = nn.Conv2d(3, channels[0], 7, 2, 3, bias=False)
        stem.append(nn.MaxPool2d(3, 2, 1))
    groups = make_groups(block, counts, channels, (1, 2, 2, 2))
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
        strides = [1, stride, 1] if bottleneck else [stride, 1]
        self.convs = nn.ModuleList()
        for inputs, outputs, kernel, step in zip(widths, widths[1:], kernels, strides):
            self.convs.append(nn.Conv2d(inputs, outputs, kernel, step, kernel // 2, bias=False))

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
    """3x3 - BatchNorm - ReLU, after 2x2 max-pooling where the stride is 2."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels_in, channels_out, 3, 1, 1)
        self.norm = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.stride == 2:
            x = F.max_pool2d(x, 2)
        normed = self.norm(self.conv(x))
        return F.relu(normed), x, normed


def vgg(convolutions: int, num_classes: int) -> Network:
    """VGG with BatchNorm: five runs of 3x3 convolutions, of which the first is the stem."""
    layers, widths = [], [64, 128, 256, 512, 512]
    for channels in (3, 64)[:convolutions]:
        layers += [nn.Conv2d(channels, 64, 3, 1, 1), nn.BatchNorm2d(64), nn.ReLU()]
    groups = make_groups(VGGBlock, [convolutions] * 4, widths, (2, 2, 2, 1))
    norms = [group[-1].norm for group in groups]
    network = Network(nn.Sequential(*layers), groups, None, widths[1:], norms, num_classes)
    nn.init.normal_(network.classifier.weight, 0.0, 0.01)
    return network


class InvertedResidual(nn.Module):
    """1x1 expansion (none where it is 0) - 3x3 depthwise - 1x1 projection, each with BatchNorm."""

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
                                                 [(6, 80, 3, 2), (6, 160, 1, 1)]]),
    "imagenet_mobilenetv2": ((32, 2), 1280, F.relu6, [[(6, 24, 2, 2)],
                                                      [(6, 32, 3, 2)],
                                                      [(6, 64, 4, 2), (6, 96, 3, 1)],
                                                      [(6, 160, 3, 2), (6, 320, 1, 1)]])}


def mobilenetv2(form: str, num_classes: int, dropout: float | None = None) -> Network:
    """MobileNetV2 (Sandler et al. 2018) for ImageNet, and in two forms for small images.

    mobilenetv2: the ATang paper's Table 4, whose last stage ends after the 1x1 convolution to 640
    channels; mobilenetv2_half: the CIFAR-100 tables', without the others' dropout of 0.2.
    """
    (channels, stem_stride), last, activation, layout = MOBILENETS[form]
    of_atang = form == "mobilenetv2"
    stem = nn.Sequential(nn.Conv2d(3, channels, 3, stem_stride, 1, bias=False),
                         nn.BatchNorm2d(channels),
                         nn.ReLU() if activation is F.relu else nn.ReLU6())
    if form == "imagenet_mobilenetv2":      # its first block has another size than the second
        stem.append(Conv2dNormActivation(32, 32, groups=32, activation_layer=nn.ReLU6))
        stem.append(Conv2dNormActivation(32, 16, 1, activation_layer=None))
        channels = 16
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
    dropout = (0.0 if form == "mobilenetv2_half" else 0.2) if dropout is None else dropout
    norms = [group[0].norm1 for group in groups[1:]] + [head[1]]
    network = Network(stem, groups, head, stage_channels, norms, num_classes, activation,
                      dropout, last_stage_is_head=of_atang)
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
    """ShuffleNet (Zhang et al. 2018) or V2 of size 1 (Ma et al. 2018); no stride in the stem."""
    block = ShuffleBlockV1 if version == 1 else ShuffleBlockV2
    channels = [24, 240, 480, 960] if version == 1 else [24, 116, 232, 464]
    stem = nn.Sequential(nn.Conv2d(3, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
    groups, head = make_groups(block, (4, 8, 4), channels, (2, 2, 2)), None
    if version == 1:
        norms = [group[-1].last_norm for group in groups]
    else:
        head = nn.Sequential(nn.Conv2d(464, 1024, 1, bias=False), nn.BatchNorm2d(1024))
        norms = [group[0].norm1 for group in groups[1:]] + [head[1]]
    return Network(stem, groups, head, channels[1:], norms, num_classes)


class DepthwiseBlock(nn.Module):
    """3x3 depthwise - BatchNorm - ReLU - 1x1 - BatchNorm - ReLU, without a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.depthwise = nn.Conv2d(channels_in, channels_in, 3, stride, 1, groups=channels_in,
                                   bias=False)
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.pointwise = nn.Conv2d(channels_in, channels_out, 1, bias=False)
        self.last_norm = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inner = F.relu(self.norm1(self.depthwise(x)))
        normed = self.last_norm(self.pointwise(inner))
        return F.relu(normed), inner, normed


def mobilenet(num_classes: int) -> Network:
    """MobileNet (Howard et al. 2017) for ImageNet, its first block a part of the stem.

    The four groups end where the overhaul's code distils, after its layers 3, 5, 11 and 13.
    """
    stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
                         nn.Conv2d(32, 32, 3, 1, 1, groups=32, bias=False), nn.BatchNorm2d(32),
                         nn.ReLU(), nn.Conv2d(32, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    channels = [64, 128, 256, 512, 1024]
    groups = make_groups(DepthwiseBlock, (2, 2, 6, 2), channels, (2, 2, 2, 2))
    norms = [group[-1].last_norm for group in groups]
    return Network(stem, groups, None, channels[1:], norms, num_classes)


def dilate(group: nn.ModuleList, rates: Sequence[int]) -> None:
    """Take the stride out of a group; instead each block's 3x3 convolutions look farther apart."""
    for block, rate in zip(group, rates, strict=True):
        for conv in block.modules():
            if isinstance(conv, nn.Conv2d):
                conv.stride = (1, 1)
                if conv.kernel_size == (3, 3):
                    conv.dilation = conv.padding = (rate, rate)


class DeepLab(nn.Module):
    """DeepLabV3+ (Chen et al. 2018): a class for each pixel, logits (N, num_classes, H, W).

    The last group has dilation in place of its stride. Of Taps it has pre_relu: in front of the
    first ReLU after each group (MobileNetV2's last: its end), of ASPP's last, of the classifier's.
    """
    pixels, stage_channels = True, ()

    def __init__(self, backbone: str, dilations: Sequence[int], num_classes: int,
                 rates: Sequence[int] = (6, 12, 18), width: int = 256, low: int = 48,
                 dropout: bool = True):
        super().__init__()
        self.backbone = backbone = create_model(backbone, num_classes)
        self.dropout = dropout      # which rests where maps are asked for: the overhaul, Appendix B
        dilate(backbone.groups[-1], dilations)
        del backbone.classifier
        if backbone.head is not None:       # MobileNetV2's last 1x1 convolution is left out
            backbone.head = backbone.activation = nn.Identity()
            backbone.pre_relu_norms[-1] = backbone.groups[-1][-1].norm3
        channels = backbone.stage_channels
        self.aspp = ASPP(channels[-1], rates, width)
        self.low = Conv2dNormActivation(channels[0], low, 1)
        self.mix = Conv2dNormActivation(width + low, width)
        self.refine = Conv2dNormActivation(width, width, activation_layer=None)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        initialise(self)
        # as the overhaul's authors weigh them; the last map has 4 ** (groups - 2) times the pixels
        halved = [0.5 ** number for number in reversed(range(len(channels)))]
        self.layer_weights = [*halved, 1.0, 4.0 ** (2 - len(channels))]
        self.pre_relu_norms = [*backbone.pre_relu_norms, self.aspp.project[1], self.refine[1]]
        self.pre_relu_channels = [norm.num_features for norm in self.pre_relu_norms]

    def forward(self, x: Tensor, taps: bool = False) -> Tensor | Taps:
        drop = partial(F.dropout, training=self.dropout and self.training and not taps)
        resize = partial(F.interpolate, mode="bilinear", align_corners=True)
        deep, _, stages, pre_relu = self.backbone.maps(x)
        y = self.aspp.project[:2](torch.cat([branch(deep) for branch in self.aspp.convs], 1))
        pre_relu.append(y)
        y = resize(drop(F.relu(y), 0.5), size=stages[0].shape[2:])
        y = self.refine(drop(self.mix(torch.cat([y, self.low(stages[0])], 1)), 0.5))
        pre_relu.append(y)
        logits = resize(self.classifier(drop(F.relu(y), 0.1)), size=x.shape[2:])
        return Taps(logits, pre_relu=pre_relu) if taps else logits


SMALL = dict(rates=(2, 4), dropout=False)       # DeepLab's for scenes
NARROW, WIDE = [64, 64, 128, 256, 512], [64, 256, 512, 1024, 2048]
# Each makes a network of num_classes; any depth and width of wrn and resnet is known beside them.
MAKERS = {
    "resnet50": partial(resnet, Bottleneck, [3, 4, 6, 3], WIDE),
    "pyramidnet110_84": partial(pyramidnet, 110, 84, False),
    "pyramidnet200_240": partial(pyramidnet, 200, 240, True),
    "vgg8": partial(vgg, 1), "vgg13": partial(vgg, 2),
    "mobilenetv2": partial(mobilenetv2, "mobilenetv2"),
    "mobilenetv2_half": partial(mobilenetv2, "mobilenetv2_half"),
    "shufflenetv1": partial(shufflenet, 1), "shufflenetv2": partial(shufflenet, 2),
    "imagenet_resnet18": partial(resnet, BasicBlock, [2, 2, 2, 2], NARROW, imagenet=True),
    "imagenet_resnet34": partial(resnet, BasicBlock, [3, 4, 6, 3], NARROW, imagenet=True),
    "imagenet_resnet50": partial(resnet, Bottleneck, [3, 4, 6, 3], WIDE, imagenet=True),
    "imagenet_resnet101": partial(resnet, Bottleneck, [3, 4, 23, 3], WIDE, imagenet=True),
    "imagenet_resnet152": partial(resnet, Bottleneck, [3, 8, 36, 3], WIDE, imagenet=True),
    "imagenet_mobilenet": mobilenet,
    "imagenet_mobilenetv2": partial(mobilenetv2, "imagenet_mobilenetv2"),
    "deeplab_resnet8": partial(DeepLab, "resnet8", [2], width=32, low=12, **SMALL),
    "deeplab_resnet8_half": partial(DeepLab, "resnet8_half", [2], width=16, low=6, **SMALL),
    "deeplab_resnet18": partial(DeepLab, "imagenet_resnet18", [2, 2]),
    "deeplab_resnet50": partial(DeepLab, "imagenet_resnet50", [2, 4, 8]),
    "deeplab_resnet101": partial(DeepLab, "imagenet_resnet101", [2, 4, 8]),
    "deeplab_mobilenetv2": partial(DeepLab, "imagenet_mobilenetv2", [1, 1, 1, 2])}


def create_model(name: str, num_classes: int, pixels: bool | None = None, **kw) -> nn.Module:
    """The network called `name`; `kw` goes to its maker. pixels: must it give each one a class?"""
    if name in MAKERS:
        make = MAKERS[name]
    elif match := re.fullmatch(r"wrn(\d{1,4})_(\d{1,3})", name):
        depth, width = int(match[1]), int(match[2])
        if depth < 10 or depth % 6 != 4 or width < 1:
            raise UserError(f"{name}: wrn has a depth of 6n+4 and a width from 1 on, as in wrn16_3")
        make = partial(wide_resnet, depth, width)
    elif match := re.fullmatch(r"resnet(\d{1,4})(x4|_half)?", name):
        widths = {None: [16, 16, 32, 64], "x4": [32, 64, 128, 256], "_half": [8, 8, 16, 32]}
        depth, channels = int(match[1]), widths[match[2]]
        if depth < 8 or depth % 6 != 2:
            raise UserError(f"{name}: resnet has a depth of 6n+2, as in resnet20 or resnet8x4")
        make = partial(resnet, BasicBlock, [(depth - 2) // 6] * 3, channels)
    else:
        raise UserError(f"unknown network {name}; known are {', '.join(model_names())}")
    network = make(num_classes=num_classes, **kw)
    network.name = name
    if pixels is not None and pixels != getattr(network, "pixels", False):
        each = "pixel, which deeplab_resnet8 gives" if pixels else "picture, which wrn16_1 gives"
        raise UserError(f"these data have a class for each {each}, but not {name}")
    return network


def model_names() -> list[str]:
    """The papers' networks."""
    wide = "16_1 16_2 16_3 16_4 16_8 28_1 28_2 28_3 28_4 28_6 40_1 40_2".split()
    deep = "8 14 20 26 32 44 56 110 8x4 32x4".split()
    return [*(f"wrn{size}" for size in wide), *(f"resnet{size}" for size in deep), *MAKERS]


def meta_taps(name: str, image_size: int) -> Taps:
    """A network's maps for one image; its logits alone where its forward knows no taps."""
    with torch.device("meta"), torch.no_grad():     # shapes without numbers
        network = create_model(name, 10).eval()
        image = torch.empty(1, 3, image_size, image_size)
        try:
            if "taps" in inspect.signature(network.forward).parameters:
                return network(image, taps=True)
            return Taps(network(image))
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"{name} takes no images of {image_size} pixels, or none on the meta "
                            f"device ({str(error).strip().splitlines()[0]})") from None


def check_pair(teacher: str, student: str, image_size: int, maps: Sequence[str] = (),
               sizes: bool = False) -> tuple[Taps, Taps]:
    """The teacher's and the student's maps, on the meta device; UserError where they do not match.

    maps: the fields of Taps that a method compares; sizes: whether in height and width too.
    """
    taps = meta_taps(teacher, image_size), meta_taps(student, image_size)
    for field in maps:
        pair = [getattr(network, field) for network in taps]
        for name, found in zip((teacher, student), pair):
            if not found:
                raise UserError(f"{name} has no maps to compare: its forward(images, taps=True) "
                                f"must return Taps with {field}")
        for number, (first, second) in enumerate(zip_longest(*pair), 1):
            shapes = ["no map" if x is None else "x".join(map(str, x.shape[1:]))
                      for x in (first, second)]
            if "no map" in shapes or (sizes and first.shape[2:] != second.shape[2:]):
                raise UserError(f"group {number} of {teacher} has {shapes[0]}, of {student} "
                                f"{shapes[1]} ({field}, channels x height x width): these cannot "
                                f"be matched; wrn16_3 and wrn16_1, or resnet56 and resnet20, can")
    return taps


def print_networks() -> None:
    """Every network's size and the shape of its maps."""
    def shapes(maps: Sequence[Tensor]) -> str:
        return " ".join(f"{x.shape[1]}x{x.shape[2]}" for x in maps)

    print("channels x pixels of each group's first map (entries), last map (stages), and pre_relu;"
          "\nfor images of 32 pixels, and of 224 for ImageNet's networks")
    print(f"{'network':20}{'10 classes':>12}{'100':>12}{'1000':>12}  {'entries':30}{'stages':30}"
          f"pre_relu")
    for name in model_names():
        with torch.device("meta"):
            networks = [create_model(name, classes) for classes in (10, 100)]
        counts = [sum(p.numel() for p in network.parameters()) for network in networks]
        counts.append(counts[1] + 10 * (counts[1] - counts[0]))
        taps = meta_taps(name, 224 if name.startswith("imagenet_") else 32)
        print(f"{name:20}" + "".join(f"{count:12,}" for count in counts)
              + f"  {shapes(taps.entries):30}{shapes(taps.stages):30}{shapes(taps.pre_relu)}")


# --- Weights ------------------------------------------------------------------------------------


def read_checkpoint(path: Path) -> dict:
    """What a file of torch.save holds; nothing in it is executed."""
    try:
        # argparse's Namespace is plain data: torchvision's scripts keep their flags in one
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:      # each kind of damage fails in its own way
        if getattr(error, "filename", None):        # absent, or not to be read
            raise UserError(f"{path}: {error.strerror}") from None
        raise UserError(f"{path} {what_is_wrong(path, str(error))}") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not the weights of a network")
    return state


def what_is_wrong(path: Path, error: str) -> str:
    """Why torch.load cannot read a file, for a sentence that begins with its name."""
    with open(path, "rb") as file:
        head = file.read(200)
    if head.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS to the file meant: fetch that by `git lfs pull`"
    if head.lstrip().startswith(b"<"):
        return "is a web page, not a checkpoint: download the file itself"
    if head.strip() and head.isascii() and b"\0" not in head:
        return f"is a text, not a checkpoint; it begins with {head.decode().split()[0]}"
    if "TorchScript" in error:
        return "is a program of TorchScript, which is not executed: save its state_dict()"
    if objects := re.search(r"GLOBAL (\S+)", error):
        return (f"holds objects of Python beside tensors and numbers ({objects[1]}), of which "
                f"nothing is executed: save the state_dict() alone")
    return "is cut short, damaged or no checkpoint: copy, download or train it again"


def published_weights(name: str) -> dict:
    """torchvision's weights of that name, ResNet34_Weights.IMAGENET1K_V1; fetched where absent."""
    try:
        weights = get_weight(name)
    except (ValueError, KeyError):
        raise UserError(f"torchvision has no {name}; try ResNet34_Weights.IMAGENET1K_V1") from None
    try:
        return rank0_first(partial(weights.get_state_dict, progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:
        raise UserError(f"could not fetch {weights.url} ({error}); download it by hand and give "
                        f"the file's path instead") from None


def own_names(keys: list[str]) -> list[str]:
    """What our networks call a file's keys: no wrapper's prefix, torchvision's networks as ours."""
    names = [re.sub(r"^(module\.|_orig_mod\.)+", "", str(key)) for key in keys]
    if "features.18.0.weight" in names:     # MobileNetV2's layers stand in the same order
        with torch.device("meta"):
            ours = create_model("imagenet_mobilenetv2", 10).state_dict()
        counted = "features.0.1.num_batches_tracked" in names
        return [name for name in ours if counted or "tracked" not in name]
    if not {"layer1.0.conv1.weight", "fc.weight"} <= set(names):
        return names
    last = "3" if "layer1.0.conv3.weight" in names else "2"
    ours = []
    for name in names:
        name = re.sub(r"^bn1\.", "stem.1.", re.sub(r"^conv1\.", "stem.0.", name))
        name = re.sub(r"^layer(\d)", lambda match: f"groups.{int(match[1]) - 1}", name)
        name = name.replace(f".bn{last}.", ".last_norm.").replace(".bn", ".norm")
        ours.append(name.replace(".downsample.", ".shortcut.").replace("fc.", "classifier."))
    return ours


def load_weights(network: nn.Module, path: str | Path, settings: dict | None = None,
                 start: bool = False) -> dict:
    """Load all weights of a network, or raise UserError; return their "hash" and the file's rest.

    A file is a checkpoint of any of the scripts, a state_dict, or has one under one of the usual
    keys, also of DistributedDataParallel or torch.compile; or, of torchvision's networks, the name
    of published weights. settings: a loader's, whose classes and split a script's checkpoint must
    have learnt; of a start only the split, if of the same data. start: to train on from there; a
    classifier's file fits DeepLab too; what is of other classes, behind the groups, is left out.
    """
    path = Path(path).expanduser()
    if re.fullmatch(r"\w+_Weights\.\w+", str(path)) and not path.exists():
        weights = published_weights(str(path))
    else:
        weights = read_checkpoint(path)
    rest = {}
    for key in ("model", "state_dict", "model_state_dict", "net"):
        if isinstance(weights.get(key), dict):
            rest, weights = weights, weights.pop(key)
            break
    names = own_names(list(weights))
    if start and not any(name.startswith("backbone.") for name in names):
        network = getattr(network, "backbone", network)
    expected, loaded = network.state_dict(), {}
    for (key, value), name in zip(weights.items(), names):
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        wanted = tuple(expected[name].shape) if name in expected else "one of this network's"
        if found != wanted and start and name.startswith(("classifier.", "head.")):
            continue
        if found != wanted:
            raise UserError(f"{path} is of another network or number of classes: its {key} is "
                            f"{found}, not {wanted}")
        if not value.isfinite().all():
            raise UserError(f"{path}: its {key} is not finite (NaN or inf): the training that made "
                            f"it had failed")
        loaded[name] = value
    kept = loaded.keys() | {name for name in expected if name.endswith("num_batches_tracked")}
    for name in expected:       # files of old lack the counts of batches
        if name not in kept and not (start and name.startswith("classifier.")):
            raise UserError(f"{path} is of another network or number of classes: it has no {name}")
    network.load_state_dict(loaded, strict=False)
    learnt = rest["log"][0]["settings"] if settings and {"script", "log"} <= rest.keys() else {}
    keys = ("split",) if start else ("class_names", "split")
    for key in keys if learnt and (not start or learnt["data"] == settings["data"]) else ():
        if learnt[key] != settings[key]:
            raise UserError(f"{path} was trained with another {key}: {str(learnt[key])[:100]}")
    whole = b"".join(x.cpu().numpy().tobytes() for name, x in network.state_dict().items()
                     if name in kept)
    return rest | {"hash": hashlib.sha256(whole).hexdigest()[:8]}


# --- Data sets ----------------------------------------------------------------------------------

DATASETS = {"cifar10": 32, "cifar100": 32, "cinic10": 32, "folder": 32, "imagenet": 224,
            "scenes": 32, "shapes": 16, "voc": 513}     # the usual size of an image, in pixels
FOLDERS = {"cinic10": ("train", "test", "valid"), "folder": ("train", "test", "val", "valid"),
           "imagenet": ("train", "val")}


def processes() -> tuple[int, int]:
    """The rank of this process, and how many train together: 0 and 1 without torchrun."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def rank0_first(fetch: Callable) -> object:
    """fetch() in the first process, then in the others, which find what it downloaded."""
    rank, world = processes()
    if rank > 0:
        distributed.all_reduce(torch.zeros(1))      # a barrier, on whatever device the training is
    try:
        return fetch()
    finally:
        if rank == 0 and world > 1:
            distributed.all_reduce(torch.zeros(1))


class Split(NamedTuple):
    """One split of a data set, whole."""
    images: Tensor | np.ndarray    # (N, H, W, 3) uint8; of images in files their paths, (N,)
    labels: Tensor                 # (N,) int64; of pixels (N, H, W), but zeros for those in files
    masks: Tensor | None = None    # (N, H, W) bool, where the object is; shapes only


class Loader:
    """Normalised, channels_last batches of a split; what its two kinds below have in common.

    The order, crops and flips of a shuffled loader depend on (seed, epoch) alone. Of several
    processes each gets its share of every batch, and all together the batch that one would get.
    What cannot be shared of the last one, or leaves one image alone, which BatchNorm cannot
    normalise, sits out that epoch. A loader that is not shuffled gives every image, once.
    """

    def __init__(self, split: Split, class_names: list[str], size: int, mean: Tensor, std: Tensor,
                 batch_size: int, device: torch.device, shuffle: bool, seed: int):
        self.images, self.labels, self.masks = split.images, split.labels.to(device), split.masks
        self.class_names, self.num_classes = class_names, len(class_names)
        self.batch_size, self.shuffle = batch_size, shuffle
        self.size, self.seed, self.epoch = size, seed, 0
        self.settings = {}      # what decides the images; filled in by load_data
        self.pixels = False     # whether each pixel has a label; by load_data, too
        self.rank, self.world = processes()
        self.mean = [value / 255 for value in mean.tolist()]
        self.std = [value / 255 for value in std.tolist()]
        # one value a pixel, not one a channel: subtracting three-element rows is 5 times slower
        self.pixel_mean = mean.to(device).expand(size, size, 3).contiguous()
        self.pixel_std = std.to(device).expand(size, size, 3).contiguous()

    def set_epoch(self, epoch: int, seed: int | None = None) -> None:
        """Choose the order and the crops of the next pass; the seed stays what it was if None."""
        self.epoch, self.seed = epoch, self.seed if seed is None else seed

    def normalise(self, images: Tensor) -> Tensor:
        """(N, H, W, 3) uint8 -> (N, 3, H, W) float32, channels_last in memory."""
        return images.float().sub_(self.pixel_mean).div_(self.pixel_std).permute(0, 3, 1, 2)

    def confusion(self, logits: Tensor, labels: Tensor) -> Tensor:
        """How often each class (row) was taken for each (column), (K, K); -100 is no label."""
        pairs = (labels * self.num_classes + logits.argmax(1))[labels >= 0]
        return pairs.bincount(minlength=self.num_classes ** 2).view(self.num_classes, -1)

    def score(self, confusion: Tensor) -> float:
        """Of all processes' sums, in per cent: the accuracy, or of pixels the mean IoU."""
        confusion = confusion + self.labels.new_zeros(self.num_classes, self.num_classes)
        if self.world > 1:
            distributed.all_reduce(confusion)
        if not confusion.any():
            raise UserError("there is nothing to measure: no picture or no pixel has a label")
        right = confusion.diag()
        if not self.pixels:
            return 100 * right.sum().item() / confusion.sum().item()
        union = confusion.sum(0) + confusion.sum(1) - right
        return 100 * (right / union)[union > 0].mean().item()


class ImageLoader(Loader):
    """Of a split that lies on the device as uint8; crops and flips are drawn on the CPU for all."""

    def __init__(self, split: Split, class_names: list[str], mean: Tensor, std: Tensor,
                 batch_size: int, device: torch.device, *, shuffle: bool, augment: bool = False,
                 reflect: bool = False, seed: int = 0):
        super().__init__(split, class_names, split.images.shape[1], mean, std, batch_size, device,
                         shuffle, seed)
        images, self.augment = split.images, augment
        self.padding = self.size // 8 if augment else 0        # 4 pixels at 32x32
        if augment:
            widths = [(0, 0), (self.padding, self.padding), (self.padding, self.padding)]
            mode = "reflect" if reflect else "constant"
            images = torch.from_numpy(np.pad(images.numpy(), [*widths, (0, 0)], mode))
            if self.labels.ndim == 3:       # pixels beyond the image have no label
                beyond = {} if reflect else {"constant_values": -100}
                labels = np.pad(split.labels.numpy(), widths, mode, **beyond)
                self.labels = torch.from_numpy(labels).to(device)
        self.images = images.to(device)
        self.count = len(self.labels)       # of images in a pass
        self.at_once = 16 if shuffle and device.type == "cuda" else 1   # batches: larger kernels
        if shuffle:
            last = self.count % batch_size
            each = last // self.world       # of its images for each process
            self.count -= last - each * self.world if each > 1 else last

    def __len__(self) -> int:
        whole, last = divmod(self.count, self.batch_size)
        return whole + (last > self.rank)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count, width, device = len(self.labels), self.images.shape[2], self.labels.device
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        shift = torch.randint(2 * self.padding + 1, (2, count), generator=generator)
        flip = torch.randint(2, (1, count), generator=generator)
        plan = torch.cat([order[None], shift, flip])[:, :self.count].to(device)
        pixels = torch.arange(self.size, device=device)
        for part in plan.split(self.at_once * self.batch_size, dim=1):
            chosen, down, right, mirrored = part[:, self.rank::self.world]
            if not len(chosen):     # fewer images are left to measure than there are processes
                return
            labels = self.labels[chosen]
            if self.augment:
                rows, columns = down[:, None] + pixels, right[:, None] + pixels
                columns = torch.where(mirrored[:, None] == 1, width - 1 - columns, columns)
                # images[chosen, rows, columns], but four times as fast on a CPU
                lines = chosen[:, None, None] * width + rows[:, :, None]
                places = (lines * width + columns[:, None, :]).flatten()
                images = self.images.view(-1, 3).index_select(0, places)
                images = images.view(-1, self.size, self.size, 3)
                if labels.ndim == 3:
                    labels = self.labels.view(-1)[places].view(-1, self.size, self.size)
            else:
                images = self.images[chosen]
            share = self.batch_size // self.world
            yield from zip(self.normalise(images).split(share), labels.split(share))


class PictureFiles(Dataset):
    """Pictures in files, decoded and cut to (size, size, 3) uint8, with their labels.

    The number of workers changes nothing: each crop has a seed of its own.
    """

    def __init__(self, split: Split, size: int, augment: bool = False):
        self.paths, self.labels, self.seed = split.images, split.labels, 0
        cut = [v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)]
        if augment:     # 8 to 100 % of the picture
            cut = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
        self.transform = v2.Compose([v2.PILToTensor(), *cut])   # tensors are resized twice as fast

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        picture = decode(self.paths[index])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed((self.seed * 1_000_003 + index) % 2 ** 63)
            image = self.transform(picture)
        return image.permute(1, 2, 0), self.labels[index]


class PixelFiles(Dataset):
    """torchvision's pictures and their label images: (size, size, 3) uint8 and (size, size) int64.

    Where 255 stands, or nothing, there is no label: -100. For training the shorter side is scaled
    to between half and twice the size, then cut or filled up; else the longer side is the size.
    """

    def __init__(self, split: Split, size: int, augment: bool = False):
        self.items, self.size, self.seed, self.augment = split.images, size, 0, augment
        self.cut = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(
            size, pad_if_needed=True, fill={Picture: 0, Mask: 255})])

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        item = self.items[index]
        image, mask = Picture(decode(item[0], upright=False)), read_mask(item)  # both as they lie
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed((self.seed * 1_000_003 + index) % 2 ** 63)
            longer, shorter = max(mask.shape), min(mask.shape)
            scale = (0.5 + 1.5 * torch.rand(()).item()) / shorter if self.augment else 1 / longer
            sides = [max(1, round(self.size * scale * side)) for side in mask.shape]
            image = v2.functional.resize(image, sides)
            mask = Mask(F.interpolate(mask[None, None], sides, mode="nearest-exact")[0])
            image, mask = self.cut(image, mask) if self.augment else (image, mask)
        fill = (0, self.size - image.shape[2], 0, self.size - image.shape[1])
        image, mask = F.pad(image, fill), F.pad(mask, fill, value=255)[0].long()
        return image.permute(1, 2, 0), mask.masked_fill(mask == 255, -100)


def decoded(batches: DataLoader) -> Iterator:
    """What its worker processes have read; their errors in one line."""
    trouble = ""
    try:
        for batch in batches:
            if batches.num_workers and hasattr(signal, "SIGCHLD"):
                # torch would raise in whatever line runs just then
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            yield batch
    except (UserError, RuntimeError) as error:
        # a worker's error comes with its traceback, the error last
        trouble = str(error).strip().rpartition("UserError: ")[2]
        if trouble.startswith("DataLoader worker"):
            trouble = "a process that decodes images was killed: try fewer --workers"
        elif not isinstance(error, UserError):
            raise
        error.__traceback__ = None      # whose frames keep the other workers alive
    if trouble:
        raise UserError(trouble)


class FileLoader(Loader):
    """Of pictures that stay in their files, which worker processes decode anew each epoch."""

    def __init__(self, split: Split, class_names: list[str], mean: Tensor, std: Tensor,
                 batch_size: int, device: torch.device, *, shuffle: bool, augment: bool = False,
                 seed: int = 0, size: int = 224, workers: int = 0, files: type = PictureFiles):
        super().__init__(split, class_names, size, mean, std, batch_size, device, shuffle, seed)
        self.files = files(split, size, augment)
        share = batch_size // self.world
        if shuffle:
            sampler = DistributedSampler(self.files, self.world, self.rank, drop_last=True)
        else:       # DistributedSampler would measure some images twice
            sampler = range(self.rank, len(self.files), self.world)
        self.batches = DataLoader(self.files, share, sampler=sampler, num_workers=workers,
                                  drop_last=shuffle and len(sampler) % share == 1,
                                  generator=torch.Generator(), pin_memory=device.type == "cuda")
        needed = 2 * workers * batch_size * size ** 2 * (11 if files is PixelFiles else 3)
        if os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free < needed:   # 2 batches
            raise UserError(f"--workers {workers} need {needed >> 20} MB of /dev/shm, more than is "
                            f"free: choose fewer, or --workers 0, or Docker's --shm-size")

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.files.seed = self.seed * 1_000_003 + self.epoch
        if self.shuffle:
            self.batches.sampler.set_epoch(self.files.seed)
        for images, labels in decoded(self.batches):
            labels = labels.to(self.labels.device, non_blocking=self.batches.pin_memory)
            yield self.normalise(images.to(labels.device, non_blocking=labels.is_cuda)), labels


SHAPES = "disk ring crescent square triangle cross star clover heart corner".split()


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


def draw_shapes(count: int, seed: int, size: int = 16, scenes: bool = False) -> Split:
    """`count` pictures of one shape each, the ten classes in turn.

    Each shape is morphed by up to 42 % into one of another class, turned by up to 0.5 rad, shifted,
    scaled and coloured at random, and lies on a striped background with two distracting bars and
    noise. The morphs make the classes similar by degrees: this is what soft labels can tell.
    scenes: smaller shapes without morphs, in every second picture two; labels (N, H, W), the class
    of each pixel counted from 1, and 0 for the background.
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

    each, classes = torch.arange(count), torch.arange(count) % 10
    labels = torch.zeros(count, size, size, dtype=torch.long)
    sizes, reach, morph = ((0.4, 0.7), 0.5, 0) if scenes else ((0.77, 0.98), 0.25, 0.42)
    for number in range(1 + scenes):
        other = (classes + torch.randint(1, 10, (count,), generator=generator)) % 10
        scale = uniform(*sizes)
        fields = outlines(*place(scale, reach, most=0.5))
        field = torch.lerp(fields[each, classes], fields[each, other], uniform(0, morph))
        if number == 1:
            field[each // 10 % 2 == 0] = 9      # the second object is nowhere
        masks = field < 0
        # the object differs from what it covers by at least 0.8 in colour
        behind = (images * masks[:, None]).sum((2, 3), keepdim=True)
        behind = behind / masks[:, None].sum((2, 3), keepdim=True).clamp(min=1)
        contrast = uniform(0, 1, 3) - behind
        distance = contrast.norm(dim=1, keepdim=True).clamp(min=1e-3)
        images = paint(images, field, scale, behind + contrast / distance * distance.clamp(min=0.8))
        labels = torch.where(masks, 1 + classes[:, None, None], labels)
        if scenes:
            classes = classes[torch.randperm(count, generator=generator)]
    images = images + 0.04 * torch.randn(images.shape, generator=generator)
    images = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous()
    return Split(images, labels) if scenes else Split(images, classes, masks)


def read_cifar(dataset: str, data_dir: Path, train: bool) -> tuple[Split, list[str]]:
    """CIFAR-10 or CIFAR-100 by torchvision, downloaded when absent."""
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[dataset]
    try:
        source = rank0_first(partial(kind, data_dir, train=train, download=True))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"could not fetch {kind.url} ({error}); put {kind.filename} or the unpacked folder "
            f"{kind.base_folder} in {data_dir}/ by hand, or use --dataset shapes, which needs "
            f"nothing") from None
    return Split(torch.from_numpy(source.data), torch.tensor(source.targets)), source.classes


def look_into(folder: Path, seen: set[Path]) -> tuple[list[Path], list[str]]:
    """The folders, by name, and the files in a folder, without those that begin with a dot.

    A folder that was seen, or that holds this one, is left out: no link leads there again.
    """
    folders, files = [], []
    seen.update([folder.resolve(), *folder.resolve().parents])
    for entry in sorted(os.scandir(folder), key=lambda entry: (entry.is_symlink(), entry.name)):
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            files.append(entry.path)
        elif Path(entry.path).resolve() not in seen:
            folders.append(Path(entry.path))
            seen.add(folders[-1].resolve())
    return sorted(folders), files


def files_below(folder: Path, seen: set[Path]) -> list[str]:
    folders, files = look_into(folder, seen)
    return files + [file for inner in folders for file in files_below(inner, seen)]


def in_short(names: Iterable[str]) -> str:
    """The first five of them."""
    names = sorted(names)
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5)


def list_folder(data_dir: Path, names: Sequence[str]) -> tuple[dict[str, Split], list[str], str]:
    """The splits of a data set as paths, its classes, and a line that says what was found."""
    found = [data_dir / name for name in names if (data_dir / name).is_dir()]
    if data_dir / "train" not in found or len(found) < 2:
        raise UserError(f"{data_dir} needs the folders train/ and {'/ or '.join(names[1:])}/, with "
                        f"one subfolder of images per class; name it with --data-dir")
    if {data_dir / "val", data_dir / "valid"} <= set(found):
        raise UserError(f"{data_dir} has both val/ and valid/: remove or rename one of them")
    seen, classes, splits, others = {folder.resolve() for folder in found}, {}, {}, []
    for folder in found:
        classes[folder], files = look_into(folder, seen)
        others += files
    class_names = [path.name for path in classes[found[0]]]
    if len(class_names) < 2:
        raise UserError(f"{found[0]} needs two or more subfolders of images, one per class")
    for folder in found:
        if odd := {path.name for path in classes[folder]} ^ set(class_names):
            raise UserError(f"{data_dir}: the classes of train/ and {folder.name}/ differ in "
                            f"{in_short(odd)}; give both the same subfolders")
        paths, labels = [], []
        for label, path in enumerate(classes[folder]):
            files = files_below(path, seen)
            pictures = [file for file in files if file.lower().endswith(IMG_EXTENSIONS)]
            if not pictures:
                raise UserError(f"{path} has no images ({', '.join(IMG_EXTENSIONS)})")
            others += set(files) - set(pictures)
            paths += sorted(pictures, key=os.path.split)
            labels += [label] * len(pictures)
        name = folder.name.removesuffix("id")
        splits[name] = Split(np.array(paths, dtype=object), torch.tensor(labels))
    counts = [f"{len(split.labels)} {name}" for name, split in splits.items()]
    line = (f"{len(class_names)} classes ({in_short(class_names)}), {', '.join(counts[:-1])} and "
            f"{counts[-1]} images")
    if others:
        kinds = {os.path.splitext(file)[1].lower() or os.path.basename(file) for file in others}
        line += f", {len(others)} file{'s' * (len(others) > 1)} left out ({in_short(kinds)})"
    return splits, class_names, line


def decode(path: str, upright: bool = True) -> Image.Image:
    """The picture in a file: upright, in RGB, with white behind what is transparent."""
    try:
        with Image.open(path) as file:
            if file.mode[0] in "IF":    # convert would make it white
                raise UserError("it has more than 8 bits per channel, convert it to 8")
            picture = ImageOps.exif_transpose(file) if upright else file
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            return picture.convert("RGB")
    except Exception as error:    # each format of image fails in its own way
        reason = " ".join(str(error).split())
        raise UserError(f"cannot decode {path} ({reason}); repair or remove it") from None


def read_mask(item: tuple[str, Dataset, int]) -> Tensor:
    """The classes of a picture's pixels, (H, W) uint8; item: its path, its data set and number."""
    path, source, number = item
    file = source.masks[number]
    try:
        mask = Image.open(file) if file.endswith(".png") else source[number][1]     # SBD's .mat
        if mask.mode not in ("L", "P"):
            raise UserError(f"{file} holds no classes, but colours or numbers ({mask.mode})")
        mask = v2.functional.pil_to_tensor(mask)[0]
        with Image.open(path) as picture:
            if mask.shape != (picture.height, picture.width):
                raise UserError(f"{file} is not as large as its picture, {path}")
    except OSError as error:
        raise UserError(f"cannot read {file} ({error})") from None
    if (mask[mask < 255] > 20).any():
        raise UserError(f"{file} has class {mask[mask < 255].max()}; VOC's are 0 to 20, and 255")
    return mask


def read_voc(data_dir: Path, workers: int) -> dict[str, Split]:
    """PASCAL VOC 2012 and, where sbd/ lies beside it, SBD's other pictures to train on."""
    try:
        sets = {x: [datasets.VOCSegmentation(data_dir, image_set=x)] for x in ("val", "train")}
        if (data_dir / "sbd").is_dir():
            sets["train"] += [datasets.SBDataset(data_dir / "sbd", x, "segmentation") for x in sets]
    except (OSError, RuntimeError, UnicodeError) as error:
        raise UserError(f"{data_dir} needs VOCdevkit/VOC2012/: unpack VOCtrainval_11-May-2012.tar "
                        f"there, from host.robots.ox.ac.uk/pascal/VOC/voc2012 ({error})") from None
    splits, seen = {}, set()
    for name, sources in sets.items():      # val first: SBD has its pictures, too
        items = []
        for source in sources:
            items += [(path, source, number) for number, path in enumerate(source.images)
                      if Path(path).stem not in seen]
            seen.update(Path(path).stem for path in source.images)
        splits[name] = Split(np.fromiter(items, object), torch.zeros(len(items), dtype=torch.long))
        with ThreadPoolExecutor(max(1, workers)) as pool:       # mistakes show before training
            list(pool.map(read_mask, items[:len(sources[0])]))
    return splits


def read_square(path: str, size: int) -> Tensor:
    """A picture squeezed to (size, size, 3) uint8."""
    picture = v2.functional.resize(decode(path), [size, size])
    return v2.functional.pil_to_tensor(picture).permute(1, 2, 0)


def read_batch(paths: Sequence[str], size: int) -> Tensor:
    return torch.stack([read_square(path, size) for path in paths])


def read_squares(paths: Sequence[str], size: int, workers: int) -> Tensor:
    """All pictures in memory, (N, size, size, 3) uint8; few of them without other processes."""
    images = torch.empty(len(paths), size, size, 3, dtype=torch.uint8)
    many = max(1, 2 ** 18 // (3 * size ** 2))       # a quarter of a MB: /dev/shm may be small
    batches = DataLoader(list(paths), many, num_workers=workers if len(paths) >= 1000 else 0,
                         collate_fn=partial(read_batch, size=size), generator=torch.Generator())
    for part, batch in zip(images.split(many), decoded(batches)):
        part.copy_(batch)
    return images


def subset(split: Split, chosen: Tensor) -> Split:
    # an array of paths, indexed by a tensor of one number, would give the path itself
    return Split(*(None if part is None else part[chosen.numpy()] for part in split))


def balanced_order(labels: Tensor) -> Tensor:
    """A fixed random order in which the classes take turns: its first n are a fair sample."""
    if labels.ndim == 3:    # scenes, drawn class by class
        labels = torch.arange(len(labels)) % 10
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    turn = torch.empty_like(order)
    for label in labels.unique():
        of_class = labels[order] == label
        turn[of_class] = torch.arange(int(of_class.sum()))
    return order[turn.argsort(stable=True)]


def colours(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std of each channel, (3,), of (N, H, W, 3) uint8."""
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for part in images.split(500):
        pixels = part.reshape(-1, 3).double()
        sums += torch.stack([pixels.sum(0), pixels.square().sum(0)])
    mean, square = sums / images[..., 0].numel()
    return mean, (square - mean.square()).sqrt().clamp(min=1e-3)


def keep_memory() -> None:
    """Let glibc keep freed memory: to return large maps and get them again costs a CPU a tenth."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)     # M_MMAP_MAX: none
        libc.mallopt(-1, -1)    # M_TRIM_THRESHOLD: never


def usual_workers() -> int:
    """The cores, shared among the processes that torchrun starts here; at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def load_data(dataset: str, data_dir: str | Path, batch_size: int, device: torch.device | str,
              *, augment: bool, seed: int, reflect: bool = False, image_size: int | None = None,
              train_images: int | None = None, split: str = "test", workers: int | None = None,
              ) -> tuple[Loader, Loader]:
    """The training loader and the loader of the split that accuracy is measured on.

    dataset       one of DATASETS
    augment       random crop from 4 pixels of padding (at 32x32), black or `reflect`, and flip;
                  of images in files: random resized crop and flip
    train_images  train on a class-balanced sample of so many images, the same for every seed
    split         "test", or "val" for tuning: the data set's own validation split, or else a fixed
                  tenth of the training images, which are then not trained on. Where there is no
                  test split both measure "val"; settings["split"] says which it is
    workers       processes that read images in files; a caller needs `if __name__ == "__main__"`
    ImageNet, VOC, and folders from 64 pixels on stay in files. Images are normalised by mean and
    std of the training images, or of a sample of those in files; ImageNet and VOC by ImageNet's.
    """
    device, (rank, world) = torch.device(device), processes()
    if dataset not in DATASETS:
        raise UserError(f"unknown data set {dataset}; known are {', '.join(DATASETS)}")
    size, workers = image_size or DATASETS[dataset], usual_workers() if workers is None else workers
    if size != DATASETS[dataset] and dataset not in (*FOLDERS, "voc"):
        raise UserError(f"--image-size is for folders of images; those of {dataset} have "
                        f"{DATASETS[dataset]} pixels")
    if batch_size % world or batch_size < 2 * world:
        raise UserError(f"--batch-size {batch_size}: BatchNorm needs two images or more in each of "
                        f"{world} process{'es' * (world > 1)}, and all have equally many")
    if device.type == "cpu":
        keep_memory()
    name, data_dir, line = dataset, Path(data_dir).expanduser(), ""
    in_files = dataset in ("imagenet", "voc") or (dataset == "folder" and size >= 64)
    if dataset == "shapes":
        class_names = SHAPES
        splits = {"train": draw_shapes(4000, seed=1), "val": draw_shapes(2000, seed=2),
                  "test": draw_shapes(2000, seed=3)}
    elif dataset == "scenes":
        class_names = ["background", *SHAPES]
        splits = {"train": draw_shapes(2000, 1, 32, True), "val": draw_shapes(500, 2, 32, True),
                  "test": draw_shapes(500, 3, 32, True)}
    elif dataset == "voc":
        class_names = get_weight("DeepLabV3_ResNet50_Weights.DEFAULT").meta["categories"]
        splits = read_voc(data_dir, workers)
        line = f"{len(splits['train'].labels)} train and {len(splits['val'].labels)} val images"
    elif dataset in FOLDERS:
        if dataset == "folder":     # known by its name, wherever it lies
            name = os.path.basename(os.path.abspath(data_dir))
        splits, class_names, line = list_folder(data_dir, FOLDERS[dataset])
    else:
        splits = {"train": read_cifar(dataset, data_dir, train=True)[0]}
        splits["test"], class_names = read_cifar(dataset, data_dir, train=False)
    if line and rank == 0:
        print(f"{name}: {line}", flush=True)
    split = split if "test" in splits else "val"
    if dataset in FOLDERS and not in_files:
        for part in {"train", split} & splits.keys():
            images = read_squares(splits[part].images, size, workers)
            splits[part] = Split(images, splits[part].labels)
    train = splits["train"]
    order = balanced_order(train.labels)
    # over the whole training split, so that a teacher and a student on fewer images agree
    if dataset in ("imagenet", "voc"):
        mean, std = 255 * torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    elif in_files:
        mean, std = colours(read_squares(subset(train, order[:1000]).images, size, workers))
    else:
        mean, std = colours(train.images)
    if split in splits:
        measured = splits[split]
    else:
        held_out = max(1, len(order) // 10)
        measured, order = subset(train, order[:held_out]), order[held_out:]
    if train_images is not None and train_images > len(order):
        raise UserError(f"{train_images} training images asked for, {name} has {len(order)}")
    train = subset(train, order[:train_images].sort().values)
    if len(train.labels) < 2 * world:
        raise UserError(f"{len(train.labels)} training images are too few for {world} processes")
    shared = (class_names, mean.float(), std.float())
    kind, own = ImageLoader, {"reflect": reflect}
    measured_batch = (1000 if device.type == "cuda" else 500) * world
    if in_files:    # large images: as many at a time as in training
        kind, own, measured_batch = FileLoader, {"size": size, "workers": workers}, batch_size
        own["files"] = PixelFiles if dataset == "voc" else PictureFiles
    loaders = (kind(train, *shared, batch_size, device, shuffle=True, augment=augment, seed=seed,
                    **own),
               kind(measured, *shared, measured_batch, device, shuffle=False, **own))
    for loader in loaders:
        loader.pixels = dataset in ("scenes", "voc")
        loader.settings = {
            "data": name, "split": split, "image_size": size,
            "images": [len(train.labels), len(measured.labels)], "class_names": class_names,
            "mean": [round(value, 3) for value in loader.mean],
            "std": [round(value, 3) for value in loader.std]}
        loader.settings |= {"in_files": True} if in_files else {}
    return loaders


if __name__ == "__main__":
    print_networks()
