"""Metrics of features: equal to their formulas written plainly, exact where the truth is known, and calibrated."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from ancestral.data import load
from ancestral.errors import OptionError
from ancestral.measure.metrics import copying, coverage, distances, intervals, neighbours, twosample
from ancestral.rng import randn, stream

DIGITS = load("digits")
SPLITS = 200
CALIBRATED = (0.95 - 3 * 0.0154, 0.95 + 3 * 0.0154)
"""What 200 intervals of 95% hold: three standard deviations of the binomial share about it."""


def normal(n, D, seed, scale=1.0, shift=0.0):
    return scale * randn((n, D), stream(seed), dtype=torch.float64) + shift


def of_digits(D):
    """Principal components of digits, to unit variance of the first."""
    x = DIGITS.facts.scale.forward(DIGITS.train, dtype=torch.float64).flatten(1)
    x = x - x.mean(0)
    vectors = torch.linalg.svd(x, full_matrices=False).Vh[:D]
    return x @ vectors.T / (x @ vectors[0]).std()


DISTANCES = {
    "kid": distances.kid,
    "mmd": distances.mmd,
    "energy": distances.energy,
    "frechet_extrapolated": distances.frechet_extrapolated,
    "sliced": lambda x, y: distances.sliced(x, y, rng=stream(0), directions=16),
}


# Equal to plain formulas, for sets of unequal size


def unbiased(kernel, x, y):
    """The U-statistic as it is defined, a pair at a time."""

    def within(x):
        return np.mean([kernel(a, b) for a, b in itertools.permutations(x, 2)])

    return within(x) + within(y) - 2 * np.mean([kernel(a, b) for a in x for b in y])


def pair_of_sets():
    x, y = normal(41, 3, 1), normal(30, 3, 2, scale=1.5, shift=0.3)
    return (x, y), (x.numpy(), y.numpy())


def test_kernel_distances_are_their_u_statistics():
    (x, y), (a, b) = pair_of_sets()
    assert distances.kid(x, y).value == pytest.approx(unbiased(lambda p, q: (p @ q / 3 + 1) ** 3, a, b), rel=1e-6)
    expected = unbiased(lambda p, q: -np.linalg.norm(p - q), a, b)
    assert distances.energy(x, y).value == pytest.approx(expected, rel=1e-6)
    pooled = np.concatenate([a, b])
    s = np.median([np.linalg.norm(p - q) for p, q in itertools.combinations(pooled, 2)])
    expected = unbiased(lambda p, q: math.exp(-np.sum((p - q) ** 2) / (2 * s**2)), a, b)
    assert distances.mmd(x, y).value == pytest.approx(expected, rel=1e-3), "the median of an even number is either"
    s = distances.median_distance(x, y)
    expected = unbiased(lambda p, q: math.exp(-np.sum((p - q) ** 2) / (2 * s**2)), a, b)
    assert distances.mmd(x, y).value == pytest.approx(expected, rel=1e-6)


def test_work_in_pieces_changes_nothing(monkeypatch):
    (x, y), _ = pair_of_sets()
    whole = [distance(x, y).value for distance in DISTANCES.values()]
    monkeypatch.setattr(distances, "AT_ONCE", 50)
    assert [distance(x, y).value for distance in DISTANCES.values()] == pytest.approx(whole, rel=1e-9)


def test_the_frechet_distance_is_that_of_the_matrix_root():
    (x, y), (a, b) = pair_of_sets()
    S, T = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(S @ T).real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(S + T - 2 * root)
    assert distances.frechet(x, y).value == pytest.approx(expected, rel=1e-6)


def test_the_frechet_distance_of_singular_covariances_is_exact():
    """Where the matrix root of a product loses half of the digits: all features copies of one."""
    x = normal(200, 1, 1).expand(-1, 40)
    assert distances.frechet(x, x).value == pytest.approx(0, abs=1e-10)
    assert distances.frechet(x, 3 * x).value == pytest.approx(
        40 * (4 * float(x[:, 0].var()) + 4 * float(x[:, 0].mean()) ** 2), rel=1e-9
    )


def test_the_frechet_distance_of_fewer_examples_than_features_is_that_of_their_covariances():
    x, y = normal(24, 40, 1), normal(30, 40, 2, scale=1.5, shift=0.3)
    exact = distances.frechet_of_moments(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert distances.frechet(x, y).value == pytest.approx(exact, rel=1e-6)


def test_the_sliced_distance_of_one_direction_couples_quantiles_exactly():
    """Blocks of 3 and 2 examples of x, and 2 and 1 of y: on a grid of sixths every step is resolved."""
    x, y = normal(50, 1, 1), normal(30, 1, 2)
    quantiles = []
    for z in (x, y):
        parts = [z[rows, 0].numpy() for rows in intervals.blocks(len(z), distances.BLOCKS)]
        quantiles.append([np.repeat(np.sort(part), 6 // len(part)) for part in parts])
    gaps = [F - G for F, G in zip(*quantiles, strict=True)]
    expected = np.mean([np.mean(a * b) for a, b in itertools.permutations(gaps, 2)])
    assert distances.sliced(x, y, rng=stream(0), directions=3).value == pytest.approx(expected, rel=1e-9)


# Exact where the truth is known


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.5), (2.0, 0.0), (1.3, 0.2)])
def test_extrapolating_removes_the_bias_of_the_frechet_distance(scale, shift):
    """Between N(0, I) and N(shift, scale^2 I) it is D (shift^2 + (scale - 1)^2)."""
    D = 12
    exact = D * (shift**2 + (scale - 1) ** 2)
    biased, found = [], []
    for seed in range(20):
        x, y = normal(200, D, seed), normal(200, D, 1000 + seed, scale, shift)
        biased.append(distances.frechet(x, y).value)
        found.append(distances.frechet_extrapolated(x, y))
    values = np.array([each.value for each in found])
    stderr = values.std(ddof=1) / 20**0.5
    assert abs(values.mean() - exact) < 4 * stderr
    assert np.mean(biased) - exact > 4 * stderr
    assert sum(each.low <= exact <= each.high for each in found) >= 15  # P(less) = 0.0003 for 95%


def test_the_energy_distance_of_two_normal_laws_is_that_in_closed_form():
    """2 E|N(1, 2)| - 2 E|N(0, 2)| in one dimension."""
    sigma = math.sqrt(2)
    folded = sigma * math.sqrt(2 / math.pi) * math.exp(-1 / 4) + math.erf(1 / 2)
    exact = 2 * folded - 2 * sigma * math.sqrt(2 / math.pi)
    found = distances.energy(normal(2000, 1, 0, shift=1), normal(2000, 1, 1))
    assert found.low < exact < found.high
    assert found.stderr < 0.1 * exact


def test_the_sliced_distance_of_shifted_laws_is_the_mean_square_of_the_projected_shift():
    """E (w.d)^2 = |d|^2 / D over directions w."""
    found = distances.sliced(normal(2000, 4, 0, shift=1), normal(1500, 4, 1), rng=stream(2), directions=2000)
    assert found.value == pytest.approx(1, rel=0.1)
    assert found.low < 1 < found.high


@pytest.mark.parametrize("name", [name for name in DISTANCES if name != "sliced"])
def test_a_distance_does_not_depend_on_a_rotation_of_both_sets(name):
    x, y = normal(100, 4, 1), normal(80, 4, 2, scale=1.2)
    Q = torch.linalg.qr(normal(4, 4, 3)).Q
    assert DISTANCES[name](x @ Q, y @ Q).value == pytest.approx(DISTANCES[name](x, y).value, rel=1e-8)


def test_the_frechet_distance_does_not_depend_on_order_or_on_a_translation_of_both_sets():
    x, y = normal(100, 4, 1), normal(80, 4, 2, scale=1.2)
    value = distances.frechet(x, y).value
    order = torch.from_numpy(stream(0).permutation(100))
    assert distances.frechet(x[order], y).value == pytest.approx(value, rel=1e-9)
    assert distances.frechet(x + 1e4, y + 1e4).value == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("name", ["kid", "mmd", "energy"])
def test_values_of_kernel_distances_do_not_depend_on_order(name):
    x, y = normal(100, 4, 1), normal(80, 4, 2, scale=1.2)
    order = torch.from_numpy(stream(0).permutation(100))
    assert DISTANCES[name](x[order], y).value == pytest.approx(DISTANCES[name](x, y).value, rel=1e-9)


# Calibrated


@pytest.mark.parametrize("name", DISTANCES)
def test_intervals_hold_zero_for_two_halves_of_the_same_data_as_often_as_they_say(name):
    """And the mean over splits is 0 to its standard error: the estimates are unbiased.

    Of 1,000 splits, whose share is known to 0.7%; of 200 of the distance that takes longest.
    """
    data, splits = of_digits(6)[:300], SPLITS if name == "frechet_extrapolated" else 1000
    found = []
    for seed in range(splits):
        order = torch.from_numpy(stream(seed, 5).permutation(len(data)))
        found.append(DISTANCES[name](data[order[:150]], data[order[150:]]))
    held = np.mean([each.low <= 0 <= each.high for each in found])
    print(f"{name}: {held:.3f} of {splits} intervals hold 0")
    assert 0.93 <= held <= 0.97
    values = np.array([each.value for each in found])
    assert abs(values.mean()) < 4 * values.std(ddof=1) / splits**0.5


@pytest.mark.parametrize("name", DISTANCES)
def test_the_interval_of_sorted_sets_is_about_that_of_shuffled_ones(name):
    x, y = normal(400, 3, 1), normal(400, 3, 2, shift=0.5)
    straight = DISTANCES[name](x, y)
    ordered = DISTANCES[name](x[x[:, 0].argsort()], y[y[:, 0].argsort()])
    assert ordered.value == pytest.approx(straight.value, abs=straight.stderr)
    assert ordered.high - ordered.low == pytest.approx(straight.high - straight.low, rel=0.6)


def test_intervals_hold_a_distance_that_is_not_zero():
    """The energy distance of laws a standard deviation apart, in closed form as above."""
    sigma = math.sqrt(2)
    folded = sigma * math.sqrt(2 / math.pi) * math.exp(-1 / 4) + math.erf(1 / 2)
    exact = 2 * folded - 2 * sigma * math.sqrt(2 / math.pi)
    found = [distances.energy(normal(100, 1, seed, shift=1), normal(100, 1, 9000 + seed)) for seed in range(SPLITS)]
    held = np.mean([each.low <= exact <= each.high for each in found])
    assert CALIBRATED[0] <= held <= CALIBRATED[1]


@pytest.mark.parametrize("shift", [0.0, 0.3, 2.0, 10.0])
@pytest.mark.parametrize("B", [distances.FEW_BLOCKS, distances.BLOCKS])
def test_intervals_of_pairs_of_blocks_are_neither_too_narrow_nor_too_wide(B, shift):
    """Of f normal about a mean, theta its square, in 40 dimensions: 94% to 97% of 2000, where no other error enters.

    Where V_0 and V_1 are about as large (shift 2), what ten blocks tell of V_1 is little, and it may be 92%.
    """
    held = []
    for seed in range(2000):
        f = normal(B, 40, seed)
        f[:, 0] += shift
        found = intervals.of_pairs(f @ f.T)
        held.append(found.low <= shift**2 <= found.high)
    print(f"B={B} shift={shift}: {np.mean(held):.4f}")
    assert (0.92 if shift == 2 else 0.94) <= np.mean(held) <= 0.97


def test_student_and_the_binomial_interval_are_those_of_the_tables():
    for freedom in (8, 9, 19, 35, 170):
        assert intervals.student(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), abs=2e-3)
        assert intervals.student(freedom, 0.99) == pytest.approx(scipy.stats.t.ppf(0.995, freedom), abs=2e-3)
    for hits, n in [(0, 10), (3, 10), (10, 10), (480, 1000)]:
        exact = scipy.stats.binomtest(hits, n).proportion_ci(0.95, "exact")
        found = intervals.share(hits, n)
        assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=1e-9)


# Coverage


def test_neighbourhoods_are_their_definitions():
    x, y = normal(90, 3, 1, scale=1.3), normal(70, 3, 2)
    a, b, k = x.numpy(), y.numpy(), 3

    def reach(z):
        return [sorted(np.linalg.norm(z - each, axis=1))[k] for each in z]

    d = np.array([[np.linalg.norm(p - q) for q in b] for p in a])
    in_real, in_fake = d <= np.array(reach(b)), d <= np.array(reach(a))[:, None]
    found = coverage.neighbourhoods(x, y, k=k)
    assert found.precision.value == pytest.approx(in_real.any(1).mean(), rel=1e-12)
    assert found.recall.value == pytest.approx(in_fake.any(0).mean(), rel=1e-12)
    assert found.density.value == pytest.approx(in_real.sum(1).mean() / k, rel=1e-12)
    assert found.coverage.value == pytest.approx(in_real.any(0).mean(), rel=1e-12)


@pytest.mark.parametrize("D", [1, 6])
def test_density_and_coverage_of_one_law_are_in_expectation_what_ranks_make_them(D):
    """1, and 1 - prod (m - 1 - i) / (n + m - 1 - i), in any dimension; for 60 samples and 80 examples, k = 3."""
    found = [coverage.neighbourhoods(normal(60, D, 2 * s), normal(80, D, 2 * s + 1), k=3) for s in range(60)]
    for values, exact in (
        ([each.density.value for each in found], 1.0),
        ([each.coverage.value for each in found], coverage.expected_coverage(60, 80, 3)),
    ):
        assert abs(np.mean(values) - exact) < 4 * np.std(values, ddof=1) / 60**0.5


def shifted(seed):
    """Samples of a law beside the one of the data."""
    return normal(120, 4, 2 * seed, shift=0.5), normal(120, 4, 2 * seed + 1)


def wider(seed):
    """Samples that are too far apart, in many dimensions: nearly all of the data is within reach of one."""
    return normal(100, 16, 2 * seed, scale=1.15), normal(100, 16, 2 * seed + 1)


def lacking(seed):
    """Samples of three of five clusters."""
    found = []
    for i, kept in enumerate((3, 5)):
        label = torch.from_numpy(stream(seed, i).integers(0, kept, 150))
        found.append(normal(150, 5, 2 * seed + i) + 20 * torch.nn.functional.one_hot(label, 5))
    return tuple(found)


def digits_twice(seed):
    """Digits in the samples' place, in eight components."""
    rows = torch.from_numpy(stream(seed).permutation(len(DIGITS.train))[:240])
    return COMPONENTS[rows[:120]], COMPONENTS[rows[120:]]


