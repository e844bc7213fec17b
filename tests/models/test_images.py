"""Images longer than the window of a multimodal model: the mask that a remark of its layers says."""

import numpy as np
import pytest
from capture import LENGTH, capture, tiny_config, tiny_model, tiny_options

from kernelry import masks
from kernelry.models import from_huggingface

pytestmark = pytest.mark.models

LONG = (np.arange(LENGTH) >= 5) & (np.arange(LENGTH) < 25)


def calls_of(options, name):
    import torch

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 120, (2, LENGTH), generator=generator)
    types = torch.tensor(LONG).int().expand(2, -1)
    return capture(tiny_model(tiny_config(options)), input_ids=ids, **{name: types})


@pytest.mark.parametrize(
    ("model_type", "text", "name"),
    [
        ("gemma3", {}, "token_type_ids"),
        (
            "gemma4",
            {"vocab_size_per_layer_input": 128, "use_bidirectional_attention": "vision"},
            "mm_token_type_ids",
        ),
    ],
)
def test_a_long_image_keeps_to_the_window_on_its_left(model_type, text, name):
    options = tiny_options(model_type, {"text_config": text})
    kind = from_huggingface(options).kind("sliding")
    assert "(Causal() | spans) & SlidingWindow(window - 1, S)" in kind.remarks[-1]
    spans = masks.BidirectionalSpans.from_flags(LONG)
    said = (masks.Causal() | spans) & masks.SlidingWindow(kind.config.mask.left, LENGTH)
    seen = np.asarray(said.materialize(LENGTH, LENGTH))[0, 0]
    simple = np.asarray((kind.config.mask | spans).materialize(LENGTH, LENGTH))[0, 0]
    for call in calls_of(options, name):
        if call.layer in kind.layers:
            np.testing.assert_array_equal(call.visible, seen)
            assert not np.array_equal(call.visible, simple)
