"""A step, and the loop around it: as written, compiled, and recorded as a CUDA graph.

No GPU is needed: a stand-in keeps kernels with their memory, and fake tensors have no values.
"""
import ast
import contextlib
import importlib
import inspect
import sys
from argparse import Namespace
from functools import partial
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from conftest import SCRIPTS, SMALL, equal_bits, pair_in_float64, result_of, state
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common

kd = importlib.import_module("kd")      # the loop is the same text in every script
FEW = [*SMALL, "--train-images", "80", "--baseline"]       # three batches, the last one smaller
# six batches, the last one smaller; the rate falls after the second of three epochs
SIX = ["--train-images", "88", "--batch-size", "16", "--epochs", "3", "--milestones", "0.67"]


def by_hand(momentum: float, nesterov: bool) -> tuple[dict, list[dict]]:
    """A resnet8 after four epochs of SGD spelled out; each image counts once in the means."""
    train, test = common.load_data("shapes", "", 32, "cpu", augment=True, seed=0, train_images=80)
    torch.manual_seed(0)
    model, rows = common.create_model("resnet8", 10).double(), []
    weights = list(model.parameters())
    averages = [torch.zeros_like(weight) for weight in weights]
    for epoch, lr in enumerate([0.02, 0.02, 0.006, 0.006], 1):
        row = {"ce": 0, "train": 0, "test": 0}
        train.set_epoch(epoch)
        for images, labels in train:
            logits = model.train()(images)
            ce = F.cross_entropy(logits, labels)
            row["ce"] += ce.item() * len(labels) / 80
            row["train"] += 100 * (logits.argmax(1) == labels).sum().item() / 80
            for weight, gradient, v in zip(weights, torch.autograd.grad(ce, weights), averages):
                gradient = gradient + 0.1 * weight.detach()
                v.mul_(momentum).add_(gradient)
                weight.data -= lr * (gradient + momentum * v if nesterov else v)
        for images, labels in test:
            row["test"] += (model.eval()(images).argmax(1) == labels).sum().item() / 2     # of 200
        rows.append(row)
    return model.state_dict(), rows


@pytest.mark.parametrize("momentum, nesterov", [(0.8, False), (0.8, True), (0.0, True)])
def test_training_is_sgd(momentum, nesterov, cli, tmp_path, monkeypatch):
    """In float64: the weights, and the logged means, also of the smaller batch."""
    real = common.ImageLoader.normalise
    monkeypatch.setattr(common.ImageLoader, "normalise", lambda *args: real(*args).double())
    monkeypatch.setattr(kd, "create_model", lambda *names, **task: common.create_model(
        *names, **task).double())
    flags = ["--lr", 0.02, "--momentum", momentum, "--weight-decay", 0.1, "--milestones", 0.5,
             "--lr-decay", 0.3, "--nesterov" if nesterov else "--no-nesterov", "--epochs", 4]
    assert cli("kd", *FEW, *flags, "--out", tmp_path).code == 0
    kept = state(tmp_path / "shapes/shapes/baseline/resnet8/seed0")
    weights, rows = by_hand(momentum, nesterov)
    torch.testing.assert_close(kept["model"], dict(weights), rtol=1e-9, atol=1e-9)
    for logged, row in zip(kept["log"][1:], rows, strict=True):
        assert {key: logged[key] for key in row} == pytest.approx(row, rel=1e-6)


def test_milestones_are_fractions_of_all_epochs(cli, tmp_path):
    """Also of a teacher stopped early, which has the recipe's rates, and of distilling stopped."""
    flags = [*SMALL, "--train-images", 20, "--epochs", 10, "--teacher-epochs", 7, "--out", tmp_path,
             "--lr", 0.01, "--lr-decay", 0.1, "--milestones", 0.02, 0.5]
    assert cli("kd", *flags, "--distill-epochs", 4).code == 0
    assert cli("fsp", *flags, "--fsp-epochs", 4, "--fsp-milestones", 0.5).code == 0
    for run, rates in {"baseline/wrn10_1-7": [0.05] * 6 + [0.01],
                       "kd/wrn10_1-resnet8": [0.01] + [1e-3] * 4 + [1e-4] * 5,
                       "fsp/wrn10_1-resnet8/stage1": [1e-3] * 2 + [1e-4] * 2,
                       "fsp/wrn10_1-resnet8": [0.01] + [1e-3] * 4 + [1e-4] * 5}.items():
        log = state(tmp_path / "shapes/shapes" / run / "seed0")["log"]
        assert [row["lr"] for row in log[1:]] == pytest.approx(rates), run


