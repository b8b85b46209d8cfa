"""The table of evaluation sets, and the command that shows it and looks into a folder."""

import json
import subprocess
import sys

import pytest
from shard_files import write_tar

from flair_jax.data.benchmarks import __main__ as command
from flair_jax.data.benchmarks import base, table

# No source gives the number of items that count: of ARO's and VL-CheckList's rows some are left out, and so on.
UNCOUNTED = {"aro", "cola_single_clevr", "cola_single_paco", "fg_ovd", "spec", "svo_probes", "vl_checklist"}


def test_names_are_plain_and_every_set_says_where_it_comes_from():
    for name, entry in table.ALL.items():
        assert name == entry.name and not set(name) & set("/ *?["), name  # a part of a result's name, and a pattern
        assert entry.licence and entry.source and entry.title, name
        assert bool(entry.expected()) == (name not in UNCOUNTED), name
        for published in entry.published:
            assert published.source and published.model and 0 <= published.value <= 1, name


@pytest.mark.parametrize("name", table.ALL)
def test_every_set_is_selected_by_its_name_alone(name):
    assert [entry.name for entry in table.select([name])] == [name]


def test_patterns_select_in_the_order_of_the_table():
    assert [entry.name for entry in table.select(["iiw*", "coco_val2017"])] == ["coco_val2017", "iiw_fg", "iiw"]
    with pytest.raises(ValueError, match="no evaluation set is called 'coco'"):
        table.select(["coco"])


def test_the_table_has_a_row_for_each_set(capsys):
    command.main([])
    output = capsys.readouterr().out
    for name, entry in table.ALL.items():
        (row,) = [line for line in output.splitlines() if line.startswith(f"| {name} |")]
        assert entry.licence in row and entry.source in row
        for published in entry.published:
            assert published.metric in row and published.source in row
    assert "| coco_val2017 | COCO | 5,000 | 25,014 |" in output and "FLAIR Merged30M text_to_image_R@1 53.3" in output


def test_a_folder_is_inspected_set_by_set(tmp_path, capsys):
    coco = {
        "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
        "annotations": [{"image_id": 1, "caption": "a"}, {"image_id": 2, "caption": "b"}],
    }
    root = tmp_path / "sets"
    (root / "coco/images/val2017").mkdir(parents=True)
    (root / "coco/captions_val2017.json").write_text(json.dumps(coco))
    (root / "coco/images/val2017/2.jpg").write_bytes(b"")
    (root / "urban1k").mkdir()
    (root / "urban1k/annotations.json").write_text('{"annotations": 3}')
    for name, label in (("wds_mnist", b"1"), ("wds_birds", b"0"), ("cifar10", b"0")):
        (root / name / "test").mkdir(parents=True)
        (root / name / "classnames.txt").write_text("zero\none\n")
        (root / name / "zeroshot_classification_templates.txt").write_text("a {c}")
        (root / name / "test/nshards.txt").write_text("1")
        write_tar(root / name / "test/0.tar", [("a.png", b"I"), ("a.cls", label)])

    (root / "wds_birds/dataset_type.txt").write_bytes(b"\xff")  # whatever it is, it is not "retrieval"
    command.main(["--root", str(root), "--json", str(tmp_path / "found.json")])
    text, found = capsys.readouterr().out, json.loads((tmp_path / "found.json").read_text())
    assert set(found) == {*table.ALL, "wds_birds", "wds_classification:cifar10"}

    assert found["coco_val2017"]["state"] == "partly there"
    assert found["coco_val2017"]["pictures"] == {"there": 1, "of": 2}
    assert found["coco_val2017"]["counts"] == {"images": 2, "texts": 2}
    assert found["coco_val2017"]["expected"] == {"images": 5000, "texts": 25014}
    assert found["coco_val2017"]["differs"] == ["images", "texts"]
    first, folder = found["coco_val2017"]["files"]
    assert first == {
        "path": "coco/captions_val2017.json", "there": True, "items": 2, "expected": 25014, "optional": False,
        "error": None,
    }  # fmt: skip
    assert folder["path"] == "coco/images/val2017" and folder["there"] and folder["items"] is None
    assert "2 images (! published: 5,000)" in text and "! 1 of 2 image files are there" in text

    assert found["urban1k"]["state"] == "broken" and "'annotations' is '3'" in found["urban1k"]["error"]
    assert found["urban1k"]["files"][0]["error"] and "Traceback" not in text
    assert found["wds_birds"]["state"] == "there" and found["wds_birds"]["counts"] == {"images": 1, "classes": 2}
    assert found["wds_mnist"]["differs"] == ["images", "classes"]
    assert found["docci"]["state"] == "missing" and "docci" in text.splitlines()[-1]


def test_a_fault_of_a_reader_is_a_row_and_hides_no_other(tmp_path):
    def fail(_):
        raise KeyError("x")

    entry = base.Benchmark("x", "retrieval", "X", (base.File("x.json"),), fail, "none", "here")
    row = command.inspect(entry, tmp_path)
    assert row["state"] == "broken" and row["error"] == "KeyError: 'x'"
    assert "x (retrieval): broken" not in command.summary({"x": {**row, "state": "missing"}})


def test_wrong_arguments_are_refused(tmp_path, capsys):
    root = ["--root", str(tmp_path)]
    for arguments, message in (
        (["--root", str(tmp_path / "no")], "no such folder"),
        (["--json", "x"], "needs --root"),
        ([*root, "--json", str(tmp_path)], "is a folder"),
        ([*root, "--json", str(tmp_path / "no/found.json")], "in a folder that is not there"),
    ):
        with pytest.raises(SystemExit) as error:
            command.main(arguments)
        assert error.value.code == 2 and message in capsys.readouterr().err


def test_the_command_needs_neither_jax_nor_torch():
    code = (
        "import sys; from flair_jax.data.benchmarks import __main__; print({'jax', 'torch', 'flax'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
