"""Two processes and four, as torchrun starts them; gloo, on the CPU; the last tests: torchrun."""
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, equal_bits, result_of, state
from torch import nn
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.multiprocessing import start_processes

import common

multiprocessing.set_forkserver_preload(["torch", "torchvision", "pytest", "numpy"])
FLAGS = [*SMALL, "--batch-size", "32", "--lr", "0.01"]
BASELINE = "runs/shapes/shapes/baseline/resnet8/seed0"


def train(rank, count, port, out, script, flags, stop, exact, most) -> None:
    """main() in a process as of torchrun, ended with a log of `stop` lines; it keeps what it did.
    exact: in float64, and BatchNorm does not look at the batch: each image stands for itself."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count),
                      MASTER_ADDR="localhost", MASTER_PORT=str(port))
    sys.stdout, sys.stderr = (open(out / f"{kind}{rank}", "w", 1) for kind in ("out", "err"))
    module, had = importlib.import_module(script), {"files": [], "seeds": [], "weights": {}}
    losses, read, write, draw = module.losses, module.read_run, module.write_run, common.draw_shapes
    normalise = common.ImageLoader.normalise

    def spied(student, *args):
        result = losses(student, *args)
        had["seeds"].append(torch.initial_seed())
        had["statistics"] = [buffer.clone() for buffer in student.buffers()]
        return result

    def write_run(folder, model, optimizer, log, *args):
        write(folder, model, optimizer, log, *args)
        had["weights"][str(folder)] = {key: x.clone() for key, x in model.state_dict().items()}
        if len(log) == stop:
            os._exit(0)

    def heard(event, args):
        if event in ("os.rename", "os.mkdir") or event == "open" and "w" in str(args[1]):
            had["files"] += [str(args[0])] * ("/runs/" in str(args[0]))

    if exact:
        torch.set_default_dtype(torch.float64)
        nn.BatchNorm2d.train = lambda norm, mode=True: nn.Module.train(norm, False)
        common.ImageLoader.normalise = lambda *args: normalise(*args).double()
    common.draw_shapes = lambda count, seed, *kind: draw(min(count, most), seed, *kind)
    module.read_run = lambda folder: time.sleep(rank == 1 and stop > 0) or read(folder)   # late
    module.losses, module.write_run = spied, write_run
    sys.addaudithook(heard)
    sys.argv = [f"{script}.py", *FLAGS, *flags, "--out", str(out / "runs")]
    module.main()
    torch.save(had | {"group": torch.distributed.is_initialized()}, out / f"rank{rank}.pt")


def start(count: int, out: Path, script: str, *flags: str, stop=0, exact=True, most=299) -> None:
    """`count` processes, to a good end; when one fails, so does this, and the others are ended."""
    out.mkdir(exist_ok=True)
    args = count, get_free_port(), out, script, flags, stop, exact, most
    started = start_processes(train, args, count, False, True, "forkserver")    # as daemons
    end = time.time() + 120
    while not started.join(1):
        assert time.time() < end, "they wait for each other"


def assert_near(*folders: Path) -> None:
    """Equal to rounding: weights, terms and accuracies, momenta."""
    first, second = ([one["whole"], one["log"], one["optimizer"]["state"]]
                     for one in map(result_of, folders))
    torch.testing.assert_close(first, second, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("script", ["kd", "at", "fsp", "overhaul", "overhaul scenes"])
def test_processes_train_as_one(script, tmp_path):
    """Images are shared, also of a smaller batch, gradients averaged, terms summed, and right
    answers among unequal shares; in both of FSP's stages, when connectors rest, and by pixels."""
    script, *scenes = script.split()
    teacher, classes = ("deeplab_resnet8_half", 11) if scenes else ("wrn10_1", 10)
    torch.save(common.create_model(teacher, classes).state_dict(), tmp_path / "teacher.pt")
    flags = ["--train-images", "72", "--teacher-ckpt", str(tmp_path / "teacher.pt")]
    if scenes:      # nothing explodes without BatchNorm, and each pixel has a label
        flags += (f"--dataset scenes --teacher {teacher} --student {teacher} --lr 1e-6 --alpha 1e-9"
                  " --no-augment --train-images 40").split()
    flags += {"overhaul": ["--epochs", "2", "--distill-epochs", "1", "--teacher-bn", "running"],
              "fsp": ["--epochs", "1", "--fsp-epochs", "1"]}.get(script, ["--epochs", "1"])
    count = 4 if script == "at" else 2
    for processes, folder in ((1, tmp_path / "one"), (count, tmp_path)):
        start(processes, folder, script, *flags, most=99 if scenes else 299)
    first, *others = [torch.load(tmp_path / f"rank{rank}.pt")["weights"] for rank in range(count)]
    assert len(first) == (2 if script == "fsp" else 1)
    for folder, weights in first.items():
        assert_near(Path(folder), tmp_path / "one" / Path(folder).relative_to(tmp_path))
        assert all(equal_bits(weights, other[folder]) for other in others)


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    """Of two processes the second is late to see what the folder holds."""
    flags = ["kd", "--epochs", "3", "--baseline"]
    start(1, tmp_path / "one", *flags)
    for count, epochs in [(2, 1), (1, 2), (2, 3)]:
        start(count, tmp_path, *flags, stop=1 + epochs)
        header, *rows = state(tmp_path / BASELINE)["log"]
        assert [row["epoch"] for row in rows] == [*range(1, epochs + 1)]
    assert [x[-7:] for x in header["versions"]] == ["2 x cpu", "1 x cpu"], "each is named once"
    assert_near(tmp_path / "one" / BASELINE, tmp_path / BASELINE)


