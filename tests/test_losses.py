"""The losses against NumPy in float64, written from the equations and not from the code.

Checks bear their function's name: pytest -k channel_margin, or -k kd.kd_loss (skd_loss ends alike).
"""
import importlib
import math
from typing import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_equation
from torch import nn

import at
import atang
import fsp
import kd
import overhaul
import skd

TAU = 4.0


def function_of(name: str) -> Callable:
    """`at.at_loss` as it stands in its script at this moment: test_course puts wrong ones there."""
    script, function = name.split(".")
    return getattr(importlib.import_module(script), function)


def maps(seed: int, channels=(3, 5, 4), sizes=(8, 4, 2), batch=2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, c, size, size, generator=generator, dtype=torch.float64)
            for c, size in zip(channels, sizes)]


def logits(seed: int, batch=6, classes=10) -> torch.Tensor:
    return 3 * torch.randn(batch, classes, generator=torch.Generator().manual_seed(seed),
                           dtype=torch.float64)


def pairs(seed: int) -> list[tuple]:
    return list(zip(maps(seed), maps(seed + 10, channels=(4, 2, 6))))


def margins_for(features: list[torch.Tensor]) -> list[torch.Tensor]:
    """A negative margin for each channel, in the precision in which the loss is computed."""
    return [-torch.linspace(0.1, 0.9, x.shape[1], dtype=torch.float64).to(
        torch.promote_types(x.dtype, torch.float32)) for x in features]


def norm_of(gamma: list[float], beta: list[float]) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(len(gamma)).double()
    norm.weight.data, norm.bias.data = torch.tensor(gamma).double(), torch.tensor(beta).double()
    return norm


# --- the equations, read once more --------------------------------------------------------------

def numpy_softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def numpy_kd(z, v, tau):
    total = 0.0
    for p, q in zip(numpy_softmax(z / tau), numpy_softmax(v / tau)):
        total += sum(qk * (np.log(qk) - np.log(pk)) for pk, qk in zip(p, q))
    return tau ** 2 * total / len(z)


def numpy_kd_of_pixels(z, v, tau):
    """A mean over all pixels, each as an image."""
    return numpy_kd(*(x.transpose(0, 2, 3, 1).reshape(-1, x.shape[1]) for x in (z, v)), tau)


def numpy_kd_limit(z, v, tau):
    """For tau -> infinity: half the mean over the K classes of (z - v)^2, both of zero mean."""
    return (z - v).var(axis=1).mean() / 2


def numpy_unit(vector):
    return vector / np.sqrt((vector ** 2).sum())


def numpy_attention(feature, p=2):
    return [numpy_unit((np.abs(x) ** p).sum(axis=0).ravel()) for x in feature]


def numpy_at(students, teachers, p=2):
    total = 0.0
    for student, teacher in zip(students, teachers):
        squares = []
        for one, other in zip(numpy_attention(student, p), numpy_attention(teacher, p)):
            squares.extend((one - other) ** 2)
        total += np.mean(squares)
    return total


def numpy_q(feature):
    maps_of_squares = [(x ** 2).sum(axis=0).ravel() for x in feature]
    return [q / (np.sqrt((q ** 2).sum()) + 1e-6) for q in maps_of_squares]


def numpy_angular(q, margin, scale):
    """Eq. 6's G, and its two exponents."""
    positive = scale * np.cos(margin * np.arccos(q))
    negative = scale * (1 - q)
    return [np.log(np.exp(positive) / (np.exp(positive) + np.exp(negative))), positive, negative]


def numpy_g(q, margin, scale):
    return [numpy_angular(x, margin, scale)[0] for x in q]


def numpy_distance(q_students, q_teachers, margin, scale, k):
    """Eq. 7's summand, of G (k = 0), or of one exponent; one pixel has no direction."""
    squares = []
    for q_s, q_t in zip(q_students, q_teachers):
        f_s, f_t = (numpy_angular(q.ravel(), margin, scale)[k] for q in (q_s, q_t))
        squares.extend((numpy_unit(f_s) - numpy_unit(f_t)) ** 2 if f_s.size > 1 else [0.0])
    return np.mean(squares)


def numpy_atang(students, teachers, margin, scale):
    return np.mean([numpy_distance(numpy_q(s), numpy_q(t), margin, scale, 0)
                    for s, t in zip(students, teachers)])


