"""Confidence intervals from estimated variances."""

from __future__ import annotations

import torch
from torch import Tensor


def half_width(standard_error: Tensor, dof: Tensor, confidence: float) -> Tensor:
    """Half width of a confidence interval: the t-quantile of so many degrees of freedom times the standard error.

    Raises:
        ValueError: for a confidence outside of (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must lie in (0, 1), got {confidence!r}.")
    from scipy.special import stdtrit  # here: `import scoresde` stays light

    quantile = stdtrit(dof.clamp(max=1e9).cpu().numpy(), 0.5 + confidence / 2)
    return torch.as_tensor(quantile, dtype=torch.float64, device=standard_error.device) * standard_error


def satterthwaite(variances: Tensor, dof: Tensor) -> Tensor:
    r"""Degrees of freedom of a sum of independent variance estimates, over the first dimension.

    :math:`(\sum_k s_k)^2 / \sum_k s_k^2 / (f_k + 2) - 2`, Welch's form: as :math:`E[s_k^2] = v_k^2 (f_k + 2) / f_k`,
    the plain :math:`\sum_k s_k^2 / f_k` of Satterthwaite is three times too large for estimates of one degree.

    Source: Welch 1947, Biometrika 34, 28-35.
    """
    total, squares = variances.sum(0), (variances.square() / (dof + 2.0)).sum(0)
    return torch.where(total == 0, torch.inf, total.square() / squares - 2.0)
