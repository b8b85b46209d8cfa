"""The report: numbers beside published ones, what is not whole is marked, and the page needs nothing but itself."""

import base64
import html.parser
import io
import json
import math
import sys
import time

import jax
import numpy as np
import pytest
from conftest import TINY, load_golden
from etils import epath
from etils.epath import backend, gpath
from PIL import Image
from test_metrics import Store

from flair_jax import models, progress, report, state, untrained
from flair_jax.convert import names
from flair_jax.data.benchmarks import base
from flair_jax.report import Figure, Missing, Result, SetDetails, values

RESULTS = [
    Result("retrieval", "val", "text_to_image_R@1", 0.5, "flair"),
    Result("retrieval", "val", "text_to_image_R@1", 0.25, "global"),
    Result("retrieval", "val", "text_to_image_mean_rank", 3.0, "flair"),
    Result("retrieval", "val", "text_to_image_R@1", 0.01, "chance"),
    Result("pointing", "val", "accuracy", 0.75),
    Result("pointing", "val", "chance", 0.125),
    Result("pointing", "val", "chance_object", 0.5),
    Result("segmentation", "val", "miou", 0.5),
    Result("segmentation", "val", "miou", 0.375, "projected"),
    Result("segmentation", "val", "chance", 0.0004),
    Result("segmentation", "val", "iou/door/gate", 0.875),
    Result("segmentation", "val", "iou/door/gate", 0.125, "projected"),
    Result("segmentation", "val", "iou/cat", 0.0, "projected"),
]
EVIL = "<script>alert('x')</script> & \"a|b\""
PLAIN_EVIL = EVIL.replace("/", "")  # a metric without a part
IMAGES = {
    "noise": np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8),
    "plain": np.zeros((40, 60, 3), np.uint8),
}


def published(metric, value, mode="", model="FLAIR", source="a paper"):
    return base.Published(model, metric, value, source, mode)


def retrieval_details(**options):
    numbers = (
        published("text_to_image_R@1", 0.533, "flair"),
        published("text_to_image_R@1", 0.2504, "global", "CLIP"),
        published("text_to_image_mean_rank", 2.5, "flair"),
        published("image_to_text_R@1", 0.68, "flair"),
    )
    return SetDetails("retrieval", "val", "A set", published=numbers, **options)


