"""The kind of loader that the reference trains with, as the rival of `data.loader`: its own libraries, at their best.

webdataset reads and shuffles, Pillow and torch do what torchvision's transforms of PIL images do (RandomResizedCrop
with antialiased bicubic weights, ToTensor, Normalize), open_clip's tokenizer makes the ids, and a torch DataLoader runs
the workers. torch and webdataset are imported inside the functions: nothing else of flair_jax needs them.
"""

import importlib.util
import math
import pathlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from flair_jax.data.transforms import images
from flair_jax.data.transforms.captions import CaptionOptions, draw
from flair_jax.data.transforms.tokenizer import Tokenizer

# Of the reference's training scripts: shards and samples in the shuffle buffers, and how many before the first leaves.
SHARD_BUFFER, SHARD_START = 2000, 500
SAMPLE_BUFFER, SAMPLE_START = 5000, 1000
LISTED_SHARDS = 4000  # a list of few shards is repeated up to here, so that the buffers do not run empty in between


def require() -> None:
    """
    Raises:
      ModuleNotFoundError: torch or webdataset is not installed; the message says how to.
    """
    missing = [name for name in ("torch", "webdataset") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"the reference's loader needs {' and '.join(missing)}: pip install 'flair_jax[bench]', or leave it out "
            "with --no-reference"
        )


def batches(
    shards: Sequence[str],
    *,
    batch_size: int,
    image_size: int,
    captions: int,
    workers: int,
    tokenize: Callable[[list[str]], Any],
) -> Iterator[tuple[Any, Any]]:
    """Endless batches: float32 tensors (B, 3, H, W), normalised, and the tokenizer's ids, int64 (B, K, T).

    Args:
      shards: paths of tars.
      batch_size: images, B.
      image_size: side in pixels.
      captions: K, captions per image.
      workers: processes of the DataLoader; 0: this one.
      tokenize: K captions to ids (K, T).
    """
    import torch
    import webdataset

    options = CaptionOptions(count=captions)  # draws as the reference's, call by call

    def text(record: dict) -> torch.Tensor:
        return torch.as_tensor(tokenize(draw(record, random, options)))

    dataset = webdataset.DataPipeline(
        webdataset.SimpleShardList(list(shards) * -(-LISTED_SHARDS // len(shards))),
        webdataset.detshuffle(SHARD_BUFFER, SHARD_START),
        webdataset.split_by_worker,
        webdataset.tarfile_to_samples(),
        webdataset.shuffle(SAMPLE_BUFFER, initial=SAMPLE_START),
        webdataset.decode("pilrgb"),
        webdataset.rename(image="jpg;png;jpeg;webp", text="json"),
        webdataset.map_dict(image=transform(image_size), text=text),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(batch_size, partial=False),
    ).repeat()
    processes = {"persistent_workers": True, "multiprocessing_context": "fork"} if workers else {}
    return iter(torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers, **processes))


def transform(size: int) -> Callable:
    """Of a PIL image, step by step as torchvision takes it: crop, resize, to RGB, to float32 (3, H, W), normalise."""
    import torch
    from PIL import Image

    mean, std = (torch.as_tensor(values)[:, None, None] for values in (images.MEAN, images.STD))

    def apply(image: Image.Image) -> torch.Tensor:
        left, top, width, height = _random_box(image.width, image.height)
        image = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image.convert("RGB")))  # (H, W, 3)
        values = pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255)  # (3, H, W)
        return values.clone().sub_(mean).div_(std)

    return apply


def _random_box(
    width: int, height: int, scale: tuple[float, float] = (0.9, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> tuple[int, int, int, int]:
    """(left, top, width, height), drawn from torch's generator as torchvision's RandomResizedCrop does."""
    import torch

    bounds = torch.log(torch.tensor(ratio))
    for _ in range(10):
        area = height * width * torch.empty(1).uniform_(*scale).item()
        aspect = torch.exp(torch.empty(1).uniform_(bounds[0], bounds[1])).item()
        part_width, part_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < part_width <= width and 0 < part_height <= height:
            top = torch.randint(0, height - part_height + 1, size=(1,)).item()
            left = torch.randint(0, width - part_width + 1, size=(1,)).item()
            return left, top, part_width, part_height
    part_width = min(width, round(height * ratio[1]))
    part_height = min(height, round(width / ratio[0]))
    return (width - part_width) // 2, (height - part_height) // 2, part_width, part_height


def tokenizer() -> tuple[str, Callable[[Sequence[str]], Any]]:
    """The reference's tokenizer, ("open_clip", its `SimpleTokenizer`); ("flair_jax", ours, faster) if it is absent.

    open_clip's file is loaded by path: importing the package would need torchvision, which the tokenizer does not.
    """
    package = importlib.util.find_spec("open_clip")
    if package is None:
        return "flair_jax", Tokenizer()
    path = pathlib.Path(package.origin).with_name("tokenizer.py")
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return "open_clip", module.SimpleTokenizer()
