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
    summed over layers: weights 1 for the deepest, 1/2, 1/4 ... before it (Appendix B; not DeepLab)
    symbol   here              shape            symbol   here               value on CIFAR-100
    F_t      teacher_maps      (N, C, H, W)     alpha    alpha              0.001
    r(F_s)   student_maps      (N, C, H, W)     m_C      channel_margin()   (C,)

Run:
    python overhaul.py --dataset shapes               3 to 11 min with teacher: 90.2 % (5 seeds)
    python overhaul.py --teacher wrn16_3 --student wrn16_1    CIFAR-10, a GPU: 86.5 % (1 seed)
    python overhaul.py --dataset scenes --teacher deeplab_resnet8 --student deeplab_resnet8_half

Departures from the paper and from the authors' code:
 1. L_distill is summed over channels and pixels and divided by the batch size, as in the code; the
    paper leaves the batch out. Eq. 4's T is the transformed teacher, sigma_m(F_t), as in Eq. 5.
 2. channel_margin holds for any gamma and beta; the code puts -3 sigma where less than 0.1 % of a
    channel is negative: -0.28 sigma to 0 is true. Eq. 9 means sqrt(2 pi) sigma. A ResNet's map is
    BatchNorm plus shortcut: its margin is the BatchNorm's, as in the code (Appendix A averages).
 3. Section 3.3 wants the teacher's BatchNorm in training mode; the code's then updates its running
    statistics, our copy has none. In Tables 8 and 9, too, all connectors have a BatchNorm here.
 4. cifar100-heo (settings e, f: --batch-size 64) and imagenet-heo (epoch 30 has the lower rate) are
    the paper's; momentum, decay, padding, ImageNet's batch size the code's, which starts momentum
    anew at drops, with CIFAR-10's mean on CIFAR-100. No mixup for PyramidNet. The rest: kd.py's.
 5. voc-heo (Table 6) is the code's, but poly, (1 - t)^0.9, falls by epochs in steps of a fifth. Not
    here: ten times the rate for ASPP, decoder and connectors, the connectors' epoch before, blur.
    No dropout while distilling, by Appendix B. No Table 5: SSD's layers on ResNets are not given.
"""
import argparse
import copy
import hashlib
import io
import json
import math
import os
import shlex
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from common import DATASETS, UserError, check_pair, create_model, load_data, load_weights

# Milestones are fractions of --epochs: the schedule keeps its shape when the run gets shorter.
HEO = dict(batch_size=128, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, lr_decay=0.1,
           augment=True, reflect=True, alpha=1e-3, position="pre-relu", distance="partial-l2",
           layers="all", teacher_bn="batch")
JEON = dict(HEO, nesterov=False, weight_decay=1e-4, lr_decay=0.2, augment=False, reflect=False)
RECIPES = {
    "cifar10-jeon": dict(JEON, epochs=200, milestones=[40 / 200, 80 / 200, 120 / 200, 160 / 200]),
    "cifar100-heo": dict(HEO, epochs=200, milestones=[100 / 200, 150 / 200]),   # Section 4.1
    "imagenet-heo": dict(HEO, epochs=100, batch_size=256, weight_decay=1e-4, reflect=False,
                         alpha=1e-4, milestones=[29 / 100, 59 / 100, 89 / 100]),
    "voc-heo": dict(HEO, epochs=50, batch_size=6, lr=0.007, reflect=False, alpha=1e-5, lr_decay=0.8,
                    milestones=[round(1 - 0.8 ** (k / 0.9), 3) for k in range(1, 16)]),
    "shapes": dict(JEON, epochs=15, batch_size=32, lr=0.05, weight_decay=5e-4, augment=True,
                   milestones=[0.6, 0.8, 0.95]),        # ours, found on the validation split
}
RECIPES["scenes"] = dict(RECIPES["shapes"], epochs=30, batch_size=16, lr=0.1, alpha=1e-4)     # ours
METHOD_FLAGS = {"alpha": dict(help="weight of L_distill"),
    "layers": dict(choices=["all", "last"], help="which are distilled"),
    "position": dict(choices=["end", "pre-relu"], help="of a group, or before the next ReLU"),
    "distance": dict(choices=["l2", "partial-l2"], help="l2: to the teacher's map as it is"),
    "teacher_bn": dict(choices=["batch", "running"], help="statistics it teaches by")}


def channel_margin(norm: nn.BatchNorm2d) -> Tensor:
    """Eq. 10: the expected negative value of each channel a BatchNorm puts out, (C,), in its units.

    BatchNorm's output is x = mu + sigma n, mu = beta, sigma = |gamma|, n standard normal (Eq. 8);
    x < 0 means n < -r with r = mu / sigma. Since n phi(n) = -phi'(n), E[n | n < -r] is
    (integral of n phi(n) from -inf to -r) / Phi(-r) = -phi(r) / Phi(-r), and so
    m = mu - sigma exp(-r^2 / 2) / (sqrt(2 pi) Phi(-r)); with gamma = 0, min(beta, 0).
    The exponential, 0 from r = 39 on, cancels: Phi(-r) = exp(-r^2 / 2) erfcx(r / sqrt(2)) / 2.
    """
    mu, sigma = norm.bias.detach().cpu().double(), norm.weight.detach().cpu().double().abs()
    r = (mu / sigma.clamp(min=1e-300)).clamp(max=1e8)
    quotient = math.sqrt(2 / math.pi) / torch.special.erfcx(r / math.sqrt(2))
    return (mu - sigma * quotient).clamp(max=0).to(norm.bias)


def margin_relu(feature: Tensor, margin: Tensor) -> Tensor:
    """Eq. 2, the teacher's transform: max(x, m_C); feature (N, C, H, W), margin (C,)."""
    return torch.maximum(to_float32(feature), to_float32(margin).view(1, -1, 1, 1))


