"""Deformable engines behind one interface."""
