"""The forward process q(x_t | x_0) of masked diffusion, and how many tokens each reverse step gives back.

    q(x_t^i | x_0^i) = (1 - t) [x_t^i = x_0^i] + t [x_t^i = MASK],  independently for every response token i
                                                                     (LLaDA, arXiv:2502.09992, eq. 7-8)

The prompt is never masked. Legend:

    x_0  clean tokens          x_t  tokens with masks         t  mask ratio in [0, 1]
    T    response tokens       b    samples in a stratified batch

Random numbers are drawn where the generator lives and then moved, so a CPU generator gives the same states on
every device. `generator=None` means torch's default CPU generator.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def mask_tokens(
    x_0: Int[Tensor, "B L"],
    response: Bool[Tensor, "B L"],
    t: Float[Tensor, " B"],
    mask_id: int,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]]:
    """Draws x_t ~ q(x_t | x_0): every response token becomes the mask with probability t of its row.

    Args:
        x_0: clean tokens.
        response: the positions that may be masked (neither prompt nor padding).
        t: mask ratio per row; 0 masks nothing, 1 masks the whole response.
        mask_id: id of the mask token.
        generator: source of randomness; one uniform per position, masked or not.

    Returns:
        x_t, and which positions were masked by this draw.

    Raises:
        ValueError: t lies outside [0, 1].
    """
    if not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"Mask ratios t must lie in [0, 1]; got {t.tolist()}.")
    u = uniform(tuple(x_0.shape), generator, x_0.device)
    masked = response & (u < t.to(x_0.device)[:, None])
    return x_0.masked_fill(masked, mask_id), masked


def tokens_per_step(num_masked: Int[Tensor, " B"], steps: int) -> Int[Tensor, "B S"]:
    """Splits each row's masked tokens over `steps` steps as evenly as possible, the larger counts first.

    (16, 5) -> 4 3 3 3 3. With more steps than tokens the trailing counts are 0.
    Source: ML-GSAI/LLaDA `get_num_transfer_tokens`.
    """
    base = num_masked // steps
    extra = num_masked % steps
    first = torch.arange(steps, device=num_masked.device) < extra[:, None]  # [B, S]
    return base[:, None] + first


def stratified_masks(
    length: int, batch_size: int, generator: torch.Generator | None = None
) -> tuple[Bool[Tensor, "b T"], Int[Tensor, " b"]]:
    """Draws the masks of one batch of the likelihood estimator, with mask counts spread evenly over 1..T.

    One k ~ U{1..T} per batch; row j masks x_j = ((round(k + j T/b) - 1) mod T) + 1 tokens at uniformly random
    positions. The values k + j T/b are a float32 linspace, rounded half to even. The generator is asked for
    one `randint`, then for b `randperm`s. Source: ML-GSAI/LLaDA `get_log_likelihood.py`, `forward_process`.

    Args:
        length: T, the number of answer tokens.
        batch_size: b, the number of strata.
        generator: source of randomness.

    Returns:
        The masks (on the generator's device), and x_j, how many tokens each row masks.
    """
    device = generator.device if generator is not None else torch.device("cpu")
    k = torch.randint(1, length + 1, (), generator=generator, device=device)
    last = k + (batch_size - 1) * (length / batch_size)
    ladder = torch.linspace(float(k), float(last), steps=batch_size, device=device)
    counts = (ladder.round().long() - 1) % length + 1
    order = [torch.randperm(length, generator=generator, device=device) for _ in range(batch_size)]
    return torch.stack(order) < counts[:, None], counts


def bernoulli_masks(
    length: int, columns: int, batch_size: int, eps: float, generator: torch.Generator | None = None
) -> tuple[Bool[Tensor, "b T"], Float[Tensor, " b"]]:
    """Draws the masks of one batch of Dream's likelihood estimator, with ratios spread evenly over [0, 1).

        t_j = (u_0 + j/b) mod 1,  p_j = (1 - eps) t_j + eps;  each answer token masked with probability p_j

    The generator is asked for u_0, then for b x columns uniforms of which only the answer's are used, as
    Dream draws them. Source: Dream's evaluation harness, `_forward_process`.

    Args:
        length: T, the number of answer tokens; they stand before the last of `columns`.
        columns: tokens of prompt, answer and the end of text that follows.
        batch_size: b, the number of strata.
        eps: the least mask ratio.
        generator: source of randomness.

    Returns:
        The masks (on the generator's device), and p_j, in float32.
    """
    device = generator.device if generator is not None else torch.device("cpu")
    t = (uniform((1,), generator, device) + torch.arange(batch_size, device=device) / batch_size) % 1
    p = (1 - eps) * t + eps
    u = uniform((batch_size, columns), generator, device)
    return (u < p[:, None])[:, -1 - length : -1], p


def uniform(
    shape: tuple[int, ...],
    generator: torch.Generator | None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draws U[0, 1) on the generator's device and moves it to `device`."""
    source = generator.device if generator is not None else torch.device("cpu")
    return torch.rand(shape, generator=generator, device=source, dtype=dtype).to(device)
