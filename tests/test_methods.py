"""CLIP, SigLIP and combinations are configs: their losses against plain PyTorch, and their training on scenes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, fresh_params, load_golden, nhwc
from optional import torch, torch_flair

from flair_jax import metrics, models, objectives, sharding, state, train
from flair_jax.configs import scenes as scenes_config
from flair_jax.configs import variants
from flair_jax.convert import names
from flair_jax.models.text import Text

OBJECTIVES = {
    "clip": variants.clip_objectives().to_dict(),
    "siglip": variants.siglip_objectives().to_dict(),
}
BIAS = {"clip": None, "siglip": -3.0}


# One block a tower is enough where objectives are compared: they see what comes out of the last one.
ONE_BLOCK = {**TINY, "vision": {**TINY["vision"], "depth": 1}, "text": {**TINY["text"], "depth": 1}}


def section(name, base=TINY):
    return {**base, "name": name, "pooling": None, "init_logit_bias": BIAS[name], "init_logit_scale": 1.2}


def torch_loss(twin, name, images, tokens):
    """The loss with all pairs at once; caption c of image i is row i * K + c."""
    image, _ = twin.encode_image(images)
    text = twin.encode_text_pooled(tokens)
    captions = len(tokens) // len(images)
    if name == "clip":
        logits = twin.logit_scale.exp() * torch_flair.unit(image) @ torch_flair.unit(text[::captions]).T
        own = torch.arange(len(image))
        return (torch.nn.functional.cross_entropy(logits, own) + torch.nn.functional.cross_entropy(logits.T, own)) / 2
    logits = twin.logit_scale.exp() * torch_flair.unit(image) @ torch_flair.unit(text).T + twin.logit_bias
    own = torch.arange(len(text)) // captions == torch.arange(len(image))[:, None]
    return -torch.nn.functional.logsigmoid(torch.where(own, logits, -logits)).sum() / len(text)


@pytest.fixture(scope="module")
def inputs():
    """8 images, some of them darker copies, and 2 captions each, of the golden inputs."""
    golden = load_golden("tiny_inputs.npz")
    images, tokens = golden["images"], golden["tokens"]
    copies = (0.5 ** (np.arange(8) // len(images))).astype(np.float32)
    return (
        np.resize(images, (8, *images.shape[1:])) * copies[:, None, None, None],
        np.resize(tokens, (16, tokens.shape[1])),
    )


@pytest.fixture(scope="module", params=["clip", "siglip"])
def expected(request, inputs, tiny_params):
    """Name, parameters without pooling, and PyTorch's value and gradients, by our paths."""
    name = request.param
    twin = torch_flair.TorchFLAIR({**ONE_BLOCK, "init_logit_bias": -3.0})
    towers = {
        tower: {key: x for key, x in tiny_params[tower].items() if not re.fullmatch(r"blocks_[1-9]\d*", key)}
        for tower in ("vision", "text")
    }
    scalars = {"logit_scale": np.float32(1.2), "logit_bias": np.float32(-3.0)}
    weights = names.to_torch({**tiny_params, **towers, **scalars})
    twin.load_state_dict({key: torch.from_numpy(np.array(x)) for key, x in weights.items()})
    images, tokens = (torch.from_numpy(x) for x in inputs)
    value = torch_loss(twin, name, images, tokens.long())
    value.backward()
    grads = {
        key: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy() for key, p in twin.named_parameters()
    }
    left_out = {"pooling", *(["logit_bias"] if name == "clip" else [])}
    params = names.to_flax(weights)
    keep = [key for key in params if key not in left_out]
    grads = names.to_flax(grads)
    return name, {key: params[key] for key in keep}, value.item(), {key: grads[key] for key in keep}


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_value_and_gradient_equal_a_dense_computation(expected, inputs, devices):
    name, params, value, grads = expected
    model = models.create(section(name, ONE_BLOCK))
    fresh = jax.eval_shape(lambda: state.init_params(model, 0))
    assert jax.tree.map(np.shape, fresh) == jax.tree.map(np.shape, params)
    text = Text.padded(jnp.asarray(inputs[1]))
    batch = {"images": nhwc(inputs[0]), "texts": {"tokens": text.tokens, "ends": text.ends}}

    def loss(params, batch):
        features = model.apply({"params": params}, batch["images"], Text(**batch["texts"]), method="features")
        return objectives.weighted_sum(OBJECTIVES[name], features, batch, jax.random.key(0))[0]

    mesh = sharding.create_mesh(devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(loss))(
            jax.device_put(params, sharding.replicated(mesh)), sharding.global_batch(mesh, batch)
        )
    found_value, found_grads = jax.device_get(found)
    np.testing.assert_allclose(found_value, value, rtol=5e-6)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6 * largest, rtol=1e-4), found_grads, grads)


