"""Scripts that time EdgeMIN against plain ways of doing the same: `python -m benchmarks.<name>`, see README.md."""
