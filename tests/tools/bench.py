"""Images a second: every script's training on whatever device is there, and the data loaders.

    python tests/tools/bench.py [--scripts kd atang] [--forms eager reference] [--device cpu]
    python tests/tools/bench.py --loaders       of pictures in memory, and of large ones in files

eager      main() with --no-graph, on random pictures of 32 pixels: the third epoch, from its log
graph      the same with its steps recorded, as it is by default on one GPU
compiled   the same with --compile; on a GPU recorded, too
reference  what main() hands to train(), trained as known repositories do: PIL transforms in a
           DataLoader with workers, eager float32 in NCHW, .item() every step

They take turns; medians and spread (largest less smallest, over the median) of the repeats. The
reference has a process of its own, since load_data tells its process to keep freed memory, which
known repositories do not. FSP has two lines: its first stage, and the second, cross-entropy alone.
"""
import argparse
import contextlib
import functools
import importlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Callable
from unittest import mock

import numpy
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, transforms

from reproduce import positive
import common  # noqa: E402

SCRIPTS = ["kd", "at", "atang", "fsp", "overhaul", "skd"]
FORMS = {"eager": ["--no-graph"], "graph": [], "compiled": ["--compile"], "reference": []}


def draw_files(folder: Path, count: int, width: int, height: int, kind: str) -> None:
    """Random pictures in ten classes, of blots of 8 pixels; as JPEG about as large as photos."""
    generator = numpy.random.default_rng(0)
    for split, number in (("train", count), ("val", 40)):
        for index in range(number):
            place = folder / split / str(index % 10)
            place.mkdir(parents=True, exist_ok=True)
            blots = generator.integers(256, size=(height // 8, width // 8, 3), dtype=numpy.uint8)
            picture = Image.fromarray(blots).resize((width, height), Image.Resampling.BICUBIC)
            picture.save(place / f"{index}.{kind}", quality=95)


def usual(crop: Callable) -> transforms.Compose:
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(),
                               transforms.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))])


class Pictures(Dataset):
    """As known repositories read CIFAR: an array, PIL, and transforms image by image."""

    def __init__(self, count: int):
        generator = numpy.random.default_rng(0)
        self.images = generator.integers(256, size=(count, 32, 32, 3), dtype=numpy.uint8)
        self.transform = usual(transforms.RandomCrop(32, padding=4))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), index % 10


def told(values: list[float]) -> str:
    middle = statistics.median(values)
    return f"{middle:,.0f} ({100 * (max(values) - min(values)) / middle:.0f} %)"


# === Training ===================================================================================

class Handed(Exception):
    """Raised in place of the training, with what main() gives to train()."""


@functools.lru_cache
def data_once(*args: object, train_images: int, **options: object) -> tuple:
    """load_data, with random pictures of 32 pixels for shapes."""
    def draw(count: int, seed: int) -> common.Split:
        count = train_images if seed == 1 else 500
        images = torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8)
        return common.Split(images, torch.arange(count) % 10)

    with mock.patch.object(common, "draw_shapes", draw):
        return common.load_data(*args, **options)


def run_main(script: str, flags: list[str], **replaced: Callable) -> None:
    """A script's main() in this process, quietly, on data that are made once."""
    module = importlib.import_module(script)
    with (mock.patch.multiple(module, load_data=data_once, **replaced),
          mock.patch.object(sys, "argv", [f"{script}.py", *flags]),
          contextlib.redirect_stdout(io.StringIO())):
        module.main()


def ours(script: str, flags: list[str]) -> list[float]:
    """The rate of the last epoch; FSP has two runs, of which the first stage comes first."""
    with tempfile.TemporaryDirectory() as out:
        run_main(script, [*flags, "--out", out])
        logs = sorted(Path(out).rglob("log.jsonl"), key=lambda path: "stage1" not in path.parts)
        return [json.loads(path.read_text().splitlines()[-1])["images/s"] for path in logs]


@functools.lru_cache
def prepared(script: str, flags: tuple[str, ...], workers: int) -> tuple:
    """What main() hands to train(), with the loader and the optimizer of known repositories."""
    def hand(*given: object, **_: object) -> None:
        raise Handed(*given)

    warnings.simplefilter("ignore")     # of more workers than cores
    with mock.patch.object(common, "keep_memory", lambda: None):
        try:
            run_main(script, [*flags, "--no-bf16"], train=hand)
        except Handed as handed:
            model, teacher, (loader, _), args, *_ = handed.args
    for network in filter(None, (model, teacher)):
        network.to(memory_format=torch.contiguous_format)
    batches = DataLoader(Pictures(len(loader.labels)), args.batch_size, shuffle=True,
                         num_workers=workers, persistent_workers=workers > 0)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, args.momentum,
                                weight_decay=args.weight_decay)
    return model.train(), teacher, batches, optimizer, args


