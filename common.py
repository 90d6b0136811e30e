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
import time
import warnings
from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.models import get_weight
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor, resize

try:
    from torchvision.io import decode_image
except ImportError:     # torchvision announces that it will go; PIL takes half as long again
    decode_image = None


class UserError(ValueError):
    """What the person at the keyboard can mend; a script prints its message as one line."""


def in_short(error: Exception) -> str:
    """What an error says first: torch's go on for pages."""
    return str(error).strip().split("\n")[0][:200]


def one_line(error: Exception) -> str:
    """What a user can mend, in one line; any other error is raised again, traceback and all."""
    lost = isinstance(error, RuntimeError) and re.search("by peer|gloo|NCCL", str(error))
    if int(os.environ.get("RANK", 0)) > 0 or lost:
        time.sleep(3)       # torchrun ends this process where another one has said it all
        sys.stderr = sys.__stderr__
    if lost:
        return (f"error: another process of this run has ended or cannot be reached "
                f"({in_short(error)}); the same command goes on from there")
    if "allocate memory" in str(error) or isinstance(error, torch.OutOfMemoryError):
        return "error: out of memory: choose a smaller --batch-size, --image-size or network"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"error: torch.compile failed ({in_short(error)}): go on without --compile"
    if str(error).startswith("DataLoader worker"):
        return "error: a process that decodes images was killed: choose fewer --workers"
    if isinstance(error, UserError | OSError):
        return " ".join(f"error: {error}".split())
    raise error


def full(x: Tensor) -> Tensor:
    """float16 and bfloat16 to float32; float32 and float64 stay what they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ================================================================================================
# Several processes, as torchrun starts them
# ================================================================================================


def processes() -> tuple[int, int]:
    """The number of this process, and of how many that train together: 0 and 1 without torchrun."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def join_processes() -> None:
    """Under torchrun, meet the other processes, one GPU each; only the first one prints."""
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys() or distributed.is_initialized():
        return
    if int(os.environ["RANK"]) > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if 0 < gpus < here and "cpu" not in " ".join(sys.argv):
        raise UserError(f"{here} processes for {gpus} GPUs: start one for each, or add "
                        f"--device cpu")
    if here <= gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    try:
        # gloo for what lies on the CPU, nccl on GPUs; long enough to decode a large folder
        distributed.init_process_group(timeout=timedelta(hours=3))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes cannot meet ({in_short(error)}): start them by torchrun, "
                        f"with another --master-port") from None
    lines = [None] * processes()[1]
    distributed.all_gather_object(lines, sys.argv[1:])
    for number, line in enumerate(lines):
        if line != lines[0]:
            raise UserError(f"process {number} was started with other arguments than the first "
                            f"one: {' '.join(line)}")


def in_turn(read: Callable) -> object:
    """read() in the first process, then in the others: what it leaves on the disk is made once."""
    first = processes()[0] == 0
    if not first:
        wait_for_all()
    try:
        return read()
    finally:
        if first:
            wait_for_all()


def wait_for_all() -> None:
    """A barrier; of a tensor on the CPU, so that gloo does it wherever the training is."""
    summed(torch.zeros(1))


def summed(x: Tensor) -> Tensor:
    """Added up over all processes, in place."""
    if processes()[1] > 1:
        distributed.all_reduce(x)
    return x


def share_statistics(model: nn.Module) -> None:
    """BatchNorm's running statistics become the first process's in all, as before every step."""
    for buffer in model.buffers() if processes()[1] > 1 else ():
        distributed.broadcast(buffer, 0)


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