COMPONENTS = of_digits(8)


@pytest.mark.parametrize("law", [shifted, wider, lacking, digits_twice])
def test_errors_of_neighbourhoods_are_the_spread_over_repeated_draws(law):
    """Of 100 draws, whose own spread is known to 7%; and intervals hold the mean as often as they say."""
    found = [coverage.neighbourhoods(*law(seed)) for seed in range(100)]
    for name in ("precision", "recall", "coverage", "density"):
        each = [getattr(one, name) for one in found]
        values = np.array([one.value for one in each])
        ratio = np.mean([one.stderr**2 for one in each]) ** 0.5 / values.std(ddof=1)
        held = np.mean([one.low <= values.mean() <= one.high for one in each])
        print(f"{law.__name__} {name}: {values.mean():.3f}, stderr / spread {ratio:.2f}, {held:.2f} hold the mean")
        assert 0.75 < ratio < 1.3
        assert held > 0.95 - 4 * 0.022
        assert name == "density" or all(0 <= one.low <= one.value <= one.high <= 1 for one in each)


def test_a_share_of_all_has_an_interval_of_the_width_that_its_number_bears():
    """Where all of 120 points are covered, the share may be 95% or 98%, and not 93%."""
    y = normal(120, 2, 0)
    found = coverage.neighbourhoods(y, y).coverage
    assert found.value == found.high == 1
    assert 0.95 < found.low < 0.98


