"""The Flax model against the numbers of the original code, and against itself in its other forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, load_golden, losses, model_section, nhwc
from optional import torch

from flair_jax import cpu, models, objectives
from flair_jax.configs import variants
from flair_jax.models import dual_encoder, layers
from flair_jax.models.text import Text

INPUTS = load_golden("tiny_inputs.npz")
OUTPUTS = load_golden("tiny_outputs.npz")
IMAGES = nhwc(INPUTS["images"])
TOKENS = INPUTS["tokens"]
ATOL = 1e-5  # sensitivity.json: a wrong epsilon alone moves the logits by 1e-4; the reference's own round-off is 4e-6


def features(model, params):
    @jax.jit
    def encode(params, images, tokens):
        image = model.apply({"params": params}, images, method="encode_image")
        return image, model.apply({"params": params}, Text.padded(tokens), method="encode_text")

    return encode(params, IMAGES, TOKENS)


@pytest.fixture(scope="module")
def encoded(tiny_model, tiny_params):
    return features(tiny_model, tiny_params)


def close(actual, expected, atol=ATOL):
    np.testing.assert_allclose(np.asarray(actual, np.float32), expected, atol=atol, rtol=0)


@pytest.mark.golden
def test_features(encoded):
    image, text = encoded
    close(image.pooled, OUTPUTS["image_global"])
    close(image.local, OUTPUTS["image_local"])
    close(text.pooled, OUTPUTS["text_global"])
    close(text.local, OUTPUTS["text_local"])


@pytest.mark.golden
def test_every_block(tiny_model, tiny_params):
    """Block by block, so that a difference names the layer it comes from."""
    apply = jax.jit(functools.partial(tiny_model.apply, capture_intermediates=True))
    _, seen = apply({"params": tiny_params}, IMAGES, TOKENS)
    vision, text = seen["intermediates"]["vision"], seen["intermediates"]["text"]
    patches = OUTPUTS["dbg_vision_conv1"].reshape(*OUTPUTS["dbg_vision_conv1"].shape[:2], -1).swapaxes(1, 2)
    close(vision["patch_embedding"]["__call__"][0], patches)
    close(vision["ln_pre"]["__call__"][0], OUTPUTS["dbg_vision_ln_pre"])
    for name, tower in (("vision", vision), ("text", text)):
        for i in range(TINY[name]["depth"]):
            close(tower[f"blocks_{i}"]["__call__"][0], OUTPUTS[f"dbg_{name}_block{i}"])
    close(vision["__call__"][0][:, 0], OUTPUTS["image_global_pre"])
    close(vision["__call__"][0][:, 1:], OUTPUTS["image_local_pre"])
    close(text["__call__"][0][0], OUTPUTS["text_global_pre"])
    close(text["__call__"][0][1], OUTPUTS["text_local_pre"])


@pytest.mark.golden
def test_pooling_and_scores(tiny_model, tiny_params, encoded):
    image, text = encoded
    bound = tiny_model.bind({"params": tiny_params})
    close(bound.pooling(text.pooled, image.local), OUTPUTS["pool_out"])
    weights, zero_mass = bound.attention_maps(image, text)
    heads = OUTPUTS["pool_attn_heads"].swapaxes(1, 2)  # (I, N, H, L + 1)
    close(weights, heads[..., :-1])
    close(zero_mass, heads[..., -1])
    close(weights.mean(axis=2), OUTPUTS["pool_attn_avg"][..., :-1])
    # Cosines times exp(scale) = 16, so sixteen times the tolerance of the features.
    close(bound.score(image, text) + tiny_params["logit_bias"], OUTPUTS["logits_flair"], 1e-4)
    close(bound.global_score(image, text), OUTPUTS["logits_clip"], 1e-4)


def test_dense_features_are_single_token_pooling(tiny_model, tiny_params, encoded):
    """All attention on one token gives the token's dense feature."""
    image, _ = encoded
    bound = tiny_model.bind({"params": tiny_params})
    keys, values = bound.pooling.keys_values(image.local[:, :1])
    query = jnp.zeros((4, 1, *keys.shape[2:]))
    pooled = bound.pooling.attend(query, keys[:, :1], values[:, :1])
    close(bound.dense_features(image)[:, :1], pooled)


@functools.partial(jax.jit, static_argnums=1)
@jax.value_and_grad
def sum_of_sines(params, model):
    return jnp.sum(jnp.sin(model.apply({"params": params}, IMAGES, TOKENS)))


