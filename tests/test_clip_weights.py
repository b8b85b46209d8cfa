"""CLIP's weights as their makers release them: equal features from every kind of file, and files that are refused."""

import io
import json
import os
import pathlib
import pickle
import re
import warnings
import zipfile

os.environ["HF_HUB_OFFLINE"] = "1"

import golden_files
import jax
import ml_dtypes
import numpy as np
import pytest
import transformers
from conftest import nhwc
from optional import torch

import flair_jax
from flair_jax import models, pretrained, state
from flair_jax.config import check as check_config
from flair_jax.configs import base, variants
from flair_jax.convert import __main__ as command
from flair_jax.convert import flax_files, hugging_face, names, released, torch_files, torch_script
from flair_jax.convert.errors import UnsafeFileError, WeightsFileError
from flair_jax.convert.tables import ConversionError, flatten

# The small copy of the second has outputs alone: weights and inputs are those of the first.
FORMS = {"quick": "fsc_clip/tiny_model_quickgelu.npz", "exact": "fsc_clip/tiny_features_gelu.npz"}


def golden(gelu: str) -> dict[str, np.ndarray]:
    return golden_files.load(FORMS["quick"]) | golden_files.load(FORMS[gelu])


def golden_weights(gelu: str) -> dict[str, np.ndarray]:
    arrays = golden(gelu).items()
    return {name.removeprefix("param/"): array for name, array in arrays if name.startswith("param/")}


def section(weights: dict[str, np.ndarray], **changes) -> dict:
    """The `model` section of the reference's tiny CLIP: sizes from the weights, and two heads (README of the data)."""
    tokens, width = weights["visual.positional_embedding"].shape
    patch = weights["visual.conv1.weight"].shape[-1]
    context, text_width = weights["positional_embedding"].shape

    def depth(prefix):
        return len(
            {name.split(".")[-4] for name in weights if name.startswith(prefix) and name.endswith("c_fc.weight")}
        )

    return dict(
        name="clip",
        embed_dim=weights["visual.proj"].shape[1],
        vision=dict(
            image_size=patch * int((tokens - 1) ** 0.5),
            patch_size=patch,
            width=width,
            depth=depth("visual."),
            heads=2,
        ),
        text=dict(
            context_length=context,
            vocab_size=len(weights["token_embedding.weight"]),
            width=text_width,
            depth=depth("transformer."),
            heads=2,
        ),
        pooling=None,
        **changes,
    )


def same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


# -- Features of the reference -----------------------------------------------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize("gelu", FORMS)
def test_features_and_local_tokens_are_the_reference_s(tmp_path, gelu):
    """The reference's class, which is open_clip's with OpenAI's names: pooled, patches, and tokens of texts."""
    numbers, weights = golden(gelu), golden_weights(gelu)
    torch_files.write(tmp_path / "clip.safetensors", weights)
    model = flair_jax.load(tmp_path / "clip.safetensors", section(weights), gelu=gelu)
    assert model.config["gelu"] == gelu
    image = model.encode_image(nhwc(numbers["in/images"]))
    text = model.encode_text(numbers["in/tokens"], local=True)
    for mode in ("train", "eval"):
        unit = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (image.pooled, text.pooled))
        for features, name in zip(unit, ("image_features", "text_features"), strict=True):
            np.testing.assert_allclose(features, numbers[f"{mode}/{name}"], atol=2e-6)
    np.testing.assert_allclose(image.local, numbers["train/image_tokens"], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(text.local, numbers["train/text_tokens"], atol=1e-5, rtol=1e-5)


# -- OpenAI's archives -------------------------------------------------------------------------------------------------


def openai_clip(weights, images, tokens):
    """A CLIP whose modules have OpenAI's names, with these weights, traced; in half precision, as OpenAI's."""
    nn = torch.nn

    class QuickGELU(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(1.702 * x)

    class Block(nn.Module):
        def __init__(self, width, mask=None):
            super().__init__()
            self.attn, self.ln_1, self.ln_2 = nn.MultiheadAttention(width, 2), nn.LayerNorm(width), nn.LayerNorm(width)
            layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": QuickGELU(), "c_proj": nn.Linear(4 * width, width)}
            self.mlp = nn.Sequential()
            for name, layer in layers.items():
                self.mlp.add_module(name, layer)
            self.attn_mask = mask  # neither a parameter nor a buffer, and in the archive all the same

        def forward(self, x):
            y = self.ln_1(x)
            x = x + self.attn(y, y, y, need_weights=False, attn_mask=self.attn_mask)[0]
            return x + self.mlp(self.ln_2(x))

    class Transformer(nn.Module):
        def __init__(self, width, mask=None):
            super().__init__()
            self.resblocks = nn.Sequential(Block(width, mask), Block(width, mask))

        def forward(self, x):  # (B, T, W)
            return self.resblocks(x.transpose(0, 1)).transpose(0, 1)

    def free(name):
        return nn.Parameter(torch.from_numpy(weights[name]))

    class Visual(nn.Module):
        def __init__(self):
            super().__init__()
            width, _, patch, _ = weights["visual.conv1.weight"].shape
            self.class_embedding = free("visual.class_embedding")
            self.positional_embedding = free("visual.positional_embedding")
            self.proj = free("visual.proj")
            self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
            self.ln_pre, self.ln_post, self.transformer = nn.LayerNorm(width), nn.LayerNorm(width), Transformer(width)

        def forward(self, images):
            x = self.conv1(images).flatten(2).transpose(1, 2)
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
            return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj

    class CLIP(nn.Module):
        def __init__(self):
            super().__init__()
            length, width = weights["positional_embedding"].shape
            self.visual = Visual()
            self.transformer = Transformer(width, torch.full((length, length), float("-inf")).triu(1))
            self.token_embedding = nn.Embedding(*weights["token_embedding.weight"].shape)
            self.ln_final = nn.LayerNorm(width)
            for name in ("positional_embedding", "text_projection", "logit_scale"):
                setattr(self, name, free(name))
            for name in released.OPENAI_SIZES:
                self.register_buffer(name, torch.tensor(24))

        def forward(self, images, tokens):
            x = self.ln_final(self.transformer(self.token_embedding(tokens) + self.positional_embedding))
            ends = x[torch.arange(len(x)), tokens.argmax(-1)]
            return self.visual(images), ends @ self.text_projection

    model = CLIP().eval()
    missing, unexpected = model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()}, strict=False)
    assert not unexpected and set(missing) == released.OPENAI_SIZES
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        # Features of the weights as they are after rounding, in float32.
        model.half().float()
        features = [x.numpy() for x in model(torch.from_numpy(images), torch.from_numpy(tokens))]
        return torch.jit.trace(model, (torch.from_numpy(images), torch.from_numpy(tokens))).half(), features


