"""The mesh, the table from logical axes to mesh axes, and what runs on it."""
