"""The command line reaches every key; a wrong one is refused by name; configs are compared key by key."""

import json
import pathlib

import pytest

from flair_jax import config as configuration

SECTION = {"kind": "shards", "shards": "/val", "modes": ("flair",), "topk": 128}


def change(*arguments, name="shards"):
    return configuration.flatten(configuration.read(name, [f"--config.{argument}" for argument in arguments]))


def test_shipped_configs_by_name_and_files_by_path(tmp_path, monkeypatch):
    by_name = configuration.read("flair_cc3m")
    by_path = configuration.read(str(pathlib.Path(configuration.configs.__path__[0]) / "flair_cc3m.py"))
    assert by_name == by_path and by_name["batch_size"] == 1024
    monkeypatch.chdir(tmp_path)
    own = "from flair_jax.configs import base\n\n\ndef get_config():\n    return base.get_config()\n"
    (tmp_path / "scenes.py").write_text(own)
    assert configuration.read("scenes.py")["data"].get("scenes") is None  # the user's own file
    assert configuration.read("scenes")["data"]["scenes"]["count"] == 8000  # the shipped one
    monkeypatch.setenv("HOME", str(tmp_path))
    assert configuration.read("~/scenes.py") == configuration.read("scenes.py")
    with pytest.raises(FileNotFoundError, match=r"--config=scnes: not the path .* nor one of .*'scenes'"):
        configuration.read("scnes")
    with pytest.raises(FileNotFoundError, match=r"--config=absent\.py: no such file"):
        configuration.read("absent.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match=r"empty\.py has no function get_config"):
        configuration.read("empty.py")


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("epochs=None", "epochs", None),
        ("optimizer.clip_norm=1", "optimizer.clip_norm", 1.0),
        ("optimizer.learning_rate=1e-4", "optimizer.learning_rate", 1e-4),
        ("model.vision.image_size=(32, 48)", "model.vision.image_size", (32, 48)),
        ("model.vision.image_size=[32, 48]", "model.vision.image_size", (32, 48)),
        ("model.vision.image_size=64", "model.vision.image_size", 64),
        ("model.scan_blocks=true", "model.scan_blocks", True),
        ("profile_steps=(10, 12)", "profile_steps", (10, 12)),
        ("data.weights=(2, 1)", "data.weights", (2, 1)),
        ("data.captions.fields=caption", "data.captions.fields", ("caption",)),
        ("data.captions.fields=('a', 'b')", "data.captions.fields", ("a", "b")),
        ("data.augmentation.scale=(0.5, 1.0)", "data.augmentation.scale", (0.5, 1.0)),
        ("data.shards=2017", "data.shards", "2017"),  # text stays text
        ("data.shards=/a=b/{0..3}.tar", "data.shards", "/a=b/{0..3}.tar"),
        ("evaluators.val.fields=('caption',)", "evaluators.val.fields", ("caption",)),
        ("evaluators.val.image_batch=16", "evaluators.val.image_batch", 16),
        ("evaluators.val.modes=('flair', 'global')", "evaluators.val.modes", ("flair", "global")),
        ("evaluators.more.kind=shards", "evaluators.more.kind", "shards"),
        ("evaluators.more.shards=/more", "evaluators.more.shards", "/more"),
    ],
)
def test_every_key_can_be_given(argument, key, value):
    before = change()
    assert before.get(key, "absent") != value
    after = change(argument)
    assert after[key] == value and type(after[key]) is type(value)
    assert {**before, key: value} == after


