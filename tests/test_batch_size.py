"""A trial's losses say nothing of the size of its batches, whatever the scheme scales its activations by."""

import pytest

from loralab.quantization.int8_product import Int8Product
from loralab.run import Runner


@pytest.mark.parametrize(("family", "kind"), [("llama", "ragged"), ("t5", "ragged"), ("distilbert", "labels")])
def test_the_validation_loss_of_an_int8_product_is_the_same_at_every_batch_size(make_spec, make_data, family, kind):
    losses = []
    for batch_size in (1, 2, 3):
        data = make_data(kind, batch_size=batch_size)
        quantizer = Int8Product(granularity="tensor", threshold=1.0)
        spec = make_spec(str(batch_size), family, kind, data=data, quantization=quantizer, max_steps=0)
        losses.append(Runner().run([spec])[0]["metrics"]["val/loss"])
    assert losses == [pytest.approx(losses[0], rel=2e-5)] * 3
