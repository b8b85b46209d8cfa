"""Weights from PyTorch to Flax and back: names, files, faults, and the command."""

import io
import json
import math
import os
import pickle
import re
import resource
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from conftest import TINY, load_golden
from flax.traverse_util import flatten_dict
from optional import safetensors_torch, torch, torch_flair

import flair_jax
from flair_jax import models
from flair_jax.configs import variants
from flair_jax.convert import __main__ as command
from flair_jax.convert import flax_files, names, torch_files
from flair_jax.convert.tables import ConversionError, flatten
from flair_jax.convert.torch_files import UnsafeFileError, WeightsFileError

FULL = load_golden("full_state_dict.json")


@pytest.fixture
def weights():
    return load_golden("tiny.safetensors")


@pytest.fixture
def section(tmp_path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(TINY))
    return str(path)


def save_pt(path, weights, **beside):
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    torch.save({**beside, "state_dict": tensors} if beside else tensors, path)


def same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype and actual[name].shape == array.shape, name
        assert np.array_equal(actual[name], array), name


def random_weights(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


# -- Names -------------------------------------------------------------------------------------------------------------


def test_there_and_back_is_bit_equal_for_all_names_of_the_published_model():
    """All 313 names at a twelfth of the width: every size that a rule names is a different number."""
    sizes = {768: 48, 3072: 192, 2304: 144, 512: 40, 2048: 160, 1536: 120, 49408: 96, 197: 26, 77: 11, 16: 2}
    shapes = {name: [sizes.get(n, n) for n in shape] for name, shape in FULL["shapes"].items()}
    weights = random_weights(shapes)
    assert len(weights) == 313
    back = names.to_torch(names.to_flax(weights))
    same(back, weights)
    assert list(back) == list(weights)
    assert all(array.flags.c_contiguous for array in back.values())


def test_the_tree_is_the_one_that_the_flax_model_makes():
    model = models.create(variants.flair("B/16"))
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), np.zeros((1, 224, 224, 3), np.float32), np.zeros((1, 77), np.int32)
    )["params"]
    expected = {path: leaf.shape for path, leaf in flatten_dict(shapes, sep="/").items()}
    zeros = {name: np.broadcast_to(np.float32(0), shape) for name, shape in FULL["shapes"].items()}
    actual = {path: array.shape for path, array in flatten(names.to_flax(zeros)).items()}
    assert actual == expected
    assert sum(math.prod(shape) for shape in actual.values()) == FULL["total_params"]


def test_axes():
    """A value at a known place arrives where the Flax tree has it."""
    weights = random_weights({name: a.shape for name, a in load_golden("tiny.safetensors").items()})
    params = flatten(names.to_flax(weights))
    conv, fc = weights["visual.conv1.weight"], weights["transformer.resblocks.2.mlp.c_fc.weight"]
    assert params["vision/patch_embedding/kernel"][3, 5, 1, 7] == conv[7, 1, 3, 5]
    assert params["text/blocks_2/mlp/fc/kernel"][4, 9] == fc[9, 4]
    assert params["image_projection"][6, 2] == weights["image_post.proj"][6, 2]
    assert params["pooling/qkv/kernel"][1, 130] == weights["visual_proj.attn.in_proj_weight"][130, 1]


def test_config_from_shapes_is_the_table_of_variants():
    shapes = {name: np.broadcast_to(np.float32(0), shape) for name, shape in FULL["shapes"].items()}
    assert names.infer_config(shapes) == variants.flair("B/16").to_dict()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (None, None, "number of heads"),  # the tiny model itself: no published one has its widths
        ("visual.positional_embedding", (18, 96), "no square grid"),
    ],
)
def test_a_config_that_shapes_cannot_tell_is_asked_for(weights, name, shape, message):
    if name:
        weights[name] = np.zeros(shape, np.float32)
    with pytest.raises(ConversionError, match=message):
        names.infer_config(weights)


