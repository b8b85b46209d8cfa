"""The count of operations against published figures and against what XLA counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flair_jax import flops, models
from flair_jax.configs import variants

B16 = variants.flair("B/16").to_dict()
FLAIR = variants.flair_objectives().to_dict()


def test_towers_are_the_published_figures():
    """open_clip's model_profile.csv: 35.13 GFLOP per image, 5.96 a text of 77 tokens; projections come on top."""
    projection = 197 * 2 * 768 * 512
    assert (flops.encode_image(B16) - projection) / 1e9 == pytest.approx(35.13, abs=0.01)
    assert (flops.encode_text(B16, 77) - 2 * 512 * 512) / 1e9 == pytest.approx(5.96, abs=0.01)


def test_pooling_of_a_pair():
    """spec/anchors.md 2.1: 0.40 MFLOP of attention and 0.52 of the output projection a pair, 0.52 of query a text."""
    assert flops.pool(B16, 0, 0, 1) / 1e6 == pytest.approx(0.40 + 0.52, abs=0.01)
    assert flops.pool(B16, 0, 1, 0) / 1e6 == pytest.approx(0.52, abs=0.01)


def test_a_step_at_the_full_length_is_the_published_figure():
    step = (
        flops.train_step(B16, FLAIR | {"text_conditioned": {"weight": 0.5, "block_size": 128}}, 1024, np.full(8192, 77))
        / 1024
        / 1e9
    )
    assert step == pytest.approx(248.4 + 3 * (1080 * 0.93e-3 + 0.21), rel=0.01)


def test_only_real_tokens_count():
    short, long = (flops.train_step(B16, FLAIR, 8, np.full(64, length)) for length in (20, 40))
    assert long - short == pytest.approx(3 * 64 * (flops.encode_text(B16, 40) - flops.encode_text(B16, 20)))


def test_patches_that_are_left_out_do_not_count():
    """A quarter of the patches is an image of half the side."""
    vision, lengths = B16["vision"], np.full(64, 20)
    dropped = flops.train_step({**B16, "vision": {**vision, "patch_dropout": 0.75}}, FLAIR, 8, lengths)
    assert dropped == flops.train_step({**B16, "vision": {**vision, "image_size": 112}}, FLAIR, 8, lengths)


@pytest.mark.parametrize("model", [variants.flair, variants.grain])
def test_xla_counts_the_same_for_the_forward_pass(model):
    """Within a few percent: XLA also counts softmax, normalisation and activations. Two blocks show it as twelve do."""
    section = model("B/16").to_dict()
    section = {**section, "vision": {**section["vision"], "depth": 2}, "text": {**section["text"], "depth": 1}}
    if section["decoder"] is not None:
        section["decoder"]["depth"] = 2
    model = models.create(section)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)), jnp.zeros((1, 1), int)))
    encode = jax.jit(lambda params, images: model.apply(params, images, method="encode_image"))
    cost = encode.lower(params, jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)).compile().cost_analysis()
    assert cost["flops"] == pytest.approx(2 * flops.encode_image(section), rel=0.03)


@pytest.mark.parametrize(
    "kind, tera",
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
    ],
)
def test_peak_by_the_name_that_jax_gives(kind, tera):
    assert flops.peak(kind) == tera * 1e12


def test_an_unknown_chip_has_no_peak():
    assert flops.peak("cpu") is None