def partial_l2(student: Tensor, teacher_target: Tensor) -> Tensor:
    """Eq. 4: d_p(T, S), T the margin ReLU's output, both (N, C, H, W) -> a scalar, their SUM.

    Where S <= T <= 0 the student is right: no loss, no gradient. Unequal shapes: a ValueError.
    """
    if student.shape != teacher_target.shape:
        raise ValueError(f"{(*student.shape,)} and {(*teacher_target.shape,)} want a connector")
    skip = (student <= teacher_target) & (teacher_target <= 0)
    return ((to_float32(teacher_target) - to_float32(student)).square() * ~skip).sum()


def overhaul_loss(student_maps: list[Tensor], teacher_maps: list[Tensor], margins: list[Tensor],
                  partial: bool = True, weights: list[float] | None = None) -> Tensor:
    """Eq. 5 over all layers: L_distill, a scalar in the units of a feature squared.

    Lists from the input to the output of connected student maps and raw teacher maps, both
    (N, C, H, W), and margins (C,). SUM over C, H, W and over layers, by default weighted
    1 / 2^(n-1-l), mean over N; no gradient for the teacher; lists of unequal length: ValueError.
    partial=False: every value of the teacher's map counts, Table 9's first columns.
    """
    halved = [0.5 ** layer for layer in reversed(range(len(student_maps)))]
    loss, layers = 0, zip(student_maps, teacher_maps, margins, weights or halved, strict=True)
    for student, teacher, margin, weight in layers:
        if partial:
            distance = partial_l2(student, margin_relu(teacher.detach(), margin))
        else:
            distance = (to_float32(teacher.detach()) - to_float32(student)).square().sum()
        loss = loss + weight * distance / len(student)
    return loss


class Connector(nn.Sequential):
    """r of Eq. 5: 1x1 convolution to the teacher's channels and BatchNorm; both learn."""
    def __init__(self, student_channels: int, teacher_channels: int):
        super().__init__(nn.Conv2d(student_channels, teacher_channels, 1, bias=False),
                         nn.BatchNorm2d(teacher_channels))
        nn.init.normal_(self[0].weight, 0.0, math.sqrt(2 / teacher_channels))


