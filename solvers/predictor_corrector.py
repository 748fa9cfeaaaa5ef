"""Predictor-corrector sampling: a solver step, then Markov-chain moves that leave p_t (nearly) unchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from sde_lib import Knot, Law, ReverseSDE, Table, lookup
from sde_lib._checks import check_positive
from sde_lib._math import Real
from solvers.noise import Draw
from solvers.predictors import PREDICTORS
from solvers.solver import Past, Solver, Step, without_ahead

NORMS = ("sample", "batch")


@dataclass(frozen=True)
class Corrector:
    """Base: `steps` Langevin moves x <- x + e score + sqrt(2 e) z; a subclass gives the step size e."""

    snr: float = 0.16
    steps: int = 1
    batch_coupled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_positive("snr", self.snr)
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"`steps` must be an int >= 1, got {self.steps!r}.")

    def size(self, score: Tensor, z: Tensor, at: Knot, shrink: Real) -> Real:
        """Step size e; `shrink` is (alpha_t / alpha_s)^2 of the solver's step."""
        raise NotImplementedError

    def correct(self, rev: ReverseSDE, x: Tensor, at: Knot, shrink: Real, draw: Draw) -> Tensor:
        """Move x, a sample of p at the knot `at`."""
        for i in range(self.steps):
            score = rev(x, at).score
            z = draw.normal("corrector", at.half_log_snr, i)
            e = self.size(score, z, at, shrink)
            if isinstance(e, Tensor):
                e = e.to(x.dtype)
                x = x + e * score + (2.0 * e).sqrt() * z
            else:
                x = torch.add(x, score, alpha=e).add_(z, alpha=(2.0 * e) ** 0.5)
        return x


@dataclass(frozen=True)
class Langevin(Corrector):
    r"""Langevin dynamics with the step size set by a signal-to-noise ratio r.

    :math:`e = 2 a (r \|z\| / \|\nabla\log p\|)^2` with :math:`a = (\alpha_t / \alpha_s)^2` of the solver's step:
    1 - beta_i on DDPM's chain, 1 on VE, and defined on every SDE.

    Source: Song et al. 2021, Algorithms 4 and 5. The rule is per sample, with :math:`\|z\| = \sqrt d` in d dimensions
    (their advice for small batches); the published code averages both norms over the batch (``norm="batch"``), so that
    a sample there depends on its batch mates.

    A step that depends on the state samples a slightly different law: on a Gaussian the per-sample rule inflates the
    variance by a factor 1 + 2 / d (1.6 % in the standard deviation for 64 pixels). Near a mode it asks for
    steps without bound; they are capped at sigma^2, half of what is stable for any data. **In few dimensions take
    `AnnealedLangevin`**, whose step does not look at the state.

    Args:
        snr: r, > 0; 0.16 is the published value for VE on CIFAR-10 (VP: 0.01).
        steps: moves per solver step.
        norm: "sample" or "batch".
    """

    norm: str = "sample"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm not in NORMS:
            raise ValueError(f'`norm` must be "sample" or "batch", got {self.norm!r}.')

    @property
    def batch_coupled(self) -> bool:  # type: ignore[override]
        return self.norm == "batch"

    def size(self, score: Tensor, z: Tensor, at: Knot, shrink: Real) -> Real:
        z_norm, score_norm = (torch.linalg.vector_norm(v.reshape(len(v), -1), dim=1) for v in (z, score))
        if self.norm == "batch":
            z_norm, score_norm = z_norm.mean().expand_as(z_norm), score_norm.mean().expand_as(score_norm)
        else:
            z_norm = torch.full_like(score_norm, score[0].numel() ** 0.5)
        # where the score vanishes exactly (at a mode) the rule asks for an infinite step: no move instead
        ratio = torch.where(score_norm != 0, self.snr * z_norm / score_norm, 0.0).reshape(-1, *[1] * (score.ndim - 1))
        scale = shrink.to(ratio.dtype) if isinstance(shrink, Tensor) else shrink
        e = 2.0 * scale * ratio * ratio
        if self.norm == "batch":
            return e
        cap = at.sigma * at.sigma
        return torch.minimum(e, cap.to(e.dtype)) if isinstance(cap, Tensor) else e.clamp(max=cap)


@dataclass(frozen=True)
class AnnealedLangevin(Corrector):
    r"""Langevin dynamics with a step size proportional to the noise variance: :math:`e = 2 a (r \sigma)^2`.

    Source: Song & Ermon 2019, arXiv:1907.05600, Algorithm 1, in the normalization of Song et al. 2021's code.

    Args:
        snr: r, > 0.
        steps: moves per solver step.
    """

    def size(self, score: Tensor, z: Tensor, at: Knot, shrink: Real) -> Real:
        return 2.0 * shrink * (self.snr * at.sigma) * (self.snr * at.sigma)


CORRECTORS: Mapping[str, type[Corrector]] = Table(Corrector, {
    "langevin": Langevin,
    "annealed_langevin": AnnealedLangevin,
})
"""Name -> class."""


