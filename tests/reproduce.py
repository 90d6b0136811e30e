"""The papers' tables: run what is missing of one, print it beside the paper; look at finished runs.

    python tests/reproduce.py                          lists the tables: what each asks, runs, hours
    python tests/reproduce.py six --dataset shapes --runs 3 --jobs 2
                                                       trains what is not finished, two runs side by
                                                       side, and prints the table; stopped or
                                                       killed, the same command goes on
    python tests/reproduce.py six --dataset shapes --runs 3 --show     prints it, trains nothing
    python tests/reproduce.py --table runs             every finished run below a folder: mean and
                                                       deviation over the seeds, and the gain
    python tests/reproduce.py --record runs/tables tests/reference     keeps their logs
    python tests/reproduce.py --measure RUN [RUN ...]  of runs' folders, on the split they were
                                                       measured on: accuracy, cross-entropy and
                                                       KL(teacher || student) (Heo et al., Table 7),
                                                       entropy, free energy and their gaps beside
                                                       the theorems (Tables 2 and 7 of SKD's paper),
                                                       and the ensemble of several (FSP's Table 1)

It trains nothing itself: it runs the scripts' command lines, and reads their logs and checkpoints.
--dataset, --teacher, --student and --epochs replace a table's own; a flag that is not in --help
goes to every script as it is (--split val, --train-images 1000, --device). Runs lie in
--out/<flags>/<data set>/<method>/<networks>/seed<k>, where tables share what they have in common.
"""
import argparse
import ctypes
import functools
import importlib
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
from typing import Iterable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import (  # noqa: E402
    PAIRS, ImageLoader, UserError, create_model, limited, load_data, load_weights, new_model,
    one_line, read_checkpoint, read_log, weights_hash)
from skd import as_teacher, entropy, free_energy, spherical, theorems  # noqa: E402

# ================================================================================================
# The tables
# ================================================================================================


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
    base: str               # script and recipe of the baselines and teachers
    rows: list[Row]
    measured: tuple = ()    # from the checkpoints: names of `outputs`
    published: bool = False     # its teachers are torchvision's first weights, and not trained


def rows_of(pair: tuple[str, str], commands: dict[str, str], values: Iterable) -> list[Row]:
    """The rows of one pair, teacher and student: label and command beside the paper's value."""
    return [Row(label, command, *pair, value)
            for (label, command), value in zip(commands.items(), values, strict=True)]


def errors(text: str) -> list[str]:
    """Accuracies of a paper's error rates."""
    return [f"{100 - float(error):.2f}" for error in text.split()]


def sweep(script: str, flag: str, symbol: str, pair: tuple[str, str], papers: dict) -> list[Row]:
    """A baseline, then one row a value of a flag; "" where the paper's text has no number."""
    rows = [Row("baseline", "baseline", *pair)]
    for value, paper in papers.items():
        rows.append(Row(f"{symbol} = {value}", f"{script} --{flag} {value}", *pair, paper))
    return rows


ATANG = {"teacher": "teacher", "baseline": "baseline", "KD": "kd.py", "AT+KD": "at.py",
         "ATang+KD": "atang.py"}
# Section 4.4.1: this student does better with a smaller gamma
LARGE = ATANG | {"ATang+KD": "atang.py --gamma 1000"}
HEO = "--recipe cifar100-heo"
OVERHAUL = {"teacher": "teacher", "baseline": "baseline", "KD": f"kd.py {HEO}",
            "AT": f"at.py {HEO} --kd-weight 0", "overhaul": "overhaul.py"}
LAYERS = {"teacher": "teacher", "baseline": "baseline", "all layers": "overhaul.py",
          "the last layer": "overhaul.py --layers last"}
SKD = {"teacher": "teacher", "baseline": "baseline", "KD": "kd.py",
       "AT": "at.py --kd-weight 0", "SKD": "skd.py"}
# Section 4.2; the other scripts' recipes drop an epoch later, kd.py's at epoch 80 too, and at.py's
# has no Nesterov
EVERY_30 = "--milestones 0.29 0.59 0.89"
LARGE_OVERHAUL = {
    "teacher": "teacher", "baseline": "baseline", "KD": f"kd.py {EVERY_30}",
    "AT": f"at.py --kd-weight 0 --nesterov {EVERY_30}", "overhaul": f"overhaul.py {EVERY_30}"}
W163, W283, SMALL = "wrn16_3", "wrn28_3", "wrn16_1"
C = ("wrn28_4", "wrn16_2")      # setting c of the overhaul's Table 2
OF_RESNET18 = PAIRS["SKD, Tables 5 and 6 (ImageNet)"]
GROWING = [pair[0] for pair in PAIRS["SKD, Table 7 (CIFAR-100), growing teachers"]]
KD_GAPS = "0.146 0.181 0.222 0.246 0.261", "0.042 0.053 0.063 0.068 0.074"
SKD_GAPS = "0.053 0.074 0.081 0.083 0.094", "0.029 0.042 0.041 0.045 0.044"
GAPS = ("S teacher", "G_entropy", "theorem 1", "F teacher", "G_f", "G_f centred", "theorem 2",
        "soft loss")


def of_settings(commands: dict[str, str], values: dict[str, list[str]]) -> list[Row]:
    """The overhaul's settings a to f, the last two with half the batch."""
    rows = []
    pairs = PAIRS["Overhaul, Table 2 (CIFAR-100), settings a to f"]
    for letter, pair in zip("abcdef", pairs, strict=True):
        half = " --batch-size 64" if letter in "ef" else ""
        own = {f"({letter}) {label}": command + half for label, command in commands.items()}
        rows += rows_of(pair, own, values[letter])
    return rows


def growing(values: dict[str, list], besides: dict[str, list[dict]]) -> list[Row]:
    """ResNet14 from ResNet20 to ResNet110."""
    rows = [Row("baseline", "baseline", GROWING[0], "resnet14")]
    for number, teacher in enumerate(GROWING):
        for label, command in (("teacher", "teacher"), ("KD", "kd.py"), ("SKD", "skd.py")):
            if label in values:
                beside = besides.get(label, [{}] * 5)[number]
                rows.append(Row(label, command, teacher, "resnet14", values[label][number], beside))
    return rows


def columns(named: dict[str, str]) -> list[dict]:
    """The lines of a paper's table, a number a teacher -> a dict a teacher."""
    return [dict(zip(named, map(float, column)))
            for column in zip(*(line.split() for line in named.values()))]


