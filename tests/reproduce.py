"""What finished runs say: a table of them all, and measurements of their networks.

    python tests/reproduce.py --table runs             every finished run below a folder: mean and
                                                       deviation over the seeds, and the gain
    python tests/reproduce.py --measure RUN [RUN ...]  of runs' folders, on the split they were
                                                       measured on: accuracy, cross-entropy and
                                                       KL(teacher || student) (Heo et al., Table 7),
                                                       entropy, free energy and their gaps beside
                                                       the theorems (Tables 2 and 7 of SKD's paper),
                                                       and the ensemble of several (FSP's Table 1)
"""
import argparse
import json
import sys
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (  # noqa: E402
    ImageLoader, UserError, load_data, load_weights, new_model, one_line, read_checkpoint, read_log,
    weights_hash)
from skd import entropy, free_energy, theorems  # noqa: E402


def spread(values: list[float]) -> str:
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def print_aligned(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


def finished(folder: Path) -> dict[tuple, dict[str, float]]:
    """The last accuracies, by seed, of all finished runs of one (folder, data, ..., settings)."""
    runs = {}
    for path in sorted(folder.rglob("seed*/log.jsonl")):
        log, parts = read_log(path.parent), path.relative_to(folder).parts
        if not log or len(parts) < 5 or parts[-4] == "stage1":
            continue        # cut short, not below the runs' folder, or the first half of a run
        *above, data, method, networks, seed, _ = parts
        if len(log) == log[0]["settings"].get("epochs", 0) + 1:
            settings = json.dumps(log[0]["settings"], sort_keys=True)
            key = ("/".join(above), data, method, networks, settings)
            runs.setdefault(key, {})[seed] = log[-1]["test"]
    return runs


def gain_of(key: tuple, runs: dict) -> str:
    """The mean gain on the baseline of the same folder and settings, where it has all the seeds."""
    above, data, method, networks, text = key
    of_student = (above, data, "baseline", networks.split("-")[-1])
    for (*place, other), baseline in runs.items():
        same = json.loads(other).items() <= json.loads(text).items()
        if method != "baseline" and tuple(place) == of_student and same and (
                runs[key].keys() <= baseline.keys()):
            return f"{mean(runs[key][seed] - baseline[seed] for seed in runs[key]):+.2f}"
    return ""


def table(folder: Path) -> None:
    runs = finished(folder)
    if not runs:
        raise UserError(f"{folder} holds no finished run: name the folder of the runs")
    rows = [["folder", "data", "method", "networks", "accuracy, %", "seeds", "gain"]]
    for key, tests in runs.items():
        rows.append([*key[:4], spread([*tests.values()]), str(len(tests)), gain_of(key, runs)])
    print_aligned(rows)


@torch.no_grad()
def logits_of(network: nn.Module, loader: ImageLoader) -> Tensor:
    return torch.cat([network.eval()(images) for images, _ in loader]).double()


def loader_of(settings: dict, data_dir: Path) -> ImageLoader:
    """The images that a run was measured on."""
    dataset = settings["data"]
    if "/" in dataset:      # a folder of images goes by its path
        dataset, data_dir = "folder", Path(dataset)
    return load_data(dataset, data_dir, 100, "cpu", augment=False, seed=0,
                     image_size=settings["image_size"], split=settings["split"])[1]


def teacher_of(run: Path, header: dict, loader: ImageLoader) -> nn.Module:
    """The teacher that a run learnt from: the named checkpoint, or the baseline beside it."""
    command = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    command.add_argument("--teacher-ckpt", type=Path)
    command.add_argument("--teacher-epochs", default="")
    given, _ = command.parse_known_args(header["command"][1:])
    name = run.parent.name.split("-")[0]
    early = given.teacher_epochs and f"-{given.teacher_epochs}"
    path = given.teacher_ckpt or run.parents[2] / f"baseline/{name}{early}/seed0/last.pt"
    teacher = new_model(name, loader, 0)
    load_weights(teacher, path)
    if weights_hash(teacher) != header["settings"]["teacher_hash"]:
        raise UserError(f"{path} is not the teacher of {run}, whose settings name another hash")
    return teacher


def gaps(z: Tensor, v: Tensor, temperature: float) -> dict[str, float]:
    """Eq. 4 to 6 and 10 of SKD's paper and its theorems; z the student's logits, v the teacher's.

    Entropy does not see a constant added to all logits, free energy does: raw, and centred.
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


def measure(runs: list[Path], data_dir: Path) -> None:
    accuracies, probabilities, rows, measured_on = [], 0, [], None
    for run in (run.resolve() for run in runs):
        log = read_checkpoint(run / "last.pt").get("log")
        if not log:
            raise UserError(f"{run} holds weights, but no run of ours")
        settings = log[0]["settings"]
        images = [settings[key] for key in ("data", "split", "image_size")]
        if measured_on not in (None, images):
            raise UserError(f"{run} was measured on other images than the run before it: measure "
                            f"them one by one")
        measured_on, loader = images, loader_of(settings, data_dir)
        labels = torch.cat([labels for _, labels in loader])
        teacher, *student = run.parent.name.split("-")      # a baseline's folder names one network
        of_baseline = "teacher_hash" not in settings
        student = new_model(teacher if of_baseline else student[0], loader, 0)
        load_weights(student, run / "last.pt")
        z = logits_of(student, loader)
        accuracies.append(100 * (z.argmax(1) == labels).double().mean().item())
        probabilities = probabilities + z.softmax(1)
        line = (f"{run}: {settings['split']} accuracy {accuracies[-1]:.2f} %, cross-entropy "
                f"{F.cross_entropy(z, labels).item():.4f}")
        if not of_baseline:
            v = logits_of(teacher_of(run, log[0], loader), loader)
            kl = F.kl_div(z.log_softmax(1), v.log_softmax(1), reduction="batchmean",
                          log_target=True)
            line += f", KL(teacher || student) {kl.item():.4f}"
            for temperature in sorted({1.0, settings.get("temperature", 1.0)}):
                values = gaps(z, v, temperature)
                rows.append(["/".join(run.parts[-3:]), f"{temperature:g}",
                             *(f"{value:.4f}" for value in values.values())])
        print(line)
    if rows:
        print_aligned([["run", "tau", *values], *rows])
    if len(runs) > 1:
        ensemble = 100 * (probabilities.argmax(1) == labels).double().mean().item()
        print(f"average {mean(accuracies):.2f} %, ensemble {ensemble:.2f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--table", type=Path, help="a folder of runs")
    what.add_argument("--measure", type=Path, nargs="+", metavar="RUN", help="runs' folders")
    parser.add_argument("--data-dir", type=Path, default="data")
    args = parser.parse_args()
    try:
        if args.table:
            table(args.table)
        else:
            measure(args.measure, args.data_dir)
    except Exception as error:
        sys.exit(one_line(error))


if __name__ == "__main__":
    main()
