"""LoRA and fine-tuning of CLIP against the numbers of FSC-CLIP's own code, and LoRA in the training loop."""

import json
import math

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, load_golden, nhwc

from flair_jax import lora, models, objectives, optimizer, state
from flair_jax.convert import lora_files, names
from flair_jax.convert.tables import flatten
from flair_jax.models.layers import normalize
from flair_jax.models.text import Text
from flair_jax.step import train_step

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
    return dict(name="clip", embed_dim=sizes["embed_dim"], gelu=gelu, **towers)


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


def slots_of(batch):
    return (("captions", 1), ("negatives", batch["valid"].shape[1] - 1))


def torch_options(**options):
    """The reference's AdamW and schedule of the short runs."""
    return optimizer.create(
        warmup_steps=3, total_steps=8, weight_decay=0.1, b1=0.9, b2=0.98, eps=1e-6,
        clamp=(("logit_scale", 0.0, math.log(100)),), **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    """Golden numbers, section, model and parameters of a tiny model by the name of its file."""
    found = {}
    for name in MODELS:
        golden = load_golden(name)
        section = section_of(golden, name)
        model = models.create(section)
        found[name] = golden, section, model, names.to_flax(part(golden, "param/"), "clip", section)
    return found


def compare(found, expected, golden, **tolerance):
    """Arrays by name; a file that is cut to fit the repository has a part of them."""
    assert found.keys() == expected.keys() or ("cut" in golden and expected.keys() < found.keys())
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, **tolerance, err_msg=name)


def outputs(model, params, golden, prefix="in"):
    """What the reference's model returns, of compact texts."""
    text = Text.padded(jnp.asarray(golden[f"{prefix}/tokens"].astype(np.int32)))
    features = jax.jit(lambda params, images: model.apply(
        {"params": params}, images, text, local_text=True, method="features"
    ))(params, nhwc(golden[f"{prefix}/images"]))  # fmt: skip
    return {
        "image_features": normalize(features.image.pooled),
        "image_tokens": features.image.local,
        "text_features": normalize(features.text.pooled),
        "text_tokens": features.text.local,
    }


def loss_of(model, batch, merged):
    """A jitted function of what is trained: loss, parts and gradient."""

    def loss(trained):
        features = model.apply(
            {"params": merged(trained)}, batch["images"], Text(**batch["texts"]), local_text=True, method="features"
        )
        return objectives.weighted_sum(PUBLISHED, features.replace(slots=slots_of(batch)), batch, jax.random.key(0))

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def compare_terms(parts, expected):
    for ours, theirs in TERMS.items():
        value = PUBLISHED[ours]["weight"] * parts[ours]
        np.testing.assert_allclose(value, expected[theirs], rtol=2e-5, atol=1e-6, err_msg=theirs)


def gradient_tolerance(expected):
    return dict(rtol=1e-4, atol=2e-6 * max(1.0, *(np.abs(leaf).max() for leaf in expected.values())))


@pytest.mark.golden
@pytest.mark.parametrize("name", MODELS)
def test_outputs_losses_and_gradients_of_the_tiny_model(tiny, name):
    golden, _, model, params = tiny[name]
    expected, found = part(golden, "train/"), outputs(model, params, golden)
    for key, array in found.items():
        np.testing.assert_allclose(array, expected[key], atol=1e-5, err_msg=key)
    for key, array in part(golden, "eval/").items():
        np.testing.assert_allclose(found[key], array, atol=1e-5, err_msg=key)
    np.testing.assert_allclose(np.exp(params["logit_scale"]), expected["logit_scale"], rtol=1e-6)
    (value, parts), grads = loss_of(model, batch_of(golden, "in"), lambda params: params)(params)
    compare_terms(parts, part(golden, "loss/"))
    np.testing.assert_allclose(value, golden["loss/total"], rtol=1e-5)
    expected = part(golden, "grad/")
    if expected:
        compare(names.to_torch(jax.device_get(grads), "clip"), expected, golden, **gradient_tolerance(expected))


def run_steps(golden, source, model, optimize, current):
    """The reference's short run: batches "in" and "in2" in turn; the losses and rates must be its own."""
    batches = [batch_of(source, prefix) for prefix in ("in", "in2")]
    step = jax.jit(
        lambda state, batch: train_step(
            state, batch, model=model, losses=PUBLISHED, optimizer=optimize, seed=0, slots=slots_of(batch)
        )
    )
    for number, expected in enumerate(json.loads(str(golden["traj/steps"]))):
        current, numbers = step(current, batches[number % 2])
        np.testing.assert_allclose(numbers["loss"], expected["total"], rtol=5e-5, err_msg=f"step {number}")
        compare_terms(numbers, expected)
    return current


