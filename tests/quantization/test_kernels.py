"""The door to bitsandbytes."""

import logging

from loralab.quantization.kernels import import_bitsandbytes


def test_bitsandbytes_speaks_but_of_a_kernel_that_nobody_asked_for(caplog):
    import_bitsandbytes()
    import_bitsandbytes()
    said = logging.getLogger("bitsandbytes.backends.cpu.ops")
    said.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "no such module")
    said.warning("something else")
    assert [record.getMessage() for record in caplog.records if record.name == said.name] == ["something else"]