def cells(text):
    """The rows of all tables of a Markdown text."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


class Page(html.parser.HTMLParser):
    """Checks that tags are balanced; collects tags with attributes, and texts by the tag and class they stand in."""

    VOID = {"meta", "img", "wbr", "br", "hr", "link"}  # noqa: RUF012

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.rows = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append((tag, attributes.get("class") or ""))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop()[0] == tag, (tag, self.open)

    def handle_data(self, data):
        self.texts.append((data, [style for _, style in self.open]))
        if any(tag in ("td", "th") for tag, _ in self.open):
            self.rows[-1][-1] += data

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def write(folder, *args, **options):
    report.write(folder, *args, **options)
    return Page((folder / "report.html").read_text())


# ---------------------------------------------------------------------------------------------------------------------
# Numbers and tables


def test_names_and_tables(tmp_path):
    """Names are those that benchmarks read; tables have a row for each metric and chance beside."""
    text = report.write(tmp_path / "not" / "there", RESULTS)
    assert json.loads((tmp_path / "not" / "there" / "report.json").read_text()) == {
        "retrieval/val/flair/text_to_image_R@1": 0.5,
        "retrieval/val/global/text_to_image_R@1": 0.25,
        "retrieval/val/flair/text_to_image_mean_rank": 3.0,
        "retrieval/val/chance/text_to_image_R@1": 0.01,
        "pointing/val/accuracy": 0.75,
        "pointing/val/chance": 0.125,
        "pointing/val/chance_object": 0.5,
        "segmentation/val/miou": 0.5,
        "segmentation/val/projected/miou": 0.375,
        "segmentation/val/chance": 0.0004,
        "segmentation/val/iou/door/gate": 0.875,
        "segmentation/val/projected/iou/door/gate": 0.125,
        "segmentation/val/projected/iou/cat": 0.0,
    }
    assert (tmp_path / "not" / "there" / "report.md").read_text() == text
    tables = [
        ["retrieval/val", "flair", "global", "chance"],
        ["text_to_image_R@1", "50.0", "25.0", "1.0"],
        ["text_to_image_mean_rank", "3.0", "", ""],
        ["pointing/val", "value", "chance", "chance object"],
        ["accuracy", "75.0", "12.5", "50.0"],
        ["segmentation/val", "value", "projected", "chance"],
        ["miou", "50.0", "37.5", "0.04"],
        ["val: iou", "value", "projected"],
        ["door/gate", "87.5", "12.5"],
        ["cat", "", "0.0"],
    ]
    page = Page((tmp_path / "not" / "there" / "report.html").read_text())
    for row in tables:
        assert row in cells(text) and row in page.rows, row
    assert ["summary: retrieval", "mode", "text_to_image_R@1", "chance"] in cells(text)
    assert ["val", "flair", "50.0", "1.0"] in cells(text) and ["val", "flair", "50.0", "1.0"] in page.rows


def test_published_numbers_stand_beside_measured_ones(tmp_path):
    page = write(tmp_path, RESULTS, [retrieval_details()])
    rows = [
        ["published", "mode", "metric", "measured", "published value", "difference", "source"],
        ["FLAIR", "flair", "text_to_image_R@1", "50.0", "53.3", "-3.3", "a paper"],
        ["CLIP", "global", "text_to_image_R@1", "25.0", "25.0", "0.0", "a paper"],
        ["FLAIR", "flair", "text_to_image_mean_rank", "3.0", "2.5", "+0.5", "a paper"],
        ["FLAIR", "flair", "image_to_text_R@1", "", "68.0", "", "a paper"],
    ]
    text = (tmp_path / "report.md").read_text()
    for row in rows:
        assert row in cells(text) and row in page.rows, row
    assert ["A set", "flair", "50.0", "1.0", "25.0 to 53.3"] in page.rows  # the summary
    (found,) = [one for one in json.loads((tmp_path / "report_details.json").read_text())["sets"] if one["published"]]
    differences = [one["difference"] for one in found["published"]]
    assert differences[:3] == pytest.approx([-0.033, -0.0004, 0.5]) and differences[3] is None


@pytest.mark.parametrize(
    ("metric", "value", "shown"),
    [
        ("miou", 0.5, "50.0"),
        ("miou", 0.00042, "0.042"),
        ("miou", 0.0, "0.0"),
        ("text_to_image_mean_rank", 12.25, "12.2"),
        ("iou/crank_rank", 0.25, "25.0"),  # a class
    ],
)
def test_ranks_are_no_percentages(metric, value, shown):
    assert values.text(metric, value) == shown


def test_a_published_number_of_a_part_is_compared_with_the_part():
    numbers = (published("iou/door/gate", 0.5, "projected"), published("iou/cat", 0.5), published("iou/dog", 0.5))
    found = report.layout.compared(SetDetails("segmentation", "val", published=numbers), values.Values.of(RESULTS[7:]))
    assert [measured for _, measured in found] == [0.125, 0.0, None]


def test_a_published_number_without_a_mode_is_compared_with_the_first():
    details = SetDetails("retrieval", "val", published=(published("text_to_image_R@1", 0.4),))
    plain = values.Values.of([Result("retrieval", "val", "text_to_image_R@1", 0.3)])
    for found, expected in ((values.Values.of(RESULTS[:4]), 0.5), (plain, 0.3)):
        assert [measured for _, measured in report.layout.compared(details, found)] == [expected]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"left_out": 12}, "* 12 images were missing or broken and left out."),
        ({"left_out": 1}, "* 1 image was missing or broken and left out."),
        ({"parts": ("DCI_Test", "IIW-400")}, "* Only a part of the set is there: DCI_Test, IIW-400."),
        (
            {"counts": {"images": 4988, "texts": 5}, "expected": {"images": 5000, "texts": 5, "items": 3}},
            "* Evaluated are 4,988 of 5,000 images of the release.",
        ),
    ],
)
def test_a_set_that_is_not_whole_is_marked(tmp_path, options, reason):
    page = write(tmp_path, RESULTS, [retrieval_details(**options)])
    text = (tmp_path / "report.md").read_text()
    for row in (
        ["text_to_image_R@1", "50.0*", "25.0*", "1.0"],
        ["FLAIR", "flair", "text_to_image_R@1", "50.0*", "53.3", "-3.3*", "a paper"],
        ["A set", "flair", "50.0*", "1.0", "25.0 to 53.3"],
        ["accuracy", "75.0", "12.5", "50.0"],  # of another set
    ):
        assert row in cells(text) and row in page.rows, row
    assert f"- \\{reason}\n" in text and reason in [data for data, _ in page.texts]
    whole = write(tmp_path, RESULTS, [retrieval_details(counts={"images": 5}, expected={"images": 5})])
    assert not any("*" in cell for row in whole.rows for cell in row)


MISSING = [
    Missing("retrieval", "dci", "DCI", ["dci/splits.json", "dci/photos"], "CC-BY-NC 4.0", "https://example.org/dci"),
    Missing("classification", "cars", "", [f"cars/{n}.tar" for n in range(9)], "research only", "a mirror"),
    Missing("pointing", "refcoco", "RefCOCO", (), "MIT", "x", reason="3 of 9 images are not there"),
]


def test_missing_sets_are_listed_with_reason_source_and_licence(tmp_path):
    rows = [
        ["DCI", "retrieval", "not found: dci/splits.json, dci/photos", "https://example.org/dci", "CC-BY-NC 4.0"],
        [
            "cars",
            "classification",
            "not found: cars/0.tar, cars/1.tar, cars/2.tar and 6 more",
            "a mirror",
            "research only",
        ],
        ["RefCOCO", "pointing", "3 of 9 images are not there", "x", "MIT"],
    ]
    page = write(tmp_path, RESULTS, missing=MISSING)
    found = cells((tmp_path / "report.md").read_text())
    assert all(row in found and row in page.rows for row in rows)
    assert any("3 sets are evaluated; 3 are not" in data for data, _ in page.texts)
    listed = json.loads((tmp_path / "report_details.json").read_text())["missing"]
    assert [len(one["files"]) for one in listed] == [2, 9, 0]


def test_missing_sets_are_said_before_the_work_begins():
    """Of many paths that would do the first one is named."""
    sets = [*MISSING[:1], Missing("pointing", "x", files=["a or b", "c or d or e"], licence="MIT", source="there")]
    assert report.missing_lines(sets) == (
        "  DCI (retrieval): not found: dci/splits.json, dci/photos\n"
        "      from https://example.org/dci (CC-BY-NC 4.0)\n"
        "  x (pointing): not found: a or b, c (or 2 other paths)\n"
        "      from there (MIT)\n"
    )


def test_values_that_json_does_not_know(tmp_path):
    """NaN, and what numpy counted: a report is not lost for it."""
    results = [Result("retrieval", "a", "x", math.nan), Result("retrieval", "a", "y", np.float32(0.5))]
    report.write(tmp_path, results, [SetDetails("retrieval", "a", left_out=np.int64(3))])
    assert json.loads((tmp_path / "report.json").read_text()) == {"retrieval/a/x": None, "retrieval/a/y": 0.5}
    assert ["x", "nan*"] in cells((tmp_path / "report.md").read_text())
    assert json.loads((tmp_path / "report_details.json").read_text())["sets"][0]["left_out"] == 3


# ---------------------------------------------------------------------------------------------------------------------
# The page


def figures():
    return [
        Figure.of("retrieval", "val", EVIL, Image.fromarray(IMAGES["noise"])),
        Figure.of("retrieval", "val", EVIL, Image.fromarray(IMAGES["plain"])),
        Figure.of("no such task", "../../etc", "sheet", Image.fromarray(IMAGES["plain"])),
    ]


def test_the_page_needs_nothing_but_itself(tmp_path):
    """One file without script: pictures are inside, and the names of the data sets are text, whatever they hold."""
    results = [
        *RESULTS,
        Result("segmentation", "val", f"iou/{EVIL}", 0.5),
        Result("choice", EVIL, PLAIN_EVIL, 0.5, EVIL),
    ]
    details = [
        retrieval_details(source='https://example.org/a?b&c; tars: http://x.org/"y<', licence=EVIL, notes=(EVIL,)),
        SetDetails(
            "choice", EVIL, EVIL, source="javascript:alert(1)", published=[published(PLAIN_EVIL, 0.5, EVIL, EVIL, EVIL)]
        ),
    ]
    page = write(tmp_path, results, details, figures(), [EVIL], MISSING, [EVIL])
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    assert [policy["content"] for policy in page.all("meta") if "http-equiv" in policy] == [
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    ]
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], attributes
        assert "src" not in attributes or attributes["src"].startswith("data:image/"), tag
        assert tag == "a" or "href" not in attributes
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = [attributes["href"] for attributes in page.all("a")]
    assert {link[1:] for link in links if link.startswith("#")} <= ids
    outside = ["https://example.org/a?b&c", 'http://x.org/"y<', "https://example.org/dci"]
    assert [link for link in links if not link.startswith("#")] == outside
    assert [EVIL, "50.0", ""] in page.rows and [f"choice/{EVIL}", EVIL] in page.rows
    assert [EVIL, EVIL, PLAIN_EVIL, "50.0", "50.0", "0.0", EVIL] in page.rows
    source = (tmp_path / "report.html").read_text()
    assert "@import" not in source and "url(" not in source
    text = (tmp_path / "report.md").read_text()
    assert "<" not in text.replace("\\<", "") and text.count("a|b") == 0 < text.count("a\\|b")


def test_pictures_are_in_the_page_and_beside_it(tmp_path):
    page = write(tmp_path, RESULTS, figures=figures())
    sources = [image["src"] for image in page.all("img")]
    assert [source.split(";")[0] for source in sources] == ["data:image/jpeg", "data:image/png", "data:image/png"]
    assert [image["alt"] for image in page.all("img")] == [EVIL, EVIL, "sheet"]
    stem = "retrieval_val_script_alert_x_script_a_b"
    files = [f"{stem}.jpg", f"{stem}_2.png", "no_such_task_etc_sheet.png"]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == sorted(files)
    for name, source in zip(files, sources, strict=True):
        data = (tmp_path / "pictures" / name).read_bytes()
        assert base64.b64decode(source.split(",")[1]) == data
        assert Image.open(io.BytesIO(data)).size == (60, 40)
        assert f"(pictures/{name})" in (tmp_path / "report.md").read_text()


def test_what_is_transparent_is_shown_on_white():
    figure = Figure.of("a", "b", "c", Image.new("RGBA", (8, 4), (255, 0, 0, 0)))
    assert (figure.width, figure.height) == (8, 4)
    assert Image.open(io.BytesIO(figure.data)).getpixel((0, 0)) == (255, 255, 255)


def test_warnings_are_red(tmp_path):
    page = write(tmp_path, RESULTS, warnings=["Weights look untrained."])
    assert ("Weights look untrained.", ["alarm banner"]) in [(data, styles[-1:]) for data, styles in page.texts]
    assert "**Weights look untrained.**\n" in (tmp_path / "report.md").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_the_same_results_give_the_same_files(tmp_path):
    for folder in ("a", "b", "b"):
        write(tmp_path / folder, RESULTS, [retrieval_details()], figures(), ["note"], MISSING, ["warning"])
    found = [{p.name: p.read_bytes() for p in sorted((tmp_path / f).rglob("*.*"))} for f in ("a", "b")]
    assert found[0] == found[1]
    assert len(found[0]) == 4 + 3  # and no temporary file


def test_a_report_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    """A full disk, or a kill, leaves the files of the report before."""
    report.write(tmp_path, RESULTS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    path_type = type(epath.Path(tmp_path))
    write_bytes = path_type.write_bytes

    def full(self, data):
        write_bytes(self, data[:10])
        raise OSError("No space left on device")

    monkeypatch.setattr(path_type, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        report.write(tmp_path, RESULTS[:4])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_numbers_are_written_before_pictures(tmp_path, monkeypatch):
    """A disk that is nearly full loses pictures, not the work of the evaluators."""
    path_type = type(epath.Path(tmp_path))
    write_bytes = path_type.write_bytes

    def full(self, data):
        if "pictures" in str(self):
            raise OSError(28, "No space left on device")
        write_bytes(self, data)

    monkeypatch.setattr(path_type, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left on device; the file was not written: '.*pictures/.*'"):
        report.write(tmp_path, RESULTS, figures=figures())
    assert set(json.loads((tmp_path / "report.json").read_text())) == set(report.flat(RESULTS))
    assert (tmp_path / "report.html").exists() and not list(tmp_path.rglob("*.partial"))


def test_a_report_in_a_store(monkeypatch):
    """An object appears whole by itself; renaming one would be a copy."""
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setattr(type(backend.fsspec_backend), "_get_filesystem", lambda self, name: Store())
    for _ in range(2):
        text = report.write("gs://bucket/report", RESULTS, figures=figures())
    folder = epath.Path("gs://bucket/report")
    assert (folder / "report.md").read_text() == text
    assert {path.name for path in folder.iterdir()} == {
        *("report.json", "report_details.json", "report.md", "report.html", "pictures")
    }
    assert len(list((folder / "pictures").iterdir())) == 3


def test_nothing_replaces_no_report(tmp_path):
    write(tmp_path, RESULTS)
    before = (tmp_path / "report.html").read_bytes()
    assert report.write(tmp_path, [], missing=MISSING, warnings=["warning"]) == ""
    assert (tmp_path / "report.html").read_bytes() == before


def test_names_that_have_no_bytes(tmp_path):
    """JSON may hold half of a surrogate pair."""
    page = write(tmp_path, [Result("segmentation", "a", "miou", 0.5), Result("segmentation", "a", "iou/\ud800", 0.5)])
    assert ["\\ud800", "50.0"] in page.rows


# ---------------------------------------------------------------------------------------------------------------------
# Weights that were never trained


def retrieval(name, *recalls, images=1000):
    """Results of a set: R@1 by mode."""
    modes = [Result("retrieval", name, "text_to_image_R@1", x, f"mode {n}") for n, x in enumerate(recalls)]
    return [*modes, Result("retrieval", name, "text_to_image_R@1", 1 / images, "chance")]


def classification(name, mean, top1, classes=10):
    results = [
        Result("classification", name, "acc1", top1),
        Result("classification", name, "mean_per_class", mean),
    ]
    chance = Result("classification", name, "chance", 1 / classes)
    return [*results, chance, Result("classification", name, "classes_without_images", 1.0)]


@pytest.mark.parametrize(
    ("results", "low", "judged"),
    [
        (retrieval("a", 0.001), ["retrieval/a"], ["retrieval/a"]),
        (retrieval("a", 0.003), ["retrieval/a"], ["retrieval/a"]),  # 3 hits where 1 is expected: 8 in 100 do that
        (retrieval("a", 0.0), ["retrieval/a"], ["retrieval/a"]),
        (retrieval("a", 0.012), [], ["retrieval/a"]),  # 12 hits: 1 in a billion
        (retrieval("a", 0.001, 0.5), [], ["retrieval/a"]),  # in one of two modes
        (retrieval("a", 1.0, images=4), ["retrieval/a"], ["retrieval/a"]),  # 4 of 4: 1 in 256
        (retrieval("a", 1.0, images=8), [], ["retrieval/a"]),
        (classification("b", 0.118, 0.7), ["classification/b"], ["classification/b"]),  # says the largest class always
        (classification("b", 0.14, 0.14), [], ["classification/b"]),
        ([Result("choice", "c", "accuracy", 0.5), Result("choice", "c", "chance", 0.5)], [], []),
        (RESULTS[4:], [], []),
    ],
)
def test_results_at_chance(results, low, judged):
    details = [SetDetails("classification", "b", counts={"images": 3000, "classes": 11})]
    assert report.at_chance(results, details) == (low, judged)


def test_the_bound_is_no_smaller_than_the_true_probability():
    """Chernoff's bound against the binomial distribution: what it calls better than chance is."""
    for number, chance in ((20, 0.5), (1000, 0.001), (5000, 0.1)):
        hits = np.arange(number + 1)
        logs = np.cumsum(np.log(np.maximum(hits, 1)))
        log_mass = logs[-1] - logs - logs[::-1] + hits * math.log(chance) + (number - hits) * math.log1p(-chance)
        tail = np.cumsum(np.exp(log_mass)[::-1])[::-1]  # at least so many hits
        better = [values._is_better(k / number, chance, number) for k in hits]
        assert any(better) and better == sorted(better)
        assert tail[better.index(True)] < values.CERTAINTY
        assert tail[better.index(True)] > values.CERTAINTY / 100  # and not much later than it could


