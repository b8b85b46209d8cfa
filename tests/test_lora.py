"""LoRA and fine-tuning of CLIP against the numbers of FSC-CLIP's own code, and LoRA in the training loop.

The small copies of the golden files are cut to fit the repository: they have the gradients and trained parameters of
few arrays, and say so by an array `cut`; losses along the training are there for all.
"""

import functools
import json
import math
import re
import shutil

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import fresh_params, load_golden, nhwc, take_devices
from optional import torch
from tiny_run import checkpoint_of
from tiny_run import tiny as tiny_run

import flair_jax
from flair_jax import config as configuration
from flair_jax import lora, metrics, models, optimizer, pretrained, sharding, state, train
from flair_jax.configs import variants
from flair_jax.convert import __main__ as command
from flair_jax.convert import flax_files, lora_files, names, torch_files
from flair_jax.convert.tables import ConversionError, flatten
from flair_jax.data.transforms import packing
from flair_jax.models.layers import normalize
from flair_jax.models.text import Text
from flair_jax.step import step_of, train_step

QUICK, LORA = "fsc_clip/tiny_model_quickgelu.npz", "fsc_clip/tiny_model_lora.npz"
MODELS = [name for name in (QUICK, "fsc_clip/tiny_model_gelu.npz") if golden_files.exists(name)]
PUBLISHED = dict(  # spec/fsc_clip.md 5
    softmax=dict(weight=1.0),
    global_hard_negatives=dict(weight=0.5, gamma=2.0, smoothing=0.02),
    local_hard_negatives=dict(weight=0.2, gamma=2.0, smoothing=0.02),
)
TERMS = dict(softmax="clip_loss", global_hard_negatives="clip_neg_loss", local_hard_negatives="local_neg_loss")


def part(golden, prefix):
    """The arrays of a golden file under a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): array for name, array in golden.items() if name.startswith(prefix)}


def section_of(golden, name):
    """Our `model` section of a tiny model, from its parameters and images; it has two heads (README.md)."""
    sizes = names.table("clip").measure(part(golden, "param/"), "torch")
    towers = {"vision": ("patch_size", "width", "depth"), "text": ("context_length", "vocab_size", "width", "depth")}
    towers = {tower: {key: sizes[f"{tower}.{key}"] for key in keys} | {"heads": 2} for tower, keys in towers.items()}
    towers["vision"]["image_size"] = golden["in/images"].shape[-1]
    gelu = "quick" if "quick" in name else "exact"
    return dict(name="clip", embed_dim=sizes["embed_dim"], gelu=gelu, scan_blocks=True, **towers)


def batch_of(golden, prefix):
    """A batch of the reference, compact texts, as ours: image by image, with copies for negatives that are missing."""
    images, tokens = golden[f"{prefix}/images"], golden[f"{prefix}/tokens"].astype(np.int32)
    valid = golden[f"{prefix}/neg_text_masks"].reshape(-1, len(images)) != 0  # (K, B)
    number = len(images) + np.cumsum(valid).reshape(valid.shape) - 1
    own = np.arange(len(images))
    rows = np.stack([own, *np.where(valid, number, own)], axis=1)  # (B, 1 + K)
    text = Text.padded(jnp.asarray(tokens[rows.reshape(-1)]))
    return {
        "images": jnp.asarray(nhwc(images)),
        "texts": {"tokens": text.tokens, "ends": text.ends.astype(jnp.int32)},
        "valid": jnp.asarray(np.concatenate([own[None] >= 0, valid]).T),
    }


def recording(optimize):
    """An optimizer that keeps the gradients that it was given last, as the first part of its state."""
    record = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, *_: (grads, grads)
    )
    return optimizer.Optimizer(optax.chain(record, optimize.tx), optimize.rules)


class Run:
    """A model and the reference's training of it, one program for all its steps and gradients."""

    def __init__(self, golden, steps, section, base, options=None):
        self.rates = [step["lr"] for step in steps]
        self.optimize = recording(
            optimizer.create(
                learning_rate=max(self.rates), warmup_steps=3, total_steps=len(steps), weight_decay=0.1, eps=1e-6,
                clamp=(("logit_scale", 0.0, math.log(100)),),
            )
        )  # fmt: skip
        self.model = models.create(section)
        self.base, self.options = base, options
        self.batches = [batch_of(golden, prefix) for prefix in ("in", "in2")]
        slots = (("captions", 1), ("negatives", self.batches[0]["valid"].shape[1] - 1))
        self.step = jax.jit(
            functools.partial(
                train_step, model=self.model, losses=PUBLISHED, optimizer=self.optimize, seed=0, slots=slots
            )
        )

    def start(self, trained):
        base = None if self.options is None else self.base
        opt_state = self.optimize.init(trained, base)
        return state.TrainState(jnp.int32(0), trained, opt_state, base=base, lora=self.options)

    def loss_and_gradient(self, trained):
        after, numbers = self.step(self.start(trained), self.batches[0])
        return numbers, jax.device_get(after.opt_state[0])

    def train(self, trained, steps):
        """The reference's short run: two batches in turn; losses before each step must be its own."""
        current = self.start(trained)
        for number, expected in enumerate(steps):
            current, numbers = self.step(current, self.batches[number % 2])
            np.testing.assert_allclose(numbers["loss"], expected["total"], rtol=5e-5, err_msg=f"step {number}")
            compare_terms(numbers, expected)
        return current

    def compare_final(self, found, golden):
        """Parameters after the run. Adam divides gradients that are nearly zero by themselves: single numbers stray."""
        expected, way = part(golden, "traj/final/"), sum(self.rates)
        compare(found, expected, golden, atol=0.02 * way)
        for name, array in expected.items():
            assert np.sqrt(np.mean((found[name] - array) ** 2)) < 3e-3 * way, name


