"""The papers' tables: train what is missing, print it beside the paper; measure finished runs.

    python tests/tools/reproduce.py            lists the tables: what each asks, runs, hours
    python tests/tools/reproduce.py six --dataset shapes --runs 3 --jobs 2
                                               trains what is not finished, two runs side by side,
                                               and prints the table; stopped or killed, the same
                                               command goes on; with --show it trains nothing
    python tests/tools/reproduce.py --table runs      every finished run below a folder, by seeds,
                                               the gain, and in which settings runs of the same
                                               networks and method differ; as CSV with --csv FILE
    python tests/tools/reproduce.py --record runs/tables tests/reference/runs.jsonl
                                               keeps their logs in a file, a run a line
    python tests/tools/reproduce.py --measure RUN ... accuracy, top-5, cross-entropy, KL(teacher
                                               || student) (Heo et al., Table 7), entropy, energy
                                               and their gaps beside the theorems (Tables 2 and 7 of
                                               SKD's paper), and the ensemble (FSP's Table 1)

It runs the scripts' command lines, and reads their logs and checkpoints. --dataset, --teacher,
--student and --epochs replace a table's own; a flag that is not in --help goes to every script as
it is (--split val, --train-images 1000, --device). Runs lie in --out/<flags>/<data set>/<recipe>/
<method>/<networks>/seed<k>, where tables share what they have in common. Runs of other settings
than today's, or of another text of their script, are in no table, and the script refuses to go on
with them: delete their folder, or name another --out. A file of recorded runs stands for the folder
it was made of: `six --dataset shapes --runs 5 --show --out tests/reference/runs.jsonl`.
"""
import argparse
import contextlib
import csv
import ctypes
import functools
import hashlib
import importlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from statistics import mean, stdev
from typing import Callable, Iterable, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from common import (DATASETS, Loader, UserError, create_model, load_data,  # noqa: E402
                    load_weights, read_cifar, usual_workers)
from skd import kd_loss, spherical  # noqa: E402

# === The tables =================================================================================

class Row(NamedTuple):
    label: str
    command: str        # script and flags; "baseline": the student alone; "teacher": the teacher
    teacher: str
    student: str
    paper: str = ""     # accuracy in per cent, as the paper has it (errors: 100 minus them)
    beside: dict = {}   # what the paper measured of it besides


class Table(NamedTuple):
    paper: str
    question: str
    dataset: str
    runs: int
    rows: list[Row]
    recipe: str = ""        # of all rows; else each script's own for the data set
    measured: tuple = ()    # from the checkpoints: names of `outputs`
    base: str = "kd.py"     # trains its baselines and teachers
    published: bool = False     # its teachers are torchvision's first weights, and not trained
    note: str = ""      # where its rows are not the paper's to the letter


def of_pairs(commands: dict[str, str], lines: str, errors: bool = False) -> list[Row]:
    """A paper's table: in each line teacher, student, and a value for each command, or -.

    Of a table without numbers the lines have the two names alone; errors are 100 minus accuracies.
    """
    found = []
    for line in lines.strip().split("\n"):
        teacher, student, *values = line.split()
        values = [value.strip("-").replace("±", " ± ") for value in values] or [""] * len(commands)
        values = [f"{100 - float(value):.2f}" for value in values] if errors else values
        found += [Row(label, command, teacher, student, value) for (label, command), value
                  in zip(commands.items(), values, strict=True)]
    return found


def of_settings(commands: dict[str, str], *columns: int) -> list[Row]:
    """The overhaul's settings, and these columns of SETTINGS; e and f learn by half the batch."""
    found = []
    for line in SETTINGS.strip().split("\n"):
        letter, teacher, student, *values = line.split()
        half = " --batch-size 64" if letter in "ef" else ""
        own = {f"({letter}) {label}": command + half for label, command in commands.items()}
        line = " ".join([teacher, student, *(values[column] for column in columns)])
        found += of_pairs(own, line, errors=True)
    return found


def sweep(script: str, flag: str, symbol: str, values: str, lines: str) -> list[Row]:
    """A baseline, then a row for each value of a flag, of each line's pair."""
    commands = {f"{symbol} = {value}": f"{script} --{flag} {value}" for value in values.split()}
    return of_pairs({"baseline": "baseline"} | commands, lines)


ALONE = {"teacher": "teacher", "baseline": "baseline"}
ATANG = ALONE | {"KD": "kd.py", "AT+KD": "at.py", "ATang+KD": "atang.py"}
# Section 4.4.1: this student does better with a smaller gamma
LARGE = ATANG | {"ATang+KD": "atang.py --gamma 1000"}
OVERHAUL = ALONE | {"KD": "kd.py", "AT": "at.py --kd-weight 0", "overhaul": "overhaul.py"}
# error rates of teacher, baseline, KD, AT, overhaul (Table 3), overhaul of the last layer (11)
SETTINGS = """
    a wrn28_4           wrn16_4          21.09 22.72 21.69 22.07 20.89 20.90
    b wrn28_4           wrn28_2          21.09 24.88 23.43 23.80 21.98 22.03
    c wrn28_4           wrn16_2          21.09 27.32 26.47 26.56 24.08 24.14
    d wrn28_4           resnet56         21.09 27.68 26.76 26.66 24.44 24.78
    e pyramidnet200_240 wrn28_4          15.57 21.09 20.97 19.28 17.80 18.17
    f pyramidnet200_240 pyramidnet110_84 15.57 22.58 21.68 19.93 18.89 18.99"""
# Section 4.2; the other scripts' recipes drop an epoch later, kd.py's at epoch 80 too, and at.py's
# has no Nesterov
EVERY_30 = "--milestones 0.29 0.59 0.89"
ON_IMAGENET = OVERHAUL | {"KD": f"kd.py {EVERY_30}",
                          "AT": f"at.py --kd-weight 0 --nesterov {EVERY_30}"}
SKD = ALONE | {"KD": "kd.py", "AT": "at.py --kd-weight 0", "SKD": "skd.py"}
# MobileNetV2 and the ShuffleNets learn at a lower rate in CRD's tables
SLOW = SKD | {label: f"{SKD[label]} --lr 0.01" for label in SKD if label != "teacher"}
GROWING = [f"resnet{depth}" for depth in (20, 32, 44, 56, 110)]
OF_TEACHERS, OF_KD = "69.57 70.9 71.9 72.8 73.8", "67.4 68.2 68 67.5 67.1"
KD_GAPS = {"G_entropy": "0.146 0.181 0.222 0.246 0.261", "G_f": "0.042 0.053 0.063 0.068 0.074"}
SKD_GAPS = {"G_entropy": "0.053 0.074 0.081 0.083 0.094", "G_f": "0.029 0.042 0.041 0.045 0.044"}
SOFT_LOSS = {"soft loss": "1.1 1.7 2.1 2.5 3.3"}
SOFT_NOTE = ("soft loss: tau^2 KL on the training images, the last epoch's mean; the paper's is "
             "cross-entropy (Eq. 2), without tau^2 and with the teacher's entropy.")
GAPS = ("S teacher", "G_entropy", "theorem 1", "F teacher", "G_f", "G_f centred", "theorem 2",
        "soft loss")


def growing(label: str, command: str, papers: str, besides: dict[str, str]) -> list[Row]:
    """ResNet14 from ResNet20 to ResNet110; each text has a number a teacher."""
    columns = zip(*(text.split() for text in besides.values()))
    beside = [dict(zip(besides, map(float, column))) for column in columns] or [{}] * len(GROWING)
    values = papers.split() or [""] * len(GROWING)
    return [Row(label, command, teacher, "resnet14", *of_paper)
            for teacher, *of_paper in zip(GROWING, values, beside, strict=True)]


