"""FLAIR as a PyTorch module: oracle of the parity tests, baseline of the speed figures, home of exported weights.

Parameters have the names of the original's state dict, so `model.load_state_dict` takes released checkpoints and what
`python -m flair_jax.convert to-torch` writes. Ready for `torch.autocast` and `torch.compile`: control flow depends on
shapes alone, attention is `scaled_dot_product_attention` without masks, and scores and losses are float32.

This is the one file of the project that imports torch at the top; import it where it is used.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flair_jax.convert.tables import pair


class InputProjection(nn.Module):
    """Attention's parameters by PyTorch's names, (3W, W) fused, and the output projection."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def merge(self, x: Tensor) -> Tensor:
        """Heads (B, H, T, W/H) -> output projection (B, T, W)."""
        return self.out_proj(x.transpose(1, 2).flatten(2))


class SelfAttention(InputProjection):
    """One matrix product makes queries, keys and values."""

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        batch, length, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, T, 3W)
        qkv = qkv.view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)  # (B, H, T, W/H)
        return self.merge(F.scaled_dot_product_attention(query, key, value, is_causal=causal))


class MLP(nn.Module):
    """Two layers, four times as wide inside, exact GELU."""

    def __init__(self, width: int):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    """Pre-normalised transformer block, (B, T, W) -> (B, T, W)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Equal blocks, one after another."""

    def __init__(self, width: int, depth: int, heads: int, causal: bool):
        super().__init__()
        self.causal = causal
        self.resblocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x, self.causal)
        return x


class VisionTower(nn.Module):
    """ViT, (B, 3, H, W) -> class token and patches, normalised: (B, 1 + L, W)."""

    def __init__(self, image_size: int | tuple[int, int], patch_size: int, width: int, depth: int, heads: int):
        super().__init__()
        height, columns = pair(image_size)
        patches = (height // patch_size) * (columns // patch_size)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(1 + patches, width) * width**-0.5)
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, depth, heads, causal=False)
        self.ln_post = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images).flatten(2).transpose(1, 2)  # (B, L, W)
        first = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([first, x], dim=1) + self.positional_embedding.to(x.dtype)  # (B, 1 + L, W)
        return self.ln_post(self.transformer(self.ln_pre(x)))


class TextConditionedPooling(nn.Module):
    """Pools the patches of an image with a text as the query, in parts that are done once for what they depend on.

    After the projected keys and values comes a row of zeros: a text that finds nothing in the image can attend to it.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = InputProjection(width, heads)
        self.ln_q = nn.LayerNorm(width)
        self.ln_k = nn.LayerNorm(width)
        self.ln_v = nn.LayerNorm(width)

    def project(self, x: Tensor, third: int) -> Tensor:
        """One third of the fused projection, split into heads: (..., D) -> (..., H, D/H)."""
        weight, bias = self.attn.in_proj_weight.chunk(3)[third], self.attn.in_proj_bias.chunk(3)[third]
        return F.linear(x, weight, bias).unflatten(-1, (self.attn.heads, -1))

    def queries(self, text: Tensor) -> Tensor:
        """Once a text: (N, D) -> (N, H, D/H)."""
        return self.project(self.ln_q(text), 0)

    def keys_values(self, local: Tensor) -> tuple[Tensor, Tensor]:
        """Once an image: (B, L, D) -> keys and values (B, H, L + 1, D/H), the zero row last."""
        key = self.project(self.ln_k(local), 1).transpose(1, 2)
        value = self.project(self.ln_v(local), 2).transpose(1, 2)
        return F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Once a pair: (B, N, H, D/H) and the image's keys and values -> (B, N, D)."""
        return self.attn.merge(F.scaled_dot_product_attention(queries.transpose(1, 2), keys, values))


