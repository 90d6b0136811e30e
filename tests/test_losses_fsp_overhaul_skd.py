"""The losses of fsp.py, overhaul.py and skd.py against NumPy in float64, from the equations."""
import functools
import math

import numpy as np
import pytest
import torch
from conftest import assert_equation
from test_losses import features, logits, numpy_softmax
from torch import nn

import common
import fsp
import kd
import overhaul
import skd

TAU = 4.0
maps = functools.partial(features, sizes=(6, 4, 2))


# --- FSP ----------------------------------------------------------------------------------------

def numpy_fsp_matrix(first, second):
    n, m, height, width = first.shape
    matrix = np.zeros((n, m, second.shape[1]))
    for x in range(n):
        for i in range(m):
            for j in range(second.shape[1]):
                for s in range(height):
                    for t in range(width):
                        matrix[x, i, j] += first[x, i, s, t] * second[x, j, s, t] / height / width
    return matrix


def pairs(seed: int) -> list[tuple]:
    return list(zip(maps(seed), maps(seed + 10, channels=(4, 2, 6))))


def test_fsp_is_the_equation():
    students, teachers, total = pairs(1), pairs(2), 0.0
    for ours, theirs in zip(students, teachers):
        difference = (numpy_fsp_matrix(*(x.numpy() for x in ours))
                      - numpy_fsp_matrix(*(x.numpy() for x in theirs)))
        total += (difference ** 2).sum() / len(difference)
    assert_equation("fsp_loss", fsp.fsp_loss(students, teachers), total, 1e-12)


def test_fsp_matrix_by_number():
    """Ones against twos: every entry is 2 whatever the size, and the loss sums over entries."""
    one, two = torch.ones(4, 3, 5, 5), torch.full((4, 2, 5, 5), 2.0)
    assert torch.equal(fsp.fsp_matrix(one, two), torch.full((4, 3, 2), 2.0))
    loss = fsp.fsp_loss([(one, two)] * 2, [(0 * one, two)] * 2)
    assert loss.item() == 2 * (3 * 2) * 2 ** 2      # pairs, entries, squared


def test_fsp_pools_the_larger_map_by_its_maximum():
    first, second = features(1, (3,), (8,))[0], features(2, (5,), (4,))[0]
    pooled = first.view(2, 3, 4, 2, 4, 2).amax((3, 5))
    assert torch.equal(fsp.fsp_matrix(first, second), fsp.fsp_matrix(pooled, second))
    assert torch.equal(fsp.fsp_matrix(second, first), fsp.fsp_matrix(second, pooled))


def test_fsp_refuses_what_does_not_match():
    with pytest.raises(ValueError):
        fsp.fsp_loss(pairs(1), pairs(2)[:2])
    with pytest.raises(ValueError, match="connect"):
        fsp.fsp_loss([maps(1)[:2]], [maps(1)[1:]])


def test_fsp_stays_float32_under_autocast():
    first, second = (x.float() for x in maps(1)[:2])
    second = first.flip(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fsp.fsp_matrix(first, second), fsp.fsp_matrix(first, second).float())
        inside = fsp.fsp_matrix(first, second)
    assert torch.equal(inside, fsp.fsp_matrix(first, second))


# --- overhaul -----------------------------------------------------------------------------------

def numpy_margin_relu(feature, margin):
    return np.stack([np.where(feature[:, c] > m, feature[:, c], m)
                     for c, m in enumerate(margin)], axis=1)


def numpy_partial_l2(student, target):
    total = 0.0
    for s, t in zip(student.ravel(), target.ravel()):
        total += 0.0 if s <= t <= 0 else (t - s) ** 2
    return total


def margins(channels=(3, 5, 4)) -> list[torch.Tensor]:
    return [-torch.linspace(0.1, 0.9, c, dtype=torch.float64) for c in channels]


def test_overhaul_is_the_equation():
    students, teachers, total = maps(1), maps(2), 0.0
    for layer, (s, t, m) in enumerate(zip(students, teachers, margins())):
        target = numpy_margin_relu(t.numpy(), m.numpy())
        total += numpy_partial_l2(s.numpy(), target) / 2 ** (2 - layer) / len(s)
    ours = overhaul.overhaul_loss(students, teachers, margins())
    assert_equation("overhaul_loss", ours, total, 1e-12)
    plain = sum(((s - t) ** 2).sum() / 2 ** (2 - layer) / len(s)
                for layer, (s, t) in enumerate(zip(students, teachers)))
    every_value = overhaul.overhaul_loss(students, teachers, margins(), partial=False)
    assert every_value.item() == pytest.approx(plain.item(), rel=1e-12)


