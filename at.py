"""Attention transfer (AT): the student learns to look where the teacher looks.

Zagoruyko, Komodakis: Paying More Attention to Attention, ICLR 2017, arxiv.org/abs/1612.03928

Where a convolutional network finds its evidence shows in its activations: squared and summed over
the channels they are a map of its attention. The student is trained on its labels and, at the end
of each group of blocks, to have the teacher's map; width may differ, since channels are summed out.

    Q_j = sum_c |A_jc|^2                                                   attention map of pair j
    L_AT = sum_j mean over N and H*W of (Q_S / ||Q_S||_2 - Q_T / ||Q_T||_2)^2
    L    = (1 - lambda) CE(softmax(z), y) + lambda tau^2 KL(q || p) + beta L_AT
    lambda = 0 is the paper's AT; lambda > 0 is AT+KD, p and q softened by tau as in kd.py

    symbol   here              shape            symbol   here             value on CIFAR-10
    A_S      student_stages    (N, C, H, W)     beta     beta             1000
    A_T      teacher_stages    (N, C', H, W)    lambda   kd_weight        0.9 (AT+KD), 0 (AT)
    Q        attention_map()   (N, H*W)         tau      temperature      4

Run:
    python at.py --dataset shapes                          5 minutes on 2 CPU cores: 81.9 %,
                                                           baseline 73.9 (5 seeds, see README)
    python at.py --teacher wrn16_3 --student wrn16_1       AT+KD on CIFAR-10, 200 epochs, a GPU
    python at.py --recipe cifar10-at                       AT alone, by the recipe of its own paper

Departures from the paper and from the authors' code:
 1. The paper's Eq. 2 is (beta / 2) times an unsquared norm; the authors' code, done here, squares
    it, drops the half, and averages over batch and pixels. beta = 1000 belongs to that mean: on the
    sum of squares it would be 64 to 1024 times too strong. The paper's "beta about 0.1" is 1000
    divided by the number of elements of a map and by the batch size.
 2. Unit norm is over the pixels of each image's map. The code averages over channels, the paper
    sums: the same after normalisation.
 3. Recipe cifar10 is that of the AT+KD rows in Jeon et al. (the ATang paper), without crop and
    flip, so that kd.py, at.py and atang.py compare. Recipe cifar10-at is the authors' own; their
    code resets the momentum when the learning rate drops, draws BatchNorm weights from U(0, 1) and
    scales the other weights by fan-in; here the momentum goes on, and weights start as in kd.py.
 4. Maps of 1x1 pixel are 1 after normalisation and add nothing.
 5. On shapes every number is ours, found on its validation split.
"""
import ctypes
import hashlib
import itertools
import json
import math
import os
import platform
import sys
import time
import warnings
from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction, Namespace
from datetime import timedelta
from pathlib import Path
from statistics import mean, stdev
from typing import Callable, NoReturn

import numpy
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from common import ImageLoader, create_model, load_data

# Milestones are fractions of --epochs: the schedule keeps its shape when the run gets shorter.
JEON = dict(batch_size=128, lr=0.1, momentum=0.9, nesterov=False, weight_decay=1e-4, lr_decay=0.2,
            augment=False, reflect=False)
RECIPES = {
    # Jeon et al. 2021, Sections 4.1 and 4.2: AT+KD; see departure 3
    "cifar10": dict(JEON, epochs=200, milestones=[40 / 200, 80 / 200, 120 / 200, 160 / 200],
                    temperature=4.0, kd_weight=0.9, beta=1000.0),
    "cinic10": dict(JEON, epochs=180, milestones=[40 / 180, 80 / 180, 120 / 180, 160 / 180],
                    temperature=16.0, kd_weight=0.6, beta=50.0),
    # the authors' code: AT alone
    "cifar10-at": dict(JEON, epochs=200, milestones=[60 / 200, 120 / 200, 160 / 200],
                       weight_decay=5e-4, augment=True, reflect=True,
                       temperature=4.0, kd_weight=0.0, beta=1000.0),
    # Tian et al. 2020 (CRD), the AT row that the SKD paper repeats: AT alone
    "cifar100": dict(epochs=240, batch_size=64, lr=0.05, lr_mobile=0.01, momentum=0.9,
                     nesterov=False, weight_decay=5e-4, lr_decay=0.1, augment=True, reflect=False,
                     milestones=[150 / 240, 180 / 240, 210 / 240],
                     temperature=4.0, kd_weight=0.0, beta=1000.0),
    "shapes": dict(epochs=20, batch_size=32, lr=0.1, momentum=0.9, nesterov=False,
                   weight_decay=5e-4, milestones=[0.6, 0.8, 0.95], lr_decay=0.2,
                   augment=True, reflect=False, temperature=2.0, kd_weight=0.9, beta=1000.0),
}
RECIPES["folder"] = RECIPES["cifar10"]


