"""Caption sampling: the reference's draws string by string, its law by statistics, records that must not kill a run."""

import collections
import dataclasses
import math
import random
import time

import pytest
from conftest import load_golden

from flair_jax.configs import base
from flair_jax.data.prepare import rows
from flair_jax.data.transforms import captions
from flair_jax.data.transforms.captions import CaptionError, CaptionOptions

GOLDEN = load_golden("caption_sampling.json")


def numbered(count: int) -> list[str]:
    return [f"c{index}" for index in range(count)]


@pytest.mark.golden
@pytest.mark.parametrize("example", GOLDEN["split_caption"], ids=lambda example: ascii(example["text"]))
def test_split(example):
    assert captions.split(example["text"]) == example["out"]


def test_configs_begin_with_the_same_defaults():
    """Configs may import nothing of ours, so the list of fields stands there again."""
    assert base.get_config().data.captions.to_dict() == dataclasses.asdict(CaptionOptions())


@pytest.mark.golden
def test_fields_and_joiner():
    assert list(captions.FIELDS) == GOLDEN["caption_order"]
    assert captions.join(["A cat", "A dog"]) == "A cat. A dog"


@pytest.mark.golden
@pytest.mark.parametrize("example", GOLDEN["exact_examples_python_random_seeded"], ids=lambda e: f"n{e['n']}_k{e['k']}")
def test_draws_of_the_reference(example):
    rng = random.Random(example["python_random_seed"])
    options = CaptionOptions(count=example["k"], max_merged=example["max_merged_num"])
    drawn = captions.sample(numbered(example["n"]), rng, options)
    assert drawn == example["sampled"]


DRAWS = 40_000


def _statistics(total: int) -> dict[str, float]:
    """The shares that the golden file lists, under flat names."""
    options = CaptionOptions(count=DRAWS, max_merged=GOLDEN["max_merged_num"])
    drawn = captions.sample(numbered(total), random.Random(total), options)
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


@pytest.mark.golden
@pytest.mark.parametrize("total", [int(total) for total in GOLDEN["n"]])
def test_law(total):
    golden = GOLDEN["n"][str(total)]
    expected = {f"merged {m}": share for m, share in golden["frac_by_number_of_merged_captions"].items()}
    expected |= {f"single {i}": share for i, share in enumerate(golden["frac_single_by_caption"])}
    expected |= {f"contains {i}": share for i, share in enumerate(golden["frac_draws_containing_caption"])}
    for length in range(2, GOLDEN["max_merged_num"] + 1):
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
        options = CaptionOptions(count=30_000, reference_windows=reference_windows)
        drawn = captions.sample(numbered(5), random.Random(0), options)
        runs = collections.Counter(c for c in drawn if c in ("c0. c1", "c1. c2", "c2. c3", "c3. c4"))
        return runs["c3. c4"] / runs.total()

    # m = 2 of n = 5: half are runs, over 3 or 4 windows; of the other half, 20 ordered pairs, 4 look like runs.
    assert share_of_last_run(True) == pytest.approx((1 / 20) / (1 + 4 / 20), abs=0.01)
    assert share_of_last_run(False) == pytest.approx(1 / 4, abs=0.02)


def test_last_window_of_the_smallest_list():
    drawn = captions.sample(numbered(4), random.Random(1), CaptionOptions(count=2000, reference_windows=False))
    assert {"c0. c1. c2", "c1. c2. c3"} <= set(drawn)


# The switches of the ablations


def parts_drawn(total: int, **options) -> list[list[int]]:
    """The numbers of the sentences in each of many captions."""
    drawn = captions.sample(numbered(total), random.Random(2), CaptionOptions(count=3000, **options))
    return [[int(part[1:]) for part in caption.split(". ")] for caption in drawn]


def is_run(parts: list[int]) -> bool:
    return parts == list(range(parts[0], parts[0] + len(parts)))


def test_consecutive_only():
    drawn = parts_drawn(6, merging="consecutive", reference_windows=False)
    assert all(map(is_run, drawn))
    shares = collections.Counter(tuple(parts) for parts in drawn)
    assert len(shares) == 6 + 5 + 4
    for parts, count in shares.items():  # a third for each length, and all its windows alike
        assert count / len(drawn) == pytest.approx(1 / 3 / (7 - len(parts)), abs=0.02)


def test_scattered_only():
    drawn = parts_drawn(6, merging="scattered")
    assert all(len(set(parts)) == len(parts) for parts in drawn)
    pairs = [parts for parts in drawn if len(parts) == 2]
    assert sum(map(is_run, pairs)) / len(pairs) == pytest.approx(5 / 30, abs=0.04)


