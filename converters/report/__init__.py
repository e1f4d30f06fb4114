"""The report of a conversion: what was made, how good it is, and why the rest was left out."""
