"""Spherical knowledge distillation (SKD): logits are compared after both have the same length.

An Energy Perspective in Knowledge Distillation, anonymous, under review: the equations, theorems
and tables named here. Guo et al.: Reducing the Teacher-Student Gap via Spherical Knowledge
Distillation, 2020, arxiv.org/abs/2010.07485: the method, with a scale; its code is public.

A larger teacher is surer of itself: its logits are longer, its entropy lower, and a student that
wastes its capacity on that length learns worse from a better teacher. SKD puts the logits of both
networks on one sphere: what is left to match is their direction, which class resembles which.

    G_entropy = S(p) - S(q),  G_f = F(v) - F(z)   of raw logits: entropy, free energy   Eq. 6, 10
    both grow with ||v||^2 - ||z||^2, for centred logits (Theorems 1, its constant halved, and 2)
    z^ = z / ||z||,   v^ = v / ||v||                          the alignment layer        Eq. 15
    p = softmax(z^ / tau),   q = softmax(v^ / tau)
    L_SKD = -sum_i q_i log p_i,   L = lambda L_SKD + (1 - lambda) L_cls                  Eq. 16

    symbol   here              shape          symbol   here             value on CIFAR-100
    z        student_logits    (N, K)         tau      temperature      4
    v        teacher_logits    (N, K)         lambda   kd_weight        0.9
    z^, v^   spherical()       (N, K)         -        scale            2 (departure 1)

Run:
    python skd.py --dataset shapes                   3 to 11 min with teacher: 76.4 % (5 seeds)
    python skd.py --teacher wrn16_3 --student wrn16_1        CIFAR-10, a GPU: 84.2 % (3 seeds)
    python tests/tools/reproduce.py skd-7                    Table 7; -1 to -6 as well

Departures from the paper and from the authors' code:
 1. Eq. 15 has no scale. Unit length, --scale literal, makes both softmaxes at tau = 4 almost
    uniform, and next to nothing is transferred. The code has two forms. That of its README, the
    default here: both logits centred, divided by their standard deviation and times a multiplier
    (2 for its ImageNet teacher; where a teacher's logits have a std of 5, 2 flattens its targets).
    That of its training script, --scale teacher: the teacher's logits as they are, each student
    vector brought to the teacher's std for the same image. Both with the factor tau^2, which
    literal has not; all with KL for L_SKD, which differs from it by the teacher's entropy alone.
 2. L_cls is cross-entropy on the student's aligned logits, as the code has it and its author says
    is needed. The paper does not say on which: with --scale literal it is on the raw ones.
    --scale none leaves the logits as they are: this is kd.py to the bit.
 3. Recipe cifar100-crd is that of CRD's tables, source of the paper's other rows (MobileNetV2 and
    ShuffleNets: --lr 0.01); batch size and weight decay are named for ImageNet alone: imagenet-guo.
    The paper says nesterov, the code does not; lambda falls with the epochs in the code alone.
 4. Recipes cifar10-jeon and shapes are kd.py's. By both SKD ends below KD (by the first, after 200
    epochs, within chance); on shapes it is aligning the student that costs. There --scale teacher
    is worse: the gradient of z / ||z|| goes with 1 / ||z||, and a fresh student's short logits are
    driven to five times the teacher's length in an epoch; with 2 they are not: tests/reference.
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

# Milestones are fractions of --epochs: the schedule keeps its shape when the run gets shorter.
JEON = dict(batch_size=128, lr=0.1, momentum=0.9, nesterov=False, weight_decay=1e-4, lr_decay=0.2,
            augment=False, reflect=False, temperature=4.0, kd_weight=0.9, scale=2.0)
CRD = dict(JEON, epochs=240, batch_size=64, lr=0.05, weight_decay=5e-4, lr_decay=0.1, augment=True,
           milestones=[150 / 240, 180 / 240, 210 / 240])
RECIPES = {
    "cifar10-jeon": dict(JEON, epochs=200, milestones=[40 / 200, 80 / 200, 120 / 200, 160 / 200]),
    "cifar100-crd": CRD,        # the paper's Section 3, with Tian et al. 2020 (CRD)
    "imagenet-guo": dict(CRD, epochs=100, batch_size=256, lr=0.1, nesterov=True, weight_decay=1e-4,
                         milestones=[30 / 100, 60 / 100, 80 / 100, 90 / 100]),
    "shapes": dict(JEON, epochs=15, batch_size=32, lr=0.05, weight_decay=5e-4, augment=True,
                   milestones=[0.6, 0.8, 0.95]),
}


def length(text: str) -> float | str:
    """What --scale may be: a number, or one of three words."""
    return text if text in ("teacher", "literal", "none") else float(text)


METHOD_FLAGS = {
    "temperature": dict(help="tau"), "kd_weight": dict(help="lambda, weight of L_SKD"),
    "scale": dict(type=length, help="std of the aligned logits; or teacher (each image's own), "
                                    "literal (length 1), none (KD)")}


def spherical(logits: Tensor, scale: float = 1.0, center: bool = False) -> Tensor:
    """Eq. 15 times a length: scale z / ||z||_2; logits (N, K) -> (N, K), in units of a logit.

    center: z minus its mean first. A length below 1e-3, of logits that say nothing, counts as 1e-3.
    """
    logits = to_float32(logits)
    if center:
        logits = logits - logits.mean(dim=1, keepdim=True)
    return scale * F.normalize(logits, dim=1, eps=1e-3)


def as_teacher(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The training script's form of Eq. 15: z / std(z) * std(v), image by image; (N, K).

    std is unbiased, over the classes. The student's carries gradient, the teacher's none.
    """
    z, v = to_float32(student_logits), to_float32(teacher_logits.detach())
    deviation = z.std(dim=1, keepdim=True).clamp(min=1e-3)
    return z / deviation * v.std(dim=1, keepdim=True)


