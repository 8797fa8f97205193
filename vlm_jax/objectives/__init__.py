"""Training methods, one file each. A new paper adds a file here and a line to the table in `base`."""