def by_teacher(*lists: list[Row]) -> list[Row]:
    """The baseline, then teacher after teacher its row of each list."""
    first = Row("baseline", "baseline", GROWING[0], "resnet14")
    return [first, *(row for rows in zip(*lists) for row in rows)]


def on_voc(student: str) -> dict[str, str]:
    """Table 6's rows; all begin with torchvision's ImageNet weights."""
    commands = ALONE | {"KD by pixels": "kd.py", "overhaul": "overhaul.py"}
    return {label: f"{command} --student-ckpt {'ResNet101' if label == 'teacher' else student}"
                   f"_Weights.IMAGENET1K_V1" for label, command in commands.items()}


TABLES = {
    "six": Table("no paper's: all methods", "which method helps, all else equal?", "cifar10", 3,
        of_pairs(ATANG | {
            "AMD+KD": "atang.py --loss amd", "FSP": "fsp.py --epochs 3/4E --fsp-epochs 1/4E",
            "overhaul": "overhaul.py", "SKD": "skd.py"}, "wrn16_3 wrn16_1"), "cifar10-jeon"),
    "atang-2": Table("ATang, Table 2", "does the margin beat AT and KD?", "cifar10", 5,
        of_pairs(ATANG, """
            wrn16_3 wrn16_1 87.76±0.12 84.11±0.21 85.29±0.15 85.33±0.10 86.27±0.09
            wrn28_3 wrn16_1 88.65±0.10 84.11±0.21 85.15±0.59 85.26±0.03 85.70±0.09""") +
        of_pairs(LARGE, """
            wrn28_3 wrn16_3 88.65±0.10 87.76±0.12 89.07±0.10 89.16±0.07 89.30±0.10""")),
    "kd-early": Table(
        "ATang, Section 3.1", "does KD that stops early do better?", "cifar10", 5,
        of_pairs(ALONE | {"KD": "kd.py"} | {
            f"KD, teacher stopped at {part}": f"kd.py --teacher-epochs {part}E"
            for part in ("1/4", "2/5", "3/5")} | {
            f"KD until {part}, then CE": f"kd.py --distill-epochs {part}E"
            for part in ("2/5", "3/5", "4/5")},
                 "wrn16_3 wrn16_1 87.76±0.12 84.11±0.21 85.29±0.15 - - - - - -"),
        note="The paper says that it adopts early-stopped KD (Cho and Hariharan), which stops the "
             "teacher's training early, or the distillation; it names no epoch. --table lists the "
             "early teachers, which train within their rows."),
    "atang-3": Table("ATang, Table 3", "and on CINIC-10?", "cinic10", 5, of_pairs(ATANG, """
            wrn16_3 wrn16_1 84.15±0.04 79.49±0.08 80.87±0.04 80.83±0.06 80.98±0.02
            wrn28_3 wrn16_1 85.58±0.03 79.49±0.08 80.15±0.03 80.25±0.06 80.28±0.04
            wrn28_3 wrn16_3 85.58±0.03 84.15±0.04 85.36±0.14 85.50±0.03 85.53±0.02""")),
    "atang-4": Table("ATang, Table 4", "from unlike networks?", "cifar10", 5, of_pairs(ATANG, """
            resnet44    wrn16_1  86.41±0.20 84.11±0.21 85.44±0.06 85.15±0.16 85.97±0.17
            mobilenetv2 resnet20 89.61±0.11 85.20±0.17 87.28±0.15 87.44±0.10 87.88±0.07""")),
    "atang-5": Table("ATang, Table 5", "and on CINIC-10?", "cinic10", 5, of_pairs(ATANG, """
            wrn28_3 resnet20 85.58±0.03 80.72±0.05 81.31±0.20 81.70±0.04 81.73±0.03
            wrn16_3 resnet20 84.15±0.04 80.72±0.05 82.22±0.03 82.23±0.03 82.25±0.01
            wrn16_8 wrn28_1  86.30±0.04 81.32±0.07 81.56±0.03 82.40±0.04 82.58±0.08
            wrn28_6 wrn16_8  86.67±0.03 86.30±0.04 86.94±0.03 87.26±0.02 87.42±0.03""")),
    "atang-gamma": Table("ATang, Figure 5", "how large a weight gamma?", "cifar10", 5,
        sweep("atang.py", "gamma", "gamma", "1000 3000 5000 7000", """
            wrn16_3 wrn16_1 84.11±0.21 - - 86.27±0.09 -
            wrn28_3 wrn16_1 84.11±0.21 - - 85.70±0.09 -""") +
        [Row(f"gamma = {gamma}", f"atang.py --gamma {gamma}", "wrn28_3", "wrn16_3", paper)
         for gamma, paper in ((1000, "89.30 ± 0.10"), (5000, "88.83"))],
        note="The text's pair WRN28-3 to WRN16-3 stands below; its 88.83 has no std."),
    "atang-margin": Table("ATang, Figure 6", "how large a margin m?", "cifar10", 5,
        sweep("atang.py", "margin", "m", "1.0 1.35 1.5 2.0", """
            wrn16_3 wrn16_1 84.11±0.21 - 86.27±0.09 - -
            wrn28_3 wrn16_1 84.11±0.21 - 85.70±0.09 - -""")),
    "kd-lambda": Table("ATang, Figure S1", "how much weight for KD?", "cifar10", 5,
        sweep("kd.py", "kd-weight", "lambda", "0.1 0.3 0.5 0.7 0.9",
              "wrn16_3 wrn16_1 84.11±0.21 - - - - 85.29±0.15"),
        note="The text says tau = 0.4; read as 4, which every other table has."),
    "atang-gamma-cinic": Table("ATang, Figure S2", "gamma on CINIC-10?", "cinic10", 5,
        sweep("atang.py", "gamma", "gamma", "100 500 1000", """
            wrn16_3 wrn16_1 79.49±0.08 - 80.98±0.02 -
            wrn28_3 wrn16_1 79.49±0.08 - 80.28±0.04 -""")),
    "atang-margin-cinic": Table("ATang, Figure S3", "the margin on CINIC-10?", "cinic10", 5,
        sweep("atang.py", "margin", "m", "1.0 1.35 1.5 2.0", """
            wrn16_3 wrn16_1 79.49±0.08 - 80.98 80.92 80.90
            wrn28_3 wrn16_1 79.49±0.08 - 80.30 80.32 80.35""")),
    "overhaul-3": Table("Overhaul, Table 3", "does the overhaul beat KD and AT?", "cifar100", 5,
        of_settings(OVERHAUL, 0, 1, 2, 3, 4), "cifar100-heo",
        note="The paper trained (e)'s and (f)'s teacher with mixup, which it is not here. (e)'s "
             "baseline in the paper is (a)'s teacher, of batch 128. (c)'s KD and AT had, by Table "
             "8, the teacher's BatchNorm in training mode: here it is in evaluation mode, with "
             "which Table 8 has 73.55 and 73.58."),
    "overhaul-4": Table("Overhaul, Table 4", "and on ImageNet?", "imagenet", 1,
        of_pairs(ON_IMAGENET, """
            imagenet_resnet152 imagenet_resnet50  21.69 23.72 22.85 22.75 21.65
            imagenet_resnet50  imagenet_mobilenet 23.84 31.13 31.42 30.44 28.75""", errors=True),
        base="overhaul.py", published=True),
    "overhaul-6": Table("Overhaul, Table 6", "and for segmentation, in mIoU?", "voc", 1,
        of_pairs(on_voc("ResNet18"), "deeplab_resnet101 deeplab_resnet18 77.39 71.79 - 73.24") +
        of_pairs(on_voc("MobileNet_V2"),
                 "deeplab_resnet101 deeplab_mobilenetv2 77.39 68.44 - 71.36"), base="overhaul.py",
        note="The paper's mIoU is the test server's, ours that of val: whole pictures, the longer "
             "side 513. KD by pixels is ours. Batches of 6, as in the code for each GPU."),
    "overhaul-7": Table("Overhaul, Table 7", "is its output like the teacher's?", "cifar100", 5,
        [Row("baseline", "baseline", "wrn28_4", "wrn16_2", "72.68", {"KL": 0.7318, "CE": 1.0741}),
         Row("KD", "kd.py", "wrn28_4", "wrn16_2", "73.53", {"KL": 0.7064, "CE": 1.0758}),
         Row("AT", SKD["AT"], "wrn28_4", "wrn16_2", "73.44", {"KL": 0.7047, "CE": 1.0303}),
         Row("overhaul", "overhaul.py", "wrn28_4", "wrn16_2", "75.92",
             {"KL": 0.5723, "CE": 0.9585})], "cifar100-heo", ("KL", "CE"),
        note="KL's direction, teacher || student, is our reading. KD and AT: as in overhaul-3."),
    "overhaul-8": Table("Overhaul, Table 8", "which BatchNorm for the teacher?", "cifar100", 5,
        of_pairs({"baseline": "baseline", "of the batch": "overhaul.py",
                  "running": "overhaul.py --teacher-bn running"},
                 "wrn28_4 wrn16_2 27.32 24.08 24.54", errors=True), "cifar100-heo",
        note="The paper's other six methods in both modes are not here."),
    "overhaul-9": Table("Overhaul, Table 9", "what does each part add?", "cifar100", 5,
        of_pairs({
            "baseline": "baseline",
            "L2 at the end of the groups":
                "overhaul.py --position end --distance l2 --teacher-bn running",
            "+ before the ReLU": "overhaul.py --distance l2 --teacher-bn running",
            "+ statistics of the batch": "overhaul.py --distance l2",
            "+ margin ReLU, partial L2": "overhaul.py"},
                 "wrn28_4 wrn16_2 27.32 26.37 24.81 24.68 24.08", errors=True), "cifar100-heo"),
    "overhaul-11": Table("Overhaul, Table 11", "is the last layer enough?", "cifar100", 5,
        of_settings(ALONE | {"all layers": "overhaul.py",
                             "the last layer": "overhaul.py --layers last"}, 0, 1, 4, 5),
        "cifar100-heo", note="The paper's single layer is read as the last; see overhaul-3."),
    "fsp-1": Table(
        "FSP, Table 1 of Liu's report", "does FSP save two thirds of the training?", "cifar100", 3,
        [Row("baseline", "baseline", "resnet32", "resnet32", "64.15", {"ensemble": 69.3}),
         Row("a third of the epochs", "baseline --recipe cifar100-third --epochs 54/164E",
             "resnet32", "resnet32", "61.32", {"ensemble": 67.2}),
         Row("FSP, then a third", "fsp.py --recipe cifar100-third --epochs 54/164E --fsp-epochs "
             "82/164E --shared-stage1", "resnet32", "resnet32", "64.65", {"ensemble": 68.8})],
        measured=("ensemble",), base="fsp.py"),
    "skd-1": Table("SKD, Table 1", "does KD get worse from larger teachers?", "cifar100", 3,
        by_teacher(growing("teacher", "teacher", OF_TEACHERS, {}),
                   growing("KD", "kd.py", OF_KD, SOFT_LOSS)), measured=("soft loss",),
        note=SOFT_NOTE),
    "skd-2": Table("SKD, Table 2", "do entropy and free energy part?", "cifar100", 3,
        by_teacher(growing("KD", "kd.py", "", KD_GAPS | {
                       "S teacher": "0.74 0.45 0.35 0.22 0.09",
                       "F teacher": "13.11 13.84 14.45 15.37 16.13"}),
                   growing("SKD", "skd.py", "", SKD_GAPS)), measured=GAPS),
    "skd-3": Table("SKD, Table 3", "does SKD beat KD and AT?", "cifar100", 3,
        of_pairs(SKD | {"FSP": "fsp.py"}, """
            wrn40_2    wrn16_2   75.61 73.26 74.92 74.08 75.75 72.91
            wrn40_2    wrn40_1   75.61 71.98 73.54 72.77 75.06 -
            resnet56   resnet20  72.34 69.06 70.66 70.55 72.08 69.95
            resnet110  resnet20  74.31 69.06 70.67 70.22 72.12 70.11
            resnet110  resnet32  74.31 71.14 73.08 72.31 74.09 71.89
            resnet32x4 resnet8x4 79.42 72.50 73.33 73.44 76.40 72.62
            vgg13      vgg8      74.64 70.36 72.98 71.43 74.17 70.23"""), "cifar100-crd",
        note="The paper's rows but SKD's are CRD's. FSP's pair of unlike widths, -, has connectors "
             "here; its stage 1 has CRD's 30 epochs, at a rate and weight of ours."),
    "skd-4": Table("SKD, Table 4", "and from unlike networks?", "cifar100", 3,
        of_pairs(SLOW, "resnet50 mobilenetv2_half 79.34 64.60 67.35 58.58 69.26") +
        of_pairs(SKD, "resnet50 vgg8 79.34 70.36 73.81 71.84 74.41") + of_pairs(SLOW, """
            resnet32x4 shufflenetv1     79.42 70.50 74.07 71.73 75.08
            resnet32x4 shufflenetv2     79.42 71.82 74.45 72.73 76.02
            wrn40_2    shufflenetv1     75.81 70.50 74.83 73.32 76.42""")),
    "skd-5": Table("SKD, Table 5 and Figure 1b", "and on ImageNet?", "imagenet", 1,
        of_pairs({"baseline": "baseline", "KD": "kd.py", "AT": f"{SKD['AT']} --nesterov "
                  "--milestones 0.3 0.6 0.8 0.9", "SKD": "skd.py"},
                 "imagenet_resnet34 imagenet_resnet18 69.8 69.20 70.70 72.80"), published=True),
    # its KD from ResNet34 is another number than Table 5's
    "skd-6": Table("SKD, Table 6", "from larger teachers on ImageNet?", "imagenet", 1,
        [Row("baseline", "baseline", "imagenet_resnet34", "imagenet_resnet18")] +
        of_pairs({"KD": "kd.py", "SKD": "skd.py"}, """
            imagenet_resnet34  imagenet_resnet18 69.43 72.80
            imagenet_resnet50  imagenet_resnet18 69.05 73.01
            imagenet_resnet101 imagenet_resnet18 68.91 72.85
            imagenet_resnet152 imagenet_resnet18 68.84 72.70"""), published=True),
    "skd-7": Table("SKD, Table 7, Figure 1a", "and SKD from larger teachers?", "cifar100", 3,
        by_teacher(growing("teacher", "teacher", OF_TEACHERS, {}),
                   growing("KD", "kd.py", OF_KD, KD_GAPS | SOFT_LOSS),
                   growing("SKD", "skd.py", "68.2 68.7 68.9 68.8 69.2",
                           SKD_GAPS | {"soft loss": "0.9 1.2 1.3 1.4 1.6"})), measured=GAPS,
        note=SOFT_NOTE),
}