# ---------------------------------------------------------------------------------- the method

# --- shared: precision ---
def full(x: Tensor) -> Tensor:
    """float16 and bfloat16 to float32; float32 and float64 stay what they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
# --- end shared ---


def attention_map(feature: Tensor, p: int = 2) -> Tensor:
    """Section 3.1: sum_c |A_c|^p, divided by its L2 norm over the pixels.

    feature A, (N, C, H, W) of any C -> (N, H*W), in [0, 1]; a map of zeros stays zero.
    """
    return F.normalize(full(feature).abs().pow(p).sum(dim=1).flatten(1), dim=1)


def at_loss(student_stages: list[Tensor], teacher_stages: list[Tensor], p: int = 2) -> Tensor:
    """Eq. 2 in the form of the authors' code (departure 1): L_AT, a scalar without unit.

    Lists of (N, C, H, W), one map a group; C is free, unequal H and W are matched by averaging the
    larger map's activations. SUM over the pairs of the MEAN over batch and pixels; the teacher gets
    no gradient. Lists of unequal length raise ValueError.
    """
    loss = 0
    for student, teacher in zip(student_stages, teacher_stages, strict=True):
        size = min(student.shape[-2:], teacher.shape[-2:])
        student, teacher = (x if x.shape[-2:] == size else F.adaptive_avg_pool2d(x, size)
                            for x in (student, teacher.detach()))
        loss = loss + F.mse_loss(attention_map(student, p), attention_map(teacher, p))
    return loss


# --- shared: kd loss ---
def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Hinton et al. 2015, Section 2: L_K = tau^2 KL(softmax(v / tau) || softmax(z / tau)).

    student_logits z and teacher_logits v, both (N, K) -> a scalar, in tau^2 nats.
    Summed over the K classes, averaged over the batch; the teacher gets no gradient.
    """
    log_p = F.log_softmax(full(student_logits) / temperature, dim=1)
    log_q = F.log_softmax(full(teacher_logits.detach()) / temperature, dim=1)
    return temperature ** 2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
# --- end shared ---


def make_step(student: nn.Module, teacher: nn.Module | None, args: Namespace) -> Callable:
    """A step's logits and weighted terms: (1 - lambda) CE + lambda L_K + beta L_AT, or CE alone."""
    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        ours = student(images, taps=True)
        ce = F.cross_entropy(full(ours.logits), labels)
        if teacher is None:
            return ours.logits, {"ce": ce}
        with torch.no_grad():
            theirs = teacher(images, taps=True)
        kd = kd_loss(ours.logits, theirs.logits, args.temperature)
        at = at_loss(ours.stages, theirs.stages)
        return ours.logits, {"ce": (1 - args.kd_weight) * ce, "kd": args.kd_weight * kd,
                             "at": args.beta * at}
    return step


# ------------------------------------------------- the experiment, the same text in every script

# --- shared: command line ---
def fail(message: object) -> NoReturn:
    """End with one line that says what is wrong and what to do, and exit code 2."""
    print("error:", *str(message).split(), file=sys.stderr)
    raise SystemExit(2)


def number(kind: type, low: float, high: float = 1e9) -> Callable:
    """An argparse type: an int or a float from low to high, so neither nan nor inf."""
    def number(text: str) -> float:
        if not low <= kind(text) <= high:
            raise ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")
        return kind(text)
    return number


