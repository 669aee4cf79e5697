"""Credit becomes rewards."""