def resnet(block: type, counts: list[int], channels: list[int], num_classes: int,
           imagenet: bool = False) -> Network:
    """Residual network (He et al. 2016), with 1x1 convolution shortcuts.

    resnet20: depth 6n + 2 in three groups of n basic blocks, 16 to 64 channels; resnet8x4: four
    times as wide, with a stem of 32 channels; resnet50: four groups of bottlenecks.
    imagenet: torchvision's networks, whose stem makes the image four times smaller.
    """
    stem = nn.Sequential(nn.Conv2d(3, channels[0], 3, 1, 1, bias=False),
                         nn.BatchNorm2d(channels[0]), nn.ReLU())
    if imagenet:
        stem[0] = nn.Conv2d(3, channels[0], 7, 2, 3, bias=False)
        stem.append(nn.MaxPool2d(3, 2, 1))
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
    """MobileNet (Howard et al. 2017) for ImageNet, 4.2M weights, maps of 56 to 7 pixels.

    The first block, at half of the image's size, belongs to the stem: the four groups end where the
    overhaul's code distils, after its layers 3, 5, 11 and 13.
    """
    stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
                         nn.Conv2d(32, 32, 3, 1, 1, groups=32, bias=False), nn.BatchNorm2d(32),
                         nn.ReLU(), nn.Conv2d(32, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    groups, channels = nn.ModuleList(), [64, 128, 256, 512, 1024]
    for number, count in enumerate((2, 2, 6, 2)):
        groups.append(group_of(DepthwiseBlock, count, channels[number], channels[number + 1], 2))
    norms = [group[-1].last_norm for group in groups]
    return Network(stem, groups, None, channels[1:], norms, num_classes)


# The pairs of networks, teacher and student, of the papers' tables.
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
    "Overhaul, Table 4 (ImageNet)": [
        ("imagenet_resnet152", "imagenet_resnet50"), ("imagenet_resnet50", "imagenet_mobilenet")],
    "SKD, Table 3 (CIFAR-100)": [
        ("wrn40_2", "wrn16_2"), ("wrn40_2", "wrn40_1"), ("resnet56", "resnet20"),
        ("resnet110", "resnet20"), ("resnet110", "resnet32"), ("resnet32x4", "resnet8x4"),
        ("vgg13", "vgg8")],
    "SKD, Table 4 (CIFAR-100), unlike networks": [
        ("resnet50", "mobilenetv2_half"), ("resnet50", "vgg8"), ("resnet32x4", "shufflenetv1"),
        ("resnet32x4", "shufflenetv2"), ("wrn40_2", "shufflenetv1")],
    "SKD, Tables 5 and 6 (ImageNet)": [
        (f"imagenet_resnet{depth}", "imagenet_resnet18") for depth in (34, 50, 101, 152)],
    "SKD, Table 7 (CIFAR-100), growing teachers": [
        (f"resnet{depth}", "resnet14") for depth in (20, 32, 44, 56, 110)]}