def tree_of(weights):
    """A module of modules without any code, with these weights in half precision and OpenAI's sizes."""
    root = torch.nn.Module()
    for name, array in {**weights, **dict.fromkeys(released.OPENAI_SIZES, np.int64(24))}.items():
        module, (*path, leaf) = root, name.split(".")
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module._modules[part]
        value = torch.from_numpy(np.array(array))
        module.register_buffer(leaf, value.half() if value.is_floating_point() else value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        return torch.jit.script(root)


def save_archive(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(module, str(path))


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """An archive as OpenAI's, and the features that PyTorch gives."""
    numbers = golden("quick")
    path = tmp_path_factory.mktemp("openai") / "ViT-tiny.pt"
    module, features = openai_clip(golden_weights("quick"), numbers["in/images"], numbers["in/tokens"])
    save_archive(module, path)
    return path, features


def test_an_archive_of_openai_s_has_the_features_of_its_module(archive):
    path, (images, texts) = archive
    numbers = golden("quick")
    with pytest.warns(UserWarning, match="tensors are float16; cast to float32"):
        model = flair_jax.load(path, section(golden_weights("quick")))
    assert model.config["gelu"] == "quick"  # nobody but the file said so
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {np.dtype(np.float32)}
    np.testing.assert_allclose(model.encode_image(nhwc(numbers["in/images"])).pooled, images, atol=1e-5)
    np.testing.assert_allclose(model.encode_text(numbers["in/tokens"]).pooled, texts, atol=1e-5)


def test_an_archive_needs_no_torch_and_runs_nothing(archive, monkeypatch):
    path, _ = archive
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    monkeypatch.setattr(pickle, "Unpickler", None)
    found = torch_files.read(path)
    half = {name: array.astype(np.float16) for name, array in golden_weights("quick").items()}
    same(names.plain(found), half)
    assert found.keys() >= released.OPENAI_SIZES


def test_what_an_archive_says_of_its_activation_counts(archive):
    path, _ = archive
    weights = golden_weights("quick")
    for call in (
        lambda: flair_jax.load(path, section(weights, gelu="exact")),
        lambda: flair_jax.load(path, section(weights), gelu="exact"),
    ):
        with pytest.raises(ConversionError, match=r"ViT-tiny\.pt .* gelu is 'exact', the file says 'quick'"):
            call()


@pytest.mark.parametrize(
    ("classes", "tensors", "gelu"),
    [
        ({"QuickGELU", "Linear"}, {}, "quick"),
        ({"Linear"}, released.OPENAI_SIZES, "quick"),  # an activation that is no module of its own
        ({"Linear"}, {"context_length", "vocab_size"}, None),
        ({"GELU", "Linear"}, released.OPENAI_SIZES, None),  # exact or tanh
    ],
)
def test_the_activation_of_an_archive(tmp_path, classes, tensors, gelu):
    opcodes = Opcodes().global_("__torch__", "CLIP").raw(b")\x81}(")
    for name in sorted(tensors):
        opcodes.text(name).tensor(size=(1,), stride=(1,))
    for name in sorted(classes):
        opcodes.text(name.lower()).module(name=name)
    path = write_archive(tmp_path / "a.pt", opcodes.raw(b"ub.").data)
    assert released.read(path).gelu == gelu


def test_a_scripted_module_is_read_too(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.GELU()))
    save_archive(module, tmp_path / "a.pt")
    found = torch_script.read(tmp_path / "a.pt")
    same(found.tensors, {f"0.{name}": x.detach().numpy() for name, x in module[0].named_parameters()})
    assert {"Linear", "GELU", "Sequential"} <= found.classes


def test_views_of_a_storage_are_read(tmp_path):
    """Transposed, from an offset, tied and empty."""
    base = torch.arange(12, dtype=torch.bfloat16)
    module = torch.nn.Module()
    values = {"turned": base.view(3, 4).T, "later": base[5:9], "tied": base[5:9], "empty": base[:0].view(0, 4)}
    for name, value in values.items():
        module.register_buffer(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_archive(torch.jit.script(module), tmp_path / "a.pt")
    found = torch_script.read(tmp_path / "a.pt").tensors
    same(found, {name: value.view(torch.int16).numpy().view(ml_dtypes.bfloat16) for name, value in values.items()})


class Opcodes:
    """Writes a pickle in the way of TorchScript's, opcode by opcode."""

    def __init__(self):
        self.data = b"\x80\x02"

    def global_(self, module, name):
        self.data += f"c{module}\n{name}\n".encode()
        return self

    def raw(self, data):
        self.data += data
        return self

    def text(self, text):
        self.data += b"X" + len(text).to_bytes(4, "little") + text.encode()
        return self

    def integer(self, value):
        self.data += b"\x8a\x09" + value.to_bytes(9, "little", signed=True)
        return self

    def numbers(self, values):
        self.raw(b"(")
        for value in values:
            self.integer(value)
        return self.raw(b"t")

    def tensor(self, size, stride, offset=0, key="0", count=4, kind="FloatStorage"):
        self.global_("torch._utils", "_rebuild_tensor_v2").raw(b"((").text("storage").global_("torch", kind)
        self.text(key).text("cpu").integer(count).raw(b"tQ").integer(offset).numbers(size).numbers(stride)
        return self.raw(b"\x89").global_("collections", "OrderedDict").raw(b")RtR")

    def module(self, *tensors, name="M"):
        """A module with tensors called a, b, …"""
        self.global_("__torch__", name).raw(b")\x81}(")
        for letter, options in zip("abcdefgh", tensors, strict=False):
            self.text(letter).tensor(**options)
        return self.raw(b"ub")


GOOD = dict(size=(2, 2), stride=(2, 1))


def write_archive(path, pickled=None, *, records=(), compression=zipfile.ZIP_STORED, numbers=16, folder="a"):
    pickled = Opcodes().module(GOOD).raw(b".").data if pickled is None else pickled
    with zipfile.ZipFile(path, "w", compression) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names that occur twice
        for name, data in ((f"{folder}/data.pkl", pickled), (f"{folder}/data/0", bytes(numbers)), *records):
            file.writestr(name, data)
        file.writestr(f"{folder}/constants.pkl", b"")
    return path


def test_the_archive_of_these_tests_is_sound(tmp_path):
    found = torch_script.read(write_archive(tmp_path / "a.pt"))
    same(found.tensors, {"a": np.zeros((2, 2), np.float32)})


def nested(depth):
    """A pickle of a module that holds itself twice, `depth` times over: 2**depth modules in a few bytes a level."""
    opcodes = Opcodes().module(GOOD).raw(b"q\x00")
    for level in range(depth):
        opcodes.global_("__torch__", "M").raw(b")\x81}(").text("x").raw(bytes([ord("h"), level]))
        opcodes.text("y").raw(bytes([ord("h"), level])).raw(b"ub" + bytes([ord("q"), level + 1]))
    return opcodes.raw(b".").data


class Runs:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


HOSTILE = {
    "code": (lambda path: pickle.dumps({"a": Runs(path)}, 2), UnsafeFileError, r"calls (_io|io)\.open"),
    "a class": (lambda _: Opcodes().global_("os", "path").raw(b")\x81.").data, UnsafeFileError, "object of os.path"),
    "another protocol": (lambda path: pickle.dumps({"a": Runs(path)}, 4), WeightsFileError, "protocol 4; expected 2"),
    "an extension": (lambda _: b"\x80\x02\x82\x01.", UnsafeFileError, "opcode EXT1"),
    "an instance": (lambda _: b"\x80\x02(ios\nsystem\n.", UnsafeFileError, "opcode INST"),
    "a large array of bytes": (
        lambda _: b"\x80\x02\x96" + (2**40).to_bytes(8, "little") + b".",
        WeightsFileError,
        "expected 1099511627776 bytes",
    ),
    "no storage": (
        lambda _: Opcodes().module(dict(GOOD, kind="UntypedStorage")).raw(b".").data,
        UnsafeFileError,
        "torch.UntypedStorage, which is no storage",
    ),
    "a path for a storage": (
        lambda _: Opcodes().module(dict(GOOD, key="../../etc/passwd")).raw(b".").data,
        UnsafeFileError,
        r"names a storage '\.\./\.\./etc/passwd'; expected a number",
    ),
    "a storage that is not there": (
        lambda _: Opcodes().module(dict(GOOD, key="7")).raw(b".").data,
        WeightsFileError,
        "the record 'data/7' is missing",
    ),
    "a storage of another length": (
        lambda _: Opcodes().module(dict(GOOD, count=5)).raw(b".").data,
        WeightsFileError,
        "data/0 has 16 bytes; its tensor has 20",
    ),
    "a storage of two types": (
        lambda _: Opcodes().module(GOOD, dict(GOOD, kind="IntStorage")).raw(b".").data,
        UnsafeFileError,
        "under two types",
    ),
    "a tensor beyond its storage": (
        lambda _: Opcodes().module(dict(GOOD, offset=1)).raw(b".").data,
        UnsafeFileError,
        "does not fit its storage of 4",
    ),
    "a tensor that repeats a number": (
        lambda _: Opcodes().module(dict(size=(2**40,), stride=(0,))).raw(b".").data,
        UnsafeFileError,
        "does not fit its storage of 4",
    ),
    "a negative stride": (
        lambda _: Opcodes().module(dict(size=(2,), stride=(-1,), offset=1)).raw(b".").data,
        UnsafeFileError,
        "negative or too large",
    ),
    "many tensors of one storage": (
        lambda _: Opcodes().module(GOOD, GOOD, GOOD).raw(b".").data,
        UnsafeFileError,
        "tensors of 12 numbers share storages of 4",
    ),
    "modules without end": (lambda _: nested(60), UnsafeFileError, "contain each other, or too many"),
    "a module with another state": (
        lambda _: Opcodes().global_("__torch__", "M").raw(b")\x81)b.").data,
        WeightsFileError,
        "a tuple where a dict belongs",
    ),
    "no module": (lambda _: b"\x80\x02}.", WeightsFileError, "holds no module"),
    "no end": (lambda _: b"\x80\x02}", WeightsFileError, "cannot be read as a TorchScript archive"),
    "an empty stack": (lambda _: b"\x80\x02R.", WeightsFileError, "cannot be read as a TorchScript archive"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_pickles_that_are_refused(tmp_path, name):
    make, error, message = HOSTILE[name]
    path = write_archive(tmp_path / "a.pt", make(tmp_path / "written"))
    with pytest.raises(error, match=rf"a\.pt.*{message}"):
        torch_files.read(path)
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(compression=zipfile.ZIP_DEFLATED), UnsafeFileError, "is compressed or encrypted"),
        (dict(records=[("a/data/0", bytes(16))]), UnsafeFileError, "'a/data/0' occurs twice"),
        (dict(records=[("a/../../b", b"")]), UnsafeFileError, "leads out of the archive"),
        (dict(records=[("/a/b", b"")]), UnsafeFileError, "leads out of the archive"),
        (dict(records=[("b/data.pkl", b"")]), WeightsFileError, "expected one folder"),
        (dict(records=[("a/byteorder", b"big")]), WeightsFileError, "not little-endian"),
    ],
)
def test_archives_that_are_refused(tmp_path, options, error, message):
    with pytest.raises(error, match=rf"a\.pt.*{message}"):
        torch_files.read(write_archive(tmp_path / "a.pt", **options))


def test_an_archive_that_is_larger_in_memory_than_on_disk_is_refused(tmp_path):
    """Two records that are the same bytes of the file."""
    path = write_archive(tmp_path / "a.pt", records=[("a/data/1", b"")], numbers=5000)
    with zipfile.ZipFile(path) as file:
        infos = {info.filename: info for info in file.infolist()}
        start = file.start_dir
    data = bytearray(path.read_bytes())
    # The central directory's entry of data/1 gets the length and the place of data/0.
    entry = data.index(b"a/data/1", start) - 46
    first = data.index(b"a/data/0", start) - 46
    data[entry + 16 : entry + 28] = data[first + 16 : first + 28]
    data[entry + 42 : entry + 46] = data[first + 42 : first + 46]
    assert infos["a/data/0"].file_size == 5000
    path.write_bytes(data)
    with pytest.raises(UnsafeFileError, match="they overlap"):
        torch_files.read(path)


@pytest.mark.parametrize("keep", [0.3, 0.9, -1])
def test_an_archive_cut_short(archive, tmp_path, keep):
    data = archive[0].read_bytes()
    path = tmp_path / "cut.pt"
    path.write_bytes(data[: int(keep * len(data)) if keep > 0 else keep])
    with pytest.raises(WeightsFileError, match=r"cut\.pt cannot be read"):
        torch_files.read(path)


def test_damaged_numbers_are_noticed(archive, tmp_path):
    data = bytearray(archive[0].read_bytes())
    data[data.index(golden_weights("quick")["visual.proj"].astype(np.float16).tobytes()) + 7] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(WeightsFileError, match=r"Bad CRC-32"):
        torch_files.read(tmp_path / "a.pt")


def test_fuzzed_pickles_raise_nothing_else(archive):
    """Random damage to the pickle: read, or refused; within the time and memory of a test."""
    with zipfile.ZipFile(archive[0]) as file:
        (name,) = [name for name in file.namelist() if name.endswith("/data.pkl")]
        good = file.read(name)
    rng, outcomes = np.random.default_rng(0), set()
    for _ in range(60):
        data = bytearray(good)
        for place in rng.integers(0, len(data), 3):
            data[place] = rng.integers(256)
        buffer = io.BytesIO(data)
        try:
            torch_script._collect(torch_script._interpret(buffer.getvalue()))
            outcomes.add("read")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            outcomes.add(type(error).__name__)
    assert len(outcomes) > 1


# -- open_clip's state dicts -------------------------------------------------------------------------------------------


def to_custom_text(weights):
    """open_clip's `CustomTextCLIP`: everything of the text tower is in a module of its own."""
    return {
        name if name.startswith(("visual.", "logit_")) else f"text.{name}": array for name, array in weights.items()
    }


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("custom", [False, True])
def test_both_layouts_of_open_clip_go_both_ways(tmp_path, prefix, custom):
    weights = golden_weights("exact")
    named = to_custom_text(weights) if custom else weights
    path = tmp_path / "open_clip.safetensors"
    torch_files.write(path, {prefix + name: array for name, array in named.items()})
    params, config = flax_files.load(path, section(weights), "exact")
    same(flatten(params), flatten(names.to_flax(weights, "clip")))
    assert config["gelu"] == "exact"
    back = names.to_torch(params, "clip", "custom_text" if custom else "open_clip")
    same(back, named)
    if not custom:
        assert list(back) == list(weights)  # in the order of the reference's state dict


def test_a_training_checkpoint_of_open_clip(tmp_path):
    weights = golden_weights("exact")
    tensors = {f"module.{name}": torch.from_numpy(array) for name, array in weights.items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": tensors, "optimizer": {"state": {}}}, tmp_path / "epoch_3.pt")
    with pytest.warns(UserWarning, match=r"epoch_3\.pt does not say which GELU .* taken as 'exact'"):
        params, _ = flax_files.load(tmp_path / "epoch_3.pt", section(weights, gelu="exact"))
    same(names.to_torch(params, "clip"), weights)


# Image size, patch, vision width and depth, text width, heads of both, parameters (spec/fsc_clip.md 1.1).
PUBLISHED = {
    "B/32": (224, 32, 768, 12, 512, 12, 8, 151_277_313),
    "B/16": (224, 16, 768, 12, 512, 12, 8, 149_620_737),
    "L/14": (224, 14, 1024, 24, 768, 16, 12, 427_616_513),
    "L/14@336": (336, 14, 1024, 24, 768, 16, 12, 427_944_193),
}


@pytest.mark.parametrize("layout", ["open_clip", "custom_text", "hugging_face"])
@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_are_known_from_shapes(size, layout):
    image, patch, width, depth, text_width, heads, text_heads, count = PUBLISHED[size]
    expected = variants.clip(size.partition("@")[0]).to_dict() | {"gelu": "quick"}
    expected["vision"]["image_size"] = image
    sizes = names.table("clip").sizes(expected)
    table = names.table("clip", layout)
    weights = {
        name: np.broadcast_to(np.float32(0), tuple(int(word) for word in _shape(rule, sizes)))
        for found, _, rule in table._names("torch", sizes)
        for name in found
    }
    assert sum(array.size for array in weights.values()) == count
    found = names.recognize(weights)
    assert (found.model, found.layout, len(found.rules)) == ("clip", layout, len(table.rules))
    assert names.infer_config(weights, "clip", "quick") == expected
    assert (expected["vision"]["heads"], expected["text"]["heads"]) == (heads, text_heads)
    assert (expected["vision"]["width"], expected["vision"]["depth"], expected["text"]["width"]) == (
        width, depth, text_width,
    )  # fmt: skip
    assert expected["vision"]["patch_size"] == patch


def _shape(rule, sizes):
    for word in rule.words("torch"):
        factor, _, name = word.rpartition("*")
        yield int(factor or 1) * (int(name) if name.isdigit() else sizes[name])


def test_a_state_dict_without_its_activation_is_not_guessed(tmp_path, monkeypatch, capsys):
    weights = golden_weights("quick")
    torch_files.write(tmp_path / "a.safetensors", weights)
    for call in (
        lambda: flair_jax.load(tmp_path / "a.safetensors", section(weights)),
        lambda: names.infer_config(*_as_published(weights, monkeypatch), "clip"),
        lambda: flair_jax.load(tmp_path / "a.safetensors"),
    ):
        with pytest.raises(ConversionError, match=r"does not say which GELU .* gelu='quick' for OpenAI's"):
            call()
    with pytest.raises(ConversionError, match="gelu is 'silu'; expected one of 'exact', 'quick', 'tanh'"):
        flair_jax.load(tmp_path / "a.safetensors", gelu="silu")
    arguments = ["to-flax", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    assert command.main(arguments) == 1
    assert "--gelu quick" in capsys.readouterr().err
    assert command.main([*arguments, "--gelu", "quick"]) == 0
    assert flax_files.read(tmp_path / "b.safetensors")[1]["gelu"] == "quick"  # and from now on the file says it
    assert flair_jax.load(tmp_path / "b.safetensors").config["gelu"] == "quick"
    with pytest.raises(ConversionError, match="gelu is 'exact', the file says 'quick'"):
        flair_jax.load(tmp_path / "b.safetensors", gelu="exact")


def _as_published(weights, monkeypatch):
    """As if the tiny CLIP were a published one, so that its heads are known."""
    published = variants.clip("B/32")
    published.update(section(weights))
    monkeypatch.setattr(variants, "clip", lambda *_: published)
    return (weights,)


def test_a_resnet_is_refused_by_name():
    weights = golden_weights("quick") | {"visual.layer1.0.conv1.weight": np.zeros((4, 3, 1, 1), np.float32)}
    with pytest.raises(ConversionError, match="image tower is a ResNet"):
        names.to_flax(weights, "clip")


# -- Hugging Face's folders --------------------------------------------------------------------------------------------

VOCAB, CONTEXT = 60, 10
HF_TEXT = dict(
    hidden_size=24, intermediate_size=96, num_hidden_layers=3, num_attention_heads=3, vocab_size=VOCAB,
    max_position_embeddings=CONTEXT, bos_token_id=VOCAB - 2, eos_token_id=VOCAB - 1, pad_token_id=0,
)  # fmt: skip
HF_VISION = dict(
    hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=24, patch_size=8,
)  # fmt: skip


def randomize(model):
    """Every parameter random: fresh biases are zero and norms one, which would hide a mix-up."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name and name.endswith("weight")
            parameter.normal_(mean=float(is_norm), std=0.1, generator=generator)
    return model.eval().requires_grad_(False)


def hf_model(kind="CLIPModel", act="quick_gelu", **changes):
    text, vision = {**HF_TEXT, "hidden_act": act, **changes}, {**HF_VISION, "hidden_act": act}
    if kind == "CLIPModel":
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
    elif "Text" in kind:
        config = transformers.CLIPTextConfig(**text, projection_dim=20)
    else:
        config = transformers.CLIPVisionConfig(**vision, projection_dim=20)
    return randomize(getattr(transformers, kind)(config))


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(3, 24, 24, 3)).astype(np.float32)
    tokens = rng.integers(1, VOCAB - 1, size=(4, CONTEXT))
    for row, end in enumerate([2, 5, 8, CONTEXT - 1]):
        tokens[row, end:] = [VOCAB - 1] + [0] * (CONTEXT - 1 - end)
    return images, tokens


def outputs(model, inputs):
    """What a model of transformers gives, by name."""
    images, tokens = torch.from_numpy(np.moveaxis(inputs[0], -1, 1).copy()), torch.from_numpy(inputs[1])
    found = {}
    text = model if "Text" in type(model).__name__ else getattr(model, "text_model", None)
    vision = model if "Vision" in type(model).__name__ else getattr(model, "vision_model", None)
    if text is not None:
        text = getattr(text, "text_model", text)
        states = text(input_ids=tokens, output_hidden_states=True)
        found |= dict(last=states.last_hidden_state, pooled=states.pooler_output, second=states.hidden_states[-2])
        if hasattr(model, "text_projection"):
            found["text"] = model.text_projection(states.pooler_output)
    if vision is not None:
        vision = getattr(vision, "vision_model", vision)
        states = vision(pixel_values=images)
        found |= dict(class_token=states.pooler_output, patches=vision.post_layernorm(states.last_hidden_state[:, 1:]))
        if hasattr(model, "visual_projection"):
            found["image"] = model.visual_projection(states.pooler_output)
    return {name: value.detach().numpy() for name, value in found.items()}


def compare(model, inputs, expected, atol=1e-5):
    """Ours against `outputs`; the largest difference must be below `atol` where features are of size 1."""
    images, tokens = inputs
    if "last" in expected:
        found = model.encode_text(tokens, hidden_states=True)
        np.testing.assert_allclose(found.hidden.last, expected["last"], atol=atol)
        np.testing.assert_allclose(found.hidden.second_to_last, expected["second"], atol=atol)
        np.testing.assert_allclose(found.hidden.pooled, expected["pooled"], atol=atol)
        np.testing.assert_allclose(found.pooled, expected.get("text", expected["pooled"]), atol=atol)
        if "text" not in expected:  # nothing to project with
            np.testing.assert_array_equal(found.local, found.hidden.last)
    if "patches" in expected:
        found = model.encode_image(images)
        np.testing.assert_allclose(found.pooled, expected.get("image", expected["class_token"]), atol=atol)
        if "image" not in expected:
            np.testing.assert_allclose(found.local, expected["patches"], atol=atol)


KINDS = [
    "CLIPModel", "CLIPTextModel", "CLIPTextModelWithProjection", "CLIPVisionModel", "CLIPVisionModelWithProjection",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_folders_of_transformers_go_both_ways(tmp_path, inputs, kind):
    """Features of ours equal those of the module; transformers loads what we write, and it equals what it wrote."""
    theirs = hf_model(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = outputs(theirs, inputs)
    model = flair_jax.load(tmp_path / "theirs")
    assert model.config["gelu"] == "quick"
    compare(model, inputs, expected)

    if kind == "CLIPModel":
        found = model.encode_text(np.zeros((0, CONTEXT), int), hidden_states=True)
        assert found.hidden.last.shape == found.hidden.second_to_last.shape == (0, CONTEXT, 24)
        assert found.hidden.pooled.shape == (0, 24) and found.pooled.shape == (0, 20)

    model.save(tmp_path / "flax.safetensors")
    assert command.main(["to-hf", str(tmp_path / "flax.safetensors"), str(tmp_path / "ours")]) == 0
    again, report = getattr(transformers, kind).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.config.architectures == [kind]
    same({k: v.numpy() for k, v in again.state_dict().items()}, {k: v.numpy() for k, v in theirs.state_dict().items()})
    same(outputs(again.eval(), inputs), expected)
    same(flatten(flair_jax.load(tmp_path / "ours").params), flatten(model.params))


@pytest.mark.parametrize(("act", "gelu"), [("gelu", "exact"), ("gelu_new", "tanh"), ("gelu_pytorch_tanh", "tanh")])
def test_config_json_says_the_activation(folder, tmp_path, act, gelu):
    towers = changed(folder, "text", hidden_act=act) | changed(folder, "vision", hidden_act=act)
    path = copy(folder, tmp_path / "a", **towers)
    config = flax_files.load(path)[1]
    assert config["gelu"] == gelu and hugging_face.config_of(config)["text_config"]["hidden_act"] in (act, "gelu_new")
    with pytest.raises(ConversionError, match=f"gelu is 'quick', the file says '{gelu}'"):
        flax_files.load(path, gelu="quick")
    other = {**config, "vision": {**config["vision"], "heads": 2}}
    with pytest.raises(ConversionError, match=r"model\.vision\.heads is 2, the file says 4"):
        flax_files.load(path, other)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    hf_model().save_pretrained(path)
    return path


def copy(folder, path, **config):
    """A folder with another config.json."""
    path.mkdir()
    (path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    content = json.loads((folder / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps({key: value for key, value in content.items() if value != "left out"}))
    return path


def test_shards_a_file_and_an_older_file_hold_the_same(folder, tmp_path):
    expected, config = flax_files.load(folder)
    weights = torch_files.read(folder / "model.safetensors")
    sharded = copy(folder, tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    shards = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    for shard in set(shards.values()):
        torch_files.write(sharded / shard, {name: a for name, a in weights.items() if shards[name] == shard})
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    older = copy(folder, tmp_path / "older")
    (older / "model.safetensors").unlink()
    torch.save(
        {name: torch.from_numpy(a) for name, a in weights.items()}
        | {"text_model.embeddings.position_ids": torch.arange(CONTEXT)[None]},
        older / "pytorch_model.bin",
    )
    for path in (sharded, folder / "model.safetensors", older):
        params, found = flax_files.load(path)
        same(flatten(params), flatten(expected))
        assert found == config


def test_defaults_of_an_older_config_json(folder, tmp_path):
    """`text_config_dict` of older versions wins over `text_config`, as in transformers."""
    text = json.loads((folder / "config.json").read_text())["text_config"]
    path = copy(folder, tmp_path / "a", text_config={"hidden_size": 7}, text_config_dict=text, vision_config_dict=None)
    assert flax_files.load(path)[1] == flax_files.load(folder)[1]
    text.pop("hidden_act")
    assert flax_files.load(copy(folder, tmp_path / "b", text_config=text))[1]["gelu"] == "quick"


def changed(folder, part, **values):
    section = json.loads((folder / "config.json").read_text())[f"{part}_config"]
    return {f"{part}_config": section | values}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda f: changed(f, "text", layer_norm_eps=1e-6), "text: layer_norm_eps is 1e-06; expected 1e-05"),
        (lambda f: changed(f, "text", intermediate_size=95), "text: intermediate_size is 95; expected 96"),
        (lambda f: changed(f, "vision", num_channels=4), "vision: num_channels is 4; expected 3"),
        (lambda f: changed(f, "vision", hidden_act="silu"), "vision: hidden_act is 'silu'; expected one of"),
        (lambda f: changed(f, "vision", hidden_act=["gelu"]), "vision: hidden_act is .'gelu'.; expected one of"),
        (lambda f: changed(f, "vision", hidden_act="gelu"), "the towers have different ones"),
        (lambda f: changed(f, "text", eos_token_id=7), "eos_token_id is 7; our tower pools at the largest id, 59"),
        (lambda f: changed(f, "text", hidden_size="24"), "hidden_size is '24'; expected a positive integer"),
        (lambda f: changed(f, "vision", image_size="24"), "an image size is|image_size is '24'"),
        (lambda f: {"text_config": 7}, "text_config is no object"),
        (lambda f: {"projection_dim": 0}, "projection_dim is 0; expected a positive integer"),
        (lambda f: {"model_type": "bert"}, "a model of type 'bert'; expected one of clip"),
        (lambda f: {"model_type": "left out"}, "a model of type 'None'"),
        (lambda f: {"model_type": "siglip"}, "no class token.*pools the last token.*no module for it"),
        (lambda f: {"model_type": "siglip2_vision_model"}, "a SigLIP, whose towers are not CLIP's"),
        (lambda f: changed(f, "text", num_attention_heads=5), "text.heads is 5, which does not divide the width 24"),
        (lambda f: {"projection_dim": 21}, r"visual_projection.weight: expected \(21, 32\), found \(20, 32\)"),
    ],
)
def test_models_of_transformers_that_ours_is_not(folder, tmp_path, changes, message):
    with pytest.raises(ConversionError, match=rf"(?s){message}"):
        flax_files.load(copy(folder, tmp_path / "a", **changes(folder)))


def test_a_siglip_of_transformers_is_refused_with_what_differs(tmp_path):
    sizes = {key: HF_TEXT[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    config = transformers.SiglipConfig(
        text_config=dict(**sizes, num_attention_heads=3, vocab_size=VOCAB), vision_config=HF_VISION
    )
    transformers.SiglipModel(config).save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match=r"config\.json describes a SigLIP.*attention from a learned probe"):
        flair_jax.load(tmp_path)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin", ".."])
def test_an_index_that_leads_out_of_its_folder_is_refused(folder, tmp_path, shard):
    path = copy(folder, tmp_path / "a")
    (path / "model.safetensors").rename(tmp_path / "model.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"logit_scale": shard}}))
    with pytest.raises(WeightsFileError, match=r"expected \.safetensors files of the same folder"):
        flax_files.load(path)


@pytest.mark.parametrize(
    ("file", "content", "error", "message"),
    [
        ("config.json", "[" * 100_000, WeightsFileError, r"config\.json is no JSON"),
        ("config.json", "[]", WeightsFileError, r"config\.json holds a list; expected an object"),
        ("model.safetensors.index.json", "{}", WeightsFileError, "expected a 'weight_map'"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "b.safetensors"}}',
            FileNotFoundError,
            r"b\.safetensors",
        ),
        (None, None, FileNotFoundError, r"expected model\.safetensors, model\.safetensors\.index\.json or pytorch"),
    ],
)
def test_folders_that_are_damaged(folder, tmp_path, file, content, error, message):
    path = copy(folder, tmp_path / "a")
    (path / "model.safetensors").unlink()
    if file:
        (path / file).write_text(content)
    with pytest.raises(error, match=message):
        flax_files.load(path)


def test_a_file_without_its_config_is_asked_for_it(folder, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"there is no config\.json beside the weights"):
        flair_jax.load(tmp_path / "model.safetensors")


def test_what_transformers_has_no_class_for_is_not_written(tmp_path):
    flair = variants.flair("B/16").to_dict()
    with pytest.raises(ConversionError, match="no names of 'flair' in the layout 'hugging_face'"):
        hugging_face.write(tmp_path, {"vision": {"a": np.zeros(1)}}, flair)
    clip = variants.clip().to_dict()
    clip["vision"]["image_size"] = (224, 448)
    with pytest.raises(ConversionError, match="has square images only"):
        hugging_face.config_of(clip)
    laclip = variants.laclip().to_dict()  # some options leave no trace in the weights
    with pytest.raises(ConversionError, match=r"this model has .*'text\.gelu': 'quick'.*'vision\.norm_eps': 1e-06"):
        hugging_face.config_of(laclip)


def test_the_command_takes_a_folder_and_writes_other_names(folder, tmp_path, capsys):
    def run(*arguments):
        return command.main([str(argument) for argument in arguments]), *capsys.readouterr()

    status, report, _ = run("check", folder)
    assert status == 0 and "PyTorch names of hugging_face, folder" in report
    assert "clip, width 20; vision 24 px, patch 8, 2 x 32, 4 heads; text 10 of 60, 3 x 24, 3 heads; " in report
    assert "no pooling; quick GELU (as config.json says)" in report and "result        good" in report
    assert run("to-flax", folder, tmp_path / "flax.safetensors")[::2] == (0, "")  # nothing was guessed
    assert run("to-torch", tmp_path / "flax.safetensors", tmp_path / "a.safetensors", "--layout", "custom_text")[0] == 0
    params, config = flax_files.load(folder)
    same(torch_files.read(tmp_path / "a.safetensors"), to_custom_text(names.to_torch(params, "clip")))
    same(flatten(flax_files.load(tmp_path / "a.safetensors", config, "quick")[0]), flatten(params))
    for arguments, message in (
        (("to-hf", folder, tmp_path / "b"), "is a folder; to-hf reads the .safetensors that to-flax writes"),
        (("to-hf", folder / "model.safetensors", tmp_path / "b"), "to-hf reads what to-flax writes"),
        (("to-hf", tmp_path / "flax.safetensors", tmp_path / "a.safetensors"), "File exists"),
    ):
        status, _, error = run(*arguments)
        assert status == 1 and message in error


@pytest.mark.filterwarnings("ignore:.*cast to float32")
def test_the_command_takes_an_archive(archive, tmp_path, capsys):
    weights = golden_weights("quick")
    (tmp_path / "model.json").write_text(json.dumps(section(weights)))
    arguments = [str(archive[0]), str(tmp_path / "a.safetensors"), "--model-config", str(tmp_path / "model.json")]
    assert command.main(["to-flax", *arguments]) == 0
    half = {name: array.astype(np.float16).astype(np.float32) for name, array in weights.items()}
    params, config = flax_files.load(tmp_path / "a.safetensors")
    same(names.to_torch(params, "clip"), half)
    assert config["gelu"] == "quick"
    assert command.main(["check", arguments[0]]) == 1  # of these widths there is no published model
    assert "shapes do not tell the number of heads" in capsys.readouterr().out


# -- Towers alone ------------------------------------------------------------------------------------------------------


def test_a_tower_alone_says_that_the_other_is_not_there(tmp_path, inputs):
    images, tokens = inputs
    hf_model("CLIPTextModel").save_pretrained(tmp_path / "text")
    hf_model("CLIPVisionModelWithProjection").save_pretrained(tmp_path / "vision")
    text, vision = (flair_jax.load(tmp_path / name) for name in ("text", "vision"))
    assert text.config["vision"] is None and vision.config["text"] is None
    calls = [
        (lambda: text.encode_image(images), "no image tower"),
        (lambda: text.get_logits(images, tokens), "no image tower"),
        (lambda: text.preprocess([]), "no image tower"),
        (lambda: vision.encode_text(tokens), "no text tower"),
        (lambda: vision.tokenize("a dog"), "no text tower"),
        (lambda: vision.get_logits_as_clip(images, tokens), "no text tower"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_one_tower_of_a_state_dict(tmp_path):
    weights = golden_weights("exact")
    text = {name: a for name, a in weights.items() if not name.startswith("visual.") and name != "logit_scale"}
    torch_files.write(tmp_path / "text.safetensors", text)
    config = section(weights) | {"vision": None}
    model = flair_jax.load(tmp_path / "text.safetensors", config, gelu="exact")
    numbers = golden("exact")
    pooled = np.asarray(model.encode_text(numbers["in/tokens"]).pooled)
    unit = pooled / np.linalg.norm(pooled, axis=-1, keepdims=True)
    np.testing.assert_allclose(unit, numbers["eval/text_features"], atol=2e-6)
    assert names.recognize(text).model == "clip"
    same(names.to_torch(jax.device_get(model.params), "clip"), text)
    with pytest.raises(ConversionError, match="missing visual"):
        flair_jax.load(tmp_path / "text.safetensors", section(weights), gelu="exact")
    with pytest.raises(ConversionError, match="both None"):
        flair_jax.load(tmp_path / "text.safetensors", config | {"text": None}, gelu="exact")


# -- Another resolution ------------------------------------------------------------------------------------------------


def partial(path, model):
    """What a run with `init_partial` starts from; fresh parameters are shapes alone."""
    fresh = jax.eval_shape(lambda: state.init_params(models.create(model), 0))
    return pretrained.initial_params(
        dict(init_from=str(path), init_partial=True, init_resized=False, model=model), fresh
    )


@pytest.mark.parametrize("patches", [5, 2])
def test_positions_for_another_resolution_are_open_clip_s(folder, capsys, patches):
    """Bicubic with antialias over the grid of patches, the class token's row as it is."""
    params, config = flax_files.load(folder)
    table = torch.from_numpy(params["vision"]["position_embedding"])
    found = partial(folder, {**config, "vision": {**config["vision"], "image_size": 8 * patches}})
    assert (
        f"1 resized, 0 fresh, 0 left over\n  resized   vision/position_embedding  (10, 32) -> ({patches**2 + 1}, 32)"
        in (capsys.readouterr().out)
    )
    grid = table[1:].T.reshape(1, 32, 3, 3)
    grid = torch.nn.functional.interpolate(grid, (patches, patches), mode="bicubic", antialias=True)
    expected = torch.cat([table[:1], grid.flatten(2)[0].T])
    np.testing.assert_allclose(found["vision"].pop("position_embedding"), expected.numpy(), atol=1e-6)
    params["vision"].pop("position_embedding")
    same(flatten(found), flatten(params))


def test_one_tower_as_a_start(folder, tmp_path, capsys):
    _, config = flax_files.load(folder)
    hf_model("CLIPTextModel").save_pretrained(tmp_path)
    found = partial(tmp_path, config)
    same(flatten(found["text"]), flatten(flax_files.load(tmp_path)[0]["text"]))
    assert isinstance(found["vision"]["class_embedding"], jax.ShapeDtypeStruct)
    assert "fresh     image_projection  (32, 20), not in the file" in capsys.readouterr().out
    with pytest.raises(ConversionError, match="gelu is 'exact', the file says 'quick'"):
        partial(tmp_path, config | {"gelu": "exact"})


def test_a_tower_alone_is_not_trained():
    config = base.get_config().to_dict() | {"epochs": 1.0}
    config["model"]["text"] = None
    with pytest.raises(
        ValueError, match=r"config\.model\.text is None: a tower alone is neither trained nor evaluated"
    ):
        check_config(config)


# -- The page of the documentation -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*cast to float32")
def test_the_page_s_code_runs(tmp_path, monkeypatch):
    """On a CLIP of a few channels with CLIP's vocabulary, saved in the forms that the page names."""
    page = (pathlib.Path(__file__).parents[1] / "docs" / "using_clip.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    sizes = dict(vocab_size=49408, max_position_embeddings=77, bos_token_id=49406, eos_token_id=49407)
    whole, text = hf_model(**sizes), hf_model("CLIPTextModel", **sizes)
    whole.save_pretrained(tmp_path / "clip-vit-base-patch32")
    text.save_pretrained(tmp_path / "text_encoder")
    params, config = flax_files.load(tmp_path / "clip-vit-base-patch32")
    weights = names.to_torch(params, "clip")
    torch_files.write(tmp_path / "open_clip_model.safetensors", weights)
    save_archive(tree_of(weights), tmp_path / "ViT-B-32.pt")
    published = variants.ConfigDict(config)  # as if a published model had these widths
    monkeypatch.setattr(variants, "clip", lambda *_: published)
    monkeypatch.chdir(tmp_path)
    found = {}
    for block in blocks:
        exec(block, found)
    np.testing.assert_allclose(found["probabilities"].sum(axis=1), 1, atol=1e-5)
    assert found["patches"].shape == (2, 9, 20) and found["tokens"].shape == (2, 77, 20)
    expected = text(input_ids=torch.from_numpy(found["repeated"].astype(np.int64)))
    np.testing.assert_allclose(found["condition"], expected.last_hidden_state, atol=1e-5)
    np.testing.assert_allclose(found["hidden"].pooled, expected.pooler_output, atol=1e-5)
    assert (found["repeated"][1, 1:] == 49407).all()