def test_what_is_alike_in_all_processes_and_what_is_not(tmp_path):
    flags = ["--student", "mobilenetv2", "--baseline", "--runs", "2", "--train-images", "64"]
    start(2, tmp_path, "kd", *flags, exact=False)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert equal_bits(first["weights"], second["weights"])
    for folder, weights in first["weights"].items():
        assert equal_bits(weights, state(Path(folder))["whole"])
    statistics = [x for name, x in weights.items() if "running" in name or "tracked" in name]
    assert equal_bits(statistics, first["statistics"]), "of the first process's last step"
    assert not equal_bits(statistics, second["statistics"])
    assert len({*first["seeds"], *second["seeds"]}) == 8, "dropout of 2 seeds, epochs, processes"
    assert first["files"] and not second["files"], "the first process alone writes"
    assert not any((tmp_path / name).read_text() for name in ("out1", "err1", "err0"))
    assert not first["group"] and not second["group"], "destroyed at the end"


def torchrun(*flags: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", ROOT / "kd.py", *FLAGS, "--baseline", *flags]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})


@pytest.mark.parametrize("flag, says, code", [
    ("--epoch=1", "kd.py: error: unrecognized arguments: --epoch=1\n", 2),
    ("--batch-size=33", "error: --batch-size 33: BatchNorm needs", 1)])
def test_an_error_is_said_once_and_ends_the_run(flag, says, code, tmp_path):
    process = torchrun(flag, "--out", tmp_path / "runs")
    said = [(line, time.time()) for line in process.stderr]
    text = "".join(line for line, _ in said)
    assert process.wait() == 1 and f"exitcode  : {code} " in text, text
    assert text.count(says) == 1 and text.count("Traceback") == 1, f"torchrun's own: {text}"
    moment, = (moment for line, moment in said if says in line)
    assert time.time() - moment < 9, "nobody waits for the others' ten seconds"
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_torchrun_killed_in_one_process(tmp_path):
    """The same command goes on, to the bits of a run that was left alone, and ends cleanly."""
    flags = ["--train-images", "320", "--epochs", "6"]
    start(2, tmp_path / "one", "kd", *flags, "--baseline", exact=False, most=4000)
    process = torchrun(*flags, "--out", tmp_path / "runs")
    while not process.stdout.readline().startswith("epoch"):
        assert process.poll() is None, process.stderr.read()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    os.kill(max(map(int, children.split())), signal.SIGKILL)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and "Signal 9" in said, said
    assert len(state(tmp_path / BASELINE)["log"]) < 7
    process = torchrun(*flags, "--out", tmp_path / "runs")
    out, said = process.communicate(timeout=120)
    assert process.returncode == 0 and not said and out.count("epoch 6 ") == 1, said
    assert equal_bits(result_of(tmp_path / BASELINE), result_of(tmp_path / "one" / BASELINE))