# ImageNet's ResNets, by depth: the block, and how many of them in each group.
IMAGENET = {"18": (BasicBlock, [2, 2, 2, 2]), "34": (BasicBlock, [3, 4, 6, 3]),
            "50": (Bottleneck, [3, 4, 6, 3]), "101": (Bottleneck, [3, 4, 23, 3]),
            "152": (Bottleneck, [3, 8, 36, 3])}


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
    match = re.fullmatch(r"imagenet_resnet(\d+)", name)
    if match and match[1] in IMAGENET:
        block, counts = IMAGENET[match[1]]
        widths = [width * (1 if block is BasicBlock else 4) for width in (64, 128, 256, 512)]
        return resnet(block, counts, [64, *widths], num_classes, imagenet=True, **kw)
    if match := re.fullmatch(r"resnet(\d{1,4})(x4)?", name):
        depth, channels = int(match[1]), [32, 64, 128, 256] if match[2] else [16, 16, 32, 64]
        if depth < 8 or depth % 6 != 2:
            raise UserError(f"{name}: a CIFAR residual network has depth 6n+2 "
                            f"(8, 14, 20, 26, 32, 44, 56, 110), as in resnet20 or resnet8x4")
        return resnet(BasicBlock, [(depth - 2) // 6] * 3, channels, num_classes, **kw)
    if name in MOBILENETS:
        return mobilenetv2(name, num_classes, **kw)
    makers = {"imagenet_mobilenet": mobilenet, "vgg8": partial(vgg, 1), "vgg13": partial(vgg, 2),
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
               "mobilenetv2_half", "shufflenetv1", "shufflenetv2"]
            + [f"imagenet_resnet{depth}" for depth in IMAGENET] + ["imagenet_mobilenet"])


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
    """Every network's size and the shape of its maps, then the papers' pairs."""
    def shapes(maps: list[Tensor]) -> str:
        return " ".join(f"{x.shape[1]}x{x.shape[2]}" for x in maps)

    print("channels x pixels of each group's first map (entries), last map (stages), and pre_relu;"
          "\nof images of 32 pixels, of ImageNet's networks of 224")
    print(f"{'network':20}{'classes: 10':>12}{'100':>12}{'1000':>12}  {'entries':30}{'stages':30}"
          f"pre_relu")
    for name in model_names():
        size = 224 if name.startswith("imagenet_") else 32
        with torch.device("meta"), torch.no_grad():     # shapes without numbers
            network = create_model(name, 10).eval()
            taps = network(torch.empty(1, 3, size, size), taps=True)
        of_class = network.classifier.in_features + 1
        count = sum(p.numel() for p in network.parameters()) - 10 * of_class
        print(f"{name:20}" + "".join(f"{count + n * of_class:12,}" for n in (10, 100, 1000))
              + f"  {shapes(taps.entries):30}{shapes(taps.stages):30}{shapes(taps.pre_relu)}")
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


def published_weights(name: str) -> dict:
    """torchvision's weights of that name, ResNet34_Weights.IMAGENET1K_V1; fetched where absent."""
    try:
        weights = get_weight(name)
    except (ValueError, KeyError):
        raise UserError(f"{name}: torchvision has no such weights; known are those such as "
                        f"ResNet34_Weights.IMAGENET1K_V1") from None
    try:
        return in_turn(partial(weights.get_state_dict, progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:
        raise UserError(f"could not fetch {weights.url} ({error}); download it by hand and give "
                        f"--teacher-ckpt the file") from None


def from_torchvision(weights: dict) -> dict:
    """The state_dict of one of torchvision's ResNets under the names of ours."""
    last = "3" if "layer1.0.conv3.weight" in weights else "2"
    ours = {}
    for key, x in weights.items():
        key = re.sub(r"^(conv|bn)1\.", lambda match: f"stem.{int(match[1] == 'bn')}.", key)
        key = re.sub(r"^layer(\d)", lambda match: f"groups.{int(match[1]) - 1}", key)
        key = key.replace(f".bn{last}.", ".last_norm.").replace(".bn", ".norm")
        key = key.replace(".downsample.", ".shortcut.").replace("fc.", "classifier.")
        ours[key] = x
        if key.endswith("running_var"):     # files of old lack the count of batches
            ours.setdefault(key.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    return ours


def load_weights(network: nn.Module, path: Path) -> None:
    """Load a checkpoint of any of the scripts, or a plain state_dict; all of it, or UserError.

    Of torchvision's ResNets too: a file, or the name of published weights in place of its path.
    A method's connectors are no part of the network and are left out.
    """
    if re.fullmatch(r"\w+_Weights\.\w+", str(path)) and not Path(path).exists():
        weights = published_weights(str(path))
    else:
        weights = read_checkpoint(path)["model"]
    if isinstance(weights, dict):
        weights = {key: x for key, x in weights.items() if not str(key).startswith("connectors.")}
        if "layer1.0.conv1.weight" in weights and "fc.weight" in weights:
            weights = from_torchvision(weights)
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
    if processes()[0] > 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for source in (script, Path(__file__)):
        shutil.copy(source, folder)


def write_run(folder: Path, state: dict) -> None:
    """log.jsonl and last.pt, each written aside and renamed: a kill leaves what was there whole.

    The first process writes, the others wait, since they may read it next.
    """
    if processes()[0] == 0:
        write_files(folder, state)
    wait_for_all()


def write_files(folder: Path, state: dict) -> None:
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
    images: Tensor | np.ndarray    # (N, H, W, 3) uint8; of a FileLoader the paths, (N,)
    labels: Tensor                 # (N,) int64
    masks: Tensor | None = None    # (N, H, W) bool, where the object is; shapes only


class Loader:
    """Normalised, channels_last batches of a split; what its two kinds below have in common.

    The order, crops and flips of a shuffled loader depend on (seed, epoch) alone. Of several
    processes each gets its share of every batch, and all together the batch that one would get.
    Images left over for the last batch that cannot be shared alike, or would leave each process
    with one alone, which BatchNorm could not normalise, sit out their epoch; measured are all.
    """

    def __init__(self, split: Split, class_names: list[str], size: int, mean: Tensor, std: Tensor,
                 batch_size: int, device: torch.device, shuffle: bool, augment: bool, seed: int):
        self.images, self.labels, self.masks = split.images, split.labels.to(device), split.masks
        self.class_names, self.num_classes = class_names, len(class_names)
        self.batch_size, self.shuffle, self.augment = batch_size, shuffle, augment
        self.size, self.seed, self.epoch = size, seed, 0
        self.settings = {}      # what decides the images; filled in by load_data
        self.rank, self.world = processes()
        last = len(self.labels) % batch_size
        kept = last - last % self.world
        if kept == self.world and len(self.labels) > 1:
            kept = 0
        self.left_out = last - kept if shuffle else 0
        # one value a pixel, not one a channel: subtracting three-element rows is 5 times slower
        self.mean = mean.to(device).expand(size, size, 3).contiguous()
        self.std = std.to(device).expand(size, size, 3).contiguous()

    def __len__(self) -> int:
        whole, last = divmod(len(self.labels) - self.left_out, self.batch_size)
        return whole + (last > self.rank)

    def set_epoch(self, epoch: int, seed: int | None = None) -> None:
        """Choose the order and the crops of the next pass; the seed stays what it was if None."""
        self.epoch, self.seed = epoch, self.seed if seed is None else seed

    def begin_pass(self) -> tuple[Tensor, torch.Generator]:
        """The order of this pass, and the generator that its crops and flips are drawn from."""
        generator, count = torch.Generator(), len(self.labels)
        generator.manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        return order, generator

    def share(self, values: Tensor) -> Iterator[Tensor]:
        """This process's part of each batch, of (..., N) values in the order of the pass."""
        for batch in values[..., :len(self.labels) - self.left_out].split(self.batch_size, -1):
            if self.rank < batch.shape[-1]:
                yield batch[..., self.rank::self.world]

    def normalise(self, images: Tensor) -> Tensor:
        """(N, H, W, 3) uint8 -> (N, 3, H, W) float32, channels_last in memory."""
        return images.float().sub_(self.mean).div_(self.std).permute(0, 3, 1, 2)


class ImageLoader(Loader):
    """Of a split that lies on the device as uint8: crops from a padded border, and flips.

    They are drawn on the CPU, so that every device sees the same batches; the pixels never leave
    the device.
    """

    def __init__(self, split: Split, class_names: list[str], mean: Tensor, std: Tensor,
                 batch_size: int, device: torch.device, *, shuffle: bool, augment: bool = False,
                 reflect: bool = False, seed: int = 0):
        super().__init__(split, class_names, split.images.shape[1], mean, std, batch_size, device,
                         shuffle, augment, seed)
        self.images = split.images.to(device)
        self.padding = self.size // 8 if augment else 0        # 4 pixels at 32x32
        if augment:     # the mirrored pictures lie behind the others: flipping costs memory alone
            self.images = pad(self.images, self.padding, reflect)
            self.images = torch.cat([self.images, self.images.flip(2)])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device, count, wide = self.labels.device, len(self.labels), self.size + 2 * self.padding
        order, generator = self.begin_pass()
        order = order.to(device)
        if not self.augment:
            for chosen in self.share(order):
                yield self.normalise(self.images[chosen]), self.labels[chosen]
            return
        shift = torch.randint(2 * self.padding + 1, (2, count), generator=generator).to(device)
        order += count * torch.randint(2, (count,), generator=generator).to(device)
        # Every run of `size` pixels in memory is a row of this view, so that a crop is `size` of
        # its rows: (image, line, column) -> the number of the pixel the row starts at.
        runs = self.images.view(-1).as_strided(
            (self.images[..., 0].numel() - self.size + 1, 3 * self.size), (3, 1))
        lines = torch.arange(self.size, device=device)
        for chosen, (down, right) in zip(self.share(order), self.share(shift)):
            start = ((chosen * wide + down)[:, None] + lines) * wide + right[:, None]
            crop = runs.index_select(0, start.flatten()).view(-1, self.size, self.size, 3)
            yield self.normalise(crop), self.labels[chosen % count]


class FileLoader(Loader):
    """Of pictures in files, which worker processes decode anew each epoch.

    With `augment` a part of 8 to 100 % of each picture and its mirror image, as is usual on
    ImageNet; else the middle. The number of workers changes no batch: a picture's crop has a seed
    of its own, drawn from (seed, epoch).
    """

    def __init__(self, split: Split, class_names: list[str], mean: Tensor, std: Tensor,
                 batch_size: int, device: torch.device, *, shuffle: bool, augment: bool = False,
                 seed: int = 0, size: int = 224, workers: int = 0):
        super().__init__(split, class_names, size, mean, std, batch_size, device, shuffle, augment,
                         seed)
        self.workers = workers

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.labels.device
        order, generator = self.begin_pass()
        seeds = torch.randint(2 ** 62, order.shape, generator=generator)
        asked = ([(self.images[n], seed if self.augment else None)
                  for n, seed in zip(*both.tolist())]
                 for both in self.share(torch.stack([order, seeds])))
        for images, chosen in zip(decoded(asked, self.size, self.workers, device.type == "cuda"),
                                  self.share(order.to(device))):
            yield self.normalise(images.to(device, non_blocking=True)), self.labels[chosen]


class Decoder:
    """What a worker does: [(path, seed of its crop or None), ...] -> (N, size, size, 3) uint8.

    Or, where a picture is broken, a text that says so: an error that is raised in a worker comes
    out with two tracebacks.
    """

    def __init__(self, size: int):
        self.part = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()])
        self.middle = v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)])

    def __getitem__(self, asked: list[tuple[str, int | None]]) -> Tensor | str:
        images = []
        with torch.random.fork_rng(devices=[]):
            for path, seed in asked:
                try:
                    picture = decode(path)
                except UserError as error:
                    return str(error)
                if seed is not None:
                    torch.default_generator.manual_seed(seed)
                images.append(self.middle(picture) if seed is None else self.part(picture))
        return torch.stack(images).permute(0, 2, 3, 1).contiguous()


