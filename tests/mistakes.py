"""What people get wrong in the losses: a name, a sentence for the student, the wrong function.

The name is the function's, the sentence its docstring. tests/assignment.py tells a submission by
them what went wrong; tests/test_assignment.py shows that the tests of the losses see every one.
"""
import math
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import at
import atang
import fsp
import overhaul
import skd

MISTAKES: dict[str, list[Callable]] = {}


def mistake(function: str) -> Callable:
    def keep(wrong: Callable) -> Callable:
        MISTAKES.setdefault(function, []).append(wrong)
        return wrong
    return keep


# --- kd.py ---------------------------------------------------------------------------------------

def soft(logits: Tensor, tau: float) -> Tensor:
    return F.log_softmax(logits / tau, dim=1)


def kl(log_p: Tensor, log_q: Tensor, reduction: str = "batchmean") -> Tensor:
    return F.kl_div(log_p, log_q, reduction=reduction, log_target=True)


@mistake("kd.kd_loss")
def no_tau_squared(z, v, tau):
    """the factor tau^2 is missing: the soft term weakens as tau grows"""
    return kl(soft(z, tau), soft(v.detach(), tau))


@mistake("kd.kd_loss")
def tau_not_squared(z, v, tau):
    """multiplied by tau, not by tau squared"""
    return tau * kl(soft(z, tau), soft(v.detach(), tau))


@mistake("kd.kd_loss")
def mean_over_classes(z, v, tau):
    """averaged over the classes as well (nn.KLDivLoss's default): K times too small"""
    return tau ** 2 * kl(soft(z, tau), soft(v.detach(), tau), "none").mean()


@mistake("kd.kd_loss")
def sum_over_batch(z, v, tau):
    """summed over the batch, not averaged: the weight of the term depends on the batch size"""
    return tau ** 2 * kl(soft(z, tau), soft(v.detach(), tau), "sum")


@mistake("kd.kd_loss")
def kl_the_wrong_way_round(z, v, tau):
    """KL(student || teacher): it is the teacher's q that weighs the logarithms"""
    return tau ** 2 * kl(soft(v.detach(), tau), soft(z, tau))


@mistake("kd.kd_loss")
def softmax_twice(z, v, tau):
    """softmax is taken of probabilities: log_softmax wants logits"""
    return tau ** 2 * kl(soft(F.softmax(z / tau, 1), 1), soft(F.softmax(v.detach() / tau, 1), 1))


@mistake("kd.kd_loss")
def probabilities_for_logarithms(z, v, tau):
    """kl_div's first argument is log p, not p"""
    return tau ** 2 * F.kl_div(F.softmax(z / tau, 1), F.softmax(v.detach() / tau, 1),
                               reduction="batchmean")


@mistake("kd.kd_loss")
def softmax_over_the_batch(z, v, tau):
    """softmax over dim 0, the batch: the classes are dim 1"""
    return tau ** 2 * kl(F.log_softmax(z / tau, 0), F.log_softmax(v.detach() / tau, 0))


@mistake("kd.kd_loss")
def only_the_teacher_softened(z, v, tau):
    """the student's logits are not divided by tau"""
    return tau ** 2 * kl(soft(z, 1), soft(v.detach(), tau))


@mistake("kd.kd_loss")
def cross_entropy_for_kl(z, v, tau):
    """-sum q log p, whose gradient is right but which is not 0 where the two agree"""
    return -tau ** 2 * (soft(v.detach(), tau).exp() * soft(z, tau)).sum(1).mean()


@mistake("kd.kd_loss")
def teacher_not_detached(z, v, tau):
    """the teacher gets a gradient: detach its logits"""
    return tau ** 2 * kl(soft(z, tau), soft(v, tau))


# --- at.py ---------------------------------------------------------------------------------------

def squared(feature: Tensor) -> Tensor:
    return feature.square().sum(1).flatten(1)


