"""Features on disk: what is encoded once is not encoded again, and equals what was encoded."""

import jax
import ml_dtypes
import numpy as np
import pytest

from flair_jax import sharding
from flair_jax.data.transforms.images import ImageError
from flair_jax.evaluators import features
from flair_jax.evaluators.store import LINE, FeatureStore, Rows


class Images:
    """Images with keys that note which are loaded."""

    def __init__(self, pixels, keys, broken=()):
        self.pixels, self.keys, self.broken, self.loaded = pixels, keys, broken, []

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, number):
        self.loaded.append(number)
        if number in self.broken:
            raise ImageError(f"image {self.keys[number]} is cut short")
        return self.pixels[number]


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).random((7, 64, 64, 3), np.float32)


def runs(model, devices=2):
    mesh = sharding.create_mesh(devices=jax.devices()[:devices])
    return features.Encoder(model, identity, image_batch=4, text_batch=4, mesh=mesh)


def identity(x):
    return x


def encode(encoder, params, images, **options):
    """Features by number, as one would get them without any store."""
    found = {}
    for numbers, batch in encoder.images(encoder.place(params), images, **options):
        for row, number in enumerate(numbers):
            found[int(number)] = jax.tree.map(lambda x, row=row: np.asarray(x[row]), batch)
    return found


def close(found, expected):
    assert found.keys() == expected.keys()
    for number, features_ in found.items():
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), features_, expected[number])


def test_images_are_encoded_once_whatever_the_set_and_its_order(tiny_model, tiny_params, pixels, tmp_path):
    expected = encode(runs(tiny_model), tiny_params, pixels)
    with features.session(store=FeatureStore(tmp_path)):
        first = Images(pixels[:5], list("abcde"))
        close(encode(runs(tiny_model), tiny_params, first), {n: expected[n] for n in range(5)})
        assert sorted(set(first.loaded)) == [0, 1, 2, 3, 4]
        other = Images(pixels[[6, 3, 0, 5]], list("gdaf"))
        found = encode(runs(tiny_model, 1), tiny_params, other)
        close(found, {0: expected[6], 1: expected[3], 2: expected[0], 3: expected[5]})
        assert sorted(set(other.loaded)) == [0, 3]
    with features.session(store=FeatureStore(tmp_path)):  # another run
        again = Images(pixels, list("abcdefg"))
        close(encode(runs(tiny_model), tiny_params, again), expected)
        assert again.loaded == []
    others = [
        (tiny_model, {**tiny_params, "logit_scale": tiny_params["logit_scale"] + 1}),
        (tiny_model.clone(micro_batches=2), tiny_params),
    ]
    for model, params in others:
        with features.session(store=FeatureStore(tmp_path)):
            fresh = Images(pixels[:2], list("ab"))
            encode(runs(model), params, fresh)
            assert sorted(set(fresh.loaded)) == [0, 1]


def test_without_patches(tiny_model, tiny_params, pixels, tmp_path):
    with features.session(store=FeatureStore(tmp_path)):
        for _ in range(2):
            found = encode(runs(tiny_model), tiny_params, Images(pixels[:2], list("ab")), local=False)
            assert found[1].local is None and found[1].pooled.shape == (tiny_model.embed_dim,)
    assert not list(tmp_path.glob("*/images-*"))