def compared(ends: list, pre_relus: list, args) -> list:
    """What is compared, of what each group has at its end and in front of the next ReLU."""
    layers = ends if args.position == "end" else pre_relus
    return layers[-1:] if args.layers == "last" else layers


class Connected(nn.Module):
    """The student and its connectors: the logits, or with taps=True also the connected maps."""
    def __init__(self, student: nn.Module, teacher: nn.Module, args: argparse.Namespace):
        super().__init__()
        channels = compared(student.stage_channels, student.pre_relu_channels, args)
        wanted = compared(teacher.stage_channels, teacher.pre_relu_channels, args)
        self.student, self.args = student, args
        self.connectors = nn.ModuleList(Connector(*pair) for pair in zip(channels, wanted))

    def forward(self, images: Tensor, taps: bool = False):
        if not taps:
            return self.student(images)
        seen = self.student(images, taps=True)
        maps = compared(seen.stages, seen.pre_relu, self.args)
        return seen.logits, [r(x) for r, x in zip(self.connectors, maps, strict=True)]


def prepared(teacher: nn.Module, args: argparse.Namespace) -> nn.Module:
    """A copy with margins; by default it normalises by the batch in eval mode too (Section 3.3)."""
    teacher = copy.deepcopy(teacher)
    margins = [channel_margin(norm) for norm in teacher.pre_relu_norms]
    teacher.margins = margins[-1:] if args.layers == "last" else margins
    teacher.weights = getattr(teacher, "layer_weights", [])[-len(teacher.margins):]     # DeepLab's
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d) and args.teacher_bn == "batch":
            module.running_mean = module.running_var = None
    return teacher


def losses(student, teacher, images, labels, args) -> tuple[Tensor, dict[str, Tensor]]:
    """The student's logits, and the weighted terms of Eq. 6; without a teacher, of CE alone."""
    if teacher is None:
        z = student(images)
        return z, {"ce": F.cross_entropy(to_float32(z), labels)}
    of_student, of_teacher = both(student, teacher, images, args, taps=True)
    z, F_s = of_student     # F_s: r(F_s), behind the connectors
    F_t = compared(of_teacher.stages, of_teacher.pre_relu, args)
    ce = F.cross_entropy(to_float32(z), labels)
    distill = overhaul_loss(F_s, F_t, teacher.margins, args.distance == "partial-l2",
                            teacher.weights)
    return z, {"ce": ce, "overhaul": args.alpha * distill}


def main() -> None:
    args = parse_args()
    if not args.baseline:
        maps = ["stages" if args.position == "end" else "pre_relu"]
        check_pair(args.teacher, args.student, args.image_size, maps, sizes=True)
        if (args.position, args.distance) == ("end", "partial-l2"):
            raise UserError("--position end has no BatchNorm for margins: add --distance l2")
    loaders = load_data(args.dataset, args.data_dir, args.batch_size, args.device, seed=args.seed,
                        augment=args.augment, reflect=args.reflect, image_size=args.image_size,
                        train_images=args.train_images, split=args.split, workers=args.workers)
    teacher, run = None, f"baseline/{args.student}"
    if not args.baseline:
        teacher = prepared(get_teacher(loaders, args), args)
        run = f"{Path(__file__).stem}/{args.teacher}-{args.student}"
    logs = []
    for seed in range(args.seed, args.seed + args.runs):
        student = build(args.student, seed, loaders[0], args, args.student_ckpt)
        if teacher is not None:
            student = Connected(student, teacher, args)
            student.to(args.device, memory_format=torch.channels_last)
        log = train(student, teacher, loaders, args, run, seed, until=args.distill_epochs)
        if args.distill_epochs:
            if teacher is not None:
                student.connectors.requires_grad_(False)        # they no longer learn
            log = train(student, None, loaders, args, run, seed)
        logs.append(log)
    report(logs, run, args)


# --- shared: the run ---
TRAINING = ("epochs", "batch_size", "lr", "momentum", "nesterov", "weight_decay", "milestones",
            "lr_decay", "augment", "reflect")   # a recipe's other entries are the method's own
