"""Attention transfer (AT): the student learns to look where the teacher looks.

Zagoruyko, Komodakis: Paying More Attention to Attention, ICLR 2017, arxiv.org/abs/1612.03928

Where a convolutional network finds its evidence shows in its activations: squared and summed over
the channels they are a map of its attention. The student is trained on its labels and, at the end
of each group of blocks, to have the teacher's map; the widths of the two may differ.

    Q_j = sum_c |A_jc|^2                                                   attention map of pair j
    L_AT = sum_j mean over N and H*W of (Q_S / ||Q_S||_2 - Q_T / ||Q_T||_2)^2
    L    = (1 - lambda) CE(softmax(z), y) + lambda L_K + beta L_AT
    lambda = 0 is the paper's AT; lambda > 0 is AT+KD, L_K = tau^2 KL(q || p) as in kd.py

    symbol   here              shape            symbol   here             value on CIFAR-10
    A_S      student_stages    (N, C, H, W)     beta     beta             1000
    A_T      teacher_stages    (N, C', H, W)    lambda   kd_weight        0.9 (AT+KD), 0 (AT)
    Q/||Q||  attention_map()   (N, H*W)         tau      temperature      4

Run:
    python at.py --dataset shapes                          5 minutes, 2 CPU cores: 87.3 % (5 seeds)
    python at.py --teacher wrn16_3 --student wrn16_1       AT+KD on CIFAR-10, 200 epochs, a GPU
    python at.py --recipe cifar10-at                       AT alone, by the recipe of its own paper

Departures from the paper and from known code:
 1. The paper's Eq. 2 is (beta / 2) times an unsquared norm; the authors' code, done here, squares
    it, drops the half, and averages over batch and pixels. beta = 1000 belongs to that mean: on the
    sum of squares it would be 64 to 1024 times too strong. The paper's "beta about 0.1" is 1000
    divided by the number of elements of a map and by the batch size.
 2. Recipe cifar10 is that of the AT+KD rows in Jeon et al. (the ATang paper), as in kd.py. Recipe
    cifar10-at is the authors' own; their code resets the momentum when the learning rate drops,
    draws BatchNorm weights from U(0, 1) and scales the others by fan-in; none of this is done here.
"""
import math
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter as HelpFormatter
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from pathlib import Path
from statistics import mean, stdev
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (ImageLoader, UserError, add_data_flags, begin_run, check_pair, flag_options,
                    full, has_bf16, join_processes, limited, load_data, load_weights, new_model,
                    one_line, processes, read_log, read_run, share_statistics, summed,
                    weights_hash, write_run)

# Milestones are fractions of --epochs: the schedule keeps its shape when the run gets shorter.
JEON = dict(batch_size=128, lr=0.1, momentum=0.9, nesterov=False, weight_decay=1e-4, lr_decay=0.2,
            augment=False, reflect=False)
CRD = dict(epochs=240, batch_size=64, lr=0.05, momentum=0.9, nesterov=False, weight_decay=5e-4,
           milestones=[150 / 240, 180 / 240, 210 / 240], lr_decay=0.1, augment=True, reflect=False)
