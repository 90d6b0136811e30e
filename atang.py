"""Angular margin based attention distillation (ATang), and AMD, its journal version.

Jeon, Cho, Park: Deep Hypersphere Feature Embedding-based Knowledge Distillation, 2021 (ATang)
Jeon et al.: Leveraging Angular Distributions ..., 2023, arxiv.org/abs/2302.14130 (AMD)

An attention map says where the evidence is. A margin on its values, read as cosines of angles,
drives object (positive) and background (negative) apart; the student learns the separated map.

    Q'_p = sum_c A_c^2 / ||sum_c A_c^2||_2, in [0, 1]     Q'_n = 1 - Q'_p      Section 3.2, 3.3
    theta_p = arccos(Q'_p)                                                     each pixel's angle
    G = log( e^(s cos(m theta_p)) / (e^(s cos(m theta_p)) + e^(s Q'_n)) )      Eq. 6
    d(X) = mean over N and H*W of (X_S / ||X_S||_2 - X_T / ||X_T||_2)^2        X: a map, of S or T
    L_A = alpha sum_j d(G), alpha = 1 / #pairs                                 Eq. 7
    L_A = alpha sum_j (d(G) + d(s cos(m theta_p)) + d(s Q'_n)) / 3             AMD; departure 5
    L = (1 - lambda) CE(softmax(z), y) + lambda L_K + gamma L_A, L_K as in kd.py         Eq. 8

    symbol   here              shape            symbol   here          value on CIFAR-10
    A        *_stages          (N, C, H, W)     m        margin        1.35
    Q'_p     q                 (N, H*W)         s        scale         64
    G        angular_map()     (N, H*W)         gamma    gamma         5000 (see departure 3)
    z, v     the paper's logits a_S, a_T        tau, lambda            4, 0.9

Run:
    python atang.py --dataset shapes                 3 to 11 min with teacher: 87.5 % (5 seeds)
    python atang.py --teacher wrn16_3 --student wrn16_1      CIFAR-10, a GPU: 84.8 % (3 seeds)
    python tests/tools/reproduce.py atang-2                  Table 2; -3 to -5, -gamma, -margin

Departures from the papers and from the first author's code:
 1. Eq. 7 is a squared Frobenius norm; the code, done here, takes the MEAN over batch and pixels.
    gamma = 5000 belongs to the mean: on the sum it would be 64 to 1024 times too strong.
 2. Eq. 5 and 6 write s cos(theta_n) for the negative feature: it is s (1 - Q'_p), without a margin.
    The margin is on student and teacher; at m = 1 cos undoes arccos. s = 64 is the code's alone.
 3. Section 4.2: gamma 5000 for student WRN16-3, 1000 for WRN28-3, a student nowhere. Section 4.4.1:
    WRN16-1 is best at 5000, the default; WRN16-3 from WRN28-3 at --gamma 1000 (89.3; 5000: 88.83).
 4. Batch size, CIFAR-10's weight decay, no crop and flip: departure 2 in kd.py. Section 3.1 adopts
    early-stopped KD, naming no epoch: here only by --teacher-epochs and --distill-epochs.
 5. AMD's L_A is the code's; the journal's text we have not seen: gamma and margin are ATang's.
    amd-local, 0.8 of that and 0.2 of its quadrants' mean, is what its code means to do; it crashes.
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
            augment=False, reflect=False, temperature=4.0, kd_weight=0.9, loss="atang",
            margin=1.35, scale=64.0, gamma=5000.0)
RECIPES = {
    # Jeon et al. 2021, Sections 4.1 and 4.2
    "cifar10-jeon": dict(JEON, epochs=200, milestones=[40 / 200, 80 / 200, 120 / 200, 160 / 200]),
    "cinic10-jeon": dict(JEON, epochs=180, milestones=[40 / 180, 80 / 180, 120 / 180, 160 / 180],
                         temperature=16.0, kd_weight=0.6, gamma=500.0),
    "shapes": dict(JEON, epochs=15, batch_size=32, lr=0.05, weight_decay=5e-4, augment=True,
                   milestones=[0.6, 0.8, 0.95], gamma=1000.0),      # ours, on the validation split
}
METHOD_FLAGS = {
    "temperature": dict(help="tau"), "kd_weight": dict(help="lambda, weight of L_K"),
    "loss": dict(choices=["atang", "amd", "amd-local"], help="L_A: Eq. 7, or the journal's"),
    "margin": dict(help="m, from 1 (none) to 2; L_A falls sixfold on the way, so that a sweep of m "
                        "at one gamma sweeps the weight too"),
    "scale": dict(help="s: from 5 on Eq. 7's norm cancels it, so a sweep shows nothing; far below, "
                       "L_A vanishes with s"),
    "gamma": dict(help="weight of L_A")}


def attention_map(feature: Tensor) -> Tensor:
    """Section 3.2: Q' = sum_c A_c^2, divided by its L2 norm over the pixels plus 1e-6.

    feature A, (N, C, H, W) of any C -> (N, H*W), in [0, 1]; a map of zeros stays zero.
    """
    q = to_float32(feature).square().sum(dim=1).flatten(1)
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

    student_logits z and teacher_logits v, both (N, K) or (N, K, H, W) -> a scalar, in tau^2 nats.
    Summed over the K classes, averaged over the batch and pixels; the teacher gets no gradient.
    """
    log_p = F.log_softmax(to_float32(student_logits) / temperature, dim=1)
    log_q = F.log_softmax(to_float32(teacher_logits.detach()) / temperature, dim=1)
    kl = F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    return temperature ** 2 * (kl / log_p[:, 0].numel())
# --- end shared ---


def losses(student, teacher, images, labels, args) -> tuple[Tensor, dict[str, Tensor]]:
    """The student's logits, and the weighted terms of Eq. 8; without a teacher, of CE alone."""
    if teacher is None:
        z = student(images)
        return z, {"ce": F.cross_entropy(to_float32(z), labels)}
    of_student, of_teacher = both(student, teacher, images, args, taps=True)
    z, v = of_student.logits, of_teacher.logits
    ce = F.cross_entropy(to_float32(z), labels)
    kd = kd_loss(z, v, args.temperature)
    maps = of_student.stages, of_teacher.stages
    if args.loss == "atang":
        angular = atang_loss(*maps, args.margin, args.scale)
    else:
        angular = amd_loss(*maps, args.margin, args.scale, local=args.loss == "amd-local")
    return z, {"ce": (1 - args.kd_weight) * ce, "kd": args.kd_weight * kd,
               args.loss: args.gamma * angular}


def main() -> None:
    args = parse_args()
    if not args.baseline:
        check_pair(args.teacher, args.student, args.image_size, maps=["stages"], sizes=True)
    loaders = load_data(args.dataset, args.data_dir, args.batch_size, args.device, seed=args.seed,
                        augment=args.augment, reflect=args.reflect, image_size=args.image_size,
                        train_images=args.train_images, split=args.split, workers=args.workers)
    teacher, run = None, f"baseline/{args.student}"
    if not args.baseline:
        teacher = get_teacher(loaders, args)
        loss = args.loss.removeprefix("atang")      # other losses have folders of their own
        run = f"{Path(__file__).stem}{'-' * bool(loss)}{loss}/{args.teacher}-{args.student}"
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
