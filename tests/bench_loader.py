"""The device-resident loader against torchvision's PIL transforms in a DataLoader, side by side.

    python tests/bench_loader.py [--images 20000] [--repeats 3]

One epoch of augmented 32x32 images each time, the contenders in turn; medians over the repeats.
"""
import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import numpy
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import ImageLoader, Split  # noqa: E402


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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    images = torch.randint(0, 256, (args.images, 32, 32, 3), dtype=torch.uint8)
    labels = torch.zeros(args.images, dtype=torch.int64)
    half = torch.full((3,), 127.5)
    contenders = {
        f"DataLoader, {workers} workers": DataLoader(
            Pictures(images.numpy(), labels.tolist()), batch_size=128, shuffle=True,
            num_workers=workers)
        for workers in (0, 2)}
    contenders["common.py"] = ImageLoader(
        Split(images, labels), ["any"], half, half / 2, 128, torch.device("cpu"),
        shuffle=True, augment=True)
    seconds = {name: [] for name in contenders}
    for _ in range(args.repeats):
        for name, loader in contenders.items():
            start = time.perf_counter()
            count = sum(len(batch) for batch, _ in loader)
            seconds[name].append(time.perf_counter() - start)
            assert count == args.images
    print(f"{args.images} images of 32x32, batch 128, torch {torch.__version__}, torchvision "
          f"{torchvision.__version__}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    ours = statistics.median(seconds["common.py"])
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:24}{median:8.3f} s  ({min(times):.3f} to {max(times):.3f})"
              f"{args.images / median:12,.0f} images/s{median / ours:8.1f} times ours")
    fastest = min(statistics.median(times) for name, times in seconds.items()
                  if name != "common.py")
    print(f"faster than the faster DataLoader by {fastest / ours:.1f}")


if __name__ == "__main__":
    main()
