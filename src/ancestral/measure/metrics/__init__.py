"""How near samples are to data, how much of it they reach, and whether they copy: pure functions of features.

    distances   Fréchet, kernel, energy and sliced Wasserstein distances, 0 in expectation for equal laws
    coverage    precision, recall, density, coverage, the Vendi score and the balance of classes
    copying     nearest neighbours, duplicates, authenticity and C_T
    twosample   tests of whether two sets are of one law

Features are float64, one example a row; what does not fit in memory at once is worked on by rows.
"""

from ancestral.measure.metrics import copying, coverage, distances, intervals, neighbours, twosample

__all__ = ["copying", "coverage", "distances", "intervals", "neighbours", "twosample"]
