"""Fusion of the warped atlas and the model's answer."""
