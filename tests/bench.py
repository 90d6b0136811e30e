"""Images a second of every script's training: ours, a plain reference loop, and the floor.

    python tests/bench.py [--scripts kd at ...] [--steps 10] [--repeats 3] [--device cpu]

ours        the script's own fit on its own loader: order, crops, flips, log; without the test epoch
reference   the same step as known repositories run it: PIL transforms in a DataLoader with workers,
            eager float32 in NCHW, .item() every step, the teacher under no_grad
floor       the same step on one batch that lies on the device: no loader, no log

The three take turns; medians and spread (largest less smallest, over the median) of repeats. The
reference has a process of its own, since load_data tells its process to keep freed memory, which
known repositories do not. Below that, where the time of a floor step goes.
"""
import argparse
import contextlib
import importlib
import io
import os
import statistics
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy
import torch
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench_loader import Pictures  # noqa: E402
from common import ImageLoader, Split, keep_memory, new_model  # noqa: E402

SCRIPTS = ["kd", "at", "atang", "fsp", "overhaul", "skd"]
CLASSES = [str(n) for n in range(10)]
# what a command line would give the methods
OWN = dict(temperature=4.0, kd_weight=0.9, beta=1000.0, gamma=5000.0, margin=1.35, scale=64.0,
           loss="atang", fsp_weight=1e-4, alpha=1e-3, position="pre-relu", distance="partial-l2",
           layers="all", teacher_bn="batch", fsp_lr=1e-3, fsp_epochs=1, fsp_milestones=[],
           shared_stage1=False)


def own(script: str) -> dict:
    return OWN | ({"scale": 2.0} if script == "skd" else {})     # SKD's and ATang's scale differ


def connect(script: str, student: nn.Module, teacher: nn.Module, args: Namespace,
            images: torch.Tensor) -> None:
    """The connectors of a method that has them, without what it prints."""
    module = importlib.import_module(script)
    if hasattr(module, "connect"):
        with contextlib.redirect_stdout(io.StringIO()):
            module.connect(student, teacher, args if script == "overhaul" else images)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Contest:
    """One training in its three forms, on the same random pictures."""

    def __init__(self, script: str, of_teacher: bool, options: argparse.Namespace, keep: bool):
        self.module = importlib.import_module(script)
        self.options, self.of_teacher = options, of_teacher
        count = options.steps * options.batch
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (count, 32, 32, 3), generator=generator, dtype=torch.uint8)
        labels = torch.arange(count) % 10
        self.args = Namespace(**{**own(script), **dict(
            teacher="wrn16_3", student="wrn16_1", dataset="cifar10", epochs=1,
            batch_size=options.batch, lr=1e-3, momentum=0.9, nesterov=False, weight_decay=5e-4,
            milestones=[], lr_decay=0.1, augment=True, reflect=False, distill_epochs=None,
            teacher_hash=None, dry_run=False, device=options.device, bf16=None,
            autocast=options.bf16)})
        middle, std, device = torch.full((3,), 127.0), torch.full((3,), 64.0), options.device
        train = ImageLoader(Split(images, labels), CLASSES, middle, std, options.batch,
                            torch.device(device), shuffle=True, augment=True)
        test = ImageLoader(Split(images[:32], labels[:32]), CLASSES, middle, std, 32,
                           torch.device(device), shuffle=False)
        self.loaders = train, test
        if keep and device == "cpu":
            keep_memory()       # as load_data does
        self.plain = DataLoader(Pictures(images.numpy(), labels.tolist()), options.batch,
                                shuffle=True, num_workers=options.workers,
                                persistent_workers=options.workers > 0)
        self.batch = next(iter(train))
        self.network, self.step, self.teacher = self.build(torch.channels_last)
        self.flat, self.flat_step, _ = self.build(torch.contiguous_format)
        self.optimizers = [torch.optim.SGD(network.parameters(), 1e-3, 0.9, weight_decay=5e-4)
                           for network in (self.network, self.flat)]

    def build(self, memory_format: torch.memory_format) -> tuple:
        module, args = self.module, self.args
        student, teacher = (new_model(name, self.loaders[0], 0).to(memory_format=memory_format)
                            for name in (args.student, args.teacher))
        if self.of_teacher:
            return teacher, module.make_step(teacher, None, args), None
        teacher.eval().requires_grad_(False)
        connect(module.__name__, student, teacher, args, self.batch[0][:2])
        student.to(memory_format=memory_format)
        return student, module.make_step(student, teacher, args), teacher

    def ours(self) -> float:
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
            self.args.out = Path(out)
            log = self.module.fit(self.network, self.step, self.loaders, self.args, "bench", 0)
        return log[-1]["images/s"]

    def reference(self) -> float:
        self.flat.train()
        start, losses = time.perf_counter(), []
        for images, labels in self.plain:
            images, labels = (x.to(self.options.device) for x in (images, labels))
            logits, terms = self.flat_step(images, labels)
            loss = sum(terms.values())
            self.optimizers[1].zero_grad()
            loss.backward()
            self.optimizers[1].step()
            losses.append((loss.item(), (logits.argmax(1) == labels).float().mean().item()))
        return self.options.steps * self.options.batch / (time.perf_counter() - start)

    def floor(self) -> float:
        self.network.train()
        wait(self.options.device)
        start = time.perf_counter()
        for _ in range(self.options.steps):
            self.optimizers[0].zero_grad()
            with torch.autocast(self.args.device, torch.bfloat16, enabled=self.args.autocast):
                terms = self.step(*self.batch)[1]
            sum(terms.values()).backward()
            self.optimizers[0].step()
        wait(self.options.device)
        return self.options.steps * self.options.batch / (time.perf_counter() - start)

    def parts(self) -> dict[str, float]:
        """Seconds of a step's parts; the data's are those of a whole epoch of the loader."""
        names = ["data", "teacher", "student, losses", "backward", "optimiser"]
        seconds = dict.fromkeys(names, 0.0)
        precision = torch.autocast(self.args.device, torch.bfloat16, enabled=self.args.autocast)

        def timed(name: str, call: object) -> object:
            wait(self.options.device)
            start = time.perf_counter()
            value = call()
            wait(self.options.device)
            seconds[name] += (time.perf_counter() - start) / self.options.steps
            return value

        timed("data", lambda: list(self.loaders[0]))
        for _ in range(self.options.steps):
            with precision:
                if self.teacher is not None:
                    with torch.no_grad():
                        timed("teacher", lambda: self.teacher(self.batch[0]))
                terms = timed("student, losses", lambda: self.step(*self.batch)[1])
            timed("backward", lambda: sum(terms.values()).backward())
            timed("optimiser", self.optimizers[0].step)
            timed("optimiser", self.optimizers[0].zero_grad)
        seconds["student, losses"] -= seconds["teacher"]        # the step ran it once more
        return seconds