@functools.cache
def tiny(name):
    """Golden numbers of a tiny model, its `model` section, its parameters and its run."""
    golden = load_golden(name)
    section = section_of(golden, name)
    params = names.to_flax(part(golden, "param/"), "clip", section)
    return golden, section, params, Run(golden, json.loads(str(golden["traj/steps"])), section, params)


def compare(found, expected, golden, **tolerance):
    """Arrays by name; a file that is cut to fit the repository has a part of them."""
    assert found.keys() == expected.keys() or ("cut" in golden and expected.keys() < found.keys())
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, **tolerance, err_msg=name)


@functools.cache
def encode(model):
    def run(params, images, tokens):
        text = Text.padded(tokens)
        features = model.apply({"params": params}, images, text, local_text=True, method="features")
        return {
            "image_features": normalize(features.image.pooled),
            "image_tokens": features.image.local,
            "text_features": normalize(features.text.pooled),
            "text_tokens": features.text.local,
        }

    return jax.jit(run)


def compare_outputs(model, params, golden, *expected):
    """What the reference's model returns, of compact texts."""
    found = encode(model)(params, nhwc(golden["in/images"]), golden["in/tokens"].astype(np.int32))
    for arrays in expected:
        for name in found.keys() & arrays.keys():
            np.testing.assert_allclose(found[name], arrays[name], atol=2e-5, err_msg=name)
        assert {"image_features", "text_features"} <= arrays.keys()


def compare_terms(parts, expected):
    for ours, theirs in TERMS.items():
        value = PUBLISHED[ours]["weight"] * parts[ours]
        np.testing.assert_allclose(value, expected[theirs], rtol=2e-5, atol=1e-6, err_msg=theirs)


def gradient_tolerance(expected):
    return dict(rtol=1e-4, atol=2e-6 * max(1.0, *(np.abs(leaf).max() for leaf in expected.values())))


@pytest.mark.golden
@pytest.mark.parametrize("name", MODELS)
def test_outputs_losses_and_gradients_of_the_tiny_model(name):
    golden, _, params, run = tiny(name)
    expected = part(golden, "train/")
    compare_outputs(run.model, params, golden, expected, part(golden, "eval/"))
    np.testing.assert_allclose(np.exp(params["logit_scale"]), expected["logit_scale"], rtol=1e-6)
    numbers, grads = run.loss_and_gradient(params)
    compare_terms(numbers, part(golden, "loss/"))
    np.testing.assert_allclose(numbers["loss"], golden["loss/total"], rtol=1e-5)
    expected = part(golden, "grad/")
    compare(names.to_torch(grads, "clip"), expected, golden, **gradient_tolerance(expected))


