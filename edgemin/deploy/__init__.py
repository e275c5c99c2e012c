"""Models where they are served: exported to the formats of stock runtimes, and run in those."""
