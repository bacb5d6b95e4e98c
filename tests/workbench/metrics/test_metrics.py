"""CKNNA by its mathematics: an independent dense oracle, invariances, chance level, ties and bad input."""

from __future__ import annotations

from typing import Any

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
from torch.overrides import TorchFunctionMode

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
        return (
            torch.trace(a @ b)
            + (ones @ a @ ones) * (ones @ b @ ones) / ((n - 1) * (n - 2))
            - 2 / (n - 2) * (ones @ a @ b @ ones)
        ) / (n * (n - 3))

    both = masks[0] * masks[1]
    own = [hsic(m * kernel, m * kernel) for m, kernel in zip(masks, kernels, strict=True)]
    return float(hsic(both * kernels[0], both * kernels[1]) / torch.sqrt(own[0] * own[1]))


def pair(n: int, d: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x, x + noise * torch.randn(n, d, generator=generator, dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(st.integers(5, 60), st.integers(2, 20), st.integers(1, 12), st.integers(0, 10_000))  # d = 1 has nothing but ties
def test_equals_the_dense_definition(n: int, d: int, k: int, seed: int) -> None:
    x, y = pair(n, d, 1.0, seed)
    k = min(k, n - 1)
    try:
        ours = cknna(x, y, k=k)
    except DataError as error:
        assert "not positive" in str(error)
        return
    assert ours == pytest.approx(dense_cknna(x, y, k), abs=1e-9)


@pytest.mark.slow
def test_chunks_and_batches_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = pair(300, 16, 1.0)
    whole = cknna(x, y, k=7)
    metric = METRICS.get("cknna")
    first, second = torch.stack([x, y]), torch.stack([y, y])
    batch = metric.score(metric.prepare(first, 7, "x", 0), metric.prepare(second, 7, "y", 1))
    monkeypatch.setattr("workbench.metrics.neighbors.CHUNK_BYTES", 300 * 8 * 13)
    for tile in (1, 5, 64, 299, 300):
        monkeypatch.setattr("workbench.metrics.neighbors.MAX_BLOCK", tile)
        assert cknna(x, y, k=7) == pytest.approx(whole, abs=1e-12)
    assert batch[0].item() == pytest.approx(whole, abs=1e-12)
    assert batch[1].item() == pytest.approx(1)
    assert metric.score(metric.prepare(first, 7, "x", 0), metric.prepare(second, 7, "y", 1))[0] == pytest.approx(whole)


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


@pytest.mark.slow
@pytest.mark.parametrize("tile", [1, 2, 3, 7, 1024])
def test_neighbors_do_not_depend_on_tiles_and_ties_are_broken_among_the_tied(
    tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workbench.metrics.neighbors.MAX_BLOCK", tile)
    x = torch.tensor([[1.0, 0], [1, 0], [1, 0], [1, 0], [0, 1], [0, 1]])
    near = nearest_neighbors(x, 2)
    assert near.index[:4].max() < 4
    assert all(row not in near.index[row] for row in range(6))
    assert near.kernel[:4].tolist() == [[1, 1]] * 4
    assert near.index[4:, 1].tolist() == [5, 4]
    assert near.index[4:, 0].max() < 4
    assert torch.equal(near.index, nearest_neighbors(torch.stack([x, x]), 2).index[1])
    # the same rows in batches, as the problems of many images are searched, and of both dtypes
    many = torch.stack([tied(64, 24, seed)[0] for seed in range(4)])
    for dtype in (torch.float32, torch.float64):
        batch = nearest_neighbors(many.to(dtype), 5, side=1)
        for number, rows in enumerate(many):
            alone = nearest_neighbors(rows.to(dtype), 5, side=1)
            assert torch.equal(batch.index[number], alone.index)
            assert torch.allclose(batch.kernel[number], alone.kernel, atol=1e-6)


def tied(n: int, m: int, seed: int, d: tuple[int, int] = (32, 24)) -> tuple[Tensor, Tensor]:
    """Two unrelated representations with the same m rows equal."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, width, generator=generator, dtype=torch.float64) for width in d)
    same = torch.randperm(n, generator=generator)[:m]
    x[same], y[same] = x[same[0]].clone(), y[same[0]].clone()
    return x, y


@pytest.mark.parametrize("name", ["cknna", "mutual_knn"])
@pytest.mark.parametrize("m", [32, 128, 224])
def test_equal_rows_on_both_sides_agree_as_often_as_by_chance(name: str, m: int) -> None:
    """A white page, a padded bar: what jittered rows give on average, the same for reordered rows; 1.0 where ties went
    to the lower row."""
    metric, values, jittered = METRICS.get(name), [], []
    for seed in range(8):
        x, y = tied(256, m, seed)
        values.append(metric(x, y))
        generator = torch.Generator().manual_seed(seed + 100)
        jittered += [
            metric(*(v + 1e-4 * torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in (x, y)))
            for _ in range(4)
        ]
        order = torch.randperm(256, generator=generator)
        assert metric(x[order], y[order]) == pytest.approx(values[-1], abs=1e-9)
        assert metric(x.float(), 3 * y.float()) == pytest.approx(values[-1], abs=1e-6)
    assert np.mean(values) == pytest.approx(np.mean(jittered), abs=0.012)
    table = alignment_matrix({"x": x}, {"y": y}, metric=name)
    assert table.loc["x", "y"] == pytest.approx(values[-1], abs=1e-12)
    both = metric.prepare(torch.stack([x, x]), 10, "x", 0), metric.prepare(torch.stack([y, y]), 10, "y", 1)
    assert metric.score(*both).tolist() == pytest.approx([values[-1]] * 2, abs=1e-12)
    assert metric(x, x) < 0.9  # breaking ties at random does not agree with itself


def parallel(n: int, spread: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two related representations whose rows differ by `spread` of their length."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(n, 16, generator=generator, dtype=torch.float64)
    sides = [
        torch.cat([shared, torch.randn(n, width, generator=generator, dtype=torch.float64)], 1) for width in (48, 32)
    ]
    return tuple((5 + 5 * spread * side).to(dtype) for side in sides)  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["cknna", "mutual_knn", "rsa"])
@pytest.mark.parametrize("spread", [0.1, 1e-2, 1e-3, 1e-4])
def test_nearly_parallel_rows_are_compared_in_float64(name: str, spread: float) -> None:
    """Cosines of 1 - 1e-5 and closer, which float32 products cannot rank; the same in a batch beside rows that are not
    parallel."""
    metric, (x, y) = METRICS.get(name), parallel(200, spread, torch.float32)
    exact = metric(x.double(), y.double())
    assert metric(x, y) == pytest.approx(exact, abs=1e-6)
    assert exact == pytest.approx(metric(*parallel(200, spread, torch.float64)), abs=0.01)
    assert exact > 0.05
    option = 10 if metric.option else 0
    free = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    sides = (
        metric.prepare(torch.stack([free, x]), option, "x", 0),
        metric.prepare(torch.stack([free[:, :48], y]), option, "y", 1),
    )
    assert metric.score(*sides)[1].item() == pytest.approx(metric(x, y), abs=1e-9)
    assert metric.score(*sides)[0].item() == pytest.approx(metric(free, free[:, :48]), abs=1e-6)


@pytest.mark.parametrize("name", list(METRICS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_that_differ_by_rounding_alone_are_refused(name: str, dtype: torch.dtype) -> None:
    metric, free = METRICS.get(name), pair(60, 24, 0)[0].to(dtype)
    base = torch.randn(1, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    other = torch.randn(1, 16, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for x, y in ((base, other), (base * torch.linspace(1, 2, 60)[:, None].double(), other)):
        x, y = x.expand(60, -1).to(dtype), y.expand(60, -1).to(dtype)
        if len({tuple(row) for row in x.tolist()}) > 1 and (name in ("cka", "svcca") or dtype == torch.bfloat16):
            continue  # lengths that differ are something to compare there, and bfloat16 rounds them into directions
        for left, right in ((x, y), (x, free), (free, y)):
            with pytest.raises(DataError, match=r"point the same way up to rounding|undefined|expected 1 to 0"):
                metric(left, right)
    if dtype == torch.float32 and name in ("cknna", "mutual_knn", "rsa"):
        with pytest.raises(DataError, match=r"point the same way up to rounding|equally similar"):
            metric(*parallel(60, 1e-8, dtype))


@pytest.mark.parametrize("name", list(METRICS))
def test_a_representation_that_says_little_scores_at_its_null(name: str) -> None:
    """All rows alike but for one; a constant column beside others."""
    metric, free = METRICS.get(name), pair(60, 16, 0)[0]
    alike = torch.randn(1, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64).repeat(60, 1)
    alike[7] += 1
    other = torch.randn(1, 12, generator=torch.Generator().manual_seed(4), dtype=torch.float64).repeat(60, 1)
    other[9] -= 2
    for x, y in ((alike, free), (alike, other), (other.float(), alike.float())):
        try:
            value, null = metric(x, y), permutation_null(metric, x, y, n=60)
        except DataError as error:
            assert "undefined" in str(error) or "independent directions" in str(error)
        else:
            assert value < 0.4
            assert null.p > 0.02
    constant = free.clone()
    constant[:, 3] = 1e6
    assert np.isfinite(metric(constant, free))
    assert np.isfinite(metric(free, constant))


def test_cknna_can_be_above_one_and_below_zero() -> None:
    """As its docstring says; and it is what the definition says then."""
    for seed, k, n in ((106, 4, 6), (320, 4, 8)):
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(n, 3, generator=generator).double() for _ in range(2))
        assert cknna(x, y, k=k) == pytest.approx(dense_cknna(x, y, k), abs=1e-9)
        assert cknna(x, y, k=k) > 1
    values = [dense_cknna(*pair(6, 3, 3.0, seed), 4) for seed in range(30)]
    assert min(values) < 0


@pytest.mark.parametrize("name", list(METRICS))
def test_the_parts_of_a_metric_in_batches_and_permuted_equal_single_calls(name: str) -> None:
    """What the analysis computes from prepared parts, against the function on rows that really are permuted."""
    metric = METRICS.get(name)
    problems = [pair(40, 12, 0.5, seed) for seed in range(3)]
    option, given = {"k": (6, {"k": 6}), "dim": (4, {"dim": 4})}.get(metric.option, (0, {}))
    x, y = (
        metric.prepare(torch.stack(side), option, "x", number)
        for number, side in enumerate(zip(*problems, strict=True))
    )
    orders = torch.stack([permutations(40, 2, [seed]) for seed in range(3)], dim=1)
    nulls = null_scores(metric, [x, y], y, orders)
    assert nulls.shape == (2, 2, 3)
    assert [sorted(order) == list(range(40)) for order in orders[:, 0].tolist()] == [
        True,
        True,
    ]
    for number, (a, b) in enumerate(problems):
        assert metric.score(x, y)[number].item() == pytest.approx(metric(a, b, **given), abs=1e-9)
        for draw in range(2):
            moved = b[orders[draw, number]]
            assert nulls[draw, :, number] == pytest.approx(
                [metric(a, moved, **given), metric(b, moved, **given)], abs=1e-9
            )


class Elsewhere(TorchFunctionMode):
    """What is made without a device does not land where the values are: as on a machine whose values are on a GPU."""

    MADE = (torch.arange, torch.zeros, torch.ones, torch.full, torch.empty, torch.eye, torch.triu_indices)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        absent = func in self.MADE and "device" not in (kwargs or {})
        return func(*args, **(kwargs or {}), **({"device": "meta"} if absent else {}))


@pytest.mark.parametrize("shape", [(1200, 16), (3, 40, 16)], ids=["one large", "several small"])
@pytest.mark.parametrize("name", METRICS)
def test_a_metric_stays_on_the_device_of_its_values(name: str, shape: tuple[int, ...]) -> None:
    metric, generator = METRICS.get(name), torch.Generator().manual_seed(0)
    x, y = torch.randn(2, *shape, generator=generator)
    orders = permutations(shape[-2], 2, (0,))
    orders = orders[:, None].expand(2, 3, -1) if len(shape) == 3 else orders

    def scores() -> tuple[Tensor, np.ndarray]:
        own, other = metric.prepare(x, 10, "x"), metric.prepare(y, 10, "y")
        return metric.score(own, other), null_scores(metric, [own], other, orders)

    wanted = scores()
    with Elsewhere():
        found = scores()
    assert torch.equal(found[0], wanted[0])
    assert (found[1] == wanted[1]).all()


def test_independent_features_fall_inside_their_null_and_related_ones_outside() -> None:
    x, y = pair(150, 32, 0.7)
    other = pair(150, 32, 0, seed=5)[0]
    assert permutation_null(cknna, x, other, n=60).p > 0.05
    related = permutation_null(cknna, x, y, n=60)
    assert related.p == pytest.approx(1 / 61)
    assert related.mean < related.q95 < cknna(x, y) / 2


def test_null_by_renumbering_agrees_with_the_plain_one() -> None:
    x, y = pair(100, 16, 1.0)
    fast = permutation_null(cknna, x, y, n=200, seed=1)
    plain = permutation_null(lambda a, b: cknna(a, b), x, y, n=200, seed=2)
    assert fast.mean == pytest.approx(plain.mean, abs=0.01)
    assert fast.q95 == pytest.approx(plain.q95, abs=0.02)


def test_matrix_equals_single_calls() -> None:
    x, y = pair(90, 8, 0.5)
    table = alignment_matrix({"layer 1": x, "layer 2": y}, {"vfm": y}, k=9)
    assert table.loc["layer 1", "vfm"] == pytest.approx(cknna(x, y, k=9))
    assert table.loc["layer 2", "vfm"] == pytest.approx(1)
    with pytest.raises(UnknownNameError, match="did you mean 'cknna'"):
        alignment_matrix({"a": x}, {"b": y}, metric="cknn")
    with pytest.raises(DataError, match="'a' has 90 rows and 'b' has 89"):
        alignment_matrix({"a": x}, {"b": y[:-1]})


def rotated(x: Tensor) -> Tensor:
    return (
        x
        @ torch.linalg.qr(
            torch.randn(x.shape[1], x.shape[1], dtype=x.dtype, generator=torch.Generator().manual_seed(9))
        ).Q
    )


@pytest.mark.parametrize("name", list(METRICS))
def test_every_metric_has_its_invariances_and_its_chance_level(name: str) -> None:
    """1 for itself, unmoved by rotation, scale and common order, moved by noise, and in its null where nothing is
    shared."""
    metric = METRICS.get(name)
    x, y = pair(120, 16, 0.8)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(2))
    score = metric(x, y)
    assert metric(x, x) == pytest.approx(1, abs=1e-9)
    assert metric(x, 3 * rotated(x)) == pytest.approx(1, abs=1e-6)
    assert metric(rotated(x), 50 * y) == pytest.approx(score, abs=1e-6)
    assert metric(y, x) == pytest.approx(score, abs=5e-3 if name == "cknna" else 1e-9)
    assert metric(x[order], y[order]) == pytest.approx(score, abs=1e-9)
    null = permutation_null(metric, x, y, n=60)
    assert null.p == pytest.approx(1 / 61)
    assert null.q95 < score < 1
    assert permutation_null(metric, x, pair(120, 16, 0, seed=5)[0], n=60).p > 0.02
    for wrong, message in ((x[:-1], "120 rows and y has 119"), (bad(y, 3, float("nan")), "not finite in row 3")):
        with pytest.raises(DataError, match=message):
            metric(x, wrong)
    table = alignment_matrix({"a": x, "b": y}, {"c": y}, metric=name)
    assert table.loc["a", "c"] == pytest.approx(score)
    assert table.loc["b", "c"] == pytest.approx(1)


def test_unbiased_cka_equals_its_definition_and_is_zero_by_chance() -> None:
    x, y = pair(40, 6, 1.0)

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        k, m = (v @ v.T * (1 - torch.eye(40, dtype=torch.float64)) for v in (a, b))
        ones = torch.ones(40, dtype=torch.float64)
        return (
            torch.trace(k @ m) + (ones @ k @ ones) * (ones @ m @ ones) / (39 * 38) - 2 / 38 * (ones @ k @ m @ ones)
        ) / (40 * 37)

    assert cka(x, y) == pytest.approx(float(hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()))
    assert cka(x + 7, y - 3) == pytest.approx(cka(x, y))
    centred = [v - v.mean(0) for v in (x, y)]
    kernels = [v @ v.T for v in centred]
    assert cka(x, y, unbiased=False) == pytest.approx(
        float((kernels[0] * kernels[1]).sum() / (kernels[0].norm() * kernels[1].norm()))
    )
    independent = [cka(pair(40, 60, 0, seed=s)[0], pair(40, 60, 0, seed=s + 500)[0]) for s in range(60)]
    assert abs(np.mean(independent)) < 0.02
    assert (
        np.mean([cka(pair(40, 60, 0, seed=s)[0], pair(40, 60, 0, seed=s + 500)[0], unbiased=False) for s in range(10)])
        > 0.5
    )


def test_mutual_knn_svcca_and_rsa_against_plain_code() -> None:
    x, y = pair(50, 8, 0.7)
    near = [
        np.argsort(
            -(v / v.norm(dim=1, keepdim=True) @ (v / v.norm(dim=1, keepdim=True)).T - 10 * torch.eye(50)).numpy(),
            axis=1,
        )[:, :5]
        for v in (x, y)
    ]
    assert mutual_knn(x, y, k=5) == pytest.approx(
        np.mean([len(set(a) & set(b)) / 5 for a, b in zip(*near, strict=True)])
    )
    shuffled = [
        mutual_knn(x, y[torch.randperm(50, generator=torch.Generator().manual_seed(s))], k=5) for s in range(80)
    ]
    assert np.mean(shuffled) == pytest.approx(5 / 49, abs=0.02)
    linear = x @ torch.diag(torch.linspace(1, 2, 8, dtype=torch.float64))
    assert svcca(x, linear, dim=8) == pytest.approx(1)
    reduced = [PCA(3).fit_transform(v.numpy()) for v in (x, y)]
    canonical = CCA(3, scale=False, max_iter=5000, tol=1e-12).fit(*reduced)
    correlations = [
        np.corrcoef(a, b)[0, 1] for a, b in zip(*(side.T for side in canonical.transform(*reduced)), strict=True)
    ]
    assert svcca(x, y, dim=3) == pytest.approx(np.mean(correlations), abs=1e-3)
    with pytest.raises(DataError, match="dim is 9: expected 1 to 8, the number of independent directions of x"):
        svcca(x, y, dim=9)
    distances = [squareform(pdist(v.numpy(), "cosine"))[np.triu_indices(50, 1)] for v in (x, y)]
    assert rsa(x, y) == pytest.approx(spearmanr(*distances).statistic)


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
    assert np.array_equal(first, second)
    assert first.shape == (2, 30, 3)
    assert first.min() >= 0
    assert first.max() <= 1
    assert np.allclose(joint_pca_rgb([100 * x])[0], joint_pca_rgb([x])[0])


def test_joint_pca_is_the_pca_of_scikit_learn_over_all_maps() -> None:
    """Maps of other scales and sizes, of one layer and of two: rows in units of their map's root mean square, then
    median, quartiles and tanh."""
    rng = torch.Generator().manual_seed(4)
    maps = [
        torch.randn(2, 25, 6, generator=rng) * torch.tensor([5.0, 3, 2, 1, 1, 1]) + 1,
        40 * torch.randn(18, 6, generator=rng).exp(),
    ]
    layers = [layer.double().numpy() for m in maps for layer in m.reshape(-1, *m.shape[-2:])]
    rows = np.concatenate([layer / np.sqrt((layer**2).mean()) for layer in layers])
    scores = PCA(3, svd_solver="full").fit_transform(rows)
    scores *= np.sign(scores[np.abs(scores).argmax(axis=0), range(3)])
    low, middle, high = np.percentile(scores, [25, 50, 75], axis=0)
    expected = 0.5 + 0.5 * np.tanh((scores - middle) / (high - low))
    first, second = joint_pca_rgb(maps)
    assert first.shape == (2, 25, 3)
    assert second.shape == (1, 18, 3)
    assert np.allclose(np.concatenate([first.reshape(-1, 3), second.reshape(-1, 3)]), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["cka", "rsa"])
def test_metrics_of_all_pairs_refuse_more_rows_than_they_can_hold(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the limit a score, one row beyond it one sentence, before the matrix of all pairs exists."""
    monkeypatch.setattr("workbench.metrics.alignment.MAX_PAIRED_ROWS", 40)
    metric, x = METRICS.get(name), pair(41, 4, 0)[0]
    assert metric.square
    assert metric.score(*[metric.prepare(x[:40], 10, "x")] * 2).item() == pytest.approx(1)
    with pytest.raises(DataError, match=f"41 rows: {name.upper()} compares every pair of rows, expected at most 40"):
        metric.prepare(x, 10, "x")
