"""How much the units of a structure matter: one file per family of criteria, and the table that finds them by name."""