@pytest.mark.golden
@pytest.mark.parametrize("name", MODELS)
def test_eight_steps_of_full_fine_tuning(name):
    golden, _, params, run = tiny(name)
    steps = json.loads(str(golden["traj/steps"]))
    rate = optimizer.schedule(max(run.rates), 3, len(steps))
    np.testing.assert_allclose([rate(step["step"]) for step in steps], run.rates, rtol=1e-5)
    current = run.train(params, steps)
    run.compare_final(names.to_torch(jax.device_get(current.params), "clip"), golden)
    decay = run.optimize.rules.decay(params)
    decay = names.to_torch(jax.tree.map(lambda x, decays: np.full(x.shape, decays, np.float32), params, decay), "clip")
    for ours, theirs in ((True, "decay_names"), (False, "no_decay_names")):
        assert {name for name, array in decay.items() if array.all() == ours} == set(golden[f"traj/{theirs}"])


@pytest.mark.golden
def test_the_schedule_is_the_reference_s():
    for name, rates in load_golden("fsc_clip/schedule.json").items():
        values = dict(word.split("=") for word in name.split()[1:])
        rate = optimizer.schedule(float(values["base_lr"]), int(values["warmup"]), int(values["total"]))
        for step, expected in rates.items():
            np.testing.assert_allclose(rate(int(step)), expected, rtol=2e-5, atol=1e-12, err_msg=f"{name} {step}")


# ---------------------------------------------------------------------------------------------------------------------
# LoRA


@functools.cache
def adapted():
    """Golden numbers of LoRA, those of its model, the model's parameters, and its run with the reference's options."""
    golden = load_golden(LORA)
    source, section, params, _ = tiny(QUICK)
    options = lora.LoraOptions(rank=golden["init/visual.transformer.resblocks.0.mlp.c_fc.lora_A"].shape[0])
    return golden, source, params, Run(source, json.loads(str(golden["traj/steps"])), section, params, options)


@pytest.mark.golden
def test_pairs_are_the_reference_s_in_shape_and_distribution():
    golden, _, params, run = adapted()
    expected = part(golden, "init/")
    assert sorted(expected) == sorted(golden["trainable"])
    draw = jax.jit(lambda seed: lora.init(params, run.options, seed))
    trees = [lora_files.to_torch(jax.device_get(draw(seed))) for seed in range(3)]
    assert {name: array.shape for name, array in trees[0].items()} == {n: a.shape for n, a in expected.items()}
    for name, theirs in expected.items():
        ours = np.stack([tree[name] for tree in trees])
        assert theirs.any() == ours.any(), name
        if theirs.any():  # uniform within the same bounds: the largest of n draws is within a factor of 1 - 10 / n
            bound = np.abs(theirs).max()
            assert np.abs(ours).max() == pytest.approx(bound, rel=10 / theirs.size), name
            assert ours.std() == pytest.approx(bound / math.sqrt(3), rel=5 / math.sqrt(theirs.size)), name
            assert not np.array_equal(ours[0], ours[1]), name


@pytest.mark.golden
def test_names_go_both_ways():
    weights = part(adapted()[0], "init/")
    back = lora_files.to_torch(lora_files.to_flax(weights))
    assert back.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(back[name], array)


@pytest.mark.golden
def test_changes_of_weights():
    golden, _, params, run = adapted()
    tree = lora_files.to_flax(part(golden, "random/param/"))
    merged = names.to_torch(jax.device_get(lora.merge_jit(params, tree, run.options)), "clip")
    before, expected = names.to_torch(params, "clip"), part(golden, "random/delta/")
    assert "visual.conv1.weight" in expected
    for name, change in expected.items():
        np.testing.assert_allclose(merged[name] - before[name], change, atol=2e-6, err_msg=name)


