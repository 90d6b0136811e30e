"""Images a second of every script's training: ours, a plain reference loop, and the floor.

    python tests/bench.py [--scripts kd at ...] [--steps 10] [--repeats 3] [--device cpu]
    python tests/bench.py --imagenet [--gpus 8] [--peak 989] [--utilisation 0.05]

ours        the script's own fit on its own loader: order, crops, flips, log; without the test epoch
reference   the same step as known repositories run it: PIL transforms in a DataLoader with workers,
            eager float32 in NCHW, .item() every step, the teacher under no_grad
floor       the same step on one batch that lies on the device: no loader, no log

The three take turns; medians and spread (largest less smallest, over the median) of repeats. The
reference has a process of its own, since load_data tells its process to keep freed memory, which
known repositories do not. Below that, where the time of a floor step goes.

--imagenet measures nothing: what the pairs of the papers' ImageNet tables cost, reckoned from the
operations that a step of their script counts and the maps that it keeps for the backward pass. The
time rests on the share of the peak (in TFLOP/s, dense bfloat16; an H100's is 989) that is assumed.
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
from unittest import mock

import numpy
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench_loader import Pictures  # noqa: E402
from common import (  # noqa: E402
    PAIRS, ImageLoader, Split, create_model, keep_memory, new_model)
from reproduce import IMAGES, print_markdown  # noqa: E402

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
            module.connect(student, teacher, args, *([images] if script == "fsp" else []))


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
            teacher_hash=None, dry_run=False, compile=False, device=options.device, bf16=None,
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


def cost(script: str, teacher: str | None, student: str, bf16: bool) -> tuple[float, float]:
    """Of a step with 256 images of 224 pixels: operations, and GiB kept for the backward pass.

    The backward pass counts as two forward ones: torch's own count of it is far too large where
    convolutions are depthwise. On tensors without values, whose modules cannot be moved or copied.
    """
    module, kept = importlib.import_module(script), {}
    args = Namespace(**own(script), device="cpu")

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        kept[storage._cdata] = storage      # views share it; held, so that no number comes twice
        return x

    with (mock.patch.object(nn.Module, "to", lambda network, *_, **__: network),
          mock.patch("copy.deepcopy", lambda network: network), FakeTensorMode(),
          torch.autocast("cpu", torch.bfloat16, enabled=bf16)):
        ours, theirs = create_model(student, 1000), None
        images, labels = torch.empty(256, 3, 224, 224), torch.zeros(256, dtype=torch.long)
        if teacher:
            theirs = create_model(teacher, 1000).eval().requires_grad_(False)
            connect(script, ours, theirs, args, images[:2])
        step = module.make_step(ours, theirs, args)
        with FlopCounterMode(display=False) as of_teacher, torch.no_grad():
            if teacher:
                theirs(images)
        with FlopCounterMode(display=False) as of_all, saved_tensors_hooks(keep, lambda x: x):
            step(images, labels)
        for weight in ours.parameters():
            kept.pop(weight.untyped_storage()._cdata, None)
        operations = 3 * of_all.get_total_flops() - 2 * of_teacher.get_total_flops()
        return operations, sum(x.nbytes() for x in kept.values()) / 2 ** 30


def on_paper(gpus: int, peak: float, utilisation: float) -> None:
    """The pairs of the papers' ImageNet tables, in Markdown."""
    rows = []
    for teacher, student in PAIRS["Overhaul, Table 4 (ImageNet)"]:
        rows.append(("kd", None, student))
        rows += [(script, teacher, student) for script in ("kd", "at", "overhaul")]
    for teacher, student in PAIRS["SKD, Tables 5 and 6 (ImageNet)"]:
        rows.append(("skd", teacher, student))
        if teacher == "imagenet_resnet34":
            rows[-1:] = [("kd", None, student), *((script, teacher, student)
                                                  for script in ("kd", "at", "skd"))]
    print(f"ImageNet, 224 pixels. GiB: maps kept for the backward pass of 256 images. images/s: "
          f"what all loaders\nmust give, for {gpus} GPUs at {100 * utilisation:g} % (assumed) of a "
          f"peak of {peak:g} TFLOP/s each. hours: 100 epochs\n")
    lines = [["", "student", "teacher", "GFLOP an image", "GiB, float32", "GiB, bfloat16",
              "images/s", "hours"]]
    for script, teacher, student in rows:
        operations, memory = cost(script, teacher, student, bf16=False)
        _, halved = cost(script, teacher, student, bf16=True)
        speed = gpus * peak * 1e12 * utilisation / (operations / 256)
        names = [(name or "").removeprefix("imagenet_") for name in (student, teacher)]
        lines.append([script if teacher else "baseline", *names, f"{operations / 256e9:.1f}",
                      f"{memory:.1f}", f"{halved:.1f}", f"{speed:,.0f}",
                      f"{100 * IMAGES['imagenet'] / speed / 3600:.1f}"])
    print_markdown(lines)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--imagenet", action="store_true", help="on paper; the next three with it")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--peak", type=float, default=989, help="TFLOP/s of one")
    parser.add_argument("--utilisation", type=float, default=0.05, help="part of the peak")
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
    if options.imagenet:
        on_paper(options.gpus, options.peak, options.utilisation)
        return
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
