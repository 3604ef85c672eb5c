"""What is exported: a stored model of any kind, checked against its configuration before anything is written.

a run directory                        its result, model/
a checkpoint of a run (step-000100)    the masters of that step
an HF folder                           masters, or packed codes of either class; --quantize takes a dense one
a GGUF file                            codes and scales, and the tokenizer
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

from bitnet_train.errors import UserError
from bitnet_train.export.checkpoint import STATE, CheckpointWeights
from bitnet_train.formats.gguf_bitnet import gguf_name
from bitnet_train.formats.gguf_file import GGUFFile
from bitnet_train.formats.gguf_tokenizer import GGUFTokenizer
from bitnet_train.formats.hf_folder import (
    CONFIG,
    GENERATION_CONFIG,
    HFFolder,
    folder_kind,
    quantization_config,
    read_json,
)
from bitnet_train.formats.model_card import licence_of
from bitnet_train.formats.packing import packed_shape
from bitnet_train.formats.tokenizer_files import TokenizerFiles
from bitnet_train.model.bitlinear import BitLinear
from bitnet_train.model.config import BitNetConfig
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.model.skeleton import skeleton, tensor_shapes
from bitnet_train.model.weights import FolderWeights, GGUFWeights, Weights, gguf_config, located


class SourceTokenizer(Protocol):
    """What an export takes from a tokenizer, whether files or the keys of a GGUF file hold it."""

    @property
    def bos_id(self) -> int | None:
        """The id in front of every text, if there is one."""

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text, if there is one."""

    @property
    def begins_with_bos(self) -> bool:
        """Whether runtimes put BOS in front of a text."""

    def check(self) -> None:
        """Raises UserError where the formats cannot hold this tokenizer."""

    def generation_ids(self) -> dict[str, int | list[int]]:
        """The special ids of generation_config.json."""

    def gguf_metadata(self) -> dict[str, object]:
        """The tokenizer as keys of a GGUF file."""

    def write(self, folder: Path) -> None:
        """Writes the tokenizer's files into an HF folder."""


@dataclass(frozen=True)
class Source:
    """A stored model, open for export.

    Attributes:
        path: the folder, checkpoint or file that holds it.
        kind: "master": float weights; "ternary": codes and scales.
        config: the model that config.json describes.
        config_json: config.json, as it is or as it would be.
        shapes_found: the shapes of the stored tensors, by the names that transformers has for them.
        name: what to call the model.
        run_dir: the directory of the run that made it, where that is known.
        licence: its SPDX identifier, where that is known.
    """

    path: Path
    kind: Literal["master", "ternary"]
    config: BitNetConfig
    config_json: Mapping[str, Any]
    weights: Weights
    tokenizer: SourceTokenizer
    shapes_found: Mapping[str, tuple[int, ...]]
    name: str
    run_dir: Path | None = None
    licence: str | None = None

    @cached_property
    def _skeleton(self) -> BitNetForCausalLM:
        return skeleton(self.config)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of the model, codes unpacked."""
        return tensor_shapes(self._skeleton)

    @cached_property
    def ternary_names(self) -> dict[str, None]:
        """The weights that are ternary, one of each BitLinear, as an ordered set."""
        modules = self._skeleton.named_modules()
        return dict.fromkeys(f"{name}.weight" for name, module in modules if isinstance(module, BitLinear))

    @property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json, with every stop id."""
        path = self.path / GENERATION_CONFIG
        return (read_json(path) if path.is_file() else {}) | self.tokenizer.generation_ids()

    def check(self) -> None:
        """Refuses tensors that are missing, unknown or of another shape, and a tokenizer that does not fit."""
        expected, found = self._expected_shapes(), dict(self.shapes_found)
        if self.config.tie_word_embeddings:
            found.pop("lm_head.weight", None)  # some writers store the shared matrix twice
        for problem, names in {"missing": expected.keys() - found, "unknown": found.keys() - expected}.items():
            if names:
                raise UserError(
                    f"{self.path}: the tensors must be those of the model in {CONFIG}, got {len(names)} {problem}, "
                    f"such as {min(names)}; copy the folder again"
                )
        for name, shape in expected.items():
            if found[name] != shape:
                raise UserError(
                    f"{self.path}: {name}: shape must be {shape} by {CONFIG}, got {found[name]}; mend either"
                )
        self.tokenizer.check()

    def _expected_shapes(self) -> dict[str, tuple[int, ...]]:
        if self.kind == "master" or not isinstance(self.weights, FolderWeights):
            return self.shapes
        stored = dict(self.shapes)
        for name in self.ternary_names:
            with located(self.path, name):
                stored |= {name: packed_shape(self.shapes[name]), f"{name}_scale": (1,)}
        return stored


