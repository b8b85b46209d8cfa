"""The table of methods side by side, from reports that are written down."""

import json

from benchmarks import methods


def test_table(tmp_path):
    values = {"retrieval/scenes/global/text_to_image_R@1": 0.5, "regions/scenes/box_recall": 0.25}
    segments = {"segmentation/scenes_colour/value/miou": 0.3, "segmentation/scenes_colour/attention/miou": 0.4}
    for name, report in {
        "grain_0": values,
        "grain_1": {**values, "regions/scenes/box_recall": 0.75},
        "clip_0": {"retrieval/scenes/global/text_to_image_R@1": 0.4, **segments},
        "clip_long_0": {"retrieval/scenes/global/text_to_image_R@1": 1.0},  # of another method
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(report))
    (tmp_path / "grain_2").mkdir()  # has not ended
    lines = methods.table(tmp_path, "scenes", ["clip", "grain"], ["--config.steps=7"]).splitlines()
    assert lines[0] == "clip: 1 runs. grain: 2 runs."
    assert "| whole: text to image R@1, global | 40.0 | 50.0 ± 0.0 |" in lines
    assert "| boxes found (IoU 0.5) |  | 50.0 ± 35.4 |" in lines
    assert "| colour mIoU, best way | 40.0 |  |" in lines
    assert "| steps | 7 | 7 |" in lines and not any("pointing" in line for line in lines)


def test_runs_that_have_a_report_are_not_made_again(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(methods.subprocess, "run", lambda command, check: made.append(command))
    (tmp_path / "clip_0").mkdir()
    (tmp_path / "clip_0" / "report.json").write_text("{}")
    arguments = ["run", str(tmp_path), "--config", "scenes", "--methods", "clip", "grain", "--seeds", "0", "1"]
    methods.main([*arguments, "--", "--config.steps=7"])
    assert [command[-3:] for command in made] == [
        [f"--workdir={tmp_path / name}", f"--config.seed={name[-1]}", "--config.steps=7"]
        for name in ("grain_0", "clip_1", "grain_1")
    ]
    assert made[0][3] == "--config=scenes:grain"