def numpy_amd(students, teachers, margin, scale, local):
    of_pairs = []
    for student, teacher in zip(students, teachers):
        size = student.shape[2:]
        q_s, q_t = ([q.reshape(size) for q in numpy_q(x)] for x in (student, teacher))
        h, w = size[0] // 2, size[1] // 2
        cuts = [np.s_[:, :], np.s_[:h, :w], np.s_[:h, w:], np.s_[h:, :w], np.s_[h:, w:]]
        whole, *patches = [np.mean([numpy_distance([q[cut] for q in q_s], [q[cut] for q in q_t],
                                                   margin, scale, k) for k in range(3)])
                           for cut in (cuts if local else cuts[:1])]
        of_pairs.append(0.8 * whole + 0.2 * np.mean(patches) if local else whole)
    return np.mean(of_pairs)


def numpy_fsp_matrix(first, second):
    size = min(first.shape[2], second.shape[2])
    smaller = []
    for x in (first, second):       # by the maximum of each square
        step = x.shape[2] // size
        smaller.append(x.reshape(*x.shape[:2], size, step, size, step).max(axis=(3, 5)))
    return np.einsum("xist,xjst->xij", *smaller) / size / size


def numpy_fsp(students, teachers):
    total = 0.0
    for student, teacher in zip(students, teachers):
        difference = numpy_fsp_matrix(*student) - numpy_fsp_matrix(*teacher)
        total += (difference ** 2).sum() / len(difference)
    return total


def numpy_channel_margin(norm):
    """Eq. 9 as an integral, its square root put right, for any gamma and beta."""
    found = []
    for sigma, mu in zip(norm.weight.abs().tolist(), norm.bias.tolist()):
        low = -40 * sigma ** 2 / mu if mu > 3 * sigma else min(0, mu) - 12 * sigma
        x = np.linspace(low, 0, 400_001)
        log_density = -(x - mu) ** 2 / 2 / sigma ** 2
        density = np.exp(log_density - log_density.max())
        density[-1] /= 2        # the trapezoidal rule
        found.append((x * density).sum() / density.sum())
    return found


def numpy_margin_relu(feature, margin):
    return np.stack([np.where(feature[:, c] > m, feature[:, c], m)
                     for c, m in enumerate(margin)], axis=1)


def numpy_partial_l2(student, target):
    return sum(0.0 if s <= t <= 0 else (t - s) ** 2 for s, t in zip(student.flat, target.flat))


def numpy_overhaul(students, teachers, margins, partial=True, weights=None):
    total = 0.0
    for layer, (s, t, m) in enumerate(zip(students, teachers, margins)):
        distance = ((s - t) ** 2).sum()
        if partial:
            distance = numpy_partial_l2(s, numpy_margin_relu(t, m))
        weight = weights[layer] if weights else 1 / 2 ** (len(students) - 1 - layer)
        total += weight * distance / len(s)
    return total


def numpy_spherical(z, scale, center):
    return scale * np.array([numpy_unit(row - row.mean() if center else row) for row in z])


def numpy_layer_norm(z, length, center):
    """What the authors' code does: each image's logits get mean 0 and one standard deviation."""
    return length / np.sqrt(z.shape[1]) * (z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True)


def numpy_skd(z, v, tau, scale, center=False):
    if scale == "teacher":      # the training script's form: the unbiased deviation of the teacher
        aligned = np.array([a / a.std(ddof=1) * b.std(ddof=1) for a, b in zip(z, v)])
        return numpy_kd(aligned, v, tau)
    return numpy_kd(numpy_spherical(z, scale, center), numpy_spherical(v, scale, center), tau)


# --- where they are compared --------------------------------------------------------------------

def arrays(value):
    if isinstance(value, list | tuple):
        return [arrays(part) for part in value]
    return value.numpy() if isinstance(value, torch.Tensor) else value


STUDENT, TEACHER = maps(1), maps(2, channels=(6, 2, 7))     # other widths: attention does not mind
Z, V = logits(1), logits(2)
LIKE = maps(2)      # of the student's widths
Q = F.normalize(Z.square(), dim=1)
ANGLES = [(1.35, 64.0), (1.0, 64.0), (2.0, 5.0)]        # m and s
MARGINS = margins_for(STUDENT)
MIXED = norm_of([1.0, 1.0, 0.5, -2.0, 1.5, -1.0], [0.0, 1.0, -0.7, 0.5, -3.0, 2.5])
FAR = norm_of([1.0, 2.0, 1.0, -1.0, 1.0, 0.5], [4.0, 8.0, -10.0, 3.09, 400.0, -40.0])

