"""Results: their files, tables and pictures."""
