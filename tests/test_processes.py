"""Several processes, as torchrun starts them: gloo on the CPU, two and four of them.

The processes of most tests are made by one that has imported torch already, with torchrun's
environment variables; the last test starts the real torchrun, and kills a part of it.
"""
import importlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPTS, SMALL, equal_bits, fewer, pair_in_float64, result_of, state

import common

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torchvision", "pytest", "numpy"])
FLAGS = [*SMALL, "--batch-size", "32"]
KD = "shapes/kd/wrn10_1-resnet8/seed0"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def in_process(work, rank: int, count: int, port: int, out: Path, args: list) -> None:
    """`work`, in a process of torchrun's kind; what it prints goes to a file."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count),
                      MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    sys.stdout = open(out / f"out{rank}", "w", buffering=1)
    sys.stderr = sys.__stderr__ = open(out / f"err{rank}", "w", buffering=1)
    common.draw_shapes = fewer(common.draw_shapes)
    work(rank, out, *args)


def start(work, count: int, out: Path, *args: object, only: int | None = None,
          port: int | None = None, seconds: float = 90, kill_at: Path | None = None) -> list[int]:
    """Exit codes of `count` processes; once one fails the others are ended, as torchrun does.

    All are killed as soon as the file `kill_at` is there.
    """
    out.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    started = [CONTEXT.Process(target=in_process, args=(work, rank, count, port, out, args))
               for rank in range(count) if only in (None, rank)]
    for process in started:
        process.start()
    begun = time.time()
    while any(process.is_alive() for process in started):
        failed = any(process.exitcode for process in started)
        if failed or time.time() - begun > seconds:
            for process in started:
                process.terminate()
        if kill_at and kill_at.exists():
            for process in started:
                process.kill()
        time.sleep(0.02)
    assert time.time() - begun < seconds, "the processes wait for each other"
    return [process.exitcode for process in started]


def main_of(rank: int, out: Path, script: str, *flags: str) -> None:
    sys.argv = [f"{script}.py", *flags]
    runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")


def gradients(script: str, out: Path) -> dict[str, torch.Tensor]:
    """Of the first step, in float64, its networks in eval mode: each image stands for itself."""
    module = importlib.import_module(script)
    own = ["--teacher-bn", "running"] if script == "overhaul" else []
    sys.argv = [f"{script}.py", *FLAGS, *own, "--no-augment", "--out", str(out)]
    args, loaders = module.prepare()
    student, teacher = pair_in_float64(script, args, loaders)
    images, labels = next(iter(loaders[0]))
    step = module.make_step(student.eval(), teacher, args)
    if script == "fsp":
        module.freeze_rest(student, step, images.double(), labels)
    step = module.wrap_step(student, step, args)
    _, terms = step(images.double(), labels)
    sum(terms.values()).backward()
    return {name: x.grad for name, x in student.named_parameters() if x.grad is not None}


def images(out: Path) -> list[torch.Tensor]:
    """What a pass over the training images, augmented, and over the test images shows."""
    kd = importlib.import_module("kd")
    sys.argv = ["kd.py", *FLAGS, "--train-images", "101", "--augment", "--out", str(out)]
    loaders = kd.prepare()[1]
    loaders[1].labels = loaders[1].labels[:199]     # not shared alike by two
    loaders[0].set_epoch(3, 1)
    return [torch.cat([x.flatten(1) for x, _ in loader]) for loader in loaders]


def look(rank: int, out: Path) -> None:
    common.join_processes()
    found = {script: gradients(script, out) for script in SCRIPTS}
    torch.save([found, images(out)], out / f"rank{rank}.pt")


def train(rank: int, out: Path, script: str, stop: int, *flags: str) -> None:
    """A script's main(); every process keeps its weights; it ends after `stop` epochs."""
    module = importlib.import_module(script)
    write, epochs = module.write_run, 0

    def kept(folder: Path, content: dict) -> None:
        nonlocal epochs
        write(folder, content)
        name = "-".join(folder.relative_to(out).parts)
        torch.save(content["model"], out / f"{name}.rank{rank}.pt")
        epochs += 1
        if epochs == stop:
            os._exit(0)

    module.write_run = kept
    sys.argv = [f"{script}.py", *flags, "--out", str(out)]
    module.main()


