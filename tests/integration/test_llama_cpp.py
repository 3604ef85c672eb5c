"""llama.cpp computes with a silu model in TQ1_0 and TQ2_0 what was trained.

Skipped without llama-cpp-python, which takes a quarter of an hour to compile. llama.cpp rounds activations by blocks of
256 and not by token, so that perplexity may move by 2 %.
"""

from pathlib import Path

import pytest

from bitnet_train.export import export
from bitnet_train.export.runtimes import compare
from tests.folders import TEXT, write_master
from tests.integration.conftest import SHAPE

pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.runtime


@pytest.mark.parametrize("type", ["tq1_0", "tq2_0"])
def test_llama_cpp_computes_the_trained_function(tmp_path: Path, type: str) -> None:
    write_master(tmp_path / "master", SHAPE | {"hidden_act": "silu"})
    export(tmp_path / "master", tmp_path / "model.gguf", format="gguf", type=type)
    (tmp_path / "text").write_text(TEXT)
    (report,) = compare(tmp_path / "master", tmp_path / "model.gguf", tmp_path / "text")
    assert report.agreement is not None, report
    assert report.agreement.kl < 5e-3
    assert report.agreement.perplexity_ratio == pytest.approx(1, abs=0.02)