SOURCE = Path(__file__).read_text("utf-8")      # as it is when the process starts
COMMON = hashlib.sha256(Path(sys.modules["common"].__file__).read_bytes()).hexdigest()[:8]


def to_float32(x: Tensor) -> Tensor:
    """bfloat16 and float16 to float32, in which losses are computed; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def parse_args() -> argparse.Namespace:
    """The flags, and one for every entry of a recipe; under torchrun, join the others."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank > 0:        # the first process prints the error, then torchrun ends the sleeping ones
        sys.stdout = open(os.devnull, "w")
        parser.error = lambda message: sys.exit(time.sleep(10) or f"error: {message}")
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    devices = [*gpus, *["mps"] * torch.backends.mps.is_available(), "cpu"]
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--teacher", default="wrn16_3", help="network; python common.py lists them")
    add("--student", default="wrn16_1", help="network")
    add("--dataset", default="cifar10", choices=DATASETS, help="shapes: drawn; folder: your own")
    add("--data-dir", type=Path, default="data", help="where the data set lies, or is put")
    add("--train-images", type=int, help="number of training images, class-balanced; None: all")
    add("--image-size", type=int, help="pixels, of folders and voc")
    add("--split", default="test", choices=["test", "val"], help="what is measured: tune on val")
    add("--workers", type=int, help="processes that read pictures in files; None: the cores")
    add("--recipe", choices=RECIPES, help="whose defaults stand below")
    add("--baseline", action="store_true", help="train the student with cross-entropy alone")
    either = parser.add_mutually_exclusive_group().add_argument         # not both
    either("--teacher-ckpt", type=Path, help="file, or torchvision name; None: its run in --out")
    either("--teacher-epochs", type=int, help="stop the teacher's training after so many")
    add("--student-ckpt", type=Path, help="file, or torchvision name, to start from")
    add("--distill-epochs", type=int, help="distil for so many, then cross-entropy alone")
    add("--seed", type=int, default=0, help="of the first student")
    add("--runs", type=int, default=1, help="number of students, seed after seed")
    add("--device", default="cuda" if gpus else "cpu", help="cuda, or one of " + ", ".join(devices))
    add("--bf16", action=switch, help="bfloat16 autocast; None: on GPUs that have it")
    add("--graph", action=switch, default=True, help="record the step, on one GPU")
    add("--compile", action="store_true", help="torch.compile the losses")
    add("--out", type=Path, default="runs", help="folder of all runs")
    for key, value in RECIPES["shapes"].items():        # all recipes have the same entries
        kinds = {bool: dict(action=switch), list: dict(type=float, nargs="*")}
        flag = kinds.get(type(value), dict(type=type(value)))
        add("--" + key.replace("_", "-"), **flag | METHOD_FLAGS.get(key, {"help": "of the recipe"}))
    known, _ = parser.parse_known_args([x for x in sys.argv[1:] if x not in ("-h", "--help")])
    names = [name for name in RECIPES if known.dataset in (name.split("-")[0], "folder")]
    if not known.recipe and not names:
        parser.error(f"no recipe for {known.dataset}: choose --recipe {' or '.join(RECIPES)}")
    recipe = known.recipe or names[0]
    parser.set_defaults(recipe=recipe, image_size=DATASETS[known.dataset], **RECIPES[recipe])
    args = parser.parse_args()
    for key, value in vars(args).items():
        low = int(type(value) is int and key not in ("seed", "workers", "fsp_epochs"))
        high = 1 if key.endswith(("momentum", "milestones", "lr_decay", "kd_weight")) else 1e9
        for x in value if isinstance(value, list) else [value]:
            if isinstance(x, int | float) and not low <= x <= high:     # nan fails as well
                parser.error(f"--{key.replace('_', '-')} {x}: not from {low} to {high:g}")
    if max(args.teacher_epochs or 1, args.distill_epochs or 1) > args.epochs:
        parser.error("--teacher-epochs and --distill-epochs: at most --epochs")
    if args.device == "cuda":       # under torchrun each process has a GPU of its own
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if args.device not in devices:
        parser.error(f"--device {args.device}: here are {', '.join(devices)}, one per process")
    args.rank, args.world, args.device_type = rank, world, args.device.split(":")[0]
    args.place = args.out.expanduser() / args.dataset / args.recipe
    args.start = args.side = None
    args.score = "mIoU" if args.dataset in ("scenes", "voc") else "accuracy"
    if args.device_type == "cuda":
        torch.cuda.set_device(args.device)
        torch.backends.cudnn.benchmark = True       # faster; a restart may choose other kernels
    if args.bf16 is None:
        args.bf16 = args.device_type == "cuda" and torch.cuda.is_bf16_supported(False)
    if world > 1:
        distributed.init_process_group(None if args.device_type == "cuda" else "gloo")
    return args