def prepare(pairs: str = "", **own: dict) -> tuple[Namespace, tuple[ImageLoader, ImageLoader]]:
    """The command line, completed from the recipe, and the loaders; `own`: the method's flags.

    pairs: what of the groups of teacher and student must agree, their "count", or "sizes" as well.
    """
    devices = [name for name in ("cuda", "mps") if getattr(torch, name).is_available()] + ["cpu"]
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                            epilog="The recipes' sources stand beside them in the file.")
    parser.error = fail

    def add(flag: str, help: str, **option: object) -> None:
        key = flag[2:].replace("-", "_")
        values = [f"{name} {recipe[key]:g}" for name, recipe in RECIPES.items() if key in recipe]
        parser.add_argument(flag, help=help + "; recipes: " * bool(values) + ", ".join(values),
                            **option)

    add("--teacher", default="wrn16_3", help="network; default %(default)s")
    add("--student", default="wrn16_1", help="network; default %(default)s")
    add("--dataset", default="cifar10", choices="cifar10 cifar100 cinic10 folder shapes".split(),
        help="cinic10 and folder are folders of images, shapes is drawn; default %(default)s")
    add("--data-dir", type=Path, default="data", help="where the data set is; default %(default)s")
    add("--recipe", choices=RECIPES, help="gives what is not given here; default: the data set's")
    add("--epochs", type=number(int, 1), help="of the teacher, of the student")
    add("--batch-size", type=number(int, 2), help="in images")
    add("--lr", type=number(float, 1e-9), help="learning rate at the start")
    add("--augment", action=BooleanOptionalAction, help="crop and flip")
    add("--train-images", type=number(int, 1), help="train on so many, of every class alike")
    add("--image-size", type=number(int, 8, 1024), default=32, help="of folders; default 32")
    add("--split", default="test", choices=["test", "val"], help="val is for tuning; default test")
    add("--seed", type=number(int, 0), default=0, help="of the first student; default 0")
    add("--runs", type=number(int, 1), default=1, help="number of students, seed after seed")
    add("--teacher-seed", type=number(int, 0), default=0, help="default 0, for all students")
    add("--teacher-ckpt", type=Path, help="default: the teacher in --out, trained when absent")
    add("--teacher-epochs", type=number(int, 1), help="stop the teacher's schedule early")
    add("--distill-epochs", type=number(int, 1), help="then go on with cross-entropy alone")
    add("--baseline", action="store_true", help="train the student with cross-entropy alone")
    add("--eval", action="store_true", help="only measure what is in --out")
    add("--dry-run", action="store_true", help="two steps of each training, nothing is kept")
    add("--summary", action="store_true", help="only print all finished runs in --out")
    add("--bf16", action=BooleanOptionalAction, help="autocast; default: on GPUs that have it")
    add("--device", default="auto", choices=["auto", *devices], help="default: the fastest here")
    add("--out", type=Path, default="runs", help="the folder of all runs; default %(default)s")
    for name, option in own.items():
        add("--" + name.replace("_", "-"), **option)
    args = parser.parse_args()
    if args.summary:
        summary(args.out)
        sys.exit()
    args.own, args.teacher_sha256 = list(own), None
    # some recipes have another learning rate for some networks or students; --lr is for all
    args.lr_mobile, args.student_lr = args.lr, getattr(args, "student_lr", None) or args.lr
    args.device = devices[0] if args.device == "auto" else args.device
    args.autocast = args.bf16 if args.bf16 is not None else (
        args.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    args.data = str(args.data_dir.resolve()) if args.dataset == "folder" else args.dataset
    if (args.recipe or args.dataset) not in RECIPES:
        fail(f"no recipe for {args.dataset} here; choose one with --recipe {'|'.join(RECIPES)}")
    for key, value in RECIPES[args.recipe or args.dataset].items():
        setattr(args, key, value if getattr(args, key, None) is None else getattr(args, key))
    if max(args.teacher_epochs or 1, args.distill_epochs or 1) > args.epochs:
        fail(f"--teacher-epochs and --distill-epochs cannot exceed the {args.epochs} epochs")
    names = ("augment", "seed", "reflect", "image_size", "train_images", "split")
    try:
        with torch.device("meta"), torch.no_grad():     # wrong names show before the data is read
            image = torch.empty(1, 3, *2 * [16 if args.dataset == "shapes" else args.image_size])
            maps = [create_model(name, 2).eval()(image, taps=True).stages
                    for name in (args.teacher, args.student)]
        for group, (theirs, ours) in enumerate(itertools.zip_longest(*maps), 1):
            shapes = ["no map" if x is None else "x".join(map(str, x.shape[1:]))
                      for x in (theirs, ours)]
            if pairs and not args.baseline and (
                    "no map" in shapes or pairs == "sizes" and theirs.shape[2:] != ours.shape[2:]):
                fail(f"group {group} of {args.teacher} ends in {shapes[0]}, of {args.student} in "
                     f"{shapes[1]} (channels x height x width): these cannot be matched; "
                     f"wrn16_3 and wrn16_1, or resnet56 and resnet20, can")
        return args, load_data(args.dataset, args.data_dir, args.batch_size,
                               torch.device(args.device), **{n: getattr(args, n) for n in names})
    except (OSError, ValueError) as error:
        fail(error)
# --- end shared ---


# --- shared: training ---
def new_model(name: str, args: Namespace, loaders: tuple, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = create_model(name, loaders[0].num_classes)
    return model.to(args.device, memory_format=torch.channels_last)


def restore(path: Path, model: nn.Module | None = None,
            optimizer: torch.optim.Optimizer | None = None) -> list:
    """Return a run's log, or load weights, or both and momenta; nothing in it is executed."""
    try:
        with warnings.catch_warnings():     # the error below says all in one line
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
        if model is None:
            return state["log"]
        weights = state.get("model", state)
        if optimizer:
            optimizer.load_state_dict(state["optimizer"])
        else:       # another method's connectors are no part of the network
            weights = {k: v for k, v in weights.items() if not k.startswith("connectors.")}
        model.load_state_dict(weights)
        return []
    except Exception as error:
        fail(f"{path} is missing, damaged or of another network or number of classes; name another "
             f"or train it anew ({str(error).split('. ')[0][:200]})")


def identify(args: Namespace, method: str, seed: int) -> tuple[Path, dict]:
    """A run's folder, and all else that decides how its network comes out."""
    names = [key for key in RECIPES["folder"] if key not in args.own]
    names += ["data", "train_images", "image_size", "split"]
    network = folder = args.teacher if method == "teachers" else args.student
    if method == "teachers":
        names += ["teacher_epochs"]
    elif method != "baseline":
        folder = f"{args.teacher}-{args.student}"
        names += [*args.own, "distill_epochs", "teacher_sha256"]
    settings = {name: getattr(args, name) for name in names}
    if args.bf16 is not None:   # chosen by the device, it lets a GPU's run go on elsewhere
        settings["bf16"] = args.bf16
    if network.startswith(("mobilenet", "shufflenet")):     # some recipes have another for these
        settings["lr"] = args.lr_mobile or args.lr
    return args.out / args.dataset / method / folder / f"seed{seed}", settings


@torch.no_grad()
def evaluate(model: nn.Module, loader: ImageLoader, args: Namespace) -> float:
    """Accuracy in per cent, in eval mode."""
    model.eval()
    with torch.autocast(args.device, torch.bfloat16, enabled=args.autocast):
        right = torch.cat([model(images).argmax(1) == labels for images, labels in loader])
    return 100 * right.sum().item() / len(right)


def fit(model: nn.Module, step: Callable, loaders: tuple, args: Namespace, method: str, seed: int,
        stop: int | None = None) -> None:
    """Train `model` by SGD on the sum of the terms that step(images, labels) returns.

    A run kept in its folder goes on after its last epoch, to the same bits; `stop` ends it early.
    """
    train_loader, test_loader = loaders
    if args.device == "cpu" and platform.libc_ver()[0] == "glibc":
        # keep freed memory: to return large maps and get them again page by page costs a tenth
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0), libc.mallopt(-1, -1)       # M_MMAP_MAX none, M_TRIM_THRESHOLD never
    folder, settings = identify(args, method, seed)
    start_lr = settings.get("student_lr") or settings["lr"]     # some methods want their own
    optimizer = torch.optim.SGD(model.parameters(), start_lr, args.momentum,
                                weight_decay=args.weight_decay, nesterov=args.nesterov)
    sources = [Path(__file__), Path(__file__).with_name("common.py")]
    log = [{"settings": settings, "arguments": {k: str(v) for k, v in vars(args).items()},
            "versions": [sys.version, *(str(m.__version__) for m in (torch, torchvision, numpy))],
            "sha256": [hashlib.sha256(path.read_bytes()).hexdigest() for path in sources]}]
    if args.eval or (folder / "last.pt").exists() and not args.dry_run:
        sha256, log = log[0]["sha256"], restore(folder / "last.pt")
        kept, first = log[0]["settings"], int(method in ("teachers", "baseline"))
        if changed := [f"{key} {kept.get(key)}, now {settings.get(key)}"
                       for key in {**settings, **kept} if kept.get(key) != settings.get(key)]:
            fail(f"{folder} was made with other settings ({'; '.join(changed)}); choose another "
                 f"--out" + (method == "teachers") * f" or --teacher-ckpt {folder}/last.pt")
        if sha256[first:] != log[0]["sha256"][first:]:      # every script makes those two alike
            print(f"note: {folder} was begun by other code; choose another --out to run today's")
        restore(folder / "last.pt", model, optimizer)
    if args.eval:
        print(f"{folder}: {args.split} accuracy {evaluate(model, test_loader, args):.2f} %")
    elif not args.dry_run:
        folder.mkdir(parents=True, exist_ok=True)
    stop = 0 if args.eval else 1 if args.dry_run else stop or args.epochs
    host = torch.zeros(16, pin_memory=args.device == "cuda")
    for epoch in range(len(log), stop + 1):
        torch.manual_seed(seed * 1_000_003 + epoch)     # for dropout: no state to keep
        train_loader.seed = seed
        train_loader.set_epoch(epoch)
        drops = sum(epoch > max(1, round(part * args.epochs)) for part in args.milestones)
        optimizer.param_groups[0]["lr"] = lr = start_lr * args.lr_decay ** drops
        model.train()
        sums, seen, start = 0, 0, time.perf_counter()
        batches = itertools.islice(train_loader, 2 if args.dry_run else None)
        for index, (images, labels) in enumerate(batches, 1):
            optimizer.zero_grad()
            with torch.autocast(args.device, torch.bfloat16, enabled=args.autocast):
                logits, terms = step(images, labels)
            sum(terms.values()).backward()
            optimizer.step()
            values = torch.stack([*terms.values(), (logits.argmax(1) == labels).float().mean()])
            sums, seen = sums + len(labels) * values.detach(), seen + len(labels)
            # nothing waits for this copy: on a GPU what is read of it lags some steps behind
            if not host[:len(values)].copy_(sums, non_blocking=True).isfinite().all():
                break
            if sys.stdout.isatty():
                print(f"epoch {epoch}: step {index}/{len(train_loader)}", end="\r", flush=True)
        *means, train = (sums / seen).tolist()
        if not math.isfinite(sum(means)):
            fail(f"epoch {epoch}, step {index}: the loss is not finite ("
                 + ", ".join(f"{name} {value:.3g}" for name, value in terms.items())
                 + "); try a smaller --lr or loss weight, and another --out")
        speed = seen / (time.perf_counter() - start)
        log.append({"epoch": epoch, **dict(zip(terms, means)), "lr": lr, "train": 100 * train,
                    "test": evaluate(model, test_loader, args), "images/s": speed,
                    "seconds": time.perf_counter() - start})
        left = timedelta(seconds=round((stop - epoch) * log[-1]["seconds"]))
        print("  ".join(f"{key} {value:<6.5g}" for key, value in log[-1].items()), f" left {left}",
              flush=True)
        if args.dry_run:
            return
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "log": log}
        best = log[-1] is max(log[1:], key=lambda row: row["test"])
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
        for name in ["best.pt"] * best + ["last.pt"]:     # last.pt last: a kill repeats the epoch
            with open(folder / f"{name}.{os.getpid()}", "wb") as file:
                torch.save(state, file)
            os.replace(file.name, folder / name)