# === Runs: their logs, in folders and in a file, and the commands that made them ================

@functools.lru_cache
def records(file: Path) -> dict[str, list | dict]:
    """Logs and measurements in a file, by their path below the folder it was made of."""
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        return {Path(line["label"], line["run"]).as_posix(): line.get("log") or line["measured"]
                for line in lines}
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{file} is no file of recorded runs") from None


def file_of(path: Path) -> Path | None:
    """The file of recorded runs that a path leads into, as if that were a folder."""
    return next((part for part in (path, *path.parents) if part.suffix == ".jsonl"), None)


def log_of(run: Path) -> list[dict]:
    """A run's log, its header first; empty where there is none, or none of ours."""
    if file := file_of(run):
        return records(file).get(run.relative_to(file).as_posix(), [])
    try:
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        whole = "settings" in log[0] and all("test" in row for row in log[1:])
        return log if whole else []
    except (OSError, ValueError, TypeError, IndexError):
        return []


def runs_below(place: Path) -> list[Path]:
    if file := file_of(place):
        runs = [file / name for name in records(file) if not name.endswith(".json")]
        return sorted(run for run in runs if place in (run, *run.parents))
    return sorted(path.parent for path in place.rglob("log.jsonl"))


def complete(run: Path) -> list[dict]:
    """The log of a finished run; empty where it is not."""
    log = log_of(run)
    epochs = log[0]["settings"].get("epochs") if log else None
    if early := re.fullmatch(r"baseline/\w+-(\d+)", "/".join(run.parts[-3:-1])):
        epochs = int(early[1])
    return log if len(log) - 1 == epochs else []


