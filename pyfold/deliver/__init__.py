"""The files around the folded weights that make a result load: one module per format."""