def test_values_may_stand_apart_and_the_last_one_counts():
    flat = configuration.flatten(
        configuration.read("shards", ["--config.steps", "7", "-config.epochs", "None", "--config.steps=8"])
    )
    assert (flat["steps"], flat["epochs"]) == (8, None)
    configuration.check(configuration.read("shards", ["--config.steps=8", "--config.epochs=None"]))


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.modle.embed_dim=3", r"there is no section 'modle'"),
        ("--config.model.embed_dimm=3", r"config\.model has no key 'embed_dimm'; there are \['attention'"),
        ("--config.batch_size=many", r"--config\.batch_size=many: expected int, such as 64"),
        ("--config.batch_size=(3, 4)", r"--config\.batch_size=\(3, 4\): expected int"),
        ("--config.batch_size=1.5", "expected int"),
        ("--config.batch_size=True", "expected int"),
        ("--config.model.scan_blocks=7", r"scan_blocks=7: expected bool"),
        ("--config.model=7", r"config\.model=7: expected ConfigDict"),
        ("--config.steps", r"--config\.steps: the value is missing"),
        ("--batch_size=3", r"unexpected argument '--batch_size=3'"),
        ("configs/scenes.py", "unexpected argument"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(argument, words):
    with pytest.raises(ValueError, match=words):
        configuration.read("shards", [argument])


def test_none_is_refused_where_a_key_needs_a_value():
    with pytest.raises(ValueError, match=r"config\.batch_size is None; expected a value such as 128"):
        configuration.check(configuration.read("shards", ["--config.batch_size=None"]))
    with pytest.raises(ValueError, match=r"config\.data\.captions\.count is None"):
        configuration.check(configuration.read("shards", ["--config.data.captions.count=None"]))


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("steps=-5", "config.steps is -5; expected 1 or more"),
        ("epochs=-1.0", "config.epochs is -1.0; expected a number above 0"),
        ("batch_size=0", "config.batch_size is 0; expected 1 or more"),
        ("log_every=0", "config.log_every is 0; expected 1 or more"),
        ("save_every=0", "config.save_every is 0; expected 1 or more"),
        ("keep=0", "config.keep is 0; expected 1 or more"),
        ("eval_every=-1", "config.eval_every is -1; expected 0 or more"),
        ("evaluators.val.every=-1", "config.evaluators.val.every is -1; expected 0 or more"),
        ("evaluators.val.topk=0", "config.evaluators.val.topk is 0; expected 1 or more"),
        ("evaluators.val.image_batch=2.5.1", "config.evaluators.val.image_batch is '2.5.1'; expected 1 or more"),
        ("optimizer.learning_rate=-1e-3", "config.optimizer.learning_rate is -0.001; expected 0 or more"),
        ("optimizer.learning_rate=1e999", "config.optimizer.learning_rate is inf; expected 0 or more"),
        ("optimizer.clip_norm=0", "config.optimizer.clip_norm is 0.0; expected a number above 0"),
        ("optimizer.b2=1", "config.optimizer.b2 is 1.0; expected 0 or more and less than 1"),
        ("data.max_skipped=2", "config.data.max_skipped is 2.0; expected a share from 0 to 1"),
        ("data.workers=-1", "config.data.workers is -1; expected 0 or more"),
        ("objectives.sigmoid.chunk_size=0", "config.objectives.sigmoid.chunk_size is 0; expected 1 or more"),
        ("seed=4294967296", "config.seed is 4294967296; expected a whole number from 0 to 4294967295"),  # would be 0
        ("model.name=flare", "config.model.name is 'flare'; expected one of ['clip', 'flair',"),
        ("evaluators.val=None", "config.evaluators.val is None; expected a section"),
        ("data=None", "config.data is None; expected a section with ['augmentation', 'captions',"),
        ("model.vision=3", "expected ConfigDict"),
    ],
)
def test_a_value_that_makes_no_run_is_refused_before_it_starts(argument, words):
    with pytest.raises(ValueError) as raised:
        configuration.check(configuration.read("flair_cc3m", [f"--config.{argument}"]))
    assert words in str(raised.value)


def test_home_is_expanded_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    flat = change(
        "init_from=~/weights.pt",
        "data.shards=~/a/{0..3}.tar::/b::~/c",
        "data.index_dir=~",
        "evaluators.val.shards=~/val",
        "evaluators.val.index_dir=~/index",
    )
    assert flat["init_from"] == "/home/me/weights.pt"
    assert flat["data.shards"] == "/home/me/a/{0..3}.tar::/b::/home/me/c"
    assert flat["data.index_dir"] == "/home/me"
    assert flat["evaluators.val.shards"] == "/home/me/val" and flat["evaluators.val.index_dir"] == "/home/me/index"
    assert configuration.normalize({"data": {"shards": ["~/a", "b~"]}}) == {"data": {"shards": ("/home/me/a", "b~")}}


