"""Caption sampling: the reference's draws string by string, its law by statistics, records that must not kill a run."""

import collections
import json
import math
import pathlib
import random

import pytest

from data import captions
from data.captions import CaptionError

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden/caption_sampling.json").read_text())


def numbered(count: int) -> list[str]:
    return [f"c{index}" for index in range(count)]


@pytest.mark.parametrize("example", GOLDEN["split_caption"], ids=lambda example: ascii(example["text"]))
def test_split(example):
    assert captions.split(example["text"]) == example["out"]


def test_fields_and_joiner():
    assert list(captions.FIELDS) == GOLDEN["caption_order"]
    assert captions.join(["A cat", "A dog"]) == "A cat. A dog"


@pytest.mark.parametrize("example", GOLDEN["exact_examples_python_random_seeded"], ids=lambda e: f"n{e['n']}_k{e['k']}")
def test_draws_of_the_reference(example):
    rng = random.Random(example["python_random_seed"])
    drawn = captions.sample(numbered(example["n"]), rng, example["k"], example["max_merged_num"])
    assert drawn == example["sampled"]


DRAWS = 40_000


def _statistics(total: int) -> dict[str, float]:
    """The shares that the golden file lists, under flat names."""
    drawn = captions.sample(numbered(total), random.Random(total), DRAWS, GOLDEN["max_merged_num"])
    counts = collections.Counter()
    for caption in drawn:
        parts = [int(part[1:]) for part in caption.split(". ")]
        counts[f"merged {len(parts)}"] += 1
        counts["whole"] += parts == list(range(total))
        counts["duplicates"] += len(set(parts)) < len(parts)
        counts.update(f"contains {part}" for part in set(parts))
        if len(parts) == 1:
            counts[f"single {parts[0]}"] += 1
        elif parts == list(range(parts[0], parts[0] + len(parts))):
            counts[f"start {parts[0]} of {len(parts)}"] += 1
    return {name: count / DRAWS for name, count in counts.items()}


@pytest.mark.parametrize("total", [1, 2, 3, 4, 5, 8, 20])
def test_law(total):
    golden = GOLDEN["n"][str(total)]
    expected = {f"merged {m}": share for m, share in golden["frac_by_number_of_merged_captions"].items()}
    expected |= {f"single {i}": share for i, share in enumerate(golden["frac_single_by_caption"])}
    expected |= {f"contains {i}": share for i, share in enumerate(golden["frac_draws_containing_caption"])}
    for length in (2, 3):
        starts = golden[f"start_hist_of_consecutive_len{length}"]
        expected |= {f"start {start} of {length}": share for start, share in starts.items()}
    expected |= {"whole": golden["frac_equal_to_whole_list_in_order"], "duplicates": golden["frac_with_duplicates"]}
    found = _statistics(total)
    assert {name for name, share in found.items() if share > 1e-3} <= expected.keys()
    for name, share in expected.items():
        # Both sides are counts, and about 130 of them are compared: five standard deviations of their difference.
        deviation = math.sqrt(share * (1 - share) * (1 / golden["draws"] + 1 / DRAWS))
        assert abs(found.get(name, 0) - share) <= 5 * deviation + 1e-4, name


def test_last_window():
    """The reference never takes the last window as a run; the mended law takes all of them equally often."""

    def share_of_last_run(reference_windows: bool) -> float:
        drawn = captions.sample(numbered(5), random.Random(0), 30_000, 3, reference_windows)
        runs = collections.Counter(c for c in drawn if c in ("c0. c1", "c1. c2", "c2. c3", "c3. c4"))
        return runs["c3. c4"] / runs.total()

    # m = 2 of n = 5: half are runs, over 3 or 4 windows; of the other half, 20 ordered pairs, 4 look like runs.
    assert share_of_last_run(True) == pytest.approx((1 / 20) / (1 + 4 / 20), abs=0.01)
    assert share_of_last_run(False) == pytest.approx(1 / 4, abs=0.02)


def test_last_window_of_the_smallest_list():
    drawn = captions.sample(numbered(4), random.Random(1), 2000, 3, reference_windows=False)
    assert {"c0. c1. c2", "c1. c2. c3"} <= set(drawn)


def test_nothing_to_sample():
    with pytest.raises(CaptionError, match="no captions"):
        captions.sample([], random.Random(0))


def test_sentences_of_all_fields_in_order():
    record = {field: [f"{field} one", f"{field} two"] for field in reversed(captions.FIELDS)}
    expected = [f"{field} {number}" for field in captions.FIELDS for number in ("one", "two")]
    assert captions.sentences({**record, "url": 3, "width": None}) == expected


def test_list_items_stay_whole_and_strings_are_split():
    record = {
        "raw_caption": "A cat.",
        "longIB_captions": ["St. Mary, 3.5 m. High"],
        "longSV_captions": "One. Two\nThree",
        "longLLA_captions": "Four</s>Five.",
    }
    expected = ["A cat", "St. Mary, 3.5 m. High", "One", "Two", "Three", "Four", "Five"]
    assert captions.sentences(record) == expected


def test_unsplit_strings_are_never_sampled_by_letter():
    record = {field: "A brown dog runs. It has a red ball." for field in captions.FIELDS}
    drawn = captions.sample(captions.sentences(record), random.Random(0), 500)
    assert {part for caption in drawn for part in caption.split(". ")} == {"A brown dog runs", "It has a red ball"}


def test_empty_fields_add_nothing():
    record = {"raw_caption": ["A cat"], "shortIB_captions": [], "longIB_captions": None, "shortSV_captions": ""}
    record |= {"longSV_captions": " . \n", "shortLLA_captions": ["", "  ", "A dog"]}
    assert captions.sentences(record) == ["A cat", "A dog"]


def test_pixelprose():
    record = {"caption": "First one. Second two.", "raw_caption": ["left out"]}
    assert captions.sentences(record, fields=("caption",)) == ["First one", "Second two"]


@pytest.mark.parametrize("record", [{}, {"raw_caption": None}, {"raw_caption": [" "], "longSV_captions": "."}])
def test_record_without_captions(record):
    with pytest.raises(CaptionError, match=r"^no captions$"):
        captions.sentences(record)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "longIB_captions must be a string or a list of strings, not int"),
        (False, "longIB_captions must be a string or a list of strings, not bool"),
        ({"a": "b"}, "longIB_captions must be a string or a list of strings, not dict"),
        (["a", None], r"longIB_captions\[1\] must be a string, not NoneType"),
        (["a", "b", ["c"]], r"longIB_captions\[2\] must be a string, not list"),
    ],
)
def test_wrong_types_are_named(value, message):
    with pytest.raises(CaptionError, match=message):
        captions.sentences({"raw_caption": ["A cat"], "longIB_captions": value})


def test_record_that_is_no_object():
    with pytest.raises(CaptionError, match="must be a JSON object, not list"):
        captions.sentences(["A cat"])
