"""What the ONNX parser of each version of TensorRT takes: operators and opset.

8.5 and 10.15 are the tables that onnx-tensorrt publishes with these versions (``docs/operators.md``). 8.6 and 10.3 are the
table before with what the changelog adds; where it has forgotten some, a graph is held for worse than it is. The opset of 11
is the one of NVIDIA's opset guide, its operators are those of 10.15.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Parser:
    """The ONNX parser of a version of TensorRT.

    Attributes:
        max_opset: Newest opset that it reads.
        operators: Operators of the domain ``ai.onnx`` that it takes.
    """

    max_opset: int
    operators: frozenset[str]


_TABLE = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast Ceil Celu Clip Concat
Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal
Erf Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool
Greater GreaterOrEqual GridSample GRU HardSigmoid HardSwish Identity If ImageScaler InstanceNormalization IsNaN
LeakyRelu Less LessOrEqual Log LogSoftmax Loop LRN LSTM LpNormalization LpPool MatMul Max MaxPool Mean
MeanVarianceNormalization Min Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or Pad ParametricSoftplus Pow PRelu
QuantizeLinear RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal ReduceL1 ReduceL2
ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize
ReverseSequence RNN RoiAlign Round ScaledTanh Scan Scatter ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin
Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK
Transpose Trilu Unsqueeze Upsample Where Xor
"""
_8_5 = frozenset(_TABLE.split())
_8_6 = _8_5 | {"GroupNormalization", "IsInf", "LayerNormalization"}
_10_3 = _8_6 | {"DeformConv", "Hardmax"}
_10_15 = _10_3 | {
    *("Attention", "BlackmanWindow", "CastLike", "Gelu", "HammingWindow", "HannWindow", "Mish", "RMSNormalization"),
    *("RotaryEmbedding", "STFT", "TensorScatter"),
}

PARSERS = {
    "8.5": Parser(17, _8_5),
    "8.6": Parser(17, _8_6),
    "10.3": Parser(20, _10_3),
    "10.15": Parser(24, _10_15),
    "11": Parser(25, _10_15),
}
"""By version, oldest first. JetPack 5 has 8.5, JetPack 6.0 has 8.6, JetPack 6.1 and 6.2 have 10.3."""

OLDEST = "8.5"
