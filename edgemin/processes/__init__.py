"""Several processes: which one this is, who decides, who is told, and how all of them stop."""
