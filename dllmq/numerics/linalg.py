"""The linear algebra GPTQ needs: the weighted Gram matrix of a layer's inputs and the factor of its inverse.

Nearly all of it is matrix products, by recursion on halves: half of a symmetric or triangular result is
never computed, and products are what every processor is fastest at.

Legend: X inputs [N, I], c_j >= 0 weight of token j on the squared error, H = 2 sum_j c_j x_j x_j^T [I, I],
R and U upper triangular with R R^T = H + damping and U = R^-1.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

TILE = 512  # symmetric and triangular products are cut into halves down to this width
LEAF = 256  # down to this width a matrix is factored by LAPACK
SMALLEST = 64  # of a product's three sizes, for oneDNN to be worth its call
LARGEST = 2**22  # numbers in a product that is made to be added: memory of more is new each time, and slow
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class SingularHessianError(ValueError):
    """H has no usable inverse. The message holds the remedies; callers put the layer's name in front."""


def product(A: Float[Tensor, "M K"], B: Float[Tensor, "K N"]) -> Float[Tensor, "M N"]:
    """A B; on a CPU in fp32 by oneDNN, the same sum in another order (see kernels/cpu_linear.py).

    oneDNN is fast on dense operands only, so parts of a larger matrix are copied. B may be a dense transpose.
    """
    plain = A.device.type == "cpu" and A.dtype == B.dtype == torch.float32
    if not (HAS_ONEDNN and plain and min(*A.shape, B.shape[1]) >= SMALLEST):
        return A @ B
    B = B if B.T.is_contiguous() else B.contiguous()
    result: Tensor = torch.ops.mkldnn._linear_pointwise(dense(A), B.T, None, "none", [], "")
    return result


def dense(A: Float[Tensor, "M N"]) -> Float[Tensor, "M N"]:
    """A.contiguous(). What lies transposed in a larger matrix is copied as it lies and then turned: torch is
    fast at turning whole matrices only."""
    return A.T.contiguous().T.contiguous() if A.stride(0) == 1 else A.contiguous()


def all_finite(x: Tensor) -> bool:
    """Whether x holds neither NaN nor Inf; its extremes tell, in a tenth of the time of looking at each."""
    return x.numel() == 0 or bool(torch.isfinite(torch.stack([x.amin(), x.amax()])).all())


