"""Pictures of finished runs and of data sets, and how much of a network's maps lies on the object.

    python tests/tools/look.py maps RUN ...       where networks look: Grad-CAM at three depths
    python tests/tools/look.py energy RUN ...     shapes: the part of the Grad-CAM and the attention
                                                  maps that lies on the object, a Markdown table
    python tests/tools/look.py curves RUN ...     accuracy and loss terms over the epochs
    python tests/tools/look.py scatter RUN ...    distillation loss and accuracy, a point a run
    python tests/tools/look.py sweep TABLE ...    one of reproduce.py's, over what it varies
    python tests/tools/look.py data --dataset folder --data-dir mydata   the classes, and augmented

RUN is a folder runs/<data set>/<recipe>/<method>/<networks>/seed<k>, or any above it for all runs
below: seeds of equal settings are one line (maps: the lowest seed). Pictures are written to
runs/<command>.png, or to --out. curves, scatter and sweep read logs alone, also from a file of
recorded runs as if that were a folder: tests/reference/runs.jsonl/shapes/shapes/baseline/wrn16_1.

Grad-CAM (Selvaraju et al. 2017) is taken at the maps that AT and ATang compare, `Taps.stages`: low
is the first group's, middle that of group #groups // 2 + 1, high the last's. In a wide residual
network these enter the next BatchNorm and ReLU, and may be negative. The class is the picture's
own, or with `--of answer` what the network says. The share in `energy` is of the map laid over the
picture as squares, unsmoothed; its std is over the seeds (n - 1), each seed's value the mean over
all images, whose own spread is not shown.
"""
import argparse
import json
import math
import re
import sys
from pathlib import Path
from statistics import correlation, mean, stdev
from typing import NamedTuple

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor, nn

import reproduce
from reproduce import positive
from atang import attention_map
from common import DATASETS, Loader, UserError, balanced_order, check_pair, load_data

# Okabe and Ito's colours, which the colour-blind tell apart; grey for yellow, pale on white
COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#777777"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*", "<"]
LINES = ["-", "--", "-.", ":"]
DEPTHS = ["low", "middle", "high"]
HASHES = ("script", "teacher_hash")      # a legend does not name them
NO_TERM = {"epoch", "lr", "train", "test", "images/s", "seconds"}
# the flag that a term was multiplied by; FSP's depends on the networks
WEIGHTS = {"kd": "kd_weight", "skd": "kd_weight", "at": "beta", "atang": "gamma", "amd": "gamma",
           "amd-local": "gamma", "overhaul": "alpha"}

# === Runs =======================================================================================

class Group(NamedTuple):
    """The seeds of one method, pair and settings."""
    label: str
    runs: list[Path]
    logs: list[list[dict]]


class Network(NamedTuple):
    label: str
    name: str
    checkpoints: list[Path]     # of the seeds


def runs_of(path: Path) -> list[Path]:
    """The run itself, or all below that have finished an epoch, by folders and seeds."""
    path = path.resolve()
    runs = [run for run in reproduce.runs_below(path)
            if "stage1" not in run.relative_to(path).parts and len(reproduce.log_of(run)) > 1]
    if not runs:
        raise UserError(f"{path} is no run: name a folder seed<k> with a log.jsonl of at least one "
                        f"epoch, or one above it")
    return sorted(runs, key=lambda run: (run.parent, int("0" + re.sub(r"\D", "", run.name))))


def whole_log(run: Path) -> list[dict]:
    """A run's log; with FSP's first stage, whose epochs come before."""
    header, *rows = reproduce.log_of(run)
    shared = header["settings"].get("shared_stage1")
    first = run.parent / "stage1" / ("seed0" if shared else run.name)
    return [header, *reproduce.log_of(first)[1:], *rows]


def own_parts(texts: list[str]) -> list[str]:
    """The parts of each path that not all have."""
    shared = set.intersection(*(set(text.split("/")) for text in texts))
    return ["/".join(part for part in text.split("/") if part not in shared) for text in texts]


