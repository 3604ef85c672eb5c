"""What a run's speed is counted from."""

import time
from dataclasses import replace

import pytest
import torch

from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.training.throughput import Throughput, flops_per_token, peak_flops
from tests.support import TINY


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def test_flops_are_six_per_weight_and_twelve_per_position() -> None:
    matrices = 384 * 128 + 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128)
    assert flops_per_token(BitNetForCausalLM(TINY), 64) == 6 * matrices + 12 * 2 * 128 * 64


def test_an_embedding_beside_a_head_is_looked_up() -> None:
    untied = BitNetForCausalLM(replace(TINY, tie_word_embeddings=False))
    assert flops_per_token(untied, 64) == flops_per_token(BitNetForCausalLM(TINY), 64)


def test_rates_leave_validation_out_and_tell_waiting_from_work(clock: Clock) -> None:
    throughput = Throughput()
    throughput.restart()
    clock.now += 1.0
    throughput.batch_arrived(64)  # waited 1 s
    clock.now += 5.0
    throughput.batch_asked_for()
    throughput.pause()
    clock.now += 100.0
    throughput.go_on()
    clock.now += 2.0
    throughput.batch_arrived(32)  # waited 2 s
    clock.now += 2.0
    model = BitNetForCausalLM(TINY)
    rates = throughput.read(500.0, model, devices=2)
    assert rates["tokens_per_second"] == pytest.approx(50.0)
    assert rates["tflops_per_second"] == pytest.approx(25.0 * flops_per_token(model, 48) / 1e12)
    assert rates["data_wait"] == pytest.approx(0.3)
    assert "mfu" not in rates  # no CPU has a known peak
    clock.now += 4.0
    assert throughput.read(8.0, model, devices=1)["tokens_per_second"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_are_those_of_dense_bfloat16(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0)) == peak
    assert peak_flops(torch.device("cpu")) is None
