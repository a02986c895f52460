"""Tests of parameter groups."""