def test_classes_without_images_are_told(tmp_path):
    """They are a number of classes, no percentage, and no mode of the model."""
    page = write(tmp_path, [Result("classification", "b", "acc1", 0.5, "flair"), *classification("b", 0.5, 0.5)[3:]])
    assert "1 of the classes have no image and are in no mean." in [data for data, _ in page.texts]
    assert page.rows[-2:] == [["classification/b", "flair"], ["acc1", "50.0"]]


def test_an_evaluation_at_chance_is_called_so(tmp_path):
    page = write(tmp_path, [*retrieval("a", 0.001), *classification("b", 0.5, 0.5)], [])
    red = [data for data, styles in page.texts if any("alarm" in style for style in styles)]
    banner = "Results are at chance level on the set that can be judged: these weights look untrained, or are not this"
    assert red == [f"{banner} model's.", "at chance", "Results are at chance level."]
    page = write(tmp_path, [*retrieval("a", 0.001), *retrieval("b", 0.5)])  # one hard set is no reason
    red = [data for data, styles in page.texts if any("alarm" in style for style in styles)]
    assert red == ["at chance", "Results are at chance level."]
    assert ["a", "mode 0", "0.1", "0.1", "at chance"] in page.rows


def small(**options):
    section = dict(
        embed_dim=8,
        vision=dict(image_size=16, patch_size=8, width=8, depth=2, heads=2),
        text=dict(context_length=8, vocab_size=50, width=8, depth=2, heads=2),
        **options,
    )
    return jax.device_get(jax.jit(state.init_params, static_argnums=(0, 1))(models.create(section), 0))


