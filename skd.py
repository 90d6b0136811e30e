"""Spherical knowledge distillation (SKD): logits are compared after both have the same length.

Guo et al.: Reducing the Teacher-Student Gap via Spherical Knowledge Distillation,
arxiv.org/abs/2010.07485

A larger teacher is surer of itself: its logits are longer, its entropy lower, and a student that
wastes its capacity on that length learns worse from a better teacher. SKD puts the logits of both
networks on one sphere: what is left to match is their direction, which class resembles which.

    S(p) = -sum_i p_i log p_i                                 entropy                    Eq. 4
    F(z) = tau log sum_i e^(z_i / tau)                        free energy                Eq. 5
    G_entropy = S(p) - S(q) ~ (||v||^2 - ||z||^2) / (2 K tau^2)     Eq. 6, Theorem 1 (departure 3)
    G_f = F(v) - F(z) ~ (||v||^2 - ||z||^2) / (2 K tau)             Eq. 10, Theorem 2
    z^ = z / ||z||,   v^ = v / ||v||                          the alignment layer        Eq. 15
    p = softmax(z^ / tau),   q = softmax(v^ / tau)
    L_SKD = -sum_i q_i log p_i,   L = lambda L_SKD + (1 - lambda) L_cls                  Eq. 16

    symbol   here              shape          symbol   here             value on CIFAR-100
    z        student_logits    (N, K)         tau      temperature      4
    v        teacher_logits    (N, K)         lambda   kd_weight        0.9
    z^, v^   spherical()       (N, K)         -        scale            2 (departure 1)

Run:
    python skd.py --dataset shapes                          5 minutes on 2 CPU cores: 64.9 %,
                                                            baseline 73.9 (5 seeds, see README)
    python skd.py --teacher wrn16_3 --student wrn16_1       CIFAR-10, 200 epochs, a GPU
Table 7, growing teachers of one student, and its table:
    python kd.py --dataset cifar100 --student resnet14 --baseline
    for T in resnet20 resnet32 resnet44 resnet56 resnet110; do
      python kd.py --dataset cifar100 --teacher $T --student resnet14
      python skd.py --dataset cifar100 --teacher $T --student resnet14
    done; python skd.py --summary

Departures from the paper and from the authors' code:
 1. Unit length as printed, --scale literal, makes both softmaxes at tau = 4 almost uniform, and
    next to nothing is transferred. The default is the published code's: logits centred and divided
    by their standard deviation, times --scale, a length of scale sqrt(K); the factor tau^2; and KL
    for L_SKD, which differs from it by the teacher's entropy alone.
 2. L_cls is cross-entropy on the student's spherical logits, as the code has it and its author
    says is needed; with --scale literal, of which the paper says nothing, on the raw ones.
    --scale none leaves the logits as they are: this is kd.py to the bit, with the gaps logged.
 3. Theorem 1 says 1 / (K tau^2): twice too much, since its proof stops at first order (Eq. 8).
    The second-order term of the denominator halves it; Theorem 2's constant is right.
 4. The gaps are logged at tau, on the logits that are compared, centred as the theorems assume, as
    means over an epoch's training batches. The paper names tau = 1 for Table 2's entropies and 4
    for KD's training, but neither tau nor average for its gaps. "theorem 1" and "theorem 2" stand
    beside "S gap" and "F gap"; with the default scale they are 0, and the gaps what they leave out.
 5. Recipe cifar100 is that of CRD's tables, which the paper's rows come from: it gives batch size
    and weight decay for ImageNet alone. It says nesterov, the code does not; lambda falls with the
    epochs in the code alone. Recipe cifar10 is that of kd.py, so that the scripts compare.
 6. On shapes the training is that of the other scripts, but the distilled student starts at half
    their learning rate: dividing by ||z|| multiplies the gradient by scale sqrt(K) / ||z||, and
    from 0.1 on five seeds ended anywhere between 26 and 61 %.
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
RECIPES = {
    # kd.py's, from Jeon et al. 2021; see departure 5
    "cifar10": dict(epochs=200, batch_size=128, lr=0.1, momentum=0.9, nesterov=False,
                    weight_decay=1e-4, milestones=[40 / 200, 80 / 200, 120 / 200, 160 / 200],
                    lr_decay=0.2, augment=False, reflect=False,
                    temperature=4.0, kd_weight=0.9, scale=2.0),
    # the paper's Section 3, and Tian et al. 2020 (CRD)
    "cifar100": dict(epochs=240, batch_size=64, lr=0.05, lr_mobile=0.01, momentum=0.9,
                     nesterov=False, weight_decay=5e-4, lr_decay=0.1, augment=True, reflect=False,
                     milestones=[150 / 240, 180 / 240, 210 / 240],
                     temperature=4.0, kd_weight=0.9, scale=2.0),
    "shapes": dict(epochs=20, batch_size=32, lr=0.1, momentum=0.9, nesterov=False,
                   weight_decay=5e-4, milestones=[0.6, 0.8, 0.95], lr_decay=0.2,
                   augment=True, reflect=False, student_lr=0.05,
                   temperature=4.0, kd_weight=0.9, scale=2.0),
}
RECIPES["folder"] = RECIPES["cifar10"]


# ---------------------------------------------------------------------------------- the method

# --- shared: precision ---
def full(x: Tensor) -> Tensor:
    """float16 and bfloat16 to float32; float32 and float64 stay what they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
