"""No garbage of other tests, and none that is found in the middle of one."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True)
def no_garbage():
    """While a model is trained, all of its class compute rotary positions by our function (policy/rotary.py). Here passes
    of models are recomputed that are not trained themselves: should another test's model be collected between, the
    recomputation would go another way."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
