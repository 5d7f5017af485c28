"""Programs, one for each thing a person does."""
