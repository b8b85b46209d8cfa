"""Initial weights of `configs/scenes.py` as the original's constructors draw them, for `benchmarks.quality`.

    python -m benchmarks.original_starts draw DIR --seeds 12-59   # start_12.safetensors to start_59.safetensors
    python -m benchmarks.original_starts compare --count 200      # with as many starts of ours, tensor by tensor

PyTorch's modules draw their weights when they are made, so the order of construction decides which numbers a seed
gives. It was found by comparing with files that the original's own constructors drew: of 12 files all tensors are equal
to the bit (tests/test_original_starts.py pins one of them).
"""

import argparse
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from scipy import stats
from torch import Tensor, nn

STATISTICS = (
    "mean",
    "deviation",
    "kurtosis",
    "largest",
    "first singular value",
    "middle one",
    "last one",
    "norms of rows",
)
TOKENS = 64  # rows of the token embedding that are compared, the last ones


def draw(seed: int, model: Mapping[str, Any]) -> dict[str, Tensor]:
    """State dict of a fresh FLAIR, by the original's names, after `torch.manual_seed(seed)`.

    Args:
      seed: of PyTorch's generator.
      model: section `model` of a config. The visual position embedding has deviation `position_std`, as ours.
    """
    vision, text, width = model["vision"], model["text"], model["embed_dim"]
    torch.manual_seed(seed)
    weights = _vision(vision)
    pooling = nn.MultiheadAttention(width, model["pooling"]["heads"])
    weights |= _text(text)
    torch.randn(text["width"], width)  # of a projection that the original draws and then drops
    weights["image_post.proj"] = torch.randn(vision["width"], width) * vision["width"] ** -0.5
    weights["text_post.proj"] = torch.randn(text["width"], width) * text["width"] ** -0.5
    weights |= _named("visual_proj.attn.", pooling)
    for name in ("ln_q", "ln_k", "ln_v"):
        weights |= _named(f"visual_proj.{name}.", nn.LayerNorm(width))
    for name in ("logit_scale", "logit_bias"):
        weights[name] = torch.tensor(model[f"init_{name}"])
    return {name: weight.detach().clone() for name, weight in weights.items()}


def _vision(section: Mapping[str, Any]) -> dict[str, Tensor]:
    width, patch = section["width"], section["patch_size"]
    patches = (section["image_size"] // patch) ** 2
    scale = width**-0.5
    weights = {"visual.conv1.weight": nn.Conv2d(3, width, patch, patch, bias=False).weight}
    weights["visual.class_embedding"] = scale * torch.randn(width)
    positions = scale * torch.randn(1 + patches, width)
    weights["visual.positional_embedding"] = positions * (section["position_std"] / scale)
    weights |= _blocks("visual.transformer.", [_Block(section) for _ in range(section["depth"])])
    for name in ("ln_pre", "ln_post"):
        weights |= _named(f"visual.{name}.", nn.LayerNorm(width))
    return weights


def _text(section: Mapping[str, Any]) -> dict[str, Tensor]:
    """Modules are made first; then normal draws replace the matrices, with the deviations of CLIP."""
    width, depth = section["width"], section["depth"]
    embedding = nn.Embedding(section["vocab_size"], width)
    blocks = [_Block(section) for _ in range(depth)]
    nn.init.normal_(embedding.weight, std=0.02)
    positions = nn.init.normal_(torch.empty(section["context_length"], width), std=0.01)
    for block in blocks:
        nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
        nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * depth) ** -0.5)
        nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * depth) ** -0.5)
    weights = {"token_embedding.weight": embedding.weight, "positional_embedding": positions}
    return weights | _blocks("transformer.", blocks) | _named("ln_final.", nn.LayerNorm(width))


class _Block(nn.Module):
    """The modules of a block, in the order in which they are made."""

    def __init__(self, section: Mapping[str, Any]):
        super().__init__()
        width = section["width"]
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, section["heads"])
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict(dict(c_fc=nn.Linear(width, 4 * width), c_proj=nn.Linear(4 * width, width)))