def labels_of(runs: list[Path], settings: list[dict]) -> list[str]:
    """Each one's method, and what tells it from others: networks, settings, else folder, seed."""
    labels = [run.parts[-3] for run in runs]
    for between, values, own_of in (
            (" ", ["/".join(run.parts[-4:-1]) for run in runs], own_parts),
            (", ", settings, reproduce.differences),
            (" in ", ["/".join(run.parts[:-5]) for run in runs], own_parts),
            (" ", [run.name for run in runs], own_parts)):
        for label in set(labels):       # where it is not one's alone
            alike = [number for number, other in enumerate(labels) if other == label]
            for number, own in zip(alike, own_of([values[number] for number in alike])):
                labels[number] += between + own if own else ""
    return labels


def groups_of(paths: list[Path], finished: bool = False) -> list[Group]:
    """The runs, of one data set and split, and `finished` where that is asked, or UserError."""
    found, first = {}, {}
    for path, run in ((path, run) for path in paths for run in runs_of(path)):
        log = whole_log(run)
        first = first or log[0]["settings"]
        for key in ("data", "split", "image_size"):
            if (value := log[0]["settings"].get(key)) != first.get(key):
                raise UserError(f"{run} has {key} {value}, the first run {first.get(key)}: look "
                                f"at them one by one")
        if finished and not reproduce.complete(run):
            raise UserError(f"{run} is not finished: run its command again")
        own = {key: value for key, value in log[0]["settings"].items() if key not in HASHES}
        group = found.setdefault((path, run.parent, json.dumps(own, sort_keys=True)),
                                 Group("", [], []))
        group.runs.append(run)
        group.logs.append(log)
    labels = labels_of([group.runs[0] for group in found.values()],
                       [json.loads(own) for *_, own in found])
    return [group._replace(label=label) for label, group in zip(labels, found.values())]


def networks_of(groups: list[Group], loader: Loader, given: Path | None) -> list[Network]:
    """The teachers that the groups learnt from, whose hashes are the recorded ones; the groups."""
    teachers = {}
    for run, log in ((run, log) for group in groups for run, log in zip(group.runs, group.logs)):
        key = log[0]["settings"].get("teacher_hash")
        if key and key not in teachers:
            teachers[key] = reproduce.teacher_of(run, loader, given)
    found = [*(Network(f"teacher {key[:6]}" if len(teachers) > 1 else "teacher", name, [path])
               for key, (name, path) in teachers.items()),
             *(Network(label, reproduce.student_of(runs[0]), [run / "last.pt" for run in runs])
               for label, runs, _ in groups)]
    for network in found if not loader.pixels else []:      # an error where it shows no maps
        check_pair(network.name, network.name, loader.size, ["stages"])
    return found


# === Maps =======================================================================================

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
    taps = network(images.clone().requires_grad_(), taps=True)      # its weights may be frozen
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


def shares_of(network: nn.Module, loader: Loader, of: str) -> tuple[float, Tensor]:
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
    loader = reproduce.images_of(groups[0].runs[0], args.data_dir)
    if loader.masks is None:
        raise UserError(f"{groups[0].runs[0]}: only shapes come with masks of the objects")
    columns = [f"{kind} {depth}" for kind in ("Grad-CAM", "attention") for depth in DEPTHS]
    area, empty = 100 * loader.masks.double().mean().item(), []
    lines = [["", "accuracy", *columns, "runs"], ["a uniform map", "", *[f"{area:.2f}"] * 6, ""]]
    for network in networks_of(groups, loader, args.teacher_ckpt):
        measured = [shares_of(reproduce.network_of(network.name, path, loader), loader, args.of)
                    for path in network.checkpoints]
        accuracies, shares = [one for one, _ in measured], torch.stack([s for _, s in measured])
        lines.append([network.label, reproduce.spread(accuracies),
                      *map(reproduce.spread, (100 * shares.nanmean(2)).T.tolist()),
                      str(len(measured))])
        most, column = (100 * shares.isnan().double().mean((0, 2))).max(0)
        empty.append(f"{network.label} {most:.1f} ({columns[column]})")
    reproduce.print_markdown(lines)
    whose = "answer" if args.of == "answer" else "true class"
    print(f"\nPer cent of a map's energy on the object; Grad-CAM of the {whose}. Mean ± std over "
          f"the runs' means\nover {len(loader.labels):,} images. Left out, since their map is zero "
          f"everywhere, at most, in per cent: {', '.join(empty)}.")