def test_a_killed_run_loses_at_most_the_row_it_wrote(tiny_model, tiny_params, pixels, tmp_path):
    with features.session(store=FeatureStore(tmp_path)):
        expected = encode(runs(tiny_model), tiny_params, Images(pixels[:4], list("abcd")))
    (index,), (rows,) = tmp_path.glob("*/*.index"), tmp_path.glob("*/*.rows")
    whole = index.read_bytes(), rows.read_bytes()
    for index_cut, rows_cut, lost in ((5, 0, {3}), (0, 9, {3}), (LINE + 1, len(whole[1]) // 2, {2, 3})):
        for later in {*rows.parent.iterdir()} - {index, rows}:
            later.unlink()
        index.write_bytes(whole[0][: len(whole[0]) - index_cut])
        rows.write_bytes(whole[1][: len(whole[1]) - rows_cut])
        with features.session(store=FeatureStore(tmp_path)):
            images = Images(pixels[:4], list("abcd"))
            close(encode(runs(tiny_model), tiny_params, images), expected)
            assert set(images.loaded) == lost
            images = Images(pixels[:4], list("abcd"))
            close(encode(runs(tiny_model), tiny_params, images), expected)
            assert not images.loaded


def test_texts_are_encoded_once(tiny_model, tiny_params, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    tokens = np.zeros((5, 12), np.int32)
    for row, length in zip(tokens, (3, 5, 12, 3, 7), strict=True):
        row[:length] = [510, *rng.integers(1, 500, length - 2), 511]
    tokens[3] = tokens[0]
    plain = runs(tiny_model)
    expected = np.asarray(plain.texts(plain.place(tiny_params), tokens).pooled)
    with features.session(store=FeatureStore(tmp_path)):
        encoder = runs(tiny_model)
        params = encoder.place(tiny_params)
        np.testing.assert_allclose(encoder.texts(params, tokens[:3]).pooled, expected[:3], atol=1e-5)
        wide = np.zeros((5, 20), np.int32)  # padding is no part of a text
        wide[:, :12] = tokens
        np.testing.assert_allclose(encoder.texts(params, wide[::-1]).pooled, expected[::-1], atol=1e-5)
        monkeypatch.setattr(encoder, "_encode_texts", None)
        np.testing.assert_allclose(encoder.texts(params, tokens).pooled, expected, atol=1e-5)


def test_broken_images_are_named_together_and_never_kept(tiny_model, tiny_params, pixels, tmp_path):
    with features.session(store=FeatureStore(tmp_path)):
        images = Images(pixels, list("abcdefg"), broken=(1, 5))
        with pytest.raises(features.BrokenImages, match=r"2 images cannot be used, .* image b is cut short") as error:
            encode(runs(tiny_model), tiny_params, images)
        assert list(error.value.reasons) == [1, 5]
        images = Images(pixels, list("abcdefg"))
        encode(runs(tiny_model), tiny_params, images)
        assert sorted(set(images.loaded)) == [1, 5]


def test_bfloat16_rows(tmp_path):
    rows = {"pooled": np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16), "local": np.ones((2, 4), np.float32)}
    Rows(tmp_path, "images", "run").add(["a", "b"], rows)
    found = Rows(tmp_path, "images", "run").read(["b", "a"])
    assert found["pooled"].dtype == ml_dtypes.bfloat16
    assert found["pooled"].astype(int).tolist() == [[3, 4, 5], [0, 1, 2]] and found["local"].tolist() == [[1.0] * 4] * 2


def test_a_full_disk_ends_no_evaluation(tiny_model, tiny_params, pixels, tmp_path, monkeypatch, caplog):
    store = FeatureStore(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    with features.session(store=store):
        encoder = runs(tiny_model)
        monkeypatch.setattr("flair_jax.evaluators.store.Rows.add", full)
        assert len(encode(encoder, tiny_params, Images(pixels, list("abcdefg")))) == 7
    assert caplog.text.count("No space left on device") == 1


def test_what_a_full_disk_cut_short_is_written_over(tmp_path):
    kind = Rows(tmp_path, "images", "run")
    kind.add(["a"], {"pooled": np.zeros((1, 3), np.float32)})
    for path in (tmp_path / "images-run-00000.index", tmp_path / "images-run-00000.rows"):
        with path.open("ab") as file:
            file.write(b"half a row")
    kind.add(["b"], {"pooled": np.ones((1, 3), np.float32)})
    for opened in (kind, Rows(tmp_path, "images", "run"), Rows(tmp_path, "images", "other")):
        assert opened.read(["b", "a"])["pooled"].tolist() == [[1.0] * 3, [0.0] * 3]


def test_runs_at_the_same_time_share_a_folder(tmp_path):
    """Each opens the folder before the other one has written, and neither writes over the other's rows."""
    runs = [FeatureStore(tmp_path).open("images", None, {}) for _ in range(2)]
    for number, (key, kind) in enumerate(zip("abcd", runs * 2, strict=True)):
        kind.add([key], {"pooled": np.full((1, 3), number, np.float32)})
    found = FeatureStore(tmp_path).open("images", None, {}).read(list("abcd"))
    assert found["pooled"].tolist() == [[number] * 3 for number in range(4)]
    assert [kind.read(keys)["pooled"][:, 0].tolist() for kind, keys in zip(runs, ("ac", "bd"), strict=True)] == [
        [0, 2],
        [1, 3],
    ]


def _changed(content, start, new):
    return content[:start] + new + content[start + len(new) :]


@pytest.mark.parametrize(
    ("file", "change", "lost"),
    [
        ("rows", lambda content: _changed(content, 2, b"\x7f"), {0}),
        (
            "rows",
            lambda content: _changed(content, len(content) // 4 + 1, b"\0" * (len(content) * 3 // 4 - 1)),
            {1, 2, 3},
        ),
        ("rows", lambda content: b"", {0, 1, 2, 3}),
        ("index", lambda content: b"garbage\n" + content, {0, 1, 2, 3}),
        ("index", lambda content: b"\0" * len(content), {0, 1, 2, 3}),
        ("index", lambda content: content.replace(b"[[", b"[[1", 1), {0, 1, 2, 3}),
        ("index", lambda content: _changed(content, len(content) - 2 * LINE, b"zz"), {2, 3}),
        ("index", lambda content: _changed(content, len(content) - 3, b"zz"), {3}),
    ],
)
def test_what_is_damaged_is_encoded_again(tiny_model, tiny_params, pixels, tmp_path, file, change, lost):
    with features.session(store=FeatureStore(tmp_path)):
        expected = encode(runs(tiny_model), tiny_params, Images(pixels[:4], list("abcd")), local=False)
    (path,) = tmp_path.glob(f"*/pooled-*.{file}")
    path.write_bytes(change(path.read_bytes()))
    for read in (lost, set()):
        with features.session(store=FeatureStore(tmp_path)):
            images = Images(pixels[:4], list("abcd"))
            close(encode(runs(tiny_model), tiny_params, images, local=False), expected)
            assert lost <= set(images.loaded) if read else not images.loaded


def test_damaged_texts_are_encoded_again(tiny_model, tiny_params, tmp_path):
    tokens = np.array([[510, 7, 511], [510, 8, 511]], np.int32)
    for _ in range(2):
        with features.session(store=FeatureStore(tmp_path)):
            encoder = runs(tiny_model)
            found = np.asarray(encoder.texts(encoder.place(tiny_params), tokens).pooled)
        (rows, *_) = sorted(tmp_path.glob("*/texts-*.rows"))
        rows.write_bytes(b"\0" * rows.stat().st_size)
    encoder = runs(tiny_model)
    np.testing.assert_allclose(found, encoder.texts(encoder.place(tiny_params), tokens).pooled, atol=1e-5)