def pairwise(distance: Callable, reduce: Callable = sum) -> Callable:
    """A loss over lists of maps, the larger map pooled to the smaller one's size."""
    def loss(students, teachers):
        values = []
        for student, teacher in zip(students, teachers, strict=True):
            size = min(student.shape[-2:], teacher.shape[-2:])
            values.append(distance(F.adaptive_avg_pool2d(student, size),
                                   F.adaptive_avg_pool2d(teacher, size).detach()))
        return reduce(values)
    return loss


@mistake("at.attention_map")
def not_normalised(feature, p=2):
    """the map is not divided by its norm"""
    return feature.abs().pow(p).sum(1).flatten(1)


@mistake("at.attention_map")
def normalised_by_the_sum(feature, p=2):
    """divided by the sum over the pixels, not by the L2 norm"""
    return F.normalize(feature.abs().pow(p).sum(1).flatten(1), p=1, dim=1)


@mistake("at.attention_map")
def norm_over_the_batch(feature, p=2):
    """the norm is taken over dim 0, the batch: each image has a norm of its own"""
    return F.normalize(feature.abs().pow(p).sum(1).flatten(1), dim=0)


@mistake("at.attention_map")
def p_is_1(feature, p=2):
    """absolute values, not squares: p is 2"""
    return F.normalize(feature.abs().sum(1).flatten(1), dim=1)


@mistake("at.attention_map")
def square_of_the_sum(feature, p=2):
    """the sum over the channels is squared, not the activations"""
    return F.normalize(feature.sum(1).abs().pow(p).flatten(1), dim=1)


@mistake("at.attention_map")
def sum_over_the_pixels(feature, p=2):
    """summed over the pixels: what is left has to be a value a pixel, not one a channel"""
    return F.normalize(feature.abs().pow(p).sum((2, 3)), dim=1)


@mistake("at.at_loss")
def sum_over_pixels(students, teachers, p=2):
    """summed over batch and pixels: beta = 1000 belongs to the mean"""
    return pairwise(lambda s, t: F.mse_loss(at.attention_map(s), at.attention_map(t),
                                            reduction="sum"))(students, teachers)


@mistake("at.at_loss")
def mean_over_the_pairs(students, teachers, p=2):
    """averaged over the pairs of maps: the pairs are summed"""
    return at.at_loss(students, teachers) / len(students)


@mistake("at.at_loss")
def unsquared_norm(students, teachers, p=2):
    """the norm of the difference, not its square"""
    return pairwise(lambda s, t: (at.attention_map(s) - at.attention_map(t)).norm(dim=1).mean())(
        students, teachers)


@mistake("at.at_loss")
def maps_not_normalised(students, teachers, p=2):
    """the maps are not divided by their norms before they are compared"""
    return pairwise(lambda s, t: F.mse_loss(squared(s), squared(t)))(students, teachers)


@mistake("at.at_loss")
def maps_with_p_1(students, teachers, p=2):
    """the maps are of absolute values, not of squares: p is 2"""
    return at.at_loss(students, teachers, p=1)


@mistake("at.at_loss")
def teachers_maps_not_detached(students, teachers, p=2):
    """the teacher gets a gradient: detach its maps"""
    total = 0
    for s, t in zip(students, teachers, strict=True):
        size = min(s.shape[-2:], t.shape[-2:])
        s, t = (F.adaptive_avg_pool2d(x, size) for x in (s, t))
        total = total + F.mse_loss(at.attention_map(s), at.attention_map(t))
    return total


# --- atang.py ------------------------------------------------------------------------------------

def theta_of(q: Tensor) -> Tensor:
    return torch.acos(q.clamp(-1 + 1e-7, 1 - 1e-7))


@mistake("atang.attention_map")
def map_not_normalised(feature):
    """Q' is divided by its L2 norm over the pixels, or else it is no cosine"""
    return squared(feature)


@mistake("atang.attention_map")
def map_over_the_batch(feature):
    """the norm is taken over the batch: each image has a norm of its own"""
    return F.normalize(squared(feature), dim=0)


@mistake("atang.attention_map")
def map_by_its_sum(feature):
    """divided by the sum over the pixels, not by the L2 norm"""
    return F.normalize(squared(feature), p=1, dim=1)


