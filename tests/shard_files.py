"""Shards that tests make."""

import io
import tarfile

from array_record.python import array_record_module


def write_tar(path, members, **options) -> str:
    """`members`: (name, bytes), or a TarInfo without content."""
    with tarfile.open(path, "w", **options) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, content = member
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def samples(*keys, extension="jpg"):
    """Members of a tar: an image and a json of each key."""
    return [
        member
        for key in keys
        for member in ((f"{key}.{extension}", b"I" + key.encode()), (f"{key}.json", b"J" + key.encode()))
    ]


def write_array_record(path, contents) -> str:
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for content in contents:
        writer.write(content)
    writer.close()
    return str(path)


def write_tfrecord(path, contents, compression="") -> str:
    import tensorflow as tf

    with tf.io.TFRecordWriter(str(path), tf.io.TFRecordOptions(compression_type=compression)) as writer:
        for content in contents:
            writer.write(content)
    return str(path)
