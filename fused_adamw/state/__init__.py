"""What a state holds, what is refused, what is saved and loaded."""