@mistake("atang.angular_map")
def margin_on_both(q, margin, scale):
    """the margin is on the positive feature alone"""
    return F.logsigmoid(scale * torch.cos(margin * theta_of(q))
                        - scale * torch.cos(margin * theta_of(1 - q)))


@mistake("atang.angular_map")
def margin_on_the_negative(q, margin, scale):
    """the margin is on the wrong side: on Q'_p, not on Q'_n"""
    return F.logsigmoid(scale * q - scale * torch.cos(margin * theta_of(1 - q)))


@mistake("atang.angular_map")
def margin_added(q, margin, scale):
    """the margin multiplies the angle here, cos(m theta): it is not added to it"""
    return F.logsigmoid(scale * torch.cos(theta_of(q) + margin) - scale * (1 - q))


@mistake("atang.angular_map")
def margin_outside_the_cosine(q, margin, scale):
    """m cos(theta): the margin belongs inside, cos(m theta)"""
    return F.logsigmoid(scale * margin * q - scale * (1 - q))


@mistake("atang.angular_map")
def no_margin(q, margin, scale):
    """the margin is not used"""
    return F.logsigmoid(scale * q - scale * (1 - q))


@mistake("atang.angular_map")
def negative_without_scale(q, margin, scale):
    """the negative feature is not multiplied by s"""
    return F.logsigmoid(scale * torch.cos(margin * theta_of(q)) - (1 - q))


@mistake("atang.angular_map")
def no_logarithm(q, margin, scale):
    """the quotient of Eq. 6 without its logarithm"""
    return torch.sigmoid(scale * torch.cos(margin * theta_of(q)) - scale * (1 - q))


def g_of(feature: Tensor, margin: float, scale: float) -> Tensor:
    return atang.angular_map(atang.attention_map(feature), margin, scale)


@mistake("atang.atang_loss")
def sum_for_mean(students, teachers, margin=1.35, scale=64.0):
    """summed over batch and pixels: gamma = 5000 belongs to the mean"""
    pairs = [F.mse_loss(F.normalize(g_of(s, margin, scale)),
                        F.normalize(g_of(t.detach(), margin, scale)), reduction="sum")
             for s, t in zip(students, teachers, strict=True)]
    return sum(pairs) / len(pairs)


@mistake("atang.atang_loss")
def pairs_summed(students, teachers, margin=1.35, scale=64.0):
    """alpha = 1 / #pairs is missing: the pairs are averaged"""
    return len(students) * atang.atang_loss(students, teachers, margin, scale)


@mistake("atang.atang_loss")
def g_not_normalised(students, teachers, margin=1.35, scale=64.0):
    """G is divided by its norm over the pixels before the two are compared"""
    pairs = [F.mse_loss(g_of(s, margin, scale), g_of(t.detach(), margin, scale))
             for s, t in zip(students, teachers, strict=True)]
    return sum(pairs) / len(pairs)


@mistake("atang.atang_loss")
def margin_on_the_teacher_alone(students, teachers, margin=1.35, scale=64.0):
    """the margin is on student and teacher, not on the teacher alone"""
    pairs = [F.mse_loss(F.normalize(g_of(s, 1.0, scale)),
                        F.normalize(g_of(t.detach(), margin, scale)))
             for s, t in zip(students, teachers, strict=True)]
    return sum(pairs) / len(pairs)


@mistake("atang.atang_loss")
def maps_compared_not_angles(students, teachers, margin=1.35, scale=64.0):
    """the attention maps themselves are compared: this is attention transfer"""
    return at.at_loss(students, teachers) / len(students)


@mistake("atang.atang_loss")
def teachers_g_not_detached(students, teachers, margin=1.35, scale=64.0):
    """the teacher gets a gradient: detach its maps"""
    pairs = [F.mse_loss(F.normalize(g_of(s, margin, scale)), F.normalize(g_of(t, margin, scale)))
             for s, t in zip(students, teachers, strict=True)]
    return sum(pairs) / len(pairs)


@mistake("atang.amd_loss")
def three_terms_summed(students, teachers, margin=1.35, scale=64.0, local=False):
    """the three distances are summed: AMD averages them"""
    return 3 * atang.amd_loss(students, teachers, margin, scale, local)


