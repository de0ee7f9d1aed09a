"""The layers of the model as the paper has them; `layers.fast` only makes them fast."""