def test_the_interval_of_a_share_is_wilsons():
    for hits, n in [(0, 10), (3, 10), (10, 10), (480, 1000)]:
        exact = scipy.stats.binomtest(hits, n).proportion_ci(0.95, "wilson")
        w = intervals.student(math.inf) ** 2 / n
        found = intervals.of_share(hits / n, 0.0, w)
        assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=1e-9)


def test_leaving_out_two_of_ten_classes_costs_their_shares():
    """Of ten clusters far apart: a fifth of the balance, and the coverage of examples of these two and no others."""
    label = torch.arange(1000) % 10
    y, x = (normal(1000, 3, seed) + 1e3 * label[:, None] for seed in (1, 2))
    kept = label < 8
    balance = coverage.class_balance(label[kept], label, classes=10, rng=stream(0))
    assert balance.value == pytest.approx(0.2)
    assert balance.low > 0.1
    assert coverage.class_balance(label, label, classes=10, rng=stream(0)).low == 0
    whole, less = coverage.neighbourhoods(x, y), coverage.neighbourhoods(x[kept], y)
    of_kept = coverage.neighbourhoods(x[kept], y[kept])
    assert whole.coverage.value == pytest.approx(coverage.expected_coverage(100, 100), abs=0.03)
    assert less.coverage.value == pytest.approx(0.8 * of_kept.coverage.value, rel=1e-9)
    assert less.precision.value == pytest.approx(of_kept.precision.value, rel=1e-9)


