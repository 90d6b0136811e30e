"""Pictures of finished runs and of data sets, and how much of a network's maps lies on the object.

    python tests/look.py maps RUN [RUN ...] [--count 4] [--images 3 17] [--wrong-only]
                                    where teacher and students look: Grad-CAM at three depths
    python tests/look.py energy RUN [RUN ...]          shapes: the part of the Grad-CAM and of the
                                    attention maps that lies on the object, a Markdown table
    python tests/look.py curves RUN [RUN ...]          accuracy and loss terms over the epochs
    python tests/look.py sweep atang-margin --dataset shapes --teacher wrn16_3 --student wrn16_1
                                    a table of reproduce.py, with its flags, over what it varies
    python tests/look.py scatter RUN [RUN ...]         distillation loss and accuracy, a point a run
    python tests/look.py data --dataset folder --data-dir mydata       the classes, and augmented

RUN is a folder runs/<data set>/<method>/<networks>/seed<k>, or the one above it for all its seeds
(maps: the lowest). Pictures are PNG; curves, sweep and scatter read logs alone.

Grad-CAM (Selvaraju et al. 2017) is taken at the maps that AT and ATang compare, `Taps.stages`: low
is the first group's, middle that of group #groups // 2 + 1, high the last's. In a wide residual
network these enter the next BatchNorm and ReLU, and may be negative. The class is the picture's
own, or with `--of answer` what the network says. The share in `energy` is of the map laid over the
picture as squares, unsmoothed; its deviation is over the seeds (n - 1), each seed's value the mean
over all images, whose own spread is not shown.
"""
import argparse
import io
import math
import re
import sys
from pathlib import Path
from statistics import correlation, mean, stdev
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import reproduce  # noqa: E402
from atang import attention_map  # noqa: E402
from common import (  # noqa: E402
    Decoder, ImageLoader, Split, UserError, balanced_order, limited, load_data, load_weights,
    new_model, one_line, read_log)

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator
except ImportError:     # `energy` does without it
    matplotlib = None

# Okabe and Ito's colours, which the colour-blind tell apart; grey for yellow, pale on white
COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#777777"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*", "<"]
LINES = ["-", "--", "-.", ":"]
DEPTHS = ["low", "middle", "high"]
NO_TERM = {"epoch", "lr", "train", "test", "images/s", "seconds"}
# the flag that a term was multiplied by
WEIGHTS = {"kd": "kd_weight", "skd": "kd_weight", "at": "beta", "atang": "gamma", "amd": "gamma",
           "amd-local": "gamma", "overhaul": "alpha", "fsp": "fsp_weight"}

# ================================================================================================
# Runs
# ================================================================================================


class Group(NamedTuple):
    """The runs of one argument: the seeds of one method."""
    label: str
    folders: list[Path]
    logs: list[list[dict]]


class Network(NamedTuple):
    label: str
    name: str                   # as create_model knows it
    checkpoints: list[Path]     # of the seeds


def seeds_of(path: Path) -> list[Path]:
    """The folder itself, or the runs right below it, by their seeds."""
    folders = [path] if (path / "log.jsonl").exists() else list(path.glob("seed*"))
    folders = [folder.resolve() for folder in folders if len(read_log(folder)) > 1]
    if not folders:
        raise UserError(f"{path} is no run: name a folder seed<k> with a log.jsonl of at least one "
                        f"epoch, or the one above it")
    return sorted(folders, key=lambda folder: int("0" + re.sub(r"\D", "", folder.name)))


def whole_log(folder: Path) -> list[dict]:
    """A run's log; with FSP's first stage, whose epochs come before."""
    header, *rows = read_log(folder)
    stage1 = folder.parents[1] / "stage1" / folder.parent.name
    first = stage1 / folder.name
    if header["settings"].get("shared_stage1"):
        first = min(stage1.glob("seed*"), default=first)
    return [header, *read_log(first)[1:], *rows]


def labels_of(folders: list[Path]) -> list[str]:
    """Each one's method, and the parts of its path that tell it from others of that method."""
    labels = []
    for folder in folders:
        parts = folder.parts[::-1]
        others = [other.parts[::-1] for other in folders if other.parts[-3] == parts[2]]
        telling = [part for part, *there in zip(parts, *others) if set(there) != {part}]
        labels.append(" ".join([parts[2], *telling[::-1]]))
    return labels


