"""A step of every script on a GPU that need not be there.

Fake tensors have a device, a dtype and a shape but no values. A step that mixes devices fails on
them, and so does one that reads a value, for which a real one would wait for the GPU. The backward
pass and the optimiser need a real GPU; so does every number.
"""
import importlib
from argparse import Namespace

import bench
import pytest
import torch
from conftest import SCRIPTS
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from common import ImageLoader, Split, create_model

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="this torch knows no CUDA")


@pytest.fixture
def gpu(monkeypatch):
    """A fake GPU, where modules are made instead of moved and copied, which fake ones cannot be."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_, **__: self)
    monkeypatch.setattr("copy.deepcopy", lambda network: network)
    with FakeTensorMode(), torch.autocast("cuda", torch.bfloat16):
        yield torch.device("cuda")


def first_step(script: str, of_teacher: bool, gpu: torch.device) -> tuple:
    module = importlib.import_module(script)
    args = Namespace(**bench.own(script), device="cuda")
    split = Split(torch.empty(64, 32, 32, 3, dtype=torch.uint8), torch.empty(64, dtype=torch.long))
    loader = ImageLoader(split, bench.CLASSES, torch.empty(3), torch.empty(3), 32, gpu,
                         shuffle=True, augment=True)
    images, labels = next(iter(loader))
    with gpu:
        student, teacher = (create_model(name, 10) for name in ("wrn16_1", "wrn16_3"))
        teacher.requires_grad_(of_teacher)
        if not of_teacher:
            bench.connect(script, student, teacher, args, images[:2])
    step = module.make_step(*(teacher, None) if of_teacher else (student, teacher), args)
    return images, labels, *step(images, labels)


@pytest.mark.parametrize("of_teacher", [True, False])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_step_stays_on_the_gpu(script, of_teacher, gpu):
    images, labels, logits, terms = first_step(script, of_teacher, gpu)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert {x.device.type for x in (images, labels, logits, *terms.values())} == {"cuda"}
    assert logits.dtype == torch.bfloat16, "autocast reaches the network"
    assert {value.dtype for value in terms.values()} == {torch.float32}, "and not the losses"
    assert sum(terms.values()).requires_grad


def test_a_value_that_is_read_or_a_host_tensor_would_be_noticed(gpu, monkeypatch):
    kd = importlib.import_module("kd")
    real = kd.kd_loss
    monkeypatch.setattr(kd, "kd_loss", lambda *args: real(*args) * real(*args).item())
    with pytest.raises(DataDependentOutputException):
        first_step("kd", False, gpu)
    monkeypatch.setattr(kd, "kd_loss", lambda *args: (real(*args) * torch.ones(2)).sum())
    with pytest.raises(RuntimeError, match="devices"):
        first_step("kd", False, gpu)
