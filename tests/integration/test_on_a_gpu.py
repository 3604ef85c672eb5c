"""A GPU computes what the CPU does, a killed run goes on bit for bit, one rank of NCCL is the whole."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from bitnet_train.errors import EXIT_REQUEUE
from bitnet_train.losses.tokens import cross_entropy_sum
from bitnet_train.model.attention import Documents
from bitnet_train.model.config import BitNetConfig
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.training.low_bit import gather_codes, refresh_scales
from bitnet_train.training.sharding import own_part, shard
from tests.support import TINY_PRETRAIN, train, write_corpus

pytestmark = pytest.mark.gpu
CONFIG = BitNetConfig(512, 256, 768, 2, 4, 2, tie_word_embeddings=True)
RUN = [
    *TINY_PRETRAIN,
    "trainer=gpu",
    "+trainer.deterministic=true",
    "model.hidden_size=128",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "data.val=null",
    "max_steps=12",
    "checkpoint_every=6",
]


def model_on(device: str, config: BitNetConfig = CONFIG) -> BitNetForCausalLM:
    torch.manual_seed(0)
    return BitNetForCausalLM(config).to(device)


def loss_and_gradients(model: BitNetForCausalLM, device: str) -> list[Tensor]:
    torch.manual_seed(1)
    ids, documents = torch.randint(512, (2, 64)).to(device), (torch.arange(64) // 20).expand(2, 64).to(device)
    loss = cross_entropy_sum(model.model(ids, document_ids=documents), model.head_weight, ids)
    return [x.detach().cpu() for x in (loss, *torch.autograd.grad(loss, list(model.parameters())))]


def test_a_step_in_float32_is_that_of_the_cpu() -> None:
    (loss, *got), (expected, *want) = (loss_and_gradients(model_on(device), device) for device in ("cuda", "cpu"))
    # A tie in the rounding of an activation falls the other way now and then.
    torch.testing.assert_close(loss, expected, rtol=2e-4, atol=0)
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 5e-2 * b.norm()


@pytest.mark.parametrize("vocab", [512, 1001])
def test_the_loss_in_bfloat16_has_the_gradients_of_float64(vocab: int) -> None:
    hidden, weight = torch.randn(300, 256, device="cuda"), torch.randn(vocab, 256, device="cuda") / 16
    labels, exact = torch.randint(vocab, (300,), device="cuda"), []
    for dtype in (torch.float32, torch.float64):
        inputs = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        if dtype == torch.float32:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = cross_entropy_sum(inputs[0], inputs[1], labels, z_loss=1e-4)
        else:
            logits = inputs[0] @ inputs[1].t()
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            loss = loss + 1e-4 * logits.logsumexp(dim=1).square().sum()
        exact.append([loss.detach().double(), *(x.double() for x in torch.autograd.grad(loss, inputs))])
    for a, b in zip(*exact, strict=True):
        assert (a - b).norm() <= 1e-2 * b.norm()


def test_compiled_layers_keep_the_attention_within_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask of (batch, 1, seq, seq) would be made by `Documents.mask`."""

    def mask(self: Documents) -> Tensor:
        raise AssertionError("a mask is made")

    monkeypatch.setattr(Documents, "mask", property(mask))
    results = []
    for compiled in (False, True):
        model = model_on("cuda")
        for layer in model.model.layers if compiled else ():
            layer.compile()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            results.append(loss_and_gradients(model, "cuda"))
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 5e-2 * b.norm()


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path)
    assert train(*RUN, "run_dir=whole", cwd=folder).returncode == 0
    stopped = train(*RUN, "run_dir=parts", "+callbacks.stop={_target_: tests.faults.Terminate, step: 7}", cwd=folder)
    assert stopped.returncode == EXIT_REQUEUE
    assert train(*RUN, "run_dir=parts", "resume=auto", cwd=folder).returncode == 0
    whole, parts = ((folder / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


class Root(nn.Module):
    """FSDP calls it the root: its methods run the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.model = model_on("cuda")

    def training_step(self, ids: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return cross_entropy_sum(self.model.model(ids), self.model.head_weight, ids) / ids.numel()


@pytest.fixture
def nccl(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def curve(root: Root, after: Callable[[], None] = lambda: None) -> list[tuple[float, float]]:
    """Losses and norms of the gradient of three steps."""
    torch.manual_seed(2)
    ids, optimizer = torch.randint(512, (4, 128), device="cuda"), torch.optim.AdamW(root.parameters(), fused=True)
    seen = []
    for _ in range(3):
        loss = root.training_step(ids)
        loss.backward()
        norm = nn.utils.get_total_norm([own_part(p.grad) for p in root.parameters() if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()
        after()
        seen.append((loss.item(), norm.item()))
    return seen


@pytest.mark.usefixtures("nccl")
@pytest.mark.parametrize("low_bit", [False, True])
def test_one_rank_of_nccl_is_the_whole_decoder(low_bit: bool) -> None:
    whole, root = curve(Root()), Root()
    mesh = init_device_mesh("cuda", (1,), mesh_dim_names=("data_parallel",))["data_parallel"]
    shard(root, root.model, mesh, ("training_step",))
    if low_bit:
        gather_codes(root.model.model.layers)
        refresh_scales(root.model)
    sharded = curve(root, (lambda: refresh_scales(root.model)) if low_bit else (lambda: None))
    torch.testing.assert_close(torch.tensor(sharded), torch.tensor(whole), rtol=1e-5, atol=0)
