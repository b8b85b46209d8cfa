"""Search in a folder of photographs: an index on disk that follows the folder, and texts that find pictures in it.

    python -m flair_jax.search index PHOTOS --checkpoint flair-cc3m-recap
    python -m flair_jax.search search PHOTOS "a red fox in the snow" "a dog, asleep" --output hits.png

A text first selects candidates by the cosine of the pooled features, in an exact index of Faiss. A model with
text-conditioned pooling then ranks them by the text-conditioned score, from local tokens that the index keeps.

The index is a folder of its own, `.flair_jax` among the photographs unless told otherwise; photo_catalogue.py says what
lies in it. One process updates it at a time; others search meanwhile, in what the last transaction left.
"""

import argparse
import dataclasses
import functools
import hashlib
import os
import pathlib
import sqlite3
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from flair_jax import compilation, inference, photo_catalogue, pretrained
from flair_jax.data.counted import counted
from flair_jax.data.sources.index import CACHE
from flair_jax.data.transforms import images as image_rules
from flair_jax.evaluators.features import Encoder, call, lookahead
from flair_jax.evaluators.store import fingerprint
from flair_jax.figures import search as search_figures
from flair_jax.lock import WorkdirInUse, WorkdirLock
from flair_jax.models.dual_encoder import ImageFeatures, TextFeatures
from flair_jax.models.layers import normalize
from flair_jax.progress import progress as show_progress

BATCH = 32  # files that are read, encoded and committed together
CANDIDATES = 200  # images that are ranked by the text-conditioned score
RANKED = 64  # images that are scored in one program; the last group has padding
AT_A_TIME = 4  # of those, whose intermediate results stay in a CPU's caches
THREADS = 16  # that read and decode images, at most
NAMED = 10  # skipped files that the command names for each reason
ATTEMPTS = 3  # to read an index that another process changes
ROWS_AT_A_TIME = 4096  # that are copied, from file to file or to the vector index
Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]


class OtherWeights(ValueError):
    """The index was made with other weights than those that are to search in it."""


class Hit(NamedTuple):
    """A picture that was found. `path`: its file. `score`: the cosine that it is ranked by."""

    path: pathlib.Path
    score: float


@dataclasses.dataclass(frozen=True)
class Changes:
    """What an update found. Numbers of files, and `skipped`: file, relative to the folder -> why it has no features."""

    added: int
    changed: int
    removed: int
    unchanged: int
    skipped: Mapping[str, str]


class _Loaded(NamedTuple):
    """What was read of a file: `pixels` (H, W, 3) for new content, or `reason`, why there are none."""

    size: int
    mtime_ns: int
    read_ns: int
    digest: bytes | None
    pixels: np.ndarray | None
    reason: str | None


class _Batch(NamedTuple):
    """Files that were read together, and the features of their new content, which the devices may still compute."""

    files: dict[str, photo_catalogue.File]
    unreadable: dict[str, str]
    rows: dict[bytes, int]  # of the new content, by digest
    features: dict[str, jax.Array]


class _Snapshot(NamedTuple):
    """The index as one transaction left it. `vectors`: of Faiss, an entry per file; None if there is no file."""

    state: tuple[str, str]  # see `photo_catalogue.state_of`
    paths: list[pathlib.Path]
    rows: np.ndarray  # of each file, (F,)
    vectors: Any
    local: np.ndarray | None  # (rows, L, D)


