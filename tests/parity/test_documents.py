"""Documents packed into one row: none sees another, and each gives the loss that it gives alone.

Every attention backend runs all of it: a new one is one more line of BACKENDS.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.model.execution import Execution
from bitnet_train.model.rope import RopeScaling

pytest.importorskip("transformers")

from tests.parity.reference import quiet_ids, theirs
from tests.support import TINY

BACKENDS = ["auto", "sdpa"]  # of `Execution.attention`
KINDS = [pytest.param(False, id="dense"), pytest.param(True, id="ternary")]
LENGTHS = (70, 1, 130, 60)  # tokens of the documents in a row: some share a block of queries, some fill several
SHORT = (7, 1, 5)


@pytest.fixture(autouse=True)
def _as_written() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def decoder(backend: str, quantize: bool) -> BitNetForCausalLM:
    config = replace(
        TINY,
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        max_position_embeddings=256,
        rope_theta=1000.0,
        rope_scaling=RopeScaling("yarn", 4.0, 4),  # positions that do not restart would show
        initializer_range=0.1,
        quantize=quantize,
    )
    model = BitNetForCausalLM(config).eval()
    Execution(attention=backend).apply(model)
    return model


def packed(lengths: Sequence[int] = LENGTHS) -> tuple[Tensor, Tensor]:
    """document_ids and position_ids, int64 `(1, tokens)`, of one row with documents of these lengths."""
    documents = torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)])
    return documents[None], torch.cat([torch.arange(length) for length in lengths])[None]


@pytest.mark.parametrize("quantize", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_changing_a_document_changes_no_logit_of_another(backend: str, quantize: bool, changed: int) -> None:
    model, (documents, positions) = decoder(backend, quantize), packed()
    ids = torch.randint(0, 97, documents.shape)
    other_ids = torch.where(documents == changed, (ids + 1) % 97, ids)
    with torch.no_grad():
        before, after = (model(x, document_ids=documents, position_ids=positions) for x in (ids, other_ids))
    same = (before == after).all(dim=-1)
    assert torch.equal(same, documents != changed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_reaches_another_document_or_a_later_token(backend: str) -> None:
    model, (documents, positions) = decoder(backend, True), packed()
    embeddings = torch.randn(1, sum(LENGTHS), 64, requires_grad=True)
    logits = model(inputs_embeds=embeddings, document_ids=documents, position_ids=positions)
    for query in (0, 69, 70, 71, 127, 128, 129, 200, 201, 260):  # ends of documents and of blocks
        (grad,) = torch.autograd.grad(logits[0, query].square().sum(), embeddings, retain_graph=True)
        seen = (documents == documents[0, query]) & (torch.arange(sum(LENGTHS)) <= query)
        assert torch.equal(grad.ne(0).any(dim=-1), seen)


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """The summed cross-entropy of a document's tokens, `(1, tokens)` and logits with one position each."""
    return F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")


@pytest.mark.parametrize("quantize", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_packed_loss_is_the_sum_of_the_unpacked_ones(backend: str, quantize: bool) -> None:
    lengths = SHORT if quantize else LENGTHS
    model, (documents, positions) = decoder(backend, quantize), packed(lengths)
    reference = theirs(model)
    alone = [quiet_ids(reference, 1, length) for length in lengths]
    with torch.no_grad():
        together = model(torch.cat(alone, dim=1), document_ids=documents, position_ids=positions)
        parts = together.split(lengths, dim=1)
        losses = torch.stack([loss_of(logits, ids) for logits, ids in zip(parts, alone, strict=True)])
        expected = torch.stack([loss_of(model(ids), ids) for ids in alone])
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses.sum(), expected.sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_a_batch_have_documents_of_their_own(backend: str) -> None:
    model, (documents, positions) = decoder(backend, False), packed()
    documents, positions = documents.expand(2, -1).clone(), positions.expand(2, -1).clone()
    documents[1], positions[1] = 0, torch.arange(sum(LENGTHS))  # the second row is one document
    ids = torch.randint(0, 97, documents.shape)
    with torch.no_grad():
        both = model(ids, document_ids=documents, position_ids=positions)
        first = model(ids[:1], document_ids=documents[:1], position_ids=positions[:1])
        second = model(ids[1:])
    torch.testing.assert_close(both, torch.cat((first, second)), rtol=1e-5, atol=1e-5)