def decode(path: str) -> Tensor:
    """A picture in a file, (3, H, W) uint8."""
    try:
        picture = decode_image(path, "RGB") if decode_image else None
    except RuntimeError:    # PIL knows more kinds of files, and can say what is wrong
        picture = None
    if picture is None or picture.dtype != torch.uint8:
        picture = pil_to_tensor(open_picture(path))
    return picture


def decoded(asked: Iterable[list], size: int, workers: int, pinned: bool) -> Iterator[Tensor]:
    """What Decoder gives for each list, in their order."""
    # a generator of its own, since a DataLoader draws from it even where nothing is shuffled
    for images in DataLoader(Decoder(size), batch_size=None, sampler=asked, num_workers=workers,
                             pin_memory=pinned, generator=torch.Generator()):
        if isinstance(images, str):
            raise UserError(images)
        yield images


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


def list_folder(data_dir: Path, names: tuple[str, ...]) -> tuple[dict, list[str]]:
    """data_dir/train, /test and /val (or /valid), each with a subfolder of images a class."""
    sources = {}
    for name in names:
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
    return sources, class_names


def open_picture(path: str) -> datasets.folder.Image.Image:
    """By PIL, in RGB."""
    try:
        with datasets.folder.Image.open(path) as file:
            if file.mode[0] in "IF":    # convert would make it white
                raise UserError("it has more than 8 bits a channel, convert it to 8")
            return file.convert("RGB")
    except Exception as error:    # each format of image fails in its own way
        raise UserError(f"cannot decode {path} ({error}); repair or remove it") from None


