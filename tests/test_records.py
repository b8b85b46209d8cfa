"""Which shards a pattern names, in which format, and sources that are joined."""

import pytest

from data import records

# ---------------------------------------------------------------------------------------------------------------------
# Patterns


@pytest.fixture
def tree(tmp_path):
    for name in (
        "a/08.tar",
        "a/09.tar",
        "a/10.tar",
        "b/x.tar",
        "b/y.tar",
        "b/note.txt",
        "c[1].tar",
        "d/07.tar",
        "d/17.tar",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("T/a/09.tar", ["a/09.tar"]),
        ("T/a/{08..10}.tar", ["a/08.tar", "a/09.tar", "a/10.tar"]),
        ("T/a/{08..09}.tar::T/b", ["a/08.tar", "a/09.tar", "b/x.tar", "b/y.tar"]),
        ("T/{d,d}/{0..1}{7..7}.tar", ["d/07.tar", "d/17.tar", "d/07.tar", "d/17.tar"]),
        ("T/[ab]/[0-9]*.tar", ["a/08.tar", "a/09.tar", "a/10.tar"]),
        ("T/a", ["a/08.tar", "a/09.tar", "a/10.tar"]),
        ("T/{a,b}", ["a/08.tar", "a/09.tar", "a/10.tar", "b/x.tar", "b/y.tar"]),
        ("T/c[1].tar", ["c[1].tar"]),
        ("T/a/09.tar::T/a/09.tar", ["a/09.tar", "a/09.tar"]),
    ],
)
def test_patterns(tree, pattern, expected):
    assert records.expand(pattern.replace("T", str(tree))) == [str(tree / name) for name in expected]


def test_lists_and_paths(tree):
    assert records.expand([tree / "b", f"{tree}/a/{{08..09}}.tar"]) == [
        str(tree / name) for name in ("b/x.tar", "b/y.tar", "a/08.tar", "a/09.tar")
    ]
    assert records.expand((str(tree / "a/08.tar"),)) == [str(tree / "a/08.tar")]


@pytest.mark.parametrize("pattern", ["T/a/{08..12}.tar", "T/none-*.tar", "T/empty", "T/a/08.tar::T/d.tar", ""])
def test_a_pattern_without_files_is_named(tree, pattern):
    pattern = pattern.replace("T", str(tree))
    with pytest.raises(FileNotFoundError) as raised:
        records.expand(pattern)
    assert repr(pattern.split("::")[-1]) in str(raised.value)


def test_missing_files_of_a_range_are_counted(tree):
    with pytest.raises(FileNotFoundError, match=r"11\.tar' and 1 more"):
        records.expand(f"{tree}/a/{{08..12}}.tar")


@pytest.mark.parametrize("shards", [None, 3, [b"x"], {"a": 1}])
def test_shards_of_a_wrong_type(shards):
    with pytest.raises(TypeError, match="shards must be"):
        records.expand(shards)


def test_no_shards():
    with pytest.raises(FileNotFoundError, match="empty"):
        records.expand([])