@pytest.mark.parametrize("change", [dict(scan_blocks=True), dict(remat="dots"), dict(scan_blocks=True, remat="full")])
def test_scanned_and_rematerialised_blocks_read_the_same_parameters(tiny_params, tiny_model, change):
    expected, expected_grads = sum_of_sines(tiny_params, tiny_model)
    actual, grads = sum_of_sines(tiny_params, models.create({**TINY, **change}))
    close(actual, expected, 1e-4)
    jax.tree.map(lambda a, b: close(a, b, 1e-4 * (1e-3 + np.abs(b).max())), grads, jax.device_get(expected_grads))


@pytest.mark.parametrize("at_a_time", [5, 6, 1024])  # of 11: three blocks of 4, the last one padded, two of 6, one
def test_scores_image_by_image_are_the_same(tiny_model, tiny_params, encoded, monkeypatch, at_a_time):
    """As a single CPU computes them, some texts of an image at a time."""
    image, text = encoded
    text = text.replace(pooled=text.pooled[:11])
    bound = tiny_model.bind({"params": tiny_params})
    together = bound.score(image, text)
    monkeypatch.setattr(cpu, "alone", lambda: True)
    monkeypatch.setattr(dual_encoder, "CACHED_TEXTS", at_a_time)
    close(bound.score(image, text), together, 1e-5)