@mistake("atang.amd_loss")
def g_alone(students, teachers, margin=1.35, scale=64.0, local=False):
    """G alone is compared: AMD adds the positive and the negative feature"""
    return atang.atang_loss(students, teachers, margin, scale)


@mistake("atang.amd_loss")
def local_ignored(students, teachers, margin=1.35, scale=64.0, local=False):
    """the quadrants of the local variant are left out"""
    return atang.amd_loss(students, teachers, margin, scale)


# --- fsp.py --------------------------------------------------------------------------------------

@mistake("fsp.fsp_matrix")
def not_divided_by_pixels(first, second):
    """1 / (h w) is missing"""
    size = min(first.shape[-2:], second.shape[-2:])
    return fsp.fsp_matrix(first, second) * size[0] * size[1]


@mistake("fsp.fsp_matrix")
def transposed(first, second):
    """the matrix is transposed: G_ij has i of the first map and j of the second"""
    return fsp.fsp_matrix(first, second).mT


@mistake("fsp.fsp_matrix")
def average_pooled(first, second):
    """the larger map is averaged to the smaller one's size: the paper takes the maximum"""
    size = min(first.shape[-2:], second.shape[-2:])
    return fsp.fsp_matrix(*(F.adaptive_avg_pool2d(x, size) for x in (first, second)))


@mistake("fsp.fsp_matrix")
def gram_matrix(first, second):
    """the second map with itself, a Gram matrix: FSP is between two layers"""
    return fsp.fsp_matrix(second, second)


@mistake("fsp.fsp_loss")
def mean_over_entries(ours, theirs):
    """averaged over the entries of the matrices: Eq. 2 sums over them"""
    return sum(F.mse_loss(fsp.fsp_matrix(*s), fsp.fsp_matrix(*t).detach())
               for s, t in zip(ours, theirs, strict=True))


@mistake("fsp.fsp_loss")
def not_divided_by_batch(ours, theirs):
    """1 / N is missing"""
    return len(ours[0][0]) * fsp.fsp_loss(ours, theirs)


@mistake("fsp.fsp_loss")
def norm_not_squared(ours, theirs):
    """the norm of the difference, not its square"""
    return sum((fsp.fsp_matrix(*s) - fsp.fsp_matrix(*t).detach()).flatten(1).norm(dim=1).mean()
               for s, t in zip(ours, theirs, strict=True))


@mistake("fsp.fsp_loss")
def teachers_matrix_not_detached(ours, theirs):
    """the teacher gets a gradient: detach its matrices"""
    return sum((fsp.fsp_matrix(*s) - fsp.fsp_matrix(*t)).square().sum() / len(s[0])
               for s, t in zip(ours, theirs, strict=True))


# --- overhaul.py ---------------------------------------------------------------------------------

def margin_of(mu: Tensor, sigma: Tensor, side: float = -1.0) -> Tensor:
    r = mu / sigma
    log_density = -r ** 2 / 2 - math.log(2 * math.pi) / 2
    return mu - sigma * torch.exp(log_density - torch.special.log_ndtr(side * r))


@mistake("overhaul.channel_margin")
def gamma_without_abs(norm):
    """sigma is |gamma|: a BatchNorm's gamma may be negative"""
    return margin_of(norm.bias.detach(), norm.weight.detach())


@mistake("overhaul.channel_margin")
def variance_for_deviation(norm):
    """sigma is the standard deviation |gamma|, not gamma squared"""
    return margin_of(norm.bias.detach(), norm.weight.detach().square())


@mistake("overhaul.channel_margin")
def wrong_tail(norm):
    """Phi(mu / sigma) is the probability to be positive: it is Phi(-mu / sigma)"""
    return margin_of(norm.bias.detach(), norm.weight.detach().abs(), side=1.0)


@mistake("overhaul.channel_margin")
def mean_left_out(norm):
    """mu is left out: m = mu - sigma ..."""
    return overhaul.channel_margin(norm) - norm.bias.detach()


