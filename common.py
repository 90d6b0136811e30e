"""Networks and data sets for the method scripts. Nothing in this file trains.

    model = create_model("wrn16_1", num_classes=10)
    logits = model(images)                     # (N, 3, H, W) normalised -> (N, num_classes)
    taps = model(images, taps=True)            # Taps(logits, entries, stages, pre_relu)
    train_loader, test_loader = load_data("shapes", "data", 64, torch.device("cpu"),
                                          augment=True, seed=0)
"""
import hashlib
import math
import os
import re
import sys
from pathlib import Path
from typing import Iterator, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor, resize

# ================================================================================================
# Networks
# ================================================================================================


class Taps(NamedTuple):
    """What one forward pass shows of a network; the lists run from the input to the output.

    A group is a run of blocks of equal spatial size: three in every network of this file.
    """
    logits: Tensor           # (N, num_classes)
    entries: list[Tensor]    # first map of each group (FSP's first map), (N, C, H, W)
    stages: list[Tensor]     # last map of each group (AT, ATang, FSP's second map)
    pre_relu: list[Tensor]   # what enters the first ReLU after each group


def initialise(model: nn.Module) -> None:
    """He initialisation, fan-out: N(0, sqrt(2 / (k * k * channels_out))); BatchNorm 1 and 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.weight[0, 0].numel() * module.out_channels
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


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
        middle = F.relu(self.norm2(self.conv1(active)))
        residual = x if self.shortcut is None else self.shortcut(active)
        return residual + self.conv2(middle), middle, normed


class WideResNet(nn.Module):
    """WRN-depth-width (Zagoruyko and Komodakis 2016), depth = 6n + 4, no dropout."""

    def __init__(self, depth: int, width: int, num_classes: int):
        super().__init__()
        self.stage_channels = [16 * width, 32 * width, 64 * width]
        self.conv = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.groups = nn.ModuleList()
        channels = 16
        for stride, channels_out in zip((1, 2, 2), self.stage_channels):
            blocks = nn.ModuleList()
            for index in range((depth - 4) // 6):
                blocks.append(PreActivationBlock(channels, channels_out, 1 if index else stride))
                channels = channels_out
            self.groups.append(blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, num_classes)
        initialise(self)

    @property
    def pre_relu_norms(self) -> list[nn.BatchNorm2d]:
        return [self.groups[1][0].norm1, self.groups[2][0].norm1, self.norm]

    def forward(self, x: Tensor, taps: bool = False) -> Tensor | Taps:
        entries, stages, pre_relu = [], [], []
        x = self.conv(x)
        for group in self.groups:
            for index, block in enumerate(group):
                x, middle, normed = block(x)
                if index == 0:
                    # a group of one block has no other first map than the one inside it
                    entries.append(x if len(group) > 1 else middle)
                    pre_relu.append(normed)
            stages.append(x)
        normed = self.norm(x)
        logits = self.classifier(F.relu(normed).mean((2, 3)))
        # the first group's own normed input follows no group
        return Taps(logits, entries, stages, pre_relu[1:] + [normed]) if taps else logits


class BasicBlock(nn.Module):
    """3x3 - BatchNorm - ReLU - 3x3 - BatchNorm, plus shortcut, ReLU."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False),
                nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        middle = F.relu(self.norm1(self.conv1(x)))
        total = self.norm2(self.conv2(middle)) + self.shortcut(x)
        return F.relu(total), middle, total