class Projection(nn.Module):
    """A matrix by the name of the original, without bias."""

    def __init__(self, width: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Parameter(torch.randn(width, embed_dim) * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.proj


VISION_SIZES = ("image_size", "patch_size", "width", "depth", "heads")  # other keys concern training in JAX


class TorchFLAIR(nn.Module):
    """FLAIR (Xiao et al., CVPR 2025).

    Args:
      config: the `model` section, see configs/variants.py. dtype and switches of the Flax model are not looked at: here
        `torch.autocast` and `torch.compile` do that work.

    Images are normalised float (B, 3, H, W); tokens are integers (N, T), T up to the context length, and a text ends at
    its first largest id. Features are projected, not normalised.
    """

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        text, embed_dim = config["text"], config["embed_dim"]
        width = text["width"]
        # Registered in the order of the original's state dict: an optimiser's state counts parameters.
        self.positional_embedding = nn.Parameter(torch.randn(text["context_length"], width) * 0.01)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.get("init_logit_scale", math.log(1 / 0.07)))))
        self.logit_bias = nn.Parameter(torch.tensor(float(config.get("init_logit_bias", -10.0))))
        self.visual = VisionTower(**{name: config["vision"][name] for name in VISION_SIZES})
        self.visual_proj = TextConditionedPooling(embed_dim, config["pooling"]["heads"])
        self.transformer = Transformer(width, text["depth"], text["heads"], causal=True)
        self.token_embedding = nn.Embedding(text["vocab_size"], width)
        self.ln_final = nn.LayerNorm(width)
        self.image_post = Projection(config["vision"]["width"], embed_dim)
        self.text_post = Projection(width, embed_dim)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_image(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> class token (B, D), patches (B, L, D)."""
        x = self.image_post(self.visual(images))  # (B, 1 + L, D)
        return x[:, 0], x[:, 1:]

    def encode_text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(N, T) -> state at the end of text (N, D), all states (N, T, D)."""
        local = self.text_post(self.ln_final(self.text_states(tokens)))
        return at_end(local, tokens), local

    def encode_text_pooled(self, tokens: Tensor) -> Tensor:
        """`encode_text` without the states that nothing needs in training: (N, T) -> (N, D)."""
        return self.text_post(self.ln_final(at_end(self.text_states(tokens), tokens)))

    def text_states(self, tokens: Tensor) -> Tensor:
        """(N, T) -> (N, T, W), before the last normalisation."""
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        return self.transformer(x)

    def pool(self, text_pooled: Tensor, image_local: Tensor) -> Tensor:
        """Every image for every text: (N, D), (B, L, D) -> (B, N, D)."""
        queries = self.visual_proj.queries(text_pooled).expand(image_local.shape[0], -1, -1, -1)  # (B, N, H, D/H)
        return self.visual_proj(queries, *self.visual_proj.keys_values(image_local))

    def get_logits(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Scaled cosine of each text with the image pooled for it, plus the bias: (B, N) float32."""
        _, local = self.encode_image(images)
        text = self.encode_text_pooled(tokens)
        cosine = (unit(self.pool(text, local)) * unit(text)).sum(-1)
        return self.logit_scale.exp() * cosine + self.logit_bias

    def get_logits_as_clip(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Scaled cosine of class token and text, without the bias, as the original has it: (B, N) float32."""
        pooled, _ = self.encode_image(images)
        text = self.encode_text_pooled(tokens)
        with torch.autocast(images.device.type, enabled=False):
            return self.logit_scale.exp() * unit(pooled) @ unit(text).T

    def loss(self, images: Tensor, tokens: Tensor, indices: Tensor, mps: bool = True) -> Tensor:
        """The objective on one device, (TCS + MPS) / 2 (golden/flair/README.md, "tiny_loss").

        Args:
          images: (B, 3, H, W).
          tokens: (B, K, T), K captions of each image.
          indices: (B, K + B - 1), which of the B * K captions each image meets, its own K among them.
          mps: False leaves TCS alone.

        Returns:
          float32 scalar: a sum over the images, divided by the number of texts that each meets.
        """
        batch, captions, _ = tokens.shape
        pooled, local = self.encode_image(images)
        text = self.encode_text_pooled(tokens.flatten(0, 1))  # (B * K, D)
        queries = rows(self.visual_proj.queries(text), indices)  # (B, J, H, D/H)
        conditioned = self.visual_proj(queries, *self.visual_proj.keys_values(local))  # (B, J, D)
        with torch.autocast(images.device.type, enabled=False):
            unit_text = unit(text)
            number = torch.arange(batch, device=images.device)[:, None]
            cosine = (unit(conditioned) * rows(unit_text, indices)).sum(-1)  # (B, J)
            tcs = self.pair_loss(cosine, indices // captions == number) / indices.shape[1]
            if not mps:
                return tcs
            owner = torch.arange(batch * captions, device=images.device) // captions
            return (tcs + self.pair_loss(unit(pooled) @ unit_text.T, owner == number) / (batch * captions)) / 2

    def pair_loss(self, cosine: Tensor, positive: Tensor) -> Tensor:
        """Sum of -log sigmoid(y z) over all pairs, y = +1 where `positive`."""
        logits = self.logit_scale.exp() * cosine + self.logit_bias
        return F.softplus(torch.where(positive, -logits, logits)).sum()


def at_end(states: Tensor, tokens: Tensor) -> Tensor:
    """States at the first largest id, which is end-of-text in CLIP's vocabulary: (N, T, W) -> (N, W)."""
    # Not len(tokens): it is a plain number, which would fix N in an exported program.
    return states[torch.arange(tokens.shape[0], device=tokens.device), tokens.argmax(dim=-1)]


def rows(x: Tensor, indices: Tensor) -> Tensor:
    """x[indices] along the first axis; its gradient adds rows, where that of indexing sorts them first."""
    return x.index_select(0, indices.flatten()).unflatten(0, indices.shape)


def unit(x: Tensor) -> Tensor:
    """Unit length along the last axis, in float32."""
    return F.normalize(x.float(), dim=-1)