def student_of(run: Path) -> str:
    """The name of a run's network."""
    names = [part for part in run.parent.name.split("-") if not part.isdigit()]
    return names[-1]        # of wrn16_3-wrn16_1, and of an early-stopped wrn16_3-100


def options(words: Iterable[str]) -> list[list[str]]:
    """["--lr=0.1", "--baseline"] -> [["--lr", "0.1"], ["--baseline"]]"""
    groups = []
    for word in words:
        if word.startswith("--"):
            groups.append(word.split("=", 1))
        else:
            groups[-1].append(word)
    return groups


@functools.lru_cache(maxsize=None)
def parsed(script: str, words: tuple[str, ...]) -> argparse.Namespace:
    """What a script makes of its command line; UserError, in its words, where it refuses it."""
    said = io.StringIO()
    try:
        with mock.patch.object(sys, "argv", [script, *words]), contextlib.redirect_stderr(said):
            return importlib.import_module(Path(script).stem).parse_args()
    except ModuleNotFoundError:
        raise UserError(f"there is no script {Path(script).name} beside common.py") from None
    except SystemExit:
        raise UserError(said.getvalue().strip().split("\n")[-1]) from None


def command_of(run: Path) -> argparse.Namespace:
    """What a run's command means today, whatever device this machine has."""
    script, *words = log_of(run)[0]["command"]
    return parsed(script, (*words, "--device", "cpu"))


def changed(run: Path, args: argparse.Namespace) -> list[str]:
    """What a run had otherwise than today's command, which parsed is args: settings, script.

    Not compared: bf16, whose default depends on the device, the weights of --student-ckpt, which
    the command names, the split, which a folder's name has where it is typed ("val" is measured,
    too, where there is no test split), and the script of a recorded run.
    """
    header = log_of(run)[0]
    keys = [key for key, value in header["settings"].items()
            if key not in ("bf16", "start", "split") and value != getattr(args, key, value)]
    script = ROOT / Path(header["command"][0]).name
    if "script" in header["settings"] and (run / "last.pt").exists():
        text = script.read_text("utf-8") if script.exists() else ""
        if not hashlib.sha256(text.encode()).hexdigest().startswith(header["settings"]["script"]):
            keys.append("script")
    return keys


# === Running a table ============================================================================
PLACES = ("--data-dir", "--device", "--out", "--runs", "--seed")     # which decide no number
TAKEN = ("--seed", "--teacher-epochs", "--baseline", "--out")        # not for all rows
EVERYWHERE = "cifar10-jeon"     # the recipe that every script has, for all data sets but shapes


class Job(NamedTuple):
    """One process: a script's command line, and the folders of the runs that it finishes."""
    line: tuple[str, ...]
    runs: tuple[Path, ...]
    teacher: Path | None        # the run that has to be finished before


class Plan:
    """A table as it is to be run: its rows after the replacements, and their jobs."""

    def __init__(self, name: str, args: argparse.Namespace, extra: list[str]):
        self.table, self.args = TABLES[name], args
        self.extra = [word for group in options(extra) for word in group]
        self.extra += ["--data-dir", str(args.data_dir)] if args.data_dir else []
        self.dataset = args.dataset or self.table.dataset
        self.runs = args.runs or self.table.runs
        if args.teacher_ckpt and any("--teacher-epochs" in row.command for row in self.table.rows):
            raise UserError(f"{name} stops teachers of its own: leave out --teacher-ckpt")
        self.published = (self.table.published and self.dataset == self.table.dataset
                          and not args.teacher)
        self.ready = bool(self.published or args.teacher_ckpt)      # no teacher is to be trained
        in_folder = self.dataset == "folder" and args.data_dir
        self.folder = args.data_dir.resolve().name if in_folder else ""
        # else its numbers are of other networks, or of another data set
        self.of_paper = (not args.teacher and not args.student
                         and self.table.dataset in (self.dataset, self.folder))
        self.title = f"{name} ({self.table.paper}), {self.dataset} {self.folder}".strip()
        rows = {}
        for row in self.table.rows:
            if args.teacher_ckpt and row.command.startswith("teacher"):
                continue
            row = row._replace(teacher=args.teacher or row.teacher,
                               student=args.student or row.student)
            if args.teacher and args.student:       # settings a to f are one
                row = row._replace(label=re.sub(r"^\(.\) ", "", row.label))
            rows.setdefault((row.label, row.teacher, row.student), row)
        self.rows, self.refused, self.epochs = list(rows.values()), set(), 1
        baseline = self.rows[0]._replace(command="baseline")
        self.epochs = parsed(*self.command(baseline)).epochs        # 3/4E is a part of them

    def own_words(self, row: Row) -> tuple[str, list[str]]:
        """A row's script, and the flags that tell its runs from others."""
        script, *words = row.command.split()
        if script in ALONE:
            script, words = self.table.base, ["--baseline", *words]
        if self.table.recipe:
            words = ["--recipe", self.table.recipe, *words]
        words = [str(max(1, round(Fraction(word[:-1]) * self.epochs)))
                 if word[0].isdigit() and word.endswith("E") else word for word in words]
        if self.args.epochs and "--epochs" not in words:
            words += ["--epochs", str(self.args.epochs)]
        if self.dataset != self.table.dataset:      # another data set has recipes of its own
            kept = [group for group in options(words)
                    if group[0] not in ("--recipe", "--student-ckpt") or
                    group[1] == EVERYWHERE and self.dataset not in ("shapes", "scenes")]
            words = [word for group in kept for word in group]
        return script, words + self.extra

    def command(self, row: Row) -> tuple[str, tuple[str, ...]]:
        """Script and words, whole but for seed, teacher's checkpoint and folder."""
        script, words = self.own_words(row)
        networks = ["--student", row.teacher if row.command.startswith("teacher") else row.student]
        if "--baseline" not in words:
            networks = ["--teacher", row.teacher, *networks]
        return script, ("--dataset", self.dataset, *networks, *words)

    def run(self, row: Row, seed: int) -> Path:
        """out/<flags>/<data set>/<recipe>/<method>/<networks>/seed<k>"""
        args, (script, words) = parsed(*self.command(row)), self.own_words(row)
        named = ["-".join(group)[2:] for group in options(words)
                 if group[0] not in ("--baseline", "--recipe", "--loss", *PLACES)]
        method, networks = Path(script).stem, f"{row.teacher}-{row.student}"
        if getattr(args, "loss", "atang") != "atang":
            method += f"-{args.loss}"
        if args.baseline:
            method, networks = "baseline", args.student
        elif self.args.teacher_ckpt:
            named.append("from-" + re.sub(r"[\\/:]+", "-", str(self.args.teacher_ckpt)).strip("-"))
        named += [self.folder] if self.folder else []
        return self.args.out.joinpath("_".join(named), self.dataset, args.recipe, method, networks,
                                      f"seed{seed}")

    def teacher_row(self, row: Row) -> Row:
        """The row of its teacher: the table's, which may have flags, or one made up."""
        own = (other for other in self.rows if other.command.startswith("teacher")
               and (other.teacher, other.student) == (row.teacher, row.student))
        return next(own, row._replace(command="teacher"))

    def checkpoint(self, row: Row) -> Path:
        if self.published and not self.args.teacher_ckpt:
            name = row.teacher.replace("imagenet_resnet", "ResNet")
            return Path(f"{name}_Weights.IMAGENET1K_V1")
        return self.args.teacher_ckpt or self.run(self.teacher_row(row), 0) / "last.pt"

    def job(self, row: Row, seeds: Iterable[int]) -> Job:
        script, words = self.command(row)
        runs, teacher = tuple(self.run(row, seed) for seed in seeds), None
        if "--baseline" not in words and "--teacher-epochs" not in words:
            words += "--teacher-ckpt", str(self.checkpoint(row))
            teacher = None if self.ready else self.run(self.teacher_row(row), 0)
        words += "--seed", str(seeds[0]), "--out", str(runs[0].parents[4])
        if len(seeds) > 1:
            words += "--runs", str(len(seeds))
        return Job((script, *words), runs, teacher)

    def jobs(self) -> list[Job]:
        """Teachers first, then seed after seed of all rows."""
        jobs = []
        for row in self.rows:
            alone = row.command.startswith("baseline") and "KL" not in self.table.measured
            if not alone and not self.ready:
                jobs.append(self.job(self.teacher_row(row), [0]))
        for seed in range(self.runs):
            for row in self.rows:
                if row.command.startswith("teacher"):
                    continue
                if not re.search("--shared-stage1|--teacher-epochs", row.command):
                    jobs.append(self.job(row, [seed]))
                elif seed == 0:     # one process, since they share it, or their teacher
                    jobs.append(self.job(row, range(self.runs)))
        return list({job.runs[0]: job for job in jobs}.values())

    def logs(self, row: Row) -> dict[int, list[dict]]:
        """By seed the logs of a row's finished runs, of today's settings and script."""
        logs = {}
        for seed in range(1 if row.command.startswith("teacher") else self.runs):
            run = self.run(row, seed)
            log = [] if run in self.refused else complete(run)
            if log and (keys := changed(run, parsed(*self.command(row)))):
                print(f"left out: {run}, made with another {', '.join(keys)} than today's")
            elif log:
                logs[seed] = log
        return logs


