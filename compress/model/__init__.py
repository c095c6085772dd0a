"""The adapter to transformers: open a model, read its structure, stream it block by block; and the tokens it is shown."""