@pytest.mark.parametrize("s, t, loss", [
    (-2.0, -1.0, 0.0), (-1.0, -1.0, 0.0), (-0.5, -1.0, 0.25), (0.5, -1.0, 2.25),
    (-2.0, 0.0, 0.0), (1.0, 0.0, 1.0), (-1.0, 2.0, 9.0), (3.0, 2.0, 1.0)])
def test_partial_l2_by_number(s, t, loss):
    student = torch.full((2, 1, 3, 3), s, requires_grad=True)
    value = overhaul.partial_l2(student, torch.full((2, 1, 3, 3), t))
    value.backward()
    assert value.item() == pytest.approx(18 * loss)       # the sum, not the mean
    assert student.grad[0, 0, 0, 0].item() == pytest.approx(2 * (s - t) if loss else 0)


def test_overhaul_halves_towards_the_input_and_divides_by_the_batch():
    zeros, ones = torch.zeros(4, 1, 2, 2), torch.ones(4, 1, 2, 2)
    margin = torch.tensor([-1.0])
    for layer, weight in enumerate((0.25, 0.5, 1.0)):
        students = [ones if n == layer else zeros for n in range(3)]
        loss = overhaul.overhaul_loss(students, [zeros] * 3, [margin] * 3)
        assert loss.item() == weight * 4       # four pixels an image


def norm_of(gamma, beta) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(len(gamma)).double()
    norm.weight.data, norm.bias.data = torch.tensor(gamma).double(), torch.tensor(beta).double()
    return norm


def test_channel_margin_against_monte_carlo():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4_000_000, generator=generator, dtype=torch.float64)
    gammas, betas = [1.0, 1.0, 0.5, -2.0, 1.5, 1.0], [0.0, 1.0, -0.7, 0.5, -3.0, 2.5]
    ours = overhaul.channel_margin(norm_of(gammas, betas))
    for gamma, beta, margin in zip(gammas, betas, ours):
        x = beta + gamma * noise
        assert margin.item() == pytest.approx(x[x < 0].mean().item(), rel=0.01), (gamma, beta)


def test_channel_margin_by_quadrature():
    """Eq. 9 as an integral, its square root put right, beyond what sampling reaches."""
    for mu, sigma in [(4.0, 1.0), (8.0, 2.0), (-10.0, 1.0), (3.09, 1.0), (20.0, 1.0), (-40.0, 0.5)]:
        x = np.linspace(min(0, mu) - 12 * sigma, 0, 2_000_001)[:-1]
        log_density = -(x - mu) ** 2 / 2 / sigma ** 2
        density = np.exp(log_density - log_density.max())
        expected = (x * density).sum() / density.sum()
        ours = overhaul.channel_margin(norm_of([sigma], [mu])).item()
        assert ours == pytest.approx(expected, rel=1e-4), (mu, sigma)


def test_channel_margin_is_sound_everywhere():
    gammas = [0.0, 0.0, 0.0, 1e-30, 1e-30, -1e-30, 1e-8, 1e8, 1.0, 1.0, 1.0, 1e-4, -1.0]
    betas = [1.0, -1.0, 0.0, 1.0, -1.0, 0.0, 1e8, 1e-8, 1e4, -1e4, 37.0, 10.0, 9999.0]
    for kind in (torch.float32, torch.float64):
        margin = overhaul.channel_margin(norm_of(gammas, betas).to(kind))
        assert margin.dtype == kind and margin.isfinite().all() and (margin <= 0).all()
        assert margin[:3].tolist() == [0, -1, 0]
    ratios = torch.linspace(-50, 2e4, 200_001, dtype=torch.float64)
    margin = overhaul.channel_margin(norm_of(torch.ones_like(ratios).tolist(), ratios.tolist()))
    assert (margin.diff() > 0).all(), "it rises with beta, over the seam of the two formulas too"
    flipped = overhaul.channel_margin(norm_of([-1.0] * 5, [-2.0, -1.0, 0.0, 1.0, 2.0]))
    assert torch.equal(flipped, overhaul.channel_margin(norm_of([1.0] * 5,
                                                                [-2.0, -1.0, 0.0, 1.0, 2.0])))


