"""Compiling for TPU pods that are not there, and reading what the compiler made."""
