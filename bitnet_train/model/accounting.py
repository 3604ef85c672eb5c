"""The fate of all that a stored model holds: it is used, left out because nothing is lost by that, or refused.

    lm_head.weight                      left out where the embedding serves as head and is the same matrix
    model.layers.N...rotary_emb.inv_freq    left out: config.json says as much (older transformers stored it)
    any other tensor without a place    refused
    a size that no tensor has           refused, before a decoder of this size is built
    modules_to_not_convert              refused where transformers would run a matrix as floats that is ternary here

transformers takes a head that differs from the embedding although config.json ties the two, and runs the layers that
quantization_config.modules_to_not_convert names as they are: to overlook either is to run another function.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from bitnet_train.errors import UserError
from bitnet_train.formats.gguf_bitnet import gguf_name
from bitnet_train.formats.gguf_file import GGUFFile
from bitnet_train.formats.hf_folder import CONFIG, HFFolder
from bitnet_train.formats.packing import VALUES_PER_BYTE
from bitnet_train.model.config import BitNetConfig
from bitnet_train.model.skeleton import skeleton, ternary_names

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

_COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")
_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"  # a name ends where a module's does


def check_sizes(path: Path, config: BitNetConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses sizes that no tensor has: a number in config.json or a header must not decide how much memory is taken.

    Args:
        path: the model, for the message.
        config: what config.json or the keys say.
        shapes: those of the stored tensors, by the names that transformers has for them; codes may be packed.

    Raises:
        UserError: vocabulary, width, number of layers or width of the feed-forward block are others in the tensors.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    down = ((hidden, inner), (hidden // VALUES_PER_BYTE, inner))
    layers = ((f"model.layers.{index}.mlp.down_proj.weight", down) for index in range(config.num_hidden_layers))
    for name, allowed in chain([(EMBEDDING, ((config.vocab_size, hidden),))], layers):
        if shapes.get(name) not in allowed:  # the first that is missing ends it, however many there should be
            raise UserError(
                f"{path}: tensor {name} must have shape {allowed[0]}, got {shapes.get(name, 'none')}; the weights do "
                f"not fit {CONFIG}"
            )


def check_places(file: GGUFFile, places: Iterable[str]) -> None:
    """Refuses a tensor of a GGUF file that has no place in the decoder, such as frequency factors of the positions.

    Args:
        file: the model.
        places: the names of the tensors that are read, as transformers has them.
    """
    if unknown := sorted(file.tensors.keys() - {gguf_name(name) for name in places}):
        raise UserError(
            f"{file.path}: tensor {unknown[0]} has no place in a BitNet, got {len(unknown)} such tensors; export the "
            "model again"
        )


def left_out(folder: HFFolder, places: Iterable[str], config: BitNetConfig) -> dict[str, str]:
    """Why each stored tensor that has no place in the decoder may be left out, by name.

    Args:
        folder: the model.
        places: the names of the tensors that are read.
        config: of the decoder.

    Raises:
        UserError: something would be lost.
    """
    reasons = {}
    for name in sorted(folder.tensors.keys() - {*places}):
        if (reason := expendable(name, config)) is None:
            raise UserError(
                f"{folder.path}: tensor {name} has no place in this BitNet (attention_bias {config.attention_bias}, "
                f"tie_word_embeddings {config.tie_word_embeddings}); start from another model"
            )
        if name == HEAD:
            _check_same_head(folder)
        reasons[name] = reason
    return reasons


def expendable(name: str, config: BitNetConfig) -> str | None:
    """Why a stored tensor of this name is not needed; None where it is, or has no place at all."""
    if name == HEAD and config.tie_word_embeddings:
        return "the embedding, stored twice"
    return f"computed from {CONFIG}" if _COMPUTED.search(name) else None


def _check_same_head(folder: HFFolder) -> None:
    same = folder.shape(HEAD) == folder.shape(EMBEDDING) and all(
        torch.equal(head().float(), embedding().float())
        for head, embedding in zip(folder.parts(HEAD), folder.parts(EMBEDDING), strict=True)
    )
    if not same:
        raise UserError(
            f"{folder.path}: {HEAD} must be {EMBEDDING} where {CONFIG} has tie_word_embeddings true, got other values, "
            "which transformers computes the logits with; set tie_word_embeddings to false, or remove the tensor"
        )


def check_modules(path: Path, quantization: Mapping[str, Any] | None, config: BitNetConfig) -> None:
    """Refuses a list of modules that transformers leaves as floats, if they are not those that are floats here.

    Args:
        path: config.json, for the message.
        quantization: its quantization_config.
        config: of the decoder.

    Raises:
        UserError: a ternary matrix is in the list, or the head is not: without a list it is left alone, with one
            transformers quantises what is not in it.
    """
    given = (quantization or {}).get("modules_to_not_convert")
    if given is None:
        return
    field = f"{path}: quantization_config.modules_to_not_convert"
    ternary = [name.removesuffix(".weight") for name in ternary_names(skeleton(config))]
    floats = [name for name in ternary if _matches(field, name, given)]
    if floats or not _matches(field, "lm_head", given):
        what = f"it names {floats[0]}" if floats else "it does not name lm_head"
        raise UserError(
            f"{field} must leave out the head and nothing else, as every linear layer of a decoder here is ternary, "
            f"got {given}: {what}; train the model with all of them ternary"
        )


def _matches(field: str, name: str, patterns: list[str]) -> bool:
    """Whether transformers leaves a module alone: quantizers_utils.py, `should_convert_module`."""
    try:
        return any(re.match(rf"(?:{key}){_BOUNDARY}", name) or name.endswith(key) for key in patterns)
    except re.error as error:
        raise UserError(f"{field} must hold regular expressions, got {patterns} ({error}); write it again") from None