class Index:
    """The index of a folder of photographs; `open` gives one. Queries may come from several threads.

        index = Index.open("photos", flair_jax.load("flair-cc3m-recap"))
        index.update()
        [[best, *others]] = index.query(["a red fox in the snow"])

    Attributes:
      folder: of the photographs.
      at: the folder of the index.
      model: what encodes.
    """

    def __init__(self, folder: pathlib.Path, at: pathlib.Path, model: inference.Pretrained, checkpoint: str):
        self.folder, self.at, self.model = folder, at, model
        self._catalogue, self._checkpoint = at / photo_catalogue.CATALOGUE, checkpoint
        self._fingerprint = fingerprint(model.model, jax.device_get(model.params))
        self._has_local = model.model.has_pooling
        self._loading = threading.Lock()
        self._snapshot: _Snapshot | None = None
        self._encoder = Encoder(model.model, model.model.preprocessing, image_batch=BATCH, text_batch=BATCH)
        self._store = jax.jit(_stored_features)
        self._score = jax.jit(_conditioned_cosines, static_argnums=0)

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike,
        model: inference.Pretrained,
        *,
        at: str | os.PathLike | None = None,
        checkpoint: str = "",
    ) -> "Index":
        """Opens the index of a folder; where there is none, `update` makes it.

        Args:
          folder: of photographs, searched with all folders in it; hidden files and folders are left out.
          model: with an image and a text tower.
          at: folder of the index; None: `.flair_jax` in `folder`.
          checkpoint: where the model is from, which a new index notes: the command searches with it.

        Raises:
          NotADirectoryError: there is no such folder.
          OtherWeights: the index was made with other weights.
          ValueError: the model lacks a tower, or the index is damaged or of another version of this package.
          ImportError: Faiss is not installed.
        """
        _faiss()  # before hours of work
        folder = pathlib.Path(folder).expanduser()
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is no folder: give a folder of photographs")
        model.model.image_size, model.model.context_length  # noqa: B018 both raise where a tower is missing
        index = cls(folder, photo_catalogue.index_folder(folder, at), model, checkpoint)
        if index._catalogue.exists():
            with photo_catalogue.connected(index._catalogue) as connection:
                if meta := photo_catalogue.read_meta(connection):
                    index._check(meta)
        return index

    def __len__(self) -> int:
        """How many files can be found."""
        return len(self._current().paths)

    def update(self, progress: Progress = show_progress) -> Changes:
        """Brings the index up to date with the folder: new and changed files are encoded, removed ones forgotten.

        A file is unchanged if its size and its time of change are; where it was changed so short a time before it was
        read that its time could not show another change, its content decides. A file whose content is known, because it
        was moved or copied, is not encoded again. Photographs are turned upright by their EXIF orientation.

        Args:
          progress: (batches, their number, a title) -> the same batches, shown on the way.

        Raises:
          WorkdirInUse: another process updates this index.
          OtherWeights: it was made with other weights meanwhile.
          OSError: the index cannot be written.
        """
        self.at.mkdir(parents=True, exist_ok=True)
        with (
            WorkdirLock(self.at, work="updates the index", otherwise="another folder for the index"),
            photo_catalogue.connected(self._catalogue, create=True) as connection,
        ):
            self._create(connection)
            self._check(photo_catalogue.read_meta(connection))
            return self._update(connection, progress)

    def query(
        self,
        texts: Sequence[str] | str,
        top_k: int = 10,
        *,
        mode: str | None = None,
        candidates: int = CANDIDATES,
    ) -> list[list[Hit]]:
        """For each text the files that fit it best, best first: `top_k` of them, or all if there are fewer.

        Args:
          texts: what to look for; one text or several.
          mode: "conditioned": by the cosine with the image pooled for the text; "global": by that of the pooled
            features; None: "conditioned" if the model has text-conditioned pooling.
          candidates: of the mode "conditioned": how many images the global cosine selects first; at least `top_k`.

        Raises:
          ValueError: the index is empty, there is no such mode, or a number is less than 1.
          FileNotFoundError: there is no index yet.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if top_k < 1 or candidates < 1:
            raise ValueError(f"top_k is {top_k} and candidates {candidates}; expected 1 or more")
        allowed = ("conditioned", "global") if self._has_local else ("global",)
        mode = allowed[0] if mode is None else mode
        if mode not in allowed:
            raise ValueError(f"mode is {mode!r}; this model has {' and '.join(map(repr, allowed))}")
        found = self._current()
        if not found.paths:
            raise ValueError(f"{self.at} holds no image of {self.folder}: update the index first")
        if not texts:
            return []
        features = self.model.encode_text(self.model.tokenize(texts)).pooled
        count = min(top_k if mode == "global" else max(top_k, candidates), len(found.paths))
        scores, numbers = found.vectors.search(np.asarray(normalize(features), np.float32), count)  # (N, K) each
        if mode == "conditioned":
            pooled = np.asarray(features)
            scores = np.stack([self._conditioned(found, *pair) for pair in zip(numbers, pooled, strict=True)])
        order = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
        return [
            [Hit(found.paths[number[rank]], float(score[rank])) for rank in ranks]
            for ranks, number, score in zip(order, numbers, scores, strict=True)
        ]

    def _conditioned(self, found: _Snapshot, numbers: np.ndarray, text: np.ndarray) -> np.ndarray:
        """Cosines (K,) of a text with files pooled for it."""
        rows, inverse = np.unique(found.rows[numbers], return_inverse=True)  # in the order of the disk
        parts = []
        for start in range(0, len(rows), RANKED):
            local = np.zeros((RANKED, *found.local.shape[1:]), np.float16)
            part = rows[start : start + RANKED]
            local[: len(part)] = found.local[part]
            parts.append(np.asarray(self._score(self.model.model, self.model.params, local, text))[: len(part)])
        return np.concatenate(parts)[inverse]

    # -----------------------------------------------------------------------------------------------------------------
    # Reading the index

    def _check(self, meta: Mapping[str, str]) -> None:
        """Raises OtherWeights or ValueError unless the catalogue is of this model and of this schema."""
        if meta["schema"] != photo_catalogue.SCHEMA:
            raise ValueError(
                f"{self._catalogue} has the schema {meta['schema']!r}; this version of flair_jax has "
                f"{photo_catalogue.SCHEMA!r}: remove the folder {self.at} and index {self.folder} again"
            )
        if meta["fingerprint"] != self._fingerprint:
            noted = f", from {meta['checkpoint']}" if meta["checkpoint"] else ""
            raise OtherWeights(
                f"{self.at} is an index of other weights: their fingerprint is {meta['fingerprint']}{noted}, this "
                f"model's is {self._fingerprint}. Load the weights of the index, give another folder for the index, or "
                "remove it and index again"
            )

    def _current(self) -> _Snapshot:
        """The index as it is on disk now, read again only where it has changed."""
        with self._loading:
            for attempt in range(ATTEMPTS):
                meta, files = self._files()
                if self._snapshot is not None and self._snapshot.state == photo_catalogue.state_of(meta):
                    break
                try:
                    self._snapshot = self._read(meta, files)
                    break
                except FileNotFoundError:  # another process removed unused rows in between, into new files
                    if attempt == ATTEMPTS - 1:
                        raise
            return self._snapshot

    def _files(self) -> tuple[dict[str, str], list[tuple[bytes, int]]]:
        """The catalogue's `meta`, and path and row of each file with features, of one moment."""
        if not self._catalogue.exists():
            raise FileNotFoundError(f"{self.at} is no index of photographs: index {self.folder} first")
        with (
            photo_catalogue.connected(self._catalogue) as connection,
            photo_catalogue.transaction(connection, "DEFERRED"),
        ):
            meta = photo_catalogue.read_meta(connection)
            if not meta:
                raise FileNotFoundError(f"{self.at} is no index of photographs yet: index {self.folder} first")
            self._check(meta)
            if self._snapshot is not None and self._snapshot.state == photo_catalogue.state_of(meta):
                return meta, []
            return meta, connection.execute(
                "SELECT path, row FROM files WHERE row IS NOT NULL ORDER BY path"
            ).fetchall()

    def _read(self, meta: Mapping[str, str], files: Sequence[tuple[bytes, int]]) -> _Snapshot:
        rows = np.array([row for _, row in files], np.int64)
        if not files:
            return _Snapshot(photo_catalogue.state_of(meta), [], rows, None, None)
        paths = [self.folder / photo_catalogue.inside(path, self._catalogue) for path, _ in files]
        mapped = {name: part.mapped(int(rows.max()) + 1) for name, part in self._parts(meta).items()}
        return _Snapshot(
            photo_catalogue.state_of(meta), paths, rows, _vectors(mapped["pooled"], rows), mapped.get("local")
        )

    def _parts(self, meta: Mapping[str, str]) -> dict[str, photo_catalogue.Rows]:
        """The files of features, by name."""
        width, patches, generation = (int(meta[key]) for key in ("width", "patches", "generation"))
        shapes = {"pooled": (width,), **({"local": (patches, width)} if self._has_local else {})}
        return {
            name: photo_catalogue.Rows(self.at / f"{name}-{generation:06d}.f16", shape)
            for name, shape in shapes.items()
        }

    # -----------------------------------------------------------------------------------------------------------------
    # Writing it; one process at a time

    def _create(self, connection: sqlite3.Connection) -> None:
        """Makes the tables, unless they are there."""
        if photo_catalogue.read_meta(connection):
            return
        pixels = jax.ShapeDtypeStruct((1, *self.model.model.image_size, 3), np.float32)
        encode_image = functools.partial(call, self.model.model, "encode_image")
        shapes = jax.eval_shape(encode_image, self.model.params, pixels)
        meta = {
            "schema": photo_catalogue.SCHEMA,
            "fingerprint": self._fingerprint,
            "checkpoint": self._checkpoint,
            "width": shapes.pooled.shape[-1],
            "patches": shapes.local.shape[1] if self._has_local else 0,
            "generation": 1,  # of the files of features
            "revision": 0,  # counts the transactions
            "id": uuid.uuid4().hex,  # of this index; one that is made after it was removed counts anew
        }
        with photo_catalogue.transaction(connection):
            for statement in photo_catalogue.TABLES:
                connection.execute(statement)
            connection.executemany("INSERT INTO meta VALUES (?, ?)", [(key, str(x)) for key, x in meta.items()])

    def _update(self, connection: sqlite3.Connection, progress: Progress) -> Changes:
        parts = self._parts(photo_catalogue.read_meta(connection))
        for path in set(self.at.glob("*.f16")) - {part.path for part in parts.values()}:
            path.unlink()  # left by a process that was killed while it removed unused rows
        known = dict(connection.execute("SELECT digest, row FROM images"))
        for part in parts.values():
            part.cut(len(known))
        before = {
            photo_catalogue.inside(path, self._catalogue): photo_catalogue.File(*entry)
            for path, *entry in connection.execute("SELECT path, size, mtime_ns, read_ns, row, reason FROM files")
        }
        found, unreadable = photo_catalogue.scan(self.folder, self.at)
        after = {name: entry for name, entry in before.items() if name in found}
        photo_catalogue.forget(connection, before.keys() - found.keys())
        new = [name for name, status in found.items() if name not in after or not after[name].is_of(status)]
        batches = [new[start : start + BATCH] for start in range(0, len(new), BATCH)]
        with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), "photographs") as threads:
            started = (self._start(threads, batch, known) for batch in batches)
            for batch in progress(lookahead(started), len(batches), "index"):
                if batch.rows:
                    first, count = min(batch.rows.values()), len(batch.rows)
                    for name, part in parts.items():
                        part.write(first, np.asarray(batch.features[name])[:count])
                with photo_catalogue.transaction(connection):
                    connection.executemany("INSERT INTO images VALUES (?, ?)", batch.rows.items())
                    connection.executemany(
                        "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)",
                        [(os.fsencode(name), *entry) for name, entry in batch.files.items()],
                    )
                photo_catalogue.forget(connection, batch.unreadable.keys() & after.keys())
                after.update(batch.files)
                unreadable.update(batch.unreadable)
        after = {name: entry for name, entry in after.items() if name not in unreadable}
        self._remove_unused(connection, len(known), {entry.row for entry in after.values()} - {None})
        had, has = ({name: x.row for name, x in files.items() if x.row is not None} for files in (before, after))
        changed = sum(had[name] != has[name] for name in had.keys() & has.keys())
        skipped = unreadable | {name: entry.reason for name, entry in after.items() if entry.row is None}
        return Changes(
            added=len(has.keys() - had.keys()),
            changed=changed,
            removed=len(had.keys() - has.keys()),
            unchanged=len(had.keys() & has.keys()) - changed,
            skipped=dict(sorted(skipped.items())),
        )

    def _start(self, threads: ThreadPoolExecutor, batch: Sequence[str], known: dict[bytes, int]) -> _Batch:
        """Reads files and starts to encode their new content, whose rows are noted in `known`."""
        files, unreadable, rows, pixels = {}, {}, {}, []
        for name, loaded in zip(batch, threads.map(lambda name: self._load(name, known), batch), strict=True):
            if isinstance(loaded, OSError):
                unreadable[name] = f"cannot be read: {loaded.strerror or loaded}"
                continue
            if loaded.pixels is not None and loaded.digest not in known:
                known[loaded.digest] = rows[loaded.digest] = len(known)
                pixels.append(loaded.pixels)
            row = None if loaded.reason else known[loaded.digest]
            files[name] = photo_catalogue.File(loaded.size, loaded.mtime_ns, loaded.read_ns, row, loaded.reason)
        features = {}
        if pixels:
            padded = 1 << (len(pixels) - 1).bit_length()  # few shapes, so few compilations
            pixels += pixels[-1:] * (padded - len(pixels))
            ((_, encoded),) = self._encoder.images(self.model.params, np.stack(pixels), local=self._has_local)
            features = self._store(encoded)
        return _Batch(files, unreadable, rows, features)

    def _load(self, name: str, known: Mapping[bytes, int]) -> _Loaded | OSError:
        """Reads a file, and decodes it if its content is not known."""
        now = time.time_ns()
        try:
            with open(self.folder / name, "rb") as file:
                status = os.fstat(file.fileno())
                state = status.st_size, status.st_mtime_ns, now
                reason = photo_catalogue.why_no_image(file, status.st_size)
                if reason:
                    return _Loaded(*state, None, None, reason)
                file.seek(0)
                content = file.read()
        except OSError as error:
            return error
        digest = hashlib.sha256(content).digest()
        if digest in known:
            return _Loaded(*state, digest, None, None)
        try:
            image = image_rules.decode(content, upright=True)
            pixels = self.model.model.preprocessing.fit(image_rules.to_rgb(image), self.model.model.image_size)
        except image_rules.ImageError as error:
            return _Loaded(*state, digest, None, str(error))
        return _Loaded(*state, digest, pixels, None)

    def _remove_unused(self, connection: sqlite3.Connection, count: int, used: set[int]) -> None:
        """Writes the used ones of `count` rows to new files if they are less than half: the catalogue names them then.

        Until then the features of removed files stay, and a file that comes back is not encoded again.
        """
        if not used or 2 * len(used) >= count:
            return
        meta = photo_catalogue.read_meta(connection)
        old = self._parts(meta)
        meta["generation"] = str(int(meta["generation"]) + 1)
        kept = np.array(sorted(used), np.int64)
        for name, part in self._parts(meta).items():
            mapped = old[name].mapped(count)
            part.cut(0)
            for start in range(0, len(kept), ROWS_AT_A_TIME):
                part.write(start, mapped[kept[start : start + ROWS_AT_A_TIME]])
        with photo_catalogue.transaction(connection):
            connection.execute("CREATE TEMP TABLE renumbered (old INTEGER PRIMARY KEY, new INTEGER NOT NULL)")
            connection.executemany("INSERT INTO renumbered VALUES (?, ?)", [(int(x), n) for n, x in enumerate(kept)])
            connection.execute("DELETE FROM images WHERE row NOT IN (SELECT old FROM renumbered)")
            # Negative first, for rows are unique at every moment.
            connection.execute("UPDATE images SET row = -1 - (SELECT new FROM renumbered WHERE old = row)")
            connection.execute("UPDATE images SET row = -1 - row")
            connection.execute(
                "UPDATE files SET row = (SELECT new FROM renumbered WHERE old = row) WHERE row IS NOT NULL"
            )
            connection.execute("UPDATE meta SET value = ? WHERE key = 'generation'", (meta["generation"],))
        for part in old.values():
            part.path.unlink()