@pytest.mark.parametrize("widths", [dict(embed_dim=1024), dict(text=dict(width=768))])
def test_heads_are_guessed_for_the_widths_of_published_models_only(widths):
    """The rule of 64 channels per head fits these widths too, and would be wrong for a model that has others."""
    sizes = {"vision.tokens": 197, "vision.patch_size": 16, "vision.width": 768, "vision.depth": 12, "embed_dim": 512}
    sizes |= {"text.context_length": 77, "text.vocab_size": 49408, "text.width": 512, "text.depth": 12}
    assert names.table("flair").config(sizes) == variants.flair("B/16").to_dict()
    sizes |= {"embed_dim": widths.get("embed_dim", 512), "text.width": widths.get("text", {}).get("width", 512)}
    with pytest.raises(ConversionError, match=r"\(768, 512, 512\).*; these weights have .*give the model section"):
        names.table("flair").config(sizes)


def test_pair_of_sizes(weights):
    weights["visual.positional_embedding"] = weights["visual.positional_embedding"][:11]
    config = {**TINY, "vision": {**TINY["vision"], "image_size": (32, 80)}}
    assert names.to_flax(weights, config=config)["vision"]["position_embedding"].shape == (11, 96)
    with pytest.raises(
        ConversionError, match=r"shape +visual.positional_embedding: expected \(17, 96\), found \(11, 96\)"
    ):
        names.to_flax(weights, config=TINY)


def test_everything_wrong_is_in_one_report(weights):
    del weights["logit_bias"], weights["visual.conv1.weight"]
    weights["text_projection"] = np.zeros((64, 64), np.float32)
    weights["ln_final.bias"] = np.zeros((64, 1), np.float32)
    weights["transformer.resblocks.1.mlp.c_fc.weight"] = weights["transformer.resblocks.1.mlp.c_fc.weight"].T
    weights["visual.ln_pre.bias"] = np.zeros(96, np.int64)
    with pytest.raises(ConversionError) as caught:
        names.to_flax(weights)
    found = [(problem.kind, problem.name) for problem in caught.value.problems]
    assert found == [
        ("missing", "logit_bias"),
        ("missing", "visual.conv1.weight"),
        ("unknown", "text_projection"),
        ("shape", "transformer.resblocks.1.mlp.c_fc.weight"),
        ("shape", "ln_final.bias"),
        ("dtype", "visual.ln_pre.bias"),
    ]
    message = str(caught.value)
    assert all(name in message for _, name in found)
    assert "2 missing, 1 unknown, 2 shape, 1 dtype" in message
    assert "expected (256, 64), found (64, 256)" in message
    assert "expected shape (96, 3, vision.patch_size, vision.patch_size)" in message  # nothing else tells the patch
    assert "a CLIP trained without one goes on with 0" in message


def test_the_way_back_refuses_as_well(tiny_params):
    params = {**tiny_params, "extra": np.zeros(2), "logit_scale": np.zeros((1,), np.float32)}
    with pytest.raises(ConversionError) as caught:
        names.to_torch(params)
    assert [(p.kind, p.name) for p in caught.value.problems] == [("unknown", "extra"), ("shape", "logit_scale")]


@pytest.mark.parametrize("gap", [0, 1, 2])
def test_a_missing_block_is_noticed(weights, gap):
    prefix = f"visual.transformer.resblocks.{gap}."
    rest = {name: array for name, array in weights.items() if not name.startswith(prefix)}
    with pytest.raises(ConversionError, match=f"missing {prefix}ln_1.weight"):
        names.to_flax(rest, config=TINY)
    if gap < 2:  # Without a config a shorter tower is a tower, but not one with a hole.
        with pytest.raises(ConversionError, match=f"missing {prefix}ln_1.weight"):
            names.to_flax(rest)


def test_a_tower_without_blocks_is_refused(weights):
    rest = {name: array for name, array in weights.items() if not name.startswith("transformer.")}
    with pytest.raises(ConversionError, match=r"missing transformer\.resblocks\.0\.ln_1\.weight"):
        names.to_flax(rest)


