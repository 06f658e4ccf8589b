"""What a dataset is: its words, records and metadata as plain data. No I/O, no torch."""
