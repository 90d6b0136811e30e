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
    F1, F2   first, second     (N, m|n, h, w)     lambda_i   fsp_lambda    see departure 2
    G        fsp_matrix()      (N, m, n)          N          batch_size    128

Run:
    T=runs/shapes/shapes/baseline/wrn16_3/seed0/last.pt  the teacher of kd.py --dataset shapes
    python fsp.py --dataset shapes --epochs 11 --teacher-ckpt $T     4 + 11 epochs: 81.2 % (5 seeds)
    python fsp.py --teacher resnet26 --student resnet8   CIFAR-10, 54 + 164 epochs, a GPU
    python tests/tools/reproduce.py fsp-1                Table 1, CIFAR-100: three students in a
                                                         third of the iterations, their ensemble

Departures from the papers and from known code:
 1. The paper's networks have equal widths. Where teacher's and student's differ, a 1x1 convolution
    brings each of the student's maps to the teacher's width; the script says so in a line. It is
    trained in stage 1 and dropped before stage 2, with its share of what was learnt.
 2. Eq. 2 sums over a matrix's entries; known code (RepDistiller, KD-Zoo) averages. Of lambda_i the
    papers say only that all are equal. A sum of fourth powers of features can have any size: with 1
    a WRN16-1 diverges at once. So lambda_i is --fsp-weight divided by the teacher's own
    sum_i ||G_i^T||^2, a mean over one batch, and the term is an error relative to the teacher.
 3. "Three sections" is all that Liu's text says of layers. F1 is the output of a section's first
    block here, F2 of its last. A section of one block has no other first map than the one inside
    the block (ResNet, WRN) or what enters it (VGG). A larger F1 is max-pooled to F2's size, as in
    the paper. Unlike there, teacher and student may differ in size: the shape of G is the same.
 4. Recipes: at a batch size of 128, which is ours, 64,000, 32,000 and 21,000 iterations are 164, 82
    and 54 epochs. The flip beside the crop is ours. Stage 1's 32,000 are Table 1's 95k - 63k, with
    the milestones stretched. CIFAR-10's were 21,000; with a star: cifar100-third, --fsp-epochs 54.
 5. Every student has a stage 1 of its own unless --shared-stage1, as in Table 1. The classifier is
    copied untrained; BatchNorm statistics follow stage 1. A teacher's classifier is not used: one
    trained for another task will do, with a classifier of this task's size (tests/reference).
 6. On shapes 4 + 11 epochs show the student as many images as the other scripts' 15 do. Recipe
    cifar10-jeon has the other scripts' training, with a quarter as many epochs for stage 1.
"""
import argparse
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

# Milestones are fractions of the epochs: the schedule keeps its shape when the run gets shorter.
YIM = dict(batch_size=128, lr=0.1, momentum=0.9, nesterov=False, weight_decay=1e-4, lr_decay=0.1,
           augment=True, reflect=False, fsp_lr=1e-3, fsp_milestones=[11 / 21, 16 / 21],
           fsp_weight=100.0, shared_stage1=False)
RECIPES = {
    # Yim et al. 2017, Section 4; third: the rows of Table 1 with a star
    "cifar10-yim": dict(YIM, epochs=164, milestones=[32 / 64, 48 / 64], fsp_epochs=54),
    "cifar100-yim": dict(YIM, epochs=164, milestones=[32 / 64, 48 / 64], fsp_epochs=82),
    "cifar100-third": dict(YIM, epochs=54, milestones=[11 / 21, 16 / 21], fsp_epochs=82,
                           shared_stage1=True),
    # the other scripts', to share teachers and baselines; of CRD's stage 1 only its 30 epochs
    "cifar100-crd": dict(YIM, epochs=240, batch_size=64, lr=0.05, weight_decay=5e-4, fsp_epochs=30,
                         milestones=[150 / 240, 180 / 240, 210 / 240]),
    "cifar10-jeon": dict(YIM, epochs=200, milestones=[40 / 200, 80 / 200, 120 / 200, 160 / 200],
                         lr_decay=0.2, augment=False, fsp_epochs=50),
    "shapes": dict(YIM, epochs=15, batch_size=32, lr=0.05, weight_decay=5e-4, lr_decay=0.2,
                   milestones=[0.6, 0.8, 0.95], fsp_epochs=4),
}
METHOD_FLAGS = {
    "fsp_epochs": dict(help="of stage 1; --epochs are stage 2's"),
    "fsp_lr": dict(help="learning rate of stage 1 at its start"),
    "fsp_milestones": dict(help="fractions of --fsp-epochs"),
    "fsp_weight": dict(help="lambda_i times the teacher's sum of squares (departure 2)"),
    "shared_stage1": dict(help="one stage 1, seed 0's, for all --runs")}


def fsp_matrix(first: Tensor, second: Tensor) -> Tensor:
    """Eq. 1: first F1, (N, m, h, w), second F2, (N, n, h, w) -> G, (N, m, n): a mean over pixels.

    A larger F1 or F2 is max-pooled to the size of the smaller.
    """
    if first.shape[-2:] != second.shape[-2:]:
        size = min(first.shape[-2:], second.shape[-2:])
        first, second = (F.adaptive_max_pool2d(x, size) for x in (first, second))
    first, second = to_float32(first).flatten(2), to_float32(second).flatten(2)
    with torch.autocast(first.device.type, enabled=False):      # a sum over many pixels
        return first @ second.mT / first.shape[2]


def fsp_loss(student_pairs: list[tuple], teacher_pairs: list[tuple]) -> Tensor:
    """Eq. 2 without lambda_i: L_FSP, a scalar in the units of a feature to the fourth power.

    Lists of (first, second), one pair of maps per section. SUM over the entries of each matrix and
    over the pairs, mean over the batch; the teacher gets no gradient. ValueError where the numbers
    of pairs differ, or the widths: then it says to connect the maps.
    """
    loss = 0
    for of_student, of_teacher in zip(student_pairs, teacher_pairs, strict=True):
        student, teacher = fsp_matrix(*of_student), fsp_matrix(*of_teacher).detach()
        if student.shape != teacher.shape:
            raise ValueError(f"FSP matrices of {tuple(student.shape[1:])} and "
                             f"{tuple(teacher.shape[1:])} channels: connect the student's maps")
        loss = loss + (student - teacher).square().sum() / len(student)
    return loss


class Connected(nn.Module):
    """The student of stage 1: 1x1 convolutions bring its maps to the teacher's widths."""
    def __init__(self, student: nn.Module, student_widths: list[int], teacher_widths: list[int]):
        super().__init__()
        self.student, self.connectors = student, nn.ModuleList()
        for width, wanted in zip(student_widths, teacher_widths):
            same = width == wanted
            r = nn.Identity() if same else nn.Conv2d(width, wanted, 1, bias=False)
            self.connectors.append(r)

    def forward(self, images: Tensor, taps: bool = False):
        seen = self.student(images, taps=taps)
        if not taps:
            return seen
        maps = [r(x) for r, x in zip(self.connectors, [*seen.entries, *seen.stages], strict=True)]
        count = len(seen.stages)
        return seen._replace(entries=maps[:count], stages=maps[count:])


