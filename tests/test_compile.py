"""--compile: the step as one graph gives the terms of the step as it is written.

Traced and differentiated as ever, but not translated to C++, which takes a minute a script: by hand
`TORCH_COMPILE_BACKEND=inductor python -m pytest tests/test_compile.py`.
"""
import importlib
import os
import sys

import pytest
import torch
from conftest import SCRIPTS, SMALL, equal_bits, pair_in_float64, state

BACKEND = os.environ.get("TORCH_COMPILE_BACKEND", "aot_eager")


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that torch.compile makes, each with its code."""
    made, real = [], torch.compile
    torch._dynamo.reset()
    backend = torch._dynamo.lookup_backend(BACKEND)

    def kept(graph, inputs):
        made.append(graph)
        return backend(graph, inputs)

    monkeypatch.setattr(torch, "compile", lambda step, *, fullgraph, mode: real(
        step, fullgraph=fullgraph, backend=kept))
    return made


def five_steps(script: str, *flags: str) -> list[list[float]]:
    """The loss terms of five steps with the recipe's rate, in float64."""
    module = importlib.import_module(script)
    sys.argv = [f"{script}.py", *SMALL, "--batch-size", "32", "--no-augment", *flags]
    args, loaders = module.prepare()
    student, teacher = pair_in_float64(script, args, loaders)
    student.train()
    step = module.wrap_step(student, module.make_step(student, teacher, args), args)
    optimizer = torch.optim.SGD(student.parameters(), args.lr / 100, 0.9)
    found = []
    for _, (images, labels) in zip(range(5), loaders[0]):
        optimizer.zero_grad()
        _, terms = step(images.double(), labels)
        sum(terms.values()).backward()
        optimizer.step()
        found.append([term.item() for term in terms.values()])
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_terms_are_those_of_the_written_step(script, graphs, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    written = five_steps(script)
    assert not graphs
    compiled = five_steps(script, "--compile")
    assert len(graphs) == 1     # and fullgraph: without a break
    assert len(written) == 5 and len({*map(tuple, written)}) == 5
    for one, other in zip(written, compiled):
        assert one == pytest.approx(other, rel=1e-5)


def test_a_compiled_run_goes_on(graphs, cli, tmp_path, monkeypatch):
    flags = [*SMALL, "--baseline", "--out", tmp_path]
    kd, folder = importlib.import_module("kd"), tmp_path / "shapes/baseline/resnet8/seed0"
    write = kd.write_run

    def stop(*args):
        write(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(kd, "write_run", stop)
    with pytest.raises(KeyboardInterrupt):
        cli("kd", *flags, "--compile")
    begun = state(folder)
    assert len(begun["log"]) == 2
    monkeypatch.setattr(kd, "write_run", write)
    assert cli("kd", *flags, "--compile").code == 0
    assert graphs and len(state(folder)["log"]) == 3
    assert equal_bits(state(folder)["log"][:2], begun["log"])


def test_a_failure_to_compile_is_one_line(cli, tmp_path, monkeypatch):
    def fails(graph, inputs):
        raise RuntimeError("no C++ compiler")
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **_: real(step, backend=fails))
    line = cli("kd", *SMALL, "--baseline", "--compile", "--out", tmp_path).refused()
    assert "torch.compile failed" in line and "without --compile" in line
