"""Overhaul of feature distillation: what to copy of a feature map, where, and by which distance.

Heo et al.: A Comprehensive Overhaul of Feature Distillation, ICCV 2019, arxiv.org/abs/1904.01866

A ReLU lets positive values pass and blocks negative ones, however negative. The student copies the
teacher's maps in front of the first ReLU after each group: positive values exactly; where the
teacher is negative it need only stay below max(F_t, m), m the channel's expected negative value.

    sigma_m(x) = max(x, m)                                 margin ReLU                         Eq. 2
    m_C = E[F_t^i | F_t^i < 0, i in C]                     margin of channel C                 Eq. 3
    d_p(T, S) = sum_i 0 if S_i <= T_i <= 0, else (T_i - S_i)^2                                 Eq. 4
    L_distill = d_p(sigma_m(F_t), r(F_s))                  r: 1x1 convolution, BatchNorm       Eq. 5
    loss = CE(softmax(z), y) + alpha L_distill                                                 Eq. 6
    summed over the layers: the deepest weighs 1, each before it half of the next (Appendix B)
    symbol   here              shape            symbol   here               value on CIFAR-100
    F_t      teacher_maps      (N, C, H, W)     alpha    alpha              0.001
    r(F_s)   student_maps      (N, C, H, W)     m_C      channel_margin()   (C,)

Run:
    python overhaul.py --dataset shapes                       5 minutes, 2 cores: 90.2 % (5 seeds)
    python overhaul.py --teacher wrn16_3 --student wrn16_1    CIFAR-10, 200 epochs, a GPU
    python tests/reproduce.py overhaul-3                      Table 3; -4, -7, -8, -9, -11 as well

Departures from the paper and from the authors' code:
 1. L_distill is summed over channels and pixels and divided by the batch size, as in the code; the
    paper leaves the batch out. Eq. 4's T is the transformed teacher, sigma_m(F_t), as in Eq. 5.
 2. channel_margin has Eq. 10's closed form for any gamma and beta. The code puts -3 sigma where
    less than 0.1 % of a channel is negative; the true value there is -0.28 sigma and shrinks. A
    ResNet's map is BatchNorm plus shortcut: its margin is the BatchNorm's, as in the code; Appendix
    A averages over training. Eq. 9's sqrt(2 pi sigma) should be sqrt(2 pi) sigma.
 3. Section 3.3 wants the teacher's BatchNorm in training mode; the code's then updates its running
    statistics, our copy has none. Tables 8 and 9: every row's connectors have a BatchNorm here.
 4. Recipes cifar100 (settings e and f: --batch-size 64) and imagenet (epoch 30 has the lower rate,
    as in the code) are the paper's. The code's momentum starts anew at each drop, its CIFAR-100 has
    CIFAR-10's mean, its PyramidNet learnt with mixup: not so here.
"""
import copy
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
HEO = dict(batch_size=128, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, lr_decay=0.1,
           augment=True, reflect=True, alpha=1e-3, position="pre-relu", distance="partial-l2",
           layers="all", teacher_bn="batch")
RECIPES = {
    "cifar10": dict(HEO | JEON, epochs=200, milestones=[0.2, 0.4, 0.6, 0.8]),   # as in kd.py
    # Heo et al. 2019, Section 4.1 and Appendix B; weight decay, nesterov and padding: their code
    "cifar100": dict(HEO, epochs=200, milestones=[100 / 200, 150 / 200]),
    "imagenet": dict(HEO, epochs=100, batch_size=256, weight_decay=1e-4, reflect=False, alpha=1e-4,
                     milestones=[29 / 100, 59 / 100, 89 / 100]),        # Section 4.2 and the same
    "shapes": dict(HEO | JEON, epochs=15, batch_size=32, lr=0.05, weight_decay=5e-4,
                   milestones=[0.6, 0.8, 0.95], augment=True),          # ours, by validation
}
RECIPES["folder"] = RECIPES["cifar10"]
# What argparse is told of the method's own entries.
OWN = {"alpha": dict(type=limited(float, 0, 1e9), help="weight of L_distill"),
       "position": dict(choices=["end", "pre-relu"], help="of a group, or before the next ReLU"),
       "distance": dict(choices=["l2", "partial-l2"], help="l2: to the teacher's map as it is"),
       "layers": dict(choices=["all", "last"], help="which are distilled"),
       "teacher_bn": dict(choices=["batch", "running"], help="what it normalises by, teaching")}


def channel_margin(norm: nn.BatchNorm2d) -> Tensor:
    """Eq. 10: the expected negative value of each channel a BatchNorm puts out, (C,), in its units.

    BatchNorm's output is x = mu + sigma n, mu = beta, sigma = |gamma|, n standard normal (Eq. 8).
    x < 0 means n < -r with r = mu / sigma, which has probability Phi(-r).
    The density of n is phi(n) = exp(-n^2 / 2) / sqrt(2 pi), and n phi(n) = -phi'(n): therefore
    E[n | n < -r] = (integral of n phi(n) from -inf to -r) / Phi(-r) = -phi(r) / Phi(-r), and so
    m = mu + sigma E[n | n < -r] = mu - sigma exp(-r^2 / 2) / (sqrt(2 pi) Phi(-r)).
    The quotient is taken of logarithms, since both its sides are 0 in float64 from r = 38 on. From
    r = 300 on these round off: m = -sigma^2 / mu (1 - 2 / r^2 + O(r^-4)). gamma = 0: min(beta, 0).
    """
    mu, sigma = norm.bias.detach().cpu().double(), norm.weight.detach().cpu().double().abs()
    r = mu / sigma.clamp(min=1e-300)
    log_phi = -r ** 2 / 2 - math.log(2 * math.pi) / 2
    log_Phi = torch.special.log_ndtr(-r)
    m = mu - sigma * torch.exp(log_phi - log_Phi)
    far = -sigma ** 2 / mu * (1 - 2 / r ** 2)
    return torch.where(r > 300, far, m).to(norm.bias)


