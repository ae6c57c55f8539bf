"""The weighted Gram matrix and the factor of its damped inverse."""

import pytest
import torch
from torch import Tensor

from dllmq.numerics import linalg
from dllmq.numerics.linalg import (
    SingularHessianError,
    add_product,
    add_square,
    all_finite,
    damped_inverse_cholesky,
    fill_dead_channels,
    mirror,
    product,
    split_gram,
    upper_product,
    weighted_gram,
)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recursion several levels deep on small matrices."""
    monkeypatch.setattr(linalg, "TILE", 16)
    monkeypatch.setattr(linalg, "LEAF", 10)


def close(ours: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("sizes", [(3, 5, 4), (70, 65, 90), (64, 200, 64)])
def test_product_of_any_layout(sizes: tuple[int, int, int]) -> None:
    """Dense, transposed, and parts of a larger matrix; small and large (other kernels)."""
    M, K, N = sizes
    A, B, large = torch.randn(M, K), torch.randn(K, N), torch.randn(300, 300)
    for a in (A, A.T.contiguous().T, large[5 : 5 + M, 7 : 7 + K], large[:K, :M].T):
        for b in (B, B.T.contiguous().T, large[9 : 9 + K, 3 : 3 + N], large[:N, :K].T):
            close(product(a, b), a.double() @ b.double())
            C = torch.randn(M, N)
            expected = C.double() - 2 * (a.double() @ b.double())
            add_product(C, a, b, -2.0)
            close(C, expected)
    assert product(A.double(), B.double()).dtype == torch.float64


@pytest.mark.parametrize("M", [5, 37, 64])
def test_triangular_and_symmetric_products(M: int, small_tiles: None) -> None:
    T, X, C = torch.randn(M, M).triu(), torch.randn(M, 20), torch.randn(M, M)
    C = C + C.T
    close(upper_product(T, X), T.double() @ X.double())
    expected = C.double() + 3 * (X.double() @ X.double().T)
    add_square(C, X, 3.0)
    close(C.tril(), expected.tril())
    mirror(C)
    close(C, expected)


def test_gram_of_tiles_is_symmetric_and_the_same(small_tiles: None) -> None:
    X, c = torch.randn(80, 50), torch.rand(80)
    H = weighted_gram(X, c)
    close(H, 2 * (X * c[:, None]).double().T @ X.double())
    off_diagonal = torch.ones(50, 50).tril(-17).bool()
    assert torch.equal(H[off_diagonal], H.T[off_diagonal])


def test_split_gram_is_exact_for_bf16_and_nearly_for_fp32() -> None:
    """What a GPU computes for bf16 inputs: with weight 1 nothing is lost, otherwise about 2^-16."""
    A = torch.randn(300, 20)
    exact = A.bfloat16().double()
    close(split_gram(A.bfloat16().float()), exact.T @ exact)
    error = split_gram(A).double() - A.double().T @ A.double()
    scale = A.double().norm(dim=0)
    assert float((error.abs() / (scale[:, None] * scale)).max()) < 2**-16
    plain = A.bfloat16().double().T @ A.bfloat16().double() - A.double().T @ A.double()
    assert float(plain.abs().max()) > 10 * float(error.abs().max())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_all_finite(bad: float) -> None:
    x = torch.full((3, 4), 3e38)
    x[0] = -3e38  # their difference overflows, they do not
    assert all_finite(x) and all_finite(torch.empty(0))
    x[1, 2] = bad
    assert not all_finite(x)


def test_gram_by_hand() -> None:
    """2 (1 * [1, 2][1, 2]^T + 0.5 * [0, 2][0, 2]^T)."""
    X, c = torch.tensor([[1.0, 2.0], [0.0, 2.0]]), torch.tensor([1.0, 0.5])
    torch.testing.assert_close(weighted_gram(X, c), torch.tensor([[2.0, 4.0], [4.0, 12.0]]))


def test_gram_is_the_hessian_of_the_weighted_error() -> None:
    X, c = torch.randn(20, 4, dtype=torch.float64), torch.rand(20, dtype=torch.float64)
    w = torch.randn(4, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(
        lambda v: (c * (X @ (v - w)).square()).sum(), torch.zeros_like(w)
    )
    torch.testing.assert_close(weighted_gram(X, c).double(), hessian, rtol=1e-5, atol=1e-5)


def test_unit_weights_are_no_weights_bit_for_bit() -> None:
    X = torch.randn(37, 8)
    assert torch.equal(weighted_gram(X), weighted_gram(X, torch.ones(37)))


def test_weight_zero_is_absence() -> None:
    X, c = torch.randn(10, 4), torch.ones(10)
    c[3:] = 0
    torch.testing.assert_close(weighted_gram(X, c), weighted_gram(X[:3]))


@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_negative_weights_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="negative or NaN"):
        weighted_gram(torch.randn(2, 3), torch.tensor([1.0, bad]))


def test_dead_channels_get_the_live_mean() -> None:
    H = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 6.0]])
    filled, dead = fill_dead_channels(H)
    assert dead.tolist() == [False, True, False]
    assert filled.tolist() == [[2.0, 0.0, 1.0], [0.0, 4.0, 0.0], [1.0, 0.0, 6.0]]
    assert H[1, 1] == 0  # the caller's own is untouched


def test_factor_is_the_authors_factor() -> None:
    """Cholesky, inverse, upper Cholesky, in double precision (their three steps), gives the same U."""
    H = weighted_gram(torch.randn(200, 16) * torch.logspace(-1, 1, 16))
    U = damped_inverse_cholesky(H, 0.01)
    damped = H.double() + 0.01 * H.double().diagonal().mean() * torch.eye(16)
    theirs = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    assert torch.equal(U, U.triu())
    torch.testing.assert_close(U.double(), theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("condition", [1, 3, 6])
@pytest.mark.parametrize("I", [31, 64, 100])
def test_factor_by_halves_is_as_accurate_as_the_authors(I: int, condition: int, small_tiles: None) -> None:
    """Channels of 10^-condition to 10^condition; errors in units of 2^-24 against double precision are below
    four times theirs (Cholesky, inverse, Cholesky in fp32), row by row and in the product U H U^T = 1."""
    rng = torch.Generator().manual_seed(I)
    H = weighted_gram(torch.randn(2 * I, I, generator=rng) * torch.logspace(-condition / 2, condition / 2, I))
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(I)
    exact = torch.linalg.cholesky(torch.linalg.inv(damped.double()), upper=True)
    theirs = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    ours = damped_inverse_cholesky(H, 0.01)

    def error(U: Tensor) -> float:
        return float(((U.double() - exact).norm(dim=1) / exact.norm(dim=1)).max())

    assert torch.equal(ours, ours.triu())
    assert error(ours) < max(4 * error(theirs), 2**-20)
    close(ours.double() @ damped.double() @ ours.double().T, torch.eye(I, dtype=torch.float64))


def test_factor_by_halves_in_double(small_tiles: None) -> None:
    """U H U^T = 1 to 1e-9, with an eigenvalue spread of 1e6."""
    A = torch.linalg.qr(torch.randn(90, 90, dtype=torch.float64)).Q * torch.logspace(-1.5, 1.5, 90).double()
    U = damped_inverse_cholesky(A @ A.T, 1e-6)
    damped = A @ A.T + 1e-6 * (A @ A.T).diagonal().mean() * torch.eye(90)
    torch.testing.assert_close(U @ damped @ U.T, torch.eye(90).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("at", [0, 11, 40])
def test_factor_by_halves_finds_what_is_indefinite(at: int, small_tiles: None) -> None:
    """Wherever it is: in the first leaf, the last, or between."""
    H = torch.eye(41)
    H[at, at] = -2.0
    with pytest.raises(SingularHessianError, match="not positive definite"):
        damped_inverse_cholesky(H, 0.01)


def test_diagonal_factor_has_exact_zeros() -> None:
    U = damped_inverse_cholesky(torch.diag(torch.rand(8) + 0.1), 0.01)
    assert torch.equal(U, torch.diag(U.diagonal()))


def test_damping_makes_a_singular_hessian_work() -> None:
    """One token only, rank 1."""
    U = damped_inverse_cholesky(weighted_gram(torch.randn(1, 8)), 0.01)
    assert torch.isfinite(U).all()


def test_indefinite_matrix_raises_with_remedies() -> None:
    H = torch.diag(torch.tensor([1.0, 1.0, -0.5]))
    with pytest.raises(
        SingularHessianError, match=r"raise method\.damp \(try 0\.1\).*more tokens than the 3 channels"
    ):
        damped_inverse_cholesky(H, 0.01)


def test_all_dead_raises() -> None:
    with pytest.raises(SingularHessianError, match="no calibration token reached this layer"):
        fill_dead_channels(torch.zeros(3, 3))


def test_overflow_raises() -> None:
    with pytest.raises(ValueError, match="NaN or Inf"):
        fill_dead_channels(torch.tensor([[float("inf")]]))