@mistake("overhaul.channel_margin")
def minus_three_sigma(norm):
    """-3 sigma where hardly anything is negative, as in the code: the mean there is close to 0"""
    mu, sigma = norm.bias.detach(), norm.weight.detach().abs()
    rare = torch.special.ndtr(-mu / sigma) < 0.001
    return torch.where(rare, -3 * sigma, margin_of(mu, sigma))


@mistake("overhaul.channel_margin")
def running_statistics(norm):
    """the running statistics are of what enters: the output has mean beta, deviation |gamma|"""
    return margin_of(norm.running_mean, norm.running_var.sqrt())


@mistake("overhaul.margin_relu")
def minimum_for_maximum(feature, margin):
    """min(x, m): values below the margin are lifted to it, by max"""
    return torch.minimum(feature, margin.view(1, -1, 1, 1))


@mistake("overhaul.margin_relu")
def plain_relu(feature, margin):
    """max(x, 0): the margin is not used"""
    return F.relu(feature)


@mistake("overhaul.margin_relu")
def margin_along_the_width(feature, margin):
    """the margins run along the last axis, the width: they are one a channel"""
    return torch.maximum(feature, margin[:feature.shape[-1]])


@mistake("overhaul.partial_l2")
def whole_l2(student, target):
    """plain L2: where S <= T <= 0 there is no loss"""
    return (target - student).square().sum()


@mistake("overhaul.partial_l2")
def mask_negated(student, target):
    """the mask is negated: only where S <= T <= 0 there is no loss"""
    return ((target - student).square() * ((student <= target) & (target <= 0))).sum()


@mistake("overhaul.partial_l2")
def mask_ignores_the_student(student, target):
    """all T <= 0 are passed over: where S > T the student is wrong there too"""
    return ((target - student).square() * (target > 0)).sum()


@mistake("overhaul.partial_l2")
def mask_on_the_wrong_side(student, target):
    """S >= T <= 0 is passed over: it is S <= T"""
    return ((target - student).square() * ~((student >= target) & (target <= 0))).sum()


@mistake("overhaul.partial_l2")
def mean_of_the_squares(student, target):
    """averaged: Eq. 4 is a sum, and alpha = 1e-3 belongs to it"""
    return overhaul.partial_l2(student, target) / student.numel()


def layers_of(weight: Callable, divide: bool = True, detach: bool = True) -> Callable:
    def loss(students, teachers, margins, partial=True):
        total, n = 0, len(students)
        for layer, (s, t, m) in enumerate(zip(students, teachers, margins, strict=True)):
            t = t.detach() if detach else t
            distance = (overhaul.partial_l2(s, overhaul.margin_relu(t, m)) if partial
                        else (t - s).square().sum())
            total = total + weight(layer, n) * distance / (len(s) if divide else 1)
        return total
    return loss


@mistake("overhaul.overhaul_loss")
def weights_from_the_wrong_end(*maps, **options):
    """the first layer weighs 1 and the deepest least: it is the other way round"""
    return layers_of(lambda layer, n: 0.5 ** layer)(*maps, **options)


@mistake("overhaul.overhaul_loss")
def layers_weigh_alike(*maps, **options):
    """all layers weigh 1: each weighs half of the next deeper one"""
    return layers_of(lambda layer, n: 1.0)(*maps, **options)


@mistake("overhaul.overhaul_loss")
def batch_not_divided_by(*maps, **options):
    """not divided by the batch size"""
    return layers_of(lambda layer, n: 0.5 ** (n - 1 - layer), divide=False)(*maps, **options)


@mistake("overhaul.overhaul_loss")
def teachers_features_not_detached(*maps, **options):
    """the teacher gets a gradient: detach its maps"""
    return layers_of(lambda layer, n: 0.5 ** (n - 1 - layer), detach=False)(*maps, **options)


# --- skd.py --------------------------------------------------------------------------------------

@mistake("skd.entropy")
def entropy_of_the_wrong_sign(logits, tau):
    """the minus sign is missing: an entropy is positive"""
    return -skd.entropy(logits, tau)