TABLES = {
    "six": Table(
        "no paper's: all methods", "which method helps, all else equal?", "cifar10", 3,
        "kd.py --recipe folder",
        rows_of((W163, SMALL), {
            "teacher": "teacher", "baseline": "baseline", "KD": "kd.py --recipe folder",
            "AT+KD": "at.py --recipe folder", "ATang+KD": "atang.py --recipe folder",
            "AMD+KD": "atang.py --recipe folder --loss amd",
            "FSP": "fsp.py --recipe folder --epochs 3/4E --fsp-epochs 1/4E",
            "overhaul": "overhaul.py --recipe folder", "SKD": "skd.py --recipe folder"}, [""] * 9)),
    "atang-2": Table(
        "ATang, Table 2", "does the margin beat AT and KD?", "cifar10", 5, "kd.py", [
            *rows_of((W163, SMALL), ATANG, ["87.76 ± 0.12", "84.11 ± 0.21", "85.29 ± 0.15",
                                            "85.33 ± 0.10", "86.27 ± 0.09"]),
            *rows_of((W283, SMALL), ATANG, ["88.65 ± 0.10", "84.11 ± 0.21", "85.15 ± 0.59",
                                            "85.26 ± 0.03", "85.70 ± 0.09"]),
            *rows_of((W283, W163), LARGE, ["88.65 ± 0.10", "87.76 ± 0.12", "89.07 ± 0.10",
                                           "89.16 ± 0.07", "89.30 ± 0.10"])]),
    "atang-3": Table(
        "ATang, Table 3", "and on CINIC-10?", "cinic10", 5, "kd.py", [
            *rows_of((W163, SMALL), ATANG, ["84.15 ± 0.04", "79.49 ± 0.08", "80.87 ± 0.04",
                                            "80.83 ± 0.06", "80.98 ± 0.02"]),
            *rows_of((W283, SMALL), ATANG, ["85.58 ± 0.03", "79.49 ± 0.08", "80.15 ± 0.03",
                                            "80.25 ± 0.06", "80.28 ± 0.04"]),
            *rows_of((W283, W163), ATANG, ["85.58 ± 0.03", "84.15 ± 0.04", "85.36 ± 0.14",
                                           "85.50 ± 0.03", "85.53 ± 0.02"])]),
    "atang-4": Table(
        "ATang, Table 4", "and from unlike networks?", "cifar10", 5, "kd.py", [
            *rows_of(("resnet44", SMALL), ATANG, ["86.41 ± 0.20", "84.11 ± 0.21", "85.44 ± 0.06",
                                                  "85.15 ± 0.16", "85.97 ± 0.17"]),
            *rows_of(("mobilenetv2", "resnet20"), ATANG, ["89.61 ± 0.11", "85.20 ± 0.17",
                                                          "87.28 ± 0.15", "87.44 ± 0.10",
                                                          "87.88 ± 0.07"])]),
    "atang-5": Table(
        "ATang, Table 5", "unlike networks on CINIC-10?", "cinic10", 5, "kd.py", [
            *rows_of((W283, "resnet20"), ATANG, ["85.58 ± 0.03", "80.72 ± 0.05", "81.31 ± 0.20",
                                                 "81.70 ± 0.04", "81.73 ± 0.03"]),
            *rows_of((W163, "resnet20"), ATANG, ["84.15 ± 0.04", "80.72 ± 0.05", "82.22 ± 0.03",
                                                 "82.23 ± 0.03", "82.25 ± 0.01"]),
            *rows_of(("wrn16_8", "wrn28_1"), ATANG, ["86.30 ± 0.04", "81.32 ± 0.07",
                                                     "81.56 ± 0.03", "82.40 ± 0.04",
                                                     "82.58 ± 0.08"]),
            *rows_of(("wrn28_6", "wrn16_8"), ATANG, ["86.67 ± 0.03", "86.30 ± 0.04",
                                                     "86.94 ± 0.03", "87.26 ± 0.02",
                                                     "87.42 ± 0.03"])]),
    "atang-gamma": Table(
        "ATang, Figure 5", "how large a weight gamma?", "cifar10", 5, "kd.py", [
            *sweep("atang.py", "gamma", "gamma", (W163, SMALL),
                   {1000: "", 3000: "", 5000: "86.27 ± 0.09", 7000: ""}),
            *sweep("atang.py", "gamma", "gamma", (W283, SMALL),
                   {1000: "", 3000: "", 5000: "85.70 ± 0.09", 7000: ""})]),
    "atang-margin": Table(
        "ATang, Figure 6", "how large a margin m?", "cifar10", 5, "kd.py", [
            *sweep("atang.py", "margin", "m", (W163, SMALL),
                   {1.0: "", 1.35: "86.27 ± 0.09", 1.5: "", 2.0: ""}),
            *sweep("atang.py", "margin", "m", (W283, SMALL),
                   {1.0: "", 1.35: "85.70 ± 0.09", 1.5: "", 2.0: ""})]),
    "kd-lambda": Table(
        "ATang, Figure S1", "how much weight for KD?", "cifar10", 5, "kd.py",
        sweep("kd.py", "kd-weight", "lambda", (W163, SMALL),
              {0.1: "", 0.3: "", 0.5: "", 0.7: "", 0.9: "85.29 ± 0.15"})),
    "atang-gamma-cinic": Table(
        "ATang, Figure S2", "gamma on CINIC-10?", "cinic10", 5, "kd.py", [
            *sweep("atang.py", "gamma", "gamma", (W163, SMALL),
                   {100: "", 500: "80.98 ± 0.02", 1000: ""}),
            *sweep("atang.py", "gamma", "gamma", (W283, SMALL),
                   {100: "", 500: "80.28 ± 0.04", 1000: ""})]),
    "atang-margin-cinic": Table(
        "ATang, Figure S3", "the margin on CINIC-10?", "cinic10", 5, "kd.py", [
            *sweep("atang.py", "margin", "m", (W163, SMALL),
                   {1.0: "", 1.35: "80.98", 1.5: "80.92", 2.0: "80.90"}),
            *sweep("atang.py", "margin", "m", (W283, SMALL),
                   {1.0: "", 1.35: "80.30", 1.5: "80.32", 2.0: "80.35"})]),
    "overhaul-3": Table(
        "Overhaul, Table 3", "does the overhaul beat KD and AT?", "cifar100", 5, f"kd.py {HEO}",
        of_settings(OVERHAUL, {
            "a": errors("21.09 22.72 21.69 22.07 20.89"),
            "b": errors("21.09 24.88 23.43 23.80 21.98"),
            "c": errors("21.09 27.32 26.47 26.56 24.08"),
            "d": errors("21.09 27.68 26.76 26.66 24.44"),
            "e": errors("15.57 21.09 20.97 19.28 17.80"),
            "f": errors("15.57 22.58 21.68 19.93 18.89")})),
    "overhaul-4": Table(
        "Overhaul, Table 4", "and on ImageNet?", "imagenet", 1, f"kd.py {EVERY_30}", [
            row for pair, values in zip(PAIRS["Overhaul, Table 4 (ImageNet)"], (
                "21.69 23.72 22.85 22.75 21.65", "23.84 31.13 31.42 30.44 28.75"), strict=True)
            for row in rows_of(pair, LARGE_OVERHAUL, errors(values))], published=True),
    "overhaul-7": Table(
        "Overhaul, Table 7", "is the student's output like the teacher's?", "cifar100", 5,
        f"kd.py {HEO}", [
            Row("baseline", "baseline", *C, "72.68", {"KL": 0.7318, "CE": 1.0741}),
            Row("KD", f"kd.py {HEO}", *C, "73.53", {"KL": 0.7064, "CE": 1.0758}),
            Row("AT", f"at.py {HEO} --kd-weight 0", *C, "73.44", {"KL": 0.7047, "CE": 1.0303}),
            Row("overhaul", "overhaul.py", *C, "75.92", {"KL": 0.5723, "CE": 0.9585})],
        ("KL", "CE")),
    "overhaul-8": Table(
        "Overhaul, Table 8", "which statistics for the teacher's BatchNorm?", "cifar100", 5,
        f"kd.py {HEO}",
        rows_of(C, {"baseline": "baseline", "of the batch": "overhaul.py",
                    "running": "overhaul.py --teacher-bn running"}, errors("27.32 24.08 24.54"))),
    "overhaul-9": Table(
        "Overhaul, Table 9", "what does each part add?", "cifar100", 5, f"kd.py {HEO}",
        rows_of(C, {
            "baseline": "baseline",
            "L2 at the end of the groups":
                "overhaul.py --position end --distance l2 --teacher-bn running",
            "+ before the ReLU": "overhaul.py --distance l2 --teacher-bn running",
            "+ statistics of the batch": "overhaul.py --distance l2",
            "+ margin ReLU, partial L2": "overhaul.py"}, errors("27.32 26.37 24.81 24.68 24.08"))),
    "overhaul-11": Table(
        "Overhaul, Table 11", "is the last layer enough?", "cifar100", 5, f"kd.py {HEO}",
        of_settings(LAYERS, {
            "a": errors("21.09 22.72 20.89 20.90"), "b": errors("21.09 24.88 21.98 22.03"),
            "c": errors("21.09 27.32 24.08 24.14"), "d": errors("21.09 27.68 24.44 24.78"),
            "e": errors("15.57 21.09 17.80 18.17"), "f": errors("15.57 22.58 18.89 18.99")})),
    "fsp-1": Table(
        "FSP, Table 1 of Liu's report", "does FSP save two thirds of the training?", "cifar100", 3,
        "fsp.py", [
            Row("baseline", "baseline", "resnet32", "resnet32", "64.15", {"ensemble": 69.3}),
            Row("a third of the epochs", "fsp.py --baseline --recipe third --epochs 54/164E",
                "resnet32", "resnet32", "61.32", {"ensemble": 67.2}),
            Row("FSP, then a third", "fsp.py --recipe third --epochs 54/164E --fsp-epochs 82/164E "
                "--shared-stage1", "resnet32", "resnet32", "64.65", {"ensemble": 68.8})],
        ("ensemble",)),
    "skd-1": Table(
        "SKD, Table 1", "does KD get worse from larger teachers?", "cifar100", 3, "kd.py",
        growing({"teacher": "69.57 70.9 71.9 72.8 73.8".split(),
                 "KD": "67.4 68.2 68 67.5 67.1".split()},
                {"KD": columns({"soft loss": "1.1 1.7 2.1 2.5 3.3"})}), ("soft loss",)),
    "skd-2": Table(
        "SKD, Table 2", "do entropy and free energy part?", "cifar100", 3, "kd.py",
        growing({"KD": [""] * 5, "SKD": [""] * 5}, {
            "KD": columns({"S teacher": "0.74 0.45 0.35 0.22 0.09", "G_entropy": KD_GAPS[0],
                           "F teacher": "13.11 13.84 14.45 15.37 16.13", "G_f": KD_GAPS[1]}),
            "SKD": columns({"G_entropy": SKD_GAPS[0], "G_f": SKD_GAPS[1]})}), GAPS),
    "skd-3": Table(
        "SKD, Table 3", "does SKD beat KD and AT?", "cifar100", 3, "kd.py", [
            row for pair, values in zip(PAIRS["SKD, Table 3 (CIFAR-100)"], (
                "75.61 73.26 74.92 74.08 75.75", "75.61 71.98 73.54 72.77 75.06",
                "72.34 69.06 70.66 70.55 72.08", "74.31 69.06 70.67 70.22 72.12",
                "74.31 71.14 73.08 72.31 74.09", "79.42 72.50 73.33 73.44 76.40",
                "74.64 70.36 72.98 71.43 74.17"), strict=True)
            for row in rows_of(pair, SKD, values.split())]),
    "skd-4": Table(
        "SKD, Table 4", "and from unlike networks?", "cifar100", 3, "kd.py", [
            row for pair, values in zip(PAIRS["SKD, Table 4 (CIFAR-100), unlike networks"], (
                "79.34 64.60 67.35 58.58 69.26", "79.34 70.36 73.81 71.84 74.41",
                "79.42 70.50 74.07 71.73 75.08", "79.42 71.82 74.45 72.73 76.02",
                "75.81 70.50 74.83 73.32 76.42"), strict=True)
            for row in rows_of(pair, {
                label: command + (" --lr 0.01" if pair[1][:4] in ("mobi", "shuf") and
                                  label != "teacher" else "")
                for label, command in SKD.items()}, values.split())]),
    "skd-5": Table(
        "SKD, Table 5 and Figure 1b", "and on ImageNet?", "imagenet", 1, "kd.py",
        rows_of(OF_RESNET18[0], {label: SKD[label] for label in ("baseline", "KD", "AT", "SKD")},
                "69.8 69.20 70.70 72.80".split()), published=True),
    "skd-6": Table(     # its KD from ResNet34 is another number than Table 5's
        "SKD, Table 6", "from larger teachers on ImageNet?", "imagenet", 1, "kd.py", [
            Row("baseline", "baseline", *OF_RESNET18[0]),
            *(row for pair, values in zip(OF_RESNET18, (
                "69.43 72.80", "69.05 73.01", "68.91 72.85", "68.84 72.70"), strict=True)
              for row in rows_of(pair, {label: SKD[label] for label in ("KD", "SKD")},
                                 values.split()))], published=True),
    "skd-7": Table(
        "SKD, Table 7 and Figure 1a", "does SKD learn from larger teachers?", "cifar100", 3,
        "kd.py",
        growing({"teacher": "69.57 70.9 71.9 72.8 73.8".split(),
                 "KD": "67.4 68.2 68 67.5 67.1".split(),
                 "SKD": "68.2 68.7 68.9 68.8 69.2".split()},
                {"KD": columns({"G_entropy": KD_GAPS[0], "G_f": KD_GAPS[1],
                                "soft loss": "1.1 1.7 2.1 2.5 3.3"}),
                 "SKD": columns({"G_entropy": SKD_GAPS[0], "G_f": SKD_GAPS[1],
                                 "soft loss": "0.9 1.2 1.3 1.4 1.6"})}), GAPS),
}