def teacher_file(run: Path, args: argparse.Namespace) -> Path:
    """Where a run's command has its teacher, or where its script keeps the one that it trains."""
    early = f"-{args.teacher_epochs}" if args.teacher_epochs else ""
    own = f"baseline/{args.teacher}{early}/seed0/last.pt"
    return args.teacher_ckpt or run.parents[2] / own


def is_finished(job: Job) -> bool:
    """Whether today's command made all its runs; if not, the script itself decides."""
    args = parsed(job.line[0], job.line[1:])
    for run in job.runs:
        weights = run / "last.pt"
        teacher = weights if args.baseline else teacher_file(run, args)
        given = args.teacher_ckpt and not job.teacher       # it need not be a file
        if not (complete(run) and weights.exists()) or changed(run, args):
            return False
        if not teacher.exists() and not given:
            return False
        if teacher.exists() and weights.stat().st_mtime < teacher.stat().st_mtime:
            return False        # it learnt from another one
    return True


def die_with_parent() -> None:
    """A kill -9 of the driver ends its runs too, where the system can (Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)      # PR_SET_PDEATHSIG


def run_all(plan: Plan, slots: int) -> dict[Job, str]:
    """Run what is not finished, `slots` at a time; what failed, with its last line."""
    jobs = plan.jobs()
    waiting = [job for job in jobs if not is_finished(job)]
    if waiting and plan.dataset.startswith("cifar"):        # fetched once, not by two runs
        read_cifar(plan.dataset, plan.args.data_dir or Path("data"), train=True)
    running, failed, count, begun = {}, {}, len(waiting), time.time()
    print(f"{len(jobs) - count} of {len(jobs)} runs are finished, {count} to go", flush=True)
    unfinished = {job.runs[0] for job in waiting}
    # one thread each, and a share of the cores to read pictures: more would wait for each other
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(slots),
                                "PYTHONUNBUFFERED": "1"}
    bound = die_with_parent if sys.platform == "linux" else None
    try:
        while waiting or running:
            for job in list(waiting):
                if job.teacher in {other.runs[0] for other in failed}:
                    waiting.remove(job)
                    failed[job] = "its teacher is not finished"
                elif len(running) < slots and job.teacher not in unfinished:
                    waiting.remove(job)
                    output = tempfile.TemporaryFile("w+")
                    process = subprocess.Popen(
                        [sys.executable, str(ROOT / job.line[0]), *job.line[1:]], env=environment,
                        stdout=output, stderr=subprocess.STDOUT, preexec_fn=bound)
                    running[job] = process, output, time.time()
            time.sleep(0.1)
            for job, (process, output, own) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[job]
                unfinished.discard(job.runs[0])
                output.seek(0)
                lines = [line for line in output.read().split("\n") if line.strip()]
                logs = [complete(run) for run in job.runs]
                told = " ".join(f"{log[-1]['test']:.2f} %" for log in logs if log)
                if process.returncode or not all(logs):
                    last = lines[-1].split("\r")[-1] if lines else "no output"
                    failed[job] = last if process.returncode > 0 else (
                        f"ended by {process.returncode}, after: {last}")
                    told = f"failed: {failed[job]}"
                ended, now = count - len(waiting) - len(running), time.time()
                left = f", about {(now - begun) / ended * (count - ended) / 60:.0f} min left"
                print(f"[{ended}/{count}{left if ended < count else ''}] {told}, "
                      f"{(now - own) / 60:.1f} min: {' '.join(job.line)}", flush=True)
    finally:        # Ctrl-C reaches the runs too: they keep what is finished, and so do we
        for process, *_ in running.values():
            process.terminate()
        for process, *_ in running.values():
            process.wait()
    return failed


# === Printing tables ============================================================================

def spread(values: list[float]) -> str:
    std = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{std}" if values else ""


def print_aligned(lines: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(map(str.ljust, line, widths)).rstrip())


def print_markdown(lines: list[list[str]]) -> None:
    for number, line in enumerate(lines):
        print("|" + "".join(f" {cell} |" if cell else " |" for cell in line))
        if number == 0:
            print("|" + "---|" * len(line))


def gain(tests: dict[int, float], base: dict[int, float]) -> str:
    """The mean difference, seed by seed, and its standard error."""
    differences = [tests[seed] - base[seed] for seed in sorted(tests.keys() & base.keys())]
    if len(differences) < 2:
        return "".join(f"{difference:+.2f}" for difference in differences)
    return f"{mean(differences):+.2f} ± {stdev(differences) / math.sqrt(len(differences)):.2f}"


def minutes(run: Path) -> float:
    """What a run took, FSP's first stage with it."""
    epochs = complete(run)[1:] + complete(run.parent / "stage1" / run.name)[1:]
    return sum(row["seconds"] for row in epochs) / 60