@pytest.mark.golden
@pytest.mark.parametrize("where", ["at_init", "random"])
def test_outputs_losses_and_gradients_with_pairs(where):
    golden, source, params, run = adapted()
    tree = lora_files.to_flax(part(golden, "init/" if where == "at_init" else "random/param/"))
    merged = lora.merge_jit(params, tree, run.options)
    compare_outputs(run.model, merged, source, part(golden, f"{where}/out/"))
    if where == "random":
        compare_outputs(run.model, merged, source, part(golden, "random/eval/"))
    numbers, grads = run.loss_and_gradient(tree)
    compare_terms(numbers, part(golden, f"{where}/loss/"))
    expected = part(golden, f"{where}/grad/")
    compare(lora_files.to_torch(grads), expected, golden, **gradient_tolerance(expected))


@pytest.mark.golden
def test_eight_steps_of_lora_and_wise_ft():
    golden, source, params, run = adapted()
    tree = lora_files.to_flax(part(golden, "init/"))
    current = run.train(tree, json.loads(str(golden["traj/steps"])))
    run.compare_final(lora_files.to_torch(jax.device_get(current.params)), golden)
    jax.tree.map(np.testing.assert_array_equal, current.base, params)  # the weights themselves stay
    assert all(jax.tree.leaves(run.optimize.rules.decay(tree))) and len(golden["traj/no_decay_names"]) == 0
    half = lora.scale(lora_files.to_flax(part(golden, "traj/final/")), 0.5)
    compare_outputs(run.model, lora.merge_jit(params, half, run.options), source, part(golden, "wise_ft_0.5/eval/"))


def released_weights(golden, source, where):
    """The state dict that the reference saves of a model with pairs: weights and pairs."""
    return part(source, "param/") | part(golden, where)


@pytest.mark.golden
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_released_checkpoint_with_pairs_computes_what_the_reference_computes(tmp_path, suffix):
    golden, source, params, run = adapted()
    weights, path = released_weights(golden, source, "random/param/"), tmp_path / f"epoch_5{suffix}"
    if suffix == ".pt":  # as a training checkpoint of several processes
        state_dict = {f"module.{name}": torch.from_numpy(array) for name, array in weights.items()}
        torch.save({"epoch": 5, "name": "lora", "state_dict": state_dict, "optimizer": {"lr": 1.0}}, path)
    else:
        torch_files.write(path, weights)
    with pytest.warns(UserWarning, match=r"pairs of LoRA of rank \d+ are added to their weights"):
        merged, found = pretrained.read(path, section_of(source, QUICK), "quick")
    assert found["gelu"] == "quick"
    compare_outputs(run.model, merged, source, part(golden, "random/eval/"))
    tree = lora_files.to_flax(part(golden, "random/param/"))
    expected = flatten(jax.device_get(lora.merge_jit(params, tree, run.options)))
    assert flatten(merged).keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(flatten(merged)[name], array, atol=1e-6, err_msg=name)


@pytest.mark.golden
@pytest.mark.filterwarnings("default")
def test_a_released_checkpoint_with_pairs_starts_a_run_converts_and_goes_part_of_the_way(tmp_path, capsys):
    golden, source, params, _ = adapted()
    path, section = tmp_path / "released.safetensors", section_of(source, QUICK)
    torch_files.write(path, released_weights(golden, source, "traj/final/" if "cut" not in golden else "init/"))
    merged = flatten(flair_jax.load(path, section, gelu="quick").params)
    start = {"init_from": str(path), "init_partial": False, "init_resized": False, "model": section}
    started = pretrained.initial_params(start, None)
    converted, model = tmp_path / "converted.safetensors", tmp_path / "model.json"
    model.write_text(json.dumps(section))
    assert command.main(["check", str(path), "--model-config", str(model)]) == 0
    assert re.search(r"LoRA +\d+ pairs, added to their weights\n", capsys.readouterr().out)
    assert command.main(["to-flax", str(path), str(converted), "--model-config", str(model)]) == 0
    assert "pairs of LoRA of rank 4 are added" in capsys.readouterr().err
    for name, array in merged.items():
        np.testing.assert_array_equal(flatten(started)[name], array)
        np.testing.assert_array_equal(flatten(flair_jax.load(converted).params)[name], array)
    # WiSE-FT multiplies both matrices, as of a run: a quarter of the change of a weight, and none of the rest.
    half = flatten(flair_jax.load(path, section, gelu="quick", wise_ft=0.5).params)
    for name, array in flatten(params).items():
        np.testing.assert_allclose(half[name], array + (merged[name] - array) / 4, atol=1e-6, err_msg=name)