def test_bfloat16_keeps_parameters_and_scores_in_float32(tiny_params):
    model = models.create({**TINY, "dtype": "bfloat16"})
    image, text = features(model, tiny_params)
    assert image.local.dtype == text.pooled.dtype == jnp.bfloat16
    bound = model.bind({"params": tiny_params})
    assert bound.score(image, text).dtype == bound.attention_maps(image, text)[0].dtype == jnp.float32
    # 8 bits of mantissa through three blocks; the reference's features reach 3.7.
    close(image.local, OUTPUTS["image_local"], 0.06)
    close(bound.score(image, text) + tiny_params["logit_bias"], OUTPUTS["logits_flair"], 0.5)
    params = jax.eval_shape(model.init, jax.random.key(0), IMAGES[:1], TOKENS[:1])["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_matrices_are_cast_once_to_the_same_numbers(tiny_params):
    """Loss and gradients in bfloat16 are equal to the bit to those where every use casts for itself."""
    model = models.create({**TINY, "dtype": "bfloat16"})
    text = Text.padded(TOKENS)

    def loss(params, cast):
        params = models.cast_matrices(params, model.dtype) if cast else params
        features = model.apply({"params": params}, IMAGES, text, method="features")
        return objectives.weighted_sum(losses(), features, {}, jax.random.key(0))[0]

    step = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    once, often = (jax.device_get(step(tiny_params, cast)) for cast in (True, False))
    jax.tree.map(np.testing.assert_array_equal, once, often)
    assert {leaf.dtype for leaf in jax.tree.leaves(once)} == {np.dtype("float32")}

    cast = models.cast_matrices(tiny_params, model.dtype)
    paths = {"/".join(key.key for key in path) for path, x in jax.tree.leaves_with_path(cast) if x.dtype != np.float32}
    kernels = ("attention/qkv", "attention/out", "mlp/fc", "mlp/proj")
    blocks = {f"{tower}/blocks_{i}/{name}/kernel" for tower in ("vision", "text") for i in range(3) for name in kernels}
    assert paths == blocks | {"vision/patch_embedding/kernel", "image_projection", "text_projection"}
    jax.tree.map(np.testing.assert_array_equal, models.cast_matrices(tiny_params, np.float32), tiny_params)


def test_patch_dropout_keeps_a_random_share_in_order(tiny_params):
    model = models.create({**TINY, "vision": {**TINY["vision"], "patch_dropout": 0.3}})  # 11 of 16 patches
    bound = model.bind({"params": tiny_params})
    places = np.broadcast_to(np.arange(17.0)[:, None], (4000, 17, 1))
    kept = np.asarray(bound.vision.drop_patches(places, jax.random.key(0)))[..., 0]  # (B, 12)
    assert kept.shape == (4000, 12)
    assert (kept[:, 0] == 0).all() and (np.diff(kept, axis=1) > 0).all()
    share = np.bincount(kept[:, 1:].astype(int).reshape(-1), minlength=17)[1:] / 4000
    np.testing.assert_allclose(share, 11 / 16, atol=5 * np.sqrt(11 / 16 * 5 / 16 / 4000))

    # The pixels of what is left out count for nothing, those of the rest do.
    encode = jax.jit(lambda images, rng: model.apply({"params": tiny_params}, images, rng=rng, method="encode_image"))
    rng = jax.random.key(1)
    left = np.asarray(bound.vision.drop_patches(places[:4], rng))[..., 0].astype(int)
    shown = (left[:, 1:, None] == np.arange(1, 17)).any(axis=1)  # (B, L)
    pixels = np.repeat(np.repeat(shown.reshape(4, 4, 4), 16, axis=1), 16, axis=2)[..., None]  # (B, H, W, 1)
    before, after = encode(IMAGES, rng), encode(IMAGES * pixels, rng)
    assert before.local.shape == (4, 11, 64)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert np.abs(encode(IMAGES * ~pixels, rng).local - before.local).min(axis=-1).max() > 1e-3

    # Evaluation leaves nothing out.
    close(encode(IMAGES, None).local, OUTPUTS["image_local"])


def test_patch_dropout_is_for_training(tiny_params):
    """The loss differs from that of all patches, by draw; with a share of zero the draw is not seen."""
    text = Text.padded(TOKENS)
    draws = np.zeros((len(IMAGES), len(IMAGES)), np.int32)

    def values(share):
        model = models.create({**TINY, "vision": {**TINY["vision"], "patch_dropout": share}})

        @jax.jit
        def loss(rng):
            features = model.apply({"params": tiny_params}, IMAGES, text, rng=rng, method="features")
            return objectives.weighted_sum(losses(), features, {"draws": draws}, rng)[0]

        return [float(loss(jax.random.key(seed))) for seed in (0, 1)]

    whole, dropped = values(0.0), values(0.5)
    assert len({whole[0], *dropped}) == 3 and whole[0] == whole[1]


@pytest.mark.parametrize("share", [-0.1, 1.0, 50])
def test_a_share_of_patches_that_cannot_be_left_out_is_refused(share):
    model = models.create({**TINY, "vision": {**TINY["vision"], "patch_dropout": share}})
    with pytest.raises(ValueError, match=rf"patch_dropout is {share}"):
        jax.eval_shape(model.init, jax.random.key(0), IMAGES[:1], TOKENS[:1])


def pack(tokens: np.ndarray, rows: list[list[int]], length: int) -> Text:
    """Lays the captions named in `rows` side by side, in an order of its own."""
    ends_in_row = tokens.argmax(axis=1)
    packed = {key: np.zeros((len(rows), length), np.int32) for key in ("tokens", "positions", "segments")}
    ends = np.zeros(len(tokens), np.int32)
    for r, row in enumerate(rows):
        at = 0
        for s, caption in enumerate(row, start=1):
            size = ends_in_row[caption] + 1
            packed["tokens"][r, at : at + size] = tokens[caption, :size]
            packed["positions"][r, at : at + size] = np.arange(size)
            packed["segments"][r, at : at + size] = s
            ends[caption] = r * length + at + size - 1
            at += size
    return Text(ends=ends, **packed)


def short_captions(seed=0):
    rng = np.random.default_rng(seed)
    tokens = np.zeros((6, 77), np.int32)
    for row, size in zip(tokens, (3, 11, 20, 7, 30, 5), strict=True):
        row[: size + 2] = [510, *rng.integers(1, 500, size), 511]
    return tokens


ROWS = [[4, 1], [0, 2, 5, 3]]  # 32 + 13 and 5 + 22 + 7 + 9 of 48 tokens


def test_packed_equals_padded_in_value_and_gradient(tiny_model, tiny_params):
    tokens = short_captions()

    @jax.jit
    def value(params, text):
        pooled = tiny_model.apply({"params": params}, text, method="encode_text").pooled
        return jnp.sum(jnp.sin(pooled * jnp.arange(1, 7)[:, None])), pooled

    text_params = {key: tiny_params[key] for key in ("text", "text_projection")}
    rest = {key: leaf for key, leaf in tiny_params.items() if key not in text_params}
    grad = jax.value_and_grad(lambda p, text: value({**rest, **p}, text), has_aux=True)
    (padded, padded_pooled), padded_grads = grad(text_params, Text.padded(tokens))
    (packed, packed_pooled), packed_grads = grad(text_params, pack(tokens, ROWS, 48))
    close(packed_pooled, padded_pooled)
    close(packed, padded, 1e-4)
    jax.tree.map(lambda a, b: close(a, b, 1e-5 * (1 + np.abs(b).max())), packed_grads, jax.device_get(padded_grads))


@pytest.mark.parametrize("rows", [None, ROWS])
@pytest.mark.parametrize(
    "change",
    [
        {},
        dict(scan_blocks=True),
        dict(remat="dots"),
        dict(remat="full", scan_blocks=True),
        dict(text={**TINY["text"], "depth": 1}),
    ],
)
def test_the_last_block_may_work_on_the_ends_alone(tiny_params, change, rows):
    tokens = short_captions()
    text = Text.padded(tokens) if rows is None else pack(tokens, rows, 48)
    model = models.create({**TINY, "text": {**TINY["text"], "depth": 2}, **change})  # one block before the last

    def value(params, local):
        features = model.apply({"params": params}, text, local=local, method="encode_text")
        assert (features.local is not None) == local
        return jnp.sum(jnp.sin(features.pooled * jnp.arange(1, 7)[:, None])), features.pooled

    grad = jax.jit(jax.value_and_grad(value, has_aux=True), static_argnums=1)
    (_, ends), of_ends = grad(tiny_params, False)
    (_, pooled), expected = grad(tiny_params, True)
    close(ends, pooled)
    jax.tree.map(lambda a, b: close(a, b, 1e-5 * (1 + np.abs(b).max())), of_ends, jax.device_get(expected))
    assert np.abs(expected["text"]["blocks_0"]["mlp"]["fc"]["kernel"]).max() > 1e-3


def test_the_ends_alone_take_less_work(tiny_model, tiny_params):
    def flops(local):
        def encode(text):
            return tiny_model.apply({"params": tiny_params}, text, local=local, method="encode_text").pooled

        return jax.jit(encode).lower(pack(short_captions(), ROWS, 48)).cost_analysis()["flops"]

    # A third of the blocks is the last one, of which the ends leave the input projection and the attention.
    assert flops(False) < 0.85 * flops(True)


def test_neighbours_in_a_packed_row_never_leak(tiny_model, tiny_params):
    """Bit for bit: a caption's features do not move when every other caption of its row changes."""
    encode = jax.jit(lambda text: tiny_model.apply({"params": tiny_params}, text, method="encode_text").pooled)
    tokens = short_captions()
    changed = np.where((tokens > 0) & (tokens < 510), tokens % 499 + 1, tokens)
    before = encode(pack(tokens, ROWS, 48))
    for caption in range(len(tokens)):
        mixed = changed.copy()
        mixed[caption] = tokens[caption]
        after = encode(pack(mixed, ROWS, 48))
        np.testing.assert_array_equal(after[caption], before[caption])
        others = [i for i in range(len(tokens)) if i != caption]
        assert np.abs(np.asarray(after - before)[others]).max(axis=1).min() > 1e-3  # the change does reach the others


def test_rectangular_images():
    reference = dict(
        embed_dim=32,
        init_logit_bias=-10,
        vision_cfg=dict(image_size=(32, 64), layers=1, width=32, head_width=16, patch_size=16),
        text_cfg=dict(context_length=8, vocab_size=32, width=32, heads=2, layers=1),
    )
    model = models.create(model_section(reference))
    tokens = jnp.array([[30, 5, 31, 0, 0, 0, 0, 0]])
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 64, 3)), tokens)["params"]
    image = jnp.zeros((1, 32, 64, 3)).at[:, :16, 48:].set(1.0)  # the last patch of the first row
    bound = model.bind({"params": params})
    difference = bound.vision.patch_embedding(image)
    assert difference.shape == (1, 8, 32)
    assert np.flatnonzero(np.abs(difference[0]).sum(axis=-1)).tolist() == [3]
    with pytest.raises(ValueError, match=r"\(1, 64, 32, 3\); expected \(batch, 32, 64, 3\)"):
        bound.encode_image(image.swapaxes(1, 2))
    with pytest.raises(ValueError, match=r"9 tokens.*context_length is 8"):
        bound.encode_text(Text.padded(jnp.ones((1, 9), jnp.int32)))
    assert np.isnan(bound.encode_text(Text.padded(tokens + 1)).pooled).all()  # id 32 of 32: no silent neighbour


