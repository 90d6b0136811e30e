"""Angular margin based attention distillation (ATang), and AMD, its journal version.

Jeon, Cho, Park: Deep Hypersphere Feature Embedding-based Knowledge Distillation, 2021 (ATang)
Jeon et al.: Leveraging Angular Distributions ..., 2023, arxiv.org/abs/2302.14130 (AMD)

An attention map says where the evidence is. A margin on its values, read as cosines of angles,
drives object (positive) and background (negative) apart; the student learns the separated map.

    Q'_p = sum_c A_c^2 / ||sum_c A_c^2||_2, in [0, 1]     Q'_n = 1 - Q'_p      Section 3.2, 3.3
    theta_p = arccos(Q'_p)                                                     each pixel's angle
    G = log( e^(s cos(m theta_p)) / (e^(s cos(m theta_p)) + e^(s Q'_n)) )      Eq. 6
    L_A = alpha sum_j mean (G_S / ||G_S||_2 - G_T / ||G_T||_2)^2, alpha = 1 / #pairs     Eq. 7
    L = (1 - lambda) CE(softmax(z), y) + lambda L_K + gamma L_A, L_K as in kd.py         Eq. 8

    symbol   here              shape            symbol   here          value on CIFAR-10
    A        *_stages          (N, C, H, W)     m        margin        1.35
    Q'_p     q                 (N, H*W)         s        scale         64
    G        angular_map()     (N, H*W)         gamma    gamma         5000 (see departure 3)
    z, v     the paper's logits a_S, a_T        tau, lambda            4, 0.9

Run:
    python atang.py --dataset shapes                         5 minutes, 2 cores: 87.5 % (5 seeds)
    python atang.py --teacher wrn16_3 --student wrn16_1      CIFAR-10, 200 epochs, a GPU
    python tests/reproduce.py atang-2                        Table 2; -3 to -5, -gamma, -margin

Departures from the papers and from the first author's code:
 1. Eq. 7 is a squared Frobenius norm; the code, done here, takes the MEAN over batch and pixels.
    gamma = 5000 belongs to the mean: on the sum it would be 64 to 1024 times too strong.
 2. Eq. 5 and 6 write s cos(theta_n) for the negative feature: it is s (1 - Q'_p), without a margin.
    The margin is on student and teacher; at m = 1 cos undoes arccos. s = 64 is the code's alone.
 3. Section 4.2: gamma "is 5000 when the student is WRN16-3 and 1000 when a student is WRN28-3", who
    is a student nowhere. Section 4.4.1: student WRN16-1 is best at 5000; student WRN16-3 from
    WRN28-3 has 89.3 at 1000, 88.83 at 5000. So 5000 is the default, --gamma 1000 for that pair.
 4. Batch size, CIFAR-10's weight decay, and no crop and flip: see departure 2 in kd.py.
 5. AMD: the code averages three terms, G, positive and negative feature. Its local variant fails
    when run; amd-local follows its description. We have not seen the journal's gamma and margin.
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
            augment=False, reflect=False, loss="atang", margin=1.35, scale=64.0)
RECIPES = {
    # Jeon et al. 2021, Sections 4.1 and 4.2
    "cifar10": dict(JEON, epochs=200, milestones=[40 / 200, 80 / 200, 120 / 200, 160 / 200],
                    temperature=4.0, kd_weight=0.9, gamma=5000.0),
    "cinic10": dict(JEON, epochs=180, milestones=[40 / 180, 80 / 180, 120 / 180, 160 / 180],
                    temperature=16.0, kd_weight=0.6, gamma=500.0),
    # ours, found on the validation split
    "shapes": dict(JEON, epochs=15, batch_size=32, lr=0.05, weight_decay=5e-4,
                   milestones=[0.6, 0.8, 0.95], augment=True, temperature=4.0, kd_weight=0.9,
                   gamma=1000.0),
}
RECIPES["folder"] = RECIPES["cifar10"]
# What argparse is told of the method's own entries.
OWN = {"temperature": dict(type=limited(float, 0.1, 100), help="tau"),
       "kd_weight": dict(type=limited(float, 0, 1), help="lambda, the weight of L_K"),
       "loss": dict(choices=["atang", "amd", "amd-local"], help="L_A: Eq. 7, or the journal's"),
       "margin": dict(type=limited(float, 0.1, 2), help="m, 1 for none; from 1 to 2 L_A falls "
                      "sixfold, so that a sweep of m at one gamma sweeps the weight too"),
       "scale": dict(type=limited(float, 0.01, 1e4), help="s: from 5 on Eq. 7's norm cancels it, "
                     "so a sweep shows nothing; far below, L_A vanishes with s"),
       "gamma": dict(type=limited(float, 0, 1e9), help="weight of L_A")}


def attention_map(feature: Tensor) -> Tensor:
    """Section 3.2: Q' = sum_c A_c^2, divided by its L2 norm over the pixels plus 1e-6.

    feature A, (N, C, H, W) of any C -> (N, H*W), in [0, 1]; a map of zeros stays zero.
    """
    q = full(feature).square().sum(dim=1).flatten(1)
    return q / (torch.linalg.vector_norm(q, dim=1, keepdim=True) + 1e-6)


def angular_map(q: Tensor, margin: float, scale: float) -> Tensor:
    """Eq. 6: q = Q'_p, (N, H*W) in [0, 1] -> G, (N, H*W), in nats, nowhere positive.

    log(e^a / (e^a + e^b)) = logsigmoid(a - b), finite for any s; the code's quotient overflows
    float32 from s = 89 on. The clamp keeps the slope of arccos finite at q = 1.
    """
    theta = torch.acos(q.clamp(-1 + 1e-7, 1 - 1e-7))
    positive = scale * torch.cos(margin * theta)
    negative = scale * (1 - q)
    return F.logsigmoid(positive - negative)


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The summand of Eq. 7: two (N, H*W), unit norms, MEAN of the squares; 0 for a single pixel."""
    if student.shape != teacher.shape:
        raise ValueError(f"maps of {student.shape[1]} and {teacher.shape[1]} pixels differ in size")
    if student.shape[1] == 1:
        return 0 * student.sum()    # a zero that keeps the graph
    return F.mse_loss(F.normalize(student, dim=1), F.normalize(teacher, dim=1))