RECIPES = {
    # Jeon et al. 2021, Sections 4.1 and 4.2
    "cifar10": dict(JEON, epochs=200, milestones=[40 / 200, 80 / 200, 120 / 200, 160 / 200],
                    temperature=4.0, kd_weight=0.9, beta=1000.0),
    "cinic10": dict(JEON, epochs=180, milestones=[40 / 180, 80 / 180, 120 / 180, 160 / 180],
                    temperature=16.0, kd_weight=0.6, beta=50.0),
    # the authors' code: AT alone
    "cifar10-at": dict(JEON, epochs=200, milestones=[60 / 200, 120 / 200, 160 / 200],
                       weight_decay=5e-4, augment=True, reflect=True,
                       temperature=4.0, kd_weight=0.0, beta=1000.0),
    # Tian et al. 2020 (CRD)
    "cifar100": dict(CRD, temperature=4.0, kd_weight=0.0, beta=1000.0),
    # the authors' code, ResNet18 from ResNet34: AT alone
    "imagenet": dict(CRD, epochs=100, batch_size=256, lr=0.1, weight_decay=1e-4, temperature=4.0,
                     milestones=[0.3, 0.6, 0.9], kd_weight=0.0, beta=1000.0),
    # the rows of Heo et al. 2019 (the overhaul), Table 3; their own constants are not stated
    "cifar100-heo": dict(epochs=200, batch_size=128, lr=0.1, momentum=0.9, nesterov=True,
                         weight_decay=5e-4, milestones=[100 / 200, 150 / 200], lr_decay=0.1,
                         augment=True, reflect=True, temperature=4.0, kd_weight=0.0, beta=1000.0),
    # ours, found on the validation split
    "shapes": dict(JEON, epochs=15, batch_size=32, lr=0.05, weight_decay=5e-4,
                   milestones=[0.6, 0.8, 0.95], augment=True, temperature=4.0, kd_weight=0.9,
                   beta=100.0),
}
RECIPES["folder"] = RECIPES["cifar10"]
# What argparse is told of the method's own entries.
OWN = {"temperature": dict(type=limited(float, 0.1, 100), help="tau"),
       "kd_weight": dict(type=limited(float, 0, 1), help="lambda, the weight of L_K"),
       "beta": dict(type=limited(float, 0, 1e9), help="weight of L_AT")}


def attention_map(feature: Tensor, p: int = 2) -> Tensor:
    """Section 3.1: sum_c |A_c|^p, divided by its L2 norm over the pixels.

    feature A, (N, C, H, W) of any C -> (N, H*W), in [0, 1]; a map of zeros stays zero.
    """
    return F.normalize(full(feature).abs().pow(p).sum(dim=1).flatten(1), dim=1)


def at_loss(student_stages: list[Tensor], teacher_stages: list[Tensor], p: int = 2) -> Tensor:
    """Eq. 2 in the form of the authors' code (departure 1): L_AT, a scalar without unit.

    Lists of (N, C, H, W), one map a group; C is free, unequal H and W are matched by averaging the
    larger map's activations. SUM over the pairs of the MEAN over batch and pixels; the teacher gets
    no gradient. Maps of one pixel add nothing. Lists of unequal length raise ValueError.
    """
    loss = 0
    for student, teacher in zip(student_stages, teacher_stages, strict=True):
        if student.shape[-2:] != teacher.shape[-2:]:
            size = min(student.shape[-2:], teacher.shape[-2:])
            student, teacher = (F.adaptive_avg_pool2d(x, size) for x in (student, teacher))
        loss = loss + F.mse_loss(attention_map(student, p), attention_map(teacher.detach(), p))
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
    """step(images, labels) -> logits, weighted terms of L; without a teacher, of CE alone."""
    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        ours = student(images, taps=True)
        z = ours.logits
        ce = F.cross_entropy(full(z), labels)
        if teacher is None:
            return z, {"ce": ce}
        with torch.no_grad():
            theirs = teacher(images, taps=True)
        v = theirs.logits
        kd = kd_loss(z, v, args.temperature)
        at = at_loss(ours.stages, theirs.stages)
        return z, {"ce": (1 - args.kd_weight) * ce, "kd": args.kd_weight * kd, "at": args.beta * at}
    return step


