"""The exact operators on random games, beside the deep algorithms; the README says what they show."""
