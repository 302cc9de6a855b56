"""Evidence, estimate and verdict for each structure, without a label of the query."""
