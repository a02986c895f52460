"""What makes a step: the plan, its launches, the guard that keeps it true, the norm of all gradients."""
