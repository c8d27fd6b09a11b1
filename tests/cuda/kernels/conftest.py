"""Triton's interpreter, as it is in every version that portmoe takes."""

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _loop_bounds_may_be_loaded(monkeypatch):
    """Before Triton 3.7 its interpreter holds a loaded number as an array; numpy 2.4 makes no int of it."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.squeeze(self.handle.data)))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