@pytest.mark.parametrize("content", [{}, {"fc.weight": np.zeros((2, 2), np.float32)}])
def test_other_weights_are_named_as_such(content):
    with pytest.raises(ConversionError, match=f"not one of the {len(content)} names"):
        names.to_flax(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": 128}, r"image_post.proj: expected \(96, 128\), found \(96, 64\)"),
        ({"vision": {**TINY["vision"], "depth": 4}}, r"missing visual\.transformer\.resblocks\.3\.ln_1"),
        ({"text": {**TINY["text"], "heads": 3}}, "text.heads is 3, which does not divide the width 64"),
        ({"text": {"width": 64}}, "lacks 'heads'"),
        ({"vision": 7}, "does not hold sizes"),
        ({"vision": {**TINY["vision"], "width": "96"}}, r"model\.vision: width '96' and heads 3; expected positive"),
        ({"vision": {**TINY["vision"], "heads": 0}}, r"model\.vision: width 96 and heads 0; expected positive"),
        ({"vision": {**TINY["vision"], "depth": -1}}, r"the sizes \{'vision.depth': -1\}; expected positive"),
        ({"vision": {**TINY["vision"], "depth": 10**12}}, r"model\.vision\.depth is 1,000,000,000,000, and the file"),
        ({"name": "grain"}, "for 'grain'; expected 'flair'"),
    ],
)
def test_a_given_config_is_held_against_the_shapes(weights, change, message):
    with pytest.raises(ConversionError, match=message):
        names.to_flax(weights, config={**TINY, **change})


def test_unknown_model(weights):
    with pytest.raises(ConversionError, match="no table of names for the model 'blip'"):
        names.to_flax(weights, "blip")


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("beside", [None, {"epoch": 3, "name": "run", "optimizer": {"state": {}}}])
def test_prefix_and_checkpoint_around_the_weights(weights, prefix, beside):
    inner = {prefix + name: array for name, array in weights.items()}
    same(names.to_torch(names.to_flax({**beside, "state_dict": inner} if beside else inner)), weights)


def test_a_prefix_before_some_names_only_is_refused(weights):
    weights["module.logit_scale"] = weights.pop("logit_scale")
    with pytest.raises(ConversionError, match=r"unknown module\.logit_scale"):
        names.to_flax(weights)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_cast_and_said(weights, dtype):
    halves = {name: array.astype(dtype) if array.ndim else array for name, array in weights.items()}
    with pytest.warns(UserWarning, match=f"95 of 97 tensors are {np.dtype(dtype)}; cast to float32"):
        params = names.to_flax(halves)
    same(names.to_torch(params), {name: array.astype(np.float32) for name, array in halves.items()})


# -- Files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
def test_files_there_and_back(tmp_path, weights, suffix):
    path = tmp_path / f"a{suffix}"
    weights["turned"] = weights["image_post.proj"].T  # not contiguous
    torch_files.write(path, weights)
    same(torch_files.read(path), weights)
    assert os.listdir(tmp_path) == [path.name]
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask():
    os.umask(mask := os.umask(0))
    return mask


def test_torch_loads_what_is_written(tmp_path, tiny_params):
    torch_files.write(tmp_path / "a.pt", names.to_torch(tiny_params))
    model = torch_flair.TorchFLAIR(TINY)
    model.load_state_dict(torch.load(tmp_path / "a.pt", weights_only=True), strict=True)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_bfloat16_files(tmp_path, suffix):
    expected = torch.randn(5, 3).to(torch.bfloat16)
    path = tmp_path / f"a{suffix}"
    if suffix == ".pt":
        torch.save({"a": expected, "b": expected.T}, path)
    else:
        safetensors_torch.save_file({"a": expected, "b": expected.T.contiguous()}, path)
    read = torch_files.read(path)
    assert read["a"].dtype == ml_dtypes.bfloat16
    assert np.array_equal(read["a"].astype(np.float32), expected.float().numpy())
    assert np.array_equal(read["b"].astype(np.float32), expected.T.float().numpy())


