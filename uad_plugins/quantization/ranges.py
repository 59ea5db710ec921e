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


def advanced_parameters(ranges: str, overflow_fix: str) -> AdvancedQuantizationParameters:
    """Return NNCF's parameters for both of its backends.

    NNCF takes the mean over samples of their largest value and clips what is beyond. Teacher and student are then clipped
    differently just where activations are strongest, and where the student has learnt its teacher well that outweighs what
    is left of their distance: the maps of a well trained STFPM were 4 times as far off as they are high. With the largest
    value of all samples they are 13 % off.

    Args:
        ranges: ``whole`` takes the smallest and largest value of all samples, ``mean`` is NNCF's.
        overflow_fix: ``disable``, ``first_layer`` or ``enable``.
    """
    if ranges == "mean":
        return AdvancedQuantizationParameters(overflow_fix=OVERFLOW_FIXES[overflow_fix])
    low = StatisticsCollectorParameters(statistics_type=StatisticsType.MIN, aggregator_type=AggregatorType.MIN)
    high = StatisticsCollectorParameters(statistics_type=StatisticsType.MAX, aggregator_type=AggregatorType.MAX)
    return AdvancedQuantizationParameters(
        overflow_fix=OVERFLOW_FIXES[overflow_fix],
        activations_range_estimator_params=RangeEstimatorParameters(min=low, max=high),
    )