# ================================================================================================
# Running a table
# ================================================================================================

PLACES = ("--data-dir", "--device", "--out", "--runs", "--seed")     # which decide no number
TAKEN = ("--seed", "--teacher-epochs", "--dry-run", "--baseline", "--out")  # not for all rows


class Job(NamedTuple):
    """One process: a script's command line, and the folders of the runs that it finishes."""
    line: tuple[str, ...]
    folders: tuple[Path, ...]
    teacher: Path | None        # the folder that has to be finished before


def options(words: list[str]) -> list[list[str]]:
    """["--lr", "0.1", "--baseline"] -> [["--lr", "0.1"], ["--baseline"]]"""
    groups = []
    for word in words:
        if word.startswith("--"):
            groups.append([word])
        else:
            groups[-1].append(word)
    return groups


def typed(words: list[str]) -> argparse.Namespace:
    """Flags of a command as a user may have typed them: as two words, as one, or not at all."""
    command = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    command.add_argument("--dataset", default="cifar10")
    command.add_argument("--recipe")
    command.add_argument("--teacher-ckpt", type=Path)
    command.add_argument("--teacher-epochs", default="")
    return command.parse_known_args(words)[0]


def recipe_of(script: str, words: list[str], dataset: str) -> dict:
    chosen = typed(words).recipe or dataset
    recipes = importlib.import_module(script.removesuffix(".py")).RECIPES
    if chosen not in recipes:
        raise UserError(f"{script} has no recipe for {chosen}: add --recipe {' or '.join(recipes)}")
    return recipes[chosen]


