"""How options are composed, checked and explained."""