class ResNet(nn.Module):
    """CIFAR ResNet (He et al. 2016), depth = 6n + 2, with 1x1 convolution shortcuts."""

    def __init__(self, depth: int, num_classes: int):
        super().__init__()
        self.stage_channels = [16, 32, 64]
        self.conv = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.groups = nn.ModuleList()
        channels = 16
        for stride, channels_out in zip((1, 2, 2), self.stage_channels):
            blocks = nn.ModuleList()
            for index in range((depth - 2) // 6):
                blocks.append(BasicBlock(channels, channels_out, 1 if index else stride))
                channels = channels_out
            self.groups.append(blocks)
        self.classifier = nn.Linear(channels, num_classes)
        initialise(self)

    @property
    def pre_relu_norms(self) -> list[nn.BatchNorm2d]:
        return [group[-1].norm2 for group in self.groups]

    def forward(self, x: Tensor, taps: bool = False) -> Tensor | Taps:
        entries, stages, pre_relu = [], [], []
        x = F.relu(self.norm(self.conv(x)))
        for group in self.groups:
            for index, block in enumerate(group):
                x, middle, total = block(x)
                if index == 0:
                    entries.append(x if len(group) > 1 else middle)
            stages.append(x)
            pre_relu.append(total)
        logits = self.classifier(x.mean((2, 3)))
        return Taps(logits, entries, stages, pre_relu) if taps else logits


class InvertedResidual(nn.Module):
    """1x1 expansion - 3x3 depthwise - 1x1 projection, BatchNorm after each, ReLU6 after two."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, expansion: int):
        super().__init__()
        hidden = channels_in * expansion
        self.expand = nn.Conv2d(channels_in, hidden, 1, bias=False) if expansion > 1 else None
        self.norm1 = nn.BatchNorm2d(hidden) if expansion > 1 else None
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.project = nn.Conv2d(hidden, channels_out, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels_out)
        self.residual = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        normed = x if self.expand is None else self.norm1(self.expand(x))
        y = normed if self.expand is None else F.relu6(normed)
        y = self.norm3(self.project(F.relu6(self.norm2(self.depthwise(y)))))
        return x + y if self.residual else y, normed


class MobileNetV2(nn.Module):
    """The MobileNetV2 of the ATang paper's Table 4: 0.6M parameters, maps of 32, 16 and 8 pixels.

    Its last stage ends after the 1x1 convolution to 640 channels.
    """
    # per group: (expansion, channels, blocks, stride)
    layout = [[(1, 8, 1, 1), (6, 16, 2, 1)],
              [(6, 16, 3, 2), (6, 32, 4, 1), (6, 48, 3, 1)],
              [(6, 80, 3, 2), (6, 160, 1, 1)]]

    def __init__(self, num_classes: int, dropout: float = 0.2):
        super().__init__()
        self.stage_channels = [16, 48, 640]
        self.conv = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.groups = nn.ModuleList()
        channels = 8
        for rows in self.layout:
            blocks = nn.ModuleList()
            for expansion, channels_out, count, stride in rows:
                for index in range(count):
                    blocks.append(InvertedResidual(channels, channels_out, 1 if index else stride,
                                                   expansion))
                    channels = channels_out
            self.groups.append(blocks)
        self.last_conv = nn.Conv2d(channels, 640, 1, bias=False)
        self.last_norm = nn.BatchNorm2d(640)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(640, num_classes)
        initialise(self)
        nn.init.normal_(self.classifier.weight, 0.0, 0.01)

    @property
    def pre_relu_norms(self) -> list[nn.BatchNorm2d]:
        return [self.groups[1][0].norm1, self.groups[2][0].norm1, self.last_norm]

    def forward(self, x: Tensor, taps: bool = False) -> Tensor | Taps:
        entries, stages, pre_relu = [], [], []
        x = F.relu6(self.norm(self.conv(x)))
        for group in self.groups:
            for index, block in enumerate(group):
                x, normed = block(x)
                if index == 0:
                    entries.append(x)
                    pre_relu.append(normed)
            stages.append(x)
        normed = self.last_norm(self.last_conv(x))
        stages[-1] = F.relu6(normed)
        logits = self.classifier(self.dropout(stages[-1].mean((2, 3))))
        return Taps(logits, entries, stages, pre_relu[1:] + [normed]) if taps else logits


def create_model(name: str, num_classes: int, **kw) -> nn.Module:
    """The network called `name`, freshly initialised; `kw` goes to its class (dropout=0.0)."""
    if match := re.fullmatch(r"wrn(\d+)_(\d+)", name):
        depth, width = int(match[1]), int(match[2])
        if depth < 10 or depth % 6 != 4 or width < 1:
            raise ValueError(f"{name}: a wide residual network has depth 6n+4 (10, 16, 22, 28, 40) "
                             f"and width 1 or more, as in wrn16_3")
        return WideResNet(depth, width, num_classes, **kw)
    if match := re.fullmatch(r"resnet(\d+)", name):
        depth = int(match[1])
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"{name}: a CIFAR residual network has depth 6n+2 "
                             f"(8, 14, 20, 26, 32, 44, 56, 110), as in resnet20")
        return ResNet(depth, num_classes, **kw)
    if name == "mobilenetv2":
        return MobileNetV2(num_classes, **kw)
    raise ValueError(f"unknown network {name}; known are {', '.join(model_names())}")


def model_names() -> list[str]:
    """Names of the papers' networks; wrn and resnet take any other valid depth and width too."""
    wide = ["16_1", "16_2", "16_3", "16_4", "16_8", "28_1", "28_2", "28_3", "28_4", "28_6",
            "40_1", "40_2"]
    return ([f"wrn{size}" for size in wide]
            + [f"resnet{depth}" for depth in (8, 14, 20, 26, 32, 44, 56, 110)] + ["mobilenetv2"])


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
    CPU, so that every device sees the same batches; the pixels never leave the device.
    """

    def __init__(self, split: Split, class_names: list[str], mean: Tensor, std: Tensor,
                 batch_size: int, device: torch.device, *, shuffle: bool, augment: bool = False,
                 reflect: bool = False, seed: int = 0):
        self.images, self.labels = split.images.to(device), split.labels.to(device)
        self.masks = split.masks
        self.class_names, self.num_classes = class_names, len(class_names)
        self.batch_size, self.shuffle, self.augment = batch_size, shuffle, augment
        self.seed, self.epoch = seed, 0
        self.size = self.images.shape[1]
        # one value a pixel, not one a channel: subtracting three-element rows is 5 times slower
        self.mean = mean.to(device).expand(self.size, self.size, 3).contiguous()
        self.std = std.to(device).expand(self.size, self.size, 3).contiguous()
        self.padding = self.size // 8 if augment else 0        # 4 pixels at 32x32
        if augment:     # the mirrored pictures lie behind the others: flipping costs memory alone
            self.images = pad(self.images, self.padding, reflect)
            self.images = torch.cat([self.images, self.images.flip(2)])

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device, count, wide = self.labels.device, len(self.labels), self.size + 2 * self.padding
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        order = order.to(device)
        if not self.augment:
            for chosen in order.split(self.batch_size):
                yield self.normalise(self.images[chosen]), self.labels[chosen]
            return
        shift = torch.randint(2 * self.padding + 1, (2, count), generator=generator).to(device)
        order += count * torch.randint(2, (count,), generator=generator).to(device)
        # Every run of `size` pixels in memory is a row of this view, so that a crop is `size` of
        # its rows: (image, line, column) -> the number of the pixel the row starts at.
        runs = self.images.view(-1).as_strided(
            (self.images[..., 0].numel() - self.size + 1, 3 * self.size), (3, 1))
        lines = torch.arange(self.size, device=device)
        for chosen, (down, right) in zip(order.split(self.batch_size),
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

    Each shape is morphed by up to 30 % into one of another class, turned, shifted, scaled and
    coloured at random, and lies on a striped background with two distracting bars and noise. The
    morphs make the classes similar by degrees: this is what a teacher's soft labels can tell.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, 1, 1, generator=generator)

    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    def place(scale: Tensor, reach: float) -> tuple[Tensor, Tensor]:
        """Pixel coordinates seen from an object of this scale, shifted and turned at random."""
        dx, dy = (x - uniform(-reach, reach)) / scale, (y - uniform(-reach, reach)) / scale
        turn = uniform(0, 2 * math.pi)
        return dx * turn.cos() + dy * turn.sin(), dy * turn.cos() - dx * turn.sin()

    def paint(images: Tensor, field: Tensor, scale: Tensor, colour: Tensor) -> Tensor:
        """Lay a colour over the inside of a field; the outline is one pixel soft."""
        cover = torch.sigmoid(-field * scale * size * 1.2)[:, None]
        return images + cover * (colour - images)

    stripes = torch.sin(uniform(-4, 4) * x + uniform(-4, 4) * y + uniform(0, 2 * math.pi))[:, None]
    images = torch.lerp(uniform(0, 1, 3), uniform(0, 1, 3), 0.5 + 0.5 * stripes)
    for _ in range(2):
        scale = uniform(0.10, 0.35)
        u, v = place(scale, reach=1.0)
        bar = torch.maximum(u.abs() - 1.0, v.abs() - uniform(0.2, 0.8))
        images = paint(images, bar, scale, uniform(0, 1, 3))

    labels = torch.arange(count) % 10
    other = (labels + torch.randint(1, 10, (count,), generator=generator)) % 10
    scale = uniform(0.77, 0.98)
    fields = outlines(*place(scale, reach=0.35))
    each = torch.arange(count)
    field = torch.lerp(fields[each, labels], fields[each, other], uniform(0, 0.3))
    masks = field < 0
    # the object differs from what it covers by at least 0.6 in colour
    behind = (images * masks[:, None]).sum((2, 3), keepdim=True)
    behind = behind / masks[:, None].sum((2, 3), keepdim=True).clamp(min=1)
    contrast = uniform(0, 1, 3) - behind
    distance = contrast.norm(dim=1, keepdim=True).clamp(min=1e-3)
    images = paint(images, field, scale, behind + contrast / distance * distance.clamp(min=0.6))
    images = images + 0.04 * torch.randn(images.shape, generator=generator)
    images = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous()
    return Split(images, labels, masks)


def read_cifar(dataset: str, data_dir: Path, train: bool) -> tuple[Split, list[str]]:
    """CIFAR-10 or CIFAR-100 by torchvision, downloaded when absent."""
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[dataset]
    try:
        source = kind(data_dir, train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise OSError(
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
                raise ValueError(f"{data_dir / name} wants one subfolder of images a class: "
                                 f"{error}") from None
    if "train" not in sources or len(sources) < 2:
        raise ValueError(f"{data_dir} needs the folders train/ and test/ (or val/, or valid/), "
                         f"with one subfolder of images a class; name it with --data-dir")
    class_names = sources["train"].classes
    for name, source in sources.items():
        if odd := set(source.classes) ^ set(class_names):
            raise ValueError(f"{data_dir}: the classes of train/ and {name}/ differ in "
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
                picture = datasets.folder.default_loader(path)
            except Exception as error:    # each format of image fails in its own way
                raise ValueError(f"cannot decode {path} ({error}); repair or remove it") from None
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


def load_data(dataset: str, data_dir: str | Path, batch_size: int, device: torch.device, *,
              augment: bool, seed: int, reflect: bool = False, image_size: int = 32,
              train_images: int | None = None, split: str = "test",
              ) -> tuple[ImageLoader, ImageLoader]:
    """The training loader and the loader of the split that accuracy is measured on.

    dataset       cifar10, cifar100, cinic10, folder or shapes
    augment       random crop from 4 pixels of padding (at 32x32), black or `reflect`, and flip
    train_images  train on a fair sample of so many images; the same one whatever the seed
    split         "test", or "val" for tuning: the data set's own validation split, or else a fixed
                  tenth of the training images, which are then not trained on
    A data set that is missing or broken raises ValueError or OSError with what to do about it.
    """
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
        raise ValueError(f"unknown data set {dataset}; known are cifar10, cifar100, cinic10, "
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
        raise ValueError(f"{train_images} training images asked for, {dataset} has {len(order)}")
    train = subset(train, order[:train_images].sort().values)
    shared = (class_names, mean.float(), std.float())
    return (ImageLoader(train, *shared, batch_size, device, shuffle=True, augment=augment,
                        reflect=reflect, seed=seed),
            ImageLoader(measured, *shared, 500, device, shuffle=False))