def read_folder(data_dir: Path, sources: dict, image_size: int) -> dict[str, Split]:
    """The splits that list_folder found, in memory.

    Decoded once and kept in data_dir/.decoded_<image_size>.pt, which is made anew when an image
    below data_dir has come, gone, or changed in size or time.
    """
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
            picture = open_picture(path)
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
            for (name, source), part in zip(sources.items(), parts)}


def too_large(count: int, image_size: int, device: torch.device) -> str:
    """Why so many images of a folder are to stay in their files; "" where they go into memory."""
    if image_size >= 64:
        return "images of 64 pixels or more stay in their files"
    memory = math.inf
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cuda":
        memory = min(memory, torch.cuda.get_device_properties(device).total_memory)
    needed = 12 * count * image_size ** 2       # padded and mirrored they are three times as large
    if needed <= memory:
        return ""
    return f"in memory they would take {needed / 2 ** 30:.0f} of {memory / 2 ** 30:.0f} GiB"


def subset(split: Split, chosen: Tensor) -> Split:
    # an array of paths, indexed by a tensor of one number, would give the path itself
    return Split(*(None if part is None else part[chosen.numpy()] for part in split))


def balanced_order(labels: Tensor) -> Tensor:
    """A fixed random order in which the classes take turns: its first n are a fair sample."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    by_class, counts = labels[order].argsort(stable=True), labels.bincount()
    first = (counts.cumsum(0) - counts)[labels[order[by_class]]]    # of its class, in by_class
    turn = torch.empty_like(order).scatter_(0, by_class, torch.arange(len(order)) - first)
    return order[turn.argsort(stable=True)]


def colours(images: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel, (3,), over batches (N, H, W, 3) of uint8."""
    sums, count = 0, 0
    for part in images:
        sums = sums + torch.stack([part.reshape(-1, 3).double().pow(power).sum(0)
                                   for power in (1, 2)])
        count += part[..., 0].numel()
    mean, square = sums / count
    return mean, (square - mean.square()).sqrt().clamp(min=1e-3)


