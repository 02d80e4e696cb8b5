"""Pictures and codes from what people have."""
