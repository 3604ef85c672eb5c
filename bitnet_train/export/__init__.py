"""A trained model in the formats that others read: masters, through codes and scale, to bytes; then read back.

    master W  --quant.quantize_weight-->  q, g  -->  packed safetensors     2 bits a code, g in the dtype of the folder
                                                -->  GGUF I2_S              2 bits a code, g in float32
                                                -->  GGUF TQ1_0, TQ2_0      1.69 and 2.06 bits a code, g in float16
                                                -->  GGUF F32, F16, BF16    q g: a float runtime, too, gets the weights
                                                                            of the forward pass and never the masters
              --cast-------------------->  W    -->  master folder          to train on

    source      opens and checks the model      targets        where it can go, and why not elsewhere
    folders     writes model folders            gguf           writes GGUF files
    readback    compares what was written       runtimes       compares what others compute with it
    awkward     texts and conversations         tokenization   compares the ids that others make of them
    card, hub   README.md, upload               accounts       what was used, and what was left out
    exporter    checks, writes, compares        cli            the command

A format receives codes and scale and never derives them again: the absmean of q g is not g, it is smaller by the share
of codes that are not zero. Packed folders and GGUF files are sources too, their codes and scales taken as they are.
Embedding, head and norms are cast. Everything is read, made and written a part at a time: memory holds one matrix.
"""

from bitnet_train.export.cli import main
from bitnet_train.export.exporter import ExportResult, export
from bitnet_train.export.readback import NotVerifiedError, Verification, verify

__all__ = ["ExportResult", "NotVerifiedError", "Verification", "export", "main", "verify"]