@dataclass(frozen=True)
class PredictorCorrector(Solver):
    """A predictor step from t to s, then corrector moves at s (Song et al. 2021, Algorithm 1).

    Every predictor goes with every corrector on every SDE. A run that is to end in clean samples asks for
    ``end="denoise"``: the posterior mean at the last knot, also when there is no predictor.

    Args:
        predictor: any fixed-step solver, its name, or None or "none" (the state is carried over: annealed Langevin).
        corrector: a `Corrector`, its name, or None or "none". The default is right in any number of dimensions; the
            paper's own choice for images is "langevin".
        corrector_first: correct at t before the step, as the published code does; the paper's order is the default.
        snr: of a corrector given by its name.
        corrector_steps: number of moves of a corrector given by its name.
    """

    predictor: Solver | str | None = "reverse_diffusion"
    corrector: Corrector | str | None = "annealed_langevin"
    corrector_first: bool = False
    snr: float = 0.16
    corrector_steps: int = 1
    _predictor: Solver | None = field(init=False, repr=False, compare=False)
    _corrector: Corrector | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        predictor, corrector = (None if part == "none" else part for part in (self.predictor, self.corrector))
        if isinstance(predictor, str):
            predictor = lookup(PREDICTORS, predictor, "predictor")()
        if isinstance(corrector, str):
            corrector = lookup(CORRECTORS, corrector, "corrector")(snr=self.snr, steps=self.corrector_steps)
        if predictor is not None and (not isinstance(predictor, Solver) or predictor.adaptive):
            raise TypeError(f"`predictor` must be a fixed-step solver, its name or None, got {predictor!r}.")
        if corrector is not None and not isinstance(corrector, Corrector):
            raise TypeError(f"`corrector` must be a Corrector, its name or None, got {corrector!r}.")
        if predictor is None and corrector is None:
            raise ValueError("A predictor-corrector needs a predictor or a corrector.")
        object.__setattr__(self, "_predictor", predictor)
        object.__setattr__(self, "_corrector", corrector)

    @property
    def order(self) -> int:  # type: ignore[override]
        """The predictor's; 0 with a corrector, whose own bias does not vanish with the number of steps."""
        return self._predictor.order if self._predictor is not None and self._corrector is None else 0

    @property
    def nfe_per_step(self) -> int:  # type: ignore[override]
        predictor = 0 if self._predictor is None else self._predictor.nfe_per_step
        return predictor + (0 if self._corrector is None else self._corrector.steps)

    @property
    def nfe_to_start(self) -> int:  # type: ignore[override]
        return 0 if self._predictor is None else self._predictor.nfe_to_start

    @property
    def shares_calls(self) -> bool:  # type: ignore[override]
        """A corrector moves the state away from where the predictor has called."""
        return self._corrector is None and self._predictor is not None and self._predictor.shares_calls

    def nfe(self, steps: int, end: str = "stop") -> int:
        """With the corrector first, the step to the data corrects too."""
        last = self._corrector.steps if self._corrector is not None and self.corrector_first else 0
        return super().nfe(steps, end) + (last if end == "denoise" else 0)

    @property
    def needs_drift(self) -> bool:  # type: ignore[override]
        return self._predictor is not None and self._predictor.needs_drift

    @property
    def stochastic(self) -> bool:
        return self._corrector is not None or (self._predictor is not None and self._predictor.stochastic)

    @property
    def batch_coupled(self) -> bool:
        return (self._corrector is not None and self._corrector.batch_coupled) or (
            self._predictor is not None and self._predictor.batch_coupled
        )

    def _with(self, predictor: Solver) -> Solver:
        changed = replace(self)
        object.__setattr__(changed, "_predictor", predictor)
        return changed

    def on(self, law: Law) -> Solver:
        """The predictor's word."""
        return self if self._predictor is None else self._with(self._predictor.on(law))

    def bind(self, knots: Sequence[Knot]) -> Solver:
        """Binds the predictor."""
        return self if self._predictor is None else self._with(self._predictor.bind(knots))

    def step(self, rev: ReverseSDE, x: Tensor, t: Knot, s: Knot, past: Past, draw: Draw) -> Step:
        """Predict, then correct at s; or correct at t, then predict."""
        shrink = (t.alpha / s.alpha) * (t.alpha / s.alpha)
        x = self._correct_first(rev, x, t, s, draw)
        prediction = None
        if self._predictor is not None:
            x, prediction, past = self._predictor.step(rev, x, t, s, past, draw)
        if self._corrector is not None:
            past = without_ahead(past, s)
            if not self.corrector_first:
                x = self._corrector.correct(rev, x, s, shrink, draw)
        return Step(x, prediction, past)

    def finish(self, rev: ReverseSDE, x: Tensor, t: Knot, s: Knot, past: Past, draw: Draw) -> Step:
        """The posterior mean; the published order corrects before it, at the last noisy level too."""
        return super().finish(rev, self._correct_first(rev, x, t, s, draw), t, s, past, draw)

    def _correct_first(self, rev: ReverseSDE, x: Tensor, t: Knot, s: Knot, draw: Draw) -> Tensor:
        if not self.corrector_first or self._corrector is None:
            return x
        return self._corrector.correct(rev, x, t, (t.alpha / s.alpha) * (t.alpha / s.alpha), draw)