def test_accuracy_is_measured_in_the_precision_of_training():
    dtypes, (_, test) = [], common.load_data("shapes", "", 32, "cpu", augment=True, seed=0)

    class Probe(torch.nn.Linear):
        def forward(self, images):
            dtypes.append(super().forward(images.flatten(1)).dtype)
            return torch.zeros(len(images), 10)

    for bf16 in (False, True):
        kd.evaluate(Probe(768, 10), test, Namespace(device="cpu", device_type="cpu", bf16=bf16,
                                                    world=1))
    assert dtypes == [torch.float32] * 4 + [torch.bfloat16] * 4


def test_the_live_line_is_for_terminals(cli, tmp_path, monkeypatch):
    flags = [*FEW, "--train-images", 120, "--batch-size", 2, "--epochs", 1, "--out"]
    assert cli("kd", *flags, tmp_path / "file").out.count("epoch") == 1
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    out = cli("kd", *flags, tmp_path / "terminal").out
    assert out.count("epoch") == 2 and "epoch 1: step 50 of 60\r" in out


def test_the_loop_over_batches_does_not_wait_for_the_device():
    loop, = [node for node in ast.walk(ast.parse(inspect.getsource(kd.train)))
             if isinstance(node, ast.For) and "images" in ast.unparse(node.target)]
    live, = [node for node in loop.body if "isatty()" in ast.unparse(getattr(node, "test", node))]
    calls = [node for node in {*ast.walk(loop)} - {*ast.walk(live)} if isinstance(node, ast.Call)]
    assert {ast.unparse(call.func) for call in calls} <= {"enumerate", "len", "update"}


@pytest.fixture
def teacher(tmp_path):
    torch.save(common.create_model("wrn10_1", 10).state_dict(), tmp_path / "teacher.pt")
    return [*SMALL, "--teacher-ckpt", tmp_path / "teacher.pt"]


@pytest.mark.parametrize("script", ["kd", "fsp", "overhaul"])
def test_a_compiled_run_is_the_written_one(script, cli, teacher, tmp_path, monkeypatch):
    """To the bit, stopped and continued; not translated to C++, which takes minutes."""
    module, calls, graphs = importlib.import_module(script), iter(range(99)), []
    aot_eager, evaluate = torch._dynamo.lookup_backend("aot_eager"), module.evaluate
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, fullgraph=True, backend=(
        lambda graph, inputs: graphs.append(graph) or aot_eager(graph, inputs))))
    flags = [*teacher, "--train-images", 64, *["--fsp-epochs", 1] * (script == "fsp"), "--out"]
    assert cli(script, *flags, tmp_path / "written").code == 0 and not graphs
    monkeypatch.setattr(module, "evaluate", lambda *args: (
        sys.exit("stopped") if next(calls) == 2 else evaluate(*args)))
    assert cli(script, *flags, tmp_path / "compiled", "--compile").err == "stopped\n"
    assert cli(script, *flags, tmp_path / "compiled", "--compile").code == 0
    assert len(graphs) == (2 if script == "fsp" else 1), "a graph a stage, without a break"
    folder = f"shapes/shapes/{script}/wrn10_1-resnet8/seed0"
    assert equal_bits(*(result_of(tmp_path / way / folder) for way in ("written", "compiled")))


