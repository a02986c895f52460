"""Changes of what is held that a guard must see: of one tensor, and of anything else."""

import torch

# Changes of one tensor, made in place: its object stays the same.
MOVES = {
    "elsewhere": lambda t: t.clone(),
    "reshaped": lambda t: t.view(4, 3),
    "restrided": lambda t: t.as_strided((3, 4), (1, 3)),
    "cut": lambda t: t[:2],
    "flattened": lambda t: t.view(-1),
    "of another dtype": lambda t: t.view(torch.int32),
}
# Of another dtype, a parameter cannot have a gradient.
MOVES_OF_PARAMS = {name: move for name, move in MOVES.items() if name != "of another dtype"}


def step_replaced_by_an_equal_one(held):
    old, held.s["step"] = held.s["step"], torch.tensor(2.0)
    held.old = old  # or its memory could be that of the new one


def names_exchanged(held):
    step, m, v, n = held.s.values()
    held.state[held.p] = {"step": step, "exp_avg_sq": m, "exp_avg": v, "n": n}


def moment_of_a_subclass(held):
    held.s["exp_avg"] = held.s["exp_avg"].as_subclass(type("Subclass", (torch.Tensor,), {}))


def gradient_without_memory(held):
    held.p.grad.untyped_storage().resize_(0)


def moment_without_memory(held):
    held.s["exp_avg"].untyped_storage().resize_(0)


def moments_exchanged(held):
    held.s["exp_avg"], held.s["exp_avg_sq"] = held.s["exp_avg_sq"], held.s["exp_avg"]


def moment_no_tensor(held):
    held.s["exp_avg"] = None


def key_added(held):
    held.s["max_exp_avg_sq"] = torch.ones(3, 4)


def key_removed(held):
    del held.s["exp_avg_sq"]


def state_removed(held):
    del held.state[held.scalar]


def state_of_another_parameter(held):
    held.state[torch.zeros(())] = held.state.pop(held.scalar)


def parameter_replaced(held):
    held.groups[0][0] = torch.nn.Parameter(torch.zeros(3, 4))


def parameter_replaced_by_another_of_its_memory(held):
    held.groups[0][0] = torch.nn.Parameter(held.p.data)


def parameters_reordered(held):
    held.groups[0].reverse()


def parameter_added(held):
    held.groups[0].append(torch.nn.Parameter(torch.zeros(3)))


def parameter_removed(held):
    held.groups[0].pop()


def group_added(held):
    held.groups.append([held.without])


def parameters_swapped(held):
    other = torch.nn.Parameter(held.p.detach().clone())
    other.grad = held.p.grad
    torch.utils.swap_tensors(held.p, other)


def first_gradient(held):
    held.without.grad = torch.ones(2)


def gradient_transposed(held):
    held.p.grad = torch.ones(4, 3).t()


def gradient_strided(held):
    held.p.grad = torch.ones(3, 8)[:, ::2]


def gradient_smaller(held):
    held.p.grad.data = torch.ones(3, 3)


def gradient_of_another_dtype(held):
    held.p.grad.data = torch.ones(3, 4, dtype=torch.float64)


def gradient_sparse(held):
    held.p.grad = torch.ones(3, 4).to_sparse()


def gradient_of_a_subclass(held):
    held.p.grad = torch.ones(3, 4).as_subclass(type("Subclass", (torch.Tensor,), {}))


def gradient_negative(held):
    held.scalar.grad = torch.tensor(1 + 2j).conj().imag
    assert held.scalar.grad.is_neg()


def gradient_negative_at_the_same_address(held):
    held.scalar.grad = held.complex.conj().imag


def parameter_negated(held):
    held.p.data = torch._neg_view(held.p.data)


def moment_negated(held):
    held.s["exp_avg"] = torch._neg_view(held.s["exp_avg"])


def gradient_negated(held):
    held.p.grad = torch._neg_view(held.p.grad)


def moment_born_in_inference_mode(held):
    with torch.inference_mode():
        held.s["exp_avg"] = torch.from_numpy(held.s["exp_avg"].numpy())


def step_no_longer_the_state_s_first(held):
    held.s["step"] = held.s.pop("step")


CHANGES = [
    *(parameter_negated, moment_negated, gradient_negated, moment_born_in_inference_mode),
    step_no_longer_the_state_s_first,
    *(step_replaced_by_an_equal_one, moments_exchanged, moment_no_tensor, key_added, key_removed),
    *(names_exchanged, moment_of_a_subclass, moment_without_memory, gradient_without_memory),
    *(state_removed, state_of_another_parameter),
    *(parameter_replaced, parameters_reordered, parameter_added, parameter_removed, group_added),
    parameter_replaced_by_another_of_its_memory,
    *(parameters_swapped, first_gradient, gradient_transposed, gradient_strided, gradient_smaller),
    *(gradient_of_another_dtype, gradient_sparse, gradient_of_a_subclass),
    *(gradient_negative, gradient_negative_at_the_same_address),
]