def test_the_balance_of_classes_of_equal_laws_holds_zero_as_often_as_it_says():
    rng = stream(1)
    weights = np.array([0.4, 0.3, 0.2, 0.1])
    drawn = [[torch.from_numpy(rng.choice(4, size=n, p=weights)) for n in (150, 200)] for _ in range(SPLITS)]
    held = np.mean([coverage.class_balance(p, q, classes=4, rng=rng).low == 0 for p, q in drawn])
    assert CALIBRATED[0] <= held <= CALIBRATED[1]


def test_the_vendi_score_is_the_exponential_of_the_entropy_of_the_kernel():
    x = normal(50, 4, 1, shift=0.5)
    unit = x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True)
    eigenvalues = np.linalg.eigvalsh(unit @ unit.T / 50)
    eigenvalues = eigenvalues[eigenvalues > 1e-12]
    expected = math.exp(-np.sum(eigenvalues * np.log(eigenvalues)))
    assert coverage.vendi(x).value == pytest.approx(expected, rel=1e-9)
    assert coverage.vendi(x[:1].repeat(30, 1)).value == pytest.approx(1, rel=1e-9)


def test_intervals_of_the_vendi_score_hold_its_mean():
    found = [coverage.vendi(normal(200, 4, seed, shift=0.5)) for seed in range(SPLITS)]
    mean = np.mean([each.value for each in found])
    assert CALIBRATED[0] <= np.mean([each.low <= mean <= each.high for each in found]) <= CALIBRATED[1]