class Plan:
    """A table as it is to be run: its rows after the replacements, and their jobs."""

    def __init__(self, name: str, args: argparse.Namespace, extra: list[str]):
        self.table, self.args = TABLES[name], args
        self.extra = extra + (["--data-dir", str(args.data_dir)] if args.data_dir else [])
        self.dataset = args.dataset or self.table.dataset
        self.runs = args.runs or self.table.runs
        self.published = (self.table.published and self.dataset == self.table.dataset
                          and not args.teacher)
        self.ready = bool(self.published or args.teacher_ckpt)      # no teacher is to be trained
        replaced = [f"--{key.replace('_', '-')} {getattr(args, key)}"
                    for key in ("dataset", "teacher", "student", "epochs", "teacher_ckpt")
                    if getattr(args, key)]
        replaced += [" ".join(group) for group in options(extra) if group[0] not in PLACES]
        self.title = f"{name} ({self.table.paper}), {self.dataset}"
        if self.dataset == "folder" and args.data_dir:
            self.title += f" {args.data_dir.resolve().name}"
        self.title += f"; replaced: {' '.join(replaced)}" if replaced else ""
        self.of_paper = not args.teacher and not args.student    # else its numbers are of others
        rows = {}
        for row in self.table.rows:
            if args.teacher_ckpt and row.command.startswith("teacher"):
                continue
            row = row._replace(teacher=args.teacher or row.teacher,
                               student=args.student or row.student)
            label = row.label
            if args.teacher and args.student:       # settings a to f are one
                label = re.sub(r"^\(.\) ", "", row.label)
            rows.setdefault((label, row.teacher, row.student), row._replace(label=label))
        self.rows = list(rows.values())
        script, words = self.words("baseline")
        self.epochs = args.epochs or recipe_of(script, words + extra, self.dataset)["epochs"]

    def words(self, command: str) -> tuple[str, list[str]]:
        """A row's script and flags; a recipe is given up where its data set is replaced.

        All but `folder`, which every script has: on other CIFARs it keeps all else equal.
        """
        kind, *own = command.split()
        if kind in ("baseline", "teacher"):
            kind, *base = self.table.base.split()
            own = [*base, *own, "--baseline"]
        if self.dataset != self.table.dataset and "--recipe" in own:
            at = own.index("--recipe")
            if own[at + 1] != "folder" or self.dataset in ("shapes", "folder"):
                del own[at:at + 2]
        return kind, own

    def command(self, row: Row, as_teacher: bool = False) -> tuple[str, list[str]]:
        """The same with 3/4E and the like in numbers, and with what is asked for every row."""
        command = row.command
        if as_teacher:      # with the flags of the pair's own row, where it has one
            known = [other.command for other in self.rows if other.command.startswith("teacher")
                     and (other.teacher, other.student) == (row.teacher, row.student)]
            command = (known or ["teacher"])[0]
        script, words = self.words(command)
        words = [str(max(1, round(Fraction(word[:-1]) * self.epochs)))
                 if word.endswith("E") and word[0].isdigit() else word for word in words]
        if self.args.epochs and "--epochs" not in words:
            words += ["--epochs", str(self.args.epochs)]
        return script, words + self.extra

    def folder(self, script: str, words: list[str], networks: str, seed: int) -> Path:
        """out/<flags>/<data set>/<method>/<networks>/seed<k>"""
        named = ["-".join(group)[2:] for group in options(words)
                 if group[0] not in ("--baseline", *PLACES)]
        method = "baseline" if "--baseline" in words else script.removesuffix(".py")
        if "--loss" in words:       # atang.py names its runs by it
            method = words[words.index("--loss") + 1]
        if method == "baseline" and script != "kd.py":      # with a recipe of its script
            named.insert(0, script.removesuffix(".py"))
        if method != "baseline" and self.args.teacher_ckpt:
            named.append("from-" + str(self.args.teacher_ckpt).strip("/").replace("/", "-"))
        if self.dataset == "folder" and self.args.data_dir:
            named.append(self.args.data_dir.resolve().name)
        return self.args.out.joinpath("_".join(named), self.dataset, method, networks,
                                      f"seed{seed}")

    def teacher(self, row: Row) -> Path:
        """The folder of the teacher's run."""
        return self.folder(*self.command(row, as_teacher=True), row.teacher, 0)

    def checkpoint(self, row: Row) -> Path:
        if self.published and not self.args.teacher_ckpt:
            name = row.teacher.replace("imagenet_resnet", "ResNet")
            return Path(f"{name}_Weights.IMAGENET1K_V1")
        return self.args.teacher_ckpt or self.teacher(row) / "last.pt"

    def seeds(self, row: Row) -> range:
        return range(1 if row.command.startswith("teacher") else self.runs)

    def run(self, row: Row, seed: int) -> Path:
        if row.command.startswith("teacher"):
            return self.teacher(row)
        script, words = self.command(row)
        networks = row.student if "--baseline" in words else f"{row.teacher}-{row.student}"
        return self.folder(script, words, networks, seed)

    def job(self, row: Row, seeds: Iterable[int], as_teacher: bool = False) -> Job:
        script, words = self.command(row, as_teacher)
        folders = tuple(self.teacher(row) if as_teacher else self.run(row, seed) for seed in seeds)
        line = [script, "--dataset", self.dataset]
        teacher = None
        if "--baseline" in words:
            line += ["--student", row.teacher if as_teacher else row.student]
        else:
            teacher = None if self.ready else self.teacher(row)
            line += ["--teacher", row.teacher, "--student", row.student,
                     "--teacher-ckpt", str(self.checkpoint(row))]
        line += [*words, "--seed", str(seeds[0]), "--out", str(folders[0].parents[3])]
        if len(seeds) > 1:
            line += ["--runs", str(len(seeds))]
        return Job(tuple(line), folders, teacher)

    def jobs(self) -> list[Job]:
        """Teachers first, then seed after seed of all rows."""
        jobs = []
        for row in self.rows:
            needs_teacher = "--baseline" not in self.command(row)[1] or "KL" in self.table.measured
            needs_teacher = needs_teacher or row.command.startswith("teacher")
            if needs_teacher and not self.ready:
                jobs.append(self.job(row, [0], as_teacher=True))
        for seed in range(self.runs):
            for row in self.rows:
                if row.command.startswith("teacher"):
                    continue
                if "--shared-stage1" in row.command:    # one process, since they share it
                    if seed == 0:
                        jobs.append(self.job(row, range(self.runs)))
                else:
                    jobs.append(self.job(row, [seed]))
        return list({job.folders[0]: job for job in jobs}.values())