def keep_memory() -> None:
    """Let glibc keep freed memory: to return large maps and get them again costs a CPU a tenth."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)     # M_MMAP_MAX: none
        libc.mallopt(-1, -1)    # M_TRIM_THRESHOLD: never


FOLDERS = "cinic10", "folder", "imagenet"


def usual_size(dataset: str) -> int:
    return {"imagenet": 224, "shapes": 16}.get(dataset, 32)


def usual_workers() -> int:
    """The cores, shared among the processes that torchrun starts here; at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def load_data(dataset: str, data_dir: str | Path, batch_size: int, device: torch.device | str,
              *, augment: bool, seed: int, reflect: bool = False, image_size: int | None = None,
              train_images: int | None = None, split: str = "test", workers: int | None = None,
              ) -> tuple[Loader, Loader]:
    """The training loader and the loader of the split that accuracy is measured on.

    dataset       cifar10, cifar100, cinic10, folder, shapes; imagenet: its folders train and val
    augment       random crop from 4 pixels of padding (at 32x32), black or `reflect`, and flip;
                  of a FileLoader, for imagenet and large folders: random resized crop and flip
    train_images  train on a fair sample of so many images; the same one whatever the seed
    split         "test", or "val" for tuning: the data set's own validation split, or else a fixed
                  tenth of the training images, which are then not trained on
    workers       processes that decode; 0: this one
    Colours are normalised over the training images; over a fair sample of 1000 where they stay in
    files, and by the usual numbers of ImageNet.
    A data set that is missing or broken raises UserError, which says what to do about it.
    """
    device, (rank, world) = torch.device(device), processes()
    if device.type == "cpu":
        keep_memory()
    if world > 1 and (batch_size % world or batch_size < 2 * world):
        raise UserError(f"--batch-size {batch_size} is for all {world} processes together: make it "
                        f"{world} times the images of each, which are two or more")
    data_dir, class_names = Path(data_dir), SHAPES
    image_size = image_size or usual_size(dataset)
    workers = usual_workers() if workers is None else workers
    in_files = dataset == "imagenet"
    if dataset not in FOLDERS and image_size != usual_size(dataset):
        raise UserError(f"--image-size is for folders of images; those of {dataset} have "
                        f"{usual_size(dataset)} pixels")
    if dataset == "shapes":
        splits = {"train": draw_shapes(4000, seed=1), "val": draw_shapes(2000, seed=2),
                  "test": draw_shapes(2000, seed=3)}
    elif dataset in ("cifar10", "cifar100"):
        splits = {"train": in_turn(partial(read_cifar, dataset, data_dir, train=True))[0]}
        splits["test"], class_names = in_turn(partial(read_cifar, dataset, data_dir, train=False))
    elif dataset in FOLDERS:
        names = ("train", "val") if dataset == "imagenet" else ("train", "test", "val", "valid")
        sources, class_names = list_folder(data_dir, names)
        if dataset == "folder":
            reason = too_large(sum(map(len, sources.values())), image_size, device)
            in_files = bool(reason)
            if in_files and rank == 0:
                print(f"{data_dir}: {reason}, to be decoded each epoch (--workers {workers})")
        if in_files:
            splits = {name: Split(np.array([path for path, _ in source.samples], dtype=object),
                                  torch.tensor(source.targets)) for name, source in sources.items()}
        else:
            splits = in_turn(partial(read_folder, data_dir, sources, image_size))
    else:
        raise UserError(f"unknown data set {dataset}; known are cifar10, cifar100, cinic10, "
                         f"folder, imagenet and shapes")
    train, measured = splits["train"], splits.get("test", splits.get("val"))
    order = balanced_order(train.labels)
    # over the whole training split, so that a teacher and a student on fewer images agree
    if dataset == "imagenet":
        mean, std = 255 * torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    elif in_files:
        sample = ([(path, None) for path in subset(train, part).images]
                  for part in order[:1000].split(50))
        mean, std = colours(decoded(sample, image_size, workers, pinned=False))
    else:
        mean, std = colours(train.images.split(5000))
    if split == "val" and {"val", "test"} <= splits.keys():
        measured = splits["val"]
    elif split == "val":
        held_out = max(1, len(order) // 10)
        measured, order = subset(train, order[:held_out]), order[held_out:]
    if train_images is not None and train_images > len(order):
        raise UserError(f"{train_images} training images asked for, {dataset} has {len(order)}")
    train = subset(train, order[:train_images].sort().values)
    if world > 1 and len(train.labels) < 2 * world:
        raise UserError(f"{len(train.labels)} training images are too few for {world} processes")
    shared = (class_names, mean.float(), std.float())
    kind, own, measured_batch = ImageLoader, dict(reflect=reflect), 500 * world
    if in_files:    # large images: as many at a time as in training
        kind, own, measured_batch = FileLoader, dict(size=image_size, workers=workers), batch_size
    train_loader = kind(train, *shared, batch_size, device, shuffle=True, augment=augment,
                        seed=seed, **own)
    train_loader.settings = {
        "data": str(data_dir.resolve()) if dataset == "folder" else dataset, "split": split,
        "image_size": train_loader.size, "train_images": train_images,
        "images": [len(train.labels), len(measured.labels)], "classes": len(class_names)}
    if in_files:
        train_loader.settings["in_files"] = True
    return train_loader, kind(measured, *shared, measured_batch, device, shuffle=False, **own)


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
    add("--dataset", default="cifar10", choices=["cifar10", "cifar100", "cinic10", "folder",
        "imagenet", "shapes"], help="cinic10, folder, imagenet: folders of images; shapes: drawn")
    add("--data-dir", type=Path, default="data", help="where the data set is")
    add("--train-images", type=limited(int, 2, 1e9), help="so many, of every class alike")
    chosen, _ = parser.parse_known_args()
    add("--image-size", type=limited(int, 8, 1024), default=usual_size(chosen.dataset),
        help="of folders, in pixels; from 64 on every epoch decodes them anew")
    add("--workers", type=limited(int, 0, 1e3), default=usual_workers(),
        help="processes that decode large images")
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
