"""FSP: the student learns how features turn into later features, before it learns the task.

Yim, Joo, Bae, Kim: A Gift from Knowledge Distillation, CVPR 2017 (FSP: flow of solution procedure)

How a network solves its task shows in the direction from an earlier to a later layer's features:
their inner products over all pixels, a matrix. Stage 1 trains the student to have the teacher's
matrices, with no labels; stage 2 starts from these weights and is ordinary training, no teacher.

    G_ij(x; W) = sum_s sum_t F1_sti(x; W) F2_stj(x; W) / (h w)                             Eq. 1
    L_FSP(W_t, W_s) = (1 / N) sum_x sum_i lambda_i ||G_i^T(x; W_t) - G_i^S(x; W_s)||_2^2   Eq. 2
    stage 1 minimises L_FSP,   stage 2 minimises CE(softmax(z), y)

    Of each section of equal spatial size, F1 is the first block's output, F2 the last block's.

    symbol   here              shape              symbol     here          value
    F1, F2   first, second     (N, m|n, h, w)     lambda_i   fsp_weight    see departure 2
    G        fsp_matrix()      (N, m, n)          N          batch_size    128

Run:
    python fsp.py --dataset shapes                     5 + 20 epochs: 75 s on 2 CPU cores, and the
                                                                 teacher's 3 minutes before
    T=runs/shapes/teachers/wrn16_3/seed0/last.pt                 77.7 % in 5 + 15 epochs, baseline
    python fsp.py --dataset shapes --epochs 15 --teacher-ckpt $T --out runs/fsp      73.9 (5 seeds)
    python fsp.py --teacher resnet26 --student resnet8 --fsp-weight 1        CIFAR-10, a GPU
Table 1, CIFAR-100, the teacher's architecture taught again in a third of its iterations:
    python fsp.py --dataset cifar100 --student resnet32 --baseline
    T=runs/cifar100/baseline/resnet32/seed0/last.pt
    python fsp.py --dataset cifar100 --teacher resnet32 --student resnet32 --teacher-ckpt $T \
      --recipe third --fsp-weight 1 --fsp-seed 0 --runs 3 --ensemble --out runs/third

Departures from the paper and from known code:
 1. The paper's networks have equal widths. Where teacher's and student's differ, a 1x1 convolution
    brings each of the student's maps to the teacher's width; the script says so in a line. It is
    trained in stage 1 and dropped before stage 2, with its share of what was learnt.
 2. Eq. 2 sums over the entries of a matrix, and so does this file. lambda_i is not published: 1 for
    the paper's networks of 16 to 64 channels; the sum over a WRN16-3's 48 to 192 channels diverges
    with that, hence 0.01 as the default. Known code (RepDistiller, KD-Zoo) averages over the
    entries.
 3. A section of one block has no other first map than the one inside the block (ResNet, WRN) or
    what enters it (VGG). Where F1 is larger than F2 it is max-pooled, as in the paper. Teacher and
    student may differ in size: G does not depend on it.
 4. Recipes: 64,000, 32,000 and 21,000 iterations are 164, 82 and 54 epochs at a batch size of 128,
    which is ours, as are flips beside the crops. Stage 1's 32,000 follow from Table 1's 95k - 63k;
    on CIFAR-10 it had 21,000, so --fsp-epochs 54 belongs to --recipe third there.
 5. By default every student has a stage 1 of its own; --fsp-seed 0 shares one, as in Table 1. The
    stage-1 weights are copied with the untrained classifier; BatchNorm statistics follow stage 1.
    The minutes in the last table are stage 2's.
 6. On shapes every number is ours. 5 + 15 epochs show the student as many images as the 20 epochs
    of the other scripts do; the teacher is theirs.
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

# Milestones are fractions of the epochs: the schedule keeps its shape when the run gets shorter.
YIM = dict(batch_size=128, lr=0.1, momentum=0.9, nesterov=False, weight_decay=1e-4, lr_decay=0.1,
           augment=True, reflect=False, fsp_lr=1e-3, fsp_weight=0.01)
FSP_MILESTONES = [11 / 21, 16 / 21]     # of stage 1, in thousands of iterations
RECIPES = {
    # Yim et al. 2017, Section 4; see departure 4
    "cifar10": dict(YIM, epochs=164, milestones=[32 / 64, 48 / 64], fsp_epochs=54),
    "cifar100": dict(YIM, epochs=164, milestones=[32 / 64, 48 / 64], fsp_epochs=82),
    # the rows of Table 1 with a star
    "third": dict(YIM, epochs=54, milestones=[11 / 21, 16 / 21], fsp_epochs=82),
    "shapes": dict(epochs=20, batch_size=32, lr=0.1, momentum=0.9, nesterov=False,
                   weight_decay=5e-4, milestones=[0.6, 0.8, 0.95], lr_decay=0.2,
                   augment=True, reflect=False, fsp_lr=1e-3, fsp_weight=0.01, fsp_epochs=5),
}
RECIPES["folder"] = RECIPES["cifar10"]


# ---------------------------------------------------------------------------------- the method

# --- shared: precision ---
def full(x: Tensor) -> Tensor:
    """float16 and bfloat16 to float32; float32 and float64 stay what they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
# --- end shared ---