# === Pictures of images =========================================================================

def new_figure(width: int, height: int, **options: object) -> Figure:
    """Of width x height pixels, drawn in memory: no display, no window."""
    matplotlib.rcParams.update({"font.size": 8, "axes.grid": True, "grid.color": "#DDDDDD",
                                "axes.axisbelow": True})
    return Figure((width / 100, height / 100), dpi=100, **options)


def save(figure: Figure, args: argparse.Namespace) -> None:
    if args.out.parent == Path("runs"):     # of pictures that nobody gave a name
        args.out.parent.mkdir(exist_ok=True)
    try:
        figure.savefig(args.out)
    except ValueError as error:     # a kind of file that matplotlib does not know
        raise UserError(f"{args.out}: {error}") from None
    print(f"{args.out}: {args.out.stat().st_size / 1000:.0f} KB")


def images_by_number(loader: Loader, numbers: list[int]) -> tuple[Tensor, Tensor]:
    """(N, 3, H, W), normalised, and labels, of a loader that does not shuffle."""
    found, start, wanted = {}, 0, set(numbers)
    for images, labels in loader:
        found |= {number: (images[number - start], labels[number - start])
                  for number in wanted & set(range(start, start + len(images)))}
        start += len(images)
        if len(found) == len(wanted):
            break
    return tuple(map(torch.stack, zip(*(found[number] for number in numbers))))


def as_pictures(images: Tensor, loader: Loader) -> Tensor:
    """(N, 3, H, W), normalised -> (N, H, W, 3) in [0, 1]"""
    pictures = images.permute(0, 2, 3, 1) * torch.tensor(loader.std) + torch.tensor(loader.mean)
    return pictures.clamp(0, 1)


def draw_picture(axes: object, picture: Tensor, title: str = "", mask: Tensor | None = None,
                 heat: Tensor | None = None) -> None:
    """(H, W, 3) in [0, 1], with a mask's edge; a heat (h, w) lies over the grey, by its maximum."""
    place = dict(extent=(0, 1, 0, 1), vmin=0, vmax=1)
    axes.imshow((picture if heat is None else picture.mean(2)).numpy(), cmap="gray", **place)
    if heat is not None:
        axes.imshow((heat / heat.max().clamp(min=1e-12)).numpy(), cmap="inferno", alpha=0.65,
                    interpolation="bilinear", **place)
    if mask is not None:        # enlarged, so that the line goes around the pixels
        large = mask.repeat_interleave(8, 0).repeat_interleave(8, 1).numpy()
        for colour, width in (("black", 2.5), ("white", 1)):
            axes.contour(large, [0.5], colors=colour, linewidths=width, extent=(0, 1, 0, 1),
                         origin="upper")
    axes.set_title(title, fontsize=7, weight="bold" if "WRONG" in title else "normal", pad=3)


def new_sheet(lines: int, columns: int, cell: int, title: str) -> tuple[Figure, object]:
    """A figure of so many pictures of about `cell` pixels, and its axes, (lines, columns)."""
    figure = new_figure(cell * columns, (cell + 16) * lines + 40, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=8)
    sheet = figure.subplots(lines, columns, squeeze=False)
    for axes in sheet.flat:
        axes.set_axis_off()
    return figure, sheet


