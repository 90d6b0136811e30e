"""The losses against NumPy in float64, written from the equations and not from the code."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_equation

import at
import atang
import kd

TAU, MARGIN, SCALE = 4.0, 1.35, 64.0


def features(seed: int, channels=(3, 5, 4), sizes=(8, 4, 2), batch=2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, c, size, size, generator=generator, dtype=torch.float64)
            for c, size in zip(channels, sizes)]


def logits(seed: int, batch=6, classes=10) -> torch.Tensor:
    return 3 * torch.randn(batch, classes, generator=torch.Generator().manual_seed(seed),
                           dtype=torch.float64)


STUDENT, TEACHER = features(1), features(2, channels=(6, 2, 7))


# --- the equations, read once more --------------------------------------------------------------

def numpy_softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def numpy_kd(z, v, tau):
    total = 0.0
    for p, q in zip(numpy_softmax(z / tau), numpy_softmax(v / tau)):
        total += sum(qk * (np.log(qk) - np.log(pk)) for pk, qk in zip(p, q))
    return tau ** 2 * total / len(z)


def numpy_unit(vector):
    return vector / np.sqrt((vector ** 2).sum())


def numpy_at(students, teachers):
    total = 0.0
    for student, teacher in zip(students, teachers):
        squares = []
        for one, other in zip(student, teacher):
            difference = (numpy_unit((one ** 2).sum(axis=0).ravel())
                          - numpy_unit((other ** 2).sum(axis=0).ravel()))
            squares.extend(difference ** 2)
        total += np.mean(squares)
    return total


def numpy_q(feature):
    q = (feature ** 2).sum(axis=0).ravel()
    return q / (np.sqrt((q ** 2).sum()) + 1e-6)


def numpy_features(q, margin, scale):
    positive = scale * np.cos(margin * np.arccos(q))
    negative = scale * (1 - q)
    return [np.log(np.exp(positive) / (np.exp(positive) + np.exp(negative))), positive, negative]


def numpy_atang(students, teachers, margin, scale):
    pairs = []
    for student, teacher in zip(students, teachers):
        squares = []
        for one, other in zip(student, teacher):
            g_s = numpy_features(numpy_q(one), margin, scale)[0]
            g_t = numpy_features(numpy_q(other), margin, scale)[0]
            squares.extend((numpy_unit(g_s) - numpy_unit(g_t)) ** 2)
        pairs.append(np.mean(squares))
    return sum(pairs) / len(pairs)


def numpy_amd(students, teachers, margin, scale, local):
    def three(q_students, q_teachers):
        terms = []
        for k in range(3):
            squares = []
            for one, other in zip(q_students, q_teachers):
                if len(one) == 1:       # one pixel has no direction
                    squares.append(0.0)
                    continue
                squares.extend((numpy_unit(numpy_features(one, margin, scale)[k])
                                - numpy_unit(numpy_features(other, margin, scale)[k])) ** 2)
            terms.append(np.mean(squares))
        return sum(terms) / 3

    pairs = []
    for student, teacher in zip(students, teachers):
        height, width = student.shape[2:]
        q_s = [numpy_q(x).reshape(height, width) for x in student]
        q_t = [numpy_q(x).reshape(height, width) for x in teacher]
        value = three([q.ravel() for q in q_s], [q.ravel() for q in q_t])
        if local:
            h, w = height // 2, width // 2
            cuts = [np.s_[:h, :w], np.s_[:h, w:], np.s_[h:, :w], np.s_[h:, w:]]
            patches = [three([q[cut].ravel() for q in q_s], [q[cut].ravel() for q in q_t])
                       for cut in cuts]
            value = 0.8 * value + 0.2 * sum(patches) / 4
        pairs.append(value)
    return sum(pairs) / len(pairs)


def arrays(maps):
    return [x.numpy() for x in maps]


@pytest.mark.parametrize("tau", [1.0, 4.0, 16.0])
def test_kd_is_the_equation(tau):
    theirs = numpy_kd(logits(1).numpy(), logits(2).numpy(), tau)
    assert_equation("kd_loss", kd.kd_loss(logits(1), logits(2), tau), theirs, 1e-12)


def test_at_is_the_equation():
    theirs = numpy_at(arrays(STUDENT), arrays(TEACHER))
    assert_equation("at_loss", at.at_loss(STUDENT, TEACHER), theirs, 1e-12)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_at_map_is_the_equation(p):
    feature = STUDENT[0]
    expected = [numpy_unit((np.abs(x) ** p).sum(axis=0).ravel()) for x in feature.numpy()]
    assert np.allclose(at.attention_map(feature, p).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("margin, scale", [(1.35, 64.0), (1.0, 64.0), (2.0, 5.0)])
def test_atang_is_the_equation(margin, scale):
    ours = atang.atang_loss(STUDENT, TEACHER, margin, scale)
    theirs = numpy_atang(arrays(STUDENT), arrays(TEACHER), margin, scale)
    assert_equation("atang_loss", ours, theirs, 1e-9)
    q = atang.attention_map(STUDENT[1])
    expected = [numpy_features(numpy_q(x), margin, scale)[0] for x in STUDENT[1].numpy()]
    assert np.allclose(atang.angular_map(q, margin, scale).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("sizes", [(8, 4, 2), (7, 5, 3)])
def test_amd_is_the_equation(local, sizes):
    students, teachers = features(1, sizes=sizes), features(2, sizes=sizes, channels=(6, 2, 7))
    ours = atang.amd_loss(students, teachers, MARGIN, SCALE, local=local)
    theirs = numpy_amd(arrays(students), arrays(teachers), MARGIN, SCALE, local)
    assert_equation("amd_loss", ours, theirs, 1e-9)


# --- the scale, by number -----------------------------------------------------------------------

def test_reductions_by_number():
    """One hot pixel against another: every reduction shows in the value, worked out by hand."""
    one, other = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    one[..., 0, 0], other[..., 3, 3] = 1, 1
    # unit maps differ by 1 in two of 16 pixels
    assert at.at_loss([one], [other]).item() == pytest.approx(2 / 16)
    assert at.at_loss([one] * 3, [other] * 3).item() == pytest.approx(3 * 2 / 16)       # a sum
    # G is near 0 where q = 1 and s (cos(m pi/2) - 1) = -98.09 elsewhere: 15 equal entries after
    # normalisation, 1 / sqrt(15) each, so that two pixels differ by 1 / sqrt(15)
    assert atang.atang_loss([one], [other]).item() == pytest.approx(2 / 15 / 16, rel=1e-4)
    assert atang.atang_loss([one] * 3, [other] * 3).item() == pytest.approx(2 / 15 / 16, rel=1e-4)
    # (0, 0) against (log 3, 0) at tau 1: KL((3/4, 1/4) || (1/2, 1/2)) = log 2 - H(3/4)
    z, v = torch.zeros(5, 2), torch.tensor([[np.log(3.0), 0.0]]).expand(5, 2).float()
    expected = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    assert kd.kd_loss(z, v, 1.0).item() == pytest.approx(expected, rel=1e-6)
    assert kd.kd_loss(2 * z, 2 * v, 2.0).item() == pytest.approx(4 * expected, rel=1e-6)   # tau^2


@pytest.mark.parametrize("loss", [at.at_loss, atang.atang_loss, atang.amd_loss])
def test_batch_is_averaged(loss):
    doubled = [torch.cat([x, x]) for x in STUDENT], [torch.cat([x, x]) for x in TEACHER]
    assert loss(*doubled).item() == pytest.approx(loss(STUDENT, TEACHER).item(), rel=1e-12)


# --- gradients ----------------------------------------------------------------------------------

FEATURE_LOSSES = {
    "at": at.at_loss, "atang": atang.atang_loss, "amd": atang.amd_loss,
    "amd-local": lambda s, t: atang.amd_loss(s, t, local=True)}


def test_kd_gradcheck():
    z = logits(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: kd.kd_loss(z, logits(2), TAU), z)


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_feature_gradcheck(name):
    # A mean over pixels makes these gradients small: the check looks at 1e4 times the loss.
    students = [x.requires_grad_() for x in features(3, sizes=(4, 3, 2))]
    teachers = features(4, channels=(2, 2, 2), sizes=(4, 3, 2))
    assert torch.autograd.gradcheck(
        lambda *s: 1e4 * FEATURE_LOSSES[name](list(s), teachers), students, rtol=1e-4)


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_teacher_gets_no_gradient(name):
    students, teachers = ([x.clone().requires_grad_() for x in maps] for maps in (STUDENT, TEACHER))
    FEATURE_LOSSES[name](students, teachers).backward()
    assert all(x.grad is None for x in teachers)
    assert all(x.grad.abs().sum() > 0 for x in students)


def test_kd_teacher_gets_no_gradient():
    z, v = logits(1).requires_grad_(), logits(2).requires_grad_()
    kd.kd_loss(z, v, TAU).backward()
    assert v.grad is None and z.grad.abs().sum() > 0


# --- invariances --------------------------------------------------------------------------------

@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_feature_invariances(name):
    loss = FEATURE_LOSSES[name]
    value = loss(STUDENT, TEACHER).item()
    assert value > 0
    assert loss(STUDENT, STUDENT).item() == 0
    flipped = [x.flip(1) for x in STUDENT]                       # the order of the channels
    signed = [-x for x in STUDENT]                               # the sign
    louder = [10 * x for x in STUDENT]                           # the scale
    for changed in (flipped, signed, louder):
        assert loss(changed, TEACHER).item() == pytest.approx(value, rel=1e-5)
    turned = [x.flip(3) for x in STUDENT], [x.flip(3) for x in TEACHER]
    if name != "amd-local":
        assert loss(*turned).item() == pytest.approx(value, rel=1e-9)


def test_kd_invariances():
    z, v = logits(1), logits(2)
    assert kd.kd_loss(z, z, TAU).item() == pytest.approx(0, abs=1e-12)
    assert kd.kd_loss(z + 7, v - 3, TAU).item() == pytest.approx(kd.kd_loss(z, v, TAU).item())
    high = kd.kd_loss(z, v, 1000.0).item()      # for tau -> inf: ||z - v||^2 / (2 K), zero means
    difference = (z - z.mean(1, keepdim=True)) - (v - v.mean(1, keepdim=True))
    assert high == pytest.approx(difference.square().sum(1).mean().item() / 20, rel=1e-2)


# --- edges --------------------------------------------------------------------------------------

def edge(kind: str, size: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.zeros(2, 3, size, size)
    if kind == "constant":
        x += 0.7
    elif kind == "one-hot":
        x[..., 0, 0] = 1
    elif kind == "random":
        x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))
    elif kind == "huge":
        x += 200
        x[..., -1, -1] = 6e4
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_edges_are_finite(name, size, dtype):
    kinds = ["zero", "constant", "one-hot", "random", "huge"]
    for ours in kinds:
        for theirs in kinds:
            student = edge(ours, size, dtype).requires_grad_()
            loss = FEATURE_LOSSES[name]([student], [edge(theirs, size, dtype)])
            loss.backward()
            assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert loss.isfinite() and student.grad.isfinite().all(), (ours, theirs)
            if size == 1 and "zero" not in (ours, theirs):
                assert loss.item() < 1e-9, "a map of one pixel carries no attention"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kd_edges_are_finite(dtype):
    extreme = torch.tensor([[6e4, -6e4, 0.0], [0.0, 0.0, 0.0]]).to(dtype)
    z = extreme.flip(1).clone().requires_grad_()
    loss = kd.kd_loss(z, extreme, TAU)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and z.grad.isfinite().all()


@pytest.mark.parametrize("scale", [89.0, 1000.0])
def test_atang_has_no_overflow(scale):
    """The quotient of Eq. 6 is nan in float32 from s = 89 on."""
    students = [x.float().requires_grad_() for x in features(5)]
    loss = atang.atang_loss(students, [x.float() for x in TEACHER], MARGIN, scale)
    loss.backward()
    assert loss.isfinite() and all(x.grad.isfinite().all() for x in students)


def test_half_precision_is_close():
    for name, loss in FEATURE_LOSSES.items():
        exact = loss(STUDENT, TEACHER).item()
        rough = loss([x.bfloat16() for x in STUDENT], [x.bfloat16() for x in TEACHER]).item()
        assert rough == pytest.approx(exact, rel=0.05), name


def test_at_pools_the_larger_map():
    small = F.adaptive_avg_pool2d(STUDENT[0], 4)
    assert at.at_loss([STUDENT[0]], [small]).item() == pytest.approx(0, abs=1e-20)
    assert at.at_loss([small], [STUDENT[0]]).item() == pytest.approx(0, abs=1e-20)


def test_maps_that_do_not_match_are_refused():
    for loss in FEATURE_LOSSES.values():
        with pytest.raises(ValueError):
            loss(STUDENT, TEACHER[:2])
    for name in ("atang", "amd", "amd-local"):
        with pytest.raises(ValueError, match="differ in size"):
            FEATURE_LOSSES[name](STUDENT, [TEACHER[0], TEACHER[1], TEACHER[1][..., :1, :1]])


def test_margin_widens_the_gap():
    """G of a bright pixel minus G of a dark one grows with m: what the margin is for."""
    q = torch.tensor([[0.9, 0.1]], dtype=torch.float64)
    gaps = [float(np.diff(-atang.angular_map(q, m, 64.0).numpy())[0, 0]) for m in (1.0, 1.35, 2.0)]
    assert gaps[0] < gaps[1] < gaps[2]