# --- end shared ---


# --- shared: teacher and results ---
def get_teacher(args: Namespace, loaders: tuple) -> nn.Module:
    """The frozen teacher: from --teacher-ckpt, from --out, or trained now and kept there."""
    teacher = new_model(args.teacher, args, loaders, args.teacher_seed)
    if args.teacher_ckpt:
        restore(args.teacher_ckpt, teacher)
    else:
        fit(teacher, make_step(teacher, None, args), loaders, args, "teachers", args.teacher_seed,
            args.teacher_epochs)
    weights = b"".join(value.cpu().numpy().tobytes() for value in teacher.state_dict().values())
    args.teacher_sha256 = hashlib.sha256(weights).hexdigest()
    args.teacher_accuracy = evaluate(teacher.requires_grad_(False), loaders[1], args)
    print(f"teacher {args.teacher}, {args.split} accuracy: {args.teacher_accuracy:.2f} %")
    return teacher


def spread(values: list[float], digits: int = 2) -> str:
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def report(args: Namespace, method: str) -> None:
    """The accuracy of the last epoch is the result; the best epoch's only stands beside it."""
    results = {}
    print(f"\n{args.split + ' accuracy, %':24}{'last epoch':16}{'best epoch':16}{'minutes':9}files")
    for name in dict.fromkeys(["baseline", method]):
        logs = []
        for seed in range(args.seed, args.seed + args.runs):
            folder, settings = identify(args, name, seed)
            try:
                header, *log = torch.load(folder / "last.pt", "cpu", weights_only=True)["log"]
            except Exception:    # absent or damaged
                continue
            logs += [log] if header["settings"] == settings and len(log) == args.epochs else []
        if len(logs) == args.runs:
            results[name] = [log[-1]["test"] for log in logs]
            best = spread([max(row["test"] for row in log) for log in logs])
            minutes = sum(row["seconds"] for log in logs for row in log) / 60
            print(f"{name:10}{args.student:13} {spread(results[name]):16}{best:16}{minutes:<9.1f}"
                  f"{folder.parent}")
    if method != "baseline":
        gain = (f"{mean(results[method]) - mean(results['baseline']):+.2f}" if len(results) == 2
                else "not known yet: run the same command with --baseline")
        print(f"teacher   {args.teacher:13} {args.teacher_accuracy:.2f}")
        print(f"gain over baseline      {gain}")


