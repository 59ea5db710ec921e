"""What the model servers publish of their configuration files, as far as a bundle's files could use it.

Written by hand from NVIDIA Triton's ``model_config.proto`` (triton-inference-server/common, package ``inference``) and from
the JSON schema in OpenVINO Model Server's ``src/schema.cpp`` (openvinotoolkit/model_server): names, types, enumerators, and
what is required. Messages that a bundle has no use for are there by name, and empty.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

ENUMS = {
    "DataType": [
        *("TYPE_INVALID", "TYPE_BOOL", "TYPE_UINT8", "TYPE_UINT16", "TYPE_UINT32", "TYPE_UINT64", "TYPE_INT8", "TYPE_INT16"),
        *("TYPE_INT32", "TYPE_INT64", "TYPE_FP16", "TYPE_FP32", "TYPE_FP64", "TYPE_STRING", "TYPE_BF16"),
    ],
    "Kind": ["KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"],
    "Format": ["FORMAT_NONE", "FORMAT_NHWC", "FORMAT_NCHW"],
}

# Field, type, number; a star for repeated ones.
MESSAGES = {
    "ModelInput": """name string 1, data_type DataType 2, format Format 3, dims int64* 4, reshape ModelTensorReshape 5,
        is_shape_tensor bool 6, allow_ragged_batch bool 7, optional bool 8, is_non_linear_format_io bool 9""",
    "ModelOutput": """name string 1, data_type DataType 2, dims int64* 3, label_filename string 4,
        reshape ModelTensorReshape 5, is_shape_tensor bool 6, is_non_linear_format_io bool 7""",
    "ModelTensorReshape": "shape int64* 1",
    "ModelInstanceGroup": """name string 1, count int32 2, gpus int32* 3, kind Kind 4, profile string* 5,
        rate_limiter ModelRateLimiter 6, passive bool 7, secondary_devices SecondaryDevice* 8, host_policy string 9""",
    "ModelConfig": """name string 1, platform string 2, version_policy ModelVersionPolicy 3, max_batch_size int32 4,
        input ModelInput* 5, output ModelOutput* 6, instance_group ModelInstanceGroup* 7, default_model_filename string 8,
        cc_model_filenames Entry* 9, metric_tags Entry* 10, dynamic_batching ModelDynamicBatching 11,
        optimization ModelOptimizationPolicy 12, sequence_batching ModelSequenceBatching 13, parameters Entry* 14,
        ensemble_scheduling ModelEnsembling 15, model_warmup ModelWarmup* 16, backend string 17,
        model_operations ModelOperations 18, model_transaction_policy ModelTransactionPolicy 19, batch_input BatchInput* 20,
        batch_output BatchOutput* 21, model_repository_agents ModelRepositoryAgents 23, response_cache ModelResponseCache 24,
        runtime string 25, model_metrics ModelMetrics 26""",
}

_TEXT_OR_MAP = {"type": ["object", "string"]}

OVMS_MODEL: dict[str, Any] = {
    "type": "object",
    "required": ["name", "base_path"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string"},
        "base_path": {"type": "string"},
        "batch_size": {"type": ["integer", "string"], "minimum": 0},
        "graph_path": {"type": "string"},
        "subconfig": {"type": "string"},
        "model_version_policy": {"type": "object"},
        "shape": _TEXT_OR_MAP,
        "layout": _TEXT_OR_MAP,
        "nireq": {"type": "integer", "minimum": 0},
        "target_device": {"type": "string"},
        "allow_cache": {"type": "boolean"},
        "plugin_config": {"type": "object", "additionalProperties": {"type": ["string", "boolean", "number", "integer"]}},
        "stateful": {"type": "boolean"},
        "idle_sequence_cleanup": {"type": "boolean"},
        "low_latency_transformation": {"type": "boolean"},
        "max_sequence_number": {"type": "integer", "minimum": 0},
        "custom_loader_options": {"type": "object", "required": ["loader_name"]},
    },
}

OVMS: dict[str, Any] = {
    "type": "object",
    "required": ["model_config_list"],
    "additionalProperties": False,
    "properties": {
        "model_config_list": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["config"],
                "additionalProperties": False,
                "properties": {"config": OVMS_MODEL},
            },
        },
        **{f"{name}_list": {"type": "array"} for name in ("custom_loader_config", "pipeline_config", "mediapipe_config")},
        "custom_node_library_config_list": {"type": "array"},
        "monitoring": {"type": "object", "required": ["metrics"]},
    },
}

_JSON_TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
}


def against_schema(value: Any, schema: Any, place: str = "") -> list[str]:
    """Return what a JSON value breaks of a schema, as far as the schemas above go."""
    kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    if not any(type(value) is _JSON_TYPES[kind] for kind in kinds):
        return [f"{place}: {type(value).__name__} is not {' or '.join(kinds)}"]
    if isinstance(value, list):
        return [line for entry in value if "items" in schema for line in against_schema(entry, schema["items"], place)]
    if not isinstance(value, dict):
        return [f"{place}: {value} is too small"] if isinstance(value, int) and value < schema.get("minimum", value) else []
    wrong = [f"{place}: no '{name}'" for name in schema.get("required", []) if name not in value]
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name, entry in value.items():
        if name in known or isinstance(others, dict):
            wrong += against_schema(entry, known.get(name, others), f"{place}/{name}")
        elif not others:
            wrong.append(f"{place}: unknown '{name}'")
    return wrong


def triton_config(text: str) -> Any:
    """Read a ``config.pbtxt`` as protobuf does: a field, type or enumerator that is not published raises ``ParseError``."""
    return text_format.Parse(text, _model_config()())


@cache
def _model_config() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference", syntax="proto3")
    for name, members in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, member in enumerate(members):
            enum.value.add(name=member, number=number)
    kinds = descriptor_pb2.FieldDescriptorProto
    empty = set()
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for words in fields.split(","):
            field_name, kind, number = words.split()
            field = message.field.add(name=field_name, number=int(number))
            field.label = kinds.LABEL_REPEATED if kind.endswith("*") else kinds.LABEL_OPTIONAL
            kind = kind.rstrip("*")
            if kind in {"string", "bool", "int32", "int64"}:
                field.type = getattr(kinds, f"TYPE_{kind.upper()}")
                continue
            field.type, field.type_name = kinds.TYPE_ENUM if kind in ENUMS else kinds.TYPE_MESSAGE, f".inference.{kind}"
            empty |= {kind} - set(ENUMS) - set(MESSAGES)
    for name in sorted(empty):
        file.message_type.add(name=name)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))