def show(plan: Plan) -> None:
    """The table in Markdown: the paper's accuracies, ours, the gain and its standard error."""
    logs = {row[:4]: plan.logs(row) for row in plan.rows}
    tests = {key: {seed: log[-1]["test"] for seed, log in own.items()} for key, own in logs.items()}
    several = len({(row.teacher, row.student) for row in plan.rows}) > 1
    compared = any(row.paper for row in plan.rows) and plan.of_paper
    cells = [["", *["networks"] * several, *["paper", "paper's gain"] * compared, "here", "gain",
              "runs", "minutes"]]
    for row in plan.rows:
        own, papers = tests[row[:4]], [row.paper, ""]
        # the row of the student alone, the pair's own before others
        alone = [other for other in plan.rows if other.student == row.student
                 and other.label.split()[-1] == "baseline" and row.label.split()[-1] not in ALONE]
        baseline = min(alone, key=lambda other: other.teacher != row.teacher, default=None)
        networks = {"teacher": row.teacher, "baseline": row.student}.get(
            row.command.split()[0], f"{row.teacher} to {row.student}")
        if baseline and row.paper and baseline.paper:
            papers[1] = f"{float(row.paper.split()[0]) - float(baseline.paper.split()[0]):+.2f}"
        took = [minutes(plan.run(row, seed)) for seed in own]
        cells.append([row.label, *[networks] * several, *papers * compared,
                      spread([*own.values()]), gain(own, tests[baseline[:4]]) if baseline else "",
                      str(len(own)), f"{mean(took):.1f}" if own else ""])
    found = [log[0]["settings"] for own in logs.values() for log in own.values()]
    split = found[0]["split"] if found else "val" if "val" in plan.extra else "test"
    score = parsed(*plan.command(plan.rows[0])).score
    print(f"\n{plan.title}; {split} {score} in per cent; {' '.join(sys.argv[1:])}")
    print_markdown(cells)
    if len({settings.get("bf16") for settings in found}) > 1:
        print("\nSome of these runs are in bfloat16, others in float32.")
    taught = {}     # the hashes of each teacher; in earlier logs they are longer
    for row in plan.rows:
        for log in logs[row[:4]].values():
            known = log[0]["settings"].get("teacher_hash")
            if known and "--teacher-epochs" not in row.command:     # which stops one of its own
                taught.setdefault(plan.checkpoint(row), set()).add(known[:8])
    for path, hashes in taught.items():
        if len(hashes) > 1:
            print(f"\nThese students have learnt from {len(hashes)} teachers: {path} has been "
                  f"exchanged, or trained again.")
    if plan.table.note and plan.of_paper:
        print("\n" + plan.table.note)
    if plan.table.measured:
        show_measured(plan, tests)


def differences(settings: list[dict], left_out: Iterable[str] = ()) -> list[str]:
    """Of each the settings that are not the same in all: ["temperature 2", "temperature 4"]."""
    texts = [{} for _ in settings]
    for text, own in zip(texts, settings):
        for key, value in own.items():
            if value is None or key in ("class_names", "mean", "std", *left_out):
                continue        # what comes with the data set is long
            values = value if isinstance(value, list) else [value]
            words = [f"{word:g}" if isinstance(word, float) else str(word) for word in values]
            text[key] = " ".join(words)[:8 if key == "teacher_hash" else None]
    keys = [key for key in dict.fromkeys(key for text in texts for key in text)
            if len({text.get(key) for text in texts}) > 1]
    return [", ".join(f"{key.replace('_', '-')} {text[key]}" for key in keys if key in text)
            for text in texts]


def finished_below(place: Path) -> dict[Path, list[dict]]:
    """The logs of the finished runs in a folder of runs, or in a file of recorded ones."""
    found = {run: log for run in runs_below(place) if (log := complete(run))}
    if min((len(run.relative_to(place).parts) for run in found), default=0) < 5:
        raise UserError(f"{place} holds no finished run: name the folder of the runs, in which the "
                        f"data sets' lie, or a file of recorded runs")
    return found


def list_runs(place: Path, file: Path | None = None) -> None:
    """Every finished run, the seeds of equal settings in one line; the gain on the baseline."""
    tests, settings = {}, {}
    for run, log in finished_below(place).items():
        parts = run.relative_to(place).parts
        if "stage1" not in parts:
            key = ("/".join(parts[:-5]), *parts[-5:-1], str(len(log) - 1),
                   json.dumps(log[0]["settings"], sort_keys=True))
            tests.setdefault(key, {})[parts[-1]] = log[-1]["test"]
            settings[key] = ({"start": None, "optimizer": "SGD"} | log[0]["settings"]).items()
    lines = [["folder", "data", "recipe", "method", "networks", "epochs", "mean %",
              "std", "seeds", "gain", "settings that differ"]]
    for key, own in tests.items():
        alike = [other for other in tests if other[1:5] == key[1:5]]
        named = differences([dict(settings[other]) for other in alike], ["epochs"])
        alone = (*key[1:3], "baseline", key[4].split("-")[-1])
        # its settings decide, in its own folder or else in any
        bases = [other for other in tests if other[1:5] == alone != key[1:5]
                 and settings[other] <= settings[key] and own.keys() <= tests[other].keys()]
        base = min(bases, key=lambda other: other[0] != key[0], default=None)
        told = gain(own, tests[base]).split(" ")[0] if base else ""
        middle, _, std = spread([*own.values()]).partition(" ± ")
        lines.append([*key[:6], middle, std, str(len(own)), told, named[alike.index(key)]])
    print_aligned(lines)
    if file:
        with file.open("w", newline="") as opened:
            csv.writer(opened).writerows(lines)


def record(source: Path, place: Path) -> None:
    """Put the logs of all finished runs, and what was measured of them, into a file, a run a line.

    The target may be FILE/label, whose runs `--out FILE/label --show` prints. A line that the file
    has of the same run is replaced; the commands' absolute paths are cut.
    """
    target = file_of(place) or place
    kept = dict(records(target)) if target.exists() else {}
    found, below = finished_below(source), place.relative_to(target)
    names = {run: (below / run.relative_to(source)).as_posix() for run in found}
    replaced = kept.keys() & set(names.values())
    for run, (header, *rows) in found.items():
        command = [Path(word).name if word.startswith("/") else word for word in header["command"]]
        kept[names[run]] = [header | {"command": command}, *rows]
    for path in source.rglob("measured*.json"):
        kept[(below / path.relative_to(source)).as_posix()] = json.loads(path.read_text())
    aside = target.with_suffix(".tmp")
    with aside.open("w") as file:
        for name in sorted(kept):
            parts, kind = name.split("/"), "log" if isinstance(kept[name], list) else "measured"
            first = len(parts) - (6 if "stage1" in parts else 5)
            line = {"label": "/".join(parts[:first]), "run": "/".join(parts[first:])}
            print(json.dumps(line | {kind: kept[name]}), file=file)
    aside.replace(target)
    records.cache_clear()
    print(f"{len(found)} finished runs of {source} are recorded in {place}" +
          f", {len(replaced)} of them in place of others" * bool(replaced))


# === Measuring finished runs ====================================================================

load_once = functools.lru_cache(load_data)


def images_of(run: Path, data_dir: Path | None) -> Loader:
    """What a run was measured on; the data set where the run's command had it."""
    own, args = log_of(run)[0]["settings"], command_of(run)
    train, measured = load_once(
        args.dataset, data_dir or args.data_dir, 100, "cpu", augment=False, seed=0,
        split=own["split"], image_size=own["image_size"])
    now = train.settings
    if (own["images"][1], own["class_names"]) != (now["images"][1], now["class_names"]):
        raise UserError(f"{run} was measured on other images than its data set has now")
    return measured


def network_of(name: str, path: Path, loader: Loader) -> nn.Module:
    network = create_model(name, loader.num_classes)
    load_weights(network, path)
    return network.eval().requires_grad_(False)


@functools.lru_cache
@torch.no_grad()
def logits_of(name: str, path: Path, loader: Loader) -> Tensor:
    network = network_of(name, path, loader)
    return torch.cat([network(images) for images, _ in loader]).double()


