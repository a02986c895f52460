"""Tests of the benchmarks' machinery. No timings."""