def draw_answers(networks: list, loader: Loader, images: Tensor, labels: Tensor,
                 args: argparse.Namespace) -> None:
    """A row a scene: the picture, its classes, and those that each network gives its pixels."""
    figure, sheet = new_sheet(len(images), 2 + len(networks), 100, "a colour for each class")
    columns = {"labels": labels}
    for network in networks:
        model = reproduce.network_of(network.name, network.checkpoints[0], loader)
        with torch.no_grad():
            name = f"{network.label}\n({network.name.removeprefix('deeplab_')})"
            columns[name] = model(images).argmax(1)
    for line, picture in zip(sheet, as_pictures(images, loader)):
        draw_picture(line[0], picture)
    for column, (title, answers) in enumerate(columns.items(), 1):
        sheet[0, column].set_title(title, fontsize=7, pad=3)
        for axes, answer in zip(sheet[:, column], answers):
            seen = answer.double().where(answer >= 0, math.nan)     # without a label: blank
            colours = "tab20" if loader.num_classes <= 20 else "nipy_spectral"
            axes.imshow(seen.numpy(), cmap=colours, vmin=0, vmax=loader.num_classes)
    save(figure, args)


def draw_maps(args: argparse.Namespace) -> None:
    """A row an image; beside it each network's answer and its heat at three depths."""
    groups = [group._replace(runs=group.runs[:1], logs=group.logs[:1])
              for group in groups_of(args.runs)]
    loader = reproduce.images_of(groups[0].runs[0], args.data_dir)
    networks = networks_of(groups, loader, args.teacher_ckpt)
    # else the first ones of a fixed order in which the classes take turns
    chosen = args.images or balanced_order(loader.labels)[:args.count].tolist()
    if not 0 <= min(chosen) <= max(chosen) < len(loader.labels):
        raise UserError(f"--images {max(chosen)}: they go from 0 to {len(loader.labels) - 1}")
    images, labels = images_by_number(loader, chosen)
    if loader.pixels:
        return draw_answers(networks, loader, images, labels, args)
    pictures, masks = as_pictures(images, loader), [None] * len(chosen)
    whose = "the network's answer" if args.of == "answer" else "the true class"
    title = f"Grad-CAM of {whose}; dark: 0, bright: the largest value of each map"
    if loader.masks is not None:
        masks, title = loader.masks[chosen], f"{title}; line: the object's outline"
    figure, sheet = new_sheet(len(chosen), 1 + 3 * len(networks), 100, title)
    for axes, number, picture, label in zip(sheet[:, 0], chosen, pictures, labels):
        draw_picture(axes, picture, f"{number}: {loader.class_names[label]}"[:18])
    for left, network in zip(range(1, 1 + 3 * len(networks), 3), networks):
        model = reproduce.network_of(network.name, network.checkpoints[0], loader)
        logits, heats, _ = grad_cam(model, images, None if args.of == "answer" else labels)
        for row, answer in enumerate(logits.argmax(1)):
            right = "right" if answer == labels[row] else "WRONG"
            for column, heat in enumerate(three(heats)):
                size = f"{DEPTHS[column]}, {heat.shape[1]}x{heat.shape[2]}"
                lines = ["", size, "" if heat[row].any() else "all zero"]
                if column == 0:
                    lines[0] = f"{network.label} ({network.name})"
                    lines[2] = f"{right}: {loader.class_names[answer]}  {lines[2]}"
                draw_picture(sheet[row, left + column], pictures[row],
                             "\n".join(lines if row == 0 else lines[2:]), masks[row], heat[row])
    save(figure, args)


def draw_data(args: argparse.Namespace) -> None:
    """A row a class: the first pictures of a fixed fair order, then each cropped and flipped."""
    plain, augmented = (load_data(args.dataset, args.data_dir, 500, "cpu", augment=augment, seed=0,
                                  image_size=args.image_size)[0] for augment in (False, True))
    if plain.settings.get("in_files") or plain.pixels:
        raise UserError("only pictures below 64 pixels, with a class each, are drawn: the others "
                        "stay in their files, or have a class for each pixel")
    order, names = balanced_order(plain.labels), plain.class_names[:args.classes]
    outline = "" if plain.masks is None else ", the line is the object's mask"
    figure, sheet = new_sheet(len(names), 2 * args.count + 1, 72, f"{args.dataset}, {plain.size}x"
                              f"{plain.size}{outline}; right: cropped and flipped at random")
    rows = [order[plain.labels[order] == kind][:args.count].tolist() for kind in range(len(names))]
    for loader, left in ((plain, 0), (augmented, args.count + 1)):
        loader.shuffle, loader.count = False, len(loader.labels)    # for images by their numbers
        pictures = iter(as_pictures(images_by_number(loader, sum(rows, []))[0], loader))
        for row, numbers in enumerate(rows):
            for column, (number, picture) in enumerate(zip(numbers, pictures), left):
                outlined = loader is plain and plain.masks is not None
                draw_picture(sheet[row, column], picture, "" if column else names[row],
                             plain.masks[number] if outlined else None)
    save(figure, args)


