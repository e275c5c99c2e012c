"""What was computed once and is kept: files that are whole, keys of content and of code, artifacts and results."""