def build(name, seed, loader, args, start=None) -> nn.Module:
    """The network as the seed makes it; from `start`, a file, it has all the weights that fit."""
    torch.manual_seed(seed)
    network = create_model(name, loader.num_classes, pixels=loader.pixels)
    if start:
        args.start = load_weights(network, start, loader.settings, start=True)["hash"]
    return network.to(args.device, memory_format=torch.channels_last)


@torch.no_grad()
def evaluate(model, loader, args) -> float:
    """Accuracy in per cent, in eval mode; where pixels have classes, the mean IoU."""
    model.eval()
    with torch.autocast(args.device_type, torch.bfloat16, enabled=args.bf16):
        return loader.score(sum(loader.confusion(model(x), labels) for x, labels in loader))


def as_cuda_graph(step, args):
    """The step, recorded once and replayed: its 400 kernels no longer wait for Python."""
    graph, side, warm, held = torch.cuda.CUDAGraph(), torch.cuda.Stream(), [], []
    args.side = None if args.compile else side

    def replay(images, labels):
        if len(labels) < args.batch_size or len(warm) < 4:      # warm-up, or an odd last batch
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                warm.append(step(images, labels))
            torch.cuda.current_stream().wait_stream(side)
            return warm[-1]
        if not held:
            held.extend([images.clone(), labels.clone()])
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                held.append(step(*held))
        held[0].copy_(images)
        held[1].copy_(labels)
        graph.replay()
        return held[2]
    return replay


def both(student, teacher, images, args, **taps) -> tuple:
    """Both outputs, the teacher's without gradient; recorded, the passes run at the same time."""
    if args.side is None:
        own = student(images, **taps)
        with torch.no_grad():
            return own, teacher(images, **taps)
    main = torch.cuda.current_stream()
    args.side.wait_stream(main)
    own = student(images, **taps)
    with torch.no_grad(), torch.cuda.stream(args.side):
        wanted = teacher(images, **taps)
    main.wait_stream(args.side)
    return own, wanted


def read_run(folder) -> dict:
    """What a run keeps in last.pt; {} where there is none."""
    path = folder / "last.pt"
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}
        if kept and kept["log"][0].get("common", COMMON) != COMMON:
            print(f"WARNING: {path} is of another text of common.py: has its network changed?")
        return kept and {"log": kept["log"], "whole": kept["whole"], **kept}    # or a KeyError
    except Exception as error:      # each kind of damage, or other file, fails in its own way
        raise UserError(f"{path} is damaged or not a run's: remove it ({error})") from None


def write_run(folder, model, optimizer, log, loader, args):
    """last.pt, written aside and renamed: a kill leaves the old one whole."""
    network = getattr(model, "student", model)      # without the connectors of FSP, the overhaul
    if args.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        file = io.BytesIO()     # a disk that is full ends torch.save(path) in a traceback
        torch.save({"model": network.state_dict(), "whole": model.state_dict(), "log": log,
                    "optimizer": optimizer.state_dict(), "script": SOURCE, "network": network.name,
                    "class_names": loader.class_names, "mean": loader.mean, "std": loader.std,
                    "image_size": loader.size}, file)
        (folder / "last.tmp").write_bytes(file.getvalue())
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
        (folder / "last.tmp").replace(folder / "last.pt")