@pytest.fixture(scope="module")
def fresh():
    return small(pooling=dict(heads=2), init_logit_bias=-10.0)


def test_fresh_weights_are_recognised(fresh):
    initial = "weights look untrained: all {} LayerNorms have their initial values, 1 and 0."
    expected = {f"{part}: {initial.format(count)}" for part, count in (("vision", 6), ("text", 5), ("pooling", 3))}
    assert set(untrained.looks_untrained(fresh)) == expected
    without = {name: leaf for name, leaf in fresh.items() if name not in ("pooling", "logit_bias")}  # as CLIP
    assert set(untrained.looks_untrained(without)) == {text for text in expected if "pooling" not in text}


def test_trained_weights_are_not():
    """The original's weights after five steps; their logit scale may stand where it likes."""
    trained = names.to_flax(load_golden("tiny_train_final_noclip.safetensors"), config=TINY)
    assert untrained.looks_untrained(trained) == []
    trained["logit_scale"] = np.float32(TINY["init_logit_scale"])
    assert untrained.looks_untrained(trained) == []


def test_a_part_that_is_fresh_is_named(fresh):
    trained = names.to_flax(load_golden("tiny_train_final_noclip.safetensors"), config=TINY)
    (text,) = untrained.looks_untrained({**trained, "text": fresh["text"]})
    assert text.startswith("text: weights look untrained: all 5 LayerNorms")
    blocks = {**trained["vision"], "blocks_7": fresh["vision"]["blocks_0"]}
    norms = 2 * (TINY["vision"]["depth"] + 1) + 2
    (text,) = untrained.looks_untrained({**trained, "vision": blocks})
    assert text.startswith(f"vision: weights look untrained: 2 of {norms} LayerNorms")


