"""CKNNA by its mathematics: an independent dense oracle, invariances, chance level, ties and bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist, squareform
from scipy.stats import spearmanr
from sklearn.cross_decomposition import CCA
from sklearn.decomposition import PCA
from torch import Tensor

from workbench.errors import DataError, UnknownNameError
from workbench.metrics import METRICS, alignment_matrix, cka, cknna, mutual_knn, nearest_neighbors, rsa, svcca
from workbench.metrics.geometry import joint_pca_rgb
from workbench.stats import null_scores, permutation_null, permutations


def dense_cknna(x: Tensor, y: Tensor, k: int) -> float:
    """The definition with n x n matrices and loops over nothing clever, float64."""
    n = len(x)
    kernels = [u @ u.T for u in (v.double() / v.double().norm(dim=1, keepdim=True) for v in (x, y))]
    masks = []
    for kernel in kernels:
        others = kernel - 10 * torch.eye(n, dtype=torch.float64)
        mask = torch.zeros(n, n, dtype=torch.float64)
        mask[torch.arange(n)[:, None], others.sort(dim=1, descending=True, stable=True).indices[:, :k]] = 1
        masks.append(mask)

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        ones = torch.ones(n, dtype=torch.float64)
        return (torch.trace(a @ b) + (ones @ a @ ones) * (ones @ b @ ones) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (ones @ a @ b @ ones)) / (n * (n - 3))

    both = masks[0] * masks[1]
    own = [hsic(m * kernel, m * kernel) for m, kernel in zip(masks, kernels, strict=True)]
    return float(hsic(both * kernels[0], both * kernels[1]) / torch.sqrt(own[0] * own[1]))


def pair(n: int, d: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x, x + noise * torch.randn(n, d, generator=generator, dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(st.integers(5, 60), st.integers(1, 20), st.integers(1, 12), st.integers(0, 10_000))
def test_equals_the_dense_definition(n: int, d: int, k: int, seed: int) -> None:
    x, y = pair(n, d, 1.0, seed)
    k = min(k, n - 1)
    try:
        ours = cknna(x, y, k=k)
    except DataError as error:
        assert "not positive" in str(error)
        return
    assert ours == pytest.approx(dense_cknna(x, y, k), abs=1e-9)


def test_chunks_and_batches_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = pair(300, 16, 1.0)
    whole = cknna(x, y, k=7)
    metric = METRICS.get("cknna")
    first, second = torch.stack([x, y]), torch.stack([y, y])
    batch = metric.score(metric.prepare(first, 7, "x"), metric.prepare(second, 7, "y"))
    monkeypatch.setattr("workbench.metrics.neighbors.CHUNK_BYTES", 300 * 8 * 13)
    for tile in (1, 5, 64, 299, 300):
        monkeypatch.setattr("workbench.metrics.neighbors.TILE", tile)
        assert cknna(x, y, k=7) == pytest.approx(whole, abs=1e-12)
    assert batch[0].item() == pytest.approx(whole, abs=1e-12) and batch[1].item() == pytest.approx(1)
    assert metric.score(metric.prepare(first, 7, "x"), metric.prepare(second, 7, "y"))[0] == pytest.approx(whole)


def test_invariant_to_rotation_scale_and_order_and_to_nothing_more() -> None:
    x, y = pair(200, 12, 0.8)
    rotation = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    order = torch.randperm(200, generator=torch.Generator().manual_seed(2))
    score = cknna(x, y)
    assert cknna(x @ rotation, 7e5 * y) == pytest.approx(score, abs=1e-9)
    assert cknna(x[order], y[order]) == pytest.approx(score, abs=1e-9)
    assert cknna(x * torch.logspace(-2, 2, 200, dtype=torch.float64)[:, None], y) == pytest.approx(score, abs=1e-9)
    assert cknna(x, x @ rotation) == pytest.approx(1, abs=1e-9)
    stretched = x * torch.linspace(0.1, 3, 12, dtype=torch.float64)
    assert cknna(x, stretched) < 0.95
    assert cknna(x, y[order]) < score / 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_float_dtype_and_numpy(dtype: torch.dtype) -> None:
    x, y = pair(100, 64, 0.5)
    low = cknna(x.to(dtype), y.to(dtype))
    assert low == pytest.approx(cknna(x.to(dtype).double(), y.to(dtype).double()), abs=1e-3)
    assert cknna(x.numpy().astype(np.float32), y.numpy()) == pytest.approx(cknna(x, y), abs=1e-3)
    assert cknna(x.float() * 1e-30, y.float() * 1e30) == pytest.approx(cknna(x.float(), y.float()), abs=1e-4)


@pytest.mark.parametrize("tile", [1, 2, 3, 4, 7, 1024])
def test_ties_go_to_the_lower_row(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.metrics.neighbors.TILE", tile)
    x = torch.tensor([[1.0, 0], [1, 0], [1, 0], [1, 0], [0, 1], [0, 1]])
    assert nearest_neighbors(x, 2).index.tolist() == [[1, 2], [0, 2], [0, 1], [0, 1], [0, 5], [0, 4]]
    doubled = torch.cat([pair(50, 8, 0)[0]] * 2)
    assert cknna(doubled, doubled, k=5) == pytest.approx(1)
    assert cknna(doubled, doubled, k=5) == pytest.approx(dense_cknna(doubled, doubled, 5))


@pytest.mark.parametrize("name", list(METRICS))
def test_the_parts_of_a_metric_in_batches_and_permuted_equal_single_calls(name: str) -> None:
    """What the analysis computes from prepared parts, against the function on rows that really are permuted."""
    metric = METRICS.get(name)
    problems = [pair(40, 12, 0.5, seed) for seed in range(3)]
    option, given = {"k": (6, {"k": 6}), "dim": (4, {"dim": 4})}.get(metric.option, (0, {}))
    x, y = (metric.prepare(torch.stack(side), option, "x") for side in zip(*problems, strict=True))
    orders = torch.stack([permutations(40, 2, [seed]) for seed in range(3)], dim=1)
    nulls = null_scores(metric, [x, y], y, orders)
    assert nulls.shape == (2, 2, 3) and [sorted(order) == list(range(40)) for order in orders[:, 0].tolist()] == [True, True]
    for number, (a, b) in enumerate(problems):
        assert metric.score(x, y)[number].item() == pytest.approx(metric(a, b, **given), abs=1e-9)
        for draw in range(2):
            moved = b[orders[draw, number]]
            assert nulls[draw, :, number] == pytest.approx([metric(a, moved, **given), metric(b, moved, **given)], abs=1e-9)


def test_independent_features_fall_inside_their_null_and_related_ones_outside() -> None:
    x, y = pair(150, 32, 0.7)
    other = pair(150, 32, 0, seed=5)[0]
    assert permutation_null(cknna, x, other, n=60).p > 0.05
    related = permutation_null(cknna, x, y, n=60)
    assert related.p == pytest.approx(1 / 61) and related.mean < related.q95 < cknna(x, y) / 2


def test_null_by_renumbering_agrees_with_the_plain_one() -> None:
    x, y = pair(100, 16, 1.0)
    fast = permutation_null(cknna, x, y, n=200, seed=1)
    plain = permutation_null(lambda a, b: cknna(a, b), x, y, n=200, seed=2)
    assert fast.mean == pytest.approx(plain.mean, abs=0.01) and fast.q95 == pytest.approx(plain.q95, abs=0.02)


def test_matrix_equals_single_calls() -> None:
    x, y = pair(90, 8, 0.5)
    table = alignment_matrix({"layer 1": x, "layer 2": y}, {"vfm": y}, k=9)
    assert table.loc["layer 1", "vfm"] == pytest.approx(cknna(x, y, k=9)) and table.loc["layer 2", "vfm"] == pytest.approx(1)
    with pytest.raises(UnknownNameError, match="did you mean 'cknna'"):
        alignment_matrix({"a": x}, {"b": y}, metric="cknn")
    with pytest.raises(DataError, match="'a' has 90 rows and 'b' has 89"):
        alignment_matrix({"a": x}, {"b": y[:-1]})


def rotated(x: Tensor) -> Tensor:
    return x @ torch.linalg.qr(torch.randn(x.shape[1], x.shape[1], dtype=x.dtype, generator=torch.Generator().manual_seed(9))).Q


@pytest.mark.parametrize("name", list(METRICS))
def test_every_metric_has_its_invariances_and_its_chance_level(name: str) -> None:
    """1 for itself, unmoved by rotation, scale and common order, moved by noise, and in its null where nothing is shared."""
    metric = METRICS.get(name)
    x, y = pair(120, 16, 0.8)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(2))
    score = metric(x, y)
    assert metric(x, x) == pytest.approx(1, abs=1e-9) and metric(x, 3 * rotated(x)) == pytest.approx(1, abs=1e-6)
    assert metric(rotated(x), 50 * y) == pytest.approx(score, abs=1e-6) and metric(y, x) == pytest.approx(score, abs=5e-3 if name == "cknna" else 1e-9)
    assert metric(x[order], y[order]) == pytest.approx(score, abs=1e-9)
    null = permutation_null(metric, x, y, n=60)
    assert null.p == pytest.approx(1 / 61) and null.q95 < score < 1
    assert permutation_null(metric, x, pair(120, 16, 0, seed=5)[0], n=60).p > 0.02
    for wrong, message in ((x[:-1], "120 rows and y has 119"), (bad(y, 3, float("nan")), "not finite in row 3")):
        with pytest.raises(DataError, match=message):
            metric(x, wrong)
    table = alignment_matrix({"a": x, "b": y}, {"c": y}, metric=name)
    assert table.loc["a", "c"] == pytest.approx(score) and table.loc["b", "c"] == pytest.approx(1)


def test_unbiased_cka_equals_its_definition_and_is_zero_by_chance() -> None:
    x, y = pair(40, 6, 1.0)

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        k, m = (v @ v.T * (1 - torch.eye(40, dtype=torch.float64)) for v in (a, b))
        ones = torch.ones(40, dtype=torch.float64)
        return (torch.trace(k @ m) + (ones @ k @ ones) * (ones @ m @ ones) / (39 * 38) - 2 / 38 * (ones @ k @ m @ ones)) / (40 * 37)

    assert cka(x, y) == pytest.approx(float(hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()))
    assert cka(x + 7, y - 3) == pytest.approx(cka(x, y))
    centred = [v - v.mean(0) for v in (x, y)]
    kernels = [v @ v.T for v in centred]
    assert cka(x, y, unbiased=False) == pytest.approx(float((kernels[0] * kernels[1]).sum() / (kernels[0].norm() * kernels[1].norm())))
    independent = [cka(pair(40, 60, 0, seed=s)[0], pair(40, 60, 0, seed=s + 500)[0]) for s in range(60)]
    assert abs(np.mean(independent)) < 0.02
    assert np.mean([cka(pair(40, 60, 0, seed=s)[0], pair(40, 60, 0, seed=s + 500)[0], unbiased=False) for s in range(10)]) > 0.5


def test_mutual_knn_svcca_and_rsa_against_plain_code() -> None:
    x, y = pair(50, 8, 0.7)
    near = [np.argsort(-(v / v.norm(dim=1, keepdim=True) @ (v / v.norm(dim=1, keepdim=True)).T - 10 * torch.eye(50)).numpy(), axis=1)[:, :5] for v in (x, y)]
    assert mutual_knn(x, y, k=5) == pytest.approx(np.mean([len(set(a) & set(b)) / 5 for a, b in zip(*near, strict=True)]))
    shuffled = [mutual_knn(x, y[torch.randperm(50, generator=torch.Generator().manual_seed(s))], k=5) for s in range(80)]
    assert np.mean(shuffled) == pytest.approx(5 / 49, abs=0.02)
    linear = x @ torch.diag(torch.linspace(1, 2, 8, dtype=torch.float64))
    assert svcca(x, linear, dim=8) == pytest.approx(1)
    reduced = [PCA(3).fit_transform(v.numpy()) for v in (x, y)]
    canonical = CCA(3, scale=False, max_iter=5000, tol=1e-12).fit(*reduced)
    correlations = [np.corrcoef(a, b)[0, 1] for a, b in zip(*(side.T for side in canonical.transform(*reduced)), strict=True)]
    assert svcca(x, y, dim=3) == pytest.approx(np.mean(correlations), abs=1e-3)
    with pytest.raises(DataError, match="dim is 9: expected 1 to 8, the independent directions of x"):
        svcca(x, y, dim=9)
    distances = [squareform(pdist(v.numpy(), "cosine"))[np.triu_indices(50, 1)] for v in (x, y)]
    assert rsa(x, y) == pytest.approx(spearmanr(*distances).statistic)


@pytest.mark.parametrize("name", ["cka", "svcca", "rsa"])  # neighbours are defined even then, by row number
def test_rows_that_are_all_alike_have_no_score(name: str) -> None:
    """Rounding must not turn them into one."""
    alike = torch.rand(1, 5, generator=torch.Generator().manual_seed(0)).expand(30, 5)
    with pytest.raises(DataError, match=r"undefined|expected 1 to 0"):
        METRICS.get(name)(alike, pair(30, 5, 0)[0].float())


def bad(x: Tensor, row: int, value: float) -> Tensor:
    changed = x.clone()
    changed[row] = value
    return changed


X = pair(30, 4, 0)[0]


@pytest.mark.parametrize(
    ("x", "y", "k", "message"),
    [
        (X, X[:-1], 5, "x has 30 rows and y has 29"),
        (X, X, 30, "k is 30 with 30 rows of x: expected 1 <= k < n"),
        (X, X, 0, "k is 0"),
        (X[:3], X[:3], 1, "3 rows: expected at least 4"),
        (bad(X, 7, float("nan")), X, 5, "x has a value that is not finite in row 7"),
        (X, bad(X, 3, float("inf")), 5, "y has a value that is not finite in row 3"),
        (X, bad(X, 9, 0.0), 5, "row 9 of y is all zeros"),
        (X[:, 0], X[:, 0], 5, r"x has shape \(30,\)"),
    ],
)
def test_bad_input_is_one_sentence(x: Tensor, y: Tensor, k: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        cknna(x, y, k=k)


def test_joint_pca_has_one_basis_and_fixed_signs() -> None:
    x = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0))
    first, second = joint_pca_rgb([x, x])
    assert np.array_equal(first, second) and first.shape == (2, 30, 3) and first.min() >= 0 and first.max() <= 1
    assert np.allclose(joint_pca_rgb([100 * x])[0], joint_pca_rgb([x])[0])