def fsp_matrix(first: Tensor, second: Tensor) -> Tensor:
    """Eq. 1: first F1, (N, m, h, w), second F2, (N, n, h, w) -> G, (N, m, n): a mean over pixels.

    A larger F1 or F2 is max-pooled to the size of the smaller.
    """
    size = min(first.shape[-2:], second.shape[-2:])
    first, second = (full(x if x.shape[-2:] == size else F.adaptive_max_pool2d(x, size)).flatten(2)
                     for x in (first, second))
    with torch.autocast(first.device.type, enabled=False):      # a sum over many pixels
        return first @ second.mT / first.shape[2]


def fsp_loss(student_pairs: list[tuple], teacher_pairs: list[tuple]) -> Tensor:
    """Eq. 2 without lambda_i: L_FSP, a scalar in the units of a feature to the fourth power.

    Lists of (first, second), one pair of maps a section. SUM over the entries of each matrix and
    over the pairs, mean over the batch; the teacher gets no gradient. ValueError where the numbers
    of pairs or the widths differ.
    """
    loss = 0
    for ours, theirs in zip(student_pairs, teacher_pairs, strict=True):
        student, teacher = fsp_matrix(*ours), fsp_matrix(*theirs).detach()
        if student.shape != teacher.shape:
            raise ValueError(f"FSP matrices of {tuple(student.shape[1:])} and "
                             f"{tuple(teacher.shape[1:])} channels: connect the student's maps")
        loss = loss + (student - teacher).square().sum() / len(student)
    return loss


def connect(student: nn.Module, teacher: nn.Module, images: Tensor) -> None:
    """Give the student 1x1 convolutions to the teacher's widths where they differ (departure 1)."""
    with torch.no_grad():
        taps = [network.eval()(images, taps=True) for network in (student, teacher)]
    widths = [[x.shape[1] for x in (*maps.entries, *maps.stages)] for maps in taps]
    if widths[0] != widths[1]:
        print(f"1x1 connectors on the student's maps in stage 1: {widths[0]} -> {widths[1]}")
        student.connectors = nn.ModuleList(
            nn.Conv2d(ours, theirs, 1, bias=False) if ours != theirs else nn.Identity()
            for ours, theirs in zip(*widths)).to(images.device)


def make_step(student: nn.Module, teacher: nn.Module | None, args: Namespace) -> Callable:
    """A step's logits and its term: with a teacher stage 1's L_FSP, without one cross-entropy."""
    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if teacher is None:
            logits = student(images)
            return logits, {"ce": F.cross_entropy(full(logits), labels)}
        ours = student(images, taps=True)
        maps = [*ours.entries, *ours.stages]
        if hasattr(student, "connectors"):
            maps = [connector(x) for connector, x in zip(student.connectors, maps)]
        with torch.no_grad():
            theirs = teacher(images, taps=True)
        count = len(ours.stages)
        loss = fsp_loss(list(zip(maps[:count], maps[count:])),
                        list(zip(theirs.entries, theirs.stages)))
        return ours.logits, {"fsp": args.fsp_weight * loss}
    return step


def first_stage(teacher: nn.Module, args: Namespace, loaders: tuple, seed: int) -> nn.Module:
    """Stage 1: a student with the teacher's FSP matrices and an untrained classifier."""
    student = new_model(args.student, args, loaders, seed)
    connect(student, teacher, next(iter(loaders[1]))[0][:2])
    stage1 = {**vars(args), "epochs": args.fsp_epochs, "lr": args.fsp_lr, "lr_mobile": None,
              "milestones": FSP_MILESTONES}
    step = make_step(student, teacher, args)
    fit(student, step, loaders, Namespace(**stage1), "fsp/stage1", seed)
    if hasattr(student, "connectors"):
        del student.connectors
    return student


@torch.no_grad()
def ensemble_accuracy(students: list[nn.Module], loader: ImageLoader) -> float:
    """Accuracy, in per cent, of the mean of the students' probabilities."""
    right = torch.cat([sum(s.eval()(images).softmax(1) for s in students).argmax(1) == labels
                       for images, labels in loader])
    return 100 * right.sum().item() / len(right)


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
        fsp_epochs=dict(type=number(int, 1), help="of stage 1; --epochs are those of stage 2"),
        fsp_lr=dict(type=number(float, 1e-9), help="learning rate of stage 1 at its start"),
        fsp_weight=dict(type=number(float, 0), help="lambda_i, the same for all sections"),
        fsp_seed=dict(type=number(int, 0), help="one stage 1 for all students; default: their own"),
        ensemble=dict(action="store_true", help="of the --runs: each, and their ensemble"))
    args.own.remove("ensemble")     # it only prints
    if args.distill_epochs:
        fail("--distill-epochs has no use here: stage 1 takes --fsp-epochs, stage 2 --epochs")
    method = "baseline" if args.baseline else "fsp"
    teacher = None if args.baseline else get_teacher(args, loaders)
    students = []
    for seed in range(args.seed, args.seed + args.runs):
        if teacher is None or args.eval:
            student = new_model(args.student, args, loaders, seed)
        else:
            first = seed if args.fsp_seed is None else args.fsp_seed
            student = first_stage(teacher, args, loaders, first)
        fit(student, make_step(student, None, args), loaders, args, method, seed)
        students.append(student)
    if not (args.dry_run or args.eval):
        report(args, method)
    if args.ensemble:
        each = [evaluate(student, loaders[1], args) for student in students]
        print("each " + ", ".join(f"{accuracy:.2f}" for accuracy in each),
              f"average {mean(each):.2f}, ensemble {ensemble_accuracy(students, loaders[1]):.2f}",
              sep="; ")


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
