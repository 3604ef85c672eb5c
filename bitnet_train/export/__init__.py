"""A trained model in the formats that others read: masters, through codes and scale, to bytes; then read back.

    master W  --quant.quantize_weight-->  q, g  -->  packed safetensors     2 bits a code, g in the dtype of the folder
                                                -->  GGUF I2_S              2 bits a code, g in float32
                                                -->  GGUF F32, F16, BF16    q g: a float runtime, too, gets the weights
                                                                            of the forward pass and never the masters
              --cast-------------------->  W    -->  master folder          to train on

    source      reads and checks the folder         writers   makes folder or file
    readback    compares what was written           cli       the command

A format receives codes and scale and never derives them again: the absmean of q g is not g, it is smaller by the share
of codes that are not zero. Embedding, head and norms are cast.
"""

from bitnet_train.export.cli import main
from bitnet_train.export.readback import Verification, verify
from bitnet_train.export.writers import ExportResult, export

__all__ = ["ExportResult", "Verification", "export", "main", "verify"]
