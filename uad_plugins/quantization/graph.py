"""A network as a graph of operations, whatever framework it is in: where its convolutions end and its head begins.

The *head* is the arithmetic of the anomaly map: every node from which no convolution of the network can be reached any
more. A *gate* is what a tensor is multiplied by, and then perhaps shifted by, that was worked out of means over all pixels:
squeeze-and-excitation, conditional normalization. Both stay float. A filter over a single channel (the smoothing of a map)
is no convolution in this sense, nor is one of a gate. The rules need no names, so they hold for methods that nobody has
seen yet.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

CONV, TRANSPOSED, ADD, MULTIPLY, MEAN, NORM, CONSTANT, INPUT = (
    "conv",
    "transposed",
    "add",
    "multiply",
    "mean of all pixels",
    "norm",
    "constant",
    "input",
)
"""Kinds that mean the same in every framework; all other kinds keep the framework's own names."""


@dataclass
class Graph:
    """Operations and the tensors between them.

    Attributes:
        kinds: Kind of each node.
        inputs: Producers of each node, by port.
        outputs: Consumers of each node.
        channels: Input channels of each convolution.
    """

    kinds: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, dict[int, str]] = field(default_factory=lambda: defaultdict(dict))
    outputs: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    channels: dict[str, int] = field(default_factory=dict)

    def connect(self, producer: str, consumer: str, port: int) -> None:
        """Note that a node takes another's result at a port."""
        self.inputs[consumer][port] = producer
        self.outputs[producer].append(consumer)

    def convolutions(self) -> list[str]:
        """Return the convolutions of the network: those over more than one channel, and not of gates."""
        many = [name for name, kind in self.kinds.items() if kind in {CONV, TRANSPOSED} and self.channels.get(name, 0) > 1]
        gates = self.gates()
        return [name for name in many if name not in gates]

    def before(self, names: Iterable[str]) -> set[str]:
        """Return the nodes from which one of the named can be reached, the named included."""
        return _reach(names, lambda name: self.inputs.get(name, {}).values())

    def after(self, names: Iterable[str]) -> set[str]:
        """Return the nodes that can be reached from one of the named, the named included."""
        return _reach(names, lambda name: self.outputs.get(name, ()))

    def moving(self) -> set[str]:
        """Return the nodes whose result depends on the network's input."""
        return self.after(name for name, kind in self.kinds.items() if kind == INPUT)

    def head(self) -> set[str]:
        """Return the nodes behind the last convolutions."""
        return set(self.kinds) - self.before(self.convolutions())

    def gates(self) -> set[str]:
        """Return the nodes of gates: from the mean over all pixels to what applies to all of them what is made of it.

        Their convolutions are taken to see one pixel of each image: they cost nothing, and what they say is said of all
        pixels. A decoder that began with such a mean would be taken for a gate as well. Arithmetic of which only such means
        are taken, as the squares of a variance, belongs to the gate.
        """
        moving = self.moving()
        means = {name for name in moving if self.kinds[name] == MEAN}
        # Beside a mean there may be another way, as from an encoder's features to those of its decoder.
        inputs = [name for name, kind in self.kinds.items() if kind == INPUT]
        by_pixel = _reach(inputs, lambda name: () if name in means else self.outputs.get(name, ()))
        of_image = means | (moving - by_pixel)
        found: set[str] = set()
        for kind in (MULTIPLY, ADD):
            for name in (each for each, its in self.kinds.items() if its == kind):
                operands = {self.inputs[name].get(port, "") for port in (0, 1)}
                gate, gated = operands & of_image, (operands & moving) - of_image
                # A shift follows a factor: what is added to anything else is a sum of its own.
                if gate and gated and (kind == MULTIPLY or gated <= found):
                    between = _reach(gate, lambda each: () if each in means else self.inputs.get(each, {}).values())
                    found |= {name} | between & of_image
        return found | self._summed_up(found & means, moving)

    def _summed_up(self, means: set[str], moving: set[str]) -> set[str]:
        """Return the arithmetic, of what moves, between convolutions and means that leads to these means alone."""
        found = set(means)
        waiting = [source for name in means for source in self.inputs[name].values()]
        while waiting:
            name = waiting.pop()
            inside = name in moving and self.kinds[name] not in {CONV, TRANSPOSED, INPUT}
            if inside and name not in found and found.issuperset(self.outputs[name]):
                found.add(name)
                waiting.extend(self.inputs[name].values())
        return found

    def additions(self) -> list[tuple[str, str, str]]:
        """Return the residual additions before the head as ``(addition, main branch, skip branch)``.

        A branch is named by the node that feeds the addition. The skip branch is the one with fewer convolutions of its own:
        none where it is the block's input, one where it projects to another shape.
        """
        convolutions, moving = set(self.convolutions()), self.moving()
        left_out = self.head() | self.gates()
        found = []
        for name, kind in self.kinds.items():
            branches = [self.inputs[name].get(port, "") for port in (0, 1)] if kind == ADD else []
            if name in left_out or len(branches) != 2 or not all(branch in moving for branch in branches):
                continue
            left, right = self.before(branches[:1]), self.before(branches[1:])
            if not (left | right) & convolutions:
                continue
            swap = len((left - right) & convolutions) < len((right - left) & convolutions)
            main, skip = reversed(branches) if swap else branches
            found.append((name, main, skip))
        return found


def _reach(start: Iterable[str], neighbours: Callable[[str], Iterable[str]]) -> set[str]:
    reached: set[str] = set()
    waiting = list(start)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting.extend(neighbours(name))
    return reached