def _blocks(prefix: str, blocks: Sequence[nn.Module]) -> dict[str, Tensor]:
    weights = {}
    for number, block in enumerate(blocks):
        weights |= _named(f"{prefix}resblocks.{number}.", block)
    return weights


def _named(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {prefix + name: weight for name, weight in module.state_dict().items()}


# ---------------------------------------------------------------------------------------------------------------------
# Beside ours


def compare(count: int, model: Mapping[str, Any]) -> list[tuple[float, str, str]]:
    """Whether both sides draw from the same distributions: Welch's test of each statistic of each tensor.

    Args:
      count: of starts a side, seeds 0 to `count` - 1.
      model: section `model` of a config.

    Returns:
      (p, tensor, statistic) for all tensors that are drawn, the smallest first.

    Raises:
      ValueError: a tensor that is not drawn has other values.
    """
    from flair_jax import models, state
    from flair_jax.convert import names

    module = models.create(model)
    sides = {"ours": [], "original": []}
    for seed in range(count):
        ours = names.to_torch(state.init_params(module, seed), "flair")
        original = {name: weight.numpy() for name, weight in draw(seed, model).items()}
        constant = {name for name, weight in original.items() if np.ptp(weight) == 0}
        for name in constant:
            if not np.allclose(ours[name], original[name]):
                raise ValueError(f"{name} is {np.ravel(ours[name])[0]} here and {np.ravel(original[name])[0]} there")
        for side, weights in (("ours", ours), ("original", original)):
            sides[side].append({name: _statistics(weights[name]) for name in original.keys() - constant})
    found = []
    for name, values in sides["ours"][0].items():
        for number, statistic in enumerate(STATISTICS[: len(values)]):  # a vector has the first four
            a, b = ([start[name][number] for start in starts] for starts in sides.values())
            found.append((float(stats.ttest_ind(a, b, equal_var=False).pvalue), name, statistic))
    return sorted(found)


def _statistics(weight: np.ndarray) -> list[float]:
    x = np.asarray(weight[-TOKENS:] if len(weight) > 10_000 else weight, np.float64)
    values = [x.mean(), x.std(), stats.kurtosis(x, axis=None), np.abs(x).max()]
    if x.ndim > 1:
        rows = x.reshape(len(x), -1)
        singular = np.linalg.svd(rows, compute_uv=False)
        values += [singular[0], singular[len(singular) // 2], singular[-1], np.linalg.norm(rows, axis=1).std()]
    return [float(value) for value in values]


def main(arguments: Sequence[str] | None = None) -> None:
    from flair_jax.configs import scenes

    parser = argparse.ArgumentParser(prog="python -m benchmarks.original_starts", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    drawn = commands.add_parser("draw", help="write start_NN.safetensors, NN the seed")
    drawn.add_argument("folder", type=pathlib.Path, metavar="DIR")
    drawn.add_argument("--seeds", required=True, metavar="FIRST-LAST", help="of PyTorch's generator, inclusive")
    compared = commands.add_parser("compare", help="test both sides' tensors for equal distributions")
    compared.add_argument("--count", type=int, default=200, help="starts a side (%(default)s)")
    chosen = parser.parse_args(arguments)
    model = scenes.get_config().model.to_dict()
    if chosen.command == "draw":
        first, _, last = chosen.seeds.partition("-")
        chosen.folder.mkdir(parents=True, exist_ok=True)
        for seed in range(int(first), int(last or first) + 1):
            save_file(draw(seed, model), chosen.folder / f"start_{seed:02d}.safetensors")
        return
    found = compare(chosen.count, model)
    p = np.array([each[0] for each in found])
    print(f"{len(p)} statistics of {len({name for _, name, _ in found})} tensors, {chosen.count} starts a side")
    print(f"p below 0.05: {np.mean(p < 0.05):.3f} of them; p uniform: p = {stats.kstest(p, 'uniform').pvalue:.2f}")
    for value, name, statistic in found[:5]:
        print(f"{value:.5f}  {name}, {statistic}")


if __name__ == "__main__":
    main()
