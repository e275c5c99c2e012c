"""Tasks and their data: read, checked, tokenized once, bucketed by length; and text without labels, streamed."""