def losses(student, teacher, images, labels, args) -> tuple[Tensor, dict[str, Tensor]]:
    """The student's logits, and the weighted L_FSP of stage 1; without a teacher, CE of stage 2."""
    if teacher is None:
        z = student(images)
        return z, {"ce": F.cross_entropy(to_float32(z), labels)}
    of_student, of_teacher = both(student, teacher, images, args, taps=True)
    fsp = fsp_loss(list(zip(of_student.entries, of_student.stages)),
                   list(zip(of_teacher.entries, of_teacher.stages)))
    return of_student.logits, {"fsp": args.fsp_lambda * fsp}


@torch.no_grad()
def lambda_of(teacher: nn.Module, loader, seed: int, args: argparse.Namespace) -> float:
    """lambda_i of Eq. 2, equal for all pairs: departure 2, measured on one batch."""
    loader.set_epoch(0, seed)
    taps = teacher(next(iter(loader))[0], taps=True)
    squares = [fsp_matrix(*pair).square().sum() for pair in zip(taps.entries, taps.stages)]
    size = torch.stack(squares).sum() / len(taps.logits)
    if args.world > 1:
        distributed.all_reduce(size)
    return args.fsp_weight * args.world / max(size.item(), 1e-9)


def freeze_unused(model: nn.Module, teacher: nn.Module, size: int, args: argparse.Namespace):
    """No gradient for what L_FSP does not depend on: several processes would wait for it."""
    blank = torch.zeros(2, 3, size, size, device=args.device)
    _, terms = losses(model.eval(), teacher, blank, None, args)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(terms["fsp"], parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients):
        parameter.requires_grad_(gradient is not None)


def first_stage(student, teacher, widths, loaders, args, run, seed):
    """Stage 1: give the student the teacher's FSP matrices; its classifier stays untrained."""
    stage1 = argparse.Namespace(**vars(args) | dict(epochs=args.fsp_epochs, lr=args.fsp_lr,
                                                    milestones=args.fsp_milestones))
    model = student
    if widths[0] != widths[1]:      # departure 1
        print(f"1x1 connectors on the student's maps in stage 1: {widths[1]} -> {widths[0]}")
        model = Connected(student, widths[1], widths[0])
        model.to(args.device, memory_format=torch.channels_last)
    stage1.fsp_lambda = lambda_of(teacher, loaders[0], seed, args)
    freeze_unused(model, teacher, loaders[0].size, stage1)
    train(model, teacher, loaders, stage1, f"{run}/stage1", seed)
    student.requires_grad_(True)


def main() -> None:
    args = parse_args()
    if args.distill_epochs:
        raise UserError("--distill-epochs has no use here: --fsp-epochs are stage 1's")
    if not args.baseline:
        shapes = check_pair(args.teacher, args.student, args.image_size, ["entries", "stages"])
        widths = [[x.shape[1] for x in (*taps.entries, *taps.stages)] for taps in shapes]
    loaders = load_data(args.dataset, args.data_dir, args.batch_size, args.device, seed=args.seed,
                        augment=args.augment, reflect=args.reflect, image_size=args.image_size,
                        train_images=args.train_images, split=args.split, workers=args.workers)
    teacher, run = None, f"baseline/{args.student}"
    if not args.baseline:
        teacher = get_teacher(loaders, args)
        run = f"{Path(__file__).stem}/{args.teacher}-{args.student}"
    logs = []
    for seed in range(args.seed, args.seed + args.runs):
        first = 0 if args.shared_stage1 and not args.baseline else seed
        student = build(args.student, first, loaders[0], args, args.student_ckpt)
        if teacher is not None:
            first_stage(student, teacher, widths, loaders, args, run, first)
        logs.append(train(student, None, loaders, args, run, seed))
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
