"""The exact operators and the deep algorithms on random games; see the README for the findings."""