def teacher_of(run: Path, loader: Loader, given: Path | None) -> tuple[str, Path]:
    """Name and checkpoint of the teacher that a run learnt from, known by its recorded hash.

    It lies at `given`, or where the run's command had it, or in the baseline's folder beside.
    """
    args, name = command_of(run), run.parent.name.split("-")[0]
    path = given or teacher_file(run, args)
    # a path in a command was relative to where that ran, which is often above the run
    places = [above / path for above in (Path(), *run.parents)]
    path = next((place for place in places if place.is_file()), path)
    weights = network_of(name, path, loader).state_dict().values()
    found = hashlib.sha256(b"".join(x.numpy().tobytes() for x in weights)).hexdigest()
    if not found.startswith(log_of(run)[0]["settings"]["teacher_hash"]):
        raise UserError(f"{path} is not the teacher of {run}, whose settings name another hash")
    return name, path


def entropy(logits: Tensor, temperature: float) -> Tensor:
    """Eq. 4: S of softmax(z / tau); logits (N, K) -> (N,), in nats."""
    log_p = F.log_softmax(logits / temperature, dim=1)
    return -(log_p.exp() * log_p).sum(dim=1)


def free_energy(logits: Tensor, temperature: float) -> Tensor:
    """Eq. 5: F = tau log sum_i e^(z_i / tau); logits (N, K) -> (N,), in units of a logit."""
    return temperature * torch.logsumexp(logits / temperature, dim=1)


def theorems(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple:
    """Theorems 1 (its constant halved) and 2: what G_entropy and G_f are close to.

    (N, K) each -> two of (N,), in nats and in units of a logit. Logits are centred, as assumed;
    holds where 2 tau^2 K is large beside their squared lengths. The paper has 1 / (K tau^2) in
    Theorem 1, twice too much, since its proof stops at first order (Eq. 8): the second-order term
    inside the two logarithms halves it. Theorem 2's constant is right.
    """
    z = student_logits - student_logits.mean(dim=1, keepdim=True)
    v = teacher_logits - teacher_logits.mean(dim=1, keepdim=True)
    difference = v.square().mean(dim=1) - z.square().mean(dim=1)    # (||v||^2 - ||z||^2) / K
    return difference / (2 * temperature ** 2), difference / (2 * temperature)


def gaps(z: Tensor, v: Tensor, temperature: float) -> dict[str, float]:
    """Eq. 4 to 6 and 10 of SKD's paper and its theorems; z the student's logits, v the teacher's.

    Entropy does not see a constant added to all logits, free energy does: raw, and centred.
    """
    values = {"S student": entropy(z, temperature), "S teacher": entropy(v, temperature)}
    values["G_entropy"] = values["S student"] - values["S teacher"]
    values["theorem 1"], theorem_2 = theorems(z, v, temperature)
    values |= {"F student": free_energy(z, temperature), "F teacher": free_energy(v, temperature)}
    values["G_f"] = values["F teacher"] - values["F student"]
    values["G_f centred"] = values["G_f"] - (v.mean(dim=1) - z.mean(dim=1))
    values["theorem 2"] = theorem_2
    return {name: value.mean().item() for name, value in values.items()}


def aligned(z: Tensor, v: Tensor, scale: float | str) -> tuple[Tensor, Tensor]:
    """Both logits as SKD's loss compares them: of the networks' own it does not see the length."""
    if scale == "teacher":
        return z / z.std(dim=1, keepdim=True).clamp(min=1e-3) * v.std(dim=1, keepdim=True), v
    if scale == "literal":
        return spherical(z), spherical(v)
    length = scale * math.sqrt(z.shape[1])
    return spherical(z, length, center=True), spherical(v, length, center=True)


class Outputs(NamedTuple):
    """What the network of a finished run says of the images that it was measured on."""
    loader: Loader              # of these images
    accuracy: float             # per cent
    probabilities: Tensor       # (N, K)
    values: dict[str, dict]     # "": CE, KL(teacher || student), top-5; gaps by temperature


def outputs(run: Path, data_dir: Path | None, teacher: tuple[str, Path] | None = None) -> Outputs:
    """`teacher`, name and checkpoint, for a baseline; any other run may find its own."""
    if not log_of(run):
        raise UserError(f"{run} has no log.jsonl: name the folder of a run, .../seed0")
    settings, loader = log_of(run)[0]["settings"], images_of(run, data_dir)
    if loader.pixels:
        raise UserError(f"{run}: what is measured here are the classes of pictures, not of pixels")
    if "teacher_hash" in settings:
        teacher = teacher_of(run, loader, teacher and teacher[1])
    z, labels = logits_of(student_of(run), run / "last.pt", loader), loader.labels
    accuracy = 100 * (z.argmax(1) == labels).double().mean().item()
    values = {"": {"CE": F.cross_entropy(z, labels).item()}}
    if loader.num_classes > 5:
        right = z.topk(5).indices == labels[:, None]
        values[""]["top-5"] = 100 * right.any(1).double().mean().item()
    if teacher:
        v = logits_of(*teacher, loader)
        values[""]["KL"] = kd_loss(z, v, temperature=1.0).item()
        for temperature in sorted({1.0, settings.get("temperature", 1.0)}):
            values[f"{temperature:g}"] = gaps(z, v, temperature)
            if run.parent.parent.name == "skd" and settings["scale"] != "none":
                seen = aligned(z, v, settings["scale"])
                values[f"{temperature:g}, aligned"] = gaps(*seen, temperature)
    return Outputs(loader, accuracy, z.softmax(1), values)


def ensemble(of: list[Outputs]) -> float:
    """Accuracy of the mean probabilities, in per cent."""
    together = sum(one.probabilities for one in of).argmax(1) == of[0].loader.labels
    return 100 * together.double().mean().item()


OF_OUTPUTS = """
accuracy       images classified correctly, in per cent; higher is better
cross-entropy  with the labels, in nats per image; lower is better
KL             from the teacher's probabilities, tau = 1, in nats; lower: more like the teacher
top-5          images whose class is among the five likeliest, in per cent, of six classes or more
ensemble       accuracy of the runs' mean probabilities, in per cent; higher is better"""
OF_GAPS = """
tau            what the logits are divided by; aligned: scaled as SKD's loss compares them
S              entropy of softmax(logits / tau), in nats, 0 (certain) to log K; neither is better
G_entropy      S student - S teacher, in nats; nearer to 0: as certain as the teacher
theorem 1      what G_entropy should be by SKD's Theorem 1, its constant halved, in nats
F              free energy, tau log sum exp(logits / tau), in logits; no direction is better
G_f            F teacher - F student, in logits; nearer to 0: a better match
G_f centred    G_f of logits whose mean was subtracted, image by image
theorem 2      what G_f centred should be by SKD's Theorem 2, in logits"""


def measure(runs: list[Path], data_dir: Path | None, teacher: Path | None) -> None:
    measured, lines = [], []
    for run in (run.resolve() for run in runs):
        if file_of(run):
            raise UserError(f"{run}: recorded runs have no weights to measure")
        name, *student = run.parent.name.split("-")
        one = outputs(run, data_dir, (name, teacher) if teacher and student else None)
        if measured and one.loader is not measured[0].loader:
            raise UserError(f"{run} was measured on other images than the run before it: measure "
                            f"them one by one")
        measured.append(one)
        found = one.values.pop("")
        more = f", KL(teacher || student) {found['KL']:.4f}" if "KL" in found else ""
        more += f", top-5 {found['top-5']:.2f} %" if "top-5" in found else ""
        print(f"{run}: {log_of(run)[0]['settings']['split']} accuracy {one.accuracy:.2f} %, "
              f"cross-entropy {found['CE']:.4f}{more}")
        for temperature, values in one.values.items():
            lines.append(["/".join(run.parts[-3:]), temperature,
                          *(f"{round(value, 4) + 0:.4f}" for value in values.values())])
    if lines:
        print_aligned([["run", "tau", *values], *lines])
        print(OF_GAPS)
    if len(runs) > 1:
        print(f"average {mean(one.accuracy for one in measured):.2f} %, "
              f"ensemble {ensemble(measured):.2f} %")
    print(OF_OUTPUTS)


def measurements(plan: Plan, row: Row, runs: list[Path]) -> dict[str, dict]:
    """Means over a row's runs, by temperature; kept in a file, which outlives the checkpoints."""
    wanted = plan.table.measured
    kept = runs[0].parent / (f"measured-{row.teacher}.json" if "KL" in wanted else "measured.json")
    if file := file_of(kept):
        return records(file).get(kept.relative_to(file).as_posix(), {}).get("means", {})
    needed, teacher = [run / "last.pt" for run in runs], None
    if "KL" in wanted or not row.command.startswith("baseline"):
        teacher = row.teacher, plan.checkpoint(row)
        needed.append(teacher[1])
    there, names = [path for path in needed if path.exists()], [run.name for run in runs]
    if kept.exists() and all(kept.stat().st_mtime >= path.stat().st_mtime for path in there):
        known = json.loads(kept.read_text())
        if known["runs"] == names:
            return known["means"]
    if len(there) < len(needed):
        return {}
    try:
        measured = [outputs(run.resolve(), plan.args.data_dir, teacher) for run in runs]
    except UserError as error:      # a teacher that was trained anew, say
        print(f"not measured: {error}")
        return {}
    means = {temperature: {key: mean(one.values[temperature][key] for one in measured)
                           for key in values} for temperature, values in measured[0].values.items()}
    if len(runs) > 1:
        means[""]["ensemble"] = ensemble(measured)
    weight = complete(runs[0])[0]["settings"].get("kd_weight")
    for term in ("kd", "skd"):      # the last epoch's mean, without its weight
        if weight and term in complete(runs[0])[-1]:
            means[""]["soft loss"] = mean(complete(run)[-1][term] / weight for run in runs)
    kept.write_text(json.dumps({"runs": names, "means": means}) + "\n")
    return means


def show_measured(plan: Plan, tests: dict) -> None:
    """What the table's paper measured of the networks; its own numbers in brackets."""
    wanted = plan.table.measured
    cells = [["", "teacher", "tau", *wanted]]
    for row in plan.rows:
        runs = [plan.run(row, seed) for seed in tests[row[:4]]]
        if not runs or row.command.startswith("teacher"):
            continue
        for temperature, values in measurements(plan, row, runs).items():
            if not set(wanted) & values.keys():
                continue
            line = [f"{values[key]:.4g}" if key in values else "" for key in wanted]
            if temperature in ("", "1") and plan.of_paper:
                line = [f"{text} ({row.beside[key]:g})" if text and key in row.beside else text
                        for key, text in zip(wanted, line)]
            cells.append([row.label, row.teacher, temperature, *line])
    if len(cells) > 1:
        print(f"\n{plan.table.paper}, measured on the last epoch's networks" +
              " (the paper's number)" * plan.of_paper)
        print_markdown(cells)


# === The list of tables =========================================================================
IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "cinic10": 90_000, "shapes": 4_000,
          "imagenet": 1_281_167, "scenes": 2_000, "voc": 1_464}