def groups_of(paths: list[Path], finished: bool = False) -> list[Group]:
    """The runs, of one data set and split, and `finished` where that is asked, or UserError."""
    folders = [seeds_of(path) for path in paths]
    logs = [[whole_log(folder) for folder in own] for own in folders]
    first = logs[0][0][0]["settings"]
    for folder, log in zip(sum(folders, []), sum(logs, [])):
        for key in ("data", "split", "image_size"):
            if (value := log[0]["settings"].get(key)) != first.get(key):
                raise UserError(f"{folder} has {key} {value}, the first run {first.get(key)}: look "
                                f"at them one by one")
        if finished and not reproduce.complete(folder):
            raise UserError(f"{folder} is not finished: run its command again")
    labels = labels_of([own[0] for own in folders])
    return [Group(*parts) for parts in zip(labels, folders, logs)]


def images_of(groups: list[Group], data_dir: Path | None) -> ImageLoader:
    """The images that the runs were measured on; of a folder that has moved, in data_dir."""
    settings = groups[0].logs[0][0]["settings"]
    if data_dir and settings["data"] not in ("cifar10", "cifar100", "cinic10", "shapes"):
        settings = settings | {"data": str(data_dir.resolve())}
    loader = reproduce.images_of(settings, data_dir or Path("data"))
    if len(loader.labels) != settings["images"][1]:
        raise UserError(f"{groups[0].folders[0]} was measured on {settings['images'][1]} images, "
                        f"its data set has {len(loader.labels)} now")
    return loader


def pixels_of(loader: ImageLoader, chosen: list[int]) -> Tensor:
    """(N, H, W, 3) uint8, decoded where they lie in files."""
    if isinstance(loader.images, Tensor):
        return loader.images[chosen]
    return Decoder(loader.size)[[(loader.images[number], None) for number in chosen]]


def networks_of(groups: list[Group], loader: ImageLoader, given: Path | None) -> list[Network]:
    """The teachers that the groups learnt from, whose hashes are the recorded ones; the groups."""
    teachers, students = {}, []
    for label, folders, logs in groups:
        name = folders[0].parent.name.split("-")[-1]
        students.append(Network(label, name, [folder / "last.pt" for folder in folders]))
        for folder, (header, *_) in zip(folders, logs):
            key, words = header["settings"].get("teacher_hash"), header["command"]
            if key is None or key in teachers:
                continue
            place = given
            if given is None and "--teacher-ckpt" in words[:-1]:
                # it was relative to where the command ran, which is often above the run
                recorded = words[words.index("--teacher-ckpt") + 1]
                places = [above / recorded for above in folder.parents]
                place = next((path for path in places if path.is_file()), None)
            teachers[key] = reproduce.teacher_of(folder, header, loader, place)
    several = len(teachers) > 1
    return [*(Network(f"teacher {key[:6]}" if several else "teacher", name, [path])
              for key, (name, path) in teachers.items()), *students]


def load(network: Network, index: int, loader: ImageLoader) -> nn.Module:
    model = new_model(network.name, loader, 0)
    load_weights(model, network.checkpoints[index])
    return model.eval()


# ================================================================================================
# Maps
# ================================================================================================


