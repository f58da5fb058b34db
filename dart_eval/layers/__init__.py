"""The FFN of a layer, whatever the family, and the sizes of a model."""