def add_product(
    C: Float[Tensor, "M N"], A: Float[Tensor, "M K"], B: Float[Tensor, "K N"], alpha: float = 1.0
) -> None:
    """C <- C + alpha A B in place."""
    if min(*A.shape, B.shape[1]) < SMALLEST:
        C.addmm_(A, B, alpha=alpha)
        return
    rows = max(SMALLEST, LARGEST // max(A.shape[1], B.shape[1]))
    for part, given in zip(C.split(rows), A.split(rows), strict=True):
        part.add_(product(given, B), alpha=alpha)


def add_square(C: Float[Tensor, "M M"], A: Float[Tensor, "M K"], alpha: float = 1.0) -> None:
    """C <- C + alpha A A^T in place, its lower half: what is right of diagonal tiles stays as it is."""
    M = len(C)
    if M <= TILE:
        return add_product(C, A, A.T, alpha)
    half = M // 2
    add_square(C[:half, :half], A[:half], alpha)
    add_product(C[half:, :half], A[half:], A[:half].T, alpha)
    add_square(C[half:, half:], A[half:], alpha)


def mirror(C: Float[Tensor, "M M"]) -> None:
    """Copies the lower half of C onto the upper one."""
    M = len(C)
    if M <= TILE:
        return
    half = M // 2
    mirror(C[:half, :half])
    C[:half, half:] = dense(C[half:, :half].T)
    mirror(C[half:, half:])


def split_gram(A: Float[Tensor, "N I"]) -> Float[Tensor, "I I"]:
    """A^T A by bf16 tensor cores that accumulate in fp32: a = high + low, both bf16, without low^T low.

    What is left out is 2^-16 of an entry; nothing is where A is bf16 already (low = 0).
    """
    high = A.bfloat16()
    low = (A - high).bfloat16()
    cross = _bf16_product(high.T, low)
    return _bf16_product(high.T, high).add_(cross).add_(cross.T)


def _bf16_product(A: Tensor, B: Tensor) -> Tensor:
    """A B in fp32; products of two bf16 numbers are exact there."""
    if A.is_cuda:
        return torch.mm(A, B, out_dtype=torch.float32)
    return A.float() @ B.float()


def upper_product(T: Float[Tensor, "M M"], X: Float[Tensor, "M N"]) -> Float[Tensor, "M N"]:
    """T X for an upper triangular T; most of its zeros are not multiplied."""
    M = len(T)
    if M <= TILE:
        return product(T, X)
    half = M // 2
    top = upper_product(T[:half, :half], X[:half])
    add_product(top, T[:half, half:], X[half:])
    return torch.cat([top, upper_product(T[half:, half:], X[half:])])


def weighted_gram(X: Float[Tensor, "N I"], c: Float[Tensor, " N"] | None = None) -> Float[Tensor, "I I"]:
    """H = 2 sum_j c_j x_j x_j^T in fp32: the Hessian of sum_j c_j ||(W - W_hat) x_j||^2 in each row of W_hat.

    Computed as 2 A^T A with rows a_j = sqrt(c_j) x_j, the form in which CGQ writes its weighting
    (X_tilde = X (indicator + sqrt(s))). c = None equals c = 1 bit for bit. bf16 inputs on a GPU take its
    bf16 tensor cores (`split_gram`), everything else fp32.

    Args:
        X: inputs, any float dtype.
        c: token weights; None weighs every token 1.

    Raises:
        ValueError: c is negative somewhere or NaN.
    """
    A = X.float()
    if c is not None:
        if not bool((c >= 0).all()):
            raise ValueError(
                "token weights hold a negative or NaN value, but a weight on a squared error must be >= 0: "
                "check the confidences they were made from."
            )
        A = A * c.float().sqrt()[:, None]
    if X.is_cuda and X.dtype == torch.bfloat16:
        return split_gram(A).mul_(2)
    H = A.new_zeros(A.shape[1], A.shape[1])
    add_square(H, A.T.contiguous(), 2.0)
    mirror(H)
    return H


def fill_dead_channels(H: Float[Tensor, "I I"]) -> tuple[Float[Tensor, "I I"], Bool[Tensor, " I"]]:
    """H with H_ii = mean of the live H_jj at dead channels i (H_ii = 0: x_i is always 0).

    The authors' code sets 1, an absolute number: with the mean, a positive constant times H changes nothing.

    Returns:
        H filled, in fp32 (a copy; H itself where nothing is dead), and which channels are dead.

    Raises:
        ValueError: H has NaN or Inf.
        SingularHessianError: every channel is dead.
    """
    H = H.float()
    if not all_finite(H):
        raise ValueError(
            "the Hessian holds NaN or Inf, but it must be finite: the activations overflowed during "
            "calibration; calibrate in float32 or bfloat16."
        )
    dead = H.diagonal() == 0
    if bool(dead.all()):
        raise SingularHessianError(
            "no calibration token reached this layer (every input is zero or has weight zero): "
            "check the calibration states and their token weights."
        )
    if bool(dead.any()):
        H = H.clone()
        H.diagonal()[dead] = H.diagonal()[~dead].mean()
    return H, dead


def damped_inverse_cholesky(H: Float[Tensor, "I I"], damp: float) -> Float[Tensor, "I I"]:
    """Upper triangular U with U^T U = (H + damp mean(diag H) 1)^-1, what GPTQ calls Cholesky(H^-1)^T.

    Column i of GPTQ's loop needs row i of the inverse that is left after eliminating columns 0 .. i-1,
    divided by the square root of its diagonal entry: that is row i of U (2210.17323, section 3.3, step 3).

    The authors take Cholesky, inverse, Cholesky. We factor from the other end, H = R R^T with R upper, so
    that U = R^-1: the same, unique factor, and H^-1 is never formed.

    Args:
        H: symmetric [I, I], dead channels already filled.
        damp: share of the mean diagonal that is added to the diagonal, > 0.

    Raises:
        SingularHessianError: H + damping is not positive definite in fp32.
    """
    U = torch.zeros_like(H)
    if int(_invert_factor(H, damp * H.diagonal().mean(), U)) != 0:
        raise SingularHessianError(
            f"the Hessian plus damping {damp:g} of its mean diagonal is not positive definite: raise "
            f"method.damp (try {min(10 * damp, 1):g}), calibrate on more tokens than the {H.shape[0]} "
            "channels, or in float32."
        )
    return U


def _invert_factor(
    H: Float[Tensor, "M M"], damping: Float[Tensor, ""], U: Float[Tensor, "M M"]
) -> Int[Tensor, ""]:
    """Fills U = R^-1, where R R^T = H + damping and R is upper triangular; not 0 if there is no such R.

    On halves, R R^T = H reads  R_22 R_22^T = H_22,  R_12 = H_12 U_22^T,  R_11 R_11^T = H_11 - R_12 R_12^T,
    and the inverse of R has U_12 = -U_11 R_12 U_22 beside the inverses of its diagonal blocks. Of H no more
    than a quarter is copied at a time: a Hessian can be larger than the weights it belongs to.

    Args:
        H: its lower half and diagonal tiles are read.
        U: zeros.
    """
    M = len(H)
    if M <= LEAF:
        failed: Tensor
        L, failed = torch.linalg.cholesky_ex(
            damped(H, damping).flip(0, 1)
        )  # rows and columns reversed: R = flip(L)
        eye = torch.eye(M, dtype=H.dtype, device=H.device)
        U.copy_(torch.linalg.solve_triangular(L.flip(0, 1), eye, upper=True))
        return failed
    half = M // 2
    failed_22 = _invert_factor(H[half:, half:], damping, U[half:, half:])
    R_12 = upper_product(U[half:, half:], H[half:, :half]).T.contiguous()
    H_11 = damped(H[:half, :half], damping)
    add_square(H_11, R_12, -1.0)
    failed_11 = _invert_factor(H_11, torch.zeros_like(damping), U[:half, :half])
    del H_11
    U[:half, half:] = product(upper_product(U[:half, :half], R_12), U[half:, half:]).neg_()
    return failed_11 + failed_22


def damped(H: Float[Tensor, "M M"], damping: Float[Tensor, ""]) -> Float[Tensor, "M M"]:
    """A copy of H with the damping on its diagonal."""
    H = H.clone()
    H.diagonal().add_(damping)
    return H
