"""How the range of an activation follows from what calibration shows."""

from __future__ import annotations

from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix
from nncf.quantization.range_estimator import (
    AggregatorType,
    RangeEstimatorParameters,
    StatisticsCollectorParameters,
    StatisticsType,
)

OVERFLOW_FIXES = {
    "disable": OverflowFix.DISABLE,
    "first_layer": OverflowFix.FIRST_LAYER,
    "enable": OverflowFix.ENABLE,
}


OUTLIERS = {"unsigned": 1e-4, "signed": 1e-3}
"""Share of a sample's values that ``quantile`` lets lie beyond the range, at each end, by what stands behind a ReLU.

Signed quantizers spend half of their steps on negative values that are not there behind a ReLU: with steps twice as wide
rounding weighs more, and it pays to leave out more.
"""


def advanced_parameters(ranges: str, overflow_fix: str, *, signed: bool = False) -> AdvancedQuantizationParameters:
    """Return NNCF's parameters for both of its backends.

    NNCF takes the mean over samples of their largest value and clips what is beyond. Teacher and student are then clipped
    differently just where activations are strongest, and where the student has learnt its teacher well that outweighs what
    is left of their distance: the maps of a well trained STFPM were 4 times as far off as they are high. With the largest
    value of all samples they are 13 % off; but then a single pixel of a single image can set the steps for all.

    Args:
        ranges: ``whole`` takes the smallest and largest value of all samples; ``quantile`` the same without the outermost
            ``OUTLIERS`` of each sample; ``mean`` is NNCF's.
        overflow_fix: ``disable``, ``first_layer`` or ``enable``.
        signed: All quantizers are signed.
    """
    if ranges == "mean":
        return AdvancedQuantizationParameters(overflow_fix=OVERFLOW_FIXES[overflow_fix])
    low, high = (
        StatisticsCollectorParameters(
            statistics_type=extreme if ranges == "whole" else StatisticsType.QUANTILE,
            aggregator_type=over_samples,
            quantile_outlier_prob=OUTLIERS["signed" if signed else "unsigned"],
        )
        for extreme, over_samples in ((StatisticsType.MIN, AggregatorType.MIN), (StatisticsType.MAX, AggregatorType.MAX))
    )
    return AdvancedQuantizationParameters(
        overflow_fix=OVERFLOW_FIXES[overflow_fix],
        activations_range_estimator_params=RangeEstimatorParameters(min=low, max=high),
    )
