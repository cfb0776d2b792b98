"""Writes tests/data/calibration: overconfident long-tailed logits, and what other packages compute from them.

    python tests/oracle/make_calibration.py    # needs torch, numpy, scipy, safetensors, scikit-learn >= 1.7, netcal,
                                               # uncertainty-calibration, crepes, mapie >= 1 and torchcp

Every figure comes from the float32 logits taken to float64, by the package named where it is computed, and is checked
against plain numpy before it is written.
"""

import json
import math
from importlib.metadata import version
from pathlib import Path

import calibration  # uncertainty-calibration
import numpy as np
import torch
from crepes import ConformalClassifier
from crepes.extras import hinge
from mapie.classification import SplitConformalClassifier
from mapie.conformity_scores import LACConformityScore
from netcal.metrics import ECE
from netcal.scaling import LogisticCalibration, TemperatureScaling
from safetensors.numpy import save_file
from scipy.optimize import minimize_scalar
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss
from torchcp.classification.predictor import SplitPredictor
from torchcp.classification.score import LAC

OUT = Path(__file__).parents[1] / "data" / "calibration"
PACKAGES = "numpy scipy torch scikit-learn netcal uncertainty-calibration crepes mapie torchcp".split()
CLASSES, ROWS, BINS = 10, 1500, 15
ALPHAS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5]


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    logits, y = draw()
    save_file({"logits": logits, "labels": y}, OUT / "logits.safetensors")
    z = logits.astype(np.float64)
    expected = {
        "versions": {name: version(name) for name in PACKAGES},
        "softmax": measure(softmax(z), y),
        **temperature(z, y),
        "conformal": conformal(z, y),
    }
    expected |= vector_scaling(z, y, 1 / expected["temperature"])
    # Before scaling every bin is overconfident, which makes ECE the same over any bins; after it the signs are mixed.
    scaled = measure(softmax(z / expected["temperature"]), y)
    assert abs(scaled["ece"] - scaled["ece_equal_mass"]) > 1e-3
    expected["softmax_at_temperature"] = scaled
    (OUT / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    show(expected, y)


def draw():
    random = np.random.default_rng(7)
    log_prior = np.log(0.62 ** np.arange(CLASSES))
    scores = log_prior + 1.8 * random.standard_normal((ROWS, CLASSES))
    # The largest of scores + Gumbel noise is a draw from softmax(scores).
    y = (scores + random.gumbel(size=scores.shape)).argmax(1)
    logits = random.uniform(1.5, 2.6, CLASSES) * scores + random.uniform(-0.8, 0.8, CLASSES)
    assert np.bincount(y, minlength=CLASSES).min() >= 12
    return logits.astype(np.float32), y.astype(np.int64)


def softmax(z):
    p = np.exp(z - z.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def nll(z, y):
    top = z.max(1)
    return np.mean(np.log(np.exp(z - top[:, None]).sum(1)) + top - z[np.arange(len(y)), y])


def binned(score, hit, bin):
    """Σ_b |Σ_{i in b} (score_i − hit_i)| / N."""
    return np.abs(np.bincount(bin, score - hit)).sum() / len(score)


def same(value, others, within=1e-12):
    for other in others:
        assert abs(value - other) <= within, (value, other)
    return float(value)


def measure(p, y):
    rows, classes = np.arange(len(y)), np.arange(CLASSES)
    one_hot = (y[:, None] == classes).astype(np.float64)
    confidence, hit = p.max(1), (p.argmax(1) == y).astype(np.float64)
    # Packages differ in which bin an edge belongs to (netcal: above; the others: below), so no score may lie on one.
    assert np.abs(p * BINS - np.rint(p * BINS))[p > 0.5 / BINS].min() > 1e-7
    assert p.min() > 1e-14 and p.max() < 1  # Nothing is clipped, and no score equals 0 or 1.
    assert np.diff(np.sort(confidence)).min() > 0
    place = np.empty(len(y), int)
    place[confidence.argsort()] = rows
    of = lambda score: (score * BINS).astype(int)
    classwise = []
    for k in classes:
        # netcal takes one column and 0/1 labels for the positive class of two.
        value = ECE(BINS).measure(p[:, k], y == k)
        frequency, mean = calibration_curve(y == k, p[:, k], n_bins=BINS)
        counts = np.histogram(p[:, k], BINS, (0, 1))[0]
        by_sklearn = (np.abs(frequency - mean) * counts[counts > 0]).sum() / len(y)
        by_uncertainty_calibration = calibration.get_ece(p[:, k], (y == k).astype(int), num_bins=BINS)
        ours = binned(p[:, k], one_hot[:, k], of(p[:, k]))
        classwise.append(same(value, [by_sklearn, by_uncertainty_calibration, ours]))
    # Not halved: the sum over classes.
    brier = brier_score_loss(y, p, labels=classes, scale_by_half=False)
    ours = binned(confidence, hit, of(confidence))
    # uncertainty-calibration's bins end halfway between neighbours. netcal's ACE is the plain mean over bins of equal
    # width, so its ECE over quantiles is the one to compare with; at 100 rows a bin both hold the same rows.
    equal_mass = calibration.get_ece_em(p, y, num_bins=BINS)
    by_netcal = ECE(BINS, equal_intervals=False).measure(p, y)
    return {
        "nll": same(log_loss(y, p, labels=classes), [nll(np.log(p), y)]),
        "brier": same(brier, [((p - one_hot) ** 2).sum(1).mean()]),
        "ece": same(ECE(BINS).measure(p, y), [ours]),
        # Without debiasing and with p = 1 this is Guo et al.'s definition too.
        "ece_uncertainty_calibration": same(calibration.get_ece(p, y, num_bins=BINS), [ours]),
        "ece_equal_mass": same(equal_mass, [by_netcal, binned(confidence, hit, place * BINS // len(y))]),
        "classwise_ece": classwise,
    }


def temperature(z, y):
    p = softmax(z)
    scaling = TemperatureScaling()
    scaling.fit(p, y)
    # netcal keeps the factor of log p, which is 1/T: log p and z differ by a constant of the row only. It descends by
    # finite differences.
    factor = float(scaling.temperature[0])
    own = minimize_scalar(lambda t: nll(z / t, y), bounds=(0.05, 20), method="bounded", options={"xatol": 1e-10}).x
    assert 0.4 < factor < 0.6
    return {
        "temperature": same(1 / factor, [own], 1e-3),
        "temperature_scipy": float(own),
        "nll_at_temperature": same(log_loss(y, scaling.transform(p)), [nll(z * factor, y)]),
    }


def vector_scaling(z, y, inverse_temperature):
    """softmax(a ⊙ z + b), by torch's LBFGS to the optimum and by netcal to where its finite differences end."""
    a = torch.ones(CLASSES, dtype=torch.float64, requires_grad=True)
    b = torch.zeros(CLASSES, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [a, b], max_iter=2000, tolerance_grad=1e-10, tolerance_change=0, history_size=50, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(a * torch.from_numpy(z) + b, torch.from_numpy(y))
        value.backward()
        return value

    optimizer.step(loss)
    value = loss().item()
    assert max(a.grad.abs().max(), b.grad.abs().max()) < 1e-7
    a, b = a.detach().numpy(), b.detach().numpy()
    b = b - b.mean()
    assert np.abs(b).max() < 1.5
    for centre in (a.mean(), inverse_temperature):
        assert 0.4 < (a / centre).min() and (a / centre).max() < 2.5
    # netcal scales the log of what it is given. The log of probabilities is z less a constant of the row, which a_k
    # would scale by class: another model. So it is given exp((z − c)/4), c being one constant for all rows: its log is
    # z up to what a and b absorb, and the 4 keeps it above the epsilon that netcal clips at.
    x = np.exp((z - z.max()) / 4)
    assert x.min() > 1e-15
    by_netcal = LogisticCalibration()
    by_netcal.fit(x, y)
    reached = log_loss(y, by_netcal.transform(x))
    assert value - 1e-10 < reached < value + 1e-4
    return {
        "vector_scaling_nll": same(value, [nll(a * z + b, y)]),
        "vector_scaling_nll_netcal": float(reached),
        "vector_scaling_a": a.tolist(),
        "vector_scaling_b": b.tolist(),
    }


class Softmax(ClassifierMixin, BaseEstimator):
    """Takes logits for features, for mapie."""

    def fit(self, z, y):
        self.classes_ = np.arange(CLASSES)
        return self

    def predict_proba(self, z):
        return softmax(z)

    def predict(self, z):
        return z.argmax(1)


def conformal(z, y):
    p = softmax(z)
    own = np.sort(1 - p[np.arange(len(y)), y])
    assert np.diff(own).min() > 1e-9
    # torchcp's calibrate() would go through float32; what it calls then does not.
    torchcp = SplitPredictor(LAC(score_type="softmax"))
    lac = LACConformityScore()
    mapie = SplitConformalClassifier(Softmax().fit(z, y), [1 - a for a in ALPHAS], lac, prefit=True)
    mapie_sets = mapie.conformalize(z, y).predict_set(z)[1]
    crepes = ConformalClassifier().fit(hinge(p, np.arange(CLASSES), y))
    p_values, all_p_values = crepes.predict_p(own, smoothing=False), crepes.predict_p(hinge(p), smoothing=False)
    rows = []
    for i, alpha in enumerate(ALPHAS):
        # A whole rank would be at the mercy of rounding.
        rank = (len(y) + 1) * (1 - alpha)
        assert abs(rank - round(rank)) > 1e-6
        threshold = own[math.ceil(rank) - 1]
        torchcp.calculate_threshold(torch.from_numpy(z), torch.from_numpy(y), alpha)
        rows.append({
            "alpha": alpha,
            "torchcp": same(torchcp.q_hat.item(), [threshold]),
            "mapie": same(lac.quantiles_[i], [threshold]),
            # crepes has no threshold: the largest of the scores that are still inside the set (p-value > α).
            "crepes": same(own[p_values > alpha].max(), [threshold]),
        })
        # The sets themselves. mapie lets a score exceed the threshold by 1e-8.
        inside = 1 - p <= threshold + 1e-12
        assert (torchcp.predict_with_logits(torch.from_numpy(z), torchcp.q_hat + 1e-12).bool().numpy() == inside).all()
        assert (mapie_sets[:, :, i] == (1 - p <= threshold + 1e-8)).all()
        assert ((all_p_values > alpha) == inside).all()
    return rows


def show(expected, y):
    print("rows per class", *np.bincount(y), "\n")
    for title in ("softmax", "softmax_at_temperature", None):
        print(title or "fits")
        for name, value in (expected[title] if title else expected).items():
            if isinstance(value, float):
                print(f"  {name:28} {value:.9f}")
            elif isinstance(value, list) and isinstance(value[0], float):
                print(f"  {name:28}", *(f"{v:.4f}" for v in value))
    print("\nalpha  torchcp      mapie        crepes")
    for row in expected["conformal"]:
        print(f"{row['alpha']:<6} {row['torchcp']:.9f}  {row['mapie']:.9f}  {row['crepes']:.9f}")


if __name__ == "__main__":
    main()
