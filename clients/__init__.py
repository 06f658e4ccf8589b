"""What people use: the dataset view, lenses, figures, the command line."""