# Copying


def memorised(n=200, share=1.0, D=4, noise=1e-3):
    """Training, held-out and sampled examples of one law, a share of the samples being training examples with noise."""
    training, held_out, x = (normal(n, D, seed) for seed in (1, 2, 3))
    k = round(share * n)
    return training, held_out, torch.cat([training[:k] + noise * normal(k, D, 4), x[k:]])


def test_a_memoriser_is_told_from_what_is_new():
    training, held_out, copies = memorised()
    new = memorised(share=0)[2]
    assert copying.data_copying(copies, training, held_out, rng=stream(0)).z < -10
    assert abs(copying.data_copying(new, training, held_out, rng=stream(0)).z) < 3
    assert copying.authenticity(copies, training).high < 0.05
    assert copying.authenticity(new, training).low > 0.3
    assert copying.neighbour_ratio(copies, training).high < 0.05
    assert copying.neighbour_ratio(new, training).low > 0.6
    assert copying.copied(copies, training, held_out).value == 1
    found = copying.copied(new, training, held_out)
    assert found.low < 0.5 < found.high


def test_training_examples_themselves_are_copies():
    """Also where they are the very same tensor."""
    training, held_out, _ = memorised()
    assert copying.copied(training, training, held_out).value == 1
    assert copying.authenticity(training, training).value == 0
    assert copying.neighbour_ratio(training, training).value == 0
    assert copying.suspects(training, training, k=3).distance.tolist() == [0, 0, 0]


def test_c_t_is_standard_normal_where_nothing_is_copied():
    """|z| is below 1.96 in 95% of 200 draws, in one cell and in four."""
    for cells in (1, 4):
        z = []
        for seed in range(SPLITS):
            training, held_out, x = (normal(80, 3, 3 * seed + i) for i in range(3))
            z.append(copying.data_copying(x, training, held_out, rng=stream(seed), cells=cells).z)
        assert CALIBRATED[0] <= np.mean(np.abs(z) < 1.96) <= CALIBRATED[1]
        assert abs(np.mean(z)) < 4 / SPLITS**0.5