def reference(script: str, flags: tuple[str, ...], workers: int) -> list[float]:
    """The rate of an epoch of the plain loop."""
    model, teacher, batches, optimizer, args = prepared(script, flags, workers)
    module, seen, start = importlib.import_module(script), [], time.perf_counter()
    for images, labels in batches:
        images, labels = images.to(args.device), labels.to(args.device)
        logits, terms = module.losses(model, teacher, images, labels, args)
        loss = sum(terms.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append((loss.item(), (logits.argmax(1) == labels).float().mean().item()))
    return [len(batches.dataset) / (time.perf_counter() - start)]


def compare_training(options: argparse.Namespace, folder: Path) -> None:
    teacher = folder / "teacher.pt"
    torch.save(common.create_model("wrn16_3", 10).state_dict(), teacher)
    shared = ["--dataset", "shapes", "--train-images", str(options.steps * options.batch),
              "--recipe", "cifar10-jeon", "--augment", "--epochs", "3", "--milestones", "--lr",
              "0.001", "--batch-size", str(options.batch), "--device", options.device]
    contests = [("teacher alone", "kd", [*shared, "--baseline", "--student", "wrn16_3"])]
    for name in options.scripts:
        flags = [*shared, "--teacher-ckpt", str(teacher)]
        if name == "fsp":
            flags += ["--fsp-epochs", "3", "--fsp-milestones"]
        contests.append((f"{name}.py", name, flags))
    print(f"images/s of wrn16_3 to wrn16_1, 32x32, batch {options.batch}, {options.steps} steps\n"
          f"{'':20}" + "".join(f"{form:>20}" for form in options.forms))
    for label, script, flags in contests:
        rates = {form: [] for form in options.forms}
        with ProcessPoolExecutor(1, get_context("spawn")) as other:
            for turn in range(options.repeats + 1):
                for form in options.forms[::1 if turn % 2 else -1]:     # who waits starts cold
                    if form == "reference":
                        task = other.submit(reference, script, tuple(flags), options.workers)
                        rates[form].append(task.result())
                    else:
                        rates[form].append(ours(script, [*flags, *FORMS[form]]))
        for number in range(max(len(turns[0]) for turns in rates.values())):
            # the first turn warms up; FSP's second stage has no reference
            own = [[turn[number] for turn in turns[1:] if number < len(turn)]
                   for turns in rates.values()]
            name = label if number == 0 else f"{label}, stage 2"
            cells = [told(values) if values else "" for values in own]
            print(f"{name:20}" + "".join(f"{cell:>20}" for cell in cells), flush=True)


# === Loaders ====================================================================================

def compare_loaders(options: argparse.Namespace, folder: Path) -> None:
    """An epoch of augmented images; the contenders in turn, on as many workers."""
    count, large, workers = options.images, max(20, options.images // 40), options.workers
    draw_files(folder / "small", count, 32, 32, "png")
    draw_files(folder / "large", large, 448, 384, "jpg")
    files = datasets.ImageFolder(folder / "large/train", usual(transforms.RandomResizedCrop(224)))
    given = dict(device=options.device, augment=True, seed=0, workers=workers)
    contests = {
        f"{count} of 32x32 in memory, batch 128": {
            "common.py": common.load_data("folder", folder / "small", 128, **given)[0],
            "torchvision": DataLoader(Pictures(count), 128, True, num_workers=workers),
            "torchvision, no workers": DataLoader(Pictures(count), 128, True)},
        f"{large} JPEGs of 448x384 to 224x224, batch 64": {
            "common.py": common.load_data("imagenet", folder / "large", 64, **given)[0],
            "torchvision": DataLoader(files, 64, True, num_workers=workers)}}
    for title, loaders in contests.items():
        rates = {name: [] for name in loaders}
        for _ in range(options.repeats + 1):
            for name, loader in loaders.items():
                start = time.perf_counter()
                seen = sum(len(images.to(options.device)) for images, _ in loader)
                if options.device != "cpu":
                    torch.cuda.synchronize()
                rates[name].append(seen / (time.perf_counter() - start))
        print(f"{title}, {workers} workers; images/s: " + "; ".join(
            f"{name} {told(values[1:])}" for name, values in rates.items()))


def main() -> None:
    warnings.simplefilter("ignore")     # of more workers than cores
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--loaders", action="store_true", help="measure these alone")
    add("--images", type=positive, default=20_000, help="with --loaders; a 40th of them large")
    add("--scripts", nargs="+", default=SCRIPTS, choices=SCRIPTS)
    add("--forms", nargs="+", choices=FORMS,
        default=[form for form in FORMS if form != "graph" or device == "cuda"])
    add("--steps", type=positive, default=200 if device == "cuda" else 10,
        help="per epoch (%(default)s)")
    add("--batch", type=positive, default=128, help="images per step (%(default)s)")
    add("--repeats", type=positive, default=3, help="the median counts (%(default)s)")
    add("--workers", type=int, default=min(16, os.cpu_count()), help="of torchvision's loaders")
    add("--device", default=device)
    options = parser.parse_args()
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        (compare_loaders if options.loaders else compare_training)(options, Path(folder))


if __name__ == "__main__":
    main()
