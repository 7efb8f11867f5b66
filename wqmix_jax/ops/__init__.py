"""Small pure functions that losses are made of."""