@pytest.mark.parametrize("merging", captions.MERGINGS)
@pytest.mark.parametrize("merged", [1, 2, 4])
def test_fixed_number_of_sentences(merging, merged):
    drawn = parts_drawn(6, merging=merging, min_merged=merged, max_merged=merged)
    assert {len(parts) for parts in drawn} == {merged}
    assert {part for parts in drawn for part in parts} >= set(range(5))


def test_range_of_the_number_of_sentences():
    lengths = collections.Counter(len(parts) for parts in parts_drawn(9, min_merged=2, max_merged=4))
    assert set(lengths) == {2, 3, 4} and min(lengths.values()) > 800


def test_without_merging():
    shares = collections.Counter(parts[0] for parts in parts_drawn(3, max_merged=1) if len(parts) == 1)
    assert shares.total() == 3000 and min(shares.values()) > 800


def test_first_caption_only():
    record = {"longSV_captions": "A long one. Its second", "raw_caption": ["The first", "The second"]}
    options = CaptionOptions(count=2, first=1, max_merged=1)
    for seed in range(5):
        assert captions.draw(record, random.Random(seed), options) == ["The first"] * 2
    options = CaptionOptions(count=2, first=1, fields=("longSV_captions",), max_merged=1)
    assert captions.draw(record, random.Random(0), options) == ["A long one"] * 2
    assert {part for parts in parts_drawn(9, first=4) for part in parts} == {0, 1, 2, 3}


WEB, LONG = "web text. Its 2nd sentence", ["A longer one", "Of an MLLM.", "In three"]
COIN = CaptionOptions(fields=("web", "long"), splitting="whole", count=1, max_merged=1)


@pytest.mark.parametrize("reference_windows", [True, False])
@pytest.mark.parametrize("join_fields", [True, False])
def test_a_fair_coin_between_two_whole_texts(reference_windows, join_fields):
    """GRAIN's caption: the web's or the MLLM's, each in half of the draws, and the other one where one is missing."""
    options = dataclasses.replace(COIN, reference_windows=reference_windows, join_fields=join_fields)
    long = LONG if join_fields else ". ".join(LONG)
    whole = "A longer one. Of an MLLM. In three" if join_fields else long
    record, rng = {"web": WEB, "long": long}, random.Random(0)
    drawn = collections.Counter(captions.draw(record, rng, options)[0] for _ in range(10_000))
    assert set(drawn) == {WEB, whole} and abs(drawn[WEB] - 5000) < 4 * 50
    for fields, only in (
        ({"web": WEB}, WEB),
        ({"long": long, "web": None}, whole),
        ({"long": long, "web": " "}, whole),
    ):
        assert {captions.draw(fields, rng, options)[0] for _ in range(20)} == {only}
    with pytest.raises(CaptionError, match="no captions"):
        captions.draw({"web": "", "long": []}, rng, options)