@pytest.mark.parametrize("count", [2, 4])
def test_gradients_and_images_are_those_of_one_process(count, tmp_path, monkeypatch):
    """101 images in batches of 32: of 5 left over two processes share 4, four could take one."""
    monkeypatch.setattr(common, "draw_shapes", fewer(common.draw_shapes))
    assert start(look, count, tmp_path) == [0] * count
    found = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(count)]
    for script in SCRIPTS:
        alone = gradients(script, tmp_path)
        assert alone.keys() == found[0][0][script].keys()
        for name, gradient in alone.items():
            for others, _ in found:
                difference = (others[script][name] - gradient).abs().max()
                assert difference <= 1e-9 * gradient.abs().max(), (script, name)
    train_images, test_images = images(tmp_path)
    together = [torch.cat([shares[part] for _, shares in found]) for part in (0, 1)]
    assert len(train_images) == 101 and len(test_images) == 199

    def rows(x: torch.Tensor) -> set:
        return {row.numpy().tobytes() for row in x}

    assert len(together[1]) == 199 and rows(together[1]) == rows(test_images)
    assert len(together[0]) == {2: 100, 4: 96}[count] and rows(together[0]) <= rows(train_images)
    assert {len(shares[0]) for _, shares in found} == {len(together[0]) // count}


@pytest.mark.parametrize("script, count", [("fsp", 2), ("overhaul", 4)])
def test_all_processes_have_the_same_weights(script, count, tmp_path):
    """To the bit, statistics too; in FSP's stage 1 the classifier learns nothing."""
    more = ["--distill-epochs", "1"] if script == "overhaul" else []   # then its connectors rest
    assert start(train, count, tmp_path, script, 0, *FLAGS, *more) == [0] * count
    logs = sorted(tmp_path.rglob("log.jsonl"))
    assert len(logs) == (3 if script == "fsp" else 2)
    for log in logs:
        name = "-".join(log.parent.relative_to(tmp_path).parts)
        weights = [torch.load(tmp_path / f"{name}.rank{rank}.pt") for rank in range(count)]
        assert all(equal_bits(weights[0], other) for other in weights[1:])
        assert equal_bits(weights[0], state(log.parent)["model"])
    assert (tmp_path / "out0").read_text().count("epoch 2 ") == len(logs)
    assert not (tmp_path / "out1").read_text() and not (tmp_path / "err1").read_text()


def test_a_run_goes_on_with_another_number_of_processes(tmp_path, cli):
    flags = [*FLAGS, "--no-augment"]
    assert start(train, 2, tmp_path / "a", "kd", 3, *flags) == [0, 0]
    folder = tmp_path / "a" / KD
    assert len(state(folder)["log"]) == 2       # header, an epoch
    assert cli("kd", *flags, "--out", tmp_path / "a").code == 0
    assert [row["epoch"] for row in state(folder)["log"][1:]] == [1, 2]
    folder = tmp_path / "b" / KD
    assert start(train, 1, tmp_path / "b", "kd", 3, *flags) == [0]
    assert len(state(folder)["log"]) == 2
    assert start(train, 2, tmp_path / "b", "kd", 0, *flags) == [0, 0]
    assert [row["epoch"] for row in state(folder)["log"][1:]] == [1, 2]


def errors(out: Path) -> list[str]:
    return [line for path in sorted(out.glob("err*")) for line in path.read_text().splitlines()]


def test_what_cannot_work_is_said_in_one_line_by_one_process(tmp_path):
    flags = [*FLAGS, "--epochs", "1", "--baseline", "--out", str(tmp_path / "runs")]
    assert 1 in start(main_of, 2, tmp_path / "odd", "kd", *flags, "--batch-size", "33")
    assert [line.split(":")[0] for line in errors(tmp_path / "odd")] == ["error"]
    assert "33" in errors(tmp_path / "odd")[0]
    assert 2 in start(main_of, 2, tmp_path / "typo", "kd", "--epoch", "1")
    assert errors(tmp_path / "typo")[-1].endswith("unrecognized arguments: --epoch 1")
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert start(main_of, 2, tmp_path / "port", "kd", *flags, only=0, port=port) == [1]
    line, = errors(tmp_path / "port")
    assert line.startswith("error: the processes cannot meet") and "port" in line


def differently(rank: int, out: Path, *flags: str) -> None:
    main_of(rank, out, "kd", *flags, "--lr", str(0.1 + rank))


def test_other_arguments_in_one_process_are_refused(tmp_path):
    assert 1 in start(differently, 2, tmp_path, *FLAGS, "--out", str(tmp_path / "runs"))
    line, = errors(tmp_path)
    assert line.startswith("error: process 1 was started with other arguments")
    assert not (tmp_path / "runs").exists()


def children_of(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:     # it has just ended
            continue
        if int(parent) == pid:
            found.append(int(folder.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_killed_in_all_processes_then_in_one_of_torchruns(tmp_path):
    """The same command goes on each time, to the bits of a run that was left alone."""
    flags = [*FLAGS, "--train-images", "640", "--epochs", "8", "--baseline", "--out"]
    assert start(main_of, 2, tmp_path, "kd", *flags, str(tmp_path / "whole")) == [0, 0]
    flags, folder = [*flags, str(tmp_path / "cut")], "shapes/baseline/resnet8/seed0"
    assert start(main_of, 2, tmp_path, "kd", *flags,
                 kill_at=tmp_path / "cut" / folder / "last.pt") == [-9, -9]
    epochs = len(state(tmp_path / "cut" / folder)["log"])
    torchrun = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone",
                                 "--nproc-per-node", "2", __file__, "kd", *flags], text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in torchrun.stdout:
        if line.startswith("epoch"):
            break
    os.kill(max(children_of(torchrun.pid)), signal.SIGKILL)
    rest = torchrun.communicate(timeout=60)[0]
    assert torchrun.returncode == 1 and "Signal 9" in rest, rest
    assert epochs < len(state(tmp_path / "cut" / folder)["log"]) < 9
    assert start(main_of, 2, tmp_path, "kd", *flags) == [0, 0]
    assert equal_bits(result_of(tmp_path / "cut" / folder), result_of(tmp_path / "whole" / folder))


if __name__ == "__main__":      # what torchrun starts
    common.draw_shapes = fewer(common.draw_shapes)
    main_of(0, Path(), *sys.argv[1:])