def begin(*of: object) -> None:
    """Prepare the reference in a process of its own."""
    global contest
    warnings.simplefilter("ignore")     # of more workers than cores
    contest = Contest(*of, keep=False)


def reference() -> float:
    return contest.reference()


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--scripts", nargs="+", default=SCRIPTS, choices=SCRIPTS)
    parser.add_argument("--steps", type=int, default=200 if device == "cuda" else 10)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count()))
    parser.add_argument("--device", default=device)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction,
                        help="ours and the floor under autocast; default: on a GPU")
    options = parser.parse_args()
    if options.bf16 is None:
        options.bf16 = options.device == "cuda"
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
          f"wrn16_3 -> wrn16_1, 32x32, batch {options.batch}, {options.steps} steps, "
          f"{options.repeats} repeats")
    print(f"{'images/s':18}" + "".join(f"{title:>16}" for title in (
        "ours", "reference", "floor", "ours/reference", "floor/ours")))
    shares = {}
    for script, of_teacher in [(options.scripts[0], True), *((s, False) for s in options.scripts)]:
        contest = Contest(script, of_teacher, options, keep=True)
        label = "teacher alone" if of_teacher else f"{script}.py"
        speeds = {"ours": [], "reference": [], "floor": []}
        with ProcessPoolExecutor(1, get_context("spawn"), begin,
                                 (script, of_teacher, options)) as other:
            turns = {"ours": contest.ours, "reference": lambda: other.submit(reference).result(),
                     "floor": contest.floor}
            for repeat in range(options.repeats + 1):
                for name in list(turns)[::1 if repeat % 2 else -1]:     # who waits starts cold
                    value = turns[name]()
                    if repeat:      # the first round warms up
                        speeds[name].append(value)
        middle = {key: statistics.median(values) for key, values in speeds.items()}
        cells = [f"{middle[key]:.0f} ({100 * (max(v) - min(v)) / middle[key]:.0f} %)"
                 for key, v in speeds.items()]
        print(f"{label:18}" + "".join(f"{cell:>16}" for cell in cells)
              + f"{middle['ours'] / middle['reference']:16.2f}"
              + f"{middle['floor'] / middle['ours']:16.3f}", flush=True)
        shares[label] = contest.parts()
    print("\nmilliseconds a step" + "".join(f"{part:>17}" for part in next(iter(shares.values()))))
    for label, seconds in shares.items():
        print(f"{label:19}" + "".join(f"{1000 * value:17.1f}" for value in seconds.values()))


if __name__ == "__main__":
    main()
