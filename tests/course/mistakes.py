"""What people get wrong in the losses: a name, a sentence for the student, the wrong function.

The name is the function's, the sentence its docstring: assignment.py beside this file tells a
submission by them what went wrong. tests/test_course.py shows that the losses' tests see every one.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

import at
import atang
import fsp
import overhaul
import skd


# --- kd.py ---------------------------------------------------------------------------------------

def soft(logits: Tensor, tau: float) -> Tensor:
    return F.log_softmax(logits / tau, dim=1)


def kl(log_p: Tensor, log_q: Tensor, reduction: str = "batchmean") -> Tensor:
    return F.kl_div(log_p, log_q, reduction=reduction, log_target=True)


def no_tau_squared(z, v, tau):
    """the factor tau^2 is missing: the soft term weakens as tau grows"""
    return kl(soft(z, tau), soft(v.detach(), tau))


def tau_not_squared(z, v, tau):
    """multiplied by tau, not by tau squared"""
    return tau * kl(soft(z, tau), soft(v.detach(), tau))


def mean_over_classes(z, v, tau):
    """averaged over the classes as well (nn.KLDivLoss's default): K times too small"""
    return tau ** 2 * kl(soft(z, tau), soft(v.detach(), tau), "none").mean()


def sum_over_batch(z, v, tau):
    """summed over the batch, not averaged: the weight of the term depends on the batch size"""
    return tau ** 2 * kl(soft(z, tau), soft(v.detach(), tau), "sum")


def kl_the_wrong_way_round(z, v, tau):
    """KL(student || teacher): it is the teacher's q that weighs the logarithms"""
    return tau ** 2 * kl(soft(v.detach(), tau), soft(z, tau))


def softmax_twice(z, v, tau):
    """softmax is taken of probabilities: log_softmax wants logits"""
    return tau ** 2 * kl(soft(F.softmax(z / tau, 1), 1), soft(F.softmax(v.detach() / tau, 1), 1))


def probabilities_for_logarithms(z, v, tau):
    """kl_div's first argument is log p, not p"""
    return tau ** 2 * F.kl_div(F.softmax(z / tau, 1), F.softmax(v.detach() / tau, 1),
                               reduction="batchmean")


def softmax_over_the_batch(z, v, tau):
    """softmax over dim 0, the batch: the classes are dim 1"""
    return tau ** 2 * kl(F.log_softmax(z / tau, 0), F.log_softmax(v.detach() / tau, 0))


def only_the_teacher_softened(z, v, tau):
    """the student's logits are not divided by tau"""
    return tau ** 2 * kl(soft(z, 1), soft(v.detach(), tau))


def only_the_student_softened(z, v, tau):
    """the teacher's logits are not divided by tau"""
    return tau ** 2 * kl(soft(z, tau), soft(v.detach(), 1))


def cross_entropy_for_kl(z, v, tau):
    """-sum q log p, whose gradient is right but which is not 0 where the two agree"""
    return -tau ** 2 * (soft(v.detach(), tau).exp() * soft(z, tau)).sum(1).mean()


def teacher_not_detached(z, v, tau):
    """the teacher gets a gradient: detach its logits"""
    return tau ** 2 * kl(soft(z, tau), soft(v, tau))


# --- at.py ---------------------------------------------------------------------------------------

def squared(feature: Tensor) -> Tensor:
    return feature.square().sum(1).flatten(1)


def detached(maps: list[Tensor]) -> list[Tensor]:
    return [x.detach() for x in maps]


def pooled(students: list[Tensor], teachers: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of maps, the larger brought to the smaller one's size."""
    pairs = []
    for s, t in zip(students, teachers, strict=True):
        size = min(s.shape[-2:], t.shape[-2:])
        pairs.append((F.adaptive_avg_pool2d(s, size), F.adaptive_avg_pool2d(t, size)))
    return pairs


def not_normalised(feature, p=2):
    """the map is not divided by its norm"""
    return feature.abs().pow(p).sum(1).flatten(1)


def normalised_by_the_sum(feature, p=2):
    """divided by the sum over the pixels, not by the L2 norm"""
    return F.normalize(feature.abs().pow(p).sum(1).flatten(1), p=1, dim=1)


def norm_over_the_batch(feature, p=2):
    """the norm is taken over dim 0, the batch: each image has a norm of its own"""
    return F.normalize(feature.abs().pow(p).sum(1).flatten(1), dim=0)


def p_is_1(feature, p=2):
    """absolute values, not squares: p is 2"""
    return F.normalize(feature.abs().sum(1).flatten(1), dim=1)


def p_not_used(feature, p=2):
    """p is not used: the activations are always squared"""
    return at.attention_map(feature)


def square_of_the_sum(feature, p=2):
    """the sum over the channels is squared, not the activations"""
    return F.normalize(feature.sum(1).abs().pow(p).flatten(1), dim=1)


def maximum_over_the_channels(feature, p=2):
    """the largest channel alone: the channels are summed"""
    return F.normalize(feature.abs().pow(p).amax(1).flatten(1), dim=1)


def sum_over_the_pixels(feature, p=2):
    """summed over the pixels: what is left has to be a value a pixel, not one a channel"""
    return F.normalize(feature.abs().pow(p).sum((2, 3)), dim=1)


def sum_over_pixels(students, teachers, p=2):
    """summed over batch and pixels: beta = 1000 belongs to the mean"""
    return sum(F.mse_loss(at.attention_map(s, p), at.attention_map(t, p), reduction="sum")
               for s, t in pooled(students, detached(teachers)))


def mean_over_the_pairs(students, teachers, p=2):
    """averaged over the pairs of maps: the pairs are summed"""
    return at.at_loss(students, teachers, p) / len(students)


def unsquared_norm(students, teachers, p=2):
    """the norm of the difference, not its square"""
    return sum((at.attention_map(s, p) - at.attention_map(t, p)).norm(dim=1).mean()
               for s, t in pooled(students, detached(teachers)))


def maps_not_normalised(students, teachers, p=2):
    """the maps are not divided by their norms before they are compared"""
    return sum(F.mse_loss(s.abs().pow(p).sum(1), t.abs().pow(p).sum(1))
               for s, t in pooled(students, detached(teachers)))


def maps_with_p_1(students, teachers, p=2):
    """the maps are of absolute values, not of squares: p is 2"""
    return at.at_loss(students, teachers, p=1)


def p_of_the_maps_not_used(students, teachers, p=2):
    """p is not used: the maps are always of squares"""
    return at.at_loss(students, teachers)


def teachers_maps_not_detached(students, teachers, p=2):
    """the teacher gets a gradient: detach its maps"""
    return sum(F.mse_loss(at.attention_map(s, p), at.attention_map(t, p))
               for s, t in pooled(students, teachers))


# --- atang.py ------------------------------------------------------------------------------------

def theta_of(q: Tensor) -> Tensor:
    return torch.acos(q.clamp(-1 + 1e-7, 1 - 1e-7))


def map_not_normalised(feature):
    """Q' is divided by its L2 norm over the pixels, or else it is no cosine"""
    return squared(feature)


def map_over_the_batch(feature):
    """the norm is taken over the batch: each image has a norm of its own"""
    return F.normalize(squared(feature), dim=0)


def map_by_its_sum(feature):
    """divided by the sum over the pixels, not by the L2 norm"""
    return F.normalize(squared(feature), p=1, dim=1)


def margin_on_both(q, margin, scale):
    """the margin is on the positive feature alone"""
    return F.logsigmoid(scale * torch.cos(margin * theta_of(q))
                        - scale * torch.cos(margin * theta_of(1 - q)))


def margin_on_the_negative(q, margin, scale):
    """the margin is on the wrong side: on Q'_p, not on Q'_n"""
    return F.logsigmoid(scale * q - scale * torch.cos(margin * theta_of(1 - q)))


def margin_added(q, margin, scale):
    """the margin multiplies the angle here, cos(m theta): it is not added to it"""
    return F.logsigmoid(scale * torch.cos(theta_of(q) + margin) - scale * (1 - q))


def margin_outside_the_cosine(q, margin, scale):
    """m cos(theta): the margin belongs inside, cos(m theta)"""
    return F.logsigmoid(scale * margin * q - scale * (1 - q))


def no_margin(q, margin, scale):
    """the margin is not used"""
    return F.logsigmoid(scale * q - scale * (1 - q))


def negative_without_scale(q, margin, scale):
    """the negative feature is not multiplied by s"""
    return F.logsigmoid(scale * torch.cos(margin * theta_of(q)) - (1 - q))


def sine_for_the_negative(q, margin, scale):
    """s sin(theta), a cosine of pi/2 - theta: the negative feature is s (1 - Q'_p)"""
    return F.logsigmoid(scale * torch.cos(margin * theta_of(q)) - scale * torch.sin(theta_of(q)))


def no_logarithm(q, margin, scale):
    """the quotient of Eq. 6 without its logarithm"""
    return torch.sigmoid(scale * torch.cos(margin * theta_of(q)) - scale * (1 - q))


def angular(students: list, teachers: list, margin: float, scale: float, normalise=F.normalize,
            of_student: float | None = None, reduction: str = "mean") -> Tensor:
    """Eq. 7 from right parts; the teachers' maps as they come."""
    pairs = []
    for s, t in zip(students, teachers, strict=True):
        g_s = atang.angular_map(atang.attention_map(s), of_student or margin, scale)
        g_t = atang.angular_map(atang.attention_map(t), margin, scale)
        pairs.append(F.mse_loss(normalise(g_s), normalise(g_t), reduction=reduction))
    return sum(pairs) / len(pairs)


def sum_for_mean(students, teachers, margin=1.35, scale=64.0):
    """summed over batch and pixels: gamma = 5000 belongs to the mean"""
    return angular(students, detached(teachers), margin, scale, reduction="sum")


def pairs_summed(students, teachers, margin=1.35, scale=64.0):
    """alpha = 1 / #pairs is missing: the pairs are averaged"""
    return len(students) * atang.atang_loss(students, teachers, margin, scale)


def g_not_normalised(students, teachers, margin=1.35, scale=64.0):
    """G is divided by its norm over the pixels before the two are compared"""
    return angular(students, detached(teachers), margin, scale, normalise=torch.Tensor.clone)


def margin_on_the_teacher_alone(students, teachers, margin=1.35, scale=64.0):
    """the margin is on student and teacher, not on the teacher alone"""
    return angular(students, detached(teachers), margin, scale, of_student=1.0)


def maps_compared_not_angles(students, teachers, margin=1.35, scale=64.0):
    """the attention maps themselves are compared: this is attention transfer"""
    return at.at_loss(students, teachers) / len(students)


def teachers_g_not_detached(students, teachers, margin=1.35, scale=64.0):
    """the teacher gets a gradient: detach its maps"""
    return angular(students, teachers, margin, scale)


def three_terms_summed(students, teachers, margin=1.35, scale=64.0, local=False):
    """the three distances are summed: AMD averages them"""
    return 3 * atang.amd_loss(students, teachers, margin, scale, local)


def g_alone(students, teachers, margin=1.35, scale=64.0, local=False):
    """G alone is compared: AMD adds the positive and the negative feature"""
    return atang.atang_loss(students, teachers, margin, scale)


def local_ignored(students, teachers, margin=1.35, scale=64.0, local=False):
    """the quadrants of the local variant are left out"""
    return atang.amd_loss(students, teachers, margin, scale)


# --- fsp.py --------------------------------------------------------------------------------------

def not_divided_by_pixels(first, second):
    """1 / (h w) is missing"""
    size = min(first.shape[-2:], second.shape[-2:])
    return fsp.fsp_matrix(first, second) * size[0] * size[1]


def transposed(first, second):
    """the matrix is transposed: G_ij has i of the first map and j of the second"""
    return fsp.fsp_matrix(first, second).mT


def average_pooled(first, second):
    """the larger map is averaged to the smaller one's size: the paper takes the maximum"""
    size = min(first.shape[-2:], second.shape[-2:])
    return fsp.fsp_matrix(*(F.adaptive_avg_pool2d(x, size) for x in (first, second)))


def gram_matrix(first, second):
    """the second map with itself, a Gram matrix: FSP is between two layers"""
    return fsp.fsp_matrix(second, second)


def mean_over_entries(ours, theirs):
    """averaged over the entries of the matrices: Eq. 2 sums over them"""
    return sum(F.mse_loss(fsp.fsp_matrix(*s), fsp.fsp_matrix(*t).detach())
               for s, t in zip(ours, theirs, strict=True))


def not_divided_by_batch(ours, theirs):
    """1 / N is missing"""
    return len(ours[0][0]) * fsp.fsp_loss(ours, theirs)


def norm_not_squared(ours, theirs):
    """the norm of the difference, not its square"""
    return sum((fsp.fsp_matrix(*s) - fsp.fsp_matrix(*t).detach()).flatten(1).norm(dim=1).mean()
               for s, t in zip(ours, theirs, strict=True))


def teachers_matrix_not_detached(ours, theirs):
    """the teacher gets a gradient: detach its matrices"""
    return sum((fsp.fsp_matrix(*s) - fsp.fsp_matrix(*t)).square().sum() / len(s[0])
               for s, t in zip(ours, theirs, strict=True))


# --- overhaul.py ---------------------------------------------------------------------------------

def margin_of(mu: Tensor, sigma: Tensor, side: float = -1.0) -> Tensor:
    r = mu / sigma
    log_density = -r ** 2 / 2 - math.log(2 * math.pi) / 2
    return mu - sigma * torch.exp(log_density - torch.special.log_ndtr(side * r))


def gamma_without_abs(norm):
    """sigma is |gamma|: a BatchNorm's gamma may be negative"""
    return margin_of(norm.bias.detach(), norm.weight.detach())


def variance_for_deviation(norm):
    """sigma is the standard deviation |gamma|, not gamma squared"""
    return margin_of(norm.bias.detach(), norm.weight.detach().square())


def wrong_tail(norm):
    """Phi(mu / sigma) is the probability to be positive: it is Phi(-mu / sigma)"""
    return margin_of(norm.bias.detach(), norm.weight.detach().abs(), side=1.0)


def mean_left_out(norm):
    """mu is left out: m = mu - sigma ..."""
    return overhaul.channel_margin(norm) - norm.bias.detach()


def minus_three_sigma(norm):
    """-3 sigma where hardly anything is negative, as in the code: the mean there is close to 0"""
    mu, sigma = norm.bias.detach(), norm.weight.detach().abs()
    rare = torch.special.ndtr(-mu / sigma) < 0.001
    return torch.where(rare, -3 * sigma, margin_of(mu, sigma))


def running_statistics(norm):
    """the running statistics are of what enters: the output has mean beta, deviation |gamma|"""
    return margin_of(norm.running_mean, norm.running_var.sqrt())


def half_normal(norm):
    """-sigma sqrt(2 / pi), a half-normal's mean: that is so where mu is 0 alone"""
    return -norm.weight.detach().abs() * math.sqrt(2 / math.pi)


def minimum_for_maximum(feature, margin):
    """min(x, m): values below the margin are lifted to it, by max"""
    return torch.minimum(feature, margin.view(1, -1, 1, 1))


def plain_relu(feature, margin):
    """max(x, 0): the margin is not used"""
    return F.relu(feature)


def margin_along_the_width(feature, margin):
    """the margins run along the last axis, the width: they are one a channel"""
    return torch.maximum(feature, margin[:feature.shape[-1]])


def whole_l2(student, target):
    """plain L2: where S <= T <= 0 there is no loss"""
    return (target - student).square().sum()


def mask_negated(student, target):
    """the mask is negated: only where S <= T <= 0 there is no loss"""
    return ((target - student).square() * ((student <= target) & (target <= 0))).sum()


def mask_ignores_the_student(student, target):
    """all T <= 0 are passed over: where S > T the student is wrong there too"""
    return ((target - student).square() * (target > 0)).sum()


def mask_on_the_wrong_side(student, target):
    """S >= T <= 0 is passed over: it is S <= T"""
    return ((target - student).square() * ~((student >= target) & (target <= 0))).sum()


def mask_of_two_negatives(student, target):
    """passed over where both are negative: where S > T the student is wrong there too"""
    return ((target - student).square() * ~((student <= 0) & (target <= 0))).sum()


def mask_ignores_the_teacher(student, target):
    """all S <= 0 are passed over: where T > 0 the student is wrong there"""
    return ((target - student).square() * (student > 0)).sum()


def divided_by_the_batch(student, target):
    """divided by the batch size: Eq. 4 is a sum, overhaul_loss divides"""
    return overhaul.partial_l2(student, target) / len(student)


def mean_of_the_squares(student, target):
    """averaged: Eq. 4 is a sum, and alpha = 1e-3 belongs to it"""
    return overhaul.partial_l2(student, target) / student.numel()


def layers(students, teachers, margins, partial, weights) -> Tensor:
    """The loss from right parts; the teachers' maps as they come."""
    total = 0
    for weight, s, t, m in zip(weights, students, teachers, margins):
        distance = (t - s).square().sum()
        if partial:
            distance = overhaul.partial_l2(s, overhaul.margin_relu(t, m))
        total = total + weight * distance / len(s)
    return total


def weights_from_the_wrong_end(students, teachers, margins, partial=True):
    """the first layer weighs 1 and the deepest least: it is the other way round"""
    return layers(students, detached(teachers), margins, partial, [1, 0.5, 0.25])


def layers_weigh_alike(students, teachers, margins, partial=True):
    """all layers weigh 1: each weighs half of the next deeper one"""
    return layers(students, detached(teachers), margins, partial, [1, 1, 1])


def margins_not_used(students, teachers, margins, partial=True):
    """the margin ReLU is missing: T is the transformed teacher, max(F_t, m)"""
    nothing = [torch.full_like(m, -torch.inf) for m in margins]
    return overhaul.overhaul_loss(students, teachers, nothing, partial)


def batch_not_divided_by(students, teachers, margins, partial=True):
    """not divided by the batch size"""
    return len(students[0]) * overhaul.overhaul_loss(students, teachers, margins, partial)


def teachers_features_not_detached(students, teachers, margins, partial=True):
    """the teacher gets a gradient: detach its maps"""
    return layers(students, teachers, margins, partial, [0.25, 0.5, 1][-len(students):])


# --- skd.py --------------------------------------------------------------------------------------

def length_over_the_batch(logits, scale=1.0, center=False):
    """the length is taken over the batch: each image's logits have a length of their own"""
    logits = logits - logits.mean(1, keepdim=True) if center else logits
    return scale * F.normalize(logits, dim=0)


def scale_forgotten(logits, scale=1.0, center=False):
    """the scale is not used"""
    return skd.spherical(logits, 1.0, center)


def never_centred(logits, scale=1.0, center=False):
    """center is not used: the mean is not subtracted"""
    return skd.spherical(logits, scale)


def divided_by_the_squared_length(logits, scale=1.0, center=False):
    """divided by the squared length: z / ||z|| wants its root"""
    logits = logits - logits.mean(1, keepdim=True) if center else logits
    return scale * logits / logits.square().sum(1, keepdim=True)


def divided_by_the_deviation(logits, scale=1.0, center=False):
    """divided by the standard deviation: the length is sqrt(K) times that"""
    logits = logits - logits.mean(1, keepdim=True) if center else logits
    return scale * logits / logits.std(1, keepdim=True)


def aligned(z: Tensor, v: Tensor, scale: float | str, center: bool) -> tuple[Tensor, Tensor]:
    """Both networks' logits as Eq. 16 compares them."""
    if scale == "teacher":
        return z / z.std(1, keepdim=True) * v.std(1, keepdim=True), v
    return skd.spherical(z, scale, center), skd.spherical(v, scale, center)


def teacher_not_aligned(z, v, tau, scale, center=False):
    """the teacher's logits keep their length: both networks are put on the sphere"""
    return skd.kd_loss(aligned(z, v.detach(), scale, center)[0], v, tau)


def student_not_aligned(z, v, tau, scale, center=False):
    """the student's logits keep their length: both networks are put on the sphere"""
    return skd.kd_loss(z, aligned(z, v, scale, center)[1], tau)


def without_tau_squared(z, v, tau, scale, center=False):
    """the factor tau^2 is missing"""
    return skd.skd_loss(z, v, tau, scale, center) / tau ** 2


def skd_not_detached(z, v, tau, scale, center=False):
    """the teacher gets a gradient: detach its logits"""
    z_hat, v_hat = aligned(z, v, scale, center)
    return tau ** 2 * kl(soft(z_hat, tau), soft(v_hat, tau))


def skd_the_wrong_way_round(z, v, tau, scale, center=False):
    """KL(student || teacher): it is the teacher's q that weighs the logarithms"""
    z_hat, v_hat = aligned(z, v.detach(), scale, center)
    return tau ** 2 * kl(soft(v_hat, tau), soft(z_hat, tau))


# --- all of them ---------------------------------------------------------------------------------

MISTAKES = {
    "kd.kd_loss": [no_tau_squared, tau_not_squared, mean_over_classes, sum_over_batch,
        kl_the_wrong_way_round, softmax_twice, probabilities_for_logarithms, softmax_over_the_batch,
        only_the_teacher_softened, only_the_student_softened, cross_entropy_for_kl,
        teacher_not_detached],
    "at.attention_map": [not_normalised, normalised_by_the_sum, norm_over_the_batch, p_is_1,
        p_not_used, square_of_the_sum, maximum_over_the_channels, sum_over_the_pixels],
    "at.at_loss": [sum_over_pixels, mean_over_the_pairs, unsquared_norm, maps_not_normalised,
        maps_with_p_1, p_of_the_maps_not_used, teachers_maps_not_detached],
    "atang.attention_map": [map_not_normalised, map_over_the_batch, map_by_its_sum],
    "atang.angular_map": [margin_on_both, margin_on_the_negative, margin_added,
        margin_outside_the_cosine, no_margin, negative_without_scale, sine_for_the_negative,
        no_logarithm],
    "atang.atang_loss": [sum_for_mean, pairs_summed, g_not_normalised, margin_on_the_teacher_alone,
        maps_compared_not_angles, teachers_g_not_detached],
    "atang.amd_loss": [three_terms_summed, g_alone, local_ignored],
    "fsp.fsp_matrix": [not_divided_by_pixels, transposed, average_pooled, gram_matrix],
    "fsp.fsp_loss": [mean_over_entries, not_divided_by_batch, norm_not_squared,
        teachers_matrix_not_detached],
    "overhaul.channel_margin": [gamma_without_abs, variance_for_deviation, wrong_tail,
        mean_left_out, minus_three_sigma, running_statistics, half_normal],
    "overhaul.margin_relu": [minimum_for_maximum, plain_relu, margin_along_the_width],
    "overhaul.partial_l2": [whole_l2, mask_negated, mask_ignores_the_student,
        mask_on_the_wrong_side, mask_of_two_negatives, mask_ignores_the_teacher,
        divided_by_the_batch, mean_of_the_squares],
    "overhaul.overhaul_loss": [weights_from_the_wrong_end, layers_weigh_alike, margins_not_used,
        batch_not_divided_by, teachers_features_not_detached],
    "skd.spherical": [length_over_the_batch, scale_forgotten, never_centred,
        divided_by_the_squared_length, divided_by_the_deviation],
    "skd.skd_loss": [teacher_not_aligned, student_not_aligned, without_tau_squared,
        skd_not_detached, skd_the_wrong_way_round],
}