@pytest.mark.golden
def test_initialisation_of_every_tensor_is_the_reference_s():
    """Mean and deviation of each of the 313 tensors of ViT-B-16-FLAIR, and their number of elements."""
    from flair_jax.convert import names

    golden = load_golden("full_init.json")
    model = models.create(variants.flair("B/16"))
    # Tensor by tensor, by a generator that is a single operation: one program of all takes half a minute to compile.
    init = model.init(jax.random.key(0, impl="rbg"), jnp.zeros((1, 224, 224, 3)), jnp.zeros((1, 1), jnp.int32))
    params = names.to_torch(jax.device_get(init["params"]))
    assert sum(leaf.size for leaf in params.values()) == golden["total_params"] == 150_674_434
    assert params.keys() == golden["init"].keys()
    for name, expected in golden["init"].items():
        leaf, std = params[name].astype(np.float64), expected["std"]
        assert list(leaf.shape) == expected["shape"], name
        # Five standard errors of a sample of this size, ours and the golden one's three seeds together.
        error = 5 * std * np.sqrt(4 / 3 / leaf.size)
        assert abs(leaf.mean() - expected["mean"]) <= error + 1e-6, name
        assert abs(leaf.std() - std) <= error + 1e-6, name


def test_gelu_is_pytorch_s():
    x = np.linspace(-12, 12, 2001, dtype=np.float32)
    exact = torch.nn.functional.gelu(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(layers.gelu(x), exact, atol=1e-6)
    assert 1e-4 < np.abs(layers.gelu(x, "tanh") - exact).max() < 1e-3


@pytest.mark.parametrize("change", [dict(attention="flash"), dict(gelu="relu"), dict(remat="half")])
def test_unknown_ways_to_compute_are_refused_by_name(change):
    [value] = change.values()
    with pytest.raises(ValueError, match=f"'{value}'; expected"):
        jax.eval_shape(models.create({**TINY, **change}).init, jax.random.key(0), IMAGES, TOKENS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(embed_dim=0), "model.embed_dim is 0; expected a positive integer"),
        (dict(dtype="flot32"), "model.dtype is 'flot32'; expected a type of floats"),
        (dict(dtype="int32"), "model.dtype is 'int32'; expected a type of floats"),
        (
            dict(vision={**TINY["vision"], "heads": 7}),
            "model.vision.heads is 7, which does not divide",
        ),
        (dict(vision={**TINY["vision"], "patch_size": 0}), "model.vision.patch_size is 0; expected a positive integer"),
        (dict(text={**TINY["text"], "depth": -1}), "model.text.depth is -1; expected a positive integer"),
        (dict(text={**TINY["text"], "width": "64"}), "model.text.width is '64'; expected a positive integer"),
        (dict(pooling={"heads": 7}), "model.pooling.heads is 7, which does not divide model.embed_dim"),
    ],
)
def test_sizes_that_make_no_model_are_refused_by_name(change, words):
    with pytest.raises(ValueError) as raised:
        models.create({**TINY, **change})
    assert words in str(raised.value)