BLOCK = "transformer.resblocks.0"
ONE = np.ones((1, 1), np.float32)


@pytest.mark.golden
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{BLOCK}.mlp.c_fc.lora_B": None}, r"1 pairs .*\n  transformer.*c_fc.weight .* has A float32 .*expected"),
        ({f"{BLOCK}.mlp.c_fc.weight": None}, r"c_fc\.weight is not in the file and has A float32 "),
        ({f"{BLOCK}.mlp.c_fc.lora_A": ONE}, r"c_fc\.weight .*A float32 \(1, 1\), B .*expected \{'A': \(1, "),
        ({f"{BLOCK}.attn.in_proj_weight_lora_B": ONE.astype(np.int32)}, r"in_proj_weight .*B int32 \(1, 1\)"),
        ({"visual.conv1.lora_A": ONE}, r"conv1\.weight .*expected \{'A': \(8, 24\)"),
        ({"token_embedding.lora_A": ONE}, r"unknown +token_embedding\.lora_A: found shape \(1, 1\)"),
        ({f"{BLOCK}.mlp.c_fc.lora_A.default.weight": ONE}, r"unknown +transformer.*lora_A\.default\.weight"),
        ({f"{BLOCK}.mlp.c_fc.lora_A": "shorter", f"{BLOCK}.mlp.c_fc.lora_B": "shorter"}, r"pair of rank 1; expected"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*LoRA")
def test_pairs_of_a_file_that_do_not_fit_are_named(tmp_path, changes, message):
    golden, source, *_ = adapted()
    weights, path = released_weights(golden, source, "init/"), tmp_path / "released.safetensors"
    for name, change in changes.items():
        if isinstance(change, str):
            changes = changes | {name: weights[name][:1] if name.endswith("A") else weights[name][:, :1]}
    torch_files.write(path, {name: array for name, array in (weights | changes).items() if array is not None})
    with pytest.raises(ConversionError, match=message):
        flair_jax.load(path, section_of(source, QUICK), gelu="quick")


# ---------------------------------------------------------------------------------------------------------------------
# In the training loop


SECTIONS = {"flair": tiny_run()["model"]}
SECTIONS["clip"] = {**SECTIONS["flair"], "name": "clip", "pooling": None, "init_logit_bias": None}


@pytest.mark.parametrize("name", SECTIONS)
def test_a_fresh_model_is_the_one_it_starts_from_if_b_is_zero(name):
    params = jax.eval_shape(lambda: state.init_params(models.create(SECTIONS[name]), 0))
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), params)
    options = lora.LoraOptions(zero_init=True)
    tree = jax.jit(lambda: lora.init(params, options, 0))()
    jax.tree.map(np.testing.assert_array_equal, lora.merge(params, tree, options), params)
    adapted = {key.rpartition("/")[0] for key in flatten(tree)}
    blocks = {f"{tower}/blocks_{i}/{layer}/kernel" for tower in ("vision", "text")
              for i in range(SECTIONS[name][tower]["depth"])
              for layer in ("attention/qkv", "attention/out", "mlp/fc", "mlp/proj")}  # fmt: skip
    pooling = {"pooling/qkv/kernel", "pooling/out/kernel"} if name == "flair" else set()
    assert adapted == blocks | pooling | {"vision/patch_embedding/kernel"}
    options = lora.LoraOptions()
    changed = jax.jit(lambda: lora.merge(params, lora.init(params, options, 0), options))()
    differs = {key for key, array in flatten(changed).items() if not np.array_equal(array, flatten(params)[key])}
    assert differs == {key for key in adapted if key.endswith("qkv/kernel")}


