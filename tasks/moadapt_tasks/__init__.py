"""Tasks of moadapt: one task a file, with its data reader and metrics."""