@pytest.mark.golden
@pytest.mark.parametrize("name", MODELS)
def test_eight_steps_of_full_fine_tuning(tiny, name):
    golden, _, model, params = tiny[name]
    steps = json.loads(str(golden["traj/steps"]))
    peak = max(step["lr"] for step in steps)
    rate = optimizer.schedule(peak, 3, len(steps))
    np.testing.assert_allclose([rate(step["step"]) for step in steps], [step["lr"] for step in steps], rtol=1e-5)
    optimize = torch_options(learning_rate=peak)
    current = state.TrainState(jnp.int32(0), params, optimize.init(params))
    current = run_steps(golden, golden, model, optimize, current)
    final = part(golden, "traj/final/")
    if final:
        compare(names.to_torch(jax.device_get(current.params), "clip"), final, golden, atol=2e-5)
    decay = names.to_torch(jax.tree.map(lambda x, d: np.full(x.shape, d), params, optimize.rules.decay(params)), "clip")
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


@pytest.fixture(scope="module")
def adapted(tiny):
    """Golden numbers of LoRA, those of its model, the model, its parameters, and the options of the reference."""
    golden = load_golden(LORA)
    source, section, model, params = tiny[QUICK]
    rank = golden["init/visual.transformer.resblocks.0.mlp.c_fc.lora_A"].shape[0]
    return golden, source, model, params, section, lora.LoraOptions(rank=rank)


@pytest.mark.golden
def test_pairs_are_the_reference_s_in_shape_and_distribution(adapted):
    golden, _, _, params, _, options = adapted
    expected = part(golden, "init/")
    assert sorted(expected) == sorted(golden["trainable"])
    trees = [lora_files.to_torch(jax.device_get(lora.init(params, options, seed))) for seed in range(3)]
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
def test_names_go_both_ways(adapted):
    weights = part(adapted[0], "init/")
    back = lora_files.to_torch(lora_files.to_flax(weights))
    assert back.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(back[name], array)


@pytest.mark.golden
def test_changes_of_weights(adapted):
    golden, _, _, params, _, options = adapted
    tree = lora_files.to_flax(part(golden, "random/param/"))
    merged = names.to_torch(jax.device_get(lora.merge(params, tree, options)), "clip")
    before = names.to_torch(params, "clip")
    expected = part(golden, "random/delta/")
    assert "visual.conv1.weight" in expected
    for name, change in expected.items():
        np.testing.assert_allclose(merged[name] - before[name], change, atol=2e-6, err_msg=name)


@pytest.mark.golden
@pytest.mark.parametrize("where", ["at_init", "random"])
def test_outputs_losses_and_gradients_with_pairs(adapted, where):
    golden, source, model, params, _, options = adapted
    tree = lora_files.to_flax(part(golden, "init/" if where == "at_init" else "random/param/"))
    found = outputs(model, lora.merge(params, tree, options), source)
    for key, array in (part(golden, f"{where}/out/") | part(golden, f"{where}/eval/")).items():
        np.testing.assert_allclose(found[key], array, atol=2e-5, err_msg=key)
    (_, parts), grads = loss_of(model, batch_of(source, "in"), lambda tree: lora.merge(params, tree, options))(tree)
    compare_terms(parts, part(golden, f"{where}/loss/"))
    expected = part(golden, f"{where}/grad/")
    compare(lora_files.to_torch(jax.device_get(grads)), expected, golden, **gradient_tolerance(expected))


@pytest.mark.golden
def test_eight_steps_of_lora_and_wise_ft(adapted):
    golden, source, model, params, _, options = adapted
    steps = json.loads(str(golden["traj/steps"]))
    optimize = torch_options(learning_rate=max(step["lr"] for step in steps))
    tree = jax.tree.map(jnp.asarray, lora_files.to_flax(part(golden, "init/")))
    current = state.TrainState(jnp.int32(0), tree, optimize.init(tree, params), base=params, lora=options)
    current = run_steps(golden, source, model, optimize, current)
    final = part(golden, "traj/final/")
    compare(lora_files.to_torch(jax.device_get(current.params)), final, golden, atol=2e-4)
    jax.tree.map(np.testing.assert_array_equal, current.base, params)  # the weights themselves stay
    assert all(jax.tree.leaves(optimize.rules.decay(tree))) and len(golden["traj/no_decay_names"]) == 0
    half = lora.merge(params, lora.scale(lora_files.to_flax(final), 0.5), options)
    found = outputs(model, half, source)
    for key, array in part(golden, "wise_ft_0.5/eval/").items():
        np.testing.assert_allclose(found[key], array, atol=2e-5, err_msg=key)