# --- end shared ---


def entropy(logits: Tensor, temperature: float) -> Tensor:
    """Eq. 4: S of softmax(z / tau); logits (N, K) -> (N,), in nats."""
    log_p = F.log_softmax(full(logits) / temperature, dim=1)
    return -(log_p.exp() * log_p).sum(dim=1)


def free_energy(logits: Tensor, temperature: float) -> Tensor:
    """Eq. 5: F = tau log sum_i e^(z_i / tau); logits (N, K) -> (N,), in units of a logit."""
    return temperature * torch.logsumexp(full(logits) / temperature, dim=1)


def theorems(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple:
    """Theorems 1 (its constant halved, departure 3) and 2: what G_entropy and G_f are close to.

    (N, K) each -> two of (N,), in nats and in units of a logit. Logits are centred, as assumed;
    holds where 2 tau^2 K is large beside their squared lengths.
    """
    squares = [(full(x) - full(x).mean(dim=1, keepdim=True)).square().mean(dim=1)
               for x in (student_logits, teacher_logits)]
    difference = squares[1] - squares[0]        # (||v||^2 - ||z||^2) / K
    return difference / (2 * temperature ** 2), difference / (2 * temperature)


def spherical(logits: Tensor, scale: float = 1.0, center: bool = False) -> Tensor:
    """Eq. 15 times a length: scale z / ||z||_2; logits (N, K) -> (N, K), in units of a logit.

    center: z minus its mean first. A length below 1e-3, of logits that say nothing, counts as 1e-3.
    """
    logits = full(logits)
    if center:
        logits = logits - logits.mean(dim=1, keepdim=True)
    return scale * F.normalize(logits, dim=1, eps=1e-3)


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


def skd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float, scale: float,
             center: bool = False) -> Tensor:
    """Eq. 16 with the factor tau^2: tau^2 KL(softmax(v^ / tau) || softmax(z^ / tau)), a scalar.

    Raw logits z and v, both (N, K); both get the length `scale`. In tau^2 nats, summed over the K
    classes, averaged over the batch; the teacher gets no gradient.
    """
    return kd_loss(spherical(student_logits, scale, center),
                   spherical(teacher_logits, scale, center), temperature)


@torch.no_grad()
def measures(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> dict:
    """Means over the batch of Eq. 4 to 6 and 10, and of the theorems' approximations."""
    student_logits, teacher_logits = (full(x) - full(x).mean(dim=1, keepdim=True)
                                      for x in (student_logits, teacher_logits))
    (s_ours, s_theirs), (f_ours, f_theirs) = (
        [of(logits, temperature).mean() for logits in (student_logits, teacher_logits)]
        for of in (entropy, free_energy))
    first, second = (x.mean() for x in theorems(student_logits, teacher_logits, temperature))
    return {"S student": s_ours, "S teacher": s_theirs, "S gap": s_ours - s_theirs,
            "theorem 1": first, "F student": f_ours, "F teacher": f_theirs,
            "F gap": f_theirs - f_ours, "theorem 2": second}


def make_step(student: nn.Module, teacher: nn.Module | None, args: Namespace) -> Callable:
    """A step's logits and the weighted terms of Eq. 16, or without a teacher cross-entropy alone.

    The terms after these two carry no gradient: they are there for the log.
    """
    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        z, tau = student(images), args.temperature
        if teacher is None:
            return z, {"ce": F.cross_entropy(full(z), labels)}
        with torch.no_grad():
            v = teacher(images)
        if args.scale == "none":
            student_logits, teacher_logits, skd = z, v, kd_loss(z, v, tau)
        elif args.scale == "literal":
            student_logits, teacher_logits = spherical(z), spherical(v)
            skd = skd_loss(z, v, tau, 1.0) / tau ** 2
        else:
            length = args.scale * math.sqrt(z.shape[1])
            student_logits, teacher_logits = spherical(z, length, True), spherical(v, length, True)
            skd = skd_loss(z, v, tau, length, True)
        ce = F.cross_entropy(full(z) if args.scale == "literal" else student_logits, labels)
        return z, {"ce": (1 - args.kd_weight) * ce, "skd": args.kd_weight * skd,
                   **measures(student_logits, teacher_logits, tau)}
    return step


def scale_value(text: str) -> str | float:
    return text if text in ("literal", "none") else number(float, 1e-3, 1e3)(text)


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
        student_lr=dict(type=number(float, 1e-9), help="of the distilled student; default --lr"),
        temperature=dict(type=number(float, 0.1, 100), help="tau"),
        kd_weight=dict(type=number(float, 0, 1), help="lambda"),
        scale=dict(type=scale_value, help="standard deviation of the logits; literal: length 1; "
                                          "none: as they are, which is KD"))
    method = "baseline" if args.baseline else "skd"
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
