"""Image-caption records in tf.train.Example, which ArrayRecord, TFRecord and TensorFlow Datasets hold.

Features of an Example:
  the image: the first of `IMAGE_FEATURES`, encoded (JPEG, PNG, WebP).
  json: an object with the caption fields, as text. Where there is none, one is made of the other features: a text, a
    number, or a list where a feature has not exactly one value. Bytes that are not UTF-8, such as a mask or a text of
    another encoding, become {"not UTF-8": number of bytes}: a record whose captions they are is then refused by name,
    instead of losing them.
  key: names the record in messages. Where there is none, the file and the number of the record do.

TensorFlow is not needed, and not loaded: the messages are parsed by protobuf alone.
"""

import json
import os
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from flair_jax.data.sources.base import Record, RecordError

IMAGE_FEATURES = ("image", "image/encoded", "jpg", "jpeg", "png", "webp")


def _example_class() -> type[message.Message]:
    """The message class of tf.train.Example, from the published numbers of its fields.

    It lives in a pool of its own, so that it does not clash with TensorFlow's where that is loaded too.
    """
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="data/example.proto", package="data", syntax="proto3")

    def add(name: str, *fields: tuple[str, int, Any], repeated: bool = False) -> descriptor_pb2.DescriptorProto:
        declared = file.message_type.add(name=name)
        for number, (field_name, kind) in enumerate(fields, start=1):
            added = declared.field.add(name=field_name, number=number)
            added.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            added.type = field.TYPE_MESSAGE if isinstance(kind, str) else kind
            if isinstance(kind, str):
                added.type_name = f".data.{kind}"
        return declared

    add("BytesList", ("value", field.TYPE_BYTES), repeated=True)
    add("FloatList", ("value", field.TYPE_FLOAT), repeated=True)
    add("Int64List", ("value", field.TYPE_INT64), repeated=True)
    feature = add("Feature", ("bytes_list", "BytesList"), ("float_list", "FloatList"), ("int64_list", "Int64List"))
    feature.oneof_decl.add(name="kind")
    for alternative in feature.field:
        alternative.oneof_index = 0
    features = add("Features", ("feature", "Features.FeatureEntry"), repeated=True)
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    entry.field.add(
        name="value", number=2, type=field.TYPE_MESSAGE, type_name=".data.Feature", label=field.LABEL_OPTIONAL
    )
    add("Example", ("features", "Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("data.Example"))


Example = _example_class()


def parse(content: bytes, shard: str, key: str) -> Record:
    """The record that a serialised Example holds; `key` is for those that have none of their own.

    Raises:
      RecordError: the bytes are no Example, or one without an image, or with features of other types.
    """
    try:
        features = Example.FromString(content).features.feature
    except message.DecodeError as error:
        raise RecordError(f"the record is not a tf.train.Example: {error}") from error
    name = next((name for name in IMAGE_FEATURES if name in features), None)
    if name is None:
        found = ", ".join(sorted(features)[:20]) or "none"
        raise RecordError(f"the Example has no image ({'|'.join(IMAGE_FEATURES)}); its features: {found}")
    image = _single_bytes(features, name)
    if "key" in features and features["key"].WhichOneof("kind") == "bytes_list":
        key = _single_bytes(features, "key").decode("utf-8", "backslashreplace")
    if "json" in features:
        return Record(key, shard, image, _single_bytes(features, "json"))
    fields = {name: _value(feature) for name, feature in sorted(features.items()) if name not in IMAGE_FEATURES}
    return Record(key, shard, image, json.dumps(fields).encode())


def _single_bytes(features, name: str) -> bytes:
    values = features[name].bytes_list.value
    if len(values) != 1:
        kind = features[name].WhichOneof("kind") or "nothing"
        raise RecordError(f"feature {name!r} of the Example: expected one string of bytes, not {len(values)} in {kind}")
    return values[0]


def _value(feature) -> Any:
    """What a feature is in a JSON object."""
    kind = feature.WhichOneof("kind")
    values = list(getattr(feature, kind).value) if kind else []
    if kind == "bytes_list":
        values = [_text(value) for value in values]
    return values[0] if len(values) == 1 else values


def _text(value: bytes) -> str | dict[str, int]:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"not UTF-8": len(value)}


def numbered_key(path: str, number: int) -> str:
    """The key of a record that has none of its own."""
    return f"{os.path.basename(path)}:{number}"