# a function, its arguments, how its equation reads in NumPy, the relative tolerance
EQUATIONS = [
    *[("kd.kd_loss", [Z, V, tau], numpy_kd, 1e-11) for tau in (1.0, 4.0, 16.0)],
    ("kd.kd_loss", [Z, V, 1000.0], numpy_kd_limit, 1e-2),
    ("kd.kd_loss", [STUDENT[0], LIKE[0], 2.0], numpy_kd_of_pixels, 1e-11),
    *[("at.attention_map", [STUDENT[0], *p], numpy_attention, 1e-12) for p in ([], [1], [3])],
    *[("at.at_loss", [STUDENT, TEACHER, *p], numpy_at, 1e-12) for p in ([], [1])],
    ("atang.attention_map", [STUDENT[1]], numpy_q, 1e-12),
    *[("atang.angular_map", [Q, *m_s], numpy_g, 1e-9) for m_s in ANGLES],
    *[("atang.atang_loss", [STUDENT, TEACHER, *m_s], numpy_atang, 1e-9) for m_s in ANGLES],
    *[("atang.amd_loss", [STUDENT, TEACHER, 1.35, 64.0, local], numpy_amd, 1e-9)
      for local in (False, True)],
    *[("atang.amd_loss", [maps(1, sizes=(7, 5, 3)), maps(2, sizes=(7, 5, 3)), 1.0, 5.0, local],
       numpy_amd, 1e-9) for local in (False, True)],
    *[("fsp.fsp_matrix", [STUDENT[i], TEACHER[j]], numpy_fsp_matrix, 1e-11)
      for i, j in ((0, 0), (0, 1), (1, 0))],
    ("fsp.fsp_loss", [pairs(1), pairs(2)], numpy_fsp, 1e-12),
    *[("overhaul.channel_margin", [norm], numpy_channel_margin, 1e-6) for norm in (MIXED, FAR)],
    ("overhaul.margin_relu", [LIKE[0], MARGINS[0]], numpy_margin_relu, 1e-12),
    ("overhaul.partial_l2", [STUDENT[0], LIKE[0]], numpy_partial_l2, 1e-12),
    *[("overhaul.overhaul_loss", [STUDENT, LIKE, MARGINS, partial], numpy_overhaul, 1e-12)
      for partial in (True, False)],
    ("overhaul.overhaul_loss", [STUDENT, LIKE, MARGINS, True, [2.0, 0.3, 0.25]], numpy_overhaul,
     1e-12),
    *[("skd.spherical", [Z, *how], numpy_spherical, 1e-12) for how in ([1.0, False], [6.3, True])],
    ("skd.spherical", [Z, 6.3, True], numpy_layer_norm, 1e-12),
    *[("skd.skd_loss", [Z, V, TAU, *how], numpy_skd, 1e-10)
      for how in ([1.0], [6.3, True], [20.0, False], ["teacher"])],
    ("skd.skd_loss", [7 * Z, V / 2, TAU, "teacher"], numpy_skd, 1e-10),
]


@pytest.mark.parametrize("name, args, reading, rel", EQUATIONS, ids=[row[0] for row in EQUATIONS])
def test_equation(name, args, reading, rel):
    ours, theirs = function_of(name)(*args), reading(*arrays(args))
    if ours.dim() == 0:
        assert_equation(name, ours, theirs, rel)
    else:
        assert ours.dtype == torch.float64, f"{name}: float64 goes in, {ours.dtype} comes out"
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=rel, atol=1e-13, err_msg=name)


# --- the scale, by number: sum or mean, over which axes ------------------------------------------