def margin_relu(feature: Tensor, margin: Tensor) -> Tensor:
    """Eq. 2, the teacher's transform: max(x, m_C); feature (N, C, H, W), margin (C,)."""
    return torch.maximum(full(feature), full(margin).view(1, -1, 1, 1))


def partial_l2(student: Tensor, teacher_target: Tensor) -> Tensor:
    """Eq. 4: d_p(T, S), T the margin ReLU's output, both (N, C, H, W) -> a scalar, their SUM.

    Where S <= T <= 0 the student is right already: no loss and no gradient. Unequal: ValueError.
    """
    if student.shape != teacher_target.shape:
        raise ValueError(f"{(*student.shape,)} and {(*teacher_target.shape,)} want a connector")
    skip = (student <= teacher_target) & (teacher_target <= 0)
    return ((full(teacher_target) - full(student)).square() * ~skip).sum()


def overhaul_loss(student_maps: list[Tensor], teacher_maps: list[Tensor], margins: list[Tensor],
                  partial: bool = True) -> Tensor:
    """Eq. 5 over all layers: L_distill, a scalar in the units of a feature squared.

    Lists from the input to the output of connected student maps and raw teacher maps, both
    (N, C, H, W), and margins (C,). SUM over C, H, W and over layers weighted 1 / 2^(n-1-l), mean
    over N; the teacher gets no gradient. Lists of unequal length raise ValueError.
    partial=False: every value of the teacher's map counts, Table 9's first rows.
    """
    loss, n = 0, len(student_maps)
    layers = zip(student_maps, teacher_maps, margins, strict=True)
    for layer, (student, teacher, margin) in enumerate(layers):
        if partial:
            distance = partial_l2(student, margin_relu(teacher.detach(), margin))
        else:
            distance = (full(teacher.detach()) - full(student)).square().sum()
        loss = loss + 0.5 ** (n - 1 - layer) * distance / len(student)
    return loss


class Connector(nn.Sequential):
    """r of Eq. 5: 1x1 convolution to the teacher's channels and BatchNorm, trained along."""
    def __init__(self, student_channels: int, teacher_channels: int):
        super().__init__(nn.Conv2d(student_channels, teacher_channels, 1, bias=False),
                         nn.BatchNorm2d(teacher_channels))
        nn.init.normal_(self[0].weight, 0.0, math.sqrt(2 / teacher_channels))


def batch_statistics(teacher: nn.Module) -> nn.Module:
    """Section 3.3: a copy without running statistics, which normalises by the batch in eval too."""
    teacher = copy.deepcopy(teacher)
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_var = None
    return teacher


def distilled(layers: list, args: Namespace) -> list:
    return [layers[-1]] if args.layers == "last" else layers


def connect(student: nn.Module, teacher: nn.Module, args: Namespace) -> None:
    """Give the student a connector at each layer that is compared."""
    ours, theirs = student.stage_channels, teacher.stage_channels
    if args.position == "pre-relu":
        ours, theirs = student.pre_relu_channels, teacher.pre_relu_channels
    pairs = distilled(list(zip(ours, theirs)), args)
    student.connectors = nn.ModuleList(Connector(*pair) for pair in pairs).to(args.device)


def make_step(student: nn.Module, teacher: nn.Module | None, args: Namespace) -> Callable:
    """step(images, labels) -> logits, weighted terms of Eq. 6; without a teacher, of CE alone."""
    if teacher is not None:
        margins = [channel_margin(norm) for norm in distilled(teacher.pre_relu_norms, args)]
        teacher = batch_statistics(teacher) if args.teacher_bn == "batch" else teacher
    elif hasattr(student, "connectors"):        # after --distill-epochs nothing is learnt by them
        student.connectors.requires_grad_(False)

    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        ours = student(images, taps=True)
        z = ours.logits
        ce = F.cross_entropy(full(z), labels)
        if teacher is None:
            return z, {"ce": ce}
        with torch.no_grad():
            theirs = teacher(images, taps=True)
        F_s, F_t = ours.pre_relu, theirs.pre_relu
        if args.position == "end":
            F_s, F_t = ours.stages, theirs.stages
        connected = [r(x) for r, x in zip(student.connectors, distilled(F_s, args), strict=True)]
        distill = overhaul_loss(connected, distilled(F_t, args), margins,
                                partial=args.distance == "partial-l2")
        return z, {"ce": ce, "overhaul": args.alpha * distill}
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
    args, loaders = prepare("sizes")
    if not args.baseline and (args.position, args.distance) == ("end", "partial-l2"):
        raise UserError("--position end has no BatchNorm to take margins from: add --distance l2")
    run = f"baseline/{args.student}" if args.baseline else f"overhaul/{args.teacher}-{args.student}"
    teacher = None if args.baseline else get_teacher(args, loaders)
    logs = []
    for seed in range(args.seed, args.seed + args.runs):
        student = new_model(args.student, loaders[0], seed)
        if teacher is not None:
            connect(student, teacher, args)
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
