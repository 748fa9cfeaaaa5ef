"""Objectives: what is trained, and on what loss. ``OBJECTIVES`` names them."""

from collections.abc import Mapping

from scoresde.objectives.clocks import Times
from scoresde.objectives.denoising import EDM, DenoisingScoreMatching
from scoresde.objectives.metrics import METRICS, HalfSquareSum, MeanAbsolute, MeanSquare, Metric, PseudoHuber
from scoresde.objectives.objective import At, Average, Objective
from scoresde.objectives.times import (
    TIMES,
    CosineTimes,
    HalfLogSNRTimes,
    ImportanceTimes,
    LaplaceTimes,
    LogitNormalTimes,
    LogNormalTimes,
    UniformTimes,
)
from scoresde.objectives.uncertainty import Uncertainty
from scoresde.objectives.weightings import (
    WEIGHTINGS,
    DataWeighting,
    EDMWeighting,
    FlowWeighting,
    LikelihoodWeighting,
    MinSNRWeighting,
    P2Weighting,
    RawWeighting,
    SigmoidWeighting,
    SoftMinSNRWeighting,
    TruncatedSNRWeighting,
    UniformWeighting,
    VWeighting,
    Weighting,
)
from sde_lib import Table

OBJECTIVES: Mapping[str, type[Objective]] = Table(Objective, {"denoising": DenoisingScoreMatching, "edm": EDM})
"""Name -> class, built with the model and its options. A new one is a file and a line here."""

__all__ = [
    "EDM",
    "METRICS",
    "OBJECTIVES",
    "TIMES",
    "WEIGHTINGS",
    "At",
    "Average",
    "CosineTimes",
    "DataWeighting",
    "DenoisingScoreMatching",
    "EDMWeighting",
    "FlowWeighting",
    "HalfLogSNRTimes",
    "HalfSquareSum",
    "ImportanceTimes",
    "LaplaceTimes",
    "LikelihoodWeighting",
    "LogNormalTimes",
    "LogitNormalTimes",
    "MeanAbsolute",
    "MeanSquare",
    "Metric",
    "MinSNRWeighting",
    "Objective",
    "P2Weighting",
    "PseudoHuber",
    "RawWeighting",
    "SigmoidWeighting",
    "SoftMinSNRWeighting",
    "Times",
    "TruncatedSNRWeighting",
    "Uncertainty",
    "UniformTimes",
    "UniformWeighting",
    "VWeighting",
    "Weighting",
]