class Graph(TorchDispatchMode):
    """A CUDA graph of the CPU's kernels: replayed on the memory and with the numbers of the
    recording, without Python. As with the real one nothing happens yet while it records."""
    def __init__(self, cuda):
        super().__init__()
        self.cuda, self.kernels, self.before = cuda, [], {}     # the memory as it was

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(kernel), "the step reads a value"
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.before:
                self.before[x.untyped_storage().data_ptr()] = x, x.clone()
        results = kernel(*args, **kwargs or {})
        if not str(kernel).startswith("profiler"):
            self.kernels.append((kernel, args, kwargs or {}, results))
        return results

    @torch.no_grad()
    def __exit__(self, *error):
        super().__exit__(*error)
        for x, value in self.before.values():
            x.copy_(value)

    @torch.no_grad()
    def replay(self):
        self.cuda.replay()
        for kernel, args, kwargs, results in self.kernels:
            for kept, new in zip(tree_leaves(results), tree_leaves(kernel(*args, **kwargs))):
                if isinstance(kept, torch.Tensor):
                    kept.copy_(new)


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda with a GPU that is not there: what is called of it, and each step of training."""
    cuda = MagicMock()
    cuda.CUDAGraph.side_effect = lambda: Graph(cuda)
    cuda.graph.side_effect = lambda recording, capture_error_mode: recording
    for name in ("CUDAGraph", "graph", "Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))

    def spied(losses, student, teacher, *args):
        cuda.step(teacher)
        assert teacher is None or not any(part.training for part in teacher.modules())
        return losses(student, teacher, *args)

    def on_gpu(parse_args):
        return Namespace(**vars(parse_args()) | {"device_type": "cuda"})

    for module in map(importlib.import_module, SCRIPTS):
        monkeypatch.setattr(module, "losses", partial(spied, module.losses))
        monkeypatch.setattr(module, "parse_args", partial(on_gpu, module.parse_args))
    return cuda


@pytest.mark.parametrize("rank, flag, device", [
    (0, "", "cuda:0"), (1, "", "cuda:1"), (2, "", None), (1, "--device=cuda", "cuda:1"),
    (0, "--device=cuda:1", "cuda:1"), (0, "--device=cuda:2", None), (1, "--device=cpu", "cpu")])
def test_each_process_has_a_gpu_of_its_own(rank, flag, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda name: chosen.append(name))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setattr(sys, "argv", ["kd.py", *filter(None, [flag])])
    chosen = []
    with pytest.raises(SystemExit) if device is None else contextlib.nullcontext():
        args = kd.parse_args()
        assert args.device == device
        assert args.bf16 == torch.backends.cudnn.benchmark == (device != "cpu")
    assert chosen == [device] * (device in ("cuda:0", "cuda:1"))


def test_what_is_recorded_when(cuda, cli, teacher, tmp_path, monkeypatch):
    """Anew for another rate, and only then; nothing where several processes train."""
    fork, enter, leave, join = ("Stream().wait_stream", "stream().__enter__", "stream().__exit__",
                                "current_stream().wait_stream")
    for flags, inner in (FEW, []), (teacher, [fork, enter, leave, join]):       # the teacher's pass
        cuda.reset_mock()
        assert cli("kd", *flags, *SIX, "--out", tmp_path / f"{len(inner)}").code == 0
        aside = [fork, enter, "step", *inner, leave, join]
        first = [*aside * 4, "graph", "step", *inner, "replay", *aside]
        calls = [name for name, *_ in cuda.mock_calls if name in first]
        assert calls == [*first, *["replay"] * 5, *aside, *first]
        assert cuda.graph.call_args.kwargs == {"capture_error_mode": "thread_local"}
    cuda.reset_mock()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda model: model)
    monkeypatch.setattr(kd, "distributed", MagicMock())
    assert cli("kd", *FEW, *SIX, "--out", tmp_path / "two").code == 0
    assert [name for name, *_ in cuda.mock_calls] == ["step"] * 18


@pytest.mark.parametrize("script", SCRIPTS)
def test_recorded_steps_are_the_written_ones(script, cuda, cli, teacher, tmp_path):
    """To the bit, with the momenta and the log; and the teacher stays what it was."""
    flags, folder = [*teacher, *SIX, "--out"], f"shapes/shapes/{script}/wrn10_1-resnet8/seed0"
    assert cli(script, *flags, tmp_path / "written", "--no-graph").code == 0
    assert {name for name, *_ in cuda.mock_calls} == {"step"}
    assert cli(script, *flags, tmp_path / "recorded").code == 0
    assert cuda.replay.call_count >= 7
    assert equal_bits(*(result_of(tmp_path / way / folder) for way in ("written", "recorded")))
    used = [call.args[0] for call in cuda.step.call_args_list if call.args[0] is not None][-1]
    for key, value in used.state_dict(keep_vars=True).items():
        assert equal_bits(value.data, torch.load(tmp_path / "teacher.pt")[key])
        assert not value.requires_grad


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch knows no CUDA")
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_step_stays_on_the_gpu(script, monkeypatch):
    """Its networks are made on a fake GPU, since fake ones cannot be moved or copied."""
    module, cuda = importlib.import_module(script), torch.device("cuda")
    loader = common.load_data("shapes", "", 32, "meta", augment=True, seed=0)[0]
    assert {x.device.type for x in next(iter(loader))} == {"meta"}, "batches are made where asked"
    args = Namespace(**module.RECIPES["cifar10-jeon"], teacher="wrn16_3", student="wrn16_1",
                     image_size=32, device=cuda, fsp_lambda=1.0, side=None)
    for name in ("torch.nn.Module.to", "torch.nn.Module.double", "copy.deepcopy"):
        monkeypatch.setattr(name, lambda self, *_, **__: self)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    fake = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)       # those on the meta device
    with fake, torch.autocast("cuda", torch.bfloat16):
        with cuda:
            student, teacher = pair_in_float64(script, args, [loader])
            images, labels = torch.empty(32, 3, 32, 32), torch.empty(32, dtype=torch.long)
        logits, terms = module.losses(student, teacher, images, labels, args)
    assert logits.dtype == torch.bfloat16, "autocast reaches the network, not the losses"
    for term in terms.values():
        assert (term.device.type, term.dtype, term.requires_grad) == ("cuda", torch.float32, True)
