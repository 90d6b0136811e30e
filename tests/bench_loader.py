"""The loaders of common.py against torchvision's PIL transforms in a DataLoader, side by side.

    python tests/bench_loader.py [--images 20000] [--repeats 3]
    python tests/bench_loader.py --files [--images 512] [--workers 2]

One epoch of augmented images each time, the contenders in turn; medians over the repeats. 32x32
images in memory; or, --files, drawn pictures of 448x384 in JPEG files, cropped to 224x224 at random
as on ImageNet, by as many workers on both sides, and then what decoding alone takes of it.
"""
import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
from common import ImageLoader, Split, decode, draw_shapes, load_data  # noqa: E402


class Pictures(Dataset):
    """As the known repositories read CIFAR: an array, PIL, and transforms image by image."""

    def __init__(self, images: numpy.ndarray, labels: list[int]):
        self.images, self.labels = images, labels
        self.transform = transforms.Compose([
            transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(),
            transforms.ToTensor(), transforms.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def in_memory(count: int) -> dict[str, object]:
    images = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8)
    labels = torch.zeros(count, dtype=torch.int64)
    half = torch.full((3,), 127.5)
    contenders = {
        f"DataLoader, {workers} workers": DataLoader(
            Pictures(images.numpy(), labels.tolist()), batch_size=128, shuffle=True,
            num_workers=workers)
        for workers in (0, 2)}
    contenders["common.py"] = ImageLoader(
        Split(images, labels), ["any"], half, half / 2, 128, torch.device("cpu"),
        shuffle=True, augment=True)
    return contenders


def draw_files(folder: Path, count: int) -> None:
    """Mosaics of 7 by 6 drawn shapes, each 64 pixels wide: about 80 kB a file."""
    shapes = draw_shapes(2000, seed=0, size=64).images
    generator = numpy.random.default_rng(0)
    for split, number in (("train", count), ("val", 2)):
        (folder / split / "any").mkdir(parents=True)
        for n in range(number):
            tiles = shapes[generator.integers(0, len(shapes), 42)].view(6, 7, 64, 64, 3)
            mosaic = tiles.transpose(1, 2).reshape(384, 448, 3).numpy()
            Image.fromarray(mosaic).save(folder / split / "any" / f"{n}.jpg", quality=90)


def from_files(folder: Path, workers: int) -> dict[str, object]:
    usual = transforms.Compose([
        transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    source = datasets.ImageFolder(folder / "train", usual)
    return {f"DataLoader, {workers} workers": DataLoader(source, 64, True, num_workers=workers),
            "common.py": load_data("imagenet", folder, 64, "cpu", augment=True, seed=0,
                                   workers=workers)[0]}


def compare(contenders: dict[str, object], count: int, repeats: int) -> None:
    seconds = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, loader in contenders.items():
            start = time.perf_counter()
            seen = sum(len(batch) for batch, _ in loader)
            seconds[name].append(time.perf_counter() - start)
            assert seen == count
    ours = statistics.median(seconds["common.py"])
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:24}{median:8.3f} s  ({min(times):.3f} to {max(times):.3f})"
              f"{count / median:12,.0f} images/s{median / ours:8.2f} times ours")
    fastest = min(statistics.median(times) for name, times in seconds.items()
                  if name != "common.py")
    print(f"faster than the faster DataLoader by {fastest / ours:.2f}")


def compare_decoders(paths: list[Path], repeats: int) -> None:
    """Milliseconds of a core for a picture."""
    taken = {"torchvision": [], "PIL": []}
    torchvisions = common.decode_image
    for _ in range(repeats):
        for name, common.decode_image in (("torchvision", torchvisions), ("PIL", None)):
            start = time.process_time()
            for path in paths:
                decode(str(path))
            taken[name].append(1000 * (time.process_time() - start) / len(paths))
    common.decode_image = torchvisions
    print("decoding alone, ms: " + ", ".join(f"{name} {statistics.median(times):.2f}"
                                            for name, times in taken.items()))


def main() -> None:
    warnings.simplefilter("ignore")     # of more workers than cores
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--files", action="store_true", help="large pictures")
    parser.add_argument("--images", type=int)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="with --files")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    count = args.images or (512 if args.files else 20_000)
    side = "224x224 from files, batch 64" if args.files else "32x32, batch 128"
    print(f"{count} images of {side}, torch {torch.__version__}, torchvision "
          f"{torchvision.__version__}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    if not args.files:
        compare(in_memory(count), count, args.repeats)
        return
    with tempfile.TemporaryDirectory() as folder:
        draw_files(Path(folder), count)
        compare(from_files(Path(folder), args.workers), count, args.repeats)
        compare_decoders(sorted(Path(folder, "train/any").iterdir())[:200], args.repeats)


if __name__ == "__main__":
    main()