def complete(folder: Path) -> list[dict]:
    """The log of a finished run; empty where it is not."""
    log = read_log(folder)
    return log if log and len(log) == log[0]["settings"].get("epochs", 0) + 1 else []


def outdated(log: list[dict]) -> list[str]:
    """The entries of today's recipe that a run had otherwise, and not by a flag."""
    script, *words = log[0]["command"]
    script = Path(script).name
    settings = log[0]["settings"]
    recipe = recipe_of(script, words, typed(words).dataset)
    given = {word.split("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
             for word in words}
    return [key for key, value in recipe.items() if key in settings and settings[key] != value
            and key not in given and value is not None]     # None depends on the networks


def deciding(words: list[str]) -> list[list[str]]:
    return sorted(group for group in options(words) if group[0] not in PLACES)


def is_finished(job: Job) -> bool:
    """Whether today's command and recipe made all its runs; if not, the script itself decides."""
    for folder in job.folders:
        log, weights = complete(folder), folder / "last.pt"
        if not log or not weights.exists() or outdated(log):
            return False
        # the log is written first: a kill between the two leaves the weights an epoch behind
        if weights.stat().st_mtime_ns < (folder / "log.jsonl").stat().st_mtime_ns:
            return False
        if deciding(log[0]["command"][1:]) != deciding(list(job.line[1:])):
            return False
    return True


def die_with_parent() -> None:
    """A kill -9 of the driver ends its runs too, where the system can (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)      # PR_SET_PDEATHSIG


def progress(jobs: Iterable[Job], done: int, count: int) -> None:
    parts = []
    for job in jobs:
        rows = [len(read_log(folder)) for folder in job.folders]
        parts.append(f"{job.folders[0].parts[-3]} {job.folders[0].name} epoch {max(rows)}")
    print(f"{done} of {count} done; now {', '.join(parts)}"[:100].ljust(100), end="\r", flush=True)


def run_all(jobs: list[Job], slots: int) -> dict[Job, str]:
    """Run what is not finished, `slots` at a time; what failed, with its last line."""
    waiting = [job for job in jobs if not is_finished(job)]
    running, failed, start = {}, {}, time.time()
    count, looked = len(waiting), 0.0
    print(f"{len(jobs) - count} of {len(jobs)} runs are finished, {count} to go", flush=True)
    unfinished = {job.folders[0] for job in waiting}
    broken = set()
    # one thread each: more of them than cores would only wait for each other
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    try:
        while waiting or running:
            for job in list(waiting):
                if job.teacher in broken:
                    waiting.remove(job)
                    failed[job] = "its teacher is not finished"
                elif len(running) < slots and job.teacher not in unfinished:
                    waiting.remove(job)
                    output = tempfile.TemporaryFile("w+")
                    process = subprocess.Popen(
                        [sys.executable, str(ROOT / job.line[0]), *job.line[1:]], env=environment,
                        stdout=output, stderr=subprocess.STDOUT, preexec_fn=die_with_parent)
                    running[job] = process, output, time.time()
            time.sleep(0.1)
            for job, (process, output, begun) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[job]
                unfinished.discard(job.folders[0])
                ended = count - len(waiting) - len(running)
                output.seek(0)
                lines = output.read().split("\n")
                output.close()
                last = next((line for line in reversed(lines) if line.strip()), "no output")
                if process.returncode < 0:
                    last = f"killed by signal {-process.returncode}, after: {last}"
                elif process.returncode == 0:
                    last = f"no finished run in {job.folders[0]}"
                logs = [complete(folder) for folder in job.folders]
                tests = " ".join(f"{log[-1]['test']:.2f} %" for log in logs if log)
                if process.returncode or not all(logs):
                    failed[job] = last.split("\r")[-1]
                    broken.add(job.folders[0])
                    tests = f"failed: {failed[job]}"
                spent = time.time() - start
                left = f", about {spent / ended * (count - ended) / 60:.0f} min left"
                print(f"[{ended}/{count}{left if ended < count else ''}] {tests}, "
                      f"{(time.time() - begun) / 60:.1f} min: {' '.join(job.line)}", flush=True)
            if sys.stdout.isatty() and time.time() - looked > 2:
                looked = time.time()
                progress(running, count - len(waiting) - len(running), count)
    finally:        # Ctrl-C reaches the runs too: they keep what is finished, and so do we
        for process, *_ in running.values():
            process.terminate()
        for process, *_ in running.values():
            process.wait()
    return failed


# ================================================================================================
# Printing a table
# ================================================================================================


def spread(values: list[float]) -> str:
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def print_aligned(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


def print_markdown(rows: list[list[str]]) -> None:
    for number, row in enumerate(rows):
        print("|" + "".join(f" {cell} |" if cell else " |" for cell in row))
        if number == 0:
            print("|" + "---|" * len(row))


def paper_gain(row: Row, baseline: Row | None) -> str:
    alone = row.command.startswith(("baseline", "teacher"))
    if alone or not (row.paper and baseline and baseline.paper):
        return ""
    return f"{float(row.paper.split()[0]) - float(baseline.paper.split()[0]):+.2f}"


def gain(row: Row, tests: dict[int, float], base: dict[int, float]) -> str:
    """The mean difference, seed by seed, and its standard error."""
    both = sorted(tests.keys() & base.keys())
    if row.command.startswith(("baseline", "teacher")) or not both:
        return ""
    differences = [tests[seed] - base[seed] for seed in both]
    error = f" ± {stdev(differences) / math.sqrt(len(both)):.2f}" if len(both) > 1 else ""
    return f"{mean(differences):+.2f}{error}"


def minutes(folder: Path) -> float:
    """What a run took, FSP's first stage with it."""
    parts = folder.parts
    first = folder.parents[2].joinpath(parts[-3], "stage1", *parts[-2:])
    rows = complete(folder)[1:] + complete(first)[1:]
    return sum(row["seconds"] for row in rows) / 60


def show(plan: Plan) -> None:
    """The table in Markdown: the paper's accuracies, ours, the gain and its standard error."""
    found = {}
    for row in plan.rows:
        logs = {seed: complete(plan.run(row, seed)) for seed in plan.seeds(row)}
        for seed, log in logs.items():
            if log and (changed := outdated(log)):
                print(f"left out: {plan.run(row, seed)}, of another recipe ({', '.join(changed)})")
                logs[seed] = []
        found[row[:4]] = {seed: log[-1]["test"] for seed, log in logs.items() if log}
    several = len({(row.teacher, row.student) for row in plan.rows}) > 1
    compared = any(row.paper for row in plan.rows) and plan.of_paper
    cells = [["", *["networks"] * several, *["paper", "paper's gain"] * compared, "here", "gain",
              "runs", "minutes"]]
    for row in plan.rows:
        tests = found[row[:4]]
        baselines = [other for other in plan.rows if other.student == row.student
                     and other.command.startswith("baseline")]
        baselines.sort(key=lambda other: other.teacher != row.teacher)     # the pair's own first
        baseline = baselines[0] if baselines else None
        base = found[baseline[:4]] if baseline else {}
        took = [minutes(plan.run(row, seed)) for seed in tests]
        networks = {"teacher": row.teacher, "baseline": row.student}.get(
            row.command.split()[0], f"{row.teacher} to {row.student}")
        papers = [row.paper, paper_gain(row, baseline)]
        cells.append([row.label, *[networks] * several, *papers * compared,
                      spread(list(tests.values())) if tests else "", gain(row, tests, base),
                      str(len(tests)), f"{mean(took):.1f}" if took else ""])
    split = "val" if "val" in plan.extra else "test"
    print(f"\n{plan.title}; {split} accuracy in per cent")
    print_markdown(cells)
    if plan.table.measured:
        show_measured(plan, found)


def finished(folder: Path) -> dict[tuple, dict[str, float]]:
    """The last accuracies, by seed, of all finished runs of one (folder, data, ..., settings)."""
    runs = {}
    for path in sorted(folder.rglob("seed*/log.jsonl")):
        log, parts = complete(path.parent), path.relative_to(folder).parts
        if not log or len(parts) < 5 or parts[-4] == "stage1":
            continue        # cut short, not below the runs' folder, or the first half of a run
        *above, data, method, networks, seed, _ = parts
        settings = json.dumps(log[0]["settings"], sort_keys=True)
        key = ("/".join(above), data, method, networks, settings)
        runs.setdefault(key, {})[seed] = log[-1]["test"]
    return runs


def gain_of(key: tuple, runs: dict) -> str:
    """The mean gain on the baseline of the same folder and settings, where it has all the seeds."""
    _, data, method, networks, text = key
    of_student = [data, "baseline", networks.split("-")[-1]]
    for (_, *place, other), baseline in runs.items():       # its settings decide, in any folder
        same = json.loads(other).items() <= json.loads(text).items()
        if method != "baseline" and place == of_student and same and (
                runs[key].keys() <= baseline.keys()):
            return f"{mean(runs[key][seed] - baseline[seed] for seed in runs[key]):+.2f}"
    return ""


def list_runs(folder: Path) -> None:
    runs = finished(folder)
    if not runs:
        raise UserError(f"{folder} holds no finished run: name the folder of the runs")
    rows = [["folder", "data", "method", "networks", "accuracy, %", "seeds", "gain"]]
    for key, tests in runs.items():
        rows.append([*key[:4], spread([*tests.values()]), str(len(tests)), gain_of(key, runs)])
    print_aligned(rows)


def record(source: Path, target: Path) -> None:
    """Copy the logs of all finished runs, and what was measured of them, without their paths."""
    count = 0
    for path in sorted(source.rglob("log.jsonl")):
        log = complete(path.parent)
        if not log:
            continue
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        header = log[0]
        header["command"] = [Path(word).name if Path(word).is_absolute() else word
                             for word in header["command"]]
        header["settings"]["data"] = Path(header["settings"]["data"]).name
        place.write_text("".join(json.dumps(row) + "\n" for row in log))
        for measured in path.parents[1].glob("measured*.json"):
            (place.parents[1] / measured.name).write_text(measured.read_text())
        count += 1
    if not count:
        raise UserError(f"{source} holds no finished run: name the folder of the runs")
    print(f"{count} finished runs of {source} are recorded in {target}")


# ================================================================================================
# Measuring finished runs
# ================================================================================================


@functools.lru_cache
def test_images(data: str, split: str, image_size: int, data_dir: Path) -> ImageLoader:
    dataset = data
    if "/" in data:     # a folder of images goes by its path
        dataset, data_dir = "folder", Path(data)
    return load_data(dataset, data_dir, 100, "cpu", augment=False, seed=0, image_size=image_size,
                     split=split)[1]


def images_of(settings: dict, data_dir: Path) -> ImageLoader:
    """What a run was measured on."""
    return test_images(settings["data"], settings["split"], settings["image_size"], data_dir)


@torch.no_grad()
def logits_of(network: nn.Module, loader: ImageLoader) -> Tensor:
    return torch.cat([network.eval()(images) for images, _ in loader]).double()


@functools.lru_cache
def logits_in(path: Path, name: str, loader: ImageLoader) -> Tensor:
    network = new_model(name, loader, 0)
    load_weights(network, path)
    return logits_of(network, loader)


def teacher_of(run: Path, header: dict, loader: ImageLoader, path: Path | None
               ) -> tuple[str, Path]:
    """The teacher that a run learnt from: at path, or as its command had it, or the one beside."""
    given = typed(header["command"][1:])
    name = run.parent.name.split("-")[0]
    early = given.teacher_epochs and f"-{given.teacher_epochs}"
    beside = run.parents[2] / f"baseline/{name}{early}/seed0/last.pt"
    path = path or given.teacher_ckpt or beside
    teacher = new_model(name, loader, 0)
    load_weights(teacher, path)
    if weights_hash(teacher) != header["settings"]["teacher_hash"]:
        raise UserError(f"{path} is not the teacher of {run}, whose settings name another hash")
    return name, path


def gaps(z: Tensor, v: Tensor, temperature: float) -> dict[str, float]:
    """Eq. 4 to 6 and 10 of SKD's paper and its theorems; z the student's logits, v the teacher's.

    Entropy does not see a constant added to all logits, free energy does: raw, and centred. Theorem
    1 with its constant halved, as in skd.py's departure 3.
    """
    centred_z, centred_v = (x - x.mean(dim=1, keepdim=True) for x in (z, v))
    theorem_1, theorem_2 = theorems(z, v, temperature)
    values = {
        "S student": entropy(z, temperature), "S teacher": entropy(v, temperature),
        "G_entropy": entropy(z, temperature) - entropy(v, temperature), "theorem 1": theorem_1,
        "F student": free_energy(z, temperature), "F teacher": free_energy(v, temperature),
        "G_f": free_energy(v, temperature) - free_energy(z, temperature),
        "G_f centred": free_energy(centred_v, temperature) - free_energy(centred_z, temperature),
        "theorem 2": theorem_2}
    return {name: value.mean().item() for name, value in values.items()}


def aligned(z: Tensor, v: Tensor, scale: float | str) -> tuple[Tensor, Tensor]:
    """Both logits as SKD's loss compares them: of the networks' own it does not see the length."""
    if scale == "teacher":
        return as_teacher(z, v), v
    if scale == "literal":
        return spherical(z), spherical(v)
    length = scale * math.sqrt(z.shape[1])
    return spherical(z, length, center=True), spherical(v, length, center=True)


class Outputs(NamedTuple):
    """What the network of a finished run says of the images that it was measured on."""
    images: tuple               # which these are
    accuracy: float             # per cent
    probabilities: Tensor       # (N, K)
    labels: Tensor              # (N,)
    values: dict[str, float]    # CE, and with a teacher KL(teacher || student), in nats
    gaps: dict[str, dict]       # by temperature: 1, and what the run was trained with


def outputs(run: Path, data_dir: Path, teacher: tuple[str, Path] | None = None) -> Outputs:
    """`teacher`, name and checkpoint, for a baseline; any other run may find its own."""
    log = read_checkpoint(run / "last.pt").get("log")
    if not log:
        raise UserError(f"{run} holds weights, but no run of ours")
    settings = log[0]["settings"]
    loader = images_of(settings, data_dir)
    labels = loader.labels
    if "teacher_hash" in settings:
        teacher = teacher_of(run, log[0], loader, teacher and teacher[1])
    z = logits_in(run / "last.pt", run.parent.name.split("-")[-1], loader)
    accuracy = 100 * (z.argmax(1) == labels).double().mean().item()
    values, energies = {"CE": F.cross_entropy(z, labels).item()}, {}
    if teacher:
        v = logits_in(teacher[1], teacher[0], loader)
        values["KL"] = F.kl_div(z.log_softmax(1), v.log_softmax(1), reduction="batchmean",
                                log_target=True).item()
        for temperature in sorted({1.0, settings.get("temperature", 1.0)}):
            energies[f"{temperature:g}"] = gaps(z, v, temperature)
            if run.parts[-3] == "skd" and settings["scale"] != "none":
                seen = aligned(z, v, settings["scale"])
                energies[f"{temperature:g}, aligned"] = gaps(*seen, temperature)
    return Outputs((loader.labels, loader.images.shape), accuracy, z.softmax(1), labels, values,
                   energies)


def ensemble(of: list[Outputs]) -> float:
    """Accuracy of the mean probabilities, in per cent."""
    together = sum(one.probabilities for one in of).argmax(1) == of[0].labels
    return 100 * together.double().mean().item()


def measure(runs: list[Path], data_dir: Path) -> None:
    measured, rows = [], []
    for run in (run.resolve() for run in runs):
        one = outputs(run, data_dir)
        if measured and one.images[0] is not measured[0].images[0]:
            raise UserError(f"{run} was measured on other images than the run before it: measure "
                            f"them one by one")
        measured.append(one)
        settings = read_log(run)[0]["settings"]
        kl = f", KL(teacher || student) {one.values['KL']:.4f}" if "KL" in one.values else ""
        print(f"{run}: {settings['split']} accuracy {one.accuracy:.2f} %, cross-entropy "
              f"{one.values['CE']:.4f}{kl}")
        for temperature, values in one.gaps.items():
            rows.append(["/".join(run.parts[-3:]), temperature,
                         *(f"{round(value, 4) + 0:.4f}" for value in values.values())])
    if rows:
        print_aligned([["run", "tau", *values], *rows])
    if len(runs) > 1:
        print(f"average {mean(one.accuracy for one in measured):.2f} %, "
              f"ensemble {ensemble(measured):.2f} %")


def soft_loss(log: list[dict]) -> float:
    """The last epoch's mean of the term that compares logits, without its weight."""
    term = next(term for term in ("kd", "skd") if term in log[-1])
    return log[-1][term] / log[0]["settings"]["kd_weight"]


def has_soft_loss(log: list[dict]) -> bool:
    return bool({"kd", "skd"} & log[-1].keys() and log[0]["settings"].get("kd_weight"))


def measurements(plan: Plan, row: Row, folders: list[Path], kept: Path) -> dict[str, dict]:
    """Means over a row's runs, by temperature; kept in a file, which outlives the checkpoints."""
    names = [folder.name for folder in folders]
    needed = [folder / "last.pt" for folder in folders]
    teacher = None
    if "--baseline" not in plan.command(row)[1] or "KL" in plan.table.measured:
        teacher = row.teacher, plan.checkpoint(row)
        needed.append(teacher[1])
        if not plan.ready and not complete(plan.teacher(row)):
            return {}
    there = [path for path in needed if path.exists()]
    if kept.exists() and all(kept.stat().st_mtime >= path.stat().st_mtime for path in there):
        known = json.loads(kept.read_text())
        if known["runs"] == names:
            return known["means"]
    if len(there) < len(needed):
        return {}
    try:
        measured = [outputs(folder.resolve(), plan.args.data_dir or Path("data"), teacher)
                    for folder in folders]
    except UserError as error:      # a teacher that was trained anew, say
        print(f"not measured: {error}")
        return {}
    means = {"": {key: mean(one.values[key] for one in measured) for key in measured[0].values}}
    for temperature in measured[0].gaps:
        means[temperature] = {key: mean(one.gaps[temperature][key] for one in measured)
                              for key in measured[0].gaps[temperature]}
    if len(folders) > 1:
        means[""]["ensemble"] = ensemble(measured)
    logs = [complete(folder) for folder in folders]
    if has_soft_loss(logs[0]):
        means[""]["soft loss"] = mean(map(soft_loss, logs))
    kept.write_text(json.dumps({"runs": names, "means": means}) + "\n")
    return means


def show_measured(plan: Plan, found: dict) -> None:
    """What the table's paper measured of the networks; its own numbers in brackets."""
    wanted = plan.table.measured
    cells = [["", "teacher", "tau", *wanted]]
    for row in plan.rows:
        folders = [plan.run(row, seed) for seed in found[row[:4]]]
        if not folders or row.command.startswith("teacher"):
            continue
        kept = f"measured-{row.teacher}.json" if "KL" in wanted else "measured.json"
        means = measurements(plan, row, folders, folders[0].parent / kept)
        for temperature, values in means.items():
            if not set(wanted) & values.keys():
                continue
            line = [f"{values[key]:.4g}" if key in values else "" for key in wanted]
            if temperature in ("", "1"):
                line = [f"{text} ({row.beside[key]:g})"
                        if key in row.beside and text and plan.of_paper else text
                        for key, text in zip(wanted, line)]
            cells.append([row.label, row.teacher, temperature, *line])
    if len(cells) > 1:
        print(f"\n{plan.table.paper}, measured on the last epoch's networks (the paper's number)")
        print_markdown(cells)


# ================================================================================================
# The list of tables
# ================================================================================================

IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "cinic10": 90_000, "shapes": 4_000,
          "imagenet": 1_281_167}
