"""What of a torch network is quantized: its convolutions and what lies between them; all of it, or the student's alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from nncf.torch.function_hook import (
    is_wrapped,
    register_post_function_hook,
    register_pre_function_hook,
    wrap_model,
)
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import build_nncf_graph
from torch import nn

from uad_plugins.quantization.graph import ADD, CONSTANT, CONV, INPUT, MEAN, MULTIPLY, NORM, TRANSPOSED, Graph

KINDS = {
    "conv1d": CONV,
    "conv2d": CONV,
    "conv3d": CONV,
    "conv_transpose1d": TRANSPOSED,
    "conv_transpose2d": TRANSPOSED,
    "conv_transpose3d": TRANSPOSED,
    "add": ADD,
    "add_": ADD,
    "__add__": ADD,
    "__iadd__": ADD,
    "mul": MULTIPLY,
    "mul_": MULTIPLY,
    "__mul__": MULTIPLY,
    "__imul__": MULTIPLY,
    "batch_norm": NORM,
    "nncf_model_const": CONSTANT,
    "nncf_model_input": INPUT,
}
MEANS = {"mean", "adaptive_avg_pool2d"}
"""Operations that are a mean over all pixels where they leave one."""


@dataclass
class TorchGraph(Graph):
    """The operations that a torch network calls.

    Attributes:
        parameters: Name of the parameter or buffer, for nodes that are one.
    """

    parameters: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, example: torch.Tensor) -> TorchGraph:
        """Trace a network; ``example`` is a batch that it takes."""
        traced: Any = build_nncf_graph(model, example)
        graph = cls()
        for node in traced.get_all_nodes():
            name = node.node_name
            graph.kinds[name] = KINDS.get(node.node_type, node.node_type)
            if graph.kinds[name] == CONSTANT:
                graph.parameters[name] = node.layer_attributes.name
            if node.node_type in MEANS and all(set(edge.tensor_shape[2:]) <= {1} for edge in traced.get_output_edges(node)):
                graph.kinds[name] = MEAN
            for edge in traced.get_input_edges(node):
                if node.node_type == "expand_as" and edge.input_port_id == 1:
                    # Its shape is taken, not what is in it.
                    continue
                graph.connect(edge.from_node.node_name, name, edge.input_port_id)
                if graph.kinds[name] in {CONV, TRANSPOSED} and edge.input_port_id == 0:
                    graph.channels[name] = int(edge.tensor_shape[1])
        return graph

    def convolutions_of(self, parameters: set[str]) -> list[str]:
        """Return the convolutions whose weight is one of the named parameters."""
        return [n for n in self.convolutions() if self.parameters.get(self.inputs[n].get(1, "")) in parameters]

    def normalized(self, convolution: str) -> str:
        """Return the normalization that alone takes what a convolution gives; the convolution itself where there is none."""
        after = self.outputs.get(convolution, [])
        return after[0] if len(after) == 1 and self.kinds[after[0]] == NORM else convolution

    def shared(self) -> set[str]:
        """Return the parameters that have a part in more than one operation."""
        uses = Counter(dict.fromkeys(self.parameters.values(), 0))
        for node, name in self.parameters.items():
            uses[name] += len(self.outputs[node])
        return {name for name, count in uses.items() if count > 1}

    def ignored(self, student: set[str] | None) -> list[str]:
        """Return the nodes that get no quantizer.

        Args:
            student: Quantize only the convolutions of these parameters, and what lies behind them; None: all.
        """
        left_out = self.head() | self.gates()
        if student is not None:
            chosen = self.convolutions_of(student)
            left_out |= set(self.kinds) - self.after(chosen)
            left_out |= set(self.convolutions()) - set(chosen)
        return sorted(name for name in left_out if self.kinds[name] not in {CONSTANT, INPUT})


@contextmanager
def watching(model: nn.Module, watchers: Mapping[str, nn.Module], *, inputs: bool) -> Iterator[nn.Module]:
    """Yield a network that hands tensors through modules that look at them; it computes no gradients meanwhile.

    Args:
        model: Network; watched itself where it has hooks of NNCF already, else a copy is: its own hooks are for its
            quantizers.
        watchers: What looks, by the operation that it looks at; each returns the tensor that it gets.
        inputs: At the operation's first input, instead of at what it gives.
    """
    watched = model if is_wrapped(model) else wrap_model(deepcopy(model))
    register = register_pre_function_hook if inputs else register_post_function_hook
    handles = [register(watched, place, 0, watcher) for place, watcher in watchers.items()]
    try:
        with torch.no_grad():
            yield watched
    finally:
        for handle in handles:
            handle.remove()
