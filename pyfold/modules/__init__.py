"""Modules in memory: convolutional networks, MLPs, whatever torch runs, folded into smaller ordinary modules."""