RATE = 186e9    # floating-point operations a second: 137 images/s of a WRN16-3 on two cores


@functools.lru_cache
def operations(name: str, image_size: int) -> int:
    """Of one forward pass of one image."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        create_model(name, 10).eval()(torch.empty(1, 3, image_size, image_size))
    return counter.get_total_flops()


def hours(plan: Plan) -> float:
    """Rough: a step costs three forward passes of the student and one of the teacher."""
    size = {"shapes": 16, "imagenet": 224}.get(plan.dataset, 32)
    total = 0
    for job in plan.jobs():
        script, *words = job.line
        epochs = int(words[words.index("--epochs") + 1]) if "--epochs" in words else recipe_of(
            script, words, plan.dataset)["epochs"]
        if script == "fsp.py" and "--baseline" not in words:        # its first stage
            epochs += int(words[words.index("--fsp-epochs") + 1]) if "--fsp-epochs" in words else (
                recipe_of(script, words, plan.dataset)["fsp_epochs"])
        cost = 3 * operations(words[words.index("--student") + 1], size)
        if "--teacher" in words:
            cost += operations(words[words.index("--teacher") + 1], size)
        total += len(job.folders) * epochs * IMAGES.get(plan.dataset, 50_000) * cost
    return total / RATE / 3600


def list_tables(args: argparse.Namespace) -> None:
    rows = [["table", "paper", "question", "data set", "runs", "hours"]]
    for name, table in TABLES.items():
        try:
            plan = Plan(name, args, [])
            hours(plan)
        except UserError:       # no recipe for this data set
            continue
        rows.append([name, table.paper, table.question, plan.dataset,
                     str(sum(len(job.folders) for job in plan.jobs())), f"{hours(plan):,.1f}"])
    if not rows[1:]:
        raise UserError(f"no table has recipes for {args.dataset}")
    print_aligned(rows)
    print("hours: roughly, on two cores of an Intel Xeon, reckoned from operations counted and the "
          "speed of one network;\nas each paper has it, or as --dataset, --teacher, --student, "
          "--epochs and --runs say")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("name", nargs="?", choices=TABLES, metavar="TABLE", help="one of the list, named first")
    add("--table", type=Path, metavar="DIR", help="a folder of runs")
    add("--record", type=Path, nargs=2, metavar=("DIR", "TO"), help="keep the logs of runs")
    add("--measure", type=Path, nargs="+", metavar="RUN", help="runs' folders")
    add("--dataset", choices=["cifar10", "cifar100", "cinic10", "folder", "imagenet", "shapes"])
    add("--teacher", help="network, of all rows")
    add("--student", help="network, of all rows")
    add("--epochs", type=limited(int, 1, 1e5), help="of all rows")
    add("--teacher-ckpt", type=Path, help="this teacher for all rows, not one of the table's")
    add("--runs", type=limited(int, 1, 1e3), help="seeds of each row; else as the paper has it")
    add("--jobs", type=limited(int, 1, 1e3), default=1 if torch.cuda.is_available() else
        os.cpu_count(), help="runs side by side, one thread each on a CPU; else one a core")
    add("--show", action="store_true", help="print what is finished, train nothing")
    add("--data-dir", type=Path, help="where the data set is")
    add("--out", type=Path, default="runs/tables", help="the folder of the tables' runs")
    args, extra = parser.parse_known_args()
    extra = [part for word in extra
             for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if (args.table or args.measure or args.record or not args.name) and extra:
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    if extra and not extra[0].startswith("--"):
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    if taken := [word for word in extra if word in TAKEN]:
        parser.error(f"{', '.join(taken)}: not for a whole table")
    try:
        if args.table:
            list_runs(args.table)
        elif args.record:
            record(*args.record)
        elif args.measure:
            measure(args.measure, args.data_dir or Path("data"))
        elif not args.name:
            list_tables(args)
        else:
            plan = Plan(args.name, args, extra)
            failed = {} if args.show else run_all(plan.jobs(), args.jobs)
            for job, line in failed.items():
                print(f"failed: {' '.join(job.line)}\n    {line}", file=sys.stderr)
            show(plan)
            sys.exit(1 if failed else 0)
    except Exception as error:
        sys.exit(one_line(error))
    except KeyboardInterrupt:
        print("\nstopped: every finished epoch is kept, and the same command goes on from there")
        sys.exit(130)


if __name__ == "__main__":
    main()
