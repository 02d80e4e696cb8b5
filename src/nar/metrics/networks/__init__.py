"""Networks that judge or compare pictures."""
