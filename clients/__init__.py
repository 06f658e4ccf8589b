"""What people use: the dataset view, lenses, plots, the command line."""