def test_remat_saves_memory():
    """In this order: all is kept, dense layers, the blocks' inputs."""
    deep = {**TINY, "vision": {**TINY["vision"], "depth": 8}}

    def temporaries(remat):
        # Unrolled, the CPU compiler finds what is computed twice and keeps it after all.
        model = models.create({**deep, "remat": remat, "scan_blocks": True})
        params = jax.eval_shape(model.init, jax.random.key(0), IMAGES, TOKENS)
        images = jax.ShapeDtypeStruct((64, *IMAGES.shape[1:]), jnp.float32)
        grad = jax.grad(lambda p, x: jnp.sum(jnp.sin(model.apply(p, x, method="encode_image").local)))
        return jax.jit(grad).lower(params, images).compile().memory_analysis().temp_size_in_bytes

    none, dots, full = map(temporaries, ("none", "dots", "full"))
    assert none > 1.2 * dots > 1.44 * full


def test_unknown_names_are_refused():
    with pytest.raises(TypeError, match="towers"):
        models.create({**TINY, "towers": 3})
    with pytest.raises(ValueError, match="sometimes"):
        model = models.create({**TINY, "remat": "sometimes"})
        jax.eval_shape(model.init, jax.random.key(0), IMAGES[:1], TOKENS[:1])
    with pytest.raises(ValueError, match="no multiple of patch_size"):
        model = models.create({**TINY, "vision": {**TINY["vision"], "patch_size": 24}})
        jax.eval_shape(model.init, jax.random.key(0), IMAGES[:1], TOKENS[:1])
    with pytest.raises(KeyError, match="XXL"):
        variants.flair("XXL")
