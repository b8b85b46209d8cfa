"""Our PyTorch FLAIR against the numbers of the original code."""

import math

import numpy as np
import pytest
from conftest import TINY, load_golden
from optional import torch, torch_flair

from flair_jax.configs import variants

INPUTS = load_golden("tiny_inputs.npz")
OUTPUTS = load_golden("tiny_outputs.npz")
LOSS = load_golden("tiny_loss.json")
ATOL = 1e-5  # sensitivity.json: a wrong epsilon alone moves logits by 1e-4


@pytest.fixture
def twin():
    model = torch_flair.TorchFLAIR(TINY)
    weights = {name: torch.from_numpy(array) for name, array in load_golden("tiny.safetensors").items()}
    model.load_state_dict(weights, strict=True)
    return model


@pytest.fixture(scope="module")
def batch():
    """Images (4, 3, 64, 64), tokens (4, 3, 77) and indices (4, 6) of the original's loss."""
    inputs = load_golden("tiny_loss_inputs.npz")
    return tuple(torch.from_numpy(inputs[key]) for key in ("images", "tokens", "indices"))


def close(actual, expected, atol=ATOL):
    np.testing.assert_allclose(actual.detach().float().numpy(), expected, atol=atol, rtol=0)


@pytest.mark.golden
@torch.no_grad()
def test_forward_equals_the_original(twin):
    images, tokens = torch.from_numpy(INPUTS["images"]), torch.from_numpy(INPUTS["tokens"])
    image_pooled, image_local = twin.encode_image(images)
    text_pooled, text_local = twin.encode_text(tokens)
    close(image_pooled, OUTPUTS["image_global"])
    close(image_local, OUTPUTS["image_local"])
    close(text_pooled, OUTPUTS["text_global"])
    close(text_local, OUTPUTS["text_local"])
    close(twin.encode_text_pooled(tokens), OUTPUTS["text_global"])
    close(twin.pool(text_pooled, image_local), OUTPUTS["pool_out"])
    close(twin.get_logits(images, tokens), OUTPUTS["logits_flair"])
    close(twin.get_logits_as_clip(images, tokens), OUTPUTS["logits_clip"])


@pytest.mark.golden
@pytest.mark.parametrize("case", LOSS["cases"])
def test_loss_and_every_gradient_equal_the_original(twin, batch, case):
    golden = LOSS["cases"][case]
    with torch.no_grad():
        for name, value in golden["override"].items():
            twin.get_parameter(name).fill_(value)
    loss = twin.loss(*batch, mps=golden["added_mps_loss"])
    loss.backward()
    np.testing.assert_allclose(loss.item(), golden["loss_fp64"], rtol=1e-6)
    grads = {name: parameter.grad for name, parameter in twin.named_parameters()}
    norm = math.sqrt(sum(grad.double().square().sum().item() for grad in grads.values()))
    np.testing.assert_allclose(norm, golden["grad_global_norm_fp64"], rtol=1e-6)
    if golden["grads"] is None:
        return
    expected = load_golden(golden["grads"])
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        tolerance = golden["grad_tolerance"][name]
        # Four times the original's own round-off, and the last bits of the tensor's largest entry.
        close(grad, expected[name], atol=2e-6 * tolerance["absmax"] + 4 * tolerance["fp32_vs_fp64_maxabs"] + 1e-8)


@pytest.mark.golden
def test_names_shapes_order_and_count_of_the_published_model():
    full = load_golden("full_state_dict.json")
    with torch.device("meta"):
        model = torch_flair.TorchFLAIR(variants.flair("B/16").to_dict())
    state = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert list(state.items()) == list(full["shapes"].items())
    assert sum(parameter.numel() for parameter in model.parameters()) == full["total_params"] == 150_674_434


def test_images_need_not_be_square():
    model = torch_flair.TorchFLAIR({**TINY, "vision": {**TINY["vision"], "image_size": (32, 80)}})
    pooled, local = model.encode_image(torch.zeros(2, 3, 32, 80))
    assert pooled.shape == (2, 64) and local.shape == (2, 10, 64)


@torch.no_grad()
def test_padding_behind_the_end_changes_nothing(twin):
    tokens = torch.from_numpy(INPUTS["tokens"])[1:2]  # start and end, then 75 of padding
    torch.testing.assert_close(twin.encode_text(tokens[:, :2])[0], twin.encode_text(tokens)[0], atol=ATOL, rtol=0)


def test_compiles_without_a_graph_break(twin, batch):
    expected = twin.loss(*batch)
    actual = torch.compile(twin.loss, fullgraph=True, backend="eager")(*batch)
    torch.testing.assert_close(actual, expected)


def test_autocast_computes_in_bfloat16_and_scores_in_float32(twin, batch):
    expected = twin.loss(*batch).item()
    with torch.autocast("cpu", torch.bfloat16):
        pooled, local = twin.encode_image(batch[0])
        assert pooled.dtype == local.dtype == torch.bfloat16
        assert twin.get_logits(batch[0], batch[1][0]).dtype == torch.float32
        assert twin.get_logits_as_clip(batch[0], batch[1][0]).dtype == torch.float32
        loss = twin.loss(*batch)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() != expected and abs(loss.item() - expected) < 0.01 * expected
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in twin.parameters())
