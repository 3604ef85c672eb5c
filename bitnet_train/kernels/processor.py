"""The products that the CPU makes fast. An x86 processor with AVX2 alone has neither int8 nor bfloat16 products:

2048 x 256 x 1024, two cores of an EPYC    int8 479 ms (torch._int_mm), bfloat16 160 ms, float32 27 ms
"""

import platform

import torch

_X86 = platform.machine().lower() in ("x86_64", "amd64")
HAS_INT8 = torch.cpu._is_vnni_supported() if _X86 else True
HAS_BFLOAT16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) if _X86 else True