# === Pictures of numbers ========================================================================

def style(number: int) -> dict:
    """A colour, a marker and a line of its own, for eyes that see no colour and for print."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)],
            "linestyle": LINES[number % len(LINES)], "linewidth": 1.3, "markersize": 4}


def std_of(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def course(logs: list[list[dict]], key: str) -> tuple[list[int], list[float], list[float]]:
    """Epochs that all seeds have, the mean of an entry over the seeds, and its std."""
    epochs, means, stds = [], [], []
    for epoch, rows in enumerate(zip(*(log[1:] for log in logs)), 1):
        values = [row[key] for row in rows if key in row]
        if len(values) == len(rows):
            epochs.append(epoch)
            means.append(mean(values))
            stds.append(std_of(values))
    return epochs, means, stds


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
            epochs, means, stds = course(logs, key)
            if not epochs:
                continue
            drawn += means
            axes.plot(epochs, means, label=label, **style(number))
            low, high = ([m + sign * s for m, s in zip(means, stds)] for sign in (-1, 1))
            axes.fill_between(epochs, low, high, color=style(number)["color"], alpha=0.15, lw=0)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(f"{key}, times its weight")
        if key != "test" and 0 < 10 * min(drawn) < max(drawn):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
    counts = " or ".join(map(str, sorted({len(group.logs) for group in groups})))
    panels["test"].set_title(f"{groups[0].logs[0][0]['settings']['split']} "
                             f"{reproduce.command_of(groups[0].runs[0]).score}, per cent")
    panels["test"].legend(loc="lower right", title=f"mean ± std over the seeds: {counts}",
                          fontsize=8 if len(groups) < 10 else 6)
    save(figure, args)


def draw_sweep(args: argparse.Namespace) -> None:
    """Accuracy over the constant of the rows `symbol = value`; the baseline is a band."""
    places = argparse.Namespace(**vars(args) | {"out": args.runs_dir})
    plan = reproduce.Plan(args.name, places, args.extra)
    points, baselines, symbol, splits = {}, {}, "", []
    for row in plan.rows:
        logs = list(plan.logs(row).values())
        tests = [log[-1]["test"] for log in logs]
        splits += [log[0]["settings"]["split"] for log in logs]
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
        middle, std = mean(tests), std_of(tests)
        axes.axhline(middle, color=colour, linestyle=":", label=f"{label}, n = {len(tests)}")
        axes.axhspan(middle - std, middle + std, color=colour, alpha=0.2, linewidth=0)
    for number, (label, own) in enumerate(points.items()):
        counts = " or ".join(map(str, sorted({len(tests) for tests in own.values()})))
        axes.errorbar(own.keys(), [mean(tests) for tests in own.values()],
                      [std_of(tests) or math.nan for tests in own.values()], capsize=4,
                      label=f"{label}, n = {counts}", **style(number))
    values = sorted({value for own in points.values() for value in own})
    if 0 < 10 * values[0] <= values[-1]:
        axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()
    axes.set_xlabel(symbol)
    score = reproduce.parsed(*plan.command(plan.rows[0])).score
    axes.set_ylabel(f"{splits[0]} {score}, per cent: mean ± std")
    axes.set_title(plan.title)
    axes.legend()
    save(figure, args)


def final_loss(run: Path, log: list[dict]) -> tuple[str, float]:
    """Name and value of the last distillation term, without its weight if the log has that."""
    for row in reversed(log[1:]):
        if terms := [key for key in row if key not in NO_TERM | {"ce"}]:
            term, weight = terms[-1], log[0]["settings"].get(WEIGHTS.get(terms[-1]))
            return (term, row[term] / weight) if weight else (f"{term} with its weight", row[term])
    raise UserError(f"{run} has no distillation loss: leave baselines out")


def draw_scatter(args: argparse.Namespace) -> None:
    """Figures 7 and S4 of the ATang paper: a panel a loss, a point a run; r is Pearson's.

    The paper does not say on which images it takes L_A; here it is the mean over the last epoch's
    training batches, as the log has it, over gamma. Other margins make another loss: do not mix.
    """
    panels, groups = {}, groups_of(args.runs, finished=True)
    split = groups[0].logs[0][0]["settings"]["split"]
    score = f"{split} {reproduce.command_of(groups[0].runs[0]).score}"
    for number, (label, runs, logs) in enumerate(groups):
        for run, log in zip(runs, logs):
            term, loss = final_loss(run, log)
            own = panels.setdefault(term, {}).setdefault((number, label), [])
            own.append((loss, log[-1]["test"]))
    figure = new_figure(320 * len(panels) + 40, 280, layout="constrained")
    for axes, (term, own) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for (number, label), points in own.items():
            axes.plot(*zip(*points), label=label, **style(number) | {"linestyle": "none"})
        losses, tests = zip(*sum(own.values(), []))
        told = f"{term}, {len(losses)} runs"
        if len(losses) > 2 and len(set(losses)) > 1 < len(set(tests)):
            told += f", r = {correlation(losses, tests):+.2f}"
        axes.set_title(told)
        axes.set_xlabel("last distilled epoch's loss" + ", without its weight" * (" " not in term))
        axes.set_ylabel(f"{score}, per cent")
        axes.locator_params(axis="x", nbins=4)
        axes.xaxis.set_major_formatter("{x:.4g}")
        if len(own) > 1:
            axes.legend()
    save(figure, args)


COMMANDS = {"maps": draw_maps, "energy": print_energy, "curves": draw_curves,
            "scatter": draw_scatter, "sweep": draw_sweep, "data": draw_data}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands, adds = parser.add_subparsers(dest="what", required=True, metavar="COMMAND"), {}
    for name in COMMANDS:
        adds[name] = add = commands.add_parser(name, allow_abbrev=False).add_argument
        if name not in ("sweep", "data"):
            add("runs", type=Path, nargs="+", metavar="RUN", help="its folder, or one above")
        if name != "energy":
            add("--out", type=Path, default=f"runs/{name}.png", help="the picture; %(default)s")
        if name in ("maps", "energy"):
            add("--data-dir", type=Path, help="where the data set is; else as the run's command")
            add("--teacher-ckpt", type=Path, help="else where the runs' commands had it")
            add("--of", choices=["class", "answer"], default="class",
                help="Grad-CAM of the picture's class, or of what the network answers")
    adds["maps"]("--images", type=int, nargs="+", help="numbers, from 0")
    adds["maps"]("--count", type=positive, default=4, help="else so many, the classes in turn; 4")
    adds["sweep"]("name", choices=reproduce.TABLES, metavar="TABLE", help="of reproduce.py")
    adds["sweep"]("--from", type=Path, default="runs/tables", dest="runs_dir", metavar="DIR",
                  help="the tables' runs, reproduce.py's --out, or a file of recorded runs")
    reproduce.add_plan_flags(adds["sweep"])
    add = adds["data"]
    add("--dataset", choices=DATASETS, default="shapes")
    add("--data-dir", type=Path, default="data", help="where the data set is")
    add("--image-size", type=positive, help="of folders, in pixels; else 32")
    add("--count", type=positive, default=5, help="pictures of each class; 5")
    add("--classes", type=positive, default=20, help="the first so many; 20")
    args, args.extra = parser.parse_known_args()
    # a sweep hands on what it does not know, as reproduce.py does
    if args.extra and (args.what != "sweep" or not args.extra[0].startswith("--")):
        parser.error(f"unrecognized arguments: {' '.join(args.extra)}")
    try:
        COMMANDS[args.what](args)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
