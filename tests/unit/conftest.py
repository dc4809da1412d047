"""Settings of the unit tests."""

import functools

import pytest
from torch.nn.attention import flex_attention


@pytest.fixture(autouse=True, scope="session")
def masks_of_flex_attention_uncompiled():
    """The library compiles the mask of flex attention, which costs half a minute of C++ for each shape.

    The mask is the same without; the golden models have it compiled.
    """
    from transformers import masking_utils

    with pytest.MonkeyPatch.context() as patch:
        if hasattr(masking_utils, "create_block_mask"):
            uncompiled = functools.partial(_without_compiling, flex_attention.create_block_mask)
            patch.setattr(masking_utils, "create_block_mask", uncompiled)
        yield


def _without_compiling(create, *args, **options):
    return create(*args, **{**options, "_compile": False})
