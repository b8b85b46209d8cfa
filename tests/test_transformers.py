"""Hugging Face's CLIP, an oracle that shares no code with FLAIR's: our towers and our tokenizer are CLIP's."""

import gzip
import json
import os
import pathlib

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import transformers
from optional import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from flair_jax import models
from flair_jax.convert import names
from flair_jax.data.transforms import tokenizer
from flair_jax.models.text import Text

VOCAB, EOT, CONTEXT, EMBED = 100, 99, 12, 40  # the end of text is the largest id, as in CLIP's vocabulary
VISION = dict(image_size=32, patch_size=8, width=64, depth=2, heads=4)
TEXT = dict(context_length=CONTEXT, vocab_size=VOCAB, width=48, depth=3, heads=3)
ATOL = 1e-5  # features are of size 1


def small_clip():
    """A CLIP of our sizes, every parameter random: fresh biases are zero and norms one, which would hide a mix-up."""
    generator = torch.Generator().manual_seed(0)

    def tower(width, depth, heads):
        sizes = dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth, num_attention_heads=heads)
        return dict(**sizes, hidden_act="gelu", layer_norm_eps=1e-5)

    vision, text = ({key: sizes[key] for key in ("width", "depth", "heads")} for sizes in (VISION, TEXT))
    config = transformers.CLIPConfig(
        vision_config=dict(**tower(**vision), image_size=VISION["image_size"], patch_size=VISION["patch_size"]),
        text_config=dict(
            **tower(**text),
            vocab_size=VOCAB,
            max_position_embeddings=CONTEXT,
            bos_token_id=EOT - 1,
            eos_token_id=EOT,
            pad_token_id=0,
        ),
        projection_dim=EMBED,
    )
    model = transformers.CLIPModel(config).eval().requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                is_norm = "norm" in name and name.endswith("weight")
                parameter.normal_(mean=float(is_norm), std=0.1, generator=generator)
    return model


@pytest.fixture(scope="module")
def clip():
    return small_clip()


@pytest.fixture(scope="module")
def flax_clip(clip):
    section = dict(name="clip", embed_dim=EMBED, vision=VISION, text=TEXT)
    weights = {name: x.numpy() for name, x in clip.state_dict().items()}
    return models.create(section).bind({"params": names.to_flax(weights, "clip", section)})


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(3, 32, 32, 3)).astype(np.float32)
    tokens = rng.integers(1, EOT, size=(5, CONTEXT))  # int64, as PyTorch wants it
    for row, end in enumerate([1, 4, 6, 9, CONTEXT - 1]):
        tokens[row, end:] = [EOT] + [0] * (CONTEXT - 1 - end)
    tokens[2, 8] = EOT  # behind the first one: it does not count
    return images, tokens


def nchw(images):
    return torch.from_numpy(np.moveaxis(images, -1, 1).copy())


def close(actual, expected, atol=ATOL):
    np.testing.assert_allclose(actual, expected.numpy(), atol=atol, rtol=0)


def test_image_features(clip, flax_clip, inputs):
    images, _ = inputs
    vision = clip.vision_model(pixel_values=nchw(images))
    features = flax_clip.encode_image(images)
    assert np.abs(features.pooled).max() > 0.5
    close(features.pooled, clip.visual_projection(vision.pooler_output))
    # CLIP normalises the class token alone, FLAIR all of them.
    patches = clip.vision_model.post_layernorm(vision.last_hidden_state[:, 1:])
    close(features.local, clip.visual_projection(patches))


def test_text_features(clip, flax_clip, inputs):
    _, tokens = inputs
    text = clip.text_model(input_ids=torch.from_numpy(tokens))
    features = flax_clip.encode_text(Text.padded(tokens))
    assert np.abs(features.pooled).max() > 0.5
    close(features.pooled, clip.text_projection(text.pooler_output))
    close(features.local, clip.text_projection(text.last_hidden_state))


def test_global_score_is_clips_logit(clip, flax_clip, inputs):
    images, tokens = inputs
    expected = clip(input_ids=torch.from_numpy(tokens), pixel_values=nchw(images)).logits_per_image
    score = flax_clip.global_score(flax_clip.encode_image(images), flax_clip.encode_text(Text.padded(tokens)))
    close(score, expected, atol=np.exp(clip.logit_scale.item()) * ATOL)


CAPTIONS = [
    "",
    "a photo of a cat",
    "A man in a RED jacket skis down a snow-covered slope, 2 trees behind him.",
    "It's the dog's bowl; they're sure we'll say they've seen it (I'm not, he'd be).",
    "Two   spaces,\ta tab\nand a new line...",
    "12,345.67 dollars & 50% off!!! #sale @shop",
    "a café in Zürich, naïve façade, 北京 and Москва",
    "floccinaucinihilipilification, xqzvkj and pneumonoultramicroscopicsilicovolcanoconiosis",
    "a very long caption " * 40,
]


@pytest.fixture(scope="module")
def clip_tokenizer(tmp_path_factory):
    """Built from CLIP's merges in the files and with the names of special tokens that transformers expects."""
    folder = tmp_path_factory.mktemp("clip")
    source = pathlib.Path(tokenizer.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
    letters = list(bytes_to_unicode().values())
    merges = gzip.decompress(source.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    entries = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    assert len(entries) == tokenizer.VOCAB_SIZE
    (folder / "vocab.json").write_text(json.dumps({entry: index for index, entry in enumerate(entries)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return transformers.CLIPTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("caption", CAPTIONS, ids=lambda text: text[:20])
def test_token_ids(caption, clip_tokenizer):
    expected = clip_tokenizer(caption, truncation=True, max_length=77)["input_ids"]
    row = tokenizer.Tokenizer()(caption)[0]
    assert row.tolist() == expected + [0] * (77 - len(expected))