def summary(out: Path) -> None:
    """All finished runs below `out`: mean and deviation over the seeds of equal settings."""
    runs = {}
    for path in sorted(out.rglob("seed*/log.jsonl")):
        try:
            header, *log = map(json.loads, path.read_text().splitlines())
            *folder, data, method, networks, _, _ = path.relative_to(out).parts
        except ValueError:      # cut short, or not below the runs' folder
            continue
        settings = header["settings"]
        done = len(log) == (settings.get("teacher_epochs") or settings["epochs"])
        if done and method != "stage1":
            key = ("/".join(folder), data, method, networks, json.dumps(settings, sort_keys=True))
            runs.setdefault(key, []).append(log[-1])
    if not runs:
        fail(f"{out} holds no finished run; name the folder of the runs with --out")
    gaps = sorted({name for ends in runs.values() for name in ends[0] if name.endswith(" gap")})
    titles = ["folder", "data", "method", "networks", "accuracy, %", "seeds", "gain", *gaps]
    table = [titles]
    for (folder, data, method, networks, text), ends in runs.items():
        settings, accuracy = json.loads(text), [end["test"] for end in ends]
        base = [[end["test"] for end in ends] for (_, *names, other), ends in runs.items()
                if names == [data, "baseline", networks.split("-")[-1]]
                and json.loads(other).items() <= settings.items()]
        gain = f"{mean(accuracy) - mean(base[0]):+.2f}" if base and "-" in networks else ""
        values = [spread([end[name] for end in ends], 3) if name in ends[0] else ""
                  for name in gaps]
        table.append([folder, data, method, networks, spread(accuracy), str(len(ends)), gain,
                      *values])
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
# --- end shared ---


def main() -> None:
    args, loaders = prepare(
        "count",
        temperature=dict(type=number(float, 0.1, 100), help="tau"),
        kd_weight=dict(type=number(float, 0, 1), help="lambda, 0 for AT alone"),
        beta=dict(type=number(float, 0), help="weight of L_AT"))
    method = "baseline" if args.baseline else "at"
    teacher = None if args.baseline else get_teacher(args, loaders)
    for seed in range(args.seed, args.seed + args.runs):
        student = new_model(args.student, args, loaders, seed)
        step = make_step(student, teacher, args)
        fit(student, step, loaders, args, method, seed, args.distill_epochs)
        if args.distill_epochs and not args.eval:
            fit(student, make_step(student, None, args), loaders, args, method, seed)
    if not (args.dry_run or args.eval):
        report(args, method)


# --- shared: entry ---
if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        fail(error)
    except BaseException as error:      # Ctrl-C within torch.save comes out as an error of its own
        if KeyboardInterrupt not in (type(error), type(error.__context__)):
            raise
        print("\nstopped; every finished epoch is kept, and the same command goes on from there")
        sys.exit(130)
# --- end shared ---