@pytest.mark.golden
def test_without_pooling_models_rank_by_pooled_features(tiny_params):
    model = models.create(section("clip"))
    params = {key: x for key, x in tiny_params.items() if key not in ("pooling", "logit_bias")}
    bound, golden = model.bind({"params": params}), load_golden("tiny_outputs.npz")
    inputs = load_golden("tiny_inputs.npz")
    image, text = bound.encode_image(nhwc(inputs["images"])), bound.encode_text(Text.padded(inputs["tokens"]))
    assert not model.has_pooling
    np.testing.assert_allclose(bound.score(image, text), golden["logits_clip"], atol=1e-5)
    for method in ("attention_maps", "dense_features"):
        with pytest.raises(ValueError, match=r"config\.model\.pooling is None"):
            getattr(bound, method)(*(image, text)[: 2 if method == "attention_maps" else 1])


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_names_go_both_ways(name):
    model = models.create(section(name))
    params = fresh_params(model)
    weights = names.to_torch(params, name)
    assert names.recognize(weights).model == name
    assert ("logit_bias" in weights) == (name == "siglip") and weights["visual.proj"].shape == (96, 64)
    back = names.to_flax(weights, name, section(name))
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize(("variant", "millions"), [("B/32", 151.277313), ("B/16", 149.620737), ("L/14", 427.616513)])
def test_sizes_are_those_of_openai(variant, millions):
    model = models.create(variants.clip(variant).to_dict())
    shapes = jax.eval_shape(lambda: state.init_params(model, 0))
    assert sum(np.prod(x.shape, dtype=int) for x in jax.tree.leaves(shapes)) / 1e6 == pytest.approx(millions, abs=1e-6)


@pytest.mark.usefixtures("on_one_device")
@pytest.mark.parametrize("method", ["clip", "siglip", "flair+clip"])
def test_a_method_trains_on_scenes(method, tmp_path):
    config = scenes_config.get_config(method)
    config.model.update(
        embed_dim=32,
        vision=dict(image_size=36, patch_size=18, width=32, depth=1, heads=2),
        text=dict(context_length=16, width=16, depth=1, heads=2),
    )
    if config.model.pooling is not None:
        config.model.pooling.heads = 2
    config.data.scenes.update(count=64, size=36)
    config.evaluators.scenes.update(count=8, size=36)
    config.update(batch_size=16, steps=24, log_every=1, save_every=100)
    config.optimizer.warmup_steps = 4
    report = train.train(config.to_dict(), tmp_path)
    lines = metrics.read_json_lines(tmp_path)
    first, last = (np.mean([line["loss"] for line in part]) for part in (lines[:6], lines[-6:]))
    assert last < 0.97 * first
    assert set(config.objectives) <= set(lines[0])
    total = sum(options["weight"] * lines[0][name] for name, options in config.objectives.items())
    assert lines[0]["loss"] == pytest.approx(float(total), rel=1e-5)
    modes = {name.split("/")[2] for name in report if name.startswith("retrieval/scenes/")}
    assert modes == ({"global", "chance"} if method != "flair+clip" else {"flair", "topk", "global", "chance"})
