"""FSP: the student learns how features turn into later features, before it learns the task.

Yim, Joo, Bae, Kim: A Gift from Knowledge Distillation, CVPR 2017 (FSP: flow of solution procedure)
Liu: A Gift from Knowledge Distillation, 2018: a report on it, with Eq. 1, Eq. 2 and Table 1 below

How a network solves its task shows in the direction from an earlier to a later layer's features:
their inner products over all pixels, a matrix. Stage 1 trains the student to have the teacher's
matrices, with no labels; stage 2 starts from these weights and is ordinary training, no teacher.

    G_ij(x; W) = sum_s sum_t F1_sti(x; W) F2_stj(x; W) / (h w)                             Eq. 1
    L_FSP(W_t, W_s) = (1 / N) sum_x sum_i lambda_i ||G_i^T(x; W_t) - G_i^S(x; W_s)||_2^2   Eq. 2
    stage 1 minimises L_FSP,   stage 2 minimises CE(softmax(z), y)

    symbol   here              shape              symbol     here          value
    F1, F2   first, second     (N, m|n, h, w)     lambda_i   fsp_weight    see departure 2
    G        fsp_matrix()      (N, m, n)          N          batch_size    128

Run:
    T=runs/shapes/baseline/wrn16_3/seed0/last.pt         the teacher of kd.py --dataset shapes
    python fsp.py --dataset shapes --epochs 11 --teacher-ckpt $T     4 + 11 epochs: 81.9 % (5 seeds)
    python fsp.py --teacher resnet26 --student resnet8   CIFAR-10, 54 + 164 epochs, a GPU
    python tests/reproduce.py fsp-1                      Table 1, CIFAR-100: three students in a
                                                         third of the iterations, their ensemble

Departures from the papers and from known code:
 1. The paper's networks have equal widths. Where teacher's and student's differ, a 1x1 convolution
    brings each of the student's maps to the teacher's width; the script says so in a line. It is
    trained in stage 1 and dropped before stage 2, with its share of what was learnt.
 2. Eq. 2 sums over the entries of a matrix, and so does this file. All lambda_i are equal, which is
    all the papers say: 1 here where the widths are equal; 0.001 where they differ, since the sum
    over a WRN16-3's 48 to 192 channels diverges with 1, and on CIFAR-10 with 0.01, which is better
    on shapes and the default there. Known code (RepDistiller, KD-Zoo) averages over the entries.
 3. "Three sections" is all that is said of the layers. F1 is the output of a section's first block
    here, F2 of its last. A section of one block has no other first map than the one inside the
    block (ResNet, WRN) or what enters it (VGG). A larger F1 is max-pooled to F2's size, as in the
    paper. Teacher and student may differ in size: G does not depend on it.
 4. Recipes: 64,000, 32,000 and 21,000 iterations are 164, 82 and 54 epochs at a batch size of 128,
    which is ours, as is the flip beside the crop. Stage 1's 32,000 follow from Table 1's 95k - 63k,
    with the milestones known for 21,000 stretched; on CIFAR-10 it had 21,000, so --fsp-epochs 54
    belongs to --recipe third there. A teacher trained here has the same --epochs and --recipe.
 5. Every student has a stage 1 of its own unless --shared-stage1, as in Table 1. The classifier is
    copied untrained; BatchNorm statistics follow stage 1.
 6. On shapes 4 + 11 epochs show the student as many images as the other scripts' 15 do. Recipe
    folder is the other scripts' cifar10, with a quarter as many epochs for stage 1.
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

# Milestones are fractions of the epochs: the schedule keeps its shape when the run gets shorter.
YIM = dict(batch_size=128, lr=0.1, momentum=0.9, nesterov=False, weight_decay=1e-4, lr_decay=0.1,
           augment=True, reflect=False, fsp_lr=1e-3, fsp_milestones=[11 / 21, 16 / 21],
           fsp_weight=None, shared_stage1=False)
RECIPES = {
    # Yim et al. 2017, Section 4
    "cifar10": dict(YIM, epochs=164, milestones=[32 / 64, 48 / 64], fsp_epochs=54),
    "cifar100": dict(YIM, epochs=164, milestones=[32 / 64, 48 / 64], fsp_epochs=82),
    # the rows of Table 1 with a star
    "third": dict(YIM, epochs=54, milestones=[11 / 21, 16 / 21], fsp_epochs=82, shared_stage1=True),
    # ours, found on the validation split
    "shapes": dict(YIM, epochs=15, batch_size=32, lr=0.05, weight_decay=5e-4, lr_decay=0.2,
                   milestones=[0.6, 0.8, 0.95], fsp_epochs=4),
}
# the other scripts' cifar10, so that they share their teachers
RECIPES["folder"] = dict(YIM, epochs=200, milestones=[0.2, 0.4, 0.6, 0.8], lr_decay=0.2,
                         augment=False, fsp_epochs=50)
# What argparse is told of the method's own entries.
OWN = {"fsp_epochs": dict(type=limited(int, 1, 1e5), help="of stage 1; --epochs are stage 2's"),
       "fsp_lr": dict(type=limited(float, 1e-9, 1e3), help="learning rate of stage 1 at its start"),
       "fsp_milestones": dict(type=limited(float, 0, 1), nargs="*", help="parts of --fsp-epochs"),
       "fsp_weight": dict(type=limited(float, 0, 1e9), help="lambda_i; None: see departure 2"),
       "shared_stage1": dict(action=BooleanOptionalAction, help="one, of --seed, for all --runs")}


def fsp_matrix(first: Tensor, second: Tensor) -> Tensor:
    """Eq. 1: first F1, (N, m, h, w), second F2, (N, n, h, w) -> G, (N, m, n): a mean over pixels.

    A larger F1 or F2 is max-pooled to the size of the smaller.
    """
    if first.shape[-2:] != second.shape[-2:]:
        size = min(first.shape[-2:], second.shape[-2:])
        first, second = (F.adaptive_max_pool2d(x, size) for x in (first, second))
    first, second = full(first).flatten(2), full(second).flatten(2)
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


def connect(student: nn.Module, teacher: nn.Module, args: Namespace, images: Tensor) -> None:
    """Where the widths differ, give the student 1x1 convolutions (departure 1); choose lambda_i."""
    with torch.no_grad():
        taps = [network.eval()(images, taps=True) for network in (student, teacher)]
    widths = [[x.shape[1] for x in (*maps.entries, *maps.stages)] for maps in taps]
    if args.fsp_weight is None:     # departure 2
        connected = 0.01 if args.dataset == "shapes" else 0.001
        args.fsp_weight = 1.0 if widths[0] == widths[1] else connected
    if widths[0] != widths[1]:
        print(f"1x1 connectors on the student's maps in stage 1: {widths[0]} -> {widths[1]}")
        student.connectors = nn.ModuleList()
        for ours, theirs in zip(*widths):
            same = ours == theirs
            connector = nn.Identity() if same else nn.Conv2d(ours, theirs, 1, bias=False)
            student.connectors.append(connector.to(images.device))


def make_step(student: nn.Module, teacher: nn.Module | None, args: Namespace) -> Callable:
    """step(images, labels) -> logits, weighted L_FSP of stage 1; without a teacher, CE."""
    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if teacher is None:
            z = student(images)
            return z, {"ce": F.cross_entropy(full(z), labels)}
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
    student = new_model(args.student, loaders[0], seed)
    images, labels = next(iter(loaders[1]))
    connect(student, teacher, args, images[:2])
    stage1 = Namespace(**{**vars(args), "epochs": args.fsp_epochs, "lr": args.fsp_lr,
                          "milestones": args.fsp_milestones})
    step = make_step(student, teacher, args)
    freeze_rest(student, step, images, labels)
    fit(student, step, loaders, stage1, f"fsp/stage1/{args.teacher}-{args.student}", seed)
    if hasattr(student, "connectors"):
        del student.connectors
    return student.requires_grad_(True)


def freeze_rest(student: nn.Module, step: Callable, images: Tensor, labels: Tensor) -> None:
    """Keep what L_FSP does not depend on, the classifier, out of the training."""
    _, terms = step(images[:2], labels[:2])
    sum(terms.values()).backward()
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


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
    if args.distill_epochs:
        raise UserError("--distill-epochs has no use here: stage 1 takes --fsp-epochs, stage 2 "
                        "--epochs")
    run = f"baseline/{args.student}" if args.baseline else f"fsp/{args.teacher}-{args.student}"
    teacher = None if args.baseline else get_teacher(args, loaders)
    logs = []
    for seed in range(args.seed, args.seed + args.runs):
        if teacher is None:
            student = new_model(args.student, loaders[0], seed)
        else:
            student = first_stage(teacher, args, loaders, args.seed if args.shared_stage1 else seed)
        logs.append(fit(student, make_step(student, None, args), loaders, args, run, seed))
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