def test_stacked_blocks_are_counted_one_by_one(fresh):
    def stack(tree):
        blocks = [tree[f"blocks_{n}"] for n in range(2)]
        others = {name: leaf for name, leaf in tree.items() if not name.startswith("blocks_")}
        return {**others, "blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)}

    (text,) = untrained.looks_untrained({"text": stack(fresh["text"])})
    assert "all 5 LayerNorms" in text
    moved = stack(fresh["text"])
    moved["blocks"]["ln_1"]["scale"] = moved["blocks"]["ln_1"]["scale"] + [[0], [1e-6]]
    (text,) = untrained.looks_untrained({"text": moved})
    assert "4 of 5 LayerNorms" in text
    moved["ln_final"]["bias"] = moved["ln_final"]["bias"] + np.eye(8)[3] * 1e-6
    (text,) = untrained.looks_untrained({"text": moved})
    assert "3 of 5 LayerNorms" in text


# ---------------------------------------------------------------------------------------------------------------------
# Progress


class Ticking:
    """Time that goes on with every item, ten seconds each."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def items(self, count):
        for number in range(count):
            yield number
            self.now += 10


@pytest.fixture
def ticking(monkeypatch):
    return Ticking(monkeypatch)


def test_a_log_gets_a_line_now_and_then(ticking, capsys):
    assert list(progress.progress(ticking.items(9), 9, "images")) == list(range(9))
    assert capsys.readouterr().err.splitlines() == [
        "images: 4 of 9, 00:37 left",
        "images: 7 of 9, 00:17 left",
        "images: 9 done in 01:30",
    ]


def test_a_short_loop_says_nothing(ticking, capsys):
    assert list(progress.progress(ticking.items(3), 3, "images")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_without_a_total_there_is_no_time_left(ticking, capsys):
    assert len(list(progress.progress(ticking.items(5), None, "images"))) == 5
    assert capsys.readouterr().err.splitlines() == ["images: 4, 00:30", "images: 5 done in 00:50"]


def test_other_processes_are_silent(ticking, capsys, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert list(progress.progress(ticking.items(9), 9, "images")) == list(range(9))
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(progress.progress(iter("abc"), 3, "images")) == ["a", "b", "c"]
    assert "images:   0%" in terminal.getvalue() and "0/3" in terminal.getvalue()
