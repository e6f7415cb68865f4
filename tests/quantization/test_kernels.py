"""The door to bitsandbytes."""

import logging
import subprocess
import sys
from textwrap import dedent

from loralab.quantization.kernels import import_bitsandbytes


def test_bitsandbytes_speaks_but_of_a_kernel_that_nobody_asked_for(caplog):
    import_bitsandbytes()
    import_bitsandbytes()
    said = logging.getLogger("bitsandbytes.backends.cpu.ops")
    said.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "no such module")
    said.warning("something else")
    assert [record.getMessage() for record in caplog.records if record.name == said.name] == ["something else"]


def test_the_import_starts_no_compiler_and_leaves_torch_compile_as_it_was():
    script = """
        import sys
        import torch
        from loralab.quantization.kernels import import_bitsandbytes

        before = torch.compile
        import_bitsandbytes()
        assert torch.compile is before and "torch._inductor.compile_fx" not in sys.modules
        compiled = []
        torch.compile = lambda function, **options: compiled.append(options) or function
        ops = sys.modules["bitsandbytes.backends.default.ops"]
        code, absmax = torch.arange(4.0), torch.tensor([2.0])
        for _ in range(2):
            dense = ops._dequantize_blockwise_compute(torch.tensor([3, 1]), absmax, code, 2, torch.float32)
            assert dense.tolist() == [6.0, 2.0]
        assert compiled == [{"dynamic": False}]
    """
    subprocess.run([sys.executable, "-c", dedent(script)], check=True)