def test_c_t_of_one_cell_is_the_rank_sum_statistic_with_its_correction_for_ties():
    training = torch.zeros(2, 1, dtype=torch.float64)
    x, held_out = (torch.from_numpy(stream(seed).integers(5, size=(60, 1))).double() for seed in (0, 1))
    found = copying.data_copying(x, training, held_out, rng=stream(0))
    test = scipy.stats.mannwhitneyu(x[:, 0], held_out[:, 0], method="asymptotic", use_continuity=False)
    assert math.erfc(abs(found.z) / math.sqrt(2)) == pytest.approx(test.pvalue, rel=1e-6)


def test_copies_in_one_region_are_seen_by_cells_though_another_is_too_far():
    """Two clusters: in one samples are copies, in the other they lie far outside, and the ranks cancel in one cell."""
    training, held_out, x = (normal(200, 2, seed) for seed in (1, 2, 3))
    apart = torch.tensor([[100.0, 0.0]], dtype=torch.float64) * (torch.arange(200) % 2)[:, None]
    x = torch.where(torch.arange(200)[:, None] % 2 == 1, 30 * x, training) + apart
    training, held_out = training + apart, held_out + apart
    assert abs(copying.data_copying(x, training, held_out, rng=stream(0)).z) < 3
    cell = x[:, 0] < 50
    assert copying.data_copying(x[cell], training, held_out, rng=stream(0), cells=2).C_T < -3


def test_one_percent_of_planted_copies_is_found_exactly():
    """10 training images among 1000 new ones, as bytes; with one level changed, as the nearest pairs."""
    train, new = DIGITS.train, DIGITS.held_out
    raw = torch.cat([new, new, new, new])[:1000].clone()
    raw[:, 0, 0, 0] += 1  # so that nothing new is by chance an example, and what is planted below has no such mark
    planted, from_train = torch.arange(10) * 97, torch.arange(10) * 31
    raw[planted] = train[from_train]
    found = copying.duplicates(raw, train)
    assert found.tolist() == torch.stack([planted, from_train], 1).tolist()
    raw[planted, 0, 4, 4] = (raw[planted, 0, 4, 4].int() - 1).abs().to(raw.dtype)
    assert len(copying.duplicates(raw, train)) == 0
    pairs = copying.suspects(raw.double().flatten(1), train.double().flatten(1), k=10)
    assert sorted(pairs.samples.tolist()) == planted.tolist()
    assert sorted(pairs.training.tolist()) == from_train.tolist()
    assert pairs.distance.tolist() == [1.0] * 10
    assert pairs.relative.max() < 0.2


def test_authenticity_of_one_percent_of_copies_falls_by_one_percent():
    training, _, some = memorised(n=1000, share=0.01)
    new = memorised(n=1000, share=0)[2]
    lost = copying.authenticity(new, training).value - copying.authenticity(some, training).value
    assert lost == pytest.approx(copying.authenticity(new[:10], training).value * 0.01)


def test_the_likelihood_gap_of_shifted_vectors_is_the_shift():
    a = normal(400, 1, 0)[:, 0]
    found = copying.likelihood_gap(a - 0.5, normal(300, 1, 1)[:, 0])
    assert found.low < 0.5 < found.high
    assert found.stderr == pytest.approx((1 / 400 + 1 / 300) ** 0.5, rel=0.1)


def test_distances_to_neighbours_are_exact_far_from_the_origin():
    """Where inner products lose all digits of a small difference."""
    x, y = normal(100, 3, 0), normal(100, 3, 1)
    near = neighbours.nearest(x, y)
    far = neighbours.nearest(x + 1e9, y + 1e9)
    assert far[1].tolist() == near[1].tolist()
    assert copying.neighbour_ratio(x + 1e9, x + 1e9).value == 0


# Tests of two samples