HOT, COLD = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)    # one bright pixel each
HOT[..., 0, 0], COLD[..., 3, 3] = 1, 1
SMALL = F.adaptive_avg_pool2d(STUDENT[0], 4)
# (0, 0) against (log 3, 0): KL((3/4, 1/4) || (1/2, 1/2))
EVEN, SURE = torch.zeros(5, 2), torch.tensor([[math.log(3), 0.0]] * 5)
KL = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
ONE, TWO = torch.ones(4, 3, 5, 5), torch.full((4, 2, 5, 5), 2.0)
NIL, FULL, BELOW = torch.zeros(4, 1, 2, 2), torch.ones(4, 1, 2, 2), [torch.tensor([-1.0])] * 3
BY_NUMBER = [
    ("kd.kd_loss", [EVEN, SURE, 1.0], KL),
    ("kd.kd_loss", [2 * EVEN, 2 * SURE, 2.0], 4 * KL),
    ("at.at_loss", [[HOT], [COLD]], 2 / 16),                # unit maps differ in two of 16 pixels
    ("at.at_loss", [[HOT] * 3, [COLD] * 3], 3 * 2 / 16),    # a sum over the pairs
    ("at.at_loss", [[STUDENT[0]], [SMALL]], 0),             # the larger map is averaged
    ("at.at_loss", [[SMALL], [STUDENT[0]]], 0),
    # G is near 0 where q = 1 and s (cos(m pi / 2) - 1) = -98.09 elsewhere: 15 equal entries, each
    # 1 / sqrt(15) in a map of unit norm, so that two pixels differ by 1 / sqrt(15)
    ("atang.atang_loss", [[HOT], [COLD]], 2 / 15 / 16),
    ("atang.atang_loss", [[HOT] * 3, [COLD] * 3], 2 / 15 / 16),
    ("fsp.fsp_matrix", [ONE, TWO], 2),                      # whatever the size
    ("fsp.fsp_loss", [[(ONE, TWO)] * 2, [(0 * ONE, TWO)] * 2], 2 * (3 * 2) * 2 ** 2),
    # four pixels an image; half of the next layer
    ("overhaul.overhaul_loss", [[FULL, NIL, NIL], [NIL] * 3, BELOW], 4 / 4),
    ("overhaul.overhaul_loss", [[NIL, FULL, NIL], [NIL] * 3, BELOW], 4 / 2),
    ("overhaul.overhaul_loss", [[NIL, NIL, FULL], [NIL] * 3, BELOW], 4),
]


@pytest.mark.parametrize("name, args, expected", BY_NUMBER, ids=[row[0] for row in BY_NUMBER])
def test_by_number(name, args, expected):
    value = function_of(name)(*args)
    assert torch.allclose(value, torch.tensor(expected).to(value), rtol=1e-4, atol=1e-12), value


PARTIAL = [(-2.0, -1.0, 0.0), (-1.0, -1.0, 0.0), (-0.5, -1.0, 0.25), (0.5, -1.0, 2.25),
           (-2.0, 0.0, 0.0), (1.0, 0.0, 1.0), (-1.0, 2.0, 9.0), (3.0, 2.0, 1.0)]


@pytest.mark.parametrize("s, t, square", PARTIAL, ids=["overhaul.partial_l2"] * len(PARTIAL))
def test_case_of_eq_4(s, t, square):
    student = torch.full((2, 1, 3, 3), s, dtype=torch.bfloat16, requires_grad=True)
    value = overhaul.partial_l2(student, torch.full((2, 1, 3, 3), t, dtype=torch.bfloat16))
    value.backward()
    assert value.dtype == torch.float32 and value.item() == 18 * square     # the sum, not the mean
    assert student.grad[0, 0, 0, 0].item() == pytest.approx(2 * (s - t) if square else 0)


# --- what holds of every loss --------------------------------------------------------------------

def flat(students: list[torch.Tensor], teachers: list[torch.Tensor]) -> list[tuple]:
    """Maps taken for logits."""
    return [(s.flatten(1), t.flatten(1)) for s, t in zip(students, teachers)]


# each as a function of the student's and the teacher's maps
LOSSES = {
    "kd.kd_loss": lambda s, t: sum(kd.kd_loss(*pair, TAU) for pair in flat(s, t)),
    "at.at_loss": lambda s, t: at.at_loss(s, t),
    "atang.atang_loss": lambda s, t: atang.atang_loss(s, t),
    "atang.amd_loss": lambda s, t: atang.amd_loss(s, t),
    "atang.amd_loss-local": lambda s, t: atang.amd_loss(s, t, local=True),
    "fsp.fsp_loss": lambda s, t: fsp.fsp_loss(list(zip(s, s)), list(zip(t, t))),
    "overhaul.overhaul_loss": lambda s, t: overhaul.overhaul_loss(s, t, margins_for(t)),
    "overhaul.overhaul_loss-l2": lambda s, t: overhaul.overhaul_loss(s, t, margins_for(t), False),
    "skd.skd_loss": lambda s, t: sum(skd.skd_loss(*pair, TAU, 6.0, True) for pair in flat(s, t)),
    "skd.skd_loss-teacher": lambda s, t: sum(skd.skd_loss(*pair, TAU, "teacher")
                                             for pair in flat(s, t)),
}
ATTENTION = ["at.at_loss", "atang.atang_loss", "atang.amd_loss", "atang.amd_loss-local"]
# of values of 6e4 their gradients are greater than float16 can hold, whatever computes them
STEEP = ["fsp.fsp_loss", "overhaul.overhaul_loss", "overhaul.overhaul_loss-l2",
         "skd.skd_loss-teacher"]


