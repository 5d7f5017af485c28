"""Presets: each file has `get_config()`, its docstring is the lab notebook."""