@pytest.mark.parametrize("kind", twosample.CLASSIFIERS)
def test_a_classifier_does_not_tell_halves_of_one_law_more_often_than_its_p_value_says(kind):
    found = [
        twosample.classifier(normal(60, 3, 2 * seed), normal(60, 3, 2 * seed + 1), rng=stream(seed), kind=kind)
        for seed in range(SPLITS)
    ]
    held = np.mean([each.statistic.low <= 1 / 2 <= each.statistic.high for each in found])
    assert held >= CALIBRATED[0]  # the exact interval is wider than 95% needs
    for level in (0.05, 0.2, 0.5):
        rejected = np.mean([each.p_value <= level for each in found])
        assert rejected <= level + 3 * (level * (1 - level) / SPLITS) ** 0.5


def test_the_accuracy_of_a_classifier_of_two_normal_laws_is_that_of_the_best_one():
    """Phi(|shift| / 2) for a shift of the mean; a change of scale is seen by neighbours and not by a line."""
    x = normal(2000, 2, 0)
    found = [
        twosample.classifier(normal(800, 2, 2 * s), normal(800, 2, 2 * s + 1, shift=1.0), rng=stream(s))
        for s in range(10)
    ]
    accuracy = np.mean([each.statistic.value for each in found])
    exact = scipy.stats.norm.cdf(math.sqrt(2) / 2)
    assert accuracy == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 8000) ** 0.5)
    assert max(each.p_value for each in found) < 1e-9
    wide = normal(2000, 2, 2, scale=4.0)
    assert twosample.classifier(x, wide, rng=stream(0), kind="knn").statistic.low > 0.7
    assert twosample.classifier(x, wide, rng=stream(0)).statistic.high < 0.6


def test_the_p_value_of_a_classifier_is_fishers():
    """Of a line through sets of 20 each: the table of what is told is 2 x 2."""
    x, y = normal(20, 1, 0), normal(20, 1, 1, shift=0.8)
    found = twosample.classifier(x, y, rng=stream(0))
    hits = round(found.statistic.value * 20)
    tables = [[[a, 10 - a], [b, 10 - b]] for a in range(11) for b in range(11) if a + 10 - b == hits]
    values = [scipy.stats.fisher_exact(table, alternative="greater").pvalue for table in tables]
    assert any(found.p_value == pytest.approx(value, rel=1e-9) for value in values)


def test_the_energy_test_is_uniform_for_one_law_and_small_for_two():
    p = [
        twosample.energy(normal(25, 3, 2 * s), normal(20, 3, 2 * s + 1), rng=stream(s), permutations=39).p_value
        for s in range(SPLITS)
    ]
    for level in (0.05, 0.2, 0.5):
        assert abs(np.mean(np.array(p) <= level + 1e-9) - level) < 3 * (level * (1 - level) / SPLITS) ** 0.5
    assert twosample.energy(normal(100, 3, 0), normal(100, 3, 1, shift=0.6), rng=stream(0)).p_value == 1 / 200


def test_the_energy_test_measures_the_distances_that_the_metric_does():
    """The p-value is that of measuring every division by itself."""
    x, y = normal(40, 2, 0), normal(30, 2, 1, shift=0.2)
    found = twosample.energy(x, y, rng=stream(3), permutations=99)
    assert found.statistic == distances.energy(x, y)
    pooled, E = torch.cat([x, y]), found.statistic.value
    rng = stream(3)
    others = []
    for _ in range(99):
        of_x = torch.zeros(70, dtype=torch.bool)
        of_x[torch.from_numpy(rng.permutation(70)[:40])] = True
        others.append(distances.energy(pooled[of_x], pooled[~of_x]).value)
    assert found.p_value == (1 + sum(other >= E for other in others)) / 100


# Refused


def test_sets_that_cannot_be_compared_are_refused_in_a_sentence():
    with pytest.raises(OptionError, match=r"\(m, D\)"):
        distances.energy(normal(50, 3, 0), normal(50, 4, 0))
    with pytest.raises(OptionError, match="20 of each"):
        distances.kid(normal(19, 3, 0), normal(50, 3, 0))
    with pytest.raises(OptionError, match="twice as many"):
        distances.frechet_extrapolated(normal(50, 30, 0), normal(50, 30, 0))
    with pytest.raises(OptionError, match="positive"):
        distances.mmd(normal(50, 3, 0), normal(50, 3, 0), width=0.0)