# --- shared: command line ---
def prepare(alike: str = "") -> tuple[Namespace, tuple[ImageLoader, ImageLoader]]:
    """The command line, and the loaders; `alike`: what check_pair wants of the two networks."""
    join_processes()
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False, add_help=False,
                            formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--teacher", default="wrn16_3", help="network")
    add("--student", default="wrn16_1", help="network")
    add_data_flags(parser)
    add("--recipe", choices=RECIPES, help="gives the defaults below; None: the data set's")
    add("--baseline", action="store_true", help="train the student with cross-entropy alone")
    add("--teacher-ckpt", type=Path, help="None: the teacher's baseline run in --out")
    add("--teacher-epochs", type=limited(int, 1, 1e5), help="stop early; not with --teacher-ckpt")
    add("--distill-epochs", type=limited(int, 1, 1e5), help="then cross-entropy alone")
    add("--seed", type=limited(int, 0, 1e9), default=0, help="of the first student")
    add("--runs", type=limited(int, 1, 1e3), default=1, help="students, seed after seed")
    add("--dry-run", action="store_true", help="two steps of each training, nothing is kept")
    add("--compile", action="store_true", help="torch.compile the step of the training")
    add("--bf16", action=BooleanOptionalAction, help="autocast; None: on GPUs that have it")
    add("--out", type=Path, default="runs", help="the folder of all runs")
    known, _ = parser.parse_known_args()
    name = known.recipe or known.dataset
    if name not in RECIPES:
        parser.error(f"no recipe for {name} here: choose --recipe {' or '.join(RECIPES)}")
    for key, value in RECIPES[name].items():
        add("--" + key.replace("_", "-"), default=value, **OWN.get(key, flag_options(key, value)))
    add("-h", "--help", action="help", help="show this")
    args = parser.parse_args()
    if max(args.teacher_epochs or 1, args.distill_epochs or 1) > args.epochs:
        parser.error(f"--teacher-epochs and --distill-epochs: at most the {args.epochs} epochs")
    args.autocast = has_bf16(args.device) if args.bf16 is None else args.bf16
    check_pair(args.teacher, args.student, args.image_size, "" if args.baseline else alike)
    names = ("augment", "seed", "reflect", "image_size", "train_images", "split", "workers")
    return args, load_data(args.dataset, args.data_dir, args.batch_size, args.device,
                           **{name: getattr(args, name) for name in names})
# --- end shared ---


# --- shared: training ---
@torch.no_grad()
def evaluate(model: nn.Module, loader: ImageLoader, args: Namespace) -> float:
    """Accuracy in per cent, in eval mode."""
    model.eval()
    right = torch.zeros(1, device=args.device)
    with torch.autocast(args.device, torch.bfloat16, enabled=args.autocast):
        for images, labels in loader:
            right += (model(images).argmax(1) == labels).sum()
    return 100 * summed(right).item() / len(loader.labels)


def wrap_step(model: nn.Module, step: Callable, args: Namespace) -> Callable:
    """The step, compiled with --compile; under torchrun with gradients averaged over processes."""
    if args.compile:
        mode = "reduce-overhead" if args.device == "cuda" else "default"
        step = torch.compile(step, fullgraph=True, mode=mode)
    if processes()[1] == 1:
        return step
    module = nn.Module()
    module.model, module.forward = model.to(memory_format=torch.channels_last), step
    return nn.parallel.DistributedDataParallel(module)


def fit(model: nn.Module, step: Callable, loaders: tuple, args: Namespace, run: str, seed: int,
        stop: int | None = None) -> list[dict]:
    """Train `model` by SGD on the sum of the terms of step(images, labels); return the run's log.

    A run kept in its folder goes on after its last epoch, to the same bits; `stop` ends it early.
    """
    train_loader, test_loader = loaders
    rank, count = processes()
    decisive = ["autocast", *(key for key in RECIPES["folder"] if key not in OWN)]
    if not run.startswith("baseline/"):
        decisive += [*OWN, "distill_epochs", "teacher_hash"]
    settings = train_loader.settings | {key: getattr(args, key) for key in decisive}
    optimizer = torch.optim.SGD(model.parameters(), args.lr, args.momentum,
                                weight_decay=args.weight_decay,
                                nesterov=args.nesterov and args.momentum > 0)
    log = [dict(settings=settings, command=sys.argv, versions=f"{torch.__version__} {args.device}")]
    folder = args.out / args.dataset / run / f"seed{seed}"
    if (folder / "last.pt").exists() and not args.dry_run:
        state = read_run(folder, settings, model)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        log = state["log"]
    elif not args.dry_run:
        begin_run(folder, Path(__file__))
    steps = min(2, len(train_loader)) if args.dry_run else len(train_loader)
    last = 1 if args.dry_run else stop or args.epochs
    step = wrap_step(model, step, args)
    for epoch in range(len(log), last + 1):     # the log's first entry is its header
        torch.manual_seed((seed * 1_000_003 + epoch) * count + rank)    # for dropout
        train_loader.set_epoch(epoch, seed)
        drops = sum(epoch > max(1, round(part * args.epochs)) for part in args.milestones)
        optimizer.param_groups[0]["lr"] = lr = args.lr * args.lr_decay ** drops
        model.train()
        sums, seen, start = 0, 0, time.perf_counter()
        for index, (images, labels) in zip(range(1, steps + 1), train_loader):
            optimizer.zero_grad()
            with torch.autocast(args.device, torch.bfloat16, enabled=args.autocast):
                logits, terms = step(images, labels)
            sum(terms.values()).backward()
            optimizer.step()
            values = torch.stack([*terms.values(), (logits.argmax(1) == labels).float().mean()])
            sums = sums + len(labels) * values.detach()
            seen += count * len(labels)
            if index % 50 == 1 or index == steps:       # only here the host waits for the device
                *means, train = summed(sums / seen).tolist()
                line = ", ".join(f"{name} {value:.4g}" for name, value in zip(terms, means))
                if not math.isfinite(sum(means)):
                    raise UserError(f"epoch {epoch}, step {index}: the loss is not finite ({line}):"
                                    f" try a smaller learning rate or loss weight (see --help)")
                if sys.stdout.isatty():
                    print(f"epoch {epoch}, step {index}/{steps}: {line}  ", end="\r", flush=True)
        speed = seen / (time.perf_counter() - start)
        share_statistics(model)
        log.append({"epoch": epoch, **dict(zip(terms, means)), "lr": lr, "train": 100 * train,
                    "test": evaluate(model, test_loader, args), "images/s": speed,
                    "seconds": time.perf_counter() - start})
        print("  ".join(f"{key} {value:<6.5g}" for key, value in log[-1].items()), flush=True)
        if not args.dry_run:
            write_run(folder, {"model": model.state_dict(), "log": log,
                               "optimizer": optimizer.state_dict()})
    return log