def test_a_field_of_sentences_is_one_text_where_they_are_joined():
    record = {"web": WEB, "long": LONG}
    assert captions.texts(record, COIN) == [WEB, *LONG]  # not a coin: each sentence is drawn
    assert captions.texts(record, dataclasses.replace(COIN, join_fields=True, splitting="every_stop")) == [
        "web text. Its 2nd sentence", "A longer one. Of an MLLM. In three"
    ]  # fmt: skip
    record["long"] = ["One", 2]
    with pytest.raises(CaptionError, match=r"long\[1\] must be a string"):
        captions.texts(record, COIN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(merging="both"), "captions.merging is 'both'; choose one of mixed, consecutive, scattered"),
        (dict(splitting="nltk"), "captions.splitting is 'nltk'; choose one of every_stop, sentences"),
        (dict(fields="caption"), r"captions.fields is 'caption'; give a list of keys, as \('caption',\)"),
        (dict(fields=()), "captions.fields is empty"),
        (dict(count=0), "captions.count is 0"),
        (dict(first=0), "captions.first 0"),
        (dict(min_merged=4), "captions.min_merged is 4, captions.max_merged 3"),
        (dict(min_merged=0), "captions.min_merged is 0"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        CaptionOptions(**options)


# Sentences for new training

SENTENCES = [
    (
        "The tower is 3.5 m high. It stands in St. Mary Street.",
        ["The tower is 3.5 m high", "It stands in St. Mary Street"],
    ),
    (
        "A sign, e.g. a red one, hangs above No. 5. A man waits.",
        ["A sign, e.g. a red one, hangs above No. 5", "A man waits"],
    ),
    ("The U.S. flag flies. Dr. J. R. Smith looks on.", ["The U.S. flag flies", "Dr. J. R. Smith looks on"]),
    ("It costs $3.50. Mr. and Mrs. Brown pay.", ["It costs $3.50", "Mr. and Mrs. Brown pay"]),
    ("The page www.example.com/a.jpg is open. The end.", ["The page www.example.com/a.jpg is open", "The end"]),
    ("He waits... then goes. At 5 p.m. it rains.", ["He waits... then goes", "At 5 p.m. it rains"]),
    ("a dog runs. a boy walks.", ["a dog runs", "a boy walks"]),
    ("The dog sits.The cat sleeps .", ["The dog sits", "The cat sleeps"]),
    ("One cat\nTwo dogs.</s>Three birds", ["One cat", "Two dogs", "Three birds"]),
    ("1. A cat. 2. A dog.", ["A cat", "A dog"]),
    ("A cat", ["A cat"]),
    ("What is it? It is a cat!", ["What is it?", "It is a cat!"]),
    ("A cat \ud800 sits. A \ud83d\ude00 smiles.", ["A cat \ufffd sits", "A \U0001f600 smiles"]),
    ("", []),
    (" . \n ... </s>12.", []),
]


@pytest.mark.parametrize(("text", "expected"), SENTENCES, ids=[ascii(text) for text, _ in SENTENCES])
def test_split_into_sentences(text, expected):
    assert captions.split_sentences(text) == expected


def test_splitting_of_strings_alone():
    record = {"raw_caption": "A 3.5 m hill. A cow.", "shortIB_captions": ["A 3.5 m hill. A cow."]}
    options = CaptionOptions(splitting="sentences", max_merged=1, count=200)
    drawn = captions.draw(record, random.Random(0), options)
    assert set(drawn) == {"A 3.5 m hill", "A cow", "A 3.5 m hill. A cow."}
    assert captions.sentences(record)[:3] == ["A 3", "5 m hill", "A cow"]


def test_very_long_captions():
    """Neither rule takes more than a moment for a million characters."""
    for text in ("A cow. " * 140_000, "a" * 10**6, "." * 10**6, "\n" * 10**6, "(" * 10**6, '"a. B" ' * 140_000):
        start = time.process_time()
        for splitting in captions.SPLITTINGS.values():
            splitting(text)
        assert time.process_time() - start < 5


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


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ('["a dog", "a cat"]', ["a dog", "a cat"]),
        ("['a dog. Big', \"the cat's\"]", ["a dog. Big", "the cat's"]),
        (' [ "a dog" ,\n"a cat" ] ', ["a dog", "a cat"]),
        ('["a dog", " "]', ["a dog"]),
        ("[]", []),
        ("['a dog' 'a cat']", ["a dog", "a cat"]),  # of NumPy, as pandas writes an array into a CSV
        ("['a dog'\n \"it's a cat\"]", ["a dog", "it's a cat"]),
        ("[sic] a dog. [sic]", ["[sic] a dog", "[sic]"]),  # no list
        ("[1, 2]", ["[1, 2]"]),
        ("['a dog', 3]", ["['a dog', 3]"]),
        ('[["a dog"]]', ['[["a dog"]]']),
        ("[a dog]", ["[a dog]"]),
        ("[" * 5000 + "]" * 5000, ["[" * 5000 + "]" * 5000]),
    ],
)
def test_the_text_of_a_list_is_a_list(value, expected):
    """In shards that are read in place as in the files that `prepare` reads."""
    assert captions.field_sentences(value) == expected
    assert captions.sentences({"raw_caption": value, "longIB_captions": ["it"]}) == [*expected, "it"]
    assert rows.sentences(value) == expected


def test_unsplit_strings_are_never_sampled_by_letter():
    record = {field: "A brown dog runs. It has a red ball." for field in captions.FIELDS}
    drawn = captions.sample(captions.sentences(record), random.Random(0), CaptionOptions(count=500))
    assert {part for caption in drawn for part in caption.split(". ")} == {"A brown dog runs", "It has a red ball"}


def test_empty_fields_add_nothing():
    record = {"raw_caption": ["A cat"], "shortIB_captions": [], "longIB_captions": None, "shortSV_captions": ""}
    record |= {"longSV_captions": " . \n", "shortLLA_captions": ["", "  ", "A dog"]}
    assert captions.sentences(record) == ["A cat", "A dog"]


def test_pixelprose():
    record = {"caption": "First one. Second two.", "raw_caption": ["left out"]}
    assert captions.sentences(record, fields=("caption",)) == ["First one", "Second two"]


@pytest.mark.parametrize("record", [{"raw_caption": None}, {"raw_caption": [" "], "longSV_captions": "."}])
def test_record_without_captions(record):
    with pytest.raises(CaptionError, match=r"^no captions$"):
        captions.sentences(record)


def test_a_record_of_other_keys_names_the_fields():
    with pytest.raises(CaptionError, match=r"^no captions: there is none of the fields caption, meta\.caption$"):
        captions.sentences({"text": "A dog", "url": "x"}, fields=("caption", "meta.caption"))


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