def train(model, teacher, loaders, args, run, seed, until=None) -> list[dict]:
    """Minimise the sum of losses() by SGD, from the run's last epoch to `until`; the run's log."""
    folder = args.place / run / f"seed{seed}"
    deciding = ["bf16", "start", *TRAINING]     # what must be equal for a run to go on
    if not args.baseline:
        args.script = hashlib.sha256(SOURCE.encode()).hexdigest()[:8]
        deciding = [*deciding, *RECIPES[args.recipe], "distill_epochs", "teacher_hash", "script"]
    settings = loaders[0].settings | {key: getattr(args, key) for key in deciding}
    optimizer = torch.optim.SGD(model.parameters(), args.lr, args.momentum,
                                nesterov=args.nesterov and args.momentum > 0,
                                weight_decay=args.weight_decay, fused=args.device_type == "cuda")
    kept = read_run(folder)
    settings["optimizer"] = type(optimizer).__name__
    first = {"settings": settings, "command": sys.argv, "versions": [], "common": COMMON}
    log = kept.get("log", [first])
    old = {"optimizer": "SGD"} | log[0]["settings"]
    for key in old | settings:
        if old.get(key) != settings.get(key):
            raise UserError(f"{folder} was begun with another {key} ({str(old.get(key))[:60]}, now "
                            f"{str(settings.get(key))[:60]}): use its command, or another --out")
    versions = f"torch {torch.__version__}, {args.world} x {args.device}"
    log[0]["versions"] += [versions] if versions not in log[0]["versions"] else []
    if kept:
        model.load_state_dict(kept["whole"])
        optimizer.load_state_dict(kept["optimizer"])
        if len(log) > args.epochs and until is None:
            print(f"{folder} is finished: no epoch is left to train")
    else:       # the settings are on the disk before the first epoch
        write_run(folder, model, optimizer, log, loaders[0], args)
    compiled = torch.compile(losses) if args.compile else losses
    student = nn.parallel.DistributedDataParallel(model) if args.world > 1 else model
    names = []

    def step(images, labels):
        """One step of SGD; the values of the terms, and the accuracy in per cent."""
        optimizer.zero_grad()
        with torch.autocast(args.device_type, torch.bfloat16, enabled=args.bf16):
            logits, terms = compiled(student, teacher, images, labels, args)
        sum(terms.values()).backward()
        optimizer.step()
        names[:] = [*terms, "train"]        # for the log: a graph returns numbers alone
        right = (logits.argmax(1) == labels).sum() / (labels >= 0).sum()       # -100: no label
        return torch.stack([*terms.values(), 100 * right]).detach()

    last, lr = until or args.epochs, None
    for epoch in range(len(log), last + 1):     # the log begins with its header
        start, sums, seen = time.perf_counter(), 0, 0
        torch.manual_seed((seed * 1_000_003 + epoch) * args.world + args.rank)      # for dropout
        loaders[0].set_epoch(epoch, seed)
        drops = sum(epoch > max(1, round(part * args.epochs)) for part in args.milestones)
        if lr != args.lr * args.lr_decay ** drops:
            lr = optimizer.param_groups[0]["lr"] = args.lr * args.lr_decay ** drops
            graphed = args.graph and args.device_type == "cuda" and args.world == 1
            update = as_cuda_graph(step, args) if graphed else step     # the graph holds the rate
        student.train()
        for index, (images, labels) in enumerate(loaders[0], 1):
            sums = sums + len(labels) * update(images, labels)
            seen += len(labels)
            if index % 50 == 0 and sys.stdout.isatty():
                print(f"epoch {epoch}: step {index} of {len(loaders[0])}", end="\r", flush=True)
        if args.world > 1:      # everybody's sums, and the first one's BatchNorm statistics
            distributed.all_reduce(sums)
            for buffer in model.buffers():
                distributed.broadcast(buffer, 0)
        means = dict(zip(names, (sums / (seen * args.world)).tolist()))
        if not math.isfinite(sum(means.values())):
            raise UserError(f"epoch {epoch}: {means} is not finite: lower its rate or weight")
        speed = seen * args.world / (time.perf_counter() - start)       # without the evaluation
        log.append({"epoch": epoch, **means, "lr": lr, "test": evaluate(model, loaders[1], args),
                    "images/s": speed, "seconds": time.perf_counter() - start})
        print("  ".join(f"{key} {value:<6.5g}" for key, value in log[-1].items()),
              f" {(last - epoch) * log[-1]['seconds'] / 60:.1f} min left", flush=True)
        write_run(folder, model, optimizer, log, loaders[0], args)
    if args.world > 1:      # the others may read what the first one wrote
        distributed.barrier()
    return log


