"""The linear algebra GPTQ needs: the weighted Gram matrix of a layer's inputs and the factor of its inverse.

Legend: X inputs [N, I], c_j >= 0 weight of token j on the squared error, H = 2 sum_j c_j x_j x_j^T [I, I].
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class SingularHessianError(ValueError):
    """H has no usable inverse. The message holds the remedies; callers put the layer's name in front."""


def weighted_gram(X: Float[Tensor, "N I"], c: Float[Tensor, " N"] | None = None) -> Float[Tensor, "I I"]:
    """H = 2 sum_j c_j x_j x_j^T in fp32: the Hessian of sum_j c_j ||(W - W_hat) x_j||^2 in each row of W_hat.

    Computed as 2 A^T A with rows a_j = sqrt(c_j) x_j, the form in which CGQ writes its weighting
    (X_tilde = X (indicator + sqrt(s))). c = None equals c = 1 bit for bit.

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
    return 2 * (A.T @ A)


def fill_dead_channels(H: Float[Tensor, "I I"]) -> tuple[Float[Tensor, "I I"], Bool[Tensor, " I"]]:
    """A copy of H with H_ii = mean of the live H_jj at dead channels i (H_ii = 0: x_i is always 0).

    The authors' code sets 1, an absolute number: with the mean, a positive constant times H changes nothing.

    Returns:
        The filled copy in fp32, and which channels are dead.

    Raises:
        ValueError: H has NaN or Inf.
        SingularHessianError: every channel is dead.
    """
    H = H.float().clone()
    if not bool(torch.isfinite(H).all()):
        raise ValueError(
            "the Hessian holds NaN or Inf, but it must be finite: the activations overflowed during "
            "calibration; calibrate in float32 or bfloat16."
        )
    diagonal = H.diagonal()
    dead = diagonal == 0
    if bool(dead.all()):
        raise SingularHessianError(
            "no calibration token reached this layer (every input is zero or has weight zero): "
            "check the calibration states and their token weights."
        )
    diagonal[dead] = diagonal[~dead].mean()
    return H, dead


def damped_inverse_cholesky(H: Float[Tensor, "I I"], damp: float) -> Float[Tensor, "I I"]:
    """Upper triangular U with U^T U = (H + damp mean(diag H) 1)^-1, what GPTQ calls Cholesky(H^-1)^T.

    Column i of GPTQ's loop needs row i of the inverse that is left after eliminating columns 0 .. i-1,
    divided by the square root of its diagonal entry: that is row i of U (2210.17323, section 3.3, step 3).

    The authors take Cholesky, inverse, Cholesky. We factor from the other end, H = R R^T with R upper
    (Cholesky of H with rows and columns reversed), so that U = R^-1: the same, unique factor, with one
    factorization instead of two, and H^-1 is never formed.

    Args:
        H: symmetric [I, I], dead channels already filled.
        damp: share of the mean diagonal that is added to the diagonal, > 0.

    Raises:
        SingularHessianError: H + damping is not positive definite in fp32.
    """
    damping = damp * H.diagonal().mean()
    H = H + torch.diag(damping.expand(H.shape[0]))
    L, failed = torch.linalg.cholesky_ex(H.flip(0, 1))
    if int(failed) != 0:
        raise SingularHessianError(
            f"the Hessian plus damping {damp:g} of its mean diagonal is not positive definite: raise damp "
            f"(try {10 * damp:g}), calibrate on more tokens than the {H.shape[0]} channels, or in float32."
        )
    U: Tensor = torch.linalg.solve_triangular(L.flip(0, 1), torch.eye(*H.shape).to(H), upper=True)
    return U
