"""Maps from query to atlas world."""
