"""The names of an ONNX file's nodes, read without the onnx package.

TensorRT 8 says of a node it cannot take only which number it has. An ONNX file is a protocol buffer: fields, each a key
(number and kind) and a value. Four are of interest: the model's graph, the graph's nodes, a node's name and operator.
"""

from __future__ import annotations

from typing import Any, Iterator

_GRAPH, _NODE, _NAME, _OPERATOR = 7, 1, 3, 4
_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5


def node_names(model: bytes) -> list[str]:
    """Return ``name (operator)`` of every node, in the file's order; empty if the file is not ONNX."""
    found = []
    try:
        for graph in _messages(memoryview(model), _GRAPH):
            for node in _messages(graph, _NODE):
                name, operator = (b"".join(map(bytes, _messages(node, field))).decode() for field in (_NAME, _OPERATOR))
                found.append(f"{name} ({operator})")
    except (IndexError, ValueError):
        return []
    return found


def _messages(buffer: memoryview, wanted: int) -> Iterator[Any]:
    position = 0
    while position < len(buffer):
        key, position = _varint(buffer, position)
        field, kind = key >> 3, key & 7
        if kind == _VARINT:
            _, position = _varint(buffer, position)
        elif kind == _LENGTH:
            size, position = _varint(buffer, position)
            if position + size > len(buffer):
                raise ValueError("truncated")
            if field == wanted:
                yield buffer[position : position + size]
            position += size
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            position += 8 if kind == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"unknown kind of field {kind}")


def _varint(buffer: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = buffer[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