RATE = 186e9    # floating-point operations a second: 137 images/s of a WRN16-3 on two cores


@functools.lru_cache
def operations(name: str, image_size: int) -> int:
    """Of one forward pass of one image."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        create_model(name, 10).eval()(torch.empty(1, 3, image_size, image_size))
    return counter.get_total_flops()


def hours(job: Job) -> float:
    """Rough: a step costs three forward passes of the student and one of the teacher."""
    args = parsed(job.line[0], job.line[1:])
    cost, epochs, once = 3 * operations(args.student, args.image_size), args.epochs, 0
    if not args.baseline:
        teacher = operations(args.teacher, args.image_size)
        cost += teacher
        epochs += getattr(args, "fsp_epochs", 0)        # FSP's first stage
        once = 3 * teacher * (args.teacher_epochs or 0)         # a teacher that its row trains
    total = len(job.runs) * epochs * cost + once
    return total * IMAGES.get(args.dataset, 50_000) / RATE / 3600


def list_tables(args: argparse.Namespace) -> None:
    lines = [["table", "paper", "question", "data set", "runs", "hours"]]
    for name, table in TABLES.items():
        try:
            plan = Plan(name, args, [])
            jobs = plan.jobs()
            lines.append([name, table.paper, table.question, plan.dataset,
                          str(sum(len(job.runs) for job in jobs)), f"{sum(map(hours, jobs)):,.1f}"])
        except UserError as error:       # no recipe for this data set
            reason = error
    if not lines[1:]:
        raise UserError(f"no table can be run so: {reason}")
    print_aligned(lines)
    print("hours: roughly, on two cores of an Intel Xeon, from counted operations")


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def add_plan_flags(add: Callable) -> None:
    """The flags of a table, which look.py's sweep has too."""
    add("--dataset", choices=DATASETS, help="of all rows; else the paper's")
    add("--teacher", help="network, of all rows")
    add("--student", help="network, of all rows")
    add("--epochs", type=positive, help="of all rows")
    add("--teacher-ckpt", type=Path, help="this teacher for all rows, or of the runs to measure")
    add("--runs", type=positive, help="seeds of each row; else as the paper has it, or 3")
    add("--data-dir", type=Path, help="where the data set is")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("name", nargs="?", choices=TABLES, metavar="TABLE", help="one of the list, named first")
    add("--table", type=Path, metavar="DIR", help="a folder of runs, or a file of recorded ones")
    add("--csv", type=Path, metavar="FILE", help="write what --table prints into a file, too")
    add("--record", type=Path, nargs=2, metavar=("DIR", "FILE"), help="keep the logs of runs")
    add("--measure", type=Path, nargs="+", metavar="RUN", help="runs' folders")
    add_plan_flags(add)
    add("--jobs", type=positive, default=1 if torch.cuda.is_available() else usual_workers(),
        help="runs side by side (%(default)s), on a CPU a thread each; on a GPU more pay only "
             "under MPS")
    add("--show", action="store_true", help="print what is finished, train nothing")
    add("--out", type=Path, default="runs/tables", help="folder of the tables' runs (%(default)s)")
    args, extra = parser.parse_known_args()
    alone = args.table or args.measure or args.record or not args.name
    if extra and (alone or not extra[0].startswith("--")):
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    if args.csv and not args.table:
        parser.error("--csv: only with --table")
    for flag in {group[0] for group in options(extra)} & set(TAKEN):
        parser.error(f"{flag}: not for a whole table")
    if args.name and file_of(args.out) and not args.show:
        parser.error(f"{args.out} holds recorded runs, to which none is added so: give --show")
    try:
        if args.table:
            list_runs(args.table, args.csv)
        elif args.record:
            record(*args.record)
        elif args.measure:
            measure(args.measure, args.data_dir, args.teacher_ckpt)
        elif not args.name:
            list_tables(args)
        else:
            if file_of(args.out) and not runs_below(args.out):
                raise UserError(f"{args.out} holds no recorded run: --table lists those of a file")
            plan = Plan(args.name, args, extra)
            failed = {} if args.show else run_all(plan, args.jobs)
            for job, line in failed.items():
                plan.refused |= set(job.runs)
                print(f"failed: {' '.join(job.line)}\n    {line}", file=sys.stderr)
            show(plan)
            sys.exit(1 if failed else 0)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped: finished epochs are kept, and the same command goes on from there")


if __name__ == "__main__":
    main()