@mistake("skd.entropy")
def entropy_in_bits(logits, tau):
    """the logarithm has base 2: S is in nats"""
    return skd.entropy(logits, tau) / math.log(2)


@mistake("skd.entropy")
def entropy_not_softened(logits, tau):
    """the logits are not divided by tau"""
    return skd.entropy(logits, 1.0)


@mistake("skd.entropy")
def entropy_averaged(logits, tau):
    """averaged over the classes: S is a sum over them"""
    return skd.entropy(logits, tau) / logits.shape[1]


@mistake("skd.free_energy")
def energy_without_tau_in_front(logits, tau):
    """the factor tau in front of the logarithm is missing"""
    return torch.logsumexp(logits / tau, 1)


@mistake("skd.free_energy")
def energy_not_softened(logits, tau):
    """the logits are not divided by tau"""
    return tau * torch.logsumexp(logits, 1)


@mistake("skd.free_energy")
def energy_of_the_wrong_sign(logits, tau):
    """Eq. 5 has no minus sign"""
    return -skd.free_energy(logits, tau)


@mistake("skd.spherical")
def length_over_the_batch(logits, scale=1.0, center=False):
    """the length is taken over the batch: each image's logits have a length of their own"""
    logits = logits - logits.mean(1, keepdim=True) if center else logits
    return scale * F.normalize(logits, dim=0)


@mistake("skd.spherical")
def scale_forgotten(logits, scale=1.0, center=False):
    """the scale is not used"""
    return skd.spherical(logits, 1.0, center)


@mistake("skd.spherical")
def never_centred(logits, scale=1.0, center=False):
    """center is not used: the mean is not subtracted"""
    return skd.spherical(logits, scale)


@mistake("skd.spherical")
def divided_by_the_squared_length(logits, scale=1.0, center=False):
    """divided by the squared length: z / ||z|| wants its root"""
    logits = logits - logits.mean(1, keepdim=True) if center else logits
    return scale * logits / logits.square().sum(1, keepdim=True)


def aligned(z: Tensor, v: Tensor, tau: float, scale: float | str, center: bool,
            which: str = "both") -> Tensor:
    """Eq. 16 from right parts, of which one network's alignment may be missing."""
    v = v.detach()
    if scale == "teacher":
        z_hat, v_hat = skd.as_teacher(z, v), v
    else:
        z_hat, v_hat = (skd.spherical(x, scale, center) for x in (z, v))
    return skd.kd_loss(z if which == "teacher" else z_hat, v if which == "student" else v_hat, tau)


@mistake("skd.skd_loss")
def teacher_not_aligned(z, v, tau, scale, center=False):
    """the teacher's logits keep their length: both networks are put on the sphere"""
    return aligned(z, v, tau, scale, center, which="student")


@mistake("skd.skd_loss")
def student_not_aligned(z, v, tau, scale, center=False):
    """the student's logits keep their length: both networks are put on the sphere"""
    return aligned(z, v, tau, scale, center, which="teacher")


@mistake("skd.skd_loss")
def without_tau_squared(z, v, tau, scale, center=False):
    """the factor tau^2 is missing"""
    return skd.skd_loss(z, v, tau, scale, center) / tau ** 2


@mistake("skd.skd_loss")
def skd_not_detached(z, v, tau, scale, center=False):
    """the teacher gets a gradient: detach its logits"""
    if scale == "teacher":
        z_hat, v_hat = z / z.std(1, keepdim=True) * v.std(1, keepdim=True), v
    else:
        z_hat, v_hat = (skd.spherical(x, scale, center) for x in (z, v))
    return tau ** 2 * kl(soft(z_hat, tau), soft(v_hat, tau))


@mistake("skd.skd_loss")
def skd_the_wrong_way_round(z, v, tau, scale, center=False):
    """KL(student || teacher): it is the teacher's q that weighs the logarithms"""
    v = v.detach()
    if scale == "teacher":
        z_hat, v_hat = skd.as_teacher(z, v), v
    else:
        z_hat, v_hat = (skd.spherical(x, scale, center) for x in (z, v))
    return tau ** 2 * kl(soft(v_hat, tau), soft(z_hat, tau))