def test_connector_is_what_eq_5_says():
    torch.manual_seed(0)
    connector = overhaul.Connector(64, 256)
    conv, norm = connector
    assert conv.bias is None and conv.kernel_size == (1, 1) and norm.num_features == 256
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.03)


@pytest.mark.parametrize("name", ["wrn10_2", "resnet8", "mobilenetv2_half"])
def test_the_teacher_on_batch_statistics_drifts_nowhere(name):
    """The same outputs as in training mode, and nothing of the teacher changes."""
    teacher = common.create_model(name, 10)
    x = torch.randn(16, 3, 32, 32)
    teacher.train()(torch.randn(16, 3, 32, 32))         # statistics that are not the batch's
    teacher.eval()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    copy = overhaul.batch_statistics(teacher)
    ours = copy(x, taps=True)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not torch.allclose(ours.logits, teacher(x))
    theirs = teacher.train()(x, taps=True)
    assert torch.allclose(ours.logits, theirs.logits, atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours.pre_relu, theirs.pre_relu))


# --- SKD ----------------------------------------------------------------------------------------

def numpy_spherical(z, scale, center):
    rows = []
    for row in z:
        row = row - row.mean() if center else row
        rows.append(scale * row / np.sqrt((row ** 2).sum()))
    return np.array(rows)


@pytest.mark.parametrize("scale, center", [(1.0, False), (6.3, True), (20.0, False)])
def test_skd_is_the_equation(scale, center):
    z, v = logits(1).numpy(), logits(2).numpy()
    p = numpy_softmax(numpy_spherical(z, scale, center) / TAU)
    q = numpy_softmax(numpy_spherical(v, scale, center) / TAU)
    theirs = TAU ** 2 * (q * (np.log(q) - np.log(p))).sum() / len(z)
    ours = skd.skd_loss(logits(1), logits(2), TAU, scale, center)
    assert_equation("skd_loss", ours, theirs, 1e-10)


def test_the_default_is_the_codes_layer_norm():
    """layer_norm times a multiplier: centred, standard deviation 2, length 2 sqrt(K)."""
    z = logits(3, classes=100)
    ours = skd.spherical(z, 2.0 * math.sqrt(100), True)
    assert torch.allclose(ours, 2 * torch.nn.functional.layer_norm(z, [100]), rtol=1e-4)
    assert torch.allclose(ours.std(1, correction=0), torch.tensor(2.0, dtype=torch.float64))


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_entropy_and_free_energy_are_the_equations(tau):
    z = logits(4)
    p = numpy_softmax(z.numpy() / tau)
    assert np.allclose(skd.entropy(z, tau), -(p * np.log(p)).sum(1), rtol=1e-12)
    assert np.allclose(skd.free_energy(z, tau), tau * np.log(np.exp(z.numpy() / tau).sum(1)))


@pytest.mark.parametrize("classes, tau", [(10, 4.0), (100, 4.0), (100, 1.0), (7, 2.0)])
def test_the_constants_of_the_theorems(classes, tau):
    """Theorem 1's printed constant is twice too large, Theorem 2's is right."""
    z, v = 0.001 * logits(5, 50, classes), 0.004 * logits(6, 50, classes)
    first, second = skd.theorems(z, v, tau)
    s_gap = skd.entropy(z, tau) - skd.entropy(v, tau)
    centred = [x - x.mean(1, keepdim=True) for x in (z, v)]
    f_gap = skd.free_energy(centred[1], tau) - skd.free_energy(centred[0], tau)
    z_square, v_square = (x.square().sum(1) for x in centred)
    printed_1 = (v_square - z_square) / (classes * tau ** 2)
    printed_2 = (v_square - z_square) / (2 * classes * tau)
    assert (s_gap / printed_1).mean().item() == pytest.approx(0.5, abs=0.01)
    assert (f_gap / printed_2).mean().item() == pytest.approx(1.0, abs=0.01)
    assert torch.allclose(first, s_gap, rtol=0.1) and torch.allclose(second, f_gap, rtol=0.1)


