"""Tests of what a plan remembers of tensors: that each change that a kernel would stumble over is seen."""

import pytest

pytest.register_assert_rewrite(*(f"{__name__}.{module}" for module in ("held", "changes")))