@pytest.mark.parametrize("name", LOSSES)
def test_gradient(name):
    students = [x.requires_grad_() for x in maps(3, channels=(2, 3, 2), sizes=(4, 3, 2))]
    teachers = maps(4, channels=(2, 3, 2), sizes=(4, 3, 2))
    weight = 1e4 if name in ATTENTION else 1        # a mean over pixels has small gradients
    assert torch.autograd.gradcheck(lambda *s: weight * LOSSES[name](list(s), teachers), students,
                                    rtol=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_teacher_gets_no_gradient(name):
    students, teachers = ([x.requires_grad_() for x in maps(n)] for n in (7, 8))
    LOSSES[name](students, teachers).backward()
    assert all(x.grad is None for x in teachers)
    assert all(x.grad.abs().sum() > 0 for x in students)


# --- edges and precision -------------------------------------------------------------------------

def edge(kind: str, size: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.zeros(2, 3, size, size)
    if kind == "constant":
        x += 0.7
    elif kind == "one-hot":
        x[..., 0, 0] = 1
    elif kind in ("random", "tiny"):
        x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))
        x = 1e-20 * x if kind == "tiny" else x
    elif kind == "huge":
        x += 200
        x[..., -1, -1] = 6e4
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("name", LOSSES)
def test_edges_are_finite(name, size, dtype):
    kinds = ["zero", "constant", "one-hot", "random", "tiny", "huge"]
    for ours in kinds:
        for theirs in kinds:
            student = edge(ours, size, dtype).requires_grad_()
            loss = LOSSES[name]([student], [edge(theirs, size, dtype)])
            loss.backward()
            assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert loss.isfinite(), (ours, theirs)
            if not (name in STEEP and dtype == torch.float16 and "huge" in (ours, theirs)):
                assert student.grad.isfinite().all(), (ours, theirs)
            if name in ATTENTION and size == 1 and not {"zero", "tiny"} & {ours, theirs}:
                assert loss.item() < 1e-9, "a map of one pixel carries no attention"


@pytest.mark.parametrize("scale", [89.0, 1000.0], ids=["atang.angular_map-89", "atang.angular_map"])
def test_no_overflow(scale):
    """The quotient of Eq. 6 is nan in float32 from s = 89 on."""
    for margin in (1.35, 2.0):
        students = [x.float().requires_grad_() for x in maps(5)]
        loss = atang.atang_loss(students, [x.float() for x in TEACHER], margin, scale)
        loss.backward()
        assert loss.isfinite() and all(x.grad.isfinite().all() for x in students)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_float32(name, dtype):
    students, teachers = ([x.to(dtype) for x in maps(n)] for n in (7, 8))
    exact = LOSSES[name]([x.double() for x in students], [x.double() for x in teachers]).item()
    for within in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=within):
            assert LOSSES[name](students, teachers).item() == pytest.approx(exact, rel=1e-3)


# --- what does not fit is refused ----------------------------------------------------------------

OTHER = [TEACHER[0], TEACHER[1], TEACHER[1][..., :1, :1]]       # the last map has another size
REFUSED = [
    ("at.at_loss", [STUDENT, TEACHER[:2]], None),
    ("atang.atang_loss", [STUDENT, TEACHER[:2]], None),
    ("atang.atang_loss", [STUDENT, OTHER], "differ in size"),
    ("atang.amd_loss", [STUDENT, TEACHER[:2]], None),
    ("atang.amd_loss", [STUDENT, OTHER], "differ in size"),
    ("atang.amd_loss", [STUDENT, OTHER, 1.35, 64.0, True], "differ in size"),
    ("fsp.fsp_loss", [pairs(1), pairs(2)[:2]], None),
    ("fsp.fsp_loss", [[(STUDENT[0], STUDENT[1])], [(STUDENT[1], STUDENT[2])]], "connect"),
    ("overhaul.overhaul_loss", [STUDENT, LIKE[:2], MARGINS], None),
    ("overhaul.partial_l2", [STUDENT[0], STUDENT[1]], "connector"),
]


@pytest.mark.parametrize("name, args, says", REFUSED, ids=[row[0] for row in REFUSED])
def test_refused(name, args, says):
    with pytest.raises(ValueError, match=says):
        function_of(name)(*args)


# --- one method's own ----------------------------------------------------------------------------

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


def test_connector_is_what_eq_5_says():
    torch.manual_seed(0)
    conv, norm = overhaul.Connector(64, 256)
    assert conv.bias is None and conv.kernel_size == (1, 1) and norm.num_features == 256
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.03)