# --- shared: kd loss ---
def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Hinton et al. 2015, Section 2: L_K = tau^2 KL(softmax(v / tau) || softmax(z / tau)).

    student_logits z and teacher_logits v, both (N, K) or (N, K, H, W) -> a scalar, in tau^2 nats.
    Summed over the K classes, averaged over the batch and pixels; the teacher gets no gradient.
    """
    log_p = F.log_softmax(to_float32(student_logits) / temperature, dim=1)
    log_q = F.log_softmax(to_float32(teacher_logits.detach()) / temperature, dim=1)
    kl = F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    return temperature ** 2 * (kl / log_p[:, 0].numel())
# --- end shared ---


def skd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float,
             scale: float | str, center: bool = False) -> Tensor:
    """Eq. 16 with the factor tau^2: tau^2 KL(softmax(v^ / tau) || softmax(z^ / tau)), a scalar.

    Raw logits z and v, both (N, K), are brought to the length `scale` (--scale times sqrt(K), or 1
    for literal), or with "teacher" each z to the std of its v. In tau^2 nats, summed over the K
    classes, averaged over the batch; the teacher gets no gradient.
    """
    if scale == "teacher":
        return kd_loss(as_teacher(student_logits, teacher_logits), teacher_logits, temperature)
    return kd_loss(spherical(student_logits, scale, center),
                   spherical(teacher_logits, scale, center), temperature)


def losses(student, teacher, images, labels, args) -> tuple[Tensor, dict[str, Tensor]]:
    """The student's logits, and the weighted terms of Eq. 16; without a teacher, of CE alone."""
    if teacher is None:
        z = student(images)
        return z, {"ce": F.cross_entropy(to_float32(z), labels)}
    z, v = both(student, teacher, images, args)
    tau = args.temperature
    aligned = to_float32(z)     # what the labels act on
    if args.scale == "none":
        skd = kd_loss(z, v, tau)
    elif args.scale == "literal":
        skd = skd_loss(z, v, tau, 1.0) / tau ** 2
    elif args.scale == "teacher":
        aligned = as_teacher(z, v)
        skd = skd_loss(z, v, tau, "teacher")
    else:
        norm = args.scale * math.sqrt(z.shape[1])
        aligned = spherical(z, norm, center=True)
        skd = skd_loss(z, v, tau, norm, center=True)
    ce = F.cross_entropy(aligned, labels)
    return z, {"ce": (1 - args.kd_weight) * ce, "skd": args.kd_weight * skd}


def main() -> None:
    args = parse_args()
    if not args.baseline:
        check_pair(args.teacher, args.student, args.image_size)
    loaders = load_data(args.dataset, args.data_dir, args.batch_size, args.device, seed=args.seed,
                        augment=args.augment, reflect=args.reflect, image_size=args.image_size,
                        train_images=args.train_images, split=args.split, workers=args.workers)
    teacher, run = None, f"baseline/{args.student}"
    if not args.baseline:
        teacher = get_teacher(loaders, args)
        run = f"{Path(__file__).stem}/{args.teacher}-{args.student}"
    logs = []
    for seed in range(args.seed, args.seed + args.runs):
        student = build(args.student, seed, loaders[0], args, args.student_ckpt)
        log = train(student, teacher, loaders, args, run, seed, until=args.distill_epochs)
        if args.distill_epochs:
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