def open_source(path: Path, *, quantize: bool = False, tokenizer: Path | None = None) -> Source:
    """Opens a stored model; see the module's text.

    Args:
        path: where it is.
        quantize: takes a dense folder's weights for masters.
        tokenizer: a folder with tokenizer.json, in place of the model's own.

    Raises:
        UserError: there is no BitNet model, or its parts do not fit together.
    """
    if path.is_file():
        source = _gguf(path)
    elif (path / STATE).is_file():
        source = _checkpoint(path)
    else:
        source = _folder(path, quantize)
    if tokenizer is not None:
        source = _with_tokenizer(source, tokenizer)
    source.check()
    return source


def _folder(source: Path, quantize: bool) -> Source:
    path = source / "model" if (source / "model" / CONFIG).is_file() else source
    if not (path / CONFIG).is_file():
        raise UserError(
            f"{source}: must be a finished run's directory, a model folder, a checkpoint or a GGUF file, has no "
            f"{CONFIG} or model/{CONFIG}"
        )
    folder = HFFolder(path)
    online = {"quantization_config": quantization_config("autobitlinear", "online")}
    config = _config(path, {**folder.config, **online})  # first, so that another architecture is called by its name
    kind = folder_kind(path)
    if kind == "dense" and not quantize:
        raise UserError(
            f"{path / CONFIG}: quantization_config must be there, got none: a dense model has no codes; --quantize "
            "takes its weights for masters"
        )
    config_json = folder.config | (online if kind == "dense" else {})
    shapes = {name: tensor.shape for name, tensor in folder.tensors.items()}
    tokenizer = TokenizerFiles(path, {**asdict(config), **config_json})
    weights = FolderWeights(folder, kind)
    run_dir = path.resolve().parent if path.name == "model" else None
    return Source(
        path,
        "ternary" if kind == "packed" else "master",
        config,
        config_json,
        weights,
        tokenizer,
        shapes,
        name=(run_dir or path.resolve()).name,
        run_dir=run_dir,
        licence=licence_of(path),
    )


def _gguf(path: Path) -> Source:
    file = GGUFFile(path)
    config_json = gguf_config(file)
    config = _config(path, config_json)
    names = {gguf_name(name): name for name in tensor_shapes(skeleton(config))}
    shapes = {names.get(stored, stored): info.shape for stored, info in file.tensors.items()}
    tokenizer = GGUFTokenizer(path, file.metadata)
    name = str(file.metadata.get("general.name", path.stem))
    found = file.metadata.get("general.license")
    licence = found if isinstance(found, str) else None
    weights = GGUFWeights(file)
    return Source(path, "ternary", config, config_json, weights, tokenizer, shapes, name, licence=licence)


def _checkpoint(path: Path) -> Source:
    path = path.resolve()  # checkpoints/last is a link
    weights = CheckpointWeights(path / STATE)
    config_json = json.loads(weights.identity["model"])
    run_dir = path.parent.parent
    tokenizer = TokenizerFiles(run_dir / "model", {"vocab_size": config_json["vocab_size"]})
    config = _config(path, config_json)
    return Source(path, "master", config, config_json, weights, tokenizer, weights.shapes, run_dir.name, run_dir)


def _with_tokenizer(source: Source, folder: Path) -> Source:
    """The same model with another tokenizer, whose ids replace those of config.json."""
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"--tokenizer {folder}: must be a folder with tokenizer.json, has none")
    config_json = {key: value for key, value in source.config_json.items() if not key.endswith("_token_id")}
    return replace(source, config_json=config_json, tokenizer=TokenizerFiles(folder, asdict(source.config)))


def _config(path: Path, config_json: Mapping[str, Any]) -> BitNetConfig:
    try:
        return BitNetConfig.from_json(config_json)
    except TypeError as error:
        raise UserError(f"{path / CONFIG}: a field has the wrong type ({error}); write it again") from None