@pytest.mark.parametrize(
    ("variant", "total", "convolution"),
    [("B/32", 4_141_056, 3_158_016), ("B/16", 1_772_544, 789_504), ("L/14", 2_967_856, 805_168)],
)
def test_trainable_numbers_are_the_published_ones_and_nothing_else_has_moments(variant, total, convolution):
    """spec/fsc_clip.md 1.4. The optimizer of full fine-tuning holds two numbers for each of 151 million parameters."""
    model = models.create(variants.clip(variant).to_dict())
    optimize = optimizer.create(1e-5, 50, 100, 0.1, clamp=(("logit_scale", 0.0, 4.6),))
    shapes = jax.eval_shape(lambda: state.create(model, optimize, sharding.create_mesh(), 0, lora={"rank": 4}))

    def numbers(tree):
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    assert numbers(shapes.params) == total
    assert numbers(shapes.params["vision"]["patch_embedding"]) == convolution
    assert numbers(shapes.opt_state) == 2 * total + 2  # two moments, and the count of two transformations
    assert numbers(shapes.base) > 30 * total


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"rank": 0}, r"config\.lora\.rank is 0"),
        ({"alpha": 0.0}, r"config\.lora\.alpha is 0\.0"),
        ({"ranks": 4}, r"config\.lora has \['ranks'\]; there are \['rank', 'alpha'"),
        ({"patterns": ("vision/.*",)}, r"match vision/[\w/]+ of shape \(\d+,\)"),
        ({"patterns": ("audio/.*",)}, r"'audio/\.\*' matches no parameter; their names begin with .*vision"),
    ],
)
def test_what_does_not_fit_is_named(section, message):
    params = jax.eval_shape(lambda: state.init_params(models.create(SECTIONS["flair"]), 0))
    with pytest.raises(ValueError, match=message):
        lora.init(params, lora.LoraOptions.of(section), 0)


def test_pairs_of_another_model_are_refused():
    options, params = lora.LoraOptions(), {"out": {"kernel": np.zeros((4, 6), np.float32)}}
    with pytest.raises(ValueError, match=r"out/kernel has the shapes .*expected \{'a': \(4, 4\), 'b': \(4, 6\)\}"):
        lora.merge(params, {"out": {"kernel": {"a": np.zeros((4, 2)), "b": np.zeros((2, 6))}}}, options)
    with pytest.raises(ValueError, match="pairs for fc/kernel, which the model lacks"):
        lora.merge(params, {"fc": {"kernel": {"a": np.zeros((4, 4)), "b": np.zeros((4, 6))}}}, options)


BEFORE = "before.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory, shared_programs):
    """A folder with the weights of a FLAIR and a short run of LoRA on them, and the config of the run."""
    folder = tmp_path_factory.mktemp("lora")
    config = {**tiny_run(steps=4), "lora": {"rank": 2}, "init_from": str(folder / BEFORE), "ema_decay": 0.9}
    params = fresh_params(models.create(config["model"]), 1)
    flax_files.write(folder / BEFORE, params, config["model"])
    with pytest.MonkeyPatch.context() as patch:
        take_devices(patch, 1)
        train.train(config, folder / "lora")
    return folder, config


def weights_of(path):
    return flatten(jax.device_get(pretrained.read(path)[0]))


def test_training_changes_what_is_adapted_and_nothing_else(run):
    folder, _ = run
    before, after = weights_of(folder / BEFORE), weights_of(folder / "lora")
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in before if lora.LoraOptions().adapts(name)}
    lines = metrics.read_json_lines(folder / "lora")
    np.testing.assert_allclose([line["logit_scale"] for line in lines], np.exp(before["logit_scale"]), rtol=1e-6)


@pytest.mark.usefixtures("on_one_device")
def test_a_killed_run_goes_on_exactly_without_the_weights_it_started_from(run, tmp_path):
    folder, config = run
    saved = tmp_path / "stopped"
    shutil.copytree(folder / "lora", saved)
    shutil.rmtree(saved / "checkpoints" / "4")
    with pytest.raises(ValueError, match=r"config\.lora\.rank is None, was 2"):
        train.train({**config, "lora": None}, saved)
    train.train({**config, "init_from": str(folder / "not_there")}, saved)
    step, arrays, _ = checkpoint_of(saved)
    assert step == 4
    jax.tree.map(np.testing.assert_array_equal, arrays, checkpoint_of(folder / "lora")[1])
    jax.tree.map(np.testing.assert_array_equal, weights_of(saved), weights_of(folder / "lora"))