class Writes:
    """A pickle of this object opens a file for writing when it is loaded the careless way."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def careless(data):
    torch.load(io.BytesIO(data), weights_only=False)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "hidden"])
def test_a_pickle_that_carries_code_is_refused_and_not_run(tmp_path, form):
    target, path = tmp_path / "written", tmp_path / "evil.pt"
    content = {"logit_scale": torch.zeros(()), "extra": Writes(target)}
    if form == "hidden":  # beside the state dict, where only the optimizer would be
        content = {"state_dict": {"logit_scale": torch.zeros(())}, "optimizer": Writes(target)}
    if form == "pickle":
        path.write_bytes(pickle.dumps({"extra": Writes(target)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    with pytest.raises(
        UnsafeFileError, match=r"evil\.pt carries code or objects .* Nothing of it was run\. .* save `model\."
    ) as caught:
        torch_files.read(path)
    assert not target.exists()
    if form != "pickle":  # A newer protocol is refused before its names are read.
        assert re.search(r"GLOBAL _?io\.open", str(caught.value))
    (pickle.loads if form == "pickle" else careless)(path.read_bytes())
    assert target.exists()  # The trap is a real one.


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("keep", [0, 20, 0.5, -1])
def test_a_file_cut_short(tmp_path, weights, suffix, keep):
    path = tmp_path / f"cut{suffix}"
    torch_files.write(path, weights)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(WeightsFileError, match=rf"cut\{suffix} cannot be read"):
        torch_files.read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: {"a": torch.zeros(2), "b": 3}, "1 of 2 entries are not dense tensors .'b': int"),
        (lambda: {"model": {"a": torch.zeros(2)}}, "'model': dict"),
        (lambda: {3: torch.zeros(2)}, "3: Tensor"),
        (lambda: {"a": torch.zeros(2).to_sparse()}, "'a': Tensor"),
        (lambda: [torch.zeros(2)], "holds a list; expected a state dict"),
        (lambda: torch.zeros(2), "holds a Tensor"),
    ],
)
def test_content_that_is_no_state_dict(tmp_path, content, message):
    torch.save(content(), tmp_path / "a.pt")
    with pytest.raises(WeightsFileError, match=rf"a\.pt.*{message}"):
        torch_files.read(tmp_path / "a.pt")


def test_unknown_suffix(tmp_path):
    for act in (torch_files.read, lambda path: torch_files.write(path, {})):
        with pytest.raises(WeightsFileError, match=r"a\.npz: the suffix '\.npz' names no format"):
            act(tmp_path / "a.npz")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        torch_files.read(tmp_path / "absent.safetensors")
    with pytest.raises(FileNotFoundError, match="absent is not a folder"):
        torch_files.write(tmp_path / "absent" / "a.safetensors", {})


def test_without_torch(tmp_path, monkeypatch):
    """Safetensors goes on working, a pickle says what to install."""
    monkeypatch.setitem(sys.modules, "torch", None)
    torch_files.write(tmp_path / "a.safetensors", {"a": np.zeros(2)})
    same(torch_files.read(tmp_path / "a.safetensors"), {"a": np.zeros(2)})
    with pytest.raises(ImportError, match=r"a\.pt: \.pt files need PyTorch: `pip install -e '\.\[torch\]'`"):
        torch_files.write(tmp_path / "a.pt", {"a": np.zeros(2)})
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_conversion_of_safetensors_imports_neither_torch_nor_jax(tmp_path, tiny_params):
    flax_files.write(tmp_path / "a.safetensors", tiny_params, TINY)
    code = (
        "import sys; from flair_jax.convert.__main__ import main; status = main(['to-torch', *sys.argv[1:3]]);"
        "sys.exit(status or len({'torch', 'jax', 'flax', 'tensorflow'} & sys.modules.keys()))"
    )
    arguments = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)
    same(torch_files.read(arguments[1]), load_golden("tiny.safetensors"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_full_disk_leaves_the_old_file(tmp_path, weights, suffix):
    path = tmp_path / f"a{suffix}"
    torch_files.write(path, {"a": np.arange(3)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))  # bytes; the weights have 2.5 million
    try:
        with pytest.raises(OSError, match=rf"a\{suffix} was not written"):
            torch_files.write(path, weights)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == [path.name]
    same(torch_files.read(path), {"a": np.arange(3)})


def test_flax_files(tmp_path, tiny_params):
    path = tmp_path / "flax.safetensors"
    section = variants.flair("B/16")  # a ConfigDict, nested
    section.update(TINY)
    flax_files.write(path, tiny_params, section)
    params, stored = flax_files.load(path)
    same(flatten(params), flatten(tiny_params))
    assert stored == section.to_dict()
    with pytest.raises(ConversionError, match=r"another model: model\.embed_dim is 128, the file says 64"):
        flax_files.load(path, {**TINY, "embed_dim": 128})
    with pytest.raises(WeightsFileError, match=r"Flax parameters are written as \.safetensors"):
        flax_files.write(tmp_path / "flax.pt", tiny_params, TINY)


def test_load_takes_either_side(tmp_path, weights, tiny_params):
    save_pt(tmp_path / "a.pt", {f"module.{name}": array for name, array in weights.items()}, epoch=1)
    params, section = flax_files.load(tmp_path / "a.pt", TINY)
    same(flatten(params), flatten(tiny_params))
    assert section == TINY


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "no 'flair_jax' in its metadata"),
        ("{", "is damaged"),
        ('{"format": 1}', "is damaged: KeyError"),
        ('{"format": 1, "model": {"name": ["flair"]}}', "is damaged: TypeError"),
        ('{"format": 2, "model": {}}', "has format 2; this version reads 1"),
    ],
)
def test_flax_files_with_other_metadata(tmp_path, metadata, message):
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(2)}, path, metadata and {"flair_jax": metadata})
    with pytest.raises(WeightsFileError, match=message):
        flax_files.read(path)


def test_numbers_that_numpy_does_not_have(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(2, ml_dtypes.float8_e4m3fn)}, path)
    with pytest.raises(WeightsFileError, match=r"a type of numbers that NumPy does not have: .*float8"):
        torch_files.read(path)


# -- The command -------------------------------------------------------------------------------------------------------


def test_command_there_and_back(tmp_path, weights, section, capsys):
    source, flax, back = (str(tmp_path / name) for name in ("a.pt", "flax.safetensors", "b.safetensors"))
    save_pt(source, weights, epoch=2)
    assert command.main(["to-flax", source, flax, "--model-config", section]) == 0
    assert command.main(["to-torch", flax, back]) == 0
    same(torch_files.read(back), weights)
    assert flax_files.read(flax)[1] == TINY
    assert capsys.readouterr().out.count("flair, width 64; vision 64 px, patch 16, 3 x 96, 3 heads;") == 2


def test_a_guess_is_said(tmp_path, weights, capsys, monkeypatch):
    section = variants.flair("B/16")
    section.update(TINY)  # as if the tiny model were a published one
    monkeypatch.setattr(variants, "flair", lambda variant="B/16": section)
    torch_files.write(tmp_path / "a.safetensors", weights)
    assert command.main(["to-flax", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]) == 0
    assert "note: the file does not say its heads" in capsys.readouterr().err
    assert flax_files.read(tmp_path / "b.safetensors")[1]["vision"]["heads"] == 3


@pytest.mark.parametrize("name", ["to-flax", "to-torch"])
def test_weights_that_are_not_finite_are_not_converted(tmp_path, weights, tiny_params, section, name, capsys):
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    if name == "to-flax":
        weights["logit_scale"] = np.float32("nan")
        torch_files.write(source, weights)
    else:
        flax_files.write(source, {**tiny_params, "logit_scale": np.float32("-inf")}, TINY)
    assert command.main([name, str(source), str(target), *(["--model-config", section] * (name == "to-flax"))]) == 1
    assert "numbers are not finite in logit_scale (1 of 1)" in capsys.readouterr().err
    assert not target.exists()


def test_images_that_are_not_square_there_and_back(tmp_path, weights, capsys):
    """Through the command, its JSON and the metadata."""
    weights["visual.positional_embedding"] = weights["visual.positional_embedding"][:7]
    model = {**TINY, "vision": {**TINY["vision"], "image_size": (32, 48)}}
    source, flax, back = (str(tmp_path / name) for name in ("a.safetensors", "flax.safetensors", "b.safetensors"))
    torch_files.write(source, weights)
    (tmp_path / "model.json").write_text(json.dumps(model))
    assert command.main(["to-flax", source, flax, "--model-config", str(tmp_path / "model.json")]) == 0
    assert command.main(["to-torch", flax, back]) == 0
    same(torch_files.read(back), weights)
    loaded = flair_jax.load(flax, model)
    assert loaded.config["vision"]["image_size"] == (32, 48)
    assert loaded.encode_image(np.zeros((1, 32, 48, 3), np.uint8)).local.shape == (1, 6, 64)


def test_check_of_good_files(tmp_path, weights, section, tiny_params, capsys):
    save_pt(tmp_path / "a.pt", weights)
    flax_files.write(tmp_path / "b.safetensors", tiny_params, TINY)
    assert command.main(["check", str(tmp_path / "a.pt"), "--model-config", section]) == 0
    assert command.main(["check", str(tmp_path / "b.safetensors")]) == 0
    first, second = capsys.readouterr().out.split("result        good\n")[:2]
    assert "PyTorch names of flair, .pt" in first and "Flax paths, .safetensors" in second
    for report in (first, second):
        assert "parameters    626,402\n" in report and "dtypes        97 float32\n" in report


def test_check_knows_the_published_size():
    zeros = {name: np.broadcast_to(np.float32(0), shape) for name, shape in FULL["shapes"].items()}
    assert command.parameters(zeros) == "150,674,434, as ViT-B-16-FLAIR"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": np.zeros(2, np.float32)}, "unknown extra: found shape (2)"),
        ({"logit_scale": np.float32("nan")}, "not finite    logit_scale: 1"),
        ({"logit_scale": np.zeros((), np.int32)}, "dtype   logit_scale: expected float32"),
    ],
)
def test_check_of_bad_files(tmp_path, weights, section, capsys, change, message):
    torch_files.write(tmp_path / "a.safetensors", {**weights, **change})
    assert command.main(["check", str(tmp_path / "a.safetensors"), "--model-config", section]) == 1
    report = capsys.readouterr().out
    assert message in report and "result        wrong" in report


def test_check_without_the_heads(tmp_path, weights, capsys):
    torch_files.write(tmp_path / "a.safetensors", weights)
    assert command.main(["check", str(tmp_path / "a.safetensors")]) == 1
    assert "unknown: shapes do not tell the number of heads" in capsys.readouterr().out


def test_half_precision_is_said(tmp_path, weights, section, capsys):
    torch_files.write(tmp_path / "a.safetensors", {name: a.astype(np.float16) for name, a in weights.items()})
    arguments = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--model-config", section]
    assert command.main(["to-flax", *arguments]) == 0
    assert capsys.readouterr().err == "note: 97 of 97 tensors are float16; cast to float32\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("to-flax absent.pt b.safetensors", "absent.pt"),
        ("to-flax tiny.safetensors b.safetensors", "give the model section"),
        ("to-flax tiny.safetensors b.npz --model-config model.json", "the suffix '.npz' names no format"),
        ("to-flax tiny.safetensors tiny.safetensors --model-config model.json", "is the file that is read"),
        ("to-flax tiny.safetensors b.safetensors --model-config tiny.safetensors", "holds no model section"),
        ("to-flax flax.safetensors b.safetensors", "holds Flax parameters already"),
        ("to-torch tiny.safetensors b.pt", "holds no Flax parameters"),
        ("to-torch . b.pt", ". is a folder; to-torch reads the .safetensors that to-flax writes"),
        ("check notes.pt", "cannot be read as .pt"),
        ("check .", ". is a folder without the config.json that Hugging Face's folders have"),
        ("check run", "run is the work directory of a run: flair_jax.load('run').save('x.safetensors') writes a file"),
    ],
)
def test_errors_of_the_command_are_one_message(
    tmp_path, weights, section, tiny_params, arguments, message, monkeypatch, capsys
):
    torch_files.write(tmp_path / "tiny.safetensors", weights)
    flax_files.write(tmp_path / "flax.safetensors", tiny_params, TINY)
    (tmp_path / "notes.pt").write_text("these are notes")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    before = sorted(os.listdir(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert command.main(arguments.split()) == 1
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and message in error and len(error) < 500
    assert sorted(os.listdir(tmp_path)) == before


def test_help_and_status_of_the_process():
    def run(*arguments):
        return subprocess.run([sys.executable, "-m", "flair_jax.convert", *arguments], capture_output=True, text=True)

    usage = run("to-flax", "--help")
    assert usage.returncode == 0 and "--model-config FILE" in usage.stdout
    failed = run("check", "absent.pt")
    assert failed.returncode == 1 and failed.stderr == "error: [Errno 2] No such file or directory: 'absent.pt'\n"
