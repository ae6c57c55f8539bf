"""The weighted Gram matrix and the factor of its damped inverse."""

import pytest
import torch

from dllmq.numerics.linalg import (
    SingularHessianError,
    damped_inverse_cholesky,
    fill_dead_channels,
    weighted_gram,
)


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
        SingularHessianError, match=r"raise damp \(try 0\.1\).*more tokens than the 3 channels"
    ):
        damped_inverse_cholesky(H, 0.01)


def test_all_dead_raises() -> None:
    with pytest.raises(SingularHessianError, match="no calibration token reached this layer"):
        fill_dead_channels(torch.zeros(3, 3))


def test_overflow_raises() -> None:
    with pytest.raises(ValueError, match="NaN or Inf"):
        fill_dead_channels(torch.tensor([[float("inf")]]))