def three(maps: list[Tensor]) -> list[Tensor]:
    """Of all groups' maps the first, a middle one, the last."""
    return [maps[0], maps[len(maps) // 2], maps[-1]]


def grad_cam(network: nn.Module, images: Tensor, classes: Tensor | None
             ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Selvaraju et al. 2017, Eq. 1 and 2, at each group's last map A:

        a_k = 1/Z sum_ij dy / dA_kij        L = ReLU(sum_k a_k A_k)

    images (N, 3, H, W); y the logit of `classes` (N,), or if None of the network's own answer
    -> logits (N, K), the heats L, (N, h, w), nowhere negative, in logits, and the A, (N, C, h, w).
    """
    taps = network(images, taps=True)
    classes = taps.logits.argmax(1) if classes is None else classes
    # in eval mode no image sees another: the gradient of the sum is each one's own
    score = taps.logits.gather(1, classes[:, None]).sum()
    heats = []
    for stage, slope in zip(taps.stages, torch.autograd.grad(score, taps.stages)):
        weights = slope.mean((2, 3), keepdim=True)
        heats.append(F.relu((weights * stage).sum(1)).detach())
    return taps.logits.detach(), heats, [stage.detach() for stage in taps.stages]


def energy_share(maps: Tensor, masks: Tensor) -> Tensor:
    """sum_p M_p m_p / sum_p M_p, in [0, 1]; nan where a map M is zero everywhere.

    maps M (N, h, w), nowhere negative; masks (N, H, W) bool -> (N,). The mask is brought to the
    map's size: m_p is the covered part of the cell p, which is the same as to lay the map over the
    mask as squares. A uniform map has the object's area.
    """
    cover = F.adaptive_avg_pool2d(masks[:, None].double(), maps.shape[1:])[:, 0]
    return (maps.double() * cover).sum((1, 2)) / maps.double().sum((1, 2))


def shares_of(network: nn.Module, loader: ImageLoader, of: str) -> tuple[float, Tensor]:
    """Accuracy in per cent, and (6, N): Grad-CAM low to high, attention low to high."""
    right, shares, start = 0, [], 0
    for images, labels in loader:
        logits, heats, stages = grad_cam(network, images, None if of == "answer" else labels)
        masks = loader.masks[start:start + len(labels)]
        start += len(labels)
        right += (logits.argmax(1) == labels).sum().item()
        attentions = [attention_map(stage).view(-1, *stage.shape[2:]) for stage in three(stages)]
        shares.append(torch.stack([energy_share(x, masks) for x in three(heats) + attentions]))
    return 100 * right / start, torch.cat(shares, dim=1)


def print_energy(args: argparse.Namespace) -> None:
    """In per cent; maps of zeros, which have no share, are left out and counted."""
    groups = groups_of(args.runs, finished=True)
    loader = images_of(groups, args.data_dir)
    if loader.masks is None:
        raise UserError(f"{groups[0].folders[0]}: only shapes come with masks of the objects")
    columns = [f"{kind} {depth}" for kind in ("Grad-CAM", "attention") for depth in DEPTHS]
    area = 100 * loader.masks.double().mean().item()
    rows, empty = [["", "accuracy", *columns, "runs"]], []
    rows.append(["a uniform map", "", *[f"{area:.2f}"] * 6, ""])
    for network in networks_of(groups, loader, args.teacher_ckpt):
        measured = [shares_of(load(network, index, loader), loader, args.of)
                    for index in range(len(network.checkpoints))]
        values = torch.stack([100 * shares.nanmean(1) for _, shares in measured])
        zeros = torch.stack([100 * shares.isnan().double().mean(1) for _, shares in measured])
        rows.append([network.label, reproduce.spread([accuracy for accuracy, _ in measured]),
                     *map(reproduce.spread, values.T.tolist()), str(len(measured))])
        most = zeros.mean(0).max(0)
        empty.append(f"{network.label} {most.values:.1f} ({columns[most.indices]})")
    reproduce.print_markdown(rows)
    print(f"\nPer cent of a map's energy on the object; Grad-CAM of the "
          f"{'answer' if args.of == 'answer' else 'true class'}. Mean ± deviation over the runs' "
          f"means over {len(loader.labels):,} images.\nImages left out, since their map is zero "
          f"everywhere, at most, in per cent: {', '.join(empty)}.")


# ================================================================================================
# Pictures of images
# ================================================================================================


def new_figure(width: int, height: int, **options: object) -> "Figure":
    """Of width x height pixels, drawn in memory: no display, no window."""
    matplotlib.rcParams.update({"font.size": 8, "axes.grid": True, "grid.color": "#DDDDDD",
                                "axes.axisbelow": True})
    return Figure((width / 100, height / 100), dpi=100, **options)


def save(figure: "Figure", args: argparse.Namespace) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    picture = Image.open(buffer).convert("RGB")
    if args.colours:
        # a few pixels of a colour keep it
        picture = picture.quantize(args.colours, Image.Quantize.MAXCOVERAGE, kmeans=1)
    picture.save(args.out, "PNG", optimize=True)
    print(f"{args.out}: {picture.width} x {picture.height} pixels, "
          f"{args.out.stat().st_size / 1000:.0f} KB")


def save_sheet(canvas: Tensor, texts: list[tuple], args: argparse.Namespace) -> None:
    """(H, W, 3) in [0, 1], a pixel a pixel, with texts: x, y of the baseline, text, options."""
    figure = new_figure(canvas.shape[1], canvas.shape[0])
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.imshow(canvas.numpy(), interpolation="none", aspect="auto")
    for x, y, text, options in texts:
        axes.text(x, y, text, **options)
    save(figure, args)


def enlarge(picture: Tensor, size: int, mode: str = "nearest") -> Tensor:
    """(h, w, C) -> (size, size, C)"""
    planes = picture.float().permute(2, 0, 1)[None]
    return F.interpolate(planes, (size, size), mode=mode)[0].permute(1, 2, 0)


def outlined(picture: Tensor, mask: Tensor | None) -> Tensor:
    """(S, S, 3) in [0, 1], (h, w) -> the mask's edge in white inside, in black outside."""
    if mask is None:
        return picture
    picture, inside = picture.clone(), enlarge(mask[..., None], len(picture))[..., 0]
    for layer, shade in ((inside, 0.0), (1 - inside, 1.0)):
        picture[F.max_pool2d(layer[None], 3, 1, 1)[0] > layer] = shade
    return picture


def heated(picture: Tensor, heat: Tensor) -> Tensor:
    """(S, S, 3) in [0, 1], (h, w) -> the heat, smoothed, over its maximum, on the grey."""
    large = enlarge(heat[..., None], len(picture), "bilinear")[..., 0]
    colours = matplotlib.colormaps["inferno"]((large / large.max().clamp(min=1e-12)).numpy())
    grey = picture.mean(dim=2, keepdim=True)
    return 0.35 * grey + 0.65 * torch.from_numpy(colours[..., :3]).float()


def chosen_images(args: argparse.Namespace, groups: list[Group], networks: list[Network],
                  loader: ImageLoader) -> list[int]:
    """--images, or the first --count of a fixed order in which the classes take turns."""
    order = args.images or balanced_order(loader.labels).tolist()
    if max(order) >= len(loader.labels):
        raise UserError(f"no image {max(order)}: they go from 0 to {len(loader.labels) - 1}")
    if args.wrong_only:
        right = {True: [], False: []}
        for group, network in zip(groups, networks[-len(groups):]):
            logits = reproduce.logits_in(network.checkpoints[0], network.name, loader)
            distilled = "teacher_hash" in group.logs[0][0]["settings"]
            right[distilled].append(logits.argmax(1) == loader.labels)
        if not (right[True] and right[False]):
            raise UserError("--wrong-only compares a baseline and a distilled run: name both")
        apart = torch.stack(right[False])[:, None] != torch.stack(right[True])
        order = [number for number in order if apart[..., number].any()]
        if not order:
            raise UserError("on none of these images do baseline and student differ in being right")
    return order if args.images else order[:args.count]


def draw_maps(args: argparse.Namespace) -> None:
    """A row an image; beside it each network's answer and its heat at three depths."""
    groups = [group._replace(folders=group.folders[:1], logs=group.logs[:1])
              for group in groups_of(args.runs)]
    loader = images_of(groups, args.data_dir)
    networks = networks_of(groups, loader, args.teacher_ckpt)
    chosen = chosen_images(args, groups, networks, loader)
    size, row_height, block = 96, 96 + 22, 3 * 100 + 12
    canvas = torch.ones(60 + row_height * len(chosen), 116 + block * len(networks), 3)
    images, labels = pixels_of(loader, chosen), loader.labels[chosen]
    pictures = [enlarge(image / 255, size) for image in images]
    bold = {"weight": "bold"}
    texts = [(8, 14, "number: class", bold)]
    for row, picture in enumerate(pictures):
        top = 46 + row * row_height
        canvas[top:top + size, 8:8 + size] = picture
        texts.append((8, top - 4, f"{chosen[row]}: {loader.class_names[labels[row]]}"[:18], {}))
    for left, network in zip(range(116, canvas.shape[1], block), networks):
        logits, heats, _ = grad_cam(load(network, 0, loader), loader.normalise(images),
                                    None if args.of == "answer" else labels)
        texts.append((left, 14, f"{network.label} ({network.name})", bold))
        for row, answer in enumerate(logits.argmax(1)):
            right = answer == labels[row]
            texts.append((left, 42 + row * row_height, f"{'right' if right else 'WRONG'}: "
                          f"{loader.class_names[answer]}", {} if right else bold))
        for x, depth, heat in zip(range(left, left + 300, 100), DEPTHS, three(heats)):
            texts.append((x, 28, f"{depth}, {heat.shape[1]}x{heat.shape[2]}", {}))
            for row, picture in enumerate(pictures):
                top = 46 + row * row_height
                mask = None if loader.masks is None else loader.masks[chosen[row]]
                canvas[top:top + size, x:x + size] = outlined(heated(picture, heat[row]), mask)
                if not heat[row].any():
                    texts.append((x + 4, top + 14, "all zero", {"color": "white"}))
    whose = "the network's answer" if args.of == "answer" else "the true class"
    line = "" if loader.masks is None else "; line: the object's outline"
    texts.append((8, len(canvas) - 6, f"Grad-CAM of {whose}; dark: 0, bright: the largest value of "
                  f"each map{line}", {}))
    save_sheet(canvas, texts, args)


def draw_data(args: argparse.Namespace) -> None:
    """A row a class: the first pictures of a fixed fair order, then each cropped and flipped."""
    loader, _ = load_data(args.dataset, args.data_dir, 500, "cpu", augment=False, seed=0,
                          image_size=args.image_size)
    if not isinstance(loader.images, Tensor):
        raise UserError(f"pictures of {loader.size} pixels stay in their files and are cropped in "
                        f"training; choose an --image-size below 64")
    order, names = balanced_order(loader.labels), loader.class_names[:args.classes]
    rows = [order[loader.labels[order] == kind][:args.count] for kind in range(len(names))]
    numbers = torch.cat(rows)
    # as in training, but in this order
    training = ImageLoader(Split(loader.images[numbers], loader.labels[numbers]), names,
                           loader.mean[0, 0], loader.std[0, 0], len(numbers), "cpu", shuffle=False,
                           augment=True)
    augmented = next(iter(training))[0].permute(0, 2, 3, 1) * loader.std + loader.mean
    step, left, top = 68, 90, 24
    second = left + args.count * step + 12
    canvas = torch.ones(top + len(names) * step, second + args.count * step, 3)
    outline = "" if loader.masks is None else "; line: the object's mask"
    texts = [(left, 16, f"{args.dataset}, {loader.size}x{loader.size}{outline}",
              {"weight": "bold"}),
             (second, 16, "the same, cropped and flipped at random", {"weight": "bold"})]
    augmented = iter(augmented.clamp(0, 255))
    for y, name, own in zip(range(top, len(canvas), step), names, rows):
        texts.append((left - 6, y + 32, name[:14], {"ha": "right", "va": "center"}))
        for x, number in zip(range(0, step * args.count, step), own):
            mask = None if loader.masks is None else loader.masks[number]
            plain = outlined(enlarge(loader.images[number] / 255, 64), mask)
            canvas[y:y + 64, left + x:left + x + 64] = plain
            canvas[y:y + 64, second + x:second + x + 64] = enlarge(next(augmented) / 255, 64)
    save_sheet(canvas, texts, args)


# ================================================================================================
# Pictures of numbers
# ================================================================================================


def style(number: int) -> dict:
    """A colour, a marker and a line of its own, for eyes that see no colour and for print."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)],
            "linestyle": LINES[number % len(LINES)], "linewidth": 1.3, "markersize": 4}


def deviation(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def course(logs: list[list[dict]], key: str) -> tuple[list[int], list[float], list[float]]:
    """Epochs that all seeds have, the mean of an entry over the seeds, and its deviation."""
    epochs, means, deviations = [], [], []
    for epoch, rows in enumerate(zip(*(log[1:] for log in logs)), 1):
        values = [row[key] for row in rows if key in row]
        if len(values) == len(rows):
            epochs.append(epoch)
            means.append(mean(values))
            deviations.append(deviation(values))
    return epochs, means, deviations


def draw_curves(args: argparse.Namespace) -> None:
    """Accuracy, large, and a panel a loss term, weighted as in training; FSP's stages in turn."""
    groups = groups_of(args.runs)
    rows = [row for group in groups for log in group.logs for row in log[1:]]
    terms = list(dict.fromkeys(key for row in rows for key in row if key not in NO_TERM))
    lines = 2 + math.ceil(max(0, len(terms) - 4) / 4)
    figure = new_figure(960, 190 * lines + 40, layout="constrained")
    grid = figure.add_gridspec(lines, 4)
    places = [(0, 2), (0, 3), (1, 2), (1, 3)] + [(2 + n // 4, n % 4) for n in range(len(terms))]
    panels = {"test": figure.add_subplot(grid[:2, :2])}
    panels |= {term: figure.add_subplot(grid[place]) for term, place in zip(terms, places)}
    for key, axes in panels.items():
        drawn = []
        for number, (label, _, logs) in enumerate(groups):
            epochs, means, deviations = course(logs, key)
            if not epochs:
                continue
            drawn += means
            look = style(number)
            axes.plot(epochs, means, label=label, **look)
            low, high = ([m + sign * d for m, d in zip(means, deviations)] for sign in (-1, 1))
            axes.fill_between(epochs, low, high, color=look["color"], alpha=0.15, linewidth=0)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(f"{key}, times its weight")
        if key != "test" and 0 < 10 * min(drawn) < max(drawn):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
    counts = {len(group.logs) for group in groups}
    panels["test"].set_title(f"{groups[0].logs[0][0]['settings']['split']} accuracy, per cent")
    panels["test"].legend(loc="lower right", title="mean ± deviation over the seeds: "
                          f"{' or '.join(map(str, sorted(counts)))}")
    save(figure, args)


def draw_sweep(args: argparse.Namespace, extra: list[str]) -> None:
    """Accuracy over the constant of the rows `symbol = value`; the baseline is a band."""
    places = argparse.Namespace(**vars(args) | {"out": args.runs_dir})
    plan = reproduce.Plan(args.name, places, extra)
    points, baselines, symbol = {}, {}, ""
    for row in plan.rows:
        logs = [reproduce.complete(plan.run(row, seed)) for seed in plan.seeds(row)]
        tests = [log[-1]["test"] for log in logs if log and not reproduce.outdated(log)]
        if tests and (match := re.fullmatch(r"(\w+) = (\S+)", row.label)):
            symbol, value = match.groups()
            points.setdefault(f"{row.teacher} to {row.student}", {})[float(value)] = tests
        elif tests and row.label == "baseline":
            baselines[f"baseline {row.student}"] = tests
    if not points:
        raise UserError(f"{args.runs_dir} has no finished run of a sweep {args.name}: another "
                        f"--from or table, or train it with reproduce.py")
    figure = new_figure(560, 380, layout="constrained")
    axes = figure.add_subplot()
    for colour, (label, tests) in zip(reversed(COLOURS), baselines.items()):
        low, high = mean(tests) - deviation(tests), mean(tests) + deviation(tests)
        axes.axhline(mean(tests), color=colour, linestyle=":", label=f"{label}, n = {len(tests)}")
        axes.axhspan(low, high, color=colour, alpha=0.2, linewidth=0)
    for number, (label, own) in enumerate(points.items()):
        counts = sorted({len(tests) for tests in own.values()})
        means, errors = zip(*((mean(tests), deviation(tests) or math.nan)
                              for tests in own.values()))
        axes.errorbar(own.keys(), means, errors, capsize=4, **style(number),
                      label=f"{label}, n = {' or '.join(map(str, counts))}")
    values = sorted({value for own in points.values() for value in own})
    if 0 < 10 * values[0] <= values[-1]:
        axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()
    axes.set_xlabel(symbol)
    axes.set_ylabel(f"{'val' if 'val' in extra else 'test'} accuracy, per cent: mean ± deviation")
    axes.set_title(plan.title.split(";")[0])
    axes.legend()
    save(figure, args)


def final_loss(folder: Path, log: list[dict]) -> tuple[str, float]:
    """Name and value of the last distillation term, without its weight if the log has that."""
    for row in reversed(log[1:]):
        if terms := [key for key in row if key not in NO_TERM | {"ce"}]:
            term, weight = terms[-1], log[0]["settings"].get(WEIGHTS.get(terms[-1]))
            return (term, row[term] / weight) if weight else (f"{term} with its weight", row[term])
    raise UserError(f"{folder} has no distillation loss: leave baselines out")


def draw_scatter(args: argparse.Namespace) -> None:
    """Figures 7 and S4 of the ATang paper: a panel a loss, a point a run; r is Pearson's.

    The paper does not say on which images it takes L_A; here it is the mean over the last epoch's
    training batches, as the log has it, over gamma. Other margins make another loss: do not mix.
    """
    panels = {}
    for number, (label, folders, logs) in enumerate(groups_of(args.runs, finished=True)):
        for folder, log in zip(folders, logs):
            term, loss = final_loss(folder, log)
            own = panels.setdefault(term, {}).setdefault((number, label), [])
            own.append((loss, log[-1]["test"]))
    columns = min(3, len(panels))
    high = math.ceil(len(panels) / columns)
    figure = new_figure(320 * columns + 40, 260 * high + 20, layout="constrained")
    for place, (term, own) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(high, columns, place)
        for (number, label), points in own.items():
            axes.plot(*zip(*points), label=label, **style(number) | {"linestyle": "none"})
        losses, tests = zip(*sum(own.values(), []))
        enough = len(losses) > 2 and len(set(losses)) > 1 < len(set(tests))
        told = f", r = {correlation(losses, tests):+.2f}" if enough else ""
        axes.set_title(f"{term}, {len(losses)} runs{told}")
        axes.set_xlabel("last epoch's loss" + ("" if " " in term else ", without its weight"))
        axes.set_ylabel("accuracy, per cent")
        axes.locator_params(axis="x", nbins=4)
        axes.xaxis.set_major_formatter("{x:.4g}")
        if len(own) > 1:
            axes.legend()
    save(figure, args)


# ================================================================================================
# The command line
# ================================================================================================


def png(text: str) -> Path:
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text} does not end in .png")
    return Path(text)


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True, metavar="COMMAND")
    adds = {}
    for name in ("maps", "energy", "curves", "sweep", "scatter", "data"):
        adds[name] = add = commands.add_parser(
            name, allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter).add_argument
        if name not in ("sweep", "data"):
            add("runs", type=Path, nargs="+", metavar="RUN", help="its folder")
        if name != "energy":
            add("--out", type=png, default=f"{name}.png", help="the picture")
            add("--colours", type=limited(int, 2, 256), help="so few, for a smaller file")
        if name not in ("curves", "scatter"):
            add("--data-dir", type=Path, default="data" if name == "data" else None,
                help="where the data set is")
        if name in ("sweep", "data"):
            add("--dataset", default="shapes" if name == "data" else None,
                choices=["cifar10", "cifar100", "cinic10", "folder", "shapes"])
        if name in ("maps", "energy", "sweep"):
            add("--teacher-ckpt", type=Path, help="None: where the runs' commands had it")
        if name in ("maps", "energy"):
            add("--of", choices=["class", "answer"], default="class",
                help="Grad-CAM of the picture's class, or of what the network answers")
    add = adds["maps"]
    add("--images", type=limited(int, 0, 1e9), nargs="+", help="numbers, from 0")
    add("--count", type=limited(int, 1, 100), default=4, help="else so many, the classes in turn")
    add("--wrong-only", action="store_true",
        help="only where a baseline and a distilled student differ in being right")
    add = adds["sweep"]
    add("name", choices=reproduce.TABLES, metavar="TABLE", help="a sweep of reproduce.py")
    add("--teacher", help="network, of all rows")
    add("--student", help="network, of all rows")
    add("--epochs", type=limited(int, 1, 1e5), help="of all rows")
    add("--runs", type=limited(int, 1, 1e3), help="seeds of each row; None: as the paper has it")
    add("--from", type=Path, default="runs/tables", dest="runs_dir", metavar="DIR",
        help="the folder of the tables' runs, reproduce.py's --out")
    add = adds["data"]
    add("--image-size", type=limited(int, 8, 1024), help="of folders, in pixels; None: 32")
    add("--count", type=limited(int, 1, 20), default=5, help="pictures of each class")
    add("--classes", type=limited(int, 1, 1000), default=20, help="the first so many")
    return parser, *parser.parse_known_args()


def main() -> None:
    parser, args, extra = parse()
    # a sweep hands on what it does not know, as reproduce.py does
    extra = [part for word in extra
             for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if extra and (args.what != "sweep" or not extra[0].startswith("--")):
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    draw = {"maps": draw_maps, "energy": print_energy, "curves": draw_curves,
            "sweep": lambda args: draw_sweep(args, extra), "scatter": draw_scatter,
            "data": draw_data}[args.what]
    try:
        if matplotlib is None and args.what != "energy":
            raise UserError("pictures need matplotlib: pip install matplotlib")
        draw(args)
    except Exception as error:
        print(one_line(error), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