def get_teacher(loaders, args) -> nn.Module:
    """The frozen teacher: --teacher-ckpt, or the baseline of its network, trained where absent."""
    teacher = build(args.teacher, 0, loaders[0], args)
    run = f"baseline/{args.teacher}" + (f"-{args.teacher_epochs}" if args.teacher_epochs else "")
    path = (args.teacher_ckpt or args.place / run / "seed0/last.pt").expanduser()
    log = [] if args.teacher_ckpt else read_run(path.parent).get("log", [])
    finished = log and len(log) > (args.teacher_epochs or log[0]["settings"]["epochs"])
    if not args.teacher_ckpt and not finished:
        # by the recipe; of the typed flags only --epochs and what the loader takes are for both
        typed = {key: getattr(args, key) for key in ("epochs", "batch_size", "augment", "reflect")}
        plain = vars(args) | RECIPES[args.recipe] | typed | {"baseline": True}
        train(teacher, None, loaders, argparse.Namespace(**plain), run, 0, args.teacher_epochs)
    kept = load_weights(teacher, path, loaders[0].settings)
    log = kept["log"] if {"script", "log"} <= kept.keys() else []
    teacher.eval().requires_grad_(False)
    args.teacher_path, args.teacher_hash = path, kept["hash"]
    args.teacher_accuracy = evaluate(teacher, loaders[1], args)
    past = f"{path}, on pictures normalised by this data set's mean and std"
    if log:
        settings = log[0]["settings"]
        past = f"{len(log) - 1} of {settings['epochs']} epochs on {settings['images'][0]} images"
    past += "; NO BETTER THAN CHANCE" * (args.teacher_accuracy <= 120 / loaders[0].num_classes)
    print(f"teacher {args.teacher}: {loaders[1].settings['split']} {args.score} "
          f"{args.teacher_accuracy:.2f} %, {past}")
    return teacher


def report(logs, run, args):
    """The last lines; the gain over baselines of equal training, in --out or beside the teacher."""
    tests, gains = [log[-1]["test"] for log in logs], {}
    spread = f" ± {stdev(tests):.2f}" if len(tests) > 1 else ""
    print(f"{run}: {logs[0][0]['settings']['split']} {args.score} {mean(tests):.2f}{spread} %, "
          f"files in {args.place / run}")
    if not args.baseline:
        for seed, log in enumerate(logs, args.seed):
            for folder in (args.teacher_path.parent.parent.parent, args.place / "baseline"):
                base = read_run(folder / args.student / f"seed{seed}").get("log", [{}])
                old = {"start": None, "optimizer": "SGD"} | base[0].get("settings", {})
                if len(base) == len(log) and log[0]["settings"] | old == log[0]["settings"]:
                    gains[seed] = log[-1]["test"] - base[-1]["test"]
        gain = f"{mean(gains.values()):+.2f}" if len(gains) == len(logs) else (
            f"run: python {shlex.join(sys.argv)} --baseline")
        print(f"teacher {args.teacher} {args.teacher_accuracy:.2f} %, gain over baseline: {gain}")
    if args.world > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")        # whatever the terminal's characters
    try:
        main()
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        if int(os.environ.get("RANK", 0)) > 0:      # the first process says it, and ends this one
            time.sleep(10)
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit("stopped: finished epochs are kept, and the same command goes on from there")
# --- end shared ---