# --- end shared ---


# --- shared: teacher and results ---
def get_teacher(args: Namespace, loaders: tuple) -> nn.Module:
    """The frozen teacher: --teacher-ckpt, or the baseline of its network, trained where absent."""
    teacher = new_model(args.teacher, loaders[0], seed=0)
    if args.teacher_ckpt:
        load_weights(teacher, args.teacher_ckpt)
    else:
        early = f"-{args.teacher_epochs}" if args.teacher_epochs else ""
        fit(teacher, make_step(teacher, None, args), loaders, args,
            f"baseline/{args.teacher}{early}", seed=0, stop=args.teacher_epochs)
    args.teacher_hash = weights_hash(teacher.eval().requires_grad_(False))
    args.teacher_accuracy = evaluate(teacher, loaders[1], args)
    print(f"teacher {args.teacher}: {args.split} accuracy {args.teacher_accuracy:.2f} %")
    return teacher


def report(args: Namespace, run: str, logs: list[list[dict]]) -> None:
    """The last lines; the gain where the baseline's runs of the same settings are finished."""
    tests, gains = [log[-1]["test"] for log in logs], []
    for seed, log in enumerate(logs, args.seed):
        base = read_log(args.out / args.dataset / f"baseline/{args.student}/seed{seed}")
        if len(base) == len(log) and base[0]["settings"].items() <= log[0]["settings"].items():
            gains.append(log[-1]["test"] - base[-1]["test"])
    deviation = f" ± {stdev(tests):.2f}" if len(tests) > 1 else ""
    print(f"{run}: {args.split} accuracy {mean(tests):.2f}{deviation} %, "
          f"files in {args.out / args.dataset / run}")
    if not args.baseline:
        gain = f"{mean(gains):+.2f}" if len(gains) == len(logs) else "run --baseline in this --out"
        print(f"teacher {args.teacher} {args.teacher_accuracy:.2f} %; gain on the baseline: {gain}")
# --- end shared ---


def main() -> None:
    args, loaders = prepare("count")
    run = f"baseline/{args.student}" if args.baseline else f"at/{args.teacher}-{args.student}"
    teacher = None if args.baseline else get_teacher(args, loaders)
    logs = []
    for seed in range(args.seed, args.seed + args.runs):
        student = new_model(args.student, loaders[0], seed)
        step = make_step(student, teacher, args)
        if args.distill_epochs:
            fit(student, step, loaders, args, run, seed, args.distill_epochs)
            step = make_step(student, None, args)
        logs.append(fit(student, step, loaders, args, run, seed))
    if not args.dry_run:
        report(args, run, logs)


# --- shared: entry ---
if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        sys.exit(one_line(error))
    except KeyboardInterrupt:
        print("\nstopped: every finished epoch is kept, and the same command goes on from there")
        sys.exit(130)
# --- end shared ---
