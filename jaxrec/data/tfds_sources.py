"""Interactions as a prepared TFDS data set: array_record files with random access for Grain, without TensorFlow.

Preparing once spares parsing of the text files in later runs and gives every process of a pod cheap access to single
users. Two configs: ``sequences`` (one record per user) and ``items`` (one record per item).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxrec.data.interactions import Interactions

NAME = "jaxrec_interactions"
_CONFIGS = ("sequences", "items")
_VERSION = "1.0.0"
_SPLIT = "full"  # "all" is reserved by TFDS


def fingerprint(inter: Interactions) -> str:
    """SHA-256 over everything the interactions hold (the report aside)."""
    digest = hashlib.sha256()
    for array in (inter.users, inter.items, inter.times, inter.ratings):
        digest.update(b"none" if array is None else np.ascontiguousarray(array).tobytes())
    for texts in (inter.user_tokens.tolist(), inter.item_tokens.tolist(), inter.titles, inter.categories):
        digest.update("\0".join(texts).encode())
    return digest.hexdigest()


class JaxrecInteractions(tfds.core.GeneratorBasedBuilder):
    """TFDS builder over interactions already in memory; use ``prepare_interactions``."""

    name = NAME
    # TFDS would look for this file through importlib_resources, which it does not declare as a dependency.
    code_path = tfds.core.Path(__file__)
    VERSION = tfds.core.Version(_VERSION)
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name, version=_VERSION) for name in _CONFIGS]  # noqa: RUF012

    def __init__(self, *, interactions: Interactions | None = None, **options: Any) -> None:
        self._interactions = interactions
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        vector = tfds.features.Tensor
        if self.builder_config.name == "sequences":
            features = {
                "user": tfds.features.Scalar(np.int32),
                "token": tfds.features.Text(),
                "rows": vector(shape=(None,), dtype=np.int64),  # positions in the source file: they decide ties in time
                "items": vector(shape=(None,), dtype=np.int32),
                "times": vector(shape=(None,), dtype=np.int64),
                "ratings": vector(shape=(None,), dtype=np.float32),
            }
        else:
            features = {
                "item": tfds.features.Scalar(np.int32),
                "token": tfds.features.Text(),
                "title": tfds.features.Text(),
                "categories": tfds.features.Text(),
            }
        metadata = None
        if self._interactions is not None:
            inter = self._interactions
            metadata = tfds.core.MetadataDict(
                fingerprint=fingerprint(inter), has_ratings=inter.ratings is not None, report=inter.report
            )
        return tfds.core.DatasetInfo(
            builder=self,
            description="User-item events in file order, prepared by jaxrec.",
            features=tfds.features.FeaturesDict(features),
            metadata=metadata,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {_SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        inter = self._interactions
        if inter is None:
            raise ValueError(
                f"{NAME} is prepared from interactions in memory; call prepare_interactions(inter, data_dir)"
            )
        if self.builder_config.name == "items":
            for item in range(1, inter.num_items + 1):
                yield (
                    item,
                    {
                        "item": item,
                        "token": str(inter.item_tokens[item]),
                        "title": inter.titles[item],
                        "categories": inter.categories[item],
                    },
                )
            return
        order = np.argsort(inter.users, kind="stable")
        offsets = np.concatenate([[0], np.cumsum(np.bincount(inter.users, minlength=inter.num_users + 1))])
        for user in range(1, inter.num_users + 1):
            rows = order[offsets[user] : offsets[user + 1]]
            yield (
                user,
                {
                    "user": user,
                    "token": str(inter.user_tokens[user]),
                    "rows": rows,
                    "items": inter.items[rows],
                    "times": inter.times[rows],
                    "ratings": np.zeros(0, np.float32) if inter.ratings is None else inter.ratings[rows],
                },
            )


def _builder(data_dir: Path, config: str, inter: Interactions | None = None) -> JaxrecInteractions:
    return JaxrecInteractions(
        interactions=inter, config=config, data_dir=str(data_dir.absolute()), file_format="array_record"
    )


def _folder(data_dir: Path, config: str) -> Path:
    return data_dir / NAME / config / _VERSION


def prepare_interactions(inter: Interactions, data_dir: str | Path) -> Path:
    """Write interactions under ``data_dir`` once, as array_record; a second call with the same data does nothing.

    Returns data_dir. Raises ValueError when the folder already holds other interactions (nothing is overwritten).
    """
    data_dir = Path(data_dir)
    mark = fingerprint(inter)
    for config in _CONFIGS:
        builder = _builder(data_dir, config, inter)
        if _folder(data_dir, config).is_dir():
            found = tfds.builder_from_directory(str(_folder(data_dir, config).absolute())).info.metadata["fingerprint"]
            if found != mark:
                raise ValueError(f"{data_dir} already holds other interactions; choose another data_dir or remove it")
            logging.info("%s/%s is prepared already", data_dir, config)
            continue
        builder.download_and_prepare()
    return data_dir


def _prepared(data_dir: Path, config: str) -> tfds.core.DatasetBuilder:
    folder = _folder(data_dir, config)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing; run prepare_interactions(inter, {str(data_dir)!r}) first")
    return tfds.builder_from_directory(str(folder.absolute()))


def sequence_source(data_dir: str | Path) -> Sequence[dict[str, Any]]:
    """Random access to the users of prepared interactions, e.g. for ``grain.MapDataset.source``.

    Element u - 1 belongs to user u: {"user" int, "token" bytes, "rows" int64 [n], "items" int32 [n], "times" int64 [n],
    "ratings" float32 [n] (empty without ratings)}, events in file order.
    """
    return _prepared(Path(data_dir), "sequences").as_data_source(split=_SPLIT)


def load_prepared(data_dir: str | Path) -> Interactions:
    """Interactions as they were given to ``prepare_interactions``, file order included."""
    builder = _prepared(Path(data_dir), "sequences")
    metadata = builder.info.metadata
    users = list(builder.as_data_source(split=_SPLIT))
    items = list(_prepared(Path(data_dir), "items").as_data_source(split=_SPLIT))
    rows = np.concatenate([user["rows"] for user in users])
    place = np.empty(len(rows), np.int64)
    place[rows] = np.arange(len(rows))

    def gather(name: str, kind: type) -> np.ndarray:
        return np.concatenate([user[name] for user in users]).astype(kind)[place]

    owner = np.repeat(np.array([user["user"] for user in users], np.int32), [len(user["rows"]) for user in users])
    inter = Interactions(
        users=owner[place],
        items=gather("items", np.int32),
        times=gather("times", np.int64),
        ratings=gather("ratings", np.float32) if metadata["has_ratings"] else None,
        user_tokens=np.array(["[PAD]", *(user["token"].decode() for user in users)]),
        item_tokens=np.array(["[PAD]", *(item["token"].decode() for item in items)]),
        titles=("", *(item["title"].decode() for item in items)),
        categories=("", *(item["categories"].decode() for item in items)),
        report=dict(metadata["report"]),
    )
    if fingerprint(inter) != metadata["fingerprint"]:
        raise ValueError(f"{data_dir}: the records do not match their fingerprint; remove the folder and prepare again")
    return inter
