"""The fixtures and helpers of the core tests."""