def atang_loss(student_stages: list[Tensor], teacher_stages: list[Tensor], margin: float = 1.35,
               scale: float = 64.0) -> Tensor:
    """Eq. 7 with the mean of departure 1: L_A, a scalar without unit.

    Lists of (N, C, H, W), one map a group; C is free, H and W agree in a pair, or else ValueError.
    MEAN over batch and pixels, mean over the pairs (alpha); the teacher gets no gradient.
    """
    pairs = []
    for student, teacher in zip(student_stages, teacher_stages, strict=True):
        g_student = angular_map(attention_map(student), margin, scale)
        g_teacher = angular_map(attention_map(teacher.detach()), margin, scale)
        pairs.append(distance(g_student, g_teacher))
    return torch.stack(pairs).mean()


def amd_distance(q_student: Tensor, q_teacher: Tensor, margin: float, scale: float) -> Tensor:
    """The mean of three distances: of G, and of Eq. 6's positive and negative exponent alone."""
    theta_s = torch.acos(q_student.clamp(-1 + 1e-7, 1 - 1e-7))
    theta_t = torch.acos(q_teacher.clamp(-1 + 1e-7, 1 - 1e-7))
    positive_s = scale * torch.cos(margin * theta_s)
    positive_t = scale * torch.cos(margin * theta_t)
    negative_s, negative_t = scale * (1 - q_student), scale * (1 - q_teacher)
    angular = distance(F.logsigmoid(positive_s - negative_s), F.logsigmoid(positive_t - negative_t))
    return (angular + distance(positive_s, positive_t) + distance(negative_s, negative_t)) / 3


def quadrants(q: Tensor, height: int, width: int) -> list[Tensor]:
    """(N, H*W), cut at H // 2 and W // 2 -> four of (N, pixels)."""
    halves = q.view(-1, height, width).tensor_split([height // 2], dim=1)
    return [x.flatten(1) for half in halves for x in half.tensor_split([width // 2], dim=2)]


def amd_loss(student_stages: list[Tensor], teacher_stages: list[Tensor], margin: float = 1.35,
             scale: float = 64.0, local: bool = False) -> Tensor:
    """AMD (departure 5): mean of amd_distance; local: 0.8 of it, 0.2 of its quadrants' mean."""
    pairs = []
    for student, teacher in zip(student_stages, teacher_stages, strict=True):
        q_student, q_teacher = attention_map(student), attention_map(teacher.detach())
        pair = whole = amd_distance(q_student, q_teacher, margin, scale)
        if local and min(student.shape[-2:]) > 1:
            size, patches = student.shape[-2:], []
            for q_s, q_t in zip(quadrants(q_student, *size), quadrants(q_teacher, *size)):
                patches.append(amd_distance(q_s, q_t, margin, scale))
            pair = 0.8 * whole + 0.2 * sum(patches) / 4
        pairs.append(pair)
    return torch.stack(pairs).mean()


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
    """step(images, labels) -> logits, weighted terms of Eq. 8; without a teacher, of CE alone."""
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
        maps = ours.stages, theirs.stages
        if args.loss == "atang":
            angular = atang_loss(*maps, args.margin, args.scale)
        else:
            angular = amd_loss(*maps, args.margin, args.scale, local=args.loss == "amd-local")
        return z, {"ce": (1 - args.kd_weight) * ce, "kd": args.kd_weight * kd,
                   args.loss: args.gamma * angular}
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
    method = f"{args.loss}/{args.teacher}-{args.student}"
    run = f"baseline/{args.student}" if args.baseline else method
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