def test_the_teachers_deviation_is_the_training_scripts_form():
    """Each student vector at the unbiased deviation of the teacher's for the same image."""
    z, v = logits(1), logits(2)
    aligned = np.array([a / a.std(ddof=1) * b.std(ddof=1) for a, b in zip(z.numpy(), v.numpy())])
    assert np.allclose(skd.as_teacher(z, v).numpy(), aligned, rtol=1e-12)
    p, q = numpy_softmax(aligned / TAU), numpy_softmax(v.numpy() / TAU)
    theirs = TAU ** 2 * (q * (np.log(q) - np.log(p))).sum() / len(z)
    assert skd.skd_loss(z, v, TAU, "teacher").item() == pytest.approx(theirs, rel=1e-10)
    longer = skd.skd_loss(7 * z, v, TAU, "teacher").item()
    assert longer == pytest.approx(theirs, rel=1e-10), "the student's own length does not count"
    assert abs(skd.skd_loss(z, 2 * v, TAU, "teacher").item() - theirs) > 0.1, "the teacher's does"
    student, teacher = z.requires_grad_(), v.requires_grad_()
    skd.skd_loss(student, teacher, TAU, "teacher").backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    assert torch.autograd.gradcheck(lambda z: skd.skd_loss(z, v.detach(), TAU, "teacher"), student)


def test_skd_is_blind_to_length_and_kd_is_not():
    z, v = logits(1), logits(2)
    value = skd.skd_loss(z, v, TAU, 6.0, True).item()
    assert skd.skd_loss(5 * z, v / 3, TAU, 6.0, True).item() == pytest.approx(value, rel=1e-12)
    assert skd.skd_loss(z + 2, v - 1, TAU, 6.0, True).item() == pytest.approx(value, rel=1e-12)
    assert abs(kd.kd_loss(5 * z, v, TAU) - kd.kd_loss(z, v, TAU)) > 0.1
    assert torch.equal(skd.spherical(z, 6.0).argmax(1), z.argmax(1))


# --- all three ----------------------------------------------------------------------------------

MARGINS = margins()
LOSSES = {
    "fsp": lambda s, t: fsp.fsp_loss(list(zip(s, s)), list(zip(t, t))),
    "overhaul": lambda s, t: overhaul.overhaul_loss(s, t, [m.to(s[0].dtype) for m in MARGINS]),
    "skd": lambda s, t: sum(skd.skd_loss(a.flatten(1), b.flatten(1), TAU, 6.0, True)
                            for a, b in zip(s, t))}


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    students = [x.requires_grad_() for x in maps(7, sizes=(3, 2, 2))]
    teachers = maps(8, sizes=(3, 2, 2))
    assert torch.autograd.gradcheck(lambda *s: LOSSES[name](list(s), teachers), students)


@pytest.mark.parametrize("name", LOSSES)
def test_teacher_gets_no_gradient_and_the_batch_is_averaged(name):
    students, teachers = ([x.clone().requires_grad_() for x in maps(n)] for n in (7, 8))
    loss = LOSSES[name](students, teachers)
    loss.backward()
    assert all(x.grad is None for x in teachers)
    assert all(x.grad.abs().sum() > 0 for x in students)
    doubled = [torch.cat([x, x]) for x in students], [torch.cat([x, x]) for x in teachers]
    assert LOSSES[name](*doubled).item() == pytest.approx(loss.item(), rel=1e-12)
    same = LOSSES[name](teachers, teachers).item()
    assert same == pytest.approx(0, abs=1e-12) or name == "overhaul"    # the margin moves negatives


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name, dtype):
    students, teachers = ([x.to(dtype).requires_grad_() for x in maps(n)] for n in (7, 8))
    loss = LOSSES[name](students, [x.detach() for x in teachers])
    loss.backward()
    exact = LOSSES[name]([x.double() for x in students], [x.double() for x in teachers]).item()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact, rel=1e-3)
    assert all(x.grad.isfinite().all() for x in students)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [0.0, 1e-20, 100.0])
def test_edges_are_finite(name, size):
    students = [(size * x).float().requires_grad_() for x in maps(7)]
    loss = LOSSES[name](students, [(size * x).float() for x in maps(8)])
    loss.backward()
    assert loss.isfinite() and all(x.grad.isfinite().all() for x in students)


def test_unlike_maps_are_refused():
    with pytest.raises(ValueError):
        overhaul.overhaul_loss(maps(1), maps(2)[:2], MARGINS)
    with pytest.raises(ValueError, match="connector"):
        overhaul.partial_l2(maps(1)[0], maps(1)[1])