def test_a_config_equals_itself_after_json():
    config = configuration.read("flair_cc3m", ["--config.model.vision.image_size=(32, 48)"])
    again = json.loads(json.dumps(config))
    assert again != config and configuration.normalize(again) == config
    configuration.check_resume(again, config)


def test_a_checkpoint_from_before_a_key_has_the_key_s_default():
    """As older versions did what is now the default; what was left out on purpose, such as the pooling, has none."""
    now = configuration.read("flair_cc3m")
    older = {**now, "model": {key: value for key, value in now["model"].items() if key != "preprocess"}}
    configuration.check_resume(older, now)
    other = configuration.read("flair_cc3m", ["--config.model.preprocess.resize=squash"])
    with pytest.raises(ValueError, match=r"config\.model\.preprocess\.resize is 'squash', was 'crop'"):
        configuration.check_resume(older, other)
    with pytest.raises(ValueError, match=r"config\.model\.pooling\.heads is 8, was None"):
        configuration.check_resume({**now, "model": {**now["model"], "pooling": None}}, now)
    with pytest.raises(ValueError, match=r"config\.objectives\.sigmoid\.weight is 0\.5, was None"):
        configuration.check_resume(
            {**now, "objectives": {"text_conditioned": now["objectives"]["text_conditioned"]}}, now
        )


@pytest.mark.parametrize(
    "argument",
    [
        "steps=7", "epochs=1.0", "optimizer.learning_rate=1e-5", "optimizer.warmup_steps=3", "optimizer.clip_norm=1.0",
        "log_every=1", "save_every=1", "keep=1", "keep_every=1", "eval_every=1", "profile_steps=(1, 2)", "init_from=a",
        "mesh.fsdp=2", "model.remat=full", "model.scan_blocks=true", "model.micro_batches=2", "model.attention=cudnn",
        "data.workers=1", "data.index_dir=a", "data.max_skipped=0.5", "data.shards=elsewhere", "evaluators.val.topk=3",
    ],
)  # fmt: skip
def test_what_may_change_on_resume(argument):
    before, now = configuration.read("flair_cc3m"), configuration.read("flair_cc3m", [f"--config.{argument}"])
    assert before != now
    configuration.check_resume(before, now)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("seed=1", "config.seed is 1, was 0"),
        ("batch_size=3", "config.batch_size is 3, was 1024"),
        ("ema_decay=0.9", "config.ema_decay is 0.9, was None"),
        ("model.gelu=tanh", "config.model.gelu is 'tanh', was 'exact'"),
        ("model.vision.patch_dropout=0.5", "config.model.vision.patch_dropout is 0.5, was 0.0"),
        ("optimizer.weight_decay=0.1", "config.optimizer.weight_decay is 0.1, was 0.5"),
        ("optimizer.b2=0.9", "config.optimizer.b2 is 0.9, was 0.98"),
        ("data.captions.count=2", "config.data.captions.count is 2, was 8"),
        ("data.captions.max_merged=2", "config.data.captions.max_merged is 2, was 3"),
        ("data.captions.fields=a", "config.data.captions.fields is ('a',), was ('raw_caption',"),
        ("data.pixels=fast", "config.data.pixels is 'fast', was 'reference'"),
        ("data.augmentation.scale=(0.1, 1.0)", "config.data.augmentation.scale is (0.1, 1.0), was (0.9, 1.0)"),
        ("data.packing.row_length=77", "config.data.packing.row_length is 77, was 80"),
        ("data.weights=(1, 2)", "config.data.weights is (1, 2), was None"),
        ("data.shuffle_window=5", "config.data.shuffle_window is 5, was None"),
    ],
)
def test_what_makes_another_experiment(argument, words):
    with pytest.raises(ValueError, match="trained with another config") as raised:
        configuration.check_resume(
            configuration.read("flair_cc3m"), configuration.read("flair_cc3m", [f"--config.{argument}"])
        )
    assert words in str(raised.value)
