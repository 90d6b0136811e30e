"""The weights after some epochs against SGD as one writes it down, step by step, by hand."""
import importlib

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, state

import common


def by_hand(images: int, epochs: int, recipe: dict, nesterov: bool) -> tuple[dict, list[dict]]:
    """Cross-entropy training of a resnet8 with seed 0, its momenta and its decay spelled out.

    The weights, and an epoch's mean loss and accuracy over its images, each counted once.
    """
    rows = []
    train, _ = common.load_data("shapes", "", recipe["batch_size"], torch.device("cpu"),
                                augment=recipe["augment"], seed=0, reflect=recipe["reflect"],
                                train_images=images)
    torch.manual_seed(0)
    model = common.create_model("resnet8", 10).to(memory_format=torch.channels_last).train()
    momenta = [torch.zeros_like(weight) for weight in model.parameters()]
    for epoch in range(1, epochs + 1):
        train.set_epoch(epoch)
        lr = recipe["lr"]
        for part in recipe["milestones"]:
            if epoch > round(part * epochs):
                lr *= recipe["lr_decay"]
        losses, right = [], []
        for batch, labels in train:
            logits = model(batch)
            losses += F.cross_entropy(logits, labels, reduction="none").tolist()
            right += (logits.argmax(1) == labels).tolist()
            gradients = torch.autograd.grad(F.cross_entropy(logits, labels), model.parameters())
            with torch.no_grad():
                for weight, gradient, momentum in zip(model.parameters(), gradients, momenta):
                    gradient = gradient + recipe["weight_decay"] * weight
                    momentum.mul_(recipe["momentum"]).add_(gradient)
                    step = gradient + recipe["momentum"] * momentum if nesterov else momentum
                    weight -= lr * step
        rows.append({"ce": sum(losses) / images, "train": 100 * sum(right) / images})
    return model.state_dict(), rows


def distance(first: dict, second: dict) -> float:
    return max((first[key] - second[key]).abs().max().item() for key in first
               if key.endswith("weight"))


@pytest.mark.parametrize("nesterov", [False, True])
def test_training_is_sgd(nesterov, cli, tmp_path, monkeypatch):
    """Each entry of the recipe acts, and as the textbook has it; a forgotten one would show."""
    module = importlib.import_module("kd")      # fit is the same text in every script
    recipe = module.RECIPES["shapes"] | {
        "nesterov": nesterov, "weight_decay": 0.1, "momentum": 0.8, "lr": 0.02,
        "milestones": [0.5], "lr_decay": 0.3}
    monkeypatch.setitem(module.RECIPES, "shapes", recipe)
    flags = [*SMALL, "--train-images", 80, "--epochs", 2, "--baseline", "--out", tmp_path]
    assert cli("kd", *flags).code == 0      # the third batch of an epoch has 16 images, not 32
    kept = state(tmp_path / "shapes/baseline/resnet8/seed0")
    ours, (weights, rows) = kept["model"], by_hand(80, 2, recipe, nesterov)
    assert distance(ours, weights) < 1e-4
    for logged, row in zip(kept["log"][1:], rows, strict=True):
        assert logged["ce"] == pytest.approx(row["ce"], rel=1e-4)
        assert logged["train"] == pytest.approx(row["train"], abs=1e-3)
    assert distance(ours, by_hand(80, 2, recipe, not nesterov)[0]) > 1e-3
    for key, other in (("weight_decay", 0.0), ("momentum", 0.0), ("lr_decay", 1.0),
                       ("augment", False)):
        assert distance(ours, by_hand(80, 2, recipe | {key: other}, nesterov)[0]) > 1e-3, key
