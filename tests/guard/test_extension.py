"""The extension's functions behind guard and survey, called directly."""

import pytest
import torch

from fused_adamw import layout
from fused_adamw.extension import load_extension
from fused_adamw.step import snapshot


def test_functions_of_the_extension_refuse_other_types():
    extension = load_extension()
    if isinstance(extension, str):
        pytest.skip("the extension is not built")
    probes = layout.probes()
    rest = (probes, torch.zeros(1, dtype=torch.int64).data_ptr(), True)
    guard = extension.make_guard(torch.Tensor, (), (), (), (), *rest)
    assert extension.check_guard(guard, [], {}) == (0, b"", [], [], None)
    assert extension.check_guard(guard, [()], {}) is None  # only lists are walked
    assert extension.check_guard(guard, [[1]], {}) is None
    assert extension.check_guard(guard, [], {1: 2}) == (0, b"", [], [], None)  # not the optimizer's
    assert extension.check_guard(guard, [], ()) is None
    for args in [(), (guard,), (guard, (), {}), (guard, [], {}, 1)]:
        with pytest.raises(TypeError, match="a capsule, a list and a mapping"):
            extension.check_guard(*args)
    with pytest.raises(ValueError, match="PyCapsule"):
        extension.check_guard(torch.Tensor.__dlpack_c_exchange_api__, [], {})
    t = torch.zeros(2)
    for args in [([], (), ()), ((1,), (None,), ()), ((t,), (), ()), ((t,), ((t, ()),), ()), ((), (), (1,))]:
        with pytest.raises((IndexError, RuntimeError, SystemError)):
            extension.make_guard(torch.Tensor, *args, (), *rest)
    with pytest.raises(SystemError):
        extension.make_guard(torch.Tensor, (), (), (), ["step"], *rest)
    with pytest.raises(NotImplementedError, match="another layout"):
        extension.make_guard(torch.Tensor, (), (), (), (), ((t, 12345),), *rest[1:])
    with pytest.raises(TypeError, match="8 arguments"):
        extension.make_guard(torch.Tensor)
    with pytest.raises(AttributeError, match="dlpack"):
        extension.make_guard(int, (), (), (), (), *rest)
    for args in [(), (guard, guard)]:
        with pytest.raises(TypeError, match="what check_guard returned"):
            extension.count_changes(*args)
    with pytest.raises(ValueError, match="PyCapsule"):
        extension.count_changes(guard)
    assert extension.move_guard(guard, b"") is None
    with pytest.raises(ValueError, match="0 bytes, got 8"):
        extension.move_guard(guard, bytes(8))
    for args in [(), (guard,), (guard, []), (guard, b"", 1)]:
        with pytest.raises(TypeError, match="a capsule and bytes"):
            extension.move_guard(*args)
    assert extension.survey(torch.Tensor, [], probes) == (b"", b"")
    for args in [(), (torch.Tensor, (), probes), (torch.Tensor, [], probes, 1)]:
        with pytest.raises(TypeError, match="a type, a list and a tuple"):
            extension.survey(*args)
    with pytest.raises(NotImplementedError, match="another layout"):
        extension.survey(torch.Tensor, [t], ((t, 12345),))


def assorted_tensors():
    class Subclass(torch.Tensor):
        pass

    x = torch.zeros(3, 4)
    with torch.inference_mode():
        born_in_inference = torch.zeros(3, 4)
    return [
        x, torch.zeros(3, 4), torch.nn.Parameter(x), x.t(), x[:, :1], x[:, :2], x.half(), x.view(4, 3),
        x.as_subclass(Subclass), torch.zeros(()), torch.zeros(0, 4), x.to(torch.complex64),
        x.to(torch.complex64).conj(), x.to(torch.complex64).conj().imag, born_in_inference,
        torch.zeros(1, 1, 1, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1, 1, 1),
    ]  # fmt: skip


def test_a_survey_in_cpp_tells_the_same_tensors_apart(monkeypatch):
    """As one in Python, and says the same of them."""
    if isinstance(load_extension(), str):
        pytest.skip("the extension is not built")
    tensors = assorted_tensors()
    forms, addresses = snapshot.Forms().survey(tensors)
    monkeypatch.setattr(snapshot, "load_extension", lambda: "not built")
    expected, same_addresses = snapshot.Forms().survey(tensors)
    assert addresses == same_addresses
    assert [form.key for form in forms] == [form.key for form in expected]
    assert [forms.index(form) for form in forms] == [expected.index(form) for form in expected]