def _stored_features(found: ImageFeatures) -> dict[str, jax.Array]:
    """What the index keeps: "pooled" (B, D), normalised, and "local" (B, L, D) where it is asked for, in float16."""
    stored = {"pooled": normalize(found.pooled), **({} if found.local is None else {"local": found.local})}
    return {name: x.astype(jnp.float16) for name, x in stored.items()}


def _conditioned_cosines(model: Any, params: Any, local: jax.Array, text: jax.Array) -> jax.Array:
    """Cosines (K,) of a text (D,) with images pooled for it, from their tokens (K, L, D)."""
    features = TextFeatures(text[None], None, None)

    def cosine(tokens):
        image = ImageFeatures(None, tokens[None].astype(jnp.float32))
        return call(model, "score_few_texts", params, image, features)[0, 0]

    return jax.lax.map(cosine, local, batch_size=AT_A_TIME) * jnp.exp(-params["logit_scale"])


def _vectors(pooled: np.ndarray, rows: np.ndarray) -> Any:
    """Faiss's exact index of the rows of files, by the inner product, in memory as float16."""
    faiss = _faiss()
    vectors = faiss.IndexScalarQuantizer(pooled.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        vectors.add(pooled[rows[start : start + ROWS_AT_A_TIME]].astype(np.float32))
    return vectors


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError("search needs Faiss: pip install 'flair_jax[search]'") from error
    return faiss


# ---------------------------------------------------------------------------------------------------------------------
# The command


def sheet(texts: Sequence[str], found: Sequence[Sequence[Hit]], folder: str | os.PathLike = ".") -> Image.Image:
    """The pictures of the hits: for each text its own, best first, with their scores and names, relative to `folder`.

    Raises:
      ValueError: there is nothing to draw.
    """
    rows = []
    for text, hits in zip(texts, found, strict=True):
        cells = []
        for hit in hits:
            try:
                picture = image_rules.to_rgb(image_rules.decode(hit.path.read_bytes(), upright=True))
            except (OSError, image_rules.ImageError):
                picture = None  # it was removed or damaged since it was indexed
            cells.append((picture, f"{hit.score:.3f}  {os.path.relpath(hit.path, folder)}"))
        rows.append((text, cells))
    return search_figures.hits(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m flair_jax.search", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    made = {
        name: commands.add_parser(name, help=words, description=words, allow_abbrev=False)
        for name, words in (
            ("index", "Brings the index of a folder up to date, and makes it the first time."),
            ("search", "Finds pictures for texts."),
        )
    }
    for command in made.values():
        command.add_argument("folder", type=pathlib.Path, help="photographs, in folders of any depth")
        pretrained.add_options(command, absent="what the index was made with")
        command.add_argument(
            "--index", type=pathlib.Path, metavar="FOLDER", help=f"absent: {photo_catalogue.INDEX_FOLDER} among them"
        )
    made["index"].add_argument("--name-all", action="store_true", help=f"skipped files, not {NAMED} for each reason")
    made["search"].add_argument("text", nargs="+", help="one text each, commas and all")
    made["search"].add_argument("--top-k", type=int, default=10, metavar="K", help="hits of each text (%(default)s)")
    made["search"].add_argument("--mode", choices=("conditioned", "global"), help="absent: the best that the model has")
    made["search"].add_argument(
        "--candidates", type=int, default=CANDIDATES, metavar="N", help="ranked text-conditioned (%(default)s)"
    )
    made["search"].add_argument("--output", type=pathlib.Path, metavar="PNG", help="where to write the hits' pictures")
    options = parser.parse_args(arguments)
    compilation.use_cache(os.path.expanduser(f"{CACHE}/compiled"))  # a search takes less time than to compile it
    try:
        (_index if options.command == "index" else _search)(options)
    except (ValueError, OSError, ImportError, WorkdirInUse) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _opened(options: argparse.Namespace) -> Index:
    at = photo_catalogue.index_folder(options.folder, options.index)
    checkpoint = options.checkpoint
    if checkpoint is None:
        checkpoint = photo_catalogue.noted_checkpoint(at)
        if not checkpoint:
            raise ValueError(f"{at} does not say what it was made with: give --checkpoint")
    elif os.path.exists(os.path.expanduser(checkpoint)):  # no name on the hub: it is to be found from everywhere
        checkpoint = os.path.abspath(os.path.expanduser(checkpoint))
    model = pretrained.load(checkpoint, gelu=options.gelu)
    return Index.open(options.folder, model, at=at, checkpoint=checkpoint)


def _index(options: argparse.Namespace) -> None:
    index = _opened(options)
    changes = index.update()
    by_reason: dict[str, list[str]] = {}
    for name, reason in changes.skipped.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, skipped in by_reason.items():
        named = skipped if options.name_all else skipped[:NAMED]
        others = f" and {len(skipped) - len(named):,} more; --name-all names them" if len(skipped) > len(named) else ""
        print(f"skipped, {reason}: {', '.join(named)}{others}")
    print(
        f"{counted(len(index), 'picture')} in the index {index.at}: {changes.added:,} added, "
        f"{changes.changed:,} changed, {changes.removed:,} removed, {changes.unchanged:,} unchanged; "
        f"{counted(len(changes.skipped), 'file')} skipped"
    )


def _search(options: argparse.Namespace) -> None:
    index = _opened(options)
    found = index.query(options.text, options.top_k, mode=options.mode, candidates=options.candidates)
    for text, hits in zip(options.text, found, strict=True):
        print(text)
        for hit in hits:
            print(f"{hit.score:8.4f}  {hit.path}")
    if options.output is not None:
        sheet(options.text, found, options.folder.expanduser()).save(options.output.expanduser(), "PNG")
        print(f"pictures: {options.output}")


if __name__ == "__main__":
    sys.exit(main())