def test_pairs_alone_merged_and_part_of_the_way(run, tmp_path):
    folder, _ = run
    before, after = weights_of(folder / BEFORE), weights_of(folder / "lora")
    alone = folder / "lora" / "lora.safetensors"
    assert alone.stat().st_size < sum(array.nbytes for array in before.values()) / 4
    merged = flair_jax.load(alone, pretrained=folder / BEFORE)
    merged.save(tmp_path / "merged.safetensors")
    for name, array in weights_of(tmp_path / "merged.safetensors").items():
        np.testing.assert_allclose(array, after[name], atol=1e-6, err_msg=name)
    with pytest.raises(ValueError, match="LoRA's changes alone"):
        flair_jax.load(alone)
    with pytest.raises(ValueError, match="give pretrained=PATH"):
        flair_jax.load(alone, wise_ft=0.5)
    with pytest.raises(ValueError, match=r"wise_ft is 1\.5"):
        flair_jax.load(alone, pretrained=folder / BEFORE, wise_ft=1.5)
    # LoRA: the change times the square, from the run or from the file. Whole weights: straight between them.
    shares = {
        0.25: [(alone, folder / BEFORE), (folder / "lora", None)],
        0.5: [(tmp_path / "merged.safetensors", folder / BEFORE)],
    }
    for share, sources in shares.items():
        for path, source in sources:
            for name, array in flatten(jax.device_get(pretrained.read_fine_tuned(path, source, 0.5)[0])).items():
                expected = before[name] + share * (after[name] - before[name])
                np.testing.assert_allclose(array, expected, atol=1e-6, err_msg=f"{path} {name}")


def test_lora_needs_weights_to_change(tmp_path):
    with pytest.raises(ValueError, match=r"set config\.init_from"):
        train.train({**tiny_run(steps=2), "lora": {"rank": 2}}, tmp_path)


def test_a_step_is_the_same_on_one_device_and_split_over_eight(monkeypatch):
    """FSC-CLIP's recipe with LoRA, small: packed rows, negatives, weights split over `fsdp`, and all that plainly."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 2**10)
    config = configuration.read("fsc_clip_laioncoco:lora", ["--config.batch_size=16", "--config.model.dtype=float32"])
    config["model"]["embed_dim"] = 32
    config["model"]["vision"].update(image_size=32, patch_size=16, width=64, depth=1, heads=2)
    config["model"]["text"].update(width=64, depth=1, heads=2, vocab_size=300, context_length=16)
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 14, 16 * 4)
    tokens = np.where(np.arange(16) < lengths[:, None] - 1, rng.integers(1, 200, (16 * 4, 16)), 0).astype(np.int32)
    tokens[np.arange(len(tokens)), lengths - 1] = 299
    valid = rng.random((16, 4)) < 0.7
    valid[:, 0] = True
    batch = {"images": rng.integers(0, 256, (16, 32, 32, 3), dtype=np.uint8), "valid": valid}
    model = models.create(config["model"])
    optimize = optimizer.create(total_steps=10, **config["optimizer"])
    found = []
    for data, fsdp, texts in (
        (1, 1, packing.padded(tokens)),
        (4, 2, packing.Packer(32, range(1, 99), 8)(tokens).texts),
    ):
        mesh = sharding.create_mesh(data, fsdp, jax.devices()[: data * fsdp])
        with jax.set_mesh(mesh):
            current = state.create(model, optimize, mesh, 0, lora=config["lora"])
            placed = sharding.global_batch(mesh, batch | {"texts": texts})
            after, numbers = jax.jit(step_of(config, model, optimize))(current, placed)
            found.append(jax.device_get((numbers, after.params, after.weights)))
    (numbers, *trees), (other_numbers, *other_trees) = found
    assert numbers["local_hard_negatives/missing"] == (~valid).sum() > 0
    for name, value in numbers.items():
        np.testing.assert_allclose(other_numbers[name], value, rtol=1e-5, err_msg=name)
    # The first step of Adam has the size of the learning rate, 1e-6 in the warm-up, and the sign of the gradient.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), trees, other_trees)
